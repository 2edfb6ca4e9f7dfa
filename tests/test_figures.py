"""Figures draw the numbers that they are given, at paper widths, with the same bytes each time."""

import inspect as python_inspect
import io
import itertools
import warnings
from functools import cache
from types import SimpleNamespace

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgb

from lesionkd_core.analysis import figures, statistics, tables
from lesionkd_core.analysis.inspect import FeatureView, NodeView, RefinementView
from lesionkd_core.analysis.statistics import compare_arms
from lesionkd_core.config import ARMS, LesionKDError
from lesionkd_core.losses import TERMS, Term
from tests.test_statistics import study, table_of_arms

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
    return compare_arms(study(), draws=200)


@cache
def thirds() -> pd.DataFrame:
    columns = ("lesion_pixels", "contrast")
    return pd.concat([statistics.by_tertile(study(), name, draws=100) for name in columns])


@cache
def gains() -> pd.DataFrame:
    """Gain over the student alone for budgets, fractions of labels and teachers around one base."""
    rows, rng = [], np.random.default_rng(0)
    settings = [(b, 1.0, "unet64") for b in (5, 20, 80)] + [(20, 0.1, "unet64"), (20, 1.0, "other")]
    for budget, labels, teacher in settings:
        for arm, seed, case in itertools.product(("alone", "feat", "method"), (0, 1), range(8)):
            row = {"budget": budget, "labels": labels, "teacher": teacher, "arm": arm, "seed": seed}
            row |= {"id": f"c{case}", "group": f"c{case}"}
            rows.append(row | {"dice": 0.5 + (arm != "alone") / budget + rng.normal(0, 0.02)})
    return statistics.compare_with(pd.DataFrame(rows), arms=("feat", "method"), draws=200)


def node_view(live=(0, 3), size: int = 8, nodes: int = 4) -> NodeView:
    rng = np.random.default_rng(2)
    projection, anchors = np.zeros((nodes, size, size)), np.full((nodes, 2), np.nan)
    if live:
        drawn = rng.dirichlet(np.ones(len(live)), (size, size))
        projection[list(live)] = drawn.transpose(2, 0, 1)
        anchors[list(live)] = rng.uniform(0, size - 1, (len(live), 2))
    return NodeView(np.eye(size) * bool(live), projection, anchors)


def picture(size: int = 32) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (size, size, 3)).astype(np.uint8)


def maps() -> dict[str, dict[str, FeatureView]]:
    def view(seed: int, size: int) -> FeatureView:
        return FeatureView(np.random.default_rng(seed).normal(size=(size, size)), seed, 1.5)

    networks = enumerate(("teacher", "alone", "method"))
    return {who: {"a": view(i, 8), "b": view(i + 5, 4)} for i, who in networks}


def refined() -> RefinementView:
    return RefinementView(*np.random.default_rng(0).normal(size=(3, 3, 8, 8)), 1)


def calibrated() -> statistics.Calibration:
    p = np.random.default_rng(0).uniform(size=(2, 8, 8))
    return statistics.calibration(p, p > 0.4)


def release(count: int = 60) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    share = np.exp(rng.normal(-3, 1, count)).clip(0, 0.6)
    split = rng.choice(["train", "val", "test"], count)
    return pd.DataFrame({"split": split, "lesion_share": share, "contrast": rng.normal(size=count)})


PREPARED = SimpleNamespace(
    images=np.stack([picture()] * 3),
    masks=np.stack([np.eye(32)] * 3),
    cases=pd.DataFrame({"id": ["case_a", "case_b", "case_c"], "split": ["train"] * 3}),
    summary={"joined": {"largest": [["case_a", "case_c"]]}},
)
POINTS = pd.DataFrame(
    {"dataset": "busi", "model": ["alone", "method", "unet64"], "dice": [0.6, 0.65, 0.7]}
).assign(low=[0.5, 0.55, 0.6], high=[0.7, 0.75, 0.8], macs=[1e7, 1e7, 1e10])
PAIR = pd.DataFrame({"first": [0], "second": [2], "bits": [5], "correlation": [0.9]})
PAIR["content"] = 0.7
EYE = np.eye(32)

