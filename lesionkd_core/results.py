"""Result folders: found or made, locked, written atomically, checked when they are read.

A result is the folder ``runs/<stage>/<dataset>-<profile>-s<seed>-<hash>/`` of LESIONKD_RUNS, or of
the checkout. The file DONE is written last and holds the SHA-256 of every file. A folder without
DONE is unfinished: a training resumes from it, other stages start again.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import io
import json
import logging
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from .config import KINDS, ConfigError, LesionKDError, Role, StageConfig, nearest

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from tqdm import tqdm

C = TypeVar("C", bound=StageConfig)
R = TypeVar("R", bound="Result")
Content = dict[str, Any]
"""What a JSON file or a checkpoint of a run holds."""

CHECKOUT = Path(__file__).resolve().parents[1]
STAGES = ("prepare", "unlabelled", "teacher", "graph", "distill", "ablation", "external", "export")
CHANGING = ("DONE", "notebook.ipynb", "figures", "parts")
"""Files and folders of a finished result that may change."""
TEXT = (
    "id case group split label volume file action reason arm other dataset test_dataset teacher "
    "profile run hash commit seg_loss"
).split()
"""Columns of tables that are text, whatever their values look like."""

log = logging.getLogger("lesionkd")


class UnfinishedRun(LesionKDError):
    """A folder is not a finished run."""


class DamagedResult(LesionKDError):
    """A file of a finished result has changed since it was written."""


class OtherOptions(LesionKDError):
    """A result was made with other options than the configuration that comes with it."""


# Folders ------------------------------------------------------------------------------------------


def runs_root() -> Path:
    """The folder of all results: LESIONKD_RUNS, or `runs` in the checkout."""
    if named := os.environ.get("LESIONKD_RUNS"):
        return Path(named).expanduser().resolve()
    if not (CHECKOUT / "pyproject.toml").is_file():
        raise LesionKDError("no checkout, so no default folder: set LESIONKD_RUNS to a folder")
    return CHECKOUT / "runs"


def short(path: Path) -> str:
    """A path for display: `runs/...` under the folder of results, else as it is."""
    root = runs_root()
    return f"runs/{path.relative_to(root).as_posix()}" if path.is_relative_to(root) else str(path)


def locate(run: Result | Path | str) -> Path:
    """The folder of a run, given as a result, a path, `runs/distill/...` or the folder's name."""
    path = run.path if isinstance(run, Result) else Path(run).expanduser()
    if path.exists():
        return path.resolve()
    inside = runs_root().joinpath(*path.parts[1:] if path.parts[:1] == ("runs",) else path.parts)
    if inside.exists():
        return inside
    known = {found.name: found for found in runs_root().glob("*/*") if found.is_dir()}
    if path.name in known:
        return known[path.name]
    close = difflib.get_close_matches(path.name, known, n=1)
    cure = f"did you mean {close[0]!r}?" if close else "`lesionkd list` shows what is there."
    raise UnfinishedRun(f"{run} is not the folder or the name of a run; {cure}")


def is_done(path: Path) -> bool:
    """Whether the result in a folder is complete."""
    return (path / "DONE").is_file()


@dataclass(frozen=True)
class Wanted(Generic[C]):
    """A result to find or make.

    Attributes
    ----------
    cfg
        Its options.
    upstream : str
        Digest of what it is made from.
    unused : set of str
        Options that this result does not depend on.
    """

    cfg: C
    upstream: str
    unused: frozenset[str] = frozenset()

    @cached_property
    def digest(self) -> str:
        """SHA-256 that identifies the result."""
        return self.cfg.digest(self.upstream, self.unused)


def folder(wanted: Wanted[C]) -> Path:
    """The folder of a result; the full digest is compared, not the name's letters."""
    cfg, digest = wanted.cfg, wanted.digest
    found = with_digest(cfg.stage, digest)  # perhaps of another profile
    if found:
        return found
    dataset = re.sub(r"[^A-Za-z0-9._-]+", "_", getattr(cfg, "dataset_name", "")) or "data"
    name = f"{dataset}-{cfg.profile}-s{getattr(cfg, cfg.seed_field, 0)}"
    path = runs_root() / cfg.stage / f"{name}-{digest[:8]}"
    config = path / "config.json"
    if config.exists() and read_json(config).get("digest") != digest:
        return path.with_name(f"{name}-{digest[:16]}")
    return path


def with_digest(stage: str, digest: str) -> Path | None:
    """The folder of a finished result by its full digest; None if there is none."""
    for path in sorted((runs_root() / stage).glob(f"*-{digest[:8]}*")):
        if is_done(path) and read_json(path / "config.json").get("digest") == digest:
            return path
    return None


