"""Volume files in every orientation: read as slices, and masks written back."""

import itertools
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from lesionkd_core.data import volumes
from lesionkd_core.data.images import Case
from lesionkd_core.data.layouts import read
from lesionkd_core.data.volumes import read_volume, write_mask

SHAPE = (5, 7, 6)  # slices, rows, columns; all different, so that no axis passes for another
SPACING = (2.5, 0.75, 0.5)
WINDOW = "40, 400"  # -160 to 240 HU
LPS = np.array([[-0.5, 0, 0, 30], [0, -0.75, 0, 12], [0, 0, 2.5, -40], [0, 0, 0, 1.0]])
"""(column, row, slice) to mm: left, posterior, head."""
WAYS = list(
    itertools.product(itertools.permutations(range(3)), itertools.product((False, True), repeat=3))
)
"""All 48 ways to store three axes."""
RNG = np.random.default_rng(0)
HU = RNG.integers(-200, 300, SHAPE).astype(np.int16)
LESION = RNG.random(SHAPE) < 0.2


def tilted(degrees):
    """LPS turned about the head-foot and the left-right axis."""
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    about_z = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])
    about_x = np.array([[1, 0, 0], [0, c, -s], [0, s, c]])
    affine = LPS.copy()
    affine[:3] = about_z @ about_x @ LPS[:3]
    return affine


def sheared():
    """LPS of a scan with a tilted gantry: slices move 0.5 mm to the front each."""
    affine = LPS.copy()
    affine[1, 2] = 0.5
    return affine


AFFINES = {"straight": LPS, "oblique": tilted(20), "sheared": sheared()}


def stored(voxels, way=((0, 1, 2), (False,) * 3), affine=LPS):
    """(D, H, W) as a file holds it, and its affine, by hand.

    Axis i of the file is column, row or slice number way[0][i], reversed if way[1][i].
    """
    order, backwards = way
    sizes = voxels.shape[::-1]
    back = np.zeros((4, 4))
    back[3, 3] = 1
    for i, (axis, flip) in enumerate(zip(order, backwards)):
        back[axis, i], back[axis, 3] = (-1, sizes[axis] - 1) if flip else (1, 0)
    out = voxels.transpose(2, 1, 0).transpose(order)
    return out[tuple(slice(None, None, -1 if flip else 1) for flip in backwards)], affine @ back


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
    shown = np.stack([r.image for r in readings])
    assert shown.dtype == np.uint8 and len(shown) == len(images)
    apart = np.abs(shown.astype(int) - np.asarray(images)[..., None])
    assert apart.max() <= 1  # 127.5 may round either way
    assert np.array_equal(np.stack([r.mask for r in readings]), masks)
    return readings


@pytest.mark.parametrize("affine", AFFINES.values(), ids=AFFINES)
def test_one_anatomy_gives_the_same_slices_however_its_axes_are_stored(tmp_path, affine):
    for number, way in enumerate(WAYS):
        image = nifti(tmp_path / "a.nii", HU, way, affine)
        mask = nifti(tmp_path / "m.nii.gz", LESION.astype(np.uint8), WAYS[-number], affine)
        readings = same(read(case(image, mask), WINDOW), windowed(HU), LESION)
        assert [r.id for r in readings] == [f"scan_z{z:03d}" for z in range(5)]
        assert {r.volume for r in readings} == {"scan"}
        assert np.allclose(read_volume(image).space.affine, affine, atol=1e-4)


def test_the_patient_s_left_is_on_the_right_posterior_below_and_the_head_last(tmp_path):
    voxels = np.zeros((9, 8, 7), np.uint8)  # RAS+: x to the right, y to the front, z to the head
    voxels[1, 2, 5] = 1  # left, posterior, head
    nib.save(nib.Nifti1Image(voxels, np.eye(4)), tmp_path / "a.nii")
    seen = np.argwhere(read_volume(tmp_path / "a.nii").voxels)
    assert seen.tolist() == [[5, 8 - 1 - 2, 9 - 1 - 1]]


