"""Figures draw the numbers that they are given, at paper widths, the same bytes twice; tables and macros say what their numbers say."""

import io
import warnings
from functools import cache

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgb

from lesionkd_core import figures, statistics, tables
from lesionkd_core.config import ARMS, LesionKDError
from lesionkd_core.figures.pictures import NODE_COLOURS
from lesionkd_core.statistics import compare_arms
from lesionkd_core.views import FeatureView, NodeView
from tests.test_statistics import study, table_of_arms

mpl.use("Agg")


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


def history(arms=("alone", "method"), seeds: int = 2, epochs: int = 6, **columns: str) -> pd.DataFrame:
    """Validation Dice and gradients of made-up runs."""
    rng, rows = np.random.default_rng(1), []
    for arm in arms:
        for seed in range(seeds):
            for epoch in range(1, epochs + 1):
                row = {"arm": arm, "seed": seed, "epoch": epoch, "val_dice": rng.uniform(0.2, 0.8), "grad_seg": rng.uniform(0.1, 1)}
                terms = {"feat": rng.uniform(0.01, 1), "edge": rng.uniform(0.001, 0.1)} if arm != "alone" else {}
                row |= {f"grad_{t}": norm for t, norm in terms.items()} | {f"cos_{t}": rng.uniform(-1, 1) for t in terms}
                rows.append(row | columns)
    return pd.DataFrame(rows)


def sweep() -> pd.DataFrame:
    rows = [("alone", np.nan, seed, 0.6 + seed / 100) for seed in range(2)]
    rows += [(arm, weight, seed, dice + seed / 50) for arm, weight, dice in (("feat", 1, 0.62), ("feat", 10, 0.66), ("kd", 0.1, 0.61)) for seed in range(2)]
    return pd.DataFrame(rows, columns=["arm", "weight", "seed", "val_dice"])


def options() -> pd.DataFrame:
    levels = ("feature_levels", "decoder.stride4, decoder.stride2")
    tried = {("arm", "alone"): 0.5, ("arm", "method"): 0.6, ("margin", "bn"): 0.6, ("margin", "empirical"): 0.64, levels: 0.58}
    rows = [(*what, seed, dice + seed / 50) for what, dice in tried.items() for seed in range(2)]
    return pd.DataFrame(rows, columns=["option", "value", "seed", "val_dice"])


@cache
def compared() -> pd.DataFrame:
    return compare_arms(study(), draws=200)


@cache
def thirds() -> pd.DataFrame:
    return pd.concat([statistics.by_tertile(study(), column, draws=100) for column in ("lesion_pixels", "contrast")])


def node_view(live=(0, 3), size: int = 8, nodes: int = 4) -> NodeView:
    rng = np.random.default_rng(2)
    projection, anchors = np.zeros((nodes, size, size)), np.full((nodes, 2), np.nan)
    if live:
        projection[list(live)] = rng.dirichlet(np.ones(len(live)), (size, size)).transpose(2, 0, 1)
        anchors[list(live)] = rng.uniform(0, size - 1, (len(live), 2))
    return NodeView(np.eye(size) * bool(live), projection, anchors)


def picture(size: int = 32) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (size, size, 3)).astype(np.uint8)


def feature_view(seed: int, size: int) -> FeatureView:
    return FeatureView(np.random.default_rng(seed).normal(size=(size, size)), seed, 1.5)


def maps() -> dict[str, dict[str, FeatureView]]:
    return {who: {"a": feature_view(i, 8), "b": feature_view(i + 5, 4)} for i, who in enumerate(("teacher", "alone", "method"))}