def find_or_make(
    wanted: Sequence[Wanted[C]],
    make: Callable[[dict[Path, C]], None],
    kind: Callable[[Path], R],
    *,
    resume: bool = False,
    leader: bool = True,
    wait: Callable[[], object] = lambda: None,
) -> list[R]:
    """Find the finished results of some configurations, or make those that are missing.

    Every stage goes through this function. One process works on a folder; others wait for it.

    Parameters
    ----------
    wanted
        Configurations, each with the digest of what its result is made from.
    make : function of {folder: configuration}
        Fills the folders of the missing results.
    kind : function of a folder
        Opens a finished result.
    resume : bool
        Keep an unfinished folder, so that `make` can continue it; otherwise it is emptied.
    leader, wait
        With several processes on one training: whether this one writes, and a barrier.
    """
    paths = [folder(one) for one in wanted]
    with ExitStack() as locks:
        if leader and not all(map(is_done, paths)):
            for path in sorted(set(paths)):  # one order, so no deadlock
                locks.enter_context(lock(path))
        wait()  # from here on no other job can finish one of them
        missing = {path: one for path, one in zip(paths, wanted) if not is_done(path)}
        if missing:
            if leader:
                for path, one in missing.items():
                    _begin(path, one, resume)
            wait()
            make({path: one.cfg for path, one in missing.items()})
            wait()
            if leader:
                for path in missing:
                    write_json(path / "DONE", checksums(path))
            wait()
    return [kind(path) for path in paths]


@contextmanager
def lock(path: Path, wait: bool = True) -> Iterator[bool]:
    """Let one process at a time work on a folder; the lock of a dead process is free.

    Gives False if another process has it and `wait` is False.
    """
    from filelock import FileLock, Timeout

    make_folder(path.parent)
    guard = FileLock(file := path.with_name(path.name + ".lock"))
    try:
        guard.acquire(timeout=0.2)
    except Timeout:
        if not wait:
            yield False
            return
        holder = file.read_text() or "just starting"
        log.info(f"another process ({holder}) works on {short(path)}; waiting for it")
        guard.acquire()
    file.write_text(f"{os.getpid()} on {socket.gethostname()}")
    try:
        yield True
    finally:
        guard.release()


def _begin(path: Path, wanted: Wanted[C], resume: bool) -> None:
    if path.exists() and not resume:
        shutil.rmtree(path)
    make_folder(path)
    for partial in path.glob(".*.partial"):  # of a process that was killed
        partial.unlink()
    cfg = wanted.cfg
    identity = {"stage": cfg.stage, "version": cfg.version, "upstream": wanted.upstream}
    identity["digest"] = wanted.digest
    env = path / "env.json"
    before = [read_json(env)] if env.exists() else []
    write_json(path / "config.json", identity | cfg.model_dump(mode="json"))
    write_json(env, environment(cfg) | {"resumed_from": before})


def environment(cfg: StageConfig) -> dict[str, object]:
    """Commit, versions, device and threads: what a reader needs to repeat the run."""
    from importlib.metadata import version

    import torch

    cuda = cfg.device in ("auto", "cuda") and torch.cuda.is_available()
    packages = ("torch", "numpy", "scipy", "pandas", "monai", "lightning-fabric", "pillow")
    return {
        "commit": commit(),
        "networks": cfg.networks(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: version(name) for name in packages},
        "device": torch.cuda.get_device_name() if cuda else cfg.device.replace("auto", "cpu"),
        "threads": cfg.threads or torch.get_num_threads(),
        "processes": int(os.environ.get("WORLD_SIZE", 1)),
    }


def commit() -> str:
    """The commit of the checkout, with `+` if files differ from it; empty outside git."""
    describe = ["git", "-C", str(CHECKOUT), "describe", "--always", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run([*describe, "--dirty=+"], capture_output=True, text=True, check=False)
    except OSError:  # git is not installed
        return ""
    return done.stdout.strip()


# Files --------------------------------------------------------------------------------------------

_checked: dict[Path, tuple[str, int, int]] = {}


def checksums(path: Path) -> dict[str, str]:
    """SHA-256 of every file of a folder that must not change."""
    files = sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith("."))
    names = {file.relative_to(path).as_posix(): file for file in files}
    return {n: _sha256(file) for n, file in names.items() if n.partition("/")[0] not in CHANGING}


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checked(path: Path) -> Path:
    """A file of a result, compared with its checksum in DONE, once in a process.

    Raises
    ------
    DamagedResult
        The file has changed or is missing.
    """
    done = path.parent / "DONE"
    if not done.is_file():
        return path
    try:
        wanted = json.loads(done.read_text(encoding="utf-8")).get(path.name)
        if wanted is None:
            return path
        state = (wanted, path.stat().st_size, path.stat().st_mtime_ns)
        if _checked.get(path) != state and _sha256(path) != wanted:
            raise ValueError
    except (ValueError, OSError):
        raise DamagedResult(
            f"{path} was damaged, edited or removed: its checksum in DONE differs. "
            f"Remove the folder {path.parent} and run again, or restore the file."
        ) from None
    _checked[path] = state
    return path


