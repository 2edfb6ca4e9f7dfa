"""The phone page: one HTML file that holds the student and the runtime, and needs no server."""

from __future__ import annotations

import base64
import gzip
import html
import json
import re
from importlib.resources import files
from pathlib import Path

import numpy as np

from ... import store
from ...config import LesionKDError
from ...inference import TrainedNetwork

RUNTIME = "onnxruntime-web"
VERSION = "1.30.0"
ADDRESS = f"https://registry.npmjs.org/{RUNTIME}/-/{RUNTIME}-{VERSION}.tgz"
CHECKSUM = "sha256:d2228df7e4616bc3348bf504ee888f3bec43789a273f0a63f3e68d203ce3bf71"
PARTS = {"runtime": "ort.wasm.min.js", "glue": "ort-wasm-simd-threaded.mjs", "wasm": "ort-wasm-simd-threaded.wasm"}


def fetch_runtime(folder: Path | None = None, address: str = ADDRESS, checksum: str = CHECKSUM) -> dict[str, Path]:
    """The runtime's files from its npm package, checked against a checksum and kept in the user's cache.

    Raises
    ------
    LesionKDError
        It is not there and cannot be had, or is another file than the pinned one.
    """
    import pooch
    import requests

    folder = folder or pooch.os_cache("lesionkd_core")
    name, members = f"{RUNTIME}-{VERSION}.tgz", [f"package/dist/{part}" for part in PARTS.values()]
    pooch.get_logger().setLevel("WARNING")
    try:
        pooch.retrieve(address, checksum, fname=name, path=folder, processor=pooch.Untar(members=members, extract_dir=f"{RUNTIME}-{VERSION}"))
    except (requests.RequestException, ValueError, OSError) as error:
        raise LesionKDError(
            f"the phone page needs {RUNTIME} {VERSION} from {address}, which could not be had: {error}.\n"
            f"Run `make runtime` with a connection, put the pinned file into {folder} as {name}, or leave page out of formats."
        ) from None
    return {part: Path(folder) / f"{RUNTIME}-{VERSION}" / "package" / "dist" / file for part, file in PARTS.items()}


def check_look(student: TrainedNetwork) -> None:
    """Refuse a student whose images are prepared in a way that the page does not compute."""
    if student.cfg.clahe:
        raise LesionKDError(f"the student was trained with clahe = {student.cfg.clahe}, which the phone page does not compute; leave page out of formats")


def write_page(student: TrainedNetwork, network: Path, path: Path, about: list[str], threshold: float = 0.5, runtime: dict[str, Path] | None = None) -> None:
    """One HTML file with the runtime and an exported network (.onnx) inside.

    Parameters
    ----------
    about : list of str
        Paragraphs on data, scores and limits, plain text.
    threshold : float
        Where the slider stands at first, in 0.05..0.95.

    Raises
    ------
    LesionKDError
        The student's images are prepared in a way that the page does not compute (clahe).
    """
    check_look(student)
    cfg = student.cfg
    curve = (255 * (np.arange(256) / 255) ** cfg.gamma).round().astype(int).tolist() if cfg.gamma != 1 else None
    settings = {"pixels": cfg.pixels, "fit": cfg.fit, "colour": cfg.colour, "gamma": curve, "threshold": threshold}
    licence = f"Contains ONNX Runtime Web {VERSION}, Copyright (c) Microsoft Corporation, MIT licence."
    here = files(__package__)
    filled = {
        "title": html.escape(f"Lesion segmentation: {cfg.dataset_name}"),
        "about": "".join(f"<p>{html.escape(text)}</p>" for text in (*about, licence)),
        "settings": json.dumps(settings).replace("<", "\\u003c"),
        "style": here.joinpath("segment.css").read_text(encoding="utf-8"),
        "script": here.joinpath("segment.js").read_text(encoding="utf-8"),
        "network": _packed(network),
    } | {part: _packed(file) for part, file in (runtime or fetch_runtime()).items()}
    page = here.joinpath("segment.html").read_text(encoding="utf-8")
    store.write_text(path, re.sub(r"\{\{(\w+)\}\}", lambda found: filled[found[1]], page))


def _packed(file: Path) -> str:
    return base64.b64encode(gzip.compress(file.read_bytes(), mtime=0)).decode()
