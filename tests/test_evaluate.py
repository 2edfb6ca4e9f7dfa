"""Scores of masks and probabilities by hand and by brute force; intervals; Otsu's threshold."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from scipy.ndimage import binary_erosion

from lesionkd_core.config import LesionKDError
from lesionkd_core.evaluate import (
    bootstrap_mean,
    score_masks,
    score_network,
    score_otsu,
    soft_dice,
    summarize,
)
from lesionkd_core.predict import load_network, probabilities


def square(*box: int, size: int = 16) -> np.ndarray:
    mask = np.zeros((size, size), bool)
    top, left, bottom, right = box
    mask[top:bottom, left:right] = True
    return mask


EMPTY = np.zeros((16, 16), bool)


def score(predicted, truth) -> pd.Series:
    return score_masks(predicted[None], truth[None]).iloc[0]


# Masks --------------------------------------------------------------------------------------------


def test_overlap_by_hand():
    row = score(square(0, 0, 4, 4), square(0, 2, 4, 8))  # 16 and 24 pixels, 8 in common
    found = row[["dice", "iou", "sensitivity", "precision"]].tolist()
    assert found == pytest.approx([16 / 40, 8 / 32, 8 / 24, 8 / 16])
    counts = row[["lesion_pixels", "predicted_pixels", "missed", "false_alarm"]].tolist()
    assert counts == [24, 16, 0, 0]


def test_distances_by_brute_force():
    rng = np.random.default_rng(0)
    for _ in range(5):
        top, left = rng.integers(0, 6, 2)
        predicted, truth = square(top, left, top + 6, left + 5), square(4, 4, 11, 12)
        edges = [np.argwhere(m & ~binary_erosion(m)) for m in (predicted, truth)]
        apart = np.linalg.norm(edges[0][:, None] - edges[1][None], axis=2)
        to_truth, to_predicted = apart.min(1), apart.min(0)
        row = score(predicted, truth)
        expected = max(np.percentile(to_truth, 95), np.percentile(to_predicted, 95))
        assert row["hd95"] == pytest.approx(expected, abs=1e-4)
        near = (to_truth <= 2).sum() + (to_predicted <= 2).sum()
        expected = near / (len(to_truth) + len(to_predicted))
        assert row["surface_dice"] == pytest.approx(expected, abs=1e-4)


def test_both_empty_is_a_perfect_score():
    row = score(EMPTY, EMPTY)
    assert row[["dice", "iou", "hd95", "surface_dice"]].tolist() == [1, 1, 0, 1]
    assert np.isnan(row["sensitivity"]) and np.isnan(row["precision"])
    assert (row["missed"], row["false_alarm"]) == (0, 0)


def test_a_missed_lesion_costs_the_diagonal_and_is_counted():
    row = score(EMPTY, square(2, 2, 5, 5))
    assert row[["dice", "sensitivity", "missed", "false_alarm"]].tolist() == [0, 0, 1, 0]
    assert row["hd95"] == pytest.approx(16 * 2**0.5) and np.isnan(row["precision"])


def test_scores_of_a_batch_are_those_of_its_cases():
    rng = np.random.default_rng(1)
    predicted, truth = rng.random((2, 6, 16, 16)) < 0.3
    predicted[2] = truth[3] = False
    alone = [score_masks(p[None], t[None]) for p, t in zip(predicted, truth)]
    expected = pd.concat(alone, ignore_index=True)
    pd.testing.assert_frame_equal(score_masks(predicted, truth), expected)


def test_soft_dice_by_hand():
    """Probabilities 0.5 and 0.25 at a lesion of one pixel; then nothing at all; then 0 or 1."""
    probability, truth = np.zeros((3, 1, 2), np.float32), np.zeros((3, 1, 2), bool)
    probability[0], truth[0, 0, 0] = [0.5, 0.25], True
    probability[2], truth[2] = [1, 0], [[True, True]]
    expected = [2 * 0.5 / (0.75 + 1), 1, 2 / 3]
    assert soft_dice(probability, truth).tolist() == pytest.approx(expected)


@pytest.mark.fault
def test_masks_of_unequal_shapes_are_refused():
    with pytest.raises(LesionKDError, match=r"shapes \(1, 4, 4\) and \(1, 4, 5\)"):
        score_masks(np.zeros((1, 4, 4)), np.zeros((1, 4, 5)))


# Networks -----------------------------------------------------------------------------------------


def test_a_network_is_scored_case_by_case(student, data):
    network = load_network(student).network
    table, rows = score_network(network, data), np.r_[data.index("val"), data.index("test")]
    probability, truth = probabilities(network, data.images[rows]), data.masks[rows] > 0
    pd.testing.assert_frame_equal(
        table[score_masks(truth, truth).columns], score_masks(probability > 0.5, truth)
    )
    assert table["soft_dice"].tolist() == pytest.approx(soft_dice(probability, truth).tolist())
    brier = ((probability - truth) ** 2).mean((1, 2))
    assert table["brier"].tolist() == pytest.approx(brier.tolist())
    for name in ("id", "group", "split"):
        assert table[name].tolist() == data.cases[name].iloc[rows].tolist()
    assert table["contrast"].tolist() == data.cases["contrast"].iloc[rows].abs().tolist()


def two_tone(bright: bool) -> SimpleNamespace:
    """Lesions that are brighter, or darker, than what is around them; the last one is wrong."""
    masks = np.stack([square(i, i, i + 6, i + 7) for i in range(6)]).astype(np.uint8)
    images = np.where(masks[..., None] == bright, 200, 50).astype(np.uint8).repeat(3, axis=-1)
    masks[5] = 1 - masks[5]
    cases = pd.DataFrame({"id": list("abcdef"), "group": "g", "label": "", "contrast": 0.5})
    cases["split"] = ["train"] * 3 + ["test"] * 3
    index = lambda split: np.flatnonzero(cases["split"] == split)  # noqa: E731
    return SimpleNamespace(images=images, masks=masks, cases=cases, index=index)


@pytest.mark.parametrize("bright", [True, False])
def test_otsu_takes_the_polarity_that_fits_the_training_cases(bright):
    table = score_otsu(two_tone(bright))
    assert table["id"].tolist() == ["d", "e", "f"]
    assert table["dice"].tolist() == [1, 1, 0]


# Summaries ----------------------------------------------------------------------------------------


def test_a_summary_counts_what_a_mean_hides():
    lesion = square(1, 1, 4, 4)
    table = score_masks(np.stack([EMPTY, lesion, EMPTY]), np.stack([lesion, lesion, EMPTY]))
    summary = summarize(table.assign(group=["a", "b", "c"]))
    counts = [summary[name] for name in ("cases", "groups", "lesions", "missed", "false_alarms")]
    assert counts == [3, 3, 2, 1, 0]
    assert summary["dice"]["mean"] == pytest.approx(2 / 3, abs=1e-6)
    assert summary["precision"]["mean"] == 1 and summary["precision"]["undefined"] == 2


def test_the_bootstrap_resamples_groups_not_cases():
    values = np.repeat(np.random.default_rng(0).normal(size=20), 50)
    by_group = bootstrap_mean(values, np.repeat(np.arange(20), 50))
    by_case = bootstrap_mean(values, np.arange(1000))
    assert (by_group[1] - by_group[0]) > 4 * (by_case[1] - by_case[0])
    error = values[::50].std(ddof=0) / 20**0.5
    assert by_group[1] - by_group[0] == pytest.approx(2 * 1.96 * error, rel=0.1)


def test_undefined_values_are_left_out_of_mean_and_interval():
    values, groups = np.array([0.5, np.nan, 0.7]), np.array(["a", "b", "c"])
    assert bootstrap_mean(values, groups) == bootstrap_mean(values[[0, 2]], groups[[0, 2]])
    assert np.isnan(bootstrap_mean(np.array([np.nan]), np.array(["a"]))).all()


@pytest.mark.fault
def test_probabilities_are_no_masks():
    truth = np.zeros((1, 8, 8), bool)
    with pytest.raises(LesionKDError, match="other than 0 and 1: threshold probabilities"):
        score_masks(np.full((1, 8, 8), 0.1), truth)
