"""The student as plain C: its weights as numbers, and the libraries that clang builds from them.

`segment.c` needs no runtime and allocates nothing. The package ziglang brings a clang that compiles
it for this machine, for other processors and for WebAssembly.
"""

from __future__ import annotations

import ctypes
import functools
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from torch import nn

from ... import results
from ...config import LesionKDError
from ...models import UNet
from ..parity import Deployed, Engine, at_size, torch_engine

SOURCES = ("segment.c", "segment.h")
GOLDEN = 128
"""Largest side of the golden image of C code and page, px."""
ERRORS = {
    1: "a pointer is null",
    2: "height or width is not a positive multiple of 32",
    3: "the image is too large",
    4: "the model is truncated or of another format",
    5: "the number of weights does not fit the architecture",
}
"""Return codes of `lesion_segment`."""

_LIBRARY = ("-shared", "-fPIC", "-s")
TARGETS = {
    "linux-x86_64.so": ("-target", "x86_64-linux-musl", "-mcpu=x86_64_v3", "-nostdlib", *_LIBRARY),
    "linux-aarch64.so": ("-target", "aarch64-linux-musl", "-nostdlib", *_LIBRARY),
    "ios-aarch64.o": ("-target", "aarch64-ios", "-c"),
}
"""Builds of an export, and clang's options. The library for aarch64 also loads on Android."""
WASM = (
    *("-target", "wasm32-freestanding", "-DLESION_NO_STUDENT", "-nostdlib", "-Wl,--no-entry,-s"),
    "-Wl,--export=lesion_model_segment,--export=lesion_model_workspace_size,--export=__heap_base",
)
SIMD = "-mcpu=generic+bulk_memory+simd128"
"""WebAssembly with 128-bit vectors; `+relaxed_simd` adds the multiply-add."""


def pack(network: Deployed) -> np.ndarray:
    """The header and the weights of a folded U-Net in the order in which the C code reads them.

    Every convolution is cut into groups of 4 output channels: 4 biases, then for each input
    channel and tap the weights of the 4 outputs. A transposed convolution is a 1x1 convolution to
    the pixels of its blocks, and a stem of 2 or 4 px a 3x3 convolution of blocks.

    Returns
    -------
    (10 + weights,) float32

    Raises
    ------
    LesionKDError
        The network is not a U-Net for RGB and one class whose width is a multiple of 4.
    """
    unet: Any = network.network
    blocks: Any = unet.encoder if isinstance(unet, UNet) else None
    first = blocks[0][0] if blocks else None
    if first is None or first.in_channels != 3 or unet.head.out_channels != 1:
        raise LesionKDError(
            f"the formats native and page take a UNet for RGB and one class; got a "
            f"{type(unet).__name__}. Leave native and page out of formats."
        )
    stem = first.stride[0]
    width = first.out_channels // stem
    if width % 4:
        raise LesionKDError(
            f"the formats native and page need a width that is a multiple of 4; got {width}. "
            "Leave native and page out of formats."
        )
    blocks = [*blocks, *(m for pair in zip(unet.upsample, unet.decoder) for m in pair)]
    layers = [layer for block in (*blocks, unet.head) for layer in block.modules()]
    convolutions = [m for m in layers if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)]
    weights = np.concatenate([_grouped(layer) for layer in convolutions])
    values = [1, width, stem, len(weights), *network.mean.flatten(), *network.scale.flatten()]
    return np.concatenate([np.array(values, np.float32), weights]).astype(np.float32)


def _grouped(layer: nn.Conv2d | nn.ConvTranspose2d) -> np.ndarray:
    assert layer.bias is not None
    weight, bias = layer.weight.detach().numpy(), layer.bias.detach().numpy()
    stride = layer.stride[0]
    if isinstance(layer, nn.ConvTranspose2d):  # (in, out, dy, dx) -> (out x dy x dx, in, 1)
        inputs = len(weight)
        weight = weight.transpose(1, 2, 3, 0).reshape(-1, inputs, 1)
        bias = bias.repeat(stride**2)
    else:  # (out, in, taps), or with a stem (out, in, 3, dy, 3, dx) -> (out, in x dy x dx, 9)
        outputs, inputs, size, _ = weight.shape
        taps = size // stride
        weight = weight.reshape(outputs, inputs, taps, stride, taps, stride)
        weight = weight.transpose(0, 1, 3, 5, 2, 4).reshape(outputs, -1, taps**2)
    missing = -len(weight) % 4  # the head of a plain student has one output
    weight = np.pad(weight, ((0, missing), (0, 0), (0, 0)))
    groups = weight.reshape(-1, 4, *weight.shape[1:]).transpose(0, 2, 3, 1)
    biases = np.pad(bias, (0, missing)).reshape(-1, 4)
    return np.concatenate([biases, groups.reshape(len(groups), -1)], axis=1).ravel()


