"""BUSI: breast ultrasound, `Dataset_BUSI_with_GT` with one folder a class."""

from pathlib import Path

from .files import Case, images_in

CLASSES = ("benign", "malignant", "normal")


def cases(folder: Path) -> list[Case]:
    """`benign (1).png` with `benign (1)_mask.png`, `_mask_1.png`, ...: several masks, several lesions."""
    found = []
    for label in CLASSES:
        files = images_in(folder / label)
        masks: dict[str, list[Path]] = {}
        for path in files:
            stem, mark, _ = path.stem.partition("_mask")
            if mark:
                masks.setdefault(stem, []).append(path)
        for path in files:
            if "_mask" not in path.stem:
                found.append(Case(path.stem, path, tuple(masks.get(path.stem, ())), label=label))
    return found
