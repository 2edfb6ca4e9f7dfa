"""Names, digests and files of results: what changes the address, what comes back as it was written."""

import os
import pickle
import re
from contextlib import contextmanager

import numpy as np
import pandas as pd
import pytest
import torch

from lesionkd_core import inference, store
from lesionkd_core.config import PROFILES, AblationConfig, DistillConfig, EdgeConfig, ExportConfig, GraphConfig, LesionKDError, PrepareConfig, TeacherConfig

NOWHERE = {"profile": "paper", "device": "cpu", "threads": 3, "dataset": "elsewhere/busi", "deterministic": True, "weak_teacher": "allow"}
CHANGED = {  # every other parameter, with a value that is not the smoke profile's
    "pixels": 96, "cases": 7, "normals": "keep", "difficulty": 0.7, "split_seed": 1, "val_fraction": 0.1, "test_fraction": 0.3, "duplicate_bits": 0,
    "fit": "pad", "colour": "grey", "clahe": 0.01, "gamma": 0.8, "window": "40, 400", "split": "random", "split_file": __file__, "folds": 5,
    "edge_width": 2, "edge_level": "encoder.stride16", "grid": 6, "grid_frame": "lesion",
    "teacher": "unet64", "teacher_seed": 1, "teacher_epochs": 3, "teacher_lr": 0.002, "batch_size": 4,
    "weight_decay": 0.0, "clip_grad": 1.0, "augment": "none", "precision": "bf16-mixed", "test_dataset": ("ph2",),
    "states": 8, "anchors": "masked_cosine", "normalize": "size", "graph_epochs": 4, "graph_lr": 0.02,
    "terms": (), "seed": 1, "width": 8, "stem": 2, "epochs": 3, "lr": 0.001, "w_seg": 2.0, "w_feat": 2.0, "w_edge": 2.0,
    "feature_levels": ("decoder.stride8",), "level_weights": "area", "shuffle_edges": True, "connector_lr": 0.1, "connector_warmup": 1,
    "encoder_weights": __file__, "teacher_checkpoint": __file__, "graph": "joint", "teacher_bn": "batch", "margin": "empirical",
    "w_kd": 2.0, "kd_temperature": 2.0, "w_fitnets": 2.0, "fitnets_levels": ("decoder.stride8",), "w_at": 2.0, "at_levels": ("decoder.stride8",),
    "w_cwd": 2.0, "cwd_temperature": 2.0, "w_dist": 2.0, "dist_temperature": 2.0,
    "arms": ("alone", "method"), "seeds": (0, 1),
}
BY_ARMS = {"seed", "terms", "shuffle_edges"}  # the arms of an ablation decide these
OF_FEAT = {"w_feat", "feature_levels", "level_weights", "margin", "connector_warmup"}
OF_EDGE = {
    "w_edge", "shuffle_edges", "edge_width", "edge_level", "grid", "grid_frame", "states", "anchors", "normalize", "graph", "graph_epochs", "graph_lr",
}
OF_RIVALS = {
    "w_kd", "kd_temperature", "w_fitnets", "fitnets_levels", "w_at", "at_levels", "w_cwd", "cwd_temperature", "w_dist", "dist_temperature",
}
OF_TEACHER = {"teacher", "teacher_seed", "teacher_epochs", "teacher_lr", "teacher_bn", "teacher_checkpoint", "encoder_weights"}
OF_SCORES = {"test_dataset"}  # counts where scores are collected, not where a network is trained


def with_change(cfg, name, value):
    kept = {n: v for n, v in cfg if not (isinstance(cfg, AblationConfig) and n in BY_ARMS)}
    return type(cfg)(**kept | {name: value})


def that_count(cfg):
    """Parameters whose change gives another digest."""
    changed = {**CHANGED, **NOWHERE}
    changed["terms"] = ("edge",) if getattr(cfg, "terms", ()) == ("feat",) else ("feat",)
    names = set(type(cfg).model_fields) - {"fold"} - (BY_ARMS if isinstance(cfg, AblationConfig) else set())
    return {name for name in names if with_change(cfg, name, changed[name]).digest("u") != cfg.digest("u")}


