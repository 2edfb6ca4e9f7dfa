"""Ended at any moment, started again: the same bytes as an undisturbed run, on a CPU with one thread (tests/interruption.py)."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from lesionkd_core.config import DistillConfig
from lesionkd_core.stages import distill
from tests import interruption
from tests.conftest import ROOT

ORDER = ("ablation", "prepare", "teacher", "distill", "graph", "figures", "export")
"""Stages in the order in which trials take their turns."""


def start(runs: Path, *words: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "tests.interruption", *words]
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | {"LESIONKD_RUNS": str(runs)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(runs: Path, *words: str) -> tuple[int, str, str]:
    process = start(runs, *words)
    out, err = process.communicate(timeout=600)
    return process.returncode, out, err


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, request):
    """Every stage once (figures and export only for the soak): the folder, and how many events each stage has."""
    runs = tmp_path_factory.mktemp("undisturbed")
    code, out, err = run(runs, "export" if request.config.option.markexpr == "soak" else "ablation")
    assert code == 0, err
    return runs, json.loads(out.splitlines()[-1])


def outcome_of(runs: Path, monkeypatch) -> dict[str, str]:
    monkeypatch.setenv("LESIONKD_RUNS", str(runs))
    return interruption.outcome()


def before(stage: str, undisturbed: Path, runs: Path) -> None:
    """A copy of the undisturbed results up to a stage."""
    made = list(interruption.STAGES)
    keep = {"prepare", "teacher", "graph", "distill"} & set(made[: made.index(stage)])
    if stage == "distill":
        keep -= {"distill"}
    for name in keep - ({"distill"} if stage in ("ablation", "figures", "export") else set()):
        shutil.copytree(undisturbed / name, runs / name)
    if stage in ("figures", "export"):
        for name in ("distill", "ablation"):
            shutil.copytree(undisturbed / name, runs / name, ignore=shutil.ignore_patterns("figures"))
    runs.mkdir(exist_ok=True)


def interrupt(stage: str, moment: int, how: str, undisturbed: Path, runs: Path, monkeypatch) -> float:
    """End a stage at a moment, start it again, compare; the seconds that the second start took."""
    before(stage, undisturbed, runs)
    code, _, err = run(runs, stage, stage, str(moment), how)
    if how == "kill":
        assert code == -signal.SIGKILL, err
    else:
        assert code == 1 and "Free some space" in err and "Traceback" not in err, err
    kept = outcome_of(runs, monkeypatch)
    started = time.perf_counter()
    code, _, err = run(runs, stage)
    seconds = time.perf_counter() - started
    assert code == 0, err
    expected, got = outcome_of(undisturbed, monkeypatch), outcome_of(runs, monkeypatch)
    assert got and {name: expected.get(name) for name in got} == got, "as an undisturbed run"
    assert {name: got[name] for name in kept} == kept, "what was finished stays"
    assert any(name.startswith(path.name) for path in runs.glob(f"{'ablation' if stage == 'figures' else stage}/*-????????") for name in got)
    return seconds


def trials(count: int, seed: int, counts: dict[str, int]) -> list[tuple[str, int]]:
    """(stage, moment): stages in turn, moments at random over all events of the stage."""
    rng = np.random.default_rng(seed)
    stages = [ORDER[i % len(ORDER)] for i in range(count)]
    return [(stage, int(rng.integers(1, 0.95 * counts[stage]))) for stage in stages]


@pytest.mark.fault
@pytest.mark.parametrize("trial", range(3))
def test_killed_at_a_random_moment_it_ends_with_the_same_bytes(trial, undisturbed, tmp_path, monkeypatch):
    stage, moment = trials(3, 0, undisturbed[1])[trial]
    interrupt(stage, moment, "kill", undisturbed[0], tmp_path / "runs", monkeypatch)


@pytest.mark.fault
def test_a_full_disk_ends_in_one_clear_error_and_the_next_start_goes_on(undisturbed, tmp_path, monkeypatch):
    moment = int(0.6 * undisturbed[1]["distill"])
    interrupt("distill", moment, "full", undisturbed[0], tmp_path / "runs", monkeypatch)


@pytest.mark.fault
@pytest.mark.soak
@pytest.mark.parametrize("trial", range(21))
def test_soak_killed_in_every_stage(trial, undisturbed, tmp_path, monkeypatch, soaked):
    stage, moment = trials(21, 1, undisturbed[1])[trial]
    with soaked(f"kill -9 in {stage}") as done:
        done(interrupt(stage, moment, "kill", undisturbed[0], tmp_path / "runs", monkeypatch))


@pytest.mark.fault
@pytest.mark.soak
@pytest.mark.parametrize("trial", range(7))
def test_soak_full_disk_in_every_stage(trial, undisturbed, tmp_path, monkeypatch, soaked):
    stage, moment = trials(7, 2, undisturbed[1])[trial]
    with soaked("disk full") as done:
        done(interrupt(stage, moment, "full", undisturbed[0], tmp_path / "runs", monkeypatch))


@pytest.mark.fault
@pytest.mark.soak
@pytest.mark.parametrize("trial", range(10))
def test_soak_killed_by_the_clock(trial, undisturbed, tmp_path, monkeypatch, soaked):
    """From outside, after a random time, in whatever it is doing."""
    runs = tmp_path / "runs"
    with soaked("kill -9 by the clock, whole chain") as done:
        process = start(runs, "export")
        try:
            process.communicate(timeout=float(np.random.default_rng([3, trial]).uniform(2, 25)))
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
        started = time.perf_counter()
        code, _, err = run(runs, "export")
        assert code == 0, err
        assert outcome_of(runs, monkeypatch) == outcome_of(undisturbed[0], monkeypatch)
        done(time.perf_counter() - started)


@pytest.mark.fault
@pytest.mark.soak
@pytest.mark.parametrize("trial", range(20))
def test_soak_flipped_bytes(trial, undisturbed, tmp_path, monkeypatch, soaked):
    """One bit of one file of the whole chain: named, and mended by removing the folder; or of a file that nothing reads again."""
    runs = tmp_path / "runs"
    shutil.copytree(undisturbed[0], runs)
    rng = np.random.default_rng([4, trial])
    files = sorted(p for p in runs.glob("*/*/*") if p.is_file() and p.name not in ("DONE", "env.json") and p.stat().st_size)
    file = files[rng.integers(len(files))]
    content = bytearray(file.read_bytes())
    content[rng.integers(len(content))] ^= 1 << rng.integers(8)
    file.write_bytes(content)
    (runs / "ablation").rename(runs / "was")  # something has to be made anew
    with soaked("flipped bit in a finished result") as done:
        started = time.perf_counter()
        code, _, err = run(runs, "export")
        if code:
            assert file.name in err and "not as it was written" in err and "Traceback" not in err, err
            shutil.rmtree(file.parent)
            code, _, err = run(runs, "export")
            assert code == 0, err
        expected = outcome_of(undisturbed[0], monkeypatch)
        got = outcome_of(runs, monkeypatch)
        assert {name: expected[name] for name in got} == got
        done(time.perf_counter() - started)


@pytest.mark.fault
def test_two_starts_of_one_configuration_share_the_work(undisturbed, tmp_path, monkeypatch):
    """One works, the other waits and finds it: the same bytes, and every step done once."""
    both = [start(tmp_path, "teacher") for _ in range(2)]
    ended = [process.communicate(timeout=600) for process in both]
    assert [process.returncode for process in both] == [0, 0], ended
    got, expected = outcome_of(tmp_path, monkeypatch), outcome_of(undisturbed[0], monkeypatch)
    assert got and {name: expected[name] for name in got} == got
    steps = sorted(json.loads(out.splitlines()[-1]).get("teacher steps", 0) for out, _ in ended)
    assert steps == [0, undisturbed[1]["teacher steps"]], "one trained, the other did not"


@pytest.mark.fault
def test_four_runs_at_once_over_the_same_data_do_not_disturb_each_other(tmp_path, monkeypatch):
    """Nothing is prepared yet when they start, so they also meet there."""
    values = {**interruption.TINY, "terms": "", "epochs": 2}
    words = [word for name, value in values.items() for word in ("-p", name, str(value))]
    command = [sys.executable, "-m", "lesionkd_core", "distill", *words, "-p", "seed"]
    four = [subprocess.Popen([*command, str(seed)], env=os.environ | {"LESIONKD_RUNS": str(tmp_path / "four")}, stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE, text=True) for seed in range(4)]
    ended = [process.communicate(timeout=600) for process in four]
    assert [process.returncode for process in four] == [0] * 4, ended
    monkeypatch.setenv("LESIONKD_RUNS", str(tmp_path / "one"))
    for seed in range(4):
        distill(DistillConfig(**values, seed=seed), lambda *_: None)
    alone = interruption.outcome()
    assert len(list((tmp_path / "four").glob("prepare/*/DONE"))) == 1
    assert outcome_of(tmp_path / "four", monkeypatch) == alone


@pytest.mark.fault
def test_the_lock_of_a_killed_process_is_free(undisturbed, tmp_path, monkeypatch):
    code, _, err = run(tmp_path, "teacher", "teacher", "40", "kill")
    assert code == -signal.SIGKILL, err
    assert list(tmp_path.glob("teacher/*.lock"))
    assert run(tmp_path, "teacher")[0] == 0
    expected = outcome_of(undisturbed[0], monkeypatch)
    assert all(expected[name] == digest for name, digest in outcome_of(tmp_path, monkeypatch).items())
