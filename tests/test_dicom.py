"""DICOM files and series: order, position, greys, colours, and masks in every form."""

import nibabel as nib
import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from lesionkd_core.data.images import UnreadableFile
from lesionkd_core.data.layouts import read
from lesionkd_core.data.volumes import read_volume, write_mask

from .test_volumes import (
    HU,
    LESION,
    LPS,
    SPACING,
    WAYS,
    WINDOW,
    case,
    nifti,
    same,
    windowed,
)

SERIES = generate_uid()
CT, REPORT = "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.88.11"


def dicom(path, pixels, **attributes):
    """Write one image: an axial CT slice unless attributes say otherwise; None leaves one out."""
    header = pydicom.Dataset()
    header.file_meta = pydicom.dataset.FileMetaDataset()
    header.file_meta.TransferSyntaxUID = attributes.pop("syntax", ExplicitVRLittleEndian)
    header.SOPClassUID, header.SOPInstanceUID = CT, generate_uid()
    header.Rows, header.Columns = pixels.shape[-2:] if pixels.ndim == 2 else pixels.shape[:2]
    header.BitsAllocated = header.BitsStored = 8 * pixels.itemsize
    header.PixelRepresentation = int(pixels.dtype.kind == "i")
    usual = {
        "SeriesInstanceUID": SERIES,
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "PixelSpacing": [0.75, 0.5],
        "ImageOrientationPatient": [1, 0, 0, 0, 1, 0],
        "ImagePositionPatient": [-30, -12, -40],
        "InstanceNumber": 1,
    }
    for name, value in (usual | attributes).items():
        if value is not None:
            setattr(header, name, value)
    header.HighBit = header.BitsStored - 1
    header.PixelData = pixels.tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    header.save_as(path, enforce_file_format=True)
    return path


def series(folder, voxels=HU, names="kcaeb", **attributes):
    """A series whose names say nothing about the order of its slices."""
    for z, (name, pixels) in enumerate(zip(names, voxels)):
        at = {"ImagePositionPatient": [-30, -12, -40 + 2.5 * z], "InstanceNumber": z + 1}
        own = {n: v[z] if isinstance(v, dict) else v for n, v in attributes.items()}
        dicom(folder / f"{name}.dcm", pixels, **at | own)
    return folder


def test_a_series_is_ordered_by_position_whatever_names_and_numbers_say(tmp_path):
    folder = series(tmp_path / "scan", InstanceNumber={z: 5 - z for z in range(5)})
    mask = nifti(tmp_path / "m.nii.gz", LESION.astype(np.uint8), WAYS[13])
    readings = same(read(case(folder, mask), WINDOW), windowed(HU), LESION)
    assert [r.id for r in readings][::4] == ["scan_z000", "scan_z004"]
    assert not any(r.notes for r in readings)
    space = read_volume(folder).space
    assert np.allclose(space.affine, LPS) and space.spacing == SPACING


def test_a_sagittal_series_is_shown_as_acquired_and_its_affine_is_dicom_s(tmp_path):
    # Rows run to the feet, columns to posterior; the normal, columns x rows, is (-1, 0, 0), so
    # slices run from the patient's left to the right.
    places = {z: [-30 - 2.5 * z, -12, 40] for z in range(5)}
    turn = [0, 1, 0, 0, 0, -1]
    folder = series(tmp_path / "scan", ImageOrientationPatient=turn, ImagePositionPatient=places)
    assert np.array_equal(read_volume(folder).voxels, HU)
    expected = [[0, 0, 2.5, 30], [-0.5, 0, 0, 12], [0, -0.75, 0, 40], [0, 0, 0, 1]]
    # LPS to RAS: x and y change sign
    assert np.allclose(read_volume(folder).space.affine, expected)
    write_mask(tmp_path / "m.nii.gz", LESION, like=folder)
    same(read(case(folder, tmp_path / "m.nii.gz"), WINDOW), windowed(HU), LESION)


