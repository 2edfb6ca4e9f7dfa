"""Students as one file: written, read, those that come with the repository, and exported ones."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import lesionkd_core as lkd
from lesionkd_core.config import DistillConfig, LesionKDError
from lesionkd_core.data.phantom import draw
from lesionkd_core.export import ExportConfig, export_student, load_onnx
from lesionkd_core.predict import STUDENTS, TrainedNetwork, build, load_student, save_student

CFG = DistillConfig(losses="", pixels=64, dataset="no-such-data")
PUBLISHED = sorted(STUDENTS.glob("*.safetensors"))


@pytest.fixture
def file(tmp_path):
    """A file of an untrained student whose data set is not here."""
    score = {"mean": 0.5, "low": 0.4, "high": 0.6}
    test = {"dice": score, "cases": 9, "groups": 5, "lesions": 9, "missed": 1, "false_alarms": 0}
    student = TrainedNetwork(build(CFG).eval(), CFG, tmp_path, {"test": test}, "0" * 64)
    save_student(student, tmp_path / "one.safetensors")
    return tmp_path / "one.safetensors"


def test_a_student_is_the_same_after_saving(file):
    student, again = build(CFG).eval(), load_student(file)
    assert again.cfg == CFG and again.summary["test"]["missed"] == 1 and again.path == file
    image = np.stack([draw(0, 1, 64)[0]])
    expected = TrainedNetwork(student, CFG, file).probabilities(image)
    assert np.array_equal(again.probabilities(image), expected)


@pytest.mark.parametrize(
    "write",
    [
        lambda path: path.write_bytes(b"no weights"),
        lambda path: path.write_bytes(path.read_bytes()[:-100]),
        lambda path: save_file({"x": torch.zeros(1)}, path),
        lambda path: save_file({"x": torch.zeros(1)}, path, {"lesionkd": "{}"}),
    ],
    ids=["text", "cut", "no configuration", "empty configuration"],
)
@pytest.mark.fault
def test_a_file_that_is_no_student_is_refused(file, write):
    write(file)
    with pytest.raises(LesionKDError, match="one.safetensors is not a student"):
        load_student(file)


def test_a_student_whose_data_are_not_here_is_exported_with_a_few_drawn_images(
    file, runs, messages
):
    Image.fromarray(draw(0, 1, 90)[0]).save(file.with_name("one-input.png"))
    exported = export_student(ExportConfig(formats="onnx, native"), load_student(file))
    assert {"student.onnx", "native/segment.c"} <= set(exported.model["files"])
    assert set(exported.parity["cases"]) == {9}  # 8 drawn ones and its own
    assert any("8 drawn pictures" in line for line in messages())
    assert not (exported.path.parents[1] / "prepare").exists(), "no data set is prepared"

    onnx = load_onnx(exported.path / "student.onnx")
    images = [draw(0, i, side)[0] for i, side in enumerate((64, 100))]
    for exact, rounded in zip(load_student(file).predict(images), onnx.predict(images)):
        assert rounded.shape == exact.shape and np.abs(exact - rounded).max() < 0.003
    with pytest.raises(LesionKDError, match="read it with lkd.load_onnx"):
        load_student(exported.path / "student.onnx")

    (exported.path / "model.json").rename(exported.path / "model.txt")
    with pytest.raises(LesionKDError, match="needs .*model.json"):
        load_onnx(exported.path / "student.onnx")


@pytest.mark.fault
def test_a_file_that_is_no_onnx_is_refused(tmp_path):
    (tmp_path / "model.json").write_text(json.dumps({"size": 64, "fit": "stretch", "window": ""}))
    (tmp_path / "student.onnx").write_bytes(b"nothing")
    with pytest.raises(LesionKDError, match="cannot be read as ONNX"):
        load_onnx(tmp_path / "student.onnx")


@pytest.mark.fault
def test_an_unknown_name_lists_the_published_students(runs):
    with pytest.raises(LesionKDError, match="'?no-such-student"):
        load_student("no-such-student")
    if PUBLISHED:
        with pytest.raises(LesionKDError, match=PUBLISHED[0].stem):
            load_student("no-such-student")


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_a_published_student_reproduces_its_stored_mask(path):
    student = lkd.load_student(path.stem)
    image = np.asarray(Image.open(STUDENTS / f"{path.stem}-input.png").convert("RGB"))
    stored = np.asarray(Image.open(STUDENTS / f"{path.stem}-mask.png"))
    [found] = student.predict([image])
    assert np.abs(np.rint(255 * found) - stored).max() <= 1
    card = path.with_suffix(".md").read_text()
    assert f"{student.summary['test']['dice']['mean']:.3f}" in card and "Licence" in card
