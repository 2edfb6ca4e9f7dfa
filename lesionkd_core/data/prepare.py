"""Raw release or phantom -> checked, grouped, split, resized arrays, and a report on what was wrong."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from .. import store
from ..config import LesionKDError, PrepareConfig
from ..datasets import CATALOGUE, Case, Reading, UnreadableFile, fingerprint, phantom, read
from ..datasets.files import is_volume
from ..edges import edge_label
from ..integrity import checked, is_whole
from ..progress import Progress, Tell
from .groups import group_cases, near_pairs
from .pixels import lesion_contrast, perceptual_hash, prepare_image, prepare_mask, restore
from .splits import SPLITS, SplitError, crossing, split_cases

__all__ = [
    "SPLITS", "Prepared", "SplitError", "group_cases", "near_pairs", "perceptual_hash", "prepare_data", "prepare_image", "prepare_mask", "restore",
    "split_cases",
]

PHANTOM_CASES = 1000
PART, VOLUMES = 64, 2  # images or volumes read between two saves: what a killed preparation loses, and what lies in memory
Row = tuple[dict[str, Any], np.ndarray, np.ndarray]
"""What is known of a case; its image (1, S, S, 3) and mask (1, S, S) as prepared, none of them where it is dropped."""


class Prepared(store.Result):
    """Prepared arrays of one data set: memory-mapped, read-only, in the order of `cases`."""

    @cached_property
    def cases(self) -> pd.DataFrame:
        """One row a case: id, group, label, split, volume, lesion_share, contrast (as prepared), height, width (of the original, px)."""
        return store.read_table(self.path / "cases.csv")

    @cached_property
    def report(self) -> pd.DataFrame:
        """What was dropped or repaired (`action`), and why."""
        return store.read_table(self.path / "report.csv")

    @cached_property
    def images(self) -> np.ndarray:
        """(N, S, S, 3) uint8."""
        return store.read_array(self.path / "images.npy")

    @cached_property
    def masks(self) -> np.ndarray:
        """(N, S, S) uint8, 0 or 1."""
        return store.read_array(self.path / "masks.npy")

    @cached_property
    def edges(self) -> np.ndarray:
        """(N, S, S) uint8, 0 or 1: Label_edge of the prepared masks, for viewing."""
        return store.read_array(self.path / "edges.npy")

    @cached_property
    def hashes(self) -> np.ndarray:
        """(N, 63) bool: perceptual hashes."""
        return store.read_array(self.path / "hashes.npy", mmap=False)

    @cached_property
    def split_hash(self) -> str:
        """Eight digits that change when any case changes its split or group."""
        return hashlib.sha256(checked(self.path / "split.csv").read_bytes()).hexdigest()[:8]

    def index(self, split: str) -> np.ndarray:
        """Rows of a split, ascending."""
        return np.flatnonzero(self.cases["split"] == split)

    def __repr__(self) -> str:
        counts = ", ".join(f"{name} {len(self.index(name))}" for name in SPLITS)
        return f"Prepared({store.short(self.path)}: {counts}, split {self.split_hash})"


def prepare_data(cfg: PrepareConfig, tell: Tell = print) -> Prepared:
    """Find or make the prepared arrays of `cfg`; what a killed preparation had read is kept.

    Raises
    ------
    DatasetNotFound, SplitError, LesionKDError
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
            if cfg.dataset in CATALOGUE and len(raw) != (count := CATALOGUE[cfg.dataset].count):
                tell(f"note: {len(raw)} of the {count} images of the official release are here")
            store.begin(path, cfg, upstream, keep=True)
            parts = _read_all(path / "parts", cfg, raw)
            _assemble(path, cfg, parts, grouped=bool(raw), tell=tell)
            store.finish(path)
            shutil.rmtree(path / "parts")
    return Prepared(path)


