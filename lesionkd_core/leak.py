"""How much a split flatters that lets near-duplicates cross it: the same test cases, with and without them in training."""

from __future__ import annotations

import numpy as np
import pandas as pd

from . import store
from .config import DistillConfig
from .prepare import prepare_data
from .stages import distill


def leak_splits(cases: pd.DataFrame, seed: int) -> dict[str, pd.DataFrame]:
    """Two splits of a leaking one, equal in validation cases, test cases and number of training cases.

    Parameters
    ----------
    cases : DataFrame
        Columns id, group, split of a split by case.

    Returns
    -------
    {'leaking': DataFrame, 'clean': DataFrame}
        Columns id, split. `clean` trains on no case that shares a group with a test case; `leaking`
        lacks as many other training cases, drawn at random.
    """
    train = (cases["split"] == "train").to_numpy()
    near = train & cases["group"].isin(cases.loc[cases["split"] == "test", "group"]).to_numpy()
    others = np.random.default_rng(seed).permutation(np.flatnonzero(train & ~near))[: near.sum()]
    left_out = {"leaking": others, "clean": np.flatnonzero(near)}
    return {name: cases.drop(index=cases.index[rows])[["id", "split"]] for name, rows in left_out.items()}


def measure_leak(cfg: DistillConfig, tell=print) -> pd.DataFrame:
    """Train the student alone on both splits and score the same test cases.

    Returns
    -------
    DataFrame
        One row a test case: id, group, split_seed, near (a case of its group was trained on), and Dice
        `leaking` and `clean`. The cases that are not near are the control: there both should agree.
    """
    cfg = cfg.with_values(terms=(), split="random")
    prepared = prepare_data(cfg, tell)
    scores = {}
    for name, split in leak_splits(prepared.cases, cfg.split_seed).items():
        path = prepared.path / f"split-{name}.csv"
        store.write_table(path, split)
        run = distill(cfg.with_values(split_file=str(path)), tell)
        scores[name] = run.per_case.query("split == 'test'").set_index("id")["dice"]
    cases = prepared.cases.set_index("id").loc[scores["clean"].index]
    trained = set(prepared.cases.loc[prepared.cases["split"] == "train", "group"])
    table = cases[["group"]].assign(split_seed=cfg.split_seed, near=cases["group"].isin(trained).astype(int), **scores)
    return table.reset_index()
