"""Ended at any moment and started again: the same bytes as an undisturbed run (one CPU thread)."""

import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest

from tests.conftest import ROOT
from tests.interruption import STAGES, outcome

pytestmark = pytest.mark.fault


class Server:
    """Runs jobs of tests/interruption.py in processes of their own."""

    def __init__(self):
        command = [sys.executable, "-m", "tests.interruption"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)

    def run(self, *jobs):
        """[exit code, output, errors] of every job (folder, until, stage, moment, how)."""
        names = ("runs", "until", "stage", "moment", "how")
        jobs = [dict(zip(names, (*job, *("", 0, "")[len(job) - 2 :]))) for job in jobs]
        self.process.stdin.write(json.dumps([j | {"runs": str(j["runs"])} for j in jobs]) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


@pytest.fixture(scope="module")
def server():
    server = Server()
    yield server
    server.process.stdin.close()
    server.process.wait(60)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, server):
    """Every stage once: the folder, and how many events each stage has."""
    runs = tmp_path_factory.mktemp("undisturbed")
    [(code, out, errors)] = server.run((runs, STAGES[-1]))
    assert code == 0, errors
    return runs, json.loads(out.splitlines()[-1])


def copied_up_to(stage, undisturbed, runs):
    """The undisturbed results of the stages before one."""
    folders = {"teacher": ["prepare"], "graph": ["prepare", "teacher"]}
    runs.mkdir()
    for name in folders.get(stage, [] if stage == "prepare" else ["prepare", "teacher", "graph"]):
        shutil.copytree(undisturbed / name, runs / name)


def interrupt(server, stage, moment, how, undisturbed, runs):
    """End a stage at a moment, start it again, compare."""
    copied_up_to(stage, undisturbed, runs)
    [(code, _, errors)] = server.run((runs, stage, stage, moment, how))
    if how == "kill":
        assert code == -signal.SIGKILL, errors
    else:
        assert code == 1 and "Free some space" in errors and "Traceback" not in errors, errors
    kept = outcome(runs)
    [(code, out, errors)] = server.run((runs, stage))
    assert code == 0, errors
    expected, got = outcome(undisturbed), outcome(runs)
    assert got and {name: expected.get(name) for name in got} == got  # as an undisturbed run
    assert {name: got[name] for name in kept} == kept  # what was finished stays


def moments(count, seed, counts):
    """(stage, moment): stages in turn, a random moment of all events of the stage."""
    rng, stages = np.random.default_rng(seed), [STAGES[i % len(STAGES)] for i in range(count)]
    return [(stage, int(rng.integers(1, 0.95 * counts[stage]))) for stage in stages]


@pytest.mark.parametrize("stage", ["teacher", "graph", "distill"])
def test_killed_in_the_middle_it_ends_with_the_same_bytes(stage, server, undisturbed, tmp_path):
    """After about two thirds of its events: a student is in its second epoch."""
    runs, counts = undisturbed
    moment = int(0.65 * counts[stage])
    interrupt(server, stage, moment, "kill", runs, tmp_path / "runs")


def test_a_full_disk_ends_in_one_clear_error_and_the_next_start_resumes(
    server, undisturbed, tmp_path
):
    runs, counts = undisturbed
    interrupt(server, "distill", int(0.6 * counts["distill"]), "full", runs, tmp_path / "runs")


def test_processes_with_the_same_and_with_other_options_share_the_work(
    server, undisturbed, tmp_path
):
    """Nothing is there when three start: each result is made once, with the usual bytes."""
    answers = server.run(*[(tmp_path, until) for until in ("distill", "distill", "teacher")])
    assert [code for code, *_ in answers] == [0, 0, 0], answers
    got, expected = outcome(tmp_path), outcome(undisturbed[0])
    assert got and {name: expected[name] for name in got} == got
    counts = [json.loads(out.splitlines()[-1]) for _, out, _ in answers]
    for stage in ("teacher", "distill"):
        steps = sorted(count.get(f"{stage} steps", 0) for count in counts)
        assert steps == [0, 0, undisturbed[1][f"{stage} steps"]]  # one trained, the others waited


@pytest.mark.soak
@pytest.mark.parametrize("trial", range(24))
def test_soak_killed_in_every_stage(trial, server, undisturbed, tmp_path):
    stage, moment = moments(24, 1, undisturbed[1])[trial]
    interrupt(server, stage, moment, "kill", undisturbed[0], tmp_path / "runs")


@pytest.mark.soak
@pytest.mark.parametrize("trial", range(12))
def test_soak_full_disk_in_every_stage(trial, server, undisturbed, tmp_path):
    stage, moment = moments(12, 2, undisturbed[1])[trial]
    interrupt(server, stage, moment, "full", undisturbed[0], tmp_path / "runs")


@pytest.mark.soak
@pytest.mark.parametrize("trial", range(20))
def test_soak_flipped_bits(trial, server, undisturbed, tmp_path):
    """One bit of one file: named, and repaired by removing the folder; or never read again."""
    runs, rng = tmp_path / "runs", np.random.default_rng([4, trial])
    shutil.copytree(undisturbed[0], runs)
    files = [p for p in runs.glob("*/*/*") if p.is_file() and p.stat().st_size]
    files = sorted(p for p in files if p.name not in ("DONE", "env.json"))
    file = files[rng.integers(len(files))]
    content = bytearray(file.read_bytes())
    content[rng.integers(len(content))] ^= 1 << rng.integers(8)
    file.write_bytes(content)
    shutil.rmtree(runs / "ablation")  # something has to be made again
    [(code, _, errors)] = server.run((runs, STAGES[-1]))
    if code:
        assert file.name in errors and "Traceback" not in errors, errors
        if file.exists():
            shutil.rmtree(file.parent)
        [(code, _, errors)] = server.run((runs, STAGES[-1]))
        assert code == 0, errors
    expected, got = outcome(undisturbed[0]), outcome(runs)
    assert {name: expected[name] for name in got} == got
