"""One style, one saver: figures at paper widths, byte-identical from run to run (DESIGN, Figures)."""

from .comparisons import ablation, agreement, forest, per_case_scores, tertiles
from .cost import latency, pareto
from .curves import gradients, learning_curves, option_sweep, training_curves, weight_sweep
from .pictures import cases, edges, feature_maps, node_assignment, nodes, overview, pairs, refinement, segmentations
from .style import METRIC_LABELS, NETWORKS, ONE_COLUMN, STUDENT, STYLES, TEACHER, TRUTH, TWO_COLUMNS, display, panels, save, show, style

__all__ = [
    "METRIC_LABELS", "NETWORKS", "ONE_COLUMN", "STUDENT", "STYLES", "TEACHER", "TRUTH", "TWO_COLUMNS", "ablation", "agreement", "cases", "display", "edges",
    "feature_maps", "forest", "gradients", "latency", "learning_curves", "node_assignment", "nodes", "option_sweep", "overview", "pairs", "panels",
    "pareto", "per_case_scores", "refinement", "save", "segmentations", "show", "style", "tertiles", "training_curves", "weight_sweep",
]
