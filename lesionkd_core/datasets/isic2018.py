"""ISIC 2018 Task 1: dermoscopy, images and masks in two folders."""

from pathlib import Path

from .files import Case, by_stem, images_in

IMAGES, MASKS = "ISIC2018_Task1-2_Training_Input", "ISIC2018_Task1_Training_GroundTruth"


def cases(folder: Path) -> list[Case]:
    """`ISIC_0000000.jpg` with `ISIC_0000000_segmentation.png`."""
    masks = by_stem(images_in(folder / MASKS))
    return [Case(p.stem, p, tuple(masks.get(f"{p.stem}_segmentation", ()))) for p in images_in(folder / IMAGES)]
