"""Release layouts in miniature, folders and lists of your own, and the real releases if here."""

import re
from collections import Counter

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from lesionkd_core.config import PrepareConfig, UnlabelledConfig
from lesionkd_core.data.images import UnreadableFile
from lesionkd_core.data.layouts import (
    CATALOGUE,
    DatasetNotFound,
    ManifestError,
    Release,
    find,
    fingerprint,
    listing,
    manifest,
    own_pairs,
    read,
    window_of,
)
from lesionkd_core.data.masks import decided, read_case
from lesionkd_core.data.prepare import prepare

from .conftest import ROOT
from .test_dicom import dicom
from .test_volumes import HU, LESION, same, windowed
from .tiny import SIZE, image_folder, lesion, picture, save, save_pages


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.setenv("LESIONKD_DATA", str(tmp_path))
    return tmp_path


def cases_of(dataset):
    cases = listing(PrepareConfig(dataset=str(dataset))).cases
    return {case.id: case for case in cases}


def sides(cases):
    """Side of the square lesion in every mask."""
    return {name: int(read_case(case).mask.sum() ** 0.5) for name, case in cases.items()}


def pairs(folder, images, masks, names, start=6):
    """Generated images and masks; `{}` in the two paths is a name; lesions have rising sides."""
    for side, name in enumerate(names, start):
        save(folder / images.format(name), picture(side))
        save(folder / masks.format(name), lesion(side))
    return folder


