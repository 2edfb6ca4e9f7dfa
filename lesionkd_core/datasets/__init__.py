"""Finding a data set and reading its cases: releases of the catalogue, the user's own, the phantom."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from ..config import LesionKDError, PrepareConfig, nearest
from ..provenance import CHECKOUT
from . import manifest, paired, phantom
from .catalogue import CATALOGUE, Release
from .files import IMAGE_SUFFIXES, Case, Reading, UnreadableFile, is_volume, read_case, read_image, read_mask
from .manifest import ManifestError

__all__ = [
    "CATALOGUE", "Case", "DatasetNotFound", "ManifestError", "Reading", "Release", "UnreadableFile", "data_root", "find", "fingerprint", "read", "read_case",
    "read_image", "read_mask",
]


class DatasetNotFound(LesionKDError):
    """A data set is unknown, or its release is not where it should be."""


def data_root() -> Path:
    """The folder of raw releases: LESIONKD_DATA, else data/raw of the checkout."""
    return Path(os.environ.get("LESIONKD_DATA") or CHECKOUT / "data" / "raw").expanduser().resolve()


def find(dataset: str) -> tuple[Release, Path]:
    """The release called `dataset` and its folder; a folder with images/ and masks/ and a CSV manifest are one too.

    Raises
    ------
    DatasetNotFound
        Unknown name, or no such folder: says what was looked for, where, and where it comes from.
    """
    if not (release := CATALOGUE.get(dataset)):
        return _own(dataset)
    root = data_root()
    for folders in _levels(root):
        for folder in sorted(folders, key=lambda path: (path.name != release.folder, path)):
            if release.fits(folder):
                return release, folder
    raise DatasetNotFound(
        f"{dataset}: no folder {release.folder!r} with {', '.join(map(repr, release.holds))} in it under {root}.\n"
        f"Fetch it with python -m lesionkd_core download {dataset}, or download it from the page in data/{dataset}.md ({release.access}), unpack it there,\n"
        "or set LESIONKD_DATA to the folder that holds it."
    )


def _levels(root: Path) -> Iterator[list[Path]]:
    """The folder, those in it, those in them: four deep, as FUSeg lies in its repository."""
    level = [root]
    for _ in range(5):
        yield level
        level = [path for folder in level for path in _inside(folder) if os.path.isdir(path) and not path.name.startswith(".")]


def _inside(folder: Path) -> list[Path]:
    """What a folder holds, by name; nothing where it may not be read."""
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def _own(dataset: str) -> tuple[Release, Path]:
    own = Release(dataset, "own data", dataset, ("images", "masks"), paired.cases, access="your own")
    places = [Path(os.path.expanduser(dataset)), data_root() / dataset]
    for path in places:
        if path.suffix.lower() in (".csv", ".tsv") and os.path.isfile(path):
            return replace(own, cases=manifest.cases), path.resolve()
        if all(os.path.isdir(path / name) for name in own.holds):
            return own, path.resolve()
    for path in places:
        if os.path.isdir(path):
            raise DatasetNotFound(f"{path} holds no folders 'images' and 'masks'; your own data goes there as images/a.jpg with masks/a.png (data/own.md).")
    names = (*CATALOGUE, *phantom.LOOKS)
    raise DatasetNotFound(
        f"dataset {dataset!r} is neither in the catalogue nor a folder nor a CSV manifest; {nearest(dataset, names)}\n"
        f"A relative path is looked for in the working folder and in {data_root()}."
    )


def fingerprint(cfg: PrepareConfig) -> tuple[str, list[Case]]:
    """What the release holds, as a digest, and its cases (none for the phantom, which is drawn).

    Masks count with their content, since annotations get corrected, and so do the images of own data;
    images of an official release, which may be many gigabytes, with name and size.
    """
    if cfg.dataset in phantom.LOOKS:
        return f"{cfg.dataset} version {phantom.VERSION}", []
    release, folder = find(cfg.dataset)
    try:
        cases = release.cases(folder)
    except OSError as error:
        raise DatasetNotFound(f"{cfg.dataset}: {error.filename or folder} cannot be read ({error.strerror}).") from None
    if not cases:
        kinds = ", ".join(sorted(IMAGE_SUFFIXES))
        raise DatasetNotFound(f"{cfg.dataset}: no images in {folder}; {release.holds[0]!r} is empty, or holds nothing that is read ({kinds}, NIfTI, DICOM).")
    official = release.name in CATALOGUE
    digest = hashlib.sha256(release.name.encode() if official else b"own")
    for case in cases:
        sizes = [path.stat().st_size for path in _files(case.image)]
        digest.update(f"{case.id}|{case.group}|{case.label}|{case.split}|{case.problem}|{case.image.name}|{sizes}".encode(errors="surrogateescape"))
        for named in case.masks if official else (case.image, *case.masks):
            digest.update(os.fsencode(named.name))
            for path in _files(named):
                digest.update(_content(path))
    return digest.hexdigest(), cases


def _files(path: Path) -> list[Path]:
    """The file itself, or those of a DICOM series' folder; none where it is missing."""
    return [file for file in (_inside(path) if os.path.isdir(path) else [path]) if os.path.isfile(file)]


def _content(path: Path) -> bytes:
    stat = path.stat()
    return _hash_file(path, stat.st_size, stat.st_mtime_ns) if os.access(path, os.R_OK) else b""  # reading the case will say so


@lru_cache(maxsize=1_000_000)  # every stage asks again
def _hash_file(path: Path, size: int, changed: int) -> bytes:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def read(case: Case, window: str = "") -> Iterator[Reading]:
    """The image of a case with its mask, or every slice of its volume, one after the other.

    Raises
    ------
    UnreadableFile
        With the file's name and what is wrong with it.
    """
    if not case.problem and is_volume(case.image):
        from .volumes import read_slices

        yield from read_slices(case, window)
    else:
        yield read_case(case)
