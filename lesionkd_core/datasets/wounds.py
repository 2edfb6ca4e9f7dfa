"""FUSeg and Medetec: foot ulcers, `train`, `validation` and `test` with images/ and labels/ each."""

from dataclasses import replace
from pathlib import Path

from .files import Case, by_stem, images_in, pair

SPLITS = {"train": "train", "validation": "val", "test": "test"}


def cases(folder: Path) -> list[Case]:
    """`train/images/0011.png` with `train/labels/0011.png`; a part without labels is passed over.

    Parts repeat names, so the id has the part in front. Medetec's `foot-ulcer-0001_2` is a changed copy
    of `foot-ulcer-0001`: one group.
    """
    found = []
    for part, split in SPLITS.items():
        if (folder / part / "images").is_dir() and (folder / part / "labels").is_dir():
            for case in pair(images_in(folder / part / "images"), by_stem(images_in(folder / part / "labels")), split=split):
                ulcer = case.id.partition("_")[0]
                found.append(replace(case, id=f"{part}-{case.id}", group=ulcer if ulcer.startswith("foot-ulcer") else ""))
    return found
