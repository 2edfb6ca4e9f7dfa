"""DICOM files and series that are made here: order, place, greys, colours and masks in every form."""

import nibabel as nib
import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.uid import ExplicitVRLittleEndian, RLELossless, generate_uid

from lesionkd_core.datasets import read
from lesionkd_core.datasets.volumes import read_volume, space_of, write_mask

from .test_volumes import HU, LESION, LPS, RNG, SPACING, WAYS, WINDOW, case, nifti, peak, same, windowed

SERIES = generate_uid()


def dicom(path, pixels, **attributes):
    """Write one image; attributes of a file are those of an axial CT slice unless given, None leaves one out."""
    header = pydicom.Dataset()
    header.file_meta = pydicom.dataset.FileMetaDataset()
    header.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    header.SOPClassUID, header.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.2", generate_uid()
    header.Rows, header.Columns = pixels.shape[:2]
    header.BitsAllocated = header.BitsStored = 8 * pixels.itemsize
    header.HighBit, header.PixelRepresentation = header.BitsStored - 1, int(pixels.dtype.kind == "i")
    usual = {
        "SeriesInstanceUID": SERIES, "SamplesPerPixel": 1, "PhotometricInterpretation": "MONOCHROME2", "PixelSpacing": [0.75, 0.5],
        "ImageOrientationPatient": [1, 0, 0, 0, 1, 0], "ImagePositionPatient": [-30, -12, -40], "InstanceNumber": 1,
    }
    for name, value in (usual | attributes).items():
        if value is not None:
            setattr(header, name, value)
    header.PixelData = pixels.tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    header.save_as(path, enforce_file_format=True)
    return path


def series(folder, voxels=HU, names="kcaeb", **attributes):
    """A series whose names say nothing about the order of its slices."""
    for z, (name, pixels) in enumerate(zip(names, voxels)):
        at = {"ImagePositionPatient": [-30, -12, -40 + 2.5 * z], "InstanceNumber": z + 1}
        dicom(folder / f"{name}.dcm", pixels, **at | {n: v[z] if isinstance(v, dict) else v for n, v in attributes.items()})
    return folder


def test_a_series_is_ordered_by_position_whatever_names_and_numbers_say(tmp_path):
    folder = series(tmp_path / "scan", InstanceNumber={z: 5 - z for z in range(5)})
    mask = nifti(tmp_path / "m.nii.gz", LESION.astype(np.uint8), WAYS[13])
    readings = same(read(case(folder, mask), WINDOW), windowed(HU), LESION)
    assert [r.id for r in readings][::4] == ["scan_z000", "scan_z004"] and not any(r.notes for r in readings)
    assert np.allclose(space_of(folder).affine, LPS) and space_of(folder).spacing == SPACING


def test_a_sagittal_series_is_shown_as_acquired_and_its_affine_is_dicom_s(tmp_path):
    # rows run to the feet, columns to posterior, slices from the patient's right to the left: x = -30 + 2.5 z
    folder = series(
        tmp_path / "scan", ImageOrientationPatient=[0, 1, 0, 0, 0, -1], ImagePositionPatient={z: [-30 - 2.5 * z, -12, 40] for z in range(5)}
    )  # normal = columns x rows = (-1, 0, 0): slices go from left to right
    assert np.array_equal(read_volume(folder).voxels, HU)
    expected = np.array([[0, 0, 2.5, 30], [-0.5, 0, 0, 12], [0, -0.75, 0, 40], [0, 0, 0, 1]])  # LPS to RAS: x and y change sign
    assert np.allclose(space_of(folder).affine, expected)
    write_mask(tmp_path / "m.nii.gz", LESION, like=folder)
    same(read(case(folder, tmp_path / "m.nii.gz"), WINDOW), windowed(HU), LESION)


def test_a_tilted_gantry_keeps_its_shear(tmp_path):
    folder = series(tmp_path / "scan", ImagePositionPatient={z: [-30, -12 + 0.5 * z, -40 + 2.5 * z] for z in range(5)})
    assert np.allclose(space_of(folder).affine[:3, 2], [0, -0.5, 2.5])
    write_mask(tmp_path / "m.nii.gz", LESION, like=folder)
    assert np.allclose(nib.load(tmp_path / "m.nii.gz").affine, space_of(folder).affine)
    same(read(case(folder, tmp_path / "m.nii.gz"), WINDOW), windowed(HU), LESION)


