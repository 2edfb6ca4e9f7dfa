"""Figures at paper widths, in one style, with an alternative text, the same bytes from run to run.

A function returns a figure whose label is its alternative text; `publish` shows and writes it.
"""

from __future__ import annotations

import io
import re
import sys
import textwrap
import zlib
from base64 import b64encode
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import AbstractContextManager
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, ParamSpec

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from .. import results
from ..config import LesionKDError
from ..evaluate import HIGHER_IS_BETTER, bootstrap_mean
from ..losses import TERMS
from .statistics import (
    FAMILY,
    SIGNIFICANT,
    TERTILES,
    by_seed,
    case_mean,
    families,
    in_order,
)
from .tables import METRIC_LABELS, label

if TYPE_CHECKING:
    from ..data.prepare import Prepared
    from .inspect import FeatureView, NodeView, RefinementView
    from .statistics import Calibration

P = ParamSpec("P")
ONE_COLUMN, TWO_COLUMNS = 85 / 25.4, 174 / 25.4
"""Widths of a figure in inches: 85 and 174 mm."""


# Style --------------------------------------------------------------------------------------------


class Style(NamedTuple):
    """How an arm is drawn. Marker and dash alone tell the arms apart without colour."""

    colour: str
    marker: Any
    dash: Any  # in points; "" is a solid line

    @property
    def line(self) -> dict[str, Any]:
        """Options of a line."""
        dash = (0, self.dash) if self.dash else "-"
        return {"color": self.colour, "marker": self.marker, "linestyle": dash}


STYLES = {  # Tol's colour-blind safe colours
    "alone": Style("#555555", "o", (4, 1.5)),
    "alone_long": Style("#BBBBBB", "8", (7, 3)),
    "feat": Style("#4477AA", "s", (6, 1.5, 1, 1.5)),
    "edge": Style("#117733", "^", (3, 1, 1, 1, 1, 1)),
    "method": Style("#CC3311", "D", ""),
    "shuffled": Style("#AA3377", "v", (1, 1)),
    "kd": Style("#CCBB44", "P", (8, 2)),
    "boundary_kd": Style("#999933", "p", (10, 1, 1, 1)),
    "cwd": Style("#332288", ">", (1, 2.5)),
    "dist": Style("#EE6677", "h", (5, 3)),
    "sobel": Style("#0077BB", "d", (3, 3)),
    "fitnets": Style("#88CCEE", "X", (2, 1)),
    "at": Style("#44AA99", "<", (8, 1, 2, 1)),
    "edge_shuffled": Style("#882255", (3, 1, 0), (1, 1, 4, 1)),
    "edge_joint": Style("#225522", (6, 1, 0), (2, 2, 6, 2)),
    "edge_relation": Style("#663333", (5, 1, 180), (6, 1, 6, 3)),
    "teacher": Style("#EE7733", "*", (11, 2.5)),
    "student": Style("#CC3311", "D", ""),
    "otsu": Style("#000000", "x", (1, 1.5)),
    "resnet34_unet": Style("#EE7733", "*", (11, 2.5)),
    "unet64": Style("#009988", "H", (3, 2)),
}
SPARE: tuple[Any, ...] = (
    ("#004488", "#BB5566", "#DDAA33", "#009988", "#771155", "#6699CC", "#997700"),
    ((4, 0, 45), (5, 1, 0), (3, 0, 180), (6, 0, 0), (8, 1, 0)),
    ((9, 1), (2, 4), (6, 2, 2, 2), (4, 1, 1, 1, 1, 1, 1, 1)),
)
"""Colours, markers and dashes for other arms; their numbers have no common divisor."""


def style_of(name: str) -> Style:
    """The style of an arm or network; another loss term or name gets one of the spare styles."""
    if name in STYLES:
        return STYLES[name]
    own = [term for term in TERMS if term not in STYLES]
    place = own.index(name) if name in own else zlib.crc32(name.encode())
    return Style(*(choices[place % len(choices)] for choices in SPARE))


def _typeset(text: str) -> str:
    """L_feat as a symbol."""
    return re.sub(r"\bL_([a-z]+)", r"$L_\\mathrm{\1}$", text)


def _label(name: str) -> str:
    return _typeset(label(name))


def style() -> AbstractContextManager[None]:
    """The style of all figures, for a `with` block."""
    context: AbstractContextManager[None] = plt.style.context("lesionkd_core.analysis.lesionkd")
    return context


def styled(*columns: str) -> Callable[[Callable[P, Figure]], Callable[P, Figure]]:
    """Decorator: draw in the style of all figures; the first argument is a table with `columns`."""

    def decorate(draw: Callable[P, Figure]) -> Callable[P, Figure]:
        @wraps(draw)
        def drawn(*args: P.args, **options: P.kwargs) -> Figure:
            with style():
                table: Any = next(iter((*args, *options.values())))
                if isinstance(table, Sized) and not len(table):
                    return _nothing()
                if absent := [name for name in columns if name not in table]:
                    raise LesionKDError(
                        f"the table to draw has no column {', '.join(absent)}; it has "
                        f"{', '.join(map(str, table))}"
                    )
                return draw(*args, **options)

        return drawn

    return decorate


def save(fig: Figure, name: str, folder: Path, data: pd.DataFrame | None = None) -> None:
    """Write NAME.pdf, .svg and .png (300 dpi) with the alternative text, and `data` as NAME.csv.

    The same figure gives the same bytes.
    """
    folder, text = Path(folder), fig.get_label()
    metadata: dict[str, dict[str, Any]] = {
        "pdf": {"CreationDate": None, "Subject": text},
        "svg": {"Date": None, "Title": text},
        "png": {"Software": None, "Description": text},
    }
    with style():
        for suffix, about in metadata.items():
            with results.replacing(folder / f"{name}.{suffix}") as partial:
                fig.savefig(partial, format=suffix, metadata=about)
    if data is not None:
        results.write_table(folder / f"{name}.csv", data)


