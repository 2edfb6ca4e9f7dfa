"""Scores of masks and networks by case: own split and other data sets."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pandas as pd
from torch import nn

from . import results
from .config import ExternalConfig, LesionKDError, name_of_dataset, shared_name
from .data.layouts import CATALOGUE, window_of
from .data.prepare import Prepared, prepare
from .data.splits import copies
from .predict import TrainedNetwork, load_network, probabilities
from .results import Content, Result, log

METRICS = ("dice", "iou", "sensitivity", "precision", "hd95", "surface_dice", "soft_dice")
HIGHER_IS_BETTER = {name: name != "hd95" for name in METRICS}
THRESHOLD = 0.5
SURFACE_TOLERANCE = 2.0
"""Tolerance of the surface Dice, px at the prepared size."""


# Scores of masks ----------------------------------------------------------------------------------


def mask_dice(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Dice of each pair of two stacks of masks, (N, H, W) bool -> (N,); 1 if both are empty.

    >>> lesion = np.array([[1, 1, 0, 0]], bool)
    >>> empty = ~lesion & lesion
    >>> mask_dice([lesion, lesion, empty], [lesion, lesion[:, ::-1], empty])
    array([1., 0., 1.])
    """
    for mask in map(np.asarray, (first, second)):
        if mask.dtype.kind == "f" and not np.isin(mask, (0, 1)).all():
            raise LesionKDError("masks have values other than 0 and 1: threshold probabilities")
    first, second = np.asarray(first, bool), np.asarray(second, bool)
    if first.shape != second.shape or first.ndim != 3:
        raise LesionKDError(f"masks of shapes {first.shape} and {second.shape}; expected (N, H, W)")
    both = np.count_nonzero(first & second, (1, 2))
    sizes = np.count_nonzero(first, (1, 2)) + np.count_nonzero(second, (1, 2))
    return np.where(sizes > 0, 2 * both / np.maximum(sizes, 1), 1.0)


