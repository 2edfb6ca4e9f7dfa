"""The command `lesionkd`: run notebooks and stages, use students, look after results."""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_origin

import click

from . import __version__, config, results
from .config import LesionKDError, StageConfig

if TYPE_CHECKING:
    import pandas as pd

Command = Callable[..., Any]


class _Group(click.Group):
    """Shows the message of an expected error without a traceback; the exit code is 1."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except LesionKDError as error:
            click.echo(f"{type(error).__name__}: {error}", err=True)
            sys.exit(1)
        except KeyboardInterrupt:
            click.echo("\nstopped; the same command resumes", err=True)
            sys.exit(130)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="lesionkd")
def main() -> None:
    """Distil a lesion segmentation teacher into a student small enough for a phone."""


# Parameters ---------------------------------------------------------------------------------------


def parameters(command: Command) -> Command:
    """papermill's options -p, -r, -f and -y; the command gets one dict `given`."""
    pair: Any = {"nargs": 2, "multiple": True, "metavar": "NAME VALUE"}
    options: list[Any] = [
        click.option("-p", "--parameters", "p", **pair, help="a parameter"),
        click.option("-r", "--parameters_raw", "r", **pair, help="a parameter that stays text"),
        click.option("-f", "--parameters_file", "f", multiple=True, help="YAML file of parameters"),
        click.option("-y", "--parameters_yaml", "y", multiple=True, help="YAML text of parameters"),
    ]

    def wrapped(p: Any, r: Any, f: Any, y: Any, **others: Any) -> Any:
        import yaml

        given: dict[str, Any] = {}
        try:
            for text in [Path(file).read_text(encoding="utf-8") for file in f] + list(y):
                given |= yaml.safe_load(text)
        except (OSError, yaml.YAMLError, TypeError) as error:
            raise config.ConfigError(f"the parameters cannot be read as YAML: {error}") from None
        return command(given=given | dict(p), raw=dict(r), **others)

    wrapped.__name__, wrapped.__doc__ = command.__name__, command.__doc__
    wrapped.__click_params__ = list(getattr(command, "__click_params__", []))  # type: ignore[attr-defined]
    for option in options:
        wrapped = option(wrapped)
    return wrapped


def read(kind: type[StageConfig], given: dict[str, Any], raw: dict[str, str]) -> dict[str, Any]:
    """Values as the options' types need them: text for text, numbers for numbers."""
    values: dict[str, Any] = {}
    for name, value in given.items():
        field = kind.model_fields.get(name)
        wants_text = field is not None and (
            field.annotation is str
            or (
                get_origin(field.annotation) is not None
                and isinstance(get_args(field.annotation)[0], str)
            )
        )
        values[name] = value if wants_text or not isinstance(value, str) else _literal(value)
    return values | raw


