"""Preparing volumes: patients stay together, and slices of two patients are not near-duplicates."""

import nibabel as nib
import numpy as np
import pytest

from lesionkd_core.data import prepare as module
from lesionkd_core.data.prepare import prepare
from lesionkd_core.data.splits import SPLITS
from lesionkd_core.evaluate import near_training

from .test_dicom import dicom
from .test_prepare import config
from .tiny import lesion, save

SHAPE = (20, 24, 5)
MASK = np.zeros(SHAPE, np.uint8)
MASK[5:12, 6:14, 1:4] = 1
pytestmark = pytest.mark.usefixtures("runs")


def nifti(path, voxels):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(np.asarray(voxels), np.diag([1.0, 1, 2, 1])), path)


def scans(root, count=12):
    """NIfTI pairs of much the same body; the first and the last slice have no lesion."""
    body = np.random.default_rng(0).integers(-200, 200, SHAPE).astype(np.int16)
    body[..., 0] = -1000
    for i in range(count):
        nifti(root / "images" / f"p{i:02d}.nii.gz", body + np.int16(i))
        nifti(root / "masks" / f"p{i:02d}.nii.gz", MASK)
    return root


@pytest.mark.parametrize(("normals", "slices"), [("drop", 3), ("keep", 5)])
def test_slices_of_a_volume_stay_together_and_those_of_two_patients_do_not(
    tmp_path, normals, slices
):
    data = prepare(config(scans(tmp_path / "mine"), normals=normals))
    cases = data.cases
    assert len(cases) == 12 * slices
    assert cases["group"].nunique() == cases["volume"].nunique() == 12
    assert (cases.groupby("volume")["split"].nunique() == 1).all()
    assert set(cases["split"]) == set(SPLITS)
    assert cases["id"].iloc[0] == ("p00_z001" if normals == "drop" else "p00_z000")
    assert near_training(data, data) == 0


def test_a_killed_preparation_resumes_on_a_machine_with_other_cores(tmp_path, monkeypatch):
    cfg, read, seen = config(scans(tmp_path / "mine")), module.read, []

    def interrupted(case, window):
        seen.append(case.id)
        if len(seen) == 8:
            raise KeyboardInterrupt
        return read(case, window)

    monkeypatch.setattr(module, "read", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(cfg)
    monkeypatch.setattr(module.os, "sched_getaffinity", lambda _: set(range(5)), raising=False)
    cases = prepare(cfg).cases
    assert cases["id"].is_unique and cases.groupby("volume").size().tolist() == [3] * 12


def test_dicom_files_of_one_patient_stay_together(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(24):
        pixels = rng.integers(0, 900, (48, 64)).astype(np.int16)
        file = tmp_path / "mine" / "images" / f"a{i:02d}.dcm"
        dicom(file, pixels, PatientID=f"patient {i // 2}")
        save(tmp_path / "mine" / "masks" / f"a{i:02d}.png", lesion(6 + i))
    cases = prepare(config(tmp_path / "mine")).cases
    patient = cases["id"].str[1:].astype(int) // 2
    assert cases["group"].nunique() == 12
    assert (cases["group"].groupby(patient).nunique() == 1).all()


SOFT = np.where(MASK > 0, 0.9, 0).astype(np.float32)
SOFT[4, 6:14, 1:4] = 0.3
MASKS = {  # of one volume: its voxels, whether it is kept, words of the report
    "class 3": (MASK * 3, True, "values 0, 3: 3 read as lesion"),
    "float 0 and 1": (MASK.astype(np.float32), True, ""),
    "soft": (SOFT, True, "values 0, 0.3, 0.9: cut at half, 1.00% of the pixels between"),
    "background -1": (MASK - 1.0, False, "values -1, 0: 0 must mean no lesion"),
    "background 3": (3.0 + 255 * MASK, True, "values 3, 258: 258 read as lesion"),
}


@pytest.mark.parametrize("kind", MASKS)
def test_the_mask_of_a_volume_is_decided_by_its_values_or_refused(tmp_path, kind):
    voxels, kept, words = MASKS[kind]
    root = scans(tmp_path / "mine", 14)
    nifti(root / "masks" / "p03.nii.gz", voxels)
    data = prepare(config(root))
    assert (data.cases["volume"] == "p03").sum() == 3 * kept
    if kept:
        rows = data.cases["volume"].isin(["p03", "p04"]).to_numpy()
        assert (data.masks[rows][:3] == data.masks[rows][3:]).all()
    about = data.report[data.report["id"].str.startswith("p03")]
    assert words in " ".join(about["reason"])
