"""The notebooks: template, parameters, outputs, and each once through papermill."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import nbformat
import papermill
import pytest

from lesionkd_core import config
from lesionkd_core.sweep import configuration
from tests.conftest import ROOT
from tests.documents import anchors

PATHS = sorted((ROOT / "notebooks").glob("0*.ipynb"))
by_notebook = pytest.mark.parametrize("path", PATHS, ids=lambda p: p.stem)
COMPUTES = re.compile(
    r"lkd\.(prepare|train_teacher|fit_edge_graph|distill|distill_arms|ablate|export_student)\("
    r"|measure_cost\("
)
"""Calls that report progress, times or paths."""


def cells_of(path, kind=""):
    cells = nbformat.read(path, as_version=4).cells
    return [cell for cell in cells if not kind or cell.cell_type == kind]


def tags(cell):
    return cell.metadata.get("tags", [])


# Template -----------------------------------------------------------------------------------------


@by_notebook
def test_a_notebook_follows_the_template(path):
    cells, code = cells_of(path), cells_of(path, "code")
    assert cells[0].source.startswith(f"# {path.stem[:2]} · ")
    assert "\n\n**You will learn** " in cells[0].source
    assert all(word in cells[1].source for word in ("**In:**", "**Out:**", "**Time"))
    assert "](../docs/" in cells[1].source
    assert tags(code[0]) == ["parameters"] and len(code[0].source.splitlines()) <= 11
    assert "from_notebook(globals())" in code[1].source
    last = cells_of(path, "markdown")[-1].source
    assert last.startswith("## What this shows, and what it does not\n\n")
    assert "\n\n## References\n\n- " in last
    assert code[-1].source.endswith('\nprint("DONE")')
    metadata = nbformat.read(path, as_version=4).metadata
    assert metadata.kernelspec.name == "python3"


@by_notebook
def test_cells_are_short_and_plain(path):
    for cell in cells_of(path, "code"):
        assert len(cell.source.splitlines()) <= 15, cell.source
        assert not re.search(r"^\s*[!%]|^class |;$", cell.source, re.M)
        assert not re.search(r"[\"'](/\w|[A-Z]:\\)", cell.source), "an absolute path"


@by_notebook
def test_checks_are_hidden_and_progress_is_not_compared(path):
    for cell in cells_of(path, "code"):
        assert ("assert " in cell.source) == ("hide-cell" in tags(cell)), cell.source
        assert not COMPUTES.search(cell.source) or "nbval-ignore-output" in tags(cell), cell.source


@by_notebook
def test_every_heading_has_content_and_every_link_a_target(path):
    cells = cells_of(path)
    for i, cell in enumerate(cells):
        if cell.cell_type != "markdown":
            continue
        assert not re.search(r"^#.*\n+#", cell.source, re.M), cell.source
        ends = cell.source.splitlines()[-1].startswith("#")
        assert not ends or cells[i + 1].cell_type == "code", cell.source
        for link in re.findall(r"\]\((?![a-z]+:)([^)\s]+)\)", cell.source):
            name, _, anchor = link.partition("#")
            assert (path.parent / name).exists(), link
            assert not anchor or anchor in anchors(path.parent / name), link


@by_notebook
def test_parameters_are_options_with_the_defaults_of_the_code(path):
    """So that one notebook finds what another one with the same parameters has made."""
    kind = configuration(path)
    profile_decides = {*config.DEMONSTRATION}.union(*config.PROFILES.values())
    [cell] = [cell for cell in cells_of(path) if tags(cell) == ["parameters"]]
    inferred = papermill.inspect_notebook(str(path))
    names = [re.match(r"\w+", line)[0] for line in cell.source.splitlines()]
    assert [*inferred] == names, "papermill cannot read a line; has its comment an equals sign?"
    for name, parameter in inferred.items():
        value = eval(parameter["default"])
        assert parameter["help"]
        if name in profile_decides:
            assert value is None, f"{name} is set by the profile"
        elif value != OWN.get((path.stem[:2], name)):
            assert getattr(kind(**{name: value}), name) == getattr(kind(), name), name


OWN = {
    ("07", "formats"): "native, onnx, executorch, coreml, page",
    ("07", "engines"): "torch, onnx, native",
}
"""Parameters whose value in a notebook differs from the option's default."""


# Committed outputs --------------------------------------------------------------------------------


@by_notebook
def test_the_committed_notebook_is_executed_from_top_to_bottom(path):
    code = cells_of(path, "code")
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert code[-1].outputs[0].text.endswith("DONE\n")
    assert path.stat().st_size < 1_000_000


def faults(path):
    """Outputs that a reader should not see: errors, standard error, paths of a machine."""
    texts = []
    for cell in cells_of(path, "code"):
        for output in cell.outputs:
            said = output.get("text", "") or output.get("data", {}).get("text/plain", "")
            local = re.search(r"(?<![\w.])/(home|root|tmp|work|Users)/", json.dumps(said))
            if output.output_type == "error" or output.get("name") == "stderr" or local:
                texts.append((cell.source, said))
    return texts


@by_notebook
def test_outputs_have_no_error_no_warning_and_no_absolute_path(path):
    assert faults(path) == []


# Once through papermill ---------------------------------------------------------------------------

TINY = {"dataset": "phantom", "pixels": 32, "cases": 48, "teacher": "tests.tiny:small_teacher"}
SHORT = TINY | {"teacher_epochs": 2, "weak_teacher": "allow"}
ARMS = SHORT | {"epochs": 2, "graph_epochs": 1, "arms": "alone, method", "seeds": 2}


def through_papermill(path, parameters, folder):
    options = [word for pair in parameters.items() for word in ("-p", *map(str, pair))]
    command = [sys.executable, "-m", "papermill", str(path), str(folder / "out.ipynb")]
    command += ["--no-progress-bar", "-k", "python3", *options]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}  # of small_teacher
    return subprocess.run(
        command, capture_output=True, text=True, cwd=folder, env=environment, check=False
    )


# Wrong parameters ---------------------------------------------------------------------------------

WRONG = ({"epoch": 3}, ["unknown parameter 'epoch'", "did you mean 'epochs'?"])
ABSENT = ({"dataset": "no-such-set"}, ["DatasetNotFound", "'no-such-set'"])
NUMBER_04 = next(path for path in PATHS if path.stem == "04_distill")


@pytest.mark.fault
@pytest.mark.parametrize(("parameters", "words"), [WRONG, ABSENT], ids=str)
def test_papermill_shows_one_clear_error_and_keeps_the_notebook(parameters, words, tmp_path):
    done = through_papermill(NUMBER_04, parameters, tmp_path)
    code = cells_of(tmp_path / "out.ipynb", "code")
    found = [(i, o) for i, c in enumerate(code) for o in c.outputs if o.output_type == "error"]
    [(place, error)] = found
    said = f"{error.ename}: {error.evalue}"
    assert done.returncode != 0 and [word for word in words if word not in said] == []
    assert len(error.traceback) == 1, "the message alone, without a traceback"
    assert not any(cell.execution_count for cell in code[place + 1 :])
