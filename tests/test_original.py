"""Scores at the original size and of whole volumes, against hand computation and brute force."""

import shutil

import numpy as np
import pandas as pd
import pytest
from scipy.ndimage import binary_erosion

from lesionkd_core import inference, stages, store
from lesionkd_core.config import DistillConfig, LesionKDError
from lesionkd_core.datasets import DatasetNotFound
from lesionkd_core.networks import UNet
from lesionkd_core.original import score_original, score_volume
from lesionkd_core.prepare import prepare_data

from .test_datasets import save
from .test_volumes import SPACING, WAYS, nifti  # 2.5 mm between slices, 0.75 between rows, 0.5 between columns


def quiet(*_):
    pass


def box(shape, *corners):
    mask = np.zeros(shape, bool)
    mask[tuple(slice(a, b) for a, b in corners)] = True
    return mask


def test_a_volume_is_scored_in_millimetres_by_hand():
    truth, predicted = box((6, 20, 20), (1, 2), (3, 4), (5, 6)), box((6, 20, 20), (3, 4), (3, 4), (5, 6))
    row = score_volume(predicted, truth, SPACING)  # one voxel each, two slices apart
    assert (row["hd95_mm"], row["surface_dice_mm"], row["dice"], row["missed"]) == (5.0, 0.0, 0, 1)
    row = score_volume(box((6, 20, 20), (1, 2), (3, 4), (8, 9)), truth, SPACING)  # three columns
    assert (row["hd95_mm"], row["surface_dice_mm"]) == (1.5, 1.0)
    truth, predicted = box((6, 20, 20), (0, 4), (2, 8), (2, 10)), box((6, 20, 20), (2, 6), (2, 8), (2, 10))  # 192 voxels each, 96 in common
    row = score_volume(predicted, truth, SPACING)
    assert [row[name] for name in ("dice", "iou", "sensitivity", "precision")] == [0.5, 96 / 288, 0.5, 0.5]
    assert row["lesion_ml"] == row["predicted_ml"] == pytest.approx(192 * 0.9375 / 1000) and (row["missed"], row["false_alarm"]) == (0, 0)
    assert (row["lesion_pixels"], row["predicted_pixels"]) == (192, 192)


def test_distances_of_volumes_by_brute_force():
    rng = np.random.default_rng(0)
    for _ in range(5):
        at = rng.integers(0, 4, 3)
        predicted, truth = box((8, 12, 14), *((a, a + 5) for a in at)), box((8, 12, 14), (1, 5), (2, 11), (0, 14))
        surfaces = [np.argwhere(m & ~binary_erosion(m)) * SPACING for m in (predicted, truth)]
        apart = np.linalg.norm(surfaces[0][:, None] - surfaces[1][None], axis=2)
        row = score_volume(predicted, truth, SPACING)
        assert row["hd95_mm"] == pytest.approx(max(np.percentile(apart.min(1), 95), np.percentile(apart.min(0), 95)), abs=1e-4)
        near = (apart.min(1) <= 2).sum() + (apart.min(0) <= 2).sum()
        assert row["surface_dice_mm"] == pytest.approx(near / sum(map(len, surfaces)), abs=1e-4)


def test_empty_volumes_follow_the_rule_of_empty_images():
    empty, some = np.zeros((4, 6, 8), bool), box((4, 6, 8), (0, 2), (0, 2), (0, 2))
    both, missed, alarm = (score_volume(p, t, SPACING) for p, t in ((empty, empty), (empty, some), (some, empty)))
    assert (both["dice"], both["iou"], both["hd95_mm"], both["surface_dice_mm"], both["missed"], both["false_alarm"]) == (1, 1, 0, 1, 0, 0)
    assert np.isnan(both["sensitivity"]) and np.isnan(missed["precision"]) and np.isnan(alarm["sensitivity"])
    diagonal = (10.0**2 + 4.5**2 + 4.0**2) ** 0.5
    assert missed["hd95_mm"] == alarm["hd95_mm"] == pytest.approx(diagonal)
    assert (missed["missed"], missed["false_alarm"], alarm["missed"], alarm["false_alarm"]) == (1, 0, 0, 1)


# whole runs; the network is one that takes what is bright for lesion


