"""`python -m lesionkd_core predict` on what people feed it; the network is built, not trained."""

import json
import math
import shutil

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image

from lesionkd_core import inference, store
from lesionkd_core.__main__ import main
from lesionkd_core.batches import normalize
from lesionkd_core.config import DistillConfig, LesionKDError, TeacherConfig
from lesionkd_core.networks import UNet

from .test_datasets import lesion, picture, save
from .test_dicom import dicom, series
from .test_volumes import HU, LPS, WAYS, WINDOW, nifti, stored, windowed

pytestmark = pytest.mark.fault
CFG = DistillConfig(terms="", pixels=32, width=2)
SIZES = {"a.png": (48, 64), "odd.jpg": (33, 47), "grey.tif": (40, 40), "alpha.png": (61, 35), "tiny.bmp": (2, 3)}
ORANGE = (238, 119, 51)


def finished(root, cfg=CFG, done=True, constant=None):
    """The folder of a run as training leaves it; with `constant`, the network says that probability everywhere."""
    network, path = inference.build(cfg), root / "run"
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0  # one pass in training mode, below, makes the statistics those of pictures
    network(normalize(np.stack([picture(seed, (32, 32)) for seed in range(4)])))
    with torch.no_grad():
        network.head.bias += 0.75  # so that probabilities lie on both sides of a half
    if constant is not None:
        torch.nn.init.zeros_(network.head.weight)
        torch.nn.init.constant_(network.head.bias, math.log(constant / (1 - constant)))
    store.begin(path, cfg, "upstream")
    store.write_checkpoint(path / "checkpoint_best", {"network": network.state_dict()})
    if done:
        store.finish(path)
    return path


@pytest.fixture
def images(tmp_path):
    """Five good images of every kind, between them one that is none."""
    folder = tmp_path / "images"
    for seed, (name, size) in enumerate(SIZES.items()):
        save(folder / name, picture(seed, size), {"grey.tif": "L", "alpha.png": "RGBA"}.get(name))
    (folder / "broken.png").write_bytes((folder / "a.png").read_bytes()[:200])
    (folder / "notes.txt").write_text("no image, and not called one")
    return folder


def predict(run, images, out, *more):
    return main(["predict", str(run), str(images), "--out", str(out), *more])


def pixels(path):
    return np.asarray(Image.open(path))


@pytest.mark.parametrize(
    ("more", "value"),
    [((), 51), (("--threshold", "0.1"), 255), (("--threshold", "0.3"), 0)],
    ids=["probability x 255", "over the threshold", "under it"],
)
def test_good_images_are_segmented_beside_a_broken_one_that_is_listed(tmp_path, images, capsys, more, value):
    assert predict(finished(tmp_path, constant=0.2), images, tmp_path / "new" / "out", *more) == 1
    said = capsys.readouterr()
    assert "1 not read" in said.err and "broken.png" in said.err and "a.png" not in said.err and "6/6 images" in said.out
    masks = {p.name: pixels(p) for p in (tmp_path / "new" / "out").iterdir()}
    assert said.out.count("/6 images") == 1  # no line for every image where nobody watches
    assert set(masks) == {f"{name.split('.')[0]}.png" for name in SIZES}
    for name, size in SIZES.items():
        mask = masks[f"{name.split('.')[0]}.png"]
        assert mask.shape == size and mask.dtype == np.uint8 and set(np.unique(mask)) == {value}  # 0.2 x 255 = 51


def test_all_read_is_exit_code_0(tmp_path, images, capsys):
    (images / "broken.png").unlink()
    assert predict(finished(tmp_path), images, tmp_path / "out") == 0
    assert capsys.readouterr().err == ""


def border(mask):
    """Brute force: a pixel with a 4-neighbour of another label."""
    height, width = mask.shape
    near = ((0, 1), (0, -1), (1, 0), (-1, 0))
    inside = [(y, x, y + v, x + u) for y in range(height) for x in range(width) for v, u in near if 0 <= y + v < height and 0 <= x + u < width]
    marked = np.zeros(mask.shape, bool)
    for y, x, below, beside in inside:
        marked[y, x] |= mask[y, x] != mask[below, beside]
    return marked


def test_masks_are_cut_and_overlaid_where_the_probability_crosses_the_threshold(tmp_path, images):
    run = finished(tmp_path)
    predict(run, images, tmp_path / "soft")
    soft = pixels(tmp_path / "soft" / "a.png")
    level = (int(soft.min()) + int(soft.max())) // 2 + 0.5  # between two grey levels, so that rounding decides nothing
    predict(run, images, tmp_path / "hard", "--threshold", str(level / 255), "--overlays")
    hard, drawn = pixels(tmp_path / "hard" / "a.png"), pixels(tmp_path / "hard" / "a_overlay.png")
    assert set(np.unique(hard)) == {0, 255} and np.array_equal(hard == 255, soft > level)
    contour = border(hard)
    assert contour.any() and (drawn[contour] == ORANGE).all() and np.array_equal(drawn[~contour], pixels(images / "a.png")[~contour])


