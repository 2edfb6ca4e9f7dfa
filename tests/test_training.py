"""One loop: lockstep equals alone, a resumed run equals an undisturbed one, batches are a function of seed and epoch."""

import os
import re
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lesionkd_core import store
from lesionkd_core.batches import MEAN, STD, epoch_batches, epoch_order, normalize
from lesionkd_core.config import ARMS, AblationConfig, DistillConfig, LesionKDError
from lesionkd_core.evaluation import fixed_mask_dice
from lesionkd_core.inference import build, load_network, load_student, predict
from lesionkd_core.losses import TERMS
from lesionkd_core.prepare import prepare_data
from lesionkd_core.stages import ablate, distill, distill_arms, fit_graph, train_teacher
from lesionkd_core.training import Learner, TrainingDiverged, gradients, start_fabric

TINY = {
    "dataset": "phantom-ct", "pixels": 32, "cases": 40, "batch_size": 6,
    "teacher_epochs": 2, "graph_epochs": 1, "epochs": 2, "threads": 1, "device": "cpu", "weak_teacher": "allow",
}


def silent(*_):
    pass


@pytest.fixture(autouse=True)
def fresh(tmp_path_factory, monkeypatch, shared_runs):
    monkeypatch.setenv("LESIONKD_RUNS", str(shared_runs))


@pytest.fixture(scope="module")
def shared_runs(tmp_path_factory):
    return tmp_path_factory.mktemp("training")


def weights(run) -> dict[str, torch.Tensor]:
    return store.read_checkpoint(run.path / "checkpoint_last")["objective"]


def remake(monkeypatch, tmp_path, cfgs):
    """The same students once more, in an empty place, upstream results copied."""
    for stage in ("prepare", "teacher", "graph"):
        shutil.copytree(store.runs_root() / stage, tmp_path / stage, copy_function=os.link)  # nothing is written in place
    monkeypatch.setenv("LESIONKD_RUNS", str(tmp_path))
    return distill_arms(cfgs, silent)


@pytest.mark.parametrize(("precision", "names"), [("32-true", tuple(ARMS)), ("bf16-mixed", ("alone", "method", "dist"))])
def test_lockstep_equals_alone_to_the_bit(precision, names, monkeypatch, tmp_path):
    cfg = AblationConfig(**TINY, precision=precision)
    arms = [cfg.arm(arm, 1) for arm in names]
    together = [weights(run) for run in distill_arms(arms, silent)]
    for i, (arm, expected) in enumerate(zip(arms, together)):
        [run] = remake(monkeypatch, tmp_path / str(i), [arm])
        got = weights(run)
        assert got.keys() == expected.keys()
        assert all(torch.equal(got[k], expected[k]) for k in expected)


def test_an_interrupted_run_goes_on_to_the_same_numbers(monkeypatch, tmp_path):
    cfg = DistillConfig(**TINY, seed=2)
    undisturbed = distill(cfg, silent)
    kept, saved = store.write_checkpoint, []

    def killed_in_epoch_two(path, content):
        if path.name == "checkpoint_last" and len(saved) == 1:
            raise KeyboardInterrupt
        saved.extend([path] if path.name == "checkpoint_last" else [])
        kept(path, content)

    monkeypatch.setattr(store, "write_checkpoint", killed_in_epoch_two)
    with pytest.raises(KeyboardInterrupt):
        remake(monkeypatch, tmp_path, [cfg])
    assert not any(tmp_path.glob("distill/*/DONE"))
    monkeypatch.setattr(store, "write_checkpoint", kept)
    resumed = distill(cfg, silent)
    assert resumed.path != undisturbed.path
    assert (resumed.path / "per_case.csv").read_bytes() == (undisturbed.path / "per_case.csv").read_bytes()
    assert (resumed.path / "history.csv").read_bytes() == (undisturbed.path / "history.csv").read_bytes()


