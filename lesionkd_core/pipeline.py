"""The stages in order: teacher -> graph -> students -> ablation; results are found or made."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from . import results
from .config import (
    AblationConfig,
    ConfigError,
    DistillConfig,
    GraphConfig,
    LesionKDError,
    TeacherConfig,
    arm_options,
    nearest,
)
from .data.batches import epoch_batches, labelled_rows, normalize
from .data.prepare import Prepared, with_unlabelled
from .edges import edge_label_batch
from .evaluate import fixed_mask_dice, held_out_scores, score_external
from .losses import (
    TERMS,
    EdgeGraph,
    EdgeHead,
    FittedGraph,
    Measured,
    build_terms,
    empirical_margins,
)
from .models import (
    EncoderUNet,
    Network,
    build_network,
    channels_of,
    freeze,
    match_levels,
    stride_of,
)
from .predict import build, config_of, load_network
from .results import C, Progress, R, Result, log, short
from .train import Learner, TeacherPass, start_fabric, stored_views, teacher_pass, train


class Run(Result):
    """A finished training: config, history, per_case, summary and checkpoints."""

    @property
    def test_dice(self) -> float:
        """Mean Dice over test cases."""
        mean: float = self.summary["test"]["dice"]["mean"]
        return mean

    def __repr__(self) -> str:
        test = self.summary["test"]
        dice, missed = test["dice"], f"{test['missed']} of {test['lesions']} lesions missed"
        return f"Run({short(self.path)}: test Dice {results.with_interval(dice)}, {missed})"


# Teacher ------------------------------------------------------------------------------------------


def train_teacher(data: Prepared, cfg: TeacherConfig) -> Run:
    """Find or train the teacher (before step S1)."""
    cfg = cfg.upstream(TeacherConfig)

    def make(missing: dict[Path, TeacherConfig]) -> None:
        for path in missing:
            network = _initial_teacher(cfg, data)
            epochs = cfg.teacher_epochs
            terms, weights = build_terms(cfg, network), {"seg": 1.0}
            learner = Learner(
                fabric, path, cfg, data, network, terms, weights, epochs, cfg.teacher_lr
            )
            if cfg.teacher_checkpoint:
                log.info(f"using the teacher in {cfg.teacher_checkpoint} without training")
                if not learner.history:
                    learner.close_epoch(1, data)
            else:
                log.info(f"training the teacher {cfg.teacher} for {epochs} epochs")
                train(fabric, data, [learner], None, "teacher")
            learner.finish(data)

    fabric = start_fabric(cfg)
    [run] = _find_or_train(fabric, [cfg], [data.digest], make, Run)
    return run


def _find_or_train(
    fabric: Fabric,
    cfgs: Sequence[C],
    upstreams: Sequence[str],
    make: Callable[[dict[Path, C]], None],
    kind: Callable[[Path], R],
) -> list[R]:
    """`find_or_make` for one or several processes."""
    processes: Any = {"leader": fabric.is_global_zero, "wait": fabric.barrier}
    return results.find_or_make(cfgs, upstreams, make, kind, resume=True, **processes)


def _initial_teacher(cfg: TeacherConfig, data: Prepared) -> Network:
    """The teacher before training: random, with an ImageNet encoder, or trained elsewhere."""
    teacher, file = build(cfg, data.lesion_fraction), cfg.encoder_weights
    if isinstance(teacher, EncoderUNet) and file != "random" and not cfg.teacher_checkpoint:
        if file and cfg.teacher == "resnet34_unet":
            _load(teacher.encoder, "encoder_weights", file, "torchvision's resnet34", "fc.")
        else:
            teacher.encoder.load_pretrained(file)
    if cfg.teacher_checkpoint:
        kind = f"lesionkd_core.models.{type(teacher).__name__}"
        _load(teacher, "teacher_checkpoint", cfg.teacher_checkpoint, kind)
    return teacher


def _load(network: nn.Module, option: str, file: str, expected: str, ignored: str = "-") -> None:
    saved = results.read_checkpoint(Path(file).expanduser())
    saved = saved.get("network", saved) if isinstance(saved, dict) else {}
    weights = {n: w for n, w in saved.items() if not n.startswith(ignored)}
    own = network.state_dict()
    wrong = [
        name
        for name in {**own, **weights}
        if name not in own or name not in weights or weights[name].shape != own[name].shape
    ]
    if wrong:
        raise LesionKDError(
            f"{option} = {file!r}: {len(wrong)} names or shapes do not fit, the first is "
            f"{wrong[0]!r}; expected a state dict of {expected}"
        )
    network.load_state_dict(weights)


def check_teacher(teacher: Run, data: Prepared, cfg: GraphConfig) -> None:
    """Refuse a teacher of another split, or one that has learned nothing.

    Raises
    ------
    LesionKDError
        It was trained on another split, or (unless weak_teacher = 'allow') its validation Dice is
        not above that of one fixed mask for all images.
    """
    summary = teacher.summary
    if summary["split_hash"] != data.split_hash:
        raise LesionKDError(
            f"the teacher {short(teacher.path)} was trained on split {summary['split_hash']}, the "
            f"student's is {data.split_hash}; train a teacher on this split (notebook 03)"
        )
    own, fixed = summary["val"]["dice"]["mean"], fixed_mask_dice(data)
    if own <= fixed and cfg.weak_teacher == "refuse":
        raise LesionKDError(
            f"the teacher {short(teacher.path)} has validation Dice {own:.3f}, one fixed mask for "
            f"all images {fixed:.3f}: it has nothing to teach. Train it longer (teacher_epochs), "
            "see notebook 03, or set weak_teacher = 'allow'"
        )


def check_levels(cfg: GraphConfig) -> None:
    """Refuse feature maps that do not exist or differ in stride, before anything is trained."""
    with torch.device("meta"):
        teacher = build_network(cfg.teacher)
        if not isinstance(cfg, DistillConfig):
            match_levels(teacher, teacher, (cfg.edge_level.rpartition(":")[2],))
            return
        student = build_network(cfg.student, width=cfg.width)
        options = {option for term in cfg.terms for option in TERMS[term].options}
        levels = cfg.levels * ("levels" in options)
        match_levels(student, teacher, (*levels, *(cfg.edge_level,) * ("edge_level" in options)))


# Graph --------------------------------------------------------------------------------------------


class Graph(Result):
    """A graph module fitted on a frozen teacher; `load()` gives it."""

    def load(self) -> FittedGraph:
        """The frozen module and the standard deviation of the teacher's H."""
        cfg = config_of(GraphConfig, self.config)
        saved = results.read_checkpoint(self.path / "checkpoint_best")
        graph = EdgeGraph.build(saved["graph"]["phi.weight"].shape[1], cfg)
        graph.load_state_dict(saved["graph"])
        return FittedGraph(graph.eval().requires_grad_(False), saved["std"])


