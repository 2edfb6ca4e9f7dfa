"""L_edge: projection to graph nodes, graph convolution, comparison (step S4; Te et al. 2020)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..edges import edge_at_stride
from ..models import Network, channels_of, match_levels, stride_of
from .feature_refinement import Connector
from .terms import register, require_same_size

if TYPE_CHECKING:
    from .terms import Step


def grid_cells(edge: Tensor, grid: int, frame: str = "image") -> Tensor:
    """Assign every pixel to a cell of a k x k grid.

    Parameters
    ----------
    edge : (N, 1, H, W)
    frame : 'image' or 'lesion'
        The grid covers the image, or the bounding box of each image's edge; pixels outside the box
        belong to the nearest cell.

    Returns
    -------
    (N, K, L)
        One-hot over the K = k^2 cells, row by row; L = H W pixels.
    """
    n, _, height, width = edge.shape
    axes = []
    for dim, size in ((-1, height), (-2, width)):
        place = torch.arange(size, device=edge.device).expand(n, size)
        low = torch.zeros(n, 1, device=edge.device)
        span = torch.full((n, 1), float(size), device=edge.device)
        if frame == "lesion":
            has = edge[:, 0].amax(dim) > 0  # (N, size)
            low = torch.where(has, place, size).amin(1, keepdim=True).clamp_max(size - 1)
            high = torch.where(has, place, -1).amax(1, keepdim=True)
            span = (high - low + 1).clamp_min(1)
        axes.append(((place - low) * grid / span).floor().clamp(0, grid - 1).long())
    cell = axes[0][:, :, None] * grid + axes[1][:, None, :]
    return F.one_hot(cell.flatten(1), grid * grid).transpose(1, 2).to(edge.dtype)


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
    frame : 'image' or 'lesion'
        See `grid_cells`.
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
        frame: str = "image",
        background: bool = False,
    ) -> None:
        super().__init__()
        self.grid, self.anchors, self.normalize, self.frame = grid, anchors, normalize, frame
        self.background = background
        nodes = grid * grid + background
        self.phi = nn.Conv2d(channels, states, 1)
        self.theta = nn.Conv2d(channels, states, 1)
        self.node_mixing = nn.Linear(nodes, nodes)
        self.state_mixing = nn.Linear(states, states, bias=False)

    @classmethod
    def build(cls, channels: int, cfg: Any) -> EdgeGraph:
        """A new graph with the options of a `GraphConfig`."""
        shape = channels, cfg.states, cfg.grid, cfg.anchors
        background = cfg.background_node and cfg.anchors != "eagr"
        return cls(*shape, frame=cfg.grid_frame, background=background)

    def edge_at(self, edge: Tensor, stride: int) -> Tensor:
        """A full-size edge (N, 1, H, W) at a map's stride: max-pooled; nearest in 'eagr'."""
        if self.anchors == "eagr":
            return edge[..., ::stride, ::stride]
        return edge_at_stride(edge, stride)

    def members(self, edge: Tensor) -> Tensor:
        """The pixels that make each node's anchor: edge (N, 1, H, W) -> (N, K, L)."""
        flat = edge.flatten(2)
        cells = grid_cells(edge, self.grid, self.frame) * flat
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
        """BCE of the predicted edge against Label_edge, over images that have one -> ()."""
        has_edge = edge.flatten(1).amax(1) > 0
        x, edge = x[has_edge], edge[has_edge]
        if not len(x):
            return self.head.weight.sum() * 0.0
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


GRAPH_OPTIONS = (
    "edge_width",
    "edge_level",
    "grid",
    "grid_frame",
    "states",
    "anchors",
    "background_node",
    "graph_epochs",
    "graph_lr",
    "connector_lr",
)
EDGE_SWEEP = (0.01, 0.03, 0.1, 0.3)


@register("edge", label="+ L_edge", weight=0.1, sweep=EDGE_SWEEP, options=GRAPH_OPTIONS)
class EdgeReasoning(nn.Module):
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

    needs_graph = True
    std: Tensor

    def __init__(
        self, student: Network, teacher: Network, graph: EdgeGraph, std: Tensor, level: str
    ) -> None:
        super().__init__()
        [(self.student_map, self.teacher_map)] = match_levels(student, teacher, (level,))
        self.teacher_maps = (self.teacher_map,)
        self.stride = stride_of(self.teacher_map)
        channels = channels_of(student, self.student_map), channels_of(teacher, self.teacher_map)
        self.connector = Connector(*channels)
        self.graph = graph.requires_grad_(False)
        self.register_buffer("std", std.clamp_min(1e-6))

    @classmethod
    def build(cls, cfg: Any, student: Network, teacher: Network, measured: Any) -> nn.Module:
        return cls(student, teacher, measured.fitted.graph, measured.fitted.std, cfg.edge_level)

    def edge_of(self, step: Step) -> Tensor:
        """The full-size edge label that both networks are read at, (N, 1, H, W)."""
        assert step.edge is not None, "L_edge needs the edge label"
        return step.edge

    def forward(self, step: Step) -> Tensor:
        """Maps and edge label -> ()."""
        edge = self.graph.edge_at(self.edge_of(step), self.stride).float()
        target = step.teacher_maps[self.teacher_map].float()
        x = self.connector(step.maps[self.student_map].float())
        require_same_size(x, target)
        return self.compare(x, target, edge, live_in(self.graph, edge))

    def compare(self, x: Tensor, target: Tensor, edge: Tensor, live: Tensor) -> Tensor:
        """Connected student map and teacher map (N, C, H, W) -> ()."""
        with torch.no_grad():
            reasoned = self.graph(target, edge)
        return node_distance(self.graph(x, edge), reasoned, self.std, live)


