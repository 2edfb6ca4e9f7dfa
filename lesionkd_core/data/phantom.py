"""Phantom: drawn dermoscopy images with an exact mask, to run everything without a download.

A lesion is brown and has a pigment network. The distractors have not both: stains have no network,
freckles are tiny, shade has no colour, ink is blue, hairs are thin. A case is a function of its
seed and index; the number of pixels changes how it is rendered, not where the lesion is.

Coordinates are in image widths from the centre. A shape is a signed distance to its border,
negative inside.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.random import Generator

NAME = "phantom"
VERSION = 2  # increase when a case is drawn differently
CASES = 1000

# absorption in red, green and blue
PIGMENTS = np.array(
    [
        [0.50, 0.95, 1.35],  # melanin
        [0.08, 0.75, 0.60],  # blood
        [1.00, 1.00, 1.00],  # shade
        [1.20, 0.85, 0.25],  # ink
    ],
    np.float32,
)
ANGLES = 1024  # points of an outline
HARMONICS = np.arange(2, 17)  # order 1 would only move the centre


def draw(seed: int, index: int, pixels: int = 128) -> tuple[np.ndarray, np.ndarray]:
    """Draw one case.

    Parameters
    ----------
    seed, index : int
        Identify the case; at least 0.
    pixels : int
        Side of the image, at least 16.

    Returns
    -------
    image : (pixels, pixels, 3) uint8
    mask : (pixels, pixels) bool
        Empty in about 8 % of the cases.
    """
    shapes, scene, noise = np.random.default_rng([seed, index]).spawn(3)
    x, y = grid(pixels)
    outlines = lesion_outlines(shapes)
    border = np.minimum.reduce([border_of(o, x, y) for o in outlines] or [np.ones_like(x)])
    melanin, blood = _melanin(border, scene, pixels), _blood(border, scene, pixels)
    amounts = np.stack([melanin, blood, _shade(scene, pixels), _ink(scene, pixels)])
    _add_stain(amounts, scene, pixels)
    _add_hairs(amounts, scene, pixels)
    absorbed = np.tensordot(amounts, PIGMENTS, axes=(0, 0))  # Beer-Lambert law
    grain = noise.standard_normal((pixels, pixels, 3), dtype=np.float32)
    image = np.exp(-absorbed) + np.float32(0.025) * grain
    return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8), border < 0


# What a scene consists of, each as an amount of pigment ------------------------------------------


def _melanin(border: np.ndarray, rng: Generator, pixels: int) -> np.ndarray:
    skin = rng.uniform(0.08, 0.5) * (1 + 0.15 * field(rng, pixels, 5))
    lines = 0.05 * ridges(rng, pixels, 32) + 0.03 * field(rng, pixels, 64)
    depth, width = 0.75 * rng.uniform(0.7, 1.4), 0.014 * rng.uniform(0.5, 1.5)
    blotches = np.clip(1 + 0.4 * field(rng, pixels, 6), 0.45, 2)
    network = ridges(rng, pixels, int(rng.choice([24, 30, 36])))
    lesion = depth * coverage(border, width) * blotches * (0.65 + 0.9 * network)
    freckles = discs(rng.uniform(-0.48, 0.48, (5, 2)), rng.uniform(0.006, 0.02, 5), pixels)
    amount: np.ndarray = skin + lines + lesion + 0.35 * freckles
    return amount


def _blood(border: np.ndarray, rng: Generator, pixels: int) -> np.ndarray:
    skin = rng.uniform(0.2, 0.45) * (1 + 0.2 * field(rng, pixels, 4))
    amount: np.ndarray = skin + rng.uniform(0, 0.25) * coverage(border - 0.02, 0.03)
    return amount


def _shade(rng: Generator, pixels: int) -> np.ndarray:
    """Uneven light, dark corners and a soft shadow."""
    x, y = grid(pixels)
    tilt = 0.3 * rng.standard_normal(2).astype(np.float32)
    light = 0.12 + tilt[0] * x + tilt[1] * y + 0.1 * field(rng, pixels, 3)
    radius, soft = rng.uniform(0.5, 0.75), rng.uniform(0.01, 0.07)
    dark = rng.uniform(0.3, 2.2) * (rng.uniform() < 0.45)
    corners = coverage(radius - np.hypot(x, y), soft)
    at = rng.uniform(-0.5, 0.5, 2).astype(np.float32)
    shadow = np.exp(-((x - at[0]) ** 2 + (y - at[1]) ** 2) / 0.05)
    amount: np.ndarray = light + dark * corners + rng.uniform(0, 0.3) * shadow
    return amount


def _ink(rng: Generator, pixels: int) -> np.ndarray:
    """A pen mark near the left or right side, in a quarter of the cases."""
    x, y = grid(pixels)
    across, down = rng.choice([-0.42, 0.42]), rng.uniform(-0.4, 0.4)
    length, half_width = rng.uniform(0.04, 0.12), rng.uniform(0.01, 0.025)
    shown = rng.uniform() < 0.25
    past_the_end = np.clip(np.abs(y - np.float32(down)) - length, 0, None)
    distance = np.hypot(x - np.float32(across), past_the_end) - half_width
    return 1.1 * shown * coverage(distance, 0.006)


def _add_stain(amounts: np.ndarray, rng: Generator, pixels: int) -> None:
    """A red to brown patch as large as a lesion, without a pigment network."""
    outline = random_outline(rng, rng.uniform(0.02, 0.1), rng.uniform(-0.42, 0.42, 2))
    patch = coverage(border_of(outline, *grid(pixels)), rng.uniform(0.01, 0.03))
    brown, depth = rng.uniform(0, 1) ** 2, rng.uniform(0.1, 0.45)
    amounts[0] += brown * depth * patch
    amounts[1] += (1 - brown) * depth * patch


def _add_hairs(amounts: np.ndarray, rng: Generator, pixels: int) -> None:
    """Thin curved lines in about one direction."""
    x, y = grid(pixels)
    direction, darkness = rng.uniform(0, np.pi), rng.uniform(0.3, 1.2)
    for _ in range(int(rng.integers(1, 9))):
        foot_x, foot_y, turn, bend, half, width = rng.uniform(
            [-0.5, -0.5, -0.6, -1.2, 0.1, 0.002], [0.5, 0.5, 0.6, 1.2, 0.6, 0.0045]
        ).astype(np.float32)
        cos, sin = np.float32(np.cos(direction + turn)), np.float32(np.sin(direction + turn))
        along = cos * (x - foot_x) + sin * (y - foot_y)
        aside = cos * (y - foot_y) - sin * (x - foot_x) - bend * along**2
        wide = max(width, np.float32(0.6 / pixels))  # thinner than a pixel: fainter, not broken
        line = np.exp(-((aside / wide) ** 2) - (along / half) ** 8) * (width / wide)
        amounts[0] += darkness * line
        amounts[2] += 0.5 * darkness * line


# Shapes and textures ------------------------------------------------------------------------------


class Outline(NamedTuple):
    """Star-shaped outline: a Fourier series of the log-radius, stretched and rotated."""

    center: np.ndarray  # (2,) x, y
    stretch: float  # square root of long axis / short axis
    tilt: float  # angle of the long axis, rad
    radius: np.ndarray  # (ANGLES,) before the stretch


def lesion_outlines(rng: Generator) -> list[Outline]:
    """The lesions of a case, 1 to 25 % of the image: 8 % have none, 15 % two or three."""
    chance = rng.uniform()
    count = 0 if chance < 0.08 else int(rng.integers(2, 4)) if chance < 0.23 else 1
    total = 0.013 * 19 ** rng.uniform(0.25 * (count > 1), 1)
    outlines: list[Outline] = []
    for _ in range(count):
        limit = max(0.8 * (0.5 - np.sqrt(total / count / np.pi)), 0.06)
        candidates = rng.uniform(-limit, limit, (24 if count > 1 else 1, 2))
        others = np.array([o.center for o in outlines]).reshape(-1, 2)
        gaps = np.linalg.norm(candidates[:, None] - others, axis=-1).min(axis=1, initial=9)
        area = total / count * rng.uniform(0.7, 1)
        outlines.append(random_outline(rng, area, candidates[gaps.argmax()]))
    return outlines


def random_outline(rng: Generator, area: float, center: np.ndarray) -> Outline:
    """An outline that encloses a fraction `area` of the image.

    log r(t) = sum_k k^-p (a_k cos kt + b_k sin kt); small p is spiculated, large p is lobed.
    """
    power, scale = rng.uniform(1.0, 2.4), rng.uniform(0.06, 0.22)
    a, b = rng.standard_normal((2, len(HARMONICS))) * scale * (HARMONICS / 2.0) ** -power
    turns = HARMONICS * (np.arange(ANGLES)[:, None] * (2 * np.pi / ANGLES))
    radius = np.exp(np.cos(turns) @ a + np.sin(turns) @ b)
    radius *= np.sqrt(area / (np.pi * np.mean(radius**2)))
    stretch, tilt = np.sqrt(rng.uniform(1, 2)), rng.uniform(0, np.pi)
    return Outline(np.asarray(center), stretch, tilt, radius.astype(np.float32))


def border_of(outline: Outline, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Distance from the outline's centre minus its radius in that direction, at x, y."""
    dx, dy = x - np.float32(outline.center[0]), y - np.float32(outline.center[1])
    cos, sin = np.float32(np.cos(outline.tilt)), np.float32(np.sin(outline.tilt))
    along = (cos * dx + sin * dy) / np.float32(outline.stretch)
    aside = (cos * dy - sin * dx) * np.float32(outline.stretch)
    step = (np.arctan2(aside, along) * (ANGLES / (2 * np.pi))).astype(np.int32)  # < 0: from the end
    border: np.ndarray = np.hypot(along, aside) - outline.radius[step]
    return border


