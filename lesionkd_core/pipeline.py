"""The stages in order: teacher -> graph -> students -> ablation; results are found or made."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pandas as pd
import torch
from lightning_fabric import Fabric
from scipy.special import entr
from torch import Tensor, nn

from . import results
from .config import (
    AblationConfig,
    ConfigError,
    DistillConfig,
    GraphConfig,
    LesionKDError,
    PrepareConfig,
    Role,
    StageConfig,
    TeacherConfig,
    name_of_dataset,
    nearest,
)
from .data.batches import TrainingSet, normalize
from .data.layouts import DatasetNotFound, fingerprint
from .data.prepare import Prepared, Unlabelled, unlabelled_images
from .edges import edge_label_batch
from .evaluate import fixed_mask_dice, held_out_scores, score_external
from .losses import (
    TERMS,
    EdgeGraph,
    EdgeHead,
    FittedGraph,
    Measured,
    build_terms,
    needs_graph,
    needs_teacher,
    own_code,
    resolve,
    unused_options,
)
from .losses.edge_reasoning import live_in
from .losses.feature_refinement import empirical_margins
from .models import EncoderUNet, Network, freeze, match_levels, sketch, stride_of
from .predict import build, config_of, load_network
from .results import C, OtherOptions, Progress, R, Result, Wanted, log, require_options, short
from .train import Learner, start_fabric, train

GRAPH_LR = 1e-2
"""Adam's learning rate, fitting the graph."""
ARMS = {
    "alone": "",
    "feat": "feat",
    "edge": "edge",
    "method": "feat, edge",
    "shuffled": "feat, edge_shuffled",
}
"""Loss terms of the arms of an ablation; the name of any loss term is an arm of that term."""
CONTROLS = {"edge_shuffled": "edge"}
"""A control has the weight that is given for the term that it is compared with."""


class Run(Result):
    """A finished training: config, history, per_case, summary and checkpoints."""

    def __repr__(self) -> str:
        test = self.summary["test"]
        dice, missed = test["dice"], f"{test['missed']} of {test['lesions']} lesions missed"
        return f"Run({short(self.path)}: test Dice {results.with_interval(dice)}, {missed})"


# Teacher ------------------------------------------------------------------------------------------


def train_teacher(data: Prepared, cfg: TeacherConfig) -> Run:
    """Find or train the teacher (before step S1)."""
    if isinstance(cfg, DistillConfig):
        resolve(cfg.losses)  # an error now, not after the teacher's training
    cfg = cfg.upstream(TeacherConfig)
    require_data(data, cfg)

    def make(missing: dict[Path, TeacherConfig]) -> None:
        for path in missing:
            network = _initial_teacher(cfg, data)
            terms, training = build_terms(cfg, network), TrainingSet.of(data, cfg)
            learner = Learner(fabric, path, cfg, training, network, terms)
            if cfg.teacher_checkpoint:
                log.info(f"using the teacher in {cfg.teacher_checkpoint} without training")
                if not learner.history:
                    learner.close_epoch(1)
            else:
                log.info(f"training the teacher {cfg.teacher} for {cfg.teacher_epochs} epochs")
                train(fabric, [learner], None, "teacher")
            learner.finish()

    fabric = start_fabric(cfg)
    [run] = _find_or_train(fabric, [Wanted(cfg, data.digest)], make, Run)
    return run


def require_data(data: Prepared, cfg: PrepareConfig) -> None:
    """Refuse prepared arrays of other options or of another data set than `cfg` says."""
    require_options(data, cfg.upstream(PrepareConfig))
    made = data.config["dataset"]
    if made == cfg.dataset:
        return
    try:
        content = fingerprint(cfg.upstream(PrepareConfig))
    except DatasetNotFound:  # what is not here is the same if it has the same name
        content = data.config["upstream"] * (name_of_dataset(made) == cfg.dataset_name)
    if content != data.config["upstream"]:
        raise OtherOptions(
            f"{short(data.path)} was prepared from dataset = {made!r}, not "
            f"{cfg.dataset!r} as the configuration says. Call prepare with this configuration."
        )


