"""Exported students: the same function in every file, refused otherwise; cost and model card."""

import hashlib
import platform
import tomllib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch import nn

import lesionkd_core as lkd
from lesionkd_core import results
from lesionkd_core.config import ConfigError, LesionKDError
from lesionkd_core.data.prepare import prepare
from lesionkd_core.evaluate import mask_dice
from lesionkd_core.export import ExportConfig, cost, export_student, formats
from lesionkd_core.export.card import facts
from lesionkd_core.export.coreml import write_coreml
from lesionkd_core.export.executorch import executorch_engine, write_executorch
from lesionkd_core.export.formats import FORMATS
from lesionkd_core.export.native import pack
from lesionkd_core.export.onnx import onnx_engine, write_half, write_int8, write_onnx
from lesionkd_core.export.parity import (
    Deployed,
    Engine,
    ParityError,
    check_parity,
    fold_norms,
    parity,
    torch_engine,
)
from lesionkd_core.models import NETWORKS, UNet
from lesionkd_core.predict import load_student, probabilities, save_student
from tests.conftest import ROOT
from tests.fixed import CFG, fixed_run, gap, lively, noise, undecided, unet


@pytest.fixture(scope="module")
def student():
    return fixed_run()


@pytest.fixture(scope="module")
def data():
    return prepare(CFG)


@pytest.fixture(scope="module")
def network(student):
    return Deployed(student.network)


@pytest.fixture(scope="module")
def exported(student):
    return export_student(ExportConfig(formats="onnx, native", sizes=128), student)


# Files --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("network", [unet(width=4), lively(NETWORKS["resnet34_unet"]())])
def test_folding_the_norms_keeps_the_function_and_the_network(network):
    x = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    folded = fold_norms(network)

    def norms(m):
        return sum(isinstance(layer, nn.BatchNorm2d) for layer in m.modules())

    assert norms(folded) < norms(network)
    torch.testing.assert_close(folded(x), network(x), rtol=1e-3, atol=1e-3)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_the_deployed_network_returns_the_mask_image_of_step_s7(student, data, network):
    expected = probabilities(student.network, data.images[:8]) * 255
    found = torch_engine(network)(data.images[:8])
    assert found.dtype == np.uint8
    assert np.abs(found - expected).max() <= 0.51


def test_the_fixed_student_marks_lesions(data, network):
    """Otherwise the comparisons below would compare nothing."""
    rows = data.index("test")
    masks = torch_engine(network)(data.images[rows]) > 127
    assert 0.005 < masks.mean() < 0.5
    assert mask_dice(masks, data.masks[rows] > 0).mean() > 0.6


def test_onnx_takes_any_batch_and_size_in_multiples_of_32_and_names_no_machine(tmp_path):
    network = Deployed(unet(width=4))
    write_onnx(network, tmp_path / "a.onnx")
    content = (tmp_path / "a.onnx").read_bytes()
    for word in ("stack_trace", "lesionkd", "site-packages", "pkg.torch", str(tmp_path)):
        assert word.encode() not in content, word
    engine = onnx_engine(tmp_path / "a.onnx", "float32")
    for shape in ((1, 32, 32), (3, 64, 64), (2, 96, 160), (17, 64, 32)):
        images = noise(*shape)
        assert gap(engine(images), torch_engine(network)(images)) <= 1, shape


def test_half_precision_and_int8_pass_the_check_and_are_smaller(network, data, tmp_path):
    files = [tmp_path / f"{name}.onnx" for name in ("float32", "float16", "int8")]
    write_onnx(network, files[0])
    write_half(files[0], files[1])
    write_int8(files[0], files[2], data.images[data.index("train")[:16]])
    rows = data.index("test")
    engines = [(onnx_engine(file, file.stem), 64) for file in files[1:]]
    table = parity(torch_engine(network), engines, data.images[rows], data.masks[rows])
    check_parity(table)
    assert (table["max_difference"] > 0).all()
    assert list(table["cases"]) == [len(rows)] * 2
    sizes = [file.stat().st_size for file in files]
    assert sizes == sorted(sizes, reverse=True)


