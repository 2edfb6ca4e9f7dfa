"""The loader beside the student's training step, in turns in one run; nothing here asserts a time."""

import time
from itertools import cycle
from statistics import median
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lesionkd_core.batches import load_batch
from lesionkd_core.config import DistillConfig
from lesionkd_core.inference import build
from lesionkd_core.losses import Measured, build_terms
from lesionkd_core.training import Objective

CASES, PIXELS, BATCH = 640, 128, 16


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Memory-mapped arrays of noise with a square lesion."""
    folder, rng = tmp_path_factory.mktemp("prepared"), np.random.default_rng(0)
    masks = np.zeros((CASES, PIXELS, PIXELS), np.uint8)
    masks[:, 40:90, 30:80] = 1
    np.save(folder / "images.npy", rng.integers(0, 256, (CASES, PIXELS, PIXELS, 3), dtype=np.uint8))
    np.save(folder / "masks.npy", masks)
    return SimpleNamespace(**{name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("images", "masks")})


@pytest.mark.parametrize("augmentation", ["none", "flips", "full"])
def test_loading_a_batch_against_the_students_step(benchmark, report, prepared, augmentation):
    torch.set_num_threads(2)
    cfg = DistillConfig(profile="cpu", terms="")
    student = build(cfg)
    objective = Objective(student, build_terms(cfg, student, None, Measured()), cfg).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(objective.parameters(), cfg.lr, fused=True)
    batches, steps = cycle(np.random.default_rng(0).permutation(CASES).reshape(-1, BATCH)), []
    images, masks = load_batch(prepared, next(batches), 0, 0, augmentation)

    def step():  # before every loaded batch, so that both see the same load on the machine
        started = time.perf_counter()
        sum(objective(images, masks, None).values()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        steps.append(time.perf_counter() - started)
        return (prepared, next(batches), 0, len(steps), augmentation), {}

    benchmark.pedantic(load_batch, setup=step, rounds=40, warmup_rounds=3)
    base = f"student's step beside the loader, {augmentation}"
    report(base, 1000 * median(steps[3:]), "ms")
    report(f"loading a batch, augment {augmentation}", 1000 * benchmark.stats.stats.median, "ms", base)
