"""Downloads from a local server: interrupted, changed, hostile and damaged archives."""

import hashlib
import importlib
import io
import json
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from lesionkd_core.cli import main
from lesionkd_core.config import LesionKDError
from lesionkd_core.data.layouts import CATALOGUE, DatasetNotFound, find
from tests.conftest import ROOT
from tests.test_cli import command

fetching = importlib.import_module("lesionkd_core.data.download")
download, DownloadError = fetching.download, fetching.DownloadError
NOISE = np.random.default_rng(0).bytes(1_500_000)  # compression does not shorten it
FILES = {
    "Kvasir-SEG/images/a.jpg": NOISE,
    "Kvasir-SEG/masks/a.jpg": b"a mask",
    "Kvasir-SEG/readme.txt": b"kept",
}


@pytest.fixture
def server(monkeypatch):
    """A local server: its files, how often it was asked, and what it does wrong."""
    served = SimpleNamespace(files={}, asked=0, status=200, cut=None, says_length=True, pause=0.0)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            served.asked += 1
            content = served.files.get(self.path.partition("?")[0].lstrip("/"))
            if content is None or served.status != 200:
                return self.send_error(404 if content is None else served.status)
            self.send_response(200)
            if served.says_length:
                self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            for at in range(0, len(content[: served.cut]), 100_000):
                self.wfile.write(content[: served.cut][at : at + 100_000])
                time.sleep(served.pause)

        def log_message(self, *_):
            pass

    monkeypatch.setenv("NO_PROXY", "*")
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        running.daemon_threads = True
        served.address = f"http://127.0.0.1:{running.server_port}"
        threading.Thread(target=running.serve_forever, args=(0.02,), daemon=True).start()
        yield served
        running.shutdown()


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


def zipped(files):
    with io.BytesIO() as memory:
        with zipfile.ZipFile(memory, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in files.items():
                archive.writestr(name, content)
        return memory.getvalue()


def tarred(files, mode="w:gz"):
    """Contents are bytes, or (kind of member, target of a link)."""
    with io.BytesIO() as memory:
        with tarfile.open(fileobj=memory, mode=mode) as archive:
            for name, content in files.items():
                info = tarfile.TarInfo(name)
                if isinstance(content, bytes):
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))
                else:
                    info.type, info.linkname = content
                    archive.addfile(info)
        return memory.getvalue()


def refused(*words, name="kvasir-seg", **options):
    """The error of a download has all these words, and no release is there after it."""
    with pytest.raises(LesionKDError) as caught:
        download(name, **options)
    assert not [word for word in words if word not in str(caught.value)], str(caught.value)
    with pytest.raises(DatasetNotFound):
        find(name)


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_release_is_downloaded_once_unpacked_and_found(server, kvasir, root, messages):
    folder = download("kvasir-seg")
    assert folder == root / "Kvasir-SEG" == find("kvasir-seg")[1]
    assert {name: (root / name).read_bytes() for name in FILES} == FILES
    digest = hashlib.sha256(server.files["kvasir-seg.zip"]).hexdigest()
    entries = json.loads((root / "checksums.json").read_text())
    assert entries == {"kvasir-seg/kvasir-seg.zip": {"sha256": digest}}
    assert names_in(kvasir.parent) == ["kvasir-seg.zip"] and not list(root.glob(".*unpacking*"))
    assert "1 of 1000 images" in messages()[-1]
    assert download("kvasir-seg") == folder and server.asked == 1
    assert "there already" in messages()[-1]


def test_terms_are_shown_before_anything_is_fetched(server, kvasir, root, messages):
    refused("terms not accepted, nothing was fetched", agree=lambda: False)
    release, text = CATALOGUE["kvasir-seg"], "\n".join(messages())
    assert all(term in text for term in (release.licence, release.citation, release.page))
    assert not server.asked and not root.exists()


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
    last = server.files.pop(names[-1])
    refused(names[-1], "404", name="isic2018")
    asked, server.files[names[-1]] = server.asked, last
    assert download("isic2018") == root / "isic2018" == find("isic2018")[1]
    assert server.asked == asked + 1, "complete archives are not fetched again"
    assert names_in(root / "isic2018") == sorted(name.removesuffix(".zip") for name in names)


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


# The connection -----------------------------------------------------------------------------------


@pytest.mark.fault
@pytest.mark.parametrize(
    ("fault", "word"),
    [
        ({"cut": 700_000}, "IncompleteRead"),
        ({"status": 403}, "403"),
        ({"mirror": "http://127.0.0.1:9"}, "ConnectionError"),
    ],
    ids=str,
)
def test_a_failed_transfer_leaves_nothing_and_the_next_start_succeeds(server, kvasir, fault, word):
    vars(server).update(fault)
    page = CATALOGUE["kvasir-seg"].page
    words = "kvasir-seg.zip", page, "Start again", "--mirror", "--archive", "REQUESTS_CA_BUNDLE"
    refused(word, *words, mirror=fault.get("mirror", ""))
    assert not names_in(kvasir.parent)
    vars(server).update(cut=None, status=200)
    download("kvasir-seg")