DRAWINGS = {
    "ablation": lambda: figures.ablation(study().query("dataset == 'isic2018'"), compared()),
    "agreement": lambda: figures.agreement(study(), ("alone", "method")),
    "feature_maps": lambda: figures.feature_maps(picture(), np.eye(32), maps(), {who: np.eye(32) for who in maps()}),
    "forest": lambda: figures.forest(compared()),
    "gradients": lambda: figures.gradients(history()),
    "learning_curves": lambda: figures.learning_curves(statistics.learning_curves(history(ARMS, dataset="busi"))),
    "node_assignment": lambda: figures.node_assignment(picture(), np.eye(32), np.eye(8), node_view().projection),
    "nodes": lambda: figures.nodes([picture()], [np.eye(32)], {"teacher": [node_view()], "method": [node_view()]}),
    "option_sweep": lambda: figures.option_sweep(options()),
    "per_case": lambda: figures.per_case_scores({"student": table_of_arms(0.05)}),
    "refinement": lambda: figures.refinement(picture(), *np.random.default_rng(0).normal(size=(3, 3, 8, 8)), 1),
    "tertiles": lambda: figures.tertiles(thirds()),
    "training_curves": lambda: figures.training_curves({"teacher": history(("alone",)), "student": history(("alone",))}, {"grad_seg": "L_seg"}),
    "weight_sweep": lambda: figures.weight_sweep(sweep()),
}


