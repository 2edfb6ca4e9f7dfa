"""L_edge: projection onto graph nodes, graph convolution, comparison (step S4; Te et al., ECCV 2020)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ranks
from ..edges import edge_at_stride
from ..networks import Network, match_levels, stride_of
from .feature_refinement import Connector, Once, anew, require_same_size


def grid_cells(edge: Tensor, grid: int, frame: str = "image") -> Tensor:
    """Which cell of a k x k grid every pixel lies in.

    Parameters
    ----------
    edge : (N, 1, H, W)
    frame : 'image' or 'lesion'
        The grid covers the image, or the bounding box of the edge, image by image; pixels outside
        belong to the nearest cell.

    Returns
    -------
    (N, K, L)
        One-hot over the K = k^2 cells, L = H W, row by row.
    """
    n, _, height, width = edge.shape
    axes = []
    for dim, size in ((-1, height), (-2, width)):
        place = torch.arange(size, device=edge.device).expand(n, size)
        low, span = torch.zeros(n, 1, device=edge.device), torch.full((n, 1), float(size), device=edge.device)
        if frame == "lesion":
            has = edge[:, 0].amax(dim) > 0  # (N, size)
            low = torch.where(has, place, size).amin(1, keepdim=True).clamp_max(size - 1)
            span = (torch.where(has, place, -1).amax(1, keepdim=True) - low + 1).clamp_min(1)
        axes.append(((place - low) * grid / span).floor().clamp(0, grid - 1).long())
    cell = axes[0][:, :, None] * grid + axes[1][:, None, :]
    return F.one_hot(cell.flatten(1), grid * grid).transpose(1, 2).to(edge.dtype)


class Cells(NamedTuple):
    """What a grid makes of an edge label: the same for every map of that resolution."""

    edge: Tensor  # (N, 1, H, W)
    average: Tensor  # (N, K, L), rows sum to 1, or 0 in a cell without an edge; unused by 'eagr'
    live: Tensor  # (N, K) bool, cells that hold an edge pixel


class EdgeGraph(nn.Module):
    """Projection -> graph -> reasoning over edge pixels; K = grid^2 nodes of `states` channels.

    Parameters
    ----------
    channels : int
        C of the feature map that comes in.
    anchors : 'masked_mean', 'masked_cosine' or 'eagr'
        How a node's anchor is made; see METHOD, L_edge. Only 'eagr' keeps cells without an edge.
    normalize : 'mass', 'none' or 'size'
        Nodes divided by their mass sum_L P, not at all, or by L.

    Source: METHOD, L_edge; Te et al. 2020, edge-aware graph representation learning.
    """

    TEMPERATURE = 0.1

    def __init__(
        self, channels: int, states: int = 16, grid: int = 4, anchors: str = "masked_mean",
        normalize: str = "mass", frame: str = "image",
    ) -> None:
        super().__init__()
        self.grid, self.anchors, self.normalize, self.frame = grid, anchors, normalize, frame
        self.phi = nn.Conv2d(channels, states, 1)
        self.theta = nn.Conv2d(channels, states, 1)
        self.node_mixing = nn.Linear(grid * grid, grid * grid)
        self.state_mixing = nn.Linear(states, states, bias=False)

    def edge_at(self, edge: Tensor, stride: int) -> Tensor:
        """The full-size edge (N, 1, H, W) at a map's stride: max pooled, or by nearest in 'eagr' as in the original."""
        return edge[..., ::stride, ::stride] if self.anchors == "eagr" else edge_at_stride(edge, stride)

    def cells(self, edge: Tensor) -> Cells:
        """(N, 1, H, W) at the map's resolution -> which pixels make which anchor."""
        if self.anchors == "eagr":
            return Cells(edge, edge.new_zeros(0), edge.new_ones(len(edge), self.grid**2, dtype=torch.bool))
        member = grid_cells(edge, self.grid, self.frame) * edge.flatten(2)
        count = member.sum(-1, keepdim=True)
        return Cells(edge, member / count.clamp_min(1e-6), count.squeeze(-1) > 0)

    def live_nodes(self, edge: Tensor) -> Tensor:
        """(N, 1, H, W) -> (N, K) bool: cells that hold an edge pixel; in 'eagr' every cell."""
        return self.cells(edge).live

    def anchors_of(self, keys: Tensor, cells: Cells) -> Tensor:
        """Keys (N, s, H, W) gathered at edge pixels, cell by cell -> (N, s, K)."""
        if self.anchors == "eagr":
            pooled = F.adaptive_avg_pool2d(keys * cells.edge, self.grid + 2)
            return pooled[:, :, 1:-1, 1:-1].flatten(2)
        return keys.flatten(2) @ cells.average.transpose(1, 2)

    def project(self, x: Tensor, edge: Tensor | Cells) -> tuple[Tensor, Tensor]:
        """Soft assignment of every pixel to the nodes (METHOD, L_edge 1).

        P = softmax over live nodes of A^T Q, with keys Q = theta(X) and anchors A.

        Parameters
        ----------
        x : (N, C, H, W)
        edge : (N, 1, H, W)
            float in 0..1 at the map's own resolution; or the `cells` of it.

        Returns
        -------
        states : (N, s, L)
            V0 = phi(X), L = H W.
        projection : (N, K, L)
            Columns sum to 1; 0 in cells without an edge, all 0 in an image without one (but for
            'eagr', which knows no empty cells).
        """
        cells = edge if isinstance(edge, Cells) else self.cells(edge)
        keys = self.theta(x)
        anchors, flat = self.anchors_of(keys, cells), keys.flatten(2)
        if self.anchors == "masked_cosine":
            anchors, flat = F.normalize(anchors, dim=1) / self.TEMPERATURE, F.normalize(flat, dim=1)
        scores = anchors.transpose(1, 2) @ flat  # (N, K, L)
        live = cells.live.unsqueeze(-1)
        lowest = torch.finfo(scores.dtype).min  # not -inf: without any live node that would give NaN
        return self.phi(x).flatten(2), scores.masked_fill(~live, lowest).softmax(dim=1) * live

    def build_graph(self, states: Tensor, projection: Tensor) -> Tensor:
        """V = V0 P^T, normalized: (N, s, L), (N, K, L) -> nodes (N, s, K); 0 in empty cells (2)."""
        nodes = states @ projection.transpose(1, 2)
        if self.normalize == "mass":
            return nodes / projection.sum(-1).clamp_min(1e-6).unsqueeze(1)
        return nodes / states.shape[-1] if self.normalize == "size" else nodes

    def reason(self, nodes: Tensor) -> Tensor:
        """H = W_g (V A_g^T + b - V), before its ReLU: (N, s, K) -> (N, s, K) (3)."""
        mixed = self.node_mixing(nodes) - nodes
        reasoned: Tensor = self.state_mixing(mixed.transpose(1, 2))
        return reasoned.transpose(1, 2)

    def forward(self, x: Tensor, edge: Tensor | Cells) -> Tensor:
        """Steps 1 to 3: map (N, C, H, W) and edge at its resolution -> H (N, s, K), pre-ReLU."""
        return self.reason(self.build_graph(*self.project(x, edge)))


