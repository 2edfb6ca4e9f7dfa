"""Statistics against hand computation, brute force and SciPy."""

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binomtest, wilcoxon

from lesionkd_core import results
from lesionkd_core.analysis import statistics as st
from lesionkd_core.analysis import tables
from lesionkd_core.config import LesionKDError


def table_of_arms(shift: float, seeds: int = 2) -> pd.DataFrame:
    rng = np.random.default_rng(3)
    rows = []
    for case in range(30):
        level = rng.normal(0.7, 0.1)
        for seed in range(seeds):
            for arm, gain in (("method", shift), ("alone", 0.0), ("feat", 0.0)):
                rows.append(
                    {
                        "arm": arm,
                        "seed": seed,
                        "id": f"c{case:02d}",
                        "group": f"g{case // 2}",
                        "dice": level + gain + rng.normal(0, 0.02),
                    }
                )
    return pd.DataFrame(rows)


def made(**columns) -> pd.DataFrame:
    """Columns as given, the others filled in; by default every case is its own group."""
    table = pd.DataFrame(columns)
    defaults = {
        "seed": 0,
        "group": table["id"],
        "dice": 0.5,
        "missed": 0,
        "lesion_pixels": 10,
        "contrast": 0.1,
    }
    return table.assign(**{name: value for name, value in defaults.items() if name not in table})


def arms_of(**dice) -> pd.DataFrame:
    """One seed, one case in each group: {arm: Dice of every case}."""
    return pd.concat(
        [
            made(id=[f"c{i}" for i in range(len(values))], dice=values).assign(arm=arm)
            for arm, values in dice.items()
        ],
        ignore_index=True,
    )


def study() -> pd.DataFrame:
    """Two data sets, two teachers, three seeds, missed lesions, a case without a lesion."""
    rng, parts = np.random.default_rng(5), []
    for dataset, teacher, cases in (
        ("busi", "resnet34_unet", 28),
        ("busi", "unet64", 28),
        ("isic2018", "resnet34_unet", 36),
    ):
        ids, pixels = (
            [f"c{i:02d}" for i in range(cases)],
            np.arange(cases) * 13 % 97 + (np.arange(cases) > 0),
        )
        for arm, seeds in (("teacher", 1), ("method", 3), ("alone", 3), ("shuffled", 3), ("kd", 3)):
            for seed in range(seeds):
                dice = rng.uniform(0.3, 0.9, cases).round(2)
                dice[3] = 0
                parts.append(
                    pd.DataFrame(
                        {
                            "dataset": dataset,
                            "teacher": teacher,
                            "arm": arm,
                            "seed": seed,
                            "id": ids,
                            "group": [f"g{i // 2}" for i in range(cases)],
                            "dice": dice,
                            "missed": (dice == 0).astype(int),
                            "lesion_pixels": pixels,
                            "contrast": np.where(pixels > 0, np.arange(cases) / 50, np.nan),
                        }
                    )
                )
    return pd.concat(parts, ignore_index=True)


def history(**val_dice) -> pd.DataFrame:
    """{arm: validation Dice by epoch, one list for each seed}."""
    return pd.DataFrame(
        [
            {"arm": arm, "seed": seed, "epoch": epoch, "val_dice": value}
            for arm, seeds in val_dice.items()
            for seed, values in enumerate(seeds)
            for epoch, value in enumerate(values, start=1)
        ]
    )


def every_table(table: pd.DataFrame) -> dict[str, pd.DataFrame]:
    return {
        "arms": st.compare_arms(table),
        "size": st.by_tertile(table),
        "contrast": st.by_tertile(table, "contrast", other="kd"),
        "with": st.compare_with(table),
        "means": st.means(table),
        "missed": st.compare_missed(table),
        "ratio": st.accuracy_ratio(table),
    }


