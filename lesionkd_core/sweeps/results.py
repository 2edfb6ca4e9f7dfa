"""Results of any number of runs as one table: Parquet that DuckDB summarizes without loading it."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import store
from ..config import ARMS, DistillConfig, LesionKDError, TeacherConfig, idle_fields, nearest
from ..config.base import LATER, _names
from ..evaluation import METRICS
from ..progress import Tell
from .notebooks import package

if TYPE_CHECKING:
    import pandas as pd

STAGES = ("teacher", "distill", "external")
"""Stages that score cases. An ablation's rows are its students' rows, so each scored case is there once."""
BY = ("dataset", "test_dataset", "profile", "teacher", "arm")
MEMORY = "2GB"
"""DuckDB writes to a temporary folder what goes beyond."""


def collect(tell: Tell = print) -> Path:
    """Gather `per_case` of every finished run into one Parquet data set, one file a run, beside the runs.

    A row is a scored case with the parameters of its run: `run` (folder of the network), `arm` ('teacher'
    or an arm of the ablation), dataset, test_dataset, profile, and every parameter that counted; a
    parameter called as a column of `per_case` is `<name>_parameter`. Of runs that only other data or other
    versions of the stages tell apart, the newest counts. Runs that are there are not read again, runs that
    are gone leave it, and a file is whole or absent. Scores are float32, which halves what a summary reads.

    Returns
    -------
    Path
        The folder `results`; any reader of Parquet takes it, columns united by name.
    """
    folder = store.runs_root() / "results"
    with store.lock(folder, tell):
        store.make_folder(folder)
        runs = _newest(tell)
        gone = set(folder.glob("*.parquet")) - set(runs)
        new = [file for file, (path, _) in runs.items() if not file.exists() or file.stat().st_mtime < _finished(path)]
        for file in gone:
            file.unlink()
        for file in new:
            try:
                rows = _rows(*runs[file])
            except (LesionKDError, OSError, KeyError, ValueError) as error:
                tell(f"left out: {runs[file][0] / 'per_case.csv'} cannot be read ({error})")
                file.unlink(missing_ok=True)
            else:
                _write(file, rows)
    tell(f"{store.short(folder)}: {len(runs)} runs, {len(new)} of them new" + (f", {len(gone)} gone" if gone else ""))
    return folder


def _newest(tell: Tell) -> dict[Path, tuple[Path, dict[str, Any]]]:
    """{its file: (folder, parameters)} of every finished run, the newest where only data or versions of stages differ."""
    found: dict[str, tuple[Path, dict[str, Any]]] = {}
    root = store.runs_root()
    for path in sorted((done.parent for stage in STAGES for done in (root / stage).glob("*/DONE")), key=_finished):
        try:
            recorded = store.read_json(path / "config.json")
            network = root / store.read_json(path / "summary.json")["run"].removeprefix("runs/") if path.parent.name == "external" else path
            made_from = recorded if network == path else store.read_json(network / "config.json")
            values = _parameters(made_from) | {"test_dataset": _name(recorded["dataset"])}
            found[json.dumps([made_from["dataset"], recorded["dataset"], values])] = path, values | {"run": store.short(network)}
        except (LesionKDError, KeyError) as error:
            tell(f"left out: {error}")
    return {root / "results" / f"{path.parent.name}-{path.name}.parquet": (path, values) for path, values in found.values()}


def _finished(path: Path) -> float:
    return (path / "DONE").stat().st_mtime


def _rows(path: Path, values: dict[str, Any]) -> pd.DataFrame:
    """`per_case` of a run with its parameters in every row."""
    table = store.read_table(path / "per_case.csv")
    for name in ("id", "group", "label"):  # file names are bytes, Parquet's text is UTF-8
        table[name] = [text.encode(errors="surrogateescape").decode(errors="replace") for text in table[name]]
    return table.astype(dict.fromkeys(METRICS, "float32")).assign(**{f"{n}_parameter" if n in table else n: value for n, value in values.items()})


def _parameters(recorded: dict[str, Any]) -> dict[str, Any]:
    """The parameters that a network is made from, and the arm of an ablation that they are ('teacher' for one)."""
    terms = recorded.get("terms")
    idle = {"stage", "version", "upstream", "digest", "device", "threads", "test_dataset"} | (set() if terms is None else idle_fields(terms))
    later = {n: v for n, v in LATER.items() if n in (TeacherConfig if terms is None else DistillConfig).model_fields}  # runs from before they came
    values = {n: ", ".join(map(str, v)) if isinstance(v, list) else v for n, v in (later | recorded).items() if n not in idle}
    return {"teacher": ""} | values | {"dataset": _name(recorded["dataset"]), "arm": "teacher" if terms is None else _arm(recorded)}


def _arm(recorded: dict[str, Any]) -> str:
    def unordered(value: Any) -> Any:
        return sorted(value) if isinstance(value, (list, tuple)) else value

    fitting = (name for name, arm in ARMS.items() if all(unordered(recorded.get(n)) == unordered(v) for n, v in arm.items()))
    shuffled = ", shuffled" * ("edge" in recorded["terms"] and recorded.get("shuffle_edges", False))
    return next(fitting, " + ".join(recorded["terms"]) + shuffled)


def _name(dataset: str) -> str:
    return Path(dataset).name


def _write(file: Path, rows: pd.DataFrame) -> None:
    duckdb = package("duckdb")
    with store.replacing(file) as partial, _connect() as connection:
        try:
            connection.from_df(rows).write_parquet(str(partial), compression="zstd")
        except duckdb.IOException as error:
            raise OSError(str(error).partition("\n")[0]) from None


def _connect() -> Any:
    settings = {"memory_limit": MEMORY, "temp_directory": tempfile.gettempdir(), "autoinstall_known_extensions": False}
    connection = package("duckdb").connect(config=settings)
    connection.execute("SET enable_progress_bar = false")
    return connection


def summarize_results(by: tuple[str, ...] | str = BY, where: str = "", split: str = "test", folder: Path | None = None) -> pd.DataFrame:
    """Means over runs of each run's mean over its cases, from the Parquet files of `collect`.

    Parameters
    ----------
    by : names
        Columns whose combinations are the rows of the summary: parameters, arm, dataset, test_dataset.
    where : str
        SQL condition on the rows that count, such as ``width = 4 AND arm <> 'teacher'``.
    split : str
        Which cases: test, val (to choose parameters by), train.
    folder : Path, optional
        The data set; None takes `results` beside the runs.

    Returns
    -------
    DataFrame
        The columns of `by`; runs; cases (rows a run); mean and, with `_sd`, standard deviation over runs of
        every metric, cases without a value left out; missed and false_alarms (cases a run); undefined
        (cases a run whose sensitivity or precision is 0/0).
    """
    duckdb, names = package("duckdb"), list(_names(by))
    files = (folder or store.runs_root() / "results") / "*.parquet"
    if not any(files.parent.glob(files.name)):
        raise LesionKDError(f"no finished run is collected in {files.parent}: `python -m lesionkd_core results` collects them")
    with _connect() as connection:
        try:
            rows = connection.read_parquet(str(files), union_by_name=True)
            if unknown := [name for name in names if name not in rows.columns]:
                raise LesionKDError(f"no column {unknown[0]!r} in the results: {nearest(unknown[0], rows.columns)}")
            return connection.sql(_query(names, where), params=[split]).df()
        except (duckdb.ParserException, duckdb.BinderException, duckdb.ConversionException) as error:
            raise LesionKDError(f"where = {where!r}: {str(error).partition(chr(10))[0]}") from None
        except duckdb.Error as error:
            problem = str(error).partition("\n")[0]
            raise LesionKDError(f"{files.parent} cannot be summarized: {problem}; what is damaged there can be removed and collected anew") from None


def _query(names: list[str], where: str) -> str:
    keys = ", ".join(f'"{name}"' for name in names)
    of_run = ", ".join(f'avg("{m}") AS "{m}"' for m in METRICS)
    of_all = ", ".join(f'avg("{m}") AS "{m}", stddev_samp("{m}") AS "{m}_sd"' for m in METRICS)
    return f"""
        WITH of_run AS (
            SELECT {keys}, run, count(*) AS cases, {of_run}, sum(missed) AS missed, sum(false_alarm) AS false_alarms,
                   count(*) FILTER (sensitivity IS NULL OR "precision" IS NULL) AS undefined
            FROM rows WHERE split = ? AND ({where or 'true'}) GROUP BY ALL)
        SELECT {keys}, count(*) AS runs, avg(cases) AS cases, {of_all}, avg(missed) AS missed, avg(false_alarms) AS false_alarms, avg(undefined) AS undefined
        FROM of_run GROUP BY ALL ORDER BY {keys}"""
