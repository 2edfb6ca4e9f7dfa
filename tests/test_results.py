"""Result folders: names, found or made, locks, atomic files, checksums, checkpoints, lists."""

import os
import pickle
import re
import subprocess
import sys
from contextlib import contextmanager

import numpy as np
import pandas as pd
import pytest
import torch

from lesionkd_core import results
from lesionkd_core.config import (
    ConfigError,
    DistillConfig,
    LesionKDError,
    PrepareConfig,
    TeacherConfig,
)
from lesionkd_core.data.prepare import Prepared
from lesionkd_core.pipeline import Run
from lesionkd_core.predict import load_network
from lesionkd_core.results import DamagedResult, Result, UnfinishedRun, Wanted, find_or_make
from tests.conftest import ROOT, copy_of

# Folders ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cfg", "start"),
    [
        (TeacherConfig(teacher_seed=3, profile="cpu", dataset="busi"), "teacher/busi-cpu-s3-"),
        (DistillConfig(seed=5, teacher_seed=9), "distill/phantom-smoke-s5-"),
        (PrepareConfig(dataset="/data/my scans (v2)/"), "prepare/my_scans_v2_-smoke-s0-"),
    ],
)
def test_each_stage_shows_its_own_seed_and_a_plain_name(cfg, start):
    assert results.short(results.folder(Wanted(cfg, "u"))).startswith(f"runs/{start}")


def made(paths):
    """A `make` that writes one file, and remembers what it was asked for."""

    def make(missing):
        paths.append(list(missing))
        for path in missing:
            results.write_text(path / "content", path.name)

    return make


def test_only_what_is_missing_is_made_and_equal_configurations_once(runs):
    calls, cfgs = [], [PrepareConfig(cases=n) for n in (20, 30, 40)]
    wanted = [Wanted(cfg, "u") for cfg in cfgs]
    find_or_make(wanted[:1], made(calls), Result)
    found = find_or_make([*wanted, wanted[1]], made(calls), Result)
    assert [r.digest for r in found] == [cfg.digest("u") for cfg in (*cfgs, cfgs[1])]
    assert calls[1] == [found[1].path, found[2].path]


@pytest.mark.parametrize("resume", [True, False])
def test_an_unfinished_folder_is_resumed_or_emptied(runs, resume):
    def interrupted(missing):
        for path in missing:
            results.write_text(path / "half", "")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        find_or_make([Wanted(PrepareConfig(), "u")], interrupted, Result)
    [path] = runs.glob("prepare/*smoke-s0-????????")
    assert not results.is_done(path)
    [found] = find_or_make([Wanted(PrepareConfig(), "u")], made([]), Result, resume=resume)
    assert found.path == path and (path / "half").exists() == resume
    assert len(results.read_json(path / "env.json")["resumed_from"]) == resume


@pytest.mark.parametrize("done", [True, False])
def test_the_full_digest_is_compared_not_the_eight_letters_of_the_name(runs, done):
    """Another result whose digest begins with the same letters: a longer name is taken."""
    cfg, calls = PrepareConfig(), []
    other = results.folder(Wanted(cfg, "u"))
    digest = cfg.digest("u")[:8] + "0" * 56
    results.write_json(other / "config.json", {"stage": "prepare", "digest": digest})
    if done:
        results.write_json(other / "DONE", {})
    for _ in range(2):
        [found] = find_or_make([Wanted(cfg, "u")], made(calls), Result)
    assert found.path.name == f"phantom-smoke-s0-{cfg.digest('u')[:16]}"
    assert len(calls) == 1 and found.digest == cfg.digest("u")
    assert results.read_json(other / "config.json")["digest"] == digest