@pytest.mark.parametrize("suffix", [".nrrd", ".mha", ".mhd"])
def test_nrrd_and_metaimage_are_read_like_nifti(tmp_path, suffix):
    files = []
    for name, voxels in (("a", HU), ("m", LESION.astype(np.uint8))):
        as_nifti = nifti(tmp_path / f"{name}.nii", voxels, WAYS[13], tilted(20))
        sitk.WriteImage(sitk.ReadImage(as_nifti), tmp_path / f"{name}{suffix}")
        files.append(tmp_path / f"{name}{suffix}")
    same(read(case(*files), WINDOW), windowed(HU), LESION)
    assert np.allclose(read_volume(files[0]).space.affine, tilted(20), atol=1e-4)
    write_mask(tmp_path / "out.nii.gz", LESION, like=files[0])
    same(read(case(files[0], tmp_path / "out.nii.gz"), WINDOW), windowed(HU), LESION)


def test_values_are_scaled_by_the_header(tmp_path):
    image = nib.Nifti1Image(stored(((HU + 1024) * 2).astype(np.int16))[0], LPS)
    image.header.set_slope_inter(0.5, -1024)  # nibabel then writes the numbers as they are
    nib.save(image, tmp_path / "a.nii")
    assert np.array_equal(read_volume(tmp_path / "a.nii").voxels, HU)


@pytest.mark.parametrize(("order", "kind"), [("<", "i2"), (">", "f4")])
def test_every_type_of_number_is_read(tmp_path, order, kind):
    values = np.abs(HU % 100).astype(order + kind)
    image = nib.Nifti1Image(stored(values)[0], LPS, nib.Nifti1Header(endianness=order))
    image.set_data_dtype(kind)
    nib.save(image, tmp_path / "a.nii")
    assert np.array_equal(read_volume(tmp_path / "a.nii").voxels, values)


@pytest.mark.parametrize("shape", [(1, 48, 64), (48, 64)])
def test_a_volume_one_voxel_thick_is_one_picture(tmp_path, shape):
    voxels = RNG.normal(0, 100, shape).astype(np.float32)
    image, mask = tmp_path / "a.nii.gz", tmp_path / "m.nii.gz"
    nib.save(nib.Nifti1Image(voxels, np.eye(4)), image)
    nib.save(nib.Nifti1Image((voxels > 50).astype(np.uint8), np.eye(4)), mask)
    [found] = read(case(image, mask))
    assert sorted(found.image.shape) == [3, 48, 64] and found.mask.sum() == (voxels > 50).sum()
    assert found.image[found.mask].min() >= found.image[~found.mask].max()


