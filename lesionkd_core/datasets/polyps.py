"""CVC-ColonDB and ETIS-Larib: colonoscopy frames `1.bmp` whose polyp masks are called `p1.bmp`."""

from pathlib import Path

from . import paired
from .files import Case, by_stem, images_in, pair


def cases(folder: Path) -> list[Case]:
    """The originals, or images/ and masks/ as the polyp benchmarks pass them on.

    CVC-ColonDB lies in one folder, with `s1.bmp` (uninformative regions) and `c1.bmp` (contours), which
    are passed over; ETIS-Larib has images in a folder of its own name and masks in `Ground Truth`.
    """
    if (folder / "masks").is_dir():
        return paired.cases(folder)
    images, masks = (folder / name if (folder / name).is_dir() else folder for name in ("ETIS-LaribPolypDB", "Ground Truth"))
    frames = [path for path in images_in(images) if path.stem.isdigit()]
    return pair(frames, by_stem(path for path in images_in(masks) if path.stem.lower().startswith("p")), "p{}")
