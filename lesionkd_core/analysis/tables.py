"""Tables as readers want them: Markdown in a notebook, CSV and LaTeX beside the figures."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from . import provenance, store
from .evaluation import PUBLISHED
from .figures import METRIC_LABELS
from .statistics.arms import FAMILY, by_seed, case_mean, families, in_order, varying
from .words import called, label, many, verdict
from .words import in_words as in_words  # a table's sentences are asked for here

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
    return store.read_table(provenance.CHECKOUT / "data" / "results" / f"{name}.csv")


def study(name: str = "per_case") -> pd.DataFrame:
    """A table of the committed study with the column names that every function here wants: id, lesion_pixels."""
    return committed(name).rename(columns={published: ours for ours, published in PUBLISHED.items()})


def scores(summaries: dict[str, dict[str, Any]]) -> pd.DataFrame:
    """Mean [95 % interval] of every metric, one row a method; missed lesions stand beside every mean."""
    rows = []
    for name, summary in summaries.items():
        row: dict[str, Any] = {"method": label(name)}
        for metric, heading in METRIC_LABELS.items():
            digits = 1 if metric == "hd95" else 3
            cell = summary[metric]
            row[heading] = "--" if cell["mean"] is None else f"{cell['mean']:.{digits}f} [{cell['low']:.{digits}f}, {cell['high']:.{digits}f}]"
        row |= {"missed": f"{summary['missed']} of {summary['lesions']}", "false alarms": summary["false_alarms"]}
        rows.append(row)
    return pd.DataFrame(rows)


def arms(table: pd.DataFrame) -> pd.DataFrame:
    """The ablation's table with readable names, the data set where there are several."""
    table = table.drop(columns=[name for name in ("test_dataset",) if name in table and table[name].nunique() == 1])
    of_seeds = {name: table[name].map("{:.3f}".format, na_action="ignore").fillna("") for name in table if name.startswith("dice_seed")}
    named = table.assign(**of_seeds, arm=[label(arm) for arm in table["arm"]])
    return named.rename(columns=METRIC_LABELS | {"false_alarm": "false alarms"}).rename(columns=lambda c: c.replace("dice_seed", "Dice, seed "))


def differences(comparison: pd.DataFrame) -> pd.DataFrame:
    """A table of `statistics.compare_arms` or `compare_with` as a page holds it: a row a pair of arms, headed by the arm that all share."""
    places = [name for name in FAMILY if name in comparison and comparison[name].nunique() > 1]
    rows = []
    for row in comparison.itertuples():
        interval = "--" if row.groups < 2 else f"{row.low:+.3f} to {row.high:+.3f}"
        pair = {_against(comparison): label(getattr(row, varying(comparison)))}
        said = pair | {f"{METRIC_LABELS[row.metric]}, difference": f"{row.difference:+.3f}", "95 % interval": interval}
        rows.append({name: label(getattr(row, name)) for name in places} | said | {"p (Holm)": f"{row.p_holm:.2g}", "verdict": verdict(row)})
    return pd.DataFrame(rows)


def _against(comparison: pd.DataFrame) -> str:
    arm, other = comparison[["arm", "other"]].iloc[0]
    return f"against {called(other)}" if varying(comparison) == "arm" else f"{called(arm)} against"


def study_means(per_case: pd.DataFrame) -> pd.DataFrame:
    """Every arm of `study()` in full precision.

    Returns
    -------
    DataFrame
        Columns of FAMILY; arm, seeds, cases, groups, dice (mean over cases and seeds), low, high (over groups and seeds), missed (lesions, mean over seeds).
    """
    rows = []
    for family, part in families(per_case):
        for arm in ("teacher", *in_order(part, without="teacher")):
            scored = by_seed(part, arm)
            dice, low, high = case_mean(scored)
            size = {"seeds": scored.shape[1], "cases": len(scored), "groups": scored.index.get_level_values("group").nunique()}
            rows.append(family | {"arm": arm} | size | {"dice": dice, "low": low, "high": high, "missed": by_seed(part, arm, "missed").sum().mean()})
    return pd.DataFrame(rows)


def study_scores(means: pd.DataFrame) -> pd.DataFrame:
    """`study_means` as a page holds it: one row an arm, one column a data set; seeds are said where an arm has others than its column."""
    rows: dict[str, dict[str, str]] = {}
    for name, part in _columns(means):
        seeds = int(part.loc[part["arm"] != "teacher", "seeds"].max())
        column = ", ".join([name, f"{part['cases'].max()} cases", many(seeds, "seed")])
        for row in part.itertuples():
            fewer = f" ({many(row.seeds, 'seed')})" * int(row.seeds != seeds)
            rows.setdefault(row.arm, {"arm": label(row.arm)})[column] = f"{row.dice:.3f} [{row.low:.3f}, {row.high:.3f}], {row.missed:.1f} missed{fewer}"
    return pd.DataFrame(rows.values()).fillna("not measured")


def _columns(table: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """The parts of a study, each named by its data set, and by profile and teacher where there are several."""
    several = [name for name in ("profile", "teacher") if name in table and table[name].nunique() > 1]
    for family, part in families(table):
        yield ", ".join([family["test_dataset"], *(label(family[name]) for name in several)]), part


def study_differences(comparison: pd.DataFrame) -> pd.DataFrame:
    """`differences` with one column a data set: difference of Dice (95 % interval), p after Holm, verdict."""
    rows: dict[str, dict[str, str]] = {}
    for name, part in _columns(comparison):
        column = f"{name}, {part['groups'].iloc[0]} groups"
        for arm, difference, interval, p, said in differences(part).itertuples(index=False):
            rows.setdefault(arm, {_against(comparison): arm})[column] = f"{difference} ({interval}), p {p}, {said}"
    return pd.DataFrame(rows.values()).fillna("not measured")


def study_numbers(per_case: pd.DataFrame, comparison: pd.DataFrame) -> dict[str, Any]:
    """What a text quotes of the committed study, for `variables`: every arm's scores and every difference, data set by data set."""
    values: dict[str, Any] = {}
    for family, part in families(study_means(per_case)):
        own, students = _macro(family), part[part["arm"] != "teacher"]
        values |= {f"{own} {name}": int(students[name].max()) for name in ("cases", "groups", "seeds")}
        for row in part.itertuples():
            values |= {f"{own} {row.arm} {name}": getattr(row, name) for name in ("dice", "low", "high")} | {f"{own} {row.arm} missed": f"{row.missed:.1f}"}
    for row in comparison.itertuples():
        pair = f"{_macro(row._asdict())} {row.arm} minus {row.other}"
        values |= {f"{pair} {name}".strip(): f"{getattr(row, name or 'difference'):+.3f}" for name in ("", "low", "high")}
        values |= {f"{pair} p": f"= {row.p_holm:.2g}" if row.p_holm >= 0.001 else "< 0.001", f"{pair} verdict": verdict(row)}
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
            lines.append(f"{label(large)} in {engine}, {pixels} px: {times[large]:.0f} ms = {students}")
    return "\n".join(lines)


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
