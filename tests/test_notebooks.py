"""The notebooks: template, parameters, outputs worth comparing, and each once through papermill with changed parameters."""

import json
import os
import re
import subprocess
import sys

import nbformat
import papermill
import pytest

from lesionkd_core import config
from lesionkd_core.sweeps.notebooks import configuration
from tests.conftest import ROOT
from tests.readme_index import MADE, made_anew

PATHS = sorted((ROOT / "notebooks").glob("0*.ipynb"))
by_notebook = pytest.mark.parametrize("path", PATHS, ids=lambda p: p.stem)


def read(path):
    return nbformat.read(path, as_version=4)


def code_cells(path) -> list:
    return [cell for cell in read(path).cells if cell.cell_type == "code"]


def tags(cell) -> list[str]:
    return cell.metadata.get("tags", [])


@by_notebook
def test_a_notebook_follows_the_template(path):
    cells, code = read(path).cells, code_cells(path)
    assert cells[0].source.startswith(f"# {path.stem[:2]} · ") and len(cells[0].source.splitlines()) == 2
    assert all(word in cells[1].source for word in ("**In:**", "**Out:**", "**Time"))
    assert tags(code[0]) == ["parameters"] and "from_notebook(globals())" in code[1].source
    assert any(cell.source.startswith("## What this shows, and what it does not") for cell in cells)
    assert code[-1].source.endswith('print("DONE")') and code[-1].outputs[0].text.endswith("DONE\n")
    assert any("assert " in cell.source for cell in code)
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert path.stat().st_size < 300_000 and read(path).metadata.kernelspec.name == "python3"


@by_notebook
def test_cells_are_short_and_plain(path):
    for cell in code_cells(path):
        assert len(cell.source.splitlines()) <= (30 if "parameters" in tags(cell) else 15), cell.source
        assert not re.search(r"^\s*[!%]|^class |;$", cell.source, re.M)
        assert not re.search(r"[\"'](/|[A-Z]:\\)", cell.source)


@by_notebook
def test_outputs_hold_no_error_no_stderr_and_no_absolute_path(path):
    for cell in code_cells(path):
        for output in cell.outputs:
            assert output.output_type != "error" and output.get("name") != "stderr", cell.source
            assert not re.search(r"(?<![\w.])/(home|root|tmp|work|Users)/", json.dumps(output.get("text", "") or output.get("data", {}).get("text/plain", "")))


@by_notebook
def test_parameters_are_fields_with_the_same_defaults(path):
    cls = configuration(path)
    profile_decides = set().union(*config.PROFILES.values())
    inferred = papermill.inspect_notebook(str(path))
    [cell] = [cell for cell in read(path).cells if tags(cell) == ["parameters"]]
    assert list(inferred) == [re.match(r"\w+", line)[0] for line in cell.source.splitlines()], "papermill warns of what it cannot infer"
    for name, parameter in inferred.items():
        value = eval(parameter["default"])
        if name in profile_decides:
            assert value is None
        else:
            assert getattr(cls(**{name: value}), name) == getattr(cls(), name)
        assert parameter["help"] == cls.model_fields[name].description


@pytest.mark.parametrize("page", MADE)
def test_what_a_page_says_of_notebooks_and_study_is_made_from_them(page):
    assert made_anew(page) == (ROOT / page).read_text(encoding="utf-8")


TINY = {"dataset": "phantom-ultrasound", "pixels": 32, "cases": 48}
SHORT = {"teacher_epochs": 2, "batch_size": 8}
WEAK = {"weak_teacher": "allow"}
CHANGED = {
    "01_data_prep": TINY | {"split_seed": 3},
    "02_edge_labels": TINY | {"grid": 3, "edge_width": 2},
    "03_teacher": TINY | SHORT,
    "04_distill": TINY | SHORT | WEAK | {"epochs": 2, "graph_epochs": 1, "width": 2, "seed": 5},
    "05_ablations": TINY | SHORT | WEAK | {"epochs": 2, "graph_epochs": 1, "arms": "alone, method", "seeds": 2},
    "06_paper_figures": TINY | SHORT | WEAK | {"epochs": 2, "graph_epochs": 1, "arms": "alone, method", "seeds": 2},
    "07_mobile": {"formats": "onnx", "engines": "onnx", "cost_pixels": 64, "repeats": 1, "calibration": 8, "threshold": 0.4},
}


