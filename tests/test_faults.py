"""Bad input and what it gives: a row in the report or an error that says what to mend, never half a result."""

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from queue import Queue

import numpy as np
import pytest
from PIL import Image

from lesionkd_core import prepare, provenance, store
from lesionkd_core.__main__ import main
from lesionkd_core.config import AblationConfig, ConfigError, DistillConfig, LesionKDError
from lesionkd_core.datasets import DatasetNotFound
from lesionkd_core.prepare import PrepareConfig, prepare_data

from .conftest import ROOT
from .test_datasets import lesion, own_folder, picture, save
from .test_prepare import config, quiet
from .test_store import full_disk

pytestmark = pytest.mark.fault


@pytest.fixture(autouse=True)
def runs(tmp_path, monkeypatch):
    monkeypatch.setenv("LESIONKD_RUNS", str(tmp_path / "runs"))
    return tmp_path / "runs"


def cut(path, to=0.5):
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * to)])


def replace(path, make):
    path.unlink()
    make(path)


def noise(top, seed=0):
    return np.random.default_rng(seed).integers(0, top, (48, 64), dtype=np.uint8)


def pages(path, *stack):
    first, *rest = (Image.fromarray(np.asarray(page)) for page in stack)
    first.save(path, save_all=True, append_images=rest)


def nifti(path, voxels, shift=0.0):
    import nibabel as nib

    affine = np.diag([1.0, 1.0, 2.0, 1.0])
    affine[0, 3] = shift
    nib.save(nib.Nifti1Image(np.asarray(voxels, np.int16), affine), path)


def volume(root, image=(20, 24, 4), mask=(20, 24, 4), shift=0.0):
    """A NIfTI pair in place of case_003: image and mask of the given shapes."""
    for name in ("images", "masks"):
        (root / name / "case_003.png").unlink()
    nifti(root / "images/case_003.nii.gz", np.random.default_rng(0).integers(-500, 500, image))
    nifti(root / "masks/case_003.nii.gz", np.ones(mask), shift)


def mode(name, **options):
    return lambda p: Image.fromarray(picture(3)).convert(name).save(p, **options)


def nans(path):
    Image.fromarray(np.full((48, 64), np.nan, np.float32)).save(path)


def picture_for_a_volume(root):
    volume(root)
    (root / "masks/case_003.nii.gz").unlink()
    save(root / "masks/case_003.png", lesion(9))


def other(root, suffix, make, folder="images"):
    """case_003 as another kind of file."""
    (root / folder / "case_003.png").unlink()
    make(root / folder / f"case_003{suffix}")