def fit_edge_graph(teacher: Run, data: Prepared, cfg: GraphConfig) -> Graph:
    """Find or fit the graph on the frozen teacher (step S4).

    Its projection, graph and reasoning are trained to predict Label_edge from the teacher's map:
    re-projection, 1x1 head, BCE. The head is dropped afterwards.
    """
    cfg = cfg.upstream(GraphConfig)
    check_levels(cfg)

    def make(missing: dict[Path, GraphConfig]) -> None:
        check_teacher(teacher, data, cfg)
        for path in missing:
            log.info(f"fitting the graph for {cfg.graph_epochs} epochs")
            if fabric.is_global_zero:  # takes seconds, so one process does it
                _fit_graph(path, cfg, data, load_network(teacher).network, fabric)

    fabric = start_fabric(cfg)
    [graph] = _find_or_train(fabric, [cfg], [teacher.digest], make, Graph)
    return graph


def _fit_graph(
    path: Path, cfg: GraphConfig, data: Prepared, network: Network, fabric: Fabric
) -> None:
    device, name = fabric.device, cfg.edge_level.rpartition(":")[2]
    teacher = freeze(network.to(device), cfg.teacher_bn == "batch")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cfg.teacher_seed)
        graph = EdgeGraph.build(channels_of(teacher, name), cfg)
        fitted = nn.ModuleDict({"graph": graph, "head": EdgeHead(cfg.states)}).to(device)
    optimizer = torch.optim.Adam(fitted.parameters(), cfg.graph_lr)
    history = []
    with Progress("graph", cfg.graph_epochs) as progress:
        for epoch in range(cfg.graph_epochs):
            losses, rarity = [], []
            for batch in epoch_batches(
                data, cfg.batch_size, cfg.teacher_seed, epoch, cfg.augment, device
            ):
                full = edge_label_batch(batch.masks, cfg.edge_width)
                edge = graph.edge_at(full, stride_of(name))
                if not edge.any():
                    continue
                with torch.no_grad():
                    x = teacher.forward_features(batch.images)[1][name]
                loss = fitted["head"](graph, x.float(), edge)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.detach())
                rarity.append(edge[edge.flatten(1).amax(1) > 0].mean())
            if not losses:
                raise LesionKDError(
                    "no training image has a lesion, so no graph can be fitted; use losses = 'feat'"
                )
            constant = _entropy(float(torch.stack(rarity).mean()))
            loss_edge = float(torch.stack(losses).mean())
            row = {"epoch": epoch + 1, "loss_edge_bce": loss_edge, "constant_bce": constant}
            history.append(row)
            progress.step(f"edge BCE {loss_edge:.3f}, of a constant {constant:.3f}")
    std, nodes = _spread(data, teacher, graph.eval(), name, cfg.edge_width)
    results.write_checkpoint(path / "checkpoint_best", {"graph": graph.state_dict(), "std": std})
    results.write_table(path / "history.csv", pd.DataFrame(history))
    results.write_json(path / "summary.json", history[-1] | nodes)