@pytest.mark.parametrize("name", DRAWINGS)
def test_a_figure_is_the_same_bytes_twice_at_a_pages_width_without_a_title(name, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for folder in ("a", "b"):
            fig = DRAWINGS[name]()
            figures.save(fig, name, tmp_path / folder, data=pd.DataFrame({"x": [1 / 3]}))
    for suffix in ("pdf", "svg", "png", "csv"):
        assert (tmp_path / "a" / f"{name}.{suffix}").read_bytes() == (tmp_path / "b" / f"{name}.{suffix}").read_bytes(), suffix
    assert any(fig.get_figwidth() * 25.4 == pytest.approx(width) for width in (85, 174))
    assert not any(axis.get_title() for axis in fig.axes) and fig.get_suptitle() == ""
    assert {text.get_fontsize() for text in fig.findobj(mpl.text.Text) if text.get_text() and not text.get_text().isdigit()} <= {7, 7.5}


def test_every_method_is_told_apart_by_marker_and_by_line_alone():
    looks = [figures.STYLES[arm] for arm in ARMS]
    for part in ("label", "colour", "marker", "line"):
        assert len({getattr(look, part) for look in looks}) == len(ARMS), part
    assert {"teacher", "student", "otsu"} <= set(figures.STYLES)


def drawn_intervals(axis, along: str) -> list[tuple[str, float, float, float, float]]:
    """Label, x, y, low, high of every interval of a chart; NaN where none is drawn."""
    found = []
    for container in axis.containers:
        (x,), (y,) = container.lines[0].get_data()
        ends = [s[:, "xy".index(along)] for bars in container.lines[2] for s in bars.get_segments()] or [[np.nan, np.nan]]
        found.append((container.get_label(), x, y, *sorted(ends[0])))
    return found


def seed_ticks(axis) -> dict[float, list[float]]:
    """{place: the values of the seeds} of a chart with arms from top to bottom."""
    return {round(line.get_ydata()[0] + 0.28, 6): list(line.get_xdata()) for line in axis.lines if line.get_marker() == "|" and line.get_label()[0] == "_"
            and len(set(line.get_ydata())) == 1 and line.get_markersize() == 4}


def check_differences(axis, rows: pd.DataFrame, places: dict[str, float]) -> None:
    expected = [(row.other, row.difference, places[row.other], row.low, row.high) for row in rows.itertuples()]
    drawn = drawn_intervals(axis, "x")
    assert [row[0] for row in drawn] == [row[0] for row in expected]
    np.testing.assert_allclose([row[1:] for row in drawn], [row[1:] for row in expected])
    for row in rows.to_dict("records"):
        seeds = [value for name, value in row.items() if name.startswith("difference_seed")]
        assert seed_ticks(axis)[places[row["other"]]] == pytest.approx(seeds)


def test_the_forest_plot_draws_every_difference_interval_and_seed_of_every_data_set():
    comparison = compared()
    axes = [axis for axis in figures.forest(comparison).axes if axis.get_visible()]
    names = {"busi, ResNet34-UNet": ("busi", "resnet34_unet"), "busi, U-Net 64": ("busi", "unet64"), "isic2018, ResNet34-UNet": ("isic2018", "resnet34_unet")}
    assert [axis.get_xlabel() for axis in axes] == list(names)
    labels = [text.get_text() for text in axes[0].get_yticklabels()]
    assert labels == ["student alone", "both, edges shuffled", "logit KD"]
    for axis, family in zip(axes, names.values()):
        check_differences(axis, comparison[comparison[["dataset", "teacher"]].eq(list(family)).all(axis=1)], {"alone": 2, "shuffled": 1, "kd": 0})


def test_the_forest_plot_of_every_arm_against_one_says_so():
    comparison = statistics.compare_with(study().query("dataset == 'isic2018'"), draws=200)
    fig = figures.forest(comparison)
    assert [text.get_text() for text in fig.axes[0].get_yticklabels()] == ["both, edges shuffled", "logit KD"]
    check_differences(fig.axes[0], comparison.assign(other=comparison["arm"]), {"shuffled": 1, "kd": 0})
    assert fig.get_label().startswith("Arm minus student alone, Dice (right: arm better)")
    assert figures.forest(statistics.compare_arms(study(), "kd", draws=200)).get_label().startswith("Logit KD minus other, Dice (right: logit KD better)")


def test_a_marker_is_filled_where_holms_p_and_the_interval_see_a_difference():
    rows = [("alone", 0.01, 0.05, 0.04), ("feat", 0.01, 0.05, 0.06), ("edge", -0.01, 0.05, 0.01), ("kd", -0.05, -0.01, 0.01)]
    shared = {"arm": "method", "metric": "dice"}
    table = pd.DataFrame([shared | {"other": o, "difference": (low + high) / 2, "low": low, "high": high, "p_holm": p} for o, low, high, p in rows])
    faces = {c.get_label(): c.lines[0].get_markerfacecolor() for c in figures.forest(table).axes[0].containers}
    assert {name: face != "white" for name, face in faces.items()} == {"alone": True, "feat": False, "edge": False, "kd": True}


def test_the_ablation_draws_means_seeds_and_differences_in_one_row_a_data_set():
    scores, comparison = study(), compared()
    axes = np.array(figures.ablation(scores, comparison).axes).reshape(3, 2)
    parts = scores.groupby(["dataset", "teacher"])
    for (left, right), (family, part) in zip(axes, parts):
        arms = list(dict.fromkeys(part["arm"]))
        places = {arm: len(arms) - 1 - i for i, arm in enumerate(arms)}
        means = part.groupby(["arm", "id"])["dice"].mean().groupby("arm").mean()
        assert {name: (x, y) for name, x, y, *_ in drawn_intervals(left, "x")} == {arm: (pytest.approx(means[arm]), places[arm]) for arm in arms}
        ends = {name: ends for name, _, _, *ends in drawn_intervals(left, "x")}
        for arm in arms:
            _, low, high = statistics.arms.case_mean(statistics.arms.by_seed(part, arm))
            assert ends[arm] == pytest.approx([low, high]), "as in the table"
        assert seed_ticks(left)[places["kd"]] == pytest.approx(part[part["arm"] == "kd"].groupby("seed")["dice"].mean().tolist())
        check_differences(right, comparison[comparison[["dataset", "teacher"]].eq(list(family)).all(axis=1)], places)


def lines(axis) -> dict[str, tuple[list, list]]:
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axis.lines if not line.get_label().startswith("_")}


