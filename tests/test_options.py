"""Every option of METHOD.md marked open: what it computes, where it counts in the hash, and what it refuses."""

import numpy as np
import pytest
import torch
from torch import nn

from lesionkd_core import store
from lesionkd_core.batches import epoch_batches
from lesionkd_core.config import ARMS, AblationConfig, ConfigError, DistillConfig, GraphConfig, LesionKDError, TeacherConfig
from lesionkd_core.edges import edge_label_batch
from lesionkd_core.inference import build, load_network
from lesionkd_core.losses import (
    EdgeGraph,
    EdgeHead,
    EdgeReasoning,
    EdgeRelation,
    FeatureRefinement,
    Measured,
    Step,
    build_terms,
    derange,
    empirical_margins,
)
from lesionkd_core.networks import ResNet34UNet, UNet, use_statistics
from lesionkd_core.prepare import prepare_data
from lesionkd_core.stages import OPTIONS, distill, distill_arms, sweep_options, sweep_weights, train_teacher
from lesionkd_core.stages.teacher import starting_teacher
from lesionkd_core.training import Learner, Look, start_fabric

TINY = {
    "dataset": "phantom-ct", "pixels": 32, "cases": 40, "batch_size": 6,
    "teacher_epochs": 1, "graph_epochs": 1, "epochs": 2, "threads": 1, "device": "cpu", "weak_teacher": "allow",
}


def silent(*_):
    pass


@pytest.fixture(scope="module")
def shared_runs(tmp_path_factory):
    return tmp_path_factory.mktemp("options")


@pytest.fixture(autouse=True)
def runs_together(monkeypatch, shared_runs):
    monkeypatch.setenv("LESIONKD_RUNS", str(shared_runs))


@pytest.fixture
def pair():
    torch.manual_seed(0)
    return UNet(width=4), ResNet34UNet().eval()


def square(n=2, size=64):
    edge = torch.zeros(n, 1, size, size)
    edge[..., 20:40, 20] = edge[..., 20:40, 39] = edge[..., 20, 20:40] = edge[..., 39, 20:40] = 1
    return edge


def maps_of(network, x):
    with torch.no_grad():
        return network.forward_features(x)[1]


# margin: bn | empirical

def test_empirical_margin_is_the_mean_of_what_lies_below_zero():
    rng = np.random.default_rng(0)
    batches = [rng.normal(size=(3, 2, 4, 4)).astype(np.float32) for _ in range(4)]
    for batch in batches:
        batch[:, 1] = np.abs(batch[:, 1])  # a channel without negatives
    margins = empirical_margins(({"a": torch.from_numpy(batch)} for batch in batches), ["a"])["a"]
    values = np.concatenate(batches)[:, 0]
    assert margins[0] == pytest.approx(values[values < 0].mean(), rel=1e-6)
    assert margins[1] == 0


def test_given_margins_take_the_place_of_the_batchnorms(pair):
    given = {"decoder.stride4": torch.linspace(-2, 0, 64)}
    assert torch.equal(FeatureRefinement(*pair, ("decoder.stride4",), margins=given).margin0, given["decoder.stride4"])
    assert not torch.equal(FeatureRefinement(*pair, ("decoder.stride4",)).margin0, given["decoder.stride4"])


# teacher_bn: eval | batch

def test_batch_statistics_are_those_of_training_and_leave_every_buffer_alone(pair):
    teacher, x = pair[1], torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        for _ in range(3):
            teacher.train()(torch.randn(4, 3, 32, 32) * 3)  # running statistics unlike the batch's
        expected = ResNet34UNet()
        expected.load_state_dict(teacher.state_dict())
        by_batch, running = expected.train()(x), teacher.eval()(x)
        before = {name: value.clone() for name, value in teacher.state_dict().items()}
        got = use_statistics(teacher, "batch")(x)
    torch.testing.assert_close(got, by_batch)
    assert (got - running).abs().max() > 1e-3
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


# graph: frozen | joint | relation

