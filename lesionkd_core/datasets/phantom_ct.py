"""The look `phantom-ct`: ground glass in a lung that is full of solid things."""

import numpy as np
from numpy.random import Generator

from .phantom_texture import (
    Outline,
    border_of,
    capsules,
    cover,
    field,
    from_to,
    grid,
    lesion_border,
    lesion_outlines,
    random_outline,
    scattered_discs,
    shown_of,
    strokes,
    vessel_tree,
)

AIR, FAT, MUSCLE, BONE = 0.13, 0.62, 0.80, 1.00  # grey of a lung-window CT


def ct(outlines: Generator, scene: Generator, noise: Generator, pixels: int, difficulty: float) -> tuple[np.ndarray, np.ndarray]:
    """Lung window: air, haze of the lesions, then whatever is solid on top, then the wall.

    Returns the image (pixels, pixels) in [0, 1] and the border function (pixels, pixels).
    """
    x, y = grid(pixels)
    pleura = random_outline(outlines, outlines.uniform(0.75, 1.4), outlines.uniform(-0.12, 0.12, 2), (0.02, 0.07))
    wall = border_of(pleura, x, y)
    border = lesion_border(lesion_outlines(outlines, spread=0.65), x, y)
    border = np.maximum(border, wall)  # a lesion ends at the pleura
    lung = _lung(border, scene, pixels, difficulty)
    lung = np.maximum(lung, _solids(scene, pixels, difficulty))
    body = _body(wall, pleura, scene, pixels)
    image = lung + (body - lung) * cover(-wall, 0.006)
    grain = field(noise, pixels, 90) + noise.standard_normal((pixels, pixels), dtype=np.float32)
    return image + np.float32(from_to(0.015, 0.045, difficulty)) * grain, border


def _lung(border: np.ndarray, rng: Generator, pixels: int, difficulty: float) -> np.ndarray:
    """Aerated lung with its dependent haze, and the ground glass of the lesions."""
    _, y = grid(pixels)
    air = AIR + 0.025 * field(rng, pixels, 5) + 0.025 * field(rng, pixels, 40)
    sag = rng.uniform(0, 0.2) * from_to(0.4, 1, difficulty)
    dependent = sag * cover(np.float32(0.3) - y, 0.09)
    width = from_to(0.008, 0.024, difficulty) * rng.uniform(0.6, 1.4)
    density = from_to(0.5, 0.18, difficulty) * rng.uniform(0.8, 1.25)
    patchy = 1 + 0.22 * field(rng, pixels, 8) + 0.18 * field(rng, pixels, 28)
    return air + dependent + density * cover(border, width) * np.clip(patchy, 0.4, 1.8)


def _solids(rng: Generator, pixels: int, difficulty: float) -> np.ndarray:
    """Vessels, end-on vessels and nodules, and a fissure; grey where solid, else 0."""
    ends, radii = vessel_tree(rng)
    vessels = capsules(ends, radii, pixels, strength=0.3 + 0.42 * np.sqrt(radii / radii.max()))
    spots, sizes = scattered_discs(rng, 14, 0.003, 0.008)
    dots = 0.5 * capsules(spots, sizes, pixels)
    balls, girths = scattered_discs(rng, 4, 0.015, 0.05, within=0.36)
    shown = shown_of(rng, 4, difficulty)
    nodules = 0.72 * capsules(balls[:shown], girths[:shown], pixels, soft=0.006)
    dense = random_outline(rng, rng.uniform(0.004, 0.03), rng.uniform(-0.36, 0.36, 2), decay=(1.5, 3))
    present = rng.uniform() < from_to(0.1, 0.6, difficulty)
    consolidation = 0.75 * present * cover(border_of(dense, *grid(pixels)), 0.007)
    fissure = rng.uniform([[-0.2, -0.2, 0, -0.5, 0.3, 0.002]], [[0.2, 0.2, 3.1, 0.5, 0.6, 0.004]])
    line = rng.uniform(0.2, 0.45) * strokes(fissure, *grid(pixels))
    solid: np.ndarray = np.maximum.reduce([vessels, dots, nodules, consolidation, line])
    return solid


def _body(wall: np.ndarray, pleura: Outline, rng: Generator, pixels: int) -> np.ndarray:
    """Chest wall: muscle next to the pleura, a row of ribs, fat farther out."""
    depth = wall + 0.012 * field(rng, pixels, 6)
    soft = MUSCLE + (FAT - MUSCLE) * cover(0.1 - depth, 0.012) + 0.02 * field(rng, pixels, 24)
    turn = rng.uniform(0, 1) + np.arange(9) * 0.7
    long, short = (pleura.radius.mean() + 0.05) * np.array([pleura.stretch, 1 / pleura.stretch])
    cos, sin = np.cos(pleura.tilt), np.sin(pleura.tilt)
    axes = np.array([[cos, sin], [-sin, cos]])
    middle = np.stack([long * np.cos(turn), short * np.sin(turn)], 1) @ axes + pleura.center
    along = 0.03 * np.stack([-np.sin(turn), np.cos(turn)], 1) @ axes
    ribs = capsules(np.hstack([middle - along, middle + along]), np.full(9, 0.018), pixels)
    body: np.ndarray = soft + (BONE - soft) * ribs
    return body
