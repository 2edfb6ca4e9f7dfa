"""The committed study: complete, paired, and enough to draw every figure of it again without training."""

import pandas as pd
import pytest

import lesionkd_core as lkd
from lesionkd_core.figures.style import save
from lesionkd_core.stages import OPTIONS
from tests.conftest import ROOT
from tests.readme_index import STUDY, study

COLUMNS = [
    "run", "dataset", "test_dataset", "profile", "teacher", "arm", "seed", "split", "fold", "case", "group", "lesion_px", "contrast",
    "dice", "iou", "sensitivity", "precision", "hd95", "surface_dice", "missed",
]
ARMS = {"teacher", "alone", "feat", "edge", "method", "shuffled", "kd", "cwd", "dist"}


@pytest.fixture(scope="module")
def scored():
    return lkd.tables.study()


def test_the_tables_have_the_columns_that_were_promised():
    assert list(lkd.tables.committed("per_case"))[: len(COLUMNS)] == COLUMNS
    assert {"run", "hash", "arm", "seed", "parameters", "epochs", "seconds", "device"} <= set(lkd.tables.committed("runs"))
    assert {"run", "arm", "seed", "epoch", "val_dice"} <= set(lkd.tables.committed("history"))


def test_every_arm_is_there_on_the_same_test_cases_with_the_same_seeds(scored):
    assert set(scored["split"]) == {"test"}
    for (_, teacher), part in scored.groupby(["dataset", "teacher"]):
        assert set(part["arm"]) == (ARMS if teacher == "resnet34_unet" else {"teacher", "alone"})
        students = part[part["arm"] != "teacher"].groupby("arm")
        assert len({tuple(sorted(set(p["seed"]))) for _, p in students}) == 1
        assert len({frozenset(zip(p["id"], p["group"], p["lesion_pixels"])) for _, p in part.groupby("arm")}) == 1
        assert not part.duplicated(["arm", "seed", "id"]).any()


def test_runs_and_curves_belong_to_the_scores(scored):
    runs, history = lkd.tables.committed("runs"), lkd.tables.study("history")
    assert set(runs["run"]) == set(history["run"]) == set(scored["run"]) and not runs.duplicated(["hash", "teacher"]).any()
    once = runs.drop_duplicates("run")  # the student alone stands beside either teacher
    assert once["hash"].is_unique and (history.groupby("run")["epoch"].max().sort_index() == once.set_index("run")["epochs"].sort_index()).all()
    assert set(runs.loc[runs["arm"] != "teacher", "parameters"]) == {58_629}


def test_a_missed_lesion_counts_with_dice_0_in_every_mean(scored):
    missed = scored[scored["missed"] == 1]
    assert len(missed) and (missed["dice"] == 0).all() and missed["hd95"].notna().all()


def test_its_figures_and_sentences_are_drawn_again_without_training(scored, tmp_path, monkeypatch):
    monkeypatch.setenv("LESIONKD_RUNS", str(tmp_path / "no-runs"))
    compared = lkd.compare_arms(scored)
    drawn = {
        "study": lambda: lkd.figures.ablation(scored, compared),
        "curves": lambda: lkd.figures.learning_curves(lkd.learning_curves(lkd.tables.study("history").query("arm != 'teacher'"))),
        "pareto": lambda: lkd.figures.pareto(lkd.cost_points(scored, lkd.tables.committed("cost"))),
        "weights": lambda: lkd.figures.weight_sweep(lkd.tables.committed("weights")),
        "options": lambda: lkd.figures.option_sweep(lkd.tables.committed("options")),
    }
    for name, draw in drawn.items():
        for time in "ab":
            save(draw(), name, tmp_path / time)
        assert (tmp_path / "a" / f"{name}.pdf").read_bytes() == (tmp_path / "b" / f"{name}.pdf").read_bytes()
    assert not (tmp_path / "no-runs").exists()
    words = lkd.tables.in_words(compared)
    assert words.count("\n") + 1 == len(compared)
    ratio = lkd.accuracy_ratio(scored).set_index("dataset")["ratio"].dropna()
    assert set(ratio.index) == {"busi"} and 0.9 < ratio["busi"] < 1


def test_the_readme_says_what_the_tables_say():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"{STUDY[0]}\n{study()}\n{STUDY[1]}" in readme


def test_means_and_intervals_of_the_table_by_hand():
    rows = [(arm, seed, case, group, dice) for arm, shift in (("method", 0.1), ("teacher", 0.2)) for seed in ((0, 1) if arm == "method" else (0,))
            for case, group, dice in (("a", "g", 0.5 + shift), ("b", "g", 0.3 + shift + 0.02 * seed), ("c", "h", 0.0))]
    table = pd.DataFrame(rows, columns=["arm", "seed", "id", "group", "dice"]).assign(test_dataset="d", missed=lambda t: (t["dice"] == 0).astype(int))
    shown = lkd.tables.study_scores(lkd.tables.study_means(table)).set_index("arm").iloc[:, 0]
    assert shown.name == "d, 3 cases, 2 seeds"
    assert shown["both (method)"].startswith(f"{(0.6 + 0.4 + 0.6 + 0.42) / 6:.3f} [0.000, 0.5") and shown["both (method)"].endswith("1.0 missed")
    assert shown["teacher"].startswith(f"{(0.7 + 0.5) / 3:.3f} [0.000, 0.600]") and shown["teacher"].endswith("(1 seed)")


