"""A finished student run with fixed weights, so that no test depends on how a training went."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from lesionkd_core import results
from lesionkd_core.config import DistillConfig
from lesionkd_core.data.phantom import draw
from lesionkd_core.export.parity import Deployed
from lesionkd_core.models import UNet
from lesionkd_core.predict import TrainedNetwork, load_student

WEIGHTS = Path(__file__).parent / "fixtures" / "student.safetensors"
CFG = DistillConfig(losses="", pixels=64, cases=60, device="cpu", threads=1)
DICE = {"mean": 0.8, "low": 0.7, "high": 0.9}
SCORES = {"cases": 12, "lesions": 12, "groups": 5, "missed": 1, "false_alarms": 0, "dice": DICE}


def fixed_run(network: nn.Module | None = None, **options) -> TrainedNetwork:
    """A student of width 4, trained once on the phantom, or another network, as a finished run."""
    cfg = CFG.with_values(**options)
    if network is None:
        network = UNet(width=4)
        network.load_state_dict(load_file(WEIGHTS), strict=False)

    def make(missing):
        for path in missing:
            results.write_checkpoint(path / "checkpoint_best", {"network": network.state_dict()})
            results.write_json(path / "summary.json", {"test": SCORES})

    [run] = results.find_or_make([results.Wanted(cfg, "fixed")], make, results.Result)
    return load_student(run)


def lively(network: nn.Module, seed: int = 0) -> nn.Module:
    """Random statistics of every BatchNorm, as after a training: none is 0 or 1."""
    random = torch.Generator().manual_seed(seed)
    for norm in network.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.weight.data.uniform_(0.5, 1.5, generator=random)
            norm.bias.data.uniform_(-0.5, 0.5, generator=random)
            norm.running_mean.uniform_(-0.5, 0.5, generator=random)
            norm.running_var.uniform_(0.5, 2, generator=random)
    return network.eval()


def unet(seed: int = 0, **options) -> nn.Module:
    """A U-Net with random weights and statistics."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return lively(UNet(**options), seed)


def undecided(network: nn.Module, images: np.ndarray, spread: float) -> Deployed:
    """A network whose logits on the images have the median 0 and this standard deviation."""
    with torch.no_grad():
        head = network.head
        deployed = Deployed(network)
        x = torch.from_numpy(images).permute(0, 3, 1, 2)
        logits = deployed.network((x - deployed.mean) * deployed.scale)
        factor = spread / logits.std()
        head.weight *= factor
        head.bias.copy_((head.bias - logits.median()) * factor)
    return Deployed(network)


def noise(count: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    """Random images, (N, H, W, 3) uint8."""
    random = np.random.default_rng(seed)
    return random.integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def picture_of(width: int, height: int, seed: int = 5) -> np.ndarray:
    """A drawn lesion at any size, (height, width, 3) uint8."""
    image = Image.fromarray(draw(0, seed, 128)[0])
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))


def mask_of(student: TrainedNetwork, picture: np.ndarray) -> np.ndarray:
    """The mask image of a picture in PyTorch, (H, W) uint8."""
    return np.rint(255 * student.predict([picture])[0]).astype(np.uint8)


def gap(found: np.ndarray, expected: np.ndarray) -> int:
    """The largest difference of two mask images, in steps of 255."""
    return int(np.abs(found.astype(int) - expected).max())
