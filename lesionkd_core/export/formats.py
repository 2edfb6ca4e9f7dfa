"""The formats of an export: a format is one file of this package with one class."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar

import numpy as np
from PIL import Image

from ..config import MissingExtra
from ..predict import TrainedNetwork
from .parity import Deployed, Engine

INT8_CASES = 64
"""Training images whose ranges of values set the scales of int8."""


@dataclass(frozen=True)
class Samples:
    """Prepared images that an export is compared on.

    Parameters
    ----------
    images, masks : (N, S, S, 3) uint8, (N, S, S) bool
        Test cases.
    calibration : (M, S, S, 3) uint8
        Training images for the ranges of int8.
    """

    images: np.ndarray
    masks: np.ndarray
    calibration: np.ndarray


@dataclass(frozen=True)
class Job:
    """One student and what its files are made with.

    `sizes` are image sides in px, `about` paragraphs for readers. Formats add to `notes`, by the
    name of a file, and to `settings`, entries of model.json.
    """

    student: TrainedNetwork
    network: Deployed
    folder: Path
    samples: Samples
    sizes: tuple[int, ...]
    threshold: float
    about: list[str]
    notes: dict[str, str] = field(default_factory=dict)
    settings: dict[str, object] = field(default_factory=dict)

    @cached_property
    def golden(self) -> tuple[np.ndarray, np.ndarray]:
        """A picture (128, 160, 3), not a square, and its mask image (128, 160) from `predict`."""
        lesion = self.samples.masks.sum((1, 2))
        typical = self.samples.images[np.argsort(lesion)[len(lesion) // 2]]
        resized = Image.fromarray(typical).resize((160, 128), Image.Resampling.BICUBIC)
        picture = np.asarray(resized)
        [probability] = self.student.predict([picture])
        return picture, np.rint(255 * probability).astype(np.uint8)


Compared = tuple[Engine, tuple[int, ...]]
"""An engine, and the image sides at which it is compared with PyTorch."""


class Format:
    """A kind of file: the packages that it needs, how it is written, and how it runs."""

    name: ClassVar[str]
    packages: ClassVar[tuple[str, ...]]
    """Packages of the extra `mobile`."""

    def check(self, network: Deployed) -> None:
        """Refuse a network that this format cannot hold, before any work."""

    def write(self, job: Job) -> list[Compared]:
        """Write the files of a job; return what can be compared with PyTorch."""
        raise NotImplementedError

    def timed(
        self, network: Deployed, folder: Path, images: dict[int, np.ndarray], int8: bool
    ) -> Iterator[Engine]:
        """Engines to time on one thread; nothing if the format cannot run here.

        `images` are (N, S, S, 3) uint8 by their side S; `int8` asks for that precision too.
        """
        yield from ()


FORMATS: dict[str, Format] = {}
"""Formats by the name that the option `formats` uses."""


def register(kind: type[Format]) -> type[Format]:
    """Class decorator that makes a format available."""
    FORMATS[kind.name] = kind()
    return kind


def check_installed(names: tuple[str, ...]) -> None:
    """Raise LesionKDError for the first package that one of these formats needs and is missing."""
    for name in names:
        for package in FORMATS[name].packages:
            if find_spec(package) is None:
                raise MissingExtra(f"the format {name} of formats and engines", "mobile")
