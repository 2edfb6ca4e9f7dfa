"""Using a trained network: probabilities, masks and whole folders of images (step S7)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from . import store
from .batches import normalize
from .config import DistillConfig, LesionKDError, TeacherConfig
from .datasets import UnreadableFile, read_image
from .datasets.files import is_volume, sources_in, stem_of
from .edges import edge_label
from .networks import TEACHERS, Network, UNet
from .prepare.pixels import prepare_image, restore

SETTINGS: dict[str, type[TeacherConfig]] = {"teacher": TeacherConfig, "distill": DistillConfig}
BATCH = 16
"""Slices of a volume in memory at a time."""


@dataclass(frozen=True)
class TrainedNetwork:
    """A finished network and the configuration of its run, which says how images are prepared; `predict` takes it."""

    network: Network
    cfg: TeacherConfig
    path: Path

    @property
    def pixels(self) -> int:
        """Side of the square that it was trained on, px."""
        return self.cfg.pixels

    def __repr__(self) -> str:
        count = sum(p.numel() for p in self.network.parameters())
        return f"{type(self.network).__name__}({store.short(self.path)}: {count:,} parameters, {self.pixels} px)"


def read_config(path: Path) -> TeacherConfig:
    """The configuration that a run was made with."""
    content = store.read_json(Path(path) / "config.json")
    stage = SETTINGS.get(content.get("stage"))
    if stage is None:
        raise LesionKDError(f"{path} is a run of stage {content.get('stage')!r}, wants one of {', '.join(SETTINGS)}")
    values: dict[str, Any] = {name: content[name] for name in stage.model_fields if name in content}
    return stage(**values | {n: tuple(v) for n, v in values.items() if isinstance(v, list)})


def build(cfg: TeacherConfig) -> Network:
    """The untrained network of a configuration; its initialization depends on its seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(getattr(cfg, cfg.seed_field))
        return UNet(width=cfg.width, stem=cfg.stem) if isinstance(cfg, DistillConfig) else TEACHERS[cfg.teacher]()


def load_network(run: str | Path | store.Result) -> TrainedNetwork:
    """The best network of a finished teacher or student run, in evaluation mode on the CPU.

    Raises
    ------
    UnfinishedRun, LesionKDError
        The folder is no finished training run, or its checkpoint is not of this network.
    """
    path = store.locate(run)
    cfg = read_config(path)
    if not store.is_done(path):
        raise store.UnfinishedRun(f"{path} is not finished (no DONE in it); start its notebook again to go on with it.")
    network = build(cfg)
    try:
        network.load_state_dict(store.read_checkpoint(path / "checkpoint_best")["network"])
    except (RuntimeError, KeyError, TypeError):
        raise LesionKDError(f"{path / 'checkpoint_best'} holds weights of another network than config.json beside it describes") from None
    return TrainedNetwork(network.eval().requires_grad_(False), cfg, path)


def load_student(run: str | Path | store.Result) -> TrainedNetwork:
    """The trained student of a finished `distill` run (a `Run` or its folder): all that step S7 needs."""
    student = load_network(run)
    if not isinstance(student.cfg, DistillConfig):
        raise LesionKDError(f"{student.path} holds a teacher, not a student; wants a folder of runs/distill")
    return student


@torch.inference_mode()
def probabilities(network: nn.Module, images: np.ndarray, batch_size: int = 32) -> np.ndarray:
    """Probability that a pixel is lesion: (N, S, S, 3) uint8 -> (N, S, S) float32 (step S2)."""
    device = next(network.parameters()).device
    training = network.training
    network.eval()
    parts = [
        network(normalize(images[i : i + batch_size], device))[:, 0].sigmoid().float().cpu()
        for i in range(0, len(images), batch_size)
    ]
    network.train(training)
    return torch.cat(parts).numpy()


