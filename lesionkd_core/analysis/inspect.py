"""The graph of L_edge looked into: where pixels go, how decided that is, and whether its nodes still say anything (step S4)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from ..config import DistillConfig, GraphConfig, LesionKDError
from ..edges import edge_label_batch
from ..inference import TrainedNetwork, build, read_config
from ..losses import EdgeGraph, FittedGraph
from ..losses.edge_reasoning import Cells
from ..losses.feature_refinement import Connector
from ..networks import Network, stride_of
from ..store import Result, short
from .maps import feature_maps, last_state, restore

BATCH = 16


@dataclass(frozen=True)
class NodeView:
    """One case in the graph, at the map's resolution.

    Edge (h, w), projection P (K, h, w), and anchors (K, 2): row and column of the centroid of each cell's edge
    pixels, NaN in a cell without.
    """

    edge: np.ndarray
    projection: np.ndarray
    anchors: np.ndarray

    @property
    def live(self) -> np.ndarray:
        """(K,) bool, nodes that pixels can go to."""
        return np.asarray(self.projection.any((1, 2)))

    @property
    def entropy(self) -> np.ndarray:
        """(h, w), of P at each pixel in units of log(live nodes): 0 certain, 1 undecided; NaN with fewer than two live nodes."""
        p = self.projection[self.live]
        if len(p) < 2:
            return np.full(self.edge.shape, np.nan)
        entropy: np.ndarray = -(p * np.log(np.maximum(p, 1e-12))).sum(0) / np.log(len(p))
        return entropy

    @property
    def largest(self) -> float:
        """Share of the pixels that have the node of most pixels as their most likely one; NaN without a live node."""
        return np.bincount(self.projection.argmax(0).ravel()).max() / self.edge.size if self.live.any() else np.nan


def graph_of(run: Result) -> FittedGraph:
    """The graph that a student run ended with, frozen or learned along, out of its `checkpoint_last`.

    Raises
    ------
    LesionKDError
        The run has no graph: its terms are without `edge`, or it compares relations.
    """
    cfg, state = _with_graph(run), last_state(run)
    graph = EdgeGraph(state["terms.edge.graph.phi.weight"].shape[1], cfg.states, cfg.grid, cfg.anchors, cfg.normalize, cfg.grid_frame)
    return FittedGraph(restore(graph, state, "terms.edge.graph."), state["terms.edge.std"].flatten())


def _with_graph(run: Result) -> DistillConfig:
    cfg = read_config(run.path)
    if not isinstance(cfg, DistillConfig) or "edge" not in cfg.terms or cfg.graph == "relation":
        raise LesionKDError(f"{short(run.path)} has no edge graph; wants a student run with 'edge' among its terms and graph = 'frozen' or 'joint'")
    return cfg


def connected_student(run: Result) -> TrainedNetwork:
    """A run's student with the one map that the graph reads, brought to the teacher's channels and under the teacher's name for it.

    Student and connector are those of the last epoch. For `node_views`, `assignment_entropy` and `collapse_check`.
    """
    cfg, state = _with_graph(run), last_state(run)
    connector = Connector(*state["terms.edge.connector.0.weight"].shape[1::-1])
    student = restore(build(cfg), state, "network.")
    return TrainedNetwork(_Connected(student, restore(connector, state, "terms.edge.connector."), cfg.edge_level), cfg, run.path)


class _Connected(Network):
    def __init__(self, student: Network, connector: Connector, level: str) -> None:
        super().__init__()
        self.student, self.connector, self.level = student, connector, level

    def forward_features(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        logits, maps = self.student.forward_features(x)
        return logits, {self.level.rpartition(":")[2]: self.connector(maps[self.level.partition(":")[0]])}


def _in_graph(cfg: GraphConfig, network: TrainedNetwork, graph: EdgeGraph, images: np.ndarray, masks: np.ndarray) -> Iterator[tuple[Tensor, Cells]]:
    """The map that the graph reads, (n, C, h, w), and the cells of its edge label, in batches."""
    name = cfg.edge_level.rpartition(":")[2]
    for i in range(0, len(images), BATCH):
        full = edge_label_batch(torch.from_numpy(np.array(masks[i : i + BATCH])).float().unsqueeze(1), cfg.edge_width)
        yield feature_maps(network, images[i : i + BATCH])[1][name], graph.cells(graph.edge_at(full, stride_of(name)))


@torch.no_grad()
def node_views(cfg: GraphConfig, network: TrainedNetwork, fitted: FittedGraph, images: np.ndarray, masks: np.ndarray) -> list[NodeView]:
    """Where a network's pixels go in the graph.

    Parameters
    ----------
    network : TrainedNetwork
        The teacher, or a student from `connected_student`; by its running statistics.
    fitted : FittedGraph
        `Graph.load()`, or `graph_of` a run.
    images, masks : (N, S, S, 3) uint8, (N, S, S) 0/1
    """
    views = []
    for x, cells in _in_graph(cfg, network, fitted.graph, images, masks):
        projection = fitted.graph.project(x, cells)[1].unflatten(2, x.shape[-2:])
        places = torch.stack(torch.meshgrid(*(torch.arange(float(size)) for size in x.shape[-2:]), indexing="ij"))
        gathered, mass = (fitted.graph.anchors_of(keys.expand(len(x), -1, -1, -1), cells) for keys in (places, torch.ones_like(places[:1])))
        anchors = torch.where(mass > 0, gathered / mass, torch.nan).transpose(1, 2)
        views += [NodeView(*(part.numpy() for part in case)) for case in zip(cells.edge[:, 0], projection, anchors)]
    return views


def assignment_entropy(cfg: GraphConfig, network: TrainedNetwork, fitted: FittedGraph, images: np.ndarray, masks: np.ndarray) -> pd.DataFrame:
    """How decided the projection is, case by case; parameters as in `node_views`.

    Returns
    -------
    DataFrame
        case (0 ..), live_nodes, entropy (mean over pixels, in units of log(live nodes)), entropy_of_edge (the same over edge
        pixels), largest_node (share of pixels). NaN where `NodeView` has none.
    """
    rows = []
    for case, view in enumerate(node_views(cfg, network, fitted, images, masks)):
        entropy, edge = view.entropy, view.edge > 0
        of_edge = entropy[edge].mean() if edge.any() else np.nan
        rows.append({"case": case, "live_nodes": int(view.live.sum()), "entropy": entropy.mean(), "entropy_of_edge": of_edge, "largest_node": view.largest})
    return pd.DataFrame(rows, columns=["case", "live_nodes", "entropy", "entropy_of_edge", "largest_node"])


@dataclass(frozen=True)
class Collapse:
    """How far H still tells nodes and cases apart.

    states : DataFrame
        One row a state channel: std (over live nodes of all cases), std_cases (between cases at one node), yardstick,
        relative, relative_cases (both in units of the yardstick).
    dimensions : float
        Participation ratio of H's covariance over states: 1 where all states say the same, at most their number.
    cases : int
        Cases with an edge that were looked at.
    """

    states: pd.DataFrame
    dimensions: float
    cases: int

    @property
    def dead_share(self) -> float:
        """Share of states that vary between cases by less than a twentieth of the yardstick."""
        return float((self.states["relative_cases"] < 0.05).mean())

    @property
    def verdict(self) -> str:
        """'collapsed': half of the states are dead; 'partly collapsed': some are; 'narrow': none, but all say nearly the
        same (under two dimensions); else 'alive'."""
        if self.dead_share:
            return "collapsed" if self.dead_share >= 0.5 else "partly collapsed"
        return "narrow" if self.dimensions < min(2, len(self.states)) else "alive"


@torch.no_grad()
def collapse_check(cfg: GraphConfig, network: TrainedNetwork, fitted: FittedGraph, images: np.ndarray, masks: np.ndarray) -> Collapse:
    """Does H, before its ReLU, still vary over nodes and cases? Parameters as in `node_views`.

    The yardstick is the teacher's spread that the graph was fitted with; of a graph learned along (`graph = 'joint'`, cfg
    the run's own), the spread of H on the same cases at its initialization.

    Source: METHOD, "Who learns what": a graph learned jointly collapses.
    """
    looks = list(_in_graph(cfg, network, fitted.graph, images, masks))
    live = torch.cat([cells.live & (cells.edge.flatten(1).amax(1) > 0).unsqueeze(1) for _, cells in looks])  # (N, K)
    if live.sum() <= live.any(0).sum():
        raise LesionKDError("the collapse check compares cases node by node; these images hold no node that two of them share, give more cases with a lesion")
    reasoned = _reasoned(fitted.graph, looks)
    yardstick = fitted.std
    if cfg.graph == "joint":
        assert isinstance(cfg, DistillConfig)
        yardstick = _spread(_reasoned(_untrained(cfg, fitted.graph), looks), live)[0]
    std, std_cases = _spread(reasoned, live)
    variances = torch.linalg.eigvalsh(torch.atleast_2d(reasoned[live].T.cov(correction=0)))
    states = pd.DataFrame({"std": std, "std_cases": std_cases, "yardstick": yardstick.double()})
    states = states.assign(relative=states["std"] / states["yardstick"], relative_cases=states["std_cases"] / states["yardstick"])
    dimensions = float(variances.sum() ** 2 / variances.square().sum().clamp_min(1e-300))
    return Collapse(states, dimensions, int(live.any(1).sum()))


def _reasoned(graph: EdgeGraph, looks: list[tuple[Tensor, Cells]]) -> Tensor:
    """H of every case, (N, K, s)."""
    return torch.cat([graph(x, cells).transpose(1, 2) for x, cells in looks]).double()


def _spread(reasoned: Tensor, live: Tensor) -> tuple[Tensor, Tensor]:
    """Deviation of H (N, K, s) over live nodes (N, K), and between the cases at one node, each (s,)."""
    weight = live.unsqueeze(-1).double()
    of_node = (reasoned * weight).sum(0) / weight.sum(0).clamp_min(1)
    within = ((reasoned - of_node).square() * weight).sum((0, 1)) / (live.sum() - live.any(0).sum())
    return reasoned[live].std(0, correction=0), within.sqrt()


def _untrained(cfg: DistillConfig, graph: EdgeGraph) -> EdgeGraph:
    """The graph as the run began with it (`build_terms`)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cfg.seed)
        return EdgeGraph(graph.phi.in_channels, cfg.states, cfg.grid, cfg.anchors, cfg.normalize, cfg.grid_frame)
