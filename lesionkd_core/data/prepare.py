"""Raw images -> checked, grouped, split and resized arrays, and a report on problems."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from .. import results
from ..config import DistillConfig, LesionKDError, PrepareConfig, UnlabelledConfig
from ..edges import edge_label
from ..results import Progress, log
from . import phantom
from .images import Case, Reading, UnreadableFile, is_volume
from .layouts import Listing, fingerprint, listing, read, suggested_groups, window_of
from .masks import UPRIGHT, decided
from .pixels import (
    THUMBNAIL,
    growth_when_filled,
    lesion_contrast,
    prepare_image,
    prepare_mask,
    thumbnail,
    unseen,
)
from .splits import SPLITS, Groups, SplitError, copies, crossing, group_cases, split_cases

SMALL = (THUMBNAIL, THUMBNAIL)
PART, VOLUMES = 64, 2  # images or volumes between two saves; they are in memory together
ALIKE = 0.9
"""Masks of different images with a larger correlation are reported."""
AROUND = 0.9
"""Masks that are lesion along more than this fraction of the border are reported."""
OUTLINED = 2.0
"""Masks that grow by more than this factor, in the median, when their holes are filled, are
reported."""
LARGEST = 8
"""Groups of images that show the same in `summary.json`."""
NARROW = "; if it has a narrow range of values, give window = 'centre, width'"
Facts = Mapping[str, object]
_warned: set[Path] = set()
"""Found preparations whose warnings this process has repeated."""


class Row(NamedTuple):
    """Facts of a case, and its arrays; they are empty if it is dropped."""

    facts: Facts
    images: np.ndarray  # (1, S, S, 3) uint8
    masks: np.ndarray  # (1, S, S) uint8
    thumbnails: np.ndarray  # (1, 64, 64) uint8


class Prepared(results.Result):
    """Prepared arrays of one data set, memory-mapped, in the order of `cases`."""

    @cached_property
    def cases(self) -> pd.DataFrame:
        """One row for each case.

        Columns id, group, joined (in its group because it shows the same as another image), label,
        split, volume, lesion_fraction, contrast (as prepared), height, width (of the original, px).
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
        return float(self.cases.loc[train, "lesion_fraction"].mean())

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
        prepare(unlabelled_config(cfg))
    if not isinstance(cfg, UnlabelledConfig):
        cfg = cfg.upstream(PrepareConfig)
    upstream = fingerprint(cfg)

    def make(missing: dict[Path, PrepareConfig]) -> None:
        for path in missing:
            log.info(f"preparing {cfg.dataset} at {cfg.pixels} px")
            source = listing(cfg)
            for note in source.notes(cfg.dataset):
                log.info(f"note: {note}")
            source = replace(source, cases=decided(source.cases, cfg))
            if source.decision:
                log.info(source.decision)
            parts = _read_all(path / "parts", cfg, source.cases)
            _assemble(path, cfg, parts, source)
            shutil.rmtree(path / "parts")

    found = results.folder(wanted := results.Wanted(cfg, upstream))
    again = results.is_done(found)
    [prepared] = results.find_or_make([wanted], make, Prepared, resume=True)
    if again and found not in _warned:  # what was said when it was made is still true
        _warned.add(found)
        for warning in prepared.summary["warnings"]:
            log.warning(f"warning: {warning}")
    return prepared


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
    others = prepare(unlabelled_config(cfg))
    left_out = copies(data.thumbnails, others.thumbnails)
    kept = np.delete(np.arange(len(others.cases)), left_out)
    log.info(
        f"{len(kept)} images without masks; {len(left_out)} copies of images of "
        f"{cfg.dataset_name} left out"
    )
    ids = others.cases["id"].iloc[kept].reset_index(drop=True)
    return Unlabelled(np.asarray(others.images[kept]), ids, others.digest)


