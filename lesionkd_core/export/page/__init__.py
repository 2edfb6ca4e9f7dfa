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
from ..formats import Compared, Format, Job, register
from ..native import pack, wasm
from ..parity import Deployed


@register
class Page(Format):
    """segment.html."""

    name = "page"
    packages = ("ziglang",)

    def check(self, network: Deployed) -> None:
        """Refuse what `pack` refuses."""
        pack(network, 32)

    def write(self, job: Job) -> list[Compared]:
        """Write the page. It compares itself with the golden mask whenever it is opened."""
        model = pack(job.network, job.student.pixels, job.student.cfg.fit, job.threshold)
        title = f"Lesion segmentation: {job.student.cfg.dataset_name}"
        write_page(model, job.folder / "segment.html", title, job.about, *job.golden)
        return []


def write_page(
    model: np.ndarray,
    path: Path,
    title: str,
    about: list[str],
    picture: np.ndarray,
    mask: np.ndarray,
) -> None:
    """Write the page.

    Parameters
    ----------
    model : (N,) float32
        From `pack`; its threshold is the first position of the slider.
    about : list of str
        Paragraphs on data, scores and limits, plain text.
    picture, mask : (H, W, 3) uint8, (H, W) uint8
        The page segments this picture when it loads, and says so if the mask is another one.
    """
    settings = {"threshold": float(model[4]), "golden": [*mask.shape[::-1]]}
    filled = {
        "title": html.escape(title),
        "about": "".join(f"<p>{html.escape(text)}</p>" for text in about),
        "settings": json.dumps(settings).replace("<", "\\u003c"),
        "style": part("segment.css"),
        "script": part("network.js") + part("segment.js"),
        "relaxed": _packed(wasm(relaxed=True)),
        "simd": _packed(wasm()),
        "student": _packed(model.tobytes()),
        "golden": _packed(picture.tobytes()),
        "mask": _packed(mask.tobytes()),
    }
    page = re.sub(r"\{\{(\w+)\}\}", lambda found: filled[found[1]], part("segment.html"))
    results.write_text(path, page)


def part(name: str) -> str:
    """A file of the page."""
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def _packed(content: bytes) -> str:
    return base64.b64encode(gzip.compress(content, mtime=0)).decode()
