"""One configuration per stage: frozen, strict, unknown names refused with the nearest match.

A stage's configuration inherits the fields of every stage it stands on, so notebooks pass one flat
set of parameters, and ``cfg.upstream(TeacherConfig)`` hands the teacher exactly what concerns it.
"""

from __future__ import annotations

import difflib
import hashlib
import inspect
import json
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

PROFILES: dict[str, dict[str, Any]] = {
    "smoke": {  # seconds on a laptop's CPU: shows that everything works, proves nothing
        "pixels": 64, "cases": 200, "batch_size": 8, "teacher_epochs": 12, "graph_epochs": 3, "epochs": 10,
    },
    "cpu": {  # about an hour on two cores
        "pixels": 128, "cases": 0, "batch_size": 16, "teacher_epochs": 40, "graph_epochs": 5, "epochs": 40,
    },
    "paper": {  # wants a GPU
        "pixels": 256, "cases": 0, "batch_size": 16, "teacher_epochs": 100, "graph_epochs": 10, "epochs": 200,
    },
}
"""What the profile decides; a value given by name goes before it."""


class LesionKDError(Exception):
    """Something the user can mend. Notebooks and the command line show the message alone."""

    def _render_traceback_(self) -> list[str]:  # IPython calls this instead of printing its traceback
        return [f"{type(self).__name__}: {self}"]


class ConfigError(LesionKDError):
    """A parameter is unknown, of the wrong type or out of range."""


def nearest(name: str, known) -> str:
    """The sentence that helps after a mistyped name."""
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"did you mean {match[0]!r}?" if match else f"known are: {', '.join(sorted(known))}"


def _names(value: Any) -> Any:
    """'a, b' -> ('a', 'b'): lists are comma-separated strings in notebooks."""
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return tuple(value) if isinstance(value, list) else value


def _seeds(value: Any) -> Any:
    """3 -> (0, 1, 2); '0, 7' -> (0, 7)."""
    if isinstance(value, int) and not isinstance(value, bool):
        if value > 1000:
            raise ValueError(f"n = {value} means seeds 0 to {value - 1}; one seed alone is the string '{value}'")
        return tuple(range(value))
    return tuple(int(part) for part in _names(value)) if isinstance(value, str) else _names(value)


def _distinct(values: tuple) -> tuple:
    if len(set(values)) != len(values):
        raise ValueError("names one value twice")
    return values


