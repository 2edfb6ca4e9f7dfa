"""L_edge by hand: cells, projection, nodes, reasoning, the variants of the loss and the control."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from lesionkd_core.edges import edge_at_stride
from lesionkd_core.losses import EdgeGraph, EdgeHead, EdgeReasoning, Step
from lesionkd_core.losses.edge_reasoning import ShuffledEdgeReasoning, derange, grid_cells
from lesionkd_core.models import UNet
from tests.tiny import drawn, step_of

LEVEL = "encoder.stride4"
EDGE = torch.zeros(1, 1, 4, 4)
EDGE[0, 0, 0, 0] = EDGE[0, 0, 0, 1] = EDGE[0, 0, 3, 3] = 1  # cells 0 and 3 of a 2 x 2 grid


def reasoning(pair, kind=EdgeReasoning, graph=None, std=None):
    """L_edge at stride 4 with a student that is already connected: 12 channels on both sides."""
    torch.manual_seed(3)
    graph = graph or EdgeGraph(12, states=5, grid=2)
    loss = kind(*pair, graph, torch.ones(5) if std is None else std, LEVEL)
    loss.connector = nn.Identity()
    return loss


def step(x, target, edge) -> Step:
    """The maps at stride 4 of both networks, and the full-size edge."""
    return Step(torch.zeros(1), torch.zeros(1), {LEVEL: x}, edge, None, {LEVEL: target})


def maps(n=2, seed=0):
    return drawn(n, 12, 8, 8, seed=seed)


def edges(n=2, cells=((4, 4), (20, 24))):
    """Cells 0 and 3 of four in every image, one pixel of the map each."""
    edge = torch.zeros(n, 1, 32, 32)
    for y, x in cells:
        edge[:, 0, y, x] = 1
    return edge


# Cells and anchors --------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [2, 3])
@pytest.mark.parametrize("shape", [(7, 9), (1, 4)])
def test_cells_equal_a_loop_over_pixels(grid, shape):
    found = grid_cells(*shape, grid)
    assert (found.sum(0) == 1).all()
    for (y, x), cell in np.ndenumerate(found.argmax(0).view(shape).numpy()):
        assert cell == y * grid // shape[0] * grid + x * grid // shape[1]


def test_anchors_weight_pixels_by_how_much_edge_they_hold():
    graph = EdgeGraph(2, states=2, grid=2)
    keys, edge = drawn(1, 2, 4, 4), torch.zeros(1, 1, 4, 4)
    edge[0, 0, 0, 0], edge[0, 0, 1, 1] = 0.25, 0.5
    expected = (0.25 * keys[0, :, 0, 0] + 0.5 * keys[0, :, 1, 1]) / 0.75
    torch.testing.assert_close(graph.anchors_of(keys, edge)[0, :, 0], expected)


def test_cosine_anchors_by_hand():
    graph, x = EdgeGraph(3, states=4, grid=2, anchors="masked_cosine"), drawn(1, 3, 4, 4)
    keys = graph.theta(x)[0].flatten(1).detach().double().numpy()
    anchors = [(keys[:, 0] + keys[:, 1]) / 2, keys[:, 15]]
    norms = np.linalg.norm
    cosines = np.array([[a @ q / norms(a) / norms(q) for q in keys.T] for a in anchors])
    expected = np.exp(10 * cosines) / np.exp(10 * cosines).sum(0)
    found = graph.project(x, EDGE)[1][0, [0, 3]].detach()
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_eagr_takes_the_nearest_edge_pixel_and_the_others_the_maximum():
    edge = torch.zeros(1, 1, 8, 8)
    edge[0, 0, 1, 5] = 1
    assert EdgeGraph(1, anchors="eagr").edge_at(edge, 4).sum() == 0
    assert EdgeGraph(1).edge_at(edge, 4).tolist() == [[[[0, 1], [0, 0]]]]


# Projection, nodes, reasoning ---------------------------------------------------------------------


def test_projection_is_a_softmax_of_anchor_times_key():
    graph, x = EdgeGraph(2, states=2, grid=2), drawn(1, 2, 4, 4)
    keys = graph.theta(x).detach()
    anchors, keys = graph.anchors_of(keys, EDGE)[0], keys[0].flatten(1)
    scores = [math.exp(float(anchors[:, k] @ keys[:, 5])) for k in (0, 3)]
    found = graph.project(x, EDGE)[1][0, 0, 5].item()
    assert found == pytest.approx(scores[0] / sum(scores), rel=1e-5)


@pytest.mark.parametrize("anchors", ["masked_mean", "masked_cosine"])
def test_cells_without_an_edge_drop_out_of_the_softmax(anchors):
    graph = EdgeGraph(3, states=4, grid=2, anchors=anchors)
    states, projection = graph.project(drawn(1, 3, 4, 4), EDGE)
    torch.testing.assert_close(projection.sum(1), torch.ones(1, 16))
    assert graph.live_nodes(EDGE).tolist() == [[True, False, False, True]]
    assert (projection[:, [1, 2]] == 0).all()
    assert (graph.build_graph(states, projection)[:, :, [1, 2]] == 0).all()


def test_a_background_node_has_the_mean_key_of_the_pixels_off_the_edge():
    graph, x = EdgeGraph(3, states=4, grid=2, background=True), drawn(1, 3, 4, 4)
    keys = graph.theta(x)
    anchors = graph.anchors_of(keys, EDGE)[0]
    off = EDGE[0, 0].flatten() == 0
    assert anchors.shape == (4, 5)
    torch.testing.assert_close(anchors[:, 4], keys[0].flatten(1)[:, off].mean(1))
    torch.testing.assert_close(anchors[:, :4], cells_alone(keys))
    assert graph.live_nodes(EDGE).tolist() == [[True, False, False, True, True]]
    assert graph(x, EDGE).shape == (1, 4, 5)


def cells_alone(keys):
    """The anchors of the cells without a background node."""
    plain = EdgeGraph(3, states=4, grid=2)
    return plain.anchors_of(keys, EDGE)[0]


def test_nodes_divided_by_mass_are_weighted_means_of_states():
    graph, states = EdgeGraph(1, states=1, grid=2), torch.tensor([[[2.0, 4.0, 6.0]]])
    projection = torch.tensor([[[1.0, 0.5, 0.0], [0.0, 0.5, 1.0], [0, 0, 0], [0, 0, 0]]])
    expected = {"mass": [4 / 1.5, 8 / 1.5], "none": [4, 8], "size": [4 / 3, 8 / 3]}
    for graph.normalize, nodes in expected.items():
        found = graph.build_graph(states, projection).flatten().tolist()
        assert found == pytest.approx([*nodes, 0, 0])


def test_an_image_without_an_edge_gives_finite_zeros():
    graph = EdgeGraph(3, grid=2)
    states, projection = graph.project(drawn(2, 3, 4, 4), torch.zeros(2, 1, 4, 4))
    assert (projection == 0).all()
    assert torch.isfinite(graph.reason(graph.build_graph(states, projection))).all()


# Fitting ------------------------------------------------------------------------------------------


def test_the_head_is_the_cross_entropy_of_reprojected_nodes_over_images_with_an_edge():
    torch.manual_seed(1)
    graph, head = EdgeGraph(3, states=4, grid=2), EdgeHead(4)
    x, edge = drawn(3, 3, 4, 4), torch.zeros(3, 1, 4, 4)
    edge[0, 0, 1, 1] = edge[0, 0, 2, 3] = edge[2, 0, 0, 3] = 1
    weight, bias = head.head.weight.detach().double().numpy()[0, :, 0, 0], head.head.bias.item()
    total = 0.0
    for i in (0, 2):
        states, projection = graph.project(x[i : i + 1], edge[i : i + 1])
        nodes = graph.reason(graph.build_graph(states, projection))[0].detach().double().numpy()
        logits = weight @ nodes.clip(min=0) @ projection[0].detach().double().numpy() + bias
        label = edge[i].flatten().double().numpy()
        total += (np.log1p(np.exp(logits)) - label * logits).mean() / 2
    assert head(graph, x, edge).item() == pytest.approx(total, rel=1e-5)


# L_edge -------------------------------------------------------------------------------------------


def test_loss_is_the_mean_square_over_states_and_live_nodes_then_over_images(pair):
    std, edge = torch.linspace(0.5, 2, 5), edges()
    edge[1, 0, 20, 24] = 0  # one live node in the second image
    loss, small = reasoning(pair, std=std), edge_at_stride(edge, 4)
    h_s, h_t = (loss.graph(x, small).detach() for x in (maps(), maps(seed=1)))
    squared = ((h_s - h_t) / std.view(1, 5, 1)).square().numpy()
    expected = (squared[0][:, [0, 3]].mean() + squared[1][:, 0].mean()) / 2
    found = loss(step(maps(), maps(seed=1), edge)).item()
    assert found == pytest.approx(expected, rel=1e-4)


def test_images_without_an_edge_add_0_and_count_in_the_mean(pair):
    loss, found = reasoning(pair, std=torch.full((5,), 2.0)), {}
    for name, empty in (("both", []), ("first", [1]), ("second", [0]), ("none", [0, 1])):
        edge = edges()
        edge[empty] = 0
        found[name] = loss(step(maps(), maps(seed=1), edge))
    torch.testing.assert_close(found["first"] + found["second"], found["both"])
    assert found["none"].item() == 0


def test_a_state_without_spread_in_the_teacher_does_not_divide_by_0(pair):
    assert reasoning(pair, std=torch.zeros(5))(step(maps(), maps(), edges())).item() == 0


def test_with_eagr_all_cells_count_but_images_without_an_edge_do_not(pair):
    loss = reasoning(pair, graph=EdgeGraph(12, states=5, grid=3, anchors="eagr"))
    edge = edges()
    edge[1] = 0
    apart = [loss.graph(x[:1], edge[:1, :, ::4, ::4]) for x in (maps(), maps(seed=1))]
    expected = (apart[0] - apart[1]).square().mean().item() / 2
    assert loss(step(maps(), maps(seed=1), edge)).item() == pytest.approx(expected, rel=1e-5)


def test_the_graph_stays_frozen_and_passes_gradients_to_student_and_connector():
    student, teacher = UNet(width=2), UNet(width=3).eval().requires_grad_(False)
    loss = EdgeReasoning(student, teacher, EdgeGraph(12, grid=2), torch.ones(16), LEVEL)
    edge = torch.zeros(2, 1, 64, 64)
    edge[..., 16:48, 20] = 1
    loss(step_of(student, teacher, edge)).backward()
    assert all(p.grad is None for p in loss.graph.parameters())
    assert loss.connector[0].weight.grad.abs().sum() > 0
    assert student.encoder[0][0].weight.grad.abs().sum() > 0


# The control --------------------------------------------------------------------------------------


def lesions(n: int, at: list[int]) -> torch.Tensor:
    """Another edge for each of the images `at`."""
    edge = torch.zeros(n, 1, 64, 64)
    for i in at:
        edge[i, 0, 16:48, 16 + 4 * i] = 1
    return edge


def test_derangement_gives_every_lesion_the_edge_of_another():
    edge = lesions(5, [0, 2, 3])
    shuffled = derange(edge)
    assert [i for i in range(5) if shuffled[i].any()] == [0, 2, 3]
    assert not any(torch.equal(shuffled[i], edge[i]) for i in (0, 2, 3))
    as_sets = [{tuple(e.flatten().tolist()) for e in edges} for edges in (edge, shuffled)]
    assert as_sets[0] == as_sets[1]


def test_two_lesions_exchange_their_edges_and_one_alone_gets_none():
    assert torch.equal(derange(lesions(3, [0, 2])), lesions(3, [0, 2])[[2, 1, 0]])
    assert not derange(lesions(3, [1])).any()


def test_the_control_is_the_loss_with_anothers_edge_on_both_sides(pair):
    edge = edges(3)
    edge[0, 0, 28, 28], edge[1] = 1, 0
    right, control = reasoning(pair), reasoning(pair, ShuffledEdgeReasoning)
    x, target = maps(3), maps(3, seed=1)
    found = control(step(x, target, edge)).item()
    assert found == pytest.approx(right(step(x, target, derange(edge))).item(), rel=1e-5)
    assert found != pytest.approx(right(step(x, target, edge)).item(), rel=1e-5)


def test_maps_in_half_precision_are_compared_in_single(pair):
    edge = torch.zeros(2, 1, 64, 32)
    edge[:, 0, 8:40, 5] = edge[:, 0, 8, 5:20] = 1
    made = step_of(*pair, height=64, width=32)
    half = [x[LEVEL].detach().bfloat16() for x in (made.maps, made.teacher_maps)]
    graph = EdgeGraph(12, states=5, grid=2)
    loss = EdgeReasoning(*pair, graph, torch.ones(5), LEVEL)
    got = loss.eval()(step(*half, edge.double()))
    assert got.dtype == torch.float32 and torch.isfinite(got) and got > 0
    assert torch.equal(got, loss(step(*(x.float() for x in half), edge)))
