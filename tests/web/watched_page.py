"""A page of the browser that records what it asks for and what goes wrong in it."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

from playwright.sync_api import expect

PATIENCE_MS = 300_000
expect.set_options(timeout=PATIENCE_MS)
SERVER_FAULTS = ("ERR_EMPTY_RESPONSE", "ERR_CONTENT_LENGTH_MISMATCH", "ERR_INCOMPLETE_CHUNKED_ENCODING")
"""What Chromium says where a server breaks off, as those of the tests do."""


def watched(page: Any) -> Any:
    """A page that records its requests in ``asked`` and its errors in ``complaints``."""
    page.set_default_timeout(PATIENCE_MS)
    page.asked, page.complaints = [], []
    page.on("request", lambda asked: page.asked.append(asked.url))
    page.on("pageerror", lambda error: page.complaints.append(str(error)))
    page.on("console", lambda said: page.complaints.append(said.text) if said.type == "error" else None)
    return page


def hosts(page: Any) -> set[str]:
    """The servers that a page asked, as "http://HOST:PORT".

    Args:
        page: from ``watched``.
    """
    return {"://".join(urlsplit(url)[:2]) for url in page.asked}


def faults(page: Any) -> list[str]:
    """The errors of a page that no server caused.

    Args:
        page: from ``watched``.
    """
    return [text for text in page.complaints if not any(fault in text for fault in SERVER_FAULTS)]
