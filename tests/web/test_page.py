"""The page in a real browser, in the width of a phone: chat, the budget, offline, and what goes wrong."""

from __future__ import annotations

import re
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from io import BytesIO
from typing import Any

import pytest
from file_server import FileServer
from model_page import PHONE, ModelPage, until
from PIL import Image
from playwright import sync_api as playwright
from playwright.sync_api import expect
from sites import WEIGHTS, gone, there, weight_ranges
from watched_page import faults, hosts, watched

pytestmark = pytest.mark.heavy

FALLS_MS, RISES_MS = 3_000, 60_000
QUESTION = "Tell me about the sea."
# Chromium may tell a state as the next one: see VirtualPressure.
CALM, PRESSED = re.compile("nominal|fair"), {"serious": 5.5, "critical": 3.0}


@pytest.fixture
def page(model_page: ModelPage) -> Any:
    return model_page.page


def ask(page: Any) -> None:
    page.fill("#text", QUESTION)
    page.press("#text", "Enter")


def speak(page: Any) -> str:
    """Ask something, and stop the reply when it has some tokens."""
    ask(page)
    return stop(page)


def stop(page: Any) -> str:
    """Stop the reply when it has some tokens.  What the page says of it."""
    count = page.locator("#talk .note").count()
    until(page, "mbq.tokens > 3")
    page.click("#send")
    expect(page.locator("#talk .note")).to_have_count(count + 1)
    expect(page.locator("#send")).to_have_text("Send")
    text: str = page.locator("#talk .note").last.text_content()
    return text


def calm(model_page: ModelPage) -> Any:
    """Make the device calm, and the controller forget what was."""
    page = model_page.page
    model_page.pressure.set("nominal")
    expect(page.locator("#device b")).to_have_text(CALM)
    page.evaluate("""() => {
      setBattery({ level: 0.8, charging: true, dischargingTime: Infinity });
      setHidden(false);
      document.getElementById("limit").value = 8;
      document.getElementById("limit").dispatchEvent(new Event("input"));
      mbq.governor.restart();
    }""")
    expect(page.locator("#bits b")).to_have_text("8.0")
    return page


def falls(page: Any, bits: str, reason: str) -> None:
    """The budget falls soon, and the page says why."""
    expect(page.locator("#bits b")).to_have_text(bits, timeout=FALLS_MS)
    expect(page.locator("#why")).to_have_text(reason)


def test_a_chat(page: Any, model_page: ModelPage) -> None:
    assert "tokens/s" in speak(page)
    expect(page.locator("#talk .user")).to_have_text(QUESTION)
    expect(page.locator("#talk .assistant")).not_to_be_empty()
    page.click("#new")
    expect(page.locator("#talk article")).to_have_count(0)
    page.click("#ideas button >> nth=0")
    expect(page.locator("#talk .user")).to_have_text(QUESTION)
    expect(page.locator("#ideas")).to_be_hidden()
    stop(page)
    assert hosts(page) == {model_page.site.url}
    assert faults(page) == []


def test_a_pressed_device_lowers_the_budget_and_a_calm_one_raises_it(model_page: ModelPage) -> None:
    page = calm(model_page)
    model_page.pressure.set("serious")
    expect(page.locator("#bits b")).not_to_have_text("8.0", timeout=FALLS_MS)
    state = page.locator("#device b").text_content()
    expect(page.locator("#bits b")).to_have_text(f"{PRESSED[state]:.1f}")
    expect(page.locator("#why")).to_have_text(f"device: its state is {state}")
    model_page.pressure.set("nominal")
    expect(page.locator("#why")).to_contain_text("rises after a calm time")
    expect(page.locator("#bits b")).to_have_text(f"{PRESSED[state] + 1:.1f}", timeout=RISES_MS)


def test_a_low_battery_lowers_the_budget(model_page: ModelPage) -> None:
    page = calm(model_page)
    page.evaluate("setBattery({ level: 0.12, charging: false, dischargingTime: 5400 })")
    falls(page, "3.5", "battery: 12% left")
    expect(page.locator("#battery")).to_contain_text("12 %")
    expect(page.locator("#battery")).to_contain_text("1.5 h")


