"""Augmentation of batches: what happens to a case is a pure function of seed, epoch and case."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

BLUR_MAX = 1.0  # px; the blur reaches three times as far
FULL = (
    (0.5, {"angle": (-30, 30), "shear": (-8, 8), "zoom": (0.85, 1.15), "right": (-0.06, 0.06), "down": (-0.06, 0.06)}),
    (0.5, {"brightness": (-0.1, 0.1), "contrast": (0.75, 1.25), "gamma": (0.7, 1.4)}),
    (0.15, {"blur": (0.5, BLUR_MAX)}),
    (0.15, {"noise": (0.01, 0.06), "grain": (0, 2**32)}),
)
"""What `full` does besides flips: the share of the cases that get it, and the ranges it is drawn from (units: `Change`)."""


class Change(NamedTuple):
    """What is done to one case; the defaults change nothing."""

    mirror: bool = False  # left to right
    upend: bool = False  # top to bottom
    transpose: bool = False  # rows become columns; with the two above all flips and quarter turns
    angle: float = 0.0  # counter-clockwise, degrees
    shear: float = 0.0  # rows slide by the tangent of this, degrees
    zoom: float = 1.0  # over 1 magnifies
    right: float = 0.0  # shift, share of the side
    down: float = 0.0
    brightness: float = 0.0  # added to grey values 0..1
    contrast: float = 1.0  # factor on the distance to middle grey
    gamma: float = 1.0  # exponent on grey values 0..1, after brightness and contrast
    blur: float = 0.0  # standard deviation, px
    noise: float = 0.0  # standard deviation, grey values 0..1
    grain: float = 0.0  # its whole part is the seed of the noise


Columns = Any
"""A `Change` of which every field is an array (N,), one value a case."""


def draw(seed: int, epoch: int, case: int, augmentation: str) -> Change:
    """The change of one case in one epoch; `augmentation` is none, flips or full (`TeacherConfig.augment`)."""
    if augmentation == "none":
        return Change()
    rng = np.random.default_rng([seed, epoch, 1 + case])  # [seed, epoch, 0] would be the stream of the epoch's order
    flips = Change(*map(bool, rng.random(3) < 0.5))
    if augmentation == "flips":
        return flips
    drawn: dict[str, Any] = {}
    for share, ranges in FULL:
        if rng.random() < share:
            drawn |= zip(ranges, rng.uniform(*zip(*ranges.values())).tolist())
    return flips._replace(**drawn)


def augment(images: Tensor, masks: Tensor, changes: Sequence[Change]) -> tuple[Tensor, Tensor]:
    """Change every case of a batch in its own way, image and mask together.

    Flips and quarter turns are exact; the other moves are one bilinear resampling of image and mask,
    and what comes in at the border is the mirrored image. On one device a case comes out
    the same to the bit whatever batch it is in.

    Parameters
    ----------
    images : (N, 3, S, S) uint8
    masks : (N, 1, S, S) uint8, 0 or 1
    changes : one a case, from `draw`

    Returns
    -------
    images : (N, 3, S, S) float32, grey values 0..1
    masks : (N, 1, S, S) float32, 0 or 1

    torch's own operations, since kornia took 16 ms to warp 16 images of 128 px on two threads where they
    took 4.5 ms. MONAI's random transforms take one case at a time.
    """
    change: Columns = Change(*np.array(changes, dtype=np.float64).T)
    planes = turn(torch.cat([images, masks], 1).contiguous(), changes)
    planes = torch.cat([tone(planes[:, :3], change), planes[:, 3:].float()], 1)
    moves = matrices(change)
    _alter(planes, (moves != np.eye(2, 3)).any((1, 2)), warp, moves)
    images = planes[:, :3]
    _alter(images, change.blur > 0, blur, change.blur)
    _alter(images, change.noise > 0, add_noise, change.noise, change.grain)
    return images, (planes[:, 3:] > 0.5).float()


def _alter(x: Tensor, chosen: np.ndarray, step: Callable[..., Tensor], *parameters: np.ndarray) -> None:
    """x[chosen] = step(x[chosen], parameters of the chosen), in place; the other cases cost nothing."""
    if chosen.any():
        rows = torch.from_numpy(np.flatnonzero(chosen)).to(x.device)
        x[rows] = step(x.index_select(0, rows), *(values[chosen] for values in parameters))


def turn(planes: Tensor, changes: Sequence[Change]) -> Tensor:
    """Flip and transpose every case of (N, C, S, S)."""
    flipped = (x.flip([-1] * c.mirror + [-2] * c.upend) for x, c in zip(planes, changes))
    return torch.stack([x.mT if c.transpose else x for x, c in zip(flipped, changes)])


def tone(images: Tensor, change: Columns) -> Tensor:
    """uint8 -> ((x - 0.5) contrast + 0.5 + brightness)^gamma of x in 0..1, kept there, by a table of 256 values a case."""
    levels = (np.arange(256) / 255 - 0.5) * change.contrast[:, None] + 0.5 + change.brightness[:, None]
    table = torch.from_numpy((levels.clip(0, 1) ** change.gamma[:, None]).astype(np.float32)).to(images.device)
    return table.gather(1, images.flatten(1).long()).view(images.shape)


def matrices(change: Columns) -> np.ndarray:
    """(N, 2, 3): from a pixel's place (x, y, 1) in the result to its place in the original; the image spans -1..1."""
    angle, slide = np.deg2rad(change.angle), np.tan(np.deg2rad(change.shear))
    cos, sin = np.cos(angle) / change.zoom, np.sin(angle) / change.zoom
    linear = np.array([[cos, cos * slide - sin], [sin, sin * slide + cos]]).transpose(2, 0, 1)
    shift = np.array([change.right, change.down]).T[..., None] * 2
    return np.concatenate([linear, -linear @ shift], 2)


