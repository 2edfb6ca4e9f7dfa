"""Preparing against only decoding the same files, and memory against the number of images."""

import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from lesionkd_core.config import PrepareConfig
from lesionkd_core.datasets import fingerprint, read_case
from lesionkd_core.prepare import prepare_data
from tests.conftest import ROOT

SIZE = (768, 1024)
CASES = 300


def write(folder, cases: int, size: tuple[int, int]):
    """JPEG images as a camera writes them, PNG masks: soft texture, some noise, one ellipse."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[: size[0], : size[1]]
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    for i in range(cases):
        coarse = Image.fromarray(rng.integers(40, 200, (24, 32, 3), dtype=np.uint8)).resize(size[::-1], Image.Resampling.BICUBIC)
        noisy = np.clip(np.asarray(coarse, np.int16) + rng.integers(-8, 8, (*size, 1), dtype=np.int16), 0, 255)
        Image.fromarray(noisy.astype(np.uint8)).save(folder / "images" / f"{i}.jpg", quality=92)
        cy, cx, r = rng.uniform(0.3, 0.7) * size[0], rng.uniform(0.3, 0.7) * size[1], rng.uniform(0.05, 0.2) * size[0]
        Image.fromarray((((y - cy) ** 2 + (x - cx) ** 2 / 2) < r**2).astype(np.uint8) * 255).save(folder / "masks" / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("raw") / "mine", CASES, SIZE)


@pytest.mark.parametrize("pixels", [128, 256])
def test_preparing_against_decoding(benchmark, report, folder, tmp_path, monkeypatch, pixels):
    cfg = PrepareConfig(dataset=str(folder), pixels=pixels)
    _, cases = fingerprint(cfg)
    decoding = []

    def decode_then():
        started = time.perf_counter()
        for case in cases:
            read_case(case)
        decoding.append(time.perf_counter() - started)
        monkeypatch.setenv("LESIONKD_RUNS", str(tmp_path / str(len(decoding))))  # an empty place: everything is prepared anew

    benchmark.pedantic(lambda: prepare_data(cfg, lambda *_: None), setup=decode_then, rounds=3)
    base = f"decoding {CASES} images in one process, beside {pixels} px"
    report(base, 1000 * float(np.median(decoding)), "ms")
    report(f"preparing them at {pixels} px", 1000 * benchmark.stats.stats.median, "ms", base)


PEAK = """
import resource, sys
from lesionkd_core.config import PrepareConfig
from lesionkd_core.prepare import prepare_data
prepare_data(PrepareConfig(dataset=sys.argv[1], pixels=128), lambda *_: None)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_peak_memory_at_ten_times_the_images(benchmark, report, tmp_path, monkeypatch):
    monkeypatch.setenv("LESIONKD_RUNS", str(tmp_path / "runs"))
    peaks = []

    def both():
        for cases in (150, 1500):
            folder = write(tmp_path / f"{cases}", cases, (240, 320))
            done = subprocess.run([sys.executable, "-c", PEAK, str(folder)], capture_output=True, text=True, check=True, cwd=ROOT)
            peaks.append(int(done.stdout.split()[-1]) / 1024)

    benchmark.pedantic(both, rounds=1)
    report("peak memory preparing 150 images", peaks[0], "MiB")
    report("peak memory preparing 1500 images", peaks[1], "MiB", "peak memory preparing 150 images")
