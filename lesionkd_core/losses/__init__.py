"""The terms of L_total = sum over terms of weight x term (step S6), and their registry.

To add a term: derive a class from `LossTerm` in a file of this folder, decorate it with
``register`` and import it here. Notebook 05, docs/options.md and the sweep find it by its name.
"""

from __future__ import annotations

import torch
from torch import nn

from ..config import DistillConfig, TeacherConfig
from ..models import Network
from .edge_reasoning import (
    EdgeGraph,
    EdgeHead,
    EdgeReasoning,
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
from .terms import (
    TERMS,
    LossTerm,
    Measured,
    Step,
    Term,
    needs_graph,
    needs_teacher,
    register,
    resolve,
    unused_options,
)

from . import baselines  # isort: skip  # registers its terms after the method's own

__all__ = [
    "SEG_LOSSES",
    "TERMS",
    "Connector",
    "EdgeGraph",
    "EdgeHead",
    "EdgeReasoning",
    "FeatureRefinement",
    "FittedGraph",
    "LossTerm",
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
    "needs_graph",
    "needs_teacher",
    "node_distance",
    "partial_l2",
    "register",
    "resolve",
    "unused_options",
]


def build_terms(
    cfg: TeacherConfig,
    network: Network,
    teacher: Network | None = None,
    measured: Measured | None = None,
) -> nn.ModuleDict:
    """The modules of all terms of L_total for one network; of a teacher L_seg alone.

    The initialization of each depends on the seed only, not on the other terms.
    """
    names = resolve(cfg.losses) if isinstance(cfg, DistillConfig) else {"seg": 1.0}
    modules = nn.ModuleDict()
    for name in names:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(getattr(cfg, cfg.seed_field))
            term = TERMS[name].module
            modules[name] = term.build(cfg, network, teacher, measured or Measured())
    return modules