def test_a_hidden_tab_lowers_the_budget(model_page: ModelPage) -> None:
    page = calm(model_page)
    page.evaluate("setHidden(true)")
    falls(page, "3.0", "hidden: nobody sees the page")


def test_the_slider_bounds_the_budget(model_page: ModelPage) -> None:
    page = calm(model_page)
    page.click("#set")
    page.locator("#limit").fill("4")
    expect(page.locator("#bits b")).to_have_text("4.0")
    ask(page)
    until(page, "mbq.governor.status.bitsUsed !== null")  # it is forgotten soon after a reply
    used = page.evaluate("mbq.governor.status.bitsUsed")
    stop(page)
    page.click("#set")
    assert used < 5


def test_it_fits_a_phone_in_both_schemes(model_page: ModelPage) -> None:
    page = calm(model_page)
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


def test_a_device_that_is_lost_comes_back_and_the_conversation_stays(page: Any) -> None:
    speak(page)
    count = page.locator("#talk article").count()
    page.evaluate("void (globalThis.before = mbq.engine, mbq.engine.device.gpu.destroy())")
    expect(page.locator("#trouble")).to_contain_text("the GPU was taken away")
    until(page, "Boolean(mbq.engine && mbq.engine !== before)")
    expect(page.locator("#trouble")).to_be_hidden()
    speak(page)
    expect(page.locator("#talk article")).to_have_count(count + 2)


def test_two_tabs_share_the_model_in_turn_and_need_no_server(page: Any, model_page: ModelPage) -> None:
    site = model_page.site
    page.evaluate("navigator.serviceWorker.ready")
    # The server goes away.  What the page needs is kept.
    site.answer = gone
    other = watched(page.context.new_page())
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
    site.answer = there


# ---- What is told before the download --------------------------------------------------------------------------------


@pytest.fixture
def fresh(browser: playwright.Browser) -> Iterator[Any]:
    """A page without anything kept."""
    context = browser.new_context(viewport=PHONE)
    yield watched(context.new_page())
    context.close()


def test_a_browser_without_webgpu_is_told_what_works(fresh: Any, site: FileServer) -> None:
    fresh.add_init_script("Object.defineProperty(Navigator.prototype, 'gpu', { get: () => undefined })")
    fresh.goto(f"{site.url}/")
    expect(fresh.locator("#facts")).to_contain_text("this browser has no WebGPU; Chrome")
    expect(fresh.locator("#load")).to_be_hidden()
    assert weight_ranges(site) == []


def test_a_key_is_asked_for_when_the_server_wants_it_for_the_weights(fresh: Any, site: FileServer) -> None:
    def locked(handler: BaseHTTPRequestHandler, path: str) -> bool:
        if not path.endswith(WEIGHTS) or handler.headers["Authorization"] == "Bearer sesame":
            return False
        handler.send_error(401)
        return True

    site.answer = locked
    fresh.goto(f"{site.url}/")
    fresh.click("#load")
    expect(fresh.locator("#door")).to_be_visible(timeout=60_000)
    fresh.fill("#key", "sesame")
    fresh.press("#key", "Enter")
    fresh.click("#load")
    until(fresh, "Boolean(mbq.found && document.getElementById('progress').value > 0)")
    assert weight_ranges(site) != []


def test_a_device_that_is_too_small_is_told_before_the_download(fresh: Any, site: FileServer) -> None:
    # The kernels need more buffers than this adapter says that it has.
    fresh.add_init_script(
        "Object.defineProperty(GPUSupportedLimits.prototype, 'maxStorageBuffersPerShaderStage', { get: () => 2 })"
    )
    fresh.goto(f"{site.url}/")
    expect(fresh.locator("#facts")).to_contain_text("buffers in a kernel")
    expect(fresh.locator("#load")).to_be_hidden()
    assert weight_ranges(site) == []
