"""Corners of L_feat and the rivals where a wrong sign, bound or factor would hide: rectangles, rare negatives, cancelling channels."""

import math

import pytest
import torch
from scipy.stats import norm as gaussian
from torch import nn

from lesionkd_core.losses.baselines import cwd_loss, dist_loss, kd_loss
from lesionkd_core.losses.feature_refinement import Connector, FeatureRefinement, bn_margin, empirical_margins, partial_l2, refinement_target
from lesionkd_core.networks import UNet


@pytest.fixture(scope="module")
def pair():
    torch.manual_seed(0)
    return UNet(width=2), UNet(width=3).eval().requires_grad_(False)


def drawn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def features(pair, n=2, height=64, width=32, seed=0):
    images = torch.rand(n, 3, height, width, generator=torch.Generator().manual_seed(seed))
    student, teacher = pair
    return student.train().forward_features(images)[1], teacher.forward_features(images)[1]


# margins

@pytest.mark.parametrize("z", [0.5, 3.0, 3.08, 3.1, 5.0, 50.0])
def test_margin_is_the_truncated_mean_down_to_a_share_of_one_in_a_thousand(z):
    norm = nn.BatchNorm2d(1)
    nn.init.constant_(norm.weight, -2.0)
    nn.init.constant_(norm.bias, 2.0 * z)
    share = gaussian.cdf(-z)
    expected = 2 * (z - gaussian.pdf(z) / share) if share > 0.001 else -6.0
    assert bn_margin(norm).item() == pytest.approx(expected, rel=2e-7)
    assert not bn_margin(norm).requires_grad


def test_measured_margins_of_one_negative_of_many_batches_and_of_half_precision():
    batches = [{"a": torch.full((1, 1, 1, 1), value)} for value in (-(2.0**24), *[-1.0] * 999)]
    margin = empirical_margins(batches, ["a"])["a"]
    assert margin.item() == pytest.approx(-(2.0**24 + 999) / 1000, rel=1e-7) and margin.dtype == torch.float32
    assert empirical_margins(batches[-1:], ["a"])["a"].item() == -1
    half = drawn(2, 1, 32, 32).bfloat16()
    values = half.double().numpy()
    assert empirical_margins([{"a": half}], ["a"])["a"].item() == pytest.approx(values[values < 0].mean(), rel=1e-5)


# partial L2 and its sum over levels

def test_a_target_of_zero_leaves_a_negative_student_alone():
    student = torch.tensor([-1.0, 1.0]).view(1, 1, 1, 2)
    assert partial_l2(student, torch.full((1, 1, 1, 2), -1.0), torch.zeros(1)).item() == 1


def test_the_gradient_of_partial_l2_scales_with_what_comes_after_it():
    student = torch.tensor([0.5]).view(1, 1, 1, 1).requires_grad_()
    (3 * partial_l2(student, torch.full((1, 1, 1, 1), 2.0), torch.zeros(1))).backward()
    assert student.grad.item() == pytest.approx(3 * 2 * (0.5 - 2.0))


def test_the_target_gives_the_teacher_no_gradient():
    assert not refinement_target(drawn(1, 2, 3, 3).requires_grad_(), torch.zeros(2))[0].requires_grad


def test_levels_of_a_rectangle_are_weighed_by_their_area(pair):
    maps_s, maps_t = features(pair)
    loss = FeatureRefinement(*pair, ("encoder.stride4", "decoder.stride2"), "area")
    sums = [partial_l2(loss.connectors[i](maps_s[s]), maps_t[t], getattr(loss, f"margin{i}")).item() for i, (s, t) in enumerate(loss.pairs)]
    assert loss(maps_s, maps_t).item() == pytest.approx((sums[0] * (16 * 8) / (32 * 16) + sums[1]) / 2, rel=1e-4)


# connector

@pytest.mark.parametrize("channels", [1, 3])
def test_the_connector_is_a_convolution_and_a_batch_norm_in_training_too(channels):
    torch.manual_seed(0)
    mine = Connector(channels, 4).double()
    for p in mine[1].parameters():
        nn.init.uniform_(p, 0.5, 2)
    theirs = nn.Sequential(nn.Conv2d(channels, 4, 1, bias=False), nn.BatchNorm2d(4)).double()
    theirs.load_state_dict(mine.state_dict())
    for seed in range(2):
        x, back = 0.03 * drawn(3, channels, 2, 3, seed=seed, dtype=torch.float64) + 0.7, drawn(3, 4, 2, 3, seed=9, dtype=torch.float64)
        inputs = [x.clone().requires_grad_() for _ in range(2)]
        outputs = [connector(x) for connector, x in zip((mine, theirs), inputs)]
        for out in outputs:
            (out * back).sum().backward()
        torch.testing.assert_close(*outputs)
        torch.testing.assert_close(*(x.grad for x in inputs))
    for mine_p, theirs_p in zip(mine.parameters(), theirs.parameters()):
        torch.testing.assert_close(mine_p.grad, theirs_p.grad)
    assert mine[1].num_batches_tracked == 2 and not mine[1].running_mean.requires_grad
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(mine.state_dict()[name], value)


def test_connectors_are_drawn_around_zero_with_the_width_of_overhaul():
    torch.manual_seed(0)
    weight = Connector(64, 128)[0].weight
    assert weight.mean().item() == pytest.approx(0, abs=0.01)
    assert weight.std().item() == pytest.approx(math.sqrt(2 / 128), rel=0.03)


def test_channels_that_cancel_each_other_give_no_negative_variance():
    connector = Connector(64, 32)
    with torch.no_grad():
        connector[0].weight -= connector[0].weight.mean(1, keepdim=True)
    for seed in range(5):
        same = 1e4 * drawn(2, 1, 8, 8, seed=seed).expand(2, 64, 8, 8)
        assert torch.isfinite(connector(same)).all()


# rivals

def test_temperatures_by_default_are_the_sources():
    student, teacher = drawn(2, 1, 4, 5), drawn(2, 1, 4, 5, seed=1)
    for loss, temperature in ((kd_loss, 4.0), (cwd_loss, 4.0), (dist_loss, 1.0)):
        assert torch.equal(loss(student, teacher), loss(student, teacher, temperature))
