"""Sweeps: what a file asks for, what runs share, lost workers, failures, resume; results of many runs as one table."""

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import psutil
import pytest
import torch
import yaml

from lesionkd_core import stages, store
from lesionkd_core.__main__ import main
from lesionkd_core.config import AblationConfig, DistillConfig, LesionKDError, PrepareConfig, TeacherConfig
from lesionkd_core.config.base import LATER
from lesionkd_core.evaluation import METRICS
from lesionkd_core.sweeps import cluster, plan, results
from tests.conftest import ROOT
from tests.test_store import full_disk


@pytest.fixture(autouse=True)
def runs(tmp_path, monkeypatch):
    monkeypatch.setenv("LESIONKD_RUNS", str(tmp_path / "runs"))
    return tmp_path / "runs"


@pytest.fixture
def sweep_of(tmp_path):
    """A sweep file with the given content."""

    def write(content, name="study.yaml") -> Path:
        (tmp_path / name).write_text(content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False))
        return tmp_path / name

    return write


def quiet(*_):
    pass


def named(tasks):
    return [task.label for task in tasks]


def test_every_combination_of_the_product_and_every_included_run_is_there_once(sweep_of):
    tasks = plan.read_sweep(sweep_of({
        "parameters": {"profile": "cpu", "epochs": 3},
        "product": {"dataset": ["phantom-dermoscopy", "phantom-ultrasound"], "teacher": ["resnet34_unet", "unet64"], "seeds": ["0", "1", "2"]},
        "include": [{"dataset": "phantom-ultrasound", "arms": "alone, method", "epochs": 7}, {"dataset": "phantom-ultrasound", "seeds": "1"}],
    }))
    assert len(tasks) == 2 * 2 * 3 + 1, "the second included run is one of the product"
    assert {(t.cfg.dataset, t.cfg.teacher, t.cfg.seeds, t.cfg.epochs) for t in tasks[:12]} == {
        (d, t, (s,), 3) for d in ("phantom-dermoscopy", "phantom-ultrasound") for t in ("resnet34_unet", "unet64") for s in range(3)
    }
    assert (tasks[12].cfg.arms, tasks[12].cfg.epochs, tasks[12].cfg.profile) == (("alone", "method"), 7, "cpu")
    assert tasks[0].label == "05_ablations, epochs 3, dataset phantom-dermoscopy, teacher resnet34_unet, seeds 0", "what all share is not repeated"


def test_one_configuration_written_in_several_ways_is_one_run(sweep_of):
    same = [{}, {"seeds": 1}, {"seeds": "0"}, {"pixels": 64, "profile": "smoke"}, {"device": "cpu"}, {"w_feat": 10}]
    other = [{"test_dataset": "phantom-ultrasound"}, {"seeds": 2}, {"w_feat": 1e-3}]
    assert len(plan.read_sweep(sweep_of({"include": same + other}))) == 4


def test_numbers_are_read_as_a_user_means_them(sweep_of):
    [task] = plan.read_sweep(sweep_of("include:\n  - {lr: 1e-3, w_edge: 2E+1, seeds: '0', arms: [alone, method]}"))
    assert (task.cfg.lr, task.cfg.w_edge, task.cfg.seeds, task.cfg.arms) == (0.001, 20.0, (0,), ("alone", "method"))


