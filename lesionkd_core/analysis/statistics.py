"""Statistics between arms on per-case scores of one split (DESIGN, Scores).

A per-case table has the columns arm, seed, id, group and those of `evaluation.score_masks`. Rows that
share the columns of `FAMILY` (those that the table has) are compared with each other and with no others.
Rows with arm `teacher` are the teacher's own scores. The order of rows changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import pandas as pd

from ..config import ARMS, LesionKDError
from ..evaluation import HIGHER_IS_BETTER

FAMILY = ("dataset", "test_dataset", "profile", "teacher")
"""Columns in which the rows of one comparison agree: a Holm family each."""

TEACHER = "teacher"
THIRDS = ("lowest", "middle", "highest")


def families(table: pd.DataFrame) -> Iterator[tuple[dict[str, str], pd.DataFrame]]:
    """The parts of a table that are compared within, one a data set and teacher, and what each shares."""
    if "split" in table and table["split"].nunique() > 1:
        raise LesionKDError(f"statistics are taken on one split, the table holds {', '.join(sorted(table['split'].unique()))}; select one, say test")
    keys = [name for name in FAMILY if name in table]
    if not keys:
        yield {}, table
        return
    for values, part in table.groupby(keys, dropna=False):
        yield dict(zip(keys, values)), part


def in_order(table: pd.DataFrame, without: str | None = None) -> list[str]:
    """The arms of a table as METHOD.md orders them, others behind by name."""
    known = {arm: place for place, arm in enumerate(ARMS)}
    return sorted(set(table["arm"]) - {without}, key=lambda arm: (known.get(arm, len(known)), arm))


def by_seed(per_case: pd.DataFrame, arm: str, metric: str = "dice") -> pd.DataFrame:
    """One score of one arm: rows (group, id), columns seeds."""
    scores = per_case[per_case["arm"] == arm].set_index(["group", "id", "seed"])[metric]
    if scores.index.has_duplicates:
        raise LesionKDError(f"a case of arm {arm!r} is scored twice with one seed: the table mixes runs (folds, weights, data sets); select those of one")
    table = scores.unstack("seed")
    if table.size != len(scores):
        raise LesionKDError(f"the seeds of arm {arm!r} were not scored on the same cases; score them alike or select what they share")
    return table


def differences(per_case: pd.DataFrame, arm: str, other: str, metric: str = "dice") -> pd.DataFrame:
    """Paired differences arm - other: rows (group, id), columns seeds."""
    ours, theirs = (by_seed(per_case, name, metric) for name in (arm, other))
    if not (ours.index.equals(theirs.index) and ours.columns.equals(theirs.columns)):
        raise LesionKDError(
            f"arms {arm!r} ({len(ours)} cases, seeds {list(ours)}) and {other!r} ({len(theirs)} cases, seeds {list(theirs)}) "
            "were not scored on the same cases and seeds; score them alike or select what they share"
        )
    return ours - theirs


@lru_cache(maxsize=1)
def drawn(groups: int, seeds: int, draws: int) -> tuple[np.ndarray, np.ndarray]:
    """How often every bootstrap draw takes each group and each seed: (draws, groups) and (draws, seeds)."""
    rng = np.random.default_rng(0)
    of_groups, of_seeds = (rng.multinomial(n, np.full(n, 1 / n), size=draws).astype(float) for n in (groups, seeds))
    return of_groups, of_seeds


def percentiles(means: np.ndarray) -> tuple[float, float]:
    low, high = np.nanpercentile(means, [2.5, 97.5]).round(12)  # rounding noise is no width
    return float(low), float(high)


def interval(values: np.ndarray, draws: int = 5000) -> tuple[float, float]:
    """95 % bootstrap interval of the mean of (groups, seeds) values, both drawn with replacement.

    NaN is left out. One seed: the interval covers cases only. Fewer than two groups tell nothing: NaN.
    """
    known = ~np.isnan(values)
    values, known = values[known.any(1)], known[known.any(1)]
    if len(values) < 2:
        return np.nan, np.nan
    of_groups, of_seeds = drawn(*values.shape, draws)
    total, count = (((of_groups @ part) * of_seeds).sum(1) for part in (np.where(known, values, 0), known.astype(float)))
    with np.errstate(invalid="ignore"):  # a draw that holds nothing but NaN is left out
        return percentiles(total / count)


def case_mean(scored: pd.DataFrame, draws: int = 5000) -> tuple[float, float, float]:
    """Mean over cases and seeds of `by_seed`, NaN left out, and its 95 % interval; whole groups and seeds are drawn with replacement."""
    if not scored.notna().any(axis=None):
        return np.nan, np.nan, np.nan
    sums, sizes = (part.groupby(level="group").sum().to_numpy(float) for part in (scored, scored.notna()))
    of_groups, of_seeds = drawn(*sums.shape, draws)
    with np.errstate(invalid="ignore"):  # a draw that holds nothing but NaN is left out
        means = ((of_groups @ sums) * of_seeds).sum(1) / ((of_groups @ sizes) * of_seeds).sum(1)
    return float(np.nanmean(scored.to_numpy())), *(percentiles(means) if len(sums) > 1 else (np.nan, np.nan))


def covers(groups: int, seeds: int) -> str:
    """What an interval over so many groups and seeds covers: 'cases and seeds', 'cases', 'nothing'."""
    return "nothing" if groups < 2 else "cases" if seeds < 2 else "cases and seeds"


def estimate(cases: pd.DataFrame, draws: int = 5000) -> tuple[dict[str, Any], pd.Series]:
    """Mean difference with its interval, from `differences`; and the differences of the groups.

    A case's difference is averaged over seeds, then over its group; every group counts the same.
    """
    by_group = cases.mean(axis=1).groupby("group").mean().dropna().round(12)  # equal but for rounding is a tie
    low, high = interval(cases.groupby("group").mean().to_numpy(float), draws)
    size = {"groups": len(by_group), "seeds": cases.shape[1], "covers": covers(len(by_group), cases.shape[1])}
    return {"difference": round(by_group.mean(), 12), "low": low, "high": high} | size, by_group


def compare_arms(per_case: pd.DataFrame, method: str = "method", metric: str = "dice", draws: int = 5000) -> pd.DataFrame:
    """The method against every other arm, as DESIGN's Scores says; the teacher is no arm.

    A case's difference is averaged over seeds, then over its group; Wilcoxon signed-rank (Pratt) on
    groups; bootstrap 95 % interval over groups and seeds; Holm over one family a data set and teacher.

    Returns
    -------
    DataFrame
        Columns of FAMILY; arm, other, metric, difference (arm - other), low, high, groups, seeds, covers (see `covers`),
        p, p_holm, better, worse (groups), undefined (scores of 0/0, left out), difference_seed0 and so on.
    """
    return _compare(per_case, lambda table: [(method, other) for other in _others(table, method)], metric, draws)


def compare_with(per_case: pd.DataFrame, reference: str = "alone", metric: str = "dice", draws: int = 5000) -> pd.DataFrame:
    """Exploratory: every arm but the method, which `compare_arms` holds against all, against one, by default the student alone.

    Columns as of `compare_arms`, with `reference` as `other`; a Holm family of its own.
    """
    return _compare(per_case, lambda table: [(arm, reference) for arm in _others(table, reference) if arm != "method"], metric, draws)


def _compare(per_case: pd.DataFrame, pairs: Callable[[pd.DataFrame], list[tuple[str, str]]], metric: str, draws: int) -> pd.DataFrame:
    rows = []
    for family, table in families(per_case):
        rows += _with_holm([family | _compared(differences(table, arm, other, metric), arm, other, metric, draws) for arm, other in pairs(table)])
    return as_table(rows, per_case)


def _others(table: pd.DataFrame, method: str) -> list[str]:
    arms = in_order(table, without=TEACHER)
    return [arm for arm in arms if arm != method] if method in arms else []


def as_table(rows: list[dict[str, Any]], source: pd.DataFrame) -> pd.DataFrame:
    """Rows as a table that can be selected by data set even where there is no row."""
    return pd.DataFrame(rows) if rows else pd.DataFrame(columns=[*(name for name in FAMILY if name in source), "arm"])


def _compared(cases: pd.DataFrame, method: str, other: str, metric: str, draws: int) -> dict[str, Any]:
    from scipy.stats import wilcoxon

    numbers, by_group = estimate(cases, draws)
    gain = by_group if HIGHER_IS_BETTER[metric] else -by_group
    p = wilcoxon(by_group, zero_method="pratt").pvalue if by_group.any() else 1.0
    counts = {"better": int((gain > 0).sum()), "worse": int((gain < 0).sum()), "undefined": int(cases.isna().sum().sum())}
    seeds: dict[str, float] = cases.groupby("group").mean().mean().add_prefix("difference_seed").to_dict()
    return {"arm": method, "other": other, "metric": metric} | numbers | {"p": float(p), "p_holm": np.nan} | counts | seeds


def _with_holm(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row | {"p_holm": p} for row, p in zip(rows, holm(np.array([row["p"] for row in rows], float)).tolist())]


def varying(comparison: pd.DataFrame) -> str:
    """The column in which the pairs of a comparison differ: 'arm' where all are held against one, else 'other'."""
    return "arm" if comparison["arm"].nunique() > 1 else "other"


def seen(row: Any) -> str:
    """Whether a row of a comparison sees a difference: 'yes' where interval and test of ranks both do, 'in doubt' where one does, else 'no'.

    Where nothing is tested (thirds), the interval decides.
    """
    apart = row.low > 0 or row.high < 0
    ranks = row.p_holm <= 0.05 if hasattr(row, "p_holm") else apart
    return "yes" if apart and ranks else "in doubt" if apart or ranks else "no"


def holm(p: np.ndarray) -> np.ndarray:
    """Holm's step-down adjustment of (m,) p-values.

    >>> holm(np.array([0.04, 0.01, 0.03]))
    array([0.06, 0.03, 0.06])
    """
    order = np.argsort(p)
    stepped = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(stepped, 1)
    return adjusted


def by_tertile(per_case: pd.DataFrame, column: str = "lesion_pixels", method: str = "method", other: str = "alone", draws: int = 5000) -> pd.DataFrame:
    """Method minus other arm in Dice in thirds of lesion size or contrast; described, not tested.

    The thirds are cut on the distinct lesion cases of a data set; equal values stay together.

    Parameters
    ----------
    column : str
        lesion_pixels (px at the prepared size) or contrast (0..1). Lesions without a value are left out.

    Returns
    -------
    DataFrame
        Columns of FAMILY; arm, other, column, third (lowest, middle, highest), at_least, at_most (of `column`), cases,
        missed, missed_other (lesions, mean over seeds), difference, low, high, groups, seeds, covers.
    """
    if column not in per_case:
        raise LesionKDError(f"the per-case table has no column {column!r}, it was made by an earlier version; remove the runs' folders and run again")
    rows = []
    for family, table in families(per_case):
        values = table[table["lesion_pixels"] > 0].groupby("id")[column].first().dropna()
        if not {method, other} <= set(table["arm"]) or values.empty:
            continue
        third = np.searchsorted(np.quantile(values, [1 / 3, 2 / 3]), values)
        for place in np.unique(third):
            inside = values[third == place]
            part = table[table["id"].isin(inside.index)]
            where = {"third": THIRDS[place], "at_least": inside.min(), "at_most": inside.max(), "cases": len(inside)}
            missed = {name: by_seed(part, arm, "missed").sum().mean() for name, arm in (("missed", method), ("missed_other", other))}
            numbers, _ = estimate(differences(part, method, other), draws)
            rows.append(family | {"arm": method, "other": other, "column": column} | where | missed | numbers)
    return as_table(rows, per_case)


def compare_missed(per_case: pd.DataFrame, method: str = "method") -> pd.DataFrame:
    """Does the method miss fewer lesions than every other arm? An exact paired test on groups.

    Seeds of one lesion and lesions of one group (frames of a video) are no independent observations: all
    misses of a group are added up for each arm, and the group counts once, for the arm that missed fewer;
    two-sided binomial test on the groups that differ. With one seed and one case a group it is McNemar's exact test.

    Returns
    -------
    DataFrame
        Columns of FAMILY; arm, other, lesions, missed, missed_other (mean over seeds), fewer, more (groups in which
        the method misses fewer, more), p, p_holm (a family of its own), groups, seeds.
    """
    from scipy.stats import binomtest

    rows = []
    for family, table in families(per_case):
        compared, lesions = [], table[table["lesion_pixels"] > 0]
        for other in _others(lesions, method):
            ours, theirs = (by_seed(lesions, arm, "missed") for arm in (method, other))
            by_group = differences(lesions, method, other, "missed").sum(axis=1).groupby("group").sum()
            fewer, more = int((by_group < 0).sum()), int((by_group > 0).sum())
            numbers = {"arm": method, "other": other, "lesions": len(ours), "missed": ours.sum().mean(), "missed_other": theirs.sum().mean()}
            p = binomtest(fewer, fewer + more).pvalue if fewer + more else 1.0
            compared.append(family | numbers | {"fewer": fewer, "more": more, "p": float(p), "p_holm": np.nan, "groups": len(by_group), "seeds": ours.shape[1]})
        rows += _with_holm(compared)
    return as_table(rows, per_case)
