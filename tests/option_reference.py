"""docs/options.md from the configuration models: every option with its default, what it may be, and who takes it."""

from typing import Any

from lesionkd_core import config
from lesionkd_core.__main__ import TRAINING
from lesionkd_core.provenance import CHECKOUT
from lesionkd_core.sweeps.notebooks import configuration

SECTIONS = {
    "Everywhere": config.StageConfig,
    "Data and split": config.PrepareConfig,
    "Edge label": config.EdgeConfig,
    "Teacher, and the training of both networks": config.TeacherConfig,
    "Graph": config.GraphConfig,
    "Student, losses and rivals": config.DistillConfig,
    "Ablation": config.AblationConfig,
    "Export": config.ExportConfig,
}
NAMES = {"terms": config.TERM_FIELDS, "arms": config.ARMS}
"""What a list may name where the type alone does not say it; `formats` and `engines` say it in their help."""
DECIDED = {"seed", "terms", "shuffle_edges"}
"""Options of a student that an ablation refuses, since its arms and seeds decide them."""
HEAD = """# Options

Made by `make notebooks` from the configuration models (`lesionkd_core/config`), so it holds every option and its default. An option is given
with `-p` to papermill and to `python -m lesionkd_core run` (also the options that a notebook's first cell does not list), under `parameters` in a
[sweep file](sweeps.md), or by name in Python:

    papermill notebooks/03_teacher.ipynb out.ipynb -p dataset phantom-ct -p teacher_epochs 3

```python
import lesionkd_core as lkd
cfg = lkd.TeacherConfig(dataset="phantom-ct", teacher_epochs=3)
lkd.TeacherConfig.parameters()     # this reference as a table
```

An unknown name is refused with the nearest one, a value of the wrong type or out of range with the option's help. Lists are comma-separated text.
A stage takes the options of every stage that it stands on, and hands them on. What the profile decides has three defaults: smoke / cpu / paper.
`profile`, `device` and `threads` are no part of what a result is, nor is the place of a data set or file, only its content; every other option that
matters to a stage is part of the hash in its folder's name.

Where things lie is said by two environment variables: `LESIONKD_DATA`, the folder of the releases (default `data/raw`), and `LESIONKD_RUNS`, that of
the results (default `runs`)."""


def option_reference() -> str:
    """The page."""
    return "\n\n".join([HEAD, *(section(title, cls) for title, cls in SECTIONS.items())]) + "\n"


def section(title: str, cls: type[config.StageConfig]) -> str:
    """One table: the options that a model adds to those it stands on."""
    properties = cls.model_json_schema()["properties"]
    own = [name for name in cls.model_fields if all(name not in base.model_fields for base in cls.__mro__[1:] if hasattr(base, "model_fields"))]
    rows = [f"| `{name}` | {default(name, properties[name])} | {allowed(name, properties[name])} | {properties[name]['description']} |" for name in own]
    refused = f" ({', '.join(f'`{name}`' for name in own if name in DECIDED)}: not by 05, 06 and `ablate`)" if DECIDED & set(own) else ""
    return "\n".join([f"## {title}", "", f"Taken by {takers(cls)}{refused}.", "", "| option | default | allowed | what it is |", "|---|---|---|---|", *rows])


def takers(cls: type[config.StageConfig]) -> str:
    """Notebooks and commands whose configuration stands on this one."""
    notebooks = [p for p in sorted((CHECKOUT / "notebooks").glob("0*.ipynb")) if issubclass(configuration(p), cls)]
    commands = [name for name, (taken, _, _) in TRAINING.items() if issubclass(getattr(config, taken), cls)]
    return ", ".join([f"[{p.stem[:2]}](../notebooks/{p.name})" for p in notebooks] + [f"`{name}`" for name in commands])


def default(name: str, field: dict[str, Any]) -> str:
    """The value that is taken where none is given."""
    if any(name in profile for profile in config.PROFILES.values()):
        return " / ".join(f"`{profile[name]}`" for profile in config.PROFILES.values())
    value = field["default"]
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return f"`{text}`" if text else "empty"


def allowed(name: str, field: dict[str, Any]) -> str:
    """What it may be, in words."""
    if name in NAMES:
        return "list, of " + ", ".join(f"`{known}`" for known in NAMES[name])
    if field["type"] == "array":
        return f"list, each a {allowed('', field['items'])}{'' if 'minItems' not in field and 'minLength' not in field else ', at least one'}"
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    if "pattern" in field:
        return "map, such as `decoder.stride4`"
    kind = {"integer": "whole number", "number": "number", "boolean": "`True`, `False`", "string": "text" if name else "name"}[field["type"]]
    return kind + limits(field)


def limits(field: dict[str, Any]) -> str:
    """From where to where a number goes; seeds go so far that it need not be said."""
    kinds = {"minimum": "at least", "exclusiveMinimum": "over", "maximum": "at most", "exclusiveMaximum": "under"}
    words = [f"{word} {field[key]}" for key, word in kinds.items() if key in field and field[key] != 2**31]
    return " " * bool(words) + " and ".join(words) + (f" in steps of {field['multipleOf']}" if "multipleOf" in field else "")
