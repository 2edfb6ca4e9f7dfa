"""Fetching a release: resumed after a cut, checked against a lock file, unpacked whole or not at all.

`checksums.json` in the data root holds the SHA-256 of every archive unpacked so far; other content is refused from then on.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from ..config import nearest
from ..progress import Tell, live_bar
from ..store import lock, write_json
from . import DatasetNotFound, data_root, find
from .catalogue import CATALOGUE, Release
from .unpack import DamagedArchive, DownloadError, on_disk, size_of, unpack

TRIES, WAIT, TIMEOUT = 5, 1.0, (15, 60)  # attempts in a row that bring nothing new; first pause, and limits to connect and read, in seconds
ARCHIVE = re.compile(r"\.(zip|tar|tgz|gz|bz2|xz|rar|7z)$", re.IGNORECASE)


def download(
    name: str, root: Path | str | None = None, mirror: str = "", archive: Path | str = "",
    tell: Tell = print, agree: Callable[[], bool] = lambda: True,
) -> Path:
    """Fetch and unpack a release of the catalogue unless it is there, and give its folder, as `find` does; started again, it goes on.

    Parameters
    ----------
    name, root : str, path
        The release, and the folder of data sets: LESIONKD_DATA, else data/raw of the checkout by default.
    mirror : str
        Base address that holds files of the official names.
    archive : path
        An archive on this machine, or a folder of them; nothing is fetched then.
    tell, agree : callable
        `tell` takes lines of text, the terms first; `agree` is asked after them, before anything is fetched.

    Raises
    ------
    DownloadError
        Says which address or file, what is wrong and what to do.
    """
    if name not in CATALOGUE:
        raise DownloadError(f"no data set {name!r} in the catalogue: {nearest(name, CATALOGUE)}")
    release, root = CATALOGUE[name], Path(root).expanduser().resolve() if root else data_root()
    if place := found(release, root):
        tell(f"{name} is there already: {place}")
        return place
    target, kept = root / release.folder, root / "downloads" / name
    with on_disk(root, name):
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise DownloadError(f"{target} is there, but lacks some of {', '.join(release.holds)}. Move it away and start again.")
        tell(
            f"{name}: {release.modality}, {release.count or '?'} images\n  licence  {release.licence or 'none is stated; ask the authors'}\n"
            f"  cite     {release.citation or 'see the page'}\n  page     {release.page}\n  access   {release.access}"
        )
        if not archive and not release.archives:
            raise DownloadError(
                f"{name} has no direct download: {release.access}.\nGet it from {release.page};\n"
                f"give a .zip or .tar with --archive (archive=...), unpack a .rar or .7z yourself into {target}."
            )
        if not archive and not agree():
            raise DownloadError(f"{name}: terms not accepted, nothing was fetched.")
        kept.mkdir(parents=True, exist_ok=True)
        with lock(kept, tell):
            if place := found(release, root):  # fetched by the process that was waited for
                return place
            if archive:
                files = {file: _checked(release, file, str(file), root) for file in _local(release, Path(archive).expanduser())}
            else:
                files = dict(_fetch(release, address, mirror, root, tell) for address in release.archives)
            _unpack_all(release, files, root, tell)
    clean = "" if archive else f"; the archives in {kept} can go"
    tell(f"{name}: {len(release.cases(target))} images in {target} (official count: {release.count or 'unknown'}){clean}")
    return target


def found(release: Release, root: Path | None = None) -> Path | None:
    """The folder of a release that is there, else None."""
    if root not in (None, data_root()):
        return root / release.folder if release.fits(root / release.folder) else None
    try:
        return find(release.name)[1]
    except DatasetNotFound:
        return None


def _name(address: str, release: Release) -> str:
    """The file's name in an address, also in .../x.zip?download=1 and .../x.zip/content."""
    parts = [unquote(part) for part in urlsplit(address).path.split("/")]
    return re.sub(r"[^\w.() -]", "_", next((p for p in reversed(parts) if ARCHIVE.search(p)), f"{release.name}-{parts[-1]}"))


