"""The page in a real browser, in the width of a phone: chat, the budget, offline, and what goes wrong."""

from __future__ import annotations

import time
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from playwright import sync_api as playwright
from playwright.sync_api import expect
from sites import Site, serving
from watched_page import PATIENCE_MS, watched

pytestmark = pytest.mark.heavy

FALLS_MS, RISES_MS = 3_000, 60_000
SENSORS = """
  const battery = Object.assign(new EventTarget(), { level: 0.8, charging: true, dischargingTime: Infinity });
  navigator.getBattery = async () => battery;
  globalThis.setBattery = values => {
    Object.assign(battery, values);
    battery.dispatchEvent(new Event("levelchange"));
  };
  globalThis.PressureObserver = class {
    constructor(call) { globalThis.setPressure = state => call([{ state }]); }
    async observe() {}
    disconnect() {}
  };
  let hidden = false;
  Object.defineProperty(Document.prototype, "hidden", { get: () => hidden });
  globalThis.setHidden = value => {
    hidden = value;
    document.dispatchEvent(new Event("visibilitychange"));
  };
"""
"""Sensors that a test sets.  The browser has its own, which no test can warm."""


# Kernels take seconds to compile on a processor, so the tests share one page, and leave it as they found it.
@pytest.fixture(scope="module")
def context(browser: playwright.Browser) -> Iterator[playwright.BrowserContext]:
    found = browser.new_context(viewport={"width": 390, "height": 844})
    found.add_init_script(SENSORS)
    yield found
    found.close()


@pytest.fixture(scope="module")
def shared(context: playwright.BrowserContext, site_folder: Path) -> Iterator[tuple[Any, Site]]:
    """The page with the model, which came from a server that was gone at first."""
    with serving(site_folder) as site:
        page = watched(context.new_page())
        site.most = 0
        page.goto(f"{site.url}/")
        expect(page.locator("#facts")).to_contain_text("MB before the first word")
        expect(page.locator("#facts")).to_contain_text("MB of memory")
        page.click("#load")
        expect(page.locator("#trouble")).to_contain_text("tried again in")
        site.most = None
        expect(page.locator("#composer")).to_be_visible()
        page.evaluate("mbq.engine.coming")
        expect(page.locator("#trouble")).to_be_hidden()
        yield page, site


@pytest.fixture
def page(shared: tuple[Any, Site]) -> Any:
    return shared[0]


def until(page: Any, holds: str) -> None:
    """Wait until an expression is true.  The page permits no evaluation of its own."""
    end_s = time.monotonic() + PATIENCE_MS / 1000
    while not page.evaluate(holds):
        assert time.monotonic() < end_s, holds
        page.wait_for_timeout(20)


def speak(page: Any) -> str:
    """Ask something, and stop the reply when it has some tokens."""
    count = page.locator("#talk .note").count()
    page.fill("#text", "Hello")
    page.press("#text", "Enter")
    until(page, "mbq.tokens > 3")
    page.click("#send")
    expect(page.locator("#talk .note")).to_have_count(count + 1)
    expect(page.locator("#send")).to_have_text("Send")
    text: str = page.locator("#talk .note").last.text_content()
    return text


def calm(page: Any) -> None:
    """Make the device calm, and the controller forget what was."""
    page.evaluate("""() => {
      setPressure("nominal");
      setBattery({ level: 0.8, charging: true, dischargingTime: Infinity });
      setHidden(false);
      document.getElementById("limit").value = 8;
      document.getElementById("limit").dispatchEvent(new Event("input"));
      mbq.governor.restart();
    }""")
    expect(page.locator("#bits b")).to_have_text("8.0")


def falls(page: Any, bits: str, reason: str) -> None:
    """The budget falls soon, and the page says why."""
    expect(page.locator("#bits b")).to_have_text(bits, timeout=FALLS_MS)
    expect(page.locator("#why")).to_have_text(reason)


def test_a_chat(page: Any, shared: tuple[Any, Site]) -> None:
    assert "tokens/s" in speak(page)
    expect(page.locator("#talk .user")).to_have_text("Hello")
    expect(page.locator("#talk .assistant")).not_to_be_empty()
    page.click("#new")
    expect(page.locator("#talk article")).to_have_count(0)
    assert {url.split("/")[2] for url in page.asked} == {shared[1].url.split("/")[2]}
    assert [text for text in page.complaints if "CONTENT_LENGTH_MISMATCH" not in text] == []


