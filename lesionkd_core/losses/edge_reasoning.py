"""L_edge: projection to graph nodes, graph convolution, comparison (step S4; Te et al. 2020)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import GraphConfig
from ..edges import edge_at_stride
from ..models import Network, match_levels, stride_of
from .feature_refinement import Connector
from .terms import LossTerm, Setup, Step, register, require_same_size


def grid_cells(height: int, width: int, grid: int) -> Tensor:
    """Assign every pixel of an H x W map to a cell of a k x k grid.

    Returns
    -------
    (K, L) float32
        One-hot over the K = k^2 cells, row by row; L = H W pixels.

    >>> grid_cells(2, 4, grid=2).int()
    tensor([[1, 1, 0, 0, 0, 0, 0, 0],
            [0, 0, 1, 1, 0, 0, 0, 0],
            [0, 0, 0, 0, 1, 1, 0, 0],
            [0, 0, 0, 0, 0, 0, 1, 1]], dtype=torch.int32)
    """
    row = torch.arange(height) * grid // height
    column = torch.arange(width) * grid // width
    cell = row[:, None] * grid + column
    return F.one_hot(cell.flatten(), grid * grid).T.float()


class EdgeGraph(nn.Module):
    """Projection, graph and reasoning over edge pixels, K = grid^2 nodes of `states` channels.

    Parameters
    ----------
    channels : int
        C of the feature map.
    anchors : 'masked_mean', 'masked_cosine' or 'eagr'
        A node's anchor is the mean key of its cell's edge pixels; the same with normalized keys and
        a temperature; or the original's average pooling of keys times edge.
    normalize : 'mass', 'none' or 'size'
        Divide nodes by their mass sum_L P, not at all, or by L. The original has the last two.
    background : bool
        One more node, whose anchor is the mean key of the pixels off the edge. Without it every
        pixel has to be assigned to a node of the edge. Not for 'eagr'.

    Source: Te et al. 2020, section 3; docs/method.md, L_edge.
    """

    TEMPERATURE = 0.1

    def __init__(
        self,
        channels: int,
        states: int = 16,
        grid: int = 4,
        anchors: str = "masked_mean",
        normalize: str = "mass",
        background: bool = False,
    ) -> None:
        super().__init__()
        self.grid, self.anchors, self.normalize = grid, anchors, normalize
        self.background = background
        nodes = grid * grid + background
        self.phi = nn.Conv2d(channels, states, 1)
        self.theta = nn.Conv2d(channels, states, 1)
        self.node_mixing = nn.Linear(nodes, nodes)
        self.state_mixing = nn.Linear(states, states, bias=False)

    @classmethod
    def build(cls, channels: int, cfg: GraphConfig) -> Self:
        """A new graph with the options of a configuration; EAGR's has no background node."""
        background = cfg.anchors != "eagr"
        return cls(channels, cfg.states, cfg.grid, cfg.anchors, background=background)

    def edge_at(self, edge: Tensor, stride: int) -> Tensor:
        """A full-size edge (N, 1, H, W) at a map's stride: max-pooled; nearest in 'eagr'."""
        if self.anchors == "eagr":
            return edge[..., ::stride, ::stride]
        return edge_at_stride(edge, stride)

    def members(self, edge: Tensor) -> Tensor:
        """The pixels that make each node's anchor: edge (N, 1, H, W) -> (N, K, L)."""
        height, width = edge.shape[-2:]
        flat = edge.flatten(2)
        cells = grid_cells(height, width, self.grid).to(edge) * flat
        return torch.cat([cells, 1 - flat], 1) if self.background else cells

    def live_nodes(self, edge: Tensor) -> Tensor:
        """Cells that have an edge pixel, (N, 1, H, W) -> (N, K) bool; in 'eagr' all cells."""
        if self.anchors == "eagr":
            return edge.new_ones(len(edge), self.grid**2, dtype=torch.bool)
        return self.members(edge).amax(-1) > 0

    def anchors_of(self, keys: Tensor, edge: Tensor) -> Tensor:
        """Anchors A of the nodes: keys (N, s, H, W) at edge pixels -> (N, s, K)."""
        if self.anchors == "eagr":
            pooled = F.adaptive_avg_pool2d(keys * edge, self.grid + 2)
            return pooled[:, :, 1:-1, 1:-1].flatten(2)
        members = self.members(edge)
        mean = members / members.sum(-1, keepdim=True).clamp_min(1e-6)
        return keys.flatten(2) @ mean.transpose(1, 2)

    def project(self, x: Tensor, edge: Tensor) -> tuple[Tensor, Tensor]:
        """Projection: assign every pixel softly to the nodes.

        P = softmax over live nodes of A^T Q, with keys Q = theta(X) and anchors A.

        Parameters
        ----------
        x : (N, C, H, W)
        edge : (N, 1, H, W)
            In 0..1, at the map's size.

        Returns
        -------
        states : (N, s, L)
            V0 = phi(X), L = H W.
        projection : (N, K, L)
            Columns sum to 1. 0 for cells without an edge; all 0 in an image without one.
        """
        keys = self.theta(x)
        anchors, flat = self.anchors_of(keys, edge), keys.flatten(2)
        if self.anchors == "masked_cosine":
            anchors = F.normalize(anchors, dim=1) / self.TEMPERATURE
            flat = F.normalize(flat, dim=1)
        scores = anchors.transpose(1, 2) @ flat  # (N, K, L)
        live = self.live_nodes(edge).unsqueeze(-1)
        lowest = torch.finfo(scores.dtype).min  # -inf would give NaN where no node is live
        return self.phi(x).flatten(2), scores.masked_fill(~live, lowest).softmax(dim=1) * live

    def build_graph(self, states: Tensor, projection: Tensor) -> Tensor:
        """Nodes V = V0 P^T, normalized: (N, s, L), (N, K, L) -> (N, s, K)."""
        nodes = states @ projection.transpose(1, 2)
        if self.normalize == "mass":
            return nodes / projection.sum(-1).clamp_min(1e-6).unsqueeze(1)
        return nodes / states.shape[-1] if self.normalize == "size" else nodes

    def reason(self, nodes: Tensor) -> Tensor:
        """Graph convolution H = W_g (V A_g^T + b - V), before its ReLU: (N, s, K) -> (N, s, K)."""
        mixed = self.node_mixing(nodes) - nodes
        return self.state_mixing(mixed.transpose(1, 2)).transpose(1, 2)  # type: ignore[no-any-return]

    def forward(self, x: Tensor, edge: Tensor) -> Tensor:
        """Map (N, C, H, W) and edge (N, 1, H, W) at its size -> H (N, s, K), before its ReLU."""
        return self.reason(self.build_graph(*self.project(x, edge)))