class EdgeHead(nn.Module):
    """Re-projection of the reasoned nodes and a 1x1 head: what the graph is fitted with, then dropped."""

    def __init__(self, states: int) -> None:
        super().__init__()
        self.head = nn.Conv2d(states, 1, 1)

    def forward(self, graph: EdgeGraph, x: Tensor, edge: Tensor) -> Tensor:
        """BCE of the re-projected edge against Label_edge over images that have one, ()."""
        has_edge = edge.flatten(1).amax(1) > 0
        x, edge, share = x[has_edge], edge[has_edge], ranks.share_of(has_edge.sum())
        if not len(x):
            return self.head.weight.sum() * 0.0
        states, projection = graph.project(x, edge)
        reasoned = graph.reason(graph.build_graph(states, projection)).relu()
        logits = self.head((reasoned @ projection).unflatten(2, x.shape[-2:]))
        return share * F.binary_cross_entropy_with_logits(logits, edge)


class EdgeReasoning(nn.Module):
    """Connector, graph and L_edge (step S4).

    Student and teacher pass through one module; gradients flow through it into connector and student.
    L_edge = mean over states and live nodes of ((H_S - H_T) / std_T)^2, image by image, an image
    without an edge adding 0, over N.

    Parameters
    ----------
    student, teacher : networks
        Read for channels; neither is kept.
    graph : EdgeGraph
        Fitted on the teacher and frozen here; or, with a `head`, learned along.
    std : (s,)
        Standard deviation of the teacher's H per state channel over the training set; learned along, that
        of the batch takes its place.
    level : str
        Name of the map, or 'student:teacher' of equal stride.
    head : EdgeHead, optional
        Trains graph and head along with the student (`graph = 'joint'`): the BCE of the re-projected edge
        is added on both sides, which keeps the graph from collapsing.

    Source: METHOD, L_edge 4 and "Who learns what".
    """

    std: Tensor

    def __init__(self, student: Network, teacher: Network, graph: EdgeGraph, std: Tensor, level: str, head: EdgeHead | None = None) -> None:
        super().__init__()
        [(self.student_map, self.teacher_map)] = match_levels(student, teacher, (level,))
        self.stride = stride_of(self.teacher_map)
        self.connector = Connector(
            student.feature_norms()[self.student_map].num_features, teacher.feature_norms()[self.teacher_map].num_features
        )
        self.graph = graph.requires_grad_(head is not None)
        self.head = head
        self.register_buffer("std", std.clamp_min(1e-6).view(1, -1, 1))

    def forward(self, student_maps: dict[str, Tensor], teacher_maps: dict[str, Tensor], edge: Tensor, once: Once = anew) -> Tensor:
        """Maps by name and the full-size edge label (N, 1, H, W) -> L_edge, (); `once` is `Step.once`."""
        x, target = self.connector(student_maps[self.student_map].float()), teacher_maps[self.teacher_map].detach()
        require_same_size(x, target)
        key = ("graph", id(self.graph), id(edge))  # arms share a frozen graph, and what the teacher becomes in it
        cells: Cells = once((*key, "cells"), lambda: self.graph.cells(self.graph.edge_at(edge, self.stride).float()))
        if self.head is not None:
            return self._learned_along(self.head, x, target.float(), cells)
        with torch.no_grad():
            reasoned = once(key, lambda: self.graph(target.float(), cells))
        return _node_distance(self.graph(x, cells), reasoned, self.std, cells)

    def _learned_along(self, head: EdgeHead, x: Tensor, target: Tensor, cells: Cells) -> Tensor:
        reasoned = self.graph(target, cells)
        live = ranks.gather(cells.live.float()) > 0
        if not live.any():
            return x.sum() * 0.0
        std = ranks.gather(reasoned.detach()).transpose(1, 2)[live].std(0, correction=0).clamp_min(1e-6).view(1, -1, 1)
        distance = _node_distance(self.graph(x, cells), reasoned, std, cells)
        along: Tensor = distance + head(self.graph, x, cells.edge) + head(self.graph, target, cells.edge)
        return along


