"""Groups of cases that must stay together, and the split into train, val and test."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from ..config import LesionKDError, PrepareConfig
from .pixels import hash_thumbnails

SPLITS = ("train", "val", "test")
NEAR, NEAR_TURNED = 12, 4
"""Largest distance in bits between the hashes of images that are compared in detail."""
SAME, SAME_SCENE = 0.48, 0.5
"""Correlation of details of two copies, and of two frames of one scene on a coarser scale."""
COMMON = 3
"""How much more images agree in a common place (a rim, a ruler) than where they agree least."""
FEW_PIXELS = 50
"""Pixels from which two images are not yet known to be copies, since chance may be enough."""
BLOCK = 512
"""Images or pairs that are compared at a time."""
FEW = 5
"""Up to this number of groups, val and test get one each."""
UNITS = 10
"""Smallest number of groups in a stratum of lesion size."""


class SplitError(LesionKDError):
    """The cases cannot be split as asked."""


# Near-duplicates ----------------------------------------------------------------------------------


def turned(pixels: np.ndarray, turn: int) -> np.ndarray:
    """(N, H, W) pixels by `turn` quarter turns; from 4 on also mirrored."""
    quarter = np.rot90(pixels, turn % 4, axes=(1, 2))
    return quarter[:, :, ::-1] if turn >= 4 else quarter


def near_pairs(hashes: np.ndarray, others: np.ndarray, bits: int, across: int = 0) -> np.ndarray:
    """Pairs of images whose hashes (N, 63) differ in at most `bits` bits.

    A hash without any bit (a flat image, a slice of a volume) matches nothing.

    Parameters
    ----------
    hashes, others : (N, 63) bool
        Of the same images; `others` may be those of their turned copies.
    across : int
        If it is not 0, one image of a pair is before this row, the other is not.

    Returns
    -------
    (M, 3) int
        Row i of `hashes`, row j > i of `others`, and their distance in bits.
    """
    rows, found = np.flatnonzero(hashes.any(1)), [np.empty((0, 3), int)]
    first, second = hashes[rows].astype(np.float32), others[rows].astype(np.float32)
    firsts = np.searchsorted(rows, across) if across else len(rows)
    for start in range(0, firsts, 256):  # in blocks, so that memory grows with N only
        block = first[start : min(start + 256, firsts)]
        apart = block @ (1 - second.T) + (1 - block) @ second.T
        i, j = np.nonzero(apart <= bits)
        later = (j > i + start) & (rows[j] >= across)
        found.append(np.stack([rows[i + start], rows[j], apart[i, j]], 1).astype(int)[later])
    return np.concatenate(found)


def common_places(thumbnails: np.ndarray) -> np.ndarray:
    """Where the images of a data set show the same, though they are of different patients.

    A rim, a vignette, a ruler, text, or what a standard view has in its place. At every pixel the
    energy of the mean of the details is compared with their mean energy. The ratio times the number
    of images is 1 where they have nothing in common. A pixel is a common place if the ratio is
    COMMON times that of the least common tenth of the pixels.

    (N, 64, 64) uint8 -> (64, 64) bool.
    """
    from scipy.ndimage import gaussian_filter

    total, energy = np.zeros(thumbnails.shape[1:]), np.zeros(thumbnails.shape[1:])
    for start in range(0, len(thumbnails), BLOCK):
        _, detail = _details(thumbnails[start : start + BLOCK])
        total += detail.sum(0)
        energy += (detail**2).sum(0)
    agreement = gaussian_filter(total**2, 2) / np.maximum(gaussian_filter(energy, 2), 1e-6)
    least = max(1.0, float(np.percentile(agreement, 10)))
    common: np.ndarray = agreement > COMMON * least
    return common


def detail_correlation(
    first: np.ndarray,
    second: np.ndarray,
    i: np.ndarray,
    j: np.ndarray,
    scale: float = 1,
    reach: int = 4,
) -> tuple[np.ndarray, np.ndarray]:
    """Correlation of what two images show in detail, -1..1, and the shift where it is largest.

    The low frequencies, in which a perceptual hash finds all images of one kind alike, are removed,
    local contrast is equalized, and only the common field of view counts.

    Parameters
    ----------
    first, second : (N, 64, 64) uint8
        Thumbnails.
    i, j : (M,) int
        Pairs: row i of `first`, row j of `second`.
    scale : float
        Of the details; larger ones tolerate movement between frames of a video.
    reach : int
        Largest shift, thumbnail pixels.

    Returns
    -------
    correlation : (M,) float
        0 if less than half of the larger field of view is common.
    shift : (M, 2) int
        Pixel (y, x) of the first image corresponds to (y, x) - shift of the second.
    """
    from scipy.fft import irfft2, rfft2

    size = 64 + reach + (-reach) % 8
    steps = np.r_[: reach + 1, -reach:0]  # irfft2 has negative shifts at its end
    found, places = [np.empty(0)], [np.empty(0, int)]
    for start in range(0, len(i), BLOCK):  # in blocks, so that memory is bounded
        spectra, areas = [], []
        for thumbnails, rows in ((first, i), (second, j)):
            unique, where = np.unique(rows[start : start + BLOCK], return_inverse=True)
            seen, detail = _details(thumbnails[unique], scale)
            areas.append(seen.sum((1, 2))[where])
            spectra.append([rfft2(x, (size, size))[where] for x in (detail, detail**2, seen)])
        (detail1, squares1, seen1), (detail2, squares2, seen2) = spectra
        both = ((detail1, detail2), (squares1, seen2), (seen1, squares2), (seen1, seen2))
        product, energy1, energy2, common = (  # at every shift, sums over what both images show
            irfft2(one * two.conj(), (size, size))[:, steps][:, :, steps] for one, two in both
        )
        correlation = product / np.sqrt(np.maximum(energy1 * energy2, 1e-3))
        least = np.maximum(*areas) / 2
        correlation[common < least[:, None, None]] = 0
        flat = correlation.reshape(len(correlation), -1)
        found.append(flat.max(1))
        places.append(flat.argmax(1))
    shift = np.stack(np.divmod(np.concatenate(places), len(steps)), 1)
    return np.concatenate(found), steps[shift]


def content_correlation(
    pair: np.ndarray, shift: tuple[int, int], hidden: tuple[np.ndarray, np.ndarray]
) -> float:
    """The same correlation of one pair at one shift, without the common places.

    Parameters
    ----------
    pair : (2, 64, 64) uint8
    shift : (y, x)
        As `detail_correlation` returns it.
    hidden : two (64, 64) bool
        Common places in the first and in the second image.

    Returns
    -------
    float
        It approaches 0 if few pixels remain: FEW_PIXELS of mean contrast are added to the energy.
    """
    (y, x), (seen, details) = shift, _details(pair)
    window = np.s_[max(y, 0) : 64 + min(y, 0), max(x, 0) : 64 + min(x, 0)]
    moved = np.s_[max(-y, 0) : 64 + min(-y, 0), max(-x, 0) : 64 + min(-x, 0)]
    shown = ((seen[0] > 0) & ~hidden[0])[window] & ((seen[1] > 0) & ~hidden[1])[moved]
    first, second = details[0][window][shown], details[1][moved][shown]
    energy = np.sqrt((first**2).sum() * (second**2).sum())
    return float((first * second).sum() / (energy + FEW_PIXELS))


def _details(thumbnails: np.ndarray, scale: float = 1) -> tuple[np.ndarray, np.ndarray]:
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


def compare_pairs(
    thumbnails: np.ndarray, names: np.ndarray | None = None, across: int = 0
) -> pd.DataFrame:
    """Pairs of images whose perceptual hashes are near, and how alike their details are.

    Mirrored and turned copies are searched too.

    Parameters
    ----------
    thumbnails : (N, 64, 64) uint8
    names : (N,) int, optional
        Pairs of one group (0 or more; -1: not known) are left out.
    across : int
        If it is not 0, only pairs of an image before this row with one from it on.

    Returns
    -------
    DataFrame
        first, second (rows), turn (of the second, see `turned`), bits (distance of the hashes),
        correlation (of the details), content (of the details that other images do not have in the
        same place; NaN if the correlation is below SAME), same (taken for one picture).
    """
    hashes, common = hash_thumbnails(thumbnails), common_places(thumbnails)
    tables = []
    for turn in range(8):
        others = turned(thumbnails, turn)
        limit = NEAR if turn == 0 else NEAR_TURNED
        i, j, bits = near_pairs(hashes, hash_thumbnails(others), limit, across).T
        if names is not None:
            apart = (names[i] != names[j]) | (names[i] < 0)
            i, j, bits = i[apart], j[apart], bits[apart]
        correlation, shift = detail_correlation(thumbnails, others, i, j)
        content, hidden = np.full(len(i), np.nan), (common, turned(common[None], turn)[0])
        for k in np.flatnonzero(correlation >= SAME):
            pair = np.stack([thumbnails[i[k]], others[j[k]]])
            content[k] = content_correlation(pair, shift[k], hidden)
        found = {"first": i, "second": j, "turn": turn, "bits": bits, "correlation": correlation}
        tables.append(pd.DataFrame(found | {"content": content, "same": content >= SAME}))
    return pd.concat(tables, ignore_index=True)


def copies(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Rows of the thumbnails `second` that are near-duplicates of one of `first`."""
    pairs = compare_pairs(np.concatenate([first, second]), across=len(first))
    rows: np.ndarray = np.unique(pairs.loc[pairs["same"], "second"]) - len(first)
    return rows


