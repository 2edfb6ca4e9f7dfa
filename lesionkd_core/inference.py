"""Using a trained network: probabilities, masks and whole folders of images (step S7)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from . import store
from .batches import normalize
from .config import DistillConfig, LesionKDError, StageConfig, TeacherConfig
from .datasets import UnreadableFile, read_image
from .edges import edge_label
from .networks import TEACHERS, UNet
from .prepare import resize_image

SETTINGS = {"teacher": TeacherConfig, "distill": DistillConfig}


@dataclass(frozen=True)
class TrainedNetwork:
    """A finished network and what it was trained on; `predict` takes it."""

    network: nn.Module
    pixels: int
    path: Path

    def __repr__(self) -> str:
        count = sum(p.numel() for p in self.network.parameters())
        return f"{type(self.network).__name__}({store.short(self.path)}: {count:,} parameters, {self.pixels} px)"


def read_config(path: Path) -> StageConfig:
    """The configuration that a run was made with."""
    content = store.read_json(Path(path) / "config.json")
    stage = SETTINGS.get(content.get("stage"))
    if stage is None:
        raise LesionKDError(f"{path} is a run of stage {content.get('stage')!r}, wants one of {', '.join(SETTINGS)}")
    values = {name: content[name] for name in stage.model_fields if name in content}
    return stage(**{n: tuple(v) if isinstance(v, list) else v for n, v in values.items()})


def build(cfg: StageConfig) -> nn.Module:
    """The untrained network of a configuration; its initialization depends on its seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(getattr(cfg, cfg.seed_field))
        return UNet(width=cfg.width) if isinstance(cfg, DistillConfig) else TEACHERS[cfg.teacher]()


def load_network(run: str | Path) -> TrainedNetwork:
    """The best network of a finished teacher or student run, in evaluation mode on the CPU.

    Raises
    ------
    UnfinishedRun, LesionKDError
        The folder is no finished training run, or its checkpoint is not of this network.
    """
    path = Path(getattr(run, "path", run)).expanduser()
    if not path.exists() and path.parts[:1] == ("runs",):  # as notebooks print it
        path = store.runs_root().joinpath(*path.parts[1:])
    path = path.resolve()
    cfg = read_config(path)
    if not store.is_done(path):
        raise store.UnfinishedRun(f"{path} is not finished (no DONE in it); start its notebook again to go on with it.")
    network = build(cfg)
    try:
        network.load_state_dict(store.read_checkpoint(path / "checkpoint_best")["network"])
    except (RuntimeError, KeyError, TypeError):
        raise LesionKDError(f"{path / 'checkpoint_best'} holds weights of another network than config.json beside it describes") from None
    return TrainedNetwork(network.eval().requires_grad_(False), cfg.pixels, path)


def load_student(run: str | Path) -> TrainedNetwork:
    """The trained student of a finished `distill` run (a `Run` or its folder): all that step S7 needs."""
    student = load_network(run)
    if not isinstance(read_config(student.path), DistillConfig):
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
        RGB of any size; brought to the training size and back.

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
    small = np.stack([resize_image(image, student.pixels) for image in images])
    return [_resize(p, image.shape[:2]) for p, image in zip(probabilities(student.network, small), images)]


def _resize(probability: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    if probability.shape == size:
        return probability
    resized = Image.fromarray(probability).resize((size[1], size[0]), Image.Resampling.BILINEAR)
    return np.asarray(resized).clip(0, 1)


def predict_folder(
    student: TrainedNetwork, images: Path, out: Path, threshold: float | None = None, overlays: bool = False, tell=lambda *_: None
) -> list[str]:
    """Write a mask for every image of a folder, at the image's own size (step S7).

    Parameters
    ----------
    threshold : float, optional
        In 0..1: masks are 0 and 255; without it they are probability x 255.
    overlays : bool
        Also write `NAME_overlay.png` with the contour drawn in.
    tell : callable(done, total)
        Called after every image.

    Returns
    -------
    list of str
        One line for every file that could not be read; the others are written.
    """
    from .datasets.files import images_in

    if not images.is_dir():
        raise LesionKDError(f"{images} is no folder of images")
    paths = images_in(images)
    if not paths:
        raise LesionKDError(f"{images} holds no images (.png, .jpg, .bmp, .tif, .webp)")
    store.make_folder(out)
    stems = Counter(path.stem for path in paths)
    unreadable = []
    for done, path in enumerate(paths, start=1):
        name = path.stem if stems[path.stem] == 1 else path.name
        try:
            image = read_image(path)
            if min(image.shape[:2]) < 2:
                raise UnreadableFile(f"{path.name}: {image.shape[1]} x {image.shape[0]} px is no image to segment")
        except UnreadableFile as error:
            unreadable.append(str(error))
        else:
            [probability] = predict(student, [image])
            mask = probability if threshold is None else (probability > threshold).astype(np.float32)
            _save(out / f"{name}.png", np.rint(mask * 255).astype(np.uint8))
            if overlays:
                _save(out / f"{name}_overlay.png", overlay(image, probability > (0.5 if threshold is None else threshold)))
        tell(done, len(paths))
    return unreadable


def _save(path: Path, pixels: np.ndarray) -> None:
    with store.replacing(path) as partial:
        Image.fromarray(pixels).save(partial, format="PNG")


def overlay(image: np.ndarray, mask: np.ndarray, colour: tuple[int, int, int] = (238, 119, 51)) -> np.ndarray:
    """Draw a mask's contour into a copy of an image, (H, W, 3) uint8; as wide as 0.4 % of the longer side."""
    drawn = image.copy()
    drawn[edge_label(mask, width=max(1, round(max(mask.shape) * 0.002)))] = colour
    return drawn