def test_executorch_computes_the_same_in_float32_and_int8(network, data, tmp_path):
    rows, train = data.index("test"), data.images[data.index("train")[:8]]
    write_executorch(network, tmp_path / "a.pte", (64,))
    write_executorch(network, tmp_path / "int8.pte", (64,), {64: train})
    exact = executorch_engine(tmp_path / "a.pte", "float32")
    rough = executorch_engine(tmp_path / "int8.pte", "int8")
    engines = [(exact, 64), (rough, 64)]
    table = parity(torch_engine(network), engines, data.images[rows], data.masks[rows])
    assert table["max_difference"][0] <= 1.01 / 255
    assert table["max_difference"][1] > 0
    check_parity(table)
    with pytest.raises(LesionKDError, match="a.pte has forward_64; none takes 96 x 96 px"):
        exact(noise(1, 96, 96))


def test_core_ml_is_converted_and_says_so(network, tmp_path):
    import coremltools

    note = write_coreml(network, tmp_path / "student.mlpackage", 64)
    mac = platform.system() == "Darwin"
    assert note == ("executed, not compared" if mac else "converted, not executed")
    about = coremltools.utils.load_spec(str(tmp_path / "student.mlpackage")).description
    sides = [(f.name, f.type.imageType.width, f.type.imageType.height) for f in about.input]
    sides += [(f.name, f.type.imageType.width, f.type.imageType.height) for f in about.output]
    assert sides == [("image", 64, 64), ("mask", 64, 64)]


# The comparison -----------------------------------------------------------------------------------


def test_parity_by_hand():
    """32 pixels of one case differ: 16 decided ones flip, 8 undecided ones flip, 8 do not flip."""
    truth = np.zeros((2, 32, 32), bool)
    truth[:, :8] = True
    expected = np.where(truth, 255, 0).astype(np.uint8)
    expected[0, 1, :8] = 140  # probability 0.55: near the threshold
    found = expected.copy()
    found[0, 0, :16] = 51
    found[0, 1, :8] = 120
    found[0, 2, :8] = 204
    reference = Engine("PyTorch", "float32", None, lambda _: expected)
    other = Engine("other", "int8", Path("other.onnx"), lambda _: found)
    row = parity(reference, [(other, 32)], noise(2, 32, 32), truth).iloc[0]
    assert row["max_difference"] == pytest.approx(204 / 255)
    assert row["mean_difference"] == pytest.approx((16 * 204 + 8 * 20 + 8 * 51) / 255 / 2048)
    assert row["flipped"] == 24 / 2048
    assert row["flipped_decided"] == 16 / 2048
    assert row["dice_reference"] == 1
    assert row["dice"] == row["dice_to_reference"] == pytest.approx((2 * 232 / (232 + 256) + 1) / 2)
    assert row["rule"] == "decided pixels"


@pytest.mark.fault
@pytest.mark.parametrize(
    ("precision", "steps", "decided", "passes"),
    [
        ("float32", 1, 0.0, True),
        ("float32", 2, 0.0, False),
        ("int8", 80, 0.0099, True),
        ("int8", 80, 0.0101, False),
        ("float16", 2, 0.0101, False),
    ],
)
def test_a_file_is_refused_for_two_steps_in_float32_or_for_decided_pixels(
    precision, steps, decided, passes
):
    row = {"file": "x.onnx", "engine": "E", "precision": precision, "pixels": 64}
    row |= {"max_difference": steps / 255, "flipped_decided": decided, "dice_to_reference": 0.9}
    table = pd.DataFrame([row])
    if passes:
        check_parity(table)
    else:
        with pytest.raises(ParityError, match=r"do not ship them:\nx.onnx \(E, "):
            check_parity(table)


def test_a_right_int8_file_of_a_poor_student_passes(tmp_path):
    """Its probabilities are all near a half, so any rounding flips pixels."""
    images = noise(8, 64, 64)
    poor = undecided(unet(width=4), images, spread=0.05)
    write_onnx(poor, tmp_path / "a.onnx")
    write_int8(tmp_path / "a.onnx", tmp_path / "int8.onnx", images)
    engine = onnx_engine(tmp_path / "int8.onnx", "int8")
    table = parity(torch_engine(poor), [(engine, 64)], images, np.zeros((8, 64, 64), bool))
    assert table["flipped"][0] > 0.01
    check_parity(table)


