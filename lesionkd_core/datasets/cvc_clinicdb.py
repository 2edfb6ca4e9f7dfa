"""CVC-ClinicDB: colonoscopy frames in `Original`, masks in `Ground Truth`, 29 videos."""

import csv
from pathlib import Path

from ..store import CHECKOUT
from .files import Case, by_stem, images_in

VIDEOS = CHECKOUT / "data" / "cvc-clinicdb-videos.csv"  # the official download does not say which frame is whose


def cases(folder: Path) -> list[Case]:
    """`Original/1.tif` with `Ground Truth/1.tif`; the group is the video."""
    with open(VIDEOS, newline="") as file:
        spans = [(int(r["first_frame"]), int(r["last_frame"]), r["video"]) for r in csv.DictReader(file)]
    masks = by_stem(images_in(folder / "Ground Truth"))

    def video(stem: str) -> str:
        return next((v for a, b, v in spans if stem.isdigit() and a <= int(stem) <= b), "")

    return [Case(p.stem, p, tuple(masks.get(p.stem, ())), group=video(p.stem) and f"video-{video(p.stem)}") for p in images_in(folder / "Original")]