HOLDER = """
import sys, pathlib
from lesionkd_core import results
with results.lock(pathlib.Path(sys.argv[1])):
    print("holds", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("killed", [False, True])
def test_a_second_process_waits_for_the_lock_and_a_dead_holders_lock_is_free(
    tmp_path, messages, killed, monkeypatch
):
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "run")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, cwd=ROOT, text=True, **pipes) as other:
        assert other.stdout.readline() == "holds\n"
        if killed:
            other.kill()
            other.wait()
        else:
            real = results.log.info

            def let_go(message):  # only after this process has said that it waits
                real(message)
                other.stdin.close()

            monkeypatch.setattr(results.log, "info", let_go)
        with results.lock(tmp_path / "run"):
            pass
    assert any(f"another process ({other.pid} on " in m for m in messages()) != killed


def test_runs_are_located_by_result_path_short_name_and_name(student, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for given in (student, student.path, results.short(student.path), student.path.name):
        assert results.locate(given) == student.path
    with pytest.raises(UnfinishedRun, match=f"did you mean '{student.path.name}'"):
        results.locate(student.path.name[:-1])


# Files --------------------------------------------------------------------------------------------


def test_a_table_is_read_as_it_was_written(tmp_path):
    rng = np.random.default_rng(0)
    table = pd.DataFrame(
        {
            "id": ["001", "nan", "NA", "1e5", "läsion, links", 'say "ah"'],
            "group": ["", "g0000", "", "007", "None", "x"],
            "split": ["train"] * 6,
            "label": [""] * 6,
            "dice": rng.random(6).astype(np.float32),
            "hd95": [0.0, 1e-12, np.nan, 181.01933598375618, -3.5, 1e9],
            "missed": [0, 1, 0, 0, 1, 2],
        }
    )
    results.write_table(tmp_path / "t.csv", table)
    back = results.read_table(tmp_path / "t.csv")
    assert list(back.columns) == list(table.columns)
    for name in ("id", "group", "split", "label"):
        assert back[name].tolist() == table[name].tolist()
    assert np.array_equal(back["dice"].astype(np.float32), table["dice"])  # to the bit
    assert np.allclose(back["hd95"], table["hd95"], rtol=1e-8, equal_nan=True)
    assert back["missed"].dtype == np.int64 and back["missed"].tolist() == [0, 1, 0, 0, 1, 2]


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt, OSError])
def test_a_write_that_fails_leaves_the_old_content_and_nothing_else(tmp_path, failure):
    results.write_text(tmp_path / "x", "old")

    def write():
        with results.replacing(tmp_path / "x") as partial:
            partial.write_text("half of the n")
            raise failure

    with pytest.raises(LesionKDError if failure is OSError else failure):
        write()
    assert (tmp_path / "x").read_text() == "old" and os.listdir(tmp_path) == ["x"]


@contextmanager
def full_disk(size):
    """The kernel lets no file grow beyond `size` bytes."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def append(path):
    with results.appending(path, (10_000,)) as write:
        write(np.zeros(10_000))


WRITERS = {
    "table": lambda path: results.write_table(path, pd.DataFrame({"a": range(20_000)})),
    "blocks": append,
    "checkpoint": lambda path: results.write_checkpoint(path, {"network": torch.zeros(10_000)}),
}


@pytest.mark.fault
@pytest.mark.parametrize("kind", WRITERS)
def test_a_full_disk_is_named_and_leaves_the_old_content(tmp_path, kind):
    results.write_text(tmp_path / "kept", "old")
    with full_disk(4096), pytest.raises(LesionKDError, match=r"cannot write .*kept.*space"):
        WRITERS[kind](tmp_path / "kept")
    assert (tmp_path / "kept").read_text() == "old" and os.listdir(tmp_path) == ["kept"]


@pytest.mark.fault
def test_what_the_disk_did_not_take_is_not_counted_as_written(tmp_path, monkeypatch):
    def no_space(_):
        raise OSError(28, "No space left on device")

    results.write_text(tmp_path / "kept", "old")
    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(LesionKDError, match="kept: No space left on device"):
        results.write_text(tmp_path / "kept", "new")
    assert (tmp_path / "kept").read_text() == "old" and os.listdir(tmp_path) == ["kept"]


# Checkpoints --------------------------------------------------------------------------------------