def require_upstream(result: Result, upstream: Result, cure: str) -> None:
    """Refuse a result that was not made from `upstream`."""
    if result.config["upstream"] != upstream.digest:
        raise OtherOptions(f"{short(result.path)} was not made from {short(upstream.path)}; {cure}")


def _find_or_train(
    fabric: Fabric,
    wanted: Sequence[Wanted[C]],
    make: Callable[[dict[Path, C]], None],
    kind: Callable[[Path], R],
) -> list[R]:
    """`find_or_make` for one or several processes."""
    leader = fabric.is_global_zero
    return results.find_or_make(wanted, make, kind, resume=True, leader=leader, wait=fabric.barrier)


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
    weights = {name: value for name, value in saved.items() if not name.startswith(ignored)}
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        why = textwrap.shorten(str(error).partition(":")[2], 200)
        wanted = f"names or shapes do not fit; expected a state dict of {expected}"
        raise LesionKDError(f"{option} = {file!r}: {wanted}. {why}") from None


def check_teacher(teacher: Run, data: Prepared, cfg: GraphConfig) -> None:
    """Refuse a teacher that has learned nothing.

    Raises
    ------
    LesionKDError
        Unless weak_teacher = 'allow': its validation Dice is not above that of one fixed mask for
        all images.
    """
    own, fixed = teacher.summary["val"]["dice"]["mean"], fixed_mask_dice(data)
    if own <= fixed and cfg.weak_teacher == "refuse":
        raise LesionKDError(
            f"the teacher {short(teacher.path)} has validation Dice {own:.3f}, one fixed mask for "
            f"all images {fixed:.3f}: it has nothing to teach. Train it longer, or set "
            "weak_teacher = 'allow'"
        )


def check_levels(cfg: GraphConfig) -> None:
    """Refuse feature maps that do not exist or differ in stride, before anything is trained."""
    teacher = sketch(cfg.teacher)
    if not isinstance(cfg, DistillConfig):
        match_levels(teacher, teacher, (cfg.edge_level.rpartition(":")[2],))
        return
    student = sketch(cfg.student, width=cfg.width)
    options = {option for term in cfg.terms for option in TERMS[term].options}
    if "levels" in options:
        match_levels(student, teacher, cfg.levels)
    if "edge_level" in options:
        match_levels(student, teacher, (cfg.edge_level,))


def require_images_without_masks(cfg: DistillConfig) -> None:
    """Refuse pseudo-labels if every image has a mask: the term would be 0."""
    if "pseudo" in cfg.losses and cfg.label_fraction == 1 and not cfg.unlabelled:
        raise ConfigError(
            "losses: pseudo is for images without masks, and here every training image has its "
            "mask; give unlabelled = FOLDER, or label_fraction below 1"
        )


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
    require_data(data, cfg)
    require_teacher(teacher, data, cfg)

    def make(missing: dict[Path, GraphConfig]) -> None:
        check_teacher(teacher, data, cfg)
        for path in missing:
            log.info(f"fitting the graph for {cfg.graph_epochs} epochs")
            if fabric.is_global_zero:  # takes seconds, so one process does it
                _fit_graph(path, cfg, data, load_network(teacher).network, fabric)

    fabric = start_fabric(cfg)
    [graph] = _find_or_train(fabric, [Wanted(cfg, teacher.digest)], make, Graph)
    return graph


def require_teacher(teacher: Run, data: Prepared, cfg: TeacherConfig) -> None:
    """Refuse a teacher of other options or of other data than those that come with it."""
    require_options(teacher, cfg.upstream(TeacherConfig))
    require_upstream(teacher, data, "train a teacher on these data (notebook 03)")


