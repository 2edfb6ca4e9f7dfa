"""Figures draw the numbers that they are given, at paper widths, with the same bytes each time."""

import inspect as python_inspect
import io
import itertools
import re
import warnings
from base64 import b64decode
from functools import cache
from types import SimpleNamespace
from xml.etree import ElementTree

import matplotlib as mpl
import matplotlib.pyplot as plt
import nbconvert
import nbformat
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgb
from PIL import Image
from skimage.color import rgb2lab

from lesionkd_core.analysis import figures, inspect, statistics, tables
from lesionkd_core.analysis.inspect import NodeView, RefinementView
from lesionkd_core.config import LesionKDError
from lesionkd_core.losses import TERMS, Term
from lesionkd_core.pipeline import ARMS
from tests.conftest import ROOT
from tests.test_statistics import study

mpl.use("Agg")
ALL_ARMS = [*ARMS, *(name for name in TERMS if name not in ("seg", *ARMS))]


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


def history(arms=("alone", "method"), seeds: int = 2, epochs: int = 6, **columns) -> pd.DataFrame:
    """Validation Dice, losses and gradients of invented runs."""
    rng, rows = np.random.default_rng(1), []
    for arm, seed, epoch in itertools.product(arms, range(seeds), range(1, epochs + 1)):
        row = {"arm": arm, "seed": seed, "epoch": epoch, "val_dice": rng.uniform(0.2, 0.8)}
        row |= {"grad_seg": rng.uniform(0.1, 1), "loss_total": 2.0, "loss_seg": rng.uniform(0.1, 1)}
        terms = () if arm == "alone" else ("feat", "edge")
        row |= {f"grad_{t}": rng.uniform(0.01, 1) for t in terms}
        rows.append(row | {f"cos_{t}": rng.uniform(-1, 1) for t in terms} | columns)
    return pd.DataFrame(rows)


@cache
def compared() -> pd.DataFrame:
    return statistics.compare(study(), draws=200)


@cache
def thirds() -> pd.DataFrame:
    columns = ("lesion_pixels", "contrast")
    return pd.concat([statistics.by_tertile(study(), name, draws=100) for name in columns])


@cache
def gains() -> pd.DataFrame:
    """Gain over the student alone."""
    return statistics.compare_with(study(), arms=("kd", "method"), draws=200)


@cache
def lengths() -> pd.DataFrame:
    """Three lengths of the student alone, on its own test cases and on another data set."""
    table = study().query("dataset == 'isic2018'")
    longer = table.query("arm == 'alone'")
    longer = [longer.assign(arm=f"alone*{n}", dice=longer["dice"] + n / 100) for n in (2, 4)]
    own = pd.concat([table, *longer]).assign(test_dataset="isic2018")
    return pd.concat([own, own.assign(test_dataset="ham10000")])


def node_view(live=(0, 3), size: int = 8, nodes: int = 5) -> NodeView:
    """Four cells and the background's node."""
    rng = np.random.default_rng(2)
    projection, anchors = np.zeros((nodes, size, size)), np.full((nodes, 2), np.nan)
    members = np.zeros((nodes, size, size))
    if live:
        drawn = rng.dirichlet(np.ones(len(live)), (size, size))
        projection[list(live)] = drawn.transpose(2, 0, 1)
        anchors[list(live)] = rng.uniform(0, size - 1, (len(live), 2))
        members[list(live), range(len(live)), range(len(live))] = 1
    return NodeView(np.eye(size) * bool(live), members, projection, anchors, nodes - 1)


def picture(size: int = 32) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (size, size, 3)).astype(np.uint8)


def release(count: int = 60) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    share = np.exp(rng.normal(-3, 1, count)).clip(0, 0.6)
    split = rng.choice(["train", "val", "test"], count)
    return pd.DataFrame(
        {"split": split, "lesion_fraction": share, "contrast": rng.normal(size=count)}
    )


EYE = np.eye(32)
PREPARED = SimpleNamespace(
    images=np.stack([picture()] * 3),
    masks=np.stack([EYE] * 3),
    cases=pd.DataFrame({"id": ["case_a", "case_b", "case_c"], "split": ["train"] * 3}),
    summary={"joined": {"largest": [["case_a", "case_c"]]}},
)
POINTS = pd.DataFrame(
    {"dataset": "busi", "model": ["alone", "method", "unet64"], "dice": [0.6, 0.65, 0.7]}
).assign(low=[0.5, 0.55, 0.6], high=[0.7, 0.75, 0.8], macs=[1e7, 1e7, 1e10])
PAIR = pd.DataFrame({"first": [0], "second": [2], "bits": [5], "correlation": [0.9]})
PAIR["content"] = 0.7
TWO = np.array([[[1, 1], [2, 2]], [[0, 0], [4, 4]]])
SHARES = {"raw products": np.full((2, 4), 0.5), "cosine": np.eye(4)[:2]}

