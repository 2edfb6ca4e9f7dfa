"""Inspection: cases to show, edge labels, feature maps, nodes of the graph, and source code."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import results
from ..config import DistillConfig, GraphConfig, LesionKDError
from ..data.batches import normalize
from ..data.prepare import Prepared
from ..data.splits import compare_pairs
from ..edges import edge_at_stride, edge_label_batch
from ..losses import EdgeGraph, EdgeReasoning, FittedGraph, Measured, build_terms, margin_relu
from ..losses.edge_reasoning import live_in
from ..models import Network, stride_of
from ..predict import TrainedNetwork, load_network

BATCH = 16
STRIDES = (1, 2, 4, 8, 16)


def show(*functions: Any, docstring: bool = False) -> None:
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
    size = prepared.cases["lesion_share"].to_numpy()[rows]
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


def edge_survival(
    masks: np.ndarray, width: int, strides: tuple[int, ...] = STRIDES[1:]
) -> pd.DataFrame:
    """What is left of the edge label at a stride by maximum, mean and nearest pixel.

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
    for stride in strides:
        middle = stride // 2
        by_method = {
            "max": edge_at_stride(full, stride),
            "mean": (F.avg_pool2d(full, stride) > 0.5).float(),
            "nearest": full[..., middle::stride, middle::stride],
        }
        for method, small in by_method.items():
            back = F.interpolate(small, scale_factor=stride, mode="nearest")
            row = {"stride": stride, "method": method}
            row |= {"kept": float((full * back).sum() / full.sum())}
            row |= {"marked": float(small.mean() / full.mean())}
            rows.append(row | {"edge lost": int((small.flatten(1).amax(1) == 0).sum())})
    return pd.DataFrame(rows)


def live_nodes(cfg: Any, masks: np.ndarray) -> np.ndarray:
    """Cells of the grid with an edge pixel, for each mask: (N, S, S) 0/1 -> (N,).

    `cfg` has edge_level, edge_width and grid.
    """
    graph = EdgeGraph(1, 1, cfg.grid)
    stride = stride_of(cfg.edge_level.partition(":")[0])
    edge = graph.edge_at(_edges(masks, cfg.edge_width), stride)
    count: np.ndarray = graph.live_nodes(edge).sum(1).numpy()
    return count


# Feature maps -------------------------------------------------------------------------------------


