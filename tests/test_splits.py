"""Splits: whole groups, folds, official splits, what crosses them; properties over drawn tables."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lesionkd_core.config import ConfigError, PrepareConfig
from lesionkd_core.data.splits import SPLITS, SplitError, crossing, split_cases

properties = settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow])
CVC_CLINICDB = (
    "25 25 17 11 25 24 25 26 22 6 22 25 25 20 20 25 21 20 25 20 19 19 12 25 25 18 25 20 21"
)
"""Frames of its videos."""


def table_of(sizes, seed=0, empty_fraction=0.2):
    """Cases in groups of the given sizes; a fifth has no lesion."""
    groups = np.repeat([f"g{i}" for i in range(len(sizes))], sizes)
    rng = np.random.default_rng(seed)
    share = rng.uniform(0.01, 0.5, len(groups))
    share[rng.random(len(groups)) < empty_fraction] = 0
    ids = [f"c{i:04d}" for i in range(len(groups))]
    columns = {"id": ids, "group": groups, "lesion_fraction": share, "empty": share == 0}
    return pd.DataFrame(columns).assign(official="", volume="")


tables = st.builds(
    table_of, st.lists(st.integers(1, 9), min_size=20, max_size=80), st.integers(0, 999)
)


def whole(splits, table) -> bool:
    return bool((splits.groupby(table["group"]).nunique() == 1).all())


# Drawn splits -------------------------------------------------------------------------------------


@properties
@given(tables, st.integers(0, 2**31 - 1))
def test_groups_are_disjoint_and_every_case_has_a_split(table, seed):
    splits = split_cases(table, PrepareConfig(split_seed=seed))
    assert whole(splits, table) and set(splits) == set(SPLITS)


@properties
@given(tables, st.integers(0, 999))
def test_a_split_does_not_depend_on_the_order_of_the_cases(table, seed):
    cfg = PrepareConfig(split_seed=seed)
    shuffled = split_cases(table.sample(frac=1, random_state=seed), cfg)
    assert (shuffled.sort_index() == split_cases(table, cfg)).all()


@properties
@given(tables, st.integers(2, 5), st.integers(0, 99))
def test_folds_test_every_case_once_and_share_no_group(table, folds, seed):
    cfgs = [
        PrepareConfig(folds=folds, fold=k, split_seed=seed, val_fraction=0.2) for k in range(folds)
    ]
    splits = [split_cases(table, cfg) for cfg in cfgs]
    assert (sum((s == "test").astype(int) for s in splits) == 1).all()
    assert all(whole(s, table) and set(s) == set(SPLITS) for s in splits)


@pytest.mark.parametrize(("val", "test"), [(0.15, 0.2), (0.4, 0.3)])
def test_single_cases_are_split_in_the_fractions_asked_for(val, test):
    cfg = PrepareConfig(val_fraction=val, test_fraction=test)
    share = split_cases(table_of([1] * 1500), cfg).value_counts(normalize=True)
    assert share[list(SPLITS)].tolist() == pytest.approx([1 - val - test, val, test], abs=0.005)


def test_every_split_has_large_small_and_no_lesions_alike():
    seed = 0
    table = table_of([1] * 1500, seed, empty_fraction=0)
    splits = split_cases(table, PrepareConfig(split_seed=seed))
    thirds = pd.qcut(table["lesion_fraction"], 3, labels=False)
    assert np.allclose(pd.crosstab(splits, thirds, normalize="index"), 1 / 3, atol=0.02)
    table = table_of([1] * 1000, seed, empty_fraction=0.3)
    splits = split_cases(table, PrepareConfig(normals="keep", split_seed=seed))
    means = table["empty"].groupby(splits).mean().tolist()
    assert means == pytest.approx([table["empty"].mean()] * 3, abs=0.01)


@pytest.mark.parametrize("units", [6, 9, 20])
def test_a_few_groups_still_fill_every_split(units):
    table = table_of([5] * units, empty_fraction=0)
    share = split_cases(table, PrepareConfig()).value_counts(normalize=True)
    assert share[list(SPLITS)].tolist() == pytest.approx([0.65, 0.15, 0.2], abs=0.17)
    cfgs = [PrepareConfig(folds=5, fold=k, val_fraction=0.2) for k in range(5)]
    assert all((split_cases(table, cfg) == "test").any() for cfg in cfgs)


def test_videos_of_unlike_length_stay_whole_near_the_fractions_and_are_all_tested():
    table = table_of(list(map(int, CVC_CLINICDB.split())), empty_fraction=0)
    splits = split_cases(table, PrepareConfig())
    share = splits.value_counts(normalize=True)
    assert whole(splits, table)
    assert share[list(SPLITS)].tolist() == pytest.approx([0.65, 0.15, 0.2], abs=0.08)
    tested = [
        set(table["group"][split_cases(table, PrepareConfig(split_seed=seed)) == "test"])
        for seed in range(30)
    ]
    assert len(set().union(*tested)) >= 27


def test_groups_with_an_empty_mask_go_to_the_test_split_as_a_whole():
    table = table_of([2] * 100, empty_fraction=0.1)
    splits = split_cases(table, PrepareConfig(normals="test"))
    with_empty = table["group"].isin(table["group"][table["empty"]])
    assert (splits[with_empty] == "test").all() and set(splits[~with_empty]) == set(SPLITS)


def test_a_random_split_lets_groups_cross_and_counts_them():
    table = table_of([3] * 100)
    table["split"] = split_cases(table, PrepareConfig(split="random"))
    trained = set(table["group"][table["split"] == "train"])
    by_hand = {
        name: sum(group in trained for group in table["group"][table["split"] == name])
        for name in ("val", "test")
    }
    assert crossing(table) == by_hand and by_hand["test"] > 30
    table["split"] = split_cases(table, PrepareConfig())
    assert crossing(table) == {"val": 0, "test": 0}


# Few groups ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("sizes", [(6,) * 3, (20, 2, 2, 2), (8, 7, 3, 2, 1)])
def test_three_to_five_groups_fill_every_split(sizes, seed):
    table = table_of(sizes, empty_fraction=0)
    found = split_cases(table, PrepareConfig(split_seed=seed))
    counts = table["group"].groupby(found).nunique()
    assert (counts["train"], counts["val"], counts["test"]) == (len(sizes) - 2, 1, 1)


@pytest.mark.fault
def test_two_groups_are_refused_with_the_options_that_matter():
    words = r"(?s)18 cases in 2 groups, the largest with 9, leave no.*val_fraction.*test_.*group_by"
    with pytest.raises(SplitError, match=words):
        split_cases(table_of([9, 9]), PrepareConfig())


# Official splits ----------------------------------------------------------------------------------


def test_the_official_split_is_kept_and_validation_is_drawn_where_there_is_none():
    table = table_of([1] * 60)
    table["official"] = ["train"] * 40 + ["test"] * 20
    splits = split_cases(table, PrepareConfig(split="official"))
    assert (splits[40:] == "test").all() and set(splits[:40]) == {"train", "val"}
    assert 4 <= (splits == "val").sum() <= 8
    table.loc[30:39, "official"] = "val"
    splits = split_cases(table, PrepareConfig(split="official"))
    assert (splits == table["official"]).all()
    tested = split_cases(table, PrepareConfig(split="official", normals="test"))
    assert (tested == table["official"].mask(table["empty"], "test")).all()
    assert table["empty"][:40].any()


CONTRADICTIONS = {  # words of the error: options
    "fold = 5: the last is 4": {"folds": 5, "fold": 5},
    "folds split by group": {"folds": 3, "split": "random"},
    "/no/such.csv": {"split_file": "/no/such.csv"},
    "'centre, width'": {"window": "lung"},
    "folds or split_file already decide": {"folds": 3, "normals": "test"},
    "'groups', 'official', 'random' or 'test'": {"split": "offical"},
}


@pytest.mark.fault
@pytest.mark.parametrize("words", CONTRADICTIONS)
def test_options_that_contradict_each_other_are_refused(words):
    with pytest.raises(ConfigError, match=words):
        PrepareConfig(**CONTRADICTIONS[words]).digest("u")
