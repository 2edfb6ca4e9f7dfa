"""Tables for notebooks, papers and the study."""

import re

import nbconvert
import nbformat
import numpy as np
import pandas as pd
import pytest

from lesionkd_core import results
from lesionkd_core.analysis import statistics, tables
from lesionkd_core.evaluate import score_masks, summarize
from tests.test_statistics import study


def shown(output) -> str:
    """The HTML of a cell that displays Markdown."""
    data = {"text/markdown": output.data}
    cell = nbformat.v4.new_code_cell("", execution_count=1)
    cell.outputs = [nbformat.v4.new_output("display_data", data)]
    exporter = nbconvert.HTMLExporter(template_name="classic")
    html, _ = exporter.from_notebook_node(nbformat.v4.new_notebook(cells=[cell]))
    return html.split("<body")[1]


def test_a_label_that_begins_with_plus_is_no_bullet():
    means = statistics.means(study().replace({"arm": {"kd": "feat", "shuffled": "edge"}}), draws=50)
    assert "+ L_feat" in set(tables.arms(means)["arm"])
    html = shown(tables.markdown(tables.arms(means)))
    assert "<td" in html and "+ L_feat" in html and "<li>" not in html and "<em>" not in html


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("method", "both (method)"),
        ("alone*2", "student alone, 2x longer"),
        ("feat=0.5+kd*2", "L_feat 0.5 + logit KD, 2x longer"),
        ("other", "other"),
        ("alone_long", "student alone, longer"),  # arms of earlier versions
    ],
)
def test_every_arm_has_a_label(name, expected):
    assert tables.label(name) == expected


@pytest.mark.fault
def test_text_of_a_table_cannot_become_markup():
    """Names of cases are names of files, which anybody may have chosen."""
    table = pd.DataFrame({"id": ["<img src=x onerror=alert(1)>", "a|b"], "dice": [0.5, 1.0]})
    text = tables.markdown(table).data
    assert "<img" not in text and "&lt;img src=x onerror=alert(1)&gt;" in text
    assert r"a\|b" in text and "0.500" in text


def test_missed_lesions_are_beside_every_mean():
    lesion = np.zeros((2, 16, 16), bool)
    lesion[:, 3:7, 3:7] = True
    marked = lesion.copy()
    marked[0] = False
    per_case = score_masks(marked, lesion).assign(group=["a", "b"], soft_dice=0.25)
    table = tables.scores({"student": summarize(per_case)})
    assert table.loc[0, "missed"] == "1 of 2" and table.loc[0, "Dice"].startswith("0.500 [0.000,")
    assert table.loc[0, "Soft Dice"] == "0.250", "no interval of width 0"
    assert re.fullmatch(r"\d+\.\d \[\d+\.\d, \d+\.\d\]", table.loc[0, "HD95 (px)"])


def test_the_table_of_arms_has_intervals_seeds_and_only_what_differs():
    means = statistics.means(study().assign(hd95=12.345, profile="cpu"), draws=50)
    table = tables.arms(means)
    assert {"trained on", "teacher", "Dice [95 % interval]", "Dice, seed 2", "missed"} <= set(table)
    folds = study().query("dataset == 'isic2018'").assign(fold=lambda t: t["group"].str[1:])
    assert "Dice, fold 3" in tables.arms(statistics.means(folds, draws=50))
    assert "profile" not in table and set(table["teacher"]) == {"U-Net 64", "ResNet34-UNet"}
    row = means.iloc[1]
    cell = f"{row['dice']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"
    assert table.iloc[1]["Dice [95 % interval]"] == cell and table.iloc[1]["HD95 (px)"] == "12.3"
    assert table.iloc[0]["Dice, seed 1"] == "", "the teacher has one seed"
    plain = tables.arms(pd.DataFrame({"arm": ["alone"], "dice": [0.5], "dice_seed0": [0.5]}))
    assert plain.loc[0, ["arm", "Dice"]].tolist() == ["student alone", 0.5]


