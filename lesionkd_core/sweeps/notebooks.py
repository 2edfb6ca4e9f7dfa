"""One run of a notebook through papermill: parameters checked before, the executed notebook kept after."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import sys
from pathlib import Path
from typing import Any

from ..config import ConfigError, LesionKDError, StageConfig, nearest
from ..provenance import CHECKOUT
from ..store import is_done, make_folder, runs_root


def find_notebook(name: str) -> Path:
    """The notebook called `name`, with or without its suffix."""
    notebooks = {p.stem: p for p in (CHECKOUT / "notebooks").glob("[0-9]*.ipynb")}
    stem = Path(name).stem
    if stem not in notebooks:
        raise ConfigError(f"no notebook {name!r}: {nearest(stem, notebooks)}")
    return notebooks[stem]


def configuration(notebook: Path) -> type[StageConfig]:
    """The configuration class that a notebook checks its parameters with."""
    from .. import config

    name, *_ = re.findall(r"lkd\.(\w+Config)\.from_notebook", notebook.read_text(encoding="utf-8"))
    stage: type[StageConfig] = getattr(config, name)
    return stage


def literal(value: str) -> Any:
    """papermill's reading of a value on the command line: 1, 0.5, True, None or text."""
    from papermill.cli import _resolve_type

    return _resolve_type(value)


def run_notebook(name: str, given: dict[str, str]) -> int:
    """Execute a notebook with parameters as a command line gives them; the exit code."""
    notebook = find_notebook(name)
    parameters = {n: literal(v) for n, v in given.items()}
    configuration(notebook)(**parameters)  # refuses what is wrong before anything starts
    mark = hashlib.sha256(repr(sorted(parameters.items())).encode()).hexdigest()[:8]
    target = kept_notebook(notebook.stem, mark)
    place, error = execute(notebook, parameters, target, log_output=True, stdout_file=sys.stdout)
    if error:
        print(f"{error}\nThe executed notebook with the error is {target}", file=sys.stderr)
        return 1
    print(f"executed notebook: {target}" + (f"\nresults: {place}" if place else ""))
    return 0


def kept_notebook(stem: str, mark: str) -> Path:
    """Where an executed notebook is kept."""
    return runs_root() / "notebooks" / f"{stem}-{mark}.ipynb"


def execute(notebook: Path, parameters: dict[str, Any], target: Path, **options: Any) -> tuple[Path | None, str]:
    """Execute a notebook into `target`, with its error if it fails, and copy it beside its results.

    Returns
    -------
    (Path or None, str)
        The folder that its last cell names, and the error, empty where all went well.
    """
    import papermill as pm

    make_folder(target.parent)
    logging.getLogger("papermill").setLevel(logging.ERROR)  # it calls every parameter unknown that the first cell does not list
    options["extra_arguments"] = ["--log-level=CRITICAL"]  # a kernel warns of loopback listeners, and of being shut down
    try:
        pm.execute_notebook(str(notebook), str(target), parameters, kernel_name="python3", progress_bar=False, **options)
    except pm.PapermillExecutionError as error:
        return None, f"{error.ename}: {error.evalue}"
    except RuntimeError as error:  # DeadKernelError and a kernel that does not start
        return None, f"{type(error).__name__}: {error}"
    place = named_results(target)
    if place:
        (place / "notebook.ipynb").write_bytes(target.read_bytes())
    return place, ""


def named_results(executed: Path) -> Path | None:
    """The folder that an executed notebook prints before DONE; None where it is absent, unfinished or failed."""
    try:
        cells = json.loads(executed.read_bytes())["cells"]
    except (OSError, ValueError):
        return None
    for output in cells[-1].get("outputs", []):
        lines = "".join(output.get("text", "")).split()
        if "DONE" in lines:
            return runs_root() / lines[0].removeprefix("runs/")
    return None


def finished_results(executed: Path) -> Path | None:
    """`named_results` where they are still there and complete."""
    place = named_results(executed)
    return place if place and place.is_dir() and (is_done(place) or is_done(place.parent)) else None


def package(name: str) -> Any:
    """A package of the extra `cluster`, or the sentence that says how to get it."""
    from importlib import import_module

    try:
        return import_module(name)
    except ModuleNotFoundError:
        raise LesionKDError(f"this wants the package {name!r}, which is not installed: pip install 'lesionkd_core[cluster]'") from None
