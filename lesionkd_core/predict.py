"""Use a trained network: probabilities, masks, and whole folders of images (step S7)."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np
import pandas as pd
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from . import results
from .config import DistillConfig, LesionKDError, TeacherConfig
from .data.batches import normalize
from .data.images import (
    FORMATS,
    IMAGE_SUFFIXES,
    VOLUME_SUFFIXES,
    Case,
    UnreadableFile,
    count_pages,
    images_in,
    is_volume,
    noted_image,
    read_image,
    stem_of,
    suffix_of,
    volume_reader,
)
from .data.layouts import images_below, window_of
from .data.pixels import prepare_image, restore, unseen
from .edges import edge_label
from .models import Network, build_network, parameter_count, start_at_prior
from .results import Content, Result

C = TypeVar("C", bound=TeacherConfig)
Picture = np.ndarray | Image.Image | Path | str
"""(H, W, 3) uint8 in RGB, a PIL image or the path of a picture."""

TRAINED: dict[str, type[TeacherConfig]] = {"teacher": TeacherConfig, "distill": DistillConfig}
STUDENTS = results.CHECKOUT / "data" / "students"
"""Trained students that come with the repository."""
AREAS = ["file", "slice", "lesion_px", "lesion_fraction", "lesion_mm2", "components"]
NOT_READ = "not read"
"""Action of a row of `report.csv`; the others are noted and shows little."""
BATCH = 16
"""Slices of a volume in memory at a time."""
LONGEST = 200
"""Bytes of a name that leave room for what is added to it; file systems take 255."""
WRITTEN = r"(_page\d+|_z\d+|_overlay)+$"
"""What is added to the name of an image for the files that belong to it."""


@dataclass(frozen=True)
class TrainedNetwork:
    """A trained network and its run's configuration, which says how images are prepared.

    `summary` has the scores of the run, `digest` the SHA-256 of all that it was made from.
    """

    network: Network
    cfg: TeacherConfig
    path: Path
    summary: Content = field(default_factory=dict)
    digest: str = ""

    @property
    def pixels(self) -> int:
        """Side of the square that it was trained on, px."""
        return self.cfg.pixels

    def predict(self, images: Iterable[Picture]) -> list[np.ndarray]:
        """Segment images of any size (step S7).

        Parameters
        ----------
        images : (N, H, W, 3) uint8, or an iterable of images
            Each is (H, W, 3) uint8 in RGB, a PIL image or the path of a picture.

        Returns
        -------
        list of (H, W) float32
            Probability that a pixel is lesion, at the image's own size.
        """
        if isinstance(images, (str, Path, Image.Image)):
            raise LesionKDError("predict: expected a list of images; put the one image into [ ]")
        pixels = [_pixels(image, self.cfg) for image in images]
        for i, image in enumerate(pixels):
            if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
                raise LesionKDError(
                    f"predict: image {i} has shape {image.shape} and type {image.dtype}; "
                    "expected (H, W, 3) uint8"
                )
        if not pixels:
            return []
        small = np.stack([prepare_image(image, self.cfg) for image in pixels])
        found = self.probabilities(small)
        return [restore(p, len(x), x.shape[1], self.cfg) for p, x in zip(found, pixels)]

    def probabilities(self, images: np.ndarray) -> np.ndarray:
        """Prepared images (N, S, S, 3) uint8 -> probability of lesion (N, S, S) float32."""
        return probabilities(self.network, images)

    def to(self, device: str) -> None:
        """Move the network to `cpu`, `cuda` or `mps`."""
        try:
            self.network.to(device)
        except (RuntimeError, AssertionError) as error:  # torch raises both
            reason = str(error).partition("\n")[0]
            raise LesionKDError(f"device = {device!r} cannot be used here: {reason}") from None

    def __repr__(self) -> str:
        count = f"{parameter_count(self.network):,} parameters, {self.pixels} px"
        return f"{type(self.network).__name__}({results.short(self.path)}: {count})"


def config_of(kind: type[C], content: Content) -> C:
    """A configuration from its JSON form; options that it does not know are ignored."""
    return kind(**{name: content[name] for name in kind.model_fields if name in content})


def build(cfg: TeacherConfig, lesion_fraction: float | None = None) -> Network:
    """The untrained network of a configuration; its weights depend on the seed alone.

    With the fraction of lesion pixels its head predicts that fraction.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(getattr(cfg, cfg.seed_field))
        if isinstance(cfg, DistillConfig):
            network = build_network(cfg.student, width=cfg.width)
        else:
            network = build_network(cfg.teacher)
    if lesion_fraction:
        start_at_prior(network, lesion_fraction)
    return network


