"""Fetching a release with pooch: resumed after an interruption, checked, unpacked completely.

`checksums.json` in the folder of data sets holds the SHA-256 of every archive that was unpacked;
another content is refused from then on.
"""

from __future__ import annotations

import json
import re
import shutil
import stat
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

import pooch
import requests

from ..config import LesionKDError, nearest
from ..results import live_bar, lock, log, write_json
from .layouts import CATALOGUE, DatasetNotFound, Release, data_root, find

TRIES, WAIT = 5, 1.0
"""Attempts in a row that bring nothing new, and the first pause between them, s."""
TIMEOUT = (15, 60)
"""Limits to connect and to read, s."""
ARCHIVE = re.compile(r"\.(zip|tar|tgz|gz|bz2|xz|rar|7z)$", re.IGNORECASE)
OUTSIDE = re.compile(r"(^|[/\\])\.\.([/\\]|$)|^[/\\]|^\w:")
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
            f"{error.filename or root}: {error.strerror or error}. What was fetched is kept.\n"
            "Check permissions and free space, or choose another folder (--to), and start again."
        ) from None
    log.info(f"{name}: {len(release.cases(target))} of {release.count} images in {target}")
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


def _require_space(folder: Path, what: str, needed: int) -> None:
    if needed > (free := shutil.disk_usage(folder).free):
        why = f"{_size(needed)} needed in {folder}, {_size(free)} are free"
        raise DownloadError(f"{what}: {why}. Free some space, or choose another disk (--to).")


