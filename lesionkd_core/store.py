"""Where results live: content-addressed folders, written atomically, `DONE` last.

``runs/<stage>/<dataset>-<profile>-s<seed>-<hash8>/`` under LESIONKD_RUNS, else under the checkout.
A folder without `DONE` is unfinished work: training goes on from it, everything else starts anew.
`DONE` holds the checksum of every file; each is held against it before it is used again.
"""

from __future__ import annotations

import difflib
import io
import json
import os
import re
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .config import LesionKDError, PrepareConfig, StageConfig
from .integrity import DamagedResult, checked, checksums, is_whole
from .progress import Tell
from .provenance import CHECKOUT, environment

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

TEXT = (
    "id", "case", "group", "split", "label", "volume", "file", "action", "reason", "arm", "other", "dataset", "test_dataset", "teacher", "profile",
    "run", "hash", "commit",
)
"""Columns of tables that stay text, whatever their values look like."""


class UnfinishedRun(LesionKDError):
    """A folder is no finished run."""


def runs_root() -> Path:
    """The folder of all results: LESIONKD_RUNS, else `runs` of the checkout."""
    if named := os.environ.get("LESIONKD_RUNS"):
        return Path(named).expanduser().resolve()
    if not (CHECKOUT / "pyproject.toml").is_file():
        raise LesionKDError(
            "lesionkd_core runs from an installed copy, not from a checkout, so it knows no place for\n"
            "results: set LESIONKD_RUNS to a folder."
        )
    return CHECKOUT / "runs"


def short(path: Path) -> str:
    """A path as notebooks print it: relative to the results where it can be, never absolute there."""
    root = runs_root()
    return f"runs/{path.relative_to(root).as_posix()}" if path.is_relative_to(root) else str(path)


def locate(run: Any) -> Path:
    """The folder of a run: a result, its path, what a notebook prints of it (`runs/distill/...`), or its name alone."""
    path = Path(getattr(run, "path", run)).expanduser()
    if path.exists():
        return path.resolve()
    inside = runs_root().joinpath(*path.parts[1:] if path.parts[:1] == ("runs",) else path.parts)
    if inside.exists():
        return inside
    known = {found.name: found for found in runs_root().glob("*/*") if found.is_dir()}
    if path.name not in known:
        hint = difflib.get_close_matches(path.name, known, n=1)
        cure = f"did you mean {hint[0]!r}?" if hint else "`python -m lesionkd_core list` shows what is there."
        raise UnfinishedRun(f"{run} holds no config.json: it is not the folder of a run, nor the name of one; {cure}")
    return known[path.name]


def folder(cfg: PrepareConfig, upstream: str) -> Path:
    """The folder of the result of `cfg`, made from what has the digest `upstream`."""
    dataset = re.sub(r"[^A-Za-z0-9._-]+", "_", Path(cfg.dataset).name) or "data"
    stage, mark = runs_root() / cfg.stage, cfg.digest(upstream)[:8]
    same = (path for path in sorted(stage.glob(f"*-{mark}")) if is_done(path))  # perhaps from another profile
    return next(same, stage / f"{dataset}-{cfg.profile}-s{getattr(cfg, cfg.seed_field)}-{mark}")


def is_done(path: Path) -> bool:
    """Whether the result in `path` is complete."""
    return (path / "DONE").is_file()


def make_folder(path: Path) -> None:
    """Make a folder where there is none, or say why it cannot be."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LesionKDError(f"cannot make the folder {path}: {error.strerror}. Choose another; LESIONKD_RUNS names that of all results.") from error


@contextmanager
def lock(path: Path, tell: Tell = print) -> Iterator[None]:
    """Only one process works on a folder; another waits, and says for whom. A dead holder's lock is free."""
    from filelock import FileLock, Timeout

    make_folder(path.parent)
    guard = FileLock(file := path.with_name(path.name + ".lock"))
    try:
        guard.acquire(timeout=0.2)
    except Timeout:
        tell(f"another process ({file.read_text() or 'just starting'}) works on {short(path)}; waiting for it")
        guard.acquire()
    file.write_text(f"{os.getpid()} on {socket.gethostname()}")
    try:
        yield
    finally:
        guard.release()


def begin(path: Path, cfg: StageConfig, upstream: str, keep: bool = False) -> None:
    """Open an unfinished folder: emptied unless `keep`, with configuration and environment written."""
    if path.exists() and not keep:
        shutil.rmtree(path)
    make_folder(path)
    identity = {"stage": cfg.stage, "version": cfg.version, "upstream": upstream, "digest": cfg.digest(upstream)}
    write_json(path / "config.json", identity | cfg.model_dump(mode="json"))
    env = path / "env.json"
    before = [read_json(env)] if env.exists() else []
    write_json(env, environment(cfg) | {"resumed_from": before})


