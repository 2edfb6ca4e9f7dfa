"""The configuration of stage `export`: it stands on a finished run, not on fields of the stages before."""

from __future__ import annotations

from typing import Any, Self

from pydantic import Field, model_validator

from .base import Names, Sizes, StageConfig, nearest

FORMATS = ("onnx", "executorch", "coreml", "page")


class ExportConfig(StageConfig):
    """Finished student -> files for phones (stage `export`, step S7)."""

    stage = "export"
    run: str = Field("", description="folder of a finished student (runs/distill/...); empty takes the one that notebook 04 makes with this profile")
    formats: Names = Field(FORMATS, min_length=1, description="what is written, comma-separated: onnx, executorch, coreml, page")
    sizes: Sizes = Field((128, 256), description="ExecuTorch's fixed sides beside the run's own, comma-separated, px; multiples of 32")
    threshold: float = Field(0.5, ge=0.05, le=0.95, description="probability over which a pixel is lesion, in the page and in model.json")
    logits: bool = Field(False, description="also write student-logits.onnx, which gives raw logits as float32 instead of the mask image")
    calibration: int = Field(64, ge=1, description="training cases that the ranges of int8 are taken from")
    engines: Names = Field(("torch", "onnx"), description="whose latency is measured, comma-separated: torch, onnx, executorch, browser")
    cost_pixels: Sizes = Field((128,), description="sides at which latency is measured, comma-separated, px; multiples of 32")
    repeats: int = Field(5, ge=1, description="turns through all networks and engines in which latency is measured")

    @model_validator(mode="after")
    def _whole_percent(self) -> Self:
        if abs(100 * self.threshold - round(100 * self.threshold)) > 1e-6:
            raise ValueError(f"threshold = {self.threshold}: the page's slider has whole percents; give two decimals")
        return self

    @model_validator(mode="after")
    def _known_names(self) -> Self:
        for field, known in (("formats", FORMATS), ("engines", ("torch", "onnx", "executorch", "browser"))):
            for name in getattr(self, field):
                if name not in known:
                    raise ValueError(f"{field} names {name!r}: {nearest(name, known)}")
        return self

    def hashed(self) -> dict[str, Any]:
        """What the files are made with; the student itself counts by its own digest, and latency is measured beside them."""
        return {name: getattr(self, name) for name in ("formats", "sizes", "threshold", "logits", "calibration")}