def test_a_finished_run_is_found_and_another_seed_reuses_the_teacher():
    first = distill(DistillConfig(**TINY, seed=2), silent)
    before = {p: p.stat().st_mtime_ns for p in store.runs_root().rglob("*") if p.is_file() and p.suffix != ".lock"}
    teachers = list((store.runs_root() / "teacher").glob("*/DONE"))
    assert distill(DistillConfig(**TINY, seed=2), silent).path == first.path
    distill(DistillConfig(**TINY, seed=3), silent)
    after = {p: p.stat().st_mtime_ns for p in before}
    assert before == after
    assert list((store.runs_root() / "teacher").glob("*/DONE")) == teachers


def test_every_run_folder_holds_what_design_says():
    run = distill(DistillConfig(**TINY, seed=2), silent)
    expected = {"config.json", "env.json", "history.csv", "per_case.csv", "summary.json", "checkpoint_last", "checkpoint_best", "DONE"}
    assert expected <= {p.name for p in run.path.iterdir()}
    prepared = prepare_data(DistillConfig(**TINY), silent)
    assert set(run.per_case["id"]) == set(prepared.cases["id"].iloc[np.r_[prepared.index("val"), prepared.index("test")]])
    columns = {"loss_total", "loss_seg", "loss_feat", "loss_edge", "grad_seg", "grad_feat", "grad_edge", "val_dice", "lr"}
    assert columns <= set(run.history) and len(run.history) == TINY["epochs"]
    assert run.history["val_dice"].max() == pytest.approx(run.summary["val"]["dice"]["mean"], abs=1e-5)


def test_arms_of_one_seed_start_from_the_same_student():
    cfg = AblationConfig(**TINY)
    starts = [build(cfg.arm(arm, 5)).state_dict() for arm in ("alone", "method")]
    assert all(torch.equal(starts[0][k], starts[1][k]) for k in starts[0])
    other = build(cfg.arm("alone", 6)).state_dict()
    assert not torch.equal(starts[0]["encoder.0.0.weight"], other["encoder.0.0.weight"])


def test_the_teacher_never_changes():
    teacher_run = train_teacher(DistillConfig(**TINY), silent)
    before = (teacher_run.path / "checkpoint_best").read_bytes()
    distill(DistillConfig(**TINY, seed=4), silent)
    assert (teacher_run.path / "checkpoint_best").read_bytes() == before


def test_ablation_pairs_the_arms_and_adds_one_later():
    cfg = AblationConfig(**TINY, arms="alone, method", seeds="2, 3")
    small = ablate(cfg, silent)
    assert set(small.per_case.groupby(["arm", "seed"]).size().index) == {(a, s) for a in ("alone", "method") for s in (2, 3)} | {("teacher", 0)}
    before = {run.path: (run.path / "DONE").stat().st_mtime_ns for run in small.runs.values()}
    large = ablate(AblationConfig(**TINY, arms="alone, method, feat", seeds="2, 3"), silent)
    assert large.path != small.path and large.comparison["other"].tolist() == ["alone", "feat"]
    assert all(path.joinpath("DONE").stat().st_mtime_ns == time for path, time in before.items())
    test = large.per_case[large.per_case["split"] == "test"]
    means = test.groupby("arm")["dice"].mean()
    assert large.table.set_index("arm")["dice"].to_dict() == pytest.approx(means.to_dict(), abs=1e-6)


def test_a_finished_student_predicts_as_it_was_scored():
    cfg = DistillConfig(**TINY, seed=2)
    run, prepared = distill(cfg, silent), prepare_data(cfg, silent)
    rows = prepared.index("test")
    masks = np.stack(predict(load_student(run), prepared.images[rows])) > 0.5
    truth = prepared.masks[rows] > 0
    dice = 2 * (masks & truth).sum((1, 2)) / np.maximum(masks.sum((1, 2)) + truth.sum((1, 2)), 1)
    per_case = run.per_case[run.per_case["split"] == "test"]
    assert per_case["dice"].tolist() == pytest.approx(dice.tolist(), abs=1e-6)


def test_the_fitted_graph_knows_the_spread_of_the_teachers_h():
    cfg = DistillConfig(**TINY)
    graph = fit_graph(cfg, silent)
    fitted = graph.load()
    assert fitted.std.shape == (cfg.states,) and (fitted.std > 0).all()
    assert 1 <= graph.summary["live_nodes"] <= cfg.grid**2
    assert not any(p.requires_grad for p in fitted.graph.parameters())
    assert not any("head" in name for name in store.read_checkpoint(graph.path / "checkpoint_best")["graph"])


