"""Options: strict, with the nearest name; profiles; what counts in the hash; arms and seeds."""

import os
from pathlib import Path

import pytest

from lesionkd_core.config import (
    LEVELS,
    PROFILES,
    AblationConfig,
    ConfigError,
    DistillConfig,
    ExternalConfig,
    GraphConfig,
    PrepareConfig,
    Role,
    TeacherConfig,
)
from lesionkd_core.export import ExportConfig
from lesionkd_core.losses import TERMS, resolve
from lesionkd_core.pipeline import ARMS, arm_config, require_known

CHANGED = {  # every hashed option, with a value that is not the smoke profile's
    "pixels": 96,
    "cases": 7,
    "normals": "keep",
    "fit": "pad",
    "window": "40, 400",
    "lesion_values": "1, 3",
    "invert_masks": True,
    "split_seed": 1,
    "split": "random",
    "split_file": __file__,
    "folds": 5,
    "val_fraction": 0.1,
    "test_fraction": 0.3,
    "group_by": "number",
    "join_copies": False,
    "edge_width": 2,
    "edge_level": "encoder.stride16",
    "grid": 6,
    "teacher": "unet64",
    "teacher_seed": 1,
    "teacher_epochs": 3,
    "teacher_lr": 0.002,
    "batch_size": 4,
    "weight_decay": 0.0,
    "augment": "none",
    "seg_loss": "bce",
    "precision": "bf16-mixed",
    "encoder_weights": __file__,
    "teacher_checkpoint": __file__,
    "states": 8,
    "anchors": "masked_mean",
    "teacher_bn": "batch",
    "graph_epochs": 4,
    "losses": "kd",
    "seed": 1,
    "student": "tests.tiny:small_teacher",
    "width": 8,
    "epochs": 3,
    "lr": 0.001,
    "label_fraction": 0.5,
    "label_seed": 1,
    "connector_lr": 0.1,
    "levels": "patent",
    "level_weights": "halving",
    "margin": "empirical",
    "arms": "alone, method",
    "seeds": 2,
}
STAGES = [PrepareConfig, ExternalConfig, TeacherConfig, GraphConfig, DistillConfig, AblationConfig]


def counted(cfg):
    """Options whose change gives another digest."""
    return {
        name
        for name in set(type(cfg).model_fields) & set(CHANGED)
        if cfg.with_values(**{name: CHANGED[name]}).digest("u") != cfg.digest("u")
    }


# What counts in the hash --------------------------------------------------------------------------


def test_every_option_is_covered_here():
    fields = {name for stage in STAGES for name in stage.model_fields}
    assert fields - {"fold"} == set(CHANGED) | AblationConfig.options(Role.RUN)


@pytest.mark.parametrize("stage", [PrepareConfig, TeacherConfig, GraphConfig, DistillConfig])
def test_every_option_counts_but_those_of_device_and_place(stage):
    assert counted(stage()) == set(stage.model_fields) - stage.options(Role.RUN) - {"fold"}
    assert stage(folds=5, fold=2).digest("u") != stage(folds=5, fold=3).digest("u")


def test_device_place_and_name_of_the_data_do_not_count():
    values = {"profile": "paper", "device": "cpu", "threads": 3, "dataset": "elsewhere/busi"}
    usual = DistillConfig(label_fraction=1.0)
    kept = {name: getattr(usual, name) for name in PROFILES["smoke"]}
    other = DistillConfig(**kept, **values, weak_teacher="allow", test_dataset="ph2")
    assert other.digest("u") == usual.digest("u")


def test_options_that_are_not_used_do_not_count():
    one, other = DistillConfig(grid=4), DistillConfig(grid=8)
    assert one.digest("u", {"grid"}) == other.digest("u", {"grid"}) != one.digest("u")


def test_the_digest_follows_upstream_stage_and_version(monkeypatch):
    cfg = PrepareConfig()
    digests = {cfg.digest("u"), cfg.digest("v"), TeacherConfig().digest("u")}
    monkeypatch.setattr(PrepareConfig, "version", PrepareConfig.version + 1)
    assert len(digests | {cfg.digest("u")}) == 4


@pytest.mark.parametrize(
    ("stage", "option"), [(PrepareConfig, "split_file"), (TeacherConfig, "encoder_weights")]
)
def test_files_count_by_content_not_by_path(tmp_path, stage, option):
    for name, content in (("a", b"1"), ("b", b"1"), ("c", b"2")):
        (tmp_path / name).write_bytes(content)
    a, b, c = (stage(**{option: str(tmp_path / name)}).digest("u") for name in "abc")
    assert a == b != c and stage().digest("u") not in (a, c)


def test_an_export_counts_what_its_files_are_made_with():
    changed = {"formats": "onnx", "sizes": "64", "threshold": 0.4}
    beside = {"engines": "onnx", "run": "elsewhere"}
    beside |= {"profile": "cpu", "device": "cpu", "threads": 1}
    assert set(changed) | set(beside) == set(ExportConfig.model_fields)
    usual = ExportConfig().digest("u")
    assert all(ExportConfig(**{name: v}).digest("u") != usual for name, v in changed.items())
    assert all(ExportConfig(**{name: v}).digest("u") == usual for name, v in beside.items())


