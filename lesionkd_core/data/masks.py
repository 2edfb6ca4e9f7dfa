"""Which pixels are lesion: one decision for all masks of a data set, and cases read with it.

The values of all masks are looked at first; then one rule is chosen, which must hold for more than
half of them. Masks that do not fit it are refused by name (docs/data.md, Masks).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ..config import PrepareConfig, UnlabelledConfig
from ..results import log
from .images import (
    IMAGE_SUFFIXES,
    Case,
    Picture,
    Reading,
    UnreadableFile,
    files_in,
    finite_values,
    is_volume,
    noted_image,
    open_picture,
    reading,
    suffix_of,
    turned,
    volume_reader,
)


class UnclearMasks(UnreadableFile):
    """The masks of a data set do not tell which values are lesion."""


CLASSES_UP_TO = 31
"""Whole numbers up to this one are classes."""
WHITE = (255, 65535)
"""Beside class numbers they may mean 'ignore'."""
NEAR_INTEGER = 0.05
"""Class numbers that were stored with a scale factor differ from integers by less than this."""
EDGES, AREAS = 0.1, 0.4
"""A pixel is in an area if its 8 neighbours have the same value. Fraction of the pixels of soft
borders that are, at most; and of classes and instances, at least."""
MOST_BETWEEN, LEAST_BRIGHT = 0.1, 0.25
"""In black and white with soft borders: largest fraction of the image between the ends, smallest
fraction of bright pixels among those that are not dark."""
REACHED = 0.98
"""Fraction of the largest value of all masks that one with soft borders has."""
UPRIGHT = "image turned by EXIF; its mask has no EXIF and is taken as upright"
"""Note on a case."""
COLOURFUL = 16
"""Channels of a grey picture that JPEG compressed differ by at most this."""
MANY = 4096
"""Distinct values of a mask that are remembered."""
COLOUR = 1 << 48
"""A colour is this plus its channels, 16 bits each; a grey pixel is its value."""
Key = tuple[Path, int | None]
"""A file with masks, and the page of a stack."""
Attempt = tuple["Rule", dict[Key, str]]
"""A rule, and why some masks do not fit it."""


def _code(red: int, green: int, blue: int) -> int:
    return COLOUR + (red << 32) + (green << 16) + blue


VOID = _code(224, 224, 192)
"""The colour of 'ignore' in the palette of Pascal VOC, which LabelMe and CVAT use."""


@dataclass(frozen=True)
class Rule:
    """Which values are lesion.

    `how` is '' (these values), 'all but' (all others), 'over' or 'up to' (the only value).
    """

    how: str
    values: tuple[float, ...]

    @classmethod
    def parse(cls, text: str) -> Rule:
        """'1, 3', 'all but 0', 'over 127' or '#ff0000', as the option `lesion_values` has it."""
        how, listed = re.fullmatch(r"(all but|over|)\s*(.*)", text).groups()  # type: ignore[union-attr]
        return cls(how, tuple(_value(name) for name in re.split(r"[,\s]+", listed)))

    def inverted(self) -> Rule:
        """The rule that selects all other pixels."""
        others = {"": "all but", "all but": "", "over": "up to", "up to": "over"}
        return replace(self, how=others[self.how])

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        """Select the lesion: array of any shape -> bool."""
        if self.how in ("over", "up to"):
            return np.asarray((pixels > self.values[0]) == (self.how == "over"))
        pixels, named = four_digits(pixels), np.zeros(pixels.shape, bool)
        for value in self.values:
            named |= np.isclose(pixels, value) if value % 1 else pixels == value
        return named if self.how == "" else ~named

    def __str__(self) -> str:
        return f"{self.how} {', '.join(map(_name, self.values))}".strip()


def _value(name: str) -> float:
    if not name.startswith("#"):
        return float(name)
    width = (len(name) - 1) // 3
    channels = [int(name[1 + i * width : 1 + (i + 1) * width], 16) for i in range(3)]
    return channels[0] if len(set(channels)) == 1 else _code(*channels)


def _name(value: float) -> str:
    """7 -> '7'; the code of a colour -> '#ff0000', or '#00c800000000' if it has 16 bits."""
    if value < COLOUR:
        return f"{value:g}"
    channels = [int(value) >> shift & 0xFFFF for shift in (32, 16, 0)]
    width = 2 if max(channels) < 256 else 4
    return "#" + "".join(f"{channel:0{width}x}" for channel in channels)


def _listed(values: np.ndarray) -> str:
    """'values 0, 255', '97 values from 0 to 255', 'values 0, #ff0000'."""
    if len(values) <= 6:
        return "values " + ", ".join(map(_name, values))
    colours = values[values >= COLOUR]
    if len(colours):
        return f"{len(values)} values, such as {', '.join(map(_name, colours[:3]))}"
    return f"{len(values)} values from {_name(values[0])} to {_name(values[-1])}"


# Looking at one mask ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Look:
    """What a mask holds.

    Parameters
    ----------
    kind : str
        'one value', 'two values', 'classes' (numbers up to 31, areas, instances), 'thin' (areas,
        but most pixels are at borders), 'soft' (black and white with soft borders), 'few' (black
        and white with specks of one or two values), 'ignore' (classes beside 255), 'negative' or
        'unclear'.
    values : array
        Distinct values, ascending; of very many the smallest and the largest.
    text : str
        The values in words.
    between : float
        Fraction of the pixels that have neither the smallest nor the largest value.
    lossy : bool
        Compression changed the values.
    """

    kind: str
    values: np.ndarray
    text: str
    between: float
    lossy: bool


def look_at(planes: np.ndarray, lossy: bool) -> Look:
    """Count the values of a mask, (D, H, W), and find what kind of mask it is."""
    values, counts = count_values(planes)
    kind = _kind(planes, values, counts, lossy)
    between = float(counts[1:-1].sum() / counts.sum())
    return Look(kind, np.append(values[:-1][:MANY], values[-1]), _listed(values), between, lossy)


def four_digits(values: np.ndarray) -> np.ndarray:
    """Values that are no integers, as in a map of probabilities, with four digits."""
    if not (values % 1).any():
        return values
    digits = 10.0 ** (4 - np.ceil(np.log10(np.abs(values).max())))
    return np.asarray(np.rint(values * digits) / digits)


def count_values(planes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct values of a mask, ascending, and how many pixels have each.

    Of values that are no integers, as in a map of probabilities, four digits count.
    """
    values, counts = np.empty(0), np.empty(0, np.int64)
    for plane in planes:
        if plane.dtype == np.uint8:  # 40 times as fast
            number = np.bincount(plane.ravel(), minlength=256)
            found, number = np.flatnonzero(number), number[number > 0]
        else:
            found, number = np.unique(plane, return_counts=True)
        found = four_digits(found)
        values, where = np.unique(np.concatenate([values, found]), return_inverse=True)
        counts = np.bincount(where, np.concatenate([counts, number])).astype(np.int64)
    return values, counts


