"""Fetching releases from a local server: interrupted, changed, hostile and damaged archives."""

import hashlib
import importlib
import io
import json
import os
import signal
import stat
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from lesionkd_core.config import LesionKDError
from lesionkd_core.data.layouts import CATALOGUE, DatasetNotFound, find

from .conftest import ROOT

fetching = importlib.import_module("lesionkd_core.data.download")
download, DownloadError = fetching.download, fetching.DownloadError
NOISE = np.random.default_rng(0).bytes(1_500_000)  # compression does not shorten it
FILES = {
    "Kvasir-SEG/images/a.jpg": NOISE,
    "Kvasir-SEG/masks/a.jpg": b"a mask",
    "Kvasir-SEG/readme.txt": b"kept",
}


class Server:
    """Serves `files`; attributes say what it does wrong, `ranges` what it was asked for."""

    def __init__(self):
        self.files, self.ranges, self.headers, self.sent = {}, [], [], 0
        self.cut = []  # bytes after which the first, second, ... answer ends
        self.statuses = []  # answered instead of the file, first to last
        self.knows_ranges, self.checks_if_range, self.begins = True, True, None
        self.length_off, self.no_length, self.pause = 0, False, 0.0
        self.mark = lambda content: {"ETag": f'"{hashlib.md5(content).hexdigest()}"'}

    def answer(self, request):
        content = self.files.get(request.path.split("?")[0].lstrip("/"))
        span = request.headers.get("Range", "")
        self.ranges.append(int(span[6:-1]) if span else 0)
        self.headers.append(dict(request.headers))
        status = self.statuses.pop(0) if self.statuses else 404 if content is None else 200
        if status != 200:
            return request.send_error(status)
        marks = self.mark(content)
        wanted = request.headers.get("If-Range", "")
        same = not self.checks_if_range or wanted in ("", *marks.values())
        start = self.ranges[-1] if self.knows_ranges and same else 0
        if start >= len(content) > 0 and start:
            request.send_response(416)
            request.send_header("Content-Range", f"bytes */{len(content)}")
            request.send_header("Content-Length", "0")
            return request.end_headers()
        request.send_response(206 if start else 200)
        if start:
            start = start if self.begins is None else self.begins
            spans = f"bytes {start}-{len(content) - 1}/{len(content)}"
            request.send_header("Content-Range", spans)
        for name, value in marks.items():
            request.send_header(name, value)
        if not self.no_length:
            request.send_header("Content-Length", str(len(content) - start + self.length_off))
        request.end_headers()
        body = content[start:][: self.cut.pop(0) if self.cut else None]
        for at in range(0, len(body), 100_000):
            request.wfile.write(body[at : at + 100_000])
            self.sent += len(body[at : at + 100_000])
            time.sleep(self.pause)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setattr(fetching, "WAIT", 0.0)
    served = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            served.answer(self)
            self.close_connection = True

        def log_message(self, *_):
            pass

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    running.daemon_threads = True
    served.address = f"http://127.0.0.1:{running.server_port}"
    threading.Thread(target=running.serve_forever, args=(0.02,), daemon=True).start()
    yield served
    running.shutdown()
    running.server_close()


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("LESIONKD_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


@pytest.fixture
def kvasir(server, root, monkeypatch):
    """Where the archive is kept; the local server has a small one."""
    server.files["kvasir-seg.zip"] = zipped(FILES)
    release = replace(CATALOGUE["kvasir-seg"], archives=(f"{server.address}/kvasir-seg.zip",))
    monkeypatch.setitem(CATALOGUE, "kvasir-seg", release)
    return root / "downloads" / "kvasir-seg" / "kvasir-seg.zip"


@contextmanager
def full_disk(free):
    """No file grows beyond `free` bytes."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (free, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def zipped(files):
    with io.BytesIO() as memory:
        with zipfile.ZipFile(memory, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in files.items():
                archive.writestr(name, content)
        return memory.getvalue()


def tarred(files, mode="w:gz"):
    """Contents are bytes, or a TarInfo that is written as it is."""
    with io.BytesIO() as memory:
        with tarfile.open(fileobj=memory, mode=mode) as archive:
            for name, content in files.items():
                info = tarfile.TarInfo(name) if isinstance(content, bytes) else content
                info.size = len(content) if isinstance(content, bytes) else 0
                archive.addfile(info, io.BytesIO(content) if info.size else None)
        return memory.getvalue()


def refused(*words, name="kvasir-seg", **options):
    """The error of a download has all these words, and no release is there after it."""
    with pytest.raises(LesionKDError) as caught:
        download(name, **options)
    assert not [word for word in words if word not in str(caught.value)], str(caught.value)
    with pytest.raises(DatasetNotFound):
        find(name)
    return str(caught.value)


def test_a_release_is_fetched_unpacked_and_found(server, kvasir, root, messages):
    folder = download("kvasir-seg")
    assert folder == root / "Kvasir-SEG" == find("kvasir-seg")[1]
    assert {name: (root / name).read_bytes() for name in FILES} == FILES
    digest = hashlib.sha256(kvasir.read_bytes()).hexdigest()
    entries = json.loads((root / "checksums.json").read_text())
    assert entries == {"kvasir-seg/kvasir-seg.zip": {"sha256": digest}}
    assert not list(root.glob(".*unpacking*"))
    assert [path.name for path in kvasir.parent.iterdir()] == ["kvasir-seg.zip"]
    assert "1 of 1000 images" in messages()[-1]
    assert download("kvasir-seg") == folder
    assert "there already" in messages()[-1] and len(server.ranges) == 1


def test_terms_are_shown_before_anything_is_fetched(server, kvasir, root, messages):
    def agree():
        release, text = CATALOGUE["kvasir-seg"], "\n".join(messages())
        assert all(term in text for term in (release.licence, release.citation, release.page))
        assert not server.ranges and not root.exists()
        return False

    with pytest.raises(DownloadError, match="terms not accepted, nothing was fetched"):
        download("kvasir-seg", agree=agree)
    assert not server.ranges and not root.exists()


def test_the_archives_of_isic_are_unpacked_below_one_folder(server, root, monkeypatch):
    release = CATALOGUE["isic2018"]
    names = [address.rsplit("/", 1)[1] for address in release.archives]
    for name in names:
        inside = name.removesuffix(".zip")
        file = "ISIC_1_segmentation.png" if "GroundTruth" in name else "ISIC_1.jpg"
        junk = {f"__MACOSX/{inside}/._{file}": b"fork", f"{inside}/._{file}": b"fork"}
        server.files[name] = zipped({f"{inside}/{file}": b"pixels"} | junk)
    addresses = tuple(f"{server.address}/{name}?download=1" for name in names)
    monkeypatch.setitem(CATALOGUE, "isic2018", replace(release, archives=addresses))
    assert download("isic2018") == root / "isic2018" == find("isic2018")[1]
    folders = sorted(path.name for path in (root / "isic2018").iterdir())
    assert folders == sorted(name.removesuffix(".zip") for name in names)
    assert not list(root.rglob("._*"))


SHAPES = {  # how people pack a release
    "its folder on top": FILES,
    "no folder on top": {name.split("/", 1)[1]: content for name, content in FILES.items()},
    "another name on top": {name.replace("Kvasir-SEG", "v2"): FILES[name] for name in FILES},
    "deep in a repository": {f"repo-main/data/{name}": FILES[name] for name in FILES}
    | {"repo-main/images/x.png": b"", "repo-main/README": b""},
    "with ./ before": {f"./{name}": content for name, content in FILES.items()},
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("pack", [zipped, tarred], ids=["zip", "tar.gz"])
def test_a_release_is_found_however_it_is_packed(tmp_path, root, shape, pack):
    (tmp_path / "any.name").write_bytes(pack(SHAPES[shape]))
    assert download("kvasir-seg", archive=tmp_path / "any.name") == root / "Kvasir-SEG"
    assert (find("kvasir-seg")[1] / "images/a.jpg").read_bytes() == NOISE


def test_loose_files_go_to_the_folder_that_their_archive_is_named_after(tmp_path, root):
    for folder in CATALOGUE["covid19-20cases"].holds:
        content = zipped({"coronacases_001.nii.gz": folder.encode()})
        (tmp_path / f"{folder}.zip").write_bytes(content)
    download("covid19-20cases", archive=tmp_path)
    for folder in CATALOGUE["covid19-20cases"].holds:
        file = root / "covid19-20cases" / folder / "coronacases_001.nii.gz"
        assert file.read_text() == folder


# The connection -----------------------------------------------------------------------------------


def test_an_interrupted_transfer_resumes_where_it_stopped(server, kvasir):
    server.cut = [700_000]
    download("kvasir-seg")
    whole = server.files["kvasir-seg.zip"]
    assert kvasir.read_bytes() == whole
    first, second = server.ranges
    assert first == 0 and 400_000 < second <= 700_000
    assert server.sent == 700_000 + len(whole) - second
    assert server.headers[1]["If-Range"] == server.mark(whole)["ETag"]


def test_interruptions_that_bring_something_never_end_it(server, kvasir):
    server.cut = [300_000] * 5
    download("kvasir-seg")
    assert kvasir.read_bytes() == server.files["kvasir-seg.zip"]
    assert len(server.ranges) == 6 and server.ranges == sorted(set(server.ranges))


@pytest.mark.fault
def test_a_dead_server_is_named_and_the_next_start_resumes(server, kvasir):
    server.cut = [700_000] + [0] * 20
    message = refused(f"{server.address}/kvasir-seg.zip", "Start again", "kept")
    assert len(server.ranges) == 1 + fetching.TRIES
    partial = kvasir.with_name("kvasir-seg.zip.part").stat().st_size
    assert f"{partial / 1e6:.2f} MB" in message
    server.cut, server.ranges, server.sent = [], [], 0
    download("kvasir-seg")
    whole = server.files["kvasir-seg.zip"]
    assert server.ranges == [partial] and server.sent == len(whole) - partial
    assert kvasir.read_bytes() == whole


@pytest.mark.fault
@pytest.mark.parametrize("fault", [{"knows_ranges": False}, {"begins": 500_000}], ids=str)
def test_a_server_without_ranges_or_with_another_range_starts_over(server, kvasir, fault):
    vars(server).update(fault, cut=[700_000])
    download("kvasir-seg")
    assert kvasir.read_bytes() == server.files["kvasir-seg.zip"]


def test_the_bytes_are_kept_as_they_are_sent(server, kvasir):
    server.files["kvasir-seg.zip"] = tarred(FILES)
    server.mark = lambda _: {"Content-Encoding": "gzip"}  # some servers say so of every .tar.gz
    download("kvasir-seg")
    assert kvasir.read_bytes() == server.files["kvasir-seg.zip"]
    assert server.headers[0]["Accept-Encoding"] == "identity"


@pytest.mark.fault
@pytest.mark.parametrize("checks", [True, False], ids=["If-Range obeyed", "If-Range ignored"])
@pytest.mark.parametrize("mark", ["ETag", "Last-Modified", "weak", "none"])
def test_two_versions_of_a_file_are_not_mixed(server, kvasir, checks, mark):
    old = server.files["kvasir-seg.zip"]
    reversed_files = {name: content[::-1] for name, content in FILES.items()}
    new = zipped(reversed_files | {"Kvasir-SEG/more": b"longer"})
    days = {old: "Mon, 01 Jan 2024 00:00:00 GMT", new: "Tue, 02 Jan 2024 00:00:00 GMT"}
    server.mark = {
        "ETag": server.mark,
        "Last-Modified": lambda content: {"Last-Modified": days[content]},
        "weak": lambda content: {"ETag": f'W/"{len(content)}"'},
        "none": lambda content: {},
    }[mark]
    server.checks_if_range, server.cut = checks, [700_000] + [0] * 20
    refused("kept")
    server.files["kvasir-seg.zip"], server.cut = new, []
    download("kvasir-seg")
    assert kvasir.read_bytes() == new


@pytest.mark.fault
@pytest.mark.parametrize("fault", [{"length_off": -1000}, {"no_length": True, "cut": [700_000]}])
def test_a_file_that_ends_too_early_is_damaged_and_fetched_again(server, kvasir, root, fault):
    vars(server).update(fault)
    refused("is damaged", "damaged-kvasir-seg.zip", "start again")
    assert not (root / "checksums.json").exists()
    vars(server).update(length_off=0, no_length=False)
    download("kvasir-seg")


@pytest.mark.fault
@pytest.mark.parametrize("status", [401, 403, 404, 410])
def test_a_refusal_is_final_and_names_address_and_status(server, kvasir, status):
    server.statuses = [status] * 9
    page = CATALOGUE["kvasir-seg"].page
    refused(f"{server.address}/kvasir-seg.zip", f"{status}", page, "--mirror", "--archive")
    assert len(server.ranges) == 1


@pytest.mark.fault
def test_a_busy_server_is_asked_again(server, kvasir):
    server.statuses = [503, 429, 500]
    download("kvasir-seg")
    assert len(server.ranges) == 4


@pytest.mark.fault
@pytest.mark.parametrize(
    ("address", "word"),
    [
        ("http://127.0.0.1:9", "ConnectionError"),
        ("no-address", "no-address"),
        ("ftp://x/y", "ftp"),
        ("http://", "http"),
    ],
)
def test_a_wrong_address_is_one_message(kvasir, address, word):
    refused(word, "--mirror", mirror=address)


@pytest.mark.fault
def test_a_certificate_that_fails_is_named_at_once(server, kvasir):
    address = server.address.replace("http:", "https:")
    refused("SSLError", "REQUESTS_CA_BUNDLE", mirror=address)


@pytest.mark.fault
def test_a_silent_server_is_not_waited_for_without_end(server, kvasir, monkeypatch):
    monkeypatch.setattr(fetching, "TIMEOUT", (1, 0.05))
    monkeypatch.setattr(fetching, "TRIES", 2)
    monkeypatch.setattr(Server, "answer", lambda *_: time.sleep(0.5))
    refused("Timeout", server.address)


def test_a_mirror_has_files_of_the_same_names(server, kvasir, monkeypatch):
    gone = ("http://gone.invalid/v1/kvasir-seg.zip/content",)
    monkeypatch.setitem(CATALOGUE, "kvasir-seg", replace(CATALOGUE["kvasir-seg"], archives=gone))
    server.files = {"near/kvasir-seg.zip": server.files["kvasir-seg.zip"]}
    assert download("kvasir-seg", mirror=f"{server.address}/near/").name == "Kvasir-SEG"


# The lock file ------------------------------------------------------------------------------------


@pytest.mark.fault
def test_another_archive_than_the_first_is_refused_until_its_entry_is_removed(server, kvasir, root):
    release = download("kvasir-seg")
    old = hashlib.sha256(kvasir.read_bytes()).hexdigest()
    release.rename(root.parent / "elsewhere")
    kvasir.unlink()
    server.files["kvasir-seg.zip"] = zipped(FILES | {"Kvasir-SEG/images/b.jpg": b"new"})
    for _ in range(2):
        refused(old, "checksums.json", "remove 'kvasir-seg/kvasir-seg.zip'")
    (root / "checksums.json").unlink()
    download("kvasir-seg")


@pytest.mark.fault
def test_a_local_archive_is_checked_too_and_stays_where_it_is(server, kvasir, tmp_path):
    download("kvasir-seg").rename(tmp_path / "elsewhere")
    other = zipped({"Kvasir-SEG/images/x": b"", "Kvasir-SEG/masks/x": b""})
    (tmp_path / "kvasir-seg.zip").write_bytes(other)
    refused("SHA-256", archive=tmp_path / "kvasir-seg.zip")
    assert (tmp_path / "kvasir-seg.zip").read_bytes() == other


@pytest.mark.fault
def test_an_archive_that_changed_on_the_disk_is_fetched_again(server, kvasir, tmp_path):
    download("kvasir-seg").rename(tmp_path / "elsewhere")
    kvasir.write_bytes(b"rotten" + kvasir.read_bytes()[6:])
    download("kvasir-seg")
    assert kvasir.read_bytes() == server.files["kvasir-seg.zip"]


@pytest.mark.fault
def test_a_damaged_lock_file_is_named_and_not_overwritten(kvasir, root):
    root.mkdir()
    (root / "checksums.json").write_text("{half")
    refused("checksums.json is damaged")
    assert (root / "checksums.json").read_text() == "{half"


# The disk -----------------------------------------------------------------------------------------


def free_space(monkeypatch, count):
    usage = namedtuple("Usage", "total used free")(count, 0, count)
    monkeypatch.setattr(fetching.shutil, "disk_usage", lambda _: usage)


@pytest.mark.fault
def test_a_disk_that_fills_up_keeps_what_was_fetched(server, kvasir):
    with full_disk(700_000):
        refused("File too large", "is kept", "free space", "start again")
    partial = kvasir.with_name("kvasir-seg.zip.part").stat().st_size
    assert 400_000 < partial <= 700_000
    download("kvasir-seg")
    assert server.ranges == [0, partial]
    assert kvasir.read_bytes() == server.files["kvasir-seg.zip"]


@pytest.mark.fault
def test_a_file_too_large_for_the_disk_is_not_begun(server, kvasir, monkeypatch):
    with monkeypatch.context() as patch:
        free_space(patch, 1_000_000)
        refused("1.50 MB needed", "1.00 MB are free")
    assert not kvasir.with_name("kvasir-seg.zip.part").stat().st_size
    download("kvasir-seg")


@pytest.mark.fault
def test_an_archive_of_enormous_content_is_refused_before_a_byte_is_written(
    tmp_path, root, monkeypatch
):
    bomb = tmp_path / "bomb.zip"
    bomb.write_bytes(zipped({"Kvasir-SEG/images/a.png": bytes(300_000_000)}))
    assert bomb.stat().st_size < 400_000
    free_space(monkeypatch, 200_000_000)
    monkeypatch.setattr(fetching.pooch, "Unzip", lambda *_, **__: pytest.fail("unpacked"))
    refused("bomb.zip", "300.00 MB needed", "200.00 MB are free", archive=bomb)


@pytest.mark.fault
def test_a_folder_that_cannot_be_made_is_named(server, kvasir, root):
    root.write_text("a file")
    refused(str(root), "Not a directory", "--to")
    assert not server.ranges


@pytest.mark.fault
def test_a_folder_in_the_way_stays_as_it_is(server, kvasir, root):
    (root / "Kvasir-SEG/images").mkdir(parents=True)
    refused("Kvasir-SEG exists, but lacks", "Move it away")
    assert not server.ranges and (root / "Kvasir-SEG/images").is_dir()


# The archive --------------------------------------------------------------------------------------


def member(kind, target=""):
    info = tarfile.TarInfo("Kvasir-SEG/images/a.jpg")
    info.type, info.linkname = kind, target
    return {"Kvasir-SEG/masks/a.jpg": b"mask", "Kvasir-SEG/images/a.jpg": info}


def linked():
    info = zipfile.ZipInfo("Kvasir-SEG/images/a.jpg")
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    with io.BytesIO() as memory:
        with zipfile.ZipFile(memory, "w") as archive:
            archive.writestr(info, "/etc/passwd")
        return memory.getvalue()


def encrypted():
    content = bytearray(zipped({"Kvasir-SEG/images/a.jpg": b"x"}))
    content[content.index(b"PK\x01\x02") + 8] |= 1
    return bytes(content)


OUT = "is outside of the folder"
EVIL = ("../evil", "Kvasir-SEG/../../evil", "/evil-lkd")
WINDOWS_EVIL = ("..\\evil", "C:\\evil")
HOSTILE = {  # what is wrong: archive, member, words
    **{f"zip with {n}": (zipped(FILES | {n: b"x"}), n, OUT) for n in (*EVIL, *WINDOWS_EVIL)},
    **{f"tar with {n}": (tarred(FILES | {n: b"x"}), n, OUT) for n in EVIL},
    "tar with a link out": (tarred(member(tarfile.SYMTYPE, "../../evil")), "a.jpg", "link"),
    "tar with a hard link": (tarred(member(tarfile.LNKTYPE, "/etc/passwd")), "a.jpg", "link"),
    "tar with a device": (tarred(member(tarfile.CHRTYPE)), "a.jpg", "device"),
    "tar with a pipe": (tarred(member(tarfile.FIFOTYPE)), "a.jpg", "device"),
    "zip with a link out": (linked(), "a.jpg", "link"),
    "zip with a password": (encrypted(), "a.jpg", "encrypted"),
}


@pytest.mark.fault
@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_archive_writes_nothing(tmp_path, root, what):
    content, name, word = HOSTILE[what]
    (tmp_path / "hostile").write_bytes(content)
    before = {*tmp_path.rglob("*")}
    words = (repr(name)[1:-1], word, "Nothing was unpacked", "by hand")
    refused("hostile", *words, archive=tmp_path / "hostile")
    after = {path for path in tmp_path.rglob("*") if path.suffix != ".lock"} - before
    assert after == {root, root / "downloads", root / "downloads/kvasir-seg"}
    assert not Path("/evil-lkd").exists()


def flipped(content):
    return content[:5000] + bytes(byte ^ 255 for byte in content[5000:5100]) + content[5100:]


def unknown_method(content, method=9):
    """As Windows packs large files: Deflate64."""
    content = bytearray(content)
    for mark, at in ((b"PK\x03\x04", 8), (b"PK\x01\x02", 10)):
        content[content.index(mark) + at] = method
    return bytes(content)


DAMAGED = {  # content, words
    "zip cut": (zipped(FILES)[:-3000], "is damaged"),
    "zip with flipped bytes": (flipped(zipped(FILES)), "is damaged"),
    "tar cut": (tarred(FILES, "w")[:900_000], "is damaged"),
    "tar.gz cut": (tarred(FILES)[:900_000], "is damaged"),
    "tar.gz with flipped bytes": (flipped(tarred(FILES)), "is damaged"),
    "empty": (b"", "is damaged"),
    "noise": (NOISE, "is damaged"),
    "a web page": (b"\n<!doctype html><title>Log in</title>", "is a web page, perhaps a login"),
    "zip of an unknown method": (unknown_method(zipped(FILES)), "by hand into"),
    "rar": (b"Rar!\x1a\x07\x01\x00" + NOISE, "by hand into"),
    "7z": (b"7z\xbc\xaf\x27\x1c" + NOISE, "by hand into"),
}


@pytest.mark.fault
@pytest.mark.parametrize("what", DAMAGED)
def test_an_archive_that_cannot_be_read_is_named_and_leaves_nothing(server, kvasir, root, what):
    server.files["kvasir-seg.zip"], word = DAMAGED[what]
    refused("kvasir-seg.zip", word)
    assert [path.name for path in root.iterdir()] == ["downloads"]
    assert kvasir.exists() == ("by hand" in word)  # another program may read it


@pytest.mark.fault
@pytest.mark.parametrize(
    "files",
    [
        {"images/a.png": b""},
        {"a/images/x": b"", "a/masks/x": b"", "b/images/x": b"", "b/masks/x": b""},
        {},
    ],
    ids=["half", "two that fit", "empty"],
)
def test_an_archive_of_something_else_is_not_a_release(tmp_path, root, files):
    (tmp_path / "other.zip").write_bytes(zipped(files))
    refused("other.zip", "images, masks", archive=tmp_path / "other.zip")
    assert [path.name for path in root.iterdir() if path.is_dir()] == ["downloads"]


# Killed, and several at once ----------------------------------------------------------------------


CHILD = """
import dataclasses, sys, time
from lesionkd_core.data import download as fetching
from lesionkd_core.data.layouts import CATALOGUE
release = dataclasses.replace(CATALOGUE["kvasir-seg"], archives=(sys.argv[1],))
CATALOGUE["kvasir-seg"] = release
if "hang" in sys.argv:
    fetching.replace = lambda *_, **__: time.sleep(60)  # called when everything is unpacked
fetching.download("kvasir-seg")
"""


def killed(address, when, *more):
    """Start a download in its own process, and kill it when `when()` holds."""
    command = [sys.executable, "-c", CHILD, address, *more]
    child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    end = time.monotonic() + 60
    while not when() and child.poll() is None and time.monotonic() < end:
        time.sleep(0.005)
    assert when() and child.poll() is None
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL


@pytest.mark.fault
def test_a_killed_download_resumes(server, kvasir):
    partial = kvasir.with_name("kvasir-seg.zip.part")
    server.pause = 0.05
    address = f"{server.address}/kvasir-seg.zip"
    killed(address, lambda: partial.exists() and partial.stat().st_size > 500_000)
    with pytest.raises(DatasetNotFound):
        find("kvasir-seg")
    reached, server.pause = partial.stat().st_size, 0
    download("kvasir-seg")
    assert server.ranges == [0, reached]
    assert kvasir.read_bytes() == server.files["kvasir-seg.zip"]


@pytest.mark.fault
def test_a_killed_unpacking_leaves_no_release_and_starts_again(server, kvasir, root):
    half = root / ".kvasir-seg.unpacking/Kvasir-SEG/Kvasir-SEG"
    killed(f"{server.address}/kvasir-seg.zip", (half / "readme.txt").exists, "hang")
    (half / "stale.txt").touch()
    with pytest.raises(DatasetNotFound):
        find("kvasir-seg")
    download("kvasir-seg")
    assert len(server.ranges) == 1 and not list(root.glob(".*unpacking"))
    names = sorted(path.name for path in find("kvasir-seg")[1].iterdir())
    assert names == ["images", "masks", "readme.txt"]


def test_two_at_once_fetch_once(server, kvasir):
    server.pause = 0.03
    with ThreadPoolExecutor(2) as pool:
        assert len({*pool.map(lambda _: download("kvasir-seg"), range(2))}) == 1
    assert len(server.ranges) == 1


# What is shown and asked --------------------------------------------------------------------------


def test_without_a_terminal_progress_is_a_few_lines(kvasir, capsys, messages):
    download("kvasir-seg")
    assert capsys.readouterr().err == ""
    assert 2 <= sum("kvasir-seg.zip:" in line for line in messages()) <= 4


@pytest.mark.fault
def test_an_unknown_name_gets_the_nearest(root):
    with pytest.raises(DownloadError, match="no data set 'kvasir' .* did you mean 'kvasir-seg'"):
        download("kvasir")


def test_a_release_on_request_says_how_and_takes_the_file(root, tmp_path):
    release = CATALOGUE["ph2"]
    assert not release.archives
    refused(release.access, release.page, "--archive", name="ph2")
    assert not root.exists()
    case = "PH2Dataset/PH2 Dataset images/IMD002/IMD002"
    files = {f"{case}_Dermoscopic_Image/IMD002.bmp": b"", f"{case}_lesion/IMD002_lesion.bmp": b""}
    (tmp_path / "PH2.zip").write_bytes(zipped(files))
    assert download("ph2", archive=str(tmp_path)) == find("ph2")[1]


@pytest.mark.fault
def test_a_missing_local_archive_is_named(root, tmp_path):
    refused("no archive", "gone.zip", archive=tmp_path / "gone.zip")
    refused("no archive", str(tmp_path), archive=tmp_path)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def command(*arguments):
    """Exit code of `lesionkd download`."""
    from lesionkd_core.cli import main

    with pytest.raises(SystemExit) as end:
        main(["download", *arguments])
    return end.value.code or 0


@pytest.mark.parametrize(("answer", "code"), [("y\n", 0), ("n\n", 1), ("\n", 1), ("", 1)])
def test_the_command_asks(kvasir, root, monkeypatch, answer, code):
    monkeypatch.setattr(sys, "stdin", Terminal(answer))
    assert command("kvasir-seg") == code
    assert (root / "Kvasir-SEG").exists() == (code == 0)


@pytest.mark.fault
def test_without_a_terminal_the_command_needs_yes(server, kvasir, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    assert command("kvasir-seg") == 1 and not server.ranges
    assert "--yes" in capsys.readouterr().err
    assert command("kvasir-seg", "--yes") == 0


def test_every_address_of_the_catalogue_gives_a_plain_file_name():
    for release in CATALOGUE.values():
        names = [fetching._file_name(address, release) for address in release.archives]
        assert len(set(names)) == len(names)
        assert all(os.path.basename(name) == name and name[0].isalnum() for name in names)