@pytest.mark.fault
@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"product": {"teachr": ["unet64"]}}, ["unknown parameter 'teachr'", "did you mean 'teacher'"]),
        ({"product": {"epochs": [1, "many"]}}, ["epochs = 'many'", "valid integer", "passes over the training cases"]),
        ({"product": {"epochs": [0], "teacher": ["unet"]}}, ["epochs = 0", "teacher = 'unet'"]),
        ({"product": {"seeds": [0, 1]}}, ["seeds = 0", "a string lists them"]),
        ({"include": [{"dataset": "phantom-dermoscpy"}, {"dataset": "busy"}]}, ["did you mean 'phantom-dermoscopy'", "did you mean 'busi'"]),
        ({"prodct": {}}, ["unknown parameter 'prodct'", "did you mean 'product'"]),
        ({"product": {"epochs": []}}, ["epochs has no value"]),
        ({"parameters": {"epochs": 1}}, ["names no run"]),
        ("", ["names no run"]),
        ({"include": [3]}, ["include = 3", "valid dictionary"]),
        ({"include": [{1: 2}]}, ["include"]),
        ([1, 2], ["wants notebook, parameters, product, include"]),
        ("product: {epochs: [1, 2}", ["no YAML"]),
        ({"notebook": "05_ablation", "include": [{}]}, ["no notebook '05_ablation'", "did you mean '05_ablations'"]),
        ({"notebook": "03_teacher", "include": [{"epochs": 3}]}, ["unknown parameter 'epochs'", "checked for 03_teacher"]),
        ({"notebook": "07_mobile", "product": {"threshold": [0.4, 0.5]}}, ["07_mobile has no data set", "sweep the notebook of the runs"]),
    ],
)
def test_a_wrong_sweep_file_is_refused_before_anything_starts(sweep_of, runs, capsys, content, words):
    assert main(["sweep", str(sweep_of(content))]) == 1
    error = capsys.readouterr().err
    assert all(word in error for word in words), error
    assert "Traceback" not in error and not runs.exists()


@pytest.mark.fault
def test_a_missing_sweep_file_and_an_absent_scheduler_are_named(sweep_of, capsys, tmp_path):
    assert main(["sweep", str(tmp_path / "no.yaml")]) == 1
    assert "no.yaml: No such file" in capsys.readouterr().err
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("distributed.Client", lambda address, **_: (_ for _ in ()).throw(OSError(f"Timed out trying to connect to {address}")))
        assert main(["sweep", str(sweep_of({"include": [{}]})), "--scheduler", "tcp://127.0.0.1:9"]) == 1
    assert "no Dask scheduler answers at tcp://127.0.0.1:9" in capsys.readouterr().err


def test_the_example_of_the_documentation_is_a_sweep(sweep_of):
    [example] = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "sweeps.md").read_text(), re.S)
    tasks = plan.read_sweep(sweep_of(example))
    assert len(tasks) == 2 * 2 * 3 + 1
    assert "13 runs" in (ROOT / "docs" / "sweeps.md").read_text()


TINY = {"pixels": 32, "cases": 40, "teacher_epochs": 1, "epochs": 12, "graph_epochs": 1, "arms": "alone", "device": "cpu", "weak_teacher": "allow"}


def test_a_shared_teacher_and_shared_arrays_are_tasks_of_their_own(sweep_of):
    tasks = plan.plan(plan.read_sweep(sweep_of({"parameters": TINY, "product": {"teacher": ["resnet34_unet", "unet64"], "seeds": ["0", "1"]}})))
    prepared, *teachers = tasks[:3]
    assert named(tasks[:3]) == ["01_data_prep", "03_teacher, teacher resnet34_unet", "03_teacher, teacher unet64"]
    assert [teacher.needs for teacher in teachers] == [[prepared]] * 2
    assert type(teachers[0].cfg) is TeacherConfig and type(prepared.cfg) is PrepareConfig
    for run in tasks[3:]:
        [teacher] = run.needs
        assert teacher.cfg == run.cfg.upstream(TeacherConfig)
    assert [run.cfg.seeds for run in tasks[3:]] == [(0,), (0,), (1,), (1,)], "runs of the two teachers take turns"


def test_what_one_run_alone_stands_on_is_no_task(sweep_of):
    runs = plan.read_sweep(sweep_of({"product": {"dataset": ["phantom-dermoscopy", "phantom-ultrasound"]}}))
    assert plan.plan(runs) == runs and not any(run.needs for run in runs)


