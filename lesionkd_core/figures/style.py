"""The look of all figures: one entry a method, one page width, one saver."""

from __future__ import annotations

import io
import re
from base64 import b64encode
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from .. import store
from ..config import LesionKDError
from ..statistics import FAMILY
from ..statistics.arms import families

ONE_COLUMN, TWO_COLUMNS = 85 / 25.4, 174 / 25.4  # inches
TRUTH, TEACHER, STUDENT = "#ffffff", "#EE7733", "#33BBEE"


class Look(NamedTuple):
    """How a method is drawn; colours are Tol's, and marker and line alone tell methods apart where there is no colour."""

    label: str
    colour: str
    marker: str
    line: Any


STYLES: dict[str, Look] = {
    "alone": Look("student alone", "#555555", "o", (0, (4, 1.5))),
    "feat": Look("+ L_feat", "#4477AA", "s", (0, (6, 1.5, 1, 1.5))),
    "edge": Look("+ L_edge", "#117733", "^", (0, (3, 1, 1, 1, 1, 1))),
    "method": Look("both (method)", "#CC3311", "D", "-"),
    "shuffled": Look("both, edges shuffled", "#AA3377", "v", (0, (1, 1))),
    "kd": Look("logit KD", "#CCBB44", "P", (0, (8, 2))),
    "fitnets": Look("FitNets", "#88CCEE", "X", (0, (2, 1))),
    "at": Look("attention transfer", "#44AA99", "<", (0, (8, 1, 2, 1))),
    "cwd": Look("CWD", "#332288", ">", (0, (1, 2.5))),
    "dist": Look("DIST", "#EE6677", "h", (0, (5, 3))),
    "method_kd": Look("both + logit KD", "#663333", "p", (0, (10, 1, 1, 1))),
    "teacher": Look("teacher", TEACHER, "*", "-"),
    "student": Look("student", STUDENT, "D", "-"),
    "otsu": Look("Otsu", "#000000", "x", ":"),
}
METRIC_LABELS = {
    "dice": "Dice", "iou": "IoU", "sensitivity": "Sensitivity", "precision": "Precision",
    "hd95": "HD95 (px)", "surface_dice": "Surface Dice (2 px)",
}
NETWORKS = {"resnet34_unet": "ResNet34-UNet", "unet64": "U-Net 64"}


def look_of(name: str) -> Look:
    """The style of a method, its label typeset; one that has none is drawn under its own name."""
    look = STYLES.get(name, Look(name, "#000000", "d", ":"))
    return look._replace(label=typeset(look.label))


def named(names: Iterable[str]) -> str:
    """Methods in words, as an alternative text names them."""
    return "; ".join(STYLES[name].label if name in STYLES else NETWORKS.get(name, name) for name in names)


def typeset(text: str) -> str:
    """`L_feat` as a paper prints it."""
    return re.sub(r"\bL_([a-z]+)", r"$L_\\mathrm{\1}$", text)


@contextmanager
def style() -> Iterator[None]:
    """The house style for a block of drawing."""
    with mpl.rc_context({
        "font.size": 7.5, "axes.labelsize": 7.5, "xtick.labelsize": 7, "ytick.labelsize": 7, "legend.fontsize": 7,
        "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.6, "lines.linewidth": 1.2,
        "lines.markersize": 4, "legend.frameon": False, "figure.dpi": 110, "savefig.dpi": 300,
        "figure.constrained_layout.use": True, "svg.hashsalt": "lesionkd", "svg.fonttype": "none", "pdf.fonttype": 42,
    }):
        yield


def save(fig: Figure, name: str, folder: Path, data: pd.DataFrame | None = None) -> Path:
    """Write NAME.pdf, .svg and .png (300 dpi), the alternative text inside, and the plotted numbers as NAME.csv; the same bytes every time."""
    folder, text = Path(folder), fig.get_label()
    dateless = {"pdf": {"CreationDate": None, "Subject": text}, "svg": {"Date": None, "Title": text}, "png": {"Software": None, "Description": text}}
    with style():
        for suffix, metadata in dateless.items():
            with store.replacing(folder / f"{name}.{suffix}") as partial:
                fig.savefig(partial, format=suffix, metadata=metadata, dpi=300)
    if data is not None:
        store.write_table(folder / f"{name}.csv", data)
    return folder / f"{name}.png"


def display(fig: Figure) -> None:
    """Show a figure in a notebook and close it, small: JPEG where it holds pictures, else PNG of 64 colours.

    Its label is the alternative text: `alt` for whoever shows the picture, text for whoever cannot, and what nbval compares. It names
    what is drawn and no trained number, which tables give and which differ between processors.
    """
    from IPython.display import display as show_in_notebook

    if not (text := fig.get_label()):
        raise LesionKDError("the figure has no alternative text; give it one: fig.set_label('what is shown')")
    drawn, pictures = io.BytesIO(), any(axis.images for axis in fig.axes)
    with style():
        fig.savefig(drawn, format="jpeg" if pictures else "png", dpi=100, pil_kwargs={"quality": 70} if pictures else None)
    plt.close(fig)
    if not pictures:
        from PIL import Image as Picture

        few_colours = Picture.open(drawn).convert("RGB").quantize(64)
        drawn = io.BytesIO()
        few_colours.save(drawn, "PNG", optimize=True)
    kind = "image/jpeg" if pictures else "image/png"
    show_in_notebook({kind: b64encode(drawn.getvalue()).decode(), "text/plain": text}, metadata={kind: {"alt": text}}, raw=True)


