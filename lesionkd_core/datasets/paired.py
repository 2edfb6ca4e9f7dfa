"""Folders with images/ and masks/ of equal stems: Kvasir-SEG, other polyp sets and the user's own data."""

from pathlib import Path

from .files import Case, by_stem, pair, sources_in


def cases(folder: Path) -> list[Case]:
    """`images/a.jpg` with `masks/a.png`, whatever the suffixes; also NIfTI pairs and DICOM series."""
    return pair(sources_in(folder / "images"), by_stem(sources_in(folder / "masks")))