def test_of_runs_with_a_student_in_common_one_trains_it_and_the_others_wait(sweep_of):
    arms = ["alone, method", "alone, feat", "method, shuffled, feat", "shuffled"]
    *_, a, b, c, d = plan.plan(plan.read_sweep(sweep_of({"product": {"arms": arms}})))
    assert [named(run.after) for run in (a, b, c, d)] == [[], named([a]), named([a, b]), named([c])]
    *_, a, b = plan.plan(plan.read_sweep(sweep_of({"product": {"arms": arms[:1], "seeds": [2, "1", "5"]}}))[:2])
    assert b.after == [a], "seed 1 is one of seeds 0 and 1"


def test_a_finished_result_is_found_until_its_stage_computes_something_else(sweep_of, runs, monkeypatch, capsys):
    file = sweep_of({"notebook": "03_teacher", "include": [TINY_TEACHER]})
    [task] = plan.read_sweep(file)
    folder = runs / "teacher" / "phantom-0123"
    folder.mkdir(parents=True)
    task.target.parent.mkdir(parents=True)
    outputs = [{"output_type": "stream", "name": "stdout", "text": ["runs/teacher/phantom-0123\n", "DONE\n"]}]
    task.target.write_text(json.dumps({"cells": [{"cell_type": "code", "outputs": outputs}]}))
    assert cluster.finished_results(task.target) is None, "no DONE in the folder"
    (folder / "DONE").touch()
    assert main(["sweep", str(file)]) == 0 and "1 found" in capsys.readouterr().out
    assert pd.read_csv(runs / "sweeps" / "study.csv")["results"].tolist() == ["runs/teacher/phantom-0123"]
    monkeypatch.setattr(TeacherConfig, "version", TeacherConfig.version + 1)
    assert plan.read_sweep(file)[0].target != task.target


TINY_TEACHER = {name: value for name, value in TINY.items() if name in TeacherConfig.model_fields}


def tasks_on(*devices):
    return [SimpleNamespace(cfg=SimpleNamespace(device=device)) for device in devices]


@pytest.mark.parametrize(
    ("tasks", "workers", "gpus", "expected"),
    [
        (tasks_on(*["auto"] * 9), 0, 0, [("", "2", None)] * 4),
        (tasks_on(*["auto"] * 3), 0, 0, [("", "2", None)] * 3),
        (tasks_on(*["auto"] * 9), 2, 0, [("", "4", None)] * 2),
        (tasks_on("auto", "cuda"), 0, None, [("3", "4", {"GPU": 1}), ("7", "4", {"GPU": 1})]),
        (tasks_on("auto", "cuda"), 0, 4, [(gpu, "2", {"GPU": 1}) for gpu in "3737"]),
        (tasks_on("cuda", "cpu"), 0, 1, [("3", "4", {"GPU": 1}), ("", "4", None)]),
    ],
    ids=["memory bounds workers", "runs bound workers", "as asked", "a slot for each GPU", "several slots for each GPU", "GPU and CPU"],
)
def test_the_machine_is_divided_among_the_workers(monkeypatch, tasks, workers, gpus, expected):
    monkeypatch.setattr("dask.system.CPU_COUNT", 8)
    monkeypatch.setattr("distributed.system.MEMORY_LIMIT", 4 * cluster.MEMORY_OF_A_RUN + 1)
    monkeypatch.setattr(cluster, "_gpus", lambda: ["3", "7"])
    slots = cluster._slots(tasks, workers, gpus)
    assert [(slot["env"]["CUDA_VISIBLE_DEVICES"], slot["env"]["OMP_NUM_THREADS"], slot.get("resources")) for slot in slots] == expected
    assert {slot["nthreads"] for slot in slots} == {1}, "a worker runs one notebook at a time"


