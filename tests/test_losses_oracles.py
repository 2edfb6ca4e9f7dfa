"""The losses against numbers of the original implementations, to 1e-5."""

import math

import pytest
import torch
from torch import nn

from lesionkd_core.losses.edge_reasoning import EdgeGraph
from lesionkd_core.losses.feature_refinement import FeatureRefinement, bn_margin, margin_relu, partial_l2
from tests.conftest import oracle

CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def tensor(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)


def batch_norm(weight, bias) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(len(weight))
    norm.load_state_dict(norm.state_dict() | {"weight": tensor(weight), "bias": tensor(bias)})
    return norm


@pytest.mark.parametrize("case", oracle("overhaul.margin_cases"))
def test_margin_is_the_expected_negative_response(case):
    torch.testing.assert_close(bn_margin(batch_norm([case["weight"]], [case["bias"]])), tensor([case["margin"]]), **CLOSE)


def test_margin_of_a_tiny_weight_is_the_bias():
    case = oracle("overhaul.margin_tiny_weight_negative_bias")
    torch.testing.assert_close(bn_margin(batch_norm([case["weight"]], [case["bias"]])), tensor(case["original_result"]), **CLOSE)


@pytest.mark.parametrize(("bias", "margin"), [(0.1, 0.0), (0.0, 0.0), (-0.4, -0.4)])
def test_margin_of_a_constant_channel_is_its_negative_part(bias, margin):
    torch.testing.assert_close(bn_margin(batch_norm([0.0], [bias])), tensor([margin]))


def test_margin_agrees_with_sampling():
    x = torch.randn(2_000_000, generator=torch.Generator().manual_seed(0)) * 0.7 + 0.2
    assert abs(bn_margin(batch_norm([-0.7], [0.2])).item() - x[x < 0].mean().item()) < 2e-3


def test_partial_l2_and_its_gradient():
    case = oracle("overhaul.partial_l2_elementwise")
    teacher, student = (tensor(case[k]).view(1, 1, 1, -1) for k in ("teacher_pre_relu", "student"))
    margin = tensor([case["margin"]])
    student.requires_grad_()
    loss = partial_l2(student, teacher, margin)
    loss.backward()
    torch.testing.assert_close(margin_relu(teacher, margin).flatten(), tensor(case["target_after_margin_relu"]), **CLOSE)
    torch.testing.assert_close(loss, tensor(case["loss_sum"]), **CLOSE)
    torch.testing.assert_close(student.grad.flatten(), tensor(case["grad_student"]), **CLOSE)
    for i, expected in enumerate(case["loss_per_element"]):
        one = partial_l2(student.detach()[..., i : i + 1], teacher[..., i : i + 1], margin)
        torch.testing.assert_close(one, tensor(expected), **CLOSE)


class Maps(nn.Module):
    """A network of which only the norms of its maps are asked."""

    def __init__(self, norms):
        super().__init__()
        self.norms = norms

    def feature_norms(self):
        return self.norms


def test_distiller_pass_as_the_original_sums_it():
    case = oracle("overhaul.distiller_classification")
    names = [f"decoder.stride{s}" for s in (2, 4, 8)]  # shallowest first, as in the original
    teacher = [tensor(x) for x in case["teacher_feats"]]
    student = [tensor(x) for x in case["student_feats"]]
    norms_t = {n: batch_norm(w, b) for n, w, b in zip(names, case["teacher_bn_weight"], case["teacher_bn_bias"])}
    norms_s = {n: nn.BatchNorm2d(x.shape[1]) for n, x in zip(names, student)}
    loss = FeatureRefinement(Maps(norms_s), Maps(norms_t), tuple(reversed(names)), "halving")
    for i, weight in enumerate(case["conv_weight"]):
        loss.connectors[i][0].weight.data = tensor(weight).view_as(loss.connectors[i][0].weight)
        torch.testing.assert_close(getattr(loss, f"margin{i}"), tensor(case["margins"][i]), **CLOSE)
        level = partial_l2(loss.connectors[i](student[i]), teacher[i], getattr(loss, f"margin{i}"))
        torch.testing.assert_close(level, tensor(case["loss_sum_per_level"][i]), **CLOSE)
    total = loss(dict(zip(names, student)), dict(zip(names, teacher)))
    torch.testing.assert_close(total, tensor(case["scaled_cifar"]), **CLOSE)


def graph_with(case: dict, **options) -> EdgeGraph:
    """An EdgeGraph in EAGR's mode with the oracle's weights."""
    weights = case["weights"]
    graph = EdgeGraph(case["num_in"], states=case["num_s"], grid=math.isqrt(case["num_n"]), anchors="eagr", **options)
    graph.load_state_dict({
        "phi.weight": tensor(weights["conv_state.weight"]), "phi.bias": tensor(weights["conv_state.bias"]),
        "theta.weight": tensor(weights["conv_proj.weight"]), "theta.bias": tensor(weights["conv_proj.bias"]),
        "node_mixing.weight": tensor(weights["gcn.conv1.weight"]).squeeze(-1), "node_mixing.bias": tensor(weights["gcn.conv1.bias"]),
        "state_mixing.weight": tensor(weights["gcn.conv2.weight"]).squeeze(-1),
    })
    return graph


def test_graph_convolution():
    case = oracle("eagr.gcn")
    graph = EdgeGraph(1, states=case["num_state"], grid=2)
    graph.node_mixing.weight.data = tensor(case["conv1_weight_node_by_node"]).view(4, 4)
    graph.node_mixing.bias.data = tensor(case["conv1_bias"])
    graph.state_mixing.weight.data = tensor(case["conv2_weight_state_by_state"]).view(3, 3)
    torch.testing.assert_close(graph.reason(tensor(case["x"])).relu(), tensor(case["y"]), **CLOSE)


@pytest.mark.parametrize(("name", "normalize"), [("eagr_module_small", "none"), ("eagr_module_normalize", "size")])
def test_eagr_module(name, normalize):
    case = oracle(f"eagr.{name}")
    graph = graph_with(case, normalize=normalize)
    x, edge = tensor(case["x"]).requires_grad_(), tensor(case["edge_prob_channel1"])
    anchors = graph.anchors_of(graph.theta(x), graph.cells(edge))
    states, projection = graph.project(x, edge)
    nodes = graph.build_graph(states, projection)
    reasoned = graph.reason(nodes).relu()
    for got, key in ((anchors, "anchors_nsK"), (projection, "proj_nKL_softmax_over_nodes_dim1"), (nodes, "node_state_nsK"), (reasoned, "node_rel_nsK")):
        torch.testing.assert_close(got, tensor(case[key]), **CLOSE)
    reasoned.square().mean().backward()
    torch.testing.assert_close(x.grad, tensor(case["grad_of_that_wrt_x"]), **CLOSE)
