"""Statistics on per-case scores and learning curves: between arms, and against larger networks (DESIGN, Scores)."""

from .arms import FAMILY, by_tertile, compare_arms, compare_missed, compare_with, differences, holm
from .curves import epochs_to_reach, gradient_pulls, learning_curves
from .references import accuracy_ratio, agreement

__all__ = [
    "FAMILY", "accuracy_ratio", "agreement", "by_tertile", "compare_arms", "compare_missed", "compare_with", "differences", "epochs_to_reach",
    "gradient_pulls", "holm", "learning_curves",
]
