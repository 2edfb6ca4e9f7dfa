"""Which pixels of a mask are lesion: the rule on generated masks, and what the report says.

`python -m tests.test_masks 300` prints the table of docs/data.md.
"""

import io
import sys
from functools import partial

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import binary_dilation, binary_erosion, gaussian_filter
from scipy.spatial import cKDTree

from lesionkd_core.data.images import Case, decide_mask

TYPES = {"1": bool, "8": np.uint8, "16": np.uint16, "32": np.int32, "float": np.float32}
TOPS = {"8": 255, "16": 65535, "32": 10**6, "float": 1000}


# Generated masks: each function returns pixels, whether they are lossy, and the lesion ------------


def blob(rng, height, width, smallest, largest):
    """A wavy ellipse, (height, width) bool."""
    radius = np.exp(rng.uniform(np.log(smallest), np.log(largest)))
    centre, mask = rng.uniform(0, (height, width)), np.zeros((height, width), bool)
    start = np.maximum(centre - 1.2 * radius, 0).astype(int)
    part = mask[tuple(slice(a, int(c + 1.2 * radius) + 1) for a, c in zip(start, centre))]
    y, x = np.indices(part.shape) + (start - centre)[:, None, None]
    turn, flat = rng.uniform(0, np.pi), rng.uniform(0.5, 1)
    along, across = x * np.cos(turn) + y * np.sin(turn), y * np.cos(turn) - x * np.sin(turn)
    wave = 1 + 0.15 * np.sin(rng.integers(2, 6) * np.arctan2(across, along))
    part[:] = np.hypot(along, across / flat) < radius * wave
    return mask


def drawn(rng, scale=1, lowest=64, highest=400):
    """One to three lesions."""
    while True:
        height, width = rng.integers(lowest, highest, 2) * scale
        size = 3 * scale, 0.45 * min(height, width)
        mask = np.any([blob(rng, height, width, *size) for _ in range(rng.integers(1, 4))], axis=0)
        if 9 * scale**2 <= mask.sum() < 0.9 * mask.size:
            return mask


def two_values(rng, kind):
    mask = drawn(rng)
    if kind == "1":
        return mask, False, mask
    top = rng.choice([1, 255, rng.integers(2, TOPS[kind])])
    low = rng.integers(1, top) if top > 1 and rng.random() < 0.2 else 0
    return np.where(mask, top, low).astype(TYPES[kind]), False, mask


def labels(rng, kind, count):
    """Disks, or cells that touch; numbered, spread over the range, or with numbers at random."""
    height, width = rng.integers(128, 400, 2) if count < 50 else rng.integers(256, 600, 2)
    if count < 5 or rng.random() < 0.5:
        found = np.zeros((height, width), int)
        for number in range(1, count + 1):
            found[blob(rng, height, width, 4, max(6, (height * width / count) ** 0.5 / 2))] = number
    else:
        y, x = np.mgrid[:height, :width]
        seeds = rng.uniform(0, [height, width], (count, 2))
        found = cKDTree(seeds).query(np.stack([y, x], axis=-1))[1] + 1
        found[gaussian_filter(rng.random(found.shape), 12) < 0.5] = 0
    _, found = np.unique(np.append(found, 0), return_inverse=True)
    found, n = found[:-1].reshape(height, width), found.max()
    numbers = np.arange(n + 1)
    if (how := rng.integers(3)) == 1:
        numbers = np.linspace(0, 255, n + 1).round()
    elif how == 2 and n < TOPS[kind] // 2:
        numbers[1:] = rng.choice(np.arange(1, min(TOPS[kind], 3000)), n, replace=False)
    if n < 2:
        return labels(rng, kind, count)
    scaled = rng.choice([1, 0.996, 1.0004]) if kind == "float" and numbers[-1] < 10 else 1
    return (numbers[found] * scaled).astype(TYPES[kind]), False, found > 0


def ignore_ring(rng, kind):
    """Classes of 1 to 3 in a ring of 255 (or 65535) that means: leave this out."""
    mask = drawn(rng)
    ring = binary_dilation(mask, iterations=rng.integers(1, 6)) & ~binary_erosion(mask)
    core, classes = mask & ~ring, rng.integers(1, 4)
    pixels = np.where(core, 1 + np.arange(mask.shape[1]) * classes // mask.shape[1], 0)
    pixels[ring] = 65535 if kind == "16" and rng.random() < 0.5 else 255
    return pixels.astype(TYPES[kind]), False, core


def soft_border(rng, kind):
    how, resampling = rng.integers(6), Image.Resampling
    if how < 2:  # drawn larger, then reduced
        factor = int(rng.integers(2, 5))
        image = Image.fromarray(drawn(rng, factor, 64, 200).astype(np.float32))
        size = image.width // factor, image.height // factor
        share = np.asarray(image.resize(size, (resampling.BOX, resampling.BILINEAR)[how]))
    elif how < 4:  # resized
        image = Image.fromarray(drawn(rng).astype(np.uint8) * 255)
        size = [int(side * rng.uniform(0.5, 3)) for side in image.size]
        share = np.asarray(image.resize(size, (resampling.BICUBIC, resampling.BILINEAR)[how - 2]))
        share = share / 255
    elif how == 4:  # reduced, then enlarged without interpolation
        share = np.asarray(Image.fromarray(drawn(rng, 2, 64, 150).astype(np.uint8) * 255).reduce(2))
        times = rng.integers(2, 5)
        share = share.repeat(times, 0).repeat(times, 1) / 255
    else:
        share = gaussian_filter(drawn(rng).astype(np.float32), rng.uniform(0.4, 3))
    top = 1 if kind == "float" else rng.choice([TOPS[kind], 200])
    pixels = share * top if kind == "float" else np.rint(share * top)
    return pixels.astype(TYPES[kind]), False, share


def jpeg(pixels, quality):
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "JPEG", quality=int(quality))
    return np.asarray(Image.open(content))


