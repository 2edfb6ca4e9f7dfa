"""BUSI: breast ultrasound, `Dataset_BUSI_with_GT` with one folder a class."""

from pathlib import Path

from .files import Case, images_in, pair

CLASSES = ("benign", "malignant", "normal")


def cases(folder: Path) -> list[Case]:
    """`benign (1).png` with `benign (1)_mask.png`, `_mask_1.png`, ...: several masks, several lesions."""
    found: list[Case] = []
    for label in CLASSES:
        images: list[Path] = []
        masks: dict[str, list[Path]] = {}
        for path in images_in(folder / label):
            stem, mark, _ = path.stem.partition("_mask")
            (masks.setdefault(stem, []) if mark else images).append(path)
        found += pair(images, masks, one_mask=False, label=label)
    return found
