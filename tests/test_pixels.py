"""From the original to the prepared square and back: sizes, looks, and lesions that must not vanish."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lesionkd_core.edges import edge_label
from lesionkd_core.prepare import PrepareConfig, prepare_data, prepare_image, prepare_mask, restore
from lesionkd_core.prepare.pixels import lesion_contrast

from .test_datasets import lesion, own_folder, picture
from .test_prepare import config, quiet, runs  # noqa: F401

properties = settings(deadline=None, max_examples=80)
sizes = st.integers(1, 300)
fits = st.sampled_from(["stretch", "pad"])


def look(**fields):
    return PrepareConfig(**{"pixels": 32, **fields})


@properties
@given(sizes, sizes, fits, st.data())
def test_a_lesion_of_one_pixel_never_vanishes_and_stays_where_it_is(height, width, fit, data):
    y, x = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    mask = np.zeros((height, width), dtype=bool)
    mask[y, x] = True
    cfg = look(fit=fit)
    small = prepare_mask(mask, cfg)
    assert small.any()
    back = restore(small.astype(np.float32), height, width, cfg)
    away = np.abs(np.argwhere(back == back.max()) - (y, x)).min(0)
    assert (away <= np.ceil(np.maximum(height, width) / 32) + 1).all()


@properties
@given(sizes, sizes, fits)
def test_empty_stays_empty_and_any_size_gives_the_prepared_size(height, width, fit):
    cfg = look(fit=fit)
    assert not prepare_mask(np.zeros((height, width), dtype=bool), cfg).any()
    image = prepare_image(np.full((height, width, 3), 90, np.uint8), cfg)
    assert image.shape == (32, 32, 3) and set(np.unique(image)) <= ({90} if fit == "stretch" else {0, 90})
    assert restore(np.ones((32, 32), np.float32), height, width, cfg).shape == (height, width)


@properties
@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 10**6))
def test_the_edge_rule_is_that_of_a_loop_over_pixels(height, width, seed):
    mask = np.random.default_rng(seed).random((height, width)) < 0.5
    expected = np.zeros_like(mask)
    for y in range(height):
        for x in range(width):
            around = [(y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)]
            expected[y, x] = any(0 <= a < height and 0 <= b < width and mask[a, b] != mask[y, x] for a, b in around)
    assert (edge_label(mask) == expected).all()


def test_shrinking_takes_the_mean_of_the_area():
    image = np.random.default_rng(0).integers(0, 256, (96, 160, 3), dtype=np.uint8)
    by_hand = image.reshape(32, 3, 32, 5, 3).mean((1, 3))
    assert np.abs(prepare_image(image, look()) - by_hand).max() <= 1


@pytest.mark.parametrize("size", [(64, 128), (128, 64), (50, 70)])
def test_padding_keeps_the_shape_of_things_and_is_cut_away_again(size):
    disc = np.hypot(*(np.indices(size) - np.array(size).reshape(2, 1, 1) / 2)) < 20
    cfg = look(pixels=64, fit="pad")
    small = prepare_mask(disc, cfg)
    tall, wide = (np.ptp(np.flatnonzero(small.any(axis))) + 1 for axis in (1, 0))
    assert abs(int(tall) - int(wide)) <= 1
    back = restore(small.astype(np.float32), *size, cfg) > 0.5
    assert 2 * (back & disc).sum() / (back.sum() + disc.sum()) > 0.93
    border = prepare_image(np.full((*size, 3), 200, np.uint8), cfg)
    assert set(np.unique(border)) == {0, 200} and (border[0] == 0).all() == (size[0] < size[1])


def test_grey_gamma_and_equalization_do_what_they_are_called():
    image = picture(3, (64, 64))
    grey = prepare_image(image, look(pixels=64, colour="grey"))
    luminance = (image @ np.array([0.299, 0.587, 0.114])).round()
    assert (grey == grey[..., :1]).all() and np.abs(grey[..., 0] - luminance).max() <= 1
    assert np.abs(prepare_image(image, look(pixels=64, gamma=2.0)) - 255 * (image / 255) ** 2).max() <= 0.51
    faint = (100 + image / 16).astype(np.uint8)
    assert prepare_image(faint, look(pixels=64, clahe=0.02)).std() > 3 * faint.std()
    assert (prepare_image(image, look(pixels=64)) == image).all()


def test_contrast_is_the_lesion_against_the_ring_around_it():
    image = np.full((64, 64, 3), 102, np.uint8)
    image[20:40, 20:40] = 204
    image[:4] = 0  # far from the lesion
    mask = np.zeros((64, 64), dtype=bool)
    mask[20:40, 20:40] = True
    assert lesion_contrast(image, mask) == pytest.approx(102 / 255)
    assert np.isnan(lesion_contrast(image, np.zeros_like(mask)))


def test_statistics_are_those_of_the_training_images(tmp_path, runs):  # noqa: F811
    prepared = prepare_data(config(own_folder(tmp_path / "mine")), quiet)
    train = prepared.images[prepared.index("train")].reshape(-1, 3)
    assert prepared.summary["mean"] == pytest.approx(train.mean(0).tolist(), abs=0.01)
    assert prepared.summary["std"] == pytest.approx(train.std(0).tolist(), abs=0.01)


def test_the_look_of_the_configuration_is_what_is_written(tmp_path, runs):  # noqa: F811
    cfg = config(own_folder(tmp_path / "mine"), fit="pad", colour="grey", gamma=0.7)
    prepared = prepare_data(cfg, quiet)
    for row in (0, 11, 23):
        assert (prepared.images[row] == prepare_image(picture(row), cfg)).all()
        assert (prepared.masks[row] == prepare_mask(lesion(6 + row), cfg)).all()
