"""The commands as a person sees them: every notebook, start-up, the terminal, reports, clean."""

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lesionkd_core as lkd
from lesionkd_core import results
from lesionkd_core.results import Progress
from lesionkd_core.sweep import find_notebook
from tests.conftest import ROOT, copy_of
from tests.fixed import fixed_run
from tests.test_cli import as_words, command
from tests.test_notebooks import ARMS, TINY, cells_of, faults
from tests.tiny import CFG

# Notebooks ----------------------------------------------------------------------------------------

CHANGED = {
    "02": TINY | {"grid": 3, "edge_width": 2},
    "03_teacher": TINY | {"teacher_epochs": 2, "split_seed": 3},
    "04": TINY | {"losses": ""},
    "5": ARMS,
    "07_mobile.ipynb": {"formats": "onnx", "sizes": 64, "engines": "torch", "threshold": 0.4},
}
"""Notebooks, as people name them; 01 and 04 with both losses are run in test_docs.py, 06 in
test_paper.py."""
SHOWN = {"03": ["network", "Dice", "missed"], "04": ["network", "Dice", "missed"]}
SHOWN["05"] = ["arm", "dice", "missed"]


def runs_well(name, parameters, folder):
    """Run a notebook in a folder and check everything that it has to leave; its results."""
    code, out, errors = command("run", name, "--link", "link", *as_words(parameters))
    assert (code, errors) == (0, "")
    place = Path((folder / "link").read_text().strip())
    said, executed, ending = out.partition("\nexecuted notebook: ")
    assert executed and said.endswith("\nDONE") and ending.endswith(f"\nresults: {place}\n")
    for column in SHOWN.get(find_notebook(str(name)).name[:2], []):
        assert column in ending.splitlines()[1].split()
    assert os.listdir(folder) == ["link"], "another file in the working folder"
    shown = [o for cell in cells_of(place / "notebook.ipynb", "code") for o in cell.outputs]
    assert not any(o.get("name") == "stderr" for o in shown), faults(place / "notebook.ipynb")
    return place


@pytest.mark.parametrize("name", CHANGED)
def test_a_notebook_runs_from_another_folder_with_changed_parameters(name, tmp_path, monkeypatch):
    parameters = CHANGED[name]
    if name.startswith("07"):  # a small student, not one that it would train
        parameters = parameters | {"run": fixed_run().path}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # of small_teacher
    runs_well(name, parameters, tmp_path)


@pytest.mark.soak
@pytest.mark.parametrize("number", range(1, 8))
def test_a_notebook_runs_twice_with_its_defaults(number, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert runs_well(number, {}, tmp_path) == runs_well(number, {}, tmp_path)


# Start-up -----------------------------------------------------------------------------------------

HEAVY = {"torch", "numpy", "pandas", "scipy", "PIL", "matplotlib", "papermill", "monai", "dask"}
HEAVY |= {"lesionkd_core.losses", "lesionkd_core.data", "lesionkd_core.sweep"}
COMMAND = "from lesionkd_core.cli import main; main({}, standalone_mode=False)"


@pytest.mark.parametrize(
    "statement",
    [
        "import lesionkd_core as lkd; lkd.DistillConfig(losses='feat')",
        COMMAND.format(["--help"]),
        COMMAND.format(["list"]),
        COMMAND.format(["show", "STUDENT"]),
    ],
)
def test_nothing_heavy_is_imported_until_it_is_needed(statement, student):
    code = f"import sys\n{statement.replace('STUDENT', student.path.name)}\nprint(*sys.modules)"
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, check=True)
    assert HEAVY.isdisjoint(done.stdout.splitlines()[-1].split())


# Terminal -----------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_in_a_terminal_a_bar_is_drawn_over_itself(monkeypatch):
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
    monkeypatch.setattr(sys, "stdout", Terminal())
    with Progress("masks", "image", 3, lines=10) as progress:
        for _ in range(3):
            progress.step()
    drawn = sys.stdout.getvalue()
    assert drawn.count("\n") == 1 and "3/3" in drawn.rstrip("\n").split("\r")[-1]


@pytest.mark.parametrize(
    ("total", "lines", "expected"), [(3, None, 3), (200, 10, 10), (4, 10, 4), (9, 0, 0)]
)
def test_in_a_log_file_the_number_of_lines_is_bounded(capsys, total, lines, expected):
    with Progress("busi", "case", total, lines=lines) as progress:
        for _ in range(total):
            progress.step("said")
    written = capsys.readouterr().out.splitlines()
    last = [f"busi, case {total}/{total}: said"] if expected else []
    assert len(written) == expected and written[-1:] == last


def test_a_training_says_epoch_dice_and_time(student, teacher, data, graph, runs, capsys):
    for result in (teacher, data, graph):
        copy_of(result.path, runs)
    lkd.distill_arms(teacher, graph, data, [CFG, CFG.with_values(losses="")])
    lines = [line for line in capsys.readouterr().out.splitlines() if "epoch" in line]
    dice = r"Dice on validation images 0\.\d\d \((alone|feat, edge)\) to 0\.\d\d \(.*\)"
    assert re.fullmatch(rf"2 students, epoch 1/2: {dice}(, \d+ s left)?", lines[1]), lines
    assert re.fullmatch(rf"2 students, epoch 2/2: {dice}", lines[2])


# Results ------------------------------------------------------------------------------------------


@pytest.fixture
def folder(student, runs):
    """A folder of results in which only `kept` and what is in use is needed."""
    copy_of(student.path, runs)
    for name in ("old", "damaged", "unfinished", "working"):
        copy_of(student.path, runs, f"distill/{name}")
    old = runs / "distill" / "old" / "config.json"
    old.write_text(json.dumps(student.config | {"version": 1}))
    results.write_json(old.parent / "DONE", results.checksums(old.parent))
    (runs / "distill" / "damaged" / "history.csv").write_text("")
    for name in ("distill/unfinished/DONE", "distill/working/DONE"):
        (runs / name).unlink()
    return runs


def test_clean_lists_what_is_not_needed_and_removes_it_if_told_to(folder, student):
    before = sorted(folder.rglob("*"))
    with results.lock(folder / "distill" / "working"):
        code, listed, errors = command("clean")
        assert code == 1 and "--yes" in errors
        assert [path for path in before if not path.exists()] == []
        code, out, _ = command("clean", "--yes")
    for words in (
        "runs/distill/damaged .*damaged: history.csv",
        "runs/distill/old .*of version 1 of results",
        "runs/distill/unfinished .*the same options resume or repeat it",
    ):
        assert re.search(words, listed), words
    assert code == 0 and out.startswith(listed) and "removed " in out
    left = {path.relative_to(folder).as_posix() for path in folder.glob("*/*")}
    assert left == {f"distill/{student.path.name}", "distill/working", "distill/working.lock"}
    assert "all intact" in results.report(folder / "distill" / student.path.name)
    assert command("clean", "--yes")[0] == 0  # what was in use is not any more
    assert command("clean") == (0, f"nothing to remove in {folder}\n", "")


def test_clean_removes_a_finished_result_only_if_it_is_named(student, runs):
    paths = [copy_of(student.path, runs, f"distill/{name}") for name in ("one", "two")]
    with results.lock(paths[0]):
        assert "a process works on runs/distill/one" in command("clean", "one", "--yes")[2]
    assert command("clean", "one", "--yes")[0] == 0
    assert [path.exists() for path in paths] == [False, True]