def finish(path: Path) -> None:
    """Declare the result complete, with the checksum of every file; what is drawn from it may be added, nothing of it changes."""
    write_json(path / "DONE", checksums(path))


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place, flushed, once the block ends well."""
    make_folder(path.parent)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise LesionKDError(
            f"cannot write {path}: {error.strerror or error}. Free some space or check the permissions; finished results are untouched."
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Write JSON that diffs well."""
    write_text(path, json.dumps(content, indent=1, sort_keys=True, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file of a run, or say that the folder is no run."""
    try:
        return json.loads(checked(path).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UnfinishedRun(f"{path.parent} holds no {path.name}: it is not the folder of a run. Finished runs lie in {runs_root()}/<stage>/.") from None
    except ValueError:
        raise UnfinishedRun(f"{path} is damaged: remove the folder {path.parent} and run again.") from None


def write_table(path: Path, table: pd.DataFrame) -> None:
    """Write a pandas table as CSV, nine significant digits (float32 comes back as it was)."""
    with replacing(path) as partial:
        table.to_csv(partial, index=False, float_format="%.9g", lineterminator="\n", errors="surrogateescape")  # file names are bytes


def read_table(path: Path) -> pd.DataFrame:
    """Read a CSV of a run; empty text stays text, numbers keep their type."""
    import pandas as pd

    text = dict.fromkeys(TEXT, str)
    numbers = [name for name in pd.read_csv(checked(path), nrows=0).columns if name not in text]
    return pd.read_csv(path, encoding_errors="surrogateescape", dtype=text, keep_default_na=False, na_values=dict.fromkeys(numbers, [""]))


def write_array(path: Path, array: np.ndarray) -> None:
    """Write a .npy file whole or not at all."""
    import numpy as np

    with replacing(path) as partial, open(partial, "wb") as file:
        np.save(file, array, allow_pickle=False)


def read_array(path: Path, mmap: bool = True) -> np.ndarray:
    """Read a .npy file; by default it stays on the disk until it is looked at."""
    import numpy as np

    array: np.ndarray = np.load(checked(path), mmap_mode="r" if mmap else None, allow_pickle=False)
    return array


@contextmanager
def appending(path: Path, shape: tuple[int, ...]) -> Iterator[Callable[[np.ndarray], int]]:
    """A uint8 .npy file of known shape that is written block by block, whole or not at all."""
    import numpy as np

    with replacing(path) as partial, open(partial, "wb") as file:  # a memory map would die of a full disk
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
        yield lambda block: file.write(np.ascontiguousarray(block, np.uint8).data)


def write_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write tensors and plain values; `read_checkpoint` loads them with weights_only=True."""
    import torch

    buffer = io.BytesIO()  # torch's own file writer reports a full disk as a RuntimeError of its C++
    torch.save(content, buffer)
    with replacing(path) as partial:
        partial.write_bytes(buffer.getbuffer())


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Load a checkpoint on the CPU without running any code in it; damaged bytes are found."""
    import torch

    try:
        if not is_whole(checked(path)):
            raise ValueError("its bytes are damaged")
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        return content
    except DamagedResult:
        raise
    except FileNotFoundError:
        raise UnfinishedRun(f"{path.parent} holds no {path.name}: the run has not finished an epoch, or this is no training run.") from None
    except Exception as error:  # damaged bytes make torch's unpickler fail in many ways
        raise LesionKDError(f"{path} is no checkpoint that can be trusted: {str(error).partition(chr(10))[0] or type(error).__name__}") from None


class Result:
    """A finished result: its folder, and what lies in it, read when asked for."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)

    def _json(self, name: str) -> dict[str, Any]:
        content: dict[str, Any] = read_json(self.path / name)
        return content

    @property
    def digest(self) -> str:
        """Content address, for what is made from it."""
        return str(self.config["digest"])

    @property
    def config(self) -> dict[str, Any]:
        """Every parameter as it was."""
        return self._json("config.json")

    @property
    def summary(self) -> dict[str, Any]:
        """Scores and counts of the run."""
        return self._json("summary.json")

    @property
    def history(self) -> pd.DataFrame:
        """One row an epoch."""
        return read_table(self.path / "history.csv")

    @property
    def per_case(self) -> pd.DataFrame:
        """One row a scored case: the only source of every table."""
        return read_table(self.path / "per_case.csv")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({short(self.path)})"
