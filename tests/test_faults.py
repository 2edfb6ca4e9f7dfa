"""Bad files in a data set: a row of the report says what is wrong, the other cases are prepared."""

import numpy as np
import pytest
import SimpleITK as sitk
from PIL import Image

from lesionkd_core import results
from lesionkd_core.config import LesionKDError
from lesionkd_core.data.prepare import prepare
from tests.test_prepare import config
from tests.test_results import full_disk
from tests.tiny import image_folder, lesion, picture, save, save_pages

pytestmark = pytest.mark.fault
GOOD = 14
"""Cases without a fault, before those of the tables."""


def image_of(d, name):
    return d / "images" / f"{name}.png"


def mask_of(d, name):
    return d / "masks" / f"{name}.png"


def cut(path, to=0.5):
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * to)])


def instead(path, make, suffix=".png"):
    """Another kind of file in place of a picture."""
    path.unlink()
    make(path.with_suffix(suffix))


def noise(top):
    return np.random.default_rng(0).integers(0, top, (48, 64), dtype=np.uint8)


def saved(pixels, **options):
    return lambda path: save(path, pixels, **options)


def broken_volume(d, name):
    voxels = 255 * np.random.default_rng(0).integers(0, 2, (4, 24, 20), np.uint8)
    for path in (image_of(d, name), mask_of(d, name)):
        path.unlink()
        sitk.WriteImage(sitk.GetImageFromArray(voxels), path.with_suffix(".nii.gz"))
    cut(d / "images" / f"{name}.nii.gz")


SPOILT = {  # what is wrong: how it is made from folder and name; words of the reason
    "no mask": (lambda d, n: mask_of(d, n).unlink(), ["no mask"]),
    "no image": (lambda d, n: image_of(d, n).unlink(), ["no image belongs to this mask"]),
    "mask of another size": (
        lambda d, n: save(mask_of(d, n), np.zeros((10, 20), np.uint8)),
        ["20 x 10 px", "64 x 48 px"],
    ),
    "truncated image": (lambda d, n: cut(image_of(d, n)), ["cannot be read"]),
    "two images of one name": (
        lambda d, n: save(image_of(d, n).with_suffix(".jpg"), picture(999)),
        ["two images are called"],
    ),
    "broken volume": (broken_volume, ["cannot be read"]),
}


def turned(path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(picture(3)).save(path, exif=exif)


def two_pages(path):
    save_pages(path, picture(32), picture(33))


REPAIRED = {  # what is odd: how it is made; words of the note; the case is kept
    "EXIF": (lambda d, n: instead(image_of(d, n), turned, ".jpg"), ["EXIF"]),
    "CMYK": (
        lambda d, n: instead(image_of(d, n), saved(picture(30), mode="CMYK"), ".jpg"),
        ["CMYK converted"],
    ),
    "several pages": (
        lambda d, n: instead(image_of(d, n), two_pages, ".tif"),
        ["first of 2 pages"],
    ),
}
NAMES = {what: f"case_{GOOD + i:03d}" for i, what in enumerate([*SPOILT, *REPAIRED])}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """One data set with all of them."""
    root = image_folder(tmp_path_factory.mktemp("raw") / "mine", GOOD)
    for what, name in NAMES.items():
        save(image_of(root, name), picture(100 + int(name[-3:])))
        save(mask_of(root, name), lesion(9))
        (SPOILT | REPAIRED)[what][0](root, name)
    return prepare(config(root))


@pytest.mark.parametrize("what", SPOILT)
def test_a_spoilt_case_is_left_out_and_reported(prepared, what):
    rows = prepared.report[prepared.report["id"] == NAMES[what]]
    assert set(rows["action"]) == {"dropped"} and rows["file"].str.startswith(NAMES[what]).all()
    assert all(word in rows["reason"].iloc[0] for word in SPOILT[what][1]), rows["reason"].iloc[0]


@pytest.mark.parametrize("what", REPAIRED)
def test_an_odd_case_is_kept_and_its_repair_is_reported(prepared, what):
    rows = prepared.report[prepared.report["id"] == NAMES[what]]
    assert set(rows["action"]) == {"repaired"}
    said = " | ".join(rows["reason"])
    assert all(word in said for word in REPAIRED[what][1]), said
    [row] = np.flatnonzero(prepared.cases["id"] == NAMES[what])
    assert prepared.masks[row].any()


def test_all_other_cases_are_kept_without_a_remark(prepared):
    good = {f"case_{i:03d}" for i in range(GOOD)}
    odd = {NAMES[what] for what in REPAIRED}
    assert set(prepared.cases["id"]) == good | odd
    assert set(prepared.report["id"]) == set(NAMES.values())
    assert prepared.summary["dropped"] == len(SPOILT)


def test_two_images_of_one_name_are_left_out_even_if_one_of_them_is_drawn(tmp_path, runs):
    root = image_folder(tmp_path / "mine", 14)
    save(root / "images/case_003.jpg", picture(99))  # whose mask is case_003.png?
    for seed in range(4):
        found = prepare(config(root, cases=13, split_seed=seed))
        assert "case_003" not in set(found.cases["id"])


def test_a_preparation_succeeds_once_there_is_space(tmp_path, monkeypatch, runs):
    monkeypatch.setattr(results, "commit", lambda: "")  # git must not meet the limit
    cfg = config(image_folder(tmp_path / "mine"))
    with full_disk(20_000), pytest.raises(LesionKDError, match=r"cannot write .*0000000\.npz"):
        prepare(cfg)
    assert not list(runs.rglob("DONE")) and not list(runs.rglob("*.partial"))
    assert len(prepare(cfg).images) == 24
