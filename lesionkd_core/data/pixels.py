"""From an image of any size to the prepared square, and back."""

from __future__ import annotations

import numpy as np
from PIL import Image

from ..config import PrepareConfig

RING = 1 / 32
"""Width of the ring around a lesion for its contrast, in image sides."""
THUMBNAIL = 64
FLAT = 1.0
"""Standard deviation of the low frequencies below which an image has no perceptual hash."""
EVEN, BLACK, SHORT = 3.0, 8.0, 32
"""Reported: standard deviation and mean of grey levels, and side of an image, below these."""


def prepare_image(image: np.ndarray, cfg: PrepareConfig) -> np.ndarray:
    """Resize an image to the prepared square.

    (H, W, 3) uint8 -> (S, S, 3) uint8. A pixel is the mean of the area that it covers if the image
    shrinks (Pillow's BOX), bilinear otherwise. With fit = 'pad' the sides are padded with black.
    """
    shrinks = max(_scale(len(image), image.shape[1], cfg)) <= 1
    how = Image.Resampling.BOX if shrinks else Image.Resampling.BILINEAR
    return np.asarray(_resize(Image.fromarray(image), cfg, how))


def prepare_mask(mask: np.ndarray, cfg: PrepareConfig) -> np.ndarray:
    """Resize a mask: a pixel is lesion if more than half of it is covered.

    (H, W) bool -> (S, S) bool. A lesion that would vanish keeps its most covered pixel.

    >>> mask = np.zeros((128, 128), bool)
    >>> mask[5, 5] = mask[40:48, 40:48] = True  # 1 px, and 8 x 8 px
    >>> small = prepare_mask(mask, PrepareConfig(pixels=32))
    >>> bool(small[1, 1]), int(small.sum())  # 1 px, and 2 x 2 px
    (True, 5)
    """
    from skimage.measure import label, regionprops

    covered = _resize(Image.fromarray(mask.astype(np.float32)), cfg, Image.Resampling.BOX)
    fraction = np.asarray(covered)
    small = fraction > 0.5
    for lesion in regionprops(label(fraction > 0, connectivity=2), fraction):
        part = small[lesion.slice]
        if not part[lesion.image].any():
            part |= lesion.image & (fraction[lesion.slice] >= lesion.intensity_max)
    return small


def restore(prepared: np.ndarray, height: int, width: int, cfg: PrepareConfig) -> np.ndarray:
    """(S, S) float32 probability -> (height, width) float32, without the padding."""
    left, top, inner_width, inner_height = _box(height, width, cfg)
    inner = prepared[top : top + inner_height, left : left + inner_width]
    if inner.shape == (height, width):
        return inner
    image = Image.fromarray(np.ascontiguousarray(inner))
    return np.asarray(image.resize((width, height), Image.Resampling.BILINEAR)).clip(0, 1)


def lesion_contrast(image: np.ndarray, mask: np.ndarray) -> float:
    """Mean grey value of the lesion minus that of the ring around it, -1..1; NaN if one is empty.

    image (S, S, 3) uint8, mask (S, S) bool.

    >>> mask = np.zeros((64, 64), bool)
    >>> mask[20:40, 20:40] = True
    >>> image = np.where(mask[..., None], 51, 153).astype(np.uint8).repeat(3, axis=2)
    >>> round(lesion_contrast(image, mask), 3)  # darker by 102 of 255
    -0.4
    """
    from scipy.ndimage import uniform_filter

    grey = np.asarray(Image.fromarray(image).convert("L"), dtype=np.float32)
    reach = 2 * max(2, round(RING * len(mask))) + 1
    ring = (uniform_filter(mask.astype(np.float32), reach) > 1e-4) & ~mask
    if not (mask.any() and ring.any()):
        return np.nan
    return float(grey[mask].mean() - grey[ring].mean()) / 255


def growth_when_filled(mask: np.ndarray) -> float:
    """Area of a mask (H, W) bool with its holes filled, divided by its area; 1 if it is empty.

    Near 1 for a lesion, large for its outline. Large masks are reduced to a side of about 256 px.

    >>> ring = np.zeros((12, 12), bool)
    >>> ring[1:11, 1:11] = True
    >>> ring[2:10, 2:10] = False
    >>> round(growth_when_filled(ring), 2)  # 100 px instead of 36
    2.78
    """
    from scipy.ndimage import binary_fill_holes

    whole = Image.fromarray(mask.astype(np.uint8) * 255)
    small = np.asarray(whole.reduce(max(1, min(mask.shape) // 256))) > 0
    if not small.any():
        return 1.0
    return float(binary_fill_holes(small).sum() / small.sum())


def unseen(image: np.ndarray, prepared: np.ndarray, cure: str = "") -> list[str]:
    """Notes on a picture (H, W, 3) that shows little, as it is or prepared; some with a cure."""
    height, width = image.shape[:2]
    pixels = prepared.reshape(-1, 3)
    mean = pixels.mean(0)
    found = []
    if min(height, width) < SHORT:
        found.append(f"{width} x {height} px: a side is shorter than {SHORT} px")
    if pixels.std(0).max() < EVEN:
        found.append(f"nearly flat: all grey levels are near {mean.mean():.0f} of 255{cure}")
    elif mean.max() < BLACK:
        found.append(f"nearly black: the mean grey level is {mean.max():.1f} of 255{cure}")
    return found


def thumbnail(image: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 -> (64, 64) uint8: a grey copy in which near-duplicates are searched."""
    grey = Image.fromarray(image).convert("L")
    grey = grey.reduce((max(1, grey.width // 256), max(1, grey.height // 256)))  # for speed
    return np.asarray(grey.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX))


def hash_thumbnails(thumbnails: np.ndarray) -> np.ndarray:
    """Perceptual hashes: signs of the low DCT frequencies of thumbnails, to find near-duplicates.

    (N, 64, 64) uint8 -> (N, 63) bool; all False for a flat image. Source: pHash (Zauner 2010).
    """
    from scipy.fft import dctn

    small = thumbnails.reshape(-1, 32, THUMBNAIL // 32, 32, THUMBNAIL // 32).mean((2, 4))
    low = dctn(small, axes=(1, 2), norm="ortho")[:, :8, :8].reshape(-1, 64)[:, 1:]
    signs: np.ndarray = (low > np.median(low, axis=1, keepdims=True)) & (
        low.std(1, keepdims=True) > FLAT
    )
    return signs


def _scale(height: int, width: int, cfg: PrepareConfig) -> tuple[float, float]:
    """Prepared pixels for each source pixel, down and across."""
    down, across = cfg.pixels / height, cfg.pixels / width
    return (min(down, across),) * 2 if cfg.fit == "pad" else (down, across)


def _box(height: int, width: int, cfg: PrepareConfig) -> tuple[int, int, int, int]:
    """Left, top, width and height of the image in the prepared square."""
    down, across = _scale(height, width, cfg)
    inner_height, inner_width = max(1, round(height * down)), max(1, round(width * across))
    left, top = (cfg.pixels - inner_width) // 2, (cfg.pixels - inner_height) // 2
    return left, top, inner_width, inner_height


def _resize(image: Image.Image, cfg: PrepareConfig, how: Image.Resampling) -> Image.Image:
    left, top, width, height = _box(image.height, image.width, cfg)
    inner = image.resize((width, height), how)
    if inner.size == (cfg.pixels, cfg.pixels):
        return inner
    square = Image.new(image.mode, (cfg.pixels, cfg.pixels))
    square.paste(inner, (left, top))
    return square
