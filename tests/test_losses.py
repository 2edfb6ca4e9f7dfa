"""L_seg, L_feat and the registry of loss terms, by hand; numbers of the originals: test_oracles."""

import hashlib
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import norm as gaussian
from torch import nn

from lesionkd_core.config import (
    AblationConfig,
    ConfigError,
    DistillConfig,
    LesionKDError,
    TeacherConfig,
)
from lesionkd_core.losses import (
    TERMS,
    EdgeGraph,
    FeatureRefinement,
    FittedGraph,
    LossTerm,
    Measured,
    Step,
    bce,
    bce_dice,
    build_terms,
    own_code,
    register,
    resolve,
    unused_options,
)
from lesionkd_core.losses.feature_refinement import (
    bn_margin,
    empirical_margins,
    partial_l2,
)
from lesionkd_core.models import ResNet34UNet, UNet
from lesionkd_core.pipeline import arm_config
from lesionkd_core.results import CHECKOUT, Wanted
from lesionkd_core.train import Lesson, Objective
from tests.tiny import drawn, step_of

# L_seg --------------------------------------------------------------------------------------------


def test_bce_by_hand():
    logits, masks = torch.tensor([[[[0.3, -1.2]]]]), torch.tensor([[[[1.0, 0.0]]]])
    p = [1 / (1 + math.exp(-0.3)), 1 / (1 + math.exp(1.2))]
    assert bce(logits, masks).item() == pytest.approx(-(math.log(p[0]) + math.log(1 - p[1])) / 2)


def test_bce_dice_is_half_of_each_and_dice_is_a_mean_over_images():
    logits, masks = drawn(2, 1, 4, 5), (drawn(2, 1, 4, 5, seed=1) > 0).float()
    p, y = logits.sigmoid().flatten(1).double().numpy(), masks.flatten(1).double().numpy()
    dice = 2 * (p * y).sum(1) / (p.sum(1) + y.sum(1))
    expected = 0.5 * bce(logits, masks).item() + 0.5 * (1 - dice).mean()
    assert bce_dice(logits, masks).item() == pytest.approx(expected, rel=1e-4)


def test_option_seg_loss_chooses_it_for_teacher_and_student(pair):
    step = Step(drawn(2, 1, 4, 5), torch.ones(2, 1, 4, 5))
    for make in (TeacherConfig, DistillConfig):
        for name, loss in (("bce", bce), ("bce_dice", bce_dice)):
            cfg = make(seg_loss=name, **{"losses": ""} if make is DistillConfig else {})
            term = build_terms(cfg, pair[0])["seg"]
            assert torch.equal(term(step), loss(step.logits, step.masks))


# Margins ------------------------------------------------------------------------------------------


def batch_norm(weight: float, bias: float) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(1)
    nn.init.constant_(norm.weight, weight)
    nn.init.constant_(norm.bias, bias)
    return norm


@pytest.mark.parametrize("z", [0.5, 3.08, 3.1, 50.0])
def test_margin_is_the_truncated_mean_down_to_a_fraction_of_one_in_a_thousand(z):
    norm = batch_norm(-2.0, 2.0 * z)
    fraction = gaussian.cdf(-z)
    expected = 2 * (z - gaussian.pdf(z) / fraction) if fraction > 0.001 else -6.0
    assert bn_margin(norm).item() == pytest.approx(expected, rel=2e-7)
    assert not bn_margin(norm).requires_grad


@pytest.mark.parametrize(("bias", "margin"), [(0.1, 0.0), (-0.4, -0.4)])
def test_margin_of_a_constant_channel_is_its_negative_part(bias, margin):
    assert bn_margin(batch_norm(0.0, bias)).item() == pytest.approx(margin)


def test_empirical_margin_is_the_mean_of_what_is_below_zero():
    batches = [drawn(3, 2, 4, 4, seed=seed) for seed in range(4)]
    for batch in batches:
        batch[:, 1].abs_()  # a channel without negatives
    margins = empirical_margins(({"a": batch} for batch in batches), ["a"])["a"]
    values = np.concatenate(batches)[:, 0]
    assert margins[0].item() == pytest.approx(values[values < 0].mean(), rel=1e-6)
    assert margins[1] == 0


