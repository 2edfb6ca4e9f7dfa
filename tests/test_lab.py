"""Notebook 04 in JupyterLab, driven in headless Chromium: it trains with a progress bar and shows
a viewer that reacts."""

from __future__ import annotations

import os
import re
import secrets
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from types import SimpleNamespace

import nbformat
import pytest
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook

from tests.conftest import ROOT
from tools.browser import CHROMIUM, FLAGS

playwright = pytest.importorskip(
    "playwright.sync_api", reason="JupyterLab is driven by playwright: pip install -e '.[dev]'"
)
NAME = "04_distill.ipynb"
EPOCHS = 8
PARAMETERS = {"pixels": 32, "cases": 48, "label_fraction": 0.5, "weak_teacher": "allow"}
PARAMETERS |= {"teacher_epochs": 2, "graph_epochs": 1, "epochs": EPOCHS}
PATIENCE = 600
"""Seconds for a run of the notebook; on two idle cores it takes about half a minute."""
SETTINGS = {  # everything drawn at once, no question, nothing saved unasked
    "notebook-extension/tracker": '{"windowingMode": "none"}',
    "apputils-extension/notification": '{"fetchNews": "false", "checkForUpdates": false}',
    "docmanager-extension/plugin": '{"autosave": false}',
}
FOLDERS = ["JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR"]
FOLDERS += ["JUPYTERLAB_WORKSPACES_DIR", "IPYTHONDIR"]
STATE = r"""() => {
  const cells = [...document.querySelectorAll('.jp-Notebook .jp-CodeCell')];
  const outputs = [...document.querySelectorAll('.jp-OutputArea-output')];
  const bars = outputs.filter((output) => output.querySelector('.progress'));
  return {
    prompts: cells.map((cell) => cell.querySelector('.jp-InputPrompt').innerText),
    bars: bars.map((bar) => bar.innerText.replace(/\s+/g, ' ').trim()),
  };
}"""
DRAWN = """(images) => images.filter((image) =>
  image.complete && image.naturalWidth > 100 && image.getClientRects().length).length"""

PIXELS = """(image) => {  // what is drawn; its address may be gone when the next picture comes
  if (!image.complete || !image.naturalWidth) return null;
  const canvas = document.createElement('canvas');
  [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
  canvas.getContext('2d').drawImage(image, 0, 0);
  return canvas.toDataURL();
}"""


