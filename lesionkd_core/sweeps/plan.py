"""A sweep file -> tasks: every run checked before any starts, duplicates merged, shared results made once."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections import Counter
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..config import AblationConfig, ConfigError, DistillConfig, GraphConfig, LesionKDError, PrepareConfig, StageConfig, TeacherConfig
from ..config.base import _plain
from ..datasets import fingerprint
from .notebooks import configuration, find_notebook, kept_notebook, package


class SweepError(LesionKDError):
    """A sweep file that cannot be run."""


class SweepFile(BaseModel):
    """What a sweep file may say."""

    model_config = ConfigDict(strict=True, extra="forbid")
    notebook: str = Field("05_ablations", description="the notebook that every run executes")
    parameters: dict[str, Any] = Field({}, description="parameters of every run")
    product: dict[str, Any] = Field({}, description="parameter: list of values; every combination is a run")
    include: list[dict[str, Any]] = Field([], description="list of further runs, each with the parameters it has beyond those of every run")


@dataclass
class Task:
    """One notebook to execute."""

    notebook: Path
    parameters: dict[str, Any]
    cfg: PrepareConfig
    differing: tuple[str, ...]  # parameters that tell the runs of the sweep apart
    target: Path  # the executed notebook, named by what the result is computed from
    needs: list[Task] = field(default_factory=list)  # without them it is not started
    after: list[Task] = field(default_factory=list)  # they train a student that it also wants: it waits, whatever becomes of them

    @property
    def label(self) -> str:
        """How lists name it."""
        return ", ".join([self.notebook.stem, *(f"{name} {self.parameters[name]}" for name in self.differing if name in self.parameters)])


def read_sweep(file: Path) -> list[Task]:
    """The runs that a sweep file asks for, each checked against its notebook's configuration, none twice.

    Raises
    ------
    SweepError, ConfigError
        All that is wrong in the file, and data that is not there.
    """
    content = _load(file)
    notebook, wrong = find_notebook(content.notebook), []
    tasks: dict[Path, Task] = {}
    points = [{**content.parameters, **point} for point in _points(content, file)]
    names = dict.fromkeys(name for point in points for name in point)
    differing = tuple(name for name in names if len({repr(point.get(name)) for point in points}) > 1)
    _data.cache_clear()
    for parameters in points:
        try:
            task = _task(notebook, parameters, configuration(notebook)(**parameters), differing)
            tasks.setdefault(task.target, task)
        except LesionKDError as error:
            wrong += str(error).splitlines()
    if wrong:
        raise ConfigError(f"{file}, checked for {notebook.stem}:\n" + "\n".join(f"  {line}" for line in dict.fromkeys(wrong)))
    return list(tasks.values())


def _load(file: Path) -> SweepFile:
    yaml = package("yaml")
    Loader: Any = type("Loader", (yaml.SafeLoader,), {})  # YAML 1.1 takes 1e-3 for text
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789"))
    try:
        return SweepFile(**(yaml.load(file.read_text(encoding="utf-8"), Loader) or {}))
    except OSError as error:
        raise SweepError(f"cannot read {file}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SweepError(f"{file} is no YAML: {' '.join(str(error).split())}") from None
    except TypeError:
        raise SweepError(f"{file}: wants {', '.join(SweepFile.model_fields)}, each with a colon after it (docs/sweeps.md)") from None
    except ValidationError as error:
        raise SweepError(f"{file}: {_plain(error, SweepFile)}") from None


def _points(content: SweepFile, file: Path) -> list[dict[str, Any]]:
    """What each run has beyond the parameters of all."""
    axes = {name: values if isinstance(values, list) else [values] for name, values in content.product.items()}
    if empty := [name for name, values in axes.items() if not values]:
        raise SweepError(f"{file}: product: {', '.join(empty)} has no value")
    points = [dict(zip(axes, values)) for values in itertools.product(*axes.values())] if axes else []
    if not points and not content.include:
        raise SweepError(f"{file} names no run: give lists of values under product, or runs under include")
    return points + content.include


def _task(notebook: Path, parameters: dict[str, Any], cfg: StageConfig, differing: tuple[str, ...]) -> Task:
    if not isinstance(cfg, PrepareConfig):
        raise SweepError(f"{notebook.stem} has no data set of its own, so there is nothing to sweep over; sweep the notebook of the runs that it starts from")
    elsewhere = [_data(name) for name in getattr(cfg, "test_dataset", ())]
    mark = hashlib.sha256(json.dumps([identity(cfg), *elsewhere]).encode()).hexdigest()[:8]
    return Task(notebook, parameters, cfg, differing, kept_notebook(notebook.stem, mark))


def identity(cfg: PrepareConfig) -> str:
    """What the result of `cfg` is computed from, its raw data and the versions of all stages included."""
    versions = {c.stage: c.version for c in type(cfg).__mro__ if issubclass(c, StageConfig) and "stage" in vars(c)}
    return hashlib.sha256(json.dumps([versions, _data(cfg.dataset), cfg.hashed()], sort_keys=True).encode()).hexdigest()


@lru_cache
def _data(dataset: str) -> str:
    return fingerprint(PrepareConfig(dataset=dataset))[0]


def plan(runs: list[Task]) -> list[Task]:
    """Put before the runs what several of them share, as tasks of their own, and order the rest.

    A teacher that several runs need is trained by notebook 03, arrays that several tasks need are
    prepared by notebook 01. Of runs with a student in common, one trains it and the others wait for
    that run. Runs of different graphs take turns, so that few wait while one fits theirs.
    """
    teachers = _shared([run for run in runs if isinstance(run.cfg, DistillConfig)], "03_teacher", TeacherConfig)
    rest = [run for run in runs if not run.needs and type(run.cfg) is not PrepareConfig]
    prepared = _shared([*teachers, *rest], "01_data_prep", PrepareConfig)
    seen: Counter[str] = Counter()
    rank: dict[Path, int] = {}
    for run in runs:
        key = identity(run.cfg.upstream(GraphConfig)) if isinstance(run.cfg, GraphConfig) else ""
        rank[run.target] = seen[key]
        seen[key] += 1
    ordered = sorted(runs, key=lambda run: rank[run.target])
    trains: dict[str, Task] = {}
    for run in ordered:
        first = [trains.setdefault(student, run) for student in _students(run.cfg)]
        run.after = [other for other in {task.target: task for task in first}.values() if other is not run]
    return [*prepared, *teachers, *ordered]


def _shared(tasks: list[Task], stem: str, stage: type[PrepareConfig]) -> list[Task]:
    """Tasks for what at least two of `tasks` stand on; each of those then needs its own."""
    made: dict[Path, tuple[Task, list[Task]]] = {}
    for task in tasks:
        parameters = {n: v for n, v in task.parameters.items() if n in stage.model_fields and n != "test_dataset"}
        shared = _task(find_notebook(stem), parameters, stage(**parameters), task.differing)
        made.setdefault(shared.target, (shared, []))[1].append(task)
    several = [(shared, users) for shared, users in made.values() if len(users) > 1]
    for shared, users in several:
        for user in users:
            user.needs.append(shared)
    return [shared for shared, _ in several]


def _students(cfg: StageConfig) -> list[str]:
    """Identities of the students that a run trains."""
    if isinstance(cfg, AblationConfig):
        cfgs = [cfg.arm(arm, seed) for arm in cfg.arms for seed in cfg.seeds]
    else:
        cfgs = [cfg] if isinstance(cfg, DistillConfig) else []
    return [identity(c.with_values(test_dataset=())) for c in cfgs]
