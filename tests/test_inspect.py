"""What the inspection shows, by hand computation and brute force, on constructed runs."""

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F

from lesionkd_core import losses, results
from lesionkd_core.analysis import inspect
from lesionkd_core.analysis.inspect import node_views
from lesionkd_core.config import DistillConfig, LesionKDError, TeacherConfig
from lesionkd_core.edges import edge_at_stride, edge_label_batch
from lesionkd_core.losses import EdgeGraph, FittedGraph, Measured, build_terms
from lesionkd_core.models import UNet
from lesionkd_core.predict import TrainedNetwork, build
from lesionkd_core.train import Objective
from tests.fixed import lively

LEVEL = "encoder.stride4"
BATCH_NORM = ("running_mean", "running_var", "weight", "bias")


def config(**options) -> DistillConfig:
    return DistillConfig(pixels=64, **options)


CFG = config()


@pytest.fixture(scope="module")
def teacher() -> TrainedNetwork:
    torch.manual_seed(0)
    return TrainedNetwork(lively(UNet(width=16)), TeacherConfig(pixels=64), None)


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


def edges_of(masks: np.ndarray) -> torch.Tensor:
    return edge_at_stride(edge_label_batch(torch.tensor(masks).float().unsqueeze(1)), 4)


def finished_run(folder, cfg: DistillConfig, teacher: TrainedNetwork) -> results.Result:
    """A student run whose weights are arbitrary, with the files of a finished one."""
    network, norms = lively(build(cfg)), teacher.network.feature_norms()
    margins = {name: torch.rand(norm.num_features) - 1 for name, norm in norms.items()}
    fitted = FittedGraph(EdgeGraph.build(64, cfg), torch.linspace(0.1, 0.4, 16))
    terms = lively(build_terms(cfg, network, teacher.network, Measured(fitted, margins)))
    path = folder / "distill" / f"run-{'-'.join(cfg.losses)}"
    results.write_json(path / "config.json", {"stage": "distill"} | cfg.model_dump(mode="json"))
    state = {"objective": Objective(network, terms).state_dict()}
    results.write_checkpoint(path / "checkpoint_last", state)
    results.write_checkpoint(path / "checkpoint_best", {"network": build(cfg).state_dict()})
    results.write_json(path / "DONE", results.checksums(path))
    return results.Result(path)


def last_student(run: results.Result, cfg: DistillConfig) -> tuple[TrainedNetwork, dict]:
    """The student after the last epoch, and the state of its loss terms."""
    state = results.read_checkpoint(run.path / "checkpoint_last")["objective"]
    student = build(cfg)
    student.load_state_dict({n[8:]: v for n, v in state.items() if n.startswith("network.")})
    return TrainedNetwork(student.eval(), cfg, run.path), state


def connected(x: torch.Tensor, state: dict, connector: str) -> torch.Tensor:
    """A map after the connector of a loss term, by hand."""
    x = F.conv2d(x, state[f"{connector}.0.weight"])
    return F.batch_norm(x, *(state[f"{connector}.1.{name}"] for name in BATCH_NORM))


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
    assert "Source: Heo et al." in shown(monkeypatch, losses.partial_l2, docstring=True)


# Cases and edge labels ----------------------------------------------------------------------------


class Cases:
    """Prepared cases as far as the functions read them."""

    thumbnails = None

    def __init__(self, sizes) -> None:
        self.cases = pd.DataFrame({"lesion_fraction": sizes, "split": "test"})

    def index(self, split: str) -> np.ndarray:
        return np.flatnonzero(self.cases["split"] == split)


def test_cases_are_spread_from_the_smallest_to_the_largest_lesion():
    prepared = Cases([0.5, 0.1, 0.3, 0.2, 0.4])
    assert inspect.spread_of_cases(prepared, "test", 3) == [1, 2, 0]
    assert inspect.spread_of_cases(prepared, "test", 9) == [1, 3, 2, 4, 0]
    assert inspect.spread_of_cases(prepared, "train", 3) == []


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


def test_the_cost_of_an_element_is_the_partial_l2_by_hand():
    curves = inspect.partial_l2_curves(targets=(1.0, -0.5), reach=2.5, points=11)
    s, t = curves["student"], curves["target"]
    by_hand = (s - t) ** 2 * ((s > t) | (t > 0))
    assert curves["cost"].to_numpy() == pytest.approx(by_hand.to_numpy(), abs=1e-6)
    assert (curves.query("target < 0 and student < target")["cost"] == 0).all()
    assert len(curves) == 22 and s.min() == -2.5 and s.max() == 2.5


