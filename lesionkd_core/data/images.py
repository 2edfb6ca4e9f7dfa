"""Reading image and mask files as people really have them; what had to be repaired is said."""

from __future__ import annotations

import errno
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageChops, ImageOps, UnidentifiedImageError

from ..config import LesionKDError

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".jfif"})
VOLUME_SUFFIXES = frozenset({".nii", ".nii.gz", ".dcm"})
CLASSES_UP_TO = 31
"""A mask whose largest value is at most this holds class numbers; grey masks reach towards 255."""
LOSSY = frozenset({"JPEG", "MPO", "JPEG2000", "WEBP"})
"""Formats that smear a mask's values, so that small ones say nothing."""
MOSTLY_GREY = 0.3
"""Share of pixels of middling grey from which a file is no mask."""
ORIENTATION = 0x0112  # EXIF tag


class UnreadableFile(LesionKDError):
    """A file is missing, broken or not what its name says."""


@dataclass(frozen=True)
class Case:
    """One row a case: id, group, image, mask (DESIGN.md, way of the data).

    `image` is an image file, a NIfTI volume, or a DICOM file or folder of one series; a volume gives
    a case a slice. `group` is what must stay together in a split (video, patient) and `split` the
    release's own train, val or test; empty where the release does not say. Several `masks` mean
    several lesions: their union counts.
    """

    id: str
    image: Path
    masks: tuple[Path, ...]
    group: str = ""
    label: str = ""
    split: str = ""
    one_mask: bool = False  # a layout in which two masks of one name are a mistake, not two lesions
    problem: str = ""  # why the case cannot be used, where the layout alone says so


@dataclass(frozen=True)
class Reading:
    """One image with its mask: image (H, W, 3) uint8, mask (H, W) bool, and what was repaired."""

    id: str
    image: np.ndarray
    mask: np.ndarray
    notes: tuple[str, ...] = ()
    volume: str = ""  # id of the volume that this is a slice of
    group: str = ""  # the patient, where the file itself says


def suffix_of(path: Path) -> str:
    """Lower-case suffix; '.nii.gz' is one."""
    return ".nii.gz" if path.name.lower().endswith(".nii.gz") else path.suffix.lower()


def stem_of(path: Path) -> str:
    """Name without its suffix; of a folder (a DICOM series) the name itself."""
    return path.name[: -len(suffix_of(path))] if suffix_of(path) in IMAGE_SUFFIXES | VOLUME_SUFFIXES else path.name


def is_volume(path: Path) -> bool:
    """Whether `path` is a NIfTI or DICOM file or a folder of a series."""
    return suffix_of(path) in VOLUME_SUFFIXES or (suffix_of(path) not in IMAGE_SUFFIXES and path.is_dir())


def images_in(folder: Path) -> list[Path]:
    """Image files of a folder in natural order of their names; hidden files are passed over."""
    return sorted((p for p in folder.iterdir() if suffix_of(p) in IMAGE_SUFFIXES and not p.name.startswith(".")), key=natural)


def sources_in(folder: Path) -> list[Path]:
    """As `images_in`, with NIfTI and DICOM files and the folders of DICOM series."""
    found = (p for p in folder.iterdir() if not p.name.startswith(".") and (suffix_of(p) in IMAGE_SUFFIXES or is_volume(p)))
    return sorted(found, key=natural)


def unpacked(folder: Path) -> Path:
    """The folder, or the one of its own name in it, which some programs make while they unpack."""
    return folder / folder.name if (folder / folder.name).is_dir() else folder


def natural(path: Path) -> list[int | str]:
    """Sorting key by number where there is one.

    >>> [path.name for path in sorted(map(Path, ["a (10).png", "a (2).png"]), key=natural)]
    ['a (2).png', 'a (10).png']
    """
    parts = re.split(r"([0-9]+)", stem_of(path))  # text and numbers take turns, so parts of two names compare
    return [int(part) if i % 2 else part for i, part in enumerate(parts)] + [path.name]


def by_stem(paths: Iterable[Path]) -> dict[str, list[Path]]:
    """Files of equal stem together: {'a': [a.png, a.jpg]}."""
    found: dict[str, list[Path]] = {}
    for path in paths:
        found.setdefault(stem_of(path), []).append(path)
    return found


