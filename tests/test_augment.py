"""Augmentation: exact flips, one resampling for image and mask, and nothing but seed, epoch and case decides."""

import hashlib
import subprocess
import sys
import threading
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from lesionkd_core.augment import FULL, Change, augment, draw, matrices
from lesionkd_core.batches import MEAN, STD, epoch_batches, epoch_order, load_batch, normalize
from lesionkd_core.edges import edge_label_batch
from tests.conftest import ROOT

KINDS = ("none", "flips", "full")
FLIPS = [Change(bool(k & 1), bool(k & 2), bool(k & 4)) for k in range(8)]
seeds, sizes, some = st.integers(0, 2**40), st.sampled_from([32, 64, 96]), settings(max_examples=30, deadline=None)


@dataclass
class Arrays:
    """What batches need of prepared data."""

    images: np.ndarray
    masks: np.ndarray

    def index(self, split: str) -> np.ndarray:
        assert split == "train"
        return np.arange(1, len(self.images))  # the first case is somebody else's


def ellipses(count: int, size: int, seed: int = 0, smallest: float = 0.15) -> np.ndarray:
    """(N, S, S) uint8: one turned ellipse a mask, in the middle of the image."""
    rng = np.random.default_rng(seed)
    y, x = (np.mgrid[:size, :size] + 0.5) / size - 0.5
    angle, a, b, right, down = (rng.uniform(*ends, (count, 1, 1)) for ends in ((0, np.pi), (smallest, 0.3), (smallest, 0.3), (-0.1, 0.1), (-0.1, 0.1)))
    u, v = (x - right) * np.cos(angle) + (y - down) * np.sin(angle), (y - down) * np.cos(angle) - (x - right) * np.sin(angle)
    return ((u / a) ** 2 + (v / b) ** 2 < 1).astype(np.uint8)


def arrays(count: int = 13, size: int = 32, seed: int = 0) -> Arrays:
    masks, noise = ellipses(count, size, seed), np.random.default_rng(seed).integers(0, 100, (count, size, size, 3))
    return Arrays((noise + 120 * masks[..., None]).astype(np.uint8), masks)


def tensors(data: Arrays) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.from_numpy(data.images).permute(0, 3, 1, 2), torch.from_numpy(data.masks).unsqueeze(1)


def changed(image: np.ndarray, mask: np.ndarray, **change) -> tuple[np.ndarray, np.ndarray]:
    """One grey image (S, S) uint8 with its mask (S, S) through `augment`."""
    images, masks = augment(torch.from_numpy(image).expand(1, 3, -1, -1), torch.from_numpy(mask.astype(np.uint8))[None, None], [Change(**change)])
    assert torch.equal(images[:, 0], images[:, 1]) and torch.equal(images[:, 0], images[:, 2])  # grey stays grey
    return images[0, 0].numpy(), masks[0, 0].numpy()


def moved(mask: np.ndarray, **change) -> np.ndarray:
    return changed(mask.astype(np.uint8) * 255, mask, **change)[1]


def test_flips_and_quarter_turns_are_exact_and_all_eight():
    rng = np.random.default_rng(0)
    image, mask = rng.integers(0, 256, (32, 32), dtype=np.uint8), rng.integers(0, 2, (32, 32), dtype=np.uint8)
    expected = [np.rot90(np.fliplr(image) if mirror else image, turns) for turns in range(4) for mirror in (False, True)]
    seen = set()
    for change in FLIPS:
        grey, got = changed(image, mask, **change._asdict())
        seen |= {k for k, x in enumerate(expected) if np.array_equal(x, np.round(grey * 255))}
        assert np.array_equal(got, changed(mask * 255, mask, **change._asdict())[0])
    assert seen == set(range(8))


@some
@given(seeds, sizes)
def test_flips_can_be_undone_and_edges_go_along(seed, size):
    images, masks = tensors(arrays(4, size, seed % 1000))
    drawn = [draw(seed, 0, case, "flips") for case in range(4)]
    once = augment(images, masks, drawn)
    back = [Change(c.upend, c.mirror, True) if c.transpose else c for c in drawn]  # transposing exchanges the axes
    twice = augment((once[0] * 255).round().byte(), once[1].byte(), back)
    assert torch.equal(twice[0], images.float() / 255) and torch.equal(twice[1], masks.float())
    edges = augment(images, edge_label_batch(masks.float()).byte(), drawn)[1]
    assert torch.equal(edge_label_batch(once[1]), edges)