# A finished run -----------------------------------------------------------------------------------


def test_the_refinement_is_that_of_the_runs_connector_and_margins(tmp_path, teacher):
    cfg = config(losses="feat", margin="empirical", levels="decoder.stride4, decoder.stride2")
    run, image = finished_run(tmp_path, cfg, teacher), some_cases(1)[0][0]
    student, state = last_student(run, cfg)
    view = inspect.refinement_view(run, teacher, image)
    assert view.teacher.shape == view.student.shape == (16, 32, 32), "the shallowest level"
    margin = state["terms.feat.margin0"].numpy()[:, None, None]
    assert view.target == pytest.approx(np.maximum(view.teacher, margin))
    assert view.channel == np.maximum(view.teacher, 0).mean((1, 2)).argmax()
    x = inspect.feature_maps(student, image[None])[1]["decoder.stride2"]
    x = connected(x, state, "terms.feat.connectors.0")
    assert view.student == pytest.approx(x[0].detach().numpy(), abs=1e-5)


@pytest.mark.parametrize("term", ["edge", "edge_shuffled"])
def test_the_nodes_of_a_student_are_those_of_its_connector_and_graph(tmp_path, teacher, term):
    cfg = config(losses=f"feat, {term}", anchors="masked_mean")
    run, (images, masks) = finished_run(tmp_path, cfg, teacher), some_cases(5)
    student, state = last_student(run, cfg)
    part = {n.removeprefix(f"terms.{term}."): v for n, v in state.items()}
    x = connected(inspect.feature_maps(student, images)[1][LEVEL], part, "connector")
    keys = F.conv2d(x, part["graph.theta.weight"], part["graph.theta.bias"]).flatten(2)
    fitted, seen = inspect.graph_of(run, teacher)
    assert torch.equal(fitted.graph.phi.weight, part["graph.phi.weight"])
    assert torch.equal(fitted.std, part["std"])
    views = node_views(cfg, seen, fitted, images, masks)
    for key, edge, view in zip(keys, edges_of(masks)[:, 0], views):
        pixels = [members(edge, node).flatten() for node in np.flatnonzero(view.live)]
        cells = torch.stack(pixels)
        anchors = cells @ key.T / cells.sum(1, keepdim=True)
        by_hand = (anchors @ key).softmax(0).unflatten(1, edge.shape).detach().numpy()
        assert view.projection[view.live] == pytest.approx(by_hand, abs=1e-4)
        assert view.background == 16


@pytest.mark.fault
def test_a_run_without_the_term_to_show_is_refused(tmp_path, teacher):
    with pytest.raises(LesionKDError, match="no edge graph.*feat"):
        inspect.graph_of(finished_run(tmp_path, config(losses="feat"), teacher), teacher)
    run = finished_run(tmp_path, config(losses="edge"), teacher)
    with pytest.raises(LesionKDError, match="without the loss term 'feat'"):
        inspect.refinement_view(run, teacher, some_cases(1)[0][0])


# Nodes of the graph -------------------------------------------------------------------------------


def members(edge: torch.Tensor, node: int) -> torch.Tensor:
    """The edge pixels (16, 16) of one of the 4 x 4 cells; of node 16 the other pixels."""
    if node == 16:
        return 1 - edge
    row, column = divmod(int(node), 4)
    inside = torch.zeros_like(edge)
    inside[4 * row : 4 * row + 4, 4 * column : 4 * column + 4] = 1
    return edge * inside


def test_an_anchor_is_the_centroid_of_its_cells_edge_pixels(teacher):
    images, masks = some_cases()
    masks[4] = 0
    views = node_views(CFG, teacher, fresh_graph(), images, masks)
    assert not views[4].live.any() and views[0].background is None
    for view, edge in zip(views, edges_of(masks)[:, 0]):
        assert np.array_equal(view.edge, edge.numpy())
        for node in range(16):
            own = members(edge, node).numpy()
            assert np.array_equal(view.members[node], own) and view.live[node] == own.any()
            if own.any():
                assert view.anchors[node] == pytest.approx(np.argwhere(own).mean(0), abs=1e-4)
            else:
                assert np.isnan(view.anchors[node]).all()
