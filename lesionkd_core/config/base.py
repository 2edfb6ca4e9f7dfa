"""What every stage's configuration shares: types of its fields, errors in plain words, its hash."""

from __future__ import annotations

import difflib
import hashlib
import inspect
import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

if TYPE_CHECKING:
    import pandas as pd

C = TypeVar("C", bound="StageConfig")

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
WHERE = ("profile", "device", "threads", "deterministic", "weak_teacher", "dataset")
"""Where and how a result is computed: not part of its hash (data count by their content)."""
LATER = {"stem": 1, "clip_grad": 0.0, "connector_lr": 1.0, "connector_warmup": 0}
"""Parameters that came after the first runs: they count once they are changed, so that those runs are found."""


class LesionKDError(Exception):
    """Something the user can mend. Notebooks and the command line show the message alone."""

    def _render_traceback_(self) -> list[str]:  # IPython calls this instead of printing its traceback
        return [f"{type(self).__name__}: {self}"]


class ConfigError(LesionKDError):
    """A parameter is unknown, of the wrong type or out of range."""


def nearest(name: str, known: Collection[str]) -> str:
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


def _sizes(value: Any) -> Any:
    """'128, 256' -> (128, 256); one number alone is one size."""
    if isinstance(value, int) and not isinstance(value, bool):
        return (value,)
    return tuple(int(part) for part in _names(value)) if isinstance(value, str) else _names(value)


def _distinct(values: tuple[Any, ...]) -> tuple[Any, ...]:
    if len(set(values)) != len(values):
        raise ValueError("names one value twice")
    return values


def _window(value: str) -> str:
    if value and not re.fullmatch(r"\s*-?\d+(\.\d+)?\s*,\s*\d+(\.\d+)?\s*", value):
        raise ValueError("wants 'centre, width', such as '-600, 1500' for lung")
    if value.strip() and float(value.split(",")[1]) <= 0:
        raise ValueError("the width must be over 0")
    return value


Names = Annotated[tuple[str, ...], BeforeValidator(_names), AfterValidator(_distinct)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]
Seeds = Annotated[tuple[Seed, ...], BeforeValidator(_seeds), AfterValidator(_distinct), Field(min_length=1)]
Size = Annotated[int, Field(ge=32, le=4096, multiple_of=32)]
Sizes = Annotated[tuple[Size, ...], BeforeValidator(_sizes), AfterValidator(_distinct), Field(min_length=1)]
Level = Annotated[str, Field(pattern=r"^(en|de)coder\.stride(1|2|4|8|16|32)(:(en|de)coder\.stride(1|2|4|8|16|32))?$")]
Levels = Annotated[tuple[Level, ...], BeforeValidator(_names), AfterValidator(_distinct), Field(min_length=1)]
EdgeLevel = Annotated[Level, BeforeValidator(lambda v: {"low": "encoder.stride4", "deep": "encoder.stride16"}.get(v, v) if isinstance(v, str) else v)]
Window = Annotated[str, AfterValidator(_window)]
Fraction = Annotated[float, Field(gt=0, lt=0.5)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]


def content_of(file: str) -> str:
    """Digest of a file named by a parameter."""
    try:
        return hashlib.sha256(Path(file).expanduser().read_bytes()).hexdigest()
    except OSError as error:
        raise ConfigError(f"cannot read {file!r}: {error.strerror}; give the path of an existing file") from None


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
    def parameters(cls) -> pd.DataFrame:
        """A table of all fields: name, default and help."""
        import pandas as pd

        rows = [(n, PROFILES["smoke"].get(n, f.default), f.description) for n, f in cls.model_fields.items()]
        return pd.DataFrame(rows, columns=["parameter", "default", "help"])

    def upstream(self, stage: type[C]) -> C:
        """The configuration of a stage this one stands on."""
        return stage(**{name: getattr(self, name) for name in stage.model_fields})

    def with_values(self, **values: Any) -> Self:
        """The same configuration with other values."""
        return type(self)(**{name: getattr(self, name) for name in type(self).model_fields if name in self.model_fields_set} | values)

    def hashed(self) -> dict[str, Any]:
        """The fields that the result is computed from: not where it ran, not where the data lay."""
        later = {name for name, value in LATER.items() if getattr(self, name, None) == value}
        return self.model_dump(exclude={*WHERE, *later}, mode="json")

    def digest(self, upstream: str) -> str:
        """Content address of the result: configuration, stage version and what it was made from."""
        content = {"stage": self.stage, "version": self.version, "upstream": upstream, **self.hashed()}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def __repr__(self) -> str:
        changed = {n: v for n, v in self if v != type(self).model_fields[n].default}
        return f"{type(self).__name__}({', '.join(f'{n}={v!r}' for n, v in changed.items())})"


def _plain(error: ValidationError, cls: type[BaseModel]) -> str:
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