def test_empirical_margin_keeps_its_digits_over_many_batches_and_in_half_precision():
    batches = [{"a": torch.full((1, 1, 1, 1), value)} for value in (-(2.0**24), *[-1.0] * 999)]
    margin = empirical_margins(batches, ["a"])["a"]
    assert margin.item() == pytest.approx(-(2.0**24 + 999) / 1000, rel=1e-7)
    assert margin.dtype == torch.float32
    assert empirical_margins(batches[-1:], ["a"])["a"].item() == -1
    half = drawn(2, 1, 32, 32).bfloat16()
    values = half.double().numpy()
    expected = values[values < 0].mean()
    assert empirical_margins([{"a": half}], ["a"])["a"].item() == pytest.approx(expected, rel=1e-5)


# L_feat -------------------------------------------------------------------------------------------


def test_partial_l2_leaves_the_student_alone_where_both_are_negative():
    student = torch.tensor([-3.0, -0.5, 1.0]).view(1, 1, 1, 3).requires_grad_()
    teacher = torch.full((1, 1, 1, 3), -1.0).requires_grad_()
    loss = partial_l2(student, teacher, torch.tensor([-0.8]))
    loss.backward()
    assert loss.item() == pytest.approx(0.3**2 + 1.8**2)
    assert student.grad.flatten().tolist() == pytest.approx([0.0, 0.6, 3.6])
    assert teacher.grad is None


def test_partial_l2_counts_a_target_of_zero_as_negative():
    student = torch.tensor([-1.0, 1.0]).view(1, 1, 1, 2)
    assert partial_l2(student, torch.full((1, 1, 1, 2), -1.0), torch.zeros(1)).item() == 1


def test_levels_are_weighted_by_hand(pair):
    """One sum for each level: the totals differ in their factors only."""
    step = step_of(*pair)
    loss = FeatureRefinement(*pair, ("decoder.stride8", "decoder.stride4"))
    assert [s for s, _ in loss.pairs] == ["decoder.stride4", "decoder.stride8"]  # shallowest first
    shallow, deep = (
        partial_l2(
            loss.connectors[i](step.maps[s]), step.teacher_maps[t], loss.get_buffer(f"margin{i}")
        )
        for i, (s, t) in enumerate(loss.pairs)
    )
    totals = {}
    for loss.level_weights in ("mean", "halving"):
        totals[loss.level_weights] = loss(step).item()
    n = 2  # 6 channels of 16 x 16 px, 12 channels of 8 x 8 px
    expected = shallow / (n * 6 * 256) + deep / (n * 12 * 64)
    assert totals["mean"] == pytest.approx(expected.item(), rel=1e-4)
    assert totals["halving"] == pytest.approx(((shallow / 2 + deep) / (1000 * n)).item(), rel=1e-4)


def test_refinement_reaches_student_and_connectors_and_not_the_teacher(pair):
    loss = FeatureRefinement(*pair, ("decoder.stride8", "decoder.stride2"))
    pair[0].zero_grad()
    loss(step_of(*pair)).backward()
    assert all(p.grad.abs().sum() > 0 for p in loss.parameters())
    assert pair[0].encoder[0][0].weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in pair[1].parameters())


@pytest.mark.fault
def test_maps_of_unequal_size_are_refused_with_both_shapes():
    words = r"student's map is \(1, 1, 2, 2\), the teacher's \(1, 1, 3, 3\)"
    with pytest.raises(LesionKDError, match=words):
        partial_l2(torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 3, 3), torch.zeros(1))


@pytest.mark.fault
def test_odd_image_sizes_are_refused_in_distillation():
    """Inference takes them; U-Net and ResNet round them differently."""
    student, teacher = UNet(width=2), ResNet34UNet().eval()
    step = step_of(student, teacher, height=70, width=70)
    with pytest.raises(LesionKDError, match=r"17, 17.*18, 18.*multiples of 32"):
        FeatureRefinement(student, teacher, ("decoder.stride4",))(step)


