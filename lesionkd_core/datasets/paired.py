"""Folders with images/ and masks/ of equal stems: Kvasir-SEG and the user's own data."""

from pathlib import Path

from .files import Case, by_stem, images_in


def cases(folder: Path) -> list[Case]:
    """`images/a.jpg` with `masks/a.png`, whatever the suffixes."""
    masks = by_stem(images_in(folder / "masks"))
    return [Case(p.stem, p, tuple(masks.get(p.stem, ())), one_mask=True) for p in images_in(folder / "images")]