def test_the_folder_is_named_by_data_profile_seed_and_digest():
    path = store.folder(PrepareConfig(split_seed=7), "upstream")
    assert path.parent == store.runs_root() / "prepare"
    assert re.fullmatch(r"phantom-dermoscopy-smoke-s7-[0-9a-f]{8}", path.name)
    assert path.name.endswith(PrepareConfig(split_seed=7).digest("upstream")[:8])


@pytest.mark.parametrize(
    ("cfg", "start"),
    [
        (TeacherConfig(teacher_seed=3, profile="cpu", dataset="busi"), "teacher/busi-cpu-s3-"),
        (GraphConfig(teacher_seed=4, split_seed=9), "graph/phantom-dermoscopy-smoke-s4-"),
        (DistillConfig(seed=5, teacher_seed=9), "distill/phantom-dermoscopy-smoke-s5-"),
        (PrepareConfig(dataset="/data/my scans (v2)/"), "prepare/my_scans_v2_-smoke-s0-"),
        (PrepareConfig(dataset="../läsionen"), "prepare/l_sionen-smoke-s0-"),
    ],
)
def test_each_stage_shows_its_own_seed_and_a_plain_name(cfg, start):
    assert store.short(store.folder(cfg, "u")).startswith(f"runs/{start}")


@pytest.mark.parametrize("stage", [PrepareConfig, TeacherConfig, GraphConfig, AblationConfig])
def test_every_parameter_counts_but_where_it_ran_and_where_the_data_lay(stage):
    decided = BY_ARMS if stage is AblationConfig else set()
    idle = OF_SCORES if stage is not AblationConfig else set()
    assert that_count(stage()) == set(stage.model_fields) - set(NOWHERE) - decided - idle - {"fold"}
    assert stage(folds=5, fold=2).digest("u") != stage(folds=5, fold=3).digest("u")


def test_an_export_counts_what_its_files_are_made_with_and_not_what_is_measured_beside_them():
    changed = {"formats": "onnx", "sizes": "64", "threshold": 0.4, "logits": True, "calibration": 8}
    beside = {"engines": "onnx", "cost_pixels": 64, "repeats": 1, "run": "elsewhere", "profile": "cpu", "device": "cpu", "threads": 1}
    assert set(changed) | set(beside) == set(ExportConfig.model_fields), "every parameter is one of the two"
    assert all(ExportConfig(**{name: value}).digest("u") != ExportConfig().digest("u") for name, value in changed.items())
    assert all(ExportConfig(**{name: value}).digest("u") == ExportConfig().digest("u") for name, value in beside.items())


def test_a_split_file_counts_by_content_wherever_it_lies(tmp_path):
    for name, text in (("a.csv", "id,split\n"), ("b.csv", "id,split\n"), ("c.csv", "id,split\n1,val\n")):
        (tmp_path / name).write_text(text)
    a, b, c = (PrepareConfig(split_file=str(tmp_path / f"{name}.csv")).digest("u") for name in "abc")
    assert a == b != c


@pytest.mark.parametrize(
    ("terms", "idle"),
    [("feat, edge", set()), ("feat", OF_EDGE), ("edge", OF_FEAT), ("", OF_EDGE | OF_FEAT | OF_TEACHER | {"connector_lr"})],
    ids=["method", "feat", "edge", "alone"],
)
def test_parameters_of_absent_terms_do_not_count(terms, idle):
    assert that_count(DistillConfig(terms=terms)) == set(DistillConfig.model_fields) - set(NOWHERE) - idle - OF_RIVALS - OF_SCORES - {"fold"}


def test_the_order_of_terms_does_not_count():
    assert DistillConfig(terms="edge, feat").digest("u") == DistillConfig(terms="feat, edge").digest("u")