def _kind(planes: np.ndarray, values: np.ndarray, counts: np.ndarray, lossy: bool) -> str:
    """The kind of a `Look`: what the values alone say, then what their pixels look like."""
    top, whole = 255 if lossy else values[-1], not (values % 1).any()
    if len(values) == 1:
        return "one value"
    if values[0] < 0:
        return "negative"
    if VOID in values:
        return "ignore"
    if len(values) == 2 and not lossy:
        return "two values"
    if whole and top <= CLASSES_UP_TO:
        return "classes"
    if _marks_ignored(values) and not lossy and not _are_specks(planes, values, counts):
        return "ignore"
    inside = _in_areas(planes, values)

    def areas(chosen: np.ndarray) -> float:
        return float(inside[chosen].sum() / max(counts[chosen].sum(), 1))

    middle = (values > top / 8) & (values < top * 7 / 8)  # neither nearly black nor nearly white
    bright, lighter = (counts[values > top * part].sum() for part in (7 / 8, 1 / 4))
    lesion = values != 0
    others = lesion & (values != values[np.where(lesion, counts, 0).argmax()])  # not the usual one
    borders = areas(others) <= EDGES  # they are at borders only
    black_and_white = (
        (values[0] == 0 or lossy)
        and top < COLOUR
        and areas(middle) <= EDGES
        and counts[middle].sum() <= MOST_BETWEEN * counts.sum()
        and bright >= LEAST_BRIGHT * lighter
    )
    if black_and_white and (lossy or middle.sum() > 2 or (borders and others.sum() > 2)):
        return "soft"
    if black_and_white and borders and _are_specks(planes, values, counts):
        return "few"
    mostly_white = others.sum() > 2 and top < COLOUR and counts[-1] > counts[lesion].sum() / 2
    if lossy or not whole or mostly_white or (borders and others.sum() > 2):
        return "unclear"
    if lesion.sum() > CLASSES_UP_TO:  # instances, if each is in one piece
        return "classes" if _pieces(planes, values) <= 2 * lesion.sum() else "unclear"
    few_colours = top >= COLOUR and others.sum() <= 2
    return "classes" if areas(others) >= AREAS or few_colours else "thin"