def test_differences_average_seeds_then_groups():
    table = table_of_arms(0.05)
    by_hand = {}
    for group, cases in table.groupby("group"):
        wide = cases.pivot_table(index="id", columns="arm", values="dice")
        by_hand[group] = (wide["method"] - wide["alone"]).mean()
    got = st.differences(table, "method", "alone").mean(axis=1).groupby("group").mean()
    assert got.to_dict() == pytest.approx(by_hand)
    row = st.compare_arms(table).set_index("other").loc["alone"]
    assert row["difference"] == pytest.approx(np.mean(list(by_hand.values())))
    wide = table.pivot_table(index="group", columns=["arm", "seed"], values="dice")
    for seed in (0, 1):
        assert row[f"difference_seed{seed}"] == pytest.approx(
            (wide["method", seed] - wide["alone", seed]).mean()
        )


def test_every_group_has_the_same_weight():
    table = arms_of(method=[0.6, 0.6, 0.6, 0.4], alone=[0.5, 0.5, 0.5, 0.7]).assign(
        group=["a", "a", "a", "b"] * 2
    )
    assert st.compare_arms(table).loc[0, "difference"] == pytest.approx((0.1 - 0.3) / 2)


def test_comparison_is_scipys_wilcoxon_on_groups_with_holm_over_the_family():
    table = table_of_arms(0.05)
    result = st.compare_arms(table).set_index("other")
    for other in ("alone", "feat"):
        groups = st.differences(table, "method", other).mean(axis=1).groupby("group").mean()
        assert result.loc[other, "p"] == pytest.approx(wilcoxon(groups, zero_method="pratt").pvalue)
        assert (
            result.loc[other, "low"] < result.loc[other, "difference"] < result.loc[other, "high"]
        )
    assert (result["low"] > 0).all() and (result["groups"] == 15).all()
    assert result["p_holm"].tolist() == pytest.approx(st.holm(result["p"].to_numpy()).tolist())


def test_equal_differences_are_ties_in_spite_of_rounding():
    """0.8 - 0.7 and 0.4 - 0.3 differ in the last bit, which must not decide their ranks."""
    table = arms_of(
        method=[0.8, 0.4, 0.5, 0.55, 0.9, 0.1, 0.7], alone=[0.7, 0.3, 0.6, 0.55, 0.7, 0.4, 0.3]
    )
    by_hand = wilcoxon([0.1, 0.1, -0.1, 0, 0.2, -0.3, 0.4], zero_method="pratt").pvalue
    row = st.compare_arms(table).loc[0]
    assert (row["p"], row["better"], row["worse"]) == (pytest.approx(by_hand), 4, 2)


def test_no_difference_gives_an_interval_over_zero():
    result = st.compare_arms(table_of_arms(0.0)).set_index("other").loc["alone"]
    assert result["low"] < 0 < result["high"]


def test_holm_by_hand():
    assert st.holm(np.array([0.01, 0.04, 0.03])).tolist() == pytest.approx([0.03, 0.06, 0.06])
    assert st.holm(np.array([0.5, 0.6])).tolist() == [1.0, 1.0]


def test_each_data_set_and_teacher_is_a_holm_family():
    table = study()
    found = st.compare_arms(table)
    assert len(found) == 9 and found[["dataset", "teacher"]].drop_duplicates().shape[0] == 3
    for (dataset, teacher), family in found.groupby(["dataset", "teacher"]):
        alone = st.compare_arms(
            table[(table["dataset"] == dataset) & (table["teacher"] == teacher)].drop(
                columns=["dataset", "teacher"]
            )
        )
        pd.testing.assert_frame_equal(
            family.drop(columns=["dataset", "teacher"]).reset_index(drop=True), alone
        )
        p = sorted(family["p"])
        assert family["p_holm"].min() == pytest.approx(min(1, 3 * p[0]))
    assert "teacher" not in set(found["other"])


def test_the_interval_resamples_groups_and_seeds():
    rng = np.random.default_rng(1)
    values = rng.normal(0, 1, (20, 3)) + rng.normal(0, 2, (20, 1)) + np.array([-1, 0, 3])
    values[4, 1] = np.nan
    drawn = [
        np.nanmean(values[np.ix_(rng.integers(20, size=20), rng.integers(3, size=3))])
        for _ in range(20000)
    ]
    assert st.interval(values) == pytest.approx(np.percentile(drawn, [2.5, 97.5]), abs=0.08)
    seeds_kept = st.interval(values[:, :1])
    assert seeds_kept[1] - seeds_kept[0] == pytest.approx(
        2 * 1.96 * values[:, 0].std() / 20**0.5, rel=0.08
    )