def test_gradients_are_taken_where_all_terms_reach():
    shared, own = torch.nn.Linear(2, 2, bias=False), torch.nn.Linear(2, 1, bias=False)
    network = torch.nn.Sequential(shared, own)
    x = torch.ones(1, 2)
    hidden = shared(x)
    found = gradients(network, {"a": hidden.sum() * 3, "seg": own(hidden).sum()})
    assert found["grad_a"] == pytest.approx(3 * 2.0)  # d/dW of 3 sum(W x), x = (1, 1): four entries of 3
    first, second = own.weight.detach().flatten().tolist()
    assert found["grad_seg"] == pytest.approx((2 * (first**2 + second**2)) ** 0.5, rel=1e-5)
    cosine = (first + second) / (2 * (first**2 + second**2)) ** 0.5  # (3, 3, 3, 3) against (first, first, second, second)
    assert found["cos_a"] == pytest.approx(cosine, rel=1e-5)
    hidden = shared(x)
    both = gradients(network, {"seg": own(hidden).sum(), "a": hidden.sum(), "b": -2 * hidden.sum()})
    assert both["cos_a_b"] == pytest.approx(-1) and set(both) == {"grad_seg", "grad_a", "grad_b", "cos_a", "cos_b", "cos_a_b"}


@pytest.mark.fault
@pytest.mark.parametrize("bad", ["nan", "inf"])
def test_a_loss_that_explodes_stops_the_run_with_step_term_and_cases(monkeypatch, bad):
    """In the second epoch's fourth step; the arm beside it is not blamed, and what was kept goes on to the usual numbers."""
    cfgs = [DistillConfig(**TINY, seed=9, terms=terms) for terms in ("", "feat")]
    real, calls = TERMS["feat"].compute, []
    batches = len(epoch_order(len(prepare_data(cfgs[0], silent).index("train")), 6, 9, 0))

    def fourth_of_the_second_epoch(*args):
        calls.append(1)
        return real(*args) * (float(bad) if len(calls) == batches + 4 else 1)

    monkeypatch.setitem(TERMS, "feat", replace(TERMS["feat"], compute=fourth_of_the_second_epoch))
    with pytest.raises(TrainingDiverged, match=rf"step 4 of epoch 2 of runs/distill/\S+: loss_feat is {bad}; .*clip_grad") as error:
        distill_arms(cfgs, silent)
    path = store.runs_root() / re.search(r"runs/(distill/\S+):", str(error.value))[1]
    written = store.read_json(path / "diverged.json")
    assert (written["epoch"], written["step"], written["losses"]["feat"]) == (2, 4, bad)
    prepared = prepare_data(cfgs[0], silent)
    expected = prepared.index("train")[epoch_order(len(prepared.index("train")), 6, 9, 1)[3]]
    assert written["cases"] == prepared.cases["id"].iloc[expected].tolist()
    monkeypatch.undo()
    assert len(store.read_checkpoint(path / "checkpoint_last")["history"]) == 1, "the last good epoch is kept"
    monkeypatch.setenv("LESIONKD_RUNS", str(path.parents[1]))
    assert all(run.history["epoch"].tolist() == [1, 2] for run in distill_arms(cfgs, silent))
    for run in distill_arms(cfgs, silent):
        shutil.rmtree(run.path)  # for the other value


@pytest.mark.fault
def test_a_teacher_that_a_fixed_mask_beats_is_refused_unless_forced(monkeypatch, tmp_path):
    monkeypatch.setenv("LESIONKD_RUNS", str(tmp_path))
    cfg = DistillConfig(**TINY | {"teacher_epochs": 1, "teacher_lr": 1e-9, "weak_teacher": "refuse"}, terms="feat, edge")
    run = train_teacher(cfg, silent)
    prepared = prepare_data(cfg, silent)
    fixed = fixed_mask_dice(prepared)
    assert run.summary["val"]["dice"]["mean"] <= fixed
    for terms in ("feat", "edge"):
        with pytest.raises(LesionKDError, match=f"one fixed mask for every image has {fixed:.3f}.*weak_teacher = 'allow'"):
            distill(cfg.with_values(terms=terms), silent)
    assert not list(tmp_path.glob("distill/*/checkpoint_last"))
    assert distill(cfg.with_values(terms="feat", weak_teacher="allow"), silent).summary["epochs"] == 2


