"""Statistics on per-case scores and learning curves.

A per-case table has the columns arm, seed, id, group and the scores; fold if there are folds. Rows
are compared if they agree in the columns of `SETTING` that the table has. Rows with arm `teacher`
are the teacher's own scores. The order of the rows does not matter.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import pandas as pd

from ..config import LesionKDError
from ..evaluate import HIGHER_IS_BETTER, METRICS
from ..losses import TERMS
from ..pipeline import ARMS

Setting = dict[str, Hashable]
Pair = tuple[str, str]

FAMILY = ("dataset", "test_dataset")
"""All comparisons on one data set are one Holm family, whatever their budget, labels or teacher."""
SETTING = (*FAMILY, "profile", "pixels", "teacher", "seg_loss", "budget", "labels")
"""Columns in which compared rows agree; budget: epochs, labels: fraction of masks used."""
TEACHER = "teacher"
TERTILES = ("lowest", "middle", "highest")
SIGNIFICANT = ("better", "worse")
"""Verdicts that name a difference."""
OLD_ARMS = {"alone_long": ("alone", math.inf)}
"""Arms of earlier versions: base arm and how many times longer, unknown here."""


def split_arm(arm: str) -> tuple[str, float]:
    """The base of an arm, and how many times as many epochs it has.

    >>> split_arm("alone*2"), split_arm("kd")
    (('alone', 2.0), ('kd', 1.0))
    """
    if arm in OLD_ARMS:
        return OLD_ARMS[arm]
    base, _, times = arm.rpartition("*")
    return (base, float(times)) if times.isdecimal() and base else (arm, 1.0)


def terms_of(arm: str) -> list[str]:
    """The loss terms of an arm besides L_seg.

    >>> terms_of("feat=0.5+kd*2"), terms_of("method")
    (['feat', 'kd'], ['feat', 'edge'])
    """
    base = split_arm(arm)[0]
    names = ARMS.get(base, base.replace("+", ", ")).split(", ")
    return [name.partition("=")[0] for name in names if name]


def settings(table: pd.DataFrame) -> Iterator[tuple[Setting, pd.DataFrame]]:
    """The parts of a table that are compared within, and the values that the rows of each share."""
    if "split" in table and table["split"].nunique() > 1:
        found = ", ".join(sorted(table["split"].unique()))
        raise LesionKDError(
            f"statistics need the scores of one split; the table has {found}. Select one, such as "
            "table[table['split'] == 'test']"
        )
    keys = [name for name in SETTING if name in table]
    if not keys:
        yield {}, table
        return
    for values, part in table.groupby(keys, dropna=False):
        yield dict(zip(keys, values)), part


def in_order(table: pd.DataFrame, without: str | None = None) -> list[str]:
    """The arms of a table in the order of `pipeline.ARMS` and of the loss terms, then by name.

    Longer trainings follow their arm.
    """
    known = list(dict.fromkeys([*ARMS, *TERMS]))

    def place(arm: str) -> tuple[int, str, float]:
        base, times = split_arm(arm)
        first = base if base in known else base.partition("+")[0].partition("=")[0]
        return known.index(first) if first in known else len(known), base, times

    return sorted(set(table["arm"]) - {without}, key=place)


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


def _bootstrap(above: np.ndarray, below: np.ndarray, draws: int = 5000) -> tuple[float, float]:
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


@lru_cache(maxsize=4)
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


def t_interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the mean of a few numbers (Student's t), one for each training.

    NaN with fewer than two.
    """
    from scipy.stats import t

    if len(values) < 2:
        return np.nan, np.nan
    mean, error = np.mean(values), np.std(values, ddof=1) / math.sqrt(len(values))
    half = t.ppf(0.975, len(values) - 1) * error
    return float(mean - half), float(mean + half)


def case_mean(scores: pd.DataFrame, draws: int = 5000) -> tuple[float, float, float]:
    """Mean over cases and seeds of a table from `by_seed`, and its 95 % bootstrap interval.

    NaN is left out. Whole groups and seeds are drawn with replacement.
    """
    parts = scores, scores.notna()
    sums, sizes = (part.groupby(level="group").sum().to_numpy(float) for part in parts)
    mean = sums.sum() / sizes.sum() if sizes.any() else np.nan
    return float(mean), *_bootstrap(sums, sizes, draws)