def test_none_only_normalizes():
    data = arrays()
    rows = np.array([3, 1, 12])
    images, masks = load_batch(data, rows, 0, 0, "none")
    assert torch.equal(images, normalize(data.images[rows])) and images.is_contiguous(memory_format=torch.channels_last)
    assert np.array_equal(masks[:, 0], data.masks[rows]) and masks.dtype == torch.float32
    by_hand = (data.images[rows].astype(np.float64) / 255 - MEAN) / STD
    assert np.abs(images.permute(0, 2, 3, 1).numpy() - by_hand).max() < 1e-5


@pytest.mark.parametrize(("change", "expected"), [
    ({}, [0.0, 0.2, 0.6, 1.0]),
    ({"brightness": 0.1}, [0.1, 0.3, 0.7, 1.0]),  # clipped at white
    ({"contrast": 1.5}, [0.0, 0.05, 0.65, 1.0]),  # 1.5 (0.2 - 0.5) + 0.5
    ({"contrast": 0.5}, [0.25, 0.35, 0.55, 0.75]),
    ({"gamma": 2.0}, [0.0, 0.04, 0.36, 1.0]),
    ({"brightness": 0.2, "contrast": 1.5, "gamma": 0.5}, [0.0, 0.5, 0.85**0.5, 1.0]),  # (0.05 + 0.2)^(1/2)
], ids=str)
def test_brightness_contrast_and_gamma_by_hand(change, expected):
    image = np.repeat(np.array([0, 51, 153, 255], np.uint8), 256).reshape(32, 32)
    grey, mask = changed(image, image > 100, **change)
    assert grey[::8, 0] == pytest.approx(expected, abs=1e-6)
    assert np.array_equal(mask, image > 100)


def test_shift_zoom_angle_and_shear_by_hand():
    square = np.zeros((32, 32), np.uint8)
    square[10:18, 8:16] = 1
    assert np.array_equal(moved(square, right=0.25), np.roll(square, 8, axis=1))
    assert np.array_equal(moved(square, down=-0.125), np.roll(square, -4, axis=0))
    assert np.array_equal(moved(square, angle=90), np.rot90(square))
    middle = np.zeros((32, 32), np.uint8)
    middle[12:20, 12:20] = 1
    twice = np.zeros((32, 32))
    twice[8:24, 8:24] = 1
    assert np.array_equal(moved(middle, zoom=2.0), twice)
    bar = np.zeros((33, 33), np.uint8)
    bar[:, 16] = 1
    assert np.array_equal(moved(bar, shear=45), np.fliplr(np.eye(33)))  # a row d below the middle slides d to the left


@some
@given(seeds, sizes)
def test_warping_equals_another_librarys_interpolation_at_the_same_places(seed, size):
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (size, size), dtype=np.uint8)
    low, high = np.array(list(FULL[0][1].values())).T
    change = dict(zip(FULL[0][1], rng.uniform(low, high)))
    y, x = np.mgrid[:size, :size] - (size - 1) / 2.0  # back from the result: shift, zoom, shear, angle
    x, y = (x - change["right"] * size) / change["zoom"], (y - change["down"] * size) / change["zoom"]
    x = x + np.tan(np.deg2rad(change["shear"])) * y
    a = np.deg2rad(change["angle"])
    places = np.stack([np.sin(a) * x + np.cos(a) * y, np.cos(a) * x - np.sin(a) * y]) + (size - 1) / 2.0
    expected = ndimage.map_coordinates(image / 255, places, order=1, mode="reflect")
    got, mask = changed(image, image > 127, **change)
    assert np.abs(got - expected).max() < 1e-3
    share = ndimage.map_coordinates((image > 127).astype(float), places, order=1, mode="reflect")
    assert np.array_equal(mask, share > 0.5) or np.abs(share - 0.5)[mask != (share > 0.5)].max() < 1e-3


@pytest.mark.parametrize("sigma", [0.5, 0.7, 1.0])
def test_blur_equals_another_librarys_gaussian(sigma):
    image = np.random.default_rng(0).integers(0, 256, (32, 32), dtype=np.uint8)
    grey, mask = changed(image, image > 127, blur=sigma)
    assert np.abs(grey - ndimage.gaussian_filter(image / 255, sigma, radius=3, mode="mirror")).max() < 1e-5
    assert np.array_equal(mask, image > 127)


