"""A fault in a formula of the losses makes a test fail; faults without effect are listed, with why."""
# ruff: noqa: E501  # keys of mutants are generated text

import random

import pytest

from tests.mutants import Mutant, modules, mutants, verdicts

EQUIVALENT: dict[str, list[str]] = {
    "the value is never read": [
        "losses.edge_reasoning.JointEdgeReasoning.__init__: …(student, teacher, graph, torch.ones(states), level… -> …(student, teacher, graph, torch.zeros(states), level…",
        "losses.edge_reasoning.EdgeRelation.__init__: EdgeGraph(1, 1, grid, frame… -> EdgeGraph(2, 1, grid, frame…",
        "losses.edge_reasoning.EdgeRelation.__init__: EdgeGraph(1, 1, grid, frame=fr… -> EdgeGraph(1, 2, grid, frame=fr…",
    ],
    "a guard that acts only where its branch is not taken: gamma = 0, or P(x < 0) at most 0.001": [
        "losses.feature_refinement.bn_margin: sigma.clamp_min(torch.finfo(torch.float64).tiny) -> sigma",
        "losses.feature_refinement.bn_margin: negative.clamp_min(1e-300) -> negative",
        "losses.feature_refinement.bn_margin: negative.clamp_min(1e-300) -> negative.clamp_min(1e-294)",
    ],
    "only an image without an edge comes here, and its pixels belong to no node": [
        "losses.edge_reasoning.grid_cells: …ace, size).amin(1, keepdim=True).clamp_max(size - 1) -> …ace, size).amin(1, keepdim=True)",
        "losses.edge_reasoning.grid_cells: …1, keepdim=True).clamp_max(size - 1) -> …1, keepdim=True).clamp_max(size + 1)",
        "losses.edge_reasoning.grid_cells: …(1, keepdim=True).clamp_max(size - 1) -> …(1, keepdim=True).clamp_max(size)",
        "losses.edge_reasoning.grid_cells: torch.where(has, place, -1) -> torch.where(has, place, -2)",
    ],
    "the same number: division, long() and max convert or cut by themselves": [
        "losses.feature_refinement.bn_margin: bn.weight.detach().cpu().double() -> bn.weight.detach().cpu()",
        "losses.feature_refinement.bn_margin: bn.bias.detach().cpu().double() -> bn.bias.detach().cpu()",
        "losses.edge_reasoning.grid_cells: torch.full((n, 1), float(size), device=edge.de… -> torch.full((n, 1), size, device=edge.de…",
        "losses.edge_reasoning.grid_cells: …d(((place - low) * grid / span).floor().clamp(0, grid - … -> …d(((place - low) * grid / span).clamp(0, grid - …",
    ],
    "the same number: 0 times a sum is 0 times a mean, pairs come in twos, a norm is divided by": [
        "losses.baselines.attention_loss: _precise(x).square().sum(1) -> _precise(x).square().mean(1)",
        "losses.edge_reasoning.EdgeHead.forward: self.head.weight.sum() * 0.0 -> self.head.weight.mean() * 0.0",
        "losses.edge_reasoning.JointEdgeReasoning.compare: return x.sum() * 0.0 -> return x.mean() * 0.0",
        "losses.edge_reasoning.EdgeRelation.forward: pairs.sum((1, 2)).clamp_min(1) -> pairs.sum((1, 2)).clamp_min(2)",
    ],
    "masks are 0 or 1, P(x < 0) is not 0.001 to the last digit, strides of a pair are equal": [
        "edges.edge_label_batch: label = masks > 0.5 -> label = masks >= 0.5",
        "edges.edge_label_batch: label = masks > 0.5 -> label = masks > 0.6",
        "losses.feature_refinement.bn_margin: torch.where(negative > 0.001, margin, … -> torch.where(negative >= 0.001, margin, …",
        "losses.feature_refinement.FeatureRefinement.__init__: lambda pair: stride_of(pair[0]) -> lambda pair: stride_of(pair[1])",
    ],
    "exchanging both labels leaves the edge where it is": [
        "edges.edge_label_batch: label = masks > 0.5 -> label = masks < 0.5",
    ],
    "a frozen graph and a detached target have no gradient: no_grad only saves memory": [
        "losses.edge_reasoning.EdgeReasoning.compare: with torch.no_grad(): -> if True:",
    ],
}
"""Mutants without an effect that a test could see, by reason."""

SAMPLE = 13
"""Enough for every kind and every module; `make soak` runs all."""


def equivalent() -> set[str]:
    return {key for keys in EQUIVALENT.values() for key in keys}


def drawn(rng: random.Random) -> list[Mutant]:
    """Some mutants, among them one of every kind and of every module."""
    pool = [mutant for key, mutant in mutants().items() if key not in equivalent()]
    rng.shuffle(pool)
    seen, first, rest = set(), [], []
    for mutant in pool:
        (rest if {mutant.kind, mutant.module} <= seen else first).append(mutant)
        seen |= {mutant.kind, mutant.module}
    return (first + rest)[:SAMPLE]


def survivors(keys: list[str]) -> set[str]:
    """Keys of mutants that no test notices; the unchanged code must pass all tests."""
    found = verdicts(["", *keys])
    assert found.pop("") == "survived", "the tests of the losses fail on the code as it is"
    assert set(found) == set(keys) and set(found.values()) <= {"killed", "survived"}, found
    return {key for key, verdict in found.items() if verdict == "survived"}


def test_a_fault_of_every_kind_in_every_module_is_seen():
    sample = drawn(random.Random(0))
    assert {mutant.module for mutant in sample} == set(modules())
    assert len({mutant.kind for mutant in sample}) == 8
    assert not survivors([mutant.key for mutant in sample])


def test_what_is_listed_as_equivalent_is_among_the_mutants():
    assert equivalent() <= set(mutants())


@pytest.mark.soak
def test_every_fault_is_seen_but_those_that_change_nothing():
    assert survivors(list(mutants())) == equivalent()