def by_training(scores: pd.DataFrame, per_case: pd.DataFrame) -> pd.Series:
    """Mean of each fold over its rows and seeds, or without folds of each seed over all rows.

    `scores` has rows (group, id) or groups, and one column for each seed. The index of the result
    is fold0 and so on, or seed0.
    """
    if "fold" not in per_case or per_case["fold"].nunique() < 2:
        return scores.mean().add_prefix("seed")
    folds = per_case.groupby(list(scores.index.names))["fold"].first()
    return scores.groupby(folds).mean().mean(axis=1).add_prefix("fold")


def means(per_case: pd.DataFrame, draws: int = 5000) -> pd.DataFrame:
    """Mean scores of each arm over cases and seeds.

    Returns
    -------
    DataFrame
        Columns of SETTING; arm, seeds, cases, groups, dice with its 95 % interval low and high, the
        other scores, missed and false_alarm (cases, mean over seeds), dice_seed0 and so on, or
        dice_fold0.
    """
    rows = []
    for setting, part in settings(per_case):
        arms = in_order(part, without=TEACHER)
        if TEACHER in set(part["arm"]):
            arms.insert(0, TEACHER)
        for arm in arms:
            own, scores = part[part["arm"] == arm], by_seed(part, arm)
            seeds = scores.shape[1]
            row = setting | {"arm": arm, "seeds": seeds, "cases": len(scores)}
            row["groups"] = own["group"].nunique()
            row |= zip(("dice", "low", "high"), case_mean(scores, draws))
            row |= {n: own[n].mean() for n in METRICS if n in own and n != "dice"}
            row |= {n: own[n].sum() / seeds for n in ("missed", "false_alarm") if n in own}
            rows.append(row | by_training(scores, own).add_prefix("dice_").to_dict())
    return as_table(rows, per_case)


def as_table(rows: list[Setting], source: pd.DataFrame) -> pd.DataFrame:
    """Rows as a table that can be selected by data set even if it is empty."""
    empty = [*(name for name in SETTING if name in source), "arm"]
    return pd.DataFrame(rows) if rows else pd.DataFrame(columns=empty)