def test_arms_against_the_student_alone_are_another_holm_family():
    table = study()
    found = st.compare_with(table, draws=200)
    turned = (
        st.compare_arms(table, "alone", draws=200).query("other != 'method'").reset_index(drop=True)
    )
    assert (
        found["arm"].tolist() == turned["other"].tolist()
        and set(found["other"]) == {"alone"}
        and "method" not in set(found["arm"])
    )
    for ours, theirs in (("difference", "difference"), ("low", "high"), ("high", "low")):
        assert found[ours].to_numpy() == pytest.approx(-turned[theirs].to_numpy(), abs=1e-9)
    assert (found["better"] == turned["worse"]).all()
    for _, family in found.groupby(["dataset", "teacher"]):
        first, second = sorted(family["p"])
        assert sorted(family["p_holm"]) == pytest.approx(
            sorted([min(2 * first, 1), max(min(2 * first, 1), second)])
        )
    shown = tables.differences(found)
    assert set(shown["arm"]) == {"both, edges shuffled", "logit KD"}
    assert set(shown["minus"]) == {"student alone"}


def test_the_mean_over_cases_and_seeds_leaves_out_undefined_scores():
    index = pd.MultiIndex.from_tuples([("g", "a"), ("g", "b"), ("h", "c")], names=["group", "id"])
    scored = pd.DataFrame({0: [1.0, np.nan, 0.0], 1: [0.5, 0.5, np.nan]}, index)
    mean, low, high = st.case_mean(scored)
    assert mean == pytest.approx(0.5) and low == 0 and high == pytest.approx(1)
    assert np.isnan(st.case_mean(scored * np.nan)).all()


def test_the_verdict_needs_the_interval_and_the_test():
    """Most groups lose a little, a few gain much: significant by ranks, but not in the mean."""
    loss = np.r_[np.full(30, -0.02), np.full(6, 0.12)] + np.linspace(0, 1e-3, 36)
    row = st.compare_arms(arms_of(method=0.6 + loss, alone=[0.6] * 36)).iloc[0]
    assert row["p_holm"] < 0.05 and row["low"] < 0 < row["high"]
    assert row["verdict"] == "inconclusive"
    clear = st.compare_arms(arms_of(method=0.6 + np.abs(loss), alone=[0.6] * 36)).iloc[0]
    worse = st.compare_arms(arms_of(method=0.6 - np.abs(loss), alone=[0.6] * 36)).iloc[0]
    assert (clear["verdict"], worse["verdict"]) == ("better", "worse")
    assert st.compare_arms(table_of_arms(0.0))["verdict"].tolist() == ["not significant"] * 2


def test_a_difference_is_better_only_after_holm():
    rng = np.random.default_rng(0)
    arms = {f"arm{i}": 0.5 + rng.normal(0, 1e-3, 30) for i in range(20)}
    gain = np.r_[np.full(20, 0.01), np.full(10, -0.009)] + rng.normal(0, 1e-3, 30)
    table = st.compare_arms(arms_of(method=0.5 + gain, **arms))
    row = table[(table["p"] < 0.05) & (table["low"] > 0)].iloc[0]
    assert row["p_holm"] > 0.05 and row["verdict"] == "inconclusive"


def test_few_groups_cannot_be_significant():
    few = arms_of(method=[0.7, 0.8, 0.75, 0.9], alone=[0.5, 0.6, 0.55, 0.6])
    row = st.compare_arms(few).iloc[0]
    assert row["low"] > 0 and row["p_holm"] == 0.125 and row["verdict"] == "too few groups"
    enough = arms_of(method=np.arange(6) / 10 + 0.2, alone=np.arange(6) / 11)
    assert st.compare_arms(enough).iloc[0][["p_holm", "verdict"]].tolist() == [0.03125, "better"]


