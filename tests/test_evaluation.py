"""Scores of masks against hand computation and brute force."""

import numpy as np
import pandas as pd
import pytest
from scipy.ndimage import binary_dilation, binary_erosion

from lesionkd_core.config import LesionKDError, PrepareConfig
from lesionkd_core.evaluation import bootstrap_mean, mask_dice, score_masks, score_otsu, summarize
from lesionkd_core.prepare import prepare_data
from lesionkd_core.prepare.pixels import RING


def square(*box: int, size: int = 16) -> np.ndarray:
    mask = np.zeros((size, size), bool)
    top, left, bottom, right = box
    mask[top:bottom, left:right] = True
    return mask


EMPTY = np.zeros((16, 16), bool)


def score(predicted, truth) -> pd.Series:
    return score_masks(predicted[None], truth[None]).iloc[0]


def test_overlap_scores_by_hand():
    row = score(square(0, 0, 4, 4), square(0, 2, 4, 8))  # 16 and 24 pixels, 8 in common
    assert row[["dice", "iou", "sensitivity", "precision"]].tolist() == pytest.approx([16 / 40, 8 / 32, 8 / 24, 8 / 16])
    assert (row["lesion_pixels"], row["predicted_pixels"], row["missed"], row["false_alarm"]) == (24, 16, 0, 0)


def test_distances_by_brute_force():
    rng = np.random.default_rng(0)
    for _ in range(5):
        top, left = rng.integers(0, 6, 2)
        predicted, truth = square(top, left, top + 6, left + 5), square(4, 4, 11, 12)
        edges = [np.argwhere(m & ~binary_erosion(m)) for m in (predicted, truth)]
        apart = np.linalg.norm(edges[0][:, None] - edges[1][None], axis=2)
        to_truth, to_predicted = apart.min(1), apart.min(0)
        row = score(predicted, truth)
        assert row["hd95"] == pytest.approx(max(np.percentile(to_truth, 95), np.percentile(to_predicted, 95)), abs=1e-4)
        near = (to_truth <= 2).sum() + (to_predicted <= 2).sum()
        assert row["surface_dice"] == pytest.approx(near / (len(to_truth) + len(to_predicted)), abs=1e-4)


def test_both_empty_is_a_perfect_score():
    row = score(EMPTY, EMPTY)
    assert (row["dice"], row["iou"], row["hd95"], row["surface_dice"]) == (1, 1, 0, 1)
    assert np.isnan(row["sensitivity"]) and np.isnan(row["precision"])
    assert (row["missed"], row["false_alarm"]) == (0, 0)


def test_a_missed_lesion_costs_the_diagonal_and_is_counted():
    row = score(EMPTY, square(2, 2, 5, 5))
    assert (row["dice"], row["sensitivity"], row["missed"], row["false_alarm"]) == (0, 0, 1, 0)
    assert row["hd95"] == pytest.approx(16 * 2**0.5)
    assert np.isnan(row["precision"])


def test_a_false_alarm_is_counted():
    row = score(square(2, 2, 5, 5), EMPTY)
    assert (row["dice"], row["precision"], row["missed"], row["false_alarm"]) == (0, 0, 0, 1)


def test_a_prediction_beside_the_lesion_misses_it():
    row = score(square(0, 0, 3, 3), square(8, 8, 12, 12))
    assert (row["dice"], row["missed"]) == (0, 1) and 0 < row["hd95"] < 16 * 2**0.5


def test_scores_of_a_batch_are_those_of_its_cases():
    rng = np.random.default_rng(1)
    predicted, truth = rng.random((2, 6, 16, 16)) < 0.3
    predicted[2] = truth[3] = False
    alone = pd.concat([score_masks(p[None], t[None]) for p, t in zip(predicted, truth)], ignore_index=True)
    pd.testing.assert_frame_equal(score_masks(predicted, truth), alone)


@pytest.mark.fault
def test_masks_of_unequal_shapes_are_refused():
    with pytest.raises(LesionKDError, match="one shape"):
        score_masks(np.zeros((1, 4, 4)), np.zeros((1, 4, 5)))


def test_summary_counts_what_a_mean_hides():
    table = score_masks(np.stack([EMPTY, square(1, 1, 4, 4), EMPTY]), np.stack([square(1, 1, 4, 4), square(1, 1, 4, 4), EMPTY]))
    summary = summarize(table.assign(group=["a", "b", "c"]))
    assert (summary["cases"], summary["lesions"], summary["missed"], summary["false_alarms"]) == (3, 2, 1, 0)
    assert summary["dice"]["mean"] == pytest.approx(2 / 3, abs=1e-6) and summary["precision"]["undefined"] == 2
    assert summary["precision"]["mean"] == 1


def test_bootstrap_resamples_groups_and_not_cases():
    values = np.repeat(np.random.default_rng(0).normal(size=20), 50)
    by_group = bootstrap_mean(values, np.repeat(np.arange(20), 50))
    by_case = bootstrap_mean(values, np.arange(1000))
    assert (by_group[1] - by_group[0]) > 4 * (by_case[1] - by_case[0])
    error = values[::50].std(ddof=0) / 20**0.5
    assert by_group[1] - by_group[0] == pytest.approx(2 * 1.96 * error, rel=0.1)


def test_contrast_of_a_case_is_the_lesion_against_its_ring():
    prepared = prepare_data(PrepareConfig(dataset="phantom-ultrasound", cases=20, pixels=64, normals="keep"), tell=lambda *_: None)
    table = score_otsu(prepared)
    rows = prepared.index("test")
    assert table["id"].tolist() == prepared.cases["id"].iloc[rows].tolist()
    for got, image, mask in zip(table["contrast"], prepared.images[rows], prepared.masks[rows] > 0):
        grey = image @ np.array([0.299, 0.587, 0.114])
        ring = binary_dilation(mask, np.ones((2 * max(2, round(RING * 64)) + 1,) * 2)) & ~mask
        assert got == pytest.approx(abs(grey[mask].mean() - grey[ring].mean()) / 255, abs=0.005) if mask.any() else np.isnan(got)


def test_dice_between_two_networks_masks_by_hand():
    teacher, student = np.stack([square(0, 0, 4, 4), EMPTY, EMPTY]), np.stack([square(0, 2, 4, 8), EMPTY, square(1, 1, 3, 3)])
    assert mask_dice(teacher, student).tolist() == [16 / 40, 1, 0]
