"""Augmentation and batches: exact flips, one resampling, a function of seed, epoch and case."""

import threading
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from lesionkd_core.data.augment import FULL, Change, augment, draw
from lesionkd_core.data.batches import (
    MEAN,
    STD,
    TrainingSet,
    _Drawn,
    epoch_order,
    normalize,
)
from lesionkd_core.data.prepare import Unlabelled

KINDS = ("none", "flips", "full")
FLIPS = [Change(bool(k & 1), bool(k & 2), bool(k & 4)) for k in range(8)]
seeds, sizes = st.integers(0, 2**31), st.sampled_from([32, 64])
properties = settings(max_examples=15, deadline=None)


@dataclass
class Arrays:
    """What batches need of prepared data."""

    images: np.ndarray
    masks: np.ndarray

    @property
    def cases(self) -> pd.DataFrame:
        group = [f"g{i // 2}" for i in range(len(self.images))]
        share, ids = self.masks.mean((1, 2)), map(str, range(len(group)))
        return pd.DataFrame({"id": ids, "group": group, "lesion_fraction": share})

    def index(self, split: str) -> np.ndarray:
        assert split == "train"
        return np.arange(1, len(self.images))  # the first case is not in the training split


def ellipses(count: int, size: int, seed: int = 0, smallest: float = 0.15) -> np.ndarray:
    """(N, S, S) uint8: one rotated ellipse in the middle of each mask."""
    rng = np.random.default_rng(seed)
    y, x = (np.mgrid[:size, :size] + 0.5) / size - 0.5
    ranges = ((0, np.pi), (smallest, 0.3), (smallest, 0.3), (-0.1, 0.1), (-0.1, 0.1))
    angle, a, b, right, down = (rng.uniform(*ends, (count, 1, 1)) for ends in ranges)
    u = (x - right) * np.cos(angle) + (y - down) * np.sin(angle)
    v = (y - down) * np.cos(angle) - (x - right) * np.sin(angle)
    return ((u / a) ** 2 + (v / b) ** 2 < 1).astype(np.uint8)


def arrays(count: int = 13, size: int = 32, seed: int = 0) -> Arrays:
    masks = ellipses(count, size, seed)
    noise = np.random.default_rng(seed).integers(0, 100, (count, size, size, 3))
    return Arrays((noise + 120 * masks[..., None]).astype(np.uint8), masks)


def tensors(data: Arrays) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.from_numpy(data.images).permute(0, 3, 1, 2), torch.from_numpy(data.masks)[:, None]


def changed(image: np.ndarray, mask: np.ndarray, **change) -> tuple[np.ndarray, np.ndarray]:
    """`augment` of one grey image (S, S) uint8 with its mask (S, S)."""
    planes = torch.from_numpy(image).expand(1, 3, -1, -1)
    images, masks = augment(
        planes, torch.from_numpy(mask.astype(np.uint8))[None, None], [Change(**change)]
    )
    assert torch.equal(images[:, 0], images[:, 1]) and torch.equal(images[:, 0], images[:, 2])
    return images[0, 0].numpy(), masks[0, 0].numpy()


# Moves --------------------------------------------------------------------------------------------


def test_flips_and_quarter_turns_are_exact_and_all_eight():
    rng = np.random.default_rng(0)
    image, mask = rng.integers(0, 256, (32, 32), np.uint8), rng.integers(0, 2, (32, 32), np.uint8)
    expected = [np.rot90(x, turns) for turns in range(4) for x in (image, np.fliplr(image))]
    seen = set()
    for change in FLIPS:
        grey, got = changed(image, mask, **change._asdict())
        seen |= {k for k, x in enumerate(expected) if np.array_equal(x, np.round(grey * 255))}
        assert np.array_equal(got, changed(mask * 255, mask, **change._asdict())[0])
    assert seen == set(range(8))


@properties
@given(seeds, sizes)
def test_warping_equals_scipys_interpolation_at_the_same_places(seed, size):
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (size, size), dtype=np.uint8)
    low, high = np.array(list(FULL[0][1].values())).T
    change = dict(zip(FULL[0][1], rng.uniform(low, high)))
    y, x = np.mgrid[:size, :size] - (size - 1) / 2.0  # back: shift, zoom, shear, angle
    x = (x - change["right"] * size) / change["zoom"]
    y = (y - change["down"] * size) / change["zoom"]
    x, a = x + np.tan(np.deg2rad(change["shear"])) * y, np.deg2rad(change["angle"])
    places = np.stack([np.sin(a) * x + np.cos(a) * y, np.cos(a) * x - np.sin(a) * y])
    places += (size - 1) / 2.0
    how = {"order": 1, "mode": "reflect"}
    got, mask = changed(image, image > 127, **change)
    assert np.abs(got - ndimage.map_coordinates(image / 255, places, **how)).max() < 1e-3
    fraction = ndimage.map_coordinates((image > 127).astype(float), places, **how)
    differs = mask != (fraction > 0.5)
    assert np.abs(fraction - 0.5)[differs].max(initial=0) < 1e-3  # only where it is a tie