def _size(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"


# Fetching -----------------------------------------------------------------------------------------


def _fetch(release: Release, address: str, mirror: str, root: Path) -> Path:
    """Fetch one archive with pooch, which checks it against the lock file."""
    name, kept = _file_name(address, release), root / "downloads" / release.name
    address = f"{mirror.rstrip('/')}/{quote(name)}" if mirror else address
    known = _known(release, root).get(name)

    def resuming(address: str, output: str, _: Any) -> None:
        partial = kept / f"{name}.part"
        _fetch_all(address, partial, release.page)
        partial.replace(output)
        partial.with_suffix(".json").unlink()

    try:
        return Path(pooch.retrieve(address, known, name, kept, downloader=resuming))
    except ValueError:  # of pooch: another checksum
        raise _another_file(release, name, address, root) from None


def _known(release: Release, root: Path) -> dict[str, str]:
    """SHA-256 of the archives of a release that were unpacked before, by name."""
    entries = _read_json(root / "checksums.json")
    names = {key: key.removeprefix(f"{release.name}/") for key in entries}
    return {name: entries[key]["sha256"] for key, name in names.items() if name != key}


def _another_file(release: Release, name: str, source: str, root: Path) -> DownloadError:
    return DownloadError(
        f"{name} from {source} is not the file that was unpacked before (SHA-256 "
        f"{_known(release, root)[name]}). Start again if the transfer may have failed.\nIf the "
        f"authors changed the release and you want the new one, remove '{release.name}/{name}' "
        f"from {root / 'checksums.json'} first."
    )


def _fetch_all(address: str, partial: Path, page: str) -> None:
    """Ask again after every interruption, until several attempts in a row bring nothing new."""
    failed = reached = 0
    while True:
        try:
            return _fetch_rest(address, partial)
        except requests.RequestException as error:
            size = partial.stat().st_size if partial.exists() else 0
            answer: Any = error.response
            status = 500 if answer is None else answer.status_code
            if status == 416:  # nothing is left: it is complete, or the server has another file now
                if answer.headers.get("Content-Range") == f"bytes */{size}":
                    return
                partial.unlink()
            final = isinstance(error, requests.exceptions.SSLError | ValueError)
            final |= status < 500 and status not in (408, 416, 429)
            why = f"{type(error).__name__}: {error}"
        failed, reached = (0, size) if size > reached else (failed + 1, reached)
        if final or failed == TRIES:
            raise DownloadError(
                f"{address}: {why}\n{_size(size)} are kept. Start again to resume, give another "
                f"address with --mirror (mirror=...), or get the file from {page}\nand give it "
                "with --archive (archive=...). A proxy needs HTTPS_PROXY and REQUESTS_CA_BUNDLE."
            )
        log.info(f"{partial.stem}: interrupted at {_size(size)} ({why}); trying again")
        time.sleep(WAIT * 2**failed)


def _fetch_rest(address: str, partial: Path) -> None:
    """Append what the server has beyond the partial file; start over if it is another file."""
    state = partial.with_suffix(".json")
    before = _read_json(state) if partial.exists() else {}
    start = partial.stat().st_size if before else 0
    headers = {"Accept-Encoding": "identity"}
    headers |= {"Range": f"bytes={start}-"} if start else {}
    headers |= {"If-Range": before["mark"]} if start and before["mark"] else {}

    def check(response: requests.Response, *_: Any, **__: Any) -> None:
        if response.status_code not in (200, 206):
            return  # a redirect, or an error that pooch raises
        about = response.headers
        tag = about.get("ETag", "W/")  # a weak one is not valid for ranges
        mark = about.get("Last-Modified", "") if tag.startswith("W/") else tag
        span = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", about.get("Content-Range", ""))
        now = {"mark": mark, "total": span[2] if span else about.get("Content-Length", "0")}
        response.raw.headers.pop("Content-Encoding", None)  # keep the bytes as they are sent
        if response.status_code == 200:
            file.truncate(0)
            write_json(state, now)
        elif (
            not span
            or int(span[1]) != start
            or any(now[key] != before[key] for key in now if now[key] and before[key])
        ):
            file.truncate(0)
            raise requests.RequestException("the server has another file now; starting over")
        _require_space(partial.parent, partial.stem, int(now["total"]) - start)
        log.info(
            f"{partial.stem}: {_size(int(now['total']))}" + f", from {_size(start)}" * bool(start)
        )

    bar = live_bar()
    how = {"unit": "B", "unit_scale": True, "desc": partial.stem, "file": sys.stdout}
    fetch = pooch.HTTPDownloader(
        bar(**how) if bar else False,
        chunk_size=1 << 18,
        headers=headers,
        timeout=TIMEOUT,
        hooks={"response": check},
    )
    with open(partial, "ab") as file:
        fetch(address, file, None)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.exists() else {}
        return content
    except ValueError:
        why = "restore it, or remove it and start again"
        raise DownloadError(f"{path} is damaged: {why}.") from None


# Unpacking ----------------------------------------------------------------------------------------


def _unpack(release: Release, files: list[Path], root: Path) -> None:
    """Unpack into a hidden folder, then move the release to its place."""
    target, top = root / release.folder, root / f".{release.name}.unpacking" / release.folder
    shutil.rmtree(top.parent, ignore_errors=True)  # of a killed process
    sums = {file.name: pooch.file_hash(str(file)) for file in files}
    known = _known(release, root)
    for file in files:
        if known.get(file.name, sums[file.name]) != sums[file.name]:
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
            entries = _read_json(root / "checksums.json")
            new = {f"{release.name}/{name}": {"sha256": value} for name, value in sums.items()}
            write_json(root / "checksums.json", entries | new)
        min(places or likely, key=lambda path: len(path.parts)).replace(target)
    finally:
        shutil.rmtree(top.parent, ignore_errors=True)


def _extract(file: Path, into: Path, release: Release, target: Path) -> None:
    """Check all members of a zip or tar archive, then unpack it with pooch."""
    into.mkdir(parents=True, exist_ok=True)
    try:
        is_tar = tarfile.is_tarfile(file)
        members = _members(file, is_tar)
        for name, _, problem in members:
            if problem := problem or "is outside of the folder" * bool(OUTSIDE.search(name)):
                raise DownloadError(
                    f"{file}: member {name!r} {problem}. Nothing was unpacked; if you trust the "
                    f"archive, unpack it by hand into {target}."
                )
        tops = {name.removeprefix("./").partition("/")[0] for name, *_ in members}
        if file.stem in release.holds and file.stem not in tops:  # loose files of images.zip
            into = into / file.stem
        _require_space(target.parent, file.name, sum(size for _, size, _ in members))
        unpack = pooch.Untar if is_tar else pooch.Unzip
        unpack(extract_dir=str(into))(str(file), "download", None)
    except LesionKDError:
        raise
    except Exception as error:  # damaged bytes make zipfile and tarfile raise almost anything
        if getattr(error, "errno", None):
            raise  # of the disk
        with open(file, "rb") as opened:
            head = opened.read(64).lstrip()
        why = f"is damaged, or neither zip nor tar ({error or type(error).__name__}); start again"
        if head.startswith((b"Rar!", b"7z\xbc\xaf")) or isinstance(error, NotImplementedError):
            why = f"is an archive that is not read here; unpack it by hand into {target} (7-Zip)"
        elif "downloads" in file.parts:  # ours: the next start fetches it again
            file = file.replace(file.with_name(f"damaged-{file.name}"))
        if head.startswith(b"<"):
            why = f"is a web page, perhaps a login; see {release.page}"
        raise DownloadError(f"{file} {why}.") from None
    for path in [*into.rglob("__MACOSX"), *into.rglob("._*")]:  # of macOS, not of the release
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _members(file: Path, is_tar: bool) -> list[tuple[str, int, str]]:
    """Name, bytes and problem of every file in an archive."""
    odd = "is a link or a device"
    if is_tar:
        with tarfile.open(file) as tar:
            found = [(m.name, m.size, odd * (not m.isfile())) for m in tar if not m.isdir()]
            while tar.fileobj and tar.fileobj.read(1 << 20):  # to the checksum of a .gz
                pass
            return found
    with zipfile.ZipFile(file) as archive:
        found = []
        for member in archive.infolist():
            usual = stat.S_IFMT(member.external_attr >> 16) in (0, stat.S_IFREG, stat.S_IFDIR)
            problem = "is encrypted" * (member.flag_bits & 1) if usual else odd
            found.append((member.filename, member.file_size, problem))
        return found
