"""Figures for notebooks and papers, in one style, with an alternative text.

A function returns a figure whose label is its alternative text; `publish` shows and writes it. In a
paper a figure is 85 or 174 mm wide; a notebook shows it larger.
"""

from __future__ import annotations

import io
import re
import sys
import zlib
from base64 import b64encode
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, ParamSpec
from xml.etree import ElementTree

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.patheffects import AbstractPathEffect, withStroke
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from .. import results
from ..config import LesionKDError
from ..evaluate import HIGHER_IS_BETTER, bootstrap_mean, mask_dice
from ..losses import TERMS
from ..predict import OUTLINE
from .statistics import (
    SETTING,
    SIGNIFICANT,
    TEACHER,
    TERTILES,
    by_seed,
    by_training,
    case_mean,
    in_order,
    settings,
    split_arm,
)
from .tables import METRIC_LABELS, label

if TYPE_CHECKING:
    from matplotlib.typing import LineStyleType, MarkerType

    from ..data.prepare import Prepared
    from .inspect import NodeView, RefinementView

P = ParamSpec("P")
ONE_COLUMN, TWO_COLUMNS = 85 / 25.4, 174 / 25.4
"""Widths of a figure in inches: 85 and 174 mm."""
PHOTO = "photo"
"""Label of an image with continuous colours."""
NOTEBOOK_SCALE, NOTEBOOK_DPI = 1.25, 160
"""A notebook shows a figure this much larger than a paper, with 9 pt, at this resolution."""


# Style --------------------------------------------------------------------------------------------


class Style(NamedTuple):
    """How an arm or network is drawn, in charts and on images.

    Marker and dash alone tell the arms apart without colour.
    """

    colour: str
    marker: MarkerType
    dash: tuple[float, ...] = ()  # in points; () is a solid line

    @property
    def linestyle(self) -> LineStyleType:
        """For matplotlib."""
        return (0, self.dash) if self.dash else "-"

    @property
    def rim(self) -> list[AbstractPathEffect]:
        """A dark rim around a colour that would be lost on white paper."""
        light = sum(to_rgb(self.colour)) > 1.9
        return [withStroke(linewidth=2.2, foreground="#555555")] if light else []

    def key(self, line: bool = True, hollow: bool = False) -> Line2D:
        """What a legend shows."""
        drawn = Line2D([], [], color=self.colour, marker=self.marker, path_effects=self.rim)
        drawn.set_linestyle(self.linestyle if line else "")
        drawn.set_markerfacecolor("none" if hollow else self.colour)
        return drawn


# Every part of a colour is a multiple of 17, which `notebook_image` keeps. Teacher, student and
# student alone are drawn on images: no skin, mucosa or grey tissue has these colours.
YELLOW, CYAN, MAGENTA = "#EEDD33", "#{:02X}{:02X}{:02X}".format(*OUTLINE), "#FF0099"
STYLES = {
    "teacher": Style(YELLOW, "p"),
    "resnet34_unet": Style(YELLOW, "p"),
    "efficientnet_lite2_unet": Style(YELLOW, (4, 1, 0), (9, 1, 2, 1)),
    "unet64": Style(YELLOW, "H", (3, 2)),
    "student": Style(CYAN, "D"),
    "method": Style(CYAN, "D"),
    "alone": Style(MAGENTA, "o", (4, 1.5)),
    "seg": Style("#000000", "."),
    "feat": Style("#4477AA", "s", (6, 1.5, 1, 1.5)),
    "edge": Style("#117733", "^", (3, 1, 1, 1, 1, 1)),
    "shuffled": Style("#777777", "v", (1, 1)),
    "edge_shuffled": Style("#AAAAAA", (3, 1, 0), (1, 1, 4, 1)),
    "kd": Style("#EE7733", "P", (8, 2)),
    "boundary_kd": Style("#778800", (5, 1, 0), (10, 1, 1, 1)),
    "cwd": Style("#332288", ">", (1, 2.5)),
    "dist": Style("#882255", "h", (5, 3)),
    "sobel": Style("#009988", "d", (3, 3)),
    "sobel_mask": Style("#44BB99", (4, 0, 0), (3, 1, 3, 3)),
    "pseudo": Style("#AA5500", "8", (6, 1, 6, 3)),
    "fitnets": Style("#AA77DD", "X", (2, 1)),
    "at": Style("#BB9955", "<", (8, 1, 2, 1)),
    "otsu": Style("#000000", "x", (1, 1.5)),
}
TRUTH, TRUTH_FILL = "#FFFFFF", "#3399FF"
SPARE_COLOURS = ("#004488", "#BB5566", "#DDAA33", "#663333", "#771155", "#6699CC", "#997700")
SPARE_MARKERS: tuple[MarkerType, ...] = ((4, 0, 45), (3, 1, 180), (3, 0, 180), (6, 0, 0), (8, 1, 0))
SPARE_DASHES = ((9.0, 1.0), (2.0, 4.0), (6.0, 2.0, 2.0, 2.0))
"""For other arms; their numbers have no common divisor."""


def style_of(name: str) -> Style:
    """The style of an arm or network; another loss term or name gets one of the spare styles.

    An arm with more epochs has the marker and hue of its arm, darker.
    """
    base, times = split_arm(name)
    pen = STYLES.get(base) or _spare_style(base)
    return _longer(pen, times)


def _longer(pen: Style, times: float) -> Style:
    """The style of an arm that is trained so many times as long."""
    darker = 0.0 if times == 1 else 0.25 if times <= 2 else 0.5
    return pen._replace(colour=_darker(pen.colour, darker)) if darker else pen


def _spare_style(name: str) -> Style:
    own = [term for term in TERMS if term not in STYLES]
    place = own.index(name) if name in own else zlib.crc32(name.encode())
    return Style(
        SPARE_COLOURS[place % len(SPARE_COLOURS)],
        SPARE_MARKERS[place % len(SPARE_MARKERS)],
        SPARE_DASHES[place % len(SPARE_DASHES)],
    )


def _darker(colour: str, fraction: float) -> str:
    red, green, blue = to_rgb(colour)
    kept = 1 - fraction
    return to_hex((kept * red, kept * green, kept * blue))


def _typeset(text: str) -> str:
    """L_feat as a symbol."""
    return re.sub(r"\bL_([a-z]+)", r"$L_\\mathrm{\1}$", text)


def _label(name: str) -> str:
    return _typeset(label(name))


def style() -> AbstractContextManager[None]:
    """The style of all figures, for a `with` block."""
    context: AbstractContextManager[None] = plt.style.context("lesionkd_core.analysis.lesionkd")
    return context


def styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Decorator: draw in the style of all figures; of an empty table, that it is empty."""

    @wraps(draw)
    def drawn(*args: P.args, **options: P.kwargs) -> Figure:
        first = next(iter((*args, *options.values())))
        with style():
            if isinstance(first, Sized) and not len(first):
                return _nothing()
            return draw(*args, **options)

    return drawn


# Showing and writing ------------------------------------------------------------------------------


def save(fig: Figure, name: str, folder: Path, data: pd.DataFrame | None = None) -> None:
    """Write NAME.pdf, .svg and .png (300 dpi) with the alternative text, and `data` as NAME.csv.

    The same figure gives the same bytes.
    """
    folder, text = Path(folder), fig.get_label()
    metadata = {
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
    """Show a figure in a notebook and close it.

    Its label is the alternative text, which is also the output's text and what nbval compares. So
    it says what is drawn, without numbers that differ between machines.
    """
    if not (text := str(fig.get_label())):
        raise LesionKDError(
            "the figure has no alternative text; say what it shows: fig.set_label('...')"
        )
    kind, content, width = notebook_image(fig)
    plt.close(fig)
    _show(f"image/{kind}", b64encode(content).decode(), text, {"width": width})


def _show(kind: str, content: str, text: str, about: dict[str, int]) -> None:
    from IPython.display import display as show_in_notebook

    data = {kind: content, "text/plain": text}
    show_in_notebook(data, metadata={kind: {"alt": text} | about}, raw=True)


def notebook_image(fig: Figure) -> tuple[str, bytes, int]:
    """A figure as JPEG if it has photos, else as PNG, and the width in px at which it is shown.

    The PNG is small because each channel has 16 levels, and the 256 most frequent of these colours
    are kept: the colours of `STYLES` do not change, and the rest, a few pixels at the border of
    lines, become the nearest colour that is kept.
    """
    from PIL import Image

    drawn, content = io.BytesIO(), io.BytesIO()
    photo = any(shown.get_label() == PHOTO for axis in fig.axes for shown in axis.images)
    dpi = NOTEBOOK_DPI if photo else NOTEBOOK_DPI * NOTEBOOK_SCALE
    with style():
        fig.savefig(drawn, format="png", dpi=dpi, bbox_inches="tight", pad_inches=0.02)
    image = Image.open(drawn).convert("RGB")
    width = round(image.width * 96 * NOTEBOOK_SCALE / dpi)
    if photo:
        image.save(content, "JPEG", quality=30, optimize=True, progressive=True)
        return "jpeg", content.getvalue(), width
    image = image.point([17 * round(level / 17) for level in range(256)] * 3)
    frequent = sorted(image.getcolors(1 << 20) or [], reverse=True)[:256]
    palette = Image.new("P", (1, 1))
    palette.putpalette(np.ravel([colour for _, colour in frequent]).tolist())
    image = image.quantize(palette=palette, dither=Image.Dither.NONE)
    image.save(content, "PNG", optimize=True)
    return "png", content.getvalue(), width


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
    """The parts of a table that are compared within, each named by what tells them apart."""
    naming: list[str] = []
    found = list(settings(table))
    for column in (name for name in SETTING if name in table and table[name].nunique() > 1):
        names = {tuple(setting[name] for name in naming) for setting, _ in found}
        if len(names) == len(found):
            break
        naming.append(column)
    for setting, part in found:
        yield ", ".join(dict.fromkeys(label(str(setting[name])) for name in naming)), part


def _same_part(table: pd.DataFrame, part: pd.DataFrame) -> pd.DataFrame:
    """The rows of another table that belong to a part."""
    shared = [name for name in SETTING if name in table and name in part]
    return table[(table[shared] == part[shared].iloc[0]).all(axis=1)] if shared else table


def _names(names: Iterable[str]) -> str:
    return "; ".join(dict.fromkeys(label(name) for name in names if name))


def _on(names: Iterable[str]) -> str:
    """' on busi; isic2018' of the parts of a table; empty if there is one without a name."""
    found = [name for name in dict.fromkeys(names) if name]
    return f" on {'; '.join(found)}" if found else ""


BLACK = Style("black", "o")
KEYS = {
    "better or worse": BLACK.key(line=False),
    "any other verdict": BLACK.key(line=False, hollow=True),
    "one training (seed or fold)": Style("black", "|").key(line=False),
}


def _legend(fig: Figure, keys: Mapping[str, Line2D]) -> None:
    """A legend above all charts, for which the figure grows."""
    longest = max(len(text) for text in keys)
    abreast = max(1, min(6, int(fig.get_figwidth() / (0.055 * longest + 0.5))))
    texts = [_typeset(text) for text in keys]
    fig.legend(keys.values(), texts, loc="outside upper center", ncols=abreast, handlelength=2.8)
    fig.set_figheight(fig.get_figheight() + 0.16 * -(-len(keys) // abreast))


def _plain_log(axis: Axis, *steps: int) -> None:
    """A logarithmic axis with plain numbers, at the given steps of each decade."""
    axis.set_major_locator(LogLocator(subs=steps or (1,)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


# Images of cases ----------------------------------------------------------------------------------


def panels(rows: int, columns: int, ratio: float = 1.0) -> tuple[Figure, np.ndarray]:
    """A grid of pictures without axes, panels `ratio` times as high as wide; (rows, columns)."""
    width = ONE_COLUMN if columns == 1 or (columns == 2 and rows > 1) else TWO_COLUMNS
    size = (width, width / max(columns, 2) * rows * ratio)
    fig, axes = plt.subplots(rows, columns, figsize=size, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    return fig, axes


def draw_image(axis: Axes, image: np.ndarray, title: str = "", /, **masks: np.ndarray) -> None:
    """An image with the outlines of masks, each in the colour of its name with a dark rim.

    A prediction is lightly filled. `truth` is a thin white dashed line, filled if it is alone.
    """
    if image.ndim == 3:
        axis.imshow(image, interpolation="bicubic", label=PHOTO)
    else:
        axis.imshow(image)
    if title:
        axis.set_title(title, loc="center")
    for name, mask in sorted(masks.items(), key=lambda item: item[0] == "truth"):
        if not mask.any():
            continue
        true = name == "truth"
        colour = TRUTH if true else style_of(name).colour
        if not true or len(masks) == 1:
            fill = TRUTH_FILL if true else colour
            axis.contourf(mask, levels=[0.5, 1.5], colors=[fill], alpha=0.25)
        drawn = axis.contour(
            mask,
            levels=[0.5],
            colors=[colour],
            linewidths=0.7 if true else 1.0,
            linestyles=[(0, (3, 2.5))] if true else "-",
        )
        drawn.set_path_effects([withStroke(linewidth=1.9, foreground="black", alpha=0.7)])


def _row_labels(axes: np.ndarray, names: Iterable[str]) -> None:
    for axis, name in zip(axes[:, 0], names):
        where = axis.transAxes
        axis.text(-0.05, 0.5, name, transform=where, rotation=90, ha="right", va="center")


def _short(name: str) -> str:
    """A longer title would run into its neighbour."""
    return name if len(name) <= 14 else f"…{name[-13:]}"


@styled
def cases(prepared: Prepared, rows: Sequence[int], columns: int = 6) -> Figure:
    """Prepared images with their mask, and id and split as title."""
    fig, axes = panels(-(-len(rows) // columns), columns, ratio=1.2)
    for axis, row in zip(axes.flat, rows):
        case = prepared.cases.iloc[row]
        title = f"{_short(case['id'])}\n{case['split']}"
        draw_image(axis, prepared.images[row], title, truth=prepared.masks[row])
    names = ", ".join(prepared.cases["id"].iloc[rows])
    return _described(fig, f"{len(rows)} prepared images with the outline of their mask: {names}.")


@styled
def pairs(prepared: Prepared, table: pd.DataFrame) -> Figure:
    """Pairs of images, one above the other, and how alike they are.

    Parameters
    ----------
    table : DataFrame
        From `inspect.example_pairs`.
    """
    fig, axes = panels(2, max(2, len(table)), ratio=1.14)
    ids, said = prepared.cases["id"], []
    for (top, bottom), row in zip(axes.T, table.itertuples()):
        alike = f"{row.bits} bits, r {min(row.correlation, row.content):.2f}"
        draw_image(top, prepared.images[row.first], f"{alike}\n{_short(ids[row.first])}")
        draw_image(bottom, prepared.images[row.second], _short(ids[row.second]))
        said.append(f"{ids[row.first]} and {ids[row.second]}, {alike}")
    what = "Pairs of images, the distance of their hashes and the correlation r of their details"
    return _described(fig, f"{what}: {'; '.join(said) or 'none'}.")


@styled
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


@styled
def edges(prepared: Prepared, rows: Sequence[int], levels: Mapping[str, np.ndarray]) -> Figure:
    """Rows are cases: the image with its mask, and its edge label at each named resolution."""
    fig, axes = panels(len(rows), 1 + len(levels), ratio=1.04)
    for i, (line, row) in enumerate(zip(axes, rows)):
        draw_image(line[0], prepared.images[row], truth=prepared.masks[row])
        for axis, stack in zip(line[1:], levels.values()):
            draw_image(axis, stack[i])
    for axis, text in zip(axes[0], ("image and mask", *levels)):
        axis.set_title(text, loc="center")
    text = f"{len(rows)} images with their mask, and edge labels: {'; '.join(levels)}."
    return _described(fig, text)


@styled
def segmentations(
    prepared: Prepared, rows: Sequence[int], predicted: Mapping[str, np.ndarray]
) -> Figure:
    """Columns are cases: the image, and below it the mask of each network, with the true one.

    Parameters
    ----------
    predicted : {network: (len(rows), S, S) bool}
    """
    fig, axes = panels(1 + len(predicted), len(rows), ratio=1.13)
    for i, (line, row) in enumerate(zip(axes.T, rows)):
        image, truth = prepared.images[row], prepared.masks[row]
        draw_image(line[0], image, _short(prepared.cases["id"].iloc[row]))
        for axis, (name, masks) in zip(line[1:], predicted.items()):
            [dice] = mask_dice(masks[i][None] > 0, truth[None] > 0)
            draw_image(axis, image, f"Dice {dice:.2f}", truth=truth, **{name: masks[i]})
    _row_labels(axes, ("image", *map(_label, predicted)))
    what = f"and below each the mask of {_names(predicted)}, with the true mask as a dashed line"
    return _described(fig, f"{len(rows)} images, {what}.")


def viewer(
    prepared: Prepared, rows: Sequence[int], probabilities: Mapping[str, np.ndarray]
) -> None:
    """Explore cases in JupyterLab: sliders for case and threshold, overlays to switch on and off.

    Parameters
    ----------
    rows : sequence of int
        Rows of `prepared`.
    probabilities : {network: (len(rows), S, S)}
    """
    if not results.live_bar() or "ipykernel" not in sys.modules:
        print("sliders for the case and the threshold: run this cell in JupyterLab")
        return
    import ipywidgets as widgets
    from IPython.display import display as show

    case = widgets.IntSlider(0, 0, len(rows) - 1, description="case")
    threshold = widgets.FloatSlider(0.5, min=0.01, max=0.99, step=0.01, description="threshold")
    names = ("truth", *probabilities)
    boxes = [widgets.Checkbox(True, description=name, indent=False) for name in names]
    picture = widgets.Image(format="png")

    def draw(_: object = None) -> None:
        i, row = case.value, rows[case.value]
        masks = {name: stack[i] > threshold.value for name, stack in probabilities.items()}
        masks["truth"] = prepared.masks[row]
        chosen = {box.description: masks[box.description] for box in boxes if box.value}
        buffer = io.BytesIO()
        with style():
            fig, axes = panels(1, 1, ratio=2)
            draw_image(axes[0, 0], prepared.images[row], prepared.cases["id"].iloc[row], **chosen)
            fig.savefig(buffer, format="png", dpi=NOTEBOOK_DPI)
            plt.close(fig)
        picture.value = buffer.getvalue()

    for control in (case, threshold, *boxes):
        control.observe(draw, "value")
    draw()
    show(widgets.VBox([case, threshold, widgets.HBox(boxes), picture]))


@styled
def lesion_sizes(cases: pd.DataFrame) -> Figure:
    """Lesion size and contrast of the cases of each split.

    Parameters
    ----------
    cases : DataFrame
        `Prepared.cases`: split, lesion_fraction and contrast. Cases without a lesion are left out.
    """
    lesions = cases[cases["lesion_fraction"] > 0]
    lesions = lesions.assign(percent=100 * lesions["lesion_fraction"])
    splits = [name for name in ("train", "val", "test") if name in set(lesions["split"])]
    colours = ["#000000", "#EE7733", "#0077BB"][: len(splits)]
    fig, axes = plt.subplots(1, 2, figsize=(TWO_COLUMNS, 1.9), sharey=True)
    how: dict[str, Any] = {"hue": "split", "hue_order": splits, "palette": colours, "bins": 12}
    how |= {"element": "step", "fill": False, "stat": "percent", "common_norm": False}
    for axis, column in zip(axes, ("percent", "contrast")):
        sns.histplot(lesions, x=column, ax=axis, log_scale=column == "percent", **how)
        keys = axis.get_legend().legend_handles
        for dash, *drawn in zip(("-", "--", ":"), axis.lines[::-1], keys):
            plt.setp(drawn, linestyle=dash)
    axes[0].get_legend().remove()
    sns.move_legend(axes[1], "upper left", bbox_to_anchor=(1, 1), title=None)
    _plain_log(axes[0].xaxis, 1, 3)
    axes[0].set(xlabel="Lesion size (% of the image)", ylabel="Cases of the split (%)")
    axes[1].set(xlabel="Contrast: grey of the lesion minus that of a ring around it")
    what = "left, size of the lesion; right, its contrast"
    return _described(fig, f"Distribution of the cases of {', '.join(splits)}: {what}.")


# Maps of the networks -----------------------------------------------------------------------------


def _draw_map(axis: Axes, values: np.ndarray, scale: float, title: str) -> None:
    """A map (h, w) on a scale from -scale (purple) to scale (orange)."""
    axis.set_axis_off()
    axis.imshow(values, cmap="PuOr_r", vmin=-scale, vmax=scale)
    axis.set_title(title, loc="center")


@styled
def refinement(image: np.ndarray, view: RefinementView) -> Figure:
    """One channel of T, T' = max(T, m) and the connected S on one colour scale (step S3).

    `view` is from `inspect.refinement_view`.
    """
    fig, axes = panels(1, 4, ratio=1.12)
    draw_image(axes[0, 0], image, "image")
    maps = [stack[view.channel] for stack in (view.teacher, view.target, view.student)]
    scale = float(np.abs(maps).max()) or 1.0
    titles = ("T, before its ReLU", "T' = max(T, m)", "S, after the connector")
    for axis, values, title in zip(axes[0, 1:], maps, titles):
        _draw_map(axis, values, scale, title)
    fig.colorbar(axes[0, -1].images[0], ax=axes[0, -1], shrink=0.75)
    text = "the teacher's T before its ReLU, the target T' = max(T, m), the student's connected S"
    return _described(fig, f"An image, and one channel on one colour scale: {text}.")


# fmt: off
NODE_COLOURS = (  # given to the live nodes of a case in turn
    "#EE3377", "#33BBEE", "#EEDD33", "#228833", "#7744CC", "#EE7733", "#005588", "#99DD55",
    "#AA5500", "#FFAABB", "#44BB99", "#BB0000", "#BBAAFF", "#777700", "#005544", "#880066",
)
# fmt: on


@styled
def nodes(image: np.ndarray, views: Mapping[str, NodeView]) -> Figure:
    """The nodes of the graph of L_edge on one case (step S4): anchors, and each network's P.

    Left, the edge pixels of each node, with its number. Then, of each network, every pixel in the
    colour of its most likely node, paler if that is less likely; no colour: the background's node.

    Parameters
    ----------
    image : (S, S, 3) uint8
    views : {network: NodeView}
        From `inspect.node_views`, of the same image.
    """
    first = next(iter(views.values()))
    live = np.flatnonzero(first.live).tolist()
    edge_nodes = [node for node in live if node != first.background]
    colours = dict(zip(edge_nodes, NODE_COLOURS * len(edge_nodes)))
    fig, axes = panels(1, max(3, 1 + len(views)), ratio=1.1)
    for axis in axes[0, 1 + len(views) :]:
        axis.remove()
    _draw_nodes(axes[0, 0], image, first.members, colours, first)
    axes[0, 0].set_title(f"edge pixels of {len(edge_nodes)} nodes", loc="center")
    for axis, (who, view) in zip(axes[0, 1:], views.items()):
        _draw_nodes(axis, image, view.projection, colours, view)
        axis.plot(*np.argwhere(view.edge > 0).T[::-1], ".", color="black", markersize=1.2)
        axis.set_title(f"{_label(who)}: node of each pixel", loc="center")
    what = f"the edge pixels of its {len(edge_nodes)} nodes, and the most likely node of each pixel"
    return _described(fig, f"An image, {what} for {_names(views)}.")


def _draw_nodes(
    axis: Axes, image: np.ndarray, weight: np.ndarray, colours: Mapping[int, str], view: NodeView
) -> None:
    """The grey image under the colour of each pixel's heaviest node; weight (K, h, w)."""
    height, width = view.edge.shape
    grey = 0.5 + 0.5 * image.mean(-1) / 255
    axis.imshow(grey, extent=(-0.5, width - 0.5, height - 0.5, -0.5), vmin=0, vmax=1)
    painted = np.zeros((height, width, 4))
    for node, colour in colours.items():
        here = (weight.argmax(0) == node) & (weight[node] > 0)
        painted[here, :3] = to_rgb(colour)
        painted[here, 3] = 0.35 + 0.6 * weight[node][here]
    axis.imshow(painted, label=PHOTO)
    for node in colours:
        y, x = view.anchors[node]
        drawn = axis.text(x, y, str(node), ha="center", va="center", weight="bold")
        drawn.set_path_effects([withStroke(linewidth=1.6, foreground="white")])


