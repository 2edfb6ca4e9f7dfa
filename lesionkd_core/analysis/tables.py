"""Tables as readers need them: Markdown in a notebook, CSV and LaTeX beside the figures."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from .. import results
from ..evaluate import score_external
from ..losses import TERMS, needs_teacher
from .statistics import SETTING, TEACHER, Setting, by_seed, case_mean, settings, split_arm, terms_of

if TYPE_CHECKING:
    from IPython.display import Markdown

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
    "method": "both (method)",
    "shuffled": "both, edges shuffled",
    "otsu": "Otsu",
    "resnet34_unet": "ResNet34-UNet",
    "efficientnet_lite2_unet": "EfficientNet-Lite2 U-Net",
    "unet64": "U-Net 64",
    "edge_joint": "+ L_edge, joint graph",
    "edge_relation": "+ edge relation",
    "stem2": "student, stem 2",
    "unlabelled": "images of the other clinic",
    "masks": "images and masks of the other clinic",
    "same": "teacher of the same masks",
}
"""Labels of arms and networks that are not the name of a loss term, also of earlier versions."""
PUBLISHED = {"id": "case", "lesion_pixels": "lesion_px"}
"""Names of these columns in data/results; everywhere else they have the first name."""


def label(name: str) -> str:
    """The label of an arm, a loss term or a network; a name without one is its own label.

    >>> label("kd*4")
    'logit KD, 4x longer'
    """
    base, times = split_arm(name)
    text = TERMS[base].label if base in TERMS else LABELS.get(base, base)
    if "+" in base or "=" in base:
        joined = (part.partition("=") for part in base.split("+"))
        text = " + ".join(f"{label(n).removeprefix('+ ')} {w}".strip() for n, _, w in joined)
    if times == 1:
        return text
    return f"{text}, {times:g}x longer" if times < float("inf") else f"{text}, longer"


def markdown(table: pd.DataFrame, digits: int = 3) -> Markdown:
    """A DataFrame as a Markdown table in a notebook; text that comes from files stays text."""
    from IPython.display import Markdown

    def shown(value: object) -> str:
        if isinstance(value, float):
            return f"{value:.{digits}f}" if value == value else "--"
        return html.escape(str(value), quote=False).replace("|", r"\|")

    cells = table.map(shown).rename(columns=shown)
    return Markdown(cells.to_markdown(index=False, disable_numparse=True))


def save(
    table: pd.DataFrame, name: str, folder: Path, digits: int = 3, shown: pd.DataFrame | None = None
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


def variables(values: Mapping[str, object], folder: Path) -> Path:
    r"""Write variables.tex: a macro for each number that a paper quotes, such as \lkdTeacherDice.

    A digit in a name becomes a letter, 0 is A. Floats are rounded to three digits.
    """
    lines = [f"\\newcommand{{\\lkd{_macro(n)}}}{{{_quoted(v)}}}\n" for n, v in values.items()]
    path = Path(folder) / "variables.tex"
    results.write_text(path, "".join(lines))
    return path


def _macro(name: str) -> str:
    words = re.findall(r"[A-Za-z]+|[0-9]", name)
    return "".join("ABCDEFGHIJ"[int(w)] if w.isdigit() else w.capitalize() for w in words)


def _quoted(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    if isinstance(value, int):
        return f"{value:,}"
    return _typeset(re.sub(r"([&%$#_{}])", r"\\\1", str(value)))


# Scores and comparisons ---------------------------------------------------------------------------


def scores(summaries: Mapping[str, dict[str, Any]]) -> pd.DataFrame:
    """Mean [95 % interval] of each metric, one row for each network, with missed lesions.

    `summaries` are from `evaluate.summarize` or a run's `summary["test"]`.
    """
    rows = []
    for name, summary in summaries.items():
        row: dict[str, object] = {"network": label(name)}
        for metric in (metric for metric in METRIC_LABELS if metric in summary):
            row[METRIC_LABELS[metric]] = results.with_interval(summary[metric], _digits(metric))
        row["missed"] = f"{summary['missed']} of {summary['lesions']}"
        rows.append(row | {"false alarms": summary["false_alarms"]})
    return pd.DataFrame(rows)


def _digits(name: str) -> int:
    return 1 if name in ("hd95", "missed", "false_alarm") else 3


def arms(means: pd.DataFrame) -> pd.DataFrame:
    """`statistics.means` for a page; data set and teacher if they differ."""
    table = means.assign(arm=means["arm"].map(label))
    trainings = [name for name in table if name.startswith(("dice_seed", "dice_fold"))]
    for name in {*trainings, "hd95", "missed", "false_alarm"} & set(table):
        text = table[name].map(f"{{:.{_digits(name)}f}}".format, na_action="ignore")
        table[name] = text.astype(object).fillna("")
    names = METRIC_LABELS | {"false_alarm": "false alarms"}
    names |= {name: re.sub(r"dice_([a-z]+)", r"Dice, \1 ", name) for name in trainings}
    if "low" in table:
        limits = table[["dice", "low", "high"]].rename(columns={"dice": "mean"})
        table["dice"] = [results.with_interval(row) for row in limits.to_dict("records")]
        names["dice"] = "Dice [95 % interval]"
    table = table.drop(columns=["seeds", "cases", "groups", "low", "high"], errors="ignore")
    return _differing(table).rename(columns=names)


def differences(comparison: pd.DataFrame) -> pd.DataFrame:
    """Rows of `statistics.compare` for a page, one for each pair."""
    rows = []
    for row in comparison.to_dict("records"):
        digits = _digits(row["metric"])
        shown = {name: row[name] for name in SETTING if name in row}
        shown |= {"arm": label(row["arm"]), "minus": label(row["other"])}
        shown[f"{METRIC_LABELS[row['metric']]}, difference"] = f"{row['difference']:+.{digits}f}"
        shown["95 % interval"] = _range(row["low"], row["high"], digits)
        shown["over trainings"] = _range(row["t_low"], row["t_high"], digits)
        shown |= {"trainings": row["trainings"], "groups": row["groups"]}
        rows.append(shown | {"p (Holm)": f"{row['p_holm']:.2g}", "verdict": row["verdict"]})
    return _differing(pd.DataFrame(rows))


def _range(low: float, high: float, digits: int) -> str:
    return f"{low:+.{digits}f} to {high:+.{digits}f}" if low == low else "--"


def _differing(table: pd.DataFrame) -> pd.DataFrame:
    """Without the columns of SETTING in which all rows agree; labels in the others."""
    known = [name for name in SETTING if name in table]
    same = [name for name in known if table[name].nunique(dropna=False) < 2]
    if {"dataset", "test_dataset"} <= set(table) and table["dataset"].equals(table["test_dataset"]):
        same.append("dataset")
    labels = {n: table[n].map(str).map(label) for n in known if n not in same}
    names = {"dataset": "trained on", "test_dataset": "data set", "seg_loss": "L_seg"}
    return table.assign(**labels).drop(columns=set(same)).rename(columns=names)


def numbers(means: pd.DataFrame, comparison: pd.DataFrame) -> dict[str, object]:
    """What a paper quotes of `statistics.means` and `compare_arms`, by name, for `variables`.

    A name holds what tells the rows apart: `busi method dice`, `busi method minus alone low`. The
    teacher ResNet34-UNet, the profile cpu and the loss bce_dice are not named, nor is the size of
    the images if it is the only one.
    """
    usual = {"teacher": "resnet34_unet", "profile": "cpu", "seg_loss": "bce_dice"}
    naming = [name for name in SETTING if name in means]
    if "pixels" in naming and means.groupby("dataset")["pixels"].nunique().max() == 1:
        naming.remove("pixels")
    values: dict[str, object] = {}

    def place(row: Setting) -> str:
        telling = [str(row[name]) for name in naming if row[name] != usual.get(name)]
        return " ".join(dict.fromkeys(telling))

    for row in means.to_dict("records"):
        arm = row["arm"]
        if arm != TEACHER:
            for name in ("cases", "groups", "seeds"):
                values[f"{place(row)} {name}"] = row[name]
        for name in ("dice", "low", "high"):
            values[f"{place(row)} {arm} {name}"] = float(row[name])
        values[f"{place(row)} {arm} missed"] = f"{row['missed']:.1f}"
    for row in comparison.to_dict("records"):
        pair = f"{place(row)} {row['arm']} minus {row['other']}"
        values[pair] = f"{row['difference']:+.3f}"
        for name in ("low", "high", "t_low", "t_high"):
            values[f"{pair} {name}"] = f"{row[name]:+.3f}"
        values[f"{pair} p"] = f"= {row['p_holm']:.2g}" if row["p_holm"] >= 0.001 else "< 0.001"
        values[f"{pair} verdict"] = row["verdict"]
    return values


def gain_and_hours(comparison: pd.DataFrame, runs: pd.DataFrame) -> pd.DataFrame:
    """What each arm gains over the student alone, and what it costs more.

    Parameters
    ----------
    comparison : DataFrame
        From `statistics.compare_with`.
    runs : DataFrame
        Of the same study, with the teachers: dataset, teacher, arm, seconds.

    Returns
    -------
    DataFrame
        The comparison and hours: training the arm, and its teacher if it has one, minus training
        the student alone; mean over seeds and folds.
    """
    keys = [n for n in SETTING if n in runs and n in comparison and n != "test_dataset"]
    hours = runs.groupby([*keys, "arm"])["seconds"].mean() / 3600

    def cost(setting: list[object], arm: str) -> float:
        shares = [arm, TEACHER] if _taught(arm) else [arm]
        return sum(float(hours.get((*setting, name), float("nan"))) for name in shares)

    rows = []
    for row in comparison.to_dict("records"):
        setting = [row[name] for name in keys]
        rows.append(row | {"hours": cost(setting, row["arm"]) - cost(setting, row["other"])})
    return pd.DataFrame(rows, columns=[*comparison, "hours"])


def _taught(arm: str) -> bool:
    """Whether an arm has a teacher; an arm of an earlier version has one."""
    terms = terms_of(arm)
    return any(name not in TERMS for name in terms) or needs_teacher(terms)


# Results that come with the repository ------------------------------------------------------------


def committed(name: str) -> pd.DataFrame:
    """A table of measured results, data/results/NAME.csv or NAME.csv.xz, with its own columns."""
    path = results.CHECKOUT / "data" / "results" / f"{name}.csv"
    return results.read_table(path if path.exists() else path.with_suffix(".csv.xz"))


def study(name: str = "per_case") -> pd.DataFrame:
    """A committed table with the column names of this package: id, lesion_pixels."""
    return committed(name).rename(columns={there: here for here, there in PUBLISHED.items()})


def collect_study(
    runs: Mapping[tuple[str, int], results.Result],
    about: Mapping[str, object] | None = None,
    test_dataset: tuple[str, ...] = (),
) -> dict[str, pd.DataFrame]:
    """The tables of a study from finished runs: per_case (test cases), runs and history.

    Parameters
    ----------
    runs : {(arm, seed): training run}
        The teacher's arm is `teacher`.
    about : {column: value}, optional
        Replaces what the runs' configurations say, such as the teacher that the student alone is
        compared with, or adds columns of `statistics.SETTING`.
    test_dataset : tuple of str
        Other data sets on which the runs are scored, too.

    Returns
    -------
    dict
        In `runs`, seconds are those of one training; timing says whether it was trained alone, or
        that the time of students trained together was divided by their number.
    """
    parts: dict[str, list[pd.DataFrame]] = {"per_case": [], "runs": [], "history": []}
    for (arm, seed), run in runs.items():
        cfg, env, summary = run.config, results.read_json(run.path / "env.json"), run.summary
        dataset = Path(cfg["dataset"]).name
        row: dict[str, object] = {"run": results.short(run.path).removeprefix("runs/")}
        row["dataset"] = dataset
        for name in ("profile", "teacher", "fold", "seg_loss", "pixels"):
            row[name] = cfg[name]
        row |= {"arm": arm, "seed": seed} | dict(about or {})
        scored = {dataset: run.per_case.query("split == 'test'")}
        if test_dataset:
            elsewhere = score_external(run, test_dataset)
            scored |= {name: external.per_case for name, external in elsewhere.items()}
        for name, cases in scored.items():
            table = cases.rename(columns=PUBLISHED).assign(**row, test_dataset=name)
            parts["per_case"].append(table[[*FIRST, *(n for n in table if n not in FIRST)]])
        facts = {n: summary[n] for n in ("parameters", "epochs", "seconds")}
        facts["timing"] = _timing(summary.get("together"))
        facts |= {n: env[n] for n in ("device", "threads", "commit")}
        facts |= {"hash": run.digest[:16], "precision": cfg["precision"]}
        parts["runs"].append(pd.DataFrame([row | facts]))
        parts["history"].append(run.history.assign(**row))
    tables = {name: pd.concat(tables, ignore_index=True) for name, tables in parts.items()}
    tables["per_case"] = tables["per_case"].drop(columns=["label", "predicted_pixels"])
    return tables


def _timing(together: int | None) -> str:
    if together is None:
        return "unknown"
    return "alone" if together == 1 else f"divided by {together}"


# fmt: off
FIRST = [
    "run", "dataset", "test_dataset", "profile", "teacher", "arm", "seed", "split", "fold", "case",
    "group", "lesion_px", "contrast", "dice", "iou", "sensitivity", "precision", "hd95",
    "surface_dice", "missed", "false_alarm", "soft_dice", "seg_loss", "pixels",
]
# fmt: on
"""Columns of data/results/per_case.csv."""


def cost_points(per_case: pd.DataFrame, cost: pd.DataFrame) -> pd.DataFrame:
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
        dataset, teacher, model (arm or teacher network), dice, low, high, parameters and macs
        (multiplications for one image of the size of the training), for `figures.dice_and_cost`.
        Networks that `cost` does not have are left out.
    """
    at_128 = cost[cost["pixels"] == 128].drop_duplicates("model").set_index("model")
    rows = []
    for setting, part in settings(per_case):
        for arm in (arm for arm in (TEACHER, "alone", "method") if arm in set(part["arm"])):
            network = str(setting["teacher"]) if arm == TEACHER else "student"
            if network not in at_128.index:
                continue  # its cost was not measured
            row = {"dataset": setting["test_dataset"], "teacher": setting["teacher"]}
            row["model"] = network if arm == TEACHER else arm
            row |= zip(("dice", "low", "high"), case_mean(by_seed(part, arm)))
            row["parameters"] = at_128.loc[network, "parameters"]
            row["macs"] = at_128.loc[network, "macs"] * (part["pixels"].iloc[0] / 128) ** 2
            rows.append(row)
    return pd.DataFrame(rows)
