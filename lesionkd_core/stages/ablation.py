"""Trained students of every arm and seed -> their comparison."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import pandas as pd

from .. import ranks, store
from ..config import ARMS, AblationConfig
from ..external import score_external, with_test_dataset
from ..progress import Tell
from ..statistics import compare_arms
from .student import distill_arms
from .teacher import Run, train_teacher


class Ablation(store.Result):
    """All arms and seeds on the same cases: `per_case` has the columns arm and seed."""

    @cached_property
    def table(self) -> pd.DataFrame:
        """One row a test data set and arm: mean test scores over seeds, the Dice of every seed, missed lesions."""
        return store.read_table(self.path / "table.csv")

    @cached_property
    def comparison(self) -> pd.DataFrame:
        """The method against every other arm on each test data set, Dice; see `compare_arms`."""
        return store.read_table(self.path / "comparison.csv")

    @cached_property
    def history(self) -> pd.DataFrame:
        """One row an epoch of every run: columns arm, seed, epoch, val_dice, loss_TERM, grad_TERM, cos_TERM."""
        return pd.concat([run.history.assign(arm=arm, seed=seed) for (arm, seed), run in self.runs.items()], ignore_index=True)

    @cached_property
    def runs(self) -> dict[tuple[str, int], Run]:
        """{(arm, seed): its run}."""
        return {(row["arm"], row["seed"]): Run(store.runs_root() / row["path"]) for row in self.summary["runs"]}


def ablate(cfg: AblationConfig, tell: Tell = print) -> Ablation:
    """Find or train every arm and seed, and compare them; an arm added later leaves the others alone.

    The frozen teacher's own scores stand among them as arm `teacher`, where an arm has one.
    """
    runs = {}
    for seed in cfg.seeds:
        for arm, run in zip(cfg.arms, distill_arms([cfg.arm(arm, seed) for arm in cfg.arms], tell)):
            runs[arm, seed] = run
    scored = dict(runs)
    if any(ARMS[arm]["terms"] for arm in cfg.arms):
        scored["teacher", cfg.teacher_seed] = train_teacher(cfg, tell)
    return ranks.after_first(lambda: _compare(cfg, scored, runs, tell))


def _compare(cfg: AblationConfig, scored: dict[tuple[str, int], Run], runs: dict[tuple[str, int], Run], tell: Tell) -> Ablation:
    others = [external.digest for run in scored.values() for external in score_external(run, cfg, tell).values()]
    upstream = "|".join([run.digest for run in scored.values()] + others)
    path = store.folder(cfg, upstream)
    with store.lock(path, tell):
        if not store.is_done(path):
            store.begin(path, cfg, upstream)
            _collect(path, cfg, scored, runs)
            store.finish(path)
    return Ablation(path)


def _collect(path: Path, cfg: AblationConfig, scored: dict[tuple[str, int], Run], runs: dict[tuple[str, int], Run]) -> None:
    test = pd.concat([with_test_dataset(run, cfg).assign(arm=arm, seed=seed) for (arm, seed), run in scored.items()])
    test = test.sort_values("test_dataset", key=lambda names: pd.factorize(names)[0], kind="stable")
    by_arm = test.groupby(["test_dataset", "arm"], sort=False)
    means = by_arm[["dice", "iou", "sensitivity", "precision", "hd95", "surface_dice"]].mean()
    students = test[test["arm"] != "teacher"]
    seeds = students.pivot_table(index=["test_dataset", "arm"], columns="seed", values="dice").add_prefix("dice_seed")
    counts = by_arm[["missed", "false_alarm"]].sum().div(by_arm["seed"].nunique(), axis=0)
    store.write_table(path / "per_case.csv", test)
    store.write_table(path / "table.csv", means.join(seeds).join(counts).reset_index())
    store.write_table(path / "comparison.csv", compare_arms(test))
    root = store.runs_root()
    store.write_json(path / "summary.json", {
        "runs": [{"arm": a, "seed": s, "path": run.path.relative_to(root).as_posix(), "summary": run.summary["test"]} for (a, s), run in runs.items()],
    })