def display(fig: Figure) -> None:
    """Show a figure in a notebook and close it: as JPEG if it has pictures, else PNG of 64 colours.

    Its label is the alternative text, which is also the output's text and what nbval compares. So
    it says what is drawn, without numbers that differ between machines.
    """
    from IPython.display import display as show_in_notebook
    from PIL import Image

    if not (text := str(fig.get_label())):
        raise LesionKDError(
            "the figure has no alternative text; say what it shows: fig.set_label('...')"
        )
    drawn, pictures = io.BytesIO(), any(axis.images for axis in fig.axes)
    kind = "jpeg" if pictures else "png"
    with style():
        fig.savefig(drawn, format=kind, dpi=100, pil_kwargs={"quality": 70} if pictures else None)
    plt.close(fig)
    if not pictures:
        small = Image.open(drawn).convert("RGB").quantize(64)
        drawn = io.BytesIO()
        small.save(drawn, "PNG", optimize=True)
    data = {f"image/{kind}": b64encode(drawn.getvalue()).decode(), "text/plain": text}
    show_in_notebook(data, metadata={f"image/{kind}": {"alt": text}}, raw=True)


def publish(fig: Figure, name: str, folder: Path, data: pd.DataFrame | None = None) -> None:
    """Write a figure and the plotted numbers with `save`, and show it in the notebook."""
    save(fig, name, folder, data)
    display(fig)


# Parts of figures ---------------------------------------------------------------------------------


def _described(fig: Figure, text: str) -> Figure:
    fig.set_label(text)
    return fig


def _nothing() -> Figure:
    """What is drawn of an empty table."""
    fig, axis = plt.subplots(figsize=(ONE_COLUMN, 0.6))
    axis.set_axis_off()
    axis.text(0.5, 0.5, "Nothing to draw: the table is empty.", ha="center", va="center")
    return _described(fig, "Nothing to draw: the table is empty.")


