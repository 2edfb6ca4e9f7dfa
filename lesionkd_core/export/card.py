"""The model card of a student: data, scores, limits, licence."""

from __future__ import annotations

import re

import pandas as pd

from .. import results
from ..config import DistillConfig
from ..evaluate import SURFACE_TOLERANCE
from ..losses import needs_teacher
from ..models import parameter_count
from ..predict import TrainedNetwork

INTENDED = (
    "Research: comparing, measuring and demonstrating small segmentation networks on devices."
)
LIMITS = (
    "Not a medical device; not for diagnosis, screening or treatment. It finds what resembles its "
    "training images. Other cameras, scanners, skin tones, organs and populations were not tested "
    "unless a table says so. It also returns a mask where there is no lesion."
)
PATENT = (
    "The method is the subject of a patent application (Zhejiang University of Technology, 2021); "
    "obtain a licence before commercial use."
)


def licence_of(dataset: str) -> str:
    """The licence in the data set's card in data/, or a note that it is not known."""
    card = results.CHECKOUT / "data" / f"{dataset}.md"
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    found = re.search(r"^\| Licence \| (.+) \|$", text, re.M)
    return found[1] if found else "not known; state it before you pass the model on"


def facts(student: TrainedNetwork) -> list[str]:
    """Training, scores, licence, use, limits and rights: six paragraphs of plain text."""
    cfg, test = student.cfg, student.summary["test"]
    assert isinstance(cfg, DistillConfig)
    kind = f"U-Net of width {cfg.width}" if cfg.student == "unet" else f"network {cfg.student}"
    how = f"with {', '.join(cfg.terms)}" if cfg.terms else "alone"
    how += f" from the teacher {cfg.teacher}" if needs_teacher(cfg.terms) else ""
    groups = f"{test['groups']} group{'s' * (test['groups'] != 1)}"
    dice, empty = test["dice"], test["cases"] - test["lesions"]
    alarms = f", {test['false_alarms']} false alarms on {empty} images without a lesion"
    return [
        f"A {kind} with {parameter_count(student.network):,} parameters, "
        f"trained {how} on {cfg.dataset_name} at {cfg.pixels} px (profile {cfg.profile}, seed "
        f"{cfg.seed}).",
        f"On {test['cases']} test cases in {groups}, at threshold 0.5: Dice (95 % "
        f"interval) {results.with_interval(dice)}, {test['missed']} of {test['lesions']} lesions "
        f"missed{alarms if empty else ''}.",
        f"Licence of the training data: {licence_of(cfg.dataset_name)}.",
        INTENDED,
        LIMITS,
        PATENT,
    ]


def model_card(student: TrainedNetwork, about: list[str]) -> str:
    """The model card in Markdown."""
    made, scores, licence, intended, limits, patent = about
    test, pixels = student.summary["test"], student.cfg.pixels
    metrics = {n: v for n, v in test.items() if isinstance(v, dict) and v.get("mean") is not None}
    rows = [{"metric": n, "mean": results.with_interval(v)} for n, v in metrics.items()]
    scored = pd.DataFrame(rows)
    intervals = (
        "Means over test cases with 95 % intervals (bootstrap over groups), at threshold 0.5. hd95 "
        f"is in pixels of the image of {pixels} px; surface_dice allows "
        f"{SURFACE_TOLERANCE:g} of them."
    )
    parts = [f"# Model card: {student.path.stem}", made, "## Scores", scores, intervals]
    parts += [scored.to_markdown(index=False, disable_numparse=True)]
    parts += ["## Intended use", intended, "## Limits", limits, "## Data and rights"]
    return "\n\n".join([*parts, licence, patent]) + "\n"


def published_card(student: TrainedNetwork) -> str:
    """The card beside the file of a published student, or ''."""
    file = student.path.with_suffix(".md")
    published = student.path.suffix == ".safetensors" and file.is_file()
    return file.read_text(encoding="utf-8") if published else ""


def parity_section(table: pd.DataFrame, at: float) -> str:
    """How far each exported file is from PyTorch, and the masks at threshold `at`."""
    shown = table.drop(columns="rule", errors="ignore")
    parts = [
        "\n## The same model in every file",
        f"The page and model.json use threshold {at}. Differences from PyTorch in float32:",
        shown.to_markdown(index=False, floatfmt=".4f"),
    ]
    return "\n\n".join(parts) + "\n"