# Groups -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Groups:
    """Groups of N cases.

    Parameters
    ----------
    codes : list of str
        'g0000' and so on, for each case.
    joined : (N,) bool
        Whether the case shares its group with an image that shows the same, not only by its name.
    apart : list of (int, int)
        Rows that show the same and stay apart, since their groups have names.
    """

    codes: list[str]
    joined: np.ndarray
    apart: list[tuple[int, int]]


def group_cases(
    names: pd.Series,
    thumbnails: np.ndarray | None,
    join_copies: bool = True,
    sequence: bool = False,
) -> Groups:
    """Groups by name, and of images that show the same if at most one of them has a name.

    In a sequence of frames, images of the same scene share a group too: at most three frames apart
    and alike on a coarser scale.

    Parameters
    ----------
    names : (N,) of str
        Video or patient; empty where it is not known.
    thumbnails : (N, 64, 64) uint8, optional
        From `pixels.thumbnail`; black for a slice of a volume.
    """
    named = pd.factorize(names.where(names != ""))[0]  # -1: not known
    pairs = [np.empty((0, 2), int)]
    if thumbnails is not None and join_copies:
        same = compare_pairs(thumbnails, named).query("same")
        same = same.sort_values(["content", "first", "second"], ascending=[False, True, True])
        pairs.append(same[["first", "second"]].to_numpy())
    for step in (1, 2, 3):
        if thumbnails is not None and sequence:
            i = np.arange(len(names) - step)
            alike, _ = detail_correlation(thumbnails, thumbnails, i, i + step, scale=3, reach=8)
            i = i[alike >= SAME_SCENE]
            pairs.append(np.stack([i, i + step], 1))
    return _united(named, np.concatenate(pairs))