# Values -------------------------------------------------------------------------------------------


def test_a_given_value_goes_before_the_profile_and_none_is_not_given():
    cfg = TeacherConfig(profile="paper", pixels=128, batch_size=None)
    paper = PROFILES["paper"]
    assert (cfg.pixels, cfg.batch_size) == (128, paper["batch_size"])
    assert cfg.teacher_epochs == paper["teacher_epochs"]


@pytest.mark.parametrize("stage", [PrepareConfig, TeacherConfig, GraphConfig])
def test_upstream_keeps_exactly_what_concerns_the_stage(stage):
    values = CHANGED | {
        "profile": "cpu",
        "dataset": "busi",
        "encoder_weights": "",
        "teacher": "unet",
    }
    values |= {"folds": 0, "split": "groups"}
    own = {name: value for name, value in values.items() if name in DistillConfig.model_fields}
    kept = DistillConfig(**own).upstream(stage)
    assert kept == stage(**{n: v for n, v in own.items() if n in stage.model_fields})
    assert kept.upstream(stage) == kept


@pytest.mark.parametrize(("given", "seeds"), [(3, (0, 1, 2)), ("0, 7", (0, 7)), ("5", (5,))])
def test_seeds_are_counted_or_listed(given, seeds):
    assert AblationConfig(seeds=given).seeds == seeds


@pytest.mark.parametrize(
    ("text", "weights"),
    [
        ("", {}),
        ("feat", {"feat": None}),
        ("edge=0, feat=2.5", {"feat": 2.5, "edge": 0.0}),
        ({"kd": None, "seg": 2}, {"kd": None, "seg": 2.0}),
        (["feat=3", "edge"], {"feat": 3.0, "edge": None}),
    ],
)
def test_losses_name_terms_with_optional_weights(text, weights):
    assert DistillConfig(losses=text).losses == weights


def test_named_levels_are_lists_of_maps():
    assert DistillConfig(levels="patent").levels == LEVELS["patent"]
    pair = "encoder.stride2:decoder.stride2"
    assert DistillConfig(levels=f"decoder.stride8, {pair}").levels == ("decoder.stride8", pair)
    assert DistillConfig(edge_level="deep").edge_level == "encoder.stride16"


# Arms ---------------------------------------------------------------------------------------------


def test_arms_differ_in_their_losses_alone():
    cfg = AblationConfig(seeds="4, 7", width=8, losses="feat=3")
    expected = {
        "alone": {},
        "feat": {"feat": 3.0},
        "edge": {"edge": 0.1},
        "method": {"feat": 3.0, "edge": 0.1},
        "shuffled": {"feat": 3.0, "edge_shuffled": 0.1},
        "kd": {"kd": 3.0},
        "cwd": {"cwd": 0.3},
        "dist": {"dist": 1.0},
    }
    assert cfg.arms == tuple(expected)
    for name, losses in expected.items():
        arm = arm_config(cfg, name, 7)
        assert (arm.losses, arm.seed, arm.width) == ({"seg": 1.0} | losses, 7, 8)


def test_every_loss_term_is_an_arm_and_an_arm_can_be_longer():
    names = [name for name in TERMS if name not in ("seg", *ARMS)]
    cfg = AblationConfig(arms=names, epochs=7)
    assert all(arm_config(cfg, name, 0).terms == (name,) for name in names)
    assert resolve(arm_config(cfg, "method*3", 0).losses) == arm_config(cfg, "method", 0).losses
    assert arm_config(cfg, "method*3", 0).epochs == 21
    both = arm_config(AblationConfig(losses="kd=2, feat=9"), "feat=0.5+kd", 0)
    assert both.losses == {"seg": 1.0, "feat": 0.5, "kd": 2.0}


@pytest.mark.parametrize(
    ("losses", "weight"), [("edge=3", 3.0), ("", 0.1), ("edge=3, edge_shuffled=2", 2.0)]
)
def test_the_control_of_the_edges_has_their_weight(losses, weight):
    """So that it differs from the method in the edges alone."""
    arm = arm_config(AblationConfig(losses=losses), "shuffled", 0)
    assert arm.losses["edge_shuffled"] == weight


@pytest.mark.fault
def test_a_control_of_another_weight_is_refused():
    cfg = AblationConfig(arms="feat+edge=3, shuffled")
    with pytest.raises(ConfigError, match="edge_shuffled = 0.1 .* edge = 3 .* edge_shuffled=3$"):
        require_known(cfg)
    require_known(cfg.with_values(arms="feat+edge=3, feat+edge_shuffled=3"))
    require_known(cfg.with_values(losses="edge=3", arms="method, shuffled"))


