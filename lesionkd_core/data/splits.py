"""Groups of cases that must stay together, and the split into train, val and test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd

from ..config import LesionKDError, PrepareConfig

SPLITS = ("train", "val", "test")
UNITS = 10
"""Smallest number of groups in a stratum of lesion size."""


class SplitError(LesionKDError):
    """The cases cannot be split as asked."""


# Groups -------------------------------------------------------------------------------------------


def near_pairs(hashes: np.ndarray, bits: int) -> Iterator[np.ndarray]:
    """Pairs of images whose hashes (N, 63) differ in at most `bits` bits.

    Yields blocks (M, 3) of row i, row j > i and their distance in bits. A hash without any bit (a
    flat image, a slice of a volume) matches nothing.
    """
    yield np.empty((0, 3), int)
    rows = np.flatnonzero(hashes.any(1))
    signs = hashes[rows].astype(np.float32)
    for start in range(0, len(signs), 256):  # in blocks, so that memory grows with N only
        block = signs[start : start + 256]
        apart = block @ (1 - signs.T) + (1 - block) @ signs.T
        i, j = np.nonzero(apart <= bits)
        later = j > i + start
        yield np.stack([rows[i + start], rows[j], apart[i, j]], 1).astype(int)[later]


def group_cases(groups: pd.Series, hashes: np.ndarray | None, bits: int) -> list[str]:
    """Unite the release's groups and near-duplicate images.

    Parameters
    ----------
    groups : (N,) of str
        Video or patient; empty where the release does not say.
    hashes : (N, 63) bool, optional
        From `perceptual_hash`.

    Returns
    -------
    list of str
        'g0000' and so on, for each case.
    """
    codes = pd.factorize(groups.where(groups != ""))[0]  # -1: not said
    first = pd.Series(range(len(groups))).groupby(codes).transform("first").to_numpy()
    component = np.where(codes >= 0, first, np.arange(len(groups)))
    for block in near_pairs(hashes, bits) if hashes is not None else ():
        component = _united(component, block[:, 0], block[:, 1])
    return [f"g{c:04d}" for c in pd.factorize(component)[0]]


def _united(component: np.ndarray, i: np.ndarray, j: np.ndarray) -> np.ndarray:
    """Components (N,) after joining rows i and j, pair by pair."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    n = len(component)
    links = coo_matrix((np.ones(len(i)), (component[i], component[j])), shape=(n, n))
    joined: np.ndarray = connected_components(links, directed=False)[1][component]
    return joined


def crossing(cases: pd.DataFrame) -> dict[str, int]:
    """Number of val and test cases that share a group with a training case."""
    train = set(cases.loc[cases["split"] == "train", "group"])
    return {
        name: int(cases.loc[cases["split"] == name, "group"].isin(train).sum())
        for name in ("val", "test")
    }


# Splits -------------------------------------------------------------------------------------------


def split_cases(cases: pd.DataFrame, cfg: PrepareConfig) -> pd.Series:
    """Assign every case to a split.

    Parameters
    ----------
    cases : DataFrame
        Columns id, volume, group, official (the release's split or empty), lesion_share, empty.
    cfg : PrepareConfig

    Returns
    -------
    Series of str
        train, val or test; empty for a case that the split file does not name.

    Raises
    ------
    SplitError
        A split would be empty, or the file or the release does not say enough.
    """
    if cfg.split_file:
        splits = _from_file(cases, cfg)
    elif cfg.split == "test":
        return pd.Series("test", index=cases.index)
    elif cfg.split == "official":
        splits = _official(cases, cfg)
    else:
        splits = _drawn(cases, cfg)
    missing = ", ".join(name for name in SPLITS if name not in set(splits))
    if missing and cfg.split_file:
        raise SplitError(f"{cfg.split_file}: assigns no case of {cfg.dataset} to {missing}")
    if missing:
        units = cases["id" if cfg.split == "random" else "group"].nunique()
        normals = "; normals = 'test' moves every group with an empty mask to the test split"
        raise SplitError(
            f"{cfg.dataset}: {units} groups are too few to fill {missing}; near-duplicates, frames "
            "of one video and images of one patient form one group"
            + normals
            * (cfg.normals == "test")
        )
    return splits