class EdgeHead(nn.Module):
    """Re-projection and 1x1 head: predicts the edge from H; fits the graph, then is dropped."""

    def __init__(self, states: int) -> None:
        super().__init__()
        self.head = nn.Conv2d(states, 1, 1)

    def forward(self, graph: EdgeGraph, x: Tensor, edge: Tensor) -> Tensor:
        """BCE of the predicted edge against Label_edge, over the images that have one -> ()."""
        has_edge = edge.flatten(1).amax(1) > 0
        x, edge = x[has_edge], edge[has_edge]
        states, projection = graph.project(x, edge)
        reasoned = graph.reason(graph.build_graph(states, projection)).relu()
        logits = self.head((reasoned @ projection).unflatten(2, x.shape[-2:]))
        return F.binary_cross_entropy_with_logits(logits, edge)


@dataclass(frozen=True)
class FittedGraph:
    """A graph module fitted on the frozen teacher, and the standard deviation of its H, (s,)."""

    graph: EdgeGraph
    std: Tensor


def node_distance(student: Tensor, teacher: Tensor, std: Tensor, live: Tensor) -> Tensor:
    """Mean squared difference of the live nodes of each image, then the mean over N.

    Parameters
    ----------
    student, teacher : (N, s, K)
        H of both networks.
    std : (s,)
        The teacher's standard deviation of each state channel.
    live : (N, K) bool

    Returns
    -------
    ()
        An image without a live node adds 0.
    """
    squared = ((student - teacher) / std.view(1, -1, 1)).square().mean(1)  # (N, K)
    return ((squared * live).sum(1) / live.sum(1).clamp_min(1)).mean()


