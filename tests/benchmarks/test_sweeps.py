"""Summarizing and collecting many runs, and what a sweep costs beside its runs; nothing here asserts a time."""

import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from lesionkd_core import store
from lesionkd_core.config import DistillConfig
from lesionkd_core.evaluation import METRICS
from lesionkd_core.sweeps import cluster, plan, results
from tests.conftest import ROOT

RUNS, CASES = 1000, 100_000
BYTES = 5 * 2**30
"""The generated table takes 3 GB; it is removed at the end."""


def quiet(*_):
    pass


@pytest.fixture(scope="module")
def place():
    if shutil.disk_usage(tempfile.gettempdir()).free < BYTES:
        pytest.skip(f"the generated table wants {BYTES / 2**30:.0f} GiB of disk")
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("LESIONKD_RUNS", folder)
        yield Path(folder)


@pytest.fixture(scope="module")
def one_run(place):
    """A finished student with 100,000 scored cases."""
    rng, path = np.random.default_rng(0), place / "distill" / "one"
    table = pd.DataFrame({"id": [f"case_{i:06d}" for i in range(CASES)], "group": [f"g{i // 3:06d}" for i in range(CASES)], "split": "test", "label": ""})
    table = table.assign(**{metric: rng.random(CASES) for metric in METRICS}, lesion_pixels=rng.integers(0, 4000, CASES))
    table = table.assign(predicted_pixels=rng.integers(0, 4000, CASES), missed=rng.integers(0, 2, CASES), false_alarm=0)
    store.begin(path, DistillConfig(), "upstream")
    store.write_table(path / "per_case.csv", table)
    store.finish(path)
    return path


def test_collecting_a_run_of_100_000_cases(benchmark, report, one_run):
    file = store.runs_root() / "results" / "distill-one.parquet"
    benchmark.pedantic(lambda: results.collect(quiet), setup=lambda: file.unlink(missing_ok=True), rounds=5)
    report(f"collecting a run of {CASES:,} cases", 1000 * benchmark.stats.stats.median, "ms")


@pytest.fixture(scope="module")
def thousand(place, one_run):
    """What `collect` makes of a thousand such runs: 5 arms, 4 data sets, 50 seeds."""
    folder = results.collect(quiet)
    drawn = ", ".join(f'random()::FLOAT AS "{metric}"' for metric in METRICS)
    with results._connect() as connection:
        for i in range(1, RUNS):
            changed = f"'runs/distill/{i}' AS run, 'arm{i % 5}' AS arm, 'data{i // 5 % 4}' AS dataset, 'data{i // 5 % 4}' AS test_dataset, {i // 20} AS seed"
            rows = connection.sql(f"SELECT * REPLACE ({changed}, {drawn}) FROM '{folder}/distill-one.parquet'")
            rows.write_parquet(str(folder / f"distill-{i}.parquet"), compression="zstd")
    return folder


SUMMARY = """
import re, time
from lesionkd_core.sweeps.results import summarize_results
def peak():  # of this process alone: getrusage hands on what the parent had
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
before, started = peak(), time.perf_counter()
table = summarize_results()
print(time.perf_counter() - started, before, peak(), table["runs"].sum())
"""


def test_summarizing_100_000_cases_of_1000_runs(benchmark, report, thousand):
    said = []

    def summarize():
        said.append(subprocess.run([sys.executable, "-c", SUMMARY], capture_output=True, text=True, check=True, cwd=ROOT).stdout.split())

    benchmark.pedantic(summarize, rounds=3)
    seconds, before, peak = np.median(np.array(said, float)[:, :3], axis=0)
    assert said[0][3] == str(RUNS)
    name = f"{RUNS} runs of {CASES:,} cases"
    report(f"summarizing {name}", seconds, "s")
    report(f"peak memory, summarizing {name}", peak, "MiB", "memory before")
    report("memory before", before, "MiB")
    report(f"Parquet of {name}", sum(file.stat().st_size for file in thousand.iterdir()) / 1e9, "GB")


def test_what_dask_adds_to_a_run(benchmark, report, place, tmp_path):
    """Runs that are found at once on a worker: what is left is scheduling."""
    count = 50
    (tmp_path / "many.yaml").write_text(f"notebook: 03_teacher\ninclude:\n{''.join(f'- {{teacher_seed: {i}}}{chr(10)}' for i in range(count))}")
    tasks = plan.read_sweep(tmp_path / "many.yaml")
    done = place / "teacher" / "done"
    done.mkdir(parents=True)
    (done / "DONE").touch()
    output = {"output_type": "stream", "name": "stdout", "text": ["runs/teacher/done\n", "DONE\n"]}
    for task in tasks:
        task.target.parent.mkdir(exist_ok=True)
        task.target.write_text(json.dumps({"cells": [{"outputs": [output]}]}))
    with cluster.connect("", tasks, 1, 0, quiet) as client:
        benchmark.pedantic(lambda: cluster._drive(client, tasks), rounds=5, warmup_rounds=1)
    report("sweep overhead per run, Dask", 1000 * benchmark.stats.stats.median / count, "ms")


def test_what_a_notebook_adds_to_its_run(benchmark, report, tmp_path, monkeypatch):
    """A run whose results are all there, through papermill and by a call: kernel, imports, figures."""
    from lesionkd_core.stages import train_teacher

    monkeypatch.setenv("LESIONKD_RUNS", str(tmp_path / "runs"))
    (tmp_path / "one.yaml").write_text("notebook: 03_teacher\ninclude: [{pixels: 32, cases: 40, teacher_epochs: 1}]\n")
    [task] = plan.read_sweep(tmp_path / "one.yaml")
    train_teacher(task.cfg, quiet)
    started = time.perf_counter()
    train_teacher(task.cfg, quiet)
    report("finding a finished teacher by a call", 1000 * (time.perf_counter() - started), "ms")
    run = (task.notebook.stem, task.parameters, str(task.target), str(tmp_path), {})
    said = benchmark.pedantic(lambda: cluster.run_task(*run), setup=lambda: task.target.unlink(missing_ok=True), rounds=3)
    assert said[0] == "made"
    report("sweep overhead per run, notebook of a finished teacher", 1000 * benchmark.stats.stats.median, "ms")