@pytest.fixture
def bright(tmp_path, monkeypatch):
    monkeypatch.setenv("LESIONKD_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr(inference, "probabilities", lambda network, images: (images[..., 0] > 127).astype(np.float32))


def run_on(folder, **fields):
    """A finished run on a folder, as training leaves it, untrained."""
    cfg = DistillConfig(dataset=str(folder), pixels=32, width=1, terms="", duplicate_bits=0, **{"cases": 0} | fields)
    prepared = prepare_data(cfg, quiet)
    path = store.folder(cfg, prepared.digest)
    store.begin(path, cfg, prepared.digest)
    store.write_checkpoint(path / "checkpoint_best", {"network": inference.build(cfg).state_dict()})
    store.finish(path)
    return path, prepared


def grey(bright, seed):
    """Dark with a bright region; two seeds look different to the search for near-duplicates."""
    noise = np.kron(np.random.default_rng(seed).integers(0, 90, (*bright.shape[:-2], 8, 8)), np.ones((bright.shape[-2] // 8, bright.shape[-1] // 8)))
    return np.where(bright, 200 + noise / 2, noise).astype(np.uint8)


def images_folder(root, count=14):
    """Bright squares of 20 px, lesions 4 px to the right of them, 64 x 64 px."""
    for i in range(count):
        top = 2 * i
        save(root / "images" / f"{i:02d}.png", grey(box((64, 64), (top, top + 20), (10, 30)), i))
        save(root / "masks" / f"{i:02d}.png", box((64, 64), (top, top + 20), (14, 34)))
    return root


def test_images_are_scored_in_their_own_pixels(tmp_path, bright):
    path, prepared = run_on(images_folder(tmp_path / "mine"))
    table = score_original(path)
    scored = prepared.cases[prepared.cases["split"] != "train"]
    assert sorted(table["id"]) == sorted(scored["id"]) and set(table["level"]) == {"image"}
    pd.testing.assert_series_equal(table.set_index("id")["split"].sort_index(), scored.set_index("id")["split"].sort_index())
    assert (table["lesion_pixels"] == 400).all() and (table["predicted_pixels"] == 400).all()
    assert np.allclose(table["dice"], 0.8) and np.allclose(table["iou"], 320 / 480)  # 20 x 16 pixels in common
    assert np.allclose(table["hd95"], 4)  # at the prepared size it were 2


def test_padding_is_cut_away_before_scoring(tmp_path, bright):
    for i in range(12):
        wide = box((32, 64), (4, 24), (8 + 2 * i, 28 + 2 * i))
        save(tmp_path / "mine/images" / f"{i}.png", grey(wide, i))
        save(tmp_path / "mine/masks" / f"{i}.png", wide)
    path, _ = run_on(tmp_path / "mine", fit="pad")
    assert np.allclose(score_original(path)["dice"], 1)


def volumes_folder(root, count=12):
    """Lesions in slices 2 and 3 of 6; bright one column to the right of them, and in slice 4 too."""
    for i in range(count):
        truth, shown = box((6, 32, 32), (2, 4), (8, 18), (4, 14 + i % 2)), box((6, 32, 32), (2, 5), (8, 18), (5, 15 + i % 2))
        nifti(root / "images" / f"p{i:02d}.nii.gz", grey(shown, i), WAYS[i])
        nifti(root / "masks" / f"p{i:02d}.nii.gz", truth.astype(np.uint8), WAYS[-i])
    return root


def test_volumes_are_scored_whole_with_the_slices_that_were_dropped(tmp_path, bright):
    path, prepared = run_on(volumes_folder(tmp_path / "mine"), window="128, 256")
    assert len(prepared.cases) == 24 and prepared.cases.groupby("volume")["split"].nunique().max() == 1  # two slices with a lesion each
    table = score_original(path).set_index("id")
    scored = prepared.cases[prepared.cases["split"] != "train"]
    images, volumes = (table[table["level"] == level] for level in ("image", "volume"))
    assert sorted(images.index) == sorted(scored["id"]) and sorted(volumes.index) == sorted(set(scored["volume"]))
    for name, row in volumes.iterrows():
        wide = 10 + int(name[1:]) % 2  # columns of the lesion
        assert (row["lesion_pixels"], row["predicted_pixels"]) == (20 * wide, 30 * wide)
        assert row["dice"] == pytest.approx(2 * 20 * (wide - 1) / (50 * wide)) and row["sensitivity"] == pytest.approx((wide - 1) / wide)
        assert row["lesion_ml"] == pytest.approx(20 * wide * 0.9375e-3) and row["hd95_mm"] == pytest.approx(2.5, abs=0.06)  # one slice too many
        assert np.isnan(row["hd95"]) and row["split"] in ("val", "test")
        slices = images[images.index.str.startswith(name)]
        assert (slices["split"] == row["split"]).all() and (slices["group"] == row["group"]).all() and np.isnan(slices["hd95_mm"]).all()
        assert np.allclose(slices["dice"], (wide - 1) / wide)  # slice by slice the extra slice is not seen


def test_scores_are_kept_in_the_run_and_nothing_else_of_it_changes(tmp_path, bright):
    path, _ = run_on(images_folder(tmp_path / "mine"))
    before = {p.name: p.read_bytes() for p in path.iterdir()}
    table = score_original(path)
    shutil.rmtree(tmp_path / "mine")
    pd.testing.assert_frame_equal(score_original(path), table)
    after = {p.name: p.read_bytes() for p in path.iterdir()}
    assert after.pop("per_case_original.csv") and after == before


@pytest.mark.parametrize("terms", ["", "feat", "feat, edge"])
def test_a_student_is_traced_back_to_its_prepared_data_through_teacher_and_graph(tmp_path, monkeypatch, terms):
    monkeypatch.setenv("LESIONKD_RUNS", str(tmp_path / "runs"))
    monkeypatch.setitem(inference.TEACHERS, "unet64", lambda: UNet(width=2))
    cfg = DistillConfig(
        dataset=str(images_folder(tmp_path / "mine")), pixels=32, cases=0, width=1, terms=terms, teacher="unet64", teacher_epochs=1, graph_epochs=1, epochs=1,
        duplicate_bits=0, weak_teacher="allow",
    )
    run = stages.distill(cfg, quiet)
    table = score_original(run)
    assert sorted(table["id"]) == sorted(run.per_case["id"])
    if terms:
        assert len(score_original(stages.train_teacher(cfg, quiet))) == len(table)


# faults


def corrected(root, _):
    save(root / "masks" / "03.png", box((64, 64), (6, 26), (13, 34)))


def prepared_again(root, prepared):
    corrected(root, prepared)
    run_on(root)


CHANGED = {  # what happened after the training: how, words of the message
    "the release is gone": (lambda root, _: shutil.rmtree(root), DatasetNotFound, ["mine"]),
    "a mask was corrected": (corrected, LesionKDError, ["another state", "masks"]),
    "a mask was corrected and all prepared again": (prepared_again, LesionKDError, ["another state", "masks"]),
    "an image was removed": (lambda root, _: (root / "images" / "03.png").unlink(), LesionKDError, ["another state", "release"]),
    "the prepared arrays were removed": (lambda _, prepared: shutil.rmtree(prepared.path), LesionKDError, ["prepared arrays", "run the notebook"]),
}


@pytest.mark.fault
@pytest.mark.parametrize("what", CHANGED)
def test_other_data_than_the_run_was_made_from_are_not_scored(tmp_path, bright, what):
    change, error, words = CHANGED[what]
    path, prepared = run_on(images_folder(tmp_path / "mine"))
    change(tmp_path / "mine", prepared)
    with pytest.raises(error) as said:
        score_original(path)
    assert all(word in str(said.value) for word in words), str(said.value)
    assert not (path / "per_case_original.csv").exists()


@pytest.mark.fault
def test_the_phantom_has_no_other_size(tmp_path, bright):
    path, _ = run_on("phantom-ct", cases=20)
    with pytest.raises(LesionKDError, match="drawn at the prepared size"):
        score_original(path)


@pytest.mark.fault
def test_volumes_torn_by_a_random_split_are_not_scored(tmp_path, bright):
    path, _ = run_on(volumes_folder(tmp_path / "mine"), window="128, 256", split="random")
    with pytest.raises(LesionKDError, match="lie in several splits"):
        score_original(path)


@pytest.mark.fault
def test_an_unfinished_run_is_not_scored(tmp_path, bright):
    path, _ = run_on(images_folder(tmp_path / "mine"))
    (path / "DONE").unlink()
    with pytest.raises(store.UnfinishedRun, match="not finished"):
        score_original(path)
