"""The student as C: the same function as in PyTorch, on two processors, within its memory."""

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from lesionkd_core import results
from lesionkd_core.config import LesionKDError
from lesionkd_core.data.prepare import prepare
from lesionkd_core.export.native import (
    ERRORS,
    compile_c,
    library,
    native_engine,
    pack,
    wasm,
    write_native,
)
from lesionkd_core.export.parity import Deployed, torch_engine
from tests.fixed import CFG, fixed_run, noise, undecided, unet

HERE = Path(__file__).parent / "native"
QEMU = shutil.which("qemu-aarch64")
STATIC = ("-target", "aarch64-linux-musl", "-static")


@pytest.fixture(scope="module")
def network():
    return Deployed(fixed_run().network)


@pytest.fixture(scope="module")
def data():
    return prepare(CFG)


@pytest.fixture(scope="module")
def folder(network, data, tmp_path_factory):
    """The files of an export."""
    path = tmp_path_factory.mktemp("native")
    write_native(network, path, data.images[data.index("test")[0]])
    return path


def build(folder, out, *options, code=HERE / "run.c"):
    compile_c(code, out, f"-I{folder}", str(folder / "segment.c"), *options)
    return out


def segmented(command, images):
    about = np.array(images.shape[:3], np.int32).tobytes()
    done = subprocess.run(command, input=about + images.tobytes(), capture_output=True)
    assert done.returncode == 0
    return np.frombuffer(done.stdout, np.uint8).reshape(images.shape[:3])


def snippet(language: str) -> str:
    """The caller in a language of docs/mobile.md."""
    text = (results.CHECKOUT / "docs" / "mobile.md").read_text(encoding="utf-8")
    [code] = re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)
    return code


# The same function --------------------------------------------------------------------------------


@pytest.mark.parametrize("stem", [1, 2, 4])
@pytest.mark.parametrize("width", [4, 8, 12, 20])
def test_every_width_and_stem_is_pytorch_within_one_step(width, stem):
    network = undecided(unet(width=width, stem=stem), noise(1, 64, 64), spread=2)
    engine = native_engine(pack(network))
    for height, columns in ((32, 32), (64, 96), (128, 32), (160, 224)):
        images = noise(1, height, columns, seed=height)
        expected = torch_engine(network)(images)
        assert np.abs(engine(images).astype(int) - expected).max() <= 1, (height, columns)
        assert expected.std() > 20, "a mask of one value would show nothing"


def test_the_fixed_student_is_pytorch_on_test_cases(network, data):
    images = data.images[data.index("test")]
    gap = np.abs(native_engine(pack(network))(images).astype(int) - torch_engine(network)(images))
    assert gap.max() <= 1


def test_the_written_files_are_pytorch_on_the_baseline_processor(network, data, folder, tmp_path):
    """Built as a user without options would, for any x86-64 or arm64."""
    images = np.asarray(data.images[data.index("test")])
    program = build(folder, tmp_path / "run", "-mcpu=baseline")
    gap = np.abs(segmented([program], images).astype(int) - torch_engine(network)(images))
    assert gap.max() <= 1


@pytest.mark.skipif(not QEMU, reason="aarch64 is emulated by qemu-user: apt-get install qemu-user")
def test_aarch64_is_pytorch_on_test_cases(network, data, folder, tmp_path):
    images = np.asarray(data.images[data.index("test")[:4]])
    program = build(folder, tmp_path / "run", *STATIC)
    gap = np.abs(segmented([QEMU, program], images).astype(int) - torch_engine(network)(images))
    assert gap.max() <= 1


@pytest.mark.skipif(not QEMU, reason="aarch64 is emulated by qemu-user: apt-get install qemu-user")
@pytest.mark.parametrize("stem", [2, 4])
def test_aarch64_takes_a_stem_and_narrow_images(stem, data, tmp_path):
    images = noise(1, 96, 32)
    network = undecided(unet(width=8, stem=stem), images, spread=2)
    write_native(network, tmp_path, data.images[0])
    program = build(tmp_path, tmp_path / "run", *STATIC)
    gap = np.abs(segmented([QEMU, program], images).astype(int) - torch_engine(network)(images))
    assert gap.max() <= 1


