"""The monitor page in a real browser, in the width of a phone and of a desktop, without access to other hosts."""

from __future__ import annotations

from collections.abc import Iterator
from io import BytesIO

import needs
import pytest
from PIL import Image
from playwright import sync_api as playwright
from serving import Running, serve

from mbq_runtime import Engine
from mbq_runtime.control.events import Event
from mbq_runtime.sensing.readings import Readings

pytestmark = pytest.mark.heavy

OPTIONS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
]  # fmt: skip
PHONE, DESK = (390, 844), (1280, 800)
REGIONS = ("#model", "#link", "#why", "#bits", "#speed", "#temperature", "#power", "#events")


@pytest.fixture(scope="module")
def browser() -> Iterator[playwright.Browser]:
    with (
        playwright.sync_playwright() as driver,
        driver.chromium.launch(executable_path=needs.program("chromium"), args=OPTIONS) as found,
    ):
        yield found


@pytest.fixture(params=[PHONE, DESK], ids=["phone", "desk"])
def page(browser: playwright.Browser, request: pytest.FixtureRequest) -> Iterator[playwright.Page]:
    """A page that records its requests in ``page.asked`` and its errors in ``page.complaints``."""
    width, height = request.param
    context = browser.new_context(viewport={"width": width, "height": height})
    found = context.new_page()
    found.set_default_timeout(20_000)
    found.asked, found.complaints = [], []
    found.on("request", lambda asked: found.asked.append(asked.url))
    found.on("pageerror", lambda error: found.complaints.append(str(error)))
    found.on("console", lambda said: found.complaints.append(said.text) if said.type == "error" else None)
    yield found
    context.close()


def board(running: Running, temp_c: float, bits: float, reason: str) -> None:
    running.governor.set(
        avg_bits=bits, reason=reason, temp_c=temp_c, throttle_temp_c=80.0, heat_throttled=False, power_w=5.25,
        tokens_per_s=9.5, avg_bits_used=bits - 0.02, energy_j_per_token=0.553,
    )  # fmt: skip


def shows(page: playwright.Page, place: str, text: str) -> None:
    playwright.expect(page.locator(place)).to_contain_text(text, timeout=20_000)


def test_values_change_live_and_nothing_leaves_the_machine(page: playwright.Page, running: Running) -> None:
    board(running, 61.3, 8.0, "full quality")
    page.goto(running.url)
    for place, text in (
        ("#model", "tiny"), ("#link", "live"), ("#why", "full quality"), ("#events", "none yet"),
        ("#bits .value", "8.0"), ("#bits .note", "7.98"), ("#speed .value", "9.5"),
        ("#temperature .value", "61.3"), ("#temperature .note", "slows down at 80 °C"),
        ("#power .value", "5.3"), ("#power .note", "0.55 J/token"),
    ):  # fmt: skip
        shows(page, place, text)
    board(running, 78.9, 4.5, "heat: 78.9 °C")
    running.feed.add_event(Event(1.8e9, 8.0, 4.5, "heat: 78.9 °C", Readings(0.0)))
    running.feed.add_event(Event(1.8e9, 4.5, 4.5, "<b>the power sensor fell silent</b>", Readings(0.0)))
    for place, text in (
        ("#temperature .value", "78.9"), ("#bits .value", "4.5"), ("#why", "heat: 78.9 °C"), ("#events", "8.0 → 4.5"),
        ("#events", "<b>the power sensor fell silent</b>"),
    ):  # fmt: skip
        shows(page, place, text)
    assert page.locator("#events li").count() == 2
    path = page.locator("#temperature path").get_attribute("d")
    assert path is not None
    assert path.count("L") >= 1  # a line of at least two samples
    assert page.asked == [f"{running.url}/", f"{running.url}/live"]
    assert page.complaints == []


def test_it_fits_and_its_parts_are_seen(page: playwright.Page, running: Running) -> None:
    board(running, 71.0, 6.0, "heat: " + "a long reason without end " * 6)
    running.feed.add_event(Event(1.8e9, 8.0, 6.0, "unbroken" * 30, Readings(0.0)))
    page.goto(running.url)
    shows(page, "#bits .value", "6.0")
    shows(page, "#events", "unbroken")
    size = page.viewport_size
    assert size is not None
    assert page.evaluate("document.documentElement.scrollWidth") == size["width"]
    boxes = []
    for region in REGIONS:
        box = page.locator(region).bounding_box()
        assert box is not None, region
        assert box["width"] > 10, region
        assert box["x"] >= 0, region
        assert box["x"] + box["width"] <= size["width"], region
        boxes.append(box)
    columns = len({box["x"] for box in boxes[3:7]})
    assert columns == (2 if size["width"] == PHONE[0] else 4)
    assert colours(page.screenshot(full_page=True)) >= 8


def colours(png: bytes) -> int:
    """The number of colours; a blank page has one."""
    return len(Image.open(BytesIO(png)).convert("RGB").getcolors(1 << 24) or ())


def test_what_the_board_does_not_tell_is_unknown(page: playwright.Page, running: Running) -> None:
    page.goto(running.url)
    shows(page, "#temperature .value", "unknown")
    shows(page, "#temperature .note", "no temperature sensor")
    shows(page, "#power .value", "unknown")
    shows(page, "#power .note", "no power sensor")
    shows(page, "#speed .value", "idle")
    assert page.locator("#temperature path").get_attribute("d") == ""


def test_it_asks_for_the_key(page: playwright.Page, engine: Engine) -> None:
    with serve(engine, api_key="sesame") as running:
        page.goto(running.url)
        shows(page, "#link", "needs the API key")
        assert page.locator("#bits .value").text_content() == ""
        page.fill("#key", "wrong")
        page.click("button")
        page.wait_for_timeout(300)
        shows(page, "#link", "needs the API key")
        page.fill("#key", "sesame")
        page.click("button")
        shows(page, "#link", "live")
        assert page.locator("#door").is_hidden()
        assert not any("sesame" in url for url in page.asked)


def test_it_comes_back_when_the_server_does(page: playwright.Page, engine: Engine) -> None:
    with serve(engine) as running:
        page.goto(running.url)
        shows(page, "#link", "live")
        port = running.port
    shows(page, "#link", "no connection")
    with serve(engine, port=port):
        shows(page, "#link", "live")