def _in_areas(planes: np.ndarray, values: np.ndarray) -> np.ndarray:
    """How many pixels of each value have 8 neighbours of the same value in their plane."""
    from scipy.ndimage import maximum_filter, minimum_filter

    inside = np.zeros(len(values), np.int64)
    for plane in planes:
        same = minimum_filter(plane, 3) == maximum_filter(plane, 3)
        where = np.searchsorted(values, plane[1:-1, 1:-1][same[1:-1, 1:-1]])
        inside += np.bincount(where.clip(max=len(values) - 1), minlength=len(values))
    return inside


def _pieces(planes: np.ndarray, values: np.ndarray) -> int:
    """Number of connected pieces of one value; an instance is in one piece, or two."""
    from skimage.measure import label

    numbers = np.searchsorted(values, planes) + 1
    return int(label(numbers, background=int(values[0] == 0)).max())


def _are_specks(planes: np.ndarray, values: np.ndarray, counts: np.ndarray) -> bool:
    """Whether most pixels between the ends have no neighbour of the same value."""
    between = np.where(planes == values[-1], values[0], planes)
    return bool(2 * _pieces(between, values) > counts[1:-1].sum())


def _marks_ignored(values: np.ndarray) -> bool:
    """Whether 255 or 65535 is beside class numbers alone."""
    return bool(values[-1] in WHITE and len(values) > 1 and 0 < values[-2] <= CLASSES_UP_TO)


# One decision for all masks -----------------------------------------------------------------------


@dataclass(frozen=True)
class Decision:
    """The rule for all masks of a data set.

    Parameters
    ----------
    rule : Rule
    line : str
        The decision in one line: 'masks: values 0, 1, 2, 3; lesion: all but 0'.
    refused : dict
        Why a file cannot be read by this rule.
    notes : dict
        For the report.
    """

    rule: Rule
    line: str
    refused: dict[Key, str]
    notes: dict[Key, tuple[str, ...]]

    def lesion(self, pixels: np.ndarray, path: Path, page: int | None = None) -> np.ndarray:
        """Select the lesion in pixels of a file.

        Raises
        ------
        UnreadableFile
            The file does not fit the rule.
        """
        if why := self.refused.get((path, page)):
            raise UnreadableFile(f"{path.name}: {why}")
        return self.rule(pixels)


def decide(looks: dict[Key, Look], lesion_values: str = "", invert: bool = False) -> Decision:
    """Decide from the values of all masks which of them are lesion.

    Parameters
    ----------
    looks : dict
        What each mask of the data set holds.
    lesion_values, invert
        The options `lesion_values` and `invert_masks`.

    Raises
    ------
    UnclearMasks
        The masks do not tell which values are lesion, or no mask has what `lesion_values` names.
    """
    rule, refused = _given(looks, lesion_values) if lesion_values else _chosen(looks)
    rule = rule.inverted() if invert else rule
    notes: dict[Key, tuple[str, ...]] = {}
    for key, look in looks.items():
        if rule.how in ("over", "up to") and look.between:
            ends = f"{_name(look.values[0])} and {_name(look.values[-1])}"
            share = f"{look.between:.2%} of the pixels are between {ends}"
            notes[key] = (f"cut at {rule.values[0]:g}: {share}",)
        elif rule(look.values).all() and key not in refused:
            notes[key] = ("all of the image read as lesion",)
    values = _union(look for key, look in looks.items() if key not in refused)
    line = f"masks: {_listed(values) if len(values) else 'none can be read'}; lesion: {rule}"
    if lesion_values:
        line += " (lesion_values)"
    if invert:
        line += " (invert_masks)"
    if refused:
        line += f"; {len(refused)} of {len(looks)} do not fit"
    return Decision(rule, line, refused, notes)