def test_a_page_of_differences_shows_both_intervals_and_what_differs():
    compared = statistics.compare(study(), draws=50)
    table = tables.differences(compared)
    assert set(table["trained on"]) == {"busi", "isic2018"}
    assert set(table["teacher"]) == {"U-Net 64", "ResNet34-UNet"}
    row = compared.iloc[0]
    assert table.loc[0, "95 % interval"] == f"{row['low']:+.3f} to {row['high']:+.3f}"
    assert table.loc[0, "over trainings"] == f"{row['t_low']:+.3f} to {row['t_high']:+.3f}"
    one = study().query("group == 'g1' and dataset == 'isic2018' and seed == 0")
    table = tables.differences(statistics.compare(one, draws=50))
    assert list(table) == [
        "arm", "minus", "Dice, difference", "95 % interval", "over trainings", "trainings",
        "groups", "p (Holm)", "verdict",
    ]  # fmt: skip
    assert set(table["95 % interval"]) == set(table["over trainings"]) == {"--"}


def test_macros_are_letters_only(tmp_path):
    values = {"alone dice": 0.12345, "seed 10 cases": 1200, "data set": "own_data, 5 %"}
    text = tables.variables(values, tmp_path).read_text()
    assert text.splitlines() == [
        r"\newcommand{\lkdAloneDice}{0.123}",
        r"\newcommand{\lkdSeedBACases}{1,200}",
        r"\newcommand{\lkdDataSet}{own\_data, 5 \%}",
    ]


def test_a_saved_table_is_full_in_csv_and_typeset_in_latex(tmp_path):
    table = pd.DataFrame({"arm": ["+ L_edge"], "b": [-0.12345], "c": [np.nan]})
    latex = tables.save(table, "t", tmp_path).read_text()
    assert r"+ $L_\mathrm{edge}$ & $-$0.123 & -- \\" in latex
    assert "-0.12345" in (tmp_path / "t.csv").read_text()
    fewer = tables.save(table, "t", tmp_path, shown=table[["arm"]]).read_text()
    assert "0.123" not in fewer and "-0.12345" in (tmp_path / "t.csv").read_text()


def test_macros_of_the_study_are_the_numbers_of_its_tables():
    scored = study()
    means, compared = statistics.means(scored, 200), statistics.compare_arms(scored, draws=200)
    values = tables.numbers(means, compared)
    part = scored[(scored["dataset"] == "busi") & (scored["teacher"] == "resnet34_unet")]
    assert values["busi kd dice"] == pytest.approx(part[part["arm"] == "kd"]["dice"].mean())
    assert values["busi cases"] == part["id"].nunique() and values["busi seeds"] == 3
    assert "busi unet64 kd dice" in values and "isic2018 kd dice" in values
    own = (compared["dataset"] == "busi") & (compared["teacher"] == "resnet34_unet")
    row = compared[own].set_index("other").loc["kd"]
    assert values["busi method minus kd"] == f"{row['difference']:+.3f}"
    assert values["busi method minus kd low"] == f"{row['low']:+.3f}"
    assert values["busi method minus kd t_low"] == f"{row['t_low']:+.3f}"
    assert values["busi method minus kd verdict"] == row["verdict"]
    assert values["busi method minus kd p"] == f"= {row['p_holm']:.2g}"


def test_points_of_accuracy_and_cost_join_the_scores_with_the_network_at_the_size_of_its_training():
    scored = study().assign(pixels=128, test_dataset=lambda t: t["dataset"])
    scored.loc[scored["dataset"] == "isic2018", "pixels"] = 64
    cost = tables.committed("cost")
    points = tables.cost_points(scored, cost).set_index(["dataset", "teacher", "model"])
    alone = points.loc[("isic2018", "resnet34_unet", "alone")]
    part = scored.query("arm == 'alone' and dataset == 'isic2018'")
    assert alone["dice"] == pytest.approx(part["dice"].mean()) and alone["parameters"] == 58_629
    of_network = cost.query("pixels == 128").groupby("model")["macs"].first()
    assert points.loc[("busi", "unet64", "unet64"), "macs"] == of_network["unet64"]
    assert 4 * alone["macs"] == points.loc[("busi", "unet64", "alone"), "macs"]


