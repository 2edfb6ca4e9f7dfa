"""The command `lesionkd`: notebooks, stages, students, results; errors without a traceback."""

import os
import re
import subprocess
import sys

import click
import nbformat
import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from lesionkd_core import __version__, cli, results
from lesionkd_core.cli import main
from lesionkd_core.config import AblationConfig, DistillConfig, TeacherConfig
from lesionkd_core.data.prepare import prepare
from lesionkd_core.export import ExportConfig
from tests.conftest import ROOT, copy_of
from tests.test_predict import finished
from tests.tiny import OPTIONS, image_folder, picture, save


def command(*words):
    """Exit code, standard output and errors of a command in this process."""
    done = CliRunner().invoke(main, [str(word) for word in words])
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.stdout, done.stderr


def as_words(options):
    return [word for name, value in options.items() for word in ("-p", name, str(value))]


# Parameters ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "words", "expected"),
    [
        (DistillConfig, ["-p", "seed", "3", "-p", "lr", "1e-3"], {"seed": 3, "lr": 0.001}),
        (DistillConfig, ["-p", "stem", "2", "-p", "margin", "bn"], {"stem": 2, "margin": "bn"}),
        (TeacherConfig, ["-p", "deterministic", "True"], {"deterministic": True}),
        (AblationConfig, ["-p", "seeds", "2"], {"seeds": (0, 1)}),
        (AblationConfig, ["-r", "seeds", "2"], {"seeds": (2,)}),
        (AblationConfig, ["-p", "arms", "alone, kd"], {"arms": ("alone", "kd")}),
        (DistillConfig, ["-p", "dataset", "2024"], {"dataset": "2024"}),
        (
            DistillConfig,
            ["-p", "losses", "feat=2, kd"],
            {"losses": {"seg": 1, "feat": 2, "kd": 3}},
        ),
        (
            DistillConfig,
            ["-y", "{seed: 3, losses: kd}"],
            {"seed": 3, "losses": {"seg": 1, "kd": 3}},
        ),
        (DistillConfig, ["-y", "seed: 3", "-p", "seed", "4"], {"seed": 4}),
        (DistillConfig, ["-f", "FILE"], {"epochs": 7, "width": 8}),
        (
            ExportConfig,
            ["-p", "sizes", "64", "-p", "threshold", "0.4"],
            {"sizes": (64,), "threshold": 0.4},
        ),
    ],
    ids=str,
)
def test_parameters_become_values_of_the_options_types(tmp_path, kind, words, expected):
    (tmp_path / "parameters.yaml").write_text("epochs: 7\nwidth: 8\n")
    words = [str(tmp_path / "parameters.yaml") if word == "FILE" else word for word in words]
    seen = []

    @click.command()
    @cli.parameters
    def probe(given, raw):
        seen.append(kind(**cli.read(kind, given, raw)))

    done = CliRunner().invoke(probe, words)
    assert done.exit_code == 0, done.output
    assert {name: getattr(seen[0], name) for name in expected} == expected


@pytest.mark.fault
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["distill", "-p", "sede", "1"],
            "ConfigError: unknown parameter 'sede': did you mean 'seed'",
        ),
        (["distill", "-p", "seed", "one"], "seed = 'one'"),
        (["distill", "-p", "pixels", "64.5"], "pixels = 64.5"),
        (["prepare", "-p", "seed", "1"], "unknown parameter 'seed'"),
        (["prepare", "-y", "{a"], "cannot be read as YAML"),
        (["prepare", "-f", "/no/such.yaml"], "cannot be read as YAML: .*No such file"),
        (["prepare", "-p", "dataset", "bussi"], "DatasetNotFound: .*did you mean 'busi'"),
        (["run", "04_destil"], "did you mean '04_distill'"),
        (["run", "04_distill", "-p", "sede", "1"], "did you mean 'seed'"),
        (["list", "distil"], "did you mean 'distill'"),
        (["show", "nowhere"], "is not the folder or the name of a run"),
    ],
    ids=lambda words: " ".join(words) if isinstance(words, list) else "",
)
def test_a_wrong_command_is_refused_before_anything_starts(runs, words, message):
    code, _, errors = command(*words)
    assert code == 1 and re.search(message, errors), errors
    assert not runs.exists()


