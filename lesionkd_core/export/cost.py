"""What a network costs: parameters, multiplications, bytes, memory, and milliseconds by engine."""

from __future__ import annotations

import base64
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from ..config import ENGINES, LesionKDError
from ..models import ResNet34UNet, UNet, parameter_count
from ..results import log
from .executorch import executorch_engine, set_threads, write_executorch
from .native import native_engine, pack, peak, wasm
from .onnx import onnx_engine, write_int8, write_onnx
from .page import part
from .parity import Deployed, Engine, torch_engine

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "student": lambda: UNet(width=4),
    "student, width 8": lambda: UNet(width=8),
    "student, width 16": lambda: UNet(width=16),
    "student, stem 2": lambda: UNet(width=4, stem=2),
    "student, stem 4": lambda: UNet(width=4, stem=4),
    "unet64": lambda: UNet(width=64),
    "resnet34_unet": ResNet34UNet,
}
"""Networks that are compared, untrained: time does not depend on the values of the weights."""
SMALL = 2_000_000
"""Parameters up to which a network is also timed in int8."""
COLUMNS = [
    *("model", "engine", "precision", "pixels", "parameters", "macs", "bytes"),
    *("latency_ms_median", "latency_ms_p10", "latency_ms_p90", "ratio_to_student", "share_of_peak"),
]

Timer = Callable[[], list[float]]
More = Callable[[str, Path, tuple[int, ...]], Iterator[tuple[dict[str, Any], Timer]]]