def _local(release: Release, given: Path) -> list[Path]:
    """The archive, or those in a folder: of the official names if any has one."""
    inside = sorted(given.iterdir()) if given.is_dir() else []
    official = {_name(address, release) for address in release.archives}
    files = [given] * given.is_file() or [p for p in inside if p.name in official] or [p for p in inside if ARCHIVE.search(p.name)]
    if not files:
        raise DownloadError(f"no archive {given}; --archive (archive=...) takes a file on this machine or a folder of archives.")
    return files


def _fetch(release: Release, address: str, mirror: str, root: Path, tell: Tell) -> tuple[Path, dict[str, Any]]:
    """The archive of an address, and what the lock file is to say of it."""
    import pooch

    pooch.get_logger().setLevel("WARNING")
    name, kept = _name(address, release), root / "downloads" / release.name
    address = f"{mirror.rstrip('/')}/{quote(name)}" if mirror else address
    for left in kept.glob("tmp????????"):  # pooch's own, of a killed process
        left.unlink()

    def resuming(address: str, output: str, _: Any) -> None:
        partial = kept / f"{name}.part"
        _until_whole(release, address, partial, tell)
        partial.replace(output)
        partial.with_suffix(".json").unlink()

    file = Path(pooch.retrieve(address, None, name, kept, downloader=resuming))
    return file, _checked(release, file, address, root)


def _until_whole(release: Release, address: str, partial: Path, tell: Tell) -> None:
    """Ask again after every cut, until several attempts in a row have brought nothing new."""
    import requests
    from urllib3.exceptions import HTTPError as Broken

    failed, reached = 0, 0
    while True:
        try:
            return _attempt(address, partial, tell)
        except (Broken, requests.RequestException) as error:
            answer = getattr(error, "response", None)
            kinds = {
                Broken: "the connection was cut", requests.Timeout: "no answer in time", ValueError: f"{error}",
                requests.HTTPError: f"the server answers {answer.status_code} {answer.reason}" if answer is not None else "",
                requests.exceptions.SSLError: "its TLS certificate is not accepted (behind a proxy, REQUESTS_CA_BUNDLE names the certificates)",
                requests.RequestException: "no connection (behind a proxy, HTTPS_PROXY names it)",
            }
            why = next(said for kind, said in kinds.items() if isinstance(error, kind))
            refused = answer is not None and answer.status_code < 500 and answer.status_code not in (408, 429)
            final = refused or isinstance(error, requests.exceptions.SSLError | ValueError)
        size = partial.stat().st_size if partial.exists() else 0
        failed, reached = (0, size) if size > reached else (failed + 1, reached)
        if final or failed == TRIES:
            raise DownloadError(
                f"{address}: {why}. {size_of(size)} are kept.\nStart again to go on from there, give another address with --mirror (mirror=...),\n"
                f"or fetch the file by hand from {release.page} and give it with --archive (archive=...)."
            )
        tell(f"{partial.stem}: {why} at {size_of(size)}; trying again")
        time.sleep(WAIT * 2**failed)


