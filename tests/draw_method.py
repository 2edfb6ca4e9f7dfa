"""Draws docs/method.svg, the method in one figure, the same bytes every time. Lengths are in mm."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch, Polygon, Rectangle

from lesionkd_core.analysis import figures

WIDTH, HEIGHT, BELOW = 174, 104, 4
TEACHER = figures.STYLES["teacher"].colour
STUDENT = "#33BBEE"  # blue: beside the teacher's orange the red of the plots is hard to tell
INK, FAINT, EDGE = "#222222", "#8a8a8a", "#117733"
FILL = {TEACHER: "#fbe3d3", STUDENT: "#d9f0fa", EDGE: "#dcefe2", INK: "#f2f2f2"}
ENCODER = {1: 27, 2: 37.5, 4: 48, 8: 57, 16: 65, 32: 72}  # x of the map of each stride
DECODER = {16: 93, 8: 107, 4: 119, 2: 132, 1: 145}
TOP, BOTTOM = 84, 20  # middle lines of teacher and student
HEIGHTS = {1: 19, 2: 16, 4: 13, 8: 10, 16: 7, 32: 4.5}


def draw_method() -> Figure:
    """Teacher above, student below, the three losses between them."""
    with (
        figures.style(),
        mpl.rc_context({"svg.fonttype": "path", "figure.constrained_layout.use": False}),
    ):
        fig = Figure(figsize=(WIDTH / 25.4, (HEIGHT + BELOW) / 25.4), facecolor="white")
        axis = fig.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(-BELOW, HEIGHT))
        axis.set_axis_off()
        network(axis, TOP, TEACHER, (2, 4, 8, 16, 32), (16, 8, 4, 2))
        network(axis, BOTTOM, STUDENT, (1, 2, 4, 8, 16), (8, 4, 2, 1))
        captions(axis)
        edge_reasoning(axis)
        feature_refinement(axis)
        segmentation(axis)
    return fig


def network(axis, middle: float, colour: str, down: tuple[int, ...], up: tuple[int, ...]) -> None:
    """A U-Net: one block for each map, as high as the map is large, with skip connections."""
    picture(axis, 3, middle - 6.5, lesion="image")
    write(axis, 9.5, middle - 8.6, "image")
    arrow(axis, (16.5, middle), (ENCODER[down[0]] - 2.4, middle))
    places = [ENCODER[stride] for stride in down] + [DECODER[stride] for stride in up]
    for stride in set(down) & set(up):
        height = middle + HEIGHTS[stride] / 2 - 0.8
        axis.plot(
            [ENCODER[stride], DECODER[stride]],
            [height, height],
            color=FAINT,
            linewidth=0.6,
            zorder=0,
        )
    for left, right in zip(places, places[1:]):
        arrow(axis, (left + 2.3, middle), (right - 2.4, middle))
    for place, stride in zip(places, (*down, *up)):
        box(axis, place - 2, middle - HEIGHTS[stride] / 2, 4, HEIGHTS[stride], colour, str(stride))


def captions(axis) -> None:
    write(
        axis,
        2,
        100.5,
        "Teacher, trained and frozen: ResNet34-UNet, 24,429,281 parameters",
        step="S1",
        weight="bold",
        ha="left",
    )
    write(
        axis,
        2,
        3,
        "Student: U-Net of width 4, 58,629 parameters",
        step="S2",
        weight="bold",
        ha="left",
    )
    write(
        axis,
        2,
        -1,
        "in blocks: stride of the map; S1 to S7: steps of the patent",
        ha="left",
        color=FAINT,
    )
    write(axis, 119.5, 95.3, r"$\mathtt{Feats\_T}$: three maps before their ReLU")
    write(axis, 119.5, 9, r"$\mathtt{Feats\_S}$")
    write(
        axis,
        172,
        3,
        r"$L_\mathrm{total} = w_\mathrm{seg}L_\mathrm{seg} + w_\mathrm{feat}L_\mathrm{feat}"
        r" + w_\mathrm{edge}L_\mathrm{edge}$ updates the student",
        step="S6",
        ha="right",
    )
    write(axis, 172, -1, "then the student alone segments new images", step="S7", ha="right")


def edge_reasoning(axis) -> None:
    """L_edge: both maps of stride 4 pass through one frozen graph."""
    write(axis, 9.5, 60.8, "mask")
    picture(axis, 3, 46, lesion="mask")
    arrow(axis, (16.5, 52.5), (21.2, 52.5))
    write(axis, 28, 60.8, r"$\mathtt{Label\_edge}$")
    picture(axis, 21.5, 46, lesion="edge")
    arrow(axis, (35, 52.5), (40.3, 52.5))
    box(axis, 40.5, 42.5, 47.5, 21.5, EDGE)
    write(axis, 64.2, 61.4, "graph, fitted on the teacher, frozen", size=7)
    names = ("projection", "graph", "reasoning")
    for left, name in zip((43, 58.5, 74), names):
        axis.add_patch(
            Rectangle((left, 46.5), 12, 12, facecolor="white", edgecolor=FAINT, linewidth=0.5)
        )
        write(axis, left + 6, 44.5, name, size=7)
    nodes(axis, 43, 46.5, grid=True)
    nodes(axis, 58.5, 46.5, grid=False)
    states(axis, 74, 46.5)
    for left in (55.2, 70.7):
        arrow(axis, (left, 52.5), (left + 3, 52.5))
    arrow(axis, (ENCODER[4], TOP - 6.7), (ENCODER[4], 64.3), TEACHER)
    arrow(axis, (ENCODER[4], BOTTOM + 6.7), (ENCODER[4], 31), STUDENT)
    box(axis, 39, 31, 18, 4.6, STUDENT, "connector")
    arrow(axis, (ENCODER[4], 35.8), (ENCODER[4], 42.2), STUDENT)
    arrow(axis, (88.2, 52.5), (90.6, 52.5))
    loss(axis, 95.6, 52.5, r"$L_\mathrm{edge}$", "S4")


def feature_refinement(axis) -> None:
    """L_feat: the maps of each level after the margin ReLU."""
    for stride in (8, 4, 2):
        arrow(
            axis,
            (DECODER[stride], TOP - HEIGHTS[stride] / 2 - 0.2),
            (DECODER[stride], 66.7),
            TEACHER,
        )
        arrow(axis, (DECODER[stride], 61.3), (DECODER[stride], 58), TEACHER)
        arrow(
            axis,
            (DECODER[stride], BOTTOM + HEIGHTS[stride] / 2 + 0.2),
            (DECODER[stride], 31),
            STUDENT,
        )
        arrow(axis, (DECODER[stride], 35.8), (DECODER[stride], 47), STUDENT)
    box(axis, 102.5, 61.5, 34, 5, TEACHER, r"margin ReLU: max(T, m)")
    box(axis, 102.5, 47.2, 34, 10.6, INK)
    write(axis, 119.5, 54.8, r"$L_\mathrm{feat}$", size=9, step="S3")
    write(axis, 119.5, 50.2, "partial L2, level by level", size=7)
    box(axis, 102.5, 31, 34, 4.6, STUDENT, "connectors: 1×1 and BN")


def segmentation(axis) -> None:
    """L_seg: the student's segmentation and the mask."""
    write(axis, 163.5, 68.8, "mask")
    picture(axis, 157, 54, lesion="mask")
    arrow(axis, (163.5, 53.7), (163.5, 47.8))
    loss(axis, 163.5, 43, r"$L_\mathrm{seg}$", "S5")
    write(axis, 157.5, 43, "BCE + Dice", ha="right")
    arrow(axis, (163.5, 27), (163.5, 38), STUDENT)
    arrow(axis, (147.3, BOTTOM), (156.7, BOTTOM))
    picture(axis, 157, 13.5, lesion="probability")
    write(axis, 163.5, 11.2, "segmentation")


