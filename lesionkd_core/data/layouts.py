"""Finding a data set and listing its cases: releases of the catalogue, and your own data."""

from __future__ import annotations

import csv
import difflib
import hashlib
import io
import os
import re
import tomllib
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

from PIL import Image

from ..config import ConfigError, LesionKDError, PrepareConfig, UnlabelledConfig, nearest
from ..results import CHECKOUT
from . import phantom
from .images import (
    FORMATS,
    IMAGE_SUFFIXES,
    Case,
    Reading,
    by_stem,
    composed,
    count_pages,
    images_in,
    is_dicom,
    is_volume,
    natural,
    pair,
    sources_in,
    stem_of,
    unpacked,
    volume_reader,
)
from .masks import read_case


class DatasetNotFound(LesionKDError):
    """A data set is unknown, or its files are not where they should be."""


class ManifestError(LesionKDError):
    """A CSV manifest is not as data/own.md describes it."""


# Layouts of releases: each lists the cases of a folder --------------------------------------------


def busi(folder: Path) -> list[Case]:
    """BUSI: `benign (1).png` with `benign (1)_mask.png`, `_mask_1.png`, ..., one for a lesion."""
    found: list[Case] = []
    for label in ("benign", "malignant", "normal"):
        images: list[Path] = []
        masks: dict[str, list[Path]] = {}
        for path in images_in(folder / label):
            stem, mark, _ = path.stem.partition("_mask")
            (masks.setdefault(stem, []) if mark else images).append(path)
        found += pair(images, masks, one_mask=False, label=label)
    return found


def bus_bra(folder: Path) -> list[Case]:
    """BUS-BRA: `Images/bus_0001-l.png` with `Masks/mask_0001-l.png`; a table names patients."""
    masks = by_stem(images_in(folder / "Masks"))
    masks = {re.sub("^mask_", "bus_", stem): paths for stem, paths in masks.items()}
    found = pair(images_in(folder / "Images"), masks)
    return _described(found, folder / "bus_data.csv", "ID", "patient-{Case:0>4}", "{Pathology}")


def _described(
    cases: list[Case], table: Path, column: str, group: str, label: str = ""
) -> list[Case]:
    """Cases with group and label of the row of a table whose `column` holds their id.

    `group` and `label` are made of other columns: 'patient-{Case:0>4}'.
    """
    with open(table, newline="", encoding="utf-8-sig") as file:
        separator = "\t" if "\t" in file.readline() else ","
        file.seek(0)
        rows = {row[column]: row for row in csv.DictReader(file, delimiter=separator)}
    described = []
    for case in cases:
        if row := rows.get(case.id):
            case = replace(case, group=group.format(**row), label=label.format(**row))
        described.append(case)
    return described


def covid_ct(folder: Path, images: str, masks: str) -> list[Case]:
    """COVID-19 CT: NIfTI volumes and masks of equal names.

    `radiopaedia_29_86490_1` and `radiopaedia_29_86491_1` are scans of one patient.
    """
    scans, labels = (sources_in(unpacked(folder / name)) for name in (images, masks))
    found = pair(scans, by_stem(labels))
    return [replace(case, group="_".join(case.id.split("_")[:2])) for case in found]


def cvc_clinicdb(folder: Path) -> list[Case]:
    """CVC-ClinicDB: `Original/1.tif` with `Ground Truth/1.tif`; the group is the video."""
    videos = {}
    with open(CHECKOUT / "data" / "cvc-clinicdb-videos.csv", newline="") as file:
        for row in csv.DictReader(file):
            for frame in range(int(row["first_frame"]), int(row["last_frame"]) + 1):
                videos[str(frame)] = f"video-{row['video']}"
    found = pair(images_in(folder / "Original"), by_stem(images_in(folder / "Ground Truth")))
    return [replace(case, group=videos.get(case.id, "")) for case in found]


def em_stacks(folder: Path, images: str, masks: str, blocks: list[int]) -> list[Case]:
    """Sections of two multi-page TIFF files; the group is a block of consecutive sections.

    `blocks` are the first sections of the blocks.
    """
    pages, cases = count_pages(folder / images), []
    for page in range(pages):
        first = max(start for start in blocks if start <= page)
        last = min([start for start in blocks if start > page] + [pages]) - 1
        group = f"sections-{first:02d}-{min(last, pages - 1):02d}"
        files = folder / images, (folder / masks,)
        cases.append(Case(f"section-{page:02d}", *files, group, page=page, one_mask=True))
    return cases


def ham10000(folder: Path, images: list[str], masks: str, table: list[str]) -> list[Case]:
    """HAM10000: two folders of images, `ISIC_0024306_segmentation.png` in a third.

    The table, if it is there, names the lesion (the group) and the diagnosis of each image.
    """
    places = [unpacked(folder / name) for name in images if (folder / name).is_dir()]
    photos = sorted((path for place in places for path in images_in(place)), key=natural)
    found = pair(photos, by_stem(images_in(unpacked(folder / masks))), "{}_segmentation")
    for name in table:
        if (folder / name).is_file():
            return _described(found, folder / name, "image_id", "{lesion_id}", "{dx}")
    return found


def isic(folder: Path, images: str, masks: str, parts: dict[str, str]) -> list[Case]:
    """ISIC: `ISIC_0000000.jpg` with `ISIC_0000000_segmentation.png`, two folders for each part.

    A part whose masks are missing is ignored.
    """
    found = []
    for part, split in parts.items():
        files, labels = folder / images.format(part), folder / masks.format(part)
        if files.is_dir() and labels.is_dir():
            photos = images_in(unpacked(files))
            photos = [path for path in photos if not path.stem.endswith("_superpixels")]
            labelled = by_stem(images_in(unpacked(labels)))
            found += pair(photos, labelled, "{}_segmentation", split=split)
    return found


