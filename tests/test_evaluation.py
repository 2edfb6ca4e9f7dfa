"""Scores and statistics against hand computation, brute force and SciPy."""

import numpy as np
import pandas as pd
import pytest
from scipy.ndimage import binary_erosion
from scipy.stats import wilcoxon

from lesionkd_core.evaluation import bootstrap_mean, compare_arms, differences, holm, score_masks, summarize


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
    with pytest.raises(ValueError, match="one shape"):
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


def table_of_arms(shift: float, seeds: int = 2) -> pd.DataFrame:
    rng = np.random.default_rng(3)
    rows = []
    for case in range(30):
        level = rng.normal(0.7, 0.1)
        for seed in range(seeds):
            for arm, gain in (("method", shift), ("alone", 0.0), ("feat", 0.0)):
                rows.append({"arm": arm, "seed": seed, "id": f"c{case:02d}", "group": f"g{case // 2}", "dice": level + gain + rng.normal(0, 0.02)})
    return pd.DataFrame(rows)


def test_differences_average_seeds_then_groups():
    table = table_of_arms(0.05)
    by_hand = {}
    for group, cases in table.groupby("group"):
        wide = cases.pivot_table(index="id", columns="arm", values="dice")
        by_hand[group] = (wide["method"] - wide["alone"]).mean()
    got = differences(table, "method", "alone").mean(axis=1)
    assert got.to_dict() == pytest.approx(by_hand)


def test_comparison_is_scipys_wilcoxon_on_groups_with_holm_over_the_family():
    table = table_of_arms(0.05)
    result = compare_arms(table).set_index("other")
    for other in ("alone", "feat"):
        groups = differences(table, "method", other).mean(axis=1)
        assert result.loc[other, "p"] == pytest.approx(wilcoxon(groups, zero_method="pratt").pvalue)
        assert result.loc[other, "low"] < result.loc[other, "difference"] < result.loc[other, "high"]
    assert (result["low"] > 0).all() and (result["groups"] == 15).all()
    assert result["p_holm"].tolist() == pytest.approx(holm(result["p"].to_numpy()).tolist())


def test_no_difference_gives_an_interval_over_zero_and_equal_arms_p_one():
    result = compare_arms(table_of_arms(0.0)).set_index("other").loc["alone"]
    assert result["low"] < 0 < result["high"]
    same = table_of_arms(0.0)
    same["dice"] = same.groupby("id")["dice"].transform("first")
    assert (compare_arms(same)["p"] == 1).all()


def test_holm_by_hand():
    assert holm(np.array([0.01, 0.04, 0.03])).tolist() == pytest.approx([0.03, 0.06, 0.06])
    assert holm(np.array([0.5, 0.6])).tolist() == [1.0, 1.0]


@pytest.mark.fault
def test_arms_scored_on_other_cases_are_not_compared():
    table = table_of_arms(0.0)
    with pytest.raises(ValueError, match="same cases"):
        differences(table.drop(index=table.index[0]), "method", "alone")