def _entropy(fraction: float) -> float:
    """BCE of predicting every pixel with the fraction of edge pixels."""
    p = np.clip([fraction, 1 - fraction], 1e-9, None)
    return float(-(p * np.log(p)).sum())


@torch.no_grad()
def teacher_maps(data: Prepared, teacher: Network) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """The teacher's maps of the training images without augmentation, and masks (N, 1, H, W)."""
    device, rows = next(teacher.parameters()).device, data.index("train")
    for i in range(0, len(rows), 16):
        masks = torch.from_numpy(data.masks[rows[i : i + 16]]).to(device).float().unsqueeze(1)
        images = normalize(data.images[rows[i : i + 16]], device)
        yield teacher.forward_features(images)[1], masks


@torch.no_grad()
def _spread(
    data: Prepared, teacher: Network, graph: EdgeGraph, name: str, width: int
) -> tuple[Tensor, dict[str, float]]:
    """Standard deviation (s,) of the teacher's H over live nodes, and live nodes of an image."""
    reasoned, counts = [], []
    for maps, masks in teacher_maps(data, teacher):
        edge = graph.edge_at(edge_label_batch(masks, width), stride_of(name))
        live = graph.live_nodes(edge) & (edge.flatten(1).amax(1) > 0).unsqueeze(1)
        reasoned.append(graph(maps[name].float(), edge).transpose(1, 2)[live].cpu())
        counts.append(live.sum(1).cpu())
    of_image = torch.cat(counts).float()
    with_edge = of_image[of_image > 0]
    single = float((with_edge == 1).float().mean())
    nodes = {"live_nodes": float(with_edge.mean()), "single_node_fraction": single}
    return torch.cat(reasoned).std(0, correction=0), nodes


# Students -----------------------------------------------------------------------------------------


def distill(teacher: Run | None, graph: Graph | None, data: Prepared, cfg: DistillConfig) -> Run:
    """Find or train one student (steps S2 to S6).

    Parameters
    ----------
    teacher, graph
        May be None if no loss term needs them.
    """
    return distill_arms(teacher, graph, data, [cfg])[0]


