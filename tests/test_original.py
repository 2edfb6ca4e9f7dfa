"""Scores at the original size and of whole volumes, by hand and by brute force."""

import shutil

import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk
from scipy.ndimage import binary_erosion

from lesionkd_core import predict, results
from lesionkd_core.config import DistillConfig, LesionKDError
from lesionkd_core.data.layouts import DatasetNotFound
from lesionkd_core.data.prepare import prepare
from lesionkd_core.evaluate import score_original, score_volume
from lesionkd_core.pipeline import distill, fit_edge_graph, train_teacher
from tests.tiny import OPTIONS, save

SPACING = (2.5, 0.75, 0.5)  # between slices, rows, columns, mm


def box(shape, *corners):
    mask = np.zeros(shape, bool)
    mask[tuple(slice(a, b) for a, b in corners)] = True
    return mask


# Volumes by hand ----------------------------------------------------------------------------------


def test_distances_of_a_volume_are_in_millimetres():
    shape = (6, 20, 20)
    truth = box(shape, (1, 2), (3, 4), (5, 6))  # one voxel
    row = score_volume(box(shape, (3, 4), (3, 4), (5, 6)), truth, SPACING)  # two slices apart
    found = [row[name] for name in ("hd95_mm", "surface_dice_mm", "dice", "missed")]
    assert found == [5.0, 0.0, 0, 1]
    row = score_volume(box(shape, (1, 2), (3, 4), (8, 9)), truth, SPACING)  # three columns
    assert (row["hd95_mm"], row["surface_dice_mm"]) == (1.5, 1.0)


def test_overlap_of_a_volume_by_hand():
    truth, predicted = (box((6, 20, 20), z, (2, 8), (2, 10)) for z in ((0, 4), (2, 6)))
    row = score_volume(predicted, truth, SPACING)  # 192 voxels each, 96 in common
    found = [row[name] for name in ("dice", "iou", "sensitivity", "precision")]
    assert found == [0.5, 96 / 288, 0.5, 0.5]
    assert row["lesion_ml"] == row["predicted_ml"] == pytest.approx(192 * 0.9375 / 1000)
    assert (row["missed"], row["false_alarm"]) == (0, 0)
    assert (row["lesion_pixels"], row["predicted_pixels"]) == (192, 192)


def test_distances_of_volumes_by_brute_force():
    rng = np.random.default_rng(0)
    for _ in range(5):
        corners = [(a, a + 5) for a in rng.integers(0, 4, 3)]
        predicted, truth = (box((8, 12, 14), *at) for at in (corners, ((1, 5), (2, 11), (0, 14))))
        surfaces = [np.argwhere(m & ~binary_erosion(m)) * SPACING for m in (predicted, truth)]
        apart = np.linalg.norm(surfaces[0][:, None] - surfaces[1][None], axis=2)
        row = score_volume(predicted, truth, SPACING)
        expected = max(np.percentile(apart.min(1), 95), np.percentile(apart.min(0), 95))
        assert row["hd95_mm"] == pytest.approx(expected, abs=1e-4)
        near = (apart.min(1) <= 2).sum() + (apart.min(0) <= 2).sum()
        expected = near / sum(map(len, surfaces))
        assert row["surface_dice_mm"] == pytest.approx(expected, abs=1e-4)


def test_empty_volumes_follow_the_rule_of_empty_images():
    empty, some = np.zeros((4, 6, 8), bool), box((4, 6, 8), (0, 2), (0, 2), (0, 2))
    pairs = ((empty, empty), (empty, some), (some, empty))
    both, missed, alarm = (score_volume(p, t, SPACING) for p, t in pairs)
    perfect = [both[name] for name in ("dice", "iou", "hd95_mm", "surface_dice_mm")]
    assert perfect == [1, 1, 0, 1] and (both["missed"], both["false_alarm"]) == (0, 0)
    undefined = both["sensitivity"], missed["precision"], alarm["sensitivity"]
    assert np.isnan(undefined).all()
    diagonal = (10.0**2 + 4.5**2 + 4.0**2) ** 0.5
    assert missed["hd95_mm"] == alarm["hd95_mm"] == pytest.approx(diagonal)
    assert (missed["missed"], missed["false_alarm"]) == (1, 0)
    assert (alarm["missed"], alarm["false_alarm"]) == (0, 1)