def test_a_tilted_gantry_keeps_its_shear(tmp_path):
    places = {z: [-30, -12 + 0.5 * z, -40 + 2.5 * z] for z in range(5)}
    folder = series(tmp_path / "scan", ImagePositionPatient=places)
    assert np.allclose(read_volume(folder).space.affine[:3, 2], [0, -0.5, 2.5])
    write_mask(tmp_path / "m.nii.gz", LESION, like=folder)
    assert np.allclose(nib.load(tmp_path / "m.nii.gz").affine, read_volume(folder).space.affine)
    same(read(case(folder, tmp_path / "m.nii.gz"), WINDOW), windowed(HU), LESION)


def test_every_slice_has_its_own_rescale(tmp_path):
    slopes = {z: z + 0.5 for z in range(5)}  # as in PET
    folder = series(tmp_path / "scan", RescaleSlope=slopes, RescaleIntercept={z: z for z in slopes})
    expected = [plane * slopes[z] + z for z, plane in enumerate(HU)]
    assert np.array_equal(read_volume(folder).voxels, expected)


@pytest.mark.parametrize("centre", [50, [50, 600]], ids=["one", "the first of two"])
def test_the_file_s_own_window_is_used(tmp_path, centre):
    values = np.array([[-100, -51, -50, 0, 49, 50, 99, 149, 150, 400]], np.int16)
    width = 200 if centre == 50 else [200, 1000]
    path = dicom(tmp_path / "a.dcm", values, WindowCenter=centre, WindowWidth=width)
    [shown] = read_volume(path).images()
    # PS3.3 C.11.2.1.2: 0 up to c - 0.5 - (w - 1) / 2 = -50, 255 over 149, and between them
    # ((x - 49.5) / 199 + 0.5) * 255
    assert shown[0, :, 0].tolist() == [0, 0, 0, 64, 127, 128, 191, 255, 255, 255]
    [given] = read_volume(path).images("150, 100")
    assert given[0, :, 0].tolist() == [0, 0, 0, 0, 0, 0, 0, 125, 128, 255]


MONOCHROME1 = {  # stored numbers and attributes of values -200 to 300
    "12 bits, signed": (HU & 0xFFF, {"BitsStored": 12}),
    "scaled": (
        ((HU.astype(int) + 1024) * 2).astype(np.uint16),
        {"RescaleSlope": 0.5, "RescaleIntercept": -1024, "BitsStored": 14},
    ),
}


@pytest.mark.parametrize("kind", MONOCHROME1)
def test_monochrome1_is_shown_inverted_and_keeps_its_values(tmp_path, kind):
    stored, more = MONOCHROME1[kind]
    folder = series(tmp_path / "scan", stored, PhotometricInterpretation="MONOCHROME1", **more)
    volume = read_volume(folder)
    assert np.array_equal(volume.voxels, HU)
    shown = np.stack(list(volume.images(WINDOW)))[..., 0].astype(int)
    assert np.abs(shown - (255 - windowed(HU).astype(int))).max() <= 1


COLOURS = np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255], [90, 90, 90]]], np.uint8).repeat(3, 0)
RGB = {"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB", "PlanarConfiguration": 0}


def palette():
    """Attributes of a palette with four colours."""
    found = {}
    for i, name in enumerate(("Red", "Green", "Blue")):
        table = COLOURS[0, :, i].astype(np.uint16) * 257
        found[f"{name}PaletteColorLookupTableData"] = table.tobytes()
        found[f"{name}PaletteColorLookupTableDescriptor"] = [4, 0, 16]
    return found | {"PhotometricInterpretation": "PALETTE COLOR"}


FRAMES = {
    "RGB by planes": (
        np.ascontiguousarray(COLOURS.transpose(2, 0, 1)).reshape(COLOURS.shape),
        RGB | {"PlanarConfiguration": 1},
    ),
    "YBR_FULL": (  # the matrix of JPEG is that of DICOM
        np.asarray(Image.fromarray(COLOURS).convert("YCbCr")),
        RGB | {"PhotometricInterpretation": "YBR_FULL"},
    ),
    "PALETTE COLOR": (np.arange(4, dtype=np.uint8)[None].repeat(3, 0), palette()),
}