def unlabelled_config(cfg: DistillConfig) -> UnlabelledConfig:
    """The options that prepare the images without masks of a student."""
    return UnlabelledConfig(
        profile=cfg.profile,
        pixels=cfg.pixels,
        fit=cfg.fit,
        window=window_of(cfg),
        dataset=cfg.unlabelled,
        normals="keep",
        split="test",
        cases=0,
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


def _jobs(cfg: PrepareConfig, raw: list[Case]) -> list[Case] | list[int]:
    """Cases of the data set, or indices of the phantom."""
    if not raw:
        return list(range(cfg.cases or phantom.CASES))
    named = Counter(case.id for case in raw if not case.problem)
    jobs = []
    for case in raw:
        twice = f"two images are called {case.id!r}; rename one" if named[case.id] > 1 else ""
        jobs.append(replace(case, problem=case.problem or twice))
    if cfg.cases and cfg.cases < len(raw):
        order = np.random.default_rng(cfg.split_seed).permutation(len(raw))
        jobs = [jobs[i] for i in np.sort(order[: cfg.cases])]
    return jobs


def _prepare_case(case: Case | int, cfg: PrepareConfig) -> list[Row]:
    """A prepared case (several of a volume), or the row of a case that cannot be used."""
    if isinstance(case, int):
        image, mask = phantom.draw(cfg.split_seed, case, cfg.pixels)
        drawn = Case("", Path(), ())
        return [_row(Reading(f"{case:05d}", image, mask), image, mask, drawn, cfg)]
    try:
        return [
            _row(r, prepare_image(r.image, cfg), prepare_mask(r.mask, cfg), case, cfg)
            for r in read(case, window_of(cfg))
        ]
    except UnreadableFile as error:
        facts = {"id": case.id, "file": case.image.name, "problem": str(error), "notes": []}
        mask = np.empty((0, cfg.pixels, cfg.pixels), np.uint8)
        image = np.empty((0, cfg.pixels, cfg.pixels, 3), np.uint8)
        return [Row(facts, image, mask, np.empty((0, *SMALL), np.uint8))]


def _row(
    reading: Reading, image: np.ndarray, mask: np.ndarray, case: Case, cfg: PrepareConfig
) -> Row:
    """Size and likeness come from the original, so that every prepared size has the same split."""
    empty, drawn = not mask.any(), reading.mask
    border = np.concatenate([drawn[0], drawn[-1], drawn[:, 0], drawn[:, -1]])
    notes = list(reading.notes)
    if reading.volume:
        small = np.zeros(SMALL, np.uint8)  # slices of two patients look alike
    else:
        small = thumbnail(reading.image)
        notes += unseen(reading.image, image, NARROW)
    problem = ""
    if empty and cfg.normals == "drop":
        problem = "; ".join(["no lesion (normals = drop)", *notes])
    facts: Facts = {
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
        "lesion_fraction": np.count_nonzero(drawn) / drawn.size,
        "filled": growth_when_filled(drawn),
        "border": float(border.mean()),
        "contrast": lesion_contrast(image, mask),
        "problem": problem,
    }
    count = 0 if problem else 1
    return Row(facts, image[None][:count], mask[None][:count].astype(np.uint8), small[None][:count])


def _write_part(path: Path, done: list[Row]) -> None:
    facts = np.array(json.dumps([row.facts for row in done]))
    images = np.concatenate([row.images for row in done])
    masks = np.concatenate([row.masks for row in done])
    small = np.concatenate([row.thumbnails for row in done])
    with results.replacing(path) as partial, open(partial, "wb") as file:
        np.savez(file, rows=facts, images=images, masks=masks, thumbnails=small)


def _assemble(path: Path, cfg: PrepareConfig, parts: list[Path], source: Listing) -> None:
    """Form groups and splits from the rows of all parts, then write the arrays part by part."""
    rows = pd.DataFrame([r for part in parts for r in json.loads(str(np.load(part)["rows"]))])
    results.write_table(path / "report.csv", _report(rows))  # also if an error follows
    dropped = _dropped(path, rows)
    used = rows["problem"] == ""
    _check_count(cfg, int(used.sum()), dropped)
    cases = rows[used].reset_index(drop=True).astype({"empty": bool, "height": int, "width": int})
    small = np.concatenate([np.load(part)["thumbnails"] for part in parts])
    compared = small if source.cases else None  # the phantom repeats nothing
    rule = cfg.group_by or (source.release.group_by if source.release else "")
    groups = group_cases(cases["group"], compared, cfg.join_copies, sequence=rule == "sequence")
    cases = cases.assign(named=cases["group"], group=groups.codes, joined=groups.joined)
    try:
        cases["split"] = split_cases(cases, cfg)
    except SplitError as error:
        raise SplitError(f"{error}{dropped}") from None
    chosen = (cases["split"] != "").to_numpy()
    rows.loc[rows.index[used][~chosen], "problem"] = "not in the split file"
    agreement = _mask_agreement(parts, chosen)
    warnings = list(_warnings(cases, chosen, groups, source, cfg, agreement))
    cases = cases[chosen].reset_index(drop=True)
    joined = _joined(cases)
    if dropped:
        log.info(dropped.strip())
    if joined["groups"]:
        log.info(
            f"{joined['images']} images show the same as another and form {joined['groups']} "
            "groups; notebook 01 draws the largest (join_copies)"
        )
    for warning in warnings:
        log.warning(f"warning: {warning}")
    _write_arrays(path, parts, chosen, cfg.pixels)
    results.write_array(path / "thumbnails.npy", small[chosen])
    report = _report(rows)
    results.write_table(path / "report.csv", report)
    results.write_table(path / "split.csv", cases[["id", "group", "split"]])
    described = ["label", "split", "volume", "lesion_fraction", "contrast", "height", "width"]
    results.write_table(path / "cases.csv", cases[["id", "group", "joined", *described]])
    summary = {
        "kept": len(cases),
        "groups": int(cases["group"].nunique()),
        "crossing": crossing(cases),
        "warnings": warnings,
        "joined": joined,
        "paired": source.how,
        "masks": source.decision,
        "repaired": int(report.loc[report["action"] == "repaired", "id"].nunique()),
        "dropped": int(report.loc[report["action"] == "dropped", "id"].nunique()),
    }
    results.write_json(path / "summary.json", summary)


def _dropped(path: Path, rows: pd.DataFrame) -> str:
    """The first reasons for dropping cases, to be added to a message; empty if there are none."""
    reasons = [
        f"  {row.file or row.id}: {row.problem.removeprefix(f'{row.file}: ')}"
        for row in rows[rows["problem"] != ""].itertuples()
    ]
    if not reasons:
        return ""
    where = f"report.csv in {results.short(path)}"
    return f"\ndropped: {len(reasons)} (all in {where}):\n" + "\n".join(reasons[:5])


def _check_count(cfg: PrepareConfig, count: int, dropped: str) -> None:
    why = " to split into train, val and test (split = 'test' needs one)"
    needed, why = (1, "") if cfg.split == "test" else (10, why)
    if count < needed:
        raise LesionKDError(
            f"{cfg.dataset}: {count} usable cases; at least {needed} are needed{why}.{dropped}"
        )


def _joined(cases: pd.DataFrame) -> dict[str, object]:
    """Images that share a group because they show the same: how many, and the largest groups."""
    groups = cases[cases["joined"]].groupby("group")["id"].agg(list)
    largest = sorted(groups[groups.map(len) > 1], key=len, reverse=True)
    images = sum(map(len, largest))
    return {"images": images, "groups": len(largest), "largest": largest[:LARGEST]}


def _mask_agreement(parts: list[Path], chosen: np.ndarray) -> float:
    """Correlation of the masks of two cases, pixel by pixel: 1 if all masks are the same."""
    total, count = np.zeros(1), int(chosen.sum())
    for _, masks in _chosen_of(parts, chosen):
        total = total + masks.sum(0, dtype=float)
    covered = total / count
    mean = covered.mean()
    varies = float(mean - mean**2)
    return float((covered**2).mean() - mean**2) / varies if varies > 0 else 0.0


def _warnings(
    cases: pd.DataFrame,
    chosen: np.ndarray,
    groups: Groups,
    source: Listing,
    cfg: PrepareConfig,
    agreement: float,
) -> Iterator[str]:
    """What may be wrong with the data, and the option that cures it."""
    files, cases = cases["file"].tolist(), cases[chosen]
    yield from source.doubts
    if source.release and source.release.caution and cfg.split != "test" and not cfg.group_by:
        yield source.release.caution
    if not source.official:
        yield from _warned_reading(cases, cfg)
    yield from _warned_groups(cases, groups, files)
    yield from _warned_names(cases, source) or _warned_labels(cases)
    if agreement > ALIKE:
        yield (
            f"the masks of different images hardly differ (correlation {agreement:.2f}), as fields "
            "of view do and lesions do not. Look at the contours in notebook 01"
        )
    elif not source.official:  # a known release is not inverted
        yield from _warned_inverted(cases[~cases["empty"] & (cases["volume"] == "")])


def _warned_reading(cases: pd.DataFrame, cfg: PrepareConfig) -> Iterator[str]:
    """What the user's own data may mean otherwise than they were read."""
    if cfg.split == "groups" and not (cfg.folds or cfg.split_file) and cases["official"].any():
        yield (
            "the data name a split (sub-folders or a column), and another one was drawn; give "
            "split = 'official' to use theirs"
        )
    upright = cases["notes"].map(lambda notes: UPRIGHT in notes)
    if upright.any():
        yield (
            f"{upright.sum()} images were turned as their EXIF data say, and their masks, which "
            f"have none, were not, such as that of {cases.loc[upright, 'file'].iloc[0]}. Look at "
            "the contours in notebook 01; if they do not fit, save the images upright"
        )
    if (lines := cases.loc[~cases["empty"], "filled"]).median() > OUTLINED:
        yield (
            f"the masks look like outlines: filled, the median lesion is {lines.median():.0f} "
            "times as large. Fill them if the whole lesion is meant"
        )


def _warned_groups(cases: pd.DataFrame, groups: Groups, files: list[str]) -> Iterator[str]:
    across = crossing(cases)
    if any(across.values()):
        yield (
            f"{across['test']} test and {across['val']} validation cases share a group (video, "
            "patient, near-duplicate) with a training case"
        )
    if groups.apart:
        i, j = groups.apart[0]
        yield (
            f"{len(groups.apart)} pairs of images show the same and are of groups with different "
            f"names, such as {files[i]} and {files[j]}. Names decide, so they stay apart; if the "
            "names are wrong, give one group to both"
        )


def _warned_names(cases: pd.DataFrame, source: Listing) -> list[str]:
    """Files whose names begin alike, nobody said why, and that are in several splits."""
    unnamed = cases[(cases["named"] == "") | (cases["named"] == cases["volume"])]
    listed = source.cases
    if source.official or not len(unnamed) or any(case.group for case in listed):
        return []
    suggested = suggested_groups(listed, source.folder)
    if not suggested:
        return []
    rule, groups = suggested
    keys = unnamed["volume"].where(unnamed["volume"] != "", unnamed["id"]).map(groups)
    across = unnamed.groupby(keys)["split"].nunique() > 1
    if not across.any():
        return []
    alike = unnamed.loc[keys == across.idxmax(), "file"].drop_duplicates()
    return [
        f"{across.sum()} sets of files whose names begin alike, such as {alike.iloc[0]} and "
        f"{alike.iloc[-1]}, are in more than one split. If a set is one patient, slide or video, "
        f"give group_by = '{rule}', which makes {len(across)} groups"
    ]


def _warned_labels(cases: pd.DataFrame) -> list[str]:
    """Classes or clinics with three groups or more that are missing from a split."""
    found = []
    splits = [name for name in SPLITS if (cases["split"] == name).any()]
    for label, part in cases[cases["label"] != ""].groupby("label"):
        missing = [name for name in splits if not (part["split"] == name).any()]
        if missing and part["group"].nunique() >= len(SPLITS):
            found.append(f"{label} ({len(part)} cases) from {' and '.join(missing)}")
    if not found:
        return []
    more = ", ..." if len(found) > 5 else ""
    return [
        f"missing from a split: {', '.join(found[:5])}{more}. Scores there say nothing about that "
        "class or clinic; another split_seed or larger fractions may help"
    ]


def _warned_inverted(lesions: pd.DataFrame) -> Iterator[str]:
    """Masks that may show the lesion black on white: all of them, or a few."""
    share = lesions["lesion_fraction"]
    around = lesions.loc[(lesions["border"] > AROUND) & (share < 1), "file"].tolist()
    if (median := share.median()) > 0.5:
        yield (
            f"the median lesion covers {median:.0%} of its image. If the masks show the lesion "
            "dark on a brighter background, give invert_masks = True; if it has several values, "
            "name all of them with lesion_values"
        )
    elif around:
        yield (
            f"{len(around)} masks are lesion along the border and nearly everywhere, those of "
            f"{', '.join(around[:5])}. If they show the lesion black on white, unlike the others, "
            "invert these files (invert_masks = True would invert all)"
        )


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