def _node_distance(student: Tensor, teacher: Tensor, std: Tensor, cells: Cells) -> Tensor:
    """Nodes (N, s, K) of both sides -> mean over states and live nodes of an image with an edge, then over N."""
    live = cells.live & (cells.edge.flatten(1).amax(1) > 0).unsqueeze(1)
    squared = ((student - teacher) / std).square().mean(1)  # (N, K)
    return ((squared * live).sum(1) / live.sum(1).clamp_min(1)).mean()


class EdgeRelation(nn.Module):
    """L_edge without a learned graph: how alike the lesion's parts are to each other, in both networks.

    Nodes are the raw maps' means over each cell's edge pixels; L_edge = mean over pairs of live nodes of
    (cos_S - cos_T)^2, image by image, over N. A pair of a node with itself counts nothing, so an image
    needs two live nodes to add anything.

    Source: METHOD, L_edge, `relation`.
    """

    def __init__(self, student: Network, teacher: Network, level: str, grid: int, frame: str) -> None:
        super().__init__()
        [(self.student_map, self.teacher_map)] = match_levels(student, teacher, (level,))
        self.stride = stride_of(self.teacher_map)
        self.graph = EdgeGraph(1, 1, grid, frame=frame).requires_grad_(False)

    def forward(self, student_maps: dict[str, Tensor], teacher_maps: dict[str, Tensor], edge: Tensor, once: Once = anew) -> Tensor:
        """Maps by name and the full-size edge label (N, 1, H, W) -> L_edge, (); `once` as in `EdgeReasoning`."""
        x, target = student_maps[self.student_map].float(), teacher_maps[self.teacher_map].detach().float()
        cells: Cells = once(("relation", id(self.graph), id(edge)), lambda: self.graph.cells(edge_at_stride(edge, self.stride).float()))
        cosines = [F.normalize(self.graph.anchors_of(m, cells), dim=1, eps=1e-6) for m in (x, target)]  # (N, C, K)
        apart = (cosines[0].mT @ cosines[0] - cosines[1].mT @ cosines[1]).square()  # (N, K, K)
        pairs = cells.live.unsqueeze(1) & cells.live.unsqueeze(2) & ~torch.eye(cells.live.shape[1], dtype=torch.bool, device=x.device)
        return ((apart * pairs).sum((1, 2)) / pairs.sum((1, 2)).clamp_min(1)).mean()


def derange(edge: Tensor) -> Tensor:
    """The control: each image with an edge gets the edge of another such image of the batch.

    A cyclic shift among them: no image keeps its own where there are two or more. A single one has
    no partner and gets none, so it adds 0.
    """
    has_edge = (edge.flatten(1).amax(1) > 0).nonzero().squeeze(1)
    shuffled = torch.zeros_like(edge)
    if len(has_edge) > 1:
        shuffled[has_edge] = edge[has_edge.roll(1)]
    return shuffled
