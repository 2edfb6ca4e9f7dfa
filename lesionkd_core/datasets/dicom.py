"""DICOM images by pydicom: one file, or the series in a folder, in the order in which the slices lie."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..config import LesionKDError
from .files import UnreadableFile, natural, suffix_of
from .slices import Space, Volume, reading

if TYPE_CHECKING:
    from pydicom import Dataset, FileDataset

NUMBERS = [
    "InstanceNumber", "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "ImagerPixelSpacing", "SpacingBetweenSlices", "SliceThickness",
]
ALIKE = ["SeriesInstanceUID", "Rows", "Columns", "PhotometricInterpretation", "PixelSpacing"]
"""What the slices of one volume have in common."""


def files_in(folder: Path) -> list[Path]:
    """Files that are not hidden, in natural order; DICOM files often have no suffix."""
    return sorted((p for p in folder.iterdir() if p.is_file() and not p.name.startswith(".")), key=natural)


def is_dicom(path: Path) -> bool:
    """Whether a file, or any file of a folder, has DICOM's mark."""
    if path.is_dir():
        return any(map(is_dicom, files_in(path)))
    with open(path, "rb") as file:
        return file.read(132)[128:] == b"DICM"


def _values(header: Dataset, name: str) -> list[float]:
    """The numbers of an attribute; none where it is absent or empty."""
    value = header.get(name)
    return [] if value in (None, "") else [float(v) for v in np.ravel(value)]


def _header(path: Path) -> Dataset | None:
    """Place and shape of one image, without its pixels; None for a report, a plan or a directory."""
    from pydicom import dcmread

    with reading(path, "DICOM"):
        if not is_dicom(path):
            raise UnreadableFile(f"{path.name}: cannot be read as DICOM: its mark is missing")
        header = dcmread(path, stop_before_pixels=True, specific_tags=[*NUMBERS, *ALIKE, "NumberOfFrames"])
        if (header.get("NumberOfFrames") or 1) > 1:
            raise UnreadableFile(f"{path.name}: holds {header.NumberOfFrames} frames; wants one image a file, or NIfTI")
        for name in NUMBERS:
            _values(header, name)  # or an error that names the file
        return header if header.get("Rows") else None


def series(path: Path) -> tuple[Space, list[Path], tuple[str, ...]]:
    """The space of a DICOM file or folder of one series, its files from first to last slice, and notes.

    Raises
    ------
    UnreadableFile
        No image, several series, slices that do not make one volume, or a broken file, which is named.
    """
    with reading(path, "DICOM"):
        files = files_in(path) if path.is_dir() else [path]
        tried = {file: _header(file) for file in files if file == path or suffix_of(file) == ".dcm" or is_dicom(file)}
    found = {file: header for file, header in tried.items() if header is not None}
    if not found:
        raise UnreadableFile(f"{path.name}: cannot be read as DICOM: no image in it; pictures in sub-folders are listed in a CSV table (data/own.md)")
    for name in ALIKE:
        several = sorted({str(header.get(name)) for header in found.values()})
        if len(several) > 1:
            what = f"holds {len(several)} series; wants one folder a series" if name == ALIKE[0] else f"slices differ in {name}"
            raise UnreadableFile(f"{path.name}: {what} ({several[0]}, {several[1]})")
    with reading(path, "DICOM"):
        order, steps, placed, notes = _order(path, list(found.values()))
        space = _space([list(found.values())[i] for i in order], steps, placed)
    if not (_values(first := next(iter(found.values())), "PixelSpacing") or _values(first, "ImagerPixelSpacing")):
        notes += ("no PixelSpacing: 1 mm taken",)
    if len(found) < len(files):
        notes += (f"{len(files) - len(found)} files beside the slices passed over",)
    return space, [list(found)[i] for i in order], notes


def patient_of(path: Path) -> str:
    """Whose image a DICOM file is: PatientID, or where that is empty the series."""
    from pydicom import dcmread

    with reading(path, "DICOM"):
        header = dcmread(path, stop_before_pixels=True, specific_tags=["PatientID", "SeriesInstanceUID"])
        return str(header.get("PatientID") or header.get("SeriesInstanceUID") or "")


