"""ISIC challenges 2016 to 2018, lesion boundary: dermoscopy, a folder of images and one of masks for each part."""

from pathlib import Path

from .files import Case, by_stem, images_in, pair, unpacked

SPLITS = {"Training": "train", "Validation": "val", "Test": "test", "Test_v2": "test"}
YEARS = {
    2016: ("ISBI2016_ISIC_Part1_{}_Data", "ISBI2016_ISIC_Part1_{}_GroundTruth", ("Training", "Test")),
    2017: ("ISIC-2017_{}_Data", "ISIC-2017_{}_Part1_GroundTruth", ("Training", "Validation", "Test_v2")),
    2018: ("ISIC2018_Task1-2_{}_Input", "ISIC2018_Task1_{}_GroundTruth", ("Training", "Validation", "Test")),
}
"""Folders of images and of masks, and the parts of each year."""


def cases(folder: Path, year: int) -> list[Case]:
    """`ISIC_0000000.jpg` with `ISIC_0000000_segmentation.png`; a part without masks is passed over."""
    found, (images, masks, parts) = [], YEARS[year]
    for part in parts:
        images_of, masks_of = folder / images.format(part), folder / masks.format(part)
        if images_of.is_dir() and masks_of.is_dir():
            files = [path for path in images_in(unpacked(images_of)) if not path.stem.endswith("_superpixels")]
            found += pair(files, by_stem(images_in(unpacked(masks_of))), "{}_segmentation", split=SPLITS[part])
    return found