def test_a_written_mask_of_a_series_has_the_series_affine_in_ras(tmp_path):
    write_mask(tmp_path / "m.nii.gz", LESION, like=series(tmp_path / "scan"))
    written = nib.load(tmp_path / "m.nii.gz")
    assert np.allclose(written.affine, LPS) and np.allclose(written.get_qform(), LPS) and written.header["sform_code"] == 1
    assert np.array_equal(np.asarray(written.dataobj), LESION.transpose(2, 1, 0))


def test_rescale_comes_before_the_window(tmp_path):
    raw = ((HU.astype(int) + 1024) * 2).astype(np.uint16)
    volume = read_volume(series(tmp_path / "scan", raw, RescaleSlope=0.5, RescaleIntercept=-1024))
    assert volume.voxels.dtype == np.uint16 and np.array_equal(np.stack([volume.values(z) for z in range(5)]), HU)
    assert np.abs(np.stack(list(volume.images(WINDOW)))[..., 0].astype(int) - windowed(HU)).max() <= 1


@pytest.mark.parametrize("centre", [50, [50, 600]], ids=["one", "the first of two"])
def test_the_file_s_own_window_is_respected(tmp_path, centre):
    values = np.array([[-100, -51, -50, 0, 49, 50, 99, 149, 150, 400]], np.int16)
    path = dicom(tmp_path / "a.dcm", values, WindowCenter=centre, WindowWidth=200 if centre == 50 else [200, 1000])
    [shown] = read_volume(path).images()
    # PS3.3 C.11.2.1.2: x <= c - 0.5 - (w-1)/2 = -50 is 0; x > 149 is 255; between ((x - 49.5) / 199 + 0.5) * 255
    assert shown[0, :, 0].tolist() == [0, 0, 0, 64, 127, 128, 191, 255, 255, 255]
    [given] = read_volume(path).images("150, 100")
    assert given[0, :, 0].tolist() == [0, 0, 0, 0, 0, 0, 0, 125, 128, 255]  # (149 - 100) / 100 x 255 = 124.95


def test_monochrome1_is_inverted(tmp_path):
    folder = series(tmp_path / "scan", PhotometricInterpretation="MONOCHROME1")
    shown = np.stack(list(read_volume(folder).images(WINDOW)))[..., 0]
    assert np.abs(shown.astype(int) - (255 - windowed(HU).astype(int))).max() <= 1


@pytest.mark.parametrize("kind", ["RGB", "RGB by planes", "RGB of 16 bits", "YBR_FULL", "PALETTE COLOR"])
def test_colour_frames_keep_their_colours_whatever_the_window(tmp_path, kind):
    colours = np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255], [90, 90, 90]]], np.uint8).repeat(3, 0)
    colour = {"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB", "PlanarConfiguration": 0}
    if kind == "RGB":
        path = dicom(tmp_path / "a.dcm", colours, **colour)
    elif kind == "RGB by planes":
        planes = np.ascontiguousarray(colours.transpose(2, 0, 1)).reshape(colours.shape)
        path = dicom(tmp_path / "a.dcm", planes, **colour | {"PlanarConfiguration": 1})
    elif kind == "RGB of 16 bits":
        path = dicom(tmp_path / "a.dcm", colours.astype(np.uint16) * 257, **colour)
    elif kind == "YBR_FULL":
        ybr = np.asarray(Image.fromarray(colours).convert("YCbCr"))  # the JPEG matrix is DICOM's
        path = dicom(tmp_path / "a.dcm", ybr, **colour | {"PhotometricInterpretation": "YBR_FULL"})
    else:
        tables = {f"{n}PaletteColorLookupTableData": (colours[0, :, i].astype(np.uint16) * 257).tobytes() for i, n in enumerate(("Red", "Green", "Blue"))}
        tables |= {f"{n}PaletteColorLookupTableDescriptor": [4, 0, 16] for n in ("Red", "Green", "Blue")}
        path = dicom(tmp_path / "a.dcm", np.arange(4, dtype=np.uint8)[None].repeat(3, 0), PhotometricInterpretation="PALETTE COLOR", **tables)
    [shown] = read_volume(path).images(WINDOW)
    assert shown.shape == colours.shape and np.abs(shown.astype(int) - colours).max() <= 2