def test_a_missed_lesion_counts_in_every_mean():
    table = arms_of(method=[0.8, 0.8, 0.8], alone=[0.8, 0.0, 0.8]).assign(missed=[0, 0, 0, 0, 1, 0])
    assert st.compare_arms(table).loc[0, "difference"] == pytest.approx(0.8 / 3)
    thirds = st.by_tertile(table.assign(lesion_pixels=[1, 2, 3] * 2))
    assert thirds["difference"].tolist() == pytest.approx([0, 0.8, 0]) and thirds[
        "missed_other"
    ].tolist() == [0, 1, 0]
    assert st.compare_missed(table)[["missed", "missed_other"]].values.tolist() == [[0, 1]]


def test_thirds_are_cut_on_distinct_lesions():
    ids, pixels = [f"c{i}" for i in range(10)], [0, 10, 20, 30, 40, 50, 60, 70, 80, 90]
    gain = np.repeat([0.5, 0.3, 0.2, -0.1], [1, 3, 3, 3])
    table = pd.concat(
        [
            made(id=ids, dice=0.4 + gain, lesion_pixels=pixels, missed=[0] * 10).assign(
                arm="method"
            ),
            made(
                id=ids, dice=[0.4] * 10, lesion_pixels=pixels, missed=[0, 1, 1, 0, 1, 0, 0, 0, 0, 0]
            ).assign(arm="alone"),
            made(id=ids[7:], lesion_pixels=pixels[7:]).assign(arm="feat"),  # rows more, cases not
            made(id=ids[7:], lesion_pixels=pixels[7:]).assign(arm="edge"),
        ]
    )
    thirds = st.by_tertile(table).set_index("third")
    assert thirds["difference"].to_dict() == pytest.approx(
        {"lowest": 0.3, "middle": 0.2, "highest": -0.1}
    )
    assert thirds[["at_least", "at_most", "cases"]].to_numpy().tolist() == [
        [10, 30, 3],
        [40, 60, 3],
        [70, 90, 3],
    ]
    assert thirds["missed_other"].tolist() == [2, 1, 0] and thirds["missed"].tolist() == [0, 0, 0]


def test_thirds_of_contrast_leave_out_lesions_without_and_keep_equal_values_together():
    table = arms_of(method=[0.6] * 7, alone=[0.5] * 7).assign(
        contrast=[0.1, 0.1, 0.1, 0.1, 0.2, 0.3, np.nan] * 2
    )
    thirds = st.by_tertile(table, "contrast")
    assert thirds[["third", "cases"]].to_numpy().tolist() == [["lowest", 4], ["highest", 2]]


def test_missed_lesions_are_compared_by_mcnemars_exact_test():
    ours, theirs = [1] + [0] * 8 + [1] * 5 + [0] * 6, [0] + [1] * 8 + [1] * 5 + [0] * 6
    ids = [f"c{i:02d}" for i in range(20)]
    table = pd.concat(
        [
            made(id=ids, missed=ours).assign(arm="method"),
            made(id=ids, missed=theirs).assign(arm="alone"),
        ]
    )
    row = st.compare_missed(table).loc[0]
    assert row["p"] == pytest.approx(2 * (1 + 9) / 2**9)
    assert (row["lesions"], row["missed"], row["missed_other"], row["fewer"], row["more"]) == (
        20,
        6,
        13,
        8,
        1,
    )
    frames = table.assign(group=["v"] * 15 + ["w"] * 5 + ["v"] * 15 + ["w"] * 5)
    assert (st.compare_missed(frames).loc[0, ["fewer", "p"]] == [1, 1]).all(), (
        "frames of one video count once"
    )


def test_a_lesion_counts_for_the_arm_that_misses_it_with_fewer_seeds():
    ours = {"a": [0, 0, 1], "b": [1, 1, 1], "c": [0, 0, 0], "d": [1, 1, 0]}
    theirs = {"a": [0, 1, 1], "b": [1, 1, 1], "c": [1, 1, 1], "d": [0, 1, 0]}
    table = pd.concat(
        [
            made(id=[i] * 3, seed=[0, 1, 2], missed=missed).assign(arm=arm)
            for arm, cases in (("method", ours), ("alone", theirs))
            for i, missed in cases.items()
        ]
    )
    row = st.compare_missed(table).loc[0]
    assert (row["fewer"], row["more"], row["missed"], row["missed_other"]) == (2, 1, 2.0, 3.0)
    assert row["p"] == pytest.approx(binomtest(2, 3).pvalue)


