"""Which pixels of the masks are lesion: one decision for a data set, on generated data sets.

What draws a mask takes a generator of its own, and one that starts anew for each mask of a data
set, for what one tool writes alike.

`python -m tests.test_masks 300` prints the table of data/results/masks-and-groups.md.
"""

import io
import re
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import binary_dilation, binary_erosion, gaussian_filter
from scipy.spatial import cKDTree

from lesionkd_core.data.images import Case, UnreadableFile
from lesionkd_core.data.masks import (
    Rule,
    UnclearMasks,
    colour_codes,
    decide,
    look_at,
    look_at_all,
    read_case,
    whole_numbers,
)
from tests.tiny import lesion, save

TYPES = {"1": bool, "8": np.uint8, "16": np.uint16, "32": np.int32, "float": np.float32}
TOPS = {"8": 255, "16": 65535, "32": 10**6, "float": 1000}


# Generated masks: each function returns pixels, whether they are lossy, and the lesion ------------


def blob(rng, height, width, smallest, largest):
    """A wavy ellipse, (height, width) bool."""
    radius = np.exp(rng.uniform(np.log(smallest), np.log(largest)))
    centre, mask = rng.uniform(0, (height, width)), np.zeros((height, width), bool)
    start = np.maximum(centre - 1.2 * radius, 0).astype(int)
    part = mask[tuple(slice(a, int(c + 1.2 * radius) + 1) for a, c in zip(start, centre))]
    y, x = np.indices(part.shape) + (start - centre)[:, None, None]
    turn, flat = rng.uniform(0, np.pi), rng.uniform(0.5, 1)
    along, across = x * np.cos(turn) + y * np.sin(turn), y * np.cos(turn) - x * np.sin(turn)
    wave = 1 + 0.15 * np.sin(rng.integers(2, 6) * np.arctan2(across, along))
    part[:] = np.hypot(along, across / flat) < radius * wave
    return mask


def drawn(rng, scale=1, lowest=64, highest=400):
    """One to three lesions."""
    while True:
        height, width = rng.integers(lowest, highest, 2) * scale
        size = 3 * scale, 0.45 * min(height, width)
        mask = np.any([blob(rng, height, width, *size) for _ in range(rng.integers(1, 4))], axis=0)
        if 9 * scale**2 <= mask.sum() < 0.9 * mask.size:
            return mask


def two_values(rng, tool, kind):
    mask = drawn(rng)
    if kind == "1":
        return mask, False, mask
    top = tool.choice([1, 255, tool.integers(2, TOPS[kind])])
    low = tool.integers(1, top) if top > 1 and tool.random() < 0.2 else 0
    return np.where(mask, top, low).astype(TYPES[kind]), False, mask


def labels(rng, tool, kind, count):
    """Disks, or cells that touch; numbered, spread over the range, or with numbers at random."""
    height, width = rng.integers(*((128, 300) if count < 50 else (200, 320)), 2)
    if count < 5 or rng.random() < 0.5:
        found = np.zeros((height, width), int)
        for number in range(1, count + 1):
            found[blob(rng, height, width, 4, max(6, (height * width / count) ** 0.5 / 2))] = number
    else:
        y, x = np.mgrid[:height, :width]
        seeds = rng.uniform(0, [height, width], (count, 2))
        found = cKDTree(seeds).query(np.stack([y, x], axis=-1))[1] + 1
        found[gaussian_filter(rng.random(found.shape), 12) < 0.5] = 0
    _, found = np.unique(np.append(found, 0), return_inverse=True)
    found, n = found[:-1].reshape(height, width), found.max()
    numbers = np.arange(n + 1)
    if (how := rng.integers(3)) == 1:
        numbers = np.linspace(0, 255, n + 1).round()
    elif how == 2 and n < TOPS[kind] // 2:
        numbers[1:] = rng.choice(np.arange(1, min(TOPS[kind], 3000)), n, replace=False)
    if n < 2:
        return labels(rng, tool, kind, count)
    scaled = rng.choice([1, 0.996, 1.0004]) if kind == "float" and numbers[-1] < 10 else 1
    return (numbers[found] * scaled).astype(TYPES[kind]), False, found > 0


