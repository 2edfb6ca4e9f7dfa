"""What every loss term has in common: its base class, the registry, and what it sees of a step."""

from __future__ import annotations

import hashlib
import inspect
import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Self, TypeVar

from torch import Tensor, nn

from ..config import (
    ConfigError,
    DistillConfig,
    LesionKDError,
    Role,
    TeacherConfig,
    content_of,
    nearest,
)
from ..models import Network

if TYPE_CHECKING:
    from .edge_reasoning import FittedGraph

T = TypeVar("T", bound="type[LossTerm]")


@dataclass(frozen=True)
class Step:
    """One training step as a loss term sees it; N images of H x W px.

    Attributes
    ----------
    logits, maps
        The student's logits (N, 1, H, W) and its feature maps by name.
    masks : (M, 1, H, W)
        Augmented masks, 0 or 1, of the first M images; M < N only if some images have no masks.
    edge : (N, 1, H, W)
        Edge label of the masks; of an image without one, of the teacher's mask.
    teacher_logits, teacher_maps
        The same of the frozen teacher; no gradient.
    """

    logits: Tensor
    masks: Tensor
    maps: dict[str, Tensor] = field(default_factory=dict)
    edge: Tensor = None  # type: ignore[assignment]  # a step without a teacher has none
    teacher_logits: Tensor = None  # type: ignore[assignment]
    teacher_maps: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Measured:
    """What was measured on the frozen teacher before the students are trained."""

    fitted: FittedGraph | None = None
    margins: dict[str, Tensor] | None = None  # from `empirical_margins`


@dataclass(frozen=True)
class Setup:
    """What the loss terms of one network are built from."""

    cfg: TeacherConfig
    student: Network
    teacher: Network
    """The frozen teacher; None if no term reads it."""
    measured: Measured


class LossTerm(nn.Module):
    """One term of L_total: a module whose ``forward`` takes a `Step` and returns a scalar.

    Attributes
    ----------
    needs_teacher, needs_graph : bool
        Whether it reads the frozen teacher, or the graph that was fitted on it.
    """

    needs_teacher: ClassVar[bool] = True
    needs_graph: ClassVar[bool] = False

    @classmethod
    def build(cls, setup: Setup) -> Self:
        """A new term for one student; by default one without options or layers."""
        return cls()

    def forward(self, step: Step) -> Tensor:
        """The loss of a step, before its weight -> ()."""
        raise NotImplementedError


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
        The options that it reads among those that only loss terms read (`Role.TERM`).
    """

    name: str
    module: type[LossTerm]
    label: str
    weight: float
    sweep: tuple[float, ...] = ()
    options: tuple[str, ...] = ()


TERMS: dict[str, Term] = {}
SHIPPED = {
    f"{__package__}.{module}"
    for module in ("segmentation", "feature_refinement", "edge_reasoning", "baselines")
}
"""Modules whose terms come with the package: `StageConfig.version` changes with them."""


def register(
    name: str,
    label: str,
    weight: float,
    sweep: tuple[float, ...] = (),
    options: tuple[str, ...] = (),
) -> Callable[[T], T]:
    """Class decorator: make a loss term available as `-p losses "name=weight"` and as an arm.

    The class derives from `LossTerm`. A term in a file of your own, mine.py, is named
    `-p losses "mine:name=weight"`.
    """
    for option in options:
        if option not in DistillConfig.model_fields:
            hint = nearest(option, DistillConfig.model_fields)
            raise ConfigError(f"term {name!r} names the option {option!r}: {hint}")

    def add(module: T) -> T:
        if name in TERMS and TERMS[name].module.__module__ != module.__module__:
            raise ConfigError(
                f"the term {name!r} of {module.__module__} has the name of one in "
                f"{TERMS[name].module.__module__}; choose another name"
            )
        TERMS[name] = Term(name, module, label, weight, sweep, options)
        return module

    return add


def registered(name: str) -> Term:
    """The loss term of a name.

    Raises
    ------
    ConfigError
        It is not registered.
    """
    if name not in TERMS:
        raise ConfigError(f"losses names the term {name!r}: {nearest(name, TERMS)}")
    return TERMS[name]


def resolve(losses: dict[str, float | None]) -> dict[str, float]:
    """The weight of every term: of 'seg', which is always there, then in the registry's order.

    Parameters
    ----------
    losses : {term: weight}
        None is the default weight of the term.

    Raises
    ------
    ConfigError
        A term is not registered.

    >>> resolve({"feat": None, "kd": 5.0})
    {'seg': 1.0, 'feat': 1.0, 'kd': 5.0}
    """
    given = {"seg": None} | {registered(name).name: weight for name, weight in losses.items()}
    weights = {}
    for name in sorted(given, key=["seg", *TERMS].index):
        weight = given[name]
        weights[name] = TERMS[name].weight if weight is None else weight
    return weights


def needs_teacher(terms: Collection[str]) -> bool:
    """Whether one of the terms reads the frozen teacher."""
    return any(registered(name).module.needs_teacher for name in terms)


def needs_graph(terms: Collection[str]) -> bool:
    """Whether one of the terms needs the fitted graph."""
    return any(registered(name).module.needs_graph for name in terms)


def own_code(terms: Collection[str]) -> str:
    """SHA-256 of the files of loss terms that do not come with the package; '' if there is none.

    Of a term that is defined in a notebook, of its `forward`.
    """
    code = ""
    for term in map(registered, terms):
        module = term.module.__module__
        if module in SHIPPED:
            continue
        if file := getattr(sys.modules[module], "__file__", None):
            code += content_of(file)
        else:
            code += hashlib.sha256(inspect.getsource(term.module.forward).encode()).hexdigest()
    return code


def unused_options(terms: Collection[str]) -> frozenset[str]:
    """Options on which a student with these loss terms does not depend.

    Those that only other terms read, and without a teacher also the teacher's.
    """
    used = {option for name in terms for option in registered(name).options}
    unused = DistillConfig.options(Role.TERM) - used
    return unused if needs_teacher(terms) else unused | DistillConfig.options(Role.TEACHER)


def require_same_size(student: Tensor, teacher: Tensor) -> None:
    """Raise an error that names both shapes if two maps (N, C, H, W) differ."""
    if student.shape != teacher.shape:
        raise LesionKDError(
            f"the student's map is {tuple(student.shape)}, the teacher's {tuple(teacher.shape)}. "
            "Distillation needs images whose sides are multiples of 32 px"
        )
