"""Feature maps of teacher and students."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..batches import normalize
from ..config import DistillConfig, LesionKDError
from ..inference import TrainedNetwork, build, read_config
from ..losses import FeatureRefinement, margin_relu
from ..networks import M
from ..store import Result, read_checkpoint


@torch.no_grad()
def feature_maps(trained: TrainedNetwork, images: np.ndarray) -> tuple[Tensor, dict[str, Tensor]]:
    """(N, S, S, 3) uint8 -> logits (N, 1, S, S) and all maps before their last ReLU, by name (steps S1, S2)."""
    return trained.network.forward_features(normalize(images))


@torch.no_grad()
def mean_responses(networks: dict[str, TrainedNetwork], images: np.ndarray, levels: list[str]) -> dict[str, dict[str, np.ndarray]]:
    """Mean over channels of |map| for the first of `images`: {network: {level: (h, w)}}; 'a:b' as in `match_levels`."""
    shown = {}
    for side, (who, trained) in enumerate(networks.items()):
        maps = feature_maps(trained, images)[1]
        shown[who] = {name: maps[name][0].abs().mean(0).numpy() for name in (_name(level, side == 0) for level in levels)}
    return shown


def _name(level: str, of_teacher: bool) -> str:
    return level.rpartition(":")[2] if of_teacher else level.partition(":")[0]


@dataclass(frozen=True)
class FeatureView:
    """The channel of a map that tells a lesion best: values (h, w) in deviations from its mean over the image, and Cohen's d of lesion and rest."""

    values: np.ndarray
    channel: int
    separation: float


@torch.no_grad()
def feature_views(networks: dict[str, TrainedNetwork], image: np.ndarray, mask: np.ndarray, levels: Sequence[str]) -> dict[str, dict[str, FeatureView]]:
    """Maps of several networks side by side, each by the channel that answers the lesion most: {network: {level: FeatureView}}.

    Channels of two networks have nothing to do with each other, so each network shows its best, by one rule: largest
    (mean in the lesion - mean outside) / deviation over the image. In deviations, maps of any network share a scale.

    Parameters
    ----------
    networks : {name: TrainedNetwork}
        The teacher first.
    image, mask : (S, S, 3) uint8, (S, S) 0/1
    levels : sequence of str
        As in `match_levels`: 'a', or 'student:teacher'.
    """
    if not mask.any() or mask.all():
        raise LesionKDError("feature_views compares a lesion with the rest of its image; this mask is of one kind only, choose another case")
    shown = {}
    for side, (who, trained) in enumerate(networks.items()):
        maps = feature_maps(trained, image[None])[1]
        shown[who] = {level: _best_channel(maps[_name(level, side == 0)][0], mask) for level in levels}
    return shown


def _best_channel(x: Tensor, mask: np.ndarray) -> FeatureView:
    """(C, h, w) and mask (S, S) 0/1."""
    height, width = x.shape[-2:]
    lesion = F.adaptive_avg_pool2d(torch.tensor(mask).double()[None], (height, width)).flatten()  # share of lesion in each pixel
    flat = x.flatten(1).double()
    flat = (flat - flat.mean(1, keepdim=True)) / flat.std(1, correction=0, keepdim=True).clamp_min(1e-6)
    separation = flat @ (lesion / lesion.sum() - (1 - lesion) / (1 - lesion).sum())
    channel = int(separation.argmax())
    return FeatureView(flat[channel].view(height, width).float().numpy(), channel, float(separation[channel]))


def last_state(run: Result) -> dict[str, Tensor]:
    """Student, connectors and graph of a run as they were after the last epoch, by name; `checkpoint_best` holds the student alone."""
    state: dict[str, Tensor] = read_checkpoint(run.path / "checkpoint_last")["objective"]
    return state


def restore(module: M, state: dict[str, Tensor], prefix: str) -> M:
    """A module with its part of `last_state`, frozen."""
    module.load_state_dict({name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)})
    return module.eval().requires_grad_(False)


@torch.no_grad()
def refinement_view(run: Result, teacher: TrainedNetwork, images: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """T, T' = max(T, m) and connected S of the shallowest level for the first image, each (C, h, w), and the
    channel of T's largest mean response. Network and connectors are those of the last epoch (step S3)."""
    cfg, state = read_config(run.path), last_state(run)
    assert isinstance(cfg, DistillConfig)
    student = restore(build(cfg), state, "network.")
    loss = restore(FeatureRefinement(student, teacher.network, cfg.feature_levels, cfg.level_weights), state, "terms.feat.")
    name_s, name_t = loss.pairs[0]
    t = feature_maps(teacher, images)[1][name_t]
    s = loss.connectors[0](student.forward_features(normalize(images))[1][name_s])
    channel = int(t[0].clamp_min(0).mean((1, 2)).argmax())
    return t[0].numpy(), margin_relu(t, loss.get_buffer("margin0"))[0].numpy(), s[0].numpy(), channel
