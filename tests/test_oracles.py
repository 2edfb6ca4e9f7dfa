"""The method against numbers of the original implementations, to 1e-5."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from lesionkd_core.edges import edge_label
from lesionkd_core.losses import EdgeGraph, FeatureRefinement, Step
from lesionkd_core.losses.feature_refinement import bn_margin, margin_relu, partial_l2
from lesionkd_core.models import Network
from tests.conftest import oracle

CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def tensor(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)


def batch_norm(weight, bias) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(len(weight))
    norm.load_state_dict(norm.state_dict() | {"weight": tensor(weight), "bias": tensor(bias)})
    return norm


def test_edge_label_is_the_original_rule():
    case = oracle("eagr.edge_label")
    assert (edge_label(np.array(case["label"])) == np.array(case["edge"]) / 255).all()


@pytest.mark.parametrize("case", oracle("overhaul.margin_cases"))
def test_margin_is_the_expected_negative_response(case):
    margin = bn_margin(batch_norm([case["weight"]], [case["bias"]]))
    torch.testing.assert_close(margin, tensor([case["margin"]]), **CLOSE)


def test_margin_of_a_tiny_weight_is_the_bias():
    case = oracle("overhaul.margin_tiny_weight_negative_bias")
    margin = bn_margin(batch_norm([case["weight"]], [case["bias"]]))
    torch.testing.assert_close(margin, tensor(case["original_result"]), **CLOSE)


def test_partial_l2_and_its_gradient():
    case = oracle("overhaul.partial_l2_elementwise")
    teacher, student = (
        tensor(case[key]).view(1, 1, 1, -1) for key in ("teacher_pre_relu", "student")
    )
    margin = tensor([case["margin"]])
    student.requires_grad_()
    loss = partial_l2(student, teacher, margin)
    loss.backward()
    target = tensor(case["target_after_margin_relu"])
    torch.testing.assert_close(margin_relu(teacher, margin).flatten(), target, **CLOSE)
    torch.testing.assert_close(loss, tensor(case["loss_sum"]), **CLOSE)
    torch.testing.assert_close(student.grad.flatten(), tensor(case["grad_student"]), **CLOSE)
    for i, expected in enumerate(case["loss_per_element"]):
        one = slice(i, i + 1)
        alone = partial_l2(student.detach()[..., one], teacher[..., one], margin)
        torch.testing.assert_close(alone, tensor(expected), **CLOSE)


class Maps(Network):
    """A network of which only the norms of its maps are used."""

    def __init__(self, norms):
        super().__init__()
        self.norms = norms

    def feature_norms(self):
        return self.norms


def test_whole_distiller_pass():
    case = oracle("overhaul.distiller_classification")
    names = [f"decoder.stride{stride}" for stride in (2, 4, 8)]  # shallowest first
    teacher, student = ([tensor(x) for x in case[f"{who}_feats"]] for who in ("teacher", "student"))
    affine = zip(names, case["teacher_bn_weight"], case["teacher_bn_bias"])
    norms_t = {name: batch_norm(weight, bias) for name, weight, bias in affine}
    norms_s = {name: nn.BatchNorm2d(x.shape[1]) for name, x in zip(names, student)}
    levels = tuple(reversed(names))
    loss = FeatureRefinement(Maps(norms_s), Maps(norms_t), levels, "halving")
    for i, weight in enumerate(case["conv_weight"]):
        connector, margin = loss.connectors[i], loss.get_buffer(f"margin{i}")
        connector[0].weight.data = tensor(weight).view_as(connector[0].weight)
        torch.testing.assert_close(margin, tensor(case["margins"][i]), **CLOSE)
        level = partial_l2(connector(student[i]), teacher[i], margin)
        torch.testing.assert_close(level, tensor(case["loss_sum_per_level"][i]), **CLOSE)
    maps, teacher_maps = dict(zip(names, student)), dict(zip(names, teacher))
    total = loss(Step(torch.zeros(1), torch.zeros(1), maps, teacher_maps=teacher_maps))
    torch.testing.assert_close(total, tensor(case["scaled_cifar"]), **CLOSE)


def test_graph_convolution():
    case = oracle("eagr.gcn")
    graph = EdgeGraph(1, states=case["num_state"], grid=2)
    graph.node_mixing.weight.data = tensor(case["conv1_weight_node_by_node"]).view(4, 4)
    graph.node_mixing.bias.data = tensor(case["conv1_bias"])
    graph.state_mixing.weight.data = tensor(case["conv2_weight_state_by_state"]).view(3, 3)
    torch.testing.assert_close(graph.reason(tensor(case["x"])).relu(), tensor(case["y"]), **CLOSE)


def graph_with(case: dict, normalize: str) -> EdgeGraph:
    """An EdgeGraph in EAGR's mode with the weights of an oracle."""
    grid = math.isqrt(case["num_n"])
    graph = EdgeGraph(case["num_in"], case["num_s"], grid, anchors="eagr", normalize=normalize)
    weights = {name: tensor(value) for name, value in case["weights"].items()}
    graph.load_state_dict(
        {
            "phi.weight": weights["conv_state.weight"],
            "phi.bias": weights["conv_state.bias"],
            "theta.weight": weights["conv_proj.weight"],
            "theta.bias": weights["conv_proj.bias"],
            "node_mixing.weight": weights["gcn.conv1.weight"].squeeze(-1),
            "node_mixing.bias": weights["gcn.conv1.bias"],
            "state_mixing.weight": weights["gcn.conv2.weight"].squeeze(-1),
        }
    )
    return graph


@pytest.mark.parametrize(
    ("name", "normalize"), [("eagr_module_small", "none"), ("eagr_module_normalize", "size")]
)
def test_eagr_module(name, normalize):
    case = oracle(f"eagr.{name}")
    graph = graph_with(case, normalize)
    x, edge = tensor(case["x"]).requires_grad_(), tensor(case["edge_prob_channel1"])
    anchors = graph.anchors_of(graph.theta(x), edge)
    states, projection = graph.project(x, edge)
    nodes = graph.build_graph(states, projection)
    reasoned = graph.reason(nodes).relu()
    torch.testing.assert_close(anchors, tensor(case["anchors_nsK"]), **CLOSE)
    expected = tensor(case["proj_nKL_softmax_over_nodes_dim1"])
    torch.testing.assert_close(projection, expected, **CLOSE)
    torch.testing.assert_close(nodes, tensor(case["node_state_nsK"]), **CLOSE)
    torch.testing.assert_close(reasoned, tensor(case["node_rel_nsK"]), **CLOSE)
    reasoned.square().mean().backward()
    torch.testing.assert_close(x.grad, tensor(case["grad_of_that_wrt_x"]), **CLOSE)
