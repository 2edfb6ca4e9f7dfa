"""NIfTI volumes that are made here, stored in every way people store them, cut into slices and written back."""

import itertools
import tracemalloc

import nibabel as nib
import numpy as np
import pytest

from lesionkd_core.datasets import read, slices
from lesionkd_core.datasets.files import Case
from lesionkd_core.datasets.volumes import read_volume, space_of, write_mask

SHAPE = (5, 7, 6)  # slices, rows, columns; all different, so that no axis is taken for another
SPACING = (2.5, 0.75, 0.5)
WINDOW = "40, 400"  # -160 to 240 HU
LPS = np.array([[-0.5, 0, 0, 30.0], [0, -0.75, 0, 12.0], [0, 0, 2.5, -40.0], [0, 0, 0, 1]])  # (column, row, slice) -> mm: left, posterior, head
WAYS = list(itertools.product(itertools.permutations(range(3)), itertools.product((False, True), repeat=3)))  # all 48 ways to store three axes
RNG = np.random.default_rng(0)
HU = RNG.integers(-200, 300, SHAPE).astype(np.int16)
LESION = RNG.random(SHAPE) < 0.2


def tilted(degrees):
    """LPS turned about the head-foot and the left-right axis."""
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    turn = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ np.array([[1, 0, 0], [0, c, -s], [0, s, c]])
    affine = LPS.copy()
    affine[:3] = turn @ LPS[:3]
    return affine


def stored(voxels, way=((0, 1, 2), (False,) * 3), affine=LPS):
    """(D, H, W) as a file would hold it, whose axis i is column, row or slice number way[0][i], backwards where way[1][i]; by hand."""
    order, backwards = way
    sizes = voxels.shape[::-1]
    back = np.zeros((4, 4))
    back[3, 3] = 1
    for i, (axis, flip) in enumerate(zip(order, backwards)):
        back[axis, i], back[axis, 3] = (-1, sizes[axis] - 1) if flip else (1, 0)
    out = voxels.transpose(2, 1, 0).transpose(order)
    return out[tuple(slice(None, None, -1) if flip else slice(None) for flip in backwards)], affine @ back


def nifti(path, voxels, way=((0, 1, 2), (False,) * 3), affine=LPS):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(*stored(voxels, way, affine)), path)
    return path


def windowed(values, low=-160.0, high=240.0):
    """By hand: (D, H, W) -> (D, H, W) uint8."""
    return np.floor(255 * np.clip((values - low) / (high - low), 0, 1) + 0.5).astype(np.uint8)


def case(image, *masks, **more):
    return Case("scan", image, masks, **more)


def same(readings, images, masks):
    readings = list(readings)
    assert [r.image.dtype for r in readings] == [np.uint8] * len(images)
    assert np.abs(np.stack([r.image for r in readings]).astype(int) - np.asarray(images)[..., None]).max() <= 1  # 127.5 may round either way
    assert np.array_equal(np.stack([r.mask for r in readings]), masks)
    return readings


@pytest.mark.parametrize("affine", [LPS, tilted(20)], ids=["straight", "oblique"])
def test_one_anatomy_gives_the_same_slices_however_its_axes_are_stored(tmp_path, affine):
    for number, way in enumerate(WAYS):
        image = nifti(tmp_path / "a.nii", HU, way, affine)
        mask = nifti(tmp_path / "a_mask.nii.gz", LESION.astype(np.uint8), WAYS[-number], affine)
        readings = same(read(case(image, mask), WINDOW), windowed(HU), LESION)
        assert [r.id for r in readings] == [f"scan_z{z:03d}" for z in range(5)] and {r.volume for r in readings} == {"scan"}
        assert np.allclose(space_of(image).affine, affine, atol=1e-5) and np.allclose(space_of(image).spacing, SPACING, atol=1e-5)


def test_the_patient_s_left_is_on_the_right_posterior_below_and_the_head_last(tmp_path):
    voxels = np.zeros((9, 8, 7), np.uint8)  # RAS+: x to the right, y to the front, z to the head
    voxels[1, 2, 5] = 1  # left, posterior, head
    nib.save(nib.Nifti1Image(voxels, np.eye(4)), tmp_path / "a.nii")
    assert np.argwhere(read_volume(tmp_path / "a.nii").voxels).tolist() == [[5, 8 - 1 - 2, 9 - 1 - 1]]


def test_values_are_scaled_by_the_header_and_stay_small_in_memory(tmp_path):
    image = nib.Nifti1Image(stored(((HU + 1024) * 2).astype(np.int16))[0], LPS)
    image.header.set_slope_inter(0.5, -1024)  # nibabel writes the numbers as they are then
    nib.save(image, tmp_path / "a.nii")
    volume = read_volume(tmp_path / "a.nii")
    assert volume.voxels.dtype == np.int16 and np.array_equal(volume.voxels, (HU + 1024) * 2)
    assert np.array_equal(np.stack([volume.values(z) for z in range(5)]), HU)


