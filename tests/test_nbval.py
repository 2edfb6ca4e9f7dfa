"""What `pytest --nbval` guards: most cells with an output are compared, and a number that is not what the cell gives fails there."""

import copy
import re
import subprocess
import sys

import nbformat
import pytest

from tests.conftest import ROOT

PATHS = sorted((ROOT / "notebooks").glob("0*.ipynb"))
by_notebook = pytest.mark.parametrize("path", PATHS, ids=lambda p: p.stem)
QUICK = ROOT / "notebooks" / "02_edge_labels.ipynb"
LEFT_OUT = ("image/png", "image/jpeg", "application/vnd.jupyter.widget-view+json")
"""nbval does not compare these."""
OBJECT = re.compile(r"<[\w.]+ object>|<Figure size \d+x\d+ with \d+ Axes>")
"""A text that says only of which kind an output is: comparing it says nothing."""


def code_cells(path) -> list:
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def spared(cell) -> bool:
    """Tags and comments with which a cell asks nbval not to compare it."""
    marks = [*cell.metadata.get("tags", []), *re.findall(r"#\s*(NBVAL_\w+|PYTEST_VALIDATE_IGNORE_OUTPUT)", cell.source)]
    return any(mark.lower().replace("_", "-") in ("nbval-ignore-output", "nbval-skip", "pytest-validate-ignore-output") for mark in marks)


def texts(cell) -> list[str]:
    """What nbval compares of a cell, as far as it says anything."""
    found = [text for o in cell.outputs for kind, text in o.get("data", {"": o.get("text", "")}).items() if kind not in LEFT_OUT]
    return [text for text in found if text.strip() and not OBJECT.fullmatch(text.strip())]


def compared(path) -> list[int]:
    """Numbers of the cells, as nbval counts them, that it compares by something they say."""
    return [i for i, cell in enumerate(code_cells(path)) if not spared(cell) and texts(cell)]


@by_notebook
def test_at_least_half_of_the_cells_with_an_output_are_compared(path):
    cells = code_cells(path)
    shown = [i for i, cell in enumerate(cells) if cell.outputs]
    assert 2 * len(compared(path)) >= len(shown), f"{len(compared(path))} of {len(shown)}"


@by_notebook
def test_compared_cells_print_what_must_hold_and_not_figures_words_alone(path):
    printed = [cell for i in compared(path) for cell in [code_cells(path)[i]] if any(o.output_type == "stream" for o in cell.outputs)]
    assert len(printed) >= 2 and any("True" in str(cell.outputs) or "disjoint" in str(cell.outputs) for cell in printed)


def test_a_cell_that_is_spared_or_says_nothing_is_not_counted(tmp_path):
    said = nbformat.v4.new_output("stream", name="stdout", text="7\n")
    kind = nbformat.v4.new_output("display_data", {"image/png": "", "text/plain": "<IPython.core.display.Image object>"})
    cells = [nbformat.v4.new_code_cell(source, outputs=[output]) for source, output in (("a", said), ("b", kind), ("# NBVAL_IGNORE_OUTPUT\nc", said))]
    cells += [nbformat.v4.new_code_cell("d", outputs=[said], metadata={"tags": [tag]}) for tag in ("nbval-ignore-output", "nbval-skip", "parameters")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "some.ipynb")
    assert compared(tmp_path / "some.ipynb") == [0, 5]


def changed(text: str) -> str:
    """The last digit another one; without a digit, a letter more."""
    return re.sub(r"\d(?=\D*$)", lambda digit: str((int(digit[0]) + 1) % 10), text) if re.search(r"\d", text) else f"{text}x"


def inject(cell) -> None:
    """A wrong number in the first output that says anything."""
    output = next(o for o in cell.outputs if o.get("text") or any(kind not in LEFT_OUT for kind in o.get("data", {})))
    place, kind = (output, "text") if "text" in output else (output.data, next(k for k in ("text/markdown", "text/plain") if k in output.data))
    place[kind] = changed(place[kind])


@pytest.fixture(scope="module")
def failed(tmp_path_factory) -> dict[str, list[int]]:
    """{copy: the cells that fail} of a quick notebook as committed, with one number wrong, and with one wrong in every output but a spared one."""
    folder, notebook = tmp_path_factory.mktemp("nbval"), nbformat.read(QUICK, as_version=4)
    for name, wrong in (("right", []), ("one", compared(QUICK)[3:4]), ("all", [i for i, cell in enumerate(code_cells(QUICK)) if cell.outputs])):
        spoilt = copy.deepcopy(notebook)
        cells = [cell for cell in spoilt.cells if cell.cell_type == "code"]
        for i in wrong:
            inject(cells[i])
        if name == "all":
            cells[compared(QUICK)[0]].metadata["tags"] = ["nbval-ignore-output"]
        nbformat.write(spoilt, folder / f"{name}.ipynb")
    command = [sys.executable, "-m", "pytest", "-q", "-rf", "--nbval", "-p", "no:cacheprovider", "right.ipynb", "one.ipynb", "all.ipynb"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stdout[-3000:]
    return {name: [int(i) for i in re.findall(rf"^FAILED {name}\.ipynb::Cell (\d+)", done.stdout, re.M)] for name in ("right", "one", "all")}


def test_the_committed_outputs_pass(failed):
    assert failed["right"] == []


def test_one_wrong_number_fails_in_its_cell_and_in_no_other(failed):
    assert failed["one"] == compared(QUICK)[3:4]


def test_nbval_compares_the_cells_that_are_counted_here_and_no_others(failed):
    assert failed["all"] == compared(QUICK)[1:]
