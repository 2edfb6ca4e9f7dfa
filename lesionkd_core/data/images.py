"""Cases, and reading their pictures and masks; every repair is noted for the report."""

from __future__ import annotations

import errno
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageChops, ImageOps, UnidentifiedImageError

from ..config import LesionKDError

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".jfif"}
VOLUME_SUFFIXES = {".nii", ".nii.gz", ".nrrd", ".mha", ".mhd", ".dcm"}
MODES = {"1", "L", "P", "RGB", "LA", "PA", "RGBA", "CMYK", "F"}
CLASSES_UP_TO = 31
"""A mask whose largest value is at most this holds class numbers; grey masks reach towards 255."""
NEAR_INTEGER = 0.05
"""Class numbers that were stored with a scale factor differ from integers by less than this."""
LOSSY = {"JPEG", "MPO", "JPEG2000", "WEBP"}
"""Formats whose compression changes the values of a mask."""
MANY_VALUES = 4096
"""From this number of distinct values on, the values of a mask are rounded."""
MOSTLY_GREY = 0.3
"""A file with at least this fraction of medium grey pixels is not a mask."""
ORIENTATION = 0x0112  # EXIF tag
MACHINE_FAILED = (errno.EIO, errno.EMFILE, errno.ENFILE)
"""Errors that say nothing about the file."""


class UnreadableFile(LesionKDError):
    """A file is missing, damaged or not what its name says."""


@dataclass(frozen=True)
class Case:
    """One image, or one volume of many slices, with its masks.

    Parameters
    ----------
    id : str
        Unique in the data set.
    image : Path
        A picture, a volume file, or the folder of a DICOM series.
    masks : tuple of Path
        Several masks mean several lesions; their union is used.
    group : str
        What must stay in one split, such as a patient or a video; empty if unknown.
    label, split : str
        Class, and the release's own train, val or test; may be empty.
    page : int, optional
        Page of image and mask, for stacks in one TIFF file.
    window : str
        Default of the option `window` for this case.
    one_mask : bool
        Two masks of one name are a mistake in this layout, not two lesions.
    by_index : bool
        The position in the header of the mask is not reliable; voxels correspond by index.
    problem : str
        Why the case cannot be used, if the layout alone shows it.
    """

    id: str
    image: Path
    masks: tuple[Path, ...]
    group: str = ""
    label: str = ""
    split: str = ""
    page: int | None = None
    window: str = ""
    one_mask: bool = False
    by_index: bool = False
    problem: str = ""

    def check_masks(self) -> None:
        """Raise UnreadableFile if the case has a problem, no mask, or too many masks."""
        if self.problem:
            raise UnreadableFile(self.problem)
        if not self.masks:
            raise UnreadableFile(f"{self.image.name}: no mask belongs to this image")
        if self.one_mask and len(self.masks) > 1:
            names = ", ".join(path.name for path in self.masks)
            raise UnreadableFile(f"{self.image.name}: {names} have the same name; keep one mask")


@dataclass(frozen=True)
class Reading:
    """An image (H, W, 3) uint8 with its mask (H, W) bool, and notes on what was repaired."""

    id: str
    image: np.ndarray
    mask: np.ndarray
    notes: tuple[str, ...] = ()
    volume: str = ""  # id of the volume that this is a slice of
    group: str = ""  # the patient, if the file itself says


@contextmanager
def reading(path: Path, kind: str) -> Iterator[None]:
    """Turn whatever a library raises about a file into one error that names the file."""
    try:
        yield
    except LesionKDError:
        raise
    except FileNotFoundError:
        raise UnreadableFile(f"{path.name}: file is missing") from None
    except PermissionError:
        raise UnreadableFile(f"{path.name}: no permission to read it") from None
    except Exception as error:  # damaged bytes make decoders raise almost anything
        why = getattr(error, "strerror", None) or str(error).rpartition("ERROR: ")[2]
        if isinstance(error, MemoryError) or getattr(error, "errno", None) in MACHINE_FAILED:
            why = f"this machine could not read it ({why or 'out of memory'}); try again"
            raise LesionKDError(f"{path.name}: {why}") from None  # no case is dropped for it
        if isinstance(error, UnidentifiedImageError):
            why = "" if path.stat().st_size else "the file is empty"
        why = re.sub(r"^\w+\(0x\w+\): ", "", why.partition("\n")[0]).replace(str(path), path.name)
        why = f" ({why})" if why else ""
        raise UnreadableFile(f"{path.name}: cannot be read as {kind}{why}") from None


# Names --------------------------------------------------------------------------------------------