DRAWINGS = {
    "ablation": lambda: figures.ablation(study().query("dataset == 'isic2018'"), compared()),
    "calibration": lambda: figures.calibration({"teacher": calibrated(), "method": calibrated()}),
    "cases": lambda: figures.cases(PREPARED, [0, 2]),
    "edges": lambda: figures.edges(PREPARED, [1], {"stride 4": np.ones((1, 8, 8))}),
    "feature_maps": lambda: figures.feature_maps(
        picture(), EYE, maps(), {who: EYE for who in maps()}
    ),
    "forest": lambda: figures.forest(compared()),
    "gradients": lambda: figures.gradients(history()),
    "latency": lambda: figures.latency(tables.committed("cost")),
    "joined_groups": lambda: figures.joined_groups(PREPARED),
    "learning_curves": lambda: figures.learning_curves(
        statistics.learning_curves(history(ALL_ARMS, dataset="busi"))
    ),
    "lesion_sizes": lambda: figures.lesion_sizes(release()),
    "nodes": lambda: figures.nodes(
        [picture()], [EYE], {"teacher": [node_view()], "method": [node_view()]}
    ),
    "pairs": lambda: figures.pairs(PREPARED, PAIR),
    "pareto": lambda: figures.pareto(POINTS),
    "per_case_scores": lambda: figures.per_case_scores({"student": table_of_arms(0.05)}),
    "refinement": lambda: figures.refinement(picture(), refined()),
    "segmentations": lambda: figures.segmentations(
        PREPARED, [0, 1], {"teacher": [EYE] * 2, "otsu": [EYE] * 2}
    ),
    "tertiles": lambda: figures.tertiles(thirds()),
    "training_curves": lambda: figures.training_curves(
        {"teacher": history(("alone",)), "student": history(("alone",))}
    ),
    "when_teacher_helps": lambda: figures.when_teacher_helps(gains()),
}


def test_every_function_that_draws_is_tested_here():
    def draws(function) -> bool:
        return hasattr(function, "__wrapped__") and python_inspect.isfunction(function)

    drawing = {name for name, function in vars(figures).items() if draws(function)}
    assert drawing == set(DRAWINGS)


@pytest.mark.parametrize("name", DRAWINGS)
def test_a_figure_has_the_same_bytes_twice_at_a_paper_width_without_a_title(name, tmp_path, caplog):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for folder in ("a", "b"):
            fig = DRAWINGS[name]()
            figures.save(fig, name, tmp_path / folder, data=pd.DataFrame({"x": [1 / 3]}))
    for suffix in ("pdf", "svg", "png", "csv"):
        first, second = (tmp_path / folder / f"{name}.{suffix}" for folder in "ab")
        assert first.read_bytes() == second.read_bytes(), suffix
    assert not caplog.records, "no message of a font"
    assert any(fig.get_figwidth() * 25.4 == pytest.approx(width) for width in (85, 174))
    assert fig.get_figheight() * 25.4 < 240, "fits on a page"
    assert not any(axis.get_title() for axis in fig.axes) and fig.get_suptitle() == ""
    texts = [text for text in fig.findobj(mpl.text.Text) if text.get_text()]
    assert {t.get_fontsize() for t in texts if not t.get_text().isdigit()} <= {7, 7.5}
    (width, height), drawn = fig.get_size_inches(), fig.get_tightbbox()
    assert min(drawn.x0, drawn.y0) > -0.06, "nothing is clipped"
    assert drawn.x1 < width + 0.06 and drawn.y1 < height + 0.06, "nothing is clipped"


# Styles -------------------------------------------------------------------------------------------


