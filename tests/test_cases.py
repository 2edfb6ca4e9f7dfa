"""Small data sets as people have them that version 0.1 read wrongly, with the right values."""

import csv
import shutil

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from lesionkd_core.config import ConfigError, LesionKDError, PrepareConfig, TeacherConfig
from lesionkd_core.data.layouts import DatasetNotFound, own_pairs
from lesionkd_core.data.prepare import prepare
from lesionkd_core.data.splits import SplitError
from tests.test_dicom import dicom
from tests.tiny import SIZE, image_folder, lesion, picture, save

pytestmark = pytest.mark.usefixtures("runs")


@pytest.fixture
def mine(tmp_path):
    """12 good pairs, case_000 to case_011, with square lesions of side 6 to 17."""
    return image_folder(tmp_path / "mine", 12)


def prepared(folder, **options):
    return prepare(PrepareConfig(dataset=str(folder), pixels=32, **options))


def areas(data):
    """Lesion pixels of the original masks by id."""
    share = data.cases.set_index("id")["lesion_fraction"]
    return (share * data.cases.set_index("id").eval("height * width")).round().astype(int)


def reason(data, case_id):
    return " | ".join(data.report.loc[data.report["id"] == case_id, "reason"])


def mask(folder, number, pixels):
    return save(folder / "masks" / f"case_{number:03d}.png", pixels)


def image(folder, number, pixels, suffix=".png"):
    (folder / "images" / f"case_{number:03d}.png").unlink()
    return save(folder / "images" / f"case_{number:03d}{suffix}", pixels)


# Masks --------------------------------------------------------------------------------------------


def test_scan_beside_scan2_is_sorted_and_kept(mine):
    for number, name in ((0, "scan"), (1, "scan2")):
        for folder in ("images", "masks"):
            (mine / folder / f"case_{number:03d}.png").rename(mine / folder / f"{name}.png")
    data = prepared(mine)
    assert data.cases["id"].tolist()[-2:] == ["scan", "scan2"] and len(data.cases) == 12


@pytest.mark.parametrize(("kind", "top"), [(np.uint8, 2), (np.uint8, 4), (np.int16, 7)])
def test_every_slice_with_a_class_keeps_its_lesion_whatever_the_scale_factor(tmp_path, kind, top):
    classes = np.zeros((20, 24, 6))
    classes[4:12, 6:16, 1:5] = np.random.default_rng(0).integers(1, top + 1, (8, 10, 4))
    body = np.random.default_rng(1).normal(0, 100, classes.shape).astype(np.float32)
    for name, voxels, stored in (("images", body, np.float32), ("masks", classes, kind)):
        volume = nib.Nifti1Image(voxels, np.eye(4))
        volume.set_data_dtype(stored)  # of floats: nibabel adds scl_slope
        (tmp_path / "mine" / name).mkdir(parents=True)
        nib.save(volume, tmp_path / "mine" / name / "a.nii.gz")
    data = prepared(tmp_path / "mine", split="test")
    assert areas(data).tolist() == [80] * 4
    assert data.summary["masks"].endswith("; lesion: all but 0")


def test_the_decision_is_printed_and_kept_and_a_mask_that_does_not_fit_is_named(mine, messages):
    for number in range(12):
        classes = lesion(10) + 2 * lesion(8, left=30) + 3 * lesion(6, top=30)
        mask(mine, number, classes.astype(np.uint8))
    mask(mine, 5, lesion(9))
    line = "masks: values 0, 1, 2, 3; lesion: all but 0; 1 of 12 do not fit"
    data = prepared(mine)
    assert line in messages() and data.summary["masks"] == line
    assert areas(data).tolist() == [200] * 11
    assert reason(data, "case_005") == (
        "case_005.png: values 0, 255: most masks have other values; name the lesion with "
        "lesion_values ('1, 3', 'all but 0', 'over 127' or '#ff0000'), or convert the mask to 0 "
        "and 255"
    )
    data = prepared(mine, lesion_values="1, 3")
    assert areas(data).tolist() == [136] * 11  # case_005 has no lesion
    assert data.summary["masks"] == "masks: values 0, 1, 2, 3, 255; lesion: 1, 3 (lesion_values)"


def test_the_decision_does_not_depend_on_the_cases_that_are_drawn(mine):
    mask(mine, 7, lesion(9).astype(np.uint8))
    lines = {prepared(mine, cases=11, split_seed=seed).summary["masks"] for seed in range(4)}
    assert lines == {"masks: values 0, 255; lesion: all but 0; 1 of 12 do not fit"}


def test_a_value_that_no_mask_has_is_an_error_before_anything_is_dropped(mine, runs):
    with pytest.raises(LesionKDError, match="values 0, 255; lesion_values names 1, which no mask"):
        prepared(mine, lesion_values="1")
    assert not list(runs.rglob("report.csv"))


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("lesion_values", "red", r"such as '1, 3', '#ff0000', 'all but 0' or 'over 127'"),
        ("lesion_values", "over 1, 2", "such as"),
        ("ignore_values", "255", "did you mean 'lesion_values'"),
    ],
)
def test_an_option_that_names_no_values_is_refused(option, value, words):
    with pytest.raises(ConfigError, match=words):
        PrepareConfig(**{option: value})