def kvasir_seg(folder: Path) -> list[Case]:
    """Kvasir-SEG: images/ and masks/; a table beside its card names scenes that are there twice."""
    return _described(paired(folder), CHECKOUT / "data/kvasir-seg-scenes.csv", "image", "{scene}")


def nih_pancreas(folder: Path, labels: str, withdrawn: list[str]) -> list[Case]:
    """Pancreas-CT: `PANCREAS_0001/<study>/<series>/*.dcm` with `label0001.nii.gz`.

    The patients may be in any folder that the download program made. Withdrawn copies are left out.
    """
    cases = []
    patients = [p for above in ("", "*/", "*/*/") for p in folder.glob(f"{above}PANCREAS_????")]
    for patient in sorted(patients, key=natural):
        number = patient.name[-4:]
        series = sorted({file.parent for file in patient.rglob("*.dcm")})
        if series and number not in withdrawn:
            case = Case(patient.name, series[0], (), patient.name, by_index=True, one_mask=True)
            masks = [p for p in sources_in(folder / labels) if stem_of(p) == f"label{number}"]
            problem = ""
            if len(series) > 1:
                problem = f"{patient.name}: holds {len(series)} series; keep one"
            cases.append(replace(case, masks=tuple(masks), problem=problem))
    return cases


def paired(folder: Path) -> list[Case]:
    """Images and masks of your own, as `own_pairs` finds them."""
    return own_pairs(folder).cases


def ph2(folder: Path) -> list[Case]:
    """PH2: `IMD002/IMD002_Dermoscopic_Image/IMD002.bmp`, `IMD002/IMD002_lesion/IMD002_lesion.bmp`.

    The label is the clinical diagnosis of `PH2_dataset.txt`: `|| IMD002 || histology || 0 || ...`.
    """
    diagnoses = {"0": "common nevus", "1": "atypical nevus", "2": "melanoma"}
    table, labels, found = folder / "PH2_dataset.txt", {}, []
    for line in table.read_text(errors="replace").splitlines() if table.is_file() else []:
        cells = [cell.strip() for cell in line.split("||")]
        if len(cells) > 3 and cells[3] in diagnoses:
            labels[cells[1]] = diagnoses[cells[3]]
    for case in sorted((folder / "PH2 Dataset images").iterdir(), key=natural):
        if case.is_dir():
            parts = (case / f"{case.name}_{part}" for part in ("Dermoscopic_Image", "lesion"))
            images, masks = (images_in(part) if part.is_dir() else [] for part in parts)
            found += pair(images, by_stem(masks), "{}_lesion", label=labels.get(case.name, ""))
    return found


def polyps(folder: Path) -> list[Case]:
    """CVC-ColonDB and ETIS-Larib: `1.bmp` with `p1.bmp`, or images/ and masks/ as in benchmarks.

    In the one folder of CVC-ColonDB `s1.bmp` (regions) and `c1.bmp` (contours) are ignored.
    """
    if (folder / "masks").is_dir():
        return paired(folder)
    names = ("ETIS-LaribPolypDB", "Ground Truth")
    images, masks = (folder / name if (folder / name).is_dir() else folder for name in names)
    frames = [path for path in images_in(images) if path.stem.isdigit()]
    labels = (path for path in images_in(masks) if path.stem.lower().startswith("p"))
    return pair(frames, by_stem(labels), "p{}")


def wounds(folder: Path) -> list[Case]:
    """FUSeg and Medetec: `train/images/0011.png` with `train/labels/0011.png`, and other parts.

    A part without labels is ignored. Parts repeat names, so the id starts with the part. Medetec's
    `foot-ulcer-0001_2` is a changed copy of `foot-ulcer-0001`: one group.
    """
    found = []
    for part, split in {"train": "train", "validation": "val", "test": "test"}.items():
        images, labels = folder / part / "images", folder / part / "labels"
        if images.is_dir() and labels.is_dir():
            for case in pair(images_in(images), by_stem(images_in(labels)), split=split):
                ulcer = case.id.partition("_")[0]
                group = ulcer if ulcer.startswith("foot-ulcer") else ""
                found.append(replace(case, id=f"{part}-{case.id}", group=group))
    return found


# Your own folders ---------------------------------------------------------------------------------

IMAGE_FOLDERS = ("images", "image", "imgs", "imagestr")
MASK_FOLDERS = ("masks", "mask", "labels", "annotations", "groundtruth", "labelstr")
PART = re.compile(r"(train|val|test)(?:ing|id|idation)?")
"""Name of a sub-folder with a part of the official split."""
MARK = r"(?:masks?|segmentations?|seg|gt|ground[ _-]?truth|lesions?|labels?|annotations?)"
NAMINGS = {
    "the suffix": rf"(?P<stem>.+?)(?P<mark>[ ._-]+{MARK})(?:[ _-]?\d+)?",
    "the prefix": rf"(?P<mark>{MARK}[ ._-]+|p(?=\d+$))(?P<stem>.+)",
    "the suffix of the image": r"(?P<stem>.+)(?P<mark>\.(?:jpe?g|png|bmp|tiff?))",
}
"""How the name of a mask may follow from that of its image."""
UNREAD = {".jp2", ".j2k", ".avif", ".heic", ".heif", ".svg", ".psd", ".dng", ".czi", ".npy", ".mat"}