def pair(images: Iterable[Path], masks: dict[str, list[Path]], mask_name: str = "{}", one_mask: bool = True, **fields: Any) -> list[Case]:
    """Images with the masks of their stems; a mask that no image claims becomes a case with a problem.

    `mask_name` makes the mask's stem from the image's; letter case and the way accents are encoded do
    not count. `fields` go to every case.
    """
    named = [(image, _plain(mask_name.format(stem_of(image)))) for image in images]
    folded: dict[str, tuple[Path, ...]] = {}
    for stem, paths in masks.items():
        folded[_plain(stem)] = folded.get(_plain(stem), ()) + tuple(paths)
    cases = [Case(stem_of(image), image, folded.get(stem, ()), one_mask=one_mask, **fields) for image, stem in named]
    alone = [path for stem in folded.keys() - {stem for _, stem in named} for path in folded[stem]]
    return cases + [Case(stem_of(p), p, (p,), problem=f"{p.name}: no image belongs to this mask", **fields) for p in sorted(alone, key=natural)]


def _plain(stem: str) -> str:
    return unicodedata.normalize("NFC", stem).casefold()


def _open(path: Path) -> tuple[Image.Image, int, int, bool, tuple[str, ...]]:
    """The picture upright, what its EXIF said (1: nothing to turn), how many pages the file has, whether it is lossy, and notes."""
    try:
        with Image.open(path) as opened:
            image: Image.Image = opened
            deep = ";16" in str(opened.tile) and not image.mode.startswith("I")
            pages, lossy, orientation = getattr(image, "n_frames", 1), image.format in LOSSY, image.getexif().get(ORIENTATION, 1)
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            if image.mode not in ("1", "L", "P", "RGB", "LA", "PA", "RGBA", "CMYK", "F") and not image.mode.startswith("I"):
                image = image.convert("RGB")
    except FileNotFoundError:
        raise UnreadableFile(f"{path.name}: file is missing") from None
    except PermissionError:
        raise UnreadableFile(f"{path.name}: may not be read; check its permissions") from None
    except Exception as error:  # on broken bytes a decoder may raise anything
        if isinstance(error, MemoryError) or getattr(error, "errno", None) in (errno.EIO, errno.EMFILE, errno.ENFILE):
            raise LesionKDError(f"{path.name}: the machine failed to read it ({error or 'out of memory'}); start again") from None  # never a dropped case
        unknown = isinstance(error, UnidentifiedImageError)
        why = "the file is empty" * (not path.stat().st_size) if unknown else getattr(error, "strerror", None) or str(error)
        raise UnreadableFile(f"{path.name}: cannot be read as an image" + f" ({why})" * bool(why)) from None
    return image, orientation, pages, lossy, ("16-bit colour cut to its upper 8 bits",) * deep


def read_image(path: Path) -> np.ndarray:
    """(H, W, 3) uint8 from any mode: grey is repeated, alpha dropped, 16 bits scaled by their range."""
    return _read_image(path)[0]


def _read_image(path: Path) -> tuple[np.ndarray, tuple[str, ...], int]:
    """Image, notes, and the EXIF orientation that was applied (1: none)."""
    image, orientation, pages, _, notes = _open(path)
    if pages > 1:
        notes += (f"first of {pages} pages read",)
    if orientation in range(2, 9):
        notes += ("turned as its EXIF orientation says",)
    if image.mode.startswith("I") or image.mode == "F":
        notes += (f"{'float' if image.mode == 'F' else '16-bit'} grey scaled by its own range",)
        values = _finite(image, path)
        low, high = values.min(), values.max()
        image = Image.fromarray(((values - low) * (255 / max(high - low, 1e-12))).round().astype(np.uint8))
    elif image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        extrema: Any = image.getextrema()  # of each band
        notes += ("transparency dropped",) * (extrema[3][0] < 255)
    elif image.mode == "CMYK":
        notes += ("CMYK converted to RGB",)
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB")), notes, orientation


def _finite(image: Image.Image, path: Path) -> np.ndarray:
    values = np.asarray(image, dtype=np.float64)
    if not np.isfinite(values).all():
        raise UnreadableFile(f"{path.name}: holds NaN or infinite values")
    return values


def read_mask(path: Path) -> np.ndarray:
    """(H, W) bool: a pixel is lesion over half of the scale, or where it has a class number.

    The scale is 255 for 8-bit masks, the file's own largest value for 16-bit and float masks. A mask of 0
    and one other value, of values up to `CLASSES_UP_TO`, or of a few colours holds classes: all but 0 is
    lesion. JPEG smears values, so there the half counts alone.
    """
    return _read_mask(path)[0]


def _read_mask(path: Path) -> tuple[np.ndarray, tuple[str, ...], int]:
    """Mask, notes, and the EXIF orientation that was applied."""
    image, orientation, pages, lossy, notes = _open(path)
    if pages > 1:
        raise UnreadableFile(f"{path.name}: holds {pages} pages, a mask is one")
    if image.mode.startswith("I") or image.mode == "F":
        mask, said = cut_numbers(_finite(image, path))
    else:
        mask, said = _cut_grey(image, lossy, path)
    return mask, notes + said, orientation


