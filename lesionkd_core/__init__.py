"""Distil a lesion segmentation teacher into a student small enough for a phone.

The names that notebooks use. Each is imported on first use, so that the package imports quickly.
"""

import importlib
import os
from typing import Any

# torch's waiting threads otherwise slow down a second process on the same cores tenfold
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

__version__ = "0.3.0"

_MODULES = {
    "config": "AblationConfig ConfigError DistillConfig GraphConfig LesionKDError PrepareConfig "
    "TeacherConfig",
    "results": "collect short",
    "edges": "edge_at_stride edge_label edge_label_batch",
    "data.prepare": "prepare",
    "data.layouts": "CATALOGUE",
    "data.download": "download",
    "predict": "load_network load_student",
    "data.batches": "MEAN STD TrainingSet normalize",
    "evaluate": "fixed_mask_dice score_external score_masks score_otsu summarize",
    "pipeline": "ARMS ablate arm_config distill distill_arms fit_edge_graph train_teacher",
    "sweep": "sweep_weights",
    "export": "ExportConfig export_student load_onnx",
    "analysis.inspect": "show",
    "analysis.figures": "publish",
}
_SUBMODULES = {
    "losses": "losses",
    "models": "models",
    "figures": "analysis.figures",
    "inspect": "analysis.inspect",
    "statistics": "analysis.statistics",
    "tables": "analysis.tables",
}
_HOME = {name: module for module, names in _MODULES.items() for name in names.split()}
__all__ = sorted([*_HOME, *_SUBMODULES])


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return importlib.import_module(f".{_SUBMODULES[name]}", __name__)
    if name not in _HOME:
        raise AttributeError(f"lesionkd_core has no {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
