"""The student as C: the same function as in PyTorch, for any picture, compiler and processor."""

import ctypes
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lesionkd_core.data.pixels import prepare_image
from lesionkd_core.export.native import (
    compile_c,
    has_int8,
    library,
    native_engine,
    pack,
    pack_int8,
    processor_features,
    segment_image,
    student_header,
    write_native,
)
from lesionkd_core.export.parity import Deployed, torch_engine
from lesionkd_core.predict import TrainedNetwork
from tests.conftest import ROOT
from tests.fixed import fixed_run, gap, mask_of, noise, picture_of, undecided, unet

HERE, EXAMPLES = Path(__file__).parent / "native", ROOT / "examples"
SOURCE = ROOT / "lesionkd_core" / "export" / "native"
QEMU = shutil.which("qemu-aarch64")
ZIG = (sys.executable, "-m", "ziglang", "cc")
AARCH64 = ("-target", "aarch64-linux-musl", "-static")
STRICT = ("-Wall", "-Wextra", "-Wconversion", "-Werror")
FORMATS = ("GRAY", "RGB", "BGR", "RGBA", "BGRA")
needs_qemu = pytest.mark.skipif(not QEMU, reason="no qemu-aarch64: apt-get install qemu-user")


@pytest.fixture(scope="module")
def student():
    return fixed_run()


@pytest.fixture(scope="module")
def model(student):
    return pack(Deployed(student.network), 64)


@pytest.fixture(scope="module")
def folder(student, model, tmp_path_factory):
    """The files of an export."""
    path, picture = tmp_path_factory.mktemp("native"), picture_of(160, 128)
    images = np.stack([picture_of(64, 64, seed) for seed in range(16)])
    models = [model, pack_int8(Deployed(student.network), 64, "stretch", 0.5, images)]
    write_native(models, path, picture, mask_of(student, picture))
    return path


