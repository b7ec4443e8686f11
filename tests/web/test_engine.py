"""The engine of the page in a real browser: its tokens are those of the Python engine ``webgpu``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import needs
import numpy as np
import pytest
from sites import BLANK, Site, serving

from mbq_runtime import Engine
from mbq_runtime.bundle import manifest as bundle_manifest
from mbq_runtime.bundle.listed_files import CHUNK_BYTES
from mbq_runtime.pull import trim
from mbq_runtime.web import write_site

pytestmark = pytest.mark.heavy

PROMPT = np.random.default_rng(5).integers(0, 256, 40).tolist()
CONTEXT, TOKENS = 128, 16
CHANGES = [(8.0, None), (3.0, None), (4.5, None), (8.0, 3.0), (3.0, 8.0)]
"""Budget at the start, and from the fifth token on."""
GENERATE = """async ({ url, prompt, changes, tokens, context, chunks }) => {
  const { load } = await import("/mbq.js");
  const engine = globalThis.engine ??= await load(url, { context });
  await engine.coming;
  const found = [];
  for (const [first, then] of changes) {
    engine.avgBits = first;
    const reply = { tokens: [], bits: [] };
    for await (const piece of engine.generate(prompt, { maxTokens: tokens, fresh: true })) {
      if (!piece.ends) reply.tokens.push(piece.token);
      reply.bits.push(piece.bits);
      if (reply.bits.length === 5 && then !== null) engine.avgBits = then;
    }
    found.push(reply);
  }
  return found;
}"""


@pytest.fixture(scope="module")
def on_python(web_bundle: Path) -> Engine:
    needs.gpu("webgpu")
    return Engine.load(web_bundle, context=CONTEXT)


def said(engine: Engine, first: float, then: float | None) -> tuple[list[int], list[float]]:
    """Tokens and bits of the Python engine."""
    reply, count = engine.generate(PROMPT, max_tokens=TOKENS, avg_bits=first), [1]

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


def test_tokens_are_those_of_the_python_engine(on_python: Engine, site: Site, page: Any) -> None:
    page.goto(site.url + BLANK)
    given = {"url": "/bundle/", "prompt": PROMPT, "changes": CHANGES, "tokens": TOKENS, "context": CONTEXT}
    found = page.evaluate(GENERATE, given)
    for (first, then), reply in zip(CHANGES, found, strict=True):
        tokens, bits = said(on_python, first, then)
        assert reply["tokens"] == tokens, (first, then)
        # A router's score may lie within a rounding of its threshold.
        assert np.mean(reply["bits"]) == pytest.approx(np.mean(bits), abs=0.05), (first, then)
        if first != 4.5:
            assert reply["bits"] == pytest.approx(bits, abs=1e-4), (first, then)
    assert {url.partition("/bundle")[0].rpartition(":")[0] for url in page.asked} == {"http://127.0.0.1"}
    assert page.complaints == []


def test_it_speaks_after_the_first_slices_and_the_ceiling_rises(on_python: Engine, site: Site, page: Any) -> None:
    manifest = bundle_manifest.read(on_python.path)
    (weights,) = (entry for entry in manifest.files if entry.name == "gpu/weights.bin")
    first = -(-manifest.parts[0][0].end // CHUNK_BYTES)
    assert first < len(weights.chunks)
    page.goto(site.url + BLANK)
    # The server breaks off behind the first slices, and after a time gives the rest.
    site.most = first * CHUNK_BYTES
    script = """async prompt => {
      const { load } = await import("/mbq.js");
      globalThis.said = { trouble: [], depth: [] };
      const on = { trouble: error => said.trouble.push(error && error.message), depth: bits => said.depth.push(bits) };
      globalThis.engine = await load("/bundle/", { context: 128, on });
      const early = [], ceiling = engine.ceilingBits, options = { maxTokens: 8, fresh: true };
      for await (const { token, bits } of engine.generate(prompt, options)) early.push([token, bits]);
      return { early, ceiling, loaded: engine.loaded };
    }"""
    found = page.evaluate(script, PROMPT)
    assert found["loaded"] == first
    assert found["ceiling"] == 3
    on_python.ceiling_bits = 3.0
    tokens, bits = said(on_python, 8.0, None)
    on_python.ceiling_bits = None
    assert [token for token, _ in found["early"]] == tokens[:8]
    assert [used for _, used in found["early"]] == pytest.approx(bits[:8], abs=0.02)
    site.most = None
    after = """async prompt => {
      await engine.coming;
      const tokens = [];
      for await (const piece of engine.generate(prompt, { maxTokens: 8, fresh: true })) tokens.push(piece.token);
      return { tokens, said };
    }"""
    found = page.evaluate(after, PROMPT)
    assert found["tokens"] == said(on_python, 8.0, None)[0][:8]
    assert found["said"]["depth"][0] == 3
    assert found["said"]["depth"][-1] == 8
    assert "broke off" in found["said"]["trouble"][0]
    assert found["said"]["trouble"][-1] is None
    begins = [int(span.removeprefix("bytes=").partition("-")[0]) for span in site.weight_ranges]
    assert begins == sorted(begins)
    assert begins[0] == 0


def test_a_trimmed_bundle_says_what_the_whole_one_says_under_its_ceiling(
    on_python: Engine, web_bundle: Path, page: Any, tmp_path: Path
) -> None:
    trim(web_bundle, tmp_path / "trimmed", 4.0)
    write_site(tmp_path / "trimmed", tmp_path / "site")
    weights = "gpu/weights.bin"
    assert (tmp_path / "trimmed" / weights).stat().st_size < (web_bundle / weights).stat().st_size
    with serving(tmp_path / "site") as site:
        page.goto(site.url + BLANK)
        script = """async ({ prompt, context }) => {
          const app = await (await fetch("/app.json")).json();
          const { load } = await import("/mbq.js");
          const engine = await load(app.bundle, { context, depth: app.depth });
          await engine.coming;
          const found = [];
          for await (const piece of engine.generate(prompt, { maxTokens: 8 })) found.push(piece.token);
          return [engine.maxBits, engine.whole, found];
        }"""
        bits, whole, tokens = page.evaluate(script, {"prompt": PROMPT, "context": CONTEXT})
    assert (bits, whole) == (4, True)
    on_python.ceiling_bits = 4.0
    wanted = said(on_python, 8.0, None)[0][:8]
    on_python.ceiling_bits = None
    assert tokens == wanted
    assert said(Engine.load(tmp_path / "trimmed", context=CONTEXT), 4.0, None)[0][:8] == wanted


def test_a_server_without_ranges_sends_the_file_once(site: Site, page: Any) -> None:
    site.ranges = False
    page.goto(site.url + BLANK)
    given = {"url": "/bundle/", "prompt": PROMPT, "changes": [(8.0, None)], "tokens": 2, "context": CONTEXT}
    assert len(page.evaluate(GENERATE, given)[0]["tokens"]) == 2
    assert len(site.weight_ranges) == 1


def test_a_chunk_that_was_damaged_on_the_way_is_fetched_again(site: Site, page: Any) -> None:
    times = [0]

    def damage(path: str, begin: int, content: bytes) -> bytes:
        if not path.endswith("weights.bin"):
            return content
        times[0] += 1
        return bytes([content[0] ^ 1]) + content[1:] if times[0] == 1 else content

    site.change = damage
    page.goto(site.url + BLANK)
    given = {"url": "/bundle/", "prompt": PROMPT, "changes": [(8.0, None)], "tokens": 2, "context": CONTEXT}
    assert len(page.evaluate(GENERATE, given)[0]["tokens"]) == 2
    assert times[0] > 1


def test_a_damaged_file_is_refused_in_one_line(site: Site, page: Any) -> None:
    site.change = lambda path, begin, content: content[::-1] if path.endswith("weights.bin") else content
    page.goto(site.url + BLANK)
    script = """async () => {
      const { load } = await import("/mbq.js");
      return load("/bundle/", { context: 128 }).then(() => "loaded", error => [error.kind, error.message]);
    }"""
    kind, message = page.evaluate(script)
    assert kind == "broken"
    assert "gpu/weights.bin: its SHA-256 is" in message
    assert "copy the bundle again" in message


def test_a_sampled_reply_is_repeated_by_its_seed(site: Site, page: Any) -> None:
    page.goto(site.url + BLANK)
    script = """async prompt => {
      const { load } = await import("/mbq.js");
      const engine = await load("/bundle/", { context: 128 });
      await engine.coming;
      const found = [];
      for (const seed of [1, 1, 2]) {
        const tokens = [];
        const options = { maxTokens: 12, temperature: 2, topK: 200, topP: 0.99, seed };
        for await (const piece of engine.generate(prompt, options)) tokens.push(piece.token);
        found.push(tokens);
      }
      return found;
    }"""
    one, again, other = page.evaluate(script, PROMPT[:9])
    assert one == again
    assert one != other
