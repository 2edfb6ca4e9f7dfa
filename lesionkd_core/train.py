"""One loop for teacher and students: any number of networks at one teacher pass (steps S1 to S6)."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Hashable
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from . import ranks, store
from .batches import epoch_batches, epoch_order
from .config import DistillConfig, LesionKDError, TeacherConfig
from .edges import edge_label_batch
from .evaluation import THRESHOLD, score_network, summarize
from .inference import probabilities
from .losses import TERMS, Step, segmentation_loss
from .networks import Network, settle
from .prepare import Prepared
from .progress import Progress, Tell


class TrainingDiverged(LesionKDError):
    """A loss became infinite or NaN."""


def start_fabric(cfg: TeacherConfig) -> Fabric:
    """Device, precision, threads and determinism as the configuration says."""
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    if cfg.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch wants it said
    torch.use_deterministic_algorithms(cfg.deterministic)
    try:
        fabric = Fabric(precision=cfg.precision, **ranks.fabric_options(cfg.device))
        if ranks.size() > 1:
            fabric.launch()
        return fabric
    except Exception as error:  # whatever Lightning raises for an absent device
        problem = str(error).partition("\n")[0] or type(error).__name__
        raise LesionKDError(f"device = {cfg.device!r} cannot be used here: {problem}; device='auto' takes what there is") from error


@dataclass
class Look:
    """The frozen teacher's look at a batch (step S1), and what arms in lockstep derive from it once for all."""

    masks: Tensor
    logits: Tensor
    maps: dict[str, Tensor]
    shared: dict[Hashable, Any] = field(default_factory=dict)

    def edge(self, width: int) -> Tensor:
        """Label_edge of the augmented masks, (N, 1, H, W)."""
        if ("edge", width) not in self.shared:
            self.shared["edge", width] = edge_label_batch(self.masks, width)
        edge: Tensor = self.shared["edge", width]
        return edge


class Objective(nn.Module):
    """A network together with the loss terms it is trained by; connectors train along (step S6)."""

    def __init__(self, network: Network, terms: nn.ModuleDict, cfg: TeacherConfig) -> None:
        super().__init__()
        self.network, self.terms, self.cfg = network, terms, cfg

    def forward(self, images: Tensor, masks: Tensor, look: Look | None, epoch: int = 0) -> dict[str, Tensor]:
        """Images (N, 3, H, W), masks (N, 1, H, W), the teacher's look at them -> every term before its weight."""
        logits, maps = self.network.forward_features(images)
        with torch.autocast(images.device.type, enabled=False):  # sums over many pixels lose too much in half precision
            losses = {"seg": segmentation_loss(logits.float(), masks)}
            if self.terms:
                assert look and isinstance(self.cfg, DistillConfig), "every term wants a teacher"
                step = Step(logits, maps, masks, look.edge(self.cfg.edge_width), look.logits, look.maps, look.shared, epoch)
                losses |= {name: TERMS[name].compute(module, step, self.cfg) for name, module in self.terms.items()}
        return losses

    def weights(self) -> dict[str, float]:
        """Weight of every term in L_total; a network without a teacher has L_seg alone."""
        return {"seg": getattr(self.cfg, "w_seg", 1.0)} | {name: getattr(self.cfg, TERMS[name].weight) for name in self.terms}


