"""Tables as readers need them: Markdown in a notebook, CSV and LaTeX beside the figures."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from .. import results
from ..evaluate import score_external
from ..losses import TERMS
from .statistics import FAMILY, TEACHER, by_seed, case_mean, families

METRIC_LABELS = {
    "dice": "Dice",
    "soft_dice": "Soft Dice",
    "iou": "IoU",
    "sensitivity": "Sensitivity",
    "precision": "Precision",
    "hd95": "HD95 (px)",
    "surface_dice": "Surface Dice (2 px)",
    "brier": "Brier score",
}
"""Labels of the scores of a case."""
LABELS = {
    "alone": "student alone",
    "alone_long": "student alone, longer",
    "method": "both (method)",
    "shuffled": "both, edges shuffled",
    "otsu": "Otsu",
    "resnet34_unet": "ResNet34-UNet",
    "unet64": "U-Net 64",
}
"""Labels of arms and networks that are not the name of a loss term."""
PUBLISHED = {"id": "case", "lesion_pixels": "lesion_px"}
"""Names of these columns in data/results; everywhere else they have the first name."""


def label(name: str) -> str:
    """The label of an arm, a loss term or a network; a name without one is its own label."""
    if name in LABELS:
        return LABELS[name]
    return str(TERMS[name].label) if name in TERMS else str(name)


def markdown(table: pd.DataFrame, digits: int = 3) -> Any:
    """A DataFrame as a Markdown table in a notebook; text that comes from files stays text."""
    from IPython.display import Markdown

    def shown(value: Any) -> Any:
        if isinstance(value, float):
            return f"{value:.{digits}f}" if value == value else "--"
        return html.escape(str(value), quote=False).replace("|", r"\|")

    cells = table.map(shown).rename(columns=shown)
    return Markdown(cells.to_markdown(index=False, disable_numparse=True))


def save(
    table: pd.DataFrame,
    name: str,
    folder: Path,
    digits: int = 3,
    shown: pd.DataFrame | None = None,
) -> Path:
    """Write NAME.csv in full precision and NAME.tex, rounded; `shown` replaces the table there."""
    results.write_table(Path(folder) / f"{name}.csv", table)
    rounded = {"float_format": f"%.{digits}f", "na_rep": "--", "escape": True}
    latex = (table if shown is None else shown).to_latex(index=False, **rounded)
    path = Path(folder) / f"{name}.tex"
    results.write_text(path, _typeset(latex))
    return path


def _typeset(latex: str) -> str:
    """L_feat as a symbol, and a minus sign in front of a number."""
    latex = re.sub(r"\bL\\_([a-z]+)", r"$L_\\mathrm{\1}$", latex)
    return re.sub(r"(?<![\w.-])-(?=\d)", "$-$", latex)


def variables(values: dict[str, Any], folder: Path) -> Path:
    r"""Write variables.tex: a macro for each number that a paper quotes, such as \lkdTeacherDice.

    A digit in a name becomes a letter, 0 is A. Floats are rounded to three digits.
    """
    lines = []
    for name, value in values.items():
        words = re.findall(r"[A-Za-z]+|[0-9]", name)
        macro = "".join("ABCDEFGHIJ"[int(w)] if w.isdigit() else w.capitalize() for w in words)
        if isinstance(value, float | int):
            text = f"{value:.3f}" if isinstance(value, float) else f"{value:,}"
        else:
            text = _typeset(re.sub(r"([&%$#_{}])", r"\\\1", str(value)))
        lines.append(f"\\newcommand{{\\lkd{macro}}}{{{text}}}\n")
    path = Path(folder) / "variables.tex"
    results.write_text(path, "".join(lines))
    return path


# Scores and comparisons ---------------------------------------------------------------------------


def scores(summaries: dict[str, dict[str, Any]]) -> pd.DataFrame:
    """Mean [95 % interval] of each metric, one row for each network, with missed lesions."""
    rows = []
    for name, summary in summaries.items():
        row: dict[str, Any] = {"network": label(name)}
        for metric in (metric for metric in METRIC_LABELS if metric in summary):
            digits = 1 if metric == "hd95" else 3
            row[METRIC_LABELS[metric]] = results.with_interval(summary[metric], digits)
        row |= {"missed": f"{summary['missed']} of {summary['lesions']}"}
        rows.append(row | {"false alarms": summary["false_alarms"]})
    return pd.DataFrame(rows)


def arms(means: pd.DataFrame) -> pd.DataFrame:
    """`statistics.means` for a page; data set and teacher if they differ."""
    table = means.assign(arm=means["arm"].map(label))
    seeds = {name: name.replace("dice_seed", "Dice, seed ") for name in table if "_seed" in name}
    digits = dict.fromkeys(seeds, 3) | {"hd95": 1, "missed": 1, "false_alarm": 1}
    for name in digits.keys() & set(table):
        text = table[name].map(f"{{:.{digits[name]}f}}".format, na_action="ignore")
        table[name] = text.astype(object).fillna("")
    names = METRIC_LABELS | seeds | {"false_alarm": "false alarms"}
    if "low" in table:
        limits = table[["dice", "low", "high"]].rename(columns={"dice": "mean"})
        table["dice"] = [results.with_interval(row) for row in limits.to_dict("records")]
        names["dice"] = "Dice [95 % interval]"
    table = table.drop(columns=["seeds", "cases", "groups", "low", "high"], errors="ignore")
    return _differing(table).rename(columns=names)


def differences(comparison: pd.DataFrame) -> pd.DataFrame:
    """A table of `statistics.compare_arms` or `compare_with` for a page, one row for each pair."""
    rows = []
    for row in comparison.to_dict("records"):
        digits = 1 if row["metric"] == "hd95" else 3
        limits = f"{row['low']:+.{digits}f} to {row['high']:+.{digits}f}"
        rows.append(
            {name: row[name] for name in FAMILY if name in row}
            | {"arm": label(row["arm"]), "minus": label(row["other"])}
            | {f"{METRIC_LABELS[row['metric']]}, difference": f"{row['difference']:+.{digits}f}"}
            | {"95 % interval": limits if row["groups"] > 1 else "--"}
            | {"p (Holm)": f"{row['p_holm']:.2g}", "groups": row["groups"]}
            | {"verdict": row["verdict"]}
        )
    return _differing(pd.DataFrame(rows))


def _differing(table: pd.DataFrame) -> pd.DataFrame:
    """Without the columns of FAMILY in which all rows agree; labels in the others."""
    known = [name for name in FAMILY if name in table]
    same = [name for name in known if table[name].nunique(dropna=False) < 2]
    if {"dataset", "test_dataset"} <= set(table) and table["dataset"].equals(table["test_dataset"]):
        same.append("dataset")
    labels = {name: table[name].map(label) for name in known if name not in same}
    names = {"dataset": "trained on", "test_dataset": "data set", "seg_loss": "L_seg"}
    return table.assign(**labels).drop(columns=set(same)).rename(columns=names)


def numbers(means: pd.DataFrame, comparison: pd.DataFrame) -> dict[str, Any]:
    """What a paper quotes of `statistics.means` and `compare_arms`, by name, for `variables`.

    A name holds what tells the rows apart: `busi method dice`, `busi method minus alone low`. The
    teacher ResNet34-UNet, the profile cpu and the loss bce_dice are not named.
    """
    usual = {"teacher": "resnet34_unet", "profile": "cpu", "seg_loss": "bce_dice"}
    values: dict[str, Any] = {}

    def place(row: dict[str, Any]) -> str:
        shared = [str(row[n]) for n in FAMILY if n in row and row[n] != usual.get(n)]
        return " ".join(dict.fromkeys(shared))

    for row in means.to_dict("records"):
        counts = {name: row[name] for name in ("cases", "groups", "seeds")}
        values |= {f"{place(row)} {name}": counts[name] for name in counts if row["arm"] != TEACHER}
        own = {n: float(row[n]) for n in ("dice", "low", "high")} | {
            "missed": f"{row['missed']:.1f}"
        }
        values |= {f"{place(row)} {row['arm']} {name}": value for name, value in own.items()}
    for row in comparison.to_dict("records"):
        pair = f"{place(row)} {row['arm']} minus {row['other']}"
        own = {n: f"{row[n or 'difference']:+.3f}" for n in ("", "low", "high")}
        p = f"= {row['p_holm']:.2g}" if row["p_holm"] >= 0.001 else "< 0.001"
        own |= {"p": p, "verdict": row["verdict"]}
        values |= {f"{pair} {name}".strip(): value for name, value in own.items()}
    return values


# Results that come with the repository ------------------------------------------------------------


def committed(name: str) -> pd.DataFrame:
    """A table of measured results, data/results/NAME.csv or NAME.csv.gz, with its own columns."""
    path = results.CHECKOUT / "data" / "results" / f"{name}.csv"
    return results.read_table(path if path.exists() else path.with_suffix(".csv.gz"))


def study(name: str = "per_case") -> pd.DataFrame:
    """A committed table with the column names of this package: id, lesion_pixels."""
    return committed(name).rename(columns={there: here for here, there in PUBLISHED.items()})


def collect_study(
    runs: Mapping[tuple[str, int], results.Result],
    about: dict[str, Any] | None = None,
    test_dataset: tuple[str, ...] = (),
) -> dict[str, pd.DataFrame]:
    """The tables of a study from finished runs: per_case (test cases), runs and history.

    Parameters
    ----------
    runs : {(arm, seed): training run}
        The teacher's arm is `teacher`.
    about : {column: value}, optional
        Replaces what the runs' configurations say, such as the teacher that the student alone is
        compared with, or adds columns of `statistics.FAMILY`.
    test_dataset : tuple of str
        Other data sets on which the runs are scored, too.
    """
    parts: dict[str, list[pd.DataFrame]] = {"per_case": [], "runs": [], "history": []}
    for (arm, seed), run in runs.items():
        cfg, env, summary = run.config, results.read_json(run.path / "env.json"), run.summary
        dataset = Path(cfg["dataset"]).name
        row: dict[str, Any] = {"run": results.short(run.path).removeprefix("runs/")}
        row |= {"dataset": dataset} | {
            name: cfg[name] for name in ("profile", "teacher", "fold", "seg_loss", "pixels")
        }
        row |= {"arm": arm, "seed": seed} | (about or {})
        scored = {dataset: run.per_case.query("split == 'test'")}
        scored |= {name: r.per_case for name, r in score_external(run, test_dataset).items()}
        for name, cases in scored.items():
            table = cases.rename(columns=PUBLISHED).assign(**row, test_dataset=name)
            parts["per_case"].append(table[[*FIRST, *(n for n in table if n not in FIRST)]])
        facts = {n: summary[n] for n in ("parameters", "epochs", "seconds")}
        facts |= {n: env[n] for n in ("device", "threads", "commit")}
        facts |= {"hash": run.digest[:16], "precision": cfg["precision"]}
        parts["runs"].append(pd.DataFrame([row | facts]))
        parts["history"].append(run.history.assign(**row))
    tables = {name: pd.concat(tables, ignore_index=True) for name, tables in parts.items()}
    tables["per_case"] = tables["per_case"].drop(columns=["label", "predicted_pixels"])
    return tables


# fmt: off
FIRST = [
    "run", "dataset", "test_dataset", "profile", "teacher", "arm", "seed", "split", "fold", "case",
    "group", "lesion_px", "contrast", "dice", "iou", "sensitivity", "precision", "hd95",
    "surface_dice", "missed", "false_alarm", "soft_dice", "seg_loss", "pixels",
]
# fmt: on
"""Columns of data/results/per_case.csv."""


def cost_points(
    per_case: pd.DataFrame, cost: pd.DataFrame, arms: tuple[str, ...] = ("alone", "method")
) -> pd.DataFrame:
    """Dice of a study's teachers and students of width 4 beside the cost of their networks.

    Parameters
    ----------
    per_case : DataFrame
        From `study`; of one `seg_loss`.
    cost : DataFrame
        `committed("cost")`.

    Returns
    -------
    DataFrame
        dataset, model (arm or teacher network), dice, low, high, parameters and macs
        (multiplications for one image of the size of the training), for `figures.pareto`.
    """
    at_128, rows = cost[cost["pixels"] == 128].drop_duplicates("model").set_index("model"), []
    students = per_case[~per_case["arm"].isin([TEACHER, "alone"])]
    teachers = students.groupby("test_dataset")["teacher"].nunique()
    for family, part in families(per_case):
        for arm in (arm for arm in (TEACHER, *arms) if arm in set(part["arm"])):
            network = family["teacher"] if arm == TEACHER else "student"
            model = network if arm == TEACHER else arm
            taught = arm in arms and arm != "alone" and teachers[family["test_dataset"]] > 1
            row = {"dataset": family["test_dataset"], "model": model}
            row["model"] += f", {label(family['teacher'])}" * bool(taught)
            row |= dict(zip(("dice", "low", "high"), case_mean(by_seed(part, arm))))
            row["parameters"] = at_128.loc[network, "parameters"]
            row["macs"] = at_128.loc[network, "macs"] * (part["pixels"].iloc[0] / 128) ** 2
            rows.append(row)
    return pd.DataFrame(rows).drop_duplicates(["dataset", "model"], ignore_index=True)