def test_a_pressed_device_lowers_the_budget_and_a_calm_one_raises_it(page: Any) -> None:
    calm(page)
    page.evaluate("setPressure('serious')")
    falls(page, "5.5", "device: its state is serious")
    expect(page.locator("#device b")).to_have_text("serious")
    page.evaluate("setPressure('nominal')")
    expect(page.locator("#why")).to_contain_text("rises after a calm time")
    expect(page.locator("#bits b")).to_have_text("6.5", timeout=RISES_MS)


def test_a_low_battery_lowers_the_budget(page: Any) -> None:
    calm(page)
    page.evaluate("setBattery({ level: 0.12, charging: false, dischargingTime: 5400 })")
    falls(page, "3.5", "battery: 12% left")
    expect(page.locator("#battery")).to_contain_text("12 %")
    expect(page.locator("#battery")).to_contain_text("1.5 h")


def test_a_hidden_tab_lowers_the_budget(page: Any) -> None:
    calm(page)
    page.evaluate("setHidden(true)")
    falls(page, "3.0", "hidden: nobody sees the page")


def test_the_slider_bounds_the_budget(page: Any) -> None:
    calm(page)
    page.click("#set")
    page.locator("#limit").fill("4")
    expect(page.locator("#bits b")).to_have_text("4.0")
    speak(page)
    assert page.evaluate("mbq.governor.status.bitsUsed") < 5
    page.click("#set")


def test_it_fits_a_phone_in_both_schemes(page: Any) -> None:
    calm(page)
    speak(page)
    page.click("#set")
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        assert page.evaluate("document.documentElement.scrollWidth") == 390
        for place in ("header", "#gauges", "#why", "#settings", "#talk", "#composer", "#send"):
            box = page.locator(place).bounding_box()
            assert box is not None, place
            assert box["width"] > 30, place
            assert box["x"] >= 0, place
            assert box["x"] + box["width"] <= 390, place
            assert box["y"] + box["height"] <= 844, place
        picture = Image.open(BytesIO(page.screenshot())).convert("L")
        light = sum(picture.resize((39, 84)).tobytes()) / (39 * 84)
        assert (light > 128) == (scheme == "light")
    page.emulate_media(color_scheme="light")
    page.click("#set")


def test_a_device_that_is_lost_comes_back(page: Any) -> None:
    page.evaluate("void (globalThis.before = mbq.engine, mbq.engine.device.gpu.destroy())")
    expect(page.locator("#trouble")).to_contain_text("the GPU was taken away")
    until(page, "Boolean(mbq.engine && mbq.engine !== before)")
    expect(page.locator("#trouble")).to_be_hidden()
    speak(page)


def test_two_tabs_share_the_model_in_turn_and_need_no_server(
    context: playwright.BrowserContext, shared: tuple[Any, Site]
) -> None:
    page, site = shared
    page.evaluate("navigator.serviceWorker.ready")
    # The server goes away.  What the page needs is kept.
    site.gone = True
    other = watched(context.new_page())
    other.goto(f"{site.url}/")
    expect(other.locator("#trouble")).to_contain_text("another tab of this page has the model")
    assert page.evaluate("Boolean(mbq.engine)")
    other.click("#trouble button")
    expect(page.locator("#trouble")).to_contain_text("another tab took the model")
    expect(page.locator("#trouble button")).to_have_text("Use it here")
    expect(page.locator("#composer")).to_be_hidden()
    expect(other.locator("#composer")).to_be_visible()
    assert "tokens/s" in speak(other)
    other.close()
    site.gone = False


# ---- What is told before the download --------------------------------------------------------------------------------


@pytest.fixture
def fresh(browser: playwright.Browser) -> Iterator[Any]:
    """A page without anything kept."""
    context = browser.new_context(viewport={"width": 390, "height": 844})
    yield watched(context.new_page())
    context.close()


def test_a_browser_without_webgpu_is_told_what_works(fresh: Any, site: Site) -> None:
    fresh.add_init_script("Object.defineProperty(Navigator.prototype, 'gpu', { get: () => undefined })")
    fresh.goto(f"{site.url}/")
    expect(fresh.locator("#facts")).to_contain_text("this browser has no WebGPU; Chrome")
    expect(fresh.locator("#load")).to_be_hidden()
    assert site.weight_ranges == []


def test_a_device_that_is_too_small_is_told_before_the_download(fresh: Any, site: Site) -> None:
    # The kernels need more buffers than this adapter says that it has.
    fresh.add_init_script(
        "Object.defineProperty(GPUSupportedLimits.prototype, 'maxStorageBuffersPerShaderStage', { get: () => 2 })"
    )
    fresh.goto(f"{site.url}/")
    expect(fresh.locator("#facts")).to_contain_text("buffers in a kernel")
    expect(fresh.locator("#load")).to_be_hidden()
    assert site.weight_ranges == []
