"""The page with the model of the tests: how it came there, and what a test does with it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from file_server import FileServer
from playwright import sync_api as playwright
from playwright.sync_api import expect
from sites import damaged, ends_after, unchanged
from virtual_pressure import VirtualPressure
from watched_page import PATIENCE_MS, watched

from mbq_runtime.bundle.listed_files import CHUNK_BYTES

PHONE: Any = {"width": 390, "height": 844}
EARLY_PROMPT, EARLY_TOKENS = [84, 104, 101, 32, 115, 101, 97], 4
SENSORS = """
  const battery = Object.assign(new EventTarget(), { level: 0.8, charging: true, dischargingTime: Infinity });
  navigator.getBattery = async () => battery;
  globalThis.setBattery = values => {
    Object.assign(battery, values);
    battery.dispatchEvent(new Event("levelchange"));
  };
  let hidden = false;
  Object.defineProperty(Document.prototype, "hidden", { get: () => hidden });
  globalThis.setHidden = value => {
    hidden = value;
    document.dispatchEvent(new Event("visibilitychange"));
  };
"""
"""The battery, and whether the tab is seen.  DevTools set neither; they set the pressure."""
REPLY = """() => {
  globalThis.reply = async (prompt, options, then = null) => {
    const found = { tokens: [], bits: [] };
    for await (const piece of mbq.engine.generate(prompt, { fresh: true, ...options })) {
      if (!piece.ends) found.tokens.push(piece.token);
      found.bits.push(piece.bits);
      if (found.bits.length === 5 && then !== null) mbq.engine.avgBits = then;
    }
    return found;
  };
}"""


@dataclass
class ModelPage:
    """The page, and what was seen while its model came.

    page: see ``watched_page``.
    site: its server.
    pressure: of its device.
    early: a reply with the slices of the first chunk: tokens, bits, and ceiling_bits at that time.
    broken_off: what the page said when the server went away behind that chunk.
    damaged: what it said when the next chunk was damaged.
    """

    page: Any
    site: FileServer
    pressure: VirtualPressure
    early: dict[str, Any]
    broken_off: str
    damaged: str


def until(page: Any, holds: str) -> None:
    """Wait until an expression is true.  The page permits no evaluation of its own.

    Args:
        page: see ``watched_page``.
        holds: the expression.
    """
    end_s = time.monotonic() + PATIENCE_MS / 1000
    while not page.evaluate(holds):
        assert time.monotonic() < end_s, holds
        page.wait_for_timeout(20)


@contextmanager
def open_page(browser: playwright.Browser, site: FileServer) -> Iterator[ModelPage]:
    """Load the model from a server that is gone at first, then breaks off, then damages a chunk.

    Args:
        browser: with WebGPU.
        site: what ``mbq web`` wrote.
    """
    context = browser.new_context(viewport=PHONE)
    context.add_init_script(SENSORS)
    page = watched(context.new_page())
    trouble = page.locator("#trouble")
    pressure = VirtualPressure(page)
    site.change = ends_after(0)
    page.goto(f"{site.url}/")
    expect(page.locator("#facts")).to_contain_text("MB before the first word")
    expect(page.locator("#facts")).to_contain_text("MB of memory")
    page.click("#load")
    expect(trouble).to_contain_text("tried again in")
    site.change = ends_after(CHUNK_BYTES)
    expect(page.locator("#composer")).to_be_visible()
    expect(trouble).to_contain_text("tried again in")
    broken_off = trouble.text_content()
    page.evaluate(REPLY)
    early = page.evaluate(
        """async ([prompt, maxTokens]) => {
          const ceiling = mbq.engine.ceilingBits;
          return { ceiling_bits: ceiling, ...await reply(prompt, { maxTokens }) };
        }""",
        [EARLY_PROMPT, EARLY_TOKENS],
    )
    site.change = damaged
    expect(trouble).to_contain_text("SHA-256")
    damaged_line = trouble.text_content()
    site.change = unchanged
    page.click("#trouble button")
    until(page, "mbq.engine.whole")
    expect(trouble).to_be_hidden()
    yield ModelPage(page, site, pressure, early, broken_off, damaged_line)
    context.close()