@pytest.mark.parametrize("kind", FRAMES)
def test_colour_frames_keep_their_colours_whatever_the_window(tmp_path, kind):
    pixels, attributes = FRAMES[kind]
    path = dicom(tmp_path / "a.dcm", pixels, **attributes)
    [shown] = read_volume(path).images(WINDOW)
    assert shown.shape == COLOURS.shape and np.abs(shown.astype(int) - COLOURS).max() <= 2


def test_the_frames_of_one_file_are_slices(tmp_path):
    frames = {"NumberOfFrames": 5, "Rows": 7, "Columns": 6}
    image = dicom(tmp_path / "a.dcm", HU.reshape(-1, 6), **frames)
    assert np.array_equal(read_volume(image).voxels, HU)
    assert read_volume(image).space.shape == HU.shape
    write_mask(tmp_path / "m.nii.gz", LESION, like=image)
    readings = same(read(case(image, tmp_path / "m.nii.gz"), WINDOW), windowed(HU), LESION)
    assert [r.id for r in readings][:2] == ["scan_z000", "scan_z001"]


def test_monochrome1_masks_are_read_as_shown(tmp_path):
    image = dicom(tmp_path / "a.dcm", HU[2])
    stored = np.where(LESION[2], 0, 255).astype(np.uint8)  # 0 is shown white
    mask = dicom(tmp_path / "b.dcm", stored, PhotometricInterpretation="MONOCHROME1")
    same(read(case(image, mask), WINDOW), windowed(HU[2:3]), LESION[2:3])


@pytest.mark.parametrize(
    ("ground", "more", "words"),
    [
        ((255, 255, 255), {}, "what is the background"),
        ((0, 0, 0), {"LossyImageCompression": "01"}, "name the lesion with lesion_values"),
    ],
)
def test_dicom_masks_in_colour_or_changed_by_compression_are_refused(tmp_path, ground, more, words):
    pixels = np.where(LESION[0][..., None], (255, 0, 0) if not more else 90, ground)
    mask = dicom(tmp_path / "b.dcm", pixels.astype(np.uint8), **RGB, **more)
    with pytest.raises(UnreadableFile, match=words):
        [*read(case(dicom(tmp_path / "a.dcm", HU[0]), mask))]