def _literal(text: str) -> Any:
    """'3' -> 3, '0.5' -> 0.5, 'true' -> True; other text stays text."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
    return value if isinstance(value, int | float) or value is None else text


# Notebooks and stages -----------------------------------------------------------------------------


@main.command(add_help_option=False)
@click.argument("notebook", required=False)
@click.option("-h", "--help", "show_help", is_flag=True, help="this text, and the parameters")
@click.option(
    "--link", type=click.Path(path_type=Path), help="write the results' path to this file"
)
@parameters
def run(
    notebook: str | None,
    show_help: bool,
    link: Path | None,
    given: dict[str, Any],
    raw: dict[str, str],
) -> None:
    """Execute NOTEBOOK, such as 04_distill, and keep it beside its results."""
    from .sweep import configuration, execute, find_notebook

    if show_help or not notebook:
        click.echo(click.get_current_context().get_help())
        if notebook:
            click.echo(_options_text(configuration(find_notebook(notebook))))
        sys.exit(0 if show_help else 2)
    source = find_notebook(notebook)
    kind = configuration(source)
    values = read(kind, given, raw)
    kind(**values)  # refuses wrong parameters before anything starts
    target, place, error = execute(source, values, log_output=True, stdout_file=sys.stdout)
    click.echo(f"executed notebook: {target}")
    if error:
        click.echo(error, err=True)
        sys.exit(1)
    if place:
        scores = place / "figures" / "scores.csv"
        if scores.exists():
            click.echo(_table(results.read_table(scores)[["network", "Dice", "missed"]]))
        click.echo(f"results: {place}")
        if link:
            results.write_text(link, f"{place.resolve()}\n")


def _table(table: pd.DataFrame) -> str:
    from tabulate import tabulate

    shown = table.round(3).convert_dtypes().astype(object).fillna("")
    return str(tabulate(shown, headers="keys", showindex=False))


def _options_text(kind: type[StageConfig]) -> str:
    rows = kind.parameters().itertuples()
    return "\nParameters:\n" + "\n".join(f"  {r.parameter} = {r.default!r}  {r.help}" for r in rows)


def _stage(name: str, kind: type[StageConfig], text: str, make: Callable[[Any], Any]) -> None:
    """A command that makes the result of a stage without a notebook; torchrun can start it."""

    def command(given: dict[str, Any], raw: dict[str, str]) -> None:
        result = make(kind(**read(kind, given, raw)))
        if results.leads():
            click.echo(f"{result}\nresults: {result.path}")

    command.__doc__ = text
    main.command(name)(parameters(command))


def _prepare(cfg: Any) -> Any:
    from .data.prepare import prepare

    return prepare(cfg)


def _train_teacher(cfg: Any) -> Any:
    from .pipeline import train_teacher

    return train_teacher(_prepare(cfg), cfg)


def _distill(cfg: Any) -> Any:
    from .pipeline import distill, fit_edge_graph, needs_graph

    data = _prepare(cfg)
    teacher = _train_teacher(cfg) if cfg.terms else None
    graph = fit_edge_graph(teacher, data, cfg) if teacher and needs_graph(cfg) else None
    return distill(teacher, graph, data, cfg)


def _ablate(cfg: Any) -> Any:
    from .pipeline import ablate

    return ablate(_prepare(cfg), cfg)


_stage("prepare", config.PrepareConfig, "Read, check, split and resize a data set.", _prepare)
_stage("train-teacher", config.TeacherConfig, "Find or train the teacher.", _train_teacher)
_stage("distill", config.DistillConfig, "Find or train a student and what it needs.", _distill)
_stage("ablate", config.AblationConfig, "Find or train every arm and seed.", _ablate)


@main.command()
@parameters
def export(given: dict[str, Any], raw: dict[str, str]) -> None:
    """Write a student's files for phones."""
    from .export import ExportConfig, export_student
    from .predict import load_student

    cfg = ExportConfig(**read(ExportConfig, given, raw))
    run = cfg.run or _distill(config.DistillConfig(profile=cfg.profile))
    exported = export_student(cfg, load_student(run))
    click.echo(f"{exported}\nresults: {exported.path}")


@main.command()
@click.argument("run")
@click.argument("datasets", nargs=-1, required=True)
def score(run: str, datasets: tuple[str, ...]) -> None:
    """Score a finished RUN on all cases of other DATASETS."""
    from .evaluate import score_external

    for name, scored in score_external(results.Result(results.locate(run)), datasets).items():
        dice = scored.summary["test"]["dice"]
        click.echo(f"{name}: Dice {results.with_interval(dice)}; results: {scored.path}")


@main.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--scheduler", default="", metavar="ADDRESS", help="a running Dask scheduler")
@click.option("--workers", default=0, help="runs at a time on this machine; 0: as many as fit")
def sweep(file: Path, scheduler: str, workers: int) -> None:
    """Execute a notebook for every run of a YAML FILE (docs/sweeps.md)."""
    from .sweep import sweep

    table = sweep(file, scheduler, workers)
    counts = table["status"].value_counts()
    click.echo(", ".join(f"{count} {status}" for status, count in counts.items()))
    failed = table[table["status"] == "failed"]
    for row in failed.itertuples():
        click.echo(f"  {row.run}: {row.error}\n    executed notebook: {row.notebook}", err=True)
    sys.exit(1 if len(failed) else 0)


# Students and data --------------------------------------------------------------------------------


