"""From files to arrays: what is written, what stays together, how it is split, what makes it anew."""

import os

import numpy as np
import pandas as pd
import pytest

from lesionkd_core import store
from lesionkd_core.datasets import data_root
from lesionkd_core.prepare import SPLITS, PrepareConfig, group_cases, near_pairs, prepare_data, prepare_image, prepare_mask, split_cases
from lesionkd_core.prepare.pixels import perceptual_hash

from .test_datasets import SIZE, lesion, own_folder, picture, save

COPIES = {0: "copy_000", 7: "copy_007", 20: "copy_020"}  # case number: name of its near-duplicate


def config(folder, **fields):
    return PrepareConfig(**{"dataset": str(folder), "pixels": 32, **fields})


AT_32, AT_64 = PrepareConfig(pixels=32), PrepareConfig(pixels=64)


def quiet(*_):
    """Tell nobody."""


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.setenv("LESIONKD_RUNS", str(tmp_path / "runs"))
    return tmp_path / "runs"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """24 pairs, and three of them again: brightened and encoded as JPEG."""
    root = own_folder(tmp_path_factory.mktemp("raw") / "mine")
    for i, name in COPIES.items():
        brighter = np.clip(picture(i) * 1.04 + 3, 0, 255).astype(np.uint8)
        save(root / "images" / f"{name}.jpg", brighter, quality=88)
        save(root / "masks" / f"{name}.png", lesion(6 + i))
    return root


@pytest.fixture(scope="module")
def prepared(folder):
    return prepare_data(config(folder), quiet)


def test_arrays_hold_every_case_at_the_asked_size(prepared):
    n = 24 + len(COPIES)
    assert [a.shape for a in (prepared.images, prepared.masks, prepared.edges)] == [(n, 32, 32, 3), (n, 32, 32), (n, 32, 32)]
    assert prepared.images.dtype == prepared.masks.dtype == prepared.edges.dtype == np.uint8
    assert len(prepared.cases) == n and len(prepared.report) == 0
    assert set(np.unique(prepared.masks)) == set(np.unique(prepared.edges)) == {0, 1}
    assert set(zip(prepared.cases["height"], prepared.cases["width"])) == {SIZE}
    sides = [6 + (int(name[-3:])) for name in prepared.cases["id"]]
    assert np.allclose(prepared.cases["lesion_share"], [side**2 / (SIZE[0] * SIZE[1]) for side in sides]), "of the original"
    with pytest.raises(ValueError, match="read-only"):
        prepared.images[0, 0, 0, 0] = 1


def test_a_case_keeps_its_own_image_and_mask(prepared):
    for row, name in enumerate(prepared.cases["id"]):
        if name.startswith("case"):
            number = int(name[-3:])
            assert np.array_equal(prepared.images[row], prepare_image(picture(number), AT_32))
            assert np.array_equal(prepared.masks[row], prepare_mask(lesion(6 + number), AT_32))


def test_edges_are_those_of_the_prepared_masks(prepared):
    mask = np.pad(prepared.masks[5], 1, mode="edge")  # brute force: a neighbour of another label
    around = [mask[1 + y : 33 + y, 1 + x : 33 + x] for y, x in ((0, 1), (0, -1), (1, 0), (-1, 0))]
    assert np.array_equal(prepared.edges[5], np.any([n != prepared.masks[5] for n in around], axis=0))


def test_splits_share_no_group_and_take_every_case(prepared):
    groups = [set(prepared.cases["group"].iloc[prepared.index(split)]) for split in SPLITS]
    assert not (groups[0] & groups[1] or groups[0] & groups[2] or groups[1] & groups[2])
    assert sorted(np.concatenate([prepared.index(split) for split in SPLITS])) == list(range(27))


def test_near_duplicates_share_a_group_and_a_split(prepared):
    cases = prepared.cases.set_index("id")
    for number, name in COPIES.items():
        assert (cases.loc[name, ["group", "split"]] == cases.loc[f"case_{number:03d}", ["group", "split"]]).all()
    assert cases["group"].nunique() == 24  # and nothing else was taken for a duplicate


def partition(groups):
    return {frozenset(np.flatnonzero(np.array(groups) == g)) for g in set(groups)}


def test_release_groups_and_duplicates_are_united():
    images = [picture(i) for i in range(7)]
    images[2] = np.clip(images[1].astype(int) + 4, 0, 255).astype(np.uint8)  # a frame of v1 again in v2
    hashes = np.stack([perceptual_hash(image) for image in images])
    groups = group_cases(pd.Series(["v1", "v1", "v2", "v2", "", "", "v3"]), hashes, bits=4)
    assert partition(groups) == {frozenset({0, 1, 2, 3}), frozenset({4}), frozenset({5}), frozenset({6})}
    assert partition(group_cases(pd.Series(["v1", "", "v1", ""]), None, 4)) == {frozenset({0, 2}), frozenset({1}), frozenset({3})}


