"""Exported students: the same function in every file, refused where not; what an app is told; what it costs."""

import http.server
import json
import pickle
import platform
import shutil
import tarfile
import threading
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch import nn

import lesionkd_core as lkd
from lesionkd_core import inference, store
from lesionkd_core.config import ConfigError, DistillConfig, ExportConfig, LesionKDError, TeacherConfig
from lesionkd_core.export import cost, page
from lesionkd_core.export.deploy import Deployed, fold_norms
from lesionkd_core.export.engines import executorch_engine, onnx_engine, torch_engine
from lesionkd_core.export.parity import ParityError, check_parity, parity
from lesionkd_core.export.to_coreml import write_coreml
from lesionkd_core.export.to_executorch import write_executorch
from lesionkd_core.export.to_onnx import write_half, write_int8, write_onnx
from lesionkd_core.figures.style import style
from lesionkd_core.networks import TEACHERS, UNet
from lesionkd_core.prepare import prepare_data


def quiet(*_):
    pass


def lively(network: nn.Module, seed: int = 0) -> nn.Module:
    """Norms as after a training: no statistic is 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for values, low, high in ((module.weight, 0.5, 1.5), (module.bias, -0.5, 0.5), (module.running_mean, -0.5, 0.5), (module.running_var, 0.5, 2)):
                values.data.uniform_(low, high, generator=generator)
    return network.eval()


def images(count, height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def data(trained):
    return prepare_data(inference.load_student(trained).cfg, quiet)


@pytest.fixture(scope="module")
def network(trained):
    return Deployed(inference.load_student(trained).network).eval()


@pytest.fixture(scope="module")
def exported(trained):
    return lkd.export_student(ExportConfig(run=str(trained.path), formats="onnx", calibration=16), quiet)


@pytest.mark.parametrize("make", [lambda: UNet(width=4), lambda: UNet(width=3, stem=2), TEACHERS["resnet34_unet"]])
def test_folding_the_norms_keeps_the_function_and_the_network(make):
    network, x = lively(make()), torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    folded = fold_norms(network)
    assert sum(isinstance(m, nn.BatchNorm2d) for m in folded.modules()) < sum(isinstance(m, nn.BatchNorm2d) for m in network.modules())
    torch.testing.assert_close(folded(x), network(x), rtol=1e-3, atol=1e-3)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_the_deployed_graph_gives_the_mask_image_of_step_s7(trained, data, network):
    student = inference.load_student(trained)
    expected = inference.probabilities(student.network, data.images[:8]) * 255
    found = torch_engine(network)(data.images[:8])
    assert found.dtype == np.uint8 and np.abs(found - expected).max() <= 0.51
    raw = Deployed(student.network, logits=True).eval()(torch.from_numpy(np.array(data.images[:8])))
    torch.testing.assert_close(255 * raw.sigmoid(), torch.from_numpy(expected), rtol=0, atol=0.05)


def test_onnx_takes_any_batch_and_size_in_multiples_of_32(network, tmp_path):
    write_onnx(network, tmp_path / "a.onnx")
    engine = onnx_engine(tmp_path / "a.onnx", "float32")
    for shape in ((1, 32, 32), (3, 64, 64), (2, 96, 160), (17, 64, 32), (1, 512, 384)):
        gap = np.abs(engine(images(*shape)).astype(int) - torch_engine(network)(images(*shape)))
        assert gap.max() <= 1, shape


def test_an_exported_file_names_no_place_of_the_machine_that_made_it(network, tmp_path):
    """Nor the dimensions of torch's graph, whose order is another one in each process: the same network, the same bytes."""
    write_onnx(network, tmp_path / "a.onnx")
    content = (tmp_path / "a.onnx").read_bytes()
    for word in (b".py", b"stack_trace", b"lesionkd", b"site-packages", b"pkg.torch", str(tmp_path).encode()):
        assert word not in content, word


def test_the_logits_flag_gives_raw_logits(trained, tmp_path):
    network = inference.load_student(trained).network
    write_onnx(Deployed(network, logits=True), tmp_path / "a.onnx")
    import onnxruntime

    x = images(1, 64, 64)
    [found] = onnxruntime.InferenceSession(str(tmp_path / "a.onnx")).run(["logits"], {"image": x})
    assert found.dtype == np.float32
    np.testing.assert_allclose(1 / (1 + np.exp(-found)), inference.probabilities(network, x), atol=1e-4)