def test_noise_has_the_deviation_asked_for_and_is_new_for_every_case():
    images, masks = torch.full((3, 3, 96, 96), 128, dtype=torch.uint8), torch.zeros(3, 1, 96, 96, dtype=torch.uint8)
    noisy, _ = augment(images, masks, [Change(noise=0.05, grain=1), Change(noise=0.02, grain=2), Change(noise=0.05, grain=3)])
    noise = (noisy - 128 / 255)[:, 0].flatten(1)
    assert noise.std(1).tolist() == pytest.approx([0.05, 0.02, 0.05], rel=0.03)
    assert noise.mean(1).abs().max() < 0.002
    assert torch.corrcoef(noise).triu(1).abs().max() < 0.05


@some
@given(seeds, sizes, st.integers(1, 5))
def test_image_and_mask_stay_aligned(seed, size, count):
    """The image is the mask: with the intensities left alone, thresholding the result gives the mask to the pixel."""
    _, masks = tensors(arrays(count, size, seed % 1000))
    drawn = [draw(seed, 0, case, "full") for case in range(count)]
    keep = Change()._asdict()
    moves = [c._replace(**{name: keep[name] for name in ("brightness", "contrast", "gamma", "blur", "noise")}) for c in drawn]
    images, augmented = augment(masks.expand(-1, 3, -1, -1) * 255, masks, moves)
    assert torch.equal((images > 0.5).float(), augmented.expand(-1, 3, -1, -1))
    images, same = augment(masks.expand(-1, 3, -1, -1) * 255, masks, [m._replace(blur=c.blur, noise=c.noise, grain=c.grain) for m, c in zip(moves, drawn)])
    assert torch.equal(augmented, same)
    for image, mask in zip(images[:, 0].numpy() > 0.5, augmented[:, 0].numpy() > 0):
        core, around = ndimage.binary_erosion(mask, np.ones((3, 3)), border_value=1), ndimage.binary_dilation(mask, np.ones((3, 3)))
        assert image[core].all() and not image[~around].any()  # blurred and noisy: off by at most one pixel


@some
@given(seeds, st.integers(0, 200), st.sampled_from(KINDS[1:]))
def test_what_comes_out_is_finite_in_range_and_binary(seed, epoch, kind):
    images, masks = tensors(arrays(8, 32, seed % 1000))
    before = images.clone(), masks.clone()
    grey, augmented = augment(images, masks, [draw(seed, epoch, case, kind) for case in range(8)])
    assert torch.equal(before[0], images) and torch.equal(before[1], masks)  # the caller's data is left alone
    assert grey.isfinite().all() and grey.min() >= -1e-6 and grey.max() <= 1 + 1e-6
    assert set(augmented.unique().tolist()) == {0.0, 1.0}
    assert grey.shape == images.shape and augmented.shape == masks.shape


def test_lesions_keep_their_area_on_average():
    masks = torch.from_numpy(ellipses(400, 64)).unsqueeze(1)
    _, augmented = augment(masks.expand(-1, 3, -1, -1) * 255, masks, [draw(0, 0, case, "full") for case in range(400)])
    kept = (augmented.sum((1, 2, 3)) / masks.sum((1, 2, 3))).numpy()
    assert kept.mean() == pytest.approx(1, abs=0.03) and kept.min() > 0.5 and kept.max() < 1.6


def test_an_image_is_never_mostly_border():
    drawn = [c for case in range(2000) if (c := draw(0, 0, case, "full")).zoom != 1]
    y, x = (np.mgrid[:32, :32] + 0.5) / 16 - 1
    places = matrices(Change(*np.array(drawn, float).T)) @ np.stack([x.ravel(), y.ravel(), np.ones(1024)])
    outside = (np.abs(places) > 1).any(1).mean(1)
    assert outside.max() < 0.4 and outside.mean() < 0.15


def test_shares_and_ranges_are_those_written_down():
    drawn = [draw(3, 5, case, "full") for case in range(4000)]
    neutral = Change()
    for share, ranges in FULL:
        for name, (low, high) in ranges.items():
            values = [v for c in drawn if (v := getattr(c, name)) != getattr(neutral, name)]
            assert len(values) / 4000 == pytest.approx(share, abs=0.03), name
            assert low <= min(values) < low + 0.05 * (high - low) and high - 0.05 * (high - low) < max(values) <= high, name
    counts = np.unique([c[:3] for c in drawn], axis=0, return_counts=True)[1]
    assert len(counts) == 8 and counts.min() > 400  # 500 expected of each flip
    assert {name for _, ranges in FULL for name in ranges} | {"mirror", "upend", "transpose"} == set(Change._fields)


