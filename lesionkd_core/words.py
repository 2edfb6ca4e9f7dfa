"""What a table says, in plain words: sentences made of its numbers alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import groupby
from math import inf
from typing import Any

import pandas as pd

from .evaluation import HIGHER_IS_BETTER
from .figures import METRIC_LABELS, NETWORKS, STYLES
from .statistics.arms import seen


def in_words(table: pd.DataFrame) -> str:
    """Plain sentences, a line each, from the numbers of any table of `statistics` alone; 'no difference seen' where that is so."""
    if table.empty:
        return "- Nothing to compare: the table has no row."
    says = next(says for column, says in SENTENCES.items() if column in table)
    table = table.drop(columns=[name for name in ("profile", "teacher") if name in table and table[name].nunique() == 1])
    return "\n".join(f"- {line[0].upper()}{line[1:]}" for line in says(list(table.itertuples())))


def label(name: str) -> str:
    """The name of an arm or a network as readers know it."""
    return STYLES[name][0] if name in STYLES else NETWORKS.get(name, name)


def _pair(row: Any) -> str:
    """'method against student alone on busi, teacher U-Net 64'."""
    return f"{_arm(row)} against {label(row.other)}{_where(row)}"


def called(arm: str) -> str:
    """An arm in a sentence, where the method is 'method'."""
    return arm if arm == "method" else label(arm)


def _arm(row: Any) -> str:
    return called(getattr(row, "arm", "method"))


def _where(row: Any) -> str:
    """What a table names of data set, profile and teacher; or nothing."""
    dataset, tested, profile, teacher = (getattr(row, name, "") for name in ("dataset", "test_dataset", "profile", "teacher"))
    trained = f"trained on {dataset}" if tested and dataset not in ("", tested) else ""
    named = [tested or dataset, trained, profile and f"profile {profile}", teacher and f"teacher {label(teacher)}"]
    return " on " * any(named) + ", ".join(filter(None, named))


def many(count: int, noun: str) -> str:
    """A count with its noun, '1 seed' or '3 seeds'."""
    return f"{count} {noun}{'s' * (count != 1)}"


def _size(row: Any) -> str:
    """How many groups and seeds, and what the interval leaves out."""
    lacks = "; one group: no interval" if row.groups < 2 else "; one seed: the interval covers cases only" if row.seeds < 2 else ""
    return f"{many(row.groups, 'group')}, {many(row.seeds, 'seed')}{lacks}"


def _gain(row: Any) -> str:
    metric = getattr(row, "metric", "dice")
    digits = 1 if metric == "hd95" else 3
    interval = "" if row.groups < 2 else f", 95 % interval {row.low:+.{digits}f} to {row.high:+.{digits}f}"
    return f"{row.difference:+.{digits}f} {METRIC_LABELS[metric]}{interval}"


def verdict(row: Any) -> str:
    """Better, worse, in doubt or no difference seen, by `statistics.arms.seen`."""
    better = (row.difference > 0) == HIGHER_IS_BETTER[getattr(row, "metric", "dice")]
    return {"yes": "better" if better else "worse", "in doubt": "in doubt", "no": "no difference seen"}[seen(row)]


def _comparison(rows: list[Any]) -> Iterator[str]:
    family = Counter(map(_where, rows))
    for row in rows:
        few = "; too few groups for this test to see any" * (2 * family[_where(row)] / 2.0**row.groups > 0.05)  # its smallest p, after Holm
        doubt = "; the interval leaves 0 out, the test of ranks sees none" if row.p_holm > 0.05 else "; the test of ranks, which is blind to seeds, sees one"
        undefined = f"; {row.undefined} scores of 0/0 left out" if getattr(row, "undefined", 0) else ""
        yield f"{_pair(row)}: {verdict(row)} ({_gain(row)}, p (Holm) {row.p_holm:.2g}, {_size(row)}{few}{doubt * (seen(row) == 'in doubt')}{undefined})."


def _tertile(rows: list[Any]) -> Iterator[str]:
    for row in rows:
        spread = f"{row.at_least:.0f} to {row.at_most:.0f} px" if row.column == "lesion_pixels" else f"{row.column} {row.at_least:.3f} to {row.at_most:.3f}"
        missed = f"missed {row.missed:.1f} against {row.missed_other:.1f} a seed"
        yield f"{row.third} third of the lesions ({spread}, {many(row.cases, 'case')}), {_pair(row)}: {_gain(row)} ({missed}, {_size(row)})."
    yield "the thirds are described, not tested: no interval is corrected for looking several times."


def _missed(rows: list[Any]) -> Iterator[str]:
    for row in rows:
        said = "no difference seen" if row.p_holm > 0.05 else f"misses {'fewer' if row.fewer > row.more else 'more'} lesions"
        counts = f"{row.missed:.1f} against {row.missed_other:.1f} of {row.lesions} a seed, fewer in {row.fewer} and more in {row.more} of {row.groups} groups"
        yield f"{_pair(row)}, missed lesions: {said} ({counts}, exact p (Holm) {row.p_holm:.2g}, {many(row.seeds, 'seed')})."


def _scores(rows: list[Any]) -> Iterator[str]:
    for where, found in groupby(rows, _where):
        dice = {row.arm: row.dice for row in found}
        teacher = f"; teacher {dice.pop('teacher'):.3f}" if "teacher" in dice else ""
        best, worst = max(dice, key=dice.__getitem__), min(dice, key=dice.__getitem__)
        spread = f"{dice[best]:.3f} ({label(best)}) down to {dice[worst]:.3f} ({label(worst)})"
        yield f"mean Dice of the students{where}: {spread}{teacher}. Whether arms differ is said where they are compared pair by pair."


def _agreement(rows: list[Any]) -> Iterator[str]:
    for row in rows:
        rank = "no rank correlation, since all cases score the same"
        if row.spearman == row.spearman:
            rank = f"rank correlation {row.spearman:.2f} ({row.spearman_low:.2f} to {row.spearman_high:.2f}, {many(row.seeds, 'seed')})"
        shares = f"better than the teacher in {100 * row.better:.0f} % of {many(row.cases, 'case')}, equal in {100 * row.equal:.0f} %"
        yield f"{_arm(row)} and its teacher{_where(row)}, Dice case by case: {rank}; {shares}."


def _curves(rows: list[Any]) -> Iterator[str]:
    for who, found in groupby(rows, lambda row: _arm(row) + _where(row)):
        *_, last = found
        yield f"{who}: validation Dice {last.mean:.3f} ({last.low:.3f} to {last.high:.3f}, {many(last.seeds, 'seed')}) after {many(last.epoch, 'epoch')}."


def _epochs(rows: list[Any]) -> Iterator[str]:
    ranges = {(_where(row), row.arm): (row.low, row.high if row.reached == row.seeds else inf) for row in rows}
    for row in rows:
        (low, high), (first, last) = (ranges[_where(row), arm] for arm in (row.arm, row.reference))
        same = "; the seeds' ranges overlap: no difference seen" * (row.arm != row.reference and low <= last and first <= high)
        goal = f"{100 * row.share:.0f} % of the final validation Dice of {label(row.reference)} ({row.target:.3f})"
        when = f"after {many(int(row.epochs), 'epoch')}" if row.epochs == row.epochs else "not reached"
        spread = f"{low:.0f} to {high:.0f}, " if high < inf else f"reached in {row.reached}, "
        yield f"{_arm(row)}{_where(row)}: {goal} {when} ({spread}{many(row.seeds, 'seed')}{same})."


def _pulls(rows: list[Any]) -> Iterator[str]:
    for row in rows:
        quartiles = f"medians over epochs and seeds, half of them {row.cosine_low:+.2f} to {row.cosine_high:+.2f}"
        pull = f"its gradient has {row.pull:.1f} times the norm of L_seg's and the cosine {row.cosine:+.2f} with it ({quartiles})"
        yield f"{label(row.term).removeprefix('+ ')} in {_arm(row)}{_where(row)}: {pull}."


def _ratio(rows: list[Any]) -> Iterator[str]:
    for row in rows:
        said = "not measured"
        if row.ratio == row.ratio:
            interval = "" if row.groups < 2 else f", 95 % interval {100 * row.low:.1f} % to {100 * row.high:.1f} %"
            same = "no difference seen, " * (row.low <= 1 <= row.high)
            said = f"{100 * row.ratio:.1f} % ({same}{row.dice:.3f} / {row.reference_dice:.3f}{interval}, {many(row.cases, 'case')}, {_size(row)})"
            said += "; few groups" * (row.groups < 20)
        yield f"Dice of {_arm(row)} / {label(row.reference)}{_where(row)}: {said}."
    if any(row.reference == "unet64" for row in rows):
        yield "the paper claims 98.3 % to 99.7 % of U-Net's accuracy with 0.4 % of its parameters, on other data."


SENTENCES = {  # by a column that tells the table from those behind it
    "third": _tertile, "fewer": _missed, "spearman": _agreement, "epochs": _epochs, "epoch": _curves, "ratio": _ratio, "pull": _pulls,
    "difference": _comparison, "hd95": _scores,
}