def test_run_length_coding_is_decoded(tmp_path):
    header = pydicom.dcmread(dicom(tmp_path / "a.dcm", HU[0]))
    header.compress(RLELossless)
    header.save_as(tmp_path / "a.dcm")
    assert np.array_equal(read_volume(tmp_path / "a.dcm").voxels[0], HU[0])


def as_pngs(folder):
    folder.mkdir()
    for name, plane in zip("kcaeb", LESION):
        Image.fromarray(plane).save(folder / f"{name}.png")
    return folder


MASKS = {
    "NIfTI, RAS": lambda d: nifti(d / "m.nii.gz", LESION.astype(np.uint8), ((0, 1, 2), (True, True, False))),
    "NIfTI, LPS": lambda d: nifti(d / "m.nii", LESION.astype(np.uint8)),
    "NIfTI, sagittal": lambda d: nifti(d / "m.nii", LESION.astype(np.uint8), ((1, 2, 0), (True, False, True))),
    "a folder of PNG": lambda d: as_pngs(d / "masks"),
    "a folder of DICOM": lambda d: series(d / "masks", LESION.astype(np.uint16) * 3),
}


@pytest.mark.parametrize("kind", MASKS)
def test_masks_of_a_series_come_in_every_form(tmp_path, kind):
    same(read(case(series(tmp_path / "scan"), MASKS[kind](tmp_path)), WINDOW), windowed(HU), LESION)


def test_one_dicom_file_is_an_image_with_a_mask_of_any_kind(tmp_path):
    image = dicom(tmp_path / "a.dcm", HU[0])
    Image.fromarray(LESION[0]).save(tmp_path / "a.png")
    write_mask(tmp_path / "a.nii.gz", LESION[:1], like=image)
    for mask in (tmp_path / "a.png", tmp_path / "a.nii.gz", dicom(tmp_path / "m.dcm", LESION[0].astype(np.uint8))):
        [reading] = same(read(case(image, mask), WINDOW), windowed(HU[:1]), LESION[:1])
        assert (reading.id, reading.volume) == ("scan", "")


def notes_of(folder, mask):
    [notes] = {r.notes for r in read(case(folder, mask)) if r.notes}
    return " | ".join(notes)


def test_missing_slices_are_told_and_do_not_stretch_the_rest(tmp_path):
    place = {z: [-30, -12, -40 + 2.5 * (z + 2 * (z > 2))] for z in range(5)}
    folder = series(tmp_path / "scan", ImagePositionPatient=place)
    assert space_of(folder).spacing == SPACING
    said = notes_of(folder, MASKS["a folder of PNG"](tmp_path))
    assert "2 slices missing" in said and "2.5 to 7.5" in said


def test_without_positions_the_instance_number_orders_and_the_note_says_so(tmp_path):
    folder = series(tmp_path / "scan", ImagePositionPatient=None, InstanceNumber={z: z + (z > 3) for z in range(5)}, PixelSpacing=None, SliceThickness=3)
    said = notes_of(folder, MASKS["a folder of PNG"](tmp_path))
    assert np.array_equal(read_volume(folder).voxels, HU) and space_of(folder).spacing == (3, 1, 1)
    assert all(words in said for words in ("ordered by InstanceNumber", "1 slices missing", "no PixelSpacing"))


def test_files_beside_the_slices_are_passed_over_and_counted(tmp_path):
    folder = series(tmp_path / "scan")
    (folder / "notes.txt").write_text("taken on a Monday")
    (folder / ".DS_Store").write_bytes(b"\0")
    (folder / "k.dcm").rename(folder / "IM000001")  # DICOM files need no suffix
    report = pydicom.dcmread(folder / "c.dcm")
    del report.PixelData, report.Rows, report.Columns
    report.save_as(folder / "report")
    mask = MASKS["NIfTI, LPS"](tmp_path)
    assert np.array_equal(read_volume(folder).voxels, HU) and notes_of(folder, mask) == "2 files beside the slices passed over"


def test_memory_holds_one_series_at_its_own_type(tmp_path):
    voxels = RNG.integers(0, 50, (24, 128, 128)).astype(np.int16)
    folder = series(tmp_path / "scan", voxels, [f"{z:02d}" for z in range(24)])
    assert peak(case(folder, nifti(tmp_path / "m.nii", (voxels > 40).astype(np.uint8)))) < 2 * voxels.nbytes