def load_network(run: Result | Path | str) -> TrainedNetwork:
    """A trained teacher or student, at its best epoch, in evaluation mode on the CPU.

    Parameters
    ----------
    run : Result, Path or str
        A finished run, its folder or name; the name of a published student, such as `breast`; or a
        file that `save_student` wrote.

    Raises
    ------
    UnfinishedRun, LesionKDError
        The folder is not a finished training run, or its checkpoint does not fit.
    """
    if not isinstance(run, Result):
        for file in (Path(run), STUDENTS / f"{run}.safetensors"):
            if file.is_file() and file.suffix == ".safetensors":
                return _read_student(file)
    try:
        path = results.locate(run)
    except results.UnfinishedRun as error:
        names = ", ".join(sorted(file.stem for file in STUDENTS.glob("*.safetensors")))
        raise results.UnfinishedRun(f"{error} Published students: {names or 'none'}.") from None
    made = results.read_json(path / "config.json")
    stage = made.get("stage", "")
    if stage not in TRAINED:
        raise LesionKDError(f"{path} is a run of stage {stage!r}; expected {' or '.join(TRAINED)}")
    cfg = config_of(TRAINED[stage], made)
    if not results.is_done(path):
        raise results.UnfinishedRun(f"{path} is not finished (no DONE); run it again to resume.")
    summary = results.summary_of(path)
    field = "student" if isinstance(cfg, DistillConfig) else "teacher"
    name, _, code = cfg.networks()[field].partition(" ")
    if code:  # a network of your own
        then = results.read_json(path / "env.json").get("networks", {}).get(field)
        if then and then != f"{name} {code}":
            results.log.warning(f"warning: the file of {name} has changed since {run} was trained")
    try:
        weights = results.read_checkpoint(path / "checkpoint_best")["network"]
        return _trained(cfg, weights, path, summary, made.get("digest", ""))
    except (RuntimeError, KeyError, TypeError):
        raise LesionKDError(f"{path}/checkpoint_best has the weights of another network") from None


def _trained(
    cfg: TeacherConfig, weights: dict[str, Tensor], path: Path, summary: Content, digest: str
) -> TrainedNetwork:
    network = build(cfg)
    network.load_state_dict(weights)
    return TrainedNetwork(network.eval().requires_grad_(False), cfg, path, summary, digest)


def load_student(run: Result | Path | str) -> TrainedNetwork:
    """A trained student, from what `load_network` takes; a teacher is refused."""
    if not isinstance(run, Result) and Path(run).suffix == ".onnx":
        raise LesionKDError(f"{run} is an exported file: read it with lkd.load_onnx")
    student = load_network(run)
    if not isinstance(student.cfg, DistillConfig):
        raise LesionKDError(f"{student.path} is a teacher; give the folder of a student")
    return student


def save_student(student: TrainedNetwork, file: Path) -> None:
    """Write a student into one safetensors file, with its configuration and scores."""
    content = {
        "config": student.cfg.model_dump(mode="json"),
        "summary": student.summary,
        "digest": student.digest,
    }
    weights = {name: x.contiguous() for name, x in student.network.state_dict().items()}
    with results.replacing(file) as partial:
        save_file(weights, partial, {"lesionkd": json.dumps(content)})


def _read_student(file: Path) -> TrainedNetwork:
    try:
        with safe_open(file, "pt") as opened:
            content = json.loads(opened.metadata()["lesionkd"])
            weights = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        cfg = config_of(DistillConfig, content["config"])
        return _trained(cfg, weights, file, content["summary"], content["digest"])
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise LesionKDError(
            f"{file} is not a student that `save_student` wrote, or it is damaged: {reason}"
        ) from None


@torch.inference_mode()
def probabilities(network: nn.Module, images: np.ndarray, batch_size: int = 32) -> np.ndarray:
    """Probability that a pixel is lesion: (N, S, S, 3) uint8 -> (N, S, S) float32 (step S2)."""
    device, training = next(network.parameters()).device, network.training
    network.eval()
    parts = [
        network(normalize(images[i : i + batch_size], device))[:, 0].sigmoid().float().cpu()
        for i in range(0, len(images), batch_size)
    ]
    network.train(training)
    return torch.cat(parts).numpy()


def _pixels(image: Picture, cfg: TeacherConfig) -> np.ndarray:
    if isinstance(image, (str, Path)):
        return read_image(Path(image), window_of(cfg))
    if isinstance(image, Image.Image):
        if image.mode[0] in "IF":
            raise LesionKDError(
                f"predict: an image of mode {image.mode} has more than 8 bits; give its path, or "
                "scale it to RGB"
            )
        image = image.convert("RGB")
    return np.asarray(image)


