"""The page with a real bundle in Chromium: when it speaks, whether its tokens are Python's, and how it looks.

    python tests/benchmarks/browser.py BUNDLE --pictures docs/figures

BUNDLE is for WebGPU.  The server sends --rate-mb a second.  It holds back what follows --share of all bytes until the
first word: the driver is slow, and more would come meanwhile.  Later the server is gone, and the page is opened again
without it.  Both engines run on drivers for the processor, so their speed means nothing and is not printed.  With
--pictures, pictures of the page are written, 390x844 pixels, light and dark.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import threading
from io import BytesIO
from pathlib import Path
from typing import Any

from first_words import slow_server
from measured_on import measured_on
from PIL import Image
from playwright import sync_api as playwright

from mbq_runtime import Engine
from mbq_runtime.web import write_site

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "web"))

PROMPT = "Tell me about the sea."
BUDGETS: tuple[tuple[float, float | None], ...] = ((3.0, None), (4.0, None), (8.0, None), (8.0, 4.0))
"""Budget at the start, and in the second half of the reply."""
PATIENCE_MS = 1_800_000
AGAIN_TOKENS = 8
PICTURE_LETTERS, PICTURE_COLOURS = 180, 64
ASK = """async ({ prompt, first, then, tokens }) => {
  const found = { tokens: [], text: "" };
  mbq.governor.look = () => {};
  mbq.engine.avgBits = first;
  for await (const piece of mbq.engine.generate(prompt, { maxTokens: tokens, fresh: true })) {
    found.tokens.push(piece.token);
    found.text += piece.text;
    if (found.tokens.length === tokens / 2 && then !== null) mbq.engine.avgBits = then;
  }
  return found;
}"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--tokens", type=int, default=32, help="tokens of each reply; even")
    parser.add_argument(
        "--rate-mb", type=float, default=2.0, help="MB a second that the server sends until the first word"
    )
    parser.add_argument("--share", type=float, default=0.44, help="share of all bytes that come before the first word")
    parser.add_argument("--pictures", type=Path, help="folder for pictures of the page")
    options = parser.parse_args()
    from browser_options import OPTIONS  # type: ignore[import-not-found]  # another room of the tests

    with tempfile.TemporaryDirectory() as temporary, playwright.sync_playwright() as driver:
        folder = Path(temporary) / "site"
        write_site(options.bundle, folder)
        with driver.chromium.launch(executable_path=shutil.which("chromium"), args=OPTIONS) as browser:
            loading, replies = _in_browser(browser, folder, options)
    engine = Engine.load(options.bundle, context=512)
    for row, tokens in replies:
        wanted = _on_python(engine, row["first_bits"], row["then_bits"], len(tokens))
        pairs = zip(tokens, wanted, strict=False)
        row["equal"] = next((i for i, (mine, theirs) in enumerate(pairs) if mine != theirs), len(wanted))
        _tell(f"{row}")
    print(json.dumps({**measured_on(), "rows": [*loading, *(row for row, _ in replies)]}, indent=2, ensure_ascii=False))


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _in_browser(
    browser: Any, folder: Path, options: argparse.Namespace
) -> tuple[list[Any], list[tuple[Any, list[int]]]]:
    """Rows about loading, and (row, tokens) of each reply."""
    from sites import gone, unchanged  # type: ignore[import-not-found]

    total = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    context = browser.new_context(viewport={"width": 390, "height": 844}, device_scale_factor=2)
    page, pressure = _new_page(context)
    loading, replies = [], []
    with slow_server(folder, options.rate_mb * 1e6) as server:
        slow, spoke = server.change, threading.Event()

        def hold(path: str, begin: int, data: bytes) -> bytes:
            if server.sent_bytes + len(data) > options.share * total:
                spoke.wait()
            sent: bytes = slow(path, begin, data)
            return sent

        def came(event: str) -> None:
            sent = server.sent_bytes
            loading.append({"event": event, "megabytes": round(sent / 1e6, 1), "share": round(sent / total, 4)})
            _tell(f"{loading[-1]}")

        server.change = hold
        page.goto(f"{server.url}/")
        page.wait_for_selector("#load:visible")
        _tell(page.text_content("#facts"))
        page.click("#load")
        page.wait_for_selector("#composer:visible")
        came("the slices of depth 1 are there, and the kernels compiled")
        _ask(page)
        _until(page, "mbq.tokens > 0")
        came("first word")
        server.change = unchanged
        spoke.set()
        page.click("#send")
        page.wait_for_selector("#send:text-is('Send')")
        page.evaluate("mbq.engine.coming")
        for first, then in BUDGETS:
            given = {"prompt": PROMPT, "first": first, "then": then, "tokens": options.tokens}
            found = page.evaluate(ASK, given)
            text = " ".join(found["text"].split())
            row = {"first_bits": first, "then_bits": then, "tokens": len(found["tokens"]), "text": text}
            replies.append((row, found["tokens"]))
            _tell(f"{row}")
        page.evaluate("navigator.serviceWorker.ready")
        server.answer = gone
        page.close()
        page, pressure = _new_page(context)
        page.goto(f"{server.url}/")
        page.wait_for_selector("#composer:visible")
        page.evaluate("mbq.engine.coming")
        before = replies[0][1][:AGAIN_TOKENS]
        again = page.evaluate(ASK, {"prompt": PROMPT, "first": BUDGETS[0][0], "then": None, "tokens": len(before)})
        if again["tokens"] != before:
            raise SystemExit(f"without a server it says {again['tokens']}, with one {before}")
        _tell("without a server it says the same")
        if options.pictures is not None:
            page.evaluate("() => { delete mbq.governor.look; mbq.governor.tokens = []; mbq.governor.restart(); }")
            _pictures(page, pressure, options.pictures)
        context.close()
    return loading, replies


def _new_page(context: Any) -> tuple[Any, Any]:
    """A page, and the pressure that it will be told."""
    from virtual_pressure import VirtualPressure  # type: ignore[import-not-found]

    page = context.new_page()
    page.set_default_timeout(PATIENCE_MS)
    return page, VirtualPressure(page)


def _ask(page: Any) -> None:
    page.fill("#text", PROMPT)
    page.press("#text", "Enter")


def _until(page: Any, holds: str) -> None:
    """Wait until an expression is true.  The page permits no evaluation of its own."""
    while not page.evaluate(holds):
        page.wait_for_timeout(50)


def _pictures(page: Any, pressure: Any, folder: Path) -> None:
    """The page in the middle of a reply: light and calm, then dark under pressure.  The driver's speed is left out."""
    pressure.set("nominal")
    page.evaluate("void delete mbq.governor.policy.bands.pace")
    _ask(page)
    _until(page, f"document.querySelector('#talk .assistant').textContent.length > {PICTURE_LETTERS}")
    _picture(page, folder, "light")
    pressure.set("critical")
    _until(page, "mbq.governor.status.bits < mbq.engine.maxBits")
    _picture(page, folder, "dark")


def _picture(page: Any, folder: Path, scheme: str) -> None:
    page.emulate_media(color_scheme=scheme)
    page.wait_for_timeout(300)
    picture = Image.open(BytesIO(page.screenshot())).convert("RGB")
    folder.mkdir(parents=True, exist_ok=True)
    picture.quantize(PICTURE_COLOURS, dither=Image.Dither.NONE).save(folder / f"browser-{scheme}.png", optimize=True)


def _on_python(engine: Engine, first: float, then: float | None, tokens: int) -> list[int]:
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