def test_every_arm_is_distinguished_by_marker_and_by_dash_alone():
    assert set(ALL_ARMS) <= set(figures.STYLES)
    looks = [figures.STYLES[arm] for arm in ALL_ARMS]
    for part in ("colour", "marker", "dash"):
        assert len({getattr(look, part) for look in looks}) == len(ALL_ARMS), part
    assert len({tables.label(arm) for arm in ALL_ARMS}) == len(ALL_ARMS)
    assert {"teacher", "student", "otsu"} <= set(figures.STYLES)


def test_a_loss_term_of_a_user_gets_a_style_and_a_label(monkeypatch):
    for name in ("mine", "yours", "theirs"):
        monkeypatch.setitem(TERMS, name, Term(name, None, f"{name}, my term", 1.0))
    looks = [figures.style_of(name) for name in ("mine", "yours", "theirs")]
    for part in ("colour", "marker", "dash"):
        known = {getattr(look, part) for look in figures.STYLES.values()}
        assert len({getattr(look, part) for look in looks} - known) >= 2, part
    assert len({look.marker for look in looks}) == 3
    assert tables.label("mine") == "mine, my term"
    fig = figures.learning_curves(statistics.learning_curves(history(("alone", "mine"))))
    assert "mine, my term" in fig.get_label()


def test_a_name_without_a_term_has_the_same_style_each_time():
    assert figures.style_of("anything") == figures.style_of("anything")
    assert tables.label("anything") == "anything"


def test_a_mask_is_outlined_in_two_tones_and_shaded():
    fig = figures.segmentations(PREPARED, [0], {"teacher": [EYE]})
    axis = fig.axes[1]
    outlines = [c for c in axis.collections if c.get_path_effects()]
    assert len(outlines) == 2, "truth and teacher"
    for outline in outlines:
        [effect] = outline.get_path_effects()
        assert effect._gc["foreground"] == "black" and effect._gc["linewidth"] > 1
    shades = [c for c in axis.collections if c.get_alpha() == 0.2]
    assert len(shades) == 1
    assert to_rgb(shades[0].get_facecolor()[0][:3]) == to_rgb(figures.STYLES["teacher"].colour)


# What is drawn ------------------------------------------------------------------------------------


def drawn_intervals(axis, along: str) -> list[tuple[str, float, float, float, float]]:
    """Label, x, y, low, high of each interval of a chart; NaN if none is drawn."""
    found = []
    for container in axis.containers:
        (x,), (y,) = container.lines[0].get_data()
        bars = [s for bars in container.lines[2] for s in bars.get_segments()]
        ends = [s[:, "xy".index(along)] for s in bars] or [[np.nan, np.nan]]
        found.append((container.get_label(), x, y, *sorted(ends[0])))
    return found


def seed_ticks(axis) -> dict[float, list[float]]:
    """{place: the values of the seeds} of a chart with one row for each arm."""
    ticks = [line for line in axis.lines if line.get_marker() == "|"]
    ticks = [line for line in ticks if line.get_markersize() == 4]
    return {round(line.get_ydata()[0] + 0.28, 6): list(line.get_xdata()) for line in ticks}


def check_differences(axis, rows: pd.DataFrame, places: dict[str, float]) -> None:
    drawn = drawn_intervals(axis, "x")
    expected = [(r.difference, places[r.other], r.low, r.high) for r in rows.itertuples()]
    assert [row[0] for row in drawn] == rows["other"].tolist()
    np.testing.assert_allclose([row[1:] for row in drawn], expected)
    for row in rows.to_dict("records"):
        seeds = [value for name, value in row.items() if name.startswith("difference_seed")]
        assert seed_ticks(axis)[places[row["other"]]] == pytest.approx(seeds)


def of_family(table: pd.DataFrame, dataset: str, teacher: str) -> pd.DataFrame:
    return table[(table["dataset"] == dataset) & (table["teacher"] == teacher)]