# Callers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "runner", [(), pytest.param((QEMU,), marks=pytest.mark.skipif(not QEMU, reason="no qemu-user"))]
)
def test_the_caller_of_the_manual_reproduces_the_golden_mask(folder, tmp_path, runner):
    (tmp_path / "caller.c").write_text(snippet("c"))
    program = build(
        folder, tmp_path / "run", *(STATIC if runner else ()), code=tmp_path / "caller.c"
    )
    done = subprocess.run([*runner, program], capture_output=True, text=True)
    assert re.fullmatch(r"largest difference [01] of 255\n", done.stdout)
    assert done.returncode == 0
    golden = (folder / "golden.h").read_text()
    changed = tmp_path / "changed"
    shutil.copytree(folder, changed)
    (changed / "golden.h").write_text(
        re.sub(r"(golden_mask_bytes\[.*?\] = \{\n)\d+,", r"\g<1>99,", golden)
    )
    program = build(changed, tmp_path / "run", code=tmp_path / "caller.c")
    assert subprocess.run([program], capture_output=True).returncode == 1


def test_the_android_caller_compiles(folder, tmp_path):
    found = sorted(Path("/usr/lib/jvm").glob("*/include/jni.h"))
    if not found:
        pytest.skip("jni.h is part of a JDK, which is not installed")
    (tmp_path / "jni.c").write_text(snippet("c jni"))
    include = found[0].parent
    options = ("-Wall", "-Werror", "-c", f"-I{include}", f"-I{include}/linux", f"-I{folder}")
    compile_c(tmp_path / "jni.c", tmp_path / "jni.o", "-target", "aarch64-linux-musl", *options)


def test_the_ios_caller_calls_what_the_header_declares(folder):
    """Where there is no Swift compiler, at least its functions exist."""
    code, header = snippet("swift"), (folder / "segment.h").read_text()
    called = set(re.findall(r"\b(lesion_\w+)\(", code))
    assert called
    assert all(f"{name}(" in header for name in called)
    if swift := shutil.which("swiftc"):
        (folder / "caller.swift").write_text(code)
        command = [swift, "-parse", str(folder / "caller.swift")]
        assert subprocess.run(command, capture_output=True).returncode == 0


@pytest.mark.parametrize("language", ["c", "c++"])
def test_it_compiles_without_warnings_as_c_and_as_cpp(folder, tmp_path, language):
    standard = "-std=c11" if language == "c" else "-std=c++17"
    options = ("-x", language, standard, "-Wall", "-Wextra", "-Werror", "-c")
    compile_c(folder / "segment.c", tmp_path / "segment.o", *options)


def test_the_builds_of_an_export_are_for_their_processors(folder):
    machines = {"linux-x86_64.so": 62, "linux-aarch64.so": 183}  # ELF's numbers
    for name, machine in machines.items():
        content = (folder / name).read_bytes()
        assert content[:4] == b"\x7fELF"
        assert int.from_bytes(content[18:20], "little") == machine
        assert len(content) < 400_000
    assert (folder / "ios-aarch64.o").read_bytes()[:4] == b"\xcf\xfa\xed\xfe"  # Mach-O, 64 bit


def test_webassembly_needs_nothing_from_its_host():
    """No imports: section 2 is absent."""
    for code in (wasm(), wasm(relaxed=True)):
        at, sections = 8, []
        while at < len(code):
            sections.append(code[at])
            at, size, shift = at + 1, 0, 0
            while True:
                size |= (code[at] & 127) << shift
                at, shift = at + 1, shift + 7
                if code[at - 1] < 128:
                    break
            at += size
        assert 2 not in sections
        assert 7 in sections, "exports"
    assert wasm() != wasm(relaxed=True)


# Memory and errors --------------------------------------------------------------------------------


