"""A finished student on its way to phones: files, proof that they are the same model, a page, a model card."""

from __future__ import annotations

import hashlib
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from .. import store
from ..config import DistillConfig, ExportConfig, LesionKDError
from ..inference import TrainedNetwork, load_student
from ..prepare import Prepared, prepare_data
from ..progress import Tell
from ..stages import distill
from ..views import spread_of_cases
from .card import facts, model_card
from .deploy import MULTIPLE, Deployed
from .engines import Engine, executorch_engine, onnx_engine, torch_engine
from .page import check_look, fetch_runtime, write_page
from .parity import at_size, check_parity, parity
from .to_coreml import write_coreml
from .to_executorch import write_executorch
from .to_onnx import write_half, write_int8, write_onnx

NEEDS = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "executorch": ("executorch", "torchao"), "coreml": ("coremltools",)}
"""Packages of the extra `mobile` by format; ONNX is always written, since the page holds it."""


class Exported(store.Result):
    """A finished export: the files of `files`, and the table that says they are the same model."""

    @property
    def parity(self) -> pd.DataFrame:
        """One row an engine, precision and size: how far it is from PyTorch on test cases."""
        return pd.read_csv(self.path / "parity.csv")

    @property
    def model(self) -> dict[str, Any]:
        """What an app must know: layout, size, resize rule, colour order, threshold, checksums."""
        return self._json("model.json")

    def __repr__(self) -> str:
        return f"Exported({store.short(self.path)}: {', '.join(self.model['files'])})"


def export_student(cfg: ExportConfig, tell: Tell = print) -> Exported:
    """Write a finished student in every format asked for, and hold each against PyTorch on test cases (step S7).

    Raises
    ------
    UnfinishedRun, LesionKDError
        `run` is no finished student, or a format's converter is not installed.
    ParityError
        A file is not the network that was trained; nothing is declared finished then.
    """
    student = load_student(cfg.run or distill(DistillConfig(profile=cfg.profile, device=cfg.device, threads=cfg.threads), tell))
    run = store.read_json(student.path / "config.json")
    path = store.runs_root() / cfg.stage / f"{student.path.name.rpartition('-')[0] or student.path.name}-{cfg.digest(run['digest'])[:8]}"
    if not store.is_done(path):
        _check(cfg, student)
        with store.lock(path, tell):
            if not store.is_done(path):
                _export(cfg, student, path, run["digest"], tell)
    return Exported(path)


def _check(cfg: ExportConfig, student: TrainedNetwork) -> None:
    """What is missing is said before minutes of work."""
    for name, modules in NEEDS.items():
        if name != "onnx" and name not in cfg.formats:
            continue
        for module in modules:
            if find_spec(module) is None:
                cure = "" if name == "onnx" else f", or leave {name} out of formats"
                raise LesionKDError(f"exporting to {name} needs the package {module}, which is not installed: pip install -e '.[mobile]'{cure}")
    if "page" in cfg.formats:
        check_look(student)
        fetch_runtime()


def _export(cfg: ExportConfig, student: TrainedNetwork, path: Path, upstream: str, tell: Tell) -> None:
    prepared = prepare_data(student.cfg, tell)
    store.begin(path, cfg, upstream)
    network, engines, notes = Deployed(student.network).eval(), [], {}
    sizes = tuple(sorted({student.pixels, *cfg.sizes}))
    calibration = prepared.images[spread_of_cases(prepared, "train", cfg.calibration)]
    tell("writing ONNX")
    write_onnx(network, path / "student.onnx")
    engines.append((onnx_engine(path / "student.onnx", "float32"), student.pixels))
    if cfg.logits:
        write_onnx(Deployed(student.network, logits=True).eval(), path / "student-logits.onnx")
    if "onnx" in cfg.formats:
        write_half(path / "student.onnx", path / "student-fp16.onnx")
        write_int8(path / "student.onnx", path / "student-int8.onnx", calibration)
        for file, precision in (("student-fp16.onnx", "float16"), ("student-int8.onnx", "int8")):
            engines.append((onnx_engine(path / file, precision), student.pixels))
    if "executorch" in cfg.formats:
        tell("writing ExecuTorch")
        write_executorch(network, path / "student.pte", sizes)
        write_executorch(network, path / "student-int8.pte", sizes, {s: at_size(calibration, s) for s in sizes})
        for file, precision in (("student.pte", "float32"), ("student-int8.pte", "int8")):
            engine = executorch_engine(path / file, precision)
            engines += [(engine, size) for size in sizes]
    if "coreml" in cfg.formats:
        tell("writing Core ML")
        notes["student.mlpackage"] = write_coreml(network, path / "student.mlpackage", student.pixels)
    _prove(cfg, network, engines, prepared, path, tell)
    about = facts(student)
    if "page" in cfg.formats:
        write_page(student, path / "student.onnx", path / "segment.html", about, cfg.threshold)
    _golden(network, prepared, path)
    store.write_text(path / "model_card.md", model_card(student, Exported(path).parity, cfg.threshold))
    store.write_json(path / "model.json", _settings(cfg, student, path, notes))
    store.finish(path)


