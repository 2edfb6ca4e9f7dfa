"""Volumes that cannot be used are refused before their first slice; the error names the file."""

import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from PIL import Image
from pydicom.uid import RLELossless, generate_uid

from lesionkd_core.data.images import UnreadableFile
from lesionkd_core.data.layouts import read
from lesionkd_core.data.volumes import read_volume

from .test_dicom import as_pngs, dicom, series
from .test_volumes import HU, LESION, LPS, case, nifti, stored

pytestmark = pytest.mark.fault


def cut(path):
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * 0.95)])
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


def raw_nifti(d, voxels):
    nib.save(nib.Nifti1Image(voxels, LPS), d / "b.nii")
    return d / "b.nii"


def nrrd(d):
    sitk.WriteImage(sitk.ReadImage(nifti(d / "b.nii", HU)), d / "b.nrrd")
    return d / "b.nrrd"


def text(path):
    path.write_text("<html>404</html>")
    return path


def with_file(folder, **attributes):
    usual = {"ImagePositionPatient": [-30, -12, 90], "InstanceNumber": 90}
    dicom(folder / "z.dcm", HU[0], **usual | attributes)
    return folder


def compressed(d):
    """One compressed file that is cut off."""
    header = pydicom.dcmread(dicom(d / "b.dcm", HU[0]))
    header.compress(RLELossless)
    header.save_as(d / "b.dcm")
    return cut(d / "b.dcm")


def with_gap(folder):
    (folder / "e.png").unlink()
    return folder


def other_shape(folder):
    Image.fromarray(LESION[0].T).save(folder / "e.png")
    return folder


def flipped(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 255
    path.write_bytes(content)
    return path


SCOUT = {"ImageOrientationPatient": [0, 1, 0, 0, 0, -1]}
SAME_PLACE = {"ImagePositionPatient": [-30, -12, -40]}
UNPLACED = {"ImagePositionPatient": None, "InstanceNumber": None}
NAN = np.full((6, 7, 5), np.nan, np.float32)
RGB_VOXELS = np.zeros((6, 7, 5), [(c, "u1") for c in "RGB"])
NOT_NIFTI, NOT_DICOM = "cannot be read as NIfTI", "cannot be read as DICOM"
SHIFTED = LPS + np.eye(4, k=3) * 3

FAULTS = {  # what is wrong: (image, mask) that is read, words of the message
    "mask missing": (lambda d: mask_is(d, d / "gone.nii"), ["gone.nii", "missing"]),
    "NIfTI that is text": (lambda d: image_is(d, text(d / "b.nii")), ["b.nii", NOT_NIFTI]),
    "NIfTI-2": (
        lambda d: image_is(d, save_nifti_2(d / "b.nii")),
        ["b.nii", NOT_NIFTI, "NIfTI-2"],
    ),
    "packed NIfTI with a wrong byte": (
        lambda d: image_is(d, flipped(nifti(d / "b.nii.gz", HU), -100)),
        ["b.nii.gz", NOT_NIFTI],
    ),
    "a fourth axis": (
        lambda d: image_is(d, raw_nifti(d, np.zeros((6, 7, 5, 3), np.int16))),
        ["b.nii", "6 x 7 x 5 x 3", "axis 4 has 3 entries", "one volume in each file"],
    ),
    "colour voxels": (
        lambda d: image_is(d, raw_nifti(d, RGB_VOXELS)),
        ["b.nii", "one real number in each voxel"],
    ),
    "NaN": (lambda d: image_is(d, raw_nifti(d, NAN)), ["b.nii", "NaN"]),
    "mask of another shape": (
        lambda d: mask_is(d, nifti(d / "b.nii", LESION[:4].astype(np.uint8))),
        ["b.nii", "(4, 7, 6)", "(5, 7, 6)"],
    ),
    "mask elsewhere": (
        lambda d: mask_is(d, nifti(d / "b.nii", LESION.astype(np.uint8), affine=SHIFTED)),
        ["b.nii", "3.0 mm away"],
    ),
    "PNG mask of a NIfTI volume": (
        lambda d: mask_is(d, as_pngs(d / "p") / "k.png"),
        ["k.png", "must be a volume file"],
    ),
    "a slice without a mask": (
        lambda d: (series(d / "s"), with_gap(as_pngs(d / "p"))),
        ["p:", "'e' has no partner"],
    ),
    "a slice's mask of another shape": (
        lambda d: (series(d / "s"), other_shape(as_pngs(d / "p"))),
        ["e.png", "(1, 6, 7)", "(1, 7, 6)"],
    ),
    "compressed DICOM cut": (
        lambda d: alone(d, compressed(d)),
        ["b.dcm", NOT_DICOM, "cut off"],
    ),
    "several frames in a series": (
        lambda d: image_is(d, frames_in(series(d / "s"))),
        ["s:", "3 frames"],
    ),
    "two series": (
        lambda d: image_is(d, with_file(series(d / "s"), SeriesInstanceUID=generate_uid())),
        ["s:", "2 series", "a folder must hold one"],
    ),
    "a scout": (
        lambda d: image_is(d, with_file(series(d / "s"), **SCOUT)),
        ["s:", "orientation", "scout"],
    ),
    "two phases": (
        lambda d: image_is(d, with_file(series(d / "s"), **SAME_PLACE)),
        ["s:", "same ImagePositionPatient", "phase"],
    ),
    "no position, no number": (
        lambda d: image_is(d, series(d / "s", **UNPLACED)),
        ["s:", "neither a position nor a number"],
    ),
}


def save_nifti_2(path):
    nib.save(nib.Nifti2Image(stored(HU)[0], LPS), path)
    return path


def frames_in(folder):
    pixels = np.concatenate([HU[0]] * 3)
    for path in folder.iterdir():
        dicom(path, pixels, NumberOfFrames=3, Rows=7, Columns=6)
    return folder


@pytest.mark.parametrize("what", FAULTS)
def test_what_cannot_be_used_is_refused_before_the_first_slice_and_named(tmp_path, what):
    make, words = FAULTS[what]
    image, *masks = make(tmp_path)
    with pytest.raises(UnreadableFile) as error:
        next(read(case(image, *masks)))
    assert all(word in str(error.value) for word in words), str(error.value)
    assert str(tmp_path) not in str(error.value)
    assert error.value.__suppress_context__ or error.value.__context__ is None


def test_two_masks_of_one_name_are_refused_where_one_was_meant(tmp_path):
    image, mask = good(tmp_path)
    with pytest.raises(UnreadableFile, match=r"m.nii.gz, m.nii.gz have the same name"):
        next(read(case(image, mask, mask, one_mask=True)))


def test_a_file_that_is_cut_anywhere_is_refused(tmp_path):
    rng = np.random.default_rng(0)
    for path in (
        nifti(tmp_path / "a.nii", HU),
        nifti(tmp_path / "a.nii.gz", HU),
        dicom(tmp_path / "a.dcm", HU[0]),
        nrrd(tmp_path),
    ):
        whole, refused = path.read_bytes(), 0
        for _ in range(30):
            path.write_bytes(whole[: rng.integers(len(whole))])
            try:
                read_volume(path)
            except UnreadableFile as error:
                refused += str(error).startswith(path.name)
        assert refused == 30, f"{path.name}: {30 - refused} cut files were read"
