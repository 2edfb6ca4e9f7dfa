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
    """Tables of the committed study: every arm, the method against each, each other against the student alone; shares of larger networks."""
    import pandas as pd

    import lesionkd_core as lkd

    scored = lkd.tables.study()
    pairs = lkd.compare_arms(scored), lkd.compare_with(scored)
    taught = scored[scored["teacher"] == "resnet34_unet"]  # U-Net 64 is there to be compared with
    shown = lkd.tables.study_scores(lkd.tables.study_means(taught)), *map(lkd.tables.study_differences, pairs)
    ratios = pd.concat([lkd.accuracy_ratio(scored, reference) for reference in ("unet64", "resnet34_unet")])
    return "\n\n".join([*(table.to_markdown(index=False) for table in shown), lkd.tables.in_words(ratios)])


def comparisons() -> str:
    """The study in a sentence for every row of its tables."""
    import pandas as pd

    import lesionkd_core as lkd

    scored, history = lkd.tables.study(), lkd.tables.study("history")
    said = {
        "The method against every other arm": lkd.compare_arms(scored),
        "Every other arm against the student alone, exploratory": lkd.compare_with(scored),
        "Small and large lesions": pd.concat([lkd.by_tertile(scored, "lesion_pixels", arm, "alone") for arm in ("method", "feat")]),
        "Missed lesions": lkd.compare_missed(scored),
        "Students and their teacher": lkd.agreement(scored),
        "How hard the terms pull": lkd.gradient_pulls(history.query("arm in ['feat', 'edge', 'method']")),
    }
    return "\n\n".join(f"### {title}\n\n{lkd.tables.in_words(table)}" for title, table in said.items())


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
