"""Many runs: what a sweep file asks for; made, found and failed runs on local Dask workers."""

import re
import sys

import nbformat
import pandas as pd
import psutil
import pytest
import yaml

from lesionkd_core import results
from lesionkd_core import sweep as module
from lesionkd_core.config import ConfigError, LesionKDError, MissingExtra
from lesionkd_core.sweep import executed, find_notebook, named_results, read_sweep, sweep
from tests.conftest import ROOT
from tests.test_cli import PREPARES, command, notebook


@pytest.fixture
def sweep_of(tmp_path):
    """A sweep file with the given content."""

    def write(content):
        text = content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False)
        (tmp_path / "study.yaml").write_text(text)
        return tmp_path / "study.yaml"

    return write


# Files --------------------------------------------------------------------------------------------


def test_every_combination_and_every_included_run_is_there_once(sweep_of):
    content = {
        "parameters": {"profile": "cpu", "epochs": 3},
        "product": {"teacher": ["resnet34_unet", "unet64"], "seeds": ["0", "1", "2"]},
        "include": [{"arms": "alone, method", "lr": "2E-2"}, {"teacher": "unet64", "seeds": "1"}],
    }
    _, runs = read_sweep(sweep_of(content))
    assert len(runs) == 2 * 3 + 1  # the second included run is one of the product
    common = {"profile": "cpu", "epochs": 3}
    teachers = ("resnet34_unet", "unet64")
    assert runs[:6] == [common | {"teacher": t, "seeds": s} for t in teachers for s in "012"]
    assert runs[6] == common | {"arms": "alone, method", "lr": 0.02}  # YAML reads 2E-2 as text


def test_one_configuration_written_in_several_ways_is_one_run(sweep_of):
    same = [{}, {"seeds": 1}, {"seeds": "0"}, {"pixels": 64, "profile": "smoke"}]
    other = [{"test_dataset": "busi"}, {"seeds": 2}, {"losses": "feat=0.001"}]
    assert len(read_sweep(sweep_of({"include": same + other}))[1]) == 4


def test_the_example_of_the_documentation_is_a_sweep(sweep_of):
    [example] = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "sweeps.md").read_text(), re.S)
    assert len(read_sweep(sweep_of(example))[1]) == 13


@pytest.mark.fault
@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("product: {teachr: [unet64]}", "unknown parameter 'teachr': did you mean 'teacher'"),
        ("product: {epochs: [0], seeds: [-1]}", "epochs = 0.*\nseeds = "),
        ("product: {losses: [kd, kdd]}", "run {'losses': 'kdd'}: .*did you mean 'kd'"),
        ("prodct: {}", "unknown key 'prodct'; did you mean 'product'"),
        ("parameters: {epochs: 1}", "no runs"),
        ("product: [1]", "must map names to values"),
        ("[1, 2]", "expected the keys notebook, parameters, product, include"),
        ("product: {epochs: [1, 2}", "cannot be read as YAML"),
        ("{notebook: '3', include: [{epochs: 3}]}", "unknown parameter 'epochs'"),
    ],
)
def test_a_wrong_sweep_file_is_refused_before_anything_starts(sweep_of, runs, content, words):
    code, _, errors = command("sweep", sweep_of(content))
    assert code == 1 and re.search(words, errors), errors
    assert "Traceback" not in errors and not runs.exists()


@pytest.mark.fault
def test_an_absent_file_and_an_absent_scheduler_are_named(sweep_of, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"no\.yaml: .*No such file"):
        read_sweep(tmp_path / "no.yaml")

    def absent(address, **_):
        raise OSError("timed out")

    monkeypatch.setattr("distributed.Client", absent)
    with pytest.raises(LesionKDError, match="no Dask scheduler answers at tcp://127.0.0.1:9"):
        sweep(sweep_of({"include": [{}]}), scheduler="tcp://127.0.0.1:9")
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(MissingExtra, match=r"a sweep needs the extra 'cluster'.*pip install"):
        sweep(sweep_of({"include": [{}]}))


# Executed notebooks -------------------------------------------------------------------------------