DRAWINGS = {
    "ablation": lambda: figures.ablation(study().query("dataset == 'isic2018'"), compared()),
    "cases": lambda: figures.cases(PREPARED, [0, 2]),
    "dice_and_cost": lambda: figures.dice_and_cost(POINTS),
    "edges": lambda: figures.edges(PREPARED, [1], {"stride 4": np.ones((1, 8, 8))}),
    "forest": lambda: figures.forest(compared().query("arm == 'method'")),
    "gain_and_hours": lambda: figures.gain_and_hours(gains().assign(hours=1.5)),
    "latency": lambda: figures.latency(tables.committed("cost")),
    "joined_groups": lambda: figures.joined_groups(PREPARED),
    "learning_curves": lambda: figures.learning_curves(
        statistics.learning_curves(history(ALL_ARMS, dataset="busi"))
    ),
    "lesion_sizes": lambda: figures.lesion_sizes(release()),
    "margin": lambda: figures.margin(np.random.default_rng(0).normal(size=(16, 16)), -0.8),
    "nodes": lambda: figures.nodes(picture(), {"teacher": node_view(), "method": node_view()}),
    "pairs": lambda: figures.pairs(PREPARED, PAIR),
    "partial_l2": lambda: figures.partial_l2(inspect.partial_l2_curves(points=21)),
    "per_case_scores": lambda: figures.per_case_scores({"student": study()}),
    "projection": lambda: figures.projection(TWO, np.eye(2), SHARES),
    "refinement": lambda: figures.refinement(
        picture(), RefinementView(*np.random.default_rng(0).normal(size=(3, 3, 8, 8)), 1)
    ),
    "segmentations": lambda: figures.segmentations(
        PREPARED, [0, 1], {"teacher": np.stack([EYE] * 2), "otsu": np.stack([EYE] * 2)}
    ),
    "study": lambda: figures.study(lengths()),
    "tertiles": lambda: figures.tertiles(thirds()),
    "training_curves": lambda: figures.training_curves(
        {"teacher": history(("alone",)), "student": history(("alone",))}
    ),
}


# Every figure -------------------------------------------------------------------------------------


def test_every_function_that_draws_is_tested_here():
    def draws(function) -> bool:
        return hasattr(function, "__wrapped__") and python_inspect.isfunction(function)

    drawing = {name for name, function in vars(figures).items() if draws(function)}
    assert drawing == set(DRAWINGS)


@pytest.mark.parametrize("name", ["forest", "nodes"])
def test_a_figure_has_the_same_bytes_twice(name, tmp_path):
    for folder in "ab":
        figures.save(DRAWINGS[name](), name, tmp_path / folder, data=pd.DataFrame({"x": [1 / 3]}))
    for suffix in ("pdf", "svg", "png", "csv"):
        first, second = (tmp_path / folder / f"{name}.{suffix}" for folder in "ab")
        assert first.read_bytes() == second.read_bytes(), suffix


@pytest.mark.parametrize("name", DRAWINGS)
def test_a_figure_has_a_paper_width_small_print_and_a_text(name, tmp_path, caplog):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fig = DRAWINGS[name]()
        figures.save(fig, name, tmp_path)
    assert not caplog.records, "no message of a font"
    assert any(fig.get_figwidth() * 25.4 == pytest.approx(width) for width in (85, 174))
    assert fig.get_figheight() * 25.4 < 240, "fits on a page"
    texts = [text for text in fig.findobj(mpl.text.Text) if text.get_text()]
    sizes = {round(text.get_fontsize(), 2) for text in texts}
    assert sizes <= {7, 7.5}
    assert 7 * figures.NOTEBOOK_SCALE >= 8.7, "9 pt in a notebook"
    (width, height), drawn = fig.get_size_inches(), fig.get_tightbbox()
    assert min(drawn.x0, drawn.y0) > -0.1, "nothing is clipped"  # in inches, but for hinting
    assert drawn.x1 < width + 0.1 and drawn.y1 < height + 0.1, "nothing is clipped"
    text = fig.get_label()
    assert 40 <= len(text) <= 400 and text.endswith(".") and "\n" not in text and "$" not in text


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("forest", ["busi, U-Net 64", "student alone; both, edges shuffled; logit KD", "right: m"]),
        ("pairs", ["case_a and case_c, 5 bits"]),
    ],
)
def test_the_alternative_text_is_made_from_what_is_drawn(name, words):
    text = DRAWINGS[name]().get_label()
    assert all(word in text for word in words), text


