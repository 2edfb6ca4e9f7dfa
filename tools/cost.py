"""`make cost`: every network in every engine, in turns in one process on one core.

Writes cost.csv, cost.json (the environment, and the load before and after) and memory.csv to
data/results. Two more engines are measured where they can be had: OpenVINO if it is installed (pip
install openvino), and ONNX Runtime Web if ORT_WEB names the folder of the unpacked npm package
onnxruntime-web. REPEATS and SIZES change the number of turns and the image sides.
"""

import ctypes
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd

from lesionkd_core import results
from lesionkd_core.config import LesionKDError
from lesionkd_core.export import ExportConfig
from lesionkd_core.export.config import TIMED
from lesionkd_core.export.cost import NETWORKS, measure_cost
from lesionkd_core.export.formats import Format, register
from lesionkd_core.export.native import compile_c, for_this_machine
from lesionkd_core.export.onnx import write_onnx
from lesionkd_core.export.parity import Deployed, Engine
from tools.browser import Browser, InBrowser, InPage

RESULTS = results.CHECKOUT / "data" / "results"
SIZES = tuple(int(size) for size in os.environ.get("SIZES", "128,256,512").split(","))
REPEATS = int(os.environ.get("REPEATS", 10))
WEB = os.environ.get("ORT_WEB", "")
START = """async () => {
  const file = (id) => document.querySelector(id).files[0];
  ort.env.wasm.numThreads = 1;
  ort.env.wasm.wasmBinary = new Uint8Array(await file('#wasm').arrayBuffer());
  const glue = new Blob([file('#glue')], { type: 'text/javascript' });
  ort.env.wasm.wasmPaths = { mjs: URL.createObjectURL(glue) };
}"""
LOAD = """async () => {
  const bytes = new Uint8Array(await document.querySelector('#network').files[0].arrayBuffer());
  const session = await ort.InferenceSession.create(bytes, { executionProviders: ['wasm'] });
  window.session = session;
}"""
RUN = """(async () => {
  const tensor = new ort.Tensor('uint8', image, [1, pixels, pixels, 3]);
  await window.session.run({ image: tensor });
})()"""


class WebRuntime(Browser):
    """ONNX Runtime Web in one browser page."""

    run = RUN

    def open(self):
        """A page with ONNX Runtime."""
        page, dist = super().open(), Path(WEB) / "dist"
        page.set_content("".join(f"<input type=file id={i}>" for i in ("network", "wasm", "glue")))
        page.add_script_tag(path=dist / "ort.wasm.min.js")
        for part, ending in (("wasm", "wasm"), ("glue", "mjs")):
            page.set_input_files(f"#{part}", dist / f"ort-wasm-simd-threaded.{ending}")
        page.evaluate(START)
        return page

    def load(self, file):
        """Load an ONNX file."""
        self.call(self.page.set_input_files, "#network", file)
        self.call(self.page.evaluate, LOAD)


def onnx_file(network: Deployed, folder: Path) -> Path:
    """The ONNX file of a network; the engine onnx may have written it."""
    path = folder / "float32.onnx"
    if not path.exists():
        write_onnx(network, path)
    return path


class Peak(Format):
    """A loop of multiply-adds in registers: what one core can do. It is timed once a turn.

    The `size` of the engine is the number of multiply-adds of a run.
    """

    name, packages = "peak", ("ziglang",)
    done = False

    def timed(self, network, folder, images, int8) -> Iterator[Engine]:
        """Beside the first network."""
        if self.done:
            return
        self.done, rounds = True, 100_000
        compile_c(Path(__file__).with_name("peak.c"), folder / "peak.so", *for_this_machine())
        code = ctypes.CDLL(str(folder / "peak.so"))
        code.peak.argtypes = [ctypes.c_long, ctypes.c_float, ctypes.c_float]

        def loop(images: np.ndarray) -> np.ndarray:
            code.peak(rounds, 0.999, 0.001)
            return images

        yield Engine("peak", "float32", None, loop, 12 * rounds * code.lanes())


def with_share_of_peak(cost: pd.DataFrame) -> pd.DataFrame:
    """The table without the loop, with multiply-adds per second as a fraction of the loop's."""
    loop = cost["engine"] == "peak"
    best = (cost["bytes"] / cost["latency_ms_p10"])[loop].max()
    share = cost["macs"] / cost["latency_ms_min"] / best
    return cost.assign(share_of_peak=share)[~loop]