def distill_arms(
    teacher: Run | None, graph: Graph | None, data: Prepared, cfgs: Sequence[DistillConfig]
) -> list[Run]:
    """Find or train several students on the same batches, with one pass of the teacher for all.

    The result of each is that of training it alone, to the bit. Each has its own run folder.
    """
    cfgs = [cfg.upstream(DistillConfig) for cfg in cfgs]
    for name in (
        "seed",
        "epochs",
        "batch_size",
        "augment",
        "precision",
        "device",
        "edge_width",
        "teacher_views",
        "label_fraction",
        "unlabelled",
    ):
        values = list(dict.fromkeys(getattr(cfg, name) for cfg in cfgs))
        if len(values) > 1:
            found = ", ".join(map(str, values))
            raise LesionKDError(
                f"students trained together need equal {name}; got {found}. Run them separately."
            )
    for cfg in cfgs:
        check_levels(cfg)
    data = with_unlabelled(data, cfgs[0])
    upstreams = [_upstream(cfg, teacher, graph, data) + data.unlabelled for cfg in cfgs]

    def make(missing: dict[Path, DistillConfig]) -> None:
        network = None
        if teacher and any(cfg.terms for cfg in missing.values()):
            check_teacher(teacher, data, cfgs[0])
            network = load_network(teacher).network.to(fabric.device)
            network = freeze(network, cfgs[0].teacher_bn == "batch")
        together: dict[int, list[Learner]] = {}
        measured = _measure(list(missing.values()), graph, data, network)
        labelled = labelled_rows(data, cfgs[0].label_fraction)
        prior = float(data.cases["lesion_share"].iloc[labelled].mean())
        if (total := len(data.training)) > len(labelled):
            log.info(f"students use the masks of {len(labelled)} of {total} training images")
        for path, cfg in missing.items():
            student = build(cfg, prior)
            terms = build_terms(cfg, student, network, measured)
            learner = Learner(
                fabric,
                path,
                cfg,
                data,
                student,
                terms,
                cfg.losses,
                cfg.epochs,
                cfg.lr,
                cfg.connector_lr,
            )
            together.setdefault(len(learner.history), []).append(learner)
        for learners in together.values():  # one group, unless a run was interrupted
            name = "student" if len(learners) == 1 else f"{len(learners)} students"
            log.info(f"training {name} for {learners[0].epochs} epochs")
            seen = None
            if teacher and network and any(missing[one.path].terms for one in learners):
                seen = _teacher_pass(network, teacher, data, learners, cfgs[0], fabric)
            train(fabric, data, learners, seen, name, cfgs[0].edge_width)
            for learner in learners:
                learner.finish(data)

    fabric = start_fabric(cfgs[0])
    return _find_or_train(fabric, cfgs, upstreams, make, Run)


def _teacher_pass(
    network: Network,
    teacher: Run,
    data: Prepared,
    learners: list[Learner],
    cfg: DistillConfig,
    fabric: Fabric,
) -> TeacherPass:
    """How the frozen teacher sees a batch: anew, or read from its stored views."""
    if not cfg.teacher_views:
        return teacher_pass(network, fabric)
    terms = [term for learner in learners for term in learner.objective.terms.values()]
    names = {name for term in terms for name in getattr(term, "teacher_maps", ())}
    weights = results.read_json(teacher.path / "DONE")["checkpoint_best"]
    made_from = "|".join([weights, data.digest, cfg.augment, cfg.precision]) + data.unlabelled
    mark = hashlib.sha256(made_from.encode()).hexdigest()[:16]
    folder = teacher.path.with_name(f"{teacher.path.name}.views-{mark}")
    return stored_views(network, folder, data, tuple(sorted(names)), cfg.teacher_views, cfg, fabric)


def needs_graph(cfg: DistillConfig) -> bool:
    """Whether a loss term of the student needs the fitted graph."""
    return any(getattr(TERMS[term].module, "needs_graph", False) for term in cfg.terms)


def _upstream(cfg: DistillConfig, teacher: Run | None, graph: Graph | None, data: Prepared) -> str:
    """Digest of what a student is made from: the graph, the teacher, or the data alone."""
    if not cfg.terms:
        return data.digest
    losses = ", ".join(cfg.terms)
    if teacher is None:
        raise LesionKDError(f"losses = {losses!r} needs a teacher; got None")
    if not needs_graph(cfg):
        return teacher.digest
    if graph is None:
        raise LesionKDError(f"losses = {losses!r} needs a graph from fit_edge_graph; got None")
    if graph.config["upstream"] != teacher.digest:
        raise LesionKDError(
            f"the graph {short(graph.path)} was fitted on another teacher than "
            f"{short(teacher.path)}; call fit_edge_graph with this teacher"
        )
    return graph.digest


def _measure(
    cfgs: list[DistillConfig], graph: Graph | None, data: Prepared, teacher: Network | None
) -> Measured:
    """The fitted graph, and margins where an arm wants the empirical ones."""
    fitted = graph.load() if graph and any(map(needs_graph, cfgs)) else None
    margins = None
    if teacher and any("feat" in cfg.losses and cfg.margin == "empirical" for cfg in cfgs):
        levels = {level.rpartition(":")[2] for cfg in cfgs for level in cfg.levels}
        margins = empirical_margins((maps for maps, _ in teacher_maps(data, teacher)), levels)
    return Measured(fitted, margins)


# Ablation -----------------------------------------------------------------------------------------


