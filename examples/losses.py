"""A loss term of your own, in a file that is not part of the package.

    lesionkd ablate -p arms "alone, method, examples.losses:similarity, feat=1+similarity"

in the folder that holds `examples`. From then on it is known as `similarity`: in tables, figures,
and in `losses`, with a weight: `-p losses "examples.losses:similarity=300"`. Its file counts with
its content: students are trained again when it has changed.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from lesionkd_core.config import DistillConfig
from lesionkd_core.losses import LossTerm, Setup, Step, register
from lesionkd_core.models import match_levels


@register(
    "similarity",
    label="similarity-preserving",
    weight=3000.0,
    sweep=(300.0, 1000.0, 3000.0),
    options=("levels",),
)
class SimilarityPreserving(LossTerm):
    """Images that are alike for the teacher should be alike for the student.

    Source: Tung & Mori 2019, "Similarity-preserving knowledge distillation"; the weight is theirs.
    """

    def __init__(self, pairs: list[tuple[str, str]]) -> None:
        super().__init__()
        self.pairs = pairs

    @classmethod
    def build(cls, setup: Setup) -> SimilarityPreserving:
        """One for the levels of L_feat."""
        assert isinstance(setup.cfg, DistillConfig)
        return cls(match_levels(setup.student, setup.teacher, setup.cfg.levels))

    def forward(self, step: Step) -> Tensor:
        """Sum over the levels of the mean squared difference of similarities -> ()."""
        total = step.logits.new_zeros(())
        for ours, theirs in self.pairs:
            difference = similarity(step.maps[ours]) - similarity(step.teacher_maps[theirs])
            total = total + difference.square().mean()
        return total


def similarity(x: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, N): products of the images' maps, each row of length 1."""
    flat = x.float().flatten(1)
    return F.normalize(flat @ flat.T, dim=1)