def test_learning_curves_are_the_tables_means_with_the_range_of_the_seeds():
    curves = statistics.learning_curves(pd.concat([history(dataset="busi"), history(dataset="isic2018")]))
    left, right = figures.learning_curves(curves).axes
    assert (left.get_xlabel(), right.get_xlabel()) == ("Epoch\nbusi", "Epoch\nisic2018")
    part = curves[(curves["dataset"] == "busi")]
    for arm, band in zip(("alone", "method"), left.collections):
        of_arm = part[part["arm"] == arm]
        assert lines(left)[arm] == (of_arm["epoch"].tolist(), of_arm["mean"].tolist())
        ends = {tuple(p) for p in band.get_paths()[0].vertices.round(9)}
        assert {(e, v) for e, v in zip(of_arm["epoch"], of_arm[["low", "high"]].round(9).T.to_numpy()[0])} <= ends
        assert {(e, v) for e, v in zip(of_arm["epoch"], of_arm[["low", "high"]].round(9).T.to_numpy()[1])} <= ends


def test_many_arms_are_parted_into_the_methods_own_and_its_rivals():
    own, rivals = figures.learning_curves(statistics.learning_curves(history(ARMS))).axes
    assert set(lines(own)) == {"alone", "feat", "edge", "method", "shuffled", "method_kd"}
    assert set(lines(rivals)) == {"alone", "method", "kd", "fitnets", "at", "cwd", "dist"}


def test_gradients_are_means_over_seeds_term_by_term():
    table = history(("method", "edge", "feat", "shuffled", "alone"))
    table.loc[table["arm"] == "edge", ["grad_feat", "cos_feat"]] = np.nan
    shown = {axis.get_xlabel(): axis for axis in figures.gradients(table).axes if axis.get_visible()}
    assert set(shown) == {"", *(f"Epoch\n{label}" for label in (
        "both (method)", r"+ $L_\mathrm{edge}$", r"+ $L_\mathrm{feat}$", "both, edges shuffled", "student alone"
    ))}
    norms, cosines = figures.gradients(table[table["arm"] == "method"]).axes
    by_epoch = table[table["arm"] == "method"].groupby("epoch")
    assert set(lines(norms)) == {"seg", "feat", "edge"} and {name for name in lines(cosines)} == {"feat", "edge"}
    fig = figures.gradients(table[table["arm"] == "method"].assign(cos_feat_edge=0.3))
    assert set(lines(fig.axes[0])) == {"seg", "feat", "edge"} and lines(fig.axes[1])["feat_edge"][1] == [0.3] * 6
    assert any("with" in text.get_text() for text in fig.legends[0].get_texts()) and fig.axes[1].get_ylabel() == "Cosine"
    assert "L_feat_edge" not in fig.get_label()
    assert lines(norms)["edge"][1] == pytest.approx(by_epoch["grad_edge"].mean().tolist())
    assert lines(cosines)["feat"] == ([*range(1, 7)], pytest.approx(by_epoch["cos_feat"].mean().tolist()))
    assert norms.get_yscale() == "log" and set(lines(shown[r"Epoch" + "\n" + r"+ $L_\mathrm{edge}$"])) == {"edge"}


def test_the_sweep_draws_means_against_weights_and_rings_the_best():
    feat, kd = figures.weight_sweep(sweep(), {"feat": 3.0}).axes
    assert feat.get_xscale() == "log" and "feat" in feat.get_xlabel() and kd.get_xlabel() == "weight of\nlogit KD"
    assert lines(feat)["feat"] == ([1, 10], pytest.approx([0.63, 0.67])) and lines(kd)["kd"] == ([0.1], pytest.approx([0.62]))
    assert lines(feat)["default"][0] == [3, 3] and "default" not in lines(kd)
    rings = [[(line.get_xdata()[0], line.get_ydata()[0]) for line in axis.lines if line.get_markersize() == 9] for axis in (feat, kd)]
    assert rings == [[(10, pytest.approx(0.67))], [(0.1, pytest.approx(0.62))]]
    for axis in (feat, kd):
        assert lines(axis)["alone"][1] == pytest.approx([0.605, 0.605])
        [band] = axis.patches
        assert [band.get_y(), band.get_y() + band.get_height()] == pytest.approx([0.60, 0.61])


