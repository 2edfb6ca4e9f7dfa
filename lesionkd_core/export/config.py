"""The options of an export."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from ..config import Names, Sizes, StageConfig, nearest
from .formats import FORMATS, Format

NAMES = tuple(sorted(FORMATS))
TIMED = ("torch", *(name for name in NAMES if type(FORMATS[name]).timed is not Format.timed))
"""What the option `engines` may name."""


class ExportConfig(StageConfig):
    """Finished student -> files for phones (stage `export`, step S7)."""

    stage = "export"
    run: str = Field(
        "",
        description="finished student: folder, name of a published one, or .safetensors; empty "
        "uses the one of notebook 04 with this profile",
    )
    formats: Names = Field(NAMES, min_length=1, description=f"files: {', '.join(NAMES)}")
    sizes: Sizes = Field(
        (128, 256),
        description="image sides of ExecuTorch and of comparisons besides the student's own, px",
    )
    threshold: float = Field(
        0.5, ge=0.05, le=0.95, description="probability above which a pixel is lesion"
    )
    engines: Names = Field(("torch", "onnx"), description=f"engines to time: {', '.join(TIMED)}")

    @model_validator(mode="after")
    def _known_names(self) -> Self:
        for option, given, known in (
            ("formats", self.formats, NAMES),
            ("engines", self.engines, TIMED),
        ):
            for name in given:
                if name not in known:
                    raise ValueError(f"{option} names {name!r}: {nearest(name, known)}")
        return self

    @property
    def dataset_name(self) -> str:
        """The student in the name of the folder."""
        return Path(self.run).stem or "student"

    def hashed(self, unused: Collection[str] = ()) -> dict[str, object]:
        """What the files are made with; the student counts by its own digest."""
        return {"formats": self.formats, "sizes": self.sizes, "threshold": self.threshold}
