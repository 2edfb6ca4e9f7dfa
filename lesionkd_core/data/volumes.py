"""Volumes (NIfTI, NRRD, MetaImage, DICOM): read as slices with their masks; masks written back.

Affines take (column, row, slice) to millimetres in the axes of NIfTI: right, anterior, superior.
"""

from __future__ import annotations

import gzip
import mmap
import os
import re
import shutil
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations, product
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from .. import results
from ..config import MissingExtra
from . import images
from .images import Case, Reading, UnreadableFile, beginning, files_in, is_dicom
from .masks import colour_codes, decision_for, read_values, whole_numbers

try:
    import SimpleITK as sitk
except ImportError:
    raise MissingExtra("a volume", "volumes") from None

os.environ["ITK_NIFTI_SFORM_PERMISSIVE"] = "YES"  # ITK refuses the shear of a tilted gantry
sitk.ProcessObject.SetGlobalWarningDisplay(False)

SAMPLE = 4_000_000
"""Percentiles of larger volumes are computed from about this many evenly spaced voxels."""
LPS = np.diag([-1.0, -1.0, 1.0])
"""Axes of a slice as radiologists see it: columns to the patient's left, rows to posterior."""
FILES = images.VOLUME_SUFFIXES - {".dcm"}

IDENTITY = {"series": "0020|000e", "patient": "0010|0020", "photometric": "0028|0004"}
LOSSY = {"lossy": "0028|2110"}
PLACE = {"position": "0020|0032", "orientation": "0020|0037", "number": "0020|0013"}
SPACING = {"spacing": "0028|0030", "detector": "0018|1164", "distance": "0018|0088"}
VALUES = {"slope": "0028|1053", "intercept": "0028|1052", "bits": "0028|0101", "sign": "0028|0103"}
WINDOW = {"centre": "0028|1050", "width": "0028|1051", "thickness": "0018|0050"}
TAGS = IDENTITY | LOSSY | PLACE | SPACING | VALUES | WINDOW
NO_IMAGE = re.compile(
    rb"\x02\0\x02\0UI..1\.2\.840\.10008\.(1\.3\.10|5\.1\.4\.1\.1\.(11|66(?!\.4)|88|104|481\.[3-9])\b)",
    re.S,
)
"""The SOP class of a directory, report, plan or other DICOM file without an image."""
SEGMENTATION = b"1.2.840.10008.5.1.4.1.1.66.4"
PIXEL_DATA, END_OF_SEQUENCE = b"\xe0\x7f\x10\x00", b"\xfe\xff\xdd\xe0"


