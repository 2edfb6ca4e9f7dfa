"""The user's own list of cases: a CSV table with a row for each image, or for each mask of it."""

import csv
import io
import os
from collections import Counter
from pathlib import Path
from typing import Any

from ..config import LesionKDError, nearest
from .files import Case, stem_of

COLUMNS = ("image", "mask", "group", "split", "label", "id")
SPLITS = ("", "train", "val", "test")


class ManifestError(LesionKDError):
    """A CSV manifest is not what data/own.md says."""


def cases(path: Path) -> list[Case]:
    """Columns image, mask and, where wanted, group, split, label, id; paths are relative to the table's folder.

    Rows of one image, and masks with ';' between them, are united. A file that is missing rules out
    its case alone.

    Raises
    ------
    ManifestError
        Unknown or absent column, wrong split, rows of one image that disagree: names the line.
    """
    images: dict[Path, dict[str, str]] = {}
    masks: dict[Path, list[Path]] = {}
    for line, row in _rows(path):
        image = _path(path, row["image"])
        said = {name: row[name] for name in COLUMNS[2:]}
        if images.setdefault(image, said) != said:
            raise ManifestError(f"{path.name}, line {line}: {row['image']} stands there before with another group, split, label or id")
        masks.setdefault(image, []).extend(_path(path, part) for part in row["mask"].split(";") if part.strip())
    stems = Counter(stem_of(image) for image in images)
    return [_case(image, masks[image], said, alone=stems[stem_of(image)] == 1) for image, said in images.items()]


def _rows(path: Path) -> list[tuple[int, dict[str, str]]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
        header = text.partition("\n")[0]
        table = csv.DictReader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=header.count), skipinitialspace=True, strict=True)
        names = [name.strip().lower() for name in table.fieldnames or ()]
        table.fieldnames = names
        rows = [(table.line_num, row) for row in table if any(row.values())]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ManifestError(f"{path.name}: cannot be read as a CSV table in UTF-8 ({error})") from None
    if missing := {"image", "mask"} - set(names):
        raise ManifestError(f"{path.name}: no column {' and '.join(map(repr, sorted(missing)))}; columns are {', '.join(COLUMNS)} (data/own.md)")
    for name in names:
        if name not in COLUMNS or names.count(name) > 1:
            raise ManifestError(f"{path.name}: column {name!r} is {'there twice' if name in COLUMNS else f'unknown; {nearest(name, COLUMNS)}'}")
    if not rows:
        raise ManifestError(f"{path.name}: no rows below the header")
    return [(line, _checked(path, line, row)) for line, row in rows]


def _checked(path: Path, line: int, row: dict[Any, Any]) -> dict[str, str]:
    if None in row:
        raise ManifestError(f"{path.name}, line {line}: more cells than columns; a path with a comma wants quotes around it")
    row = {name: (row.get(name) or "").strip() for name in COLUMNS}
    if not row["image"]:
        raise ManifestError(f"{path.name}, line {line}: no image")
    row["split"] = row["split"].lower()
    if row["split"] not in SPLITS:
        raise ManifestError(f"{path.name}, line {line}: split = {row['split']!r}; wants train, val, test or nothing")
    return row


def _path(manifest: Path, cell: str) -> Path:
    """A path as people write it, Windows' too."""
    return Path(os.path.normpath(manifest.parent / cell.strip().replace("\\", "/")))


def _case(image: Path, masks: list[Path], said: dict[str, str], alone: bool) -> Case:
    name = said["id"] or (stem_of(image) if alone else f"{image.parent.name}_{stem_of(image)}")
    missing = [file.name for file in (image, *masks) if not os.path.exists(file)]
    problem = f"{', '.join(missing)}: file is missing" * bool(missing)
    return Case(name, image, tuple(dict.fromkeys(masks)), said["group"], said["label"], said["split"], problem=problem)
