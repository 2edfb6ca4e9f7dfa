"""The whole way of the data in a process of its own, ended at a chosen moment: `python -m tests.interruption UNTIL [STAGE MOMENT HOW]`.

A moment is the n-th event of a stage: a file under LESIONKD_RUNS opened, renamed or removed, a folder made, or a training step.
`kill` is kill -9; `full` is a disk that takes nothing more from then on. The last line printed counts the events of each stage.
"""

import errno
import hashlib
import json
import os
import signal
import sys

from lesionkd_core import store
from lesionkd_core.config import AblationConfig, ExportConfig, LesionKDError

TINY = {
    "dataset": "phantom-ct", "pixels": 32, "cases": 40, "batch_size": 6, "teacher_epochs": 2, "graph_epochs": 1, "epochs": 3, "threads": 1, "device": "cpu",
    "weak_teacher": "allow",
}
CFG = AblationConfig(**TINY, arms="alone, feat, method", seeds=1)
FILES = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir"}

counts: dict[str, int] = {}
stage, target, how, full = "", ("", 0), "kill", False


def event() -> None:
    global full
    counts[stage] = counts.get(stage, 0) + 1
    if (stage, counts[stage]) == target:
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        full = True


def listen(name: str, arguments: tuple) -> None:
    if stage and name in FILES and str(arguments[0]).startswith(os.environ["LESIONKD_RUNS"]):
        event()


def flush(descriptor: int, really=os.fsync) -> None:
    if full:
        raise OSError(errno.ENOSPC, "No space left on device")
    really(descriptor)


def prepare():
    from lesionkd_core.prepare import prepare_data

    prepare_data(CFG, tell)


def teacher():
    from lesionkd_core.stages import train_teacher

    train_teacher(CFG, tell)


def graph():
    from lesionkd_core.stages import fit_graph

    fit_graph(CFG, tell)


def distill():
    from lesionkd_core.stages import distill as make

    make(CFG.arm("feat", 1), tell)


def ablation():
    from lesionkd_core.stages import ablate

    ablate(CFG, tell)


def figures():
    import matplotlib

    matplotlib.use("agg")
    from lesionkd_core import figures as draw
    from lesionkd_core import tables
    from lesionkd_core.stages import ablate

    made = ablate(CFG, tell)
    draw.save(draw.gradients(made.history), "gradients", made.path / "figures", data=made.history)
    tables.save(made.table, "table", made.path / "figures")


def export():
    from lesionkd_core.export import export_student
    from lesionkd_core.stages import ablate

    export_student(ExportConfig(run=str(ablate(CFG, tell).runs["alone", 0].path), formats="onnx", sizes="32", threads=1, device="cpu", calibration=4), tell)


STAGES = {step.__name__: step for step in (prepare, teacher, graph, distill, ablation, figures, export)}


def tell(_message: str) -> None:
    """Nothing: only results count."""


def main() -> int:
    global stage, target, how
    from lesionkd_core.training import Learner

    until, *chosen = sys.argv[1:]
    if chosen:
        target, how = (chosen[0], int(chosen[1])), chosen[2]
    really_step = Learner.step

    def step(*args, **options):
        event()
        counts[f"{stage} steps"] = counts.get(f"{stage} steps", 0) + 1
        return really_step(*args, **options)

    Learner.step = step
    os.fsync = flush
    sys.addaudithook(listen)
    for name, work in STAGES.items():
        stage = name
        try:
            work()
        except LesionKDError as error:
            print(error, file=sys.stderr)
            return 1
        stage = ""
        if name == until:
            break
    print(json.dumps(counts))
    return 0


def outcome() -> dict[str, str]:
    """Every file of every finished result with its checksum, figures too, but for those that tell times or places."""
    found, differing = {}, ("env.json", "summary.json", "checkpoint_last", "model_card.md", "config.json")
    for path in sorted(store.runs_root().glob("*/*")):
        if path.is_dir() and store.is_done(path):
            found |= {f"{path.name}/{name}": digest for name, digest in json.loads((path / "DONE").read_text()).items() if name not in differing}
            found |= {f"{path.name}/{file.name}": hashlib.sha256(file.read_bytes()).hexdigest() for file in path.glob("figures/*")}
    return found


if __name__ == "__main__":
    sys.exit(main())