def test_notes_of_a_dropped_case_are_kept(mine):
    exif = Image.Exif()
    exif[0x0112] = 3
    save(mine / "images" / "case_004.png", picture(4), exif=exif)
    mask(mine, 4, lesion(0))
    expected = "no lesion (normals = drop); turned according to its EXIF orientation"
    assert reason(prepared(mine), "case_004").startswith(expected)


def test_lesions_black_on_white_are_a_warning_with_the_option_that_inverts(mine):
    for number in range(12):
        mask(mine, number, ~lesion(6 + number))
    [warning] = prepared(mine).summary["warnings"]
    assert warning.startswith("the median lesion covers 96% of its image") and "invert" in warning
    data = prepared(mine, invert_masks=True)
    assert areas(data).tolist() == [(6 + n) ** 2 for n in range(12)]
    assert data.summary["warnings"] == []
    assert data.summary["masks"] == "masks: values 0, 255; lesion: 0 (invert_masks)"


def test_a_few_lesions_black_on_white_are_a_warning_that_names_them(mine):
    for number in (1, 5):
        mask(mine, number, ~lesion(6 + number))
    [warning] = prepared(mine).summary["warnings"]
    assert warning.startswith("2 masks are lesion along the border and nearly everywhere, those of")
    assert "case_001.png, case_005.png" in warning and "invert" in warning


def test_outlines_in_place_of_lesions_are_a_warning(mine):
    for number in range(12):
        mask(mine, number, lesion(12 + number) & ~lesion(10 + number, 5, 7))
    [warning] = prepared(mine).summary["warnings"]
    assert warning.startswith("the masks look like outlines: filled, the median lesion is 5 times")


def test_masks_of_images_turned_by_exif_are_a_warning_also_if_they_are_found(mine, messages):
    exif = Image.Exif()
    exif[0x0112] = 3
    save(mine / "images" / "case_004.png", picture(4), exif=exif)
    for _ in range(3):  # made, found, and once more in the same process
        [warning] = prepared(mine).summary["warnings"]
    assert warning.startswith("1 images were turned") and "case_004.png" in warning
    assert messages().count(f"warning: {warning}") == 2


