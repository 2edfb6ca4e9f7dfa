"""The options of every stage: frozen, strict, unknown names refused with the nearest match.

The configuration of a stage inherits the options of the stages before it, so a notebook passes one
flat set of parameters, and ``cfg.upstream(TeacherConfig)`` selects what concerns the teacher.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import inspect
import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

if TYPE_CHECKING:
    import pandas as pd

C = TypeVar("C", bound="StageConfig")

PROFILES: dict[str, dict[str, Any]] = {
    "smoke": {  # a demonstration in minutes on two cores
        "pixels": 64,
        "cases": 200,
        "batch_size": 8,
        "teacher_epochs": 12,
        "graph_epochs": 5,
        "epochs": 10,
    },
    "cpu": {  # about an hour on two cores
        "pixels": 128,
        "cases": 0,
        "batch_size": 16,
        "teacher_epochs": 40,
        "graph_epochs": 10,
        "epochs": 80,
    },
    "paper": {  # needs a GPU
        "pixels": 256,
        "cases": 0,
        "batch_size": 16,
        "teacher_epochs": 100,
        "graph_epochs": 20,
        "epochs": 200,
    },
}
"""Values that a profile sets; an option that is given by name overrides them."""

DEMONSTRATION = {"label_fraction": 0.1}
"""Set by the smoke profile for the phantom: with few labels a teacher helps visibly."""

UNHASHED = (
    "profile", "device", "threads", "deterministic", "weak_teacher", "dataset", "tracker"
)  # fmt: skip
"""Options that do not change a result; data are identified by their content, not by their name."""

LEVELS = {
    "decoder": ("decoder.stride8", "decoder.stride4", "decoder.stride2"),
    "patent": ("encoder.stride4", "decoder.stride4", "decoder.stride2"),
}
"""Named sets of feature maps for the option `levels`."""


class LesionKDError(Exception):
    """A problem that the user can solve. Notebooks and the command show the message alone."""

    def _render_traceback_(self) -> list[str]:  # IPython calls this in place of its traceback
        return [f"{type(self).__name__}: {self}"]


class ConfigError(LesionKDError):
    """An option is unknown, of the wrong type or out of range."""


class MissingExtra(LesionKDError):
    """A package of an extra of pyproject.toml is not installed."""

    def __init__(self, what: str, extra: str) -> None:
        super().__init__(
            f"{what} needs the extra {extra!r}, which is not installed: "
            f"pip install -e '.[{extra}]' in the folder of this repository."
        )


def nearest(name: str, known: Collection[str]) -> str:
    """The hint after a mistyped name: the nearest known one, or all of them."""
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"did you mean {match[0]!r}?" if match else f"known are: {', '.join(sorted(known))}"


def content_of(file: str) -> str:
    """SHA-256 of a file that an option names."""
    try:
        return hashlib.sha256(Path(file).expanduser().read_bytes()).hexdigest()
    except OSError as error:
        raise ConfigError(
            f"cannot read {file!r}: {error.strerror}; give the path of an existing file"
        ) from None


def _text(value: Any) -> Any:
    """2024 -> '2024': papermill takes the name of a folder for a number."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _names(value: Any) -> Any:
    """'a, b' -> ('a', 'b')."""
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return tuple(value) if isinstance(value, list) else value


def _numbers(value: Any) -> Any:
    """'128, 256' -> (128, 256); 128 -> (128,)."""
    if isinstance(value, int) and not isinstance(value, bool):
        return (value,)
    return tuple(int(part) for part in _names(value)) if isinstance(value, str) else _names(value)


def _seeds(value: Any) -> Any:
    """3 -> (0, 1, 2); '7' -> (7,); '0, 7' -> (0, 7)."""
    if isinstance(value, int) and not isinstance(value, bool):
        if value > 1000:
            raise ValueError(
                f"{value} means the seeds 0 to {value - 1}; for one seed give the string '{value}'"
            )
        if value < 0:
            raise ValueError("expected the number of seeds, or seeds as text such as '0, 7'")
        return tuple(range(max(value, 1)))  # 0 can only mean seed 0
    return _numbers(value)


