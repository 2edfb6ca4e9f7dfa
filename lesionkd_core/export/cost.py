"""What a network costs: parameters, multiplications, bytes, and milliseconds by engine."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd
import torch
from torch import nn

from ..models import ResNet34UNet, UNet, parameter_count
from ..results import log
from .config import TIMED
from .formats import FORMATS, Bench, Timed, check_installed, timed
from .native import peak
from .parity import Deployed, torch_engine

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "student": lambda: UNet(width=4),
    "student, width 8": lambda: UNet(width=8),
    "student, width 16": lambda: UNet(width=16),
    "unet64": lambda: UNet(width=64),
    "resnet34_unet": ResNet34UNet,
}
"""Networks that are compared, untrained: time does not depend on the values of the weights."""
SMALL = 2_000_000
"""Parameters up to which a network is also timed in int8."""
LATENCY = ["latency_ms_min", "latency_ms_median", "latency_ms_p10", "latency_ms_p90"]
COLUMNS = [
    *("model", "engine", "precision", "pixels", "parameters", "macs", "bytes"),
    *LATENCY,
    *("ratio_to_student", "share_of_peak"),
]
Timer = Callable[[], list[float]]


def macs(network: nn.Module, pixels: int) -> int:
    """Multiply-adds of one image, exact: half of torch's FlopCounterMode."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network.eval()(torch.zeros(1, 3, pixels, pixels))
    return int(counter.get_total_flops()) // 2


def measure_cost(
    pixels: tuple[int, ...] = (128,),
    engines: tuple[str, ...] = TIMED,
    networks: tuple[str, ...] = tuple(NETWORKS),
    repeats: int = 5,
) -> pd.DataFrame:
    """Time one image on one thread, all networks and engines in turns in one process.

    In every turn each network runs in each engine once or, where it is fast, for about 30 ms, so a
    disturbance of the machine affects all alike. Milliseconds are the processor time of this
    process, which other processes take nothing of; in a browser they are those of the clock.

    Parameters
    ----------
    pixels : tuple of int
        Image sides.
    engines : tuple of str
        `torch` and formats.
    networks : tuple of str
        Names of `NETWORKS`.
    repeats : int
        Turns, after a first one that warms up.

    Returns
    -------
    DataFrame
        `COLUMNS`: milliseconds; ratio_to_student divides the minimum by that of the plain student
        in float32 in the same engine and size; share_of_peak is the multiply-adds per second, at
        the minimum, as a fraction of what a loop of multiply-adds in registers reaches in the same
        turns (5th percentile of its times; only where the engine native is measured).
    """
    check_installed(tuple(name for name in engines if name != "torch"))
    rows: list[dict[str, object]] = []
    timers: list[Timer] = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory()))
        stack.enter_context(one_thread())
        for name in networks:
            log.info(f"exporting {name}")
            bench, known = _bench(name, folder, pixels, stack)
            for engine in _engines(engines, bench):
                about = {"engine": engine.engine, "precision": engine.precision}
                for side in pixels:
                    rows.append(known[side] | about | {"bytes": engine.size})
                    timers.append(timer_of(engine, side))
        count, loop = peak() if "native" in engines else (0, lambda: None)
        times: list[list[float]] = [[] for _ in timers]
        loops: list[float] = []
        for turn in range(repeats + 1):
            log.info(f"turn {turn} of {repeats}")
            for timer, found in zip(timers, times):
                measured = timer()
                if turn:
                    found += measured
                    loops += milliseconds(loop) if count else []
    table = pd.DataFrame(rows)
    table[LATENCY] = [[min(found), *np.percentile(found, (50, 10, 90))] for found in times]
    plain = table[(table["model"] == "student") & (table["precision"] == "float32")]
    fastest = plain.set_index(["engine", "pixels"])["latency_ms_min"]
    table["ratio_to_student"] = [
        row.latency_ms_min / fastest.get((row.engine, row.pixels), np.nan)
        for row in table.itertuples()
    ]
    best = count / np.percentile(loops, 5) if count else np.nan
    table["share_of_peak"] = table["macs"] / table["latency_ms_min"] / best
    return table[COLUMNS]


def _bench(
    name: str, folder: Path, pixels: tuple[int, ...], stack: ExitStack
) -> tuple[Bench, dict[int, dict[str, object]]]:
    """An untrained network with random images, and what is known of it without measuring."""
    own = folder / name.replace(", ", "-").replace(" ", "")
    own.mkdir()
    torch.manual_seed(0)
    network, noise = NETWORKS[name](), np.random.default_rng(0)
    count = parameter_count(network)
    images = {side: noise.integers(0, 256, (4, side, side, 3), dtype=np.uint8) for side in pixels}
    known: dict[int, dict[str, object]] = {}
    for side in pixels:
        operations = macs(network, side)
        known[side] = {"model": name, "pixels": side, "parameters": count, "macs": operations}
    return Bench(Deployed(network), own, images, count <= SMALL, stack), known


def _engines(names: tuple[str, ...], bench: Bench) -> Iterator[Timed]:
    for name in names:
        if name == "torch":
            size = 4 * parameter_count(bench.network)
            yield timed(torch_engine(bench.network), size, bench)
        else:
            yield from FORMATS[name].timed(bench)


def timer_of(engine: Timed, pixels: int) -> Timer:
    """A function that returns the milliseconds of a few runs."""
    run = partial(engine.run, pixels)
    return run if engine.clock else partial(milliseconds, run)  # type: ignore[return-value]


def milliseconds(run: Callable[[], object]) -> list[float]:
    """Processor time of one run, or of about 30 ms of runs, at most 20."""
    times: list[float] = []
    while sum(times) < 30 and len(times) < 20:
        begun = time.process_time()
        run()
        times.append(1e3 * (time.process_time() - begun))
    return times


@contextmanager
def one_thread() -> Iterator[None]:
    """Use one thread in torch, and on Linux one core for all that is started meanwhile."""
    threads, pinned = torch.get_num_threads(), hasattr(os, "sched_setaffinity")
    cores = os.sched_getaffinity(0) if pinned else set()
    torch.set_num_threads(1)
    if pinned:
        os.sched_setaffinity(0, {max(cores)})
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        if pinned:
            os.sched_setaffinity(0, cores)
