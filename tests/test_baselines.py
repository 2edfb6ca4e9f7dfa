"""The published distillers by hand and against SciPy."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from scipy.ndimage import sobel
from scipy.special import expit, rel_entr, softmax
from scipy.stats import pearsonr

from lesionkd_core.config import DistillConfig, LesionKDError
from lesionkd_core.losses import Step, build_terms
from lesionkd_core.losses.baselines import (
    attention_loss,
    boundary_kd_loss,
    cwd_loss,
    dist_loss,
    hint_loss,
    kd_loss,
    sobel_loss,
    sobel_mask_loss,
)
from lesionkd_core.models import ResNet34UNet, UNet
from tests.tiny import step_of

LOSSES = [kd_loss, hint_loss, attention_loss, cwd_loss, dist_loss, sobel_loss]
TERMS = ("kd", "boundary_kd", "cwd", "dist", "sobel", "fitnets", "at")
every_loss = pytest.mark.parametrize("loss", LOSSES)
every_term = pytest.mark.parametrize("name", TERMS)


def tensors(*shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [2 * torch.randn(shape, generator=generator, dtype=dtype) - 1 for _ in range(2)]


def row(*values):
    """One channel of one image, in a row."""
    return torch.tensor(values, dtype=torch.float64).view(1, 1, 1, -1)


@pytest.fixture(scope="module")
def pair():
    torch.manual_seed(0)
    return UNet(width=2), ResNet34UNet().eval().requires_grad_(False)


def term(name, pair):
    return build_terms(DistillConfig(losses=name), *pair)[name]


# Each by hand -------------------------------------------------------------------------------------


def test_kd_by_hand():
    """T = 2: teacher 3/4 and student 1/2, then 1/2 and 3/4."""
    teacher, student = row(2 * math.log(3), 0), row(0, 2 * math.log(3))
    first = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)  # 0.1308
    second = 0.5 * math.log(2 / 3) + 0.5 * math.log(2)  # 0.1438
    assert kd_loss(student, teacher, 2.0).item() == pytest.approx(4 * (first + second) / 2)
    assert 4 * (first + second) / 2 == pytest.approx(0.5493, abs=1e-4)


def test_boundary_kd_is_a_mean_that_counts_edge_pixels_more():
    student, teacher = tensors(1, 1, 1, 3)
    edge = row(0, 1, 0.5)
    each = [kd_loss(student[..., i], teacher[..., i], 2.0).item() for i in range(3)]
    expected = np.average(each, weights=[1, 4, 2.5])
    found = boundary_kd_loss(student, teacher, edge, temperature=2.0, boundary=3.0)
    assert found.item() == pytest.approx(expected)
    without = boundary_kd_loss(student, teacher, torch.zeros_like(edge))
    torch.testing.assert_close(without, kd_loss(student, teacher))


def test_cwd_is_a_divergence_over_pixels_and_ignores_a_constant_on_a_channel():
    student, teacher = tensors(2, 3, 4, 5)
    p, q = (softmax(x.numpy().reshape(2, 3, 20) / 4, axis=2) for x in (student, teacher))
    assert cwd_loss(student, teacher).item() == pytest.approx(16 * rel_entr(q, p).sum(2).mean())
    shift = torch.arange(6.0).view(2, 3, 1, 1)
    moved = cwd_loss(student + shift, teacher - 2 * shift)
    torch.testing.assert_close(moved, cwd_loss(student, teacher))


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_dist_is_one_minus_pearson_over_the_pixels_of_a_batch(temperature):
    student, teacher = tensors(3, 1, 4, 5)
    p, q = (expit(x.numpy().ravel() / temperature) for x in (student, teacher))
    expected = temperature**2 * (1 - pearsonr(p, q).statistic)
    assert dist_loss(student, teacher, temperature).item() == pytest.approx(expected)


def test_a_constant_teacher_has_no_gradient_in_dist():
    student = tensors(2, 1, 4, 5)[0].requires_grad_()
    loss = dist_loss(student, torch.full_like(student, -2.0))
    loss.backward()
    assert loss.item() == pytest.approx(0.5)
    assert student.grad.abs().max() < 1e-9


def test_sobel_is_scipys_gradient_magnitude_of_the_probabilities():
    student, teacher = tensors(1, 1, 6, 7)
    magnitudes = []
    for x in (student, teacher):
        gradients = [sobel(expit(x.numpy()[0, 0]), axis, mode="nearest") / 8 for axis in (0, 1)]
        magnitudes.append(np.hypot(*gradients))
    expected = np.square(magnitudes[0] - magnitudes[1]).mean()
    assert sobel_loss(student, teacher).item() == pytest.approx(expected)


def test_sobel_of_the_mask_is_scipys_gradient_magnitude_of_the_mask():
    student = tensors(1, 1, 6, 7)[0]
    mask = np.zeros((6, 7))
    mask[2:4, 1:5] = 1
    magnitudes = [
        np.hypot(*(sobel(x, axis, mode="nearest") / 8 for axis in (0, 1)))
        for x in (expit(student.numpy()[0, 0]), mask)
    ]
    expected = np.square(magnitudes[0] - magnitudes[1]).mean()
    found = sobel_mask_loss(student, torch.from_numpy(mask).view(1, 1, 6, 7))
    assert found.item() == pytest.approx(expected, abs=1e-6)


def test_default_temperatures_are_those_of_the_sources():
    student, teacher = tensors(2, 1, 4, 5)
    for loss, temperature in ((kd_loss, 4.0), (cwd_loss, 4.0), (dist_loss, 1.0)):
        assert torch.equal(loss(student, teacher), loss(student, teacher, temperature))
    edge = (student > 0).double()
    expected = boundary_kd_loss(student, teacher, edge, temperature=4.0, boundary=5.0)
    assert torch.equal(boundary_kd_loss(student, teacher, edge), expected)


# All of them --------------------------------------------------------------------------------------


@every_loss
def test_loss_is_0_at_equality_and_positive_elsewhere(loss):
    student, teacher = (x.abs() for x in tensors(2, 1, 4, 5, dtype=torch.float32))
    assert loss(teacher, teacher).item() == 0
    assert loss(student, teacher).item() > 0


@every_loss
def test_gradient_is_that_of_finite_differences_and_the_teacher_gets_none(loss):
    student, teacher = (x.requires_grad_() for x in tensors(2, 1, 3, 4))
    assert torch.autograd.gradcheck(partial(loss, teacher=teacher.detach()), student)
    loss(student, teacher).backward()
    assert teacher.grad is None


@every_loss
def test_half_precision_is_summed_in_single(loss):
    student, teacher = tensors(2, 1, 32, 32, dtype=torch.bfloat16)
    got = loss(student, teacher)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, loss(student.float(), teacher.float()))


@every_loss
def test_extreme_logits_and_constant_maps_stay_finite(loss):
    random = tensors(2, 1, 4, 4, dtype=torch.float32)[0]
    for value in (-300.0, 0.0, 300.0):
        student = torch.full((2, 1, 4, 4), value, requires_grad=True)
        for teacher in (torch.zeros(2, 1, 4, 4), -student.detach(), random):
            got = loss(student, teacher)
            (gradient,) = torch.autograd.grad(got, student)
            assert torch.isfinite(got)
            assert torch.isfinite(gradient).all()


@pytest.mark.fault
@every_loss
def test_unequal_sizes_are_refused_with_both_shapes(loss):
    with pytest.raises(LesionKDError, match=r"8, 9.*8, 8"):
        loss(torch.rand(2, 1, 8, 9), torch.rand(2, 1, 8, 8))


# As terms of a training step ----------------------------------------------------------------------


@every_term
def test_every_term_trains_student_and_regressor_and_not_the_teacher(name, pair):
    module, edge = term(name, pair), torch.ones(2, 1, 64, 64)
    pair[0].zero_grad()
    module(step_of(*pair, edge)).backward()
    assert pair[0].encoder[0][0].weight.grad.abs().sum() > 0
    assert all(p.grad.abs().sum() > 0 for p in module.parameters())
    assert all(p.grad is None for p in pair[1].parameters())


class WithoutEncoderMaps(UNet):
    def feature_norms(self):
        norms = super().feature_norms().items()
        return {name: norm for name, norm in norms if name.startswith("decoder")}


@pytest.mark.fault
@pytest.mark.parametrize("name", ["fitnets", "at"])
def test_a_student_without_the_maps_of_a_term_is_refused(name, pair):
    with pytest.raises(LesionKDError, match="the student has no map 'encoder.stride"):
        term(name, (WithoutEncoderMaps(width=2), pair[1]))


LOGIT_TERMS = {
    "kd": kd_loss,
    "cwd": cwd_loss,
    "dist": dist_loss,
    "sobel": sobel_loss,
    "boundary_kd": lambda s, t: boundary_kd_loss(s, t, EDGE),
}
EDGE = (torch.rand(2, 1, 64, 64, generator=torch.Generator().manual_seed(0)) < 0.1).float()


def half_labelled():
    """Four images, two of them with masks; networks that disagree."""
    student, teacher = tensors(4, 1, 8, 8, dtype=torch.float32)
    student.requires_grad_()
    return Step(student, (teacher[:2] > 1).float(), teacher_logits=teacher)


@pytest.mark.parametrize("seg_loss", ["bce", "bce_dice"])
def test_pseudo_labels_are_the_teachers_hard_masks_of_images_without_a_mask(seg_loss):
    step = half_labelled()
    pseudo = build_terms(DistillConfig(losses="pseudo", seg_loss=seg_loss), UNet(width=2))["pseudo"]
    x, labels = (y[2:].detach().double().numpy() for y in (step.logits, step.teacher_logits))
    labels = expit(labels) > 0.5
    bce = -np.where(labels, np.log(expit(x)), np.log(expit(-x))).mean()
    both = (
        2 * (expit(x) * labels).sum((1, 2, 3)) / (expit(x).sum((1, 2, 3)) + labels.sum((1, 2, 3)))
    )
    expected = bce if seg_loss == "bce" else (bce + (1 - both).mean()) / 2
    loss = pseudo(step)
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    loss.backward()
    assert step.logits.grad[:2].abs().max() == 0 < step.logits.grad[2:].abs().min()


def test_pseudo_labels_of_a_batch_with_all_masks_add_0():
    step = half_labelled()
    whole = Step(step.logits[:2], step.masks, teacher_logits=step.teacher_logits[:2])
    assert build_terms(DistillConfig(losses="pseudo"), UNet(width=2))["pseudo"](whole).item() == 0


def test_sobel_of_the_mask_sees_images_with_masks_only_and_no_teacher():
    step = half_labelled()
    module = build_terms(DistillConfig(losses="sobel_mask"), UNet(width=2))["sobel_mask"]
    expected = sobel_mask_loss(step.logits[:2], step.masks)
    assert not module.needs_teacher
    assert torch.equal(module(Step(step.logits, step.masks)), expected)


@pytest.mark.parametrize("name", LOGIT_TERMS)
def test_terms_of_logits_compare_both_networks_logits(name, pair):
    step = step_of(*pair, EDGE)
    expected = LOGIT_TERMS[name](step.logits, step.teacher_logits)
    assert torch.equal(term(name, pair)(step), expected)


def test_the_hint_is_rectified_before_and_after_its_regressor(pair):
    module, step, level = term("fitnets", pair).eval(), step_of(*pair), "encoder.stride16"
    weight = module.regressor[0].weight.detach().double().numpy()[:, :, 0, 0]
    student, teacher = (
        maps[level].detach().double().numpy().clip(min=0) for maps in (step.maps, step.teacher_maps)
    )
    fresh_norm = math.sqrt(1 + 1e-5)
    regressed = (np.einsum("tc,nchw->nthw", weight, student) / fresh_norm).clip(min=0)
    expected = ((regressed - teacher) ** 2).mean() / 2
    assert module(step).item() == pytest.approx(expected, rel=1e-3)


def test_attention_transfer_is_a_sum_over_levels_of_rectified_maps(pair):
    module, step, expected = term("at", pair), step_of(*pair), 0.0
    assert not list(module.parameters())
    for level in module.LEVELS:
        maps = [m[level].detach().double().numpy() for m in (step.maps, step.teacher_maps)]
        q = [(x.clip(min=0) ** 2).sum(1).reshape(2, -1) for x in maps]
        unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in q]
        expected += ((unit[0] - unit[1]) ** 2).mean()
    assert module(step).item() == pytest.approx(expected, rel=1e-4)
