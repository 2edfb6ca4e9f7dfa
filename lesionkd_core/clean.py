"""What in the folder of results is not needed any more, for the command `lesionkd clean`."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from . import results
from .config import ConfigError, LesionKDError
from .sweep import named_results

RECENT = 3600
"""A file that was written in the last hour may be in use, seconds."""


@dataclass(frozen=True)
class Leftover:
    """A folder or a file, and why nobody needs it."""

    path: Path
    why: str


def leftovers() -> list[Leftover]:
    """Everything that can be removed without losing a finished result of this version.

    What a process works on is left out.
    """
    root = results.runs_root()
    folders, files = [], [*root.rglob(".*.partial"), *root.glob("notebooks/*.ipynb")]
    for stage in results.STAGES:
        folders += [path for path in root.glob(f"{stage}/*") if path.is_dir() and _is_free(path)]
        files += root.glob(f"{stage}/*.lock")
    found = [Leftover(path, why) for path in folders if (why := _why_folder(path))]
    gone = {one.path for one in found}
    found += [
        Leftover(path, why)
        for path in files
        if gone.isdisjoint(path.parents) and (why := _why_file(path))
    ]
    return sorted(found, key=lambda one: one.path)


def named(runs: Sequence[str]) -> list[Leftover]:
    """The results that a person named.

    Raises
    ------
    LesionKDError
        A path is not a result in the folder of results, or a process works on it.
    """
    root, found = results.runs_root(), []
    for run in runs:
        path = results.locate(run)
        if path.parent.parent != root or path.parent.name not in results.STAGES:
            raise ConfigError(f"{path} is not a result in {root}/<stage>/; remove it by hand")
        if not _is_free(path):
            raise LesionKDError(f"a process works on {results.short(path)}; stop it first")
        found.append(Leftover(path, "named"))
    return found


def remove(one: Leftover) -> bool:
    """Remove it, unless a process needs it by now; whether it is gone."""
    try:
        if not one.path.is_dir():
            one.path.unlink(missing_ok=True)
            return True
        with _claimed(one.path) as free:
            if not free or one.why not in ("named", _why_folder(one.path)):
                return False
            (one.path / "DONE").unlink(missing_ok=True)  # first: the rest is then unfinished
            shutil.rmtree(one.path)
            _lock_of(one.path).unlink(missing_ok=True)
            return True
    except OSError as error:
        raise LesionKDError(
            f"cannot remove {error.filename or one.path}: {error.strerror}; check the permissions"
        ) from None


def _why_folder(path: Path) -> str:
    """Why a result is not needed; '' of a finished, intact one of this version."""
    if not results.is_done(path):
        return "unfinished; the same options resume it"
    try:
        version, current = results.version_of(path)
        changed = results.changed_files(path)
    except (LesionKDError, ValueError, OSError):
        return "damaged"
    if changed:
        return f"damaged: {', '.join(changed)}"
    return "" if version == current else f"of version {version} of results; only its name finds it"


def _why_file(path: Path) -> str:
    """Why a lock, a partial file or an executed notebook is not needed; '' if it is."""
    if path.suffix == ".lock":
        return "" if path.with_suffix("").exists() else "lock of a result that is gone"
    if time.time() - path.stat().st_mtime < RECENT:
        return ""
    if path.suffix == ".partial":
        return "of a process that was killed"
    return "" if named_results(path) else "failed, or its results are gone"


def _lock_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.lock")


def _is_free(path: Path) -> bool:
    """Whether no process holds the lock of a folder."""
    if not _lock_of(path).exists():
        return True
    with _claimed(path) as free:
        return free


@contextmanager
def _claimed(path: Path) -> Iterator[bool]:
    """Take the lock of a folder if it is free, and say whether it was."""
    from filelock import FileLock, Timeout

    guard = FileLock(_lock_of(path), timeout=0)
    try:
        guard.acquire()
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        guard.release()