@dataclass(frozen=True)
class Listing:
    """What is known of a data set before its images are read; of the phantom, nothing.

    Parameters
    ----------
    how : str
        How the masks of your own folder were found, if not by equal stems.
    doubts : tuple of str
        What may be wrong with the files.
    folder, release
        Where the data set is, and what; your own is a release too.
    """

    cases: list[Case]
    how: str = ""
    doubts: tuple[str, ...] = ()
    folder: Path = Path()
    release: Release | None = None

    @property
    def decision(self) -> str:
        """What the masks mean, in one line; empty before that is decided, and without masks."""
        first = self.cases[0].decision if self.cases else None
        return first.line if first else ""

    @property
    def official(self) -> bool:
        """Whether it is a release of the catalogue."""
        return self.release is not None and self.release.name in CATALOGUE

    def notes(self, dataset: str) -> list[str]:
        """Lines for the log; `dataset` is the option."""
        found = [self.how] if self.how else []
        if self.release and self.official:
            name, count = self.release.name, self.release.count
            if dataset != name:
                found.append(f"this folder is the release {name}; its rules are in data/{name}.md")
            if len(self.cases) != count:
                found.append(f"{len(self.cases)} of the release's {count} images are here")
        return found


@dataclass(frozen=True)
class _Place:
    """Where some of the images and their masks are; the name is that of the sub-folder.

    `flat`: sub-folders are places of their own, and not DICOM series.
    """

    name: str
    images: Path
    masks: Path | None
    flat: bool = False

    @property
    def split(self) -> str:
        """The official split that the sub-folder is called after."""
        part = PART.fullmatch(self.name.lower())
        return part[1] if part else ""

    def files(self) -> tuple[list[Path], list[Path]]:
        """Images and masks."""
        if self.images == self.masks:
            return _told_apart(_sources(self.images))
        found = sources_in(self.images), sources_in(self.masks) if self.masks else []
        images, masks = ([p for p in paths if p.is_file() or not self.flat] for paths in found)
        return images, masks


def own_pairs(folder: Path) -> Listing:
    """Cases of a folder of your own.

    images/ with masks/ (or labels/, annotations/, ground truth/), perhaps both with the same
    sub-folders; train/, val/ and test/ with such folders; images and masks in one folder; or a
    folder for each case. Sub-folders called train, val and test are the official split. The name of
    another sub-folder is a label (a class, a clinic), never a patient.

    Raises
    ------
    DatasetNotFound
        There are images without any mask, or masks and none belongs to an image.
    """
    places = _places(folder)
    found = [(place, *place.files()) for place in places]
    one_each = all(
        place.name and not place.split and len(images) == 1 for place, images, _ in found
    )
    cases: list[Case] = []
    said = set()
    for place, images, masks in found:
        if place.name and len(images) > 1 and len(masks) == 1:
            raise _several_for_one(images, masks[0])
        if one_each:
            cases.append(Case(place.name, images[0], tuple(masks)))
            said.add("one folder for each case")
        else:
            here, how = _matched(images, masks)
            cases += _of_sub_folder(place, here) if place.name else here
            said.add(how)
        if place.split:
            said.add("sub-folders called train, val or test")
        cases += unread({place.images, place.masks or place.images})
    images_read = [case for case in cases if not case.problem]
    if images_read and not any(case.masks for case in images_read):
        beside = _annotations(folder, {stem_of(case.image) for case in images_read})
        raise DatasetNotFound(
            f"{folder} has images and no masks{beside}: put the mask of images/a.jpg into a folder "
            "'masks' beside 'images' as masks/a.png, or mark it in its name, a_mask.png "
            "(data/own.md)"
        )
    how = ", ".join(sorted(said - {""}))
    return Listing(cases, how, _not_read_beside(folder, places))


def _annotations(folder: Path, stems: set[str]) -> str:
    """What a folder has in place of masks, to be added to a message."""
    for file in sorted(folder.rglob("*")):
        suffix = file.suffix.lower()
        if suffix in (".csv", ".tsv"):
            return f". If {file.name} lists the pairs, give that file as dataset; otherwise"
        if suffix == ".json" or (suffix in (".xml", ".txt") and file.stem in stems):
            return f"; annotations such as {file.name} are not read, convert them to pictures"
    return ""


def _of_sub_folder(place: _Place, cases: list[Case]) -> list[Case]:
    """Cases with the name of their sub-folder as split or as label, and in the id."""
    label = "" if place.split else place.name
    named = []
    for case in cases:
        case_id = f"{place.name}-{case.id}"
        named.append(replace(case, id=case_id, split=place.split, label=label))
    return named


def _several_for_one(images: list[Path], mask: Path) -> DatasetNotFound:
    names = ", ".join(file.name for file in images[:5])
    return DatasetNotFound(
        f"{mask.parent} holds {len(images)} images ({names}) and one mask ({mask.name}). One image "
        "is read for each mask: list one kind of image with the masks in a CSV table and give that "
        "as dataset (data/own.md)"
    )


