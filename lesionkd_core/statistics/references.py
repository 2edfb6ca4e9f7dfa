"""Students beside larger networks: their own teacher, and the plain U-Net that the paper compares with."""

from __future__ import annotations

import numpy as np
import pandas as pd

from ..config import LesionKDError
from .arms import TEACHER, as_table, by_seed, covers, drawn, families, in_order, percentiles


def agreement(per_case: pd.DataFrame) -> pd.DataFrame:
    """How far every arm's students follow their teacher, case by case, in Dice; needs rows with arm `teacher`.

    Returns
    -------
    DataFrame
        Columns of FAMILY; arm, spearman (rank correlation with the teacher, mean over seeds; NaN where all cases score
        the same), spearman_low, spearman_high (over seeds), better, equal (shares of cases and seeds where the student
        is better than its teacher, or equal), cases, seeds.
    """
    rows = []
    for family, table in families(per_case):
        if TEACHER not in set(table["arm"]):
            continue
        teacher = by_seed(table, TEACHER).mean(axis=1)
        for arm in in_order(table, without=TEACHER):
            students = by_seed(table, arm)
            if not students.index.equals(teacher.index):
                raise LesionKDError(f"arm {arm!r} and its teacher were not scored on the same cases; select those that both have")
            rank = pd.Series([_spearman(students[seed], teacher) for seed in students])
            ahead = students.sub(teacher, axis=0).to_numpy()
            rows.append(family | {
                "arm": arm, "spearman": rank.mean(), "spearman_low": rank.min(), "spearman_high": rank.max(),
                "better": (ahead > 0).mean(), "equal": (ahead == 0).mean(), "cases": len(students), "seeds": students.shape[1],
            })
    return as_table(rows, per_case)


def _spearman(first: pd.Series, second: pd.Series) -> float:
    from scipy.stats import spearmanr

    return float(spearmanr(first, second).statistic) if min(first.nunique(), second.nunique()) > 1 else np.nan


def accuracy_ratio(per_case: pd.DataFrame, reference: str = "unet64", method: str = "method", draws: int = 5000) -> pd.DataFrame:
    """Mean Dice over cases and seeds of the method, over that of the teacher network `reference`, per data set.

    Both on the same cases; bootstrap 95 % interval over groups and the method's seeds. Needs the column
    teacher, and rows with arm `teacher` where the reference was trained; elsewhere the ratio is NaN: not measured.

    Returns
    -------
    DataFrame
        Columns of FAMILY (teacher: the method's own); arm, reference, ratio, low, high, dice, reference_dice, cases, groups, seeds, covers.
    """
    rows = []
    yardsticks = {_but_teacher(family): by_seed(table, TEACHER) for family, table in families(per_case) if family.get("teacher") == reference}
    for family, table in families(per_case):
        if method not in set(table["arm"]):
            continue
        ours, theirs = by_seed(table, method), yardsticks.get(_but_teacher(family), pd.DataFrame())
        numbers = dict.fromkeys(("ratio", "low", "high"), np.nan) if theirs.empty else _quotient(ours, theirs, draws)
        groups, seeds = ours.index.get_level_values("group").nunique(), ours.shape[1]
        size = {"cases": len(ours), "groups": groups, "seeds": seeds, "covers": covers(groups, seeds)}
        rows.append(family | {"arm": method, "reference": reference} | numbers | {"dice": ours.mean().mean(), "reference_dice": theirs.mean().mean()} | size)
    return as_table(rows, per_case)


def _but_teacher(family: dict[str, str]) -> tuple[str, ...]:
    return tuple(value for name, value in family.items() if name != "teacher")


def _quotient(ours: pd.DataFrame, theirs: pd.DataFrame, draws: int) -> dict[str, float]:
    """Quotient of two mean scores and its interval; every draw takes the same groups of both."""
    if not ours.index.equals(theirs.index):
        raise LesionKDError("the method and the reference network were not scored on the same cases; score them alike or select what they share")
    above, below = ours.groupby("group").sum().to_numpy(), theirs.mean(axis=1).groupby("group").sum().to_numpy()
    of_groups, of_seeds = drawn(*above.shape, draws)
    with np.errstate(invalid="ignore", divide="ignore"):  # a reference of Dice 0 has no ratio
        ratios = ((of_groups @ above) * of_seeds).sum(1) / above.shape[1] / (of_groups @ below)
        low, high = percentiles(ratios[np.isfinite(ratios)]) if len(above) > 1 and below.any() else (np.nan, np.nan)
        return {"ratio": above.mean(1).sum() / below.sum() if below.any() else np.nan, "low": low, "high": high}