# Whole runs; the network is one that marks what is bright -----------------------------------------


@pytest.fixture
def bright(runs, monkeypatch):
    def mark(network, images):
        return (images[..., 0] > 127).astype(np.float32)

    monkeypatch.setattr(predict, "probabilities", mark)


def run_on(folder, **options):
    """A finished run on a folder, as training leaves it, untrained."""
    own = {"dataset": str(folder), "pixels": 32, "width": 1, "losses": "", "cases": 0}
    cfg = DistillConfig(**own | {"join_copies": False} | options)
    data = prepare(cfg)

    def make(missing):
        for path in missing:
            network = {"network": predict.build(cfg).state_dict()}
            results.write_checkpoint(path / "checkpoint_best", network)
            results.write_json(path / "summary.json", {"data": data.digest})

    [run] = results.find_or_make([cfg], [data.digest], make, results.Result)
    return run.path, data


def grey(bright, seed):
    """Dark with a bright region; two seeds are no near-duplicates."""
    block = np.ones((bright.shape[-2] // 8, bright.shape[-1] // 8))
    coarse = np.random.default_rng(seed).integers(0, 90, (*bright.shape[:-2], 8, 8))
    noise = np.kron(coarse, block)
    return np.where(bright, 200 + noise / 2, noise).astype(np.uint8)


def square(top, left):
    return box((64, 64), (top, top + 20), (left, left + 20))


def images_folder(root, count=14):
    """Bright squares of 20 px, lesions 4 px to the right of them, 64 x 64 px."""
    for i in range(count):
        save(root / "images" / f"{i:02d}.png", grey(square(2 * i, 10), i))
        save(root / "masks" / f"{i:02d}.png", square(2 * i, 14))
    return root


def test_images_are_scored_in_their_own_pixels(tmp_path, bright):
    path, data = run_on(images_folder(tmp_path / "mine"))
    table = score_original(path)
    scored = data.cases[data.cases["split"] != "train"].set_index("id")
    assert sorted(table["id"]) == sorted(scored.index) and set(table["level"]) == {"image"}
    assert table.set_index("id")["split"].to_dict() == scored["split"].to_dict()
    assert (table["lesion_pixels"] == 400).all() and (table["predicted_pixels"] == 400).all()
    assert np.allclose(table["dice"], 0.8) and np.allclose(table["iou"], 320 / 480)
    assert np.allclose(table["hd95"], 4)  # 2 at the prepared size


def test_padding_is_cut_away_before_scoring(tmp_path, bright):
    for i in range(12):
        wide = box((32, 64), (4, 24), (8 + 2 * i, 28 + 2 * i))
        save(tmp_path / "mine/images" / f"{i}.png", grey(wide, i))
        save(tmp_path / "mine/masks" / f"{i}.png", wide)
    path, _ = run_on(tmp_path / "mine", fit="pad")
    assert np.allclose(score_original(path)["dice"], 1)


def nifti(path, voxels):
    """(D, H, W) as a NIfTI volume with SPACING."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = sitk.GetImageFromArray(voxels)
    image.SetSpacing(SPACING[::-1])
    sitk.WriteImage(image, str(path))


def volumes_folder(root, count=12):
    """Lesions in slices 2 and 3 of 6; bright one column to the right of them, in slice 4 too."""
    for i in range(count):
        truth = box((6, 32, 32), (2, 4), (8, 18), (4, 14 + i % 2))
        shown = box((6, 32, 32), (2, 5), (8, 18), (5, 15 + i % 2))
        nifti(root / "images" / f"p{i:02d}.nii.gz", grey(shown, i))
        nifti(root / "masks" / f"p{i:02d}.nii.gz", truth.astype(np.uint8))
    return root


def test_volumes_are_scored_whole_with_the_slices_that_were_dropped(tmp_path, bright):
    path, data = run_on(volumes_folder(tmp_path / "mine"), window="128, 256")
    assert len(data.cases) == 24  # two slices with a lesion each
    assert data.cases.groupby("volume")["split"].nunique().max() == 1
    table = score_original(path).set_index("id")
    scored = data.cases[data.cases["split"] != "train"]
    images, volumes = (table[table["level"] == level] for level in ("image", "volume"))
    assert sorted(images.index) == sorted(scored["id"])
    assert sorted(volumes.index) == sorted(set(scored["volume"]))
    for name, row in volumes.iterrows():
        wide = 10 + int(name[1:]) % 2  # columns of the lesion
        assert (row["lesion_pixels"], row["predicted_pixels"]) == (20 * wide, 30 * wide)
        assert row["dice"] == pytest.approx(2 * 20 * (wide - 1) / (50 * wide))
        assert row["sensitivity"] == pytest.approx((wide - 1) / wide)
        assert row["lesion_ml"] == pytest.approx(20 * wide * 0.9375e-3)
        assert row["hd95_mm"] == pytest.approx(2.5, abs=0.06)  # one slice too many
        assert np.isnan(row["hd95"]) and row["split"] in ("val", "test")
        slices = images[images.index.str.startswith(name)]
        assert (slices["split"] == row["split"]).all() and (slices["group"] == row["group"]).all()
        assert np.allclose(slices["dice"], (wide - 1) / wide)  # the extra slice is not seen


def test_scores_are_kept_in_the_run_and_nothing_else_of_it_changes(tmp_path, bright):
    path, _ = run_on(images_folder(tmp_path / "mine"))
    before = {p.name: p.read_bytes() for p in path.iterdir()}
    table = score_original(path)
    shutil.rmtree(tmp_path / "mine")
    pd.testing.assert_frame_equal(score_original(path), table)
    after = {p.name: p.read_bytes() for p in path.iterdir()}
    assert after.pop("per_case_original.csv") and after == before


def test_trained_teachers_and_students_are_traced_to_their_data(tmp_path, runs):
    folder = str(images_folder(tmp_path / "mine"))
    own = {"dataset": folder, "join_copies": False, "cases": 0, "epochs": 1, "teacher_epochs": 1}
    cfg = DistillConfig(**OPTIONS | own)
    data = prepare(cfg)
    teacher = train_teacher(data, cfg)
    student = distill(teacher, fit_edge_graph(teacher, data, cfg), data, cfg)
    for run in (student, teacher):
        assert sorted(score_original(run)["id"]) == sorted(run.per_case["id"])


# Faults -------------------------------------------------------------------------------------------


def corrected(root, data):
    save(root / "masks" / "03.png", square(6, 13))


def prepared_again(root, data):
    corrected(root, data)
    run_on(root)


CHANGED = {  # what happened after the training: how, the error, words of the message
    "the release is gone": (lambda root, _: shutil.rmtree(root), DatasetNotFound, "mine"),
    "a mask was corrected": (corrected, LesionKDError, "another state of .*masks"),
    "prepared again": (prepared_again, LesionKDError, "another state"),
    "an image was removed": (
        lambda root, _: (root / "images" / "03.png").unlink(),
        LesionKDError,
        "another state .*\n.*run the notebook again",
    ),
}


@pytest.mark.fault
@pytest.mark.parametrize("what", CHANGED)
def test_data_that_changed_since_the_run_are_not_scored(tmp_path, bright, what):
    change, error, words = CHANGED[what]
    path, data = run_on(images_folder(tmp_path / "mine"))
    change(tmp_path / "mine", data)
    with pytest.raises(error, match=words):
        score_original(path)
    assert not (path / "per_case_original.csv").exists()


def test_removed_arrays_are_prepared_again(tmp_path, bright):
    path, data = run_on(images_folder(tmp_path / "mine"))
    shutil.rmtree(data.path)
    assert np.allclose(score_original(path)["dice"], 0.8)


@pytest.mark.fault
def test_the_phantom_has_no_other_size(bright):
    path, _ = run_on("phantom", cases=20)
    with pytest.raises(LesionKDError, match="drawn at the prepared size"):
        score_original(path)


@pytest.mark.fault
def test_volumes_torn_by_a_random_split_are_not_scored(tmp_path, bright):
    path, _ = run_on(volumes_folder(tmp_path / "mine"), window="128, 256", split="random")
    with pytest.raises(LesionKDError, match="are in several splits"):
        score_original(path)


@pytest.mark.fault
def test_an_unfinished_run_is_not_scored(tmp_path, bright):
    path, _ = run_on(images_folder(tmp_path / "mine"))
    (path / "DONE").unlink()
    with pytest.raises(results.UnfinishedRun, match="not finished"):
        score_original(path)