def test_the_forest_plot_draws_every_difference_interval_and_seed():
    axes = [axis for axis in figures.forest(compared()).axes if axis.get_visible()]
    names = {
        "busi, ResNet34-UNet": ("busi", "resnet34_unet"),
        "busi, U-Net 64": ("busi", "unet64"),
        "isic2018, ResNet34-UNet": ("isic2018", "resnet34_unet"),
    }
    assert [axis.get_xlabel() for axis in axes] == list(names)
    labels = [text.get_text() for text in axes[0].get_yticklabels()]
    assert labels == ["student alone", "both, edges shuffled", "logit KD"]
    for axis, family in zip(axes, names.values()):
        places = {"alone": 0, "shuffled": -1, "kd": -2}
        check_differences(axis, of_family(compared(), *family), places)


def test_the_forest_plot_of_every_arm_against_one_says_so():
    table = study().query("dataset == 'isic2018'")
    comparison = statistics.compare_with(table, draws=200)
    fig = figures.forest(comparison)
    labels = [text.get_text() for text in fig.axes[0].get_yticklabels()]
    assert labels == ["both, edges shuffled", "logit KD"]
    places = {"shuffled": 0, "kd": -1}
    check_differences(fig.axes[0], comparison.assign(other=comparison["arm"]), places)
    assert fig.get_label().startswith("Arm minus student alone, Dice (right: arm better)")
    other = figures.forest(statistics.compare_arms(table, "kd", draws=200)).get_label()
    assert other.startswith("Logit KD minus other, Dice (right: logit KD better)")


def test_a_marker_is_filled_if_the_verdict_is_better_or_worse():
    words = ("better", "inconclusive", "not significant", "worse", "too few groups")
    table = pd.DataFrame({"other": ["alone", "feat", "edge", "kd", "cwd"], "verdict": words})
    table = table.assign(arm="method", metric="dice", difference=0.03, low=0.01, high=0.05)
    containers = figures.forest(table).axes[0].containers
    faces = {c.get_label(): c.lines[0].get_markerfacecolor() for c in containers}
    assert [name for name, face in faces.items() if face != "white"] == ["alone", "kd"]


def test_the_ablation_draws_means_seeds_and_differences():
    scores = study()
    axes = np.array(figures.ablation(scores, compared()).axes).reshape(3, 2)
    for (left, right), (family, part) in zip(axes, scores.groupby(["dataset", "teacher"])):
        places = {arm: -i for i, arm in enumerate(dict.fromkeys(part["arm"]))}
        drawn = {name: row for name, *row in drawn_intervals(left, "x")}
        assert set(drawn) == set(places)
        for arm, place in places.items():
            mean, low, high = statistics.case_mean(statistics.by_seed(part, arm))
            assert drawn[arm] == pytest.approx([mean, place, low, high])
        kd = part[part["arm"] == "kd"].groupby("seed")["dice"].mean().tolist()
        assert seed_ticks(left)[places["kd"]] == pytest.approx(kd)
        check_differences(right, of_family(compared(), *family), places)


def lines(axis) -> dict[str, tuple[list, list]]:
    named = [line for line in axis.lines if not line.get_label().startswith("_")]
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in named}


def test_learning_curves_are_the_means_with_the_range_of_the_seeds():
    both = pd.concat([history(dataset="busi"), history(dataset="isic2018")])
    curves = statistics.learning_curves(both)
    left, right = figures.learning_curves(curves).axes
    assert (left.get_xlabel(), right.get_xlabel()) == ("Epoch\nbusi", "Epoch\nisic2018")
    part = curves[(curves["dataset"] == "busi")]
    for arm, band in zip(("alone", "method"), left.collections):
        of_arm = part[part["arm"] == arm]
        assert lines(left)[arm] == (of_arm["epoch"].tolist(), of_arm["mean"].tolist())
        corners = {tuple(p) for p in band.get_paths()[0].vertices.round(9)}
        for side in ("low", "high"):
            assert set(zip(of_arm["epoch"], of_arm[side].round(9))) <= corners


