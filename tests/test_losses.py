"""The losses by hand: what no oracle covers."""

import math

import pytest
import torch
from torch import nn

from lesionkd_core.config import LesionKDError
from lesionkd_core.losses.baselines import OnMaps, hint_loss
from lesionkd_core.losses.edge_reasoning import EdgeGraph, EdgeHead, EdgeReasoning, EdgeRelation, derange, grid_cells
from lesionkd_core.losses.feature_refinement import FeatureRefinement, partial_l2, segmentation_loss
from lesionkd_core.networks import ResNet34UNet, UNet

EDGE = torch.zeros(1, 1, 4, 4)
EDGE[0, 0, 0, 0] = EDGE[0, 0, 0, 1] = EDGE[0, 0, 3, 3] = 1  # cells 0 and 3 of a 2 x 2 grid


@pytest.fixture(scope="module")
def pair():
    torch.manual_seed(0)
    return UNet(width=4), ResNet34UNet().eval().requires_grad_(False)


def features(pair, n=2, size=64):
    images = torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(1))
    student, teacher = pair
    return student.train().forward_features(images)[1], teacher.forward_features(images)[1]


def test_partial_l2_leaves_the_student_alone_below_both():
    student = torch.tensor([-3.0, -0.5, 1.0]).view(1, 1, 1, 3).requires_grad_()
    teacher = torch.tensor([-1.0, -1.0, -1.0]).view(1, 1, 1, 3)
    loss = partial_l2(student, teacher, torch.tensor([-0.8]))
    loss.backward()
    assert loss.item() == pytest.approx(0.3**2 + 1.8**2)
    assert student.grad.flatten().tolist() == pytest.approx([0.0, 0.6, 3.6])


def test_level_weights_by_hand(pair):
    """One level each: the sums over levels differ only in their factors."""
    maps_s, maps_t = features(pair)
    names, totals = ("decoder.stride8", "decoder.stride4"), {}
    loss = FeatureRefinement(*pair, names)
    sums = [partial_l2(loss.connectors[i](maps_s[s]), maps_t[t], getattr(loss, f"margin{i}")).item() for i, (s, t) in enumerate(loss.pairs)]
    for mode in ("mean", "area", "halving"):
        loss.level_weights = mode
        totals[mode] = loss(maps_s, maps_t).item()
    n, shallow, deep = 2, sums[0], sums[1]  # pairs are shallowest first: stride 4 (64 ch, 16 px), stride 8 (128 ch, 8 px)
    assert [s for s, _ in loss.pairs] == ["decoder.stride4", "decoder.stride8"]
    assert totals["mean"] == pytest.approx(shallow / (n * 64 * 256) + deep / (n * 128 * 64), rel=1e-4)
    assert totals["area"] == pytest.approx((shallow / 4 + deep) / n, rel=1e-4)
    assert totals["halving"] == pytest.approx((shallow / 2 + deep) / (1000 * n), rel=1e-4)


def test_refinement_reaches_student_and_connectors_and_not_the_teacher(pair):
    maps_s, maps_t = features(pair)
    loss = FeatureRefinement(*pair, ("decoder.stride8", "decoder.stride2"))
    loss(maps_s, maps_t).backward()
    assert all(p.grad is not None for p in loss.parameters())
    assert pair[0].encoder[0][0].weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in pair[1].parameters())


def test_a_batch_of_one_works(pair):
    maps_s, maps_t = features(pair, n=1)
    assert torch.isfinite(FeatureRefinement(*pair, ("decoder.stride4",))(maps_s, maps_t))
    edge = torch.zeros(1, 1, 64, 64)
    edge[..., 20:30, 20] = 1
    assert torch.isfinite(EdgeReasoning(*pair, EdgeGraph(64), torch.ones(16), "encoder.stride4")(maps_s, maps_t, edge))


def test_cells_cover_the_image_row_by_row():
    cells = grid_cells(torch.zeros(1, 1, 4, 6), 2).argmax(1).view(4, 6)
    assert cells.tolist() == [[0, 0, 0, 1, 1, 1]] * 2 + [[2, 2, 2, 3, 3, 3]] * 2


def test_cells_of_an_odd_size_lose_no_pixel():
    assert (grid_cells(torch.zeros(2, 1, 7, 5), 4).sum(1) == 1).all()


def test_lesion_frame_spans_the_edges_bounding_box():
    edge = torch.zeros(1, 1, 6, 6)
    edge[0, 0, 2, 1] = edge[0, 0, 3, 4] = 1  # rows 2..3, columns 1..4
    cells = grid_cells(edge, 2, "lesion").argmax(1).view(6, 6)
    assert cells[2].tolist() == [0, 0, 0, 1, 1, 1]
    assert cells[:, 0].tolist() == [0, 0, 0, 2, 2, 2]


