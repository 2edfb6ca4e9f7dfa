"""A paper from notebook 06: all figures, tables and numbers that paper.tex uses are written, and it
compiles."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest

from lesionkd_core.sweep import named_results
from tests.conftest import ROOT
from tests.test_notebooks import ARMS, cells_of, faults, through_papermill

NOTEBOOK = ROOT / "notebooks" / "06_paper_figures.ipynb"
SOURCE = ROOT / "notebooks" / "paper" / "paper.tex"
FIGURES = {"refinement", "segmentations", "ablation"}
FIGURES |= {"study", "study_alone", "study_clinics", "study_few_masks", "dice_and_cost"}
TABLES = {"arms", "comparison", "study_scores", "study_comparison", "study_ratios", "study_bce"}


def fill(place):
    """Run the notebook with the parameters of notebook 05 in another test; its folder."""
    done = through_papermill(NOTEBOOK, ARMS, place)
    assert done.returncode == 0, done.stderr[-3000:]
    return named_results(place / "out.ipynb")


def written(folder):
    kinds = (".pdf", ".svg", ".png", ".csv", ".tex")
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix in kinds}


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The place where notebook 06 ran, and the folder that it filled."""
    place = tmp_path_factory.mktemp("paper")
    return place, fill(place)


def test_the_notebook_runs_from_another_folder_with_changed_parameters(ran):
    place, _ = ran
    assert cells_of(place / "out.ipynb", "code")[-1].outputs[0].text.endswith("DONE\n")
    assert [p.name for p in place.iterdir()] == ["out.ipynb"]
    shown = [o for cell in cells_of(place / "out.ipynb", "code") for o in cell.outputs]
    assert not any(o.get("name") == "stderr" for o in shown), faults(place / "out.ipynb")


@pytest.mark.soak
def test_a_second_run_writes_the_same_bytes(ran, tmp_path):
    first = written(ran[1])
    for file in ran[1].iterdir():
        file.unlink()  # the second run has to write everything again
    second = written(fill(tmp_path))
    assert len(first) >= 30 and set(first) == set(second)
    assert [name for name in first if first[name] != second[name]] == []


def test_figures_have_three_formats_and_numbers_and_tables_have_two(ran):
    formats = {}
    for name in written(ran[1]):
        stem, kind = name.rsplit(".", 1)
        formats.setdefault(stem, set()).add(kind)
    assert {stem for stem, kinds in formats.items() if {"pdf", "svg", "png"} <= kinds} == FIGURES
    assert {stem for stem, kinds in formats.items() if "tex" in kinds} == TABLES | {"variables"}
    assert all("csv" in formats[stem] for stem in (FIGURES | TABLES) - {"refinement"})


# The text -----------------------------------------------------------------------------------------

TEXT = re.sub(r"(?<!\\)%.*", "", SOURCE.read_text(encoding="utf-8"))
SHORT = dict(re.findall(r"\\newcommand\{\\(\w+)\}\[1\]\{\\csname lkd(\w+)#1\\endcsname\}", TEXT))
"""Commands for the numbers of a data set, such as busi, and the macros' common beginning."""


def uses(command):
    found = re.findall(rf"\\{command}(?:\[[^]]*\])?\{{(?:\\results/)?([^}}#]+)\}}", TEXT)
    return set(found)


def test_the_paper_names_only_files_and_macros_that_the_notebook_writes(ran):
    files = written(ran[1])
    pictures, inputs = uses("includegraphics"), uses("input") | uses("fitted")
    assert pictures == FIGURES and inputs == TABLES | {"variables"}
    macros = re.findall(r"\\newcommand\{\\(lkd[A-Za-z]+)\}", files["variables.tex"].decode())
    assert len(set(macros)) == len(macros)
    used = set(re.findall(r"\\(lkd[A-Za-z]+)", TEXT))
    for name, begin in SHORT.items():
        used |= {f"lkd{begin}{end}" for end in re.findall(rf"\\{name}\{{(\w+)\}}", TEXT)}
    assert len(SHORT) == 4 and len(used) >= 40 and sorted(used - set(macros)) == []


def test_the_paper_types_no_result_by_hand():
    body = re.sub(r"\\documentclass.*?\\begin\{document\}", "", TEXT, flags=re.S)
    body = re.sub(r"\\includegraphics\[[^]]*\]", "", body)
    assert re.findall(r"(?<![\w.])\d+[.,]\d+", body) == []


def test_the_paper_compiles(ran, tmp_path):
    if not shutil.which("pdflatex"):
        pytest.skip(
            "pdflatex is not installed: Debian's texlive-latex-base, texlive-latex-recommended "
            "and texlive-fonts-recommended have it"
        )
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error"]
    command += [f"-output-directory={tmp_path}"]
    command += [rf"\def\results{{{ran[1]}}}\input{{{SOURCE.stem}}}"]
    for _ in range(2):  # the second pass knows the numbers of tables and figures
        done = subprocess.run(command, cwd=SOURCE.parent, capture_output=True, check=False)
        assert done.returncode == 0, done.stdout.decode(errors="replace")[-2000:]
    log = (tmp_path / "paper.log").read_text(errors="replace")
    faulty = r"undefined|multiply defined|Overfull \\hbox|Rerun to get"
    assert not re.findall(faulty, log) and (tmp_path / "paper.pdf").stat().st_size > 100_000
    assert [p.name for p in SOURCE.parent.iterdir() if p.suffix != ".tex"] == []