@some
@given(seeds, st.integers(0, 1000), st.integers(0, 10**6))
def test_a_change_is_a_function_of_seed_epoch_and_case(seed, epoch, case):
    assert draw(seed, epoch, case, "full") == draw(seed, epoch, case, "full")
    assert draw(seed, epoch, case, "none") == Change()
    assert draw(seed, epoch, case, "flips")[:3] == draw(seed, epoch, case, "full")[:3]


def test_no_case_shares_the_random_stream_of_the_epochs_order():
    """numpy's streams of [seed, epoch] and [seed, epoch, 0] are one."""
    flips = [draw(0, epoch, 0, "flips")[:3] == tuple(np.random.default_rng([0, epoch]).random(3) < 0.5) for epoch in range(50)]
    assert sum(flips) < 25  # 1 in 8 by chance


def test_another_seed_epoch_or_case_is_another_change():
    drawn = {draw(seed, epoch, case, "full") for seed in range(3) for epoch in range(3) for case in range(40)}
    moved = [c for c in drawn if c.zoom != 1]
    assert len({c.zoom for c in moved}) == len(moved) > 100
    data = arrays()
    first, *others = (load_batch(data, np.arange(13), seed, epoch, "full")[0] for seed, epoch in ((0, 0), (1, 0), (0, 1)))
    assert not any(torch.equal(first, other) for other in others)


@some
@given(seeds, st.sampled_from(KINDS), sizes, st.lists(st.integers(0, 12), min_size=1, max_size=13, unique=True), st.integers(1, 3))
def test_a_case_looks_the_same_in_any_batch_to_the_bit(seed, kind, size, rows, threads):
    data, before = arrays(13, size), torch.get_num_threads()
    images, masks = load_batch(data, np.arange(13), seed, 4, kind)
    try:
        torch.set_num_threads(threads)
        some_images, some_masks = load_batch(data, np.array(rows), seed, 4, kind, torch.device("cpu"))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(some_images, images[rows]) and torch.equal(some_masks, masks[rows])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_case_looks_the_same_on_a_gpu():
    data = arrays(13, 64)
    here, there = (load_batch(data, np.arange(13), 1, 2, "full", device) for device in ("cpu", "cuda"))
    assert (here[0] - there[0].cpu()).abs().max() < 1e-3 and (here[1] != there[1].cpu()).float().mean() < 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_an_epoch_holds_every_case_once_whatever_the_batch_size(kind):
    data = arrays(14)
    expected = load_batch(data, np.arange(14), 2, 3, kind)
    for batch_size in (3, 5, 13):
        order, batches = epoch_order(13, batch_size, 2, 3), list(epoch_batches(data, batch_size, 2, 3, kind))
        assert [len(images) for images, _ in batches] == [len(positions) for positions in order]
        for positions, (images, masks) in zip(order, batches):
            rows = data.index("train")[positions]
            assert torch.equal(images, expected[0][rows]) and torch.equal(masks, expected[1][rows])


def digest(epoch: int) -> str:
    parts = [t.contiguous().numpy().tobytes() for batch in epoch_batches(arrays(), 5, 7, epoch, "full") for t in batch]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def test_a_resumed_run_sees_the_same_batches():
    went_through = [digest(epoch) for epoch in range(4)]
    code = "import torch; torch.set_num_threads(1); from tests.test_augment import digest; print(digest(3))"
    resumed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout.strip()
    assert resumed == went_through[3] and len(set(went_through)) == 4


class Watched(np.ndarray):
    """Counts the batches read of it, and fails at the one that `fails` names."""

    reads, fails = 0, None

    def __getitem__(self, rows):
        self.reads += 1
        if self.reads == self.fails:
            raise OSError("disk gone")
        return np.asarray(self)[rows]


def test_one_batch_is_made_ahead_and_no_thread_stays_behind():
    data, before = arrays(), threading.active_count()
    data.images = data.images.view(Watched)
    batches = epoch_batches(data, 3, 0, 0, "full")
    next(batches)
    batches.close()
    assert data.images.reads == 2 and threading.active_count() == before


@pytest.mark.fault
def test_an_error_in_the_loader_reaches_the_loop_where_it_happened():
    data, before = arrays(), threading.active_count()
    data.images = data.images.view(Watched)
    data.images.fails = 3
    batches = epoch_batches(data, 3, 0, 0, "full")
    assert len(next(batches)) == len(next(batches)) == 2
    with pytest.raises(OSError, match="disk gone"):
        next(batches)
    assert threading.active_count() == before
