"""The command `lesionkd`: run notebooks and stages, use students, look after results.

`lkd` and the commands import what takes long when they need it.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, get_args

import click

import lesionkd_core as lkd

from . import results
from .config import (
    AblationConfig,
    ConfigError,
    DistillConfig,
    LesionKDError,
    PrepareConfig,
    StageConfig,
    TeacherConfig,
)
from .results import Result

if TYPE_CHECKING:
    from .predict import TrainedNetwork

C = TypeVar("C", bound=StageConfig)
Pairs = Sequence[tuple[str, str]]
PATH, FILE = click.Path(path_type=Path), click.Path(path_type=Path, dir_okay=False)
POSITIVE = click.FloatRange(0, min_open=True)
SCORES = ("test_dataset", "network", "arm", "dice", "missed")
"""Columns of a notebook's scores.csv that `run` prints, in upper or lower case."""


class _Group(click.Group):
    """Shows the message of an expected error without a traceback; the exit code is 1."""

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except LesionKDError as error:
            click.echo(f"{type(error).__name__}: {error}", err=True)
            sys.exit(1)
        except KeyboardInterrupt:
            click.echo("\nstopped; the same command resumes", err=True)
            sys.exit(130)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(lkd.__version__, prog_name="lesionkd")
def main() -> None:
    """Distil a lesion segmentation teacher into a student small enough for a phone."""


# Parameters ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Parameters:
    """What a command was given with -p, -y and -f, and with -r."""

    given: Mapping[str, object]
    raw: Mapping[str, str]

    def values(self, kind: type[StageConfig]) -> dict[str, object]:
        """Values as the options' types need them: text for text, numbers for numbers."""
        values = dict(self.given)
        for name, value in values.items():
            if isinstance(value, str) and not _takes_text(kind, name):
                values[name] = _literal(value)
        return values | dict(self.raw)

    def read(self, kind: type[C]) -> C:
        """The configuration of a stage.

        Raises
        ------
        ConfigError
            A name or a value is wrong, or there is no such arm, loss term, network or map.
        """
        values = self.values(kind)
        cfg = kind(**values)
        if values and isinstance(cfg, TeacherConfig):
            from .pipeline import require_known

            require_known(cfg)
        return cfg


def _takes_text(kind: type[StageConfig], name: str) -> bool:
    """Whether an option is text, a choice of texts or a list of texts."""
    if name not in kind.model_fields:
        return False
    annotation = kind.model_fields[name].annotation
    inner = [annotation, *get_args(annotation)[:1]]
    return any(one is str or isinstance(one, str) for one in inner)


def _literal(text: str) -> object:
    """'3' -> 3, '0.5' -> 0.5, 'true' -> True, 'none' -> None; other text stays text."""
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            pass
    return text


def parameters(command: Callable[..., None]) -> Callable[..., None]:
    """papermill's options -p, -r, -f and -y; the command gets them as `given`."""
    pair = click.Tuple([str, str])

    @click.option("-y", "--parameters_yaml", "y", multiple=True, help="YAML text of parameters")
    @click.option("-f", "--parameters_file", "f", multiple=True, help="YAML file of parameters")
    @click.option("-r", "--parameters_raw", "r", type=pair, multiple=True, help="one as text")
    @click.option("-p", "--parameters", "p", type=pair, multiple=True, help="a parameter")
    @functools.wraps(command)
    def wrapped(p: Pairs, r: Pairs, f: Sequence[str], y: Sequence[str], **others: object) -> None:
        command(given=Parameters(_from_yaml(f, y) | dict(p), dict(r)), **others)

    return wrapped


def _from_yaml(files: Sequence[str], texts: Sequence[str]) -> dict[str, object]:
    import yaml

    given: dict[str, object] = {}
    try:
        for text in [Path(file).read_text(encoding="utf-8") for file in files] + list(texts):
            given |= yaml.safe_load(text)
    except (OSError, yaml.YAMLError, TypeError, ValueError) as error:
        why = " ".join(str(error).split())
        raise ConfigError(f"the parameters cannot be read as YAML: {why}") from None
    return given


# Notebooks ----------------------------------------------------------------------------------------