# The method on small numbers ----------------------------------------------------------------------


@styled
def partial_l2(curves: pd.DataFrame) -> Figure:
    """What one value S of the student costs, for a positive and a negative target T' (step S3).

    Parameters
    ----------
    curves : DataFrame
        From `inspect.partial_l2_curves`.
    """
    fig, axes = plt.subplots(1, 2, figsize=(TWO_COLUMNS, 1.9), sharey=True)
    top, least = curves["cost"].max(), curves["student"].min()
    for axis, (target, curve) in zip(axes, curves.groupby("target", sort=False)):
        axis.plot(curve["student"], curve["cost"], color=CYAN, linewidth=2)
        axis.axvline(target, color="black", linewidth=0.6, linestyle="--")
        axis.text(target, top, f" T' = {target:g}", va="top")
        title = "T' > 0: S should equal T'"
        if target < 0:
            title = "T' < 0: S should not exceed T'"
            axis.axvspan(least, target, color="#DDDDDD", linewidth=0)
            axis.text((least + target) / 2, top / 3, "costs nothing", ha="center")
        axis.set(title=title, xlabel="S, the student's value", xmargin=0)
    axes[0].set_ylabel("Cost of one element")
    what = "against the student's value S, for a positive and a negative target T'"
    return _described(fig, f"The cost of one element in the partial L2 {what}.")


