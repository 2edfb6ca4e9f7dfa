"""The committed study of version 0.1: complete, paired, and drawn again without training."""

import matplotlib.pyplot as plt
import pytest

from lesionkd_core.analysis import figures, statistics, tables

COLUMNS = [
    "run", "dataset", "test_dataset", "profile", "teacher", "arm", "seed", "split", "fold", "case",
    "group", "lesion_px", "contrast", "dice", "iou", "sensitivity", "precision", "hd95",
    "surface_dice", "missed", "false_alarm",
]  # fmt: skip
ARMS = {"teacher", "alone", "feat", "edge", "method", "shuffled", "kd", "cwd", "dist"}


@pytest.fixture(scope="module")
def scored():
    return tables.study()


@pytest.fixture(scope="module")
def compared(scored):
    return statistics.compare_arms(scored)


def test_the_tables_have_their_columns():
    assert list(tables.committed("per_case")) == COLUMNS
    runs, history = set(tables.committed("runs")), set(tables.committed("history"))
    assert {"run", "hash", "arm", "seed", "parameters", "epochs", "seconds", "device"} <= runs
    assert {"run", "arm", "seed", "epoch", "val_dice"} <= history


def test_every_arm_is_scored_on_the_same_test_cases_with_the_same_seeds(scored):
    assert set(scored["split"]) == {"test"}
    for (_, teacher), part in scored.groupby(["dataset", "teacher"]):
        assert set(part["arm"]) == (ARMS if teacher == "resnet34_unet" else {"teacher", "alone"})
        students = part[part["arm"] != "teacher"].groupby("arm")
        assert len({tuple(sorted(set(own["seed"]))) for _, own in students}) == 1
        cases = [
            frozenset(zip(own["id"], own["group"], own["lesion_pixels"]))
            for _, own in part.groupby("arm")
        ]
        assert len(set(cases)) == 1 and not part.duplicated(["arm", "seed", "id"]).any()


def test_runs_and_curves_belong_to_the_scores(scored):
    runs, history = tables.committed("runs"), tables.study("history")
    assert set(runs["run"]) == set(history["run"]) == set(scored["run"])
    once = runs.drop_duplicates("run").set_index("run")  # the student alone is beside two teachers
    assert once["hash"].is_unique
    assert history.groupby("run")["epoch"].max().to_dict() == once["epochs"].to_dict()
    assert set(runs.loc[runs["arm"] != "teacher", "parameters"]) == {58_629}


def test_a_missed_lesion_counts_with_dice_0(scored):
    missed = scored[scored["missed"] == 1]
    assert len(missed) and (missed["dice"] == 0).all() and missed["hd95"].notna().all()


def drawn(scored, compared):
    """Every figure of the study."""
    history = tables.study("history").query("arm != 'teacher' and teacher == 'resnet34_unet'")
    taught = scored[scored["teacher"] == "resnet34_unet"]
    thirds = statistics.by_tertile(scored, draws=500)
    yield "study", lambda: figures.ablation(taught, compared)
    yield "forest", lambda: figures.forest(compared)
    yield "tertiles", lambda: figures.tertiles(thirds)
    yield "curves", lambda: figures.learning_curves(statistics.learning_curves(history))
    yield "gradients", lambda: figures.gradients(history.query("arm == 'method'"))
    yield "agreement", lambda: figures.agreement(taught.query("dataset == 'busi'"), ("method",))
    points = tables.cost_points(scored, tables.committed("cost"))
    yield "pareto", lambda: figures.pareto(points)
    yield "weights", lambda: figures.sweep(tables.committed("weights"))
    yield "options", lambda: figures.sweep(tables.committed("options"))
    yield "latency", lambda: figures.latency(tables.committed("cost"))


def test_its_figures_are_drawn_again_without_training(scored, compared, tmp_path, monkeypatch):
    monkeypatch.setenv("LESIONKD_RUNS", str(tmp_path / "no-runs"))
    for name, draw in drawn(scored, compared):
        first, second = (tmp_path / f"{name}-{i}.svg" for i in (1, 2))
        for path in (first, second):
            fig = draw()
            with figures.style():
                fig.savefig(path, metadata={"Date": None})
            plt.close(fig)
        assert first.read_bytes() == second.read_bytes(), name
    assert not (tmp_path / "no-runs").exists()


def test_its_tables_are_made_again(scored, compared, tmp_path):
    means = statistics.means(scored)
    assert len(means) == 3 * len(ARMS) + 2
    alone = means.query("dataset == 'busi' and teacher == 'resnet34_unet' and arm == 'alone'")
    own = scored.query("dataset == 'busi' and teacher == 'resnet34_unet' and arm == 'alone'")
    assert alone["dice"].item() == pytest.approx(own["dice"].mean())
    for table, name in ((tables.arms(means), "arms"), (tables.differences(compared), "pairs")):
        assert tables.save(table, name, tmp_path).read_text().count(r"\\") == len(table) + 1
        assert "nan" not in tables.markdown(table).data
    assert len(tables.differences(compared)) == len(compared) == 3 * (len(ARMS) - 2)
    values = tables.numbers(means, compared)
    assert "busi method minus alone verdict" in values
    assert "busi unet64 teacher dice" in values


def test_its_verdicts_are_those_of_its_numbers(compared):
    rows = compared.set_index(["dataset", "other"])
    significant = (rows["p_holm"] <= 0.05) & ((rows["low"] > 0) | (rows["high"] < 0))
    assert (rows["verdict"].isin(["better", "worse"]) == significant).all()
    assert (rows["verdict"] == "too few groups").equals(rows["groups"] == 7)
    assert rows.loc[("isic2018", "alone"), "verdict"] == "better"
    assert rows.loc[("isic2018", "feat"), "verdict"] == "worse"
    assert rows.loc[("busi", "shuffled"), "verdict"] == "inconclusive"


def test_the_ratio_to_a_larger_network_is_measured_where_it_was_trained(scored):
    ratio = statistics.accuracy_ratio(scored).set_index("dataset")["ratio"].dropna()
    assert set(ratio.index) == {"busi"} and 0.9 < ratio["busi"] < 1


def test_its_students_had_not_converged():
    """Why the study is repeated: BCE alone, and too few epochs."""
    history = tables.study("history").query("teacher == 'resnet34_unet' and dataset == 'busi'")
    table = statistics.convergence(history)
    assert not table["converged"].any() and (table["change"] > 0).all()
