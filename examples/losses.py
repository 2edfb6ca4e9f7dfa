"""A loss term of your own, in a file that is not part of the package.

    lesionkd ablate -p arms "alone, method, examples.losses:attention, feat=1+attention"

in the folder that holds `examples`. From then on it is known as `attention`: in tables, figures,
and in `losses`, with a weight: `-p losses "examples.losses:attention=500"`. Its file counts with
its content: students are trained again when it has changed.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from lesionkd_core.config import DistillConfig
from lesionkd_core.losses import LossTerm, Setup, Step, register
from lesionkd_core.models import match_levels


@register(
    "attention",
    label="attention transfer",
    weight=500.0,
    sweep=(100.0, 500.0, 2000.0),
    options=("levels",),
)
class AttentionTransfer(LossTerm):
    """Where the maps of both networks are large should agree.

    Source: Zagoruyko & Komodakis 2017, "Paying more attention to attention", equation 2 with p = 2;
    the weight is that of the authors' experiments on CIFAR, beta / 2.
    """

    def __init__(self, pairs: list[tuple[str, str]]) -> None:
        super().__init__()
        self.pairs = pairs

    @classmethod
    def build(cls, setup: Setup) -> AttentionTransfer:
        """One for each level of L_feat."""
        assert isinstance(setup.cfg, DistillConfig)
        return cls(match_levels(setup.student, setup.teacher, setup.cfg.levels))

    def forward(self, step: Step) -> Tensor:
        """Mean squared difference of the normalized attention maps -> ()."""
        total = step.logits.new_zeros(())
        for ours, theirs in self.pairs:
            difference = attention(step.maps[ours]) - attention(step.teacher_maps[theirs])
            total = total + difference.square().mean()
        return total


def attention(x: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, H W): mean of the squares over the channels, of length 1."""
    return F.normalize(x.square().mean(1).flatten(1), dim=1)
