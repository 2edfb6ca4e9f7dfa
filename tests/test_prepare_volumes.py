"""Preparing volumes: patients stay together, and slices of two patients are not near-duplicates."""

import nibabel as nib
import numpy as np
import pytest

from lesionkd_core.data import prepare as module
from lesionkd_core.data.masks import UnclearMasks
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


MASKS = {  # of one volume among 14 of 0 and 1: its voxels, whether it is kept, words of the report
    "0 and 255": (MASK * 255, False, "values 0, 255: most masks have other values"),
    "background 3": (3.0 + 255 * MASK, False, "the background of the other masks is not in it"),
}


@pytest.mark.parametrize("kind", MASKS)
def test_the_mask_of_a_volume_fits_the_others_or_is_refused(tmp_path, kind):
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


def test_probabilities_are_refused_until_a_threshold_is_given(tmp_path):
    root = scans(tmp_path / "mine")
    ramp = np.linspace(0, 1, MASK.size).reshape(SHAPE).astype(np.float32)
    for path in (root / "masks").iterdir():
        nifti(path, ramp)
    with pytest.raises(UnclearMasks, match="12 of 12 masks do not tell .* lesion_values"):
        prepare(config(root))
    data = prepare(config(root, lesion_values="over 0.5"))
    share = data.cases.groupby("volume")["lesion_fraction"].sum()
    assert np.allclose(share, (ramp > 0.5).mean((0, 1)).sum())
    assert data.summary["masks"].endswith("lesion: over 0.5 (lesion_values)")