class Ablation(Result):
    """All arms and seeds on the same cases: `per_case` has the columns arm and seed."""

    @cached_property
    def history(self) -> pd.DataFrame:
        """Epochs of all runs, with the columns arm and seed."""
        parts = [run.history.assign(arm=a, seed=s) for (a, s), run in self.runs.items()]
        return pd.concat(parts, ignore_index=True)

    @cached_property
    def runs(self) -> dict[tuple[str, int], Run]:
        """The run of each arm and seed."""
        root = results.runs_root()
        return {(row["arm"], row["seed"]): Run(root / row["path"]) for row in self.summary["runs"]}


def ablate(data: Prepared, cfg: AblationConfig) -> Ablation:
    """Find or train the teacher, the graph and every arm and seed, and collect their scores.

    Arms of equal length are trained together. An arm that is added later leaves the others as they
    are. The teacher's own scores are included as arm `teacher`.
    """
    teacher, graph, runs = None, None, dict[tuple[str, int], Run]()
    for seed in cfg.seeds:
        arms = {arm: cfg.arm(arm, seed) for arm in cfg.arms}
        if teacher is None and any(arm.terms for arm in arms.values()):
            teacher = train_teacher(data, cfg)
        if graph is None and teacher and any(map(needs_graph, arms.values())):
            graph = fit_edge_graph(teacher, data, cfg)
        for epochs in dict.fromkeys(arm.epochs for arm in arms.values()):
            equal = {name: arm for name, arm in arms.items() if arm.epochs == epochs}
            found = distill_arms(teacher, graph, data, list(equal.values()))
            runs |= {(name, seed): run for name, run in zip(equal, found)}
    scored = dict(runs)
    if teacher is not None:
        scored["teacher", cfg.teacher_seed] = teacher
    elsewhere = {key: score_external(run, cfg.test_dataset) for key, run in scored.items()}
    digests = [run.digest for run in scored.values()]
    digests += [one.digest for found in elsewhere.values() for one in found.values()]

    def make(missing: dict[Path, AblationConfig]) -> None:
        for path in missing:
            tables = [
                held_out_scores(run, cfg.dataset_name, elsewhere[a, s]).assign(arm=a, seed=s)
                for (a, s), run in scored.items()
            ]
            results.write_table(path / "per_case.csv", pd.concat(tables))
            root = results.runs_root()
            listed = [
                {"arm": a, "seed": s, "path": run.path.relative_to(root).as_posix()}
                for (a, s), run in runs.items()
            ]
            results.write_json(path / "summary.json", {"runs": listed})

    return results.find_or_make([cfg], ["|".join(digests)], make, Ablation)[0]


def sweep_weights(
    data: Prepared, cfg: AblationConfig, weights: dict[str, tuple[float, ...]] | None = None
) -> pd.DataFrame:
    """Train every arm with several weights and compare them on validation cases.

    Parameters
    ----------
    cfg : AblationConfig
        Its seeds are used; `losses` are the weights that are not swept.
    weights : {loss term or 'method': weights}, optional
        By default the sweep of each registered term. For 'method' the weight of L_edge is swept.

    Returns
    -------
    DataFrame
        dataset, arm, weight (0: student alone), seed, epochs, val_dice (mean over the last quarter
        of the epochs, which varies less than the best), best_val_dice, run.
    """
    if weights is None:
        weights = {name: term.sweep for name, term in TERMS.items() if term.sweep}
    for arm in weights:
        if arm != "method" and arm not in TERMS:
            raise ConfigError(f"weights names {arm!r}: {nearest(arm, [*TERMS, 'method'])}")
    teacher = train_teacher(data, cfg)
    rows, graph = [], None
    for seed in cfg.seeds:
        points = {("alone", 0.0): cfg.arm("alone", seed)}
        for arm, values in weights.items():
            losses = arm_options(arm)["losses"].split(", ")
            for weight in values:
                swept = {name: cfg.losses.get(name) for name in losses} | {losses[-1]: weight}
                points[arm, weight] = cfg.arm("alone", seed).with_values(losses=swept)
        if graph is None and any(map(needs_graph, points.values())):
            graph = fit_edge_graph(teacher, data, cfg)
        runs = distill_arms(teacher, graph, data, list(points.values()))
        for (arm, weight), run in zip(points, runs):
            dice = run.history["val_dice"]
            scores = {
                "epochs": len(dice),
                "val_dice": dice.tail(max(len(dice) // 4, 1)).mean(),
                "best_val_dice": dice.max(),
            }
            about = {"dataset": cfg.dataset_name, "arm": arm, "weight": weight, "seed": seed}
            rows.append(about | scores | {"run": short(run.path)})
    return pd.DataFrame(rows)
