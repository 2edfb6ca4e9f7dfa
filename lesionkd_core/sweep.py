"""Execute notebooks with parameters, one or many on Dask; compare weights of loss terms."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import lesionkd_core as lkd

from .config import (
    AblationConfig,
    ConfigError,
    DistillConfig,
    LesionKDError,
    MissingExtra,
    PrepareConfig,
    StageConfig,
    TeacherConfig,
    nearest,
)
from .data.layouts import data_root, fingerprint
from .results import CHECKOUT, Progress, is_done, log, make_folder, runs_root, short, write_table

if TYPE_CHECKING:
    import pandas as pd
    from distributed import Client

    from .data.prepare import Prepared
    from .results import Content

Values = dict[str, object]
"""Parameters of a run by name, as papermill takes them."""
KEYS = ("notebook", "parameters", "product", "include")
MEMORY = 3 * 2**30
"""Memory for one run, bytes."""


def find_notebook(name: str) -> Path:
    """A notebook of the suite by its number or name, or any notebook by its path."""
    if Path(name).suffix == ".ipynb" and Path(name).is_file():
        return Path(name)
    notebooks = {p.stem: p for p in (CHECKOUT / "notebooks").glob("[0-9][0-9]_*.ipynb")}
    stem = Path(name).stem
    if stem.isdecimal():
        stem = next((known for known in notebooks if int(known[:2]) == int(stem)), stem)
    if stem not in notebooks:
        raise ConfigError(f"no notebook {name!r}: {nearest(stem, notebooks)}")
    return notebooks[stem]


def configuration(notebook: Path) -> type[StageConfig]:
    """The configuration class that a notebook reads its parameters with."""
    found = re.search(r"lkd\.(\w+Config)\.from_notebook", notebook.read_text(encoding="utf-8"))
    if not found or found[1] not in lkd.__all__:
        raise ConfigError(f"{notebook} has no cell with lkd....Config.from_notebook(globals())")
    kind: type[StageConfig] = getattr(lkd, found[1])
    return kind


def execute(
    notebook: Path, parameters: Values, folder: str | None = None, shown: bool = False
) -> tuple[Path, Path | None, str]:
    """Execute a notebook with papermill.

    Parameters
    ----------
    notebook : Path
    parameters : dict
    folder : str, optional
        Where it runs, for paths in the parameters; by default here.
    shown : bool
        Print what its cells print.

    Returns
    -------
    (Path, Path or None, str)
        The executed notebook, the folder of results that its last cell names, and the error, empty
        if there is none. A copy of the executed notebook lies beside the results.
    """
    import papermill as pm

    target = executed(notebook, parameters)
    make_folder(target.parent)
    logging.getLogger("papermill").setLevel(logging.ERROR)  # warns of parameters not in the cell
    try:
        pm.execute_notebook(
            str(notebook),
            str(target),
            parameters,
            kernel_name="python3",
            cwd=folder,
            start_timeout=300,
            progress_bar=False,
            log_output=shown,
            stdout_file=sys.stdout if shown else None,
            extra_arguments=["--log-level=CRITICAL"],
        )
    except pm.PapermillExecutionError as error:
        return target, None, f"{error.ename}: {error.evalue}"
    except RuntimeError as error:  # a kernel that died or did not start
        return target, None, f"{type(error).__name__}: {error}"
    place = named_results(target)
    if place:
        (place / "notebook.ipynb").write_bytes(target.read_bytes())
    return target, place, ""


def executed(notebook: Path, parameters: Values) -> Path:
    """Where an executed notebook is kept; its name depends on all that decides its results.

    These are the options, the content of the data and of the files that they name, your own code,
    and the student that is exported.
    """
    cfg = configuration(notebook)(**parameters)
    parts: list[object] = [cfg.version, cfg.model_dump(mode="json"), cfg.hashed()]
    if isinstance(cfg, PrepareConfig):
        parts.append(fingerprint(cfg))
    if isinstance(cfg, TeacherConfig):
        parts += [fingerprint(cfg.for_testing(name)) for name in cfg.test_dataset]
    if isinstance(cfg, DistillConfig):
        from .data.prepare import unlabelled_config
        from .losses import own_code
        from .pipeline import arms_of

        arms = arms_of(cfg, 0) if isinstance(cfg, AblationConfig) else [cfg]
        parts.append(own_code({term for arm in arms for term in arm.losses}))
        parts.append(fingerprint(unlabelled_config(cfg)) if cfg.unlabelled else "")
    if run := getattr(cfg, "run", ""):
        parts.append(lkd.load_student(run).digest)
    content = json.dumps(parts, sort_keys=True)
    mark = hashlib.sha256(content.encode()).hexdigest()[:8]
    return runs_root() / "notebooks" / f"{notebook.stem}-{mark}.ipynb"


def named_results(notebook: Path) -> Path | None:
    """The finished results that an executed notebook prints before DONE in its last cell."""
    try:
        outputs = json.loads(notebook.read_bytes())["cells"][-1]["outputs"]
    except (OSError, ValueError, LookupError):
        return None
    printed = "".join("".join(output.get("text", "")) for output in outputs).split()
    if "DONE" not in printed:
        return None
    place = runs_root() / printed[0].removeprefix("runs/")
    return place if is_done(place) or is_done(place.parent) else None


def read_sweep(file: Path) -> tuple[str, list[Values]]:
    """The notebook of a sweep file, and the parameters of every run; equal runs once.

    The file has the keys notebook, parameters (of every run), product (lists of values, every
    combination is a run) and include (further runs).

    Raises
    ------
    ConfigError
        Names the run with a wrong parameter, loss term or arm.
    """
    import yaml

    from .pipeline import require_known

    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"{file}: cannot be read as YAML: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{file}: expected the keys {', '.join(KEYS)}")
    for key in content:
        if key not in KEYS:
            raise ConfigError(f"{file}: unknown key {key!r}; {nearest(str(key), KEYS)}")
    notebook = str(content.get("notebook", "05_ablations"))
    kind = configuration(find_notebook(notebook))
    runs: dict[str, Values] = {}
    for values in _wanted(file, content):
        try:
            cfg = kind(**values)
            require_known(cfg)
        except ConfigError as error:
            raise ConfigError(f"{file}, run {values}: {error}") from None
        runs[cfg.model_dump_json()] = values
    if not runs:
        raise ConfigError(f"{file}: no runs; give lists of values under product, or include")
    return notebook, list(runs.values())


def _wanted(file: Path, content: Content) -> Iterator[Values]:
    """The parameters of every run: the combinations of `product`, then `include`."""
    common, product = content.get("parameters") or {}, content.get("product") or {}
    try:
        lists = [value if isinstance(value, list) else [value] for value in product.values()]
        combinations = itertools.product(*lists) if product else []
        own = [dict(zip(product, values)) for values in combinations]
        for values in own + (content.get("include") or []):
            yield {str(name): _number(value) for name, value in (common | values).items()}
    except (AttributeError, TypeError):
        raise ConfigError(
            f"{file}: parameters and product must map names to values, include lists such mappings"
        ) from None


def _number(value: object) -> object:
    """1e-3 as a number; YAML reads it as text."""
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", value):
        return float(value)
    return value


def sweep(file: Path, scheduler: str = "", workers: int = 0) -> pd.DataFrame:
    """Execute a notebook for every run of a sweep file; finished runs are found.

    Runs that share a teacher or data wait for each other's lock; a failed run does not stop the
    others; a run whose worker is lost is given to another one and resumes.

    Parameters
    ----------
    file : Path
        See `read_sweep` and docs/sweeps.md.
    scheduler : str
        Address of a running Dask scheduler; empty starts workers on this machine.
    workers : int
        Runs at a time on this machine; 0: as many as GPUs, or as cores and memory allow.

    Returns
    -------
    DataFrame
        run, status (made, found, failed), seconds, results, notebook, error; also written to
        `sweeps/<name of the file>.csv` beside the runs.
    """
    import pandas as pd

    try:
        from distributed import as_completed
    except ImportError:
        raise MissingExtra("a sweep", "cluster") from None
    notebook, runs = read_sweep(file)
    settings = {"LESIONKD_RUNS": str(runs_root()), "LESIONKD_DATA": str(data_root())}
    rows = []
    client = _client(scheduler, len(runs), workers)
    with client, Progress(file.stem, "run", len(runs)) as progress:
        futures = {}
        for run in runs:
            future = client.submit(_task, notebook, run, os.getcwd(), settings, pure=False)
            futures[future] = run
        for future in as_completed(futures):  # type: ignore[no-untyped-call]
            label = ", ".join(f"{name} {value}" for name, value in futures[future].items())
            try:
                row = future.result()
            except Exception as error:  # a lost worker, or one without this package
                why = f"{type(error).__name__}: {error}"
                row = {"status": "failed", "notebook": "", "error": why}
            rows.append({"run": label} | row)
            progress.step(f"{label} {row['status']} {row['error']}".rstrip())
    table = pd.DataFrame(rows)
    write_table(runs_root() / "sweeps" / f"{file.stem}.csv", table)
    return table


def _client(scheduler: str, runs: int, workers: int) -> Client:
    """The client of a running scheduler, or of workers on this machine."""
    from distributed import Client

    if not scheduler:
        return Client(**_local(runs, workers))  # type: ignore[no-untyped-call]
    try:
        return Client(address=scheduler, timeout=10)  # type: ignore[no-untyped-call]
    except OSError as error:
        raise LesionKDError(f"no Dask scheduler answers at {scheduler}: {error}") from None


def _local(runs: int, workers: int) -> dict[str, object]:
    """Options of a Dask client for this machine; the workers share the cores."""
    import torch
    from dask.system import CPU_COUNT
    from distributed.system import MEMORY_LIMIT

    fit = torch.cuda.device_count() or min(CPU_COUNT, MEMORY_LIMIT // MEMORY)
    count = min(runs, workers or max(1, fit))
    threads = str(max(1, CPU_COUNT // count))
    os.environ |= {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}  # inherited by workers
    log.info(f"{count} runs at a time, {threads} threads each")
    return {
        "n_workers": count,
        "threads_per_worker": 1,
        "memory_limit": None,
        "host": "127.0.0.1",
        "dashboard_address": None,
        "silence_logs": logging.ERROR,
    }


def _task(notebook: str, run: Values, folder: str, settings: dict[str, str]) -> dict[str, object]:
    """On a worker: find or execute one notebook; an error is a result."""
    os.environ.update(settings)
    started, source = time.perf_counter(), find_notebook(notebook)
    target = executed(source, run)
    place, error, status = named_results(target), "", "found"
    if place is None:
        _, place, error = execute(source, run, folder)
        status = "failed" if error else "made"
    return {
        "status": status,
        "seconds": round(time.perf_counter() - started, 1),
        "results": short(place) if place else "",
        "notebook": short(target),
        "error": error.partition("\n")[0],
    }


# Weights of loss terms ----------------------------------------------------------------------------


def sweep_weights(
    data: Prepared, cfg: AblationConfig, weights: dict[str, tuple[float, ...]] | None = None
) -> pd.DataFrame:
    """Train every arm with several weights and compare them on validation cases.

    Parameters
    ----------
    cfg : AblationConfig
        Its seeds are used; `losses` are the weights that are not swept.
    weights : {loss term or 'method': weights}, optional
        By default the sweep of each registered term. For 'method' the weight of L_edge is swept.

    Returns
    -------
    DataFrame
        dataset, arm, weight (0: student alone), seed, epochs, val_dice (mean over the last quarter
        of the epochs, which varies less than the best), best_val_dice, run.
    """
    import pandas as pd

    from .losses import TERMS
    from .pipeline import ARMS, arm_config, distill_arms, teach

    if weights is None:
        weights = {name: term.sweep for name, term in TERMS.items() if term.sweep}
        if cfg.label_fraction == 1 and not cfg.unlabelled:
            del weights["pseudo"]  # every image has a mask
    points: dict[tuple[str, float], dict[str, float | None]] = {("alone", 0.0): {}}
    for arm, values in weights.items():
        losses = arm_config(cfg, arm, 0).losses
        last = ARMS.get(arm, arm).split(", ")[-1]
        for weight in values:
            points[arm, weight] = losses | {last: weight}
    teacher, graph = teach(data, cfg, {term for losses in points.values() for term in losses})
    rows = []
    for seed in cfg.seeds:
        alone = arm_config(cfg, "alone", seed)
        cfgs = [alone.with_values(losses=losses) for losses in points.values()]
        for (arm, weight), run in zip(points, distill_arms(teacher, graph, data, cfgs)):
            dice = run.history["val_dice"]
            scores = {
                "epochs": len(dice),
                "val_dice": dice.tail(max(len(dice) // 4, 1)).mean(),
                "best_val_dice": dice.max(),
            }
            about = {"dataset": cfg.dataset_name, "arm": arm, "weight": weight, "seed": seed}
            rows.append(about | scores | {"run": short(run.path)})
    return pd.DataFrame(rows)