@pytest.mark.fault
@pytest.mark.parametrize(
    "cfg",
    [DistillConfig(losses="pseudo", profile="cpu"), AblationConfig(arms="pseudo", profile="cpu")],
)
def test_pseudo_labels_need_images_without_masks(cfg):
    with pytest.raises(ConfigError, match="give unlabelled = FOLDER, or label_fraction below 1"):
        require_known(cfg)
    require_known(cfg.with_values(label_fraction=0.5))
    require_known(cfg.with_values(unlabelled="folder"))


@pytest.mark.fault
@pytest.mark.parametrize(
    ("arm", "words"),
    [("metod", "did you mean 'method'"), ("seg", "did you mean"), ("alone*0", "how many times")],
)
def test_an_arm_that_does_not_exist_is_refused(arm, words):
    with pytest.raises(ConfigError, match=words):
        arm_config(AblationConfig(), arm, 0)


# Refused ------------------------------------------------------------------------------------------

WRONG = [  # options, words of the message
    ({"sede": 1}, ["unknown parameter 'sede'", "did you mean 'seed'?"]),
    ({"pixels": "64"}, ["pixels = '64'", "integer", "px"]),
    ({"pixels": 100}, ["pixels = 100", "multiple of 32"]),
    ({"val_fraction": 0.5}, ["val_fraction = 0.5", "less than 0.5"]),
    ({"lr": float("nan")}, ["lr = nan"]),
    ({"losses": "feat, feat"}, ["losses", "twice"]),
    ({"losses": "feat=-1"}, ["'feat' is -1.0", "0 or more"]),
    ({"levels": "decoder.stride3"}, ["levels", "decoder.stride3"]),
    ({"arms": "method, method"}, ["arms", "twice"]),
    ({"seeds": 4000}, ["seeds", "give the string '4000'"]),
    ({"seeds": 1, "seed": 7}, ["option seeds instead"]),
    ({"sede": 1, "pixels": 7, "epochs": 0}, ["'sede'", "pixels = 7", "epochs = 0"]),
]


@pytest.mark.fault
@pytest.mark.parametrize(("values", "words"), WRONG, ids=[str(values) for values, _ in WRONG])
def test_a_wrong_option_is_refused_with_its_name_and_what_fits(values, words):
    stage = AblationConfig if {"arms", "seeds"} & set(values) else DistillConfig
    with pytest.raises(ConfigError) as error:
        stage(**values)
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.fault
@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"encoder_weights": "x", "teacher": "unet64"}, "need teacher = 'resnet34_unet'"),
        ({"encoder_weights": "x", "teacher_checkpoint": "y"}, "give one of the two"),
        ({"split": "test"}, "leaves no training cases"),
        ({"dataset": "busi", "test_dataset": "busi"}, "names 'busi', the training data"),
        ({"encoder_weights": "/nowhere/resnet34.pth"}, "cannot read '/nowhere/resnet34.pth'"),
    ],
)
def test_options_that_contradict_each_other_are_refused(values, words):
    with pytest.raises(ConfigError, match=words):
        DistillConfig(**values).digest("u")


# Notebooks ----------------------------------------------------------------------------------------


@pytest.mark.fault
@pytest.mark.parametrize(
    ("bound", "words"),
    [
        ({"sede": 1}, "did you mean 'seed'"),
        ({"seed": "1"}, "seed = '1'"),
        ({"epochs": [3]}, r"epochs = \[3\]"),
    ],
)
def test_a_wrong_parameter_of_a_notebook_is_refused(bound, words):
    others = {"__name__": "__main__", "In": [""], "os": os, "Path": Path, "len": len, "width": 2}
    assert DistillConfig.from_notebook(dict(others)).width == 2
    with pytest.raises(ConfigError, match=words):
        DistillConfig.from_notebook(others | bound)


def test_parameters_of_a_notebook_can_be_read_again_after_other_names_were_bound():
    namespace = {"__name__": "__main__", "_": 1, "Out": {}, "os": os, "seed": 3, "width": None}
    assert DistillConfig.from_notebook(namespace).seed == 3
    namespace |= {"cfg": 1, "data": "x", "seed": 4}
    cfg = DistillConfig.from_notebook(namespace)
    assert (cfg.seed, cfg.width) == (4, 4)
    with pytest.raises(ConfigError, match="seed = 'x'"):
        DistillConfig.from_notebook(namespace | {"seed": "x"})


def test_a_network_of_ones_own_counts_with_its_code(tmp_path, monkeypatch):
    """The file may have been edited since a result was made."""
    monkeypatch.syspath_prepend(tmp_path)
    file, cfg = tmp_path / "networks_of_mine.py", DistillConfig(student="networks_of_mine:tiny")
    with pytest.raises(ConfigError, match="No module named 'networks_of_mine'"):
        cfg.digest("")
    file.write_text("tiny = 1")
    first = cfg.digest("")
    file.write_text("tiny = 2")
    assert cfg.digest("") != first