def _prove(cfg: ExportConfig, network: Deployed, engines: list[tuple[Engine, int]], prepared: Prepared, path: Path, tell: Tell) -> None:
    tell("comparing with PyTorch")
    rows = prepared.index("test")
    table = parity(torch_engine(network), engines, prepared.images[rows], prepared.masks[rows], cfg.threshold)
    store.write_table(path / "parity.csv", table)  # written first, so that a refusal can be looked at
    check_parity(table, prepared.images.shape[1])


def _golden(network: Deployed, prepared: Prepared, path: Path) -> None:
    """An image as the network sees it and the mask image that it gives: what an app must reproduce."""
    rows = spread_of_cases(prepared, "test", 3)
    image = np.asarray(prepared.images[rows[len(rows) // 2]])
    for name, pixels in (("golden.png", image), ("golden_mask.png", torch_engine(network)(image[None])[0])):
        with store.replacing(path / name) as partial:
            Image.fromarray(pixels).save(partial, format="PNG")


def _settings(cfg: ExportConfig, student: TrainedNetwork, path: Path, notes: dict[str, str]) -> dict[str, Any]:
    made = student.cfg
    assert isinstance(made, DistillConfig)
    files = sorted(p for p in path.iterdir() if p.suffix in (".onnx", ".pte", ".html") or p.suffix == ".mlpackage")
    return {
        "network": {"width": made.width, "stem": made.stem, "parameters": sum(p.numel() for p in student.network.parameters()), "run": student.path.name},
        "input": {"name": "image", "layout": "NHWC", "type": "uint8", "colour_order": "RGB", "range": [0, 255], "multiple": MULTIPLE,
                  "normalization": "inside the network"},
        "output": {"name": "mask", "layout": "NHW", "type": "uint8", "meaning": "probability of lesion x 255"},
        "size": made.pixels, "fit": made.fit, "colour": made.colour, "clahe": made.clahe, "gamma": made.gamma,
        "resize": "Pillow's BOX where the image shrinks both ways, BILINEAR otherwise; the mask comes back BILINEAR",
        "threshold": cfg.threshold, "threshold_byte": 255 * cfg.threshold,
        "executorch": {"methods": [f"forward_{s}" for s in sorted({made.pixels, *cfg.sizes})]} if "executorch" in cfg.formats else None,
        "made_with": {name: version(name) for name in ("torch", "onnx", "onnxruntime", "executorch", "torchao", "coremltools") if find_spec(name)},
        "golden": {"image": "golden.png", "mask": "golden_mask.png"},
        "files": {p.name: {"bytes": _size(p), "sha256": None if p.is_dir() else hashlib.sha256(p.read_bytes()).hexdigest(), "note": notes.get(p.name, "")}
                  for p in files},
    }


def _size(path: Path) -> int:
    return sum(p.stat().st_size for p in path.rglob("*") if p.is_file()) if path.is_dir() else path.stat().st_size


def segment_golden(exported: Exported) -> pd.DataFrame:
    """Run every ONNX file of an export on its golden image, as an app's first test would, and compare with the golden mask."""
    golden = {name: np.asarray(Image.open(exported.path / file)) for name, file in exported.model["golden"].items()}
    rows = []
    for file in sorted(set(exported.path.glob("*.onnx")) - {exported.path / "student-logits.onnx"}):
        gap = np.abs(onnx_engine(file, "")(golden["image"][None])[0].astype(int) - golden["mask"])
        rows.append({"file": file.name, "largest difference": int(gap.max()), "pixels that differ": int((gap > 0).sum())})
    return pd.DataFrame(rows)
