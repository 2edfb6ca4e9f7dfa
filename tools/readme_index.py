"""Writes what is generated in the documents: python -m tools.readme_index

Tables of README.md and of three pages in docs/ are between two comments that name a function of
this module; docs/options.md is generated as a whole.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import pandas as pd

from lesionkd_core import results
from lesionkd_core.analysis import statistics, tables
from lesionkd_core.results import CHECKOUT
from tools.option_reference import option_reference

PAGES = [CHECKOUT / "README.md"]
PAGES += [CHECKOUT / "docs" / name for name in ("results.md", "study.md", "mobile.md")]
NAMES = {
    "em-isbi2012": "EM (inside of cells)",
    "busi": "breast ultrasound (BUSI)",
    "cvc-clinicdb": "colonoscopy (CVC-ClinicDB)",
    "kvasir-seg": "colonoscopy (Kvasir-SEG)",
    "isic2018": "skin (ISIC 2018)",
    "bus-bra": "breast ultrasound (BUS-BRA)",
    "ham10000": "skin (HAM10000)",
}
ARMS = ["teacher", "alone", "longest", "feat", "method"]
CLINICS = {"kvasir-seg": "own clinic", "cvc-half-b": "other clinic"}


def study() -> pd.DataFrame:
    """Test cases of the committed study, with the default segmentation loss."""
    return tables.study().query("seg_loss == 'bce_dice'")


def name_of(setting: dict[str, object]) -> str:
    """A data set in words; of an external test where the student was trained."""
    trained, tested = str(setting["dataset"]), str(setting["test_dataset"])
    if trained == tested:
        return NAMES[trained]
    return f"{NAMES[tested]}, trained on {NAMES[trained]}"


def scores() -> pd.DataFrame:
    """One row for each data set: Dice of teacher and students on test images."""
    rows = []
    means = statistics.means(study())
    for _, part in means.groupby(["dataset", "test_dataset"], sort=False):
        dice = part.set_index("arm")["dice"]
        first = part.iloc[0]
        row = {"test images": f"{name_of(first.to_dict())}, {first['pixels']} px"}
        row["cases (groups)"] = f"{first['cases']} ({first['groups']})"
        lengths = {
            arm: statistics.split_arm(arm)[1] for arm in dice.index if arm.startswith("alone")
        }
        longest = max(lengths, key=lengths.__getitem__)
        for arm in ARMS:
            known = longest if arm == "longest" else arm
            label = "alone, longer" if arm == "longest" else tables.label(arm).removeprefix("+ ")
            row[label] = f"{dice[known]:.3f}" if known in dice else ""
        rows.append(row)
    return pd.DataFrame(rows)


def gains() -> pd.DataFrame:
    """Every arm minus the student alone: difference, both intervals, p and verdict."""
    arms = ("feat", "method", "cwd", "sobel", "alone_long", "alone*2", "alone*4")
    return differences(statistics.compare_with(study(), "alone", arms=arms))


def polyps() -> pd.DataFrame:
    """Kvasir-SEG: arms minus the student alone, on its own test images and another clinic's."""
    compared = statistics.compare_with(study().query("dataset == 'kvasir-seg'"), "alone")
    rows = []
    for arm, part in compared.groupby("arm", sort=False):
        gained = part.set_index("test_dataset").to_dict("index")
        row = {"student": tables.label(arm)}
        for dataset, where in (("kvasir-seg", "own clinic"), ("cvc-clinicdb", "CVC-ClinicDB")):
            row[where] = gain(gained[dataset])
        rows.append(row)
    return pd.DataFrame(rows)


def gain(one: dict[str, object]) -> str:
    """A row of `statistics.compare` in words."""
    interval = f"({one['low']:+.3f} to {one['high']:+.3f})"
    return f"{one['difference']:+.3f} {interval}, {one['verdict']}"


def few() -> pd.DataFrame:
    """Kvasir-SEG with a tenth of the masks: Dice, and taught minus alone of the same length."""
    table = tables.study("few_masks")
    places = {"kvasir-seg": "own clinic", "cvc-clinicdb": "CVC-ClinicDB"}
    return with_gains(dice_of(table, places), table.query("arm != 'same'"), places)


def with_gains(
    rows: Iterator[tuple[dict[str, object], str]], table: pd.DataFrame, places: dict[str, str]
) -> pd.DataFrame:
    """Rows of `dice_of` with the gains over the student alone of the same length.

    Arms with fewer trainings than the student alone have none.
    """
    trainings = table.groupby("arm")["seed"].transform("nunique")
    table = table[trainings >= table.loc[table["arm"] == "alone", "seed"].nunique()]
    lengths = table["arm"].map(statistics.split_arm)
    students = table.assign(arm=lengths.str[0], budget=lengths.str[1])
    compared = statistics.compare_with(students, "alone")
    gains = compared.set_index(["test_dataset", "arm", "budget"]).to_dict("index")
    made = []
    for row, arm in rows:
        for dataset, where in places.items():
            one = gains.get((dataset, *statistics.split_arm(arm)))
            row[f"{where}, minus alone of that length"] = gain(one) if one else ""
        made.append(row)
    return pd.DataFrame(made)


