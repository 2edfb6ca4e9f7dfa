"""What a network costs: parameters, multiplications, bytes, memory and milliseconds, in every engine."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from ..config import LesionKDError
from ..networks import ResNet34UNet, UNet
from ..progress import Tell
from .browser import BrowserEngine
from .deploy import Deployed
from .engines import Engine, executorch_engine, executorch_threads, onnx_engine, torch_engine
from .to_executorch import write_executorch
from .to_onnx import write_int8, write_onnx

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "student": lambda: UNet(width=4),
    "student, width 2": lambda: UNet(width=2),
    "student, width 8": lambda: UNet(width=8),
    "student, width 16": lambda: UNet(width=16),
    "student, stem 2": lambda: UNet(width=4, stem=2),
    "student, stem 4": lambda: UNet(width=4, stem=4),
    "unet64": lambda: UNet(width=64),
    "resnet34_unet": ResNet34UNet,
}
"""What is compared, untrained: time does not depend on the weights' values. BatchNorm is folded in all U-Nets."""
SMALL = 2_000_000
"""Parameters up to which a network is also measured in int8."""
ENGINES = ("torch", "onnx", "executorch", "browser")
COLUMNS = ["model", "engine", "precision", "pixels", "parameters", "macs", "bytes", "latency_ms_median", "latency_ms_p10", "latency_ms_p90", "ratio_to_student"]


def macs(network: nn.Module, pixels: int) -> int:
    """Multiplications with addition of one image, exact: half of torch's FlopCounterMode."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network.eval()(torch.zeros(1, 3, pixels, pixels))
    return int(counter.get_total_flops()) // 2


def measure_cost(
    pixels: tuple[int, ...] = (128,), engines: tuple[str, ...] = ENGINES[:3], networks: tuple[str, ...] = tuple(NETWORKS), repeats: int = 15,
    tell: Tell = print,
) -> pd.DataFrame:
    """Latency of one image on one thread, all networks and engines in turns in one process.

    In every turn each network in each engine runs once or, where it is quick, for about 30 ms; so a disturbance of the
    machine meets all alike. int8 is measured for the small networks only.

    Returns
    -------
    DataFrame
        `COLUMNS`: bytes are the file's; milliseconds with 10th and 90th percentile; ratio_to_student is the median over
        that of the plain student in float32 in the same engine at the same size.
    """
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory()))
        stack.enter_context(one_thread("executorch" in engines))
        browser = stack.enter_context(BrowserEngine()) if "browser" in engines else None
        rows, timers = [], []
        for name in networks:
            tell(f"exporting {name}")
            for row, timer in _prepared(name, folder / name.replace(", ", "-").replace(" ", ""), pixels, engines, browser):
                rows.append(row)
                timers.append(timer)
        times: list[list[float]] = [[] for _ in timers]
        for turn in range(repeats + 1):
            tell(f"turn {turn} of {repeats}")
            for timer, found in zip(timers, times):
                found.extend(timer() if turn else timer()[:0])  # the first turn warms up
    table = pd.DataFrame(rows)
    table[["latency_ms_median", "latency_ms_p10", "latency_ms_p90"]] = [np.percentile(found, (50, 10, 90)) for found in times]
    plain = table[(table["model"] == "student") & (table["precision"] == "float32")].set_index(["engine", "pixels"])["latency_ms_median"]
    table["ratio_to_student"] = [row.latency_ms_median / plain.get((row.engine, row.pixels), np.nan) for row in table.itertuples()]
    return table[COLUMNS]


def _prepared(
    name: str, folder: Path, pixels: tuple[int, ...], engines: tuple[str, ...], browser: BrowserEngine | None
) -> Iterator[tuple[dict[str, Any], Callable[[], list[float]]]]:
    """A row and its timer for every engine, precision and size of one network."""
    folder.mkdir()
    torch.manual_seed(0)
    network = NETWORKS[name]()
    deployed, count = Deployed(network).eval(), sum(p.numel() for p in network.parameters())
    precisions = ("float32", "int8") if count <= SMALL else ("float32",)
    images = {s: np.random.default_rng(0).integers(0, 256, (4, s, s, 3), dtype=np.uint8) for s in pixels}
    known = {s: {"model": name, "pixels": s, "parameters": count, "macs": macs(network, s)} for s in pixels}
    write_onnx(deployed, folder / "float32.onnx")
    if "int8" in precisions:
        write_int8(folder / "float32.onnx", folder / "int8.onnx", images[pixels[0]])
    if "torch" in engines:
        engine = torch_engine(deployed)
        for s in pixels:
            yield known[s] | {"engine": engine.name, "precision": "float32", "bytes": 4 * count}, _timer(engine, images[s][:1])
    for precision in precisions:
        for kind in ("onnx", "executorch"):
            if kind not in engines:
                continue
            file = folder / f"{precision}.{'onnx' if kind == 'onnx' else 'pte'}"
            if kind == "executorch":
                write_executorch(deployed, file, pixels, images if precision == "int8" else None)
            engine = onnx_engine(file, precision, threads=1) if kind == "onnx" else executorch_engine(file, precision)
            for s in pixels:
                yield known[s] | {"engine": engine.name, "precision": precision, "bytes": file.stat().st_size}, _timer(engine, images[s][:1])
        if browser:
            file = folder / f"{precision}.onnx"
            for s, timer in browser.timer(file, pixels).items():
                yield known[s] | {"engine": "browser (ONNX Runtime Web)", "precision": precision, "bytes": file.stat().st_size}, timer


def _timer(engine: Engine, image: np.ndarray) -> Callable[[], list[float]]:
    def time_it() -> list[float]:
        times: list[float] = []
        while sum(times) < 30 and len(times) < 20:
            begun = time.perf_counter()
            engine(image)
            times.append(1e3 * (time.perf_counter() - begun))
        return times

    return time_it


@contextmanager
def one_thread(executorch: bool) -> Iterator[None]:
    """Torch on one thread, and where the system can do that, everything started meanwhile on one core."""
    threads, cores = torch.get_num_threads(), os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    torch.set_num_threads(1)
    if executorch:
        executorch_threads(1)
    if cores:
        os.sched_setaffinity(0, {max(cores)})
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        if executorch:
            executorch_threads(threads)
        if cores:
            os.sched_setaffinity(0, cores)


def peak_memory(file: Path, pixels: int) -> float:
    """MiB that a fresh process needs at its peak to load a network in ONNX Runtime and segment one image, beyond the runtime itself."""
    code = (
        "import re, sys, numpy as np, onnxruntime as ort\n"
        "def status(name): return int(re.search(name + r':\\s+(\\d+)', open('/proc/self/status').read())[1])\n"
        "open('/proc/self/clear_refs', 'w').write('5')\n"  # the peak starts anew; a child's ru_maxrss would start at its parent's
        "before = status('VmRSS')\n"
        "options = ort.SessionOptions(); options.intra_op_num_threads = 1\n"
        "session = ort.InferenceSession(sys.argv[1], options, providers=['CPUExecutionProvider'])\n"
        "session.run(None, {'image': np.zeros((1, int(sys.argv[2]), int(sys.argv[2]), 3), np.uint8)})\n"
        "print(status('VmHWM') - before)"
    )
    if not Path("/proc/self/clear_refs").exists():
        raise LesionKDError("peak memory is read from /proc, which this system does not have; measure on Linux")
    done = subprocess.run([sys.executable, "-c", code, str(file), str(pixels)], capture_output=True, text=True, check=True)
    return int(done.stdout) / 1024