def warp(x: Tensor, moves: np.ndarray) -> Tensor:
    """Resample (N, C, S, S) along `matrices`: bilinear, mirrored at the border."""
    place = (torch.arange(x.shape[-1], device=x.device) * 2 + 1) / x.shape[-1] - 1
    along, across, start = _like(x, moves[..., None, None]).unbind(2)  # each (N, 2, 1, 1)
    grid = along * place + (across * place[:, None] + start)  # x and y in planes, which grid_sample reads faster than pairs
    return F.grid_sample(x, grid.permute(0, 2, 3, 1), padding_mode="reflection", align_corners=False)


def blur(x: Tensor, sigma: np.ndarray) -> Tensor:
    """Gaussian blur of (N, C, S, S), mirrored at the border; sums of shifted images come out the same in every batch."""
    reach = math.ceil(3 * BLUR_MAX)
    weights = np.exp(-0.5 * (np.arange(reach + 1) / sigma[:, None]) ** 2)
    weights = _like(x, (weights / (2 * weights.sum(1, keepdims=True) - 1))[..., None, None, None]).unbind(1)
    for axis, border in ((-1, (reach, reach, 0, 0)), (-2, (0, 0, reach, reach))):
        wide, size = F.pad(x, border, mode="reflect"), x.shape[axis]
        x = x * weights[0]
        for k in range(1, reach + 1):
            x += (wide.narrow(axis, reach - k, size) + wide.narrow(axis, reach + k, size)).mul_(weights[k])
    return x


def add_noise(x: Tensor, sigma: np.ndarray, grain: np.ndarray) -> Tensor:
    """Gaussian noise on (N, C, S, S), one field for all channels, kept in 0..1; drawn on the CPU, so that every device sees the same."""
    field = np.stack([s * np.random.default_rng(int(g)).standard_normal((1, *x.shape[2:]), np.float32) for s, g in zip(sigma, grain)])
    return (x + _like(x, field)).clamp_(0, 1)


def _like(x: Tensor, values: np.ndarray) -> Tensor:
    return torch.from_numpy(values).to(x.device, x.dtype)
