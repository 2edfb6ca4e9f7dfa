"""Downloading a release with pooch: checked against a checksum, unpacked completely or not at all.

`checksums.json` in the folder of data sets holds the SHA-256 of every archive that was unpacked;
another content is refused from then on.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import cast
from urllib.parse import quote, unquote, urlsplit

import pooch
import requests

from ..config import LesionKDError, nearest
from ..results import live_bar, lock, log, write_json
from .layouts import CATALOGUE, DatasetNotFound, Release, data_root, find

TIMEOUT = (15, 60)
"""Limits to connect and to read, s."""
ARCHIVE = re.compile(r"\.(zip|tar|tgz|gz|bz2|xz|rar|7z)$", re.IGNORECASE)
pooch.get_logger().setLevel("WARNING")


class DownloadError(LesionKDError):
    """A release cannot be fetched, checked or unpacked."""


def download(
    name: str,
    root: Path | str | None = None,
    mirror: str = "",
    archive: Path | str = "",
    agree: Callable[[], bool] = lambda: True,
) -> Path:
    """Fetch and unpack a release unless it is there; return its folder.

    Parameters
    ----------
    name : str
        In the catalogue.
    root : path, optional
        Folder of data sets; otherwise LESIONKD_DATA, or data/raw of the checkout.
    mirror : str
        Address of a folder that holds files of the official names.
    archive : path
        An archive on this machine, or a folder of them; nothing is fetched then.
    agree : function
        Called after the terms are shown, before anything is fetched.

    Raises
    ------
    DownloadError
        Says which address or file, what is wrong and what to do.
    """
    if name not in CATALOGUE:
        raise DownloadError(f"no data set {name!r} in the catalogue: {nearest(name, CATALOGUE)}")
    release, root = CATALOGUE[name], Path(root).expanduser().resolve() if root else data_root()
    if place := found(release, root):
        log.info(f"{name} is there already: {place}")
        return place
    target, kept = root / release.folder, root / "downloads" / name
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        missing = f"lacks some of {', '.join(release.holds)}"
        raise DownloadError(f"{target} exists, but {missing}. Move it away and start again.")
    log.info(
        f"{name}: {release.modality}, {release.count} images\n"
        f"  licence  {release.licence or 'none is stated; ask the authors'}\n"
        f"  cite     {release.citation}\n"
        f"  page     {release.page}\n"
        f"  access   {release.access}"
    )
    if not archive and not release.archives:
        raise DownloadError(
            f"{name} has no direct download: {release.access}.\nGet it from {release.page}; give a "
            f".zip or .tar with --archive (archive=...), unpack a .rar or .7z into {target}."
        )
    if not archive and not agree():
        raise DownloadError(f"{name}: terms not accepted, nothing was fetched.")
    try:
        kept.mkdir(parents=True, exist_ok=True)
        with lock(kept):
            if place := found(release, root):  # another process has fetched it
                return place
            if archive:
                files = _local(release, Path(archive).expanduser())
            else:
                files = [_fetch(release, address, mirror, root) for address in release.archives]
            _unpack(release, files, root)
    except OSError as error:
        raise DownloadError(
            f"{error.filename or root}: {error.strerror or error}. Complete archives are kept.\n"
            "Check permissions and free space, or choose another folder (--to), and start again."
        ) from None
    log.info(f"{name}: {len(release.listing(target).cases)} of {release.count} images in {target}")
    return target


def found(release: Release, root: Path | None = None) -> Path | None:
    """The folder of a release if it is there."""
    if root and root != data_root():
        return root / release.folder if release.fits(root / release.folder) else None
    try:
        return find(release.name)[1]
    except DatasetNotFound:
        return None


def _file_name(address: str, release: Release) -> str:
    """Name of the file at an address, such as .../x.zip?download=1 or .../x.zip/content."""
    parts = [unquote(part) for part in urlsplit(address).path.split("/")]
    named = [part for part in reversed(parts) if ARCHIVE.search(part)]
    return re.sub(r"[^\w.() -]", "_", named[0] if named else f"{release.name}-{parts[-1]}")


def _local(release: Release, given: Path) -> list[Path]:
    """The archive, or those of a folder: of official names if there are any."""
    inside = sorted(given.iterdir()) if given.is_dir() else []
    official = {_file_name(address, release) for address in release.archives}
    files = [given] if given.is_file() else [path for path in inside if path.name in official]
    files = files or [path for path in inside if ARCHIVE.search(path.name)]
    if not files:
        raise DownloadError(f"no archive {given}: give an archive, or a folder of archives.")
    return files


# Fetching -----------------------------------------------------------------------------------------


def _fetch(release: Release, address: str, mirror: str, root: Path) -> Path:
    """Download one archive unless it is there and as it was."""
    name, kept = _file_name(address, release), root / "downloads" / release.name
    if mirror:
        address = f"{mirror.rstrip('/')}/{quote(name)}"
    for unfinished in kept.glob("tmp*"):  # pooch's, of a killed process
        unfinished.unlink()

    live = live_bar()
    bar = live and live(unit="B", unit_scale=True, desc=name, file=sys.stdout)
    fetch = pooch.HTTPDownloader(bar, chunk_size=1 << 18, timeout=TIMEOUT)
    log.info(f"fetching {address}")
    try:
        known = _known(release, name, root)
        return Path(pooch.retrieve(address, known, name, kept, downloader=fetch))
    except requests.RequestException as error:
        raise DownloadError(
            f"{address}: {type(error).__name__}: {error}\nStart again, or give another address "
            f"with --mirror (mirror=...). Or get the file from {release.page}\n(curl -L -C - -O "
            "ADDRESS resumes after an interruption) and give it with --archive (archive=...).\n"
            "A proxy needs HTTPS_PROXY and REQUESTS_CA_BUNDLE."
        ) from None
    except ValueError:  # of pooch: another checksum
        raise _another_file(release, name, address, root) from None


def _known(release: Release, name: str, root: Path) -> str | None:
    """SHA-256 of an archive of this name that was unpacked before."""
    entry = _read_checksums(root).get(f"{release.name}/{name}")
    return entry["sha256"] if entry else None


def _read_checksums(root: Path) -> dict[str, dict[str, str]]:
    path = root / "checksums.json"
    if not path.exists():
        return {}
    try:
        return cast("dict[str, dict[str, str]]", json.loads(path.read_text("utf-8")))
    except ValueError:
        raise DownloadError(
            f"{path} is damaged: restore it, or remove it and start again."
        ) from None


def _another_file(release: Release, name: str, source: str, root: Path) -> DownloadError:
    return DownloadError(
        f"{name} from {source} is not the file that was unpacked before (SHA-256 "
        f"{_known(release, name, root)}). Start again if the transfer may have failed.\nIf the "
        f"authors changed the release and you want the new one, remove '{release.name}/{name}' "
        f"from {root / 'checksums.json'} first."
    )


# Unpacking ----------------------------------------------------------------------------------------


def _unpack(release: Release, files: list[Path], root: Path) -> None:
    """Unpack into a hidden folder, then move the release to its place."""
    target, top = root / release.folder, root / f".{release.name}.unpacking" / release.folder
    shutil.rmtree(top.parent, ignore_errors=True)  # of a killed process
    sums = {file.name: pooch.file_hash(str(file)) for file in files}
    for file in files:
        if _known(release, file.name, root) not in (None, sums[file.name]):
            raise _another_file(release, file.name, str(file), root)
    try:
        for file in files:
            log.info(f"{file.name}: unpacking")
            _extract(file, top, release, target)
        folders = [top, *(path for path in top.rglob("*") if path.is_dir())]
        places = [path for path in folders if release.fits(path)]
        likely = [path for path in folders if replace(release, named=False).fits(path)]
        if not places and len(likely) != 1:
            raise DownloadError(
                f"{', '.join(sums)}: {len(likely)} folders in it hold {', '.join(release.holds)}. "
                "Give the complete release (--archive takes a folder of archives too), or unpack "
                f"it by hand into {target}."
            )
        with lock(root / "downloads" / "checksums"):
            entries = _read_checksums(root)
            for name, value in sums.items():
                entries[f"{release.name}/{name}"] = {"sha256": value}
            write_json(root / "checksums.json", entries)
        min(places or likely, key=lambda path: len(path.parts)).replace(target)
    finally:
        shutil.rmtree(top.parent, ignore_errors=True)


def _extract(file: Path, into: Path, release: Release, target: Path) -> None:
    """Unpack a zip or tar archive; nothing in it can be written elsewhere."""

    def place(names: list[str]) -> Path:
        tops = {name.removeprefix("./").partition("/")[0] for name in names}
        loose = file.stem in release.holds and file.stem not in tops  # files of images.zip
        return into / file.stem if loose else into

    into.mkdir(parents=True, exist_ok=True)
    try:
        if tarfile.is_tarfile(file):
            if not hasattr(tarfile, "data_filter"):
                raise DownloadError(f"{file} needs Python 3.11.4; unpack it by hand into {target}.")
            with tarfile.open(file) as tar:
                into = place(tar.getnames())
                tar.extractall(into, filter="data")  # no device, no link to the outside
                while tar.fileobj and tar.fileobj.read(1 << 20):
                    pass  # to the checksum at the end of a .gz
        else:
            with zipfile.ZipFile(file) as packed:
                into = place(packed.namelist())
                packed.extractall(into)  # drops '..' and a leading '/'
    except DownloadError:
        raise
    except Exception as error:  # damaged bytes make zipfile and tarfile raise almost anything
        if getattr(error, "errno", None):
            raise  # of the disk
        raise _unreadable(file, error, release, target) from None
    shutil.rmtree(into / "__MACOSX", ignore_errors=True)


def _unreadable(file: Path, error: Exception, release: Release, target: Path) -> DownloadError:
    """The error about an archive; one that was downloaded is moved away, to be fetched again."""
    with open(file, "rb") as opened:
        head = opened.read(64).lstrip()
    if file.is_relative_to(target.parent / "downloads"):
        file = file.replace(file.with_name(f"damaged-{file.name}"))
    if head.startswith(b"<"):
        return DownloadError(f"{file} is a web page, perhaps a login; see {release.page}.")
    return DownloadError(
        f"{file} cannot be unpacked ({type(error).__name__}: {error}). If it may be damaged, "
        "start again. If it is complete (a .rar, a .7z, one with a password), unpack it by hand "
        f"into {target}."
    )
