"""Scores of a trained network on all of another data set."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from . import store
from .config import TeacherConfig
from .evaluation import score_network, summarize
from .inference import load_network, read_config
from .prepare import Prepared, near_pairs, prepare_data
from .progress import Tell


class External(store.Result):
    """`per_case` and `summary` of one network on one other data set."""


def score_external(run: store.Result, cfg: TeacherConfig, tell: Tell = print) -> dict[str, External]:
    """Find or make the scores of a finished run on every data set of `cfg.test_dataset`, by name.

    The other images are prepared as the run's own were. Images that are near-duplicates of a training
    image are scored and counted (`near_training` in the summary), with a warning.
    """
    if not cfg.test_dataset:
        return {}
    cfg = read_config(run.path).with_values(test_dataset=cfg.test_dataset)  # as the run was made, whatever `cfg` says otherwise
    own, found = prepare_data(cfg, tell), {}
    for dataset in cfg.test_dataset:
        other = cfg.external(dataset)
        prepared = prepare_data(other, tell)
        path = store.folder(other, f"{run.digest}|{prepared.digest}")
        with store.lock(path, tell):
            if not store.is_done(path):
                store.begin(path, other, f"{run.digest}|{prepared.digest}")
                _score(path, run.path, own, prepared, cfg.duplicate_bits, tell)
                store.finish(path)
        found[other.dataset_name] = External(path)
    return found


def _score(path: Path, run: Path, own: Prepared, prepared: Prepared, bits: int, tell: Tell) -> None:
    per_case = score_network(load_network(run).network, prepared, splits=("test",))
    near = near_training(own, prepared, bits)
    if near:
        tell(f"warning: {near} of {len(per_case)} cases of {path.name} are near-duplicates of a training case of {own.path.name}")
    store.write_table(path / "per_case.csv", per_case)
    store.write_json(path / "summary.json", {"test": summarize(per_case), "near_training": near, "run": store.short(run)})


def near_training(own: Prepared, other: Prepared, bits: int) -> int:
    """How many images of another data set are near-duplicates of a training image."""
    train = own.hashes[own.index("train")]
    pairs = np.concatenate(list(near_pairs(np.concatenate([train, other.hashes]), bits)))
    return len(set(pairs[(pairs[:, 0] < len(train)) & (pairs[:, 1] >= len(train)), 1]))


def with_test_dataset(run: store.Result, cfg: TeacherConfig, tell: Tell = print) -> pd.DataFrame:
    """Test scores of a run on its own test cases and on every other data set: column `test_dataset`."""
    own = run.per_case[run.per_case["split"] == "test"].assign(test_dataset=cfg.dataset_name)
    others = [scored.per_case.assign(test_dataset=name) for name, scored in score_external(run, cfg, tell).items()]
    return pd.concat([own, *others], ignore_index=True)