def suffix_of(path: Path) -> str:
    """Suffix in lower case; '.nii.gz' is one suffix."""
    return ".nii.gz" if path.name.lower().endswith(".nii.gz") else path.suffix.lower()


def stem_of(path: Path) -> str:
    """Name without the suffix of an image or volume; the whole name of a series folder."""
    suffix = suffix_of(path)
    return path.name[: -len(suffix)] if suffix in IMAGE_SUFFIXES | VOLUME_SUFFIXES else path.name


def is_volume(path: Path) -> bool:
    """Whether `path` is a volume file or the folder of a DICOM series, by its name."""
    suffix = suffix_of(path)
    return suffix in VOLUME_SUFFIXES or (suffix not in IMAGE_SUFFIXES and path.is_dir())


def images_in(folder: Path) -> list[Path]:
    """Pictures of a folder in natural order; hidden files are ignored."""
    return [path for path in sources_in(folder) if suffix_of(path) in IMAGE_SUFFIXES]


def sources_in(folder: Path) -> list[Path]:
    """Pictures, volume files and folders of DICOM series, in natural order."""
    visible = (path for path in folder.iterdir() if not path.name.startswith("."))
    known = (p for p in visible if suffix_of(p) in IMAGE_SUFFIXES or is_volume(p))
    return sorted(known, key=natural)


def unpacked(folder: Path) -> Path:
    """The folder, or the folder of the same name inside it, which some programs create."""
    return folder / folder.name if (folder / folder.name).is_dir() else folder


def natural(path: Path) -> tuple[list[int | str], str]:
    """Sorting key that compares numbers as numbers.

    Examples
    --------
    >>> names = ["a10.png", "a2.png", "a.png"]
    >>> [path.name for path in sorted(map(Path, names), key=natural)]
    ['a.png', 'a2.png', 'a10.png']
    """
    parts = re.split(r"([0-9]+)", stem_of(path))  # text at even, numbers at odd places
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], path.name


def before_number(stem: str) -> str:
    """A stem up to its last number: 'patient07_048' -> 'patient07', 'scan' -> 'scan'."""
    return re.sub(r"[\W_]*[0-9]+[^0-9]*$", "", stem)


def by_stem(paths: Iterable[Path]) -> dict[str, list[Path]]:
    """Files of equal stem together: {'a': [a.png, a.jpg]}."""
    found: dict[str, list[Path]] = {}
    for path in paths:
        found.setdefault(stem_of(path), []).append(path)
    return found


def pair(
    images: Iterable[Path],
    masks: dict[str, list[Path]],
    mask_name: str = "{}",
    one_mask: bool = True,
    **fields: Any,
) -> list[Case]:
    """Pair images with the masks of their stems.

    A mask of exactly the right name is preferred. Otherwise letter case does not matter, as long as
    only one image asks for that mask. How accents are encoded never matters. A mask without an
    image becomes a case with a problem.

    Parameters
    ----------
    masks : dict
        Mask files by stem, as `by_stem` returns them.
    mask_name : str
        Makes the stem of the mask from that of the image, such as '{}_segmentation'.
    one_mask, fields
        Passed to every case.
    """
    named = [(path, _composed(mask_name.format(stem_of(path)))) for path in images]
    files: dict[str, list[Path]] = {}
    for stem, paths in masks.items():
        files.setdefault(_composed(stem), []).extend(paths)
    exact = {name for _, name in named} & files.keys()
    folded: dict[str, list[Path]] = {}
    for stem in files.keys() - exact:
        folded.setdefault(stem.casefold(), []).extend(files[stem])
    asked = Counter(name.casefold() for _, name in named if name not in exact)
    cases, used = [], set()
    for path, name in named:
        if name in exact:
            found = files[name]
        else:
            found = folded.get(name.casefold(), []) if asked[name.casefold()] == 1 else []
        used.update(found)
        cases.append(Case(stem_of(path), path, tuple(found), one_mask=one_mask, **fields))
    for path in sorted({p for paths in files.values() for p in paths} - used, key=natural):
        problem = f"{path.name}: no image belongs to this mask"
        cases.append(Case(stem_of(path), path, (path,), problem=problem, **fields))
    return cases


def _composed(stem: str) -> str:
    return unicodedata.normalize("NFC", stem)


# Pictures -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Picture:
    """A decoded picture, upright; `orientation` is what EXIF said (1: not turned)."""

    image: Image.Image
    orientation: int
    pages: int
    lossy: bool
    notes: tuple[str, ...]


