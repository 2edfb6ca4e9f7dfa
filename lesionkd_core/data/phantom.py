"""Phantom cases: synthetic lesion images with an exact mask, drawn in place of downloaded.

A case is a function of (look, seed, index) alone; pixel size and difficulty change how it
is rendered, never where the lesion lies. In each look a rule tells lesions from distractors:

- dermoscopy: a lesion is brown *and* carries a pigment network; freckles are tiny, stains
  have no network, shade has no colour and no border, ink is blue.
- ultrasound: a lesion is darker than the tissue around it *and* still echoes; vessels and
  cysts are black, shadows follow the beam down, fat lobules have a bright capsule.
- ct: a lesion is a haze that vessels shine through; nodules, consolidations, vessels and
  fissures are solid, the haze of the dependent lung has no border.
"""

import numpy as np
from numpy.random import Generator

from .phantom_ct import ct
from .phantom_texture import (
    border_of,
    capsules,
    cover,
    field,
    from_to,
    grid,
    lesion_border,
    lesion_outlines,
    profile,
    random_outline,
    rayleigh,
    ridges,
    scattered_discs,
    shown_of,
    strokes,
)

LOOKS = ("phantom-dermoscopy", "phantom-ultrasound", "phantom-ct")
VERSION = 1  # raise when a case comes out differently

# absorption in red, green, blue
SPECTRA = np.array([
    [0.50, 0.95, 1.35],  # melanin
    [0.08, 0.75, 0.60],  # blood
    [1.00, 1.00, 1.00],  # shade
    [1.20, 0.85, 0.25],  # ink
], np.float32)


def draw(look: str, seed: int, index: int, pixels: int = 128, difficulty: float = 0.5) -> tuple[np.ndarray, np.ndarray]:
    """Draw one phantom case.

    Parameters
    ----------
    look : str
        One of `LOOKS`.
    seed, index : int
        Name the case within the look; at least 0.
    pixels : int
        Side of the image, at least 16. The scene is the same at every size.
    difficulty : float
        0 (easy) to 1 (very hard): less contrast, softer borders, more distractors and noise.

    Returns
    -------
    image : (pixels, pixels, 3) uint8
    mask : (pixels, pixels) bool
        Where the border function of the lesions is negative; all False in about 8 % of cases.

    Raises
    ------
    ValueError
        If an argument is outside its range.
    """
    _check(look, seed, index, pixels, difficulty)
    case = np.random.default_rng([seed, LOOKS.index(look), index])
    outlines, scene, noise = case.spawn(3)
    image, border = PAINTERS[look](outlines, scene, noise, pixels, difficulty)
    if image.ndim == 2:
        image = np.repeat(image[..., None], 3, axis=2)
    return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8), border < 0


def _check(look: str, seed: int, index: int, pixels: int, difficulty: float) -> None:
    if look not in LOOKS:
        raise ValueError(f"look is {look!r}; choose one of {', '.join(LOOKS)}.")
    for name, value, least in (("seed", seed, 0), ("index", index, 0), ("pixels", pixels, 16)):
        if not isinstance(value, (int, np.integer)) or value < least:
            raise ValueError(f"{name} is {value!r}; give a whole number of at least {least}.")
    if not 0 <= difficulty <= 1:
        raise ValueError(f"difficulty is {difficulty!r}; give a number from 0 (easy) to 1 (hard).")


# --- dermoscopy ---------------------------------------------------------------------------


def dermoscopy(outlines: Generator, scene: Generator, noise: Generator, pixels: int, difficulty: float) -> tuple[np.ndarray, np.ndarray]:
    """Skin by Beer-Lambert: image = exp(-sum over pigments of amount x spectrum).

    Returns the image (pixels, pixels, 3) in [0, 1] and the border function (pixels, pixels).
    """
    x, y = grid(pixels)
    border = lesion_border(lesion_outlines(outlines, spread=0.8, decay=(1.0, 2.4)), x, y)
    amounts = np.empty((len(SPECTRA), pixels, pixels), np.float32)
    amounts[0] = _melanin(border, scene, pixels, difficulty)
    amounts[1] = _blood(border, scene, pixels)
    amounts[2] = _shade(scene, pixels, difficulty)
    amounts[3] = _ink(scene, pixels, difficulty)
    _add_stain(amounts, scene, pixels, difficulty)
    _add_hairs(amounts, scene, pixels, difficulty)
    absorbed = np.tensordot(amounts, SPECTRA, axes=(0, 0))
    grain = noise.standard_normal((pixels, pixels, 3), dtype=np.float32)
    return np.exp(-absorbed) + np.float32(from_to(0.01, 0.04, difficulty)) * grain, border


