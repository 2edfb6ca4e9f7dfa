"""What in the folder of results is not needed any more, for the command `lesionkd clean`."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from . import results
from .config import ConfigError, LesionKDError

NAMED = "named"


def leftovers() -> dict[Path, str]:
    """Folders that are no finished result of this version, and why.

    What a process works on is left out.
    """
    found = {}
    for stage in results.STAGES:
        for path in sorted((results.runs_root() / stage).glob("*/")):
            why = _why(path)
            if why and _is_free(path):
                found[path] = why
    return found


def named(runs: Sequence[str]) -> dict[Path, str]:
    """The results that a person named.

    Raises
    ------
    LesionKDError
        A path is not a result in the folder of results, or a process works on it.
    """
    root, found = results.runs_root(), {}
    for run in runs:
        path = results.locate(run)
        if path.parent.parent != root or path.parent.name not in results.STAGES:
            raise ConfigError(f"{path} is not a result in {root}/<stage>/; remove it by hand")
        if not _is_free(path):
            raise LesionKDError(f"a process works on {results.short(path)}; stop it first")
        found[path] = NAMED
    return found


def remove(path: Path, why: str) -> bool:
    """Remove a folder, unless a process needs it by now; whether it is gone."""
    try:
        with results.lock(path, wait=False) as free:
            if not free or why not in (NAMED, _why(path)):
                return False
            (path / "DONE").unlink(missing_ok=True)  # first: the rest is then unfinished
            shutil.rmtree(path)
        _lock_of(path).unlink(missing_ok=True)
    except OSError as error:
        raise LesionKDError(f"cannot remove {error.filename}: {error.strerror}") from None
    return True


def _why(path: Path) -> str:
    """Why a result is not needed; '' of a finished, intact one of this version."""
    if not results.is_done(path):
        return "unfinished; the same options resume or repeat it"
    try:
        version, current = results.version_of(path)
        changed = results.changed_files(path)
    except (LesionKDError, ValueError, OSError):
        return "damaged"
    if changed:
        return f"damaged: {', '.join(changed)}"
    return "" if version == current else f"of version {version} of results; only its name finds it"


def _lock_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.lock")


def _is_free(path: Path) -> bool:
    """Whether no process holds the lock of a folder."""
    if not _lock_of(path).exists():
        return True
    with results.lock(path, wait=False) as free:
        return free