def soft_dice(probability: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Dice of probabilities without a threshold, (N, H, W) in 0..1 and bool -> (N,).

    2 sum(p y) / (sum p + sum y), as the method's authors report it. In an image without a lesion it
    is near 0 whatever is predicted.
    """
    both = (probability * truth).sum((1, 2), dtype=np.float64)
    sizes = probability.sum((1, 2), dtype=np.float64) + truth.sum((1, 2))
    return np.where(sizes > 0, 2 * both / np.maximum(sizes, 1e-12), 1.0)


def score_masks(predicted: np.ndarray, truth: np.ndarray) -> pd.DataFrame:
    """Score masks case by case.

    Parameters
    ----------
    predicted, truth : (N, H, W) bool

    Returns
    -------
    DataFrame
        dice, iou, sensitivity, precision (0..1); hd95 (px); surface_dice at 2 px (0..1);
        lesion_pixels, predicted_pixels; missed (a lesion that no predicted pixel overlaps) and
        false_alarm (a prediction in an image without a lesion), 0 or 1.
        Both masks empty: Dice 1, distance 0. One empty: Dice 0, distance = the image diagonal.
        Sensitivity and precision of 0/0 are NaN.
    """
    dice = mask_dice(predicted, truth)
    predicted, truth = np.asarray(predicted, bool), np.asarray(truth, bool)
    hit, lesion, marked = (m.sum((1, 2)) for m in (predicted & truth, truth, predicted))
    hd95, surface = _surface_scores(predicted, truth)
    with np.errstate(invalid="ignore", divide="ignore"):
        return pd.DataFrame(
            {
                "dice": dice,
                "iou": np.where(lesion + marked, hit / (lesion + marked - hit), 1.0),
                "sensitivity": hit / lesion,
                "precision": hit / marked,
                "hd95": hd95,
                "surface_dice": surface,
                "lesion_pixels": lesion,
                "predicted_pixels": marked,
                "missed": ((lesion > 0) & (hit == 0)).astype(int),
                "false_alarm": ((lesion == 0) & (marked > 0)).astype(int),
            }
        )


def _surface_scores(predicted: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """hd95 (N,) in px and surface Dice (N,), with the rules of `score_masks` for empty masks."""
    import torch
    from monai.metrics import compute_hausdorff_distance, compute_surface_dice

    some = predicted.any((1, 2)), truth.any((1, 2))
    hd95 = np.where(some[0] | some[1], np.hypot(*truth.shape[1:]), 0.0)
    surface = np.where(some[0] | some[1], 0.0, 1.0)
    both = np.flatnonzero(some[0] & some[1])
    if not len(both):
        return hd95, surface
    p, t = (torch.from_numpy(mask[both]).unsqueeze(1).float() for mask in (predicted, truth))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # about an argument inside MONAI
        distances = compute_hausdorff_distance(p, t, include_background=True, percentile=95)
        scores = compute_surface_dice(p, t, [SURFACE_TOLERANCE], include_background=True)
    hd95[both], surface[both] = distances[:, 0].numpy(), scores[:, 0].numpy()
    return hd95, surface


# Scores of networks -------------------------------------------------------------------------------


def score_network(
    network: nn.Module, data: Prepared, splits: tuple[str, ...] = ("val", "test")
) -> pd.DataFrame:
    """Per-case scores of a network on prepared cases.

    Returns
    -------
    DataFrame
        id, group, split, label; columns of `score_masks`; soft_dice; dice_background (Dice of the
        pixels outside the lesion); brier (mean squared error of the probabilities); contrast (|mean
        grey of the lesion - that of its ring| / 255; NaN without a lesion).
    """
    rows = np.concatenate([data.index(split) for split in splits])
    blocks = [rows[i : i + 256] for i in range(0, len(rows), 256)]  # bounds the memory
    parts = [_scored(data, block, probabilities(network, data.images[block])) for block in blocks]
    return pd.concat(parts, ignore_index=True)


def _scored(data: Prepared, rows: np.ndarray, probability: np.ndarray) -> pd.DataFrame:
    truth = data.masks[rows] > 0
    cases = data.cases.iloc[rows].reset_index(drop=True)
    table = score_masks(probability > THRESHOLD, truth)
    table["soft_dice"] = soft_dice(probability, truth)
    table["dice_background"] = mask_dice(probability <= THRESHOLD, ~truth)
    table["brier"] = np.square(probability - truth.astype(np.float32)).mean((1, 2))
    table["contrast"] = cases["contrast"].abs()
    return pd.concat([cases[["id", "group", "split", "label"]], table], axis=1)


def validation_dice(network: nn.Module, data: Prepared) -> float:
    """Mean Dice over validation cases."""
    rows = data.index("val")
    predicted = probabilities(network, data.images[rows]) > THRESHOLD
    return float(mask_dice(predicted, data.masks[rows] > 0).mean())


def fixed_mask_dice(data: Prepared) -> float:
    """Mean validation Dice of one mask for all images: the mean training mask, thresholded.

    The threshold is the tenth of its maximum that fits (at most 1,000) training masks best.
    """
    train, val = data.index("train"), data.index("val")
    truth = data.masks[train[:: -(-len(train) // 1000)]] > 0
    mean = truth.mean(0)
    guesses = [mean >= level * mean.max() for level in np.arange(1, 10) / 10]
    repeated = [np.broadcast_to(guess, truth.shape) for guess in guesses]
    best = guesses[int(np.argmax([mask_dice(guess, truth).mean() for guess in repeated]))]
    guess = np.broadcast_to(best, (len(val), *best.shape))
    return float(mask_dice(guess, data.masks[val] > 0).mean())


def score_otsu(data: Prepared, split: str = "test") -> pd.DataFrame:
    """Per-case scores of Otsu's threshold, dark or bright, whichever fits the training cases."""
    train, rows = data.index("train"), data.index(split)
    truth = data.masks[train] > 0
    dice = {b: mask_dice(_otsu(data.images[train], b), truth).mean() for b in (False, True)}
    return _scored(data, rows, _otsu(data.images[rows], bright=dice[True] > dice[False]))


def _otsu(images: np.ndarray, bright: bool) -> np.ndarray:
    """(N, S, S, 3) uint8 -> (N, S, S) bool."""
    from skimage.color import rgb2gray
    from skimage.filters import threshold_otsu

    masks = []
    for image in images:
        grey = rgb2gray(image)
        level = threshold_otsu(grey)
        masks.append(grey > level if bright else grey < level)
    return np.stack(masks)


def summarize(per_case: pd.DataFrame) -> Content:
    """Mean, median and 95 % bootstrap interval over groups of every metric, and counts.

    NaN (0/0) is left out of a mean and counted as `undefined`.
    """
    summary: Content = {
        "cases": len(per_case),
        "groups": int(per_case["group"].nunique()),
        "lesions": int((per_case["lesion_pixels"] > 0).sum()),
        "missed": int(per_case["missed"].sum()),
        "false_alarms": int(per_case["false_alarm"].sum()),
    }
    for name in (metric for metric in METRICS if metric in per_case):
        values = per_case[name]
        low, high = bootstrap_mean(values.to_numpy(), per_case["group"].to_numpy())
        numbers = {"mean": values.mean(), "low": low, "high": high, "median": values.median()}
        summary[name] = {
            key: None if np.isnan(value) else round(float(value), 6)  # JSON has no NaN
            for key, value in numbers.items()
        } | {"undefined": int(values.isna().sum())}
    return summary


def bootstrap_mean(values: np.ndarray, groups: np.ndarray) -> tuple[float, float]:
    """95 % percentile interval of the mean of (N,) values; groups are resampled, NaN left out."""
    kept = ~np.isnan(values)
    if not kept.any():
        return np.nan, np.nan
    table = pd.DataFrame({"sum": values[kept], "n": 1.0}).groupby(groups[kept]).sum().to_numpy()
    equal = np.full(len(table), 1 / len(table))
    drawn = np.random.default_rng(0).multinomial(len(table), equal, size=2000)
    low, high = np.percentile((drawn @ table[:, 0]) / (drawn @ table[:, 1]), [2.5, 97.5])
    return float(low), float(high)


# Other data sets ----------------------------------------------------------------------------------


class External(Result):
    """Scores of one network on another data set: `per_case` and `summary`."""


def score_external(run: Result | TrainedNetwork, datasets: tuple[str, ...]) -> dict[str, External]:
    """Find or make the scores of a run or a trained network on other data sets, by their names.

    Their images are prepared as the run's own were; the run's own images are not needed. Images
    that are near-duplicates of a training image are scored, counted (`near_training` in the
    summary; empty if the prepared training images are gone) and reported.
    """
    trained = run if isinstance(run, TrainedNetwork) else load_network(run)
    if twice := shared_name(datasets):
        raise LesionKDError(f"two data sets are called {twice!r}; rename a folder")
    return {name_of_dataset(dataset): _score_on(trained, dataset) for dataset in datasets}


def _score_on(trained: TrainedNetwork, dataset: str) -> External:
    other = trained.cfg.with_values(window=window_of(trained.cfg)).for_testing(dataset)
    if other.dataset_name == trained.cfg.dataset_name:
        cure = "" if dataset in CATALOGUE else f"; if {dataset} is another one, rename the folder"
        name = other.dataset_name
        raise LesionKDError(f"{results.short(trained.path)} was trained on {name}{cure}")
    data = prepare(other)

    def make(missing: dict[Path, ExternalConfig]) -> None:
        for path in missing:
            per_case = score_network(trained.network, data, splits=("test",))
            own = results.with_digest("prepare", trained.summary.get("data", ""))
            near = near_training(Prepared(own), data) if own else None
            if near:
                counted = f"{near} of {len(per_case)} cases of {data.path.name}"
                log.warning(f"warning: {counted} are near-duplicates of a training case")
            results.write_table(path / "per_case.csv", per_case)
            about = {"test": summarize(per_case), "near_training": near}
            results.write_json(path / "summary.json", about | {"run": results.short(trained.path)})

    wanted = results.Wanted(other, f"{trained.digest}|{data.digest}")
    return results.find_or_make([wanted], make, External)[0]


def near_training(own: Prepared, other: Prepared) -> int:
    """Number of images of another data set that are near-duplicates of a training image."""
    return len(copies(own.thumbnails[own.index("train")], other.thumbnails))


def held_out_scores(run: Result, name: str, elsewhere: dict[str, External]) -> pd.DataFrame:
    """Scores of a run on its own test cases, of data set `name`, and of `score_external`."""
    own = run.per_case[run.per_case["split"] == "test"].assign(test_dataset=name)
    others = [scored.per_case.assign(test_dataset=n) for n, scored in elsewhere.items()]
    return pd.concat([own, *others], ignore_index=True)
