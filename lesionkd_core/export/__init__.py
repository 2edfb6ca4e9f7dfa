"""Take a trained student to phones: files, a comparison with PyTorch, a page, a model card."""

from __future__ import annotations

import re
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from .. import results
from ..analysis.inspect import spread_of_cases
from ..config import DistillConfig, ExportConfig, LesionKDError, PrepareConfig
from ..data.layouts import DatasetNotFound
from ..data.prepare import Prepared, prepare
from ..models import parameter_count
from ..predict import STUDENTS, TrainedNetwork, load_student, save_student
from ..results import log
from .coreml import write_coreml
from .executorch import executorch_engine, write_executorch
from .native import native_engine, pack, write_native
from .onnx import onnx_engine, write_half, write_int8, write_onnx
from .page import write_page
from .parity import MULTIPLE, Deployed, Engine, at_size, check_parity, parity, torch_engine

NEEDS = {
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "executorch": ("executorch", "torchao"),
    "coreml": ("coremltools",),
    "native": ("ziglang",),
    "page": ("ziglang",),
}
"""Packages of the extra `mobile` by format."""
INTENDED = (
    "Research: comparing, measuring and demonstrating small segmentation networks on devices."
)
LIMITS = (
    "Not a medical device; not for diagnosis, screening or treatment. It finds what resembles its "
    "training images. Other cameras, scanners, skin tones, organs and populations were not tested "
    "unless a table says so. It also returns a mask where there is no lesion."
)
PATENT = (
    "The method is the subject of a patent application (Zhejiang University of Technology, 2021); "
    "ask for the rights before commercial use."
)


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
        image = np.asarray(Image.open(self.path / "golden.png"))[None]
        mask = np.asarray(Image.open(self.path / "golden_mask.png"))
        engines = [onnx_engine(f, "") for f in sorted(self.path.glob("student*.onnx"))]
        if (model := self.path / "native" / "student.npy").exists():
            engines.append(native_engine(results.read_array(model, mmap=False), model))
        rows = []
        for engine in engines:
            if engine.file and engine.file.name != "student-logits.onnx":
                gap = np.abs(engine(image)[0].astype(int) - mask)
                what = {
                    "largest difference": int(gap.max()),
                    "pixels that differ": int((gap > 0).sum()),
                }
                rows.append({"engine": engine.name, "file": engine.file.name} | what)
        return pd.DataFrame(rows)

    def __repr__(self) -> str:
        return f"Exported({results.short(self.path)}: {', '.join(self.model['files'])})"


def export_student(cfg: ExportConfig, student: TrainedNetwork) -> Exported:
    """Write a student in every format of `cfg` and compare each with PyTorch on test cases (S7).

    Raises
    ------
    LesionKDError
        The run is not a student, or the converter of a format is not installed.
    ParityError
        A file does not compute what the student computes. The export is then left unfinished.
    """
    if not isinstance(student.cfg, DistillConfig):
        raise LesionKDError(f"{student.path} is a teacher; give the folder of a student")
    for name in cfg.formats:
        for package in NEEDS[name]:
            if find_spec(package) is None:
                raise LesionKDError(
                    f"the format {name} needs the package {package}, which is not installed: "
                    f"pip install -e '.[mobile]', or leave {name} out of formats."
                )
    network = Deployed(student.network)
    if {"native", "page"} & set(cfg.formats):
        pack(network)  # refuses what these formats do not take

    def make(missing: dict[Path, ExportConfig]) -> None:
        for path, made in missing.items():
            _export(made, student, network, path)

    return results.find_or_make([results.Wanted(cfg, student.digest)], make, Exported)[0]


