"""Pictures and masks as people have them: what is read, what is repaired, what is refused."""

import struct
import zlib

import numpy as np
import pytest
import tifffile
from PIL import Image

from lesionkd_core.data.images import (
    Case,
    UnreadableFile,
    by_stem,
    count_pages,
    images_in,
    is_volume,
    pair,
    read_image,
    sources_in,
    stem_of,
)
from lesionkd_core.data.masks import read_case

from .tiny import save, save_pages


def read_mask(path):
    """The lesion in a mask that is a data set of its own."""
    return read_case(Case("", path, (path,))).mask


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
    "LA, all transparent": (two_tone(u8(50, 0), u8(210, 0)), (50, 50, 50), (210, 210, 210)),
    "RGBA, half transparent": (two_tone(u8(10, 60, 30, 128), u8(200, 90, 250, 0)), DARK, BRIGHT),
    "P": (palette(DARK, BRIGHT), DARK, BRIGHT),
    "1": (Image.fromarray(LEFT), (255, 255, 255), (0, 0, 0)),
    "I;16": (two_tone(1000, 3000).astype(np.uint16), (0, 0, 0), (255, 255, 255)),
    "F": (two_tone(-0.5, 1.5).astype(np.float32), (0, 0, 0), (255, 255, 255)),
    "CMYK": (
        Image.fromarray(two_tone(u8(0, 0, 0, 255), u8(0, 0, 0, 0)), mode="CMYK"),
        (0, 0, 0),
        (255, 255, 255),
    ),
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
    "1": Image.fromarray(LEFT),
    "RGB white": two_tone(u8(255, 255, 255), u8(0, 0, 0)),
    "LA, all transparent": two_tone(u8(255, 0), u8(0, 0)),
    "RGBA, all transparent": two_tone(u8(255, 255, 255, 0), u8(0, 0, 0, 0)),
    "P, dark red on black": palette((64, 0, 0), (0, 0, 0)),
    "I;16 of 65535": two_tone(65535, 0).astype(np.uint16),
    "RGB, classes in colours": np.where(
        LEFT[..., None], np.array([[64, 0, 0], [0, 128, 0], *[[0, 0, 0]] * 4]), 0
    ).astype(np.uint8),
    "RGBA, drawn in the transparency": two_tone(u8(255, 255, 255, 255), u8(255, 255, 255, 0)),
    "LA, drawn in the transparency": two_tone(u8(0, 255), u8(0, 0)),
    "CMYK": Image.fromarray(two_tone(u8(0, 0, 0, 0), u8(0, 0, 0, 255)), mode="CMYK"),
}


@pytest.mark.parametrize("name", MASKS)
def test_every_mode_of_mask_gives_the_lesion(tmp_path, name):
    assert np.array_equal(read_mask(keep(tmp_path, MASKS[name])), LEFT)


@pytest.mark.parametrize(
    ("orientation", "upright"),
    [(3, lambda x: x[::-1, ::-1]), (6, lambda x: np.rot90(x, -1)), (8, lambda x: np.rot90(x, 1))],
)
def test_the_camera_s_rotation_is_undone_in_image_and_mask(tmp_path, orientation, upright):
    exif = Image.Exif()
    exif[0x0112] = orientation  # EXIF 2.3: 3 half a turn, 6 a quarter clockwise, 8 counterclockwise
    assert np.array_equal(
        read_image(keep(tmp_path, two_tone(DARK, BRIGHT), exif=exif)),
        upright(two_tone(DARK, BRIGHT)),
    )
    assert np.array_equal(read_mask(keep(tmp_path, MASKS["L 255"], exif=exif)), upright(LEFT))


@pytest.mark.parametrize("suffix", ["tif", "gif"])
def test_the_first_of_several_pages_is_the_image(tmp_path, suffix):
    pages = [np.full((4, 6, 3), grey, np.uint8) for grey in (40, 200, 90)]
    image = save_pages(tmp_path / f"x.{suffix}", *pages)
    reading = read_case(Case("x", image, (save(tmp_path / "m.png", LEFT),)))
    assert (reading.image == 40).all() and reading.notes == ("first of 3 pages read",)


