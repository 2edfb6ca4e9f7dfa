"""Where the time goes, by torch's profiler: python -m tests.benchmarks.profile_steps prints the tables of docs/speed.md."""

import pandas as pd
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from lesionkd_core.losses import EdgeGraph, FittedGraph
from lesionkd_core.networks import ResNet34UNet, UNet
from tests.benchmarks.test_speed import batch, frozen, look_at, student_step

PARTS = {
    "convolutions, forward": ("mkldnn_convolution", "convolution_overrideable", "cudnn_convolution", "_slow_conv"),
    "convolutions, backward": ("convolution_backward",),
    "BatchNorm": ("native_batch_norm", "native_batch_norm_backward", "_PackedBatchNorm", "_PackedBatchNormBackward", "cudnn_batch_norm"),
    "matrix products": ("mm", "bmm", "addmm"),
    "ReLU, pooling, upsampling, joining": ("clamp_min", "threshold_backward", "max_pool2d", "upsample", "cat", "relu"),
    "optimizer": ("_fused_adamw", "Optimizer"),
    "copies": ("copy_", "clone", "contiguous"),
}


def part_of(operation: str) -> str:
    name = operation.removeprefix("aten::")
    return next((part for part, marks in PARTS.items() if any(name == mark or name.startswith(mark) for mark in marks)), "other elementwise and reductions")


def shares(step, rounds: int = 5) -> pd.Series:
    """Milliseconds of the processor's own time a step, by part."""
    step()
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        for _ in range(rounds):
            step()
    rows = [(part_of(event.key), event.self_cpu_time_total / 1000 / rounds) for event in seen.key_averages()]
    return pd.DataFrame(rows, columns=["part", "ms"]).groupby("part")["ms"].sum()


def main() -> None:
    torch.set_num_threads(2)
    images, masks = batch()
    teacher, network = frozen(ResNet34UNet()), ResNet34UNet().to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(network.parameters(), fused=True)
    graph, student = FittedGraph(EdgeGraph(64), torch.ones(16)), UNet(width=4).to(memory_format=torch.channels_last).eval()
    method, alone = student_step("feat, edge", teacher, graph), student_step("", teacher, graph)

    def train_teacher() -> None:
        F.binary_cross_entropy_with_logits(network(images), masks).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def score() -> None:
        with torch.inference_mode():
            student(images).sigmoid()

    table = pd.DataFrame({
        "teacher, training step": shares(train_teacher, 2), "student alone": shares(lambda: alone(images, masks, None)),
        "method, teacher pass included": shares(lambda: method(images, masks, look_at(teacher, images, masks))), "student, scoring": shares(score),
    }).fillna(0).reindex([*PARTS, "other elementwise and reductions"]).fillna(0)
    table.loc["in all"] = table.sum()
    print("ms a batch of 16 at 128 px, two threads\n\n" + table.round(1).rename_axis("part").reset_index().to_markdown(index=False))


if __name__ == "__main__":
    main()
