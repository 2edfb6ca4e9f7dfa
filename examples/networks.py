"""Three published tiny networks as students, written from their papers.

    lesionkd distill -p student examples.networks:ege_unet

in the folder that holds `examples`. They have their published sizes, so the option `width` does not
change them. EGE-UNet needs `precision` 32-true: with bf16-mixed its loss becomes NaN. One
segmentation loss trains the last logits; the papers' deep supervision is left out.
Feature maps are named by part and stride and taken before their activation, as in
`lesionkd_core.models`, so that `levels` and the loss terms find them.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lesionkd_core.models import Network


class TinyNetwork(Network):
    """Names the channels of its maps instead of a BatchNorm for each."""

    encoder_channels: dict[int, int]
    decoder_channels: dict[int, int]

    def feature_norms(self) -> dict[str, nn.BatchNorm2d]:
        """None: a student needs no margins."""
        return {}

    def feature_channels(self) -> dict[str, int]:
        """Channels of each map, by part and stride."""
        encoder = {f"encoder.stride{s}": c for s, c in self.encoder_channels.items()}
        return encoder | {f"decoder.stride{s}": c for s, c in self.decoder_channels.items()}


def resize(x: Tensor, like: Tensor) -> Tensor:
    """Bilinear, to the height and width of another map."""
    return F.interpolate(x, like.shape[-2:], mode="bilinear", align_corners=False)


# SimpleUNet ---------------------------------------------------------------------------------------


class SimpleUNet(TinyNetwork):
    """U-Net of equal width at all strides, whose skip connections keep half of the channels.

    A block is one 3x3 convolution, BatchNorm and ReLU. A skip passes a 1x1 convolution to half of
    the channels; it and the deeper map are weighted channel by channel before the concatenation.
    The authors' head ends with a BatchNorm and a ReLU, which logits must not have: here it is a 1x1
    convolution.

    Source: Yu et al. 2025, "Simple is what you need for efficient and accurate medical image
    segmentation".
    """

    STRIDES = (1, 2, 4, 8, 16)

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        half = width // 2
        self.encoder_channels = dict.fromkeys(self.STRIDES, width)
        self.decoder_channels = dict.fromkeys((8, 4, 2, 1), half)
        inputs = (3, width, width, width, width)
        self.encoder = nn.ModuleList(_conv_bn(i, width, 3) for i in inputs)
        self.bottleneck = _conv_bn(width, half, 3)
        self.select = nn.ModuleList(_conv_bn(width, half, 1) for _ in range(4))
        self.decoder = nn.ModuleList(_conv_bn(width, half, 3) for _ in range(4))
        self.skip_weights = nn.ParameterList(torch.ones(half, 1, 1) for _ in range(4))
        self.deep_weights = nn.ParameterList(torch.ones(half, 1, 1) for _ in range(4))
        self.head = nn.Conv2d(half, 1, 1)

    def forward_features(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """(N, 3, H, W) -> logits (N, 1, H, W) and maps."""
        maps, skips = {}, []
        for stride, block in zip(self.STRIDES, self.encoder):
            if stride > 1:
                x = F.max_pool2d(x, 2, 2)
            maps[f"encoder.stride{stride}"] = x = block(x)
            skips.append(x := F.relu(x))
        x = F.relu(self.bottleneck(x))
        for i, stride in enumerate((8, 4, 2, 1)):
            skip = F.relu(self.select[i](skips[3 - i])) * self.skip_weights[i]
            deep = resize(x * self.deep_weights[i], skip)
            maps[f"decoder.stride{stride}"] = x = self.decoder[i](torch.cat([skip, deep], 1))
            x = F.relu(x)
        return self.head(x), maps


def _conv_bn(inputs: int, outputs: int, kernel: int, groups: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, groups=groups, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs))


# MK-UNet ------------------------------------------------------------------------------------------


class MKUNet(TinyNetwork):
    """U-Net of multi-kernel inverted residuals, with attention in the decoder and gated skips.

    All decoder stages share one spatial attention, as in the authors' code.

    Source: Rahman & Marculescu 2025, "MK-UNet: Multi-kernel Lightweight CNN for Medical Image
    Segmentation"; the tiny variant has 4, 8, 16, 24, 32 channels.
    """

    STRIDES = (1, 2, 4, 8, 16)

    def __init__(self, channels: tuple[int, ...] = (4, 8, 16, 24, 32)) -> None:
        super().__init__()
        up = (*channels[-2::-1], channels[0])
        self.encoder_channels = dict(zip(self.STRIDES, channels))
        self.decoder_channels = dict(zip((16, 8, 4, 2, 1), up))
        self.encoder = nn.ModuleList(MKIR(i, o) for i, o in zip((3, *channels), channels))
        self.channel_attention = nn.ModuleList(
            ChannelAttention(c, ratio) for c, ratio in zip(channels[::-1], (16, 16, 16, 8, 4))
        )
        self.spatial_attention = nn.Conv2d(2, 1, 7, padding=3, bias=False)
        self.decoder = nn.ModuleList(MKIR(i, o) for i, o in zip(channels[::-1], up))
        self.gates = nn.ModuleList(GroupedGate(c) for c in up[:-1])
        self.head = nn.Conv2d(channels[0], 1, 1)

    def forward_features(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """(N, 3, H, W) -> logits (N, 1, H, W) and maps."""
        image, maps, skips = x, {}, []
        for stride, block in zip(self.STRIDES, self.encoder):
            maps[f"encoder.stride{stride}"] = x = block(x)
            skips.append(x := F.max_pool2d(x, 2, 2))
        for i, stride in enumerate((16, 8, 4, 2, 1)):
            skip = skips[3 - i] if i < 4 else image
            x = x * self.channel_attention[i](x)
            spread = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
            x = x * self.spatial_attention(spread).sigmoid()
            maps[f"decoder.stride{stride}"] = x = resize(self.decoder[i](x), skip)
            x = F.relu(x)
            if i < 4:
                x = x + self.gates[i](x, skip)
        return self.head(x), maps


class MKIR(nn.Module):
    """Multi-kernel inverted residual: 1x1 expansion, depthwise 1x1 + 3x3 + 5x5, 1x1 projection."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        width = 2 * inputs
        self.groups = math.gcd(width, outputs)
        self.expand = _conv_bn(inputs, width, 1)
        self.depthwise = nn.ModuleList(_conv_bn(width, width, k, groups=width) for k in (1, 3, 5))
        self.project = _conv_bn(width, outputs, 1)
        self.residual: nn.Module = nn.Identity()
        if inputs != outputs:
            self.residual = nn.Conv2d(inputs, outputs, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W) -> (N, outputs, H, W)."""
        wide = F.relu6(self.expand(x))
        mixed = torch.stack([F.relu6(branch(wide)) for branch in self.depthwise]).sum(0)
        out: Tensor = self.residual(x) + self.project(F.channel_shuffle(mixed, self.groups))
        return out


class ChannelAttention(nn.Module):
    """Weights of channels from their mean and their maximum, through one small network."""

    def __init__(self, channels: int, ratio: int) -> None:
        super().__init__()
        hidden = max(channels // ratio, 1)
        self.shrink = nn.Conv2d(channels, hidden, 1, bias=False)
        self.grow = nn.Conv2d(hidden, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, 1, 1), 0..1."""
        both = (x.mean((2, 3), keepdim=True), x.amax((2, 3), keepdim=True))
        mean, peak = (self.grow(F.relu(self.shrink(y))) for y in both)
        out: Tensor = (mean + peak).sigmoid()
        return out


