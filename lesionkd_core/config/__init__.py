"""One configuration per stage: frozen, strict, unknown names refused with the nearest match.

A stage's configuration inherits the fields of every stage it stands on, so notebooks pass one flat
set of parameters, and ``cfg.upstream(TeacherConfig)`` hands the teacher exactly what concerns it.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from .base import (
    PROFILES,
    ConfigError,
    EdgeLevel,
    Fraction,
    LesionKDError,
    Levels,
    Names,
    Seed,
    Seeds,
    StageConfig,
    Weight,
    Window,
    content_of,
    nearest,
)
from .export import ExportConfig

__all__ = [
    "ARMS", "PROFILES", "TERM_FIELDS", "AblationConfig", "ConfigError", "DistillConfig", "EdgeConfig", "ExportConfig", "ExternalConfig", "GraphConfig",
    "LesionKDError", "PrepareConfig", "StageConfig", "TeacherConfig", "idle_fields", "nearest",
]


class PrepareConfig(StageConfig):
    """Raw release or phantom -> arrays, split and report (stage `prepare`)."""

    stage = "prepare"
    version = 2
    dataset: str = Field("phantom-dermoscopy", min_length=1, description="a name of the catalogue, a folder with images/ and masks/, or a CSV manifest")
    pixels: int = Field(64, ge=32, le=2048, multiple_of=32, description="side of the square prepared image, px; a multiple of 32 (METHOD, student)")
    cases: int = Field(0, ge=0, description="how many cases to draw at random; 0 takes all (phantom: 1000)")
    normals: Literal["drop", "keep", "test"] = Field("drop", description="cases without a lesion: drop, keep, or only in the test split")
    fit: Literal["stretch", "pad"] = Field("stretch", description="how an image becomes square: stretched, or padded with black")
    colour: Literal["rgb", "grey"] = Field("rgb", description="grey repeats the luminance in all three channels")
    clahe: float = Field(0.0, ge=0, le=1, description="clip limit of adaptive histogram equalization of the luminance; 0 is off, 0.01 usual")
    gamma: float = Field(1.0, gt=0, le=10, description="exponent on grey values 0..1 before training; 1 changes nothing")
    window: Window = Field("", description="volumes: 'centre, width' in HU; empty takes the DICOM file's own, else the 0.5 to 99.5 percentiles")
    difficulty: float = Field(0.5, ge=0, le=1, description="phantom only: 0 easy to 1 very hard")
    split_seed: Seed = Field(0, description="seed of the split into train, val and test, and of the phantom's cases")
    split: Literal["groups", "official", "random", "test"] = Field(
        "groups", description="by group; as the release or manifest says; by case, which leaks; or everything for testing"
    )
    split_file: str = Field("", description="a split.csv with columns id, split made elsewhere; goes before split")
    folds: int = Field(0, ge=0, le=50, description="k of a k-fold split by group; 0 holds out test_fraction")
    fold: int = Field(0, ge=0, description="which of the k folds is tested, from 0")
    val_fraction: Fraction = Field(0.15, description="share of the cases that choose checkpoints and parameters")
    test_fraction: Fraction = Field(0.2, description="share of the cases that are scored once")
    duplicate_bits: int = Field(4, ge=0, le=16, description="images whose 63-bit perceptual hashes differ in at most this many bits share a group")

    @property
    def dataset_name(self) -> str:
        """The data set as tables name it: a folder by its own name alone."""
        return Path(self.dataset).name

    def external(self, dataset: str) -> ExternalConfig:
        """The configuration that prepares all of another data set for testing, in the same look."""
        return self.upstream(ExternalConfig).with_values(dataset=dataset, cases=0, split="test", split_file="", folds=0, fold=0)

    @model_validator(mode="after")
    def _fold_of_folds(self) -> Self:
        if self.folds == 1:
            raise ValueError("folds = 1: wants 0 for a hold-out split, or at least 2")
        if self.fold >= max(self.folds, 1):
            raise ValueError(f"fold = {self.fold}: the folds are numbered 0 to {max(self.folds, 1) - 1} (folds = {self.folds})")
        if self.folds and (self.split != "groups" or self.split_file):
            raise ValueError("folds go by group; split must be 'groups' and split_file empty")
        if self.split_file and self.normals == "test":
            raise ValueError("normals = 'test': the split file says who is tested; keep or drop them")
        if self.folds and self.normals == "test":
            raise ValueError("normals = 'test' would test them in every fold; with folds, keep or drop them")
        return self

    def hashed(self) -> dict[str, Any]:
        """The split file counts with its content, wherever it lies."""
        return super().hashed() | ({"split_file": content_of(self.split_file)} if self.split_file else {})


class ExternalConfig(PrepareConfig):
    """Trained network and another data set -> its scores there (stage `external`)."""

    stage = "external"


class EdgeConfig(PrepareConfig):
    """What makes Label_edge and the cells it falls into; no stage of its own, edges are made in training."""

    edge_width: int = Field(1, ge=1, le=8, description="edge label: 1 is the patent's 4-neighbour rule (two pixels wide), w dilates it w - 1 times, px")
    edge_level: EdgeLevel = Field("encoder.stride4", description="map that the graph reads; low (patent) is encoder.stride4, deep (paper) is encoder.stride16")
    grid: int = Field(4, ge=1, le=16, description="k: the graph has k x k nodes (EAGR, Te et al. 2020)")
    grid_frame: Literal["image", "lesion"] = Field("image", description="what the grid of cells covers: the image (EAGR) or the lesions' bounding box (ours)")


class TeacherConfig(PrepareConfig):
    """Prepared arrays -> trained teacher (stage `teacher`, step S1)."""

    stage = "teacher"
    seed_field = "teacher_seed"
    teacher: Literal["resnet34_unet", "unet64"] = Field("resnet34_unet", description="teacher network: the patent's or the paper's plain U-Net")
    teacher_seed: Seed = Field(0, description="seed of the teacher's initialization and batch order, and of the graph")
    teacher_epochs: int = Field(12, ge=1, description="passes over the training cases, teacher")
    teacher_lr: float = Field(1e-3, gt=0, description="peak learning rate of the one-cycle schedule, teacher")
    batch_size: int = Field(8, ge=2, description="cases in a batch")
    weight_decay: float = Field(1e-2, ge=0, description="AdamW's decoupled weight decay")
    clip_grad: float = Field(0.0, ge=0, allow_inf_nan=False, description="largest norm of a step's gradient, over all trained weights; 0 does not clip")
    augment: Literal["none", "flips", "full"] = Field(
        "full", description="training cases: as they are; flipped and turned; or also warped, recoloured, noisy, blurred"
    )
    precision: Literal["32-true", "bf16-mixed"] = Field("32-true", description="Lightning Fabric's name of the arithmetic")
    deterministic: bool = Field(False, description="only operations of torch that give the same bits every time; on a CPU with one thread all are anyway")
    encoder_weights: str = Field("", description="file of torchvision's resnet34 (ImageNet) for the teacher's encoder; empty starts at random")
    teacher_checkpoint: str = Field("", description="weights of your own trained teacher, a state dict of the network named by teacher; used as it is")
    test_dataset: Names = Field((), description="further data sets, comma-separated: all of each is scored with the trained network")

    @model_validator(mode="after")
    def _weights_of_the_teacher(self) -> Self:
        if self.encoder_weights and self.teacher != "resnet34_unet":
            raise ValueError(f"encoder_weights are for teacher = 'resnet34_unet'; {self.teacher!r} has no such encoder")
        if self.encoder_weights and self.teacher_checkpoint:
            raise ValueError("encoder_weights and teacher_checkpoint: a trained teacher brings its own encoder; give one of the two")
        return self

    @model_validator(mode="after")
    def _tested_elsewhere(self) -> Self:
        if self.split == "test" and not self.split_file:
            raise ValueError("split = 'test' leaves nothing to train on; name the data set in test_dataset of another run instead")
        if self.dataset in self.test_dataset:
            raise ValueError(f"test_dataset names {self.dataset!r}, which is trained on; its own test cases are scored anyway")
        names = [Path(name).name for name in (self.dataset, *self.test_dataset)]
        if len(set(names)) < len(names):
            raise ValueError(f"test_dataset: two data sets are called {max(names, key=names.count)!r}, so no table could tell them apart; rename a folder")
        return self

    def hashed(self) -> dict[str, Any]:
        """What is tested on does not change what is trained; weight files count with their content, and not at all where there are none."""
        files = {name: content_of(getattr(self, name)) for name in ("encoder_weights", "teacher_checkpoint") if getattr(self, name)}
        return {name: value for name, value in super().hashed().items() if name not in ("test_dataset", "encoder_weights", "teacher_checkpoint")} | files


class GraphConfig(TeacherConfig, EdgeConfig):
    """Frozen teacher -> fitted, frozen graph module (stage `graph`, step S4)."""

    stage = "graph"
    states: int = Field(16, ge=1, le=256, description="state channels s of the graph")
    anchors: Literal["masked_mean", "masked_cosine", "eagr"] = Field("masked_mean", description="node's anchor: mean of edge pixels, normalized (ours), EAGR's")
    normalize: Literal["mass", "none", "size"] = Field("mass", description="nodes divided by their mass, not at all, or by H x W (EAGR)")
    graph: Literal["frozen", "joint", "relation"] = Field(
        "frozen", description="fitted on the teacher and frozen (ours); learned along with the student (EAGR); or no graph, cosines between cells' means (ours)"
    )
    teacher_bn: Literal["eval", "batch"] = Field("eval", description="statistics of the frozen teacher's BatchNorms: running, or of the batch as in overhaul")
    weak_teacher: Literal["refuse", "allow"] = Field(
        "refuse", description="a teacher no better on validation cases than one fixed mask for every image: refuse it, or allow it"
    )
    graph_epochs: int = Field(3, ge=1, description="passes over the training cases, fitting the graph on the teacher")
    graph_lr: float = Field(1e-2, gt=0, description="Adam's learning rate, fitting the graph")

    @model_validator(mode="after")
    def _eagr_has_its_own_grid(self) -> Self:
        if self.anchors == "eagr" and self.grid_frame == "lesion":
            raise ValueError("anchors = 'eagr' pools over the image, so grid_frame must be 'image'")
        if self.anchors != "masked_mean" and self.graph == "relation":
            raise ValueError(f"anchors = {self.anchors!r}: graph = 'relation' has masked means only")
        return self


TERM_FIELDS = {
    "feat": ("w_feat", "feature_levels", "level_weights", "margin", "connector_warmup"),
    "edge": ("w_edge", "shuffle_edges", *(n for n in GraphConfig.model_fields if n not in (*TeacherConfig.model_fields, "teacher_bn", "weak_teacher"))),
    "kd": ("w_kd", "kd_temperature"),
    "fitnets": ("w_fitnets", "fitnets_levels"),
    "at": ("w_at", "at_levels"),
    "cwd": ("w_cwd", "cwd_temperature"),
    "dist": ("w_dist", "dist_temperature"),
}
"""Fields that matter only where their loss term is in `terms`."""


def idle_fields(terms: Collection[str]) -> set[str]:
    """Fields that change nothing in a student trained with these terms."""
    idle = {name for term, names in TERM_FIELDS.items() if term not in terms for name in names}
    if not {"feat", "edge", "fitnets"} & set(terms):
        idle.add("connector_lr")
    if not terms:  # no teacher looks on
        idle |= {name for name in GraphConfig.model_fields if name.startswith("teacher")} | {"encoder_weights"}
    return idle


class DistillConfig(GraphConfig):
    """Frozen teacher and graph -> trained student (stage `distill`, steps S2 to S6)."""

    stage = "distill"
    version = 2
    seed_field = "seed"
    terms: Names = Field(("feat", "edge"), description="losses beside BCE, comma-separated: feat, edge; rivals kd, fitnets, at, cwd, dist; empty trains alone")
    seed: Seed = Field(0, description="seed of the student's initialization and batch order")
    width: int = Field(4, ge=1, le=64, description="channels of the student's first block; 4 is the paper's")
    stem: Literal[1, 2, 4] = Field(1, description="1 is the paper's student; 2 or 4 read and write blocks of as many px, which is faster on phones")
    epochs: int = Field(10, ge=1, description="passes over the training cases, student")
    lr: float = Field(5e-3, gt=0, description="peak learning rate of the one-cycle schedule, student and connectors")
    connector_lr: float = Field(1.0, gt=0, allow_inf_nan=False, description="learning rate of what is thrown away after training, as a multiple of lr")
    w_seg: Weight = Field(1.0, description="weight of L_seg (step S6)")
    w_feat: Weight = Field(10.0, description="weight of L_feat (step S6)")
    w_edge: Weight = Field(1.0, description="weight of L_edge (step S6)")
    feature_levels: Levels = Field(
        ("decoder.stride8", "decoder.stride4", "decoder.stride2"),
        description="Feats (S3): 'a' is both networks' map a, 'a:b' the student's a, the teacher's b",
    )
    level_weights: Literal["mean", "area", "halving"] = Field("mean", description="sum over levels: mean or by area (ours), or halving (Heo et al. 2019)")
    margin: Literal["bn", "empirical"] = Field("bn", description="margin ReLU: of the BatchNorm (Heo et al. 2019), or the mean negative response (ours)")
    connector_warmup: int = Field(0, ge=0, description="first epochs in which L_feat trains its connectors alone (overhaul's code holds the student still)")
    shuffle_edges: bool = Field(False, description="control: every case gets the edge label of another case")

    w_kd: Weight = Field(10.0, description="weight of logit distillation (Hinton et al. 2015)")
    kd_temperature: float = Field(4.0, ge=1, le=100, description="temperature of logit distillation; 2.5 to 4 for small students (Hinton et al. 2015)")
    w_fitnets: Weight = Field(0.1, description="weight of the hint (FitNets, Romero et al. 2015)")
    fitnets_levels: Levels = Field(("encoder.stride16",), description="maps that give the hint, as in feature_levels")
    w_at: Weight = Field(30.0, description="weight of attention transfer; 1000 in the authors' code (Zagoruyko & Komodakis 2017)")
    at_levels: Levels = Field(("encoder.stride4", "encoder.stride8", "encoder.stride16"), description="maps whose attention is copied, as in feature_levels")
    w_cwd: Weight = Field(1.0, description="weight of channel-wise distillation of the logits; 3 in the authors' code (CWD, Shu et al. 2021)")
    cwd_temperature: float = Field(4.0, gt=0, le=100, description="temperature of the distribution over pixels; 4 in the authors' code (CWD)")
    w_dist: Weight = Field(3.0, description="weight of the intra-class relation; 1 in the authors' segmentation code (DIST, Huang et al. 2022)")
    dist_temperature: float = Field(1.0, gt=0, le=100, description="temperature of the probabilities; 1 in the authors' segmentation code (DIST)")

    @model_validator(mode="after")
    def _known_terms(self) -> Self:
        for term in self.terms:
            if term not in TERM_FIELDS:
                raise ValueError(f"terms names {term!r}: {nearest(term, TERM_FIELDS)}")
        if "feat" in self.terms and self.connector_warmup >= self.epochs:
            raise ValueError(f"connector_warmup = {self.connector_warmup}: L_feat would never reach the student in {self.epochs} epochs; make it smaller")
        return self

    def hashed(self) -> dict[str, Any]:
        """Fields of absent terms do not count, so arms of other weights share the student alone."""
        idle = idle_fields(self.terms)
        return {name: value for name, value in super().hashed().items() if name not in idle} | {"terms": sorted(self.terms)}


ARMS: dict[str, dict[str, Any]] = {
    "alone": {"terms": (), "shuffle_edges": False},
    "feat": {"terms": ("feat",), "shuffle_edges": False},
    "edge": {"terms": ("edge",), "shuffle_edges": False},
    "method": {"terms": ("feat", "edge"), "shuffle_edges": False},
    "shuffled": {"terms": ("feat", "edge"), "shuffle_edges": True},
    "kd": {"terms": ("kd",), "shuffle_edges": False},
    "fitnets": {"terms": ("fitnets",), "shuffle_edges": False},
    "at": {"terms": ("at",), "shuffle_edges": False},
    "cwd": {"terms": ("cwd",), "shuffle_edges": False},
    "dist": {"terms": ("dist",), "shuffle_edges": False},
    "method_kd": {"terms": ("feat", "edge", "kd"), "shuffle_edges": False},
}
"""Arms of the ablation, in the order of METHOD.md: what each sets in `DistillConfig`; `method_kd` is the sum with the best-known rival."""
STUDY_ARMS = ("alone", "feat", "edge", "method", "shuffled", "kd", "cwd", "dist")
"""Arms that are trained where none are named."""


class AblationConfig(DistillConfig):
    """Every arm and seed, scored on the same cases (stage `ablation`)."""

    stage = "ablation"
    version = 2
    arms: Names = Field(STUDY_ARMS, min_length=1, description="arms, comma-separated; fitnets, at and method_kd are there too")
    seeds: Seeds = Field((0,), description="an integer n means seeds 0 to n - 1; a string lists them")

    @model_validator(mode="before")
    @classmethod
    def _arms_decide(cls, values: dict[str, Any]) -> dict[str, Any]:
        if given := {"seed", "terms", "shuffle_edges"} & {name for name, value in values.items() if value is not None}:
            raise ValueError(f"{', '.join(sorted(given))}: the arms and seeds of an ablation decide this; give arms and seeds instead")
        return values

    def hashed(self) -> dict[str, Any]:
        """Everything but what the arms decide, and the data sets that are scored."""
        decided = {"seed", "terms", "shuffle_edges"}
        return {n: v for n, v in TeacherConfig.hashed(self).items() if n not in decided} | {"test_dataset": list(self.test_dataset)}

    @model_validator(mode="after")
    def _known_arms(self) -> Self:
        for arm in self.arms:
            if arm not in ARMS:
                raise ValueError(f"arms names {arm!r}: {nearest(arm, ARMS)}")
        return self

    def arm(self, name: str, seed: int) -> DistillConfig:
        """The configuration of one arm with one seed."""
        return DistillConfig(**{n: getattr(self, n) for n in DistillConfig.model_fields} | ARMS[name] | {"seed": seed})