@torch.no_grad()
def feature_maps(trained: TrainedNetwork, images: np.ndarray) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits (N, 1, S, S) and all maps before their last ReLU, by name.

    `images` are (N, S, S, 3) uint8.
    """
    return trained.network.forward_features(normalize(images))


class FeatureView(NamedTuple):
    """The channel of a map that separates the lesion best, from `feature_views`.

    values (h, w) are deviations from its mean over the image in standard deviations; separation is
    Cohen's d between lesion and rest.
    """

    values: np.ndarray
    channel: int
    separation: float


@torch.no_grad()
def feature_views(
    networks: dict[str, TrainedNetwork], image: np.ndarray, mask: np.ndarray, levels: Sequence[str]
) -> dict[str, dict[str, FeatureView]]:
    """The channel of each map that separates the lesion best: {network: {level: FeatureView}}.

    Channels of two networks do not correspond, so one rule chooses for each network: largest (mean
    in the lesion - mean outside) / standard deviation over the image.

    Parameters
    ----------
    networks : {name: TrainedNetwork}
        The teacher first.
    image, mask : (S, S, 3) uint8, (S, S) 0/1
    levels : sequence of str
        As in `models.match_levels`: 'a', or 'student:teacher'.
    """
    if not mask.any() or mask.all():
        raise LesionKDError(
            "feature_views compares a lesion with the rest of its image, but this mask is all one "
            "value; choose another case"
        )
    shown: dict[str, dict[str, FeatureView]] = {}
    for who, trained in networks.items():
        maps, part = feature_maps(trained, image[None])[1], 0 if shown else -1
        shown[who] = {
            level: _best_channel(maps[level.split(":")[part]][0], mask) for level in levels
        }
    return shown


def _best_channel(x: Tensor, mask: np.ndarray) -> FeatureView:
    """(C, h, w) and mask (S, S) 0/1."""
    height, width = x.shape[-2:]
    lesion = torch.tensor(mask).double()[None]
    lesion = F.adaptive_avg_pool2d(lesion, (height, width)).flatten()  # fraction of each pixel
    flat = x.flatten(1).double()
    deviation = flat.std(1, correction=0, keepdim=True).clamp_min(1e-6)
    flat = (flat - flat.mean(1, keepdim=True)) / deviation
    separation = flat @ (lesion / lesion.sum() - (1 - lesion) / (1 - lesion).sum())
    best = int(separation.argmax())
    values = flat[best].view(height, width).float().numpy()
    return FeatureView(values, best, float(separation[best]))


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
    loss: Any = terms["feat"]
    name_s, name_t = loss.pairs[0]
    t = feature_maps(teacher, image[None])[1][name_t]
    s = loss.connectors[0](feature_maps(student, image[None])[1][name_s])
    target = margin_relu(t, loss.get_buffer("margin0"))
    channel = int(t[0].clamp_min(0).mean((1, 2)).argmax())
    return RefinementView(t[0].numpy(), target[0].numpy(), s[0].numpy(), channel)


def graph_of(run: results.Result, teacher: TrainedNetwork) -> tuple[FittedGraph, TrainedNetwork]:
    """The graph that a student run ended with, and the student as the graph sees it.

    The student has the one map that the graph reads, after its connector and under the teacher's
    name, so `GraphCases` takes it like the teacher. The standard deviation of an `edge_joint` graph
    is 1, since it is that of each batch in training.

    Raises
    ------
    LesionKDError
        The run has no graph: it was trained without L_edge, or with `edge_relation`.
    """
    student, terms = restored(run, teacher)
    found = [term for term in terms.values() if isinstance(term, EdgeReasoning)]
    if not found:
        raise LesionKDError(
            f"{results.short(run.path)} has no edge graph; its loss terms are {', '.join(terms)}. "
            "Give a run with 'edge', 'edge_shuffled' or 'edge_joint'"
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
    projection : (K, h, w)
    anchors : (K, 2)
        Row and column of the centroid of each cell's edge pixels; NaN in a cell without.
    """

    edge: np.ndarray
    projection: np.ndarray
    anchors: np.ndarray

    @property
    def live(self) -> np.ndarray:
        """(K,) bool: nodes that pixels can be assigned to."""
        return np.asarray(self.projection.any((1, 2)))

    @property
    def entropy(self) -> np.ndarray:
        """(h, w), entropy of P in units of log(live nodes): 0 decided, 1 undecided.

        NaN with fewer than two live nodes.
        """
        p = self.projection[self.live]
        if len(p) < 2:
            return np.full(self.edge.shape, np.nan)
        entropy: np.ndarray = -(p * np.log(np.maximum(p, 1e-12))).sum(0) / np.log(len(p))
        return entropy

    @property
    def largest(self) -> float:
        """Fraction of the pixels of the most frequent most likely node; NaN without a live node."""
        counts = np.bincount(self.projection.argmax(0).ravel())
        return float(counts.max() / self.edge.size) if self.live.any() else np.nan


