"""What a network costs: parameters, multiplications, bytes, and milliseconds by engine."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd
import torch
from torch import nn

from ..models import ResNet34UNet, UNet, parameter_count
from ..results import log
from .config import TIMED
from .formats import FORMATS, check_installed
from .parity import Deployed, Engine, torch_engine

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
    "ratio_to_student",
]


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
    process, of which others take nothing.

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
        in float32 in the same engine and size.
    """
    check_installed(tuple(name for name in engines if name != "torch"))
    rows: list[dict[str, object]] = []
    measured: list[tuple[Engine, np.ndarray, list[float]]] = []
    with TemporaryDirectory() as folder, one_thread():
        for name in networks:
            log.info(f"exporting {name}")
            for about, engine, image in _engines(name, engines, pixels, Path(folder)):
                rows.append(about)
                measured.append((engine, image, []))
        for turn in range(repeats + 1):
            log.info(f"turn {turn} of {repeats}")
            for engine, image, times in measured:
                found = engine.milliseconds(image)
                if turn:  # the first one warms up
                    times += found
    table = pd.DataFrame(rows)
    table[LATENCY] = [[min(t), *np.percentile(t, (50, 10, 90))] for *_, t in measured]
    plain = table[(table["model"] == "student") & (table["precision"] == "float32")]
    fastest = plain.set_index(["engine", "pixels"])["latency_ms_min"]
    table["ratio_to_student"] = [
        row.latency_ms_min / fastest.get((row.engine, row.pixels), np.nan)
        for row in table.itertuples()
    ]
    return table[COLUMNS]


def _engines(
    name: str, engines: tuple[str, ...], pixels: tuple[int, ...], folder: Path
) -> Iterator[tuple[dict[str, object], Engine, np.ndarray]]:
    """What is known without measuring, an engine and an image, for all engines and sizes."""
    torch.manual_seed(0)
    network, noise = NETWORKS[name](), np.random.default_rng(0)
    deployed, count = Deployed(network), parameter_count(network)
    images = {side: noise.integers(0, 256, (4, side, side, 3), dtype=np.uint8) for side in pixels}
    operations = {side: macs(network, side) for side in pixels}
    own = folder / name.replace(", ", "-").replace(" ", "")
    own.mkdir()
    for kind in engines:
        if kind == "torch":
            found = iter([torch_engine(deployed)])
        else:
            found = FORMATS[kind].timed(deployed, own, images, count <= SMALL)
        for engine in found:
            size = engine.file.stat().st_size if engine.file else engine.size or 4 * count
            about = {"engine": engine.name, "precision": engine.precision, "bytes": size}
            for side, image in images.items():
                known = {"pixels": side, "parameters": count, "macs": operations[side]}
                yield {"model": name} | about | known, engine, image[:1]


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