def test_a_mirror_has_files_of_the_same_names(server, kvasir, monkeypatch):
    gone = ("http://gone.invalid/v1/kvasir-seg.zip/content",)
    monkeypatch.setitem(CATALOGUE, "kvasir-seg", replace(CATALOGUE["kvasir-seg"], archives=gone))
    server.files = {"near/kvasir-seg.zip": server.files["kvasir-seg.zip"]}
    assert download("kvasir-seg", mirror=f"{server.address}/near/").name == "Kvasir-SEG"


# Checksums ----------------------------------------------------------------------------------------


@pytest.mark.fault
def test_another_archive_than_the_first_is_refused_until_its_entry_is_removed(
    server, kvasir, root, tmp_path
):
    download("kvasir-seg").rename(tmp_path / "elsewhere")
    first = server.files["kvasir-seg.zip"]
    kvasir.write_bytes(b"rotten" + first[6:])
    download("kvasir-seg").rename(tmp_path / "again")  # fetched again
    assert kvasir.read_bytes() == first
    kvasir.unlink()
    other = zipped(FILES | {"Kvasir-SEG/images/b.jpg": b"new"})
    server.files["kvasir-seg.zip"] = other
    (tmp_path / "kvasir-seg.zip").write_bytes(other)
    words = hashlib.sha256(first).hexdigest(), "checksums.json", "remove 'kvasir-seg/kvasir-seg.zip"
    refused(*words)
    refused(*words, archive=tmp_path / "kvasir-seg.zip")
    assert (tmp_path / "kvasir-seg.zip").exists()
    (root / "checksums.json").write_text("{half")
    refused("checksums.json is damaged")
    assert (root / "checksums.json").read_text() == "{half"
    (root / "checksums.json").unlink()
    download("kvasir-seg")


# The disk -----------------------------------------------------------------------------------------