def _export(cfg: ExportConfig, student: TrainedNetwork, network: Deployed, path: Path) -> None:
    data, notes = _images(student), {}
    engines: list[tuple[Engine, int]] = []
    golden = _golden(network, data, path)
    sizes = tuple(sorted({student.pixels, *cfg.sizes}))
    images = data.images[spread_of_cases(data, "train", cfg.calibration)]
    if "onnx" in cfg.formats:
        log.info("writing ONNX")
        write_onnx(network, path / "student.onnx")
        write_half(path / "student.onnx", path / "student-fp16.onnx")
        write_int8(path / "student.onnx", path / "student-int8.onnx", images)
        for suffix, precision in (("", "float32"), ("-fp16", "float16"), ("-int8", "int8")):
            engine = onnx_engine(path / f"student{suffix}.onnx", precision)
            engines.append((engine, student.pixels))
        if cfg.logits:
            write_onnx(Deployed(student.network, logits=True), path / "student-logits.onnx")
    if "executorch" in cfg.formats:
        log.info("writing ExecuTorch")
        write_executorch(network, path / "student.pte", sizes)
        calibration = {s: at_size(images, s) for s in sizes}
        write_executorch(network, path / "student-int8.pte", sizes, calibration)
        for suffix, precision in (("", "float32"), ("-int8", "int8")):
            engine = executorch_engine(path / f"student{suffix}.pte", precision)
            engines += [(engine, size) for size in sizes]
    if "coreml" in cfg.formats:
        log.info("writing Core ML")
        mlpackage = path / "student.mlpackage"
        notes[mlpackage.name] = write_coreml(network, mlpackage, student.pixels)
    if "native" in cfg.formats:
        log.info("writing C")
        write_native(network, path / "native", golden)
        results.write_array(path / "native" / "student.npy", pack(network))
        engine = native_engine(pack(network), path / "native" / "segment.c")
        engines += [(engine, size) for size in sizes]
    log.info("comparing with PyTorch")
    rows = data.index("test")
    reference, masks = torch_engine(network), data.masks[rows]
    table = parity(reference, engines, data.images[rows], masks, cfg.threshold)
    results.write_table(path / "parity.csv", table)  # first, so that a refusal can be examined
    if engines:
        check_parity(table)
    about = facts(student)
    if "page" in cfg.formats:
        write_page(student, network, path / "segment.html", about, cfg.threshold, golden)
    results.write_text(path / "model_card.md", model_card(student, about, table, cfg.threshold))
    results.write_json(path / "model.json", _settings(cfg, student, path, notes))


def _images(student: TrainedNetwork) -> Prepared:
    """The data set of the student; of a published student that is not here, the phantom."""
    try:
        return prepare(student.cfg)
    except DatasetNotFound:
        if student.path.is_dir():
            raise
    log.warning(f"{student.cfg.dataset} is not here: files are compared on images of the phantom")
    return prepare(student.cfg.upstream(PrepareConfig).with_values(dataset="phantom", folds=0))


