"""What the inspection shows, by hand computation, brute force and SciPy, on constructed runs."""

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import entropy
from torch import nn

from lesionkd_core import losses, results
from lesionkd_core.analysis import inspect
from lesionkd_core.analysis.inspect import GraphCases
from lesionkd_core.config import DistillConfig, LesionKDError, TeacherConfig
from lesionkd_core.edges import edge_at_stride, edge_label_batch
from lesionkd_core.losses import EdgeGraph, FittedGraph, Measured, build_terms
from lesionkd_core.models import UNet
from lesionkd_core.predict import TrainedNetwork, build
from lesionkd_core.train import Objective

LEVEL = "encoder.stride4"


def config(**options) -> DistillConfig:
    return DistillConfig(pixels=64, **options)


CFG = config()


def shaken(network: nn.Module) -> nn.Module:
    """A network with arbitrary statistics and affine parameters in its BatchNorm."""
    torch.manual_seed(1)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.3)
    return network.eval()


@pytest.fixture(scope="module")
def teacher() -> TrainedNetwork:
    torch.manual_seed(0)
    return TrainedNetwork(shaken(UNet(width=16)), TeacherConfig(pixels=64), None)


def some_cases(count: int = 20) -> tuple[np.ndarray, np.ndarray]:
    """Images with an ellipse, and its mask."""
    rng, (y, x) = np.random.default_rng(0), np.mgrid[:64, :64]
    images = rng.integers(0, 120, (count, 64, 64, 3)).astype(np.uint8)
    masks = np.zeros((count, 64, 64), np.uint8)
    for image, mask in zip(images, masks):
        (top, left), (high, wide) = rng.uniform(14, 50, 2), rng.uniform(6, 14, 2)
        mask[:] = ((y - top) / high) ** 2 + ((x - left) / wide) ** 2 < 1
        image[mask > 0] += 100
    return images, masks


def fresh_graph(channels: int = 64, **options) -> FittedGraph:
    """An untrained graph on the teacher's map."""
    torch.manual_seed(3)
    graph = EdgeGraph(channels, 16, **options).eval().requires_grad_(False)
    return FittedGraph(graph, torch.ones(16))


def edges_of(masks: np.ndarray, stride: int = 4) -> torch.Tensor:
    return edge_at_stride(edge_label_batch(torch.tensor(masks).float().unsqueeze(1)), stride)


def finished_run(folder, cfg: DistillConfig, teacher: TrainedNetwork) -> results.Result:
    """A student run whose weights are arbitrary, with the files of a finished one."""
    network = shaken(build(cfg))
    margins = {
        n: torch.rand(b.num_features) - 1 for n, b in teacher.network.feature_norms().items()
    }
    measured = Measured(
        FittedGraph(EdgeGraph.build(64, cfg), torch.linspace(0.1, 0.4, 16)), margins
    )
    terms = shaken(build_terms(cfg, network, teacher.network, measured))
    path = folder / "distill" / f"run-{'-'.join(cfg.losses)}"
    results.write_json(path / "config.json", {"stage": "distill"} | cfg.model_dump(mode="json"))
    state = {"objective": Objective(network, terms).state_dict()}
    results.write_checkpoint(path / "checkpoint_last", state)
    results.write_checkpoint(path / "checkpoint_best", {"network": build(cfg).state_dict()})
    results.write_json(path / "DONE", results.checksums(path))
    return results.Result(path)


# Source code --------------------------------------------------------------------------------------


def shown(monkeypatch, *functions, **options) -> str:
    sent = []
    monkeypatch.setattr("IPython.display.display", sent.append)
    inspect.show(*functions, **options)
    [markdown] = sent
    return markdown.data


def test_the_source_of_a_function_is_shown_without_its_docstring(monkeypatch):
    text = shown(monkeypatch, losses.partial_l2)
    assert text.startswith("```python\ndef partial_l2(") and text.endswith("\n```")
    assert '"""' not in text and "margin_relu(teacher.detach(), margin)" in text
    assert len(text.splitlines()) <= 7
    assert "Source: Heo et al." in shown(monkeypatch, losses.partial_l2, docstring=True)