# Registry -----------------------------------------------------------------------------------------

ALL = DistillConfig(
    losses=", ".join(name for name in TERMS if name != "seg"),
    levels="decoder.stride4, decoder.stride2",
    level_weights="halving",
    states=5,
    grid=2,
    edge_level="encoder.stride2:decoder.stride2",
    seed=4,
)


def measured() -> Measured:
    margins = {"decoder.stride2": torch.full((3,), -0.1), "decoder.stride4": torch.full((6,), -0.2)}
    return Measured(FittedGraph(EdgeGraph(3, 5, 2), torch.full((5,), 0.5)), margins)


def test_all_terms_are_built_and_give_one_finite_number(pair):
    edge = torch.zeros(3, 1, 64, 64)
    for i in range(3):
        edge[i, 0, 6 + 4 * i : 20, 4 * i + 2 : 18 + 2 * i] = 1
    step = replace(step_of(*pair, edge, n=3), masks=edge[:2])  # the last image has no mask
    terms = build_terms(ALL, *pair, measured())
    assert set(terms) == set(TERMS)
    for name, term in terms.items():
        loss = term(step)
        assert loss.shape == () and torch.isfinite(loss) and loss > 0, name


@pytest.mark.parametrize("margin", ["bn", "empirical"])
def test_measured_margins_are_used_where_the_option_says_so(margin, pair):
    given, cfg = measured(), ALL.with_values(losses="feat", margin=margin)
    module = build_terms(cfg, *pair, given)["feat"]
    norm = pair[1].feature_norms()["decoder.stride2"]
    expected = given.margins["decoder.stride2"] if margin == "empirical" else bn_margin(norm)
    assert torch.equal(module.margin0, expected) and module.level_weights == "halving"


def test_the_first_map_of_a_pair_is_the_students(pair):
    level, names = "encoder.stride2:decoder.stride2", ("encoder.stride2", "decoder.stride2")
    terms = build_terms(ALL.with_values(levels=level), *pair, measured())
    assert terms["feat"].pairs == [names]
    assert terms["feat"].connectors[0][0].weight.shape[:2] == (3, 4)
    for name in ("edge", "edge_shuffled"):
        assert (terms[name].student_map, terms[name].teacher_map) == names


def test_initial_weights_of_a_term_depend_on_the_seed_alone(pair):
    torch.manual_seed(9)
    before = torch.get_rng_state()
    alone = build_terms(ALL.with_values(losses="feat"), *pair)
    assert list(alone) == ["seg", "feat"]
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(10)
    beside = build_terms(ALL, *pair, measured())
    other = build_terms(ALL.with_values(losses="feat", seed=5), *pair)
    start, again, another = (
        terms["feat"].connectors[0][0].weight for terms in (alone, beside, other)
    )
    assert torch.equal(start, again) and not torch.equal(start, another)


@pytest.fixture
def toy():
    """A loss term that this test registers."""
    kept = dict(TERMS)

    @register("toy", label="Toy", weight=7.0, sweep=(1.0, 7.0), options=("grid", "width"))
    class Toy(LossTerm):
        def forward(self, step):
            return step.logits.square().mean() + 0 * step.teacher_logits.sum()

    yield Toy
    TERMS.clear()
    TERMS.update(kept)


def test_a_registered_term_becomes_an_option_value_and_an_arm(toy, pair):
    cfg = DistillConfig(losses="toy")
    assert resolve(cfg.losses) == {"seg": 1.0, "toy": 7.0} and cfg.terms == ("toy",)
    assert resolve(DistillConfig(losses="toy=0.5, feat").losses)["toy"] == 0.5
    ablation = AblationConfig(arms="alone, toy", losses="toy=2")
    assert arm_config(ablation, "toy", 3).losses == {"seg": 1.0, "toy": 2.0}
    step = step_of(*pair)
    assert build_terms(cfg, *pair)["toy"](step).item() == step.logits.square().mean().item()