def decided(cases: list[Case], cfg: PrepareConfig) -> list[Case]:
    """Give every case the decision to which the masks of all of them lead."""
    if isinstance(cfg, UnlabelledConfig) or not cases:
        return cases
    decision = decide(look_at_all(cases), cfg.lesion_values, cfg.invert_masks)
    return [replace(case, decision=decision) for case in cases]


def decision_for(case: Case) -> Decision:
    """The decision for the data set of a case; if there is none, that for its own masks."""
    return case.decision or decide(look_at_all([case]))


def look_at_all(cases: Sequence[Case]) -> dict[Key, Look]:
    """All masks that can be read; why another cannot is said when its case is read."""
    keys: dict[Key, None] = {}  # in this order, each once
    for case in cases:
        if not case.problem:
            keys.update(dict.fromkeys(_files(case)))
    if len(keys) > 1000:
        log.info(f"reading the values of {len(keys)} masks")
    volumes = any(is_volume(path) for path, _ in keys)
    found: dict[Key, Look] = {}
    with ThreadPoolExecutor(2 if volumes else None) as pool:  # decoding releases the GIL
        for key, look in zip(keys, pool.map(_look, keys)):
            if look:
                found[key] = look
    return found


def _files(case: Case) -> Iterator[Key]:
    for path in case.masks:
        if is_volume(path) and path.is_dir():
            for file in files_in(path):
                yield file, None
        else:
            yield path, case.page


def _look(key: Key) -> Look | None:
    path, page = key
    try:
        pixels, lossy, _ = read_values(path, page)
        with reading(path, "a mask"):
            return look_at(pixels, lossy)
    except UnreadableFile:
        return None


def _given(looks: dict[Key, Look], text: str) -> Attempt:
    """The rule of the option `lesion_values`, and what cannot be read by it."""
    rule, refused = Rule.parse(text), {}
    values, wrong = _union(looks.values()), ""
    if rule.how == "over":
        if len(np.unique(values > rule.values[0])) < 2:
            wrong = f"'{rule}' selects all or none"
    elif absent := [v for v in rule.values if not Rule("", (v,))(values).any()]:
        wrong = f"names {', '.join(map(_name, absent))}, which no mask has"
    if wrong and len(values):
        raise UnclearMasks(f"masks: {_listed(values)}; lesion_values {wrong}")
    for key, look in looks.items():
        if rule.how != "over" and look.lossy and look.kind != "one value":
            refused[key] = _why(look, "compression changed its values, so that none has a meaning")
        elif rule.how == "over" and look.values[-1] >= COLOUR:
            refused[key] = _why(look, "'over' is for grey values, and it has colours")
    return rule, refused


def _chosen(looks: dict[Key, Look]) -> Attempt:
    """The rule that most masks fit, and why the others do not."""
    ends = Counter(
        (0.0, 255.0) if look.lossy else (float(look.values[0]), float(look.values[-1]))
        for look in looks.values()
        if look.kind in ("two values", "soft") and look.values[-1] < COLOUR
    )
    attempts = [_all_but(looks)]
    if ends:
        brightest = sorted(ends, key=lambda pair: pair[1])[-1]
        usual = [pair for pair, _ in ends.most_common(3)]
        attempts += [_over(looks, ground, top) for ground, top in (brightest, *usual)]
    rule, refused = min(attempts, key=lambda attempt: len(attempt[1]))
    several = [key for key, look in looks.items() if look.kind != "one value"]
    doubtful = "few" if rule.how == "over" else ""
    unclear = [key for key in several if key in refused or looks[key].kind == doubtful]
    if several and len(unclear) >= len(several) / 2:
        first = unclear[0]
        why = refused.get(first) or _why(looks[first], REASONS["few"])
        raise UnclearMasks(
            f"{len(unclear)} of {len(several)} masks do not tell which values are lesion, such as "
            f"{first[0].name}: {why}"
        )
    return rule, refused


def _union(looks: Iterable[Look]) -> np.ndarray:
    """Distinct values of several masks, ascending."""
    return np.unique(np.concatenate([np.empty(0), *(look.values for look in looks)]))


