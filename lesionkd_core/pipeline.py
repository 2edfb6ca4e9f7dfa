"""Frozen teacher and graph -> trained students, any number at one teacher pass (steps S1 to S6)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from .. import ranks, store
from ..config import TERM_FIELDS, DistillConfig, GraphConfig, LesionKDError, TeacherConfig
from ..inference import build, load_network
from ..losses import FittedGraph, Measured, build_terms, empirical_margins
from ..networks import Network, settle, use_statistics
from ..prepare import Prepared, prepare_data
from ..progress import Tell
from ..training import Learner, score_and_finish, start_fabric, train
from .graph import check_levels, fit_graph, teacher_maps
from .teacher import Run, check_teacher, train_teacher


def distill(cfg: DistillConfig, tell: Tell = print) -> Run:
    """Find or train one student (steps S2 to S6); teacher and graph are made on the way."""
    return distill_arms([cfg], tell)[0]


def distill_arms(cfgs: Sequence[DistillConfig], tell: Tell = print) -> list[Run]:
    """Train students of one seed and data set in lockstep: same batches, one teacher pass for all.

    Each has its own run folder; finished ones are found, unfinished ones go on where they were.
    """
    cfgs = [cfg.upstream(DistillConfig) for cfg in cfgs]
    shared = {(cfg.upstream(TeacherConfig), cfg.seed, cfg.epochs) for cfg in cfgs}
    if len(shared) != 1 or len({cfg.teacher_bn for cfg in cfgs if cfg.terms}) > 1:
        raise LesionKDError("arms in lockstep share data, teacher and its statistics, seed, batches and epochs; start what differs there as runs of their own")
    for cfg in cfgs:
        levels = [level for term in cfg.terms for name in TERM_FIELDS[term] if name.endswith("levels") for level in getattr(cfg, name)]
        check_levels(cfg, (*levels, *(cfg.edge_level,) * ("edge" in cfg.terms)))
    prepared = ranks.after_first(lambda: prepare_data(cfgs[0], tell))
    upstreams = [_upstream(cfg, prepared, tell) for cfg in cfgs]
    paths = ranks.agree([store.folder(cfg, upstream) for cfg, upstream in zip(cfgs, upstreams)])
    if all(ranks.agree([store.is_done(path) for path in paths])):
        return [Run(path) for path in paths]
    with ExitStack() as stack:
        for path in sorted(set(paths)):  # one order for everybody, so that nobody waits in a circle
            stack.enter_context(ranks.lock(path, tell))
        done = ranks.agree([store.is_done(path) for path in paths])
        pending = {path: (cfg, upstream) for path, cfg, upstream, found in zip(paths, cfgs, upstreams, done) if not found}
        if pending:
            _train_pending(pending, prepared, tell)
    return [Run(path) for path in paths]


def _upstream(cfg: DistillConfig, prepared: Prepared, tell: Tell) -> str:
    """Digest of what a student is made from: the graph, the teacher, or without a term the data alone."""
    if "edge" in cfg.terms and cfg.graph == "frozen":
        return fit_graph(cfg, tell).digest
    return train_teacher(cfg, tell).digest if cfg.terms else prepared.digest


def _train_pending(pending: dict[Path, tuple[DistillConfig, str]], prepared: Prepared, tell: Tell) -> None:
    cfgs = {path: cfg for path, (cfg, _) in pending.items()}
    any_cfg = next(iter(cfgs.values()))
    fabric = start_fabric(any_cfg)
    teacher = None
    if any(cfg.terms for cfg in cfgs.values()):
        teacher = settle(_teacher_of(train_teacher(any_cfg, tell), any_cfg, prepared), fabric.device)
        use_statistics(teacher, next(cfg.teacher_bn for cfg in cfgs.values() if cfg.terms))
    measured = _measure(list(cfgs.values()), prepared, teacher, tell)
    by_epoch: dict[int, list[Learner]] = {}
    for (path, (cfg, upstream)), known in zip(pending.items(), measured):
        if ranks.first():
            store.begin(path, cfg, upstream, keep=True)
        student = build(cfg)
        learner = Learner.start(fabric, path, cfg, student, build_terms(cfg, student, teacher, known), prepared)
        by_epoch.setdefault(len(learner.history), []).append(learner)
    for learners in by_epoch.values():  # one group, unless a run was interrupted between two saves
        tell(f"training {len(learners)} student{'s' * (len(learners) > 1)} of width {cfgs[learners[0].path].width} for {learners[0].epochs} epochs")
        needs_teacher = any(cfgs[learner.path].terms for learner in learners)
        train(fabric, prepared, learners, teacher if needs_teacher else None, "student" if len(learners) == 1 else f"{len(learners)} arms")
        for learner in learners:
            score_and_finish(learner, prepared, tell)


def _measure(cfgs: list[DistillConfig], prepared: Prepared, teacher: Network | None, tell: Tell) -> list[Measured]:
    """Fitted graph and margins for every arm; arms of one graph share it, so that its teacher side is computed once a batch."""
    graphs: dict[GraphConfig, FittedGraph] = {}
    names = sorted({pair[1] for cfg in cfgs if "feat" in cfg.terms and cfg.margin == "empirical" for pair in check_levels(cfg, cfg.feature_levels)})
    margins = empirical_margins((maps for maps, _ in teacher_maps(prepared, teacher)), names) if names and teacher else None
    known = []
    for cfg in cfgs:
        fitted = None
        if "edge" in cfg.terms and cfg.graph == "frozen":
            key = cfg.upstream(GraphConfig)
            fitted = graphs[key] = graphs.get(key) or fit_graph(cfg, tell).load()
        known.append(Measured(fitted, margins))
    return known


def _teacher_of(run: Run, cfg: DistillConfig, prepared: Prepared) -> Network:
    """The frozen teacher, refused where it was trained on another split, since it may have seen our test cases, or has nothing to teach."""
    if run.summary["split_hash"] != prepared.split_hash:
        raise LesionKDError(
            f"the teacher {store.short(run.path)} was trained on split {run.summary['split_hash']}, the student's is {prepared.split_hash}; "
            "train a teacher on this split (notebook 03)"
        )
    check_teacher(run, cfg, prepared)
    return load_network(run).network
