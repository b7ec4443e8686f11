"""The page with a real bundle in Chromium: when it speaks, whether its tokens are Python's, and how it looks.

    python tests/benchmarks/browser.py BUNDLE --tokens 32 --out pages

BUNDLE is for WebGPU.  Both engines run on drivers for the processor, so their speed means nothing and is not printed.
With --out, pictures of the page are written, 390x844 pixels, light and dark.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from measured_on import commit
from playwright import sync_api as playwright

from mbq_runtime import Engine
from mbq_runtime.web import write_site

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "web"))

PROMPT = "Tell me about the sea."
BUDGETS: tuple[tuple[float, float | None], ...] = ((3.0, None), (4.0, None), (8.0, None), (8.0, 4.0))
"""Budget at the start, and in the second half of the reply."""
PATIENCE_MS = 600_000
ASK = """async ({ prompt, first, then, tokens }) => {
  const found = [];
  mbq.governor?.stop();
  mbq.engine.avgBits = first;
  for await (const piece of mbq.engine.generate(prompt, { maxTokens: tokens, fresh: true })) {
    found.push(piece.token);
    if (found.length === tokens / 2 && then !== null) mbq.engine.avgBits = then;
  }
  return found;
}"""


def main() -> None:
    parser = argparse.ArgumentParser(description="The page with a real bundle in Chromium")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--tokens", type=int, default=32, help="tokens of each reply; even")
    parser.add_argument("--out", type=Path, help="folder for pictures of the page")
    given = parser.parse_args()
    from browser_options import OPTIONS  # type: ignore[import-not-found]  # another room of the tests

    with tempfile.TemporaryDirectory() as temporary, playwright.sync_playwright() as driver:
        folder = Path(temporary) / "site"
        write_site(given.bundle, folder)
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=OPTIONS)
        found = _measure(browser, folder, given.tokens, given.out)
        browser.close()
    engine = Engine.load(given.bundle, context=512)
    for reply in found["replies"]:
        reply["python"] = _said(engine, reply["first"], reply["then"], given.tokens)
        reply["equal"] = reply["python"] == reply.pop("browser")
        del reply["python"]
    print(json.dumps({"commit": commit(), "tokens": given.tokens, **found}, indent=2))


def _measure(browser: Any, folder: Path, tokens: int, out: Path | None) -> dict[str, Any]:
    from sites import serving  # type: ignore[import-not-found]

    with serving(folder) as site:
        context = browser.new_context(viewport={"width": 390, "height": 844}, device_scale_factor=2)
        page = context.new_page()
        page.set_default_timeout(PATIENCE_MS)
        sent = [0]

        def count(path: str, begin: int, content: bytes) -> bytes:
            sent[0] += len(content)
            return content

        site.change = count
        page.goto(f"{site.url}/")
        page.wait_for_selector("#load:visible")
        facts = page.text_content("#facts")
        page.click("#load")
        page.wait_for_selector("#composer:visible")
        loaded = page.evaluate("mbq.engine.bundle.chunks()[mbq.engine.loaded - 1].end")
        total = (folder / "bundle/gpu/weights.bin").stat().st_size
        page.evaluate("mbq.engine.coming")
        replies = [
            {"first": first, "then": then, "browser": page.evaluate(
                ASK, {"prompt": PROMPT, "first": first, "then": then, "tokens": tokens})}
            for first, then in BUDGETS
        ]  # fmt: skip
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            page.reload()
            page.wait_for_selector("#composer:visible")
            page.fill("#text", PROMPT)
            page.press("#text", "Enter")
            while page.evaluate("document.querySelector('#talk .assistant').textContent.length") < 120:
                page.wait_for_timeout(200)
            page.click("#send")
            for scheme in ("light", "dark"):
                page.emulate_media(color_scheme=scheme)
                page.wait_for_timeout(300)
                page.screenshot(path=out / f"browser-{scheme}.png")
        context.close()
    return {
        "facts": facts,
        "share_before_first_word": round(loaded / total, 3),
        "sent_bytes": sent[0],
        "replies": replies,
    }


def _said(engine: Engine, first: float, then: float | None, tokens: int) -> list[int]:
    reply, count = engine.generate(PROMPT, max_tokens=tokens, avg_bits=first), [1]

    def change(seconds: float, bits: float) -> None:
        count[0] += 1
        if count[0] == tokens // 2 and then is not None:
            engine.avg_bits = then

    engine.add_listener(change)
    reply.text()
    engine.remove_listener(change)
    return list(reply.stats.tokens)


if __name__ == "__main__":
    main()
