"""The terms of L_total = sum over terms of weight x term (step S6), and their registry.

To add a term: derive a class from `LossTerm` in a file of your own and decorate it with
``register``, as in examples/losses.py.
"""

from __future__ import annotations

import torch
from torch import nn

from ..config import DistillConfig, LesionKDError, TeacherConfig
from ..models import Network
from .edge_reasoning import EdgeGraph, EdgeHead, EdgeReasoning, FittedGraph
from .feature_refinement import FeatureRefinement, bn_margin, margin_relu, partial_l2
from .segmentation import bce, bce_dice
from .terms import (
    TERMS,
    LossTerm,
    Measured,
    Setup,
    Step,
    Term,
    needs_graph,
    needs_teacher,
    own_code,
    register,
    resolve,
    unused_options,
)

from . import baselines  # isort: skip  # registers its terms after the method's own


def build_terms(
    cfg: TeacherConfig,
    network: Network,
    teacher: Network | None = None,
    measured: Measured | None = None,
) -> nn.ModuleDict:
    """The modules of all terms of L_total for one network; of a teacher L_seg alone.

    The initialization of each depends on the seed only, not on the other terms.
    """
    setup = Setup(cfg, network, teacher, measured or Measured())  # type: ignore[arg-type]
    names = resolve(cfg.losses) if isinstance(cfg, DistillConfig) else {"seg": 1.0}
    modules = nn.ModuleDict()
    for name in names:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(getattr(cfg, cfg.seed_field))
            modules[name] = TERMS[name].module.build(setup)
        trained = any(p.requires_grad for p in modules[name].parameters())
        if trained and "connector_lr" not in TERMS[name].options:
            raise LesionKDError(
                f"the loss term {name!r} trains layers of its own, whose learning rate depends on "
                "connector_lr: name that in the options of its @register"
            )
    return modules