# Colours ------------------------------------------------------------------------------------------


def lab(*colours) -> np.ndarray:
    return rgb2lab(np.array([to_rgb(colour) for colour in colours])[None])[0]


def test_every_arm_is_distinguished_by_marker_and_by_dash_alone():
    assert set(ALL_ARMS) | {"teacher", "student", "otsu"} <= set(figures.STYLES)
    looks = [figures.STYLES[arm] for arm in (*ALL_ARMS, "sobel_mask", "pseudo")]
    for part in ("colour", "marker", "dash"):
        assert len({getattr(look, part) for look in dict.fromkeys(looks)}) == len(set(looks)), part
    apart = [lab(figures.style_of(name).colour)[0] for name in ("teacher", "student", "alone")]
    greys = sorted(lightness for lightness, *_ in apart)
    assert min(np.diff(greys)) > 10, "legible in grey"


def test_a_loss_term_of_a_user_gets_a_style_and_a_label(monkeypatch):
    for name in ("mine", "yours", "theirs"):
        monkeypatch.setitem(TERMS, name, Term(name, None, f"{name}, my term", 1.0))
    looks = [figures.style_of(name) for name in ("mine", "yours", "theirs")]
    for part in ("colour", "marker", "dash"):
        assert len({getattr(look, part) for look in looks}) == 3, part
    fig = figures.learning_curves(statistics.learning_curves(history(("alone", "mine"))))
    assert "mine, my term" in fig.get_label()
    assert figures.style_of("anything") == figures.style_of("anything")


# Means and differences ----------------------------------------------------------------------------


def marks(axis) -> dict[tuple[str, str], list[float]]:
    """{(row, name): [value, low, high, filled]} of an interval chart, from above."""
    rows = [(y, axis.yaxis.get_major_formatter()(y)) for y in axis.get_yticks()]
    pairs = [line for line in axis.lines if len(line.get_xdata()) == 2]
    spans = {line.get_ydata()[0]: list(line.get_xdata()) for line in pairs}
    found = {}
    for line in (line for line in axis.lines if not line.get_label().startswith("_")):
        [x], [y] = line.get_data()
        _, row = min(rows, key=lambda place, y=y: abs(place[0] - y))
        limits = spans.get(y, [np.nan, np.nan])
        found[row, line.get_label()] = [x, *limits, line.get_markerfacecolor() != "white"]
    return found


def trainings(axis) -> list[list[float]]:
    ticks = [line for line in axis.lines if line.get_marker() == "|" and line.get_markersize() == 4]
    return [list(line.get_xdata()) for line in ticks]


def check_differences(axis, rows: pd.DataFrame, who: str) -> None:
    significant = rows["verdict"].isin(["better", "worse"])
    expected = rows[["difference", "low", "high"]].assign(filled=significant).to_numpy(float)
    found = {name: mark for (_, name), mark in marks(axis).items() if not np.isnan(mark[0])}
    assert set(found) == set(rows[who])
    np.testing.assert_allclose([found[name] for name in rows[who]], expected)


def test_the_forest_plot_draws_every_difference_interval_and_training():
    method = compared().query("arm == 'method'")
    axes = [axis for axis in figures.forest(method).axes if axis.get_visible()]
    titles = ["busi, ResNet34-UNet", "busi, U-Net 64", "isic2018, ResNet34-UNet"]
    assert [axis.get_title(loc="left") for axis in axes] == titles
    for axis, (_, part) in zip(axes, method.groupby(["dataset", "teacher"])):
        check_differences(axis, part, "other")
        np.testing.assert_allclose(trainings(axis), part.filter(like="difference_seed"))
    alone = figures.forest(compared().query("other == 'alone'"))
    assert alone.get_label().startswith("Arm minus student alone, Dice (right: arm better)")


def test_a_marker_is_filled_if_the_verdict_is_better_or_worse():
    words = ("better", "inconclusive", "reached by longer training", "worse", "one training")
    table = pd.DataFrame({"other": ["alone", "feat", "edge", "kd", "cwd"], "verdict": words})
    table = table.assign(arm="method", metric="dice", difference=0.03, low=0.01, high=0.05)
    found = marks(figures.forest(table).axes[0])
    assert [name for (_, name), mark in found.items() if mark[3]] == ["alone", "kd"]


