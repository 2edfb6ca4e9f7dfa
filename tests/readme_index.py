"""What the README says of notebooks and of the study, the option reference and the figure of the method: `python -m tests.readme_index`."""

from pathlib import Path

import nbformat

from tests import draw_method
from tests.option_reference import option_reference

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- notebooks: made by `make notebooks` -->", "<!-- end of notebooks -->"
STUDY = "<!-- study: made from data/results by `make notebooks` -->", "<!-- end of study -->"
PAIRS = "<!-- comparisons: made from data/results by `make notebooks` -->", "<!-- end of comparisons -->"
TOUR = "<!-- tour: made from the notebooks' outputs by `make notebooks` -->", "<!-- end of tour -->"
TELLING = {  # how the lines begin that the tour shows
    "01_data_prep": ("kept ", "groups disjoint", "Otsu on test cases"),
    "02_edge_labels": ("edge, 1:1",),
    "04_distill": ("Dice on test cases", "parameters"),
}


def index() -> str:
    """One row a notebook: its title, linked, and its first sentence."""
    rows = ["| notebook | what it does |", "|---|---|"]
    for path in sorted((ROOT / "notebooks").glob("0*.ipynb")):
        title, text = nbformat.read(path, as_version=4).cells[0].source.split("\n", 1)
        rows.append(f"| [{title.removeprefix('# ')}](notebooks/{path.name}) | {text.strip()} |")
    return "\n".join(rows)


def study() -> str:
    """Tables of the committed study: every arm, and the method against every other; its share of U-Net 64."""
    import lesionkd_core as lkd

    scored = lkd.tables.study()
    shown = lkd.tables.study_scores(scored), lkd.tables.study_differences(lkd.compare_arms(scored))
    return "\n\n".join([*(table.to_markdown(index=False) for table in shown), lkd.tables.in_words(lkd.accuracy_ratio(scored))])


def comparisons() -> str:
    """The same differences in a sentence each."""
    import lesionkd_core as lkd

    return lkd.tables.in_words(lkd.compare_arms(lkd.tables.study()))


def tour() -> str:
    """What the notebooks of the tour print, as it is committed."""
    rows = ["| notebook | what it prints |", "|---|---|"]
    for stem, beginnings in TELLING.items():
        cells = nbformat.read(ROOT / "notebooks" / f"{stem}.ipynb", as_version=4).cells
        printed = [line for cell in cells for output in cell.get("outputs", []) for line in output.get("text", "").splitlines()]
        rows += [f"| {stem[:2]} | `{next(line for line in printed if line.startswith(beginning))}` |" for beginning in beginnings]
    return "\n".join(rows)


MADE = {"README.md": {(BEGIN, END): index, TOUR: tour, STUDY: study}, "docs/results.md": {PAIRS: comparisons}}


def made_anew(page: str) -> str:
    """The text of a page with these parts made anew."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for (begin, end), make in MADE[page].items():
        before, rest = text.split(begin)
        text = f"{before}{begin}\n{make()}\n{end}{rest.split(end)[1]}"
    return text


if __name__ == "__main__":
    for page in MADE:
        (ROOT / page).write_text(made_anew(page), encoding="utf-8")
    (ROOT / "docs" / "options.md").write_text(option_reference(), encoding="utf-8")
    draw_method.save(ROOT / "docs" / "method.svg")
