"""What every loss term has in common: the registry, and what a term sees of a training step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from torch import Tensor, nn

from ..config import LesionKDError

N = TypeVar("N", bound=type[nn.Module])


@dataclass(frozen=True)
class Step:
    """One training step as a loss term sees it; N images of H x W px.

    Attributes
    ----------
    logits, maps
        The student's logits (N, 1, H, W) and its feature maps by name.
    masks : (M, 1, H, W)
        Augmented masks, 0 or 1, of the first M images; M < N only with `label_fraction`.
    edge : (N, 1, H, W)
        Edge label of the masks; of an image without one, of the teacher's mask.
    teacher_logits, teacher_maps
        The same of the frozen teacher; no gradient.
    epoch : int
        From 0.
    """

    logits: Tensor
    masks: Tensor
    maps: dict[str, Tensor] = field(default_factory=dict)
    edge: Tensor = None  # type: ignore[assignment]  # only the student alone has none
    teacher_logits: Tensor = None  # type: ignore[assignment]
    teacher_maps: dict[str, Tensor] = field(default_factory=dict)
    epoch: int = 0


@dataclass(frozen=True)
class Term:
    """A registered loss term.

    Attributes
    ----------
    label : str
        Name in figures and tables.
    weight : float
        Default weight in L_total.
    sweep : tuple of float
        Weights that notebook 05 tries on validation cases.
    options : tuple of str
        Options that matter only with this term.
    """

    name: str
    module: type[nn.Module]
    label: str
    weight: float
    sweep: tuple[float, ...] = ()
    options: tuple[str, ...] = ()


TERMS: dict[str, Term] = {}


def register(
    name: str,
    label: str,
    weight: float,
    sweep: tuple[float, ...] = (),
    options: tuple[str, ...] = (),
) -> Callable[[N], N]:
    """Class decorator: make a loss term available as `-p losses "name=weight"` and as an arm.

    The class is an `nn.Module` with ``forward(step: Step) -> ()`` and a classmethod
    ``build(cfg, student, teacher, measured)``. An attribute ``teacher_maps`` names the teacher's
    maps that it reads, ``needs_graph = True`` asks for the fitted graph.
    """

    def add(module: N) -> N:
        TERMS[name] = Term(name, module, label, weight, sweep, options)
        return module

    return add


def require_same_size(student: Tensor, teacher: Tensor) -> None:
    """Raise an error that names both shapes if two maps (N, C, H, W) differ."""
    if student.shape != teacher.shape:
        raise LesionKDError(
            f"the student's map is {tuple(student.shape)}, the teacher's {tuple(teacher.shape)}. "
            "The two networks round odd sizes differently: distillation needs images whose sides "
            "are multiples of 32 px"
        )
