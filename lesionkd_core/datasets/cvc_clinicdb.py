"""CVC-ClinicDB: colonoscopy frames in `Original`, masks in `Ground Truth`, 29 videos."""

import csv
from dataclasses import replace
from pathlib import Path

from ..provenance import CHECKOUT
from .files import Case, by_stem, images_in, pair

VIDEOS = CHECKOUT / "data" / "cvc-clinicdb-videos.csv"  # the official download does not say which frame is whose


def cases(folder: Path) -> list[Case]:
    """`Original/1.tif` with `Ground Truth/1.tif`; the group is the video."""
    with open(VIDEOS, newline="") as file:
        videos = {str(frame): f"video-{r['video']}" for r in csv.DictReader(file) for frame in range(int(r["first_frame"]), int(r["last_frame"]) + 1)}
    found = pair(images_in(folder / "Original"), by_stem(images_in(folder / "Ground Truth")))
    return [replace(case, group=videos.get(case.id, "")) for case in found]