def test_relation_compares_cosines_between_the_means_of_cells(pair):
    loss = EdgeRelation(*pair, "encoder.stride4", grid=2, frame="image")
    edge = torch.zeros(1, 1, 64, 64)
    edge[..., 8, 8] = edge[..., 8, 40] = edge[..., 40, 8] = 1  # three of four cells; at stride 4 one pixel each
    places = [(2, 2), (2, 10), (10, 2)]
    rng = np.random.default_rng(1)
    maps = [torch.from_numpy(rng.normal(size=(1, c, 16, 16)).astype(np.float32)) for c in (16, 64)]
    cosines = []
    for x in maps:
        nodes = np.stack([x[0, :, r, c].numpy() for r, c in places])
        nodes /= np.linalg.norm(nodes, axis=1, keepdims=True)
        cosines.append(nodes @ nodes.T)
    off = ~np.eye(3, dtype=bool)
    expected = ((cosines[0] - cosines[1])[off] ** 2).mean()
    assert loss({"encoder.stride4": maps[0]}, {"encoder.stride4": maps[1]}, edge).item() == pytest.approx(expected, rel=1e-5)


def test_relation_needs_two_cells_and_ignores_scale(pair):
    loss = EdgeRelation(*pair, "encoder.stride4", grid=2, frame="image")
    x = torch.randn(1, 16, 16, 16)
    one = torch.zeros(1, 1, 64, 64)
    one[..., 8, 8] = 1
    assert loss({"encoder.stride4": x}, {"encoder.stride4": torch.randn(1, 64, 16, 16)}, one) == 0
    assert loss({"encoder.stride4": x}, {"encoder.stride4": 3 * x}, square(1)).abs() < 1e-6


def test_joint_learning_adds_the_edge_heads_bce_on_both_sides(pair):
    torch.manual_seed(1)
    x = torch.randn(2, 3, 64, 64)
    teacher_maps = maps_of(pair[1], x)
    head = EdgeHead(16)
    loss = EdgeReasoning(*pair, EdgeGraph(64), torch.ones(16), "encoder.stride4", head)
    loss.connector = nn.Identity()
    edge = square()
    small = loss.graph.edge_at(edge, 4)
    got = loss({"encoder.stride4": teacher_maps["encoder.stride4"]}, teacher_maps, edge)  # a student that equals the teacher
    assert got.item() == pytest.approx(2 * head(loss.graph, teacher_maps["encoder.stride4"], small).item(), rel=1e-5)
    got.backward()
    assert loss.graph.phi.weight.grad.abs().sum() > 0 and head.head.weight.grad.abs().sum() > 0


def test_a_frozen_graph_gets_no_gradient(pair):
    x = torch.randn(2, 3, 64, 64)
    loss = EdgeReasoning(*pair, EdgeGraph(64), torch.ones(16), "encoder.stride4")
    loss(pair[0].forward_features(x)[1], maps_of(pair[1], x), square()).backward()
    assert all(p.grad is None for p in loss.graph.parameters())
    assert loss.connector[0].weight.grad.abs().sum() > 0


def test_joint_learning_survives_a_batch_without_any_lesion(pair):
    x = torch.randn(2, 3, 64, 64)
    loss = EdgeReasoning(*pair, EdgeGraph(64), torch.ones(16), "encoder.stride4", EdgeHead(16))
    assert loss(pair[0].forward_features(x)[1], maps_of(pair[1], x), torch.zeros(2, 1, 64, 64)) == 0


@pytest.mark.parametrize("option", [
    {"graph": "joint"}, {"graph": "relation"}, {"margin": "empirical"}, {"teacher_bn": "batch"}, {"edge_level": "deep"},
    {"anchors": "eagr", "normalize": "size"}, {"anchors": "masked_cosine"}, {"grid_frame": "lesion"}, {"level_weights": "area"},
    {"feature_levels": "encoder.stride2, encoder.stride8"},
    {"edge_width": 2}, {"width": 8}, {"connector_lr": 0.1}, {"connector_warmup": 1}, {"teacher": "unet64", "terms": "feat, edge", "epochs": 1},
], ids=lambda option: "-".join(map(str, option.values())))
def test_every_option_trains_from_data_to_scores(option):
    run = distill(DistillConfig(**{**TINY, **option}), silent)
    history = run.history
    assert np.isfinite(history.filter(like="loss").to_numpy()).all()
    assert {"grad_feat", "grad_edge", "cos_feat", "cos_edge", "cos_feat_edge"} <= set(history)
    assert len(run.per_case)


