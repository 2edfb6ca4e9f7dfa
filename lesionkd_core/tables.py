"""Tables as readers want them: Markdown in a notebook, CSV and LaTeX beside the figures."""

from __future__ import annotations

import html
import re
from collections import Counter
from collections.abc import Iterator
from itertools import groupby
from math import inf
from pathlib import Path
from typing import Any

import pandas as pd

from . import store
from .evaluation import HIGHER_IS_BETTER, PUBLISHED
from .figures import METRIC_LABELS, NETWORKS, STYLES
from .statistics.arms import FAMILY, by_seed, case_mean, families, in_order

USUAL = {"profile": "cpu", "teacher": "resnet34_unet"}
"""The study's; a macro names only what differs from it."""


def markdown(table: pd.DataFrame, digits: int = 3) -> Any:
    """A DataFrame as a Markdown table in a notebook; text from files and their names stays text."""
    from IPython.display import Markdown

    escaped = table.map(lambda value: html.escape(value, quote=False).replace("|", r"\|") if isinstance(value, str) else value)
    return Markdown(escaped.to_markdown(index=False, floatfmt=f".{digits}f"))


def save(table: pd.DataFrame, name: str, folder: Path, digits: int = 3, shown: pd.DataFrame | None = None) -> Path:
    """Write NAME.csv (full precision) and NAME.tex (rounded; `shown` in its place, where a page wants fewer columns)."""
    store.write_table(Path(folder) / f"{name}.csv", table)
    latex = (table if shown is None else shown).to_latex(index=False, float_format=f"%.{digits}f", na_rep="--", escape=True)
    store.write_text(Path(folder) / f"{name}.tex", _losses(latex))
    return Path(folder) / f"{name}.tex"


def save_words(text: str, name: str, folder: Path) -> Path:
    """NAME.tex: sentences of `in_words` as a list that a paper takes in."""
    items = "".join(f"\\item {_latex(line.removeprefix('- '))}\n" for line in text.splitlines())
    store.write_text(Path(folder) / f"{name}.tex", f"\\begin{{itemize}}\n{items}\\end{{itemize}}\n")
    return Path(folder) / f"{name}.tex"


def _latex(text: str) -> str:
    return _losses(re.sub(r"([&%$#_{}])", r"\\\1", text))


def _losses(latex: str) -> str:
    """Names of losses as they are typeset, and a minus that is none of a hyphen."""
    return re.sub(r"(?<![\w.-])-(?=\d)", "$-$", re.sub(r"\bL\\_([a-z]+)", r"$L_\\mathrm{\1}$", latex))


def pixels(maps: dict[str, dict[str, Any]]) -> pd.DataFrame:
    """The numbers of a picture: a row a pixel of every map in {network: {name: (h, w)}}."""
    found = [pd.DataFrame(values).stack().rename("value").rename_axis(["row", "column"]).reset_index().assign(network=who, map=name)
             for who, named in maps.items() for name, values in named.items()]
    return pd.concat(found)[["network", "map", "row", "column", "value"]]


def committed(name: str) -> pd.DataFrame:
    """A table of measured results that comes with the checkout: data/results/NAME.csv."""
    return store.read_table(store.CHECKOUT / "data" / "results" / f"{name}.csv")


def study(name: str = "per_case") -> pd.DataFrame:
    """A table of the committed study with the column names that every function here wants: id, lesion_pixels."""
    return committed(name).rename(columns={published: ours for ours, published in PUBLISHED.items()})


def scores(summaries: dict[str, dict[str, Any]]) -> pd.DataFrame:
    """Mean [95 % interval] of every metric, one row a method; missed lesions stand beside every mean."""
    rows = []
    for name, summary in summaries.items():
        row: dict[str, Any] = {"method": _label(name)}
        for metric, label in METRIC_LABELS.items():
            digits = 1 if metric == "hd95" else 3
            cell = summary[metric]
            row[label] = "--" if cell["mean"] is None else f"{cell['mean']:.{digits}f} [{cell['low']:.{digits}f}, {cell['high']:.{digits}f}]"
        row |= {"missed": f"{summary['missed']} of {summary['lesions']}", "false alarms": summary["false_alarms"]}
        rows.append(row)
    return pd.DataFrame(rows)


def arms(table: pd.DataFrame) -> pd.DataFrame:
    """The ablation's table with readable names, the data set where there are several."""
    table = table.drop(columns=[name for name in ("test_dataset",) if name in table and table[name].nunique() == 1])
    of_seeds = {name: table[name].map("{:.3f}".format, na_action="ignore").fillna("") for name in table if name.startswith("dice_seed")}
    named = table.assign(**of_seeds, arm=[_label(arm) for arm in table["arm"]])
    return named.rename(columns=METRIC_LABELS | {"false_alarm": "false alarms"}).rename(columns=lambda c: c.replace("dice_seed", "Dice, seed "))