def ignore_ring(rng, tool, kind):
    """Classes of 1 to 3 in a ring of 255 (or 65535) that means: leave this out."""
    mask = drawn(rng)
    ring = binary_dilation(mask, iterations=rng.integers(1, 6)) & ~binary_erosion(mask)
    core, classes = mask & ~ring, rng.integers(1, 4)
    pixels = np.where(core, 1 + np.arange(mask.shape[1]) * classes // mask.shape[1], 0)
    pixels[ring] = 65535 if kind == "16" and rng.random() < 0.5 else 255
    return pixels.astype(TYPES[kind]), False, core


def soft_border(rng, tool, kind):
    how, resampling = rng.integers(6), Image.Resampling
    if how < 2:  # drawn larger, then reduced
        factor = int(rng.integers(2, 5))
        image = Image.fromarray(drawn(rng, factor, 64, 200).astype(np.float32))
        size = image.width // factor, image.height // factor
        share = np.asarray(image.resize(size, (resampling.BOX, resampling.BILINEAR)[how]))
    elif how < 4:  # resized
        image = Image.fromarray(drawn(rng).astype(np.uint8) * 255)
        size = [int(side * rng.uniform(0.5, 3)) for side in image.size]
        share = np.asarray(image.resize(size, (resampling.BICUBIC, resampling.BILINEAR)[how - 2]))
        share = share / 255
    elif how == 4:  # reduced, then enlarged without interpolation
        share = np.asarray(Image.fromarray(drawn(rng, 2, 64, 150).astype(np.uint8) * 255).reduce(2))
        times = rng.integers(2, 5)
        share = share.repeat(times, 0).repeat(times, 1) / 255
    else:
        share = gaussian_filter(drawn(rng).astype(np.float32), rng.uniform(0.4, 3))
    top = 1 if kind == "float" else tool.choice([TOPS[kind], 200])
    pixels = share * top if kind == "float" else np.rint(share * top)
    return pixels.astype(TYPES[kind]), False, share


def jpeg(pixels, quality):
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "JPEG", quality=int(quality))
    return np.asarray(Image.open(content))


def of_jpeg(rng, tool, lossy, top=255):
    mask = drawn(rng)
    pixels = jpeg(mask.astype(np.uint8) * top, rng.integers(60, 96))
    return (pixels, lossy, mask) if pixels.any() else of_jpeg(rng, tool, lossy, top)


def binary(rng, tool, top=255, low=0):
    mask = drawn(rng)
    return np.where(mask, top, low).astype(np.uint8), False, mask


def one_value(rng, tool, value, lesion=False):
    shape = rng.integers(64, 400, 2)
    return np.full(shape, value, np.uint8), False, np.full(shape, lesion)


def faint(rng, tool):
    """Black and white with a few faint pixels where there is no lesion."""
    pixels, lossy, mask = binary(rng, tool)
    places = np.argwhere(~binary_dilation(mask, iterations=2))
    some = places[rng.choice(len(places), rng.integers(1, 6), replace=False)]
    pixels[tuple(some.T)] = rng.integers(1, 31, len(some))
    return pixels, lossy, mask


def classes(rng, tool, values, lowest=0):
    """A lesion with a core, or of halves: each part has another value."""
    mask = drawn(rng)
    part = gaussian_filter(rng.random(mask.shape), 8)
    edges = np.quantile(part[mask], np.linspace(0, 1, len(values) + 1)[1:-1])
    found = np.array(values)[np.digitize(part, edges)]
    return np.where(mask, found, lowest).astype(np.uint16), False, mask


COLOURS = np.array([(128, 0, 0), (0, 128, 0), (128, 128, 0), (0, 0, 128), (128, 0, 128)])


def colours(rng, tool, on=(0, 0, 0)):
    """A colour for each lesion."""
    count = rng.integers(1, 6)
    labelled, _, mask = labels(rng, tool, "8", 3)
    numbers = np.searchsorted(np.unique(labelled[mask]), labelled) % count
    return colour_codes(np.where(mask[..., None], COLOURS[numbers], on)), False, mask


def void_ring(rng, tool):
    pixels, _, mask = colours(rng, tool)
    ring = binary_dilation(mask, iterations=3) & ~mask
    return np.where(ring, colour_codes(np.array([224, 224, 192])), pixels), False, mask


def with_noise(rng, tool):
    mask = drawn(rng)
    noise = rng.normal(0, np.exp(rng.uniform(0, 4)), mask.shape)
    return (mask * 255 + noise).clip(0, 255).astype(np.uint8), False, mask


def photograph(rng, tool):
    """Ultrasound, skin or a smooth picture; some compressed, some of 16 bits."""
    height, width = rng.integers(64, 400, 2)
    waves = sum(gaussian_filter(rng.normal(size=(height, width)), s) * s for s in (1, 3, 8, 20))
    grey = 120 + 60 * waves / waves.std() * rng.uniform(0.3, 1)
    if rng.random() < 0.3:
        grey *= blob(rng, height, width, 40, 90)  # black surroundings
    grey = grey.clip(0, 255).astype(np.uint8)
    how = rng.integers(4)
    grey = jpeg(grey, rng.integers(30, 96)) if how in (1, 2) else grey
    return grey.astype(np.uint16) * 256 if how == 3 else grey, how == 1, None