# Comparisons of arms ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """One arm minus another, on the same cases.

    Attributes
    ----------
    cases : DataFrame
        Difference of each case: rows (group, id), columns seeds.
    by_training : Series
        Mean difference of each fold, or without folds of each seed.
    low, high, t_low, t_high : float
        95 % intervals: bootstrap over groups and seeds, Student's t over trainings.
    """

    arm: str
    other: str
    metric: str
    cases: pd.DataFrame
    by_training: pd.Series
    low: float
    high: float
    t_low: float
    t_high: float

    @classmethod
    def of(
        cls, part: pd.DataFrame, pair: Pair, metric: str = "dice", draws: int = 5000
    ) -> Comparison:
        """Compare two arms of one setting."""
        cases = differences(part, *pair, metric)
        groups = cases.groupby("group").mean()
        trainings = by_training(groups, part).dropna().round(12)
        limits = *interval(groups.to_numpy(float), draws), *t_interval(trainings.to_list())
        return cls(*pair, metric, cases, trainings, *limits)

    @cached_property
    def by_group(self) -> pd.Series:
        """Difference of each group: a case is averaged over seeds, then over its group.

        Rounded, so that equal differences are ties.
        """
        return self.cases.mean(axis=1).groupby("group").mean().dropna().round(12)

    @property
    def difference(self) -> float:
        """Mean over groups; every group has the same weight."""
        return round(float(self.by_group.mean()), 12)

    @cached_property
    def p(self) -> float:
        """Wilcoxon signed-rank test (Pratt) on groups."""
        from scipy.stats import wilcoxon

        if not self.by_group.any():
            return 1.0
        return float(wilcoxon(self.by_group, zero_method="pratt").pvalue)

    def described(self) -> Setting:
        """difference, low, high, t_low, t_high, groups, seeds and trainings: no test."""
        names = ("difference", "low", "high", "t_low", "t_high")
        row: Setting = {name: getattr(self, name) for name in names}
        row |= {"groups": len(self.by_group), "seeds": self.cases.shape[1]}
        return row | {"trainings": len(self.by_training)}

    def tested(self, p_holm: float, verdict: str) -> Setting:
        """The row of `compare`."""
        gain = self.by_group if HIGHER_IS_BETTER[self.metric] else -self.by_group
        row: Setting = {"arm": self.arm, "other": self.other, "metric": self.metric}
        row |= self.described() | {"p": self.p, "p_holm": p_holm, "verdict": verdict}
        row |= {"better": int((gain > 0).sum()), "worse": int((gain < 0).sum())}
        row["undefined"] = int(self.cases.isna().sum().sum())
        row |= self.by_training.add_prefix("difference_").to_dict()
        return row


def compare(
    per_case: pd.DataFrame,
    method: str = "method",
    reference: str = "alone",
    metric: str = "dice",
    draws: int = 5000,
) -> pd.DataFrame:
    """Compare the method with every other arm, and every other arm with the student alone.

    The difference of a case is averaged over seeds, then over its group. Wilcoxon signed-rank test
    (Pratt) on groups; Holm's correction over all comparisons on one data set, all budgets included;
    95 % bootstrap interval over groups and seeds; 95 % t interval over trainings.

    Returns
    -------
    DataFrame
        Columns of SETTING; arm, other, metric, difference (arm - other); low, high (bootstrap);
        t_low, t_high (over folds, or without folds over seeds; NaN with one training); groups,
        seeds, trainings, p, p_holm, verdict (see `verdict`), better and worse (groups), undefined
        (scores of 0/0, left out), difference_seed0 or difference_fold0 and so on.
    """
    parts = list(settings(per_case))
    families: dict[tuple[Hashable, ...], list[tuple[Setting, Comparison]]] = {}
    for setting, part in parts:
        family = families.setdefault(tuple(setting.get(name) for name in FAMILY), [])
        for pair in _pairs(in_order(part, without=TEACHER), method, reference):
            family.append((setting, Comparison.of(part, pair, metric, draws)))
    rows = []
    for family in families.values():
        adjusted = holm(np.array([one.p for _, one in family]))
        for (setting, one), p_holm in zip(family, adjusted.tolist()):
            found = verdict(one, p_holm, len(family))
            if found == "better" and _reached_by_longer(parts, setting, one, draws):
                found = "reached by longer training"
            rows.append(setting | one.tested(p_holm, found))
    return as_table(rows, per_case)


def _pairs(arms: list[str], method: str, reference: str) -> list[Pair]:
    ours = [(method, arm) for arm in arms if arm != method] if method in arms else []
    others = [arm for arm in arms if arm not in (method, reference)]
    return ours + [(arm, reference) for arm in others if reference in arms]


def compare_arms(
    per_case: pd.DataFrame, method: str = "method", metric: str = "dice", draws: int = 5000
) -> pd.DataFrame:
    """The method against every other arm: these rows of `compare`."""
    table = compare(per_case, method, metric=metric, draws=draws)
    return table[table["arm"] == method].reset_index(drop=True)


def compare_with(
    per_case: pd.DataFrame,
    reference: str = "alone",
    arms: tuple[str, ...] = (),
    metric: str = "dice",
    draws: int = 5000,
) -> pd.DataFrame:
    """Every other arm, or those that are named, against the student alone: rows of `compare`."""
    table = compare(per_case, reference=reference, metric=metric, draws=draws)
    if table.empty:
        return table
    chosen = (table["other"] == reference) & (table["arm"].isin(arms) if arms else True)
    return table[chosen].reset_index(drop=True)


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


def verdict(one: Comparison, p_holm: float, tests: int) -> str:
    """What a comparison shows, given its p in a Holm family of so many tests.

    Returns
    -------
    str
        one training: both arms were trained once, so nothing tells the loss from the training;
        better, worse: both intervals exclude 0 and p_holm is at most 0.05;
        too few groups: not so, and with so few groups p_holm cannot be 0.05 or less;
        inconclusive: at least one of the three says so;
        not significant: none does.
        `compare` replaces better by 'reached by longer training' if a student alone that is trained
        longer is as good: the interval of the arm minus that student does not lie above 0.
    """
    if len(one.by_training) < 2:
        return "one training"
    cases = one.low > 0 or one.high < 0
    trainings = one.t_low > 0 or one.t_high < 0
    significant = p_holm <= 0.05
    if cases and trainings and significant:
        return "better" if (one.difference > 0) == HIGHER_IS_BETTER[one.metric] else "worse"
    if 2 * tests / 2.0 ** len(one.by_group) > 0.05:  # the smallest p of the exact test, after Holm
        return "too few groups"
    return "inconclusive" if cases or trainings or significant else "not significant"


def _reached_by_longer(
    parts: list[tuple[Setting, pd.DataFrame]], setting: Setting, one: Comparison, draws: int
) -> bool:
    """Whether a student alone that is trained longer than the shorter of a pair is as good.

    It may have another budget, but is equal in all else that `SETTING` names.
    """
    if split_arm(one.arm)[0] == "alone":
        return False  # 'alone*2 is better than alone' is about the length itself
    ours = next(part for other, part in parts if other == setting)
    scores = by_seed(ours, one.arm, one.metric)
    shorter = min(_length(setting, one.arm), _length(setting, one.other))
    for longer in _longer_alone(parts, setting, one.metric, shorter):
        gain = _between(scores, longer).groupby("group").mean().to_numpy(float)
        low, _ = interval(gain if HIGHER_IS_BETTER[one.metric] else -gain, draws)
        if not low > 0:
            return True
    return False


def _longer_alone(
    parts: list[tuple[Setting, pd.DataFrame]], setting: Setting, metric: str, shorter: float
) -> Iterator[pd.DataFrame]:
    """Scores, as `by_seed` returns them, of students alone with more epochs than `shorter`."""
    for other, part in parts:
        if other | {"budget": 0} == setting | {"budget": 0}:
            for arm in in_order(part):
                if split_arm(arm)[0] == "alone" and _length(other, arm) > shorter:
                    yield by_seed(part, arm, metric)


def _length(setting: Setting, arm: str) -> float:
    """Epochs of an arm, in units of its setting's if their number is not known."""
    return float(setting.get("budget", 1)) * split_arm(arm)[1]  # type: ignore[arg-type]