def test_an_option_has_a_row_a_value_and_a_filled_mark_where_it_is_the_configuration_s_own():
    [axis] = figures.option_sweep(options()).axes
    assert [label.get_text() for label in axis.get_yticklabels()] == ["margin: bn", "margin: empirical", "feature_levels: decoder 4, 2"]
    marks = [(line.get_xdata()[0], line.get_ydata()[0], line.get_markerfacecolor() != "white") for line in axis.lines if line.get_marker() == "D"]
    assert marks == [(pytest.approx(0.61), 0, True), (pytest.approx(0.65), 1, False), (pytest.approx(0.59), 2, False)]
    assert [line.get_xdata()[0] for line in axis.lines[:2]] == pytest.approx([0.51, 0.61]), "alone and method"
    low, high = axis.get_ylim()
    assert low > high, "the first row above"


def test_tertiles_stand_in_order_with_their_ranges_beneath():
    table = thirds()
    axes = np.array(figures.tertiles(table).axes).reshape(3, 2)
    for line, (_, part) in zip(axes, table.groupby(["dataset", "teacher"])):
        for axis, measure in zip(line, ("lesion_pixels", "contrast")):
            rows = part[part["column"] == measure]
            drawn = drawn_intervals(axis, "y")
            assert [row[1] for row in drawn] == [0, 1, 2] and {row[0] for row in drawn} == {"method - alone"}
            np.testing.assert_allclose([row[2:] for row in drawn], rows[["difference", "low", "high"]])
            labels = [label.get_text().split("\n") for label in axis.get_xticklabels()]
            assert [label[0] for label in labels] == ["lowest", "middle", "highest"]
            assert [label[2] for label in labels] == [f"{cases} cases" for cases in rows["cases"]]


def test_agreement_draws_every_case_and_seed_and_marks_who_missed_it():
    rows = [("teacher", 0, "a", 0.8, 0), ("teacher", 0, "b", 0.0, 1), ("teacher", 0, "c", 0.0, 1), ("method", 0, "a", 0.7, 0), ("method", 0, "b", 0.3, 0),
            ("method", 0, "c", 0.0, 1), ("method", 1, "a", 0.0, 1), ("method", 1, "b", 0.4, 0), ("method", 1, "c", 0.2, 0)]
    table = pd.DataFrame(rows, columns=["arm", "seed", "id", "dice", "missed"]).assign(group=lambda t: t["id"])
    [axis] = figures.agreement(table).axes
    points = {name: sorted(zip(*line)) for name, line in lines(axis).items()}
    assert points == {
        "missed by neither": [(0.8, 0.7)], "missed by the student": [(0.8, 0.0)],
        "missed by the teacher": [(0.0, 0.2), (0.0, 0.3), (0.0, 0.4)], "missed by both": [(0.0, 0.0)],
    }
    rank = statistics.agreement(table)["spearman"].iloc[0]
    assert f"rank correlation {rank:.2f}" in axis.get_xlabel() and axis.get_ylabel() == "Dice, both (method)"


def test_feature_maps_of_a_level_share_a_scale_and_those_of_two_levels_do_not():
    views = maps()
    fig = figures.feature_maps(picture(), np.eye(32), views, {who: np.eye(32) for who in views})
    grid = np.array([axis for axis in fig.axes if axis.get_label() != "<colorbar>"]).reshape(3, 3)
    for line, who in zip(grid, views):
        for axis, level in zip(line[1:], "ab"):
            assert np.array_equal(axis.images[0].get_array(), views[who][level].values)
            most = max(np.abs(of[level].values).max() for of in views.values())
            assert axis.images[0].get_clim() == (-most, most)
            assert f"channel {views[who][level].channel}, d = 1.50" in [text.get_text() for text in axis.texts]


