"""Fetching releases from a server of this machine: cut, changed, refused and hostile archives, full disks, killed processes."""

import hashlib
import importlib
import io
import json
import os
import signal
import stat
import struct
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from lesionkd_core.__main__ import main
from lesionkd_core.datasets import CATALOGUE, DatasetNotFound, find
from lesionkd_core.datasets.unpack import DownloadError

from .conftest import ROOT
from .test_store import full_disk

fetching = importlib.import_module("lesionkd_core.datasets.download")
download = fetching.download
NOISE = np.random.default_rng(0).bytes(1_500_000)  # no compression shortens it
FILES = {"Kvasir-SEG/images/a.jpg": NOISE, "Kvasir-SEG/masks/a.jpg": b"a mask", "Kvasir-SEG/readme.txt": b"kept"}


class Server:
    """Serves `files` by name; what it does wrong is set by attributes, what it was asked for is in `ranges`."""

    def __init__(self):
        self.files, self.ranges, self.headers, self.sent = {}, [], [], 0
        self.cut = []  # bytes after which the first, second, ... answer breaks off
        self.statuses = []  # answered instead of the file, first to last
        self.knows_ranges, self.checks_if_range, self.length_off, self.pause, self.no_length, self.begins = True, True, 0, 0.0, False, None
        self.mark = lambda content: {"ETag": f'"{hashlib.md5(content).hexdigest()}"'}

    def answer(self, request):
        content = self.files.get(request.path.split("?")[0].lstrip("/"))
        span = request.headers.get("Range", "")
        self.ranges.append(int(span[6:-1]) if span else 0)
        self.headers.append(dict(request.headers))
        status = self.statuses.pop(0) if self.statuses else 200 if content is not None else 404
        if status != 200:
            return request.send_error(status)
        marks = self.mark(content)
        same = not self.checks_if_range or request.headers.get("If-Range", "") in ("", *marks.values())
        start = self.ranges[-1] if self.knows_ranges and same else 0
        if start >= len(content) > 0 and start:
            request.send_response(416)
            request.send_header("Content-Range", f"bytes */{len(content)}")
            request.send_header("Content-Length", "0")
            return request.end_headers()
        request.send_response(206 if start else 200)
        if start:
            start = start if self.begins is None else self.begins
            request.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
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
    """The address of Kvasir-SEG is this machine's server, which holds a small archive."""
    server.files["kvasir-seg.zip"] = zipped(FILES)
    monkeypatch.setitem(CATALOGUE, "kvasir-seg", replace(CATALOGUE["kvasir-seg"], archives=(f"{server.address}/kvasir-seg.zip",)))
    return root / "downloads" / "kvasir-seg" / "kvasir-seg.zip"


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


def said():
    """A list to be used as `tell=lines.append`."""
    return []


def refused(*words, name="kvasir-seg", **options):
    """The error of a download, which has all these words, and no release is there after it."""
    with pytest.raises(DownloadError) as caught:
        download(name, tell=lambda _: None, **options)
    assert not [word for word in words if word not in str(caught.value)], str(caught.value)
    with pytest.raises(DatasetNotFound):
        find(name)
    return str(caught.value)


def test_a_release_is_fetched_unpacked_and_found(server, kvasir, root):
    lines = said()
    folder = download("kvasir-seg", tell=lines.append)
    assert folder == root / "Kvasir-SEG" == find("kvasir-seg")[1]
    assert {name: (root / name).read_bytes() for name in FILES} == FILES
    entry = {"sha256": hashlib.sha256(kvasir.read_bytes()).hexdigest(), "size": kvasir.stat().st_size, "address": f"{server.address}/kvasir-seg.zip"}
    assert json.loads((root / "checksums.json").read_text()) == {"kvasir-seg/kvasir-seg.zip": entry}
    assert not list(root.glob(".*unpacking*")) and sorted(p.name for p in kvasir.parent.iterdir()) == ["kvasir-seg.zip"]
    assert "1 images" in lines[-1] and "official count: 1000" in lines[-1]
    assert download("kvasir-seg", tell=lines.append) == folder and "there already" in lines[-1] and len(server.ranges) == 1


