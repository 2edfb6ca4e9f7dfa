"""Statistics on per-case scores and learning curves.

A per-case table has the columns arm, seed, id, group and the scores. Only rows that agree in the
columns of `FAMILY` (those that the table has) are compared with each other. Rows with arm `teacher`
are the teacher's own scores. The order of the rows does not matter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pandas as pd

from ..config import LesionKDError
from ..evaluate import HIGHER_IS_BETTER, METRICS
from ..losses import TERMS
from ..pipeline import ARMS

FAMILY = ("dataset", "test_dataset", "profile", "teacher", "seg_loss", "budget", "labels")
"""Columns in which the rows of one comparison agree; each combination is a Holm family of its own.

budget (epochs) and labels (fraction of training cases with a mask) vary in the experiment on when a
teacher helps, see `figures.when_teacher_helps`.
"""
TEACHER = "teacher"
TERTILES = ("lowest", "middle", "highest")
SIGNIFICANT = ("better", "worse")
"""Verdicts of `compare_arms` that name a difference."""


def families(table: pd.DataFrame) -> Iterator[tuple[dict[str, Any], pd.DataFrame]]:
    """The parts of a table that are compared within, and the values that the rows of each share."""
    if "split" in table and table["split"].nunique() > 1:
        found = ", ".join(sorted(table["split"].unique()))
        raise LesionKDError(
            f"statistics need the scores of one split; the table has {found}. Select one, such as "
            "table[table['split'] == 'test']"
        )
    keys = [name for name in FAMILY if name in table]
    if not keys:
        yield {}, table
        return
    for values, part in table.groupby(keys, dropna=False):
        yield dict(zip(keys, values)), part


def in_order(table: pd.DataFrame, without: str | None = None) -> list[str]:
    """The arms of a table in the order of `pipeline.ARMS` and of the loss terms, then by name."""
    known = {arm: place for place, arm in enumerate(dict.fromkeys([*ARMS, *TERMS]))}
    return sorted(set(table["arm"]) - {without}, key=lambda arm: (known.get(arm, len(known)), arm))


def by_seed(per_case: pd.DataFrame, arm: str, metric: str = "dice") -> pd.DataFrame:
    """One score of one arm: rows (group, id), columns seeds."""
    scores = per_case[per_case["arm"] == arm].set_index(["group", "id", "seed"])[metric]
    if scores.index.has_duplicates:
        raise LesionKDError(
            f"a case of arm {arm!r} is scored twice with one seed: the table mixes several runs "
            "(folds, weights, data sets). Select one"
        )
    table = scores.unstack("seed")
    if table.size != len(scores):
        raise LesionKDError(
            f"the seeds of arm {arm!r} were not scored on the same cases. Score all seeds on the "
            "same cases, or select those that they share"
        )
    return table


def differences(per_case: pd.DataFrame, arm: str, other: str, metric: str = "dice") -> pd.DataFrame:
    """Paired differences arm - other: rows (group, id), columns seeds."""
    first, second = (by_seed(per_case, name, metric) for name in (arm, other))
    _require_same_cases(first, second, f"arms {arm!r} and {other!r}")
    if not first.columns.equals(second.columns):
        raise LesionKDError(
            f"arms {arm!r} and {other!r} were not scored with the same cases and seeds: "
            f"{list(first)} and {list(second)}. Select the seeds that both have"
        )
    return first - second


def _require_same_cases(first: pd.DataFrame, second: pd.DataFrame, who: str) -> None:
    if not first.index.equals(second.index):
        raise LesionKDError(
            f"{who} were not scored on the same cases and seeds ({len(first)} and {len(second)} "
            "cases). Select those that both have"
        )


# Means and intervals ------------------------------------------------------------------------------


def _bootstrap(above: np.ndarray, below: np.ndarray, draws: int) -> tuple[float, float]:
    """95 % bootstrap interval of sum(above) / sum(below), both (groups, seeds).

    Groups and seeds are drawn with replacement. NaN with fewer than two groups.
    """
    if len(above) < 2:
        return np.nan, np.nan
    groups, seeds = _drawn(*above.shape, draws)
    total, count = (((groups @ part) * seeds).sum(1) for part in (above, below))
    with np.errstate(invalid="ignore", divide="ignore"):
        ratios = total / count
    ratios = ratios[np.isfinite(ratios)]  # a draw of nothing but undefined scores is left out
    if not len(ratios):
        return np.nan, np.nan
    low, high = np.percentile(ratios, [2.5, 97.5]).round(12)  # drops rounding noise
    return float(low), float(high)


@lru_cache(maxsize=1)
def _drawn(groups: int, seeds: int, draws: int) -> tuple[np.ndarray, np.ndarray]:
    """Counts of each group (draws, groups) and each seed (draws, seeds) in bootstrap draws."""
    rng = np.random.default_rng(0)
    counts = [rng.multinomial(n, np.full(n, 1 / n), draws).astype(float) for n in (groups, seeds)]
    return counts[0], counts[1]


def interval(values: np.ndarray, draws: int = 5000) -> tuple[float, float]:
    """95 % bootstrap interval of the mean of (groups, seeds) values; NaN is left out.

    With one seed it covers the choice of cases only. With fewer than two groups it is NaN.
    """
    values = values[~np.isnan(values).all(1)]
    known = ~np.isnan(values)
    return _bootstrap(np.where(known, values, 0), known.astype(float), draws)


def case_mean(scores: pd.DataFrame, draws: int = 5000) -> tuple[float, float, float]:
    """Mean over cases and seeds of a table from `by_seed`, and its 95 % bootstrap interval.

    NaN is left out. Whole groups and seeds are drawn with replacement.
    """
    parts = scores, scores.notna()
    sums, sizes = (part.groupby(level="group").sum().to_numpy(float) for part in parts)
    mean = sums.sum() / sizes.sum() if sizes.any() else np.nan
    return float(mean), *_bootstrap(sums, sizes, draws)


def _size(groups: int, seeds: int) -> dict[str, Any]:
    """Numbers of groups and seeds, and what an interval over them covers."""
    covers = "nothing" if groups < 2 else "cases" if seeds < 2 else "cases and seeds"
    return {"groups": groups, "seeds": seeds, "covers": covers}


def means(per_case: pd.DataFrame, draws: int = 5000) -> pd.DataFrame:
    """Mean scores of each arm over cases and seeds.

    Returns
    -------
    DataFrame
        Columns of FAMILY; arm, seeds, cases, groups, dice with its 95 % interval low and high, the
        other scores, missed and false_alarm (cases, mean over seeds), dice_seed0 and so on.
    """
    rows = []
    for family, part in families(per_case):
        for arm in dict.fromkeys([TEACHER] * (TEACHER in set(part["arm"])) + in_order(part)):
            scores, own = by_seed(part, arm), part[part["arm"] == arm]
            groups, seeds = scores.index.get_level_values("group").nunique(), scores.shape[1]
            row = {"arm": arm, "seeds": seeds, "cases": len(scores), "groups": groups}
            row |= dict(zip(("dice", "low", "high"), case_mean(scores, draws)))
            row |= {n: own[n].mean() for n in METRICS if n in own and n != "dice"}
            row |= {n: own[n].sum() / seeds for n in ("missed", "false_alarm") if n in own}
            rows.append(family | row | scores.mean().add_prefix("dice_seed").to_dict())
    return as_table(rows, per_case)


def as_table(rows: list[dict[str, Any]], source: pd.DataFrame) -> pd.DataFrame:
    """Rows as a table that can be selected by data set even if it is empty."""
    empty = [*(name for name in FAMILY if name in source), "arm"]
    return pd.DataFrame(rows) if rows else pd.DataFrame(columns=empty)


# Comparisons of arms ------------------------------------------------------------------------------


def compare_arms(
    per_case: pd.DataFrame, method: str = "method", metric: str = "dice", draws: int = 5000
) -> pd.DataFrame:
    """Compare the method with every other arm except the teacher.

    The difference of a case is averaged over seeds, then over its group. Wilcoxon signed-rank test
    (Pratt) on groups, Holm over one family for each data set and teacher; 95 % bootstrap interval
    over groups and seeds.

    Returns
    -------
    DataFrame
        Columns of FAMILY; arm, other, metric, difference (arm - other), low, high, groups, seeds,
        covers (what the interval covers), p, p_holm, better and worse (groups), undefined (scores
        of 0/0, left out), verdict, difference_seed0 and so on.

    Notes
    -----
    verdict has one of these values:

    - better, worse: the interval excludes 0 and p_holm is at most 0.05;
    - too few groups: not so, and with this number of groups p_holm cannot be 0.05 or less;
    - inconclusive: only the interval excludes 0, or only p_holm is at most 0.05;
    - not significant: neither.
    """
    return _compare(per_case, method, lambda arms: [(method, a) for a in arms], metric, draws)


def compare_with(
    per_case: pd.DataFrame,
    reference: str = "alone",
    arms: tuple[str, ...] = (),
    metric: str = "dice",
    draws: int = 5000,
) -> pd.DataFrame:
    """Exploratory: compare arms with one reference, by default the student alone.

    `arms` empty: every arm but the method, which `compare_arms` compares. Columns as in
    `compare_arms`; other is the reference. The Holm family is its own.
    """

    def pairs(others: list[str]) -> list[tuple[str, str]]:
        return [(a, reference) for a in others if (a in arms if arms else a != "method")]

    return _compare(per_case, reference, pairs, metric, draws)


def _compare(
    per_case: pd.DataFrame,
    one: str,
    choose: Callable[[list[str]], list[tuple[str, str]]],
    metric: str,
    draws: int,
) -> pd.DataFrame:
    rows = []
    for family, part in families(per_case):
        arms = in_order(part, without=TEACHER)
        pairs = choose([a for a in arms if a != one] if one in arms else [])
        found = [family | _compared(part, *pair, metric, draws) for pair in pairs]
        rows += [row | {"verdict": _verdict(row, len(found))} for row in _with_holm(found)]
    return as_table(rows, per_case)


def _compared(part: pd.DataFrame, arm: str, other: str, metric: str, draws: int) -> dict[str, Any]:
    from scipy.stats import wilcoxon

    cases = differences(part, arm, other, metric)
    row, by_group = _estimate(cases, draws)
    p = wilcoxon(by_group, zero_method="pratt").pvalue if by_group.any() else 1.0
    gain = by_group if HIGHER_IS_BETTER[metric] else -by_group
    counts = {"better": int((gain > 0).sum()), "worse": int((gain < 0).sum())}
    tested = {"p": float(p), "p_holm": np.nan}
    undefined = {"undefined": int(cases.isna().sum().sum()), "verdict": ""}
    seeds = cases.groupby("group").mean().mean().add_prefix("difference_seed").to_dict()
    pair = {"arm": arm, "other": other, "metric": metric}
    return {**pair, **row, **tested, **counts, **undefined, **seeds}


def _estimate(cases: pd.DataFrame, draws: int = 5000) -> tuple[dict[str, Any], pd.Series]:
    """Mean difference with its interval from `differences`, and the difference of each group.

    A case is averaged over seeds, then over its group; every group has the same weight.
    """
    # rounded, so that equal differences are ties
    by_group = cases.mean(axis=1).groupby("group").mean().dropna().round(12)
    low, high = interval(cases.groupby("group").mean().to_numpy(float), draws)
    row = {"difference": round(by_group.mean(), 12), "low": low, "high": high}
    return row | _size(len(by_group), cases.shape[1]), by_group


def _with_holm(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    adjusted = holm(np.array([row["p"] for row in rows], float))
    return [row | {"p_holm": p} for row, p in zip(rows, adjusted.tolist())]


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


def _verdict(row: dict[str, Any], tests: int) -> str:
    excludes_0, significant = row["low"] > 0 or row["high"] < 0, row["p_holm"] <= 0.05
    if excludes_0 and significant:
        higher = HIGHER_IS_BETTER[row["metric"]]
        return "better" if (row["difference"] > 0) == higher else "worse"
    if 2 * tests / 2.0 ** row["groups"] > 0.05:  # the smallest p of the exact test, after Holm
        return "too few groups"
    return "inconclusive" if excludes_0 or significant else "not significant"


def compare_missed(per_case: pd.DataFrame, method: str = "method") -> pd.DataFrame:
    """Compare the lesions that the method and every other arm miss: an exact paired test on groups.

    Seeds of one lesion and lesions of one group (frames of a video) are not independent. All misses
    of a group are added for each arm, and the group counts once, for the arm that missed fewer. The
    test is two-sided binomial on the groups that differ; with one seed and one case in each group
    it is McNemar's exact test.

    Returns
    -------
    DataFrame
        Columns of FAMILY; arm, other, lesions, missed and missed_other (mean over seeds), fewer and
        more (groups in which the method misses fewer, more), p, p_holm (a family of its own),
        verdict ('fewer' or 'more' if p_holm is at most 0.05, else 'not significant'), groups,
        seeds.
    """
    from scipy.stats import binomtest

    rows = []
    for family, table in families(per_case):
        found, lesions = [], table[table["lesion_pixels"] > 0]
        arms = in_order(lesions, without=TEACHER)
        for other in (arm for arm in arms if arm != method and method in arms):
            apart = differences(lesions, method, other, "missed")
            by_group = apart.sum(axis=1).groupby("group").sum()
            fewer, more = int((by_group < 0).sum()), int((by_group > 0).sum())
            p = binomtest(fewer, fewer + more).pvalue if fewer + more else 1.0
            row: dict[str, Any] = family | {"arm": method, "other": other, "lesions": len(apart)}
            row |= _missed(lesions, method, other) | {"fewer": fewer, "more": more}
            row |= {"p": float(p), "p_holm": np.nan, "verdict": ""}
            found.append(row | {"groups": len(by_group), "seeds": apart.shape[1]})
        for row in _with_holm(found):
            which = "fewer" if row["fewer"] > row["more"] else "more"
            rows.append(row | {"verdict": which if row["p_holm"] <= 0.05 else "not significant"})
    return as_table(rows, per_case)


def _missed(lesions: pd.DataFrame, arm: str, other: str) -> dict[str, float]:
    """Missed lesions of two arms, mean over seeds."""
    names = {"missed": arm, "missed_other": other}
    return {name: by_seed(lesions, a, "missed").sum().mean() for name, a in names.items()}


def by_tertile(
    per_case: pd.DataFrame,
    column: str = "lesion_pixels",
    method: str = "method",
    other: str = "alone",
    draws: int = 5000,
) -> pd.DataFrame:
    """Method minus other arm in Dice in thirds of lesion size or contrast; described, not tested.

    The thirds are cut on the distinct lesion cases of a data set; equal values stay together.

    Parameters
    ----------
    column : str
        lesion_pixels (px at the prepared size) or contrast (0..1). Lesions without a value are left
        out.

    Returns
    -------
    DataFrame
        Columns of FAMILY; arm, other, column, third (lowest, middle, highest), at_least and at_most
        (of `column`), cases, missed and missed_other (lesions, mean over seeds), difference, low,
        high, groups, seeds, covers.
    """
    if column not in per_case:
        raise LesionKDError(
            f"the per-case table has no column {column!r}: an earlier version made it. Remove the "
            "folders of these runs and run again"
        )
    rows = []
    for family, table in families(per_case):
        lesions = table[table["lesion_pixels"] > 0]
        values = lesions.groupby("id")[column].first().dropna()
        if not {method, other} <= set(table["arm"]) or values.empty:
            continue
        third = np.searchsorted(np.quantile(values, [1 / 3, 2 / 3]), values)
        for place in np.unique(third):
            inside = values[third == place]
            part = table[table["id"].isin(inside.index)]
            row: dict[str, Any] = {"arm": method, "other": other, "column": column}
            row["third"] = TERTILES[place]
            row |= {"at_least": inside.min(), "at_most": inside.max(), "cases": len(inside)}
            row |= _missed(part, method, other)
            rows.append(family | row | _estimate(differences(part, method, other), draws)[0])
    return as_table(rows, per_case)


# Comparisons with larger networks -----------------------------------------------------------------


def accuracy_ratio(
    per_case: pd.DataFrame, reference: str = "unet64", method: str = "method", draws: int = 5000
) -> pd.DataFrame:
    """Mean Dice of the method over that of the teacher network `reference`, on the same cases.

    Requires the column teacher, and rows with arm `teacher` of the reference; without them the
    ratio is NaN: not measured. 95 % bootstrap interval over groups and the method's seeds.

    Returns
    -------
    DataFrame
        Columns of FAMILY (teacher: the method's own); arm, reference, ratio, low, high, dice,
        reference_dice, cases, groups, seeds, covers.
    """

    def without_teacher(family: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(value for name, value in family.items() if name != "teacher")

    found = list(families(per_case))
    references = {
        without_teacher(family): by_seed(table, TEACHER)
        for family, table in found
        if family.get("teacher") == reference
    }
    rows = []
    for family, table in found:
        if method not in set(table["arm"]):
            continue
        scores = by_seed(table, method)
        theirs = references.get(without_teacher(family), pd.DataFrame())
        row: dict[str, Any] = {"arm": method, "reference": reference}
        row |= dict.fromkeys(("ratio", "low", "high"), np.nan)
        row |= {} if theirs.empty else _quotient(scores, theirs, draws)
        row |= {"dice": scores.mean().mean(), "reference_dice": theirs.mean().mean()}
        groups = scores.index.get_level_values("group").nunique()
        rows.append(family | row | {"cases": len(scores)} | _size(groups, scores.shape[1]))
    return as_table(rows, per_case)


def _quotient(ours: pd.DataFrame, theirs: pd.DataFrame, draws: int) -> dict[str, float]:
    """Ratio of two mean scores and its interval; each draw takes the same groups of both."""
    _require_same_cases(ours, theirs, "the method and the reference network")
    above = ours.groupby("group").sum().to_numpy()
    below = theirs.mean(axis=1).groupby("group").sum().to_numpy()
    if not below.any():  # a reference of Dice 0 has no ratio
        return {}
    low, high = _bootstrap(above, np.repeat(below[:, None], above.shape[1], 1), draws)
    return {"ratio": above.mean(1).sum() / below.sum(), "low": low, "high": high}


# Learning curves ----------------------------------------------------------------------------------


def _by_epoch(history: pd.DataFrame) -> pd.DataFrame:
    """Validation Dice, mean over folds if there are any: rows (arm, seed), columns epochs."""
    one_run = ["arm", "seed", "epoch", *(["fold"] if "fold" in history else [])]
    if history.duplicated(one_run).any():
        raise LesionKDError(
            "the history has several runs of one arm and seed. Select one, or add the columns of "
            f"{', '.join(FAMILY)} in which they differ"
        )
    return history.groupby(["arm", "seed", "epoch"])["val_dice"].mean().unstack("epoch")


def learning_curves(history: pd.DataFrame) -> pd.DataFrame:
    """Validation Dice of each arm by epoch: mean, lowest and highest over seeds.

    Parameters
    ----------
    history : DataFrame
        Columns arm, seed, epoch, val_dice, those of FAMILY in which runs differ, and fold if there
        are folds.

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
            curve = values.agg(["mean", "min", "max", "count"]).T.reset_index()
            curve.columns = pd.Index(["epoch", "mean", "low", "high", "seeds"])
            curve = curve[curve["seeds"] > 0].astype({"seeds": int})
            parts.append(pd.DataFrame(family | {"arm": arm}, curve.index).join(curve))
    return pd.concat(parts, ignore_index=True)


def convergence(history: pd.DataFrame, tolerance: float = 0.005) -> pd.DataFrame:
    """Whether each run has converged, and whether it has trained at all.

    With q = epochs // 4 (at least 1), `last` is the mean validation Dice over the last q epochs,
    `third` over the q epochs before them, and `change` = last - third.

    Parameters
    ----------
    history : DataFrame
        As in `learning_curves`.
    tolerance : float
        Largest |change| of a run or arm that has converged (less than).

    Returns
    -------
    DataFrame
        One row for each run: columns of FAMILY; arm, seed, run and fold if there are any; epochs,
        third, last, change; converged (|change| < tolerance); arm_change (mean of change
        over the arm's runs), arm_converged (|arm_change| < tolerance); failed (last is below half
        of the median of the arm's runs, or 0).
    """
    shared = [name for name in FAMILY if name in history]
    one_run = [*shared, "arm", "seed", *(n for n in ("run", "fold") if n in history)]
    if history.duplicated([*one_run, "epoch"]).any():
        raise LesionKDError("the history has several runs of one arm and seed. Add a column 'run'")
    rows = []
    for values, run in history.sort_values("epoch").groupby(one_run, dropna=False):
        dice = run["val_dice"].to_numpy(float)
        quarter = max(len(dice) // 4, 1)
        third = dice[-2 * quarter : -quarter].mean() if len(dice) > 1 else np.nan
        numbers = {"epochs": len(dice), "third": third, "last": dice[-quarter:].mean()}
        rows.append(dict(zip(one_run, values)) | numbers)
    table = pd.DataFrame(rows, columns=[*one_run, "epochs", "third", "last"])
    table["change"] = table["last"] - table["third"]
    table["converged"] = table["change"].abs() < tolerance
    by_arm = table.groupby([*shared, "arm"], dropna=False)
    table["arm_change"] = by_arm["change"].transform("mean")
    table["arm_converged"] = table["arm_change"].abs() < tolerance
    median = by_arm["last"].transform("median")
    table["failed"] = (table["last"] < 0.5 * median) | (table["last"] == 0)
    return table


def gradient_norms(history: pd.DataFrame) -> pd.DataFrame:
    """Norm and direction of each weighted term's gradient, compared with that of L_seg.

    They are taken at the layers that all terms of an arm reach. Those layers differ between arms,
    so a term is compared with L_seg in the same arm only.

    Parameters
    ----------
    history : DataFrame
        Columns arm, epoch, grad_TERM and cos_TERM, and those of FAMILY in which runs differ.

    Returns
    -------
    DataFrame
        Columns of FAMILY; arm, term, ratio (norm of the term's gradient over that of L_seg, median
        over epochs and seeds), cosine (with the gradient of L_seg, median), cosine_low and
        cosine_high (quartiles).
    """
    rows = []
    for family, table in families(history):
        for arm in in_order(table, without=TEACHER):
            part = table[table["arm"] == arm]
            columns = [n for n in part if n.startswith("grad_") and n != "grad_seg"]
            for term in (name.removeprefix("grad_") for name in columns):
                cosine = part[f"cos_{term}"].quantile([0.5, 0.25, 0.75]).tolist()
                ratio = (part[f"grad_{term}"] / part["grad_seg"]).median()
                if np.isfinite([ratio, *cosine]).all():
                    names = ("cosine", "cosine_low", "cosine_high")
                    row = {"arm": arm, "term": term, "ratio": ratio}
                    rows.append(family | row | dict(zip(names, cosine)))
    return as_table(rows, history)


# Calibration --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Calibration:
    """Reliability of the probabilities of pixels, from `calibration`.

    Attributes
    ----------
    bins : DataFrame
        One row for each bin of probabilities: low, high, pixels, predicted (mean probability) and
        observed (fraction of its pixels that are lesion); NaN in an empty bin.
    ece : float
        Expected calibration error: mean of |observed - predicted| over pixels.
    brier : float
        Brier score: mean of (probability - mask)^2 over pixels.
    """

    bins: pd.DataFrame
    ece: float
    brier: float


def calibration(probabilities: np.ndarray, masks: np.ndarray, bins: int = 10) -> Calibration:
    """Compare probabilities with the fraction of pixels that are lesion, over all pixels.

    Most pixels are background far from any lesion, so both numbers are small for every network that
    has learned something. Compare them between networks on the same cases.

    Parameters
    ----------
    probabilities, masks : (N, H, W)
        In 0..1, and 0/1.
    bins : int
        Number of bins of equal width; 1.0 belongs to the last.

    Source: Guo et al. 2017 (expected calibration error); Brier 1950.
    """
    p, truth = np.asarray(probabilities, np.float32).ravel(), np.asarray(masks).ravel() > 0
    if p.size != truth.size or not p.size:
        raise LesionKDError(
            f"calibration got probabilities of shape {np.shape(probabilities)} and masks of shape "
            f"{np.shape(masks)}; expected equal shapes (N, H, W)"
        )
    place = np.minimum((p * bins).astype(np.int64), bins - 1)
    pixels = np.bincount(place, minlength=bins)
    sums = [np.bincount(place, weights=values, minlength=bins) for values in (p, truth)]
    with np.errstate(invalid="ignore"):
        predicted, observed = (total / pixels for total in sums)
    edges = np.linspace(0, 1, bins + 1)
    columns = {"low": edges[:-1], "high": edges[1:], "pixels": pixels}
    table = pd.DataFrame(columns | {"predicted": predicted, "observed": observed})
    ece = np.abs(sums[1] - sums[0]).sum() / p.size
    return Calibration(table, float(ece), float(np.mean((p - truth) ** 2, dtype=np.float64)))
