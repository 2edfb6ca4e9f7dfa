"""Facts about the phantom cases that the notebooks rely on."""

import numpy as np
import pytest
from scipy.ndimage import label
from skimage.color import rgb2gray
from skimage.filters import threshold_otsu

from lesionkd_core.datasets.phantom import LOOKS, draw

each_look = pytest.mark.parametrize("look", LOOKS)


def dice(a, b):
    return 2 * np.sum(a & b) / (np.sum(a) + np.sum(b))


def otsu_dice(look, difficulty, cases=60):
    """Mean Dice of Otsu on the non-empty cases: better polarity per look, and per image."""
    scores = []
    for index in range(cases):
        image, mask = draw(look, 7, index, pixels=96, difficulty=difficulty)
        if mask.any():
            grey = rgb2gray(image)
            bright = grey > threshold_otsu(grey)
            scores.append((dice(bright, mask), dice(~bright, mask)))
    scores = np.array(scores)
    return scores.mean(axis=0).max(), scores.max(axis=1).mean()


@each_look
@pytest.mark.parametrize("pixels", [16, 64, 100])
def test_image_is_square_rgb_bytes_and_mask_is_boolean(look, pixels):
    image, mask = draw(look, 0, 0, pixels=pixels)
    assert image.shape == (pixels, pixels, 3) and image.dtype == np.uint8
    assert mask.shape == (pixels, pixels) and mask.dtype == bool


@each_look
def test_a_case_does_not_depend_on_what_was_drawn_before(look):
    five_first = draw(look, 1, 5, 64), draw(look, 1, 3, 64)
    three_first = draw(look, 1, 3, 64), draw(look, 1, 5, 64)
    for case, again in zip(five_first, reversed(three_first), strict=True):
        np.testing.assert_array_equal(case[0], again[0])
        np.testing.assert_array_equal(case[1], again[1])


@each_look
def test_seed_and_index_each_change_the_case(look):
    image = draw(look, 1, 2, 64)[0]
    assert not np.array_equal(image, draw(look, 2, 2, 64)[0])
    assert not np.array_equal(image, draw(look, 1, 3, 64)[0])
    assert not np.array_equal(image, draw(look, 2, 1, 64)[0])


def test_looks_draw_different_lesions():
    masks = [draw(look, 0, 1, 64)[1] for look in LOOKS]
    assert not np.array_equal(masks[0], masks[1]) and not np.array_equal(masks[1], masks[2])


def test_grey_looks_have_three_equal_channels():
    for look in ("phantom-ultrasound", "phantom-ct"):
        image = draw(look, 0, 0, 64)[0]
        assert np.all(image == image[..., :1])


@each_look
def test_outline_is_the_same_at_every_pixel_size(look):
    overlaps = []
    for index in range(30):
        small = draw(look, 4, index, pixels=64)[1]
        share = draw(look, 4, index, pixels=128)[1].reshape(64, 2, 64, 2).mean(axis=(1, 3))
        assert small.any() == (share > 0).any()
        if small.any():
            assert np.all(small[share == 1]) and not np.any(small[share == 0])
            overlaps.append(np.sum(small & (share >= 0.5)) / np.sum(small | (share >= 0.5)))
    assert min(overlaps) > 0.75 and np.mean(overlaps) > 0.9


@each_look
def test_scene_is_the_same_at_every_pixel_size(look):
    likeness = []
    for index in range(10):
        small = draw(look, 4, index, pixels=64)[0].mean(axis=2)
        large = draw(look, 4, index, pixels=128)[0].mean(axis=2)
        blocks = [
            size.reshape(16, n, 16, n).mean(axis=(1, 3)) for size, n in ((small, 4), (large, 8))
        ]
        likeness.append(np.corrcoef(blocks[0].ravel(), blocks[1].ravel())[0, 1])
    assert min(likeness) > 0.9


@each_look
def test_difficulty_changes_the_image_and_not_the_mask(look):
    for index in range(5):
        easy, hard = (draw(look, 2, index, 64, difficulty) for difficulty in (0, 1))
        np.testing.assert_array_equal(easy[1], hard[1])
        assert not np.array_equal(easy[0], hard[0])


@each_look
def test_lesions_vary_in_number_and_size(look):
    masks = [draw(look, 0, index, pixels=48)[1] for index in range(250)]
    counts = np.array([label(mask, np.ones((3, 3)))[1] for mask in masks])
    areas = np.array([mask.mean() for mask in masks])[counts > 0]
    assert 0.03 < np.mean(counts == 0) < 0.14  # 0.08 expected
    assert 0.08 < np.mean(counts > 1) < 0.23  # 0.15 expected
    assert counts.max() >= 3
    assert np.quantile(areas, 0.02) > 0.005 and areas.max() < 0.3
    assert np.quantile(areas, 0.9) > 5 * np.quantile(areas, 0.1)


@each_look
def test_otsu_does_not_solve_it_and_does_worse_the_harder_it_is(look):
    scores = {difficulty: otsu_dice(look, difficulty) for difficulty in (0, 0.5, 1)}
    assert max(scores[0.5]) < 0.6
    assert scores[0][0] > scores[0.5][0] > scores[1][0]
    assert scores[0][0] > scores[1][0] + 0.1


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("look", {"look": "phantom-xray"}),
        ("difficulty", {"difficulty": -0.1}),
        ("difficulty", {"difficulty": 1.5}),
        ("difficulty", {"difficulty": float("nan")}),
        ("pixels", {"pixels": 8}),
        ("pixels", {"pixels": 64.5}),
        ("seed", {"seed": -1}),
        ("index", {"index": -1}),
    ],
)
def test_a_bad_argument_is_named(name, arguments):
    with pytest.raises(ValueError, match=f"^{name} is "):
        draw(**({"look": LOOKS[0], "seed": 0, "index": 0} | arguments))
