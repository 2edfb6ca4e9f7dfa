"""What tools find without running anything: lint, types; and the examples in docstrings, which are run."""

import doctest
import importlib
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.test_house import CORE

EXAMPLES = [path for path in sorted(CORE.rglob("*.py")) if ">>> " in path.read_text()]


def says(*command: str) -> str:
    """What a tool prints that finds something; nothing where it is content."""
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True)
    return done.stdout + done.stderr if done.returncode else ""


def test_lint_finds_nothing():
    assert says("ruff", "check", "lesionkd_core", "tests", "notebooks") == ""


def test_types_agree():
    assert says("mypy") == ""  # half a minute the first time; what it finds out is kept in .mypy_cache


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.relative_to(CORE).as_posix())
def test_the_examples_of_a_module_give_what_they_print(path):
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    failed, attempted = doctest.testmod(importlib.import_module(name))
    assert attempted and not failed