def test_many_arms_are_drawn_in_two_charts():
    own, baselines = figures.learning_curves(statistics.learning_curves(history(ALL_ARMS))).axes
    assert set(lines(own)) == {"alone", "feat", "edge", "method", "shuffled"}
    assert {"alone", "method", "kd", "cwd", "dist", "sobel", "stem2"} <= set(lines(baselines))


def test_gradients_are_means_over_seeds_term_by_term():
    table = history(("method", "edge", "alone"))
    table.loc[table["arm"] == "edge", ["grad_feat", "cos_feat"]] = np.nan
    axes = figures.gradients(table).axes
    below = [axis.get_xlabel() for axis in axes[3:]]
    labels = ("student alone", r"+ $L_\mathrm{edge}$", "both (method)")
    assert below == [f"Epoch\n{label}" for label in labels]
    assert set(lines(axes[4])) == {"edge"} and set(lines(axes[3])) == set()
    norms, cosines = figures.gradients(table[table["arm"] == "method"]).axes
    by_epoch = table[table["arm"] == "method"].groupby("epoch")
    assert set(lines(norms)) == {"seg", "feat", "edge"} and set(lines(cosines)) == {"feat", "edge"}
    assert lines(norms)["edge"][1] == pytest.approx(by_epoch["grad_edge"].mean().tolist())
    means = by_epoch["cos_feat"].mean().tolist()
    assert lines(cosines)["feat"] == ([*range(1, 7)], pytest.approx(means))
    assert norms.get_yscale() == "log"


def test_the_cosine_of_two_terms_has_a_line_of_its_own():
    fig = figures.gradients(history(("method",)).assign(cos_feat_edge=0.3))
    assert lines(fig.axes[1])["feat_edge"][1] == [0.3] * 6
    assert set(lines(fig.axes[0])) == {"seg", "feat", "edge"}
    assert any(" and " in text.get_text() for text in fig.legends[0].get_texts())
    assert "feat_edge" not in fig.get_label()


def ticks(axis) -> list[str]:
    return [text.get_text() for text in axis.get_yticklabels()]


def test_tertiles_are_in_order_with_their_ranges():
    table = thirds()
    axes = np.array(figures.tertiles(table).axes).reshape(3, 2)
    for line, (_, part) in zip(axes, table.groupby(["dataset", "teacher"])):
        for axis, measure in zip(line, ("lesion_pixels", "contrast")):
            rows = part[part["column"] == measure]
            drawn = drawn_intervals(axis, "y")
            assert [row[1] for row in drawn] == [0, 1, 2]
            assert {row[0] for row in drawn} == {"method - alone"}
            expected = rows[["difference", "low", "high"]]
            np.testing.assert_allclose([row[2:] for row in drawn], expected)
            labels = [label.get_text().split("\n") for label in axis.get_xticklabels()]
            assert [label[0] for label in labels] == ["lowest", "middle", "highest"]
            assert [label[2] for label in labels] == [f"{cases} cases" for cases in rows["cases"]]
        assert line[0].get_xlabel().startswith("Lesion size (px)")


def test_gains_are_drawn_by_budget_labels_and_teacher_around_the_base():
    table = gains()
    by_budget, by_labels, by_teacher = figures.when_teacher_helps(table).axes
    assert [t.get_text() for t in by_budget.get_xticklabels()] == ["5", "20", "80"]
    assert [t.get_text() for t in by_labels.get_xticklabels()] == ["10%", "100%"]
    assert {t.get_text() for t in by_teacher.get_xticklabels()} == {"U-Net 64", "other"}
    feat = table[(table["arm"] == "feat") & (table["labels"] == 1) & (table["teacher"] == "unet64")]
    drawn = [row for row in drawn_intervals(by_budget, "y") if row[0] == "feat"]
    expected = feat.sort_values("budget")[["difference", "low", "high"]]
    np.testing.assert_allclose([row[2:] for row in drawn], expected)
    assert [row[1] for row in drawn] == pytest.approx([-0.11, 0.89, 1.89])
    seeds = [line for line in by_budget.lines if line.get_marker() == "_"]
    first = [line for line in seeds if line.get_xdata()[0] == pytest.approx(-0.11)]
    values = feat.sort_values("budget").iloc[0][["difference_seed0", "difference_seed1"]]
    assert any(list(line.get_ydata()) == pytest.approx(list(values)) for line in first)
    assert "epochs: 20" in by_labels.get_xlabel() and "epochs" not in by_budget.get_xlabel()
    chosen = figures.when_teacher_helps(table, {"budget": 5}).axes[1]
    assert len(chosen.containers) == 2, "only the base has 5 epochs with all labels"


