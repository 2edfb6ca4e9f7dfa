"""The registry of terms: what each reads of a step and of the configuration."""

import pytest
import torch

from lesionkd_core.config import DistillConfig
from lesionkd_core.losses import TERMS, EdgeGraph, EdgeReasoning, EdgeRelation, FeatureRefinement, FittedGraph, Measured, Step, bn_margin, build_terms, derange
from lesionkd_core.losses.baselines import OnMaps, attention_loss, cwd_loss, dist_loss, hint_loss, kd_loss
from lesionkd_core.networks import ResNet34UNet, UNet

ALL = DistillConfig(
    terms=",".join(TERMS), kd_temperature=3.0, cwd_temperature=2.0, dist_temperature=5.0, fitnets_levels="decoder.stride4",
    at_levels="encoder.stride2:decoder.stride2", feature_levels="decoder.stride4, decoder.stride2", level_weights="area",
    states=5, grid=2, grid_frame="lesion", edge_level="encoder.stride2", seed=4,
)


@pytest.fixture(scope="module")
def pair():
    torch.manual_seed(0)
    return UNet(width=2), UNet(width=3).eval().requires_grad_(False)


@pytest.fixture
def step(pair):
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    (logits, maps), (teacher_logits, teacher_maps) = (network.forward_features(images) for network in pair)
    edge = torch.zeros(3, 1, 32, 32)
    for i in range(3):
        edge[i, 0, 6 + 4 * i : 20, 4 * i + 2 : 18 + 2 * i] = 1
    return Step(logits, maps, edge, edge, teacher_logits, teacher_maps)


def fitted() -> Measured:
    margins = {name: torch.full((channels,), -0.1) for name, channels in (("decoder.stride2", 3), ("decoder.stride4", 6))}
    return Measured(FittedGraph(EdgeGraph(6, 5, 2, frame="lesion"), torch.full((5,), 0.5)), margins)


def test_what_the_arms_share_is_made_once(step):
    made = []
    for key in ("a", "b", "a"):
        assert step.once(key, lambda key=key: made.append(key) or key) == key
    assert made == ["a", "b"]


def test_only_the_control_gets_another_cases_edge(step):
    assert step.edge_label(shuffled=False) is step.edge
    assert torch.equal(step.edge_label(shuffled=True), derange(step.edge))


@pytest.mark.parametrize(("name", "by_hand"), [
    ("kd", lambda step: kd_loss(step.logits, step.teacher_logits, 3.0)),
    ("cwd", lambda step: cwd_loss(step.logits, step.teacher_logits, 2.0)),
    ("dist", lambda step: dist_loss(step.logits, step.teacher_logits, 5.0)),
    ("at", lambda step: attention_loss(step.maps["encoder.stride2"].relu(), step.teacher_maps["decoder.stride2"].relu())),
])
def test_a_rival_reads_what_its_fields_say(name, by_hand, pair, step):
    module = build_terms(ALL, *pair, Measured(fitted().fitted))[name]
    assert TERMS[name].compute(module, step, ALL).item() == pytest.approx(by_hand(step).item(), rel=1e-6)


def test_the_hint_brings_the_student_to_the_teachers_channels(pair, step):
    module = build_terms(ALL, *pair, Measured(fitted().fitted))["fitnets"]
    assert isinstance(module, OnMaps) and module.pairs == [("decoder.stride4", "decoder.stride4")]
    by_hand = hint_loss(module.regressors[0](step.maps["decoder.stride4"].relu()), step.teacher_maps["decoder.stride4"].relu())
    assert TERMS["fitnets"].compute(module, step, ALL).item() == pytest.approx(by_hand.item(), rel=1e-6)


