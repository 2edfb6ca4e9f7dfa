"""Groups that mean patients: rules, copies confirmed in detail, frames of a scene, few groups."""

import numpy as np
import pandas as pd
import pytest
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageOps

from lesionkd_core.config import ConfigError, PrepareConfig
from lesionkd_core.data import layouts, splits
from lesionkd_core.data.layouts import ManifestError, data_root
from lesionkd_core.data.pixels import hash_thumbnails, perceptual_hash, thumbnail
from lesionkd_core.data.prepare import prepare
from lesionkd_core.data.splits import SplitError
from tests.tiny import SIZE, lesion, picture, save


def config(folder, **options):
    return PrepareConfig(**{"dataset": str(folder), "pixels": 32, **options})


def groups_of(images, bits=12, sequence=False) -> list[str]:
    thumbnails = np.stack([thumbnail(np.asarray(image)) for image in images])
    return splits.group_cases(pd.Series([""] * len(images)), thumbnails, bits, sequence)


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
    draw = ImageDraw.Draw(vessels)

    def branch(x, y, angle, thickness, steps):
        for _ in range(steps):
            end = x + 5 * np.cos(angle), y + 5 * np.sin(angle)
            draw.line((x, y, *end), fill=255, width=max(1, round(thickness)))
            (x, y), angle = end, angle + rng.normal(0, 0.15)
            if thickness > 1 and rng.random() < 0.12:
                branch(x, y, angle + rng.choice([-1, 1]) * 0.7, thickness * 0.7, steps // 2)

    for angle in (-1.3, -0.6, 0.6, 1.3, 2.5, -2.5):
        branch(60, 146, angle + rng.normal(0, 0.2), 2.5, 45)
    grey -= np.asarray(vessels.filter(ImageFilter.GaussianBlur(0.7))) / 255 * 45
    grey[radius > 135] = 0
    return Image.fromarray(grey.clip(0, 255).astype(np.uint8)).convert("RGB")


@pytest.fixture(scope="module")
def retinas():
    return [retina(seed) for seed in range(40)]


COPIES = {
    "brighter": lambda image: ImageEnhance.Brightness(image).enhance(1.2),
    "half as large": lambda image: image.reduce(2),
    "cropped by 1 %": lambda image: ImageOps.crop(image, 3),
    "turned by 1 degree": lambda image: image.rotate(1),
}


# Copies -------------------------------------------------------------------------------------------


def test_different_retinas_in_the_same_view_are_no_copies(retinas):
    hashes = np.stack([perceptual_hash(np.asarray(image)) for image in retinas])
    near = np.concatenate([*splits.near_pairs(hashes, 12)])
    assert len(near) > 100  # by the hash alone, most of them would be one group
    assert len(set(groups_of(retinas))) == len(set(groups_of(retinas, bits=16))) == 40


@pytest.mark.parametrize("copy", COPIES)
def test_a_changed_copy_shares_the_group_of_its_original(retinas, copy):
    groups = groups_of([*retinas[:10], *map(COPIES[copy], retinas[:10])])
    assert groups[:10] == groups[10:] and len(set(groups)) == 10


def test_a_ruler_at_the_same_place_makes_no_copy_of_two_skins():
    images = []
    for seed in range(12):
        rng = np.random.default_rng(seed)
        grey = 170 + 4 * smooth(rng, (192, 256), 3)
        y, x = np.mgrid[:192, :256]
        spot = np.hypot((x - 128 - rng.normal(0, 4)) / 26, (y - 88) / 22) + 0.15 * smooth(
            rng, (192, 256), 12
        )
        grey -= 90 / (1 + np.exp(12 * (spot - 1)))
        image = Image.fromarray(grey.clip(0, 255).astype(np.uint8)).convert("RGB")
        draw = ImageDraw.Draw(image)
        draw.line((60, 165, 200, 165), fill=(20, 20, 20), width=2)
        for tick in range(60, 201, 10):
            draw.line((tick, 158, tick, 165), fill=(20, 20, 20))
        images.append(image)
    hashes = hash_thumbnails(np.stack([thumbnail(np.asarray(image)) for image in images]))
    assert len(np.concatenate([*splits.near_pairs(hashes, 12)])) > 10
    assert len(set(groups_of(images))) == 12


def test_both_numbers_of_a_pair_are_in_the_table(retinas):
    images = [retinas[0], retinas[1], COPIES["brighter"](retinas[0])]
    thumbnails = np.stack([thumbnail(np.asarray(image)) for image in images])
    table = splits.compare_pairs(thumbnails, 16).set_index(["first", "second"])
    assert table.loc[(0, 2), "same"] and table.loc[(0, 2), "correlation"] > 0.9
    assert not table.loc[(0, 1), "same"] and table.loc[(0, 1), "correlation"] < 0.45
    distance = (
        perceptual_hash(np.asarray(images[0])) != perceptual_hash(np.asarray(images[1]))
    ).sum()
    assert table.loc[(0, 1), "bits"] == distance


def test_the_correlation_of_an_image_with_itself_is_1_and_of_unlike_ones_small():
    thumbnails = np.stack([thumbnail(np.asarray(picture(seed))) for seed in range(30)])
    i, j = np.triu_indices(30)
    found = splits.detail_correlation(thumbnails, i, j)
    assert np.allclose(found[i == j], 1, atol=1e-3) and found[i != j].max() < 0.45


def test_a_shift_within_reach_is_found():
    wide = np.asarray(Image.fromarray(picture(3)).resize((80, 64)).convert("L"))
    thumbnails = np.stack([wide[:, :64], wide[:, 3:67], wide[:, 14:78]])
    near, far = splits.detail_correlation(thumbnails, np.array([0, 0]), np.array([1, 2]))
    assert near > 0.9 and far < 0.45


def test_black_and_flat_thumbnails_match_nothing():
    flat = [np.full((*SIZE, 3), value, np.uint8) for value in (0, 0, 90, 90)]
    assert len(set(groups_of(flat))) == 4


@pytest.mark.skipif(not (data_root() / "busi").is_dir(), reason="BUSI is not here")
def test_groups_of_busi_are_near_those_of_matched_features():
    """Feature matching (SIFT and RANSAC, 12 inliers) finds 588 groups of all 780 images."""
    cases = layouts.find("busi")[0].cases(layouts.find("busi")[1])
    images = [Image.open(case.image).convert("RGB") for case in cases]
    assert 588 <= len(set(groups_of(images))) <= 600


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


@pytest.mark.parametrize("name", ["etis-larib", "cvc-colondb"])
def test_polyp_frames_without_known_videos_are_sequences(name):
    assert layouts.sequence_of(PrepareConfig(dataset=name))
    assert not layouts.sequence_of(PrepareConfig(dataset=name, group_by="number"))
    assert layouts.sequence_of(PrepareConfig(dataset="x", group_by="sequence"))


# Rules --------------------------------------------------------------------------------------------


def patients(root, numbered="patient{:02d}_{:03d}", count=7, slices=4):
    names = [numbered.format(p, 40 + s) for p in range(count) for s in range(slices)]
    for i, name in enumerate(names):
        save(root / "images" / f"{name}.png", picture(i))
        save(root / "masks" / f"{name}.png", lesion(6 + i))
    return root


def test_a_numbered_series_in_several_splits_is_a_warning_that_names_the_rule(
    tmp_path, runs, messages
):
    found = prepare(config(patients(tmp_path / "mine")))
    [warning] = found.summary["warnings"]
    assert "numbered series" in warning and "patient0" in warning and "'number'" in warning
    assert any(warning in message for message in messages())
    grouped = prepare(config(tmp_path / "mine", group_by="number"))
    assert grouped.summary["warnings"] == [] and grouped.summary["groups"] == 7


@pytest.mark.parametrize("numbered", ["c{0:02d}{1}", "IMG_{0}{1:04d}", "{1}{0:02d}"])
def test_one_series_for_the_whole_data_set_is_no_warning(tmp_path, runs, numbered):
    found = prepare(config(patients(tmp_path / "mine", numbered)))
    assert found.summary["warnings"] == []


def test_classes_in_names_are_no_patients():
    names = [f"{kind} ({i}).png" for kind in ("benign", "malignant", "normal") for i in range(40)]
    table = pd.DataFrame({"file": names, "split": ["train", "val", "test"] * 40})
    assert splits.series_across(table) == []


@pytest.mark.parametrize(
    ("rule", "groups"),
    [
        ("number", 7),
        ("folder", 1),
        (r"patient(\d+)", 7),
        (r"(\d)_", 7),
        (r"_(\d+)", 4),
        ("patient0[0-2]|patient0[3-6]", 7),
    ],
)
def test_rules_name_the_groups(tmp_path, runs, rule, groups):
    cases = layouts.fingerprint(config(patients(tmp_path / "mine"), group_by=rule))[1]
    assert len({case.group for case in cases}) == groups


def test_a_column_of_the_manifest_names_the_groups(tmp_path, runs):
    patients(tmp_path, "{0}-{1}")
    rows = [
        f"images/{p}-{s}.png,masks/{p}-{s}.png,Mrs {p}" for p in range(7) for s in range(40, 44)
    ]
    (tmp_path / "list.csv").write_text("\n".join(["image,mask,Patient", *rows]))
    found = prepare(config(tmp_path / "list.csv", group_by="column:Patient"))
    assert found.summary["groups"] == 7
    with pytest.raises(ManifestError, match="'patient' is unknown.*group_by = 'column:patient'"):
        prepare(config(tmp_path / "list.csv"))
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


# Few groups ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    "sizes", [(4,) * 5, (6,) * 3, (5,) * 4, (9, 3, 1), (20, 2, 2, 2), (8, 7, 3, 2, 1)]
)
def test_three_to_five_groups_fill_every_split(sizes, seed):
    table = pd.DataFrame({"group": np.repeat([f"p{i}" for i in range(len(sizes))], sizes)})
    table = table.assign(id=table.index, lesion_share=0.1, empty=False, official="", volume="")
    found = splits.split_cases(table, PrepareConfig(split_seed=seed))
    counts = table["group"].groupby(found).nunique()
    assert (counts["train"], counts["val"], counts["test"]) == (len(sizes) - 2, 1, 1)


@pytest.mark.parametrize("fold", range(5))
def test_five_blocks_in_five_folds_are_three_one_and_one(fold):
    table = pd.DataFrame({"group": np.repeat([f"sections-{i}" for i in range(5)], 6)})
    table = table.assign(id=table.index, lesion_share=0.7, empty=False, official="", volume="")
    found = splits.split_cases(table, PrepareConfig(folds=5, fold=fold))
    assert table["group"].groupby(found).nunique().to_dict() == {"train": 3, "val": 1, "test": 1}


@pytest.mark.fault
def test_two_groups_are_refused_with_the_options_that_matter():
    table = pd.DataFrame({"group": ["a"] * 9 + ["b"] * 9})
    table = table.assign(id=table.index, lesion_share=0.1, empty=False, official="", volume="")
    with pytest.raises(
        SplitError, match=r"(?s)18 cases in 2 groups.*val_fraction.*test_fraction.*group_by"
    ):
        splits.split_cases(table, PrepareConfig())
