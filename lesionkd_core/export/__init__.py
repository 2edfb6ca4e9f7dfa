"""Take a trained student to phones: files, a comparison with PyTorch, a page, a model card.

A format is one file of this package (`formats.Format`), imported here.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from .. import results
from ..config import DistillConfig, LesionKDError
from ..data.images import read_image
from ..data.layouts import DatasetNotFound, window_of
from ..data.phantom import draw
from ..data.pixels import prepare_image, prepare_mask
from ..data.prepare import prepare
from ..models import parameter_count
from ..predict import TrainedNetwork, save_png
from ..results import log
from . import coreml, executorch, native, onnx, page  # noqa: F401  (registers them)
from .card import facts, model_card, parity_section, published_card
from .config import ExportConfig
from .formats import FORMATS, INT8_CASES, Compared, Job, Samples, check_installed
from .onnx import load_onnx
from .parity import MULTIPLE, Deployed, check_parity, parity, torch_engine

__all__ = ["ExportConfig", "Exported", "export_student", "load_onnx"]
DRAWN = 8
"""Phantoms that a published student is compared on, beside its own picture."""


class Exported(results.Result):
    """A finished export."""

    @property
    def parity(self) -> pd.DataFrame:
        """One row for each engine, precision and size: its differences from PyTorch."""
        return results.read_table(self.path / "parity.csv")

    @property
    def model(self) -> dict[str, Any]:
        """What an app must know: layout, size, resizing, colour order, threshold, checksums."""
        content: dict[str, Any] = results.read_json(self.path / "model.json")
        return content

    def golden(self) -> pd.DataFrame:
        """Compare ONNX files and C code with the golden mask, as an app's first test does."""
        picture = np.asarray(Image.open(self.path / "golden.png"))
        expected = np.asarray(Image.open(self.path / "golden_mask.png"))
        masks = {}
        for file in sorted(self.path.glob("student*.onnx")):
            [probability] = load_onnx(file).predict([picture])
            masks["ONNX Runtime", file.name] = np.rint(255 * probability)
        if (file := self.path / "native" / "student.bin").exists():
            model = np.fromfile(file, np.float32)
            masks["native", file.name] = native.segment_image(model, picture)
        rows = []
        for (engine, name), mask in masks.items():
            gap = np.abs(mask.astype(int) - expected)
            rows.append(
                {
                    "engine": engine,
                    "file": name,
                    "largest difference": int(gap.max()),
                    "pixels that differ": int((gap > 0).sum()),
                }
            )
        return pd.DataFrame(rows)

    def __repr__(self) -> str:
        return f"Exported({results.short(self.path)}: {', '.join(self.model['files'])})"


def export_student(cfg: ExportConfig, student: TrainedNetwork) -> Exported:
    """Write a student in every format of `cfg` and compare each with PyTorch on test cases (S7).

    Raises
    ------
    LesionKDError
        The run is not a student, a format cannot hold it, or a package of a format is missing.
    ParityError
        A file does not compute what the student computes. The export is then left unfinished.
    """
    if not isinstance(student.cfg, DistillConfig):
        raise LesionKDError(f"{student.path} is a teacher; give the folder of a student")
    check_installed(cfg.formats)
    network = Deployed(student.network)
    for name in cfg.formats:
        FORMATS[name].check(network)

    def make(missing: dict[Path, ExportConfig]) -> None:
        for path, made in missing.items():
            _export(made, student, network, path)

    return results.find_or_make([results.Wanted(cfg, student.digest)], make, Exported)[0]