def test_nodes_are_drawn_in_the_colour_of_the_likeliest_and_the_paler_the_less_likely():
    view = node_view()
    fig = figures.nodes([picture()], [np.eye(32)], {"teacher": [view]})
    _, edge, assignment, entropy = fig.axes[:4]
    assert np.array_equal(edge.images[0].get_array(), view.edge) and np.array_equal(entropy.images[0].get_array(), view.entropy)
    placed = {text.get_text(): text.get_position() for text in edge.texts if text.get_text().isdigit()}
    assert placed == {str(node): tuple(view.anchors[node][::-1]) for node in (0, 3)}
    assert edge.texts[-1].get_text() == "2 of 4 live"
    drawn = np.asarray(assignment.images[1].get_array())
    assert drawn[..., 3] == pytest.approx(0.8 * view.projection.max(0))
    for node in (0, 3):
        here = view.projection.argmax(0) == node
        assert here.any() and (drawn[here][:, :3] == to_rgb(NODE_COLOURS[node])).all()
    assert sorted(zip(*assignment.lines[0].get_data())) == [(i, i) for i in range(8)]


def degenerate():
    empty = study().iloc[:0]
    yield "nothing compared", lambda: figures.forest(compare_arms(empty))
    yield "no case", lambda: figures.ablation(empty, compare_arms(empty))
    yield "no case, no data set named", lambda: figures.ablation(table_of_arms(0).iloc[:0], pd.DataFrame())
    yield "no third", lambda: figures.tertiles(statistics.by_tertile(empty))
    yield "no teacher", lambda: figures.agreement(table_of_arms(0).assign(missed=0))
    yield "no epoch", lambda: figures.gradients(history().iloc[:0])
    yield "no curve", lambda: figures.learning_curves(statistics.learning_curves(history()).iloc[:0])
    yield "no weight", lambda: figures.weight_sweep(sweep().iloc[:0])
    yield "no option", lambda: figures.option_sweep(options().query("option == 'arm'"))
    yield "no case in the graph", lambda: figures.nodes([], [], {"teacher": []})
    yield "one arm", lambda: figures.ablation(table_of_arms(0).query("arm == 'method'"), pd.DataFrame(columns=["arm"]))
    one = study().query("seed == 0 and group == 'g0'")
    yield "one group, no interval", lambda: figures.forest(compare_arms(one))
    yield "one case", lambda: figures.ablation(one, compare_arms(one))
    yield "undefined scores", lambda: figures.per_case_scores({"method": table_of_arms(0).assign(precision=np.nan)}, "precision")
    yield "an arm without a style", lambda: figures.learning_curves(statistics.learning_curves(history(("mine",), seeds=1, epochs=1)))
    yield "no gradient at all", lambda: figures.gradients(history(("method",)).assign(grad_seg=0.0, grad_feat=0.0, grad_edge=0.0))
    yield "a gradient of 0", lambda: figures.gradients(history(("method",)).assign(grad_edge=lambda t: t["grad_edge"].where(t["epoch"] > 2, 0.0)))
    yield "one epoch", lambda: figures.gradients(history(("method",), seeds=1, epochs=1).drop(columns=["arm", "seed"]))
    yield "a weight that failed", lambda: figures.weight_sweep(sweep().assign(val_dice=lambda t: t["val_dice"].where(t["arm"] != "kd")))
    yield "no student alone", lambda: figures.weight_sweep(sweep().query("arm == 'kd'"))
    yield "all missed", lambda: figures.agreement(study().assign(dice=0.0, missed=1).query("dataset == 'isic2018'"))
    yield "one live node", lambda: figures.nodes([picture()], [np.eye(32)], {"teacher": [node_view((2,))]})
    yield "no live node", lambda: figures.nodes([picture()], [np.zeros((32, 32))], {"teacher": [node_view(())]})
    flat = {"teacher": {"a": FeatureView(np.zeros((4, 4)), 0, 0.0)}}
    yield "a flat map", lambda: figures.feature_maps(picture(), np.zeros((32, 32)), flat, {"teacher": np.zeros((32, 32))})