def test_the_gradient_of_a_term_is_compared_with_that_of_l_seg_in_the_same_arm():
    one = {
        "epoch": [1, 2, 3],
        "grad_seg": [1.0, 2.0, 4.0],
        "grad_edge": [10.0, 10.0, 8.0],
        "cos_edge": [0.1, -0.3, 0.2],
    }
    history = pd.concat(
        [
            pd.DataFrame(one).assign(arm="edge"),
            pd.DataFrame({"epoch": [1], "grad_seg": [1.0], "arm": ["alone"]}),
        ]
    )
    [row] = st.gradient_norms(history).to_dict("records")
    assert (row["arm"], row["term"], row["ratio"], row["cosine"], row["cosine_low"]) == (
        "edge",
        "edge",
        5.0,
        pytest.approx(0.1),
        pytest.approx(-0.1),
    )


def test_the_ratio_to_the_reference_network_is_that_of_the_means():
    table = study()
    ours = table.query("arm == 'method' and dataset == 'busi' and teacher == 'resnet34_unet'")[
        "dice"
    ].mean()
    theirs = table.query("arm == 'teacher' and dataset == 'busi' and teacher == 'unet64'")[
        "dice"
    ].mean()
    row = st.accuracy_ratio(table).set_index(["dataset", "teacher"]).loc[("busi", "resnet34_unet")]
    assert (row["ratio"], row["dice"], row["reference_dice"]) == pytest.approx(
        (ours / theirs, ours, theirs)
    )
    assert row["low"] < row["ratio"] < row["high"] and (
        row["cases"],
        row["groups"],
        row["seeds"],
    ) == (28, 14, 3)


def test_interval_of_the_ratio_by_brute_force():
    table, rng = study().query("dataset == 'busi'"), np.random.default_rng(0)
    wide = table.pivot_table(
        index=["group", "id"], columns=["teacher", "arm", "seed"], values="dice"
    )
    blocks = [
        (block["unet64", "method"].to_numpy(), block["unet64", "teacher"].to_numpy())
        for _, block in wide.groupby("group")
    ]
    ratios = []
    for _ in range(4000):
        drawn, seeds = rng.integers(len(blocks), size=len(blocks)), rng.integers(3, size=3)
        ratios.append(
            np.concatenate([blocks[g][0][:, seeds] for g in drawn]).mean()
            / np.concatenate([blocks[g][1] for g in drawn]).mean()
        )
    row = st.accuracy_ratio(table).set_index("teacher").loc["unet64"]
    assert (row["low"], row["high"]) == pytest.approx(np.percentile(ratios, [2.5, 97.5]), abs=0.02)


def test_without_the_reference_network_the_ratio_is_nan():
    table = st.accuracy_ratio(study().query("dataset == 'isic2018'"))
    assert table["ratio"].isna().all()


def test_the_order_of_rows_arms_and_seeds_changes_nothing():
    table = study()
    reordered = pd.concat(
        [part for _, part in sorted(table.groupby(["arm", "seed"]), reverse=True)]
    ).sample(frac=1, random_state=1)
    for (name, first), second in zip(every_table(table).items(), every_table(reordered).values()):
        pd.testing.assert_frame_equal(first, second, check_exact=True, obj=name)
    curves = history(method=[[0.1, 0.2], [0.3, 0.5]], alone=[[0.2, 0.2], [0.1, 0.4]])
    mixed = curves.sample(frac=1, random_state=2)
    pd.testing.assert_frame_equal(st.learning_curves(curves), st.learning_curves(mixed))