def _levels(value: Any) -> Any:
    """'patent' -> the maps of that name; 'a, b' -> ('a', 'b')."""
    return LEVELS[value] if isinstance(value, str) and value in LEVELS else _names(value)


def _distinct(values: tuple[Any, ...]) -> tuple[Any, ...]:
    if len(set(values)) != len(values):
        raise ValueError("one value is given twice")
    return values


def _window(value: str) -> str:
    if value and not re.fullmatch(r"\s*-?\d+(\.\d+)?\s*,\s*\d+(\.\d+)?\s*", value):
        raise ValueError("must be 'centre, width', such as '-600, 1500' for lung")
    if value.strip() and float(value.split(",")[1]) <= 0:
        raise ValueError("the width must be positive")
    return value


def _rule(value: str) -> str:
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(f"is no regular expression: {error}") from None
    return value


def _losses(value: Any) -> Any:
    """'feat=1, edge' -> {'feat': 1.0, 'edge': default weight}; 'seg' is always there."""
    if isinstance(value, dict):
        given = dict(value)
    else:
        given = {}
        for part in _names(value):
            name, equals, weight = (text.strip() for text in str(part).partition("="))
            if name in given:
                raise ValueError(f"names {name!r} twice")
            try:
                given[name] = float(weight) if equals else None
            except ValueError:
                raise ValueError(f"the weight of {name!r} is {weight!r}; give a number") from None
    terms = loss_terms()
    for name, weight in given.items():
        if name not in terms:
            raise ValueError(f"names the loss {name!r}: {nearest(name, terms)}")
        if weight is not None and not 0 <= weight < float("inf"):
            raise ValueError(f"the weight of {name!r} is {weight}; it must be 0 or more")
    weights = {name: terms[name].weight if w is None else float(w) for name, w in given.items()}
    return {"seg": 1.0} | {name: weights[name] for name in terms if name in weights}


def loss_terms() -> Any:
    """The registered loss terms by name; they register themselves when `losses` is imported."""
    return importlib.import_module("lesionkd_core.losses").TERMS


def _edge_level(value: Any) -> Any:
    return {"low": "encoder.stride4", "deep": "encoder.stride16"}.get(str(value), value)


_MAP = r"(en|de)coder\.stride(1|2|4|8|16|32)"
Names = Annotated[tuple[str, ...], BeforeValidator(_names), AfterValidator(_distinct)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]
Seeds = Annotated[
    tuple[Seed, ...], BeforeValidator(_seeds), AfterValidator(_distinct), Field(min_length=1)
]
Size = Annotated[int, Field(ge=32, le=4096, multiple_of=32)]
Sizes = Annotated[
    tuple[Size, ...], BeforeValidator(_numbers), AfterValidator(_distinct), Field(min_length=1)
]
Values = Annotated[tuple[int, ...], BeforeValidator(_numbers), AfterValidator(_distinct)]
Level = Annotated[str, Field(pattern=rf"^{_MAP}(:{_MAP})?$")]
Levels = Annotated[
    tuple[Level, ...], BeforeValidator(_levels), AfterValidator(_distinct), Field(min_length=1)
]
EdgeLevel = Annotated[Level, BeforeValidator(_edge_level)]
Window = Annotated[str, AfterValidator(_window)]
Rule = Annotated[str, AfterValidator(_rule)]
Fraction = Annotated[float, Field(gt=0, lt=0.5)]
Losses = Annotated[dict[str, float], BeforeValidator(_losses)]