def cut_numbers(values: np.ndarray) -> tuple[np.ndarray, tuple[str, ...]]:
    """Mask of numbers without a scale of their own (16 bits, float, volumes), and notes: classes as they are, else over half of the largest."""
    top = values.max(initial=0)
    if (top <= CLASSES_UP_TO and (values == values.round()).all()) or ((values == 0) | (values == top)).all():
        return values > 0, _class_note(top)
    return values > top / 2, _between_note(int(np.count_nonzero((values > 0) & (values < top))), values.size, top)


def _cut_grey(image: Image.Image, lossy: bool, path: Path) -> tuple[np.ndarray, tuple[str, ...]]:
    if image.mode in ("LA", "P", "PA", "RGBA"):
        *bands, alpha = image.convert("RGBA").split()  # what a viewer shows: palettes number their colours at will
        bands = [alpha] if all(map(_flat, bands)) and not _flat(alpha) else bands
    else:
        bands = [image] if image.mode == "L" else list(image.convert("L" if image.mode == "1" else "RGB").split())
    grey = reduce(ImageChops.lighter, bands)  # a red mask is a mask too
    counts = grey.histogram()
    present = [value for value, count in enumerate(counts) if count]
    top, values = present[-1], np.asarray(grey)
    if not lossy and (top == 0 or present == [1] or (present[0] == 0 and (len(present) == 2 or top <= CLASSES_UP_TO))):
        return values > 0, _class_note(top)
    coloured = not lossy and len(present) <= CLASSES_UP_TO + 1 and ImageChops.difference(grey, reduce(ImageChops.darker, bands)).getbbox()
    if coloured and present[0] == 0:
        return values > 0, ("colours other than black read as lesion",)
    if (top <= 127 and not lossy) or (coloured and present[0] > 127):
        raise UnreadableFile(f"{path.name}: mask values {present[0]} to {top} are neither class numbers (0 to {CLASSES_UP_TO}) nor bright on black; convert it")
    if len(present) > 100 and (middle := sum(counts[64:192])) > MOSTLY_GREY * values.size:
        raise UnreadableFile(f"{path.name}: {middle / values.size:.0%} of the mask's pixels are of middling grey; is it a photograph?")
    return values > 127, _between_note(values.size - counts[0] - counts[255], values.size, 255)


def _flat(band: Image.Image) -> bool:
    low, high = band.getextrema()
    return low == high


def _class_note(top: float) -> tuple[str, ...]:
    return (f"values up to {top:g} read as lesion",) * (top not in (0, 255))


def _between_note(between: int, size: int, scale: float) -> tuple[str, ...]:
    return (f"{between} mask pixels ({between / size:.2%}) between 0 and {scale:g}, cut at half",) * bool(between)


def read_case(case: Case) -> Reading:
    """The image of a case and the union of its masks; their sizes agree.

    Raises
    ------
    UnreadableFile
        A file is missing or broken, a mask has another size or there is none.
    """
    if case.problem:
        raise UnreadableFile(case.problem)
    if not case.masks:
        raise UnreadableFile(f"{case.image.name}: no mask belongs to this image")
    if case.one_mask and len(case.masks) > 1:
        raise UnreadableFile(f"{case.image.name}: {', '.join(path.name for path in case.masks)} are masks of one name; keep one")
    image, notes, turned = _read_image(case.image)
    union: np.ndarray = np.zeros(image.shape[:2], dtype=bool)
    for path in case.masks:
        mask, said, mask_turned = _read_mask(path)
        if turned in range(2, 9) and mask_turned == 1:  # drawn on the pixels as they are stored, or on what a viewer showed
            if mask.shape != union.shape and turned > 4 and mask.shape == union.shape[::-1]:
                mask = _turn(mask, turned)
                said += ("mask turned like its image",)
            elif turned <= 4 or union.shape[0] == union.shape[1]:
                said += ("its size does not tell whether the mask is turned like its image; taken as upright",)
        if mask.shape != union.shape:
            raise UnreadableFile(f"{path.name}: mask is {mask.shape[1]} x {mask.shape[0]} px, its image {union.shape[1]} x {union.shape[0]} px")
        union |= mask
        notes += said
    if len(case.masks) > 1:
        notes += (f"{len(case.masks)} masks united",)
    return Reading(case.id, image, union, notes)


def _turn(mask: np.ndarray, orientation: int) -> np.ndarray:
    image = Image.fromarray(mask)
    image.getexif()[ORIENTATION] = orientation
    return np.asarray(ImageOps.exif_transpose(image))
