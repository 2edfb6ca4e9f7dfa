"""Statistics against hand computation, brute force and SciPy."""

import numpy as np
import pandas as pd
import pytest
from scipy.stats import ttest_1samp, wilcoxon

from lesionkd_core.analysis import statistics as st
from lesionkd_core.config import LesionKDError


def scores(arms: dict[str, float], cases: int = 30, seeds: int = 3, noise: float = 0.01, **columns):
    """Dice of some arms: {arm: mean gain}; two cases in each group, the same noise for every arm
    but in its seed."""
    rng, rows = np.random.default_rng(3), []
    levels = rng.normal(0.7, 0.1, cases)
    for arm, gain in arms.items():
        for seed in range(seeds):
            dice = levels + gain + rng.normal(0, noise, cases)
            ids = [f"c{i:02d}" for i in range(cases)]
            groups = [f"g{i // 2:02d}" for i in range(cases)]
            table = pd.DataFrame({"id": ids, "group": groups, "dice": dice})
            rows.append(table.assign(arm=arm, seed=seed, missed=0, lesion_pixels=10, **columns))
    return pd.concat(rows, ignore_index=True)


def arms_of(**dice) -> pd.DataFrame:
    """One seed, one case in each group: {arm: Dice of every case}."""
    parts = []
    for arm, values in dice.items():
        ids = [f"c{i}" for i in range(len(values))]
        parts.append(pd.DataFrame({"id": ids, "group": ids, "dice": values, "arm": arm}))
    return pd.concat(parts, ignore_index=True).assign(
        seed=0, missed=0, lesion_pixels=10, contrast=0.1
    )


def study() -> pd.DataFrame:
    """Two data sets, two teachers, three seeds, missed lesions, a case without a lesion."""
    rng, parts = np.random.default_rng(5), []
    for dataset, teacher, cases in (
        ("busi", "resnet34_unet", 28),
        ("busi", "unet64", 28),
        ("isic2018", "resnet34_unet", 36),
    ):
        number = np.arange(cases)
        pixels = number * 13 % 97 + (number > 0)
        contrast = np.where(pixels > 0, number / 50, np.nan)
        fixed = {"id": [f"c{i:02d}" for i in number], "group": [f"g{i // 2}" for i in number]}
        fixed |= {"lesion_pixels": pixels, "contrast": contrast, "dataset": dataset}
        for arm, seeds in (("teacher", 1), ("method", 3), ("alone", 3), ("shuffled", 3), ("kd", 3)):
            for seed in range(seeds):
                dice = rng.uniform(0.3, 0.9, cases).round(2)
                dice[3] = 0
                table = pd.DataFrame(fixed | {"dice": dice, "missed": (dice == 0).astype(int)})
                parts.append(table.assign(teacher=teacher, arm=arm, seed=seed))
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


# Arms and their differences -----------------------------------------------------------------------


def test_an_arm_is_split_into_its_base_and_its_length():
    names = ("alone", "alone*2", "kd*4", "alone_long", "a*b", "*2")
    assert [st.split_arm(name) for name in names] == [
        ("alone", 1), ("alone", 2), ("kd", 4), ("alone", np.inf), ("a*b", 1), ("*2", 1),
    ]  # fmt: skip


def test_differences_average_seeds_then_groups_of_equal_weight():
    table = scores({"method": 0.05, "alone": 0})
    table.loc[table["group"] == "g01", "group"] = "g00"  # four cases in one group
    by_hand = {}
    for group, cases in table.groupby("group"):
        wide = cases.pivot_table(index="id", columns="arm", values="dice")
        by_hand[group] = (wide["method"] - wide["alone"]).mean()
    row = st.compare_arms(table).iloc[0]
    assert row["difference"] == pytest.approx(np.mean(list(by_hand.values())))
    assert (row["groups"], row["seeds"], row["trainings"]) == (14, 3, 3)
    wide = table.pivot_table(index="group", columns=["arm", "seed"], values="dice")
    for seed in range(3):
        apart = (wide["method", seed] - wide["alone", seed]).mean()
        assert row[f"difference_seed{seed}"] == pytest.approx(apart)