@styled
def margin(values: np.ndarray, margin: float) -> Figure:
    """Histogram of a channel T of the teacher; values below the margin m are raised to it."""
    fig, axis = plt.subplots(figsize=(TWO_COLUMNS, 1.6))
    counts, borders = margin_histogram(values, margin)
    colours = np.where(borders[:-1] < margin, "#BBAAFF", "#777777")
    axis.bar(borders[:-1], counts, np.diff(borders), color=colours, align="edge")
    axis.axvline(margin, color="black", linewidth=1.2)
    axis.axvline(0, color="black", linewidth=0.6, linestyle=":")
    top = counts.max()
    axis.text(margin, 1.02 * top, f"margin m = {margin:.2f} ", ha="right")
    axis.text(0, 1.02 * top, " 0")
    axis.set(xlabel="Value of T", ylabel="Pixels", ylim=(0, 1.2 * top))
    return _described(fig, "Histogram of a channel T of the teacher, with the margin m and with 0.")


def margin_histogram(values: np.ndarray, margin: float) -> tuple[np.ndarray, np.ndarray]:
    """Counts and borders of bins of equal width, one of whose borders is the margin."""
    width = float(np.ptp(values)) / 40 or 1.0
    below = np.floor((values.min() - margin) / width)
    above = np.ceil((values.max() - margin) / width)
    borders = margin + width * np.arange(min(below, -1), max(above, 1) + 1)
    return np.histogram(values, borders)[0], borders