@pytest.mark.fault
def test_an_export_of_another_network_is_refused_and_left_unfinished(student, monkeypatch):
    def wrong(network, path):
        write_onnx(Deployed(unet(width=4, seed=3)), path)

    monkeypatch.setattr("lesionkd_core.export.onnx.write_onnx", wrong)
    cfg = ExportConfig(formats="onnx")
    with pytest.raises(ParityError, match="student.onnx"):
        export_student(cfg, student)
    path = results.folder(
        results.Wanted(cfg, results.read_json(student.path / "config.json")["digest"])
    )
    assert (path / "parity.csv").exists()
    assert not results.is_done(path)


@pytest.mark.fault
@pytest.mark.parametrize("shape", [(64, 64, 3), (1, 50, 64, 3)])
def test_an_engine_says_what_it_expects(network, shape):
    with pytest.raises(LesionKDError, match=r"expected \(N, H, W, 3\) uint8 RGB with H and W mult"):
        torch_engine(network)(np.zeros(shape, np.uint8))


# The stage ----------------------------------------------------------------------------------------


def test_an_export_is_complete_and_found_again(student, exported):
    names = {p.relative_to(exported.path).as_posix() for p in exported.path.rglob("*")}
    assert names >= {
        *("student.onnx", "student-fp16.onnx", "student-int8.onnx", "golden.png", "DONE"),
        *("golden_mask.png", "model.json", "model_card.md", "parity.csv", "native/segment.c"),
        *("native/segment.h", "native/student.h", "native/arm64-v8a/liblesion.so"),
    }
    before = (exported.path / "model.json").stat().st_mtime_ns
    again = export_student(ExportConfig(formats="onnx, native", sizes=128), student)
    assert (again.path / "model.json").stat().st_mtime_ns == before
    assert "student-int8.onnx" in repr(again)
    card = (exported.path / "model_card.md").read_text()
    parts = "0.800 [0.700, 0.900]", "lesions missed", "hd95 is in pixels", "Not a medical device"
    for said in (*parts, "patent", "Licence of the"):
        assert said in card


def test_the_export_of_a_published_student_keeps_its_card(student, tmp_path):
    file = tmp_path / "mine.safetensors"
    save_student(replace(student, cfg=student.cfg.with_values(dataset="nih-pancreas")), file)
    file.with_suffix(".md").write_text("# Model card: mine\n\nLicence: of my clinic.\n")
    made = export_student(ExportConfig(formats="native"), load_student(file))
    card = (made.path / "model_card.md").read_text()
    start, _, table = card.partition("## The same model in every file")
    assert start == "# Model card: mine\n\nLicence: of my clinic.\n\n"
    assert "| native" in table
    assert made.model["window"] == "70, 340", "that of the release"


def test_the_card_names_a_teacher_only_if_there_was_one_and_the_network_by_its_name(student):
    def first(**options):
        return facts(replace(student, cfg=student.cfg.with_values(**options)))[0]

    assert "trained with sobel from the teacher resnet34_unet on" in first(losses="sobel")
    assert "trained with sobel_mask on" in first(losses="sobel_mask")
    assert "trained alone on" in first(losses="")
    assert first(student="mine:tiny").startswith("A network mine:tiny with")


def test_an_app_that_follows_model_json_gets_the_golden_mask(exported):
    model = exported.model
    assert model["input"] == {
        "name": "image",
        "layout": "NHWC",
        "type": "uint8",
        "colour_order": "RGB",
        "range": [0, 255],
        "multiple": 32,
        "normalization": "inside the network",
    }
    values = [model[name] for name in ("size", "threshold", "threshold_byte", "fit")]
    assert values == [64, 0.5, 127.5, "stretch"]
    for name, said in model["files"].items():
        content = (exported.path / name).read_bytes()
        assert said["bytes"] == len(content)
        assert said["sha256"] == hashlib.sha256(content).hexdigest()
    golden = exported.golden().set_index("file")["largest difference"]
    assert golden["student.onnx"] <= 1
    assert golden["student.bin"] <= 1
    mask = np.asarray(Image.open(exported.path / "golden_mask.png"))
    assert mask.shape == (128, 160), "a picture that must be resized"
    assert mask.std() > 5, "a golden mask of one value would show nothing"


