"""From files to arrays: what is written, found again, made again, resumed; where empty masks go."""

import os
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from lesionkd_core import results
from lesionkd_core.config import LesionKDError, PrepareConfig
from lesionkd_core.data import layouts
from lesionkd_core.data import prepare as module
from lesionkd_core.data.layouts import DatasetNotFound
from lesionkd_core.data.pixels import prepare_image, prepare_mask
from lesionkd_core.data.prepare import prepare
from lesionkd_core.data.splits import SplitError
from lesionkd_core.edges import edge_label
from tests.conftest import ROOT
from tests.tiny import SIZE, image_folder, lesion, picture, save

COPIES = {0: "copy_000", 7: "copy_007", 20: "copy_020"}  # case number: its near-duplicate
ARRAYS = ("images.npy", "masks.npy", "edges.npy", "thumbnails.npy")
FILES = (*ARRAYS, "split.csv", "cases.csv", "report.csv", "summary.json")


def config(folder, **options):
    return PrepareConfig(**{"dataset": str(folder), "pixels": 32, **options})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """24 pairs, and three of them again: brighter, and as JPEG."""
    root = image_folder(tmp_path_factory.mktemp("raw") / "mine")
    for i, name in COPIES.items():
        brighter = np.clip(picture(i) * 1.04 + 3, 0, 255).astype(np.uint8)
        save(root / "images" / f"{name}.jpg", brighter, quality=88)
        save(root / "masks" / f"{name}.png", lesion(6 + i))
    return root


@pytest.fixture(scope="module")
def prepared(folder):
    return prepare(config(folder))


# Arrays -------------------------------------------------------------------------------------------


def test_arrays_hold_every_case_at_the_prepared_size(prepared):
    n = 24 + len(COPIES)
    shapes = [array.shape for array in (prepared.images, prepared.masks, prepared.edges)]
    assert shapes == [(n, 32, 32, 3), (n, 32, 32), (n, 32, 32)]
    assert prepared.images.dtype == prepared.masks.dtype == prepared.edges.dtype == np.uint8
    assert len(prepared.cases) == n and len(prepared.report) == 0
    assert set(np.unique(prepared.masks)) == set(np.unique(prepared.edges)) == {0, 1}
    assert set(zip(prepared.cases["height"], prepared.cases["width"])) == {SIZE}
    sides = np.array([6 + int(name[-3:]) for name in prepared.cases["id"]])
    assert np.allclose(prepared.cases["lesion_fraction"], sides**2 / (SIZE[0] * SIZE[1]))
    with pytest.raises(ValueError, match="read-only"):
        prepared.images[0, 0, 0, 0] = 1


def test_every_case_keeps_its_own_pixels_whatever_is_left_out_between(tmp_path, runs, monkeypatch):
    """Parts of five cases; some without a lesion, some not in the split file, one part empty."""
    empty, unnamed = {2, 9, 21}, {0, 5, 6, 7, 8, 13}
    folder = image_folder(tmp_path / "mine", empty=empty)
    named = [i for i in range(24) if i not in unnamed]
    split = {"id": [f"case_{i:03d}" for i in named], "split": ["train", "val", "test"] * 6}
    pd.DataFrame(split).to_csv(tmp_path / "split.csv", index=False)
    monkeypatch.setattr(module, "PART", 5)
    cfg = config(folder, split_file=str(tmp_path / "split.csv"), fit="pad")
    found = prepare(cfg)
    kept = [i for i in named if i not in empty]
    assert found.cases["id"].tolist() == [f"case_{i:03d}" for i in kept]
    unsaid = found.report[found.report["reason"] == "not in the split file"]
    assert unsaid["id"].tolist() == [f"case_{i:03d}" for i in sorted(unnamed)]
    assert set(unsaid["action"]) == {"dropped"} and len(found.thumbnails) == len(kept)
    for row, i in enumerate(kept):
        assert (found.images[row] == prepare_image(picture(i), cfg)).all()
        assert (found.masks[row] == prepare_mask(lesion(6 + i), cfg)).all()
        assert (found.edges[row] == edge_label(found.masks[row])).all()


NORMALS = (2, 9, 10, 21)