@styled
def projection(x: np.ndarray, edge: np.ndarray, projections: Mapping[str, np.ndarray]) -> Figure:
    """A small map, and how each of its pixels is shared between the nodes, by several rules.

    Parameters
    ----------
    x, edge : (C, h, w), (h, w)
        Edge pixels are framed.
    projections : {rule: (K, h w)}
        P; the columns sum to 1.
    """
    channels, height, width = x.shape
    count = max(channels, len(projections))
    size = (TWO_COLUMNS, 0.95 * count + 0.4)
    fig, axes = plt.subplots(count, 2, figsize=size, squeeze=False, width_ratios=(1, 4.5))
    how: dict[str, Any] = {"annot": True, "cbar": False, "linewidths": 0.5}
    for i, (axis, channel) in enumerate(zip(axes[:, 0], x)):
        sns.heatmap(channel, ax=axis, cmap="Greys", vmax=2 * np.abs(x).max(), fmt="g", **how)
        axis.set(title=f"X, channel {i}", xticks=[], yticks=[], aspect="equal")
        for row, column in np.argwhere(edge > 0):
            axis.add_patch(Rectangle((column, row), 1, 1, fill=False, linewidth=1.2))
    for axis, (rule, p) in zip(axes[:, 1], projections.items()):
        nodes = [f"node {k}" for k in range(len(p))]
        sns.heatmap(p, ax=axis, cmap="Blues", vmin=0, vmax=1.4, fmt=".2f", yticklabels=nodes, **how)
        axis.set(title=f"P by {rule}, nodes × pixels", xticks=[])
        axis.vlines(np.arange(width, height * width, width), 0, len(p), "black", linewidth=0.8)
        axis.tick_params(rotation=0, length=0)
    axes[len(projections) - 1, 1].set_xlabel("pixels of X, row by row")
    what = f"a map of {height} x {width} pixels with {channels} channels"
    rules = "; ".join(projections)
    return _described(fig, f"How the pixels of {what} are shared between its nodes, by {rules}.")


METHOD_PARTS = ("teacher", "student", "feat", "edge", "seg")
"""Groups of docs/method.svg."""


def method(part: str = "") -> None:
    """Show docs/method.svg in a notebook, with one of `METHOD_PARTS` highlighted."""
    shown = f", with {part!r} highlighted" if part else ""
    text = f"The method: teacher, student and the three losses between them{shown}."
    _show("image/svg+xml", method_svg(part), text, {})


def method_svg(part: str = "") -> str:
    """docs/method.svg; for a named part without the other losses, and with faded networks."""
    if part and part not in METHOD_PARTS:
        raise LesionKDError(f"the method has no part {part!r}; parts: {', '.join(METHOD_PARTS)}")
    ElementTree.register_namespace("", "http://www.w3.org/2000/svg")
    drawing = ElementTree.parse(results.CHECKOUT / "docs" / "method.svg").getroot()
    for group in list(drawing):
        name = group.get("id")
        if not part or name in (part, None):
            continue
        if name in ("teacher", "student"):
            group.set("opacity", "0.3")
        else:
            drawing.remove(group)
    return ElementTree.tostring(drawing, encoding="unicode")


# Means and differences with intervals -------------------------------------------------------------


@dataclass(frozen=True)
class Mark:
    """A number with its interval (NaN: none) in a row of a chart.

    `name` is an arm or network, which decides colour and marker unless there is a `pen`.
    """

    row: str
    name: str
    value: float
    low: float = np.nan
    high: float = np.nan
    trainings: tuple[float, ...] = ()
    filled: bool = True
    pen: Style | None = None


@dataclass(frozen=True)
class Chart:
    """Marks in rows, from above; other names in a row below each other, if `linked` on a line."""

    title: str
    xlabel: str
    marks: list[Mark]
    zero: bool = False
    log: bool = False
    linked: bool = False

    @property
    def rows(self) -> dict[str, list[Mark]]:
        """The marks of each row."""
        rows: dict[str, list[Mark]] = {}
        for mark in self.marks:
            rows.setdefault(mark.row, []).append(mark)
        return rows

    @property
    def height(self) -> float:
        """Inches that the chart needs."""
        further = self.title.count("\n") + self.xlabel.count("\n")
        return 0.5 + sum(map(_height, self.rows.values())) + 0.12 * further


def interval_charts(
    charts: Sequence[Chart], columns: int = 3, legend: Mapping[str, Line2D] | None = None
) -> Figure:
    """Charts of numbers with intervals, `columns` side by side; equal rows are named once."""
    columns = min(columns, 2 if len(charts) == 4 else len(charts))
    rows = [list(chart.rows) for chart in charts]
    lines = [charts[i : i + columns] for i in range(0, len(charts), columns)]
    heights = [max(chart.height for chart in line) for line in lines]
    shape, size = (len(lines), len(lines[0])), (TWO_COLUMNS, sum(heights))
    fig, axes = plt.subplots(*shape, figsize=size, squeeze=False, height_ratios=heights)
    if legend:
        _legend(fig, legend)
    for axis in axes.flat[len(charts) :]:
        axis.set_visible(False)
    for axis, chart in zip(axes.flat, charts):
        _draw_chart(axis, chart, columns)
    for column in range(1, columns):
        below = range(column, len(charts), columns)
        if all(rows[i] == rows[i - 1] for i in below):
            for axis in axes[:, column]:
                axis.tick_params(labelleft=False)
    return fig


