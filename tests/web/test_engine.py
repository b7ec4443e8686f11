"""The engine of the page in a real browser: its tokens are those of the Python engine ``webgpu``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import needs
import numpy as np
import pytest
from playwright import sync_api as playwright
from sites import BLANK, Site, serving
from watched_page import watched

from mbq_runtime import Engine
from mbq_runtime.bundle import manifest as bundle_manifest
from mbq_runtime.bundle.listed_files import CHUNK_BYTES
from mbq_runtime.pull import trim

pytestmark = pytest.mark.heavy

PROMPT = np.random.default_rng(5).integers(0, 256, 40).tolist()  # two chunks
CONTEXT, TOKENS, EARLY = 128, 10, 4
CHANGES = [(3.0, None), (4.5, None), (8.0, 3.0), (3.0, 8.0)]
"""Budget at the start, and from the fifth token on."""
# A kernel takes seconds to compile on a processor, so all tests share one engine.  The server first breaks off behind
# the slices of the lowest depth.
LOAD = """async context => {
  const { load } = await import("/mbq.js");
  globalThis.said = { trouble: [], depth: [] };
  const on = { trouble: error => said.trouble.push(error && error.message), depth: bits => said.depth.push(bits) };
  globalThis.engine = await load("/bundle/", { context, on });
  globalThis.reply = async (prompt, options, then = null) => {
    const found = { tokens: [], bits: [] };
    for await (const piece of engine.generate(prompt, { fresh: true, ...options })) {
      if (!piece.ends) found.tokens.push(piece.token);
      found.bits.push(piece.bits);
      if (found.bits.length === 5 && then !== null) engine.avgBits = then;
    }
    return found;
  };
  return { loaded: engine.loaded, ceiling: engine.ceilingBits };
}"""


@pytest.fixture(scope="module")
def on_python(web_bundle: Path) -> Engine:
    needs.gpu("webgpu")
    return Engine.load(web_bundle, context=CONTEXT)


@pytest.fixture(scope="module")
def coming(browser: playwright.Browser, site_folder: Path, first_chunks: int) -> Iterator[tuple[Any, Site, Any]]:
    """A page whose engine has the first slices, its site, and what ``LOAD`` returned."""
    with serving(site_folder) as site:
        site.most = first_chunks * CHUNK_BYTES
        page = watched(browser.new_page())
        page.goto(site.url + BLANK)
        yield page, site, page.evaluate(LOAD, CONTEXT)
        page.close()


@pytest.fixture(scope="module")
def first_chunks(web_bundle: Path) -> int:
    """Chunks with the slices of depth 1."""
    manifest = bundle_manifest.read(web_bundle)
    (weights,) = (entry for entry in manifest.files if entry.name == "gpu/weights.bin")
    found = -(-manifest.parts[0][0].end // CHUNK_BYTES)
    assert found < len(weights.chunks)
    return found


@pytest.fixture
def page(coming: tuple[Any, Site, Any]) -> Any:
    """The page when all slices are there."""
    found, site, _ = coming
    site.most = None
    found.evaluate("engine.coming")
    return found


def said(engine: Engine, first: float, then: float | None, tokens: int = TOKENS) -> tuple[list[int], list[float]]:
    """Tokens and bits of the Python engine."""
    reply, count = engine.generate(PROMPT, max_tokens=tokens, avg_bits=first), [1]

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


def test_it_speaks_after_the_first_slices(
    on_python: Engine, coming: tuple[Any, Site, Any], first_chunks: int, web_bundle: Path
) -> None:
    page, _, loaded = coming
    manifest = bundle_manifest.read(web_bundle)
    there = sum(part[0].end <= first_chunks * CHUNK_BYTES for part in manifest.parts)
    ceiling = manifest.profile.depth_bits[there - 1]
    assert 3 <= ceiling < 8
    assert loaded == {"loaded": first_chunks, "ceiling": ceiling}
    found = page.evaluate("([prompt, maxTokens]) => reply(prompt, { maxTokens })", [PROMPT, EARLY])
    on_python.ceiling_bits = float(ceiling)
    assert (found["tokens"], found["bits"]) == said_about(on_python, EARLY)
    on_python.ceiling_bits = None


def said_about(engine: Engine, tokens: int) -> tuple[list[int], Any]:
    found, bits = said(engine, 8.0, None, tokens)
    return found, pytest.approx(bits, abs=1e-4)


def test_the_ceiling_rises_when_the_rest_comes(page: Any) -> None:
    told = page.evaluate("said")
    assert told["depth"] == sorted(told["depth"])
    assert told["depth"][-1] == 8
    assert "broke off" in told["trouble"][0]
    assert told["trouble"][-1] is None
    assert page.evaluate("engine.whole")


@pytest.mark.parametrize(("first", "then"), CHANGES)
def test_tokens_are_those_of_the_python_engine(on_python: Engine, page: Any, first: float, then: float | None) -> None:
    script = """([prompt, maxTokens, first, then]) => {
      engine.avgBits = first;
      return reply(prompt, { maxTokens }, then);
    }"""
    found = page.evaluate(script, [PROMPT, TOKENS, first, then])
    tokens, bits = said(on_python, first, then)
    assert found["tokens"] == tokens
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
      const kept = engine.context.common(longer), short = await reply(longer, { maxTokens: 3, fresh: false });
      return [kept, short.tokens, (await reply(longer, { maxTokens: 3 })).tokens];
    }"""
    kept, short, fresh = page.evaluate(script, PROMPT[:9])
    assert kept == 9 + 2
    assert short == fresh


def test_a_prompt_that_is_too_long_or_empty_and_a_second_reply(page: Any) -> None:
    script = """async prompt => {
      const failing = async asked => {
        try {
          for await (const _ of engine.generate(asked)) break;
        } catch (error) {
          return error.message;
        }
      };
      return [await failing(Array(128).fill(3)), await failing([])];
    }"""
    long, empty = page.evaluate(script, PROMPT)
    assert long == "the prompt has 128 tokens, and the context 128; start a new conversation"
    assert empty == "the prompt is empty"


def test_nothing_else_was_asked_and_nothing_complained(page: Any, coming: tuple[Any, Site, Any]) -> None:
    assert {url.split("/")[2] for url in page.asked} == {coming[1].url.split("/")[2]}
    assert [text for text in page.complaints if "CONTENT_LENGTH_MISMATCH" not in text] == []


def test_a_trimmed_bundle_says_what_the_whole_one_says_under_its_ceiling(
    on_python: Engine, web_bundle: Path, tmp_path: Path
) -> None:
    trim(web_bundle, tmp_path / "trimmed", 4.0)
    weights = "gpu/weights.bin"
    assert (tmp_path / "trimmed" / weights).stat().st_size < (web_bundle / weights).stat().st_size
    on_python.ceiling_bits = 4.0
    wanted = said(on_python, 8.0, None)
    on_python.ceiling_bits = None
    assert said(Engine.load(tmp_path / "trimmed", context=CONTEXT), 4.0, None) == wanted
