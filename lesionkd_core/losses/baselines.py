"""Published distillation losses that the method is compared with, at the same budget.

Each is a function of the student's and the teacher's tensors, computed in float32; the teacher gets
no gradient. Functions of feature maps take activations after the ReLU.
"""

from __future__ import annotations

from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from ..models import Network, match_levels
from .feature_refinement import Connector
from .segmentation import SegmentationLoss
from .terms import LossTerm, Setup, Step, register, require_same_size


def _pair(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    require_same_size(student, teacher)
    return _precise(student), _precise(teacher.detach())


def _precise(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def kd_loss(student: Tensor, teacher: Tensor, temperature: float = 4.0) -> Tensor:
    """Logit distillation: match the teacher's probability of each pixel.

    L = T^2 mean KL(q || p), q = sigmoid(t / T), p = sigmoid(s / T): the paper's softmax over the
    two logits (z, 0). T^2 keeps the size of the gradient when T changes.

    Parameters
    ----------
    student, teacher : (N, 1, H, W)
        Logits s and t.
    temperature : float
        T; the paper uses 2.5 to 4 for small students.

    Returns
    -------
    ()
        Mean over N and pixels.

    Source: Hinton et al. 2015, section 2.
    """
    return _kd_map(student, teacher, temperature).mean()


def _kd_map(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 KL(q || p) of each pixel, (N, 1, H, W)."""
    s, t = (x / temperature for x in _pair(student, teacher))
    q = t.sigmoid()
    cross, own = (F.binary_cross_entropy_with_logits(x, q, reduction="none") for x in (s, t))
    return temperature**2 * (cross - own)


def boundary_kd_loss(
    student: Tensor, teacher: Tensor, edge: Tensor, temperature: float = 4.0, boundary: float = 5.0
) -> Tensor:
    """Logit distillation in which pixels of the edge label count more.

    L = sum w KL / sum w, w = 1 + boundary x edge, with the pixelwise KL of `kd_loss`.

    Parameters
    ----------
    student, teacher, edge : (N, 1, H, W)
        Logits, and the edge label in 0..1.

    Returns
    -------
    ()

    Source: after BPKD (Liu et al. 2024), which distils edge and body separately; here they are one
    weighted term.
    """
    weight = 1 + boundary * edge
    return (weight * _kd_map(student, teacher, temperature)).sum() / weight.sum()


def hint_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """FitNets hint: L = 1/2 mean (r(v) - u)^2, with hint u, guided map v and regressor r.

    Parameters
    ----------
    student, teacher : (N, C, H, W)
        Activations r(v) and u.

    Returns
    -------
    ()
        Mean over all elements; the paper's sum would grow with image and teacher.

    Source: Romero et al. 2015, equation 3. There the hint trains the lower layers first; here it is
    a term beside L_seg, so that all arms have equal steps.
    """
    return 0.5 * F.mse_loss(*_pair(student, teacher))


def attention_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Attention transfer: be active where the teacher is, in whichever channels.

    L = mean (Q_S / ||Q_S|| - Q_T / ||Q_T||)^2, Q = sum over channels of A^2, a vector for each
    image.

    Parameters
    ----------
    student, teacher : (N, C_S, H, W), (N, C_T, H, W)
        Activations A; channels may differ.

    Returns
    -------
    ()
        Mean over N and pixels, as in the authors' code, whose weight is 1000.

    Source: Zagoruyko & Komodakis 2017, equation 2 with F_sum^2 and p = 2.
    """
    ours, theirs = (_precise(x).square().sum(1) for x in (student, teacher.detach()))
    require_same_size(ours, theirs)
    return F.mse_loss(F.normalize(ours.flatten(1), dim=1), F.normalize(theirs.flatten(1), dim=1))


def cwd_loss(student: Tensor, teacher: Tensor, temperature: float = 4.0) -> Tensor:
    """Channel-wise distillation: match each channel's softmax over pixels.

    L = T^2 / C sum_c KL(phi(t_c) || phi(s_c)), phi(x_c) = softmax over pixels of x_c / T.

    Parameters
    ----------
    student, teacher : (N, C, H, W)
        Logits, as the paper prefers, or activations of equal C.
    temperature : float
        T; 4 in the authors' code, with a weight of 3 on logits.

    Returns
    -------
    ()
        Mean over N and C of the sum over pixels.

    Source: Shu et al. 2021.
    """
    ours, theirs = ((x.flatten(2) / temperature).log_softmax(2) for x in _pair(student, teacher))
    divergence = F.kl_div(ours, theirs, reduction="sum", log_target=True)
    return temperature**2 / (student.shape[0] * student.shape[1]) * divergence


def dist_loss(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """DIST: the student's probabilities correlate with the teacher's over all pixels of a batch.

    L = T^2 (1 - rho(p_S, p_T)), Pearson's rho: the intra-class relation. With two classes
    (p, 1 - p) the paper's inter-class relation has no gradient (its rho is +1 or -1) and is left
    out.

    Parameters
    ----------
    student, teacher : (N, 1, H, W)
        Logits; p = sigmoid(logit / T).
    temperature : float
        T; 1 in the authors' segmentation code.

    Returns
    -------
    ()
        0 for equal probabilities up to scale and shift, T^2 for unrelated, 2 T^2 for opposed ones.

    Source: Huang et al. 2022.
    """
    ours, theirs = (
        F.batch_norm((x / temperature).sigmoid(), None, None, training=True, eps=1e-12)
        for x in _pair(student, teacher)
    )
    return temperature**2 / 2 * F.mse_loss(ours, theirs)  # 1 - mean(a b) = mean (a - b)^2 / 2


def sobel_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Match the gradient magnitudes of the two probability maps, by Sobel's filters.

    L = mean (|grad p_S| - |grad p_T|)^2, p = sigmoid(logit).

    Parameters
    ----------
    student, teacher : (N, 1, H, W)
        Logits.

    Returns
    -------
    ()

    A simple form of edge distillation, without a single source.
    """
    ours, theirs = (_gradient(x.sigmoid()) for x in _pair(student, teacher))
    return F.mse_loss(ours, theirs)


def sobel_mask_loss(student: Tensor, masks: Tensor) -> Tensor:
    """Match the gradient magnitudes of the probabilities and of the mask, by Sobel's filters.

    L = mean (|grad p_S| - |grad y|)^2: `sobel_loss` without a teacher.

    Parameters
    ----------
    student, masks : (N, 1, H, W)
        Logits, and masks, 0 or 1.

    Returns
    -------
    ()
    """
    ours, truth = _pair(student, masks)
    return F.mse_loss(_gradient(ours.sigmoid()), _gradient(truth))


def _gradient(x: Tensor) -> Tensor:
    """Magnitude of the Sobel gradient, (N, 1, H, W) -> the same; borders replicated."""
    kernel = x.new_tensor([[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]]) / 8
    kernels = torch.stack([kernel, kernel.T]).unsqueeze(1)
    both = F.conv2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), kernels)
    return (both.square().sum(1, keepdim=True) + 1e-12).sqrt()


AROUND_ONE = (0.3, 1.0, 3.0, 10.0)
"""Weights that notebook 05 tries."""


@register("kd", label="logit KD", weight=3.0, sweep=AROUND_ONE)
class LogitDistillation(LossTerm):
    """`kd_loss`."""

    def forward(self, step: Step) -> Tensor:
        return kd_loss(step.logits, step.teacher_logits)


@register("boundary_kd", label="boundary KD", weight=3.0, sweep=AROUND_ONE, options=("edge_width",))
class BoundaryDistillation(LossTerm):
    """`boundary_kd_loss`."""

    def forward(self, step: Step) -> Tensor:
        return boundary_kd_loss(step.logits, step.teacher_logits, step.edge)


@register("cwd", label="CWD", weight=0.3, sweep=(0.1, 0.3, 1.0, 3.0))
class ChannelwiseDistillation(LossTerm):
    """`cwd_loss`."""

    def forward(self, step: Step) -> Tensor:
        return cwd_loss(step.logits, step.teacher_logits)


@register("dist", label="DIST", weight=1.0, sweep=AROUND_ONE)
class RelationDistillation(LossTerm):
    """`dist_loss`."""

    def forward(self, step: Step) -> Tensor:
        return dist_loss(step.logits, step.teacher_logits)


@register("sobel", label="Sobel", weight=30.0, sweep=(3.0, 10.0, 30.0, 100.0))
class SobelDistillation(LossTerm):
    """`sobel_loss`."""

    def forward(self, step: Step) -> Tensor:
        return sobel_loss(step.logits, step.teacher_logits)


@register("sobel_mask", label="Sobel of mask", weight=30.0, sweep=(3.0, 10.0, 30.0, 100.0))
class SobelOfMask(LossTerm):
    """`sobel_mask_loss` on the images that have masks: what `sobel` gains without a teacher."""

    needs_teacher: ClassVar[bool] = False

    def forward(self, step: Step) -> Tensor:
        return sobel_mask_loss(step.logits[: len(step.masks)], step.masks)


@register("pseudo", label="pseudo-labels", weight=1.0, sweep=AROUND_ONE)
class PseudoLabels(SegmentationLoss):
    """L_seg with the teacher's hard masks (probability above 0.5), where masks are not used.

    It is computed on the second half of a batch: as many of all training images as have masks in
    the first. 0 for a batch in which all images have masks.

    Source: Lee 2013, "Pseudo-Label"; there the network labels images for itself, here the teacher
    does.
    """

    needs_teacher: ClassVar[bool] = True

    def forward(self, step: Step) -> Tensor:
        first = len(step.masks)
        logits, labels = step.logits[first:], step.teacher_logits[first:] > 0
        if not len(logits):
            return step.logits.new_zeros(())
        return self.loss(logits, labels.to(logits.dtype))


@register(
    "fitnets", label="FitNets", weight=0.1, sweep=(0.03, 0.1, 0.3, 1.0), options=("connector_lr",)
)
class Hint(LossTerm):
    """`hint_loss` at stride 16, where the student's encoder ends.

    The regressor is a 1x1 convolution, BatchNorm and the teacher's ReLU. Without the BatchNorm the
    few nonnegative channels of a small student leave many outputs below zero for good.
    """

    LEVEL = "encoder.stride16"

    def __init__(self, student: Network, teacher: Network) -> None:
        super().__init__()
        match_levels(student, teacher, (self.LEVEL,))
        ours, theirs = student.feature_channels(), teacher.feature_channels()
        self.regressor = Connector(ours[self.LEVEL], theirs[self.LEVEL])

    @classmethod
    def build(cls, setup: Setup) -> Self:
        return cls(setup.student, setup.teacher)

    def forward(self, step: Step) -> Tensor:
        regressed = self.regressor(F.relu(step.maps[self.LEVEL].float()))
        return hint_loss(F.relu(regressed), F.relu(step.teacher_maps[self.LEVEL]))


@register("at", label="attention transfer", weight=30.0, sweep=(10.0, 30.0, 100.0, 1000.0))
class AttentionTransfer(LossTerm):
    """`attention_loss`, summed over the encoder maps at strides 4, 8 and 16."""

    LEVELS = ("encoder.stride4", "encoder.stride8", "encoder.stride16")

    @classmethod
    def build(cls, setup: Setup) -> Self:
        match_levels(setup.student, setup.teacher, cls.LEVELS)
        return cls()

    def forward(self, step: Step) -> Tensor:
        maps = [(F.relu(step.maps[n]), F.relu(step.teacher_maps[n])) for n in self.LEVELS]
        return torch.stack([attention_loss(s, t) for s, t in maps]).sum()