def test_notebooks_are_found_by_name_and_by_path(tmp_path):
    assert find_notebook("05_ablations") == ROOT / "notebooks" / "05_ablations.ipynb"
    for name in ("05_ablations.ipynb", "05", "5"):
        assert find_notebook(name) == find_notebook("05_ablations")
    own = notebook(tmp_path / "mine.ipynb")
    assert find_notebook(str(own)) == own


def test_an_executed_notebook_is_named_by_all_options_and_the_data(tmp_path, monkeypatch):
    path = notebook(tmp_path / "01_small.ipynb")
    names = {
        executed(path, {"cases": n, "device": d}).name for n in (20, 30) for d in ("cpu", "auto")
    }
    assert len(names) == 4
    monkeypatch.setattr(module, "fingerprint", lambda cfg: "other data")
    assert executed(path, {"cases": 20, "device": "cpu"}).name not in names


def test_an_executed_notebook_is_named_by_the_content_of_its_files(tmp_path):
    path, split = notebook(tmp_path / "01_small.ipynb"), tmp_path / "split.csv"
    names = set()
    for content in ("id,split\na,train\n", "id,split\na,test\n"):
        split.write_text(content)
        names.add(executed(path, {"split_file": str(split)}).name)
    assert len(names) == 2


def test_named_results_must_be_finished(tmp_path, runs):
    folder = runs / "teacher" / "phantom-0123"
    folder.mkdir(parents=True)
    path = notebook(tmp_path / "a.ipynb", "print('DONE')")
    book = nbformat.read(path, 4)
    pieces = "runs/teacher/phantom-0123\n", "DONE\n"  # so on a busy machine
    book.cells[-1].outputs = [nbformat.v4.new_output("stream", text=piece) for piece in pieces]
    nbformat.write(book, path)
    assert named_results(path) is None
    results.write_json(folder / "DONE", {})
    assert named_results(path) == folder
    assert named_results(tmp_path / "absent.ipynb") is None


# Workers ------------------------------------------------------------------------------------------


def test_a_failing_run_is_listed_the_others_are_made_and_a_second_call_finds_them(
    sweep_of, runs, tmp_path
):
    path = notebook(tmp_path / "01_small.ipynb", *PREPARES)
    content = {
        "notebook": str(path),
        "parameters": {"pixels": 32},
        "product": {"cases": [30, 4, 40]},
    }
    code, out, errors = command("sweep", sweep_of(content), "--workers", 2)
    assert code == 1 and "2 made, 1 failed" in out, (out, errors)
    assert "cases 4: LesionKDError: phantom: 4 usable cases" in errors or "usable" in errors
    [kept] = re.findall(r"executed notebook: runs/(.*\.ipynb)", errors)
    assert "usable cases" in (runs / kept).read_text() and "Traceback" not in errors
    table = pd.read_csv(runs / "sweeps" / "study.csv").set_index("run")
    assert table["status"].to_dict() == {
        "pixels 32, cases 30": "made",
        "pixels 32, cases 4": "failed",
        "pixels 32, cases 40": "made",
    }
    for label in ("pixels 32, cases 30", "pixels 32, cases 40"):
        folder = results.locate(table.loc[label, "results"])
        assert results.is_done(folder) and (folder / "notebook.ipynb").exists()
    content["product"]["cases"] = [30, 40]
    code, out, errors = command("sweep", sweep_of(content), "--workers", 1)
    assert code == 0 and "2 found" in out, (out, errors)
    left = [" ".join(child.cmdline()) for child in psutil.Process().children(recursive=True)]
    assert not any("spawn_main" in line for line in left)


def test_a_run_whose_worker_is_lost_is_given_to_another(sweep_of, runs, tmp_path):
    """The first attempt kills its worker; the second finds the mark and succeeds."""
    lose = f"""
import os, pathlib, signal, psutil
mark = pathlib.Path({str(tmp_path)!r}) / "tried"
if not mark.exists():
    mark.touch()
    os.kill(psutil.Process().ppid(), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    path = notebook(tmp_path / "01_small.ipynb", lose, *PREPARES)
    include = [{"pixels": 32, "cases": 30}]
    table = sweep(sweep_of({"notebook": str(path), "include": include}), workers=1)
    assert (tmp_path / "tried").exists() and table["status"].tolist() == ["made"], table.iloc[0]
