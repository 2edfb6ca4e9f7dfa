"""Which cases train, which choose, which are scored (DESIGN, Splits)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from ..config import LesionKDError, PrepareConfig

SPLITS = ("train", "val", "test")
UNITS = 10
"""Fewest units that a stratum of lesion size is made of; less could not be shared out."""


class SplitError(LesionKDError):
    """The cases cannot be split as asked."""


def split_cases(cases: pd.DataFrame, cfg: PrepareConfig) -> pd.Series:
    """Give every case its split.

    Parameters
    ----------
    cases : DataFrame
        Columns id, volume, group, official (the release's split or empty text), lesion_share, empty.
    cfg : PrepareConfig
        split, split_file, folds, fold, split_seed, val_fraction, test_fraction, normals.

    Returns
    -------
    Series of str
        train, val or test; empty text for a case that the split file does not name.

    Raises
    ------
    SplitError
        A split would be empty, or the file or release does not say enough.
    """
    if cfg.split_file:
        splits = _from_file(cases, cfg)
    elif cfg.split == "test":
        return pd.Series("test", index=cases.index)
    elif cfg.split == "official":
        splits = _official(cases, cfg)
    else:
        splits = _drawn(cases, cfg)
    missing = [name for name in SPLITS if name not in set(splits)]
    if missing and cfg.split_file:
        raise SplitError(f"{cfg.split_file}: gives no case of {cfg.dataset} to {', '.join(missing)}")
    if missing:
        units = cases["id" if cfg.split == "random" else "group"].nunique()
        raise SplitError(
            f"{cfg.dataset}: {units} groups of cases are too few to fill {', '.join(missing)}; "
            "near-duplicates, frames of one video and images of one patient count once"
            + ", and normals = 'test' sends every group with an empty case to test" * (cfg.normals == "test") + "."
        )
    return splits


def crossing(cases: pd.DataFrame) -> dict[str, int]:
    """How many cases of val and test share a group (video, patient, near-duplicate) with a training case."""
    seen = set(cases.loc[cases["split"] == "train", "group"])
    return {name: int(cases.loc[cases["split"] == name, "group"].isin(seen).sum()) for name in ("val", "test")}


def _drawn(cases: pd.DataFrame, cfg: PrepareConfig) -> pd.Series:
    """By group, or with split = 'random' by case: k folds, or a hold-out."""
    units = cases["id"] if cfg.split == "random" else cases["group"]
    rng = np.random.default_rng(cfg.split_seed)
    splits = pd.Series("test", index=cases.index)
    free = ~units.isin(units[cases["empty"]]) if cfg.normals == "test" else pd.Series(True, index=cases.index)
    if cfg.folds:
        folds = allot(units, cases["lesion_share"], {str(k): 1 / cfg.folds for k in range(cfg.folds)}, rng)
        free = folds != str(cfg.fold)
        val = cfg.val_fraction / (1 - 1 / cfg.folds)
        want = {"train": 1 - val, "val": val}
    else:
        want = {"train": 1 - cfg.test_fraction - cfg.val_fraction, "test": cfg.test_fraction, "val": cfg.val_fraction}
    splits[free] = allot(units[free], cases["lesion_share"][free], want, rng)
    return splits


def allot(units: pd.Series, lesion_share: pd.Series, want: dict[str, float], rng: np.random.Generator) -> pd.Series:
    """Whole units to the parts of `want` (name -> share), stratified by lesion size and emptiness.

    Units are drawn at random within each stratum (no lesion, or a tertile of the unit's mean lesion
    share; fewer strata where there are few units), those twice as large before the others, and go
    where they fill the smallest part of the wanted cases of the stratum.
    """
    table = lesion_share.groupby(units).agg(["size", "mean"])
    table["order"] = rng.permutation(len(table))
    lesions = table["mean"] > 0
    table["stratum"] = -1
    if lesions.any():
        table.loc[lesions, "stratum"] = pd.qcut(table.loc[lesions, "mean"].rank(method="first"), max(1, min(3, lesions.sum() // UNITS)), labels=False)
    table["octave"] = np.log2(table["size"]).astype(int)
    placed, total = {}, dict.fromkeys(want, 0)
    for _, stratum in table.groupby("stratum"):
        have = dict.fromkeys(want, 0)
        for unit, row in stratum.sort_values(["octave", "order"], ascending=[False, True]).iterrows():
            part = min(want, key=lambda name: ((have[name] + row["size"]) / want[name], total[name] / want[name]))
            have[part] += row["size"]
            total[part] += row["size"]
            placed[unit] = part
    return units.map(placed)


def _official(cases: pd.DataFrame, cfg: PrepareConfig) -> pd.Series:
    """As the release says; validation cases are drawn by group from its training part where it names none."""
    splits = cases["official"].copy()
    if not {"train", "test"} <= set(splits):
        counts = ", ".join(f"{n} {name or 'not said'}" for name, n in splits.value_counts().items())
        raise SplitError(
            f"{cfg.dataset}: split = 'official' wants training and test cases; the files here say: {counts}.\n"
            "Add the missing part of the release, or the column split of the manifest; or use split = 'groups'."
        )
    if (unsaid := splits == "").any():
        raise SplitError(f"{cfg.dataset}: {unsaid.sum()} cases have no official split, {cases['id'][unsaid].iloc[0]!r} first; use split = 'groups'.")
    if "val" not in set(splits):
        train = splits == "train"
        want = {"train": 1 - cfg.val_fraction, "val": cfg.val_fraction}
        splits[train] = allot(cases["group"][train], cases["lesion_share"][train], want, np.random.default_rng(cfg.split_seed))
    if cfg.normals == "test":
        splits[cases["group"].isin(cases["group"][cases["empty"]])] = "test"
    return splits


def _from_file(cases: pd.DataFrame, cfg: PrepareConfig) -> pd.Series:
    """As a table with the columns id and split says, written by this suite or anybody else."""
    path = Path(cfg.split_file).expanduser()
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
    except (OSError, ValueError) as error:  # pandas' parser errors are ValueErrors
        raise SplitError(f"{path} cannot be read as a CSV table: {error}") from None
    if absent := {"id", "split"} - set(table):
        raise SplitError(f"{path}: no column {', '.join(sorted(absent))}; wants id and split")
    if wrong := set(table["split"]) - set(SPLITS):
        raise SplitError(f"{path}: split is {', '.join(map(repr, sorted(wrong)))}; wants train, val or test")
    if table["id"].duplicated().any():
        raise SplitError(f"{path}: names {table['id'][table['id'].duplicated()].iloc[0]!r} twice")
    said = table.set_index("id")["split"]
    splits = cases["id"].map(said).fillna(cases["volume"].map(said)).fillna("")
    if not splits.any():
        raise SplitError(f"{path}: none of its {len(table)} ids is a case of {cfg.dataset}, whose first is {cases['id'].iloc[0]!r}")
    return splits