def _fit_graph(
    path: Path, cfg: GraphConfig, data: Prepared, network: Network, fabric: Fabric
) -> None:
    device, name = fabric.device, cfg.edge_level.rpartition(":")[2]
    teacher = freeze(network.to(device), cfg.teacher_bn == "batch")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cfg.teacher_seed)
        graph = EdgeGraph.build(teacher.feature_channels()[name], cfg)
        fitted = nn.ModuleDict({"graph": graph, "head": EdgeHead(cfg.states)}).to(device)
    optimizer = torch.optim.Adam(fitted.parameters(), GRAPH_LR)
    training, history = TrainingSet.of(data, cfg), []
    with Progress("graph", "epoch", cfg.graph_epochs) as progress:
        for epoch in range(cfg.graph_epochs):
            losses, rarity = [], []
            for batch in training.epoch(epoch, device):
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
                raise LesionKDError("no training image has a lesion; use losses = 'feat'")
            edges = float(torch.stack(rarity).mean())
            constant = float(entr([edges, 1 - edges]).sum())  # of predicting this fraction
            loss_edge = float(torch.stack(losses).mean())
            row = {"epoch": epoch + 1, "loss_edge_bce": loss_edge, "constant_bce": constant}
            history.append(row)
            progress.step(f"edge BCE {loss_edge:.3f}, of a constant {constant:.3f}")
    std, live = _spread(data, teacher, graph.eval(), name, cfg.edge_width)
    results.write_checkpoint(path / "checkpoint_best", {"graph": graph.state_dict(), "std": std})
    results.write_table(path / "history.csv", pd.DataFrame(history))
    results.write_json(path / "summary.json", history[-1] | {"live_nodes": live})


@torch.no_grad()
def training_maps(data: Prepared, teacher: Network) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """The teacher's maps of the training images without augmentation, and masks (N, 1, H, W)."""
    device, rows = next(teacher.parameters()).device, data.index("train")
    for i in range(0, len(rows), 16):
        masks = torch.from_numpy(data.masks[rows[i : i + 16]]).to(device).float().unsqueeze(1)
        images = normalize(data.images[rows[i : i + 16]], device)
        yield teacher.forward_features(images)[1], masks


@torch.no_grad()
def _spread(
    data: Prepared, teacher: Network, graph: EdgeGraph, name: str, width: int
) -> tuple[Tensor, float]:
    """Standard deviation (s,) of the teacher's H over live nodes, and live nodes of an image."""
    reasoned, counts = [], []
    for maps, masks in training_maps(data, teacher):
        edge = graph.edge_at(edge_label_batch(masks, width), stride_of(name))
        live = live_in(graph, edge)
        reasoned.append(graph(maps[name].float(), edge).transpose(1, 2)[live].cpu())
        counts.append(live.sum(1).cpu())
    of_image = torch.cat(counts).float()
    return torch.cat(reasoned).std(0, correction=0), float(of_image[of_image > 0].mean())


