"""Cases, and reading their pictures; every repair is noted for the report."""

from __future__ import annotations

import errno
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ..config import LesionKDError, MissingExtra

if TYPE_CHECKING:
    from .masks import Decision
    from .volumes import Volume

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".jfif"}
VOLUME_SUFFIXES = {".nii", ".nii.gz", ".nrrd", ".mha", ".mhd", ".dcm"}
FORMATS = ", ".join(sorted(IMAGE_SUFFIXES | VOLUME_SUFFIXES)) + ", or folders of DICOM series"
MODES = {"1", "L", "P", "RGB", "LA", "PA", "RGBA", "CMYK", "F"}
PERCENTILES = (0.5, 99.5)
"""Shown as black and white if neither the user nor the file gives a window."""
PADDING = 0.05
"""A lowest value that more than this fraction of the pixels have is not counted."""
LOSSY = {"JPEG", "MPO", "JPEG2000", "WEBP"}
"""Formats whose compression changes the values of a mask; WebP unless it has a chunk VP8L."""
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
    one_mask : bool
        Two masks of one name are a mistake in this layout, not two lesions.
    unlabelled : bool
        There is no mask, and none is needed.
    by_index : bool
        The position in the header of the mask is not reliable; voxels correspond by index.
    problem : str
        Why the case cannot be used, if the layout alone shows it.
    decision : Decision, optional
        Which values of the masks are lesion; without it the masks of this case alone decide.
    """

    id: str
    image: Path
    masks: tuple[Path, ...]
    group: str = ""
    label: str = ""
    split: str = ""
    page: int | None = None
    one_mask: bool = False
    unlabelled: bool = False
    by_index: bool = False
    problem: str = ""
    decision: Decision | None = field(default=None, repr=False, compare=False)

    def check_masks(self) -> None:
        """Raise UnreadableFile if the case has a problem, no mask, or too many masks."""
        if self.problem:
            raise UnreadableFile(self.problem)
        if not self.masks and not self.unlabelled:
            raise UnreadableFile(
                f"{self.image.name}: no mask belongs to this image; without a lesion it needs a "
                "black one"
            )
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


class VolumeReader(Protocol):
    """What the core asks of the reader of volumes."""

    def holds_series(self, folder: Path) -> bool: ...
    def read_slices(self, case: Case, window: str = "") -> Iterator[Reading]: ...
    def read_mask_volume(self, path: Path) -> tuple[np.ndarray, bool]: ...
    def read_volume(self, path: Path) -> Volume: ...
    def write_mask(self, path: Path, mask: np.ndarray, like: Path) -> None: ...


def volume_reader() -> VolumeReader:
    """The one door from the core to volumes, whose packages are an extra.

    Raises
    ------
    MissingExtra
        Says how to install it.
    """
    from . import volumes

    return volumes


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
    label: str = "",
    split: str = "",
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
    one_mask, label, split
        Passed to every case.
    """
    named = [(path, composed(mask_name.format(stem_of(path)))) for path in images]
    files: dict[str, list[Path]] = {}
    for stem, paths in masks.items():
        files.setdefault(composed(stem), []).extend(paths)
    exact = {name for _, name in named} & files.keys()
    folded: dict[str, list[Path]] = {}
    for stem in files.keys() - exact:
        folded.setdefault(stem.casefold(), []).extend(files[stem])
    asked = Counter(name.casefold() for _, name in named if name not in exact)
    cases, used = [], set()
    for path, name in named:
        found = files.get(name, [])
        if not found and asked[name.casefold()] == 1:
            found = folded.get(name.casefold(), [])
        used.update(found)
        case = Case(stem_of(path), path, tuple(found), label=label, split=split, one_mask=one_mask)
        cases.append(case)
    for path in sorted({p for paths in files.values() for p in paths} - used, key=natural):
        problem = f"{path.name}: no image belongs to this mask"
        case = Case(stem_of(path), path, (path,), label=label, split=split, problem=problem)
        cases.append(case)
    return cases


def composed(stem: str) -> str:
    """With accents in one form; macOS encodes them in another one."""
    return unicodedata.normalize("NFC", stem)


# Pictures -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Picture:
    """A decoded picture, upright.

    Parameters
    ----------
    page, pages : int
        The page that was read (from 0), and how many there are to choose from.
    orientation : int
        What EXIF said; 1: not turned.
    lossy : bool
        Compression changed the values.
    deep : bool
        Colours of 16 bits, of which Pillow keeps the upper 8.
    """

    image: Image.Image
    page: int
    pages: int
    orientation: int
    lossy: bool
    deep: bool