def _places(folder: Path) -> list[_Place]:
    images, masks = _inside(folder, IMAGE_FOLDERS), _inside(folder, MASK_FOLDERS)
    if images and masks:
        inner = [part for part in _folders(images) if images_in(part)]
        places = [_Place(part.name, part, _inside(masks, [_plain(part)])) for part in inner]
        if not any(place.masks for place in places):
            return [_Place("", images, masks)]
        if images_in(images):
            places.append(_Place("", images, masks, flat=True))
        return places
    parts = [part for part in _folders(folder) if PART.fullmatch(part.name.lower())]
    if not parts and any(path.is_file() for path in sources_in(folder)):
        return [_Place("", folder, folder)]
    places = []
    for part in parts or _folders(folder):
        images, masks = _inside(part, IMAGE_FOLDERS), _inside(part, MASK_FOLDERS)
        places.append(_Place(part.name, images or part, masks or part))
    return places


def _not_read_beside(folder: Path, places: list[_Place]) -> tuple[str, ...]:
    """Names the folders beside images and masks: other masks, or further cases (nnU-Net)."""
    masks = [place.masks for place in places if place.masks]
    read = {*masks, *(place.images for place in places)}
    if not masks or read == {folder}:
        return ()
    known = read | {path.parent for path in read}
    held = []
    for above in sorted({folder} | {path.parent for path in read - {folder}}):
        for path in [p for p in _folders(above) if p not in known]:
            inner = [path, *(p for p in path.rglob("*") if p.is_dir())]
            if count := sum(file.is_file() for p in inner for file in sources_in(p)):
                held.append(f"{path.relative_to(folder).as_posix()}/ ({count} files)")
    if not held:
        return ()
    named = [f"{path.relative_to(folder).as_posix()}/" for path in masks]
    named = [*named[:3], "..."] if len(named) > 3 else named
    return (
        f"the masks are read from {', '.join(named)}; not read: {', '.join(held)}. If lesions or "
        "cases are there, list images and masks in a CSV table and give that as dataset "
        "(data/own.md)",
    )


def images_alone(folder: Path) -> list[Case]:
    """Images, volumes and DICOM series of a folder and its sub-folders, which have no masks."""
    sources, others = images_below(folder)
    cases = []
    for file in sources:
        name = "-".join([*file.relative_to(folder).parts[:-1], stem_of(file)])
        pages = count_pages(file)
        if pages == 1:
            cases.append(Case(name, file, (), unlabelled=True))
            continue
        for page in range(pages):
            cases.append(Case(f"{name}_page{page:03d}", file, (), page=page, unlabelled=True))
    return cases + others


def images_below(folder: Path, leave_out: Path | None = None) -> tuple[list[Path], list[Case]]:
    """Pictures, volume files and DICOM series of a folder and its sub-folders, without masks.

    Returns
    -------
    sources, others
        `others` are cases with a problem, of images in a format that is not read.

    Raises
    ------
    DatasetNotFound
        The folder also holds masks, or no images.
    """
    inner, masks = _inside(folder, IMAGE_FOLDERS), _inside(folder, MASK_FOLDERS)
    if inner and masks and not images_in(folder):
        raise DatasetNotFound(
            f"{folder} has images and masks in folders of their own; give {inner}"
        )
    sources, folders = _sources_below(folder, leave_out)
    others = unread(folders)
    if named := named_after_others(sources):
        raise DatasetNotFound(
            f"{folder} holds masks, such as {min(named).name}; give a folder of images alone"
        )
    if not sources:
        problems = "".join(f"\n{case.problem}" for case in others[:5])
        raise DatasetNotFound(f"{folder} has no images ({FORMATS}){problems}")
    return sources, others


def _sources_below(folder: Path, leave_out: Path | None) -> tuple[list[Path], list[Path]]:
    """Pictures, volume files and DICOM series of a folder and its sub-folders, and these folders.

    A folder that holds one DICOM series is one source.
    """
    if is_dicom(folder) and volume_reader().holds_series(folder):
        return [folder], []
    sources = [path for path in sources_in(folder) if path.is_file()]
    folders = [folder]
    above = (leave_out, folder.resolve(), *folder.resolve().parents)  # a link may lead there
    for inner in sorted(_folders(folder), key=natural):
        if inner.resolve() not in above:
            found, below = _sources_below(inner, leave_out)
            sources += found
            folders += below
    return sources, folders


def _sources(folder: Path) -> list[Path]:
    """Pictures, volume files and DICOM series, but no other folders."""

    return [path for path in sources_in(folder) if path.is_file() or is_dicom(path)]


def _folders(folder: Path) -> list[Path]:
    return [p for p in _content(folder) if p.is_dir() and not p.name.startswith(".")]


def _plain(folder: Path) -> str:
    return re.sub("[ _-]", "", folder.name.casefold())


def _inside(folder: Path, names: Sequence[str]) -> Path | None:
    """The folder of one of these names in `folder`, if there is one alone, or one of exactly it."""
    found = [inner for inner in _folders(folder) if _plain(inner) in names]
    exact = [inner for inner in found if inner.name == names[0]]
    return next(iter(exact or found), None) if exact or len(found) == 1 else None


def _told_apart(files: list[Path]) -> tuple[list[Path], list[Path]]:
    """Images and masks of one folder."""
    masks = named_after_others(files)
    masks |= {file for file in files if re.fullmatch(rf"{MARK}[ _-]?\d*", stem_of(file), re.I)}
    if not masks:  # the one that is marked, though no image has the rest of its name
        marked = {f for f in files if re.fullmatch(NAMINGS["the suffix"], stem_of(f), re.I)}
        masks = marked if len(marked) == 1 else set()
    return [file for file in files if file not in masks], [file for file in files if file in masks]