def _melanin(border: np.ndarray, rng: Generator, pixels: int, difficulty: float) -> np.ndarray:
    skin = rng.uniform(0.08, 0.5) * (1 + 0.15 * field(rng, pixels, 5))
    lines = 0.05 * ridges(rng, pixels, 32) + 0.03 * field(rng, pixels, 64)
    depth = from_to(1.1, 0.4, difficulty) * rng.uniform(0.7, 1.4)
    width = from_to(0.006, 0.022, difficulty) * rng.uniform(0.5, 1.5)
    blotch = np.clip(1 + 0.4 * field(rng, pixels, 6), 0.45, 2)
    network = ridges(rng, pixels, int(rng.choice([24, 30, 36])))
    lesion = depth * cover(border, width) * blotch * (0.65 + 0.9 * network)
    ends, radii = scattered_discs(rng, 14, 0.006, 0.02)
    shown = shown_of(rng, 14, difficulty)
    freckles = capsules(ends[:shown], radii[:shown], pixels)
    return skin + lines + lesion + 0.35 * freckles


def _blood(border: np.ndarray, rng: Generator, pixels: int) -> np.ndarray:
    skin = rng.uniform(0.2, 0.45) * (1 + 0.2 * field(rng, pixels, 4))
    return skin + rng.uniform(0, 0.25) * cover(border - 0.02, 0.03)


def _add_stain(amounts: np.ndarray, rng: Generator, pixels: int, difficulty: float) -> None:
    """A red to brown patch as large as a lesion, told from it by its lack of a network."""
    middle = rng.uniform(-0.42, 0.42, 2)
    stain = random_outline(rng, rng.uniform(0.02, 0.1), middle, decay=(1.5, 3))
    patch = cover(border_of(stain, *grid(pixels)), rng.uniform(0.01, 0.03))
    brown, depth = rng.uniform(0, 1) ** 2, rng.uniform(0.15, 0.6) * from_to(0.3, 1.2, difficulty)
    amounts[0] += brown * depth * patch
    amounts[1] += (1 - brown) * depth * patch


def _shade(rng: Generator, pixels: int, difficulty: float) -> np.ndarray:
    """Uneven light, dark corners, diffuse shadow and, as negative shade, bubbles."""
    x, y = grid(pixels)
    uneven = from_to(0.04, 0.16, difficulty)
    tilt = uneven * 3 * rng.standard_normal(2)
    light = 0.12 + np.float32(tilt[0]) * x + np.float32(tilt[1]) * y
    light = light + uneven * field(rng, pixels, 3)
    radius, edge = rng.uniform(0.5, 0.75), rng.uniform(0.01, 0.07)
    center = rng.uniform(-0.06, 0.06, 2).astype(np.float32)
    corners = cover(radius - np.hypot(x - center[0], y - center[1]), edge)
    dark = rng.uniform(0.3, 2.2) * (rng.uniform() < from_to(0.1, 0.8, difficulty))
    shadow = rng.uniform(-0.5, 0.5, 2).astype(np.float32)
    diffuse = np.exp(-((x - shadow[0]) ** 2 + (y - shadow[1]) ** 2) / 0.05)
    ends, radii = scattered_discs(rng, 5, 0.008, 0.035)
    shown = shown_of(rng, 5, difficulty)
    bubbles = capsules(ends[:shown], radii[:shown], pixels, rim=True)
    strength = rng.uniform(0, 0.5) * from_to(0.3, 1, difficulty)
    shade: np.ndarray = light + dark * corners + strength * diffuse - 0.15 * bubbles
    return shade


def _ink(rng: Generator, pixels: int, difficulty: float) -> np.ndarray | float:
    """A pen mark near a side of the image, in a share of the cases that difficulty sets."""
    side, height, angle = rng.choice([-1, 1]) * 0.42, *rng.uniform(-0.4, 0.4, 2)
    run = rng.uniform(0.04, 0.12) * np.array([np.sin(angle), np.cos(angle)])
    mark = np.array([side, height, *(np.array([side, height]) + run)])
    mark = mark if rng.uniform() < 0.5 else mark[[1, 0, 3, 2]]
    radius, chance = rng.uniform(0.01, 0.025), rng.uniform()
    if chance > from_to(0.1, 0.4, difficulty):
        return 0
    return 1.1 * capsules(mark[None], np.array([radius]), pixels, soft=0.006)


def _add_hairs(amounts: np.ndarray, rng: Generator, pixels: int, difficulty: float) -> None:
    hairs = rng.uniform([-0.5, -0.5, -0.6, -1.2, 0.1, 0.002], [0.5, 0.5, 0.6, 1.2, 0.6, 0.0045], (14, 6))
    hairs[:, 2] += rng.uniform(0, np.pi)  # hairs lie in about one direction
    lines = strokes(hairs[: shown_of(rng, 14, difficulty)], *grid(pixels))
    darkness = rng.uniform(0.3, 1.2)
    amounts[0] += darkness * lines
    amounts[2] += 0.5 * darkness * lines


# --- ultrasound ---------------------------------------------------------------------------


