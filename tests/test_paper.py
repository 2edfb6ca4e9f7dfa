"""A paper from notebook 06 alone: every figure, table and number that notebooks/paper/paper.tex takes in is there, the same bytes twice, and it compiles."""

import json
import re
import shutil
import subprocess

import pandas as pd
import pytest

from lesionkd_core import figures, tables
from lesionkd_core.config import AblationConfig
from lesionkd_core.stages import ablate
from lesionkd_core.statistics import compare_arms
from tests.conftest import ROOT
from tests.test_notebooks import CHANGED, through_papermill
from tests.test_statistics import study

NAME = "06_paper_figures"
SOURCE = ROOT / "notebooks" / "paper" / "paper.tex"


def written(folder) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix in (".pdf", ".svg", ".png", ".csv", ".tex")}


@pytest.fixture(scope="module")
def twice(tmp_path_factory):
    """The folder that notebook 06 fills, and all bytes of a first time (test_notebooks', where that has run) and of a second."""
    folder = ablate(AblationConfig(**CHANGED[NAME]), tell=lambda *_: None).path / "paper"
    if not (folder / "variables.tex").exists():
        fill(tmp_path_factory.mktemp("first"))
    first = written(folder)
    for file in folder.iterdir():
        file.unlink()  # the second time has to write everything again
    fill(tmp_path_factory.mktemp("second"))
    return folder, first, written(folder)


def fill(place) -> None:
    done = through_papermill(ROOT / "notebooks" / f"{NAME}.ipynb", CHANGED[NAME], place)
    assert done.returncode == 0, done.stderr[-3000:]


def test_every_figure_table_and_number_is_the_same_bytes_on_a_second_run(twice):
    _, first, second = twice
    assert len(first) >= 30 and set(first) == set(second)
    assert [name for name in first if first[name] != second[name]] == []


def test_figures_are_there_in_four_formats_and_tables_in_two(twice):
    suffixes = {}
    for name in twice[1]:
        stem, suffix = name.rsplit(".", 1)
        suffixes.setdefault(stem, set()).add(suffix)
    drawn = {stem for stem, found in suffixes.items() if "pdf" in found}
    of_study = {"study", "study-alone", "study-tertiles", "study-curves", "study-gradients"}
    assert drawn == {"overview", "segmentations", "training", "ablation", "pareto"} | of_study
    assert all({"pdf", "svg", "png", "csv"} <= suffixes[stem] for stem in drawn)
    listed = {stem for stem, found in suffixes.items() if "tex" in found} - {"variables", "study-words"}
    assert listed == {"arms", "comparison", "study-scores", "study-comparison"} and all("csv" in suffixes[stem] for stem in listed)


def test_a_figure_s_csv_holds_what_is_plotted(twice):
    folder = twice[0]
    maps = pd.read_csv(folder / "overview.csv")
    assert set(maps["network"]) == {"teacher", "student"} and (maps.groupby(["network", "map"]).size() == 8**2).any()
    curves = pd.read_csv(folder / "study-curves.csv")
    assert {"arm", "epoch", "mean", "low", "high"} <= set(curves) and len(curves) > 100


def uses(command: str) -> set[str]:
    text = re.sub(r"(?<!\\)%.*", "", SOURCE.read_text(encoding="utf-8"))
    return set(re.findall(rf"\\{command}(?:\[[^]]*\])?\{{(?:\\results/)?([^}}#]+)\}}", text))


def test_the_paper_names_only_files_and_macros_that_notebook_06_writes(twice):
    _, files, _ = twice
    pictures, inputs = uses("includegraphics"), uses("input") | uses("fitted")
    assert len(pictures) >= 6 and {f"{name}.pdf" for name in pictures} <= set(files)
    assert {"variables", "arms", "study-scores"} <= inputs and {f"{name}.tex" for name in inputs} <= set(files)
    defined = re.findall(r"\\newcommand\{\\(lkd[A-Za-z]+)\}", files["variables.tex"].decode())
    used = set(re.findall(r"\\(lkd[A-Za-z]+)", SOURCE.read_text(encoding="utf-8")))
    assert len(used) >= 20 and used <= set(defined) and len(set(defined)) == len(defined)


def test_the_paper_types_no_result_by_hand():
    text = re.sub(r"\\documentclass.*?\\begin\{document\}", "", SOURCE.read_text(encoding="utf-8"), flags=re.S)
    assert not re.findall(r"(?<![\w.])\d+[.,]\d+", re.sub(r"\\includegraphics\[[^]]*\]", "", text))