def test_the_test_is_scipys_wilcoxon_on_groups_with_holm_over_all_comparisons():
    table = scores({"method": 0.05, "alone": 0, "feat": 0.001})
    found = st.compare(table)
    pairs = [("method", "alone"), ("method", "feat"), ("feat", "alone")]
    assert list(zip(found["arm"], found["other"])) == pairs
    for row in found.to_dict("records"):
        cases = st.differences(table, row["arm"], row["other"])
        groups = cases.mean(axis=1).groupby("group").mean()
        assert row["p"] == pytest.approx(wilcoxon(groups, zero_method="pratt").pvalue)
    assert found["p_holm"].tolist() == pytest.approx(st.holm(found["p"].to_numpy()).tolist())
    shown = pd.concat([st.compare_arms(table), st.compare_with(table)])
    merged = shown.merge(found, on=["arm", "other"], suffixes=("", "_all"))
    assert (merged["p_holm"] == merged["p_holm_all"]).all(), "one verdict everywhere"


def test_holm_by_hand():
    assert st.holm(np.array([0.01, 0.04, 0.03])).tolist() == pytest.approx([0.03, 0.06, 0.06])
    assert st.holm(np.array([0.5, 0.6])).tolist() == [1.0, 1.0]


@pytest.mark.parametrize("column", ["teacher", "budget"])
def test_all_comparisons_on_a_data_set_are_one_holm_family(column):
    values = [1, 2, 3] if column == "budget" else ["a", "b", "c"]
    parts = [scores({"method": 0.003, "alone": 0}).assign(**{column: v}) for v in values]
    table = pd.concat(parts).assign(dataset="busi", test_dataset="busi")
    other = parts[0].assign(dataset="isic2018", test_dataset="isic2018")
    found = st.compare(pd.concat([table, other]))
    busi, isic = (found[found["dataset"] == name] for name in ("busi", "isic2018"))
    assert len(busi) == 3 and len(isic) == 1
    assert busi["p_holm"].tolist() == pytest.approx(st.holm(busi["p"].to_numpy()).tolist())
    assert isic["p_holm"].tolist() == isic["p"].tolist()


def test_equal_differences_are_ties_in_spite_of_rounding():
    """0.8 - 0.7 and 0.4 - 0.3 differ in the last bit, which must not decide their ranks."""
    table = arms_of(
        method=[0.8, 0.4, 0.5, 0.55, 0.9, 0.1, 0.7], alone=[0.7, 0.3, 0.6, 0.55, 0.7, 0.4, 0.3]
    )
    by_hand = wilcoxon([0.1, 0.1, -0.1, 0, 0.2, -0.3, 0.4], zero_method="pratt").pvalue
    row = st.compare_arms(table).loc[0]
    assert (row["p"], row["better"], row["worse"]) == (pytest.approx(by_hand), 4, 2)


# Intervals ----------------------------------------------------------------------------------------


def test_the_interval_resamples_groups_and_seeds():
    rng = np.random.default_rng(1)
    values = rng.normal(0, 1, (20, 3)) + rng.normal(0, 2, (20, 1)) + np.array([-1, 0, 3])
    values[4, 1] = np.nan
    drawn = [
        np.nanmean(values[np.ix_(rng.integers(20, size=20), rng.integers(3, size=3))])
        for _ in range(20000)
    ]
    assert st.interval(values) == pytest.approx(np.percentile(drawn, [2.5, 97.5]), abs=0.08)


def test_with_folds_a_training_is_a_fold():
    table = scores({"method": 0.02, "alone": 0}, noise=0.05, seeds=2)
    table["fold"] = table["group"].str[1:].astype(int) % 3
    row = st.compare(table).iloc[0]
    cases = st.differences(table, "method", "alone").mean(axis=1)
    by_group = cases.groupby("group").mean()
    folds = [by_group[by_group.index.str[1:].astype(int) % 3 == fold].mean() for fold in range(3)]
    assert [row[f"difference_fold{fold}"] for fold in range(3)] == pytest.approx(folds)
    limits = ttest_1samp(folds, 0).confidence_interval(0.95)
    assert (row["t_low"], row["t_high"]) == pytest.approx(tuple(limits))
    assert row["trainings"] == 3 and "difference_seed0" not in row
    alone = st.means(table).set_index("arm").loc["alone"]
    own = table.query("arm == 'alone' and fold == 1")["dice"].mean()
    assert alone["dice_fold1"] == pytest.approx(own)


