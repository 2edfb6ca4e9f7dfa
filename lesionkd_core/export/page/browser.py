"""The page's code in Debian's Chromium, without the page: how long a network takes there."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, ParamSpec, TypeVar

import numpy as np

from ...config import LesionKDError
from ..native import wasm

if TYPE_CHECKING:
    from playwright.sync_api import Browser as Chromium
    from playwright.sync_api import Page

P = ParamSpec("P")
T = TypeVar("T")
CHROMIUM = Path("/usr/bin/chromium")
FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]
LOAD = """async (builds) => {
  const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const code = builds.map(bytes).find((build) => WebAssembly.validate(build));
  const model = await document.querySelector("#network").files[0].arrayBuffer();
  window.network = await load(code, new Uint8Array(model));
}"""
TIME = """async (pixels) => {
  const image = new Uint8Array(pixels * pixels * 3), times = [];
  while (times.reduce((a, b) => a + b, 0) < 30 && times.length < 20) {
    const begun = performance.now();
    await RUN;
    times.push(performance.now() - begun);
  }
  return times;
}"""


def part(name: str) -> str:
    """A file of the page."""
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


@contextmanager
def chromium() -> Iterator[Chromium]:
    """Debian's Chromium, headless, driven by Playwright."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        raise LesionKDError(
            "the engine page needs the package playwright, which is not installed: "
            "pip install '.[dev]', or leave page out of engines."
        ) from None
    if not CHROMIUM.exists():
        raise LesionKDError(
            f"no browser at {CHROMIUM}: install Debian's package chromium, or leave page out of "
            "engines."
        )
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=FLAGS)
        yield browser
        browser.close()


class Browser:
    """A network in one browser page, in a thread of its own: notebooks have a loop."""

    run = "window.network.prepared(image, pixels, pixels)"
    """JavaScript that segments `image`."""

    def __enter__(self) -> Browser:
        self._thread, self._stack = ThreadPoolExecutor(1), ExitStack()
        self.page = self.call(self.open)
        return self

    def __exit__(self, *_: object) -> None:
        self.call(self._stack.close)
        self._thread.shutdown()

    def call(self, function: Callable[P, T], *values: P.args, **options: P.kwargs) -> T:
        """Call a function of Playwright."""
        return self._thread.submit(function, *values, **options).result()

    def load(self, model: np.ndarray) -> None:
        """Load a packed network."""
        with TemporaryDirectory() as folder:
            file = Path(folder) / "network"
            file.write_bytes(model.tobytes())
            self.call(self.page.set_input_files, "#network", file)
            builds = [base64.b64encode(code).decode() for code in (wasm(True), wasm())]
            self.call(self.page.evaluate, LOAD, builds)

    def time(self, pixels: int) -> list[float]:
        """Milliseconds of a few runs at pixels x pixels."""
        times: list[float] = self.call(self.page.evaluate, TIME.replace("RUN", self.run), pixels)
        return times

    def open(self) -> Page:
        """A page with the network's code."""
        page = self._stack.enter_context(chromium()).new_page()
        page.set_default_timeout(600_000)
        page.set_content("<input type=file id=network>")
        page.add_script_tag(content=part("network.js"))
        return page