def test_the_paper_compiles(twice, tmp_path):
    if not shutil.which("pdflatex"):
        pytest.skip("no pdflatex here: Debian's texlive-latex-base, texlive-latex-recommended and texlive-fonts-recommended have it; names are checked above")
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", f"-output-directory={tmp_path}", rf"\def\results{{{twice[0]}}}\input{{{SOURCE.stem}}}"]
    for _ in range(2):  # the second time knows the numbers of tables and figures
        done = subprocess.run(command, cwd=SOURCE.parent, capture_output=True, check=False)
        assert done.returncode == 0, done.stdout.decode(errors="replace")[-2000:]
    log = (tmp_path / "paper.log").read_text(errors="replace")
    assert not re.findall(r"undefined|multiply defined|Overfull \\hbox|Rerun to get", log) and (tmp_path / "paper.pdf").stat().st_size > 100_000
    assert not [p for p in SOURCE.parent.iterdir() if p.suffix in (".aux", ".log", ".pdf")]


def test_macros_of_the_study_are_its_table_s_numbers():
    scored = study()
    compared = compare_arms(scored, draws=200)
    values = tables.study_numbers(scored, compared)
    part = scored[(scored["dataset"] == "busi") & (scored["teacher"] == "resnet34_unet")]
    assert values["busi kd dice"] == pytest.approx(part[part["arm"] == "kd"]["dice"].mean())
    assert values["busi cases"] == part["id"].nunique() and values["busi seeds"] == part.loc[part["arm"] != "teacher", "seed"].nunique()
    assert "busi unet64 kd dice" in values and "isic2018 kd dice" in values, "another teacher has macros of its own"
    row = compared[(compared["dataset"] == "busi") & (compared["teacher"] == "resnet34_unet") & (compared["other"] == "kd")].iloc[0]
    assert values["busi method minus kd"] == f"{row['difference']:+.3f}" and values["busi method minus kd low"] == f"{row['low']:+.3f}"
    assert values["busi method minus kd verdict"] in tables.in_words(compared)


def test_parameters_and_multiplications_are_those_that_were_measured():
    cost = tables.committed("cost")
    values = tables.cost_numbers(cost)
    assert values["student parameters"] == 58_629 and values["unet64 parameters"] == 14_788_929
    assert values["student macs"] == cost.query("model == 'student' and pixels == 128")["macs"].iloc[0]


def test_latex_sees_no_bare_special_character(tmp_path):
    text = tables.save_words("- own_data: 5 % of L_feat, -0.1 to +0.2\n- a & b", "words", tmp_path).read_text()
    assert text.splitlines() == [
        r"\begin{itemize}", r"\item own\_data: 5 \% of $L_\mathrm{feat}$, $-$0.1 to +0.2", r"\item a \& b", r"\end{itemize}",
    ]
    assert tables.variables({"data": "own_data"}, tmp_path).read_text() == "\\newcommand{\\lkdData}{own\\_data}\n"
    assert tables.save(pd.DataFrame({"arm": ["+ L_edge"], "b": [0.12345]}), "t", tmp_path, shown=pd.DataFrame({"arm": ["+ L_edge"]})).read_text().count(
        r"+ $L_\mathrm{edge}$ \\") == 1
    assert "0.12345" in (tmp_path / "t.csv").read_text()


def test_a_page_s_table_of_differences_says_what_the_sentences_say():
    compared = compare_arms(study(), draws=200)
    shown = tables.differences(compared)
    assert {"dataset", "teacher"} <= set(shown) and "profile" not in shown, "only what differs between rows"
    words = tables.in_words(compared).splitlines()
    for row, line in zip(shown.to_dict("records"), words):
        assert row["verdict"] in line and row["Dice, difference"] in line and row["95 % interval"] in line and row["method against"] in line
    assert figures.NETWORKS["unet64"] in set(shown["teacher"])


def test_the_notebook_says_how_the_paper_is_made():
    cells = json.loads((ROOT / "notebooks" / f"{NAME}.ipynb").read_text(encoding="utf-8"))["cells"]
    assert "make paper" in "".join(cells[1]["source"]) and "paper:" in (ROOT / "Makefile").read_text(encoding="utf-8")
