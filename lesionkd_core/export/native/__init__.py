"""The student as plain C: its weights as numbers, and the libraries that clang builds from them.

`segment.c` needs no runtime and allocates nothing. The package ziglang brings a clang that compiles
it for this machine, for other processors and for WebAssembly.
"""

from __future__ import annotations

import ctypes
import functools
import subprocess
import sys
from collections.abc import Iterator, Sequence
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from torch import nn

from ... import results
from ...config import LesionKDError, MissingExtra
from ...models import UNet
from ..formats import Compared, Format, Job, register
from ..parity import Deployed, Engine
from .int8 import quantized

SOURCES = ("segment.c", "segment.h")
HEADER = 13
"""Numbers before the weights: segment.c, read_model."""

_LIBRARY = ("-shared", "-fPIC", "-s")
_SHIPPED = (
    *_LIBRARY,
    "-nostdlib",
    "-rtlib=compiler-rt",
    "-ffreestanding",
    "-Wl,-soname,liblesion.so",
    "-Wl,-z,max-page-size=16384",
)
TARGETS = {
    "x86_64/liblesion.so": ("-target", "x86_64-linux-musl", "-mcpu=x86_64_v3", *_SHIPPED),
    "arm64-v8a/liblesion.so": ("-target", "aarch64-linux-musl", *_SHIPPED),
    "ios-arm64/lesion.o": ("-target", "aarch64-ios.13.0", "-c"),
}
"""Builds of an export, and clang's options. Android looks for the library in arm64-v8a."""
WASM = (
    *("-target", "wasm32-freestanding", "-DLESION_NO_STUDENT", "-nostdlib", "-Wl,--no-entry,-s"),
    "-Wl,--export=lesion_model_segment,--export=lesion_model_workspace_size,--export=__heap_base",
    "-Wl,--export=lesion_model_segment_image,--export=lesion_model_image_workspace_size",
)
SIMD = "-mcpu=generic+bulk_memory+simd128"
"""WebAssembly with 128-bit vectors; `+relaxed_simd` adds the multiply-add."""


@register
class Native(Format):
    """C files with the student in them, and libraries built from them."""

    name = "native"
    packages = ("ziglang",)

    def check(self, network: Deployed) -> None:
        """Refuse what `pack` refuses."""
        pack(network, 32)

    def write(self, job: Job) -> list[Compared]:
        """Write the folder native; its engines are compared at every size."""
        folder, about = job.folder / "native", (job.student.pixels, job.student.cfg.fit)
        model = pack(job.network, *about, job.threshold)
        small = pack_int8(job.network, *about, job.threshold, job.samples.calibration)
        write_native([model, small], folder, *job.golden)
        engines = [native_engine(model, folder / "segment.c")]
        if has_int8():
            engines.append(native_engine(small, folder / "student_int8.bin"))
        else:
            job.notes["student_int8.bin"] = "not compared: no dot products of bytes here"
        return [(engine, job.sizes) for engine in engines]

    def timed(
        self, network: Deployed, folder: Path, images: dict[int, np.ndarray], int8: bool
    ) -> Iterator[Engine]:
        """The C code on this processor, for U-Nets."""
        if isinstance(network.network, UNet):
            yield native_engine(pack(network, 32))
            if int8 and has_int8():
                some = next(iter(images.values()))
                yield native_engine(pack_int8(network, 32, "stretch", 0.5, some))


def pack(
    network: Deployed, pixels: int, fit: str = "stretch", threshold: float = 0.5
) -> np.ndarray:
    """The header and the weights of a folded U-Net in the order in which the C code reads them.

    Every convolution is cut into groups of 4 output channels: 4 biases, then for each input
    channel and tap the weights of the 4 outputs. A transposed convolution is a 1x1 convolution to
    the 4 pixels of its blocks.

    Parameters
    ----------
    pixels : int
        Side of the square that the network was trained on, a multiple of 32, px.
    fit : {'stretch', 'pad'}
    threshold : float
        Probability above which a pixel is lesion.

    Returns
    -------
    (13 + weights,) float32

    Raises
    ------
    LesionKDError
        The network is not a U-Net for RGB and one class whose width is a multiple of 4, or its
        images are not a multiple of 32 px.
    """
    unet = network.network
    if not isinstance(unet, UNet):
        raise _refused(f"take a UNet for RGB and one class; got a {type(unet).__name__}")
    blocks: list[nn.Module] = [*unet.encoder]
    for pair in zip(unet.upsample, unet.decoder):
        blocks += pair
    layers = [layer for block in blocks for layer in block.modules()]
    convolutions = [m for m in layers if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)]
    head = unet.head
    first, width = convolutions[0], convolutions[0].out_channels
    if first.in_channels != 3 or head.out_channels != 1:
        raise _refused(f"take RGB and one class; got {first.in_channels} and {head.out_channels}")
    if width % 4 or width > 64:
        raise _refused(f"need a width that is a multiple of 4, up to 64; got {width}")
    if pixels % 32:
        raise _refused(f"need images whose side is a multiple of 32 px; got {pixels}")
    assert head.bias is not None
    parts = [_grouped(layer) for layer in convolutions]
    parts += [head.bias.detach().numpy(), head.weight.detach().numpy().ravel()]
    weights = np.concatenate(parts).astype(np.float32)
    about = [2, width, pixels, fit == "pad", threshold]
    return _whole(network, about, weights.view(np.uint32)).view(np.float32)