def build(compiler, out, *options):
    options = [*map(str, options), "-o", str(out)]
    done = subprocess.run([*compiler, *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


def said(*command, code=0):
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


# The same function --------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [4, 8, 12, 20])
def test_every_width_is_pytorch_within_one_step(width):
    network = undecided(unet(width=width), noise(1, 64, 64), spread=2)
    engine = native_engine(pack(network, 64))
    for height, columns in ((32, 32), (64, 96), (128, 32), (160, 224)):
        images = noise(1, height, columns, seed=height)
        expected = torch_engine(network)(images)
        assert gap(engine(images), expected) <= 1, (height, columns)
        assert expected.std() > 20, "a mask of one value would show nothing"


@cache
def prepare_square():
    code = HERE / "prepare.c"
    out = HERE.parent / f".prepare-{os.getpid()}.so"
    compile_c(code, out, f"-I{SOURCE}", "-DLESION_NO_STUDENT", "-mcpu=native", "-shared", "-fPIC")
    function = ctypes.CDLL(str(out)).prepare_square
    out.unlink()
    pointer, number = ctypes.c_void_p, ctypes.c_int
    function.argtypes = [pointer, ctypes.c_size_t, pointer, number, number, number, pointer]
    return function


@pytest.mark.parametrize("seed", range(4))
def test_pictures_are_prepared_as_in_training_to_the_byte(student, seed):
    """Against Pillow, at 50 random sizes, sides, fits and orders of colours each."""
    random, network = np.random.default_rng(seed), Deployed(student.network)
    for _ in range(50):
        side, fit = int(random.choice([32, 64, 128, 256])), str(random.choice(["stretch", "pad"]))
        width, height = np.exp(random.uniform(0, np.log(900), 2)).astype(int).tolist()
        order = int(random.integers(1, 5))
        picture = random.integers(0, 256, (height, width, 3 + (order > 2)), dtype=np.uint8)
        colours = picture[..., 2::-1] if "BGR" in FORMATS[order] else picture[..., :3]
        cfg = student.cfg.with_values(pixels=side, fit=fit)
        expected = prepare_image(np.ascontiguousarray(colours), cfg)
        square, packed = np.empty((side, side, 4), np.uint8), pack(network, side, fit)
        pointers = packed.ctypes.data, packed.nbytes, picture.ctypes.data
        prepare_square()(*pointers, width, height, order, square.ctypes.data)
        found = square[..., 2::-1] if "BGR" in FORMATS[order] else square[..., :3]
        np.testing.assert_array_equal(found, expected, err_msg=f"{width} x {height} -> {side}")


@pytest.mark.parametrize("fit", ["stretch", "pad"])
@pytest.mark.parametrize("size", [(64, 64), (640, 480), (90, 301), (1, 1), (33, 700), (2000, 20)])
def test_the_mask_of_any_picture_is_that_of_predict_within_one_step(student, fit, size):
    other = TrainedNetwork(student.network, student.cfg.with_values(fit=fit), student.path)
    packed, picture = pack(Deployed(student.network), 64, fit, 0.3), picture_of(*size)
    [probability] = other.predict([picture])
    assert gap(segment_image(packed, picture), np.rint(255 * probability)) <= 1
    differs = (segment_image(packed, picture, binary=True) == 255) != (probability > 0.3)
    assert differs.mean() < 1e-3


def call(model, pixels, width, height, stride=0, order=1, mask=None, mask_stride=0, code=None):
    """The return code of lesion_model_segment_image, and the mask."""
    code, head = code or library(), (model.ctypes.data, model.nbytes)
    size = code.lesion_model_image_workspace_size(*head, width, height)
    mask = np.zeros((max(height, 1), mask_stride or max(width, 1)), np.uint8)
    space = np.empty(max(size, 1), np.uint8)
    about = pixels.ctypes.data, width, height, stride, order, mask.ctypes.data, mask_stride
    return code.lesion_model_segment_image(*head, *about, space.ctypes.data), mask


def test_gray_alpha_gaps_and_upside_down_pictures_are_the_same_picture(model):
    rgb = picture_of(150, 100)
    gray = rgb.copy()
    gray[...] = rgb[..., :1]
    alpha = np.dstack([rgb, noise(1, 100, 150)[0, ..., :1]])
    expected, expected_gray = segment_image(model, rgb), segment_image(model, gray)
    assert expected.std() > 20
    wide = np.zeros((100, 200, 4), np.uint8)
    wide[:, :150] = alpha
    upside_down = np.ascontiguousarray(rgb[::-1])
    for pixels, stride, order, mask in (
        (np.ascontiguousarray(gray[..., 0]), 0, 0, expected_gray),
        (np.ascontiguousarray(rgb[..., ::-1]), 450, 2, expected),
        (wide, 800, 3, expected),
        (np.ascontiguousarray(wide[..., [2, 1, 0, 3]]), 800, 4, expected),
        (upside_down[99:], -450, 1, expected),
    ):
        error, found = call(model, pixels, 150, 100, stride, order, mask_stride=170)
        assert error == 0
        np.testing.assert_array_equal(found[:, :150], mask)
        assert not found[:, 150:].any(), "written into the gap"


def test_four_threads_at_once_give_the_same_masks(model):
    pictures = [picture_of(200 + i, 150, seed=i) for i in range(8)]
    expected = [segment_image(model, picture) for picture in pictures]
    with ThreadPoolExecutor(4) as pool:
        found = [*pool.map(lambda i: segment_image(model, pictures[i % 8]), range(64))]
    assert all(np.array_equal(mask, expected[i % 8]) for i, mask in enumerate(found))


# Compilers and processors -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def others(student, tmp_path_factory):
    """Students of sides whose maps end within a vector, a picture, and its masks in PyTorch."""
    path, found = tmp_path_factory.mktemp("others"), []
    Image.fromarray(picture_of(150, 110)).save(path / "photo.ppm")
    for width, side in ((4, 96), (8, 224)):
        network = undecided(unet(width=width), noise(1, 64, 64), spread=2)
        pack(network, side).tofile(path / f"{side}.bin")
        other = TrainedNetwork(network.network, student.cfg.with_values(pixels=side), path)
        found.append((path / f"{side}.bin", mask_of(other, picture_of(150, 110))))
    return path / "photo.ppm", found


def check_program(program, others, tmp_path, most=1):
    """examples/c/segment_ppm with the golden picture, and with other students."""
    if most == 1:  # otherwise it calls the difference an error
        assert said(*program).startswith(("largest difference 0", "largest difference 1"))
    photo, found = others
    for file, expected in found:
        said(*program, photo, tmp_path / "mask.pgm", file)
        assert gap(np.asarray(Image.open(tmp_path / "mask.pgm")), expected) <= most, file.name


SOAK = pytest.mark.soak
COMPILERS = [
    pytest.param(name, standard, level, marks=() if (standard, level) in usual else SOAK)
    for name, usual in (("gcc", {("c11", "-O2")}), ("clang", ()), ("zig", {("c11", "-O0")}))
    for standard in ("c11", "gnu11")
    for level in ("-O0", "-O2", "-O3", "-Os")
]


@pytest.mark.parametrize(("name", "standard", "level"), COMPILERS)
def test_any_compiler_and_flags_give_the_golden_mask_without_warnings(
    folder, others, tmp_path, name, standard, level
):
    """zig cc adds checks for undefined behaviour at -O0, and stops at the first."""
    if name != "zig" and not shutil.which(name):
        pytest.skip(f"{name} is not installed")
    compiler = ZIG if name == "zig" else (name,)
    sources = EXAMPLES / "c" / "segment_ppm.c", folder / "segment.c", f"-I{folder}"
    for processor in ("-mcpu=baseline", "-mcpu=native") if name == "zig" else ("", "-march=native"):
        flags = [f"-std={standard}", level, *STRICT, *processor.split()]
        program = build(compiler, tmp_path / "run", *flags, *sources)
        check_program([program], others, tmp_path)


def test_it_compiles_as_cpp_without_warnings(folder, tmp_path):
    flags = ("-x", "c++", "-std=c++17", "-O2", *STRICT, "-c", folder / "segment.c")
    build((*ZIG[:3], "c++"), tmp_path / "a.o", *flags)
    if shutil.which("g++"):
        build(("g++",), tmp_path / "b.o", "-march=native", *flags)


@pytest.mark.parametrize(
    ("compiler", "flags"),
    [
        (("gcc",), ("-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")),
        pytest.param(
            *(("gcc",), ("-O2", "-march=native", "-fsanitize=address,undefined")), marks=SOAK
        ),
        (("clang",), ("-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")),
        (ZIG, ("-O0", "-fsanitize=undefined")),  # ziglang has no runtime for addresses
    ],
    ids=lambda value: value[-1] if len(value) == 1 else value[0],
)
def test_sanitizers_find_nothing_at_random_sizes(tmp_path, compiler, flags):
    if not shutil.which(compiler[0]):
        pytest.skip(f"{compiler[0]} is not installed")
    wide = [Deployed(unet(width=w)) for w in (4, 8)]
    sizes = {"": [pack(network, 32) for network in wide]}
    if "-march=native" in flags and has_int8():
        images = noise(1, 32, 32)
        sizes["-DLESION_INT8"] = [pack_int8(n, 32, "stretch", 0.5, images) for n in wide]
    for kind, models in sizes.items():
        options = ("-g", *flags, *kind.split(), "-DLESION_NO_STUDENT", f"-I{SOURCE}")
        sources = HERE / "fuzz.c", SOURCE / "segment.c"
        program = build(compiler, tmp_path / "fuzz", *options, *sources)
        words = [str(value) for model in zip((4, 8), map(len, models)) for value in model]
        assert said(program, 24, *words) == "24 trials\n"


@needs_qemu
@pytest.mark.soak
@pytest.mark.parametrize(
    "flags", ["", "v8_2a+fullfp16 -DLESION_HALF", "v8_2a+dotprod -DLESION_INT8"]
)
def test_emulated_aarch64_computes_the_masks_in_float_half_and_bytes(
    folder, others, tmp_path, flags
):
    sources = EXAMPLES / "c" / "segment_ppm.c", folder / "segment.c", f"-I{folder}"
    flags = [f"-mcpu=generic+{word}" if word[0] == "v" else word for word in flags.split()]
    program = build(ZIG, tmp_path / "run", "-O2", *AARCH64, *STRICT, *flags, *sources)
    if "-DLESION_INT8" in flags:
        golden = np.asarray(said(QEMU, program).split()[2:6:3], int)
        assert golden[1] < 200
    else:
        check_program([QEMU, program], others, tmp_path, most=32 if flags else 1)


def test_the_builds_of_an_export_are_for_their_processors(folder):
    for name, machine in {"x86_64": 62, "arm64-v8a": 183}.items():  # ELF's numbers
        file = folder / name / "liblesion.so"
        content = file.read_bytes()
        assert content[:4] == b"\x7fELF"
        assert int.from_bytes(content[18:20], "little") == machine
        assert len(content) < 400_000
        if shutil.which("readelf"):
            about = said("readelf", "-dlW", file)
            assert "[liblesion.so]" in about
            loads = [line for line in about.splitlines() if line.split()[:1] == ["LOAD"]]
            assert loads and all(line.endswith("0x4000") for line in loads)
            assert "NEEDED" not in about
            symbols = said("readelf", "--dyn-syms", "-W", file).splitlines()
            assert [s for s in symbols if "UND" in s and "GLOBAL" in s] == []
    object_file = (folder / "ios-arm64" / "lesion.o").read_bytes()
    assert object_file[:4] == b"\xcf\xfa\xed\xfe"  # Mach-O, 64 bit
    # load command LC_BUILD_VERSION (0x32), 24 bytes, platform iOS (2), oldest version 13.0
    assert bytes([0x32, 0, 0, 0, 24, 0, 0, 0, 2, 0, 0, 0, 0, 0, 13, 0]) in object_file


@pytest.mark.skipif(not {"avx2", "fma"} <= processor_features(), reason="x86-64 needs AVX2")
def test_the_x86_64_library_of_an_export_computes_the_mask(student, folder):
    code = ctypes.CDLL(str(folder / "x86_64" / "liblesion.so"))
    code.lesion_image_workspace_size.restype = ctypes.c_size_t
    picture, mask = picture_of(300, 200), np.zeros((200, 300), np.uint8)
    seen, out = (ctypes.c_void_p(pixels.ctypes.data) for pixels in (picture, mask))
    space = ctypes.create_string_buffer(code.lesion_image_workspace_size(300, 200))
    no_gap, rgb = ctypes.c_ssize_t(0), FORMATS.index("RGB")
    error = code.lesion_segment_image(seen, 300, 200, no_gap, rgb, out, no_gap, space)
    assert error == 0 and gap(mask, mask_of(student, picture)) <= 1


# Callers ------------------------------------------------------------------------------------------


def test_the_c_caller_turns_a_picture_file_into_a_mask_file(student, model, folder, tmp_path):
    sources = EXAMPLES / "c" / "segment_ppm.c", folder / "segment.c", f"-I{folder}"
    program = build(ZIG, tmp_path / "run", "-O2", *STRICT, *sources)
    picture = picture_of(300, 200)
    Image.fromarray(picture).save(tmp_path / "photo.ppm")
    Image.fromarray(picture[..., 0]).save(tmp_path / "gray.pgm")
    gray = np.repeat(picture[..., :1], 3, axis=2)
    for name, colours in (("photo.ppm", picture), ("gray.pgm", gray)):
        said(program, tmp_path / name, tmp_path / "mask.pgm")
        assert gap(np.asarray(Image.open(tmp_path / "mask.pgm")), mask_of(student, colours)) <= 1

    other = pack(Deployed(unet(width=8)), 96)
    other.tofile(tmp_path / "other.bin")
    said(program, tmp_path / "photo.ppm", tmp_path / "mask.pgm", tmp_path / "other.bin")
    assert gap(np.asarray(Image.open(tmp_path / "mask.pgm")), segment_image(other, picture)) <= 1
    other[-1] += 1
    other.tofile(tmp_path / "other.bin")
    command = program, tmp_path / "photo.ppm", tmp_path / "mask.pgm", tmp_path / "other.bin"
    assert "the model is damaged" in said(*command, code=1)
    (tmp_path / "photo.ppm").write_bytes((tmp_path / "photo.ppm").read_bytes()[:-1])
    assert "cut off" in said(program, tmp_path / "photo.ppm", tmp_path / "mask.pgm", code=1)


def test_two_students_live_in_one_app(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "skin")
    (tmp_path / "breast").mkdir()
    other = pack(Deployed(unet(width=8)), 256, threshold=0.4)
    (tmp_path / "breast" / "student.h").write_text(student_header(other))
    code = EXAMPLES / "c" / "two_students.c", tmp_path / "skin" / "segment.c"
    flags = *STRICT, "-DLESION_NO_STUDENT", f"-I{tmp_path}", f"-I{tmp_path / 'skin'}"
    assert said(build(ZIG, tmp_path / "run", "-O2", *flags, *code)) == (
        "skin: no error, 64 px, threshold 0.50\nbreast: no error, 256 px, threshold 0.40\n"
    )


JAVA = """
import java.nio.*; import java.nio.file.*; import org.example.Lesion;
public class Main { public static void main(String[] a) throws Exception {
    System.out.println(Lesion.goldenDifference());
    byte[] rgb = Files.readAllBytes(Path.of(a[0]));
    ByteBuffer pixels = ByteBuffer.allocateDirect(rgb.length); pixels.put(rgb);
    Lesion lesion = new Lesion(); byte[] mask = new byte[300 * 200];
    for (int i = 0; i < 3; i++) lesion.segment(pixels, 300, 200, 0, Lesion.RGB).get(0, mask);
    Files.write(Path.of(a[1]), mask);
    try { lesion.segment(pixels, 300, 201, 0, Lesion.RGB); }
    catch (IllegalArgumentException e) { System.out.println(e.getMessage()); }
} }
"""


def test_the_android_caller_works_in_a_java_virtual_machine(student, folder, tmp_path, monkeypatch):
    headers = sorted(Path("/usr/lib/jvm").glob("*/include/jni.h"))
    if not headers or not shutil.which("javac"):
        pytest.skip("the Java caller needs a JDK, which is not installed")
    include, code = headers[0].parent, EXAMPLES / "android" / "lesion_jni.c"
    flags = f"-I{include}", f"-I{include}/linux", f"-I{folder}", "-O2", "-shared", "-fPIC", *STRICT
    build(ZIG, tmp_path / "liblesion.so", *flags, code, folder / "segment.c")
    (tmp_path / "Main.java").write_text(JAVA)
    said("javac", "-d", tmp_path, EXAMPLES / "android" / "Lesion.java", tmp_path / "Main.java")
    picture = picture_of(300, 200)
    (tmp_path / "rgb").write_bytes(picture.tobytes())
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    java = "java", "-cp", tmp_path, "Main"
    golden, message = said(*java, tmp_path / "rgb", tmp_path / "mask").splitlines()
    assert golden in "01"
    assert message == "the buffer has fewer pixels than width, height and stride say"
    mask = np.fromfile(tmp_path / "mask", np.uint8).reshape(200, 300)
    assert gap(mask, mask_of(student, picture)) <= 1


# Errors -------------------------------------------------------------------------------------------


@pytest.mark.fault
def test_every_error_has_its_code_and_words(model):
    pixels, rgb = np.zeros((64, 64, 4), np.uint8), 1
    words = [library().lesion_error_string(code).decode() for code in range(9)]
    assert len(set(words)) == 9 and words[8] == "unknown error"

    def damaged(position, value):
        changed = model.copy()
        changed[position] = value
        return library().lesion_model_check(changed.ctypes.data, changed.nbytes)

    assert call(model, pixels, 64, 64)[0] == 0
    assert library().lesion_model_check(None, 0) == 1
    assert {call(model, pixels, *size)[0] for size in ((0, 9), (9, -1))} == {2}
    assert call(model, pixels, 16385, 1)[0] == 3
    wrong = [(0, 1), (0, np.nan), (1, 5), (1, 0), (1, 128), (2, 33), (2, np.inf), (4, 0), (4, 1)]
    assert {damaged(*change) for change in wrong} == {4}
    assert {damaged(1, 8), damaged(5, 7)} == {5}  # another architecture
    counts = [library().lesion_model_check(model.ctypes.data, 4 * n) for n in (0, 12, 13)]
    assert counts == [4, 4, 5]
    assert {damaged(40, v) for v in (np.nan, np.inf, 9.0)} == {damaged(6, 9), damaged(2, 96)} == {6}
    assert {call(model, pixels, 64, 64, order=order)[0] for order in (5, -1, 7, 16)} == {7}
    assert call(model, pixels, 64, 64, stride=100, order=rgb)[0] == 7
    for height, columns, code in ((33, 64, 2), (64, 4128, 3)):
        head = (model.ctypes.data, model.nbytes, pixels.ctypes.data, height, columns)
        mask, space = np.full(9, 7, np.uint8), np.full(9, 7, np.uint8)
        assert library().lesion_model_segment(*head, mask.ctypes.data, space.ctypes.data) == code
        assert (mask == 7).all() and (space == 7).all(), "written on an error"