class StageConfig(BaseModel):
    """Options of all stages: the profile, and where the work runs."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", validate_default=True)
    stage: ClassVar[str]
    version: ClassVar[int] = 3  # increase when the same options give another result
    seed_field: ClassVar[str] = "split_seed"  # the seed in the folder's name

    profile: Literal["smoke", "cpu", "paper"] = Field(
        "smoke", description="sets what is not given: smoke (minutes), cpu (an hour), paper (GPU)"
    )
    device: Literal["auto", "cpu", "cuda", "mps"] = Field(
        "auto", description="auto uses a GPU where there is one"
    )
    threads: int = Field(0, ge=0, description="CPU threads; 0 leaves torch's choice")

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
        """Read the options from a notebook's globals and refuse other names.

        Modules, functions and classes are skipped, and so are names that were first assigned after
        the first success in this kernel: the cell can be run again.
        """
        first = namespace.get("_lesionkd_parameters")
        names = {
            name
            for name, value in namespace.items()
            if not name.startswith("_")
            and name not in ("In", "Out")
            and not (inspect.ismodule(value) or inspect.isclass(value) or callable(value))
            and type(value).__module__ != "__future__"
        }
        names = names & first if first is not None else names
        cfg = cls(**{name: namespace[name] for name in names})
        namespace["_lesionkd_parameters"] = frozenset(names)
        return cfg

    @classmethod
    def parameters(cls) -> pd.DataFrame:
        """A table of all options: name, default and help."""
        import pandas as pd

        rows = [
            (name, PROFILES["smoke"].get(name, field.default), field.description)
            for name, field in cls.model_fields.items()
        ]
        return pd.DataFrame(rows, columns=["parameter", "default", "help"])

    def upstream(self, stage: type[C]) -> C:
        """The configuration of an earlier stage."""
        return stage(**{name: getattr(self, name) for name in stage.model_fields})

    def with_values(self, **values: Any) -> Self:
        """The same configuration with other values."""
        given = {name: getattr(self, name) for name in self.model_fields_set}
        return type(self)(**given | values)

    def hashed(self) -> dict[str, Any]:
        """The options that the result is computed from."""
        return self.model_dump(exclude=set(UNHASHED), mode="json")

    def digest(self, upstream: str) -> str:
        """SHA-256 of the stage, its options and the digest of what it is made from."""
        content = {"stage": self.stage, "version": self.version, "upstream": upstream}
        text = json.dumps(content | self.hashed(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def __repr__(self) -> str:
        changed = {n: v for n, v in self if v != type(self).model_fields[n].default}
        return f"{type(self).__name__}({', '.join(f'{n}={v!r}' for n, v in changed.items())})"


def _plain(error: ValidationError, cls: type[BaseModel]) -> str:
    """pydantic's findings, one line for each option, with the nearest name or the help."""
    lines = []
    for found in error.errors():
        name, message = str(found["loc"][0]) if found["loc"] else "", found["msg"]
        message = message.removeprefix("Value error, ")
        if found["type"] == "extra_forbidden":
            lines.append(f"unknown parameter {name!r}: {nearest(name, cls.model_fields)}")
        elif not name:
            lines.append(message)
        else:
            text = cls.model_fields[name].description
            lines.append(f"{name} = {found['input']!r}: {message}. {name}: {text}")
    return "\n".join(dict.fromkeys(lines))


