"""The training loop: a teacher, or any number of students with one pass of the teacher."""

from __future__ import annotations

import copy
import logging
import math
import os
import platform
import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack
from datetime import timedelta
from importlib.util import find_spec
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies.ddp import DDPStrategy
from torch import Tensor, nn

from . import results
from .config import LesionKDError, TeacherConfig
from .data.batches import VIEW_SEED, Batch, epoch_batches, epoch_order, load_batch
from .data.prepare import Prepared
from .edges import edge_label_batch
from .evaluate import fixed_mask_dice, score_network, summarize, validation_dice
from .losses import Step
from .models import Network, parameter_count
from .results import Progress, log

TeacherPass = Callable[[Batch, int], tuple[Tensor, dict[str, Tensor]]]
"""(batch, epoch) -> the frozen teacher's logits and feature maps."""


class TrainingDiverged(LesionKDError):
    """A loss became infinite or NaN."""


def start_fabric(cfg: TeacherConfig) -> Fabric:
    """Device, precision and number of processes.

    Started by torchrun, every process trains on its part of each batch (Fabric's `ddp`): gradients
    are averaged, and on GPUs the BatchNorm statistics are those of the whole batch.
    """
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if cfg.batch_size < processes:
        raise LesionKDError(
            f"batch_size = {cfg.batch_size} cannot be divided among {processes} processes; "
            f"use at least {processes}"
        )
    if cfg.tracker and find_spec("tensorboardX") is None:
        raise LesionKDError(
            "tracker = 'tensorboard' needs the package tensorboardX: "
            "pip install '.[tensorboard]', or leave tracker out"
        )
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    if cfg.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(cfg.deterministic)
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    strategy: Any = "auto"
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
        raise LesionKDError(
            f"device = {cfg.device!r} cannot be used here: {why}; use device = 'auto'"
        ) from error
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


class Objective(nn.Module):
    """A network and the terms of its loss; connectors are trained with it (step S6)."""

    def __init__(self, network: Network, terms: nn.ModuleDict) -> None:
        super().__init__()
        self.network, self.terms = network, terms

    def forward(
        self,
        images: Tensor,
        masks: Tensor,
        edge: Tensor | None = None,
        teacher: tuple[Tensor, dict[str, Tensor]] | None = None,
        epoch: int = 0,
    ) -> dict[str, Tensor]:
        """Images (N, C, H, W), masks (M, 1, H, W), M <= N -> every loss term before its weight."""
        logits, maps = self.network.forward_features(images)
        seen = {"teacher_logits": teacher[0], "teacher_maps": teacher[1]} if teacher else {}
        with torch.autocast(images.device.type, enabled=False):  # sums over pixels need float32
            step = Step(logits.float(), masks, maps, edge, epoch=epoch, **seen)  # type: ignore[arg-type]
            return {name: term(step) for name, term in self.terms.items()}