class GraphCases:
    """The graph of L_edge on cases of one network (step S4).

    Parameters
    ----------
    cfg : GraphConfig
    network : TrainedNetwork
        The teacher, or the student from `graph_of`.
    fitted : FittedGraph
        The fitted graph, or that from `graph_of`.
    images, masks : (N, S, S, 3) uint8, (N, S, S) 0/1
    """

    @torch.no_grad()
    def __init__(
        self,
        cfg: GraphConfig,
        network: TrainedNetwork,
        fitted: FittedGraph,
        images: Any,
        masks: Any,
    ) -> None:
        name = cfg.edge_level.rpartition(":")[2]
        batches = [images[i : i + BATCH] for i in range(0, len(images), BATCH)]
        self.x = torch.cat([feature_maps(network, batch)[1][name] for batch in batches])
        self.graph, self.std = fitted.graph, fitted.std
        self.edge = self.graph.edge_at(_edges(masks, cfg.edge_width), stride_of(name))

    @torch.no_grad()
    def views(self) -> list[NodeView]:
        """How the pixels of each case are assigned to the nodes."""
        size = self.x.shape[-2:]
        projection = self.graph.project(self.x, self.edge)[1].unflatten(2, size)
        places = torch.meshgrid(*(torch.arange(float(n)) for n in size), indexing="ij")
        keys = torch.stack([*places, torch.ones(size)]).expand(len(self.x), -1, -1, -1)
        sums = self.graph.anchors_of(keys, self.edge)  # row, column and mass of each cell
        anchors = torch.where(sums[:, 2:] > 0, sums[:, :2] / sums[:, 2:], torch.nan)
        cases = zip(self.edge[:, 0], projection, anchors.transpose(1, 2))
        return [NodeView(*(part.numpy() for part in case)) for case in cases]

    def entropy(self) -> pd.DataFrame:
        """How decided the projection is, case by case.

        Returns
        -------
        DataFrame
            case (0 ..), live_nodes, entropy (mean over pixels, in units of log(live nodes)),
            entropy_of_edge (over edge pixels), largest_node (fraction of the pixels); NaN as in
            `NodeView`.
        """
        rows = []
        for case, view in enumerate(self.views()):
            entropy, edge = view.entropy, view.edge > 0
            row = {"case": case, "live_nodes": int(view.live.sum()), "entropy": entropy.mean()}
            row["entropy_of_edge"] = entropy[edge].mean() if edge.any() else np.nan
            rows.append(row | {"largest_node": view.largest})
        return pd.DataFrame(rows)

    @torch.no_grad()
    def edge_information(self, training: GraphCases | None = None) -> dict[str, float]:
        """How much the graph knows about the edge.

        The 1x1 head that fitted the graph was dropped, so it is refitted here, on `training` (such
        as the training cases) and evaluated on these cases; by default fitted on every other case
        with an edge and evaluated on the rest. The anchors are computed from the edge itself, so
        this is an upper bound of what the nodes know.

        Returns
        -------
        dict
            bce, average_precision: of the edge that the head predicts from ReLU(H) P.
            bce_constant, ap_constant: of predicting the same probability for every pixel.
            h_change, p_change: relative change ||H' - H|| / ||H|| of nodes that are live in both,
            and of P, if each case gets the edge of another case.
            h_change_std: root mean square of H' - H in units of `FittedGraph.std`. Two unrelated
            nodes give 1.41.
        """
        (x, edge), graph = self._with_edge(), self.graph
        if len(x) < 4:
            raise LesionKDError(f"edge_information needs 4 cases with an edge; got {len(x)}")
        h, p = graph(x, edge), graph.project(x, edge)[1]
        order, others = np.random.default_rng(0).permutation(len(x)), torch.empty_like(edge)
        others[order] = edge[np.roll(order, 1)]  # neighbours may be frames of one video
        both = (graph.live_nodes(edge) & graph.live_nodes(others)).unsqueeze(1)
        apart, count = (graph(x, others) - h) * both, both.sum() * len(self.std)
        changes = {
            "h_change": apart.norm() / (h * both).norm(),
            "p_change": (graph.project(x, others)[1] - p).norm() / p.norm(),
            "h_change_std": ((apart / self.std.view(1, -1, 1)).square().sum() / count).sqrt(),
        }
        own = self._reprojected()
        fit = training._reprojected() if training else [part[::2] for part in own]
        test = own if training else [part[1::2] for part in own]
        return _refitted_head(*fit, *test) | {name: float(v) for name, v in changes.items()}

    def _with_edge(self) -> tuple[Tensor, Tensor]:
        inside = self.edge.flatten(1).amax(1) > 0
        return self.x[inside], self.edge[inside]

    @torch.no_grad()
    def _reprojected(self) -> list[np.ndarray]:
        """ReLU(H) P of the cases with an edge, (N, L, s), and their edges, (N, L)."""
        x, edge = self._with_edge()
        states = self.graph(x, edge).relu() @ self.graph.project(x, edge)[1]
        return [states.transpose(1, 2).double().numpy(), edge.flatten(1).numpy()]

    @torch.no_grad()
    def collapse(self, untrained: EdgeGraph | None = None) -> dict[str, Any]:
        """Whether H, before its ReLU, still varies over nodes and cases.

        A graph that is trained with the student under a matching loss alone collapses. A state is
        dead if its standard deviation between cases, at one node, is below 5 % of the reference:
        `FittedGraph.std`, or the standard deviation of H of the same graph before training
        (`untrained`).

        Returns
        -------
        dict
            cases (with an edge); dead (fraction of the states); dimensions (participation ratio of
            H's covariance over states: 1 if all carry the same signal); verdict: 'collapsed' (at
            least half of the states are dead), 'partly collapsed' (some are), 'narrow' (none, but
            fewer than two dimensions) or 'alive'.
        """
        live = live_in(self.graph, self.edge)  # (N, K)
        free = live.sum() - live.any(0).sum()
        if free <= 0:
            raise LesionKDError(
                "the collapse check compares cases node by node, but no node is live in two of "
                f"these {len(live)} cases; give more cases with a lesion"
            )
        h = self.graph(self.x, self.edge).transpose(1, 2).double()
        weight = live.unsqueeze(-1).double()
        of_node = (h * weight).sum(0) / weight.sum(0).clamp_min(1)
        between_cases = (((h - of_node).square() * weight).sum((0, 1)) / free).sqrt()
        reference = self.std.double()
        if untrained is not None:
            started = untrained(self.x, self.edge).transpose(1, 2).double()
            reference = started[live].std(0, correction=0)
        eigen = torch.linalg.eigvalsh(torch.atleast_2d(h[live].T.cov(correction=0)))
        dimensions = float(eigen.sum() ** 2 / eigen.square().sum().clamp_min(1e-300))
        dead = float((between_cases < 0.05 * reference).double().mean())
        verdict = "narrow" if dimensions < min(2, len(reference)) else "alive"
        if dead:
            verdict = "collapsed" if dead >= 0.5 else "partly collapsed"
        found = {"cases": int(live.any(1).sum()), "dead": dead, "dimensions": dimensions}
        return found | {"verdict": verdict}