def pack_int8(
    network: Deployed, pixels: int, fit: str, threshold: float, images: np.ndarray
) -> np.ndarray:
    """The same for LESION_INT8: the header, and the weights of `quantized`.

    `images` (N, S, S, 3) uint8 are training images, for the ranges of the bytes.

    Returns
    -------
    (13 + words,) uint32
    """
    about = pack(network, pixels, fit, threshold)[:5]
    return _whole(network, [3, *about[1:]], quantized(network, images))


def _whole(network: Deployed, about: Sequence[float], weights: np.ndarray) -> np.ndarray:
    """Header and weights as words, with the checksum."""
    means, scales = network.mean.flatten().tolist(), network.scale.flatten().tolist()
    header = np.array([*about, len(weights), 0, *means, *scales], np.float32)
    header[6] = checksum(np.concatenate([header.view(np.uint32), weights]))
    return np.concatenate([header.view(np.uint32), weights])


def _refused(what: str) -> LesionKDError:
    return LesionKDError(
        f"the formats native and page {what}. Leave native and page out of formats."
    )


def checksum(words: np.ndarray) -> int:
    """Sum of the words times 1, 3, 5, ..., without that of the checksum, modulo 16777213."""
    counted = words.copy()
    counted[6] = 0
    odd = 2 * np.arange(len(words), dtype=np.uint32) + 1
    return int((counted * odd).sum(dtype=np.uint32)) % 16777213


