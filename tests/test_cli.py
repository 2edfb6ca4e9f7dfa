"""The command `lesionkd`: parameters, refusals, stages, students and results, each to its end."""

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

from lesionkd_core import ExportConfig, __version__, cli, results
from lesionkd_core.cli import main
from lesionkd_core.config import (
    AblationConfig,
    DistillConfig,
    PrepareConfig,
    TeacherConfig,
)
from lesionkd_core.data.prepare import prepare
from tests.conftest import ROOT, copy_of
from tests.fixed import fixed_run
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
        (DistillConfig, ["-p", "invert_masks", "True"], {"invert_masks": True}),
        (AblationConfig, ["-p", "seeds", "2"], {"seeds": (0, 1)}),
        (AblationConfig, ["-r", "seeds", "2"], {"seeds": (2,)}),
        (AblationConfig, ["-p", "arms", "alone, kd"], {"arms": ("alone", "kd")}),
        (DistillConfig, ["-p", "dataset", "2024"], {"dataset": "2024"}),
        (DistillConfig, ["-p", "losses", "feat=2, kd"], {"losses": {"feat": 2, "kd": None}}),
        (DistillConfig, ["-y", "{seed: 3, losses: kd}"], {"seed": 3, "losses": {"kd": None}}),
        (DistillConfig, ["-f", "FILE", "-p", "pixels", "None"], {"epochs": 7, "pixels": 64}),
        (ExportConfig, ["-p", "sizes", "64"], {"sizes": (64,)}),
    ],
    ids=str,
)
def test_parameters_become_values_of_the_options_types(tmp_path, kind, words, expected):
    (tmp_path / "parameters.yaml").write_text("epochs: 7\nwidth: 8\n")
    words = [str(tmp_path / "parameters.yaml") if word == "FILE" else word for word in words]
    seen = []

    @click.command()
    @cli.parameters
    def probe(given):
        seen.append(given.read(kind))

    done = CliRunner().invoke(probe, words)
    assert done.exit_code == 0, done.output
    assert {name: getattr(seen[0], name) for name in expected} == expected


@pytest.mark.fault
@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("distill -p sede 1", "ConfigError: unknown parameter 'sede': did you mean 'seed'"),
        ("distill -p seed one", "seed = 'one'.*valid integer"),
        ("prepare -p pixels 100", "pixels = 100.*multiple of 32"),
        ("prepare -y {a", "cannot be read as YAML"),
        ("prepare -f /no/such.yaml", "cannot be read as YAML: .*No such file"),
        ("prepare -p dataset bussi", "DatasetNotFound: .*did you mean 'busi'"),
        ("ablate -p arms alone*x", r"arms names 'alone\*x'; after \* give"),
        ("export -p run nowhere", "nowhere is not the folder or the name of a run"),
        ("run 04_destil", "did you mean '04_distill'"),
        ("run 4 -p sede 1", "did you mean 'seed'"),
        ("score nowhere busi", "is not the folder or the name of a run"),
        ("predict nowhere . --out out", "is not the folder or the name of a run.*Published"),
        ("download bussi", "did you mean 'busi'"),
        ("clean .", "is not a result in"),
    ],
)
def test_a_wrong_command_is_refused_before_anything_starts(runs, words, message):
    code, out, errors = command(*words.split())
    assert code == 1 and re.search(message, errors), errors
    assert len(errors.splitlines()) <= 2 and out == "" and not runs.exists()


def test_help_and_version():
    code, text, _ = command("--help")
    assert code == 0 and all(f"\n  {name} " in text for name in main.commands)
    code, text, _ = command("run", "4", "--help")
    assert code == 0 and "Parameters:" in text and "split_seed = 0" in text
    assert __version__ in command("--version")[1]
    assert command("run")[0] == 2


