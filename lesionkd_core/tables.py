"""Tables as readers want them: Markdown in a notebook, CSV and LaTeX beside the figures."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pandas as pd

from . import store
from .figures import METRIC_LABELS, STYLES


def markdown(table: pd.DataFrame, digits: int = 3):
    """A DataFrame as a Markdown table in a notebook."""
    from IPython.display import Markdown

    return Markdown(table.to_markdown(index=False, floatfmt=f".{digits}f"))


def save(table: pd.DataFrame, name: str, folder: Path, digits: int = 3) -> Path:
    """Write NAME.csv (full precision) and NAME.tex (rounded)."""
    store.write_table(Path(folder) / f"{name}.csv", table)
    latex = table.to_latex(index=False, float_format=f"%.{digits}f", na_rep="--", escape=True)
    store.write_text(Path(folder) / f"{name}.tex", latex)
    return Path(folder) / f"{name}.tex"


def committed(name: str) -> pd.DataFrame:
    """A table of measured results that comes with the checkout: data/results/NAME.csv."""
    return store.read_table(store.CHECKOUT / "data" / "results" / f"{name}.csv")


def scores(summaries: dict[str, dict[str, Any]]) -> pd.DataFrame:
    """Mean [95 % interval] of every metric, one row a method; missed lesions stand beside every mean."""
    rows = []
    for name, summary in summaries.items():
        row: dict[str, Any] = {"method": STYLES[name][0]}
        for metric, label in METRIC_LABELS.items():
            digits = 1 if metric == "hd95" else 3
            cell = summary[metric]
            row[label] = "--" if cell["mean"] is None else f"{cell['mean']:.{digits}f} [{cell['low']:.{digits}f}, {cell['high']:.{digits}f}]"
        row |= {"missed": f"{summary['missed']} of {summary['lesions']}", "false alarms": summary["false_alarms"]}
        rows.append(row)
    return pd.DataFrame(rows)


def arms(table: pd.DataFrame) -> pd.DataFrame:
    """The ablation's table with readable names."""
    named = table.assign(arm=[STYLES[arm][0] for arm in table["arm"]])
    return named.rename(columns=METRIC_LABELS | {"false_alarm": "false alarms"}).rename(columns=lambda c: c.replace("dice_seed", "Dice, seed "))


def in_words(comparison: pd.DataFrame) -> str:
    """One plain sentence a comparison, from its numbers alone."""
    lines = []
    for row in comparison.itertuples():
        other = STYLES[row.other][0] + (f" on {row.test_dataset}" if getattr(row, "test_dataset", "") else "")
        size = f"{row.groups} groups, {row.seeds} seed{'s' * (row.seeds > 1)}"
        numbers = f"{row.difference:+.3f} Dice, 95 % interval {row.low:+.3f} to {row.high:+.3f}, p (Holm) {row.p_holm:.2g}, {size}"
        if row.low <= 0 <= row.high or row.p_holm > 0.05:
            lines.append(f"Method against {other}: no difference seen ({numbers}).")
        else:
            lines.append(f"Method against {other}: {'better' if row.difference > 0 else 'worse'} ({numbers}).")
    return "\n".join(f"- {line}" for line in lines)


def variables(values: dict[str, Any], folder: Path) -> Path:
    r"""variables.tex: a macro for every number that a paper quotes, \lkdTeacherDice and the like."""
    lines = []
    for name, value in values.items():
        words = re.findall(r"[A-Za-z]+|[0-9]+", name)
        macro = "".join(w.capitalize() if w.isalpha() else "".join("ABCDEFGHIJ"[int(d)] for d in w) for w in words)
        text = f"{value:.3f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
        lines.append(f"\\newcommand{{\\lkd{macro}}}{{{text}}}\n")
    store.write_text(Path(folder) / "variables.tex", "".join(lines))
    return Path(folder) / "variables.tex"