def through_papermill(path, parameters: dict, folder) -> subprocess.CompletedProcess:
    options = [word for name, value in parameters.items() for word in ("-p", name, str(value))]
    command = [sys.executable, "-m", "papermill", str(path), str(folder / "out.ipynb"), "--no-progress-bar", "-k", "python3", *options]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)


@by_notebook
def test_a_notebook_runs_from_another_folder_with_changed_parameters(path, tmp_path):
    done = through_papermill(path, CHANGED[path.stem], tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    last = code_cells(tmp_path / "out.ipynb")[-1].outputs[0].text
    assert last.endswith("DONE\n")
    assert [p.name for p in tmp_path.iterdir()] == ["out.ipynb"], "results never go to the working folder"
    assert not any(o.get("name") == "stderr" for cell in code_cells(tmp_path / "out.ipynb") for o in cell.outputs)


WRONG = [  # parameters, words of the error
    ({"wfeat": 1}, ["unknown parameter 'wfeat'", "did you mean 'w_feat'?"]),
    ({"terms": "feat, egde"}, ["'egde'", "did you mean 'edge'?"]),
    ({"seed": "abc"}, ["seed = 'abc'", "integer"]),
    ({"pixels": 64.5}, ["pixels = 64.5", "multiple of 32"]),
]
ABSENT = {"dataset": "no-such-set"}, ["'no-such-set'", "neither in the catalogue"]
NUMBER_04 = next(path for path in PATHS if path.stem == "04_distill")


def the_error(path) -> str:
    """The one error of an executed notebook, in one sentence and without a traceback; the cells behind it did not run."""
    cells = code_cells(path)
    [(place, error)] = [(i, o) for i, cell in enumerate(cells) for o in cell.outputs if o.output_type == "error"]
    assert len(error.traceback) == 1 and not any(cell.execution_count for cell in cells[place + 1 :])
    return error.evalue


@pytest.mark.fault
@pytest.mark.parametrize(("parameters", "words"), [*WRONG, ABSENT], ids=str)
def test_papermill_shows_one_clear_error_and_keeps_the_notebook(parameters, words, tmp_path):
    done = through_papermill(NUMBER_04, parameters, tmp_path)
    assert done.returncode != 0
    assert all(word in the_error(tmp_path / "out.ipynb") for word in words), the_error(tmp_path / "out.ipynb")


def run_04(parameters: dict, runs) -> subprocess.CompletedProcess:
    options = [word for name, value in parameters.items() for word in ("-p", name, str(value))]
    command = [sys.executable, "-m", "lesionkd_core", "run", "04_distill", *options]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"LESIONKD_RUNS": str(runs)}, cwd=ROOT, check=False)


@pytest.mark.fault
@pytest.mark.parametrize(("parameters", "words"), WRONG, ids=str)
def test_run_refuses_a_wrong_parameter_at_once(parameters, words, tmp_path):
    done = run_04(parameters, tmp_path / "runs")
    assert done.returncode == 1 and "Traceback" not in done.stderr and all(word in done.stderr for word in words), done.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.fault
def test_run_keeps_the_notebook_that_failed_and_says_where(tmp_path):
    parameters, words = ABSENT
    done = run_04(parameters, tmp_path / "runs")
    assert done.returncode == 1 and "Traceback" not in done.stderr and all(word in done.stderr for word in words), done.stderr
    [kept] = (tmp_path / "runs").rglob("*.ipynb")
    assert f"The executed notebook with the error is {kept}" in done.stderr
    assert all(word in the_error(kept) for word in words) and not list((tmp_path / "runs").rglob("DONE"))
