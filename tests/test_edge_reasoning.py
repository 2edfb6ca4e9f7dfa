"""L_edge by hand: cells, projection, nodes, reasoning, the variants of the loss and the control."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from lesionkd_core.config import LesionKDError
from lesionkd_core.edges import edge_at_stride
from lesionkd_core.losses import (
    EdgeGraph,
    EdgeHead,
    EdgeReasoning,
    EdgeRelation,
    Step,
    derange,
    grid_cells,
)
from lesionkd_core.losses.edge_reasoning import JointEdgeReasoning, ShuffledEdgeReasoning
from lesionkd_core.models import ResNet34UNet, UNet
from tests.tiny import drawn, step_of

LEVEL = "encoder.stride4"
EDGE = torch.zeros(1, 1, 4, 4)
EDGE[0, 0, 0, 0] = EDGE[0, 0, 0, 1] = EDGE[0, 0, 3, 3] = 1  # cells 0 and 3 of a 2 x 2 grid


@pytest.fixture(scope="module")
def pair():
    torch.manual_seed(0)
    return UNet(width=2), UNet(width=3).eval().requires_grad_(False)


def reasoning(pair, kind=EdgeReasoning, graph=None, std=None):
    """L_edge at stride 4 with a student that is already connected: 12 channels on both sides."""
    torch.manual_seed(3)
    graph = graph or EdgeGraph(12, states=5, grid=2)
    if kind is JointEdgeReasoning:
        loss = kind(*pair, graph, LEVEL)
    else:
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


@pytest.mark.parametrize("frame", ["image", "lesion"])
@pytest.mark.parametrize("grid", [2, 3, 4])
def test_cells_equal_a_loop_over_pixels(grid, frame):
    edge = (torch.rand(12, 1, 7, 9, generator=torch.Generator().manual_seed(grid)) < 0.05).float()
    edge[:3] = 0
    edge[0, 0, 6, 8] = 1  # the last pixel alone
    edge[1, 0, 3, 2] = edge[1, 0, 6, 8] = 1  # a box that begins late
    edge[2, 0, 2, 3] = 1  # a box of one pixel
    found = grid_cells(edge, grid, frame).argmax(1).view(12, 7, 9)
    for image, cells in zip(edge[:, 0], found):
        marked, box = image.nonzero(), [(0, 6), (0, 8)]
        if frame == "lesion":
            if not len(marked):
                continue
            box = list(zip(marked.amin(0).tolist(), marked.amax(0).tolist()))
        for y, x in np.ndindex(7, 9):
            row, column = (
                min(max((at - low) * grid // (high - low + 1), 0), grid - 1)
                for at, (low, high) in zip((y, x), box)
            )
            assert cells[y, x] == row * grid + column


@pytest.mark.parametrize("shape", [(1, 4), (4, 1), (5, 6)])
def test_without_an_edge_every_pixel_still_has_one_cell(shape):
    assert (grid_cells(torch.zeros(2, 1, *shape), 2, "lesion").sum(1) == 1).all()


def test_anchor_is_the_mean_key_of_the_cells_edge_pixels():
    graph = EdgeGraph(1, states=1, grid=2)
    keys = graph.theta(torch.arange(16.0).view(1, 1, 4, 4))
    anchors = graph.anchors_of(keys, EDGE)[0, 0]
    torch.testing.assert_close(anchors[0], (keys[0, 0, 0, 0] + keys[0, 0, 0, 1]) / 2)
    torch.testing.assert_close(anchors[3], keys[0, 0, 3, 3])


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


def test_nodes_of_little_mass_are_means_too():
    states = torch.tensor([[[2.0, 4.0]]])
    projection = torch.tensor([[[0.1, 0.1], [0.9, 0.9], [0, 0], [0, 0]]])
    nodes = EdgeGraph(1, states=1, grid=2).build_graph(states, projection)
    assert nodes.flatten().tolist() == pytest.approx([3, 3, 0, 0])


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


def test_the_head_learns_an_edge_that_the_features_show():
    torch.manual_seed(0)
    edge = torch.zeros(4, 1, 16, 16)
    edge[:, :, 4:12, 6] = 1
    x = torch.cat([edge * 2 - 1, torch.randn(4, 2, 16, 16)], 1)
    graph, head = EdgeGraph(3, grid=2), EdgeHead(16)
    optimizer = torch.optim.Adam([*graph.parameters(), *head.parameters()], 0.02)
    first = head(graph, x, edge).item()
    for _ in range(150):
        optimizer.zero_grad()
        loss = head(graph, x, edge)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.5 * first
    without = head(graph, x, torch.zeros_like(edge))
    without.backward()
    assert without.item() == 0


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


@pytest.mark.parametrize("kind", [EdgeReasoning, JointEdgeReasoning, EdgeRelation])
def test_the_teachers_map_gets_no_gradient(kind, pair):
    relation = EdgeRelation(*pair, LEVEL, grid=2, frame="image")
    loss = relation if kind is EdgeRelation else reasoning(pair, kind)
    student, teacher = maps().requires_grad_(), maps(seed=1)
    loss(step(student, teacher, edges())).backward()
    assert student.grad.abs().sum() > 0 and not teacher.requires_grad
    assert not any(p.requires_grad for p in relation.parameters())


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


def test_two_lesions_exchange_their_edges():
    assert torch.equal(derange(lesions(3, [0, 2])), lesions(3, [0, 2])[[2, 1, 0]])


def test_the_only_lesion_of_a_batch_gets_no_edge():
    assert not derange(lesions(3, [1])).any()


def test_the_control_is_the_loss_with_anothers_edge_on_both_sides(pair):
    edge = edges(3)
    edge[0, 0, 28, 28], edge[1] = 1, 0
    right, control = reasoning(pair), reasoning(pair, ShuffledEdgeReasoning)
    x, target = maps(3), maps(3, seed=1)
    found = control(step(x, target, edge)).item()
    assert found == pytest.approx(right(step(x, target, derange(edge))).item(), rel=1e-5)
    assert found != pytest.approx(right(step(x, target, edge)).item(), rel=1e-5)


# A graph that learns along ------------------------------------------------------------------------


def test_joint_loss_by_hand_with_its_gradient(pair):
    """Distance over the batch's spread (constant), and the edge head's BCE on both sides."""
    loss, edge, live = reasoning(pair, JointEdgeReasoning), edges(), [0, 3]
    small, x, target = edge_at_stride(edge, 4), maps(), maps(seed=1)
    student, teacher = (loss.graph(value, small) for value in (x, target))
    spread = teacher[:, :, live].detach().transpose(1, 2).reshape(4, 5).numpy().std(0)
    apart = (student - teacher)[:, :, live] / torch.from_numpy(spread).view(1, 5, 1)
    along = loss.head(loss.graph, x, small) + loss.head(loss.graph, target, small)
    expected, found = apart.square().mean() + along, loss(step(x, target, edge))
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    for p in (loss.graph.phi.weight, loss.graph.state_mixing.weight, loss.head.head.weight):
        got, wanted = (torch.autograd.grad(v, p, retain_graph=True)[0] for v in (found, expected))
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_joint_loss_of_a_student_equal_to_its_teacher_is_the_heads_alone(pair):
    loss, edge = reasoning(pair, JointEdgeReasoning), edges()
    expected = 2 * loss.head(loss.graph, maps(), edge_at_stride(edge, 4)).item()
    assert loss(step(maps(), maps(), edge)).item() == pytest.approx(expected, rel=1e-5)


def test_joint_loss_is_finite_with_one_node_and_0_with_none(pair):
    loss, student = reasoning(pair, JointEdgeReasoning), maps().requires_grad_()
    assert torch.isfinite(loss(step(maps(1), maps(1), edges(1, [(4, 4)]))))
    found = loss(step(student, maps(seed=1), torch.zeros(2, 1, 32, 32)))
    found.backward()
    assert found.item() == 0 and (student.grad == 0).all()


# Relations without a graph ------------------------------------------------------------------------


def test_relation_compares_cosines_between_cells(pair):
    loss = EdgeRelation(*pair, LEVEL, grid=2, frame="image")
    edge = torch.zeros(1, 1, 64, 64)
    edge[..., 8, 8] = edge[..., 8, 40] = edge[..., 40, 8] = 1  # three of four cells, 1 px each
    cosines, both = [], [drawn(1, channels, 16, 16, seed=channels) for channels in (8, 12)]
    for x in both:
        nodes = np.stack([x[0, :, r, c].numpy() for r, c in ((2, 2), (2, 10), (10, 2))])
        nodes /= np.linalg.norm(nodes, axis=1, keepdims=True)
        cosines.append(nodes @ nodes.T)
    expected = ((cosines[0] - cosines[1])[~np.eye(3, dtype=bool)] ** 2).mean()
    assert loss(step(*both, edge)).item() == pytest.approx(expected, rel=1e-5)


def test_relation_is_a_mean_over_images_and_ignores_scale(pair):
    loss = EdgeRelation(*pair, LEVEL, grid=2, frame="image")
    x, target = maps(), maps(seed=1)
    both = loss(step(x, target, edges()))
    each = [loss(step(x[[i]], target[[i]], edges(1))) for i in (0, 1)]
    torch.testing.assert_close(both, (each[0] + each[1]) / 2)
    torch.testing.assert_close(loss(step(1e-3 * x, target, edges())), both)


def test_relation_of_one_cell_is_0(pair):
    loss = EdgeRelation(*pair, LEVEL, grid=2, frame="image")
    assert loss(step(maps(1), maps(1, seed=1), edges(1, [(4, 4)]))) == 0


# All variants -------------------------------------------------------------------------------------


def test_maps_in_half_precision_are_compared_in_single(pair):
    edge = torch.zeros(2, 1, 64, 32)
    edge[:, 0, 8:40, 5] = edge[:, 0, 8, 5:20] = 1
    made = step_of(*pair, height=64, width=32)
    half = [x[LEVEL].detach().bfloat16() for x in (made.maps, made.teacher_maps)]
    graph = EdgeGraph(12, states=5, grid=2)
    losses = [
        EdgeReasoning(*pair, graph, torch.ones(5), LEVEL),
        JointEdgeReasoning(*pair, graph, LEVEL),
        EdgeRelation(*pair, LEVEL, grid=2, frame="image"),
    ]
    for loss in losses:
        got = loss.eval()(step(*half, edge.double()))
        assert got.dtype == torch.float32 and torch.isfinite(got) and got > 0
        assert torch.equal(got, loss(step(*(x.float() for x in half), edge)))


@pytest.mark.fault
def test_odd_image_sizes_are_refused_in_distillation():
    student, teacher = UNet(width=2), ResNet34UNet().eval()
    made = step_of(student, teacher, torch.ones(2, 1, 70, 70), height=70, width=70)
    loss = EdgeReasoning(student, teacher, EdgeGraph(64), torch.ones(16), LEVEL)
    with pytest.raises(LesionKDError, match=r"17, 17.*18, 18.*multiples of 32"):
        loss(made)