@main.command(add_help_option=False)
@click.argument("notebook", required=False)
@click.option("-h", "--help", "show_help", is_flag=True, help="this text, and the parameters")
@click.option("--link", type=FILE, help="write the results' path to this file")
@parameters
def run(notebook: str | None, show_help: bool, link: Path | None, given: Parameters) -> None:
    """Execute NOTEBOOK, such as 04 or 04_distill, and keep it beside its results."""
    from .sweep import configuration, execute, find_notebook

    if show_help or not notebook:
        click.echo(click.get_current_context().get_help())
        if notebook:
            click.echo(_options_text(configuration(find_notebook(notebook))))
        sys.exit(0 if show_help else 2)
    source = find_notebook(notebook)
    kind = configuration(source)
    given.read(kind)  # refuses wrong parameters before anything starts
    target, place, error = execute(source, given.values(kind), shown=True)
    click.echo(f"executed notebook: {target}")
    if error:
        click.echo(error, err=True)
        sys.exit(1)
    if place is None:
        raise LesionKDError(f"{source.name} names no results: its last cell prints none with DONE")
    if (place / "figures" / "scores.csv").exists():
        click.echo(_scores(place / "figures" / "scores.csv"))
    if link:
        results.write_text(link, f"{place.resolve()}\n")
    click.echo(f"results: {place}")


def _options_text(kind: type[StageConfig]) -> str:
    rows = kind.parameters().itertuples()
    return "\nParameters:\n" + "\n".join(f"  {r.parameter} = {r.default!r}  {r.help}" for r in rows)


def _scores(file: Path) -> str:
    """The columns of a table of scores that say which network and how good; else all columns."""
    import pandas as pd

    table = pd.read_csv(file)
    shown = [name for name in table if name.lower() in SCORES]
    return str(table[shown or list(table)].to_string(index=False, float_format="%.3f"))


def _table(rows: Sequence[Mapping[str, object]], columns: Sequence[str]) -> str:
    from tabulate import tabulate

    cells = [[row.get(name) for name in columns] for row in rows]
    return str(tabulate(cells, columns, floatfmt=".3f"))


# Stages -------------------------------------------------------------------------------------------


@main.command()
@parameters
def prepare(given: Parameters) -> None:
    """Read, check, split and resize a data set."""
    _say(lkd.prepare(given.read(PrepareConfig)))


@main.command()
@parameters
def train_teacher(given: Parameters) -> None:
    """Find or train the teacher."""
    cfg = given.read(TeacherConfig)
    _say(run := lkd.train_teacher(lkd.prepare(cfg), cfg))
    _score(run, cfg.test_dataset)


@main.command()
@parameters
def distill(given: Parameters) -> None:
    """Find or train a student and what it needs."""
    cfg = given.read(DistillConfig)
    _say(run := _student(cfg))
    _score(run, cfg.test_dataset)


def _student(cfg: DistillConfig) -> Result:
    from .pipeline import distill, teach

    data = lkd.prepare(cfg)
    teacher, graph = teach(data, cfg, cfg.losses)
    return distill(teacher, graph, data, cfg)


@main.command()
@parameters
def ablate(given: Parameters) -> None:
    """Find or train every arm and seed."""
    cfg = given.read(AblationConfig)
    _say(lkd.ablate(lkd.prepare(cfg), cfg))


@main.command()
@parameters
def export(given: Parameters) -> None:
    """Write a student's files for phones."""
    cfg = given.read(lkd.ExportConfig)
    student = lkd.load_student(cfg.run or _student(DistillConfig(profile=cfg.profile)))
    _say(lkd.export_student(cfg, student))


def _say(result: Result) -> None:
    if results.leads():
        click.echo(f"{result}\nresults: {result.path}")


@main.command()
@click.argument("run")
@click.argument("datasets", nargs=-1, required=True)
def score(run: str, datasets: tuple[str, ...]) -> None:
    """Score a finished RUN, or a published student, on all cases of other DATASETS."""
    _score(lkd.load_network(run), datasets)


def _score(run: Result | TrainedNetwork, datasets: tuple[str, ...]) -> None:
    if not results.leads():
        return
    for name, scored in lkd.score_external(run, datasets).items():
        dice = results.with_interval(scored.summary["test"]["dice"])
        click.echo(f"{name}: Dice {dice}; results: {scored.path}")


@main.command()
@click.argument("file", type=PATH)
@click.option("--scheduler", default="", metavar="ADDRESS", help="a running Dask scheduler")
@click.option("--workers", default=0, type=click.IntRange(0), help="runs at a time; 0: what fits")
def sweep(file: Path, scheduler: str, workers: int) -> None:
    """Execute a notebook for every run of a YAML FILE (docs/sweeps.md)."""
    from .sweep import sweep

    table = sweep(file, scheduler, workers)
    counts = table["status"].value_counts()
    click.echo(", ".join(f"{count} {status}" for status, count in counts.items()))
    failed = table[table["status"] == "failed"]
    for row in failed.itertuples():
        where = f"\n    executed notebook: {row.notebook}" if row.notebook else ""
        click.echo(f"  {row.run}: {row.error}{where}", err=True)
    sys.exit(1 if len(failed) else 0)


# Students and data --------------------------------------------------------------------------------