def teachers() -> pd.DataFrame:
    """Teachers with ImageNet weights beside students alone: is there something to teach?"""
    rows = []
    shown = tables.committed("teachers").query("arm in ('teacher', 'alone*2')")
    for one in shown.to_dict("records"):
        row = {"trained on": NAMES[one["dataset"]], "network": tables.label(one["arm"])}
        row["validation"] = f"{one['val_dice']:.3f}"
        for split, where in (("test", "own test images"), ("external", "elsewhere")):
            score = {"mean": one[f"{split}_dice"]}
            score |= {name: one[f"{split}_{name}"] for name in ("low", "high")}
            row[where] = results.with_interval(score)
        row["elsewhere"] += f", {NAMES[one['external']]}"
        rows.append(row)
    return pd.DataFrame(rows)


def recipes() -> pd.DataFrame:
    """Students of Kvasir-SEG on its test images and on half of another clinic's."""
    return pd.DataFrame([row for row, _ in with_passes()])


def with_passes() -> Iterator[tuple[dict[str, object], str]]:
    """Rows of `dice_of` for `recipes`, with the passes of each student."""
    for row, arm in dice_of(tables.study("recipes"), CLINICS):
        seen = "" if arm == statistics.TEACHER else f"{passes(arm):.1f}"
        network, trainings = row.pop("network"), row.pop("trainings")
        yield {"network": network, "trainings": trainings, "passes": seen} | row, arm


def unlabelled() -> pd.DataFrame:
    """Of `recipes` the students that saw the other clinic, those alone, and the teacher."""
    shown = (
        (row, arm)
        for row, arm in with_passes()
        if arm == statistics.TEACHER or "+" in arm or arm.startswith("alone")
    )
    return with_gains(shown, tables.study("recipes"), CLINICS)


def advice() -> pd.DataFrame:
    """What each recipe gains over the student alone of 45 epochs, and hours of one core."""
    table = tables.study("recipes")
    seconds = tables.committed("training_cost").set_index("arm")["cpu_seconds"]  # of an epoch
    dice = statistics.means(table).set_index(["test_dataset", "arm"])["dice"]
    rows = []
    for arm in statistics.in_order(table, without=statistics.TEACHER):
        base, times = statistics.split_arm(arm)
        if base.startswith("alone"):
            spent = 45 * passes(arm) * seconds["alone"]
        else:
            spent = 45 * times * seconds[base] + 24 * seconds["teacher"]
        if base == "method":
            spent += 10 * seconds["graph"]
        row: dict[str, object] = {"recipe": tables.label(arm)}
        for dataset, where in CLINICS.items():
            row[where] = f"{dice[dataset, arm] - dice[dataset, 'alone']:+.3f}"
        row["trainings"] = table.loc[table["arm"] == arm, "seed"].nunique()
        rows.append(row | {"hours": f"{spent / 3600:.2f}"})
    return pd.DataFrame(rows)


def dice_of(table: pd.DataFrame, places: dict[str, str]) -> Iterator[tuple[dict[str, object], str]]:
    """A row for each arm with its Dice on the data sets of `places`, and the arm."""
    means = statistics.means(table).set_index(["test_dataset", "arm"])
    for arm in [statistics.TEACHER, *statistics.in_order(table, without=statistics.TEACHER)]:
        row = {"network": tables.label(arm), "trainings": means.loc[("kvasir-seg", arm), "seeds"]}
        for dataset, where in places.items():
            dice = means.loc[(dataset, arm)].rename({"dice": "mean"}).to_dict()
            row[where] = results.with_interval(dice)
        yield row, arm


def passes(arm: str) -> float:
    """Images that a student of Kvasir-SEG was trained on, in units of the student alone's.

    Of a batch with images without masks as many with masks are seen.
    """
    both = 953 / 651  # with half of CVC-ClinicDB
    times = statistics.split_arm(arm)[1]
    return times * (2 * both if "unlabelled" in arm else both if "masks" in arm else 1)


def rivals() -> pd.DataFrame:
    """Tiny networks without a teacher on Kvasir-SEG: mean Dice, smallest and largest training."""
    rows = []
    for network, part in tables.committed("rivals").groupby("network", sort=False):
        first = part.iloc[0]
        row = {"network": network, "parameters": f"{first['parameters']:,}"}
        row |= {"time": f"{first['time_ratio_96px']:.1f}", "trainings": str(len(part))}
        for dataset, where in (("kvasir-seg", "own clinic"), ("cvc-clinicdb", "CVC-ClinicDB")):
            dice = part[f"{dataset} dice"]
            span = f" ({dice.min():.3f} to {dice.max():.3f})" if len(part) > 1 else ""
            row[where] = f"{dice.mean():.3f}{span}"
        rows.append(row)
    return pd.DataFrame(rows)


def edges() -> pd.DataFrame:
    """The method minus the same with the edges of other images."""
    main = statistics.compare_arms(study())
    heavy = statistics.compare_arms(tables.study("edges"), "feat+edge=3")
    return differences(pd.concat([main[main["other"] == "shuffled"], heavy]))