def test_the_fixed_mask_lies_where_training_lesions_lie():
    """By hand: training lesions fill the left half, the first validation case too, the second has the right half."""
    masks = np.zeros((4, 4, 4), np.uint8)
    masks[:3, :, :2] = masks[3, :, 2:] = 1
    rows = {"train": np.array([0, 1]), "val": np.array([2, 3])}
    assert fixed_mask_dice(SimpleNamespace(masks=masks, index=rows.get)) == pytest.approx((1 + 0) / 2)


@pytest.mark.fault
def test_a_student_that_marks_nothing_is_reported(monkeypatch, tmp_path):
    monkeypatch.setenv("LESIONKD_RUNS", str(tmp_path))
    told = []
    run = distill(DistillConfig(**TINY | {"epochs": 1}, terms="", lr=1e-9, width=1, seed=3), told.append)
    marked = run.per_case["predicted_pixels"].unique()
    assert run.summary["constant"] == (len(marked) == 1 and marked[0] in (0, 32 * 32))
    run = distill(DistillConfig(**TINY, terms="", seed=3), told.append)
    with torch.no_grad():
        best = store.read_checkpoint(run.path / "checkpoint_best")
        for name in best["network"]:
            if name.startswith("head."):
                best["network"][name].zero_().sub_(1)
    (run.path / "DONE").unlink()
    store.write_checkpoint(run.path / "checkpoint_best", best)
    told.clear()
    again = distill(DistillConfig(**TINY, terms="", seed=3), told.append)
    assert again.summary["constant"] and any("marks nothing in every case" in line for line in told)


def test_clipping_bounds_the_gradient_of_a_step_and_no_more():
    """A step of SGD with rate 1 moves the weights by the clipped gradient."""
    prepared = prepare_data(DistillConfig(**TINY), silent)
    images, masks = next(iter(epoch_batches(prepared, 6, 0, 0, "none")))
    moved = {}
    for clip in (0.0, 0.01, 1e6):
        cfg = DistillConfig(**TINY, terms="", clip_grad=clip)
        learner = Learner.start(start_fabric(cfg), store.runs_root() / "nowhere", cfg, build(cfg), torch.nn.ModuleDict(), prepared)
        trained = [p for p in learner.network.parameters() if p.requires_grad]
        before = torch.cat([p.detach().flatten().clone() for p in trained])
        learner.optimizer = torch.optim.SGD(trained, lr=1.0)
        learner.step(start_fabric(cfg), images, masks, None, measure=False)
        moved[clip] = torch.cat([p.detach().flatten() for p in trained]) - before
    assert moved[0.01].norm() == pytest.approx(0.01, rel=1e-3)
    assert moved[0.0].norm() > 0.01
    assert torch.equal(moved[0.0], moved[1e6])
    assert torch.nn.functional.cosine_similarity(moved[0.0], moved[0.01], dim=0) == pytest.approx(1, abs=1e-4)


def test_deterministic_is_switched_on_and_off_by_each_run():
    for switch in (True, False):
        start_fabric(DistillConfig(**TINY, deterministic=switch))
        assert torch.are_deterministic_algorithms_enabled() == switch


@pytest.mark.fault
@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the device")
def test_a_device_that_is_not_there_is_named():
    with pytest.raises(LesionKDError, match="device = 'cuda'"):
        distill(DistillConfig(**TINY | {"device": "cuda"}, seed=8, terms=""), silent)


@pytest.mark.fault
def test_a_checkpoint_of_another_network_is_refused(tmp_path):
    run = distill(DistillConfig(**TINY, seed=2), silent)
    copy = shutil.copytree(run.path, tmp_path / "run")
    store.write_checkpoint(copy / "checkpoint_best", {"network": {"weight": torch.zeros(1)}})
    store.finish(copy)
    with pytest.raises(LesionKDError, match="another network"):
        load_network(copy)


