"""Is it the same model? Exported networks held against PyTorch on test cases."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pandas as pd
from PIL import Image

from ..config import LesionKDError
from ..evaluation import mask_dice
from .engines import Engine

DICE_MAY_FALL = 0.005
"""Mean Dice over the cases that an export may lose; in int8 single probabilities differ by 0.2 while masks stay the same."""
MAY_FLIP = 0.01
"""Share of pixels that may change sides."""


class ParityError(LesionKDError):
    """An exported network is not the network that was trained."""


def at_size(images: np.ndarray, size: int, how: Image.Resampling = Image.Resampling.BILINEAR) -> np.ndarray:
    """Prepared images (N, S, S, 3) or, by nearest, masks (N, S, S), uint8, at another size."""
    if images.shape[1] == size:
        return np.array(images)
    return np.stack([np.asarray(Image.fromarray(image).resize((size, size), how)) for image in images])


def parity(reference: Engine, engines: Iterable[tuple[Engine, int]], images: np.ndarray, masks: np.ndarray, threshold: float = 0.5) -> pd.DataFrame:
    """Hold engines against the reference, each at its sizes, on cases images (N, S, S, 3) uint8 and masks (N, S, S) bool.

    Returns
    -------
    DataFrame
        engine, precision, file, pixels, cases, max_difference and mean_difference (of the probability), flipped (share of
        pixels on the other side of the threshold), dice_to_reference (mean over cases), dice and dice_reference (against the truth).
    """
    rows, known = [], {}
    for engine, size in engines:
        if size not in known:
            at = at_size(images, size)
            known[size] = at, at_size(masks.astype(np.uint8), size, Image.Resampling.NEAREST) > 0, reference(at)
        at, truth, expected = known[size]
        found = engine(at)
        gap = np.abs(found.astype(np.int16) - expected)
        ours, theirs = found > threshold * 255, expected > threshold * 255
        rows.append({
            "engine": engine.name, "precision": engine.precision, "file": engine.file and engine.file.name, "pixels": size, "cases": len(at),
            "max_difference": gap.max() / 255, "mean_difference": gap.mean() / 255, "flipped": (ours != theirs).mean(),
            "dice_to_reference": mask_dice(ours, theirs).mean(),
            "dice": mask_dice(ours, truth).mean(),
            "dice_reference": mask_dice(theirs, truth).mean(),
        })
    return pd.DataFrame(rows)


def check_parity(table: pd.DataFrame, pixels: int) -> None:
    """Refuse an export that flips more than 1 % of the pixels, or lost more than 0.005 mean Dice at the size of its training (elsewhere Dice says little).

    In float32 no pixel may differ by more than one step of 255.

    Raises
    ------
    ParityError
        Names every such file, with what it lost.
    """
    fallen = table["dice_reference"] - table["dice"]
    inexact = (table["precision"] == "float32") & (table["max_difference"] > 1.01 / 255)
    wrong = table[(fallen > DICE_MAY_FALL) & (table["pixels"] == pixels) | (table["flipped"] > MAY_FLIP) | inexact]
    if len(wrong):
        lines = [
            f"{row.file} ({row.engine}, {row.precision}, {row.pixels} px): Dice {row.dice:.4f} against {row.dice_reference:.4f}, "
            f"{100 * row.flipped:.2f} % of the pixels flipped, largest difference {row.max_difference:.3f}"
            for row in wrong.itertuples()
        ]
        raise ParityError("not the network that was trained, do not ship it:\n" + "\n".join(lines))