def predict_folder(
    student: TrainedNetwork,
    images: Path,
    out: Path,
    threshold: float | None = None,
    overlays: bool = False,
    pixel_mm: float | None = None,
) -> list[str]:
    """Write a mask for every image and volume of a folder, at its own size (step S7).

    Sub-folders are segmented too, into sub-folders of `out`. Pictures give `NAME.png`, the pages of
    a TIFF stack `NAME_page000.png` and so on. Volumes give `NAME.nii.gz` in the space of the scan;
    a folder that holds one DICOM series is one volume. A name keeps its suffix (`NAME.jpg.png`) if
    files would overwrite each other otherwise. `report.csv` lists what was not read, pictures that
    show little, and notes: pages, contrast. `areas.csv` has one row for each picture, page
    or slice: lesion_px, lesion_fraction of the image, lesion_mm2 (of volumes, and with
    `pixel_mm`) and components (8-connected).

    Parameters
    ----------
    images : Path
        A folder, or one picture or volume.
    threshold : float, optional
        In 0..1: masks are 0 and 255 (volumes: 0 and 1). Otherwise they are probability x 255
        (volumes: probability, float32).
    overlays : bool
        Also write `NAME_overlay.png` with the contour; of a volume, the slice with most lesion, as
        `NAME_z012_overlay.png`.
    pixel_mm : float, optional
        Side of a pixel of the pictures, in mm.

    Returns
    -------
    list of str
        One line for each file that could not be read; the others are written.
    """
    if threshold is not None and not 0 <= threshold <= 1:
        raise LesionKDError(f"threshold = {threshold}: expected a probability from 0 to 1")
    paths, others = _to_segment(images, out)
    _refuse_to_overwrite(paths, images, out)
    above = images if images.is_dir() and paths != [images] else images.parent
    results.make_folder(out)
    write = _Writer(student, out, threshold, overlays, pixel_mm)
    for case in others:
        write.note(case.image.relative_to(above).as_posix(), NOT_READ, case.problem)
    names = _names(paths)
    with results.Progress("masks", "image", len(paths), lines=10) as progress:
        for path in paths:
            file = path.relative_to(above).as_posix()
            name = str(Path(file).with_name(names[path]))
            segment = write.volume if is_volume(path) else write.picture
            try:
                if len(names[path].encode()) > LONGEST:
                    raise UnreadableFile(f"{path.name}: the name is too long; shorten it")
                segment(path, file, name)
            except UnreadableFile as error:
                write.note(file, NOT_READ, str(error))
            progress.step()
    report = pd.DataFrame(write.notes, columns=["file", "action", "reason"])
    results.write_table(out / "report.csv", report)
    results.write_table(out / "areas.csv", pd.DataFrame(write.areas, columns=AREAS))
    return [reason for _, action, reason in write.notes if action == NOT_READ]


def _to_segment(images: Path, out: Path) -> tuple[list[Path], list[Case]]:
    """Pictures, volume files and DICOM series, and a case with a problem for what is not read."""
    if images.is_file():
        if suffix_of(images) not in IMAGE_SUFFIXES | VOLUME_SUFFIXES:
            raise LesionKDError(f"{images} is no image of a format that is read: {FORMATS}")
        return [images], []
    if not images.is_dir():
        raise LesionKDError(f"{images} does not exist; give a folder of images, or one image")
    return images_below(images, leave_out=out.resolve())


def _refuse_to_overwrite(paths: list[Path], images: Path, out: Path) -> None:
    """Refuse a folder with images of the user as `out`; one of earlier masks has `areas.csv`."""
    place = out.resolve()
    inside = images.is_dir() and images.resolve() in place.parents and out.is_dir()
    holds_images = inside and images_in(out) and not (out / "areas.csv").is_file()
    folders = {path if path.is_dir() else path.parent for path in [images, *paths]}
    if holds_images or place in {folder.resolve() for folder in folders}:
        raise LesionKDError(
            f"out = {out} holds your images, which masks could overwrite; choose another folder"
        )


def _names(paths: list[Path]) -> dict[Path, str]:
    """Names of the masks, without suffix: no file that is written has the name of another.

    a.png beside a.jpg, or lesion_overlay.png beside lesion.png, keep their suffix in the name.
    """
    stems = Counter((path.parent, stem_of(path).casefold()) for path in paths)
    names: dict[Path, str] = {}
    taken: set[tuple[Path, str]] = set()
    for path in sorted(paths, key=lambda path: len(stem_of(path))):
        folder, stem = path.parent, stem_of(path)
        written = re.sub(WRITTEN, "", stem).casefold()
        shared = stems[folder, stem.casefold()] > 1 or (folder, written) in taken
        names[path] = path.name if shared else stem
        taken |= {(folder, written), (folder, names[path].casefold())}
    return names


