"""Checksums of finished results: a damaged or edited file is found before it is used."""

from __future__ import annotations

import hashlib
import json
import zipfile
from pathlib import Path

from .config import LesionKDError

CHANGING = ("DONE", "notebook.ipynb", "figures", "parts")
"""What may change in a finished folder: drawn or run again, or on its way out."""
_seen: dict[Path, tuple[str, int, int]] = {}  # files held against their checksum in this process, as they were then


class DamagedResult(LesionKDError):
    """A file of a finished result is not as it was written."""


def checksums(path: Path) -> dict[str, str]:
    """SHA-256 of every file of a folder that must not change any more, by its name in it: what `DONE` holds."""
    names = sorted(p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file() and not p.name.startswith("."))
    return {name: _checksum(path / name) for name in names if name.partition("/")[0] not in CHANGING}


def _checksum(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checked(path: Path) -> Path:
    """A file that is about to be read; of a finished result, held against its checksum first, once a process.

    Raises
    ------
    DamagedResult
        Its bytes changed, or it is gone. Results finished before checksums were kept pass.
    """
    done = path.parent / "DONE"
    if not done.is_file() or not done.stat().st_size:
        return path
    try:
        wanted = json.loads(done.read_text(encoding="utf-8")).get(path.name)
        if wanted is None:
            return path
        state = (wanted, path.stat().st_size, path.stat().st_mtime_ns)
        if _seen.get(path) != state and _checksum(path) != wanted:
            raise ValueError
    except (ValueError, OSError):
        raise DamagedResult(
            f"{path} is not as it was written: damaged, edited or gone (its checksum in DONE differs). "
            f"Remove the folder {path.parent} and run again, or bring the file back."
        ) from None
    _seen[path] = state
    return path


def is_whole(path: Path) -> bool:
    """False where an archive's own checksums say that bytes changed (torch does not look at them); what is no archive passes."""
    if not zipfile.is_zipfile(path):
        return path.stat().st_size > 0
    with zipfile.ZipFile(path) as archive:
        return archive.testzip() is None
