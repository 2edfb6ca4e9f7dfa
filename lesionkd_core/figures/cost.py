"""What a student costs on a device, and what that buys."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, NullFormatter

from .style import NETWORKS, ONE_COLUMN, TWO_COLUMNS, Look, charts, interval, key, legend, legend_height, named, need, nothing, on, style

ENGINES = {
    "PyTorch": Look("PyTorch", "#555555", "o", ""),
    "ONNX Runtime": Look("ONNX Runtime", "#4477AA", "s", ""),
    "ExecuTorch": Look("ExecuTorch", "#117733", "^", ""),
    "browser (ONNX Runtime Web)": Look("browser", "#CC3311", "D", ""),
}


def latency(cost: pd.DataFrame) -> Figure:
    """Milliseconds an image of every network in every engine, 10th to 90th percentile; int8 hollow; a chart a size.

    Parameters
    ----------
    cost : DataFrame
        From `lkd.measure_cost`, or `lkd.tables.committed("cost")`.
    """
    need(cost, "model", "engine", "precision", "pixels", "latency_ms_median")
    if cost.empty:
        return nothing("no cost was measured")
    models, sizes = list(dict.fromkeys(cost["model"])), sorted(cost["pixels"].unique())
    keys = {look.label: key(look) for name, look in ENGINES.items() if name in set(cost["engine"])}
    keys |= {"int8": key(Look("", "#000000", "o", ""))} if "int8" in set(cost["precision"]) else {}
    with style():
        fig, axes = charts(len(sizes), 0.5 + 0.24 * len(models), keys, columns=2, sharey=True)
        for axis, size in zip(axes, sizes):
            for row in cost[cost["pixels"] == size].itertuples():
                shift = 0.12 * (1.5 - list(ENGINES).index(row.engine)) - 0.05 * (row.precision == "int8")
                y = len(models) - 1 - models.index(row.model) + shift
                interval(axis, row.latency_ms_median, y, row.latency_ms_p10, row.latency_ms_p90, ENGINES[row.engine], filled=row.precision != "int8")
            axis.set(xscale="log", xlabel=f"Latency at {size} px, one thread (ms)", ylim=(-0.5, len(models) - 0.5))
            axis.xaxis.set_major_formatter(LogFormatter(labelOnlyBase=False))
            axis.xaxis.set_minor_formatter(NullFormatter())
            axis.set_yticks(range(len(models))[::-1], [NETWORKS.get(name, name) for name in models])
        if "int8" in keys:
            keys["int8"].set_markerfacecolor("white")
        legend(fig, keys)
    shown = ", ".join(keys)
    fig.set_label(f"Latency of {named(models)} at {', '.join(map(str, sizes))} px on one thread, 10th to 90th percentile, in {shown}.")
    return fig


def pareto(points: pd.DataFrame, x: str = "macs") -> Figure:
    """Accuracy against cost: Dice with its 95 % interval over multiplications or milliseconds, a chart a data set; what nothing beats in both is joined.

    Parameters
    ----------
    points : DataFrame
        dataset, model, dice, low, high and the column `x`.
    """
    need(points, "dataset", "model", "dice", "low", "high", x)
    if points.empty:
        return nothing("no network has both a score and a cost")
    labels = {"macs": "Multiplications an image", "latency_ms_median": "Latency (ms)", "parameters": "Parameters"}
    sets = list(dict.fromkeys(points["dataset"]))
    with style():
        width = ONE_COLUMN if len(sets) == 1 else TWO_COLUMNS
        fig, axes = plt.subplots(1, len(sets), figsize=(width, 2.3 + legend_height([], width)), squeeze=False, sharey=True)
        for axis, name in zip(axes.flat, sets):
            part = points[points["dataset"] == name].sort_values([x, "dice"], ascending=[True, False])
            front = part[part["dice"].cummax().diff().fillna(1) > 0]
            axis.plot(front[x], front["dice"], color="#999999", linewidth=0.8, zorder=0)
            for row, below in zip(part.itertuples(), ~part.index.isin(front.index)):  # what another beats at no more cost is named below
                small = row.model.startswith("student")
                interval(axis, getattr(row, x), row.dice, row.low, row.high, Look("", "#33BBEE" if small else "#EE7733", "D" if small else "*", ""), along="y")
                axis.annotate(
                    NETWORKS.get(row.model, row.model), (getattr(row, x), row.dice), xytext=(4, -4 if below else 4), textcoords="offset points",
                    va="top" if below else "bottom", fontsize=6.5,
                )
            axis.set(xscale="log", xlabel=f"{labels.get(x, x)}\n{name}".strip())
            axis.margins(x=0.4, y=0.1)
        axes[0, 0].set_ylabel("Dice on test cases")
    measure = labels.get(x, x).lower()
    fig.set_label(f"Dice on test cases, with 95 % interval, against {measure}{on(sets)}: {named(dict.fromkeys(points['model']))}.")
    return fig
