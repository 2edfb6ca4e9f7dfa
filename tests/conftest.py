"""Results of tests go to a folder of their own; one tiny teacher, graph and student serve all."""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from pathlib import Path

import pytest
from nbval.plugin import IPyNbCell
from xdist.scheduler import LoadFileScheduling

ROOT = Path(__file__).resolve().parents[1]
SHORTER = {
    "05_ablations": "epochs = 2",
    "06_paper_figures": "epochs = 2",  # draws the result of 05
    "07_mobile": 'sizes = "64"',
}
"""Parameters with which nbval runs a notebook; its last cell has another digest then."""


def oracle(name: str):
    """Numbers of the original implementations: 'overhaul.margin_cases' of oracles/overhaul.json."""
    file, _, key = name.partition(".")
    return json.loads((ROOT / "tests" / "oracles" / f"{file}.json").read_text())[key]


def pytest_configure(config):
    """Set LESIONKD_RUNS for the session, before a kernel or a worker of -n starts."""
    kept = os.environ.get("LESIONKD_TEST_RUNS")  # keeps results between sessions while developing
    worker = hasattr(config, "workerinput")  # shares the folder of the process that started it
    config.own_runs = None if kept or worker else tempfile.mkdtemp(prefix="lesionkd-tests-")
    if not worker:
        os.environ["LESIONKD_RUNS"] = kept or config.own_runs
    if getattr(config.option, "numprocesses", None):
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # one core for each worker


def pytest_unconfigure(config):
    if config.own_runs:
        shutil.rmtree(config.own_runs, ignore_errors=True)


class _Scheduling(LoadFileScheduling):
    """One worker for each file; one for all notebooks, since each finds what earlier ones made."""

    def _split_scope(self, nodeid):
        file = super()._split_scope(nodeid)
        return "notebooks" if file.endswith(".ipynb") else file


@pytest.hookimpl(optionalhook=True)  # xdist may be switched off
def pytest_xdist_make_scheduler(config, log):
    return _Scheduling(config, log)


def pytest_collection_modifyitems(items):
    for cell in items:
        if isinstance(cell, IPyNbCell) and (parameters := SHORTER.get(cell.parent.path.stem)):
            if "parameters" in cell.cell.metadata.get("tags", []):
                cell.cell.source += f"\n{parameters}"
            if cell.cell.source.endswith('print("DONE")'):
                cell.options["check"] = False


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """An empty folder of results for one test."""
    monkeypatch.setenv("LESIONKD_RUNS", str(tmp_path / "runs"))
    return tmp_path / "runs"


def copy_of(path: Path, runs: Path, name: str = "") -> Path:
    """A copy of a result in another folder of results."""
    target = runs / (name or f"{path.parent.name}/{path.name}")
    return shutil.copytree(path, target)


@pytest.fixture(scope="session")
def data():
    """The prepared arrays of `tiny.CFG`."""
    from lesionkd_core.data.prepare import prepare
    from tests.tiny import CFG

    return prepare(CFG)


@pytest.fixture(scope="session")
def teacher(data):
    from lesionkd_core.pipeline import train_teacher
    from tests.tiny import CFG

    return train_teacher(data, CFG)


@pytest.fixture(scope="session")
def graph(data, teacher):
    from lesionkd_core.pipeline import fit_edge_graph
    from tests.tiny import CFG

    return fit_edge_graph(teacher, data, CFG)


@pytest.fixture(scope="session")
def student(data, teacher, graph):
    """A student of the method: L_seg, L_feat and L_edge."""
    from lesionkd_core.pipeline import distill
    from tests.tiny import CFG

    return distill(teacher, graph, data, CFG)


@pytest.fixture(scope="module")
def pair():
    """An untrained student of width 2 and a frozen teacher of width 3."""
    import torch

    from lesionkd_core.models import UNet

    torch.manual_seed(0)
    return UNet(width=2), UNet(width=3).eval().requires_grad_(False)


@pytest.fixture
def messages(caplog, monkeypatch):
    """What the package said so far: a function that returns the lines."""
    monkeypatch.setattr(logging.getLogger("lesionkd"), "propagate", True)
    caplog.set_level("INFO", logger="lesionkd")
    return lambda: [record.getMessage() for record in caplog.records]