@pytest.mark.filterwarnings("error")
def test_one_seed_one_group_and_equal_arms_give_no_warning():
    one_seed = st.compare_arms(arms_of(method=[0.5, 0.7, 0.6], alone=[0.4, 0.7, 0.9])).loc[0]
    assert one_seed["covers"] == "cases" and one_seed["low"] < 0 < one_seed["high"]
    one_group = st.compare_arms(arms_of(method=[0.5, 0.7], alone=[0.4, 0.5]).assign(group="g")).loc[
        0
    ]
    assert (one_group["difference"], one_group["p"], one_group["covers"]) == (
        pytest.approx(0.15),
        1,
        "nothing",
    )
    assert np.isnan(one_group["low"]) and np.isnan(one_group["high"])
    same = st.compare_arms(table_of_arms(0.0).assign(dice=0.3))
    assert (same[["difference", "low", "high"]] == 0).all(axis=None) and (
        same[["p", "p_holm"]] == 1
    ).all(axis=None)
    assert (same[["better", "worse"]] == 0).all(axis=None) and (
        same["covers"] == "cases and seeds"
    ).all()
    assert one_seed["verdict"] == one_group["verdict"] == "too few groups"
    assert set(same["verdict"]) == {"not significant"}


@pytest.mark.filterwarnings("error")
def test_undefined_precision_is_left_out_and_counted():
    table = arms_of(method=[0, 0, 0, 0], alone=[0, 0, 0, 0]).assign(
        precision=[0.9, np.nan, 0.5, np.nan, 0.8, 0.7, 0.8, np.nan]
    )
    row = st.compare_arms(table, metric="precision").loc[0]
    assert (row["difference"], row["groups"], row["undefined"]) == (pytest.approx(-0.1), 2, 2)
    nothing = st.compare_arms(table.assign(precision=np.nan), metric="precision").loc[0]
    assert np.isnan(nothing["difference"]) and (
        nothing["p"],
        nothing["groups"],
        nothing["undefined"],
    ) == (1, 0, 4)


@pytest.mark.filterwarnings("error")
def test_tables_of_constants_and_of_cases_without_a_lesion_give_no_warning():
    flat = arms_of(teacher=[0.5] * 3, method=[0.5] * 3, alone=[0.0] * 3)
    zero = flat.assign(teacher="unet64", dice=0.0)
    assert st.accuracy_ratio(zero)["ratio"].isna().all()
    normals = flat.assign(lesion_pixels=0, contrast=np.nan)
    pairs = (
        st.compare_arms(flat[flat["arm"] == "alone"]),
        st.compare_with(flat[flat["arm"] == "method"]),
    )
    for table in (st.by_tertile(normals), st.compare_missed(normals), *pairs):
        assert table.empty


def test_a_smaller_distance_is_better():
    table = arms_of(method=[0] * 8, alone=[0] * 8).assign(
        hd95=[2.0] * 8 + [3.0, 4, 5, 6, 7, 8, 9, 10]
    )
    row = st.compare_arms(table, metric="hd95")
    assert row.loc[0, ["difference", "better", "worse"]].tolist() == [-4.5, 8, 0]
    assert row.loc[0, "verdict"] == "better"
    assert tables.differences(row).loc[0, "HD95 (px), difference"] == "-4.5"


def test_learning_curves_by_hand():
    curves = st.learning_curves(
        history(alone=[[0.2, 0.5], [0.4, 0.3]], method=[[0.6, 0.8], [0.8, 0.6]])
    )
    alone = curves[curves["arm"] == "alone"].drop(columns="arm")
    assert list(alone) == ["epoch", "mean", "low", "high", "seeds"]
    assert alone.to_numpy() == pytest.approx(
        np.array([[1, 0.3, 0.2, 0.4, 2], [2, 0.4, 0.3, 0.5, 2]])
    )


def test_folds_are_averaged_and_other_repeats_are_refused():
    folds = pd.concat(
        [history(alone=[[0.2, 0.6]]).assign(fold=0), history(alone=[[0.4, 0.8]]).assign(fold=1)]
    )
    assert (
        st.learning_curves(folds)["mean"].tolist() == pytest.approx([0.3, 0.7])
        and (st.learning_curves(folds)["seeds"] == 1).all()
    )
    with pytest.raises(LesionKDError, match="several runs of one arm and seed"):
        st.learning_curves(folds.drop(columns="fold"))


def test_a_page_of_differences_names_the_data_set_and_teacher_that_differ():
    shown = tables.differences(st.compare_arms(study(), draws=100))
    assert set(shown["trained on"]) == {"busi", "isic2018"}
    assert set(shown["teacher"]) == {"U-Net 64", "ResNet34-UNet"}
    one = tables.differences(st.compare_arms(study().query("dataset == 'isic2018'"), draws=100))
    assert list(one) == [
        "arm", "minus", "Dice, difference", "95 % interval", "p (Holm)", "groups", "verdict",
    ]  # fmt: skip


