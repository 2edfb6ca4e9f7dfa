"""Tiny options, networks, training steps and image folders that several tests use."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from lesionkd_core.config import DistillConfig
from lesionkd_core.losses import Step
from lesionkd_core.models import UNet

OPTIONS = {
    "pixels": 32,
    "cases": 40,
    "batch_size": 6,
    "teacher": "tests.tiny:small_teacher",
    "teacher_epochs": 2,
    "teacher_lr": 0.03,  # networks that mark something after two epochs
    "graph_epochs": 1,
    "epochs": 2,
    "lr": 0.03,
    "threads": 1,
    "device": "cpu",
    "weak_teacher": "allow",
}
"""A whole chain of stages in seconds."""
CFG = DistillConfig(**OPTIONS)
SIZE = (48, 64)  # height, width of the images below


def small_teacher() -> UNet:
    return UNet(width=8)


def small_student(width: int) -> UNet:
    return UNet(width=2)


class FixedNormUNet(UNet):
    """Its BatchNorm never uses the batch, so that an image's output depends on that image alone."""

    def train(self, mode: bool = True):
        super().train(mode)
        for module in self.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.training = False
        return self


def fixed_norm_student(width: int) -> UNet:
    return FixedNormUNet(width=width)


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Standard normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def step_of(student, teacher, edge=None, *, n=2, height=64, width=64, seed=1) -> Step:
    """A training step of two networks on random images."""
    images = torch.rand(n, 3, height, width, generator=torch.Generator().manual_seed(seed))
    logits, maps = student.train().forward_features(images)
    with torch.no_grad():
        teacher_logits, teacher_maps = teacher.forward_features(images)
    edge = torch.zeros(n, 1, height, width) if edge is None else edge
    return Step(logits, edge, maps, edge, teacher_logits, teacher_maps)


def save(path: Path, pixels, mode: str | None = None, **options) -> Path:
    """Write (H, W) or (H, W, C) pixels as an image file; bool is black and white."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.asarray(pixels)
    image = Image.fromarray(pixels.astype(np.uint8) * 255 if pixels.dtype == bool else pixels)
    (image.convert(mode) if mode else image).save(path, **options)
    return path


def save_pages(path: Path, *pages) -> Path:
    """Write several arrays or images as the pages of one file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    first, *rest = (Image.fromarray(np.asarray(page)) for page in pages)
    first.save(path, save_all=True, append_images=rest)
    return path


def picture(seed: int, size=SIZE) -> np.ndarray:
    """A smooth random colour image (H, W, 3) uint8; two seeds are no near-duplicates."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(30, 190, (12, 12, 1)) + rng.integers(0, 40, (12, 12, 3))
    image = Image.fromarray(coarse.astype(np.uint8))
    return np.asarray(image.resize(size[::-1], Image.Resampling.BICUBIC))


def lesion(side: int, top: int = 4, left: int = 6, size=SIZE) -> np.ndarray:
    """A square lesion, (H, W) bool."""
    mask = np.zeros(size, dtype=bool)
    mask[top : top + side, left : left + side] = True
    return mask


def image_folder(root: Path, count: int = 24, empty=()) -> Path:
    """images/case_000.png and masks/case_000.png and so on; lesions grow with the number."""
    for i in range(count):
        save(root / "images" / f"case_{i:03d}.png", picture(i))
        save(root / "masks" / f"case_{i:03d}.png", lesion(0 if i in empty else 6 + i))
    return root
