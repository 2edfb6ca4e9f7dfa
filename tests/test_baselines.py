"""The rivals by hand and against SciPy."""

import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.special import expit, logit, rel_entr, softmax
from scipy.stats import pearsonr

from lesionkd_core.config import LesionKDError
from lesionkd_core.losses import Step
from lesionkd_core.losses.baselines import OnLogits, OnMaps, attention_loss, cwd_loss, dist_loss, hint_loss, kd_loss
from lesionkd_core.networks import ResNet34UNet, UNet

LOSSES = [kd_loss, hint_loss, attention_loss, cwd_loss, dist_loss]
every_loss = pytest.mark.parametrize("loss", LOSSES)
MODULES = {
    "kd": lambda pair: OnLogits(kd_loss),
    "cwd": lambda pair: OnLogits(cwd_loss),
    "dist": lambda pair: OnLogits(dist_loss),
    "hint": lambda pair: OnMaps(*pair, ("encoder.stride16",), hint_loss, regress=True),
    "attention": lambda pair: OnMaps(*pair, ("decoder.stride8", "decoder.stride4"), attention_loss, regress=False),
    "cwd on maps": lambda pair: OnMaps(*pair, ("decoder.stride4",), cwd_loss, regress=True),
}
every_module = pytest.mark.parametrize("name", MODULES)


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


def step_of(pair, size=64):
    images = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    (logits, maps), (teacher_logits, teacher_maps) = (network.forward_features(images) for network in pair)
    nothing = torch.zeros(2, 1, size, size)
    return Step(logits, maps, nothing, nothing, teacher_logits, teacher_maps)


def test_logit_distillation_by_hand():
    """T = 2: teacher 3/4 against student 1/2, then 1/2 against 3/4."""
    teacher, student = row(2 * math.log(3), 0), row(0, 2 * math.log(3))
    first = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)  # 0.1308
    second = 0.5 * math.log(2 / 3) + 0.5 * math.log(2)  # 0.1438
    assert kd_loss(student, teacher, 2.0).item() == pytest.approx(4 * (first + second) / 2)
    assert 4 * (first + second) / 2 == pytest.approx(0.5493, abs=1e-4)


def test_logit_distillation_is_the_softmax_of_two_logits():
    student, teacher = tensors(2, 1, 5, 7)
    p, q = (softmax(np.stack([x.numpy() / 3, np.zeros(x.shape)]), axis=0) for x in (student, teacher))
    assert kd_loss(student, teacher, 3.0).item() == pytest.approx(9 * rel_entr(q, p).sum(0).mean())


def test_at_a_high_temperature_logits_are_matched():
    """Hinton et al. 2015, 2.1: the gradient nears the logits' difference, for two classes / 4, whatever T is."""
    student, teacher = tensors(1, 1, 3, 3)
    student.requires_grad_()
    kd_loss(student, teacher, 1000.0).backward()
    torch.testing.assert_close(student.grad * 9, (student.detach() - teacher) / 4, rtol=1e-3, atol=1e-3)


def test_hint_by_hand():
    assert hint_loss(row(1, 3), row(0, 1)).item() == (0.5 * 1 + 0.5 * 4) / 2


def test_attention_by_hand():
    """Q_S = (1, 4) / sqrt 17; Q_T = (1 + 4, 0) / 5, of two channels."""
    teacher = torch.tensor([[[[1.0, 0.0]], [[2.0, 0.0]]]])
    assert attention_loss(row(1, 2), teacher).item() == pytest.approx(((1 / math.sqrt(17) - 1) ** 2 + (4 / math.sqrt(17)) ** 2) / 2)


def test_attention_ignores_the_scale_of_every_image_of_either_network():
    student, teacher = torch.rand(2, 3, 4, 4), torch.rand(2, 5, 4, 4)
    scales = torch.tensor([7.0, 0.1]).view(2, 1, 1, 1)
    torch.testing.assert_close(attention_loss(student * scales, teacher / scales), attention_loss(student, teacher))


def test_attention_ignores_which_channel_is_active():
    student, teacher = torch.rand(2, 3, 4, 4), torch.rand(2, 5, 4, 4)
    torch.testing.assert_close(attention_loss(student[:, [2, 0, 1]], teacher.flip(1)), attention_loss(student, teacher))


