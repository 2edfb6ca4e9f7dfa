"""The study's tables: what every run scored, as CSV from which all figures are drawn without training."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from . import store
from .config import PROFILES, AblationConfig
from .evaluation import PUBLISHED
from .external import with_test_dataset
from .progress import Tell
from .stages import Run, ablate, train_teacher
from .statistics.arms import by_seed, case_mean, families

PER_CASE = (
    "run", "dataset", "test_dataset", "profile", "teacher", "arm", "seed", "split", "fold", "case", "group", "lesion_px", "contrast",
    "dice", "iou", "sensitivity", "precision", "hd95", "surface_dice", "missed", "false_alarm",
)
RUNS = ("run", "hash", "dataset", "profile", "teacher", "arm", "seed", "fold", "parameters", "epochs", "seconds", "device", "threads", "precision", "commit")
FILES = ("per_case", "runs", "history")


def study_tables(cfg: AblationConfig, tell: Tell = print) -> dict[str, pd.DataFrame]:
    """per_case, runs and history of an ablation and its teacher, which are found or made on the way.

    per_case holds test cases alone, columns `PER_CASE`; lesion_px in px at the prepared size, contrast 0..1.
    The student alone stands once beside every teacher it is held against.
    """
    runs = {("teacher", cfg.teacher_seed): train_teacher(cfg, tell)} | ablate(cfg, tell).runs
    tables: dict[str, list[pd.DataFrame]] = {name: [] for name in FILES}
    for (arm, seed), run in runs.items():
        about = {
            "run": store.short(run.path).removeprefix("runs/"), "dataset": cfg.dataset_name, "profile": cfg.profile,
            "teacher": cfg.teacher, "arm": arm, "seed": seed, "fold": cfg.fold if cfg.folds else 0,
        }
        tables["per_case"].append(with_test_dataset(run, cfg, tell).rename(columns=PUBLISHED).assign(**about)[list(PER_CASE)])
        tables["runs"].append(pd.DataFrame([about | _facts(run, cfg)])[list(RUNS)])
        tables["history"].append(run.history.assign(**about))
    return {name: pd.concat(parts, ignore_index=True) for name, parts in tables.items()}


def _facts(run: Run, cfg: AblationConfig) -> dict[str, object]:
    env, summary = store.read_json(run.path / "env.json"), run.summary
    return {
        "hash": run.digest[:16], "parameters": summary["parameters"], "epochs": summary["epochs"], "seconds": summary["seconds"],
        "device": env["device"], "threads": env["threads"], "precision": cfg.precision, "commit": env["commit"],
    }


def add_to_study(cfg: AblationConfig, folder: Path, tell: Tell = print) -> dict[str, pd.DataFrame]:
    """Put the tables of an ablation into `folder`; rows of the same data set, profile, teacher, arm, seed and fold are replaced."""
    key = ["dataset", "profile", "teacher", "arm", "seed", "fold"]
    merged = {}
    for name, new in study_tables(cfg, tell).items():
        path = Path(folder) / f"{name}.csv"
        if path.exists():
            old = store.read_table(path)
            same = pd.MultiIndex.from_frame(old[key]).isin(pd.MultiIndex.from_frame(new[key]))
            new = pd.concat([old[~same], new], ignore_index=True)
        merged[name] = new.sort_values(["dataset", "profile", "teacher", "fold"], kind="stable")
        store.write_table(path, merged[name])
    return merged


def cost_points(per_case: pd.DataFrame, cost: pd.DataFrame, arms: tuple[str, ...] = ("alone", "method")) -> pd.DataFrame:
    """What `figures.pareto` draws: Dice of the study's students of width 4 and of its teachers, beside what their networks cost in ONNX Runtime.

    Returns
    -------
    DataFrame
        dataset, model (student and its arm, or the teacher's network), dice, low, high, parameters, macs and latency_ms_median at the profile's size.
    """
    measured = cost[(cost["engine"] == "ONNX Runtime") & (cost["precision"] == "float32")].set_index(["pixels", "model"])
    rows, several = [], per_case.loc[~per_case["arm"].isin(["teacher", "alone"]), "teacher"].nunique() > 1
    for family, part in families(per_case):
        known = measured.loc[PROFILES[family["profile"]]["pixels"]]
        for arm in ("teacher", *arms):
            if arm not in set(part["arm"]):
                continue
            dice, low, high = case_mean(by_seed(part, arm))
            network = family["teacher"] if arm == "teacher" else "student"
            facts = {name: known.loc[network, name] for name in ("parameters", "macs", "latency_ms_median")}
            model = network if arm == "teacher" else f"student, {arm}" + f" of {family['teacher']}" * (several and arm != "alone")
            rows.append({"dataset": family["test_dataset"], "model": model, "dice": dice, "low": low, "high": high} | facts)
    return pd.DataFrame(rows).drop_duplicates(["dataset", "model"], ignore_index=True)