def _open(path: Path, page: int | None = None) -> _Picture:
    with reading(path, "an image"), Image.open(path) as image:
        if page:
            image.seek(page)
        deep = ";16" in str(image.tile) and not image.mode.startswith("I")
        pages = getattr(image, "n_frames", 1) if page is None else 1
        lossy, orientation = image.format in LOSSY, image.getexif().get(ORIENTATION, 1)
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        known = image.mode in MODES or image.mode.startswith("I")
        notes = ("16-bit colour reduced to its upper 8 bits",) * deep
        upright: Image.Image = image if known else image.convert("RGB")
        return _Picture(upright, orientation, pages, lossy, notes)


def count_pages(path: Path) -> int:
    """Number of pages of a picture file."""
    with reading(path, "an image"), Image.open(path) as image:
        return getattr(image, "n_frames", 1)


def read_image(path: Path) -> np.ndarray:
    """(H, W, 3) uint8: grey is repeated, transparency dropped, 16 bits scaled by their range."""
    return _read_image(path)[0]


def _read_image(path: Path, page: int | None = None) -> tuple[np.ndarray, tuple[str, ...], int]:
    """Image, notes, and the EXIF orientation that was applied."""
    picture = _open(path, page)
    image, notes = picture.image, picture.notes
    if picture.pages > 1:
        notes += (f"first of {picture.pages} pages read",)
    if picture.orientation in range(2, 9):
        notes += ("turned according to its EXIF orientation",)
    if image.mode.startswith("I") or image.mode == "F":
        notes += (f"{'float' if image.mode == 'F' else '16-bit'} grey scaled by its own range",)
        values = _finite(image, path)
        low, high = values.min(), values.max()
        grey = (values - low) * (255 / max(high - low, 1e-12))
        image = Image.fromarray(grey.round().astype(np.uint8))
    elif image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        extrema: Any = image.getextrema()  # of each band
        notes += ("transparency dropped",) * (extrema[3][0] < 255)
    elif image.mode == "CMYK":
        notes += ("CMYK converted to RGB",)
    rgb = image if image.mode == "RGB" else image.convert("RGB")
    return np.asarray(rgb), notes, picture.orientation


def _finite(image: Image.Image, path: Path) -> np.ndarray:
    values = np.asarray(image, dtype=np.float64)
    if not np.isfinite(values).all():
        raise UnreadableFile(f"{path.name}: holds NaN or infinite values")
    return values


# Masks --------------------------------------------------------------------------------------------


