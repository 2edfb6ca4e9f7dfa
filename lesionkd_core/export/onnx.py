"""ONNX files in float32, float16 and int8, for ONNX Runtime on phones, desktops and servers."""

from __future__ import annotations

import io
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np
import torch

from .. import results
from ..config import DistillConfig, LesionKDError, MissingExtra
from ..predict import TrainedNetwork, build
from .formats import Compared, Format, Job, register
from .parity import MULTIPLE, Deployed, Engine

if TYPE_CHECKING:
    from onnx import ModelProto


@register
class Onnx(Format):
    """student.onnx, student-fp16.onnx and student-int8.onnx."""

    name = "onnx"
    packages = ("onnx", "onnxscript", "onnxruntime")

    def write(self, job: Job) -> list[Compared]:
        """Write three precisions; each is compared at the student's size."""
        files = {name: job.folder / f"student{name}.onnx" for name in ("", "-fp16", "-int8")}
        write_onnx(job.network, files[""])
        write_half(files[""], files["-fp16"])
        write_int8(files[""], files["-int8"], job.samples.calibration)
        precisions = ("float32", "float16", "int8")
        engines = [onnx_engine(file, p) for file, p in zip(files.values(), precisions)]
        return [(engine, (job.student.pixels,)) for engine in engines]

    def timed(
        self, network: Deployed, folder: Path, images: dict[int, np.ndarray], int8: bool
    ) -> Iterator[Engine]:
        """ONNX Runtime."""
        write_onnx(network, exact := folder / "float32.onnx")
        yield onnx_engine(exact, "float32", threads=1)
        if int8:
            write_int8(exact, small := folder / "int8.onnx", next(iter(images.values())))
            yield onnx_engine(small, "int8", threads=1)


def write_onnx(network: Deployed, path: Path) -> None:
    """Write float32 with dynamic batch, height and width (multiples of 32 px), without metadata."""
    many = torch.export.Dim("n", min=1, max=256)
    rows, columns = (torch.export.Dim(side, min=1, max=128) for side in "hw")
    example = torch.zeros(2, 4 * MULTIPLE, 5 * MULTIPLE, 3, dtype=torch.uint8)
    with quiet():
        program = torch.onnx.export(
            network.eval(),
            (example,),
            dynamo=True,
            verbose=False,
            input_names=["image"],
            output_names=["mask"],
            dynamic_shapes=({0: many, 1: MULTIPLE * rows, 2: MULTIPLE * columns},),
        )
    assert program is not None
    _save(program.model_proto, path)


def write_half(path: Path, out: Path) -> None:
    """Convert a float32 model to float16 weights and arithmetic; input and output stay uint8."""
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16

    with quiet():
        _save(convert_float_to_float16(onnx.load(path), keep_io_types=True), out)


def write_int8(path: Path, out: Path, images: np.ndarray) -> None:
    """Quantize a float32 model to int8 (QDQ, weights by channel).

    The ranges are those that occur on training images (N, S, S, 3) uint8.
    """
    import onnx
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Images(quantization.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.left = ({"image": image[None]} for image in images)

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.left, None)

    with TemporaryDirectory() as folder, quiet():
        ready, quantized = Path(folder) / "ready.onnx", Path(folder) / "int8.onnx"
        quant_pre_process(path, ready, skip_symbolic_shape=True)
        quantization.quantize_static(
            ready,
            quantized,
            Images(),
            quant_format=quantization.QuantFormat.QDQ,
            per_channel=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            op_types_to_quantize=["Conv", "ConvTranspose", "MaxPool", "Concat"],
            calibrate_method=quantization.CalibrationMethod.MinMax,
        )
        _save(onnx.load(quantized), out)


def _save(model: ModelProto, path: Path) -> None:
    # metadata hold paths of this machine, and dimensions in an order that differs between processes
    del model.metadata_props[:], model.graph.metadata_props[:]
    model.doc_string = model.graph.doc_string = ""
    graph = model.graph
    for kind in (graph.node, graph.value_info, graph.input, graph.output, graph.initializer):
        for part in kind:
            del part.metadata_props[:]
            part.doc_string = ""
    with results.replacing(path) as partial:
        partial.write_bytes(model.SerializeToString())


def onnx_engine(file: Path, precision: str, threads: int = 0) -> Engine:
    """ONNX Runtime on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])

    def segment(images: np.ndarray) -> np.ndarray:
        parts = [np.ascontiguousarray(images[i : i + 16]) for i in range(0, len(images), 16)]
        return np.concatenate([session.run(None, {"image": part})[0] for part in parts])

    return Engine("ONNX Runtime", precision, file, segment)


# An exported student that predicts ----------------------------------------------------------------


class OnnxStudent(TrainedNetwork):
    """A student in a file of notebook 07: its images are segmented by ONNX Runtime."""

    engine: Engine

    def probabilities(self, images: np.ndarray) -> np.ndarray:
        """Probabilities in steps of 1/255."""
        return self.engine(images).astype(np.float32) / 255

    def to(self, device: str) -> None:
        """ONNX Runtime is used on the CPU only."""
        if device != "cpu":
            raise LesionKDError(f"device = {device!r}: an .onnx file is run on the CPU; use 'cpu'")

    def __repr__(self) -> str:
        return f"OnnxStudent({self.path}: {self.pixels} px)"


def load_onnx(file: Path | str) -> OnnxStudent:
    """An exported `student.onnx`, or one of its other precisions, with its `model.json` beside it.

    Raises
    ------
    LesionKDError
        onnxruntime or model.json is missing, or the file is damaged.
    """
    file, about = Path(file), Path(file).with_name("model.json")
    if find_spec("onnxruntime") is None:
        raise MissingExtra(str(file), "mobile")
    if not about.is_file():
        raise LesionKDError(f"{file.name} needs {about}, which has the size of its images")
    try:
        engine = onnx_engine(file, "")
    except Exception as error:  # onnxruntime's own kinds have no public name
        raise LesionKDError(f"{file} cannot be read as ONNX: {error}") from None
    said = results.read_json(about)
    cfg = DistillConfig(pixels=said["size"], fit=said["fit"], window=said.get("window", ""))
    student = OnnxStudent(build(cfg), cfg, file)  # its weights are not used
    object.__setattr__(student, "engine", engine)
    return student


@contextmanager
def quiet() -> Iterator[None]:
    """Silence converters, also where they write to the file descriptor."""
    before, stderr = logging.root.manager.disable, os.dup(2)
    logging.disable(logging.WARNING)
    try:
        with (
            open(os.devnull, "wb") as nowhere,
            warnings.catch_warnings(),
            redirect_stderr(io.StringIO()),
            redirect_stdout(io.StringIO()),
        ):
            os.dup2(nowhere.fileno(), 2)
            warnings.simplefilter("ignore")
            yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        logging.disable(before)
