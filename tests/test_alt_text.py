"""Every figure has an alternative text, which goes with it to the notebook and into its files."""

import re
from base64 import b64decode

import matplotlib.pyplot as plt
import nbconvert
import nbformat
import pytest
from PIL import Image

from lesionkd_core.analysis import figures
from lesionkd_core.config import LesionKDError
from tests.conftest import ROOT
from tests.test_figures import DRAWINGS

NOTEBOOKS = sorted((ROOT / "notebooks").glob("0*.ipynb"))


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


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
    assert data["text/plain"] == text and metadata[kind]["alt"] == text
    assert set(data) == {kind, "text/plain"} and b64decode(data[kind])
    assert {p.name for p in tmp_path.iterdir()} == {f"{name}.{s}" for s in ("pdf", "svg", "png")}
    output = nbformat.v4.new_output("display_data", data, metadata=metadata)
    cell = nbformat.v4.new_code_cell("", execution_count=1, outputs=[output])
    # only the classic template of nbconvert writes `alt`
    exporter = nbconvert.HTMLExporter(template_name="classic")
    html, _ = exporter.from_notebook_node(nbformat.v4.new_notebook(cells=[cell]))
    assert re.search(r'<img[^>]*alt="([^"]*)"', html)[1] == text
    assert f'width="{metadata[kind]["width"]}"' in html


def test_the_method_is_shown_with_its_text(monkeypatch):
    data, metadata = shown_by(lambda: figures.method("feat"), monkeypatch)
    assert data["image/svg+xml"].startswith("<svg") and "'feat' highlighted" in data["text/plain"]
    assert metadata["image/svg+xml"]["alt"] == data["text/plain"]


@pytest.mark.fault
def test_a_figure_without_a_text_is_not_shown():
    with pytest.raises(LesionKDError, match="no alternative text"):
        figures.display(plt.figure())


def test_the_files_hold_the_text(tmp_path):
    text = (fig := DRAWINGS["dice_and_cost"]()).get_label()
    figures.save(fig, "costs", tmp_path)
    assert f"<title>{text}</title>" in (tmp_path / "costs.svg").read_text(encoding="utf-8")
    assert Image.open(tmp_path / "costs.png").text["Description"] == text
    assert b"/Subject (" in (tmp_path / "costs.pdf").read_bytes()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_every_picture_of_a_committed_notebook_has_its_text(path):
    cells = nbformat.read(path, as_version=4).cells
    outputs = [output for cell in cells for output in cell.get("outputs", []) if "data" in output]
    pictures = [(kind, o) for o in outputs for kind in o.data if kind.startswith("image/")]
    assert pictures, "a notebook has at least one figure"
    for kind, output in pictures:
        text = output.metadata.get(kind, {}).get("alt", "")
        assert len(text) >= 40 and output.data["text/plain"] == text
    assert path.stat().st_size < 300_000