def test_the_verdict_on_missed_lesions_is_that_of_the_exact_test():
    ids = [f"c{i:02d}" for i in range(12)]
    none, nine = made(id=ids, missed=[0] * 12), made(id=ids, missed=[1] * 9 + [0] * 3)
    table = pd.concat([none.assign(arm="method"), nine.assign(arm="alone")])
    row = st.compare_missed(table).loc[0]
    assert row["p"] == pytest.approx(2 / 2**9) and row["verdict"] == "fewer"
    turned = table.replace({"arm": {"method": "alone", "alone": "method"}})
    assert st.compare_missed(turned).loc[0, "verdict"] == "more"
    assert st.compare_missed(table.assign(missed=0)).loc[0, "verdict"] == "not significant"


def test_convergence_by_hand():
    flat, rising = [0.1, 0.3, 0.5, 0.6, 0.60, 0.62, 0.612, 0.614], [0.1 * i for i in range(8)]
    table = st.convergence(history(alone=[flat, flat], method=[flat, rising]).assign(dataset="d"))
    assert list(table["arm"]) == ["alone", "alone", "method", "method"]
    assert table["third"].tolist() == pytest.approx([0.61, 0.61, 0.61, 0.45])
    assert table["last"].tolist() == pytest.approx([0.613, 0.613, 0.613, 0.65])
    assert table["change"].tolist() == pytest.approx([0.003, 0.003, 0.003, 0.2])
    assert table["converged"].tolist() == [True, True, True, False]
    assert table["arm_change"].tolist() == pytest.approx([0.003, 0.003, 0.1015, 0.1015])
    assert table["arm_converged"].tolist() == [True, True, False, False]
    assert not table["failed"].any() and (table["epochs"] == 8).all()


def test_a_falling_curve_has_not_converged():
    table = st.convergence(history(alone=[[0.5, 0.6, 0.7, 0.65]]))
    assert table.loc[0, "change"] == pytest.approx(-0.05) and not table.loc[0, "converged"]


def test_a_run_below_half_of_its_arms_median_has_failed():
    runs = [[value] * 4 for value in (0.6, 0.62, 0.29, 0.32)]
    failed = st.convergence(history(alone=runs, feat=[[0.0] * 4] * 2))["failed"]
    assert failed.tolist() == [False, False, False, False, True, True]  # the median is 0.46
    failed = st.convergence(history(alone=[*runs, [0.6] * 4]))["failed"]
    assert failed.tolist() == [False, False, True, False, False]  # the median is 0.6


def test_convergence_keeps_folds_and_runs_apart_and_refuses_repeats():
    folds = pd.concat([history(alone=[[0.2, 0.6]]).assign(fold=f, run=f"r{f}") for f in (0, 1)])
    assert len(st.convergence(folds)) == 2
    with pytest.raises(LesionKDError, match="several runs of one arm and seed"):
        st.convergence(folds.drop(columns=["fold", "run"]))


def test_one_epoch_is_not_converged():
    table = st.convergence(history(alone=[[0.5]]))
    assert np.isnan(table.loc[0, "change"]) and not table.loc[0, "converged"]


def test_calibration_by_hand():
    p = np.array([[[0.05, 0.05, 0.95, 1.0], [0.45, 0.45, 0.45, 0.45]]])
    truth = np.array([[[0, 0, 1, 1], [1, 0, 0, 0]]])
    found = st.calibration(p, truth)
    bins = found.bins.set_index("low")
    assert bins["pixels"].tolist() == [2, 0, 0, 0, 4, 0, 0, 0, 0, 2]
    assert bins.loc[0.0, ["predicted", "observed"]].tolist() == pytest.approx([0.05, 0])
    assert bins.loc[0.4, ["predicted", "observed"]].tolist() == pytest.approx([0.45, 0.25])
    assert np.isnan(bins.loc[0.2, "predicted"])
    assert found.ece == pytest.approx((2 * 0.05 + 4 * 0.2 + 2 * 0.025) / 8)
    squared = [0.05**2, 0.05**2, 0.05**2, 0, 0.55**2, 0.45**2, 0.45**2, 0.45**2]
    assert found.brier == pytest.approx(np.mean(squared))