def write_native(network: Deployed, folder: Path, golden: np.ndarray) -> None:
    """Write the C files, the student and a golden image (S, S, 3); build them for `TARGETS`."""
    model = pack(network)
    for name in SOURCES:
        results.write_text(folder / name, source(name))
    results.write_text(
        folder / "student.h",
        "/* A trained student: format, width, stem, number of weights, means, scales; weights.\n"
        "   Generated by lesionkd_core. */\n"
        f"enum {{ lesion_student_count = {len(model)} }};\n"
        + _array("float lesion_student", [f"{v:.9g}" for v in model.tolist()]),
    )
    golden = at_size(golden[None], min(GOLDEN, len(golden)))
    results.write_text(
        folder / "golden.h",
        "/* An image and its mask in PyTorch: an app computes them within one step of 255. */\n"
        f"enum {{ golden_side = {golden.shape[1]} }};\n"
        + _array("unsigned char golden_rgb_bytes", golden.flatten())
        + _array("unsigned char golden_mask_bytes", torch_engine(network)(golden).flatten())
        + "static const unsigned char *const golden_rgb = golden_rgb_bytes;\n"
        + "static const unsigned char *const golden_mask = golden_mask_bytes;\n",
    )
    for name, options in TARGETS.items():
        compile_c(folder / "segment.c", folder / name, *options)


def _array(name: str, values: Sequence[Any] | np.ndarray) -> str:
    lines = [", ".join(map(str, values[i : i + 16])) for i in range(0, len(values), 16)]
    numbers = ",\n".join(lines)
    return f"static const {name}[{len(values)}] = {{\n{numbers}\n}};\n"


def source(name: str) -> str:
    """A C file of this package."""
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def compile_c(code: Path, out: Path, *options: str) -> None:
    """Compile with the clang of the package ziglang.

    Raises
    ------
    LesionKDError
        ziglang is not installed, or clang refuses the code; its message is passed on.
    """
    if find_spec("ziglang") is None:
        raise LesionKDError(
            "the formats native and page are compiled with the package ziglang, which is not "
            "installed: pip install -e '.[mobile]', or leave native and page out of formats."
        )
    command = [sys.executable, "-m", "ziglang", "cc", "-std=c11", "-O3", *options]
    done = subprocess.run([*command, str(code), "-o", str(out)], capture_output=True, text=True)
    if done.returncode:
        raise LesionKDError(f"{code.name} could not be compiled:\n{done.stderr.strip()}")


@functools.cache
def wasm(relaxed: bool = False) -> bytes:
    """segment.c for WebAssembly; it takes any model."""
    with _sources() as folder:
        out = Path(folder) / "segment.wasm"
        compile_c(out.with_suffix(".c"), out, *WASM, SIMD + "+relaxed_simd" * relaxed)
        return out.read_bytes()


@functools.cache
def library() -> ctypes.CDLL:
    """segment.c for the processor of this machine; it takes any model."""
    with _sources() as folder:
        out = Path(folder) / "segment.so"
        compile_c(out.with_suffix(".c"), out, "-DLESION_NO_STUDENT", *_native(), *_LIBRARY)
        loaded = ctypes.CDLL(str(out))
    size, count, model = ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p
    loaded.lesion_model_workspace_size.restype = size
    loaded.lesion_model_workspace_size.argtypes = [model, size, count, count]
    loaded.lesion_model_segment.argtypes = [model, size, model, count, count, model, model]
    return loaded


def peak() -> tuple[int, Callable[[], Any]]:
    """The number of multiply-adds of a loop in registers, and the loop: what one core can do."""
    with _sources() as folder:
        out = Path(folder) / "peak.so"
        compile_c(out.with_suffix(".c"), out, *_native(), *_LIBRARY)
        loop = ctypes.CDLL(str(out))
    loop.peak.argtypes = [ctypes.c_long, ctypes.c_float, ctypes.c_float]
    loop.peak.restype = ctypes.c_float
    rounds = 100_000
    return 12 * rounds * loop.lanes(), functools.partial(loop.peak, rounds, 0.999, 0.001)


def _native() -> tuple[str, ...]:
    wide = "avx512f" in _cpu()  # clang prefers 256 bits
    return ("-mcpu=native", *(("-mprefer-vector-width=512",) if wide else ()))


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    return info.read_text() if info.exists() else ""


def _sources() -> TemporaryDirectory[str]:
    folder = TemporaryDirectory()
    for name in (*SOURCES, "peak.c"):
        (Path(folder.name) / name).write_text(source(name), encoding="utf-8")
    return folder


def native_engine(model: np.ndarray, file: Path | None = None) -> Engine:
    """segment.c on this processor, with a model from `pack`."""
    code = library()
    spaces: dict[tuple[int, int], np.ndarray] = {}

    def segment(images: np.ndarray) -> np.ndarray:
        images = np.ascontiguousarray(images)
        height, width = images.shape[1:3]
        masks = np.empty(images.shape[:3], np.uint8)
        head = model.ctypes.data, len(model)
        if (height, width) not in spaces:
            spaces.clear()
            size = code.lesion_model_workspace_size(*head, height, width)
            spaces[height, width] = np.empty(size, np.uint8)
        space = spaces[height, width].ctypes.data
        for image, mask in zip(images, masks):
            error = code.lesion_model_segment(
                *head, image.ctypes.data, height, width, mask.ctypes.data, space
            )
            if error:
                raise LesionKDError(f"native: {ERRORS[error]}")
        return masks

    return Engine("native", "float32", file, segment)