def _order(path: Path, headers: list[Dataset]) -> tuple[np.ndarray, float, bool, tuple[str, ...]]:
    """Slices along their normal, or by number: (order, usual steps from first to last, placed, notes)."""
    turns = [_values(header, "ImageOrientationPatient") for header in headers]
    places = [_values(header, "ImagePositionPatient") for header in headers]
    placed = all(turns) and all(places)
    notes: tuple[str, ...] = ()
    if placed:
        if np.abs(np.array(turns) - turns[0]).max() > 1e-3:
            raise UnreadableFile(f"{path.name}: slices differ in ImageOrientationPatient; is a scout among them?")
        depths = np.array(places) @ np.cross(turns[0][:3], turns[0][3:])
    else:
        numbers = [_values(header, "InstanceNumber") or [0.0] for header in headers]
        depths, notes = np.ravel(numbers), ("no ImagePositionPatient: ordered by InstanceNumber, place in the patient unknown",)
    order = np.argsort(depths)
    if len(order) == 1:
        return order, 1, placed, notes
    apart = np.diff(depths[order])
    if apart.min() < 1e-3:
        by = "one ImagePositionPatient" if placed else "neither a position nor an InstanceNumber of their own"
        raise UnreadableFile(f"{path.name}: two slices have {by}; several phases or echoes want a folder each")
    usual = np.percentile(apart, 50, method="lower")
    steps = np.maximum(np.rint(apart / usual), 1).sum()
    if apart.max() > 1.1 * usual or apart.min() < 0.9 * usual:
        notes += (f"{steps - len(apart):.0f} slices missing: steps are {apart.min():.4g} to {apart.max():.4g}, usually {usual:.4g}",)
    return order, steps, placed, notes


def _space(headers: list[Dataset], steps: float, placed: bool) -> Space:
    """Shape and affine of slices in order; DICOM's axes are LPS, the affine's RAS."""
    first, last = headers[0], headers[-1]
    across, down = np.reshape(_values(first, "ImageOrientationPatient"), (2, 3)) if placed else np.eye(3)[:2]
    origin = np.array(_values(first, "ImagePositionPatient")) if placed else np.zeros(3)
    thick = _values(first, "SpacingBetweenSlices") or _values(first, "SliceThickness") or [1]
    step = np.cross(across, down) * (abs(thick[0]) or 1)
    if placed and len(headers) > 1:
        step = (np.array(_values(last, "ImagePositionPatient")) - origin) / steps
    rows, columns = _values(first, "PixelSpacing") or _values(first, "ImagerPixelSpacing") or (1, 1)
    affine = np.eye(4)
    affine[:3] = np.column_stack([across * columns, down * rows, step, origin])
    return Space((len(headers), first.Rows, first.Columns), np.diag([-1.0, -1, 1, 1]) @ affine)


def decode(path: Path) -> tuple[FileDataset, np.ndarray]:
    """Header and pixels of one image: (H, W) as stored, or (H, W, 3) uint8."""
    from pydicom import dcmread
    from pydicom.pixels import apply_color_lut, get_decoder, pixel_array

    with reading(path, "DICOM"):
        header = dcmread(path)
        syntax = header.file_meta.TransferSyntaxUID
        if syntax.is_compressed and not get_decoder(syntax).is_available:
            raise LesionKDError(  # not the file's fault: nothing is dropped for it
                f"{path.name}: compressed as {syntax.name}, and no decoder is here;\n"
                "pip install pylibjpeg pylibjpeg-libjpeg pylibjpeg-openjpeg, or decompress it (gdcmconv --raw)."
            )
        pixels, bits = pixel_array(header), header.BitsStored
        if header.PhotometricInterpretation == "PALETTE COLOR":
            pixels = apply_color_lut(pixels, header)
            bits = 8 * pixels.itemsize
        return header, (pixels >> bits - 8).astype(np.uint8) if pixels.ndim == 3 else pixels


def read_series(path: Path) -> Volume:
    """Slices as acquired; rescale, window and MONOCHROME1 as each file says."""
    space, files, notes = series(path)
    scales, windows = np.empty((len(files), 2)), []
    for z, file in enumerate(files):
        header, pixels = decode(file)
        if z == 0:
            voxels = np.empty((len(files), *pixels.shape), pixels.dtype)
        if (pixels.shape, pixels.dtype) != (voxels.shape[1:], voxels.dtype):
            raise UnreadableFile(f"{file.name}: slices differ in type ({pixels.dtype}, {voxels.dtype})")
        voxels[z] = pixels
        with reading(file, "DICOM"):
            scales[z] = (_values(header, "RescaleSlope") or [1])[0] or 1, (_values(header, "RescaleIntercept") or [0])[0]
            windows.append(_window(header))
    return Volume(voxels, space, scales, tuple(windows), header.PhotometricInterpretation == "MONOCHROME1", notes)


def _window(header: Dataset) -> tuple[float, float] | None:
    """Lowest and highest value shown: the first window of the file, function LINEAR.

    Source: DICOM PS3.3, C.11.2.1.2.
    """
    centre, width = _values(header, "WindowCenter"), _values(header, "WindowWidth")
    if not (centre and width and width[0] >= 1):
        return None
    half = (width[0] - 1) / 2
    return centre[0] - 0.5 - half, centre[0] - 0.5 + half
