"""The arrows of the way of the data: teacher, graph, student, ablation; each finds or makes its result."""

from .ablation import Ablation, ablate
from .graph import Graph, fit_graph
from .student import distill, distill_arms
from .teacher import Run, train_teacher
from .weights import OPTIONS, SWEEP, sweep_options, sweep_weights

__all__ = ["OPTIONS", "SWEEP", "Ablation", "Graph", "Run", "ablate", "distill", "distill_arms", "fit_graph", "sweep_options", "sweep_weights", "train_teacher"]
