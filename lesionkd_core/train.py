"""The training loop: a teacher, or any number of students with one pass of the teacher."""

from __future__ import annotations

import copy
import logging
import math
import os
import platform
import time
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies.ddp import DDPStrategy
from torch import Tensor, nn

from . import results
from .config import DistillConfig, LesionKDError, TeacherConfig
from .data.batches import Batch, TrainingSet
from .edges import edge_label_batch
from .evaluate import fixed_mask_dice, score_network, summarize, validation_dice
from .losses import Step, needs_teacher, resolve
from .models import Network, parameter_count
from .results import Content, Progress, log

ADVICE = "Reduce the learning rate or a weight; the last good epoch is kept."


class TrainingDiverged(LesionKDError):
    """A loss became infinite or NaN."""


def start_fabric(cfg: TeacherConfig) -> Fabric:
    """Device, precision and number of processes.

    Started by torchrun, every process trains on its part of each batch (Fabric's `ddp`): gradients
    are averaged, and on GPUs the BatchNorm statistics are those of the whole batch.
    """
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if cfg.batch_size < processes:
        raise LesionKDError(f"batch_size = {cfg.batch_size} is too small for {processes} processes")
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    strategy: DDPStrategy | str = "auto"
    if processes > 1:
        strategy = DDPStrategy(find_unused_parameters=True, timeout=timedelta(hours=12))
    try:
        fabric = Fabric(
            accelerator=cfg.device,
            devices=int(os.environ.get("LOCAL_WORLD_SIZE", 1)),
            num_nodes=int(os.environ.get("GROUP_WORLD_SIZE", 1)),
            strategy=strategy,
            precision=cfg.precision,
        )
        fabric.launch()
    except Exception as error:  # Lightning raises many kinds for a missing device
        why = str(error).partition("\n")[0] or type(error).__name__
        raise LesionKDError(f"device = {cfg.device!r} cannot be used here: {why}") from error
    if cfg.precision == "bf16-mixed" and fabric.device.type == "cpu" and not _multiplies_bfloat16():
        raise LesionKDError(
            "precision = 'bf16-mixed': this processor has no bfloat16 arithmetic (avx512_bf16 or "
            "amx_bf16), so it would be several times slower than float32; use '32-true'"
        )
    return fabric


def _multiplies_bfloat16() -> bool:
    """Whether the processor has bfloat16 instructions; True where nothing can be found out."""
    if platform.system() != "Linux":
        return True
    flags = Path("/proc/cpuinfo").read_text().split()
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(flags)


class Lesson(NamedTuple):
    """What students learn from in one step, besides the images.

    Attributes
    ----------
    masks : (M, 1, S, S)
        Of the first M images.
    logits : (N, 1, S, S), maps : {name: (N, C, H, W)}
        The frozen teacher's, if a term reads them.
    edges : {width: (N, 1, S, S)}
        The edge label, by the option `edge_width`, if there is a teacher.
    """

    masks: Tensor
    logits: Tensor = None  # type: ignore[assignment]
    maps: dict[str, Tensor] = {}
    edges: dict[int, Tensor] = {}


class Objective(nn.Module):
    """A network and the terms of its loss; connectors are trained with it (step S6)."""

    def __init__(self, network: Network, terms: nn.ModuleDict, edge_width: int = 1) -> None:
        super().__init__()
        self.network, self.terms, self.edge_width = network, terms, edge_width

    def forward(self, images: Tensor, lesson: Lesson) -> dict[str, Tensor]:
        """Images (N, 3, S, S) -> every loss term before its weight, each ()."""
        logits, maps = self.network.forward_features(images)
        with torch.autocast(images.device.type, enabled=False):  # sums over pixels need float32
            edge = lesson.edges.get(self.edge_width)
            step = Step(logits.float(), lesson.masks, maps, edge, lesson.logits, lesson.maps)  # type: ignore[arg-type]
            losses = {name: term(step) for name, term in self.terms.items()}
        for name, loss in losses.items():
            if loss.shape:
                shape = tuple(loss.shape)
                raise LesionKDError(f"the loss term {name!r} gave {shape} values; expected one")
        return losses


