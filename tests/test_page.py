"""The phone page in headless Chromium with a phone's viewport and touch."""

import base64
import gzip
import http.server
import io
import re
import threading

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from lesionkd_core.config import LesionKDError
from lesionkd_core.data.images import read_image
from lesionkd_core.data.pixels import prepare_image
from lesionkd_core.data.prepare import prepare
from lesionkd_core.export import cost
from lesionkd_core.export.cost import CHROMIUM, FLAGS
from lesionkd_core.export.page import write_page
from lesionkd_core.export.parity import Deployed
from lesionkd_core.predict import TrainedNetwork, predict
from tests.fixed import CFG, fixed_run, noise, unet

playwright = pytest.importorskip(
    "playwright.sync_api", reason="the page is tested with playwright: pip install -e '.[dev]'"
)
PHONE = {
    "viewport": {"width": 390, "height": 844},
    "device_scale_factor": 2,
    "is_mobile": True,
    "has_touch": True,
    "offline": True,
}
MAY_DIFFER = 0.001
"""Fraction of the pixels of a mask that may differ: probabilities come in steps of 1/255."""


def lesion_picture(width, height, seed=0):
    """A dark, soft lesion on bright skin with some texture, (height, width, 3) uint8."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    depth = 1 / (
        1 + np.exp(8 * (np.hypot((x / width - 0.45) / 0.25, (y / height - 0.55) / 0.2) - 1))
    )
    skin = np.array([225, 180, 160]) * (0.9 + 0.1 * np.sin(x / 7)[..., None])
    return (
        (
            skin
            - depth[..., None] * np.array([140, 130, 110])
            + random.normal(0, 4, (height, width, 1))
        )
        .clip(0, 255)
        .astype(np.uint8)
    )


@pytest.fixture(scope="module")
def browser():
    if not CHROMIUM.exists():
        pytest.skip(f"the page is tested in Debian's chromium, which is not installed ({CHROMIUM})")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=str(CHROMIUM), args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def student():
    return fixed_run()


ABOUT = ["Trained on <phantoms> & nothing else."]
GOLDEN = lesion_picture(64, 64)


@pytest.fixture(scope="module")
def html(student, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "segment.html"
    write_page(student, Deployed(student.network), path, ABOUT, 0.5, GOLDEN)
    return path


@pytest.fixture
def phone(browser, html):
    """The page, opened from the disk without a network; `requests` lists what it asked for."""
    context = browser.new_context(**PHONE)
    found = context.new_page()
    found.requests, found.errors = [], []
    found.on("request", lambda request: found.requests.append(request.url))
    found.on("pageerror", lambda error: found.errors.append(str(error)))
    found.goto(html.as_uri())
    found.wait_for_selector("body[data-state=ready]", timeout=60_000)
    yield found
    assert found.errors == []
    context.close()


@pytest.fixture(scope="module")
def photo(student):
    """A function of width and height: the test case with the largest mask, at that size."""
    data = prepare(CFG)
    images = [np.asarray(data.images[row]) for row in data.index("test")]
    case = max(images, key=lambda image: (predict(student, [image])[0] > 0.5).sum())

    def at(width, height):
        return Image.fromarray(case).resize((width, height), Image.Resampling.BICUBIC)

    return at


def choose(phone, file):
    phone.set_input_files("#choose", file)
    phone.wait_for_selector("body[data-state=ready]", timeout=60_000)


def saved_mask(phone) -> np.ndarray:
    with phone.expect_download() as download:
        phone.get_by_role("button", name="Save mask").click()
    return np.asarray(Image.open(download.value.path()).convert("RGB"))[..., 0]


def test_it_loads_offline_from_the_disk_and_asks_for_nothing(phone):
    assert (
        phone.requests[0].startswith("file:")
        and phone.title()
        == phone.get_by_role("heading").inner_text()
        == "Lesion segmentation: phantom"
    )
    assert all(url.startswith(("blob:", "data:")) for url in phone.requests[1:]), phone.requests
    assert (
        phone.get_by_text("not a medical device").is_visible()
        and phone.get_by_text("does not leave it").is_visible()
    )
    assert phone.get_by_role("status").inner_text() == "Ready. Take a photo or choose one."


REFUSED = """async (url) => {
  const refused = new Promise((resolve) => {
    const event = 'securitypolicyviolation';
    document.addEventListener(event, (e) => resolve(e.effectiveDirective), { once: true });
  });
  try { WAY } catch {}
  return refused;
}"""


def test_its_policy_refuses_every_connection(browser, html):
    asked = []

    class Server(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(404)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        online = browser.new_context().new_page()
        online.goto(html.as_uri())
        online.wait_for_selector("body[data-state=ready]", timeout=60_000)
        for way in (
            "fetch(url).catch(() => {})",
            "new Image().src = url",
            "navigator.sendBeacon(url, 'x')",
            "new WebSocket(url.replace('http', 'ws'))",
        ):
            refused = online.evaluate(
                REFUSED.replace("WAY", way), f"http://127.0.0.1:{server.server_port}/leak"
            )
            assert refused in ("connect-src", "img-src"), way
        server.shutdown()
    assert asked == []
    online.context.close()


def test_a_photo_chosen_later_wins_over_a_slow_one_before_it(phone, tmp_path):
    Image.fromarray(np.tile(lesion_picture(500, 500), (9, 9, 1))).save(
        tmp_path / "large.png", compress_level=1
    )
    Image.fromarray(lesion_picture(90, 70)).save(tmp_path / "small.png")
    phone.set_input_files("#camera", tmp_path / "large.png")
    phone.set_input_files("#choose", tmp_path / "small.png")
    phone.wait_for_selector("#view[aria-label^='small.png']", timeout=60_000)
    phone.wait_for_timeout(3000)
    assert phone.locator("#view").get_attribute("aria-label").startswith(
        "small.png"
    ) and saved_mask(phone).shape == (70, 90)


def test_orientation_is_obeyed_and_colour_profiles_are_passed_over_as_in_training(
    phone, student, photo, tmp_path
):
    turned = Image.Exif()
    turned[274] = 6
    photo(200, 120).save(tmp_path / "turned.jpg", exif=turned, quality=95, subsampling=0)
    gamma = PngInfo()
    gamma.add(
        b"gAMA", (100_000).to_bytes(4, "big")
    )  # linear: a browser that uses it makes the picture much brighter
    photo(200, 120).save(tmp_path / "gamma.png", pnginfo=gamma)
    for name, shape in (("turned.jpg", (200, 120)), ("gamma.png", (120, 200))):
        choose(phone, tmp_path / name)
        mask, expected = (
            saved_mask(phone) > 0,
            predict(student, [read_image(tmp_path / name)])[0] > 0.5,
        )
        assert mask.shape == expected.shape == shape and (mask != expected).mean() <= MAY_DIFFER, (
            name
        )


@pytest.mark.parametrize(
    ("width", "height", "mode"),
    [
        (640, 480, "RGB"),
        (480, 640, "RGB"),
        (64, 64, "RGB"),
        (1600, 300, "RGB"),
        (40, 50, "RGB"),
        (301, 219, "L"),
        (200, 200, "RGBA"),
        (2, 3, "RGB"),
    ],
)
def test_its_masks_are_pytorchs(phone, student, photo, tmp_path, width, height, mode):
    file = tmp_path / "photo.png"
    photo(width, height).convert(mode).save(file)
    choose(phone, file)
    mask = saved_mask(phone)
    expected = predict(student, [read_image(file)])[0] > 0.5
    assert mask.shape == (height, width) and set(np.unique(mask)) <= {0, 255}
    assert ((mask > 0) != expected).mean() <= MAY_DIFFER
    if width > 2 and mode != "L":
        assert 0 < expected.mean() < 1, "a picture without a mask to compare"


def test_its_masks_of_test_cases_are_pytorchs(phone, student, tmp_path):
    data = prepare(CFG)
    rows = data.index("test")[:8]
    for row in rows:
        file = tmp_path / f"{row}.png"
        Image.fromarray(np.asarray(data.images[row])).resize(
            (200, 150), Image.Resampling.BICUBIC
        ).save(file)
        choose(phone, file)
        assert (
            (saved_mask(phone) > 0) != (predict(student, [read_image(file)])[0] > 0.5)
        ).mean() <= MAY_DIFFER


@pytest.mark.parametrize("fit", ["stretch", "pad"])
def test_it_prepares_photos_as_the_training_did_to_the_bit(browser, student, tmp_path, fit):
    cfg = student.cfg.with_values(fit=fit)
    other = TrainedNetwork(student.network, cfg, student.path)
    path = tmp_path / "segment.html"
    write_page(other, Deployed(student.network), path, [], 0.5, GOLDEN)
    page = browser.new_context(offline=True).new_page()
    page.goto((tmp_path / "segment.html").as_uri())
    page.wait_for_selector("body[data-state=ready]", timeout=60_000)
    for seed, (width, height) in enumerate(
        [(640, 480), (300, 900), (65, 63), (64, 200), (30, 20), (1000, 33), (513, 511)]
    ):
        picture, file = lesion_picture(width, height, seed), io.BytesIO()
        Image.fromarray(picture).save(file, "PNG")
        found = page.evaluate(
            """async (base64) => {
            const photo = new Image();
            photo.src = 'data:image/png;base64,' + base64;
            await photo.decode();
            return Array.from(prepare(photo, photo.naturalWidth, photo.naturalHeight));
        }""",
            base64.b64encode(file.getvalue()).decode(),
        )
        expected = prepare_image(picture, cfg)
        np.testing.assert_array_equal(
            np.array(found, np.uint8).reshape(expected.shape),
            expected,
            err_msg=f"{width} x {height}, {fit}",
        )
    page.context.close()


def encoded(pixels, kind="PNG"):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


@pytest.mark.fault
@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("notes.txt", b"no picture", "notes.txt is not a photo"),
        ("drawing.svg", b"<svg xmlns='http://www.w3.org/2000/svg'/>", "drawing.svg is not a photo"),
        ("deep.png", encoded(np.full((40, 50), 9000, np.uint16)), "deep.png has 16 bits"),
        ("cut.png", encoded(noise(1, 90, 80)[0])[:900], "cut.png is damaged"),
        (
            "broken.png",
            b"\x89PNG\r\n\x1a\nbroken",
            "broken.png is not a picture that this browser can read",
        ),
        ("empty.jpg", b"", "empty.jpg is not a picture that this browser can read"),
    ],
)
def test_what_is_no_picture_gets_a_clear_message(phone, name, content, said):
    kinds = {"txt": "text/plain", "png": "image/png", "jpg": "image/jpeg", "svg": "image/svg+xml"}
    kind = kinds[name[-3:]]
    choose(phone, {"name": name, "mimeType": kind, "buffer": content})
    alert = phone.get_by_role("alert")
    assert alert.is_visible() and said in alert.inner_text() and "Choose a" in alert.inner_text()
    assert phone.get_by_role("button", name="Save mask").is_disabled()


@pytest.mark.fault
@pytest.mark.parametrize(
    ("size", "said"),
    [
        ((8000, 6250), "has 50 megapixels; this page takes up to 40"),
        ((1, 1), "has 1 x 1 px: nothing to segment"),
    ],
)
def test_a_picture_of_an_impossible_size_gets_a_clear_message_and_the_one_before_stays(
    phone, tmp_path, size, said
):
    Image.fromarray(lesion_picture(100, 80)).save(tmp_path / "good.png")
    choose(phone, tmp_path / "good.png")
    Image.new("L", size, 128).save(tmp_path / "bad.png")
    choose(phone, tmp_path / "bad.png")
    assert said in phone.get_by_role("alert").inner_text()
    assert phone.get_by_role("status").inner_text() == "Still showing good.png."
    assert saved_mask(phone).shape == (80, 100)
    choose(phone, tmp_path / "good.png")
    assert not phone.get_by_role("alert").is_visible()


def test_the_threshold_moves_the_contour_and_is_said(phone, photo, tmp_path):
    photo(320, 240).save(tmp_path / "photo.png")
    choose(phone, tmp_path / "photo.png")
    slider, shares = phone.get_by_role("slider", name="Threshold"), []
    for value in ("5", "50", "95"):
        slider.fill(value)
        assert phone.locator("#threshold-value").inner_text() == f"{value} %"
        shares.append((saved_mask(phone) > 0).mean())
        said = phone.get_by_role("status").inner_text()
        assert (
            f"{100 * shares[-1]:.1f} % of the picture" in said or shares[-1] == 0
        ) and "ms on this device" in said
    assert shares[0] > shares[1] > shares[2]
    assert "photo.png: " in phone.locator("#view").get_attribute("aria-label")


def test_what_is_shown_changes_the_picture_and_not_the_mask(phone, photo, tmp_path):
    photo(320, 240).save(tmp_path / "photo.png")
    choose(phone, tmp_path / "photo.png")
    drawn = {}
    for kind in ("Contour", "Probability", "Photo"):
        phone.get_by_role("radio", name=kind).tap()
        drawn[kind] = phone.evaluate("document.getElementById('view').toDataURL()")
    assert len(set(drawn.values())) == 3


def test_it_works_by_keyboard_alone(phone, tmp_path):
    Image.fromarray(lesion_picture(100, 100)).save(tmp_path / "photo.png")
    choose(phone, tmp_path / "photo.png")
    reached = []
    phone.evaluate("document.activeElement.blur()")
    for _ in range(8):
        phone.keyboard.press("Tab")
        reached.append(
            phone.evaluate(
                "(({ id, name, tagName }) => id || name || tagName)(document.activeElement)"
            )
        )
    stops = [name for name in dict.fromkeys(reached) if name not in ("BODY", "HTML")]
    assert stops[:6] == ["shown", "threshold", "SUMMARY", "camera", "choose", "save"]
    phone.get_by_role("slider").focus()
    phone.keyboard.press("ArrowRight")
    assert phone.locator("#threshold-value").inner_text() == "51 %"


def test_buttons_are_within_a_thumbs_reach_and_large_enough(phone):
    for name in ("camera", "choose", "save"):
        box = phone.locator(f".button:has(#{name}), #{name}.button").bounding_box()
        assert (
            box["height"] >= 44
            and box["y"] + box["height"] > 0.9 * PHONE["viewport"]["height"]
            and box["y"] + box["height"] <= PHONE["viewport"]["height"]
        )
    assert phone.evaluate("document.documentElement.scrollWidth") <= PHONE["viewport"]["width"], (
        "no scrolling sideways"
    )
    assert phone.locator("#camera").get_attribute("capture") == "environment"


def luminance(colour: str) -> float:
    channels = [int(v) / 255 for v in colour.strip("rgb()").split(",")[:3]]
    r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_readable_by_day_and_night(phone, scheme):
    phone.emulate_media(color_scheme=scheme)
    style = "(e) => { const s = getComputedStyle(e); return [s.color, s.backgroundColor]; }"
    back = phone.locator("body").evaluate(style)[1]
    assert (luminance(back) > 0.5) == (scheme == "light")
    for selector in ("body", ".notice", "summary", ".button.primary", "#save", "#problem"):
        text, own = phone.locator(selector).first.evaluate(style)
        bright, dark = sorted(
            (luminance(text), luminance(back if own == "rgba(0, 0, 0, 0)" else own)), reverse=True
        )
        assert (bright + 0.05) / (dark + 0.05) >= 4.5, (selector, text, own)


def test_what_the_page_says_of_the_network_is_escaped(phone):
    phone.get_by_text("About this network").click()
    assert phone.get_by_text("Trained on <phantoms> & nothing else.").is_visible()


def test_the_page_is_small(html):
    assert html.stat().st_size < 0.7e6


@pytest.mark.parametrize(
    "options", [{"width": 8}, {"width": 4, "stem": 2}, {"width": 4, "stem": 4}]
)
def test_every_width_and_stem_computes_its_golden_mask(browser, tmp_path, options):
    """Otherwise the page would not become ready."""
    network = unet(**options)
    student = TrainedNetwork(network, CFG.with_values(**options), tmp_path)
    write_page(student, Deployed(network), tmp_path / "page.html", [], 0.5, noise(1, 64, 64)[0])
    page = opened(browser, tmp_path / "page.html")
    assert page.locator("body").get_attribute("data-build") in ("relaxed", "simd")
    page.context.close()


def opened(browser, path, state="ready"):
    page = browser.new_context(offline=True).new_page()
    page.goto(path.as_uri())
    page.wait_for_selector(f"body[data-state={state}]", timeout=60_000)
    return page


@pytest.mark.fault
def test_a_device_that_computes_another_golden_mask_is_told_so(browser, html, tmp_path):
    text = html.read_text()
    packed = re.search(r'id="mask">(.*?)<', text)[1]
    mask = bytearray(gzip.decompress(base64.b64decode(packed)))
    mask[0] = (mask[0] + 9) % 256
    changed = base64.b64encode(gzip.compress(bytes(mask))).decode()
    (tmp_path / "page.html").write_text(text.replace(packed, changed))
    page = opened(browser, tmp_path / "page.html", state="failed")
    said = page.get_by_role("alert").inner_text()
    assert "this device computes another mask than the network that was trained" in said
    assert "largest difference 9 of 255" in said
    assert page.locator("#choose").is_disabled()
    page.context.close()


@pytest.mark.fault
def test_a_browser_without_relaxed_simd_uses_the_other_build(browser, html):
    context = browser.new_context(offline=True)
    context.add_init_script(
        "const all = WebAssembly.validate; let first = true;"
        "WebAssembly.validate = (code) => {"
        "  const ok = !first && all(code); first = false; return ok; }"
    )
    page = context.new_page()
    page.goto(html.as_uri())
    page.wait_for_selector("body[data-state=ready]", timeout=60_000)
    assert page.locator("body").get_attribute("data-build") == "simd"
    context.close()


def test_cost_is_measured_in_the_browser_too(browser):
    networks = ("student", "student, stem 2")
    table = cost.measure_cost((32, 64), ("browser",), networks, repeats=1)
    assert set(table["model"]) == set(networks)
    assert set(table["pixels"]) == {32, 64}
    assert (table["latency_ms_median"] > 0).all()


@pytest.mark.fault
def test_a_missing_browser_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(cost, "CHROMIUM", tmp_path / "chromium")
    with pytest.raises(LesionKDError, match="no browser at .*: install Debian's package chromium"):
        cost.measure_cost((32,), ("browser",), ("student",), repeats=1)