def test_every_open_option_was_swept_and_its_default_is_the_method_s_run():
    table = lkd.tables.committed("options")
    cfg = lkd.AblationConfig(profile="cpu")
    dice = table.set_index(["option", "value", "seed"])["val_dice"]
    for seed in table["seed"].unique():
        for option, values in OPTIONS.items():
            assert set(table.query("option == @option and seed == @seed")["value"]) == {str(value) for value in values}
            [own] = [value for value in values if cfg.with_values(**{option: value}) == cfg]
            assert dice[option, str(own), seed] == dice["arm", "method", seed]


def test_the_chosen_weights_are_those_of_the_committed_sweep():
    """Defaults against data/results/weights.csv: the best mean over both seeds, of FitNets and AT over those there are; L_feat's is that of the method."""
    sweep = lkd.tables.committed("weights")
    both = sweep.groupby(["arm", "weight"])["val_dice"].agg(["mean", "count"]).query("count == 2")["mean"]
    cfg = lkd.DistillConfig()
    for arm, default in (("method", cfg.w_edge), ("kd", cfg.w_kd), ("dist", cfg.w_dist)):
        assert both[arm].idxmax() == default, arm
    means = sweep.groupby(["arm", "weight"])["val_dice"].mean()
    assert (means["fitnets"].idxmax(), means["at"].idxmax()) == (cfg.w_fitnets, cfg.w_at)
    assert both["cwd"].max() - both["cwd"][cfg.w_cwd] < 0.001  # a tie


def test_every_difference_stands_once_with_its_interval_and_verdict(scored):
    compared = lkd.compare_arms(scored)
    shown = lkd.tables.study_differences(compared).set_index("method against")
    assert shown.shape == (len(ARMS) - 2, scored["test_dataset"].nunique())
    cells = shown.stack()
    for word in ("better", "worse", "in doubt", "no difference seen"):
        assert cells.str.endswith(f", {word}").sum() == lkd.tables.in_words(compared).count(f": {word} (")
    against = lkd.compare_with(scored)
    assert lkd.tables.study_differences(against).shape == (len(ARMS) - 3, 1 + scored["test_dataset"].nunique())
    row = compared[compared["test_dataset"] == "busi"].set_index("other").loc["alone"]
    [column] = [name for name in shown if name.startswith("busi")]
    assert shown.loc["student alone", column].startswith(f"{row['difference']:+.3f} ({row['low']:+.3f} to {row['high']:+.3f}), p {row['p_holm']:.2g}, ")


def test_a_study_grows_and_holds_every_run_once(tmp_path):
    """A second seed joins the first, a repeated one takes its own place, another data set's rows stay."""
    tiny = {"pixels": 32, "cases": 34, "batch_size": 6, "teacher_epochs": 1, "graph_epochs": 1, "epochs": 1, "threads": 1, "weak_teacher": "allow"}
    cfg = lkd.AblationConfig(dataset="phantom-ct", **tiny, arms="alone, feat", seeds="0")
    quiet = {"tell": lambda *_: None}
    first = lkd.add_to_study(cfg, tmp_path, **quiet)
    lkd.add_to_study(cfg.with_values(dataset="phantom-dermoscopy"), tmp_path, **quiet)
    both = lkd.add_to_study(cfg.with_values(seeds="0, 1"), tmp_path, **quiet)
    per_case, runs = both["per_case"], both["runs"]
    assert list(per_case)[: len(COLUMNS)] == COLUMNS and set(per_case["split"]) == {"test"}
    assert sorted(zip(runs["dataset"], runs["arm"], runs["seed"])) == sorted(
        [("phantom-ct", arm, seed) for arm in ("alone", "feat") for seed in (0, 1)]
        + [("phantom-dermoscopy", arm, 0) for arm in ("alone", "feat")] + [(name, "teacher", 0) for name in ("phantom-ct", "phantom-dermoscopy")]
    )  # fmt: skip
    assert not per_case.duplicated(["dataset", "arm", "seed", "case"]).any() and not runs.duplicated("hash").any()
    again = per_case.merge(first["per_case"], on=["dataset", "arm", "seed", "case", "dice"])
    assert len(again) == len(first["per_case"]) > 0, "the same scores"
    for name, table in both.items():
        written = lkd.store.read_table(tmp_path / f"{name}.csv")
        assert list(written) == list(table) and len(written) == len(table)