def test_terms_are_shown_before_anything_is_fetched(server, kvasir, root):
    lines = said()

    def agree():
        release, text = CATALOGUE["kvasir-seg"], "\n".join(lines)
        assert release.licence in text and release.citation in text and release.page in text
        assert not server.ranges and not root.exists()
        return False

    with pytest.raises(DownloadError, match="terms not accepted, nothing was fetched"):
        download("kvasir-seg", tell=lines.append, agree=agree)
    assert not server.ranges and not root.exists()


def test_isic_s_archives_go_below_one_folder(server, root, monkeypatch):
    release = CATALOGUE["isic2018"]
    names = [address.rsplit("/", 1)[1] for address in release.archives]
    for name in names:
        inside = name.removesuffix(".zip")
        file = "ISIC_1_segmentation.png" if "GroundTruth" in name else "ISIC_1.jpg"
        server.files[name] = zipped({f"{inside}/{file}": b"pixels", f"__MACOSX/{inside}/._{file}": b"fork"})
    monkeypatch.setitem(CATALOGUE, "isic2018", replace(release, archives=tuple(f"{server.address}/{name}?download=1" for name in names)))
    assert download("isic2018", tell=print) == root / "isic2018" == find("isic2018")[1]
    assert sorted(p.name for p in (root / "isic2018").iterdir()) == sorted(name.removesuffix(".zip") for name in names)
    assert not list(root.rglob("._*"))


