"""The network as an app calls it, and whether an exported file computes the same."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ..config import MEAN, STD, LesionKDError
from ..evaluate import mask_dice

MULTIPLE = 32
"""Exported networks take heights and widths that are multiples of this, px."""
UNDECIDED = 0.1
"""Pixels whose probability in PyTorch is this close to the threshold may change sides."""
MAY_FLIP = 0.01
"""Fraction of pixels that may change sides although PyTorch was decided."""
STEP = 1.01 / 255
"""Largest difference of a float32 export: one step of the mask image."""


class ParityError(LesionKDError):
    """An exported file does not compute what the trained network computes."""


def fold_norms(network: nn.Module) -> nn.Module:
    """A frozen copy with every BatchNorm merged into the convolution before it."""
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
        (N, 3, H, W) -> (N, 1, H, W) logits; BatchNorms are folded in a copy.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = fold_norms(network)
        self.register_buffer("mean", 255 * torch.tensor(MEAN).view(3, 1, 1))
        self.register_buffer("scale", 1 / (255 * torch.tensor(STD)).view(3, 1, 1))
        self.eval()

    def forward(self, image: Tensor) -> Tensor:
        """(N, H, W, 3) uint8 RGB -> (N, H, W) uint8: probability x 255, rounded."""
        x = (image.float().permute(0, 3, 1, 2) - self.mean) * self.scale
        probability: Tensor = self.network(x)[:, 0].sigmoid()
        return (probability * 255).round().to(torch.uint8)


@dataclass(frozen=True)
class Engine:
    """A network in the runtime that an app would use.

    `precision` is float32, float16 or int8, `size` the bytes of the model where no file has it.
    """

    name: str
    precision: str
    file: Path | None
    segment: Callable[[np.ndarray], np.ndarray]
    size: int = 0

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """(N, H, W, 3) uint8 -> (N, H, W) uint8: probability x 255."""
        shaped = images.ndim == 4 and images.shape[3] == 3 and images.dtype == np.uint8
        if not shaped or any(side == 0 or side % MULTIPLE for side in images.shape[1:3]):
            raise LesionKDError(
                f"{self.name}: got images of shape {images.shape} and type {images.dtype}; "
                f"expected (N, H, W, 3) uint8 RGB with H and W multiples of {MULTIPLE}. "
                "TrainedNetwork.predict takes any size; model.json says how an app resizes."
            )
        return self.segment(images)

    def milliseconds(self, images: np.ndarray) -> list[float]:
        """Processor time of one run, or of about 30 ms of runs, at most 20."""
        times: list[float] = []
        while sum(times) < 30 and len(times) < 20:
            begun = time.process_time()
            self(images)
            times.append(1e3 * (time.process_time() - begun))
        return times


def torch_engine(network: Deployed) -> Engine:
    """PyTorch, the reference."""

    def segment(images: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            parts = [np.array(images[i : i + 16]) for i in range(0, len(images), 16)]
            return np.concatenate([network(torch.from_numpy(part)).numpy() for part in parts])

    return Engine("PyTorch", "float32", None, segment)


def at_size(
    images: np.ndarray, size: int, how: Image.Resampling = Image.Resampling.BILINEAR
) -> np.ndarray:
    """Prepared images (N, S, S, 3) or masks (N, S, S), uint8, resized to size x size."""
    if images.shape[1] == size:
        return np.array(images)
    return np.stack([np.asarray(Image.fromarray(i).resize((size, size), how)) for i in images])


def parity(
    reference: Engine,
    engines: Iterable[tuple[Engine, int]],
    images: np.ndarray,
    masks: np.ndarray,
    threshold: float = 0.5,
) -> pd.DataFrame:
    """Compare engines with the reference, each at its size, on images (N, S, S, 3) and masks.

    Returns
    -------
    DataFrame
        One row for each engine and size: the largest and mean difference of the probability;
        `flipped`, the fraction of pixels on the other side of the threshold; `flipped_decided`, the
        fraction that flipped although the reference was further than `UNDECIDED` from it; Dice
        between the two masks, and of both against the truth; and the `rule` of `check_parity`.
    """
    rows, known = [], {}
    for engine, size in engines:
        if size not in known:
            at = at_size(images, size)
            truth = at_size(masks.astype(np.uint8), size, Image.Resampling.NEAREST) > 0
            known[size] = at, truth, reference(at)
        at, truth, expected = known[size]
        found = engine(at)
        gap = np.abs(found.astype(np.int16) - expected)
        ours, theirs = found > threshold * 255, expected > threshold * 255
        decided = np.abs(expected / 255 - threshold) > UNDECIDED
        rows.append(
            {
                "engine": engine.name,
                "precision": engine.precision,
                "file": engine.file and engine.file.name,
                "pixels": size,
                "cases": len(at),
                "max_difference": gap.max() / 255,
                "mean_difference": gap.mean() / 255,
                "flipped": (ours != theirs).mean(),
                "flipped_decided": ((ours != theirs) & decided).mean(),
                "dice_to_reference": mask_dice(ours, theirs).mean(),
                "dice": mask_dice(ours, truth).mean(),
                "dice_reference": mask_dice(theirs, truth).mean(),
                "rule": "one step" if engine.precision == "float32" else "decided pixels",
            }
        )
    return pd.DataFrame(rows)


def check_parity(table: pd.DataFrame) -> None:
    """Refuse a file that does not compute what PyTorch computes.

    float32: no pixel may differ by more than one step of 255. float16 and int8: at most 1 % of the
    pixels may change sides among those whose probability in PyTorch is further than 0.1 from the
    threshold. Pixels nearer to it are not counted, because there the student is undecided and any
    rounding decides: a poor student has many of them in a correct file.

    Raises
    ------
    ParityError
        Names each such file and its differences.
    """
    inexact = (table["precision"] == "float32") & (table["max_difference"] > STEP)
    wrong = table[inexact | (table["flipped_decided"] > MAY_FLIP)]
    if len(wrong):
        lines = [
            f"{row.file} ({row.engine}, {row.precision}, {row.pixels} px): largest difference "
            f"{row.max_difference:.3f}, {100 * row.flipped_decided:.2f} % of the pixels flipped "
            f"where PyTorch is decided, Dice between the masks {row.dice_to_reference:.4f}"
            for row in wrong.itertuples()
        ]
        raise ParityError(
            "these files do not compute what the student computes; do not ship them:\n"
            + "\n".join(lines)
        )
