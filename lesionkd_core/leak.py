"""How much a split flatters that lets near-duplicates cross it: the same test cases, with and without them in training."""

from __future__ import annotations

import numpy as np
import pandas as pd

from . import store
from .config import DistillConfig
from .evaluation import score_masks
from .prepare import Prepared, SplitError, prepare_data
from .progress import Tell
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
    if near.sum() > (train & ~near).sum():
        raise SplitError("over half of the training cases share a group with a test case; there are not enough others to leave out for comparison")
    others = np.random.default_rng(seed).permutation(np.flatnonzero(train & ~near))[: near.sum()]
    left_out = {"leaking": others, "clean": np.flatnonzero(near)}
    return {name: cases.drop(index=cases.index[rows])[["id", "split"]] for name, rows in left_out.items()}


def measure_leak(cfg: DistillConfig, tell: Tell = print) -> pd.DataFrame:
    """Score the same test cases with and without near-duplicates of them in training.

    Returns
    -------
    DataFrame
        A row a method and test case: method ('student', trained alone, or 'memory', see `recall`), id, group,
        split_seed, seed, near (a case of its group was trained on), and Dice `leaking` and `clean`.
        The cases that are not near are the control: what differs there is the luck of the training.
    """
    cfg = cfg.with_values(terms=(), split="random")
    prepared = prepare_data(cfg, tell)
    test = prepared.cases.iloc[prepared.index("test")]
    trained = prepared.cases["group"].iloc[prepared.index("train")]
    dice: dict[str, dict[str, pd.Series]] = {"student": {}, "memory": {}}
    for name, split in leak_splits(prepared.cases, cfg.split_seed).items():
        path = prepared.path / f"split-{name}.csv"
        store.write_table(path, split)
        run = distill(cfg.with_values(split_file=str(path)), tell)
        dice["student"][name] = run.per_case.query("split == 'test'").set_index("id")["dice"]
        dice["memory"][name] = recall(prepared, split)
    about = test.set_index("id")[["group"]].assign(split_seed=cfg.split_seed, seed=cfg.seed, near=test["group"].isin(trained).astype(int).to_numpy())
    return pd.concat([about.assign(method=method, **scores) for method, scores in dice.items()]).reset_index()


def recall(prepared: Prepared, split: pd.DataFrame) -> pd.Series:
    """Dice of a memory without any understanding: every test case gets the mask of the training image that is most like it.

    Alike is a small distance of the images averaged down to 16 x 16 px. Dice by id.
    """
    place = prepared.cases["id"].map(split.set_index("id")["split"])
    train, test = (np.flatnonzero(place == name) for name in ("train", "test"))
    small = prepared.images.reshape(len(place), 16, prepared.images.shape[1] // 16, 16, -1, 3).mean((2, 4)).reshape(len(place), -1)
    nearest = [train[((small[train] - small[row]) ** 2).sum(1).argmin()] for row in test]
    scores = score_masks(prepared.masks[nearest] > 0, prepared.masks[test] > 0)
    return pd.Series(scores["dice"].to_numpy(), index=prepared.cases["id"].iloc[test])