def of_jpeg(rng, lossy):
    mask = drawn(rng)
    return jpeg(mask.astype(np.uint8) * 255, rng.integers(60, 96)), lossy, mask


def with_noise(rng):
    mask = drawn(rng)
    noise = rng.normal(0, np.exp(rng.uniform(0, 4)), mask.shape)
    return (mask * 255 + noise).clip(0, 255).astype(np.uint8), False, mask


def photograph(rng):
    """Ultrasound, skin or a smooth picture; some compressed, some of 16 bits."""
    height, width = rng.integers(64, 400, 2)
    waves = sum(gaussian_filter(rng.normal(size=(height, width)), s) * s for s in (1, 3, 8, 20))
    grey = 120 + 60 * waves / waves.std() * rng.uniform(0.3, 1)
    if rng.random() < 0.3:
        grey *= gaussian_filter(rng.random((height, width)), 30) > 0.5  # black surroundings
    grey = grey.clip(0, 255).astype(np.uint8)
    how = rng.integers(4)
    grey = jpeg(grey, rng.integers(30, 96)) if how in (1, 2) else grey
    return grey.astype(np.uint16) * 256 if how == 3 else grey, how == 1, None


def noise(rng):
    shape = rng.integers(64, 400, 2)
    pixels = rng.normal(0, 300, shape).astype(np.int32)
    return (pixels if rng.random() < 0.5 else (pixels % 256).astype(np.uint8)), False, None


KINDS = {
    **{f"two values, {kind}": partial(two_values, kind=kind) for kind in TYPES},
    **{f"{n} labels, {k}": partial(labels, kind=k, count=n) for n in (3, 40, 200) for k in TOPS},
    **{f"ignore ring, {kind}": partial(ignore_ring, kind=kind) for kind in TOPS},
    **{f"soft border, {kind}": partial(soft_border, kind=kind) for kind in TOPS},
    "JPEG, quality 60 to 95": partial(of_jpeg, lossy=True),
    "JPEG saved as PNG": partial(of_jpeg, lossy=False),
    "noise on black and white": with_noise,
    "photograph": photograph,
    "noise alone": noise,
}


def judged(name, *seed) -> str:
    """What the rule makes of one generated mask: right, wrong or refused."""
    pixels, lossy, truth = KINDS[name](np.random.default_rng([list(KINDS).index(name), *seed]))
    full = 255 if pixels.dtype == np.uint8 else 1
    try:
        select, _ = decide_mask([pixels], Case("", None, ()), full, lossy)
    except ValueError:
        return "refused"
    if truth is None:
        return "wrong"
    found, certain = (
        select(pixels),
        np.abs(truth.astype(float) - 0.5) > 0.02,
    )  # half covered: either
    if name.startswith(("JPEG", "noise on")):  # compression and noise change pixels at the border
        around = np.ones((3, 3))
        certain = ~binary_dilation(truth, around) | binary_erosion(truth, around, border_value=1)
    return "wrong" if ((found != (truth > 0.5)) & certain).any() else "right"


def table(count: int):
    """Fractions wrong and refused of `count` masks of each kind."""
    import pandas as pd

    rows = []
    for name in KINDS:
        found = [judged(name, seed, 7) for seed in range(count)]
        rows.append((name, count, found.count("wrong") / count, found.count("refused") / count))
    return pd.DataFrame(rows, columns=["kind", "masks", "wrong", "refused"])


ALWAYS_REFUSED = ("ignore", "photograph", "noise alone")


@pytest.mark.parametrize("name", KINDS)
def test_generated_masks_are_read_right_or_refused(name):
    found = [judged(name, seed, 1) for seed in range(8)]
    assert "wrong" not in found
    refused = found.count("refused")
    doubtful = name.startswith(("3 labels", "soft", "noise on"))
    assert refused == 8 if name.startswith(ALWAYS_REFUSED) else refused <= 4 * doubtful


if __name__ == "__main__":
    print(table(int(sys.argv[1])).to_markdown(index=False, floatfmt=".1%"))
