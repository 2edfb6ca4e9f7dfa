"""Release layouts in miniature, manifests, and the real releases where they are here."""

import csv
import re

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from PIL import Image

from lesionkd_core.config import PrepareConfig
from lesionkd_core.data.images import UnreadableFile
from lesionkd_core.data.layouts import (
    CATALOGUE,
    LAYOUTS,
    DatasetNotFound,
    ManifestError,
    find,
    fingerprint,
    read,
    window_of,
)
from lesionkd_core.data.masks import read_case

from .conftest import ROOT
from .test_dicom import dicom
from .test_volumes import HU, LESION, same, windowed
from .tiny import SIZE, image_folder, lesion, picture, save


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.setenv("LESIONKD_DATA", str(tmp_path))
    return tmp_path


def cases_of(dataset):
    _, cases = fingerprint(PrepareConfig(dataset=str(dataset)))
    return {case.id: case for case in cases}


def sides(cases):
    """Side of the square lesion in every mask."""
    return {name: int(read_case(case).mask.sum() ** 0.5) for name, case in cases.items()}


def touch(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


def isic(folder, images, masks, numbers, mark="_segmentation"):
    for number in numbers:
        save(folder / images / f"ISIC_{number:07d}.jpg", picture(number))
        save(folder / masks / f"ISIC_{number:07d}{mark}.png", lesion(number))
    return folder


def test_isic2018_reads_every_part_with_its_split(data):
    isic(
        data / "isic2018",
        "ISIC2018_Task1-2_Training_Input",
        "ISIC2018_Task1_Training_GroundTruth",
        (7, 12),
    )
    isic(
        data / "isic2018",
        "ISIC2018_Task1-2_Validation_Input",
        "ISIC2018_Task1_Validation_GroundTruth",
        (9,),
    )
    isic(data / "isic2018", "ISIC2018_Task1-2_Test_Input", "ISIC2018_Task1_Test_GroundTruth", (11,))
    (data / "isic2018" / "ISIC2018_Task1-2_Training_Input" / "ATTRIBUTION.txt").write_text(
        "is in the official archive"
    )
    cases = cases_of("isic2018")
    assert {name: case.split for name, case in cases.items()} == {
        "ISIC_0000007": "train",
        "ISIC_0000012": "train",
        "ISIC_0000009": "val",
        "ISIC_0000011": "test",
    }
    assert list(sides(cases).values()) == [7, 12, 9, 11]


def test_isic2017_ignores_superpixels_and_a_part_without_masks(data):
    folder = isic(
        data / "challenge",
        "ISIC-2017_Training_Data",
        "ISIC-2017_Training_Part1_GroundTruth",
        (8, 9),
    )
    save(folder / "ISIC-2017_Training_Data" / "ISIC_0000008_superpixels.png", picture(3))
    save(folder / "ISIC-2017_Validation_Data" / "ISIC_0000005.jpg", picture(5))
    isic(folder, "ISIC-2017_Test_v2_Data", "ISIC-2017_Test_v2_Part1_GroundTruth", (10,))
    assert {name: case.split for name, case in cases_of("isic2017").items()} == {
        "ISIC_0000008": "train",
        "ISIC_0000009": "train",
        "ISIC_0000010": "test",
    }


def test_isic2016_masks_are_called_Segmentation(data):
    folder = data / "isic2016"
    isic(
        folder,
        "ISBI2016_ISIC_Part1_Training_Data",
        "ISBI2016_ISIC_Part1_Training_GroundTruth",
        (6, 13),
        "_Segmentation",
    )
    isic(
        folder,
        "ISBI2016_ISIC_Part1_Test_Data",
        "ISBI2016_ISIC_Part1_Test_GroundTruth",
        (10,),
        "_Segmentation",
    )
    assert sides(cases_of("isic2016")) == {
        "ISIC_0000006": 6,
        "ISIC_0000013": 13,
        "ISIC_0000010": 10,
    }


def test_archives_unpacked_into_folders_of_their_own_are_read(data):
    twice = [f"{name}/{name}" for name in CATALOGUE["isic2018"].holds]
    isic(data / "isic2018", *twice, (7,))
    assert sides(cases_of("isic2018")) == {"ISIC_0000007": 7}


def test_ph2_pairs_folders_and_reads_the_diagnosis(data):
    folder = data / "PH2Dataset"
    for name in ("IMD002", "IMD010", "IMD435"):
        place = folder / "PH2 Dataset images" / name
        save(place / f"{name}_Dermoscopic_Image" / f"{name}.bmp", picture(1))
        save(place / f"{name}_lesion" / f"{name}_lesion.bmp", lesion(int(name[3:]) % 20 + 4))
        save(place / f"{name}_roi" / f"{name}_R1_Label4.bmp", lesion(3))
    (folder / "PH2_dataset.txt").write_text(
        "||  Name  || Histological Diagnosis || Clinical Diagnosis || Asymmetry |\n"
        "|| IMD002 ||                        ||                  0 || 0 | T | A ||  4 ||\n"
        "|| IMD010 ||                        ||                  1 || 0 | T | A ||  4 ||\n"
        "|| IMD435 || Melanoma               ||                  2 || 2 | AT | A ||  4 5 ||\n"
        "\nLegend\n"
    )
    cases = cases_of("ph2")
    assert {name: case.label for name, case in cases.items()} == {
        "IMD002": "common nevus",
        "IMD010": "atypical nevus",
        "IMD435": "melanoma",
    }
    assert sides(cases) == {"IMD002": 6, "IMD010": 14, "IMD435": 19}


def small_busi(root):
    folder = root / "Dataset_BUSI_with_GT"
    for name in ("benign (1)", "benign (2)", "benign (10)", "malignant (1)", "normal (1)"):
        save(folder / name.split()[0] / f"{name}.png", picture(1))
    save(folder / "benign" / "benign (1)_mask.png", lesion(8))
    save(folder / "benign" / "benign (1)_mask_1.png", lesion(5, top=30, left=40))
    save(folder / "benign" / "benign (1)_mask_2.png", lesion(3, top=20, left=50))
    save(folder / "benign" / "benign (2)_mask.png", lesion(9), "RGB")
    save(folder / "benign" / "benign (10)_mask.png", lesion(10), "1")
    save(folder / "malignant" / "malignant (1)_mask.png", lesion(11), "RGBA")
    save(folder / "normal" / "normal (1)_mask.png", lesion(0))
    return folder


def test_busi_unites_several_masks_and_reads_every_kind(data):
    small_busi(data)
    cases = cases_of("busi")
    assert list(cases) == [
        "benign (1)",
        "benign (2)",
        "benign (10)",
        "malignant (1)",
        "normal (1)",
    ]  # 2 before 10
    assert [case.label for case in cases.values()] == ["benign"] * 3 + ["malignant", "normal"]
    masks = {name: read_case(case).mask for name, case in cases.items()}
    assert (
        masks["benign (1)"] == lesion(8) | lesion(5, top=30, left=40) | lesion(3, top=20, left=50)
    ).all()
    for name, side in (
        ("benign (2)", 9),
        ("benign (10)", 10),
        ("malignant (1)", 11),
        ("normal (1)", 0),
    ):
        assert (masks[name] == lesion(side)).all(), name


def test_kvasir_seg_masks_are_jpeg(data):
    for name, mask in (("a", lesion(16, 8, 8)), ("b", lesion(21, 11, 13))):
        save(data / "Kvasir-SEG" / "images" / f"{name}.jpg", picture(1))
        save(data / "Kvasir-SEG" / "masks" / f"{name}.jpg", mask, "RGB", quality=75)
    masks = {name: read_case(case).mask for name, case in cases_of("kvasir-seg").items()}
    assert (masks["a"] == lesion(16, 8, 8)).all()  # on the borders of JPEG's blocks
    assert (masks["b"] != lesion(21, 11, 13)).mean() < 0.01


@pytest.mark.parametrize(
    ("place", "suffix"),
    [
        ("cvc-clinicdb", "tif"),
        ("CVC-ClinicDB", "tif"),
        ("archive/PNG", "png"),
        ("archive/TIF", "tif"),
    ],
)
def test_cvc_clinicdb_groups_frames_by_video(data, place, suffix):
    for frame in (1, 2, 25, 26, 50, 51, 612):
        save(data / place / "Original" / f"{frame}.{suffix}", picture(frame))
        save(
            data / place / "Ground Truth" / f"{frame}.{suffix}",
            np.where(lesion(9), 250, 3).astype(np.uint8),
        )  # grey, not quite black and white
    cases = cases_of("cvc-clinicdb")
    assert {int(name): case.group for name, case in cases.items()} == {
        1: "video-1",
        2: "video-1",
        25: "video-1",
        26: "video-2",
        50: "video-2",
        51: "video-3",
        612: "video-29",
    }
    assert set(sides(cases).values()) == {9}


def test_every_frame_of_cvc_clinicdb_has_a_video():
    with open(ROOT / "data" / "cvc-clinicdb-videos.csv", newline="") as file:
        spans = [(int(row["first_frame"]), int(row["last_frame"])) for row in csv.DictReader(file)]
    assert len(spans) == 29 and [
        frame for first, last in spans for frame in range(first, last + 1)
    ] == list(range(1, 613))


def test_cvc_colondb_in_one_folder(data):
    for frame in (1, 2, 10):
        save(data / "CVC-ColonDB" / f"{frame}.bmp", picture(frame))
        save(data / "CVC-ColonDB" / f"p{frame}.bmp", lesion(8 + frame))
        save(data / "CVC-ColonDB" / f"s{frame}.bmp", lesion(40))
        save(data / "CVC-ColonDB" / f"c{frame}.bmp", lesion(3))
    assert sides(cases_of("cvc-colondb")) == {"1": 9, "2": 10, "10": 18}


def test_cvc_colondb_of_the_benchmarks_names_the_mask_without_an_image(data):
    folder = data / "TestDataset" / "CVC-ColonDB"
    for frame in (1, 2, 380):
        save(folder / "masks" / f"{frame}.png", lesion(9))
    for frame in (1, 2):
        save(folder / "images" / f"{frame}.png", picture(frame))
    cases = cases_of("cvc-colondb")
    assert list(cases) == ["1", "2", "380"] and [bool(case.problem) for case in cases.values()] == [
        False,
        False,
        True,
    ]
    with pytest.raises(UnreadableFile, match=r"^380\.png: no image belongs to this mask$"):
        next(read(cases["380"]))


@pytest.mark.parametrize("kind", ["original", "benchmark"])
def test_etis_larib_in_either_layout(data, kind):
    for frame in (1, 2, 196):
        original = kind == "original"
        save(
            data
            / "ETIS-LaribPolypDB"
            / ("ETIS-LaribPolypDB" if original else "images")
            / f"{frame}.{'tif' if original else 'png'}",
            picture(frame),
        )
        save(
            data
            / "ETIS-LaribPolypDB"
            / (f"Ground Truth/p{frame}.tif" if original else f"masks/{frame}.png"),
            lesion(frame % 30 + 2),
        )
    assert sides(cases_of("etis-larib")) == {"1": 3, "2": 4, "196": 18}


def test_fuseg_takes_its_parts_from_the_repository(data):
    folder = (
        data / "fuseg" / "wound-segmentation-master" / "data" / "Foot Ulcer Segmentation Challenge"
    )
    for part, name, side in (
        ("train", "0011", 8),
        ("train", "0020", 9),
        ("validation", "0001", 10),
    ):
        save(folder / part / "images" / f"{name}.png", picture(side))
        save(folder / part / "labels" / f"{name}.png", lesion(side))
    save(
        folder / "test" / "images" / "0020.png", picture(3)
    )  # the challenge keeps these labels, or kept them
    assert {name: case.split for name, case in cases_of("fuseg").items()} == {
        "train-0011": "train",
        "train-0020": "train",
        "validation-0001": "val",
    }
    save(folder / "test" / "labels" / "0020.png", lesion(11))
    cases = cases_of("fuseg")
    assert cases["test-0020"].split == "test" and {case.group for case in cases.values()} == {""}
    assert sides(cases) == {
        "train-0011": 8,
        "train-0020": 9,
        "validation-0001": 10,
        "test-0020": 11,
    }


def test_medetec_keeps_the_copies_of_one_ulcer_together_and_reads_masks_of_ones(data):
    folder = data / "Medetec_foot_ulcer_224"
    for part, names in (
        ("train", ("foot-ulcer-0001", "foot-ulcer-0001_2", "foot-ulcer-0028")),
        ("test", ("foot-ulcer-0028", "foot-ulcer-0028_1")),
    ):
        for name in names:
            save(folder / part / "images" / f"{name}.png", picture(1))
            save(folder / part / "labels" / f"{name}.png", lesion(9).astype(np.uint8))
    cases = cases_of("medetec")
    assert len(cases) == 5 and set(sides(cases).values()) == {9}
    groups = {name: case.group for name, case in cases.items()}
    assert (
        groups["train-foot-ulcer-0001"]
        == groups["train-foot-ulcer-0001_2"]
        != groups["train-foot-ulcer-0028"]
        == groups["test-foot-ulcer-0028_1"]
    )


def test_covid_scans_of_one_patient_share_a_group(data):
    names = (
        "coronacases_001",
        "coronacases_002",
        "radiopaedia_4_85506_1",
        "radiopaedia_29_86490_1",
        "radiopaedia_29_86491_1",
    )
    for name in names:
        touch(data / "covid" / "COVID-19-CT-Seg_20cases" / f"{name}.nii.gz")
        touch(data / "covid" / "Infection_Mask" / f"{name}.nii.gz")
        touch(data / "covid" / "Lung_Mask" / f"{name}.nii.gz")
    assert [case.group for case in cases_of("covid19-20cases").values()] == [
        "coronacases_001",
        "coronacases_002",
        "radiopaedia_4",
        *["radiopaedia_29"] * 2,
    ]
    assert all(
        len(case.masks) == 1 and case.masks[0].parent.name == "Infection_Mask"
        for case in cases_of("covid19-20cases").values()
    )


def test_medseg_volumes_are_patients_and_do_not_mix_with_the_other_covid_release(data):
    for folder, masks, names in (
        ("rp_im", "rp_msk", ("1", "2", "9")),
        ("COVID-19-CT-Seg_20cases", "Infection_Mask", ("coronacases_001",)),
    ):
        for name in names:
            touch(data / "ct" / folder / f"{name}.nii.gz")
            touch(data / "ct" / masks / f"{name}.nii.gz")
    assert [(case.id, case.group) for case in cases_of("covid19-medseg").values()] == [
        ("1", "1"),
        ("2", "2"),
        ("9", "9"),
    ]
    assert list(cases_of("covid19-20cases")) == ["coronacases_001"]


@pytest.mark.parametrize("pages", [30, 7])
def test_the_sections_of_em_stacks_are_grouped_in_blocks(data, pages):
    folder = data / "em"
    folder.mkdir()
    for name, shift in (("train-volume", 100), ("train-labels", 0)):
        stack = [
            Image.fromarray(lesion(3 + i).astype(np.uint8) * 255 - shift) for i in range(pages)
        ]
        stack[0].save(folder / f"{name}.tif", save_all=True, append_images=stack[1:])
    cases = cases_of("em-isbi2012")
    assert list(cases)[:2] == ["section-00", "section-01"] and len(cases) == pages
    groups = [case.group for case in cases.values()]
    assert groups[:7] == ["sections-00-05"] * 6 + [f"sections-06-{min(pages - 1, 11):02d}"]
    assert len(set(groups)) == (5 if pages == 30 else 2)
    assert list(sides(cases).values()) == list(range(3, 3 + pages))  # 255, the interior


def pancreas(root, above="manifest-1599750808610/Pancreas-CT", patients=(1, 2, 25)):
    """Series and labels as the archive names them; the labels have lost their position."""
    for number in patients:
        name = f"PANCREAS_{number:04d}"
        scan = root / above / name / f"11-24-2015-{name}-Pancreas-18957" / "Pancreas-99667"
        for z, pixels in enumerate(HU):
            position, file = [-30, -12, -40 + 2.5 * z], scan / f"1-{z + 1:03d}.dcm"
            uid = f"1.2.{number}"
            about = {"SeriesInstanceUID": uid, "PatientID": name, "InstanceNumber": z + 1}
            dicom(file, pixels, ImagePositionPatient=position, **about)
        labels = root / "TCIA_pancreas_labels-02-05-2017"
        labels.mkdir(parents=True, exist_ok=True)
        voxels = np.roll(LESION, number, 2).astype(np.uint8).transpose(2, 1, 0)
        nib.save(
            nib.Nifti1Image(voxels, np.diag([0.5, 0.75, 2.5, 1])),
            labels / f"label{number:04d}.nii.gz",
        )
    return root


@pytest.mark.parametrize("above", ["manifest-1599750808610/Pancreas-CT", "Pancreas-CT", "DOI", "."])
def test_pancreas_ct_pairs_series_and_labels_by_patient(data, above):
    pancreas(data / "pancreas", above)
    cases = cases_of("nih-pancreas")
    assert [(case.id, case.group) for case in cases.values()] == [
        ("PANCREAS_0001", "PANCREAS_0001"),
        ("PANCREAS_0002", "PANCREAS_0002"),  # 25 was withdrawn
    ]
    readings = same(read(cases["PANCREAS_0002"]), windowed(HU, -100, 240), np.roll(LESION, 2, 2))
    assert readings[0].id == "PANCREAS_0002_z000"
    assert any("matched voxel by voxel" in note for r in readings for note in r.notes)


def test_a_patient_with_two_series_is_refused(data):
    folder = pancreas(data / "pancreas") / "manifest-1599750808610/Pancreas-CT/PANCREAS_0001"
    dicom(folder / "study" / "other" / "1-001.dcm", HU[0])
    with pytest.raises(UnreadableFile, match="PANCREAS_0001: holds 2 series"):
        next(read(cases_of("nih-pancreas")["PANCREAS_0001"]))


def test_the_window_of_a_release_is_the_default():
    assert window_of(PrepareConfig(dataset="nih-pancreas")) == "70, 340"
    assert window_of(PrepareConfig(dataset="nih-pancreas", window="40, 400")) == "40, 400"
    assert window_of(PrepareConfig(dataset="busi")) == window_of(PrepareConfig()) == ""


@pytest.mark.parametrize(
    "place",
    ["Dataset_BUSI_with_GT", "", "..", "archive"],
    ids=["itself", "its parent", "two above", "renamed"],
)
def test_a_release_is_found_where_people_unpack_it(tmp_path, monkeypatch, place):
    root = tmp_path / "unpacked"
    folder = small_busi(root)
    if place == "archive":  # the folder renamed
        folder = folder.rename(root / place)
        place = ""
    monkeypatch.setenv("LESIONKD_DATA", str(root / place))
    assert find("busi")[1].resolve() == folder


def test_the_folder_of_the_official_name_is_preferred_to_a_copy(data):
    isic(data / "a copy", *CATALOGUE["isic2018"].holds, (7,))
    isic(data / "isic2018", *CATALOGUE["isic2018"].holds, (8,))
    assert find("isic2018")[1] == data / "isic2018"


@pytest.mark.parametrize("name", ["kvasir-seg", "cvc-colondb", "etis-larib", "fuseg", "medetec"])
def test_a_folder_of_ones_own_is_not_taken_for_a_release(data, name):
    image_folder(data / "mine", 1)
    image_folder(data / "parts" / "train", 1)
    save(data / "parts" / "train" / "labels" / "a.png", lesion(9))
    with pytest.raises(
        DatasetNotFound, match=f"{name}: no folder '{CATALOGUE[name].folder}' with .* under {data}"
    ) as error:
        find(name)
    assert f"data/{name}.md" in str(error.value) and "LESIONKD_DATA" in str(error.value)


def test_own_data_pairs_equal_stems_of_any_suffix(data):
    suffixes = (
        ("a.JPG", "a.png"),
        ("b 1.jpeg", "b 1.bmp"),
        ("c.tif", "c.tiff"),
        ("d.webp", "d.png"),
        ("e.x.png", "E.X.png"),
    )
    for image, mask in suffixes:
        save(data / "mine" / "images" / image, picture(1))
        save(data / "mine" / "masks" / mask, lesion(9))
    (data / "mine" / "images" / ".hidden.png").write_text("left by a file manager")
    (data / "mine" / "images" / "Thumbs.db").write_text("likewise")
    assert list(cases_of("mine")) == list(cases_of(data / "mine")) == ["a", "b 1", "c", "d", "e.x"]
    for case in cases_of("mine").values():
        reading = read_case(case)
        assert (
            reading.image.shape == (*SIZE, 3)
            and reading.image.dtype == np.uint8
            and (reading.mask == lesion(9)).all()
        )


@pytest.mark.fault
def test_images_of_an_unknown_format_are_named_as_such(data):
    (data / "mine" / "masks").mkdir(parents=True)
    touch(data / "mine" / "images" / "a.heic")
    assert (
        cases_of("mine")["a.heic"].problem
        == "a.heic: .heic files are not read; convert it to PNG or TIFF"
    )


@pytest.mark.fault
def test_a_folder_that_may_not_be_listed_is_named(data, monkeypatch):
    def refuse(folder):
        raise PermissionError(13, "Permission denied", str(folder))

    small_busi(data)
    monkeypatch.setitem(LAYOUTS, "busi", refuse)
    with pytest.raises(
        DatasetNotFound, match=r"^busi: .*Dataset_BUSI_with_GT cannot be read \(Permission denied\)"
    ):
        cases_of("busi")


def test_the_fingerprint_follows_the_masks_and_the_images_of_own_data(data):
    image_folder(data / "mine", 3)
    before = fingerprint(PrepareConfig(dataset="mine"))[0]
    assert fingerprint(PrepareConfig(dataset=str(data / "mine")))[0] == before
    save(data / "mine" / "masks" / "case_001.png", lesion(30))
    after = fingerprint(PrepareConfig(dataset="mine"))[0]
    save(data / "mine" / "images" / "case_001.png", picture(7))
    assert len({before, after, fingerprint(PrepareConfig(dataset="mine"))[0]}) == 3


def test_the_fingerprint_follows_the_data_file_of_a_metaimage_header(data):
    for name in ("images", "masks"):
        (data / "mine" / name).mkdir(parents=True)
        sitk.WriteImage(sitk.GetImageFromArray(HU), data / "mine" / name / "a.mhd")
    before = fingerprint(PrepareConfig(dataset="mine"))[0]
    raw = data / "mine" / "masks" / "a.raw"
    raw.write_bytes(raw.read_bytes()[::-1])
    assert fingerprint(PrepareConfig(dataset="mine"))[0] != before


# Manifests ----------------------------------------------------------------------------------------


def listed(folder, text, count=4, name="list.csv"):
    """A CSV manifest beside generated images 0.png, 1.png, ... and masks 0_m.png, ..."""
    for i in range(count):
        save(folder / "scans" / f"{i}.png", picture(i))
        save(folder / "drawn" / f"{i}_m.png", lesion(8 + i))
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def test_a_manifest_gives_groups_splits_labels_and_ids(data):
    path = listed(
        data,
        "image,mask,group,split,label,id\nscans/0.png,drawn/0_m.png,p1,train,benign,first\nscans/1.png,drawn/1_m.png,p1,TEST,,\n",
    )
    cases = cases_of(path)
    assert [(c.id, c.group, c.split, c.label) for c in cases.values()] == [
        ("first", "p1", "train", "benign"),
        ("1", "p1", "test", ""),
    ]
    assert sides(cases) == {"first": 8, "1": 9}
    assert list(cases_of("list.csv")) == ["first", "1"]  # under LESIONKD_DATA


SAME = {  # the same two cases, written differently
    "semicolons, as Excel writes them": "image;mask;group\n"
    "scans/0.png;drawn/0_m.png;a\nscans/1.png;drawn/1_m.png;b\n",
    "tabs": "image\tmask\tgroup\nscans/0.png\tdrawn/0_m.png\ta\nscans/1.png\tdrawn/1_m.png\tb\n",
    "byte order mark and CR LF": "\ufeffimage,mask,group\r\n"
    "scans/0.png,drawn/0_m.png,a\r\nscans/1.png,drawn/1_m.png,b\r\n",
    "spaces, large letters, empty rows": "Image, Mask, Group\n"
    " scans/0.png , drawn/0_m.png, a\n\nscans/1.png,drawn/1_m.png,b\n,,\n",
    "Windows' slashes": "image,mask,group\n"
    "scans\\0.png,drawn\\0_m.png,a\n.\\scans\\1.png,drawn\\1_m.png,b\n",
    "other order": "group,mask,image\na,drawn/0_m.png,scans/0.png\nb,drawn/1_m.png,scans/1.png\n",
    "quotes": 'image,mask,group\n"scans/0.png","drawn/0_m.png","a"\nscans/1.png,drawn/1_m.png,b\n',
}


@pytest.mark.parametrize("way", SAME)
def test_a_manifest_is_read_however_it_was_written(data, way):
    cases = cases_of(listed(data, SAME[way]))
    assert sides(cases) == {"0": 8, "1": 9} and [case.group for case in cases.values()] == [
        "a",
        "b",
    ]


@pytest.mark.parametrize("text", [
    "image,mask\nscans/0.png,drawn/0_m.png\nscans/0.png,drawn/3_m.png\n",
    "image,mask\nscans/0.png,drawn/0_m.png;drawn/3_m.png\n",
    'image;mask\nscans/0.png;"drawn/0_m.png;drawn/3_m.png"\n',
    "image,mask\nscans/0.png,drawn/0_m.png\nscans/../scans/0.png,drawn/3_m.png; drawn/0_m.png;\n",
])  # fmt: skip
def test_several_masks_of_one_image_are_united(data, text):
    [case] = cases_of(listed(data, text)).values()
    assert len(case.masks) == 2 and (read_case(case).mask == (lesion(8) | lesion(11))).all()


def test_images_of_one_name_in_several_folders_take_the_folder_into_their_id(data):
    for patient in ("p1", "p2"):
        save(data / patient / "001.png", picture(1))
    assert list(
        cases_of(listed(data, "image,mask\np1/001.png,drawn/0_m.png\np2/001.png,drawn/1_m.png\n"))
    ) == ["p1_001", "p2_001"]


def test_paths_of_a_manifest_may_be_absolute(data, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "list.csv"
    listed(data, "")
    elsewhere.write_text(f"image,mask\n{data}/scans/2.png,{data}/drawn/2_m.png\n")
    assert sides(cases_of(elsewhere)) == {"2": 10}


@pytest.mark.fault
def test_a_missing_file_of_a_manifest_drops_only_its_own_case(data):
    rows = "scans/0.png,drawn/0_m.png\nscans/gone.png,drawn/1_m.png\n"
    rows += "scans/2.png,drawn/2_m.png;drawn/lost.png\nscans/3.png,\n"
    cases = cases_of(listed(data, "image,mask\n" + rows))
    assert {name: case.problem for name, case in cases.items()} == {
        "0": "",
        "gone": "gone.png: file is missing",
        "2": "lost.png: file is missing",
        "3": "",
    }
    with pytest.raises(UnreadableFile, match=r"3\.png: no mask belongs to this image"):
        next(read(cases["3"]))


@pytest.mark.fault
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("my-dat", r"there is no folder and no CSV manifest .*/my-dat; did you mean 'my-data'\?$"),
        ("nothing/alike", "there is no folder and no CSV manifest .*/alike$"),
        ("my-data", "my-data has images and no masks: put the mask of images/a.jpg into a folder"),
    ],
)
def test_a_folder_that_is_not_there_or_has_no_masks_is_told_so(tmp_path, name, words):
    (tmp_path / "my-data" / "images").mkdir(parents=True)
    save(tmp_path / "my-data" / "images" / "a.png", np.zeros((8, 8), np.uint8))
    with pytest.raises(DatasetNotFound, match=words):
        find(str(tmp_path / name))