def test_a_student_with_a_stem_is_exported_too(tmp_path):
    network = Deployed(lively(UNet(width=4, stem=4))).eval()
    write_onnx(network, tmp_path / "a.onnx")
    assert np.abs(onnx_engine(tmp_path / "a.onnx", "float32")(images(2, 64, 96)).astype(int) - torch_engine(network)(images(2, 64, 96))).max() <= 1


def test_half_precision_and_int8_pass_the_gate_and_are_smaller(network, data, tmp_path):
    write_onnx(network, tmp_path / "a.onnx")
    write_half(tmp_path / "a.onnx", tmp_path / "half.onnx")
    write_int8(tmp_path / "a.onnx", tmp_path / "int8.onnx", data.images[data.index("train")[:16]])
    rows = data.index("test")
    engines = [(onnx_engine(tmp_path / f"{name}.onnx", name), 64) for name in ("half", "int8")]
    table = parity(torch_engine(network), engines, data.images[rows], data.masks[rows])
    check_parity(table, 64)
    assert (table["max_difference"] > 0).all() and list(table["cases"]) == [len(rows)] * 2
    assert (tmp_path / "int8.onnx").stat().st_size < (tmp_path / "half.onnx").stat().st_size < (tmp_path / "a.onnx").stat().st_size


def test_executorch_runs_the_same_network_in_float_and_int8(network, data, tmp_path):
    rows = data.index("test")
    write_executorch(network, tmp_path / "a.pte", (64,))
    write_executorch(network, tmp_path / "int8.pte", (64,), {64: data.images[data.index("train")[:8]]})
    exact, rough = executorch_engine(tmp_path / "a.pte", "float32"), executorch_engine(tmp_path / "int8.pte", "int8")
    table = parity(torch_engine(network), [(exact, 64), (rough, 64)], data.images[rows], data.masks[rows])
    assert table["max_difference"][0] <= 1.01 / 255 and table["max_difference"][1] > 0
    check_parity(table, 64)
    with pytest.raises(LesionKDError, match="a.pte has forward_64; none takes 96 x 96 px"):
        exact(images(1, 96, 96))


def test_core_ml_is_converted_and_says_so(network, tmp_path):
    note = write_coreml(network, tmp_path / "student.mlpackage", 64)
    assert note == ("executed, not compared" if platform.system() == "Darwin" else "converted, not executed")
    import coremltools

    spec = coremltools.utils.load_spec(str(tmp_path / "student.mlpackage"))
    assert [(f.name, f.type.imageType.width, f.type.imageType.height) for f in (*spec.description.input, *spec.description.output)] == [
        ("image", 64, 64), ("mask", 64, 64)
    ]


def test_parity_counts_by_hand():
    """Two cases of 2 x 32 x 32 px; the other engine differs in 16 pixels of the first, on the other side of a half."""
    truth = np.zeros((2, 32, 32), bool)
    truth[:, :8] = True
    certain = np.where(truth, 255, 0).astype(np.uint8)
    moved = certain.copy()
    moved[0, 0, :16] = 51
    reference = torch_engine(lambda _: torch.from_numpy(certain))
    other = torch_engine(lambda _: torch.from_numpy(moved))
    object.__setattr__(other, "file", store.Path("other.onnx"))
    row = parity(reference, [(other, 32)], images(2, 32, 32), truth).iloc[0]
    assert row["max_difference"] == pytest.approx(204 / 255) and row["mean_difference"] == pytest.approx(16 * 0.8 / 2048)
    assert row["flipped"] == 16 / 2048 and row["dice_reference"] == 1
    assert row["dice"] == row["dice_to_reference"] == pytest.approx((2 * 240 / (240 + 256) + 1) / 2)


@pytest.mark.fault
@pytest.mark.parametrize(("dice", "flipped", "pixels", "passes"), [
    (0.7951, 0.0, 64, True), (0.7949, 0.0, 64, False), (0.7949, 0.0, 128, True), (0.9, 0.0099, 64, True), (0.9, 0.0101, 64, False), (0.9, 0.0101, 128, False),
])
def test_the_gate_refuses_what_lost_dice_or_flipped_pixels(dice, flipped, pixels, passes):
    row = {"file": "x.onnx", "engine": "E", "precision": "int8", "pixels": pixels, "dice": dice, "dice_reference": 0.8, "flipped": flipped}
    row |= {"max_difference": 0.3}
    if passes:
        check_parity(pd.DataFrame([row]), 64)
    else:
        with pytest.raises(ParityError, match=r"do not ship it:\nx.onnx \(E, int8"):
            check_parity(pd.DataFrame([row]), 64)


