"""Training batches: everything random is a function of seed, epoch and case, so a run resumes without a trace."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, pairwise

import numpy as np
import torch
from torch import Tensor

from . import ranks
from .augment import augment, draw
from .prepare import Prepared

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""ImageNet's channel statistics, so that an ImageNet encoder finds what it knows."""


def normalize(images: np.ndarray, device: torch.device | str = "cpu") -> Tensor:
    """(N, H, W, 3) uint8 -> (N, 3, H, W) float32, channels last in memory, mean 0 and deviation 1 on ImageNet."""
    x = torch.from_numpy(np.array(images)).to(device).permute(0, 3, 1, 2)
    return _standardize(x.contiguous().float().div_(255))


def _standardize(grey: Tensor) -> Tensor:
    mean, std = (torch.tensor(v, device=grey.device).view(1, 3, 1, 1) for v in (MEAN, STD))
    return grey.sub_(mean).div_(std).contiguous(memory_format=torch.channels_last)


def epoch_order(count: int, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """Shuffled positions 0..count-1 in batches; a last batch of one is left out (BatchNorm needs two)."""
    order = np.random.default_rng([seed, epoch]).permutation(count)
    batches = [order[i : i + batch_size] for i in range(0, count, batch_size)]
    return batches if len(batches) == 1 or len(batches[-1]) > 1 else batches[:-1]


def _send(array: np.ndarray, device: torch.device | str) -> Tensor:
    """To a device; to a GPU from pinned memory, so that this thread need not wait for the steps before."""
    x = torch.from_numpy(array)
    return x.pin_memory().to(device, non_blocking=True) if torch.device(device).type == "cuda" else x.to(device)


def load_batch(
    prepared: Prepared, rows: np.ndarray, seed: int, epoch: int, augmentation: str, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Cases of an epoch as the networks see them: images (N, 3, S, S) normalized, masks (N, 1, S, S) float 0/1."""
    images, masks = _send(prepared.images[rows], device).permute(0, 3, 1, 2), _send(prepared.masks[rows], device).unsqueeze(1)
    grey, masks = augment(images, masks, [draw(seed, epoch, int(row), augmentation) for row in rows])
    return _standardize(grey), masks


def epoch_batches(
    prepared: Prepared, batch_size: int, seed: int, epoch: int, augmentation: str, device: torch.device | str = "cpu"
) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch of training batches from `load_batch`, each made while the network learns from the one before; of many ranks, this one's part."""
    rows = prepared.index("train")
    with ThreadPoolExecutor(1) as loader:
        order = epoch_order(len(rows), batch_size, seed, epoch)
        coming = (loader.submit(load_batch, prepared, rows[batch[ranks.part(len(batch))]], seed, epoch, augmentation, device) for batch in order)
        for batch, (ready, _) in zip(order, pairwise(chain(coming, [None]))):
            assert ready  # the None stands after the last batch
            with ranks.batch(len(batch)):
                yield ready.result()