def touch(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


# Releases -----------------------------------------------------------------------------------------


def test_isic_reads_every_part_with_its_split(data):
    parts = {"Training": "train", "Validation": "val", "Test_v2": "test"}
    for number, part in enumerate(parts):
        names = [f"ISIC_{2 * number + k:07d}" for k in (0, 1)]
        masks = f"ISIC-2017_{part}_Part1_GroundTruth/{{}}_segmentation.png"
        pairs(data / "all", f"ISIC-2017_{part}_Data/{{}}.jpg", masks, names, 6 + 2 * number)
    first = data / "all" / "ISIC-2017_Training_Data"
    save(first / "ISIC_0000000_superpixels.png", picture(3))
    (first / "ATTRIBUTION.txt").write_text("is in the official archive")
    cases = cases_of("isic2017")
    assert [case.split for case in cases.values()] == [s for s in parts.values() for _ in (0, 1)]
    assert list(sides(cases).values()) == list(range(6, 12))


@pytest.mark.parametrize("table", ["HAM10000_metadata", "HAM10000_metadata.tab", ""])
def test_ham10000_groups_by_lesion_where_the_table_says_so(data, table):
    folder, separator = data / "ham10000", "\t" if table.endswith("tab") else ","
    names = [f"ISIC_002430{k}" for k in range(4)]
    masks = "HAM10000_segmentations_lesion_tschandl/{}_segmentation.png"
    pairs(folder, "HAM10000_images_part_2/{}.jpg", masks, names[:2])
    pairs(folder, "HAM10000_images_part_1/{}.jpg", masks, names[2:], 8)
    rows = [("lesion_id", "image_id", "dx"), ("HAM_1", names[0], "nv"), ("HAM_1", names[2], "nv")]
    if table:
        text = "\n".join(separator.join(row) for row in [*rows, ("HAM_2", names[1], "mel")])
        (folder / table).write_text(text)
    cases = cases_of("ham10000")
    assert sides(cases) == dict(zip(names, (6, 7, 8, 9)))
    assert [c.group for c in cases.values()] == (
        ["HAM_1", "HAM_2", "HAM_1", ""] if table else [""] * 4
    )
    assert [c.label for c in cases.values()] == (["nv", "mel", "nv", ""] if table else [""] * 4)


def test_bus_bra_groups_by_patient(data):
    names = ["0001-l", "0001-r", "0014-s"]
    pairs(data / "BUSBRA", "Images/bus_{}.png", "Masks/mask_{}.png", names)
    (data / "BUSBRA" / "bus_data.csv").write_text(
        "ID,Case,Histology,Pathology\nbus_0001-l,1,x,benign\nbus_0001-r,1,x,benign\n"
        "bus_0014-s,14,y,malignant\nbus_0015-s,15,y,malignant\n"
    )
    cases = cases_of("bus-bra")
    assert sides(cases) == {f"bus_{name}": 6 + k for k, name in enumerate(names)}
    assert [c.group for c in cases.values()] == ["patient-0001", "patient-0001", "patient-0014"]
    assert [c.label for c in cases.values()] == ["benign", "benign", "malignant"]


def test_ph2_pairs_folders_and_reads_the_diagnosis(data):
    folder, names = data / "PH2Dataset", ("IMD002", "IMD010", "IMD435")
    place = "PH2 Dataset images/{0}/{0}_"
    pairs(folder, place + "Dermoscopic_Image/{0}.bmp", place + "lesion/{0}_lesion.bmp", names)
    save(folder / (place.format("IMD002") + "roi") / "IMD002_R1_Label4.bmp", lesion(3))
    row = "|| {} ||  Melanoma  ||  {} || 0 | T | A ||  4 ||\n"
    text = "||  Name  || Histological Diagnosis || Clinical Diagnosis || Asymmetry |\n"
    text += "".join(row.format(name, kind) for kind, name in enumerate(names)) + "\nLegend\n"
    (folder / "PH2_dataset.txt").write_text(text)
    labels = [case.label for case in cases_of("ph2").values()]
    assert labels == ["common nevus", "atypical nevus", "melanoma"]
    assert sides(cases_of("ph2")) == dict(zip(names, (6, 7, 8)))


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


def test_busi_has_labels_and_unites_the_masks_of_an_image(data):
    folder = small_busi(data)
    cases = cases_of("busi")
    assert list(cases_of(folder)) == list(cases), "by its path"
    ids = ["benign (1)", "benign (2)", "benign (10)", "malignant (1)", "normal (1)"]  # 2 before 10
    labels = ["benign"] * 3 + ["malignant", "normal"]
    assert list(cases) == ids
    assert [case.label for case in cases.values()] == labels
    assert {case.group for case in cases.values()} == {""}
    union = lesion(8) | lesion(5, top=30, left=40) | lesion(3, top=20, left=50)
    expected = [union, lesion(9), lesion(10), lesion(11), lesion(0)]
    assert all((read_case(c).mask == mask).all() for c, mask in zip(cases.values(), expected))


def test_a_release_given_by_a_path_is_told_by_the_name_of_its_folder(data):
    for folder in ("CVC-ClinicDB", "polyps"):
        touch(data / folder / "Original" / "26.png")
        touch(data / folder / "Ground Truth" / "26.png")
    found = listing(PrepareConfig(dataset=str(data / "CVC-ClinicDB")))
    assert found.release.name == "cvc-clinicdb" and found.cases[0].group == "video-2"
    with pytest.raises(DatasetNotFound, match="polyps has images and no masks: put"):
        listing(PrepareConfig(dataset="polyps"))


def test_kvasir_seg_masks_are_jpeg_and_scenes_have_names(data):
    twins = ("cju1g20bdwq6u0835e16xugcd", "cjyzurzvohqnr0794es1itzek")
    drawn = {"a": lesion(16, 8, 8), "b": lesion(21, 11, 13)}
    for name, mask in (drawn | dict.fromkeys(twins, lesion(18, 5, 5))).items():
        save(data / "Kvasir-SEG" / "images" / f"{name}.jpg", picture(1))
        save(data / "Kvasir-SEG" / "masks" / f"{name}.jpg", mask, "RGB", quality=75)
    cases = cases_of("kvasir-seg")
    assert [cases[name].group for name in ("a", *twins)] == ["", "scene-01", "scene-01"]
    decision = decided(list(cases.values()), PrepareConfig())
    masks = {case.id: read_case(case).mask for case in decision}
    assert (masks["a"] == lesion(16, 8, 8)).all()  # on the borders of JPEG's blocks
    assert (masks["b"] != lesion(21, 11, 13)).mean() < 0.01


VIDEOS = {1: 1, 2: 1, 25: 1, 26: 2, 50: 2, 51: 3, 612: 29}


@pytest.mark.parametrize(
    ("place", "suffix"), [("cvc-clinicdb", "tif"), ("CVC-ClinicDB", "tif"), ("archive/PNG", "png")]
)
def test_cvc_clinicdb_groups_frames_by_video(data, place, suffix):
    for frame in VIDEOS:
        save(data / place / "Original" / f"{frame}.{suffix}", picture(frame))
        mask = np.where(lesion(9), 250, 3).astype(np.uint8)  # grey, not quite black and white
        save(data / place / "Ground Truth" / f"{frame}.{suffix}", mask)
    cases = cases_of("cvc-clinicdb")
    videos = [case.group.removeprefix("video-") for case in cases.values()]
    assert dict(zip(map(int, cases), map(int, videos))) == VIDEOS
    assert set(sides(cases).values()) == {9}


def test_cvc_colondb_in_one_folder(data):
    pairs(data / "CVC-ColonDB", "{}.bmp", "p{}.bmp", (1, 2, 10))
    for other in ("s1", "c1", "s10"):
        save(data / "CVC-ColonDB" / f"{other}.bmp", lesion(40))
    assert sides(cases_of("cvc-colondb")) == {"1": 6, "2": 7, "10": 8}


def test_cvc_colondb_of_the_benchmarks_names_the_mask_without_an_image(data):
    folder = pairs(data / "Test" / "CVC-ColonDB", "images/{}.png", "masks/{}.png", (1, 2))
    save(folder / "masks" / "380.png", lesion(9))
    cases = cases_of("cvc-colondb")
    assert [name for name, case in cases.items() if case.problem] == ["380"] and len(cases) == 3
    with pytest.raises(UnreadableFile, match=r"^380\.png: no image belongs to this mask$"):
        next(read(cases["380"]))


def test_fuseg_takes_its_parts_from_the_repository(data):
    above = data / "fuseg" / "wound-segmentation-master" / "data"
    folder = above / "Foot Ulcer Segmentation Challenge"
    pairs(folder, "train/images/{}.png", "train/labels/{}.png", ("0011", "0020"))
    pairs(folder, "validation/images/{}.png", "validation/labels/{}.png", ("0001",), 8)
    save(folder / "test" / "images" / "0020.png", picture(3))  # the challenge kept these labels
    expected = {"train-0011": "train", "train-0020": "train", "validation-0001": "val"}
    assert {name: case.split for name, case in cases_of("fuseg").items()} == expected
    save(folder / "test" / "labels" / "0020.png", lesion(11))
    cases = cases_of("fuseg")
    assert cases["test-0020"].split == "test" and {case.group for case in cases.values()} == {""}
    assert list(sides(cases).values()) == [6, 7, 8, 11]


def test_medetec_keeps_the_copies_of_one_ulcer_together_and_reads_masks_of_ones(data):
    folder = data / "Medetec_foot_ulcer_224"
    names = {"train": ("0001", "0001_2", "0028"), "test": ("0028", "0028_1")}
    for part, numbers in names.items():
        for number in numbers:
            save(folder / part / "images" / f"foot-ulcer-{number}.png", picture(1))
            mask = lesion(9).astype(np.uint8)
            save(folder / part / "labels" / f"foot-ulcer-{number}.png", mask)
    cases = cases_of("medetec")
    assert set(sides(cases).values()) == {9}
    assert [c.group[-4:] for c in cases.values()] == ["0001", "0001", "0028", "0028", "0028"]


def test_covid_scans_of_one_patient_share_a_group(data):
    names = ("coronacases_001", "radiopaedia_4_85506_1", "radiopaedia_29_86490_1")
    for name in (*names, "radiopaedia_29_86491_1"):
        for folder in ("COVID-19-CT-Seg_20cases", "Infection_Mask", "Lung_Mask"):
            touch(data / "covid" / folder / f"{name}.nii.gz")
    for folder in ("rp_im", "rp_msk"):  # the other release beside it
        touch(data / "covid" / folder / "9.nii.gz")
    cases = cases_of("covid19-20cases").values()
    groups = ["coronacases_001", "radiopaedia_4", "radiopaedia_29", "radiopaedia_29"]
    assert [case.group for case in cases] == groups
    assert {mask.parent.name for case in cases for mask in case.masks} == {"Infection_Mask"}
    assert [(c.id, c.group) for c in cases_of("covid19-medseg").values()] == [("9", "9")]


def test_the_sections_of_em_stacks_are_grouped_in_blocks(data):
    for name, top in (("train-volume", 155), ("train-labels", 255)):
        pages = [lesion(3 + i) * np.uint8(top) for i in range(30)]
        save_pages(data / "em" / f"{name}.tif", *pages)
    cases = cases_of("em-isbi2012")
    assert list(cases)[:2] == ["section-00", "section-01"]
    sizes = {"sections-00-05": 6, "sections-06-11": 6, "sections-12-17": 6, "sections-18-29": 12}
    assert Counter(case.group for case in cases.values()) == sizes
    assert list(sides(cases).values()) == list(range(3, 33))  # 255, the interior


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


@pytest.mark.parametrize("above", ["manifest-1599750808610/Pancreas-CT", "."])
def test_pancreas_ct_pairs_series_and_labels_by_patient(data, above):
    pancreas(data / "pancreas", above)
    cases = cases_of("nih-pancreas")
    assert [(case.id, case.group) for case in cases.values()] == [
        ("PANCREAS_0001", "PANCREAS_0001"),
        ("PANCREAS_0002", "PANCREAS_0002"),  # 25 was withdrawn
    ]
    window = window_of(PrepareConfig(dataset="nih-pancreas"))
    slices = read(cases["PANCREAS_0002"], window)
    readings = same(slices, windowed(HU, -100, 240), np.roll(LESION, 2, 2))
    assert readings[0].id == "PANCREAS_0002_z000"
    assert any("matched voxel by voxel" in note for r in readings for note in r.notes)


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


@pytest.mark.parametrize("name", ["kvasir-seg", "fuseg"])
def test_a_folder_of_ones_own_is_not_taken_for_a_release(data, name):
    image_folder(data / "mine", 1)
    pairs(data / "parts", "train/images/{}.png", "train/labels/{}.png", "a")
    words = f"{name}: no folder '{CATALOGUE[name].folder}' with .* under {data}"
    with pytest.raises(DatasetNotFound, match=words) as error:
        find(name)
    assert f"data/{name}.md" in str(error.value) and "LESIONKD_DATA" in str(error.value)


# Folders of your own ---------------------------------------------------------------------------


def test_own_data_pairs_equal_stems_of_any_suffix(data):
    images = ("a.JPG", "b 1.jpeg", "c.tif", "d.webp", "e.x.png")
    masks = ("a.png", "b 1.bmp", "c.tiff", "d.png", "E.X.png")
    for image, mask in zip(images, masks):
        save(data / "mine" / "images" / image, picture(1))
        save(data / "mine" / "masks" / mask, lesion(9))
    for name in (".hidden.png", "Thumbs.db"):
        (data / "mine" / "images" / name).write_text("left by a file manager")
    assert list(cases_of("mine")) == list(cases_of(data / "mine")) == ["a", "b 1", "c", "d", "e.x"]
    for case in cases_of("mine").values():
        assert read_case(case).image.shape == (*SIZE, 3)
        assert (read_case(case).mask == lesion(9)).all()


@pytest.mark.fault
def test_images_in_formats_that_are_not_read_are_named(data):
    pairs(data / "mine", "images/{}.png", "masks/{}.png", "ab")
    touch(data / "mine" / "images" / "c.heic")
    touch(data / "mine" / "images" / "notes.txt")
    problems = {case.id: case.problem for case in cases_of("mine").values() if case.problem}
    why = "c.heic: .heic files are not read; convert it to PNG or TIFF"
    assert problems == {"c.heic": why}


def test_sub_folders_are_labels_and_no_patients(data):
    """Also where one of them has no masks, and beside pictures in images/ itself."""
    for label in ("benign", "malignant"):
        pairs(data / "sorted", label + "/images/{}.png", label + "/masks/{}.png", "ab")
        pairs(data / "inside", f"images/{label}/{{}}.png", f"masks/{label}/{{}}.png", "ab")
    pairs(data / "inside", "images/{}.png", "masks/{}.png", "c", 9)
    save(data / "inside" / "images" / "other" / "d.png", picture(1))
    for folder in ("sorted", "inside"):
        cases = cases_of(folder)
        assert {case.group for case in cases.values()} == {""}
        about = {name: case.label for name, case in cases.items() if case.label != "other"}
        both = {f"{label}-{k}": label for label in ("benign", "malignant") for k in "ab"}
        assert about == (both if folder == "sorted" else both | {"c": ""})
    assert not cases["other-d"].masks and sides({"c": cases["c"]}) == {"c": 9}


def volume(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(sitk.GetImageFromArray(HU), path)


def test_a_folder_for_each_case_holds_a_volume_and_its_mask(data):
    for case in ("case001", "case002"):
        volume(data / "mine" / case / f"{case}.nii.gz")
        volume(data / "mine" / case / f"{case}_seg.nii.gz")
    found = own_pairs(data / "mine")
    assert found.how == "one folder for each case"
    assert [(c.id, c.image.name, c.masks[0].name) for c in found.cases] == [
        (name, f"{name}.nii.gz", f"{name}_seg.nii.gz") for name in ("case001", "case002")
    ]
    for name in ("case001", "case001_seg", "b", "b_seg"):  # and all in one folder
        volume(data / "flat" / f"{name}.nii.gz")
    assert [(c.id, len(c.masks)) for c in own_pairs(data / "flat").cases] == [
        ("b", 1),
        ("case001", 1),
    ]


@pytest.mark.fault
def test_several_kinds_of_volume_for_a_mask_are_refused_with_the_way_out(data):
    for case in ("001", "002"):
        for kind in ("flair", "t1", "t2", "seg"):
            volume(data / "mine" / case / f"BraTS20_{case}_{kind}.nii.gz")
    words = r"holds 3 images .*t1\.nii\.gz.* one mask .*seg\.nii\.gz.* list one kind .* CSV table"
    with pytest.raises(DatasetNotFound, match=words):
        cases_of("mine")


def test_a_release_whose_group_is_the_folder_is_grouped_so_by_its_entry_alone(data, monkeypatch):
    for video in "ab":
        for k in range(3):
            save(data / "mine" / "images" / video / f"{k}.png", picture(k))
            save(data / "mine" / "masks" / video / f"{k}.png", lesion(9))
    entry = Release("mine", "any", "mine", ["images", "masks"], "paired", group_by="folder")
    monkeypatch.setitem(CATALOGUE, "mine", entry)
    groups = Counter(case.group for case in cases_of("mine").values())
    assert sorted(groups.values()) == [3, 3]


def test_test_folders_of_nnunet_that_are_not_read_are_named(data):
    pairs(data / "nn", "imagesTr/{}.png", "labelsTr/{}.png", "abcdef")
    pairs(data / "nn", "imagesTs/{}.png", "labelsTs/{}.png", "g")
    [doubt] = listing(PrepareConfig(dataset="nn")).doubts
    assert "not read: imagesTs/ (1 files), labelsTs/ (1 files)." in doubt


def test_sub_folders_that_are_not_read_are_named(data):
    for part in ("train", "test", "dev"):
        pairs(data / "parts", f"{part}/images/{{}}.png", f"{part}/masks/{{}}.png", "abcd")
    [doubt] = listing(PrepareConfig(dataset="parts")).doubts
    assert "read from test/masks/, train/masks/; not read: dev/ (8 files)" in doubt
    for site in ("images/a", "images/b", "images/c/1"):
        pairs(
            data / "sites",
            f"{site}/{{}}.png",
            f"{site.replace('images', 'masks')}/{{}}.png",
            "abcd",
        )
    [doubt] = listing(PrepareConfig(dataset="sites")).doubts
    assert "not read: images/c/ (4 files), masks/c/ (4 files)" in doubt


def test_a_folder_beside_the_masks_is_named_and_masks_that_hardly_differ_are_too(data, runs):
    for k in range(12):
        save(data / "eyes" / "images" / f"{k:02d}_test.png", picture(k))
        save(data / "eyes" / "mask" / f"{k:02d}_test_mask.png", lesion(30 + k % 2, 5, 5))
        save(data / "eyes" / "1st_manual" / f"{k:02d}_manual1.png", lesion(3 + k))
    view, manual = prepare(PrepareConfig(dataset="eyes", pixels=32)).summary["warnings"]
    assert "read from mask/; not read: 1st_manual/ (12 files)." in view
    assert "CSV table" in view and "hardly differ (correlation 0.9" in manual
    rows = [f"images/{k:02d}_test.png,1st_manual/{k:02d}_manual1.png" for k in range(12)]
    (data / "eyes" / "list.csv").write_text("\n".join(["image,mask", *rows]))
    assert prepare(PrepareConfig(dataset="eyes/list.csv", pixels=32)).summary["warnings"] == []


@pytest.mark.parametrize("options", [{}, {"split": "official"}, {"folds": 3}])
def test_a_split_of_the_data_that_is_not_used_is_a_warning(data, runs, options):
    for number, part in enumerate(["train"] * 12 + ["val"] * 3 + ["test"] * 3):
        save(data / "mine" / part / "images" / f"{number}.png", picture(number))
        save(data / "mine" / part / "masks" / f"{number}.png", lesion(6 + number))
    found = prepare(PrepareConfig(dataset="mine", pixels=32, **options))
    said = [w for w in found.summary["warnings"] if "give split = 'official' to use theirs" in w]
    assert len(said) == (not options)


def test_columns_that_are_not_read_are_named_and_a_split_may_be_called_validation(data):
    lines = ["image,mask,age,patient,split", "S0,D0,71,p1,validation", "S1,D1,65,p2,Training"]
    found = manifest(table := listed(data, "\n".join(lines)))
    assert [case.split for case in found.cases] == ["val", "train"]
    [doubt] = found.doubts
    assert "not read: age, patient; if one names the patient, give group_by = 'column:" in doubt
    assert manifest(table, "patient").doubts == ("columns of list.csv that are not read: age",)


@pytest.mark.fault
@pytest.mark.parametrize(
    ("file", "words"),
    [("a.json", "annotations such as a.json are not read"), ("list.csv", "If list.csv lists")],
)
def test_images_without_masks_are_refused_with_what_is_beside_them(data, file, words):
    save(data / "mine" / "a.png", picture(0))
    (data / "mine" / file).write_text("{}")
    with pytest.raises(DatasetNotFound, match=words):
        cases_of("mine")
    with pytest.raises(DatasetNotFound, match="is no folder and no CSV table; export"):
        cases_of(data / "mine" / "a.png")


def test_a_class_or_clinic_that_is_missing_from_a_split_is_a_warning(data, runs):
    for number, kind in enumerate("ABC"):
        for k in range(8):
            save(data / "mine" / kind / "images" / f"{k}.png", picture(8 * number + k))
            save(data / "mine" / kind / "masks" / f"{k}.png", lesion(6 + number))
    found = prepare(PrepareConfig(dataset="mine", pixels=32))
    assert found.summary["groups"] == 24
    there = found.cases.groupby("label")["split"].agg(set)
    absent = {kind: {"train", "val", "test"} - there[kind] for kind in "ABC"}
    [warning] = found.summary["warnings"]
    said = re.findall(r"(\w) \(8 cases\) from ([a-z]+)", warning)
    assert said == [(kind, *splits) for kind, splits in absent.items() if splits] != []


def test_images_alone_may_lie_in_sub_folders_and_in_pages(data):
    save(data / "more" / "a.png", picture(0))
    save(data / "more" / "deep" / "er" / "b.png", picture(1))
    save_pages(data / "more" / "stack.tif", *(picture(k) for k in range(3)))
    (data / "more" / "loop").symlink_to(data / "more")
    cases = listing(UnlabelledConfig(dataset="more")).cases
    names = ["a", *(f"stack_page{page:03d}" for page in range(3)), "deep-er-b"]
    assert [case.id for case in cases] == names
    assert (read_case(cases[2]).image == picture(1)).all()


def test_the_fingerprint_follows_the_masks_and_the_images_of_own_data(data):
    image_folder(data / "mine", 3)
    before = fingerprint(PrepareConfig(dataset="mine"))
    assert fingerprint(PrepareConfig(dataset=str(data / "mine"))) == before
    save(data / "mine" / "masks" / "case_001.png", lesion(30))
    after = fingerprint(PrepareConfig(dataset="mine"))
    save(data / "mine" / "images" / "case_001.png", picture(7))
    assert len({before, after, fingerprint(PrepareConfig(dataset="mine"))}) == 3


def test_the_fingerprint_follows_the_data_file_of_a_metaimage_header(data):
    for name in ("images", "masks"):
        (data / "mine" / name).mkdir(parents=True)
        sitk.WriteImage(sitk.GetImageFromArray(HU), data / "mine" / name / "a.mhd")
    before = fingerprint(PrepareConfig(dataset="mine"))
    raw = data / "mine" / "masks" / "a.raw"
    raw.write_bytes(raw.read_bytes()[::-1])
    assert fingerprint(PrepareConfig(dataset="mine")) != before


# Manifests ----------------------------------------------------------------------------------------


def listed(folder, text, count=4):
    """A CSV manifest beside generated images scans/0.png, ... and masks drawn/0_m.png, ...

    In the text S0 and D0 stand for their paths.
    """
    for i in range(count):
        save(folder / "scans" / f"{i}.png", picture(i))
        save(folder / "drawn" / f"{i}_m.png", lesion(8 + i))
    text = re.sub(r"\bD(\d)", r"drawn/\1_m.png", re.sub(r"\bS(\d)", r"scans/\1.png", text))
    (folder / "list.csv").write_text(text, encoding="utf-8")
    return folder / "list.csv"


def test_a_manifest_gives_groups_splits_labels_and_ids(data):
    header = "image,mask,group,split,label,id\n"
    path = listed(data, header + "S0,D0,p1,train,benign,first\nS1,D1,p1,TEST,,\n")
    found = [(c.id, c.group, c.split, c.label) for c in cases_of(path).values()]
    assert found == [("first", "p1", "train", "benign"), ("1", "p1", "test", "")]
    assert sides(cases_of("list.csv")) == {"first": 8, "1": 9}  # under LESIONKD_DATA


SAME = {  # the same two cases, written differently
    "semicolons, as Excel writes them": "image;mask;group\nS0;D0;a\nS1;D1;b\n",
    "byte order mark and CR LF": "\ufeffimage,mask,group\r\nS0,D0,a\r\nS1,D1,b\r\n",
    "spaces, large letters, empty rows": "Image, Mask, Group\n S0 , D0, a\n\nS1,D1,b\n,,\n",
    "Windows' slashes": "image,mask,group\nscans\\0.png,D0,a\n.\\scans\\1.png,drawn\\1_m.png,b\n",
    "absolute paths": "image,mask,group\n{}/S0,D0,a\nS1,{}/D1,b\n",
    "the index of pandas": ",image,mask,group\n0,S0,D0,a\n1,S1,D1,b\n",
}


@pytest.mark.parametrize("way", SAME)
def test_a_manifest_is_read_however_it_was_written(data, way):
    cases = cases_of(listed(data, SAME[way].format(*[data] * 2)))
    assert sides(cases) == {"0": 8, "1": 9}
    assert [case.group for case in cases.values()] == ["a", "b"]


@pytest.mark.parametrize("text", ["image,mask\nS0,D0\nS0,D3\n", 'image;mask\nS0;"D0;D3"\n'])
def test_several_masks_of_one_image_are_united(data, text):
    [case] = cases_of(listed(data, text)).values()
    assert len(case.masks) == 2 and (read_case(case).mask == (lesion(8) | lesion(11))).all()


@pytest.mark.parametrize(
    ("images", "ids"),
    [
        ("p1/001.png p2/001.png p2/2.png", "p1_001 p2_001 2"),
        ("A/images/0.png B/images/0.png", "A_images_0 B_images_0"),
        ("x/A/i/0.png y/A/i/0.png y/B/i/0.png", "x_A_i_0 y_A_i_0 B_i_0"),
        ("a.png a.jpg", "a a"),  # no folder tells them apart: an error follows
    ],
)
def test_ids_have_as_many_folders_as_make_them_different(data, images, ids):
    path = listed(data, "image,mask\n" + "".join(f"{image},D0\n" for image in images.split()))
    found = listing(PrepareConfig(dataset=str(path))).cases
    assert [case.id for case in found] == ids.split()


def doubts_of(path):
    found = listing(PrepareConfig(dataset=str(path)))
    return [case.group for case in found.cases], found.doubts


def test_groups_that_are_equal_as_numbers_are_one_and_that_is_said(data):
    groups = ["101", "101.0", " 101", "00101", "0", "0.0", "P1", "P01", "", "101a"]
    rows = "".join(f"S{k},D{k},{group}\n" for k, group in enumerate(groups))
    found, [doubt] = doubts_of(listed(data, "image,mask,group\n" + rows, count=10))
    assert found == ["101"] * 4 + ["0", "0", "P1", "P01", "", "101a"]
    assert "'101' and '101.0'; equal numbers" in doubt
    assert doubts_of(listed(data, "image,mask,group\nS0,D0,7\n"))[1] == ()


def test_a_mask_of_several_images_is_named(data):
    _, [doubt] = doubts_of(listed(data, "image,mask\nS0,D0\nS1,D1\nS2,D1\nS3,D1\n"))
    assert doubt.startswith("1 mask(s) are given for several images: 1_m.png for 3, such as 1.png")


@pytest.mark.fault
def test_a_missing_file_drops_only_its_own_case_and_says_where_it_was_looked_for(data):
    text = "image,mask\nS0,D0\nscans/gone.png,D1\nS2,D2;drawn/lost.png\nS3,\n"
    cases = cases_of(listed(data, text))
    gone = f"gone.png: file is missing in {data}/scans"
    lost = f"lost.png: file is missing in {data}/drawn"
    assert [case.problem for case in cases.values()] == ["", gone, lost, ""]
    with pytest.raises(UnreadableFile, match=r"3\.png: no mask belongs to this image"):
        next(read(cases["3"]))


WRONG = {  # a manifest and words of its error
    "image,mask,grup\nS0,D0,a\n": "column 'grup' is unknown; did you mean 'group'?",
    "image,group\nS0,a\n": "no column 'mask' among image, group; a list has image, mask",
    "image,mask\n": "no rows below the header",
    "": "cannot be read as a CSV table (No columns to parse from file)",
    "image,mask,split\nS0,D0,train\nS1,D1,tset\n": "line 3: split = 'tset'; it must be train, ",
    "image,mask\nS0,D0\n,D1\n": "line 3: no image",
    "image,mask\na, b.png,D0\n": "rows have more cells than columns; put a path with a comma in",
    "image,mask,group\nS0,D0,a\nS0,D1,b\n": "line 3: scans/0.png is in an earlier line with",
}


@pytest.mark.fault
@pytest.mark.parametrize("text", WRONG)
def test_a_wrong_manifest_is_refused_with_the_line(data, text):
    with pytest.raises(ManifestError, match=re.escape(WRONG[text])) as error:
        cases_of(listed(data, text))
    assert str(error.value).startswith("list.csv")


@pytest.mark.fault
def test_a_manifest_of_another_encoding_is_refused(data):
    (data / "list.csv").write_text("image,mask\nLäsion.png,b.png\n", encoding="latin-1")
    with pytest.raises(ManifestError, match=r"^list\.csv: is not in UTF-8; save it as 'CSV UTF-8'"):
        cases_of(data / "list.csv")


# The catalogue and its cards ----------------------------------------------------------------------


def card(name):
    return (ROOT / "data" / f"{name}.md").read_text()


@pytest.mark.parametrize("release", CATALOGUE.values(), ids=lambda release: release.name)
def test_every_release_has_a_card_that_agrees_with_the_catalogue(release):
    text = card(release.name)
    names = (f"`{release.name}`", release.page, release.folder, *release.holds)
    others = (name for layout in release.others for name in layout)
    assert all(name in text for name in (*names, *others, f"{release.count:,}", "checksums.json"))
    assert (release.licence or "none is stated") in text


REAL = {  # cases of the release, or of a known part of it; groups; mask files
    "busi": ({780}, 1, {798}),
    "cvc-clinicdb": ({612}, 29, {612}),
    "isic2018": ({3694, 2594, 1500}, 1, {3694, 2594, 1500}),
    "kvasir-seg": ({1000}, 22, {1000}),
    "em-isbi2012": ({30}, 4, {30}),
    "bus-bra": ({1875, 991}, 710, {1875, 991}),
    "ham10000": ({10015, 2000}, 1, {10015, 2000}),
}


@pytest.mark.parametrize("dataset", REAL)
def test_all_cases_of_the_real_release_are_read(dataset):
    try:
        release, folder = find(dataset)
    except DatasetNotFound:
        pytest.skip(f"the real release of {dataset} is not under LESIONKD_DATA")
    cases, (counts, groups, masks) = release.listing(folder).cases, REAL[dataset]
    assert len(cases) == len({case.id for case in cases}) and len(cases) in counts
    assert len({case.group for case in cases}) == groups
    assert all(case.masks and not case.problem for case in cases)
    assert sum(len(case.masks) for case in cases) in masks
    if dataset == "busi":
        counts = {"benign": 437, "malignant": 210, "normal": 133}
        assert Counter(case.label for case in cases) == counts
    for case in cases[:: max(1, len(cases) // 4)]:
        reading = read_case(case)
        assert reading.image.shape == (*reading.mask.shape, 3) and reading.mask.any() == (
            case.label != "normal"
        )
