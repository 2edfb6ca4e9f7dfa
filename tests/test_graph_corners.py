"""Corners of L_edge where a wrong sign, bound or factor would hide: lone nodes, no edge at all, little mass, half precision."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lesionkd_core.edges import edge_at_stride, edge_label_batch
from lesionkd_core.losses.edge_reasoning import EdgeGraph, EdgeHead, EdgeReasoning, EdgeRelation, derange, grid_cells
from lesionkd_core.losses.feature_refinement import FeatureRefinement
from lesionkd_core.networks import UNet

LEVEL = "encoder.stride4"


@pytest.fixture(scope="module")
def pair():
    torch.manual_seed(0)
    return UNet(width=2), UNet(width=3).eval().requires_grad_(False)


def drawn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def reasoning(pair, graph=None, std=None, **options):
    """L_edge at stride 4 with a student that is already connected: 12 channels on both sides."""
    torch.manual_seed(3)
    graph = graph or EdgeGraph(12, states=5, grid=2)
    loss = EdgeReasoning(*pair, graph, torch.ones(5) if std is None else std, LEVEL, **options)
    loss.connector = nn.Identity()
    return loss


def maps(n=2, seed=0):
    return {LEVEL: drawn(n, 12, 8, 8, seed=seed)}


def edges(n=2, cells=((4, 4), (20, 24))):
    """Two of four cells of every image: a pixel of the map each."""
    edge = torch.zeros(n, 1, 32, 32)
    for y, x in cells:
        edge[:, 0, y, x] = 1
    return edge


# grid and graph

@pytest.mark.parametrize("frame", ["image", "lesion"])
@pytest.mark.parametrize("grid", [2, 3, 4])
def test_cells_equal_a_loop_over_pixels(grid, frame):
    edge = (torch.rand(12, 1, 7, 9, generator=torch.Generator().manual_seed(grid)) < 0.05).float()
    edge[:3] = 0
    edge[0, 0, 6, 8] = edge[1, 0, 3, 2] = edge[1, 0, 6, 8] = edge[2, 0, 2, 3] = 1  # the last pixel alone; a box that starts late; a box of one pixel
    for image, cells in zip(edge[:, 0], grid_cells(edge, grid, frame).argmax(1).view(12, 7, 9)):
        marked = image.nonzero()
        if frame == "lesion" and not len(marked):
            continue
        box = [(0, 6), (0, 8)] if frame == "image" else list(zip(marked.amin(0).tolist(), marked.amax(0).tolist()))
        for y in range(7):
            for x in range(9):
                row, column = (min(max((p - low) * grid // (high - low + 1), 0), grid - 1) for p, (low, high) in zip((y, x), box))
                assert cells[y, x] == row * grid + column


@pytest.mark.parametrize("shape", [(1, 4), (4, 1), (5, 6)])
def test_without_an_edge_every_pixel_still_lies_in_one_cell(shape):
    assert (grid_cells(torch.zeros(2, 1, *shape), 2, "lesion").sum(1) == 1).all()


def test_anchors_weigh_pixels_by_how_much_edge_they_hold():
    graph = EdgeGraph(2, states=2, grid=2)
    keys, edge = drawn(1, 2, 4, 4), torch.zeros(1, 1, 4, 4)
    edge[0, 0, 0, 0], edge[0, 0, 1, 1] = 0.25, 0.5
    anchor = graph.anchors_of(keys, graph.cells(edge))[0, :, 0]
    torch.testing.assert_close(anchor, (0.25 * keys[0, :, 0, 0] + 0.5 * keys[0, :, 1, 1]) / 0.75)


def test_cosine_anchors_by_hand():
    graph = EdgeGraph(3, states=4, grid=2, anchors="masked_cosine")
    x, edge = drawn(1, 3, 4, 4), torch.zeros(1, 1, 4, 4)
    edge[0, 0, 0, 0] = edge[0, 0, 0, 1] = edge[0, 0, 3, 3] = 1
    keys = graph.theta(x)[0].flatten(1).detach().double().numpy()
    anchors = [(keys[:, 0] + keys[:, 1]) / 2, keys[:, 15]]
    cosines = np.array([[a @ q / np.linalg.norm(a) / np.linalg.norm(q) for q in keys.T] for a in anchors])
    expected = np.exp(10 * cosines) / np.exp(10 * cosines).sum(0)
    np.testing.assert_allclose(graph.project(x, edge)[1][0, [0, 3]].detach(), expected, rtol=1e-4)


def test_nodes_of_little_mass_are_means_too():
    states, projection = torch.tensor([[[2.0, 4.0]]]), torch.tensor([[[0.1, 0.1], [0.9, 0.9], [0, 0], [0, 0]]])
    assert EdgeGraph(1, states=1, grid=2).build_graph(states, projection).flatten().tolist() == pytest.approx([3, 3, 0, 0])


def test_the_head_is_the_cross_entropy_of_reprojected_nodes_over_images_with_an_edge():
    torch.manual_seed(1)
    graph, head = EdgeGraph(3, states=4, grid=2), EdgeHead(4)
    x, edge = drawn(3, 3, 4, 4), torch.zeros(3, 1, 4, 4)
    edge[0, 0, 1, 1] = edge[0, 0, 2, 3] = edge[2, 0, 0, 3] = 1
    total = 0.0
    for i in (0, 2):
        states, projection = graph.project(x[i : i + 1], edge[i : i + 1])
        nodes = graph.reason(graph.build_graph(states, projection))[0].detach().double().numpy().clip(min=0)
        weight, bias = head.head.weight.detach().double().numpy()[0, :, 0, 0], head.head.bias.item()
        logits = weight @ nodes @ projection[0].detach().double().numpy() + bias
        label = edge[i].flatten().double().numpy()
        total += (np.log1p(np.exp(logits)) - label * logits).mean() / 2
    assert head(graph, x, edge).item() == pytest.approx(total, rel=1e-5)


# L_edge

def test_a_state_that_never_moves_in_the_teacher_divides_by_no_zero(pair):
    assert reasoning(pair, std=torch.zeros(5))(maps(), maps(), edges()).item() == 0


def test_one_live_node_is_a_mean_of_one(pair):
    loss, edge = reasoning(pair), edges(1, [(4, 4)])
    apart = [loss.graph(x[LEVEL], edge_at_stride(edge, 4))[0, :, 0] for x in (maps(1), maps(1, seed=1))]
    assert loss(maps(1), maps(1, seed=1), edge).item() == pytest.approx((apart[0] - apart[1]).square().mean().item(), rel=1e-5)


def test_eagr_knows_no_empty_cells_but_images_without_an_edge(pair):
    loss, edge = reasoning(pair, EdgeGraph(12, states=5, grid=3, anchors="eagr")), edges()
    edge[1] = 0
    small = edge[:1, :, ::4, ::4]
    apart = [loss.graph(x[LEVEL][:1], small) for x in (maps(), maps(seed=1))]
    assert loss(maps(), maps(seed=1), edge).item() == pytest.approx((apart[0] - apart[1]).square().mean().item() / 2, rel=1e-5)


def test_learned_along_by_hand_with_its_gradient(pair):
    """Distance over the spread of the teacher's live nodes in the batch, a constant, and the head's loss on both sides."""
    head = EdgeHead(5)
    loss, edge = reasoning(pair, head=head), edges()
    small = edge_at_stride(edge, 4)
    student, teacher = (loss.graph(x[LEVEL], small) for x in (maps(), maps(seed=1)))
    live = [0, 3]
    spread = teacher[:, :, live].detach().transpose(1, 2).reshape(4, 5).numpy().std(0)
    distance = ((student - teacher)[:, :, live] / torch.from_numpy(spread).view(1, 5, 1)).square().mean()
    expected = distance + head(loss.graph, maps()[LEVEL], small) + head(loss.graph, maps(seed=1)[LEVEL], small)
    got = loss(maps(), maps(seed=1), edge)
    assert got.item() == pytest.approx(expected.item(), rel=1e-5)
    for p in (loss.graph.phi.weight, loss.graph.state_mixing.weight, head.head.weight):
        torch.testing.assert_close(*(torch.autograd.grad(value, p, retain_graph=True)[0] for value in (got, expected)), rtol=1e-4, atol=1e-5)


def test_learned_along_from_a_single_node_and_from_none(pair):
    loss = reasoning(pair, head=EdgeHead(5))
    assert torch.isfinite(loss(maps(1), maps(1), edges(1, [(4, 4)])))
    student = {LEVEL: maps()[LEVEL].requires_grad_()}
    loss(student, maps(seed=1), torch.zeros(2, 1, 32, 32)).backward()
    assert (student[LEVEL].grad == 0).all()


@pytest.mark.parametrize("kind", ["graph", "joint", "relation"])
def test_the_teachers_map_gets_no_gradient(kind, pair):
    relation = EdgeRelation(*pair, LEVEL, grid=2, frame="image")
    loss = relation if kind == "relation" else reasoning(pair, head=EdgeHead(5) if kind == "joint" else None)
    student, teacher = ({LEVEL: maps(seed=seed)[LEVEL].requires_grad_()} for seed in (0, 1))
    loss(student, teacher, edges()).backward()
    assert student[LEVEL].grad.abs().sum() > 0 and teacher[LEVEL].grad is None
    assert not any(p.requires_grad for p in relation.parameters())


def test_relation_is_a_mean_over_images_and_ignores_how_faint_a_map_is(pair):
    loss = EdgeRelation(*pair, LEVEL, grid=2, frame="image")
    both = loss(maps(), maps(seed=1), edges())
    each = [loss({LEVEL: maps()[LEVEL][[i]]}, {LEVEL: maps(seed=1)[LEVEL][[i]]}, edges(1)) for i in (0, 1)]
    torch.testing.assert_close(both, (each[0] + each[1]) / 2)
    torch.testing.assert_close(loss({LEVEL: 1e-3 * maps()[LEVEL]}, maps(seed=1), edges()), both)


def test_two_lesions_change_edges():
    edge = edges(3)
    edge[0, 0, 30, 30], edge[1] = 1, 0
    assert torch.equal(derange(edge), edge[[2, 1, 0]])


def test_half_precision_maps_are_compared_in_single(pair):
    images = torch.rand(2, 3, 64, 32, generator=torch.Generator().manual_seed(0))
    maps_s, maps_t = ({name: x.detach().bfloat16() for name, x in network.forward_features(images)[1].items()} for network in pair)
    single = [{name: x.float() for name, x in part.items()} for part in (maps_s, maps_t)]
    edge = torch.zeros(2, 1, 64, 32)
    edge[:, 0, 8:40, 5] = edge[:, 0, 8, 5:20] = 1
    graph = EdgeGraph(12, states=5, grid=2)
    losses = [FeatureRefinement(*pair, (LEVEL,)).eval()]
    losses += [lambda *maps, loss=loss: loss(*maps, edge.double()) for loss in (
        EdgeReasoning(*pair, graph, torch.ones(5), LEVEL).eval(), EdgeReasoning(*pair, graph, torch.ones(5), LEVEL, EdgeHead(5)).eval(),
        EdgeRelation(*pair, LEVEL, grid=2, frame="image"),
    )]  # fmt: skip
    for loss in losses:
        got = loss(maps_s, maps_t)
        assert got.dtype == torch.float32 and torch.isfinite(got) and got > 0
        assert torch.equal(got, loss(*single))


# the edge itself

def test_an_edge_is_one_step_wide_by_default_and_halves_at_stride_two():
    masks = (torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(0)) < 0.1).float()
    edge = edge_label_batch(masks)
    assert torch.equal(edge, edge_label_batch(masks, 1)) and edge.dtype == torch.float32
    assert torch.equal(edge_at_stride(edge, 2), F.max_pool2d(edge, 2))