def test_a_duplicate_is_found_however_far_away_it_lies():
    hashes = np.random.default_rng(0).random((1100, 63)) < 0.5
    hashes[1090] = hashes[3]
    groups = group_cases(pd.Series([""] * 1100), hashes, bits=0)
    assert groups[1090] == groups[3] and len(set(groups)) == 1099


def test_near_pairs_are_those_of_a_brute_force_loop():
    hashes = np.random.default_rng(1).random((300, 63)) < 0.9
    expected = {(i, j, d) for i in range(300) for j in range(i + 1, 300) if (d := int((hashes[i] != hashes[j]).sum())) <= 5}
    assert {tuple(pair) for block in near_pairs(hashes, 5) for pair in block.tolist()} == expected and expected


def test_the_split_follows_its_seed(folder, prepared, runs):
    again, other = (prepare_data(config(folder, split_seed=seed), quiet) for seed in (0, 1))
    assert again.path != prepared.path and again.split_hash == prepared.split_hash != other.split_hash
    assert (again.path / "split.csv").read_bytes() == (prepared.path / "split.csv").read_bytes()


def synthetic(sizes, seed=0):
    """A table of groups of the given sizes with lesions of 0 to 100 % of the image."""
    groups = np.repeat(np.arange(len(sizes)), sizes)
    share = np.random.default_rng(seed).uniform(size=len(groups))
    ids = [f"{i}" for i in range(len(groups))]
    return pd.DataFrame({"id": ids, "group": [f"g{g}" for g in groups], "lesion_share": share, "official": "", "empty": False, "volume": ""})


@pytest.mark.parametrize(("val", "test"), [(0.15, 0.2), (0.1, 0.1), (0.4, 0.3)])
def test_single_cases_are_split_as_asked(val, test):
    splits = pd.Series(split_cases(synthetic([1] * 1500), PrepareConfig(val_fraction=val, test_fraction=test)))
    share = splits.value_counts(normalize=True)
    assert share[list(SPLITS)].tolist() == pytest.approx([1 - val - test, val, test], abs=0.005)


@pytest.mark.parametrize("seed", range(4))
def test_every_split_has_large_and_small_lesions(seed):
    table = synthetic([1] * 1500, seed)
    splits = split_cases(table, PrepareConfig(split_seed=seed))
    thirds = pd.crosstab(splits, pd.qcut(table["lesion_share"], 3, labels=False), normalize="index")
    assert np.allclose(thirds, 1 / 3, atol=0.02)
    assert np.allclose(table["lesion_share"].groupby(splits).mean(), table["lesion_share"].mean(), atol=0.025)


def test_videos_of_unlike_length_stay_whole_and_near_the_asked_shares():
    table = synthetic([25, 25, 17, 11, 25, 24, 25, 26, 22, 6, 22, 25, 25, 20, 20, 25, 21, 20, 25, 20, 19, 19, 12, 25, 25, 18, 25, 20, 21])  # CVC-ClinicDB
    table["split"] = split_cases(table, PrepareConfig())
    assert (table.groupby("group")["split"].nunique() == 1).all()
    share = table["split"].value_counts(normalize=True)
    assert share[list(SPLITS)].tolist() == pytest.approx([0.65, 0.15, 0.2], abs=0.08)


NORMALS = (2, 9, 10, 21)


@pytest.mark.parametrize("normals", ["drop", "keep", "test"])
def test_cases_without_a_lesion_go_where_they_are_sent(tmp_path, runs, normals):
    result = prepare_data(config(own_folder(tmp_path / "mine", empty=NORMALS), normals=normals), quiet)
    names = [f"case_{i:03d}" for i in NORMALS]
    splits = result.cases.set_index("id")["split"].reindex(names).dropna()
    dropped = result.report[result.report["reason"].str.contains("no lesion")]
    assert dropped["id"].tolist() == (names if normals == "drop" else [])
    assert len(result.cases) == (20 if normals == "drop" else 24) and len(splits) == (0 if normals == "drop" else 4)
    assert normals != "test" or set(splits) == {"test"}
    assert (result.masks.any((1, 2)).sum(), len(result.masks)) == (20, len(result.cases))


def test_a_mask_shrinks_by_majority():
    mask = np.random.default_rng(0).random((96, 128)) < 0.5
    assert np.array_equal(prepare_mask(mask, AT_32), mask.reshape(32, 3, 32, 4).mean((1, 3)) > 0.5)


