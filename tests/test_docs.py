"""README and docs: commands run, links resolve, messages are the code's, generated parts agree."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from PIL import Image

import lesionkd_core as lkd
from lesionkd_core import cli, config
from lesionkd_core.export import ExportConfig
from lesionkd_core.losses import TERMS
from lesionkd_core.models import UNet
from lesionkd_core.predict import TrainedNetwork
from lesionkd_core.sweep import configuration, find_notebook
from tests.conftest import ROOT
from tests.documents import PAGES, anchors, blocks, commands, links, prose
from tests.tiny import CFG, OPTIONS, image_folder, picture, save
from tools import readme_index
from tools.option_reference import COMMANDS, option_reference

by_page = pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
COMMANDS_SHOWN = sorted({command for page in PAGES for command in commands(page)})
OPTION_NAMES = {*config.AblationConfig.model_fields, *ExportConfig.model_fields}

# Commands -----------------------------------------------------------------------------------------


def words_of(command):
    """The words of a `lesionkd` command after the program; None for other commands."""
    found = re.match(r"(?:lesionkd|.*-m lesionkd_core) (.+)", command)
    return shlex.split(found[1]) if found else None


@pytest.mark.parametrize("command", [c for c in COMMANDS_SHOWN if words_of(c)])
def test_the_command_line_understands_every_command(command):
    name, *words = words_of(command)
    if not words:  # a mention
        assert name in cli.main.commands
        return
    given = cli.main.commands[name].make_context(name, list(words)).params
    if name == "run" and given["notebook"]:
        kind = configuration(find_notebook(given["notebook"]))
    elif name in COMMANDS:
        kind = COMMANDS[name]
    else:
        return
    cli.Parameters(dict(given["p"]), dict(given["r"])).read(kind)


@pytest.mark.parametrize("command", [c for c in COMMANDS_SHOWN if c.startswith("papermill ")])
def test_the_notebook_takes_the_parameters_of_every_command(command):
    words = shlex.split(command)
    given = {words[i + 1]: words[i + 2] for i, word in enumerate(words) if word == "-p"}
    kind = configuration(find_notebook(words[1]))
    cli.Parameters(given, {}).read(kind)


@pytest.mark.parametrize("command", [c for c in COMMANDS_SHOWN if c.startswith("make ")])
def test_make_knows_its_targets(command):
    words = [*command.split(), "--dry-run"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout, done.stderr


def test_the_first_section_names_the_two_commands():
    """`make run` runs the main job, `make test` passes the tests."""
    first = (ROOT / "README.md").read_text(encoding="utf-8").split("\n## ")[1]
    assert "\n    make run " in first and "\n    make test " in first


@by_page
def test_options_that_a_page_names_are_options(page):
    text = page.read_text(encoding="utf-8")
    named = re.findall(r"(?:^|[\s`(])-[pr] ([a-z]\w*)(?![\w.-])", text)
    named += re.findall(r"`([a-z]\w+) = [^`]+`", prose(page))
    assert {name for name in named} <= OPTION_NAMES


# Names of files and functions ---------------------------------------------------------------------


@by_page
def test_links_and_anchors_resolve(page):
    for target in links(page):
        name, _, anchor = target.partition("#")
        place = (page.parent / name).resolve() if name else page
        assert place.exists(), target
        assert not anchor or anchor in anchors(place), target


# Python and the way of the README -----------------------------------------------------------------

PUBLISHED = ROOT / "data" / "students" / "breast.safetensors"
PIECES = [block for page in PAGES for block in blocks(page) if block.kind == "python"]


@pytest.mark.parametrize("block", PIECES, ids=lambda b: f"{b.page.name}: {b.text[:30]}")
def test_python_in_the_documents_runs(block, student, tmp_path, monkeypatch):
    """With tiny options as globals, as in a notebook; results are found."""
    code = compile(block.text, str(block.page), "exec")
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "image.png", picture(0))
    if not PUBLISHED.exists():
        trained = TrainedNetwork(UNet(width=4).eval(), CFG, student.path)
        monkeypatch.setattr(lkd, "load_student", lambda name: trained, raising=False)
    names = dict(OPTIONS) if "from_notebook" in block.text else {}
    if "from_notebook" in block.text:
        names["lkd"] = lkd
    exec(code, names)
    if "probability" in names:
        assert names["probability"].shape == (48, 64)
    if "scores" in names:
        assert names["student"].path == student.path and len(names["scores"])


def run(words, folder, runs):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "LESIONKD_RUNS": str(runs)}
    command = [sys.executable, "-m", "lesionkd_core", *map(str, words)]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-3000:]
    return done.stdout


def commands_under(heading):
    """The words of the `lesionkd` commands in a section of the README."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = text.partition(f"## {heading}")[2].partition("\n## ")[0].splitlines()
    lines = [line.partition(" #")[0].strip() for line in lines if line.startswith("    lesionkd ")]
    return [words_of(line) for line in lines]


