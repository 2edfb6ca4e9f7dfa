"""Bad input and what it gives: a row in the report or an error that says what to mend, never half a result."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from queue import Queue

import numpy as np
import pytest
from PIL import Image

from lesionkd_core import store
from lesionkd_core.__main__ import main
from lesionkd_core.config import AblationConfig, ConfigError, DistillConfig, LesionKDError
from lesionkd_core.datasets import DatasetNotFound
from lesionkd_core.prepare import PrepareConfig, prepare_data

from .conftest import ROOT
from .test_datasets import lesion, own_folder, picture, save
from .test_prepare import config, quiet
from .test_store import full_disk

pytestmark = pytest.mark.fault


@pytest.fixture(autouse=True)
def runs(tmp_path, monkeypatch):
    monkeypatch.setenv("LESIONKD_RUNS", str(tmp_path / "runs"))
    return tmp_path / "runs"


def cut(path, to=0.5):
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * to)])


def replace(path, make):
    path.unlink()
    make(path)


SPOILT = {  # what is wrong: how it is made, the file that the report names, words of the reason
    "no mask": (lambda d: (d / "masks/case_003.png").unlink(), "case_003.png", ["case_003.png", "no mask"]),
    "mask of another size": (lambda d: save(d / "masks/case_003.png", np.zeros((10, 20), np.uint8)), "case_003.png", ["20 x 10", "64 x 48"]),
    "mask turned by 90 degrees": (lambda d: save(d / "masks/case_003.png", lesion(9).T), "case_003.png", ["48 x 64", "64 x 48"]),
    "truncated image": (lambda d: cut(d / "images/case_003.png"), "case_003.png", ["case_003.png", "cannot be read"]),
    "truncated mask": (lambda d: cut(d / "masks/case_003.png"), "case_003.png", ["case_003.png", "cannot be read"]),
    "empty file": (lambda d: cut(d / "images/case_003.png", 0), "case_003.png", ["cannot be read"]),
    "text called .png": (lambda d: (d / "images/case_003.png").write_text("<html>404</html>"), "case_003.png", ["cannot be read"]),
    "mask that is text": (lambda d: (d / "masks/case_003.png").write_text("0 1 1"), "case_003.png", ["cannot be read"]),
    "image that is a folder": (lambda d: replace(d / "images/case_003.png", lambda p: p.mkdir()), "case_003.png", ["cannot be read"]),
    "mask that is a folder": (lambda d: replace(d / "masks/case_003.png", lambda p: p.mkdir()), "case_003.png", ["cannot be read"]),
    "image link to nowhere": (lambda d: replace(d / "images/case_003.png", lambda p: p.symlink_to("gone.png")), "case_003.png", ["missing"]),
    "mask link to nowhere": (lambda d: replace(d / "masks/case_003.png", lambda p: p.symlink_to("gone.png")), "case_003.png", ["missing"]),
    "two images of one stem": (lambda d: save(d / "images/case_003.jpg", picture(99)), "case_003.jpg", ["two images", "'case_003'", "rename"]),
}


@pytest.mark.parametrize("what", SPOILT)
def test_a_spoilt_case_is_left_out_and_reported(tmp_path, what):
    spoil, file, words = SPOILT[what]
    spoil(own_folder(tmp_path / "mine", 14))
    result = prepare_data(config(tmp_path / "mine"), quiet)
    assert result.cases["id"].tolist() == [f"case_{i:03d}" for i in range(14) if i != 3]
    assert set(result.report["id"]) == {"case_003"} and file in set(result.report["file"])
    assert all(word in result.report["reason"].iloc[0] for word in words), result.report["reason"].iloc[0]


@pytest.mark.parametrize("seed", range(4))
def test_two_images_of_one_stem_are_left_out_even_where_one_of_them_is_drawn(tmp_path, seed):
    save(own_folder(tmp_path / "mine", 14) / "images/case_003.jpg", picture(99))  # whose mask is case_003.png?
    assert "case_003" not in set(prepare_data(config(tmp_path / "mine", cases=13, split_seed=seed), quiet).cases["id"])


def busi_without_normal(root):
    for label in ("benign", "malignant"):
        (root / "Dataset_BUSI_with_GT" / label).mkdir(parents=True)


ABSENT = {  # what is wrong: how it is made, the data set asked for, words of the message
    "mistyped name": (lambda d: None, "bussi", ["'bussi'", "did you mean 'busi'?"]),
    "unlike any name": (lambda d: None, "qqqq", ["'qqqq'", "busi", "isic2018", "phantom-ct", "working folder"]),
    "release absent": (lambda d: None, "busi", ["'Dataset_BUSI_with_GT'", "'benign', 'malignant', 'normal'", "data/busi.md", "LESIONKD_DATA"]),
    "release in part": (busi_without_normal, "busi", ["'normal'", "data/busi.md"]),
    "isic2018 absent": (lambda d: None, "isic2018", ["'ISIC2018_Task1-2_Training_Input'", "'ISIC2018_Task1_Training_GroundTruth'", "data/isic2018.md"]),
    "no images/ and masks/": (lambda d: (d / "mine").mkdir(), "mine", ["mine", "'images'", "'masks'", "data/own.md"]),
    "masks/ absent": (lambda d: (d / "mine" / "images").mkdir(parents=True), "mine", ["'masks'", "data/own.md"]),
    "images/ empty": (lambda d: [(d / "mine" / n).mkdir(parents=True) for n in ("images", "masks")], "mine", ["no images", "'images' is empty"]),
}


@pytest.mark.parametrize("what", ABSENT)
def test_an_absent_data_set_says_what_was_looked_for_and_where(tmp_path, monkeypatch, runs, what):
    make, dataset, words = ABSENT[what]
    monkeypatch.setenv("LESIONKD_DATA", str(tmp_path / "raw"))
    (tmp_path / "raw").mkdir()
    make(tmp_path / "raw")
    with pytest.raises(DatasetNotFound) as error:
        prepare_data(config(dataset), quiet)
    assert all(word in str(error.value) for word in [*words, str(tmp_path / "raw")]), str(error.value)
    assert not runs.exists()


def test_a_mistyped_lesionkd_data_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("LESIONKD_DATA", str(tmp_path / "dta"))
    with pytest.raises(DatasetNotFound, match="dta"):
        prepare_data(config("cvc-clinicdb"), quiet)


def test_too_few_usable_cases_are_an_error_until_they_are_mended(tmp_path, runs):
    folder = own_folder(tmp_path / "mine", 12)
    for i in range(4):
        cut(folder / "images" / f"case_{i:03d}.png")
    with pytest.raises(LesionKDError, match="8 usable cases, wants at least 10") as error:
        prepare_data(config(folder), quiet)
    assert all(f"case_{i:03d}.png: cannot be read" in str(error.value) for i in range(4))
    assert not list(runs.rglob("DONE"))
    own_folder(folder, 12)
    assert len(prepare_data(config(folder), quiet).cases) == 12


def test_one_group_cannot_be_split(tmp_path):
    for i in range(12):
        save(tmp_path / "mine/images" / f"{i}.png", picture(1))
        save(tmp_path / "mine/masks" / f"{i}.png", lesion(9))
    with pytest.raises(LesionKDError, match="1 groups of cases are too few to fill test, val"):
        prepare_data(config(tmp_path / "mine"), quiet)


WRONG = [  # parameters, words of the message
    ({"sede": 1}, ["'sede'", "did you mean 'seed'?"]),
    ({"wfeat": 1.0}, ["'wfeat'", "did you mean 'w_feat'?"]),
    ({"xyzzy": 1}, ["'xyzzy'", "known are:", "split_seed"]),
    ({"pixels": "64"}, ["pixels = '64'", "integer", "multiple of 32"]),
    ({"pixels": 64.0}, ["pixels = 64.0", "integer"]),
    ({"pixels": 100}, ["pixels = 100", "multiple of 32"]),
    ({"pixels": 0}, ["pixels = 0", "32"]),
    ({"seed": True}, ["seed = True", "integer"]),
    ({"seed": -1}, ["seed = -1", "0"]),
    ({"val_fraction": 0.5}, ["val_fraction = 0.5", "less than 0.5"]),
    ({"w_feat": float("nan")}, ["w_feat = nan", "finite"]),
    ({"w_edge": float("inf")}, ["w_edge = inf", "finite"]),
    ({"profile": "fast"}, ["profile = 'fast'", "'smoke', 'cpu' or 'paper'"]),
    ({"dataset": ""}, ["dataset = ''", "at least 1 character"]),
    ({"terms": "feat, egde"}, ["'egde'", "did you mean 'edge'?"]),
    ({"terms": "feat, feat"}, ["terms", "twice"]),
    ({"arms": "method, metod"}, ["'metod'", "did you mean 'method'?"]),
    ({"arms": "method, method"}, ["arms", "twice"]),
    ({"arms": ""}, ["arms", "at least 1"]),
    ({"seeds": 0}, ["seeds = 0", "at least 1"]),
    ({"seeds": "0, one"}, ["seeds = '0, one'"]),
    ({"seeds": "0, -1"}, ["seeds", "-1"]),
    ({"sede": 1, "pixels": 7, "epochs": 0}, ["'sede'", "pixels = 7", "epochs = 0"]),
]


@pytest.mark.parametrize(("values", "words"), WRONG, ids=[str(values) for values, _ in WRONG])
def test_a_wrong_parameter_is_refused_with_its_name_and_what_fits(values, words):
    with pytest.raises(ConfigError) as error:
        (AblationConfig if {"arms", "seeds"} & set(values) else DistillConfig)(**values)
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize(("bound", "words"), [({"sede": 1}, "did you mean 'seed'"), ({"seed": "1"}, "seed = '1'"), ({"epochs": [3]}, r"epochs = \[3\]")])
def test_a_notebook_s_wrong_parameter_is_refused(bound, words):
    with pytest.raises(ConfigError, match=words):
        DistillConfig.from_notebook({"__name__": "__main__", "In": [""], "os": os, "Image": Image.Image, "quiet": quiet, "width": 2, **bound})


def test_a_notebook_s_parameters_can_be_taken_again_after_other_names_were_bound():
    namespace = {"__name__": "__main__", "_": 1, "Out": {}, "os": os, "seed": 3, "width": None}
    assert DistillConfig.from_notebook(namespace).seed == 3
    namespace |= {"cfg": 1, "prepared": "x", "seed": 4}
    cfg = DistillConfig.from_notebook(namespace)
    assert (cfg.seed, cfg.width) == (4, 4)
    with pytest.raises(ConfigError, match="seed = 'x'"):
        DistillConfig.from_notebook(namespace | {"seed": "x"})


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["04_destil"], "did you mean '04_distill'?"),
        (["04_distill", "-p", "wfeat", "1"], "did you mean 'w_feat'?"),
        (["04_distill", "-p", "seed", "one"], "seed = 'one'"),
        (["04_distill", "-p", "pixels", "64.5"], "pixels = 64.5"),
        (["01_data_prep", "-p", "seed", "1"], "unknown parameter 'seed'"),
    ],
)
def test_run_refuses_a_wrong_command_before_anything_starts(monkeypatch, capsys, runs, argv, words):
    monkeypatch.setattr("papermill.execute_notebook", lambda *_, **__: pytest.fail("the notebook was started"))
    assert main(["run", *argv]) == 1
    assert words in capsys.readouterr().err and not runs.exists()


def test_an_interrupted_preparation_starts_anew_and_ends_as_if_undisturbed(tmp_path, monkeypatch, runs):
    cfg, write, calls = config(own_folder(tmp_path / "mine")), store.write_array, []

    def interrupted(path, array):
        calls.append(path)
        if len(calls) == 2:
            raise KeyboardInterrupt
        write(path, array)

    monkeypatch.setattr(store, "write_array", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare_data(cfg, quiet)
    assert calls[0].is_file() and not list(runs.rglob("DONE"))
    after = prepare_data(cfg, quiet)
    monkeypatch.setenv("LESIONKD_RUNS", str(tmp_path / "undisturbed"))
    undisturbed = prepare_data(cfg, quiet)
    for name in ("split.csv", "images.npy", "masks.npy", "cases.csv"):
        assert (after.path / name).read_bytes() == (undisturbed.path / name).read_bytes()


CHILD = """
import time
from lesionkd_core import store
from lesionkd_core.prepare import PrepareConfig, prepare_data
write = store.write_array
def write_and_wait(path, array):
    write(path, array)
    print("written", flush=True)
    time.sleep(600)
