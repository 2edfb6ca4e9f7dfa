"""Core ML, for native apps on iOS: converted anywhere, executed on macOS only."""

from __future__ import annotations

import platform
import shutil
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from .formats import Compared, Format, Job, register
from .onnx import quiet
from .parity import Deployed


@register
class CoreML(Format):
    """student.mlpackage."""

    name = "coreml"
    packages = ("coremltools",)

    def write(self, job: Job) -> list[Compared]:
        """Write the package; nothing can be compared outside macOS."""
        file = job.folder / "student.mlpackage"
        job.notes[file.name] = write_coreml(job.network, file, job.student.pixels)
        return []


class _FromImage(nn.Module):
    """Core ML passes an image as (1, 3, H, W) float in 0..255 and takes (1, 1, H, W) in 0..255."""

    def __init__(self, network: Deployed) -> None:
        super().__init__()
        self.network, self.mean, self.scale = network.network, network.mean, network.scale

    def forward(self, image: Tensor) -> Tensor:
        probability: Tensor = self.network((image - self.mean) * self.scale).sigmoid()
        return probability * 255


def write_coreml(network: Deployed, path: Path, size: int) -> str:
    """Write an .mlpackage with image input `image` (RGB) and image output `mask` (grey).

    Returns
    -------
    str
        'converted, not executed', or on macOS 'executed, not compared' after one image.
    """
    with quiet():
        import coremltools as ct

        example = (torch.zeros(1, 3, size, size),)
        program = torch.export.export(_FromImage(network).eval(), example)
        shape, colour = (1, 3, size, size), ct.colorlayout
        model = ct.convert(
            program.run_decompositions({}),
            inputs=[ct.ImageType(name="image", shape=shape, color_layout=colour.RGB)],
            outputs=[ct.ImageType(name="mask", color_layout=colour.GRAYSCALE)],
            minimum_deployment_target=ct.target.iOS16,
        )
    shutil.rmtree(path, ignore_errors=True)
    model.save(str(path))
    if platform.system() != "Darwin":
        return "converted, not executed"
    from PIL import Image

    model.predict({"image": Image.fromarray(np.zeros((size, size, 3), np.uint8))})
    return "executed, not compared"