@pytest.mark.fault
def test_a_full_disk_is_named_and_leaves_no_release(server, kvasir, root, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(zipfile.ZipFile, "extractall", full)
    refused("No space left on device", "free space", "--to")
    assert names_in(root) == ["downloads"] and kvasir.exists()


@pytest.mark.fault
def test_what_is_in_the_way_is_named_and_stays(server, kvasir, root):
    root.write_text("a file")
    refused(str(root), "Not a directory", "--to")
    root.unlink()
    (root / "Kvasir-SEG/images").mkdir(parents=True)
    refused("Kvasir-SEG exists, but lacks", "Move it away")
    assert not server.asked and (root / "Kvasir-SEG/images").is_dir()


# The archive --------------------------------------------------------------------------------------


LINK = "Kvasir-SEG/images/link"
HOSTILE = {
    "tar with a path out": tarred(FILES | {"a/../../evil": b"x"}),
    "tar through a link": tarred({LINK: (tarfile.SYMTYPE, "/tmp"), f"{LINK}/evil": b"x"} | FILES),
    "tar with a link out": tarred(FILES | {LINK: (tarfile.SYMTYPE, "../../../evil")}),
    "tar with a hard link out": tarred(FILES | {LINK: (tarfile.LNKTYPE, "/etc/passwd")}),
}


@pytest.mark.fault
@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_archive_writes_nothing(tmp_path, root, what):
    (tmp_path / "hostile").write_bytes(HOSTILE[what])
    refused("hostile", archive=tmp_path / "hostile")
    assert names_in(tmp_path) == ["data", "hostile"] and names_in(root) == ["downloads"]
    assert not Path("/evil").exists() and not Path("/tmp", "evil").exists()


@pytest.mark.fault
@pytest.mark.parametrize(("pack", "name"), [(zipped, "../evil"), (tarred, "/evil")])
def test_an_archive_with_a_path_to_the_outside_stays_inside(tmp_path, root, pack, name):
    (tmp_path / "hostile.zip").write_bytes(pack(FILES | {name: b"x"}))
    download("kvasir-seg", archive=tmp_path / "hostile.zip")
    assert names_in(tmp_path) == ["data", "hostile.zip"] and not Path("/evil").exists()
    assert names_in(root) == ["Kvasir-SEG", "checksums.json", "downloads"]


DAMAGED = {
    "zip cut": zipped(FILES)[:-3000],
    "tar.gz cut": tarred(FILES)[:900_000],
    "empty": b"",
    "rar": b"Rar!\x1a\x07\x01\x00" + NOISE,
    "a web page": b"\n<!doctype html><title>Log in</title>",
}


@pytest.mark.fault
@pytest.mark.parametrize("what", DAMAGED)
def test_a_damaged_archive_is_named_moved_away_and_fetched_again(server, kvasir, root, what):
    server.says_length = False  # as servers do that cut a file off without a word
    sound, server.files["kvasir-seg.zip"] = server.files["kvasir-seg.zip"], DAMAGED[what]
    refused("damaged-kvasir-seg.zip", "perhaps a login" if "page" in what else "by hand into")
    assert names_in(root) == ["downloads"] and not kvasir.exists()
    server.files["kvasir-seg.zip"] = sound
    download("kvasir-seg")


@pytest.mark.fault
@pytest.mark.parametrize(
    "files",
    [{"images/a.png": b""}, {f"{a}/{b}/x": b"" for a in "ab" for b in ("images", "masks")}, {}],
    ids=["half", "two that fit", "empty"],
)
def test_an_archive_of_something_else_is_not_a_release(tmp_path, root, files):
    (tmp_path / "other.zip").write_bytes(zipped(files))
    refused("other.zip", "images, masks", archive=tmp_path / "other.zip")
    assert names_in(root) == ["downloads"] and (tmp_path / "other.zip").exists()


# Killed, and several at once ----------------------------------------------------------------------


CHILD = """
import dataclasses, sys
from lesionkd_core.data.download import CATALOGUE, download
release = dataclasses.replace(CATALOGUE["kvasir-seg"], archives=(sys.argv[1],))
CATALOGUE["kvasir-seg"] = release
download("kvasir-seg")
"""


@pytest.mark.fault
def test_a_killed_download_leaves_no_release_and_starts_again(server, kvasir, root):
    server.pause = 0.2
    address = f"{server.address}/kvasir-seg.zip"
    child = subprocess.Popen([sys.executable, "-c", CHILD, address], cwd=ROOT)
    while not list(kvasir.parent.glob("tmp*")):
        assert child.poll() is None
        time.sleep(0.005)
    child.kill()
    child.wait()
    server.pause = 0
    stale = root / ".kvasir-seg.unpacking" / "Kvasir-SEG" / "images" / "stale.jpg"
    stale.parent.mkdir(parents=True)  # of a process that was killed later
    stale.touch()
    with pytest.raises(DatasetNotFound):
        find("kvasir-seg")
    download("kvasir-seg")
    assert names_in(kvasir.parent) == ["kvasir-seg.zip"] and not list(root.glob(".*unpacking"))
    assert names_in(root / "Kvasir-SEG" / "images") == ["a.jpg"]


def test_two_at_once_fetch_once(server, kvasir):
    server.pause = 0.03
    with ThreadPoolExecutor(2) as pool:
        assert len({*pool.map(lambda _: download("kvasir-seg"), range(2))}) == 1
    assert server.asked == 1


# What is shown and asked --------------------------------------------------------------------------


def test_what_cannot_be_fetched_says_how_to_get_it(root, tmp_path):
    with pytest.raises(DownloadError, match="no data set 'kvasir' .* did you mean 'kvasir-seg'"):
        download("kvasir")
    refused("no archive", "gone.zip", archive=tmp_path / "gone.zip")
    refused("no archive", str(tmp_path), archive=tmp_path)
    release = CATALOGUE["ph2"]
    refused(release.access, release.page, "--archive", name="ph2")
    case = "PH2Dataset/PH2 Dataset images/IMD002/IMD002"
    files = {f"{case}_Dermoscopic_Image/IMD002.bmp": b"", f"{case}_lesion/IMD002_lesion.bmp": b""}
    (tmp_path / "PH2.zip").write_bytes(zipped(files))
    assert download("ph2", archive=str(tmp_path)) == find("ph2")[1]


@pytest.mark.parametrize("answer", ["yes", "no", ""])
def test_the_command_asks(kvasir, root, monkeypatch, answer):
    terminal = io.StringIO(f"{answer}\n")
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stdin", terminal)
    with pytest.raises(SystemExit) as end:
        main(["download", "kvasir-seg"])
    assert (end.value.code or 0) == (0 if answer == "yes" else 1)
    assert (root / "Kvasir-SEG").exists() == (answer == "yes")


@pytest.mark.fault
def test_without_a_terminal_the_command_needs_yes_and_draws_no_bar(server, kvasir):
    code, _, errors = command("download", "kvasir-seg")
    assert code == 1 and "--yes" in errors and not server.asked
    assert command("download", "kvasir-seg", "--yes")[::2] == (0, "")


@pytest.mark.fault
def test_without_the_filter_of_python_3_11_4_a_tar_is_refused(root, tmp_path, monkeypatch):
    """Debian 12 has Python 3.11.2."""
    (tmp_path / "mine.tar.gz").write_bytes(tarred(FILES))
    monkeypatch.delattr(tarfile, "data_filter")
    refused("needs Python 3.11.4; unpack it by hand", archive=tmp_path / "mine.tar.gz")