def test_the_calibration_curve_leaves_out_empty_bins():
    found = statistics.calibration(np.array([[[0.1, 0.9, 0.95]]]), np.array([[[0, 1, 0]]]))
    above, below = figures.calibration({"method": found}).axes
    [curve] = [line for line in above.lines if line.get_label().startswith("both")]
    assert list(curve.get_xdata()) == pytest.approx([0.1, 0.925])
    assert list(curve.get_ydata()) == [0, 0.5]
    assert f"ECE {found.ece:.4f}" in curve.get_label()
    assert list(below.lines[0].get_ydata()) == pytest.approx([1 / 3, 2 / 3])


def test_networks_are_drawn_at_their_cost_and_the_best_are_joined():
    [axis] = figures.pareto(POINTS).axes
    places = {name: (x, y) for name, x, y, *_ in drawn_intervals(axis, "y")}
    assert places["method"][0] == places["alone"][0] == 1e7 and places["unet64"] == (1e10, 0.7)
    front = axis.lines[0]
    assert list(front.get_ydata()) == [0.65, 0.7]


def test_feature_maps_of_one_level_share_a_scale():
    views = maps()
    fig = figures.feature_maps(picture(), EYE, views, {who: EYE for who in views})
    pictures = [axis for axis in fig.axes if axis.get_label() != "<colorbar>"]
    for line, who in zip(np.array(pictures).reshape(3, 3), views):
        for axis, level in zip(line[1:], "ab"):
            assert np.array_equal(axis.images[0].get_array(), views[who][level].values)
            most = max(np.abs(of[level].values).max() for of in views.values())
            assert axis.images[0].get_clim() == (-most, most)
            channel = f"channel {views[who][level].channel}, d = 1.50"
            assert channel in [text.get_text() for text in axis.texts]


def test_a_pixel_has_the_colour_of_its_most_likely_node():
    view = node_view()
    _, edge, assigned, entropy = figures.nodes([picture()], [EYE], {"teacher": [view]}).axes[:4]
    assert np.array_equal(edge.images[0].get_array(), view.edge)
    assert np.array_equal(entropy.images[0].get_array(), view.entropy)
    numbers = {t.get_text(): t.get_position() for t in edge.texts if t.get_text().isdigit()}
    assert numbers == {str(node): tuple(view.anchors[node][::-1]) for node in (0, 3)}
    assert edge.texts[-1].get_text() == "2 of 4 live"
    drawn = np.asarray(assigned.images[1].get_array())
    assert drawn[..., 3] == pytest.approx(0.8 * view.projection.max(0)), "paler if less likely"
    for node in (0, 3):
        here = view.projection.argmax(0) == node
        assert here.any()
        assert (drawn[here][:, :3] == to_rgb(figures.NODE_COLOURS[node])).all()
    assert sorted(zip(*assigned.lines[0].get_data())) == [(i, i) for i in range(8)]


def test_cases_with_equal_scores_are_drawn():
    """Rounding puts the mean of equal numbers beside its own interval."""
    table = pd.DataFrame({"dice": [0.1 + 0.2] * 12, "group": list("abcdefghijkl")})
    assert figures.per_case_scores({"student": table}).axes