class PrepareConfig(StageConfig):
    """Raw images -> arrays, split and report (stage `prepare`)."""

    stage = "prepare"
    dataset: Annotated[str, BeforeValidator(_text)] = Field(
        "phantom",
        min_length=1,
        description="name in the catalogue, folder with images/ and masks/, or CSV manifest",
    )
    pixels: int = Field(
        64, ge=32, le=2048, multiple_of=32, description="side of the prepared image, px"
    )
    cases: int = Field(
        0, ge=0, description="number of cases, drawn at random; 0 uses all (phantom: 1000)"
    )
    normals: Literal["drop", "keep", "test"] = Field(
        "drop", description="images without a lesion: drop, keep, or only in the test split"
    )
    fit: Literal["stretch", "pad"] = Field(
        "stretch", description="how an image becomes square: stretched, or padded with black"
    )
    window: Window = Field(
        "",
        description="volumes: 'centre, width' in the file's unit (CT: HU); empty uses the DICOM "
        "file's own, else the 0.5 to 99.5 percentiles",
    )
    lesion_values: Values = Field(
        (),
        description="values of a mask that are lesion, such as '1, 3'; empty: all but 0 in classes "
        "and instances, over half elsewhere",
    )
    invert_masks: bool = Field(False, description="masks show the lesion black on white")
    split_seed: Seed = Field(0, description="seed of the split and of the phantom's cases")
    split: Literal["groups", "official", "random", "test"] = Field(
        "groups",
        description="by group; as the release says; by image, which leaks; or all for testing",
    )
    split_file: str = Field(
        "", description="CSV file with the columns id and split; replaces the option split"
    )
    folds: int = Field(
        0, ge=0, le=50, description="k of a k-fold split by group; 0 holds out test_fraction"
    )
    fold: int = Field(0, ge=0, description="which of the k folds is the test split, from 0")
    val_fraction: Fraction = Field(0.15, description="fraction of the cases for validation")
    test_fraction: Fraction = Field(0.2, description="fraction of the cases in the test split")
    group_by: Rule = Field(
        "",
        description="what names the patient or video: number (the file name before its last "
        "number), folder, sequence (consecutive frames that look alike), column:NAME of the "
        "manifest, or a regular expression for the path; empty: what the data set itself says",
    )
    duplicate_bits: int = Field(
        12,
        ge=0,
        le=16,
        description="images are compared in detail, and share a group if they show the same, if "
        "their 63-bit perceptual hashes differ in at most this many bits",
    )

    @property
    def dataset_name(self) -> str:
        """The name of the data set in tables; of your own the name of the folder."""
        path = Path(self.dataset)
        return path.resolve().parent.name if path.suffix.lower() in (".csv", ".tsv") else path.name

    def for_testing(self, dataset: str) -> ExternalConfig:
        """The options that prepare all cases of another data set for testing, in the same way."""
        only = {"split": "test", "split_file": "", "folds": 0, "fold": 0, "cases": 0}
        return self.upstream(ExternalConfig).with_values(dataset=dataset, **only)

    @model_validator(mode="before")
    @classmethod
    def _none_ignored(cls, values: dict[str, Any]) -> dict[str, Any]:
        if values.get("ignore_values") is not None:
            raise ValueError(
                "ignore_values: pixels cannot be left out of loss and scores. With lesion_values, "
                "what is not named counts as background: '1' for a mask of 0, 1 and 255 (ignore)"
            )
        return values

    @model_validator(mode="after")
    def _fold_of_folds(self) -> Self:
        if self.folds == 1:
            raise ValueError("folds = 1: give 0 for a hold-out split, or at least 2")
        if self.fold >= max(self.folds, 1):
            last = max(self.folds, 1) - 1
            raise ValueError(f"fold = {self.fold}: the last is {last} (folds = {self.folds})")
        if self.folds and (self.split != "groups" or self.split_file):
            raise ValueError("folds split by group: split must be 'groups' and split_file empty")
        if self.normals == "test" and (self.folds or self.split_file):
            what = "folds" if self.folds else "split_file"
            raise ValueError(
                f"normals = 'test': {what} already decides who is tested; keep or drop them"
            )
        return self

    def hashed(self) -> dict[str, Any]:
        """The split file counts by its content."""
        content = {"split_file": content_of(self.split_file)} if self.split_file else {}
        return super().hashed() | content


class ExternalConfig(PrepareConfig):
    """Trained network and another data set -> its scores there (stage `external`)."""

    stage = "external"


class UnlabelledConfig(PrepareConfig):
    """Images without masks -> prepared arrays (stage `unlabelled`)."""

    stage = "unlabelled"


class EdgeConfig(PrepareConfig):
    """Options of the edge label and of the grid of cells; not a stage of its own."""

    edge_width: int = Field(
        1,
        ge=1,
        le=8,
        description="1 is the patent's 4-neighbour rule, two pixels wide; w dilates it w - 1 times",
    )
    edge_level: EdgeLevel = Field(
        "encoder.stride4",
        description="feature map of L_edge; low is encoder.stride4 (patent), deep is "
        "encoder.stride16 (paper)",
    )
    grid: int = Field(4, ge=1, le=16, description="the graph has grid x grid nodes")
    grid_frame: Literal["image", "lesion"] = Field(
        "image", description="what the grid covers: the image, or the lesions' bounding box"
    )


