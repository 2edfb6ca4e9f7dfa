"""`python -m lesionkd_core run NOTEBOOK -p NAME VALUE` and `... predict RUN IMAGES --out MASKS`."""

from __future__ import annotations

import argparse
import hashlib
import re
import sys
from pathlib import Path
from typing import Any

from .config import ConfigError, LesionKDError, StageConfig, nearest
from .store import CHECKOUT, runs_root


def main(argv: list[str] | None = None) -> int:
    """Exit code 0 when all went well, 1 when something must be mended, 2 for a wrong command line."""
    parser = argparse.ArgumentParser(prog="python -m lesionkd_core", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="execute a notebook with papermill and keep it with its results")
    run.add_argument("notebook", help="such as 04_distill")
    run.add_argument("-p", "--parameter", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"))
    predict = commands.add_parser("predict", help="segment a folder of images with a trained student (step S7)")
    predict.add_argument("run", type=Path, help="folder of a finished run, such as runs/distill/...")
    predict.add_argument("images", type=Path, help="folder of images")
    predict.add_argument("--out", type=Path, required=True, help="folder for the masks; made if absent")
    predict.add_argument("--threshold", type=float, help="write masks of 0 and 255 cut here (0..1) instead of probability x 255")
    predict.add_argument("--overlays", action="store_true", help="also write images with the contour drawn in")
    args = parser.parse_args(argv)
    try:
        return run_notebook(args.notebook, dict(args.parameter)) if args.command == "run" else predict_images(args)
    except LesionKDError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1


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


if __name__ == "__main__":
    sys.exit(main())
