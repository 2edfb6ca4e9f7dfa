"""Two processes on the CPU (torchrun, gloo): the scores of one process; killed, they resume."""

import os
import shutil
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import psutil
import pytest

from lesionkd_core import results
from lesionkd_core.config import AblationConfig, LesionKDError
from lesionkd_core.data.prepare import Prepared
from lesionkd_core.pipeline import Graph, Run, ablate, arm_config, distill_arms
from lesionkd_core.train import start_fabric
from tests.conftest import ROOT
from tests.tiny import CFG, OPTIONS

VALUES = {
    **OPTIONS,
    "epochs": 3,
    "lr": 0.01,  # 25 training images: four batches of six, three images a process
    "student": "tests.tiny:fixed_norm_student",
    "arms": "kd, method",
    "seeds": "0",
}
ARMS = ("kd", "method")


def torchrun(runs) -> subprocess.Popen:
    """Start `lesionkd ablate` in two processes."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    parameters = [
        word
        for name, value in VALUES.items()
        for word in ("-r" if name == "seeds" else "-p", name, str(value))
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "LESIONKD_RUNS": str(runs)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [*start, "-m", "lesionkd_core", "ablate", *parameters]
    return subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)


def ended(process: subprocess.Popen) -> SimpleNamespace:
    """Exit code, output and errors when it has ended."""
    try:
        out, errors = process.communicate(timeout=300)
    finally:
        process.kill()
    return SimpleNamespace(code=process.returncode, out=out, errors=errors)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The whole chain by two processes."""
    runs = tmp_path_factory.mktemp("two")
    done = ended(torchrun(runs))
    assert done.code == 0, done.errors
    done.runs = runs
    return done


def made(runs) -> set[str]:
    return {path.parent.relative_to(runs).as_posix() for path in runs.rglob("DONE")}


def only(runs, stage):
    [path] = (path.parent for path in runs.glob(f"{stage}/*/DONE"))
    return path


def arms_of(runs) -> list[Run]:
    by_losses = {
        Run(p.parent).config["losses"].get("kd", 0): Run(p.parent)
        for p in runs.glob("distill/*/DONE")
    }
    return [by_losses[weight] for weight in sorted(by_losses, reverse=True)]  # kd, method


def test_two_processes_train_what_one_does(two, tmp_path, monkeypatch):
    """From the same teacher and graph.

    Every loss is a mean over images and both processes have three images of each batch, so the
    averaged gradient is that of the whole batch. Where no norm uses the batch (arm kd) only the
    order of sums differs: measured 1e-7 of the loss, 1e-3 allowed, since AdamW enlarges rounding.
    The connectors of the method have the BatchNorm of three images in place of six, as in any
    distributed training without synchronized norms: measured 0.003, allowed 0.05.
    """
    monkeypatch.setenv("LESIONKD_RUNS", str(tmp_path))
    cfg = AblationConfig(**VALUES)
    data = Prepared(only(two.runs, "prepare"))
    teacher, graph = Run(only(two.runs, "teacher")), Graph(only(two.runs, "graph"))
    one = distill_arms(teacher, graph, data, [arm_config(cfg, arm, 0) for arm in ARMS])
    for arm, run, other, close in zip(ARMS, one, arms_of(two.runs), (1e-3, 0.05)):
        assert run.digest == other.digest  # the number of processes does not count
        losses = [x.history["loss_total"].to_numpy() for x in (run, other)]
        assert losses[0] == pytest.approx(losses[1], rel=close), arm
        soft = [x.per_case["soft_dice"].to_numpy() for x in (run, other)]
        assert np.abs(soft[0] - soft[1]).max() < close, arm


def test_one_process_finds_what_two_have_made(two, monkeypatch, messages):
    monkeypatch.setenv("LESIONKD_RUNS", str(two.runs))
    before = {path: path.stat().st_mtime_ns for path in two.runs.rglob("*") if path.is_file()}
    ablation = ablate(Prepared(only(two.runs, "prepare")), AblationConfig(**VALUES))
    assert not messages() and ablation.path == only(two.runs, "ablation")
    changed = [p for p, t in before.items() if p.stat().st_mtime_ns != t and p.suffix != ".lock"]
    assert not changed and len(made(two.runs)) == 6
    for run in ablation.runs.values():
        assert results.read_json(run.path / "env.json")["processes"] == 2


def test_one_process_prints_for_all(two):
    started = "training the teacher", "fitting the graph", "training 2 students"
    for line in (*started, "teacher, epoch 1/2:", "2 students, epoch 3/3:", "results: "):
        assert two.out.count(line) == 1, (line, two.out)


@pytest.mark.soak
@pytest.mark.fault
def test_after_a_killed_process_the_same_command_resumes_to_the_same_bytes(two, tmp_path):
    for stage in ("prepare", "teacher", "graph"):
        shutil.copytree(two.runs / stage, tmp_path / stage)
    process = torchrun(tmp_path)
    while len(list(tmp_path.glob("distill/*/checkpoint_last"))) < 2:
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    children = psutil.Process(process.pid).children()
    [second] = [child for child in children if child.environ().get("RANK") == "1"]
    second.kill()
    assert ended(process).code != 0
    assert not [name for name in made(tmp_path) if name.startswith(("distill", "ablation"))]
    again = ended(torchrun(tmp_path))
    assert again.code == 0 and "2 students: resumes after" in again.out, again.errors
    for run, other in zip(arms_of(tmp_path), arms_of(two.runs), strict=True):
        for table in ("per_case.csv", "history.csv"):
            assert (run.path / table).read_bytes() == (other.path / table).read_bytes()


@pytest.mark.fault
def test_more_processes_than_images_in_a_batch_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    with pytest.raises(LesionKDError, match="batch_size = 6 is too small for 8 processes"):
        start_fabric(CFG)
