"""The documents: every command is run or named with its reason, links resolve, messages are those of the code, what is generated is up to date."""

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib

import nbformat
import numpy as np
import pytest
import yaml
from PIL import Image

from lesionkd_core import __main__ as command_line
from lesionkd_core import config
from lesionkd_core.sweeps.notebooks import configuration, find_notebook, literal
from tests import draw_method
from tests.conftest import ROOT
from tests.documents import PAGES, PYTHON, TABLE, anchors, blocks, commands, links, prose
from tests.option_reference import DECIDED, option_reference

by_page = pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
ALL = {command: page for page in PAGES for command in commands(page)}
OPTIONS = {**config.AblationConfig.model_fields, **config.ExportConfig.model_fields}
TINY = {"dataset": "phantom-ct", "pixels": 32, "cases": 34, "teacher_epochs": 1, "graph_epochs": 1, "epochs": 1, "threads": 1, "device": "cpu",
        "weak_teacher": "allow"}


def how(command: str) -> str:
    """What the table says of a command, first come."""
    return next((said for pattern, said in TABLE.items() if re.fullmatch(pattern, command)), "")


def substituted(command: str) -> list[str]:
    """Words of a command, placeholders filled."""
    return shlex.split(command.replace("<run>", "busi-cpu-s0-1a2b3c4d"))


@by_page
def test_every_command_is_in_the_table(page):
    assert [command for command in commands(page) if not how(command)] == []


@by_page
def test_no_number_was_left_to_be_filled_in(page):
    assert re.findall(r"\{[A-Z_]+\}|\b(?:TODO|TBD|XXX)\b", prose(page)) == []


@by_page
def test_no_command_hides_in_a_block_that_is_taken_for_text(page):
    texts = [block.text for block in blocks(page) if block.kind == "text" and block.text not in MESSAGES]
    words = [line.split()[0] for text in texts for line in text.splitlines() if line.split()]
    assert [word for word in words if shutil.which(word) and not word.endswith(".py")] == []


def test_every_line_of_the_table_is_needed_and_names_a_test_that_is_there():
    matched = {next(pattern for pattern in TABLE if re.fullmatch(pattern, command)) for command in ALL}
    assert matched == set(TABLE)
    for said in (*TABLE.values(), *PYTHON.values()):
        if not said.startswith("not run: ") and said != "here":
            file, _, name = (said if not said.startswith("here: ") else f"tests/test_docs.py::{said[6:]}").partition("::")
            assert (ROOT / file).is_file(), file
            assert not name or f"def {name}(" in (ROOT / file).read_text(), said


@pytest.mark.parametrize("command", sorted(command for command in ALL if re.match(r"papermill|make run$|\S+ -m lesionkd_core run \S", command)))
def test_parameters_in_commands_are_taken_by_the_notebook(command):
    words = substituted("python -m lesionkd_core run 04_distill" if command == "make run" else command)
    given = {words[i + 1]: literal(words[i + 2]) for i, word in enumerate(words) if word == "-p"}
    configuration(find_notebook(next(word for word in words if re.search(r"\b0\d_\w+", word))))(**given)


@pytest.mark.parametrize("command", sorted(command for command in ALL if re.search(r"-m lesionkd_core \w+ [^…]", command)))
def test_the_command_line_understands_every_command(command, monkeypatch):
    """The real parser and, where there is one, the real configuration; what would start is only noted."""
    started = []
    for name in ("look_at_runs", "run_notebook", "run_sweep", "show_results", "predict_images", "download_release"):
        monkeypatch.setattr(command_line, name, lambda *taken: started.append(taken) or 0)
    words = substituted(command.partition("-m lesionkd_core ")[2])
    if words[0] in command_line.TRAINING:
        monkeypatch.setattr(command_line, "train", lambda name, given: started.append(
            getattr(config, command_line.TRAINING[name][0])(**{n: literal(v) for n, v in given.items()})) or 0)
    assert command_line.main(words) == 0 and len(started) == 1