@contextmanager
def lab(folder, notebooks, runs):
    """JupyterLab with settings of its own on a free port; its address."""
    for name, text in SETTINGS.items():
        file = folder / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    env = os.environ | {name: str(folder / name.lower()) for name in FOLDERS}
    env |= {"JUPYTERLAB_SETTINGS_DIR": str(folder / "settings"), "LESIONKD_RUNS": str(runs)}
    token = secrets.token_hex(16)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root"]
    command += [f"--ServerApp.port={port}", "--ServerApp.port_retries=0"]
    command += [f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={notebooks}"]
    with (
        open(folder / "log", "wb") as log,
        subprocess.Popen(command, env=env, cwd=folder, stdout=log, stderr=log) as server,
    ):
        try:
            wait_for(port, server, folder / "log")
            yield f"http://127.0.0.1:{port}/lab/tree/{NAME}?token={token}"
        finally:
            server.terminate()
            try:
                server.wait(30)
            except subprocess.TimeoutExpired:  # its kernels notice and end
                server.kill()


def wait_for(port, server, log):
    for _ in range(480):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        assert server.poll() is None, log.read_text()[-3000:]
        time.sleep(0.25)
    pytest.fail(f"JupyterLab does not answer: {log.read_text()[-3000:]}")


def choose(page, menu, command):
    page.locator(".lm-MenuBar-itemLabel", has_text=re.compile(f"^{menu}$")).click()
    page.locator(f".lm-Menu-item[data-command='{command}']").click()


def watch(page):
    """Every state of the progress bars, until the last cell has run and no cell waits."""
    last = page.locator(".jp-Notebook .jp-CodeCell").last
    last.locator(".jp-InputPrompt", has_text="[*]:").wait_for(timeout=60_000)
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


def saved(page, file):
    """The code cells after File > Save."""
    before = file.stat().st_mtime_ns
    choose(page, "File", "docmanager:save")
    for _ in range(300):
        dirty = page.locator(".lm-TabBar-tab.jp-mod-dirty").count()
        if file.stat().st_mtime_ns > before and not dirty:
            break
        page.wait_for_timeout(100)
    cells = nbformat.read(file, as_version=4).cells
    return [cell for cell in cells if cell.cell_type == "code"]


def shown(page):
    """How many outputs of some kinds, and pictures that are really drawn, the page shows."""
    kinds = {
        kind: page.locator(f"[data-mime-type='application/vnd.jupyter.{kind}']").count()
        for kind in ("stderr", "error")
    }
    pictures = page.locator(".jp-RenderedImage img")
    drawn = {"pictures": pictures.count(), "drawn": pictures.evaluate_all(DRAWN)}
    return kinds | drawn | {"bars": page.locator(".jp-OutputArea .progress").count()}


def use_viewer(page):
    """The picture of the viewer at first and after a change of each of its controls."""
    viewer = page.locator(".widget-vbox", has=page.locator(".widget-image"))
    picture, seen = viewer.locator("img.widget-image"), []

    def changed(what):
        for _ in range(300):
            pixels = picture.evaluate(PIXELS)
            if pixels and (not seen or pixels != seen[-1][1]):
                seen.append((what, pixels))
                return
            page.wait_for_timeout(100)

    changed("start")
    for name, keys in (("case", ["ArrowRight"]), ("threshold", ["PageDown"] * 3 + ["ArrowLeft"])):
        handle = viewer.locator(".widget-slider", has_text=name).locator(".noUi-handle")
        handle.focus()
        for key in keys:
            handle.press(key)
        changed(name)
    viewer.locator(".widget-checkbox", has_text="truth").locator("input").uncheck()
    changed("truth")
    return [what for what, _ in seen]


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """Notebook 04 with small parameters on a page, its file and the folder of results."""
    if not CHROMIUM.exists():
        pytest.skip(f"JupyterLab is tested in Debian's chromium, which is not at {CHROMIUM}")
    folder = tmp_path_factory.mktemp("lab")
    runs, notebooks = folder / "runs", folder / "notebooks"
    notebooks.mkdir()
    notebook = load_notebook_node(str(ROOT / "notebooks" / NAME))
    for cell in notebook.cells:
        cell.update({"outputs": [], "execution_count": None} if cell.cell_type == "code" else {})
    notebook = parameterize_notebook(notebook, PARAMETERS, kernel_name="python3", language="python")
    nbformat.write(notebook, notebooks / NAME)
    with lab(folder, notebooks, runs) as address, playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=str(CHROMIUM), args=FLAGS)
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        page.set_default_timeout(120_000)
        page.goto(address)
        page.locator(".jp-KernelName", has_text="Python 3").wait_for()
        page.locator(".jp-Notebook-ExecutionIndicator[data-status=idle]").wait_for()
        yield SimpleNamespace(page=page, file=notebooks / NAME)
        browser.close()


@pytest.fixture(scope="module")
def first(opened):
    """What is seen while all cells run and after it."""
    page = opened.page
    choose(page, "Run", "runmenu:run-all")
    seen = {"bars": watch(page), "shown": shown(page), "viewer": use_viewer(page)}
    return SimpleNamespace(**seen, cells=saved(page, opened.file))


def test_run_all_ends_with_done(first):
    """In order, without an error and without a line on standard error."""
    assert [cell.execution_count for cell in first.cells] == list(range(1, len(first.cells) + 1))
    assert first.cells[-1].outputs[0].text.endswith("DONE\n")
    outputs = [output for cell in first.cells for output in cell.outputs]
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    assert first.shown["error"] == first.shown["stderr"] == 0


def test_figures_are_drawn_on_the_page(first):
    found = first.shown
    assert found["pictures"] == found["drawn"] >= 6


def test_the_viewer_draws_again_after_each_change_of_a_control(first):
    assert first.viewer == ["start", "case", "threshold", "truth"]


def test_a_bar_moves_while_the_students_train(first):
    bars = [bar for state in first.bars for bar in state]
    steps = [found for bar in bars if (found := re.search(r"2 students: .*?(\d+)/(\d+)", bar))]
    done = [int(step[1]) for step in steps]
    assert {int(step[2]) for step in steps} == {EPOCHS} and done[-1] == EPOCHS
    assert done == sorted(done) and len({step for step in done if 0 < step < EPOCHS}) >= 2, done