def noise(rng, tool):
    shape = rng.integers(64, 400, 2)
    pixels = rng.normal(0, 300, shape).astype(np.int32)
    return (pixels if rng.random() < 0.5 else (pixels % 256).astype(np.uint8)), False, None


# Kinds of data sets: what draws most masks, what draws the others, and whether each is read ---

ALONE = {
    **{f"two values, {kind}": (partial(two_values, kind=kind), True) for kind in TYPES},
    **{
        f"{count} labels, {kind}": (partial(labels, kind=kind, count=count), None)
        for count in (3, 40, 200)
        for kind in TOPS
    },
    **{f"ignore ring, {kind}": (partial(ignore_ring, kind=kind), False) for kind in TOPS},
    **{f"soft border, {kind}": (partial(soft_border, kind=kind), None) for kind in TOPS},
    "colours on black": (colours, True),
    "colours on white": (partial(colours, on=(255, 255, 255)), False),
    "colours with a VOC void ring": (void_ring, False),
    "JPEG, quality 60 to 95": (partial(of_jpeg, lossy=True), True),
    "JPEG saved as PNG": (partial(of_jpeg, lossy=False), None),
    "JPEG of 0 and 1": (partial(of_jpeg, lossy=True, top=1), False),
    "noise on black and white": (with_noise, None),
    "photograph": (photograph, False),
    "noise alone": (noise, False),
}
EMPTY, FULL = partial(one_value, value=0), partial(one_value, value=255, lesion=True)
ONE, NUMBERS = partial(binary, top=1), partial(classes, values=(1, 2, 3))
FROM_1, GREYS = partial(binary, low=1, top=2), partial(classes, values=(60, 120, 240))
SOFT, JPEG = partial(soft_border, kind="8"), partial(of_jpeg, lossy=True)
RING, CELLS = partial(ignore_ring, kind="8"), partial(labels, kind="16", count=40)
ON_WHITE = partial(colours, on=(255, 255, 255))


def tile(rng, tool):
    """Classes everywhere."""
    pixels, *_ = classes(rng, tool, (2, 3), 1)
    return pixels, False, pixels > 0


MIXED = {
    "black and white, some empty": (binary, EMPTY, True),
    "black and white, some all white": (binary, FULL, True),
    "black and white, some with faint pixels": (binary, faint, True),
    "black and white, some JPEG": (binary, JPEG, True),
    "black and white, some JPEG of 0 and 1": (binary, partial(JPEG, top=1), False),
    "black and white, some soft": (binary, SOFT, None),
    "black and white, some 0 and 1": (binary, ONE, False),
    "0 and 1, some 0 and 255": (ONE, binary, False),
    "black and white, some with grey areas": (binary, partial(classes, values=(128, 255)), None),
    "black and white, some with an ignore ring": (binary, RING, False),
    "black and white, some in colours": (binary, colours, True),
    "black and white, some colours on white": (binary, ON_WHITE, False),
    "black and white, some instances": (binary, CELLS, None),
    "black and white, some photographs": (binary, photograph, False),
    "soft borders, some black and white": (SOFT, binary, None),
    "soft borders, some with grey areas": (SOFT, partial(classes, values=(64, 255)), None),
    "soft borders, some photographs": (SOFT, photograph, None),
    "classes, some with fewer": (NUMBERS, partial(binary, top=2), True),
    "classes, some empty": (NUMBERS, EMPTY, True),
    "classes, some without background": (NUMBERS, tile, True),
    "classes, some with an ignore ring": (NUMBERS, RING, False),
    "classes, some 0 and 255": (NUMBERS, binary, False),
    "grey classes, some soft": (GREYS, SOFT, None),
    "grey classes, some JPEG": (GREYS, JPEG, None),
    "labels from 1, some without a lesion": (FROM_1, partial(one_value, value=1), True),
    "labels from 1, some from 0": (FROM_1, partial(classes, values=(1, 2)), False),
    "instances, some photographs": (CELLS, photograph, None),
    "instances, some soft": (CELLS, partial(soft_border, kind="16"), None),
    "colours, some black and white": (colours, binary, True),
    "colours, some colours on white": (colours, ON_WHITE, False),
}
KINDS = {name: (make, make, read) for name, (make, read) in ALONE.items()} | MIXED
MASKS = 9


