"""Raw release or phantom -> checked, grouped, split, resized arrays, and a report on what was wrong."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from . import store
from .config import LesionKDError, PrepareConfig
from .datasets import Case, UnreadableFile, fingerprint, phantom, read_case
from .edges import edge_label

SPLITS = ("train", "val", "test")
PHANTOM_CASES = 1000
REPORT_COLUMNS = ["id", "file", "dropped", "reason"]


class Prepared(store.Result):
    """Prepared arrays of one data set: memory-mapped, read-only, in the order of `cases`."""

    @cached_property
    def cases(self) -> pd.DataFrame:
        """One row a case: id, group, label, split, lesion_share, height, width (of the original, px)."""
        return store.read_table(self.path / "cases.csv")

    @cached_property
    def report(self) -> pd.DataFrame:
        """What was dropped or changed, and why."""
        return store.read_table(self.path / "report.csv")

    @cached_property
    def images(self) -> np.ndarray:
        """(N, S, S, 3) uint8."""
        return np.load(self.path / "images.npy", mmap_mode="r")

    @cached_property
    def masks(self) -> np.ndarray:
        """(N, S, S) uint8, 0 or 1."""
        return np.load(self.path / "masks.npy", mmap_mode="r")

    @cached_property
    def edges(self) -> np.ndarray:
        """(N, S, S) uint8, 0 or 1: Label_edge of the prepared masks, for viewing."""
        return np.load(self.path / "edges.npy", mmap_mode="r")

    @cached_property
    def split_hash(self) -> str:
        """Eight digits that change when any case changes its split or group."""
        return hashlib.sha256((self.path / "split.csv").read_bytes()).hexdigest()[:8]

    def index(self, split: str) -> np.ndarray:
        """Rows of a split, ascending."""
        return np.flatnonzero(self.cases["split"] == split)

    def __repr__(self) -> str:
        counts = ", ".join(f"{name} {len(self.index(name))}" for name in SPLITS)
        return f"Prepared({store.short(self.path)}: {counts}, split {self.split_hash})"


def prepare_data(cfg: PrepareConfig, tell=print) -> Prepared:
    """Find or make the prepared arrays of `cfg`.

    Raises
    ------
    DatasetNotFound, LesionKDError
        No such release, or too few usable cases to split; nothing half-written is taken for whole.
    """
    cfg = cfg.upstream(PrepareConfig)
    upstream, raw = fingerprint(cfg)
    path = store.folder(cfg, upstream)
    if store.is_done(path):
        return Prepared(path)
    with store.lock(path, tell):
        if not store.is_done(path):
            tell(f"preparing {cfg.dataset} at {cfg.pixels} px")
            store.begin(path, cfg, upstream)
            _write(path, cfg, raw)
            store.finish(path)
    return Prepared(path)


def resize_image(image: np.ndarray, pixels: int) -> np.ndarray:
    """(H, W, 3) uint8 -> (S, S, 3) uint8: squeezed to a square, bilinear over all source pixels."""
    return np.asarray(Image.fromarray(image).resize((pixels, pixels), Image.Resampling.BILINEAR))


def resize_mask(mask: np.ndarray, pixels: int) -> np.ndarray:
    """(H, W) bool -> (S, S) bool: over half covered; a lesion that would vanish keeps its fullest pixel."""
    share = np.asarray(Image.fromarray(mask.astype(np.float32)).resize((pixels, pixels), Image.Resampling.BOX))
    small = share > 0.5
    return small if small.any() or not mask.any() else share >= share.max()


def _write(path: Path, cfg: PrepareConfig, raw: list[Case]) -> None:
    read = _phantom(cfg) if cfg.dataset in phantom.LOOKS else _files(cfg, raw)
    kept, report = [], []
    for row, image, mask, problem in read:
        empty = mask is not None and not mask.any()
        reason = problem or ("no lesion (normals = drop)" if empty and cfg.normals == "drop" else "")
        if reason:
            report.append({"id": row["id"], "file": row.pop("file"), "dropped": True, "reason": reason})
        else:
            kept.append(({**row, "empty": empty}, image, mask))
    report = pd.DataFrame(report, columns=REPORT_COLUMNS)
    store.write_table(path / "report.csv", report)
    if len(kept) < 10:
        raise LesionKDError(
            f"{cfg.dataset}: {len(kept)} usable cases, wants at least 10 to split into train, val and test; {len(report)} dropped.\n"
            + "\n".join(f"  {r.file}: {r.reason}" for r in report.head(5).itertuples())
        )
    cases = pd.DataFrame([row for row, _, _ in kept])
    images, masks = np.stack([image for _, image, _ in kept]), np.stack([mask for _, _, mask in kept])
    cases["group"] = group_cases(cases["group"], images if raw else None, cfg.duplicate_bits)
    cases["lesion_share"] = masks.mean((1, 2))
    cases["split"] = split_cases(cases, cfg)
    store.write_array(path / "images.npy", images)
    store.write_array(path / "masks.npy", masks.astype(np.uint8))
    store.write_array(path / "edges.npy", edge_label(masks).astype(np.uint8))
    store.write_table(path / "split.csv", cases[["id", "group", "split"]])
    store.write_table(path / "cases.csv", cases[["id", "group", "label", "split", "lesion_share", "height", "width"]])


def _phantom(cfg: PrepareConfig):
    for index in range(cfg.cases or PHANTOM_CASES):
        image, mask = phantom.draw(cfg.dataset, cfg.split_seed, index, cfg.pixels, cfg.difficulty)
        row = {"id": f"{index:05d}", "file": "", "group": "", "label": "", "height": cfg.pixels, "width": cfg.pixels}
        yield row, image, mask, ""


def _files(cfg: PrepareConfig, raw: list[Case]):
    """Read in parallel (decoding frees the interpreter lock), in the release's order."""
    repeated = pd.Series([case.id for case in raw]).duplicated(keep=False).to_numpy()
    if cfg.cases and cfg.cases < len(raw):
        chosen = np.sort(np.random.default_rng(cfg.split_seed).permutation(len(raw))[: cfg.cases])
        raw, repeated = [raw[i] for i in chosen], repeated[chosen]

    def read(job: tuple[Case, bool]):
        case, twice = job
        row = {"id": case.id, "file": case.image.name, "group": case.group, "label": case.label}
        if twice:
            return row, None, None, f"two images are called {case.id!r}; rename one"
        try:
            image, mask = read_case(case)
        except UnreadableFile as error:
            return row, None, None, str(error)
        size = {"height": image.shape[0], "width": image.shape[1]}
        return row | size, resize_image(image, cfg.pixels), resize_mask(mask, cfg.pixels), ""

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield from pool.map(read, zip(raw, repeated))


