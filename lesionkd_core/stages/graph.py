"""Frozen teacher -> fitted, frozen graph (step S4)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn

from .. import ranks, store
from ..batches import epoch_batches, normalize
from ..config import GraphConfig, LesionKDError
from ..edges import edge_label_batch
from ..inference import load_network
from ..losses import EdgeGraph, EdgeHead, FittedGraph
from ..networks import TEACHERS, Network, UNet, match_levels, settle, stride_of, use_statistics
from ..prepare import Prepared, prepare_data
from ..progress import Progress, Tell
from ..training import start_fabric
from .teacher import check_teacher, train_teacher


class Graph(store.Result):
    """A fitted graph module; `load()` gives it."""

    def load(self) -> FittedGraph:
        """The frozen module and the spread of the teacher's H."""
        cfg, saved = self.config, store.read_checkpoint(self.path / "checkpoint_best")
        graph = EdgeGraph(saved["graph"]["phi.weight"].shape[1], cfg["states"], cfg["grid"], cfg["anchors"], cfg["normalize"], cfg["grid_frame"])
        graph.load_state_dict(saved["graph"])
        return FittedGraph(graph.eval().requires_grad_(False), saved["std"])


def check_levels(cfg: GraphConfig, levels: tuple[str, ...]) -> list[tuple[str, str]]:
    """(student's map, teacher's map) of every level; refuses maps that do not exist or differ in stride, before anything is trained."""
    with torch.device("meta"):
        return match_levels(UNet(width=getattr(cfg, "width", 4), stem=getattr(cfg, "stem", 1)), TEACHERS[cfg.teacher](), levels)


def fit_graph(cfg: GraphConfig, tell: Tell = print) -> Graph:
    """Find or fit the graph on the frozen teacher: re-projection, 1x1 head, BCE against Label_edge (step S4).

    The head is dropped; graph and per-channel deviation of the teacher's H are kept.
    """
    cfg = cfg.upstream(GraphConfig)
    check_levels(cfg, (cfg.edge_level,))
    prepared, teacher_run = ranks.after_first(lambda: prepare_data(cfg, tell)), train_teacher(cfg, tell)
    path = ranks.agree(store.folder(cfg, teacher_run.digest))
    if ranks.agree(store.is_done(path)):
        return Graph(path)
    with ranks.lock(path, tell):
        if not ranks.agree(store.is_done(path)):
            check_teacher(teacher_run, cfg, prepared)
            tell(f"fitting the graph for {cfg.graph_epochs} epochs")
            if ranks.first():
                store.begin(path, cfg, teacher_run.digest)
            _fit(path, cfg, prepared, load_network(teacher_run).network)
    return Graph(path)


def _fit(path: Path, cfg: GraphConfig, prepared: Prepared, teacher: Network) -> None:
    fabric = start_fabric(cfg)
    teacher = settle(use_statistics(teacher, cfg.teacher_bn), fabric.device)
    name = cfg.edge_level.rpartition(":")[2]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cfg.teacher_seed)
        graph = EdgeGraph(teacher.feature_norms()[name].num_features, cfg.states, cfg.grid, cfg.anchors, cfg.normalize, cfg.grid_frame)
        fitted = nn.ModuleDict({"graph": graph, "head": EdgeHead(cfg.states)}).to(fabric.device)
    optimizer = torch.optim.Adam(fitted.parameters(), cfg.graph_lr)
    progress, history = Progress("graph", cfg.graph_epochs), []
    for epoch in range(cfg.graph_epochs):
        losses, rarity = [], []
        for images, masks in epoch_batches(prepared, cfg.batch_size, cfg.teacher_seed, epoch, cfg.augment, fabric.device):
            edge = graph.edge_at(edge_label_batch(masks, cfg.edge_width), stride_of(name))
            whole = ranks.gather(edge)
            if not whole.any():
                continue
            with torch.no_grad(), fabric.autocast():
                x = teacher.forward_features(images)[1][name]
            loss = fitted["head"](graph, x.float(), edge)
            optimizer.zero_grad()
            (ranks.weight() * loss).backward()
            ranks.add_gradients(list(fitted.parameters()))
            optimizer.step()
            losses.append(ranks.mean(loss.detach()))
            rarity.append(whole[whole.flatten(1).amax(1) > 0].mean())
        if not losses:
            raise LesionKDError("no training case has a lesion edge, so there is no graph to fit; terms = 'feat' does without")
        share = float(torch.stack(rarity).mean())
        row = {"epoch": epoch + 1, "loss_edge_bce": float(torch.stack(losses).mean()), "bce_of_the_edge_share": _entropy(share)}
        history.append(row)
        progress.epoch(f"edge BCE {row['loss_edge_bce']:.3f}, of a constant guess {row['bce_of_the_edge_share']:.3f}")
    progress.close()
    if ranks.first():
        std, live = _spread(prepared, teacher, graph.eval(), name, cfg.edge_width)
        store.write_checkpoint(path / "checkpoint_best", {"graph": graph.state_dict(), "std": std})
        store.write_table(path / "history.csv", pd.DataFrame(history))
        store.write_json(path / "summary.json", {**history[-1], **live})
        store.finish(path)


def _entropy(share: float) -> float:
    """BCE of guessing every pixel with the share of edge pixels."""
    p = np.array([max(share, 1e-9), max(1 - share, 1e-9)])
    return float(-(p * np.log(p)).sum())


@torch.no_grad()
def teacher_maps(prepared: Prepared, teacher: Network) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
    """The frozen teacher's maps over the training set as it is, batch by batch, with the masks (N, 1, H, W)."""
    device = next(teacher.parameters()).device
    rows = prepared.index("train")
    for i in range(0, len(rows), 16):
        masks = torch.from_numpy(prepared.masks[rows[i : i + 16]]).to(device).float().unsqueeze(1)
        yield teacher.forward_features(normalize(prepared.images[rows[i : i + 16]], device))[1], masks


@torch.no_grad()
def _spread(prepared: Prepared, teacher: Network, graph: EdgeGraph, name: str, width: int) -> tuple[torch.Tensor, dict[str, float]]:
    """Deviation of the teacher's H per state channel over live nodes of the training set, (s,); live nodes an image."""
    reasoned, counts = [], []
    for maps, masks in teacher_maps(prepared, teacher):
        cells = graph.cells(graph.edge_at(edge_label_batch(masks, width), stride_of(name)))
        live = cells.live & (cells.edge.flatten(1).amax(1) > 0).unsqueeze(1)
        reasoned.append(graph(maps[name], cells).transpose(1, 2)[live].cpu())
        counts.append(live.sum(1).cpu())
    of_image = torch.cat(counts).float()
    with_edge = of_image[of_image > 0]
    nodes = {"live_nodes": float(with_edge.mean()), "single_node_share": float((with_edge == 1).float().mean())}
    return torch.cat(reasoned).std(0, correction=0), nodes
