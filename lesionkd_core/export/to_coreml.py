"""Core ML, for native apps on iOS; converted anywhere, executed on macOS only."""

from __future__ import annotations

import platform
import shutil
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from .deploy import Deployed
from .to_onnx import quiet


class _FromImage(nn.Module):
    """Core ML hands on an image as (1, 3, H, W) float in 0..255 and takes a grey one, (1, 1, H, W) in 0..255."""

    def __init__(self, network: Deployed) -> None:
        super().__init__()
        self.network, self.mean, self.scale = network.network, network.mean, network.scale

    def forward(self, image: Tensor) -> Tensor:
        probability: Tensor = self.network((image - self.mean) * self.scale).sigmoid()
        return probability * 255


def write_coreml(network: Deployed, path: Path, size: int) -> str:
    """An .mlpackage with image input `image` (RGB) and image output `mask` (grey), size x size px; says what was done with it.

    Returns
    -------
    str
        'converted, not executed', or on macOS 'executed, not compared' after one image went through it.
    """
    with quiet():
        import coremltools

        program = torch.export.export(_FromImage(network).eval(), (torch.zeros(1, 3, size, size),)).run_decompositions({})
        model = coremltools.convert(
            program, inputs=[coremltools.ImageType(name="image", shape=(1, 3, size, size), color_layout=coremltools.colorlayout.RGB)],
            outputs=[coremltools.ImageType(name="mask", color_layout=coremltools.colorlayout.GRAYSCALE)],
            minimum_deployment_target=coremltools.target.iOS16,
        )
    shutil.rmtree(path, ignore_errors=True)
    model.save(str(path))
    if platform.system() != "Darwin":
        return "converted, not executed"
    from PIL import Image

    model.predict({"image": Image.fromarray(np.zeros((size, size, 3), np.uint8))})
    return "executed, not compared"