def test_the_digest_follows_upstream_stage_and_version(monkeypatch):
    cfg = PrepareConfig()
    digests = {cfg.digest("u"), cfg.digest("v"), TeacherConfig().digest("u")}
    monkeypatch.setattr(PrepareConfig, "version", PrepareConfig.version + 1)
    assert len(digests | {cfg.digest("u")}) == 4


def test_a_value_given_by_name_goes_before_the_profile():
    cfg = TeacherConfig(profile="paper", pixels=128, batch_size=None)
    assert (cfg.pixels, cfg.batch_size, cfg.teacher_epochs) == (128, PROFILES["paper"]["batch_size"], PROFILES["paper"]["teacher_epochs"])


@pytest.mark.parametrize("stage", [PrepareConfig, EdgeConfig, TeacherConfig, GraphConfig, DistillConfig])
def test_upstream_hands_on_exactly_what_concerns_the_stage(stage):
    values = {**CHANGED, "profile": "cpu", "dataset": "busi", "terms": ("edge",), "folds": 0, "encoder_weights": ""}
    handed = DistillConfig(**{name: value for name, value in values.items() if name in DistillConfig.model_fields}).upstream(stage)
    assert handed == stage(**{name: value for name, value in values.items() if name in stage.model_fields})
    assert handed.upstream(stage) == handed


def test_arms_differ_in_terms_alone():
    cfg = AblationConfig(seeds="4, 7", width=8)
    both = ("feat", "edge")
    expected = {"alone": ((), False), "feat": (("feat",), False), "edge": (("edge",), False), "method": (both, False), "shuffled": (both, True)}
    expected |= {rival: ((rival,), False) for rival in ("kd", "cwd", "dist")}
    for name in cfg.arms:
        arm = cfg.arm(name, 7)
        assert (arm.terms, arm.shuffle_edges, arm.seed, arm.width) == (*expected[name], 7, 8)
    assert cfg.arms == tuple(expected) and cfg.seeds == (4, 7)


@pytest.mark.parametrize(("given", "seeds"), [(3, (0, 1, 2)), (1, (0,)), ("0, 7", (0, 7)), ("5", (5,)), ([2, 4], (2, 4))])
def test_seeds_are_counted_or_listed(given, seeds):
    assert AblationConfig(seeds=given).seeds == seeds


def test_a_table_comes_back_as_it_was_written(tmp_path):
    rng = np.random.default_rng(0)
    table = pd.DataFrame({
        "id": ["001", "nan", "NA", "1e5", "läsion, links", 'say "ah"'], "group": ["", "g0000", "", "007", "None", "x"], "split": ["train"] * 6,
        "label": [""] * 6, "dice": rng.random(6).astype(np.float32), "hd95": [0.0, 1e-12, np.nan, 181.01933598375618, -3.5, 1e9], "missed": [0, 1, 0, 0, 1, 2],
    })
    store.write_table(tmp_path / "t.csv", table)
    back = store.read_table(tmp_path / "t.csv")
    assert list(back.columns) == list(table.columns)
    for name in ("id", "group", "split", "label"):
        assert back[name].tolist() == table[name].tolist()
    assert np.array_equal(back["dice"].astype(np.float32), table["dice"])  # float32 to the bit
    assert np.allclose(back["hd95"], table["hd95"], rtol=1e-8, equal_nan=True)
    assert back["missed"].dtype == np.int64 and back["missed"].tolist() == [0, 1, 0, 0, 1, 2]


def test_json_arrays_and_tensors_come_back_as_they_were_written(tmp_path):
    content = {"a": [1, 2.5, None, "ä"], "b": {"c": True}}
    store.write_json(tmp_path / "x.json", content)
    store.write_array(tmp_path / "x.npy", np.arange(6).reshape(2, 3))
    store.write_checkpoint(tmp_path / "x", {"network": {"w": torch.arange(3)}, "epoch": 2})
    assert store.read_json(tmp_path / "x.json") == content
    assert np.array_equal(np.load(tmp_path / "x.npy"), [[0, 1, 2], [3, 4, 5]])
    saved = store.read_checkpoint(tmp_path / "x")
    assert saved["network"]["w"].tolist() == [0, 1, 2] and saved["epoch"] == 2


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt, OSError])
def test_a_write_that_fails_leaves_the_old_content_and_nothing_else(tmp_path, failure):
    store.write_text(tmp_path / "x", "old")

    def write():
        with store.replacing(tmp_path / "x") as partial:
            partial.write_text("half of the n")
            raise failure

    with pytest.raises(LesionKDError if failure is OSError else failure):
        write()
    assert (tmp_path / "x").read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["x"]


