"""Results of tests go to a folder of their own, kernels of notebooks included; oracles are read by name."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def oracle(name: str):
    """Numbers of the original implementations: 'overhaul.margin_cases' of tests/oracles/overhaul.json."""
    file, _, key = name.partition(".")
    return json.loads((ROOT / "tests" / "oracles" / f"{file}.json").read_text())[key]


def pytest_configure(config):
    """LESIONKD_RUNS for the whole session: set before a kernel starts, removed at the end."""
    kept = os.environ.get("LESIONKD_TEST_RUNS")  # keeps results between sessions while developing
    config.lesionkd_runs = None if kept else tempfile.mkdtemp(prefix="lesionkd-tests-")
    os.environ["LESIONKD_RUNS"] = kept or config.lesionkd_runs


def pytest_unconfigure(config):
    if config.lesionkd_runs:
        shutil.rmtree(config.lesionkd_runs, ignore_errors=True)


@pytest.fixture(scope="session")
def trained():
    """A student that was really trained, on the phantom with the smoke profile: some test cases are segmented well, some badly."""
    from lesionkd_core.config import DistillConfig
    from lesionkd_core.stages import distill

    return distill(DistillConfig(terms=""), tell=lambda *_: None)
