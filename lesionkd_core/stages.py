"""The arrows of the way of the data: teacher, graph, student, ablation; each finds or makes its result."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn

from . import store
from .batches import epoch_batches, normalize
from .config import AblationConfig, DistillConfig, GraphConfig, LesionKDError, TeacherConfig
from .edges import edge_label_batch
from .evaluation import compare_arms
from .external import score_external, with_test_dataset
from .inference import build, load_network
from .losses import EdgeGraph, EdgeHead, FittedGraph, build_terms
from .networks import TEACHERS, UNet, match_levels, stride_of
from .prepare import Prepared, prepare_data
from .progress import Progress
from .training import Learner, score_and_finish, start_fabric, train


class Run(store.Result):
    """A finished training run: config, history, per_case, summary and checkpoints in `path`."""

    @property
    def test_dice(self) -> float:
        """Mean Dice over test cases."""
        return self.summary["test"]["dice"]["mean"]

    def __repr__(self) -> str:
        test = self.summary["test"]
        dice = test["dice"]
        return (
            f"Run({store.short(self.path)}: test Dice {dice['mean']:.3f} [{dice['low']:.3f}, {dice['high']:.3f}], "
            f"{test['missed']} of {test['lesions']} lesions missed)"
        )


def train_teacher(cfg: TeacherConfig, tell=print) -> Run:
    """Find or train the teacher (before step S1)."""
    cfg = cfg.upstream(TeacherConfig)
    prepared = prepare_data(cfg, tell)
    path = store.folder(cfg, prepared.digest)
    with ExitStack() as stack:
        if not store.is_done(path):
            stack.enter_context(store.lock(path, tell))
        if not store.is_done(path):
            tell(f"training the teacher {cfg.teacher} for {cfg.teacher_epochs} epochs")
            store.begin(path, cfg, prepared.digest, keep=True)
            fabric = start_fabric(cfg)
            learner = Learner.start(fabric, path, cfg, build(cfg), nn.ModuleDict(), prepared)
            train(fabric, prepared, [learner], None, "teacher")
            score_and_finish(learner, prepared)
    return Run(path)


class Graph(store.Result):
    """A fitted graph module; `load()` gives it."""

    def load(self) -> FittedGraph:
        """The frozen module and the spread of the teacher's H."""
        cfg, saved = self.config, store.read_checkpoint(self.path / "checkpoint_best")
        graph = EdgeGraph(saved["graph"]["phi.weight"].shape[1], cfg["states"], cfg["grid"], cfg["anchors"], cfg["normalize"], cfg["grid_frame"])
        graph.load_state_dict(saved["graph"])
        return FittedGraph(graph.eval().requires_grad_(False), saved["std"])


def check_levels(cfg: GraphConfig, levels: tuple[str, ...]) -> None:
    """Refuse maps that the networks do not have or that differ in stride, before anything is trained."""
    with torch.device("meta"):
        match_levels(UNet(width=getattr(cfg, "width", 4)), TEACHERS[cfg.teacher](), levels)


def fit_graph(cfg: GraphConfig, tell=print) -> Graph:
    """Find or fit the graph on the frozen teacher: re-projection, 1x1 head, BCE against Label_edge (step S4).

    The head is dropped; graph and per-channel deviation of the teacher's H are kept.
    """
    cfg = cfg.upstream(GraphConfig)
    check_levels(cfg, (cfg.edge_level,))
    prepared, teacher_run = prepare_data(cfg, tell), train_teacher(cfg, tell)
    path = store.folder(cfg, teacher_run.digest)
    if store.is_done(path):
        return Graph(path)
    with store.lock(path, tell):
        if not store.is_done(path):
            tell(f"fitting the graph for {cfg.graph_epochs} epochs")
            store.begin(path, cfg, teacher_run.digest)
            _fit(path, cfg, prepared, load_network(teacher_run).network)
            store.finish(path)
    return Graph(path)