def test_masks_that_hardly_differ_are_a_warning(mine):
    for number in range(12):
        mask(mine, number, lesion(40, left=number // 6))
    [warning] = prepared(mine).summary["warnings"]
    assert warning.startswith("the masks of different images hardly differ (correlation")
    assert "fields of view" in warning


# Images -------------------------------------------------------------------------------------------


def test_16_bit_pictures_are_scaled_by_percentiles_or_the_window(mine):
    grey = picture(0)[..., 0].astype(np.uint16) * 16
    grey[0, 0] = 65535
    image(mine, 0, grey)
    data = prepared(mine)
    assert 80 < data.images[0].mean() < 170 and "stretched to black and white" in reason(
        data, "case_000"
    )
    low = prepared(mine, window="1600, 2").images[0]
    assert set(np.unique(low[4:, 4:])) >= {0, 255}


def test_pictures_that_show_nothing_are_reported(mine):
    image(mine, 0, np.full((*SIZE, 3), 97, np.uint8))
    image(mine, 1, picture(1) // 40)
    image(mine, 2, picture(2)[:20])
    mask(mine, 2, lesion(6)[:20])
    data = prepared(mine, split="test")
    assert reason(data, "case_000").startswith("nearly flat: all grey levels are near 97 of 255")
    assert reason(data, "case_001").startswith(("nearly black", "nearly flat"))
    assert reason(data, "case_002") == "64 x 20 px: a side is shorter than 32 px"
    assert set(data.report["action"]) == {"repaired"} and len(data.cases) == 12


# Pairs --------------------------------------------------------------------------------------------


def test_an_image_of_another_letter_case_does_not_get_the_mask(mine):
    save(mine / "images" / "CASE_000.png", picture(99))
    data = prepared(mine)
    assert reason(data, "CASE_000").startswith("CASE_000.png: no mask belongs to this image")
    assert len(data.cases) == 12


def renamed(folder, form):
    for path in sorted((folder / "masks").iterdir()):
        path.rename(path.with_name(form.format(path.stem) + path.suffix))


@pytest.mark.parametrize(
    ("form", "how"),
    [
        ("{}_mask", "the suffix '_mask'"),
        ("{}_segmentation", "the suffix '_segmentation'"),
        ("{}_seg", "the suffix '_seg'"),
        ("{}-mask", "the suffix '-mask'"),
        ("{}_GT", "the suffix '_gt'"),
        ("{}_lesion", "the suffix '_lesion'"),
        ("{}_label", "the suffix '_label'"),
        ("mask_{}", "the prefix 'mask_'"),
        ("{}.jpg", "the suffix of the image '.jpg'"),
    ],
)
def test_masks_are_found_by_what_all_their_names_add(mine, form, how):
    renamed(mine, form)
    data = prepared(mine, split="test")
    assert areas(data).tolist() == [(6 + n) ** 2 for n in range(12)] and data.report.empty
    assert data.summary["paired"] == f"masks paired by {how}"


def test_channel_numbers_of_nnu_net_are_no_part_of_the_name(mine):
    for path in [*(mine / "images").iterdir()]:
        path.rename(path.with_name(f"{path.stem}_0000.png"))
    (mine / "images").rename(mine / "imagesTr")
    (mine / "masks").rename(mine / "labelsTr")
    data = prepared(mine, split="test")
    assert areas(data).tolist() == [(6 + n) ** 2 for n in range(12)]


@pytest.mark.parametrize("name", ["Masks", "labels", "annotations", "Ground Truth", "ground_truth"])
def test_the_folder_of_masks_may_have_other_names(mine, name):
    (mine / "masks").rename(mine / "renamed")
    (mine / "renamed").rename(mine / name)
    assert len(prepared(mine).cases) == 12


def test_images_and_masks_may_share_a_folder(mine):
    renamed(mine, "{}_mask")
    for path in [*(mine / "images").iterdir(), *(mine / "masks").iterdir()]:
        shutil.move(path, mine / path.name)
    (mine / "images").rmdir(), (mine / "masks").rmdir()
    assert areas(prepared(mine)).tolist() == [(6 + n) ** 2 for n in range(12)]


def test_a_folder_may_hold_one_case_with_its_masks(mine, tmp_path):
    for number in range(12):
        case = tmp_path / "cases" / f"p{number:02d}"
        save(case / "images" / "a.png", picture(number))
        save(case / "masks" / "1.png", lesion(6))
        save(case / "masks" / "2.png", lesion(6, top=30))
    data = prepared(tmp_path / "cases")
    assert areas(data).tolist() == [72] * 12 and reason(data, "p03") == "2 masks united"
    assert data.summary["paired"] == "one folder for each case"


def test_sub_folders_are_the_official_split(mine, tmp_path):
    root, parts = tmp_path / "parts", {"train": range(8), "val": (8, 9), "test": (10, 11)}
    for part, numbers in parts.items():
        for number in numbers:
            for folder in ("images", "masks"):
                file = root / folder / part / f"{number}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(mine / folder / f"case_{number:03d}.png", file)
    cases = prepared(root, split="official").cases
    assert cases["split"].value_counts().to_dict() == {"train": 8, "val": 2, "test": 2}
    assert set(cases["id"]) == {f"{part}-{n}" for part, numbers in parts.items() for n in numbers}


def test_names_that_do_not_match_are_shown(mine):
    for number, path in enumerate(sorted((mine / "masks").iterdir())):
        path.rename(path.with_name(f"drawing {chr(97 + number)}.png"))
    with pytest.raises(DatasetNotFound) as error:
        own_pairs(mine)
    assert "case_000.png, case_001.png, case_002.png (12)" in str(error.value)
    assert "drawing a.png, drawing b.png, drawing c.png (12)" in str(error.value)


def test_two_ways_to_pair_are_refused(mine):
    for path in [*(mine / "masks").iterdir()]:
        shutil.copy(path, path.with_name(f"{path.stem}_mask.png"))
        path.rename(path.with_name(f"{path.stem}_label.png"))
    with pytest.raises(DatasetNotFound, match="no mask can be assigned"):
        own_pairs(mine)


def test_a_dicom_file_without_suffix_is_named_as_such(mine):
    dicom(mine / "images" / "IM0001", np.zeros(SIZE, np.int16))
    assert "a DICOM file; give it the suffix .dcm" in reason(prepared(mine), "IM0001")


# Groups, and what is checked before training ------------------------------------------------------


def listed(folder, patients):
    """A manifest with the number of the patient of every image."""
    with open(folder / "list.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(("image", "mask", "group"))
        for number, patient in enumerate(patients):
            name = f"case_{number:03d}.png"
            table.writerow((f"images/{name}", f"masks/{name}", f"P{patient}"))
    return folder / "list.csv"


def test_a_split_error_says_what_was_dropped_and_where_the_report_is(mine, runs):
    for number in range(2):
        mask(mine, number, np.zeros((10, 20), np.uint8))
    with pytest.raises(SplitError, match=r"dropped: 2 \(all in report\.csv in .*\n.*10 px"):
        prepared(listed(mine, [n % 2 for n in range(12)]))
    [report] = runs.rglob("report.csv")
    assert report.read_text().count("mask is 20 x 10 px") == 2


def test_other_test_data_are_looked_for_before_training(mine):
    with pytest.raises(DatasetNotFound, match="'nowhere'"):
        prepare(TeacherConfig(dataset=str(mine), test_dataset="nowhere"))


def test_a_folder_may_be_called_2024(mine, monkeypatch):
    monkeypatch.chdir(mine.parent)
    mine.rename("2024")
    assert len(prepare(PrepareConfig(dataset=2024, pixels=32)).cases) == 12
