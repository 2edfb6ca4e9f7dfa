"""docs/options.md from the configuration: every option with its default, allowed values and use."""

from __future__ import annotations

from typing import Any

from lesionkd_core import config
from lesionkd_core.config import PROFILES, Role, StageConfig
from lesionkd_core.export import ExportConfig
from lesionkd_core.losses import TERMS
from lesionkd_core.results import CHECKOUT
from lesionkd_core.sweep import configuration

SECTIONS = {
    "Everywhere": config.StageConfig,
    "Data and split": config.PrepareConfig,
    "Teacher, and the training of both networks": config.TeacherConfig,
    "Edge label and graph": config.GraphConfig,
    "Student and losses": config.DistillConfig,
    "Ablation": config.AblationConfig,
    "Export": ExportConfig,
}
COMMANDS: dict[str, type[StageConfig]] = {
    "prepare": config.PrepareConfig,
    "train-teacher": config.TeacherConfig,
    "distill": config.DistillConfig,
    "ablate": config.AblationConfig,
    "export": ExportConfig,
}
HEAD = """# Options

Every option of the suite, written by `make notebooks` from \
[config.py](../lesionkd_core/config.py). An option is given with `-p` to papermill and to \
`lesionkd`, in a [sweep file](sweeps.md), or by name in Python. A notebook takes every option of \
its table, also those that its first cell does not list.

    lesionkd run 03_teacher -p teacher_epochs 3 -p split_seed 1

```python
import lesionkd_core as lkd

cfg = lkd.TeacherConfig(teacher_epochs=3, split_seed=1)
lkd.TeacherConfig.parameters()     # this page as a table
```

- An unknown name is refused with the nearest one, a wrong value with the option's help.
- A list is comma-separated text (`-p arms "alone, method"`), or a YAML list with `-y` or `-f`.
- `-p` turns `3` into a number and `true` into a truth value where the option is not text; `-r` \
leaves text as it is. `-p seeds 3` is the seeds 0, 1 and 2; `-r seeds 3` is the seed 3.
- Three defaults are those of the profiles smoke / cpu / paper.
- A result is identified by the content of its data and by the options that change it: not by \
UNHASHED or a path (images of `unlabelled` count by their content), and not by options of loss \
terms that are not used.

Two environment variables name folders: `LESIONKD_DATA` that of the data sets (`data/raw` if not \
set), `LESIONKD_RUNS` that of the results (`runs`)."""


def option_reference() -> str:
    """The page."""
    unhashed = config.AblationConfig.options(Role.RUN) - {"dataset"}
    names = ", ".join(f"`{name}`" for name in sorted(unhashed))
    parts = [
        HEAD.replace("UNHASHED", names),
        *(section(title, kind) for title, kind in SECTIONS.items()),
        losses(),
    ]
    return "\n\n".join(parts) + "\n"


def section(title: str, kind: type[StageConfig]) -> str:
    """The options that a configuration adds to those it inherits."""
    inherited = {name for base in kind.__mro__[1:] for name in getattr(base, "model_fields", {})}
    fields = kind.model_json_schema()["properties"]
    rows = [
        f"| `{name}` | {default(name, fields[name])} | {allowed(fields[name])} "
        f"| {(kind.model_fields[name].description or '').replace('|', '/')} |"
        for name in kind.model_fields
        if name not in inherited or (name == "losses" and kind is config.AblationConfig)
    ]
    head = "| option | default | allowed | meaning |\n|---|---|---|---|"
    return "\n".join([f"## {title}", "", f"For {takers(kind)}.", "", head, *rows])


def takers(kind: type[StageConfig]) -> str:
    """Notebooks and commands that have these options."""
    notebooks = [
        f"[{path.stem[:2]}](../notebooks/{path.name})"
        for path in sorted((CHECKOUT / "notebooks").glob("0*.ipynb"))
        if issubclass(configuration(path), kind)
    ]
    commands = [f"`lesionkd {name}`" for name, taken in COMMANDS.items() if issubclass(taken, kind)]
    return f"notebooks {', '.join(notebooks)}; {', '.join(commands)}"


def default(name: str, field: dict[str, Any]) -> str:
    """The value without the option; three of them if the profile sets it."""
    if any(name in values for values in PROFILES.values()):
        return " / ".join(f"`{values[name]}`" for values in PROFILES.values())
    value = field["default"]
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return f"`{text}`" if text else "empty"


def allowed(field: dict[str, Any]) -> str:
    """Allowed values in words."""
    if "enum" in field:
        return ", ".join(f"`{value}`" if value else "empty" for value in field["enum"])
    kinds = {
        "array": "list",
        "boolean": "`True`, `False`",
        "integer": "integer",
        "number": "number",
        "object": "loss terms",
        "string": "a map, such as `decoder.stride4`" if "pattern" in field else "text",
    }
    return kinds[field["type"]] + limits(field.get("items", field))


def limits(field: dict[str, Any]) -> str:
    """The range of a number; that of seeds need not be said."""
    words = {
        "minimum": ">= {}",
        "exclusiveMinimum": "> {}",
        "maximum": "<= {}",
        "exclusiveMaximum": "< {}",
        "multipleOf": "multiple of {}",
    }
    found = [text.format(f"{field[key]:g}") for key, text in words.items() if key in field]
    return "".join(f", {text}" for text in found if "e+09" not in text)


def losses() -> str:
    """The registered loss terms with their default weights."""
    rows = [
        f"| `{name}` | {term.label} | {term.weight:g} | {', '.join(term.options) or '-'} |"
        for name, term in TERMS.items()
    ]
    text = (
        "For `losses`, and as arms of an ablation. One of your own is `module:name` "
        "([design.md](design.md))."
    )
    head = "| term | label | default weight | options that it uses |\n|---|---|---|---|"
    return "\n".join(["## Loss terms", "", text, "", head, *rows])