class Learner:
    """One network in training, with what its checkpoint holds.

    Parameters
    ----------
    path : Path
        Run folder; the training resumes from its `checkpoint_last`.
    cfg : TeacherConfig or DistillConfig
        Says how long, how fast and with which weights it is trained.
    training : TrainingSet
    network : Network
    terms : ModuleDict
        From `losses.build_terms`.
    """

    def __init__(
        self,
        fabric: Fabric,
        path: Path,
        cfg: TeacherConfig,
        training: TrainingSet,
        network: Network,
        terms: nn.ModuleDict,
    ) -> None:
        self.fabric, self.path, self.cfg, self.training = fabric, path, cfg, training
        if isinstance(cfg, DistillConfig):
            self.weights, self.edge_width = resolve(cfg.losses), cfg.edge_width
            self.epochs, lr, connector_lr = cfg.epochs, cfg.lr, cfg.lr * cfg.connector_lr
        else:  # a teacher learns L_seg alone
            self.weights, self.edge_width = {"seg": 1.0}, 1
            self.epochs, lr = cfg.teacher_epochs, cfg.teacher_lr
            connector_lr = lr
        self.uses_teacher = needs_teacher(self.weights)
        self.best, self.seconds, self.together = -1.0, 0.0, 1
        self.history: list[dict[str, float]] = []
        objective: nn.Module = Objective(network, terms, self.edge_width)
        objective = objective.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if fabric.world_size > 1 and fabric.device.type == "cuda":
            objective = nn.SyncBatchNorm.convert_sync_batchnorm(objective)
        self.objective: Objective = objective.to(fabric.device)  # type: ignore[assignment]
        groups = [{"params": list(self.objective.network.parameters()), "lr": lr}]
        connectors = list(self.objective.terms.parameters())
        if connectors:
            groups.append({"params": connectors, "lr": connector_lr})
        fused = fabric.device.type in ("cpu", "cuda")
        optimizer = torch.optim.AdamW(groups, weight_decay=cfg.weight_decay, fused=fused)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer,
            [group["lr"] for group in optimizer.param_groups],
            total_steps=self.epochs * training.steps,
        )
        self.optimizer = optimizer
        if (path / "checkpoint_last").exists():
            self._resume(results.read_checkpoint(path / "checkpoint_last"))
        self.wrapped, self.stepper = fabric.setup(self.objective, optimizer)
        self.latest: dict[str, Tensor] = {}
        self.sums: dict[str, Tensor] = {}
        self.measured: dict[str, float] = {}

    def _resume(self, saved: Content) -> None:
        self.objective.load_state_dict(saved["objective"])
        self.best, self.seconds = saved["best"], saved["seconds"]
        self.history = saved["history"]
        if len(self.history) < self.epochs:  # a finished training keeps no optimizer
            self.optimizer.load_state_dict(saved["optimizer"])
            self.schedule.load_state_dict(saved["schedule"])

    @property
    def name(self) -> str:
        """A student's loss terms, as the option `losses` names them."""
        return ", ".join(name for name in self.weights if name != "seg") or "alone"

    @property
    def network(self) -> Network:
        """The network without its loss terms."""
        return self.objective.network

    def step(self, images: Tensor, lesson: Lesson, measure: bool) -> None:
        """One update (step S6).

        Parameters
        ----------
        images : (N, 3, S, S)
        lesson : Lesson
            Masks (M, 1, S, S), the teacher's logits and maps, and edge labels of these images.
        measure : bool
            Also measure the gradient of each term.
        """
        if not self.uses_teacher:
            images, lesson = images[: len(lesson.masks)], Lesson(lesson.masks)
        if measure and self.uses_teacher:
            probe = copy.deepcopy(self.objective)  # so that measuring changes nothing
            with self.fabric.autocast():
                probed = {name: self.weights[name] * x for name, x in probe(images, lesson).items()}
            self.measured = gradients(probe.network, probed)
        losses = self.wrapped(images, lesson)
        total = torch.stack([self.weights[name] * loss for name, loss in losses.items()]).sum()
        self.fabric.backward(total)
        self.stepper.step()
        self.stepper.zero_grad(set_to_none=True)
        self.schedule.step()
        self.latest = {"total": total.detach()} | {n: loss.detach() for n, loss in losses.items()}
        for name, loss in self.latest.items():
            self.sums[name] = self.sums.get(name, 0.0) + loss

    def close_epoch(self, steps: int) -> None:
        """Validate, append to the history and save: the best network, then the last state."""
        leader = self.fabric.is_global_zero
        row = {"epoch": len(self.history) + 1, "lr": float(self.schedule.get_last_lr()[0])}
        for name, value in self.sums.items():
            row[f"loss_{name}"] = float(self.fabric.all_reduce(value)) / steps  # type: ignore[arg-type]
        dice = validation_dice(self.network, self.training.data) if leader else 0.0
        row |= self.measured | {"val_dice": self.fabric.broadcast(dice)}
        self.sums = {}
        if bad := [name for name, value in row.items() if not math.isfinite(value)]:
            raise TrainingDiverged(
                f"end of epoch {row['epoch']} of {results.short(self.path)}: {', '.join(bad)} is "
                f"not finite. {ADVICE}"
            )
        self.history.append(row)
        better, self.best = row["val_dice"] > self.best, max(row["val_dice"], self.best)
        if leader:
            if better:
                best = {"network": self.network.state_dict(), "epoch": row["epoch"]}
                results.write_checkpoint(self.path / "checkpoint_best", best)
            self._save_last("objective", "optimizer", "schedule")

    def _save_last(self, *parts: str) -> None:
        state = {part: getattr(self, part).state_dict() for part in parts}
        facts = {"best": self.best, "seconds": self.seconds, "history": self.history}
        results.write_checkpoint(self.path / "checkpoint_last", state | facts)

    def finish(self) -> None:
        """Score the best network on validation and test cases and write the tables.

        The state of the optimizer is dropped: nothing needs it any more.
        """
        if not self.fabric.is_global_zero:
            return
        data = self.training.data
        self._save_last("objective")
        best = results.read_checkpoint(self.path / "checkpoint_best")
        self.network.load_state_dict(best["network"])
        per_case = score_network(self.network, data)
        results.write_table(self.path / "history.csv", pd.DataFrame(self.history))
        results.write_table(self.path / "per_case.csv", per_case)
        scores = {s: summarize(per_case[per_case["split"] == s]) for s in ("val", "test")}
        own, fixed = scores["val"]["dice"]["mean"], fixed_mask_dice(data)
        if own <= fixed:
            log.warning(
                f"warning: {results.short(self.path)} has validation Dice {own:.3f}, one fixed "
                f"mask for all images {fixed:.3f}: in {self.schedule.total_steps} steps it has "
                "learned nothing from the images; train it for more epochs"
            )
        facts = {
            "best_epoch": best["epoch"],
            "epochs": len(self.history),
            "seconds": round(self.seconds, 1),
            "together": self.together,
            "parameters": parameter_count(self.network),
            "split_hash": data.split_hash,
            "data": data.digest,
        }
        results.write_json(self.path / "summary.json", scores | facts)


