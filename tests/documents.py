"""What the documents contain: blocks of code, commands, links; and how each command is tested."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import NamedTuple

from tests.conftest import ROOT

PAGES = sorted(
    [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
    + [page for folder in ("docs", "data", "data/results") for page in ROOT.glob(f"{folder}/*.md")]
)
PROGRAMS = (
    r"(?:[A-Z_]+=\S+ )*(?:\.venv/bin/)?(?:make|lesionkd|papermill|python3?|torchrun|dask|pip|conda|"
    r"git|ruff|source|pre-commit|docker|export|clang|gcc|apt-get)(?: |$)"
)


class Block(NamedTuple):
    """Code in a page: its language (shell, python, text or that of its fence)."""

    page: Path
    kind: str
    text: str


def blocks(page: Path) -> list[Block]:
    """Fenced and indented code."""
    lines, found, at = page.read_text(encoding="utf-8").splitlines(), [], 0
    while at < len(lines):
        start, fence = at, re.match(r" *```(.*)$", lines[at])
        if fence:
            at = next(i for i in range(start + 1, len(lines)) if lines[i].strip() == "```") + 1
            text = textwrap.dedent("\n".join(lines[start + 1 : at - 1]))
            kind = {"bash": "shell", "sh": "shell"}.get(fence[1], fence[1] or _kind(text))
            found.append(Block(page, kind, text))
        elif lines[at].startswith("    ") and not (at and lines[at - 1].strip()):
            while at < len(lines) and (lines[at].startswith("    ") or not lines[at].strip()):
                at += 1
            text = textwrap.dedent("\n".join(lines[start:at])).strip("\n")
            found.append(Block(page, _kind(text), text))
        else:
            at += 1
    return found


def _kind(text: str) -> str:
    """The language of a block that does not say it."""
    if re.match(PROGRAMS, text):
        return "shell"
    return "python" if re.search(r"\blkd\.", text) else "text"


def commands(page: Path) -> list[str]:
    """Every command of a page, in blocks and within lines, without its comment."""
    found = [
        re.sub(r"(^|\s+)#.*$", "", line)
        for block in blocks(page)
        if block.kind == "shell"
        for line in block.text.replace("\\\n", " ").splitlines()
    ]
    found = [part for line in found for part in line.split(" && ")]
    spans = re.findall(r"`([^`\n]+)`", prose(page))
    found += [span for span in spans if re.match(PROGRAMS, span) and " " in span]
    return [" ".join(command.split()) for command in found if command.strip()]


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    text = re.sub(r"^( *)```.*?^ *```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    return re.sub(r"(?:(?<=\n\n)|\A)(?:    .*\n?)+", "\n", text)


def links(page: Path) -> list[str]:
    """Targets of links and pictures inside the project."""
    targets = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", prose(page)))
    return [target for target in targets if not re.match(r"[a-z]+:", target)]


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.M)
    plain = (re.sub(r"[^\w\- ]", "", heading.lower()).strip() for heading in headings)
    return {heading.replace(" ", "-") for heading in plain}