def test_means_of_arms_by_hand():
    table = study().query("dataset == 'isic2018'").assign(iou=lambda t: t["dice"] / 2)
    found = st.means(table).set_index("arm")
    assert list(found.index) == ["teacher", "alone", "method", "shuffled", "kd"]
    kd, row = table[table["arm"] == "kd"], found.loc["kd"]
    assert row["dice"] == pytest.approx(kd["dice"].mean())
    assert row["iou"] == pytest.approx(kd["iou"].mean())
    assert row["missed"] == pytest.approx(kd["missed"].sum() / 3)
    assert row[["seeds", "cases", "groups"]].tolist() == [3, 36, 18]
    assert row["dice_seed1"] == pytest.approx(kd[kd["seed"] == 1]["dice"].mean())
    assert row["low"] < row["dice"] < row["high"]


# Verdicts -----------------------------------------------------------------------------------------


def verdicts(table: pd.DataFrame, **options) -> dict[tuple[str, str], str]:
    found = st.compare(table, **options)
    return dict(zip(zip(found["arm"], found["other"]), found["verdict"]))


@pytest.mark.parametrize(
    ("gain", "options", "expected"),
    [
        (0.05, {}, "better"),
        (-0.05, {}, "worse"),
        (0.0, {}, "not significant"),
        (0.05, {"seeds": 1}, "one training"),
        (0.05, {"cases": 8}, "too few groups"),
    ],
)
def test_the_verdict_of_a_clear_case(gain, options, expected):
    table = scores({"method": gain, "alone": 0}, **options)
    assert verdicts(table)["method", "alone"] == expected


def test_seeds_that_disagree_are_inconclusive_however_many_cases_there_are():
    table = scores({"method": 0.0, "alone": 0}, cases=200, noise=0.001)
    for seed, gain in enumerate((0.001, 0.002, 0.03)):
        table.loc[(table["arm"] == "method") & (table["seed"] == seed), "dice"] += gain
    row = st.compare(table).iloc[0]
    assert row["p_holm"] < 1e-9 and row["low"] > 0 > row["t_low"]
    assert row["verdict"] == "inconclusive"


def test_most_groups_that_lose_a_little_are_inconclusive():
    """Significant by ranks, but not in the mean."""
    loss = np.r_[np.full(30, -0.02), np.full(6, 0.12)] + np.linspace(0, 1e-3, 36)
    table = arms_of(method=0.6 + loss, alone=[0.6] * 36)
    row = st.compare(pd.concat([table, table.assign(seed=1)])).iloc[0]
    assert row["p_holm"] < 0.05 and row["low"] < 0 < row["high"]
    assert row["verdict"] == "inconclusive"


def test_a_smaller_distance_is_better():
    table = scores({"method": -4.0, "alone": 0}).rename(columns={"dice": "hd95"})
    row = st.compare(table, metric="hd95").iloc[0]
    assert (row["better"], row["worse"], row["verdict"]) == (15, 0, "better")


@pytest.mark.parametrize("longer", ["alone*2", "alone_long"])
def test_nothing_is_better_that_a_longer_student_alone_reaches(longer):
    arms = {"alone": 0, longer: 0.05, "method": 0.05, "kd": 0.1, "feat*4": 0.05}
    found = verdicts(scores(arms))
    reached = "reached by longer training"
    assert found["method", "alone"] == found["feat*4", "alone"] == reached
    assert found["kd", "alone"] == "better", "it is above the longer student alone, too"
    assert found[longer, "alone"] == "better", "a statement about the length"
    assert found["method", "kd"] == "worse"
    assert verdicts(scores(arms | {longer: -0.01}))["method", "alone"] == "better"


def test_only_a_student_alone_longer_than_the_shorter_of_the_pair_counts():
    table = scores({"alone": 0, "alone*2": 0.1, "method*2": 0.1, "kd*2": 0.0})
    found = verdicts(table, method="method*2")
    assert found["method*2", "kd*2"] == "better", "alone*2 is of equal length"
    assert found["method*2", "alone"] == "reached by longer training"


def test_a_larger_budget_is_a_longer_training():
    short = scores({"alone": 0, "method": 0.05}).assign(budget=20)
    long = scores({"alone": 0.05, "method": 0.1}).assign(budget=80)
    found = st.compare(pd.concat([short, long])).set_index("budget")["verdict"]
    assert found.to_dict() == {20: "reached by longer training", 80: "better"}
    other = st.compare(pd.concat([short, long.assign(labels=0.1), short.assign(labels=1.0)]))
    assert set(other["verdict"]) == {"better"}, "with other labels it is another question"