def test_help_and_version():
    code, text, _ = command("--help")
    assert code == 0 and all(name in text for name in ("run", "distill", "predict", "sweep"))
    code, text, _ = command("run", "04_distill", "--help")
    assert code == 0 and "Parameters:" in text and "split_seed = 0" in text
    assert __version__ in command("--version")[1]
    assert command("run")[0] == 2


# Notebooks ----------------------------------------------------------------------------------------


def notebook(path, *cells):
    """A small notebook of the suite's form."""
    sources = [
        "cases = 40",
        "import lesionkd_core as lkd\ncfg = lkd.PrepareConfig.from_notebook(globals())",
    ]
    book = nbformat.v4.new_notebook(metadata={"language_info": {"name": "python"}})
    book.cells = [nbformat.v4.new_code_cell(source) for source in (*sources, *cells)]
    book.cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(book, path)
    return path


PREPARES = ("data = lkd.prepare(cfg)", "print(lkd.short(data.path))\nprint('DONE')")


def test_a_notebook_is_executed_with_parameters_and_kept_beside_its_results(tmp_path, runs):
    path = notebook(tmp_path / "01_small.ipynb", *PREPARES)
    words = ["-p", "cases", 30, "-p", "pixels", 32, "--link", tmp_path / "out.txt"]
    code, out, errors = command("run", path, *words)
    assert code == 0, errors
    data = prepare(DistillConfig(cases=30, pixels=32))
    assert f"results: {data.path}" in out
    assert (tmp_path / "out.txt").read_text() == f"{data.path.resolve()}\n"
    [kept] = (runs / "notebooks").glob("01_small-*.ipynb")
    assert (data.path / "notebook.ipynb").read_bytes() == kept.read_bytes()


@pytest.mark.fault
def test_the_error_of_a_notebook_is_shown_and_the_exit_code_is_1(tmp_path, runs):
    path = notebook(tmp_path / "01_small.ipynb", *PREPARES)
    code, out, errors = command("run", path, "-p", "cases", 4, "-p", "pixels", 32)
    assert code == 1 and "LesionKDError: phantom:" in errors and "usable cases" in errors
    assert "executed notebook: " in out and "Traceback" not in errors


# Stages -------------------------------------------------------------------------------------------


def test_stages_find_the_results_of_the_same_options(data, teacher, student):
    for stage, result in (("prepare", data), ("train-teacher", teacher), ("distill", student)):
        own = {n: v for n, v in OPTIONS.items() if n in cli.config.PrepareConfig.model_fields}
        code, out, errors = command(
            stage, *as_words(own if stage == "prepare" else options_of(stage))
        )
        assert code == 0, errors
        assert out.splitlines()[-2:] == [str(result), f"results: {result.path}"]


def options_of(stage):
    kind = TeacherConfig if stage == "train-teacher" else DistillConfig
    return {name: value for name, value in OPTIONS.items() if name in kind.model_fields}


def test_ablate_prints_its_results(runs):
    options = OPTIONS | {"epochs": 1, "arms": "alone", "seeds": 1}
    code, out, errors = command("ablate", *as_words(options))
    assert code == 0, errors
    [path] = runs.glob("ablation/*/DONE")
    assert f"results: {path.parent}" in out


