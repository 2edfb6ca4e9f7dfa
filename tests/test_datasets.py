"""Release layouts in miniature, file modes as people have them, and the real releases where they lie here."""

import numpy as np
import pytest
from PIL import Image

from lesionkd_core.datasets import DatasetNotFound, find, fingerprint, read_case, read_image, read_mask
from lesionkd_core.prepare import PrepareConfig

SIZE = (48, 64)  # height, width


def save(path, pixels, mode=None, **options):
    """Write (H, W) or (H, W, C) pixels as an image file; bool is black and white. Folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.asarray(pixels)
    image = Image.fromarray(pixels.astype(np.uint8) * 255 if pixels.dtype == bool else pixels)
    (image.convert(mode) if mode else image).save(path, **options)
    return path


def picture(seed, size=SIZE):
    """A smooth random colour image (H, W, 3) uint8; two seeds look nothing alike."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(30, 190, (12, 12, 1)) + rng.integers(0, 40, (12, 12, 3))
    return np.asarray(Image.fromarray(coarse.astype(np.uint8)).resize(size[::-1], Image.Resampling.BICUBIC))


def lesion(side, top=4, left=6, size=SIZE):
    """A square lesion, (H, W) bool."""
    mask = np.zeros(size, dtype=bool)
    mask[top : top + side, left : left + side] = True
    return mask


def own_folder(root, count=24, empty=()):
    """images/case_000.png ... with masks/case_000.png, lesions growing with the number; some without a lesion."""
    for i in range(count):
        save(root / "images" / f"case_{i:03d}.png", picture(i))
        save(root / "masks" / f"case_{i:03d}.png", lesion(0 if i in empty else 6 + i))
    return root


def cases_of(dataset):
    _, cases = fingerprint(PrepareConfig(dataset=dataset))
    return {case.id: case for case in cases}


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.setenv("LESIONKD_DATA", str(tmp_path))
    return tmp_path


def small_busi(root):
    folder = root / "Dataset_BUSI_with_GT"
    for name in ("benign (1)", "benign (2)", "benign (10)", "malignant (1)", "normal (1)"):
        save(folder / name.split()[0] / f"{name}.png", picture(1))
    save(folder / "benign" / "benign (1)_mask.png", lesion(8))
    save(folder / "benign" / "benign (1)_mask_1.png", lesion(5, top=30, left=40))
    save(folder / "benign" / "benign (1)_mask_2.png", lesion(3, top=20, left=50))
    save(folder / "benign" / "benign (2)_mask.png", lesion(9), "RGB")
    save(folder / "benign" / "benign (10)_mask.png", lesion(10), "1")
    save(folder / "malignant" / "malignant (1)_mask.png", lesion(11), "RGBA")
    save(folder / "normal" / "normal (1)_mask.png", lesion(0))
    return folder


def test_busi_unites_several_masks_and_reads_every_kind(data):
    small_busi(data)
    cases = cases_of("busi")
    assert list(cases) == ["benign (1)", "benign (2)", "benign (10)", "malignant (1)", "normal (1)"]  # 2 before 10
    assert [case.label for case in cases.values()] == ["benign"] * 3 + ["malignant", "normal"]
    masks = {name: read_case(case)[1] for name, case in cases.items()}
    assert (masks["benign (1)"] == lesion(8) | lesion(5, top=30, left=40) | lesion(3, top=20, left=50)).all()
    for name, side in (("benign (2)", 9), ("benign (10)", 10), ("malignant (1)", 11), ("normal (1)", 0)):
        assert (masks[name] == lesion(side)).all(), name


@pytest.mark.parametrize("place", ["Dataset_BUSI_with_GT", "", "..", "archive"], ids=["itself", "its parent", "two above", "renamed"])
def test_a_release_is_found_where_people_unpack_it(tmp_path, monkeypatch, place):
    root = tmp_path / "unpacked"
    folder = small_busi(root)
    if place == "archive":  # the folder renamed
        folder = folder.rename(root / place)
        place = ""
    monkeypatch.setenv("LESIONKD_DATA", str(root / place))
    assert find("busi")[1].resolve() == folder


def test_isic2018_pairs_by_number(data):
    images, masks = "ISIC2018_Task1-2_Training_Input", "ISIC2018_Task1_Training_GroundTruth"
    for number, side in (("0000000", 7), ("0000013", 12)):
        save(data / "isic2018" / images / f"ISIC_{number}.jpg", picture(side))
        save(data / "isic2018" / masks / f"ISIC_{number}_segmentation.png", lesion(side))
    (data / "isic2018" / images / "ATTRIBUTION.txt").write_text("lies in the official archive")
    cases = cases_of("isic2018")
    assert list(cases) == ["ISIC_0000000", "ISIC_0000013"]
    assert [read_case(case)[1].sum() for case in cases.values()] == [7 * 7, 12 * 12]


