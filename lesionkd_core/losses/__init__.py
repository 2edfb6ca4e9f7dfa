"""The terms of L_total, in the order of METHOD.md; the ablation loops over them.

L_total = w_seg L_seg + w_feat L_feat + w_edge L_edge (step S6)
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..config import DistillConfig
from .edge_reasoning import EdgeGraph, EdgeHead, EdgeReasoning, derange, grid_cells
from .feature_refinement import FeatureRefinement, bn_margin, margin_relu, partial_l2, segmentation_loss

__all__ = [
    "TERMS", "EdgeGraph", "EdgeHead", "EdgeReasoning", "FeatureRefinement", "FittedGraph", "Step", "Term", "bn_margin",
    "build_terms", "derange", "grid_cells", "margin_relu", "partial_l2", "segmentation_loss",
]


@dataclass
class Step:
    """All that a loss term may look at in one step; full-size tensors are (N, 1, H, W)."""

    logits: Tensor
    maps: dict[str, Tensor]
    masks: Tensor
    edge: Tensor
    teacher_logits: Tensor
    teacher_maps: dict[str, Tensor]


@dataclass(frozen=True)
class FittedGraph:
    """The graph module as fitted on the frozen teacher, and the spread of the teacher's H, (s,)."""

    graph: EdgeGraph
    std: Tensor


@dataclass(frozen=True)
class Term:
    """A loss term: the field of its weight, its module and how it reads a step."""

    weight: str
    build: Callable[[DistillConfig, nn.Module, nn.Module, FittedGraph | None], nn.Module]
    compute: Callable[[nn.Module, Step, DistillConfig], Tensor]


def _refinement(cfg: DistillConfig, student: nn.Module, teacher: nn.Module, _: FittedGraph | None) -> nn.Module:
    return FeatureRefinement(student, teacher, cfg.feature_levels, cfg.level_weights)


def _reasoning(cfg: DistillConfig, student: nn.Module, teacher: nn.Module, fitted: FittedGraph | None) -> nn.Module:
    return EdgeReasoning(student, teacher, copy.deepcopy(fitted.graph), fitted.std, cfg.edge_level)


TERMS: dict[str, Term] = {
    "feat": Term("w_feat", _refinement, lambda module, step, cfg: module(step.maps, step.teacher_maps)),
    "edge": Term(
        "w_edge", _reasoning,
        lambda module, step, cfg: module(step.maps, step.teacher_maps, derange(step.edge) if cfg.shuffle_edges else step.edge),
    ),
}


def build_terms(cfg: DistillConfig, student: nn.Module, teacher: nn.Module | None, fitted: FittedGraph | None) -> nn.ModuleDict:
    """The modules of the terms that `cfg` names; each one's initialization depends on the seed alone, not on the other terms."""
    modules = nn.ModuleDict()
    for name, term in TERMS.items():
        if name in cfg.terms:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(cfg.seed)
                modules[name] = term.build(cfg, student, teacher, fitted)
    return modules
