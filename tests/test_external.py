"""Scores on other data sets: all cases, no new training, near-duplicates counted."""

import shutil

import numpy as np
import pandas as pd
import pytest

from lesionkd_core import results
from lesionkd_core.config import AblationConfig, DistillConfig, LesionKDError
from lesionkd_core.data.layouts import DatasetNotFound
from lesionkd_core.data.prepare import prepare
from lesionkd_core.evaluate import held_out_scores, score_external, score_masks
from lesionkd_core.pipeline import ablate, distill
from lesionkd_core.predict import load_network, probabilities
from lesionkd_core.results import Result
from tests.conftest import copy_of
from tests.test_cli import command
from tests.tiny import OPTIONS, image_folder, lesion, picture, save


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """30 cases to train on, and 12 others: three are copies of the first, numbers 0, 1 and 27."""
    root = tmp_path_factory.mktemp("data")
    mine, theirs = image_folder(root / "mine", count=30), root / "theirs"
    for i in range(12):
        copied = np.clip(picture((0, 1, 27)[i % 3]) * 1.03, 0, 255).astype(np.uint8)
        save(theirs / "images" / f"x{i}.png", copied if i < 3 else picture(100 + i))
        save(theirs / "masks" / f"x{i}.png", lesion(8 + i))
    return mine, theirs


@pytest.fixture(scope="module")
def split_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("split") / "split.csv"
    splits = ["train"] * 20 + ["val"] * 5 + ["test"] * 5
    ids = [f"case_{i:03d}" for i in range(30)]
    pd.DataFrame({"id": ids, "split": splits}).to_csv(path, index=False)
    return path


def config(folders, split_file, **options):
    own = {"dataset": str(folders[0]), "losses": "", "epochs": 1, "split_file": str(split_file)}
    return DistillConfig(**OPTIONS | own | options)


@pytest.fixture(scope="module")
def run(folders, split_file):
    cfg = config(folders, split_file, fit="pad")
    return distill(None, None, prepare(cfg), cfg)


def prepared_beside(run):
    """The folder of the arrays that a run was made from."""
    [path] = (
        path
        for path in (run.path.parents[1] / "prepare").iterdir()
        if path.is_dir() and results.Result(path).digest == run.summary["data"]
    )
    return path


def test_all_cases_of_another_data_set_are_scored_as_the_run_was_prepared(folders, run, split_file):
    found = score_external(run, (str(folders[1]), "phantom"))
    assert list(found) == ["theirs", "phantom"]
    data = prepare(config(folders, split_file, fit="pad").for_testing(str(folders[1])))
    masks = probabilities(load_network(run).network, data.images) > 0.5
    by_hand, got = score_masks(masks, data.masks > 0), found["theirs"].per_case
    assert got["id"].tolist() == [f"x{i}" for i in range(12)] and set(got["split"]) == {"test"}
    assert got["dice"].tolist() == pytest.approx(by_hand["dice"].tolist(), abs=1e-6)
    mean = found["theirs"].summary["test"]["dice"]["mean"]
    assert mean == pytest.approx(by_hand["dice"].mean(), abs=1e-5)
    assert (found["theirs"].config["pixels"], found["theirs"].config["fit"]) == (32, "pad")


def test_scores_are_found_again_and_further_test_data_train_nothing(folders, run, split_file):
    first = score_external(run, (str(folders[1]),))["theirs"]
    before = (first.path / "per_case.csv").stat().st_mtime_ns
    assert score_external(run, (str(folders[1]),))["theirs"].path == first.path
    assert (first.path / "per_case.csv").stat().st_mtime_ns == before
    cfg = config(folders, split_file, fit="pad", test_dataset=str(folders[1]))
    assert distill(None, None, prepare(cfg), cfg).path == run.path
    table = held_out_scores(run, cfg.dataset_name, score_external(run, cfg.test_dataset))
    assert table.groupby("test_dataset").size().to_dict() == {"mine": 5, "theirs": 12}


def test_copies_of_training_images_are_counted_with_a_warning(folders, run, runs, messages):
    copy_of(prepared_beside(run), runs)
    found = score_external(run, (str(folders[1]),))["theirs"]
    assert found.summary["near_training"] == 2  # number 27 is a test case
    assert any(
        "2 of 12 cases" in line and "near-duplicates of a training case" in line
        for line in messages()
    )


def test_an_ablation_is_scored_on_every_test_data_set_as_it_is_now(folders, runs, tmp_path):
    other = shutil.copytree(folders[1], tmp_path / "theirs")
    options = OPTIONS | {"epochs": 1, "teacher_epochs": 1, "dataset": str(folders[0])}
    cfg = AblationConfig(**options, test_dataset=str(other), arms="alone, method", seeds=1)
    ablation = ablate(prepare(cfg), cfg)
    cases = ablation.per_case.groupby("test_dataset")["id"].nunique()
    assert cases["theirs"] == 12
    keys = ["test_dataset", "arm"]
    expected = [[d, arm] for d in ("mine", "theirs") for arm in ("alone", "method", "teacher")]
    found = ablation.per_case[keys].drop_duplicates().values.tolist()
    assert sorted(found) == expected
    assert ablate(prepare(cfg), cfg).path == ablation.path
    save(other / "masks" / "x5.png", lesion(20))  # a mask of the other data set is corrected
    again = ablate(prepare(cfg), cfg)
    assert again.path != ablation.path and len(list(runs.glob("distill/*/DONE"))) == 2
    found = again.per_case.query("id == 'x5'")["lesion_pixels"]
    assert (found != ablation.per_case.query("id == 'x5'")["lesion_pixels"].to_numpy()).all()


def test_the_training_images_are_not_needed(folders, run, runs, tmp_path):
    """Copies of training images are not counted where the prepared ones are gone, too."""
    moved = Result(copy_of(run.path, runs))
    prepared = results.with_digest("prepare", run.summary["data"])
    assert prepared is None  # this folder of results has none
    scored = score_external(moved, (str(folders[1]),))["theirs"]
    assert scored.summary["near_training"] is None and len(scored.per_case) == 12


def test_a_published_student_is_scored_on_other_data_and_not_on_its_own(folders, runs):
    code, out, _ = command("score", "kvasir-seg", str(folders[1]))
    assert code == 0 and "\ntheirs: Dice 0." in out
    code, _, error = command("score", "kvasir-seg", "kvasir-seg")
    assert code == 1 and "was trained on kvasir-seg" in error


@pytest.mark.fault
def test_a_mistyped_test_data_set_is_refused(run):
    with pytest.raises(DatasetNotFound, match="did you mean 'busi'"):
        score_external(run, ("busy",))


def test_how_the_own_masks_and_groups_are_read_is_not_asked_of_other_data(folders, split_file):
    cfg = config(folders, split_file, invert_masks=True, group_by="number")
    other = cfg.for_testing(str(folders[1]))
    assert (other.invert_masks, other.group_by, other.pixels) == (False, "", cfg.pixels)


@pytest.mark.fault
def test_two_data_sets_of_one_name_are_refused(folders, run):
    with pytest.raises(LesionKDError, match="two data sets are called 'theirs'; rename a folder"):
        score_external(run, (str(folders[1]), str(folders[1])))