def _height(marks: Sequence[Mark]) -> float:
    """Inches that the marks of a row need."""
    return 0.1 + 0.1 * len({mark.name for mark in marks})


def _draw_chart(axis: Axes, chart: Chart, columns: int) -> None:
    top, middles = 0.0, []  # in inches
    for marks in chart.rows.values():
        names = dict.fromkeys(mark.name for mark in marks)
        lanes = {name: top - 0.1 - 0.1 * i for i, name in enumerate(names)}
        middles.append(top - _height(marks) / 2)
        top -= _height(marks)
        if chart.linked:
            places = [lanes[mark.name] for mark in marks]
            axis.plot([mark.value for mark in marks], places, "-", color="#999999", zorder=1)
        for mark in marks:
            _draw_mark(axis, mark, lanes[mark.name])
    if chart.zero:
        axis.axvline(0, color="black", linewidth=0.6, zorder=1)
    if chart.log:
        axis.set_xscale("log")
        _plain_log(axis.xaxis)
    else:
        axis.xaxis.set_major_locator(MaxNLocator(4 if columns < 3 else 3, min_n_ticks=2))
    axis.set_yticks(middles, [_typeset(row) for row in chart.rows])
    axis.set_ylim(top - 0.02, 0.02)
    axis.tick_params(axis="y", length=0)
    axis.set(title=chart.title, xlabel=_typeset(chart.xlabel))


def _draw_mark(axis: Axes, mark: Mark, y: float) -> None:
    pen = mark.pen or style_of(mark.name)
    ink, edge, face = _darker(pen.colour, 0.35), "black", pen.colour
    if len(mark.trainings) > 1:
        beside = np.full(len(mark.trainings), y - 0.055)
        axis.plot(mark.trainings, beside, "|", color=ink, markersize=4, markeredgewidth=0.9)
    if not mark.filled:
        edge, face = ink, "white"
    if mark.low == mark.low:
        axis.plot([mark.low, mark.high], [y, y], "|-", color="black", linewidth=0.9, markersize=3.5)
    how: dict[str, Any] = {"markeredgecolor": edge, "markeredgewidth": 0.5 if mark.filled else 1.0}
    axis.plot(mark.value, y, label=mark.name, marker=pen.marker, color=face, markersize=5, **how)


def _trainings(row: Mapping[Hashable, float]) -> tuple[float, ...]:
    names = ("difference_seed", "difference_fold")
    return tuple(value for name, value in row.items() if str(name).startswith(names))


def _differences(comparison: pd.DataFrame, varying: str) -> list[Mark]:
    """Marks of a comparison; filled: better or worse."""
    marks = []
    for row in comparison.to_dict("records"):
        name, limits = row[varying], (row["low"], row["high"])
        filled = row["verdict"] in SIGNIFICANT
        marks.append(Mark(label(name), name, row["difference"], *limits, _trainings(row), filled))
    return marks


def _direction(metric: str, arm: str, other: str) -> str:
    better = "right" if HIGHER_IS_BETTER[metric] else "left"
    text = f"{arm} minus {other}, {METRIC_LABELS[metric]} ({better}: {arm} better)"
    return text[0].upper() + text[1:]


@styled
def ablation(per_case: pd.DataFrame, comparison: pd.DataFrame, metric: str = "dice") -> Figure:
    """Left, mean of each arm; right, method minus arm; both with 95 % interval and trainings.

    One row of charts for each data set and teacher. Filled markers on the right: better or worse.

    Parameters
    ----------
    per_case : DataFrame
        Scores of one split: arm, seed, id, group, the metric and columns of `statistics.SETTING`.
    comparison : DataFrame
        From `statistics.compare_arms` of the same scores.
    """
    charts, found = [], list(_parts(per_case))
    for name, part in found:
        means = _mean_marks(part, metric)
        apart = {mark.name: mark for mark in _differences(_same_part(comparison, part), "other")}
        rows = [apart.get(mark.name, Mark(mark.row, mark.name, np.nan)) for mark in means]
        charts.append(Chart(name, f"{METRIC_LABELS[metric]}, mean over test cases", means))
        charts.append(Chart("", _direction(metric, "method", "other"), rows, zero=True))
    fig = interval_charts(charts, columns=2, legend=KEYS)
    where = f"{METRIC_LABELS[metric]}{_on(name for name, _ in found)}"
    what = f"left, mean, 95 % interval and trainings of {_names(in_order(per_case))}"
    return _described(fig, f"{where}: {what}. Right, the method minus each.")


def _mean_marks(part: pd.DataFrame, metric: str = "dice") -> list[Mark]:
    """The mean of each arm over cases and seeds; all lengths of an arm in one row."""
    marks = []
    for arm in (TEACHER, *in_order(part, without=TEACHER)):
        if arm in set(part["arm"]):
            scores = by_seed(part, arm, metric)
            trainings = tuple(by_training(scores, part))
            marks.append(Mark(label(arm), arm, *case_mean(scores), trainings))
    return marks


@styled
def forest(comparison: pd.DataFrame) -> Figure:
    """Differences between arms with 95 % interval and trainings, a chart for each data set.

    Filled markers: better or worse; hollow: any other verdict (`statistics.verdict`).

    Parameters
    ----------
    comparison : DataFrame
        From `statistics.compare_arms` (one arm minus each other) or `compare_with` (each arm minus
        one).
    """
    arm, other, metric = comparison[["arm", "other", "metric"]].iloc[0]
    varying, pair = "other", ("method" if arm == "method" else label(arm), "other")
    if comparison["arm"].nunique() > 1:
        varying, pair = "arm", ("arm", label(other))
    charts, found = [], list(_parts(comparison))
    for name, part in found:
        known = {mark.name: mark for mark in _differences(part, varying)}
        marks = [known.get(a, Mark(label(a), a, np.nan)) for a in comparison[varying].unique()]
        charts.append(Chart(name, "", marks, zero=True))
    fig = interval_charts(charts, legend=KEYS)
    what = _direction(metric, *pair)
    fig.supxlabel(_typeset(what), fontsize="medium")
    where = _on(name for name, _ in found)
    shown = _names(comparison[varying])
    return _described(fig, f"{what}, with 95 % intervals and trainings{where}: {shown}.")


