"""Distil a lesion segmentation teacher into a student small enough for a phone.

The names that notebooks use; each is imported when it is first asked for, so this import is quick.
"""

import importlib
import os
from typing import Any

# A second process on the same cores makes torch's spinning threads ten times slower; waiting ones do not.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

__version__ = "0.1.0"

_HOME = {
    "config": (
        "AblationConfig", "ConfigError", "DistillConfig", "EdgeConfig", "ExportConfig", "GraphConfig", "LesionKDError", "PrepareConfig", "TeacherConfig",
    ),
    "store": ("short",),
    "datasets": ("CATALOGUE",),
    "datasets.download": ("download",),
    "edges": ("edge_label",),
    "prepare": ("perceptual_hash", "prepare_data"),
    "inference": ("load_network", "load_student", "predict", "probabilities"),
    "statistics": (
        "accuracy_ratio", "agreement", "by_tertile", "compare_arms", "compare_missed", "compare_with", "epochs_to_reach", "gradient_pulls", "learning_curves",
    ),
    "evaluation": ("fixed_mask_dice", "mask_dice", "score_masks", "score_otsu", "summarize"),
    "external": ("score_external",),
    "original": ("score_original",),
    "stages": ("ablate", "distill", "distill_arms", "fit_graph", "sweep_options", "sweep_weights", "train_teacher"),
    "study": ("add_to_study", "cost_points", "study_tables"),
    "sweeps.cluster": ("sweep",),
    "sweeps.results": ("collect", "summarize_results"),
    "leak": ("measure_leak",),
    "export": ("export_student", "segment_golden"),
    "export.cost": ("measure_cost", "peak_memory"),
    "views": (
        "assignment_entropy", "cases_of_each_label", "collapse_check", "connected_student", "edge_pyramid", "edge_survival", "edge_views", "example_pairs",
        "feature_maps", "feature_views", "graph_of", "mean_responses", "node_views", "refinement_view", "spread_of_cases",
    ),
    "figures": ("figures",),
    "tables": ("tables",),
}
_ROOM = {name: room for room, names in _HOME.items() for name in names}
__all__ = sorted(_ROOM)


def __getattr__(name: str) -> Any:
    if name not in _ROOM:
        raise AttributeError(f"lesionkd_core has no {name!r}")
    room = importlib.import_module(f".{_ROOM[name]}", __name__)
    return room if name == _ROOM[name] and not hasattr(room, name) else getattr(room, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