SPOILT = {  # what is wrong: how it is made, the file that the report names, words of the reason
    "no mask": (lambda d: (d / "masks/case_003.png").unlink(), "case_003.png", ["case_003.png", "no mask"]),
    "no image": (lambda d: (d / "images/case_003.png").unlink(), "case_003.png", ["case_003.png", "no image belongs to this mask"]),
    "mask of another size": (lambda d: save(d / "masks/case_003.png", np.zeros((10, 20), np.uint8)), "case_003.png", ["20 x 10", "64 x 48"]),
    "mask turned by 90 degrees": (lambda d: save(d / "masks/case_003.png", lesion(9).T), "case_003.png", ["48 x 64", "64 x 48"]),
    "truncated image": (lambda d: cut(d / "images/case_003.png"), "case_003.png", ["case_003.png", "cannot be read"]),
    "truncated mask": (lambda d: cut(d / "masks/case_003.png"), "case_003.png", ["case_003.png", "cannot be read"]),
    "truncated JPEG": (lambda d: other(d, ".jpg", lambda p: (mode("RGB")(p), cut(p))), "case_003.jpg", ["case_003.jpg", "cannot be read"]),
    "empty file": (lambda d: cut(d / "images/case_003.png", 0), "case_003.png", ["cannot be read", "empty"]),
    "empty mask file": (lambda d: cut(d / "masks/case_003.png", 0), "case_003.png", ["cannot be read", "empty"]),
    "text called .png": (lambda d: (d / "images/case_003.png").write_text("<html>404</html>"), "case_003.png", ["cannot be read"]),
    "mask that is text": (lambda d: (d / "masks/case_003.png").write_text("0 1 1"), "case_003.png", ["cannot be read"]),
    "image that is a folder": (lambda d: replace(d / "images/case_003.png", lambda p: p.mkdir()), "case_003.png", ["cannot be read"]),
    "mask that is a folder": (lambda d: replace(d / "masks/case_003.png", lambda p: p.mkdir()), "case_003.png", ["cannot be read"]),
    "image link to nowhere": (lambda d: replace(d / "images/case_003.png", lambda p: p.symlink_to("gone.png")), "case_003.png", ["missing"]),
    "mask link to nowhere": (lambda d: replace(d / "masks/case_003.png", lambda p: p.symlink_to("gone.png")), "case_003.png", ["missing"]),
    "two images of one stem": (lambda d: save(d / "images/case_003.jpg", picture(99)), "case_003.jpg", ["two images", "'case_003'", "rename"]),
    "two masks of one stem": (lambda d: save(d / "masks/case_003.bmp", lesion(5)), "case_003.png", ["case_003.bmp", "masks of one name"]),
    "grey mask without black or white": (lambda d: save(d / "masks/case_003.png", 40 + noise(60)), "case_003.png", ["neither class numbers", "convert it"]),
    "mask of several pages": (lambda d: other(d, ".tif", lambda p: pages(p, lesion(9), lesion(5)), "masks"), "case_003.png", ["2 pages"]),
    "float image with NaN": (lambda d: other(d, ".tif", nans), "case_003.tif", ["NaN"]),
    "float mask with NaN": (lambda d: other(d, ".tif", nans, "masks"), "case_003.png", ["NaN"]),
    "more pixels than memory": (lambda d: (d / "images/case_003.png").write_bytes(BOMB), "case_003.png", ["cannot be read", "pixels"]),
    "broken NIfTI": (lambda d: (volume(d), cut(d / "images/case_003.nii.gz")), "case_003.nii.gz", ["case_003.nii.gz", "cannot be read as NIfTI"]),
    "broken NIfTI mask": (lambda d: (volume(d), cut(d / "masks/case_003.nii.gz")), "case_003.nii.gz", ["case_003.nii.gz", "cannot be read as NIfTI"]),
    "NIfTI mask of another shape": (lambda d: volume(d, mask=(20, 24, 5)), "case_003.nii.gz", ["(5, 24, 20)", "(4, 24, 20)"]),
    "NIfTI mask elsewhere": (lambda d: volume(d, shift=30.0), "case_003.nii.gz", ["30.0 mm off"]),
    "NIfTI of several volumes": (lambda d: volume(d, image=(20, 24, 4, 3)), "case_003.nii.gz", ["20 x 24 x 4 x 3", "several volumes"]),
    "NIfTI image, picture as mask": (picture_for_a_volume, "case_003.nii.gz", ["must be NIfTI"]),
    "text called .dcm": (lambda d: other(d, ".dcm", lambda p: p.write_text("no")), "case_003.dcm", ["case_003.dcm", "DICOM"]),
    "a folder without DICOM files": (lambda d: other(d, "", lambda p: (p.mkdir(), (p / "readme.txt").write_text("no"))), "case_003", ["case_003"]),
}
REPAIRED = {  # what is odd: how it is made, words of the note; the case is kept
    "EXIF turned image, mask as stored": (
        lambda d: other(d, ".jpg", lambda p: Image.fromarray(picture(3)).save(p, exif=turned(6))), ["EXIF", "mask turned like its image"],
    ),
    "CMYK": (lambda d: other(d, ".jpg", mode("CMYK")), ["CMYK converted"]),
    "16-bit grey": (lambda d: other(d, ".png", lambda p: Image.fromarray(noise(255).astype(np.uint16) * 200).save(p)), ["16-bit grey scaled"]),
    "float grey": (lambda d: other(d, ".tif", lambda p: Image.fromarray(noise(255).astype(np.float32) / 9).save(p)), ["float grey scaled"]),
    "transparency": (lambda d: save(d / "images/case_003.png", np.dstack([picture(3), noise(255)])), ["transparency dropped"]),
    "image of several pages": (lambda d: other(d, ".tif", lambda p: pages(p, picture(3), picture(4))), ["first of 2 pages"]),
    "mask of 0 and 1": (lambda d: save(d / "masks/case_003.png", lesion(9).astype(np.uint8)), ["values up to 1 read as lesion"]),
    "mask of classes 0, 1, 2": (lambda d: save(d / "masks/case_003.png", lesion(9).astype(np.uint8) + lesion(4)), ["values up to 2 read as lesion"]),
    "soft mask": (lambda d: save(d / "masks/case_003.png", soft()), ["mask pixels (", "between 0 and 255, cut at half"]),
    "mask in colours": (
        lambda d: save(d / "masks/case_003.png", lesion(9)[..., None] * np.uint8([200, 30, 30]) + lesion(5, top=30)[..., None] * np.uint8([0, 90, 0])),
        ["colours other than black"],
    ),
}


