"""The house of DESIGN.md: rooms import only rooms above them, files stay small, environments agree, imports are quick."""

import ast
import re
import subprocess
import sys
import tokenize
import tomllib
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT

CORE = ROOT / "lesionkd_core"
ROOMS = [
    "config", "progress", "integrity", "provenance", "store", "ranks", "datasets", "edges", "prepare", "augment", "batches", "layers", "networks",
    "losses", "inference", "evaluation", "statistics", "original", "external", "training", "stages", "study", "runs", "sweeps", "leak", "views",
    "export", "figures", "words", "tables", "__main__",
]
"""From the top of the house to its ground floor."""


def room_of(path: Path) -> str:
    return path.relative_to(CORE).parts[0].removesuffix(".py")


def imports_of(path: Path) -> set[str]:
    """Rooms that a module imports, at its top or in a function."""
    found, depth = set(), len(path.relative_to(CORE).parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == depth:
            found |= {node.module.split(".")[0]} if node.module else {alias.name for alias in node.names}
    return found


def modules() -> list[Path]:
    return sorted(p for p in CORE.rglob("*.py") if p != CORE / "__init__.py")


@pytest.mark.parametrize("path", modules(), ids=lambda p: p.relative_to(CORE).as_posix())
def test_a_room_imports_only_rooms_above_it(path):
    room = room_of(path)
    below = {name for name in imports_of(path) if name in ROOMS and ROOMS.index(name) > ROOMS.index(room)}
    assert not below


def test_every_module_lies_in_a_known_room():
    assert {room_of(path) for path in modules()} == set(ROOMS)


def code_lines(path: Path) -> int:
    """Lines with code: docstrings, comments and blanks not counted."""
    kept = set()
    tree = ast.parse(path.read_text())
    docstrings = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            docstrings |= set(range(node.lineno, node.end_lineno + 1))
    with open(path, "rb") as file:
        for token in tokenize.tokenize(file.readline):
            if token.type not in (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING, tokenize.ENDMARKER):
                kept |= set(range(token.start[0], token.end[0] + 1))
    return len(kept - docstrings)


def test_the_core_stays_thin():
    """What computes the method stays far under 4,000 lines; what is around it has budgets of its own."""
    around = {"datasets": "data", **dict.fromkeys(("statistics", "views", "figures", "words", "tables", "study", "leak"), "study"),
              **dict.fromkeys(("ranks", "runs", "sweeps", "__main__"), "machines"), "export": "phones"}
    spent = dict.fromkeys(("method", "data", "study", "machines", "phones"), 0)
    for path in CORE.rglob("*.py"):
        spent[around.get(room_of(path), "method")] += code_lines(path)
    assert all(spent[part] < limit for part, limit in {"method": 3000, "data": 1600, "study": 1600, "machines": 900, "phones": 700}.items()), spent


def test_files_and_functions_stay_short():
    for path in CORE.rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 300, path
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                length = body[-1].end_lineno - body[0].lineno + 1 if body else 0
                assert length <= 45, (path, node.name)


def calls_in(path: Path) -> list[tuple[str, set[str], dict]]:
    """(name as written, names of its keywords, constant keywords) of every call in a module."""
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    return [
        (ast.unparse(call.func), {k.arg for k in call.keywords}, {k.arg: k.value.value for k in call.keywords if isinstance(k.value, ast.Constant)})
        for call in calls
    ]


@pytest.mark.parametrize("path", modules(), ids=lambda p: p.relative_to(CORE).as_posix())
def test_no_file_can_bring_code_along(path):
    """Nothing is unpickled, evaluated or run through a shell; archives are unpacked by datasets.unpack alone, which looks at every path."""
    assert not re.search(r"^\s*(import|from) (pickle|cloudpickle|joblib|marshal|shelve)\b", path.read_text(), re.M)
    for name, _, constants in calls_in(path):
        assert name not in ("eval", "exec", "pickle.loads", "os.system") and not constants.get("allow_pickle") and not constants.get("shell"), name
        assert name != "torch.load" or constants.get("weights_only") is True
        assert not name.endswith((".extractall", "unpack_archive")), name


def test_importing_the_package_leaves_the_heavy_rest_for_later():
    code = "import sys, lesionkd_core; print([m for m in ('torch', 'pandas', 'numpy', 'matplotlib', 'monai', 'pydantic') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


def test_every_public_name_is_there():
    import lesionkd_core

    for _ in range(2):  # importing a room must not hide a function of its name
        for name in set(lesionkd_core.__all__) - {"figures", "tables", "CATALOGUE"}:
            assert callable(getattr(lesionkd_core, name)), name
    with pytest.raises(AttributeError, match="no 'predikt'"):
        lesionkd_core.predikt  # noqa: B018


def lock() -> dict[str, str]:
    lines = (ROOT / "requirements.lock").read_text().split()
    return dict(line.lower().replace("_", "-").split("==") for line in lines)


def test_the_lock_pins_every_dependency_exactly():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + project["optional-dependencies"]["dev"] + project["optional-dependencies"]["mobile"]
    names = {re.match(r"[A-Za-z0-9-]+", line)[0].lower() for line in wanted}
    assert names <= set(lock())
    assert lock()["torch"] == "2.13.0"
    assert not any(name.startswith("nvidia") for name in lock())


def test_the_conda_door_opens_on_the_same_lock():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    [pip] = [d["pip"] for d in environment["dependencies"] if isinstance(d, dict)]
    assert pip == ["-r requirements.lock", "-e ."]
    [python] = [d for d in environment["dependencies"] if str(d).startswith("python=")]
    required = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    assert tuple(map(int, python.split("=")[1].split("."))) >= tuple(map(int, required.removeprefix(">=").split(".")))
    assert "pip" in environment["dependencies"]


def test_what_is_installed_is_what_the_lock_says():
    from importlib.metadata import version

    for name in ("torch", "monai", "pandas", "papermill", "nbval"):
        assert version(name).split("+")[0] == lock()[name]


@pytest.mark.parametrize("name", ["busi", "isic2018", "cvc-clinicdb", "kvasir-seg"])
def test_every_release_of_the_catalogue_has_a_card(name):
    from lesionkd_core.datasets import CATALOGUE

    card = (ROOT / "data" / f"{name}.md").read_text()
    assert all(folder in card for folder in CATALOGUE[name].holds)
    assert "https://" in card and "Licence" in card
