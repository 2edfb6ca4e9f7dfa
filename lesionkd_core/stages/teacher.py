"""Prepared data -> trained teacher (before step S1)."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from .. import ranks, store
from ..config import GraphConfig, LesionKDError, TeacherConfig
from ..evaluation import fixed_mask_dice
from ..inference import build
from ..networks import Network
from ..prepare import Prepared, prepare_data
from ..progress import Tell
from ..training import Learner, score_and_finish, start_fabric, train, validation_dice


class Run(store.Result):
    """A finished training run: config, history, per_case, summary and checkpoints in `path`."""

    @property
    def test_dice(self) -> float:
        """Mean Dice over test cases."""
        mean: float = self.summary["test"]["dice"]["mean"]
        return mean

    def __repr__(self) -> str:
        test = self.summary["test"]
        dice = test["dice"]
        return (
            f"Run({store.short(self.path)}: test Dice {dice['mean']:.3f} [{dice['low']:.3f}, {dice['high']:.3f}], "
            f"{test['missed']} of {test['lesions']} lesions missed)"
        )


def train_teacher(cfg: TeacherConfig, tell: Tell = print) -> Run:
    """Find or train the teacher (before step S1)."""
    cfg = cfg.upstream(TeacherConfig)
    prepared = ranks.after_first(lambda: prepare_data(cfg, tell))
    path = ranks.agree(store.folder(cfg, prepared.digest))
    if ranks.agree(store.is_done(path)):
        return Run(path)
    with ranks.lock(path, tell):
        if not ranks.agree(store.is_done(path)):
            _train(path, cfg, prepared, tell)
    return Run(path)


def _train(path: Path, cfg: TeacherConfig, prepared: Prepared, tell: Tell) -> None:
    if ranks.first():
        store.begin(path, cfg, prepared.digest, keep=True)
    fabric = start_fabric(cfg)
    learner = Learner.start(fabric, path, cfg, starting_teacher(cfg), nn.ModuleDict(), prepared)
    if cfg.teacher_checkpoint:
        tell(f"taking the teacher {cfg.teacher} from {cfg.teacher_checkpoint} as it is; what it was trained on is yours to know")
        learner.epochs = 0
        if not learner.history:
            learner.close_epoch(1, validation_dice(learner.network, prepared))
    else:
        tell(f"training the teacher {cfg.teacher} for {cfg.teacher_epochs} epochs")
        train(fabric, prepared, [learner], None, "teacher")
    score_and_finish(learner, prepared, tell)


def check_teacher(run: Run, cfg: GraphConfig, prepared: Prepared) -> None:
    """Refuse a teacher with nothing to teach, unless the configuration forces it.

    Raises
    ------
    LesionKDError
        On validation cases it is no better than one fixed mask for every image.
    """
    own, fixed = run.summary["val"]["dice"]["mean"], fixed_mask_dice(prepared)
    if own <= fixed and cfg.weak_teacher == "refuse":
        raise LesionKDError(
            f"the teacher {store.short(run.path)} has validation Dice {own:.3f}; one fixed mask for every image has {fixed:.3f}, so it has nothing to teach. "
            "Train it longer (teacher_epochs), look at notebook 03, or force it with weak_teacher = 'allow'"
        )


def starting_teacher(cfg: TeacherConfig) -> Network:
    """The teacher as training finds it: at random, with an ImageNet encoder, or already trained elsewhere."""
    teacher = build(cfg)
    if cfg.encoder_weights:
        _load(teacher.get_submodule("encoder"), "encoder_weights", cfg.encoder_weights, "torchvision's resnet34", without="fc.")
    if cfg.teacher_checkpoint:
        _load(teacher, "teacher_checkpoint", cfg.teacher_checkpoint, f"lesionkd_core.networks.{type(teacher).__name__}")
    return teacher


def _load(network: nn.Module, parameter: str, file: str, wanted: str, without: str = "-") -> None:
    saved = store.read_checkpoint(Path(file).expanduser())
    saved = saved.get("network", saved) if isinstance(saved, dict) else {}  # our own checkpoints hold it under that name
    weights, mine = {n: w for n, w in saved.items() if not n.startswith(without)}, network.state_dict()
    wrong = [n for n in {**mine, **weights} if n not in mine or n not in weights or weights[n].shape != mine[n].shape]
    if wrong:
        raise LesionKDError(f"{parameter} = {file!r}: {len(wrong)} names or shapes do not fit, the first is {wrong[0]!r}; wants a state dict of {wanted}")
    network.load_state_dict(weights)