class Learner:
    """One network in training, with what its checkpoint holds.

    Parameters
    ----------
    path : Path
        Run folder; the training resumes from its `checkpoint_last`.
    network : Network
    terms : ModuleDict
        From `losses.build_terms`.
    weights : {term: weight}
    epochs, lr
        Number of epochs and peak learning rate.
    connector_lr : float
        Learning rate of the terms' own layers, as a multiple of `lr`.
    """

    def __init__(
        self,
        fabric: Fabric,
        path: Path,
        cfg: TeacherConfig,
        data: Prepared,
        network: Network,
        terms: nn.ModuleDict,
        weights: dict[str, float],
        epochs: int,
        lr: float,
        connector_lr: float = 1.0,
    ) -> None:
        self.fabric, self.path, self.cfg = fabric, path, cfg
        self.weights, self.epochs, self.seed = weights, epochs, getattr(cfg, cfg.seed_field)
        self.best, self.seconds, self.history = -1.0, 0.0, []  # type: float, float, list[dict[str, float]]
        objective = Objective(network, terms).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if fabric.world_size > 1 and fabric.device.type == "cuda":
            objective = nn.SyncBatchNorm.convert_sync_batchnorm(objective)
        self.objective: Objective = objective.to(fabric.device)
        rates = {self.objective.network: lr, self.objective.terms: lr * connector_lr}
        groups: list[dict[str, Any]]
        groups = [{"params": list(module.parameters()), "lr": r} for module, r in rates.items()]
        groups = [group for group in groups if group["params"]]
        optimizer = torch.optim.AdamW(
            groups, weight_decay=cfg.weight_decay, fused=fabric.device.type in ("cpu", "cuda")
        )
        steps = len(epoch_order(len(data.training), cfg.batch_size, self.seed, 0))
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, [group["lr"] for group in groups], total_steps=epochs * steps
        )
        self.optimizer = optimizer
        if (path / "checkpoint_last").exists():
            saved = results.read_checkpoint(path / "checkpoint_last")
            for part in ("objective", "optimizer", "schedule"):
                getattr(self, part).load_state_dict(saved[part])
            self.best, self.seconds = saved["best"], saved["seconds"]
            self.history = saved["history"]
        self.wrapped, self.stepper = fabric.setup(self.objective, optimizer)
        self.uses_teacher = set(weights) != {"seg"}
        self.latest: dict[str, Tensor] = {}
        self.sums: dict[str, Tensor] = {}
        self.measured: dict[str, float] = {}

    @property
    def network(self) -> Network:
        """The network without its loss terms."""
        return self.objective.network

    def step(self, batch: Batch, edge: Tensor | None, teacher: Any, measure: bool) -> None:
        """One update (step S6); with `measure` also the gradient of each term."""
        images = batch.images if self.uses_teacher else batch.images[: len(batch.masks)]
        inputs = images, batch.masks, edge, teacher, len(self.history)
        if measure and self.uses_teacher:
            probe = copy.deepcopy(self.objective)  # so that measuring changes nothing
            with self.fabric.autocast():
                found = {name: self.weights[name] * x for name, x in probe(*inputs).items()}
            self.measured = gradients(probe.network, found)
        losses = self.wrapped(*inputs)
        weighted = {name: self.weights[name] * loss for name, loss in losses.items()}
        total = torch.stack(list(weighted.values())).sum()
        self.fabric.backward(total)
        if self.cfg.clip_grad:
            self.fabric.clip_gradients(self.wrapped, self.stepper, max_norm=self.cfg.clip_grad)
        self.stepper.step()
        self.stepper.zero_grad(set_to_none=True)
        self.schedule.step()
        self.latest = {"total": total.detach()} | {n: loss.detach() for n, loss in losses.items()}
        for name, loss in self.latest.items():
            self.sums[name] = self.sums.get(name, 0.0) + loss

    def close_epoch(self, steps: int, data: Prepared) -> dict[str, float]:
        """Validate, append to the history and save: the best network, then the last state."""
        row = {"epoch": len(self.history) + 1, "lr": float(self.schedule.get_last_lr()[0])}
        sums: Any = {name: self.fabric.all_reduce(value) for name, value in self.sums.items()}
        row |= {f"loss_{name}": float(value) / steps for name, value in sums.items()}
        leader = self.fabric.is_global_zero
        dice = validation_dice(self.network, data) if leader else 0.0
        row |= self.measured | {"val_dice": self.fabric.broadcast(dice)}
        self.sums = {}
        if bad := [name for name, value in row.items() if not math.isfinite(value)]:
            raise TrainingDiverged(
                f"end of epoch {row['epoch']} of {results.short(self.path)}: {', '.join(bad)} is "
                "not finite. Reduce the learning rate or a weight; the last good epoch is kept."
            )
        self.history.append(row)
        if self.cfg.tracker and leader:
            self._track(row)
        better, self.best = row["val_dice"] > self.best, max(row["val_dice"], self.best)
        if leader:
            if better:
                best = {"network": self.network.state_dict(), "epoch": row["epoch"]}
                results.write_checkpoint(self.path / "checkpoint_best", best)
            parts = ("objective", "optimizer", "schedule")
            last = {part: getattr(self, part).state_dict() for part in parts}
            last |= {"best": self.best, "seconds": self.seconds, "history": self.history}
            results.write_checkpoint(self.path / "checkpoint_last", last)
        return row

    def _track(self, row: dict[str, float]) -> None:
        """Add an epoch to the event files in `tensorboard/`."""
        from tensorboardX import SummaryWriter

        suffix = f".{len(self.history):04d}"
        with SummaryWriter(str(self.path / "tensorboard"), filename_suffix=suffix) as writer:
            for name, value in row.items():
                writer.add_scalar(name, value, row["epoch"])

    def finish(self, data: Prepared) -> None:
        """Score the best network on validation and test cases and write the tables."""
        if not self.fabric.is_global_zero:
            return
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
        grad_TERM, its norm; cos_TERM, its cosine with the gradient of L_seg; cos_A_B, of two other
        terms.
    """
    parameters = [p for p in network.parameters() if p.requires_grad]
    found = {
        name: torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        for name, loss in weighted.items()
        if loss.requires_grad
    }
    found = {n: g for n, g in found.items() if any(part is not None for part in g)}
    shared = [i for i in range(len(parameters)) if all(g[i] is not None for g in found.values())]
    if not shared:
        return {f"grad_{name}": 0.0 for name in found}
    flat = {name: torch.cat([g[i].flatten() for i in shared]) for name, g in found.items()}
    measured = {f"grad_{name}": float(g.norm()) for name, g in flat.items()}
    for a, b in combinations(sorted(flat, key=lambda name: name != "seg"), 2):
        cosine = nn.functional.cosine_similarity(flat[a], flat[b], dim=0)
        measured[f"cos_{b}" if a == "seg" else f"cos_{a}_{b}"] = float(cosine)
    return measured


def train(
    fabric: Fabric,
    data: Prepared,
    learners: list[Learner],
    teacher: TeacherPass | None,
    name: str,
    edge_width: int = 1,
) -> None:
    """Train networks on the same batches; the frozen teacher sees each batch once for all.

    All learners are at the same epoch and have the same seed, batches and number of epochs.
    """
    first = learners[0]
    with Progress(name, first.epochs, len(first.history)) as progress:
        for epoch in range(len(first.history), first.epochs):
            started, steps = time.perf_counter(), 0
            for learner in learners:
                learner.objective.train()
            batches = epoch_batches(
                data,
                first.cfg.batch_size,
                first.seed,
                epoch,
                first.cfg.augment,
                fabric.device,
                fabric.global_rank,
                fabric.world_size,
                getattr(first.cfg, "teacher_views", 0),
                getattr(first.cfg, "label_fraction", 1.0),
            )
            for batch in batches:
                seen, edge = None, None
                if teacher is not None:
                    seen = teacher(batch, epoch)  # step S1
                    without = seen[0][len(batch.masks) :] > 0  # the teacher's masks
                    edge = edge_label_batch(torch.cat([batch.masks, without]), edge_width)
                for learner in learners:
                    learner.step(batch, edge, seen, measure=steps == 0)
                totals = torch.stack([learner.latest["total"] for learner in learners])
                if not totals.isfinite().all():
                    _stop(learners, data, epoch, steps)
                steps += 1
            if fabric.device.type == "cuda":
                torch.cuda.synchronize(fabric.device)
            seconds = (time.perf_counter() - started) / len(learners)
            rows = []
            for learner in learners:
                learner.seconds += seconds
                rows.append(learner.close_epoch(steps, data))
            progress.step(f"{_range(rows, 'loss_total')}, {_range(rows, 'val_dice')}")


def _range(rows: list[dict[str, float]], key: str) -> str:
    """'val_dice 0.612 to 0.774' over the networks in training; one number of one network."""
    values = sorted({f"{row[key]:.3f}" for row in rows}, key=float)
    return f"{key} {' to '.join(dict.fromkeys((values[0], values[-1])))}"


def _stop(learners: list[Learner], data: Prepared, epoch: int, step: int) -> None:
    """Write `diverged.json` and raise; nothing of this epoch is kept."""
    learner = next(one for one in learners if not one.latest["total"].isfinite())
    rows = data.training
    batch = rows[epoch_order(len(rows), learner.cfg.batch_size, learner.seed, epoch)[step]]
    losses = {name: float(value) for name, value in learner.latest.items()}
    about = {
        "epoch": epoch + 1,
        "step": step + 1,
        "lr": learner.schedule.get_last_lr()[0],
        "losses": {name: str(value) for name, value in losses.items()},
        "cases": data.cases["id"].iloc[batch].tolist(),
    }
    results.write_json(learner.path / "diverged.json", about)
    bad = [f"loss_{n} is {v}" for n, v in losses.items() if n != "total" and not math.isfinite(v)]
    raise TrainingDiverged(
        f"step {step + 1} of epoch {epoch + 1} of {results.short(learner.path)}: "
        f"{', '.join(bad) or 'the sum of the losses is not finite'}; diverged.json there names the "
        "cases of the batch. Reduce the learning rate or a weight, or set clip_grad = 1; the last "
        "good epoch is kept."
    )


# The frozen teacher -------------------------------------------------------------------------------


def teacher_pass(teacher: Network, fabric: Fabric) -> TeacherPass:
    """Let the frozen teacher see each batch (step S1)."""

    def see(batch: Batch, epoch: int) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.no_grad(), fabric.autocast():
            logits, maps = teacher.forward_features(batch.images)
        return logits.float(), maps

    return see


def stored_views(
    teacher: Network,
    folder: Path,
    data: Prepared,
    names: tuple[str, ...],
    views: int,
    cfg: TeacherConfig,
    fabric: Fabric,
) -> TeacherPass:
    """The frozen teacher's outputs on fixed augmented views, computed once and read from disk.

    Logits and the named maps of every training image and view are stored in half precision, one
    memory-mapped file for each. All students, seeds and later runs of this teacher read them.

    Parameters
    ----------
    folder : Path
        Holds `<view>/<name>.npy`; files that exist are kept.

    Raises
    ------
    LesionKDError
        The disk has too little space.
    """
    names = ("logits", *names)
    if fabric.is_global_zero:
        with results.lock(folder):
            for partial in folder.rglob(".*.partial"):  # of a process that was killed
                partial.unlink()
            _store_views(teacher, folder, data, names, views, cfg, fabric)
    fabric.barrier()
    position = {int(row): i for i, row in enumerate(data.training)}
    files = {(v, n): _view(folder, v, n) for v in range(views) for n in names}
    arrays = {key: np.load(file, mmap_mode="r") for key, file in files.items()}

    def read(batch: Batch, epoch: int) -> tuple[Tensor, dict[str, Tensor]]:
        rows = [position[int(row)] for row in batch.rows]
        stored = {name: torch.from_numpy(arrays[epoch % views, name][rows]) for name in names}
        found = {n: x.to(fabric.device).float().permute(0, 3, 1, 2) for n, x in stored.items()}
        return found.pop("logits"), found

    return read


def _view(folder: Path, view: int, name: str) -> Path:
    return folder / f"{view:03d}" / f"{name}.npy"


def _store_views(
    teacher: Network,
    folder: Path,
    data: Prepared,
    names: tuple[str, ...],
    views: int,
    cfg: TeacherConfig,
    fabric: Fabric,
) -> None:
    """Write what is missing, (N, H, W, C) float16 for each view and name."""
    missing = {v: [n for n in names if not _view(folder, v, n).exists()] for v in range(views)}
    missing = {view: absent for view, absent in missing.items() if absent}
    rows, see = data.training, teacher_pass(teacher, fabric)
    blocks = [rows[i : i + cfg.batch_size] for i in range(0, len(rows), cfg.batch_size)]

    def outputs(view: int, block: np.ndarray) -> dict[str, np.ndarray]:
        logits, maps = see(load_batch(data, block, VIEW_SEED, view, cfg.augment, fabric.device), 0)
        found = {name: (maps | {"logits": logits})[name] for name in names}
        return {n: x.permute(0, 2, 3, 1).half().cpu().numpy() for n, x in found.items()}

    if not missing:
        return
    shapes = {name: (len(rows), *x.shape[1:]) for name, x in outputs(0, blocks[0][:1]).items()}
    needed = sum(2 * math.prod(shapes[n]) for absent in missing.values() for n in absent)
    free = shutil.disk_usage(folder.parent).free
    if needed > free:
        raise LesionKDError(
            f"teacher_views = {views} needs {needed / 1e9:.1f} GB in {results.short(folder)}, "
            f"{free / 1e9:.1f} GB are free. Free some space, use fewer views, or teacher_views = 0"
        )
    log.info(f"storing the teacher's outputs, {needed / 1e9:.1f} GB in {results.short(folder)}")
    with Progress("teacher views", len(missing)) as progress:
        for view, absent in missing.items():
            with ExitStack() as stack:
                write = {
                    n: stack.enter_context(
                        results.appending(_view(folder, view, n), shapes[n], "<f2")
                    )
                    for n in absent
                }
                for block in blocks:
                    found = outputs(view, block)
                    for name in absent:
                        write[name](found[name])
            progress.step(f"{len(rows)} images")
