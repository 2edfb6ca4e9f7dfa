"""L_seg: the segmentation loss (step S5)."""

from __future__ import annotations

from typing import ClassVar, Self

import torch.nn.functional as F
from torch import Tensor

from .terms import LossTerm, Setup, Step, register


def soft_dice_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """1 - 2 sum(p y) / (sum p + sum y) of each image, mean over images; p = sigmoid(logits).

    Source: Milletari et al. 2016, in MONAI's form.
    """
    from monai.losses import DiceLoss  # takes seconds to import, so not above

    loss: Tensor = DiceLoss(sigmoid=True)(logits, masks)
    return loss


def bce_dice(logits: Tensor, masks: Tensor) -> Tensor:
    """0.5 BCE + 0.5 soft Dice of logits and masks, (N, 1, H, W), masks in 0..1 -> ().

    With BCE alone a network of 58,629 parameters often predicts background for many epochs. The
    Dice term does not shrink with the lesion. Source: docs/method.md, L_seg.
    """
    return 0.5 * bce(logits, masks) + 0.5 * soft_dice_loss(logits, masks)


def bce(logits: Tensor, masks: Tensor) -> Tensor:
    """Binary cross entropy of logits and masks, (N, 1, H, W) -> (). Source: patent, step S5."""
    return F.binary_cross_entropy_with_logits(logits, masks)


SEG_LOSSES = {"bce_dice": bce_dice, "bce": bce}


@register("seg", label="L_seg", weight=1.0)
class SegmentationLoss(LossTerm):
    """L_seg of the option `seg_loss`, for teacher and students, on the images that have masks."""

    needs_teacher: ClassVar[bool] = False

    def __init__(self, name: str) -> None:
        super().__init__()
        self.loss = SEG_LOSSES[name]

    @classmethod
    def build(cls, setup: Setup) -> Self:
        return cls(setup.cfg.seg_loss)

    def forward(self, step: Step) -> Tensor:
        return self.loss(step.logits[: len(step.masks)], step.masks)