def test_threshold_0_is_a_threshold_also_in_the_overlay(tmp_path, images):
    run = finished(tmp_path)
    assert len({p > 0.5 for p in inference.predict(inference.load_student(run), [pixels(images / "a.png")])[0].ravel()}) == 2
    predict(run, images, tmp_path / "out", "--threshold", "0", "--overlays")
    assert (pixels(tmp_path / "out" / "a.png") == 255).all()
    assert np.array_equal(pixels(tmp_path / "out" / "a_overlay.png"), pixels(images / "a.png"))  # all is lesion: no contour


def test_images_of_one_stem_get_masks_of_their_own(tmp_path, images):
    save(images / "a.jpg", picture(9))
    predict(finished(tmp_path), images, tmp_path / "out")
    assert {"a.png.png", "a.jpg.png"} <= {p.name for p in (tmp_path / "out").iterdir()}


def as_rgb(grey):
    return np.repeat(grey[..., None], 3, axis=-1)


@pytest.mark.parametrize(("more", "kind", "value"), [((), np.float32, 0.2), (("--threshold", "0.1"), np.uint8, 1)])
def test_volumes_among_the_images_get_nifti_masks_in_their_space(tmp_path, images, capsys, more, kind, value):
    for name in images.iterdir():
        name.unlink()
    sources = {
        "way 9": nifti(images / "way 9.nii", HU, WAYS[9]), "way 30": nifti(images / "way 30.NII.GZ", HU, WAYS[30]), "film": dicom(images / "film.dcm", HU[0]),
        "a": save(images / "a.png", picture(0)),
    }
    series(images / "series 1.2", HU)
    nifti(images / "broken.nii.gz", HU).write_bytes(b"broken")
    save(images / "thumbnails" / "b.png", picture(1))  # a folder, but no series
    assert predict(finished(tmp_path, constant=0.2), images, tmp_path / "out", *more) == 1
    said = capsys.readouterr()
    assert "1 not read" in said.err and "broken.nii.gz" in said.err and "6/6 images" in said.out
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"way 9.nii.gz", "way 30.nii.gz", "film.nii.gz", "series 1.2.nii.gz", "a.png"}
    for name in ("way 9", "way 30"):
        written, source = nib.load(tmp_path / "out" / f"{name}.nii.gz"), nib.load(sources[name])
        assert written.shape == source.shape and np.array_equal(written.affine, source.affine)
    of_series = nib.load(tmp_path / "out" / "series 1.2.nii.gz")
    assert of_series.shape == (6, 7, 5) and np.allclose(of_series.affine, LPS)
    assert of_series.get_data_dtype() == kind and np.allclose(of_series.get_fdata(), value)


def test_every_slice_is_segmented_in_the_window_of_the_run(tmp_path):
    voxels = np.stack([picture(seed)[..., 0].astype(np.int16) * 3 - 300 for seed in range(20)])  # more than a batch
    nifti(tmp_path / "scans" / "a.nii.gz", voxels, WAYS[21])
    run = finished(tmp_path, DistillConfig(terms="", pixels=32, width=2, window=WINDOW))
    predict(run, tmp_path / "scans", tmp_path / "out", "--overlays")
    expected = np.stack(inference.predict(inference.load_student(run), as_rgb(windowed(voxels))))
    written = np.asarray(nib.load(tmp_path / "out" / "a.nii.gz").dataobj)
    assert expected.std((1, 2)).min() > 0 and np.abs(written - stored(expected, WAYS[21])[0]).max() < 0.02  # a grey level may round either way
    fullest = (expected > 0.5).sum((1, 2)).argmax()
    contour = border(expected[fullest] > 0.5)
    drawn = (pixels(tmp_path / "out" / "a_overlay.png") == ORANGE).all(-1)
    assert contour.any() and (drawn != contour).mean() < 0.02


def by_hand(image, colour="rgb", gamma=1.0):
    """A (32, 16) image as the network of 32 px sees it when padded."""
    grey = np.asarray(Image.fromarray(image).convert("L"))
    image = as_rgb(grey) if colour == "grey" else image
    padded = np.zeros((32, 32, 3), np.uint8)
    padded[:, 8:24] = np.rint(255 * (image / 255.0) ** gamma)
    return padded


@pytest.mark.parametrize("more", [{}, {"colour": "grey"}, {"gamma": 2.0}, {"colour": "grey", "gamma": 0.5}])
def test_images_are_prepared_for_prediction_as_they_were_for_training(tmp_path, more):
    student = inference.load_student(finished(tmp_path, DistillConfig(terms="", pixels=32, width=2, fit="pad", **more)))
    image = picture(3, (32, 16))
    [probability] = inference.predict(student, [image])
    expected = inference.probabilities(student.network, by_hand(image, **more)[None])[0, :, 8:24]
    assert np.allclose(probability, expected, atol=1e-6)
    assert not np.allclose(probability, inference.predict(inference.load_student(finished(tmp_path)), [image])[0], atol=1e-3)  # stretched, in colour


