"""What lies under LESIONKD_RUNS: a table of finished runs, a report on one, and what could be cleared away."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import pandas as pd

from . import config, store
from .config import ConfigError, StageConfig, nearest
from .integrity import CHANGING, checked

STAGES: dict[str, type[StageConfig]] = {
    cls.stage: cls for cls in vars(config).values() if isinstance(cls, type) and issubclass(cls, StageConfig) and "stage" in vars(cls)
}


IN_THE_NAME = ("dataset", "profile", "seed", "teacher_seed", "split_seed")


def folders(stage: str = "") -> list[Path]:
    """Folders of runs of a stage, or of all, by name."""
    if stage and stage not in STAGES:
        raise ConfigError(f"no stage {stage!r}: {nearest(stage, STAGES)}")
    return [path for name in ([stage] if stage else STAGES) for path in sorted((store.runs_root() / name).glob("*")) if (path / "config.json").is_file()]


def list_runs(stage: str = "") -> pd.DataFrame:
    """One row a finished run, oldest first, with its test Dice (mean and 95 % interval) and what differs from the defaults."""
    rows = []
    for path in filter(store.is_done, folders(stage)):
        file = path / "summary.json"
        summary = store.read_json(file) if file.is_file() else {}
        test = summary.get("test") or {}
        dice = test.get("dice") or {}
        rows.append({
            "stage": path.parent.name, "run": path.name,
            "test Dice": f"{dice['mean']:.3f} [{dice['low']:.3f}, {dice['high']:.3f}]" if dice else "",
            "missed": f"{test['missed']} of {test['lesions']}" if test else "", "epochs": summary.get("epochs", ""),
            "minutes": round(summary["seconds"] / 60, 1) if "seconds" in summary else "",
            "MiB": round(size_of(path) / 2**20, 1), "finished": f"{datetime.fromtimestamp((path / 'DONE').stat().st_mtime):%Y-%m-%d %H:%M}",
            "differs": _in_words({n: v for n, v in _changed(store.read_json(path / "config.json")).items() if n not in IN_THE_NAME}),
        })
    columns = ["stage", "run", "test Dice", "missed", "epochs", "minutes", "MiB", "finished", "differs"]
    return pd.DataFrame(rows, columns=columns).sort_values("finished", kind="stable", ignore_index=True)


def report(path: Path) -> str:
    """A run in a few lines: where and when it was made, what differs from the defaults, its scores, and whether its files are as written.

    Raises
    ------
    UnfinishedRun, DamagedResult
        It is no run, or a file of it changed.
    """
    made, env = store.read_json(path / "config.json"), store.read_json(path / "env.json")
    lines = [store.short(path), f"made on {env['device']} with {env['threads']} threads, torch {env['packages']['torch']}, commit {env['commit'] or 'unknown'}"]
    lines.append("parameters that differ from the defaults: " + (_in_words(_changed(made)) or "none"))
    if not store.is_done(path):
        checkpoint = path / "checkpoint_last"
        epochs = len(store.read_checkpoint(checkpoint)["history"]) if checkpoint.is_file() else 0
        return "\n".join([*lines, f"unfinished, {epochs} epochs done; the same parameters go on with it"])
    summary = store.read_json(path / "summary.json") if (path / "summary.json").is_file() else {}
    lines += [line for split in ("val", "test") if split in summary for line in _scores(split, summary[split])]
    for name in ("best_epoch", "epochs", "seconds", "parameters", "kept", "dropped", "groups"):
        lines += [f"{name.replace('_', ' ')}: {summary[name]:,}"] if name in summary else []
    if summary.get("constant"):
        lines.append("it marks nothing, or everything, in every case: it has learned nothing")
    for table in (path / "table.csv", path / "parity.csv"):  # of an ablation, of an export
        lines += [store.read_table(table).to_string(index=False, float_format="%.3g", na_rep="")] if table.is_file() else []
    files = [checked(file) for file in sorted(path.iterdir()) if file.is_file() and file.name not in CHANGING]
    known = (path / "DONE").stat().st_size > 0
    lines.append(f"{len(files)} files, {size_of(path) / 2**20:.1f} MiB, " + ("all as written" if known else "made before checksums were kept"))
    return "\n".join(lines)


def _changed(made: dict[str, Any]) -> dict[str, Any]:
    """Parameters of a run that its profile and the defaults do not explain."""
    cls = STAGES[made["stage"]]
    usual = cls.model_construct(**{n: f.default for n, f in cls.model_fields.items()} | config.PROFILES[made["profile"]]).model_dump(mode="json")
    return {name: made[name] for name in cls.model_fields if name in made and made[name] != usual[name]}


def _in_words(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} = {(', '.join(map(str, value)) if isinstance(value, list) else value)!r}" for name, value in values.items())


def _scores(split: str, summary: dict[str, Any]) -> list[str]:
    shown = [f"{name} {summary[name]['mean']:.3f} [{summary[name]['low']:.3f}, {summary[name]['high']:.3f}]"
             for name in ("dice", "hd95", "surface_dice") if summary.get(name, {}).get("mean") is not None]
    return [f"{split}, {summary['cases']} cases in {summary['groups']} groups: {', '.join(shown)}; {summary['missed']} of {summary['lesions']} lesions missed"]


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files of a folder."""
    return path.stat().st_size if path.is_file() else sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


@dataclass(frozen=True)
class Clearable:
    """Something that could be removed, its size in bytes, and what it is."""

    path: Path
    size: int
    what: str


def clearable(named: list[Path], unfinished: bool) -> list[Clearable]:
    """What can go: the named runs, and without names what killed runs left behind; with `unfinished` also runs without DONE.

    What another process works on is never among it.
    """
    if named:
        found = [(path, "run" + _standing(path)) for path in named]
    else:
        found = list(_leftovers())
        found += [(path, "unfinished run") for path in folders() if unfinished and not store.is_done(path)]
    return [Clearable(path, size_of(path), what) for path, what in found if _free(path)]


def _leftovers() -> Iterator[tuple[Path, str]]:
    root = store.runs_root()
    for partial in sorted(root.rglob(".*.partial")):
        yield partial, "half-written file"
    for path in filter(store.is_done, folders()):
        if (path / "parts").is_dir():
            yield path / "parts", "parts of finished data"
    for lock in sorted(root.glob("*/*.lock")):
        if not lock.with_suffix("").exists():
            yield lock, "lock of no run"


def _standing(path: Path) -> str:
    """How many other runs were made from this one."""
    digest = store.read_json(path / "config.json")["digest"]
    count = sum(digest in store.read_json(other / "config.json")["upstream"] for other in folders() if other != path)
    return f", on which {count} others stand: they keep their scores" if count else ""


def _free(path: Path) -> bool:
    """Whether no process works on the run that a path belongs to."""
    from filelock import FileLock, Timeout

    stage = next((parent for parent in (path, *path.parents) if parent.parent.parent == store.runs_root()), path)
    lock = stage if stage.suffix == ".lock" else stage.with_name(stage.name + ".lock")
    if not lock.exists():
        return True
    try:
        with FileLock(lock, timeout=0):
            return True
    except Timeout:
        return False


def clear(items: list[Clearable]) -> None:
    """Remove; a run's DONE goes first, so that half of it is never taken for whole."""
    for item in items:
        if item.path.is_file():
            item.path.unlink()
        else:
            (item.path / "DONE").unlink(missing_ok=True)
            shutil.rmtree(item.path)
