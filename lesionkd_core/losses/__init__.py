"""The terms of L_total = sum over terms of weight x term (step S6), and their registry.

To add a term: write a class with ``forward(step)`` in a file of this folder, decorate it with
``register`` and import it here. Notebook 05, docs/options.md and the sweep find it by its name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..models import Network
from .edge_reasoning import (
    EdgeGraph,
    EdgeHead,
    EdgeReasoning,
    EdgeRelation,
    FittedGraph,
    derange,
    grid_cells,
    node_distance,
)
from .feature_refinement import (
    Connector,
    FeatureRefinement,
    bn_margin,
    empirical_margins,
    margin_relu,
    partial_l2,
)
from .segmentation import SEG_LOSSES, SegmentationLoss, bce, bce_dice
from .terms import TERMS, Step, Term, register

from . import baselines  # isort: skip  # registers its terms after the method's own

__all__ = [
    "SEG_LOSSES",
    "TERMS",
    "Connector",
    "EdgeGraph",
    "EdgeHead",
    "EdgeReasoning",
    "EdgeRelation",
    "FeatureRefinement",
    "FittedGraph",
    "Measured",
    "SegmentationLoss",
    "Step",
    "Term",
    "baselines",
    "bce",
    "bce_dice",
    "bn_margin",
    "build_terms",
    "derange",
    "empirical_margins",
    "grid_cells",
    "margin_relu",
    "node_distance",
    "partial_l2",
    "register",
]


@dataclass(frozen=True)
class Measured:
    """What was measured on the frozen teacher before the students are trained."""

    fitted: FittedGraph | None = None
    margins: dict[str, Tensor] | None = None  # from `empirical_margins`


def build_terms(
    cfg: Any, network: Network, teacher: Network | None = None, measured: Measured | None = None
) -> nn.ModuleDict:
    """The modules of all terms of L_total for one network.

    `cfg.losses` names them; a configuration without it (the teacher's) has L_seg alone. The
    initialization of each depends on the seed only, not on the other terms.
    """
    modules = nn.ModuleDict()
    for name in getattr(cfg, "losses", ("seg",)):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(getattr(cfg, cfg.seed_field))
            build = TERMS[name].module.build  # type: ignore[attr-defined]
            modules[name] = build(cfg, network, teacher, measured or Measured())
    return modules