def test_dicom_seg_is_refused_with_the_recipe(tmp_path):
    frames = {"NumberOfFrames": 5, "Rows": 7, "Columns": 6}
    segmentation = {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.66.4", **frames}
    mask = dicom(tmp_path / "b.dcm", LESION.reshape(-1, 6).astype(np.uint8), **segmentation)
    with pytest.raises(UnreadableFile, match=r"b\.dcm: DICOM SEG is not read; save it as NIfTI"):
        [*read(case(series(tmp_path / "scan"), mask))]


def as_pngs(folder):
    folder.mkdir()
    for name, plane in zip("kcaeb", LESION):
        Image.fromarray(plane).save(folder / f"{name}.png")
    return folder


MASKS = {
    "NIfTI, RAS": lambda d: nifti(
        d / "m.nii.gz", LESION.astype(np.uint8), ((0, 1, 2), (True, True, False))
    ),
    "NIfTI, LPS": lambda d: nifti(d / "m.nii", LESION.astype(np.uint8)),
    "a folder of PNG": lambda d: as_pngs(d / "masks"),
    "a folder of DICOM": lambda d: series(d / "masks", LESION.astype(np.uint16) * 3),
}


@pytest.mark.parametrize("kind", MASKS)
def test_masks_of_a_series_come_in_every_form(tmp_path, kind):
    folder = series(tmp_path / "scan")
    same(read(case(folder, MASKS[kind](tmp_path)), WINDOW), windowed(HU), LESION)


def test_one_dicom_file_is_an_image_with_a_mask_of_any_kind(tmp_path):
    image = dicom(tmp_path / "a.dcm", HU[0])
    Image.fromarray(LESION[0]).save(tmp_path / "a.png")
    write_mask(tmp_path / "a.nii.gz", LESION[:1], like=image)
    as_dicom = dicom(tmp_path / "m.dcm", LESION[0].astype(np.uint8))
    for mask in (tmp_path / "a.png", tmp_path / "a.nii.gz", as_dicom):
        [reading] = same(read(case(image, mask), WINDOW), windowed(HU[:1]), LESION[:1])
        assert (reading.id, reading.volume) == ("scan", "")


def test_a_mask_whose_header_is_not_reliable_is_matched_by_index_if_the_release_says_so(tmp_path):
    folder = series(tmp_path / "scan", InstanceNumber={z: 5 - z for z in range(5)})
    by_number = LESION[::-1].astype(np.uint8)  # slices of the mask follow InstanceNumber
    nib.save(nib.Nifti1Image(by_number.T, np.eye(4)), tmp_path / "m.nii.gz")
    scan = case(folder, tmp_path / "m.nii.gz", by_index=True)
    readings = same(read(scan, WINDOW), windowed(HU), LESION)
    assert any("matched voxel by voxel" in note for r in readings for note in r.notes)


def notes_of(folder, mask):
    [notes] = {r.notes for r in read(case(folder, mask)) if r.notes}
    return " | ".join(notes)


def test_missing_slices_are_noted_and_do_not_stretch_the_rest(tmp_path):
    places = {z: [-30, -12, -40 + 2.5 * (z + 2 * (z > 2))] for z in range(5)}
    folder = series(tmp_path / "scan", ImagePositionPatient=places)
    assert read_volume(folder).space.spacing == SPACING
    said = notes_of(folder, MASKS["a folder of PNG"](tmp_path))
    assert "2 slices missing" in said and "2.5 to 7.5" in said


def test_without_positions_the_instance_number_orders_and_the_note_says_so(tmp_path):
    folder = series(
        tmp_path / "scan",
        ImagePositionPatient=None,
        InstanceNumber={z: z + (z > 3) for z in range(5)},
        PixelSpacing=None,
        SliceThickness=3,
    )
    said = notes_of(folder, MASKS["a folder of PNG"](tmp_path))
    assert np.array_equal(read_volume(folder).voxels, HU)
    assert read_volume(folder).space.spacing == (3, 1, 1)
    for words in ("ordered by InstanceNumber", "1 slices missing", "no PixelSpacing"):
        assert words in said


def test_the_spacing_of_the_detector_is_used_without_another(tmp_path):
    path = dicom(tmp_path / "a.dcm", HU[0], PixelSpacing=None, ImagerPixelSpacing=[0.2, 0.3])
    assert read_volume(path).space.spacing == (1, 0.2, 0.3)


def test_files_beside_the_slices_are_ignored_and_counted(tmp_path):
    folder = series(tmp_path / "scan")
    (folder / "notes.txt").write_text("taken on a Monday")
    (folder / ".DS_Store").write_bytes(b"\0")
    (folder / "k.dcm").rename(folder / "IM000001")  # DICOM files need no suffix
    report = pydicom.dcmread(folder / "c.dcm")
    del report.PixelData, report.Rows, report.Columns
    report.SOPClassUID = report.file_meta.MediaStorageSOPClassUID = REPORT
    report.save_as(folder / "report.dcm")
    image = pydicom.dcmread(folder / "b.dcm")
    image.ReferencedSOPClassUID = REPORT  # a report that mentions this image
    image.save_as(folder / "b.dcm")
    mask = MASKS["NIfTI, LPS"](tmp_path)
    assert np.array_equal(read_volume(folder).voxels, HU)
    assert notes_of(folder, mask) == "2 files without an image ignored"


def test_the_patient_of_a_dicom_image_is_its_group(tmp_path):
    mask = MASKS["NIfTI, LPS"](tmp_path)
    folder = series(tmp_path / "scan", PatientID="patient 7")
    assert {r.group for r in read(case(folder, mask))} == {"patient 7"}
    assert {r.group for r in read(case(series(tmp_path / "other"), mask))} == {SERIES}
