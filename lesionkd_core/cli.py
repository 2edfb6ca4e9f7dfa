"""`python -m lesionkd_core run NOTEBOOK -p NAME VALUE`, `... sweep FILE`, `... results`, `... predict RUN IMAGES --out MASKS`, `... download NAME`.

`... list`, `... show RUN` and `... clean` look after what was made.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from functools import partial
from pathlib import Path

from .config import ConfigError, LesionKDError
from .store import runs_root
from .sweeps.notebooks import literal, run_notebook

TRAINING = {
    "train-teacher": ("TeacherConfig", "train_teacher", "find or train the teacher"),
    "distill": ("DistillConfig", "distill", "find or train a student, and what it stands on"),
    "ablate": ("AblationConfig", "ablate", "find or train every arm and seed, and compare them"),
}
"""Commands that torchrun can start in many processes (docs/cluster.md): configuration, function, help."""


def main(argv: list[str] | None = None) -> int:
    """Exit code 0 when all went well, 1 when something must be mended, 2 for a wrong command line."""
    parser = argparse.ArgumentParser(prog="python -m lesionkd_core", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="execute a notebook with papermill and keep it with its results")
    run.add_argument("notebook", help="such as 04_distill")
    _takes_parameters(run)
    for name, (_, _, text) in TRAINING.items():
        _takes_parameters(commands.add_parser(name, help=f"{text}, without a notebook"))
    _looks_after_runs(commands)
    predict = commands.add_parser("predict", help="segment a folder of images with a trained student (step S7)")
    predict.add_argument("run", type=Path, help="folder of a finished run, such as runs/distill/...")
    predict.add_argument("images", type=Path, help="folder of images, NIfTI volumes, folders of DICOM series")
    predict.add_argument("--out", type=Path, required=True, help="folder for the masks; made if absent")
    predict.add_argument("--threshold", type=float, help="write masks of 0 and 255 cut here (0..1) instead of probability x 255; volumes: 0 and 1")
    predict.add_argument("--overlays", action="store_true", help="also write images with the contour drawn in")
    fetch = commands.add_parser("download", help="fetch a release of the catalogue, check it and unpack it")
    fetch.add_argument("name", nargs="?", help="such as kvasir-seg")
    fetch.add_argument("--list", action="store_true", help="show the catalogue and what is there")
    fetch.add_argument("--yes", action="store_true", help="accept the licence terms without being asked")
    fetch.add_argument("--mirror", default="", metavar="URL", help="address of a folder with the same files")
    fetch.add_argument("--archive", default="", metavar="FILE", help="an archive on this machine, or a folder of them, instead of a download")
    fetch.add_argument("--to", metavar="FOLDER", help="where data sets lie, instead of LESIONKD_DATA")
    _runs_many(commands)
    args = parser.parse_args(argv)
    try:
        if args.command == "run":
            return run_notebook(args.notebook, dict(args.parameter))
        if args.command in TRAINING:
            return train(args.command, dict(args.parameter))
        if args.command in ("list", "show", "clean"):
            return look_at_runs(args)
        if args.command in ("sweep", "results"):
            return run_sweep(args) if args.command == "sweep" else show_results(args)
        return predict_images(args) if args.command == "predict" else download_release(args)
    except LesionKDError as error:
        _tell_once(f"{type(error).__name__}: {error}")
        return 1
    except KeyboardInterrupt:
        _tell_once("\nstopped; the same command goes on from here")
        return 130


def _looks_after_runs(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    shown = commands.add_parser("list", help="finished runs as a table")
    shown.add_argument("stage", nargs="?", default="", help="prepare, teacher, graph, distill, ablation, external or export; all by default")
    show = commands.add_parser("show", help="a short report on one run")
    show.add_argument("run", help="its folder, such as runs/distill/..., or its name")
    clean = commands.add_parser("clean", help="free space after asking: what killed runs left behind, or the runs that are named")
    clean.add_argument("run", nargs="*", help="folders or names of runs to remove; without one, only leftovers")
    clean.add_argument("--unfinished", action="store_true", help="also runs that did not finish and that nobody works on")
    clean.add_argument("--yes", action="store_true", help="do not ask")


def _runs_many(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    many = commands.add_parser("sweep", help="execute a notebook many times, as a YAML file says, on this machine or a cluster (docs/sweeps.md)")
    many.add_argument("file", type=Path)
    many.add_argument("--scheduler", default="", metavar="ADDRESS", help="a running Dask scheduler, such as tcp://127.0.0.1:8786")
    many.add_argument("--workers", type=int, default=0, help="runs at a time on this machine's CPU; 0 is as many as fit")
    many.add_argument("--gpus", type=int, help="runs at a time on this machine's GPUs; by default one each, 0 uses none")
    table = commands.add_parser("results", help="collect the scores of all finished runs and show their means")
    table.add_argument("--by", default="dataset, test_dataset, profile, teacher, arm", help="comma-separated parameters that make the rows")
    table.add_argument("--where", default="", metavar="SQL", help="which rows count, such as \"width = 4 and arm <> 'teacher'\"")
    table.add_argument("--split", default="test", choices=("test", "val"), help="choose parameters by val alone")
    table.add_argument("--out", type=Path, metavar="FILE", help="write the table as CSV, too")


def _takes_parameters(parser: argparse.ArgumentParser) -> None:
    parser._negative_number_matcher = re.compile(r"-\d")  # '-600, 1500' is a value, not an option
    parser.add_argument("-p", "--parameter", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"))


def _tell_once(message: str) -> None:
    if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun's: one message for all processes
        from .ranks import first_to_tell

        if not first_to_tell():
            return
    print(message, file=sys.stderr, flush=True)


def train(command: str, given: dict[str, str]) -> int:
    """Make a result without a notebook, in one process or in all that torchrun started; a notebook with these parameters finds it."""
    from . import config

    cfg = getattr(config, TRAINING[command][0])(**{name: literal(value) for name, value in given.items()})
    from . import ranks, stages  # torch is imported once the parameters are known to be right

    ranks.join(cfg)
    result = getattr(stages, TRAINING[command][1])(cfg)
    print(f"{result}\nresults: {result.path}")
    ranks.leave()
    return 0


def run_sweep(args: argparse.Namespace) -> int:
    """Run what a sweep file asks for; what failed is listed at the end, and the exit code says that something did."""
    from .sweeps.cluster import sweep

    table = sweep(args.file, args.scheduler, args.workers, args.gpus, partial(print, flush=True))
    counts = table["status"].value_counts()
    print(", ".join(f"{counts[status]} {status}" for status in ("made", "found", "failed", "not started") if status in counts))
    lost = table[table["status"].isin(["failed", "not started"])]
    for row in lost.itertuples():
        kept = f"\n    executed notebook: {runs_root() / row.notebook.removeprefix('runs/')}" if row.status == "failed" else ""
        print(f"  {row.run}: {row.error}{kept}", file=sys.stderr)
    return 1 if len(lost) else 0


def show_results(args: argparse.Namespace) -> int:
    """Collect, summarize, print, and write where asked."""
    from .sweeps.results import collect, summarize_results

    collect()
    table = summarize_results(args.by, args.where, args.split)
    print(table.to_string(index=False, float_format="%.4g", na_rep=""))
    if args.out:
        table.to_csv(args.out, index=False)
        print(f"written: {args.out}")
    return 0


def look_at_runs(args: argparse.Namespace) -> int:
    """List finished runs, report on one, or free space once that is agreed to."""
    from . import runs, store

    if args.command == "list":
        from tabulate import tabulate

        table = runs.list_runs(args.stage)
        print(tabulate(table, headers="keys", tablefmt="simple", showindex=False) if len(table) else f"no finished run in {runs_root()}")
        return 0
    if args.command == "show":
        print(runs.report(store.locate(args.run)))
        return 0
    items = runs.clearable([store.locate(run) for run in args.run], args.unfinished)
    for item in items:
        print(f"{item.size / 2**20:9.1f} MiB  {store.short(item.path)}  ({item.what})")
    total = f"{sum(item.size for item in items) / 2**20:.1f} MiB"
    if not items:
        print("nothing to clear away, or another process works on it")
    elif _agreed(args.yes, f"remove these for good, {total}?"):
        runs.clear(items)
        print(f"freed {total}")
    return 0


def _agreed(yes: bool, question: str) -> bool:
    if not yes and not sys.stdin.isatty():
        raise ConfigError("no terminal to ask in: read the lines above and add --yes if you agree")
    if not yes:
        print(f"{question} [y/N] ", end="", flush=True)
    return yes or sys.stdin.readline().strip().lower() in ("y", "yes")


def predict_images(args: argparse.Namespace) -> int:
    """Segment a folder; unreadable files are listed, and the exit code says that there were some."""
    from .inference import load_student, predict_folder

    if args.threshold is not None and not 0 <= args.threshold <= 1:
        raise ConfigError(f"--threshold = {args.threshold}: wants a number from 0 to 1")
    if args.out.resolve() == args.images.resolve():
        raise ConfigError("--out is the folder of the images; choose another, so that none is overwritten")
    student = load_student(args.run)

    def tell(done: int, total: int) -> None:
        if sys.stdout.isatty() or done == total:
            print(f"{done}/{total} images", end="\n" if done == total else "\r", flush=True)

    unreadable = predict_folder(student, args.images, args.out, args.threshold, args.overlays, tell)
    print(f"masks: {args.out}")
    if unreadable:
        print(f"{len(unreadable)} not read:\n" + "\n".join(f"  {line}" for line in unreadable), file=sys.stderr)
    return 1 if unreadable else 0


def download_release(args: argparse.Namespace) -> int:
    """Fetch a release once its terms are agreed to, or show the catalogue."""
    from .datasets import CATALOGUE
    from .datasets.download import download, found

    root = Path(args.to).expanduser().resolve() if args.to else None
    if args.list or not args.name:
        rows = [(r.name, r.modality, f"{r.count or '?'}", r.licence or "none stated", "yes" if found(r, root) else "no") for r in CATALOGUE.values()]
        rows = [("name", "modality", "images", "licence", "found"), *rows]
        widths = [max(map(len, column)) for column in zip(*rows)]
        print("\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows))
        return 0 if args.list else 2

    download(args.name, root, args.mirror, args.archive, partial(print, flush=True), lambda: _agreed(args.yes, "Go on?"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
