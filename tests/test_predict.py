"""Predictions of images and folders; the network is built, not trained."""

import json
import math
import shutil

import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk
import torch
from PIL import Image
from scipy import ndimage

from lesionkd_core import predict as module
from lesionkd_core import results
from lesionkd_core.config import DistillConfig, LesionKDError, TeacherConfig
from lesionkd_core.data.batches import normalize
from lesionkd_core.models import UNet
from lesionkd_core.predict import build, load_student, predict_folder, probabilities
from tests.test_dicom import dicom
from tests.tiny import image_folder, lesion, picture, save, save_pages

CFG = DistillConfig(losses="", pixels=32, width=2)
CYAN = (51, 187, 238)
SIZES = {"a.png": (48, 64), "odd.jpg": (33, 47), "grey.tif": (40, 40)}
SIZES |= {"alpha.png": (61, 35), "tiny.bmp": (2, 3)}


def finished(root, cfg=CFG, constant=None, **files):
    """The folder of a run as training leaves it.

    With `constant` the network predicts that probability everywhere; `files` are written over.
    """
    network = build(cfg)
    for layer in network.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.momentum = 1.0  # one pass in training mode gives the statistics of pictures
    network(normalize(np.stack([picture(seed, (32, 32)) for seed in range(4)])))
    with torch.no_grad():
        network.head.bias += 0.75  # probabilities on both sides of a half
    if constant is not None:
        torch.nn.init.zeros_(network.head.weight)
        torch.nn.init.constant_(network.head.bias, math.log(constant / (1 - constant)))

    def make(missing):
        for path in missing:
            checkpoint = {"network": network.state_dict()}
            results.write_checkpoint(path / "checkpoint_best", checkpoint)
            for name, write in files.items():
                write(path / name)

    [run] = results.find_or_make([results.Wanted(cfg, "upstream")], make, results.Result)
    return run.path


@pytest.fixture
def images(tmp_path, runs):
    """Five images of every kind, one that is broken, and a text."""
    folder = tmp_path / "images"
    for seed, (name, size) in enumerate(SIZES.items()):
        mode = {"grey.tif": "L", "alpha.png": "RGBA"}.get(name)
        save(folder / name, picture(seed, size), mode)
    (folder / "broken.png").write_bytes((folder / "a.png").read_bytes()[:200])
    (folder / "notes.txt").write_text("no image")
    return folder


def pixels(path):
    return np.asarray(Image.open(path))


def border(mask):
    """Brute force: pixels with a 4-neighbour of another label."""
    marked = np.zeros(mask.shape, bool)
    for y, x in np.ndindex(*mask.shape):
        for v, u in ((y, x + 1), (y, x - 1), (y + 1, x), (y - 1, x)):
            if 0 <= v < mask.shape[0] and 0 <= u < mask.shape[1]:
                marked[y, x] |= mask[y, x] != mask[v, u]
    return marked


# Images -------------------------------------------------------------------------------------------


def by_hand(image):
    """A (32, 16) image as a network of 32 px sees it with padding."""
    padded = np.zeros((32, 32, 3), np.uint8)
    padded[:, 8:24] = image
    return padded


def test_images_are_prepared_as_for_the_training(runs):
    student = load_student(finished(runs, CFG.with_values(fit="pad")))
    image = picture(3, (32, 16))
    [probability] = student.predict([image])
    expected = probabilities(student.network, by_hand(image)[None])[0, :, 8:24]
    assert np.allclose(probability, expected, atol=1e-6)
    [stretched] = load_student(finished(runs)).predict([image])
    assert not np.allclose(probability, stretched, atol=1e-3)


def test_probabilities_are_the_sigmoid_of_the_logits_in_any_batch(runs):
    network = load_student(finished(runs)).network
    x = np.stack([picture(seed, (32, 32)) for seed in range(5)])
    with torch.no_grad():
        expected = network(normalize(x))[:, 0].sigmoid().numpy()
    assert np.allclose(probabilities(network, x), expected, atol=1e-6)
    assert np.allclose(probabilities(network, x, batch_size=2), expected, atol=1e-6)


@pytest.mark.fault
@pytest.mark.parametrize("shape", [(40, 50), (40, 50, 4), (40, 50, 3)])
def test_arrays_that_are_no_rgb_images_are_refused(runs, shape):
    student = load_student(finished(runs))
    wrong = np.zeros(shape, np.float64 if shape[-1] == 3 else np.uint8)
    with pytest.raises(LesionKDError, match=r"image 1 has shape .* expected \(H, W, 3\) uint8"):
        student.predict([picture(0), wrong])
    assert student.predict([]) == []