OF_THE_GRAPH = ("edge_width", "edge_level", "grid", "states", "anchors", "graph_epochs")
EDGE_OPTIONS = (*OF_THE_GRAPH, "connector_lr")
EDGE_SWEEP = (0.01, 0.03, 0.1, 0.3)


@register("edge", label="+ L_edge", weight=0.1, sweep=EDGE_SWEEP, options=EDGE_OPTIONS)
class EdgeReasoning(LossTerm):
    """L_edge: the node states H of student and teacher should agree (step S4).

    Both networks pass through one frozen graph that was fitted on the teacher; gradients flow
    through it into connector and student.

    Parameters
    ----------
    student, teacher : Network
        Read for channels; neither is kept.
    graph : EdgeGraph
    std : (s,)
        Standard deviation of the teacher's H over the training set.
    level : str
        Name of the map, or 'student:teacher' of equal stride.

    Source: patent, step S4; docs/method.md, L_edge.
    """

    needs_graph: ClassVar[bool] = True
    std: Tensor

    def __init__(
        self, student: Network, teacher: Network, graph: EdgeGraph, std: Tensor, level: str
    ) -> None:
        super().__init__()
        [(self.student_map, self.teacher_map)] = match_levels(student, teacher, (level,))
        self.stride = stride_of(self.teacher_map)
        ours, theirs = student.feature_channels(), teacher.feature_channels()
        self.connector = Connector(ours[self.student_map], theirs[self.teacher_map])
        self.graph = graph.requires_grad_(False)
        self.register_buffer("std", std.clamp_min(1e-6))

    @classmethod
    def build(cls, setup: Setup) -> Self:
        cfg, fitted = setup.cfg, setup.measured.fitted
        assert isinstance(cfg, GraphConfig) and fitted is not None
        return cls(setup.student, setup.teacher, fitted.graph, fitted.std, cfg.edge_level)

    def edge_of(self, step: Step) -> Tensor:
        """The full-size edge label that both networks are read at, (N, 1, H, W)."""
        return step.edge

    def forward(self, step: Step) -> Tensor:
        """Maps and edge label -> ()."""
        edge = self.graph.edge_at(self.edge_of(step), self.stride).float()
        target = step.teacher_maps[self.teacher_map].float()
        x = self.connector(step.maps[self.student_map].float())
        require_same_size(x, target)
        with torch.no_grad():
            reasoned = self.graph(target, edge)
        return node_distance(self.graph(x, edge), reasoned, self.std, live_in(self.graph, edge))


def live_in(graph: EdgeGraph, edge: Tensor) -> Tensor:
    """Live nodes (N, K) of images with an edge; none in an image without."""
    return graph.live_nodes(edge) & (edge.flatten(1).amax(1) > 0).unsqueeze(1)


@register(
    "edge_shuffled", label="+ L_edge, shuffled", weight=0.1, sweep=EDGE_SWEEP, options=EDGE_OPTIONS
)
class ShuffledEdgeReasoning(EdgeReasoning):
    """Control: L_edge with the edge label of another image, for both networks.

    If its gain is as large as that of L_edge, the gain is not due to the edges.
    """

    def edge_of(self, step: Step) -> Tensor:
        return derange(super().edge_of(step))


def derange(edge: Tensor) -> Tensor:
    """Give each image with an edge the edge of the next such image in the batch.

    (N, 1, H, W) -> the same. The only image with an edge gets none and adds 0 to the loss.
    """
    has_edge = (edge.flatten(1).amax(1) > 0).nonzero().squeeze(1)
    shuffled = torch.zeros_like(edge)
    if len(has_edge) > 1:
        shuffled[has_edge] = edge[has_edge.roll(1)]
    return shuffled