class TeacherConfig(PrepareConfig):
    """Prepared arrays -> trained teacher (stage `teacher`, before step S1)."""

    stage = "teacher"
    seed_field = "teacher_seed"
    teacher: str = Field(
        "resnet34_unet",
        description="resnet34_unet (patent), unet64 (paper), or your own as 'module:function'",
    )
    teacher_seed: Seed = Field(
        0, description="seed of the teacher's weights and batches, and of the graph"
    )
    teacher_epochs: int = Field(12, ge=1, description="epochs, teacher")
    teacher_lr: float = Field(1e-3, gt=0, description="peak learning rate, teacher")
    batch_size: int = Field(8, ge=2, description="images in a batch")
    weight_decay: float = Field(1e-2, ge=0, description="AdamW's weight decay")
    clip_grad: float = Field(
        0.0, ge=0, allow_inf_nan=False, description="largest norm of the gradient; 0 does not clip"
    )
    augment: Literal["none", "flips", "full"] = Field(
        "full",
        description="none; flips and quarter turns; or also affine, contrast, blur and noise",
    )
    seg_loss: Literal["bce_dice", "bce"] = Field(
        "bce_dice",
        description="L_seg of teacher and student: 0.5 BCE + 0.5 soft Dice, or BCE (patent)",
    )
    precision: Literal["32-true", "bf16-mixed"] = Field(
        "32-true", description="arithmetic, in Lightning Fabric's names"
    )
    tracker: Literal["", "tensorboard"] = Field(
        "", description="also writes the curves of history.csv for TensorBoard (extra tensorboard)"
    )
    deterministic: bool = Field(
        False, description="use only operations that give the same bits each time (GPU)"
    )
    encoder_weights: str = Field(
        "", description="file of torchvision's resnet34 for the teacher's encoder; empty: random"
    )
    teacher_checkpoint: str = Field(
        "", description="state dict of a teacher trained elsewhere; used without training"
    )
    test_dataset: Names = Field(
        (), description="other data sets, comma-separated; the trained network is scored on each"
    )

    @model_validator(mode="after")
    def _weights_of_the_teacher(self) -> Self:
        if self.encoder_weights and self.teacher != "resnet34_unet":
            raise ValueError(
                f"encoder_weights need teacher = 'resnet34_unet'; got {self.teacher!r}"
            )
        if self.encoder_weights and self.teacher_checkpoint:
            raise ValueError("encoder_weights and teacher_checkpoint: give one of the two")
        return self

    @model_validator(mode="after")
    def _tested_elsewhere(self) -> Self:
        if self.split == "test" and not self.split_file:
            raise ValueError(
                "split = 'test' leaves no training cases; name the data set in test_dataset instead"
            )
        if self.dataset in self.test_dataset:
            raise ValueError(
                f"test_dataset names {self.dataset!r}, the training data; "
                "its own test cases are scored anyway"
            )
        names = [Path(name).name for name in (self.dataset, *self.test_dataset)]
        if len(set(names)) < len(names):
            twice = max(names, key=names.count)
            raise ValueError(f"test_dataset: two data sets are called {twice!r}; rename a folder")
        return self

    def hashed(self) -> dict[str, Any]:
        """Weight files count by their content; further test data do not change the training."""
        files = ("encoder_weights", "teacher_checkpoint")
        content = {name: content_of(getattr(self, name)) for name in files if getattr(self, name)}
        dropped = {"test_dataset", *files}
        return {n: v for n, v in super().hashed().items() if n not in dropped} | content


class GraphConfig(TeacherConfig, EdgeConfig):
    """Frozen teacher -> fitted, frozen graph module (stage `graph`, step S4)."""

    stage = "graph"
    states: int = Field(16, ge=1, le=256, description="state channels of the graph")
    anchors: Literal["masked_mean", "masked_cosine", "eagr"] = Field(
        "masked_cosine", description="a node's anchor: mean key of edge pixels, cosine, or EAGR's"
    )
    background_node: bool = Field(
        True, description="one more node of the graph, for pixels off the edge; not for eagr"
    )
    teacher_bn: Literal["eval", "batch"] = Field(
        "eval", description="statistics of the frozen teacher's BatchNorm: running, or the batch's"
    )
    weak_teacher: Literal["refuse", "allow"] = Field(
        "refuse",
        description="a teacher whose validation Dice is not above that of one fixed mask",
    )
    graph_epochs: int = Field(5, ge=1, description="epochs, fitting the graph")
    graph_lr: float = Field(1e-2, gt=0, description="Adam's learning rate, fitting the graph")

    @model_validator(mode="after")
    def _eagr_has_its_own_grid(self) -> Self:
        if self.anchors == "eagr" and self.grid_frame == "lesion":
            raise ValueError("anchors = 'eagr' pools over the image: grid_frame must be 'image'")
        return self


