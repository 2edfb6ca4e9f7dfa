"""Weights of the loss terms and options of the method, tried on validation cases (METHOD, Loss weights)."""

from __future__ import annotations

from typing import Any

import pandas as pd

from .. import store
from ..config import TERM_FIELDS, AblationConfig, ConfigError, nearest
from ..progress import Tell
from .student import distill_arms
from .teacher import Run

SWEEP: dict[str, tuple[float, ...]] = {
    "feat": (0.3, 1.0, 3.0, 10.0), "edge": (0.01, 0.1, 1.0, 10.0), "method": (0.01, 0.1, 1.0, 10.0), "kd": (0.3, 1.0, 3.0, 10.0),
    "cwd": (0.1, 0.3, 1.0, 3.0), "dist": (0.1, 0.3, 1.0, 3.0), "fitnets": (0.03, 0.1, 0.3, 1.0), "at": (10.0, 30.0, 100.0, 1000.0),
}
"""Weights tried for every arm; of the method w_edge, at the w_feat of the configuration. Rivals' ranges by the size of their gradients."""
OPTIONS: dict[str, tuple[Any, ...]] = {
    "feature_levels": (
        "decoder.stride8, decoder.stride4, decoder.stride2", "decoder.stride2", "encoder.stride4, encoder.stride8, encoder.stride16",
        "encoder.stride4, encoder.stride8, encoder.stride16, decoder.stride8, decoder.stride4, decoder.stride2",
    ),
    "margin": ("bn", "empirical"), "level_weights": ("mean", "area", "halving"), "teacher_bn": ("eval", "batch"),
    "edge_level": ("low", "deep"), "edge_width": (1, 3), "grid": (4, 8), "grid_frame": ("image", "lesion"),
    "anchors": ("masked_mean", "masked_cosine", "eagr"), "graph": ("frozen", "joint", "relation"),
    "lr": (0.002, 0.005, 0.01), "connector_lr": (0.1, 1.0, 10.0), "connector_warmup": (0, 1, 3),
}
"""What METHOD.md leaves open, and how fast student and connectors learn: the values tried, one changed at a time."""


def sweep_weights(cfg: AblationConfig, weights: dict[str, tuple[float, ...]] | None = None, tell: Tell = print) -> pd.DataFrame:
    """Train every arm at every weight, all of a seed in lockstep, and look at validation cases only.

    Parameters
    ----------
    cfg : AblationConfig
        Its seeds are swept; its weights are what is not swept.
    weights : {arm: weights}, optional
        By default `SWEEP`.

    Returns
    -------
    DataFrame
        dataset, arm, weight (0 for the student alone), seed, epochs, val_dice (mean over the last quarter of the
        epochs, which is steadier than the best) and best_val_dice.
    """
    weights = SWEEP if weights is None else weights
    for arm in weights:
        if arm not in (*TERM_FIELDS, "method"):
            raise ConfigError(f"sweep_weights: no weight of {arm!r}; {nearest(arm, [*TERM_FIELDS, 'method'])}")
    rows = []
    for seed in cfg.seeds:
        points = {("alone", 0.0): cfg.arm("alone", seed)}
        for arm, values in weights.items():
            field = "w_edge" if arm == "method" else TERM_FIELDS[arm][0]
            points |= {(arm, float(weight)): cfg.arm(arm, seed).with_values(**{field: float(weight)}) for weight in values}
        for (arm, weight), run in zip(points, distill_arms(list(points.values()), tell)):
            rows.append({"dataset": cfg.dataset_name, "arm": arm, "weight": weight, "seed": seed} | _validated(run))
    return pd.DataFrame(rows)


def _validated(run: Run) -> dict[str, Any]:
    """What a sweep's table holds of a run: its epochs, its validation Dice and its folder."""
    dice = run.history["val_dice"]
    return {
        "epochs": len(dice), "val_dice": dice.tail(max(len(dice) // 4, 1)).mean(), "best_val_dice": dice.max(), "run": store.short(run.path),
    }


def sweep_options(cfg: AblationConfig, options: dict[str, tuple[Any, ...]] | None = None, tell: Tell = print) -> pd.DataFrame:
    """Train the method with every value of every option, one changed at a time, and look at validation cases only.

    Parameters
    ----------
    cfg : AblationConfig
        Its seeds are swept; all else is what the options are changed from.
    options : {option: values}, optional
        By default `OPTIONS`.

    Returns
    -------
    DataFrame
        dataset, option ('arm' for the rows alone and method), value, seed and what `sweep_weights` gives of a run; a value
        that is the configuration's own has the method's run.
    """
    options = OPTIONS if options is None else options
    for option in options:
        if option not in type(cfg).model_fields:
            raise ConfigError(f"sweep_options: no option {option!r}; {nearest(option, type(cfg).model_fields)}")
    rows = []
    for seed in cfg.seeds:
        method = cfg.arm("method", seed)
        points = [("arm", "alone", cfg.arm("alone", seed)), ("arm", "method", method)]
        points += [(option, value, method.with_values(**{option: value})) for option, values in options.items() for value in values]
        runs: dict[Any, Run] = {}
        for statistics in dict.fromkeys(point.teacher_bn for *_, point in points):  # a lockstep has one teacher pass
            together = list(dict.fromkeys(point for *_, point in points if point.teacher_bn == statistics))
            runs |= dict(zip(together, distill_arms(together, tell)))
        for option, value, point in points:
            rows.append({"dataset": cfg.dataset_name, "option": option, "value": str(value), "seed": seed} | _validated(runs[point]))
    return pd.DataFrame(rows)