def _golden(network: Deployed, data: Prepared, path: Path) -> np.ndarray:
    """Write a test image at the network's size and its mask image: what an app must reproduce."""
    rows = spread_of_cases(data, "test", 3)
    image = np.asarray(data.images[rows[len(rows) // 2]])
    mask = torch_engine(network)(image[None])[0]
    for name, pixels in (("golden.png", image), ("golden_mask.png", mask)):
        with results.replacing(path / name) as partial:
            Image.fromarray(pixels).save(partial, format="PNG")
    return image


def _settings(
    cfg: ExportConfig, student: TrainedNetwork, path: Path, notes: dict[str, str]
) -> dict[str, Any]:
    made: Any = student.cfg
    packages = ("torch", "onnx", "onnxruntime", "executorch", "torchao", "coremltools", "ziglang")
    kinds = {".onnx", ".pte", ".html", ".mlpackage", ".c", ".h", ".so", ".o"}
    found = sorted(p for p in path.rglob("*") if p.suffix in kinds and ".mlpackage/" not in str(p))
    sizes = sorted({made.pixels, *cfg.sizes}) if "executorch" in cfg.formats else []
    sums = results.checksums(path)
    return {
        "network": {
            "width": made.width,
            "stem": made.stem,
            "parameters": parameter_count(student.network),
            "run": student.path.name,
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
        "size": made.pixels,
        "fit": made.fit,
        "window": made.window,
        "resize": "Pillow's BOX where the image shrinks both ways, BILINEAR otherwise; "
        "the mask comes back BILINEAR",
        "threshold": cfg.threshold,
        "threshold_byte": 255 * cfg.threshold,
        "executorch": {"methods": [f"forward_{s}" for s in sizes]},
        "made_with": {name: version(name) for name in packages if find_spec(name)},
        "golden": {"image": "golden.png", "mask": "golden_mask.png"},
        "files": {
            file.relative_to(path).as_posix(): {
                "bytes": sum(f.stat().st_size for f in [file, *file.rglob("*")] if f.is_file()),
                "sha256": sums.get(file.relative_to(path).as_posix()),
                "note": notes.get(file.name, ""),
            }
            for file in found
        },
    }


def publish_student(run: results.Result, name: str, image: np.ndarray) -> Path:
    """Write data/students/NAME.safetensors with a model card, an image and its mask.

    Parameters
    ----------
    run : Result
        A finished `distill` run.
    image : (H, W, 3) uint8
        Stored beside the student, so that a test can repeat its mask; one that may be published,
        such as a case of the phantom.
    """
    student, file = load_student(run), STUDENTS / f"{name}.safetensors"
    results.make_folder(STUDENTS)
    save_student(student, file)
    student = load_student(file)
    mask = np.rint(255 * student.predict([image])[0]).astype(np.uint8)
    for kind, pixels in (("input", image), ("mask", mask)):
        with results.replacing(STUDENTS / f"{name}-{kind}.png") as partial:
            Image.fromarray(pixels).save(partial, format="PNG")
    results.write_text(file.with_suffix(".md"), model_card(student, facts(student)))
    return file


# The model card -----------------------------------------------------------------------------------


def licence_of(dataset: str) -> str:
    """The licence in the data set's card in data/, or a note that it is not known."""
    card = results.CHECKOUT / "data" / f"{dataset}.md"
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    found = re.search(r"^\| Licence \| (.+) \|$", text, re.M)
    return found[1] if found else "not known; state it before you pass the model on"


def facts(student: TrainedNetwork) -> list[str]:
    """Training, scores, licence, use, limits and rights: six paragraphs of plain text."""
    cfg, test = student.cfg, student.summary["test"]
    assert isinstance(cfg, DistillConfig)
    how = f"with {', '.join(cfg.terms)} from a {cfg.teacher} teacher" if cfg.terms else "alone"
    dice, empty = test["dice"], test["cases"] - test["lesions"]
    alarms = f"{test['false_alarms']} false alarms on {empty} images without a lesion"
    return [
        f"A U-Net of width {cfg.width} with {parameter_count(student.network):,} parameters, "
        f"trained {how} on {cfg.dataset_name} at {cfg.pixels} px (profile {cfg.profile}, seed "
        f"{cfg.seed}).",
        f"On {test['cases']} test cases in {test['groups']} groups, at threshold 0.5: Dice (95 % "
        f"interval) {results.with_interval(dice)}, {test['missed']} of {test['lesions']} lesions "
        f"missed, {alarms}.",
        f"Licence of the training data: {licence_of(cfg.dataset_name)}.",
        INTENDED,
        LIMITS,
        PATENT,
    ]


def model_card(
    student: TrainedNetwork, about: list[str], table: pd.DataFrame | None = None, at: float = 0.5
) -> str:
    """The model card in Markdown, with the scores and the parity of every file.

    `at` is the threshold that the exported files use.
    """
    made, scores, licence, intended, limits, patent = about
    test = student.summary["test"]
    metrics = {n: v for n, v in test.items() if isinstance(v, dict) and v.get("mean") is not None}
    rows = [{"metric": n, "mean": results.with_interval(v)} for n, v in metrics.items()]
    scored = pd.DataFrame(rows)
    intervals = (
        "Means over test cases with 95 % intervals (bootstrap over groups), at threshold 0.5."
    )
    parts = [f"# Model card: {student.path.stem}", made, "## Scores", scores]
    parts += [intervals, scored.to_markdown(index=False, disable_numparse=True)]
    if table is not None:
        parts += ["## The same model in every file"]
        parts += [
            f"The page and model.json use threshold {at}. Differences from PyTorch in float32:"
        ]
        shown = table.drop(columns="rule", errors="ignore")
        parts += [shown.to_markdown(index=False, floatfmt=".4f")]
    parts += ["## Intended use", intended, "## Limits", limits, "## Data and rights"]
    return "\n\n".join([*parts, licence, patent]) + "\n"
