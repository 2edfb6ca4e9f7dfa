"""Augmentation of batches: a pure function of seed, epoch and case.

torch's own operations on whole batches: kornia took 3.5 times as long to warp 16 images of 128 px,
and MONAI's random transforms take one case at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

BLUR_MAX = 1.0  # px
SHIFT = (-0.06, 0.06)  # fraction of the side
MOVES = {"angle": (-30, 30), "shear": (-8, 8), "zoom": (0.85, 1.15), "right": SHIFT, "down": SHIFT}
FULL = (
    (0.5, MOVES),
    (0.5, {"brightness": (-0.1, 0.1), "contrast": (0.75, 1.25), "gamma": (0.7, 1.4)}),
    (0.15, {"blur": (0.5, BLUR_MAX)}),
    (0.15, {"noise": (0.01, 0.06), "grain": (0, 2**32)}),
)
"""`full` augmentation besides flips: probability of each group, and its ranges."""


class Change(NamedTuple):
    """What is done to one case; the defaults change nothing."""

    mirror: bool = False  # left to right
    upend: bool = False  # top to bottom
    transpose: bool = False  # with the two above: all flips and quarter turns
    angle: float = 0.0  # counter-clockwise, degrees
    shear: float = 0.0  # degrees
    zoom: float = 1.0  # above 1 magnifies
    right: float = 0.0  # shift, fraction of the side
    down: float = 0.0
    brightness: float = 0.0  # added to grey values 0..1
    contrast: float = 1.0  # factor on the distance to 0.5
    gamma: float = 1.0  # exponent on grey values 0..1, after brightness and contrast
    blur: float = 0.0  # standard deviation, px
    noise: float = 0.0  # standard deviation, grey values 0..1
    grain: float = 0.0  # seed of the noise


Columns = dict[str, np.ndarray]
"""Changes of N cases: an array (N,) for each field of `Change`."""


def draw(seed: int, epoch: int, case: int, augmentation: str, copy: int = 0) -> Change:
    """The change of one case in one epoch; `augmentation` is 'none', 'flips' or 'full'.

    A case that is drawn again in the same epoch has another `copy`, and changes differently.
    """
    if augmentation == "none":
        return Change()
    place = [seed, epoch, 1 + case]  # [seed, epoch, 0] is the batch order's
    rng = np.random.default_rng([*place, copy] if copy else place)
    flips = Change(*map(bool, rng.random(3) < 0.5))
    if augmentation == "flips":
        return flips
    drawn: dict[str, float] = {}
    for probability, ranges in FULL:
        if rng.random() < probability:
            drawn |= zip(ranges, rng.uniform(*zip(*ranges.values())).tolist())
    return Change(flips.mirror, flips.upend, flips.transpose, **drawn)


def augment(images: Tensor, masks: Tensor, changes: Sequence[Change]) -> tuple[Tensor, Tensor]:
    """Change every case of a batch, image and mask together.

    Flips and quarter turns are exact; the other moves are one bilinear resampling with reflection
    at the border. A case comes out the same to the bit in every batch on one device.

    Parameters
    ----------
    images : (N, C, S, S) uint8
    masks : (N, 1, S, S) uint8, 0 or 1
    changes : one for each case, from `draw`

    Returns
    -------
    images : (N, C, S, S) float32, grey values 0..1
    masks : (N, 1, S, S) float32, 0 or 1
    """
    change = dict(zip(Change._fields, np.array(changes, dtype=np.float64).T))
    planes = turn(torch.cat([images, masks], 1).contiguous(), changes)
    planes = torch.cat([tone(planes[:, :-1], change), planes[:, -1:].float()], 1)
    moves = matrices(change)
    _apply(planes, (moves != np.eye(2, 3)).any((1, 2)), warp, moves)
    images = planes[:, :-1]
    _apply(images, change["blur"] > 0, blur, change["blur"])
    _apply(images, change["noise"] > 0, add_noise, change["noise"], change["grain"])
    return images, (planes[:, -1:] > 0.5).float()


def _apply(
    x: Tensor, chosen: np.ndarray, step: Callable[..., Tensor], *parameters: np.ndarray
) -> None:
    """x[chosen] = step(x[chosen], parameters[chosen]), in place."""
    if chosen.any():
        rows = torch.from_numpy(np.flatnonzero(chosen)).to(x.device)
        x[rows] = step(x.index_select(0, rows), *(values[chosen] for values in parameters))


def turn(planes: Tensor, changes: Sequence[Change]) -> Tensor:
    """Flip and transpose every case of (N, C, S, S)."""
    flipped = (x.flip([-1] * c.mirror + [-2] * c.upend) for x, c in zip(planes, changes))
    return torch.stack([x.mT if c.transpose else x for x, c in zip(flipped, changes)])


def tone(images: Tensor, change: Columns) -> Tensor:
    """((x - 0.5) contrast + 0.5 + brightness)^gamma, clipped to 0..1, by a table of 256 values."""
    contrast, brightness = change["contrast"][:, None], change["brightness"][:, None]
    levels = (np.arange(256) / 255 - 0.5) * contrast + 0.5 + brightness
    table = (levels.clip(0, 1) ** change["gamma"][:, None]).astype(np.float32)
    lookup = torch.from_numpy(table).to(images.device)
    return lookup.gather(1, images.flatten(1).long()).view(images.shape)


def matrices(change: Columns) -> np.ndarray:
    """(N, 2, 3): maps a place (x, y, 1) in the result to the original; the image spans -1..1."""
    angle, slide = np.deg2rad(change["angle"]), np.tan(np.deg2rad(change["shear"]))
    cos, sin = np.cos(angle) / change["zoom"], np.sin(angle) / change["zoom"]
    linear = np.array([[cos, cos * slide - sin], [sin, sin * slide + cos]]).transpose(2, 0, 1)
    shift = np.array([change["right"], change["down"]]).T[..., None] * 2
    return np.concatenate([linear, -linear @ shift], 2)


def warp(x: Tensor, moves: np.ndarray) -> Tensor:
    """Resample (N, C, S, S) with `matrices`: bilinear, reflected at the border."""
    place = (torch.arange(x.shape[-1], device=x.device) * 2 + 1) / x.shape[-1] - 1
    along, across, start = _like(x, moves[..., None, None]).unbind(2)  # each (N, 2, 1, 1)
    grid = (along * place + (across * place[:, None] + start)).permute(0, 2, 3, 1)
    return F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)


def blur(x: Tensor, sigma: np.ndarray) -> Tensor:
    """Gaussian blur of (N, C, S, S), reflected at the border; `sigma` (N,) in px."""
    reach = math.ceil(3 * BLUR_MAX)
    weights = np.exp(-0.5 * (np.arange(reach + 1) / sigma[:, None]) ** 2)
    weights = weights / (2 * weights.sum(1, keepdims=True) - 1)
    taps = _like(x, weights[..., None, None, None]).unbind(1)
    for axis, border in ((-1, (reach, reach, 0, 0)), (-2, (0, 0, reach, reach))):
        wide, size = F.pad(x, border, mode="reflect"), x.shape[axis]
        x = x * taps[0]
        for k in range(1, reach + 1):
            both = wide.narrow(axis, reach - k, size) + wide.narrow(axis, reach + k, size)
            x += both.mul_(taps[k])
    return x


def add_noise(x: Tensor, sigma: np.ndarray, grain: np.ndarray) -> Tensor:
    """Gaussian noise on (N, C, S, S), one field for all channels, drawn on the CPU."""
    shape = (1, *x.shape[2:])
    fields = [
        s * np.random.default_rng(int(g)).standard_normal(shape, np.float32)
        for s, g in zip(sigma, grain)
    ]
    return (x + _like(x, np.stack(fields))).clamp_(0, 1)


def _like(x: Tensor, values: np.ndarray) -> Tensor:
    return torch.from_numpy(values).to(x.device, x.dtype)