@styled
def per_case_scores(tables: Mapping[str, pd.DataFrame], metric: str = "dice") -> Figure:
    """Each test case as a point, with mean and 95 % interval, one row for each network."""
    marks = []
    for name, table in tables.items():
        limits = bootstrap_mean(table[metric].to_numpy(float), table["group"].to_numpy())
        marks.append(Mark(label(name), name, table[metric].mean(), *limits))
    fig = interval_charts([Chart("", f"{METRIC_LABELS[metric]} of a test case", marks)])
    fig.set_figheight(fig.get_figheight() + 0.15 * len(tables))
    for y, (name, table) in enumerate(tables.items()):
        places = np.random.default_rng(0).uniform(-0.08, 0.08, len(table)) - 0.1 - 0.2 * y
        how: dict[str, Any] = {"color": style_of(name).colour, "alpha": 0.6, "zorder": 1}
        how |= {"markeredgecolor": "#555555", "markeredgewidth": 0.3}
        fig.axes[0].plot(table[metric], places, ".", **how)
    counts = " or ".join(str(n) for n in sorted({len(table) for table in tables.values()}))
    what = f"{METRIC_LABELS[metric]} of {counts} test cases, each a point"
    return _described(fig, f"{what}, with mean and 95 % interval: {_names(tables)}.")


MEASURES = {
    "lesion_pixels": ("Lesion size", "{:.0f}–{:.0f} px"),
    "contrast": ("Contrast of the lesion", "{:.2f}–{:.2f}"),
}


@styled
def tertiles(table: pd.DataFrame) -> Figure:
    """Differences in Dice in thirds of the lesions; a chart for each measure.

    Parameters
    ----------
    table : DataFrame
        From `statistics.by_tertile`, or several such tables concatenated.
    """
    charts = []
    for name, part in _parts(table):
        for measure, rows in part.groupby("column", sort=False):
            text, spread = MEASURES[str(measure)]
            marks = []
            for third in TERTILES:
                for row in rows[rows["third"] == third].itertuples():
                    size = spread.format(row.at_least, row.at_most)
                    where = f"{third}: {size}, {row.cases} cases"
                    marks.append(Mark(where, row.arm, row.difference, row.low, row.high))
            title = "\n".join(filter(None, (name, f"{text} in thirds")))
            charts.append(Chart(title, "Difference in Dice", marks, zero=True))
    pairs = table.groupby(["arm", "other"], sort=False).size().index
    texts = {arm: f"{label(arm)} minus {label(other)}" for arm, other in pairs}
    keys = {text: style_of(arm).key(line=False) for arm, text in texts.items()}
    fig = interval_charts(charts, columns=2, legend=keys)
    by = " and ".join(MEASURES[name][0].lower() for name in table["column"].unique())
    where = _on(name for name, _ in _parts(table))
    return _described(fig, f"Dice, {'; '.join(texts.values())}, in thirds by {by}{where}.")


@styled
def study(per_case: pd.DataFrame) -> Figure:
    """Dice of every arm on its own test cases and on other data sets; lengths as joined points.

    Parameters
    ----------
    per_case : DataFrame
        As in `ablation`, with the columns dataset and test_dataset.
    """
    charts = []
    for setting, part in settings(per_case):
        marks = [replace(m, row=label(split_arm(m.name)[0])) for m in _mean_marks(part)]
        tested, trained = str(setting["test_dataset"]), str(setting["dataset"])
        title = tested if tested == trained else f"{tested}, trained on {trained}"
        charts.append(Chart(title, "Dice", marks, linked=True))
    charts.sort(key=lambda chart: ", trained on" in chart.title)  # own test cases first
    lengths = sorted({split_arm(arm)[1] for arm in per_case["arm"]})
    keys = {f"{n:g}x epochs": _longer(Style("#BBBBBB", "o"), n).key(False) for n in lengths}
    fig = interval_charts(charts, legend=keys if len(keys) > 1 else None)
    what = "mean over cases and trainings with 95 % interval, and each training"
    names = _names(split_arm(arm)[0] for arm in in_order(per_case))
    return _described(fig, f"Dice on {'; '.join(c.title for c in charts)}, {what}: {names}.")


@styled
def latency(cost: pd.DataFrame) -> Figure:
    """Milliseconds for one image, 10th to 90th percentile, by network and engine; int8 is hollow.

    Parameters
    ----------
    cost : DataFrame
        model, engine, precision, pixels, latency_ms_median, _p10 and _p90, such as
        `tables.committed("cost")`.
    """
    colours = "#000000 #EE7733 #0077BB #EE3377 #009988 #777777 #33BBEE #AA5500".split()
    engines = enumerate(cost["engine"].unique())
    pens = {name: Style(colours[i % 8], "os^DvP<p"[i % 8]) for i, name in engines}
    charts = []
    for size, part in cost.groupby("pixels"):
        marks = []
        for row in part.itertuples():
            times = (row.latency_ms_median, row.latency_ms_p10, row.latency_ms_p90)
            how: dict[str, Any] = {"filled": row.precision != "int8", "pen": pens[row.engine]}
            marks.append(Mark(label(row.model), row.engine, *times, **how))
        charts.append(Chart(f"{size} px", "Latency on one thread (ms)", marks, log=True))
    keys = {name: pen.key(line=False) for name, pen in pens.items()}
    if "int8" in set(cost["precision"]):
        keys["int8"] = BLACK.key(line=False, hollow=True)
    fig = interval_charts(charts, columns=2, legend=keys)
    at = f"at {', '.join(c.title for c in charts)} on one thread, 10th to 90th percentile"
    return _described(fig, f"Latency of {_names(cost['model'])} {at}, in {', '.join(keys)}.")


@styled
def dice_and_cost(points: pd.DataFrame) -> Figure:
    """Dice with 95 % interval of networks, the cheapest above, with their multiplications.

    Parameters
    ----------
    points : DataFrame
        From `tables.cost_points`.
    """
    charts = []
    for name, part in points.groupby("dataset", sort=False):
        marks = []
        for row in part.sort_values(["macs", "dice"]).itertuples():
            who = f"{label(row.model)}, {row.macs / 1e6:,.0f} M"
            marks.append(Mark(who, row.model, row.dice, row.low, row.high))
        charts.append(Chart(str(name), "Dice on test cases", marks))
    fig = interval_charts(charts, columns=2)
    text = "Dice on test cases, with 95 % interval, and multiplications for one image in millions"
    return _described(fig, f"{text}{_on(points['dataset'])}: {_names(points['model'])}.")