class OpenVino(Format):
    """OpenVINO on the CPU, as a yardstick."""

    name, packages = "openvino", ("openvino",)

    def timed(self, network, folder, images, int8) -> Iterator[Engine]:
        """One request for each size."""
        import openvino

        how = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32", "NUM_STREAMS": 1}
        file, requests = onnx_file(network, folder), {}
        for side in images:
            model = openvino.Core().read_model(file)
            model.reshape({"image": [1, side, side, 3]})
            requests[side] = openvino.Core().compile_model(model, "CPU", how).create_infer_request()

        def segment(images: np.ndarray) -> np.ndarray:
            requests[images.shape[1]].infer({"image": images})
            return images

        yield Engine("OpenVINO", "float32", file, segment)


class OnnxRuntimeWeb(InPage):
    """ONNX Runtime Web in Chromium, as a yardstick."""

    name, packages = "onnx-web", ()

    def timed(self, network, folder, images, int8) -> Iterator[Engine]:
        """One browser for each network."""
        web, file = WebRuntime(), onnx_file(network, folder)
        self.opened.append(web)
        web.load(file)
        name = "browser (ONNX Runtime Web)"
        yield InBrowser(name, "float32", file, lambda x: x, browser=web)


def peak_memory(file: Path, pixels: int) -> float:
    """Peak of a fresh process that loads an ONNX file and segments one image, MiB.

    The memory of ONNX Runtime itself is not counted.
    """
    code = (
        "import re, sys, numpy as np, onnxruntime as ort\n"
        "def status(name): return int(re.search(name + r':\\s+(\\d+)', "
        "open('/proc/self/status').read())[1])\n"
        "open('/proc/self/clear_refs', 'w').write('5')\n"  # resets the peak
        "before, side = status('VmRSS'), int(sys.argv[2])\n"
        "options = ort.SessionOptions(); options.intra_op_num_threads = 1\n"
        "session = ort.InferenceSession(sys.argv[1], options, providers=['CPUExecutionProvider'])\n"
        "session.run(None, {'image': np.zeros((1, side, side, 3), np.uint8)})\n"
        "print(status('VmHWM') - before)"
    )
    if not Path("/proc/self/clear_refs").exists():
        raise LesionKDError("peak memory is read from /proc, which this system lacks; use Linux")
    command = [sys.executable, "-c", code, str(file), str(pixels)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout) / 1024


def memory(pixels):
    """Peak of a fresh process that segments one image in ONNX Runtime, MiB."""
    rows = []
    with TemporaryDirectory() as folder:
        file = Path(folder) / "network.onnx"
        for name, build in NETWORKS.items():
            write_onnx(Deployed(build()), file)
            about = {"model": name, "engine": "ONNX Runtime", "precision": "float32"}
            rows += [about | {"pixels": s, "peak_mib": peak_memory(file, s)} for s in pixels]
    return pd.DataFrame(rows)


def environment():
    """Processor, versions and load."""
    info = Path("/proc/cpuinfo").read_text()
    found = {name: set(re.findall(rf"^{name}\s*: (.+)$", info, re.M)) for name in ("flags",)}
    model = re.findall(r"^(?:vendor_id|cpu family|model|model name)\s*: (.+)$", info, re.M)[:4]
    flags = " ".join(found["flags"]).split()
    packages = ("onnxruntime", "executorch", "openvino", "ziglang", "playwright")
    return results.environment(ExportConfig()) | {
        "processor": ", ".join(model),
        "vectors": sorted({f for f in flags if f.startswith(("avx512f", "avx2", "fma", "amx_"))}),
        "load_before": os.getloadavg(),
        "engines": {name: version(name) for name in packages if find_spec(name)},
        "onnxruntime-web": WEB and results.read_json(Path(WEB) / "package.json")["version"],
    }


if __name__ == "__main__":
    engines = [*TIMED]
    yardsticks = (
        (Peak, True),
        (InPage, True),
        (OpenVino, find_spec("openvino")),
        (OnnxRuntimeWeb, WEB),
    )
    for kind, there in yardsticks:
        if there:
            register(kind)
            engines.append(kind.name)
    about = environment()
    cost = with_share_of_peak(measure_cost(SIZES, tuple(engines), repeats=REPEATS))
    for browser in InPage.opened:
        browser.close()
    results.write_table(RESULTS / "cost.csv", cost)
    results.write_table(RESULTS / "memory.csv", memory(SIZES))
    results.write_json(RESULTS / "cost.json", about | {"load_after": os.getloadavg()})
    exact = cost[cost["precision"] == "float32"]
    times = exact.pivot_table("latency_ms_min", ["engine", "pixels"], "model", sort=False)
    print(times.to_string())
    fastest = exact.groupby(["pixels", "model"])["latency_ms_min"].min().unstack()
    for side, row in fastest.iterrows():
        student = exact.query("model == 'student' and engine == 'native' and pixels == @side")
        share = student["share_of_peak"].item()
        times = row["unet64"] / student["latency_ms_min"].item()
        print(f"{side} px: U-Net 64 / student in C {times:.0f}, share of peak {100 * share:.0f} %")