REASONS = {
    "ignore": "this may mean 'ignore', and pixels cannot be left out of loss and scores",
    "unclear": "neither two values, nor classes, nor black and white with soft borders",
    "negative": "negative values are neither classes nor black and white",
    "thin": "what is between may be classes or soft borders",
    "few": "what is between may be classes or soft borders",
    "classes": "most masks are black and white",
    "soft": "soft borders, which masks of two values or classes do not have",
    "two values": "most masks have other values",
    "one value": "one value alone is neither lesion nor background",
    "no background": "the background of the other masks is not in it",
    "all alike": "all of it would be background, or all lesion",
}
"""Why a mask does not fit a rule, by its kind or by what it lacks."""


def _all_but(looks: dict[Key, Look]) -> Attempt:
    """Two values, classes, instances, colours: all but the background, which most masks have."""
    firm = ("two values", "classes")
    clear = [look for look in looks.values() if look.kind in firm]
    seen = _union(clear)
    ground = float(seen[0]) if len(seen) == 2 and seen[1] < COLOUR else 0.0
    rule, whole = Rule("all but", (ground,)), [look for look in clear if ground in look.values]
    if len(whole) < len(clear) / 2:
        why = f"{ground:g} is in {len(whole)} of {len(clear)} masks; what is the background?"
        return rule, {key: _why(look, why) for key, look in looks.items()}
    known, odd = np.append(_union(whole), ground), _other_scale(looks)
    refused = {}
    for key, look in looks.items():
        kind, all_known = look.kind, bool(np.isin(look.values, known).all())
        coloured, why = look.values[-1] >= COLOUR, ""
        if _marks_ignored(look.values):
            why = "ignore"
        elif key in odd:
            why = "two values"
        elif ground not in look.values and (coloured or not all_known):
            why = "one value" if kind == "one value" else "no background"
        elif kind not in ("one value", *firm) and not (kind in ("few", "thin") and all_known):
            why = kind
        if why:
            refused[key] = _why(look, REASONS[why])
    return rule, refused


def _other_scale(looks: dict[Key, Look]) -> set[Key]:
    """Masks of 0 and class numbers if more are of 0 and 255, or the other way round."""
    numbers, white = set(), set()
    for key, look in looks.items():
        lesion = look.values[look.values != 0]
        if len(lesion) == 1 and lesion[0] in WHITE:
            white.add(key)
        elif len(lesion) and lesion.max() <= CLASSES_UP_TO:
            numbers.add(key)
    return numbers | white if len(numbers) == len(white) else min(numbers, white, key=len)


def _over(looks: dict[Key, Look], ground: float, top: float) -> Attempt:
    """Black and white, some of it with soft borders or compressed: cut at half."""
    half, refused = (ground + top) / 2, {}
    classes = _union(look for look in looks.values() if look.kind == "classes")
    for key, look in looks.items():
        low, high, why = look.values[0], look.values[-1], ""
        between = look.values[(look.values != ground) & (look.values != top)]
        if look.kind not in ("one value", "two values", "soft", "few"):
            why = look.kind
        elif look.kind in ("one value", "two values"):
            why = "two values" if len(between) else ""
        elif look.kind == "few" and np.isin(between, classes).any():
            why = "few"
        elif low < ground or high > top or (high < REACHED * top and not look.lossy):
            why = "two values"
        elif high <= half or low > half:
            why = "all alike"
        if why:
            refused[key] = _why(look, REASONS[why])
    return Rule("over", (half,)), refused


def _why(look: Look, reason: str) -> str:
    """What was found in a mask, why it is not read, and the option that decides."""
    return (
        f"{look.text}: {reason}; name the lesion with lesion_values ('1, 3', 'all but 0', 'over "
        "127' or '#ff0000'), or convert the mask to 0 and 255"
    )


# Reading ------------------------------------------------------------------------------------------


