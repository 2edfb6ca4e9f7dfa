"""COVID-19 CT: NIfTI volumes of the lung and their infection masks."""

from dataclasses import replace
from pathlib import Path

from .files import Case, by_stem, pair, sources_in, unpacked


def cases(folder: Path, images: str, masks: str) -> list[Case]:
    """`rp_im/1.nii.gz` with `rp_msk/1.nii.gz`; `radiopaedia_29_86490_1` and `_86491_1` are scans of one patient."""
    found = pair(sources_in(unpacked(folder / images)), by_stem(sources_in(unpacked(folder / masks))))
    return [replace(case, group="_".join(case.id.split("_")[:2])) for case in found]
