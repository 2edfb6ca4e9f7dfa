"""What runs an exported network, behind one call: (N, S, S, 3) uint8 -> (N, S, S) uint8."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..config import LesionKDError
from .deploy import MULTIPLE, Deployed
from .to_onnx import quiet


@dataclass(frozen=True)
class Engine:
    """An exported network in the runtime that an app would use."""

    name: str
    precision: str
    file: Path | None
    segment: Callable[[np.ndarray], np.ndarray]

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """(N, H, W, 3) uint8 -> (N, H, W) uint8: probability x 255."""
        shaped = images.ndim == 4 and images.shape[3] == 3 and images.dtype == np.uint8
        if not shaped or any(side == 0 or side % MULTIPLE for side in images.shape[1:3]):
            raise LesionKDError(
                f"{self.name}: got images of shape {images.shape} and type {images.dtype}; wants (N, H, W, 3) uint8 RGB, "
                f"H and W multiples of {MULTIPLE}. lesionkd_core.predict takes any size; model.json says how an app resizes."
            )
        return self.segment(images)


def torch_engine(network: Deployed) -> Engine:
    """PyTorch, eager: what the others are held against."""
    def segment(images: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return np.concatenate([network(torch.from_numpy(np.array(images[i : i + 16]))).numpy() for i in range(0, len(images), 16)])

    return Engine("PyTorch", "float32", None, segment)


def onnx_engine(file: Path, precision: str, threads: int = 0) -> Engine:
    """ONNX Runtime on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])

    def segment(images: np.ndarray) -> np.ndarray:
        return np.concatenate([session.run(None, {"image": np.ascontiguousarray(images[i : i + 16])})[0] for i in range(0, len(images), 16)])

    return Engine("ONNX Runtime", precision, file, segment)


def executorch_engine(file: Path, precision: str) -> Engine:
    """ExecuTorch's own runtime with XNNPACK, image by image."""
    from executorch.runtime import Runtime

    with quiet():
        program = Runtime.get().load_program(file)
    methods = {}

    def segment(images: np.ndarray) -> np.ndarray:
        name = f"forward_{images.shape[1]}"
        if name not in program.method_names or images.shape[1] != images.shape[2]:
            raise LesionKDError(f"{file.name} has {', '.join(sorted(program.method_names))}; none takes {images.shape[2]} x {images.shape[1]} px")
        if name not in methods:
            with quiet():
                methods[name] = program.load_method(name)
        method = methods[name]
        return np.concatenate([method.execute([torch.from_numpy(image[None].copy())])[0].numpy().copy() for image in images])

    return Engine("ExecuTorch", precision, file, segment)


def executorch_threads(count: int) -> None:
    """How many threads ExecuTorch's pool has; it otherwise takes as many as there are cores when it is first used."""
    with quiet():
        from executorch.extension.pybindings.portable_lib import _unsafe_reset_threadpool

        _unsafe_reset_threadpool(count)
