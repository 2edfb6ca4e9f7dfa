"""Tasks on Dask: a cluster of this machine or one that runs already, progress, failures kept, lost workers replaced."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import LesionKDError
from ..datasets import data_root
from ..progress import Progress, Tell
from ..store import runs_root, short, write_table
from .notebooks import execute, find_notebook, finished_results, package
from .plan import Task, plan, read_sweep

if TYPE_CHECKING:
    import pandas as pd

MEMORY_OF_A_RUN = 3 * 2**30
"""Bytes that a run is given room for; training the teacher takes 1.0 GiB at 128 px and 2.1 GiB at 256 px in batches of 16."""


def sweep(file: Path, scheduler: str = "", workers: int = 0, gpus: int | None = None, tell: Tell = print) -> pd.DataFrame:
    """Run what a sweep file asks for and is not finished, every task one executed notebook.

    Parameters
    ----------
    file : Path
        The sweep file (docs/sweeps.md).
    scheduler : str
        Address of a running Dask scheduler; empty starts workers on this machine, for the time of the sweep.
    workers : int
        Runs at a time on this machine's CPU; 0 takes as many as cores, memory and runs allow. They share the cores.
    gpus : int, optional
        Runs at a time on this machine's GPUs; None takes one for each GPU.

    Returns
    -------
    DataFrame
        One row a task: run, status (made, found, failed, not started), seconds, results, notebook, error.
        Also kept as `sweeps/<name of the file>.csv` beside the runs.
    """
    import pandas as pd

    file = Path(file)
    if workers < 0 or (gpus or 0) < 0:
        raise LesionKDError(f"--workers = {workers}, --gpus = {gpus}: wants numbers from 0")
    runs = read_sweep(file)
    rows = {run.target: _row(run, "found", 0.0, place) for run in runs if (place := finished_results(run.target))}
    tell(f"{file.name}: {len(runs)} runs, {len(rows)} of them found finished")
    if tasks := plan([run for run in runs if run.target not in rows]):
        with connect(scheduler, tasks, workers, gpus, tell) as client:
            rows |= _drive(client, tasks)
    table = pd.DataFrame(rows.values())
    write_table(runs_root() / "sweeps" / f"{file.stem}.csv", table)
    return table


@contextmanager
def connect(scheduler: str, tasks: list[Task], workers: int, gpus: int | None, tell: Tell = print) -> Iterator[Any]:
    """A Dask client of the scheduler at an address, or of workers of this machine that end with the block."""
    distributed = package("distributed")
    if scheduler:
        if workers or gpus is not None:
            raise LesionKDError("--workers and --gpus are for this machine; the workers of a running scheduler are as they were started")
        try:
            client = distributed.Client(scheduler, timeout=10)
        except (OSError, ValueError) as error:
            raise LesionKDError(f"no Dask scheduler answers at {scheduler}: {error}. Start one with 'dask scheduler', or leave --scheduler out.") from None
        with client:
            if not client.scheduler_info(n_workers=-1)["workers"]:
                tell(f"{scheduler} has no workers yet; waiting for the first")
                client.wait_for_workers(1)
            yield client
        return
    local = {"host": "127.0.0.1", "dashboard_address": "127.0.0.1:0"}
    spec = {i: {"cls": distributed.Nanny, "options": local | options} for i, options in enumerate(_slots(tasks, workers, gpus))}
    starter = {"cls": distributed.Scheduler, "options": local | {"port": 0}}
    with distributed.SpecCluster(spec, starter, silence_logs=logging.ERROR) as cluster, distributed.Client(cluster) as client:
        client.wait_for_workers(len(spec))
        tell(f"{len(spec)} at a time, {spec[0]['options']['env']['OMP_NUM_THREADS']} threads each")
        yield client


def _slots(tasks: list[Task], workers: int, gpus: int | None) -> list[dict[str, Any]]:
    """Options of this machine's workers: those of GPUs, each seeing one, then those of the CPU, seeing none."""
    from dask.system import CPU_COUNT
    from distributed.system import MEMORY_LIMIT

    visible = _gpus() if gpus != 0 else []
    visible = [(visible or ["0"])[i % max(len(visible), 1)] for i in range(len(visible) if gpus is None else gpus)]
    on_cpu = [task for task in tasks if task.cfg.device == "cpu" or not visible]
    if any(task.cfg.device == "cuda" for task in tasks) and not visible:
        raise LesionKDError("device = 'cuda', but there is no GPU slot: torch sees no GPU here, or --gpus is 0; device 'auto' takes what there is")
    workers = min(len(on_cpu), workers or max(1, min(CPU_COUNT, MEMORY_LIMIT // MEMORY_OF_A_RUN)))
    threads = str(max(1, CPU_COUNT // (len(visible) + workers)))
    env = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), threads)
    calm = "import signal; signal.signal(signal.SIGINT, lambda *_: None)"  # Ctrl-C reaches the whole terminal; the sweep ends its workers itself
    shared = {"nthreads": 1, "memory_limit": None, "silence_logs": logging.ERROR, "preload": [calm]}  # its memory would be the worker's, without the kernel
    slots = [{"env": env | {"CUDA_VISIBLE_DEVICES": gpu}, "resources": {"GPU": 1}} for gpu in visible]
    return [shared | options for options in slots + [{"env": env | {"CUDA_VISIBLE_DEVICES": ""}}] * workers]


def _gpus() -> list[str]:
    """Names of the GPUs that torch sees, as CUDA_VISIBLE_DEVICES wants them."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return (named.split(",") if named else [str(i) for i in range(torch.cuda.device_count())])[: torch.cuda.device_count()]


def _drive(client: Any, tasks: list[Task]) -> dict[Path, dict[str, Any]]:
    """Start each task once what it waits for has ended; a row for each when all have."""
    offered = [w.get("resources", {}).get("GPU", 0) for w in client.scheduler_info(n_workers=-1)["workers"].values()]
    if offered and not any(offered) and any(task.cfg.device == "cuda" for task in tasks):
        raise LesionKDError("device = 'cuda', but no worker offers a GPU slot: start those with a GPU as dask worker ... --resources GPU=1")
    rows, waiting, running, shared = {}, {task.target: task for task in tasks}, {}, {other.target for task in tasks for other in task.needs}
    ended, progress = package("distributed").as_completed(), Progress("sweep", len(tasks))

    def end(task: Task, row: dict[str, Any]) -> None:
        rows[task.target] = row
        time_taken, error = (f" in {row['seconds']:.0f} s" if row["seconds"] else ""), (row["error"] and f", {row['error']}")
        progress.epoch(f"{task.label}: {row['status']}{time_taken}{error}")

    def start() -> None:
        for task in list(waiting.values()):
            if lost := next((other for other in task.needs if other.target in rows and not _is_well(rows[other.target])), None):
                end(waiting.pop(task.target), _row(task, "not started", 0.0, error=f"wants {lost.label}"))
            elif all(other.target in rows for other in task.needs + task.after):
                future = _submit(client, waiting.pop(task.target), any(offered), first=task.target in shared)
                running[future.key] = task
                ended.add(future)

    start()
    for future in ended:
        task = running.pop(future.key)
        end(task, _outcome(task, future))
        start()
    progress.close()
    return rows


def _submit(client: Any, task: Task, gpus_offered: bool, first: bool) -> Any:
    """Hand a task to Dask, which gives it to another worker if its own is lost; an error of the task is a result."""
    settings = {"LESIONKD_RUNS": str(runs_root()), "LESIONKD_DATA": str(data_root())}
    return client.submit(
        run_task, task.notebook.stem, task.parameters, str(task.target), os.getcwd(), settings, key=str(task.target),
        priority=int(first), resources={"GPU": 1} if task.cfg.device == "cuda" or (task.cfg.device == "auto" and gpus_offered) else None,
    )


def run_task(stem: str, parameters: dict[str, Any], target: str, folder: str, settings: dict[str, str]) -> tuple[str, float, str | None, str]:
    """On a worker: find or execute one notebook; status, seconds, results, error."""
    os.environ.update(settings)
    if place := finished_results(Path(target)):
        return "found", 0.0, str(place), ""
    logging.getLogger("papermill").setLevel(logging.ERROR)  # it warns of every parameter that the notebook does not list
    started = time.perf_counter()
    try:
        place, error = execute(find_notebook(stem), parameters, Path(target), cwd=folder, start_timeout=300)
    except Exception as problem:  # a dead kernel, a full disk: the others go on
        place, error = None, f"{type(problem).__name__}: {problem}"
    return "failed" if error else "made", time.perf_counter() - started, str(place) if place else None, error


def _outcome(task: Task, future: Any) -> dict[str, Any]:
    try:
        status, seconds, place, error = future.result()
    except Exception as problem:  # KilledWorker, a worker without this package
        if future.cancelled():
            raise LesionKDError("the Dask scheduler is gone; the same command goes on from here once one runs") from None
        lost = "KilledWorker: every worker that ran it was lost; too little memory is the usual reason"
        status, seconds, place = "failed", 0.0, None
        error = lost if type(problem).__name__ == "KilledWorker" else f"{type(problem).__name__}: {problem}"
    return _row(task, status, seconds, place and Path(place), error)


def _row(task: Task, status: str, seconds: float, place: Path | None = None, error: str = "") -> dict[str, Any]:
    return {
        "run": task.label, "status": status, "seconds": round(seconds, 1), "results": short(place) if place else "", "notebook": short(task.target),
        "error": error.partition("\n")[0],
    }


def _is_well(row: dict[str, Any]) -> bool:
    return row["status"] in ("made", "found")