def test_classes_and_several_functions_are_shown_in_one_block(monkeypatch):
    text = shown(monkeypatch, losses.FeatureRefinement, EdgeGraph.build_graph)
    assert text.count("```") == 2 and '"""' not in text and "\ndef build_graph(self" in text
    compile(text.removeprefix("```python\n").removesuffix("\n```"), "shown", "exec")


# Cases and edge labels ----------------------------------------------------------------------------


class Cases:
    """Prepared cases as far as the functions read them."""

    thumbnails = None

    def __init__(self, sizes) -> None:
        self.cases = pd.DataFrame({"lesion_share": sizes, "split": "test"})

    def index(self, split: str) -> np.ndarray:
        return np.flatnonzero(self.cases["split"] == split)


def test_cases_are_spread_from_the_smallest_to_the_largest_lesion():
    prepared = Cases([0.5, 0.1, 0.3, 0.2, 0.4])
    assert inspect.spread_of_cases(prepared, "test", 3) == [1, 2, 0]
    assert inspect.spread_of_cases(prepared, "test", 9) == [1, 3, 2, 4, 0]
    assert inspect.spread_of_cases(prepared, "train", 3) == []


def test_example_pairs_are_around_the_threshold(monkeypatch):
    table = pd.DataFrame({"content": [0.9, 0.1, 0.5, 0.6, 0.3, 0.2], "correlation": 0.95})
    table["same"] = table["content"] >= 0.48
    monkeypatch.setattr(inspect, "compare_pairs", lambda thumbnails: table)
    shown = inspect.example_pairs(Cases([0.1] * 5), 2)
    assert shown["content"].tolist() == [0.6, 0.5, 0.3, 0.2]