@pytest.mark.fault
@pytest.mark.parametrize(("steps", "passes"), [(1, True), (2, False)])
def test_in_float32_one_step_of_255_is_rounding_and_two_are_another_network(steps, passes):
    row = {"file": "x.onnx", "engine": "E", "precision": "float32", "pixels": 128, "dice": 0.8, "dice_reference": 0.8, "flipped": 0.0}
    row |= {"max_difference": steps / 255}
    if passes:
        check_parity(pd.DataFrame([row]), 64)
    else:
        with pytest.raises(ParityError, match="largest difference 0.008"):
            check_parity(pd.DataFrame([row]), 64)


@pytest.mark.fault
def test_an_export_of_another_model_fails_loudly_and_is_not_declared_finished(trained, monkeypatch):
    from lesionkd_core import export

    def wrong(network, path):
        write_onnx(Deployed(lively(UNet(width=4), seed=3)).eval(), path)

    monkeypatch.setattr(export, "write_onnx", wrong)
    cfg = ExportConfig(run=str(trained.path), formats="onnx", calibration=3)
    with pytest.raises(ParityError, match="student.onnx"):
        lkd.export_student(cfg, quiet)
    left = [p for p in (store.runs_root() / "export").iterdir() if p.is_dir() and store.read_json(p / "config.json")["calibration"] == 3]
    assert len(left) == 1 and not store.is_done(left[0]) and (left[0] / "parity.csv").exists()


def test_an_export_is_complete_and_found_again(trained, exported):
    names = {"student.onnx", "student-fp16.onnx", "student-int8.onnx", "model.json", "golden.png", "golden_mask.png", "model_card.md", "parity.csv", "DONE"}
    assert names <= {p.name for p in exported.path.iterdir()}
    before = (exported.path / "model.json").stat().st_mtime_ns
    again = lkd.export_student(ExportConfig(run=store.short(trained.path), formats="onnx", calibration=16), quiet)
    assert again.path == exported.path and (again.path / "model.json").stat().st_mtime_ns == before
    assert "student-int8.onnx" in repr(again)


def test_an_app_that_follows_model_json_gets_the_golden_mask(exported):
    model = exported.model
    told = {"name": "image", "layout": "NHWC", "type": "uint8", "colour_order": "RGB", "range": [0, 255], "multiple": 32}
    assert model["input"] == told | {"normalization": "inside the network"}
    assert (model["size"], model["threshold"], model["threshold_byte"], model["fit"]) == (64, 0.5, 127.5, "stretch")
    for name, said in model["files"].items():
        import hashlib

        content = (exported.path / name).read_bytes()
        assert said["bytes"] == len(content) and said["sha256"] == hashlib.sha256(content).hexdigest()
    golden = lkd.segment_golden(exported).set_index("file")
    assert golden.loc["student.onnx", "largest difference"] <= 1
    mask = np.asarray(Image.open(exported.path / "golden_mask.png"))
    assert mask.shape == (64, 64) and mask.std() > 5, "a golden mask that is all one value shows nothing"


def test_the_model_card_says_data_scores_limits_and_licence(trained, exported):
    card, dice = (exported.path / "model_card.md").read_text(), trained.summary["test"]["dice"]
    scored = f"{dice['mean']:.3f} (95 % interval {dice['low']:.3f} to {dice['high']:.3f})"
    for said in (scored, "lesions missed", "Not a medical device", "patent", "synthetic"):
        assert said in card


@pytest.mark.parametrize(("values", "error"), [
    ({"formats": "onnx, tflite"}, "formats names 'tflite'"), ({"engines": "onnxx"}, "did you mean 'onnx'"), ({"sizes": "100"}, "sizes"),
    ({"sizes": 31}, "sizes"), ({"threshold": 0.0}, "threshold"), ({"formats": ""}, "formats"), ({"rum": "x"}, "did you mean 'run'"),
])
@pytest.mark.fault
def test_wrong_parameters_are_refused(values, error):
    with pytest.raises(ConfigError, match=error):
        ExportConfig(**values)


@pytest.fixture
def copy(trained, tmp_path):
    return shutil.copytree(trained.path, tmp_path / "run")


