"""The student in bytes, for processors with dot products of bytes: ranges, scales and weights.

A map without negative values is stored as 0..255, one with them (after an upsampling) around 128.
Channels of a map have scales, which are part of the weights of the next layer; the weights of each
output channel have one. Source: Jacob et al. 2018, https://arxiv.org/abs/1712.05877.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...models import UNet
from ..parity import Deployed

BALANCE = 0.75
"""0: a map has one scale; 1: each of its channels has its own, and the weights carry the rest."""


@dataclass(frozen=True)
class Map:
    """What the bytes q of a map's channels mean: value = scale * (q - zero), both (C,)."""

    scale: np.ndarray
    zero: np.ndarray

    @classmethod
    def of(cls, values: Tensor, zero: int = 0) -> Map:
        """Scales that hold all values (N, C, H, W), finer where a channel has smaller ones."""
        largest = values.abs().amax((0, 2, 3)).double().clamp(min=1e-6).numpy()
        own = np.maximum(largest, largest.max() * 1e-3)
        balanced = own**BALANCE * largest.max() ** (1 - BALANCE)
        return cls(balanced / (127 if zero else 255), np.full(len(own), zero))

    def __add__(self, other: Map) -> Map:
        """The channels of both."""
        return Map(np.append(self.scale, other.scale), np.append(self.zero, other.zero))


def quantized(network: Deployed, images: np.ndarray) -> np.ndarray:
    """The weights of a folded U-Net as segment.c reads them with LESION_INT8.

    Parameters
    ----------
    images : (N, S, S, 3) uint8
        Training images; the values that occur on them set the scales.

    Returns
    -------
    (words,) uint32
        For 4 outputs of each layer: biases for unsigned bytes, biases for signed ones, scales
        (float32), then for each 4 input channels and tap a word of 4 weights for each output. At
        last the head in float32.
    """
    unet = cast(UNet, network.network)
    mean, scale = network.mean.flatten().numpy(), network.scale.flatten().numpy()
    x = (torch.from_numpy(images).permute(0, 3, 1, 2) - network.mean) * network.scale
    bytes_ = Map(scale.astype(np.float64), np.floor(mean + 0.5))
    rounding = scale * (bytes_.zero - mean)
    parts: list[np.ndarray] = []

    def block(layers: nn.Module, x: Tensor, into: Map, last: bool = False) -> tuple[Tensor, Map]:
        first, second = [m for m in layers.modules() if isinstance(m, nn.Conv2d)]
        between = F.relu(first(x))
        out = F.relu(second(between))
        middle, result = Map.of(between), Map.of(out)
        bias = _bias(first)
        if first.in_channels == 3:
            bias = bias + first.weight.detach().numpy().sum((2, 3)) @ rounding
        parts.append(_layer(_taps(first), bias, into, middle.scale))
        scales = np.ones(second.out_channels) if last else result.scale  # the head takes floats
        parts.append(_layer(_taps(second), _bias(second), middle, scales))
        return out, result

    skips: list[tuple[Tensor, Map]] = []
    out, about = x, bytes_
    for level, layers in enumerate(unet.encoder):
        if level:
            out = F.max_pool2d(out, 2, 2)
        out, about = block(layers, out, about)
        skips.append((out, about))
    for module, layers, (skip, kept) in zip(unet.upsample, unet.decoder, skips[-2::-1]):
        up = cast(nn.ConvTranspose2d, module)
        above = up(out)
        raised, inputs = Map.of(above, zero=128), up.in_channels
        # (in, out, 2, 2) -> groups of 4 channels, the 4 pixels, the channels of a group
        parted = up.weight.detach().numpy().reshape(inputs, -1, 4, 4)
        weight = parted.transpose(1, 3, 2, 0).reshape(-1, inputs, 1)
        parts.append(_layer(weight, _for_pixels(_bias(up)), about, _for_pixels(raised.scale)))
        last = layers is unet.decoder[-1]
        out, about = block(layers, torch.cat([skip, above], dim=1), kept + raised, last)
    head = _bias(unet.head), unet.head.weight.detach().numpy()
    parts += [values.ravel().view(np.uint32) for values in head]
    return np.concatenate(parts)


def _taps(layer: nn.Conv2d) -> np.ndarray:
    return layer.weight.detach().numpy().reshape(layer.out_channels, layer.in_channels, -1)


def _bias(layer: nn.Conv2d | nn.ConvTranspose2d) -> np.ndarray:
    assert layer.bias is not None
    return layer.bias.detach().numpy()


def _for_pixels(values: np.ndarray) -> np.ndarray:
    """Values of channels for each of the 4 pixels of a group: (C,) -> (4 C,)."""
    return values.reshape(-1, 1, 4).repeat(4, axis=1).ravel()


def _layer(weight: np.ndarray, bias: np.ndarray, into: Map, out: np.ndarray) -> np.ndarray:
    """A layer (out, in, taps) whose outputs have the scales `out`, (out,)."""
    folded = weight * into.scale[:, None]
    scale = np.maximum(np.abs(folded).max((1, 2)), 1e-12) / 127
    whole = np.rint(folded / scale[:, None, None])
    sums, bias = whole.sum(2), bias / scale
    biases = [np.rint(bias - sums @ into.zero), np.rint(bias + sums @ (128 - into.zero))]
    words = [values.astype(np.int32).view(np.uint32) for values in biases]
    words.append((scale / out).astype(np.float32).view(np.uint32))
    whole = np.pad(whole, ((0, 0), (0, -whole.shape[1] % 4), (0, 0))).astype(np.int8)
    groups = whole.reshape(len(whole) // 4, 4, -1, 4, whole.shape[2]).transpose(0, 2, 4, 1, 3)
    packed = np.ascontiguousarray(groups).view(np.uint32).reshape(len(groups), -1)
    return np.concatenate([*(w.reshape(-1, 4) for w in words), packed], axis=1).ravel()