def sobel() -> pd.DataFrame:
    """EM membranes: the Sobel term on masks, without a teacher, minus the student alone."""
    return differences(statistics.compare_with(tables.study("sobel"), "alone"))


def labels() -> pd.DataFrame:
    """BUSI: gains over the student alone by epochs and fraction of the masks."""
    helped = tables.study("when_teacher_helps")
    compared = statistics.compare_with(helped, "alone", arms=("feat", "method", "cwd"))
    rows = []
    for row in compared.to_dict("records"):
        setting = f"{row['labels']:.0%}, {row['budget']:.0f} epochs"
        same = "the same masks" if "same masks" in row["teacher"] else "all masks"
        rows.append(
            {"student's masks": setting, "teacher's masks": same, "arm": tables.label(row["arm"])}
            | interval_of(row)
        )
    return pd.DataFrame(rows)


def differences(compared: pd.DataFrame) -> pd.DataFrame:
    """Rows of `statistics.compare` for a page."""
    rows = []
    for row in compared.to_dict("records"):
        arm = {"test images": name_of(row), "arm": tables.label(row["arm"])}
        rows.append(arm | interval_of(row))
    return pd.DataFrame(rows)


def interval_of(row: dict[str, float]) -> dict[str, str]:
    """Difference, intervals and verdict of a comparison."""
    return {
        "gain in Dice": f"{row['difference']:+.3f}",
        "95 % interval": f"{row['low']:+.3f} to {row['high']:+.3f}",
        "trainings": f"{row['t_low']:+.3f} to {row['t_high']:+.3f}",
        "p (Holm)": f"{row['p_holm']:.2g}",
        "verdict": str(row["verdict"]),
    }


def ratios() -> pd.DataFrame:
    """Dice of a student divided by that of its teacher."""
    main = study()
    found = [statistics.accuracy_ratio(main, arm) for arm in ("alone", "feat", "method")]
    rows = []
    for row in pd.concat(found).to_dict("records"):
        part = {"test images": name_of(row), "arm": tables.label(row["arm"])}
        part["Dice / teacher's"] = f"{row['ratio']:.1%} ({row['low']:.1%} to {row['high']:.1%})"
        rows.append(part)
    return pd.DataFrame(rows)


def cost() -> pd.DataFrame:
    """Milliseconds of each network in its fastest engine on one core."""
    measured = tables.committed("cost").query("precision == 'float32'")
    best = measured.groupby(["pixels", "model"])["latency_ms_median"].min().unstack()
    rows = []
    for pixels, row in best.iterrows():
        times = {"image side": f"{pixels} px"}
        for model in ("unet64", "resnet34_unet", "student"):
            times[tables.label(model)] = milliseconds(row[model])
        times["U-Net 64 / student"] = f"{row['unet64'] / row['student']:.0f}"
        rows.append(times)
    return pd.DataFrame(rows)


def milliseconds(value: float) -> str:
    """Three digits."""
    return f"{value:.0f} ms" if value >= 100 else f"{value:.3g} ms"


def engines() -> pd.DataFrame:
    """The student in every engine and precision: milliseconds by image side, share of peak."""
    student = tables.committed("cost").query("model == 'student'")
    rows = []
    for (engine, precision), part in student.groupby(["engine", "precision"], sort=False):
        row = {"engine": f"{engine}, {precision}"}
        for one in part.itertuples():
            row[f"{one.pixels} px"] = milliseconds(one.latency_ms_median)
        row["share of peak"] = (
            f"{part['share_of_peak'].min():.0%} to {part['share_of_peak'].max():.0%}"
        )
        rows.append(row)
    return pd.DataFrame(rows)


BLOCKS: dict[str, Callable[[], pd.DataFrame]] = {
    "scores": scores,
    "gains": gains,
    "polyps": polyps,
    "few": few,
    "sobel": sobel,
    "teachers": teachers,
    "recipes": recipes,
    "unlabelled": unlabelled,
    "advice": advice,
    "rivals": rivals,
    "edges": edges,
    "labels": labels,
    "ratios": ratios,
    "cost": cost,
    "engines": engines,
}
"""Generated tables by name."""


def with_tables(text: str) -> str:
    """A page with its tables made again."""

    def made(block: re.Match[str]) -> str:
        table = BLOCKS[block[1]]().to_markdown(index=False, disable_numparse=True)
        lines = [re.sub(" {2,}", " ", line) for line in table.splitlines()]
        lines[1] = re.sub(r":?-+:?", "---", lines[1])
        return f"<!-- table: {block[1]} -->\n" + "\n".join(lines) + "\n<!-- end -->"

    return re.sub(r"<!-- table: (\w+) -->\n.*?<!-- end -->", made, text, flags=re.S)


def main() -> None:
    """Write all."""
    for page in PAGES:
        page.write_text(with_tables(page.read_text(encoding="utf-8")), encoding="utf-8")
    (CHECKOUT / "docs" / "options.md").write_text(option_reference(), encoding="utf-8")


if __name__ == "__main__":
    main()