def read_case(case: Case, window: str = "") -> Reading:
    """Read the picture of a case and the union of its masks.

    Raises
    ------
    UnreadableFile
        A file is missing or damaged, a mask does not fit the decision for the data set, or has
        another size than its image.
    """
    case.check_masks()
    decision = decision_for(case)
    image, notes, orientation = noted_image(case.image, case.page, window)
    union: np.ndarray = np.zeros(image.shape[:2], dtype=bool)
    for path in case.masks:
        pixels, _, own = read_values(path, case.page)
        mask = decision.lesion(pixels[0], path, case.page)
        notes += decision.notes.get((path, case.page), ())
        if orientation in range(2, 9) and own == 1:  # drawn on the stored or the shown pixels?
            if mask.shape != union.shape and orientation > 4 and mask.shape == union.shape[::-1]:
                mask = turned(mask, orientation)
                notes += ("mask turned like its image",)
            elif orientation <= 4 or union.shape[0] == union.shape[1]:
                notes += (UPRIGHT,)
        if mask.shape != union.shape:
            (height, width), (rows, columns) = mask.shape, union.shape
            sizes = f"mask is {width} x {height} px, its image {columns} x {rows} px; resize one"
            raise UnreadableFile("; ".join([f"{path.name}: {sizes}", *notes]))
        union |= mask
    if len(case.masks) > 1:
        notes += (f"{len(case.masks)} masks united",)
    return Reading(case.id, image, union, notes)


def read_values(path: Path, page: int | None = None) -> tuple[np.ndarray, bool, int]:
    """Read a file with masks.

    Returns
    -------
    pixels : (D, H, W)
        Values of the slices, or of the one picture; colours as their codes.
    lossy : bool
        Compression changed them.
    orientation : int
        The EXIF orientation that was applied.
    """
    if suffix_of(path) not in IMAGE_SUFFIXES:
        return *volume_reader().read_mask_volume(path), 1
    picture = open_picture(path, page)
    with reading(path, "a mask"):
        if picture.pages > 1:
            raise ValueError(f"it holds {picture.pages} pages; a mask must have one")
        pixels = whole_numbers(_coded(picture, path)[None])
        return pixels, picture.lossy, picture.orientation


def whole_numbers(planes: np.ndarray) -> np.ndarray:
    """(D, H, W), rounded if all values are integers but for a scale factor."""
    if planes.dtype.kind != "f":
        return planes
    near = all(np.abs(plane - np.rint(plane)).max() < NEAR_INTEGER for plane in planes)
    return np.rint(planes) if near else planes


def _coded(picture: Picture, path: Path) -> np.ndarray:
    """(H, W): grey values, and codes of colours."""
    image = picture.image
    if picture.deep or image.mode.startswith("I") or image.mode == "F":
        pixels = finite_values(picture, path)
        if pixels.ndim == 2:
            return pixels
        return _coded_opaque(pixels) if pixels.shape[2] == 4 else colour_codes(pixels)
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        return _coded_opaque(np.array(image.convert("RGBA")))
    if image.mode == "P":
        palette = np.reshape(np.asarray(image.getpalette("RGB")), (-1, 3))
        used = np.unique(np.asarray(image))
        if len(np.unique(palette[used], axis=0)) < len(used):
            raise ValueError("numbers of its palette have the same colour; convert it to 0 and 255")
    if image.mode in ("1", "L"):
        return np.asarray(image.convert("L"))
    pixels = np.asarray(image.convert("RGB"))
    if picture.lossy:
        if np.ptp(pixels, axis=2).max() > COLOURFUL:
            raise ValueError("colours that JPEG has changed; convert it to 0 and 255")
        return np.asarray(pixels.max(2))
    return colour_codes(pixels)


def _coded_opaque(pixels: np.ndarray) -> np.ndarray:
    """(H, W, 4) -> (H, W): the transparency if it alone varies, or the colours that are opaque."""
    colours, alpha = pixels[..., :3], pixels[..., 3]
    if alpha.min() == alpha.max():
        return colour_codes(colours)
    if (colours == colours[0, 0]).all():
        return alpha
    if colours[alpha == 0].any():
        raise ValueError("transparent where its colour is not black; convert it to 0 and 255")
    colours[alpha <= alpha.max() / 2] = 0
    return colour_codes(colours)


def colour_codes(colours: np.ndarray) -> np.ndarray:
    """(..., 3) -> (...): grey values, and codes of colours."""
    grey = (colours[..., 0] == colours[..., 1]) & (colours[..., 1] == colours[..., 2])
    if grey.all():
        return np.asarray(colours[..., 0])
    codes = colours.astype(np.int64) @ (1 << 32, 1 << 16, 1) + COLOUR
    return np.where(grey, colours[..., 0].astype(np.int64), codes)