class GroupedGate(nn.Module):
    """Grouped attention gate: how much of each pixel of a skip connection passes."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.of_signal, self.of_skip = (
            nn.Sequential(
                nn.Conv2d(channels, half, 3, padding=1, groups=half), nn.BatchNorm2d(half)
            )
            for _ in range(2)
        )
        self.weigh = nn.Sequential(nn.Conv2d(half, 1, 1), nn.BatchNorm2d(1), nn.Sigmoid())

    def forward(self, signal: Tensor, skip: Tensor) -> Tensor:
        """Two maps (N, C, H, W) -> the weighted skip."""
        out: Tensor = skip * self.weigh(F.relu6(self.of_signal(signal) + self.of_skip(skip)))
        return out


# EGE-UNet -----------------------------------------------------------------------------------------


class EGEUNet(TinyNetwork):
    """Group-enhanced U-Net: products with learned maps in the deep stages, grouped skip bridges.

    Source: Ruan et al. 2023, "EGE-UNet: an Efficient Group Enhanced UNet for skin lesion
    segmentation".
    """

    CHANNELS = (8, 16, 24, 32, 48, 64)
    STRIDES = (2, 4, 8, 16, 32)

    def __init__(self) -> None:
        super().__init__()
        c = self.CHANNELS
        self.encoder_channels = dict(zip(self.STRIDES, c))
        self.decoder_channels = dict(zip(self.STRIDES[::-1], c[-2::-1]))
        plain = [nn.Conv2d(i, o, 3, padding=1) for i, o in ((3, c[0]), (c[0], c[1]), (c[1], c[2]))]
        products = [HadamardAttention(i, o) for i, o in zip(c[2:], c[3:])]
        self.encoder = nn.ModuleList([*plain, *products])
        self.encoder_norms = nn.ModuleList(nn.GroupNorm(4, channels) for channels in c[:-1])
        deep = [HadamardAttention(i, o) for i, o in zip(c[:1:-1], c[-2:1:-1])]
        shallow = [nn.Conv2d(c[2], c[1], 3, padding=1), nn.Conv2d(c[1], c[0], 3, padding=1)]
        self.decoder = nn.ModuleList([*deep, *shallow])
        self.decoder_norms = nn.ModuleList(nn.GroupNorm(4, channels) for channels in c[-2::-1])
        self.masks = nn.ModuleList(nn.Conv2d(channels, 1, 1) for channels in c[-2::-1])
        self.bridges = nn.ModuleList(
            AggregationBridge(high, low) for high, low in zip(c[:0:-1], c[-2::-1])
        )
        self.head = nn.Conv2d(c[0], 1, 1)

    def forward_features(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """(N, 3, H, W) -> logits (N, 1, H, W) and maps."""
        image, maps, skips = x, {}, []
        for stride, block, norm in zip(self.STRIDES, self.encoder, self.encoder_norms):
            maps[f"encoder.stride{stride}"] = x = F.max_pool2d(norm(block(x)), 2, 2)
            skips.append(x := F.gelu(x))
        x = bridged = F.gelu(self.encoder[-1](x))
        for i, stride in enumerate(self.STRIDES[::-1]):
            skip = skips[4 - i]
            x = resize(self.decoder_norms[i](self.decoder[i](x)), skip)
            maps[f"decoder.stride{stride}"] = x
            x = F.gelu(x)
            bridged = self.bridges[i](bridged, skip, self.masks[i](x))
            x = x + bridged
        return resize(self.head(x), image), maps


class HadamardAttention(nn.Module):
    """GHPA: a quarter of the channels each is multiplied by a learned map over (H, W), (C, H),
    (C, W), or convolved."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        c = inputs // 4
        self.norm, self.mixed_norm = ChannelNorm(inputs), ChannelNorm(inputs)
        self.plane = nn.Parameter(torch.ones(1, c, 8, 8))
        self.rows = nn.Parameter(torch.ones(1, c, 8))
        self.columns = nn.Parameter(torch.ones(1, c, 8))
        self.of_plane = nn.Sequential(
            nn.Conv2d(c, c, 3, padding=1, groups=c), nn.GELU(), nn.Conv2d(c, c, 1)
        )
        self.of_rows, self.of_columns = (
            nn.Sequential(nn.Conv1d(c, c, 3, padding=1, groups=c), nn.GELU(), nn.Conv1d(c, c, 1))
            for _ in range(2)
        )
        self.local = nn.Sequential(
            nn.Conv2d(c, c, 1), nn.GELU(), nn.Conv2d(c, c, 3, padding=1, groups=c)
        )
        self.mix = nn.Sequential(
            nn.Conv2d(inputs, inputs, 3, padding=1, groups=inputs),
            nn.GELU(),
            nn.Conv2d(inputs, outputs, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W) -> (N, outputs, H, W)."""
        a, b, c, d = self.norm(x).chunk(4, dim=1)
        height, width = x.shape[-2:]
        rows = F.interpolate(self.rows, height, mode="linear", align_corners=True)
        columns = F.interpolate(self.columns, width, mode="linear", align_corners=True)
        plane = F.interpolate(self.plane, (height, width), mode="bilinear", align_corners=True)
        a = a * self.of_plane(plane)
        b = b * self.of_rows(rows).unsqueeze(3)
        c = c * self.of_columns(columns).unsqueeze(2)
        out: Tensor = self.mix(self.mixed_norm(torch.cat([a, b, c, self.local(d)], 1)))
        return out


class AggregationBridge(nn.Module):
    """GAB: joins a skip connection, the deeper bridge and the stage's mask, in four groups of
    channels with dilated convolutions."""

    def __init__(self, high: int, low: int) -> None:
        super().__init__()
        self.project = nn.Conv2d(high, low, 1)
        group = low // 2 + 1
        self.groups = nn.ModuleList(
            nn.Sequential(
                ChannelNorm(group),
                nn.Conv2d(group, group, 3, padding=rate, dilation=rate, groups=group),
            )
            for rate in (1, 2, 5, 7)
        )
        self.join = nn.Sequential(ChannelNorm(4 * group), nn.Conv2d(4 * group, low, 1))

    def forward(self, high: Tensor, low: Tensor, mask: Tensor) -> Tensor:
        """Maps (N, high, ..) and (N, low, H, W), logits (N, 1, H, W) -> (N, low, H, W)."""
        parts = zip(resize(self.project(high), low).chunk(4, 1), low.chunk(4, 1), self.groups)
        joined = [group(torch.cat([h, part, mask], 1)) for h, part, group in parts]
        out: Tensor = self.join(torch.cat(joined, 1))
        return out


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of each pixel."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> the same shape."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


# For the option `student` -------------------------------------------------------------------------


def ege_unet(width: int = 0) -> EGEUNet:
    """EGE-UNet in its published size; `width` has no effect."""
    return EGEUNet()


def mk_unet_t(width: int = 0) -> MKUNet:
    """MK-UNet-T, the tiny variant; `width` has no effect."""
    return MKUNet()


def simple_unet16(width: int = 0) -> SimpleUNet:
    """SimpleUNet of width 16; `width` has no effect."""
    return SimpleUNet()