class Code:
    """Unpickled, it makes a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.fault
@pytest.mark.parametrize(
    "dump",
    [lambda content, path: path.write_bytes(pickle.dumps(content, 2)), torch.save],
    ids=["pickle", "torch"],
)
def test_a_checkpoint_with_code_in_it_is_refused_and_the_code_is_not_run(tmp_path, dump):
    dump({"network": Code(tmp_path / "ran")}, tmp_path / "checkpoint_best")
    with pytest.raises(LesionKDError, match="checkpoint_best is not a readable checkpoint"):
        results.read_checkpoint(tmp_path / "checkpoint_best")
    assert not (tmp_path / "ran").exists()


@pytest.mark.fault
@pytest.mark.parametrize("content", [b"", b"hello", "half"])
def test_a_damaged_checkpoint_is_refused(tmp_path, content):
    results.write_checkpoint(tmp_path / "c", {"network": torch.zeros(1000)})
    half = (tmp_path / "c").read_bytes()[:900]
    (tmp_path / "c").write_bytes(half if content == "half" else content)
    with pytest.raises(LesionKDError, match="is not a readable checkpoint"):
        results.read_checkpoint(tmp_path / "c")


@pytest.mark.fault
def test_a_flipped_bit_in_the_checkpoint_of_an_unfinished_run_is_found(tmp_path):
    """There is no DONE, so the checksums inside the archive are tested."""
    path = tmp_path / "checkpoint_last"
    results.write_checkpoint(path, {"objective": {"w": torch.arange(4000.0)}, "history": []})
    intact = path.read_bytes()
    first = intact.index(np.arange(9, 12, dtype=np.float32).tobytes())
    for where in np.random.default_rng(0).integers(first, first + 15000, 10):
        flipped = bytes([intact[where] ^ 4])
        path.write_bytes(intact[:where] + flipped + intact[where + 1 :])
        with pytest.raises(LesionKDError, match="damaged"):
            results.read_checkpoint(path)
    path.write_bytes(intact)
    assert len(results.read_checkpoint(path)["objective"]) == 1


# Checksums ----------------------------------------------------------------------------------------


def flip_a_bit(path, where=0.5):
    content = bytearray(path.read_bytes())
    content[int(len(content) * where)] ^= 1
    path.write_bytes(content)


@pytest.mark.fault
@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("config.json", lambda run: run.config),
        ("history.csv", lambda run: run.history),
        ("per_case.csv", lambda run: run.per_case),
        ("summary.json", lambda run: run.summary),
        ("checkpoint_best", load_network),
        ("checkpoint_last", lambda run: results.read_checkpoint(run.path / "checkpoint_last")),
    ],
)
def test_a_flipped_bit_in_a_finished_run_is_found_before_it_is_used(student, runs, name, read):
    run = Run(copy_of(student.path, runs))
    read(run)  # once intact: a file that changes after it was checked is checked again
    flip_a_bit(run.path / name)
    with pytest.raises(DamagedResult, match=f"{name} was damaged"):
        read(run)
    with pytest.raises(DamagedResult, match=name):
        results.report(run.path)
    (run.path / name).unlink()
    with pytest.raises(DamagedResult, match=f"{name} was damaged, edited or removed"):
        read(run)


@pytest.mark.fault
@pytest.mark.parametrize(
    ("name", "attribute"),
    [
        *[(f"{name}.npy", name) for name in ("images", "masks", "edges", "thumbnails")],
        ("cases.csv", "cases"),
        ("report.csv", "report"),
        ("split.csv", "split_hash"),
    ],
)
def test_a_flipped_bit_in_prepared_data_is_found_before_it_is_used(data, runs, name, attribute):
    copied = Prepared(copy_of(data.path, runs))
    flip_a_bit(copied.path / name, 0.9)
    with pytest.raises(DamagedResult, match=name):
        getattr(copied, attribute)


def test_notebook_and_figures_of_a_finished_run_may_change(student, runs):
    path = copy_of(student.path, runs)
    (path / "figures").mkdir()
    for text in ("a", "b"):
        (path / "figures" / "ablation.csv").write_text(text)
        (path / "notebook.ipynb").write_text(text)
        assert "all intact" in results.report(path)


# Lists --------------------------------------------------------------------------------------------


def test_finished_runs_are_collected_with_options_and_mean_scores(student, teacher, runs):
    for run in (student, teacher):
        copy_of(run.path, runs)
    (copy_of(student.path, runs, "distill/unfinished") / "DONE").unlink()
    for split in ("val", "test"):
        table = results.collect(split=split).set_index("stage")
        assert sorted(table.index) == ["distill", "teacher"]
        for run in (student, teacher):
            row, part = table.loc[run.config["stage"]], run.per_case.query("split == @split")
            assert row["dice"] == pytest.approx(part["dice"].mean(), abs=1e-5)
            assert row["missed"] == part["missed"].sum() and row["run"].endswith(run.path.name)
        assert table.loc["distill", "losses"] == "edge=0.1, feat=1, seg=1"
        assert table.loc["distill", "levels"] == "decoder.stride8, decoder.stride4, decoder.stride2"
    assert len(results.collect("teacher")) == 1 and len(results.collect("graph")) == 0


@pytest.mark.fault
def test_a_mistyped_stage_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'distill'"):
        results.collect("distil")


def test_a_report_names_options_scores_and_state(student, runs):
    path = copy_of(student.path, runs)
    text, test = results.report(path), student.summary["test"]
    assert text.startswith(f"runs/distill/{path.name}\n")
    assert f"test, {test['cases']} cases: dice {test['dice']['mean']:.3f}" in text
    assert "pixels = 32" in text and "all intact" in text and "split_seed" not in text
    (path / "DONE").unlink()
    assert "unfinished; the same options resume or repeat it" in results.report(path)


def test_the_environment_says_what_a_repetition_needs(student):
    env = results.read_json(student.path / "env.json")
    assert env["device"] == "cpu" and env["threads"] == 1 and env["processes"] == 1
    assert env["packages"]["torch"] == torch.__version__
    assert re.fullmatch(r"([0-9a-f]{12}\+?)?", env["commit"])