def test_an_interrupted_command_says_how_to_resume(monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("lesionkd_core.data.prepare.prepare", interrupted)
    code, _, errors = command("prepare", "-p", "cases", 20)
    assert code == 130 and "the same command resumes" in errors


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
    assert out.endswith(f"\nresults: {data.path}\n")
    assert (tmp_path / "out.txt").read_text() == f"{data.path.resolve()}\n"
    [kept] = (runs / "notebooks").glob("01_small-*.ipynb")
    assert (data.path / "notebook.ipynb").read_bytes() == kept.read_bytes()


@pytest.mark.fault
@pytest.mark.parametrize(
    ("cells", "cases", "message"),
    [
        (PREPARES, 4, r"LesionKDError: phantom: .*usable cases.*"),
        (["{}['absent']"], 30, "KeyError: 'absent'"),
        (["import os\nos._exit(3)"], 30, "DeadKernelError: Kernel died"),
        (["1"], 30, "LesionKDError: 01_small.ipynb names no results: .*"),
    ],
)
def test_a_failed_notebook_ends_with_its_error_in_one_sentence(
    tmp_path, runs, cells, cases, message
):
    path = notebook(tmp_path / "01_small.ipynb", *cells)
    words = ["-p", "cases", cases, "-p", "pixels", 32, "--link", tmp_path / "link"]
    code, out, errors = command("run", path, *words)
    assert code == 1 and re.fullmatch(message, errors.strip()), errors
    assert out.splitlines()[-1].startswith("executed notebook: ")
    assert not (tmp_path / "link").exists()


# Stages -------------------------------------------------------------------------------------------


def options_of(kind):
    return {name: value for name, value in OPTIONS.items() if name in kind.model_fields}


def test_stages_find_the_results_of_the_same_options(data, teacher, student):
    for stage, kind, result in (
        ("prepare", PrepareConfig, data),
        ("train-teacher", TeacherConfig, teacher),
        ("distill", DistillConfig, student),
    ):
        code, out, errors = command(stage, *as_words(options_of(kind)))
        assert (code, errors) == (0, "")
        assert out.splitlines()[-2:] == [str(result), f"results: {result.path}"]


def test_ablate_prints_its_results(runs):
    code, out, errors = command("ablate", *as_words(OPTIONS | {"epochs": 1, "arms": "alone"}))
    assert (code, errors) == (0, "")
    [path] = runs.glob("ablation/*/DONE")
    assert out.endswith(f"\nresults: {path.parent}\n")


@pytest.mark.parametrize("trains", [False, True])
def test_the_dice_on_another_data_set_is_printed(tmp_path, teacher, data, runs, trains):
    copied = copy_of(teacher.path, runs)
    copy_of(data.path, runs)
    folder = image_folder(tmp_path / "theirs", 12)
    options = options_of(TeacherConfig) | {"test_dataset": folder}
    words = ("train-teacher", *as_words(options)) if trains else ("score", copied.name, folder)
    code, out, _ = command(*words)
    [path] = runs.glob("external/*/DONE")
    assert code == 0 and re.fullmatch(
        rf"theirs: Dice 0\.\d+.*; results: {path.parent}", out.splitlines()[-1]
    )
    code, _, errors = command("score", copied.name, tmp_path / "absent")
    assert code == 1 and "absent" in errors


# Students -----------------------------------------------------------------------------------------


def test_predict_writes_masks_and_lists_what_could_not_be_read(tmp_path, runs):
    folder, run = tmp_path / "images", finished(runs, constant=0.2)
    save(folder / "a.png", picture(0))
    code, out, errors = command("predict", run, folder, "--out", tmp_path / "out")
    assert (code, errors, out) == (0, "", f"masks, image 1/1\nmasks: {tmp_path / 'out'}\n")
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
        (["absent", "--out", "out"], "absent"),
        (["images", "--out", "a_file"], "a_file"),
        (["images", "--out", "out", "--threshold", "128"], "128"),
        (["images", "--out", "out", "--device", "tpu"], "device = 'tpu' cannot be used here"),
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


def test_export_prints_the_folder_of_the_files():
    options = {"run": fixed_run().path, "formats": "onnx", "sizes": 64}
    code, out, _ = command("export", *as_words(options))
    place = results.Path(out.splitlines()[-1].removeprefix("results: "))
    assert code == 0 and (place / "student.onnx").is_file() and results.is_done(place)


# Results ------------------------------------------------------------------------------------------


def test_list_and_show_report_on_finished_runs(student, runs):
    assert command("list") == (0, f"no finished run in {runs}\n", "")
    path = copy_of(student.path, runs)
    code, out, _ = command("list")
    row = out.splitlines()[2]
    assert (
        code == 0
        and f"runs/distill/{path.name}" in row
        and f"{student.summary['test']['dice']['mean']:.3f}" in row
    )
    assert row.endswith("kB") and out.splitlines()[-1].startswith("1 runs, ")
    assert "no finished run" in command("list", "teacher")[1]
    assert command("show", path.name) == (0, results.report(path) + "\n", "")


def test_the_module_is_the_command(student):
    words = [sys.executable, "-m", "lesionkd_core", "show", student.path.name]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0 and done.stdout == results.report(student.path) + "\n"