def teach(
    data: Prepared, cfg: GraphConfig, terms: Collection[str]
) -> tuple[Run | None, Graph | None]:
    """The teacher and the graph that students with these loss terms need; None for neither."""
    teacher = train_teacher(data, cfg) if needs_teacher(terms) else None
    graph = fit_edge_graph(teacher, data, cfg) if teacher and needs_graph(terms) else None
    return teacher, graph


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

    Raises
    ------
    LesionKDError
        The configurations differ in something that students trained together share.
    OtherOptions
        Data, teacher or graph were made with other options than the configurations say.
    """
    cfgs = [
        cfg.upstream(DistillConfig).with_values(losses=resolve(cfg.losses)) for cfg in cfgs
    ]  # with the weight of every term
    require_shared(cfgs)
    require_data(data, cfgs[0])
    for cfg in cfgs:
        check_levels(cfg)
        require_images_without_masks(cfg)
    given = _Given(data, teacher, graph, unlabelled_images(data, cfgs[0]))
    wanted = [Wanted(cfg, given.digest_for(cfg), unused_options(cfg.losses)) for cfg in cfgs]
    fabric = start_fabric(cfgs[0])

    def make(missing: dict[Path, DistillConfig]) -> None:
        _train_students(fabric, given, missing)

    return _find_or_train(fabric, wanted, make, Run)


def require_shared(cfgs: Sequence[DistillConfig]) -> None:
    """Refuse students that cannot be trained together.

    They may differ in what belongs to a student or to its loss terms alone; all else is equal.
    """
    free = DistillConfig.options(Role.OWN) | DistillConfig.options(Role.TERM)
    for name in DistillConfig.model_fields:
        values = list(dict.fromkeys(str(getattr(cfg, name)) for cfg in cfgs))
        if name not in free and len(values) > 1:
            got = ", ".join(values)
            raise LesionKDError(f"students trained together need equal {name}; got {got}")


@dataclass(frozen=True)
class _Given:
    """What students are made from."""

    data: Prepared
    teacher: Run | None
    graph: Graph | None
    unlabelled: Unlabelled | None

    def digest_for(self, cfg: DistillConfig) -> str:
        """Digest of what a student depends on: the graph, the teacher, or the data alone.

        Raises
        ------
        LesionKDError
            What its loss terms need is not there.
        OtherOptions
            It was made from something else, or with other options.
        """
        further = (self.unlabelled.digest if self.unlabelled else "") + own_code(cfg.losses)
        if not needs_teacher(cfg.losses):
            return self.data.digest + further
        losses = ", ".join(cfg.terms)
        if self.teacher is None:
            raise LesionKDError(f"losses = {losses!r} needs a teacher; got None")
        require_teacher(self.teacher, self.data, cfg)
        if not needs_graph(cfg.losses):
            return self.teacher.digest + further
        if self.graph is None:
            raise LesionKDError(f"losses = {losses!r} needs a graph from fit_edge_graph; got None")
        require_options(self.graph, cfg.upstream(GraphConfig))
        require_upstream(self.graph, self.teacher, "call fit_edge_graph with this teacher")
        return self.graph.digest + further


def _train_students(fabric: Fabric, given: _Given, missing: dict[Path, DistillConfig]) -> None:
    """Train the students whose results are missing, on the same batches."""
    shared = next(iter(missing.values()))
    taught = [cfg for cfg in missing.values() if needs_teacher(cfg.losses)]
    network = None
    if given.teacher and taught:
        check_teacher(given.teacher, given.data, shared)
        network = load_network(given.teacher).network.to(fabric.device)
        network = freeze(network, shared.teacher_bn == "batch")
    training = TrainingSet.of(given.data, shared, given.unlabelled)
    if (total := len(training.rows)) > len(training.labelled):
        log.info(f"students use the masks of {len(training.labelled)} of {total} training images")
    elif any("pseudo" in cfg.losses for cfg in missing.values()):
        raise ConfigError(
            "losses: pseudo is for images without masks, and none is left: the images of "
            "unlabelled are copies of your own, or label_fraction keeps every mask"
        )
    if given.unlabelled and not taught:
        log.warning("warning: no loss term of these students uses images without masks")
    measured = _measure(taught, given, network)
    by_progress: dict[int, list[Learner]] = {}
    for path, cfg in missing.items():
        student = build(cfg, training.lesion_fraction)
        terms = build_terms(cfg, student, network, measured)
        learner = Learner(fabric, path, cfg, training, student, terms)
        by_progress.setdefault(len(learner.history), []).append(learner)
    for learners in by_progress.values():  # one group, unless a run was interrupted
        name = "student" if len(learners) == 1 else f"{len(learners)} students"
        log.info(f"training {name} for {shared.epochs} epochs")
        asked = any(learner.uses_teacher for learner in learners)
        train(fabric, learners, network if asked else None, name)
        for learner in learners:
            learner.finish()


def _measure(cfgs: list[DistillConfig], given: _Given, teacher: Network | None) -> Measured:
    """The fitted graph, and the empirical margins of the maps of students that use them."""
    fitted = None
    if given.graph and any(needs_graph(cfg.losses) for cfg in cfgs):
        fitted = given.graph.load()
    empirical = [cfg for cfg in cfgs if "feat" in cfg.losses and cfg.margin == "empirical"]
    if not empirical or teacher is None:
        return Measured(fitted)
    names = {level.rpartition(":")[2] for cfg in empirical for level in cfg.levels}
    maps = (maps for maps, _ in training_maps(given.data, teacher))
    return Measured(fitted, empirical_margins(maps, names))


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


def arm_config(cfg: AblationConfig, arm: str, seed: int) -> DistillConfig:
    """The configuration of one arm with one seed.

    An arm is a name of `ARMS`, or loss terms such as 'kd', 'feat+kd' or 'edge=3' with its weight;
    'alone*2' has twice as many epochs.

    Raises
    ------
    ConfigError
        There is no such arm.
    """
    name, times, factor = arm.partition("*")
    if times and not (factor.isdecimal() and int(factor) > 0):
        raise ConfigError(f"arms names {arm!r}; after * give how many times longer, as in alone*2")
    epochs = cfg.epochs * (int(factor) if times else 1)
    losses = ARMS.get(name, name.replace("+", ","))
    arm_cfg = cfg.upstream(DistillConfig).with_values(seed=seed, epochs=epochs, losses=losses)
    for term in arm_cfg.losses:
        if term not in TERMS or term == "seg":
            known = ARMS.keys() | TERMS.keys() - {"seg"}
            raise ConfigError(f"arms names {term!r}: {nearest(term, known)}")
    weights: dict[str, float | None] = {"seg": None}
    weights |= arm_cfg.losses
    for term, weight in weights.items():
        if weight is None:
            weights[term] = cfg.losses.get(term, cfg.losses.get(CONTROLS.get(term, "")))
    return arm_cfg.with_values(losses=resolve(weights))


def arms_of(cfg: AblationConfig, seed: int) -> list[DistillConfig]:
    """All arms with one seed.

    Raises
    ------
    ConfigError
        There is no such arm, or a control has another weight than what it is compared with.
    """
    arms = [arm_config(cfg, arm, seed) for arm in cfg.arms]
    losses = [resolve(arm.losses) for arm in arms]
    for control, term in CONTROLS.items():
        weight = min((weights[term] for weights in losses if term in weights), default=None)
        other = [weights[control] for weights in losses if control in weights]
        if weight is not None and other and weight not in other:
            raise ConfigError(
                f"arms: {control} = {other[0]:g} is the control of {term} = {weight:g} and needs "
                f"its weight: write {control}={weight:g}"
            )
    for arm in arms:
        require_images_without_masks(arm)
    return arms


def require_known(cfg: StageConfig) -> None:
    """Refuse arms, loss terms, networks and maps that do not exist, before anything starts."""
    if isinstance(cfg, DistillConfig):
        resolve(cfg.losses)
    if isinstance(cfg, AblationConfig):
        arms = arms_of(cfg, cfg.seeds[0])
        terms = {name: None for arm in arms for name in arm.losses}
        check_levels(arms[0].with_values(losses=terms))
    elif isinstance(cfg, GraphConfig):
        check_levels(cfg)
        if isinstance(cfg, DistillConfig):
            require_images_without_masks(cfg)
    elif isinstance(cfg, TeacherConfig):
        sketch(cfg.teacher)


def ablate(data: Prepared, cfg: AblationConfig) -> Ablation:
    """Find or train the teacher, the graph and every arm and seed, and collect their scores.

    Arms of equal length are trained together. An arm that is added later leaves the others as they
    are. The teacher's own scores are included as arm `teacher`.
    """
    wanted = {(a, seed): one for seed in cfg.seeds for a, one in zip(cfg.arms, arms_of(cfg, seed))}
    teacher, graph = teach(data, cfg, {term for one in wanted.values() for term in one.losses})
    runs: dict[tuple[str, int], Run] = {}
    for seed in cfg.seeds:
        arms = {arm: wanted[arm, seed] for arm in cfg.arms}
        for epochs in dict.fromkeys(one.epochs for one in arms.values()):
            equal = {arm: one for arm, one in arms.items() if one.epochs == epochs}
            trained = distill_arms(teacher, graph, data, list(equal.values()))
            for arm, run in zip(equal, trained):
                runs[arm, seed] = run
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

    return results.find_or_make([Wanted(cfg, "|".join(digests))], make, Ablation)[0]
