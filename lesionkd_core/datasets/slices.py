"""Slices of a volume: where they lie in the patient, and what makes images of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..config import LesionKDError
from .files import UnreadableFile

PERCENTILES = (0.5, 99.5)
"""Shown from black to white where neither the user nor the file says a window."""
SAMPLE = 4_000_000
"""Percentiles of larger volumes are taken of about so many voxels, evenly spread in every slice."""


@dataclass(frozen=True)
class Space:
    """Where slices lie: shape (D, H, W), affine (4, 4) from (column, row, slice) to mm, RAS."""

    shape: tuple[int, int, int]
    affine: np.ndarray

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Between slices, rows and columns, mm."""
        columns, rows, slices = np.linalg.norm(self.affine[:3, :3], axis=0).tolist()
        return slices, rows, columns


@dataclass(frozen=True)
class Volume:
    """Slices as stored, (D, H, W), or (D, H, W, 3) uint8 in colour, and how they are read.

    `scales` (D, 2) are slope and intercept of every slice, `windows` the files' own (low, high) or
    None, `inverted` says that low values are bright, `notes` what was strange.
    """

    voxels: np.ndarray
    space: Space
    scales: np.ndarray
    windows: tuple[tuple[float, float] | None, ...]
    inverted: bool = False
    notes: tuple[str, ...] = ()

    def values(self, z: int, step: int = 1) -> np.ndarray:
        """Slice `z`, every `step`-th row and column, float32 in the file's unit (CT: HU)."""
        slope, intercept = self.scales[z]
        return self.voxels[z, ::step, ::step].astype(np.float32) * np.float32(slope) + np.float32(intercept)

    def images(self, window: str = "") -> Iterator[np.ndarray]:
        """Every slice as (H, W, 3) uint8.

        `window` is 'centre, width' in the file's unit; empty takes the file's own, else the
        0.5 to 99.5 percentiles of the volume.
        """
        if self.voxels.ndim == 4:
            yield from self.voxels
            return
        windows = self.windows
        if window:
            centre, width = map(float, window.split(","))
            windows = ((centre - width / 2, centre + width / 2),) * len(windows)
        whole = self._percentiles() if None in windows else (0.0, 1.0)  # else not asked for
        for z, own in enumerate(windows):
            low, high = own or whole
            grey = ((self.values(z) - low) / max(high - low, 1e-12)).clip(0, 1)
            grey = np.rint(255 * (1 - grey if self.inverted else grey)).astype(np.uint8)
            yield np.repeat(grey[..., None], 3, axis=2)

    def _percentiles(self) -> tuple[float, float]:
        step = int(np.ceil((self.voxels.size / SAMPLE) ** 0.5))
        low, high = np.percentile(np.stack([self.values(z, step) for z in range(len(self.voxels))]), PERCENTILES)
        return float(low), float(high)


@contextmanager
def reading(path: Path, kind: str) -> Iterator[None]:
    """Whatever the libraries make of a damaged file becomes one error that names it."""
    try:
        yield
    except LesionKDError:
        raise
    except FileNotFoundError:
        raise UnreadableFile(f"{path.name}: file is missing") from None
    except PermissionError:
        raise UnreadableFile(f"{path.name}: may not be read; check its permissions") from None
    except Exception as error:  # damaged bytes make nibabel, gzip and pydicom fail in many ways
        why = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UnreadableFile(f"{path.name}: cannot be read as {kind} ({why})") from None