@styled
def gain_and_hours(table: pd.DataFrame) -> Figure:
    """What each step gains in Dice over the student alone, and the hours that it costs more.

    Parameters
    ----------
    table : DataFrame
        From `tables.gain_and_hours`; a column `what` replaces the label of the arm.
    """
    charts, found = [], list(_parts(table))
    for name, part in found:
        part = part.sort_values("hours")
        texts = part["what"] if "what" in part else part["arm"].map(label)
        hours = part["hours"].map("{:+.1f} h".format, na_action="ignore").fillna("hours unknown")
        rows = [f"{text}, {more}" for text, more in zip(texts, hours)]
        marks = [replace(mark, row=row) for mark, row in zip(_differences(part, "arm"), rows)]
        charts.append(Chart(name, "Gain in Dice over the student alone", marks, zero=True))
    fig = interval_charts(charts, columns=2, legend=KEYS)
    what = "Gain in Dice over the student alone, with 95 % interval, and hours of training"
    return _described(fig, f"{what}{_on(n for n, _ in found)}: {_names(table['arm'])}.")


# Lines --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Curves:
    """A chart of lines, {name: table with the columns x, mean, low, high}."""

    title: str
    xlabel: str
    lines: dict[str, pd.DataFrame]
    log: bool = False
    ylim: tuple[float, float] | None = None


def line_charts(
    charts: Sequence[Curves],
    columns: int,
    height: float = 2.0,
    text_of: Callable[[str], str] = label,
) -> tuple[Figure, np.ndarray]:
    """Charts of lines, `columns` side by side: with names at up to four lines, or a legend."""
    rows = -(-len(charts) // columns)
    fig, axes = plt.subplots(rows, columns, figsize=(TWO_COLUMNS, height * rows), squeeze=False)
    names = list(dict.fromkeys(name for chart in charts for name in chart.lines))
    beside = columns < 3 and max(len(chart.lines) for chart in charts) <= 4
    if not beside:
        _legend(fig, {text_of(name): style_of(name).key() for name in names})
    for axis in axes.flat[len(charts) :]:
        axis.set_visible(False)
    for axis, chart in zip(axes.flat, charts):
        if chart.log:
            axis.set_yscale("log")
            _plain_log(axis.yaxis, 1, 2, 5)
        for place, (name, table) in enumerate(chart.lines.items()):
            _draw_line(axis, table, name, place / len(chart.lines))
            if len(chart.lines) <= 4:  # more ranges could not be told apart
                _draw_range(axis, table, name)
        axis.set(title=chart.title, xlabel=chart.xlabel, ylim=chart.ylim)
        axis.margins(x=0.02)
        axis.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
        if beside:
            _name_lines(axis, {name: text_of(name) for name in names}, height)
    return fig, axes


def _draw_line(axis: Axes, table: pd.DataFrame, name: str, shift: float) -> None:
    """A line; `shift` (0..1) moves the markers of lines apart."""
    pen, step = style_of(name), max(1, len(table) // 5)
    markers: dict[str, Any] = {"marker": pen.marker, "markevery": (int(shift * step), step)}
    how: dict[str, Any] = {"linestyle": pen.linestyle, "color": pen.colour, "path_effects": pen.rim}
    axis.plot(table["x"], table["mean"], label=name, **markers, **how)


def _draw_range(axis: Axes, table: pd.DataFrame, name: str) -> None:
    if (table["high"] > table["low"]).any():
        how: dict[str, Any] = {"color": style_of(name).colour, "alpha": 0.15, "linewidth": 0}
        axis.fill_between(table["x"], table["low"], table["high"], **how)


def _name_lines(axis: Axes, texts: Mapping[str, str], height: float) -> None:
    """The name of each line beside its end, in a chart of some height in inches."""
    to_axes = axis.transData + axis.transAxes.inverted()
    last = np.array([np.asarray(line.get_path().vertices)[-1] for line in axis.lines])
    ends = zip(to_axes.transform(last)[:, 1].tolist(), axis.lines)
    most = 1.0
    for y, line in sorted(ends, key=lambda end: -end[0]):
        text, ink = _typeset(texts[str(line.get_label())]), _darker(str(line.get_color()), 0.35)
        y = min(y, most)
        axis.text(1.02, y, text, transform=axis.transAxes, color=ink, va="center")
        most = y - (1 + text.count("\n")) * 0.14 / (height - 0.6)


def _by_epoch(history: pd.DataFrame, column: str) -> pd.DataFrame:
    """Mean and range of a column over the seeds."""
    by_epoch = history.dropna(subset=column).groupby("epoch")[column]
    return by_epoch.agg(mean="mean", low="min", high="max").rename_axis("x").reset_index()


@styled
def training_curves(histories: Mapping[str, pd.DataFrame]) -> Figure:
    """Left, validation Dice of each run by epoch; right, every loss term of the last run.

    Parameters
    ----------
    histories : {arm or network: history}
    """
    last, history = list(histories.items())[-1]
    terms = [name for name in history if name.startswith("loss_") and name != "loss_total"]
    dice = {name: _by_epoch(one, "val_dice") for name, one in histories.items()}
    losses = {name.removeprefix("loss_"): _by_epoch(history, name) for name in terms}
    title = f"Losses of the {_label(last)}, before their weights"
    charts = [Curves("Validation Dice", "Epoch", dice, ylim=(0, 1))]
    charts.append(Curves(title, "Epoch", losses, log=True))
    fig, _ = line_charts(charts, 2, 2.2, _term_label)
    what = f"Left, validation Dice by epoch of {_names(histories)}"
    return _described(fig, f"{what}. Right, losses of the last run.")


def _term_label(name: str) -> str:
    """L_feat without a plus."""
    return label(name).removeprefix("+ ")


@styled
def learning_curves(curves: pd.DataFrame) -> Figure:
    """Validation Dice of each arm by epoch: mean over seeds as line, of few arms also their range.

    One chart for each data set and teacher. More than six arms are drawn in two charts: the arms of
    the method, and the baselines with the student alone and the method.

    Parameters
    ----------
    curves : DataFrame
        From `statistics.learning_curves`.
    """
    found, arms = list(_parts(curves)), in_order(curves)
    own = [a for a in arms if split_arm(a)[0] in ("alone", "feat", "edge", "method", "shuffled")]
    baselines = [arm for arm in arms if arm not in own or arm in ("alone", "method")]
    charts = []
    for sheet in [arms] if len(arms) <= 6 else [own, baselines]:
        for name, part in found:
            of_arm = {arm: part[part["arm"] == arm].rename(columns={"epoch": "x"}) for arm in sheet}
            charts.append(Curves(name, "Epoch", {a: t for a, t in of_arm.items() if len(t)}))
    columns = min(len(charts), 3 if len(found) > 2 else 2)
    fig, axes = line_charts(charts, columns)
    for axis in axes[:, 0]:
        axis.set_ylabel("Validation Dice")
    where = _on(name for name, _ in found)
    text = f"Validation Dice by epoch{where}, mean over seeds: {_names(arms)}."
    return _described(fig, text)
