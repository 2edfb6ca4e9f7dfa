"""ONNX: float, half precision and int8, for ONNX Runtime on phones, in browsers and on desks."""

from __future__ import annotations

import io
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np
import torch

from .. import store
from .deploy import MULTIPLE, Deployed

if TYPE_CHECKING:
    from onnx import ModelProto


def write_onnx(network: Deployed, path: Path) -> None:
    """Float32 with dynamic batch, height and width (multiples of 32 px); no metadata, so no paths of the machine that made it."""
    many, rows, columns = torch.export.Dim("n", min=1, max=256), torch.export.Dim("h", min=1, max=128), torch.export.Dim("w", min=1, max=128)
    example = torch.zeros(2, 4 * MULTIPLE, 5 * MULTIPLE, 3, dtype=torch.uint8)
    with quiet():
        program = torch.onnx.export(
            network.eval(), (example,), dynamo=True, verbose=False, input_names=["image"], output_names=["logits" if network.logits else "mask"],
            dynamic_shapes=({0: many, 1: MULTIPLE * rows, 2: MULTIPLE * columns},),
        )
    assert program is not None
    _save(program.model_proto, path)


def write_half(path: Path, out: Path) -> None:
    """Half-precision weights and arithmetic from a float model; input and output stay uint8."""
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16

    with quiet():
        _save(convert_float_to_float16(onnx.load(path), keep_io_types=True), out)


def write_int8(path: Path, out: Path, images: np.ndarray) -> None:
    """Quantized and dequantized around every convolution (QDQ), weights by channel, ranges seen on training images (N, S, S, 3) uint8."""
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Images(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.left = ({"image": image[None]} for image in images)

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.left, None)

    with TemporaryDirectory() as folder, quiet():
        ready, quantized = Path(folder) / "ready.onnx", Path(folder) / "int8.onnx"
        quant_pre_process(path, ready, skip_symbolic_shape=True)
        quantize_static(
            ready, quantized, Images(), quant_format=QuantFormat.QDQ, per_channel=True, activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
            op_types_to_quantize=["Conv", "ConvTranspose", "MaxPool", "Concat"], calibrate_method=CalibrationMethod.MinMax,
        )
        _save(onnx.load(quantized), out)


def _save(model: ModelProto, path: Path) -> None:
    del model.metadata_props[:], model.graph.metadata_props[:]  # the graph's name dimensions in an order that differs between processes
    model.doc_string = model.graph.doc_string = ""
    for part in (*model.graph.node, *model.graph.value_info, *model.graph.input, *model.graph.output, *model.graph.initializer):
        del part.metadata_props[:]
        part.doc_string = ""
    with store.replacing(path) as partial:
        partial.write_bytes(model.SerializeToString())


@contextmanager
def quiet() -> Iterator[None]:
    """Converters talk a lot, on every channel down to the file descriptor; what matters is checked by parity."""
    before, stderr = logging.root.manager.disable, os.dup(2)
    logging.disable(logging.WARNING)
    try:
        with open(os.devnull, "wb") as nowhere, warnings.catch_warnings(), redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()):
            os.dup2(nowhere.fileno(), 2)
            warnings.simplefilter("ignore")
            yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        logging.disable(before)
