"""pytest-benchmark's JSON -> one table with ratios, and a file to compare a later run with.

python -m tests.benchmarks.report RAW.json OUT.json [EARLIER.json]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pandas as pd


def rows_of(raw):
    """name, ms, ratio_to, ratio: every row that a benchmark reported."""
    rows = []
    for found in raw["benchmarks"]:
        reported = found["extra_info"]["rows"]
        values = {name: value for name, value, _ in reported}
        for name, value, base in reported:
            ratio = round(value / values[base], 3)
            rows.append({"name": name, "ms": round(value, 3), "ratio_to": base, "ratio": ratio})
    return rows


def main(raw, out, earlier=""):
    table = pd.DataFrame(rows_of(json.loads(Path(raw).read_text())))
    Path(out).write_text(table.to_json(orient="records", indent=1) + "\n")
    if earlier:
        before = pd.DataFrame(json.loads(Path(earlier).read_text())).set_index("name")["ratio"]
        table["ratio before"] = table["name"].map(before[~before.index.duplicated()])
    print(table.astype(object).fillna("").to_markdown(index=False))
    print(f"\nwritten: {out}")


if __name__ == "__main__":
    main(*sys.argv[1:])
