"""What the figures look at: cases worth showing, feature maps, edge labels and node assignments."""

from .cases import cases_of_each_label, edge_pyramid, edge_survival, edge_views, example_pairs, spread_of_cases
from .maps import FeatureView, feature_maps, feature_views, mean_responses, refinement_view
from .nodes import Collapse, NodeView, assignment_entropy, collapse_check, connected_student, graph_of, node_views

__all__ = [
    "Collapse", "FeatureView", "NodeView", "assignment_entropy", "cases_of_each_label", "collapse_check", "connected_student", "edge_pyramid",
    "edge_survival", "edge_views", "example_pairs", "feature_maps", "feature_views", "graph_of", "mean_responses", "node_views", "refinement_view",
    "spread_of_cases",
]
