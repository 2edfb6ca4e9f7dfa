"""Scoring on other data sets, and the measured leak: all cases, no retraining, near-duplicates counted."""

import numpy as np
import pandas as pd
import pytest

from lesionkd_core import store
from lesionkd_core.config import AblationConfig, ConfigError, DistillConfig
from lesionkd_core.datasets import DatasetNotFound
from lesionkd_core.evaluation import score_masks
from lesionkd_core.external import score_external
from lesionkd_core.inference import load_network, probabilities
from lesionkd_core.leak import measure_leak
from lesionkd_core.prepare import prepare_data
from lesionkd_core.stages import ablate, distill

from .test_datasets import lesion, own_folder, picture, save

TINY = {
    "pixels": 32, "cases": 40, "batch_size": 6,
    "teacher_epochs": 1, "graph_epochs": 1, "epochs": 1, "threads": 1, "device": "cpu", "weak_teacher": "allow", "terms": (),
}


def silent(*_):
    pass


@pytest.fixture(autouse=True)
def fresh(monkeypatch, shared_runs):
    monkeypatch.setenv("LESIONKD_RUNS", str(shared_runs))


@pytest.fixture(scope="module")
def shared_runs(tmp_path_factory):
    return tmp_path_factory.mktemp("external")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """30 cases to train on, and 12 others: three are brightened copies of the first 30, numbers 0, 1 and 27."""
    root = tmp_path_factory.mktemp("data")
    mine, theirs = own_folder(root / "mine", count=30), root / "theirs"
    for i in range(12):
        save(theirs / "images" / f"x{i}.png", np.clip(picture((0, 1, 27)[i]) * 1.03, 0, 255).astype(np.uint8) if i < 3 else picture(100 + i))
        save(theirs / "masks" / f"x{i}.png", lesion(8 + i))
    return mine, theirs


def config(folders, **fields):
    return DistillConfig(**TINY | {"dataset": str(folders[0]), **fields})


def test_all_of_another_data_set_is_scored_by_the_trained_student(folders):
    cfg = config(folders, test_dataset=f"{folders[1]}, phantom-ct")
    run = distill(cfg, silent)
    scored = score_external(run, cfg, silent)
    assert list(scored) == ["theirs", "phantom-ct"]
    prepared = prepare_data(cfg.external(str(folders[1])), silent)
    masks = probabilities(load_network(run).network, prepared.images) > 0.5
    by_hand = score_masks(masks, prepared.masks > 0)
    got = scored["theirs"].per_case
    assert got["id"].tolist() == [f"x{i}" for i in range(12)] and set(got["split"]) == {"test"}
    assert got["dice"].tolist() == pytest.approx(by_hand["dice"].tolist(), abs=1e-6)
    assert scored["theirs"].summary["test"]["dice"]["mean"] == pytest.approx(by_hand["dice"].mean(), abs=1e-5)


def test_what_is_tested_on_does_not_train_anew_and_is_found_again(folders):
    plain, tested = config(folders), config(folders, test_dataset=str(folders[1]))
    assert distill(plain, silent).path == distill(tested, silent).path
    first = score_external(distill(tested, silent), tested, silent)["theirs"]
    before = first.path.joinpath("per_case.csv").stat().st_mtime_ns
    assert score_external(distill(tested, silent), tested, silent)["theirs"].path == first.path
    assert first.path.joinpath("per_case.csv").stat().st_mtime_ns == before


def test_copies_of_training_images_in_another_data_set_are_counted_with_a_warning(folders, tmp_path, monkeypatch):
    everything = pd.DataFrame({"id": [f"case_{i:03d}" for i in range(30)], "split": ["train"] * 20 + ["val"] * 5 + ["test"] * 5})
    everything.to_csv(tmp_path / "split.csv", index=False)
    cfg, said = config(folders, split_file=str(tmp_path / "split.csv"), test_dataset=str(folders[1])), []
    scored = score_external(distill(cfg, silent), cfg, said.append)["theirs"]
    assert scored.summary["near_training"] == 2  # number 27 is a test case
    assert any("2 of 12 cases" in line and "near-duplicates of a training case" in line for line in said)