def test_connectors_that_warm_up_learn_and_leave_the_student_to_its_masks():
    """While they do, the student is the student alone, to the bit; then it is not."""
    arms = [DistillConfig(**TINY | {"epochs": 4}, terms=terms, connector_warmup=n) for terms, n in (("", 0), ("feat", 3))]
    alone, warmed = (run.history for run in distill_arms(arms, silent))
    same = [alone[name] == warmed[name] for name in ("loss_seg", "val_dice", "grad_seg")]
    assert [column.iloc[:3].all() for column in same] == [True] * 3 and not same[0].iloc[3]
    assert warmed["loss_feat"].is_monotonic_decreasing
    assert warmed["grad_feat"].isna().tolist() == [True, True, True, False]


def test_connectors_have_a_learning_rate_of_their_own():
    """The first step of AdamW moves a weight by its learning rate, whatever its gradient."""
    moved = {}
    for factor in (1.0, 0.1):
        cfg = DistillConfig(**TINY, terms="feat", connector_lr=factor, weight_decay=0.0, augment="none")
        prepared, teacher, student = prepare_data(cfg, silent), ResNet34UNet().eval(), build(cfg)
        fabric = start_fabric(cfg)
        learner = Learner.start(fabric, store.runs_root() / "nowhere", cfg, student, build_terms(cfg, student, teacher, Measured()), prepared)
        images, masks = next(iter(epoch_batches(prepared, 6, 0, 0, "none")))
        with torch.no_grad():
            look = Look(masks, *teacher.forward_features(images))
        parts = {"student": learner.network.head.weight, "connector": learner.objective.terms["feat"].connectors[0][0].weight}
        before = {name: weight.detach().clone() for name, weight in parts.items()}
        learner.step(fabric, images, masks, look, measure=False)
        moved[factor] = {name: (weight - before[name]).abs().median().item() for name, weight in parts.items()}
    assert moved[0.1]["student"] == pytest.approx(moved[1.0]["student"], rel=1e-3)
    assert moved[0.1]["connector"] == pytest.approx(0.1 * moved[1.0]["connector"], rel=1e-2)


@pytest.mark.parametrize("c", [2, 4, 8, 16])
def test_students_of_every_width_have_the_terms_of_the_method(c):
    blocks = [(3, c), (c, 2 * c), (2 * c, 4 * c), (4 * c, 8 * c), (8 * c, 8 * c), (16 * c, 4 * c), (8 * c, 2 * c), (4 * c, c), (2 * c, c)]
    parameters = sum(9 * i * o + 9 * o * o + 6 * o for i, o in blocks) + sum(4 * w * w + w for w in (8 * c, 4 * c, 2 * c, c)) + c + 1
    cfg = DistillConfig(width=c, terms="feat, edge", graph="joint")
    student = build(cfg)
    assert sum(p.numel() for p in student.parameters()) == parameters
    assert set(build_terms(cfg, student, ResNet34UNet(), Measured())) == {"feat", "edge"}


def test_shuffled_arms_of_other_edge_widths_get_their_own_labels():
    masks = torch.zeros(2, 1, 32, 32)
    masks[0, :, 4:12, 4:12], masks[1, :, 16:28, 16:28] = 1, 1
    look = Look(masks, torch.zeros(2, 1, 32, 32), {})
    thin, wide = (Step(look.logits, {}, masks, look.edge(width), look.logits, {}, look.shared).edge_label(shuffled=True) for width in (1, 3))
    assert torch.equal(thin, derange(edge_label_batch(masks, 1))) and torch.equal(wide, derange(edge_label_batch(masks, 3)))


# arms

def weights(run):
    return store.read_checkpoint(run.path / "checkpoint_last")["objective"]


def test_every_arm_lowers_its_own_loss_and_the_order_of_arms_changes_nothing(monkeypatch, tmp_path):
    import shutil

    cfg = AblationConfig(**TINY | {"epochs": 3}, arms=",".join(ARMS))
    arms = [cfg.arm(arm, 0) for arm in ARMS]
    first = distill_arms(arms, silent)
    for arm, run in zip(ARMS, first):
        loss = run.history["loss_total"]
        assert loss.iloc[-1] < loss.iloc[0], arm
    for stage in ("prepare", "teacher", "graph"):
        shutil.copytree(store.runs_root() / stage, tmp_path / stage)
    monkeypatch.setenv("LESIONKD_RUNS", str(tmp_path))
    again = distill_arms(arms[::-1], silent)[::-1]
    for one, other in zip(first, again):
        mine, theirs = weights(one), weights(other)
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    [alone] = distill_arms([cfg.arm("dist", 0).with_values(seed=1)], silent)  # a rival by itself
    assert len(alone.per_case)


