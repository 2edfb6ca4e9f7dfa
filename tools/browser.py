"""The page's code in Debian's Chromium, without the page: how long a network takes there."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, ClassVar, ParamSpec, TypeVar

import numpy as np

from lesionkd_core.config import LesionKDError
from lesionkd_core.export.formats import Format
from lesionkd_core.export.native import pack, wasm
from lesionkd_core.export.page import part
from lesionkd_core.export.parity import Deployed, Engine
from lesionkd_core.models import UNet

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
  const image = new Uint8Array(pixels * pixels * 3), begun = performance.now();
  let runs = 0;
  while (performance.now() - begun < 100 && runs < 50 || !runs) {
    await RUN;
    runs++;
  }
  return runs;
}"""


@contextmanager
def chromium() -> Iterator[Chromium]:
    """Debian's Chromium, headless, driven by Playwright."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        raise LesionKDError(
            "the engine browser needs the package playwright, which is not installed: "
            "pip install '.[dev]'."
        ) from None
    if not CHROMIUM.exists():
        raise LesionKDError(f"no browser at {CHROMIUM}: install Debian's package chromium.")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=FLAGS)
        yield browser
        browser.close()


class Browser:
    """A network in one browser page, in a thread of its own, because Playwright has a loop."""

    run = "window.network.prepared(image, pixels, pixels)"
    """JavaScript that segments `image`."""

    def __init__(self) -> None:
        self._thread, self._stack = ThreadPoolExecutor(1), ExitStack()
        self.page = self.call(self.open)

    def close(self) -> None:
        """Close the browser."""
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
        """Mean milliseconds of about 0.1 s of runs: processor time of the page's process."""
        begun = self.processor_time()
        runs: int = self.call(self.page.evaluate, TIME.replace("RUN", self.run), pixels)
        return [1e3 * (self.processor_time() - begun) / runs]

    def processor_time(self) -> float:
        """Seconds that the threads of all renderers have run."""
        stats = [s for p in self.renderers for s in Path(f"/proc/{p}/task").glob("*/schedstat")]
        return sum(int(stat.read_text().split()[0]) for stat in stats) / 1e9

    def open(self) -> Page:
        """A page with the network's code."""
        browser = self._stack.enter_context(chromium())
        page = browser.new_page()
        found = browser.new_browser_cdp_session().send("SystemInfo.getProcessInfo")
        self.renderers = [p["id"] for p in found["processInfo"] if p["type"] == "renderer"]
        page.set_default_timeout(600_000)
        page.set_content("<input type=file id=network>")
        page.add_script_tag(content=part("network.js"))
        return page


@dataclass(frozen=True)
class InBrowser(Engine):
    """An engine in a browser, which measures itself."""

    browser: Browser | None = None

    def milliseconds(self, images: np.ndarray) -> list[float]:
        """Of a few runs."""
        assert self.browser
        return self.browser.time(images.shape[1])


class InPage(Format):
    """The page's code in a browser, for U-Nets; nothing is exported."""

    name, packages = "browser", ("ziglang",)
    opened: ClassVar[list[Browser]] = []

    def timed(
        self, network: Deployed, folder: Path, images: dict[int, np.ndarray], int8: bool
    ) -> Iterator[Engine]:
        """One browser for each network."""
        if isinstance(network.network, UNet):
            model, browser = pack(network, 32), Browser()
            self.opened.append(browser)
            browser.load(model)
            yield InBrowser("browser", "float32", None, lambda x: x, model.nbytes, browser)