@properties
@given(seeds, sizes, st.integers(1, 5))
def test_image_and_mask_stay_aligned(seed, size, count):
    """The image is the mask: without changes of intensity, thresholding it gives the mask."""
    _, masks = tensors(arrays(count, size, seed % 1000))
    images = masks.expand(-1, 3, -1, -1) * 255
    drawn = [draw(seed, 0, case, "full") for case in range(count)]
    neutral = Change()._asdict()
    tones = ("brightness", "contrast", "gamma", "blur", "noise")
    moves = [c._replace(**{name: neutral[name] for name in tones}) for c in drawn]
    grey, augmented = augment(images, masks, moves)
    assert torch.equal((grey > 0.5).float(), augmented.expand(-1, 3, -1, -1))
    rough = [m._replace(blur=c.blur, noise=c.noise, grain=c.grain) for m, c in zip(moves, drawn)]
    grey, same = augment(images, masks, rough)
    assert torch.equal(augmented, same)
    near, how = np.ones((3, 3)), {"border_value": 1}
    for image, mask in zip(grey[:, 0].numpy() > 0.5, augmented[:, 0].numpy() > 0):
        assert image[ndimage.binary_erosion(mask, near, **how)].all()
        assert not image[~ndimage.binary_dilation(mask, near)].any()  # off by 1 px at most


# Intensities --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"brightness": 0.1}, [0.1, 0.3, 0.7, 1.0]),  # clipped at white
        ({"contrast": 1.5}, [0.0, 0.05, 0.65, 1.0]),  # 1.5 (0.2 - 0.5) + 0.5
        ({"gamma": 2.0}, [0.0, 0.04, 0.36, 1.0]),
        ({"brightness": 0.2, "contrast": 1.5, "gamma": 0.5}, [0.0, 0.5, 0.85**0.5, 1.0]),
    ],
    ids=str,
)
def test_brightness_contrast_and_gamma_by_hand(change, expected):
    image = np.repeat(np.array([0, 51, 153, 255], np.uint8), 256).reshape(32, 32)
    grey, mask = changed(image, image > 100, **change)
    assert grey[::8, 0] == pytest.approx(expected, abs=1e-6)
    assert np.array_equal(mask, image > 100)


def test_blur_equals_scipys_gaussian():
    image = np.random.default_rng(0).integers(0, 256, (32, 32), dtype=np.uint8)
    grey, mask = changed(image, image > 127, blur=0.7)
    expected = ndimage.gaussian_filter(image / 255, 0.7, radius=3, mode="mirror")
    assert np.abs(grey - expected).max() < 1e-5
    assert np.array_equal(mask, image > 127)


@properties
@given(seeds, st.integers(0, 200), st.sampled_from(KINDS[1:]))
def test_results_are_finite_in_range_and_binary_and_inputs_are_left_alone(seed, epoch, kind):
    images, masks = tensors(arrays(8, 32, seed % 1000))
    before = images.clone(), masks.clone()
    grey, augmented = augment(images, masks, [draw(seed, epoch, case, kind) for case in range(8)])
    assert torch.equal(before[0], images) and torch.equal(before[1], masks)
    assert grey.isfinite().all() and grey.min() >= -1e-6 and grey.max() <= 1 + 1e-6
    assert set(augmented.unique().tolist()) == {0.0, 1.0}


# What is drawn ------------------------------------------------------------------------------------


# Batches ------------------------------------------------------------------------------------------


def loaded(data: Arrays, rows, seed: int = 0, epoch: int = 0, kind: str = "full", device="cpu"):
    """The images and masks of some cases as batches of an epoch have them."""
    rows = np.asarray(rows)
    drawn = _Drawn(rows, np.zeros_like(rows), len(rows))
    batch = TrainingSet(data, 2, seed, kind)._load(drawn, epoch, device, 0, 1)
    return batch.images, batch.masks


def epoch_batches(data, size, seed, epoch, kind, rank=0, ranks=1, **options):
    return TrainingSet(data, size, seed, kind, **options).epoch(epoch, "cpu", rank, ranks)


def test_without_augmentation_images_are_only_standardized():
    data, rows = arrays(), np.array([3, 1, 12])
    images, masks = loaded(data, rows, kind="none")
    assert torch.equal(images, normalize(data.images[rows]))
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert np.array_equal(masks[:, 0], data.masks[rows]) and masks.dtype == torch.float32
    by_hand = (data.images[rows].astype(np.float64) / 255 - MEAN) / STD
    assert np.abs(images.permute(0, 2, 3, 1).numpy() - by_hand).max() < 1e-5