@dataclass(frozen=True)
class Space:
    """Where slices are: shape (D, H, W), affine (4, 4) from (column, row, slice) to mm."""

    shape: tuple[int, int, int]
    affine: np.ndarray

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Distance between slices, rows and columns, mm."""
        columns, rows, slices = np.linalg.norm(self.affine[:3, :3], axis=0).tolist()
        return slices, rows, columns

    def distance(self, other: Space) -> float:
        """Largest distance between the same corner of two volumes, mm."""
        corners = np.array([(*c, 1) for c in product(*((0, n - 1) for n in other.shape[::-1]))])
        apart = (corners @ (self.affine - other.affine).T)[:, :3]
        return float(np.linalg.norm(apart, axis=1).max())


@dataclass(frozen=True)
class Volume:
    """Slices and how they are shown.

    Parameters
    ----------
    voxels : (D, H, W), or (D, H, W, 3) uint8
        Values in the unit of the file (CT: HU), or colours.
    windows : D pairs of (low, high), or None
        Values shown as black and white, if the file says so.
    inverted : bool
        Low values are shown bright (MONOCHROME1).
    notes : tuple of str
        What was unusual.
    """

    voxels: np.ndarray
    space: Space
    windows: tuple[tuple[float, float] | None, ...]
    inverted: bool = False
    notes: tuple[str, ...] = ()

    def images(self, window: str = "") -> Iterator[np.ndarray]:
        """Every slice as (H, W, 3) uint8.

        `window` is 'centre, width' in the unit of the file. If it is empty, the file's own window
        is used, or else the percentiles of `images.contrast_limits`.
        """
        if self.voxels.ndim == 4:
            yield from self.voxels
            return
        windows = self.windows
        if window:
            windows = (images.window_limits(window),) * len(windows)
        whole = images.contrast_limits(self._sample()) if None in windows else (0.0, 1.0)
        for plane, own in zip(self.voxels, windows):
            low, high = own or whole
            grey = ((plane.astype(np.float32) - low) / max(high - low, 1e-12)).clip(0, 1)
            grey = np.rint(255 * (1 - grey if self.inverted else grey)).astype(np.uint8)
            yield np.repeat(grey[..., None], 3, axis=2)

    def _sample(self) -> np.ndarray:
        step = int(np.ceil((self.voxels.size / SAMPLE) ** 0.5))
        return self.voxels[:, ::step, ::step]


# Volumes and their masks --------------------------------------------------------------------------


def read_slices(case: Case, window: str = "") -> Iterator[Reading]:
    """Read every slice of a volume with its mask, from feet to head, or in the order of the series.

    Parameters
    ----------
    window : str
        As for `Volume.images`.

    Yields
    ------
    Reading
        `ID_z000`, ...; a volume of one slice keeps its id. The notes are given with the first slice
        that has a lesion.

    Raises
    ------
    UnreadableFile
        Before the first slice.
    """
    case.check_masks()
    mask, notes, group = _read_masks(case)  # before the image: one volume in memory at a time
    volume = read_volume(case.image)
    notes = volume.notes + notes
    if len(case.masks) > 1:
        notes += (f"{len(case.masks)} masks united",)
    several, first = len(mask) > 1, mask.any((1, 2)).argmax()
    for z, image in enumerate(volume.images(window)):
        slice_id, name = (f"{case.id}_z{z:03d}", case.id) if several else (case.id, "")
        yield Reading(slice_id, image, mask[z], notes if z == first else (), name, group)


def read_volume(path: Path) -> Volume:
    """Read a volume file along the closest axial axes, or a DICOM series as it was acquired."""
    return _open(path).read()


def write_mask(path: Path, mask: np.ndarray, like: Path) -> None:
    """Write slices as NIfTI in the space of the volume that they belong to.

    Parameters
    ----------
    path : Path
        Ends with .nii.gz or .nii.
    mask : (D, H, W) bool, uint8 or float32
        In the order of `read_volume(like)`.
    like : Path
        The volume. The order of the voxels and the affine of a volume file are kept.
    """
    source = _open(like)
    if mask.shape != source.space.shape:
        raise ValueError(f"write_mask: mask is {mask.shape}, {like.name} {source.space.shape}")
    voxels, affine = mask.astype(np.uint8) if mask.dtype == bool else mask, source.space.affine
    if isinstance(source, _File):
        voxels, affine = source.stored(voxels), source.affine
    image, lps = sitk.GetImageFromArray(np.ascontiguousarray(voxels)), _swap(affine)
    image.SetOrigin(lps[:3, 3].tolist())
    image.SetSpacing(np.linalg.norm(lps[:3, :3], axis=0).tolist())
    image.SetDirection(_unit(lps[:3, :3]).ravel().tolist())
    with results.replacing(path) as partial, TemporaryDirectory(dir=path.parent) as folder:
        sitk.WriteImage(image, plain := Path(folder) / "mask.nii")
        with open(plain, "r+b") as written, open(partial, "wb") as target:
            written.seek(280)
            written.write(struct.pack("<12f", *affine[:3].ravel()))  # ITK drops shear
            written.seek(0)
            if images.suffix_of(path) == ".nii":
                shutil.copyfileobj(written, target)
            else:
                with gzip.GzipFile("", "wb", 1, target, mtime=0) as packed:
                    shutil.copyfileobj(written, packed)


def read_mask_volume(path: Path) -> tuple[np.ndarray, bool]:
    """Values of a file with masks, (D, H, W), and whether compression changed them."""
    _refuse_segmentation(path)
    source = _open(path)
    if isinstance(source, _File):
        return whole_numbers(source.read().voxels), False
    return whole_numbers(source.shown()), source.headers[0].get("lossy") == "01"


def _refuse_segmentation(path: Path) -> None:
    if path.is_file() and SEGMENTATION in beginning(path):
        why = "DICOM SEG is not read; save it as NIfTI as docs/data.md shows"
        raise UnreadableFile(f"{path.name}: {why}")


def _read_masks(case: Case) -> tuple[np.ndarray, tuple[str, ...], str]:
    """Union of the masks (D, H, W), in the order of the slices; notes; the patient."""
    notes: tuple[str, ...] = ()
    source = _open(case.image)
    series = source if isinstance(source, _Series) else None
    union = np.zeros(source.space.shape, bool)
    for path in case.masks:
        _refuse_segmentation(path)
        if not path.is_dir() and images.suffix_of(path) in FILES:
            notes += _unite_volume(union, path, source, case)
        elif series and (path.is_dir() or len(series.files) == 1):
            stems = [images.stem_of(file) for file in series.files]
            notes += _unite_slices(union, path, stems, case)
        else:
            kind = "volume file (NIfTI, NRRD or MetaImage)"
            if series:
                kind += ", or a folder with one mask for each slice"
            raise UnreadableFile(f"{path.name}: the mask of {case.image.name} must be a {kind}")
    return union, notes, series.patient if series else ""


def _unite_volume(
    union: np.ndarray, path: Path, source: _File | _Series, case: Case
) -> tuple[str, ...]:
    """Add a volume file that is where its image is, stored in any orientation."""
    space, file = source.space, _File(path, source.space.affine[:3, :3])
    order: Sequence[int] = range(len(union))
    notes: tuple[str, ...] = ()
    apart = file.space.distance(space)
    if case.by_index and isinstance(source, _Series) and apart > min(space.spacing) / 2:
        file, apart, order = _File(path, None), 0, source.ranks()
        notes = ("mask matched voxel by voxel; its header has another position",)
    if file.space.shape != space.shape:
        shapes = f"{file.space.shape}, its image {space.shape}"
        raise UnreadableFile(f"{path.name}: mask has (slices, rows, columns) = {shapes}")
    if apart > min(space.spacing) / 2:
        raise UnreadableFile(
            f"{path.name}: mask is up to {apart:.1f} mm away from its image; resample it, or copy "
            "the affine of the image if it was lost"
        )
    voxels, decision = whole_numbers(file.read().voxels), decision_for(case)
    for plane, z in zip(union, order):
        plane |= decision.lesion(voxels[z], path)
    return notes + decision.notes.get((path, None), ())


def _unite_slices(union: np.ndarray, path: Path, stems: list[str], case: Case) -> tuple[str, ...]:
    """Add one mask file for each slice, of the same stem; for a single image, the file itself."""
    notes: tuple[str, ...] = ()
    found = images.by_stem(files_in(path)) if path.is_dir() else {stems[0]: [path]}
    if alone := sorted({*stems} ^ {*found}):
        why = f"needs one mask of the same name for each slice; {alone[0]!r} has no partner"
        raise UnreadableFile(f"{path.name}: {why}")
    decision = decision_for(case)
    for z, stem in enumerate(stems):
        part = union if len(stems) == 1 else union[z : z + 1]
        for file in found[stem]:
            values = read_values(file)[0]
            if values.shape != part.shape:
                shapes = f"(slices, rows, columns) = {values.shape}, its image {part.shape}"
                raise UnreadableFile(f"{file.name}: mask has {shapes}")
            part |= decision.lesion(values, file)
            notes += decision.notes.get((file, None), ())
    return tuple(dict.fromkeys(notes))


def _open(path: Path) -> _File | _Series:
    return _File(path) if not path.is_dir() and images.suffix_of(path) in FILES else _Series(path)


# Volume files -------------------------------------------------------------------------------------


class _File:
    """A NIfTI, NRRD or MetaImage file whose voxels are seen along other axes.

    Parameters
    ----------
    axes : (3, 3), optional
        Directions of columns, rows and slices; each becomes the closest axis of the file.
        None keeps the axes of the file.
    """

    def __init__(self, path: Path, axes: np.ndarray | None = LPS) -> None:
        self.path, suffix = path, images.suffix_of(path)
        self.kind = {".nrrd": "NRRD", ".mha": "MetaImage", ".mhd": "MetaImage"}.get(suffix, "NIfTI")
        with images.reading(path, self.kind):
            self.reader = _itk_reader(path)
            size, shape = self.reader.GetSize(), " x ".join(map(str, self.reader.GetSize()))
            kind = sitk.GetPixelIDValueAsString(self.reader.GetPixelID())
            if len(size) > 3:
                raise ValueError(
                    f"it holds {shape} voxels; axis 4 has {size[3]} entries, time points or "
                    "channels? Save one volume in each file"
                )
            if len(size) < 2 or self.reader.GetNumberOfComponents() > 1 or "complex" in kind:
                raise ValueError(
                    f"it holds {shape} voxels of type {kind}; a volume has three axes and one real "
                    "number in each voxel"
                )
            self.affine = _affine(self.reader)
        axes = self.affine[:3, :3] if axes is None else axes
        self.size = np.array((*size, 1)[:3])
        cosines = _unit(axes).T @ _unit(self.affine[:3, :3])  # (axis, axis of the file)
        flat = [axis for axis in range(3) if self.size[axis] == 1]  # one picture: its slice axis
        orders = (o for o in permutations(range(3)) if len(flat) != 1 or o[2] == flat[0])
        order = max(orders, key=lambda order: np.abs(cosines[range(3), order]).sum())
        steps = np.where(cosines[range(3), order] < 0, -1, 1)
        self.order, self.flips = order, tuple(slice(None, None, step) for step in steps)
        columns, rows, slices = (int(self.size[axis]) for axis in order)
        turn = np.zeros((4, 4))
        turn[order, range(3)], turn[3, 3] = steps, 1
        turn[order, 3] = np.where(steps < 0, (columns - 1, rows - 1, slices - 1), 0)
        self.space = Space((slices, rows, columns), self.affine @ turn)

    def read(self) -> Volume:
        """Its slices."""
        with images.reading(self.path, self.kind):
            if self.kind == "NIfTI":
                _check_nifti(self.path, self.reader)
            stored = sitk.GetArrayFromImage(self.reader.Execute())
            voxels = stored.T.reshape(self.size, order="F")
            voxels = voxels.transpose(self.order)[self.flips].T
            if not all(np.isfinite(plane).all() for plane in voxels):
                raise ValueError("it holds NaN or infinite values")
        return Volume(voxels, self.space, (None,) * len(voxels))

    def stored(self, slices: np.ndarray) -> np.ndarray:
        """Slices (D, H, W) in the order of the file."""
        back: np.ndarray = slices.T[self.flips].transpose(np.argsort(self.order)).T
        return back


def _unit(axes: np.ndarray) -> np.ndarray:
    """Columns of length 1."""
    unit: np.ndarray = axes / np.linalg.norm(axes, axis=0)
    return unit


def _swap(affine: np.ndarray) -> np.ndarray:
    """From the axes of ITK and DICOM (left, posterior, superior) to those of NIfTI, or back."""
    swapped: np.ndarray = np.diag([-1.0, -1, 1, 1]) @ affine
    return swapped


def _itk_reader(path: Path, kind: str = "") -> sitk.ImageFileReader:
    """An ITK reader that has read the header of a file."""
    path.stat()  # raises if it is missing
    reader = sitk.ImageFileReader()
    reader.SetFileName(os.fspath(path))
    reader.SetImageIO(kind)
    if not kind and not reader.GetImageIOFromFileName(os.fspath(path)):
        raise ValueError("its header is damaged, or of a version that is not read (NIfTI-2)")
    reader.ReadImageInformation()
    return reader


def _affine(reader: sitk.ImageFileReader) -> np.ndarray:
    """(4, 4) from stored (column, row, slice) to mm."""
    n, affine = reader.GetDimension(), np.eye(4)
    affine[:n, :n] = np.reshape(reader.GetDirection(), (n, n)) * reader.GetSpacing()
    affine[:n, 3] = reader.GetOrigin()
    affine, sheared = _swap(affine), "ITK_sform_corrected"
    if reader.HasMetaDataKey(sheared) and reader.GetMetaData(sheared) == "YES":
        affine[:3] = [[*map(float, reader.GetMetaData(f"srow_{x}").split())] for x in "xyz"]
    return affine


def _check_nifti(path: Path, reader: sitk.ImageFileReader) -> None:
    """Raise for missing bytes and for NaN: ITK reads both as zeros from a NIfTI file."""
    offset, bits, kind = (
        int(float(reader.GetMetaData(key))) for key in ("vox_offset", "bitpix", "datatype")
    )
    missing, width = int(np.prod(reader.GetSize())) * bits // 8, bits // 8
    packed = images.suffix_of(path) == ".nii.gz"
    with gzip.open(path) if packed else open(path, "rb") as file:
        little = int.from_bytes(file.read(offset)[:4], "little") in (348, 540)
        while block := file.read(1 << 20):
            missing -= len(block)
            whole = block[: len(block) // width * width]
            number = f"{'<' if little else '>'}f{width}"
            if kind in (16, 64) and not np.isfinite(np.frombuffer(whole, number)).all():
                raise ValueError("it holds NaN or infinite values")
    if missing > 0:
        raise ValueError(f"{missing} bytes are missing at its end")


# DICOM --------------------------------------------------------------------------------------------


def holds_series(folder: Path) -> bool:
    """Whether the DICOM files of a folder are the slices of one series."""
    if not is_dicom(folder) or sum(map(is_dicom, files_in(folder))) < 2:
        return False
    return len(sitk.ImageSeriesReader.GetGDCMSeriesIDs(str(folder))) == 1


class _Series:
    """A DICOM file, or the series in a folder, from first to last slice.

    SimpleITK decodes the pixels. Order and position are computed here from the headers: the series
    reader of ITK drops shear and does not notice a second series, missing slices or two slices at
    one position.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.notes: tuple[str, ...] = ()
        with images.reading(path, "DICOM"):
            files = files_in(path) if path.is_dir() else [path]
            headers = {file: header for file in files if (header := self._attributes(file))}
            self.files, self.headers = list(headers), list(headers.values())
            if not headers:
                raise ValueError("no image in it; list pictures of sub-folders in a CSV table")
            for name in ("series", "size", "photometric", "spacing"):
                values = sorted({header.get(name, "") for header in self.headers})
                if len(values) > 1 and name == "series":
                    raise ValueError(f"it holds {len(values)} series; a folder must hold one")
                if len(values) > 1:
                    raise ValueError(f"slices differ in {name}: {values[0]}, {values[1]}")
            if len(headers) < len(files):
                self.notes += (f"{len(files) - len(headers)} files without an image ignored",)
            self.space = self._arrange()
        self.patient = self.headers[0].get("patient") or self.headers[0].get("series", "")

    def _attributes(self, file: Path) -> dict[str, str]:
        """The attributes of `TAGS`, and the size; empty for what is not an image."""
        with images.reading(file, "DICOM"):
            start = beginning(file)
            if start[128:132] != b"DICM":
                if file == self.path or images.suffix_of(file) == ".dcm":
                    raise ValueError("the mark DICM is missing")
                return {}
            if NO_IMAGE.search(start):
                return {}
            reader = _itk_reader(file, "GDCMImageIO")
            known = {name: key for name, key in TAGS.items() if reader.HasMetaDataKey(key)}
            header = {name: reader.GetMetaData(key).strip(" \0") for name, key in known.items()}
            return header | {"size": " x ".join(map(str, reader.GetSize()))}

    def _arrange(self) -> Space:
        """Sort the slices along their normal, or by number; compute where they are."""
        columns, rows, frames = map(int, self.headers[0]["size"].split(" x "))
        if frames > 1 and len(self.files) > 1:
            raise ValueError(f"one file holds {frames} frames; a series has one image in a file")
        if frames > 1:
            return Space(
                (frames, rows, columns), _affine(_itk_reader(self.files[0], "GDCMImageIO"))
            )
        turns = [_numbers(header, "orientation") for header in self.headers]
        places = [_numbers(header, "position") for header in self.headers]
        if placed := all(turns) and all(places):
            if np.abs(np.array(turns) - turns[0]).max() > 1e-3:
                raise ValueError("slices differ in orientation; is a scout view among them?")
            depths = np.array(places) @ np.cross(turns[0][:3], turns[0][3:])
        else:
            turns, places = [[1, 0, 0, 0, 1, 0]], []
            depths = np.ravel([_numbers(header, "number") or [0.0] for header in self.headers])
            self.notes += ("no ImagePositionPatient: ordered by InstanceNumber, position unknown",)
        order = np.argsort(depths)
        self.files = [self.files[i] for i in order]
        self.headers = [self.headers[i] for i in order]
        steps, first = self._count_steps(np.diff(depths[order]), placed), self.headers[0]
        spacing = _numbers(first, "spacing") or _numbers(first, "detector")
        if not spacing:
            self.notes += ("no PixelSpacing: 1 mm assumed",)
        across, down = np.reshape(turns[0], (2, 3))
        thick = _numbers(first, "distance") or _numbers(first, "thickness") or [1]
        step, affine = np.cross(across, down) * (abs(thick[0]) or 1), np.eye(4)
        if placed:
            start, end = (np.array(places[order[i]]) for i in (0, -1))
            affine[:3, 3], step = start, (end - start) / steps if len(order) > 1 else step
        between_rows, between_columns = spacing or (1, 1)
        affine[:3, :3] = np.column_stack([across * between_columns, down * between_rows, step])
        return Space((len(order), rows, columns), _swap(affine))

    def _count_steps(self, apart: np.ndarray, placed: bool) -> int:
        """Number of usual distances from first to last slice, missing slices included."""
        if not len(apart):
            return 1
        if apart.min() < 1e-3:
            what = "the same ImagePositionPatient" if placed else "neither a position nor a number"
            raise ValueError(f"two slices have {what}; give each phase or echo its own folder")
        usual = np.percentile(apart, 50, method="lower")
        steps = int(np.maximum(np.rint(apart / usual), 1).sum())
        if apart.max() > 1.1 * usual or apart.min() < 0.9 * usual:
            found = f"{apart.min():.4g} to {apart.max():.4g}, usually {usual:.4g}"
            self.notes += (f"{steps - len(apart)} slices missing: distances are {found}",)
        return steps

    def ranks(self) -> list[int]:
        """Place of every slice in the order of the instance numbers."""
        numbers = [_numbers(header, "number") for header in self.headers]
        return [sorted(numbers).index(number) for number in numbers]

    def shown(self) -> np.ndarray:
        """Its slices (D, H, W) with high values shown bright."""
        volume = self.read()
        if volume.voxels.ndim == 4:
            return colour_codes(volume.voxels)
        if volume.inverted:
            return np.asarray(_highest_plus_lowest(self.headers[0]) - volume.voxels)
        return volume.voxels

    def read(self) -> Volume:
        """Its slices in the unit of the files (CT: HU), or in colour."""
        voxels, windows = np.empty(0), []
        for z, (file, header) in enumerate(zip(self.files, self.headers)):
            with images.reading(file, "DICOM"):
                _refuse_short_dicom(file)
                pixels = sitk.GetArrayFromImage(sitk.ReadImage(file, imageIO="GDCMImageIO"))
                if pixels.ndim == 4 and pixels.itemsize > 1:
                    pixels >>= int(header["bits"]) - 8
                if header.get("photometric") == "MONOCHROME1":  # GDCM inverts the stored values
                    pixels = _highest_plus_lowest(header) - pixels
                windows += [_window(header)] * len(pixels)
            if z == 0:
                kind = np.uint8 if pixels.ndim == 4 else np.float32
                voxels = np.empty((*self.space.shape, *pixels.shape[3:]), kind)
            voxels[z : z + len(pixels)] = pixels
        inverted = self.headers[0].get("photometric") == "MONOCHROME1"
        return Volume(voxels, self.space, tuple(windows), inverted, self.notes)


