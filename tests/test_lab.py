"""Notebook 04 in a real JupyterLab, driven in headless Chromium: Run All trains with a moving bar; once more after a restart, it finds its results."""

import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from types import SimpleNamespace

import nbformat
import pytest

from lesionkd_core.config import DistillConfig
from lesionkd_core.export.browser import CHROMIUM, FLAGS
from lesionkd_core.stages import train_teacher
from tests.conftest import ROOT

playwright = pytest.importorskip("playwright.sync_api", reason="JupyterLab is driven by playwright: pip install -e '.[dev]'")
NAME = "04_distill.ipynb"
PATIENCE = 900
"""Seconds; a run of the notebook takes one or two minutes."""
SETTINGS = {  # everything drawn at once, no question, nothing saved unasked
    "notebook-extension/tracker": '{"windowingMode": "none"}',
    "apputils-extension/notification": '{"fetchNews": "false", "checkForUpdates": false}',
    "docmanager-extension/plugin": '{"autosave": false}',
}
STATE = r"""() => {
  const cells = [...document.querySelectorAll('.jp-Notebook .jp-CodeCell')];
  const bars = [...document.querySelectorAll('.jp-OutputArea-output')].filter((output) => output.querySelector('.progress'));
  return {
    prompts: cells.map((cell) => cell.querySelector('.jp-InputPrompt').innerText),
    last: cells.at(-1).querySelector('.jp-OutputArea')?.innerText ?? '',
    bars: bars.map((bar) => bar.innerText.replace(/\s+/g, ' ').trim()),
  };
}"""


def results(runs) -> dict[str, int]:
    """When each finished result was finished."""
    return {str(p.parent.relative_to(runs)): p.stat().st_mtime_ns for p in runs.rglob("DONE")}


