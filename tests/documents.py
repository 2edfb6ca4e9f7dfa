"""What the documents hold: blocks of code, commands, links; and how each command is tested."""

import re
import textwrap
from pathlib import Path
from typing import NamedTuple

from tests.conftest import ROOT

PAGES = sorted([ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("data/*.md"), *ROOT.glob("data/results/*.md")])
PROGRAMS = r"(?:[A-Z_]+=\S+ )*(?:make|papermill|python3?|torchrun|srun|sbatch|dask|pip|conda|git|ruff|source|jupyter|playwright|apt-get|export) "
NOTEBOOKS = "tests/test_notebooks.py::test_a_notebook_runs_from_another_folder_with_changed_parameters"
RANKS = "tests/test_distributed.py"

TABLE = {
    r"make run": "here: test_a_notebook_is_run_and_found_again",
    r"make test": "not run: the test command itself",
    r"make paper": "tests/test_paper.py::test_the_paper_compiles",
    r"make lab|python -m jupyterlab": "here: test_jupyterlab_starts_where_make_lab_starts_it",
    r"make notebooks": "not run: takes long; nbval executes every notebook again",
    r"make runtime": "not run: a download",
    r"make (bench|bench BEFORE=earlier\.json|cost|soak|coverage)": "not run: takes too long",
    r"conda env create .*": "not run: a download",
    r"(CC=\S+ )?pip install .*": "not run: a download",
    r"source \.venv/bin/activate": "here: test_the_environment_is_entered",
    r"export LESIONKD_DATA=\S+": "tests/test_faults.py::test_a_mistyped_lesionkd_data_is_named",
    r"papermill notebooks/01_data_prep\.ipynb 01\.ipynb -p dataset /path/to/my-lesions": "here: test_30_pairs_go_through_by_the_page_s_own_words",
    r"papermill notebooks/0\d_\w+\.ipynb .*": NOTEBOOKS,
    r"python -m lesionkd_core( run)?": "here: test_a_notebook_is_run_and_found_again",
    r"python -m lesionkd_core run .*": "here: test_a_notebook_is_run_and_found_again",
    r"python -m lesionkd_core (list|show|clean)\b.*": "tests/test_runs.py",
    r"python -m lesionkd_core results.*": "tests/test_sweeps.py::test_a_summary_goes_by_any_parameter_and_condition",
    r"python -m lesionkd_core sweep study\.yaml --scheduler .*": "tests/test_sweeps.py::test_a_sweep_ends_complete_though_a_worker_is_killed_in_the_middle",
    r"python -m lesionkd_core sweep study\.yaml": "tests/test_sweeps.py::test_a_finished_result_is_found_until_its_stage_computes_something_else",
    r"python -m lesionkd_core download --list": "here: test_the_list_of_releases_is_shown",
    r"python -m lesionkd_core download \S+( --\S+.*)?": "not run: a download",
    r"python -m lesionkd_core predict( .*)?": "tests/test_faults_predict.py::test_all_read_is_exit_code_0",
    r"torchrun --nproc-per-node=2 -m( lesionkd_core (distill|train-teacher|ablate) .*)?": f"{RANKS}::test_two_processes_train_what_one_does",
    r"torchrun --nnodes=.*": "not run: several nodes",
    r"python -m lesionkd_core distill …": f"{RANKS}::test_two_processes_train_what_one_does",
    r"(CUDA_VISIBLE_DEVICES=0 )?dask (scheduler|worker)\b.*": "not run: a cluster scheduler",
    r"export OMP_NUM_THREADS=8( MKL_NUM_THREADS=8)?|export LESIONKD_RUNS=\S+ LESIONKD_DATA=\S+|first=\$\(scontrol .*|srun .*": "not run: a cluster scheduler",
    r"python -m tests\.readme_index": "here: test_what_is_generated_is_up_to_date",
    r"python -m tests\.benchmarks\.\w+": "not run: takes too long",
    r"python -m nbconvert .*": "here: test_a_notebook_is_executed_in_place",
    r"python -m pytest .*": "not run: the test command itself",
    r"ruff check": "here: test_the_linter_is_content",
}
"""Pattern of a command: the test that runs it, here or in another file, or why none does."""
PYTHON = {
    "run = lkd.distill(lkd.DistillConfig())": "here",
    'student = lkd.load_student("runs/distill/<run>")': "here",
    'cfg = lkd.TeacherConfig(dataset="phantom-ct"': "here",
    "folder = lkd.collect()": "tests/test_sweeps.py::test_a_summary_goes_by_any_parameter_and_condition",
    "from dask_jobqueue": "not run: a cluster scheduler",
    "lkd.measure_leak": "not run: hours of training",
    "lkd.sweep_weights": "not run: hours of training",
    "lkd.sweep_options": "not run: hours of training",
    "lkd.add_to_study": "not run: hours of training",
}
"""A line of each piece of Python: whether it is run here, elsewhere or not at all."""


class Block(NamedTuple):
    """Code in a page: its language (shell, python, text or what its fence says)."""

    page: Path
    kind: str
    text: str


def blocks(page: Path) -> list[Block]:
    """Fenced and indented code."""
    lines, found, at = page.read_text(encoding="utf-8").splitlines(), [], 0
    while at < len(lines):
        start, fence = at, re.match(r" *```(\w*)$", lines[at])
        if fence:
            at = next(i for i in range(start + 1, len(lines)) if lines[i].strip() == "```") + 1
            text = textwrap.dedent("\n".join(lines[start + 1:at - 1]))
            found.append(Block(page, {"bash": "shell", "sh": "shell"}.get(fence[1], fence[1] or _kind(text)), text))
        elif lines[at].startswith("    ") and not (at and lines[at - 1].strip()):
            while at < len(lines) and (lines[at].startswith("    ") or not lines[at].strip()):
                at += 1
            text = textwrap.dedent("\n".join(lines[start:at])).strip("\n")
            found.append(Block(page, _kind(text), text))
        else:
            at += 1
    return found


def _kind(text: str) -> str:
    """The language of a block that does not say it."""
    if re.match(PROGRAMS, text + " "):
        return "shell"
    try:
        compile(text, "block", "exec")
    except SyntaxError:
        return "text"
    return "python" if re.search(r"\blkd\.", text) else "text"


def commands(page: Path) -> list[str]:
    """Every command of a page, in blocks and within lines, without its comment."""
    found = []
    for block in blocks(page):
        if block.kind == "shell":
            found += [re.sub(r"(^|\s+)#.*$", "", line) for line in block.text.replace("\\\n", " ").splitlines()]
    found += [span for span in re.findall(r"`([^`\n]+)`", prose(page)) if re.match(PROGRAMS, span)]
    return [" ".join(command.split()) for command in found if command.strip()]


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    text = re.sub(r"^( *)```.*?^ *```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    return re.sub(r"(?:(?<=\n\n)|\A)(?:    .*\n?)+", "\n", text)


def links(page: Path) -> list[str]:
    """Targets of links and pictures that lie in the project."""
    targets = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", prose(page)))
    return [target for target in targets if not re.match(r"[a-z]+:", target)]


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}
