"""Cases, and reading their pictures and masks; every repair is noted for the report."""

from __future__ import annotations

import errno
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageChops, ImageOps, UnidentifiedImageError

from ..config import LesionKDError, MissingExtra

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".jfif"}
VOLUME_SUFFIXES = {".nii", ".nii.gz", ".nrrd", ".mha", ".mhd", ".dcm"}
MODES = {"1", "L", "P", "RGB", "LA", "PA", "RGBA", "CMYK", "F"}
CLASSES_UP_TO = 31
"""Whole numbers up to this one are classes."""
NEAR_INTEGER = 0.05
"""Class numbers that were stored with a scale factor differ from integers by less than this."""
SOLID = 0.1
"""Fraction of the pixels of classes or instances whose neighbours have the same value."""
SMALL_LESION = 600
"""The soft border of a lesion of at most this many pixels may have two values alone."""
MOST_BETWEEN, LEAST_BRIGHT = 0.1, 0.25
"""In black and white with soft borders: largest fraction of the image between the ends, smallest
fraction of bright pixels among those that are not dark."""
PERCENTILES = (0.5, 99.5)
"""Shown as black and white if neither the user nor the file gives a window."""
PADDING = 0.05
"""A lowest value that more than this fraction of the pixels have is not counted."""
LOSSY = {"JPEG", "MPO", "JPEG2000", "WEBP"}
"""Formats whose compression changes the values of a mask."""
MANY_VALUES = 4096
"""From this number of distinct values on, the values of a mask are rounded."""
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
    window, lesion_values, inverted
        The options `window`, `lesion_values` and `invert_masks`.
    one_mask : bool
        Two masks of one name are a mistake in this layout, not two lesions.
    unlabelled : bool
        There is no mask, and none is needed.
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
    lesion_values: tuple[int, ...] = ()
    inverted: bool = False
    one_mask: bool = False
    unlabelled: bool = False
    by_index: bool = False
    problem: str = ""

    def check_masks(self) -> None:
        """Raise UnreadableFile if the case has a problem, no mask, or too many masks."""
        if self.problem:
            raise UnreadableFile(self.problem)
        if not self.masks and not self.unlabelled:
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
            with path.open("rb") as file:
                start = file.read(8)
            why = f"its first bytes are {start!r}" if start else "the file is empty"
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


def files_in(folder: Path) -> list[Path]:
    """Files that are not hidden, in natural order; DICOM files often have no suffix."""
    files = (p for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))
    return sorted(files, key=natural)


def is_dicom(path: Path) -> bool:
    """Whether a file, or any file of a folder, has the mark of DICOM."""
    if path.is_dir():
        return any(map(is_dicom, files_in(path)))
    return beginning(path)[128:132] == b"DICM"


def beginning(path: Path) -> bytes:
    """Where a DICOM file has its mark and its SOP class."""
    with open(path, "rb") as file:
        return file.read(2048)


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
    """A decoded picture, upright; `orientation` is what EXIF said (1: not turned).

    `deep`: colours of 16 bits, of which Pillow keeps the upper 8.
    """

    image: Image.Image
    orientation: int
    pages: int
    lossy: bool
    deep: bool


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
        upright: Image.Image = image if known else image.convert("RGB")
        return _Picture(upright, orientation, pages, lossy, deep)


def count_pages(path: Path) -> int:
    """Number of pages of a picture file."""
    with reading(path, "an image"), Image.open(path) as image:
        return getattr(image, "n_frames", 1)


def read_image(path: Path, window: str = "") -> np.ndarray:
    """(H, W, 3) uint8: grey is repeated, transparency dropped, 16 bits scaled as volumes are."""
    return noted_image(path, window=window)[0]


def noted_image(
    path: Path, page: int | None = None, window: str = ""
) -> tuple[np.ndarray, tuple[str, ...], int]:
    """Image, notes, and the EXIF orientation that was applied."""
    picture = _open(path, page)
    image = picture.image
    notes: tuple[str, ...] = ()
    if picture.pages > 1:
        notes += (f"first of {picture.pages} pages read",)
    if picture.orientation in range(2, 9):
        notes += ("turned according to its EXIF orientation",)
    if picture.deep or image.mode.startswith("I") or image.mode == "F":
        values = _finite(picture, path)
        low, high = window_limits(window) if window else contrast_limits(values)
        kind = ("float" if image.mode == "F" else "16-bit") + (" colour" if values.ndim > 2 else "")
        notes += (f"{kind} values {low:g} to {high:g} stretched to black and white",)
        grey = ((values - low) / max(high - low, 1e-12)).clip(0, 1)
        image = Image.fromarray((255 * grey).round().astype(np.uint8))
    elif image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        extrema: Any = image.getextrema()  # of each band
        notes += ("transparency dropped",) * (extrema[3][0] < 255)
    elif image.mode == "CMYK":
        notes += ("CMYK converted to RGB",)
    rgb = image if image.mode == "RGB" else image.convert("RGB")
    return np.asarray(rgb), notes, picture.orientation


def window_limits(window: str) -> tuple[float, float]:
    """Values shown as black and white: 'centre, width' -> (low, high)."""
    centre, width = map(float, window.split(","))
    return centre - width / 2, centre + width / 2