def _export(cfg: ExportConfig, student: TrainedNetwork, network: Deployed, path: Path) -> None:
    sizes = tuple(sorted({student.pixels, *cfg.sizes}))
    about, samples = facts(student), _samples(student)
    job = Job(student, network, path, samples, sizes, cfg.threshold, about)
    for name, pixels in zip(("golden.png", "golden_mask.png"), job.golden):
        save_png(path / name, pixels)
    compared: list[Compared] = []
    for name in cfg.formats:
        log.info(f"writing {name}")
        compared += FORMATS[name].write(job)
    log.info("comparing with PyTorch")
    engines = [(engine, size) for engine, at in compared for size in at]
    reference = torch_engine(network)
    table = parity(reference, engines, samples.images, samples.masks, cfg.threshold)
    results.write_table(path / "parity.csv", table)  # first, so that a refusal can be examined
    if engines:
        check_parity(table)
    card = published_card(student) or model_card(student, about)
    section = parity_section(table, cfg.threshold)
    results.write_text(path / "model_card.md", card + section)
    results.write_json(path / "model.json", _settings(job, cfg.formats))


def _samples(student: TrainedNetwork) -> Samples:
    """Cases of the student's data set; of a published student whose data are not here, its own
    picture and a few drawn ones."""
    try:
        data = prepare(student.cfg)
    except DatasetNotFound:
        if student.path.is_dir():
            raise
        return _drawn(student)
    test, train = data.index("test"), data.index("train")
    train = train[:: len(train) // INT8_CASES + 1]
    return Samples(data.images[test], data.masks[test].astype(bool), np.array(data.images[train]))


def _drawn(student: TrainedNetwork) -> Samples:
    log.warning(
        f"{student.cfg.dataset} is not here: files are compared on {DRAWN} drawn pictures, and on "
        "the one that was published with the student"
    )
    cfg, images, masks = student.cfg, [], []
    for i in range(DRAWN):
        picture, mask = draw(0, i, cfg.pixels)
        images.append(prepare_image(picture, cfg))
        masks.append(prepare_mask(mask, cfg))
    own = student.path.with_name(f"{student.path.stem}-input.png")
    if own.is_file():
        picture = read_image(own)
        [probability] = student.predict([picture])
        images.append(prepare_image(picture, cfg))
        masks.append(prepare_mask(probability > 0.5, cfg))
    return Samples(np.stack(images), np.stack(masks), np.stack(images))


def _settings(job: Job, formats: tuple[str, ...]) -> dict[str, object]:
    cfg: Any = job.student.cfg
    packages = {package for name in formats for package in FORMATS[name].packages}
    sums = results.checksums(job.folder)
    files: dict[str, object] = {}
    for file in _written(job.folder):
        name = file.relative_to(job.folder).as_posix()
        about = {"bytes": results.size_of(file), "sha256": sums.get(name)}
        files[name] = about | {"note": job.notes.get(file.name, "")}
    return {
        "network": {
            "width": cfg.width,
            "parameters": parameter_count(job.student.network),
            "run": job.student.path.name,
        },
        "input": {
            "name": "image",
            "layout": "NHWC",
            "type": "uint8",
            "colour_order": "RGB",
            "range": [0, 255],
            "multiple": MULTIPLE,
            "normalization": "inside the network",
        },
        "output": {
            "name": "mask",
            "layout": "NHW",
            "type": "uint8",
            "meaning": "probability of lesion x 255",
        },
        "size": cfg.pixels,
        "fit": cfg.fit,
        "window": window_of(cfg),
        "resize": "Pillow's BOX where the image shrinks both ways, BILINEAR otherwise; "
        "the mask comes back BILINEAR; lesion_segment_image does both",
        "threshold": job.threshold,
        "threshold_byte": 255 * job.threshold,
        **job.settings,
        "made_with": {name: version(name) for name in sorted({"torch", *packages})},
        "golden": {"picture": "golden.png", "mask": "golden_mask.png"},
        "files": files,
    }


def _written(folder: Path) -> Iterator[Path]:
    """What the formats wrote; an .mlpackage is a folder and counts as one file."""
    for path in sorted(folder.rglob("*")):
        inside = ".mlpackage" in {parent.suffix for parent in path.parents}
        written = path.suffix == ".mlpackage" or (path.is_file() and path.name not in OWN)
        if written and not inside:
            yield path


OWN = {"config.json", "env.json", "parity.csv", "model_card.md", "golden.png", "golden_mask.png"}
"""Files of an export that no format wrote."""