@pytest.mark.parametrize("command", sorted(command for command in ALL if command.startswith("make ")))
def test_make_knows_its_targets(command):
    done = subprocess.run([*command.split(), "--dry-run"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout, done.stderr
    if command == "make run":
        assert "python -m lesionkd_core run 04_distill" in done.stdout


@by_page
def test_links_and_anchors_resolve(page):
    for target in links(page):
        name, _, anchor = target.partition("#")
        place = (page.parent / name).resolve() if name else page
        assert place.exists(), target
        assert not anchor or anchor in anchors(place), target


@by_page
def test_options_that_a_page_names_are_options(page):
    text = page.read_text(encoding="utf-8")
    named = re.findall(r"(?:^|[\s`(])-p ([a-z]\w*)", text) + re.findall(r"`([a-z]\w+) = [^`]+`", prose(page))
    assert {name for name in named if name not in OPTIONS} <= {"where"}  # of summarize_results


def test_what_is_generated_is_up_to_date(tmp_path):
    """README's tables are held by test_notebooks and test_study_results."""
    assert (ROOT / "docs" / "options.md").read_text(encoding="utf-8") == option_reference()
    draw_method.save(tmp_path / "method.svg")
    assert (ROOT / "docs" / "method.svg").read_bytes() == (tmp_path / "method.svg").read_bytes()


def test_the_option_reference_holds_every_option_once():
    rows = re.findall(r"^\| `(\w+)` \|", option_reference(), re.M)
    assert sorted(rows) == sorted(OPTIONS)
    for name in DECIDED:
        with pytest.raises(config.ConfigError, match="arms and seeds"):
            config.AblationConfig(**{name: config.DistillConfig().model_dump()[name]})


def templates() -> list[tuple[str, list[str]]]:
    """(class that is raised or empty, fixed pieces) of every text in the core."""
    found = []
    for path in (ROOT / "lesionkd_core").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr | ast.BinOp):
                found.append(("", pieces(node)))
            elif isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
                name = ast.unparse(node.exc.func)
                found.append(({"ValueError": "ConfigError"}.get(name, name), pieces(node.exc.args[0])))
    return [(raised, fixed) for raised, fixed in found if sum(map(len, fixed)) > 12]


def pieces(node: ast.AST) -> list[str]:
    """The fixed words of a text; between two of them anything is filled in."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return [node.value]
    parts = node.values if isinstance(node, ast.JoinedStr) else [node.left, node.right] if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add) else []
    joined = [""] if parts else ["", ""]
    for part in map(pieces, parts):
        joined = [*joined[:-1], joined[-1] + part[0], *part[1:]]
    return joined


def fits(text: str, fixed: list[str]) -> bool:
    """Whether a text is made of these words, in their order, with anything between."""
    if len(fixed) == 1:
        return text == fixed[0]
    at = len(fixed[0])
    for piece in fixed[1:-1]:
        at = text.find(piece, at) + len(piece) if text.find(piece, at) >= 0 else len(text) + 1
    return text.startswith(fixed[0]) and text.endswith(fixed[-1]) and at <= len(text) - len(fixed[-1])


def lines_of(fixed: list[str]) -> list[list[str]]:
    """The same, line by line."""
    lines = [[]]
    for piece in fixed:
        first, *rest = piece.split("\n")
        lines[-1].append(first)
        lines += [[line] for line in rest]
    return lines


MESSAGES = [block.text for block in blocks(ROOT / "docs" / "faq.md") if block.kind == "text"]
TEXTS = templates()
REFUSED = [(config.DistillConfig, {"wfeat": 3}), (config.DistillConfig, {"pixels": 100}), (config.AblationConfig, {"seed": 3})]


def refused(make: type[config.StageConfig], values: dict) -> str:
    """What is said of wrong parameters."""
    with pytest.raises(config.ConfigError) as error:
        make(**values)
    return f"ConfigError: {error.value}"


@pytest.mark.parametrize("message", sorted({*MESSAGES} - {*map(refused, *zip(*REFUSED))}), ids=lambda m: m[:50])
def test_a_message_of_the_faq_is_the_code_s(message):
    """Its class is raised with such a text, and lines that a text leaves open are texts of the code themselves."""
    name, text = re.fullmatch(r"(?:([A-Z]\w+): )?((?:.|\n)+)", message).groups()
    assert any(fits(text, fixed) for raised, fixed in TEXTS if raised == (name or ""))
    for line in text.splitlines():
        assert any(fits(line, part) for _, fixed in TEXTS for part in lines_of(fixed) if sum(map(len, part)) > 8), line


def test_refused_parameters_of_the_faq_are_refused_in_these_words():
    assert {refused(*case) for case in REFUSED} <= {*MESSAGES}


PIECES = [block for page in PAGES for block in blocks(page) if block.kind == "python"]


@pytest.mark.parametrize("block", PIECES, ids=lambda b: f"{b.page.name}: {b.text[:30]}")
def test_python_in_the_documents_compiles_uses_names_that_exist_and_is_in_the_table(block):
    import lesionkd_core as lkd

    compile(block.text, str(block.page), "exec")
    assert all(hasattr(lkd, name) for name in re.findall(r"\blkd\.(\w+)", block.text))
    assert len([line for line in PYTHON if line in block.text]) == 1


@pytest.fixture(scope="module")
def first_run(tmp_path_factory):
    """`python -m lesionkd_core run 04_distill`, as `make run` calls it, with tiny parameters: output and runs folder."""
    runs = tmp_path_factory.mktemp("docs")
    words = [word for name, value in TINY.items() for word in ("-p", name, str(value))]
    done = run([sys.executable, "-m", "lesionkd_core", "run", "04_distill", *words], ROOT, LESIONKD_RUNS=runs)
    return done.stdout, runs


def run(command: list[str], folder, **variables) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | {name: str(value) for name, value in variables.items()}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-3000:]
    return done


def test_a_notebook_is_run_and_found_again(first_run, monkeypatch):
    said, runs = first_run
    student = runs / re.search(r"^results: (.*)$", said, re.M)[1]
    assert (student / "DONE").is_file() and (student / "notebook.ipynb").is_file()
    monkeypatch.setenv("LESIONKD_RUNS", str(runs))
    here = [block.text for block in PIECES if any(line in block.text for line, said in PYTHON.items() if said == "here")]
    for text in here:
        filled = text.replace("<run>", student.name).replace("lkd.DistillConfig()", f"lkd.DistillConfig(**{TINY!r})").replace("runs/", f"{runs}/")
        names = {"image": np.zeros((50, 40, 3), np.uint8)}
        exec(compile(filled, "a page", "exec"), names)
        assert "probability" not in names or names["probability"].shape == (50, 40)
        assert "run" not in names or names["run"].path == student
    assert len(here) == list(PYTHON.values()).count("here")


def test_30_pairs_go_through_by_the_page_s_own_words(tmp_path):
    """data/own.md: a folder of pairs, no file edited, and the first figure where the page says it is."""
    [command] = [c for c in commands(ROOT / "data" / "own.md") if how(c).endswith("test_30_pairs_go_through_by_the_page_s_own_words")]
    for kind in ("images", "masks"):
        (tmp_path / "my-lesions" / kind).mkdir(parents=True)
    across = np.add.outer((np.arange(48) - 20) ** 2, (np.arange(64) - 30) ** 2)
    for i in range(30):
        noise = np.random.default_rng(i).integers(0, 90, (48, 64, 3))
        mask = across < (5 + i / 3) ** 2
        Image.fromarray((noise + 120 * mask[..., None]).astype(np.uint8)).save(tmp_path / "my-lesions" / "images" / f"case_{i}.png")
        Image.fromarray((255 * mask).astype(np.uint8)).save(tmp_path / "my-lesions" / "masks" / f"case_{i}.png")
    words = command.replace("/path/to/", f"{tmp_path}/").replace(" 01.ipynb", f" {tmp_path}/01.ipynb").split()
    run([sys.executable, "-m", *words, "--no-progress-bar"], ROOT, LESIONKD_RUNS=tmp_path / "runs")
    [prepared] = (tmp_path / "runs" / "prepare").glob("my-lesions-smoke-s0-????????")
    assert (prepared / "figures" / "cases.png").is_file()
    assert "figures/cases.png" in (ROOT / "data" / "own.md").read_text(encoding="utf-8")


def test_the_list_of_releases_is_shown(capsys):
    assert command_line.main(["download", "--list"]) == 0
    assert "busi" in capsys.readouterr().out


def test_the_environment_is_entered(tmp_path):
    run([sys.executable, "-m", "venv", "--without-pip", ".venv"], tmp_path)
    done = run(["bash", "-c", "source .venv/bin/activate && python -c 'import sys; print(sys.prefix)'"], tmp_path)
    assert done.stdout.strip() == str(tmp_path / ".venv")
    assert "-m venv .venv" in (ROOT / "Makefile").read_text()


def test_jupyterlab_starts_where_make_lab_starts_it(tmp_path):
    assert "-m jupyterlab notebooks" in (ROOT / "Makefile").read_text()
    command = [sys.executable, "-m", "jupyterlab", "notebooks", "--no-browser", "--port=0", "--allow-root"]
    settings = os.environ | {"JUPYTER_RUNTIME_DIR": str(tmp_path), "JUPYTER_CONFIG_DIR": str(tmp_path), "IPYTHONDIR": str(tmp_path)}
    with subprocess.Popen(command, cwd=ROOT, env=settings, stderr=subprocess.PIPE, text=True) as lab:
        try:
            assert any("/lab?token=" in line for line in lab.stderr), "it ended without an address"
        finally:
            lab.kill()  # a SIGTERM before its loop runs is lost, and it stays


def test_a_notebook_is_executed_in_place(tmp_path):
    [command] = [command for command in ALL if command.startswith("python -m nbconvert")]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("import lesionkd_core as lkd\nprint(lkd.DistillConfig().width)")])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, tmp_path / "one.ipynb")
    run([sys.executable, *command.replace("notebooks/02_edge_labels.ipynb", "one.ipynb").split()[1:]], tmp_path)
    [cell] = nbformat.read(tmp_path / "one.ipynb", as_version=4).cells
    assert cell.outputs[0].text == "4\n"
    assert command.removeprefix("python ").removesuffix("notebooks/02_edge_labels.ipynb") in (ROOT / "Makefile").read_text()


def test_the_linter_is_content():
    run([sys.executable, "-m", "ruff", "check"], ROOT)


def test_the_citation_file_is_whole():
    """Fields that version 1.2.0 asks for, and the version of the package."""
    cff = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= set(cff) and cff["cff-version"] == "1.2.0"
    assert cff["version"] == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert [reference["type"] for reference in cff["references"]] == ["patent", "article", "conference-paper", "conference-paper"]
    for work in (cff, *cff["references"]):
        assert work["title"] and all({"name", "family-names"} & set(author) for author in work["authors"])


def test_the_readme_gives_notice():
    """Patent, research, no device, no licence, supported systems."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    notices = "patent application", "for research", "not a medical device", "No licence has been chosen yet"
    assert all(words in readme for words in (*notices, "x86-64 with Python 3.11", "Not tested: macOS"))