@pytest.mark.fault
def test_a_run_that_wants_a_gpu_is_refused_where_there_is_no_slot(monkeypatch):
    monkeypatch.setattr(cluster, "_gpus", list)
    with pytest.raises(LesionKDError, match="no GPU slot"):
        cluster._slots(tasks_on("cpu", "cuda"), 0, None)
    workers = {"tcp://a": {"resources": {}}}
    with pytest.raises(LesionKDError, match="--resources GPU=1"):
        cluster._drive(SimpleNamespace(scheduler_info=lambda **_: {"workers": workers}), tasks_on("cuda"))
    with pytest.raises(LesionKDError, match="--workers and --gpus"), cluster.connect("tcp://127.0.0.1:9", [], 0, 1):
        pass


@pytest.mark.parametrize(
    ("device", "offered", "slot"), [("cuda", False, True), ("cuda", True, True), ("auto", True, True), ("auto", False, False), ("cpu", True, False)]
)
def test_a_run_on_a_gpu_takes_a_slot(sweep_of, device, offered, slot):
    [task] = plan.read_sweep(sweep_of({"include": [{"device": device}]}))
    submitted = cluster._submit(SimpleNamespace(submit=lambda *_, **options: options), task, offered, first=False)
    assert submitted["resources"] == ({"GPU": 1} if slot else None)


def start(folder: Path, *words: str) -> subprocess.Popen:
    """A process of Dask on the loopback device; it is told nothing of where runs and data lie."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("LESIONKD")}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    shared = ["--host", "127.0.0.1", "--dashboard-address", "127.0.0.1:0", "--scheduler-file", str(folder / "scheduler.json")]
    with open(folder / f"{words[0]}.log", "ab") as log:
        return subprocess.Popen([sys.executable, "-m", "dask", *words, *shared], cwd=folder, env=environment, stdout=log, stderr=log)


def until(there, seconds=300):
    """What `there` returns, once it returns something."""
    end = time.monotonic() + seconds
    while not (found := there()):
        assert time.monotonic() < end
        time.sleep(0.1)
    return found


@pytest.fixture
def dask(tmp_path):
    """A scheduler and two workers; at the end nothing of them is left running."""
    folder = tmp_path / "dask"
    folder.mkdir()
    scheduler = start(folder, "scheduler", "--port", "0")
    until((folder / "scheduler.json").exists)
    one = ("worker", "--no-nanny", "--nthreads", "1", "--memory-limit", "0", "--local-directory", str(folder))
    workers = [start(folder, *one) for _ in range(2)]
    started = [scheduler, *workers]
    yield SimpleNamespace(address=json.loads((folder / "scheduler.json").read_text())["address"], workers=workers, started=started)
    kernels = [child for process in started if process.poll() is None for child in psutil.Process(process.pid).children(recursive=True)]
    for process in started:
        process.kill()
        process.wait()
    assert psutil.wait_procs(kernels, timeout=20)[1] == []


def kernels_of(worker: subprocess.Popen) -> list[psutil.Process]:
    return [child for child in psutil.Process(worker.pid).children() if "ipykernel" in " ".join(child.cmdline())]


def in_training(workers: list[subprocess.Popen]) -> tuple | None:
    """A worker whose kernel holds the lock of a student that has finished an epoch; that kernel; the student's folder."""
    for worker in workers:
        with contextlib.suppress(psutil.Error):  # a kernel that ends while we look
            for kernel in kernels_of(worker):
                for file in (Path(opened.path) for opened in kernel.open_files()):
                    if file.parent.name == "distill" and (file.with_suffix("") / "checkpoint_last").exists():
                        return worker, kernel, file.with_suffix("")
    return None