def turned(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def soft():
    return np.asarray(Image.fromarray(lesion(20).astype(np.uint8) * 255).resize((16, 12), Image.Resampling.BOX).resize((64, 48), Image.Resampling.BILINEAR))


def bomb():
    """A PNG header that announces 60,000 x 60,000 pixels."""
    import struct
    import zlib

    chunk = b"IHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk)) + b"\x00\x00\x00\x00IDAT" + b"\x00" * 40


BOMB = bomb()


@pytest.mark.parametrize("what", SPOILT)
def test_a_spoilt_case_is_left_out_and_reported(tmp_path, what):
    spoil, file, words = SPOILT[what]
    spoil(own_folder(tmp_path / "mine", 14))
    result = prepare_data(config(tmp_path / "mine"), quiet)
    assert result.cases["id"].tolist() == [f"case_{i:03d}" for i in range(14) if i != 3]
    dropped = result.report[result.report["action"] == "dropped"]
    assert set(dropped["id"]) == {"case_003"} and file in set(dropped["file"]), dropped.to_string()
    assert all(word in dropped["reason"].iloc[0] for word in words), dropped["reason"].iloc[0]


@pytest.mark.parametrize("what", REPAIRED)
def test_an_odd_case_is_kept_and_what_was_repaired_is_reported(tmp_path, what):
    make, words = REPAIRED[what]
    make(own_folder(tmp_path / "mine", 14))
    result = prepare_data(config(tmp_path / "mine"), quiet)
    assert result.cases["id"].tolist() == [f"case_{i:03d}" for i in range(14)]
    assert set(result.report["id"]) == {"case_003"} and set(result.report["action"]) == {"repaired"}
    said = " | ".join(result.report["reason"])
    assert all(word in said for word in words), said
    assert result.masks[3].any()


def test_the_fault_table_is_long_enough():
    assert len(SPOILT) + len(REPAIRED) + len(ABSENT) >= 40


@pytest.mark.parametrize("seed", range(4))
def test_two_images_of_one_stem_are_left_out_even_where_one_of_them_is_drawn(tmp_path, seed):
    save(own_folder(tmp_path / "mine", 14) / "images/case_003.jpg", picture(99))  # whose mask is case_003.png?
    assert "case_003" not in set(prepare_data(config(tmp_path / "mine", cases=13, split_seed=seed), quiet).cases["id"])


def busi_without_normal(root):
    for label in ("benign", "malignant"):
        (root / "Dataset_BUSI_with_GT" / label).mkdir(parents=True)


ABSENT = {  # what is wrong: how it is made, the data set asked for, words of the message
    "mistyped name": (lambda d: None, "bussi", ["'bussi'", "did you mean 'busi'?"]),
    "unlike any name": (lambda d: None, "qqqq", ["'qqqq'", "busi", "isic2018", "phantom-ct", "working folder"]),
    "release absent": (lambda d: None, "busi", ["'Dataset_BUSI_with_GT'", "'benign', 'malignant', 'normal'", "data/busi.md", "LESIONKD_DATA"]),
    "release in part": (busi_without_normal, "busi", ["'normal'", "data/busi.md"]),
    "isic2018 absent": (lambda d: None, "isic2018", ["'ISIC2018_Task1-2_Training_Input'", "'ISIC2018_Task1_Training_GroundTruth'", "data/isic2018.md"]),
    "no images/ and masks/": (lambda d: (d / "mine").mkdir(), "mine", ["mine", "'images'", "'masks'", "data/own.md"]),
    "masks/ absent": (lambda d: (d / "mine" / "images").mkdir(parents=True), "mine", ["'masks'", "data/own.md"]),
    "images/ empty": (lambda d: [(d / "mine" / n).mkdir(parents=True) for n in ("images", "masks")], "mine", ["no images", "'images' is empty"]),
}


@pytest.mark.parametrize("what", ABSENT)
def test_an_absent_data_set_says_what_was_looked_for_and_where(tmp_path, monkeypatch, runs, what):
    make, dataset, words = ABSENT[what]
    monkeypatch.setenv("LESIONKD_DATA", str(tmp_path / "raw"))
    (tmp_path / "raw").mkdir()
    make(tmp_path / "raw")
    with pytest.raises(DatasetNotFound) as error:
        prepare_data(config(dataset), quiet)
    assert all(word in str(error.value) for word in [*words, str(tmp_path / "raw")]), str(error.value)
    assert not runs.exists()


def test_a_mistyped_lesionkd_data_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("LESIONKD_DATA", str(tmp_path / "dta"))
    with pytest.raises(DatasetNotFound, match="dta"):
        prepare_data(config("cvc-clinicdb"), quiet)


def test_too_few_usable_cases_are_an_error_until_they_are_mended(tmp_path, runs):
    folder = own_folder(tmp_path / "mine", 12)
    for i in range(4):
        cut(folder / "images" / f"case_{i:03d}.png")
    with pytest.raises(LesionKDError, match="8 usable cases, wants at least 10") as error:
        prepare_data(config(folder), quiet)
    assert all(f"case_{i:03d}.png: cannot be read" in str(error.value) for i in range(4))
    assert not list(runs.rglob("DONE"))
    own_folder(folder, 12)
    assert len(prepare_data(config(folder), quiet).cases) == 12


def test_one_group_cannot_be_split(tmp_path):
    for i in range(12):
        save(tmp_path / "mine/images" / f"{i}.png", picture(1))
        save(tmp_path / "mine/masks" / f"{i}.png", lesion(9))
    with pytest.raises(LesionKDError, match="1 groups of cases are too few to fill val, test"):
        prepare_data(config(tmp_path / "mine"), quiet)


WRONG = [  # parameters, words of the message
    ({"sede": 1}, ["'sede'", "did you mean 'seed'?"]),
    ({"wfeat": 1.0}, ["'wfeat'", "did you mean 'w_feat'?"]),
    ({"xyzzy": 1}, ["'xyzzy'", "known are:", "split_seed"]),
    ({"pixels": "64"}, ["pixels = '64'", "integer", "multiple of 32"]),
    ({"pixels": 64.0}, ["pixels = 64.0", "integer"]),
    ({"pixels": 100}, ["pixels = 100", "multiple of 32"]),
    ({"pixels": 0}, ["pixels = 0", "32"]),
    ({"seed": True}, ["seed = True", "integer"]),
    ({"seed": -1}, ["seed = -1", "0"]),
    ({"val_fraction": 0.5}, ["val_fraction = 0.5", "less than 0.5"]),
    ({"w_feat": float("nan")}, ["w_feat = nan", "finite"]),
    ({"w_edge": float("inf")}, ["w_edge = inf", "finite"]),
    ({"profile": "fast"}, ["profile = 'fast'", "'smoke', 'cpu' or 'paper'"]),
    ({"dataset": ""}, ["dataset = ''", "at least 1 character"]),
    ({"terms": "feat, egde"}, ["'egde'", "did you mean 'edge'?"]),
    ({"terms": "feat, feat"}, ["terms", "twice"]),
    ({"arms": "method, metod"}, ["'metod'", "did you mean 'method'?"]),
    ({"arms": "method, method"}, ["arms", "twice"]),
    ({"arms": ""}, ["arms", "at least 1"]),
    ({"seeds": 0}, ["seeds = 0", "at least 1"]),
    ({"seeds": "0, one"}, ["seeds = '0, one'"]),
    ({"seeds": "0, -1"}, ["seeds", "-1"]),
    ({"sede": 1, "pixels": 7, "epochs": 0}, ["'sede'", "pixels = 7", "epochs = 0"]),
]


@pytest.mark.parametrize(("values", "words"), WRONG, ids=[str(values) for values, _ in WRONG])
def test_a_wrong_parameter_is_refused_with_its_name_and_what_fits(values, words):
    with pytest.raises(ConfigError) as error:
        (AblationConfig if {"arms", "seeds"} & set(values) else DistillConfig)(**values)
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize(("bound", "words"), [({"sede": 1}, "did you mean 'seed'"), ({"seed": "1"}, "seed = '1'"), ({"epochs": [3]}, r"epochs = \[3\]")])
def test_a_notebook_s_wrong_parameter_is_refused(bound, words):
    with pytest.raises(ConfigError, match=words):
        DistillConfig.from_notebook({"__name__": "__main__", "In": [""], "os": os, "Image": Image.Image, "quiet": quiet, "width": 2, **bound})


def test_a_notebook_s_parameters_can_be_taken_again_after_other_names_were_bound():
    namespace = {"__name__": "__main__", "_": 1, "Out": {}, "os": os, "seed": 3, "width": None}
    assert DistillConfig.from_notebook(namespace).seed == 3
    namespace |= {"cfg": 1, "prepared": "x", "seed": 4}
    cfg = DistillConfig.from_notebook(namespace)
    assert (cfg.seed, cfg.width) == (4, 4)
    with pytest.raises(ConfigError, match="seed = 'x'"):
        DistillConfig.from_notebook(namespace | {"seed": "x"})


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["04_destil"], "did you mean '04_distill'?"),
        (["04_distill", "-p", "wfeat", "1"], "did you mean 'w_feat'?"),
        (["04_distill", "-p", "seed", "one"], "seed = 'one'"),
        (["04_distill", "-p", "pixels", "64.5"], "pixels = 64.5"),
        (["01_data_prep", "-p", "seed", "1"], "unknown parameter 'seed'"),
    ],
)
def test_run_refuses_a_wrong_command_before_anything_starts(monkeypatch, capsys, runs, argv, words):
    monkeypatch.setattr("papermill.execute_notebook", lambda *_, **__: pytest.fail("the notebook was started"))
    assert main(["run", *argv]) == 1
    assert words in capsys.readouterr().err and not runs.exists()


