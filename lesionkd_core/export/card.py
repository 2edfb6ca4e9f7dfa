"""The model card: what the student was trained on, how good it is, what it is for and what not."""

from __future__ import annotations

import re

import pandas as pd

from ..config import DistillConfig
from ..inference import TrainedNetwork
from ..provenance import CHECKOUT
from ..store import Result

INTENDED = "Research on small segmentation networks: comparing, measuring and demonstrating them on devices."
LIMITS = (
    "Not a medical device; not for diagnosis, screening or treatment. It finds what looks like its training images: other cameras, scanners, skin "
    "tones, organs and populations were not tested unless a table says so. It always gives a mask, also where there is no lesion to find."
)
PATENT = "The method is the subject of a patent application (Zhejiang University of Technology, 2021); ask for the rights before commercial use."


def licence_of(dataset: str) -> str:
    """The licence line of the data set's card in data/, or that none is known."""
    card = CHECKOUT / "data" / f"{dataset.partition('-')[0] if dataset.startswith('phantom') else dataset}.md"
    found = re.search(r"^\| Licence \| (.+) \|$", card.read_text(encoding="utf-8"), re.M) if card.is_file() else None
    if found:
        return found[1]
    return "synthetic images of this project" if dataset.startswith("phantom") else "the data's own; state it before you pass the model on"


def facts(student: TrainedNetwork) -> list[str]:
    """Data, scores and limits, a paragraph each, plain text."""
    cfg, test = student.cfg, Result(student.path).summary["test"]
    dice = test["dice"]
    assert isinstance(cfg, DistillConfig)
    trained = f"with the terms {', '.join(cfg.terms)} from a {cfg.teacher} teacher" if cfg.terms else "without a teacher"
    return [
        f"A U-Net of width {cfg.width} with {sum(p.numel() for p in student.network.parameters()):,} parameters, trained {trained} "
        f"on {cfg.dataset_name} at {cfg.pixels} px (profile {cfg.profile}, seed {cfg.seed}).",
        f"On {test['cases']} test cases that it never saw, at threshold 0.5: Dice {dice['mean']:.3f} (95 % interval {dice['low']:.3f} to {dice['high']:.3f}), "
        f"{test['missed']} of {test['lesions']} lesions missed entirely, {test['false_alarms']} false alarms on images without a lesion.",
        f"Licence of the training data: {licence_of(cfg.dataset_name)}.",
        INTENDED, LIMITS, PATENT,
    ]


def model_card(student: TrainedNetwork, parity: pd.DataFrame, threshold: float) -> str:
    """Markdown, with the parity of every file."""
    made, scores, licence, intended, limits, patent = facts(student)
    columns = ["file", "engine", "precision", "pixels", "cases", "max_difference", "flipped", "dice_to_reference", "dice", "dice_reference"]
    test = Result(student.path).summary["test"]
    metrics = {m: v for m, v in test.items() if isinstance(v, dict) and v.get("mean") is not None and "low" in v}
    scored = pd.DataFrame([{"metric": m, "mean": v["mean"], "low": v["low"], "high": v["high"]} for m, v in metrics.items()])
    return "\n\n".join([
        f"# Model card: {student.path.name}", made,
        "## Scores", scores,
        f"Masks at threshold 0.5; means over test cases with 95 % intervals (bootstrap over groups). The page and model.json start at {threshold}.",
        scored.to_markdown(index=False, floatfmt=".3f"),
        "## The same model in every file", "Against PyTorch in float32, on test cases:", parity[columns].to_markdown(index=False, floatfmt=".4f"),
        "## Intended use", intended, "## Limits", limits, "## Data and rights", licence, patent,
    ]) + "\n"
