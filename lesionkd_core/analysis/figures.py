"""Arms against each other on test cases: scores, differences, where they lie, and how far students follow their teacher."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from ..evaluation import HIGHER_IS_BETTER, bootstrap_mean
from ..statistics import FAMILY
from ..statistics import agreement as agreement_of
from ..statistics.arms import TEACHER, THIRDS, by_seed, case_mean, in_order, seen, varying
from .style import METRIC_LABELS, ONE_COLUMN, TWO_COLUMNS, Look, charts, interval, key, legend, legend_height, look_of, named, need, nothing, on, parts, style

MEASURES = {"lesion_pixels": ("Lesion size", "{:.0f}–{:.0f} px"), "contrast": ("Contrast of the lesion", "{:.2f}–{:.2f}")}
MISSED: dict[str, dict[str, Any]] = {
    "missed by neither": {"marker": ".", "color": "#4477AA", "markersize": 3, "alpha": 0.6},
    "missed by the student": {"marker": "x", "color": "#CC3311"},
    "missed by the teacher": {"marker": "^", "color": "#EE7733"},
    "missed by both": {"marker": "s", "color": "#000000", "markerfacecolor": "none"},
}
SEEN = {
    "difference seen": Line2D([], [], linestyle="", marker="o", color="black"),
    "none, or in doubt": Line2D([], [], linestyle="", marker="o", color="black", fillstyle="none"),
    "a seed": Line2D([], [], linestyle="", marker="|", color="black"),
}


def per_case_scores(tables: dict[str, pd.DataFrame], metric: str = "dice") -> Figure:
    """Every case as a point beside mean and 95 % interval, one column a method."""
    with style():
        fig, axis = plt.subplots(figsize=(ONE_COLUMN, 2.4))
        for x, (name, table) in enumerate(tables.items()):
            values = table[metric].to_numpy()
            spread = np.random.default_rng(0).uniform(-0.18, 0.18, len(values))
            axis.plot(x + spread, values, ".", color=look_of(name).colour, alpha=0.45, markersize=3, zorder=1)
            interval(axis, x, table[metric].mean(), *bootstrap_mean(values, table["group"].to_numpy()), look_of(name), along="y", label=name)
        axis.set_xticks(range(len(tables)), [look_of(name).label for name in tables])
        axis.set(ylabel=f"{METRIC_LABELS[metric]} per test case", xlim=(-0.6, len(tables) - 0.4))
    counts = " or ".join(str(count) for count in sorted({len(table) for table in tables.values()}))
    fig.set_label(f"{METRIC_LABELS[metric]} of {counts} test cases, each a point beside mean and 95 % interval: {named(tables)}.")
    return fig


def ablation(per_case: pd.DataFrame, comparison: pd.DataFrame, metric: str = "dice") -> Figure:
    """Left, every arm's mean with its 95 % interval and each seed; right, method minus arm likewise; a row of charts a data set and teacher.

    Parameters
    ----------
    per_case : DataFrame
        Scores of one split: arm, seed, id, group, the metric and the columns of `statistics.FAMILY` it has.
    comparison : DataFrame
        From `statistics.compare_arms` of the same scores.
    """
    need(per_case, "arm", "seed", "id", "group", metric)
    found = [(name, part, list(dict.fromkeys(part["arm"]))) for name, part in parts(per_case)]
    with style():
        if per_case.empty:
            return nothing("no case is scored")
        heights = [0.55 + 0.2 * len(arms) for *_, arms in found]
        fig, axes = plt.subplots(
            len(found), 2, figsize=(TWO_COLUMNS, sum(heights) + 0.2), sharey="row", sharex="col", squeeze=False, gridspec_kw={"height_ratios": heights}
        )
        for (left, right), (name, part, arms) in zip(axes, found):
            places = {arm: len(arms) - 1 - i for i, arm in enumerate(arms)}
            for arm, y in places.items():
                _mean_and_seeds(left, y, by_seed(part, arm, metric), arm)
            _differences(right, _shared(comparison, part), places)
            left.set_yticks(list(places.values()), [look_of(arm).label for arm in places])
            left.set_ylim(-0.6, len(arms) - 0.4)
            left.set_xlabel(f"{METRIC_LABELS[metric]}, mean over test cases\n{name}".strip())
            right.set_xlabel(f"{_direction(metric)}\n{name}".strip())
            for axis in (left, right):
                axis.tick_params(labelbottom=True)
        legend(fig, SEEN)
    where = on(name for name, *_ in found)
    fig.set_label(f"{METRIC_LABELS[metric]}{where}: left, mean, 95 % interval and seeds of {named(in_order(per_case))}. Right, the method minus each.")
    return fig


def _shared(table: pd.DataFrame, part: pd.DataFrame) -> pd.DataFrame:
    """The rows that belong to one part of another table."""
    same = np.ones(len(table), bool)
    for name in FAMILY:
        if name in table and name in part:
            same &= (table[name] == part[name].iloc[0]).to_numpy()
    return table[same]


def _mean_and_seeds(axis: Axes, y: float, seeds: pd.DataFrame, arm: str) -> None:
    mean, low, high = case_mean(seeds)
    _seeds(axis, seeds.mean(), y, arm)
    interval(axis, mean, y, low, high, look_of(arm), label=arm)


def _seeds(axis: Axes, values: pd.Series | list[float], y: float, arm: str) -> None:
    axis.plot(values, np.full(len(values), y - 0.28), "|", color=look_of(arm).colour, markersize=4, markeredgewidth=0.9)


def _direction(metric: str, arm: str = "method", other: str = "other") -> str:
    return f"{arm[0].upper()}{arm[1:]} minus {other}, {METRIC_LABELS[metric]} ({'right' if HIGHER_IS_BETTER[metric] else 'left'}: {arm} better)"


def _differences(axis: Axes, comparison: pd.DataFrame, places: dict[str, int], side: str = "other") -> None:
    """Differences with intervals and seeds; filled where a difference is seen (`statistics.arms.seen`)."""
    for row in comparison.itertuples():
        if (arm := getattr(row, side)) in places:
            _seeds(axis, [value for name, value in row._asdict().items() if name.startswith("difference_seed")], places[arm], arm)
            interval(axis, row.difference, places[arm], row.low, row.high, look_of(arm), filled=seen(row) == "yes", label=arm)
    axis.axvline(0, color="black", linewidth=0.6, zorder=1)


def forest(comparison: pd.DataFrame) -> Figure:
    """Pairs of arms, their difference with its 95 % interval, seeds as ticks beneath; one chart a data set and teacher, on one scale.

    Filled: a difference is seen (interval without 0 and Holm's p at most 0.05); hollow: none is, or it is in doubt.

    Parameters
    ----------
    comparison : DataFrame
        From `statistics.compare_arms` (one arm minus every other) or `compare_with` (every arm minus one).
    """
    with style():
        if comparison.empty:
            return nothing("there is no arm to compare with")
        need(comparison, "arm", "other", "difference", "low", "high", "metric")
        found = list(parts(comparison))
        side = varying(comparison)
        arms = list(dict.fromkeys(comparison[side]))
        places = {arm: len(arms) - 1 - i for i, arm in enumerate(arms)}
        metric, arm, other = comparison[["metric", "arm", "other"]].iloc[0]
        pair = ("arm", look_of(other).label) if side == "arm" else ("method" if arm == "method" else look_of(arm).label, "other")
        axis_label = _direction(metric, *pair)
        fig, axes = charts(len(found), 0.6 + 0.2 * len(arms), SEEN, sharey=True, sharex=True)
        for axis, (name, part) in zip(axes, found):
            _differences(axis, part, places, side)
            axis.set_xlabel(name)
            axis.tick_params(labelbottom=True)
            axis.xaxis.set_major_locator(MaxNLocator(4))
        axes[0].set_yticks(list(places.values()), [look_of(arm).label for arm in places])
        axes[0].set_ylim(-0.6, len(arms) - 0.4)
        fig.supxlabel(axis_label, fontsize=7.5)
        legend(fig, SEEN)
    fig.set_label(f"{axis_label}, with 95 % intervals and seeds{on(name for name, _ in found)}: {named(arms)}.")
    return fig


def tertiles(table: pd.DataFrame) -> Figure:
    """Method minus other in Dice in thirds of the lesions, with 95 % intervals; a row of charts a data set and teacher, a column a measure.

    Parameters
    ----------
    table : DataFrame
        From `statistics.by_tertile`; several of them (lesion_pixels and contrast, other pairs of arms) concatenated.
    """
    with style():
        if table.empty:
            return nothing("no third holds a lesion that both arms were scored on")
        need(table, "arm", "other", "column", "third", "difference", "low", "high", "at_least", "at_most", "cases")
        found, measures = list(parts(table)), list(dict.fromkeys(table["column"]))
        pairs, axis_label = _pairs(table)
        width = TWO_COLUMNS if len(measures) > 1 else ONE_COLUMN
        size = (width, 1.9 * len(found) + legend_height([look.label for look in pairs.values()], width) * (len(pairs) > 1))
        fig, axes = plt.subplots(len(found), len(measures), figsize=size, sharey=True, squeeze=False)
        for line, (name, part) in zip(axes, found):
            for axis, measure in zip(line, measures):
                _thirds(axis, part[part["column"] == measure], pairs)
                axis.set_xlabel(", ".join(filter(None, (MEASURES[measure][0], name))))
            line[0].set_ylabel(axis_label)
        if len(pairs) > 1:
            legend(fig, {look.label: key(look._replace(line="")) for look in pairs.values()})
    by = " and ".join(MEASURES[measure][0].lower() for measure in measures)
    compared = "; ".join(f"{named([arm])} minus {named([other])}" for arm, other in pairs)
    fig.set_label(f"Dice, {compared}, in thirds by {by}{on(name for name, _ in found)}.")
    return fig


def _pairs(table: pd.DataFrame) -> tuple[dict[tuple[str, str], Look], str]:
    """Pairs of arms, each drawn and labelled as what it does not share with the others; what they share is on the axis."""
    one_arm, one_other = (table[name].nunique() == 1 for name in ("arm", "other"))
    pairs = {}
    for arm, other in dict.fromkeys(zip(table["arm"], table["other"])):
        label = f"{look_of(arm).label} minus {look_of(other).label}"
        pairs[arm, other] = look_of(arm if one_other else other)._replace(**{} if one_arm or one_other else {"label": label})
    return pairs, f"Dice, {look_of(arm).label if one_arm else 'arm'}\nminus {look_of(other).label if one_other else 'other'}"


def _thirds(axis: Axes, rows: pd.DataFrame, pairs: dict[tuple[str, str], Look]) -> None:
    """One measure of one data set: thirds from left to right, pairs of arms side by side."""
    ticks = {}
    for i, ((arm, other), look) in enumerate(pairs.items()):
        for row in rows[(rows["arm"] == arm) & (rows["other"] == other)].itertuples():
            place = THIRDS.index(row.third)
            spread = MEASURES[row.column][1].format(row.at_least, row.at_most)
            ticks[place] = f"{row.third}\n{spread}\n{row.cases} cases"
            interval(axis, place + 0.18 * (i - (len(pairs) - 1) / 2), row.difference, row.low, row.high, look, along="y", label=f"{arm} - {other}")
    axis.axhline(0, color="black", linewidth=0.6, zorder=1)
    axis.set_xticks(list(ticks), list(ticks.values()))
    axis.set_xlim(-0.5, len(THIRDS) - 0.5)


def agreement(per_case: pd.DataFrame, arms: tuple[str, ...] = ()) -> Figure:
    """Dice of teacher and student case by case, each seed a point, lesions that either misses marked; a chart an arm, rank correlation beneath.

    Parameters
    ----------
    per_case : DataFrame
        Scores of one split with rows of arm `teacher`: arm, seed, id, group, dice, missed and the columns of `statistics.FAMILY` it has.
    arms : tuple of str
        The arms shown; empty shows all.
    """
    need(per_case, "arm", "seed", "id", "group", "dice", "missed")
    ranks = agreement_of(per_case)
    with style():
        wanted = [(name, part, row) for name, part in parts(per_case) for row in _shared(ranks, part).itertuples() if not arms or row.arm in arms]
        if not wanted:
            return nothing("no arm was scored beside its teacher")
        fig, axes = charts(len(wanted), 1.85, MISSED, columns=min(4, len({row.arm for *_, row in wanted})), narrow=2, sharex=True, sharey=True)
        for axis, (name, part, row) in zip(axes, wanted):
            _beside_teacher(axis, part, row.arm)
            axis.set(aspect="equal", xlim=(-0.05, 1.05), ylim=(-0.05, 1.05), ylabel=f"Dice, {look_of(row.arm).label}")
            rank = "" if np.isnan(row.spearman) else f"rank correlation {row.spearman:.2f}"
            axis.set_xlabel("\n".join(filter(None, ("Dice, teacher", name, rank))))
            axis.tick_params(labelbottom=True)
        legend(fig, {label: Line2D([], [], linestyle="", **mark) for label, mark in MISSED.items()})
    students = named(dict.fromkeys(row.arm for *_, row in wanted))
    fig.set_label(f"Dice of teacher against student, a point a case and seed, missed lesions marked{on(name for name, *_ in wanted)}: {students}.")
    return fig


def _beside_teacher(axis: Axes, table: pd.DataFrame, arm: str) -> None:
    teacher, teacher_missed = by_seed(table, TEACHER).mean(axis=1), by_seed(table, TEACHER, "missed").max(axis=1)
    students, missed = by_seed(table, arm), by_seed(table, arm, "missed")
    kind = missed.add(2 * teacher_missed, axis=0).to_numpy()
    axis.plot([0, 1], [0, 1], color="black", linewidth=0.6, zorder=1)
    for i, (label, mark) in enumerate(MISSED.items()):
        here = np.nonzero(kind == i)
        axis.plot(teacher.to_numpy()[here[0]], students.to_numpy()[here], linestyle="", label=label, **mark)
