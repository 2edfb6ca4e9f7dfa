"""Figures and tables are the same bytes twice, and say what their numbers say."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from lesionkd_core import figures, tables
from lesionkd_core.evaluation import compare_arms
from tests.test_evaluation import table_of_arms


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


def drawings():
    table = table_of_arms(0.05)
    history = pd.DataFrame({"epoch": [1, 2], "val_dice": [0.2, 0.5], "loss_seg": [0.6, 0.3]})
    rng = np.random.default_rng(0)
    yield "ablation", lambda: figures.ablation(table, compare_arms(table))
    yield "curves", lambda: figures.training_curves({"teacher": history, "student": history}, {"loss_seg": "L_seg"})
    yield "per_case", lambda: figures.per_case_scores({"student": table[table["arm"] == "method"]})
    projection = np.zeros((4, 8, 8))
    projection[[0, 3]] = 0.5
    image, mask = rng.integers(0, 255, (32, 32, 3)).astype(np.uint8), np.eye(32)
    yield "nodes", lambda: figures.node_assignment(image, mask, np.eye(8), projection)
    maps = rng.normal(size=(3, 3, 8, 8))
    yield "refinement", lambda: figures.refinement(image, *maps, 1)


@pytest.mark.parametrize(("name", "draw"), list(drawings()), ids=lambda v: v if isinstance(v, str) else "")
def test_a_figure_is_the_same_bytes_twice(name, draw, tmp_path):
    for folder in ("a", "b"):
        figures.save(draw(), name, tmp_path / folder, data=pd.DataFrame({"x": [1 / 3]}))
    for suffix in ("pdf", "svg", "png", "csv"):
        assert (tmp_path / "a" / f"{name}.{suffix}").read_bytes() == (tmp_path / "b" / f"{name}.{suffix}").read_bytes(), suffix


def test_figures_have_the_widths_of_a_page(tmp_path):
    table = table_of_arms(0.05)
    assert figures.ablation(table, compare_arms(table)).get_size_inches()[0] * 25.4 == pytest.approx(174)
    assert figures.per_case_scores({"student": table}).get_size_inches()[0] * 25.4 == pytest.approx(85)


def test_every_arm_has_a_style_of_its_own():
    from lesionkd_core.config import ARMS

    looks = [figures.STYLES[arm][1:] for arm in ARMS]
    assert len(set(looks)) == len(ARMS) and len({marker for _, marker, _ in looks}) == len(ARMS)


def test_the_sentence_follows_the_numbers():
    better, none = (tables.in_words(compare_arms(table_of_arms(shift))) for shift in (0.05, 0.0))
    assert better.count("better") == 2 and "no difference" not in better
    assert none.count("no difference seen") == 2 and "better" not in none
    assert "worse" in tables.in_words(compare_arms(table_of_arms(-0.05)))


def test_the_sentence_calls_nothing_a_difference_that_holm_does_not():
    row = {"other": "alone", "difference": 0.01, "low": 0.001, "high": 0.02, "p_holm": 0.2, "groups": 9, "seeds": 1}
    assert "no difference seen" in tables.in_words(pd.DataFrame([row]))


def test_macros_are_letters_only(tmp_path):
    text = tables.variables({"alone dice": 0.12345, "seed 10 cases": 1200, "data set": "BUSI"}, tmp_path).read_text()
    assert text.splitlines() == [r"\newcommand{\lkdAloneDice}{0.123}", r"\newcommand{\lkdSeedBACases}{1,200}", r"\newcommand{\lkdDataSet}{BUSI}"]


def test_missed_lesions_stand_beside_every_mean():
    from lesionkd_core.evaluation import score_masks, summarize

    lesion = np.zeros((2, 16, 16), bool)
    lesion[:, 3:7, 3:7] = True
    marked = lesion.copy()
    marked[0] = False
    table = tables.scores({"student": summarize(score_masks(marked, lesion).assign(group=["a", "b"]))})
    assert table.loc[0, "missed"] == "1 of 2" and table.loc[0, "Dice"].startswith("0.500")


def test_cases_that_all_score_the_same_are_drawn():
    """Rounding puts the mean of equal numbers beside its own interval."""
    table = pd.DataFrame({"dice": [0.1 + 0.2] * 12, "group": list("abcdefghijkl")})
    assert figures.per_case_scores({"student": table}).axes
