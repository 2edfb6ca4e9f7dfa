"""The README's table of notebooks, made from their first cells: `python -m tests.readme_index`."""

from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- notebooks: made by `make notebooks` -->", "<!-- end of notebooks -->"


def index() -> str:
    """One row a notebook: its title, linked, and its first sentence."""
    rows = ["| notebook | what it does |", "|---|---|"]
    for path in sorted((ROOT / "notebooks").glob("0*.ipynb")):
        title, text = nbformat.read(path, as_version=4).cells[0].source.split("\n", 1)
        rows.append(f"| [{title.removeprefix('# ')}](notebooks/{path.name}) | {text.strip()} |")
    return "\n".join(rows)


def with_index(readme: str) -> str:
    """The README with its table made anew."""
    before, rest = readme.split(BEGIN)
    return f"{before}{BEGIN}\n{index()}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(with_index(path.read_text(encoding="utf-8")), encoding="utf-8")
