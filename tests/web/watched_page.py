"""A page of the browser that records what it asks for and what goes wrong in it."""

from __future__ import annotations

from typing import Any

from playwright.sync_api import expect

PATIENCE_MS = 120_000
expect.set_options(timeout=PATIENCE_MS)


def watched(page: Any) -> Any:
    """A page that records its requests in ``asked`` and its errors in ``complaints``."""
    page.set_default_timeout(PATIENCE_MS)
    page.asked, page.complaints = [], []
    page.on("request", lambda asked: page.asked.append(asked.url))
    page.on("pageerror", lambda error: page.complaints.append(str(error)))
    page.on("console", lambda said: page.complaints.append(said.text) if said.type == "error" else None)
    return page
