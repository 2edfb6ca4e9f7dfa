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
import os
import re
import sys
from collections.abc import Collection, Sequence
from enum import Enum
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self, TypeVar

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

PROFILES: dict[str, dict[str, object]] = {
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
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""ImageNet's channel statistics, by which images are standardized; pixels in 0..1."""

DEMONSTRATION = {"label_fraction": 0.1}
"""Set by the smoke profile for the phantom: with few labels a teacher helps visibly."""

LEVELS = {
    "decoder": ("decoder.stride8", "decoder.stride4", "decoder.stride2"),
    "patent": ("encoder.stride4", "decoder.stride4", "decoder.stride2"),
}
"""Named sets of feature maps for the option `levels`."""


class Role(Enum):
    """What an option is for, where it matters to more than its own stage."""

    RUN = "where and how a run is made, or what it is called; the result is the same"
    FILE = "a file that counts by its content"
    TEACHER = "of the teacher; no part of a student that has none"
    TERM = "read by loss terms alone; no part of a student without these terms"
    OWN = "of one student; students that are trained together may differ in it"


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
        raise ConfigError(f"cannot read {file!r}: {error.strerror}") from None


def _with_code(network: str) -> str:
    """A network's name; that of 'package.module:function' with the SHA-256 of its file."""
    module, colon, _ = network.partition(":")
    if not colon or module == "timm":
        return network
    return f"{network} {content_of(str(own_module(module).__file__))}"


def own_module(name: str) -> ModuleType:
    """A module of networks or loss terms of your own, beside the notebook or on the path."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    importlib.invalidate_caches()  # the file may have been written a moment ago
    try:
        return importlib.import_module(name)
    except (ImportError, TypeError) as error:  # TypeError: a name that begins with a dot
        raise ConfigError(
            f"{name!r} cannot be imported: {error}. Give 'mine:name' for what mine.py holds, and "
            "start in the folder of mine.py or name that folder in PYTHONPATH"
        ) from None


def _registered(terms: str) -> str:
    """'feat+mine:sp*2' -> 'feat+sp*2', when mine.py, which registers `sp`, has been imported."""
    for module in re.findall(r"([^:+,]+):", terms):
        own_module(module)
    return re.sub(r"[^:+,]+:", "", terms)


def _parts(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _listed(value: object) -> object:
    """'a, b' or ['a', 'b'] -> ('a', 'b')."""
    if isinstance(value, str):
        return _parts(value)
    return tuple(value) if isinstance(value, list) else value


def _numbers(value: object) -> object:
    """'128, 256' -> (128, 256); 128 -> (128,)."""
    if isinstance(value, str):
        return tuple(int(part) for part in _parts(value))
    return (value,) if type(value) is int else _listed(value)


def _seeds(value: object) -> object:
    """3 -> (0, 1, 2); '7' -> (7,); '0, 7' -> (0, 7)."""
    if type(value) is not int:
        return _numbers(value)
    if not 0 <= value <= 1000:
        raise ValueError(f"{value} is no number of seeds; for one seed give the string '{value}'")
    return tuple(range(max(value, 1)))  # 0 can only mean seed 0


def _levels(value: object) -> object:
    """'patent' -> the maps of that name; 'a, b' -> ('a', 'b')."""
    return LEVELS[value] if isinstance(value, str) and value in LEVELS else _listed(value)


def _distinct(values: tuple[object, ...]) -> tuple[object, ...]:
    if len(set(values)) != len(values):
        raise ValueError("one value is given twice")
    return values


def _window(value: str) -> str:
    match = re.fullmatch(r"\s*-?\d+(\.\d+)?\s*,\s*(\d+(\.\d+)?)\s*", value)
    if value and (not match or float(match[2]) == 0):
        raise ValueError("must be 'centre, width' of a width above 0, such as '-600, 1500'")
    return value


def _joined(value: object) -> object:
    """[1, 3], as older versions wrote it, -> '1, 3'."""
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else value


def _values(value: str) -> str:
    value = re.sub(r"\s*,\s*", ", ", " ".join(value.lower().split()))
    number = r"-?\d+(?:\.\d+)?"
    one = rf"(?:{number}|#(?:[0-9a-f]{{6}}){{1,2}})"
    if value and not re.fullmatch(rf"(?:all but )?{one}(?:, {one})*|over {number}", value):
        raise ValueError("must be such as '1, 3', '#ff0000', 'all but 0' or 'over 127'")
    return value


def _rule(value: str) -> str:
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(f"is no regular expression: {error}") from None
    return value


def _losses(value: object) -> object:
    """'feat=1, edge' -> {'feat': 1.0, 'edge': None}; None is the term's default weight."""
    given: dict[str, float | None] = {}
    if isinstance(value, dict):
        given |= {_registered(name): weight for name, weight in value.items()}
    else:
        listed = value if isinstance(value, list | tuple) else _parts(str(value))
        for part in listed:
            name, equals, number = (text.strip() for text in _registered(str(part)).partition("="))
            if name in given:
                raise ValueError(f"names {name!r} twice")
            try:
                given[name] = float(number) if equals else None
            except ValueError:
                raise ValueError(f"the weight of {name!r} is {number!r}; give a number") from None
    for name, weight in given.items():
        if weight is not None and not 0 <= weight < float("inf"):
            raise ValueError(f"the weight of {name!r} is {weight}; it must be 0 or more")
    return {name: None if weight is None else float(weight) for name, weight in given.items()}


def _edge_level(value: object) -> object:
    return {"low": "encoder.stride4", "deep": "encoder.stride16"}.get(str(value), value)


_MAP = r"(en|de)coder\.stride(1|2|4|8|16|32)"
Text = Annotated[str, Field(strict=False, coerce_numbers_to_str=True)]
"""papermill takes a text such as 2024, perhaps the name of a folder, for a number."""
Values = Annotated[Text, BeforeValidator(_joined), AfterValidator(_values)]
DISTINCT = AfterValidator(_distinct)
Names = Annotated[tuple[str, ...], BeforeValidator(_listed), DISTINCT]
Arms = Annotated[
    tuple[str, ...],
    BeforeValidator(_listed),
    AfterValidator(lambda arms: tuple(map(_registered, arms))),
    DISTINCT,
]
Seed = Annotated[int, Field(ge=0, lt=2**31)]
Seeds = Annotated[tuple[Seed, ...], BeforeValidator(_seeds), DISTINCT, Field(min_length=1)]
Size = Annotated[int, Field(ge=32, le=4096, multiple_of=32)]
Sizes = Annotated[tuple[Size, ...], BeforeValidator(_numbers), DISTINCT, Field(min_length=1)]
Level = Annotated[str, Field(pattern=rf"^{_MAP}(:{_MAP})?$")]
Levels = Annotated[tuple[Level, ...], BeforeValidator(_levels), DISTINCT, Field(min_length=1)]
EdgeLevel = Annotated[Level, BeforeValidator(_edge_level)]
Window = Annotated[str, AfterValidator(_window)]
Rule = Annotated[str, AfterValidator(_rule)]
Fraction = Annotated[float, Field(gt=0, lt=0.5)]
Losses = Annotated[dict[str, float | None], BeforeValidator(_losses)]


KINDS: dict[str, type[StageConfig]] = {}
"""The configuration of every stage, of those that are imported."""


class StageConfig(BaseModel):
    """Options of all stages: the profile, and where the work runs."""

    model_config = ConfigDict(
        frozen=True,
        strict=True,
        extra="forbid",
        validate_default=True,
        use_attribute_docstrings=True,  # the text below an option is its help
    )
    stage: ClassVar[str]
    version: ClassVar[int] = 4  # increase when the same options give another result
    seed_field: ClassVar[str] = "split_seed"  # the seed in the folder's name

    profile: Annotated[Literal["smoke", "cpu", "paper"], Role.RUN] = "smoke"
    """sets what is not given: smoke (minutes), cpu (an hour), paper (GPU)"""
    device: Annotated[Literal["auto", "cpu", "cuda", "mps"], Role.RUN] = "auto"
    """auto uses a GPU where there is one"""
    threads: Annotated[int, Role.RUN] = Field(0, ge=0)
    """CPU threads; 0 leaves torch's choice"""

    @classmethod
    def __pydantic_init_subclass__(cls, **_: object) -> None:
        for field in cls.model_fields.values():
            field.description = " ".join((field.description or "").split())
        KINDS.setdefault(cls.stage, cls)

    def __init__(self, **values: object) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigError(_plain(error, type(self))) from None

    @model_validator(mode="before")
    @classmethod
    def _fill_from_profile(cls, values: dict[str, object]) -> dict[str, object]:
        given = {name: value for name, value in values.items() if value is not None}
        profile = str(given.get("profile", "smoke"))
        filled = PROFILES.get(profile, {})
        if profile == "smoke" and given.get("dataset", "phantom") == "phantom":
            filled = filled | DEMONSTRATION
        return {name: value for name, value in filled.items() if name in cls.model_fields} | given

    @classmethod
    def from_notebook(cls, namespace: dict[str, object]) -> Self:
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
        if isinstance(first, frozenset):
            names &= first
        cfg = cls(**{name: namespace[name] for name in names})
        namespace["_lesionkd_parameters"] = frozenset(names)
        return cfg

    @classmethod
    def parameters(cls) -> pd.DataFrame:
        """A table of all options: name, default (with the default profile) and help."""
        import pandas as pd

        usual, fields = cls(), cls.model_fields.items()
        rows = [(name, getattr(usual, name), field.description) for name, field in fields]
        return pd.DataFrame(rows, columns=["parameter", "default", "help"])

    @classmethod
    def options(cls, role: Role) -> frozenset[str]:
        """Names of the options of a role."""
        return frozenset(n for n, field in cls.model_fields.items() if role in field.metadata)

    def upstream(self, stage: type[C]) -> C:
        """The configuration of an earlier stage."""
        return stage(**{name: getattr(self, name) for name in stage.model_fields})

    def with_values(self, **values: object) -> Self:
        """The same configuration with other values."""
        given = {name: getattr(self, name) for name in self.model_fields_set}
        return type(self)(**given | values)

    def hashed(self, unused: Collection[str] = ()) -> dict[str, object]:
        """The options that the result is computed from; files by their content."""
        left_out = self.options(Role.RUN) | set(unused)
        values = self.model_dump(exclude=set(left_out), mode="json")
        for name in self.options(Role.FILE) & values.keys():
            if values[name] not in ("", "random"):
                values[name] = content_of(values[name])
        return values | {name: code for name, code in self.networks().items() if name in values}

    def networks(self) -> dict[str, str]:
        """The options that name networks; one of your own with the SHA-256 of its file."""
        named = {"teacher", "student"} & type(self).model_fields.keys()
        return {name: _with_code(getattr(self, name)) for name in sorted(named)}

    def digest(self, upstream: str, unused: Collection[str] = ()) -> str:
        """SHA-256 of the stage, its options and the digest of what it is made from."""
        content = {"stage": self.stage, "version": self.version, "upstream": upstream}
        text = json.dumps(content | self.hashed(unused), sort_keys=True)
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


def name_of_dataset(dataset: str) -> str:
    """The name of a data set in tables: of the folder, of a list its folder's and its own name.

    >>> name_of_dataset("data/my-lesions/clinic-a.csv")
    'my-lesions-clinic-a'
    """
    path = Path(dataset)
    if path.suffix.lower() not in (".csv", ".tsv"):
        return path.name
    return f"{path.resolve().parent.name}-{path.stem}"


def shared_name(datasets: Sequence[str]) -> str:
    """The name that two of these data sets have; '' if all names differ."""
    names = [name_of_dataset(dataset) for dataset in datasets]
    return next((name for name in names if names.count(name) > 1), "")


class PrepareConfig(StageConfig):
    """Raw images -> arrays, split and report (stage `prepare`)."""

    stage = "prepare"
    dataset: Annotated[Text, Role.RUN] = Field("phantom", min_length=1)
    """name in the catalogue, folder with images/ and masks/, or CSV manifest"""
    pixels: int = Field(64, ge=32, le=2048, multiple_of=32)
    """side of the prepared image, px"""
    cases: int = Field(0, ge=0)
    """number of cases, drawn at random; 0 uses all (phantom: 1000)"""
    normals: Literal["drop", "keep", "test"] = "drop"
    """images without a lesion: drop, keep, or only in the test split"""
    fit: Literal["stretch", "pad"] = "stretch"
    """how an image becomes square: stretched, or padded with black"""
    window: Window = ""
    """volumes: 'centre, width' in the file's unit (CT: HU); empty uses the DICOM file's own, else
    the 0.5 to 99.5 percentiles"""
    lesion_values: Values = ""
    """values of the masks that are lesion, such as '1, 3', '#ff0000', 'all but 0' or 'over 127';
    empty: decided from all masks of the data set"""
    invert_masks: bool = False
    """masks show the lesion black on white"""
    split_seed: Seed = 0
    """seed of the split and of the phantom's cases"""
    split: Literal["groups", "official", "random", "test"] = "groups"
    """by group; as the release says; by image, which leaks; or all for testing"""
    split_file: Annotated[str, Role.FILE] = ""
    """CSV file with the columns id and split; replaces the option split"""
    folds: int = Field(0, ge=0, le=50)
    """k of a k-fold split by group; 0 holds out test_fraction"""
    fold: int = Field(0, ge=0)
    """which of the k folds is the test split, from 0"""
    val_fraction: Fraction = 0.15
    """fraction of the cases for validation"""
    test_fraction: Fraction = 0.2
    """fraction of the cases in the test split"""
    group_by: Rule = ""
    """what names the patient or video: number (the file name before its last number), folder,
    sequence (consecutive frames that look alike), column:NAME of the manifest, or a regular
    expression for the path; empty: what the data set itself says"""
    join_copies: bool = True
    """2-D images that show the same share a group, also mirrored or turned copies; False: only
    names say what belongs together"""

    @property
    def dataset_name(self) -> str:
        """The name of the data set in tables, from `name_of_dataset`."""
        return name_of_dataset(self.dataset)

    def for_testing(self, dataset: str) -> ExternalConfig:
        """The options that prepare all cases of another data set for testing, in the same way.

        Whether its masks are inverted, and what names its groups, is decided by its own files.
        """
        only = {"split": "test", "split_file": "", "folds": 0, "fold": 0, "cases": 0}
        only |= {"invert_masks": False, "group_by": ""}
        return self.upstream(ExternalConfig).with_values(dataset=dataset, **only)

    @model_validator(mode="after")
    def _fold_of_folds(self) -> Self:
        if self.folds == 1:
            raise ValueError("folds = 1: give 0 for a hold-out split, or at least 2")
        if self.fold >= max(self.folds, 1):
            why = f"the last is {self.folds - 1}" if self.folds else "give folds, their number, too"
            raise ValueError(f"fold = {self.fold}: {why}")
        if self.folds and (self.split != "groups" or self.split_file):
            raise ValueError("folds split by group: split must be 'groups' and split_file empty")
        if self.normals == "test" and (self.folds or self.split_file):
            raise ValueError("normals = 'test': folds or split_file already decide who is tested")
        return self


class ExternalConfig(PrepareConfig):
    """Trained network and another data set -> its scores there (stage `external`)."""

    stage = "external"


class UnlabelledConfig(PrepareConfig):
    """Images without masks -> prepared arrays (stage `unlabelled`)."""

    stage = "unlabelled"


class TeacherConfig(PrepareConfig):
    """Prepared arrays -> trained teacher (stage `teacher`, before step S1)."""

    stage = "teacher"
    seed_field = "teacher_seed"
    teacher: Annotated[str, Role.TEACHER] = "resnet34_unet"
    """resnet34_unet (patent), unet64 (paper), efficientnet_lite2_unet (ImageNet; extra imagenet),
    timm:NAME (package timm), or your own as 'module:function'"""
    teacher_seed: Annotated[Seed, Role.TEACHER] = 0
    """seed of the teacher's weights and batches, and of the graph"""
    teacher_epochs: Annotated[int, Role.TEACHER] = Field(12, ge=1)
    """epochs, teacher"""
    teacher_lr: Annotated[float, Role.TEACHER] = Field(1e-3, gt=0)
    """peak learning rate, teacher"""
    batch_size: int = Field(8, ge=2)
    """images in a batch"""
    weight_decay: float = Field(1e-2, ge=0)
    """AdamW's weight decay"""
    augment: Literal["none", "flips", "full"] = "full"
    """none; flips and quarter turns; or also affine, contrast, blur and noise"""
    seg_loss: Literal["bce_dice", "bce"] = "bce_dice"
    """L_seg of teacher and student: 0.5 BCE + 0.5 soft Dice, or BCE (patent)"""
    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    """arithmetic, in Lightning Fabric's names"""
    encoder_weights: Annotated[str, Role.TEACHER, Role.FILE] = ""
    """file of weights of the teacher's encoder (torchvision's resnet34, or timm's), or random;
    empty: its ImageNet weights if it has any"""
    teacher_checkpoint: Annotated[str, Role.TEACHER, Role.FILE] = ""
    """state dict of a teacher trained elsewhere; used without training"""
    test_dataset: Annotated[Names, Role.RUN] = ()
    """other data sets, comma-separated; the trained network is scored on each"""

    @model_validator(mode="after")
    def _weights_of_the_teacher(self) -> Self:
        takes_file = self.teacher == "resnet34_unet" or self.teacher.startswith("timm:")
        without = self.teacher == "efficientnet_lite2_unet" and self.encoder_weights == "random"
        if self.encoder_weights and not takes_file and not without:
            takers = "teacher = 'resnet34_unet' or 'timm:NAME'"
            raise ValueError(f"encoder_weights need {takers}; got {self.teacher!r}")
        if self.encoder_weights and self.teacher_checkpoint:
            raise ValueError("encoder_weights and teacher_checkpoint: give one of the two")
        return self

    @model_validator(mode="after")
    def _tested_elsewhere(self) -> Self:
        if self.split == "test" and not self.split_file:
            raise ValueError("split = 'test' leaves no training cases; use test_dataset instead")
        if self.dataset in self.test_dataset:
            raise ValueError(f"test_dataset names {self.dataset!r}, the training data")
        if twice := shared_name((self.dataset, *self.test_dataset)):
            raise ValueError(f"test_dataset: two data sets are called {twice!r}; rename a folder")
        return self


class GraphConfig(TeacherConfig):
    """Frozen teacher -> fitted, frozen graph module (stage `graph`, step S4)."""

    stage = "graph"
    edge_width: Annotated[int, Role.TERM] = Field(1, ge=1, le=8)
    """1 is the patent's 4-neighbour rule, two pixels wide; w dilates it w - 1 times"""
    edge_level: Annotated[EdgeLevel, Role.TERM] = "encoder.stride4"
    """feature map of L_edge; low is encoder.stride4 (patent), deep is encoder.stride16 (paper)"""
    grid: Annotated[int, Role.TERM] = Field(4, ge=1, le=16)
    """the graph has grid x grid nodes"""
    states: Annotated[int, Role.TERM] = Field(16, ge=1, le=256)
    """state channels of the graph"""
    anchors: Annotated[Literal["masked_mean", "masked_cosine", "eagr"], Role.TERM] = "masked_cosine"
    """a node's anchor: mean key of edge pixels, cosine, or EAGR's"""
    teacher_bn: Annotated[Literal["eval", "batch"], Role.TEACHER] = "eval"
    """statistics of the frozen teacher's BatchNorm: running, or the batch's"""
    weak_teacher: Annotated[Literal["refuse", "allow"], Role.RUN] = "refuse"
    """a teacher whose validation Dice is not above that of one fixed mask"""
    graph_epochs: Annotated[int, Role.TERM] = Field(5, ge=1)
    """epochs, fitting the graph"""


class DistillConfig(GraphConfig):
    """Frozen teacher and graph -> trained student (stage `distill`, steps S2 to S6)."""

    stage = "distill"
    seed_field = "seed"
    losses: Annotated[Losses, Role.OWN] = "feat, edge"  # type: ignore[assignment]
    """loss terms besides seg with optional weights, such as 'feat=1, edge' or 'mine:name'; empty
    trains the student alone"""
    seed: Seed = 0
    """seed of the student's weights and batches"""
    student: Annotated[str, Role.OWN] = "unet"
    """unet, or your own as 'module:function'"""
    width: Annotated[int, Role.OWN] = Field(4, ge=1, le=64)
    """channels of the student's first block"""
    epochs: int = Field(10, ge=1)
    """epochs, student"""
    lr: Annotated[float, Role.OWN] = Field(1e-2, gt=0)
    """peak learning rate, student and connectors"""
    label_fraction: float = Field(1.0, gt=0, le=1)
    """fraction of the training images whose masks the student uses; the others are for the terms
    that need none (smoke profile on the phantom: 0.1)"""
    label_seed: Seed = 0
    """seed of the choice of these images; whole groups are drawn"""
    unlabelled: Annotated[Text, Role.RUN] = ""
    """folder of images without masks, which the student sees in training through the terms that
    need none"""
    connector_lr: Annotated[float, Role.TERM] = Field(1.0, gt=0, allow_inf_nan=False)
    """connectors' learning rate, as multiple of lr"""
    levels: Annotated[Levels, Role.TERM] = LEVELS["decoder"]
    """feature maps of L_feat: decoder, patent, or names; 'a:b' pairs the student's map a with the
    teacher's b"""
    level_weights: Annotated[Literal["mean", "halving"], Role.TERM] = "mean"
    """sum over levels: mean of each, or the original's halving"""
    margin: Annotated[Literal["bn", "empirical"], Role.TERM] = "bn"
    """margin from the BatchNorm, or the mean negative response"""

    @property
    def terms(self) -> tuple[str, ...]:
        """Names of the loss terms besides L_seg."""
        return tuple(name for name in self.losses if name != "seg")


class AblationConfig(DistillConfig):
    """Every arm and seed, scored on the same cases (stage `ablation`)."""

    stage = "ablation"
    losses: Annotated[Losses, Role.OWN] = ""  # type: ignore[assignment]
    """weights that replace the defaults, such as 'feat=1, kd=3'"""
    arms: Arms = Field(
        ("alone", "feat", "edge", "method", "shuffled", "kd", "cwd", "dist"), min_length=1
    )
    """arms, comma-separated: alone, feat, edge, method, shuffled, or any loss term, also your
    own 'mine:name'; 'alone*2' trains twice as many epochs"""
    seeds: Seeds = (0,)
    """3 is the seeds 0, 1, 2; '7' is seed 7; '0, 7' is both"""

    @model_validator(mode="before")
    @classmethod
    def _arms_decide(cls, values: dict[str, object]) -> dict[str, object]:
        if values.get("seed") is not None:
            raise ValueError("seed: an ablation has the option seeds instead")
        return values