def gradients(network: nn.Module, weighted: dict[str, Tensor]) -> dict[str, float]:
    """Gradient of each weighted term at the layers that all terms reach.

    Returns
    -------
    dict
        grad_TERM, its norm; cos_TERM, its cosine with the gradient of L_seg.
    """
    parameters = [p for p in network.parameters() if p.requires_grad]
    found = {}
    for name, loss in weighted.items():
        if loss.requires_grad:
            parts = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
            if any(part is not None for part in parts):
                found[name] = parts
    shared = [i for i in range(len(parameters)) if all(g[i] is not None for g in found.values())]
    if not shared:
        return {f"grad_{name}": 0.0 for name in found}
    flat = {name: torch.cat([g[i].flatten() for i in shared]) for name, g in found.items()}
    measured = {f"grad_{name}": float(g.norm()) for name, g in flat.items()}
    for name, g in flat.items():
        if name != "seg" and "seg" in flat:
            cosine = nn.functional.cosine_similarity(flat["seg"], g, dim=0)
            measured[f"cos_{name}"] = float(cosine)
    return measured


def train(fabric: Fabric, learners: list[Learner], teacher: Network | None, name: str) -> None:
    """Train networks on the same batches; the frozen teacher sees each batch once for all.

    All learners have one training set, are at the same epoch and have the same number of epochs.
    """
    first = learners[0]
    for learner in learners:
        learner.together = len(learners)  # its seconds are this fraction of the measured time
    with Progress(name, "epoch", first.epochs, len(first.history)) as progress:
        for epoch in range(len(first.history), first.epochs):
            started, steps = time.perf_counter(), 0
            for learner in learners:
                learner.objective.train()
            rank, ranks = fabric.global_rank, fabric.world_size
            for batch in first.training.epoch(epoch, fabric.device, rank, ranks):
                lesson = _lesson(fabric, batch, learners, teacher)
                for learner in learners:
                    learner.step(batch.images, lesson, measure=steps == 0)
                totals = torch.stack([learner.latest["total"] for learner in learners])
                if not totals.isfinite().all():
                    _stop(learners, epoch, steps)
                steps += 1
            if fabric.device.type == "cuda":
                torch.cuda.synchronize(fabric.device)
            seconds = (time.perf_counter() - started) / len(learners)
            for learner in learners:
                learner.seconds += seconds
                learner.close_epoch(steps)
            progress.step(_in_words(learners))