def coverage(border: np.ndarray, width: float) -> np.ndarray:
    """Fraction of each pixel that a shape covers: 1 inside, 0 outside, 1/2 on the border."""
    from scipy.special import expit

    fraction: np.ndarray = expit(border * np.float32(-1 / width))
    return fraction


def discs(centers: np.ndarray, radii: np.ndarray, pixels: int) -> np.ndarray:
    """Opacity (pixels, pixels) of discs at centers (M, 2)."""
    x, y = grid(pixels)
    borders = [
        np.hypot(x - np.float32(cx), y - np.float32(cy)) - np.float32(r)
        for (cx, cy), r in zip(centers, radii)
    ]
    return coverage(np.minimum.reduce(borders), max(0.004, 0.5 / pixels))


@lru_cache(maxsize=8)
def grid(pixels: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixel centres x, y, each (pixels, pixels)."""
    ticks = (np.arange(pixels, dtype=np.float32) + 0.5) / pixels - 0.5
    x, y = np.meshgrid(ticks, ticks)
    x.setflags(write=False)
    y.setflags(write=False)
    return x, y


def field(rng: Generator, pixels: int, knots: int) -> np.ndarray:
    """Smooth Gaussian random field (pixels, pixels), mean 0, variance 1, `knots` waves across."""
    values = rng.standard_normal((knots + 3, knots + 3), dtype=np.float32)
    weights = _spline_weights(pixels, knots)
    smooth: np.ndarray = weights @ (values / np.float32(0.4794)) @ weights.T  # its mean power
    return smooth


def ridges(rng: Generator, pixels: int, knots: int) -> np.ndarray:
    """Net of bright lines (pixels, pixels) in [0, 1]: the zero crossings of a random field."""
    net: np.ndarray = np.exp(-3 * np.abs(field(rng, pixels, knots)))
    return net


@lru_cache(maxsize=64)
def _spline_weights(pixels: int, knots: int) -> np.ndarray:
    """Cubic B-spline weights (pixels, knots + 3) of each pixel centre."""
    position = (np.arange(pixels) + 0.5) / pixels * knots
    away = np.abs(position[:, None] + 1 - np.arange(knots + 3))
    near, far = 2 / 3 - away**2 + away**3 / 2, np.clip(2 - away, 0, None) ** 3 / 6
    weights = np.where(away < 1, near, far).astype(np.float32)
    weights.setflags(write=False)
    return weights