def test_a_network_that_knows_its_uncertainty_is_calibrated():
    rng = np.random.default_rng(0)
    p = rng.uniform(size=(20, 64, 64)).astype(np.float32)
    truth = rng.uniform(size=p.shape) < p
    right, sharpened = st.calibration(p, truth), st.calibration(p**3, truth)
    assert right.ece < 0.01 < 0.2 < sharpened.ece and right.brier < sharpened.brier


@pytest.mark.fault
def test_calibration_of_other_cases_is_refused():
    with pytest.raises(LesionKDError, match="equal shapes"):
        st.calibration(np.zeros((2, 4, 4)), np.zeros((3, 4, 4)))


def test_the_committed_study_is_read_under_the_names_of_this_package(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "CHECKOUT", tmp_path)
    published = study().rename(columns={"id": "case", "lesion_pixels": "lesion_px"})
    results.write_table(tmp_path / "data" / "results" / "per_case.csv", published)
    assert {"case", "lesion_px"} <= set(tables.committed("per_case"))
    pd.testing.assert_frame_equal(st.compare_arms(tables.study()), st.compare_arms(study()))


def test_each_segmentation_loss_is_a_family_of_its_own():
    table = study().query("dataset == 'isic2018' and arm in ['method', 'alone']")
    both = pd.concat([table.assign(seg_loss=name) for name in ("bce", "bce_dice")])
    found = st.compare_arms(both, draws=100)
    assert found["other"].tolist() == ["alone", "alone"]
    assert set(found["seg_loss"]) == {"bce", "bce_dice"}


def test_arms_that_are_named_are_compared_with_the_student_alone():
    table = study().query("dataset == 'isic2018'")
    found = st.compare_with(table, arms=("method", "kd"), draws=100)
    assert found["arm"].tolist() == ["method", "kd"] and set(found["other"]) == {"alone"}
    first = st.compare_arms(table, draws=100).set_index("other").loc["alone"]
    assert found.loc[0, ["difference", "p"]].tolist() == first[["difference", "p"]].tolist()


def test_means_of_arms_by_hand():
    table = study().query("dataset == 'isic2018'").assign(iou=lambda t: t["dice"] / 2)
    found = st.means(table).set_index("arm")
    assert list(found.index) == ["teacher", "alone", "method", "shuffled", "kd"]
    kd = table[table["arm"] == "kd"]
    row = found.loc["kd"]
    assert row["dice"] == pytest.approx(kd["dice"].mean())
    assert row["iou"] == pytest.approx(kd["iou"].mean())
    assert row["missed"] == pytest.approx(kd["missed"].sum() / 3)
    assert row[["seeds", "cases", "groups"]].tolist() == [3, 36, 18]
    assert row["dice_seed1"] == pytest.approx(kd[kd["seed"] == 1]["dice"].mean())
    assert row["low"] < row["dice"] < row["high"]


@pytest.mark.fault
def test_arms_scored_on_other_cases_or_seeds_are_not_compared():
    table = table_of_arms(0.0)
    with pytest.raises(LesionKDError, match="same cases"):
        st.differences(table.drop(index=table.index[0]), "method", "alone")
    with pytest.raises(LesionKDError, match="same cases and seeds"):
        st.compare_arms(table[(table["arm"] != "alone") | (table["seed"] == 0)])


@pytest.mark.fault
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda t: pd.concat([t.assign(split="test"), t.assign(split="val")]),
            "one split.*test, val",
        ),
        (lambda t: pd.concat([t, t.iloc[:1]]), "scored twice"),
        (lambda t: t.drop(columns="contrast"), "no column 'contrast'"),
    ],
    ids=["splits", "runs", "old table"],
)
def test_a_table_that_cannot_be_compared_says_why(spoil, message):
    with pytest.raises(LesionKDError, match=message):
        st.by_tertile(spoil(arms_of(method=[0.5] * 3, alone=[0.4] * 3)), "contrast")