def test_channel_wise_by_hand():
    """T = 2: the first channel's pixels share 1/2 1/2 against the teacher's 3/4 1/4, the second's are the same."""
    student = torch.tensor([[[[0.0, 0.0]], [[1.0, 2.0]]]])
    teacher = torch.tensor([[[[2 * math.log(3), 0.0]], [[1.0, 2.0]]]])
    assert cwd_loss(student, teacher, 2.0).item() == pytest.approx(4 / 2 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5)))


def test_channel_wise_is_a_divergence_over_pixels():
    student, teacher = tensors(2, 3, 4, 5)
    p, q = (softmax(x.numpy().reshape(2, 3, 20) / 4, axis=2) for x in (student, teacher))
    assert cwd_loss(student, teacher).item() == pytest.approx(16 * rel_entr(q, p).sum(2).mean())


def test_channel_wise_ignores_a_constant_on_a_channel():
    student, teacher = tensors(2, 3, 4, 5)
    shift = torch.arange(6.0).view(2, 3, 1, 1)
    torch.testing.assert_close(cwd_loss(student + shift, teacher - 2 * shift), cwd_loss(student, teacher))


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_dist_is_one_minus_pearson_over_the_batchs_pixels(temperature):
    student, teacher = tensors(3, 1, 4, 5)
    p, q = (expit(x.numpy().ravel() / temperature) for x in (student, teacher))
    assert dist_loss(student, teacher, temperature).item() == pytest.approx(temperature**2 * (1 - pearsonr(p, q).statistic))


def test_dist_lacks_of_both_relations_of_two_classes_a_step_function():
    """Intra is the same for both classes; inter is twice the share of pixels that the two decide differently."""
    student, teacher = tensors(2, 1, 4, 5)
    p, q = ([expit(sign * x.numpy().ravel()) for sign in (1, -1)] for x in (student, teacher))  # both classes, (2, pixels)
    intra = 1 - np.mean([pearsonr(a, b).statistic for a, b in zip(p, q)])
    inter = 1 - np.mean([pearsonr(a, b).statistic for a, b in zip(np.transpose(p), np.transpose(q))])
    differently = ((student > 0) != (teacher > 0)).double().mean().item()
    assert 0 < differently < 1
    assert dist_loss(student, teacher).item() == pytest.approx(intra + inter - 2 * differently)


def test_dist_ignores_the_scale_of_the_teachers_probabilities():
    student, teacher = tensors(2, 1, 4, 5)
    flatter = torch.from_numpy(logit(0.1 + 0.3 * expit(teacher.numpy())))
    torch.testing.assert_close(dist_loss(student, flatter), dist_loss(student, teacher))
    assert dist_loss(flatter, teacher).item() == pytest.approx(0, abs=1e-9)
    assert dist_loss(-teacher, teacher).item() == pytest.approx(2)


def test_dist_of_a_constant_teacher_teaches_nothing():
    student = tensors(2, 1, 4, 5)[0].requires_grad_()
    loss = dist_loss(student, torch.full_like(student, -2.0))
    loss.backward()
    assert loss.item() == pytest.approx(0.5)
    assert student.grad.abs().max() < 1e-9


@every_loss
def test_nothing_is_lost_at_equality_and_something_elsewhere(loss):
    student, teacher = (x.abs() for x in tensors(2, 1, 4, 5, dtype=torch.float32))
    assert loss(teacher, teacher).item() == 0
    assert loss(student, teacher).item() > 0


@every_loss
def test_the_teacher_gets_no_gradient(loss):
    student, teacher = (x.requires_grad_() for x in tensors(2, 1, 4, 5))
    loss(student, teacher).backward()
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None


@every_loss
def test_gradients_are_those_of_finite_differences(loss):
    student, teacher = tensors(2, 1, 3, 4)
    assert torch.autograd.gradcheck(partial(loss, teacher=teacher), student.requires_grad_())


@every_loss
def test_a_batch_given_twice_has_the_same_loss(loss):
    student, teacher = tensors(3, 1, 4, 5)
    torch.testing.assert_close(loss(torch.cat([student] * 2), torch.cat([teacher] * 2)), loss(student, teacher))


@every_loss
def test_memory_format_does_not_matter(loss):
    student, teacher = tensors(2, 3, 4, 5) if loss is not dist_loss else tensors(2, 1, 4, 5)
    torch.testing.assert_close(loss(*(x.to(memory_format=torch.channels_last) for x in (student, teacher))), loss(student, teacher))


@every_loss
def test_half_precision_is_summed_in_single(loss):
    student, teacher = tensors(2, 1, 32, 32, dtype=torch.bfloat16)
    got = loss(student, teacher)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, loss(student.float(), teacher.float()))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(loss(student, teacher), got)