@pytest.mark.fault
def test_a_term_with_layers_has_to_name_the_option_that_trains_them(toy, pair, monkeypatch):
    """Otherwise two trainings with other learning rates of these layers had one digest."""
    monkeypatch.setattr(toy, "build", classmethod(lambda cls, setup: torch.nn.Linear(2, 2)))
    with pytest.raises(LesionKDError, match="'toy' trains layers of its own.*connector_lr"):
        build_terms(DistillConfig(losses="toy"), *pair)


@pytest.mark.fault
def test_a_term_that_gives_no_single_number_is_refused(toy, pair, monkeypatch):
    monkeypatch.setattr(toy, "forward", lambda self, step: step.logits.mean((1, 2, 3)))
    student, teacher = pair
    terms = build_terms(DistillConfig(losses="toy"), student, teacher)
    lesson = Lesson(torch.zeros(2, 1, 32, 32))
    with pytest.raises(LesionKDError, match=r"'toy' gave \(2,\) values; expected one"):
        Objective(student, terms)(torch.zeros(2, 3, 32, 32), lesson)


def student_digest(**options):
    """Digest of a student by what its loss terms read."""
    cfg = DistillConfig(**options)
    cfg = cfg.with_values(losses=resolve(cfg.losses))
    return Wanted(cfg, "u", unused_options(cfg.losses)).digest


def test_a_term_in_a_file_of_its_own_is_named_by_the_file_and_counts_with_it(
    toy, pair, tmp_path, monkeypatch
):
    cfg = AblationConfig(arms="examples.losses:similarity*2", losses="examples.losses:similarity=2")
    assert cfg.arms == ("similarity*2",) and cfg.losses == {"similarity": 2.0}
    step = step_of(*pair)
    term = build_terms(DistillConfig(losses="similarity"), *pair)["similarity"]
    expected = 0.0
    for level in DistillConfig().levels:
        ours, theirs = step.maps[level], step.teacher_maps[level]
        rows = []
        for maps in (ours, theirs):
            products = torch.einsum("nchw, mchw -> nm", maps, maps)
            rows.append(products / products.square().sum(1, keepdim=True).sqrt())
        expected += (rows[0] - rows[1]).square().mean().item()
    assert term(step).item() == pytest.approx(expected, rel=1e-4)
    assert own_code(("feat", "kd", "seg")) == ""
    content = (CHECKOUT / "examples" / "losses.py").read_bytes()
    assert own_code(("seg", "similarity")) == hashlib.sha256(content).hexdigest()
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "terms_of_mine.py").write_text(
        "from lesionkd_core.losses import LossTerm, register\n"
        "@register('kd', label='mine', weight=1)\n"
        "class Mine(LossTerm): pass"
    )
    with pytest.raises(
        ConfigError, match="the term 'kd' of terms_of_mine has the name of one in lesionkd"
    ):
        DistillConfig(losses="terms_of_mine:kd")


def test_an_option_of_loss_terms_counts_with_these_terms_alone(toy):
    """An option that others read too counts always, whoever registers it."""
    for losses, option, counts in [
        ("toy", "grid", True), ("kd", "grid", False), ("kd", "width", True), ("", "width", True),
        ("boundary_kd", "edge_width", True), ("kd", "edge_width", False),
        ("fitnets", "connector_lr", True), ("", "teacher_lr", False), ("kd", "teacher_lr", True),
        ("feat", "margin", True), ("edge", "margin", False), ("", "label_seed", True),
    ]:  # fmt: skip
        values = {"margin": ("bn", "empirical")}.get(option, (2, 4))
        one, other = (student_digest(losses=losses, **{option: value}) for value in values)
        assert (one != other) == counts, (losses, option)


def test_the_order_of_losses_does_not_count_and_their_weights_do():
    one, same, other = map(
        lambda text: student_digest(losses=text), ("edge, feat", "feat=1, edge=0.1", "feat=2, edge")
    )
    assert one == same != other


@pytest.mark.fault
def test_a_term_or_option_that_does_not_exist_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match="names the term 'fet': did you mean 'feat'"):
        resolve(DistillConfig(losses="fet").losses)
    with pytest.raises(ConfigError, match="names the option 'widht': did you mean 'width'"):
        register("toy", label="Toy", weight=1.0, options=("widht",))
