"""Chromium as an engine: the phone page's own runtime, timed inside the page."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from ..config import LesionKDError
from .page import fetch_runtime

CHROMIUM = Path("/usr/bin/chromium")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
START = """async () => {
  const file = (id) => document.querySelector(id).files[0];
  ort.env.wasm.numThreads = 1;
  ort.env.wasm.wasmBinary = new Uint8Array(await file('#wasm').arrayBuffer());
  ort.env.wasm.wasmPaths = { mjs: URL.createObjectURL(new Blob([file('#glue')], { type: 'text/javascript' })) };
}"""
LOAD = """async () => {
  const bytes = new Uint8Array(await document.querySelector('#network').files[0].arrayBuffer());
  window.sessions = window.sessions ?? [];
  return window.sessions.push(await ort.InferenceSession.create(bytes, { executionProviders: ['wasm'] })) - 1;
}"""
TIME = """async ([which, pixels]) => {
  const image = () => ({ image: new ort.Tensor('uint8', new Uint8Array(pixels * pixels * 3), [1, pixels, pixels, 3]) }), times = [];
  while (times.reduce((a, b) => a + b, 0) < 30 && times.length < 20) {
    const begun = performance.now();
    await window.sessions[which].run(image());
    times.push(performance.now() - begun);
  }
  return times;
}"""


@contextmanager
def chromium() -> Iterator[Any]:
    """Debian's Chromium, headless, driven by Playwright (which wants a thread without an event loop)."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        raise LesionKDError("the browser is driven by playwright, which is not installed: pip install -e '.[dev]', or leave browser out") from None
    if not CHROMIUM.exists():
        raise LesionKDError(f"no browser at {CHROMIUM}: install Debian's package chromium, or leave browser out")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=FLAGS)
        yield browser
        browser.close()


class BrowserEngine:
    """ONNX Runtime Web in one browser page; works inside a notebook too, in a thread of its own."""

    def __enter__(self) -> BrowserEngine:
        self._thread, self._stack = ThreadPoolExecutor(1), ExitStack()
        self._page = self._thread.submit(self._open).result()
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.submit(self._stack.close).result()
        self._thread.shutdown()

    def timer(self, network: Path, pixels: tuple[int, ...]) -> dict[int, Callable[[], list[float]]]:
        """{S: a call that gives the milliseconds of a few runs at S x S px} of a network in ONNX."""
        which = self._thread.submit(self._load, network).result()
        return {s: partial(self._time, which, s) for s in pixels}

    def _time(self, which: int, pixels: int) -> list[float]:
        times: list[float] = self._thread.submit(self._page.evaluate, TIME, [which, pixels]).result()
        return times

    def _load(self, network: Path) -> int:
        self._page.set_input_files("#network", network)
        which: int = self._page.evaluate(LOAD)
        return which

    def _open(self) -> Any:
        runtime = fetch_runtime()
        page = self._stack.enter_context(chromium()).new_page()
        page.set_default_timeout(600_000)
        page.set_content("".join(f"<input type=file id={name}>" for name in ("network", "wasm", "glue")))
        page.add_script_tag(path=runtime["runtime"])
        for part in ("wasm", "glue"):
            page.set_input_files(f"#{part}", runtime[part])
        page.evaluate(START)
        return page
