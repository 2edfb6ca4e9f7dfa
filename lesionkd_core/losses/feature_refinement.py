"""L_feat: deep feature refinement (step S3; Heo et al., ICCV 2019)."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Hashable, Iterable
from functools import partial, reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ranks
from ..config import LesionKDError
from ..networks import Network, match_levels, stride_of

Once = Callable[[Hashable, Callable[[], Any]], Any]
"""What makes a thing under a key, or finds it made: `Step.once`."""


def bn_margin(bn: nn.BatchNorm2d) -> Tensor:
    """Expected negative response of each channel, read off the BatchNorm before the ReLU.

    With x ~ N(mu, sigma^2), mu = beta, sigma = |gamma|:
    m = E[x | x < 0] = mu - sigma exp(-(mu/sigma)^2 / 2) / (sqrt(2 pi) Phi(-mu/sigma)),
    or -3 sigma where x < 0 is rarer than 0.001, or min(beta, 0) where gamma = 0 (x is constant).

    Returns
    -------
    (C,)
        At most 0 but for rounding, float32, no gradient.

    Examples
    --------
    A standard normal response is -sqrt(2 / pi) on average where it is negative:

    >>> bn_margin(nn.BatchNorm2d(2))
    tensor([-0.7979, -0.7979])

    Source: Heo et al. 2019, margin ReLU; METHOD, L_feat.
    """
    sigma, mu = bn.weight.detach().cpu().double().abs(), bn.bias.detach().cpu().double()
    z = mu / sigma.clamp_min(torch.finfo(torch.float64).tiny)
    negative_share = torch.special.ndtr(-z)
    mean_below_zero = mu - sigma * torch.exp(-(z**2) / 2) / (math.sqrt(2 * math.pi) * negative_share.clamp_min(1e-300))
    margin = torch.where(negative_share > 0.001, mean_below_zero, -3 * sigma)
    return torch.where(sigma == 0, mu.clamp_max(0), margin).float().to(bn.weight.device)


def margin_relu(x: Tensor, margin: Tensor) -> Tensor:
    """Keep what the teacher is sure of, flatten the rest of its negatives (step S3).

    Parameters
    ----------
    x : (N, C, H, W)
        Teacher feature map before its ReLU.
    margin : (C,)
        Expected negative response of each channel, from `bn_margin`; at most 0.

    Returns
    -------
    (N, C, H, W)
        max(x, margin), channel by channel.

    Examples
    --------
    >>> response = torch.tensor([-3.0, -0.5, 2.0]).view(1, 1, 1, 3)
    >>> margin_relu(response, torch.tensor([-0.8])).flatten()
    tensor([-0.8000, -0.5000,  2.0000])

    Source: Heo et al. 2019, "margin ReLU".
    """
    return torch.maximum(x, margin.view(1, -1, 1, 1))


def require_same_size(student: Tensor, teacher: Tensor) -> None:
    """Both maps (N, C, H, W) of one shape, or an error that names both and the cure."""
    if student.shape != teacher.shape:
        raise LesionKDError(
            f"the student's map is {tuple(student.shape)}, the teacher's {tuple(teacher.shape)}. The two networks round odd sizes "
            "differently: distillation takes images whose sides are multiples of 32 px"
        )


def partial_l2(student: Tensor, teacher: Tensor, margin: Tensor) -> Tensor:
    """Distance that leaves the student alone where both it and the teacher are below zero.

    D = sum (S - T')^2 [S > T' or T' > 0], T' = margin_relu(T)

    Parameters
    ----------
    student, teacher : (N, C, H, W)
        Connected student map and teacher map, both before the ReLU; the teacher gets no gradient.
    margin : (C,)

    Returns
    -------
    ()
        Sum over all elements.

    Source: Heo et al. 2019, "partial L2"; METHOD, L_feat.
    """
    require_same_size(student, teacher)
    distance: Tensor = _PartialL2.apply(student, *refinement_target(teacher, margin))
    return distance


def refinement_target(teacher: Tensor, margin: Tensor) -> tuple[Tensor, Tensor]:
    """T' (N, C, H, W) and the least that S - T' counts as: 0 where T' <= 0, any value elsewhere. No gradient."""
    target = margin_relu(teacher.detach(), margin)
    return target, torch.where(target > 0, -torch.inf, 0.0)


class _PartialL2(torch.autograd.Function):
    """D = sum max(S - T', floor)^2, the same as `partial_l2`; where the floor decides it is 0, and so is its gradient 2 max(...)."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, target: Tensor, floor: Tensor) -> Tensor:
        counted = (student - target).clamp_min_(floor)
        ctx.save_for_backward(counted)
        norm: Tensor = torch.linalg.vector_norm(counted)  # one pass
        return norm.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (counted,) = ctx.saved_tensors
        return counted * (2 * grad), None, None


class Connector(nn.Sequential):
    """1x1 convolution without bias and BN: brings a student map to the teacher's channels.

    Trains along with the student and is thrown away afterwards (step S6). In training both are one
    matrix product: the statistics of W s follow from mean and covariance of the few channels of s.

    Source: Heo et al. 2019.
    """

    def __init__(self, student_channels: int, teacher_channels: int) -> None:
        convolution = nn.Conv2d(student_channels, teacher_channels, 1, bias=False)
        super().__init__(convolution, nn.BatchNorm2d(teacher_channels))
        nn.init.normal_(convolution.weight, 0.0, math.sqrt(2.0 / teacher_channels))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C_s, H, W) -> (N, C_t, H, W), gamma (W s - mean) / deviation + beta."""
        if not self.training:
            for layer in self:
                x = layer(x)
            return x
        layers: Any = self  # nn.Sequential forgets of which class they are
        weight, norm = layers[0].weight.flatten(1), layers[1]
        rows = x.permute(0, 2, 3, 1).flatten(0, 2)  # (N H W, C_s)
        count = x[0, 0].numel() * (ranks.spread() or len(x))
        mean = ranks.mean(rows.mean(0))
        centred = rows - mean
        variance = (weight @ ranks.mean(centred.T @ centred / len(rows)) * weight).sum(1).clamp_min(0)
        with torch.no_grad():
            norm.num_batches_tracked += 1
            norm.running_mean.lerp_(weight @ mean, norm.momentum)
            norm.running_var.lerp_(variance * count / (count - 1), norm.momentum)
        scale = norm.weight * (variance + norm.eps).rsqrt()
        out = torch.addmm(norm.bias, centred, (scale[:, None] * weight).T)
        return out.view(len(x), *x.shape[-2:], -1).permute(0, 3, 1, 2)


def empirical_margins(maps: Iterable[dict[str, Tensor]], names: Iterable[str]) -> dict[str, Tensor]:
    """Mean of each channel's negative responses over many batches of teacher maps, {name: (C,)}; 0 where there are none.

    On a residual sum this sees the identity branch too, which `bn_margin` ignores. Source: METHOD, L_feat.
    """
    sums: dict[str, Tensor] = {}
    for batch in maps:
        for name in names:
            negative = batch[name].float().clamp_max(0)
            found = torch.stack([negative.sum((0, 2, 3)), (negative < 0).sum((0, 2, 3))]).double().cpu()
            sums[name] = sums.get(name, 0) + found
    return {name: (total / count.clamp_min(1)).float() for name, (total, count) in sums.items()}


def anew(_: Hashable, make: Callable[[], Any]) -> Any:
    """`once` of a single network: nothing is shared."""
    return make()


class FeatureRefinement(nn.Module):
    """Connectors and L_feat over a list of levels (step S3).

    Parameters
    ----------
    student, teacher : networks
        Read for channels and for the margins of the teacher's BatchNorms; neither is kept.
    levels : tuple of str
        Names of maps of equal stride, shallowest last as in the default; see `match_levels`.
    level_weights : 'mean', 'area' or 'halving'
        mean: sum_i D_i / (N C_i H_i W_i); area: D_i / N over the level's area relative to the
        deepest level's; halving, the original: sum_i D_i 2^-(levels - 1 - i) / (1000 N), i = 0 shallowest.
    margins : {teacher map: (C,)}, optional
        From `empirical_margins`; those of the BatchNorms where not given.

    Source: METHOD, L_feat.
    """

    def __init__(
        self, student: Network, teacher: Network, levels: tuple[str, ...], level_weights: str = "mean",
        margins: dict[str, Tensor] | None = None,
    ) -> None:
        super().__init__()
        pairs = match_levels(student, teacher, levels)
        self.pairs = sorted(pairs, key=lambda pair: stride_of(pair[0]))  # shallowest first
        self.level_weights = level_weights
        self.kind = "empirical" if margins else "bn"
        norms, teacher_norms = student.feature_norms(), teacher.feature_norms()
        self.connectors = nn.ModuleList(Connector(norms[s].num_features, teacher_norms[t].num_features) for s, t in self.pairs)
        for i, (_, name) in enumerate(self.pairs):
            self.register_buffer(f"margin{i}", margins[name] if margins else bn_margin(teacher_norms[name]))

    def forward(self, student_maps: dict[str, Tensor], teacher_maps: dict[str, Tensor], once: Once = anew) -> Tensor:
        """Maps by name, (N, C_i, H_i, W_i) each -> L_feat, (); `once` is `Step.once`, which spares arms in lockstep work."""
        parts: list[Tensor] = []
        deepest = teacher_maps[self.pairs[-1][1]]
        for i, (name_s, name_t) in enumerate(self.pairs):
            teacher, connected = teacher_maps[name_t], self.connectors[i](student_maps[name_s].float())
            require_same_size(connected, teacher)
            target = once((name_t, self.kind), partial(self._target, i, teacher))
            parts.append(_PartialL2.apply(connected, *target) * self._weight(i, teacher, deepest))
        return reduce(operator.add, parts)

    def _target(self, i: int, teacher: Tensor) -> tuple[Tensor, Tensor]:
        return refinement_target(teacher.float(), self.get_buffer(f"margin{i}"))

    def _weight(self, i: int, teacher: Tensor, deepest: Tensor) -> float:
        if self.level_weights == "mean":
            return 1 / teacher.numel()
        if self.level_weights == "area":
            area = teacher.shape[-2] * teacher.shape[-1]
            return deepest.shape[-2] * deepest.shape[-1] / area / len(teacher)
        return 2.0 ** -(len(self.pairs) - 1 - i) / (1000 * len(teacher))


def segmentation_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """L_seg: binary cross entropy of logits (N, 1, H, W) and masks (N, 1, H, W) in 0..1 (step S5)."""
    return F.binary_cross_entropy_with_logits(logits, masks)
