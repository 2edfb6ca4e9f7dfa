"""NIfTI and DICOM volumes: cut into slices with their masks; predictions written back in the space of the scan."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from pathlib import Path

import numpy as np

from .dicom import decode, files_in, is_dicom, patient_of, read_series, series
from .files import IMAGE_SUFFIXES, Case, Reading, UnreadableFile, by_stem, cut_numbers, read_mask, stem_of, suffix_of
from .nifti import is_nifti, nifti_space, read_nifti, write_nifti
from .slices import Space, Volume

__all__ = ["Space", "Volume", "is_dicom", "read_slices", "read_volume", "space_of", "write_mask"]


def read_slices(case: Case, window: str = "") -> Iterator[Reading]:
    """Every slice of a case's volume with its mask, from feet to head, or in the order of the series.

    Parameters
    ----------
    window : str
        'centre, width' in the file's unit (CT: HU). Empty: the window of the DICOM file, else the 0.5 to
        99.5 percentiles of the volume.

    Yields
    ------
    Reading
        `ID_z000`, ...; a volume of one slice is an image and keeps its id. Notes stand at the
        first slice with a lesion, which is never dropped.

    Raises
    ------
    UnreadableFile
        Before the first slice; names the file, and what is wrong with it.
    """
    if not case.masks:
        raise UnreadableFile(f"{case.image.name}: no mask belongs to this image")
    if case.one_mask and len(case.masks) > 1:
        raise UnreadableFile(f"{case.image.name}: {', '.join(path.name for path in case.masks)} are masks of one name; keep one")
    mask, said, group = _read_masks(case)  # before the image, so that two volumes are never in memory
    volume = read_volume(case.image)
    notes = volume.notes + said + (f"{len(case.masks)} masks united",) * (len(case.masks) > 1)
    several, noted = len(mask) > 1, mask.any((1, 2)).argmax()
    for z, image in enumerate(volume.images(window)):
        said = notes if z == noted else ()
        yield Reading(f"{case.id}_z{z:03d}" if several else case.id, image, mask[z], said, case.id if several else "", group)


def read_volume(path: Path) -> Volume:
    """A NIfTI file, turned to the closest axial slices; a DICOM file, or the series in a folder, as acquired."""
    return read_nifti(path) if is_nifti(path) else read_series(path)


def space_of(path: Path) -> Space:
    """Where the slices of `read_volume` lie, from headers alone."""
    return nifti_space(path) if is_nifti(path) else series(path)[0]


def write_mask(path: Path, mask: np.ndarray, like: Path) -> None:
    """Write slices as NIfTI in the space of the volume that they were cut from.

    Parameters
    ----------
    path : Path
        Ends with .nii.gz, or .nii.
    mask : (D, H, W) bool, uint8 or float32
        In the order of `read_volume(like)`.
    like : Path
        NIfTI: shape, orientation and affine are the same, voxel by voxel. DICOM: the affine is that of
        the series, turned from DICOM's LPS to RAS.
    """
    space = space_of(like)
    if mask.shape != space.shape:
        raise ValueError(f"write_mask: mask is {mask.shape}, {like.name} has (slices, rows, columns) = {space.shape}")
    write_nifti(path, mask, space, like if is_nifti(like) else None)


def _read_masks(case: Case) -> tuple[np.ndarray, tuple[str, ...], str]:
    """Union of a case's masks, (D, H, W) bool, in the order of its image's slices; notes; the patient of a DICOM image."""
    notes: tuple[str, ...] = ()
    space, files = (nifti_space(case.image), []) if is_nifti(case.image) else series(case.image)[:2]
    union = np.zeros(space.shape, bool)
    for path in case.masks:
        if is_nifti(path):
            notes += _unite_volume(union, path, space)
        elif not files:
            raise UnreadableFile(f"{path.name}: the mask of a NIfTI volume must be NIfTI too")
        elif len(files) > 1 and not path.is_dir():
            raise UnreadableFile(f"{path.name}: the mask of a DICOM series is a NIfTI file, or a folder with a mask for every slice")
        else:
            _unite_slices(union, path, [stem_of(file) for file in files])
    return union, notes, patient_of(files[0]) if files else ""


def _unite_volume(union: np.ndarray, path: Path, space: Space) -> tuple[str, ...]:
    """Add a NIfTI mask, stored in whatever orientation, that lies where its image lies."""
    from nibabel.orientations import io_orientation

    mask = read_nifti(path, io_orientation(space.affine))
    if mask.space.shape != space.shape:
        raise UnreadableFile(f"{path.name}: mask has (slices, rows, columns) = {mask.space.shape}, its image {space.shape}")
    corners = np.array([(*corner, 1) for corner in product(*((0, n - 1) for n in space.shape[::-1]))])
    apart = np.linalg.norm((corners @ (mask.space.affine - space.affine).T)[:, :3], axis=1).max()
    if apart > min(space.spacing) / 2:
        raise UnreadableFile(f"{path.name}: mask lies up to {apart:.1f} mm off its image; resample it, or copy the image's affine if it was lost")
    slices = range(len(union))  # three times slice by slice, so that no second volume is in memory
    low, top = min(mask.values(z).min() for z in slices), max(mask.values(z).max() for z in slices)
    if low < 0 or 0 < low < top:
        raise UnreadableFile(f"{path.name}: mask values run from {low:g} to {top:g}; wants 0 where there is no lesion")
    soft = any((mask.values(z) % 1).any() for z in slices) and not all(np.isin(mask.values(z), (0, top)).all() for z in slices)
    for z, plane in enumerate(union):
        plane |= mask.values(z) > (top / 2 if soft else 0)
    return (f"soft mask of values 0 to {top:g}, cut at half",) * soft


def _unite_slices(union: np.ndarray, path: Path, stems: list[str]) -> None:
    """Add the masks of a folder, one a slice and of its stem; of a single image, the mask file itself."""
    found = by_stem(files_in(path)) if path.is_dir() else {stems[0]: [path]}
    if alone := sorted({*stems} ^ {*found}):
        raise UnreadableFile(f"{path.name}: wants a mask of equal stem for every slice; {alone[0]!r} is alone")
    for plane, stem in zip(union, stems):
        for file in found[stem]:
            mask = read_mask(file) if suffix_of(file) in IMAGE_SUFFIXES else cut_numbers(decode(file)[1])[0]
            if mask.shape != plane.shape:
                raise UnreadableFile(f"{file.name}: mask has shape {mask.shape}, its slice {plane.shape}")
            plane |= mask