WRONG = {  # a manifest and words of its error
    "unknown column": (
        "image,mask,grup\nscans/0.png,drawn/0_m.png,a\n",
        "column 'grup' is unknown; did you mean 'group'?",
    ),
    "column twice": (
        "image,mask,mask\nscans/0.png,drawn/0_m.png,drawn/1_m.png\n",
        "column 'mask' is there twice",
    ),
    "no mask column": (
        "image,group\nscans/0.png,a\n",
        "no column 'mask'; columns are image, mask, group, split, label, id",
    ),
    "no header": ("scans/0.png,drawn/0_m.png\n", "no column 'image' and 'mask'"),
    "no rows": ("image,mask\n", "no rows below the header"),
    "empty": ("", "no column 'image' and 'mask'"),
    "wrong split": (
        "image,mask,split\nscans/0.png,drawn/0_m.png,train\nscans/1.png,drawn/1_m.png,tset\n",
        "line 3: split = 'tset'; it must be train, val, test",
    ),
    "no image in a row": (
        "image,mask\nscans/0.png,drawn/0_m.png\n,drawn/1_m.png\n",
        "line 3: no image",
    ),
    "comma in a path": (
        "image,mask\nscans/a, b.png,drawn/0_m.png\n",
        "line 2: more cells than columns; put a path with a comma in quotes",
    ),
    "rows disagree": (
        "image,mask,group\nscans/0.png,drawn/0_m.png,a\nscans/0.png,drawn/1_m.png,b\n",
        "line 3: scans/0.png is in an earlier line with another",
    ),
    "quote left open": (
        'image,mask\n"scans/0.png,drawn/0_m.png\n',
        "cannot be read as a CSV table",
    ),
}


