"""Weights of the loss terms, chosen on validation cases (METHOD, Loss weights)."""

from __future__ import annotations

import pandas as pd

from .. import store
from ..config import TERM_FIELDS, AblationConfig, ConfigError, nearest
from ..progress import Tell
from .student import distill_arms

SWEEP: dict[str, tuple[float, ...]] = {
    "feat": (0.3, 1.0, 3.0, 10.0), "edge": (0.01, 0.1, 1.0, 10.0), "method": (0.01, 0.1, 1.0, 10.0), "kd": (0.3, 1.0, 3.0, 10.0),
    "cwd": (0.1, 0.3, 1.0, 3.0), "dist": (0.1, 0.3, 1.0, 3.0), "fitnets": (0.03, 0.1, 0.3, 1.0), "at": (10.0, 30.0, 100.0, 1000.0),
}
"""Weights tried for every arm; of the method w_edge, at the w_feat of the configuration. Rivals' ranges by the size of their gradients."""


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
            dice = run.history["val_dice"]
            rows.append({
                "dataset": cfg.dataset_name, "arm": arm, "weight": weight, "seed": seed, "epochs": len(dice),
                "val_dice": dice.tail(max(len(dice) // 4, 1)).mean(), "best_val_dice": dice.max(), "run": store.short(run.path),
            })
    return pd.DataFrame(rows)