def count_values(planes: Iterable[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Distinct values of a mask, ascending, and how many pixels have each.

    If there are very many, as in a map of probabilities, values are rounded.
    """
    values, counts = np.empty(0), np.empty(0, int)
    for plane in planes:
        found, number = np.unique(plane, return_counts=True)
        values = np.concatenate([values, found.astype(np.float64)])
        counts = np.concatenate([counts, number])
        if len(values) > MANY_VALUES:
            step = 2 * np.abs(values).max() / MANY_VALUES
            values = np.rint(values / step) * step
        values, where = np.unique(values, return_inverse=True)
        counts = np.bincount(where, counts).astype(int)
    return values, counts


def decide_mask(
    values: np.ndarray, counts: np.ndarray, scale: float = 0, lossy: bool = False
) -> tuple[float, tuple[str, ...]]:
    """Decide from the values of a mask which pixels are lesion.

    Parameters
    ----------
    values, counts
        As `count_values` returns them.
    scale : float
        Value of a pixel that is completely lesion: 255 for 8-bit pictures. 0: the largest value,
        for what has no scale of its own (16 bits, float, volumes).
    lossy : bool
        Compression changed the values, so small ones mean nothing.

    Returns
    -------
    threshold : float
        A pixel is lesion if its value is above it.
    notes : tuple of str
        For the report; empty for 0 and 255 in pictures, 0 and 1 elsewhere.

    Raises
    ------
    ValueError
        The values do not tell which pixels are lesion.
    """
    low, top, integer = values[0], values[-1], np.rint(values)
    classes = len(values) <= 2 and low == 0
    if not lossy and not classes and np.abs(values - integer).max() < NEAR_INTEGER:
        present = np.unique(integer)
        low, top = present[0], present[-1]
        classes = low == 0 and (not scale or top <= CLASSES_UP_TO or len(present) == 2)
    if not lossy and (classes or (len(values) == 1 and (top == 1 or not scale))):
        note = f"values up to {top:g} read as lesion"
        return 0 if scale else min(top, 1) / 2, (note,) * (top not in (0, scale or 1))
    if not scale and low != 0:
        raise ValueError(f"values run from {low:g} to {top:g}; 0 must mean no lesion")
    if scale and top <= scale / 2 and not lossy:
        raise ValueError(
            f"values {low:g} to {top:g} are neither class numbers (0 to {CLASSES_UP_TO}) nor "
            "bright on black; convert the mask to 0 and 255"
        )
    scale, size = scale or top, counts.sum()
    grey = counts[(values >= scale / 4) & (values < scale * 3 / 4)].sum() / size
    if scale == 255 and len(values) > 100 and grey > MOSTLY_GREY:
        raise ValueError(
            f"{grey:.0%} of the mask's pixels are medium grey; a mask is black and white. "
            "Is it a photograph?"
        )
    between = counts[(values > 0) & (values < scale)].sum()
    note = f"{between} mask pixels ({between / size:.2%}) between 0 and {scale:g}, cut at half"
    return scale // 2 if scale == 255 else scale / 2, (note,) * bool(between)


def read_mask(path: Path) -> np.ndarray:
    """(H, W) bool: the lesion, as `decide_mask` decides it."""
    return _read_mask(path)[0]


def _read_mask(path: Path, page: int | None = None) -> tuple[np.ndarray, tuple[str, ...], int]:
    """Mask, notes, and the EXIF orientation that was applied."""
    picture = _open(path, page)
    with reading(path, "a mask"):
        if picture.pages > 1:
            raise ValueError(f"it holds {picture.pages} pages; a mask must have one")
        if picture.image.mode.startswith("I") or picture.image.mode == "F":
            values = _finite(picture.image, path)
            threshold, notes = decide_mask(*count_values([values]))
        else:
            values, threshold, notes = _decide_grey(picture)
    return values > threshold, picture.notes + notes, picture.orientation


def _decide_grey(picture: _Picture) -> tuple[np.ndarray, float, tuple[str, ...]]:
    """Brightest channel of an 8-bit mask, the threshold and notes."""
    image = picture.image
    if image.mode in ("LA", "P", "PA", "RGBA"):  # colours as shown; palette numbers are arbitrary
        *bands, alpha = image.convert("RGBA").split()
        bands = [alpha] if all(map(_flat, bands)) and not _flat(alpha) else bands
    elif image.mode == "L":
        bands = [image]
    else:
        bands = list(image.convert("L" if image.mode == "1" else "RGB").split())
    grey = reduce(ImageChops.lighter, bands)  # a red mask is a mask too
    counts = np.array(grey.histogram())
    values = np.flatnonzero(counts)
    few = not picture.lossy and len(values) <= CLASSES_UP_TO + 1
    if few and ImageChops.difference(grey, reduce(ImageChops.darker, bands)).getbbox():
        if values[0] > 127:
            raise ValueError("colours are not on black; convert the mask to 0 and 255")
        if values[0] == 0 and len(values) > 2:
            return np.asarray(grey), 0, ("colours other than black read as lesion",)
    return np.asarray(grey), *decide_mask(values, counts[values], 255, picture.lossy)


def _flat(band: Image.Image) -> bool:
    low, high = band.getextrema()
    return low == high


# Cases --------------------------------------------------------------------------------------------


def read_case(case: Case) -> Reading:
    """Read the picture of a case and the union of its masks.

    Raises
    ------
    UnreadableFile
        A file is missing or damaged, or a mask has another size than its image.
    """
    case.check_masks()
    image, notes, turned = _read_image(case.image, case.page)
    union: np.ndarray = np.zeros(image.shape[:2], dtype=bool)
    for path in case.masks:
        mask, said, mask_turned = _read_mask(path, case.page)
        if turned in range(2, 9) and mask_turned == 1:  # drawn on the stored or the shown pixels?
            if mask.shape != union.shape and turned > 4 and mask.shape == union.shape[::-1]:
                mask = _turn(mask, turned)
                said += ("mask turned like its image",)
            elif turned <= 4 or union.shape[0] == union.shape[1]:
                said += ("image turned by EXIF; its mask has no EXIF and is taken as upright",)
        if mask.shape != union.shape:
            (height, width), (rows, columns) = mask.shape, union.shape
            sizes = f"mask is {width} x {height} px, its image {columns} x {rows} px"
            raise UnreadableFile(f"{path.name}: {sizes}")
        union |= mask
        notes += said
    if len(case.masks) > 1:
        notes += (f"{len(case.masks)} masks united",)
    return Reading(case.id, image, union, notes)


def _turn(mask: np.ndarray, orientation: int) -> np.ndarray:
    image = Image.fromarray(mask)
    image.getexif()[ORIENTATION] = orientation
    return np.asarray(ImageOps.exif_transpose(image))