@contextmanager
def lab(folder, notebooks, runs):
    """JupyterLab with settings of its own on a free port; its address."""
    for name, text in SETTINGS.items():
        file = folder / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    places = {"JUPYTER_CONFIG_DIR": "config", "JUPYTER_DATA_DIR": "data", "JUPYTER_RUNTIME_DIR": "runtime", "IPYTHONDIR": "ipython"}
    places |= {"JUPYTERLAB_SETTINGS_DIR": "settings", "JUPYTERLAB_WORKSPACES_DIR": "workspaces"}
    env = os.environ | {name: str(folder / place) for name, place in places.items()} | {"LESIONKD_RUNS": str(runs)}
    env.pop("LESIONKD_DATA", None)
    token = secrets.token_hex(16)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = [f"--ServerApp.port={port}", "--ServerApp.port_retries=0", f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={notebooks}"]
    with open(folder / "log", "wb") as log, subprocess.Popen(
        [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", *options], env=env, cwd=folder, stdout=log, stderr=log
    ) as server:
        try:
            wait_for(port, server, folder / "log")
            yield f"http://127.0.0.1:{port}/lab/tree/{NAME}?token={token}"
        finally:
            server.terminate()
            try:
                server.wait(30)
            except subprocess.TimeoutExpired:  # its kernels notice and end
                server.kill()


def wait_for(port: int, server: subprocess.Popen, log) -> None:
    for _ in range(480):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        assert server.poll() is None, log.read_text()[-3000:]
        time.sleep(0.25)
    pytest.fail(f"JupyterLab does not answer: {log.read_text()[-3000:]}")


def choose(page, menu: str, command: str) -> None:
    page.locator(".lm-MenuBar-itemLabel", has_text=re.compile(f"^{menu}$")).click()
    page.locator(f".lm-Menu-item[data-command='{command}']").click()


def watch(page) -> list[list[str]]:
    """Every state of the progress bars, until the last cell has run and no cell waits."""
    page.locator(".jp-Notebook .jp-CodeCell").last.locator(".jp-InputPrompt", has_text="[*]:").wait_for(timeout=60_000)
    seen, deadline = [], time.monotonic() + PATIENCE
    while True:
        state = page.evaluate(STATE)
        if not seen or seen[-1] != state["bars"]:
            seen.append(state["bars"])
        if all(re.fullmatch(r"\[\d+\]:", prompt) for prompt in state["prompts"]):
            return seen
        assert "[*]:" in state["prompts"], f"a cell has failed: {state}"
        assert time.monotonic() < deadline, state
        page.wait_for_timeout(100)


def saved(page, file) -> list:
    """The code cells after File > Save."""
    before = file.stat().st_mtime_ns
    choose(page, "File", "docmanager:save")
    for _ in range(300):
        if file.stat().st_mtime_ns > before and not page.locator(".lm-TabBar-tab.jp-mod-dirty").count():
            break
        page.wait_for_timeout(100)
    return [cell for cell in nbformat.read(file, as_version=4).cells if cell.cell_type == "code"]


def whole(page) -> dict[str, int]:
    """How many outputs of some kinds, and pictures that are really drawn, the page shows."""
    count = {kind: page.locator(f".jp-OutputArea-output[data-mime-type='application/vnd.jupyter.{kind}']").count() for kind in ("stderr", "error")}
    pictures = page.locator(".jp-RenderedImage img")
    drawn = pictures.evaluate_all("(found) => found.filter((img) => img.complete && img.naturalWidth > 100 && img.getClientRects().length).length")
    return count | {"pictures": pictures.count(), "drawn": drawn, "bars": page.locator(".jp-OutputArea .progress").count()}


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    """Two runs of all cells, the second in a restarted kernel. Data and teacher are those of other tests; graph and student are trained here."""
    if not CHROMIUM.exists():
        pytest.skip(f"JupyterLab is tested in Debian's chromium, which is not installed ({CHROMIUM})")
    folder = tmp_path_factory.mktemp("lab")
    runs, notebooks = folder / "runs", folder / "notebooks"
    teacher = train_teacher(DistillConfig(), tell=lambda *_: None).path
    for done in (teacher, *(p.parent for p in teacher.parents[1].glob("prepare/*/DONE"))):
        (runs / done.parent.name).mkdir(parents=True, exist_ok=True)
        (runs / done.parent.name / done.name).symlink_to(done)
    notebooks.mkdir()
    notebook = nbformat.read(ROOT / "notebooks" / NAME, as_version=4)
    for cell in notebook.cells:
        cell.update({"outputs": [], "execution_count": None} if cell.cell_type == "code" else {})
    nbformat.write(notebook, notebooks / NAME)
    with lab(folder, notebooks, runs) as address, playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=str(CHROMIUM), args=FLAGS)
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        page.set_default_timeout(120_000)
        page.goto(address)
        page.locator(".jp-KernelName", has_text="Python 3").wait_for()
        page.locator(".jp-Notebook-ExecutionIndicator[data-status=idle]").wait_for()
        found = {}
        for run, command in (("first", "runmenu:run-all"), ("second", "runmenu:restart-and-run-all")):
            choose(page, "Run", command)
            if run == "second":
                page.locator(".jp-Dialog .jp-mod-accept").click()
            begun = time.monotonic()
            bars = watch(page)
            seconds = time.monotonic() - begun
            found[run] = SimpleNamespace(bars=bars, seconds=seconds, shown=whole(page), cells=saved(page, notebooks / NAME), results=results(runs))
        browser.close()
    for made in runs.glob("*/*/DONE"):  # the same training is not done again for nbval
        if not made.parent.is_symlink() and not (kept := teacher.parents[1] / made.parent.relative_to(runs)).exists():
            shutil.copytree(made.parent, kept)
    print(f"\nnotebook 04 in JupyterLab: {found['first'].seconds:.0f} s, once more {found['second'].seconds:.0f} s")
    return SimpleNamespace(**found)


@pytest.mark.parametrize("run", ["first", "second"])
def test_all_cells_run_in_order_to_done_without_an_error_or_a_word_on_stderr(session, run):
    found = getattr(session, run)
    assert [cell.execution_count for cell in found.cells] == list(range(1, len(found.cells) + 1))
    assert found.cells[-1].outputs[0].text.endswith("DONE\n")
    outputs = [output for cell in found.cells for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    assert found.shown["error"] == found.shown["stderr"] == 0


@pytest.mark.parametrize("run", ["first", "second"])
def test_its_figures_are_drawn_on_the_page(session, run):
    shown = getattr(session, run).shown
    assert shown["pictures"] == shown["drawn"] >= 5


def test_a_bar_moves_while_the_student_trains(session):
    steps = [re.search(r"student: .*?(\d+)/(\d+)", bar) for state in session.first.bars for bar in state]
    done = [int(step[1]) for step in steps if step]
    total = {int(step[2]) for step in steps if step}
    assert total == {DistillConfig().epochs} and done[-1] == max(total)
    assert done == sorted(done) and len({step for step in done if 0 < step < max(total)}) >= 2, done


def test_a_bar_is_all_that_tells_of_epochs(session):
    text = "".join(output.get("text", "") for cell in session.first.cells for output in cell.outputs)
    assert "student 1/" not in text and session.first.shown["bars"] >= 1


def test_after_a_restart_the_results_are_found_and_nothing_is_trained(session):
    assert session.second.shown["bars"] == 0
    assert all(set(state) <= set(session.first.bars[-1]) for state in session.second.bars), "bars of the first run vanish, none comes"
    assert session.second.results == session.first.results and any(name.startswith("distill/") for name in session.first.results)
