"""Inspection: cases to show, edge labels, feature maps, nodes of the graph, and source code."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import losses, results
from ..config import DistillConfig, GraphConfig, LesionKDError
from ..data.batches import normalize
from ..data.prepare import Prepared
from ..data.splits import compare_pairs
from ..edges import edge_at_stride, edge_label_batch
from ..losses import (
    EdgeGraph,
    EdgeReasoning,
    FeatureRefinement,
    FittedGraph,
    Measured,
    build_terms,
    margin_relu,
)
from ..models import Network, stride_of
from ..predict import TrainedNetwork, load_network

STRIDES = (1, 2, 4, 8, 16)


def show(*functions: Callable[..., object] | type, docstring: bool = False) -> None:
    """Show the source of functions or classes as a code block in a notebook.

    Docstrings are left out, since the notebook explains the code; `docstring=True` keeps them.
    """
    from IPython.display import Markdown, display

    text = "\n\n\n".join(textwrap.dedent(inspect.getsource(f)).rstrip() for f in functions)
    if not docstring:
        text = re.sub(r'(?m)^ *r?"""[\s\S]*?"""\n( *\n)?', "", text)
    display(Markdown(f"```python\n{text}\n```"))


# Cases and edge labels ----------------------------------------------------------------------------


def spread_of_cases(prepared: Prepared, split: str, count: int) -> list[int]:
    """Rows of a split, evenly spread from the smallest to the largest lesion."""
    rows = prepared.index(split)
    size = prepared.cases["lesion_fraction"].to_numpy()[rows]
    places = np.linspace(0, len(rows) - 1, min(count, len(rows))).round().astype(int)
    chosen: list[int] = rows[np.argsort(size, kind="stable")][places].tolist()
    return chosen


def example_pairs(prepared: Prepared, count: int) -> pd.DataFrame:
    """Pairs of images on both sides of the threshold for near-duplicates.

    Of the pairs whose hashes are near, the `count` least alike that share a group, and the `count`
    most alike that do not.

    Returns
    -------
    DataFrame
        As `splits.compare_pairs` returns it; rows are those of `prepared`. Sorted by the lesser of
        the two correlations.
    """
    table = compare_pairs(prepared.thumbnails)
    alike = table[["correlation", "content"]].min(axis=1)
    table = table.loc[alike.sort_values(ascending=False, kind="stable").index]
    same = table["same"]
    return pd.concat([table[same].tail(count), table[~same].head(count)], ignore_index=True)


def _edges(masks: np.ndarray, width: int) -> Tensor:
    """Masks (N, S, S) 0/1 -> Label_edge (N, 1, S, S)."""
    return edge_label_batch(torch.from_numpy(np.array(masks)).float().unsqueeze(1), width)


def edge_pyramid(
    masks: np.ndarray, width: int, strides: tuple[int, ...] = STRIDES
) -> dict[str, np.ndarray]:
    """Masks (N, S, S) 0/1 -> edge labels at several strides: {'stride 4': (N, S / 4, S / 4)}."""
    full = _edges(masks, width)
    return {f"stride {stride}": edge_at_stride(full, stride)[:, 0].numpy() for stride in strides}


def edge_survival(masks: np.ndarray, width: int) -> pd.DataFrame:
    """What is left of the edge label at strides 2 to 16 by maximum, mean and nearest pixel.

    Parameters
    ----------
    masks : (N, S, S) 0/1
        Only masks with an edge count.

    Returns
    -------
    DataFrame
        stride, method, kept (fraction of the full-size edge pixels inside a marked cell), marked
        (fraction of cells marked over fraction of edge pixels), edge lost (lesions without any). A
        mean marks a cell if more than half of it is edge.
    """
    full, rows = _edges(masks, width), []
    full = full[full.flatten(1).amax(1) > 0]
    for stride in STRIDES[1:]:
        middle = stride // 2
        by_method = {
            "max": edge_at_stride(full, stride),
            "mean": (F.avg_pool2d(full, stride) > 0.5).float(),
            "nearest": full[..., middle::stride, middle::stride],
        }
        for method, small in by_method.items():
            back = F.interpolate(small, scale_factor=stride, mode="nearest")
            kept, marked = (full * back).sum() / full.sum(), small.mean() / full.mean()
            lost = int((small.flatten(1).amax(1) == 0).sum())
            rows.append((stride, method, float(kept), float(marked), lost))
    return pd.DataFrame(rows, columns=["stride", "method", "kept", "marked", "edge lost"])


def live_nodes(cfg: GraphConfig, masks: np.ndarray) -> np.ndarray:
    """Cells of the grid with an edge pixel, for each mask: (N, S, S) 0/1 -> (N,)."""
    graph = EdgeGraph(1, 1, cfg.grid)
    stride = stride_of(cfg.edge_level.partition(":")[0])
    edge = graph.edge_at(_edges(masks, cfg.edge_width), stride)
    count: np.ndarray = graph.live_nodes(edge).sum(1).numpy()
    return count


# The method on small numbers ----------------------------------------------------------------------


def partial_l2_curves(
    targets: Sequence[float] = (1.0, -0.5), reach: float = 2.5, points: int = 201
) -> pd.DataFrame:
    """What one value of the student costs in the partial L2, from `losses.partial_l2`.

    Returns
    -------
    DataFrame
        target (T'), student (S, from -reach to reach), cost.
    """
    students = torch.linspace(-reach, reach, points)
    margin = torch.tensor([-reach])  # below every target
    parts = []
    for target in targets:
        teacher = torch.tensor(target).view(1, 1, 1, 1)
        costs = [losses.partial_l2(s.view(1, 1, 1, 1), teacher, margin).item() for s in students]
        parts.append(pd.DataFrame({"target": target, "student": students.numpy(), "cost": costs}))
    return pd.concat(parts, ignore_index=True)


# Feature maps -------------------------------------------------------------------------------------


@torch.no_grad()
def feature_maps(trained: TrainedNetwork, images: np.ndarray) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits (N, 1, S, S) and all maps before their last ReLU, by name.

    `images` are (N, S, S, 3) uint8.
    """
    return trained.network.forward_features(normalize(images))


# A finished run -----------------------------------------------------------------------------------


def restored(run: results.Result, teacher: TrainedNetwork) -> tuple[TrainedNetwork, nn.ModuleDict]:
    """Student and loss terms (connectors, graph) of a run as they were after the last epoch.

    `checkpoint_best` has the student alone.
    """
    student = load_network(run)
    cfg, channels = student.cfg, teacher.network.feature_channels()
    if not isinstance(cfg, DistillConfig):
        raise LesionKDError(f"{results.short(run.path)} is a teacher; give the run of a student")
    level = cfg.edge_level.rpartition(":")[2]
    graph = EdgeGraph.build(channels[level], cfg)
    measured = Measured(
        FittedGraph(graph, torch.ones(cfg.states)),
        {name: torch.zeros(count) for name, count in channels.items()},
    )  # the right shapes; the checkpoint has the values
    terms = build_terms(cfg, student.network, teacher.network, measured)
    whole = nn.ModuleDict({"network": student.network, "terms": terms})
    whole.load_state_dict(results.read_checkpoint(run.path / "checkpoint_last")["objective"])
    whole.eval().requires_grad_(False)
    return student, terms


class RefinementView(NamedTuple):
    """Maps of one image at the first level of L_feat, each (C, h, w), and the channel to show."""

    teacher: np.ndarray
    target: np.ndarray
    student: np.ndarray
    channel: int


@torch.no_grad()
def refinement_view(
    run: results.Result, teacher: TrainedNetwork, image: np.ndarray
) -> RefinementView:
    """T, T' = max(T, m) and the connected S of an image (S, S, 3) at the shallowest level (S3).

    The channel is the one with the largest mean positive response of T. Student and connector are
    those of the last epoch.
    """
    student, terms = restored(run, teacher)
    if "feat" not in terms:
        raise LesionKDError(f"{results.short(run.path)} was trained without the loss term 'feat'")
    loss = terms["feat"]
    assert isinstance(loss, FeatureRefinement)
    name_s, name_t = loss.pairs[0]
    t = feature_maps(teacher, image[None])[1][name_t]
    s = loss.connectors[0](feature_maps(student, image[None])[1][name_s])
    target = margin_relu(t, loss.get_buffer("margin0"))
    channel = int(t[0].clamp_min(0).mean((1, 2)).argmax())
    return RefinementView(t[0].numpy(), target[0].numpy(), s[0].numpy(), channel)


def graph_of(run: results.Result, teacher: TrainedNetwork) -> tuple[FittedGraph, TrainedNetwork]:
    """The graph that a student run was trained with, and the student as the graph sees it.

    The student has the one map that the graph reads, after its connector and under the teacher's
    name, so `node_views` takes it like the teacher.

    Raises
    ------
    LesionKDError
        The run has no graph: it was trained without L_edge.
    """
    student, terms = restored(run, teacher)
    found = [term for term in terms.values() if isinstance(term, EdgeReasoning)]
    if not found:
        raise LesionKDError(
            f"{results.short(run.path)} has no edge graph; its loss terms are {', '.join(terms)}. "
            "Give a run with 'edge' or 'edge_shuffled'"
        )
    seen = TrainedNetwork(_Connected(student.network, found[0]), student.cfg, student.path)
    return FittedGraph(found[0].graph, found[0].std), seen


class _Connected(Network):
    """A student with the map that the graph reads."""

    def __init__(self, student: Network, term: EdgeReasoning) -> None:
        super().__init__()
        self.student, self.term = student, term

    def forward_features(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        logits, maps = self.student.forward_features(x)
        return logits, {self.term.teacher_map: self.term.connector(maps[self.term.student_map])}


# Nodes of the graph -------------------------------------------------------------------------------


@dataclass(frozen=True)
class NodeView:
    """One case in the graph, at the size of the map.

    Attributes
    ----------
    edge : (h, w)
    members : (K, h, w)
        The pixels whose mean key is the anchor of each node.
    projection : (K, h, w)
    anchors : (K, 2)
        Row and column of the mean place of each anchor's pixels; NaN without any.
    background : int or None
        The node of the pixels off the edge.
    """

    edge: np.ndarray
    members: np.ndarray
    projection: np.ndarray
    anchors: np.ndarray
    background: int | None = None

    @property
    def live(self) -> np.ndarray:
        """(K,) bool: nodes that pixels can be assigned to."""
        return np.asarray(self.projection.any((1, 2)))


@torch.no_grad()
def node_views(
    cfg: GraphConfig,
    network: TrainedNetwork,
    fitted: FittedGraph,
    images: np.ndarray,
    masks: np.ndarray,
) -> list[NodeView]:
    """How the pixels of each case are assigned to the nodes of the graph of L_edge (step S4).

    Parameters
    ----------
    network : TrainedNetwork
        The teacher, or the student from `graph_of`.
    fitted : FittedGraph
        The fitted graph, or that from `graph_of`.
    images, masks : (N, S, S, 3) uint8, (N, S, S) 0/1
    """
    name, graph = cfg.edge_level.rpartition(":")[2], fitted.graph
    x = feature_maps(network, images)[1][name]
    edge = graph.edge_at(_edges(masks, cfg.edge_width), stride_of(name))
    size = x.shape[-2:]
    projection = graph.project(x, edge)[1].unflatten(2, size)
    members = graph.members(edge).unflatten(2, size)
    places = torch.meshgrid(*(torch.arange(float(n)) for n in size), indexing="ij")
    keys = torch.stack([*places, torch.ones(size)]).expand(len(x), -1, -1, -1)
    sums = graph.anchors_of(keys, edge)  # row, column and mass of each node's pixels
    anchors = torch.where(sums[:, 2:] > 0, sums[:, :2] / sums[:, 2:], torch.nan).transpose(1, 2)
    background = projection.shape[1] - 1 if graph.background else None
    arrays = (part.numpy() for part in (edge[:, 0], members, projection, anchors))
    return [NodeView(e, m, p, a, background) for e, m, p, a in zip(*arrays)]