def _fit(path: Path, cfg: GraphConfig, prepared: Prepared, teacher: nn.Module) -> None:
    fabric = start_fabric(cfg)
    teacher = teacher.to(fabric.device)
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
            if not edge.any():
                continue
            with torch.no_grad():
                x = teacher.forward_features(images)[1][name]
            loss = fitted["head"](graph, x, edge)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
            rarity.append(edge[edge.flatten(1).amax(1) > 0].mean())
        if not losses:
            raise LesionKDError("no training case has a lesion edge, so there is no graph to fit; terms = 'feat' does without")
        share = float(torch.stack(rarity).mean())
        row = {"epoch": epoch + 1, "loss_edge_bce": float(torch.stack(losses).mean()), "bce_of_the_edge_share": _entropy(share)}
        history.append(row)
        progress.epoch(f"edge BCE {row['loss_edge_bce']:.3f}, of a constant guess {row['bce_of_the_edge_share']:.3f}")
    progress.close()
    std, live = _spread(prepared, teacher, graph.eval(), name, cfg.edge_width, fabric.device)
    store.write_checkpoint(path / "checkpoint_best", {"graph": graph.state_dict(), "std": std})
    store.write_table(path / "history.csv", pd.DataFrame(history))
    store.write_json(path / "summary.json", {**history[-1], **live})


def _entropy(share: float) -> float:
    """BCE of guessing every pixel with the share of edge pixels."""
    p = np.array([max(share, 1e-9), max(1 - share, 1e-9)])
    return float(-(p * np.log(p)).sum())


@torch.no_grad()
def _spread(prepared: Prepared, teacher: nn.Module, graph: EdgeGraph, name: str, width: int, device) -> tuple[torch.Tensor, dict]:
    """Deviation of the teacher's H per state channel over live nodes of the training set, (s,); live nodes an image."""
    reasoned, counts = [], []
    rows = prepared.index("train")
    for i in range(0, len(rows), 16):
        batch = rows[i : i + 16]
        masks = torch.from_numpy(prepared.masks[batch]).to(device).float().unsqueeze(1)
        edge = graph.edge_at(edge_label_batch(masks, width), stride_of(name))
        h = graph(teacher.forward_features(normalize(prepared.images[batch], device))[1][name], edge)
        live = graph.live_nodes(edge) & (edge.flatten(1).amax(1) > 0).unsqueeze(1)
        reasoned.append(h.transpose(1, 2)[live].cpu())
        counts.append(live.sum(1).cpu())
    counts = torch.cat(counts).float()
    with_edge = counts[counts > 0]
    live = {"live_nodes": float(with_edge.mean()), "single_node_share": float((with_edge == 1).float().mean())}
    return torch.cat(reasoned).std(0, correction=0), live


def distill(cfg: DistillConfig, tell=print) -> Run:
    """Find or train one student (steps S2 to S6); teacher and graph are made on the way."""
    return distill_arms([cfg], tell)[0]


def distill_arms(cfgs: Sequence[DistillConfig], tell=print) -> list[Run]:
    """Train students of one seed and data set in lockstep: same batches, one teacher pass for all.

    Each has its own run folder; finished ones are found, unfinished ones go on where they were.
    """
    cfgs = [cfg.upstream(DistillConfig) for cfg in cfgs]
    shared = {(cfg.upstream(TeacherConfig), cfg.seed, cfg.epochs) for cfg in cfgs}
    if len(shared) != 1:
        raise LesionKDError("arms in lockstep share data, teacher, seed, batches and epochs; start what differs there as runs of their own")
    for cfg in cfgs:
        check_levels(cfg, (*cfg.feature_levels * ("feat" in cfg.terms), *(cfg.edge_level,) * ("edge" in cfg.terms)))
    prepared = prepare_data(cfgs[0], tell)
    upstreams = [_upstream(cfg, prepared, tell) for cfg in cfgs]
    paths = [store.folder(cfg, upstream) for cfg, upstream in zip(cfgs, upstreams)]
    if all(map(store.is_done, paths)):
        return [Run(path) for path in paths]
    with ExitStack() as stack:
        for path in sorted(set(paths)):  # one order for everybody, so that nobody waits in a circle
            stack.enter_context(store.lock(path, tell))
        pending = {path: (cfg, upstream) for path, cfg, upstream in zip(paths, cfgs, upstreams) if not store.is_done(path)}
        if pending:
            _train_pending(pending, prepared, tell)
    return [Run(path) for path in paths]


def _upstream(cfg: DistillConfig, prepared: Prepared, tell) -> str:
    """Digest of what a student is made from: the graph, the teacher, or without a term the data alone."""
    if "edge" in cfg.terms:
        return fit_graph(cfg, tell).digest
    return train_teacher(cfg, tell).digest if cfg.terms else prepared.digest


