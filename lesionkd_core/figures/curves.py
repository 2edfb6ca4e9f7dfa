"""What happens in training: losses, validation Dice, who pulls how hard, and the choice of weights."""

from __future__ import annotations

import re

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..statistics.arms import in_order
from .style import ONE_COLUMN, TWO_COLUMNS, Look, charts, key, legend, legend_height, look_of, named, need, nothing, on, parts, style, typeset, whole_numbers

OWN = ("alone", "feat", "edge", "method", "shuffled", "method_kd")


def training_curves(histories: dict[str, pd.DataFrame], losses: dict[str, str]) -> Figure:
    """Validation Dice of each run, and the named losses of the last one, over epochs."""
    with style():
        fig, (left, right) = plt.subplots(1, 2, figsize=(TWO_COLUMNS, 2.2))
        for name, history in histories.items():
            label, colour, _, line = look_of(name)
            left.plot(history["epoch"], history["val_dice"], linestyle=line, color=colour, label=label)
        left.set(xlabel="Epoch", ylabel="Validation Dice", ylim=(0, 1))
        left.legend()
        history = list(histories.values())[-1]
        for (column, label), line in zip(losses.items(), ("-", "--", "-.", ":")):
            right.plot(history["epoch"], history[column], line, label=typeset(label))
        right.set(xlabel="Epoch", ylabel="Loss before its weight", yscale="log")
        whole_numbers((left, right))
        right.legend()
    fig.set_label(f"Left, validation Dice by epoch of {named(histories)}. Right, losses of the last: {', '.join(losses.values())}.")
    return fig