def test_an_interrupted_preparation_goes_on_where_it_was_and_ends_as_if_undisturbed(tmp_path, monkeypatch, runs):
    cfg, read, files = config(own_folder(tmp_path / "mine")), prepare.read, []

    def interrupted(case, window):
        files.append(case.id)
        if len(files) == 15:
            raise KeyboardInterrupt
        return read(case, window)

    monkeypatch.setattr(prepare, "PART", 4)
    monkeypatch.setattr(prepare, "read", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare_data(cfg, quiet)
    assert len(list(runs.glob("prepare/*/parts/*.npz"))) == 3 and not list(runs.rglob("DONE"))
    after = prepare_data(cfg, quiet)
    assert {f"case_{i:03d}" for i in range(12)}.isdisjoint(files[15:]) and not (after.path / "parts").exists()
    monkeypatch.setenv("LESIONKD_RUNS", str(tmp_path / "undisturbed"))
    undisturbed = prepare_data(cfg, quiet)
    for name in ("split.csv", "images.npy", "masks.npy", "edges.npy", "hashes.npy", "cases.csv", "report.csv", "summary.json"):
        assert (after.path / name).read_bytes() == (undisturbed.path / name).read_bytes()


def test_a_part_that_was_cut_is_read_again(tmp_path, monkeypatch, runs):
    cfg, chosen_of = config(own_folder(tmp_path / "mine")), prepare._chosen_of
    monkeypatch.setattr(prepare, "_chosen_of", lambda *_: [][0])
    with pytest.raises(IndexError):
        prepare_data(cfg, quiet)
    [part] = runs.glob("prepare/*/parts/*.npz")
    cut(part)
    monkeypatch.setattr(prepare, "_chosen_of", chosen_of)
    assert len(prepare_data(cfg, quiet).images) == 24


CHILD = """
import time
from lesionkd_core import prepare, provenance, store
from lesionkd_core.prepare import PrepareConfig, prepare_data
write = store.write_array
def write_and_wait(path, array):
    write(path, array)
    print("written", flush=True)
    time.sleep(600)
store.write_array = write_and_wait
prepare_data(PrepareConfig(cases=60, pixels=32))
"""


def test_another_process_waits_and_goes_on_when_the_first_is_killed(runs):
    said = Queue()
    with subprocess.Popen([sys.executable, "-c", CHILD], stdout=subprocess.PIPE, text=True, cwd=ROOT) as child, ThreadPoolExecutor(1) as pool:
        try:
            assert any("written" in line for line in iter(child.stdout.readline, ""))
            [half] = runs.glob("prepare/*/images.npy")
            waiting = pool.submit(prepare_data, PrepareConfig(cases=60, pixels=32), said.put)
            assert re.match(rf"another process \({child.pid} on \S+\) works on runs/prepare/", said.get(timeout=60))
            assert not list(runs.rglob("DONE"))
        finally:
            child.kill()  # SIGKILL: the child can tidy nothing
        result = waiting.result(timeout=60)
    assert result.path == half.parent and store.is_done(result.path) and len(result.images) == len(result.cases) >= 50


def test_a_preparation_goes_through_once_there_is_space(tmp_path, monkeypatch, runs):
    monkeypatch.setattr(provenance, "commit", lambda: "")  # git must not meet the limit
    cfg = config(own_folder(tmp_path / "mine"))
    with full_disk(20_000), pytest.raises(LesionKDError, match=r"0000000\.npz"):
        prepare_data(cfg, quiet)
    assert not list(runs.rglob("DONE")) and not list(runs.rglob("*.partial"))
    assert len(prepare_data(cfg, quiet).images) == 24


def test_a_results_folder_that_cannot_be_made_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("LESIONKD_RUNS", str(save(tmp_path / "a_file.png", lesion(9))))
    with pytest.raises(LesionKDError, match=r"a_file\.png"):
        prepare_data(PrepareConfig(cases=20, pixels=32), quiet)