def test_cvc_clinicdb_groups_frames_by_video(data):
    for frame in (1, 2, 25, 26, 50, 51, 612):
        save(data / "cvc-clinicdb" / "Original" / f"{frame}.tif", picture(frame))
        save(data / "cvc-clinicdb" / "Ground Truth" / f"{frame}.tif", np.where(lesion(9), 250, 3).astype(np.uint8))  # grey, not quite black and white
    cases = cases_of("cvc-clinicdb")
    assert {int(name): case.group for name, case in cases.items()} == {
        1: "video-1", 2: "video-1", 25: "video-1", 26: "video-2", 50: "video-2", 51: "video-3", 612: "video-29",
    }
    assert all((read_case(case)[1] == lesion(9)).all() for case in cases.values())


def test_kvasir_seg_masks_are_jpeg(data):
    empty = np.zeros(SIZE, dtype=np.uint8)
    empty[::5, ::3] = 9  # what compression leaves of black
    for name, mask in (("a", lesion(16, 8, 8)), ("b", lesion(21, 11, 13)), ("c", empty)):
        save(data / "Kvasir-SEG" / "images" / f"{name}.jpg", picture(1))
        save(data / "Kvasir-SEG" / "masks" / f"{name}.jpg", mask, "RGB", quality=75)
    masks = {name: read_case(case)[1] for name, case in cases_of("kvasir-seg").items()}
    assert (masks["a"] == lesion(16, 8, 8)).all()  # on the borders of JPEG's blocks
    assert (masks["b"] != lesion(21, 11, 13)).mean() < 0.01
    assert not masks["c"].any()


def test_own_data_pairs_equal_stems_of_any_suffix(tmp_path, data):
    suffixes = (("a.JPG", "a.png"), ("b 1.jpeg", "b 1.bmp"), ("c.tif", "c.tiff"), ("d.webp", "d.png"), ("e.x.png", "e.x.png"))
    for image, mask in suffixes:
        save(data / "mine" / "images" / image, picture(1))
        save(data / "mine" / "masks" / mask, lesion(9))
    (data / "mine" / "images" / ".hidden.png").write_text("left by a file manager")
    (data / "mine" / "images" / "Thumbs.db").write_text("likewise")
    assert list(cases_of("mine")) == list(cases_of(str(data / "mine"))) == ["a", "b 1", "c", "d", "e.x"]
    for case in cases_of("mine").values():
        image, mask = read_case(case)
        assert image.shape == (*SIZE, 3) and image.dtype == np.uint8 and (mask == lesion(9)).all()


def test_a_folder_of_ones_own_is_not_taken_for_kvasir_seg(data):
    own_folder(data / "mine", 1)
    with pytest.raises(DatasetNotFound, match="kvasir-seg"):
        find("kvasir-seg")


DARK, BRIGHT = np.array([10, 60, 30], np.uint8), np.array([200, 90, 250], np.uint8)
LEFT = np.arange(6)[None, :].repeat(4, 0) < 2  # (4, 6): the two left columns


def two_tone(left, right):
    """(4, 6[, C]) with the value of `left` in the two left columns."""
    pick = LEFT if np.ndim(left) == 0 else LEFT[..., None]
    return np.where(pick, left, right)


def palette(left, right):
    image = Image.fromarray(two_tone(0, 1).astype(np.uint8), mode="P")
    image.putpalette([*left, *right, *(255, 0, 255) * 254])
    return image


def u8(*pixel):
    return np.array(pixel, np.uint8)


IMAGES = {  # what is saved; left and right colour that must come out
    "L": (two_tone(u8(50)[0], u8(210)[0]), (50, 50, 50), (210, 210, 210)),
    "LA, all transparent": (two_tone(u8(50, 0), u8(210, 0)), (50, 50, 50), (210, 210, 210)),
    "RGB": (two_tone(DARK, BRIGHT), DARK, BRIGHT),
    "RGBA, half transparent": (two_tone(u8(10, 60, 30, 128), u8(200, 90, 250, 0)), DARK, BRIGHT),
    "P": (palette(DARK, BRIGHT), DARK, BRIGHT),
    "1": (Image.fromarray(LEFT), (255, 255, 255), (0, 0, 0)),
    "I;16": (two_tone(1000, 3000).astype(np.uint16), (0, 0, 0), (255, 255, 255)),
    "I;16, flat": (two_tone(700, 700).astype(np.uint16), (0, 0, 0), (0, 0, 0)),
    "F": (two_tone(-0.5, 1.5).astype(np.float32), (0, 0, 0), (255, 255, 255)),
    "CMYK": (Image.fromarray(two_tone(u8(0, 0, 0, 255), u8(0, 0, 0, 0)), mode="CMYK"), (0, 0, 0), (255, 255, 255)),
}