def test_without_a_window_the_percentiles_of_the_volume_decide(tmp_path, monkeypatch):
    image, mask = nifti(tmp_path / "a.nii.gz", HU.astype(np.float32)), nifti(tmp_path / "m.nii", LESION.astype(np.uint8))
    same(read(case(image, mask)), windowed(HU, *np.percentile(HU, [0.5, 99.5])), LESION)
    ramp = np.tile(np.arange(64, dtype=np.int16), (4, 64, 1))
    [low, high] = read_volume(nifti(tmp_path / "ramp.nii", ramp))._percentiles()
    monkeypatch.setattr(slices, "SAMPLE", ramp.size // 16)
    assert np.allclose(read_volume(tmp_path / "ramp.nii")._percentiles(), [low, high], atol=4)


def test_a_flat_volume_is_black_and_a_bool_like_one_is_read(tmp_path):
    assert not any(image.any() for image in read_volume(nifti(tmp_path / "a.nii", np.full(SHAPE, 7, np.uint8))).images())


def test_every_value_of_a_mask_but_0_is_lesion_and_several_masks_are_united(tmp_path):
    labels, soft = LESION * RNG.integers(1, 5, SHAPE), np.zeros(SHAPE, np.float32)
    soft[4, 6, 5] = 0.2
    image = nifti(tmp_path / "a.nii", HU)
    masks = nifti(tmp_path / "m1.nii", labels.astype(np.int16)), nifti(tmp_path / "m2.nii", soft)
    readings = same(read(case(image, *masks), WINDOW), windowed(HU), LESION | (soft > 0))
    assert [note for r in readings for note in r.notes] == ["2 masks united"]


def test_notes_stand_at_the_first_slice_with_a_lesion(tmp_path):
    late = LESION.copy()
    late[:3] = False
    image, mask = nifti(tmp_path / "a.nii", HU), nifti(tmp_path / "m.nii", late.astype(np.uint8))
    assert [bool(r.notes) for r in read(case(image, mask, mask))] == [False, False, False, True, False]


@pytest.mark.parametrize("shape", [(6, 7), (6, 7, 1), (6, 7, 1, 1)])
def test_a_volume_of_one_slice_is_an_image(tmp_path, shape):
    for name, values in (("a.nii", HU), ("m.nii", LESION.astype(np.uint8))):
        nib.save(nib.Nifti1Image(values[0].T.reshape(shape), LPS), tmp_path / name)
    [reading] = same(read(case(tmp_path / "a.nii", tmp_path / "m.nii"), WINDOW), windowed(HU[:1]), LESION[:1])
    assert (reading.id, reading.volume) == ("scan", "")


def test_one_frame_of_a_fourth_axis_is_a_volume(tmp_path):
    nib.save(nib.Nifti1Image(stored(HU)[0][..., None], LPS), tmp_path / "A.NII.GZ")
    assert np.array_equal(read_volume(tmp_path / "A.NII.GZ").voxels, HU)


@pytest.mark.parametrize("affine", [LPS, tilted(20)], ids=["straight", "oblique"])
def test_what_is_written_lies_on_its_source_voxel_by_voxel(tmp_path, affine):
    for way in WAYS:
        source = nifti(tmp_path / "a.nii", HU, way, affine)
        write_mask(tmp_path / "out.nii.gz", LESION, like=source)
        written, original = nib.load(tmp_path / "out.nii.gz"), nib.load(source)
        assert written.shape == original.shape and np.array_equal(written.affine, original.affine) and written.get_data_dtype() == np.uint8
        assert np.array_equal(np.asarray(written.dataobj), stored(LESION, way)[0])
        assert np.array_equal(read_volume(tmp_path / "out.nii.gz").voxels, LESION)
        same(read(case(source, tmp_path / "out.nii.gz"), WINDOW), windowed(HU), LESION)


def test_what_is_written_keeps_codes_units_type_and_a_fourth_axis(tmp_path):
    source = nib.Nifti2Image(stored(HU)[0][..., None], None)
    source.set_qform(LPS, 3)
    source.header.set_xyzt_units("mm", "sec")
    source.header.set_slope_inter(2, 10)
    source.header["cal_max"] = 400
    nib.save(source, tmp_path / "a.nii.gz")
    probability = RNG.random(SHAPE).astype(np.float32)
    write_mask(tmp_path / "p.nii", probability, like=tmp_path / "a.nii.gz")
    original, written = nib.load(tmp_path / "a.nii.gz"), nib.load(tmp_path / "p.nii")
    assert np.array_equal(written.affine, original.affine) and written.shape == original.shape
    assert [int(written.header[name]) for name in ("qform_code", "sform_code")] == [3, 0]
    assert written.header.get_xyzt_units() == ("mm", "sec") and written.header["cal_max"] == 0
    assert np.array_equal(np.asarray(written.dataobj), stored(probability)[0][..., None])


def test_memory_does_not_grow_with_the_arithmetic(tmp_path):
    voxels = RNG.integers(0, 50, (96, 128, 128)).astype(np.int16)
    image, mask = nifti(tmp_path / "a.nii.gz", voxels), nifti(tmp_path / "m.nii.gz", (voxels > 40).astype(np.uint8))
    assert peak(case(image, mask)) < 2.8 * voxels.nbytes  # volume, bool mask, and for a moment what gzip unpacks; float64 alone were 4


def peak(scan):
    """Bytes at the highest, reading a case slice by slice."""
    next(read(scan, WINDOW))  # imports
    tracemalloc.start()
    for _ in read(scan, WINDOW):
        pass
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return most