def _drawn(cases: pd.DataFrame, cfg: PrepareConfig) -> pd.Series:
    """k folds or a hold-out split, by group, or with split = 'random' by case."""
    units = cases["id"] if cfg.split == "random" else cases["group"]
    rng = np.random.default_rng(cfg.split_seed)
    splits = pd.Series("test", index=cases.index)
    free = pd.Series(True, index=cases.index)
    if cfg.normals == "test":
        free = ~units.isin(units[cases["empty"]])
    if cfg.folds:
        equal = {str(k): 1 / cfg.folds for k in range(cfg.folds)}
        free = allot(units, cases["lesion_share"], equal, rng) != str(cfg.fold)
        val = cfg.val_fraction / (1 - 1 / cfg.folds)
        parts = {"train": 1 - val, "val": val}
    else:
        held_out = {"test": cfg.test_fraction, "val": cfg.val_fraction}
        parts = {"train": 1 - sum(held_out.values())} | held_out
    splits[free] = allot(units[free], cases["lesion_share"][free], parts, rng)
    return splits


def allot(
    units: pd.Series, lesion_share: pd.Series, parts: dict[str, float], rng: np.random.Generator
) -> pd.Series:
    """Assign whole units to parts (name -> fraction), stratified by lesion size.

    Units are shuffled within each stratum (no lesion, or a third of the units by mean lesion
    share), larger ones first, and go to the part that is least filled.
    """
    table = lesion_share.groupby(units).agg(["size", "mean"])
    table["order"] = rng.permutation(len(table))
    lesions = table["mean"] > 0
    table["stratum"] = -1
    if lesions.any():
        ranks = table.loc[lesions, "mean"].rank(method="first")
        thirds = max(1, min(3, lesions.sum() // UNITS))
        table.loc[lesions, "stratum"] = pd.qcut(ranks, thirds, labels=False)
    table["octave"] = np.log2(table["size"]).astype(int)
    placed, total = {}, dict.fromkeys(parts, 0)
    for _, stratum in table.groupby("stratum"):
        filled = dict.fromkeys(parts, 0)
        for unit, row in stratum.sort_values(
            ["octave", "order"], ascending=[False, True]
        ).iterrows():
            size = row["size"]
            part = min(parts, key=lambda n: ((filled[n] + size) / parts[n], total[n] / parts[n]))
            filled[part] += row["size"]
            total[part] += row["size"]
            placed[unit] = part
    return units.map(placed)


def _official(cases: pd.DataFrame, cfg: PrepareConfig) -> pd.Series:
    """The release's own split; without a validation part, one is drawn from its training part."""
    splits = cases["official"].copy()
    if not {"train", "test"} <= set(splits):
        counts = ", ".join(f"{n} {name or 'none'}" for name, n in splits.value_counts().items())
        raise SplitError(
            f"{cfg.dataset}: split = 'official' needs training and test cases; found: {counts}.\n"
            "Add the missing part of the release or the column split of the manifest, or use "
            "split = 'groups'."
        )
    if (unsaid := splits == "").any():
        raise SplitError(
            f"{cfg.dataset}: {unsaid.sum()} cases have no official split, the first is "
            f"{cases['id'][unsaid].iloc[0]!r}; use split = 'groups'."
        )
    if "val" not in set(splits):
        train = splits == "train"
        parts = {"train": 1 - cfg.val_fraction, "val": cfg.val_fraction}
        rng = np.random.default_rng(cfg.split_seed)
        splits[train] = allot(cases["group"][train], cases["lesion_share"][train], parts, rng)
    if cfg.normals == "test":
        splits[cases["group"].isin(cases["group"][cases["empty"]])] = "test"
    return splits


def _from_file(cases: pd.DataFrame, cfg: PrepareConfig) -> pd.Series:
    """A table with the columns id and split."""
    path = Path(cfg.split_file).expanduser()
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
    except (OSError, ValueError) as error:  # pandas' parser errors are ValueErrors
        raise SplitError(f"{path} cannot be read as a CSV table: {error}") from None
    if absent := {"id", "split"} - set(table):
        raise SplitError(f"{path}: no column {', '.join(sorted(absent))}; it needs id and split")
    if wrong := set(table["split"]) - set(SPLITS):
        found = ", ".join(map(repr, sorted(wrong)))
        raise SplitError(f"{path}: split is {found}; expected train, val or test")
    if table["id"].duplicated().any():
        twice = table["id"][table["id"].duplicated()].iloc[0]
        raise SplitError(f"{path}: names {twice!r} twice")
    said = table.set_index("id")["split"]
    splits = cases["id"].map(said).fillna(cases["volume"].map(said)).fillna("")
    if not splits.any():
        raise SplitError(
            f"{path}: none of its {len(table)} ids is a case of {cfg.dataset}, whose first is "
            f"{cases['id'].iloc[0]!r}"
        )
    return splits
