"""Every figure has an alternative text, which goes with it to the notebook and into its files."""

import re

import matplotlib.pyplot as plt
import nbconvert
import nbformat
import numpy as np
import pytest
from PIL import Image

from lesionkd_core.analysis import figures, statistics
from lesionkd_core.config import LesionKDError
from tests.conftest import ROOT
from tests.test_figures import DRAWINGS, EYE, compared, history, node_view, picture, study, thirds

NOTEBOOKS = sorted((ROOT / "notebooks").glob("0*.ipynb"))


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


@pytest.mark.parametrize("name", DRAWINGS)
def test_a_figure_says_briefly_what_it_shows(name):
    text = DRAWINGS[name]().get_label()
    assert 40 <= len(text) <= 400 and text.endswith(".") and "\n" not in text and "$" not in text


@pytest.mark.parametrize(
    ("draw", "words"),
    [
        (DRAWINGS["cases"], ["2 prepared images", "case_a, case_c"]),
        (DRAWINGS["edges"], ["1 images", "stride 4"]),
        (DRAWINGS["latency"], ["U-Net 64", "student, stem 4", "128, 256 px", "ExecuTorch", "int8"]),
        (DRAWINGS["pairs"], ["case_a and case_c, 5 bits"]),
        (DRAWINGS["pareto"], ["on busi", "student alone; both (method); U-Net 64"]),
        (DRAWINGS["segmentations"], ["2 images", "teacher; Otsu"]),
        (DRAWINGS["calibration"], ["teacher; both (method)", "predicted probability"]),
        (DRAWINGS["lesion_sizes"], ["train, val, test", "size of the lesion"]),
        (DRAWINGS["when_teacher_helps"], ["by epochs, training cases with a mask, teacher"]),
        (
            lambda: figures.forest(compared()),
            ["busi, U-Net 64", "student alone; both, edges shuffled; logit KD", "right: method"],
        ),
        (
            lambda: figures.learning_curves(statistics.learning_curves(history(("kd",)))),
            ["range of the seeds", "logit KD"],
        ),
        (
            lambda: figures.nodes([picture()], [EYE], {"teacher": [node_view((0, 1, 3))]}),
            ["3 of 4 nodes live", "teacher"],
        ),
        (
            lambda: figures.per_case_scores(
                {"otsu": study().query("arm == 'kd'").head(7).assign(iou=0.5)}, "iou"
            ),
            ["IoU of 7 test cases", "Otsu"],
        ),
        (
            lambda: figures.tertiles(thirds()),
            ["both (method) minus student alone", "lesion size (px) and contrast"],
        ),
    ],
)
def test_the_text_is_made_from_what_is_drawn(draw, words):
    text = draw().get_label()
    assert all(word in text for word in words), text


def test_an_arm_that_is_not_drawn_is_not_named():
    scored = study().query("dataset == 'isic2018'")
    assert "logit KD" in figures.ablation(scored, compared()).get_label()
    assert "logit KD" not in figures.ablation(scored.query("arm != 'kd'"), compared()).get_label()


def test_one_run_without_the_name_of_an_arm_has_gradients_to_draw():
    bare = history(("method",), seeds=1).drop(columns=["arm", "seed"])
    fig = figures.gradients(bare)
    assert "one run" in fig.get_label() and len(fig.axes) == 2


def shown_by(show, monkeypatch) -> tuple[dict, dict]:
    sent = []
    monkeypatch.setattr(
        "IPython.display.display", lambda data, metadata, raw: sent.append((data, metadata, raw))
    )
    show()
    [(data, metadata, raw)] = sent
    assert raw and not plt.get_fignums()
    return data, metadata


@pytest.mark.parametrize(("name", "kind"), [("forest", "image/png"), ("cases", "image/jpeg")])
def test_a_published_figure_has_its_text_in_the_notebook_and_in_html(
    name, kind, monkeypatch, tmp_path
):
    text = (fig := DRAWINGS[name]()).get_label()
    data, metadata = shown_by(lambda: figures.publish(fig, name, tmp_path), monkeypatch)
    assert data["text/plain"] == text and metadata == {kind: {"alt": text}}
    assert set(data) == {kind, "text/plain"} and len(data[kind]) < 60_000, "small in a notebook"
    assert {p.name for p in tmp_path.iterdir()} == {f"{name}.{s}" for s in ("pdf", "svg", "png")}
    output = nbformat.v4.new_output("display_data", data, metadata=metadata)
    cell = nbformat.v4.new_code_cell("", execution_count=1, outputs=[output])
    # only the classic template of nbconvert writes `alt`
    exporter = nbconvert.HTMLExporter(template_name="classic")
    html, _ = exporter.from_notebook_node(nbformat.v4.new_notebook(cells=[cell]))
    assert re.search(r'<img[^>]*alt="([^"]*)"', html)[1] == text


@pytest.mark.fault
def test_a_figure_without_a_text_is_not_shown():
    with pytest.raises(LesionKDError, match="no alternative text"):
        figures.display(plt.figure())


def test_the_files_hold_the_text(tmp_path):
    text = (fig := DRAWINGS["pareto"]()).get_label()
    figures.save(fig, "pareto", tmp_path)
    assert f"<title>{text}</title>" in (tmp_path / "pareto.svg").read_text(encoding="utf-8")
    assert Image.open(tmp_path / "pareto.png").text["Description"] == text
    assert b"/Subject (" in (tmp_path / "pareto.pdf").read_bytes()
    figures.save(plt.figure(), "plain", tmp_path)  # one without a text can be saved


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_every_picture_of_a_committed_notebook_has_its_text(path):
    cells = nbformat.read(path, as_version=4).cells
    outputs = [output for cell in cells for output in cell.get("outputs", []) if "data" in output]
    pictures = [(kind, o) for o in outputs for kind in o.data if kind.startswith("image/")]
    assert pictures, "a notebook has at least one figure"
    for kind, output in pictures:
        text = output.metadata.get(kind, {}).get("alt", "")
        assert len(text) >= 40 and output.data["text/plain"] == text


def test_the_style_is_for_a_with_block(tmp_path):
    before = plt.rcParams["font.size"]
    with figures.style():
        assert plt.rcParams["font.size"] == 7.5
        fig, axis = plt.subplots(figsize=(figures.ONE_COLUMN, 1))
        axis.plot(np.arange(3))
    assert plt.rcParams["font.size"] == before