def test_a_longer_student_alone_with_other_seeds_counts_by_its_mean():
    short = scores({"alone": 0, "method": 0.05}).assign(budget=1)
    long = scores({"alone": 0.05}, seeds=1).assign(budget=2)
    found = st.compare(pd.concat([short, long]))["verdict"]
    assert found.tolist() == ["reached by longer training"]


def test_what_longer_training_adds_by_hand():
    table = scores({"alone": 0, "alone*2": 0.03, "alone*4": 0.035, "method": 0.02})
    found = st.lengths(table)
    assert list(zip(found["arm"], found["other"])) == [
        ("alone*2", "alone"),
        ("alone*4", "alone*2"),
    ]
    direct = st.Comparison.of(table, ("alone*2", "alone")).described()
    assert found.iloc[0][list(direct)].to_dict() == direct
    assert st.lengths(scores({"alone": 0, "method": 0})).empty


# Thirds, ratios, curves ---------------------------------------------------------------------------


def test_thirds_are_cut_on_distinct_lesions():
    ids, pixels = [f"c{i}" for i in range(10)], [0, 10, 20, 30, 40, 50, 60, 70, 80, 90]
    gain = np.repeat([0.5, 0.3, 0.2, -0.1], [1, 3, 3, 3])
    cases = pd.DataFrame({"id": ids, "group": ids, "lesion_pixels": pixels, "seed": 0, "missed": 0})
    missed = [0, 1, 1, 0, 1, 0, 0, 0, 0, 0]
    parts = [cases.assign(arm="method", dice=0.4 + gain)]
    parts += [cases.assign(arm="alone", dice=0.4, missed=missed)]
    parts += [cases.iloc[7:].assign(arm=arm, dice=0.5) for arm in ("feat", "edge")]  # more rows
    thirds = st.by_tertile(pd.concat(parts)).set_index("third")
    expected = {"lowest": 0.3, "middle": 0.2, "highest": -0.1}
    assert thirds["difference"].to_dict() == pytest.approx(expected)
    sizes = thirds[["at_least", "at_most", "cases"]].to_numpy().tolist()
    assert sizes == [[10, 30, 3], [40, 60, 3], [70, 90, 3]]
    assert thirds["missed_other"].tolist() == [2, 1, 0] and thirds["missed"].tolist() == [0, 0, 0]


def test_thirds_of_contrast_leave_out_lesions_without_and_keep_equal_values_together():
    table = arms_of(method=[0.6] * 7, alone=[0.5] * 7)
    table["contrast"] = [0.1, 0.1, 0.1, 0.1, 0.2, 0.3, np.nan] * 2
    thirds = st.by_tertile(table, "contrast")
    assert thirds[["third", "cases"]].to_numpy().tolist() == [["lowest", 4], ["highest", 2]]


def test_the_ratio_to_the_teacher_by_brute_force():
    table, rng = (
        study().query("dataset == 'busi' and teacher == 'unet64'"),
        np.random.default_rng(0),
    )
    wide = table.pivot_table(index=["group", "id"], columns=["arm", "seed"], values="dice")
    blocks = [
        (block["method"].to_numpy(), block["teacher"].to_numpy())
        for _, block in wide.groupby("group")
    ]
    ratios = []
    for _ in range(4000):
        drawn, seeds = rng.integers(len(blocks), size=len(blocks)), rng.integers(3, size=3)
        ours = np.concatenate([blocks[g][0][:, seeds] for g in drawn]).mean()
        ratios.append(ours / np.concatenate([blocks[g][1] for g in drawn]).mean())
    row = st.accuracy_ratio(table).iloc[0]
    limits = np.percentile(ratios, [2.5, 97.5])
    assert (row["low"], row["high"]) == pytest.approx(limits, abs=0.02)
    assert row["ratio"] == pytest.approx(wide["method"].mean().mean() / wide["teacher"].mean()[0])
    assert st.accuracy_ratio(study().query("arm != 'teacher'")).empty


def test_learning_curves_by_hand():
    curves = st.learning_curves(
        history(alone=[[0.2, 0.5], [0.4, 0.3]], method=[[0.6, 0.8], [0.8, 0.6]])
    )
    alone = curves[curves["arm"] == "alone"].drop(columns="arm")
    assert list(alone) == ["epoch", "mean", "low", "high", "seeds"]
    by_hand = [[1, 0.3, 0.2, 0.4, 2], [2, 0.4, 0.3, 0.5, 2]]
    assert alone.to_numpy(float) == pytest.approx(np.array(by_hand))


