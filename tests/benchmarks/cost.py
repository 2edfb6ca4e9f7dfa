"""`make cost`: every network in every engine, in turns in one process on one core.

Writes cost.csv, cost.json (the environment) and memory.csv to data/results. Two more engines are
measured where they can be had: OpenVINO if it is installed (pip install openvino), and ONNX Runtime
Web if ORT_WEB names the folder of the unpacked npm package onnxruntime-web.
"""

import os
import re
import subprocess
import sys
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd

from lesionkd_core import results
from lesionkd_core.config import ENGINES, ExportConfig, LesionKDError
from lesionkd_core.export.cost import NETWORKS, Browser, measure_cost, timer_of
from lesionkd_core.export.onnx import write_onnx
from lesionkd_core.export.parity import Deployed

RESULTS = results.CHECKOUT / "data" / "results"
SIZES = (128, 256)
WEB = os.environ.get("ORT_WEB")
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
  return (window.sessions = window.sessions ?? []).push(session) - 1;
}"""
TIME = """async ([which, pixels]) => {
  const times = [];
  while (times.reduce((a, b) => a + b, 0) < 30 && times.length < 20) {
    const begun = performance.now(), bytes = new Uint8Array(pixels * pixels * 3);
    const image = new ort.Tensor('uint8', bytes, [1, pixels, pixels, 3]);
    await window.sessions[which].run({ image });
    times.push(performance.now() - begun);
  }
  return times;
}"""


class OnnxRuntimeWeb(Browser):
    """ONNX Runtime Web in one browser page."""

    def _open(self):
        page, dist = super()._open(), Path(WEB) / "dist"
        page.set_content("".join(f"<input type=file id={i}>" for i in ("network", "wasm", "glue")))
        page.add_script_tag(path=dist / "ort.wasm.min.js")
        for part, ending in (("wasm", "wasm"), ("glue", "mjs")):
            page.set_input_files(f"#{part}", dist / f"ort-wasm-simd-threaded.{ending}")
        page.evaluate(START)
        return page

    def load(self, file):
        self.call(self.page.set_input_files, "#network", file)
        return self.call(self.page.evaluate, LOAD)

    def time(self, which, pixels):
        return self.call(self.page.evaluate, TIME, [which, pixels])


def yardsticks(web, network, file, pixels):
    """OpenVINO and ONNX Runtime Web, in float32."""
    about = {"precision": "float32", "bytes": file.stat().st_size}
    if find_spec("openvino"):
        import openvino

        how = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32", "NUM_STREAMS": 1}
        for s in pixels:
            model = openvino.Core().read_model(file)
            model.reshape({"image": [1, s, s, 3]})
            compiled = openvino.Core().compile_model(model, "CPU", how)
            request, image = compiled.create_infer_request(), np.zeros((1, s, s, 3), np.uint8)
            run = timer_of(partial(request.infer, {"image": image}))
            yield about | {"engine": "OpenVINO", "pixels": s}, run
    if web:
        which = web.load(file)
        for s in pixels:
            row = about | {"engine": "browser (ONNX Runtime Web)", "pixels": s}
            yield row, partial(web.time, which, s)


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
        "load": os.getloadavg(),
        "engines": {name: version(name) for name in packages if find_spec(name)},
        "onnxruntime-web": WEB and results.read_json(Path(WEB) / "package.json")["version"],
    }


if __name__ == "__main__":
    results.write_json(RESULTS / "cost.json", environment())
    repeats = int(os.environ.get("REPEATS", 15))
    if WEB:
        with OnnxRuntimeWeb() as web:
            cost = measure_cost(SIZES, ENGINES, repeats=repeats, more=partial(yardsticks, web))
    else:
        cost = measure_cost(SIZES, ENGINES, repeats=repeats, more=partial(yardsticks, None))
    results.write_table(RESULTS / "cost.csv", cost)
    results.write_table(RESULTS / "memory.csv", memory(SIZES))
    times = {"index": ["engine", "precision", "pixels"], "columns": "model"}
    print(cost.pivot_table("latency_ms_median", **times).to_string())
