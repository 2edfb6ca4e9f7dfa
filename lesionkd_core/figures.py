"""One style, one saver: figures at paper widths, byte-identical from run to run (DESIGN, Figures)."""

from __future__ import annotations

import io
from contextlib import contextmanager
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from . import store
from .evaluation import HIGHER_IS_BETTER

ONE_COLUMN, TWO_COLUMNS = 85 / 25.4, 174 / 25.4  # inches
TRUTH, TEACHER, STUDENT = "#ffffff", "#EE7733", "#33BBEE"

STYLES: dict[str, tuple[str, str, str, str]] = {  # method -> label, colour (Tol bright and vibrant), marker, line
    "alone": ("student alone", "#BBBBBB", "o", "-"),
    "feat": ("+ L_feat", "#4477AA", "s", "--"),
    "edge": ("+ L_edge", "#228833", "^", "-."),
    "method": ("+ both (method)", "#CC3311", "D", "-"),
    "shuffled": ("both, edges shuffled", "#AA3377", "v", ":"),
    "teacher": ("teacher", TEACHER, "*", "-"),
    "student": ("student", STUDENT, "D", "-"),
    "otsu": ("Otsu", "#000000", "x", ":"),
}
METRIC_LABELS = {
    "dice": "Dice", "iou": "IoU", "sensitivity": "Sensitivity", "precision": "Precision",
    "hd95": "HD95 (px)", "surface_dice": "Surface Dice (2 px)",
}


@contextmanager
def style():
    """The house style for a block of drawing."""
    with mpl.rc_context({
        "font.size": 7.5, "axes.labelsize": 7.5, "xtick.labelsize": 7, "ytick.labelsize": 7, "legend.fontsize": 7,
        "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.6, "lines.linewidth": 1.2,
        "lines.markersize": 4, "legend.frameon": False, "figure.dpi": 110, "savefig.dpi": 300,
        "figure.constrained_layout.use": True, "svg.hashsalt": "lesionkd", "svg.fonttype": "none", "pdf.fonttype": 42,
    }):
        yield


def save(fig: Figure, name: str, folder: Path, data: pd.DataFrame | None = None) -> Path:
    """Write NAME.pdf, .svg and .png (300 dpi) and the plotted numbers as NAME.csv; the same bytes every time."""
    folder = Path(folder)
    dateless = {"pdf": {"CreationDate": None}, "svg": {"Date": None}, "png": {"Software": None}}
    with style():
        for suffix, metadata in dateless.items():
            with store.replacing(folder / f"{name}.{suffix}") as partial:
                fig.savefig(partial, format=suffix, metadata=metadata, dpi=300)
    if data is not None:
        store.write_table(folder / f"{name}.csv", data)
    return folder / f"{name}.png"


def display(fig: Figure) -> None:
    """Show a figure in a notebook and close it: JPEG where it holds pictures, which keeps notebooks small, else PNG."""
    from IPython.display import Image
    from IPython.display import display as show_in_notebook

    drawn, pictures = io.BytesIO(), any(axis.images for axis in fig.axes)
    with style():
        fig.savefig(drawn, format="jpeg" if pictures else "png", dpi=110, pil_kwargs={"quality": 88} if pictures else None)
    plt.close(fig)
    show_in_notebook(Image(drawn.getvalue()))


