"""Times that the documentation speaks of: `make bench`. Ratios in one run; nothing here asserts a time."""

import subprocess
import sys

import pytest
import torch

from lesionkd_core.config import DistillConfig
from lesionkd_core.datasets import phantom
from lesionkd_core.inference import build
from lesionkd_core.losses import EdgeGraph, FittedGraph, build_terms
from lesionkd_core.networks import ResNet34UNet
from lesionkd_core.training import Objective


@pytest.mark.parametrize("look", phantom.LOOKS)
def test_drawing_a_phantom_case_at_128_px(benchmark, look):
    torch.set_num_threads(1)
    index = iter(range(10**6))
    benchmark.pedantic(lambda: phantom.draw(look, 0, next(index), 128), rounds=200, warmup_rounds=5)
    benchmark.extra_info["images_per_second"] = round(1 / benchmark.stats.stats.median)


@pytest.mark.parametrize("code", ["pass", "import lesionkd_core", "from lesionkd_core import PrepareConfig"])
def test_starting_python(benchmark, code):
    benchmark.pedantic(lambda: subprocess.run([sys.executable, "-c", code], check=True), rounds=7, warmup_rounds=1)


@pytest.mark.parametrize("terms", ["", "feat", "edge", "feat, edge"], ids=["student alone", "feat", "edge", "both"])
def test_a_training_step_at_128_px_batch_16(benchmark, terms):
    torch.set_num_threads(2)
    cfg = DistillConfig(profile="cpu", terms=terms)
    teacher, student = ResNet34UNet().eval().requires_grad_(False).to(memory_format=torch.channels_last), build(cfg)
    graph = FittedGraph(EdgeGraph(64), torch.ones(cfg.states))
    objective = Objective(student, build_terms(cfg, student, teacher, graph), cfg).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW([p for p in objective.parameters() if p.requires_grad], cfg.lr)
    images = torch.randn(16, 3, 128, 128).contiguous(memory_format=torch.channels_last)
    masks = torch.zeros(16, 1, 128, 128)
    masks[..., 40:90, 30:80] = 1

    def step():
        with torch.no_grad():
            features = teacher.forward_features(images) if terms else None
        sum(objective(images, masks, features).values()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    benchmark.pedantic(step, rounds=10, warmup_rounds=2)