def test_sanitizers_find_nothing_at_random_sizes_widths_and_stems(tmp_path, folder):
    gcc = shutil.which("gcc")
    if not gcc:
        pytest.skip("gcc has the address sanitizer, which the clang of ziglang lacks")
    models = [
        (w, s, len(pack(Deployed(unet(width=w, stem=s))))) for w in (4, 8, 12) for s in (1, 2, 4)
    ]
    sanitizers = [
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover=all",
        "-DLESION_NO_STUDENT",
    ]
    command = [gcc, "-std=gnu11", "-O3", "-g", *sanitizers, f"-I{folder}", "-o", tmp_path / "fuzz"]
    subprocess.run([*command, HERE / "fuzz.c", folder / "segment.c"], check=True)
    arguments = [str(value) for model in models for value in model]
    done = subprocess.run([tmp_path / "fuzz", "200", *arguments], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "200 trials\n"), done.stdout + done.stderr


def code_of(model, height=64, width=64, count=None, image=True, mask=True, workspace=True):
    """The return code of a call; pointers are real or null."""
    space = np.empty(2**22, np.uint8)
    pointers = [space.ctypes.data if given else None for given in (image, mask, workspace)]
    head = None if model is None else model.ctypes.data
    count = len(model) if count is None and model is not None else count or 0
    size = library().lesion_model_workspace_size(head, count, height, width)
    if size > space.nbytes:
        return "workspace"
    first, second, third = pointers
    code = library().lesion_model_segment(head, count, first, height, width, second, third)
    assert (size == 0) == (code not in (0, 1) or model is None)
    return code


@pytest.mark.fault
def test_every_error_has_its_code(network):
    model = pack(network)
    assert code_of(model) == 0
    assert code_of(None) == code_of(model, image=False) == 1
    assert code_of(model, mask=False) == code_of(model, workspace=False) == 1
    sizes = ((33, 64), (64, 33), (0, 64), (64, -32), (16, 64))
    assert {code_of(model, *size) for size in sizes} == {2}
    assert code_of(model, 4128, 32) == code_of(model, 32, 4128) == 3
    for position, value in ((0, 2), (0, np.nan), (1, 5), (1, 0), (1, 128), (2, 3), (2, np.inf)):
        changed = model.copy()
        changed[position] = value
        assert code_of(changed) == 4, (position, value)
    assert code_of(model, count=0) == code_of(model, count=9) == 4  # a truncated header
    assert code_of(model, count=10) == code_of(model, count=len(model) - 1) == 5
    assert code_of(np.append(model, 0).astype(np.float32)) == 5
    changed = model.copy()
    changed[1] = 8  # another architecture
    assert code_of(changed) == 5
    assert set(ERRORS) == {1, 2, 3, 4, 5}


@pytest.mark.fault
def test_nothing_is_written_on_an_error(network):
    model, mask = pack(network), np.full((64, 64), 7, np.uint8)
    space = np.full(2**22, 7, np.uint8)
    image = noise(1, 64, 64)[0]
    for count, height in ((len(model) - 1, 64), (len(model), 33)):
        head = (model.ctypes.data, count, image.ctypes.data, height, 64)
        assert library().lesion_model_segment(*head, mask.ctypes.data, space.ctypes.data)
    assert (mask == 7).all()
    assert (space == 7).all()


@pytest.mark.fault
def test_a_compiler_error_is_passed_on(tmp_path):
    (tmp_path / "wrong.c").write_text("int f(void) { return 1 }\n")
    with pytest.raises(LesionKDError, match=r"wrong.c could not be compiled:\n(.|\n)*expected ';'"):
        compile_c(tmp_path / "wrong.c", tmp_path / "wrong.o", "-c")


def test_a_library_may_be_used_by_several_threads_at_once(network):
    """Calls with workspaces of their own do not share anything."""
    from concurrent.futures import ThreadPoolExecutor

    model, image = pack(network), noise(1, 128, 128)[0]
    size = library().lesion_model_workspace_size(model.ctypes.data, len(model), 128, 128)

    def run(_):
        mask, space = np.empty((128, 128), np.uint8), ctypes.create_string_buffer(size)
        head = (model.ctypes.data, len(model), image.ctypes.data, 128, 128)
        assert library().lesion_model_segment(*head, mask.ctypes.data, ctypes.addressof(space)) == 0
        return mask

    with ThreadPoolExecutor(4) as pool:
        first, *rest = pool.map(run, range(32))
    assert all((mask == first).all() for mask in rest)