def _between(first: pd.DataFrame, second: pd.DataFrame) -> pd.DataFrame:
    """Differences of two trainings, seed by seed, or of their means if their seeds differ."""
    _require_same_cases(first, second, "an arm and a longer student alone")
    if first.columns.equals(second.columns):
        return first - second
    return (first.mean(axis=1) - second.mean(axis=1)).to_frame()


def lengths(per_case: pd.DataFrame) -> pd.DataFrame:
    """What longer training adds: each arm against the same arm with fewer epochs; not tested.

    An arm has converged where training longer adds nothing.

    Returns
    -------
    DataFrame
        Columns of SETTING; arm and other (alone*2 and alone), and what `Comparison.described` has.
        Of arms with one length there are no rows.
    """
    rows = []
    for setting, part in settings(per_case):
        arms = in_order(part, without=TEACHER)
        for shorter, longer in zip(arms, arms[1:]):
            if split_arm(shorter)[0] == split_arm(longer)[0]:
                one = Comparison.of(part, (longer, shorter))
                rows.append(setting | {"arm": longer, "other": shorter} | one.described())
    return as_table(rows, per_case)


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
        Columns of SETTING; arm, other, column, third (lowest, middle, highest), at_least and
        at_most (of `column`), cases, missed and missed_other (lesions, mean over seeds), and what
        `Comparison.described` has.
    """
    if column not in per_case:
        raise LesionKDError(
            f"the per-case table has no column {column!r}: an earlier version made it. Remove the "
            "folders of these runs and run again"
        )
    rows = []
    for setting, table in settings(per_case):
        lesions = table[table["lesion_pixels"] > 0]
        values = lesions.groupby("id")[column].first().dropna()
        if not {method, other} <= set(table["arm"]) or values.empty:
            continue
        third = np.searchsorted(np.quantile(values, [1 / 3, 2 / 3]), values)
        for place in np.unique(third):
            inside = values[third == place]
            part = table[table["id"].isin(inside.index)]
            row = setting | {"arm": method, "other": other, "column": column}
            row |= {"third": TERTILES[place], "at_least": inside.min(), "at_most": inside.max()}
            row |= {"cases": len(inside), "missed": by_seed(part, method, "missed").sum().mean()}
            row["missed_other"] = by_seed(part, other, "missed").sum().mean()
            rows.append(row | Comparison.of(part, (method, other), draws=draws).described())
    return as_table(rows, per_case)


def accuracy_ratio(per_case: pd.DataFrame, method: str = "method") -> pd.DataFrame:
    """Mean Dice of an arm over that of its teacher, on the same cases.

    95 % bootstrap interval over groups and the arm's seeds.

    Returns
    -------
    DataFrame
        Columns of SETTING; arm, ratio, low, high (NaN if the teacher's Dice is 0), dice,
        teacher_dice, cases, groups, seeds.
    """
    rows = []
    for setting, part in settings(per_case):
        if not {method, TEACHER} <= set(part["arm"]):
            continue
        ours, theirs = by_seed(part, method), by_seed(part, TEACHER)
        _require_same_cases(ours, theirs, f"arm {method!r} and the teacher")
        above = ours.groupby("group").sum().to_numpy()
        below = theirs.mean(axis=1).groupby("group").sum().to_numpy()
        row = setting | {"arm": method, "ratio": np.nan, "low": np.nan, "high": np.nan}
        if below.any():
            repeated = np.repeat(below[:, None], above.shape[1], 1)  # groups drawn together
            row["ratio"] = above.mean(1).sum() / below.sum()
            row["low"], row["high"] = _bootstrap(above, repeated)
        row |= {"dice": ours.mean().mean(), "teacher_dice": theirs.mean().mean()}
        rows.append(row | {"cases": len(ours), "groups": len(above), "seeds": ours.shape[1]})
    return as_table(rows, per_case)


# Learning curves ----------------------------------------------------------------------------------


def learning_curves(history: pd.DataFrame) -> pd.DataFrame:
    """Validation Dice of each arm by epoch: mean, lowest and highest over seeds.

    Parameters
    ----------
    history : DataFrame
        Columns arm, seed, epoch, val_dice, those of SETTING in which runs differ, and fold if there
        are folds, which are averaged.

    Returns
    -------
    DataFrame
        Columns of SETTING; arm, epoch, mean, low, high, seeds.
    """
    one_run = [name for name in ("arm", "seed", "fold", "epoch") if name in history]
    rows = []
    for setting, table in settings(history):
        if table.duplicated(one_run).any():
            raise LesionKDError(
                "the history has several runs of one arm and seed. Select one, or add the columns "
                f"of {', '.join(SETTING)} in which they differ"
            )
        by_run = table.groupby(["arm", "epoch", "seed"])["val_dice"].mean().dropna()
        curves = by_run.groupby(["arm", "epoch"]).agg(["mean", "min", "max", "count"])
        for arm in in_order(table):
            for epoch, *values in curves.loc[arm].itertuples():
                row = setting | {"arm": arm, "epoch": epoch}
                rows.append(row | dict(zip(("mean", "low", "high", "seeds"), values)))
    return as_table(rows, history)


def gradient_norms(history: pd.DataFrame) -> pd.DataFrame:
    """Norm and direction of each weighted term's gradient, compared with that of L_seg.

    They are taken at the layers that all terms of an arm reach. Those layers differ between arms,
    so a term is compared with L_seg in the same arm only.

    Parameters
    ----------
    history : DataFrame
        Columns arm, epoch, grad_TERM and cos_TERM, and those of SETTING in which runs differ.

    Returns
    -------
    DataFrame
        Columns of SETTING; arm, term, ratio (norm of the term's gradient over that of L_seg, median
        over epochs and seeds), cosine (with the gradient of L_seg, median), cosine_low and
        cosine_high (quartiles).
    """
    rows = []
    for setting, table in settings(history):
        for arm in in_order(table, without=TEACHER):
            part = table[table["arm"] == arm]
            for term in terms_in(part):
                ratio = (part[f"grad_{term}"] / part["grad_seg"]).median()
                cosine = part[f"cos_{term}"].quantile([0.5, 0.25, 0.75])
                if np.isfinite([ratio, *cosine]).all():
                    row = setting | {"arm": arm, "term": term, "ratio": ratio}
                    rows.append(row | dict(zip(("cosine", "cosine_low", "cosine_high"), cosine)))
    return as_table(rows, history)


def terms_in(history: pd.DataFrame) -> list[str]:
    """Loss terms besides L_seg whose gradients a history has."""
    columns = [name for name in history if name.startswith("grad_") and history[name].notna().any()]
    return [name.removeprefix("grad_") for name in columns if name != "grad_seg"]