@main.command()
@click.argument("run")
@click.argument("images", type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="folder for the masks")
@click.option(
    "--threshold",
    type=click.FloatRange(0, 1),
    help="write masks of 0 and 255 (volumes: 0 and 1) instead of probabilities",
)
@click.option("--overlays", is_flag=True, help="also write images with the contour")
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda or mps")
@click.option(
    "--pixel-size",
    type=click.FloatRange(0, min_open=True),
    metavar="MM",
    help="side of a pixel of the pictures in mm, for areas in mm2",
)
def predict(
    run: str,
    images: Path,
    out: Path,
    threshold: float | None,
    overlays: bool,
    device: str,
    pixel_size: float | None,
) -> None:
    """Segment a folder of IMAGES with a student: a RUN, a published one, or a file .onnx (S7).

    Beside the masks are areas.csv (lesion area, number of components) and report.csv (what was not
    read, and notes). Exit code 1: a file was not read; 2: all were read, but a picture is nearly
    flat, nearly black or very small.
    """
    from .predict import TrainedNetwork, load_student, predict_folder

    if out.resolve() == images.resolve():
        raise config.ConfigError("--out is the folder of the images; choose another folder")
    read_student: Callable[[str], TrainedNetwork] = load_student
    if run.endswith(".onnx"):
        from .export import load_onnx as read_student
    student = read_student(run)
    student.to(device)

    def progress(done: int, total: int) -> None:
        if sys.stdout.isatty() or done == total:
            click.echo(f"{done}/{total} images", nl=done == total)

    unreadable = predict_folder(student, images, out, threshold, overlays, progress, pixel_size)
    click.echo(f"masks: {out}")
    for line in unreadable:
        click.echo(f"not read: {line}", err=True)
    report = results.read_table(out / "report.csv")
    little = report[report["action"] == "shows little"]
    for row in little.itertuples():
        click.echo(f"shows little: {row.file}: {row.reason}", err=True)
    if others := len(report) - len(unreadable) - len(little):
        click.echo(f"notes on reading: {others}, in {out / 'report.csv'}")
    sys.exit(1 if unreadable else 2 if len(little) else 0)


@main.command()
@click.argument("name", required=False)
@click.option("--list", "listed", is_flag=True, help="show the catalogue and what is there")
@click.option("--yes", is_flag=True, help="accept the licence terms without being asked")
@click.option("--mirror", default="", metavar="URL", help="address of a folder with the same files")
@click.option("--archive", default="", help="archive on this machine, or a folder of them")
@click.option("--to", type=click.Path(path_type=Path), help="folder of data sets")
def download(
    name: str | None, listed: bool, yes: bool, mirror: str, archive: str, to: Path | None
) -> None:
    """Fetch a data set of the catalogue, such as kvasir-seg, check it and unpack it."""
    from .data import download as module
    from .data.layouts import CATALOGUE

    if listed or not name:
        from tabulate import tabulate

        rows = [
            (r.name, r.modality, r.count or "?", r.licence, "yes" if module.found(r, to) else "no")
            for r in CATALOGUE.values()
        ]
        click.echo(tabulate(rows, ("name", "modality", "images", "licence", "found")))
        sys.exit(0 if listed else 2)

    def agree() -> bool:
        if not yes and not sys.stdin.isatty():
            raise config.ConfigError("no terminal to ask in: read the terms above and add --yes")
        return yes or click.confirm("Go on?")

    module.download(name, to, mirror, archive, agree)


# Results ------------------------------------------------------------------------------------------


@main.command("list")
@click.argument("stage", default="")
def list_runs(stage: str) -> None:
    """List finished runs, of one STAGE or of all."""
    table = results.collect(stage)
    columns = ["run", "finished", "dice", "missed", "losses", "epochs"]
    shown = _table(table[[name for name in columns if name in table]])
    click.echo(shown if len(table) else f"no finished run in {results.runs_root()}")


@main.command()
@click.argument("run")
def show(run: str) -> None:
    """Report on one RUN: options, scores, and whether its files are intact."""
    click.echo(results.report(results.locate(run)))


if __name__ == "__main__":
    main()