def named_after_others(files: list[Path]) -> set[Path]:
    """Files whose names say that they are masks of others."""
    stems = {stem_of(file) for file in files}
    return {file for file in files if not stems.isdisjoint(_unmarked(stem_of(file)).values())}


def _unmarked(stem: str) -> dict[str, str]:
    """How the name of a mask is marked, and what its image is then called.

    >>> _unmarked("a_mask")
    {"the suffix '_mask'": 'a'}
    """
    found = {}
    for naming, pattern in NAMINGS.items():
        if match := re.fullmatch(pattern, stem, re.I):
            found[f"{naming} {match['mark'].casefold()!r}"] = match["stem"]
    return found


def _matched(images: list[Path], masks: list[Path]) -> tuple[list[Case], str]:
    """Cases of images and masks with equal stems, or else with one mark in the names of masks."""
    stems, files = {stem_of(image).casefold(): stem_of(image) for image in images}, by_stem(masks)
    if not (images and masks) or any(stem.casefold() in stems for stem in files):
        return pair(images, files), ""
    ways: dict[str, dict[str, str]] = {}
    for stem in files:
        names = _unmarked(stem) | {"the lack of '_0000'": f"{stem}_0000"}  # nnU-Net's channel
        for word in ("image", "img"):
            names[f"{word!r} for 'mask'"] = re.sub("mask", word, stem, count=1, flags=re.I)
        for way, name in names.items():
            if name.casefold() in stems:
                ways.setdefault(way, {})[stem] = stems[name.casefold()]
    likely = [way for way, found in ways.items() if len(set(found.values())) > len(images) / 2]
    if len(likely) == 1:
        image_of = ways[likely[0]]
        named: dict[str, list[Path]] = {}
        for stem, paths in files.items():
            named.setdefault(image_of.get(stem, stem), []).extend(paths)
        return pair(images, named, one_mask=False), f"masks paired by {likely[0]}"
    names_of_images, names_of_masks = _first_names(images), _first_names(masks)
    raise DatasetNotFound(
        f"no mask can be assigned to an image. {images[0].parent} holds {names_of_images}; "
        f"{masks[0].parent} holds {names_of_masks}; give both the same stem, or mark the masks, as "
        "in a.jpg and a_mask.png (data/own.md), or list them in a CSV table."
    )


def _first_names(files: list[Path]) -> str:
    return f"{', '.join(path.name for path in files[:3])} ({len(files)})"


def unread(folders: Collection[Path]) -> list[Case]:
    """A case with a problem for every image in a format that is not read."""

    known = UNREAD | {suffix for suffix in Image.registered_extensions() if suffix != ".pdf"}
    known -= IMAGE_SUFFIXES
    cases = []
    for path in sorted(file for folder in folders for file in _content(folder)):
        suffix, why = path.suffix.lower(), ""
        if suffix in known:
            why = f"{suffix} files are not read; convert it to PNG or TIFF"
        elif not suffix and path.is_file() and is_dicom(path):
            why = "a DICOM file; give it the suffix .dcm, or a series its own folder"
        if why:
            cases.append(Case(path.name, path, (), problem=f"{path.name}: {why}"))
    return cases


# Your own list of cases ---------------------------------------------------------------------------

COLUMNS = ("image", "mask", "group", "split", "label", "id")


def manifest(path: Path, group_column: str = "group") -> Listing:
    """Cases of a CSV table with the columns image, mask, and if needed group, split, label, id.

    Paths are relative to the table's folder. Several masks of an image are united: rows of the same
    image, or paths with ';' between them. A missing file only rules out its own case. Groups that
    are equal as numbers, such as 7 and 7.0, are one. Without labels, folders of images are labels.

    Raises
    ------
    ManifestError
        Names the line.
    """
    images: dict[Path, dict[str, str]] = {}
    masks: dict[Path, list[Path]] = {}
    on_disk: dict[Path, dict[str, Path]] = {}
    group_column = group_column.lower()

    def locate(cell: str) -> Path:
        return _on_disk(path.parent / cell.strip().replace("\\", "/"), on_disk)

    rows, unread = _rows(path, group_column)
    for line, row in rows:
        image = locate(row["image"])
        said = {name: row[name] for name in ("split", "label", "id")} | {"group": row[group_column]}
        if images.setdefault(image, said) != said:
            raise ManifestError(
                f"{path.name}, line {line}: {row['image']} is in an earlier line with another "
                "group, split, label or id"
            )
        drawn = masks.setdefault(image, [])
        for cell in row["mask"].split(";"):
            if cell.strip():
                drawn.append(locate(cell))
    names = _names(list(images))
    groups, doubts = _one_spelling([said["group"] for said in images.values()])
    labelled = any(said["label"] for said in images.values())
    above = os.path.commonpath([image.parent for image in images])
    cases = []
    for (image, said), group in zip(images.items(), groups):
        place = image.relative_to(above).parts[:-1]  # of a clinic or a class, if there are several
        label = said["label"] if labelled or not place else place[0]
        missing = [file for file in (image, *masks[image]) if not file.exists()]
        problem = ", ".join(f"{file.name}: file is missing in {file.parent}" for file in missing)
        case = Case(said["id"] or names[image], image, tuple(dict.fromkeys(masks[image])), group)
        cases.append(replace(case, label=label, split=said["split"], problem=problem))
    if unread:
        cure = "" if any(groups) else "; if one names the patient, give group_by = 'column:NAME'"
        doubts.append(f"columns of {path.name} that are not read: {', '.join(unread)}{cure}")
    return Listing(cases, doubts=(*doubts, *_shared_masks(cases)))