def test_the_edge_survives_max_pooling():
    masks = some_cases(8)[1]
    table = inspect.edge_survival(masks, 1).set_index(["stride", "method"])
    full = edge_label_batch(torch.tensor(masks).float().unsqueeze(1))[:, 0].numpy().astype(bool)
    for stride in (2, 16):
        cells = full.reshape(8, 64 // stride, stride, 64 // stride, stride)
        by_hand = {"max": cells.any((2, 4)), "mean": cells.mean((2, 4)) > 0.5}
        by_hand["nearest"] = full[:, stride // 2 :: stride, stride // 2 :: stride]
        for method, marked in by_hand.items():
            back = marked.repeat(stride, 1).repeat(stride, 2)
            row = table.loc[(stride, method)]
            assert row["kept"] == pytest.approx((full & back).sum() / full.sum())
            assert row["marked"] == pytest.approx(marked.mean() / full.mean())
            assert row["edge lost"] == (~marked.any((1, 2))).sum()
    assert (table.xs("max", level="method")["kept"] == 1).all()
    pyramid = inspect.edge_pyramid(masks, 1, (1, 8))
    assert np.array_equal(pyramid["stride 1"], full) and pyramid["stride 8"].shape == (8, 8, 8)


def test_live_nodes_are_the_cells_with_an_edge_pixel():
    masks = some_cases(8)[1]
    masks[2] = 0
    edge = edges_of(masks)[:, 0].numpy().reshape(8, 4, 4, 4, 4)
    by_hand = edge.any((2, 4)).sum((1, 2))
    assert inspect.live_nodes(CFG, masks).tolist() == by_hand.tolist() and by_hand[2] == 0


# Feature maps -------------------------------------------------------------------------------------


class Given(nn.Module):
    """A network whose maps are given."""

    def __init__(self, **maps: torch.Tensor) -> None:
        super().__init__()
        self.maps = maps

    def forward_features(self, x: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return torch.zeros(1, 1, 8, 8), self.maps


def test_the_channel_that_separates_the_lesion_best_is_shown_in_standard_deviations():
    mask = np.zeros((8, 8), np.uint8)
    mask[:3, :5] = 1  # some pixels of the map are partly lesion
    share = mask.reshape(4, 2, 4, 2).mean((1, 3))
    x = np.random.default_rng(0).normal(size=(5, 4, 4))
    x[2] += 4 * share
    x[3] -= 9 * share  # separates most, but is low in the lesion
    x[4] = 1000 / 3  # constant: rounding must not separate anything
    networks = {
        who: TrainedNetwork(Given(**{name: torch.tensor(x[None])}), CFG, None)
        for who, name in (("teacher", "far"), ("alone", "near"))
    }
    image = np.zeros((8, 8, 3), np.uint8)
    found = inspect.feature_views(networks, image, mask, ["near:far"])
    z = (x[2] - x[2].mean()) / x[2].std()
    d = (z * share).sum() / share.sum() - (z * (1 - share)).sum() / (1 - share).sum()
    for who in networks:
        view = found[who]["near:far"]
        assert view.channel == 2 and view.separation == pytest.approx(d, rel=1e-5)
        assert view.values == pytest.approx(z, rel=1e-4)


@pytest.mark.fault
@pytest.mark.parametrize("mask", [np.zeros((8, 8)), np.ones((8, 8))])
def test_a_mask_of_one_value_is_refused(mask):
    with pytest.raises(LesionKDError, match="choose another case"):
        inspect.feature_views({}, np.zeros((8, 8, 3), np.uint8), mask, [])


# A finished run -----------------------------------------------------------------------------------


def test_the_refinement_is_that_of_the_runs_connector_and_margins(tmp_path, teacher):
    cfg = config(losses="feat", margin="empirical", levels="decoder.stride4, decoder.stride2")
    run, image = finished_run(tmp_path, cfg, teacher), some_cases(1)[0][0]
    state = results.read_checkpoint(run.path / "checkpoint_last")["objective"]
    view = inspect.refinement_view(run, teacher, image)
    assert view.teacher.shape == view.student.shape == (16, 32, 32), "the shallowest level"
    margin = state["terms.feat.margin0"].numpy()[:, None, None]
    assert view.target == pytest.approx(np.maximum(view.teacher, margin))
    assert view.channel == np.maximum(view.teacher, 0).mean((1, 2)).argmax()
    student = build(cfg)
    student.load_state_dict({n[8:]: v for n, v in state.items() if n.startswith("network.")})
    last = TrainedNetwork(student.eval(), cfg, run.path)
    x = inspect.feature_maps(last, image[None])[1]["decoder.stride2"]
    part = {n.removeprefix("terms.feat.connectors.0."): v for n, v in state.items()}
    x = F.conv2d(x, part["0.weight"])
    x = F.batch_norm(
        x, *(part[f"1.{n}"] for n in ("running_mean", "running_var", "weight", "bias"))
    )
    assert view.student == pytest.approx(x[0].detach().numpy(), abs=1e-5)


def cell(edge: torch.Tensor, node: int) -> torch.Tensor:
    """The edge pixels (16, 16) of one of the 4 x 4 cells; of node 16 the other pixels."""
    if node == 16:
        return 1 - edge
    row, column = divmod(int(node), 4)
    inside = torch.zeros_like(edge)
    inside[4 * row : 4 * row + 4, 4 * column : 4 * column + 4] = 1
    return edge * inside


@pytest.mark.parametrize("term", ["edge", "edge_shuffled"])
def test_the_nodes_of_a_student_are_those_of_its_connector_and_graph(tmp_path, teacher, term):
    cfg = config(losses=f"feat, {term}", anchors="masked_mean")
    run, (images, masks) = finished_run(tmp_path, cfg, teacher), some_cases(5)
    state = results.read_checkpoint(run.path / "checkpoint_last")["objective"]
    student = build(cfg)
    student.load_state_dict({n[8:]: v for n, v in state.items() if n.startswith("network.")})
    last = TrainedNetwork(student.eval(), cfg, run.path)
    part = {n.removeprefix(f"terms.{term}."): v for n, v in state.items()}
    x = F.conv2d(inspect.feature_maps(last, images)[1][LEVEL], part["connector.0.weight"])
    names = ("running_mean", "running_var", "weight", "bias")
    x = F.batch_norm(x, *(part[f"connector.1.{name}"] for name in names))
    keys = F.conv2d(x, part["graph.theta.weight"], part["graph.theta.bias"]).flatten(2)
    fitted, seen = inspect.graph_of(run, teacher)
    assert torch.equal(fitted.graph.phi.weight, part["graph.phi.weight"])
    assert torch.equal(fitted.std, part["std"])
    views = GraphCases(cfg, seen, fitted, images, masks).views()
    for key, edge, view in zip(keys, edges_of(masks)[:, 0], views):
        cells = torch.stack([cell(edge, node).flatten() for node in np.flatnonzero(view.live)])
        anchors = cells @ key.T / cells.sum(1, keepdim=True)
        by_hand = (anchors @ key).softmax(0).unflatten(1, edge.shape).detach().numpy()
        assert view.projection[view.live] == pytest.approx(by_hand, abs=1e-4)


def test_a_student_map_of_another_name_has_the_teachers_name_in_the_graph(tmp_path, teacher):
    cfg = config(losses="edge", edge_level=f"decoder.stride4:{LEVEL}")
    fitted, seen = inspect.graph_of(finished_run(tmp_path, cfg, teacher), teacher)
    maps = seen.network.forward_features(torch.zeros(1, 3, 64, 64))[1]
    assert list(maps) == [LEVEL] and maps[LEVEL].shape == (1, 64, 16, 16)
    assert len(GraphCases(cfg, seen, fitted, *some_cases(2)).views()) == 2


@pytest.mark.fault
@pytest.mark.parametrize("terms", ["feat", "kd"])
def test_a_run_without_a_graph_is_refused(tmp_path, teacher, terms):
    run = finished_run(tmp_path, config(losses=terms), teacher)
    with pytest.raises(LesionKDError, match=f"no edge graph.*{terms}"):
        inspect.graph_of(run, teacher)


@pytest.mark.fault
def test_a_run_without_l_feat_has_no_refinement(tmp_path, teacher):
    run = finished_run(tmp_path, config(losses="edge"), teacher)
    with pytest.raises(LesionKDError, match="without the loss term 'feat'"):
        inspect.refinement_view(run, teacher, some_cases(1)[0][0])


# Nodes of the graph -------------------------------------------------------------------------------


def test_an_anchor_is_the_centroid_of_its_cells_edge_pixels(teacher):
    images, masks = some_cases()
    views = GraphCases(CFG, teacher, fresh_graph(), images, masks).views()
    for view, edge in zip(views, edges_of(masks)[:, 0]):
        assert np.array_equal(view.edge, edge.numpy())
        for node in range(16):
            pixels = np.argwhere(cell(edge, node).numpy())
            assert view.live[node] == bool(len(pixels))
            if len(pixels):
                assert view.anchors[node] == pytest.approx(pixels.mean(0), abs=1e-4)
            else:
                assert np.isnan(view.anchors[node]).all()


def test_anchors_of_the_original_are_in_its_overlapping_cells(teacher):
    images, masks = some_cases(6)
    for view in GraphCases(CFG, teacher, fresh_graph(anchors="eagr"), images, masks).views():
        for node in range(16):
            # 16 pixels in k + 2 = 6 cells, from floor(16 i / 6) to ceil(16 (i + 1) / 6); the outer
            # ones are cropped
            places = (node // 4 + 1, node % 4 + 1)
            spans = [slice(16 * i // 6, -(-16 * (i + 1) // 6)) for i in places]
            pixels = np.argwhere(view.edge[tuple(spans)]) + [span.start for span in spans]
            if len(pixels):
                assert view.anchors[node] == pytest.approx(pixels.mean(0), abs=1e-4)
            else:
                assert np.isnan(view.anchors[node]).all()


def test_the_entropy_is_scipys_over_the_live_nodes():
    rng, projection = np.random.default_rng(0), np.zeros((4, 3, 3))
    projection[[0, 2, 3]] = rng.dirichlet([1, 1, 1], (3, 3)).transpose(2, 0, 1)
    view = inspect.NodeView(np.eye(3), projection, np.zeros((4, 2)))
    by_scipy = entropy(projection[[0, 2, 3]], axis=0) / np.log(3)
    assert view.entropy == pytest.approx(by_scipy)
    projection[[0, 2, 3]] = 1 / 3
    assert view.entropy == pytest.approx(np.ones((3, 3)))
    projection[:] = [[[1]], [[0]], [[0]], [[0]]]
    assert np.isnan(view.entropy).all() and view.largest == 1


def test_the_largest_node_is_that_of_most_pixels():
    projection = np.zeros((3, 1, 10))
    projection[0, 0, :3], projection[2, 0, 3:7], projection[1, 0, 7:] = 0.6, 0.5, 0.9
    projection[1, 0, :7] = [0.4, 0.4, 0.4, 0.2, 0.2, 0.2, 0.2]
    projection[0, 0, 3:7] = 0.3
    assert inspect.NodeView(np.zeros((1, 10)), projection, np.zeros((3, 2))).largest == 0.4


def test_the_table_of_entropies_has_every_case_with_or_without_a_lesion(teacher):
    images, masks = some_cases(18)
    masks[1] = 0
    cases = GraphCases(CFG, teacher, fresh_graph(), images, masks)
    table = cases.entropy()
    assert table["case"].tolist() == list(range(18)) and table.loc[1, "live_nodes"] == 0
    assert table.loc[1, ["entropy", "entropy_of_edge", "largest_node"]].isna().all()
    for case, view in enumerate(cases.views()):
        if view.live.sum() > 1:
            own = view.entropy[np.nonzero(view.edge)].mean()
            assert table.loc[case, "entropy"] == pytest.approx(view.entropy.mean())
            assert table.loc[case, "entropy_of_edge"] == pytest.approx(own)


# Collapse -----------------------------------------------------------------------------------------


def by_loops(reasoned: np.ndarray, live: np.ndarray) -> tuple[np.ndarray, float]:
    """Standard deviation between cases at one node, and participation ratio, of H (N, K, s)."""
    squares, free = np.zeros(reasoned.shape[2]), 0
    for node in range(live.shape[1]):
        here = reasoned[live[:, node], node]
        if len(here):
            squares += ((here - here.mean(0)) ** 2).sum(0)
            free += len(here) - 1
    eigen = np.linalg.eigvalsh(np.cov(reasoned[live].T, bias=True))
    return (squares / free) ** 0.5, eigen.sum() ** 2 / (eigen**2).sum()


def test_the_collapse_check_by_loops(teacher):
    images, masks = some_cases()
    masks[4] = 0
    fitted, edge = fresh_graph(), edges_of(masks)
    x = inspect.feature_maps(teacher, images)[1][LEVEL]
    reasoned = fitted.graph(x, edge).transpose(1, 2).double().numpy()
    std, dimensions = by_loops(reasoned, fitted.graph.live_nodes(edge).numpy())
    ratio = np.linspace(0.04, 0.06, 16)  # around the limit of 5 %
    reference = FittedGraph(fitted.graph, torch.tensor(std / ratio))
    found = GraphCases(CFG, teacher, reference, images, masks).collapse()
    assert found["cases"] == 19 and found["dimensions"] == pytest.approx(dimensions, rel=1e-4)
    assert found["dead"] == (ratio < 0.05).mean() and found["verdict"] == "collapsed"


def test_a_case_without_a_lesion_is_left_out_even_if_all_cells_are_live(teacher):
    images, masks = some_cases(6)
    fitted = fresh_graph(anchors="eagr")
    without = GraphCases(CFG, teacher, fitted, images[1:], masks[1:]).collapse()
    masks[0] = 0
    found = GraphCases(CFG, teacher, fitted, images, masks).collapse()
    assert found["cases"] == 5
    assert found["dimensions"] == pytest.approx(without["dimensions"], rel=1e-5)


def states(teacher, fitted, images, masks) -> tuple[np.ndarray, np.ndarray]:
    """H (N, K, s) and the live nodes (N, K)."""
    cases = GraphCases(CFG, teacher, fitted, images, masks)
    h = fitted.graph(cases.x, cases.edge).transpose(1, 2)
    return h.double().numpy(), fitted.graph.live_nodes(cases.edge).numpy()


@pytest.mark.parametrize(
    ("dead", "verdict"),
    [(1, "partly collapsed"), (7, "partly collapsed"), (8, "collapsed"), (16, "collapsed")],
)
def test_states_that_carry_nothing_are_counted(teacher, dead, verdict):
    fitted, (images, masks) = fresh_graph(), some_cases()
    std = torch.tensor(by_loops(*states(teacher, fitted, images, masks))[0])
    with torch.no_grad():
        fitted.graph.state_mixing.weight[:dead] *= 1e-3
    reference = FittedGraph(fitted.graph, std)
    found = GraphCases(CFG, teacher, reference, images, masks).collapse()
    assert (found["dead"], found["verdict"]) == (dead / 16, verdict)


def test_states_that_differ_between_cases_are_alive(teacher):
    cases = GraphCases(CFG, teacher, fresh_graph(), *some_cases())
    cases.x = 3 * torch.randn(20, 64, 1, 1, generator=torch.manual_seed(0)) + cases.x
    found = cases.collapse()
    assert found["dead"] == 0 and found["dimensions"] > 2 and found["verdict"] == "alive"


def test_a_graph_trained_along_is_compared_with_its_own_beginning(teacher):
    fitted, (images, masks) = fresh_graph(), some_cases()
    with torch.no_grad():
        fitted.graph.state_mixing.weight[:5] *= 1e-3
    between, _ = by_loops(*states(teacher, fitted, images, masks))
    h, live = states(teacher, fresh_graph(), images, masks)
    cases = GraphCases(CFG, teacher, fitted, images, masks)
    found = cases.collapse(untrained=fresh_graph().graph)
    assert found["dead"] == (between < 0.05 * h[live].std(0)).mean() >= 5 / 16


def test_states_that_carry_one_signal_are_narrow(teacher):
    fitted, (images, masks) = fresh_graph(), some_cases()
    with torch.no_grad():
        fitted.graph.state_mixing.weight[:] = fitted.graph.state_mixing.weight[0].clone()
    small = FittedGraph(fitted.graph, fitted.std * 1e-3)
    found = GraphCases(CFG, teacher, small, images, masks).collapse()
    assert found["dimensions"] == pytest.approx(1) and found["verdict"] == "narrow"


def test_nodes_that_differ_from_each_other_but_not_between_cases_are_dead(teacher):
    fitted, (images, masks) = fresh_graph(), some_cases()
    with torch.no_grad():  # V is the same for every image and node; the bias distinguishes nodes
        fitted.graph.phi.weight.zero_()
        fitted.graph.node_mixing.weight.zero_()
    h, live = states(teacher, fitted, images, masks)
    assert (h[live].std(0) > 0.005).any()
    small = FittedGraph(fitted.graph, fitted.std * 0.1)
    found = GraphCases(CFG, teacher, small, images, masks).collapse()
    assert found["dead"] == 1 and found["verdict"] == "collapsed"


@pytest.mark.fault
def test_a_single_case_shows_no_collapse(teacher):
    with pytest.raises(LesionKDError, match="give more cases"):
        GraphCases(CFG, teacher, fresh_graph(), *some_cases(1)).collapse()


# Edge information ---------------------------------------------------------------------------------


class Ideal(nn.Module):
    """A network whose map shows the edge in the left half of the image, or noise.

    All anchors are means over edge pixels, so a pixel without an edge can be distinguished only if
    it resembles the edge pixels of some cells: here those of the right half.
    """

    def __init__(self, masks: np.ndarray, known: bool) -> None:
        super().__init__()
        self.edges, self.known, self.done = edges_of(masks), known, 0

    def forward_features(self, x: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        edge = self.edges[self.done : self.done + len(x)].clone()
        self.done += len(x)
        values = torch.randn(len(x), 4, 16, 16, generator=torch.manual_seed(self.done))
        if self.known:
            edge[..., 8:] = 0
            values = torch.cat([4 * edge, 4 * (1 - edge), 0.1 * values[:, 2:]], 1)
        return x[:, :1], {LEVEL: values}


def in_graph(masks: np.ndarray, known: bool) -> GraphCases:
    torch.manual_seed(0)
    graph = EdgeGraph(4, 4, grid=2)
    with torch.no_grad():  # keys and states are the map itself
        for layer in (graph.phi, graph.theta):
            layer.weight.copy_(torch.eye(4)[:, :, None, None])
            layer.bias.zero_()
        graph.state_mixing.weight.copy_(torch.eye(4))  # H = V
        graph.node_mixing.weight.copy_(2 * torch.eye(4))
        graph.node_mixing.bias.zero_()
    network = TrainedNetwork(Ideal(masks, known), CFG, None)
    images = np.zeros((len(masks), 64, 64, 3), np.uint8)
    fitted = FittedGraph(graph.requires_grad_(False), torch.full((4,), 0.5))
    return GraphCases(CFG, network, fitted, images, masks)


def squares(count: int) -> np.ndarray:
    """Masks with a rectangle in both halves of the image."""
    masks = np.zeros((count, 64, 64), np.uint8)
    for i, mask in enumerate(masks):
        mask[10 + i % 5 : 50 - i % 7, 10 + i % 3 : 56 - i % 11] = 1
    return masks


def test_a_graph_that_knows_the_edge_predicts_it_better_than_a_constant():
    masks = squares(24)
    rich, poor = (in_graph(masks, known).edge_information() for known in (True, False))
    assert rich["bce"] < 0.8 * rich["bce_constant"]
    assert rich["average_precision"] > 2 * rich["ap_constant"]
    assert poor["bce"] > 0.9 * poor["bce_constant"]
    edge = edges_of(masks)[1::2].numpy()
    assert rich["ap_constant"] == poor["ap_constant"] == pytest.approx(edge.mean())
    q = edges_of(masks)[::2].mean().item()  # the cases that the head is fitted on
    by_hand = -(edge.mean() * np.log(q) + (1 - edge.mean()) * np.log(1 - q))
    assert rich["bce_constant"] == pytest.approx(by_hand, rel=1e-5)


def test_the_head_can_be_fitted_on_other_cases():
    masks = squares(24)
    test, training = in_graph(masks[1::2], known=True), in_graph(masks[::2], known=True)
    found = test.edge_information(training)
    assert found["bce"] == pytest.approx(in_graph(masks, True).edge_information()["bce"], rel=0.05)
    assert found["ap_constant"] == pytest.approx(edges_of(masks[1::2]).mean().item())


def test_the_changes_with_another_cases_edge_by_hand(teacher):
    images, masks = some_cases(6)
    masks[2] = 0  # left out
    fitted = fresh_graph()
    cases = GraphCases(
        CFG, teacher, FittedGraph(fitted.graph, torch.full((16,), 0.2)), images, masks
    )
    found = cases.edge_information()
    rows = [0, 1, 3, 4, 5]
    x, edge, graph = cases.x[rows], cases.edge[rows], fitted.graph
    order = np.random.default_rng(0).permutation(5)
    others = torch.stack([edge[order[order.tolist().index(i) - 1]] for i in range(5)])
    assert all(not torch.equal(a, b) for a, b in zip(edge, others)), "no case keeps its own"
    before, after = graph(x, edge), graph(x, others)
    both = graph.live_nodes(edge) & graph.live_nodes(others)
    h, h_0 = (part.transpose(1, 2)[both].double() for part in (after, before))
    assert found["h_change"] == pytest.approx(((h - h_0).norm() / h_0.norm()).item(), rel=1e-4)
    rms = ((h - h_0) / 0.2).square().mean().sqrt().item()
    assert found["h_change_std"] == pytest.approx(rms, rel=1e-4)
    p, p_0 = graph.project(x, others)[1], graph.project(x, edge)[1]
    assert found["p_change"] == pytest.approx(((p - p_0).norm() / p_0.norm()).item(), rel=1e-4)


def test_average_precision_by_brute_force():
    rng = np.random.default_rng(0)
    scores, truth = rng.integers(0, 12, 200) / 4, rng.integers(0, 2, 200)
    total, recall = 0.0, 0.0
    for level in sorted(set(scores), reverse=True):
        chosen = truth[scores >= level]
        total += (chosen.sum() / truth.sum() - recall) * chosen.mean()
        recall = chosen.sum() / truth.sum()
    assert inspect.average_precision(scores, truth) == pytest.approx(total)
    assert inspect.average_precision(np.zeros(8), np.array([1, 0, 0, 0] * 2)) == 0.25
    assert inspect.average_precision(truth, truth) == 1


@pytest.mark.fault
def test_edge_information_needs_cases_with_an_edge(teacher):
    images, masks = some_cases(6)
    with pytest.raises(LesionKDError, match="needs 4 cases with an edge; got 0"):
        GraphCases(CFG, teacher, fresh_graph(), images, 0 * masks).edge_information()