def _parts(table: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """The parts of a table that are compared within, each named by the values that differ."""
    differing = [name for name in FAMILY if name in table and table[name].nunique() > 1]
    for family, part in families(table):
        yield ", ".join(dict.fromkeys(label(family[name]) for name in differing)), part


def _same_part(table: pd.DataFrame, part: pd.DataFrame) -> pd.DataFrame:
    """The rows of another table that belong to a part."""
    shared = [name for name in FAMILY if name in table and name in part]
    return table[(table[shared] == part[shared].iloc[0]).all(axis=1)] if shared else table


def _names(names: Iterable[str]) -> str:
    return "; ".join(dict.fromkeys(label(name) for name in names))


def _on(names: Iterable[str]) -> str:
    """' on busi; isic2018' of the parts of a table; empty if there is one without a name."""
    found = [name for name in dict.fromkeys(names) if name]
    return " on " * bool(found) + "; ".join(found)


def _charts(
    count: int,
    height: float,
    handles: dict[str, Line2D] | None = None,
    columns: int = 3,
    narrow: int = 1,
    **shared: Any,
) -> tuple[Figure, list[Axes]]:
    """Up to `columns` charts side by side under a legend; one column wide if at most `narrow`."""
    across = min(count, columns)
    rows, width = -(-count // across), ONE_COLUMN if across <= narrow else TWO_COLUMNS
    texts = [re.sub(r"\\mathrm|[$_{}]", "", text) for text in handles or {}]
    abreast = max(1, min(6, int(width / (0.055 * max(map(len, texts), default=0) + 0.5))))
    size = (width, height * rows + 0.16 * -(-len(texts) // abreast))
    fig, axes = plt.subplots(rows, across, figsize=size, squeeze=False, **shared)
    for axis in axes.flat[count:]:
        axis.set_visible(False)
    if handles:
        where: dict[str, Any] = {"loc": "outside upper center", "ncols": abreast}
        fig.legend(handles.values(), handles, handlelength=2.8, columnspacing=1.4, **where)
    return fig, list(axes.flat[:count])


def _handles(pens: dict[str, Style], **changes: Any) -> dict[str, Line2D]:
    """What a legend shows of each style, by its text."""
    return {text: Line2D([], [], **pen.line | changes) for text, pen in pens.items()}


def _arm_handles(arms: Iterable[str], **changes: Any) -> dict[str, Line2D]:
    return _handles({_label(arm): style_of(arm) for arm in arms}, **changes)


def _interval(
    axis: Axes, x: float, y: float, limits: Sequence[float], pen: Style, along: str, **how: Any
) -> None:
    """A mean and its interval (NaN: none) along x or y; `hollow=True` for a white marker."""
    mean, (low, high) = x if along == "x" else y, limits
    edge = pen.colour if (hollow := how.pop("hollow", False)) else "black"
    how |= {
        "marker": pen.marker,
        "linestyle": "none",
        "markersize": 5,
        "ecolor": "black",
        "elinewidth": 0.9,
    }
    how |= {"color": edge, "markeredgewidth": 0.9 if hollow else 0.5}
    if low == low:
        how[f"{along}err"] = [[max(mean - low, 0)], [max(high - mean, 0)]]
    axis.errorbar(x, y, markerfacecolor="white" if hollow else pen.colour, **how)


def _seeds(axis: Axes, values: Iterable[float], place: float, colour: str, along: str) -> None:
    """The mean of each seed, as a tick beside the interval."""
    known = [value for value in values if value == value]
    beside = [place - 0.28 if along == "x" else place] * len(known)
    xy = (known, beside) if along == "x" else (beside, known)
    axis.plot(*xy, "|" if along == "x" else "_", color=colour, markersize=4, markeredgewidth=0.9)


def _band(axis: Axes, x: Any, table: pd.DataFrame, pen: Style, name: str, shift: float) -> None:
    """Columns mean, low, high over x; `shift` (0..1) moves the markers apart."""
    step = max(1, len(x) // 5)
    how = pen.line | {"markevery": (int(shift * step), step)}
    axis.plot(x, table["mean"], label=name, zorder=2.5 if name == "method" else 2, **how)
    if (table["high"] > table["low"]).any():
        shade: dict[str, Any] = {"color": pen.colour, "alpha": 0.15, "linewidth": 0}
        axis.fill_between(x, table["low"], table["high"], **shade)


def _whole_epochs(axes: Iterable[Axes]) -> None:
    for axis in axes:
        axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))


def _plain_log(axis: Any, *steps: int) -> None:
    """A logarithmic axis with plain numbers, at the given steps of each decade."""
    axis.set_major_locator(LogLocator(subs=steps or (1,)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


# Pictures -----------------------------------------------------------------------------------------

# fmt: off
NODE_COLOURS = (  # Tol's rainbow and a grey, in an order in which neighbours differ
    "#1965B0", "#F7F056", "#882E72", "#4EB265", "#DC050C", "#7BAFDE", "#F1932D", "#777777",
    "#CAE0AB", "#72190E", "#5289C7", "#F6C141", "#AE76A3", "#E8601C", "#90C987", "#D1BBD7",
)
# fmt: on
TRUTH, ALONE = "#FFFFFF", "#33BBEE"


def panels(rows: int, columns: int, ratio: float = 1.0) -> tuple[Figure, np.ndarray]:
    """A grid of pictures without axes, panels `ratio` times as high as wide; (rows, columns)."""
    width = ONE_COLUMN if columns <= 2 else TWO_COLUMNS
    size = (width, width / max(columns, 2) * rows * ratio)
    fig, axes = plt.subplots(rows, columns, figsize=size, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    return fig, axes


def draw_image(axis: Axes, image: np.ndarray, caption: str = "", /, **masks: np.ndarray) -> None:
    """An image with the outline of masks, each in two tones, and the last one lightly shaded.

    Masks are drawn in the style of their name; `truth` is white and dashed.
    """
    axis.imshow(image)
    for name, mask in masks.items():
        if not mask.any():
            continue
        colour, line = (TRUTH, "--") if name == "truth" else (_network_colour(name), "-")
        if name == list(masks)[-1]:
            axis.contourf(mask, levels=[0.5, 1.5], colors=[colour], alpha=0.2)
        drawn = axis.contour(mask, levels=[0.5], colors=[colour], linewidths=0.8, linestyles=line)
        drawn.set_path_effects([withStroke(linewidth=1.9, foreground="black")])
    _caption(axis, caption)


def _network_colour(name: str) -> str:
    """Brighter than in charts for the student alone, whose grey would be lost in an image."""
    return (
        ALONE if name == "alone" else STYLES["teacher" if name == "teacher" else "student"].colour
    )


def _caption(axis: Axes, text: str) -> None:
    axis.text(0.5, -0.03, text, transform=axis.transAxes, ha="center", va="top")


def _row_labels(axes: np.ndarray, names: Iterable[str]) -> None:
    how: dict[str, Any] = {"rotation": 90, "ha": "right", "va": "center"}
    for axis, name in zip(axes[:, 0], names):
        axis.text(-0.05, 0.5, name, transform=axis.transAxes, **how)


def _short(name: str) -> str:
    """A wider caption would shrink all pictures."""
    return name if len(name) <= 16 else f"…{name[-15:]}"


@styled()
def cases(prepared: Prepared, rows: Sequence[int], columns: int = 6) -> Figure:
    """Prepared images with their mask, and id and split as caption."""
    fig, axes = panels(-(-len(rows) // columns), columns, ratio=1.24)
    for axis, row in zip(axes.flat, rows):
        case = prepared.cases.iloc[row]
        caption = f"{_short(case['id'])}\n{case['split']}"
        draw_image(axis, prepared.images[row], caption, truth=prepared.masks[row])
    names = ", ".join(prepared.cases["id"].iloc[rows])
    return _described(fig, f"{len(rows)} prepared images with the outline of their mask: {names}.")


@styled()
def pairs(prepared: Prepared, table: pd.DataFrame) -> Figure:
    """Pairs of images, one above the other, and how alike they are.

    Parameters
    ----------
    table : DataFrame
        From `inspect.example_pairs`.
    """
    fig, axes = panels(2, max(1, len(table)), ratio=1.14)
    ids, said = prepared.cases["id"], []
    for (top, bottom), row in zip(axes.T, table.itertuples()):
        draw_image(top, prepared.images[row.first], _short(ids[row.first]))
        alike = f"{row.bits} bits, r {min(row.correlation, row.content):.2f}"
        draw_image(bottom, prepared.images[row.second], f"{_short(ids[row.second])}\n{alike}")
        said.append(f"{ids[row.first]} and {ids[row.second]}, {alike}")
    what = "Pairs of images, the distance of their hashes and the correlation r of their details"
    return _described(fig, f"{what}: {'; '.join(said) or 'none'}.")


@styled()
def joined_groups(prepared: Prepared, count: int = 4) -> Figure:
    """Up to six images of each of the largest groups that were joined because they show the same.

    They are the groups of `Prepared.summary["joined"]`; groups that names make are not drawn.
    """
    largest = prepared.summary["joined"]["largest"][:count]
    if not largest:
        return _nothing()
    rows = {case_id: row for row, case_id in enumerate(prepared.cases["id"])}
    fig, axes = panels(len(largest), 6, ratio=1.14)
    for line, ids in zip(axes, largest):
        for axis, case_id in zip(line, ids):
            draw_image(axis, prepared.images[rows[case_id]], _short(case_id))
    sizes = [f"{len(ids)} images" for ids in largest]
    _row_labels(axes, sizes)
    return _described(fig, f"The largest groups of images that show the same: {', '.join(sizes)}.")


@styled()
def edges(prepared: Prepared, rows: Sequence[int], levels: dict[str, np.ndarray]) -> Figure:
    """Rows are cases: the image with its mask, and its edge label at each named resolution."""
    fig, axes = panels(len(rows), 1 + len(levels), ratio=1.04)
    for i, (line, row) in enumerate(zip(axes, rows)):
        draw_image(line[0], prepared.images[row], truth=prepared.masks[row])
        for axis, stack in zip(line[1:], levels.values()):
            draw_image(axis, stack[i])
    for axis, text in zip(axes[-1], ("image", *levels)):
        _caption(axis, text)
    text = f"{len(rows)} images with their mask, and edge labels: {'; '.join(levels)}."
    return _described(fig, text)


@styled()
def segmentations(
    prepared: Prepared, rows: Sequence[int], predicted: dict[str, np.ndarray]
) -> Figure:
    """Columns are cases: the image, and below it the mask of each network, with the true one.

    Parameters
    ----------
    predicted : {network: (len(rows), S, S) bool}
    """
    fig, axes = panels(1 + len(predicted), len(rows), ratio=1.04)
    for column, row in enumerate(rows):
        image, mask = prepared.images[row], prepared.masks[row]
        draw_image(axes[0, column], image)
        for axis, (name, masks) in zip(axes[1:, column], predicted.items()):
            draw_image(axis, image, truth=mask, **{name: masks[column]})
    _row_labels(axes, ("image", *map(_label, predicted)))
    fig.supxlabel("dashed: the true mask", fontsize="medium")
    what = f"and below each the outline of {_names(predicted)}, and of the true mask, dashed"
    return _described(fig, f"{len(rows)} images, {what}.")


def viewer(prepared: Prepared, rows: Sequence[int], probabilities: dict[str, np.ndarray]) -> None:
    """Explore cases in JupyterLab: sliders for case and threshold, overlays to switch on and off.

    Outside JupyterLab (papermill, nbval) it shows the masks of eight cases at threshold 0.5.

    Parameters
    ----------
    rows : sequence of int
        Rows of `prepared`.
    probabilities : {network: (len(rows), S, S)}
    """
    if not results.live_bar() or "ipykernel" not in sys.modules:
        chosen = np.linspace(0, len(rows) - 1, min(8, len(rows))).round().astype(int)
        shown = {name: stack[chosen] > 0.5 for name, stack in probabilities.items()}
        display(segmentations(prepared, [rows[i] for i in chosen], shown))
        return
    import ipywidgets as widgets
    from IPython.display import display as show

    names = ("truth", *probabilities)
    case = widgets.IntSlider(0, 0, len(rows) - 1, description="case")
    threshold = widgets.FloatSlider(0.5, min=0.01, max=0.99, step=0.01, description="threshold")
    boxes = [widgets.Checkbox(True, description=name, indent=False) for name in names]
    picture = widgets.Image(format="png")

    def draw(_: Any = None) -> None:
        i = case.value
        masks = {n: stack[i] > threshold.value for n, stack in probabilities.items()}
        masks = {"truth": prepared.masks[rows[i]]} | masks
        masks = {box.description: masks[box.description] for box in boxes if box.value}
        with style():
            fig, axis = plt.subplots(figsize=(ONE_COLUMN, ONE_COLUMN))
            axis.set_axis_off()
            draw_image(axis, prepared.images[rows[i]], prepared.cases["id"].iloc[rows[i]], **masks)
            buffer = io.BytesIO()
            fig.savefig(buffer, format="png", dpi=120)
            plt.close(fig)
        picture.value = buffer.getvalue()

    for control in (case, threshold, *boxes):
        control.observe(draw, "value")
    draw()
    show(widgets.VBox([case, threshold, widgets.HBox(boxes), picture]))


@styled()
def refinement(image: np.ndarray, view: RefinementView) -> Figure:
    """One channel of T, T' = max(T, m) and the connected S on one colour scale (step S3).

    `view` is from `inspect.refinement_view`.
    """
    fig, axes = panels(1, 4, ratio=1.12)
    draw_image(axes[0, 0], image, "image")
    maps = [stack[view.channel] for stack in (view.teacher, view.target, view.student)]
    scale = float(np.abs(maps).max()) or 1.0
    captions = ("T, before its ReLU", "T' = max(T, m)", "S, after the connector")
    for axis, values, caption in zip(axes[0, 1:], maps, captions):
        drawn = axis.imshow(values, cmap="PuOr", vmin=-scale, vmax=scale)
        _caption(axis, caption)
    fig.colorbar(drawn, ax=axes[0, -1], shrink=0.75)
    text = "the teacher's T before its ReLU, the target T' = max(T, m), the student's connected S"
    return _described(fig, f"An image, and one channel on one colour scale: {text}.")


@styled()
def feature_maps(
    image: np.ndarray,
    mask: np.ndarray,
    views: dict[str, dict[str, FeatureView]],
    predicted: dict[str, np.ndarray],
) -> Figure:
    """The channel of each map that separates the lesion best: rows networks, columns levels.

    Values are deviations from the channel's mean over the image, in standard deviations; d is
    Cohen's d between lesion and rest. A level has one scale for all networks.

    Parameters
    ----------
    image, mask : (S, S, 3) uint8, (S, S)
    views : {network: {level: FeatureView}}
        From `inspect.feature_views`.
    predicted : {network: (S, S)}
        The mask of each network.
    """
    levels = list(next(iter(views.values())))
    fig, axes = panels(len(views), 1 + len(levels), ratio=1.22)
    for line, (who, maps) in zip(axes, views.items()):
        draw_image(line[0], image, truth=mask, **{who: predicted[who]})
        for axis, level in zip(line[1:], levels):
            scale = max(np.abs(of[level].values).max() for of in views.values()) or 1.0
            axis.imshow(maps[level].values, cmap="PuOr", vmin=-scale, vmax=scale)
            _caption(axis, f"channel {maps[level].channel}, d = {maps[level].separation:.2f}")
    for column, level in zip(axes.T[1:], levels):
        bar = fig.colorbar(column[0].images[0], ax=column, location="bottom", shrink=0.8)
        bar.set_label(level)
    _row_labels(axes, map(_label, views))
    text = f"rows {_names(views)}, with their masks on the left; columns {'; '.join(levels)}"
    return _described(fig, f"The channel of each map that separates the lesion best: {text}.")


@styled()
def nodes(
    images: Sequence[np.ndarray], masks: Sequence[np.ndarray], views: dict[str, list[NodeView]]
) -> Figure:
    """Rows are cases: image, edge pixels with anchors, and each network's projection P (step S4).

    An anchor is drawn at the centroid of its cell's edge pixels with its node's number. A pixel has
    the colour of its most likely node, paler if that is less likely. The entropy of P is in units
    of log(live nodes): 1 is undecided; one node alone has none.

    Parameters
    ----------
    images, masks : sequences of (S, S, 3) uint8 and (S, S)
    views : {network: one NodeView for each case}
        From `inspect.GraphCases.views`.
    """
    fig, axes = panels(len(images), 2 + 2 * len(views), ratio=1.3 if len(images) == 1 else 1.1)
    for line, image, mask, *of_case in zip(axes, images, masks, *views.values()):
        draw_image(line[0], image, truth=mask)
        _draw_anchors(line[1], of_case[0])
        for axis, view in zip(line[2::2], of_case):
            _draw_assignment(axis, image, view)
        for axis, view in zip(line[3::2], of_case):
            drawn = axis.imshow(view.entropy, cmap="viridis", vmin=0, vmax=1)
    _caption(axes[-1, 0], "image")
    for i, who in enumerate(views):
        _caption(axes[-1, 2 + 2 * i], f"{_label(who)}\nnode of each pixel".strip())
        _caption(axes[-1, 3 + 2 * i], f"{_label(who)}\nentropy of $P$".strip())
    fig.colorbar(drawn, ax=axes, shrink=0.7, pad=0.01)
    live = ", ".join(f"{v.live.sum()} of {len(v.live)}" for v in next(iter(views.values())))
    what = f"their edge pixels with {live} nodes live, the most likely node of each pixel"
    whose = f" of {_names(filter(None, views))}" * any(views)
    return _described(fig, f"Images, {what} and the entropy of P{whose}.")


def _draw_anchors(axis: Axes, view: NodeView) -> None:
    axis.imshow(view.edge, cmap="gray_r", vmin=-0.2, vmax=1.5)
    for node, (y, x) in enumerate(view.anchors):
        if np.isfinite(y):
            colour = NODE_COLOURS[node % len(NODE_COLOURS)]
            axis.plot(x, y, "o", color=colour, markersize=6.5)
            how: dict[str, Any] = {"fontsize": 5, "ha": "center", "va": "center_baseline"}
            ink = "black" if sum(to_rgb(colour)) > 1.7 else "white"
            axis.text(x, y, str(node), color=ink, **how)
    _caption(axis, f"{view.live.sum()} of {len(view.live)} live")


def _draw_assignment(axis: Axes, image: np.ndarray, view: NodeView) -> None:
    """The image under the colours of the nodes, in pixels of the map."""
    height, width = view.edge.shape
    axis.imshow(image.mean(-1), extent=(-0.5, width - 0.5, height - 0.5, -0.5))
    count, cycle = len(view.projection), len(NODE_COLOURS)
    colours = np.array([to_rgb(NODE_COLOURS[node % cycle]) for node in range(count)])
    axis.imshow(np.dstack([colours[view.projection.argmax(0)], 0.8 * view.projection.max(0)]))
    axis.plot(*np.argwhere(view.edge > 0).T[::-1], ".", color="white", markersize=1)


# Data ---------------------------------------------------------------------------------------------


@styled("split", "lesion_share", "contrast")
def lesion_sizes(cases: pd.DataFrame) -> Figure:
    """Lesion size and contrast of the cases of each split.

    Parameters
    ----------
    cases : DataFrame
        `Prepared.cases`: split, lesion_share and contrast. Cases without a lesion are left out.
    """
    lesions = cases[cases["lesion_share"] > 0]
    lesions = lesions.assign(percent=100 * lesions["lesion_share"])
    splits = [name for name in ("train", "val", "test") if name in set(lesions["split"])]
    how: dict[str, Any] = {"hue": "split", "hue_order": splits, "element": "step", "fill": False}
    how |= {"stat": "percent", "common_norm": False, "bins": 12, "palette": "muted"}
    fig, axes = plt.subplots(1, 2, figsize=(TWO_COLUMNS, 1.9), sharey=True)
    for axis, column in zip(axes, ("percent", "contrast")):
        sns.histplot(lesions, x=column, ax=axis, log_scale=column == "percent", **how)
        keys = axis.get_legend().legend_handles
        for dash, *drawn in zip(("-", "--", ":"), axis.lines[::-1], keys):
            plt.setp(drawn, linestyle=dash)
    axes[1].get_legend().remove()
    _plain_log(axes[0].xaxis, 1, 3)
    axes[0].set(xlabel="Lesion size (% of the image)", ylabel="Cases of the split (%)")
    axes[1].set(xlabel="Contrast: grey of the lesion minus that of a ring around it")
    what = "left, size of the lesion; right, its contrast"
    return _described(fig, f"Distribution of the cases of {', '.join(splits)}: {what}.")


# Arms on test cases -------------------------------------------------------------------------------

MEASURES = {
    "lesion_pixels": ("Lesion size (px)", "{:.0f}–{:.0f}"),
    "contrast": ("Contrast of the lesion", "{:.2f}–{:.2f}"),
}
BLACK: dict[str, Any] = {"color": "black", "linestyle": ""}
KEYS = {
    "better or worse": Line2D([], [], marker="o", **BLACK),
    "not significant or inconclusive": Line2D([], [], marker="o", markerfacecolor="none", **BLACK),
    "one seed": Line2D([], [], marker="|", **BLACK),
}


@styled()
def per_case_scores(tables: dict[str, pd.DataFrame], metric: str = "dice") -> Figure:
    """Each test case as a point, with mean and 95 % interval, one column for each network."""
    fig, axis = plt.subplots(figsize=(ONE_COLUMN, 2.4))
    for x, (name, table) in enumerate(tables.items()):
        values, pen = table[metric].to_numpy(float), style_of(name)
        spread = np.random.default_rng(0).uniform(-0.18, 0.18, len(values))
        axis.plot(x + spread, values, ".", color=pen.colour, alpha=0.45, markersize=3, zorder=1)
        limits = bootstrap_mean(values, table["group"].to_numpy())
        _interval(axis, x, table[metric].mean(), limits, pen, "y", label=name)
    axis.set_xticks(range(len(tables)), [_label(name) for name in tables])
    axis.set(ylabel=f"{METRIC_LABELS[metric]} of a test case", xlim=(-0.6, len(tables) - 0.4))
    counts = " or ".join(str(n) for n in sorted({len(table) for table in tables.values()}))
    what = (
        f"{METRIC_LABELS[metric]} of {counts} test cases, each a point, with mean and 95 % interval"
    )
    return _described(fig, f"{what}: {_names(tables)}.")


@styled("arm", "seed", "id", "group")
def ablation(per_case: pd.DataFrame, comparison: pd.DataFrame, metric: str = "dice") -> Figure:
    """Left, mean of each arm; right, method minus arm; both with 95 % interval and seeds.

    One row of charts for each data set and teacher. Filled markers on the right: better or worse.

    Parameters
    ----------
    per_case : DataFrame
        Scores of one split: arm, seed, id, group, the metric and columns of `statistics.FAMILY`.
    comparison : DataFrame
        From `statistics.compare_arms` of the same scores.
    """
    found = [(name, part, list(dict.fromkeys(part["arm"]))) for name, part in _parts(per_case)]
    heights = [0.55 + 0.2 * len(arms) for *_, arms in found]
    grid: dict[str, Any] = {"gridspec_kw": {"height_ratios": heights}, "sharey": "row"}
    height = sum(heights) / len(found)
    fig, axes = _charts(2 * len(found), height, KEYS, columns=2, **grid)
    for left, right, (name, part, arms) in zip(axes[::2], axes[1::2], found):
        places = {arm: -i for i, arm in enumerate(arms)}
        for arm, y in places.items():
            scores, pen = by_seed(part, arm, metric), style_of(arm)
            mean, *limits = case_mean(scores)
            _seeds(left, scores.mean(), y, pen.colour, "x")
            _interval(left, mean, y, limits, pen, "x", label=arm)
        _differences(right, _same_part(comparison, part), places)
        _arm_ticks(left, places)
        left.set_xlabel(f"{METRIC_LABELS[metric]}, mean over test cases\n{name}".strip())
        right.set_xlabel(f"{_direction(metric, 'method', 'other')}\n{name}".strip())
    where = f"{METRIC_LABELS[metric]}{_on(name for name, *_ in found)}"
    what = f"left, mean, 95 % interval and seeds of {_names(in_order(per_case))}"
    return _described(fig, f"{where}: {what}. Right, the method minus each.")


def _arm_ticks(axis: Axes, places: dict[str, int]) -> None:
    axis.set_yticks(list(places.values()), [_label(arm) for arm in places])
    axis.set_ylim(-len(places) + 0.4, 0.6)


def _direction(metric: str, arm: str, other: str) -> str:
    better = "right" if HIGHER_IS_BETTER[metric] else "left"
    text = f"{arm} minus {other}, {METRIC_LABELS[metric]} ({better}: {arm} better)"
    return text[0].upper() + text[1:]


def _differences(
    axis: Axes, comparison: pd.DataFrame, places: dict[str, int], varying: str = "other"
) -> None:
    """Differences with intervals and seeds; filled markers: better or worse."""
    for row in comparison.to_dict("records"):
        if (arm := row[varying]) in places:
            _seeds(axis, _of_seeds(row), places[arm], style_of(arm).colour, "x")
            x, y, limits = row["difference"], places[arm], (row["low"], row["high"])
            how = {"hollow": row["verdict"] not in SIGNIFICANT, "label": arm}
            _interval(axis, x, y, limits, style_of(arm), "x", **how)
    axis.axvline(0, color="black", linewidth=0.6, zorder=1)
    axis.locator_params(axis="x", nbins=6)


def _of_seeds(row: dict[Any, Any]) -> list[float]:
    return [value for name, value in row.items() if str(name).startswith("difference_seed")]


@styled("arm", "other", "difference", "low", "high", "metric", "verdict")
def forest(comparison: pd.DataFrame) -> Figure:
    """Differences between arms with 95 % interval and seeds, a chart for each data set and teacher.

    Filled markers: better or worse; hollow: any other verdict (`statistics.compare_arms`).

    Parameters
    ----------
    comparison : DataFrame
        From `statistics.compare_arms` (one arm minus each other) or `compare_with` (each arm minus
        one).
    """
    found, varying = list(_parts(comparison)), "other"
    arm, other, metric = comparison[["arm", "other", "metric"]].iloc[0]
    pair = ("method" if arm == "method" else _label(arm), "other")
    if comparison["arm"].nunique() > 1:
        varying, pair = "arm", ("arm", _label(other))
    arms = list(dict.fromkeys(comparison[varying]))
    places = {arm: -i for i, arm in enumerate(arms)}
    fig, axes = _charts(len(found), 0.6 + 0.2 * len(arms), KEYS, sharey=True)
    for axis, (name, part) in zip(axes, found):
        _differences(axis, part, places, varying)
        axis.set_xlabel(name)
        axis.xaxis.set_major_locator(MaxNLocator(4))
    _arm_ticks(axes[0], places)
    fig.supxlabel(_direction(metric, *pair), fontsize=7.5)
    what = _direction(metric, *(re.sub(r"\\mathrm|[${}]", "", text) for text in pair))
    where = _on(name for name, _ in found)
    return _described(fig, f"{what}, with 95 % intervals and seeds{where}: {_names(arms)}.")


@styled("arm", "other", "column", "third", "difference", "low", "high", "cases")
def tertiles(table: pd.DataFrame) -> Figure:
    """Differences in Dice in thirds of the lesions; a column of charts for each measure.

    Parameters
    ----------
    table : DataFrame
        From `statistics.by_tertile`, or several such tables concatenated.
    """
    found, measures = list(_parts(table)), list(table["column"].unique())
    pairs = list(dict.fromkeys(zip(table["arm"], table["other"])))
    differing = 0 if table["other"].nunique() == 1 else 1
    texts = [f"{_label(arm)} minus {_label(other)}" for arm, other in pairs]
    pens = {text: style_of(pair[differing]) for text, pair in zip(texts, pairs)}
    columns = len(measures) if len(measures) > 1 else 3
    how: dict[str, Any] = {"columns": columns, "sharey": True}
    fig, axes = _charts(len(found) * len(measures), 1.9, _handles(pens, linestyle=""), **how)
    charts = [(name, part, measure) for name, part in found for measure in measures]
    for axis, (name, part, measure) in zip(axes, charts):
        text, spread = MEASURES[measure]
        ticks = {}
        for i, (pair, pen) in enumerate(zip(pairs, pens.values())):
            wanted = [measure, *pair]
            own = (part[["column", "arm", "other"]] == wanted).all(axis=1)
            for row in part[own].itertuples():
                place = TERTILES.index(row.third)
                size = spread.format(row.at_least, row.at_most)
                ticks[place] = f"{row.third}\n{size}\n{row.cases} cases"
                x = place + 0.18 * (i - (len(pairs) - 1) / 2)
                how = {"label": " - ".join(pair)}
                _interval(axis, x, row.difference, (row.low, row.high), pen, "y", **how)
        axis.axhline(0, color="black", linewidth=0.6, zorder=1)
        axis.set_xticks(list(ticks), list(ticks.values()))
        axis.set(xlabel=", ".join(filter(None, (text, name))), xlim=(-0.5, 2.5))
    for axis in axes[::columns]:
        axis.set_ylabel("Difference in Dice")
    by = " and ".join(MEASURES[measure][0].lower() for measure in measures)
    compared = "; ".join(f"{label(arm)} minus {label(other)}" for arm, other in pairs)
    return _described(fig, f"Dice, {compared}, in thirds by {by}{_on(n for n, _ in found)}.")


# Training -----------------------------------------------------------------------------------------


@styled()
def training_curves(histories: dict[str, pd.DataFrame]) -> Figure:
    """Left, validation Dice of each run by epoch; right, every loss term of the last run.

    Parameters
    ----------
    histories : {arm or network: history}
    """
    fig, (left, right) = plt.subplots(1, 2, figsize=(TWO_COLUMNS, 2.2))
    for name, history in histories.items():
        how = style_of(name).line | {"marker": "", "label": _label(name)}
        left.plot(history["epoch"], history["val_dice"], **how)
    left.set(xlabel="Epoch", ylabel="Validation Dice", ylim=(0, 1))
    history = list(histories.values())[-1]
    terms = [n.removeprefix("loss_") for n in history if n.startswith("loss_")]
    for term in (term for term in terms if term != "total"):
        text, pen = _term_style(term)
        how = pen.line | {"marker": "", "label": text}
        right.plot(history["epoch"], history[f"loss_{term}"], **how)
    last = _label(list(histories)[-1])
    right.set(xlabel=f"Epoch of the {last}", ylabel="Loss before its weight", yscale="log")
    _plain_log(right.yaxis, 1, 2, 5)
    for axis in (left, right):
        axis.legend()
    _whole_epochs((left, right))
    what = f"Left, validation Dice by epoch of {_names(histories)}"
    return _described(fig, f"{what}. Right, losses of the last run.")


@styled("arm", "epoch", "mean", "low", "high")
def learning_curves(curves: pd.DataFrame) -> Figure:
    """Validation Dice of each arm by epoch: mean over seeds as line, their range as band.

    One chart for each data set and teacher. More than six arms are drawn in two charts: the arms of
    the method, and the baselines with the student alone and the method.

    Parameters
    ----------
    curves : DataFrame
        From `statistics.learning_curves`.
    """
    found, arms = list(_parts(curves)), in_order(curves)
    own = [arm for arm in arms if arm in ("alone", "feat", "edge", "method", "shuffled")]
    baselines = [arm for arm in arms if arm not in own or arm in ("alone", "method")]
    sheets = [arms] if len(arms) <= 6 else [own, baselines]
    columns = 3 if len(found) > 2 else 2
    fig, axes = _charts(len(sheets) * len(found), 1.9, _arm_handles(arms), columns, sharey=True)
    for i, axis in enumerate(axes):
        (name, part), sheet = found[i % len(found)], sheets[i // len(found)]
        for place, arm in enumerate(sheet):
            curve = part[part["arm"] == arm]
            _band(axis, curve["epoch"], curve, style_of(arm), arm, place / len(sheet))
        axis.set_xlabel(f"Epoch\n{name}".strip())
        if i % columns == 0:
            axis.set_ylabel("Validation Dice")
    _whole_epochs(axes)
    where = _on(name for name, _ in found)
    text = f"Validation Dice by epoch{where}, mean and range of the seeds: {_names(arms)}."
    return _described(fig, text)


@styled("epoch", "grad_seg")
def gradients(history: pd.DataFrame) -> Figure:
    """Gradient of each weighted loss term: above its norm, below its cosine with that of L_seg.

    They are taken at the layers that all terms of an arm reach. Mean over seeds as line, their
    range as band; one column for each arm.

    Parameters
    ----------
    history : DataFrame
        epoch, grad_TERM and cos_TERM; arm, seed and columns of `statistics.FAMILY` if runs differ.
    """
    history = history if "arm" in history else history.assign(arm="")
    measured = [n for n in history if n.startswith(("grad_", "cos_")) and history[n].notna().any()]
    terms = list(dict.fromkeys(name.partition("_")[2] for name in measured))
    runs = {
        ", ".join(filter(None, (_label(arm), name))): part[part["arm"] == arm]
        for name, part in _parts(history)
        for arm in in_order(part)
    }
    pens, count = dict(_term_style(term) for term in terms), len(runs)
    how: dict[str, Any] = {"columns": count, "sharex": True, "sharey": "row"}
    fig, axes = _charts(2 * count, 1.45, _handles(pens), **how)
    for i, axis in enumerate(axes):
        name, run = list(runs.items())[i % count]
        for j, (term, pen) in enumerate(zip(terms, pens.values())):
            column = f"{'grad' if i < count else 'cos'}_{term}"
            if column in run and run[column].notna().any():
                seeds = run.groupby("epoch")[column].agg(mean="mean", low="min", high="max")
                _band(axis, seeds.index, seeds, pen, term, j / len(terms))
    if history.filter(regex="^grad_").gt(0).any(axis=None):
        axes[0].set_yscale("log")
    for axis, name in zip(axes[count:], runs):
        axis.axhline(0, color="black", linewidth=0.6)
        axis.set(xlabel=f"Epoch\n{name}".strip(), ylim=(-1.05, 1.05))
    axes[0].set_ylabel("Norm of gradient")
    axes[count].set_ylabel("Cosine with that of\n" + _typeset("L_seg"))
    _whole_epochs(axes)
    shown = _names(term for term in terms if term in TERMS)
    who = _names(filter(None, in_order(history))) or "one run"
    where = _on(name for name, _ in _parts(history))
    what = f"Gradients by epoch{where}: norms of {shown}, and cosines with L_seg; {who}"
    return _described(fig, f"{what}.")


def _term_style(term: str) -> tuple[str, Style]:
    """A loss term is drawn as the arm that has it alone; two terms have their cosine."""
    if term == "seg":
        return _label("seg"), Style("#000000", ".", "")
    if term in TERMS:
        return _label(term).removeprefix("+ "), style_of(term)
    return _typeset(" and ".join(f"L_{part}" for part in term.split("_"))), style_of(term)


def _factor_text(factor: str, value: Any) -> str:
    return f"{value:.0%}" if factor == "labels" else textwrap.fill(label(value), 10)


FACTORS = {"budget": "Epochs", "labels": "Training cases with a mask", "teacher": "Teacher"}


@styled("arm", "difference", "low", "high", "verdict")
def when_teacher_helps(comparison: pd.DataFrame, base: dict[str, Any] | None = None) -> Figure:
    """Gain in Dice over the student alone by epochs, fraction of labels and teacher.

    One chart for each of the three that varies, in which the other two have their value in `base`.
    95 % intervals; seeds as ticks; filled markers: better or worse.

    Parameters
    ----------
    comparison : DataFrame
        From `statistics.compare_with` of per-case scores with the columns budget (epochs), labels
        (fraction in 0..1) and teacher.
    base : {column: value}, optional
        By default the value that most rows have.
    """
    known = [name for name in FACTORS if name in comparison]
    chosen = {name: comparison[name].mode().iloc[0] for name in known} | (base or {})
    varying, arms = [name for name in known if comparison[name].nunique() > 1], in_order(comparison)
    if not varying:
        return _nothing()
    fig, axes = _charts(len(varying), 2.2, _arm_handles(arms, linestyle=""), sharey=True)
    for axis, factor in zip(axes, varying):
        fixed = {name: value for name, value in chosen.items() if name != factor}
        part = comparison[(comparison[list(fixed)] == pd.Series(fixed)).all(axis=1)]
        values = list(part[factor].unique())
        values = values if factor == "teacher" else sorted(values)
        for row in part.to_dict("records"):
            pen = style_of(row["arm"])
            x = values.index(row[factor]) + 0.22 * (arms.index(row["arm"]) - (len(arms) - 1) / 2)
            _seeds(axis, _of_seeds(row), x, pen.colour, "y")
            limits, hollow = (row["low"], row["high"]), row["verdict"] not in SIGNIFICANT
            how = {"hollow": hollow, "label": row["arm"]}
            _interval(axis, x, row["difference"], limits, pen, "y", **how)
        axis.axhline(0, color="black", linewidth=0.6, zorder=1)
        axis.set_xticks(range(len(values)), [_factor_text(factor, value) for value in values])
        at = [
            f"{FACTORS[n].lower()}: {_factor_text(n, v)}".replace("\n", "")
            for n, v in fixed.items()
            if n in varying
        ]
        axis.set(xlabel="\n".join([FACTORS[factor], *at]), xlim=(-0.6, len(values) - 0.4))
    axes[0].set_ylabel("Gain in Dice\nover the student alone")
    by = ", ".join(FACTORS[name].lower() for name in varying)
    text = f"Gain in Dice over the student alone by {by}, with 95 % intervals and seeds"
    return _described(fig, f"{text}: {_names(arms)}.")


# Cost and calibration -----------------------------------------------------------------------------


@styled("model", "engine", "precision", "pixels", "latency_ms_median")
def latency(cost: pd.DataFrame) -> Figure:
    """Milliseconds for one image, 10th to 90th percentile, by network and engine; int8 is hollow.

    Parameters
    ----------
    cost : DataFrame
        model, engine, precision, pixels, latency_ms_median, _p10 and _p90, such as
        `tables.committed("cost")`.
    """
    models, sizes = list(dict.fromkeys(cost["model"])), sorted(cost["pixels"].unique())
    engines = cost["engine"].unique()
    pens = {name: Style(f"C{i}", "os^Dv<"[i % 6], (1, 1e3)) for i, name in enumerate(engines)}
    handles = _handles({name.partition(" (")[0]: pen for name, pen in pens.items()}, linestyle="")
    if "int8" in set(cost["precision"]):
        handles["int8"] = Line2D([], [], marker="o", markerfacecolor="none", **BLACK)
    how: dict[str, Any] = {"columns": 2, "sharey": True}
    fig, axes = _charts(len(sizes), 0.5 + 0.24 * len(models), handles, **how)
    for axis, size in zip(axes, sizes):
        for row in cost[cost["pixels"] == size].itertuples():
            int8 = row.precision == "int8"
            shift = 0.14 * ((len(pens) - 1) / 2 - list(pens).index(row.engine)) - 0.05 * int8
            limits = row.latency_ms_p10, row.latency_ms_p90
            y = shift - models.index(row.model)
            pen = pens[row.engine]
            _interval(axis, row.latency_ms_median, y, limits, pen, "x", hollow=int8)
        axis.set(xscale="log", xlabel=f"Latency at {size} px, one thread (ms)")
        _plain_log(axis.xaxis)
    _arm_ticks(axes[0], {model: -i for i, model in enumerate(models)})
    at = f"at {', '.join(map(str, sizes))} px on one thread, 10th to 90th percentile"
    return _described(fig, f"Latency of {_names(models)} {at}, in {', '.join(handles)}.")


@styled("dataset", "model", "dice", "low", "high")
def pareto(points: pd.DataFrame, x: str = "macs") -> Figure:
    """Dice with 95 % interval against cost, a chart for each data set.

    A line joins the networks that no other network beats in both.

    Parameters
    ----------
    points : DataFrame
        dataset, model, dice, low, high and the column `x`, from `tables.cost_points`.
    """
    what = {"macs": "Multiplications for one image", "latency_ms_median": "Latency (ms)"}.get(x, x)
    sets = list(dict.fromkeys(points["dataset"]))
    handles = _arm_handles(points["model"].unique(), linestyle="")
    fig, axes = _charts(len(sets), 2, handles, columns=3)
    for axis, name in zip(axes, sets):
        part = points[points["dataset"] == name].sort_values([x, "dice"], ascending=[True, False])
        front = part[part["dice"].cummax().diff().fillna(1) > 0]
        axis.plot(front[x], front["dice"], color="#999999", linewidth=0.8, zorder=0)
        for row in part.to_dict("records"):
            limits, pen = (row["low"], row["high"]), style_of(row["model"])
            _interval(axis, row[x], row["dice"], limits, pen, "y", label=row["model"])
        axis.set(xscale="log", xlabel=f"{what}\n{name}".strip())
        axis.margins(x=0.15)
    axes[0].set_ylabel("Dice on test cases")
    text = f"Dice on test cases, with 95 % interval, against {what.lower()}{_on(sets)}"
    return _described(fig, f"{text}: {_names(points['model'])}.")


@styled()
def calibration(found: dict[str, Calibration]) -> Figure:
    """Reliability diagram: fraction of pixels that are lesion by predicted probability.

    Below, the fraction of all pixels in each bin. The legend has the expected calibration error.

    Parameters
    ----------
    found : {arm or network: Calibration}
        From `statistics.calibration`.
    """
    how: dict[str, Any] = {"gridspec_kw": {"height_ratios": (3, 1)}, "sharex": True}
    fig, (above, below) = plt.subplots(2, 1, figsize=(ONE_COLUMN, 3.4), **how)
    above.plot([0, 1], [0, 1], color="black", linewidth=0.6, zorder=1)
    for name, of in found.items():
        pen, bins = style_of(name), of.bins[of.bins["pixels"] > 0]
        text = f"{_label(name)}, ECE {of.ece:.4f}"
        above.plot(bins["predicted"], bins["observed"], label=text, **pen.line)
        below.plot(bins["predicted"], bins["pixels"] / bins["pixels"].sum(), **pen.line)
    above.set(ylabel="Fraction that is lesion", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    below.set(ylabel="Fraction of\nall pixels", xlabel="Predicted probability", yscale="log")
    above.legend(loc="upper left")
    what = (
        "Fraction of pixels that are lesion against predicted probability, and pixels in each bin"
    )
    return _described(fig, f"{what}: {_names(found)}.")
