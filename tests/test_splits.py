"""Splits: whole groups, k folds, official and handed-over splits, what crosses them; properties over many drawn tables."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lesionkd_core import prepare
from lesionkd_core.config import ConfigError
from lesionkd_core.edges import edge_label
from lesionkd_core.leak import leak_splits
from lesionkd_core.prepare import SPLITS, PrepareConfig, SplitError, prepare_data, prepare_image, prepare_mask, split_cases
from lesionkd_core.prepare.splits import crossing

from .test_datasets import lesion, own_folder, picture, save
from .test_prepare import config, quiet, runs  # noqa: F401

properties = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])


def table_of(sizes, seed=0, empty_share=0.2):
    """Cases in groups of the given sizes; a fifth has no lesion."""
    groups = np.repeat([f"g{i}" for i in range(len(sizes))], sizes)
    rng = np.random.default_rng(seed)
    share = np.where(rng.random(len(groups)) < empty_share, 0, rng.uniform(0.01, 0.5, len(groups)))
    ids = [f"c{i:04d}" for i in range(len(groups))]
    return pd.DataFrame({"id": ids, "group": groups, "lesion_share": share, "official": "", "empty": share == 0, "volume": ""})


tables = st.builds(table_of, st.lists(st.integers(1, 9), min_size=20, max_size=80), st.integers(0, 999))


@properties
@given(tables, st.integers(0, 2**31 - 1))
def test_groups_are_disjoint_and_every_case_has_a_split(table, seed):
    splits = split_cases(table, PrepareConfig(split_seed=seed))
    assert (splits.groupby(table["group"]).nunique() == 1).all() and set(splits) == set(SPLITS)


@properties
@given(tables, st.integers(0, 999))
def test_a_split_does_not_depend_on_the_order_of_the_cases(table, seed):
    shuffled = table.sample(frac=1, random_state=seed)
    assert (split_cases(shuffled, PrepareConfig(split_seed=seed)).sort_index() == split_cases(table, PrepareConfig(split_seed=seed))).all()


@properties
@given(tables, st.integers(2, 5), st.integers(0, 99))
def test_the_folds_test_every_case_once_and_share_no_group(table, folds, seed):
    splits = [split_cases(table, PrepareConfig(folds=folds, fold=k, split_seed=seed, val_fraction=0.2)) for k in range(folds)]
    assert (sum((s == "test").astype(int) for s in splits) == 1).all()
    assert all((s.groupby(table["group"]).nunique() == 1).all() and set(s) == set(SPLITS) for s in splits)


def test_folds_are_near_equal_and_see_equal_lesions():
    table = table_of([1] * 1000, empty_share=0)
    splits = pd.DataFrame({k: split_cases(table, PrepareConfig(folds=5, fold=k)) for k in range(5)})
    tested = (splits == "test").to_numpy()
    assert tested.sum(0).tolist() == pytest.approx([200] * 5, abs=2)
    assert [table["lesion_share"][tested[:, k]].mean() for k in range(5)] == pytest.approx([table["lesion_share"].mean()] * 5, abs=0.02)
    assert (splits == "val").to_numpy().sum(0).tolist() == pytest.approx([150] * 5, abs=5)


@pytest.mark.parametrize("units", [6, 7, 9, 12, 20])
def test_a_few_groups_still_fill_every_split_near_the_asked_shares(units):
    table = table_of([5] * units, empty_share=0)
    share = split_cases(table, PrepareConfig()).value_counts(normalize=True)
    assert share[list(SPLITS)].tolist() == pytest.approx([0.65, 0.15, 0.2], abs=0.17)
    tested = [split_cases(table, PrepareConfig(folds=5, fold=k, val_fraction=0.2)) == "test" for k in range(5)]
    assert all(t.any() for t in tested)


def test_every_video_is_tested_in_some_split():
    table = table_of([25, 25, 17, 11, 25, 24, 25, 26, 22, 6, 22, 25, 25, 20, 20, 25, 21, 20, 25, 20, 19, 19, 12, 25, 25, 18, 25, 20, 21], empty_share=0)
    tested = [set(table["group"][split_cases(table, PrepareConfig(split_seed=seed)) == "test"]) for seed in range(30)]
    assert len(set().union(*tested)) >= 27


def test_the_split_is_the_same_at_every_prepared_size_and_look(tmp_path, runs):  # noqa: F811
    folder = own_folder(tmp_path / "mine")
    looks = ({}, {"pixels": 64}, {"clahe": 0.05}, {"fit": "pad", "colour": "grey"}, {"gamma": 2.0})
    assert len({prepare_data(config(folder, **look), quiet).split_hash for look in looks}) == 1


def test_emptiness_is_spread_over_the_splits():
    table = table_of([1] * 1000, empty_share=0.3)
    splits = split_cases(table, PrepareConfig(normals="keep"))
    assert table["empty"].groupby(splits).mean().tolist() == pytest.approx([table["empty"].mean()] * 3, abs=0.01)


def test_cases_without_a_lesion_only_tested_take_their_group_along():
    table = table_of([2] * 100, empty_share=0.1)
    splits = split_cases(table, PrepareConfig(normals="test"))
    with_empty = table["group"].isin(table["group"][table["empty"]])
    assert (splits[with_empty] == "test").all() and set(splits[~with_empty]) == set(SPLITS)


def test_a_random_split_lets_groups_cross_and_counts_them():
    table = table_of([3] * 100)
    table["split"] = split_cases(table, PrepareConfig(split="random"))
    trained = set(table["group"][table["split"] == "train"])
    by_hand = {name: sum(group in trained for group in table["group"][table["split"] == name]) for name in ("val", "test")}
    assert crossing(table) == by_hand and by_hand["test"] > 30
    table["split"] = split_cases(table, PrepareConfig())
    assert crossing(table) == {"val": 0, "test": 0}


def test_the_official_split_is_kept_and_validation_drawn_where_it_is_absent():
    table = table_of([1] * 60)
    table["official"] = ["train"] * 40 + ["test"] * 20
    splits = split_cases(table, PrepareConfig(split="official"))
    assert (splits[40:] == "test").all() and set(splits[:40]) == {"train", "val"} and 4 <= (splits == "val").sum() <= 8
    table.loc[30:39, "official"] = "val"
    assert (split_cases(table, PrepareConfig(split="official")) == table["official"]).all()
    tested = split_cases(table, PrepareConfig(split="official", normals="test"))
    assert (tested == table["official"].mask(table["empty"], "test")).all() and table["empty"][:40].any()


def test_validation_cases_drawn_from_an_official_split_keep_their_groups_whole():
    table = table_of([4] * 30)
    table["official"] = ["train"] * 80 + ["test"] * 40
    splits = split_cases(table, PrepareConfig(split="official"))
    assert (splits.groupby(table["group"]).nunique() == 1).all() and set(splits[:80]) == {"train", "val"}


def test_the_leak_is_measured_on_equal_test_cases_and_as_many_training_cases():
    table = table_of([1] * 40 + [4] * 20)
    table["split"] = split_cases(table, PrepareConfig(split="random"))
    leaking, clean = (leak_splits(table, 0)[name].merge(table[["id", "group"]]) for name in ("leaking", "clean"))
    for split in ("val", "test"):
        leaking_ids, clean_ids, ids = (set(t["id"][t["split"] == split]) for t in (leaking, clean, table))
        assert leaking_ids == clean_ids == ids
    assert (leaking["split"] == "train").sum() == (clean["split"] == "train").sum()
    assert crossing(clean)["test"] == 0 < crossing(leaking)["test"] == crossing(table)["test"]


@pytest.mark.parametrize("write_group", [True, False])
def test_a_split_is_handed_over_as_a_file(tmp_path, runs, write_group):  # noqa: F811
    folder = own_folder(tmp_path / "mine")
    first = prepare_data(config(folder, split_seed=5), quiet)
    table = pd.read_csv(first.path / "split.csv")
    (table if write_group else table[["id", "split"]]).to_csv(tmp_path / "theirs.csv", index=False)
    ours = prepare_data(config(folder, split_seed=0, split_file=str(tmp_path / "theirs.csv")), quiet)
    assert ours.cases["split"].tolist() == first.cases["split"].tolist()
    assert ours.split_hash == first.split_hash


def test_cases_that_the_split_file_does_not_name_are_reported(tmp_path, runs):  # noqa: F811
    folder = own_folder(tmp_path / "mine")
    ids = [f"case_{i:03d}" for i in range(24)]
    table = pd.DataFrame({"id": ids[2:] + ["absent"], "split": ["train", "val", "test"] * 7 + ["train"] * 2})
    table.to_csv(tmp_path / "split.csv", index=False)
    prepared = prepare_data(config(folder, split_file=str(tmp_path / "split.csv")), quiet)
    assert prepared.cases["id"].tolist() == ids[2:] and len(prepared.images) == len(prepared.masks) == len(prepared.edges) == len(prepared.hashes) == 22
    assert prepared.report[["id", "action", "reason"]].values.tolist() == [[name, "dropped", "not in the split file"] for name in ids[:2]]


def test_every_case_keeps_its_own_pixels_whatever_was_left_out_between(tmp_path, runs, monkeypatch):  # noqa: F811
    """Parts of five cases; some have no lesion, some the split file does not name, one part is left out as a whole."""
    empty, unnamed = {2, 9, 21}, {0, 5, 6, 7, 8, 13}
    folder = own_folder(tmp_path / "mine", empty=empty)
    named = [i for i in range(24) if i not in unnamed]
    pd.DataFrame({"id": [f"case_{i:03d}" for i in named], "split": (["train", "val", "test"] * 6)}).to_csv(tmp_path / "split.csv", index=False)
    monkeypatch.setattr(prepare, "PART", 5)
    cfg = config(folder, split_file=str(tmp_path / "split.csv"))
    prepared = prepare_data(cfg, quiet)
    kept = [i for i in named if i not in empty]
    assert prepared.cases["id"].tolist() == [f"case_{i:03d}" for i in kept]
    for row, i in enumerate(kept):
        assert (prepared.images[row] == prepare_image(picture(i), cfg)).all()
        assert (prepared.masks[row] == prepare_mask(lesion(6 + i), cfg)).all()
        assert (prepared.edges[row] == edge_label(prepared.masks[row])).all()


@pytest.mark.fault
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("id\n1\n", "no column split"),
        ("case,split\n1,train\n", "no column id"),
        ("id,split\ncase_000,training\n", "'training'"),
        ("id,split\ncase_000,train\ncase_000,test\n", "'case_000' twice"),
        ("id,split\nA,train\nB,test\n", "none of its 2 ids"),
        ('id,split\n"a,train\n', "cannot be read as a CSV"),
        ("id,split\n" + "".join(f"case_{i:03d},train\n" for i in range(24)), "gives no case of .* to val, test"),
    ],
)
def test_a_split_file_that_cannot_be_used_is_refused(tmp_path, runs, text, words):  # noqa: F811
    (tmp_path / "split.csv").write_text(text)
    with pytest.raises(SplitError, match=words):
        prepare_data(config(own_folder(tmp_path / "mine"), split_file=str(tmp_path / "split.csv")), quiet)
    assert not list(runs.rglob("DONE"))


@pytest.mark.fault
def test_an_official_split_that_is_not_there_is_refused(tmp_path, runs):  # noqa: F811
    with pytest.raises(SplitError, match="24 not said(.|\n)*split = 'groups'"):
        prepare_data(config(own_folder(tmp_path / "mine"), split="official"), quiet)


@pytest.mark.fault
@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"folds": 1}, "at least 2"), ({"fold": 1}, "numbered 0 to 0"), ({"folds": 5, "fold": 5}, "numbered 0 to 4"),
        ({"folds": 3, "split": "random"}, "folds go by group"), ({"split_file": "/no/such.csv"}, "/no/such.csv"),
        ({"window": "lung"}, "'centre, width'"), ({"window": "40"}, "'centre, width'"), ({"window": "40, 0"}, "over 0"),
        ({"folds": 3, "normals": "test"}, "in every fold"),
        ({"split_file": __file__, "normals": "test"}, "says who is tested"), ({"fit": "crop"}, "'stretch' or 'pad'"), ({"gamma": 0.0}, "greater than 0"),
        ({"split": "offical"}, "'groups', 'official', 'random' or 'test'"),
    ],
)
def test_parameters_that_contradict_each_other_are_refused(fields, words):
    with pytest.raises(ConfigError, match=words):
        PrepareConfig(**fields).digest("u")


def test_an_official_split_that_near_duplicates_cross_is_used_with_a_warning(tmp_path, runs):  # noqa: F811
    """A manifest says the split; a copy of a training image lies in test."""
    folder = own_folder(tmp_path / "mine")
    save(folder / "images" / "copy.png", np.clip(picture(0) * 1.03, 0, 255).astype(np.uint8))
    save(folder / "masks" / "copy.png", lesion(6))
    rows = [(f"case_{i:03d}", "train" if i < 16 else "val" if i < 19 else "test") for i in range(24)] + [("copy", "test")]
    lines = [f"images/{name}.png,masks/{name}.png,{split}" for name, split in rows]
    (folder / "list.csv").write_text("\n".join(["image,mask,split", *lines]) + "\n")
    said = []
    prepared = prepare_data(config(folder / "list.csv", split="official"), said.append)
    assert prepared.summary["crossing"] == {"test": 1, "val": 0}
    assert any("warning: 1 test and 0 validation cases share a group" in line for line in said)


def test_everything_can_be_kept_for_testing(tmp_path, runs):  # noqa: F811
    prepared = prepare_data(config(own_folder(tmp_path / "mine", count=3), split="test"), quiet)
    assert prepared.cases["split"].tolist() == ["test"] * 3