def _on_disk(path: Path, listed: dict[Path, dict[str, Path]]) -> Path:
    """The path as the disk has it: accents may be encoded in another way (macOS, Unicode NFD)."""
    path = Path(os.path.normpath(path))
    if path.exists() or path == path.parent:
        return path
    folder = _on_disk(path.parent, listed)
    if folder not in listed:
        listed[folder] = {composed(inner.name): inner for inner in _content(folder)}
    return listed[folder].get(composed(path.name), path)


def _names(images: list[Path]) -> dict[Path, str]:
    """The stem of every image, with as many folders before it as make the names different."""
    names = {image: stem_of(image) for image in images}
    for above in range(1, max((len(image.parts) for image in images), default=0)):
        counts = Counter(names.values())
        for image, name in names.items():
            if counts[name] > 1:
                names[image] = "_".join([*image.parts[-1 - above : -1], stem_of(image)])
    counts = Counter(names.values())  # a.png and a.jpg of one folder stay equal
    return {image: name if counts[name] == 1 else stem_of(image) for image, name in names.items()}


def _one_spelling(groups: list[str]) -> tuple[list[str], list[str]]:
    """Groups of equal numbers, such as 7 and 7.0, as the first is written; and a doubt about it."""
    first: dict[str, str] = {}
    same: list[str] = []
    doubts: list[str] = []
    for group in groups:
        number = re.fullmatch(r"0*(\d+)(?:\.0*)?", group)
        same.append(first.setdefault(number[1] if number else group, group))
        if same[-1] != group and not doubts:
            doubts.append(
                f"groups are written in several ways, such as {same[-1]!r} and {group!r}; equal "
                "numbers are read as one group. If they are different patients, give them "
                "different names"
            )
    return same, doubts


def _shared_masks(cases: list[Case]) -> list[str]:
    users: dict[Path, list[str]] = {}
    for case in cases:
        for mask in case.masks:
            users.setdefault(mask, []).append(case.image.name)
    shared = [mask for mask, names in users.items() if len(names) > 1]
    if not shared:
        return []
    mask, names = shared[0], users[shared[0]]
    return [
        f"{len(shared)} mask(s) are given for several images: {mask.name} for {len(names)}, such "
        f"as {names[0]} and {names[1]}. If that is a mistake, name the mask of each image"
    ]


def _rows(path: Path, group_column: str) -> tuple[list[tuple[int, dict[str, str]]], list[str]]:
    """Line number and cells of every row that is not empty, and the columns that are not read."""
    import pandas as pd

    try:
        text = path.read_text(encoding="utf-8-sig")
        separator = max(",;\t", key=text.partition("\n")[0].count)
        table = pd.read_csv(
            io.StringIO(text),
            sep=separator,
            skipinitialspace=True,
            dtype=str,
            keep_default_na=False,
            skip_blank_lines=False,
        )
    except UnicodeDecodeError:
        raise ManifestError(f"{path.name}: is not in UTF-8; save it as 'CSV UTF-8'") from None
    except (OSError, ValueError) as error:  # also of pandas' parser
        why = f"cannot be read as a CSV table ({str(error).strip()})"
        raise ManifestError(f"{path.name}: {why}") from None
    if not isinstance(table.index, pd.RangeIndex):
        why = "rows have more cells than columns; put a path with a comma in quotes"
        raise ManifestError(f"{path.name}: {why}")
    table.columns = [name.strip().lower() for name in table.columns]
    columns = {*COLUMNS, group_column}
    for name in sorted({"image", "mask", group_column} - {"group", *table.columns}):
        raise ManifestError(
            f"{path.name}: no column {name!r} among {', '.join(table.columns)}; a list has "
            f"{', '.join(COLUMNS)} (data/own.md)"
        )
    unread = [n for n in table.columns if n not in columns and not n.startswith("unnamed: ")]
    for name in unread:
        if difflib.get_close_matches(name, COLUMNS, n=1, cutoff=0.8):
            why = f"column {name!r} is unknown; {nearest(name, COLUMNS)}"
            raise ManifestError(f"{path.name}: {why}")
    if table.empty:
        raise ManifestError(f"{path.name}: no rows below the header")
    rows = []
    for line, row in enumerate(table.fillna("").to_dict("records"), 2):
        cells = {name: row.get(name, "").strip() for name in columns}
        if not any(cells.values()):
            continue
        part = PART.fullmatch(cells["split"].lower())
        if not cells["image"]:
            raise ManifestError(f"{path.name}, line {line}: no image")
        if cells["split"] and not part:
            why = f"split = {cells['split']!r}; it must be train, val, test or empty"
            raise ManifestError(f"{path.name}, line {line}: {why}")
        cells["split"] = part[1] if part else ""
        rows.append((line, cells))
    return rows, unread


READERS = (bus_bra, busi, covid_ct, cvc_clinicdb, em_stacks, ham10000, isic, kvasir_seg)
OTHERS = (images_alone, nih_pancreas, paired, ph2, polyps, wounds)
LAYOUTS: dict[str, Callable[..., list[Case]]] = {f.__name__: f for f in (*READERS, *OTHERS)}


