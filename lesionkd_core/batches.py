"""Training batches: everything random is a function of seed and epoch, so a run resumes without a trace."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .prepare import Prepared

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""ImageNet's channel statistics, so that an ImageNet encoder finds what it knows."""


def normalize(images: np.ndarray, device: torch.device | str = "cpu") -> Tensor:
    """(N, H, W, 3) uint8 -> (N, 3, H, W) float32, channels last in memory, mean 0 and deviation 1 on ImageNet."""
    x = torch.from_numpy(np.ascontiguousarray(images)).to(device).permute(0, 3, 1, 2).float()
    mean, std = (torch.tensor(v, device=device).view(1, 3, 1, 1) * 255 for v in (MEAN, STD))
    return (x - mean) / std


def epoch_order(count: int, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """Shuffled positions 0..count-1 in batches; a last batch of one is left out (BatchNorm needs two)."""
    order = np.random.default_rng([seed, epoch]).permutation(count)
    batches = [order[i : i + batch_size] for i in range(0, count, batch_size)]
    return batches if len(batches) == 1 or len(batches[-1]) > 1 else batches[:-1]


def epoch_batches(
    prepared: Prepared, batch_size: int, seed: int, epoch: int, augmentation: str, device: torch.device | str = "cpu"
) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch of training batches: images (N, 3, S, S) normalized, masks (N, 1, S, S) float 0/1."""
    rows = prepared.index("train")
    generator = torch.Generator().manual_seed(int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0]))
    for batch in epoch_order(len(rows), batch_size, seed, epoch):
        chosen = rows[batch]
        images = normalize(prepared.images[chosen], device)
        masks = torch.from_numpy(prepared.masks[chosen]).to(device).float().unsqueeze(1)
        yield augment(images, masks, generator) if augmentation == "flip_rotate" else (images, masks)


def augment(images: Tensor, masks: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Flip both ways, rotate by up to 30 degrees, zoom by up to 10 %, contrast by up to 20 %, brightness by up to 0.2 deviations.

    Image (N, 3, H, W) and mask (N, 1, H, W) move together in one resampling; what comes in at the
    border is the mirrored image. The mask stays 0/1.
    """
    n, channels = images.shape[:2]

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(n, generator=generator) * (high - low) + low

    angle, zoom = torch.deg2rad(uniform(-30, 30)), uniform(0.9, 1.1)
    flips = (torch.rand(n, 2, generator=generator) < 0.5) * -2.0 + 1
    cos, sin, zero = angle.cos() * zoom, angle.sin() * zoom, torch.zeros(n)
    matrix = torch.stack([torch.stack([cos, -sin, zero], 1) * flips[:, :1], torch.stack([sin, cos, zero], 1) * flips[:, 1:]], 1)
    contrast, brightness = uniform(0.8, 1.2).view(n, 1, 1, 1), uniform(-0.2, 0.2).view(n, 1, 1, 1)

    grid = F.affine_grid(matrix.to(images.device), [n, 1, *images.shape[-2:]], align_corners=False)
    moved = F.grid_sample(torch.cat([images, masks], 1), grid, padding_mode="reflection", align_corners=False)
    images, masks = moved[:, :channels], (moved[:, channels:] > 0.5).float()
    images = images * contrast.to(images.device) + brightness.to(images.device)
    return images.contiguous(memory_format=torch.channels_last), masks
