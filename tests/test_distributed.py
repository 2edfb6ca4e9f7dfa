"""Two and three real processes on this machine's CPU (torchrun, gloo): the numbers of one process, one message, a killed one."""

import os
import shutil
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch

from lesionkd_core import ranks, store
from lesionkd_core.config import DistillConfig, LesionKDError
from lesionkd_core.layers import BatchNorm2d
from lesionkd_core.losses import EdgeGraph, FittedGraph, Measured, build_terms
from lesionkd_core.networks import TEACHERS, UNet, use_statistics
from lesionkd_core.stages import distill
from lesionkd_core.training import Look, Objective, gradients
from tests.conftest import ROOT

TINY = {
    "dataset": "phantom-ct", "pixels": 32, "cases": 34, "batch_size": 6, "teacher_epochs": 1, "graph_epochs": 1, "epochs": 4, "threads": 1, "device": "cpu",
    "weak_teacher": "allow",
}


def torchrun(command: str, runs, **values) -> subprocess.Popen:
    """Start a command of the package in two processes."""
    parameters = [word for name, value in (TINY | values).items() for word in ("-p", name, str(value))]
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "lesionkd_core", command, *parameters]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "LESIONKD_RUNS": str(runs)}
    return subprocess.Popen(start, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ended(process: subprocess.Popen) -> SimpleNamespace:
    """Exit code, output and errors once it is through."""
    try:
        out, err = process.communicate(timeout=300)
    finally:
        process.kill()
    return SimpleNamespace(code=process.returncode, out=out, err=err)


@pytest.fixture(scope="module")
def spread(tmp_path_factory):
    """A student and what it stands on, by two processes."""
    runs = tmp_path_factory.mktemp("two")
    done = ended(torchrun("distill", runs))
    assert done.code == 0, done.err
    done.runs = runs
    return done


def results(runs) -> set[str]:
    return {path.parent.relative_to(runs).as_posix() for path in runs.rglob("DONE")}


def test_two_processes_train_what_one_does(spread, tmp_path, monkeypatch):
    monkeypatch.setenv("LESIONKD_RUNS", str(tmp_path))
    one = distill(DistillConfig(**TINY), lambda *_: None)
    assert results(tmp_path) == results(spread.runs) and len(results(tmp_path)) == 4  # the number of processes is in no hash
    for stage in ("teacher", "distill"):
        [name] = [name for name in results(tmp_path) if name.startswith(stage)]
        run, other = (type(one)(runs / name) for runs in (tmp_path, spread.runs))
        assert (run.per_case["dice"] - other.per_case["dice"]).abs().max() < 0.01  # measured 0.0007; over many epochs runs part, as with threads
        assert run.history["loss_total"].to_numpy() == pytest.approx(other.history["loss_total"].to_numpy(), rel=0.02)  # measured 0.005


def test_a_notebook_finds_what_many_processes_made(spread, monkeypatch):
    monkeypatch.setenv("LESIONKD_RUNS", str(spread.runs))
    before, told = {p: p.stat().st_mtime_ns for p in spread.runs.rglob("*") if p.is_file() and p.suffix != ".lock"}, []
    run = distill(DistillConfig(**TINY), told.append)
    assert not told and before == {p: p.stat().st_mtime_ns for p in before}
    assert store.read_json(run.path / "env.json")["processes"] == 2


def test_one_process_speaks_for_all(spread):
    for line in ("training the teacher", "teacher 1/1:", "fitting the graph", "training 1 student", "student 4/4:", "results: "):
        assert spread.out.count(line) == 1, line
    assert spread.err == ""


@pytest.mark.fault
def test_a_killed_process_ends_the_run_and_it_goes_on_to_the_same_numbers(spread, tmp_path):
    for stage in ("prepare", "teacher", "graph"):
        shutil.copytree(spread.runs / stage, tmp_path / stage)
    process = torchrun("ablate", tmp_path, arms="method")
    while not list(tmp_path.glob("distill/*/checkpoint_last")):
        assert process.poll() is None
        time.sleep(0.01)
    [second] = [child for child in psutil.Process(process.pid).children() if child.environ().get("RANK") == "1"]
    second.kill()
    started, done = time.monotonic(), ended(process)
    assert done.code != 0 and time.monotonic() - started < 60
    assert done.err.count("a process of this run was lost") == 1 and "lesionkd_core/" not in done.err, done.err
    assert not [name for name in results(tmp_path) if name.startswith(("distill", "ablation"))]
    again = ended(torchrun("ablate", tmp_path, arms="method"))
    assert again.code == 0 and "student: goes on after epoch" in again.out, again.err
    [run] = [name for name in results(tmp_path) if name.startswith("distill")]
    for table in ("per_case.csv", "history.csv"):
        assert (tmp_path / run / table).read_bytes() == (spread.runs / run / table).read_bytes()


@pytest.mark.fault
def test_a_wrong_parameter_is_refused_once(tmp_path):
    done = ended(torchrun("distill", tmp_path, pixels=33))
    assert done.code != 0 and done.err.count("ConfigError: pixels = 33") == 1 and "lesionkd_core/" not in done.err, done.err
    assert not list(tmp_path.iterdir())


@pytest.mark.fault
def test_more_processes_than_cases_in_a_batch_are_refused(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "test")
    monkeypatch.setenv("WORLD_SIZE", "8")
    with pytest.raises(LesionKDError, match="batch_size = 6 is spread over 8 processes"):
        ranks.join(DistillConfig(**TINY))


def test_every_norm_can_see_the_whole_batch():
    networks = [UNet(width=4), *(make() for make in TEACHERS.values())]
    norms = [module for network in networks for module in network.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert norms and all(isinstance(norm, BatchNorm2d) for norm in norms)


def test_three_processes_take_the_step_of_one():
    done = subprocess.run([sys.executable, "-m", "tests.test_distributed"], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


# What follows runs in three processes of `python -m tests.test_distributed`.

CASES = 7
TERMS = {
    "alone": {"terms": ()}, "both": {}, "shuffled": {"shuffle_edges": True}, "rivals": {"terms": ("kd", "fitnets", "at", "cwd")}, "dist": {"terms": ("dist",)},
    "joint": {"graph": "joint"}, "relation": {"graph": "relation"}, "eagr": {"anchors": "eagr"}, "area": {"level_weights": "area", "w_feat": 1e-3},
    "halving": {"level_weights": "halving"}, "batch": {"teacher_bn": "batch"},
}
TOLERANCE = 3e-4


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Seven cases; the first two, all that the first process holds, have no lesion."""
    rng = np.random.default_rng(5)
    images = torch.from_numpy(rng.normal(size=(CASES, 3, 32, 32)).astype(np.float32)).contiguous(memory_format=torch.channels_last)
    masks = torch.zeros(CASES, 1, 32, 32)
    for case in range(2, CASES):
        masks[case, 0, case : case + 9, 2 * case : 2 * case + 12] = 1
    return images + masks, masks


def objective(options: dict) -> tuple[Objective, torch.nn.Module]:
    cfg = DistillConfig(**TINY | options)
    torch.manual_seed(1)
    student, teacher = UNet(width=4), UNet(width=8)
    fitted = FittedGraph(EdgeGraph(32, anchors=cfg.anchors), torch.ones(cfg.states))
    parts = Objective(student, build_terms(cfg, student, teacher, Measured(fitted)), cfg).to(memory_format=torch.channels_last)
    return parts.train(), use_statistics(teacher, cfg.teacher_bn).to(memory_format=torch.channels_last)


def step(options: dict, cases: int) -> dict[str, torch.Tensor]:
    """Losses, gradients and statistics after one batch, of which this process sees its part."""
    parts, teacher = objective(options)
    with ranks.batch(cases):
        images, masks = (x[:cases][ranks.part(cases)] for x in batch())
        with torch.no_grad():
            look = Look(masks, *teacher.forward_features(images))
        losses = parts(images, masks, look)
        weighted = {name: ranks.weight() * weight * losses[name] for name, weight in parts.weights().items()}
        measured = gradients(parts.network, weighted)
        sum(weighted.values()).backward()
    ranks.add_gradients([p for p in parts.parameters() if p.requires_grad])
    found = {name: p.grad for name, p in parts.named_parameters() if p.grad is not None} | dict(parts.named_buffers())
    return found | {f"loss {name}": ranks.total(loss.detach()) for name, loss in weighted.items()} | {n: torch.tensor(v) for n, v in measured.items()}


@contextmanager
def alone():
    """This process as if it were the only one."""
    kept, ranks._steps = ranks._steps, None
    try:
        yield
    finally:
        ranks._steps = kept


def farthest(options: dict, cases: int) -> tuple[float, str]:
    """Largest difference to a single process over gradients, statistics and losses, relative to each one's largest value.

    The gradient of a bias in front of a norm is left out: it is 0 but for rounding.
    """
    together = step(options, cases)
    with alone():
        expected = step(options, cases)
    assert expected.keys() <= together.keys() and not any(together[name].any() for name in together.keys() - expected.keys())
    compared = {name: value.double() for name, value in expected.items() if not (name.startswith("network") and name.endswith((".0.bias", ".3.bias")))}
    scale = {name: 1.0 if name.startswith("cos") else max(float(value.abs().max()), 1e-3) for name, value in compared.items()}
    return max((float((together[name].double() - value).abs().max()) / scale[name], name) for name, value in compared.items())


def of_three(rank: int, port: int) -> None:
    os.environ |= {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "3", "GROUP_RANK": "0", "GROUP_WORLD_SIZE": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port}", "TORCHELASTIC_RUN_ID": "test"}
    ranks.SILENCE = ranks.timedelta(seconds=3)
    ranks.join(DistillConfig(**TINY))
    apart = {(name, CASES): farthest(options, CASES) for name, options in TERMS.items()}  # 2, 2 and 3 of seven cases
    apart |= {(name, 2): farthest(TERMS[name], 2) for name in ("shuffled", "dist", "joint")}  # of two cases both
    print(apart, flush=True)
    assert max(apart.values())[0] < TOLERANCE
    ranks.after_first(lambda: time.sleep(4 * ranks.first()))  # longer than a step may take
    assert ranks.total(torch.ones(1)) == 3


if __name__ == "__main__":
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.set_num_threads(1)
    torch.multiprocessing.start_processes(of_three, (port,), nprocs=3, start_method="fork")