def differences(comparison: pd.DataFrame) -> pd.DataFrame:
    """A table of `statistics.compare_arms` as a page holds it: a row an arm that the method is held against."""
    places = [name for name in FAMILY if name in comparison and comparison[name].nunique() > 1]
    rows = []
    for row in comparison.itertuples():
        interval = "--" if row.groups < 2 else f"{row.low:+.3f} to {row.high:+.3f}"
        said = {"method against": _label(row.other), f"{METRIC_LABELS[row.metric]}, difference": f"{row.difference:+.3f}", "95 % interval": interval}
        rows.append({name: _label(getattr(row, name)) for name in places} | said | {"p (Holm)": f"{row.p_holm:.2g}", "verdict": _verdict(row)})
    return pd.DataFrame(rows)


def study_scores(per_case: pd.DataFrame) -> pd.DataFrame:
    """One row an arm, one column a data set: mean Dice [95 % interval over groups and seeds] and missed lesions a seed, from `study()`."""
    rows: dict[str, dict[str, str]] = {}
    for name, part in _columns(per_case):
        column = ", ".join([name, f"{part['id'].nunique()} cases", _many(part.loc[part["arm"] != "teacher", "seed"].nunique(), "seed")])
        for arm in ("teacher", *in_order(part, without="teacher")):
            mean, low, high = case_mean(by_seed(part, arm))
            own = part[part["arm"] == arm]
            missed = own["missed"].sum() / own["seed"].nunique()
            rows.setdefault(arm, {"arm": _label(arm)})[column] = f"{mean:.3f} [{low:.3f}, {high:.3f}], {missed:.1f} missed"
    return pd.DataFrame(rows.values()).fillna("not measured")