def data_set(name, seed):
    """Nine masks, and which one to three of them are of the second kind."""
    most, others, _ = KINDS[name]
    rng = np.random.default_rng([list(KINDS).index(name), *np.atleast_1d(seed)])
    odd = set(rng.choice(MASKS, rng.integers(1, 4), replace=False).tolist())
    tools = (np.random.default_rng(seed) for _ in range(MASKS))
    return [(others if i in odd else most)(rng, tool) for i, tool in enumerate(tools)], odd


def read(masks):
    """The lesion of each mask, or None if it is refused."""
    pixels = {(Path(str(i)), None): whole_numbers(mask[0][None]) for i, mask in enumerate(masks)}
    try:
        decision = decide({key: look_at(pixels[key], m[1]) for key, m in zip(pixels, masks)})
    except UnclearMasks:
        return [None] * len(masks)
    return [
        None if key in decision.refused else decision.lesion(values[0], *key)
        for key, values in pixels.items()
    ]


def is_right(found, truth, fuzzy):
    if truth is None:
        return False
    certain = np.abs(np.asarray(truth, float) - 0.5) > 0.02  # half covered: either
    if fuzzy:  # compression and noise change pixels at the border
        around = np.ones((3, 3))
        inner = binary_erosion(truth > 0.5, around, border_value=1)
        certain = ~binary_dilation(truth > 0.5, around) | inner
    return not ((found != (truth > 0.5)) & certain).any()


def judged(name, seed):
    """Which masks of a generated data set are read wrongly, which refused, and which are odd."""
    masks, odd = data_set(name, seed)
    found, fuzzy = read(masks), "JPEG" in name or "noise on" in name
    refused = {i for i, lesion in enumerate(found) if lesion is None}
    right = {i for i in range(MASKS) if i not in refused and is_right(found[i], masks[i][2], fuzzy)}
    return set(range(MASKS)) - refused - right, refused, odd


def table(count: int):
    """Fractions of masks that are wrong and refused in `count` data sets of each kind."""
    import pandas as pd

    rows = []
    for name in KINDS:
        kind = re.sub(r", (8|16|32|float)$", ", 8 to 32 bits and float", name)
        found = [judged(name, (seed, 7)) for seed in range(count)]
        rows.append((kind, count * MASKS, *(sum(len(f[part]) for f in found) for part in (0, 1))))
    found = pd.DataFrame(rows, columns=["masks of a data set", "masks", "wrong", "refused"])
    found = found.groupby("masks of a data set", sort=False).sum()
    return found.assign(
        wrong=found["wrong"] / found["masks"], refused=found["refused"] / found["masks"]
    )


@pytest.mark.parametrize("name", KINDS)
def test_generated_data_sets_are_read_right_or_refused(name):
    wrong, refused, odd = judged(name, 0)
    assert not wrong
    if KINDS[name][2] is not None:
        doubtful = odd if name in MIXED else set(range(MASKS))
        assert refused == (set() if KINDS[name][2] else doubtful)


# Small data sets as people have them --------------------------------------------------------------

A, B, C = lesion(12), lesion(9, top=20, left=30), lesion(7, top=30, left=10)
RED, GREEN = np.uint8([255, 0, 0]), np.uint8([0, 255, 0])


def grey(*parts):
    """(mask, value) one over the other."""
    pixels = np.zeros(A.shape, np.uint8)
    for mask, value in parts:
        pixels[mask] = value
    return pixels


def painted(*parts, on=(0, 0, 0)):
    pixels = np.full((*A.shape, len(on)), on, np.uint8)
    for mask, colour in parts:
        pixels[mask] = colour
    return pixels


def with_palette(numbers, *colours):
    image = Image.fromarray(numbers.astype(np.uint8), mode="P")
    image.putpalette(np.ravel(colours).tolist())
    return image


def specks(*values):
    pixels = grey((A, 255))
    pixels[2, 2 : 2 + 3 * len(values) : 3] = values
    return pixels


BLACK_AND_WHITE = [grey((mask, 255)) for mask in (A, B, C, A | B, B | C)]
BINARY = {f"w{i}.png": (pixels, pixels > 0) for i, pixels in enumerate(BLACK_AND_WHITE)}
NOTHING = ~A & A


def many(*masks):
    return {f"{i}.png": mask for i, mask in enumerate(masks)}


