"""Images of cases and of what networks make of them: contours, feature maps, edge labels, node assignments."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from .style import look_of, named, nothing, panels, show, style, write_below

if TYPE_CHECKING:
    from ..prepare import Prepared
    from ..views import FeatureView, NodeView

NODE_COLOURS = (  # Tol's discrete rainbow and a grey, so ordered that neighbours differ; they repeat beyond 16 nodes
    "#1965B0", "#F7F056", "#882E72", "#4EB265", "#DC050C", "#7BAFDE", "#F1932D", "#777777",
    "#CAE0AB", "#72190E", "#5289C7", "#F6C141", "#AE76A3", "#E8601C", "#90C987", "#D1BBD7",
)


def cases(prepared: Prepared, rows: Sequence[int], columns: int = 6) -> Figure:
    """Prepared images with the contour of their mask, id and split beneath."""
    with style():
        fig, axes = panels(-(-len(rows) // columns), columns, ratio=1.24)
        for axis, row in zip(axes.flat, rows):
            case = prepared.cases.iloc[row]
            show(axis, prepared.images[row], f"{_shortened(case['id'])}\n{case['split']}", truth=prepared.masks[row])
    fig.set_label(f"{len(rows)} prepared images with the contour of their mask: {', '.join(prepared.cases['id'].iloc[rows])}.")
    return fig


def _shortened(name: str) -> str:
    """A caption wider than its picture would shrink all pictures."""
    return name if len(name) <= 16 else f"…{name[-15:]}"


def pairs(prepared: Prepared, table: pd.DataFrame) -> Figure:
    """Columns are pairs of images (`views.example_pairs`), the distance of their hashes beneath."""
    with style():
        fig, axes = panels(2, max(1, len(table)), ratio=1.14)
        for (top, bottom), row in zip(axes.T, table.itertuples()):
            show(top, prepared.images[row.first], _shortened(prepared.cases["id"][row.first]))
            show(bottom, prepared.images[row.second], f"{_shortened(prepared.cases['id'][row.second])}\n{row.bits} bits")
    couples = (f"{prepared.cases['id'][row.first]} and {prepared.cases['id'][row.second]}, {row.bits} bits" for row in table.itertuples())
    fig.set_label(f"Pairs of images, one above the other, and the distance of their hashes: {'; '.join(couples) or 'none'}.")
    return fig


def edges(prepared: Prepared, rows: Sequence[int], levels: dict[str, np.ndarray]) -> Figure:
    """Columns are cases: the image, and beneath it its edge label at each named resolution."""
    with style():
        fig, axes = panels(1 + len(levels), len(rows), ratio=1.04)
        for column, row in enumerate(rows):
            show(axes[0, column], prepared.images[row], truth=prepared.masks[row])
            for axis, stack in zip(axes[1:, column], levels.values()):
                show(axis, stack[column])
        _name_rows(axes, ("image", *levels))
    fig.set_label(f"{len(rows)} images with their contour, and beneath each its edge label: {'; '.join(levels)}.")
    return fig


def _name_rows(axes: np.ndarray, names: Iterable[str]) -> None:
    for axis, name in zip(axes[:, 0], names):
        axis.text(-0.05, 0.5, name, transform=axis.transAxes, rotation=90, ha="right", va="center")


def segmentations(prepared: Prepared, rows: Sequence[int], predicted: dict[str, np.ndarray]) -> Figure:
    """Per case: image, then every network's contour beside the truth (dashed)."""
    with style():
        fig, axes = panels(1 + len(predicted), len(rows), ratio=1.04)
        for column, row in enumerate(rows):
            image, mask = prepared.images[row], prepared.masks[row]
            show(axes[0, column], image)
            for axis, (name, masks) in zip(axes[1:, column], predicted.items()):
                show(axis, image, truth=mask, **{name: masks[column]})
        _name_rows(axes, ("image", *(look_of(name).label for name in predicted)))
    fig.set_label(f"{len(rows)} images, and beneath each the contours of {named(predicted)} over the true one, dashed.")
    return fig


def refinement(image: np.ndarray, teacher_map: np.ndarray, target: np.ndarray, student_map: np.ndarray, channel: int) -> Figure:
    """One channel of T, T' = max(T, m) and the connected student map S, on one colour scale."""
    with style():
        fig, axes = panels(1, 4, ratio=1.12)
        show(axes[0, 0], image, "image")
        scale = float(np.abs(teacher_map[channel]).max()) or 1.0
        for axis, stack, name in zip(axes[0, 1:], (teacher_map, target, student_map), ("T, before its ReLU", "T' = max(T, m)", "S, connected")):
            drawn = axis.imshow(stack[channel], cmap="PuOr", vmin=-scale, vmax=scale, interpolation="nearest")
            write_below(axis, name)
        fig.colorbar(drawn, ax=axes[0, -1], shrink=0.75)
    fig.set_label("An image, and one channel on one colour scale: the teacher's T before its ReLU, the target T' = max(T, m), the student's S, connected.")
    return fig


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
                write_below(axis, f"{who}\n{name}")
    named = "; ".join(f"{who}, {', '.join(found)}" for who, found in stack.items())
    fig.set_label(f"An image, its edge label, and the mean absolute response of feature maps: {named}.")
    return fig