# The catalogue ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Release:
    """An entry of catalogue.toml.

    Parameters
    ----------
    folder : str
        Looked for in the folder of data sets; it may have another name unless the release is
        `named`, and then one of `names`.
    holds, others : names
        What must be in the folder, and what may be there instead.
    layout, options
        Name in `LAYOUTS` of the function that lists the cases of the folder, and its arguments.
    count : int
        Official number of images or volumes.
    archives : addresses
        Direct downloads; if there are none, `access` says how to get the release.
    window, group_by : str
        Defaults of the options of these names.
    caution : str
        What a user must know about its groups; said in the log unless all cases are for testing.
    """

    name: str
    modality: str
    folder: str
    holds: Sequence[str]
    layout: str
    options: dict[str, object] = field(default_factory=dict)
    count: int = 0
    licence: str = ""
    citation: str = ""
    page: str = ""
    archives: Sequence[str] = ()
    access: str = "free, no registration"
    others: Sequence[Sequence[str]] = ()
    named: bool = False
    names: Sequence[str] = ()
    window: str = ""
    group_by: str = ""
    caution: str = ""

    def fits(self, folder: Path) -> bool:
        """Whether `folder` is this release."""
        names = {name.lower() for name in (self.folder, *self.names)}
        if self.named and folder.name.lower() not in names:
            return False
        layouts = (self.holds, *self.others)
        return any(all(os.path.exists(folder / name) for name in layout) for layout in layouts)

    def listing(self, folder: Path, group_column: str = "group") -> Listing:
        """The cases of a folder or of a CSV manifest, and what is to be said about them."""
        if self.layout == "manifest":
            return manifest(folder, group_column)
        if self.layout == "paired":
            return own_pairs(folder)
        return Listing(LAYOUTS[self.layout](folder, **self.options))


_text = Path(__file__).with_name("catalogue.toml").read_text(encoding="utf-8")
CATALOGUE = {name: Release(name, **entry) for name, entry in tomllib.loads(_text).items()}


# Finding and reading ------------------------------------------------------------------------------


def data_root() -> Path:
    """The folder of data sets: LESIONKD_DATA, or data/raw of the checkout."""
    named = os.environ.get("LESIONKD_DATA")
    return Path(named or CHECKOUT / "data" / "raw").expanduser().resolve()


def find(dataset: str) -> tuple[Release, Path]:
    """The release of that name and its folder; your own folder or CSV manifest is a release too.

    Raises
    ------
    DatasetNotFound
        Says what was looked for, where, and how to get it.
    """
    if not (release := CATALOGUE.get(dataset)):
        return _own(dataset)
    root = data_root()
    level = [root]
    for _ in range(5):  # FUSeg is four folders down in its repository
        for folder in sorted(level, key=lambda path: (path.name != release.folder, path)):
            if release.fits(folder):
                return release, folder
        inside = (path for folder in level for path in _content(folder))
        level = [path for path in inside if path.is_dir() and not path.name.startswith(".")]
    holds = ", ".join(map(repr, release.holds))
    raise DatasetNotFound(
        f"{dataset}: no folder {release.folder!r} with {holds} in it under {root}.\n"
        f"Run `lesionkd download {dataset}`, or download it from the page in data/{dataset}.md "
        f"({release.access}) and unpack it there,\nor set LESIONKD_DATA to the folder above it."
    )


def _content(folder: Path) -> list[Path]:
    """What a folder holds, by name; nothing if there is no permission to read it."""
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def _own(dataset: str, layout: str = "paired") -> tuple[Release, Path]:
    own = Release(dataset, "own data", dataset, (dataset,), layout, access="your own")
    places = [Path(dataset).expanduser(), data_root() / dataset]
    for path in places:
        if layout == "paired" and path.suffix.lower() in (".csv", ".tsv") and path.is_file():
            return replace(own, layout="manifest"), path.resolve()
        if path.is_dir():
            release = _release_at(path.resolve()) if layout == "paired" else None
            return release or own, path.resolve()
    if layout == "images_alone":
        why = "there is no such folder; give a folder of images"
        raise DatasetNotFound(f"unlabelled = {dataset!r}: {why}")
    for path in places:
        if path.is_file():
            raise DatasetNotFound(f"{path} is no folder and no CSV table; export a table as CSV")
    if len(places[0].parts) > 1:
        raise DatasetNotFound(f"there is no folder and no CSV manifest {places[0]}")
    hint = nearest(dataset, (*CATALOGUE, phantom.NAME))
    raise DatasetNotFound(
        f"dataset {dataset!r} is neither in the catalogue nor a folder nor a CSV manifest; {hint}\n"
        f"A relative path is looked for in the working folder and in {data_root()}."
    )


def _release_at(folder: Path) -> Release | None:
    """The release of the catalogue that a folder is, by its name and by what is in it.

    Its window stays with the name of the release: a trained student knows no folder.
    """
    for release in CATALOGUE.values():
        names = {name.lower() for name in (release.folder, *release.names)}
        if folder.name.lower() in names and release.fits(folder):
            return replace(release, window="")
    return None


def listing(cfg: PrepareConfig) -> Listing:
    """The data set that the options name.

    Raises
    ------
    DatasetNotFound, ConfigError
        It is not there, holds no images, or the option `group_by` does not fit.
    """
    if cfg.dataset == phantom.NAME:
        return Listing([])
    if isinstance(cfg, UnlabelledConfig):
        release, folder = _own(cfg.dataset, "images_alone")
    else:
        release, folder = find(cfg.dataset)
    column = cfg.group_by.partition("column:")[2]
    if column and release.layout != "manifest":
        raise ConfigError(f"group_by = {cfg.group_by!r}: {cfg.dataset} is no CSV manifest")
    try:
        found = release.listing(folder, column or "group")
    except OSError as error:
        why = f"{error.filename or folder} cannot be read ({error.strerror})"
        raise DatasetNotFound(f"{cfg.dataset}: {why}.") from None
    if not found.cases:
        held = ", ".join(file.name for file in _content(folder)[:3]) or "nothing"
        raise DatasetNotFound(
            f"{cfg.dataset}: no images with masks in {folder}, which holds {held}. Put your own "
            "data there as images/a.jpg with masks/a.png; data/own.md names the formats."
        )
    rule = cfg.group_by or release.group_by
    if rule not in ("", "sequence") and not column:
        found = replace(found, cases=_regrouped(found.cases, folder, rule))
    return replace(found, folder=folder, release=release)