# Tables of next to nothing ------------------------------------------------------------------------


def degenerate():
    empty = study().iloc[:0]
    curves = statistics.learning_curves
    yield "nothing compared", lambda: figures.forest(compare_arms(empty))
    yield "no case", lambda: figures.ablation(empty, compare_arms(empty))
    yield "no third", lambda: figures.tertiles(statistics.by_tertile(empty))
    yield "no epoch", lambda: figures.gradients(history().iloc[:0])
    yield "no curve", lambda: figures.learning_curves(curves(history()).iloc[:0])
    yield "no case in the graph", lambda: figures.nodes([], [], {"teacher": []})
    yield "no factor varies", lambda: figures.when_teacher_helps(gains().query("budget == 5"))
    yield (
        "one arm",
        lambda: figures.ablation(table_of_arms(0).query("arm == 'method'"), compared().iloc[:0]),
    )
    one = study().query("seed == 0 and group == 'g0'")
    yield "one group, no interval", lambda: figures.forest(compare_arms(one))
    yield "one case", lambda: figures.ablation(one, compare_arms(one))
    undefined = {"method": table_of_arms(0).assign(precision=np.nan)}
    yield "undefined scores", lambda: figures.per_case_scores(undefined, "precision")
    mine = history(("mine",), seeds=1, epochs=1)
    yield "an arm without a style", lambda: figures.learning_curves(curves(mine))
    zero = history(("method",)).assign(grad_seg=0.0, grad_feat=0.0, grad_edge=0.0)
    yield "no gradient at all", lambda: figures.gradients(zero)
    some = history(("method",))
    some["grad_edge"] = some["grad_edge"].where(some["epoch"] > 2, 0.0)
    yield "a gradient of 0", lambda: figures.gradients(some)
    bare = history(("method",), seeds=1, epochs=1).drop(columns=["arm", "seed"])
    yield "one epoch", lambda: figures.gradients(bare)
    for name, live in (("one live node", (2,)), ("no live node", ())):
        yield name, lambda live=live: figures.nodes([picture()], [EYE], {"": [node_view(live)]})
    flat = {"teacher": {"a": FeatureView(np.zeros((4, 4)), 0, 0.0)}}
    nothing = {"teacher": np.zeros((32, 32))}
    yield "a flat map", lambda: figures.feature_maps(picture(), nothing["teacher"], flat, nothing)
    yield "one case in a split", lambda: figures.lesion_sizes(release(5).assign(split="test"))
    sure = statistics.calibration(np.zeros((1, 4, 4)), np.zeros((1, 4, 4)))
    yield "one bin", lambda: figures.calibration({"student": sure})


@pytest.mark.parametrize(
    ("name", "draw"), list(degenerate()), ids=lambda v: v if isinstance(v, str) else ""
)
def test_degenerate_tables_are_drawn_without_a_warning(name, draw):
    with warnings.catch_warnings(), figures.style():
        warnings.simplefilter("error")
        fig = draw()
        fig.savefig(io.BytesIO(), dpi=40)
    assert fig.get_label().endswith(".")


@pytest.mark.fault
@pytest.mark.parametrize(
    ("draw", "column"),
    [
        (lambda: figures.gradients(history().drop(columns="grad_seg")), "grad_seg"),
        (lambda: figures.learning_curves(history()), "mean, low, high"),
        (lambda: figures.forest(compared().drop(columns="verdict")), "verdict"),
    ],
)
def test_a_table_of_another_kind_is_refused_by_its_missing_column(draw, column):
    with pytest.raises(LesionKDError, match=f"no column {column}"):
        draw()


@pytest.mark.fault
def test_scores_of_two_runs_in_one_table_are_refused():
    twice = pd.concat([table_of_arms(0), table_of_arms(0)])
    with pytest.raises(LesionKDError, match="scored twice"):
        figures.ablation(twice, pd.DataFrame())