@pytest.mark.parametrize("normals", ["drop", "keep", "test"])
def test_cases_without_a_lesion_go_where_the_option_says(tmp_path, runs, normals):
    found = prepare(config(image_folder(tmp_path / "mine", empty=NORMALS), normals=normals))
    names = [f"case_{i:03d}" for i in NORMALS]
    splits = found.cases.set_index("id")["split"].reindex(names).dropna()
    dropped = found.report[found.report["reason"].str.contains("no lesion")]
    assert dropped["id"].tolist() == (names if normals == "drop" else [])
    assert (len(found.cases), len(splits)) == ((20, 0) if normals == "drop" else (24, 4))
    assert normals != "test" or set(splits) == {"test"}
    assert found.masks.any((1, 2)).sum() == 20


def test_some_cases_are_drawn_by_the_split_seed(folder, runs):
    drawn = [
        prepare(config(folder, cases=15, split_seed=seed)).cases["id"].tolist() for seed in (0, 1)
    ]
    assert [len(set(ids)) for ids in drawn] == [15, 15] and drawn[0] != drawn[1]


def test_the_phantom_needs_no_files_and_repeats_nothing(runs, monkeypatch, tmp_path):
    monkeypatch.setenv("LESIONKD_DATA", str(tmp_path / "nowhere"))
    found = prepare(PrepareConfig(cases=30, pixels=32, normals="keep"))
    assert found.cases["group"].nunique() == len(found.cases) == 30
    assert len({image.tobytes() for image in found.images}) == 30


# Groups and splits --------------------------------------------------------------------------------


def test_near_duplicates_share_a_group_and_a_split(prepared):
    cases = prepared.cases.set_index("id")
    for number, name in COPIES.items():
        same = (
            cases.loc[name, ["group", "split"]]
            == cases.loc[f"case_{number:03d}", ["group", "split"]]
        )
        assert same.all()
    assert cases["group"].nunique() == 24  # and nothing else was taken for a duplicate


def test_the_split_follows_its_seed_and_not_the_prepared_size(folder, prepared, runs):
    same, other = (prepare(config(folder, split_seed=seed)) for seed in (0, 1))
    assert same.path != prepared.path and same.split_hash == prepared.split_hash
    assert other.split_hash != prepared.split_hash
    assert (same.path / "split.csv").read_bytes() == (prepared.path / "split.csv").read_bytes()
    for options in ({"pixels": 64}, {"fit": "pad"}):
        assert prepare(config(folder, **options)).split_hash == prepared.split_hash


@pytest.mark.parametrize("columns", [["id", "split"], ["id", "group", "split"]])
def test_a_split_can_be_given_as_a_file(folder, prepared, runs, tmp_path, columns):
    table = pd.read_csv(prepared.path / "split.csv")[columns]
    table.to_csv(tmp_path / "theirs.csv", index=False)
    found = prepare(config(folder, split_seed=5, split_file=str(tmp_path / "theirs.csv")))
    assert found.cases["split"].tolist() == prepared.cases["split"].tolist()
    assert found.split_hash == prepared.split_hash


def test_an_official_split_that_near_duplicates_cross_is_used_with_a_warning(
    tmp_path, runs, messages
):
    """A manifest gives the split; a copy of a training image is in the test split."""
    folder = image_folder(tmp_path / "mine")
    save(folder / "images" / "copy.png", np.clip(picture(0) * 1.03, 0, 255).astype(np.uint8))
    save(folder / "masks" / "copy.png", lesion(6))
    splits = ["train"] * 16 + ["val"] * 3 + ["test"] * 6
    names = [*(f"case_{i:03d}" for i in range(24)), "copy"]
    lines = [f"images/{name}.png,masks/{name}.png,{split}" for name, split in zip(names, splits)]
    (folder / "list.csv").write_text("\n".join(["image,mask,split", *lines]) + "\n")
    found = prepare(config(folder / "list.csv", split="official"))
    assert found.summary["crossing"] == {"test": 1, "val": 0}
    assert any("warning: 1 test and 0 validation cases share a group" in m for m in messages())


