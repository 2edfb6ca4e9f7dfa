"""Every fault put into the formulas of the losses is seen by a test; what nobody could see is listed with the reason."""

import random

import pytest

from tests.mutants import Mutant, modules, mutants, verdicts

EQUIVALENT: dict[str, list[str]] = {
    "what stands there is never read": [
        "losses._reasoning: …(student, teacher, graph, torch.ones(cfg.states), c… -> …(student, teacher, graph, torch.zeros(cfg.states), c…",
        "losses.edge_reasoning.EdgeGraph.cells: Cells(edge, edge.new_zeros(0), edge.new_o… -> Cells(edge, edge.new_ones(0), edge.new_o…",
        "losses.edge_reasoning.EdgeGraph.cells: Cells(edge, edge.new_zeros(0), edge.new_ones… -> Cells(edge, edge.new_zeros(1), edge.new_ones…",
        "losses.edge_reasoning.EdgeRelation.__init__: EdgeGraph(1, 1, grid, frame… -> EdgeGraph(2, 1, grid, frame…",
        "losses.edge_reasoning.EdgeRelation.__init__: EdgeGraph(1, 1, grid, frame=fr… -> EdgeGraph(1, 2, grid, frame=fr…",
    ],
    "a guard whose branch is not taken where it would matter: gamma = 0, or x < 0 rarer than 0.001": [
        "losses.feature_refinement.bn_margin: sigma.clamp_min(torch.finfo(torch.float64).tiny) -> sigma",
        "losses.feature_refinement.bn_margin: negative_share.clamp_min(1e-300) -> negative_share",
        "losses.feature_refinement.bn_margin: negative_share.clamp_min(1e-300) -> negative_share.clamp_min(1e-294)",
    ],
    "only an image without an edge comes here, and its pixels belong to no node": [
        "losses.edge_reasoning.grid_cells: …ace, size).amin(1, keepdim=True).clamp_max(size - 1) -> …ace, size).amin(1, keepdim=True)",
        "losses.edge_reasoning.grid_cells: …1, keepdim=True).clamp_max(size - 1) -> …1, keepdim=True).clamp_max(size + 1)",
        "losses.edge_reasoning.grid_cells: …(1, keepdim=True).clamp_max(size - 1) -> …(1, keepdim=True).clamp_max(size)",
        "losses.edge_reasoning.grid_cells: torch.where(has, place, -1) -> torch.where(has, place, -2)",
    ],
    "the same number: division, long() and max convert or cut by themselves, gamma is double where beta is, and the other way round": [
        "losses.feature_refinement.bn_margin: bn.weight.detach().cpu().double() -> bn.weight.detach().cpu()",
        "losses.feature_refinement.bn_margin: bn.bias.detach().cpu().double() -> bn.bias.detach().cpu()",
        "losses.edge_reasoning.grid_cells: torch.full((n, 1), float(size), device=edge.de… -> torch.full((n, 1), size, device=edge.de…",
        "losses.edge_reasoning.grid_cells: …d(((place - low) * grid / span).floor().clamp(0, grid - … -> …d(((place - low) * grid / span).clamp(0, grid - …",
        "losses.feature_refinement.FeatureRefinement._target: refinement_target(teacher.float(), self.get_buffe… -> refinement_target(teacher, self.get_buffe…",
    ],
    "the same number: zero times a sum is zero times a mean, pairs of nodes come in twos, a squared difference has no sign, a norm is divided by": [
        "losses.baselines.attention_loss: _precise(x).square().sum(1) -> _precise(x).square().mean(1)",
        "losses.edge_reasoning.EdgeHead.forward: self.head.weight.sum() * 0.0 -> self.head.weight.mean() * 0.0",
        "losses.edge_reasoning.EdgeReasoning._learned_along: return x.sum() * 0.0 -> return x.mean() * 0.0",
        "losses.edge_reasoning.EdgeRelation.forward: pairs.sum((1, 2)).clamp_min(1) -> pairs.sum((1, 2)).clamp_min(2)",
        "losses.edge_reasoning.EdgeRelation.forward:  for m in (x, target) ->  for m in (target, x)",
    ],
    "masks are 0 or 1, shares are not 0.001 to the last digit, strides of a pair are equal, a key of a dictionary may be any": [
        "edges.edge_label_batch: label = masks > 0.5 -> label = masks >= 0.5",
        "edges.edge_label_batch: label = masks > 0.5 -> label = masks > 0.6",
        "losses.feature_refinement.bn_margin: torch.where(negative_share > 0.001, mean_bel… -> torch.where(negative_share >= 0.001, mean_bel…",
        "losses.feature_refinement.FeatureRefinement.__init__: lambda pair: stride_of(pair[0]) -> lambda pair: stride_of(pair[1])",
        "losses.feature_refinement.FeatureRefinement.__init__: 'empirical' if margins else 'bn… -> 'empirical' if not margins else 'bn…",
    ],
    "an edge lies between the same pixels when both labels are exchanged": [
        "edges.edge_label_batch: label = masks > 0.5 -> label = masks < 0.5",
    ],
    "a graph that is frozen and a target that is detached have no gradient: this spares memory": [
        "losses.edge_reasoning.EdgeReasoning.forward: with torch.no_grad(): -> if True:",
    ],
    "of several processes alone, which tests/test_distributed.py starts": [
        "losses: …re=cfg.dist_temperature), whole=True) -> …re=cfg.dist_temperature), whole=False)",
        "losses.baselines.OnLogits.__init__: False -> True",
        "losses.baselines.OnLogits.forward: …er(x.float()) for x in both) if self.whole else … -> …er(x.float()) for x in both) if not self.whole else …",
        "losses.baselines.OnLogits.forward: (ranks.gather(x.float()) for x in both) -> (ranks.gather(x) for x in both)",
        "losses.edge_reasoning.EdgeHead.forward: share * F.binary_cross_e… -> F.binary_cross_e…",
        "losses.edge_reasoning.EdgeReasoning._learned_along: ranks.gather(cells.live.float()) -> ranks.gather(cells.live)",
    ],
}
"""Mutants that change nothing that can be seen, by reason."""

SAMPLE = 25


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
    """The code as it is has to survive, or what kills it would kill every mutant."""
    found = verdicts(["", *keys])
    assert found.pop("") == "survived", "the tests of the losses fail on the code as it is"
    assert set(found) == set(keys) and set(found.values()) <= {"killed", "survived"}, found
    return {key for key, verdict in found.items() if verdict == "survived"}


def test_a_fault_of_every_kind_in_every_module_is_seen():
    sample = drawn(random.Random(0))
    assert {mutant.module for mutant in sample} == set(modules()) and len({mutant.kind for mutant in sample}) == 8
    assert not survivors([mutant.key for mutant in sample])


def test_what_is_listed_as_equivalent_is_among_the_mutants():
    assert equivalent() <= set(mutants())


@pytest.mark.soak
def test_every_fault_is_seen_but_those_that_change_nothing():
    assert survivors(list(mutants())) == equivalent()