def learning_curves(curves: pd.DataFrame) -> Figure:
    """Validation Dice of every arm by epoch: mean over seeds as a line, their range as a band; one chart a data set and teacher.

    Over six arms share two charts: the method's own, and its rivals between the student alone and the method.

    Parameters
    ----------
    curves : DataFrame
        From `statistics.learning_curves`.
    """
    need(curves, "arm", "epoch", "mean", "low", "high")
    found, arms = list(parts(curves)), in_order(curves)
    own = [arm for arm in arms if arm in OWN]
    sheets = [arms] if len(arms) <= 6 else [own, [arm for arm in arms if arm not in own or arm in ("alone", "method")]]
    with style():
        if not arms:
            return nothing("no run has finished an epoch")
        keys = {look_of(arm).label: key(look_of(arm)) for arm in arms}
        fig, axes = charts(len(sheets) * len(found), 1.9, keys, columns=3 if len(found) > 2 else 2, sharey=True)
        for i, axis in enumerate(axes):
            (name, part), sheet = found[i % len(found)], sheets[i // len(found)]
            for place, arm in enumerate(sheet):
                curve = part[part["arm"] == arm]
                _band(axis, curve["epoch"], curve, arm, look_of(arm), place / len(sheet))
            axis.set_xlabel(f"Epoch\n{name}".strip())
            if (spec := axis.get_subplotspec()) and spec.is_first_col():
                axis.set_ylabel("Validation Dice")
        whole_numbers(axes)
        legend(fig, keys)
    fig.set_label(f"Validation Dice by epoch{on(name for name, _ in found)}, mean and range of the seeds: {named(arms)}.")
    return fig


def _band(axis: Axes, x: pd.Series, table: pd.DataFrame, name: str, look: Look, shift: float, marks: int = 5) -> None:
    """Columns mean, low, high over x; markers are shifted, so that curves do not hide each other's."""
    step = max(1, len(x) // marks)
    axis.plot(
        x, table["mean"], linestyle=look.line, color=look.colour, marker=look.marker, markevery=(int(shift * step), step), label=name,
        zorder=2.5 if name == "method" else 2,
    )
    if (table["high"] > table["low"]).any():
        axis.fill_between(x, table["low"], table["high"], color=look.colour, alpha=0.15, linewidth=0)


def gradients(history: pd.DataFrame) -> Figure:
    """What every weighted term asks of the layers that all terms of its arm reach: above the norm of its gradient, below its cosine with L_seg's.

    Mean over seeds as a line, their range as a band; one column an arm, up to four abreast.

    Parameters
    ----------
    history : DataFrame
        Columns epoch, grad_TERM and cos_TERM of runs' histories; arm, seed and those of `statistics.FAMILY` where there are several.
    """
    need(history, "epoch", "grad_seg")
    taken = [name for name in history if name.startswith(("grad_", "cos_")) and history[name].notna().any()]
    terms = list(dict.fromkeys(name.partition("_")[2] for name in taken))  # 'feat_edge' is the cosine of two terms
    history = history if "arm" in history else history.assign(arm="")
    found = [(", ".join(filter(None, (look_of(arm).label, name))), part[part["arm"] == arm]) for name, part in parts(history) for arm in in_order(part)]
    with style():
        if not found:
            return nothing("no run has finished an epoch")
        across, blocks = min(4, len(found)), -(-len(found) // 4)
        width = TWO_COLUMNS if across > 1 else ONE_COLUMN
        keys = {_term(term).label: key(_term(term)) for term in terms}
        size = (width, 2.9 * blocks + legend_height(keys, width))
        fig, axes = plt.subplots(2 * blocks, across, squeeze=False, sharex=True, sharey="row", figsize=size)
        for axis in axes.flat:
            axis.set_visible(False)
        for i, (name, part) in enumerate(found):
            block, column = divmod(i, 4)
            _pull(axes[2 * block, column], axes[2 * block + 1, column], part, terms, name)
        for norms, cosines in zip(axes[::2, 0], axes[1::2, 0]):
            norms.set(ylabel="Norm of gradient")
            cosines.set(ylabel=typeset("Cosine with L_seg") if not any("_" in term for term in terms) else "Cosine", ylim=(-1.05, 1.05))
        whole_numbers(axes.flat)
        legend(fig, keys)
    shown = ", ".join(f"L_{term}" for term in terms if "_" not in term)
    where = on(name for name, _ in parts(history))
    fig.set_label(f"Gradients by epoch{where}: norms of {shown}, cosines with L_seg and between terms; {named(filter(None, in_order(history))) or 'one run'}.")
    return fig


def _pull(norms: Axes, cosines: Axes, history: pd.DataFrame, terms: list[str], name: str) -> None:
    """One arm's terms: norms of their gradients, and cosines."""
    for axis, measure in ((norms, "grad"), (cosines, "cos")):
        axis.set_visible(True)
        for i, term in enumerate(terms):
            column = f"{measure}_{term}"
            if column in history and history[column].notna().any():
                over_seeds = history.groupby("epoch")[column].agg(mean="mean", low="min", high="max").reset_index()
                _band(axis, over_seeds["epoch"], over_seeds, term, _term(term), i / len(terms))
    if history.filter(regex="^grad_").gt(0).any(axis=None):
        norms.set_yscale("log")
    cosines.axhline(0, color="black", linewidth=0.6)
    cosines.tick_params(labelbottom=True)
    cosines.set_xlabel(f"Epoch\n{name}".strip())


def _term(name: str) -> Look:
    """A loss term is drawn as the arm that has it alone; two of them, by the cosine between them."""
    if "_" in name:
        return Look(typeset(" with ".join(f"L_{term}" for term in name.split("_"))), "#000000", "x", ":")
    return Look(typeset("L_seg"), "#000000", ".", "-") if name == "seg" else look_of(name)._replace(label=look_of(name).label.removeprefix("+ "))


def weight_sweep(table: pd.DataFrame, defaults: dict[str, float] | None = None) -> Figure:
    """Validation Dice against a term's weight, a chart an arm (and data set and teacher); beneath, the student alone with the range of its seeds.

    Mean over seeds as a line, seeds as small points, a ring around the best weight, a dotted line at the arm's default.

    Parameters
    ----------
    table : DataFrame
        Columns arm, weight (of the term that the arm's line varies; without meaning for `alone`), val_dice; seed and those of
        `statistics.FAMILY` where there are several.
    defaults : {arm: weight}, optional
        Weights to mark.
    """
    need(table, "arm", "weight", "val_dice")
    chosen = defaults or {}
    found = [(name, part, arm) for name, part in parts(table) for arm in in_order(part, without="alone")]
    with style():
        if not found:
            return nothing("no weight has been tried")
        alone = look_of("alone")
        fig, axes = charts(len(found), 1.45, {alone.label: key(alone._replace(marker=""))}, columns=4, sharey=True)
        for axis, (name, part, arm) in zip(axes, found):
            dice = part.loc[part["arm"] == "alone", "val_dice"]
            if dice.notna().any():
                axis.axhline(dice.mean(), color=alone.colour, linestyle=alone.line, label="alone")
                axis.axhspan(dice.min(), dice.max(), color=alone.colour, alpha=0.15, linewidth=0)
            _tried(axis, part[(part["arm"] == arm) & (part["weight"] > 0)], arm)
            if arm in chosen:
                axis.axvline(chosen[arm], color="black", linestyle=":", linewidth=0.8, label="default")
            axis.set(xscale="log", xlabel="\n".join(filter(None, ("weight of", look_of(arm).label, name))))
        for axis in axes[::4]:
            axis.set_ylabel("Validation Dice")
        legend(fig, {alone.label: key(alone._replace(marker=""))})
    where = on(name for name, _ in parts(table))
    fig.set_label(f"Validation Dice against the weight of the term{where}, seeds as points, the best ringed: {named(in_order(table))}.")
    return fig


def _tried(axis: Axes, part: pd.DataFrame, arm: str) -> None:
    _, colour, marker, _ = look_of(arm)
    means = part.groupby("weight")["val_dice"].mean().dropna()
    if means.empty:
        return
    axis.plot(part["weight"], part["val_dice"], ".", color=colour, markersize=2.5, alpha=0.6)
    axis.plot(means.index, means, color=colour, marker=marker, label=arm)
    axis.plot(means.idxmax(), means.max(), "o", color=colour, markerfacecolor="none", markersize=9, markeredgewidth=0.8)


def option_sweep(table: pd.DataFrame) -> Figure:
    """Validation Dice of the method with one option changed at a time, a row a value: seeds as points, their mean as a diamond.

    Filled diamonds are values of the configuration itself. Lines and bands: mean and range of the seeds of the method as
    configured and of the student alone; one chart a data set.

    Parameters
    ----------
    table : DataFrame
        From `sweep_options`.
    """
    need(table, "option", "value", "seed", "val_dice")
    tried = table.loc[table["option"] != "arm", ["option", "value"]].drop_duplicates()
    with style():
        if tried.empty:
            return nothing("no option has been tried")
        rows = list(tried.itertuples(index=False, name=None))
        found, keys = list(parts(table)), {look_of(arm).label: key(look_of(arm)._replace(marker="")) for arm in ("alone", "method")}
        fig, axes = charts(len(found), 0.17 * len(rows) + 0.5, keys, columns=2, narrow=0, sharey=True)
        for axis, (name, part) in zip(axes, found):
            by_row = {at: chosen.set_index("seed")["val_dice"] for at, chosen in part.groupby(["option", "value"])}
            for arm in ("alone", "method"):
                dice = by_row[("arm", arm)]
                axis.axvline(dice.mean(), color=look_of(arm).colour, linestyle=look_of(arm).line)
                axis.axvspan(dice.min(), dice.max(), color=look_of(arm).colour, alpha=0.12, linewidth=0)
            for y, row in enumerate(rows):
                if row in by_row:
                    _tried_value(axis, y, by_row[row], by_row[row].equals(by_row[("arm", "method")]))
            axis.set(xlabel=f"Validation Dice\n{name}".strip(), yticks=range(len(rows)), yticklabels=[f"{option}: {_short(value)}" for option, value in rows])
            axis.margins(y=0.02)
            axis.label_outer()
        axes[0].invert_yaxis()
        legend(fig, keys)
    shown = "; ".join(f"{option}: {', '.join(_short(value) for value in part['value'])}" for option, part in tried.groupby("option", sort=False))
    fig.set_label(f"Validation Dice of the method{on(name for name, _ in found)} with one option changed at a time, seeds as points: {shown}.")
    return fig


def _tried_value(axis: Axes, y: float, dice: pd.Series, own: bool) -> None:
    look = look_of("method")
    axis.plot(dice, [y] * len(dice), ".", color="black", markersize=3)
    axis.plot(dice.mean(), y, look.marker, color=look.colour, markerfacecolor=look.colour if own else "white", markersize=4.5)


def _short(value: str) -> str:
    """'decoder.stride4, decoder.stride2' as 'decoder 4, 2'."""
    halves: dict[str, list[str]] = {}
    for half, stride in re.findall(r"(\w+)\.stride(\d+)", value):
        halves.setdefault(half, []).append(stride)
    return "; ".join(f"{half} {', '.join(strides)}" for half, strides in halves.items()) or value
