"""Facts about the phantom that the notebooks rely on."""

import numpy as np
from skimage.color import rgb2gray
from skimage.filters import threshold_otsu

from lesionkd_core.data.phantom import draw


def dice(a, b):
    return 2 * np.sum(a & b) / (np.sum(a) + np.sum(b))


def test_a_case_does_not_depend_on_what_was_drawn_before():
    first = draw(1, 5, 64), draw(1, 3, 64)
    second = draw(1, 3, 64), draw(1, 5, 64)
    for case, again in zip(first, reversed(second), strict=True):
        np.testing.assert_array_equal(case[0], again[0])
        np.testing.assert_array_equal(case[1], again[1])


def test_the_outline_is_the_same_at_every_size():
    overlaps = []
    for index in range(30):
        small = draw(4, index, 64)[1]
        fraction = draw(4, index, 128)[1].reshape(64, 2, 64, 2).mean(axis=(1, 3))
        assert small.any() == (fraction > 0).any()
        if small.any():
            assert np.all(small[fraction == 1]) and not np.any(small[fraction == 0])
            half = fraction >= 0.5
            overlaps.append(np.sum(small & half) / np.sum(small | half))
    assert min(overlaps) > 0.75 and np.mean(overlaps) > 0.9


def test_a_threshold_does_not_solve_it():
    """Mean Dice of Otsu's threshold: one polarity for all images, and the better for each."""
    scores = []
    for index in range(60):
        image, mask = draw(7, index, 96)
        if mask.any():
            grey = rgb2gray(image)
            bright = grey > threshold_otsu(grey)
            scores.append((dice(bright, mask), dice(~bright, mask)))
    scores = np.array(scores)
    assert scores.mean(axis=0).max() < 0.6 and scores.max(axis=1).mean() < 0.6
