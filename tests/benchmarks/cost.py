"""`make cost`: every network in every engine, in turns in one process; writes data/results/cost.csv and memory.csv."""

import time
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd

import lesionkd_core as lkd
from lesionkd_core import store
from lesionkd_core.export.cost import ENGINES, NETWORKS
from lesionkd_core.export.deploy import Deployed
from lesionkd_core.export.to_onnx import write_onnx
from tests.conftest import ROOT

RESULTS = ROOT / "data" / "results"


def memory(pixels: tuple[int, ...]) -> pd.DataFrame:
    """Peak of a fresh process that segments one image in ONNX Runtime, MiB beyond the runtime."""
    rows = []
    with TemporaryDirectory() as folder:
        file = Path(folder) / "network.onnx"
        for name, build in NETWORKS.items():
            write_onnx(Deployed(build()).eval(), file)
            rows += [{"model": name, "engine": "ONNX Runtime", "precision": "float32", "pixels": s, "peak_mib": lkd.peak_memory(file, s)} for s in pixels]
    return pd.DataFrame(rows)


if __name__ == "__main__":
    begun = time.monotonic()
    sizes = (128, 256)
    cost = lkd.measure_cost(sizes, ENGINES, repeats=15, tell=lambda text: print(f"{time.monotonic() - begun:6.0f} s  {text}", flush=True))
    store.write_table(RESULTS / "cost.csv", cost)
    store.write_table(RESULTS / "memory.csv", memory(sizes))
    print(lkd.tables.speedups(cost))