SHAPES = {  # how people pack a release
    "its folder on top": FILES,
    "no folder on top": {name.split("/", 1)[1]: content for name, content in FILES.items()},
    "another name on top": {name.replace("Kvasir-SEG", "kvasir-seg-v2"): content for name, content in FILES.items()},
    "deep in a repository": {f"repo-main/data/{name}": content for name, content in FILES.items()} | {"repo-main/images/x.png": b"", "repo-main/README": b""},
    "beside what macOS adds": FILES | {f"__MACOSX/{name}": b"fork" for name in FILES},
    "no folder, beside what macOS adds": {"images/a.jpg": NOISE, "masks/a.jpg": b"", "__MACOSX/images/a.jpg": b"fork", "images/._a.jpg": b"fork"},
    "with backslashes": {name.replace("/", "\\"): content for name, content in FILES.items()} | {"Kvasir-SEG\\images\\": b""},
    "with ./ before": {f"./{name}": content for name, content in FILES.items()},
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("pack", [zipped, tarred, lambda files: tarred(files, "w")], ids=["zip", "tar.gz", "tar"])
def test_a_release_is_found_however_it_is_packed(tmp_path, root, shape, pack):
    files = {name: content for name, content in SHAPES[shape].items() if pack is zipped or not name.endswith("\\")}
    (tmp_path / "any.name").write_bytes(pack(files))
    assert download("kvasir-seg", archive=tmp_path / "any.name") == find("kvasir-seg")[1] == root / "Kvasir-SEG"
    assert (root / "Kvasir-SEG/images/a.jpg").read_bytes() == NOISE and not list((root / "Kvasir-SEG").rglob("_*")) + list((root / "Kvasir-SEG").rglob("._*"))


def test_loose_files_go_to_the_folder_their_archive_is_called_after(tmp_path, root):
    for folder in CATALOGUE["covid19-20cases"].holds:
        (tmp_path / f"{folder}.zip").write_bytes(zipped({"coronacases_001.nii.gz": folder.encode()}))
    download("covid19-20cases", archive=tmp_path)
    for folder in CATALOGUE["covid19-20cases"].holds:
        assert (root / "covid19-20cases" / folder / "coronacases_001.nii.gz").read_text() == folder


# ---- the connection


def test_a_cut_connection_goes_on_where_it_broke(server, kvasir):
    server.cut = [700_000]
    download("kvasir-seg")
    whole = server.files["kvasir-seg.zip"]
    assert kvasir.read_bytes() == whole
    first, second = server.ranges
    assert first == 0 and 400_000 < second <= 700_000 and server.sent == 700_000 + len(whole) - second
    assert server.headers[1]["If-Range"] == server.mark(whole)["ETag"]


def test_cuts_that_still_bring_something_never_end_it(server, kvasir):
    server.cut = [300_000] * 5
    download("kvasir-seg")
    assert kvasir.read_bytes() == server.files["kvasir-seg.zip"] and len(server.ranges) == 6 and server.ranges == sorted(set(server.ranges))


@pytest.mark.fault
def test_a_dead_server_is_named_and_the_next_start_goes_on(server, kvasir):
    server.cut = [700_000] + [0] * 20
    message = refused(f"{server.address}/kvasir-seg.zip", "cut", "Start again", "kept")
    assert len(server.ranges) == 1 + fetching.TRIES
    partial = kvasir.with_name("kvasir-seg.zip.part").stat().st_size
    assert f"{partial / 1e6:.2f} MB" in message
    server.cut, server.ranges, server.sent = [], [], 0
    download("kvasir-seg")
    assert server.ranges == [partial] and server.sent == len(server.files["kvasir-seg.zip"]) - partial
    assert kvasir.read_bytes() == server.files["kvasir-seg.zip"]


@pytest.mark.fault
def test_a_server_that_knows_no_ranges_starts_over(server, kvasir):
    server.cut, server.knows_ranges = [700_000], False
    download("kvasir-seg")
    assert kvasir.read_bytes() == server.files["kvasir-seg.zip"] and server.sent == 700_000 + len(kvasir.read_bytes())


@pytest.mark.fault
def test_a_server_that_sends_another_range_than_asked_for_is_not_believed(server, kvasir):
    server.cut, server.begins = [700_000], 500_000
    download("kvasir-seg")
    assert kvasir.read_bytes() == server.files["kvasir-seg.zip"] and server.ranges[2:] == [0]


def test_the_bytes_are_kept_as_they_are_sent(server, kvasir):
    server.files["kvasir-seg.zip"] = tarred(FILES)
    server.mark = lambda _: {"Content-Encoding": "gzip"}  # what some servers say of every .tar.gz
    download("kvasir-seg")
    assert kvasir.read_bytes() == server.files["kvasir-seg.zip"] and server.headers[0]["Accept-Encoding"] == "identity"


@pytest.mark.fault
@pytest.mark.parametrize("checks", [True, False], ids=["If-Range heeded", "If-Range ignored"])
@pytest.mark.parametrize("mark", ["ETag", "Last-Modified", "weak", "none"])
def test_two_versions_of_a_file_are_not_mixed(server, kvasir, checks, mark):
    old, new = server.files["kvasir-seg.zip"], zipped({name: content[::-1] for name, content in FILES.items()} | {"Kvasir-SEG/more": b"longer"})
    days = {old: "Mon, 01 Jan 2024 00:00:00 GMT", new: "Tue, 02 Jan 2024 00:00:00 GMT"}
    tags = {"ETag": server.mark, "Last-Modified": lambda c: {"Last-Modified": days[c]}, "weak": lambda c: {"ETag": f'W/"{len(c)}"'}, "none": lambda c: {}}
    server.mark, server.checks_if_range, server.cut = tags[mark], checks, [700_000] + [0] * 20
    refused("cut")
    server.files["kvasir-seg.zip"], server.cut = new, []
    download("kvasir-seg")
    assert kvasir.read_bytes() == new


@pytest.mark.fault
def test_a_length_announced_too_long_is_seen_through(server, kvasir):
    server.length_off = 1000
    download("kvasir-seg")
    assert kvasir.read_bytes() == server.files["kvasir-seg.zip"] and server.sent == len(kvasir.read_bytes())


@pytest.mark.fault
def test_a_length_announced_too_short_ends_in_a_damaged_archive_fetched_anew(server, kvasir, root):
    server.length_off = -1000
    refused("kvasir-seg.zip is damaged", "damaged-kvasir-seg.zip", "start again")
    assert not (root / "checksums.json").exists() and kvasir.with_name("damaged-kvasir-seg.zip").exists()
    server.length_off = 0
    download("kvasir-seg")


@pytest.mark.fault
def test_a_silent_cut_without_a_length_is_damaged_and_enters_no_checksum(server, kvasir, root):
    server.no_length, server.cut = True, [700_000]  # HTTP/1.0: the end of the connection is the end of the file
    refused("kvasir-seg.zip is damaged")
    assert not (root / "checksums.json").exists()
    download("kvasir-seg")


@pytest.mark.fault
@pytest.mark.parametrize("status", [401, 403, 404, 410])
def test_a_refusal_is_final_and_names_address_and_status(server, kvasir, status):
    server.statuses = [status] * 9
    refused(f"{server.address}/kvasir-seg.zip", f"answers {status}", CATALOGUE["kvasir-seg"].page, "--mirror", "--archive")
    assert len(server.ranges) == 1


@pytest.mark.fault
def test_a_busy_server_is_asked_again(server, kvasir):
    server.statuses = [503, 429, 500]
    download("kvasir-seg")
    assert len(server.ranges) == 4


@pytest.mark.fault
@pytest.mark.parametrize(
    ("address", "word"),
    [("http://127.0.0.1:9", "no connection"), ("http://no.invalid", "no connection"), ("no-address", "no-address"), ("ftp://x/y", "ftp"), ("http://", "http")],
)
def test_a_wrong_address_is_one_message(kvasir, address, word):
    refused(word, "--mirror", mirror=address)


@pytest.mark.fault
def test_a_certificate_that_fails_is_named_at_once(server, kvasir):
    refused("https://127.0.0.1", "TLS certificate", "REQUESTS_CA_BUNDLE", mirror=server.address.replace("http:", "https:"))


@pytest.mark.fault
def test_a_silent_server_is_not_waited_for_without_end(server, kvasir, monkeypatch):
    monkeypatch.setattr(fetching, "TIMEOUT", (1, 0.05))
    monkeypatch.setattr(fetching, "TRIES", 2)
    monkeypatch.setattr(Server, "answer", lambda *_: time.sleep(0.5))
    refused("no answer in time", server.address)


def test_a_mirror_holds_files_of_the_same_names(server, kvasir, root, monkeypatch):
    monkeypatch.setitem(CATALOGUE, "kvasir-seg", replace(CATALOGUE["kvasir-seg"], archives=("http://gone.invalid/v1/kvasir-seg.zip/content",)))
    server.files["near/kvasir-seg.zip"] = server.files["kvasir-seg.zip"]
    download("kvasir-seg", mirror=f"{server.address}/near/")
    assert json.loads((root / "checksums.json").read_text())["kvasir-seg/kvasir-seg.zip"]["address"] == f"{server.address}/near/kvasir-seg.zip"


# ---- the lock file


@pytest.mark.fault
def test_another_archive_than_the_first_is_refused_until_its_entry_is_removed(server, kvasir, root):
    release = download("kvasir-seg")
    old = hashlib.sha256(kvasir.read_bytes()).hexdigest()
    release.rename(root.parent / "elsewhere")
    kvasir.unlink()
    server.files["kvasir-seg.zip"] = zipped(FILES | {"Kvasir-SEG/images/b.jpg": b"new"})
    new = hashlib.sha256(server.files["kvasir-seg.zip"]).hexdigest()
    refused(old, new, "refused-kvasir-seg.zip", "checksums.json", "remove 'kvasir-seg/kvasir-seg.zip'")
    assert kvasir.with_name("refused-kvasir-seg.zip").read_bytes() == server.files["kvasir-seg.zip"] and not kvasir.exists()
    refused(old, new)
    (root / "checksums.json").unlink()
    download("kvasir-seg")


@pytest.mark.fault
def test_a_local_archive_is_held_to_the_checksum_too_and_left_where_it_is(server, kvasir, root, tmp_path):
    download("kvasir-seg").rename(tmp_path / "elsewhere")
    (tmp_path / "kvasir-seg.zip").write_bytes(zipped({"Kvasir-SEG/images/x": b"", "Kvasir-SEG/masks/x": b""}))
    refused("sha256", archive=tmp_path / "kvasir-seg.zip")
    assert (tmp_path / "kvasir-seg.zip").exists()


@pytest.mark.fault
def test_an_archive_that_rotted_on_the_disk_is_refused_then_fetched_anew(server, kvasir, tmp_path):
    download("kvasir-seg").rename(tmp_path / "elsewhere")
    kvasir.write_bytes(b"rotten" + kvasir.read_bytes()[6:])
    refused("sha256", "Start again")
    download("kvasir-seg")


@pytest.mark.fault
def test_a_damaged_lock_file_is_named_and_not_overwritten(kvasir, root):
    root.mkdir()
    (root / "checksums.json").write_text("{half")
    refused("checksums.json is damaged")
    assert (root / "checksums.json").read_text() == "{half"


# ---- the disk


def free_space(monkeypatch, count):
    unpacking = importlib.import_module("lesionkd_core.datasets.unpack")
    monkeypatch.setattr(unpacking.shutil, "disk_usage", lambda _: namedtuple("Usage", "total used free")(count, 0, count))


@pytest.mark.fault
def test_a_disk_that_fills_up_keeps_what_was_fetched(server, kvasir):
    with full_disk(700_000):
        refused("kvasir-seg.zip", "1.50 MB needed", "free", "start again")
    assert kvasir.with_name("kvasir-seg.zip.part").stat().st_size == 700_000
    download("kvasir-seg")
    assert server.ranges == [0, 700_000] and kvasir.read_bytes() == server.files["kvasir-seg.zip"]


@pytest.mark.fault
def test_a_file_too_large_for_the_disk_is_not_begun(server, kvasir, monkeypatch):
    with monkeypatch.context() as patch:
        free_space(patch, 1_000_000)
        refused("1.50 MB needed", "1.00 MB were free")
    assert not kvasir.with_name("kvasir-seg.zip.part").stat().st_size
    download("kvasir-seg")


@pytest.mark.fault
def test_a_disk_that_fills_up_while_unpacking_leaves_the_archive_alone(server, kvasir, root, monkeypatch):
    def no_space(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("lesionkd_core.datasets.unpack.shutil.copyfileobj", no_space)
        refused("kvasir-seg.zip", "No space left on device", "1.50 MB needed")
    assert [p.name for p in root.iterdir()] == ["downloads"]
    download("kvasir-seg")
    assert len(server.ranges) == 1


@pytest.mark.fault
def test_a_bomb_is_refused_before_a_byte_is_written(tmp_path, root, monkeypatch):
    (tmp_path / "bomb.zip").write_bytes(zipped({"Kvasir-SEG/images/a.png": bytes(300_000_000)}))
    assert (tmp_path / "bomb.zip").stat().st_size < 400_000
    free_space(monkeypatch, 200_000_000)
    monkeypatch.setattr("lesionkd_core.datasets.unpack.shutil.copyfileobj", lambda *_: pytest.fail("written"))
    refused("bomb.zip", "300.00 MB needed", "200.00 MB were free", archive=tmp_path / "bomb.zip")


@pytest.mark.fault
def test_a_bomb_that_hides_its_size_does_not_grow(tmp_path, root):
    content = bytearray(zipped({"Kvasir-SEG/images/a.png": bytes(50_000_000)}))
    size = content.index(struct.pack("<I", 50_000_000), content.index(b"PK\x01\x02"))
    content[size : size + 4] = struct.pack("<I", 1000)
    (tmp_path / "bomb.zip").write_bytes(content)
    with full_disk(1_000_000):
        refused("bomb.zip is damaged", archive=tmp_path / "bomb.zip")


@pytest.mark.fault
def test_a_folder_that_cannot_be_made_is_named(server, kvasir, root):
    root.write_text("a file")
    refused(str(root), "Not a directory", "--to")
    assert not server.ranges


@pytest.mark.fault
def test_a_folder_in_the_way_stays_as_it_is(server, kvasir, root):
    (root / "Kvasir-SEG/images").mkdir(parents=True)
    refused("Kvasir-SEG is there, but lacks", "Move it away")
    assert not server.ranges and (root / "Kvasir-SEG/images").is_dir()


# ---- the archive


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


OUT = "would be written outside"
HOSTILE = {  # what is wrong: archive, member, words
    **{f"zip with {name}": (zipped(FILES | {name: b"x"}), name, OUT) for name in ("../evil", "Kvasir-SEG/../../evil", "/evil-lkd", "..\\evil", "C:\\evil")},
    **{f"tar with {name}": (tarred(FILES | {name: b"x"}), name, OUT) for name in ("../evil", "Kvasir-SEG/../../evil", "/evil-lkd")},
    "tar with a link out": (tarred(member(tarfile.SYMTYPE, "../../../evil")), "a.jpg", "link"),
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
    before = sorted(tmp_path.rglob("*"))
    refused("hostile", repr(name)[1:-1], word, "Nothing was unpacked", "by hand", archive=tmp_path / "hostile")
    after = [path for path in sorted(tmp_path.rglob("*")) if path not in before and not path.name.endswith(".lock")]
    assert after == [root, root / "downloads", root / "downloads/kvasir-seg"]
    assert not Path("/evil-lkd").exists()


def flipped(content):
    return content[:5000] + bytes(byte ^ 255 for byte in content[5000:5100]) + content[5100:]


def unknown_method(content, method=9):
    """As Windows packs what is large: Deflate64."""
    content = bytearray(content)
    for mark, at in ((b"PK\x03\x04", 8), (b"PK\x01\x02", 10)):
        content[content.index(mark) + at] = method
    return bytes(content)


DAMAGED = {  # content, words
    "zip cut": (zipped(FILES)[:-3000], "damaged"),
    "zip with flipped bytes": (flipped(zipped(FILES)), "damaged"),
    "tar cut": (tarred(FILES, "w")[:900_000], "damaged"),
    "tar.gz cut": (tarred(FILES)[:900_000], "damaged"),
    "tar.gz cut in its header": (tarred(FILES)[:40], "damaged"),
    "tar.gz with flipped bytes": (flipped(tarred(FILES)), "damaged"),
    "empty": (b"", "damaged"),
    "noise": (NOISE, "damaged"),
    "a web page": (b"\n<!doctype html><title>Log in</title>", "web page, perhaps a login"),
    "zip of an unknown method": (unknown_method(zipped(FILES)), "by hand into"),
    "rar": (b"Rar!\x1a\x07\x01\x00" + NOISE, "by hand into"),
    "7z": (b"7z\xbc\xaf\x27\x1c" + NOISE, "by hand into"),
}


@pytest.mark.fault
@pytest.mark.parametrize("what", DAMAGED)
def test_an_archive_that_cannot_be_read_is_named_and_leaves_nothing(server, kvasir, root, what):
    server.files["kvasir-seg.zip"], word = DAMAGED[what]
    refused("kvasir-seg.zip", word, CATALOGUE["kvasir-seg"].page if "by hand" not in word else str(root / "Kvasir-SEG"))
    assert [p.name for p in root.iterdir()] == ["downloads"]
    assert kvasir.exists() == ("by hand" in word), "only what another program may read keeps its name"


@pytest.mark.fault
@pytest.mark.parametrize(
    "files", [{"images/a.png": b""}, {"a/images/x": b"", "a/masks/x": b"", "b/images/x": b"", "b/masks/x": b""}, {}], ids=["half", "two that fit", "empty"]
)
def test_an_archive_of_something_else_is_no_release(tmp_path, root, files):
    (tmp_path / "other.zip").write_bytes(zipped(files))
    refused("other.zip", "'images', 'masks'", archive=tmp_path / "other.zip")
    assert [p.name for p in root.iterdir() if p.is_dir()] == ["downloads"]


# ---- killed and crowded


CHILD = """
import dataclasses, shutil, sys, time
from lesionkd_core.datasets import CATALOGUE
from lesionkd_core.datasets.download import download
CATALOGUE["kvasir-seg"] = dataclasses.replace(CATALOGUE["kvasir-seg"], archives=(sys.argv[1],))
copy = shutil.copyfileobj
if "hang" in sys.argv:
    shutil.copyfileobj = lambda *files: (copy(*files), time.sleep(60))
download("kvasir-seg")
"""


def killed(address, when, *more):
    """Start a download in a process of its own, and kill it hard when `when()` holds."""
    child = subprocess.Popen([sys.executable, "-c", CHILD, address, *more], cwd=ROOT, stdout=subprocess.DEVNULL)
    end = time.monotonic() + 60
    while not when() and child.poll() is None and time.monotonic() < end:
        time.sleep(0.005)
    assert when() and child.poll() is None
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL


@pytest.mark.fault
def test_a_download_killed_hard_goes_on(server, kvasir):
    partial = kvasir.with_name("kvasir-seg.zip.part")
    server.pause = 0.05
    killed(f"{server.address}/kvasir-seg.zip", lambda: partial.exists() and partial.stat().st_size > 500_000)
    with pytest.raises(DatasetNotFound):
        find("kvasir-seg")
    reached, server.pause, server.sent = partial.stat().st_size, 0, 0
    download("kvasir-seg")
    assert server.ranges == [0, reached] and kvasir.read_bytes() == server.files["kvasir-seg.zip"]
    assert [p.name for p in kvasir.parent.iterdir()] == ["kvasir-seg.zip"]


@pytest.mark.fault
def test_unpacking_killed_hard_leaves_no_release_and_starts_anew(server, kvasir, root):
    half = root / ".kvasir-seg.unpacking/Kvasir-SEG/Kvasir-SEG/images/a.jpg"
    killed(f"{server.address}/kvasir-seg.zip", lambda: half.exists() and half.stat().st_size > 1_400_000, "hang")
    (half.parents[1] / "masks").mkdir()  # as far as it can get
    (half.parents[1] / "stale.txt").touch()
    with pytest.raises(DatasetNotFound):
        find("kvasir-seg")
    download("kvasir-seg")
    assert len(server.ranges) == 1 and not list(root.glob(".*unpacking"))
    assert sorted(p.name for p in find("kvasir-seg")[1].iterdir()) == ["images", "masks", "readme.txt"]


def test_two_at_once_fetch_once(server, kvasir):
    server.pause = 0.03
    with ThreadPoolExecutor(2) as pool:
        assert len({*pool.map(lambda _: download("kvasir-seg", tell=lambda _: None), range(2))}) == 1
    assert len(server.ranges) == 1


# ---- progress and the command line


def test_progress_is_a_few_lines_where_no_bar_can_live(kvasir, capsys):
    download("kvasir-seg")
    lines = capsys.readouterr()
    assert lines.err == "" and 4 <= sum("kvasir-seg.zip:" in line for line in lines.out.splitlines()) <= 7


def test_a_live_bar_counts_every_byte(server, kvasir, monkeypatch):
    bars = []

    class Bar:
        def __init__(self, **given):
            self.done, self.total = given["initial"], given["total"]
            bars.append(self)

        def update(self, count):
            self.done += count

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(fetching, "live_bar", lambda: Bar)
    server.cut = [700_000]
    download("kvasir-seg")
    whole = len(server.files["kvasir-seg.zip"])
    assert [bar.total for bar in bars] == [whole, whole] and bars[1].done == whole


@pytest.mark.fault
def test_an_unknown_name_gets_the_nearest(root):
    with pytest.raises(DownloadError, match="no data set 'kvasir' in the catalogue: did you mean 'kvasir-seg'"):
        download("kvasir")


def test_a_set_on_request_says_how_and_takes_the_file(root, tmp_path):
    assert not CATALOGUE["ph2"].archives
    refused(CATALOGUE["ph2"].access, CATALOGUE["ph2"].page, "--archive", name="ph2")
    assert not root.exists()
    case = "PH2Dataset/PH2 Dataset images/IMD002/IMD002"
    (tmp_path / "PH2.zip").write_bytes(zipped({f"{case}_Dermoscopic_Image/IMD002.bmp": b"", f"{case}_lesion/IMD002_lesion.bmp": b""}))
    assert download("ph2", archive=str(tmp_path)) == find("ph2")[1]


@pytest.mark.fault
def test_a_missing_local_archive_is_named(root, tmp_path):
    refused("no archive", "gone.zip", archive=tmp_path / "gone.zip")
    refused("no archive", str(tmp_path), archive=tmp_path)


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(("answer", "code"), [("y\n", 0), ("Yes\n", 0), ("n\n", 1), ("\n", 1), ("", 1)])
def test_the_command_asks(kvasir, root, monkeypatch, capsys, answer, code):
    monkeypatch.setattr(sys, "stdin", Terminal(answer))
    assert main(["download", "kvasir-seg"]) == code
    out = capsys.readouterr().out
    assert out.index(CATALOGUE["kvasir-seg"].licence) < out.index("Go on? [y/N]")
    assert (root / "Kvasir-SEG").exists() == (code == 0)


@pytest.mark.fault
def test_without_a_terminal_the_command_wants_yes(server, kvasir, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    assert main(["download", "kvasir-seg"]) == 1 and not server.ranges
    said = capsys.readouterr()
    assert CATALOGUE["kvasir-seg"].licence in said.out and "--yes" in said.err and "Traceback" not in said.err
    assert main(["download", "kvasir-seg", "--yes"]) == 0


def test_the_command_takes_a_mirror_and_another_folder(server, kvasir, root, tmp_path, monkeypatch):
    monkeypatch.setitem(CATALOGUE, "kvasir-seg", replace(CATALOGUE["kvasir-seg"], archives=("http://gone.invalid/kvasir-seg.zip",)))
    assert main(["download", "kvasir-seg", "--yes", "--mirror", server.address, "--to", str(tmp_path / "other")]) == 0
    assert (tmp_path / "other/Kvasir-SEG/images/a.jpg").exists() and not root.exists()
    assert main(["download", "kvasir-seg", "--to", str(tmp_path / "other")]) == 0, "it is there, so nothing is asked"


def test_the_list_shows_what_is_there(kvasir, capsys):
    main(["download", "kvasir-seg", "--yes"])
    capsys.readouterr()
    assert main(["download", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["name", "modality", "images", "licence", "found"] and len(lines) == 1 + len(CATALOGUE)
    [row] = [line for line in lines if line.startswith("kvasir-seg ")]
    assert row.split()[:3] == ["kvasir-seg", "colonoscopy", "1000"] and row.endswith("yes") and sum(line.endswith("yes") for line in lines) == 1


@pytest.mark.fault
def test_ctrl_c_is_no_traceback(kvasir, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(fetching, "_attempt", interrupted)
    assert main(["download", "kvasir-seg", "--yes"]) == 130 and "goes on from here" in capsys.readouterr().err


def test_every_address_of_the_catalogue_gives_a_plain_file_name():
    for release in CATALOGUE.values():
        names = [fetching._name(address, release) for address in release.archives]
        assert len(set(names)) == len(names) and all(os.path.basename(name) == name and name[0].isalnum() for name in names)
