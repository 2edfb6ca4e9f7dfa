"""Per-case scores of masks and networks, and their means (DESIGN, Scores)."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from .config import LesionKDError
from .prepare import Prepared

if TYPE_CHECKING:
    from torch import nn

METRICS = ("dice", "iou", "sensitivity", "precision", "hd95", "surface_dice")
HIGHER_IS_BETTER = {name: name != "hd95" for name in METRICS}
THRESHOLD = 0.5
SURFACE_TOLERANCE = 2.0
"""Tolerance of the surface Dice, px at the prepared size."""

PUBLISHED = {"id": "case", "lesion_pixels": "lesion_px"}
"""What the committed results call columns of a per-case table: for `rename` when they are written; `tables.study` renames back."""


def mask_dice(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Dice (N,) of two stacks of masks, (N, H, W) bool, say of teacher and student; two empty masks agree: 1.

    >>> lesion = np.array([[1, 1, 0, 0]], bool)
    >>> mask_dice([lesion, lesion, ~lesion & lesion], [lesion, lesion[:, ::-1], lesion & ~lesion])
    array([1., 0., 1.])
    """
    first, second = np.asarray(first, bool), np.asarray(second, bool)
    if first.shape != second.shape or first.ndim != 3:
        raise LesionKDError(f"masks to compare have the shapes {first.shape} and {second.shape}; both want one shape (N, H, W)")
    both, sizes = np.count_nonzero(first & second, (1, 2)), np.count_nonzero(first, (1, 2)) + np.count_nonzero(second, (1, 2))
    return np.where(sizes > 0, 2 * both / np.maximum(sizes, 1), 1.0)


def score_masks(predicted: np.ndarray, truth: np.ndarray) -> pd.DataFrame:
    """Score masks case by case; nothing is dropped in silence.

    Parameters
    ----------
    predicted, truth : (N, H, W) bool

    Returns
    -------
    DataFrame
        dice, iou, sensitivity, precision in 0..1; hd95 in px; surface_dice at 2 px in 0..1;
        lesion_pixels, predicted_pixels; missed (a lesion that no predicted pixel overlaps) and
        false_alarm (a prediction where there is no lesion), 0 or 1.
        Both empty: Dice 1, distance 0. One empty: Dice 0, distance = the diagonal. Sensitivity and
        precision of 0/0 are NaN.

    Source: DESIGN, Scores; distances from MONAI.
    """
    dice = mask_dice(predicted, truth)
    predicted, truth = np.asarray(predicted, bool), np.asarray(truth, bool)
    hit, lesion, marked = ((m.reshape(len(truth), -1).sum(1)) for m in (predicted & truth, truth, predicted))
    with np.errstate(invalid="ignore", divide="ignore"):
        table = pd.DataFrame({
            "dice": dice,
            "iou": np.where(lesion + marked, hit / (lesion + marked - hit), 1.0),
            "sensitivity": hit / lesion,
            "precision": hit / marked,
        })
    table["hd95"], table["surface_dice"] = _surface_scores(predicted, truth)
    return table.assign(
        lesion_pixels=lesion, predicted_pixels=marked,
        missed=((lesion > 0) & (hit == 0)).astype(int), false_alarm=((lesion == 0) & (marked > 0)).astype(int),
    )