def panels(rows: int, columns: int, width: float = TWO_COLUMNS, ratio: float = 1.0) -> tuple[Figure, np.ndarray]:
    """A grid of square image panels without axes; axes always (rows, columns)."""
    fig, axes = plt.subplots(rows, columns, figsize=(width, width / columns * rows * ratio), squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    return fig, axes


def show(axis, image: np.ndarray, caption: str = "", **contours: np.ndarray) -> None:
    """An image with mask contours, colour by name: `truth`, `teacher`, `student`."""
    colours = {"truth": TRUTH, "teacher": TEACHER, "student": STUDENT}
    axis.imshow(image, cmap="gray", interpolation="nearest")
    for name, mask in contours.items():
        if mask.any():
            axis.contour(mask, levels=[0.5], colors=colours[name], linewidths=0.9, linestyles="--" if name == "truth" else "-")
    if caption:
        axis.text(0.5, -0.03, caption, transform=axis.transAxes, ha="center", va="top")


def cases(prepared, rows, columns: int = 6) -> Figure:
    """Prepared images with the contour of their mask, id and split beneath."""
    with style():
        fig, axes = panels(-(-len(rows) // columns), columns, ratio=1.24)
        for axis, row in zip(axes.flat, rows):
            case = prepared.cases.iloc[row]
            show(axis, prepared.images[row], f"{_shortened(case['id'])}\n{case['split']}", truth=prepared.masks[row])
    return fig


def _shortened(name: str) -> str:
    """A caption wider than its picture would shrink all pictures."""
    return name if len(name) <= 16 else f"…{name[-15:]}"


def pairs(prepared, table: pd.DataFrame) -> Figure:
    """Columns are pairs of images (`views.example_pairs`), the distance of their hashes beneath."""
    with style():
        fig, axes = panels(2, max(1, len(table)), ratio=1.14)
        for (top, bottom), row in zip(axes.T, table.itertuples()):
            show(top, prepared.images[row.first], _shortened(prepared.cases["id"][row.first]))
            show(bottom, prepared.images[row.second], f"{_shortened(prepared.cases['id'][row.second])}\n{row.bits} bits")
    return fig


def edges(prepared, rows, levels: dict[str, np.ndarray]) -> Figure:
    """Columns are cases: the image, and beneath it its edge label at each named resolution."""
    with style():
        fig, axes = panels(1 + len(levels), len(rows), ratio=1.04)
        for column, row in enumerate(rows):
            show(axes[0, column], prepared.images[row], truth=prepared.masks[row])
            for axis, stack in zip(axes[1:, column], levels.values()):
                show(axis, stack[column])
        _name_rows(axes, ("image", *levels))
    return fig


def _name_rows(axes: np.ndarray, names) -> None:
    for axis, name in zip(axes[:, 0], names):
        axis.text(-0.05, 0.5, name, transform=axis.transAxes, rotation=90, ha="right", va="center")


def training_curves(histories: dict[str, pd.DataFrame], losses: dict[str, str]) -> Figure:
    """Validation Dice of each run, and the named losses of the last one, over epochs."""
    with style():
        fig, (left, right) = plt.subplots(1, 2, figsize=(TWO_COLUMNS, 2.2))
        for name, history in histories.items():
            label, colour, _, line = STYLES[name]
            left.plot(history["epoch"], history["val_dice"], line, color=colour, label=label)
        left.set(xlabel="Epoch", ylabel="Validation Dice", ylim=(0, 1))
        left.legend()
        history = list(histories.values())[-1]
        for (column, label), line in zip(losses.items(), ("-", "--", "-.", ":")):
            right.plot(history["epoch"], history[column], line, label=label)
        right.set(xlabel="Epoch", ylabel="Loss before its weight", yscale="log")
        for axis in (left, right):
            axis.xaxis.get_major_locator().set_params(integer=True)
        right.legend()
    return fig


def segmentations(prepared, rows, predicted: dict[str, np.ndarray]) -> Figure:
    """Per case: image, then every network's contour beside the truth (dashed)."""
    with style():
        fig, axes = panels(1 + len(predicted), len(rows), ratio=1.04)
        for column, row in enumerate(rows):
            image, mask = prepared.images[row], prepared.masks[row]
            show(axes[0, column], image)
            for axis, (name, masks) in zip(axes[1:, column], predicted.items()):
                show(axis, image, truth=mask, **{name: masks[column]})
        _name_rows(axes, ("image", *predicted))
    return fig


def per_case_scores(tables: dict[str, pd.DataFrame], metric: str = "dice") -> Figure:
    """Every case as a point beside mean and 95 % interval, one column a method."""
    from .evaluation import bootstrap_mean

    with style():
        fig, axis = plt.subplots(figsize=(ONE_COLUMN, 2.4))
        for x, (name, table) in enumerate(tables.items()):
            label, colour, marker, _ = STYLES[name]
            values = table[metric].to_numpy()
            spread = np.random.default_rng(0).uniform(-0.18, 0.18, len(values))
            axis.plot(x + spread, values, ".", color=colour, alpha=0.45, markersize=3, zorder=1)
            low, high = bootstrap_mean(values, table["group"].to_numpy())
            mean = np.nanmean(values)
            axis.errorbar(x, mean, [[max(mean - low, 0)], [max(high - mean, 0)]], fmt=marker, color="black", markerfacecolor=colour, capsize=3, zorder=2)
        axis.set_xticks(range(len(tables)), [STYLES[name][0] for name in tables])
        axis.set(ylabel=f"{METRIC_LABELS[metric]} per test case", xlim=(-0.6, len(tables) - 0.4))
    return fig


def refinement(image: np.ndarray, teacher_map: np.ndarray, target: np.ndarray, student_map: np.ndarray, channel: int) -> Figure:
    """One channel of T, T' = max(T, m) and the connected student map S, on one colour scale."""
    with style():
        fig, axes = panels(1, 4, ratio=1.12)
        show(axes[0, 0], image, "image")
        scale = float(np.abs(teacher_map[channel]).max()) or 1.0
        for axis, stack, name in zip(axes[0, 1:], (teacher_map, target, student_map), ("T, before its ReLU", "T' = max(T, m)", "S, connected")):
            drawn = axis.imshow(stack[channel], cmap="PuOr", vmin=-scale, vmax=scale, interpolation="nearest")
            axis.text(0.5, -0.03, name, transform=axis.transAxes, ha="center", va="top")
        fig.colorbar(drawn, ax=axes[0, -1], shrink=0.75)
    return fig


def node_assignment(image: np.ndarray, mask: np.ndarray, edge: np.ndarray, projection: np.ndarray) -> Figure:
    """Edge at the graph's resolution, the most likely node of every pixel, and the entropy of P over live nodes.

    projection : (K, h, w)
    """
    with style():
        fig, axes = panels(1, 4, ratio=1.12)
        live = projection.sum((1, 2)) > 0
        show(axes[0, 0], image, "image", truth=mask)
        show(axes[0, 1], edge, "edge label")
        node = np.ma.masked_where(projection.max(0) == 0, projection.argmax(0))
        axes[0, 2].imshow(node, cmap="tab20", vmin=0, vmax=len(projection) - 1, interpolation="nearest")
        axes[0, 2].text(0.5, -0.03, f"node of each pixel ({live.sum()} live)", transform=axes[0, 2].transAxes, ha="center", va="top")
        p = projection[live]
        entropy = -(p * np.log(np.maximum(p, 1e-12))).sum(0) / np.log(max(live.sum(), 2))
        drawn = axes[0, 3].imshow(entropy, cmap="viridis", vmin=0, vmax=1, interpolation="nearest")
        axes[0, 3].text(0.5, -0.03, "entropy of P / log(live)", transform=axes[0, 3].transAxes, ha="center", va="top")
        fig.colorbar(drawn, ax=axes[0, 3], shrink=0.75)
    return fig


def ablation(per_case: pd.DataFrame, comparison: pd.DataFrame, metric: str = "dice") -> Figure:
    """Left, every arm's mean with its 95 % interval and each seed; right, method minus arm with its interval."""
    from .evaluation import bootstrap_mean

    arms = list(dict.fromkeys(per_case["arm"]))
    places = {arm: len(arms) - 1 - i for i, arm in enumerate(arms)}
    with style():
        fig, (left, right) = plt.subplots(1, 2, figsize=(TWO_COLUMNS, 0.55 + 0.32 * len(arms)), sharey=True)
        for arm, y in places.items():
            _, colour, marker, _ = STYLES[arm]
            seeds = per_case[per_case["arm"] == arm].pivot(index=["group", "id"], columns="seed", values=metric)
            means = seeds.mean(axis=1)
            low, high = bootstrap_mean(means.to_numpy(), means.index.get_level_values("group").to_numpy())
            left.plot(seeds.mean(), [y - 0.22] * seeds.shape[1], "|", color=colour, markersize=5)
            _interval(left, y, means.mean(), low, high, marker, colour)
        for row in comparison.itertuples():
            _, colour, marker, _ = STYLES[row.other]
            _interval(right, places[row.other], row.difference, row.low, row.high, marker, colour)
        right.axvline(0, color="black", linewidth=0.6)
        left.set_yticks(list(places.values()), [STYLES[arm][0] for arm in places])
        better = "higher" if HIGHER_IS_BETTER[metric] else "lower"
        left.set_xlabel(f"{METRIC_LABELS[metric]}, mean over test cases ({better} is better)")
        right.set_xlabel(f"Method minus arm, {METRIC_LABELS[metric]}")
    return fig


def _interval(axis, y: float, mean: float, low: float, high: float, marker: str, colour: str) -> None:
    axis.errorbar(mean, y, xerr=[[max(mean - low, 0)], [max(high - mean, 0)]], fmt=marker, color="black", markerfacecolor=colour, capsize=2.5)


def overview(stack: dict[str, dict[str, np.ndarray]], image: np.ndarray, edge: np.ndarray) -> Figure:
    """The method with real feature maps: rows are teacher and student, columns their maps, image and edge at the left.

    `stack`: {'teacher': {name: (h, w)}, 'student': ...}; each map is its mean absolute response.
    """
    columns = max(len(maps) for maps in stack.values())
    with style():
        fig, axes = panels(len(stack), 1 + columns, ratio=1.15)
        show(axes[0, 0], image, "image")
        show(axes[1, 0], edge, "Label_edge")
        for line, (who, maps) in zip(axes, stack.items()):
            for axis, (name, values) in zip(line[1:], maps.items()):
                axis.imshow(values, cmap="magma", interpolation="nearest")
                axis.text(0.5, -0.03, f"{who}\n{name}", transform=axis.transAxes, ha="center", va="top")
    return fig