def _columns(table: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """The parts of a study, each named by its data set, and by profile and teacher where there are several."""
    several = [name for name in ("profile", "teacher") if name in table and table[name].nunique() > 1]
    for family, part in families(table):
        yield ", ".join([family["test_dataset"], *(_label(family[name]) for name in several)]), part


def study_differences(comparison: pd.DataFrame) -> pd.DataFrame:
    """One row an arm that the method is held against, one column a data set: difference of Dice [95 % interval], p after Holm, verdict."""
    rows: dict[str, dict[str, str]] = {}
    for name, part in _columns(comparison):
        column = f"{name}, {part['groups'].iloc[0]} groups"
        for row in part.itertuples():
            cell = f"{row.difference:+.3f} [{row.low:+.3f}, {row.high:+.3f}], p {row.p_holm:.2g}, {_verdict(row)}"
            rows.setdefault(row.other, {"method against": _label(row.other)})[column] = cell
    return pd.DataFrame(rows.values()).fillna("not measured")


def study_numbers(per_case: pd.DataFrame, comparison: pd.DataFrame) -> dict[str, Any]:
    """What a text quotes of the committed study, for `variables`: every arm's scores and every difference, data set by data set."""
    values: dict[str, Any] = {}
    for family, part in families(per_case):
        own = _macro(family)
        students = part[part["arm"] != "teacher"]
        values |= {f"{own} cases": part["id"].nunique(), f"{own} groups": part["group"].nunique(), f"{own} seeds": students["seed"].nunique()}
        for arm in ("teacher", *in_order(part, without="teacher")):
            scores, rows = case_mean(by_seed(part, arm)), part[part["arm"] == arm]
            values |= {f"{own} {arm} {name}": score for name, score in zip(("dice", "low", "high"), scores)}
            values[f"{own} {arm} missed"] = f"{rows['missed'].sum() / rows['seed'].nunique():.1f}"
    for row in comparison.itertuples():
        pair = f"{_macro(row._asdict())} {row.arm} minus {row.other}"
        values |= {f"{pair} {name}".strip(): f"{getattr(row, name or 'difference'):+.3f}" for name in ("", "low", "high")}
        values |= {f"{pair} p": f"= {row.p_holm:.2g}" if row.p_holm >= 0.001 else "< 0.001", f"{pair} verdict": _verdict(row)}
    return values


def cost_numbers(cost: pd.DataFrame, pixels: int = 128) -> dict[str, Any]:
    """Parameters and multiplications of every network at one size, for `variables`."""
    found = cost[cost["pixels"] == pixels].drop_duplicates("model").set_index("model")
    return {f"{model} {name}": int(found.loc[model, name]) for model in found.index for name in ("parameters", "macs")}


def _macro(family: dict[str, Any]) -> str:
    """The part of a macro's name that says where: what is not the study's usual profile and teacher is named."""
    elsewhere = f" on {family['test_dataset']}" if family.get("test_dataset", family["dataset"]) != family["dataset"] else ""
    return str(family["dataset"]) + elsewhere + "".join(f" {family[name]}" for name, usual in USUAL.items() if family.get(name, usual) != usual)


def speedups(cost: pd.DataFrame, large: str = "unet64") -> str:
    """How many times faster the students are than a large network, a line an engine and size, float32, from `measure_cost`."""
    lines = []
    for (engine, pixels), part in cost[cost["precision"] == "float32"].groupby(["engine", "pixels"], sort=False):
        times = part.set_index("model")["latency_ms_median"]
        if large in times:
            students = ", ".join(f"{times[large] / times[name]:.0f} x {name}" for name in times.index if name.startswith("student"))
            lines.append(f"{_label(large)} in {engine}, {pixels} px: {times[large]:.0f} ms = {students}")
    return "\n".join(lines)


def in_words(table: pd.DataFrame) -> str:
    """Plain sentences, a line each, from the numbers of any table of `statistics` alone; 'no difference seen' where that is so."""
    if table.empty:
        return "- Nothing to compare: the table has no row."
    says = next(says for column, says in SENTENCES.items() if column in table)
    return "\n".join(f"- {line[0].upper()}{line[1:]}" for line in says(list(table.itertuples())))


def _label(name: str) -> str:
    return STYLES[name][0] if name in STYLES else NETWORKS.get(name, name)


def _pair(row: Any) -> str:
    """'method against student alone on busi, teacher U-Net 64'."""
    return f"{_arm(row)} against {_label(row.other)}{_where(row)}"


def _arm(row: Any) -> str:
    arm = getattr(row, "arm", "method")
    return arm if arm == "method" else _label(arm)


def _where(row: Any) -> str:
    """What a table names of data set, profile and teacher; or nothing."""
    dataset, tested, profile, teacher = (getattr(row, name, "") for name in ("dataset", "test_dataset", "profile", "teacher"))
    trained = f"trained on {dataset}" if tested and dataset not in ("", tested) else ""
    named = [tested or dataset, trained, profile and f"profile {profile}", teacher and f"teacher {_label(teacher)}"]
    return " on " * any(named) + ", ".join(filter(None, named))


def _many(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"


def _size(row: Any) -> str:
    """How many groups and seeds, and what the interval leaves out."""
    lacks = "; one group: no interval" if row.groups < 2 else "; one seed: the interval covers cases only" if row.seeds < 2 else ""
    return f"{_many(row.groups, 'group')}, {_many(row.seeds, 'seed')}{lacks}"


def _gain(row: Any) -> str:
    metric = getattr(row, "metric", "dice")
    digits = 1 if metric == "hd95" else 3
    interval = "" if row.groups < 2 else f", 95 % interval {row.low:+.{digits}f} to {row.high:+.{digits}f}"
    return f"{row.difference:+.{digits}f} {METRIC_LABELS[metric]}{interval}"


def _verdict(row: Any) -> str:
    if not (row.low > 0 or row.high < 0) or getattr(row, "p_holm", 0) > 0.05:
        return "no difference seen"
    return "better" if (row.difference > 0) == HIGHER_IS_BETTER[getattr(row, "metric", "dice")] else "worse"


def _comparison(rows: list[Any]) -> Iterator[str]:
    family = Counter(map(_where, rows))
    for row in rows:
        few = "; too few groups for this test to see any" * (2 * family[_where(row)] / 2.0**row.groups > 0.05)  # its smallest p, after Holm
        ranks = "; the test of ranks, which is blind to seeds, sees one" if row.p_holm <= 0.05 and row.low <= 0 <= row.high else ""
        undefined = f"; {row.undefined} scores of 0/0 left out" if getattr(row, "undefined", 0) else ""
        yield f"{_pair(row)}: {_verdict(row)} ({_gain(row)}, p (Holm) {row.p_holm:.2g}, {_size(row)}{few}{ranks}{undefined})."


def _tertile(rows: list[Any]) -> Iterator[str]:
    for row in rows:
        spread = f"{row.at_least:.0f} to {row.at_most:.0f} px" if row.column == "lesion_pixels" else f"{row.column} {row.at_least:.3f} to {row.at_most:.3f}"
        missed = f"missed {row.missed:.1f} against {row.missed_other:.1f} a seed"
        yield f"{row.third} third of the lesions ({spread}, {_many(row.cases, 'case')}), {_pair(row)}: {_verdict(row)} ({_gain(row)}, {missed}, {_size(row)})."
    yield "the thirds are described, not tested: no interval is corrected for looking several times."


def _missed(rows: list[Any]) -> Iterator[str]:
    for row in rows:
        verdict = "no difference seen" if row.p_holm > 0.05 else f"misses {'fewer' if row.fewer > row.more else 'more'} lesions"
        counts = f"{row.missed:.1f} against {row.missed_other:.1f} of {row.lesions} a seed, fewer in {row.fewer} and more in {row.more} of {row.groups} groups"
        yield f"{_pair(row)}, missed lesions: {verdict} ({counts}, exact p (Holm) {row.p_holm:.2g}, {_many(row.seeds, 'seed')})."


def _counts(rows: list[Any]) -> Iterator[str]:
    for (who, lesions), found in groupby(rows, lambda row: (_arm(row) + _where(row), row.lesions)):
        yield f"{who}: {', '.join(str(row.missed) for row in found)} of {lesions} lesions missed, seed by seed."


def _agreement(rows: list[Any]) -> Iterator[str]:
    for row in rows:
        rank = "no rank correlation, since all cases score the same"
        if row.spearman == row.spearman:
            rank = f"rank correlation {row.spearman:.2f} ({row.spearman_low:.2f} to {row.spearman_high:.2f}, {_many(row.seeds, 'seed')})"
        shares = f"better than the teacher in {100 * row.better:.0f} % of {_many(row.cases, 'case')}, equal in {100 * row.equal:.0f} %"
        yield f"{_arm(row)} and its teacher{_where(row)}, Dice case by case: {rank}; {shares}."


def _curves(rows: list[Any]) -> Iterator[str]:
    for who, found in groupby(rows, lambda row: _arm(row) + _where(row)):
        *_, last = found
        yield f"{who}: validation Dice {last.mean:.3f} ({last.low:.3f} to {last.high:.3f}, {_many(last.seeds, 'seed')}) after {_many(last.epoch, 'epoch')}."


def _epochs(rows: list[Any]) -> Iterator[str]:
    ranges = {(_where(row), row.arm): (row.low, row.high if row.reached == row.seeds else inf) for row in rows}
    for row in rows:
        (low, high), (first, last) = (ranges[_where(row), arm] for arm in (row.arm, row.reference))
        same = "; the seeds' ranges overlap: no difference seen" * (row.arm != row.reference and low <= last and first <= high)
        goal = f"{100 * row.share:.0f} % of the final validation Dice of {_label(row.reference)} ({row.target:.3f})"
        when = f"after {_many(int(row.epochs), 'epoch')}" if row.epochs == row.epochs else "not reached"
        spread = f"{low:.0f} to {high:.0f}, " if high < inf else f"reached in {row.reached}, "
        yield f"{_arm(row)}{_where(row)}: {goal} {when} ({spread}{_many(row.seeds, 'seed')}{same})."


def _ratio(rows: list[Any]) -> Iterator[str]:
    for row in rows:
        said = "not measured"
        if row.ratio == row.ratio:
            interval = "" if row.groups < 2 else f", 95 % interval {100 * row.low:.1f} % to {100 * row.high:.1f} %"
            same = "no difference seen, " * (row.low <= 1 <= row.high)
            said = f"{100 * row.ratio:.1f} % ({same}{row.dice:.3f} / {row.reference_dice:.3f}{interval}, {_many(row.cases, 'case')}, {_size(row)})"
        yield f"Dice of {_arm(row)} / {_label(row.reference)}{_where(row)}: {said}."


SENTENCES = {  # by a column that tells the table from those behind it
    "third": _tertile, "fewer": _missed, "spearman": _agreement, "epochs": _epochs, "epoch": _curves, "ratio": _ratio,
    "difference": _comparison, "missed": _counts,
}


def variables(values: dict[str, Any], folder: Path) -> Path:
    r"""variables.tex: a macro for every number that a paper quotes, \lkdTeacherDice and the like."""
    lines = []
    for name, value in values.items():
        words = re.findall(r"[A-Za-z]+|[0-9]+", name)
        macro = "".join(w.capitalize() if w.isalpha() else "".join("ABCDEFGHIJ"[int(d)] for d in w) for w in words)
        text = f"{value:.3f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else _latex(str(value))
        lines.append(f"\\newcommand{{\\lkd{macro}}}{{{text}}}\n")
    store.write_text(Path(folder) / "variables.tex", "".join(lines))
    return Path(folder) / "variables.tex"