def _surface_scores(predicted: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """hd95 (N,) px and surface Dice (N,); MONAI where both masks have a surface, the rule of DESIGN elsewhere."""
    some_p, some_t = predicted.any((1, 2)), truth.any((1, 2))
    hd95 = np.where(some_p | some_t, np.hypot(*truth.shape[1:]), 0.0)
    surface = np.where(some_p | some_t, 0.0, 1.0)
    both = np.flatnonzero(some_p & some_t)
    if len(both):
        hd95[both], surface[both] = surface_scores(predicted[both], truth[both], SURFACE_TOLERANCE)
    return hd95, surface


def surface_scores(predicted: np.ndarray, truth: np.ndarray, tolerance: float, spacing: tuple[float, ...] | None = None) -> tuple[np.ndarray, np.ndarray]:
    """hd95 and surface Dice, each (N,), of masks (N, H, W) or (N, D, H, W) that are not empty; in px, or mm with a `spacing`."""
    import torch
    from monai.metrics import compute_hausdorff_distance, compute_surface_dice

    p, t = (torch.from_numpy(mask).unsqueeze(1).float() for mask in (predicted, truth))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # MONAI warns of an argument of its own
        hd95 = compute_hausdorff_distance(p, t, include_background=True, percentile=95, spacing=spacing and list(spacing))
        surface = compute_surface_dice(p, t, [tolerance], include_background=True, spacing=spacing and list(spacing))
    return hd95[:, 0].numpy(), surface[:, 0].numpy()


def score_network(network: nn.Module, prepared: Prepared, splits: tuple[str, ...] = ("val", "test")) -> pd.DataFrame:
    """Per-case scores of a network on prepared cases: id, group, split, label, the columns of `score_masks`, contrast.

    contrast is |mean grey of the lesion - that of the ring around it| / 255 as prepared; NaN without a lesion.
    """
    from .inference import probabilities

    rows = np.concatenate([prepared.index(split) for split in splits])
    blocks = [rows[i : i + 256] for i in range(0, len(rows), 256)]  # a large test set is never in memory as a whole
    return pd.concat([_with_cases(prepared, block, probabilities(network, prepared.images[block]) > THRESHOLD) for block in blocks], ignore_index=True)


def _with_cases(prepared: Prepared, rows: np.ndarray, predicted: np.ndarray) -> pd.DataFrame:
    scores = score_masks(predicted, prepared.masks[rows] > 0)
    cases = prepared.cases.iloc[rows].reset_index(drop=True)
    return pd.concat([cases[["id", "group", "split", "label"]], scores, cases["contrast"].abs()], axis=1)


def fixed_mask_dice(prepared: Prepared) -> float:
    """Mean validation Dice of the best guess that never looks at the image: one mask, where training lesions mostly lie.

    The mean of at most 1,000 training masks, cut at the tenth of its maximum that fits them best.
    """
    train, val = prepared.index("train"), prepared.index("val")
    truth = prepared.masks[train[:: -(-len(train) // 1000)]] > 0
    mean = truth.mean(0)
    guesses = [mean >= level * mean.max() for level in np.arange(1, 10) / 10]
    best = max(guesses, key=lambda guess: mask_dice(np.broadcast_to(guess, truth.shape), truth).mean())
    return float(mask_dice(np.broadcast_to(best, (len(val), *best.shape)), prepared.masks[val] > 0).mean())


def score_otsu(prepared: Prepared, split: str = "test") -> pd.DataFrame:
    """The trivial rival: Otsu's threshold on the grey image, dark or bright as fits the training cases better."""
    train, rows = prepared.index("train"), prepared.index(split)
    dice = {bright: score_masks(_otsu(prepared.images[train], bright), prepared.masks[train] > 0)["dice"].mean() for bright in (False, True)}
    return _with_cases(prepared, rows, _otsu(prepared.images[rows], bright=dice[True] > dice[False]))


def _otsu(images: np.ndarray, bright: bool) -> np.ndarray:
    """(N, S, S, 3) uint8 -> (N, S, S) bool."""
    from skimage.color import rgb2gray
    from skimage.filters import threshold_otsu

    masks = []
    for image in images:
        grey = rgb2gray(image)
        level = threshold_otsu(grey)  # a flat image is its own threshold: nothing is marked
        masks.append(grey > level if bright else grey < level)
    return np.stack(masks)


def summarize(per_case: pd.DataFrame) -> dict[str, Any]:
    """Means with 95 % bootstrap intervals over groups; missed lesions and false alarms beside them.

    NaN (0/0) is left out of a mean and counted in `undefined`.
    """
    result: dict[str, Any] = {
        "cases": len(per_case), "groups": int(per_case["group"].nunique()),
        "lesions": int((per_case["lesion_pixels"] > 0).sum()),
        "missed": int(per_case["missed"].sum()), "false_alarms": int(per_case["false_alarm"].sum()),
    }
    for name in METRICS:
        values = per_case[name]
        low, high = bootstrap_mean(values.to_numpy(), per_case["group"].to_numpy())
        numbers = {"mean": values.mean(), "low": low, "high": high, "median": values.median()}
        result[name] = {key: _number(value) for key, value in numbers.items()} | {"undefined": int(values.isna().sum())}
    return result


def _number(value: float) -> float | None:
    return None if np.isnan(value) else round(float(value), 6)  # JSON knows no NaN


def bootstrap_mean(values: np.ndarray, groups: np.ndarray, draws: int = 2000, seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval of the mean of (N,) values, whole groups resampled; NaN left out."""
    kept = ~np.isnan(values)
    if not kept.any():
        return np.nan, np.nan
    sums = pd.DataFrame({"sum": values[kept], "n": 1.0}).groupby(groups[kept]).sum().to_numpy()
    drawn = np.random.default_rng(seed).multinomial(len(sums), np.full(len(sums), 1 / len(sums)), size=draws)
    means = (drawn @ sums[:, 0]) / (drawn @ sums[:, 1])
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)
