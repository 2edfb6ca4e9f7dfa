"""What `pytest --nbval` compares: most cells with an output, and a wrong number in one fails."""

from __future__ import annotations

import re
import subprocess
import sys

import nbformat
import pytest

from tests.conftest import ROOT

PATHS = sorted((ROOT / "notebooks").glob("0*.ipynb"))
by_notebook = pytest.mark.parametrize("path", PATHS, ids=lambda p: p.stem)
LEFT_OUT = ("image/png", "image/jpeg", "application/vnd.jupyter.widget-view+json")
"""nbval does not compare these."""
OBJECT = re.compile(r"<[\w.]+ object>|<Figure size \d+x\d+ with \d+ Axes>")
"""A text that only names the kind of an output."""
IGNORED = ("nbval-ignore-output", "nbval-skip")


def code_cells(path):
    cells = nbformat.read(path, as_version=4).cells
    return [cell for cell in cells if cell.cell_type == "code"]


def ignored(cell):
    """Whether a tag or a comment asks nbval not to compare the cell."""
    marks = [*cell.metadata.get("tags", []), *re.findall(r"#\s*(NBVAL_\w+)", cell.source)]
    return any(mark.lower().replace("_", "-") in IGNORED for mark in marks)


def texts(cell):
    """What nbval compares of a cell, without names of kinds."""
    found = [
        text
        for output in cell.outputs
        for kind, text in output.get("data", {"": output.get("text", "")}).items()
        if kind not in LEFT_OUT
    ]
    return [text for text in found if text.strip() and not OBJECT.fullmatch(text.strip())]


def compared(path):
    """Numbers of the cells, as nbval counts them, whose output it compares."""
    cells = enumerate(code_cells(path))
    return [i for i, cell in cells if not ignored(cell) and texts(cell)]


@by_notebook
def test_at_least_half_of_the_cells_with_an_output_are_compared(path):
    shown = [cell for cell in code_cells(path) if cell.outputs]
    assert shown, "the notebook is not executed"
    assert 2 * len(compared(path)) >= len(shown), f"{len(compared(path))} of {len(shown)}"


@by_notebook
def test_compared_cells_print_numbers_and_not_only_texts_of_figures(path):
    cells = code_cells(path)
    outputs = [output for i in compared(path) for output in cells[i].outputs]
    printed = [
        output.get("text") or output.get("data", {}).get("text/markdown", "") for output in outputs
    ]
    assert sum(bool(re.search(r"\d", text)) for text in printed if "DONE" not in text) >= 1


# nbval itself -------------------------------------------------------------------------------------


def said(text):
    return [nbformat.v4.new_output("stream", name="stdout", text=text)]


def cell(source, outputs, *tags):
    how = {"execution_count": 1, "metadata": {"tags": [*tags]}}
    return nbformat.v4.new_code_cell(source, outputs=outputs, **how)


@pytest.fixture(scope="module")
def checked(tmp_path_factory):
    """A notebook with right, wrong and ignored outputs; the cells that fail under nbval."""
    path = tmp_path_factory.mktemp("nbval") / "some.ipynb"
    figure = (
        "from IPython.display import display\ndisplay({'image/png': '', 'text/plain': %r}, raw=1)"
    )
    alt = nbformat.v4.new_output("display_data", {"image/png": "", "text/plain": "3 cases."})
    kind = nbformat.v4.new_output("display_data", {"image/png": "x", "text/plain": "<a.B object>"})
    cells = [
        cell("print(7)", said("7\n")),
        cell("print(0.125)", said("0.124\n")),
        cell("print('Dice', 0.5)", said("Dice 0.6\n"), "nbval-ignore-output"),
        cell("# NBVAL_IGNORE_OUTPUT\nprint(1)", said("2\n")),
        cell(figure % "4 cases.", [alt]),
        cell(figure % "<a.B object>", [kind]),
        cell("print(1)", said("2\n"), "hide-cell"),
    ]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    book = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})
    nbformat.write(book, path)
    command = [sys.executable, "-m", "pytest", "-q", "-rf", "--nbval", path.name]
    command += ["-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=path.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stdout[-3000:]
    failed = re.findall(r"^FAILED some\.ipynb::Cell (\d+)", done.stdout, re.M)
    return path, [int(number) for number in failed]


def test_a_wrong_number_or_text_of_a_figure_fails_in_its_cell_alone(checked):
    assert checked[1] == [1, 4, 6]


def test_a_cell_that_is_ignored_or_says_nothing_is_not_counted_as_compared(checked):
    assert compared(checked[0]) == [0, 1, 4, 6]
