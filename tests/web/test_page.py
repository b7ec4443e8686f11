"""The page in a real browser, in the width of a phone: chat, the budget, offline, and what goes wrong."""

from __future__ import annotations

import time
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

FALLS_MS, RISES_MS = 3_000, 40_000
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


def until(page: Any, holds: str) -> None:
    """Wait until an expression is true.  The page permits no evaluation of its own."""
    end_s = time.monotonic() + PATIENCE_MS / 1000
    while not page.evaluate(holds):
        assert time.monotonic() < end_s, holds
        page.wait_for_timeout(20)


def opened(page: Any, site: Site) -> Any:
    """The page with the model loaded."""
    page.goto(f"{site.url}/")
    page.click("#load")
    expect(page.locator("#composer")).to_be_visible()
    page.evaluate("mbq.engine.coming")
    return page


def speak(page: Any) -> str:
    """Ask something, and stop the reply when it has some text."""
    count = page.locator("#talk .note").count()
    page.fill("#text", "Hello there")
    page.press("#text", "Enter")
    expect(page.locator("#talk .assistant").last).not_to_be_empty()
    until(page, "mbq.engine.context.tokens.length > 16")
    page.click("#send")
    expect(page.locator("#talk .note")).to_have_count(count + 1)
    text: str = page.locator("#talk .note").last.text_content()
    return text


def test_a_chat_and_again_without_the_server(page: Any, site_folder: Path) -> None:
    with serving(site_folder) as site:
        page.goto(f"{site.url}/")
        expect(page.locator("#facts")).to_contain_text("MB before the first word")
        opened(page, site)
        assert "tokens/s" in speak(page)
        page.evaluate("navigator.serviceWorker.ready")
        hosts = {url.split("/")[2] for url in page.asked}
        assert hosts == {site.url.split("/")[2]}
        assert page.complaints == []
    page.reload()
    expect(page.locator("#composer")).to_be_visible()
    assert "tokens/s" in speak(page)


def test_the_budget_follows_the_device_with_the_reason(page: Any, site: Site) -> None:
    page.add_init_script(SENSORS)
    opened(page, site)
    bits, why = page.locator("#bits b"), page.locator("#why")
    expect(bits).to_have_text("8.0")
    page.evaluate("setPressure('serious')")
    expect(why).to_have_text("device: its state is serious", timeout=FALLS_MS)
    assert float(bits.text_content()) < 6
    expect(page.locator("#device b")).to_have_text("serious")
    page.evaluate("setPressure('nominal')")
    expect(why).to_contain_text("rises after a calm time")
    expect(bits).not_to_have_text("5.5", timeout=RISES_MS)
    assert float(bits.text_content()) > 5.5
    page.evaluate("setBattery({ level: 0.12, charging: false, dischargingTime: 5400 })")
    expect(page.locator("#battery")).to_contain_text("12 %")
    expect(page.locator("#battery")).to_contain_text("1.5 h")
    page.evaluate("setHidden(true)")
    expect(why).to_have_text("hidden: nobody sees the page", timeout=FALLS_MS)
    assert float(bits.text_content()) < 5


def test_a_low_battery_lowers_the_budget(page: Any, site: Site) -> None:
    page.add_init_script(SENSORS)
    opened(page, site)
    page.evaluate("setBattery({ level: 0.12, charging: false })")
    expect(page.locator("#why")).to_have_text("battery: 12% left", timeout=FALLS_MS)
    assert float(page.locator("#bits b").text_content()) < 5


def test_the_slider_bounds_the_budget(page: Any, site: Site) -> None:
    opened(page, site)
    page.click("#set")
    page.locator("#limit").fill("4")
    expect(page.locator("#bits b")).to_have_text("4.0")
    speak(page)
    assert page.evaluate("mbq.governor.status.bitsUsed") < 5


def test_a_server_that_goes_away_and_comes_back(page: Any, site: Site) -> None:
    site.most = 0
    page.goto(f"{site.url}/")
    page.click("#load")
    expect(page.locator("#trouble")).to_contain_text("tried again in")
    site.most = None
    expect(page.locator("#composer")).to_be_visible()
    page.evaluate("mbq.engine.coming")
    expect(page.locator("#trouble")).to_be_hidden()
    speak(page)


def test_a_damaged_file_is_told_and_can_be_tried_again(page: Any, site: Site) -> None:
    right = site.change
    site.change = lambda path, begin, content: content[::-1] if path.endswith("weights.bin") else content
    page.goto(f"{site.url}/")
    page.click("#load")
    expect(page.locator("#trouble")).to_contain_text("copy the bundle again")
    site.change = right
    page.click("#trouble button")
    expect(page.locator("#composer")).to_be_visible()


def test_a_device_that_is_lost_comes_back(page: Any, site: Site) -> None:
    opened(page, site)
    speak(page)
    page.evaluate("void (globalThis.before = mbq.engine, mbq.engine.device.gpu.destroy())")
    until(page, "Boolean(mbq.engine && mbq.engine !== before)")
    expect(page.locator("#composer")).to_be_visible()
    speak(page)


def test_two_tabs_share_the_model_in_turn(page: Any, site: Site) -> None:
    opened(page, site)
    other = watched(page.context.new_page())
    other.goto(f"{site.url}/")
    expect(other.locator("#trouble")).to_contain_text("another tab of this page has the model")
    other.click("#trouble button")
    expect(other.locator("#composer")).to_be_visible()
    expect(page.locator("#trouble")).to_contain_text("another tab took the model")
    speak(other)
    other.close()
    page.bring_to_front()
    page.click("#trouble button")
    expect(page.locator("#composer")).to_be_visible()


def test_a_browser_without_webgpu_is_told_what_works(page: Any, site: Site) -> None:
    page.add_init_script("Object.defineProperty(Navigator.prototype, 'gpu', { get: () => undefined })")
    page.goto(f"{site.url}/")
    expect(page.locator("#facts")).to_contain_text("this browser has no WebGPU; Chrome")
    expect(page.locator("#load")).to_be_hidden()
    assert site.weight_ranges == []


def test_a_device_that_is_too_small_is_told_before_the_download(page: Any, site: Site) -> None:
    # The buffers of the bundle are larger than what this adapter says that it has.
    page.add_init_script(
        "Object.defineProperty(GPUSupportedLimits.prototype, 'maxStorageBuffersPerShaderStage', { get: () => 2 })"
    )
    page.goto(f"{site.url}/")
    expect(page.locator("#facts")).to_contain_text("buffers in a kernel")
    assert site.weight_ranges == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone_in_both_schemes(browser: playwright.Browser, site: Site, scheme: Any, tmp_path: Path) -> None:
    context = browser.new_context(viewport={"width": 390, "height": 844}, color_scheme=scheme)
    page = opened(watched(context.new_page()), site)
    speak(page)
    page.click("#set")
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
    context.close()