def feature_maps(image: np.ndarray, mask: np.ndarray, views: dict[str, dict[str, FeatureView]], predicted: dict[str, np.ndarray]) -> Figure:
    """The channel of each map that tells the lesion best: rows are networks, columns levels, a level on one scale for all networks.

    In deviations from the channel's mean over the image; d is how far apart lesion and rest lie.

    Parameters
    ----------
    image, mask : (S, S, 3) uint8, (S, S)
    views : {network: {level: FeatureView}}
        From `views.feature_views`.
    predicted : {network: (S, S)}
        Each network's mask of the case.
    """
    levels = list(next(iter(views.values())))
    with style():
        fig, axes = panels(len(views), 1 + len(levels), ratio=1.22)
        for line, (who, maps) in zip(axes, views.items()):
            show(line[0], image, truth=mask, **{who: predicted[who]})
            for axis, level in zip(line[1:], levels):
                scale = max(np.abs(of[level].values).max() for of in views.values()) or 1.0
                axis.imshow(maps[level].values, cmap="PuOr", vmin=-scale, vmax=scale, interpolation="nearest")
                write_below(axis, f"channel {maps[level].channel}, d = {maps[level].separation:.2f}")
        for column, level in zip(axes.T[1:], levels):
            fig.colorbar(column[0].images[0], ax=column, location="bottom", shrink=0.8, label=level)
        _name_rows(axes, [look_of(who).label for who in views])
    fig.set_label(f"The channel that tells the lesion best in each map: rows {named(views)}, their contours at the left; columns {'; '.join(levels)}.")
    return fig


def node_assignment(image: np.ndarray, mask: np.ndarray, edge: np.ndarray, projection: np.ndarray) -> Figure:
    """One case of one network as in `nodes`: edge (h, w) and P (K, h, w) at the graph's resolution."""
    from ..views import NodeView

    return nodes([image], [mask], {"": [NodeView(edge, projection, np.full((len(projection), 2), np.nan))]})


def nodes(images: Sequence[np.ndarray], masks: Sequence[np.ndarray], views: dict[str, list[NodeView]]) -> Figure:
    """Rows are cases: the image, the edge pixels with the anchors, and for every network the most likely node of each pixel and the entropy of P.

    An anchor lies at the centroid of its cell's edge pixels and bears its node's number. A pixel has its node's colour, the
    paler the less likely. Entropy is in units of log(live nodes): 1 is undecided; one node alone has none.

    Parameters
    ----------
    images, masks : (S, S, 3) uint8, (S, S), a case each
    views : {network: a NodeView a case}
        From `views.node_views`.
    """
    with style():
        if not len(images):
            return nothing("no case is given")
        fig, axes = panels(len(images), 2 + 2 * len(views), ratio=1.2 if len(images) == 1 else 1.1)
        for line, image, mask, *of_case in zip(axes, images, masks, *views.values()):
            show(line[0], image, truth=mask)
            _anchors(line[1], of_case[0])
            for place, view in zip(line[2::2], of_case):
                _assignment(place, image, view)
            for place, view in zip(line[3::2], of_case):
                drawn = place.imshow(view.entropy, cmap="viridis", vmin=0, vmax=1, interpolation="nearest")
        write_below(axes[-1, 0], "image")
        for i, who in enumerate(views):
            write_below(axes[-1, 2 + 2 * i], f"{look_of(who).label}\nnode of each pixel".strip())
            write_below(axes[-1, 3 + 2 * i], f"{look_of(who).label}\nentropy of P".strip())
        fig.colorbar(drawn, ax=axes, shrink=0.7, pad=0.01)
    live = ", ".join(f"{view.live.sum()} of {len(view.live)}" for view in next(iter(views.values())))
    of = f" of {names}" if (names := named(filter(None, views))) else ""
    fig.set_label(f"Images, their edge pixels with {live} nodes live, the likeliest node of each pixel and the entropy of P{of}.")
    return fig


def _anchors(axis: Axes, view: NodeView) -> None:
    axis.imshow(view.edge, cmap="gray_r", vmin=-0.2, vmax=1.5, interpolation="nearest")
    for node, (y, x) in enumerate(view.anchors):
        if np.isfinite(y):
            colour = NODE_COLOURS[node % len(NODE_COLOURS)]
            axis.plot(x, y, "o", color=colour, markersize=6.5)
            axis.text(x, y, str(node), color="black" if sum(to_rgb(colour)) > 1.7 else "white", fontsize=5, ha="center", va="center_baseline")
    write_below(axis, f"{view.live.sum()} of {len(view.live)} live")


def _assignment(axis: Axes, image: np.ndarray, view: NodeView) -> None:
    """The image under colours of nodes, in the map's pixels."""
    height, width = view.edge.shape
    axis.imshow(image.mean(-1), cmap="gray", extent=(-0.5, width - 0.5, height - 0.5, -0.5))
    colours = np.array([to_rgb(NODE_COLOURS[node % len(NODE_COLOURS)]) for node in range(len(view.projection))])
    axis.imshow(np.dstack([colours[view.projection.argmax(0)], 0.8 * view.projection.max(0)]), interpolation="nearest")
    axis.plot(*np.argwhere(view.edge > 0).T[::-1], ".", color="white", markersize=1)
