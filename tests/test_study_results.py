"""The committed study: complete and paired. Notebook 06 draws its figures."""

from __future__ import annotations

import pandas as pd
import pytest

from lesionkd_core.analysis import statistics, tables
from lesionkd_core.losses import TERMS

ARMS = {"alone", "feat", "edge", "method", "shuffled", "kd", "cwd", "dist", "sobel", "alone_long"}
SIX = {"alone", "feat", "method", "shuffled", "cwd", "alone_long"}
POLYPS = {"alone", "alone*2", "alone*4", "feat", "method", "cwd", "kd", "sobel"}
STUDY = {"em-isbi2012": ARMS, "busi": ARMS, "cvc-clinicdb": SIX, "isic2018": SIX}
STUDY["kvasir-seg"] = POLYPS
"""Arms of each data set."""


@pytest.fixture(scope="module")
def scored():
    return tables.study()


@pytest.fixture(scope="module")
def main(scored):
    return scored[scored["seg_loss"] == "bce_dice"]


def test_the_tables_have_their_columns():
    assert list(tables.committed("per_case")) == [*tables.FIRST, "dice_background", "brier"]
    runs, history = set(tables.committed("runs")), set(tables.committed("history"))
    assert {"run", "hash", "arm", "seed", "parameters", "epochs", "seconds", "device"} <= runs
    assert {"run", "arm", "seed", "epoch", "val_dice"} <= history


def test_every_arm_is_scored_on_the_same_test_cases_with_the_same_seeds(main):
    assert set(main["split"]) == {"test"}
    assert set(main["dataset"]) == set(STUDY)
    for dataset, part in main.groupby("dataset"):
        assert set(part["arm"]) == STUDY[dataset] | {"teacher"}
        students = part[part["arm"] != "teacher"].groupby("arm")
        assert len({tuple(sorted(set(own["seed"]))) for _, own in students}) == 1
        cases = [
            frozenset(zip(own["id"], own["group"], own["fold"], own["lesion_pixels"]))
            for _, own in part.groupby("arm")
        ]
        assert len(set(cases)) == 1 and not part.duplicated(["arm", "seed", "id"]).any()


def test_a_case_is_tested_in_one_fold_only(main):
    assert (main.groupby(["dataset", "id"])["fold"].nunique() == 1).all()


def test_runs_and_curves_belong_to_the_scores(scored):
    runs, history = tables.committed("runs"), tables.study("history")
    further = [tables.study(name) for name in ("recipes", "edges", "few_masks", "sobel")]
    kept = {*scored["run"], *pd.concat(further)["run"]}
    assert set(runs["run"]) == set(history["run"]) == kept
    once = runs.drop_duplicates("run").set_index("run")
    assert once["hash"].is_unique
    assert history.groupby("run")["epoch"].max().to_dict() == once["epochs"].to_dict()
    students = ~runs["arm"].isin(["teacher", "same"])
    assert set(runs.loc[students, "parameters"]) == {58_629}


def test_a_missed_lesion_counts_with_dice_0(scored):
    missed = scored[scored["missed"] == 1]
    assert len(missed) and (missed["dice"] == 0).all() and missed["hd95"].notna().all()


@pytest.fixture(scope="module")
def compared(main):
    return statistics.compare_arms(main)


def test_its_verdicts_are_those_of_its_numbers(compared):
    excludes_0 = [(compared[f"{t}low"] > 0) | (compared[f"{t}high"] < 0) for t in ("", "t_")]
    significant = (compared["p_holm"] <= 0.05) & excludes_0[0] & excludes_0[1]
    verdicts = ["better", "worse", "reached by longer training"]
    assert (compared["verdict"].isin(verdicts) == significant).all()
    few = compared[compared["dataset"] == "em-isbi2012"]
    assert set(few["verdict"]) == {"too few groups"}


def test_default_weights_are_among_those_that_were_compared():
    table = tables.committed("weights").query("dataset == 'busi'")
    for arm, part in table[table["arm"] != "alone"].groupby("arm"):
        assert TERMS[arm].weight in set(part["weight"]), arm