def keep(tmp_path, content, **options):
    """Save losslessly, in a format that knows the mode."""
    image = content if isinstance(content, Image.Image) else Image.fromarray(content)
    path = tmp_path / ("x.tif" if image.mode in ("CMYK", "F") else "x.png")
    image.save(path, **options)
    return path


@pytest.mark.filterwarnings("ignore:.*mode.*:DeprecationWarning")
@pytest.mark.parametrize("name", IMAGES)
def test_every_mode_becomes_rgb(tmp_path, name):
    content, left, right = IMAGES[name]
    assert np.array_equal(read_image(keep(tmp_path, content)), two_tone(u8(*left), u8(*right)))


MASKS = {  # what is saved with a lesion left and none right
    "L 255": two_tone(255, 0).astype(np.uint8),
    "L 1": two_tone(1, 0).astype(np.uint8),
    "L greyish": two_tone(180, 90).astype(np.uint8),
    "1": Image.fromarray(LEFT),
    "RGB white": two_tone(u8(255, 255, 255), u8(0, 0, 0)),
    "RGB 1": two_tone(u8(1, 1, 1), u8(0, 0, 0)),
    "LA, all transparent": two_tone(u8(255, 0), u8(0, 0)),
    "RGBA, opaque": two_tone(u8(255, 255, 255, 255), u8(0, 0, 0, 255)),
    "RGBA, all transparent": two_tone(u8(255, 255, 255, 0), u8(0, 0, 0, 0)),
    "P, dark red on black": palette((64, 0, 0), (0, 0, 0)),
    "P, almost black": palette((4, 4, 4), (0, 0, 0)),
    "I;16 of 1": two_tone(1, 0).astype(np.uint16),
    "I;16 of 300": two_tone(300, 0).astype(np.uint16),
    "I;16 of 65535": two_tone(65535, 0).astype(np.uint16),
    "F of 1": two_tone(1, 0).astype(np.float32),
}


@pytest.mark.parametrize("name", MASKS)
def test_every_mode_of_mask_gives_the_lesion(tmp_path, name):
    assert np.array_equal(read_mask(keep(tmp_path, MASKS[name])), LEFT)


EMPTY = [np.zeros((4, 6), np.uint8), np.full((4, 6), 12, np.uint8), np.zeros((4, 6), np.uint16), Image.new("1", (6, 4)), palette((0, 0, 0), (0, 0, 0))]


@pytest.mark.parametrize("content", EMPTY)
def test_an_empty_mask_is_empty_in_every_mode(tmp_path, content):
    assert not read_mask(keep(tmp_path, content)).any()


@pytest.mark.parametrize(("orientation", "upright"), [(3, lambda x: x[::-1, ::-1]), (6, lambda x: np.rot90(x, -1)), (8, lambda x: np.rot90(x, 1))])
def test_the_camera_s_rotation_is_undone_in_image_and_mask(tmp_path, orientation, upright):
    exif = Image.Exif()
    exif[0x0112] = orientation  # EXIF 2.3: 3 is half a turn, 6 wants a clockwise quarter, 8 a counterclockwise one
    assert np.array_equal(read_image(keep(tmp_path, two_tone(DARK, BRIGHT), exif=exif)), upright(two_tone(DARK, BRIGHT)))
    assert np.array_equal(read_mask(keep(tmp_path, MASKS["L 255"], exif=exif)), upright(LEFT))


REAL = {  # cases of the releases, in full and as the part that the project keeps; groups; mask files
    "busi": ({780}, 1, {798}),
    "cvc-clinicdb": ({612}, 29, {612}),
    "isic2018": ({2594, 1500}, 1, {2594, 1500}),
    "kvasir-seg": ({1000, 5}, 1, {1000, 5}),
}


@pytest.mark.parametrize("dataset", REAL)
def test_the_real_release_is_read_whole(dataset):
    try:
        release, folder = find(dataset)
    except DatasetNotFound:
        pytest.skip(f"the real release of {dataset} is not here; LESIONKD_DATA names the folder that holds it")
    cases, (counts, groups, masks) = release.cases(folder), REAL[dataset]
    assert len(cases) == len({case.id for case in cases}) and len(cases) in counts
    assert len({case.group for case in cases}) == groups
    assert all(case.masks for case in cases) and sum(len(case.masks) for case in cases) in masks
    if dataset == "busi":
        labels = [case.label for case in cases]
        assert {label: labels.count(label) for label in set(labels)} == {"benign": 437, "malignant": 210, "normal": 133}
    for case in cases[:: max(1, len(cases) // 4)]:
        image, mask = read_case(case)
        assert image.shape == (*mask.shape, 3) and mask.any() == (case.label != "normal")