@dataclass
class _Writer:
    """Segments one file at a time and collects the rows of `report.csv` and `areas.csv`."""

    student: TrainedNetwork
    out: Path
    threshold: float | None
    overlays: bool
    pixel_mm: float | None
    notes: list[tuple[str, str, str]] = field(default_factory=list)
    areas: list[dict[str, object]] = field(default_factory=list)

    def note(self, file: str, action: str, reason: str) -> None:
        """Add a row to the report."""
        self.notes.append((file, action, reason))

    def picture(self, path: Path, file: str, name: str) -> None:
        """Write a mask for each page."""
        pages = count_pages(path)
        area = self.pixel_mm and self.pixel_mm**2
        for page in range(pages):
            number, stem, place = None, name, ""
            if pages > 1:
                number, stem, place = page, f"{name}_page{page:03d}", f"page {page}: "
            image, read, _ = noted_image(path, number, window_of(self.student.cfg))
            _check_size(path, *image.shape[:2])
            for note in read:
                self.note(file, "noted", place + note)
            for note in unseen(image, prepare_image(image, self.student.cfg)):
                self.note(file, "shows little", place + note)
            [probability] = self.student.predict([image])
            lesion, written = self._decided(probability)
            self.areas.append({"file": file, "slice": number} | _area(lesion, area))
            save_png(self.out / f"{stem}.png", np.rint(written * np.float32(255)).astype(np.uint8))
            if self.overlays:
                save_png(self.out / f"{stem}_overlay.png", overlay(image, lesion))

    def volume(self, path: Path, file: str, name: str) -> None:
        """Write a mask volume."""
        reader = volume_reader()
        volume = reader.read_volume(path)
        _check_size(path, *volume.space.shape[1:])
        for note in volume.notes:
            self.note(file, "noted", note)
        slices = volume.images(window_of(self.student.cfg))
        mask = np.empty(volume.space.shape, np.float32 if self.threshold is None else bool)
        z, most, fullest, drawn = 0, -1, 0, np.empty(0)
        area = math.prod(volume.space.spacing[1:])
        while batch := list(islice(slices, BATCH)):
            for image, probability in zip(batch, self.student.predict(batch)):
                lesion, mask[z] = self._decided(probability)
                self.areas.append({"file": file, "slice": z} | _area(lesion, area))
                if self.overlays and lesion.sum() > most:
                    most, fullest, drawn = lesion.sum(), z, overlay(image, lesion)
                z += 1
        reader.write_mask(self.out / f"{name}.nii.gz", mask, path)
        if self.overlays:
            save_png(self.out / f"{name}_z{fullest:03d}_overlay.png", drawn)

    def _decided(self, probability: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The lesion (bool), and what is written: it, or without a threshold the probability."""
        lesion = probability > (0.5 if self.threshold is None else self.threshold)
        return lesion, probability if self.threshold is None else lesion


def _area(lesion: np.ndarray, pixel_mm2: float | None) -> dict[str, object]:
    """Of a mask (H, W) bool for a row of `areas.csv`."""
    from scipy import ndimage

    count = int(lesion.sum())
    return {
        "lesion_px": count,
        "lesion_fraction": count / lesion.size,
        "lesion_mm2": count * pixel_mm2 if pixel_mm2 else None,
        "components": ndimage.label(lesion, np.ones((3, 3)))[1],
    }


def _check_size(path: Path, height: int, width: int) -> None:
    if min(height, width) < 2:
        raise UnreadableFile(f"{path.name}: {width} x {height} px is too small to segment")


def save_png(path: Path, pixels: np.ndarray) -> None:
    """Write an image (H, W) or (H, W, 3) uint8 completely or not at all."""
    with results.replacing(path) as partial:
        Image.fromarray(pixels).save(partial, format="PNG")


OUTLINE = (51, 187, 238)
"""Colour of a student's masks on images: cyan, which skin, mucosa and grey tissue do not have."""


def overlay(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Draw a mask into a copy of an image: lightly filled, with an outline between dark lines.

    image (H, W, 3) uint8, mask (H, W) bool -> (H, W, 3) uint8.
    """
    drawn, width = image.copy(), max(1, round(max(mask.shape) * 0.002))
    drawn[mask] = np.rint(0.75 * image[mask] + 0.25 * np.array(OUTLINE))
    drawn[edge_label(mask, width + 1)] = (0, 0, 0)
    drawn[edge_label(mask, width)] = OUTLINE
    return drawn