@every_loss
def test_sums_over_many_pixels_keep_their_digits(loss):
    """A batch of 16 at 256 px, a small lesion in the teacher's eye, the student close to it."""
    noise, teacher = tensors(16, 1, 256, 256, dtype=torch.float32)
    teacher[:, :, 20:60, 20:60] += 8
    student = teacher + 0.05 * noise
    assert loss(student, teacher).item() == pytest.approx(loss(student.double(), teacher.double()).item(), rel=3e-4)


@every_loss
def test_extreme_logits_and_dead_maps_stay_finite(loss):
    for value in (-300.0, 0.0, 300.0):
        student, teacher = torch.full((2, 1, 4, 4), value, requires_grad=True), torch.zeros(2, 1, 4, 4)
        for one, other in ((student, teacher), (student, -student.detach()), (student, tensors(2, 1, 4, 4, dtype=torch.float32)[0])):
            got = loss(one, other)
            (gradient,) = torch.autograd.grad(got, student)
            assert torch.isfinite(got)
            assert torch.isfinite(gradient).all()


@every_module
def test_every_rival_teaches_student_and_regressors_and_not_the_teacher(name, pair):
    module, step = MODULES[name](pair), step_of(pair)
    pair[0].zero_grad()
    module(step).backward()
    assert pair[0].encoder[0][0].weight.grad.abs().sum() > 0
    assert all(p.grad.abs().sum() > 0 for p in module.parameters())
    assert all(p.grad is None for p in pair[1].parameters())


@every_module
def test_regressors_run_in_single_precision_too(name, pair):
    module, step = MODULES[name](pair), step_of(pair)
    maps, teacher_maps = ({level: x.bfloat16() for level, x in maps.items()} for maps in (step.maps, step.teacher_maps))
    half = Step(step.logits.bfloat16(), maps, step.masks, step.edge, step.teacher_logits.bfloat16(), teacher_maps)
    outside = module(half)
    assert outside.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(module(half), outside)


@pytest.mark.parametrize(("name", "level"), [("hint", "encoder.stride16"), ("cwd on maps", "decoder.stride4")])
def test_maps_are_rectified_before_and_after_the_regressor(name, level, pair):
    module, step = MODULES[name](pair).eval(), step_of(pair)
    weight = module.regressors[0][0][0].weight.detach().double().numpy()[:, :, 0, 0]
    student, teacher = (maps[level].detach().double().numpy().clip(min=0) for maps in (step.maps, step.teacher_maps))
    regressed = (np.einsum("tc,nchw->nthw", weight, student) / math.sqrt(1 + 1e-5)).clip(min=0)  # a fresh BN in eval mode
    if name == "hint":
        expected = ((regressed - teacher) ** 2).mean() / 2
    else:
        p, q = (softmax(x.reshape(*x.shape[:2], -1) / 4, axis=2) for x in (regressed, teacher))
        expected = 16 * rel_entr(q, p).sum(2).mean()
    assert module(step).item() == pytest.approx(expected, rel=1e-3)


def test_attention_sums_over_levels_of_rectified_maps(pair):
    module, step = MODULES["attention"](pair), step_of(pair)
    assert not list(module.parameters())
    expected = 0.0
    for level in ("decoder.stride8", "decoder.stride4"):
        q = [(maps[level].detach().double().numpy().clip(min=0) ** 2).sum(1).reshape(2, -1) for maps in (step.maps, step.teacher_maps)]
        unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in q]
        expected += ((unit[0] - unit[1]) ** 2).mean()
    assert module(step).item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", ["hint", "cwd on maps"])
def test_no_regressed_channel_is_dead_at_the_start(name, pair):
    module, step = MODULES[name](pair).train(), step_of(pair)
    regressed = module.regressors[0](F.relu(step.maps[module.pairs[0][0]]))
    assert (regressed.flatten(2).amax((0, 2)) > 0).all()


@pytest.mark.fault
def test_maps_of_unequal_stride_are_refused(pair):
    with pytest.raises(LesionKDError, match="equal stride"):
        OnMaps(*pair, ("encoder.stride4:decoder.stride8",), attention_loss, regress=False)


@pytest.mark.fault
@pytest.mark.parametrize("loss", LOSSES)
def test_unequal_sizes_are_refused_with_both_shapes(loss):
    with pytest.raises(LesionKDError, match=r"8, 9.*8, 8"):
        loss(torch.rand(2, 1, 8, 9), torch.rand(2, 1, 8, 8))