def _read_all(folder: Path, cfg: PrepareConfig, raw: list[Case]) -> list[Path]:
    """Decode and resize every case, in parallel, into one file a part; parts that are there are kept."""
    jobs = _jobs(cfg, raw)
    size = VOLUMES if any(is_volume(case.image) for case in raw) else PART
    paths = [folder / f"{start:07d}.npz" for start in range(0, len(jobs), size)]
    every = max(1, len(paths) // 10)  # ten lines are enough
    progress = Progress(f"reading {Path(cfg.dataset).name}", len(paths) // every) if len(paths) > 10 else None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with ThreadPoolExecutor(cores) as pool:  # decoding and resizing free the interpreter lock
        for number, path in enumerate(paths):
            if not _is_whole(path):
                done = [row for rows in pool.map(lambda job: _prepare_case(job, cfg), jobs[number * size : (number + 1) * size]) for row in rows]
                _write_part(path, done)
            if progress and (number + 1) % every == 0:
                progress.epoch(f"{min((number + 1) * size, len(jobs))} of {len(jobs)} cases")
    if progress:
        progress.close()
    return paths


def _is_whole(path: Path) -> bool:
    return zipfile.is_zipfile(path) and is_whole(path)


def _jobs(cfg: PrepareConfig, raw: list[Case]) -> list[tuple[Case | int, str]]:
    """Cases of the release or numbers of the phantom, each with what rules it out from the start."""
    if not raw:
        return [(index, "") for index in range(cfg.cases or PHANTOM_CASES)]
    twice = pd.Series([case.id for case in raw]).duplicated(keep=False)
    jobs: list[tuple[Case | int, str]] = [(case, f"two images are called {case.id!r}; rename one" if again else "") for case, again in zip(raw, twice)]
    if cfg.cases and cfg.cases < len(raw):
        chosen = np.sort(np.random.default_rng(cfg.split_seed).permutation(len(raw))[: cfg.cases])
        jobs = [jobs[i] for i in chosen]
    return jobs


def _prepare_case(job: tuple[Case | int, str], cfg: PrepareConfig) -> list[Row]:
    """A case as prepared (several of a volume), or its row with the problem and no pixels."""
    case, problem = job
    if isinstance(case, int):
        image, mask = phantom.draw(cfg.dataset, cfg.split_seed, case, cfg.pixels, cfg.difficulty)
        return [_row(Reading(f"{case:05d}", image, mask), image, mask, Case("", Path(), ()), cfg)]
    try:
        if problem:
            raise UnreadableFile(problem)
        return [_row(r, prepare_image(r.image, cfg), prepare_mask(r.mask, cfg), case, cfg) for r in read(case, cfg.window)]
    except UnreadableFile as error:
        nothing = np.empty((0, cfg.pixels, cfg.pixels), np.uint8)
        return [({"id": case.id, "file": case.image.name, "problem": str(error), "notes": []}, nothing, nothing)]


def _row(reading: Reading, image: np.ndarray, mask: np.ndarray, case: Case, cfg: PrepareConfig) -> Row:
    """What the split goes by, size and likeness, is taken of the original, so that it is the same at every prepared size and look."""
    empty = not mask.any()
    alike = np.zeros(63, bool) if reading.volume else perceptual_hash(reading.image)  # slices of two bodies look the same
    row = {
        "id": reading.id, "file": case.image.name, "notes": list(reading.notes), "group": case.group or reading.group or reading.volume, "label": case.label,
        "official": case.split, "volume": reading.volume, "height": reading.image.shape[0], "width": reading.image.shape[1], "empty": bool(empty),
        "lesion_share": np.count_nonzero(reading.mask) / reading.mask.size, "contrast": lesion_contrast(image, mask),
        "hash": np.packbits(alike).tobytes().hex(), "moments": _moments(image),
        "problem": "no lesion (normals = drop)" if empty and cfg.normals == "drop" else "",
    }
    kept = slice(0, 0) if row["problem"] else slice(None)
    return row, image[None][kept], mask[None][kept].astype(np.uint8)


def _write_part(path: Path, done: list[Row]) -> None:
    rows = [row for row, _, _ in done]
    images = np.concatenate([image for row, image, _ in done if not row["problem"]] or [np.empty(0, np.uint8)])
    masks = np.concatenate([mask for row, _, mask in done if not row["problem"]] or [np.empty(0, np.uint8)])
    with store.replacing(path) as partial, open(partial, "wb") as file:
        np.savez(file, images=images, masks=masks, rows=np.array(json.dumps(rows)))


def _assemble(path: Path, cfg: PrepareConfig, parts: list[Path], grouped: bool, tell: Tell) -> None:
    """Groups and splits from the rows of all parts, then the arrays, part by part."""
    rows = pd.DataFrame([row for part in parts for row in json.loads(str(np.load(part)["rows"]))])
    kept = rows["problem"] == ""
    wanted, why = (1, "") if cfg.split == "test" else (10, " to split into train, val and test")
    if kept.sum() < wanted:
        store.write_table(path / "report.csv", _report(rows))
        raise LesionKDError(
            f"{cfg.dataset}: {kept.sum()} usable cases, wants at least {wanted}{why}; {(~kept).sum()} dropped.\n"
            + "\n".join(f"  {r.file}: {r.problem}" for r in rows[~kept].head(5).itertuples())
        )
    cases = rows[kept].reset_index(drop=True).astype({"empty": bool, "height": int, "width": int})
    hashes = np.unpackbits(np.array([list(bytes.fromhex(h)) for h in cases["hash"]], np.uint8), axis=1, count=63).astype(bool)
    cases["group"] = group_cases(cases["group"], hashes if grouped else None, cfg.duplicate_bits)
    cases["split"] = split_cases(cases, cfg)
    chosen = (cases["split"] != "").to_numpy()
    rows.loc[rows.index[kept][~chosen], "problem"] = "not in the split file"
    cases, hashes = cases[chosen].reset_index(drop=True), hashes[chosen]
    across = crossing(cases)
    if any(across.values()):
        tell(f"warning: {across['test']} test and {across['val']} validation cases share a group (video, patient, near-duplicate) with a training case")
    _write_arrays(path, parts, chosen, cfg.pixels)
    store.write_array(path / "hashes.npy", hashes)
    report = _report(rows)
    store.write_table(path / "report.csv", report)
    store.write_table(path / "split.csv", cases[["id", "group", "split"]])
    store.write_table(path / "cases.csv", cases[["id", "group", "label", "split", "volume", "lesion_share", "contrast", "height", "width"]])
    counts = {action: int(report.loc[report["action"] == action, "id"].nunique()) for action in ("repaired", "dropped")}
    store.write_json(path / "summary.json", {"kept": len(cases), **counts, "groups": int(cases["group"].nunique()), "crossing": across, **_statistics(cases)})


def _statistics(cases: pd.DataFrame) -> dict[str, list[float]]:
    """Mean and deviation of the channels over the training images (over all where none trains), grey values 0..255."""
    table = cases[cases["split"] == "train"] if (cases["split"] == "train").any() else cases
    mean, square = np.mean(table["moments"].tolist(), axis=0)
    return {"mean": mean.round(4).tolist(), "std": np.sqrt(np.maximum(square - mean**2, 0)).round(4).tolist()}


def _moments(image: np.ndarray) -> list[list[float]]:
    """Means of the three channels and of their squares, counted from the histogram: quicker than from the pixels."""
    counts = np.reshape(Image.fromarray(image).histogram(), (3, 256))
    return [(counts @ np.arange(256.0) ** power / counts[0].sum()).tolist() for power in (1, 2)]


def _report(rows: pd.DataFrame) -> pd.DataFrame:
    """One row a dropped case, and one a repair of a case that was kept."""
    reasons = [[problem] if problem else notes for problem, notes in zip(rows["problem"], rows["notes"])]
    table = rows.assign(reason=reasons, action=np.where(rows["problem"] != "", "dropped", "repaired"))
    return table.explode("reason").dropna(subset="reason")[["id", "file", "action", "reason"]]


def _write_arrays(path: Path, parts: list[Path], chosen: np.ndarray, pixels: int) -> None:
    """images, masks and edges of the chosen cases, one part in memory at a time."""
    shape = (int(chosen.sum()), pixels, pixels)
    with ExitStack() as stack:
        images, masks, edges = (
            stack.enter_context(store.appending(path / f"{name}.npy", shape + tail)) for name, tail in (("images", (3,)), ("masks", ()), ("edges", ()))
        )
        for images_of_part, masks_of_part in _chosen_of(parts, chosen):
            images(images_of_part)
            masks(masks_of_part)
            edges(edge_label(masks_of_part))


def _chosen_of(parts: list[Path], chosen: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    start = 0
    for part in parts:
        with np.load(part) as content:
            images, masks = content["images"], content["masks"]
        keep = chosen[start : start + len(images)]
        start += len(images)
        if keep.any():
            yield images[keep], masks[keep]
