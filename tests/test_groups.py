"""Groups: copies confirmed by their content, names that are patients, frames of a scene."""

import numpy as np
import pandas as pd
import pytest
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageOps

from lesionkd_core.config import ConfigError
from lesionkd_core.data import layouts, splits
from lesionkd_core.data.images import Case
from lesionkd_core.data.layouts import ManifestError
from lesionkd_core.data.pixels import hash_thumbnails, thumbnail
from lesionkd_core.data.prepare import prepare
from lesionkd_core.data.splits import group_cases
from tests.test_prepare import config
from tests.tiny import SIZE, lesion, picture, save


def thumbnails_of(images):
    return np.stack([thumbnail(np.asarray(image)) for image in images])


def grouped(images, names=None, **how):
    return group_cases(pd.Series(names or [""] * len(images)), thumbnails_of(images), **how)


def groups_of(images, **how) -> list[str]:
    return grouped(images, **how).codes


def smooth(rng, shape, width):
    """A random field of standard deviation 1."""
    coarse = Image.fromarray(rng.normal(size=[n // width + 2 for n in shape]).astype(np.float32))
    field = np.asarray(coarse.resize(shape[::-1], Image.Resampling.BICUBIC))
    return (field - field.mean()) / field.std()


def retina(seed: int) -> Image.Image:
    """A standardized view as in DRIVE: the same round field, disc and macula; other vessels."""
    rng, (height, width) = np.random.default_rng(seed), (292, 282)
    y, x = np.mgrid[:height, :width]
    radius = np.hypot(x - width / 2, y - height / 2)
    disc = np.exp(-((x - 60) ** 2 + (y - 146) ** 2) / 400)
    macula = np.exp(-((x - 160) ** 2 + (y - 146) ** 2) / 600)
    grey = 130 * (1 - 0.3 * (radius / 135) ** 2) + 70 * disc - 35 * macula
    grey += 3 * smooth(rng, (height, width), 6)
    vessels = Image.new("L", (width, height))
    for start in np.tile((-1.3, -0.6, 0.6, 1.3, 2.5, -2.5), 2):
        angles = start + np.cumsum(rng.normal(0, 0.2, 45))
        walk = np.cumsum(5 * np.array([np.cos(angles), np.sin(angles)]), axis=1).T + (60, 146)
        ImageDraw.Draw(vessels).line(list(map(tuple, walk)), fill=255, width=2)
    grey -= np.asarray(vessels.filter(ImageFilter.GaussianBlur(0.7))) / 255 * 45
    grey[radius > 135] = 0
    return Image.fromarray(grey.clip(0, 255).astype(np.uint8)).convert("RGB")


@pytest.fixture(scope="module")
def retinas():
    return [retina(seed) for seed in range(40)]


def skin(seed: int, shape=(96, 128)) -> np.ndarray:
    """A dark spot of its own place, size and outline on speckled skin, (H, W) float."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[: shape[0], : shape[1]]
    y, x = y - shape[0] / 2 - rng.normal(0, 8), x - shape[1] / 2 - rng.normal(0, 12)
    outline = rng.uniform(10, 18) * (1 + 0.2 * np.cos(rng.integers(3, 7) * np.arctan2(y, x)))
    return 175 + rng.normal(0, 5, shape) - rng.uniform(30, 70) * (np.hypot(y, x) < outline)


def rim(width):
    y, x = np.mgrid[:96, :128]
    away = np.minimum.reduce([y, x, 95 - y, 127 - x])
    return lambda skin: skin * np.clip(away / width, 0, 1)


def vignette(skin):
    y, x = np.mgrid[:96, :128]
    return skin * np.clip((1.35 - np.hypot((y - 48) / 48, (x - 64) / 64)) / 0.6, 0, 1)


def marked(*boxes):
    """Black boxes (top, bottom, left, right): a line, a ruler, a logo."""

    def mark(skin):
        found = skin.copy()
        for top, bottom, left, right in boxes:
            found[top:bottom, left:right] = 10
        return found

    return mark


RULER = [(80, 82, 10, 118)] + [(74, 80, at, at + 2) for at in range(10, 118, 6)]
STRANGERS = {
    "a rim": rim(10),
    "a vignette": vignette,
    "a ruler": marked(*RULER),
}
COPIES = {
    "brighter": lambda image: ImageEnhance.Brightness(image).enhance(1.2),
    "cropped by 1 %": lambda image: ImageOps.crop(image, 3),
    "mirrored": ImageOps.mirror,
    "mirrored and turned": lambda image: ImageOps.mirror(image.rotate(90, expand=True)),
}


# Copies -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [1, 0.5])
@pytest.mark.parametrize("what", STRANGERS)
def test_what_strangers_share_makes_no_copies_of_them(what, share):
    common = STRANGERS[what]
    skins = [common(skin(k)) if k < 24 * share else skin(k) for k in range(24)]
    images = [np.repeat(s.clip(0, 255).astype(np.uint8)[..., None], 3, 2) for s in skins]
    alike = splits.compare_pairs(thumbnails_of(images))["correlation"] >= splits.SAME
    assert alike.any() or share < 1  # the correlation of the whole would join them
    assert len(set(groups_of(images))) == 24


@pytest.mark.parametrize("what", STRANGERS)
def test_copies_under_what_strangers_share_are_found(what):
    skins = [STRANGERS[what](skin(k)) for k in range(16)]
    skins += [skins[k] * 0.9 + 8 for k in (3, 7)]
    images = [np.repeat(s.clip(0, 255).astype(np.uint8)[..., None], 3, 2) for s in skins]
    groups = groups_of(images)
    assert groups[16:] == [groups[3], groups[7]] and len(set(groups)) == 16


def test_different_retinas_in_the_same_view_are_no_copies(retinas):
    table = splits.compare_pairs(thumbnails_of(retinas))
    hashes = hash_thumbnails(thumbnails_of(retinas))
    upright = table[table["turn"] == 0].itertuples()
    assert all(row.bits == (hashes[row.first] != hashes[row.second]).sum() for row in upright)
    assert len(table) > 100  # by the hash alone, most of them would be one group
    assert len(set(groups_of(retinas))) == 40


@pytest.mark.parametrize("copy", COPIES)
def test_a_changed_copy_shares_the_group_of_its_original(retinas, copy):
    found = grouped([*retinas[:10], *map(COPIES[copy], retinas[:10])])
    assert found.codes[:10] == found.codes[10:] and len(set(found.codes)) == 10
    assert found.joined.all() and not grouped(retinas[:10]).joined.any()
    others = [*retinas[20:26], COPIES[copy](retinas[5])]
    assert splits.copies(thumbnails_of(retinas[:8]), thumbnails_of(others)).tolist() == [6]


def test_black_and_flat_thumbnails_match_nothing():
    flat = [np.full((*SIZE, 3), value, np.uint8) for value in (0, 0, 90, 90)]
    assert len(set(groups_of(flat))) == 4


def test_a_copy_is_found_however_far_away():
    thumbnails = np.random.default_rng(0).integers(0, 256, (600, 64, 64)).astype(np.uint8)
    thumbnails[590] = thumbnails[3]
    groups = group_cases(pd.Series([""] * 600), thumbnails).codes
    assert groups[590] == groups[3] and len(set(groups)) == 599
    apart = group_cases(pd.Series([""] * 600), thumbnails, join_copies=False).codes
    assert len(set(apart)) == 600


# Names --------------------------------------------------------------------------------------------


def test_groups_with_names_are_never_joined_and_images_without_one_are(tmp_path):
    images = [picture(i) for i in range(7)]
    for copy in (2, 4):  # of v1, in v2 and without a name
        images[copy] = np.clip(images[1].astype(int) + copy, 0, 255).astype(np.uint8)
    found = grouped(images, ["v1", "v1", "v2", "v2", "", "", "v3"])
    sets = {frozenset(np.flatnonzero(np.array(found.codes) == g)) for g in set(found.codes)}
    assert sets == {frozenset(g) for g in ({0, 1, 4}, {2, 3}, {5}, {6})}
    assert found.apart[0] == (1, 2) and found.joined.tolist() == [k in (1, 4) for k in range(7)]
    assert len(set(group_cases(pd.Series(["v1", "", "v1", ""]), None).codes)) == 3


def test_what_was_joined_and_what_stayed_apart_is_said(tmp_path, runs, messages):
    rows = [(f"{k}.png", f"{k}.png", f"P{k}" if k < 12 else "") for k in range(24)]
    for k in range(24):
        copied = {11: 0, 23: 20}.get(k, k)  # patients P0 and P11; two without a name
        save(tmp_path / f"{k}.png", picture(copied))
    for k in range(24):
        save(tmp_path / "masks" / f"{k}.png", lesion(6 + k))
    lines = [f"{image},masks/{mask},{group}" for image, mask, group in rows]
    (tmp_path / "list.csv").write_text("\n".join(["image,mask,group", *lines]))
    found = prepare(config(tmp_path / "list.csv"))
    assert found.summary["joined"] == {"images": 2, "groups": 1, "largest": [["20", "23"]]}
    assert found.cases["joined"].sum() == 2
    assert found.path.name.startswith(tmp_path.name)  # a manifest has the name of its folder
    assert any("2 images show the same as another and form 1 groups" in m for m in messages())
    [warning] = found.summary["warnings"]
    assert "groups with different names, such as 0.png and 11.png" in warning


def patients(root, numbered="patient{:02d}_{:03d}", count=7, slices=4, below=""):
    names = [numbered.format(p, 40 + s) for p in range(count) for s in range(slices)]
    for i, name in enumerate(names):
        save(root / "images" / below.format(i) / f"{name}.png", picture(i))
        save(root / "masks" / below.format(i) / f"{name}.png", lesion(6 + i))
    return root


NAMES = {  # names of files, the rule that unites them, number of groups; or no hint at a patient
    "numbered series": (["p{0}_{1}"], r"([^\W_]+)[^/]*$", 9),
    "two frames": (["patient{0:03d}_frame01", "patient{0:03d}_frame12"], r"([^\W_]+)[^/]*$", 9),
    "sides behind a number": (["bus_{0:04d}-l", "bus_{0:04d}-r"], r"([^/]+)[_ -][^/]*$", 9),
    "two parts": (["{0}-a_{1}", "{0}-b_{1}"], r"([^\W_]+)[^/]*$", 9),
    "folders of patients": (["case{0}/{1}"], "folder", 9),
    "folders in folders of patients": (["case{0}/images/{1}"], "folder", 9),
    "no separator": (["p{0}frame{1}"], "number", 9),
    "classes": (["benign ({0}{1})", "malignant ({0}{1})"], None, 2),
    "identifiers": (["a{0}{1}f-9c{1}{0}"], None, 27),
}


@pytest.mark.parametrize("what", NAMES)
def test_names_that_hint_at_patients_give_a_rule_that_unites_them(what, tmp_path):
    forms, rule, count = NAMES[what]
    names = sorted({f.format(p, s) for f in forms for p in range(1, 10) for s in range(3)})
    cases = [Case(name, tmp_path / "images" / f"{name}.png", ()) for name in names]
    found = layouts.suggested_groups(cases, tmp_path)
    assert (found and found[0]) == rule
    if rule:
        regrouped = layouts._regrouped(cases, tmp_path, rule)
        partition = {(case.group, found[1][case.id]) for case in regrouped}
        assert len(partition) == len({case.group for case in regrouped}) == count


@pytest.mark.parametrize(
    ("numbered", "rule"),
    [("patient{:02d}_{:03d}", r"([^\W_]+)[^/]*$"), ("p{:02d}frame{:03d}", "number")],
)
def test_the_advice_about_names_is_followed_and_the_warning_is_gone(
    tmp_path, runs, messages, numbered, rule
):
    found = prepare(config(patients(tmp_path / "mine", numbered)))
    [warning] = found.summary["warnings"]
    assert f"give group_by = '{rule}', which makes 7 groups" in warning
    assert any(warning in message for message in messages())
    followed = prepare(config(tmp_path / "mine", group_by=rule))
    assert followed.summary["warnings"] == [] and followed.summary["groups"] == 7


RULES = {"number": 7, "folder": 1, r"patient(\d+)": 7, r"_(\d+)": 4, "patient0[0-2]|patient0.": 7}


@pytest.mark.parametrize("rule", RULES)
def test_rules_name_the_groups(tmp_path, rule):
    cases = layouts.listing(config(patients(tmp_path / "mine"), group_by=rule)).cases
    assert len({case.group for case in cases}) == RULES[rule]


def test_a_column_of_the_manifest_names_the_groups(tmp_path, runs):
    patients(tmp_path, "{0}-{1}")
    rows = [
        f"images/{p}-{s}.png,masks/{p}-{s}.png,Mrs {p}" for p in range(7) for s in range(40, 44)
    ]
    (tmp_path / "list.csv").write_text("\n".join(["image,mask,Patient", *rows]))
    found = prepare(config(tmp_path / "list.csv", group_by="column:Patient"))
    assert found.summary["groups"] == 7
    warning = prepare(config(tmp_path / "list.csv")).summary["warnings"][0]
    assert "not read: patient; if one names the patient, give group_by = 'column:" in warning
    with pytest.raises(ManifestError, match="no column 'doctor'"):
        prepare(config(tmp_path / "list.csv", group_by="column:doctor"))


@pytest.mark.fault
def test_a_rule_that_does_not_fit_is_refused(tmp_path, runs):
    folder = patients(tmp_path / "mine")
    save(folder / "images" / "scan.png", picture(99))
    save(folder / "masks" / "scan.png", lesion(9))
    with pytest.raises(ConfigError, match=r"nothing in 1 of 29 paths.*'images/scan\.png'"):
        prepare(config(folder, group_by=r"patient(\d+)"))
    with pytest.raises(ConfigError, match="no regular expression"):
        config(folder, group_by="patient(")
    with pytest.raises(ConfigError, match="no CSV manifest"):
        prepare(config(folder, group_by="column:patient"))


# Frames of a scene --------------------------------------------------------------------------------


def film(scene: int, frames: int):
    """Frames of a camera that moves over a scene."""
    rng = np.random.default_rng(scene)
    wide = 120 + 30 * smooth(rng, (300, 420), 18) + 14 * smooth(rng, (300, 420), 6)
    x, y = np.cumsum(rng.integers(-24, 25, (frames, 2)), axis=0).T + [[80], [50]]
    for left, top in zip(x.clip(0, 160), y.clip(0, 100)):
        part = wide[top : top + 200, left : left + 260] + rng.normal(0, 3, (200, 260))
        yield Image.fromarray(part.clip(0, 255).astype(np.uint8)).convert("RGB")


def test_consecutive_frames_of_a_scene_are_grouped_in_a_sequence():
    lengths = (6, 9, 5, 8)
    frames = [frame for scene, n in enumerate(lengths) for frame in film(scene, n)]
    groups = groups_of(frames, sequence=True)
    ends = np.cumsum(lengths)
    found = [set(groups[end - n : end]) for n, end in zip(lengths, ends)]
    assert [len(scene) for scene in found] == [1] * 4 and len(set(groups)) == 4
    assert len(set(groups_of(frames))) > 10  # without the order: copies alone


@pytest.mark.parametrize("place", ["etis-larib", "ColonDB"])
def test_polyp_frames_without_known_videos_leak_and_the_log_says_so(
    tmp_path, runs, monkeypatch, messages, place
):
    folder = {"etis-larib": "ETIS-Larib"}.get(place, place)
    for k, frame in enumerate(film(0, 6), 1):
        save(tmp_path / folder / "images" / f"{k}.png", frame)
        save(tmp_path / folder / "masks" / f"{k}.png", lesion(40, size=(200, 260)))
    for k in range(7, 20):
        save(tmp_path / folder / "images" / f"{k}.png", picture(k))
        save(tmp_path / folder / "masks" / f"{k}.png", lesion(9))
    monkeypatch.setenv("LESIONKD_DATA", str(tmp_path))
    found = prepare(config(place))
    assert found.cases["group"][:6].nunique() == 1 and found.summary["groups"] == 14
    assert (
        "nothing in this release says which frames show one scene" in found.summary["warnings"][0]
    )
    assert prepare(config(place, split="test")).summary["warnings"] == []
    assert (place == "etis-larib") != any("this folder is the release" in m for m in messages())