@pytest.mark.parametrize("spot", [(0, 0), (250, 333), (499, 699)])
def test_a_lesion_of_one_pixel_is_kept(spot):
    mask = np.zeros((500, 700), dtype=bool)
    mask[spot] = True
    small = prepare_mask(mask, AT_64)
    assert small.sum() == 1 and small[spot[0] * 64 // 500, spot[1] * 64 // 700]


def test_an_empty_and_a_full_mask_stay_so():
    assert not prepare_mask(np.zeros((50, 70), dtype=bool), AT_32).any()
    assert prepare_mask(np.ones((50, 70), dtype=bool), AT_64).all()


def test_equal_size_changes_nothing():
    image, mask = picture(1, (64, 64)), lesion(20, size=(64, 64))
    assert np.array_equal(prepare_image(image, AT_64), image) and np.array_equal(prepare_mask(mask, AT_64), mask)
    checkers = np.indices((64, 64)).sum(0)[..., None].repeat(3, 2) % 2 * np.uint8(255)
    assert abs(prepare_image(checkers.astype(np.uint8), AT_32).astype(float).mean() - 127.5) < 1  # smaller: a mean, not every other pixel


def snapshot(root):
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in root.rglob("*")}


def test_the_second_call_finds_the_result_and_writes_nothing(tmp_path, runs):
    folder, said = own_folder(tmp_path / "mine", 12), []
    first = prepare_data(config(folder), said.append)
    before = snapshot(runs)
    assert prepare_data(config(folder), said.append).path == first.path
    assert snapshot(runs) == before and len(said) == 1
    assert store.read_json(first.path / "config.json")["stage"] == "prepare" and store.is_done(first.path)


def test_what_was_corrected_is_prepared_anew_and_what_was_moved_is_not(tmp_path, runs):
    folder = own_folder(tmp_path / "mine", 12)
    first = prepare_data(config(folder), quiet)
    os.utime(folder / "masks" / "case_003.png")
    moved = folder.rename(tmp_path / "elsewhere")
    assert prepare_data(config(moved), quiet).digest == first.digest
    (tmp_path / "disk").mkdir()
    moved = moved.rename(tmp_path / "disk" / "mine")
    assert prepare_data(config(moved), quiet).path == first.path
    save(moved / "masks" / "case_003.png", lesion(9, top=5))  # as large as before, one pixel lower
    corrected = prepare_data(config(moved), quiet)
    assert corrected.path != first.path and (corrected.masks[3] != first.masks[3]).any()
    image = moved / "images" / "case_005.png"
    size = image.stat().st_size
    save(image, np.full_like(picture(5), 90))
    image.write_bytes(image.read_bytes().ljust(size, b"\0"))  # another picture in a file of the same size
    assert image.stat().st_size == size
    repainted = prepare_data(config(moved), quiet)
    assert repainted.path != corrected.path and (repainted.images[5] != corrected.images[5]).any()


def test_some_cases_are_drawn_by_the_split_seed(folder, runs):
    drawn = [prepare_data(config(folder, cases=15, split_seed=seed), quiet).cases["id"].tolist() for seed in (0, 1)]
    assert [len(set(ids)) for ids in drawn] == [15, 15] and drawn[0] != drawn[1]


def test_the_phantom_needs_no_files_and_repeats_nothing(runs, monkeypatch, tmp_path):
    monkeypatch.setenv("LESIONKD_DATA", str(tmp_path / "nowhere"))
    result = prepare_data(PrepareConfig(dataset="phantom-ct", cases=30, pixels=32, normals="keep"), quiet)
    assert result.cases["group"].nunique() == len(result.cases) == 30
    assert len({image.tobytes() for image in result.images}) == 30


@pytest.mark.skipif(not (data_root() / "busi").is_dir() and not (data_root() / "Dataset_BUSI_with_GT").is_dir(), reason="BUSI is not here")
def test_busi_is_full_of_near_duplicates_that_stay_together(runs):
    prepared = prepare_data(PrepareConfig(dataset="busi", pixels=64, cases=0, profile="cpu"), quiet)
    assert prepared.summary["kept"] == 647 and prepared.summary["dropped"] == 133
    assert 500 < prepared.summary["groups"] < 600  # an independent clustering of thumbnails found 545
    assert (prepared.cases.groupby("group")["split"].nunique() == 1).all()
    random = prepare_data(PrepareConfig(dataset="busi", pixels=64, cases=0, profile="cpu", split="random"), quiet)
    assert random.summary["crossing"]["test"] > 15