@dataclass
class Learner:
    """One network in training, in its run folder: what a checkpoint holds."""

    path: Path
    cfg: TeacherConfig
    objective: Objective
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.OneCycleLR
    epochs: int
    best: float = -1.0
    seconds: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)
    latest: dict[str, Tensor] = field(default_factory=dict)
    sums: dict[str, Tensor] = field(default_factory=dict)
    measured: dict[str, float] = field(default_factory=dict)

    @classmethod
    def start(cls, fabric: Fabric, path: Path, cfg: TeacherConfig, network: Network, terms: nn.ModuleDict, prepared: Prepared) -> Learner:
        """A fresh learner, or one that goes on from `checkpoint_last`."""
        epochs, lr, seed = cfg.teacher_epochs, cfg.teacher_lr, cfg.teacher_seed
        if isinstance(cfg, DistillConfig):
            epochs, lr, seed = cfg.epochs, cfg.lr, cfg.seed
        steps = len(epoch_order(len(prepared.index("train")), cfg.batch_size, seed, 0))
        objective = settle(Objective(network, terms, cfg), fabric.device)
        connector_lr = getattr(cfg, "connector_lr", 1.0)
        rates = {objective: lr} if connector_lr == 1 else {network: lr, terms: lr * connector_lr}
        groups = [{"params": [p for p in module.parameters() if p.requires_grad]} for module in rates]
        optimizer = torch.optim.AdamW(groups, lr=lr, weight_decay=cfg.weight_decay, fused=fabric.device.type in ("cpu", "cuda"))
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, list(rates.values()), total_steps=epochs * steps)
        learner = cls(path, cfg, objective, optimizer, schedule, epochs)
        if (path / "checkpoint_last").exists():
            saved = store.read_checkpoint(path / "checkpoint_last")
            objective.load_state_dict(saved["objective"])
            optimizer.load_state_dict(saved["optimizer"])
            schedule.load_state_dict(saved["schedule"])
            learner.best, learner.seconds, learner.history = saved["best"], saved["seconds"], saved["history"]
        return learner

    @property
    def network(self) -> Network:
        """The bare network."""
        return self.objective.network

    def step(self, fabric: Fabric, images: Tensor, masks: Tensor, look: Look | None, measure: bool) -> None:
        """One update of this network (step S6); `measure` also takes each term's gradient."""
        with fabric.autocast():
            losses = self.objective(images, masks, look, len(self.history))
        share = ranks.weight()  # of this process's cases in the batch
        weighted = {name: weight * share * losses[name] for name, weight in self.objective.weights().items()}
        if measure:
            self.measured = gradients(self.network, weighted)
        total = sum(weighted.values())
        total.backward()
        trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        ranks.add_gradients(trained)
        if self.cfg.clip_grad:
            nn.utils.clip_grad_norm_(trained, self.cfg.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.schedule.step()
        self.latest = {"total": total.detach(), **{name: share * loss.detach() for name, loss in losses.items()}}
        for name, loss in self.latest.items():
            self.sums[name] = self.sums.get(name, 0.0) + loss

    def close_epoch(self, steps: int, val_dice: float) -> dict[str, float]:
        """Write the epoch down: best by validation Dice, then last, then history."""
        row = {"epoch": len(self.history) + 1, "lr": float(self.schedule.get_last_lr()[0])}
        row |= {f"loss_{name}": float(ranks.total(value)) / steps for name, value in self.sums.items()}
        row |= self.measured | {"val_dice": val_dice}
        self.sums = {}
        if bad := [name for name, value in row.items() if not math.isfinite(value)]:
            raise TrainingDiverged(
                f"end of epoch {row['epoch']} of {store.short(self.path)}: {', '.join(bad)} is not finite. "
                "A lower learning rate or weight helps; the last good epoch is kept."
            )
        self.history.append(row)
        better, self.best = val_dice > self.best, max(val_dice, self.best)
        if ranks.first():
            self._save(better)
        return row

    def _save(self, better: bool) -> None:
        row = self.history[-1]
        if better:
            best = {"network": self.network.state_dict(), "epoch": row["epoch"], "val_dice": row["val_dice"]}
            store.write_checkpoint(self.path / "checkpoint_best", best)
        store.write_checkpoint(self.path / "checkpoint_last", {
            "objective": self.objective.state_dict(), "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(), "best": self.best, "seconds": self.seconds, "history": self.history,
        })


def gradients(network: nn.Module, weighted: dict[str, Tensor]) -> dict[str, float]:
    """What every weighted term asks of the layers that all terms reach (METHOD, Loss weights).

    {grad_TERM: norm of its gradient, cos_TERM: cosine with the gradient of L_seg, cos_feat_edge: of two other terms}; of a term
    alone, in front of the optimizer.
    """
    parameters = [p for p in network.parameters() if p.requires_grad]
    found = {name: torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True) for name, loss in weighted.items() if loss.requires_grad}
    found = {name: g for name, g in found.items() if any(part is not None for part in g)}  # connectors that warm up ask nothing of the network
    shared = [i for i in range(len(parameters)) if all(g[i] is not None for g in found.values())]
    if not shared:
        return {f"grad_{name}": 0.0 for name in found}
    flat = {name: ranks.total(torch.cat([g[i].flatten() for i in shared])) for name, g in found.items()}
    norms = {f"grad_{name}": float(g.norm()) for name, g in flat.items()}
    pairs = {f"cos_{b}" if a == "seg" else f"cos_{a}_{b}": (flat[a], flat[b]) for a, b in combinations(sorted(flat, key=lambda name: name != "seg"), 2)}
    return norms | {name: float(nn.functional.cosine_similarity(*pair, dim=0)) for name, pair in pairs.items()}