def live_in(graph: EdgeGraph, edge: Tensor) -> Tensor:
    """Live nodes (N, K) of images with an edge; none in an image without."""
    return graph.live_nodes(edge) & (edge.flatten(1).amax(1) > 0).unsqueeze(1)


@register(
    "edge_shuffled", label="+ L_edge, shuffled", weight=0.1, sweep=EDGE_SWEEP, options=GRAPH_OPTIONS
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


@register(
    "edge_joint", label="+ L_edge, joint graph", weight=0.1, sweep=EDGE_SWEEP, options=GRAPH_OPTIONS
)
class JointEdgeReasoning(EdgeReasoning):
    """L_edge with a graph that is trained with the student, as in EAGR.

    The BCE of the predicted edge is added for both networks, since without it the graph collapses:
    H shrinks until the distance is 0. The standard deviation is that of the batch.
    """

    needs_graph = False

    def __init__(self, student: Network, teacher: Network, graph: EdgeGraph, level: str) -> None:
        states = graph.phi.out_channels
        super().__init__(student, teacher, graph, torch.ones(states), level)
        self.graph.requires_grad_(True)
        self.head = EdgeHead(states)

    @classmethod
    def build(cls, cfg: Any, student: Network, teacher: Network, measured: Any) -> nn.Module:
        channels = channels_of(teacher, cfg.edge_level.rpartition(":")[2])
        return cls(student, teacher, EdgeGraph.build(channels, cfg), cfg.edge_level)

    def compare(self, x: Tensor, target: Tensor, edge: Tensor, live: Tensor) -> Tensor:
        if not live.any():
            return x.sum() * 0.0
        reasoned = self.graph(target, edge)
        std = reasoned.detach().transpose(1, 2)[live].std(0, correction=0).clamp_min(1e-6)
        distance = node_distance(self.graph(x, edge), reasoned, std, live)
        along: Tensor = self.head(self.graph, x, edge) + self.head(self.graph, target, edge)
        return distance + along


@register(
    "edge_relation",
    label="+ edge relation",
    weight=1.0,
    sweep=(0.1, 0.3, 1.0, 3.0),
    options=("edge_width", "edge_level", "grid", "grid_frame"),
)
class EdgeRelation(nn.Module):
    """L_edge without a learned graph: cosine similarities between the cells of each network.

    A cell's vector is the mean of the map over its edge pixels. The loss is the mean over pairs of
    different live cells of (cos_S - cos_T)^2, image by image, then over N.
    """

    def __init__(
        self, student: Network, teacher: Network, level: str, grid: int, frame: str
    ) -> None:
        super().__init__()
        [(self.student_map, self.teacher_map)] = match_levels(student, teacher, (level,))
        self.teacher_maps = (self.teacher_map,)
        self.stride = stride_of(self.teacher_map)
        self.cells = EdgeGraph(1, 1, grid, frame=frame).requires_grad_(False)

    @classmethod
    def build(cls, cfg: Any, student: Network, teacher: Network, measured: Any) -> nn.Module:
        return cls(student, teacher, cfg.edge_level, cfg.grid, cfg.grid_frame)

    def forward(self, step: Step) -> Tensor:
        """Maps and edge label -> ()."""
        assert step.edge is not None, "the relation needs the edge label"
        edge = edge_at_stride(step.edge, self.stride).float()
        live = self.cells.live_nodes(edge)
        maps = step.maps[self.student_map].float(), step.teacher_maps[self.teacher_map].float()
        means = [F.normalize(self.cells.anchors_of(x, edge), dim=1, eps=1e-6) for x in maps]
        ours, theirs = (mean.mT @ mean for mean in means)  # (N, K, K)
        different = ~torch.eye(live.shape[1], dtype=torch.bool, device=live.device)
        pairs = live.unsqueeze(1) & live.unsqueeze(2) & different
        apart = (ours - theirs).square() * pairs
        return (apart.sum((1, 2)) / pairs.sum((1, 2)).clamp_min(1)).mean()