def _grouped(layer: nn.Conv2d | nn.ConvTranspose2d) -> np.ndarray:
    assert layer.bias is not None
    weight, bias = layer.weight.detach().numpy(), layer.bias.detach().numpy()
    if isinstance(layer, nn.ConvTranspose2d):  # (in, out, dy, dx) -> (out x dy x dx, in, 1)
        weight = weight.transpose(1, 2, 3, 0).reshape(4 * len(bias), -1, 1)
        bias = bias.repeat(4)
    groups = weight.reshape(len(bias) // 4, 4, weight.shape[1], -1).transpose(0, 2, 3, 1)
    rows = groups.reshape(len(groups), -1)
    return np.concatenate([bias.reshape(-1, 4), rows], axis=1).ravel()


def write_native(
    models: Sequence[np.ndarray], folder: Path, picture: np.ndarray, mask: np.ndarray
) -> None:
    """Write the C files, models, and a golden picture with its mask; build for `TARGETS`."""
    for name in SOURCES:
        results.write_text(folder / name, source(name))
    for model in models:
        name = "student_int8" if model.dtype == np.uint32 else "student"
        with results.replacing(folder / f"{name}.bin") as partial:
            partial.write_bytes(model.tobytes())
        results.write_text(folder / f"{name}.h", student_header(model))
    height, width = mask.shape
    results.write_text(
        folder / "golden.h",
        "/* A picture in RGB and its mask in PyTorch: lesion_segment_image computes it within one "
        f"step of 255. */\nenum {{ golden_width = {width}, golden_height = {height} }};\n"
        + _array("unsigned char golden_rgb_bytes", picture.flatten())
        + _array("unsigned char golden_mask_bytes", mask.flatten())
        + "static const unsigned char *const golden_rgb = golden_rgb_bytes; /* Swift takes no */\n"
        "static const unsigned char *const golden_mask = golden_mask_bytes; /* large arrays */\n",
    )
    for name, options in TARGETS.items():
        results.make_folder((folder / name).parent)
        compile_c(folder / "segment.c", folder / name, *options)


def student_header(model: np.ndarray) -> str:
    """A model as a C array. Its name is lesion_student, or what LESION_STUDENT is defined as."""
    about = model[:HEADER].view(np.float32)
    if model.dtype == np.uint32:
        kind, numbers = "uint32_t", [f"0x{word:x}u" for word in model.tolist()]
    else:
        kind, values = "float", [f"{value:.9g}" for value in model.tolist()]
        numbers = [v + "f" if "." in v or "e" in v else v + ".0f" for v in values]
    return (
        f"/* A trained student: {about[2]:.0f} px, threshold {about[4]:g}, format {about[0]:.0f}, "
        f"checksum {about[6]:.0f}.\n   Generated by lesionkd_core. */\n#include <stdint.h>\n"
        "#ifndef LESION_STUDENT\n#define LESION_STUDENT lesion_student\n#endif\n"
        + _array(f"{kind} LESION_STUDENT", numbers)
    )


def _array(name: str, values: Sequence[str] | np.ndarray) -> str:
    lines = [", ".join(map(str, values[i : i + 16])) for i in range(0, len(values), 16)]
    numbers = ",\n".join(lines)
    return f"static const {name}[{len(values)}] = {{\n{numbers}\n}};\n"


def source(name: str) -> str:
    """A C file of this package."""
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


# Compilers ----------------------------------------------------------------------------------------


def compile_c(code: Path, out: Path, *options: str) -> None:
    """Compile with the clang of the package ziglang.

    Raises
    ------
    LesionKDError
        ziglang is not installed, or clang refuses the code; its message is passed on.
    """
    if find_spec("ziglang") is None:
        raise MissingExtra("compiling the formats native and page", "mobile")
    command = [sys.executable, "-m", "ziglang", "cc", "-std=c11", "-O3", *options]
    done = subprocess.run([*command, str(code), "-o", str(out)], capture_output=True, text=True)
    if done.returncode:
        raise LesionKDError(f"{code.name} could not be compiled:\n{done.stderr.strip()}")


@functools.cache
def wasm(relaxed: bool = False) -> bytes:
    """segment.c for WebAssembly; it takes any model."""
    simd = SIMD + "+relaxed_simd" if relaxed else SIMD
    with _sources() as folder:
        out = Path(folder) / "segment.wasm"
        compile_c(out.with_suffix(".c"), out, *WASM, simd)
        return out.read_bytes()


@functools.cache
def library(int8: bool = False) -> ctypes.CDLL:
    """segment.c for the processor of this machine; it takes any model, of floats or of bytes."""
    kind = ("-DLESION_INT8",) if int8 else ()
    with _sources() as folder:
        out = Path(folder) / "segment.so"
        compile_c(out.with_suffix(".c"), out, "-DLESION_NO_STUDENT", *kind, *for_this_machine())
        code = ctypes.CDLL(str(out))
    size, number, pointer, step = ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p, ctypes.c_ssize_t
    code.lesion_model_check.argtypes = [pointer, size]
    code.lesion_error_string.argtypes, code.lesion_error_string.restype = [number], ctypes.c_char_p
    for ask in (code.lesion_model_workspace_size, code.lesion_model_image_workspace_size):
        ask.argtypes, ask.restype = [pointer, size, number, number], size
    code.lesion_model_segment.argtypes = [pointer, size, pointer, number, number, pointer, pointer]
    code.lesion_model_segment_image.argtypes = [
        *(pointer, size, pointer, number, number, step, number, pointer, step, pointer)
    ]
    return code


def has_int8() -> bool:
    """Whether this processor has dot products of bytes, as LESION_INT8 needs them."""
    return bool({"avx512_vnni", "avx_vnni", "asimddp"} & processor_features())


def processor_features() -> set[str]:
    """What the processor of this machine has, as Linux names it; empty elsewhere."""
    info = Path("/proc/cpuinfo")
    return set(info.read_text().split()) if info.exists() else set()


def for_this_machine() -> tuple[str, ...]:
    """Clang's options for a library for this processor."""
    wide = "avx512f" in processor_features()  # clang prefers 256 bits
    return (*_LIBRARY, "-mcpu=native", *(("-mprefer-vector-width=512",) if wide else ()))


def _sources() -> TemporaryDirectory[str]:
    folder = TemporaryDirectory()
    for name in SOURCES:
        (Path(folder.name) / name).write_text(source(name), encoding="utf-8")
    return folder


# Calls --------------------------------------------------------------------------------------------


def native_engine(model: np.ndarray, file: Path | None = None) -> Engine:
    """segment.c on this processor, with a model from `pack` or `pack_int8`."""
    int8 = model.dtype == np.uint32
    code = library(int8)
    spaces: dict[tuple[int, int], np.ndarray] = {}

    def segment(images: np.ndarray) -> np.ndarray:
        images, head = np.ascontiguousarray(images), (model.ctypes.data, model.nbytes)
        height, width = images.shape[1:3]
        masks = np.empty(images.shape[:3], np.uint8)
        if (height, width) not in spaces:
            spaces.clear()
            size = code.lesion_model_workspace_size(*head, height, width)
            spaces[height, width] = np.empty(size, np.uint8)
        space = spaces[height, width].ctypes.data
        for image, mask in zip(images, masks):
            pointers = image.ctypes.data, height, width, mask.ctypes.data, space
            _check(code.lesion_model_segment(*head, *pointers))
        return masks

    return Engine("native", "int8" if int8 else "float32", file, segment, model.nbytes)


def segment_image(model: np.ndarray, picture: np.ndarray, binary: bool = False) -> np.ndarray:
    """The mask image of a picture of any size by the C code: `lesion_segment_image`.

    (H, W, 3) uint8 -> (H, W) uint8: probability x 255, or 0 and 255 at the model's threshold.
    """
    code, picture = library(model.dtype == np.uint32), np.ascontiguousarray(picture)
    height, width = picture.shape[:2]
    mask, head = np.empty((height, width), np.uint8), (model.ctypes.data, model.nbytes)
    size = code.lesion_model_image_workspace_size(*head, width, height)
    space, kind = np.empty(size, np.uint8), 1 + 8 * binary
    pointers = picture.ctypes.data, width, height, 0, kind, mask.ctypes.data, 0, space.ctypes.data
    _check(code.lesion_model_segment_image(*head, *pointers))
    return mask


def _check(error: int) -> None:
    if error:
        raise LesionKDError(f"native: {library().lesion_error_string(error).decode()}")
