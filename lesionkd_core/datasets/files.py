"""Reading image and mask files as people really have them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ..config import LesionKDError

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"})


class UnreadableFile(LesionKDError):
    """A file is missing, broken or not what its name says."""


@dataclass(frozen=True)
class Case:
    """One row a case: id, group, image, mask (DESIGN.md, way of the data).

    `group` is what must stay together in a split (video, patient); empty where the release does
    not say. Several `masks` mean several lesions: their union counts.
    """

    id: str
    image: Path
    masks: tuple[Path, ...]
    group: str = ""
    label: str = ""
    one_mask: bool = False  # a layout in which two masks of one name are a mistake, not two lesions


def images_in(folder: Path) -> list[Path]:
    """Image files of a folder in natural order of their names; hidden files are passed over."""
    found = (p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith("."))
    return sorted(found, key=_natural)


def _natural(path: Path) -> list:
    parts = re.split(r"([0-9]+)", path.stem)  # text and numbers take turns, so parts of two names compare
    return [int(part) if i % 2 else part for i, part in enumerate(parts)] + [path.name]


def by_stem(paths: Iterable[Path]) -> dict[str, list[Path]]:
    """Files of equal stem together: {'a': [a.png, a.jpg]}."""
    found: dict[str, list[Path]] = {}
    for path in paths:
        found.setdefault(path.stem, []).append(path)
    return found


def _open(path: Path) -> Image.Image:
    try:
        image = Image.open(path)
        image.load()
        return ImageOps.exif_transpose(image)
    except FileNotFoundError:
        raise UnreadableFile(f"{path.name}: file is missing") from None
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        why = "" if isinstance(error, UnidentifiedImageError) else f" ({error})"
        raise UnreadableFile(f"{path.name}: cannot be read as an image{why}") from None


def read_image(path: Path) -> np.ndarray:
    """(H, W, 3) uint8 from any mode: grey is repeated, alpha dropped, 16 bits scaled by their range."""
    image = _open(path)
    if image.mode in ("I", "I;16", "I;16B", "I;16L", "F"):
        values = np.asarray(image, dtype=np.float64)
        low, high = values.min(), values.max()
        image = Image.fromarray(((values - low) * (255 / max(high - low, 1e-12))).round().astype(np.uint8))
    elif image.mode in ("P", "LA", "PA"):
        image = image.convert("RGBA")
    return np.asarray(image.convert("RGB"))


def read_mask(path: Path) -> np.ndarray:
    """(H, W) bool: a pixel is lesion over half of the scale.

    The scale is 255 for grey and RGB masks (JPEG noise in an empty mask stays below), the file's own
    largest value for 0/1, palette, 16-bit and float masks, which have no scale that one could know.
    """
    image = _open(path)
    palette = image.mode in ("P", "PA")
    if palette or image.mode in ("RGBA", "LA"):
        image = image.convert("RGBA").convert("RGB")  # alpha says nothing about the lesion
    if image.mode not in ("1", "L", "RGB", "I", "I;16", "I;16B", "I;16L", "F"):
        image = image.convert("RGB")
    values = np.asarray(image)
    values = values.max(-1) if values.ndim == 3 else values  # a red mask is a mask too
    if values.dtype == bool:
        return values
    top = values.max(initial=0)
    known_scale = values.dtype == np.uint8 and not palette and top > 1
    return values > (127 if known_scale else top / 2)


def read_case(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Image (H, W, 3) uint8 and the union of its masks (H, W) bool; both sizes agree."""
    image = read_image(case.image)
    union = np.zeros(image.shape[:2], dtype=bool)
    if not case.masks:
        raise UnreadableFile(f"{case.image.name}: no mask belongs to this image")
    if case.one_mask and len(case.masks) > 1:
        raise UnreadableFile(f"{case.image.name}: {', '.join(path.name for path in case.masks)} are masks of one name; keep one")
    for path in case.masks:
        mask = read_mask(path)
        if mask.shape != union.shape:
            raise UnreadableFile(
                f"{path.name}: mask is {mask.shape[1]} x {mask.shape[0]} px, its image {union.shape[1]} x {union.shape[0]} px"
            )
        union |= mask
    return image, union
