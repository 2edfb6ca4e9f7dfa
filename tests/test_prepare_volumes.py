"""Volumes on their way to arrays: patients stay together, slices are no near-duplicates, masks say what they hold."""

import numpy as np
import pytest

from lesionkd_core import figures, prepare
from lesionkd_core.external import near_training
from lesionkd_core.prepare import SPLITS, prepare_data
from lesionkd_core.views import example_pairs

from .test_datasets import lesion, save
from .test_dicom import dicom
from .test_faults import nifti
from .test_prepare import config, quiet, runs  # noqa: F401

SHAPE = (20, 24, 5)


def scans(root, count=12):
    """NIfTI pairs of one body, much alike: the first slice is blank and without a lesion, as is the last's mask."""
    body = np.random.default_rng(0).integers(-200, 200, SHAPE)
    body[..., 0] = -1000
    mask = np.zeros(SHAPE, np.uint8)
    mask[5:12, 6:14, 1:4] = 1
    for i in range(count):
        for name, voxels in (("images", body + (i if i else 0)), ("masks", mask)):
            (root / name).mkdir(parents=True, exist_ok=True)
            nifti(root / name / f"p{i:02d}.nii.gz", voxels)
    return root


@pytest.mark.parametrize(("normals", "slices"), [("drop", 3), ("keep", 5)])
def test_slices_of_a_volume_stay_together_and_those_of_two_patients_do_not(tmp_path, runs, normals, slices):  # noqa: F811
    prepared = prepare_data(config(scans(tmp_path / "mine"), normals=normals), quiet)
    cases = prepared.cases
    assert len(cases) == 12 * slices and cases["group"].nunique() == cases["volume"].nunique() == 12
    assert (cases.groupby("volume")["split"].nunique() == 1).all() and set(cases["split"]) == set(SPLITS)
    assert cases["id"].iloc[0] == ("p00_z001" if normals == "drop" else "p00_z000")


def test_where_nothing_can_be_compared_nothing_is_alike(tmp_path, runs):  # noqa: F811
    prepared = prepare_data(config(scans(tmp_path / "mine")), quiet)
    assert near_training(prepared, prepared, bits=4) == 0
    pairs = example_pairs(prepared, bits=4, count=3)
    assert len(pairs) == 0 and figures.pairs(prepared, pairs).axes


def test_a_killed_preparation_of_volumes_loses_and_repeats_none_on_a_machine_of_other_cores(tmp_path, runs, monkeypatch):  # noqa: F811
    cfg, read, seen = config(scans(tmp_path / "mine")), prepare.read, []

    def interrupted(case, window):
        seen.append(case.id)
        if len(seen) == 8:
            raise KeyboardInterrupt
        return read(case, window)

    monkeypatch.setattr(prepare, "read", interrupted)
    monkeypatch.setattr(prepare.os, "cpu_count", lambda: 2)
    with pytest.raises(KeyboardInterrupt):
        prepare_data(cfg, quiet)
    monkeypatch.setattr(prepare.os, "cpu_count", lambda: 4)
    monkeypatch.setattr(prepare.os, "sched_getaffinity", lambda _: set(range(5)), raising=False)
    cases = prepare_data(cfg, quiet).cases
    assert cases["id"].is_unique and cases.groupby("volume").size().tolist() == [3] * 12


def test_dicom_files_of_one_patient_stay_together(tmp_path, runs):  # noqa: F811
    rng = np.random.default_rng(0)
    for i in range(24):
        (tmp_path / "mine" / "images").mkdir(parents=True, exist_ok=True)
        dicom(tmp_path / "mine" / "images" / f"a{i:02d}.dcm", rng.integers(0, 900, (48, 64)).astype(np.int16), PatientID=f"patient {i // 2}")
        save(tmp_path / "mine" / "masks" / f"a{i:02d}.png", lesion(6 + i))
    cases = prepare_data(config(tmp_path / "mine"), quiet).cases
    patient = cases["id"].str[1:].astype(int) // 2
    assert cases["group"].nunique() == 12 and (cases["group"].groupby(patient).nunique() == 1).all()


@pytest.mark.parametrize(
    ("voxels", "share", "words"),
    [
        (lambda mask: mask * 3, 1.0, ""),
        (lambda mask: mask.astype(float), 1.0, ""),
        (lambda mask: mask - 1.0, 0.0, "run from -1 to 0"),
        (lambda mask: 3 + 255 * mask, 0.0, "run from 3 to 258"),
    ],
    ids=["class 3", "float 0 and 1", "background -1", "background 3"],
)
def test_a_volume_s_mask_is_what_it_says_or_is_refused(tmp_path, runs, voxels, share, words):  # noqa: F811
    root = scans(tmp_path / "mine", 14)
    mask = np.zeros(SHAPE)
    mask[5:12, 6:14, 1:4] = 1
    nifti(root / "masks" / "p03.nii.gz", voxels(mask))
    prepared = prepare_data(config(root), quiet)
    assert (prepared.cases["volume"] == "p03").sum() == 3 * share
    assert words in "".join(prepared.report.loc[prepared.report["id"] == "p03", "reason"])


def test_a_soft_mask_of_a_volume_is_cut_at_half_and_reported(tmp_path, runs):  # noqa: F811
    import nibabel as nib

    root = scans(tmp_path / "mine", 14)
    soft = np.zeros(SHAPE, np.float32)
    soft[4:13, 5:15, 1:4] = 0.3
    soft[5:12, 6:14, 1:4] = 0.9
    nib.save(nib.Nifti1Image(soft, np.diag([1.0, 1, 2, 1])), root / "masks" / "p03.nii.gz")
    prepared = prepare_data(config(root), quiet)
    rows = prepared.cases["volume"].isin(["p03", "p04"]).to_numpy()
    assert (prepared.masks[rows][:3] == prepared.masks[rows][3:]).all()
    assert "soft mask of values 0 to 0.9, cut at half" in " ".join(prepared.report["reason"])