def test_the_ablation_draws_means_seeds_and_differences():
    scores, method = study(), compared().query("arm == 'method'")
    axes = np.array(figures.ablation(scores, method).axes).reshape(3, 2)
    for (left, right), (family, part) in zip(axes, scores.groupby(["dataset", "teacher"])):
        means = {name: mark[:3] for (_, name), mark in marks(left).items()}
        assert list(means) == ["teacher", "alone", "method", "shuffled", "kd"]
        expected = [statistics.case_mean(statistics.by_seed(part, arm)) for arm in means]
        np.testing.assert_allclose(list(means.values()), expected)
        kd = part[part["arm"] == "kd"].groupby("seed")["dice"].mean().tolist()
        assert trainings(left)[-1] == pytest.approx(kd)
        own = (method["dataset"] == family[0]) & (method["teacher"] == family[1])
        check_differences(right, method[own], "other")


# Lines --------------------------------------------------------------------------------------------


def lines(axis) -> dict[str, tuple[list, list]]:
    named = [line for line in axis.lines if not line.get_label().startswith("_")]
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in named}


def test_learning_curves_are_the_means_with_the_range_of_the_seeds():
    both = pd.concat([history(dataset="busi"), history(dataset="isic2018")])
    curves = statistics.learning_curves(both)
    left, right = figures.learning_curves(curves).axes
    assert (left.get_title(loc="left"), right.get_title(loc="left")) == ("busi", "isic2018")
    part = curves[(curves["dataset"] == "busi")]
    for arm, band in zip(("alone", "method"), left.collections):
        of_arm = part[part["arm"] == arm]
        assert lines(left)[arm] == (of_arm["epoch"].tolist(), of_arm["mean"].tolist())
        corners = {tuple(p) for p in band.get_paths()[0].vertices.round(9)}
        for side in ("low", "high"):
            assert set(zip(of_arm["epoch"], of_arm[side].round(9))) <= corners


# The method ---------------------------------------------------------------------------------------


def test_the_margin_is_a_border_of_the_histogram():
    values = np.random.default_rng(0).normal(size=200)
    counts, borders = figures.margin_histogram(values, -0.8)
    assert counts.sum() == 200 and np.abs(borders + 0.8).min() < 1e-12
    assert counts[borders[:-1] < -0.8 - 1e-9].sum() == (values < -0.8).sum()
    constant, _ = figures.margin_histogram(np.full(5, -0.8), -0.8)
    assert constant.sum() == 5


@pytest.mark.parametrize("part", figures.METHOD_PARTS)
def test_all_parts_of_the_method_but_one_are_faded(part):
    original = (ROOT / "docs" / "method.svg").read_text(encoding="utf-8")
    assert len(original) < 20_000 and set(re.findall(r'<g id="(\w+)"', original)) == set(
        figures.METHOD_PARTS
    )
    groups = ElementTree.fromstring(figures.method_svg(part)).findall("{*}g")
    faded = {group.get("id"): group.get("opacity") for group in groups}
    networks = {"teacher": "0.3", "student": "0.3"}
    assert faded == networks | {part: None}
    assert "opacity" not in re.sub(r'opacity="\.6"', "", figures.method_svg())


@pytest.mark.fault
def test_the_method_has_no_other_part():
    with pytest.raises(LesionKDError, match="no part 'graph'; parts: teacher"):
        figures.method_svg("graph")


# Tables of next to nothing ------------------------------------------------------------------------


def degenerate():
    empty = study().iloc[:0]
    yield "nothing compared", lambda: figures.forest(statistics.compare(empty))
    yield "no case", lambda: figures.ablation(empty, statistics.compare(empty))
    one = study().query("seed == 0 and group == 'g0'")
    yield "one group, no interval", lambda: figures.ablation(one, statistics.compare_arms(one))
    undefined = {"method": study().assign(precision=np.nan)}
    yield "undefined scores", lambda: figures.per_case_scores(undefined, "precision")
    yield "no live node", lambda: figures.nodes(picture(), {"": node_view(())})
    yield "one case in a split", lambda: figures.lesion_sizes(release(5).assign(split="test"))


@pytest.mark.parametrize(
    ("name", "draw"), list(degenerate()), ids=lambda v: v if isinstance(v, str) else ""
)
def test_degenerate_tables_are_drawn_without_a_warning(name, draw):
    with warnings.catch_warnings(), figures.style():
        warnings.simplefilter("error")
        fig = draw()
        fig.savefig(io.BytesIO(), dpi=40)
    assert fig.get_label().endswith(".")


# Alternative texts, which go with a figure to the notebook and into its files ---------------------

NOTEBOOKS = sorted((ROOT / "notebooks").glob("0*.ipynb"))


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