def outline(left: float, bottom: float, scale: float = 1.0) -> np.ndarray:
    """The drawn lesion's contour in a picture of 13 mm."""
    angle = np.linspace(0, 2 * np.pi, 60, endpoint=False)
    radius = scale * (4.0 + 0.45 * np.cos(2 * angle + 0.6) + 0.3 * np.sin(3 * angle))
    return np.stack(
        [left + 6.5 + radius * np.cos(angle), bottom + 6.5 + radius * np.sin(angle)], axis=1
    )


def picture(axis, left: float, bottom: float, lesion: str) -> None:
    """A picture of 13 x 13 mm: image, mask, edge label or probability."""
    ground, inside, line = {
        "image": ("#b9b9b9", "#6e6e6e", "#7d7d7d"),
        "mask": ("#222222", "#ffffff", "#ffffff"),
        "edge": ("#222222", "#222222", "#ffffff"),
        "probability": ("#222222", STUDENT, "#7a8a91"),
    }[lesion]
    axis.add_patch(
        Rectangle((left, bottom), 13, 13, facecolor=ground, edgecolor=INK, linewidth=0.5)
    )
    axis.add_patch(Polygon(outline(left, bottom), facecolor=inside, edgecolor=line, linewidth=1.4))


def nodes(axis, left: float, bottom: float, grid: bool) -> None:
    """Edge pixels in their cells, or the nodes of these cells."""
    cells = sorted({(int(x // 3), int(y // 3)) for x, y in outline(-0.5, -0.5)})
    spots = [(left + 1.5 + 3 * x, bottom + 1.5 + 3 * y) for x, y in cells]
    if grid:
        for x, y in cells:
            axis.add_patch(
                Rectangle(
                    (left + 3 * x, bottom + 3 * y), 3, 3, facecolor=FILL[EDGE], edgecolor="none"
                )
            )
        for at in (3, 6, 9):
            axis.plot([left + at, left + at], [bottom, bottom + 12], color=FAINT, linewidth=0.4)
            axis.plot([left, left + 12], [bottom + at, bottom + at], color=FAINT, linewidth=0.4)
        axis.add_patch(
            Polygon(outline(left - 0.5, bottom - 0.5), fill=False, edgecolor=EDGE, linewidth=1.4)
        )
        return
    for i, first in enumerate(spots):
        for second in spots[i + 1 :]:
            axis.plot(*zip(first, second), color=EDGE, linewidth=0.25, alpha=0.6)
    for spot in spots:
        axis.add_patch(
            Circle(spot, 0.85, facecolor=EDGE, edgecolor="white", linewidth=0.4, zorder=3)
        )


def states(axis, left: float, bottom: float) -> None:
    """H of both networks for four nodes."""
    for place, (teacher, student) in enumerate([(7, 6.2), (4.5, 5.4), (8.5, 7.6), (3, 3.6)]):
        axis.add_patch(
            Rectangle((left + 0.9 + 2.7 * place, bottom + 1.0), 1.0, teacher, facecolor=TEACHER)
        )
        axis.add_patch(
            Rectangle((left + 2.0 + 2.7 * place, bottom + 1.0), 1.0, student, facecolor=STUDENT)
        )
    write(axis, left + 2.1, bottom + 10.3, "H")


def box(
    axis, left: float, bottom: float, width: float, height: float, colour: str, text: str = ""
) -> None:
    axis.add_patch(
        FancyBboxPatch(
            (left, bottom),
            width,
            height,
            "round,pad=0,rounding_size=0.8",
            facecolor=FILL[colour],
            edgecolor=colour,
            linewidth=0.8,
        )
    )
    write(axis, left + width / 2, bottom + height / 2, text, size=7)


def loss(axis, x: float, y: float, name: str, step: str) -> None:
    axis.add_patch(Circle((x, y), 4.8, facecolor=FILL[INK], edgecolor=INK, linewidth=0.8))
    write(axis, x, y + 0.9, name, size=8)
    write(axis, x, y - 2.4, step, color=FAINT, size=6.5)


def arrow(axis, start: tuple[float, float], end: tuple[float, float], colour: str = INK) -> None:
    axis.add_patch(
        FancyArrowPatch(
            start,
            end,
            arrowstyle="-|>",
            mutation_scale=5,
            color=colour,
            linewidth=0.8,
            shrinkA=0,
            shrinkB=0,
        )
    )


def write(axis, x: float, y: float, text: str, step: str = "", size: float = 7.5, **more) -> None:
    """Text in the middle of (x, y), with the step of the patent after it."""
    axis.text(
        x,
        y,
        f"{text}  {step}".strip(),
        size=size,
        va="center",
        **{"ha": "center", "color": INK} | more,
    )


def save(path: Path) -> None:
    """Write the figure as SVG without a date."""
    with figures.style(), mpl.rc_context({"svg.fonttype": "path"}):
        draw_method().savefig(path, format="svg", metadata={"Date": None})
