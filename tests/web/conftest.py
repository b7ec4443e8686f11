"""A browser with WebGPU on a driver for the processor, and a page that has a tiny bundle."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import needs
import pytest
from browser_options import OPTIONS
from file_server import FileServer
from model_page import ModelPage, open_page
from playwright import sync_api as playwright
from sites import serving
from tiny_models import TINIEST, write_checkpoint

from mbq_export.cli import command
from mbq_runtime.bundle import manifest as bundle_manifest
from mbq_runtime.web import write_site

MODEL: dict[str, object] = {
    **TINIEST, "intermediate_size": 64, "tie_word_embeddings": False, "max_position_embeddings": 31_200
}  # fmt: skip
"""A long table of rotations: the weights have two chunks, and their matrices stay small.  Several matrices have one
shape, and so one kernel.  The head is not the embedding: with that, a random model repeats its last token."""


@pytest.fixture(scope="session")
def web_bundle(tmp_path_factory: pytest.TempPathFactory, calibration_text: Path) -> Path:
    """A random Llama.  The slices of depth 1 end in its first chunk, and the others in its second."""
    folder = tmp_path_factory.mktemp("web")
    model = write_checkpoint(folder / "llama", "llama", seed=2, **MODEL)
    arguments = ["--model", model, "--output", folder / "bundle", "--target", "webgpu", "--method", "rtn"]
    arguments += ["--router", "mlp", "--calib-data", calibration_text, "--calib-tokens", 1024, "--json"]
    command([str(argument) for argument in arguments], standalone_mode=False)
    bundle: Path = folder / "bundle"
    manifest = bundle_manifest.read(bundle)
    # The quality floor of a random model is high.  With this one its budget can fall.
    bundle_manifest.write(replace(manifest, quality=replace(manifest.quality, floor_bits=3.0)), bundle)
    return bundle


@pytest.fixture(scope="session")
def site_folder(web_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``mbq web`` writes for the bundle."""
    folder = tmp_path_factory.mktemp("site") / "site"
    write_site(web_bundle, folder)
    return folder


@pytest.fixture
def site(site_folder: Path) -> Iterator[FileServer]:
    with serving(site_folder) as found:
        yield found


@pytest.fixture(scope="session")
def browser() -> Iterator[playwright.Browser]:
    with (
        playwright.sync_playwright() as driver,
        driver.chromium.launch(executable_path=needs.program("chromium"), args=OPTIONS) as found,
    ):
        yield found


# A kernel takes long to compile on a processor, so the tests of the engine and of the page share one page.
@pytest.fixture(scope="session")
def model_page(browser: playwright.Browser, site_folder: Path) -> Iterator[ModelPage]:
    """The page with the whole model."""
    with serving(site_folder) as site, open_page(browser, site) as found:
        yield found
