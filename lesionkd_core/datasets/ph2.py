"""PH2: dermoscopy, one folder a case with its image and mask in folders of their own."""

from pathlib import Path

from .files import Case, by_stem, images_in, natural, pair

DIAGNOSES = {"0": "common nevus", "1": "atypical nevus", "2": "melanoma"}


def cases(folder: Path) -> list[Case]:
    """`IMD002/IMD002_Dermoscopic_Image/IMD002.bmp` with `IMD002/IMD002_lesion/IMD002_lesion.bmp`."""
    labels, found = _labels(folder / "PH2_dataset.txt"), []
    for place in sorted((path for path in (folder / "PH2 Dataset images").iterdir() if path.is_dir()), key=natural):
        parts = (place / f"{place.name}_{part}" for part in ("Dermoscopic_Image", "lesion"))
        images, masks = (images_in(part) if part.is_dir() else [] for part in parts)
        found += pair(images, by_stem(masks), "{}_lesion", label=labels.get(place.name, ""))
    return found


def _labels(table: Path) -> dict[str, str]:
    """Clinical diagnosis of each case: rows are `|| IMD003 || histology || 0 || ...`."""
    lines = table.read_text(errors="replace").splitlines() if table.is_file() else []
    rows = [[cell.strip() for cell in line.split("||")] for line in lines]
    return {row[1]: DIAGNOSES[row[3]] for row in rows if len(row) > 3 and row[3] in DIAGNOSES}