@pytest.mark.parametrize(("name", "draw"), list(degenerate()), ids=lambda v: v if isinstance(v, str) else "")
def test_nothing_breaks_on_degenerate_tables(name, draw):
    with warnings.catch_warnings(), figures.style():
        warnings.simplefilter("error")
        draw().savefig(io.BytesIO(), dpi=40)


@pytest.mark.fault
@pytest.mark.parametrize(("draw", "column"), [
    (lambda: figures.gradients(history().drop(columns="grad_seg")), "grad_seg"),
    (lambda: figures.weight_sweep(sweep().rename(columns={"weight": "w"})), "weight"),
    (lambda: figures.option_sweep(options().drop(columns="seed")), "seed"),
    (lambda: figures.agreement(study().drop(columns="missed")), "missed"),
    (lambda: figures.learning_curves(history()), "mean, low, high"),
])
def test_a_table_of_another_kind_is_refused_by_its_missing_column(draw, column):
    with pytest.raises(LesionKDError, match=f"no column {column}"):
        draw()


@pytest.mark.fault
def test_scores_of_two_runs_in_one_table_are_refused():
    twice = pd.concat([table_of_arms(0), table_of_arms(0)])
    with pytest.raises(LesionKDError, match="scored twice"):
        figures.ablation(twice, pd.DataFrame())


def test_the_sentence_follows_the_numbers():
    better, none = (tables.in_words(compare_arms(table_of_arms(shift))) for shift in (0.05, 0.0))
    assert better.count("better") == 2 and "no difference" not in better
    assert none.count("no difference seen") == 2 and "better" not in none
    assert "worse" in tables.in_words(compare_arms(table_of_arms(-0.05)))


def test_the_sentence_calls_nothing_a_difference_that_holm_does_not():
    row = {"other": "alone", "difference": 0.01, "low": 0.001, "high": 0.02, "p_holm": 0.2, "groups": 9, "seeds": 1}
    assert ": in doubt (" in tables.in_words(pd.DataFrame([row]))


def test_macros_are_letters_only(tmp_path):
    text = tables.variables({"alone dice": 0.12345, "seed 10 cases": 1200, "data set": "BUSI"}, tmp_path).read_text()
    assert text.splitlines() == [r"\newcommand{\lkdAloneDice}{0.123}", r"\newcommand{\lkdSeedBACases}{1,200}", r"\newcommand{\lkdDataSet}{BUSI}"]


def test_missed_lesions_stand_beside_every_mean():
    from lesionkd_core.evaluation import score_masks, summarize

    lesion = np.zeros((2, 16, 16), bool)
    lesion[:, 3:7, 3:7] = True
    marked = lesion.copy()
    marked[0] = False
    table = tables.scores({"student": summarize(score_masks(marked, lesion).assign(group=["a", "b"]))})
    assert table.loc[0, "missed"] == "1 of 2" and table.loc[0, "Dice"].startswith("0.500")


def test_cases_that_all_score_the_same_are_drawn():
    """Rounding puts the mean of equal numbers beside its own interval."""
    table = pd.DataFrame({"dice": [0.1 + 0.2] * 12, "group": list("abcdefghijkl")})
    assert figures.per_case_scores({"student": table}).axes


@pytest.mark.fault
def test_text_of_a_table_cannot_become_markup():
    """Case names are names of files, which anybody may have chosen."""
    shown = tables.markdown(pd.DataFrame({"id": ["<img src=x onerror=alert(1)>", "a|b"], "dice": [0.5, 1.0]})).data
    assert "<img" not in shown and "&lt;img src=x onerror=alert(1)&gt;" in shown
    assert r"a\|b" in shown and "0.500" in shown