def test_a_folder_begun_anew_is_emptied_and_one_that_is_kept_is_not(tmp_path):
    cfg = PrepareConfig()
    for keep, left in ((True, {"old", "config.json", "env.json"}), (False, {"config.json", "env.json"})):
        store.write_text(tmp_path / "run" / "old", "")
        store.begin(tmp_path / "run", cfg, "u", keep=keep)
        assert {p.name for p in (tmp_path / "run").iterdir()} == left and not store.is_done(tmp_path / "run")
    assert store.Result(tmp_path / "run").digest == cfg.digest("u")
    store.finish(tmp_path / "run")
    assert store.is_done(tmp_path / "run")


@contextmanager
def full_disk(room):
    """The kernel lets no file grow beyond `room` bytes."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


WRITERS = {
    "text": lambda path: store.write_text(path, "x" * 50_000),
    "json": lambda path: store.write_json(path, ["x"] * 10_000),
    "table": lambda path: store.write_table(path, pd.DataFrame({"a": range(20_000)})),
    "array": lambda path: store.write_array(path, np.zeros(10_000)),
    "checkpoint": lambda path: store.write_checkpoint(path, {"network": torch.zeros(10_000)}),
    "picture": lambda path: inference._save(path, np.random.default_rng(0).integers(0, 256, (200, 200), dtype=np.uint8)),
}


@pytest.mark.fault
@pytest.mark.parametrize("kind", WRITERS)
def test_a_full_disk_is_named_and_leaves_the_old_content(tmp_path, kind):
    store.write_text(tmp_path / "kept", "old")
    with full_disk(4096), pytest.raises(LesionKDError, match=r"cannot write .*kept.*space"):
        WRITERS[kind](tmp_path / "kept")
    assert (tmp_path / "kept").read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["kept"]


@pytest.mark.fault
def test_what_the_disk_did_not_take_is_not_taken_for_written(tmp_path, monkeypatch):
    def no_space(_):
        raise OSError(28, "No space left on device")

    store.write_text(tmp_path / "kept", "old")
    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(LesionKDError, match="kept: No space left on device"):
        store.write_text(tmp_path / "kept", "new")
    assert (tmp_path / "kept").read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["kept"]


class Code:
    """Unpickled, it makes a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.fault
@pytest.mark.parametrize("dump", [lambda content, path: path.write_bytes(pickle.dumps(content, 2)), torch.save], ids=["pickle", "torch"])
def test_a_checkpoint_with_code_in_it_is_refused_and_the_code_not_run(tmp_path, dump):
    dump({"network": Code(tmp_path / "ran")}, tmp_path / "checkpoint_best")
    with pytest.raises(LesionKDError, match="checkpoint_best is no checkpoint that can be trusted"):
        store.read_checkpoint(tmp_path / "checkpoint_best")
    assert not (tmp_path / "ran").exists()


@pytest.mark.fault
@pytest.mark.parametrize("content", [b"", b"hello", b"\x80\x02.", b"PK\x03\x04", b"\xc4\xe9 latin", "half"])
def test_a_damaged_checkpoint_is_refused(tmp_path, content):
    store.write_checkpoint(tmp_path / "c", {"network": torch.zeros(1000)})
    (tmp_path / "c").write_bytes((tmp_path / "c").read_bytes()[:900] if content == "half" else content)
    with pytest.raises(LesionKDError, match="is no checkpoint"):
        store.read_checkpoint(tmp_path / "c")
