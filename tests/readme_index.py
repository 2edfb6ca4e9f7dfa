"""What the README says of notebooks and of the study, the option reference and the figure of the method: `python -m tests.readme_index`."""

from pathlib import Path

import nbformat

from tests import draw_method
from tests.option_reference import option_reference

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- notebooks: made by `make notebooks` -->", "<!-- end of notebooks -->"
STUDY = "<!-- study: made from data/results by `make notebooks` -->", "<!-- end of study -->"


def index() -> str:
    """One row a notebook: its title, linked, and its first sentence."""
    rows = ["| notebook | what it does |", "|---|---|"]
    for path in sorted((ROOT / "notebooks").glob("0*.ipynb")):
        title, text = nbformat.read(path, as_version=4).cells[0].source.split("\n", 1)
        rows.append(f"| [{title.removeprefix('# ')}](notebooks/{path.name}) | {text.strip()} |")
    return "\n".join(rows)


def study() -> str:
    """Table and sentences of the committed study."""
    import lesionkd_core as lkd

    scored = lkd.tables.study()
    words = lkd.tables.in_words(lkd.compare_arms(scored)), lkd.tables.in_words(lkd.accuracy_ratio(scored))
    return "\n\n".join([lkd.tables.study_scores(scored).to_markdown(index=False), *words])


def with_index(readme: str) -> str:
    """The README with these parts made anew."""
    for (begin, end), make in (((BEGIN, END), index), (STUDY, study)):
        before, rest = readme.split(begin)
        readme = f"{before}{begin}\n{make()}\n{end}{rest.split(end)[1]}"
    return readme


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(with_index(path.read_text(encoding="utf-8")), encoding="utf-8")
    (ROOT / "docs" / "options.md").write_text(option_reference(), encoding="utf-8")
    draw_method.save(ROOT / "docs" / "method.svg")