def test_an_interrupted_command_says_how_to_resume(monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("lesionkd_core.data.prepare.prepare", interrupted)
    code, _, errors = command("prepare", "-p", "cases", 20)
    assert code == 130 and "the same command resumes" in errors


# Students -----------------------------------------------------------------------------------------


def test_predict_writes_masks_and_lists_what_could_not_be_read(tmp_path, runs):
    folder, run = tmp_path / "images", finished(runs, constant=0.2)
    save(folder / "a.png", picture(0))
    code, out, errors = command("predict", run, folder, "--out", tmp_path / "out")
    assert (code, errors) == (0, "") and out.splitlines()[-1] == f"masks: {tmp_path / 'out'}"
    assert out.count("/1 images") == 1
    (folder / "b.png").write_text("no image")
    code, _, errors = command("predict", run, folder, "--out", tmp_path / "two", "--threshold", 0.1)
    assert code == 1 and "not read: b.png" in errors
    mask = np.asarray(Image.open(tmp_path / "two" / "a.png"))
    assert mask.shape == (48, 64) and (mask == 255).all()
    (folder / "b.png").unlink()
    save(folder / "dark.png", np.zeros((48, 64, 3), np.uint8))
    code, _, errors = command("predict", run, folder, "--out", tmp_path / "three")
    assert code == 2 and "shows little: dark.png: nearly flat" in errors
    assert (tmp_path / "three" / "dark.png").exists()
    (folder / "dark.png").unlink()
    save(folder / "deep.png", picture(0)[..., 0].astype(np.uint16) * 200)
    code, out, _ = command("predict", run, folder, "--out", tmp_path / "four")
    assert code == 0 and f"notes on reading: 1, in {tmp_path / 'four' / 'report.csv'}" in out


@pytest.mark.fault
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["images", "--out", "images"], "choose another folder"),
        (["images", "--out", "images/../images"], "choose another folder"),
        (["absent", "--out", "out"], "give a folder of images"),
        (["images", "--out", "a_file"], "a_file"),
        (["images", "--out", "out", "--threshold", "128"], "128"),
        (["images", "--out", "out", "--threshold", "nan"], "nan"),
    ],
)
def test_wrong_folders_and_thresholds_are_refused(tmp_path, runs, monkeypatch, words, message):
    run = finished(runs)
    save(tmp_path / "images" / "a.png", picture(0))
    (tmp_path / "a_file").write_text("")
    monkeypatch.chdir(tmp_path)
    code, _, errors = command("predict", run, *words)
    assert code != 0 and message in errors and "Traceback" not in errors
    assert os.listdir(tmp_path / "images") == ["a.png"]


def test_score_prints_the_dice_on_another_data_set(tmp_path, student, data, runs):
    copied = copy_of(student.path, runs)
    copy_of(data.path, runs)
    folder = image_folder(tmp_path / "theirs", 12)
    code, out, errors = command("score", copied.name, folder)
    assert code == 0, errors
    assert out.splitlines()[-1].startswith("theirs: Dice ") and "results: " in out


def test_list_and_show_report_on_finished_runs(student, runs):
    assert command("list")[1] == f"no finished run in {runs}\n"
    path = copy_of(student.path, runs)
    code, out, _ = command("list")
    assert code == 0 and path.name in out and f"{student.test_dice:.3f}"[:4] in out
    assert "no finished run" in command("list", "teacher")[1]
    code, out, _ = command("show", path.name)
    assert code == 0 and out == results.report(path) + "\n"


def test_download_lists_the_catalogue(tmp_path, monkeypatch):
    monkeypatch.setenv("LESIONKD_DATA", str(tmp_path))
    code, out, _ = command("download", "--list")
    assert code == 0 and "kvasir-seg" in out and "licence" in out


# In a process of its own --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "code", "out", "errors"),
    [
        (["show", "STUDENT"], 0, "all intact", ""),
        (["distill", "-p", "sede", "1"], 1, "", "did you mean 'seed'"),
    ],
)
def test_the_module_is_the_command(student, words, code, out, errors):
    words = [student.path.name if word == "STUDENT" else word for word in words]
    done = subprocess.run(
        [sys.executable, "-m", "lesionkd_core", *words],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == code and out in done.stdout and errors in done.stderr
    assert "Traceback" not in done.stderr