def panels(rows: int, columns: int, width: float = TWO_COLUMNS, ratio: float = 1.0) -> tuple[Figure, np.ndarray]:
    """A grid of square image panels without axes; axes always (rows, columns)."""
    fig, axes = plt.subplots(rows, columns, figsize=(width, width / columns * rows * ratio), squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    return fig, axes


def show(axis: Axes, image: np.ndarray, caption: str = "", /, **contours: np.ndarray) -> None:
    """An image with mask contours, colour by name: `truth`, `teacher`, or any student."""
    colours = {"truth": TRUTH, "teacher": TEACHER}
    axis.imshow(image, cmap="gray", interpolation="nearest")
    for name, mask in contours.items():
        if mask.any():
            axis.contour(mask, levels=[0.5], colors=colours.get(name, STUDENT), linewidths=0.9, linestyles="--" if name == "truth" else "-")
    if caption:
        write_below(axis, caption)


def write_below(axis: Axes, text: str) -> None:
    """The caption of a picture."""
    axis.text(0.5, -0.03, text, transform=axis.transAxes, ha="center", va="top")


def charts(count: int, height: float, labels: Collection[str], columns: int = 3, narrow: int = 1, **shared: Any) -> tuple[Figure, list[Axes]]:
    """Up to `columns` charts in a row at a page's width, at a column's where they are `narrow` at most; rows of `height` inches under a legend."""
    across = min(count, columns)
    rows = -(-count // across)
    width = ONE_COLUMN if across <= narrow else TWO_COLUMNS
    fig, axes = plt.subplots(rows, across, figsize=(width, height * rows + legend_height(labels, width)), squeeze=False, **shared)
    for axis in axes.flat[count:]:
        axis.set_visible(False)
    return fig, list(axes.flat[:count])


def parts(table: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """The parts of a table that are compared within (`statistics.FAMILY`), each named by what it does not share with the others."""
    differing = [name for name in FAMILY if name in table and table[name].nunique() > 1]
    for family, part in families(table):
        names = dict.fromkeys(NETWORKS.get(str(family[name]), str(family[name])) for name in differing)
        yield ", ".join(names), part


def need(table: pd.DataFrame, *columns: str) -> None:
    """Refuse a table of another kind."""
    if absent := [name for name in columns if name not in table]:
        raise LesionKDError(f"the table to draw has no column {', '.join(absent)}; it holds {', '.join(map(str, table.columns)) or 'nothing'}")


def nothing(why: str) -> Figure:
    """A figure that says why there is nothing to see."""
    fig, axis = plt.subplots(figsize=(ONE_COLUMN, 0.6))
    axis.set_axis_off()
    axis.text(0.5, 0.5, f"Nothing to draw: {why}.", ha="center", va="center")
    fig.set_label(f"Nothing to draw: {why}.")
    return fig


def legend(fig: Figure, handles: dict[str, Line2D]) -> None:
    """One legend for all charts of a figure, above them."""
    abreast = _abreast(handles, fig.get_figwidth())
    fig.legend(handles.values(), handles, loc="outside upper center", ncols=abreast, handlelength=2.8, columnspacing=1.4)


def legend_height(labels: Collection[str], width: float) -> float:
    """Inches that a legend takes."""
    return 0.16 * -(-len(labels) // _abreast(labels, width))


def _abreast(labels: Collection[str], width: float) -> int:
    longest = max((len(re.sub(r"\\mathrm|[$_{}]", "", label)) for label in labels), default=0)
    return max(1, min(6, int(width / (0.055 * longest + 0.5))))


def on(names: Iterable[str]) -> str:
    """' on busi; isic2018' of the parts of a table, nothing where there is one without a name."""
    return " on " * any(names := list(dict.fromkeys(filter(None, names)))) + "; ".join(names)


def key(look: Look) -> Line2D:
    """What a legend shows of a method."""
    return Line2D([], [], color=look.colour, marker=look.marker, linestyle=look.line)


def interval(
    axis: Axes, x: float, y: float, low: float, high: float, look: Look, along: str = "x", filled: bool = True, label: str = ""
) -> None:
    """A mean and its interval, along x or y, in the style of a method; without an interval (NaN) the mean alone."""
    mean = x if along == "x" else y
    span: dict[str, Any] = {f"{along}err": [[max(mean - low, 0)], [max(high - mean, 0)]]} if low == low and high == high else {}
    axis.errorbar(
        x, y, **span, fmt=look.marker, color="black" if filled else look.colour, ecolor="black", markerfacecolor=look.colour if filled else "white",
        markersize=5, markeredgewidth=0.5 if filled else 0.9, elinewidth=0.9, capsize=2.5, label=label,
    )


def whole_numbers(axes: Iterable[Axes]) -> None:
    """Epochs have no fractions."""
    for axis in axes:
        locator: Any = axis.xaxis.get_major_locator()  # a MaxNLocator
        locator.set_params(integer=True)