@pytest.mark.parametrize("margin", ["bn", "empirical"])
def test_measured_margins_count_where_the_configuration_asks_for_them(margin, pair, step):
    measured, cfg = fitted(), ALL.with_values(terms="feat", margin=margin)
    module = build_terms(cfg, *pair, measured)["feat"]
    expected = measured.margins["decoder.stride2"] if margin == "empirical" else bn_margin(pair[1].feature_norms()["decoder.stride2"])
    assert torch.equal(module.margin0, expected) and module.level_weights == "area"
    assert TERMS["feat"].compute(module, step, cfg).item() == pytest.approx(module(step.maps, step.teacher_maps).item())


@pytest.mark.parametrize(("graph", "kind"), [("frozen", EdgeReasoning), ("joint", EdgeReasoning), ("relation", EdgeRelation)])
def test_the_graph_is_the_one_that_the_configuration_names(graph, kind, pair, step):
    cfg, measured = ALL.with_values(terms="edge", graph=graph, shuffle_edges=True), fitted()
    module = build_terms(cfg, *pair, measured)["edge"]
    assert type(module) is kind and (module.graph.grid, module.graph.frame) == (2, "lesion")
    assert module.student_map == module.teacher_map == "encoder.stride2"
    if graph == "frozen":
        assert module.graph is measured.fitted.graph and (module.std == 0.5).all() and module.head is None
    if graph == "joint":
        assert module.graph.phi.weight.shape == (5, 6, 1, 1) and module.head is not None
        assert all(p.requires_grad for p in module.graph.parameters())
    got = TERMS["edge"].compute(module, step, cfg).item()
    assert got == pytest.approx(module(step.maps, step.teacher_maps, derange(step.edge)).item(), rel=1e-5)
    assert got != pytest.approx(module(step.maps, step.teacher_maps, step.edge).item(), rel=1e-5)


def test_a_graph_learned_along_is_as_wide_as_the_teachers_map(pair):
    cfg = ALL.with_values(terms="edge", graph="joint", edge_level="encoder.stride2:decoder.stride2")
    assert build_terms(cfg, *pair, Measured())["edge"].graph.phi.in_channels == 3


@pytest.mark.parametrize("graph", ["frozen", "joint", "relation"])
def test_of_a_pair_of_maps_the_first_is_the_students(graph, pair):
    level, names = "encoder.stride2:decoder.stride2", ("encoder.stride2", "decoder.stride2")
    cfg = ALL.with_values(feature_levels=level, fitnets_levels=level, edge_level=level, graph=graph)
    modules = build_terms(cfg, *pair, fitted())
    assert [modules[name].pairs for name in ("feat", "fitnets", "at")] == [[names]] * 3
    assert (modules["edge"].student_map, modules["edge"].teacher_map) == names
    assert modules["feat"].connectors[0][0].weight.shape[:2] == modules["fitnets"].regressors[0][0][0].weight.shape[:2] == (3, 4)


def test_the_teacher_is_asked_for_a_map_that_only_it_has():
    level, names = "encoder.stride16:decoder.stride16", ("encoder.stride16", "decoder.stride16")
    modules = build_terms(DistillConfig(terms="at, edge", at_levels=level, edge_level=level, graph="relation"), UNet(width=2), ResNet34UNet(), Measured())
    assert modules["at"].pairs == [names] and (modules["edge"].student_map, modules["edge"].teacher_map) == names


def test_a_terms_start_depends_on_the_seed_alone(pair):
    torch.manual_seed(9)
    before = torch.get_rng_state()
    alone = build_terms(ALL.with_values(terms="feat"), *pair, Measured())
    assert set(alone) == {"feat"} and isinstance(alone["feat"], FeatureRefinement)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(10)
    beside = build_terms(ALL, *pair, Measured(fitted().fitted))
    assert list(beside) == list(TERMS)
    other = build_terms(ALL.with_values(terms="feat", seed=5), *pair, Measured())
    start, again, another = (terms["feat"].connectors[0][0].weight for terms in (alone, beside, other))
    assert torch.equal(start, again) and not torch.equal(start, another)
