"""What was made: listed, shown, cleared away; and no file of it used once it is not as it was written."""

import io
import re
import subprocess
import sys
from multiprocessing import get_context

import numpy as np
import pytest
import torch

from lesionkd_core import runs, store
from lesionkd_core.__main__ import main
from lesionkd_core.config import ConfigError, DistillConfig, PrepareConfig
from lesionkd_core.inference import load_network
from lesionkd_core.integrity import DamagedResult, _seen, checked
from lesionkd_core.prepare import prepare_data
from lesionkd_core.stages import distill

TINY = {"dataset": "phantom-ct", "pixels": 32, "cases": 24, "batch_size": 4, "epochs": 2, "threads": 1, "device": "cpu", "terms": ""}


def silent(*_):
    pass


@pytest.fixture
def made(tmp_path, monkeypatch):
    """A student that was just trained, in a place of its own."""
    monkeypatch.setenv("LESIONKD_RUNS", str(tmp_path / "runs"))
    return distill(DistillConfig(**TINY, width=1), silent)


def flip_a_byte(path, where=0.5):
    content = bytearray(path.read_bytes())
    content[int(len(content) * where)] ^= 1
    path.write_bytes(content)


def test_finished_runs_are_listed_with_their_scores(made, capsys):
    assert main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[2:]] == [["prepare", prepare_data(DistillConfig(**TINY), silent).path.name], ["distill", made.path.name]]
    assert f"{made.test_dice:.3f} [" in lines[3] and "width = 1" in lines[3] and "terms = ''" in lines[3]
    assert main(["list", "teacher"]) == 0
    assert "no finished run" in capsys.readouterr().out


