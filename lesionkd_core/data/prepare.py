"""Raw images -> checked, grouped, split and resized arrays, and a report on problems."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from .. import results
from ..config import DistillConfig, LesionKDError, PrepareConfig, UnlabelledConfig
from ..edges import edge_label
from ..results import Progress, log
from . import phantom
from .images import Case, Reading, UnreadableFile, is_volume
from .layouts import CATALOGUE, fingerprint, how_paired, read, sequence_of, window_of
from .masks import decided
from .pixels import (
    THUMBNAIL,
    lesion_contrast,
    moments,
    prepare_image,
    prepare_mask,
    thumbnail,
    unseen,
)
from .splits import SPLITS, SplitError, copies, crossing, group_cases, series_across, split_cases

SMALL = (THUMBNAIL, THUMBNAIL)
PART, VOLUMES = 64, 2  # images or volumes between two saves; they are in memory together
BYTES = 9
"""Written for each prepared pixel: image and mask in a part, then image, mask and edge."""
FEW_PIXELS = 10
"""A mask of fewer pixels is reported if the median lesion has a hundred times as many."""
OUTLINE = 32
"""Side of the coarse copy of a mask that is compared with the others."""
ALIKE, AROUND = 0.9, 0.9
"""Masks hardly differ, or are lesion along the border, above these fractions."""
Row = tuple[dict[str, Any], np.ndarray, np.ndarray, np.ndarray]
"""Facts of a case; its image (1, S, S, 3), mask (1, S, S) and thumbnail; empty if it is dropped."""


class Prepared(results.Result):
    """Prepared arrays of one data set, memory-mapped, in the order of `cases`."""

    @cached_property
    def cases(self) -> pd.DataFrame:
        """One row for each case.

        Columns id, group, label, split, volume, lesion_share, contrast (as prepared), height, width
        (of the original, px).
        """
        return results.read_table(self.path / "cases.csv")

    @cached_property
    def report(self) -> pd.DataFrame:
        """Cases that were dropped or repaired (`action`), and why."""
        return results.read_table(self.path / "report.csv")

    @cached_property
    def images(self) -> np.ndarray:
        """(N, S, S, 3) uint8."""
        return results.read_array(self.path / "images.npy")

    @cached_property
    def masks(self) -> np.ndarray:
        """(N, S, S) uint8, 0 or 1."""
        return results.read_array(self.path / "masks.npy")

    @cached_property
    def edges(self) -> np.ndarray:
        """(N, S, S) uint8, 0 or 1: Label_edge of the prepared masks, for display."""
        return results.read_array(self.path / "edges.npy")

    @cached_property
    def thumbnails(self) -> np.ndarray:
        """(N, 64, 64) uint8: grey copies in which near-duplicates are searched; 0 for a volume."""
        return results.read_array(self.path / "thumbnails.npy")

    @cached_property
    def split_hash(self) -> str:
        """Eight hexadecimal digits that identify the split and the groups."""
        content = results.checked(self.path / "split.csv").read_bytes()
        return hashlib.sha256(content).hexdigest()[:8]

    @cached_property
    def lesion_fraction(self) -> float:
        """Mean fraction of lesion pixels in the training images."""
        train = self.cases["split"] == "train"
        return float(self.cases.loc[train, "lesion_share"].mean())

    def index(self, split: str) -> np.ndarray:
        """Rows of a split, ascending."""
        return np.flatnonzero(self.cases["split"] == split)

    def __repr__(self) -> str:
        counts = ", ".join(f"{name} {len(self.index(name))}" for name in SPLITS)
        return f"Prepared({results.short(self.path)}: {counts}, split {self.split_hash})"


def prepare(cfg: PrepareConfig) -> Prepared:
    """Find or make the prepared arrays; an interrupted preparation resumes.

    Raises
    ------
    DatasetNotFound, SplitError, LesionKDError
        There is no such data set, or too few of its cases can be used.
    """
    for name in getattr(cfg, "test_dataset", ()):
        fingerprint(cfg.for_testing(name))  # an error now, not after hours of training
    if isinstance(cfg, DistillConfig) and cfg.unlabelled:
        prepare(_unlabelled(cfg))
    if not isinstance(cfg, UnlabelledConfig):
        cfg = cfg.upstream(PrepareConfig)
    upstream, raw = fingerprint(cfg)

    def make(missing: dict[Path, PrepareConfig]) -> None:
        for path in missing:
            log.info(f"preparing {cfg.dataset} at {cfg.pixels} px")
            _check_space(path, (cfg.cases or len(raw) or phantom.CASES) * cfg.pixels**2 * BYTES)
            official = CATALOGUE[cfg.dataset].count if cfg.dataset in CATALOGUE else len(raw)
            if len(raw) != official:
                log.info(f"note: {len(raw)} of the release's {official} images are here")
            if how := how_paired(cfg):
                log.info(f"note: {how}")
            cases = decided(raw, cfg)
            line = cases[0].decision.line if cases and cases[0].decision else ""
            if line:
                log.info(line)
            parts = _read_all(path / "parts", cfg, cases)
            _assemble(path, cfg, parts, grouped=bool(raw), masks=line)
            shutil.rmtree(path / "parts")

    wanted = results.Wanted(cfg, upstream)
    return results.find_or_make([wanted], make, Prepared, resume=True)[0]


@dataclass(frozen=True)
class Unlabelled:
    """Images without masks: (N, S, S, 3) uint8 in memory, their ids, and the digest of all."""

    images: np.ndarray
    ids: pd.Series
    digest: str


def unlabelled_images(data: Prepared, cfg: DistillConfig) -> Unlabelled | None:
    """The images without masks that the option `unlabelled` names; None if it is empty.

    Copies of the data set's own images are left out, so that test images stay unseen. Slices of
    volumes are not compared.
    """
    if not cfg.unlabelled:
        return None
    others = prepare(_unlabelled(cfg))
    left_out = copies(data.thumbnails, others.thumbnails, cfg.duplicate_bits)
    kept = np.delete(np.arange(len(others.cases)), left_out)
    log.info(
        f"{len(kept)} images without masks; {len(left_out)} copies of images of "
        f"{cfg.dataset_name} left out"
    )
    ids = others.cases["id"].iloc[kept].reset_index(drop=True)
    return Unlabelled(np.asarray(others.images[kept]), ids, others.digest)


def _unlabelled(cfg: DistillConfig) -> UnlabelledConfig:
    names = ("profile", "pixels", "fit", "duplicate_bits")
    given = {name: getattr(cfg, name) for name in names} | {"window": window_of(cfg)}
    return UnlabelledConfig(**given, dataset=cfg.unlabelled, normals="keep", split="test")


def _check_space(path: Path, needed: int) -> None:
    free = shutil.disk_usage(path).free
    if needed > free:
        raise LesionKDError(
            f"the prepared data need at least {needed / 1e9:.1f} GB, and the disk of {path} has "
            f"{free / 1e9:.1f} GB. Free some space, or give fewer pixels or cases."
        )


def _read_all(folder: Path, cfg: PrepareConfig, raw: list[Case]) -> list[Path]:
    """Read and resize all cases in parallel, one file for each part; existing parts are kept."""
    jobs = _jobs(cfg, raw)
    size = VOLUMES if any(is_volume(case.image) for case in raw) else PART
    paths = [folder / f"{start:07d}.npz" for start in range(0, len(jobs), size)]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    lines = 10 if len(paths) > 10 else 0  # a small data set takes seconds
    reading = Progress(cfg.dataset_name, "case", len(jobs), lines=lines)
    with ThreadPoolExecutor(cores) as pool, reading:  # decoding releases the GIL
        for number, path in enumerate(paths):
            part = jobs[number * size : (number + 1) * size]
            if not (zipfile.is_zipfile(path) and results.is_intact(path)):
                rows = pool.map(lambda job: _prepare_case(job, cfg), part)
                _write_part(path, [row for found in rows for row in found])
            reading.step(count=len(part))
    return paths


def _jobs(cfg: PrepareConfig, raw: list[Case]) -> list[tuple[Case | int, str]]:
    """Cases of the data set or indices of the phantom, each with a reason to drop it or ''."""
    if not raw:
        return [(index, "") for index in range(cfg.cases or phantom.CASES)]
    twice = pd.Series([case.id for case in raw]).duplicated(keep=False)
    jobs: list[tuple[Case | int, str]] = [
        (case, f"two images are called {case.id!r}; rename one" if again else "")
        for case, again in zip(raw, twice)
    ]
    if cfg.cases and cfg.cases < len(raw):
        order = np.random.default_rng(cfg.split_seed).permutation(len(raw))
        jobs = [jobs[i] for i in np.sort(order[: cfg.cases])]
    return jobs


def _prepare_case(job: tuple[Case | int, str], cfg: PrepareConfig) -> list[Row]:
    """A prepared case (several of a volume), or the row of a case that cannot be used."""
    case, problem = job
    if isinstance(case, int):
        image, mask = phantom.draw(cfg.split_seed, case, cfg.pixels)
        drawn = Case("", Path(), ())
        return [_row(Reading(f"{case:05d}", image, mask), image, mask, drawn, cfg)]
    try:
        if problem:
            raise UnreadableFile(problem)
        return [
            _row(r, prepare_image(r.image, cfg), prepare_mask(r.mask, cfg), case, cfg)
            for r in read(case, cfg.window)
        ]
    except UnreadableFile as error:
        nothing = np.empty((0, cfg.pixels, cfg.pixels), np.uint8)
        row = {"id": case.id, "file": case.image.name, "problem": str(error), "notes": []}
        return [(row, nothing, nothing, nothing)]


def _row(
    reading: Reading, image: np.ndarray, mask: np.ndarray, case: Case, cfg: PrepareConfig
) -> Row:
    """Size and likeness come from the original, so that every prepared size has the same split."""
    empty, drawn = not mask.any(), reading.mask
    border = np.concatenate([drawn[0], drawn[-1], drawn[:, 0], drawn[:, -1]])
    coarse = mask.reshape(OUTLINE, cfg.pixels // OUTLINE, OUTLINE, -1).mean((1, 3)) > 0.5
    notes = [*reading.notes, *(() if reading.volume else unseen(reading.image, image))]
    problem = "no lesion (normals = drop)" if empty and cfg.normals == "drop" else ""
    # slices of two patients look alike
    small = np.zeros(SMALL, np.uint8) if reading.volume else thumbnail(reading.image)
    row = {
        "id": reading.id,
        "file": case.image.name,
        "notes": notes,
        "group": case.group or reading.group or reading.volume,
        "label": case.label,
        "official": case.split,
        "volume": reading.volume,
        "height": reading.image.shape[0],
        "width": reading.image.shape[1],
        "empty": bool(empty),
        "lesion_share": np.count_nonzero(drawn) / drawn.size,
        "border": float(border.mean()),
        "outline": np.packbits(coarse).tobytes().hex(),
        "contrast": lesion_contrast(image, mask),
        "moments": moments(image),
        "problem": "; ".join([problem, *notes]) if problem else "",
    }
    kept = slice(0, 0) if row["problem"] else slice(None)
    return row, image[None][kept], mask[None][kept].astype(np.uint8), small[None][kept]


def _write_part(path: Path, done: list[Row]) -> None:
    kept = [arrays for row, *arrays in done if not row["problem"]] or [[np.empty(0, np.uint8)] * 3]
    arrays: dict[str, Any] = dict(
        zip(("images", "masks", "thumbnails"), map(np.concatenate, zip(*kept)))
    )
    with results.replacing(path) as partial, open(partial, "wb") as file:
        np.savez(file, rows=np.array(json.dumps([row for row, *_ in done])), **arrays)


def _assemble(
    path: Path, cfg: PrepareConfig, parts: list[Path], grouped: bool, masks: str = ""
) -> None:
    """Form groups and splits from the rows of all parts, then write the arrays part by part."""
    rows = pd.DataFrame([r for part in parts for r in json.loads(str(np.load(part)["rows"]))])
    kept = rows["problem"] == ""
    results.write_table(path / "report.csv", _report(rows))  # also if an error follows
    listed = (
        f"{r.file}: {r.problem.removeprefix(f'{r.file}: ')}" for r in rows[~kept].itertuples()
    )
    reasons = "\n".join(f"  {reason}" for reason in islice(listed, 5))
    where = f"report.csv in {results.short(path)}"
    dropped = f"\ndropped: {(~kept).sum()} (all in {where}):\n{reasons}" * bool(reasons)
    needed, why = (1, "") if cfg.split == "test" else (10, " to split into train, val and test")
    if kept.sum() < needed:
        raise LesionKDError(
            f"{cfg.dataset}: {kept.sum()} usable cases; at least {needed} are needed{why}."
            + dropped
        )
    cases = rows[kept].reset_index(drop=True).astype({"empty": bool, "height": int, "width": int})
    small = np.concatenate([np.load(part)["thumbnails"].reshape(-1, *SMALL) for part in parts])
    known, bits = cases["group"], cfg.duplicate_bits
    cases["group"] = group_cases(known, small if grouped else None, bits, sequence_of(cfg))
    try:
        cases["split"] = split_cases(cases, cfg)
    except SplitError as error:
        raise SplitError(f"{error}{dropped}") from None
    chosen = (cases["split"] != "").to_numpy()
    rows.loc[rows.index[kept][~chosen], "problem"] = "not in the split file"
    cases = cases[chosen].reset_index(drop=True)
    across = crossing(cases)
    if dropped:
        log.info(dropped.strip())
    warnings = _warnings(cases, known[chosen].to_numpy() == "", across) + _mask_warnings(cases)
    for warning in warnings:
        log.warning(f"warning: {warning}")
    _write_arrays(path, parts, chosen, cfg.pixels)
    results.write_array(path / "thumbnails.npy", small[chosen])
    report = _report(rows)
    results.write_table(path / "report.csv", report)
    results.write_table(path / "split.csv", cases[["id", "group", "split"]])
    described = ["label", "split", "volume", "lesion_share", "contrast", "height", "width"]
    results.write_table(path / "cases.csv", cases[["id", "group", *described]])
    counts = {
        action: int(report.loc[report["action"] == action, "id"].nunique())
        for action in ("repaired", "dropped")
    }
    about = {"kept": len(cases), "groups": int(cases["group"].nunique()), "crossing": across}
    about |= {"warnings": warnings, "paired": how_paired(cfg), "masks": masks}
    results.write_json(path / "summary.json", about | counts | _statistics(cases))


def _warnings(cases: pd.DataFrame, ungrouped: np.ndarray, across: dict[str, int]) -> list[str]:
    """What may be wrong with the data, and the option that cures it."""
    found = []
    if any(across.values()):
        found.append(
            f"{across['test']} test and {across['val']} validation cases share a group (video, "
            "patient, near-duplicate) with a training case"
        )
    if series := series_across(cases[ungrouped]):
        found.append(
            f"{len(series)} numbered series of images, such as that of {series[0]}, have members "
            "in more than one split. If a series is a patient or a video, give group_by = 'number'"
        )
    return found


def _mask_warnings(cases: pd.DataFrame) -> list[str]:
    """What may be wrong with the masks, and what cures it."""
    found = []
    lesions = cases[~cases["empty"] & (cases["volume"] == "")]
    share = lesions["lesion_share"]
    alike = _likeness(lesions["outline"].tolist())
    around = lesions.loc[(lesions["border"] > AROUND) & (share < 1), "file"].tolist()
    if alike > ALIKE:
        found.append(
            f"the masks hardly differ between pictures (median IoU with their most common outline "
            f"{alike:.2f}), and cover {share.median():.0%} of the image. If this is the field of "
            "view, give the folder with the masks of the lesion"
        )
    elif (median := share.median()) > 0.5:
        found.append(
            f"the median lesion covers {median:.0%} of its image. If the masks show the lesion "
            "black on white, give invert_masks = True"
        )
    elif around:
        found.append(
            f"{len(around)} masks are lesion along the border and nearly everywhere, those of "
            f"{', '.join(around[:5])}. If they show the lesion black on white, unlike the others, "
            "invert these files (invert_masks = True would invert all)"
        )
    area = share * lesions["height"] * lesions["width"]
    stray = lesions.loc[(area < FEW_PIXELS) & (area < area.median() / 100), "file"].tolist()
    if stray:
        found.append(
            f"{len(stray)} masks have fewer than {FEW_PIXELS} lesion pixels, such as that of "
            f"{stray[0]}; the median is {area.median():.0f}. If other values of these masks are "
            "lesion too, name them in lesion_values"
        )
    return found


def _likeness(outlines: list[str]) -> float:
    """Median over masks of the IoU with the outline of most, of lesion or background if smaller."""
    if len(outlines) < 2:
        return 0.0
    bits = np.unpackbits([np.frombuffer(bytes.fromhex(o), np.uint8) for o in outlines], axis=1) > 0
    common = bits.mean(0) > 0.5
    ious = [
        (side & most).sum(1) / np.maximum((side | most).sum(1), 1)
        for side, most in ((bits, common), (~bits, ~common))
    ]
    return float(np.median(np.minimum(*ious)))


def _statistics(cases: pd.DataFrame) -> dict[str, list[float]]:
    """Channel means and standard deviations over the training images, 0..255."""
    train = cases["split"] == "train"
    mean, square = np.mean(cases[train if train.any() else ~train]["moments"].tolist(), axis=0)
    std = np.sqrt(np.maximum(square - mean**2, 0))
    return {"mean": mean.round(4).tolist(), "std": std.round(4).tolist()}


def _report(rows: pd.DataFrame) -> pd.DataFrame:
    """One row for each dropped case, and for each repair of a case that was kept."""
    reasons = [[p] if p else notes for p, notes in zip(rows["problem"], rows["notes"])]
    action = np.where(rows["problem"] != "", "dropped", "repaired")
    table = rows.assign(reason=reasons, action=action).explode("reason").dropna(subset="reason")
    return table[["id", "file", "action", "reason"]]


def _write_arrays(path: Path, parts: list[Path], chosen: np.ndarray, pixels: int) -> None:
    """Images, masks and edges of the chosen cases, one part in memory at a time."""
    shape = (int(chosen.sum()), pixels, pixels)
    with ExitStack() as stack:
        images, masks, edges = (
            stack.enter_context(results.appending(path / f"{name}.npy", shape + tail))
            for name, tail in (("images", (3,)), ("masks", ()), ("edges", ()))
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