@pytest.mark.fault
@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_manifest_is_refused_with_the_line(data, what):
    text, words = WRONG[what]
    with pytest.raises(ManifestError, match=re.escape(words)) as error:
        cases_of(listed(data, text))
    assert str(error.value).startswith("list.csv")


@pytest.mark.fault
@pytest.mark.parametrize(
    "content",
    [
        "image,mask\nLäsion.png,b.png\n".encode("latin-1"),
        "image,mask\na.png,b.png\n".encode("utf-16"),
        bytes(range(256)),
    ],
)
def test_a_manifest_of_another_encoding_is_refused(data, content):
    (data / "list.csv").write_bytes(content)
    with pytest.raises(ManifestError, match=r"^list\.csv: cannot be read as a CSV table in UTF-8"):
        cases_of(data / "list.csv")


@pytest.mark.fault
def test_a_manifest_that_is_not_there_says_where_it_was_looked_for(data):
    with pytest.raises(
        DatasetNotFound, match=rf"'lost\.csv' is neither .* nor a CSV manifest; (.|\n)*{data}"
    ):
        cases_of("lost.csv")


def test_the_order_of_rows_and_the_split_count_in_the_fingerprint(data):
    digests = set()
    for split in ("train", "test"):
        path = listed(
            data, f"image,mask,split\nscans/0.png,drawn/0_m.png,{split}\n", name=f"{split}.csv"
        )
        digests.add(fingerprint(PrepareConfig(dataset=str(path)))[0])
    assert len(digests) == 2