def test_a_sweep_reads_validation_cases_and_takes_the_methods_weight_for_edges():
    cfg = AblationConfig(**TINY, seeds=1)
    table = sweep_weights(cfg, {"feat": (0.5, 2.0), "method": (0.2,)}, silent)
    assert list(zip(table["arm"], table["weight"])) == [("alone", 0.0), ("feat", 0.5), ("feat", 2.0), ("method", 0.2)]
    one = distill(cfg.arm("method", 0).with_values(w_edge=0.2), silent)
    assert table["run"].iloc[-1] == store.short(one.path)
    assert table["best_val_dice"].iloc[-1] == pytest.approx(one.history["val_dice"].max())


def test_options_are_changed_one_at_a_time_and_the_configuration_s_own_value_is_the_method_s_run():
    cfg = AblationConfig(**TINY, seeds=2)
    table = sweep_options(cfg, {"margin": ("bn", "empirical"), "teacher_bn": ("batch",), "edge_level": ("low",)}, silent)
    assert list(zip(table["option"], table["value"])) == [
        ("arm", "alone"), ("arm", "method"), ("margin", "bn"), ("margin", "empirical"), ("teacher_bn", "batch"), ("edge_level", "low"),
    ] * 2
    for seed, part in table.groupby("seed"):
        alone, method, bn, empirical, batch, low = part["run"]
        assert method == bn == low and len({alone, method, empirical, batch}) == 4
        usual, changed = (store.read_json(store.runs_root() / place.removeprefix("runs/") / "config.json") for place in (method, batch))
        assert {name for name in usual if changed[name] != usual[name]} - {"digest", "upstream"} == {"teacher_bn"} and usual["seed"] == seed


def test_every_option_that_is_swept_has_the_default_among_its_values():
    for option, values in OPTIONS.items():
        default = AblationConfig()
        assert default in [default.with_values(**{option: value}) for value in values], option


@pytest.mark.fault
def test_a_sweep_over_an_unknown_option_is_refused():
    with pytest.raises(ConfigError, match="sweep_options: no option 'anchor'; did you mean 'anchors'"):
        sweep_options(AblationConfig(**TINY), {"anchor": ("eagr",)}, silent)


@pytest.mark.fault
def test_a_sweep_over_an_unknown_weight_is_refused():
    with pytest.raises(ConfigError, match="did you mean 'feat'"):
        sweep_weights(AblationConfig(**TINY), {"fet": (1.0,)}, silent)


# where options count

@pytest.mark.parametrize(("terms", "change", "counts"), [
    ("", {"margin": "empirical"}, False), ("", {"teacher_bn": "batch"}, False), ("", {"graph": "joint"}, False), ("", {"w_kd": 2.0}, False),
    ("feat", {"margin": "empirical"}, True), ("feat", {"teacher_bn": "batch"}, True), ("feat", {"graph": "joint"}, False), ("feat", {"w_cwd": 9.0}, False),
    ("edge", {"graph": "relation"}, True), ("edge", {"margin": "empirical"}, False), ("kd", {"kd_temperature": 2.0}, True), ("kd", {"w_feat": 5.0}, False),
    ("at", {"at_levels": "encoder.stride8"}, True), ("dist", {"dist_temperature": 4.0}, True), ("fitnets", {"w_fitnets": 2.0}, True),
    ("edge", {"connector_lr": 2.0}, True), ("kd", {"connector_lr": 2.0}, False), ("", {"connector_lr": 2.0}, False), ("edge", {"connector_warmup": 1}, False),
])
def test_an_option_counts_where_its_term_is_trained(terms, change, counts):
    one, other = DistillConfig(terms=terms), DistillConfig(terms=terms, **change)
    assert (one.digest("x") != other.digest("x")) == counts


def test_weight_files_count_with_their_content_wherever_they_lie(tmp_path):
    for name, content in (("a", b"1"), ("b", b"1"), ("c", b"2")):
        (tmp_path / name).write_bytes(content)
    digests = [TeacherConfig(encoder_weights=str(tmp_path / name)).digest("x") for name in "abc"]
    assert digests[0] == digests[1] != digests[2]
    assert TeacherConfig().digest("x") not in digests