def test_a_run_is_shown_by_its_folder_by_what_a_notebook_prints_and_by_name(made, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    shown = set()
    for name in (str(made.path), store.short(made.path), made.path.name):
        assert main(["show", name]) == 0
        shown.add(capsys.readouterr().out)
    [text] = shown
    test = made.summary["test"]
    assert f"test, {test['cases']} cases in {test['groups']} groups: dice {test['dice']['mean']:.3f}" in text
    assert "all as written" in text and "width = 1" in text
    (made.path / "DONE").unlink()
    assert main(["show", made.path.name]) == 0
    assert "unfinished, 2 epochs done" in capsys.readouterr().out


@pytest.mark.fault
def test_a_run_that_is_not_there_is_refused_with_the_nearest_name(made, capsys):
    assert main(["show", made.path.name[:-1]]) == 1
    assert f"did you mean {made.path.name!r}?" in capsys.readouterr().err
    assert main(["list", "distil"]) == 1
    assert "did you mean 'distill'?" in capsys.readouterr().err


def leave_behind(root):
    """What killed runs leave: a half-written file, parts of data, the lock of a folder that is gone, a run without DONE."""
    [prepared] = (root / "prepare").glob("*s0-????????")
    (prepared / ".images.npy.123.partial").write_bytes(b"x" * 3000)
    (prepared / "parts").mkdir()
    (prepared / "parts" / "0000000.npz").write_bytes(b"x" * 2000)
    (root / "distill" / "gone-smoke-s0-01234567.lock").touch()
    unfinished = root / "teacher" / "a-smoke-s0-01234567"
    unfinished.mkdir(parents=True)
    (unfinished / "config.json").write_text("{}")
    return [prepared / ".images.npy.123.partial", prepared / "parts", root / "distill" / "gone-smoke-s0-01234567.lock"], unfinished


def test_clean_asks_and_removes_leftovers_alone(made, capsys, monkeypatch):
    leftovers, unfinished = leave_behind(store.runs_root())
    asked = io.StringIO("n\n")
    asked.isatty = lambda: True
    monkeypatch.setattr(sys, "stdin", asked)
    assert main(["clean"]) == 0
    assert "[y/N]" in capsys.readouterr().out
    assert all(path.exists() for path in leftovers)
    assert main(["clean", "--yes"]) == 0
    assert not any(path.exists() for path in leftovers) and unfinished.exists()
    assert main(["clean", "--unfinished", "--yes"]) == 0
    assert not unfinished.exists()
    assert distill(DistillConfig(**TINY, width=1), silent).path == made.path, "a finished run is never a leftover"


def test_clean_removes_a_named_run_and_says_what_stands_on_it(made, capsys):
    data = prepare_data(DistillConfig(**TINY), silent).path
    assert main(["clean", data.name, "--yes"]) == 0
    assert "on which 1 others stand" in capsys.readouterr().out
    assert not data.exists() and made.path.exists()


@pytest.mark.fault
def test_clean_removes_nothing_without_a_terminal_to_ask_in(made, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    assert main(["clean", made.path.name]) == 1
    assert made.path.exists()


def hold(path, ready, go_on):
    with store.lock(path, silent):
        ready.set()
        go_on.wait(60)


@pytest.mark.fault
def test_clean_leaves_alone_what_another_process_works_on(made, capsys):
    context = get_context("spawn")
    ready, go_on = context.Event(), context.Event()
    other = context.Process(target=hold, args=(made.path, ready, go_on))
    other.start()
    assert ready.wait(60)
    told = []
    try:
        assert main(["clean", made.path.name, "--yes"]) == 0
        assert made.path.exists()
        assert "another process works on it" in capsys.readouterr().out

        def tell(message):  # only then may the other go on
            told.append(message)
            go_on.set()

        with store.lock(made.path, tell):
            pass
    finally:
        go_on.set()
        other.join()
    assert re.search(rf"another process \({other.pid} on \S+\) works on", told[0])


@pytest.mark.fault
@pytest.mark.parametrize("name", ["config.json", "history.csv", "per_case.csv", "summary.json", "checkpoint_best", "checkpoint_last"])
def test_a_flipped_byte_in_a_finished_run_is_found_and_named(made, name, capsys):
    flip_a_byte(made.path / name)
    assert main(["show", made.path.name]) == 1
    assert re.search(rf"DamagedResult: \S+{name} is not as it was written", capsys.readouterr().err)
    with pytest.raises(DamagedResult, match=name):
        checked(made.path / name)


@pytest.mark.fault
@pytest.mark.parametrize("name", ["images.npy", "masks.npy", "edges.npy", "hashes.npy", "cases.csv", "split.csv", "report.csv"])
def test_a_flipped_byte_in_prepared_data_is_found_before_it_is_used(made, name):
    prepared = prepare_data(PrepareConfig(**{n: v for n, v in TINY.items() if n in PrepareConfig.model_fields}), silent)
    flip_a_byte(prepared.path / name, 0.9)
    _seen.clear()  # as a new process
    attribute = {"split": "split_hash"}.get(name.partition(".")[0], name.partition(".")[0])
    with pytest.raises(DamagedResult, match=name):
        getattr(prepared, attribute)


@pytest.mark.fault
def test_a_file_that_changed_since_it_was_checked_is_checked_again(made):
    assert load_network(made).path == made.path
    flip_a_byte(made.path / "checkpoint_best")
    with pytest.raises(DamagedResult, match="checkpoint_best"):
        load_network(made)
    (made.path / "checkpoint_best").unlink()
    with pytest.raises(DamagedResult, match="gone"):
        load_network(made)


@pytest.mark.fault
def test_a_flipped_byte_in_the_checkpoint_of_an_unfinished_run_is_found_wherever_it_is(tmp_path):
    """No DONE, so no checksum beside it: the archive's own are looked at."""
    path = tmp_path / "checkpoint_last"
    store.write_checkpoint(path, {"objective": {"w": torch.arange(4000.0)}, "history": []})
    whole = path.read_bytes()
    first, damaged, read = whole.index(np.arange(9, 12, dtype=np.float32).tobytes()), 0, 0
    for where in np.random.default_rng(0).integers(first, first + 15000, 25):
        path.write_bytes(whole[:where] + bytes([whole[where] ^ 4]) + whole[where + 1 :])
        with pytest.raises(store.LesionKDError, match="damaged"):
            store.read_checkpoint(path)
        damaged += 1
    path.write_bytes(whole)
    read += len(store.read_checkpoint(path)["objective"])
    assert (damaged, read) == (25, 1)


@pytest.mark.fault
def test_a_damaged_part_of_an_interrupted_preparation_is_read_again(made):
    """What was decoded before a kill is used only where it is whole."""
    prepared = prepare_data(DistillConfig(**TINY), silent)
    expected = prepared.images[:].copy()
    part = prepared.path / "parts" / "0000000.npz"
    part.parent.mkdir()
    np.savez(part, images=expected, masks=prepared.masks, rows=np.array("[]"))
    flip_a_byte(part)
    (prepared.path / "DONE").unlink()
    again = prepare_data(DistillConfig(**TINY), silent)
    assert np.array_equal(again.images, expected) and not part.exists()


def test_what_is_drawn_from_a_run_may_be_added_and_changed(made):
    (made.path / "figures").mkdir()
    for text in ("a", "b"):
        (made.path / "figures" / "ablation.csv").write_text(text)
        (made.path / "notebook.ipynb").write_text(text)
        assert "all as written" in runs.report(made.path)


def test_a_result_from_before_checksums_were_kept_is_still_read(made):
    (made.path / "DONE").write_text("")
    assert "before checksums" in runs.report(made.path)
    assert load_network(made).path == made.path


def test_stages_are_those_of_the_configurations():
    assert set(runs.STAGES) == {"prepare", "external", "teacher", "graph", "distill", "ablation", "export"}
    with pytest.raises(ConfigError, match="teacher"):
        runs.folders("teachers")


def test_the_commands_work_in_a_process_of_their_own(made):
    done = subprocess.run([sys.executable, "-m", "lesionkd_core", "show", made.path.name], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"runs/distill/{made.path.name}\n") and not done.stderr