def contrast_limits(values: np.ndarray) -> tuple[float, float]:
    """0.5 and 99.5 percentiles, without a lowest value that many pixels have: padding."""
    padding = values == values.min()
    inside = values[~padding] if PADDING < padding.mean() < 1 else values
    low, high = np.percentile(inside.astype(np.float32), PERCENTILES)
    return (float(low), float(high)) if low < high else (float(values.min()), float(values.max()))


def _finite(picture: _Picture, path: Path) -> np.ndarray:
    """(H, W), or (H, W, 3) if colours have 16 bits."""
    values = np.asarray(picture.image, dtype=np.float64)
    if picture.deep:  # Pillow keeps the upper 8 of 16 bits
        try:
            import SimpleITK as sitk
        except ImportError:
            raise MissingExtra(f"{path.name} (16 bits for each colour)", "volumes") from None
        with reading(path, "an image of 16 bits"):
            stored = sitk.GetArrayFromImage(sitk.ReadImage(path))[..., :3].astype(np.float32)
            planes = (_turn(stored[..., i], picture.orientation) for i in range(3))
            values = np.stack([*planes], axis=-1)
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
        if plane.dtype == np.uint8:
            number = np.bincount(plane.ravel(), minlength=256)
            found = np.flatnonzero(number)
            number = number[found]
        else:
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
    planes: Sequence[np.ndarray] | np.ndarray, case: Case, full: float = 1, lossy: bool = False
) -> tuple[Callable[[np.ndarray], np.ndarray], tuple[str, ...]]:
    """Decide from the values of a mask which pixels are lesion.

    Two values: the background is 0, or else the smaller. Classes and instances: all but 0 is
    lesion. Black and white with soft borders: cut at half. Anything else is refused.

    Parameters
    ----------
    planes : sequence of (H, W)
        One picture, or all slices of a volume.
    case : Case
        With the options `lesion_values` and `inverted`.
    full : float
        Usual value of a lesion, about which nothing is noted: 255 for 8-bit pictures, else 1.
    lossy : bool
        Compression changed the values (0 to 255).

    Returns
    -------
    select : function of (H, W) -> (H, W) bool
        The lesion in a plane.
    notes : tuple of str
        For the report.

    Raises
    ------
    ValueError
        The values do not tell which pixels are lesion.
    """
    values, counts = count_values(planes)
    listed = "values " + ", ".join(f"{value:g}" for value in values)
    if len(values) > 6:
        listed = f"{len(values)} values from {values[0]:g} to {values[-1]:g}"
    inverted, chosen = case.inverted, case.lesion_values
    if chosen:
        if lossy:
            raise ValueError("compression changed its values, so lesion_values cannot be used")
        note = f"{listed}: {', '.join(map(str, chosen))} read as lesion (lesion_values)"
        return lambda x: np.isin(np.rint(x), chosen) != inverted, (note,)
    try:
        threshold, note = _threshold(planes, values, counts, full, lossy)
    except ValueError as error:
        raise ValueError(
            f"{listed}: {error}; name those of the lesion in lesion_values, or convert "
            "them to 0 and 255"
        ) from None
    notes = (f"{listed}: {note}",) * bool(note) + ("inverted (invert_masks)",) * inverted
    return lambda x: (x > threshold) != inverted, notes


def _threshold(
    planes: Iterable[np.ndarray], values: np.ndarray, counts: np.ndarray, full: float, lossy: bool
) -> tuple[float, str]:
    """Value above which a pixel is lesion, and a note."""
    low, top, total = float(values[0]), float(values[-1]), counts.sum()
    if len(values) == 1 and not lossy:
        if top not in (0, 1, 255, 65535):
            raise ValueError("one value alone is neither lesion nor background")
        return 0.5, "all of the image read as lesion" * (top > 0)
    if low < 0 and top == 0:
        raise ValueError("0 must mean no lesion")
    if len(values) == 2 and not lossy:
        return (low + top) / 2, f"{top:g} read as lesion" * (low != 0 or top not in (1, full))
    if low == 0 and not lossy:
        if top in (255, 65535) and values[-2] <= CLASSES_UP_TO:
            raise ValueError(
                f"{top:g} beside class numbers may mean 'ignore', and pixels cannot be left out of "
                "loss and scores"
            )
        if _are_labels(planes, values, counts):
            return min(values[1], 1) / 2, "all but 0 read as lesion"
    top = 255 if lossy else top
    if lossy and values[-1] < top / 4:
        return top / 2, "all of the image read as background, since JPEG changes small values"
    between = counts[(values > top / 8) & (values < top * 7 / 8)].sum()
    bright, lighter = (counts[values > top * part].sum() for part in (7 / 8, 1 / 4))
    if low < 0 or between > MOST_BETWEEN * total or bright < LEAST_BRIGHT * lighter:
        raise ValueError("neither two values, nor classes, nor black and white with soft borders")
    inner = counts[(values > low) & (values < top)].sum()
    note = f"cut at half, {inner / total:.2%} of the pixels between {low:g} and {top:g}"
    return top / 2, note * bool(inner)


