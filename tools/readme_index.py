"""Writes the README's results table and docs/options.md: python -m tools.readme_index"""

from __future__ import annotations

import pandas as pd

from lesionkd_core.analysis import statistics, tables
from lesionkd_core.results import CHECKOUT
from tools.option_reference import option_reference

README = CHECKOUT / "README.md"
BEGIN = "<!-- results: made from data/results by `make notebooks` -->"
END = "<!-- end of results -->"


def results_table() -> pd.DataFrame:
    """One row for each data set and teacher of the committed study that taught a student.

    Of several segmentation losses the default; of several fractions of labels all of them.
    """
    study = tables.study()
    if "seg_loss" in study:
        study = study[study["seg_loss"] == "bce_dice"]
    if "labels" in study:
        study = study[study["labels"] == study["labels"].max()]
    study = study[study["test_dataset"] == study["dataset"]]
    cost = tables.committed("cost").query("precision == 'float32'")
    fastest = cost.query("pixels == 128").groupby("model")["latency_ms_median"].min()
    parameters = cost.groupby("model")["parameters"].first()
    rows = []
    for setting, part in statistics.settings(study):
        if not {"teacher", "alone", "method"} <= set(part["arm"]):
            continue
        dice = {a: statistics.case_mean(statistics.by_seed(part, a)) for a in set(part["arm"])}
        network = setting["teacher"]
        times = [fastest[name] for name in (network, "student")]
        size = f"{part['pixels'].iloc[0]} px, {part['id'].nunique()} test images"
        row = {"data set": f"{setting['dataset']}, {size}"}
        row["teacher"] = f"{tables.label(network)} {dice['teacher'][0]:.3f}"
        row |= {name: shown(dice[arm]) for name, arm in ARMS.items()}
        row["distilled / teacher"] = f"{100 * dice['method'][0] / dice['teacher'][0]:.1f} %"
        row["fewer parameters"] = f"{parameters[network] / parameters['student']:.0f} times"
        row["ms at 128 px, teacher and student"] = f"{times[0]:.0f} and {times[1]:.1f}"
        rows.append(row)
    return pd.DataFrame(rows)


ARMS = {"student alone": "alone", "distilled (method)": "method"}


def shown(score: tuple[float, float, float]) -> str:
    """Mean and 95 % interval."""
    mean, low, high = score
    return f"{mean:.3f} [{low:.3f}, {high:.3f}]" if low < high else f"{mean:.3f}"


def with_results(text: str) -> str:
    """The README with its table made again."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    table = results_table().to_markdown(index=False, disable_numparse=True)
    return f"{before}{BEGIN}\n{table}\n{END}{after}"


def main() -> None:
    """Write both."""
    README.write_text(with_results(README.read_text(encoding="utf-8")), encoding="utf-8")
    (CHECKOUT / "docs" / "options.md").write_text(option_reference(), encoding="utf-8")


if __name__ == "__main__":
    main()
