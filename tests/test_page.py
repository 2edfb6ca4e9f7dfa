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

from lesionkd_core.data.images import read_image
from lesionkd_core.export.native import pack
from lesionkd_core.export.page import write_page
from lesionkd_core.export.parity import Deployed
from lesionkd_core.predict import TrainedNetwork
from tests.fixed import CFG, fixed_run, mask_of, noise, picture_of, unet
from tools.browser import CHROMIUM, FLAGS

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


def page_of(student, path, about=()):
    """The page of a student with a golden picture that is not a square."""
    model, picture = pack(Deployed(student.network), 64, student.cfg.fit), picture_of(80, 60)
    mask = mask_of(student, picture)
    write_page(model, path, "Lesion segmentation: phantom", [*about], picture, mask)
    return path


@pytest.fixture(scope="module")
def html(student, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "segment.html"
    return page_of(student, path, ["Trained on <phantoms> & nothing else."])


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


def choose(phone, file):
    phone.set_input_files("#choose", file)
    phone.wait_for_selector("body[data-state=ready]", timeout=60_000)


def saved(file, width, height, mode="RGB", **options):
    """A drawn lesion as a file."""
    Image.fromarray(picture_of(width, height)).convert(mode).save(file, **options)
    return file


def saved_mask(phone) -> np.ndarray:
    with phone.expect_download() as download:
        phone.get_by_role("button", name="Save mask").click()
    return np.asarray(Image.open(download.value.path()).convert("RGB"))[..., 0]


def test_it_loads_offline_from_the_disk_and_asks_for_nothing(phone):
    heading = phone.get_by_role("heading").inner_text()
    assert phone.title() == heading == "Lesion segmentation: phantom"
    first, *rest = phone.requests
    assert first.startswith("file:")
    assert all(url.startswith(("blob:", "data:")) for url in rest), rest
    for said in ("not a medical device", "does not leave it"):
        assert phone.get_by_text(said).is_visible()
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
        fetch, image = "fetch(url).catch(() => {})", "new Image().src = url"
        beacon, socket = (
            "navigator.sendBeacon(url, 'x')",
            "new WebSocket(url.replace('http', 'ws'))",
        )
        url = f"http://127.0.0.1:{server.server_port}/leak"
        for way in (fetch, image, beacon, socket):
            refused = online.evaluate(REFUSED.replace("WAY", way), url)
            assert refused in ("connect-src", "img-src"), way
        server.shutdown()
    assert asked == []
    online.context.close()


def test_a_photo_chosen_later_wins_over_a_slow_one_before_it(phone, tmp_path):
    large = saved(tmp_path / "large.png", 4500, 4500, compress_level=1)
    phone.set_input_files("#camera", large)
    phone.set_input_files("#choose", saved(tmp_path / "small.png", 90, 70))
    phone.wait_for_selector("#view[aria-label^='small.png']", timeout=60_000)
    phone.wait_for_timeout(3000)
    assert phone.locator("#view").get_attribute("aria-label").startswith("small.png")
    assert saved_mask(phone).shape == (70, 90)


def test_orientation_is_obeyed_and_colour_profiles_are_passed_over_as_in_training(
    phone, student, tmp_path
):
    turned, gamma = Image.Exif(), PngInfo()
    turned[274] = 6
    # linear: a browser that uses it makes the picture much brighter
    gamma.add(b"gAMA", (100_000).to_bytes(4, "big"))
    jpeg = {"exif": turned, "quality": 95, "subsampling": 0}
    for file, shape in (
        (saved(tmp_path / "turned.jpg", 200, 120, **jpeg), (200, 120)),
        (saved(tmp_path / "gamma.png", 200, 120, pnginfo=gamma), (120, 200)),
    ):
        choose(phone, file)
        mask, expected = saved_mask(phone) > 0, student.predict([read_image(file)])[0] > 0.5
        assert mask.shape == expected.shape == shape
        assert (mask != expected).mean() <= MAY_DIFFER, file.name


SIZES = [(480, 640), (1600, 300), (2, 3)]


@pytest.mark.parametrize(
    ("width", "height", "mode"), [*((*s, "RGB") for s in SIZES), (301, 219, "L"), (9, 200, "RGBA")]
)
def test_its_masks_are_pytorchs(phone, student, tmp_path, width, height, mode):
    file = saved(tmp_path / "photo.png", width, height, mode)
    choose(phone, file)
    mask = saved_mask(phone)
    expected = student.predict([read_image(file)])[0] > 0.5
    assert mask.shape == (height, width) and set(np.unique(mask)) <= {0, 255}
    assert ((mask > 0) != expected).mean() <= MAY_DIFFER
    if width > 9 and mode == "RGB":
        assert 0 < expected.mean() < 1, "a picture without a mask to compare"


def encoded(pixels, kind="PNG"):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


@pytest.mark.fault
@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("notes.txt", b"no picture", "notes.txt is not a photo"),
        ("deep.png", encoded(np.full((40, 50), 9000, np.uint16)), "deep.png has 16 bits"),
        ("cut.png", encoded(noise(1, 90, 80)[0])[:900], "cut.png is damaged"),
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
    ("size", "said"), [((8000, 6250), "has 50 megapixels; this page takes"), ((1, 1), "1 x 1 px")]
)
def test_a_picture_of_an_impossible_size_gets_a_clear_message_and_the_one_before_stays(
    phone, tmp_path, size, said
):
    choose(phone, saved(tmp_path / "good.png", 100, 80))
    Image.new("L", size, 128).save(tmp_path / "bad.png")
    choose(phone, tmp_path / "bad.png")
    assert said in phone.get_by_role("alert").inner_text()
    assert phone.get_by_role("status").inner_text() == "Still showing good.png."
    assert saved_mask(phone).shape == (80, 100)
    choose(phone, tmp_path / "good.png")
    assert not phone.get_by_role("alert").is_visible()


def test_the_threshold_moves_the_contour_and_is_said(phone, tmp_path):
    choose(phone, saved(tmp_path / "photo.png", 320, 240))
    slider, shares = phone.get_by_role("slider", name="Threshold"), []
    for value in ("5", "50", "95"):
        slider.fill(value)
        assert phone.locator("#threshold-value").inner_text() == f"{value} %"
        shares.append((saved_mask(phone) > 0).mean())
        said = phone.get_by_role("status").inner_text()
        assert f"{100 * shares[-1]:.1f} % of the picture" in said or shares[-1] == 0
        assert "ms on this device" in said
    assert shares[0] > shares[1] > shares[2]
    assert "photo.png: " in phone.locator("#view").get_attribute("aria-label")


def test_what_the_page_says_of_the_network_is_escaped(phone):
    phone.get_by_text("About this network").click()
    assert phone.get_by_text("Trained on <phantoms> & nothing else.").is_visible()


def test_a_wider_student_that_pads_its_pictures_has_a_page_too(browser, tmp_path):
    cfg = CFG.with_values(width=8, fit="pad")
    path = page_of(TrainedNetwork(unet(width=8), cfg, tmp_path), tmp_path / "page.html")
    page = opened(browser, path)  # otherwise its golden mask would be another one
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