store.write_array = write_and_wait
prepare_data(PrepareConfig(cases=60, pixels=32))
"""


def test_another_process_waits_and_goes_on_when_the_first_is_killed(runs):
    said = Queue()
    with subprocess.Popen([sys.executable, "-c", CHILD], stdout=subprocess.PIPE, text=True, cwd=ROOT) as child, ThreadPoolExecutor(1) as pool:
        try:
            assert any("written" in line for line in iter(child.stdout.readline, ""))
            [half] = runs.glob("prepare/*/images.npy")
            waiting = pool.submit(prepare_data, PrepareConfig(cases=60, pixels=32), said.put)
            assert "another process works on runs/prepare/" in said.get(timeout=60)
            assert not list(runs.rglob("DONE"))
        finally:
            child.kill()  # SIGKILL: the child can tidy nothing
        result = waiting.result(timeout=60)
    assert result.path == half.parent and store.is_done(result.path) and len(result.images) == len(result.cases) >= 50


def test_a_preparation_goes_through_once_there_is_space(tmp_path, monkeypatch, runs):
    monkeypatch.setattr(store, "commit", lambda: "")  # git must not meet the limit
    cfg = config(own_folder(tmp_path / "mine"))
    with full_disk(20_000), pytest.raises(LesionKDError, match=r"images\.npy"):
        prepare_data(cfg, quiet)
    assert not list(runs.rglob("DONE")) and not list(runs.rglob("*.partial"))
    assert len(prepare_data(cfg, quiet).images) == 24


def test_a_results_folder_that_cannot_be_made_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("LESIONKD_RUNS", str(save(tmp_path / "a_file.png", lesion(9))))
    with pytest.raises(LesionKDError, match=r"a_file\.png"):
        prepare_data(PrepareConfig(cases=20, pixels=32), quiet)