def predict(student: TrainedNetwork, images: np.ndarray | Sequence[np.ndarray]) -> list[np.ndarray]:
    """Segment images with a trained network, each at its own size (step S7).

    Parameters
    ----------
    student : TrainedNetwork
        From `load_student`.
    images : (N, H, W, 3) uint8, or a sequence of (H, W, 3) uint8
        RGB of any size; prepared as for the training (size, padding, grey, equalization, gamma), and brought back.

    Returns
    -------
    list of (H, W) float32
        Probability that a pixel is lesion. Times 255 it is the mask image of the method; over 0.5, a mask.
    """
    for i, image in enumerate(images):
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
            raise LesionKDError(f"predict: image {i} has shape {image.shape} and type {image.dtype}; wants (H, W, 3) uint8")
    if not len(images):
        return []
    small = np.stack([prepare_image(image, student.cfg) for image in images])
    return [restore(p, image.shape[0], image.shape[1], student.cfg) for p, image in zip(probabilities(student.network, small), images)]


def predict_folder(
    student: TrainedNetwork, images: Path, out: Path, threshold: float | None = None, overlays: bool = False,
    tell: Callable[[int, int], None] = lambda *_: None,
) -> list[str]:
    """Write a mask for every image and volume of a folder, at its own size (step S7).

    Images give `NAME.png`. NIfTI and DICOM files and folders of DICOM series give `NAME.nii.gz` in the
    space of the scan; they are shown to the network in the `window` of the run's configuration.

    Parameters
    ----------
    threshold : float, optional
        In 0..1: masks are 0 and 255 (NIfTI: 0 and 1, uint8); without it they are probability x 255
        (NIfTI: probability, float32).
    overlays : bool
        Also write `NAME_overlay.png` with the contour drawn in; of a volume, the slice with most lesion.
    tell : callable(done, total)
        Called after every image.

    Returns
    -------
    list of str
        One line for every file that could not be read; the others are written.
    """
    from .datasets.volumes import is_dicom

    if not images.is_dir():
        raise LesionKDError(f"{images} is no folder of images")
    paths = [path for path in sources_in(images) if not path.is_dir() or is_dicom(path)]
    if not paths:
        raise LesionKDError(f"{images} holds no images (.png, .jpg, .bmp, .tif, .webp, .nii, .nii.gz, .dcm, or folders of DICOM series)")
    store.make_folder(out)
    stems = Counter(map(stem_of, paths))
    unreadable = []
    for done, path in enumerate(paths, start=1):
        try:
            _predict_file(student, path, out, stem_of(path) if stems[stem_of(path)] == 1 else path.name, threshold, overlays)
        except UnreadableFile as error:
            unreadable.append(str(error))
        tell(done, len(paths))
    return unreadable


def _predict_file(student: TrainedNetwork, path: Path, out: Path, name: str, threshold: float | None, overlays: bool) -> None:
    """Write the mask of an image, or of all slices of a volume."""
    from .datasets.volumes import read_volume, write_mask

    volume = read_volume(path) if is_volume(path) else None
    images = [] if volume else [read_image(path)]
    shape = volume.space.shape if volume else (1, *images[0].shape[:2])
    if min(shape[1:]) < 2:
        raise UnreadableFile(f"{path.name}: {shape[2]} x {shape[1]} px is no image to segment")
    slices = volume.images(student.cfg.window) if volume else iter(images)
    written = np.empty(shape, np.float32 if threshold is None else bool)
    z, most = 0, -1
    while batch := list(islice(slices, BATCH)):
        for image, probability in zip(batch, predict(student, batch)):
            lesion = probability > (0.5 if threshold is None else threshold)
            written[z] = probability if threshold is None else lesion
            z += 1
            if overlays and lesion.sum() > most:
                most, drawn = lesion.sum(), overlay(image, lesion)
    if volume:
        write_mask(out / f"{name}.nii.gz", written, path)
    else:
        _save(out / f"{name}.png", np.rint(written[0] * np.float32(255)).astype(np.uint8))
    if overlays:
        _save(out / f"{name}_overlay.png", drawn)


def _save(path: Path, pixels: np.ndarray) -> None:
    with store.replacing(path) as partial:
        Image.fromarray(pixels).save(partial, format="PNG")


def overlay(image: np.ndarray, mask: np.ndarray, colour: tuple[int, int, int] = (238, 119, 51)) -> np.ndarray:
    """Draw a mask's contour into a copy of an image, (H, W, 3) uint8; as wide as 0.4 % of the longer side."""
    drawn = image.copy()
    drawn[edge_label(mask, width=max(1, round(max(mask.shape) * 0.002)))] = colour
    return drawn