class DistillConfig(GraphConfig):
    """Frozen teacher and graph -> trained student (stage `distill`, steps S2 to S6)."""

    stage = "distill"
    seed_field = "seed"
    losses: Losses = Field(
        "feat, edge",  # type: ignore[arg-type]  # becomes a dict
        description="loss terms besides seg with optional weights, such as 'feat=1, edge'; "
        "empty trains the student alone",
    )
    seed: Seed = Field(0, description="seed of the student's weights and batches")
    student: str = Field("unet", description="unet, or your own as 'module:function'")
    width: int = Field(4, ge=1, le=64, description="channels of the student's first block")
    stem: Literal[1, 2, 4] = Field(
        1, description="stride of the student's first convolution; 1 is the paper's"
    )
    epochs: int = Field(10, ge=1, description="epochs, student")
    lr: float = Field(1e-2, gt=0, description="peak learning rate, student and connectors")
    label_fraction: float = Field(
        1.0,
        gt=0,
        le=1,
        description="fraction of the training images whose masks the student uses; the others are "
        "for the terms that need none (smoke profile on the phantom: 0.1)",
    )
    unlabelled: Annotated[str, BeforeValidator(_text)] = Field(
        "",
        description="folder of images without masks, which the student sees in training through "
        "the terms that need none",
    )
    teacher_views: int = Field(
        0,
        ge=0,
        le=1000,
        description="augment each image in this many fixed ways and store the teacher's outputs on "
        "disk; 0 augments anew in every epoch",
    )
    connector_lr: float = Field(
        1.0, gt=0, allow_inf_nan=False, description="connectors' learning rate, as multiple of lr"
    )
    connector_warmup: int = Field(
        0, ge=0, description="first epochs in which L_feat trains the connectors alone"
    )
    levels: Levels = Field(
        LEVELS["decoder"],
        description="feature maps of L_feat: decoder, patent, or names; 'a:b' pairs the student's "
        "map a with the teacher's b",
    )
    level_weights: Literal["mean", "halving"] = Field(
        "mean", description="sum over levels: mean of each, or the original's halving"
    )
    margin: Literal["bn", "empirical"] = Field(
        "bn", description="margin from the BatchNorm, or the mean negative response"
    )

    @model_validator(mode="after")
    def _connectors_meet_the_student(self) -> Self:
        if "feat" in self.losses and self.connector_warmup >= self.epochs:
            raise ValueError(
                f"connector_warmup = {self.connector_warmup}: L_feat would never reach the student "
                f"in {self.epochs} epochs"
            )
        return self

    @model_validator(mode="before")
    @classmethod
    def _fill_for_demonstration(cls, values: dict[str, Any]) -> dict[str, Any]:
        smoke = (values.get("profile") or "smoke") == "smoke"
        phantom = (values.get("dataset") or "phantom") == "phantom"
        given = {name: value for name, value in values.items() if value is not None}
        return (DEMONSTRATION if smoke and phantom else {}) | given

    @model_validator(mode="after")
    def _views_are_of_one_image(self) -> Self:
        if self.teacher_views and self.teacher_bn == "batch":
            raise ValueError(
                "teacher_views: with teacher_bn = 'batch' the teacher's output depends on the "
                "other images of the batch, so it cannot be stored; use one of the two"
            )
        return self

    @property
    def terms(self) -> tuple[str, ...]:
        """Loss terms that need the teacher, in the order of the registry."""
        return tuple(name for name in self.losses if name != "seg")

    def hashed(self) -> dict[str, Any]:
        """Options of absent terms do not count, so that all arms share the student alone.

        Images without masks count with their content, by another way.
        """
        own = {name for term in loss_terms().values() for name in term.options}
        used = {name for term in self.losses for name in loss_terms()[term].options}
        idle = own - used | {"unlabelled"}
        if not self.terms:
            idle |= {n for n in TeacherConfig.model_fields if n.startswith("teacher")}
            idle |= {"teacher_bn", "encoder_weights"}
        return {n: v for n, v in super().hashed().items() if n not in idle}


