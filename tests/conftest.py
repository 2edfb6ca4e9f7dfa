"""Results of tests go to a folder of their own, kernels of notebooks included; oracles are read by name."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def oracle(name: str):
    """Numbers of the original implementations: 'overhaul.margin_cases' of tests/oracles/overhaul.json."""
    file, _, key = name.partition(".")
    return json.loads((ROOT / "tests" / "oracles" / f"{file}.json").read_text())[key]


def pytest_configure(config):
    """LESIONKD_RUNS for the whole session: set before a kernel or a worker of -n starts, removed at the end."""
    kept = os.environ.get("LESIONKD_TEST_RUNS")  # keeps results between sessions while developing
    worker = hasattr(config, "workerinput")  # shares the folder of the process that started it: locks are there for that
    config.lesionkd_runs = None if kept or worker else tempfile.mkdtemp(prefix="lesionkd-tests-")
    os.environ["LESIONKD_RUNS"] = os.environ["LESIONKD_RUNS"] if worker else kept or config.lesionkd_runs
    if getattr(config.option, "numprocesses", None) and not worker:
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # one core a worker


def pytest_unconfigure(config):
    if config.lesionkd_runs:
        shutil.rmtree(config.lesionkd_runs, ignore_errors=True)


SOAKED: list[tuple[str, bool, float]] = []


@pytest.fixture
def soaked():
    """Counts a soak trial for the fault table: `with soaked(kind) as done: ...; done(seconds)`."""

    @contextmanager
    def trial(kind: str):
        seconds: list[float] = []
        try:
            yield seconds.append
        finally:
            SOAKED.append((kind, bool(seconds), seconds[0] if seconds else float("nan")))

    return trial


def pytest_terminal_summary(terminalreporter):
    """The fault table of docs/trust.md."""
    if SOAKED:
        import pandas as pd

        table = pd.DataFrame(SOAKED, columns=["fault", "well", "seconds"]).groupby("fault", sort=False)
        table = table.agg(times=("well", "size"), well=("well", "sum"), median_seconds=("seconds", "median"), most_seconds=("seconds", "max"))
        lost = (table["times"] - table.pop("well")).rename("lost or wrong")
        terminalreporter.write_line(pd.concat([table["times"], lost, table.iloc[:, 1:].round(1)], axis=1).reset_index().to_markdown(index=False))


@pytest.fixture(scope="session")
def trained():
    """A student that was really trained, on the phantom with the smoke profile: some test cases are segmented well, some badly."""
    from lesionkd_core.config import DistillConfig
    from lesionkd_core.stages import distill

    return distill(DistillConfig(terms=""), tell=lambda *_: None)
