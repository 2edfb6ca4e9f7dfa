"""The network as an app calls it: a uint8 image in, the uint8 mask image of step S7 out."""

from __future__ import annotations

import copy
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ..batches import MEAN, STD

MULTIPLE = 32
"""Exported networks want height and width in multiples of this, px: their maps then halve without a remainder."""


def fold_norms(network: nn.Module) -> nn.Module:
    """A copy in evaluation mode whose blocks' BatchNorms are part of the convolutions before them: the same function, fewer passes over memory."""
    folded = copy.deepcopy(network).eval()
    for block in folded.modules():
        if isinstance(block, nn.Sequential):
            for i, (layer, norm) in enumerate(pairwise(list(block))):
                if isinstance(layer, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                    block[i], block[i + 1] = fuse_conv_bn_eval(layer, norm), nn.Identity()
    return folded.requires_grad_(False)


class Deployed(nn.Module):
    """Normalization, network, sigmoid and x 255 in one graph (step S7).

    Parameters
    ----------
    network : nn.Module
        (N, 3, H, W) -> (N, 1, H, W) logits; its BatchNorms are folded in a copy.
    logits : bool
        Give the raw logits, (N, H, W) float32, instead of the mask image.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, network: nn.Module, logits: bool = False) -> None:
        super().__init__()
        self.network, self.logits = fold_norms(network), logits
        self.register_buffer("mean", 255 * torch.tensor(MEAN).view(3, 1, 1))
        self.register_buffer("scale", 1 / (255 * torch.tensor(STD)).view(3, 1, 1))

    def forward(self, image: Tensor) -> Tensor:
        """(N, H, W, 3) uint8 RGB -> (N, H, W) uint8, probability x 255 rounded."""
        logits: Tensor = self.network((image.float().permute(0, 3, 1, 2) - self.mean) * self.scale)[:, 0]
        return logits if self.logits else (logits.sigmoid() * 255).round().to(torch.uint8)
