"""pytest-benchmark's JSON -> one table with ratios, and runs/bench.json to hold a later run against.

python -m tests.benchmarks.report RAW.json OUT.json [EARLIER.json]
"""

import json
import sys
from pathlib import Path

import pandas as pd


def rows_of(raw: dict) -> list[dict]:
    """name, value, unit, ratio_to, ratio: every row that a benchmark reported, with its ratio within the same test."""
    rows = []
    for found in raw["benchmarks"]:
        reported = found["extra_info"].get("rows") or [[found["name"].removeprefix("test_"), 1000 * found["stats"]["median"], "ms", ""]]
        values = {name: value for name, value, *_ in reported}
        for name, value, unit, base in reported:
            ratio = value / values[base] if base in values else None
            rows.append({"name": name, "value": round(value, 4), "unit": unit, "ratio_to": base, "ratio": ratio and round(ratio, 3)})
    return rows


def draw_cost(table: pd.DataFrame, folder: Path) -> None:
    """Step times against pixels, images and arms, with the line of proportional cost through the first point."""
    import matplotlib.pyplot as plt

    from lesionkd_core import figures

    with figures.style():
        fig, axes = plt.subplots(1, 3, figsize=(figures.TWO_COLUMNS, 2.0), sharey=True)
        for axis, (pattern, label) in zip(axes, {
            r"step at (\d+) px, batch 8$": "Side of the image (px)", r"step at 64 px, batch (\d+)$": "Images in a batch",
            r"(\d+) arms at 64 px": "Arms in lockstep",
        }.items()):
            found = table.assign(x=table["name"].str.extract(pattern)[0].astype(float)).dropna(subset="x").sort_values("x")
            work = (found["x"] / found["x"].iloc[0]) ** (2 if "px" in label else 1)
            axis.loglog(found["x"], found["value"], "o", color="#4477AA", label="measured")
            axis.loglog(found["x"], work * found["value"].iloc[0], "-", color="black", linewidth=0.6, label="proportional")
            axis.set_xticks(found["x"], [f"{x:.0f}" for x in found["x"]])
            axis.minorticks_off()
            axis.set_xlabel(label)
        axes[0].set_yticks([100, 200, 500, 1000, 2000], ["100", "200", "500", "1000", "2000"])
        axes[0].set_ylabel("Step (ms)")
        axes[0].legend(frameon=False)
        figures.save(fig, "cost", folder, data=table)


def main(raw: str, out: str, earlier: str = "") -> None:
    table = pd.DataFrame(rows_of(json.loads(Path(raw).read_text())))
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    Path(out).write_text(table.to_json(orient="records", indent=1) + "\n")
    if earlier:
        before = pd.DataFrame(json.loads(Path(earlier).read_text())).set_index("name")["ratio"]
        table["ratio before"] = table["name"].map(before[~before.index.duplicated()])
    print(table.astype(object).fillna("").to_markdown(index=False))
    if table["name"].str.startswith("step at 64 px").any():
        draw_cost(table, Path(out).parent)
    print(f"\nwritten: {out}")


if __name__ == "__main__":
    main(*sys.argv[1:])