def perceptual_hash(image: np.ndarray) -> np.ndarray:
    """(S, S, 3) uint8 -> (63,) bool: signs of the low DCT frequencies of the 32 px grey thumbnail."""
    from scipy.fft import dctn

    grey = Image.fromarray(image).convert("L").resize((32, 32), Image.Resampling.BOX)
    low = dctn(np.asarray(grey, dtype=np.float32), norm="ortho")[:8, :8].ravel()[1:]  # [0] is brightness
    return low > np.median(low)


def group_cases(groups: pd.Series, images: np.ndarray | None, bits: int) -> list[str]:
    """Union of the release's groups and near-duplicate images -> group of every case, 'g0000', ...

    Without `images` (the phantom draws no image twice) only the release's groups count.
    """
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    n = len(groups)
    codes = pd.factorize(groups.where(groups != ""))[0]  # -1: the release does not say
    first = pd.Series(range(n)).groupby(codes).transform("first").to_numpy()
    pairs = [(i, first[i]) for i in np.flatnonzero(codes >= 0)]
    if images is not None:
        hashes = np.stack([perceptual_hash(image) for image in images]).astype(np.float32)
        for start in range(0, n, 1024):  # a block of rows, so that memory stays small
            block = hashes[start : start + 1024]
            apart = block @ (1 - hashes.T) + (1 - block) @ hashes.T
            pairs += [(start + i, j) for i, j in np.argwhere(apart <= bits)]
    i, j = np.array(pairs, dtype=int).reshape(-1, 2).T
    _, component = connected_components(coo_matrix((np.ones(len(i)), (i, j)), shape=(n, n)), directed=False)
    return [f"g{c:04d}" for c in component]


def split_cases(cases: pd.DataFrame, cfg: PrepareConfig) -> list[str]:
    """Whole groups to train, val and test, stratified by lesion size.

    Groups are drawn at random within each stratum (tertile of the group's mean lesion share) and go
    where the smallest part of the wanted cases is in place, largest groups first. With `normals = 'test'` empty cases and what
    shares their group are tested only.
    """
    want = {"train": 1 - cfg.test_fraction - cfg.val_fraction, "test": cfg.test_fraction, "val": cfg.val_fraction}
    table = cases.groupby("group").agg(size=("id", "size"), share=("lesion_share", "mean"), empty=("empty", "any"))
    table["order"] = np.random.default_rng(cfg.split_seed).permutation(len(table))
    table["stratum"] = pd.qcut(table["share"].rank(method="first"), min(3, len(table)), labels=False)
    placed = dict.fromkeys(table.index[table["empty"]], "test") if cfg.normals == "test" else {}
    rest = table.drop(index=list(placed))
    for _, stratum in rest.groupby("stratum"):
        have = dict.fromkeys(want, 0)
        for group, row in stratum.sort_values(["size", "order"], ascending=[False, True]).iterrows():
            split = min(want, key=lambda name: have[name] / want[name])
            have[split] += row["size"]
            placed[group] = split
    splits = cases["group"].map(placed)
    if missing := set(SPLITS) - set(splits):
        raise LesionKDError(
            f"{cfg.dataset}: {len(table)} groups of cases are too few to fill {', '.join(sorted(missing))}; near-duplicates and frames of one video count once."
        )
    return splits.tolist()