def test_equalization_reaches_prediction(tmp_path):
    image = picture(4) // 4  # dull
    cfgs = [DistillConfig(terms="", pixels=32, width=2, clahe=clahe) for clahe in (0.0, 0.05)]
    plain, equalized = (inference.load_student(finished(tmp_path / str(cfg.clahe), cfg)) for cfg in cfgs)
    assert np.abs(inference.predict(plain, [image])[0] - inference.predict(equalized, [image])[0]).max() > 0.01


def test_a_run_of_before_the_fields_of_preparation_is_read_with_their_defaults(tmp_path):
    run = finished(tmp_path)
    content = json.loads((run / "config.json").read_text())
    for name in ("fit", "colour", "clahe", "gamma", "window", "split", "split_file", "folds", "fold", "test_dataset"):
        content.pop(name, None)
    shutil.copytree(run, tmp_path / "old")
    (tmp_path / "old" / "config.json").write_text(json.dumps(content))
    (tmp_path / "old" / "DONE").write_text("")  # checksums came later, too
    old, new = inference.load_student(tmp_path / "old"), inference.load_student(run)
    assert old.cfg == new.cfg and old.pixels == 32
    assert np.array_equal(inference.predict(old, [picture(0)])[0], inference.predict(new, [picture(0)])[0])


def teachers_run(root, monkeypatch):
    monkeypatch.setitem(inference.TEACHERS, "unet64", lambda: UNet(width=2))  # small, for the test
    return finished(root, TeacherConfig(teacher="unet64", pixels=32))


def damaged(root, **files):
    run = finished(root)
    for name, content in files.items():
        (run / name.replace("_json", ".json")).write_text(content)
    store.finish(run)  # as if it had been written so
    return run


def of_another_width(root):
    run = finished(root)
    store.write_checkpoint(run / "checkpoint_best", {"network": UNet(width=3).state_dict()})
    store.finish(run)
    return run


def holding(content):
    def make(root, _):
        run = finished(root)
        store.write_checkpoint(run / "checkpoint_best", content)
        store.finish(run)
        return run

    return make


NO_STUDENT = {  # what is given for a run: how it is made, words of the message
    "unfinished run": (lambda root, _: finished(root, done=False), ["not finished", "DONE"]),
    "no run": (lambda root, _: root / "images", ["no config.json", "not the folder of a run"]),
    "no folder": (lambda root, _: root / "nowhere", ["no config.json", "not the folder of a run"]),
    "a file": (lambda root, _: root / "images" / "a.png", ["not the folder of a run"]),
    "a teacher's run": (teachers_run, ["a teacher, not a student", "runs/distill"]),
    "damaged config": (lambda root, _: damaged(root, config_json="{"), ["config.json is damaged"]),
    "config of another stage": (lambda root, _: damaged(root, config_json='{"stage": "graph"}'), ["'graph'", "distill"]),
    "config with a wrong value": (lambda root, _: damaged(root, config_json='{"stage": "distill", "width": "x"}'), ["width = 'x'"]),
    "checkpoint of text": (lambda root, _: damaged(root, checkpoint_best="hello"), ["checkpoint_best is no checkpoint"]),
    "checkpoint of another network": (lambda root, _: of_another_width(root), ["checkpoint_best", "another network"]),
    "checkpoint without a network": (holding({"epoch": 3}), ["checkpoint_best", "another network"]),
    "checkpoint of a list": (holding([1, 2]), ["checkpoint_best", "another network"]),
}


@pytest.mark.parametrize("what", NO_STUDENT)
def test_what_is_no_finished_student_is_refused(tmp_path, images, monkeypatch, capsys, what):
    make, words = NO_STUDENT[what]
    assert predict(make(tmp_path, monkeypatch), images, tmp_path / "out") == 1
    said = capsys.readouterr().err
    assert all(word in said for word in words), said
    assert "Traceback" not in said and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("folder", "out", "more", "words"),
    [
        ("empty", "out", (), "holds no images"),
        ("absent", "out", (), "is no folder of images"),
        ("images/a.png", "out", (), "is no folder of images"),
        ("images", "images", (), "choose another"),
        ("images", "images/../images", (), "choose another"),
        ("images", "a_file", (), "a_file"),
        ("images", "out", ("--threshold", "128"), "--threshold = 128.0: wants a number from 0 to 1"),
        ("images", "out", ("--threshold", "nan"), "--threshold = nan"),
    ],
)
def test_folders_and_thresholds_that_cannot_be_meant_are_refused(tmp_path, images, capsys, folder, out, more, words):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a_file").write_text("")
    before = sorted(images.iterdir())
    assert predict(finished(tmp_path), tmp_path / folder, tmp_path / out, *more) == 1
    assert words in capsys.readouterr().err and sorted(images.iterdir()) == before


@pytest.mark.parametrize("image", [np.zeros((40, 50), np.uint8), np.zeros((40, 50, 4), np.uint8), np.zeros((40, 50, 3)), lesion(9)])
def test_predict_in_a_notebook_refuses_arrays_that_are_no_rgb(tmp_path, image):
    student = inference.load_student(finished(tmp_path))
    with pytest.raises(LesionKDError, match=r"image 1 has shape .* wants \(H, W, 3\) uint8"):
        inference.predict(student, [picture(0), image])
    assert inference.predict(student, []) == []