def ultrasound(outlines: Generator, scene: Generator, noise: Generator, pixels: int, difficulty: float) -> tuple[np.ndarray, np.ndarray]:
    """B-mode: log-compressed grey = gain + echogenicity + log of Rayleigh speckle.

    Returns the image (pixels, pixels) in [0, 1] and the border function (pixels, pixels).
    """
    x, y = grid(pixels)
    border = lesion_border(lesion_outlines(outlines, spread=0.9), x, y)
    echo = _tissue(scene, pixels)
    echo = _with_lesion(echo, border, scene, pixels, difficulty)
    echo = _with_decoys(echo, scene, pixels, difficulty)
    slope = scene.uniform(-0.5, 0.15) * from_to(0.4, 1, difficulty)
    gain = scene.uniform(0.5, 0.62) + np.float32(slope) * y + 0.04 * field(scene, pixels, 3)
    speckle = from_to(0.09, 0.2, difficulty) * np.log(rayleigh(noise, pixels) + 0.2)
    return gain + echo + speckle, border


def _tissue(rng: Generator, pixels: int) -> np.ndarray:
    """Skin, fat with septa, gland and muscle, one below the other with wavy interfaces."""
    _, y = grid(pixels)
    depths = np.array([-0.45, rng.uniform(-0.34, -0.2), rng.uniform(0.2, 0.36)])
    skin, fat, gland = (
        y - np.float32(depth) - wave * profile(rng, pixels, 4) for depth, wave in zip(depths, (0.006, 0.025, 0.025), strict=True)
    )
    lobes = 0.05 * field(rng, pixels, 14, 8)
    septa = 0.14 * ridges(rng, pixels, 6) * cover(fat, 0.01)
    fibres = 0.07 * field(rng, pixels, 44, 4) * cover(-gland, 0.02)
    fascia = 0.15 * np.exp(-((gland / 0.012) ** 2))
    steps = 0.22 * cover(skin, 0.006) - 0.13 * cover(fat, 0.015) - 0.1 * cover(-gland, 0.015)
    tissue: np.ndarray = steps + lobes + septa + fibres + fascia
    return tissue


def _with_lesion(echo: np.ndarray, border: np.ndarray, rng: Generator, pixels: int, difficulty: float) -> np.ndarray:
    """Hypoechoic lesion with a bright rim, and a shadow or enhancement behind it."""
    width = from_to(0.006, 0.02, difficulty) * rng.uniform(0.6, 1.4)
    inside = cover(border, width)
    drop = from_to(0.42, 0.18, difficulty) * rng.uniform(0.85, 1.25)
    within = -drop * (1 + 0.2 * field(rng, pixels, 8))
    halo = rng.uniform(0, 0.14) * np.exp(-(((border - 0.02) / 0.02) ** 2))
    path = np.cumsum(inside, axis=0) / pixels  # lesion crossed by the beam so far
    behind = rng.uniform(-0.7, 0.7) * path * (1 - inside)
    flattened = echo * (1 - 0.8 * inside)  # layers end at the lesion
    changed: np.ndarray = flattened + inside * within + halo + behind
    return changed


def _with_decoys(echo: np.ndarray, rng: Generator, pixels: int, difficulty: float) -> np.ndarray:
    x, y = grid(pixels)
    ends, radii = scattered_discs(rng, 4, 0.012, 0.035)
    ends[:, 2:] += rng.uniform([-0.08, -0.02], [0.08, 0.02], (4, 2))  # vessels run across
    shown = shown_of(rng, 4, difficulty)
    vessels = capsules(ends[:shown], radii[:shown], pixels, soft=0.007)
    bright = 0.9 * np.cumsum(vessels, axis=0) / pixels * (1 - vessels)  # fluid hardly absorbs
    lobule = random_outline(rng, rng.uniform(0.01, 0.06), rng.uniform(-0.4, 0.4, 2), (0.03, 0.08))
    capsule = border_of(lobule, x, y)
    fat = -0.05 * cover(capsule, 0.008) + 0.2 * np.exp(-((capsule / 0.012) ** 2))
    fat = fat * (rng.uniform() < from_to(0.3, 0.8, difficulty))
    starts, places = rng.uniform(-0.4, 0.3, 3), rng.uniform(-0.5, 0.5, 3)
    depths, widths = rng.uniform(0.08, 0.28, 3), rng.uniform(0.03, 0.1, 3)
    ray = x / (1 + np.float32(0.3) * y)  # beams of a curved probe fan out
    shadows = np.zeros_like(x)
    for k in range(shown_of(rng, 3, difficulty)):
        across = np.exp(-(((ray - np.float32(places[k])) / np.float32(widths[k])) ** 2))
        shadows += np.float32(depths[k]) * across * cover(np.float32(starts[k]) - y, 0.03)
    changed: np.ndarray = echo - 0.5 * vessels + bright + fat - shadows
    return changed


PAINTERS = dict(zip(LOOKS, (dermoscopy, ultrasound, ct), strict=True))
