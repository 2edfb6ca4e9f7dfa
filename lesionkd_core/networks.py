"""Teacher, reference teacher and student, with their feature maps by name (METHOD, Networks).

A map is named by where it lies and its stride, such as `encoder.stride4` or `decoder.stride8`, and is
taken before its block's last ReLU. `feature_norms()` gives the BatchNorm that produced each map.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import LesionKDError, nearest
from .layers import BatchNorm2d

M = TypeVar("M", bound=nn.Module)
SMALLEST = 32
"""Smallest side of an image, px: the teacher's deepest map is one pixel there."""


def stride_of(name: str) -> int:
    """`decoder.stride8` -> 8."""
    return int(name.rpartition("stride")[2])


def _check_size(x: Tensor) -> None:
    if x.ndim != 4 or min(x.shape[-2:]) < SMALLEST:
        raise LesionKDError(f"a network got images of shape {tuple(x.shape)}; wants (N, C, H, W), H and W at least {SMALLEST} px")


def _two_convolutions(inputs: int, outputs: int, bias: bool, stem: int = 1) -> nn.Sequential:
    """3x3 convolution (over blocks of stem x stem px), BN, ReLU, 3x3 convolution, BN: the last ReLU is left to the caller."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3 * stem, stem, padding=stem, bias=bias), BatchNorm2d(outputs), nn.ReLU(inplace=True),
        nn.Conv2d(outputs, outputs, 3, padding=1, bias=bias), BatchNorm2d(outputs),
    )


class Network(nn.Module):
    """What teacher and student have in common: logits, and the feature maps on the way to them by name."""

    def feature_norms(self) -> dict[str, nn.BatchNorm2d]:
        """{map: the BatchNorm that gives it}."""
        raise NotImplementedError

    def forward_features(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits (N, out, H, W) and all maps before their last ReLU, {name: (N, C, H/stride, W/stride)}."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """(N, in, H, W) -> logits (N, out, H, W), any size from 32 px up."""
        return self.forward_features(x)[0]


class UNet(Network):
    """U-Net of width c: the student (c = 4) and the paper's reference teacher (c = 64).

    Encoder blocks of c, 2c, 4c, 8c, 8c channels at strides 1 to 16, decoder blocks of 4c, 2c, c, c
    at strides 8 to 1, transposed 2x2 convolutions on the way up, a 1x1 head.

    With `stem` 2 or 4, which is not the paper's, levels of smaller stride are left out: the first
    convolution reads blocks of stem x stem px (space-to-depth and 3x3 in one), the head writes such
    blocks (1x1 and depth-to-space in one), and the last decoder block is as wide as the first encoder block.

    Source: METHOD, Student; TinyUnet (2022).
    """

    def __init__(self, in_channels: int = 3, out_channels: int = 1, width: int = 64, stem: int = 1) -> None:
        super().__init__()
        self.strides = [stride for stride in (1, 2, 4, 8, 16) if stride >= stem]
        down = [width * min(stride, 8) for stride in self.strides]
        up = [width * max(stride // 2, 1) for stride in self.strides[-2::-1]]
        up[-1] = down[0]
        self.encoder = nn.ModuleList(
            _two_convolutions(i, o, True, stem if level == 0 else 1) for level, (i, o) in enumerate(zip([in_channels, *down], down))
        )
        below = [down[-1], *up]
        self.upsample = nn.ModuleList(nn.ConvTranspose2d(c, c, 2, stride=2) for c in below[:-1])
        self.decoder = nn.ModuleList(
            _two_convolutions(b + s, o, bias=True) for b, s, o in zip(below, down[-2::-1], up)
        )
        self.head = nn.ConvTranspose2d(up[-1], out_channels, stem, stride=stem) if stem > 1 else nn.Conv2d(up[-1], out_channels, 1)

    def feature_norms(self) -> dict[str, nn.BatchNorm2d]:
        """{map: the BatchNorm that gives it}."""
        names = [f"encoder.stride{s}" for s in self.strides] + [f"decoder.stride{s}" for s in self.strides[-2::-1]]
        return dict(zip(names, [block[-1] for block in (*self.encoder, *self.decoder)]))

    def forward_features(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits (N, out, H, W) and all maps before their last ReLU, {name: (N, C, H/stride, W/stride)}."""
        _check_size(x)
        image = x
        maps: dict[str, Tensor] = {}
        skips: list[Tensor] = []
        for stride, block in zip(self.strides, self.encoder):
            if skips:
                x = F.max_pool2d(x, 2, 2)  # the stride said, since converters to phones want it
            maps[f"encoder.stride{stride}"] = x = block(x)
            skips.append(x := F.relu(x))
        for stride, skip, up, block in zip(self.strides[-2::-1], skips[-2::-1], self.upsample, self.decoder):
            x = block(torch.cat([skip, _pad_to(up(x), skip)], dim=1))
            maps[f"decoder.stride{stride}"] = x
            x = F.relu(x)
        return _pad_to(self.head(x), image), maps


def _pad_to(x: Tensor, like: Tensor) -> Tensor:
    """Zeros around an upsampled map where an odd size was rounded down."""
    rows, columns = like.shape[-2] - x.shape[-2], like.shape[-1] - x.shape[-1]
    return F.pad(x, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2)) if rows or columns else x


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside the identity; gives the sum before its ReLU."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = BatchNorm2d(outputs)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W) -> (N, outputs, H/stride, W/stride), pre-ReLU."""
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out: Tensor = self.bn2(self.conv2(y)) + self.downsample(x)
        return out