# The catalogue and its cards ----------------------------------------------------------------------


def card(name):
    return (ROOT / "data" / f"{name}.md").read_text()


@pytest.mark.parametrize("release", CATALOGUE.values(), ids=lambda release: release.name)
def test_every_release_has_a_card_that_agrees_with_the_catalogue(release):
    text = card(release.name)
    assert all(
        name in text
        for name in (
            f"`{release.name}`",
            release.page,
            release.folder,
            *release.holds,
            f"{release.count:,}",
        )
    )
    assert (release.licence or "none is stated") in text and "checksums.json" in text
    for row in ("Page", "Paper", "Licence", "Cases", "Checksum"):
        assert re.search(rf"^\| {row} \| \S", text, re.M), row
    assert all(name in text for layout in release.others for name in layout)


@pytest.mark.parametrize("release", CATALOGUE.values(), ids=lambda release: release.name)
def test_every_release_can_be_fetched_or_says_how_to_get_it(release):
    assert (
        release.page.startswith("http") and release.citation and release.modality and release.count
    )
    assert all(address.startswith("https://") for address in release.archives)
    assert release.archives or release.access != "free, no registration"


def test_every_card_belongs_to_a_release():
    assert {path.stem for path in (ROOT / "data").glob("*.md")} - {
        "own",
        "phantom",
        "README",
    } == set(CATALOGUE)