DATA_SETS = {  # words of the line; files with the lesion, or words of the refusal; options
    "grey labels": (
        "masks: values 0, 10, 240, 250; lesion: all but 0",
        many(*[(grey((A, 10), (B, 240), (C, 250)), None)] * 3),
    ),
    "one mask all of an unknown value": (
        "1 of 6 do not fit",
        BINARY | {"all.png": (grey((~NOTHING, 40)), "40: one value alone is neither lesion nor")},
    ),
    "all empty": (
        "masks: values 0; lesion: all",
        many((grey(), NOTHING), (grey(), NOTHING)),
    ),
    "faint pixels alone": (
        "lesion: over 127.5; 1 of 7 do not fit",
        BINARY | {"1.png": (specks(19, 8), A), "x.png": (grey((C, 9)), "values 0, 9: most masks")},
    ),
    "the lesion beside an ignore ring": (
        "masks: values 0, 1, 255; lesion: 1 (lesion_values)",
        many((grey((binary_dilation(A), 255), (A, 1)), A), (grey((B, 1)), B)),
        "1",
    ),
    "red of two colours": (
        "masks: values 0, #00ff00, #ff0000; lesion: #ff0000 (lesion_values)",
        many((painted((A, GREEN), (lesion(6), RED)), lesion(6)), (painted((B, GREEN)), NOTHING)),
        "#ff0000",
    ),
    "palettes in another order": (
        "masks: values 0, #ff0000; lesion: all but 0",
        many((with_palette(A, (0, 0, 0), RED), A), (with_palette(~B, RED, (0, 0, 0)), B)),
    ),
    "transparent where it is white": (
        "masks: values 0, 255",
        BINARY | {"t.png": (painted((A, (0, 0, 0, 255)), on=(255, 255, 255, 0)), "transparent wh")},
    ),
}
UNDECIDED = {  # words of the error; files; options
    "numbers from 1 without a background": (
        "values 1, 2, 3: 0 is in 0 of 2 masks; what is the background?",
        many(*[(grey((~NOTHING, 1), (A, 2), (B, 3)), None)] * 2),
    ),
    "as many of 0 and 1 as of 0 and 255": (
        "2 of 4 masks do not tell which values are lesion, such as",
        many(*[(grey((A, 1)), None), (grey((A, 255)), None)] * 2),
    ),
    "an ignore ring": (
        "values 0, 1, 255: this may mean 'ignore', and pixels cannot be left out",
        many(*[(grey((binary_dilation(A), 255), (A, 1)), None)] * 3),
    ),
    "all over a threshold": (
        "masks: values 0, 255; lesion_values 'over 300' selects all or none",
        BINARY,
        "over 300",
    ),
    "a colour that nearly is one of theirs": (
        "masks: values 0, #ff0000; lesion_values names #ff0001, which no mask has",
        many(*[(painted((A, RED)), A)] * 2),
        "#ff0001",
    ),
}


def saved_cases(folder, files):
    cases = []
    for name, (pixels, _) in files.items():
        path = folder / name
        if isinstance(pixels, Image.Image):
            pixels.save(path)
        else:
            save(path, pixels)
        cases.append(Case(name, path, (path,)))
    return cases


@pytest.mark.parametrize("name", DATA_SETS)
def test_one_decision_for_a_data_set(tmp_path, name):
    line, files, *options = DATA_SETS[name]
    cases = saved_cases(tmp_path, files)
    decision = decide(look_at_all(cases), *options)
    assert line in decision.line
    for case, (pixels, expected) in zip(cases, files.values()):
        case = replace(case, decision=decision)
        if isinstance(expected, str):
            with pytest.raises(UnreadableFile, match=re.escape(expected)):
                read_case(case)
        else:
            expected = np.asarray(pixels) > 0 if expected is None else expected
            assert np.array_equal(read_case(case).mask, expected)


@pytest.mark.parametrize("name", UNDECIDED)
def test_masks_that_decide_nothing_are_an_error(tmp_path, name):
    words, files, *options = UNDECIDED[name]
    with pytest.raises(UnclearMasks, match=re.escape(words)):
        decide(look_at_all(saved_cases(tmp_path, files)), *options)


@pytest.mark.parametrize(
    ("option", "thirds"), [("0.6667, 1", 2), ("all but 0, 0.3333", 2), ("1", 3)]
)
def test_values_that_are_no_integers_are_named_with_four_digits(option, thirds):
    """As the line about the masks writes them; the mean of three annotators."""
    pixels = np.arange(4, dtype=np.float32) / np.float32(3)
    assert Rule.parse(option)(pixels).tolist() == [n >= thirds for n in range(4)]


if __name__ == "__main__":
    print(table(int(sys.argv[1])).to_markdown(floatfmt=("", ".0f", ".0%", ".1%")))
