"""Training steps and inference, each held against a plain version in the same run; nothing here asserts a time."""

import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lesionkd_core.config import STUDY_ARMS, AblationConfig, DistillConfig
from lesionkd_core.datasets import phantom
from lesionkd_core.inference import build
from lesionkd_core.losses import EdgeGraph, FittedGraph, Measured, build_terms, grid_cells
from lesionkd_core.losses.feature_refinement import bn_margin
from lesionkd_core.networks import ResNet34UNet, UNet
from lesionkd_core.stages import distill_arms, fit_graph
from lesionkd_core.training import Look, Objective

PIXELS, BATCH = 128, 16
ARMS = ["", "feat", "edge", "feat, edge", "feat, edge", "kd", "cwd", "dist"]  # as many as the study has


def silent(*_):
    pass


@pytest.fixture(autouse=True)
def two_threads():
    torch.set_num_threads(2)
    torch.manual_seed(0)


def batch(pixels: int = PIXELS, size: int = BATCH) -> tuple[torch.Tensor, torch.Tensor]:
    masks = torch.zeros(size, 1, pixels, pixels)
    masks[..., pixels // 3 : 2 * pixels // 3, pixels // 4 : 2 * pixels // 3] = 1
    return torch.randn(size, 3, pixels, pixels).contiguous(memory_format=torch.channels_last), masks


def frozen(network: nn.Module) -> nn.Module:
    return network.eval().requires_grad_(False).to(memory_format=torch.channels_last)


def look_at(teacher: nn.Module, images, masks) -> Look:
    with torch.no_grad():
        return Look(masks, *teacher.forward_features(images))


def student_step(terms: str, teacher: nn.Module, graph: FittedGraph):
    """A step of this project: (images, masks, look) -> None."""
    cfg = DistillConfig(profile="cpu", terms=terms)
    student = build(cfg)
    objective = Objective(student, build_terms(cfg, student, teacher, Measured(graph)), cfg).to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW([p for p in objective.parameters() if p.requires_grad], cfg.lr, fused=True)

    def step(images, masks, look) -> None:
        sum(objective(images, masks, look).values()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


class PlainTerms(nn.Module):
    """L_feat and L_edge as one would write them down first, on torch's own layers."""

    LEVELS = {"decoder.stride8": (16, 128), "decoder.stride4": (8, 64), "decoder.stride2": (4, 32)}

    def __init__(self, teacher: nn.Module) -> None:
        super().__init__()
        joined = lambda s, t: nn.Sequential(nn.Conv2d(s, t, 1, bias=False), nn.BatchNorm2d(t))  # noqa: E731
        self.connectors = nn.ModuleList(joined(s, t) for s, t in self.LEVELS.values())
        self.edge_connector, self.phi, self.theta = joined(16, 64), nn.Conv2d(64, 16, 1), nn.Conv2d(64, 16, 1)
        self.nodes, self.states = nn.Linear(16, 16), nn.Linear(16, 16, bias=False)
        for fixed in (self.phi, self.theta, self.nodes, self.states):
            fixed.requires_grad_(False)  # the graph is frozen
        self.margins = [bn_margin(teacher.feature_norms()[name]) for name in self.LEVELS]

    def refinement(self, maps, teacher_maps):
        total = 0
        for connector, margin, name in zip(self.connectors, self.margins, self.LEVELS):
            s, t = connector(maps[name]), torch.maximum(teacher_maps[name], margin.view(1, -1, 1, 1))
            loss = F.mse_loss(s, t, reduction="none")
            total = total + (loss * ((s > t) | (t > 0)).float()).mean()
        return total

    def graph(self, x, edge):
        keys, states = self.theta(x).flatten(2), self.phi(x).flatten(2)
        member = grid_cells(edge, 4) * edge.flatten(2)
        live = member.sum(-1) > 0
        anchors = keys @ member.transpose(1, 2) / member.sum(-1).clamp_min(1e-6).unsqueeze(1)
        assigned = (anchors.transpose(1, 2) @ keys).masked_fill(~live.unsqueeze(-1), -1e30).softmax(1)
        nodes = states @ assigned.transpose(1, 2) / assigned.sum(-1).clamp_min(1e-6).unsqueeze(1)
        return self.states((self.nodes(nodes) - nodes).transpose(1, 2)).transpose(1, 2), live

    def reasoning(self, maps, teacher_maps, masks):
        edge = F.max_pool2d(masks, 3, 1, 1) - masks
        edge = F.max_pool2d(edge, 4)
        h_s, live = self.graph(self.edge_connector(maps["encoder.stride4"]), edge)
        with torch.no_grad():
            h_t, _ = self.graph(teacher_maps["encoder.stride4"], edge)
        return ((h_s - h_t).square().mean(1) * live).sum() / live.sum()


def plain_norms(network: nn.Module) -> nn.Module:
    """The same network on torch's own BatchNorm."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.__class__ = nn.BatchNorm2d
    return network


def plain_step(terms: str, teacher: nn.Module):
    """The prototype that this project is held against."""
    student, extra = plain_norms(UNet(width=4)), PlainTerms(teacher)
    both = nn.ModuleList([student, extra]).to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(both.parameters(), 5e-3)

    def step(images, masks, look) -> None:
        logits, maps = student.forward_features(images)
        loss = F.binary_cross_entropy_with_logits(logits, masks)
        loss = loss + (extra.refinement(maps, look.maps) if "feat" in terms else 0)
        loss = loss + (0.1 * extra.reasoning(maps, look.maps, masks) if "edge" in terms else 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def test_a_students_step_against_a_plain_version(in_turns, report):
    """Teacher pass apart: 128 px, batch 16, two threads."""
    images, masks = batch()
    teacher = frozen(ResNet34UNet())
    graph, look = FittedGraph(EdgeGraph(64), torch.ones(16)), look_at(teacher, images, masks)
    steps = {"frozen ResNet34-UNet pass": lambda: look_at(teacher, images, masks)}
    for name, terms in {"BCE alone": "", "+ L_feat": "feat", "+ L_edge": "edge", "both terms": "feat, edge"}.items():
        plain, ours = plain_step(terms, teacher), student_step(terms, teacher, graph)
        steps[f"plain step, {name}"] = lambda step=plain: step(images, masks, look)
        steps[f"step, {name}"] = lambda step=ours: step(images, masks, Look(masks, look.logits, look.maps))  # nothing shared with other arms
    ours = student_step("feat, edge", teacher, graph)
    steps["step, both terms, beside other arms"] = lambda: ours(images, masks, look)  # what the teacher becomes in the losses is there
    medians = in_turns(steps, "step, BCE alone")
    for name in ("BCE alone", "+ L_feat", "+ L_edge", "both terms"):
        report(f"step / plain step, {name}", medians[f"step, {name}"] / medians[f"plain step, {name}"], "ratio")


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_eight_arms_in_lockstep_against_each_alone(in_turns, precision):
    images, masks = batch()
    teacher = frozen(ResNet34UNet())
    graph = FittedGraph(EdgeGraph(64), torch.ones(16))
    steps = [student_step(terms, teacher, graph) for terms in ARMS]

    def alone() -> None:
        for terms, step in zip(ARMS, steps):
            step(images, masks, look_at(teacher, images, masks) if terms else None)

    def together() -> None:
        look = look_at(teacher, images, masks)
        for terms, step in zip(ARMS, steps):
            step(images, masks, look if terms else None)

    with torch.autocast("cpu", torch.bfloat16, enabled=precision != "32-true"):
        medians = in_turns({
            f"8 arms, each alone, {precision}": alone, f"8 arms in lockstep, {precision}": together,
            f"one arm alone without a teacher, {precision}": lambda: steps[0](images, masks, None),
            f"one arm with L_feat and L_edge and its teacher pass, {precision}": lambda: steps[3](images, masks, look_at(teacher, images, masks)),
        }, f"8 arms, each alone, {precision}", rounds=5, warmup=1)
    print({name: round(value) for name, value in medians.items()})


def test_whole_runs_of_eight_arms_in_lockstep_against_each_alone(in_turns, monkeypatch, tmp_path):
    """From finished teacher and graph to scored students: batches, augmentation, validation, checkpoints and test scores are part of it."""
    monkeypatch.setenv("LESIONKD_RUNS", str(tmp_path))
    cfg = AblationConfig(pixels=128, cases=160, batch_size=16, teacher_epochs=1, graph_epochs=1, epochs=2, weak_teacher="allow")
    fit_graph(cfg, silent)
    arms = [cfg.arm(arm, 0) for arm in STUDY_ARMS]

    def train(*groups: list[DistillConfig]) -> None:
        shutil.rmtree(tmp_path / "distill", ignore_errors=True)
        for group in groups:
            distill_arms(group, silent)

    runs = {"runs of 8 arms, each alone": lambda: train(*([arm] for arm in arms)), "runs of 8 arms in lockstep": lambda: train(arms)}
    in_turns(runs, "runs of 8 arms, each alone", rounds=2, warmup=0)


@pytest.mark.parametrize("what", ["training step", "inference"])
def test_the_students_cost_against_both_teachers(in_turns, what):
    networks = {"student": UNet(width=4), "U-Net 64": UNet(width=64), "ResNet34-UNet": ResNet34UNet()}
    images, masks = batch(size=4)
    steps = {}
    for name, network in networks.items():
        network.to(memory_format=torch.channels_last).train(what == "training step")

        def step(network=network) -> None:
            if what == "training step":
                F.binary_cross_entropy_with_logits(network(images), masks).backward()
                network.zero_grad()
            else:
                with torch.inference_mode():
                    network(images)

        steps[f"{what} of {name}, batch 4"] = step
    in_turns(steps, f"{what} of student, batch 4", rounds=4, warmup=1)


@pytest.mark.parametrize("what", ["training step", "inference"])
def test_compiled_against_eager(in_turns, what):
    """Whether torch.compile pays on this machine; it is not used."""
    images, masks = batch()
    student = UNet(width=4).to(memory_format=torch.channels_last).train(what == "training step")
    compiled = torch.compile(student)

    def step(network) -> None:
        if what == "training step":
            F.binary_cross_entropy_with_logits(network(images), masks).backward()
            student.zero_grad()
        else:
            with torch.inference_mode():
                network(images)

    in_turns({f"{what} of student, eager": lambda: step(student), f"{what} of student, compiled": lambda: step(compiled)}, f"{what} of student, eager")


def test_cost_against_pixels_images_and_arms(in_turns):
    """Points for the figure in docs/speed.md: cost should grow no faster than the work."""
    teacher = frozen(ResNet34UNet())
    graph = FittedGraph(EdgeGraph(64), torch.ones(16))
    steps = {}
    for pixels in (64, 128, 256):
        images, masks = batch(pixels, 8)
        step = student_step("feat, edge", teacher, graph)
        steps[f"step at {pixels} px, batch 8"] = lambda step=step, images=images, masks=masks: step(images, masks, look_at(teacher, images, masks))
    for size in (8, 16, 32):
        images, masks = batch(64, size)
        step = student_step("feat, edge", teacher, graph)
        steps[f"step at 64 px, batch {size}"] = lambda step=step, images=images, masks=masks: step(images, masks, look_at(teacher, images, masks))
    images, masks = batch(64)
    students = [student_step("feat, edge", teacher, graph) for _ in range(8)]
    for count in (1, 2, 4, 8):
        def lockstep(count=count) -> None:
            look = look_at(teacher, images, masks)
            for step in students[:count]:
                step(images, masks, look)

        steps[f"{count} arms at 64 px, batch 16"] = lockstep
    in_turns(steps, "step at 64 px, batch 8", rounds=5, warmup=1)


def test_deterministic_operations_against_the_usual_ones(in_turns):
    """The switch `deterministic`, on this machine's CPU."""
    teacher = frozen(ResNet34UNet())
    images, masks = batch()
    look = look_at(teacher, images, masks)

    def under(switch: bool):
        step = student_step("feat, edge", teacher, FittedGraph(EdgeGraph(64), torch.ones(16)))

        def switched() -> None:
            torch.use_deterministic_algorithms(switch)
            step(images, masks, look)
            torch.use_deterministic_algorithms(False)

        return switched

    in_turns({"student's step, usual": under(False), "student's step, deterministic": under(True)}, "student's step, usual")


@pytest.mark.parametrize("look", phantom.LOOKS)
def test_drawing_a_phantom_case_at_128_px(benchmark, report, look):
    torch.set_num_threads(1)
    index = iter(range(10**6))
    benchmark.pedantic(lambda: phantom.draw(look, 0, next(index), 128), rounds=200, warmup_rounds=5)
    report(f"phantom {look}, 128 px, one thread", 1 / benchmark.stats.stats.median, "images/s")


def test_importing_against_starting_python(in_turns):
    def start(code: str):
        return lambda: subprocess.run([sys.executable, "-c", code], check=True)

    in_turns({
        "starting Python": start("pass"), "import lesionkd_core": start("import lesionkd_core"),
        "from lesionkd_core import PrepareConfig": start("from lesionkd_core import PrepareConfig"),
    }, "starting Python", rounds=7, warmup=1)