def train(fabric: Fabric, prepared: Prepared, learners: list[Learner], teacher: Network | None, name: str) -> None:
    """Train networks on the same batches, the frozen teacher looking once at each (steps S1 to S6).

    All learners stand at the same epoch and share seed, batch size and augmentation.
    """
    first = learners[0]
    cfg, seed = first.cfg, getattr(first.cfg, first.cfg.seed_field)
    progress = Progress(name, first.epochs, len(first.history))
    for epoch in range(len(first.history), first.epochs):
        started, steps = time.perf_counter(), 0
        for learner in learners:
            learner.objective.train()
        for images, masks in epoch_batches(prepared, cfg.batch_size, seed, epoch, cfg.augment, fabric.device):
            look = _look(fabric, teacher, images, masks) if teacher is not None else None  # Feats_T, step S1
            for learner in learners:
                learner.step(fabric, images, masks, look, measure=steps == 0)
            if not torch.stack([learner.latest["total"] for learner in learners]).isfinite().all():  # one wait for the device, for all arms
                _stop(learners, prepared, epoch, steps)
            steps += 1
        if fabric.device.type == "cuda":
            torch.cuda.synchronize(fabric.device)
        rows, seconds = [], time.perf_counter() - started
        for learner in learners:
            learner.seconds += seconds / len(learners)
            rows.append(learner.close_epoch(steps, validation_dice(learner.network, prepared)))
        progress.epoch(", ".join(f"{key} {np.mean([row[key] for row in rows]):.3f}" for key in ("loss_total", "val_dice")))
    progress.close()


def _stop(learners: list[Learner], prepared: Prepared, epoch: int, step: int) -> None:
    """Write down where a loss stopped being a number (`diverged.json`), and say it; nothing of this epoch is kept."""
    learner = next(learner for learner in learners if not learner.latest["total"].isfinite())
    seed = getattr(learner.cfg, learner.cfg.seed_field)
    rows = prepared.index("train")
    batch = rows[epoch_order(len(rows), learner.cfg.batch_size, seed, epoch)[step]]
    losses = {name: float(value) for name, value in learner.latest.items()}
    bad = [f"loss_{name} is {value}" for name, value in losses.items() if not math.isfinite(value) and name != "total"] or ["their sum is not finite"]
    store.write_json(learner.path / "diverged.json", {
        "epoch": epoch + 1, "step": step + 1, "lr": learner.schedule.get_last_lr()[0],
        "losses": {name: str(value) for name, value in losses.items()}, "cases": prepared.cases["id"].iloc[batch].tolist(),
    })
    raise TrainingDiverged(
        f"step {step + 1} of epoch {epoch + 1} of {store.short(learner.path)}: {', '.join(bad)}; the batch's cases are in diverged.json there. "
        "A lower learning rate or weight helps, or clip_grad = 1; the last good epoch is kept."
    )


def _look(fabric: Fabric, teacher: Network, images: Tensor, masks: Tensor) -> Look:
    with torch.no_grad(), fabric.autocast():
        return Look(masks, *teacher.forward_features(images))


def validation_dice(network: nn.Module, prepared: Prepared) -> float:
    """Mean Dice over validation cases at threshold 0.5; both empty count 1."""
    rows = prepared.index("val")
    rows = rows[ranks.part(len(rows))]
    predicted, truth = probabilities(network, prepared.images[rows]) > THRESHOLD, prepared.masks[rows] > 0
    hit, size = (predicted & truth).sum((1, 2)), predicted.sum((1, 2)) + truth.sum((1, 2))
    return float(np.concatenate(ranks.collect(np.where(size, 2 * hit / np.maximum(size, 1), 1.0))).mean())


def score_and_finish(learner: Learner, prepared: Prepared, tell: Tell) -> None:
    """Score `checkpoint_best` on validation and test cases and declare the run complete; of many ranks, the first."""
    if ranks.first():
        _score(learner, prepared, tell)
    ranks.agree()


def _score(learner: Learner, prepared: Prepared, tell: Tell) -> None:
    import pandas as pd

    best = store.read_checkpoint(learner.path / "checkpoint_best")
    learner.network.load_state_dict(best["network"])
    per_case = score_network(learner.network, prepared)
    marked = per_case["predicted_pixels"]
    constant = len(marked) > 1 and marked.nunique() == 1 and marked.iloc[0] in (0, prepared.masks[0].size)
    if constant:
        tell(f"warning: {store.short(learner.path)} marks {'nothing' if marked.iloc[0] == 0 else 'everything'} in every case: it has learned nothing")
    store.write_table(learner.path / "history.csv", pd.DataFrame(learner.history))
    store.write_table(learner.path / "per_case.csv", per_case)
    store.write_json(learner.path / "summary.json", {
        **{split: summarize(per_case[per_case["split"] == split]) for split in ("val", "test")},
        "best_epoch": best["epoch"], "epochs": learner.epochs, "seconds": round(learner.seconds, 1),
        "parameters": sum(p.numel() for p in learner.network.parameters()), "split_hash": prepared.split_hash,
        "constant": bool(constant),
    })
    store.finish(learner.path)
