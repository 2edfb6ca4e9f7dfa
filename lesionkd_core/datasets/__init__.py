"""The catalogue: every data set by name, where its release comes from and how its folder is read."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from ..config import LesionKDError, PrepareConfig, nearest
from ..store import CHECKOUT
from . import busi, cvc_clinicdb, isic2018, paired, phantom
from .files import Case, UnreadableFile, read_case, read_image, read_mask

__all__ = ["CATALOGUE", "Case", "DatasetNotFound", "Release", "UnreadableFile", "data_root", "find", "fingerprint", "read_case", "read_image", "read_mask"]


class DatasetNotFound(LesionKDError):
    """A data set is unknown, or its release is not where it should be."""


@dataclass(frozen=True)
class Release:
    """One entry of the catalogue.

    `folder` is looked for under LESIONKD_DATA, itself or one level down; `holds` are the folders in
    it; `get` says how to come by the release; `cases` reads the folder.
    """

    name: str
    modality: str
    folder: str
    holds: tuple[str, ...]
    get: str
    cases: Callable[[Path], list[Case]]


CATALOGUE = {
    release.name: release
    for release in (
        Release("busi", "breast ultrasound", "Dataset_BUSI_with_GT", busi.CLASSES, "free, no registration", busi.cases),
        Release("isic2018", "dermoscopy", "isic2018", (isic2018.IMAGES, isic2018.MASKS), "free, no registration", isic2018.cases),
        Release("cvc-clinicdb", "colonoscopy", "cvc-clinicdb", ("Original", "Ground Truth"), "free for research and education", cvc_clinicdb.cases),
        Release("kvasir-seg", "colonoscopy", "Kvasir-SEG", ("images", "masks"), "free for research and education", paired.cases),
    )
}


def data_root() -> Path:
    """The folder of raw releases: LESIONKD_DATA, else data/raw of the checkout."""
    return Path(os.environ.get("LESIONKD_DATA") or CHECKOUT / "data" / "raw").expanduser().resolve()


def find(dataset: str) -> tuple[Release, Path]:
    """The release called `dataset` and its folder; any folder with images/ and masks/ is one too.

    Raises
    ------
    DatasetNotFound
        Unknown name, or no such folder: says what was looked for, where, and where it comes from.
    """
    if release := CATALOGUE.get(dataset):
        root = data_root()
        for place in (root / release.folder, root, *(sorted(root.iterdir()) if root.is_dir() else ())):
            for path in (place, place / release.folder):
                if all((path / name).is_dir() for name in release.holds) and (release.cases is not paired.cases or path.name == release.folder):
                    return release, path
        raise DatasetNotFound(
            f"{dataset}: no folder {release.folder!r} with {', '.join(map(repr, release.holds))} in it under {root}.\n"
            f"Download it from the page in data/{dataset}.md ({release.get}), unpack it there,\n"
            "or set LESIONKD_DATA to the folder that holds it."
        )
    return _own_folder(dataset)


def _own_folder(dataset: str) -> tuple[Release, Path]:
    own = Release(dataset, "own data", dataset, ("images", "masks"), "your own", paired.cases)
    places = [Path(dataset).expanduser(), data_root() / dataset]
    for path in places:
        if all((path / name).is_dir() for name in own.holds):
            return own, path.resolve()
    for path in places:
        if path.is_dir():
            raise DatasetNotFound(f"{path} holds no folders 'images' and 'masks'; your own data goes there as images/a.jpg with masks/a.png (data/own.md).")
    names = (*CATALOGUE, *phantom.LOOKS)
    raise DatasetNotFound(
        f"dataset {dataset!r} is neither in the catalogue nor a folder; {nearest(dataset, names)}\n"
        f"A relative folder is looked for in the working folder and in {data_root()}."
    )


def fingerprint(cfg: PrepareConfig) -> tuple[str, list[Case]]:
    """What the release holds, as a digest, and its cases (none for the phantom, which is drawn).

    Masks count with their content, since annotations get corrected, and so do the images of own data;
    images of an official release, which may be many gigabytes, with name and size.
    """
    if cfg.dataset in phantom.LOOKS:
        return f"{cfg.dataset} version {phantom.VERSION}", []
    release, folder = find(cfg.dataset)
    cases = release.cases(folder)
    if not cases:
        raise DatasetNotFound(f"{cfg.dataset}: no images in {folder}; {release.holds[0]!r} is empty.")
    official = release.name in CATALOGUE
    digest = hashlib.sha256(release.name.encode() if official else b"own")
    for case in cases:
        size = case.image.stat().st_size if case.image.is_file() else 0
        digest.update(f"{case.id}|{case.group}|{case.label}|{case.image.name}|{size}".encode())
        for path in case.masks if official else (case.image, *case.masks):
            digest.update(path.name.encode() + _content(path))
    return digest.hexdigest(), cases


def _content(path: Path) -> bytes:
    if not path.is_file():
        return hashlib.sha256().digest()
    stat = path.stat()
    return _hash_file(path, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=1_000_000)  # every stage asks again
def _hash_file(path: Path, size: int, changed: int) -> bytes:
    return hashlib.sha256(path.read_bytes()).digest()
