"""What in the folder of results is not needed any more, for the command `lesionkd clean`."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from .config import ConfigError, LesionKDError
from .results import (
    STAGES,
    changed_files,
    is_done,
    locate,
    runs_root,
    short,
    size_of,
    version_of,
)
from .sweep import named_results

RECENT = 3600
"""Files outside of a locked folder that were written in the last hour may be in use, seconds."""


@dataclass(frozen=True)
class Leftover:
    """A folder, or files of one kind, and why nobody needs them."""

    what: str
    why: str
    paths: Sequence[Path]

    @property
    def size(self) -> int:
        """Bytes on the disk."""
        return sum(map(size_of, self.paths))


def leftovers() -> list[Leftover]:
    """Everything that can be removed without losing a finished result of this version.

    Folders on which a process works are left out.
    """
    root = runs_root()
    folders = [
        path
        for stage in STAGES
        for path in sorted((root / stage).glob("*"))
        if path.is_dir() and not _in_use(path)
    ]
    found = [Leftover(short(path), why, [path]) for path in folders if (why := _why(path))]
    listed = {one.paths[0] for one in found}
    notebooks = [path for path in (root / "notebooks").glob("*.ipynb") if _is_old(path)]
    partial = [path for path in root.rglob(".*.partial") if _is_old(path)]
    kinds = {
        "executed notebooks": (
            "failed, or their results are gone",
            [path for path in notebooks if named_results(path) is None],
        ),
        "partial files": (
            "of a process that was killed",
            [path for path in partial if listed.isdisjoint(path.parents)],
        ),
        "lock files": (
            "no process holds them",
            [path for path in root.glob("*/*.lock") if not _in_use(path.with_suffix(""))],
        ),
    }
    for name, (why, paths) in kinds.items():
        if paths:
            found.append(Leftover(f"{len(paths)} {name}", why, paths))
    return found


def named(runs: Sequence[str]) -> list[Leftover]:
    """The results that a person named.

    Raises
    ------
    LesionKDError
        A path is not a result in the folder of results, or a process works on it.
    """
    found = []
    for run in runs:
        path = locate(run)
        if path.parent.parent != runs_root() or path.parent.name not in STAGES:
            raise ConfigError(
                f"{path} is not a result in {runs_root()}/<stage>/; remove it by hand"
            )
        if _in_use(path):
            raise LesionKDError(f"a process works on {short(path)}; stop it first")
        found.append(Leftover(short(path), _why(path) or "named", [path]))
    return found


def remove(one: Leftover) -> bool:
    """Remove it, unless it is needed by now; whether it is gone."""
    try:
        for path in one.paths:
            if path.is_dir():
                if not _remove_folder(path, one.why):
                    return False
            elif path.suffix != ".lock" or not _in_use(path.with_suffix("")):
                path.unlink(missing_ok=True)
    except OSError as error:
        raise LesionKDError(
            f"cannot remove {error.filename or one.what}: {error.strerror}; check the permissions"
        ) from None
    return True


def _remove_folder(path: Path, why: str) -> bool:
    with _claimed(path) as free:
        if not free or why not in ("named", _why(path)):
            return False
        (path / "DONE").unlink(missing_ok=True)  # first: what an interruption leaves is unfinished
        shutil.rmtree(path)
        path.with_name(f"{path.name}.lock").unlink(missing_ok=True)
    return True


def _why(path: Path) -> str:
    """Why a result is not needed; '' for a finished, intact one of this version."""
    if not is_done(path):
        return "unfinished; the same options resume it"
    try:
        version, current = version_of(path)
        damaged = changed_files(path)
    except (LesionKDError, ValueError, OSError):
        return "damaged"
    if damaged:
        return f"damaged: {', '.join(damaged)}"
    if version != current:
        return f"of version {version} of results; only its name finds it"
    return ""


def _is_old(path: Path) -> bool:
    return time.time() - path.stat().st_mtime > RECENT


def _in_use(path: Path) -> bool:
    """Whether a process holds the lock of a folder."""
    if not path.with_name(f"{path.name}.lock").exists():
        return False
    with _claimed(path) as free:
        return not free


@contextmanager
def _claimed(path: Path) -> Iterator[bool]:
    """Take the lock of a folder if it is free, and say whether it was."""
    from filelock import FileLock, Timeout

    guard = FileLock(path.with_name(f"{path.name}.lock"), timeout=0)
    try:
        guard.acquire()
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        guard.release()
