"""Training batches: everything random is a function of seed, epoch, case and copy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from ..config import MEAN, STD, DistillConfig, TeacherConfig
from .augment import augment, draw
from .prepare import Prepared, Unlabelled

Device = torch.device | str


class Batch(NamedTuple):
    """Images (N, 3, S, S) float32, and masks (M, 1, S, S) float32 0/1 of the first M of them.

    `rows` (N,) are rows of the cases; rows beyond them are images without masks.
    """

    rows: np.ndarray
    images: Tensor
    masks: Tensor


class _Drawn(NamedTuple):
    """The rows of one batch, which copy in this epoch each is, and M."""

    rows: np.ndarray
    copies: np.ndarray
    masks: int


def normalize(images: np.ndarray, device: Device = "cpu") -> Tensor:
    """(N, H, W, 3) uint8 -> (N, 3, H, W) float32, channels last, standardized with MEAN and STD."""
    x = torch.from_numpy(np.array(images)).to(device).permute(0, 3, 1, 2)
    return _standardize(x.contiguous().float().div_(255))


def _standardize(grey: Tensor) -> Tensor:
    mean, std = (torch.tensor(v, device=grey.device).view(1, 3, 1, 1) for v in (MEAN, STD))
    return grey.sub_(mean).div_(std).contiguous(memory_format=torch.channels_last)


@dataclass(frozen=True)
class TrainingSet:
    """The images that networks are trained on, and the batches of each epoch.

    Parameters
    ----------
    data : Prepared
        Its training split is used.
    batch_size : int
    seed : int
        Of the order and the augmentation.
    augmentation : str
        'none', 'flips' or 'full'.
    label_fraction : float
        Fraction of the training images whose masks are used; whole groups are drawn.
    label_seed : int
        Seed of that choice.
    unlabelled : Unlabelled, optional
        Further images, without masks.
    """

    data: Prepared
    batch_size: int
    seed: int
    augmentation: str
    label_fraction: float = 1.0
    label_seed: int = 0
    unlabelled: Unlabelled | None = None

    @classmethod
    def of(
        cls, data: Prepared, cfg: TeacherConfig, unlabelled: Unlabelled | None = None
    ) -> TrainingSet:
        """The training set of a configuration: a student's, or the teacher's with all masks."""
        common = data, cfg.batch_size, getattr(cfg, cfg.seed_field), cfg.augment
        if not isinstance(cfg, DistillConfig):
            return cls(*common)
        return cls(*common, cfg.label_fraction, cfg.label_seed, unlabelled)

    @property
    def rows(self) -> np.ndarray:
        """Rows of all training images; those without masks follow the rows of the cases."""
        own = self.data.index("train")
        if self.unlabelled is None:
            return own
        first = len(self.data.cases)
        return np.concatenate([own, np.arange(first, first + len(self.unlabelled.images))])

    @property
    def labelled(self) -> np.ndarray:
        """Rows of the training images whose masks are used: whole groups, at least one."""
        rows = self.data.index("train")
        groups = self.data.cases["group"].to_numpy()[rows]
        order = np.random.default_rng(self.label_seed).permutation(np.unique(groups))
        sizes = np.cumsum([(groups == group).sum() for group in order])
        count = 1 + int(np.searchsorted(sizes, self.label_fraction * len(rows)))
        return rows[np.isin(groups, order[:count])]

    @property
    def lesion_fraction(self) -> float:
        """Mean fraction of lesion pixels in the images whose masks are used."""
        return float(self.data.cases["lesion_fraction"].iloc[self.labelled].mean())

    @property
    def steps(self) -> int:
        """Number of batches in an epoch."""
        return len(epoch_order(len(self.rows), self.batch_size, self.seed, 0))

    def names(self, rows: np.ndarray) -> list[str]:
        """Ids of the cases of some rows."""
        ids = self.data.cases["id"]
        if self.unlabelled is not None:
            ids = pd.concat([ids, self.unlabelled.ids], ignore_index=True)
        return [str(name) for name in ids.iloc[rows]]

    def drawn(self, epoch: int, ranks: int = 1) -> list[_Drawn]:
        """What each batch of an epoch consists of.

        Where every image has its mask, a batch is `batch_size` images in random order. Otherwise
        it is `batch_size` images with masks, then the same number of all images without theirs.
        """
        rows, labelled = self.rows, self.labelled
        order = epoch_order(len(rows), self.batch_size, self.seed, epoch)
        batches = [rows[places] for places in order if len(places) >= ranks]
        if len(labelled) == len(rows):
            return [_Drawn(batch, np.zeros_like(batch), len(batch)) for batch in batches]
        rng = np.random.default_rng([self.seed, epoch, 0, 1])
        times: Counter[int] = Counter()
        drawn = []
        for batch in batches:
            others = rng.choice(labelled, len(batch))
            with_masks = np.where(np.isin(batch, labelled), batch, others)
            copies = []
            for row in with_masks.tolist():
                times[row] += 1  # copy 0 is the image in the second half of its batch
                copies.append(times[row])
            rows = np.concatenate([with_masks, batch])
            drawn.append(_Drawn(rows, np.array(copies + [0] * len(batch)), len(batch)))
        return drawn

    def epoch(
        self, epoch: int, device: Device = "cpu", rank: int = 0, ranks: int = 1
    ) -> Iterator[Batch]:
        """The batches of an epoch, each loaded while the network trains on the one before.

        With several processes, each gets its part of every batch.
        """
        batches = self.drawn(epoch, ranks)
        with ThreadPoolExecutor(1) as loader:
            coming = loader.submit(self._load, batches[0], epoch, device, rank, ranks)
            for batch in batches[1:]:
                ready = coming.result()
                coming = loader.submit(self._load, batch, epoch, device, rank, ranks)
                yield ready
            yield coming.result()

    def _load(self, drawn: _Drawn, epoch: int, device: Device, rank: int, ranks: int) -> Batch:
        """One process's part of a batch, augmented and standardized, on a device."""
        with_masks = np.arange(drawn.masks)[rank::ranks]
        without = np.arange(drawn.masks, len(drawn.rows))[rank::ranks]
        mine = np.concatenate([with_masks, without])
        rows, copies = drawn.rows[mine], drawn.copies[mine]
        images, masks = self._arrays(rows)
        changes = [
            draw(self.seed, epoch, int(row), self.augmentation, int(copy))
            for row, copy in zip(rows, copies)
        ]
        grey, moved = augment(
            _send(images, device).permute(0, 3, 1, 2), _send(masks, device).unsqueeze(1), changes
        )
        return Batch(rows, _standardize(grey), moved[: len(with_masks)])

    def _arrays(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Images (N, S, S, 3) and masks (N, S, S); of an image without a mask an empty one."""
        count = len(self.data.cases)
        if self.unlabelled is None or rows.max(initial=0) < count:
            return self.data.images[rows], self.data.masks[rows]
        own = rows < count
        images = np.empty((len(rows), *self.data.images.shape[1:]), np.uint8)
        masks = np.zeros((len(rows), *self.data.masks.shape[1:]), np.uint8)
        images[own], masks[own] = self.data.images[rows[own]], self.data.masks[rows[own]]
        images[~own] = self.unlabelled.images[rows[~own] - count]
        return images, masks


def epoch_order(count: int, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """Shuffled positions 0..count-1 in batches; a last batch of one is dropped, for BatchNorm."""
    order = np.random.default_rng([seed, epoch]).permutation(count)
    batches = [order[i : i + batch_size] for i in range(0, count, batch_size)]
    return batches if len(batches) == 1 or len(batches[-1]) > 1 else batches[:-1]


def _send(array: np.ndarray, device: Device) -> Tensor:
    """To a device; to a GPU from pinned memory, so that this thread does not wait."""
    x = torch.from_numpy(array)
    if torch.device(device).type == "cuda":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)