def test_the_ablation_carries_every_test_data_set_through(folders):
    fields = {n: v for n, v in TINY.items() if n != "terms"} | {"dataset": str(folders[0]), "test_dataset": str(folders[1])}
    ablation = ablate(AblationConfig(**fields, arms="alone, method", seeds=1), silent)
    assert ablation.per_case.groupby("test_dataset")["id"].nunique()["theirs"] == 12
    assert ablation.table[["test_dataset", "arm"]].values.tolist() == [[name, arm] for name in ("mine", "theirs") for arm in ("alone", "method", "teacher")]
    means = ablation.per_case.groupby(["test_dataset", "arm"])["dice"].mean()
    assert ablation.table.set_index(["test_dataset", "arm"])["dice"].to_dict() == pytest.approx(means.to_dict(), abs=1e-6)
    assert ablation.comparison["test_dataset"].tolist() == ["mine", "theirs"]
    difference = ablation.per_case.query("test_dataset == 'theirs'").pivot(index="id", columns="arm", values="dice")
    assert ablation.comparison["difference"].iloc[1] == pytest.approx((difference["method"] - difference["alone"]).mean(), abs=1e-6)


def test_the_other_data_set_is_prepared_as_the_run_was_whatever_else_is_asked(folders):
    cfg = config(folders, fit="pad", gamma=0.7)
    run = distill(cfg, silent)
    asked = config(folders, test_dataset=str(folders[1]), pixels=64)
    made = score_external(run, asked, silent)["theirs"].config
    assert (made["pixels"], made["fit"], made["gamma"]) == (32, "pad", 0.7)


@pytest.mark.fault
def test_two_data_sets_of_one_name_are_refused(folders, tmp_path):
    with pytest.raises(ConfigError, match="two data sets are called 'theirs'"):
        config(folders, test_dataset=f"{folders[1]}, {tmp_path / 'theirs'}")


@pytest.mark.fault
def test_a_test_data_set_that_is_trained_on_is_refused(folders):
    with pytest.raises(ConfigError, match="which is trained on"):
        config(folders, test_dataset=str(folders[0]))


@pytest.mark.fault
def test_a_split_without_training_cases_is_refused_where_something_is_trained(folders):
    with pytest.raises(ConfigError, match="nothing to train on"):
        config(folders, split="test")


@pytest.mark.fault
def test_a_mistyped_test_data_set_is_refused(folders):
    cfg = config(folders, test_dataset="busy")
    with pytest.raises(DatasetNotFound, match="did you mean 'busi'"):
        score_external(distill(config(folders), silent), cfg, silent)


def test_the_leak_compares_the_same_test_cases(tmp_path):
    """Every second image is a copy of the one before, so a random split leaks."""
    for i in range(40):
        save(tmp_path / "twins" / "images" / f"t{i:02d}.png", np.clip(picture(i // 2) * (1 + 0.02 * (i % 2)), 0, 255).astype(np.uint8))
        save(tmp_path / "twins" / "masks" / f"t{i:02d}.png", lesion(6 + i // 2))
    for i in range(40, 80):
        save(tmp_path / "twins" / "images" / f"t{i:02d}.png", picture(100 + i))
        save(tmp_path / "twins" / "masks" / f"t{i:02d}.png", lesion(6 + i % 20))
    cfg = config((tmp_path / "twins", None)).with_values(cases=0)
    table = measure_leak(cfg, silent)
    random = prepare_data(cfg.with_values(split="random"), silent)
    train = set(random.cases["id"].iloc[random.index("train")])
    twin = {f"t{i:02d}": f"t{i ^ 1:02d}" if i < 40 else "" for i in range(80)}
    for _, part in table.groupby("method"):
        assert sorted(part["id"]) == sorted(random.cases["id"].iloc[random.index("test")])
        assert part["near"].tolist() == [int(twin[name] in train) for name in part["id"]] and 0 < part["near"].mean() < 1
    memory = table[(table["method"] == "memory") & (table["near"] == 1)]
    assert (memory["leaking"] == 1).all() and (memory["clean"] < 1).any(), "a memory finds the twin, and without it another lesion"
    runs = [store.read_json(path) for path in (store.runs_root() / "distill").glob("twins-*/config.json")]
    assert len(runs) == 2