def _attempt(address: str, partial: Path, tell: Tell) -> None:
    """Append what the server still has to the partial file, or start over where it holds another file now."""
    import requests
    from urllib3.exceptions import IncompleteRead

    state = partial.with_suffix(".json")
    before = _read_json(state) if partial.exists() else {}
    start = partial.stat().st_size if before else 0
    headers: dict[str, Any] = {"Accept-Encoding": "identity", "Range": f"bytes={start}-" if start else None, "If-Range": start and before["mark"] or None}
    with requests.get(address, headers=headers, stream=True, timeout=TIMEOUT) as response:
        span = re.fullmatch(r"bytes (\*|\d+)(?:-\d+)?/(\*|\d+)", response.headers.get("Content-Range", ""))
        total = span[2] if span else response.headers.get("Content-Length", "")
        tag = response.headers.get("ETag", "W/")  # a weak one does not hold for ranges
        mark = response.headers.get("Last-Modified", "") if tag.startswith("W/") else tag
        now: dict[str, Any] = {"mark": mark, "total": int(total) if total.isdigit() else 0}
        if response.status_code == 416 and start == now["total"]:
            return  # whole: killed just before the end, or an earlier answer had announced too much
        other = response.status_code == 206 and any(now[key] and before[key] and now[key] != before[key] for key in now)
        if response.status_code == 416 or other or response.status_code == 206 and (not span or span[1] != str(start)):
            tell(f"{partial.stem}: the server holds another file than before; starting over")
            partial.unlink(missing_ok=True)
            return _attempt(address, partial, tell)
        response.raise_for_status()
        if response.status_code != 206:
            start = 0
            partial.write_bytes(b"")
            write_json(state, now)
        tell(f"{partial.stem}: {f'going on at {size_of(start)}' if start else 'fetching'}")
        live, step = live_bar(), now["total"] / 4 or 1e9
        bar: Any = live(desc=partial.stem, total=now["total"] or None, initial=start, unit="B", unit_scale=True, file=sys.stdout) if live else nullcontext()
        with on_disk(partial.parent, partial.stem, now["total"] - start), open(partial, "ab") as file, bar:
            for chunk in response.raw.stream(1 << 18, decode_content=False):
                file.write(chunk)
                if live:
                    bar.update(len(chunk))
                elif file.tell() // step > (file.tell() - len(chunk)) // step:
                    tell(f"{partial.stem}: {size_of(file.tell())}" + f" of {size_of(now['total'])}" * bool(now["total"]))
    if now["total"] and partial.stat().st_size != now["total"]:
        raise IncompleteRead(partial.stat().st_size, now["total"])


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError:
        raise DownloadError(f"{path} is damaged: restore it, or remove it and start again.") from None


def _aside(file: Path, root: Path, why: str) -> Path:
    """Move an archive of ours out of the way of the next start; the user's own stays."""
    return file.replace(file.with_name(f"{why}-{file.name}")) if file.is_relative_to(root / "downloads") else file


def _checked(release: Release, file: Path, source: str, root: Path) -> dict[str, Any]:
    """The lock file's entry for an archive, which equals the one that stands there, if any."""
    import pooch

    digest, key, lock_file = pooch.file_hash(str(file)), f"{release.name}/{file.name}", root / "checksums.json"
    known = _read_json(lock_file).get(key, {}).get("sha256", digest)
    if known != digest:
        raise DownloadError(
            f"{file.name} from {source} is another file than the one unpacked before:\n  sha256 {digest}\n  wanted {known} ({lock_file.name})\n"
            f"It is kept as {_aside(file, root, 'refused')}. Start again if the transfer may have failed. If the authors have\n"
            f"changed the release and you want the new one, remove '{key}' from {lock_file} first."
        )
    return {"sha256": digest, "size": file.stat().st_size, "address": source}


def _unpack_all(release: Release, files: dict[Path, dict[str, Any]], root: Path, tell: Tell) -> None:
    """Unpack beside the target, where `find` does not look, then move the release into place."""
    target, top = root / release.folder, root / f".{release.name}.unpacking" / release.folder
    shutil.rmtree(top.parent, ignore_errors=True)  # of a killed process
    try:
        for file in files:
            tell(f"{file.name}: unpacking")
            try:
                unpack(file, top, release.holds, target)
            except DamagedArchive as error:
                raise DownloadError(f"{error}. It is kept as {_aside(file, root, 'damaged')}; start again to fetch it anew, or see {release.page}") from None
        folders = [top, *(path for path in top.rglob("*") if path.is_dir())]
        places = [path for path in folders if release.fits(path)] or [path for path in folders if replace(release, named=False).fits(path)]
        if not places or not release.fits(places[0]) and len(places) > 1:
            raise DownloadError(
                f"{', '.join(file.name for file in files)}: no folder, or several, with {', '.join(map(repr, release.holds))} in it. Give the\n"
                f"complete release (--archive takes a folder of archives too), or unpack it by hand into {target}."
            )
        with lock(root / "downloads" / "checksums", tell):
            entries = {f"{release.name}/{file.name}": entry for file, entry in files.items()}
            write_json(root / "checksums.json", _read_json(root / "checksums.json") | entries)
        min(places, key=lambda path: len(path.parts)).replace(target)
    finally:
        shutil.rmtree(top.parent, ignore_errors=True)
