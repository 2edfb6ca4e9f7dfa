"""BatchNorm: the same numbers as torch's, several times faster in thin layers on a CPU, and of the whole batch where ranks share it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import ranks

LANES = 64
"""Values that lie side by side in a row of the packed map."""
THIN = 4
"""Most channels for which packing pays (make bench)."""


class BatchNorm2d(nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d` with the statistics of the batch over all ranks.

    On the CPU, training a channels-last map of at most 4 channels goes by packed rows.
    torch's kernel vectorizes over channels and leaves the processor's lanes empty where there are four;
    (N, C, H, W) in channels-last order is also a matrix (N H W C / 64, 64) whose columns hold one channel each.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    momentum: float

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> the same shape."""
        if self.training and ranks.spread():
            return self._trained(_SharedBatchNorm, x, x[0, 0].numel() * ranks.spread())
        packs = x.device.type == "cpu" and LANES % self.num_features == 0 and x.numel() % LANES == 0 and x.is_contiguous(memory_format=torch.channels_last)
        if not (self.training and self.track_running_stats and self.num_features <= THIN and packs):
            return super().forward(x)
        return self._trained(_PackedBatchNorm, x, x.numel() // self.num_features)

    def _trained(self, norm: type[torch.autograd.Function], x: Tensor, count: int) -> Tensor:
        out: Tensor
        out, mean, var = norm.apply(x, self.weight, self.bias, self.eps)
        if self.track_running_stats:
            with torch.no_grad():
                self.num_batches_tracked += 1
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(var * count / (count - 1), self.momentum)
        return out


class _SharedBatchNorm(torch.autograd.Function):
    """gamma (x - mean) / sqrt(var + eps) + beta over the cases of all ranks, by torch's kernels on any device.

    `torch.nn.SyncBatchNorm` takes CUDA tensors only. Also gives mean and biased variance.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        var, mean = torch.var_mean(x.float(), (0, 2, 3), correction=0)
        whole = ranks.mean(mean)
        var = ranks.mean(var + (mean - whole).square())
        ctx.save_for_backward(x, weight, whole, var)
        ctx.eps, ctx.count = eps, x[0, 0].numel() * ranks.spread()
        ctx.mark_non_differentiable(whole, var)
        return F.batch_norm(x, whole, var, weight, bias, eps=eps), whole, var

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight, mean, var = ctx.saved_tensors
        scale = (var + ctx.eps).rsqrt()
        frozen = torch.ops.aten.native_batch_norm_backward(grad, x, weight, mean, var, mean, scale, False, ctx.eps, [True, True, True])
        out, to_weight, to_bias = frozen  # as if mean and variance were constants
        shared = ranks.total(torch.stack([to_weight, to_bias])) / ctx.count
        slope = -weight * scale
        factor = slope * scale * shared[0]
        shift = slope * shared[1] - mean * factor
        out += torch.addcmul(shift.view(-1, 1, 1), x, factor.view(-1, 1, 1))
        return out, to_weight, to_bias, None


def _rows(x: Tensor) -> Tensor:
    """Channels-last (N, C, H, W) -> (N H W C / LANES, LANES), the same memory."""
    return x.permute(0, 2, 3, 1).reshape(-1, LANES)


def _by_channel(columns: Tensor, channels: int) -> Tensor:
    """Sums of columns (LANES,) -> sums of channels (C,)."""
    return columns.view(-1, channels).sum(0)


class _PackedBatchNorm(torch.autograd.Function):
    """gamma (x - mean) / sqrt(var + eps) + beta over all but the channels; also gives mean and biased variance."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        channels, rows = len(weight), _rows(x).float()
        count, times = rows.numel() // channels, LANES // channels
        mean = _by_channel(rows.sum(0), channels) / count
        centred = rows - mean.repeat(times)
        var = _by_channel(centred.square().sum(0), channels) / count
        scale = (var + eps).rsqrt()
        out = torch.empty_like(x, dtype=torch.float32)
        torch.addcmul(bias.repeat(times), centred, (weight * scale).repeat(times), out=_rows(out))
        ctx.save_for_backward(centred, weight, scale)
        ctx.type = x.dtype
        ctx.mark_non_differentiable(mean, var)
        return out, mean, var

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        centred, weight, scale = ctx.saved_tensors
        channels, rows = len(weight), _rows(grad)
        count, times = rows.numel() // channels, LANES // channels
        to_bias = _by_channel(rows.sum(0), channels)
        to_weight = _by_channel((rows * centred).sum(0), channels) * scale
        slope = weight * scale
        out = torch.addcmul((-slope * to_bias / count).repeat(times), rows, slope.repeat(times))
        out.addcmul_(centred, (-slope * scale * to_weight / count).repeat(times))
        shape = (grad.shape[0], *grad.shape[2:], channels)
        return out.view(shape).permute(0, 3, 1, 2).to(ctx.type), to_weight, to_bias, None