@main.command()
@click.argument("run")
@click.argument("images", type=PATH)
@click.option("--out", required=True, type=PATH, help="folder for the masks")
@click.option("--threshold", type=click.FloatRange(0, 1), help="write masks, not probabilities")
@click.option("--overlays", is_flag=True, help="also write images with the contour")
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda or mps")
@click.option("--pixel-size", type=POSITIVE, metavar="MM", help="side of a pixel, for areas in mm2")
def predict(
    run: str,
    images: Path,
    out: Path,
    threshold: float | None,
    overlays: bool,
    device: str,
    pixel_size: float | None,
) -> None:
    """Segment a folder of IMAGES with a student: a RUN, a published one, or a file .onnx.

    Beside the masks are areas.csv (lesion area, number of components) and report.csv (what was not
    read, and notes). Exit code 1: a file was not read; 2: all were read, but a picture is nearly
    flat, nearly black or very small.
    """
    from .predict import predict_folder

    student = lkd.load_onnx(run) if run.endswith(".onnx") else lkd.load_student(run)
    student.to(device)
    failed = predict_folder(student, images, out, threshold, overlays, pixel_size)
    click.echo(f"masks: {out}")
    for line in failed:
        click.echo(f"not read: {line}", err=True)
    report = results.read_table(out / "report.csv")
    little = report[report["action"] == "shows little"]
    for row in little.itertuples():
        click.echo(f"shows little: {row.file}: {row.reason}", err=True)
    if others := len(report) - len(failed) - len(little):
        click.echo(f"notes on reading: {others}, in {out / 'report.csv'}")
    sys.exit(1 if failed else 2 if len(little) else 0)


@main.command()
@click.argument("name", required=False)
@click.option("--list", "listed", is_flag=True, help="show the catalogue and what is there")
@click.option("--yes", is_flag=True, help="accept the licence terms without being asked")
@click.option("--mirror", default="", metavar="URL", help="address of a folder with the same files")
@click.option("--archive", default="", help="archive on this machine, or a folder of them")
@click.option("--to", type=PATH, help="folder of data sets")
def download(
    name: str | None, listed: bool, yes: bool, mirror: str, archive: str, to: Path | None
) -> None:
    """Fetch a data set of the catalogue, such as kvasir-seg, check it and unpack it."""
    from .data import download as module
    from .data.layouts import CATALOGUE

    if listed or not name:
        rows = [
            {"name": r.name, "modality": r.modality, "images": r.count or "?", "licence": r.licence}
            | {"found": "yes" if module.found(r, to) else "no"}
            for r in CATALOGUE.values()
        ]
        click.echo(_table(rows, list(rows[0])))
        sys.exit(0 if listed else 2)
    module.download(name, to, mirror, archive, lambda: _agreed(yes))


def _agreed(yes: bool) -> bool:
    if not yes and not sys.stdin.isatty():
        raise ConfigError("no terminal to ask in: read the text above and add --yes")
    return yes or click.confirm("Go on?")


# Results ------------------------------------------------------------------------------------------


@main.command("list")
@click.argument("stage", default="")
def list_runs(stage: str) -> None:
    """List finished runs, of one STAGE or of all."""
    paths = results.finished(stage)
    if not paths:
        click.echo(f"no finished run in {results.runs_root()}")
        return
    sizes = {path: results.size_of(path) for path in paths}
    rows = [results.row_of(path) | {"size": results.in_words(sizes[path])} for path in paths]
    click.echo(_table(rows, ["run", "finished", "dice", "missed", "losses", "epochs", "size"]))
    taken = results.in_words(sum(sizes.values()))
    click.echo(f"{len(paths)} runs, {taken}; `lesionkd clean` shows what is not needed any more")


@main.command()
@click.argument("run")
def show(run: str) -> None:
    """Report on one RUN: options, scores, and whether its files are intact."""
    click.echo(results.report(results.locate(run)))


@main.command()
@click.argument("runs", nargs=-1)
@click.option("--yes", is_flag=True, help="remove without being asked")
def clean(runs: tuple[str, ...], yes: bool) -> None:
    """List what is not needed any more, and remove it after asking; or remove RUNS.

    Finished results of this version are only removed if they are named.
    """
    from .clean import leftovers, named, remove

    found = named(runs) if runs else leftovers()
    if not found:
        click.echo(f"nothing to remove in {results.runs_root()}")
        return
    sizes = {path: results.size_of(path) for path in found}
    rows = [
        {"what": results.short(path), "size": results.in_words(sizes[path]), "why": why}
        for path, why in found.items()
    ]
    click.echo(_table(rows, ["what", "size", "why"]))
    click.echo(f"in all {results.in_words(sum(sizes.values()))}")
    if not _agreed(yes):
        sys.exit(1)
    removed = sum(sizes[path] for path, why in found.items() if remove(path, why))
    click.echo(f"removed {results.in_words(removed)}")


if __name__ == "__main__":
    main()