def _train_pending(pending: dict[Path, tuple[DistillConfig, str]], prepared: Prepared, tell) -> None:
    any_cfg = next(iter(pending.values()))[0]
    fabric = start_fabric(any_cfg)
    teacher = None
    if any(cfg.terms for cfg, _ in pending.values()):
        teacher = _teacher_of(train_teacher(any_cfg, tell), prepared).to(fabric.device, memory_format=torch.channels_last)
    by_epoch: dict[int, list[Learner]] = {}
    for path, (cfg, upstream) in pending.items():
        store.begin(path, cfg, upstream, keep=True)
        student, fitted = build(cfg), fit_graph(cfg, tell).load() if "edge" in cfg.terms else None
        learner = Learner.start(fabric, path, cfg, student, build_terms(cfg, student, teacher, fitted), prepared)
        by_epoch.setdefault(len(learner.history), []).append(learner)
    for learners in by_epoch.values():  # one group, unless a run was interrupted between two saves
        tell(f"training {len(learners)} student{'s' * (len(learners) > 1)} of width {learners[0].cfg.width} for {learners[0].epochs} epochs")
        needs_teacher = any(learner.cfg.terms for learner in learners)
        train(fabric, prepared, learners, teacher if needs_teacher else None, "student" if len(learners) == 1 else f"{len(learners)} arms")
        for learner in learners:
            score_and_finish(learner, prepared)


def _teacher_of(run: Run, prepared: Prepared) -> nn.Module:
    """The frozen teacher, refused where it was trained on another split: it may have seen our test cases."""
    if run.summary["split_hash"] != prepared.split_hash:
        raise LesionKDError(
            f"the teacher {store.short(run.path)} was trained on split {run.summary['split_hash']}, the student's is {prepared.split_hash}; "
            "train a teacher on this split (notebook 03)"
        )
    return load_network(run).network


class Ablation(store.Result):
    """All arms and seeds on the same cases: `per_case` has the columns arm and seed."""

    @cached_property
    def table(self) -> pd.DataFrame:
        """One row a test data set and arm: mean test scores over seeds, the Dice of every seed, missed lesions."""
        return store.read_table(self.path / "table.csv")

    @cached_property
    def comparison(self) -> pd.DataFrame:
        """The method against every other arm on each test data set, Dice; see `compare_arms`."""
        return store.read_table(self.path / "comparison.csv")

    @cached_property
    def runs(self) -> dict[tuple[str, int], Run]:
        """{(arm, seed): its run}."""
        return {(row["arm"], row["seed"]): Run(store.runs_root() / row["path"]) for row in self.summary["runs"]}


def ablate(cfg: AblationConfig, tell=print) -> Ablation:
    """Find or train every arm and seed, and compare them; an arm added later leaves the others alone."""
    runs = {}
    for seed in cfg.seeds:
        for arm, run in zip(cfg.arms, distill_arms([cfg.arm(arm, seed) for arm in cfg.arms], tell)):
            runs[arm, seed] = run
    others = [scored.digest for run in runs.values() for scored in score_external(run, cfg, tell).values()]
    upstream = "|".join([run.digest for run in runs.values()] + others)
    path = store.folder(cfg, upstream)
    with store.lock(path, tell):
        if not store.is_done(path):
            store.begin(path, cfg, upstream)
            _collect(path, cfg, runs)
            store.finish(path)
    return Ablation(path)


def _collect(path: Path, cfg: AblationConfig, runs: dict[tuple[str, int], Run]) -> None:
    test = pd.concat([with_test_dataset(run, cfg).assign(arm=arm, seed=seed) for (arm, seed), run in runs.items()])
    test = test.sort_values("test_dataset", key=lambda names: pd.factorize(names)[0], kind="stable")
    by_arm = test.groupby(["test_dataset", "arm"], sort=False)
    means = by_arm[["dice", "iou", "sensitivity", "precision", "hd95", "surface_dice"]].mean()
    seeds = test.pivot_table(index=["test_dataset", "arm"], columns="seed", values="dice").add_prefix("dice_seed")
    counts = by_arm[["missed", "false_alarm"]].sum() / test["seed"].nunique()
    families = [compare_arms(table).assign(test_dataset=name) for name, table in test.groupby("test_dataset", sort=False)]  # one Holm family each
    store.write_table(path / "per_case.csv", test)
    store.write_table(path / "table.csv", means.join(seeds).join(counts).reset_index())
    store.write_table(path / "comparison.csv", pd.concat(families))
    root = store.runs_root()
    store.write_json(path / "summary.json", {
        "runs": [{"arm": a, "seed": s, "path": run.path.relative_to(root).as_posix(), "summary": run.summary["test"]} for (a, s), run in runs.items()],
    })