def open_picture(path: Path, page: int | None = None) -> Picture:
    """Decode a picture file, or one page of it."""
    # by its path, Pillow 13 maps grey TIFF into memory and mixes up rows if it is turned
    with reading(path, "an image"), open(path, "rb") as file, Image.open(file) as image:
        if page:
            image.seek(page)
        deep = ";16" in str(image.tile) and not image.mode.startswith("I")
        pages = getattr(image, "n_frames", 1) if page is None else 1
        lossy = image.format in LOSSY or image.info.get("compression") == "jpeg"
        if image.format == "WEBP":
            lossy = b"VP8L" not in path.read_bytes()[:4096]
        orientation = image.getexif().get(ORIENTATION, 1)
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        known = image.mode in MODES or image.mode.startswith("I")
        upright: Image.Image = image if known else image.convert("RGB")
        return Picture(upright, page or 0, pages, orientation, lossy, deep)


def count_pages(path: Path) -> int:
    """Pages of a TIFF file; 1 of another file, and of one that reading will refuse."""
    if suffix_of(path) not in (".tif", ".tiff"):
        return 1
    try:
        with reading(path, "an image"), Image.open(path) as image:
            return getattr(image, "n_frames", 1)
    except LesionKDError:
        return 1


def read_image(path: Path, window: str = "") -> np.ndarray:
    """(H, W, 3) uint8: grey is repeated, transparency dropped, 16 bits scaled as volumes are."""
    return noted_image(path, window=window)[0]


def noted_image(
    path: Path, page: int | None = None, window: str = ""
) -> tuple[np.ndarray, tuple[str, ...], int]:
    """Image, notes, and the EXIF orientation that was applied."""
    picture = open_picture(path, page)
    image = picture.image
    notes: tuple[str, ...] = ()
    if picture.pages > 1:
        notes += (f"first of {picture.pages} pages read",)
    if picture.orientation in range(2, 9):
        notes += ("turned according to its EXIF orientation",)
    if picture.deep or image.mode.startswith("I") or image.mode == "F":
        values = finite_values(picture, path).astype(np.float64)
        values = values[..., :3] if picture.deep else values
        low, high = window_limits(window) if window else contrast_limits(values)
        kind = ("float" if image.mode == "F" else "16-bit") + (" colour" if values.ndim > 2 else "")
        notes += (f"{kind} values {low:g} to {high:g} stretched to black and white",)
        grey = ((values - low) / max(high - low, 1e-12)).clip(0, 1)
        image = Image.fromarray((255 * grey).round().astype(np.uint8))
    elif image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        if np.asarray(image.getchannel("A")).min() < 255:
            notes += ("transparency dropped",)
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


def finite_values(picture: Picture, path: Path) -> np.ndarray:
    """(H, W), or (H, W, 3 or 4) if colours have 16 bits."""
    values = np.asarray(picture.image)
    if picture.deep:
        with reading(path, "an image of 16 bits"):
            values = _deep_values(picture, path)
    if not np.isfinite(values).all():
        raise UnreadableFile(f"{path.name}: holds NaN or infinite values")
    return values


def _deep_values(picture: Picture, path: Path) -> np.ndarray:
    """(H, W, 3 or 4) uint16, upright; Pillow keeps the upper 8 of 16 bits."""
    if suffix_of(path) in (".tif", ".tiff") and (picture.orientation, picture.pages) != (1, 1):
        from skimage.io import imread  # ITK reads turned TIFF with 8 bits

        stored = imread(path)
        stored = stored[picture.page] if stored.ndim == 4 else stored
    else:
        try:
            import SimpleITK as sitk
        except ImportError:
            raise MissingExtra(f"{path.name} (16 bits for each colour)", "volumes") from None
        stored = sitk.GetArrayFromImage(sitk.ReadImage(path))
    if stored.shape[-1] == 2:  # grey and transparency
        stored = stored[..., [0, 0, 0, 1]]
    channels = [turned(stored[..., i], picture.orientation) for i in range(stored.shape[-1])]
    return np.stack(channels, axis=-1)


def turned(plane: np.ndarray, orientation: int) -> np.ndarray:
    """A plane (H, W) as the EXIF orientation says."""
    image = Image.fromarray(plane)
    image.getexif()[ORIENTATION] = orientation
    return np.asarray(ImageOps.exif_transpose(image))
