"""Teacher, reference teacher and student: sizes, names, feature maps."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lesionkd_core.config import LesionKDError
from lesionkd_core.networks import ResNet34UNet, UNet, match_levels, stride_of


def count(module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    ("build", "parameters"),
    [(lambda: UNet(width=4), 58_629), (lambda: UNet(width=64), 14_788_929), (ResNet34UNet, 24_429_281), (lambda: ResNet34UNet().encoder, 21_284_672)],
)
def test_parameter_counts_are_the_published_ones(build, parameters):
    assert count(build()) == parameters


def test_encoder_has_torchvisions_names():
    names = set(ResNet34UNet().encoder.state_dict())
    some = {"conv1.weight", "bn1.running_var", "layer1.0.conv1.weight", "layer2.0.downsample.0.weight", "layer2.0.downsample.1.bias"}
    assert some <= names and "layer4.2.bn2.weight" in names
    assert len(names) == 216  # torchvision's resnet34 has 218 entries, two of them the classifier's
    assert "layer1.0.downsample.0.weight" not in names


@pytest.mark.parametrize("network", [UNet(width=4), ResNet34UNet()], ids=["student", "teacher"])
@pytest.mark.parametrize("size", [(32, 32), (33, 47), (64, 96), (101, 65)])
def test_any_size_from_32_px_gives_logits_of_that_size(network, size):
    with torch.no_grad():
        assert network.eval()(torch.zeros(1, 3, *size)).shape == (1, 1, *size)


@pytest.mark.parametrize("size", [(31, 64), (64, 16)])
def test_a_smaller_image_is_refused_with_the_smallest_size(size):
    with pytest.raises(LesionKDError, match="at least 32"):
        UNet(width=2)(torch.zeros(1, 3, *size))


@pytest.mark.parametrize("network", [UNet(width=4), ResNet34UNet()], ids=["student", "teacher"])
def test_maps_have_the_stride_and_channels_of_their_name(network):
    with torch.no_grad():
        logits, maps = network.eval().forward_features(torch.rand(2, 3, 64, 96))
        torch.testing.assert_close(network(torch.rand(2, 3, 64, 96)).shape, logits.shape)
    assert list(maps) == list(network.feature_norms())
    for name, x in maps.items():
        assert x.shape == (2, network.feature_norms()[name].num_features, 64 // stride_of(name), 96 // stride_of(name))


def test_maps_are_taken_before_the_relu():
    torch.manual_seed(0)
    for network in (UNet(width=4), ResNet34UNet()):
        maps = network.train().forward_features(torch.rand(2, 3, 64, 64))[1]
        assert all(x.min() < 0 for x in maps.values())


def test_student_logits_come_from_the_last_maps_relu():
    network = UNet(width=4).eval()
    logits, maps = network.forward_features(torch.rand(1, 3, 32, 32))
    torch.testing.assert_close(network.head(F.relu(maps["decoder.stride1"])), logits)


def test_residual_map_is_the_sum_and_its_norm_the_last_of_the_stage():
    network = ResNet34UNet().eval()
    caught = {}
    last = network.encoder.layer1[-1]
    last.bn2.register_forward_hook(lambda m, i, out: caught.update(bn=out.clone()))
    last.register_forward_hook(lambda m, i, out: caught.update(into=i[0]))
    maps = network.forward_features(torch.rand(1, 3, 64, 64))[1]
    torch.testing.assert_close(maps["encoder.stride4"], caught["bn"] + caught["into"])
    assert network.feature_norms()["encoder.stride4"] is last.bn2


def test_levels_pair_by_name_or_by_colon():
    student, teacher = UNet(width=2), ResNet34UNet()
    assert match_levels(student, teacher, ("decoder.stride8", "encoder.stride4:decoder.stride4")) == [
        ("decoder.stride8", "decoder.stride8"), ("encoder.stride4", "decoder.stride4"),
    ]


@pytest.mark.parametrize(
    ("level", "words"),
    [("decoder.stride1", ["teacher has no map 'decoder.stride1'"]), ("decoder.strid8", ["did you mean 'decoder.stride8'"]),
     ("encoder.stride2:encoder.stride4", ["(4, H/2, W/2)", "(64, H/4, W/4)"])],
)
def test_levels_that_do_not_fit_are_refused_with_both_shapes(level, words):
    with pytest.raises(LesionKDError) as error:
        match_levels(UNet(width=2), ResNet34UNet(), (level,))
    assert all(word in str(error.value) for word in words)


def test_student_pads_as_its_authors_do():
    """An odd size is rounded down by the pool; zeros fill the upsampled map, the smaller half first."""
    from lesionkd_core.networks import _pad_to

    padded = _pad_to(torch.ones(1, 1, 2, 4), torch.zeros(1, 1, 3, 5))
    np.testing.assert_array_equal(padded[0, 0].numpy(), [[1, 1, 1, 1, 0]] * 2 + [[0] * 5])
