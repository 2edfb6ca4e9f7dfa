"""From an image at its own size to the prepared square, and back."""

from __future__ import annotations

import numpy as np
from PIL import Image

from ..config import PrepareConfig

RING = 1 / 32
"""Width of the ring that a lesion's contrast is taken against, in image sides."""

FLAT = 1.0
"""An image whose low frequencies vary less is like nothing."""


def prepare_image(image: np.ndarray, cfg: PrepareConfig) -> np.ndarray:
    """Bring an image to the prepared size and look.

    Parameters
    ----------
    image : (H, W, 3) uint8
    cfg : PrepareConfig
        pixels, fit, colour, clahe and gamma decide.

    Returns
    -------
    (S, S, 3) uint8
        Every pixel is the mean of the area that it covers where the image shrinks, bilinear where it
        grows. Equalization and gamma come after resizing, on the luminance and on all channels.

    Source: the patent's background section names histogram equalization and gamma correction.
    """
    full = Image.fromarray(image)
    if cfg.colour == "grey":
        full = full.convert("L").convert("RGB")
    height, width = image.shape[:2]
    shrinks = max(_scale(height, width, cfg)) <= 1
    small = np.asarray(_resize(full, cfg, Image.Resampling.BOX if shrinks else Image.Resampling.BILINEAR))
    if cfg.clahe:
        small = _equalize(small, cfg.clahe)
    if cfg.gamma != 1:
        small = (255 * (np.arange(256) / 255) ** cfg.gamma).round().astype(np.uint8)[small]
    return small


def prepare_mask(mask: np.ndarray, cfg: PrepareConfig) -> np.ndarray:
    """(H, W) bool -> (S, S) bool: over half covered; every lesion that would vanish keeps its fullest pixel.

    >>> mask = np.zeros((128, 128), bool)
    >>> mask[5, 5] = mask[40:48, 40:48] = True  # 1 px, and 8 x 8 px
    >>> small = prepare_mask(mask, PrepareConfig(pixels=32))
    >>> bool(small[1, 1]), int(small.sum())  # the one, and 2 x 2 px
    (True, 5)
    """
    from scipy.ndimage import label

    share = np.asarray(_resize(Image.fromarray(mask.astype(np.float32)), cfg, Image.Resampling.BOX))
    small = share > 0.5
    lesions, count = label(share > 0, np.ones((3, 3)))
    for lost in set(range(1, count + 1)) - set(lesions[small].tolist()):
        where = lesions == lost
        small |= where & (share >= share[where].max())
    return small


def restore(prepared: np.ndarray, height: int, width: int, cfg: PrepareConfig) -> np.ndarray:
    """(S, S) float32 probability -> (height, width) float32 at the image's own size, padding cut away."""
    left, top, inner_width, inner_height = _box(height, width, cfg)
    inner = prepared[top : top + inner_height, left : left + inner_width]
    if inner.shape == (height, width):
        return inner
    return np.asarray(Image.fromarray(np.ascontiguousarray(inner)).resize((width, height), Image.Resampling.BILINEAR)).clip(0, 1)


def lesion_contrast(image: np.ndarray, mask: np.ndarray) -> float:
    """Mean grey of the lesion minus that of the ring around it, in -1..1; NaN where either is empty.

    image (S, S, 3) uint8, mask (S, S) bool; the ring is `RING` of the side wide.

    >>> mask = np.zeros((64, 64), bool)
    >>> mask[20:40, 20:40] = True
    >>> image = np.where(mask[..., None], 51, 153).astype(np.uint8).repeat(3, axis=2)
    >>> round(lesion_contrast(image, mask), 3)  # darker by 102 of 255
    -0.4
    """
    from scipy.ndimage import uniform_filter

    grey = np.asarray(Image.fromarray(image).convert("L"), dtype=np.float32)
    ring = (uniform_filter(mask.astype(np.float32), 2 * max(2, round(RING * len(mask))) + 1) > 1e-4) & ~mask
    return float(grey[mask].mean() - grey[ring].mean()) / 255 if mask.any() and ring.any() else np.nan


def perceptual_hash(image: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 -> (63,) bool: signs of the low DCT frequencies of the 32 px grey thumbnail; all False for a flat image."""
    from scipy.fft import dctn

    grey = Image.fromarray(image).convert("L")
    grey = grey.reduce((max(1, grey.width // 256), max(1, grey.height // 256))).resize((32, 32), Image.Resampling.BOX)  # in two steps: quicker
    low = dctn(np.asarray(grey, dtype=np.float32), norm="ortho")[:8, :8].ravel()[1:]  # [0] is brightness
    signs: np.ndarray = (low > np.median(low)) & (low.std() > FLAT)
    return signs


def _scale(height: int, width: int, cfg: PrepareConfig) -> tuple[float, float]:
    """Prepared pixels per source pixel, down and across."""
    down, across = cfg.pixels / height, cfg.pixels / width
    return (min(down, across),) * 2 if cfg.fit == "pad" else (down, across)


def _box(height: int, width: int, cfg: PrepareConfig) -> tuple[int, int, int, int]:
    """Where the image lies in the prepared square: left, top, width, height."""
    down, across = _scale(height, width, cfg)
    inner_height, inner_width = max(1, round(height * down)), max(1, round(width * across))
    return (cfg.pixels - inner_width) // 2, (cfg.pixels - inner_height) // 2, inner_width, inner_height


def _resize(image: Image.Image, cfg: PrepareConfig, how: Image.Resampling) -> Image.Image:
    left, top, width, height = _box(image.height, image.width, cfg)
    inner = image.resize((width, height), how)
    if inner.size == (cfg.pixels, cfg.pixels):
        return inner
    square = Image.new(image.mode, (cfg.pixels, cfg.pixels))
    square.paste(inner, (left, top))
    return square


def _equalize(image: np.ndarray, clip: float) -> np.ndarray:
    """Contrast-limited adaptive histogram equalization of the luminance; colours keep their chroma."""
    from skimage.exposure import equalize_adapthist

    bands = Image.fromarray(image).convert("YCbCr").split()
    luminance = Image.fromarray((equalize_adapthist(np.asarray(bands[0]), clip_limit=clip) * 255).round().astype(np.uint8))
    return np.asarray(Image.merge("YCbCr", (luminance, *bands[1:])).convert("RGB"))