def test_an_epochs_order_holds_every_case_once_and_no_batch_of_one():
    batches = epoch_order(13, 4, seed=0, epoch=3)
    assert [len(b) for b in batches] == [4, 4, 4]  # the thirteenth would be alone: BatchNorm needs two
    assert sorted(np.concatenate(epoch_order(14, 4, 0, 3))) == list(range(14))
    assert not np.array_equal(epoch_order(14, 4, 0, 3)[0], epoch_order(14, 4, 0, 4)[0])


def test_batches_are_a_function_of_seed_and_epoch():
    prepared = prepare_data(DistillConfig(**TINY), silent)
    once, again, other = (list(epoch_batches(prepared, 6, 1, epoch, "full")) for epoch in (2, 2, 3))
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(once, again))
    assert not torch.equal(once[0][0], other[0][0])


def test_normalization_by_hand():
    x = normalize(np.full((1, 2, 2, 3), 128, np.uint8))
    assert x[0, :, 0, 0].tolist() == pytest.approx([(128 / 255 - m) / s for m, s in zip(MEAN, STD)], rel=1e-5)


@pytest.mark.fault
def test_a_teacher_of_another_split_is_refused(monkeypatch):
    cfg = DistillConfig(**TINY, seed=7, terms="feat")
    teacher_run = train_teacher(cfg, silent)
    summary = teacher_run.summary
    store.write_json(teacher_run.path / "summary.json", summary | {"split_hash": "0badbad0"})
    store.finish(teacher_run.path)
    try:
        with pytest.raises(LesionKDError, match="0badbad0"):
            distill(cfg, silent)
    finally:
        store.write_json(teacher_run.path / "summary.json", summary)
        store.finish(teacher_run.path)


def test_cases_without_a_lesion_are_kept_and_add_no_edge_loss():
    """With batches in which no case has an edge the graph is fitted on the others."""
    cfg = DistillConfig(**TINY | {"cases": 60, "batch_size": 2}, normals="keep", seed=1)
    run = distill(cfg, silent)
    assert (prepare_data(cfg, silent).cases["lesion_share"] == 0).any()
    assert run.history.notna().all(axis=None)


def test_one_arm_alone_is_an_ablation_without_a_comparison():
    ablation = ablate(AblationConfig(**TINY, arms="method", seeds="2"), silent)
    assert len(ablation.comparison) == 0 and ablation.table["arm"].tolist() == ["method", "teacher"]


def test_another_profile_with_the_same_fields_finds_the_result():
    small = DistillConfig(**TINY, seed=2)
    same = DistillConfig(**TINY, seed=2, profile="cpu")
    assert distill(same, silent).path == distill(small, silent).path


@pytest.mark.fault
@pytest.mark.parametrize("options", [{"seed": 8}, {"teacher_seed": 8}, {"epochs": 3}, {"teacher_bn": "batch"}])
def test_arms_that_do_not_share_their_batches_are_refused(options):
    with pytest.raises(LesionKDError, match="lockstep"):
        distill_arms([DistillConfig(**TINY), DistillConfig(**TINY | options)], silent)


@pytest.mark.fault
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"feature_levels": "decoder.stride1"}, "no map"), ({"edge_level": "encoder.stride1"}, "no map"),
        ({"feature_levels": "encoder.stride2:encoder.stride4"}, "stride"),
    ],
)
def test_maps_that_do_not_fit_are_refused_before_the_teacher_trains(options, words, monkeypatch, tmp_path):
    monkeypatch.setenv("LESIONKD_RUNS", str(tmp_path))
    with pytest.raises(LesionKDError, match=words):
        distill(DistillConfig(**TINY | options), silent)
    assert not (tmp_path / "teacher").exists()


@pytest.mark.fault
@pytest.mark.parametrize("options", [{"seed": 7}, {"terms": "feat"}, {"shuffle_edges": True}])
def test_an_ablation_refuses_what_its_arms_decide(options):
    with pytest.raises(LesionKDError, match="arms and seeds"):
        AblationConfig(**options)