def test_a_sweep_ends_complete_though_a_worker_is_killed_in_the_middle(dask, sweep_of, runs, tmp_path, monkeypatch):
    file = sweep_of({"parameters": TINY, "product": {"seeds": ["0", "1"]}})
    command = [sys.executable, "-m", "lesionkd_core", "sweep", str(file), "--scheduler", dask.address]
    sweep = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    dask.started.append(sweep)
    killed, orphan, student = until(lambda: in_training(dask.workers))
    killed.kill()
    said = sweep.communicate(timeout=600)[0]
    assert sweep.returncode == 0, said
    assert "3 made" in said and "sweep 3/3" in said, "a teacher and two runs"
    assert psutil.wait_procs([orphan], timeout=20)[1] == [], "a kernel ends with its worker"
    assert len(store.read_json(student / "env.json")["resumed_from"]) == 1, "what was killed went on elsewhere"
    executed = sorted((runs / "notebooks").glob("*.ipynb"))
    assert [path.name[:4] for path in executed] == ["03_t", "05_a", "05_a"]
    assert not any("training the teacher" in path.read_text() for path in executed[1:]), "the shared teacher was there when the runs began"
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "2 runs, 2 of them found finished\n2 found" in again

    monkeypatch.setenv("LESIONKD_RUNS", str(tmp_path / "serial"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    serial = [stages.ablate(AblationConfig(**TINY, seeds=seed), quiet) for seed in ("0", "1")]
    torch.set_num_threads(threads)
    for one in serial:
        swept = runs / one.path.relative_to(tmp_path / "serial")
        assert (swept / "notebook.ipynb").exists()
        pd.testing.assert_frame_equal(store.read_table(swept / "per_case.csv"), one.per_case, rtol=1e-7)


@pytest.mark.fault
def test_failures_are_kept_and_listed_and_what_needs_them_is_not_started(sweep_of, runs, capfd):
    file = sweep_of({"notebook": "02_edge_labels", "parameters": {"pixels": 32, "cases": 4}, "product": {"grid": [3, 4]}})
    assert main(["sweep", str(file), "--workers", "1", "--gpus", "0"]) == 1
    said = capfd.readouterr()
    assert "1 failed, 2 not started" in said.out and "Traceback" not in said.err
    assert "01_data_prep: LesionKDError: phantom-dermoscopy: 4 usable cases" in said.err
    [kept] = re.findall(r"executed notebook: (.*\.ipynb)", said.err)
    assert Path(kept).is_relative_to(runs) and "4 usable cases" in Path(kept).read_text()
    assert "02_edge_labels, grid 3: wants 01_data_prep" in said.err
    assert pd.read_csv(runs / "sweeps" / "study.csv")["status"].tolist() == ["failed", "not started", "not started"]
    assert psutil.Process().children(recursive=True) == [] or not any("spawn_main" in " ".join(c.cmdline()) for c in psutil.Process().children(recursive=True))


def finished_run(root: Path, cfg, name: str, seed: int, cases: int = 30, summary: dict | None = None) -> pd.DataFrame:
    """A run folder as training leaves it, with drawn scores."""
    rng, path = np.random.default_rng(seed), root / cfg.stage / name
    table = pd.DataFrame({"id": [f"{i:03d}" for i in range(cases)], "group": "g", "split": np.where(np.arange(cases) % 3, "test", "val"), "label": ""})
    table = table.assign(**{metric: rng.random(cases) for metric in METRICS}, lesion_pixels=rng.integers(0, 9, cases), predicted_pixels=3)
    table = table.assign(missed=rng.integers(0, 2, cases), false_alarm=rng.integers(0, 2, cases))
    table.loc[rng.integers(0, cases, 5), ["sensitivity", "precision"]] = np.nan
    store.begin(path, cfg, "upstream")
    store.write_table(path / "per_case.csv", table)
    store.write_json(path / "summary.json", summary or {})
    store.finish(path)
    return table


@pytest.fixture
def collected(runs):
    """Two data sets, two seeds of two arms, a teacher, scores on another data set; {(dataset, tested on, arm, seed): per_case}."""
    tables = {}
    for dataset in ("phantom-dermoscopy", "phantom-ultrasound"):
        tables[dataset, dataset, "teacher", 0] = finished_run(runs, TeacherConfig(dataset=dataset), f"{dataset}-t", 1)
        for seed in (0, 1):
            for arm, terms in (("alone", ""), ("method", "edge, feat")):
                cfg = DistillConfig(dataset=dataset, terms=terms, seed=seed, w_feat=0.5)
                tables[dataset, dataset, arm, seed] = finished_run(runs, cfg, f"{dataset}-{arm}-{seed}", 10 * seed + len(arm))
    cfg, summary = PrepareConfig().external("phantom-ultrasound"), {"run": "runs/distill/phantom-dermoscopy-method-1"}
    tables["phantom-dermoscopy", "phantom-ultrasound", "method", 1] = finished_run(runs, cfg, "other", 7, summary=summary)
    return tables


def test_a_summary_is_what_pandas_computes_from_the_runs(collected):
    results.collect(quiet)
    summary = results.summarize_results().set_index(["dataset", "test_dataset", "arm"])
    names = ["dataset", "test_dataset", "arm", "seed"]
    every = pd.concat([table.assign(**dict(zip(names, key))) for key, table in collected.items()]).query("split == 'test'")
    of_runs = every.groupby(names)[list(METRICS)].mean()
    expected, spread = (getattr(of_runs.groupby(names[:3]), function)() for function in ("mean", "std"))
    assert len(summary) == len(expected) == 7
    np.testing.assert_allclose(summary.loc[expected.index, list(METRICS)], expected, rtol=1e-6)
    np.testing.assert_allclose(summary.loc[expected.index, [f"{m}_sd" for m in METRICS]].astype(float), spread, rtol=1e-5)
    missed = every.groupby(names)["missed"].sum().groupby(names[:3]).mean()
    undefined = every.assign(n=every["sensitivity"].isna()).groupby(names)["n"].sum().groupby(names[:3]).mean()
    assert summary.loc[expected.index, "missed"].tolist() == missed.tolist()
    assert summary.loc[expected.index, "undefined"].tolist() == undefined.tolist() and undefined.max() > 0
    assert set(summary["cases"]) == {20} and summary.loc[("phantom-dermoscopy", "phantom-dermoscopy", "alone"), "runs"] == 2
    assert summary["teacher"].xs("alone", level="arm").tolist() == ["", ""], "no teacher looked on"


def test_a_summary_goes_by_any_parameter_and_condition(collected, capsys, tmp_path):
    assert main(["results", "--by", "arm, seed", "--where", "w_feat = 0.5 and dataset = test_dataset", "--split", "val", "--out", str(tmp_path / "t.csv")]) == 0
    table = pd.read_csv(tmp_path / "t.csv")
    assert table[["arm", "seed", "runs"]].values.tolist() == [["method", 0, 2], ["method", 1, 2]], "w_feat does not count for the student alone"
    dice = np.mean([collected[d, d, "method", 1].query("split == 'val'")["dice"].mean() for d in ("phantom-dermoscopy", "phantom-ultrasound")])
    assert table["dice"][1] == pytest.approx(dice, rel=1e-6)
    assert "method" in capsys.readouterr().out


def test_collecting_again_reads_what_is_new_and_forgets_what_is_gone(collected, runs):
    said = []
    folder = results.collect(said.append)
    before = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    assert len(before) == len(collected) == 11
    finished_run(runs, DistillConfig(seed=5), "five", 5)
    store.begin(runs / "distill" / "unfinished", DistillConfig(seed=6), "upstream")
    for file in (runs / "teacher" / "phantom-ultrasound-t").iterdir():
        file.unlink()
    results.collect(said.append)
    after = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    assert {file.name for file in set(after) - set(before)} == {"distill-five.parquet"}
    assert {file.name for file in set(before) - set(after)} == {"teacher-phantom-ultrasound-t.parquet"}
    assert all(after[file] == before[file] for file in set(after) & set(before))
    assert said == ["runs/results: 11 runs, 11 of them new", "runs/results: 11 runs, 1 of them new, 1 gone"]


def test_of_runs_with_equal_parameters_the_newest_counts(runs):
    for name, dice in (("old", 0.25), ("new", 0.75)):
        table = finished_run(runs, DistillConfig(), name, 0).assign(dice=dice)
        store.write_table(runs / "distill" / name / "per_case.csv", table)
        store.finish(runs / "distill" / name)
    os.utime(runs / "distill" / "old" / "DONE", (1, 1))
    results.collect(quiet)
    assert results.summarize_results()[["runs", "dice"]].values.tolist() == [[1, 0.75]]
    os.utime(runs / "distill" / "new" / "DONE", (0, 0))
    results.collect(quiet)
    assert results.summarize_results()[["runs", "dice"]].values.tolist() == [[1, 0.25]]


def test_a_run_from_before_a_parameter_came_counts_with_its_default(runs):
    for name in ("old", "new"):
        finished_run(runs, DistillConfig(terms="feat"), name, 0)
    recorded = store.read_json(file := runs / "distill" / "old" / "config.json")
    store.write_json(file, {name: value for name, value in recorded.items() if name not in LATER})
    store.finish(runs / "distill" / "old")
    results.collect(quiet)
    assert results.summarize_results(by=("arm", *LATER))[["runs", *LATER]].values.tolist() == [[1, *LATER.values()]]


def test_names_of_cases_come_through_as_they_are(runs):
    table = finished_run(runs, DistillConfig(), "odd", 0, cases=4).assign(id=["001", "1e5", "läsion, links", "b\udce4d"])
    store.write_table(runs / "distill" / "odd" / "per_case.csv", table)
    store.finish(runs / "distill" / "odd")
    rows = results._connect().read_parquet(str(results.collect(quiet) / "*.parquet")).df()
    assert rows["id"].tolist() == ["001", "1e5", "läsion, links", "b�d"]
    assert set(rows["split"]) == {"val", "test"} and set(rows["split_parameter"]) == {"groups"}


@pytest.mark.fault
def test_what_cannot_be_summarized_is_said_in_words(collected, capsys, runs):
    (runs / "distill" / "phantom-dermoscopy-alone-0" / "config.json").write_text("{")
    (runs / "distill" / "phantom-dermoscopy-alone-1" / "per_case.csv").unlink()
    (runs / "distill" / "phantom-ultrasound-alone-1" / "per_case.csv").write_text("id,dice\n1,much\n")
    assert main(["results"]) == 0
    said = capsys.readouterr().out
    assert said.count("left out") == 3 and all(f"phantom-{name}" in said for name in ("dermoscopy-alone-0", "dermoscopy-alone-1", "ultrasound-alone-1"))
    assert "method" in said
    for words, expected in ((["--by", "teachr"], "did you mean 'teacher'"), (["--where", "width ="], "where = 'width ='"), (["--where", "wdth = 3"], "wdth")):
        assert main(["results", *words]) == 1
        error = capsys.readouterr().err
        assert expected in error and "Traceback" not in error


@pytest.mark.fault
def test_results_without_a_finished_run_and_on_a_full_disk_are_named(runs, capsys):
    assert main(["results"]) == 1
    assert "no finished run is collected" in capsys.readouterr().err
    finished_run(runs, DistillConfig(), "large", 0, cases=3000)
    with full_disk(20_000), pytest.raises(LesionKDError, match="cannot write .*distill-large.parquet"):
        results.collect(quiet)
    assert [file.name for file in (runs / "results").iterdir()] == []


@pytest.mark.fault
def test_a_task_for_a_gpu_is_refused_where_no_worker_offers_one():
    client = SimpleNamespace(scheduler_info=lambda n_workers: {"workers": {"a": {"resources": {}}, "b": {}}})
    with pytest.raises(LesionKDError, match="no worker offers a GPU slot.*--resources GPU=1"):
        cluster._drive(client, [SimpleNamespace(cfg=SimpleNamespace(device="cuda"))])


def test_gpus_are_the_visible_ones_by_their_names(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for visible, found in (("", ["0", "1"]), ("3,GPU-5e0c", ["3", "GPU-5e0c"]), ("7,8,9", ["7", "8"])):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert cluster._gpus() == found
