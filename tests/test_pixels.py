"""From the original to the prepared square and back; lesions that must not vanish."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lesionkd_core.config import PrepareConfig
from lesionkd_core.data.pixels import (
    lesion_contrast,
    prepare_image,
    prepare_mask,
    restore,
)

properties = settings(deadline=None, max_examples=40)
sizes = st.integers(1, 300)
fits = st.sampled_from(["stretch", "pad"])


def at(pixels=32, **options):
    return PrepareConfig(pixels=pixels, **options)


@properties
@given(sizes, sizes, fits, st.data())
def test_a_lesion_of_one_pixel_never_vanishes_and_stays_in_place(height, width, fit, data):
    y, x = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    mask = np.zeros((height, width), dtype=bool)
    mask[y, x] = True
    cfg = at(fit=fit)
    small = prepare_mask(mask, cfg)
    assert small.any()
    back = restore(small.astype(np.float32), height, width, cfg)
    away = np.abs(np.argwhere(back == back.max()) - (y, x)).min(0)
    assert (away <= np.ceil(np.maximum(height, width) / 32) + 1).all()


@properties
@given(sizes, sizes, fits)
def test_empty_stays_empty_and_any_size_gives_the_prepared_size(height, width, fit):
    cfg = at(fit=fit)
    assert not prepare_mask(np.zeros((height, width), dtype=bool), cfg).any()
    image = prepare_image(np.full((height, width, 3), 90, np.uint8), cfg)
    assert image.shape == (32, 32, 3)
    assert set(np.unique(image)) <= ({90} if fit == "stretch" else {0, 90})
    assert restore(np.ones((32, 32), np.float32), height, width, cfg).shape == (height, width)


def test_shrinking_takes_the_mean_of_the_area():
    image = np.random.default_rng(0).integers(0, 256, (96, 160, 3), dtype=np.uint8)
    by_hand = image.reshape(32, 3, 32, 5, 3).mean((1, 3))
    assert np.abs(prepare_image(image, at()) - by_hand).max() <= 1
    checkers = np.indices((64, 64)).sum(0)[..., None].repeat(3, 2) % 2 * 255
    assert abs(prepare_image(checkers.astype(np.uint8), at()).astype(float).mean() - 127.5) < 1


def test_a_mask_shrinks_by_majority():
    mask = np.random.default_rng(0).random((96, 128)) < 0.5
    expected = mask.reshape(32, 3, 32, 4).mean((1, 3)) > 0.5
    small = prepare_mask(mask, at())
    assert (small >= expected).all() and (small & ~expected).sum() <= 3  # of vanishing lesions


@pytest.mark.parametrize("size", [(64, 128), (128, 64), (50, 70)])
def test_padding_keeps_shapes_and_is_cut_away_again(size):
    disc = np.hypot(*(np.indices(size) - np.array(size).reshape(2, 1, 1) / 2)) < 20
    cfg = at(64, fit="pad")
    small = prepare_mask(disc, cfg)
    tall, wide = (np.ptp(np.flatnonzero(small.any(axis))) + 1 for axis in (1, 0))
    assert abs(int(tall) - int(wide)) <= 1
    back = restore(small.astype(np.float32), *size, cfg) > 0.5
    assert 2 * (back & disc).sum() / (back.sum() + disc.sum()) > 0.93
    border = prepare_image(np.full((*size, 3), 200, np.uint8), cfg)
    assert set(np.unique(border)) == {0, 200} and (border[0] == 0).all() == (size[0] < size[1])


def test_contrast_is_the_lesion_minus_the_ring_around_it():
    image = np.full((64, 64, 3), 102, np.uint8)
    image[20:40, 20:40] = 204
    image[:4] = 0  # far from the lesion
    mask = np.zeros((64, 64), dtype=bool)
    mask[20:40, 20:40] = True
    assert lesion_contrast(image, mask) == pytest.approx(102 / 255)
    assert np.isnan(lesion_contrast(image, np.zeros_like(mask)))