REAL = {  # cases of the release, or of a known part of it; groups; mask files
    "busi": ({780}, 1, {798}),
    "cvc-clinicdb": ({612}, 29, {612}),
    "isic2018": ({3694, 2594, 1500}, 1, {3694, 2594, 1500}),
    "kvasir-seg": ({1000, 5}, 1, {1000, 5}),
    "em-isbi2012": ({30}, 5, {30}),
}


@pytest.mark.parametrize("dataset", REAL)
def test_all_cases_of_the_real_release_are_read(dataset):
    try:
        release, folder = find(dataset)
    except DatasetNotFound:
        pytest.skip(f"the real release of {dataset} is not under LESIONKD_DATA")
    cases, (counts, groups, masks) = release.cases(folder), REAL[dataset]
    assert len(cases) == len({case.id for case in cases}) and len(cases) in counts
    assert len({case.group for case in cases}) == groups
    assert (
        all(case.masks and not case.problem for case in cases)
        and sum(len(case.masks) for case in cases) in masks
    )
    if dataset == "busi":
        labels = [case.label for case in cases]
        assert {label: labels.count(label) for label in set(labels)} == {
            "benign": 437,
            "malignant": 210,
            "normal": 133,
        }
    for case in cases[:: max(1, len(cases) // 4)]:
        reading = read_case(case)
        assert reading.image.shape == (*reading.mask.shape, 3) and reading.mask.any() == (
            case.label != "normal"
        )