def test_without_a_window_the_percentiles_of_the_volume_decide(tmp_path, monkeypatch):
    image = nifti(tmp_path / "a.nii.gz", HU.astype(np.float32))
    mask = nifti(tmp_path / "m.nii", LESION.astype(np.uint8))
    same(read(case(image, mask)), windowed(HU, *np.percentile(HU, [0.5, 99.5])), LESION)
    ramp = np.tile(np.arange(64, dtype=np.int16), (4, 64, 1))
    volume = read_volume(nifti(tmp_path / "ramp.nii", ramp))
    whole = np.array([*volume.images()], int)
    monkeypatch.setattr(volumes, "SAMPLE", ramp.size // 16)
    assert np.abs(np.array([*volume.images()]) - whole).max() <= 4 * 4


def test_every_value_of_a_mask_but_0_is_lesion_and_several_masks_are_united(tmp_path):
    labels, one = LESION * RNG.integers(1, 5, SHAPE), np.zeros(SHAPE, np.float32)
    one[4, 6, 5] = 3
    image = nifti(tmp_path / "a.nii", HU)
    masks = nifti(tmp_path / "m1.nii", labels.astype(np.int16)), nifti(tmp_path / "m2.nii", one)
    readings = same(read(case(image, *masks), WINDOW), windowed(HU), LESION | (one > 0))
    assert [note for r in readings for note in r.notes] == ["2 masks united"]


def test_notes_are_given_with_the_first_slice_that_has_a_lesion(tmp_path):
    late = LESION.copy()
    late[:3] = False
    image, mask = nifti(tmp_path / "a.nii", HU), nifti(tmp_path / "m.nii", late.astype(np.uint8))
    noted = [bool(r.notes) for r in read(case(image, mask, mask))]
    assert noted == [False, False, False, True, False]


def test_a_volume_of_one_slice_is_an_image(tmp_path):
    for name, values in (("a.nii", HU), ("m.nii", LESION.astype(np.uint8))):
        nib.save(nib.Nifti1Image(values[0].T[..., None], LPS), tmp_path / name)
    files = tmp_path / "a.nii", tmp_path / "m.nii"
    [reading] = same(read(case(*files), WINDOW), windowed(HU[:1]), LESION[:1])
    assert (reading.id, reading.volume) == ("scan", "")


@pytest.mark.parametrize("affine", AFFINES.values(), ids=AFFINES)
def test_a_written_mask_has_the_voxels_and_the_affine_of_its_source(tmp_path, affine):
    for way in WAYS:
        source = nifti(tmp_path / "a.nii", HU, way, affine)
        write_mask(tmp_path / "out.nii.gz", LESION, like=source)
        written, original = nib.load(tmp_path / "out.nii.gz"), nib.load(source)
        assert written.shape == original.shape and written.get_data_dtype() == np.uint8
        assert np.allclose(written.affine, original.affine, atol=1e-4)
        assert np.array_equal(np.asarray(written.dataobj), stored(LESION, way)[0])
        assert np.array_equal(read_volume(tmp_path / "out.nii.gz").voxels, LESION)
        same(read(case(source, tmp_path / "out.nii.gz"), WINDOW), windowed(HU), LESION)


def test_probabilities_are_written_as_they_are_for_a_source_with_a_qform_only(tmp_path):
    source = nib.Nifti1Image(stored(HU)[0][..., None], None)
    source.set_qform(LPS, 3)
    nib.save(source, tmp_path / "a.nii.gz")
    probability = RNG.random(SHAPE).astype(np.float32)
    write_mask(tmp_path / "p.nii", probability, like=tmp_path / "a.nii.gz")
    written = nib.load(tmp_path / "p.nii")
    assert np.allclose(written.affine, LPS, atol=1e-4)
    assert np.array_equal(np.asarray(written.dataobj), stored(probability)[0])


MEASURE = """
import resource, sys
from pathlib import Path
from lesionkd_core.data.images import Case
from lesionkd_core.data.layouts import read
list(read(Case("a", Path(sys.argv[3]), (Path(sys.argv[4]),)), "40, 400"))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for reading in read(Case("a", Path(sys.argv[1]), (Path(sys.argv[2]),)), "40, 400"):
    pass
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def peak(tmp_path, image, mask):
    """Bytes that reading a case slice by slice adds to the memory of a process."""
    small = nifti(tmp_path / "s.nii", HU), nifti(tmp_path / "sm.nii", LESION.astype(np.uint8))
    command = [sys.executable, "-c", MEASURE, *map(str, (image, mask, *small))]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(said) * (1 if sys.platform == "darwin" else 1024)


@pytest.mark.skipif(sys.platform == "win32", reason="no resource module")
def test_memory_does_not_grow_with_the_arithmetic(tmp_path):
    voxels = RNG.integers(0, 50, (160, 256, 256)).astype(np.int16)
    image = nifti(tmp_path / "a.nii", voxels)
    mask = nifti(tmp_path / "m.nii", (voxels > 40).astype(np.uint8))
    assert peak(tmp_path, image, mask) < 2.9 * voxels.nbytes  # mask, volume and ITK's copy: 2.5