def fingerprint(cfg: PrepareConfig) -> str:
    """A digest of the content of a data set.

    Masks count with their content, since annotations are corrected, and so do images of your own.
    Images of a release count with their name and size.
    """
    found = listing(cfg)
    if not found.release:
        return f"{cfg.dataset} version {phantom.VERSION}"
    release, official = found.release, found.official
    about_release = f"{release.name} {release.window} {release.group_by}"
    digest = hashlib.sha256(about_release.encode() if official else b"own")
    for case in found.cases:
        sizes = [path.stat().st_size for path in _files(case.image)]
        about = (case.id, case.group, case.label, case.split, case.problem, case.image.name, sizes)
        digest.update("|".join(map(str, about)).encode(errors="surrogateescape"))
        for named in case.masks if official else (case.image, *case.masks):
            digest.update(os.fsencode(named.name))
            for path in _files(named):
                stat = path.stat()
                if os.access(path, os.R_OK):  # otherwise reading the case will say so
                    digest.update(_hash_file(path, stat.st_size, stat.st_mtime_ns))
    return digest.hexdigest()


def suggested_groups(cases: Sequence[Case], folder: Path) -> tuple[str, dict[str, str]] | None:
    """A rule for `group_by` that unites files whose names begin alike, and the group of each case.

    Names hint at patients, slides or videos if what stands before a separator, or the folder, has a
    number in it and most files share it with others: slide1_x0_y512, 10_left, patient001_frame12,
    p7/003. The rule is one that was tried: it makes exactly these groups.

    Returns
    -------
    (rule, {id: group}) or None
    """
    paths = {case.id: Path(os.path.relpath(case.image, folder)) for case in cases}
    above = ".*/" if len({path.parent for path in paths.values()}) > 1 else ""
    first_part, all_but_last = rf"({above}[^\W_]+)[^/]*$", rf"({above}[^/]+)[_ -][^/]*$"
    for rule in (first_part, all_but_last, "number", "folder"):
        groups = _groups_by(rule, paths)
        sizes = Counter(groups.values())
        shared = sum(count for count in sizes.values() if count > 1)
        named = r"\d" if rule == "folder" else r"\d[^/]*$"  # a number in the name, not above it
        numbered = all(re.search(named, group) for group in sizes)
        if numbered and len(sizes) > 1 and shared > len(groups) / 2:
            return rule, groups
    return None


def _groups_by(rule: str, paths: dict[str, Path]) -> dict[str, str]:
    """The group of every relative path by a rule of `group_by`; empty where nothing matches."""
    groups = {}
    for name, path in paths.items():
        if rule == "number":
            before = re.sub(r"[\W_]*[0-9]+[^0-9]*$", "", stem_of(path))  # 'p07_048' -> 'p07'
            groups[name] = f"{path.parent.as_posix()}/{before}"
        elif rule == "folder":
            groups[name] = path.parent.as_posix()
        else:
            match = re.search(rule, path.as_posix())
            groups[name] = ("-".join(filter(None, match.groups())) or match[0]) if match else ""
    return groups


def _regrouped(cases: list[Case], folder: Path, rule: str) -> list[Case]:
    """Cases with the groups that their file names or folders say."""
    paths = {str(number): Path(os.path.relpath(c.image, folder)) for number, c in enumerate(cases)}
    groups = _groups_by(rule, paths)
    unmatched = [paths[number].as_posix() for number, group in groups.items() if not group]
    if unmatched:
        raise ConfigError(
            f"group_by = {rule!r} matches nothing in {len(unmatched)} of {len(cases)} paths, the "
            f"first is {unmatched[0]!r}; give number, folder, sequence, or an expression such as "
            r"'patient(\d+)'"
        )
    return [replace(case, group=group) for case, group in zip(cases, groups.values())]


def _files(path: Path) -> list[Path]:
    """The file, the data file of a .mhd header too, or the files of a series; none if missing."""
    raw = [path.with_suffix(suffix) for suffix in (".raw", ".zraw") if path.suffix == ".mhd"]
    return [file for file in (_content(path) if path.is_dir() else [path, *raw]) if file.is_file()]


@lru_cache(maxsize=1_000_000)  # every stage asks again
def _hash_file(path: Path, size: int, changed: int) -> bytes:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def window_of(cfg: PrepareConfig) -> str:
    """The option `window`, or the default of the release."""
    return cfg.window or (CATALOGUE[cfg.dataset].window if cfg.dataset in CATALOGUE else "")


def read(case: Case, window: str = "") -> Iterator[Reading]:
    """Read the picture of a case with its mask, or every slice of its volume.

    Raises
    ------
    UnreadableFile
        Names the file and what is wrong with it.
    """
    if not case.problem and is_volume(case.image):
        yield from volume_reader().read_slices(case, window)
    else:
        yield read_case(case, window)
