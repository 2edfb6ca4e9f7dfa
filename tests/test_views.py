"""What the diagnostics show, against hand computation, brute force and SciPy; the runs are tiny phantoms."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import entropy
from torch import nn

from lesionkd_core import store, views
from lesionkd_core.config import DistillConfig, LesionKDError
from lesionkd_core.edges import edge_at_stride, edge_label_batch
from lesionkd_core.inference import TrainedNetwork, build, load_network
from lesionkd_core.losses import EdgeGraph, FittedGraph, Measured, build_terms
from lesionkd_core.prepare import prepare_data
from lesionkd_core.stages import distill, fit_graph, train_teacher
from lesionkd_core.views.nodes import _untrained

TINY = {
    "dataset": "phantom-ct", "pixels": 64, "cases": 40, "batch_size": 6,
    "teacher_epochs": 1, "graph_epochs": 1, "epochs": 1, "threads": 1, "device": "cpu", "weak_teacher": "allow",
}
CFG = DistillConfig(**TINY)


def silent(*_):
    pass


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("views")


@pytest.fixture(autouse=True)
def _runs(place, monkeypatch):
    monkeypatch.setenv("LESIONKD_RUNS", str(place))


def some_cases(count: int = 20) -> tuple[np.ndarray, np.ndarray]:
    prepared = prepare_data(CFG, silent)
    return np.array(prepared.images[:count]), np.array(prepared.masks[:count])


def teacher() -> TrainedNetwork:
    return load_network(train_teacher(CFG, silent))


def fresh_graph(**options) -> FittedGraph:
    """An untrained graph on the teacher's stage 1."""
    torch.manual_seed(3)
    return FittedGraph(EdgeGraph(64, 16, **options).eval().requires_grad_(False), torch.ones(16))


def edges_of(masks: np.ndarray, stride: int = 4) -> torch.Tensor:
    return edge_at_stride(edge_label_batch(torch.tensor(masks).float().unsqueeze(1)), stride)


def test_an_anchor_sits_in_the_middle_of_its_cells_edge_pixels():
    images, masks = some_cases()
    for view, edge in zip(views.node_views(CFG, teacher(), fresh_graph(), images, masks), edges_of(masks)[:, 0].numpy()):
        assert np.array_equal(view.edge, edge)
        for node in range(16):
            row, column = divmod(node, 4)
            inside = np.zeros_like(edge)
            inside[4 * row : 4 * row + 4, 4 * column : 4 * column + 4] = 1  # 16 x 16 pixels of the map, 4 x 4 cells
            pixels = np.argwhere(edge * inside)
            assert view.live[node] == bool(len(pixels))
            if len(pixels):
                assert view.anchors[node] == pytest.approx(pixels.mean(0), abs=1e-4)
            else:
                assert np.isnan(view.anchors[node]).all()