def test_anchor_is_the_mean_key_of_the_cells_edge_pixels():
    graph = EdgeGraph(1, states=1, grid=2)
    x = torch.arange(16.0).view(1, 1, 4, 4)
    keys = graph.theta(x)[0, 0]
    anchors = graph.anchors_of(graph.theta(x), graph.cells(EDGE))[0, 0]
    torch.testing.assert_close(anchors[0], (keys[0, 0] + keys[0, 1]) / 2)
    torch.testing.assert_close(anchors[3], keys[3, 3])


@pytest.mark.parametrize("anchors", ["masked_mean", "masked_cosine"])
def test_empty_cells_drop_out_of_the_softmax(anchors):
    graph = EdgeGraph(3, states=4, grid=2, anchors=anchors)
    states, projection = graph.project(torch.rand(1, 3, 4, 4), EDGE)
    nodes = graph.build_graph(states, projection)
    torch.testing.assert_close(projection.sum(1), torch.ones(1, 16))
    assert graph.live_nodes(EDGE).tolist() == [[True, False, False, True]]
    assert (projection[:, [1, 2]] == 0).all()
    assert (nodes[:, :, [1, 2]] == 0).all()


def test_projection_is_a_softmax_of_anchor_times_key():
    graph = EdgeGraph(2, states=2, grid=2)
    x = torch.rand(1, 2, 4, 4)
    keys = graph.theta(x).detach()
    anchors, keys = graph.anchors_of(keys, graph.cells(EDGE))[0], keys[0].flatten(1)
    scores = [math.exp(float(anchors[:, k] @ keys[:, 5])) for k in (0, 3)]
    projection = graph.project(x, EDGE)[1][0, :, 5]
    assert projection[0].item() == pytest.approx(scores[0] / sum(scores), rel=1e-5)


def test_nodes_divided_by_mass_are_weighted_means_of_states():
    graph = EdgeGraph(1, states=1, grid=2)
    states, projection = torch.tensor([[[2.0, 4.0, 6.0]]]), torch.tensor([[[1.0, 0.5, 0.0], [0.0, 0.5, 1.0], [0, 0, 0], [0, 0, 0]]])
    assert graph.build_graph(states, projection).flatten().tolist() == pytest.approx([4 / 1.5, 8 / 1.5, 0, 0])
    graph.normalize = "none"
    assert graph.build_graph(states, projection).flatten().tolist() == pytest.approx([4, 8, 0, 0])
    graph.normalize = "size"
    assert graph.build_graph(states, projection).flatten().tolist() == pytest.approx([4 / 3, 8 / 3, 0, 0])


def test_an_image_without_an_edge_gives_finite_nothing():
    graph = EdgeGraph(3, grid=2)
    states, projection = graph.project(torch.rand(2, 3, 4, 4), torch.zeros(2, 1, 4, 4))
    assert (projection == 0).all()
    assert torch.isfinite(graph.reason(graph.build_graph(states, projection))).all()


def edge_of(n: int, at: list[int]) -> torch.Tensor:
    edge = torch.zeros(n, 1, 64, 64)
    for i in at:
        edge[i, 0, 16:48, 16 + 4 * i] = 1
    return edge


def test_images_without_an_edge_add_nothing_but_count_in_the_mean(pair):
    maps_s, maps_t = features(pair)
    loss = EdgeReasoning(*pair, EdgeGraph(64), torch.full((16,), 2.0), "encoder.stride4").eval()
    both, first = loss(maps_s, maps_t, edge_of(2, [0, 1])), loss(maps_s, maps_t, edge_of(2, [0]))
    second = loss(maps_s, maps_t, edge_of(2, [1]))
    assert loss(maps_s, maps_t, edge_of(2, [])).item() == 0
    torch.testing.assert_close(first + second, both)