@pytest.mark.fault
def test_what_is_no_finished_student_is_refused(copy, tmp_path):
    export = partial(lkd.export_student, tell=quiet)
    with pytest.raises(store.UnfinishedRun, match="it is not the folder of a run"):
        export(ExportConfig(run=str(tmp_path / "nowhere")))
    (copy / "DONE").unlink()
    with pytest.raises(store.UnfinishedRun, match="not finished"):
        export(ExportConfig(run=str(copy)))
    store.write_checkpoint(copy / "checkpoint_best", {"network": UNet(width=3).state_dict()})
    store.finish(copy)
    with pytest.raises(LesionKDError, match="weights of another network"):
        export(ExportConfig(run=str(copy)))
    store.begin(tmp_path / "teacher", TeacherConfig(), "upstream")
    store.finish(tmp_path / "teacher")
    store.write_checkpoint(tmp_path / "teacher" / "checkpoint_best", {"network": TEACHERS["resnet34_unet"]().state_dict()})
    with pytest.raises(LesionKDError, match="holds a teacher, not a student"):
        export(ExportConfig(run=str(tmp_path / "teacher")))


class Evil:
    """What a poisoned checkpoint would run."""

    def __reduce__(self):
        return (open, ("/nonexistent/executed", "w"))


@pytest.mark.fault
def test_code_in_a_checkpoint_is_not_run(copy):
    with open(copy / "checkpoint_best", "wb") as file:
        pickle.dump({"network": Evil()}, file)
    store.finish(copy)  # whoever sends a run sends its checksums, too
    with pytest.raises(LesionKDError, match="no checkpoint that can be trusted"):
        lkd.export_student(ExportConfig(run=str(copy)), quiet)


@pytest.mark.fault
@pytest.mark.parametrize("shape", [(1, 1, 1, 3), (1, 64, 64, 4), (1, 64, 64, 1), (64, 64, 3), (1, 50, 64, 3), (1, 0, 32, 3)])
def test_an_engine_says_what_it_takes(network, shape):
    with pytest.raises(LesionKDError, match=r"wants \(N, H, W, 3\) uint8 RGB, H and W multiples of 32"):
        torch_engine(network)(np.zeros(shape, np.uint8))


# --- cost


def multiplications(network: nn.Module, pixels: int) -> int:
    """Counted layer by layer from the shapes that go through."""
    total = 0

    def count(layer, inputs, output):
        nonlocal total
        n, c, h, w = output.shape
        at = inputs[0].shape[-2:].numel() if isinstance(layer, nn.ConvTranspose2d) else h * w
        total += at * layer.in_channels * layer.out_channels * layer.kernel_size[0] * layer.kernel_size[1]

    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            layer.register_forward_hook(count)
    network.eval()(torch.zeros(1, 3, pixels, pixels))
    return total


@pytest.mark.parametrize("name", ["student", "student, stem 2", "student, stem 4", "student, width 16", "resnet34_unet"])
def test_multiplications_are_exact(name):
    assert cost.macs(cost.NETWORKS[name](), 64) == multiplications(cost.NETWORKS[name](), 64)


def test_the_student_has_a_242nd_of_the_multiplications_of_unet64():
    assert cost.macs(UNet(width=64), 128) / cost.macs(UNet(width=4), 128) == pytest.approx(242.6, abs=0.5)


def test_cost_is_measured_in_turns_and_its_ratios_are_to_the_plain_student():
    threads = torch.get_num_threads()
    table = lkd.measure_cost((32, 64), ("torch", "onnx"), ("student", "student, stem 2"), repeats=2, tell=quiet)
    assert list(table) == cost.COLUMNS and len(table) == 2 * 2 * 3  # torch float, ONNX float and int8
    plain = table[(table["model"] == "student") & (table["precision"] == "float32")]
    assert (plain["ratio_to_student"] == 1).all()
    assert (table["latency_ms_p10"] <= table["latency_ms_median"]).all() and (table["latency_ms_median"] <= table["latency_ms_p90"]).all()
    for row in table.itertuples():
        base = plain[(plain["engine"] == row.engine) & (plain["pixels"] == row.pixels)]["latency_ms_median"].item()
        assert row.ratio_to_student == pytest.approx(row.latency_ms_median / base)
    assert torch.get_num_threads() == threads


def test_memory_of_a_fresh_process(exported):
    assert 0 < lkd.peak_memory(exported.path / "student.onnx", 64) < 500


def test_the_committed_cost_holds_every_network_and_engine():
    table = lkd.tables.committed("cost")
    assert list(table) == cost.COLUMNS and set(table["model"]) == set(cost.NETWORKS) and table["engine"].nunique() == 4
    for name, build in cost.NETWORKS.items():
        row = table[(table["model"] == name) & (table["pixels"] == 128)].iloc[0]
        assert row["parameters"] == sum(p.numel() for p in build().parameters()) and row["macs"] == cost.macs(build(), 128)
    memory = lkd.tables.committed("memory")
    assert set(memory["model"]) == set(cost.NETWORKS) and (memory["peak_mib"] > 0).all()