def _are_labels(planes: Iterable[np.ndarray], values: np.ndarray, counts: np.ndarray) -> bool:
    """Whether the values number classes or instances: whole numbers, few, small or in solid areas.

    A pixel is solid if its 8 neighbours have the same value. At a soft border hardly any is, and in
    noise beside black and white only the extreme values are.
    """
    top, whole = values[-1], bool(np.abs(values - np.rint(values)).max() < NEAR_INTEGER)
    if whole and (len(values) <= 4 or top <= CLASSES_UP_TO):
        if len(values) == 4 and top > CLASSES_UP_TO and counts[1:].sum() <= SMALL_LESION:
            raise ValueError("two values between black and white may be classes or a soft border")
        return True
    if len(values) > MANY_VALUES // 2:
        return False
    solid = np.zeros(len(values), int)
    for plane in planes:
        across, down = plane[:, 1:] == plane[:, :-1], plane[1:] == plane[:-1]
        rows = across[:, 1:] & across[:, :-1]
        same = rows[:-2] & rows[1:-1] & rows[2:] & down[:-1, 1:-1] & down[1:, 1:-1]
        inside = plane[1:-1, 1:-1][same]
        solid += np.bincount(np.searchsorted(values, inside), minlength=len(values))
    between = (values > top / 8) & (values < top * 7 / 8)
    lesion = counts[1:].sum()
    areas = counts[1:][solid[1:] > SOLID * counts[1:]].sum()
    if solid[between].sum() <= SOLID * counts[between].sum() or areas < 0.8 * lesion:
        return False
    if not whole or counts[values > top * 7 / 8].sum() > lesion / 2:
        raise ValueError("areas between black and white may be classes or an enlarged soft border")
    return True


def read_mask(path: Path) -> np.ndarray:
    """(H, W) bool: the lesion, as `decide_mask` decides it."""
    return noted_mask(path, Case("", path, ()))[0]


def noted_mask(path: Path, case: Case) -> tuple[np.ndarray, tuple[str, ...], int]:
    """Mask, notes, and the EXIF orientation that was applied."""
    picture = _open(path, case.page)
    with reading(path, "a mask"):
        if picture.pages > 1:
            raise ValueError(f"it holds {picture.pages} pages; a mask must have one")
        if picture.image.mode.startswith("I") or picture.image.mode == "F":
            grey, full = _finite(picture, path), 1
        else:
            grey, full = _grey_mask(picture, case), 255
        select, notes = decide_mask([grey], case, full, picture.lossy)
    if notes and grey.dtype == np.int64 and not case.lesion_values:
        notes = ("colours other than black read as lesion", *notes[1:])
    return select(grey), notes, picture.orientation


def _grey_mask(picture: _Picture, case: Case) -> np.ndarray:
    """(H, W): classes of a palette, codes of a few colours, or the brightest channel."""
    image = picture.image
    if image.mode == "P" and "transparency" not in image.info:
        palette, used = (
            np.reshape(image.getpalette() or 3 * [1], (-1, 3)),
            np.unique(np.asarray(image)),
        )
        others = palette[used[used > 0]]
        if not palette[0].any() and others.any(1).all() and np.ptp(others, axis=1).any():
            return np.asarray(image)  # black is 0, and the numbers of colours are classes
    if image.mode in ("LA", "P", "PA", "RGBA"):
        *bands, alpha = image.convert("RGBA").split()
        bands = [alpha] if all(map(_flat, bands)) and not _flat(alpha) else bands
    elif image.mode == "L":
        bands = [image]
    else:
        bands = list(image.convert("L" if image.mode == "1" else "RGB").split())
    grey = reduce(ImageChops.lighter, bands)  # a red mask is a mask too
    if len(bands) == 3 and ImageChops.difference(grey, reduce(ImageChops.darker, bands)).getbbox():
        shown = Image.merge("RGB", bands)
        colours: Any = shown.getcolors(CLASSES_UP_TO + 1)  # None if there are more
        if colours and not picture.lossy:
            if not case.lesion_values and all(any(colour) for _, colour in colours):
                raise ValueError("its colours are not on black; convert it to 0 and 255")
            return np.asarray(shown).astype(np.int64) @ (65536, 256, 1)
    return np.asarray(grey)


def _flat(band: Image.Image) -> bool:
    low, high = band.getextrema()
    return low == high


# Cases --------------------------------------------------------------------------------------------


def read_case(case: Case, window: str = "") -> Reading:
    """Read the picture of a case and the union of its masks.

    Raises
    ------
    UnreadableFile
        A file is missing or damaged, or a mask has another size than its image.
    """
    case.check_masks()
    image, notes, turned = noted_image(case.image, case.page, window)
    union: np.ndarray = np.zeros(image.shape[:2], dtype=bool)
    for path in case.masks:
        mask, said, mask_turned = noted_mask(path, case)
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


def _turn(plane: np.ndarray, orientation: int) -> np.ndarray:
    image = Image.fromarray(plane)
    image.getexif()[ORIENTATION] = orientation
    return np.asarray(ImageOps.exif_transpose(image))
