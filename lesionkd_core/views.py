"""What the figures look at: cases worth showing, feature maps, edge labels and node assignments."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .batches import normalize
from .config import EdgeConfig, GraphConfig
from .edges import edge_at_stride, edge_label, edge_label_batch
from .inference import TrainedNetwork
from .losses import EdgeGraph, FittedGraph
from .networks import stride_of
from .prepare import Prepared


def spread_of_cases(prepared: Prepared, split: str, count: int) -> list[int]:
    """Rows of a split from its smallest to its largest lesion, evenly spread: chosen by size, not by score."""
    rows = prepared.index(split)
    by_size = rows[np.argsort(prepared.cases["lesion_share"].to_numpy()[rows], kind="stable")]
    places = np.linspace(0, len(by_size) - 1, min(count, len(by_size))).round().astype(int)
    return by_size[places].tolist()


@torch.no_grad()
def feature_maps(trained: TrainedNetwork, images: np.ndarray) -> tuple[Tensor, dict[str, Tensor]]:
    """(N, S, S, 3) uint8 -> logits (N, 1, S, S) and all maps before their last ReLU, by name (steps S1, S2)."""
    return trained.network.forward_features(normalize(images))


def edge_views(cfg: EdgeConfig, masks: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Masks (N, S, S) 0/1 -> edge labels at full size and at the graph's stride, and live nodes of each case (N,)."""
    stride = stride_of(cfg.edge_level.partition(":")[0])
    full = edge_label(masks, cfg.edge_width)
    edge = edge_at_stride(torch.from_numpy(full).float().unsqueeze(1), stride)
    live = EdgeGraph(1, 1, cfg.grid, frame=cfg.grid_frame).live_nodes(edge).sum(1).numpy()
    return {"edge, 1:1": full, f"edge at stride {stride}": edge[:, 0].numpy()}, live


@dataclass(frozen=True)
class NodeView:
    """One case in the graph: edge (h, w) and projection P (K, h, w) at the map's resolution."""

    edge: np.ndarray
    projection: np.ndarray


@torch.no_grad()
def node_views(cfg: GraphConfig, teacher: TrainedNetwork, fitted: FittedGraph, images: np.ndarray, masks: np.ndarray) -> list[NodeView]:
    """Where the teacher's pixels go in the graph: images (N, S, S, 3) uint8, masks (N, S, S) 0/1 (step S4)."""
    name = cfg.edge_level.rpartition(":")[2]
    full = edge_label_batch(torch.from_numpy(np.asarray(masks)).float().unsqueeze(1), cfg.edge_width)
    edge = edge_at_stride(full, stride_of(name))
    _, projection = fitted.graph.project(feature_maps(teacher, images)[1][name], edge)
    return [NodeView(e[0].numpy(), p.unflatten(1, edge.shape[-2:]).numpy()) for e, p in zip(edge, projection)]
