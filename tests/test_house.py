"""The package as a whole: quick imports, public names, the lock, no code in files, data cards."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml

import lesionkd_core
from lesionkd_core.data.layouts import CATALOGUE
from tests.conftest import ROOT

CORE = ROOT / "lesionkd_core"
MODULES = sorted(CORE.rglob("*.py"))


def calls_in(path):
    """(name as written, constant keywords) of every call in a module."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            constants = {k.arg: k.value for k in node.keywords if isinstance(k.value, ast.Constant)}
            yield ast.unparse(node.func), {name: value.value for name, value in constants.items()}


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.relative_to(CORE).as_posix())
def test_no_file_can_bring_code_along(path):
    """Nothing is unpickled, evaluated or run through a shell."""
    text = path.read_text()
    assert not re.search(
        r"^\s*(import|from) (pickle|cloudpickle|joblib|marshal|shelve)\b", text, re.M
    )
    for name, constants in calls_in(path):
        assert name not in ("eval", "exec", "pickle.loads", "os.system"), name
        assert not constants.get("allow_pickle") and not constants.get("shell"), name
        assert name != "torch.load" or constants.get("weights_only") is True


def test_nothing_cites_notes_that_are_not_in_the_repository():
    for path in [*MODULES, *ROOT.glob("notebooks/*.ipynb")]:
        assert not re.search(r"\b(METHOD|DESIGN)\b", path.read_text()), path


def test_importing_the_package_leaves_the_heavy_rest_for_later():
    heavy = ("torch", "pandas", "numpy", "matplotlib", "monai", "pydantic")
    code = f"import sys, lesionkd_core; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


def test_every_public_name_is_there():
    for _ in range(2):  # importing a module must not hide a function of its name
        for name in lesionkd_core.__all__:
            assert getattr(lesionkd_core, name) is not None, name
    with pytest.raises(AttributeError, match="no 'predikt'"):
        lesionkd_core.predikt  # noqa: B018


def lock():
    lines = (ROOT / "requirements.lock").read_text().split()
    return dict(line.lower().replace("_", "-").split("==") for line in lines)


def test_the_lock_pins_every_dependency_exactly():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + sum(project["optional-dependencies"].values(), [])
    names = {re.match(r"[A-Za-z0-9_-]+", line)[0].lower().replace("_", "-") for line in wanted}
    assert names <= set(lock())
    assert lock()["torch"] == "2.13.0"
    assert not any(name.startswith("nvidia") for name in lock())


def test_what_is_installed_is_what_the_lock_says():
    for name in ("torch", "monai", "pandas", "papermill", "nbval", "SimpleITK"):
        assert version(name).split("+")[0] == lock()[name.lower()]


def test_conda_installs_the_same_lock():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    [pip] = [d["pip"] for d in environment["dependencies"] if isinstance(d, dict)]
    assert pip[0] == "-r requirements.lock"
    assert any(str(d).startswith("python=3.1") for d in environment["dependencies"])


@pytest.mark.parametrize("name", CATALOGUE)
def test_every_release_of_the_catalogue_has_a_card(name):
    card = (ROOT / "data" / f"{name}.md").read_text()
    assert re.search("https?://", card) and "Licence" in card


def test_no_large_file_and_no_data_set_is_committed():
    done = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    files = [Path(name) for name in done.stdout.split("\0") if name]
    sizes = {f: (ROOT / f).stat().st_size for f in files if (ROOT / f).is_file()}
    assert [f for f, size in sizes.items() if size > 1_000_000] == []
    assert not [f for f in files if f.suffix.lower() in (".jpg", ".nii", ".dcm", ".bmp")]