def test_the_readme_goes_from_pairs_to_masks(tmp_path):
    """The commands under "Your own data", with a tiny teacher and few epochs, in an empty folder;
    then that of the published student, or of this one if none is published."""
    prepares, distills, predicts = commands_under("Your own data")[:3]
    published, scored = commands_under("Use a trained student")
    data, runs = image_folder(tmp_path / "my-lesions", 30), tmp_path / "runs"
    empty = tmp_path / "empty"
    empty.mkdir()

    def filled(words, name="<run>", out="out"):
        places = {"/path/to/my-lesions": data, "/path/to/images": data / "images"}
        places |= {"/path/to/masks": tmp_path / out}
        return [places.get(word, str(word).replace("<run>", name)) for word in words]

    run(filled(prepares), empty, runs)
    [prepared] = runs.glob("prepare/my-lesions-cpu-s0-*/DONE")
    assert (prepared.parent / "figures" / "cases.png").is_file()
    tiny = [word for name, value in OPTIONS.items() for word in ("-p", name, value)]
    said = run([*filled(distills), *tiny], empty, runs)
    [student] = runs.glob("distill/my-lesions-cpu-s0-*/notebook.ipynb")
    assert f"results: {student.parent}" in said
    shown = [line.split()[0] for line in said[said.index("executed notebook") :].splitlines()]
    assert {"teacher", "student", "Otsu"} < set(shown), "no scores at the end"
    run(filled(predicts, student.parent.name), empty, runs)
    assert "breast" in published and "--overlays" in published
    name = "breast" if PUBLISHED.exists() else student.parent.name
    run([name if word == "breast" else word for word in filled(published, out="2")], empty, runs)
    if PUBLISHED.exists():
        assert "\nmy-lesions: Dice 0." in run(filled(scored), empty, runs)
    values = set()
    for out in ("out", "2"):
        for image in (data / "images").iterdir():
            mask = Image.open(tmp_path / out / image.name)
            assert mask.size == Image.open(image).size and mask.mode == "L"
            values |= set(np.unique(np.asarray(mask)))
        assert len(pd.read_csv(tmp_path / out / "areas.csv")) == 30
    assert values == {0, 255}, "masks, not probabilities"
    assert list(empty.iterdir()) == [], "nothing is written to the working folder"


# Generated parts ----------------------------------------------------------------------------------


def test_the_option_reference_is_up_to_date_and_has_every_option():
    page = (ROOT / "docs" / "options.md").read_text(encoding="utf-8")
    assert page == option_reference(), "python -m tools.readme_index"
    rows = set(re.findall(r"^\| `(\w+)` \|", page, re.M))
    assert rows == OPTION_NAMES | set(TERMS)


@pytest.mark.parametrize("page", readme_index.PAGES, ids=lambda p: p.name)
def test_generated_tables_are_up_to_date(page):
    text = page.read_text(encoding="utf-8")
    assert "<!-- table: " in text
    assert text == readme_index.with_tables(text), "python -m tools.readme_index"


# README and citation ------------------------------------------------------------------------------


def test_the_readme_is_short_and_gives_notice():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(readme.splitlines()) <= 150
    notices = ("patent application", "not a medical device", "For research", "No licence has been")
    searched = ("tiny U-Net", "nowledge distillation", "resumes", "k-fold", "ONNX", "mobile app")
    assert [words for words in (*notices, *searched) if words not in readme] == []