def _refitted_head(
    features: np.ndarray, edges: np.ndarray, test_features: np.ndarray, test_edges: np.ndarray
) -> dict[str, float]:
    """Logistic regression of edges (N, L) on features (N, L, s), fitted and evaluated."""
    from scipy.optimize import minimize
    from scipy.special import expit

    mean, std = features.mean((0, 1)), np.maximum(features.std((0, 1)), 1e-9)
    both = ((x.reshape(-1, len(mean)) - mean) / std for x in (features, test_features))
    fit, test = (np.concatenate([x, np.ones_like(x[:, :1])], 1) for x in both)
    target, truth = edges.ravel(), test_edges.ravel()

    def bce(logits: Any, label: np.ndarray) -> float:
        return float((np.logaddexp(0, logits) - label * logits).mean())

    def loss(w: np.ndarray) -> tuple[float, np.ndarray]:
        slope = fit.T @ (expit(fit @ w) - target) / len(fit)
        return bce(fit @ w, target) + 1e-6 * w @ w, slope + 2e-6 * w

    predicted = test @ minimize(loss, np.zeros(fit.shape[1]), jac=True).x
    constant = np.log(target.mean() / (1 - target.mean()))
    ap = {"average_precision": average_precision(predicted, truth), "ap_constant": truth.mean()}
    return {"bce": bce(predicted, truth), "bce_constant": bce(constant, truth)} | ap


def average_precision(scores: np.ndarray, truth: np.ndarray) -> float:
    """Area under the precision-recall curve: sum over thresholds n of (R_n - R_(n-1)) P_n.

    Parameters
    ----------
    scores, truth : (N,)
        Any numbers, higher for the positive class; and 0/1.
    """
    order = np.argsort(-scores, kind="stable")
    hits = np.cumsum(truth[order])
    last = np.flatnonzero(np.append(np.diff(scores[order]) != 0, True))  # equal scores together
    precision, recall = hits[last] / (last + 1), hits[last] / hits[-1]
    return float((np.diff(recall, prepend=0) * precision).sum())
