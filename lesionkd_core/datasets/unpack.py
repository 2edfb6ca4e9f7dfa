"""Unpacking an archive from elsewhere: looked through before anything is written, nothing outside of the folder."""

from __future__ import annotations

import errno
import re
import shutil
import stat
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..config import LesionKDError

OpenMember = Callable[[Any], Any]
OUTSIDE = re.compile(r"(^|[/\\])\.\.([/\\]|$)|^[/\\]|^\w:")


class DownloadError(LesionKDError):
    """A release cannot be fetched, checked or unpacked."""


class DamagedArchive(DownloadError):
    """An archive cannot be read to its end."""


@contextmanager
def on_disk(place: Path, what: str, needed: int = 0) -> Iterator[None]:
    """Say in plain words what the disk refuses; at once if more bytes are needed than are free."""
    try:
        free = shutil.disk_usage(next(path for path in (place, *place.parents) if path.exists())).free
        if needed > free:
            raise OSError(errno.ENOSPC, "no space left")
        yield
    except OSError as error:
        if error.errno is None:  # gzip's, of damaged bytes
            raise
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise DownloadError(f"{error.filename or place}: {error.strerror}. Check its permissions, or choose another folder (--to).") from None
        raise DownloadError(
            f"{what}: {error.strerror} in {place}; {size_of(needed) if needed else 'more'} needed, {size_of(free)} were free.\n"
            "Make room, or choose another disk (--to, or LESIONKD_DATA), and start again: what was fetched is kept."
        ) from None


def size_of(count: float) -> str:
    """A number of bytes to read."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"


def unpack(file: Path, into: Path, folders: tuple[str, ...], by_hand: Path) -> None:
    """Unpack a zip or tar file into a folder; links, devices and what macOS adds for itself are no part of a release.

    Parameters
    ----------
    file, into : Path
        The archive, and the folder that is made and filled.
    folders : names
        Loose files in an archive called like one of them, such as `images.zip`, are unpacked into it.
    by_hand : Path
        Where the user may unpack what is refused here.

    Raises
    ------
    DamagedArchive, DownloadError
        The bytes cannot be read; a member is refused, or the disk is too small. `into` may then hold some files.
    """
    into.mkdir(parents=True, exist_ok=True)
    try:
        with _opened(file) as (members, open_member):
            for name, _, odd, _ in members:
                if odd := odd or "would be written outside of the folder" * bool(OUTSIDE.search(name)):
                    raise DownloadError(f"{file}: member {name!r} {odd}. Nothing was unpacked; if you trust it, unpack it by hand into {by_hand}.")
            if file.stem in folders and not any(re.match(rf"(\./)?{re.escape(file.stem)}[/\\]", name) for name, *_ in members):
                into = into / file.stem
            with on_disk(into, file.name, sum(size for _, size, *_ in members)):
                for name, _, _, member in members:
                    _write(into / name.replace("\\", "/"), open_member, member)
    except LesionKDError:
        raise
    except Exception as error:  # damaged bytes raise nearly anything in the readers of zip and tar
        with open(file, "rb") as opened:
            head = opened.read(64).lstrip()
        if head.startswith((b"Rar!", b"7z\xbc\xaf")) or isinstance(error, NotImplementedError):
            raise DownloadError(f"{file}: this kind of archive is not read here. Unpack it by hand into {by_hand} (7-Zip reads it).") from None
        why = "is a web page, perhaps a login" if head.startswith(b"<") else f"is damaged, or neither zip nor tar ({error or type(error).__name__})"
        raise DamagedArchive(f"{file.name} {why}") from None


def _write(path: Path, open_member: OpenMember, member: Any) -> None:
    if "__MACOSX" not in path.parts and not path.name.startswith("._"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open_member(member) as source, open(path, "wb") as unpacked:
            shutil.copyfileobj(source, unpacked)


@contextmanager
def _opened(file: Path) -> Iterator[tuple[list[tuple[str, int, str, Any]], OpenMember]]:
    """Files in an archive as (name, bytes, why refused, member), and how one is opened."""
    if tarfile.is_tarfile(file):
        with tarfile.open(file) as tar:
            members = [(m.name, m.size, "is a link or a device" * (not m.isfile()), m) for m in tar if not m.isdir()]
            while tar.fileobj.read(1 << 20):  # to the checksum at the end of a .gz
                pass
            yield members, tar.extractfile
    else:
        with zipfile.ZipFile(file) as packed:
            yield [(m.filename, m.file_size, _refused(m), m) for m in packed.infolist() if not m.filename.endswith(("/", "\\"))], packed.open


def _refused(member: zipfile.ZipInfo) -> str:
    if stat.S_IFMT(member.external_attr >> 16) not in (0, stat.S_IFREG):
        return "is a link or a device"
    return "is encrypted" * (member.flag_bits & 1)