PUBLISHED = {"busi": "6ecddfa5", "cvc-clinicdb": "922de1e0", "em-isbi2012": "af277445"}
"""Splits of docs/study.md."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_split_of_the_published_study_is_made_again(name, runs):
    try:
        layouts.find(name)
    except DatasetNotFound:
        pytest.skip(f"the release {name} is not here")
    found = prepare(PrepareConfig(dataset=name, pixels=32, profile="cpu"))
    assert found.split_hash == PUBLISHED[name] and not any(found.summary["crossing"].values())


@pytest.mark.fault
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("id\n1\n", "no column split"),
        ("id,split\ncase_000,training\n", "'training'"),
        ("id,split\ncase_000,train\ncase_000,test\n", "'case_000' twice"),
        (
            "id,split\n" + "".join(f"case_{i:03d},train\n" for i in range(12)),
            "no case .* to val, test",
        ),
    ],
)
def test_a_split_file_that_cannot_be_used_is_refused_and_the_report_is_written(
    tmp_path, runs, text, words
):
    (tmp_path / "split.csv").write_text(text)
    folder = image_folder(tmp_path / "mine", 12, empty={3})
    with pytest.raises(SplitError, match=words):
        prepare(config(folder, split_file=str(tmp_path / "split.csv")))
    assert not list(runs.rglob("DONE"))
    [report] = runs.glob("prepare/*/report.csv")
    assert results.read_table(report)["id"].tolist() == ["case_003"]


@pytest.mark.fault
def test_an_official_split_that_is_not_there_is_refused(tmp_path, runs):
    with pytest.raises(SplitError, match=r"(?s)24 none.*split = 'groups'"):
        prepare(config(image_folder(tmp_path / "mine"), split="official"))


# Found, made again, resumed -----------------------------------------------------------------------


def snapshot(root):
    files = [path for path in root.rglob("*") if path.suffix != ".lock"]
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in files}


def test_the_second_call_finds_the_result_and_writes_nothing(tmp_path, runs, messages):
    folder = image_folder(tmp_path / "mine", 12)
    first = prepare(config(folder))
    before = snapshot(runs)
    assert prepare(config(folder)).path == first.path
    assert snapshot(runs) == before and len(messages()) == 2  # preparing, and the masks
    assert first.config["stage"] == "prepare" and results.is_done(first.path)


def test_changed_files_are_prepared_again_and_moved_ones_are_not(tmp_path, runs):
    folder = image_folder(tmp_path / "mine", 12)
    first = prepare(config(folder))
    os.utime(folder / "masks" / "case_003.png")
    moved = folder.rename(tmp_path / "elsewhere")
    assert prepare(config(moved)).digest == first.digest
    save(moved / "masks" / "case_003.png", lesion(9, top=5))  # as large, one pixel lower
    corrected = prepare(config(moved))
    assert corrected.path != first.path and (corrected.masks[3] != first.masks[3]).any()
    image = moved / "images" / "case_005.png"
    size = image.stat().st_size
    save(image, np.full_like(picture(5), 90))
    image.write_bytes(image.read_bytes().ljust(size, b"\0"))  # another picture, the same size
    repainted = prepare(config(moved))
    assert repainted.path != corrected.path
    assert (repainted.images[5] != corrected.images[5]).any()


@pytest.mark.fault
def test_an_interrupted_preparation_resumes_and_ends_with_the_same_bytes(
    tmp_path, monkeypatch, runs
):
    cfg, read, files = config(image_folder(tmp_path / "mine")), module.read, []

    def interrupted(case, window):
        files.append(case.id)
        if len(files) == 15:
            raise KeyboardInterrupt
        return read(case, window)

    monkeypatch.setattr(module, "PART", 4)
    monkeypatch.setattr(module, "read", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(cfg)
    assert len(list(runs.glob("prepare/*/parts/*.npz"))) == 3 and not list(runs.rglob("DONE"))
    resumed = prepare(cfg)
    assert {f"case_{i:03d}" for i in range(12)}.isdisjoint(files[15:])
    assert not (resumed.path / "parts").exists()
    monkeypatch.setenv("LESIONKD_RUNS", str(tmp_path / "undisturbed"))
    undisturbed = prepare(cfg)
    for name in FILES:
        assert (resumed.path / name).read_bytes() == (undisturbed.path / name).read_bytes()


@pytest.mark.fault
def test_a_damaged_part_of_an_interrupted_preparation_is_read_again(tmp_path, runs, monkeypatch):
    cfg = config(image_folder(tmp_path / "mine"))
    expected = prepare(cfg)
    images, folder = expected.images[:].copy(), expected.path
    monkeypatch.setattr(module, "_assemble", lambda *_, **__: 1 / 0)
    shutil.rmtree(folder)
    with pytest.raises(ZeroDivisionError):
        prepare(cfg)
    monkeypatch.undo()
    monkeypatch.setenv("LESIONKD_RUNS", str(runs))
    [part] = (folder / "parts").glob("*.npz")
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    part.write_bytes(content)
    assert np.array_equal(prepare(cfg).images, images)


CHILD = """
import time
from lesionkd_core import results
from lesionkd_core.config import PrepareConfig
from lesionkd_core.data.prepare import prepare
write = results.write_array
def write_and_wait(path, array):
    write(path, array)
    print("written", flush=True)
    time.sleep(600)
