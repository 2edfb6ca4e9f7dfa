"""Shared fixtures: results of tests go to a folder of their own, and oracles are read by name."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def oracle(name: str):
    """Numbers of the original implementations: 'overhaul.margin_cases' of tests/oracles/overhaul.json."""
    file, _, key = name.partition(".")
    return json.loads((ROOT / "tests" / "oracles" / f"{file}.json").read_text())[key]


@pytest.fixture(scope="session", autouse=True)
def runs(tmp_path_factory) -> Path:
    """Every result of this test session, away from the user's."""
    folder = Path(os.environ.get("LESIONKD_TEST_RUNS") or tmp_path_factory.mktemp("runs"))
    before = os.environ.get("LESIONKD_RUNS")
    os.environ["LESIONKD_RUNS"] = str(folder)
    yield folder
    os.environ.pop("LESIONKD_RUNS") if before is None else os.environ.update(LESIONKD_RUNS=before)
