"""Scores at the original size: images in their own pixels, volumes as a whole and in millimetres."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from . import store
from .config import DistillConfig, GraphConfig, LesionKDError, PrepareConfig, TeacherConfig
from .datasets import Case, Reading, fingerprint, read
from .datasets.volumes import space_of
from .evaluation import THRESHOLD, score_masks, surface_scores
from .inference import TrainedNetwork, load_network, predict
from .prepare import Prepared

TABLE = "per_case_original.csv"
TOLERANCE_MM = 2.0
"""Tolerance of a volume's surface Dice, mm."""
BATCH = 8
"""Images of original size in memory at a time."""


def score_original(run: str | Path | store.Result) -> pd.DataFrame:
    """Score a finished run's validation and test cases again at their original size.

    The raw release is read once more, the probability of every case is brought back to its own size
    and cut at 0.5. Volumes are scored as a whole, with the slices that the preparation dropped.

    Parameters
    ----------
    run : Run, or the folder of a teacher or student run

    Returns
    -------
    DataFrame
        A row a case, `level` 'image': columns of `score_masks`; hd95 and the 2 px of surface_dice are
        px of the original. A row a volume, `level` 'volume': those of `score_volume`, in mm. Kept as
        `per_case_original.csv` in the run's folder, and read from there the next time.

    Raises
    ------
    DatasetNotFound, LesionKDError
        The release or its prepared arrays are gone, or are no longer those that the run was made from.
    """
    student = load_network(run)
    path = student.path / TABLE
    if not path.exists():
        prepared, raw = _made_from(student)
        store.write_table(path, _score(student, prepared, raw))
    return store.read_table(path)


def _made_from(student: TrainedNetwork) -> tuple[Prepared, list[Case]]:
    """The prepared arrays that a run was made from, and the raw cases, unchanged since."""
    cfg, where = student.cfg, store.short(student.path)
    release, raw = fingerprint(cfg)
    if not raw:
        raise LesionKDError(f"{cfg.dataset} is drawn at the prepared size: per_case.csv of {where} is at the original size already")
    path = store.folder(cfg.upstream(PrepareConfig), release)
    digest = cfg.upstream(PrepareConfig).digest(release)
    if isinstance(cfg, DistillConfig) and cfg.terms:  # a student hangs on its teacher, perhaps by a graph
        digest = cfg.upstream(TeacherConfig).digest(digest)
        digest = cfg.upstream(GraphConfig).digest(digest) if "edge" in cfg.terms else digest
    if not store.is_done(path) or store.read_json(student.path / "config.json")["upstream"] != digest:
        raise LesionKDError(
            f"{where} was made from another state of {cfg.dataset}: the release (files, masks, groups) has changed since, or its prepared arrays\n"
            "were removed. Put the release back as it was, or run the notebook again."
        )
    return Prepared(path), raw


def _score(student: TrainedNetwork, prepared: Prepared, raw: list[Case]) -> pd.DataFrame:
    table = prepared.cases
    splits = table[table["volume"] != ""].groupby("volume")["split"].nunique()
    if len(torn := splits[splits > 1]):
        raise LesionKDError(f"slices of {len(torn)} volumes, such as {torn.index[0]!r}, lie in several splits; scores of volumes want split = 'groups'")
    table = table[table["split"].isin(("val", "test"))]
    about = table.set_index("id")[["group", "split", "label"]]
    volumes = table.drop_duplicates("volume").set_index("volume")[["group", "split", "label"]]
    wanted = {case.id: case for case in raw if case.id in about.index or case.id in volumes.index}
    rows: list[dict[str, Any]] = []
    for volume, slices in groupby(_predicted(student, list(wanted.values())), key=lambda part: part[0].volume):
        stack = []
        for reading, predicted in slices:
            if reading.id in about.index:  # not dropped by the preparation
                scores = score_masks(predicted[None], reading.mask[None]).iloc[0]
                rows.append({"level": "image", "id": reading.id, **about.loc[reading.id], **scores})
            if volume:
                stack.append((predicted, reading.mask))
        if volume:
            predicted, truth = map(np.stack, zip(*stack))
            scores = score_volume(predicted, truth, space_of(wanted[volume].image).spacing)
            rows.append({"level": "volume", "id": volume, **volumes.loc[volume], **scores})
    return pd.DataFrame(rows)


def _predicted(student: TrainedNetwork, cases: list[Case]) -> Iterator[tuple[Reading, np.ndarray]]:
    """Every image and slice with its predicted mask (H, W) bool, a few in memory at a time."""
    readings = (reading for case in cases for reading in read(case, student.cfg.window))
    while batch := list(islice(readings, BATCH)):
        for reading, probability in zip(batch, predict(student, [reading.image for reading in batch])):
            yield reading, probability > THRESHOLD


def score_volume(predicted: np.ndarray, truth: np.ndarray, spacing: tuple[float, float, float]) -> dict[str, float]:
    """Score the mask of a volume in three dimensions and millimetres.

    Parameters
    ----------
    predicted, truth : (D, H, W) bool
    spacing : (3,)
        Between slices, rows and columns, mm.

    Returns
    -------
    dict
        dice, iou, sensitivity, precision in 0..1; hd95_mm; surface_dice_mm at 2 mm in 0..1; lesion_ml,
        predicted_ml; lesion_pixels, predicted_pixels (voxels); missed and false_alarm, 0 or 1. Empty
        masks as in `score_masks`, with the diagonal of the volume in mm.

    Source: DESIGN, Scores; distances from MONAI.
    """
    hit, lesion, marked = (np.count_nonzero(m) for m in (predicted & truth, truth, predicted))
    either = lesion + marked - hit
    ml = float(np.prod(spacing)) / 1000
    if lesion and marked:
        either_mask = predicted | truth  # distances in the box that holds both
        box = tuple(slice(max(0, held[0] - 1), held[-1] + 2) for axes in ((1, 2), (0, 2), (0, 1)) for held in [np.flatnonzero(either_mask.any(axes))])
        [hd95], [surface] = surface_scores(predicted[box][None], truth[box][None], TOLERANCE_MM, spacing)
    else:
        hd95, surface = (float(np.linalg.norm(np.multiply(truth.shape, spacing))), 0.0) if either else (0.0, 1.0)
    return {
        "dice": 2 * hit / (lesion + marked) if either else 1.0, "iou": hit / either if either else 1.0,
        "sensitivity": hit / lesion if lesion else np.nan, "precision": hit / marked if marked else np.nan,
        "lesion_pixels": lesion, "predicted_pixels": marked, "missed": int(lesion > 0 and not hit), "false_alarm": int(marked > 0 and not lesion),
        "hd95_mm": hd95, "surface_dice_mm": surface, "lesion_ml": lesion * ml, "predicted_ml": marked * ml,
    }