Names = Annotated[tuple[str, ...], BeforeValidator(_names), AfterValidator(_distinct)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]
Seeds = Annotated[tuple[Seed, ...], BeforeValidator(_seeds), AfterValidator(_distinct), Field(min_length=1)]
Level = Annotated[str, Field(pattern=r"^(en|de)coder\.stride(1|2|4|8|16|32)(:(en|de)coder\.stride(1|2|4|8|16|32))?$")]
Levels = Annotated[tuple[Level, ...], BeforeValidator(_names), AfterValidator(_distinct), Field(min_length=1)]
EdgeLevel = Annotated[Level, BeforeValidator(lambda v: {"low": "encoder.stride4", "deep": "encoder.stride16"}.get(v, v) if isinstance(v, str) else v)]
Fraction = Annotated[float, Field(gt=0, lt=0.5)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class StageConfig(BaseModel):
    """What all stages share: the profile and where the work runs."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")
    stage: ClassVar[str]
    version: ClassVar[int] = 1  # raise when a stage computes something else from the same configuration
    seed_field: ClassVar[str] = "split_seed"  # the seed in the folder's name

    profile: Literal["smoke", "cpu", "paper"] = Field("smoke", description="what fills the values not given: smoke (seconds), cpu (an hour), paper (GPU)")
    device: Literal["auto", "cpu", "cuda", "mps"] = Field("auto", description="where it runs; auto takes a GPU where there is one")
    threads: int = Field(0, ge=0, description="CPU threads for torch; 0 leaves torch's choice")

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigError(_plain(error, type(self))) from None

    @model_validator(mode="before")
    @classmethod
    def _fill_from_profile(cls, values: dict[str, Any]) -> dict[str, Any]:
        given = {name: value for name, value in values.items() if value is not None}
        filled = PROFILES.get(str(given.get("profile", "smoke")), {})
        return {name: value for name, value in filled.items() if name in cls.model_fields} | given

    @classmethod
    def from_notebook(cls, namespace: dict[str, Any]) -> Self:
        """Take the parameters out of a notebook's globals, refusing what is no parameter.

        Modules, functions and classes are passed over, as are names first bound after the first
        success in this kernel, so that the cell can be run again.
        """
        first = namespace.get("_lesionkd_parameters")
        names = {
            name for name, value in namespace.items()
            if not name.startswith("_") and name not in ("In", "Out")
            and not (inspect.ismodule(value) or inspect.isclass(value) or callable(value))
            and type(value).__module__ != "__future__"
        }
        names = names & first if first is not None else names
        cfg = cls(**{name: namespace[name] for name in names})
        namespace["_lesionkd_parameters"] = frozenset(names)
        return cfg

    @classmethod
    def parameters(cls):
        """A table of all fields: name, default and help."""
        import pandas as pd

        rows = [(n, PROFILES["smoke"].get(n, f.default), f.description) for n, f in cls.model_fields.items()]
        return pd.DataFrame(rows, columns=["parameter", "default", "help"])

    def upstream(self, stage: type[StageConfig]) -> Any:
        """The configuration of a stage this one stands on."""
        return stage(**{name: getattr(self, name) for name in stage.model_fields})

    def hashed(self) -> dict[str, Any]:
        """The fields that the result is computed from: not where it ran, not where the data lay."""
        return self.model_dump(exclude={"profile", "device", "threads", "dataset"}, mode="json")

    def digest(self, upstream: str) -> str:
        """Content address of the result: configuration, stage version and what it was made from."""
        content = {"stage": self.stage, "version": self.version, "upstream": upstream, **self.hashed()}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def __repr__(self) -> str:
        changed = {n: v for n, v in self if v != type(self).model_fields[n].default}
        return f"{type(self).__name__}({', '.join(f'{n}={v!r}' for n, v in changed.items())})"


def _plain(error: ValidationError, cls: type[StageConfig]) -> str:
    """pydantic's findings as one line a parameter, with the nearest name or the help."""
    lines = []
    for found in error.errors():
        name = str(found["loc"][0]) if found["loc"] else ""
        if found["type"] == "extra_forbidden":
            lines.append(f"unknown parameter {name!r}: {nearest(name, cls.model_fields)}")
        elif not name:
            lines.append(found["msg"].removeprefix("Value error, "))
        else:
            field = cls.model_fields[name]
            lines.append(f"{name} = {found['input']!r}: {found['msg'].removeprefix('Value error, ')}. {name}: {field.description}")
    return "\n".join(dict.fromkeys(lines))


class PrepareConfig(StageConfig):
    """Raw release or phantom -> arrays, split and report (stage `prepare`)."""

    stage = "prepare"
    dataset: str = Field("phantom-dermoscopy", min_length=1, description="a name of the catalogue, or a folder with images/ and masks/")
    pixels: int = Field(64, ge=32, le=2048, multiple_of=32, description="side of the square prepared image, px; a multiple of 32 (METHOD, student)")
    cases: int = Field(0, ge=0, description="how many cases to draw at random; 0 takes all (phantom: 1000)")
    normals: Literal["drop", "keep", "test"] = Field("drop", description="cases without a lesion: drop, keep, or only in the test split")
    difficulty: float = Field(0.5, ge=0, le=1, description="phantom only: 0 easy to 1 very hard")
    split_seed: Seed = Field(0, description="seed of the split into train, val and test, and of the phantom's cases")
    val_fraction: Fraction = Field(0.15, description="share of the cases that choose checkpoints and parameters")
    test_fraction: Fraction = Field(0.2, description="share of the cases that are scored once")
    duplicate_bits: int = Field(4, ge=0, le=16, description="images whose 63-bit perceptual hashes differ in at most this many bits share a group")


class EdgeConfig(PrepareConfig):
    """What makes Label_edge and the cells it falls into; no stage of its own, edges are made in training."""

    edge_width: int = Field(1, ge=1, le=8, description="edge label: 1 is the 4-neighbour rule (two pixels wide), w dilates it w - 1 times, px")
    edge_level: EdgeLevel = Field("encoder.stride4", description="map that the graph reads; low is encoder.stride4, deep is encoder.stride16")
    grid: int = Field(4, ge=1, le=16, description="k: the graph has K = k x k nodes")
    grid_frame: Literal["image", "lesion"] = Field("image", description="what the grid of cells covers: the image or the lesions' bounding box")


class TeacherConfig(PrepareConfig):
    """Prepared arrays -> trained teacher (stage `teacher`, step S1)."""

    stage = "teacher"
    seed_field = "teacher_seed"
    teacher: Literal["resnet34_unet", "unet64"] = Field("resnet34_unet", description="teacher network: the patent's or the paper's plain U-Net")
    teacher_seed: Seed = Field(0, description="seed of the teacher's initialization and batch order, and of the graph")
    teacher_epochs: int = Field(12, ge=1, description="passes over the training cases, teacher")
    teacher_lr: float = Field(1e-3, gt=0, description="peak learning rate of the one-cycle schedule, teacher")
    batch_size: int = Field(8, ge=2, description="cases in a batch")
    weight_decay: float = Field(1e-2, ge=0, description="AdamW's decoupled weight decay")
    augment: Literal["none", "flip_rotate"] = Field("flip_rotate", description="flips, rotation, zoom and intensity of the training cases")
    precision: Literal["32-true", "bf16-mixed"] = Field("32-true", description="Lightning Fabric's name of the arithmetic")


class GraphConfig(TeacherConfig, EdgeConfig):
    """Frozen teacher -> fitted, frozen graph module (stage `graph`, step S4)."""

    stage = "graph"
    states: int = Field(16, ge=1, le=256, description="state channels s of the graph")
    anchors: Literal["masked_mean", "masked_cosine", "eagr"] = Field("masked_mean", description="how a node's anchor is made from edge pixels")
    normalize: Literal["mass", "none", "size"] = Field("mass", description="nodes divided by their mass, not at all, or by H x W (EAGR)")
    graph_epochs: int = Field(3, ge=1, description="passes over the training cases, fitting the graph on the teacher")
    graph_lr: float = Field(1e-2, gt=0, description="Adam's learning rate, fitting the graph")

    @model_validator(mode="after")
    def _eagr_has_its_own_grid(self) -> Self:
        if self.anchors == "eagr" and self.grid_frame == "lesion":
            raise ValueError("anchors = 'eagr' pools over the image, so grid_frame must be 'image'")
        return self


TERM_FIELDS = {
    "feat": ("w_feat", "feature_levels", "level_weights"),
    "edge": ("w_edge", "shuffle_edges", *(n for n in GraphConfig.model_fields if n not in TeacherConfig.model_fields)),
}
"""Fields that matter only where their loss term is in `terms`."""


class DistillConfig(GraphConfig):
    """Frozen teacher and graph -> trained student (stage `distill`, steps S2 to S6)."""

    stage = "distill"
    seed_field = "seed"
    terms: Names = Field(("feat", "edge"), description="loss terms beside BCE, comma-separated: feat, edge; empty trains the student alone")
    seed: Seed = Field(0, description="seed of the student's initialization and batch order")
    width: int = Field(4, ge=1, le=64, description="channels of the student's first block; 4 is the paper's")
    epochs: int = Field(10, ge=1, description="passes over the training cases, student")
    lr: float = Field(5e-3, gt=0, description="peak learning rate of the one-cycle schedule, student and connectors")
    w_seg: Weight = Field(1.0, description="weight of L_seg (step S6)")
    w_feat: Weight = Field(1.0, description="weight of L_feat (step S6)")
    w_edge: Weight = Field(0.1, description="weight of L_edge (step S6)")
    feature_levels: Levels = Field(
        ("decoder.stride8", "decoder.stride4", "decoder.stride2"),
        description="Feats lists: 'a' is both networks' map a, 'a:b' the student's a, the teacher's b",
    )
    level_weights: Literal["mean", "area", "halving"] = Field("mean", description="how L_feat sums over levels; halving is the original")
    shuffle_edges: bool = Field(False, description="control: every case gets the edge label of another case")

    @model_validator(mode="after")
    def _known_terms(self) -> Self:
        for term in self.terms:
            if term not in TERM_FIELDS:
                raise ValueError(f"terms names {term!r}: {nearest(term, TERM_FIELDS)}")
        return self

    def hashed(self) -> dict[str, Any]:
        """Fields of absent terms do not count, so arms of other weights share the student alone."""
        absent = {name for term, names in TERM_FIELDS.items() if term not in self.terms for name in names}
        if not self.terms:  # no teacher looks on either
            absent |= {n for n in TeacherConfig.model_fields if n.startswith("teacher")}
        return {name: value for name, value in super().hashed().items() if name not in absent} | {"terms": sorted(self.terms)}


ARMS: dict[str, dict[str, Any]] = {
    "alone": {"terms": (), "shuffle_edges": False},
    "feat": {"terms": ("feat",), "shuffle_edges": False},
    "edge": {"terms": ("edge",), "shuffle_edges": False},
    "method": {"terms": ("feat", "edge"), "shuffle_edges": False},
    "shuffled": {"terms": ("feat", "edge"), "shuffle_edges": True},
}
"""Arms of the ablation, in the order of METHOD.md: what each sets in `DistillConfig`."""


class AblationConfig(DistillConfig):
    """Every arm and seed, scored on the same cases (stage `ablation`)."""

    stage = "ablation"
    arms: Names = Field(tuple(ARMS), min_length=1, description=f"arms, comma-separated: {', '.join(ARMS)}")
    seeds: Seeds = Field((0,), description="an integer n means seeds 0 to n - 1; a string lists them")

    @model_validator(mode="before")
    @classmethod
    def _arms_decide(cls, values: dict[str, Any]) -> dict[str, Any]:
        if given := {"seed", "terms", "shuffle_edges"} & {name for name, value in values.items() if value is not None}:
            raise ValueError(f"{', '.join(sorted(given))}: the arms and seeds of an ablation decide this; give arms and seeds instead")
        return values

    def hashed(self) -> dict[str, Any]:
        """Everything but what the arms decide."""
        return {name: value for name, value in StageConfig.hashed(self).items() if name not in ("seed", "terms", "shuffle_edges")}

    @model_validator(mode="after")
    def _known_arms(self) -> Self:
        for arm in self.arms:
            if arm not in ARMS:
                raise ValueError(f"arms names {arm!r}: {nearest(arm, ARMS)}")
        return self

    def arm(self, name: str, seed: int) -> DistillConfig:
        """The configuration of one arm with one seed."""
        return DistillConfig(**{n: getattr(self, n) for n in DistillConfig.model_fields} | ARMS[name] | {"seed": seed})