class ResNet34Encoder(nn.Module):
    """ResNet-34 without its classifier; names as torchvision's `resnet34`, whose weight file loads."""

    def __init__(self, in_channels: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 64, 7, 2, 3, bias=False)
        self.bn1 = BatchNorm2d(64)
        channels = [64, 64, 128, 256, 512]
        for stage, blocks in enumerate((3, 4, 6, 3), start=1):
            first = BasicBlock(channels[stage - 1], channels[stage], stride=1 if stage == 1 else 2)
            rest = [BasicBlock(channels[stage], channels[stage], stride=1) for _ in range(blocks - 1)]
            setattr(self, f"layer{stage}", nn.Sequential(first, *rest))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """The stem at stride 2 and the four stages at strides 4 to 32, each before its last ReLU."""
        maps = {"encoder.stride2": self.bn1(self.conv1(x))}
        x = F.max_pool2d(F.relu(maps["encoder.stride2"]), 3, 2, 1)
        for stage, stride in enumerate((4, 8, 16, 32), start=1):
            for i, block in enumerate(getattr(self, f"layer{stage}")):
                x = block(F.relu(x) if i else x)
            maps[f"encoder.stride{stride}"] = x
            x = F.relu(x)
        return maps


class ResNet34UNet(Network):
    """The teacher (step S1): ResNet-34 encoder, four decoder blocks, the patent's maps F1 to F9.

    Decoder blocks of 256, 128, 64, 32 channels at strides 16, 8, 4, 2, each after a bilinear 2x
    upsample and the skip one stride up; a 1x1 head, upsampled 2x to full size.

    Source: METHOD, Teacher; patent step S1.
    """

    STRIDES = (16, 8, 4, 2)

    def __init__(self, in_channels: int = 3, out_channels: int = 1) -> None:
        super().__init__()
        self.encoder = ResNet34Encoder(in_channels)
        self.decoder = nn.ModuleList(
            _two_convolutions(b + s, o, bias=False)
            for b, s, o in zip((512, 256, 128, 64), (256, 128, 64, 64), (256, 128, 64, 32))
        )
        self.head = nn.Conv2d(32, out_channels, 1)

    def feature_norms(self) -> dict[str, nn.BatchNorm2d]:
        """{map: the BatchNorm that gives it}; of a residual stage, the last block's second one."""
        norms = {"encoder.stride2": self.encoder.bn1}
        for stage, stride in enumerate((4, 8, 16, 32), start=1):
            norms[f"encoder.stride{stride}"] = getattr(self.encoder, f"layer{stage}")[-1].bn2
        blocks: Any = self.decoder  # nn.ModuleList forgets of which class they are
        return norms | {f"decoder.stride{s}": block[-1] for s, block in zip(self.STRIDES, blocks)}

    def forward_features(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits (N, out, H, W) and all maps before their last ReLU, {name: (N, C, H/stride, W/stride)}."""
        _check_size(x)
        size = x.shape[-2:]
        maps = self.encoder(x)
        x = F.relu(maps["encoder.stride32"])
        for stride, block in zip(self.STRIDES, self.decoder):
            skip = F.relu(maps[f"encoder.stride{stride}"])
            x = block(torch.cat([_upsample_to(x, skip.shape[-2:]), skip], dim=1))
            maps[f"decoder.stride{stride}"] = x
            x = F.relu(x)
        return _upsample_to(self.head(x), size), maps


def _upsample_to(x: Tensor, size: torch.Size) -> Tensor:
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


def use_statistics(network: M, statistics: str) -> M:
    """Let a frozen network's BatchNorms go by their running statistics ('eval') or by the batch's ('batch'); their buffers never change."""
    network.eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d) and statistics == "batch":
            module.train()
            module.track_running_stats = False  # torch then reads and writes no running buffer
    return network


def settle(module: M, device: torch.device) -> M:
    """Bring a module to where batches are, channels last in memory as they are."""
    return module.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]  # torch leaves it out of its overloads


TEACHERS: dict[str, type[Network]] = {"resnet34_unet": ResNet34UNet, "unet64": UNet}


def match_levels(student: Network, teacher: Network, levels: tuple[str, ...]) -> list[tuple[str, str]]:
    """`('a', 'b:c')` -> [('a', 'a'), ('b', 'c')]: student's and teacher's map of every level.

    >>> match_levels(UNet(width=4), UNet(width=8), ("decoder.stride4", "encoder.stride2:decoder.stride2"))
    [('decoder.stride4', 'decoder.stride4'), ('encoder.stride2', 'decoder.stride2')]

    Raises
    ------
    LesionKDError
        An unknown map, or a pair of unequal strides; names both shapes.
    """
    pairs = []
    for level in levels:
        ours, colon, theirs = level.partition(":")
        names = ours, theirs if colon else ours
        norms = [student.feature_norms(), teacher.feature_norms()]
        for who, name, known in zip(("student", "teacher"), names, norms):
            if name not in known:
                raise LesionKDError(f"feature level {level!r}: the {who} has no map {name!r}; {nearest(name, known)}")
        strides = [stride_of(name) for name in names]
        if strides[0] != strides[1]:
            shapes = [f"({norm[name].num_features}, H/{s}, W/{s})" for norm, name, s in zip(norms, names, strides)]
            raise LesionKDError(f"feature level {level!r}: the student's map is {shapes[0]}, the teacher's {shapes[1]}; choose maps of equal stride")
        pairs.append(names)
    return pairs
