"""The engine of the page in a real browser: its tokens are those of the Python engine ``webgpu``."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import needs
import nodes
import numpy as np
import pytest
from model_page import EARLY_PROMPT, EARLY_TOKENS, ModelPage, until
from playwright import sync_api as playwright
from sites import serving
from watched_page import faults, hosts, watched

from mbq_runtime import Engine
from mbq_runtime.bundle import manifest as bundle_manifest
from mbq_runtime.bundle.listed_files import CHUNK_BYTES
from mbq_runtime.pull import trim

pytestmark = pytest.mark.heavy

PROMPT = np.random.default_rng(5).integers(0, 256, 40).tolist()  # two chunks
CONTEXT, TOKENS = 128, 10
CHANGES = [(3.0, None), (4.5, None), (8.0, 3.0), (3.0, 8.0)]
"""Budget at the start, and from the fifth token on."""


@pytest.fixture(scope="module")
def on_python(web_bundle: Path) -> Engine:
    needs.gpu("webgpu")
    return Engine.load(web_bundle, context=CONTEXT)


@pytest.fixture(scope="module")
def page(model_page: ModelPage) -> Iterator[Any]:
    """The page, whose governor leaves the budget alone."""
    found = model_page.page
    found.evaluate("void (mbq.governor.look = () => {})")
    yield found
    found.evaluate("() => { delete mbq.governor.look; mbq.governor.tokens = []; }")


def said(
    engine: Engine, first: float, then: float | None, prompt: list[int] = PROMPT, tokens: int = TOKENS
) -> tuple[list[int], list[float]]:
    """Tokens and bits of the Python engine."""
    reply, count = engine.generate(prompt, max_tokens=tokens, avg_bits=first), [1]

    def change(seconds: float, bits: float) -> None:
        count[0] += 1
        if count[0] == 5 and then is not None:
            engine.avg_bits = then

    engine.add_listener(change)
    try:
        reply.text()
    finally:
        engine.remove_listener(change)
    return list(reply.stats.tokens), list(reply.stats.bits)


def test_it_speaks_after_the_first_slices(on_python: Engine, model_page: ModelPage, web_bundle: Path) -> None:
    manifest = bundle_manifest.read(web_bundle)
    there = sum(part[0].end <= CHUNK_BYTES for part in manifest.parts)
    ceiling = manifest.profile.depth_bits[there - 1]
    assert 3 <= ceiling < 8
    assert model_page.early["ceiling_bits"] == ceiling
    on_python.ceiling_bits = float(ceiling)
    tokens, bits = said(on_python, 8.0, None, EARLY_PROMPT, EARLY_TOKENS)
    on_python.ceiling_bits = None
    assert model_page.early["tokens"] == tokens
    assert model_page.early["bits"] == pytest.approx(bits, abs=1e-4)


def test_a_server_that_goes_away_and_one_that_damages_are_told_and_outlived(model_page: ModelPage) -> None:
    bits = model_page.early["ceiling_bits"]
    assert "gpu/weights.bin: the connection broke off; tried again in" in model_page.broken_off
    assert "gpu/weights.bin: its SHA-256 is" in model_page.damaged
    assert f"copy the bundle again; it goes on with {bits} bits" in model_page.damaged
    assert model_page.page.evaluate("[mbq.engine.whole, mbq.engine.ceilingBits]") == [True, 8]


@pytest.mark.parametrize(("first", "then"), CHANGES)
def test_tokens_are_those_of_the_python_engine(on_python: Engine, page: Any, first: float, then: float | None) -> None:
    script = """([prompt, maxTokens, first, then]) => {
      mbq.engine.avgBits = first;
      return reply(prompt, { maxTokens }, then);
    }"""
    found = page.evaluate(script, [PROMPT, TOKENS, first, then])
    tokens, bits = said(on_python, first, then)
    assert found["tokens"] == tokens
    assert len(set(tokens)) > 2
    # A router's score may lie within a rounding of its threshold.
    assert np.mean(found["bits"]) == pytest.approx(np.mean(bits), abs=0.05)
    if first != 4.5:
        assert found["bits"] == pytest.approx(bits, abs=1e-4)


def test_a_sampled_reply_is_repeated_by_its_seed(page: Any) -> None:
    script = """async prompt => {
      const found = [];
      for (const seed of [1, 1, 2]) {
        found.push((await reply(prompt, { maxTokens: 5, temperature: 2, topK: 200, topP: 0.99, seed })).tokens);
      }
      return found;
    }"""
    one, again, other = page.evaluate(script, PROMPT[:9])
    assert one == again
    assert one != other


def test_what_is_kept_of_a_prompt_is_not_read_again(page: Any) -> None:
    script = """async prompt => {
      const first = await reply(prompt, { maxTokens: 3 }), longer = [...prompt, ...first.tokens, 7, 8];
      const kept = mbq.engine.context.common(longer), short = await reply(longer, { maxTokens: 3, fresh: false });
      return [kept, short.tokens, (await reply(longer, { maxTokens: 3 })).tokens];
    }"""
    kept, short, fresh = page.evaluate(script, PROMPT[:9])
    assert kept == 9 + 2
    assert short == fresh


def test_a_prompt_that_is_too_long_or_empty_and_a_second_reply(page: Any) -> None:
    script = """async prompt => {
      const failing = async asked => {
        try {
          for await (const _ of mbq.engine.generate(asked)) break;
        } catch (error) {
          return error.message;
        }
      };
      const found = [await failing(Array(mbq.engine.contextLength).fill(3)), await failing([])];
      const reply = mbq.engine.generate(prompt);
      await reply.next();
      found.push(await failing(prompt));
      await reply.return();
      return found;
    }"""
    long, empty, second = page.evaluate(script, PROMPT[:9])
    assert long == "the prompt has 2048 tokens, and the context 2048; start a new conversation"
    assert empty == "the prompt is empty"
    assert second == "the engine is already generating; end that reply first"


def test_no_other_host_was_asked_and_nothing_complained(page: Any, model_page: ModelPage) -> None:
    assert hosts(page) == {model_page.site.url}
    assert faults(page) == []


def test_another_page_embeds_the_engine(browser: playwright.Browser, site_folder: Path, tmp_path: Path) -> None:
    shutil.copy(nodes.REPO / "examples/embed.html", tmp_path)
    (tmp_path / "site").symlink_to(site_folder)
    with serving(tmp_path) as site:
        page = watched(browser.new_page())
        page.goto(f"{site.url}/embed.html")
        until(page, "document.getElementById('reply').textContent.length > 2")
        assert hosts(page) == {site.url}
        assert faults(page) == []
        page.close()


def test_a_trimmed_bundle_says_what_the_whole_one_says_under_its_ceiling(
    on_python: Engine, web_bundle: Path, tmp_path: Path
) -> None:
    trim(web_bundle, tmp_path / "trimmed", 3.0)
    weights = "gpu/weights.bin"
    assert (tmp_path / "trimmed" / weights).stat().st_size < (web_bundle / weights).stat().st_size
    on_python.ceiling_bits = 3.0
    wanted = said(on_python, 8.0, None)
    on_python.ceiling_bits = None
    assert said(Engine.load(tmp_path / "trimmed", context=CONTEXT), 3.0, None) == wanted