results.write_array = write_and_wait
prepare(PrepareConfig(cases=60, pixels=32))
"""


@pytest.mark.fault
def test_another_process_waits_and_continues_when_the_first_is_killed(runs, messages, monkeypatch):
    command = [sys.executable, "-c", CHILD]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as child:
        assert any("written" in line for line in iter(child.stdout.readline, ""))
        [half] = runs.glob("prepare/*/images.npy")
        assert not list(runs.rglob("DONE"))
        real = results.log.info

        def kill_the_holder(message):  # it is killed when this process says that it waits
            real(message)
            if "waiting" in message:
                child.kill()

        monkeypatch.setattr(results.log, "info", kill_the_holder)
        found = prepare(PrepareConfig(cases=60, pixels=32))
    words = f"another process ({child.pid} on "
    assert any(m.startswith(words) and "works on runs/prepare/" in m for m in messages())
    assert found.path == half.parent and results.is_done(found.path)
    assert len(found.images) == len(found.cases) >= 50


# Too little, absent -------------------------------------------------------------------------------


@pytest.mark.fault
def test_too_few_usable_cases_are_an_error_until_they_are_repaired(tmp_path, runs):
    folder = image_folder(tmp_path / "mine", 12)
    for i in range(4):
        path = folder / "images" / f"case_{i:03d}.png"
        path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(LesionKDError, match="8 usable cases; at least 10 are needed") as error:
        prepare(config(folder))
    assert all(f"case_{i:03d}.png: " in str(error.value) for i in range(4))
    assert not list(runs.rglob("DONE"))
    image_folder(folder, 12)
    assert len(prepare(config(folder)).cases) == 12


def folders(*names):
    return lambda root: [(root / name).mkdir(parents=True) for name in names]


BUSI = "Dataset_BUSI_with_GT"
ABSENT = {  # what is wrong: how it is made, the data set, words of the message
    "mistyped name": (folders(), "bussi", ["'bussi'", "did you mean 'busi'?"]),
    "no release": (folders(), "busi", [BUSI, "data/busi.md", "LESIONKD_DATA"]),
    "part of a release": (
        folders(f"{BUSI}/benign", f"{BUSI}/malignant"), "busi", ["normal", "data/busi.md"]
    ),
    "no images and masks": (folders("mine"), "mine", ["mine", "images", "masks"]),
}  # fmt: skip


@pytest.mark.fault
@pytest.mark.parametrize("what", ABSENT)
def test_an_absent_data_set_says_what_was_expected_and_where(tmp_path, monkeypatch, runs, what):
    make, dataset, words = ABSENT[what]
    monkeypatch.setenv("LESIONKD_DATA", str(tmp_path / "raw"))
    (tmp_path / "raw").mkdir()
    make(tmp_path / "raw")
    with pytest.raises(DatasetNotFound) as error:
        prepare(config(dataset))
    assert all(word in str(error.value) for word in [*words, str(tmp_path / "raw")]), error.value
    assert not runs.exists()


@pytest.mark.fault
def test_a_results_folder_that_cannot_be_made_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("LESIONKD_RUNS", str(save(tmp_path / "a_file.png", lesion(9))))
    with pytest.raises(LesionKDError, match=r"a_file\.png"):
        prepare(PrepareConfig(cases=20, pixels=32))