def _lesson(
    fabric: Fabric, batch: Batch, learners: list[Learner], teacher: Network | None
) -> Lesson:
    """The teacher's answer to a batch (step S1), and the edge labels; computed once for all."""
    if teacher is None:
        return Lesson(batch.masks)
    with torch.no_grad(), fabric.autocast():
        logits, maps = teacher.forward_features(batch.images)
    logits = logits.float()
    teacher_masks = logits[len(batch.masks) :] > 0
    masks = torch.cat([batch.masks, teacher_masks])
    widths = {learner.edge_width for learner in learners}
    edges = {width: edge_label_batch(masks, width) for width in widths}
    return Lesson(batch.masks, logits, maps, edges)


def _in_words(learners: list[Learner]) -> str:
    """'Dice on validation images 0.55 (alone) to 0.61 (feat, edge)', or the Dice of one network."""
    scored = [(learner.history[-1]["val_dice"], learner.name) for learner in learners]
    worst, best = min(scored), max(scored)
    if len(scored) == 1:
        return f"Dice on validation images {best[0]:.2f}"
    return f"Dice on validation images {worst[0]:.2f} ({worst[1]}) to {best[0]:.2f} ({best[1]})"


def _stop(learners: list[Learner], epoch: int, step: int) -> None:
    """Write `diverged.json` and raise; nothing of this epoch is kept."""
    learner = next(one for one in learners if not one.latest["total"].isfinite())
    losses = {name: str(float(loss)) for name, loss in learner.latest.items()}
    cases = learner.training.names(learner.training.drawn(epoch)[step].rows)
    about = {"epoch": epoch + 1, "step": step + 1, "losses": losses, "cases": cases}
    results.write_json(learner.path / "diverged.json", about)
    bad = [f"loss_{n} is {value}" for n, value in losses.items() if value in ("nan", "inf", "-inf")]
    raise TrainingDiverged(
        f"step {step + 1} of epoch {epoch + 1} of {results.short(learner.path)}: "
        f"{', '.join(bad)}; diverged.json there names the cases of the batch. {ADVICE}"
    )
