"""Groups of cases that must stay together, and the split into train, val and test."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd

from ..config import LesionKDError, PrepareConfig
from .images import before_number, stem_of
from .pixels import hash_thumbnails

SPLITS = ("train", "val", "test")
SAME, SAME_SCENE = 0.48, 0.5
"""Correlation of details of two copies, and of two frames of one scene on a coarser scale."""
FEW = 5
"""Up to this number of groups, val and test get one each."""
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


def detail_correlation(
    thumbnails: np.ndarray, i: np.ndarray, j: np.ndarray, scale: float = 1, reach: int = 4
) -> np.ndarray:
    """Correlation of what two images show in detail, -1..1, for each pair of rows i, j.

    The low frequencies, in which a perceptual hash finds all images of one kind alike, are removed,
    local contrast is equalized, and only the common field of view counts. The largest value over
    shifts is taken.

    Parameters
    ----------
    thumbnails : (N, 64, 64) uint8
    i, j : (M,) int
    scale : float
        Of the details; larger ones tolerate movement between frames of a video.
    reach : int
        Largest shift, thumbnail pixels.

    Returns
    -------
    (M,) float
        0 if less than half of the larger field of view is common.
    """
    from scipy.fft import irfft2, rfft2

    size = 64 + reach + (-reach) % 8
    shifts = np.r_[: reach + 1, size - reach : size]
    found = [np.empty(0)]
    for start in range(0, len(i), 512):  # in blocks, so that memory is bounded
        block = slice(start, start + 512)
        rows, where = np.unique(np.concatenate([i[block], j[block]]), return_inverse=True)
        first, second = np.split(where.ravel(), 2)
        seen, detail = _details(thumbnails[rows], scale)
        area = seen.sum((1, 2))
        waves = [rfft2(x, (size, size)) for x in (detail, detail**2, seen)]

        product, energy, energy2, common = (
            irfft2(waves[a][first] * waves[b][second].conj(), (size, size))[:, shifts][:, :, shifts]
            for a, b in ((0, 0), (1, 2), (2, 1), (2, 2))
        )
        correlation = product / np.sqrt(np.maximum(energy * energy2, 1e-3))
        least = np.maximum(area[first], area[second]) / 2
        correlation[common < least[:, None, None]] = 0
        found.append(correlation.max((1, 2)))
    return np.concatenate(found)


def _details(thumbnails: np.ndarray, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """The fields of view without their dark surroundings, and the details in them; float32."""
    from scipy.ndimage import binary_erosion, binary_fill_holes, gaussian_filter

    pixels, seen = thumbnails.astype(np.float32), np.empty(thumbnails.shape, np.float32)
    bright = np.percentile(pixels, 95, axis=(1, 2))
    for field, plane, limit in zip(seen, pixels, np.minimum(bright / 4, 32)):
        inside = binary_erosion(
            binary_fill_holes(plane > limit), np.ones((3, 3)), 2, border_value=1
        )
        field[:] = inside if inside.mean() > 0.1 else 1

    def smooth(x: np.ndarray, sigma: float) -> np.ndarray:
        smoothed: np.ndarray = gaussian_filter(x, (0, sigma, sigma), mode="constant")
        return smoothed

    pixels = gaussian_filter(pixels, (0, 0.7 * scale, 0.7 * scale))
    fine, wide = (np.maximum(smooth(seen, sigma * scale), 1e-6) for sigma in (2, 4))
    detail = (pixels - smooth(pixels * seen, 2 * scale) / fine) * seen
    contrast = np.sqrt(np.maximum(smooth(detail**2, 4 * scale) / wide, 0))
    return seen, detail / (contrast + 1)


def compare_pairs(thumbnails: np.ndarray, bits: int) -> pd.DataFrame:
    """Pairs of images whose perceptual hashes are near, and how alike their details are.

    Returns
    -------
    DataFrame
        first, second (rows), bits (distance of the hashes), correlation (of the details), same
        (taken for one picture).
    """
    pairs = np.concatenate([*near_pairs(hash_thumbnails(thumbnails), bits)])
    table = pd.DataFrame(pairs, columns=["first", "second", "bits"])
    table["correlation"] = detail_correlation(thumbnails, pairs[:, 0], pairs[:, 1])
    return table.assign(same=table["correlation"] >= SAME)


def copies(first: np.ndarray, second: np.ndarray, bits: int) -> np.ndarray:
    """Rows of the thumbnails `second` that are near-duplicates of one of `first`."""
    pairs = compare_pairs(np.concatenate([first, second]), bits)
    across = (pairs["first"] < len(first)) & (pairs["second"] >= len(first)) & pairs["same"]
    rows: np.ndarray = np.unique(pairs.loc[across, "second"]) - len(first)
    return rows


def group_cases(
    groups: pd.Series, thumbnails: np.ndarray | None, bits: int, sequence: bool = False
) -> list[str]:
    """Unite the groups that are known and images that show the same.

    Two images whose hashes are near share a group if their details agree. In a sequence of frames,
    images of the same scene also do: at most three frames apart and alike on a coarser scale.

    Parameters
    ----------
    groups : (N,) of str
        Video or patient; empty where it is not known.
    thumbnails : (N, 64, 64) uint8, optional
        From `pixels.thumbnail`; black for a slice of a volume.
    bits : int
        Largest distance of near hashes.

    Returns
    -------
    list of str
        'g0000' and so on, for each case.
    """
    codes = pd.factorize(groups.where(groups != ""))[0]  # -1: not known
    first = pd.Series(range(len(groups))).groupby(codes).transform("first").to_numpy()
    component = np.where(codes >= 0, first, np.arange(len(groups)))
    if thumbnails is not None:
        for block in near_pairs(hash_thumbnails(thumbnails), bits):
            i, j = block[component[block[:, 0]] != component[block[:, 1]], :2].T
            same = detail_correlation(thumbnails, i, j) >= SAME
            component = _united(component, i[same], j[same])
    for step in (1, 2, 3):
        if thumbnails is None or not sequence:
            break
        i = np.arange(len(groups) - step)
        alike = detail_correlation(thumbnails, i, i + step, scale=3, reach=8) >= SAME_SCENE
        component = _united(component, i[alike], i[alike] + step)
    return [f"g{c:04d}" for c in pd.factorize(component)[0]]


def _united(component: np.ndarray, i: np.ndarray, j: np.ndarray) -> np.ndarray:
    """Components (N,) after joining rows i and j, pair by pair."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    n = len(component)
    links = coo_matrix((np.ones(len(i)), (component[i], component[j])), shape=(n, n))
    joined: np.ndarray = connected_components(links, directed=False)[1][component]
    return joined


