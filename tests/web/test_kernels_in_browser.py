"""Every kernel, at every depth, in a real browser against the numpy definition: the tests of ``tests/gpu``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from browser_device import BrowserDevice
from devices import Runner
from playwright import sync_api as playwright
from sites import BLANK, serving
from test_kernels import *  # noqa: F403

from mbq_runtime.web import SITE

pytestmark = pytest.mark.heavy


@pytest.fixture(scope="module")
def runner(browser: playwright.Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    folder: Path = tmp_path_factory.mktemp("engine")
    (folder / "mbq.js").write_bytes(SITE["mbq.js"].read_bytes())
    with serving(folder) as site:
        page = browser.new_page()
        page.goto(site.url + BLANK)
        yield Runner("wgsl", BrowserDevice(page))
        page.close()
