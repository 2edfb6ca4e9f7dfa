"""Volumes that cannot be used: each is refused before its first slice, with the file and what is wrong with it."""

import gzip

import nibabel as nib
import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.uid import JPEGLSLossless, generate_uid

from lesionkd_core.config import LesionKDError
from lesionkd_core.datasets import UnreadableFile, read
from lesionkd_core.datasets.volumes import write_mask

from .test_dicom import as_pngs, dicom, series
from .test_volumes import HU, LESION, LPS, case, nifti, stored

pytestmark = pytest.mark.fault


def cut(path, to=0.6):
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * to)])
    return path


def good(d):
    return nifti(d / "a.nii.gz", HU), nifti(d / "m.nii.gz", LESION.astype(np.uint8))


def image_is(d, path):
    return path, good(d)[1]


def mask_is(d, path):
    return good(d)[0], path


def alone(d, path):
    """One DICOM file with a good mask."""
    Image.fromarray(LESION[0]).save(d / "m.png")
    return path, d / "m.png"


def raw_nifti(d, voxels, affine=LPS, name="b.nii"):
    nib.save(nib.Nifti1Image(voxels, affine), d / name)
    return d / name


def text(path, content="<html>404</html>"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    return path


def zero_affine(d):
    path = raw_nifti(d, stored(HU)[0])
    content = bytearray(path.read_bytes())
    content[280:328] = bytes(48)  # srow_x, srow_y, srow_z
    path.write_bytes(content)
    return path


def with_file(folder, name, **attributes):
    dicom(folder / name, attributes.pop("pixels", HU[0]), **{"ImagePositionPatient": [-30, -12, 90], "InstanceNumber": 90} | attributes)
    return folder


def uncoded(d):
    header = pydicom.dcmread(dicom(d / "a.dcm", HU[0]))
    header.file_meta.TransferSyntaxUID = JPEGLSLossless
    header.PixelData = pydicom.encaps.encapsulate([b"\xff\xd8\xff\xf7"])
    header.save_as(d / "a.dcm")
    return d / "a.dcm"


def with_gap(folder):
    (folder / "e.png").unlink()
    return folder


def other_shape(folder):
    Image.fromarray(LESION[0].T).save(folder / "e.png")
    return folder


def emptied(folder):
    for path in folder.iterdir():
        path.unlink()
    return folder


def corrupt_gzip(path):
    path.write_bytes(gzip.compress(b"\0" * 900))
    return path


FAULTS = {  # what is wrong: (image, mask) that is read, words of the message
    "no mask": (lambda d: good(d)[:1], ["a.nii.gz", "no mask"]),
    "image missing": (lambda d: image_is(d, d / "gone.nii.gz"), ["gone.nii.gz", "missing"]),
    "mask missing": (lambda d: mask_is(d, d / "gone.nii"), ["gone.nii", "missing"]),
    "NIfTI that is text": (lambda d: image_is(d, text(d / "b.nii")), ["b.nii", "cannot be read as NIfTI"]),
    "gzip that is text": (lambda d: image_is(d, text(d / "b.nii.gz")), ["b.nii.gz", "cannot be read as NIfTI"]),
    "gzip of zeros": (lambda d: image_is(d, corrupt_gzip(d / "b.nii.gz")), ["b.nii.gz", "cannot be read as NIfTI"]),
    "NIfTI that is empty": (lambda d: image_is(d, text(d / "b.nii", "")), ["b.nii", "cannot be read as NIfTI"]),
    "NIfTI cut": (lambda d: image_is(d, cut(nifti(d / "b.nii", HU))), ["b.nii", "cannot be read as NIfTI"]),
    "NIfTI cut in its header": (lambda d: image_is(d, cut(nifti(d / "b.nii", HU), 0.2)), ["b.nii", "cannot be read as NIfTI"]),
    "packed NIfTI cut": (lambda d: image_is(d, cut(nifti(d / "b.nii.gz", HU))), ["b.nii.gz", "cannot be read as NIfTI"]),
    "mask cut": (lambda d: mask_is(d, cut(nifti(d / "b.nii.gz", LESION.astype(np.uint8)))), ["b.nii.gz", "cannot be read as NIfTI"]),
    "several frames": (lambda d: image_is(d, raw_nifti(d, np.zeros((6, 7, 5, 3), np.int16))), ["b.nii", "6 x 7 x 5 x 3", "one volume a file"]),
    "a line": (lambda d: image_is(d, raw_nifti(d, np.zeros(6, np.int16))), ["b.nii", "no volume"]),
    "complex voxels": (lambda d: image_is(d, raw_nifti(d, np.zeros((6, 7, 5), np.complex64))), ["b.nii", "complex64"]),
    "colour voxels": (lambda d: image_is(d, raw_nifti(d, np.zeros((6, 7, 5), [(c, "u1") for c in "RGB"]))), ["b.nii", "one number a voxel"]),
    "NaN": (lambda d: image_is(d, raw_nifti(d, np.full((6, 7, 5), np.nan, np.float32))), ["b.nii", "NaN"]),
    "NaN in a mask": (lambda d: mask_is(d, raw_nifti(d, np.full((6, 7, 5), np.nan, np.float32))), ["b.nii", "NaN"]),
    "affine of zeros": (lambda d: image_is(d, zero_affine(d)), ["b.nii", "affine"]),
    "mask of another shape": (lambda d: mask_is(d, nifti(d / "b.nii", LESION[:4].astype(np.uint8))), ["b.nii", "(4, 7, 6)", "(5, 7, 6)"]),
    "mask elsewhere": (lambda d: mask_is(d, nifti(d / "b.nii", LESION.astype(np.uint8), affine=LPS + np.eye(4, k=3) * 3)), ["b.nii", "3.0 mm off"]),
    "mask that lost its affine": (lambda d: mask_is(d, raw_nifti(d, np.zeros((6, 7, 5), np.uint8), np.diag([-1, -1, 1, 1]))), ["b.nii", "mm off", "affine"]),
    "PNG mask of a NIfTI volume": (lambda d: mask_is(d, as_pngs(d / "p") / "k.png"), ["k.png", "must be NIfTI"]),
    "folder of masks of a NIfTI volume": (lambda d: mask_is(d, as_pngs(d / "p")), ["p:", "must be NIfTI"]),
    "one PNG for a series": (lambda d: (series(d / "s"), as_pngs(d / "p") / "k.png"), ["k.png", "a mask for every slice"]),
    "a slice without a mask": (lambda d: (series(d / "s"), with_gap(as_pngs(d / "p"))), ["p:", "'e' is alone"]),
    "a mask without a slice": (lambda d: (series(d / "s", HU[:4]), as_pngs(d / "p")), ["p:", "'b' is alone"]),
    "a slice's mask of another shape": (lambda d: (series(d / "s"), other_shape(as_pngs(d / "p"))), ["e.png", "(6, 7)", "(7, 6)"]),
    "folder without DICOM": (lambda d: image_is(d, text(d / "s" / "a.txt").parent), ["s:", "no image in it"]),
    "empty folder": (lambda d: image_is(d, emptied(series(d / "s"))), ["s:", "no image in it"]),
    "DICOM that is text": (lambda d: image_is(d, text(d / "b.dcm")), ["b.dcm", "cannot be read as DICOM"]),
    "DICOM that is text in a series": (lambda d: image_is(d, text(series(d / "s") / "b.dcm").parent), ["b.dcm", "cannot be read as DICOM"]),
    "DICOM cut": (lambda d: alone(d, cut(dicom(d / "b.dcm", HU[0]), 0.9)), ["b.dcm", "cannot be read as DICOM"]),
    "slice cut": (lambda d: image_is(d, cut(series(d / "s") / "e.dcm", 0.9).parent), ["e.dcm", "cannot be read as DICOM"]),
    "DICOM without pixels": (lambda d: alone(d, dicom(d / "b.dcm", HU[0][:0])), ["b.dcm", "no image in it"]),
    "several frames in DICOM": (lambda d: image_is(d, dicom(d / "b.dcm", HU[0], NumberOfFrames=3)), ["b.dcm", "3 frames"]),
    "two series": (lambda d: image_is(d, with_file(series(d / "s"), "z.dcm", SeriesInstanceUID=generate_uid())), ["s:", "2 series", "one folder a series"]),
    "slices of two sizes": (lambda d: image_is(d, with_file(series(d / "s"), "z.dcm", pixels=HU[0][:-1])), ["s:", "differ in Rows"]),
    "slices of two types": (lambda d: image_is(d, series(d / "s", [*HU[:4], HU[4].astype(np.int8)])), ["b.dcm", "int8"]),
    "a scout": (lambda d: image_is(d, with_file(series(d / "s"), "z.dcm", ImageOrientationPatient=[0, 1, 0, 0, 0, -1])), ["s:", "ImageOrientation", "scout"]),
    "two phases": (lambda d: image_is(d, with_file(series(d / "s"), "z.dcm", ImagePositionPatient=[-30, -12, -40])), ["s:", "one ImagePosition", "phases"]),
    "no position, no number": (lambda d: image_is(d, series(d / "s", ImagePositionPatient=None, InstanceNumber=None)), ["s:", "neither a position"]),
}


@pytest.mark.parametrize("what", FAULTS)
def test_what_cannot_be_used_is_refused_before_the_first_slice_and_named(tmp_path, what):
    make, words = FAULTS[what]
    image, *masks = make(tmp_path)
    with pytest.raises(UnreadableFile) as error:
        next(read(case(image, *masks)))
    assert all(word in str(error.value) for word in words), str(error.value)
    assert error.value.__suppress_context__ or error.value.__context__ is None  # no traceback of a library below it


def test_a_missing_decoder_stops_the_work_instead_of_dropping_the_case(tmp_path):
    image, *masks = alone(tmp_path, uncoded(tmp_path))
    with pytest.raises(LesionKDError, match=r"a\.dcm: compressed as JPEG-LS(.|\n)*pip install pylibjpeg") as error:
        next(read(case(image, *masks)))
    assert not isinstance(error.value, UnreadableFile)


def test_two_masks_of_one_name_are_refused_where_one_was_meant(tmp_path):
    image, mask = good(tmp_path)
    with pytest.raises(UnreadableFile, match=r"m.nii.gz, m.nii.gz are masks of one name"):
        next(read(case(image, mask, mask, one_mask=True)))


def test_a_mask_of_another_shape_than_its_scan_is_not_written(tmp_path):
    with pytest.raises(ValueError, match=r"\(4, 7, 6\).*\(5, 7, 6\)"):
        write_mask(tmp_path / "out.nii.gz", LESION[:4], like=good(tmp_path)[0])
    assert not (tmp_path / "out.nii.gz").exists()
