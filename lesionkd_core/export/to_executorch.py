"""ExecuTorch with XNNPACK, for native apps on Android and iOS; fixed sizes, since dynamic ones fall back to slow kernels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch.export import ExportedProgram

from .. import store
from .deploy import Deployed
from .to_onnx import quiet


def write_executorch(network: Deployed, path: Path, sizes: tuple[int, ...], images: dict[int, np.ndarray] | None = None) -> None:
    """One program with a method `forward_S` for every size S; int8 by channel where images {S: (N, S, S, 3) uint8} for calibration are given."""
    with quiet(), torch.no_grad():
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower

        programs = {f"forward_{s}": _quantized(network, images[s]) if images else _exported(network.eval(), s) for s in sizes}
        lowered = to_edge_transform_and_lower(programs, partitioner=[XnnpackPartitioner()]).to_executorch()
    with store.replacing(path) as partial:
        partial.write_bytes(lowered.buffer)


def _exported(module: torch.nn.Module, size: int) -> ExportedProgram:
    return torch.export.export(module, (torch.zeros(1, size, size, 3, dtype=torch.uint8),))


def _quantized(network: Deployed, images: np.ndarray) -> ExportedProgram:
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import XNNPACKQuantizer, get_symmetric_quantization_config
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
    observed = prepare_pt2e(_exported(network.eval(), images.shape[1]).module(), quantizer)
    for image in images:
        observed(torch.from_numpy(image[None].copy()))
    return _exported(convert_pt2e(observed), images.shape[1])