@pytest.mark.parametrize("orientation", range(2, 9))
def test_turned_tiff_of_16_bits_is_upright_and_keeps_them(tmp_path, orientation):
    deep = np.random.default_rng(0).integers(0, 2000, (12, 10, 3)).astype(np.uint16)
    tags = [(274, "H", 1, orientation, True)]
    tifffile.imwrite(tmp_path / "x.tif", deep, photometric="rgb", extratags=tags)
    exif = Image.Exif()
    exif[0x0112] = orientation
    save(tmp_path / "8.png", (deep // 8).astype(np.uint8), exif=exif)
    upright = read_image(tmp_path / "8.png").astype(int)
    found = read_image(tmp_path / "x.tif", "1000, 2000").astype(int)
    assert np.abs(found - upright * 8 * 255 / 2000).max() <= 2


@pytest.mark.parametrize("orientation", range(2, 9))
def test_a_mask_drawn_on_stored_pixels_is_turned_like_its_image(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = (
        np.repeat(np.where(LEFT, 240, 10).astype(np.uint8)[..., None], 3, 2)
        .repeat(8, 0)
        .repeat(8, 1)
    )  # 32 x 48, bright at the left
    image = tmp_path / "x.jpg"
    Image.fromarray(stored).save(image, exif=exif, quality=100)
    bright = read_image(image)[..., 0] > 127
    on_stored = Case("x", image, (save(tmp_path / "m.png", stored[..., 0]),))
    upright = Case("x", image, (save(tmp_path / "u.png", bright),))
    assert "turned according to its EXIF orientation" in read_case(on_stored).notes
    assert (read_case(upright).mask == bright).all()
    if orientation > 4:  # the size tells
        assert bright.shape == (48, 32)
        assert (
            read_case(on_stored).mask == bright
        ).all() and "mask turned like its image" in read_case(on_stored).notes
        assert not any("has no EXIF" in note for note in read_case(upright).notes)
    else:
        assert any("has no EXIF" in note for note in read_case(on_stored).notes)


def bomb(path):
    """A PNG whose header says 40,000 x 40,000 pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + struct.pack(">I", 13)
        + header
        + struct.pack(">I", zlib.crc32(header))
        + struct.pack(">I", 0)
        + b"IDAT"
    )


def cut(path, share=0.5):
    save(path, np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


REFUSED = {  # the file, how it is made, words of the message
    "missing": ("x.png", lambda p: None, "file is missing"),
    "empty": ("x.png", lambda p: p.touch(), r"cannot be read as an image \(the file is empty\)"),
    "text": (
        "x.png",
        lambda p: p.write_text("<html>404</html>"),
        r"cannot be read as an image \(its first bytes are b'<html>40'\)",
    ),
    "cut PNG": ("x.png", cut, "cannot be read as an image"),
    "cut JPEG": ("x.jpg", cut, "cannot be read as an image"),
    "link to nowhere": ("x.png", lambda p: p.symlink_to("gone.png"), "file is missing"),
    "bomb": ("x.png", bomb, "cannot be read as an image .*exceeds limit"),
    "NaN": (
        "x.tif",
        lambda p: Image.fromarray(np.full((4, 6), np.nan, np.float32)).save(p),
        ".*NaN or infinite values",
    ),
}


@pytest.mark.fault
@pytest.mark.parametrize("read", [read_image, read_mask])
@pytest.mark.parametrize("what", REFUSED)
def test_a_file_that_cannot_be_read_is_named_without_its_folder(tmp_path, what, read):
    name, make, words = REFUSED[what]
    make(tmp_path / name)
    with pytest.raises(UnreadableFile, match=rf"^{name}: {words}") as error:
        read(tmp_path / name)
    assert str(tmp_path) not in str(error.value)


@pytest.mark.fault
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("suffix", "mode"),
    [("png", "RGB"), ("jpg", "RGB"), ("tif", "L"), ("webp", "RGBA")],
)
def test_damaged_bytes_never_give_another_error(tmp_path, suffix, mode):
    rng, path = np.random.default_rng(0), tmp_path / f"x.{suffix}"
    Image.fromarray(rng.integers(0, 255, (20, 30, 3), dtype=np.uint8)).convert(mode).save(path)
    whole, refused = path.read_bytes(), 0
    for _ in range(60):
        damaged = bytearray(whole)
        for place in rng.integers(0, min(len(whole), int(rng.choice([60, len(whole)]))), 4):
            damaged[place] = rng.integers(256)
        path.write_bytes(damaged)
        for read in (read_image, read_mask):
            try:
                read(path)
            except UnreadableFile as error:
                refused += str(error).startswith(path.name)
    assert refused > 10


@pytest.mark.fault
def test_a_file_without_permission_says_so(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))  # root may open every file

    (tmp_path / "x.png").touch()
    monkeypatch.setattr(Image, "open", refuse)
    with pytest.raises(UnreadableFile, match=r"^x\.png: no permission to read it$"):
        read_image(tmp_path / "x.png")


def test_hidden_and_other_files_are_ignored(tmp_path):
    images = ["B (2).JPG", "a.png", "b (10).jpeg", "c.d.tif"]
    others = ["._a.png", ".hidden.png", "Thumbs.db", "notes.txt", "desktop.ini", "e.png.txt"]
    for name in images + others:
        (tmp_path / name).touch()
    assert [path.name for path in images_in(tmp_path)] == images
    assert [stem_of(path) for path in images_in(tmp_path)] == ["B (2)", "a", "b (10)", "c.d"]


def test_volumes_are_recognized_by_their_names(tmp_path):
    for name in ("a.nii.gz", "b.NII", "c.dcm", "d.png", "h.nrrd", "i.mha", "j.mhd", "j.raw"):
        (tmp_path / name).touch()
    for name in ("e", "f.1.2", "g.png"):
        (tmp_path / name).mkdir()
    found = {stem_of(path): is_volume(path) for path in sources_in(tmp_path)}
    pictures, volumes = {"d": False, "g": False}, dict.fromkeys(["a", "b", "c", "e", "f.1.2"], True)
    assert found == pictures | volumes | {"h": True, "i": True, "j": True}


def test_letter_case_and_the_encoding_of_accents_do_not_matter(tmp_path):
    images = [tmp_path / name for name in ("IMG_1.JPG", "Le\u0301sion.png", "3 {x}.png", "4.png")]
    masks = [tmp_path / name for name in ("img_1.png", "L\u00e9sion.png", "3 {x}.bmp", "5.png")]
    cases = {case.id: case for case in pair(images, by_stem(masks))}
    assert [len(cases[stem_of(path)].masks) for path in images] == [1, 1, 1, 0]
    assert cases.pop("5").problem == "5.png: no image belongs to this mask"
    assert not any(case.problem for case in cases.values())


def test_a_page_of_two_stacks_is_a_case(tmp_path):
    save_pages(tmp_path / "x.tif", *(np.full((4, 6), 40 * i, np.uint8) for i in range(3)))
    save_pages(tmp_path / "m.tif", *(np.roll(LEFT, i, 1) for i in range(3)))
    assert count_pages(tmp_path / "x.tif") == 3
    for i in range(3):
        reading = read_case(Case("x", tmp_path / "x.tif", (tmp_path / "m.tif",), page=i))
        assert (reading.image == 40 * i).all() and not reading.notes
        assert np.array_equal(reading.mask, np.roll(LEFT, i, 1))
    with pytest.raises(UnreadableFile, match=r"^x\.tif: cannot be read as an image"):
        read_case(Case("x", tmp_path / "x.tif", (tmp_path / "m.tif",), page=3))
