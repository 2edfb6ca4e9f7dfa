"""ExecuTorch with XNNPACK, for native apps on Android and iOS."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch.export import ExportedProgram

from .. import results
from ..config import LesionKDError
from .formats import Compared, Format, Job, register
from .onnx import quiet
from .parity import Deployed, Engine, at_size


@register
class ExecuTorch(Format):
    """student.pte and student-int8.pte."""

    name = "executorch"
    packages = ("executorch", "torchao")

    def write(self, job: Job) -> list[Compared]:
        """Write two precisions with a method for every size."""
        exact, small = job.folder / "student.pte", job.folder / "student-int8.pte"
        write_executorch(job.network, exact, job.sizes)
        calibration = {size: at_size(job.samples.calibration, size) for size in job.sizes}
        write_executorch(job.network, small, job.sizes, calibration)
        job.settings["executorch"] = {"methods": [f"forward_{size}" for size in job.sizes]}
        engines = executorch_engine(exact, "float32"), executorch_engine(small, "int8")
        return [(engine, job.sizes) for engine in engines]

    def timed(
        self, network: Deployed, folder: Path, images: dict[int, np.ndarray], int8: bool
    ) -> Iterator[Engine]:
        """ExecuTorch's runtime; the process then keeps one thread for it."""
        set_threads(1)
        for precision in ("float32", "int8") if int8 else ("float32",):
            file, calibration = folder / f"{precision}.pte", images if precision == "int8" else None
            write_executorch(network, file, tuple(images), calibration)
            yield executorch_engine(file, precision)


def write_executorch(
    network: Deployed,
    path: Path,
    sizes: tuple[int, ...],
    images: dict[int, np.ndarray] | None = None,
) -> None:
    """Write one program with a method `forward_S` for every size S (dynamic sizes are slow).

    With calibration images {S: (N, S, S, 3) uint8} it is quantized to int8, weights by channel.
    """
    with quiet(), torch.no_grad():
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower

        programs = {
            f"forward_{s}": _quantized(network, images[s]) if images else _exported(network, s)
            for s in sizes
        }
        lowered = to_edge_transform_and_lower(programs, partitioner=[XnnpackPartitioner()])
        buffer = lowered.to_executorch().buffer
    with results.replacing(path) as partial:
        partial.write_bytes(buffer)


def _exported(module: torch.nn.Module, size: int) -> ExportedProgram:
    return torch.export.export(module, (torch.zeros(1, size, size, 3, dtype=torch.uint8),))


def _quantized(network: Deployed, images: np.ndarray) -> ExportedProgram:
    from executorch.backends.xnnpack.quantizer import xnnpack_quantizer as xnnpack
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    how = xnnpack.get_symmetric_quantization_config(is_per_channel=True)
    exported = _exported(network, images.shape[1])
    observed = prepare_pt2e(exported.module(), xnnpack.XNNPACKQuantizer().set_global(how))
    for image in images:
        observed(torch.from_numpy(image[None].copy()))
    return _exported(convert_pt2e(observed), images.shape[1])


def executorch_engine(file: Path, precision: str) -> Engine:
    """ExecuTorch's runtime with XNNPACK, image by image."""
    from executorch.runtime import Runtime

    with quiet():
        program = Runtime.get().load_program(file)
    methods = {}

    def segment(images: np.ndarray) -> np.ndarray:
        name = f"forward_{images.shape[1]}"
        if name not in program.method_names or images.shape[1] != images.shape[2]:
            raise LesionKDError(
                f"{file.name} has {', '.join(sorted(program.method_names))}; none takes "
                f"{images.shape[2]} x {images.shape[1]} px. Add the size to the option sizes."
            )
        if name not in methods:
            with quiet():
                methods[name] = program.load_method(name)
        outputs = [methods[name].execute([torch.from_numpy(i[None].copy())]) for i in images]
        return np.concatenate([output[0].numpy().copy() for output in outputs])

    return Engine("ExecuTorch", precision, file, segment)


def set_threads(count: int) -> None:
    """Set the size of ExecuTorch's thread pool; by default it has a thread for each core."""
    with quiet():
        from executorch.extension.pybindings.portable_lib import _unsafe_reset_threadpool

        _unsafe_reset_threadpool(count)
