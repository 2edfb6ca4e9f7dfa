"""The terms of L_total, in the order of METHOD.md; the ablation loops over them.

L_total = w_seg L_seg + w_feat L_feat + w_edge L_edge (step S6); a rival's arm has its own term in their place.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .. import ranks
from ..config import DistillConfig
from ..networks import Network
from .baselines import OnLogits, OnMaps, attention_loss, cwd_loss, dist_loss, hint_loss, kd_loss
from .edge_reasoning import EdgeGraph, EdgeHead, EdgeReasoning, EdgeRelation, derange, grid_cells
from .feature_refinement import FeatureRefinement, bn_margin, empirical_margins, margin_relu, partial_l2, segmentation_loss

__all__ = [
    "TERMS", "EdgeGraph", "EdgeHead", "EdgeReasoning", "EdgeRelation", "FeatureRefinement", "FittedGraph", "Measured", "Step", "Term",
    "bn_margin", "build_terms", "derange", "empirical_margins", "grid_cells", "margin_relu", "partial_l2", "segmentation_loss",
]


@dataclass
class Step:
    """All that a loss term may look at in one step; full-size tensors are (N, 1, H, W); `epoch` counts from 0."""

    logits: Tensor
    maps: dict[str, Tensor]
    masks: Tensor
    edge: Tensor
    teacher_logits: Tensor
    teacher_maps: dict[str, Tensor]
    shared: dict[Hashable, Any] = field(default_factory=dict)
    epoch: int = 0

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What depends on the batch and the teacher alone: made by the first arm that asks, found by the others."""
        if key not in self.shared:
            self.shared[key] = make()
        return self.shared[key]

    def edge_label(self, shuffled: bool) -> Tensor:
        """The edge label of every case, or of another case (the control)."""
        return self.once(("shuffled", id(self.edge)), lambda: ranks.own(derange(ranks.gather(self.edge)))) if shuffled else self.edge


@dataclass(frozen=True)
class FittedGraph:
    """The graph module as fitted on the frozen teacher, and the spread of the teacher's H, (s,)."""

    graph: EdgeGraph
    std: Tensor


@dataclass(frozen=True)
class Measured:
    """What the training set says about the frozen teacher, as far as the terms need it."""

    fitted: FittedGraph | None = None
    margins: dict[str, Tensor] | None = None  # from `empirical_margins`


@dataclass(frozen=True)
class Term:
    """A loss term: the field of its weight, its module and how it reads a step."""

    weight: str
    build: Callable[[DistillConfig, Network, Network, Measured], nn.Module]
    compute: Callable[[nn.Module, Step, DistillConfig], Tensor]


def _refinement(cfg: DistillConfig, student: Network, teacher: Network, measured: Measured) -> nn.Module:
    return FeatureRefinement(student, teacher, cfg.feature_levels, cfg.level_weights, measured.margins if cfg.margin == "empirical" else None)


def _reasoning(cfg: DistillConfig, student: Network, teacher: Network, measured: Measured) -> nn.Module:
    if cfg.graph == "relation":
        return EdgeRelation(student, teacher, cfg.edge_level, cfg.grid, cfg.grid_frame)
    if cfg.graph == "joint":
        channels = teacher.feature_norms()[cfg.edge_level.rpartition(":")[2]].num_features
        graph = EdgeGraph(channels, cfg.states, cfg.grid, cfg.anchors, cfg.normalize, cfg.grid_frame)
        return EdgeReasoning(student, teacher, graph, torch.ones(cfg.states), cfg.edge_level, EdgeHead(cfg.states))
    assert measured.fitted, "the graph is fitted before the students"
    return EdgeReasoning(student, teacher, measured.fitted.graph, measured.fitted.std, cfg.edge_level)


def _refine(module: nn.Module, step: Step, cfg: DistillConfig) -> Tensor:
    warming = step.epoch < cfg.connector_warmup
    maps = {name: value.detach() for name, value in step.maps.items()} if warming else step.maps
    loss: Tensor = module(maps, step.teacher_maps, step.once)
    return loss


def _rival(module: nn.Module, step: Step, _: DistillConfig) -> Tensor:
    loss: Tensor = module(step)
    return loss


TERMS: dict[str, Term] = {
    "feat": Term("w_feat", _refinement, _refine),
    "edge": Term("w_edge", _reasoning, lambda module, step, cfg: module(step.maps, step.teacher_maps, step.edge_label(cfg.shuffle_edges), step.once)),
    "kd": Term("w_kd", lambda cfg, *_: OnLogits(partial(kd_loss, temperature=cfg.kd_temperature)), _rival),
    "fitnets": Term("w_fitnets", lambda cfg, student, teacher, _: OnMaps(student, teacher, cfg.fitnets_levels, hint_loss, regress=True), _rival),
    "at": Term("w_at", lambda cfg, student, teacher, _: OnMaps(student, teacher, cfg.at_levels, attention_loss, regress=False), _rival),
    "cwd": Term("w_cwd", lambda cfg, *_: OnLogits(partial(cwd_loss, temperature=cfg.cwd_temperature)), _rival),
    "dist": Term("w_dist", lambda cfg, *_: OnLogits(partial(dist_loss, temperature=cfg.dist_temperature), whole=True), _rival),
}
"""The method's two terms, then its rivals, in the order in which tables show them."""


def build_terms(cfg: DistillConfig, student: Network, teacher: Network | None, measured: Measured) -> nn.ModuleDict:
    """The modules of the terms that `cfg` names; each one's initialization depends on the seed alone, not on the other terms."""
    modules = nn.ModuleDict()
    for name, term in TERMS.items():
        if name in cfg.terms:
            assert teacher, "every term wants a teacher"
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(cfg.seed)
                modules[name] = term.build(cfg, student, teacher, measured)
    return modules
