"""L_feat: deep feature refinement (step S3; Heo et al., ICCV 2019)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Self

import torch
from torch import Tensor, nn

from ..config import DistillConfig, LesionKDError
from ..models import Network, match_levels, stride_of
from .terms import LossTerm, Setup, Step, register, require_same_size


def bn_margin(bn: nn.BatchNorm2d) -> Tensor:
    """Expected negative response of each channel, from the BatchNorm before the ReLU.

    With x ~ N(mu, sigma^2), mu = beta and sigma = |gamma|:
    m = E[x | x < 0] = mu - sigma exp(-(mu/sigma)^2 / 2) / (sqrt(2 pi) Phi(-mu/sigma)),
    or -3 sigma if P(x < 0) is at most 0.001, or min(beta, 0) if gamma = 0.

    Returns
    -------
    (C,)
        At most 0 but for rounding; no gradient.

    Examples
    --------
    The mean of the negative half of a standard normal distribution is -sqrt(2 / pi):

    >>> bn_margin(nn.BatchNorm2d(2))
    tensor([-0.7979, -0.7979])

    Source: Heo et al. 2019, section 3.2.
    """
    sigma, mu = bn.weight.detach().cpu().double().abs(), bn.bias.detach().cpu().double()
    z = mu / sigma.clamp_min(torch.finfo(torch.float64).tiny)
    negative = torch.special.ndtr(-z)  # P(x < 0)
    density = torch.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
    margin = mu - sigma * density / negative.clamp_min(1e-300)
    margin = torch.where(negative > 0.001, margin, -3 * sigma)
    return torch.where(sigma == 0, mu.clamp_max(0), margin).float().to(bn.weight.device)


def _margin_of(teacher: Network, name: str) -> Tensor:
    norms = teacher.feature_norms()
    if name not in norms:
        raise LesionKDError(
            f"the teacher's map {name!r} does not come from a BatchNorm, so L_feat cannot compute "
            "its margin from one; set margin = 'empirical'"
        )
    return bn_margin(norms[name])


def margin_relu(x: Tensor, margin: Tensor) -> Tensor:
    """Clamp each teacher channel from below at its expected negative response (step S3).

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


def partial_l2(student: Tensor, teacher: Tensor, margin: Tensor) -> Tensor:
    """Squared distance, except where student and teacher are both negative (step S3).

    D = sum (S - T')^2 [S > T' or T' > 0], T' = margin_relu(T)

    Parameters
    ----------
    student, teacher : (N, C, H, W)
        Student map after its connector and teacher map, both before the ReLU; the teacher gets no
        gradient.
    margin : (C,)

    Returns
    -------
    ()
        Sum over all elements.

    Source: Heo et al. 2019, "partial L2".
    """
    require_same_size(student, teacher)
    target = margin_relu(teacher.detach(), margin)
    counted = (student > target) | (target > 0)
    return ((student - target).square() * counted).sum()


class Connector(nn.Sequential):
    """1x1 convolution without bias and BatchNorm: maps the student's channels to the teacher's.

    It is trained with the student and dropped afterwards (step S6). Source: Heo et al. 2019.
    """

    def __init__(self, student_channels: int, teacher_channels: int) -> None:
        convolution = nn.Conv2d(student_channels, teacher_channels, 1, bias=False)
        super().__init__(convolution, nn.BatchNorm2d(teacher_channels))
        nn.init.normal_(convolution.weight, 0.0, math.sqrt(2.0 / teacher_channels))


def empirical_margins(maps: Iterable[dict[str, Tensor]], names: Iterable[str]) -> dict[str, Tensor]:
    """Mean negative response of each channel over batches of teacher maps, {name: (C,)}.

    0 for a channel without any. On a residual sum this includes the identity branch, which
    `bn_margin` does not.
    """
    sums: dict[str, Tensor] = {}
    for batch in maps:
        for name in names:
            negative = batch[name].float().clamp_max(0)
            found = torch.stack([negative.sum((0, 2, 3)), (negative < 0).sum((0, 2, 3))])
            sums[name] = sums.get(name, 0) + found.double().cpu()
    return {name: (total / count.clamp_min(1)).float() for name, (total, count) in sums.items()}


@register(
    "feat",
    label="+ L_feat",
    weight=1.0,
    sweep=(0.1, 0.3, 1.0, 3.0),
    options=("levels", "level_weights", "margin", "connector_lr"),
)
class FeatureRefinement(LossTerm):
    """L_feat = sum over levels i of D_i / (N C_i H_i W_i), with connectors (step S3).

    With level_weights 'halving', the original's scale, it is
    sum_i D_i 2^-(levels - 1 - i) / (1000 N), shallowest level first.

    Parameters
    ----------
    student, teacher : Network
        Read for channels and margins; neither is kept.
    levels : tuple of str
        Names of maps of equal stride; see `match_levels`.
    margins : {teacher map: (C,)}, optional
        From `empirical_margins`; by default from the teacher's BatchNorm.

    Source: Heo et al. 2019; docs/method.md, L_feat.
    """

    def __init__(
        self,
        student: Network,
        teacher: Network,
        levels: tuple[str, ...],
        level_weights: str = "mean",
        margins: dict[str, Tensor] | None = None,
    ) -> None:
        super().__init__()
        pairs = match_levels(student, teacher, levels)
        self.pairs = sorted(pairs, key=lambda pair: stride_of(pair[0]))  # shallowest first
        self.level_weights = level_weights
        ours, theirs = student.feature_channels(), teacher.feature_channels()
        self.connectors = nn.ModuleList(Connector(ours[s], theirs[t]) for s, t in self.pairs)
        for i, (_, name) in enumerate(self.pairs):
            margin = margins[name] if margins else _margin_of(teacher, name)
            self.register_buffer(f"margin{i}", margin)

    @classmethod
    def build(cls, setup: Setup) -> Self:
        cfg = setup.cfg
        assert isinstance(cfg, DistillConfig)
        margins = setup.measured.margins if cfg.margin == "empirical" else None
        return cls(setup.student, setup.teacher, cfg.levels, cfg.level_weights, margins)

    def forward(self, step: Step) -> Tensor:
        """Maps (N, C_i, H_i, W_i) of both networks -> ()."""
        total = step.logits.new_zeros(())
        for i, (name_s, name_t) in enumerate(self.pairs):
            s, t = step.maps[name_s].float(), step.teacher_maps[name_t].float()
            distance = partial_l2(self.connectors[i](s), t, self.get_buffer(f"margin{i}"))
            scale = 1 / t.numel()
            if self.level_weights == "halving":
                scale = 2.0 ** -(len(self.pairs) - 1 - i) / (1000 * len(t))
            total = total + scale * distance
        return total
