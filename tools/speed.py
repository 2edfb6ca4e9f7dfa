"""Ratios of times within one run, into runs/bench.json: python -m tools.speed [EARLIER.json]

Steps are timed in turns, so that a busy moment of the machine affects all of them.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd
import torch
from torch import nn

import lesionkd_core as lkd
from lesionkd_core.config import DistillConfig, PrepareConfig, TeacherConfig
from lesionkd_core.data.batches import TrainingSet
from lesionkd_core.edges import edge_label_batch
from lesionkd_core.losses import EdgeGraph, FittedGraph, Measured, Step, build_terms
from lesionkd_core.losses.segmentation import bce_dice
from lesionkd_core.models import ResNet34UNet, UNet, freeze
from lesionkd_core.predict import build

PIXELS, BATCH = 128, 16
LOSSES = {
    "student alone": "",
    "with L_feat": "feat",
    "with L_edge": "edge",
    "with both": "feat, edge",
}
EIGHT = ["", "feat", "edge", "feat, edge", "feat, edge_shuffled", "kd", "cwd", "dist"]
ROWS: list[dict[str, object]] = []


def in_turns(steps: dict[str, Callable], base: str, rounds: int = 10, warmup: int = 2) -> None:
    """Time several steps round by round; their medians become rows of the table."""
    times = {name: [] for name in steps}
    for _ in range(warmup + rounds):
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - started)
    medians = {name: 1000 * median(values[warmup:]) for name, values in times.items()}
    for name, value in medians.items():
        ratio = round(value / medians[base], 3)
        ROWS.append({"name": name, "ms": round(value, 3), "ratio_to": base, "ratio": ratio})


def batch():
    """Images and masks of one training step."""
    masks = torch.zeros(BATCH, 1, PIXELS, PIXELS)
    masks[..., 42:85, 32:85] = 1
    images = torch.randn(BATCH, 3, PIXELS, PIXELS)
    return images.contiguous(memory_format=torch.channels_last), masks


def new_teacher():
    return freeze(ResNet34UNet()).to(memory_format=torch.channels_last)


def step_of(losses, teacher, plain=False):
    """One update of a student: (images, masks, the teacher's output) -> None."""
    cfg = DistillConfig(profile="cpu", losses=losses)
    graph = EdgeGraph.build(teacher.feature_channels()[cfg.edge_level], cfg)
    student = build(cfg)
    terms = build_terms(cfg, student, teacher, Measured(FittedGraph(graph, torch.ones(cfg.states))))
    both = nn.ModuleList([student, terms]).to(memory_format=torch.channels_last).train()
    if plain:
        for module in both.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.__class__ = nn.BatchNorm2d
    trained = [p for p in both.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, cfg.lr, fused=True)

    def update(images, masks, seen):
        logits, maps = student.forward_features(images)
        edge = edge_label_batch(masks, 1) if losses else None
        known = {"teacher_logits": seen[0], "teacher_maps": seen[1]} if losses else {}
        step = Step(logits.float(), masks, maps, edge, **known)
        sum(cfg.losses[name] * term(step) for name, term in terms.items()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return update


def seen_by(teacher, images):
    with torch.no_grad():
        logits, maps = teacher.forward_features(images)
    return logits.float(), maps


def time_a_students_step():
    teacher, (images, masks) = new_teacher(), batch()
    seen = seen_by(teacher, images)
    steps = {"frozen ResNet34-UNet, one pass": lambda: seen_by(teacher, images)}
    for name, losses in LOSSES.items():
        update = step_of(losses, teacher)
        steps[f"step, {name}"] = lambda update=update: update(images, masks, seen)
    plain = step_of("", teacher, plain=True)
    steps["step, student alone, torch's BatchNorm"] = lambda: plain(images, masks, seen)
    in_turns(steps, "step, student alone")


def time_a_step_of_eight_arms(precision):
    teacher, (images, masks) = new_teacher(), batch()
    updates = [(losses, step_of(losses, teacher)) for losses in EIGHT]

    def separately():
        for losses, update in updates:
            update(images, masks, seen_by(teacher, images) if losses else None)

    def together():
        seen = seen_by(teacher, images)
        for _, update in updates:
            update(images, masks, seen)

    with torch.autocast("cpu", torch.bfloat16, enabled=precision != "32-true"):
        steps = {"each alone": separately, "together": together}
        steps = {f"8 arms, {name}, {precision}": step for name, step in steps.items()}
        in_turns(steps, f"8 arms, each alone, {precision}", rounds=5, warmup=1)


def time_networks(kind):
    images = torch.randn(4, 3, PIXELS, PIXELS).contiguous(memory_format=torch.channels_last)
    masks = torch.zeros(4, 1, PIXELS, PIXELS)
    networks = {
        "student": UNet(width=4),
        "ResNet34-UNet": ResNet34UNet(),
        "U-Net 64": UNet(width=64),
    }
    steps = {}
    for name, network in networks.items():
        network.to(memory_format=torch.channels_last).train(kind == "training step")

        def step(network=network):
            with torch.set_grad_enabled(kind == "training step"):
                logits = network(images)
                if kind == "training step":
                    bce_dice(logits, masks).backward()
                    network.zero_grad()

        steps[f"{kind} of {name}, batch 4"] = step
    in_turns(steps, f"{kind} of student, batch 4", rounds=5, warmup=1)


def time_whole_runs(folder):
    """From a finished teacher to scored students: batches, validation and checkpoints included."""
    sizes = {"pixels": PIXELS, "cases": 80, "batch_size": 16, "teacher_epochs": 1, "epochs": 6}
    cfg = DistillConfig(**sizes, label_fraction=1.0, weak_teacher="allow")
    data = lkd.prepare(cfg)
    teacher = lkd.train_teacher(data, cfg)
    graph = lkd.fit_edge_graph(teacher, data, cfg)

    def train(losses):
        shutil.rmtree(folder / "distill", ignore_errors=True)
        arms = [cfg.with_values(losses=name) for name in losses]
        lkd.distill_arms(teacher, graph, data, arms)

    runs = {
        "run, student alone": lambda: train([""]),
        "run, method": lambda: train(["feat, edge"]),
        "run, 8 arms together": lambda: train(EIGHT),
    }
    in_turns(runs, "run, student alone", rounds=2, warmup=0)


def time_batches():
    data = lkd.prepare(TeacherConfig(pixels=PIXELS, cases=100))
    images, masks = batch()
    update = step_of("", new_teacher())
    steps = {"step, student alone": lambda: update(images, masks, None)}
    for augment in ("full", "flips", "none"):
        steps[f"batch, augment {augment}"] = lambda augment=augment: next(
            TrainingSet(data, BATCH, 0, augment).epoch(0)
        )
    in_turns(steps, "step, student alone")


def time_preparing(folder):
    """60 photographs of 600 x 450 px, as JPEG with PNG masks."""
    from PIL import Image

    rng, photos = np.random.default_rng(0), folder / "photos"
    for name in ("images", "masks"):
        (photos / name).mkdir(parents=True)
    for i in range(60):
        small = rng.integers(0, 255, (15, 20, 3), np.uint8)
        Image.fromarray(small).resize((600, 450)).save(photos / "images" / f"{i}.jpg")
        mask = np.zeros((450, 600), np.uint8)
        mask[100 : 200 + i, 150 : 300 + i] = 255
        Image.fromarray(mask).save(photos / "masks" / f"{i}.png")

    def prepare(**options):
        shutil.rmtree(folder / "prepare", ignore_errors=True)
        lkd.prepare(PrepareConfig(dataset=str(photos), **options))

    def only_decode():
        for path in photos.rglob("*.*"):
            np.asarray(Image.open(path))

    in_turns({"decoding 60 pairs": only_decode, "preparing 60 pairs": prepare}, "decoding 60 pairs")


def time_importing():
    def start(code):
        return lambda: subprocess.run([sys.executable, "-c", code], check=True)

    code = {"starting Python": "pass", "import lesionkd_core": "import lesionkd_core"}
    in_turns({name: start(text) for name, text in code.items()}, "starting Python", rounds=7)


def main(earlier: str = "") -> None:
    torch.set_num_threads(2)
    torch.manual_seed(0)
    with TemporaryDirectory() as name:
        os.environ["LESIONKD_RUNS"] = name
        for measure in (
            time_a_students_step,
            partial(time_a_step_of_eight_arms, "32-true"),
            partial(time_a_step_of_eight_arms, "bf16-mixed"),
            partial(time_networks, "training step"),
            partial(time_networks, "prediction"),
            partial(time_whole_runs, Path(name)),
            time_batches,
            partial(time_preparing, Path(name)),
            time_importing,
        ):
            measure()
    table, out = pd.DataFrame(ROWS), Path("runs/bench.json")
    out.parent.mkdir(exist_ok=True)
    out.write_text(table.to_json(orient="records", indent=1) + "\n")
    if earlier:
        before = pd.DataFrame(json.loads(Path(earlier).read_text())).set_index("name")["ratio"]
        table["ratio before"] = table["name"].map(before[~before.index.duplicated()])
    print(table.astype(object).fillna("").to_markdown(index=False))
    print(f"\nwritten: {out}")


if __name__ == "__main__":
    main(*sys.argv[1:])
