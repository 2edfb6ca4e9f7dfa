"""Shapes and textures that the phantom looks are painted with.

Everything lives in normalized image coordinates (the image is the unit square around 0),
so a scene is the same at every pixel size. Shapes are *border functions*: about the
distance to an outline in image widths, negative inside.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.random import Generator
from scipy.special import expit

ANGLES = 1024  # steps of an outline's radius table; finer than a pixel up to 512 px
HARMONICS = np.arange(2, 17)  # order 1 would only shift the centre
SPLINE_POWER = 0.4794  # sum of squared cubic B-spline weights, averaged over a knot interval
SPECKLE_ROWS = 120  # axial resolution cells down an ultrasound image
FAR = 1.0  # border function of an empty image: farther than any pixel


class Outline(NamedTuple):
    """Star-shaped outline: a Fourier series of the log-radius, stretched and turned."""

    center: np.ndarray  # (2,) x, y in image widths
    stretch: float  # square root of long axis / short axis
    tilt: float  # angle of the long axis in rad
    radius: np.ndarray  # (ANGLES,) before the stretch, in image widths


@lru_cache(maxsize=8)
def grid(pixels: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixel centres x, y, each (pixels, pixels), in image widths from the middle."""
    ticks = (np.arange(pixels, dtype=np.float32) + 0.5) / pixels - 0.5
    x, y = np.meshgrid(ticks, ticks)
    x.setflags(write=False)
    y.setflags(write=False)
    return x, y


@lru_cache(maxsize=128)
def spline_weights(pixels: int, knots: int) -> np.ndarray:
    """Cubic B-spline weights (pixels, knots + 3) of each pixel centre on a uniform grid."""
    position = (np.arange(pixels) + 0.5) / pixels * knots
    away = np.abs(position[:, None] + 1 - np.arange(knots + 3))
    near, far = 2 / 3 - away**2 + away**3 / 2, np.clip(2 - away, 0, None) ** 3 / 6
    weights = np.where(away < 1, near, far).astype(np.float32)
    weights.setflags(write=False)
    return weights


def field(rng: Generator, pixels: int, rows: int, columns: int | None = None) -> np.ndarray:
    """Smooth Gaussian random field (pixels, pixels) float32 with mean 0 and variance 1.

    `rows` and `columns` (by default as many) are spline intervals down and across the image; how many
    coefficients `rng` gives does not depend on `pixels`.
    """
    columns = columns or rows
    knots = rng.standard_normal((rows + 3, columns + 3), dtype=np.float32)
    down, across = spline_weights(pixels, rows), spline_weights(pixels, columns)
    smooth: np.ndarray = down @ (knots / SPLINE_POWER) @ across.T
    return smooth


def profile(rng: Generator, pixels: int, knots: int) -> np.ndarray:
    """Smooth random curve (1, pixels) across the image, mean 0 and variance 1."""
    heights = rng.standard_normal(knots + 3, dtype=np.float32)
    curve: np.ndarray = (spline_weights(pixels, knots) @ (heights / SPLINE_POWER**0.5))[None]
    return curve


def ridges(rng: Generator, pixels: int, knots: int) -> np.ndarray:
    """Net of bright lines (pixels, pixels) in [0, 1]: where a random field crosses zero."""
    net: np.ndarray = np.exp(-3 * np.abs(field(rng, pixels, knots)))
    return net


def rayleigh(rng: Generator, pixels: int) -> np.ndarray:
    """Speckle amplitude, mean square 1; its cells widen with depth as beams diverge."""
    deep = grid(pixels)[1] + np.float32(0.5)
    power = np.zeros_like(deep)
    for _ in range(2):  # in phase and quadrature
        near, far = (field(rng, pixels, SPECKLE_ROWS, columns) for columns in (90, 40))
        power += ((1 - deep) * near + deep * far) ** 2 / (2 * ((1 - deep) ** 2 + deep**2))
    return np.sqrt(power)


def cover(border: np.ndarray, width: float) -> np.ndarray:
    """Share of a shape in each pixel: 1 inside, 0 outside, 1/2 on the very border."""
    share: np.ndarray = expit(border * np.float32(-1 / width))
    return share


@lru_cache(maxsize=1)
def _harmonics() -> tuple[np.ndarray, np.ndarray]:
    turns = HARMONICS * (np.arange(ANGLES)[:, None] * (2 * np.pi / ANGLES))
    return np.cos(turns), np.sin(turns)


