"""Every figure says in words what it shows, made from what was drawn; the words go with it to the notebook and into its files."""

import inspect
import re
from types import SimpleNamespace

import matplotlib.pyplot as plt
import nbconvert
import nbformat
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from lesionkd_core import figures, statistics, tables
from lesionkd_core.config import LesionKDError
from tests.conftest import ROOT
from tests.test_figures import DRAWINGS, compared, degenerate, history, node_view, picture, study, thirds

NOTEBOOKS = sorted((ROOT / "notebooks").glob("0*.ipynb"))
PREPARED = SimpleNamespace(
    images=np.stack([picture()] * 3), masks=np.stack([np.eye(32)] * 3), cases=pd.DataFrame({"id": ["case_a", "case_b", "case_c"], "split": ["train"] * 3})
)
POINTS = pd.DataFrame({"dataset": "busi", "model": ["student", "unet64"], "dice": [0.6, 0.7], "low": [0.5, 0.6], "high": [0.7, 0.8], "macs": [1e7, 1e10]})
SHOWN = DRAWINGS | {
    "per_case_scores": DRAWINGS["per_case"],
    "cases": lambda: figures.cases(PREPARED, [0, 2]),
    "edges": lambda: figures.edges(PREPARED, [1], {"width 1": np.ones((1, 8, 8))}),
    "latency": lambda: figures.latency(tables.committed("cost")),
    "overview": lambda: figures.overview({who: {"decoder.stride8": np.eye(4)} for who in ("teacher", "student")}, picture(), np.eye(32)),
    "pairs": lambda: figures.pairs(PREPARED, pd.DataFrame({"first": [0], "second": [2], "bits": [5]})),
    "pareto": lambda: figures.pareto(POINTS),
    "segmentations": lambda: figures.segmentations(PREPARED, [0, 1], {"teacher": [np.eye(32)] * 2, "otsu": [np.eye(32)] * 2}),
}


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


def test_every_function_that_draws_is_asked_here():
    drawing = {name for name in figures.__all__ if inspect.isfunction(f := getattr(figures, name)) and f.__annotations__.get("return") == "Figure"}
    assert len(drawing) >= 20 and drawing <= set(SHOWN)


@pytest.mark.parametrize("name", SHOWN)
def test_a_figure_says_in_a_few_words_what_it_shows(name):
    words = SHOWN[name]().get_label()
    assert 40 <= len(words) <= 400 and words.endswith(".") and "\n" not in words and "$" not in words, words


@pytest.mark.parametrize(("draw", "words"), [
    (SHOWN["cases"], ["2 prepared images", "case_a, case_c"]),
    (SHOWN["edges"], ["1 images", "width 1"]),
    (SHOWN["latency"], ["U-Net 64", "student, stem 4", "128, 256 px", "ExecuTorch", "int8"]),
    (SHOWN["overview"], ["teacher, decoder.stride8; student, decoder.stride8"]),
    (SHOWN["pairs"], ["case_a and case_c, 5 bits"]),
    (SHOWN["pareto"], ["on busi", "student; U-Net 64", "multiplications"]),
    (SHOWN["segmentations"], ["2 images", "teacher; Otsu"]),
    (lambda: figures.forest(compared()), ["busi, U-Net 64", "student alone; both, edges shuffled; logit KD", "right: method better"]),
    (lambda: figures.learning_curves(statistics.learning_curves(history(("kd",)))), ["range of the seeds", "logit KD"]),
    (lambda: figures.nodes([picture()], [np.eye(32)], {"teacher": [node_view((0, 1, 3))]}), ["3 of 4 nodes live", "teacher"]),
    (lambda: figures.per_case_scores({"otsu": study().query("arm == 'kd'").head(7).assign(iou=0.5)}, "iou"), ["IoU of 7 test cases", "Otsu"]),
    (lambda: figures.tertiles(thirds()), ["both (method) minus student alone", "lesion size and contrast"]),
])
def test_the_words_are_made_from_what_was_drawn(draw, words):
    text = draw().get_label()
    assert all(word in text for word in words), text


def test_an_arm_that_is_not_drawn_is_not_named():
    scored = study().query("dataset == 'isic2018'")
    assert "logit KD" in figures.ablation(scored, compared()).get_label()
    assert "logit KD" not in figures.ablation(scored.query("arm != 'kd'"), compared()).get_label()


@pytest.mark.parametrize(("name", "draw"), list(degenerate()), ids=lambda v: v if isinstance(v, str) else "")
def test_a_figure_of_next_to_nothing_has_words_too(name, draw):
    assert draw().get_label().endswith(".")


def test_one_run_without_an_arm_s_name_has_gradients_to_draw():
    fig = figures.gradients(history(("method",), seeds=1).drop(columns=["arm", "seed"]))
    assert "one run" in fig.get_label() and len(fig.axes) == 2


def shown_by(fig, monkeypatch) -> tuple[dict, dict]:
    sent = []
    monkeypatch.setattr("IPython.display.display", lambda data, metadata, raw: sent.append((data, metadata, raw)))
    figures.display(fig)
    [(data, metadata, raw)] = sent
    assert raw
    return data, metadata


@pytest.mark.parametrize(("name", "kind"), [("forest", "image/png"), ("cases", "image/jpeg")])
def test_a_notebook_gets_the_words_as_alt_and_as_text_and_html_shows_them(name, kind, monkeypatch):
    words = (fig := SHOWN[name]()).get_label()
    data, metadata = shown_by(fig, monkeypatch)
    assert data["text/plain"] == words and metadata == {kind: {"alt": words}} and set(data) == {kind, "text/plain"}
    cell = nbformat.v4.new_code_cell("", execution_count=1, outputs=[nbformat.v4.new_output("display_data", data, metadata=metadata)])
    # JupyterLab 4.6 and nbconvert's template `lab` do not look at `alt`; the classic template does
    html, _ = nbconvert.HTMLExporter(template_name="classic").from_notebook_node(nbformat.v4.new_notebook(cells=[cell]))
    assert re.search(r'<img[^>]*alt="([^"]*)"', html)[1] == words


@pytest.mark.fault
def test_a_figure_without_words_is_not_shown():
    with pytest.raises(LesionKDError, match="no alternative text"):
        figures.display(plt.figure())


def test_the_files_hold_the_words(tmp_path):
    words = (fig := SHOWN["pareto"]()).get_label()
    figures.save(fig, "pareto", tmp_path)
    assert f"<title>{words}</title>" in (tmp_path / "pareto.svg").read_text(encoding="utf-8")
    assert Image.open(tmp_path / "pareto.png").text["Description"] == words
    assert b"/Subject (" in (tmp_path / "pareto.pdf").read_bytes()
    figures.save(plt.figure(), "plain", tmp_path)  # one that has none can still be saved


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_every_picture_of_a_committed_notebook_has_its_words(path):
    outputs = [o for cell in nbformat.read(path, as_version=4).cells for o in cell.get("outputs", []) if "data" in o]
    pictures = [(kind, o) for o in outputs for kind in o.data if kind.startswith("image/")]
    assert pictures, "a notebook holds at least one figure"
    for kind, output in pictures:
        words = output.metadata.get(kind, {}).get("alt", "")
        assert len(words) >= 40 and output.data["text/plain"] == words, output.data["text/plain"]
