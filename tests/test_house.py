"""The package as a whole: quick imports, public names, the lock, no code in files, data cards."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import distribution
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

import lesionkd_core
from lesionkd_core.data.layouts import CATALOGUE
from tests.conftest import ROOT
from tests.test_cli import command
from tests.tiny import picture, save

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


def named(requirement):
    """Lower-case name of a requirement, with hyphens."""
    return re.match(r"[\w.-]+", requirement)[0].lower().replace("_", "-")


def locked(name):
    """Name and version of every package of a lock file, without those that it includes."""
    lines = (ROOT / name).read_text().split("\n")
    pins = [line.split("==") for line in lines if line and not line.startswith("-r ")]
    return {named(package): version for package, version in pins}


def needed(requirements):
    """Names of packages and of all that they require here."""
    found, rest = set(), list(requirements)
    while rest:
        requirement = Requirement(rest.pop())
        key = (named(requirement.name), frozenset(requirement.extras))
        if key not in found:
            found.add(key)
            for line in distribution(requirement.name).requires or []:
                marker = Requirement(line).marker
                extras = ["", *requirement.extras]
                if not marker or any(marker.evaluate({"extra": extra}) for extra in extras):
                    rest.append(line)
    return {name for name, _ in found}


def test_make_run_installs_what_the_project_needs_and_nothing_of_the_extras():
    """requirements.lock is for `make run`; requirements-test.lock adds all extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wanted = project["project"]["dependencies"] + project["build-system"]["requires"]
    extras = sum(project["project"]["optional-dependencies"].values(), [])
    core, rest = locked("requirements.lock"), locked("requirements-test.lock")
    main, all_of_it = needed(wanted), needed(wanted + extras)
    assert main <= set(core) and all_of_it <= {*core, *rest}
    assert not set(core) & (all_of_it - main) and not set(core) & set(rest)
    assert core["torch"] == "2.13.0" and not any(name.startswith("nvidia") for name in core)
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert environment["dependencies"][-1]["pip"][0] == "-r requirements.lock"


EXTRAS = "SimpleITK distributed dask onnx onnxruntime onnxscript executorch coremltools ziglang"


@pytest.mark.parametrize(
    ("words", "extra"),
    [
        (["predict", "breast", "volumes", "--out", "out"], "volumes"),
        (["predict", "student.onnx", "pictures", "--out", "out"], "mobile"),
        (["export", "-p", "run", "breast", "-p", "formats", "onnx"], "mobile"),
        (["sweep", "sweep.yaml"], "cluster"),
    ],
    ids=str,
)
def test_what_needs_an_extra_that_is_not_installed_names_it(
    words, extra, tmp_path, runs, monkeypatch
):
    for package in EXTRAS.split():
        monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, "lesionkd_core.data.volumes", raising=False)
    monkeypatch.delattr("lesionkd_core.data.volumes", raising=False)
    for file in ("volumes/a.nii.gz", "pictures/a.png", "student.onnx"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_bytes(b"")
    (tmp_path / "sweep.yaml").write_text("include: [{}]")
    monkeypatch.chdir(tmp_path)
    code, _, errors = command(*words)
    assert code == 1 and len(errors.splitlines()) == 1, errors
    assert f"pip install -e '.[{extra}]'" in errors


def test_without_any_extra_data_are_prepared_and_pictures_segmented(tmp_path):
    save(tmp_path / "pictures" / "a.png", picture(0))
    code = f"""import sys
sys.modules |= dict.fromkeys({EXTRAS.split()})
from lesionkd_core.cli import main
main(["prepare", "-p", "cases", "20", "-p", "pixels", "32"], standalone_mode=False)
main(["predict", "breast", "pictures", "--out", "out"])"""
    environment = os.environ | {"LESIONKD_RUNS": str(tmp_path / "runs"), "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True)
    assert (tmp_path / "out" / "a.png").exists()


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