def test_folds_are_averaged_and_other_repeats_are_refused():
    folds = [history(alone=[[0.2, 0.6]]).assign(fold=0), history(alone=[[0.4, 0.8]]).assign(fold=1)]
    curves = st.learning_curves(pd.concat(folds))
    assert curves["mean"].tolist() == pytest.approx([0.3, 0.7]) and (curves["seeds"] == 1).all()
    with pytest.raises(LesionKDError, match="several runs of one arm and seed"):
        st.learning_curves(pd.concat(folds).drop(columns="fold"))


def test_the_gradient_of_a_term_is_compared_with_that_of_l_seg_in_the_same_arm():
    one = {"epoch": [1, 2, 3], "grad_seg": [1.0, 2.0, 4.0], "grad_edge": [10.0, 10.0, 8.0]}
    edge = pd.DataFrame(one | {"cos_edge": [0.1, -0.3, 0.2]}).assign(arm="edge")
    alone = pd.DataFrame({"epoch": [1], "grad_seg": [1.0], "arm": ["alone"]})
    [row] = st.gradient_norms(pd.concat([edge, alone])).to_dict("records")
    assert (row["arm"], row["term"], row["ratio"]) == ("edge", "edge", 5.0)
    assert (row["cosine"], row["cosine_low"]) == pytest.approx((0.1, -0.1))


# Tables that are odd ------------------------------------------------------------------------------


def test_the_order_of_rows_arms_and_seeds_changes_nothing():
    table = study()
    parts = [part for _, part in sorted(table.groupby(["arm", "seed"]), reverse=True)]
    reordered = pd.concat(parts).sample(frac=1, random_state=1)
    for of in (st.compare, st.by_tertile, st.means, st.accuracy_ratio):
        pd.testing.assert_frame_equal(of(table), of(reordered), check_exact=True, obj=of.__name__)


@pytest.mark.filterwarnings("error")
def test_one_seed_one_group_and_equal_arms_give_no_warning():
    one_seed = st.compare(arms_of(method=[0.5, 0.7, 0.6], alone=[0.4, 0.7, 0.9])).loc[0]
    assert one_seed["low"] < 0 < one_seed["high"] and np.isnan(one_seed["t_low"])
    one_group = st.compare(arms_of(method=[0.5, 0.7], alone=[0.4, 0.5]).assign(group="g")).loc[0]
    assert (one_group["difference"], one_group["p"]) == (pytest.approx(0.15), 1)
    assert np.isnan([one_group["low"], one_group["high"]]).all()
    assert one_seed["verdict"] == one_group["verdict"] == "one training"
    same = st.compare(scores({"method": 0, "alone": 0}).assign(dice=0.3))
    assert (same[["difference", "low", "high", "t_low", "t_high"]] == 0).all(axis=None)
    assert (same[["p", "p_holm"]] == 1).all(axis=None)
    assert set(same["verdict"]) == {"not significant"}


@pytest.mark.filterwarnings("error")
def test_undefined_precision_is_left_out_and_counted():
    table = arms_of(method=[0, 0, 0, 0], alone=[0, 0, 0, 0])
    table["precision"] = [0.9, np.nan, 0.5, np.nan, 0.8, 0.7, 0.8, np.nan]
    row = st.compare(table, metric="precision").loc[0]
    assert (row["difference"], row["groups"], row["undefined"]) == (pytest.approx(-0.1), 2, 2)
    nothing = st.compare(table.assign(precision=np.nan), metric="precision").loc[0]
    assert np.isnan(nothing["difference"])
    assert (nothing["p"], nothing["groups"], nothing["undefined"]) == (1, 0, 4)


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
        (lambda t: t.drop(index=t.index[0]), "same cases"),
        (lambda t: t.assign(seed=(t["arm"] == "alone").astype(int)), "same cases and seeds"),
    ],
    ids=["splits", "runs", "old table", "cases", "seeds"],
)
def test_a_table_that_cannot_be_compared_says_why(spoil, message):
    with pytest.raises(LesionKDError, match=message):
        st.by_tertile(spoil(arms_of(method=[0.5] * 3, alone=[0.4] * 3)), "contrast")
