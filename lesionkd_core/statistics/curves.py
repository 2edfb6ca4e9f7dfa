"""Learning curves of arms: how fast, and how far, each learns on the validation cases."""

from __future__ import annotations

import numpy as np
import pandas as pd

from ..config import LesionKDError
from .arms import FAMILY, TEACHER, as_table, families, in_order


def _by_epoch(history: pd.DataFrame) -> pd.DataFrame:
    """Validation Dice, mean over folds where there are any: rows (arm, seed), columns epochs."""
    one_run = ["arm", "seed", "epoch", *(["fold"] if "fold" in history else [])]
    if history.duplicated(one_run).any():
        raise LesionKDError(f"the history holds several runs of one arm and seed; select one, or add those of the columns {', '.join(FAMILY)} that differ")
    return history.groupby(["arm", "seed", "epoch"])["val_dice"].mean().unstack("epoch")


def learning_curves(history: pd.DataFrame) -> pd.DataFrame:
    """Validation Dice of every arm by epoch: mean, lowest and highest over seeds.

    Parameters
    ----------
    history : DataFrame
        Columns arm, seed, epoch, val_dice, those of `FAMILY` in which runs differ, and fold where there are folds.

    Returns
    -------
    DataFrame
        Columns of FAMILY; arm, epoch, mean, low, high, seeds.
    """
    parts = []
    for family, table in families(history):
        by_epoch = _by_epoch(table)
        for arm in in_order(table):
            values = by_epoch.loc[arm]
            curve = pd.DataFrame({"mean": values.mean(), "low": values.min(), "high": values.max(), "seeds": values.count()}).query("seeds > 0")
            parts.append(curve.rename_axis("epoch").reset_index().assign(**family, arm=arm)[[*family, "arm", "epoch", "mean", "low", "high", "seeds"]])
    return pd.concat(parts, ignore_index=True)


def epochs_to_reach(history: pd.DataFrame, share: float = 0.9, reference: str = "alone") -> pd.DataFrame:
    """Epochs that every arm needs to reach a share of the final validation Dice of the student alone, seed by seed.

    Returns
    -------
    DataFrame
        Columns of FAMILY; arm, reference, share, target (Dice, mean over seeds), epochs (median over seeds, a seed that
        never gets there counting as the slowest; NaN where that is the median), low, high (quickest and slowest seed,
        NaN: never), reached (seeds that do), seeds.
    """
    rows = []
    for family, table in families(history):
        by_epoch = _by_epoch(table)
        if reference not in set(table["arm"]):
            continue
        target = (share * by_epoch.loc[reference].ffill(axis=1).iloc[:, -1]).round(12)  # 0.9 x 0.4 is a bit above 0.36
        for arm in in_order(table):
            values = by_epoch.loc[arm]
            if not values.index.equals(target.index):
                raise LesionKDError(f"arms {arm!r} (seeds {list(values.index)}) and {reference!r} (seeds {list(target.index)}) want the same seeds")
            there = values.ge(target, axis=0)
            needed = there.idxmax(axis=1).astype(float).where(there.any(axis=1), np.inf)
            numbers = {"epochs": needed.median(), "low": needed.min(), "high": needed.max()}
            rows.append(
                family | {"arm": arm, "reference": reference, "share": share, "target": target.mean()}
                | {name: value if np.isfinite(value) else np.nan for name, value in numbers.items()}
                | {"reached": int(there.any(axis=1).sum()), "seeds": len(values)}
            )
    return as_table(rows, history)


def gradient_pulls(history: pd.DataFrame) -> pd.DataFrame:
    """How hard every weighted term pulls, and where to, beside L_seg, at the layers that all terms of its arm reach.

    Those layers differ between arms, so a term's pull is compared with L_seg's in the same arm and with nothing else.

    Parameters
    ----------
    history : DataFrame
        Columns arm, epoch, grad_TERM and cos_TERM of runs' histories, and those of `FAMILY` in which runs differ.

    Returns
    -------
    DataFrame
        Columns of FAMILY; arm, term, pull (norm of the term's gradient over that of L_seg's, median over epochs and
        seeds), cosine (with L_seg's gradient, median), cosine_low, cosine_high (quartiles).
    """
    rows = []
    for family, table in families(history):
        for arm in in_order(table, without=TEACHER):
            part = table[table["arm"] == arm]
            for term in (name.removeprefix("grad_") for name in part if name.startswith("grad_") and name != "grad_seg"):
                cosine = part[f"cos_{term}"].quantile([0.5, 0.25, 0.75]).tolist()
                pull = (part[f"grad_{term}"] / part["grad_seg"]).median()
                if np.isfinite([pull, *cosine]).all():
                    rows.append(family | {"arm": arm, "term": term, "pull": pull} | dict(zip(("cosine", "cosine_low", "cosine_high"), cosine)))
    return as_table(rows, history)