def test_edge_loss_is_the_mean_square_over_states_and_live_nodes(pair):
    maps_s, maps_t = features(pair)
    std = torch.linspace(0.5, 2, 16)
    loss = EdgeReasoning(*pair, EdgeGraph(64), std, "encoder.stride4").eval()
    edge = edge_of(2, [0, 1])
    small = torch.nn.functional.max_pool2d(edge, 4)
    h_s, h_t = loss.graph(loss.connector(maps_s["encoder.stride4"]), small), loss.graph(maps_t["encoder.stride4"], small)
    expected = 0.0
    for i in range(2):
        live = [k for k in range(16) if small[i, 0, k // 4 * 4 : k // 4 * 4 + 4, k % 4 * 4 : k % 4 * 4 + 4].any()]
        expected += sum(((h_s[i, c, k] - h_t[i, c, k]).item() / std[c].item()) ** 2 for c in range(16) for k in live) / (16 * len(live)) / 2
    assert loss(maps_s, maps_t, edge).item() == pytest.approx(expected, rel=1e-4)


def test_the_graph_stays_frozen_and_passes_gradients_on(pair):
    maps_s, maps_t = features(pair)
    loss = EdgeReasoning(*pair, EdgeGraph(64), torch.ones(16), "encoder.stride4")
    pair[0].zero_grad()
    loss(maps_s, maps_t, edge_of(2, [0, 1])).backward()
    assert all(p.grad is None for p in loss.graph.parameters())
    assert loss.connector[0].weight.grad.abs().sum() > 0
    assert pair[0].encoder[0][0].weight.grad.abs().sum() > 0


def test_derangement_gives_every_lesion_another_ones_edge():
    edge = edge_of(5, [0, 2, 3])
    shuffled = derange(edge)
    assert [i for i in range(5) if shuffled[i].any()] == [0, 2, 3]
    assert not any(torch.equal(shuffled[i], edge[i]) for i in (0, 2, 3))
    assert {tuple(e.flatten().tolist()) for e in shuffled} == {tuple(e.flatten().tolist()) for e in edge}


def test_a_lesion_without_a_partner_gets_no_edge():
    assert not derange(edge_of(3, [1])).any()


def test_the_head_fits_an_edge_that_the_features_show():
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
    nothing = head(graph, x, torch.zeros_like(edge))
    nothing.backward()
    assert nothing.item() == 0


def test_eagr_reads_the_edge_by_nearest_and_the_others_by_maximum():
    edge = torch.zeros(1, 1, 8, 8)
    edge[0, 0, 1, 5] = 1
    assert EdgeGraph(1, anchors="eagr").edge_at(edge, 4).sum() == 0
    assert EdgeGraph(1).edge_at(edge, 4).tolist() == [[[[0, 1], [0, 0]]]]


def test_segmentation_loss_is_binary_cross_entropy():
    logits, masks = torch.tensor([[[[0.3, -1.2]]]]), torch.tensor([[[[1.0, 0.0]]]])
    by_hand = -(math.log(1 / (1 + math.exp(-0.3))) + math.log(1 - 1 / (1 + math.exp(1.2)))) / 2
    assert segmentation_loss(logits, masks).item() == pytest.approx(by_hand)


def test_connectors_start_as_overhaul_says(pair):
    loss = FeatureRefinement(*pair, ("decoder.stride8",))
    convolution, norm = loss.connectors[0]
    assert isinstance(norm, nn.BatchNorm2d) and convolution.bias is None
    assert convolution.weight.std().item() == pytest.approx(math.sqrt(2 / 128), rel=0.1)


@pytest.mark.parametrize("build", [
    lambda pair, level: FeatureRefinement(*pair, (level,)), lambda pair, level: OnMaps(*pair, (level,), hint_loss, regress=True),
    lambda pair, level: EdgeReasoning(*pair, EdgeGraph(256), torch.ones(16), level), lambda pair, level: EdgeRelation(*pair, level, 4, "image"),
], ids=["feat", "rival", "edge", "relation"])  # fmt: skip
def test_a_map_that_only_the_teacher_has_is_asked_of_the_teacher(build, pair):
    assert build(pair, "encoder.stride16:decoder.stride16")


@pytest.mark.fault
def test_unequal_maps_are_named_the_students_first():
    with pytest.raises(LesionKDError, match=r"student's map is \(1, 1, 2, 2\), the teacher's \(1, 1, 3, 3\)"):
        partial_l2(torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 3, 3), torch.zeros(1))


@pytest.mark.fault
def test_odd_sizes_are_refused_with_both_shapes(pair):
    """Inference takes them; the two networks round them differently, so distillation does not."""
    images = torch.rand(2, 3, 70, 70)
    maps_s, maps_t = pair[0].forward_features(images)[1], pair[1].forward_features(images)[1]
    losses = [lambda: FeatureRefinement(*pair, ("decoder.stride4",))(maps_s, maps_t)]
    losses += [lambda: EdgeReasoning(*pair, EdgeGraph(64), torch.ones(16), "encoder.stride4")(maps_s, maps_t, torch.zeros(2, 1, 70, 70))]
    for loss in losses:
        with pytest.raises(LesionKDError, match=r"17, 17.*18, 18.*multiples of 32"):
            loss()