def test_the_faster_student_is_110_times_as_fast_as_unet64_in_two_engines():
    said = lkd.tables.speedups(lkd.tables.committed("cost")).splitlines()
    assert len(said) == 8
    fast = {line.partition(", ")[0] for line in said if float(line.partition(" x student, stem 2")[0].rpartition(" ")[2]) >= 110}
    assert len(fast) >= 2, said


def test_speedups_by_hand():
    table = pd.DataFrame({"model": ["student", "unet64", "student"], "engine": "E", "precision": ["float32", "float32", "int8"], "pixels": 64,
                          "latency_ms_median": [2.0, 100.0, 1.0]})
    assert lkd.tables.speedups(table) == "U-Net 64 in E, 64 px: 100 ms = 50 x student"


def test_cost_and_accuracy_are_drawn(tmp_path):
    table = lkd.tables.committed("cost")
    with style():
        fig = lkd.figures.latency(table)
        labels = [text.get_text() for text in fig.axes[0].get_yticklabels()]
    assert labels == ["student", "student, width 2", "student, width 8", "student, width 16", "student, stem 2", "student, stem 4", "U-Net 64", "ResNet34-UNet"]
    models = ["student", "unet64", "resnet34_unet"]
    points = pd.DataFrame({"dataset": "busi", "model": models, "dice": [0.6, 0.7, 0.65], "low": 0.5, "high": 0.8, "macs": [1e7, 1e10, 2e10]})
    fig = lkd.figures.pareto(points)
    front = fig.axes[0].lines[0]
    assert list(front.get_ydata()) == [0.6, 0.7], "a network that costs more and scores less is not on the front"
    assert lkd.figures.save(fig, "pareto", tmp_path).stat().st_size > 0


# --- the page's runtime


@pytest.fixture
def registry(tmp_path):
    """A local HTTP server with a package as npm's registry has it."""
    made = tmp_path / "served"
    (made / "package" / "dist").mkdir(parents=True)
    for part, name in page.PARTS.items():
        (made / "package" / "dist" / name).write_text(part)
    with tarfile.open(made / "runtime.tgz", "w:gz") as archive:
        archive.add(made / "package", "package")
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=made)
    handler.log_message = quiet
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/", made
        server.shutdown()


def test_the_runtime_is_fetched_checked_and_kept(registry, tmp_path):
    import hashlib

    address, made = registry
    checksum = "sha256:" + hashlib.sha256((made / "runtime.tgz").read_bytes()).hexdigest()
    found = page.fetch_runtime(tmp_path / "cache", address + "runtime.tgz", checksum)
    assert {part: file.read_text() for part, file in found.items()} == {part: part for part in page.PARTS}
    (made / "runtime.tgz").unlink()  # now without a connection
    assert page.fetch_runtime(tmp_path / "cache", address + "runtime.tgz", checksum) == found


@pytest.mark.fault
@pytest.mark.parametrize("wrong", ["checksum", "address"])
def test_a_runtime_that_is_another_or_absent_is_refused(registry, tmp_path, wrong):
    address, _ = registry
    with pytest.raises(LesionKDError, match="make runtime"):
        page.fetch_runtime(tmp_path / "cache", address + ("runtime.tgz" if wrong == "checksum" else "absent.tgz"))


@pytest.mark.fault
def test_a_page_is_refused_for_a_look_that_it_does_not_compute(trained, tmp_path):
    student = inference.load_student(trained)
    other = inference.TrainedNetwork(student.network, student.cfg.with_values(clahe=0.02), student.path)
    with pytest.raises(LesionKDError, match=r"clahe = 0.02, which the phone page does not compute"):
        page.write_page(other, tmp_path / "student.onnx", tmp_path / "segment.html", [])


def test_the_stem_changes_the_hash_only_where_there_is_one():
    plain = DistillConfig(terms="")
    assert "stem" not in plain.hashed() and plain.with_values(stem=2).hashed()["stem"] == 2
    assert json.dumps(plain.hashed()) == json.dumps(DistillConfig(terms="", stem=1).hashed())


def test_a_network_with_a_stem_keeps_the_size_of_its_input():
    for stem in (2, 4):
        logits, maps = UNet(width=4, stem=stem).eval().forward_features(torch.zeros(1, 3, 70, 90))
        assert logits.shape == (1, 1, 70, 90) and f"decoder.stride{stem}" in maps and f"decoder.stride{stem // 2}" not in maps
