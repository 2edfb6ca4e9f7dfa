"""NIfTI files (.nii, .nii.gz) by nibabel: turned to the closest axial slices, and written back as they lay."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import numpy as np

from .. import store
from .files import UnreadableFile, suffix_of
from .slices import Space, Volume, reading

LPS = np.array([(0, -1), (1, -1), (2, 1)])
"""nibabel's code of columns to the patient's left, rows to posterior, slices to the head: as radiologists see it."""


def is_nifti(path: Path) -> bool:
    """By its name."""
    return suffix_of(path) in (".nii", ".nii.gz")


def _open(path: Path) -> Any:
    """The nibabel image, three-dimensional but for axes of length 1, with an affine that orients it."""
    import nibabel as nib

    with reading(path, "NIfTI"):
        image: Any = nib.load(path)
        shape, kind = " x ".join(map(str, image.shape)), image.get_data_dtype()
        if any(n != 1 for n in image.shape[3:]):
            raise UnreadableFile(f"{path.name}: holds {shape} voxels, several volumes; wants one volume a file")
        if len(image.shape) < 2 or not all(image.shape):
            raise UnreadableFile(f"{path.name}: {shape} voxels are no volume")
        if kind.kind not in "biuf":
            raise UnreadableFile(f"{path.name}: voxels are of type {kind}; wants one number a voxel")
        if not np.isfinite(image.affine).all() or abs(np.linalg.det(image.affine[:3, :3])) < 1e-12:
            raise UnreadableFile(f"{path.name}: its affine has no three directions, so nobody knows where the slices lie")
    return image


def _turned(voxels: np.ndarray, affine: np.ndarray, axes: np.ndarray) -> tuple[np.ndarray, Space]:
    """(X, Y, Z, ...) as stored -> (D, H, W) view in the orientation that is closest to `axes`, and its space."""
    from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation, ornt_transform

    voxels = voxels.reshape((*voxels.shape, 1)[:3], order="F")
    turn = ornt_transform(io_orientation(affine), axes)
    slices = apply_orientation(voxels, turn).T
    return slices, Space(slices.shape, affine @ inv_ornt_aff(turn, voxels.shape))


def nifti_space(path: Path) -> Space:
    """Where the slices of `read_nifti` lie, from the header alone."""
    image = _open(path)
    return _turned(np.broadcast_to(np.uint8(0), image.shape), image.affine, LPS)[1]


def read_nifti(path: Path, axes: np.ndarray = LPS) -> Volume:
    """Slices at the file's own type, turned to the orientation that is closest to `axes`; rescaled slice by slice."""
    image = _open(path)
    with reading(path, "NIfTI"):
        voxels, space = _turned(image.dataobj.get_unscaled(), image.affine, axes)
        if voxels.dtype.kind == "f" and not all(np.isfinite(plane).all() for plane in voxels):
            raise UnreadableFile(f"{path.name}: holds NaN or infinite values")
        scale = image.dataobj.slope, image.dataobj.inter
    return Volume(voxels, space, np.array([scale] * len(voxels)), (None,) * len(voxels))


def write_nifti(path: Path, slices: np.ndarray, space: Space, like: Path | None = None) -> None:
    """Write (D, H, W) as NIfTI; `like` names the NIfTI file whose axes and header it takes.

    Without it, the slices are stored as they are, with the affine of `space`.
    """
    import nibabel as nib
    from nibabel.orientations import apply_orientation, io_orientation, ornt_transform

    voxels = (slices.astype(np.uint8) if slices.dtype == bool else slices).T
    if like:
        source = _open(like)
        voxels = apply_orientation(voxels, ornt_transform(LPS, io_orientation(source.affine))).reshape(source.shape, order="F")
        header = source.header.copy()
        header["cal_min"] = header["cal_max"] = 0  # how the source is shown says nothing about its mask
        image = type(source)(voxels, source.affine, header, dtype=voxels.dtype)
    else:
        image = nib.Nifti1Image(voxels, space.affine)
        image.set_sform(space.affine, 1)
        image.set_qform(space.affine, 1)
        image.header.set_xyzt_units("mm")
    with store.replacing(path) as partial, open(partial, "wb") as file:
        if suffix_of(path) == ".nii":
            image.to_stream(file)
        else:
            with gzip.GzipFile("", "wb", 1, file, mtime=0) as packed:
                image.to_stream(packed)
