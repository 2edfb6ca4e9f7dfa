"""The phone page: one HTML file that holds the student and needs no server and no connection."""

from __future__ import annotations

import base64
import gzip
import html
import json
import re
from importlib.resources import files
from pathlib import Path

import numpy as np

from ... import results
from ...predict import TrainedNetwork
from ..native import GOLDEN, pack, wasm
from ..parity import Deployed, at_size, torch_engine


def write_page(
    student: TrainedNetwork,
    network: Deployed,
    path: Path,
    about: list[str],
    threshold: float,
    golden: np.ndarray,
) -> None:
    """Write the page.

    Parameters
    ----------
    about : list of str
        Paragraphs on data, scores and limits, plain text.
    threshold : float
        First position of the slider, 0.05 to 0.95.
    golden : (S, S, 3) uint8
        The page segments this image when it loads, and says so if the mask is another one.
    """
    golden = at_size(golden[None], min(GOLDEN, student.pixels))
    settings = {
        "pixels": student.pixels,
        "fit": student.cfg.fit,
        "threshold": threshold,
        "golden": golden.shape[1],
    }
    filled = {
        "title": html.escape(f"Lesion segmentation: {student.cfg.dataset_name}"),
        "about": "".join(f"<p>{html.escape(text)}</p>" for text in about),
        "settings": json.dumps(settings).replace("<", "\\u003c"),
        "style": part("segment.css"),
        "script": part("network.js") + part("segment.js"),
        "relaxed": _packed(wasm(relaxed=True)),
        "simd": _packed(wasm()),
        "student": _packed(pack(network).tobytes()),
        "golden": _packed(golden.tobytes()),
        "mask": _packed(torch_engine(network)(golden).tobytes()),
    }
    page = re.sub(r"\{\{(\w+)\}\}", lambda found: filled[found[1]], part("segment.html"))
    results.write_text(path, page)


def part(name: str) -> str:
    """A file of the page."""
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def _packed(content: bytes) -> str:
    return base64.b64encode(gzip.compress(content, mtime=0)).decode()