def _united(named: np.ndarray, pairs: np.ndarray) -> Groups:
    """Join the groups of each pair of rows in turn, unless both have names."""
    first_of: dict[int, int] = {}
    parent = [
        first_of.setdefault(name, row) if name >= 0 else row for row, name in enumerate(named)
    ]
    name_of, joined, apart = named.copy(), np.zeros(len(named), bool), []

    def root(row: int) -> int:
        while parent[row] != row:
            row = parent[row]
        return row

    for i, j in pairs.tolist():
        a, b = sorted((root(i), root(j)))
        if a != b and name_of[a] >= 0 and name_of[b] >= 0:
            apart.append((i, j))
            continue
        parent[b], name_of[a] = a, max(name_of[a], name_of[b])
        joined[[i, j]] = True
    roots = [root(row) for row in range(len(named))]
    return Groups([f"g{code:04d}" for code in pd.factorize(pd.Series(roots))[0]], joined, apart)


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
        Columns id, volume, group, official (the release's split or empty), lesion_fraction, empty.
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
        raise SplitError(
            f"{cfg.dataset}: {len(cases)} cases in {len(units)} groups, the largest with "
            f"{units.max()}, leave no group for {missing}; at least 3 groups are needed. Copies, "
            "frames of one video, images of one patient, and with normals = 'test' all without a "
            f"lesion stay together.\nval_fraction = {cfg.val_fraction} and test_fraction = "
            f"{cfg.test_fraction} were asked for. Add patients, or name them with group_by."
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
        free = allot(units, cases["lesion_fraction"], equal, rng) != str(cfg.fold)
        val = cfg.val_fraction / (1 - 1 / cfg.folds)
        parts = {"train": 1 - val, "val": val}
    else:
        held_out = {"test": cfg.test_fraction, "val": cfg.val_fraction}
        parts = {"train": 1 - sum(held_out.values())} | held_out
    splits[free] = allot(units[free], cases["lesion_fraction"][free], parts, rng)
    return splits


def allot(
    units: pd.Series, lesion_fraction: pd.Series, parts: dict[str, float], rng: np.random.Generator
) -> pd.Series:
    """Assign whole units to parts (name -> fraction), stratified by lesion size.

    Units are shuffled within each stratum (no lesion, or a third of the units by mean lesion
    share), larger ones first, and go to the part that is least filled.
    """
    table = lesion_fraction.groupby(units).agg(["size", "mean"])
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
        ordered = stratum.sort_values(["octave", "order"], ascending=[False, True])
        for unit, size in ordered["size"].items():
            part = min(parts, key=lambda n: ((filled[n] + size) / parts[n], total[n] / parts[n]))
            filled[part] += size
            total[part] += size
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
    if not {"train", "test"} <= set(splits) <= set(SPLITS):
        counts = ", ".join(f"{n} {name or 'none'}" for name, n in splits.value_counts().items())
        raise SplitError(
            f"{cfg.dataset}: split = 'official' needs train or test for every case, and val if you "
            f"like; found: {counts}.\nAdd what is missing to the release or to the column split of "
            "the list, or use split = 'groups'."
        )
    if "val" not in set(splits):
        train = splits == "train"
        parts = {"train": 1 - cfg.val_fraction, "val": cfg.val_fraction}
        rng = np.random.default_rng(cfg.split_seed)
        splits[train] = allot(cases["group"][train], cases["lesion_fraction"][train], parts, rng)
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