def test_pil_images_paths_and_generators_are_images_too(images):
    student = load_student(finished(images.parent))
    array = pixels(images / "a.png")
    [expected] = student.predict([array])
    for given in ([Image.open(images / "a.png")], [str(images / "a.png")], (x for x in [array])):
        [found] = student.predict(given)
        assert np.array_equal(found, expected)
    with pytest.raises(LesionKDError, match="expected a list of images"):
        student.predict(images / "a.png")


@pytest.mark.fault
def test_pil_images_with_more_than_8_bits_are_refused(tmp_path, runs):
    student = load_student(finished(runs))
    Image.fromarray(np.full((40, 50), 3000, np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(LesionKDError, match=r"mode I.* has more than 8 bits; give its path"):
        student.predict([Image.open(tmp_path / "deep.png")])
    [found] = student.predict([tmp_path / "deep.png"])
    assert found.shape == (40, 50)


# Folders ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("threshold", "value"), [(None, 51), (0.1, 255)])
def test_every_image_gets_a_mask_of_its_size_and_a_broken_one_is_listed(
    tmp_path, images, threshold, value
):
    student = load_student(finished(tmp_path, constant=0.2))
    out = tmp_path / "new" / "out"
    unreadable = predict_folder(student, images, out, threshold)
    assert len(unreadable) == 1 and "broken.png" in unreadable[0]
    masks = {path.name: pixels(path) for path in out.glob("*.png")}
    assert set(masks) == {f"{name.split('.')[0]}.png" for name in SIZES}
    for name, size in SIZES.items():
        mask = masks[f"{name.split('.')[0]}.png"]
        assert mask.shape == size and mask.dtype == np.uint8
        assert set(np.unique(mask)) == {value}  # 0.2 x 255 = 51


def test_masks_and_contours_follow_the_threshold(tmp_path, images):
    student = load_student(finished(tmp_path))
    predict_folder(student, images, tmp_path / "soft")
    soft = pixels(tmp_path / "soft" / "a.png")
    level = (int(soft.min()) + int(soft.max())) // 2 + 0.5  # between two grey levels
    predict_folder(student, images, tmp_path / "hard", level / 255, overlays=True)
    hard, drawn = (pixels(tmp_path / "hard" / name) for name in ("a.png", "a_overlay.png"))
    assert set(np.unique(hard)) == {0, 255} and np.array_equal(hard == 255, soft > level)
    contour = border(hard)
    original = pixels(images / "a.png")
    assert contour.any() and (drawn[contour] == CYAN).all()
    black = (drawn == 0).all(-1)  # lines beside the contour
    filled = (hard == 255) & ~contour & ~black
    expected = 0.75 * original[filled] + 0.25 * np.array(CYAN)
    assert np.abs(drawn[filled] - expected).max() <= 0.5
    outside = (hard == 0) & ~contour & ~black
    assert (drawn[outside] == original[outside]).all()


NAMES = {  # images (stack.tif has two pages), and files that are written for them
    "a.png a.jpg": "a.png a.jpg",
    "lesion.png lesion_overlay.png": "lesion lesion_overlay.png",
    "stack.tif stack_page001.png": "stack_page000 stack_page001 stack_page001.png",
    "p1/a.png p2/a.png a.png": "p1/a p2/a a",
}


@pytest.mark.parametrize("given", NAMES)
def test_every_file_that_is_written_has_a_name_of_its_own(tmp_path, runs, given):
    for name in given.split():
        save(tmp_path / "in" / name, picture(5))
        if name == "stack.tif":
            save_pages(tmp_path / "in" / name, picture(0), picture(1))
    student, out = load_student(finished(runs)), tmp_path / "in" / "out"
    for _ in range(2):  # masks inside the folder of the images are no images
        assert predict_folder(student, tmp_path / "in", out, overlays=True) == []
    expected = {f"{name}{end}" for name in NAMES[given].split() for end in (".png", "_overlay.png")}
    assert {path.relative_to(out).as_posix() for path in out.rglob("*.png")} == expected


def test_sub_folders_are_segmented_and_what_is_not_read_there_is_named(tmp_path, images):
    save(images / "deep" / "er" / "c.png", picture(7))
    for name in ("deep/d.ppm", "deep/er/e.heic", "deep/f.txt"):
        (images / name).write_bytes(b"x")
    unreadable = predict_folder(load_student(finished(tmp_path)), images, tmp_path / "out")
    assert (tmp_path / "out" / "deep" / "er" / "c.png").is_file()
    report = results.read_table(tmp_path / "out" / "report.csv").query("action == 'not read'")
    assert set(report["file"]) == {"broken.png", "deep/d.ppm", "deep/er/e.heic"}
    assert report["reason"].tolist() == unreadable
    assert "deep/er/c.png" in set(pd.read_csv(tmp_path / "out" / "areas.csv")["file"])


@pytest.mark.fault
def test_masks_among_the_images_are_refused(tmp_path, images):
    save(images / "a_mask.png", lesion(9))
    with pytest.raises(LesionKDError, match=r"holds masks, such as a_mask\.png; give a folder of"):
        predict_folder(load_student(finished(tmp_path)), images, tmp_path / "out")


@pytest.mark.fault
@pytest.mark.parametrize(("given", "out"), [("", ""), ("a.png", ""), ("", "sub"), ("sub", "sub")])
def test_the_images_are_never_overwritten(tmp_path, images, given, out):
    save(images / "sub" / "a.png", picture(9))
    before = {path: path.read_bytes() for path in images.rglob("*.*")}
    with pytest.raises(LesionKDError, match="holds your images, which masks could overwrite"):
        predict_folder(load_student(finished(tmp_path)), images / given, images / out, 0.5)
    assert {path: path.read_bytes() for path in images.rglob("*.*")} == before


def test_masks_in_a_folder_of_the_images_can_be_made_again(tmp_path, images):
    student = load_student(finished(tmp_path))
    for threshold in (0.1, 0.9):
        predict_folder(student, images, images / "masks", threshold)
    assert pixels(images / "masks" / "a.png").max() == 0


def test_one_picture_is_enough(tmp_path, images):
    student = load_student(finished(tmp_path))
    assert predict_folder(student, images / "a.png", tmp_path / "out") == []
    [mask] = (tmp_path / "out").glob("*.png")
    assert mask.name == "a.png" and pixels(mask).shape == SIZES["a.png"]


def test_the_folder_of_one_dicom_series_is_one_volume_and_files_of_several_are_not(tmp_path, runs):
    student, slices = load_student(finished(runs)), [picture(s)[..., 0] for s in range(3)]
    for z, plane in enumerate(slices):
        about = {"InstanceNumber": z + 1, "ImagePositionPatient": [0, 0, 2.5 * z]}
        dicom(
            tmp_path / "one" / f"{z}.dcm", plane.astype(np.int16), SeriesInstanceUID="1.2", **about
        )
        uid = f"1.{z + 2}"
        dicom(
            tmp_path / "many" / f"{z}.dcm", plane.astype(np.int16), SeriesInstanceUID=uid, **about
        )
    (tmp_path / "above").mkdir()
    (tmp_path / "above" / "one").symlink_to(tmp_path / "one")
    for folder in ("one", "above", "many"):
        assert predict_folder(student, tmp_path / folder, tmp_path / f"out {folder}") == []
    read = [sitk.GetArrayFromImage(sitk.ReadImage(p)) for p in tmp_path.glob("out*/one.nii.gz")]
    assert len(read) == 2 and len(read[0]) == 3 and (read[0] == read[1]).all()
    assert len(list((tmp_path / "out many").glob("*.nii.gz"))) == 3


def test_the_report_says_what_was_not_read_and_what_shows_little(tmp_path, images):
    save(images / "black.png", np.zeros((40, 50, 3), np.uint8))
    deep = picture(3)[..., 0].astype(np.uint16) * 12
    save(images / "deep.png", deep)
    (images / "phone.heic").write_bytes(b"x")
    long = images / ("n" * 246 + ".png")
    save(long, picture(4))
    unreadable = predict_folder(load_student(finished(tmp_path)), images, tmp_path / "out")
    report = results.read_table(tmp_path / "out" / "report.csv")
    missing = report[report["action"] == "not read"]
    assert set(missing["file"]) == {"phone.heic", "broken.png", long.name}
    assert missing["reason"].tolist() == unreadable
    assert "too long; shorten it" in missing.set_index("file").loc[long.name, "reason"]
    kinds = report.set_index("file")["action"]
    assert kinds["black.png"] == kinds["tiny.bmp"] == "shows little"
    notes = report[report["action"] != "not read"].groupby("file")["reason"].agg(" ".join)
    assert "nearly flat" in notes["black.png"] and "16-bit values" in notes["deep.png"]
    assert "shorter than 32 px" in notes["tiny.bmp"] and "a.png" not in notes
    assert (tmp_path / "out" / "odd.png").is_file()  # and files after the long name, too


def scan(path, voxels, direction=None):
    """(D, H, W) as a volume 0.5 mm wide, 0.75 mm high and 2.5 mm deep."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = sitk.GetImageFromArray(voxels)
    image.SetSpacing((0.5, 0.75, 2.5))
    image.SetOrigin((30.0, -12.0, 40.0))
    if direction:
        image.SetDirection(direction)
    sitk.WriteImage(image, str(path))
    return image


@pytest.mark.parametrize(
    ("threshold", "kind", "value"), [(None, sitk.sitkFloat32, 0.2), (0.1, sitk.sitkUInt8, 1)]
)
def test_volumes_among_the_images_get_masks_in_their_space(tmp_path, runs, threshold, kind, value):
    folder, turned = tmp_path / "scans", (0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
    voxels = np.random.default_rng(0).integers(-200, 300, (5, 7, 6)).astype(np.int16)
    sources = {"way 1": scan(folder / "way 1.nii", voxels)}
    sources["way 2"] = scan(folder / "way 2.nii.gz", voxels, turned)
    (folder / "way 2.nii.gz").rename(folder / "way 2.NII.GZ")
    save(folder / "a.png", picture(0))
    (folder / "broken.nii.gz").write_bytes(b"broken")
    student = load_student(finished(tmp_path, constant=0.2))
    unreadable = predict_folder(student, folder, tmp_path / "out", threshold)
    assert len(unreadable) == 1 and "broken.nii.gz" in unreadable[0]
    found = {path.name for path in (tmp_path / "out").iterdir()}
    assert found == {"way 1.nii.gz", "way 2.nii.gz", "a.png", "areas.csv", "report.csv"}
    for name, source in sources.items():
        mask = sitk.ReadImage(str(tmp_path / "out" / f"{name}.nii.gz"))
        assert mask.GetSize() == source.GetSize() and mask.GetPixelID() == kind
        for place in ("GetSpacing", "GetOrigin", "GetDirection"):
            assert np.allclose(getattr(mask, place)(), getattr(source, place)(), atol=1e-5)
        assert np.allclose(sitk.GetArrayFromImage(mask), value)


def test_every_slice_is_segmented_in_the_window_of_the_run(tmp_path, runs, monkeypatch):
    monkeypatch.setattr(module, "BATCH", 4)  # more slices than are in memory at a time
    voxels = np.stack([picture(seed)[..., 0].astype(np.int16) * 3 - 300 for seed in range(6)])
    identity = tuple(np.eye(3).ravel())  # columns to the left, rows to the back
    scan(tmp_path / "scans" / "a.nii.gz", voxels, identity)
    student = load_student(finished(tmp_path, CFG.with_values(window="40, 400")))
    predict_folder(student, tmp_path / "scans", tmp_path / "out", overlays=True)
    windowed = np.floor(255 * np.clip((voxels + 160) / 400, 0, 1) + 0.5).astype(np.uint8)
    expected = np.stack(student.predict(windowed[..., None].repeat(3, axis=-1)))
    written = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "out" / "a.nii.gz")))
    assert expected.std((1, 2)).min() > 0
    assert np.abs(written - expected).max() < 0.02  # a grey level may round either way
    fullest = (expected > 0.5).sum((1, 2)).argmax()
    drawn = pixels(tmp_path / "out" / f"a_z{fullest:03d}_overlay.png")
    drawn = (drawn == CYAN).all(-1)
    contour = border(expected[fullest] > 0.5)
    assert contour.any() and (drawn != contour).mean() < 0.02


NO_FOLDER = {
    "empty": "has no images",
    "images/notes.txt": "no image of a format that is read",
    "pairs": r"folders of their own; give .*pairs/images$",
}


@pytest.mark.fault
@pytest.mark.parametrize("folder", NO_FOLDER)
def test_a_folder_without_images_is_refused(tmp_path, images, folder):
    (tmp_path / "empty").mkdir()
    image_folder(tmp_path / "pairs", 2)
    with pytest.raises(LesionKDError, match=NO_FOLDER[folder]):
        predict_folder(load_student(finished(tmp_path)), tmp_path / folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# Runs ---------------------------------------------------------------------------------------------


def test_a_run_from_before_an_option_existed_has_its_default(runs):
    path = finished(runs)
    content = json.loads((path / "config.json").read_text())
    for name in ("fit", "window", "split", "split_file", "folds", "fold", "test_dataset"):
        content.pop(name)
    old = shutil.copytree(path, runs / "distill" / "old")
    (old / "config.json").write_text(json.dumps(content | {"normalize": "mass"}))
    (old / "DONE").write_text("{}")
    before, now = load_student(old), load_student(path)
    assert before.cfg == now.cfg and before.pixels == 32
    assert np.array_equal(before.predict([picture(0)])[0], now.predict([picture(0)])[0])


def test_a_network_whose_file_has_changed_since_the_training_is_named(
    runs, tmp_path, monkeypatch, messages
):
    """Its weights may fit the new code and mean something else."""
    monkeypatch.syspath_prepend(tmp_path)
    file = tmp_path / "changing.py"
    code = "from lesionkd_core.models import UNet\ndef tiny(width): return UNet(width=2)"
    file.write_text(code)
    path = finished(runs, CFG.with_values(student="changing:tiny"))
    load_student(path)
    assert not any("changed" in line for line in messages())
    file.write_text(code + "  # another activation")
    load_student(path)
    words = "warning: the file of changing:tiny has changed since"
    assert any(words in line for line in messages())


def holding(content):
    return lambda path: results.write_checkpoint(path, content)


def unfinished(runs):
    path = finished(runs)
    (path / "DONE").unlink()
    return path


NO_STUDENT = {  # what is given for a run: how it is made, words of the message
    "unfinished": (unfinished, ["is not finished", "DONE"]),
    "no run": (lambda runs: save(runs / "x" / "a.png", lesion(9)).parent, ["no config.json"]),
    "a file": (lambda runs: save(runs / "a.png", lesion(9)), ["not the folder of a run"]),
    "a teacher": (
        lambda runs: finished(runs, TeacherConfig(teacher="tests.tiny:small_teacher", pixels=32)),
        ["is a teacher; give the folder of a student"],
    ),
    "text for a checkpoint": (
        lambda runs: finished(runs, checkpoint_best=lambda path: path.write_text("hello")),
        ["checkpoint_best is not a readable checkpoint"],
    ),
    "another network": (
        lambda runs: finished(
            runs, checkpoint_best=holding({"network": UNet(width=3).state_dict()})
        ),
        ["checkpoint_best", "another network"],
    ),
}


@pytest.mark.fault
@pytest.mark.parametrize("what", NO_STUDENT)
def test_a_folder_that_is_no_finished_student_is_refused(runs, what):
    make, words = NO_STUDENT[what]
    with pytest.raises(LesionKDError) as error:
        load_student(make(runs))
    assert all(word in str(error.value) for word in words), str(error.value)


def test_areas_of_pictures_and_slices_are_those_of_the_masks(tmp_path, runs):
    student = load_student(finished(runs))
    for name, size in (("a.png", (48, 64)), ("b.png", (33, 47))):
        save(tmp_path / "in" / name, picture(3, size))
    scan(tmp_path / "in" / "c.nii.gz", np.stack([picture(s, (40, 40))[..., 0] for s in range(3)]))
    assert predict_folder(student, tmp_path / "in", tmp_path / "out", 0.5, pixel_mm=0.5) == []
    areas = pd.read_csv(tmp_path / "out" / "areas.csv").set_index(["file", "slice"])
    assert areas.index.tolist()[2:] == [("c.nii.gz", z) for z in (0.0, 1.0, 2.0)]
    for (file, z), row in areas.iterrows():
        if file == "c.nii.gz":
            mask = sitk.GetArrayFromImage(sitk.ReadImage(tmp_path / "out" / file))[int(z)] > 0
        else:
            mask = np.asarray(Image.open(tmp_path / "out" / file)) > 0
        assert row["lesion_px"] == mask.sum()
        assert row["lesion_fraction"] == pytest.approx(mask.mean())
        assert row["components"] == ndimage.label(mask, np.ones((3, 3)))[1]
    pictures = areas.loc[["a.png", "b.png"]]
    assert pictures["lesion_mm2"].tolist() == (pictures["lesion_px"] / 4).tolist()
    assert pictures["lesion_px"].sum() > 0
