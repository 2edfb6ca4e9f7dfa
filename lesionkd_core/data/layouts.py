"""The catalogue: every release of catalogue.toml by name, where it comes from and how its folder is read."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from . import busi, covid_ct, cvc_clinicdb, isic, paired, ph2, polyps, wounds
from .files import Case

LAYOUTS = {module.__name__.rpartition(".")[2]: module.cases for module in (busi, covid_ct, cvc_clinicdb, isic, paired, ph2, polyps, wounds)}


@dataclass(frozen=True)
class Release:
    """One entry of the catalogue.

    `folder` is looked for under LESIONKD_DATA; `holds` are the folders in it that must be there, and
    `others` what may be there instead. A folder may have any name, unless the release is `named`: then
    only `folder` or one of `names`, since everybody's data has images and masks. `cases` reads the
    folder. `count` is the official number of images, or of volumes. `archives` are direct addresses of
    the download; where there are none, `access` says how to get it.
    """

    name: str
    modality: str
    folder: str
    holds: tuple[str, ...]
    cases: Callable[[Path], list[Case]]
    count: int = 0
    licence: str = ""
    citation: str = ""
    page: str = ""
    archives: tuple[str, ...] = ()
    access: str = "free, no registration"
    others: tuple[tuple[str, ...], ...] = ()
    named: bool = False
    names: tuple[str, ...] = ()

    def fits(self, folder: Path) -> bool:
        """Whether `folder` is this release."""
        if self.named and folder.name.lower() not in {name.lower() for name in (self.folder, *self.names)}:
            return False
        return any(all(os.path.exists(folder / name) for name in layout) for layout in (self.holds, *self.others))


def _release(name: str, facts: dict[str, Any]) -> Release:
    """An entry of catalogue.toml: `layout` names the reader, `options` what it is told."""
    cases = partial(LAYOUTS[facts.pop("layout")], **facts.pop("options", {}))
    others = tuple(map(tuple, facts.pop("others", ())))
    rest: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in facts.items()}
    return Release(name=name, cases=cases, others=others, **rest)


CATALOGUE = {name: _release(name, facts) for name, facts in tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8")).items()}