def test_hours_are_those_of_the_training_and_of_the_teacher_beyond_the_student_alone():
    seconds = {"teacher": [7200], "alone": [1800, 5400], "alone*2": [7200], "kd": [3600, 10800]}
    rows = [(a, s) for a, times in seconds.items() for s in times]
    runs = pd.DataFrame(rows, columns=["arm", "seconds"]).assign(dataset="busi", teacher="unet64")
    pairs = pd.DataFrame({"arm": ["alone*2", "kd", "gone"], "other": "alone", "difference": 0.1})
    pairs = pairs.assign(dataset="busi", test_dataset="busi", teacher="unet64")
    hours = tables.gain_and_hours(pairs, runs).set_index("arm")["hours"]
    assert hours["alone*2"] == 2 - 1 and hours["kd"] == 2 + 2 - 1 and np.isnan(hours["gone"])


# The study ----------------------------------------------------------------------------------------


def made_run(folder, arm: str, seed: int, together: int = 1, **config) -> results.Result:
    """The files of a finished training run."""
    cfg = {"dataset": "data/own", "profile": "cpu", "teacher": "unet64", "fold": 0, "pixels": 64}
    cfg |= {"seg_loss": "bce_dice", "precision": "32-true", "digest": f"{arm}{seed}" * 8} | config
    path = folder / "distill" / f"own-cpu-s{seed}-{arm}"
    results.write_json(path / "config.json", cfg)
    results.write_json(path / "env.json", {"device": "cpu", "threads": 2, "commit": "abc"})
    summary = {"parameters": 5, "epochs": 2, "seconds": 1.5, "together": together}
    results.write_json(path / "summary.json", summary)
    history = pd.DataFrame({"epoch": [1, 2], "val_dice": [0.1, 0.2], "loss_seg": [1.0, 0.5]})
    results.write_table(path / "history.csv", history)
    scores = pd.DataFrame({"id": ["1", "02"], "group": ["g", "h"], "split": ["val", "test"]})
    scores = scores.assign(label="x", lesion_pixels=7, predicted_pixels=3, contrast=0.2, dice=0.5)
    for name in ("iou", "sensitivity", "precision", "hd95", "surface_dice", "soft_dice"):
        scores[name] = 0.25
    results.write_table(path / "per_case.csv", scores.assign(missed=0, false_alarm=0))
    return results.Result(path)


def test_a_study_is_collected_from_finished_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("LESIONKD_RUNS", str(tmp_path))
    keys = [("alone", 0), ("alone", 1), ("method", 0)]
    runs = {key: made_run(tmp_path, *key, together=i) for i, key in enumerate(keys, start=1)}
    found = tables.collect_study(runs, {"teacher": "resnet34_unet", "budget": 20})
    per_case = found["per_case"]
    assert list(per_case) == [*tables.FIRST, "budget"]
    assert per_case["case"].tolist() == ["02"] * 3 and set(per_case["split"]) == {"test"}
    assert list(zip(per_case["arm"], per_case["seed"])) == keys
    for name, value in {
        "dataset": "own",
        "test_dataset": "own",
        "teacher": "resnet34_unet",
    }.items():
        assert set(per_case[name]) == {value}
    assert set(per_case["seg_loss"]) == {"bce_dice"} and set(per_case["lesion_px"]) == {7}
    assert per_case.loc[2, "run"] == "distill/own-cpu-s0-method"
    assert {"hash", "parameters", "epochs", "seconds", "device", "threads", "commit"} <= set(
        found["runs"]
    )
    assert found["runs"]["hash"].str.len().tolist() == [16] * 3
    assert found["runs"]["timing"].tolist() == ["alone", "divided by 2", "divided by 3"]
    assert found["history"].groupby("run")["epoch"].max().tolist() == [2, 2, 2]


def test_a_collected_study_is_compared_after_it_was_written_and_read(tmp_path, monkeypatch):
    monkeypatch.setenv("LESIONKD_RUNS", str(tmp_path))
    monkeypatch.setattr(results, "CHECKOUT", tmp_path)
    keys = [(arm, seed) for arm in ("alone", "method") for seed in (0, 1)]
    found = tables.collect_study({key: made_run(tmp_path, *key) for key in keys})
    for name, table in found.items():
        results.write_table(tmp_path / "data" / "results" / f"{name}.csv", table)
    scored = tables.study()
    assert {"id", "lesion_pixels"} <= set(scored) and scored["id"].tolist() == ["02"] * 4
    compared = statistics.compare_arms(scored, draws=50)
    assert compared["other"].tolist() == ["alone"] and compared.loc[0, "seg_loss"] == "bce_dice"
    assert len(statistics.learning_curves(tables.study("history"))) == 4