def test_every_file_is_compared_at_every_size(exported):
    table = exported.parity
    sizes = table.groupby("engine")["pixels"].unique().map(list).to_dict()
    assert sizes == {"ONNX Runtime": [64], "native": [64, 128]}
    exact = table[table["precision"] == "float32"]
    assert (exact["max_difference"] <= 1.01 / 255).all()
    assert set(exact["rule"]) == {"one step"}


@pytest.mark.parametrize(
    ("values", "error"),
    [
        ({"engines": "onnxx"}, "did you mean 'onnx'"),
        ({"sizes": "100"}, "sizes"),
    ],
)
@pytest.mark.fault
def test_wrong_options_are_refused(values, error):
    with pytest.raises(ConfigError, match=error):
        ExportConfig(**values)


@pytest.mark.fault
@pytest.mark.parametrize(("name", "format"), [("onnxscript", "onnx"), ("ziglang", "page")])
def test_a_missing_package_is_named_before_the_work(student, monkeypatch, name, format):
    monkeypatch.setattr(formats, "find_spec", lambda package: None if package == name else True)
    error = rf"format {format} .*needs the extra 'mobile'.* pip install -e '\.\[mobile\]'"
    with pytest.raises(LesionKDError, match=error):
        export_student(ExportConfig(formats=format), student)


def test_the_extra_mobile_is_what_the_formats_need():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = {package for kind in FORMATS.values() for package in kind.packages}
    listed = {name.partition("==")[0] for name in project["optional-dependencies"]["mobile"]}
    assert listed == needed


@pytest.mark.fault
def test_a_student_that_the_c_code_does_not_take_is_refused(student):
    narrow = fixed_run(UNet(width=3), width=3)
    with pytest.raises(LesionKDError, match="multiple of 4, up to 64; got 3. Leave native"):
        export_student(ExportConfig(formats="native"), narrow)
    with pytest.raises(
        LesionKDError, match="take a UNet for RGB and one class; got a ResNet34UNet"
    ):
        pack(Deployed(NETWORKS["resnet34_unet"]()), 64)


# Cost ---------------------------------------------------------------------------------------------


def multiplications(network: nn.Module, pixels: int) -> int:
    """Counted layer by layer from the shapes."""
    total = 0

    def count(layer, inputs, output):
        nonlocal total
        at = inputs[0] if isinstance(layer, nn.ConvTranspose2d) else output
        size = layer.kernel_size[0] * layer.kernel_size[1]
        total += at.shape[-2:].numel() * layer.in_channels * layer.out_channels * size

    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            layer.register_forward_hook(count)
    network.eval()(torch.zeros(1, 3, pixels, pixels))
    return total


@pytest.mark.parametrize("name", ["student", "resnet34_unet"])
def test_multiplications_are_exact(name):
    build = cost.NETWORKS[name]
    assert cost.macs(build(), 64) == multiplications(build(), 64)


def test_cost_is_measured_in_turns_and_relative_to_the_plain_student():
    threads = torch.get_num_threads()
    networks = ("student", "student, width 8")
    table = cost.measure_cost((32,), ("torch", "onnx"), networks, repeats=1)
    assert list(table) == cost.COLUMNS
    kinds = set(zip(table["engine"], table["precision"]))
    assert kinds >= {("PyTorch", "float32"), ("ONNX Runtime", "int8")}
    assert len(table) == 2 * len(kinds)
    plain = table[(table["model"] == "student") & (table["precision"] == "float32")]
    assert (plain["ratio_to_student"] == 1).all()
    assert torch.get_num_threads() == threads


def test_the_committed_cost_has_every_network():
    table = lkd.tables.committed("cost")
    assert set(table["model"]) == set(cost.NETWORKS)
    for name, build in cost.NETWORKS.items():
        row = table[(table["model"] == name) & (table["pixels"] == 128)].iloc[0]
        assert row["parameters"] == sum(p.numel() for p in build().parameters())
        assert row["macs"] == cost.macs(build(), 128)