ARMS: dict[str, dict[str, Any]] = {
    "alone": {"losses": ""},
    "alone_long": {"losses": ""},  # more epochs: `long_factor`
    "stem2": {"losses": "", "stem": 2},
    "feat": {"losses": "feat"},
    "edge": {"losses": "edge"},
    "method": {"losses": "feat, edge"},
    "shuffled": {"losses": "feat, edge_shuffled"},
}
"""Arms of the ablation and what each sets; the name of any loss term is an arm of that term."""


def arm_options(name: str) -> dict[str, Any]:
    """The options of an arm: of `ARMS`, or a loss term of that name."""
    if name not in ARMS and (name not in loss_terms() or name == "seg"):
        known = [*ARMS, *(term for term in loss_terms() if term != "seg")]
        raise ValueError(f"arms names {name!r}: {nearest(name, known)}")
    return ARMS.get(name, {"losses": name})


class AblationConfig(DistillConfig):
    """Every arm and seed, scored on the same cases (stage `ablation`)."""

    stage = "ablation"
    losses: Losses = Field(
        "",  # type: ignore[arg-type]
        description="weights that replace the defaults, such as 'feat=1, kd=3'",
    )
    arms: Names = Field(
        ("alone", "feat", "edge", "method", "shuffled", "kd", "cwd", "dist"),
        min_length=1,
        description="arms, comma-separated: alone, feat, edge, method, shuffled, or any loss term",
    )
    long_factor: int = Field(
        3, ge=2, description="epochs of the arm alone_long, as a multiple of epochs"
    )
    seeds: Seeds = Field((0,), description="3 is the seeds 0, 1, 2; '7' is seed 7; '0, 7' is both")

    @model_validator(mode="before")
    @classmethod
    def _arms_decide(cls, values: dict[str, Any]) -> dict[str, Any]:
        if values.get("seed") is not None:
            raise ValueError("seed: an ablation has the option seeds instead")
        return values

    @model_validator(mode="after")
    def _known_arms(self) -> Self:
        for arm in self.arms:
            arm_options(arm)
        return self

    def arm(self, name: str, seed: int) -> DistillConfig:
        """The configuration of one arm with one seed."""
        own = {n: getattr(self, n) for n in DistillConfig.model_fields} | arm_options(name)
        if name == "alone_long":
            own["epochs"] *= self.long_factor
        weights = {n: self.losses.get(n) for n in _names(own["losses"])}
        return DistillConfig(**own | {"losses": weights, "seed": seed})


FORMATS = ("onnx", "executorch", "coreml", "native", "page")
ENGINES = ("torch", "onnx", "executorch", "browser", "native")


class ExportConfig(StageConfig):
    """Finished student -> files for phones (stage `export`, step S7)."""

    stage = "export"
    run: str = Field(
        "",
        description="folder of a finished student; empty uses the one of notebook 04 with this "
        "profile",
    )
    formats: Names = Field(FORMATS, min_length=1, description=f"files: {', '.join(FORMATS)}")
    sizes: Sizes = Field(
        (128, 256),
        description="image sides of ExecuTorch and of comparisons besides the student's own, px",
    )
    threshold: float = Field(
        0.5, ge=0.05, le=0.95, description="probability above which a pixel is lesion"
    )
    logits: bool = Field(False, description="also write student-logits.onnx (float32 logits)")
    calibration: int = Field(64, ge=1, description="training images that set the int8 ranges")
    engines: Names = Field(("torch", "onnx"), description=f"engines to time: {', '.join(ENGINES)}")
    cost_pixels: Sizes = Field((128,), description="image sides to time, px")
    repeats: int = Field(5, ge=1, description="rounds through all networks and engines")

    @model_validator(mode="after")
    def _known_names(self) -> Self:
        for field, known in (("formats", FORMATS), ("engines", ENGINES)):
            for name in getattr(self, field):
                if name not in known:
                    raise ValueError(f"{field} names {name!r}: {nearest(name, known)}")
        return self

    def hashed(self) -> dict[str, Any]:
        """What the files are made with; the student counts by its own digest."""
        names = ("formats", "sizes", "threshold", "logits", "calibration")
        return {name: getattr(self, name) for name in names}