def series_across(cases: pd.DataFrame) -> list[str]:
    """First files of numbered series of images, such as patient07_048, in more than one split.

    Parameters
    ----------
    cases : DataFrame
        Columns file, split. Cases whose group is known are left out.

    Returns
    -------
    list of str
        Empty if the numbers do not look like slices of patients or frames of videos: a whole data
        set is often numbered in one or a few series.
    """
    stems = cases["file"].map(lambda name: stem_of(Path(name)))
    prefix = stems.map(before_number)
    table = cases.assign(file=stems, prefix=prefix)[prefix != stems].groupby("prefix")
    table = table.agg(file=("file", "first"), splits=("split", "nunique"), size=("file", "size"))
    series = table[table["size"] > 1]
    numbered = series.index.str.contains("[0-9]")
    if len(series) < 2 or not (numbered.mean() > 0.5 or len(series) > 5):
        return []
    return list(series.loc[series["splits"] > 1, "file"])


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
        units = cases["id" if cfg.split == "random" else "group"].value_counts()
        normals = "; normals = 'test' moves every group with an empty mask to the test split"
        raise SplitError(
            f"{cfg.dataset}: {len(cases)} cases in {len(units)} groups, the largest with "
            f"{units.max()}, leave no group for {missing}. Near-duplicates, frames of one video "
            f"and images of one patient form one group{normals * (cfg.normals == 'test')}.\n"
            f"At least 3 groups are needed. val_fraction = {cfg.val_fraction} and test_fraction = "
            f"{cfg.test_fraction} are the sizes asked for. Add patients, or name them with "
            "group_by if these groups are wrong."
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
    if "train" in parts and len(parts) <= len(table) <= FEW:
        drawn = table.drop(table["size"].idxmax()).sort_values("order").index
        held_out = dict(zip(drawn, (part for part in parts if part != "train")))
        return units.map(lambda unit: held_out.get(unit, "train"))
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
    for part in parts:  # a small fraction of few units
        counts = Counter(placed.values())
        fullest = max(parts, key=lambda name: counts[name])
        if not counts[part] and counts[fullest] > 1:
            placed[min((u for u in placed if placed[u] == fullest), key=table["size"].get)] = part
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