def changed_files(path: Path) -> list[str]:
    """Files of a finished result that were changed or removed since."""
    now = checksums(path)
    wanted = json.loads((path / "DONE").read_text(encoding="utf-8"))
    return [name for name, checksum in wanted.items() if now.get(name) != checksum]


def make_folder(path: Path) -> None:
    """Create a folder if there is none."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LesionKDError(f"cannot create the folder {path}: {error.strerror}") from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file that replaces `path` when the block ends without an error."""
    make_folder(path.parent)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise LesionKDError(
            f"cannot write {path}: {error.strerror or error}. Free some space or check the "
            "permissions; finished results are not affected."
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file completely or not at all."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, content: object) -> None:
    """Write JSON with sorted keys."""
    write_text(path, json.dumps(content, indent=1, sort_keys=True, allow_nan=False) + "\n")


def read_json(path: Path) -> Content:
    """Read a JSON file of a run."""
    try:
        content: Content = json.loads(checked(path).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UnfinishedRun(f"{path.parent} is not the folder of a run: no {path.name}") from None
    except ValueError:
        raise UnfinishedRun(f"{path} is damaged: remove its folder and run again.") from None
    return content


def write_table(path: Path, table: pd.DataFrame) -> None:
    """Write a table as CSV with nine significant digits, so that float32 is read back exactly."""
    names = "surrogateescape"  # file names may be any bytes
    with replacing(path) as partial:
        table.to_csv(partial, index=False, float_format="%.9g", lineterminator="\n", errors=names)


def read_table(path: Path) -> pd.DataFrame:
    """Read a CSV table of a run; the columns of `TEXT` stay text."""
    import pandas as pd

    text = dict.fromkeys(TEXT, str)
    numbers = [n for n in pd.read_csv(checked(path), nrows=0).columns if n not in text]
    return pd.read_csv(
        path,
        encoding_errors="surrogateescape",
        dtype=text,
        keep_default_na=False,
        na_values=dict.fromkeys(numbers, [""]),
    )


def write_array(path: Path, array: np.ndarray) -> None:
    """Write a .npy file completely or not at all."""
    import numpy as np

    with replacing(path) as partial, open(partial, "wb") as file:
        np.save(file, array, allow_pickle=False)


def read_array(path: Path) -> np.ndarray:
    """Read a .npy file, memory-mapped."""
    import numpy as np

    array: np.ndarray = np.load(checked(path), mmap_mode="r", allow_pickle=False)
    return array


@contextmanager
def appending(path: Path, shape: tuple[int, ...]) -> Iterator[Callable[[np.ndarray], int]]:
    """Write a .npy file of uint8 block by block, completely or not at all."""
    import numpy as np

    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    with replacing(path) as partial, open(partial, "wb") as file:  # a full disk kills memory maps
        np.lib.format.write_array_header_1_0(file, header)
        yield lambda block: file.write(np.ascontiguousarray(block, np.uint8).data)


def write_checkpoint(path: Path, content: Mapping[str, object]) -> None:
    """Write tensors and plain values."""
    import torch

    buffer = io.BytesIO()  # torch's own writer reports a full disk as a C++ error
    torch.save(content, buffer)
    with replacing(path) as partial:
        partial.write_bytes(buffer.getbuffer())


def read_checkpoint(path: Path) -> Content:
    """Load a checkpoint on the CPU with `weights_only`: no code in it is executed."""
    import torch

    if not checked(path).exists():
        raise UnfinishedRun(f"{path.parent} has no {path.name}: no epoch is finished.")
    try:
        if not is_intact(path):
            raise ValueError("its bytes are damaged")
        content: Content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes make torch's unpickler fail in many ways
        why = str(error).partition("\n")[0] or type(error).__name__
        raise LesionKDError(f"{path} is not a readable checkpoint: {why}") from None
    return content


def is_intact(path: Path) -> bool:
    """Whether the checksums inside a zip archive are right; torch does not test them."""
    if not zipfile.is_zipfile(path):
        return path.stat().st_size > 0
    with zipfile.ZipFile(path) as archive:
        return archive.testzip() is None


# Results ------------------------------------------------------------------------------------------


class Result:
    """A finished result: its folder, whose files are read on demand."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)

    @property
    def digest(self) -> str:
        """SHA-256 that identifies the result, for what is made from it."""
        return str(self.config["digest"])

    @property
    def config(self) -> Content:
        """All options of the run."""
        return read_json(self.path / "config.json")

    @property
    def summary(self) -> Content:
        """Scores and counts of the run."""
        return read_json(self.path / "summary.json")

    @property
    def history(self) -> pd.DataFrame:
        """One row for each epoch."""
        return read_table(self.path / "history.csv")

    @property
    def per_case(self) -> pd.DataFrame:
        """One row for each scored case: the source of every table."""
        return read_table(self.path / "per_case.csv")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({short(self.path)})"


def require_options(result: Result, cfg: StageConfig) -> None:
    """Refuse a result that was made with other options than `cfg`, which comes with it.

    Raises
    ------
    OtherOptions
        Names each option that differs, with both values.
    """
    made = result.config
    if made.get("digest") == Wanted(cfg, made.get("upstream", "")).digest:
        return
    given = {"version": cfg.version}
    given |= cfg.model_dump(mode="json", exclude=set(cfg.options(Role.RUN)))
    apart = []
    for name, value in given.items():
        if made.get(name, value) != value:
            apart.append(f"{name} = {made[name]!r}, not {value!r}")
    if not apart:
        apart = ["files of another content, or by another version of the code"]
    raise OtherOptions(
        f"{short(result.path)} was made with {'; '.join(apart)} as the configuration says. Give "
        "its configuration, or make it with this one."
    )


def finished(stage: str = "") -> list[Path]:
    """Folders of the finished runs of a stage, or of all stages."""
    if stage and stage not in STAGES:
        raise ConfigError(f"no stage {stage!r}: {nearest(stage, STAGES)}")
    stages = [stage] if stage else STAGES
    return [p for name in stages for p in sorted((runs_root() / name).glob("*")) if is_done(p)]


def collect(stage: str = "", split: str = "test") -> pd.DataFrame:
    """One row for each finished run: its options and its mean scores on one split.

    Choose options on `split='val'` only.
    """
    import pandas as pd

    return pd.DataFrame([row_of(path, split) for path in finished(stage)])


def row_of(path: Path, split: str = "test") -> dict[str, object]:
    """A finished run as one row of a table: where it is, its options and its mean scores."""
    summary = summary_of(path)
    made = datetime.fromtimestamp((path / "DONE").stat().st_mtime)
    row: dict[str, object] = {"run": short(path), "finished": f"{made:%Y-%m-%d %H:%M}"}
    for name, value in read_json(path / "config.json").items():
        row[name] = _plain(value)
    for name, score in (summary.get(split) or {}).items():
        if isinstance(score, dict):
            row[name] = score["mean"]
        elif isinstance(score, int):
            row[name] = score
    for name in ("parameters", "seconds"):
        if name in summary:
            row[name] = summary[name]
    return row


def summary_of(path: Path) -> Content:
    """Scores and counts of a run; empty before its end, and of a stage without scores."""
    file = path / "summary.json"
    return read_json(file) if file.is_file() else {}


def _plain(value: object) -> object:
    """An option for a table: {'feat': 1.0} -> 'feat=1', ['a', 'b'] -> 'a, b'."""
    if isinstance(value, dict):
        value = [f"{key}={weight:g}" for key, weight in value.items()]
    return ", ".join(map(str, value)) if isinstance(value, list) else value


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files of a folder."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def in_words(size: int) -> str:
    """374012345 -> '374MB'."""
    from tqdm import tqdm

    return str(tqdm.format_sizeof(size, "B"))


def with_interval(score: Content, digits: int = 3) -> str:
    """'0.944 [0.931, 0.956]'; without an interval where a single group cannot give one.

    `score` has the keys mean, low and high; a mean of None or NaN is '--'.
    """
    mean, low, high = (score[name] for name in ("mean", "low", "high"))
    if mean is None or mean != mean:
        return "--"
    interval = f" [{low:.{digits}f}, {high:.{digits}f}]" if low < high else ""
    return f"{mean:.{digits}f}{interval}"


def report(path: Path) -> str:
    """A run in a few lines: where it was made, options, scores, whether its files are intact."""
    made, env = read_json(path / "config.json"), read_json(path / "env.json")
    lines = [
        short(path),
        f"made on {env['device']}, {env['threads']} threads, torch {env['packages']['torch']}, "
        f"commit {env['commit'] or 'unknown'}",
        _options_line(made),
    ]
    if not is_done(path):
        return "\n".join([*lines, "unfinished; the same options resume or repeat it"])
    version, current = version_of(path)
    if version != current:
        lines.append(f"of version {version} of results, not {current}: only its name finds it")
    for split, scores in summary_of(path).items():
        if split in ("val", "test") and scores:
            dice, distance = with_interval(scores["dice"]), with_interval(scores["hd95"])
            missed = f"{scores['missed']} of {scores['lesions']} lesions missed"
            cases = f"{split}, {scores['cases']} cases"
            lines.append(f"{cases}: dice {dice}, hd95 {distance}; {missed}")
    files = [checked(f) for f in path.iterdir() if f.is_file() and f.name not in CHANGING]
    return "\n".join([*lines, f"{len(files)} files, {in_words(size_of(path))}, all intact"])


IDENTITY = ("stage", "version", "upstream", "digest")
"""What config.json holds besides the options."""


def _options_line(made: Content) -> str:
    """The options that differ from the profile's; all of a stage that is defined elsewhere."""
    kind, label, usual = KINDS.get(made["stage"]), "options", {}
    if kind is not None:
        label = f"options that differ from the {made['profile']} profile"
        usual = kind(profile=made["profile"]).model_dump(mode="json")
    changed = []
    for name, value in made.items():
        known = kind is None or name in usual
        if known and name not in IDENTITY and value != usual.get(name, ...):
            changed.append(f"{name} = {_plain(value)!r}")
    return f"{label}: {', '.join(changed) or 'none'}"


def version_of(path: Path) -> tuple[int, int]:
    """The version of results that a run was made by, and the current one of its stage."""
    made = read_json(path / "config.json")
    return made.get("version", 0), KINDS.get(made["stage"], StageConfig).version


# Progress -----------------------------------------------------------------------------------------


class _PlainLines(logging.Handler):
    """Writes messages to what is standard output at that time, which notebooks replace."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), flush=True)


def leads() -> bool:
    """Whether this is the first of the processes that torchrun started; it alone prints."""
    return os.environ.get("RANK", "0") == "0"


if not log.handlers and leads():
    log.addHandler(_PlainLines())
    log.setLevel(logging.INFO)
    log.propagate = False  # some library may give the root logger a handler, too


class Progress(contextlib.AbstractContextManager["Progress"]):
    """A bar in JupyterLab and in a terminal, lines of text elsewhere, with the time left.

    Parameters
    ----------
    name, unit : str
        What is done and what is counted: 'teacher' and 'epoch' give 'teacher, epoch 3/10'.
    total, done : int
        Number of steps, and how many an earlier process has done.
    lines : int, optional
        At most so many lines of text; by default one for each step.
    """

    def __init__(
        self, name: str, unit: str, total: int, done: int = 0, *, lines: int | None = None
    ) -> None:
        self.name, self.unit, self.total, self.done = name, unit, total, done
        self.lines = total if lines is None else lines
        self.first, self.started = done, time.monotonic()
        self.bar: tqdm | None = None
        if kind := live_bar():
            self.bar = kind(
                desc=name,
                unit=f" {unit}",
                total=total,
                initial=done,
                file=sys.stdout,
                dynamic_ncols=True,
            )
        elif done:
            log.info(f"{name}: resumes after {unit} {done} of {total}")

    def step(self, text: str = "", count: int = 1) -> None:
        """Some more steps are done."""
        before, self.done = self.done, self.done + count
        if self.bar is not None:
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update(count)
        elif self.done * self.lines // self.total > before * self.lines // self.total:
            said = ", ".join(part for part in (text, self.time_left()) if part)
            place = f"{self.name}, {self.unit} {self.done}/{self.total}"
            log.info(f"{place}: {said}" if said else place)

    def time_left(self) -> str:
        """'2 min left', as if the next steps take as long as the last; '' after the last one."""
        pace = (time.monotonic() - self.started) / max(self.done - self.first, 1)
        seconds = round(pace * (self.total - self.done))
        if seconds < 1:
            return ""
        return f"{seconds} s left" if seconds < 100 else f"{seconds / 60:.0f} min left"

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()


def live_bar() -> type[tqdm] | None:
    """tqdm's bar for JupyterLab or a terminal; None under papermill, nbval and in a log file."""
    kind: type[tqdm] | None = None
    if "ipykernel" in sys.modules:
        if "JPY_SESSION_NAME" in os.environ:
            from tqdm.notebook import tqdm_notebook

            kind = tqdm_notebook
    elif sys.stdout.isatty() and leads():
        from tqdm import tqdm as terminal_bar

        kind = terminal_bar
    return kind