def random_outline(
    rng: Generator, area: float, center: np.ndarray, rough: tuple[float, float] = (0.06, 0.22), decay: tuple[float, float] = (0.7, 2.2)
) -> Outline:
    """Draw an outline, from smooth to spiculated.

    Parameters
    ----------
    rng : generator
    area : float
        Enclosed share of the image.
    center : (2,)
        x, y in image widths.
    rough : (float, float)
        Range of the log-radius amplitude of harmonic 2.
    decay : (float, float)
        Range of the power p: small gives spicules, large gives lobes.

    Returns
    -------
    Outline
        log r(t) = sum_k k^-p (a_k cos kt + b_k sin kt), scaled to `area`.
    """
    power, scale = rng.uniform(*decay), rng.uniform(*rough)
    a, b = rng.standard_normal((2, len(HARMONICS))) * scale * (HARMONICS / 2.0) ** -power
    cos, sin = _harmonics()
    radius = np.exp(cos @ a + sin @ b)
    radius *= np.sqrt(area / (np.pi * np.mean(radius**2)))
    stretch, tilt = np.sqrt(rng.uniform(1, 2)), rng.uniform(0, np.pi)
    return Outline(np.asarray(center), stretch, tilt, radius.astype(np.float32))


def border_of(outline: Outline, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Border function rho - r(theta) of an outline at x, y, in image widths."""
    dx, dy = x - np.float32(outline.center[0]), y - np.float32(outline.center[1])
    cos, sin = np.float32(np.cos(outline.tilt)), np.float32(np.sin(outline.tilt))
    along = (cos * dx + sin * dy) / np.float32(outline.stretch)
    aside = (cos * dy - sin * dx) * np.float32(outline.stretch)
    step = np.arctan2(aside, along) * np.float32(ANGLES / (2 * np.pi))
    # a negative angle indexes from the end, which is the full turn that it misses
    border: np.ndarray = np.sqrt(along**2 + aside**2) - outline.radius[step.astype(np.int32)]
    return border


def lesion_outlines(rng: Generator, spread: float = 1.0, decay: tuple[float, float] = (0.7, 2.2)) -> list[Outline]:
    """Draw the lesions of a case: 8 % have none, 15 % have two or three, the rest one.

    Parameters
    ----------
    rng : generator
    spread : float
        Share of the room around the middle that centres may lie in.
    decay : (float, float)
        As in `random_outline`.

    Returns
    -------
    list of Outline
        Together they cover about 1 % to 25 % of the image.
    """
    chance = rng.uniform()
    count = 0 if chance < 0.08 else int(rng.integers(2, 4)) if chance < 0.23 else 1
    total = 0.013 * 19 ** rng.uniform(0.25 * (count > 1), 1)
    outlines, centers, reach = [], np.empty((0, 2)), np.sqrt(total / count / np.pi) if count else 0
    for _ in range(count):
        limit = max(spread * (0.5 - reach), 0.06)
        candidates = rng.uniform(-limit, limit, (24 if count > 1 else 1, 2))
        gaps = np.linalg.norm(candidates[:, None] - centers, axis=-1).min(axis=1, initial=9)
        centers = np.vstack([centers, candidates[gaps.argmax()]])
        area = total / count * rng.uniform(0.7, 1)
        outlines.append(random_outline(rng, area, centers[-1], decay=decay))
    return outlines


def lesion_border(outlines: list[Outline], x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Border function of the union of `outlines`; `FAR` everywhere if there is none."""
    borders = [border_of(outline, x, y) for outline in outlines]
    return np.minimum.reduce(borders) if borders else np.full_like(x, FAR)


def strokes(curves: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Paint thin curved lines, such as hairs and fissures.

    Parameters
    ----------
    curves : (M, 6)
        Foot x, y; direction in rad; bend (curvature, 1 / image widths); half length; half width.
    x, y : (pixels, pixels)

    Returns
    -------
    (pixels, pixels)
        Opacity in [0, 1]; a line thinner than a pixel fades in place of breaking up.
    """
    opacity, finest = np.zeros_like(x), 0.6 / len(x)
    for foot_x, foot_y, angle, bend, half, width in curves.astype(np.float32):
        cos, sin = np.cos(angle), np.sin(angle)
        along = cos * (x - foot_x) + sin * (y - foot_y)
        aside = cos * (y - foot_y) - sin * (x - foot_x) - bend * along**2
        wide = np.float32(max(width, finest))
        line = np.exp(-((aside / wide) ** 2) - (along / half) ** 8)
        np.maximum(opacity, line * (width / wide), out=opacity)
    return opacity


def _windows(ends: np.ndarray, radii: np.ndarray, pixels: int, margin: float) -> tuple[np.ndarray, np.ndarray]:
    """Border function of each segment in a window of its own, so many small ones stay cheap.

    Returns the windows' first column and row (M, 2), and the border functions (M, side, side).
    """
    reach = radii[:, None] + margin
    low = np.minimum(ends[:, :2], ends[:, 2:]) - reach
    high = np.maximum(ends[:, :2], ends[:, 2:]) + reach
    side = min(int((high - low).max() * pixels) + 2, pixels)
    corners = np.clip((low + 0.5) * pixels, 0, pixels - side).astype(int)
    ticks = ((corners[..., None] + np.arange(side) + 0.5) / pixels - 0.5).astype(np.float32)
    ax, ay, bx, by = ends.astype(np.float32).T[..., None, None]
    x, y = ticks[:, 0, None, :] - ax, ticks[:, 1, :, None] - ay
    run, rise = bx - ax, by - ay
    share = np.clip((x * run + y * rise) / (run**2 + rise**2 + np.float32(1e-12)), 0, 1)
    distance = np.hypot(x - share * run, y - share * rise)
    return corners, distance - radii.astype(np.float32)[:, None, None]


def capsules(
    ends: np.ndarray, radii: np.ndarray, pixels: int, soft: float = 0.004, rim: bool = False, strength: np.ndarray | None = None
) -> np.ndarray:
    """Paint round-ended segments; one of length 0 is a disc.

    Parameters
    ----------
    ends : (M, 4)
        x, y of either end in image widths.
    radii : (M,)
        In image widths.
    pixels : int
    soft : float
        Border width in image widths, at least half a pixel.
    rim : bool
        Paint the border alone.
    strength : (M,), optional
        Opacity of each segment, 1 if not given.

    Returns
    -------
    (pixels, pixels)
        Opacity in [0, 1].
    """
    opacity = np.zeros((pixels, pixels), np.float32)
    if not len(ends):
        return opacity
    soft = max(soft, 0.5 / pixels)
    corners, border = _windows(ends, radii, pixels, margin=5 * soft)
    paint = np.exp(-((border / (2 * soft)) ** 2)) if rim else cover(border, soft)
    paint = paint if strength is None else paint * strength.astype(np.float32)[:, None, None]
    side = border.shape[-1]
    for (column, row), patch in zip(corners.tolist(), paint, strict=True):
        window = opacity[row : row + side, column : column + side]
        np.maximum(window, patch, out=window)
    return opacity


def scattered_discs(rng: Generator, count: int, low: float, high: float, within: float = 0.48) -> tuple[np.ndarray, np.ndarray]:
    """Centres, as capsules of length 0 (count, 4), and radii (count,) of scattered discs."""
    centers = rng.uniform(-within, within, (count, 2))
    return np.hstack([centers, centers]), rng.uniform(low, high, count)


def vessel_tree(rng: Generator) -> tuple[np.ndarray, np.ndarray]:
    """Grow lung vessels from the hilum: they wander, thin out and fork.

    Returns ends (M, 4) and radii (M,) in image widths.
    """
    side = rng.choice([-1.0, 1.0])
    tips = [
        (0.46 * side, rng.uniform(-0.2, 0.2), angle, rng.uniform(0.009, 0.015))
        for angle in np.pi * (side > 0) + rng.uniform(-0.3, 0.3) + np.array([-0.9, 0, 0.9])
    ]
    ends: list[tuple[float, ...]] = []
    radii: list[float] = []
    while tips and len(ends) < 64:
        x, y, angle, radius = tips.pop(0)
        angle, length = angle + rng.normal(0, 0.3), rng.uniform(0.04, 0.11)
        far_x, far_y = x + length * np.cos(angle), y + length * np.sin(angle)
        ends.append((x, y, far_x, far_y))
        radii.append(radius)
        forked = rng.uniform() < 0.42
        turns = rng.choice([-1, 1]) * np.array([0.25, -0.75]) if forked else (0.0,)
        shrinks = (0.82, 0.62) if forked else (0.9,)
        tips += [
            (far_x, far_y, angle + turn, radius * shrink) for turn, shrink in zip(turns, shrinks, strict=True) if radius * shrink > 0.003
        ]
    return np.array(ends), np.array(radii)


def from_to(easy: float, hard: float, difficulty: float) -> float:
    return easy + (hard - easy) * difficulty


def shown_of(rng: Generator, most: int, difficulty: float) -> int:
    """How many of `most` distractors to show: at half the luck, difficulty decides."""
    return round(most * rng.uniform(0.2, 1) * from_to(0.15, 1, difficulty))