# weights from elsewhere

def imagenet_file(path):
    """A file with the names of torchvision's resnet34, classifier included."""
    torch.manual_seed(7)
    weights = ResNet34UNet().encoder.state_dict() | {"fc.weight": torch.randn(1000, 512), "fc.bias": torch.randn(1000)}
    torch.save(weights, path)
    return weights


def test_an_imagenet_encoder_loads_and_the_decoder_keeps_its_start(tmp_path):
    weights = imagenet_file(tmp_path / "resnet34.pth")
    started = starting_teacher(TeacherConfig(encoder_weights=str(tmp_path / "resnet34.pth")))
    assert all(torch.equal(value, weights[name]) for name, value in started.encoder.state_dict().items())
    assert torch.equal(started.decoder[0][0].weight, build(TeacherConfig()).decoder[0][0].weight)


def test_your_own_teacher_is_taken_as_it_is(tmp_path):
    cfg = TeacherConfig(**{name: TINY[name] for name in TINY if name in TeacherConfig.model_fields})
    trained = train_teacher(cfg, silent)
    torch.save(load_network(trained).network.state_dict(), tmp_path / "mine.pt")
    own = cfg.with_values(teacher_checkpoint=str(tmp_path / "mine.pt"))
    said = []
    taken = train_teacher(own, said.append)
    assert taken.path != trained.path and any("as it is" in line for line in said)
    assert taken.per_case["dice"].tolist() == trained.per_case["dice"].tolist()
    assert taken.summary["epochs"] == 0
    student = distill(DistillConfig(**TINY, terms="feat", teacher_checkpoint=str(tmp_path / "mine.pt")), silent)
    assert len(student.per_case)


@pytest.mark.fault
@pytest.mark.parametrize(("parameter", "content", "says"), [
    ("teacher_checkpoint", {"conv.weight": torch.zeros(1)}, r"teacher_checkpoint = .*names or shapes do not fit.*ResNet34UNet"),
    ("encoder_weights", {"conv1.weight": torch.zeros(64, 3, 3, 3)}, r"encoder_weights = .*torchvision's resnet34"),
    ("encoder_weights", None, "no checkpoint that can be trusted"),
    ("teacher_checkpoint", [1, 2], "wants a state dict"),
])
def test_weights_of_another_network_are_refused(tmp_path, parameter, content, says):
    file = tmp_path / "weights.pt"
    file.write_bytes(b"nothing like it") if content is None else torch.save(content, file)
    with pytest.raises(LesionKDError, match=says):
        starting_teacher(TeacherConfig(**{parameter: str(file)}))


@pytest.mark.fault
@pytest.mark.parametrize(("values", "says"), [
    ({"encoder_weights": "/nowhere/resnet34.pth"}, "cannot read '/nowhere/resnet34.pth'"),
    ({"teacher_checkpoint": "/nowhere/mine.pt"}, "cannot read '/nowhere/mine.pt'"),
])
def test_a_missing_weight_file_is_named_before_anything_is_trained(values, says):
    with pytest.raises(ConfigError, match=says):
        train_teacher(TeacherConfig(**values), silent)


@pytest.mark.fault
@pytest.mark.parametrize(("values", "says"), [
    ({"encoder_weights": "x", "teacher": "unet64"}, "no such encoder"),
    ({"encoder_weights": "x", "teacher_checkpoint": "y"}, "give one of the two"),
    ({"graph": "relation", "anchors": "masked_cosine"}, "masked means only"),
    ({"graph": "fixed"}, "graph"),
    ({"margin": "mean"}, "margin"),
    ({"teacher_bn": "train"}, "teacher_bn"),
    ({"margin": "bn", "connector_warmup": 10}, "L_feat would never reach the student in 10 epochs"),
])
def test_options_that_contradict_each_other_are_refused(values, says):
    with pytest.raises(ConfigError, match=says):
        GraphConfig(**values) if "margin" not in values else DistillConfig(**values)


@pytest.mark.fault
def test_rivals_maps_are_checked_before_anything_is_trained():
    with pytest.raises(LesionKDError, match=r"the teacher has no map 'decoder.stride1'"):
        distill(DistillConfig(**TINY, terms="at", at_levels="decoder.stride1"), silent)
    assert prepare_data(DistillConfig(**TINY), silent)