def test_anchors_of_the_original_sit_in_its_overlapping_cells():
    images, masks = some_cases(6)
    for view in views.node_views(CFG, teacher(), fresh_graph(anchors="eagr"), images, masks):
        for node in range(16):  # 16 pixels in k + 2 = 6 cells, from floor(16 i / 6) to ceil(16 (i + 1) / 6), the outer ones cropped
            spans = [slice(16 * i // 6, -(-16 * (i + 1) // 6)) for i in (node // 4 + 1, node % 4 + 1)]
            pixels = np.argwhere(view.edge[tuple(spans)]) + [span.start for span in spans]
            assert np.isnan(view.anchors[node]).all() if not len(pixels) else view.anchors[node] == pytest.approx(pixels.mean(0), abs=1e-4)


def test_entropy_is_scipys_over_the_live_nodes():
    rng = np.random.default_rng(0)
    projection = np.zeros((4, 3, 3))
    projection[[0, 2, 3]] = rng.dirichlet([1, 1, 1], (3, 3)).transpose(2, 0, 1)
    view = views.NodeView(np.eye(3), projection, np.zeros((4, 2)))
    assert view.entropy == pytest.approx(entropy(projection[[0, 2, 3]], axis=0) / np.log(3))
    projection[[0, 2, 3]] = 1 / 3
    assert view.entropy == pytest.approx(np.ones((3, 3)))
    projection[:] = [[[1]], [[0]], [[0]], [[0]]]
    assert np.isnan(view.entropy).all() and view.largest == 1


def test_the_largest_node_is_that_of_most_pixels():
    projection = np.zeros((3, 1, 10))
    projection[0, 0, :3], projection[2, 0, 3:7], projection[1, 0, 7:] = 0.6, 0.5, 0.9
    projection[1, 0, :7] = [0.4, 0.4, 0.4, 0.2, 0.2, 0.2, 0.2]
    projection[0, 0, 3:7] = 0.3
    assert views.NodeView(np.zeros((1, 10)), projection, np.zeros((3, 2))).largest == 0.4


def test_the_table_of_entropies_holds_every_case_with_or_without_a_lesion():
    images, masks = some_cases(18)
    masks[1] = 0
    fitted = fresh_graph()
    table = views.assignment_entropy(CFG, teacher(), fitted, images, masks)
    assert table["case"].tolist() == list(range(18)) and table.loc[1, "live_nodes"] == 0
    assert table.loc[1, ["entropy", "entropy_of_edge", "largest_node"]].isna().all()
    for case, view in enumerate(views.node_views(CFG, teacher(), fitted, images, masks)):
        if view.live.sum() > 1:
            assert table.loc[case, "entropy"] == pytest.approx(view.entropy.mean())
            assert table.loc[case, "entropy_of_edge"] == pytest.approx(view.entropy[np.nonzero(view.edge)].mean())
    again = views.assignment_entropy(CFG, teacher(), fitted, images, masks)
    assert again.equals(table)


def cell(edge: torch.Tensor, node: int) -> torch.Tensor:
    """The edge pixels (16, 16) of one of the 4 x 4 cells."""
    row, column = divmod(int(node), 4)
    inside = torch.zeros_like(edge)
    inside[4 * row : 4 * row + 4, 4 * column : 4 * column + 4] = 1
    return edge * inside


def test_a_students_nodes_are_seen_through_the_runs_connector():
    run, (images, masks) = distill(CFG, silent), some_cases(5)
    state = store.read_checkpoint(run.path / "checkpoint_last")["objective"]
    network = build(CFG)
    network.load_state_dict({name[8:]: value for name, value in state.items() if name.startswith("network.")})
    part = {name.removeprefix("terms.edge."): value for name, value in state.items()}
    x = views.feature_maps(TrainedNetwork(network.eval(), CFG, run.path), images)[1]["encoder.stride4"]
    x = F.conv2d(x, part["connector.0.weight"])
    x = F.batch_norm(x, part["connector.1.running_mean"], part["connector.1.running_var"], part["connector.1.weight"], part["connector.1.bias"])
    keys = F.conv2d(x, part["graph.theta.weight"], part["graph.theta.bias"]).flatten(2)
    for key, edge, view in zip(keys, edges_of(masks)[:, 0], views.node_views(CFG, views.connected_student(run), views.graph_of(run), images, masks)):
        cells = torch.stack([cell(edge, node).flatten() for node in np.flatnonzero(view.live)])
        anchors = cells @ key.T / cells.sum(1, keepdim=True)
        assert view.projection[view.live] == pytest.approx((anchors @ key).softmax(0).unflatten(1, edge.shape).numpy(), abs=1e-4)


def test_the_graph_of_a_run_is_the_one_that_was_fitted():
    found, fitted = views.graph_of(distill(CFG, silent)), fit_graph(CFG, silent).load()
    assert torch.equal(found.std, fitted.std)
    assert all(torch.equal(a, b) for a, b in zip(found.graph.state_dict().values(), fitted.graph.state_dict().values()))


def test_a_student_map_of_another_name_is_found_and_shown_under_the_teachers():
    cfg = DistillConfig(**TINY, terms="edge", edge_level="decoder.stride4:encoder.stride4")
    run, (images, masks) = distill(cfg, silent), some_cases(2)
    _, maps = views.connected_student(run).network.forward_features(torch.zeros(1, 3, 64, 64))
    assert list(maps) == ["encoder.stride4"] and maps["encoder.stride4"].shape == (1, 64, 16, 16)
    assert len(views.node_views(cfg, views.connected_student(run), views.graph_of(run), images, masks)) == 2


def node_by_node(reasoned: np.ndarray, live: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """std, std_cases and participation ratio of H (N, K, s) over live nodes (N, K), by loops."""
    values = reasoned[live]
    squares, free = np.zeros(reasoned.shape[2]), 0
    for node in range(live.shape[1]):
        here = reasoned[live[:, node], node]
        if len(here):
            squares += ((here - here.mean(0)) ** 2).sum(0)
            free += len(here) - 1
    eigen = np.linalg.eigvalsh(np.cov(values.T, bias=True))
    return values.std(0), (squares / free) ** 0.5, eigen.sum() ** 2 / (eigen**2).sum()


def test_the_collapse_check_by_loops():
    images, masks = some_cases()
    masks[4] = 0
    fitted, net = fresh_graph(), teacher()
    yardstick = torch.linspace(0.1, 0.4, 16)
    check = views.collapse_check(CFG, net, FittedGraph(fitted.graph, yardstick), images, masks)
    edge = edges_of(masks)
    reasoned = fitted.graph(views.feature_maps(net, images)[1]["encoder.stride4"], edge).transpose(1, 2).double().numpy()
    std, std_cases, dimensions = node_by_node(reasoned, fitted.graph.live_nodes(edge).numpy())
    assert check.cases == 19
    assert check.states["std"].to_numpy() == pytest.approx(std, rel=1e-4) and check.states["std_cases"].to_numpy() == pytest.approx(std_cases, rel=1e-4)
    assert check.states["relative"].to_numpy() == pytest.approx(std / yardstick.numpy(), rel=1e-4)
    assert check.states["relative_cases"].to_numpy() == pytest.approx(std_cases / yardstick.numpy(), rel=1e-4)
    assert check.dimensions == pytest.approx(dimensions, rel=1e-4)


def test_a_case_without_a_lesion_is_left_out_of_the_check_even_where_all_cells_live():
    images, masks = some_cases(6)
    fitted, net = fresh_graph(anchors="eagr"), teacher()
    without = views.collapse_check(CFG, net, fitted, images[1:], masks[1:])
    masks[0] = 0
    check = views.collapse_check(CFG, net, fitted, images, masks)
    assert check.cases == 5 and check.states["std"].to_numpy() == pytest.approx(without.states["std"].to_numpy(), rel=1e-5)


@pytest.mark.parametrize(("dead", "verdict"), [(0, "alive"), (1, "partly collapsed"), (7, "partly collapsed"), (8, "collapsed"), (16, "collapsed")])
def test_states_that_say_nothing_are_counted(dead, verdict):
    fitted, (images, masks) = fresh_graph(), some_cases()
    with torch.no_grad():
        fitted.graph.state_mixing.weight[:dead] *= 1e-3
    spread = torch.tensor(views.collapse_check(CFG, teacher(), fresh_graph(), images, masks).states["std"].to_numpy())
    check = views.collapse_check(CFG, teacher(), FittedGraph(fitted.graph, spread), images, masks)
    assert (check.dead_share, check.verdict) == (dead / 16, verdict)


def test_states_that_all_say_the_same_are_narrow():
    fitted, (images, masks) = fresh_graph(), some_cases()
    with torch.no_grad():
        fitted.graph.state_mixing.weight[:] = fitted.graph.state_mixing.weight[0].clone()
    check = views.collapse_check(CFG, teacher(), FittedGraph(fitted.graph, fitted.std * 1e-3), images, masks)
    assert check.dimensions == pytest.approx(1) and check.verdict == "narrow"


def test_nodes_that_differ_from_each_other_but_not_from_case_to_case_are_dead():
    fitted, (images, masks) = fresh_graph(), some_cases()
    with torch.no_grad():
        fitted.graph.phi.weight.zero_()  # V is then the same for every image and cell; the bias of the mixing tells nodes apart
        fitted.graph.node_mixing.weight.zero_()
    check = views.collapse_check(CFG, teacher(), FittedGraph(fitted.graph, fitted.std * 0.1), images, masks)
    assert (check.states["relative"] > 0.05).any() and check.verdict == "collapsed"


def test_a_graph_learned_along_is_held_against_its_own_beginning():
    cfg = DistillConfig(**TINY, terms="edge", graph="joint", seed=4)
    run, (images, masks) = distill(cfg, silent), some_cases()
    fitted = views.graph_of(run)
    beginning = build_terms(cfg, build(cfg), teacher().network, Measured())["edge"].graph
    assert all(torch.equal(a, b) for a, b in zip(_untrained(cfg, fitted.graph).state_dict().values(), beginning.state_dict().values()))
    assert not torch.equal(fitted.graph.phi.weight, beginning.phi.weight)
    check = views.collapse_check(cfg, teacher(), fitted, images, masks)
    started = views.collapse_check(CFG, teacher(), FittedGraph(beginning.eval(), torch.ones(16)), images, masks)
    assert check.states["yardstick"].to_numpy() == pytest.approx(started.states["std"].to_numpy())
    itself = views.collapse_check(cfg, teacher(), FittedGraph(beginning, fitted.std), images, masks)
    assert itself.states["relative"].to_numpy() == pytest.approx(np.ones(16)) and not itself.dead_share


@pytest.mark.fault
@pytest.mark.parametrize("options", [{"terms": "feat"}, {"terms": "edge", "graph": "relation"}])
def test_a_run_without_a_graph_is_refused(options):
    run = distill(DistillConfig(**TINY, **options), silent)
    for look in (views.graph_of, views.connected_student):
        with pytest.raises(LesionKDError, match="no edge graph"):
            look(run)


@pytest.mark.fault
def test_a_teachers_run_has_no_graph():
    with pytest.raises(LesionKDError, match="no edge graph"):
        views.graph_of(train_teacher(CFG, silent))


@pytest.mark.fault
def test_a_single_case_tells_nothing_of_a_collapse():
    images, masks = some_cases(1)
    with pytest.raises(LesionKDError, match="give more cases"):
        views.collapse_check(CFG, teacher(), fresh_graph(), images, masks)


class Given(nn.Module):
    """A network whose maps are given."""

    def __init__(self, **maps: torch.Tensor) -> None:
        super().__init__()
        self.maps = maps

    def forward_features(self, x: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return torch.zeros(1, 1, 8, 8), self.maps


def test_the_channel_that_answers_the_lesion_most_is_shown_in_deviations():
    mask = np.zeros((8, 8), np.uint8)
    mask[:3, :5] = 1  # some pixels of the map are lesion in part
    share = mask.reshape(4, 2, 4, 2).mean((1, 3))
    rng = np.random.default_rng(0)
    x = rng.normal(size=(5, 4, 4))
    x[2] += 4 * share
    x[3] -= 9 * share  # answers most strongly, but by silence
    x[4] = 1000 / 3  # constant: no rounding may make it an answer
    nets = {who: TrainedNetwork(Given(**{name: torch.tensor(x[None])}), CFG, None) for who, name in (("teacher", "far"), ("alone", "near"))}
    found = views.feature_views(nets, np.zeros((8, 8, 3), np.uint8), mask, ["near:far"])
    z = (x[2] - x[2].mean()) / x[2].std()
    d = (z * share).sum() / share.sum() - (z * (1 - share)).sum() / (1 - share).sum()
    for view in (found["teacher"]["near:far"], found["alone"]["near:far"]):
        assert view.channel == 2 and view.separation == pytest.approx(d, rel=1e-5)
        assert view.values == pytest.approx(z, rel=1e-4)


@pytest.mark.fault
@pytest.mark.parametrize("mask", [np.zeros((8, 8)), np.ones((8, 8))])
def test_a_mask_of_one_kind_separates_nothing(mask):
    with pytest.raises(LesionKDError, match="choose another case"):
        views.feature_views({}, np.zeros((8, 8, 3), np.uint8), mask, [])


def test_the_refinement_is_seen_with_the_runs_own_margins():
    cfg = DistillConfig(**TINY, terms="feat", margin="empirical", feature_levels="decoder.stride4")
    run, (images, _) = distill(cfg, silent), some_cases(1)
    margin = store.read_checkpoint(run.path / "checkpoint_last")["objective"]["terms.feat.margin0"]
    t, target, s, channel = views.refinement_view(run, teacher(), images)
    assert target == pytest.approx(np.maximum(t, margin.numpy()[:, None, None])) and s.shape == t.shape
    assert channel == np.maximum(t, 0).mean((1, 2)).argmax()