def macs(network: nn.Module, pixels: int) -> int:
    """Multiply-adds of one image, exact: half of torch's FlopCounterMode."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network.eval()(torch.zeros(1, 3, pixels, pixels))
    return int(counter.get_total_flops()) // 2


def measure_cost(
    pixels: tuple[int, ...] = (128,),
    engines: tuple[str, ...] = ENGINES,
    networks: tuple[str, ...] = tuple(NETWORKS),
    repeats: int = 15,
    more: More | None = None,
) -> pd.DataFrame:
    """Time one image on one thread, all networks and engines in turns in one process.

    In every turn each network runs in each engine once or, where it is fast, for about 30 ms. So a
    disturbance of the machine affects all alike.

    Parameters
    ----------
    more : function of (network, ONNX file, pixels)
        Further engines: yields ({"engine", "precision", "pixels", "bytes"}, timer).

    Returns
    -------
    DataFrame
        `COLUMNS`: median milliseconds with 10th and 90th percentile; ratio_to_student is to the
        plain student in float32 in the same engine and size; share_of_peak is the multiply-adds per
        second as a fraction of what a loop of multiply-adds in registers reaches in the same turns
        (only where the engine native is measured).
    """
    rows: list[dict[str, Any]] = []
    timers: list[Timer] = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory()))
        stack.enter_context(one_thread("executorch" in engines))
        browser = stack.enter_context(Browser()) if "browser" in engines else None
        for name in networks:
            log.info(f"exporting {name}")
            own = folder / name.replace(", ", "-").replace(" ", "")
            for row, timer in _prepared(name, own, pixels, engines, browser, more):
                rows.append(row)
                timers.append(timer)
        count, run = peak() if "native" in engines else (0, lambda: None)
        times: list[list[float]] = [[] for _ in timers]
        best: list[float] = []
        for turn in range(repeats + 1):
            log.info(f"turn {turn} of {repeats}")
            best += timer_of(run)() if count and turn else []
            for timer, found in zip(timers, times):
                found.extend(timer() if turn else timer()[:0])  # the first turn warms up
    table = pd.DataFrame(rows)
    columns = ["latency_ms_median", "latency_ms_p10", "latency_ms_p90"]
    table[columns] = [np.percentile(found, (50, 10, 90)) for found in times]
    plain = table[(table["model"] == "student") & (table["precision"] == "float32")]
    plain = plain.set_index(["engine", "pixels"])["latency_ms_median"]
    table["ratio_to_student"] = [
        row.latency_ms_median / plain.get((row.engine, row.pixels), np.nan)
        for row in table.itertuples()
    ]
    speed = table["macs"] / table["latency_ms_median"]
    table["share_of_peak"] = speed / (count / np.median(best)) if best else np.nan
    return table[COLUMNS]


def _prepared(
    name: str,
    folder: Path,
    pixels: tuple[int, ...],
    engines: tuple[str, ...],
    browser: Browser | None,
    more: More | None,
) -> Iterator[tuple[dict[str, Any], Timer]]:
    """A row and its timer for every engine, precision and size of one network."""
    folder.mkdir()
    torch.manual_seed(0)
    network = NETWORKS[name]()
    deployed, count = Deployed(network), parameter_count(network)
    noise = np.random.default_rng(0)
    images = {s: noise.integers(0, 256, (4, s, s, 3), dtype=np.uint8) for s in pixels}
    known = {
        s: {"model": name, "pixels": s, "parameters": count, "macs": macs(network, s)}
        for s in pixels
    }

    def timed(engine: Engine, size: int) -> Iterator[tuple[dict[str, Any], Timer]]:
        about = {"engine": engine.name, "precision": engine.precision, "bytes": size}
        for s in pixels:
            yield known[s] | about, timer_of(partial(engine, images[s][:1]))

    if more or "onnx" in engines:
        write_onnx(deployed, folder / "float32.onnx")
    if "torch" in engines:
        yield from timed(torch_engine(deployed), 4 * count)
    for precision in ("float32", "int8") if count <= SMALL else ("float32",):
        quantized = precision == "int8"
        if "onnx" in engines:
            file = folder / f"{precision}.onnx"
            if quantized:
                write_int8(folder / "float32.onnx", file, images[pixels[0]])
            yield from timed(onnx_engine(file, precision, threads=1), file.stat().st_size)
        if "executorch" in engines:
            file = folder / f"{precision}.pte"
            write_executorch(deployed, file, pixels, images if quantized else None)
            yield from timed(executorch_engine(file, precision), file.stat().st_size)
    if isinstance(network, UNet):
        model = pack(deployed)
        if "native" in engines:
            yield from timed(native_engine(model), model.nbytes)
        if browser:
            which = browser.load(model)
            about = {"engine": "browser", "precision": "float32", "bytes": model.nbytes}
            for s in pixels:
                yield known[s] | about, partial(browser.time, which, s)
    for row, timer in more(name, folder / "float32.onnx", pixels) if more else ():
        yield known[row["pixels"]] | row, timer


def timer_of(run: Callable[[], Any]) -> Timer:
    """A timer of a function: runs it once, or for about 30 ms, at most 20 times."""

    def time_it() -> list[float]:
        times: list[float] = []
        while sum(times) < 30 and len(times) < 20:
            begun = time.perf_counter()
            run()
            times.append(1e3 * (time.perf_counter() - begun))
        return times

    return time_it


@contextmanager
def one_thread(executorch: bool) -> Iterator[None]:
    """Use one thread in torch, and on Linux one core for all that is started meanwhile."""
    threads, pinned = torch.get_num_threads(), hasattr(os, "sched_setaffinity")
    cores = os.sched_getaffinity(0) if pinned else set()
    torch.set_num_threads(1)
    if executorch:
        set_threads(1)
    if pinned:
        os.sched_setaffinity(0, {max(cores)})
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        if executorch:
            set_threads(threads)
        if pinned:
            os.sched_setaffinity(0, cores)


# The browser --------------------------------------------------------------------------------------

CHROMIUM = Path("/usr/bin/chromium")
FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]
LOAD = """async (builds) => {
  const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const code = builds.map(bytes).find((build) => WebAssembly.validate(build));
  const model = await document.querySelector("#network").files[0].arrayBuffer();
  window.networks = window.networks ?? [];
  return window.networks.push(await load(code, new Uint8Array(model))) - 1;
}"""
TIME = """([which, pixels]) => {
  const image = new Uint8Array(pixels * pixels * 3), times = [];
  while (times.reduce((a, b) => a + b, 0) < 30 && times.length < 20) {
    const begun = performance.now();
    window.networks[which](image, pixels, pixels);
    times.push(performance.now() - begun);
  }
  return times;
}"""


@contextmanager
def chromium() -> Iterator[Any]:
    """Debian's Chromium, headless, driven by Playwright."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        raise LesionKDError(
            "the engine browser needs the package playwright, which is not installed: "
            "pip install -e '.[dev]', or leave browser out of engines."
        ) from None
    if not CHROMIUM.exists():
        raise LesionKDError(
            f"no browser at {CHROMIUM}: install Debian's package chromium, or leave browser out of "
            "engines."
        )
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=FLAGS)
        yield browser
        browser.close()


class Browser:
    """The phone page's code in one browser page, in a thread of its own: notebooks have a loop."""

    def __enter__(self) -> Browser:
        self._thread, self._stack = ThreadPoolExecutor(1), ExitStack()
        self.page: Any = self.call(self._open)
        return self

    def __exit__(self, *_: object) -> None:
        self.call(self._stack.close)
        self._thread.shutdown()

    def call(self, function: Callable[..., Any], *values: Any) -> Any:
        """Call a function of Playwright."""
        return self._thread.submit(function, *values).result()

    def load(self, model: np.ndarray) -> int:
        """Load a packed network and return its number."""
        with TemporaryDirectory() as folder:
            file = Path(folder) / "network"
            file.write_bytes(model.tobytes())
            self.call(self.page.set_input_files, "#network", file)
            builds = [base64.b64encode(code).decode() for code in (wasm(True), wasm())]
            which: int = self.call(self.page.evaluate, LOAD, builds)
        return which

    def time(self, which: int, pixels: int) -> list[float]:
        """Milliseconds of a few runs at pixels x pixels."""
        times: list[float] = self.call(self.page.evaluate, TIME, [which, pixels])
        return times

    def _open(self) -> Any:
        page = self._stack.enter_context(chromium()).new_page()
        page.set_default_timeout(600_000)
        page.set_content("<input type=file id=network>")
        page.add_script_tag(content=part("network.js"))
        return page
