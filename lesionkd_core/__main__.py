"""`python -m lesionkd_core run NOTEBOOK -p NAME VALUE`, `... predict RUN IMAGES --out MASKS` and `... download NAME`."""

from __future__ import annotations

import argparse
import hashlib
import re
import sys
from functools import partial
from pathlib import Path
from typing import Any

from .config import ConfigError, LesionKDError, StageConfig, nearest
from .store import CHECKOUT, runs_root


def main(argv: list[str] | None = None) -> int:
    """Exit code 0 when all went well, 1 when something must be mended, 2 for a wrong command line."""
    parser = argparse.ArgumentParser(prog="python -m lesionkd_core", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="execute a notebook with papermill and keep it with its results")
    run._negative_number_matcher = re.compile(r"-\d")  # '-600, 1500' is a value, not an option
    run.add_argument("notebook", help="such as 04_distill")
    run.add_argument("-p", "--parameter", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"))
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
    args = parser.parse_args(argv)
    try:
        if args.command == "run":
            return run_notebook(args.notebook, dict(args.parameter))
        return predict_images(args) if args.command == "predict" else download_release(args)
    except LesionKDError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        return 130


def run_notebook(name: str, given: dict[str, str]) -> int:
    """Execute a notebook; it is kept as `notebook.ipynb` beside its results, with its error if it fails."""
    import papermill as pm

    notebooks = {p.stem: p for p in (CHECKOUT / "notebooks").glob("[0-9]*.ipynb")}
    stem = Path(name).stem
    if stem not in notebooks:
        raise ConfigError(f"no notebook {name!r}: {nearest(stem, notebooks)}")
    parameters = {n: _literal(v) for n, v in given.items()}
    configuration(notebooks[stem])(**parameters)  # refuses what is wrong before anything starts
    kept = runs_root() / "notebooks"
    kept.mkdir(parents=True, exist_ok=True)
    mark = hashlib.sha256(repr(sorted(parameters.items())).encode()).hexdigest()[:8]
    target = kept / f"{stem}-{mark}.ipynb"
    try:
        executed = pm.execute_notebook(
            str(notebooks[stem]), str(target), parameters, kernel_name="python3", progress_bar=False, log_output=True, stdout_file=sys.stdout
        )
    except pm.PapermillExecutionError as error:
        print(f"{error.ename}: {error.evalue}\nThe executed notebook with the error is {target}", file=sys.stderr)
        return 1
    print(f"executed notebook: {target}")
    if found := _results(executed):
        place = runs_root() / found.removeprefix("runs/")
        (place / "notebook.ipynb").write_bytes(target.read_bytes())
        print(f"results: {place}")
    return 0


def configuration(notebook: Path) -> type[StageConfig]:
    """The configuration class that a notebook checks its parameters with."""
    from . import config

    return getattr(config, re.search(r"lkd\.(\w+Config)\.from_notebook", notebook.read_text(encoding="utf-8"))[1])


def _literal(value: str) -> Any:
    """papermill's reading of a value on the command line: 1, 0.5, True, None or text."""
    from papermill.cli import _resolve_type

    return _resolve_type(value)


def _results(executed) -> str:
    """The path that the last cell prints before DONE."""
    for output in executed.cells[-1].get("outputs", []):
        lines = output.get("text", "").split()
        if "DONE" in lines:
            return lines[0]
    return ""


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

    def agree() -> bool:
        if not args.yes and not sys.stdin.isatty():
            raise ConfigError("no terminal to ask in: read the terms above and add --yes if you accept them")
        if not args.yes:
            print("Go on? [y/N] ", end="", flush=True)
        return args.yes or sys.stdin.readline().strip().lower() in ("y", "yes")

    download(args.name, root, args.mirror, args.archive, partial(print, flush=True), agree)
    return 0


if __name__ == "__main__":
    sys.exit(main())
