"""Training batches: everything random is a function of seed, epoch and case."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..config import MEAN, STD
from .augment import augment, draw
from .prepare import Prepared

VIEW_SEED = 2**31
"""Seed of the augmentation with a fixed number of views; no option can have it."""

Device = torch.device | str


class Batch(NamedTuple):
    """Rows of the cases, images (N, 3, S, S) float32 and masks (M, 1, S, S) float32 0/1.

    M = N, or less if the last images have no masks.
    """

    rows: np.ndarray
    images: Tensor
    masks: Tensor


def normalize(images: np.ndarray, device: Device = "cpu") -> Tensor:
    """(N, H, W, 3) uint8 -> (N, 3, H, W) float32, channels last, standardized with MEAN and STD."""
    x = torch.from_numpy(np.array(images)).to(device).permute(0, 3, 1, 2)
    return _standardize(x.contiguous().float().div_(255))


def _standardize(grey: Tensor) -> Tensor:
    mean, std = (torch.tensor(v, device=grey.device).view(1, 3, 1, 1) for v in (MEAN, STD))
    return grey.sub_(mean).div_(std).contiguous(memory_format=torch.channels_last)


def epoch_order(count: int, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """Shuffled positions 0..count-1 in batches; a last batch of one is dropped, for BatchNorm."""
    order = np.random.default_rng([seed, epoch]).permutation(count)
    batches = [order[i : i + batch_size] for i in range(0, count, batch_size)]
    return batches if len(batches) == 1 or len(batches[-1]) > 1 else batches[:-1]


def load_batch(
    data: Prepared, rows: np.ndarray, seed: int, epoch: int, augmentation: str, device: Device
) -> Batch:
    """Augmented cases of one epoch, standardized, on a device."""
    images = _send(data.images[rows], device).permute(0, 3, 1, 2)
    masks = _send(data.masks[rows], device).unsqueeze(1)
    grey, masks = augment(images, masks, [draw(seed, epoch, int(r), augmentation) for r in rows])
    return Batch(rows, _standardize(grey), masks)


def _send(array: np.ndarray, device: Device) -> Tensor:
    """To a device; to a GPU from pinned memory, so that this thread does not wait."""
    x = torch.from_numpy(array)
    if torch.device(device).type == "cuda":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


def epoch_batches(
    data: Prepared,
    batch_size: int,
    seed: int,
    epoch: int,
    augmentation: str,
    device: Device = "cpu",
    rank: int = 0,
    ranks: int = 1,
    views: int = 0,
    label_fraction: float = 1.0,
) -> Iterator[Batch]:
    """One epoch of training batches, each loaded while the network trains on the one before.

    With `views` each image is augmented in that many ways, one for each epoch in turn, the same for
    all seeds. If some images have no masks, or `label_fraction` is below 1, every batch is preceded
    by an equal number of labelled images, and its own images come without masks. With several
    processes, each gets its part.
    """
    drawn = (VIEW_SEED, epoch % views) if views else (seed, epoch)
    rows = data.training
    order = epoch_order(len(rows), batch_size, seed, epoch)
    batches = [rows[batch] for batch in order if len(batch) >= ranks]
    labelled, rng = labelled_rows(data, label_fraction), np.random.default_rng([seed, epoch, 0, 1])

    def load(whole: np.ndarray) -> Batch:
        own = whole[rank::ranks]
        if label_fraction == 1 and not data.unlabelled:
            return load_batch(data, own, *drawn, augmentation, device)
        filled = np.where(np.isin(whole, labelled), whole, rng.choice(labelled, len(whole)))
        both = np.concatenate([filled[rank::ranks], own])
        batch = load_batch(data, both, *drawn, augmentation, device)
        return batch._replace(masks=batch.masks[: len(own)])

    with ThreadPoolExecutor(1) as loader:
        coming = (loader.submit(load, whole) for whole in batches)
        for ready, _ in pairwise(chain(coming, [None])):
            assert ready  # None follows the last batch
            yield ready.result()


def labelled_rows(data: Prepared, fraction: float) -> np.ndarray:
    """Rows of the training cases whose masks are used: whole groups at random, at least one."""
    rows = data.index("train")
    groups = data.cases["group"].to_numpy()[rows]
    order = np.random.default_rng(0).permutation(np.unique(groups))
    sizes = np.cumsum([(groups == group).sum() for group in order])
    kept = order[: 1 + int(np.searchsorted(sizes, fraction * len(rows)))]
    return rows[np.isin(groups, kept)]