def _numbers(header: dict[str, str], name: str) -> list[float]:
    return [float(part) for part in header.get(name, "").split("\\") if part.strip()]


def _highest_plus_lowest(header: dict[str, str]) -> float:
    """Sum of the values of the highest and the lowest number that can be stored."""
    slope, intercept = _numbers(header, "slope") or [1], _numbers(header, "intercept") or [0]
    stored = -1 if header["sign"] == "1" else 2 ** int(header["bits"]) - 1
    return (slope[0] or 1) * stored + 2 * intercept[0]


def _window(header: dict[str, str]) -> tuple[float, float] | None:
    """Lowest and highest value shown: the first window of the file, function LINEAR.

    Source: DICOM PS3.3, C.11.2.1.2.
    """
    centre, width = _numbers(header, "centre"), _numbers(header, "width")
    if not (centre and width and width[0] >= 1):
        return None
    half = (width[0] - 1) / 2
    return centre[0] - 0.5 - half, centre[0] - 0.5 + half


def _refuse_short_dicom(path: Path) -> None:
    """GDCM reads what is missing of the pixels as zeros. An icon's pixels come first."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        at = content.find(PIXEL_DATA)
        while at >= 0:
            explicit = content[at + 4 : at + 6] in (b"OB", b"OW")
            start = at + (12 if explicit else 8)
            length = int.from_bytes(content[start - 4 : start], "little")
            end = start + length
            if length == 0xFFFFFFFF:
                end = content.find(END_OF_SEQUENCE, start)
            if not start <= end <= len(content):
                raise ValueError("its pixels are cut off")
            at = content.find(PIXEL_DATA, end)
