"""The import rules notice a wrong import; examples in docstrings give what they print."""

import doctest
import importlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

CORE = ROOT / "lesionkd_core"
EXAMPLES = [path for path in sorted(CORE.rglob("*.py")) if ">>> " in path.read_text()]


def tool(name: str) -> str:
    """A command installed beside this Python."""
    return shutil.which(name, path=str(Path(sys.executable).parent)) or name


def test_the_import_rule_notices_a_wrong_import(tmp_path):
    """The contracts of pyproject.toml on a copy in which losses import results."""
    shutil.copytree(CORE, tmp_path / "lesionkd_core", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    terms = tmp_path / "lesionkd_core" / "losses" / "terms.py"
    terms.write_text(terms.read_text() + "\nfrom ..results import log\n")
    command = [tool("lint-imports"), "--no-cache"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (
        done.returncode == 1
        and "lesionkd_core.losses.terms -> lesionkd_core.results" in done.stdout
    )


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.relative_to(CORE).as_posix())
def test_the_examples_of_a_module_give_what_they_print(path):
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    failed, attempted = doctest.testmod(importlib.import_module(name))
    assert attempted and not failed