@properties
@given(seeds, st.sampled_from(KINDS), sizes, st.sets(st.integers(0, 12), min_size=1))
def test_a_case_is_the_same_in_any_batch_to_the_bit(seed, kind, size, rows):
    data, rows = arrays(13, size), list(rows)
    images, masks = loaded(data, np.arange(13), seed, 4, kind)
    some_images, some_masks = loaded(data, rows, seed, 4, kind)
    assert torch.equal(some_images, images[rows]) and torch.equal(some_masks, masks[rows])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_case_is_the_same_on_a_gpu():
    data = arrays(13, 64)
    here, there = (loaded(data, np.arange(13), 1, 2, "full", d) for d in ("cpu", "cuda"))
    assert (here[0] - there[0].cpu()).abs().max() < 1e-3
    assert (here[1] != there[1].cpu()).float().mean() < 1e-3


def test_an_epochs_order_has_every_case_once_and_no_batch_of_one():
    batches = epoch_order(13, 4, seed=0, epoch=3)
    assert [len(b) for b in batches] == [4, 4, 4]  # the thirteenth alone: BatchNorm needs two
    assert sorted(np.concatenate(epoch_order(14, 4, 0, 3))) == list(range(14))
    assert not np.array_equal(epoch_order(14, 4, 0, 3)[0], epoch_order(14, 4, 0, 4)[0])


def test_an_epoch_has_every_case_once_whatever_the_batch_size():
    data = arrays(14)
    images, masks = loaded(data, np.arange(14), 2, 3)
    for size in (3, 5, 13):
        order, batches = epoch_order(13, size, 2, 3), epoch_batches(data, size, 2, 3, "full")
        for positions, batch in zip(order, batches, strict=True):
            rows = data.index("train")[positions]
            assert np.array_equal(batch.rows, rows)
            assert torch.equal(batch.images, images[rows])
            assert torch.equal(batch.masks, masks[rows])


@pytest.mark.parametrize("fraction", [0.05, 0.3, 1.0])
def test_labelled_cases_are_whole_groups_reach_the_fraction_and_follow_the_seed(fraction):
    data, chosen = arrays(41), set()
    train, groups = data.index("train"), data.cases["group"].to_numpy()
    for seed in range(4):
        one = TrainingSet(data, 5, 0, "none", fraction, seed)
        rows = one.labelled
        assert fraction * len(train) <= len(rows) < fraction * len(train) + 2
        assert np.array_equal(rows, train[np.isin(groups[train], groups[rows])])
        assert one.lesion_fraction == pytest.approx(data.masks[rows].mean())
        chosen.add(tuple(rows))
    assert len(chosen) == (1 if fraction == 1 else 4)


def test_with_few_labels_every_batch_has_as_many_labelled_images_before_its_own():
    data = arrays(14)
    labelled = TrainingSet(data, 5, 2, "full", 0.3).labelled
    batches = list(epoch_batches(data, 5, 2, 3, "full", label_fraction=0.3))
    plain = list(epoch_batches(data, 5, 2, 3, "full"))
    pictures = set()
    for batch, own in zip(batches, plain, strict=True):
        n = len(own.rows)
        assert len(batch.images) == 2 * n and len(batch.masks) == n
        assert np.isin(batch.rows[:n], labelled).all()
        assert np.array_equal(batch.rows[n:], own.rows)
        assert torch.equal(batch.images[n:], own.images)
        pictures |= {image.contiguous().numpy().tobytes() for image in batch.images}
    assert len(pictures) == 2 * len(data.index("train"))  # no copy equals another


def test_images_without_masks_come_last_in_every_epoch_and_are_never_among_the_labelled():
    data, others = arrays(14), arrays(7, seed=5)
    unlabelled = Unlabelled(others.images, pd.Series([f"u{i}" for i in range(7)]), "digest")
    one = TrainingSet(data, 5, 2, "none", unlabelled=unlabelled)
    seen, count = [], len(data.masks)
    for batch in one.epoch(3):
        n = len(batch.masks)
        assert (batch.rows[:n] < count).all() and (batch.rows[n:] >= 0).all()
        for row, image in zip(batch.rows[n:], batch.images[n:]):
            source = others.images[row - count] if row >= count else data.images[row]
            assert torch.equal(image, normalize(source[None])[0])
        seen.extend(batch.rows[n:])
    assert sorted(seen) == sorted(one.rows) and len(one.rows) == 13 + 7
    assert (
        one.names(np.array([count, count + 6])) == ["u0", "u6"] and len(one.drawn(3)) == one.steps
    )


class Watched(np.ndarray):
    """Counts the batches that are read, and fails at number `fails`."""

    reads, fails = 0, None

    def __getitem__(self, rows):
        self.reads += 1
        if self.reads == self.fails:
            raise OSError("disk gone")
        return np.asarray(self)[rows]


@pytest.mark.fault
def test_an_error_while_loading_reaches_the_loop_at_its_batch():
    data, before = arrays(), threading.active_count()
    data.images = data.images.view(Watched)
    data.images.fails = 3
    batches = epoch_batches(data, 3, 0, 0, "full")
    assert len(next(batches).rows) == len(next(batches).rows) == 3
    with pytest.raises(OSError, match="disk gone"):
        next(batches)
    assert threading.active_count() == before
