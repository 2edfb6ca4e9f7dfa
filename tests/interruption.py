"""The chain of stages in forked processes that are ended at a chosen moment.

`python -m tests.interruption` reads requests from standard input, each a line with a JSON list of
jobs, and answers with a list of [exit code, output, errors]. The jobs of a request run at the same
time, each forked from this process, which has imported everything and computed nothing.

A moment is the n-th event of a stage: a file under LESIONKD_RUNS opened, renamed or removed, a
folder made, or a training step. `kill` is kill -9; `full` is a disk that takes nothing more from
then on. The last line of a job's output counts the events of each stage.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import tempfile
import traceback
from pathlib import Path

import monai.losses
import monai.metrics  # noqa: F401  # the core imports MONAI late, every fork would do it again

import lesionkd_core.pipeline as pipeline
from lesionkd_core.config import AblationConfig, LesionKDError
from lesionkd_core.data.prepare import prepare
from lesionkd_core.train import Learner
from tests.tiny import OPTIONS

CFG = AblationConfig(**OPTIONS, arms="alone, method", seeds=1)
FILES = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir"}


class Chain:
    """Every stage once; each calls the ones before, whose results are found."""

    def prepare(self):
        return prepare(CFG)

    def teacher(self):
        return pipeline.train_teacher(self.prepare(), CFG)

    def graph(self):
        return pipeline.fit_edge_graph(self.teacher(), self.prepare(), CFG)

    def distill(self):
        cfgs = [pipeline.arm_config(CFG, arm, 0) for arm in ("feat", "method")]
        return pipeline.distill_arms(self.teacher(), self.graph(), self.prepare(), cfgs)

    def ablation(self):
        return pipeline.ablate(self.prepare(), CFG)


STAGES = ("prepare", "teacher", "graph", "distill", "ablation")


class Events:
    """Counts events by stage and ends the process, or fills the disk, at the target."""

    def __init__(self, stage: str, moment: int, how: str) -> None:
        self.target, self.how = (stage, moment), how
        self.stage, self.counts, self.full = "", {}, False
        self.fsync, self.step = os.fsync, Learner.step

    def happen(self) -> None:
        self.counts[self.stage] = self.counts.get(self.stage, 0) + 1
        if (self.stage, self.counts[self.stage]) == self.target:
            if self.how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            self.full = True

    def listen(self) -> None:
        runs = os.environ["LESIONKD_RUNS"]

        def hook(name, arguments):
            if self.stage and name in FILES and str(arguments[0]).startswith(runs):
                self.happen()

        def fsync(descriptor):
            if self.full:
                raise OSError(errno.ENOSPC, "No space left on device")
            self.fsync(descriptor)

        def step(learner, *args, **options):
            self.happen()
            name = f"{self.stage} steps"
            self.counts[name] = self.counts.get(name, 0) + 1
            return self.step(learner, *args, **options)

        sys.addaudithook(hook)
        os.fsync, Learner.step = fsync, step


def work(until: str, stage: str, moment: int, how: str) -> int:
    """All stages up to one; the exit code."""
    events = Events(stage, moment, how)
    events.listen()
    for name in STAGES[: STAGES.index(until) + 1]:
        events.stage = name
        try:
            getattr(Chain(), name)()
        except LesionKDError as error:
            print(error, file=sys.stderr)
            return 1
        events.stage = ""
    print(json.dumps(events.counts))
    return 0


def start(job: dict) -> tuple[int, list]:
    """Fork a process for a job; its number, and the files of its output and errors."""
    files = [tempfile.TemporaryFile("w+") for _ in range(2)]  # noqa: SIM115  # serve reads them
    child = os.fork()
    if not child:
        for file, descriptor in zip(files, (1, 2)):
            os.dup2(file.fileno(), descriptor)
        os.environ["LESIONKD_RUNS"] = job.pop("runs")
        code = 3
        try:
            code = work(**job)
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return child, files


def serve() -> None:
    for line in sys.stdin:
        answers = []
        for child, files in [start(job) for job in json.loads(line)]:
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            texts = [(file.seek(0), file.read())[1] for file in files]
            answers.append([code, *texts])
        print(json.dumps(answers), flush=True)


def outcome(runs: Path) -> dict[str, str]:
    """Checksums of all files of finished results, but those that hold times."""
    times, found = ("env.json", "summary.json", "checkpoint_last"), {}
    for done in sorted(runs.glob("*/*/DONE")):
        checksums = json.loads(done.read_text())
        found |= {f"{done.parent.name}/{n}": x for n, x in checksums.items() if n not in times}
    return found


if __name__ == "__main__":
    serve()
