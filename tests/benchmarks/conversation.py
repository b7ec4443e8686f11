"""Time to the first token, turn by turn: a session beside an engine that reads the whole conversation again.

    python tests/benchmarks/conversation.py BUNDLE --turns 12 --tokens 150 --bits 8 --clients 8

BUNDLE is a folder, or a shape such as llama-1b.  A turn has ``--tokens`` tokens: a message, and a reply of 32.  Both
sides get the same messages in one run, and their replies are compared.  Then ``--clients`` conversations go through
two servers at once, one of which keeps nothing; that one is asked for turns 1, 2 and the last, as it reads
everything.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import openai
from measured_on import measured_on
from named_bundles import bundle_of

from mbq_runtime import Engine, Generation

REPLY = 32
WORDS = ("tide", "boat", "harbour", "rope", "wind", "sail", "coast", "light", "storm", "gull", "net", "pilot", "bell")


def message(engine: Engine, tokens: int, seed: int) -> str:
    """A text of about so many tokens, and its own words."""
    rng = np.random.default_rng(seed)
    text = f"Story {seed}:"
    while len(engine.encode(text)) < tokens:
        text += " " + str(rng.choice(WORDS))
    return text


def one_conversation(engine: Engine, options: argparse.Namespace) -> bool:
    """Print a table.  Returns whether all replies were the same."""
    session, same = engine.session(), True
    talk: list[dict[str, str]] = []
    print("| turn | prompt | read | with a session (CPU) | without (CPU) | same reply |")
    print("| ---: | ---: | ---: | ---: | ---: | --- |")
    firsts = []
    for turn in range(1, options.turns + 1):
        talk.append({"role": "user", "content": message(engine, options.tokens - REPLY, turn)})
        ask: dict[str, Any] = {"max_tokens": REPLY, "avg_bits": options.bits}
        kept, whole = engine.generate(talk, session=session, **ask), engine.generate(talk, **ask)
        text, kept_cpu_s = timed(kept)
        _, whole_cpu_s = timed(whole)
        equal = kept.stats.tokens == whole.stats.tokens
        same = same and equal
        new = kept.stats.prompt_tokens - kept.stats.cached_tokens
        firsts.append((kept.stats.ttft_s, kept_cpu_s))
        print(
            f"| {turn} | {kept.stats.prompt_tokens} | {new} | {kept.stats.ttft_s:.3f} s ({kept_cpu_s:.3f} s) | "
            f"{whole.stats.ttft_s:.3f} s ({whole_cpu_s:.3f} s) | {'yes' if equal else 'no'} |",
            flush=True,
        )
        talk.append({"role": "assistant", "content": text})
    wall, cpu = (last / second for last, second in zip(firsts[-1], firsts[1], strict=True))
    print(f"last turn over turn 2: {wall:.2f}, of processor time {cpu:.2f}\n")
    return same


def timed(reply: Generation) -> tuple[str, float]:
    """The text of a reply, and the processor's seconds to its first token."""
    start_s = time.process_time()
    first = next(reply)
    spent_s = time.process_time() - start_s
    return first + reply.text(), spent_s


@contextmanager
def serving(options: argparse.Namespace, cache_mb: int) -> Iterator[openai.OpenAI]:
    """A client of a server in a process of its own."""
    command = [sys.executable, "-m", "mbq_runtime.cli", "serve", str(options.bundle), "--port", "0"]
    command += ["--cache-mb", str(cache_mb), "--bits", str(options.bits), "--threads", str(options.threads)]
    command += ["--engine", options.engine] if options.engine else []
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        found = re.search(r"http://\S+?:\d+", server.stdout.readline())
        if found is None:
            raise SystemExit("the server did not start")
        yield openai.OpenAI(base_url=f"{found[0]}/v1", api_key="none", max_retries=0, timeout=3600)
    finally:
        server.terminate()
        server.wait()


def many_clients(engine: Engine, options: argparse.Namespace) -> bool:
    """Print a table.  Returns whether all replies that were compared were the same."""
    talks: list[list[dict[str, str]]] = [[] for _ in range(options.clients)]
    same = True
    print(f"| turn | {options.clients} clients, kept contexts | nothing kept | tokens read | same replies |")
    print("| ---: | ---: | ---: | ---: | --- |")
    with serving(options, options.cache_mb) as keeps, serving(options, 0) as forgets:
        name = keeps.models.list().data[0].id

        def ask(client: openai.OpenAI, talk: list[dict[str, str]]) -> Any:
            return client.chat.completions.create(model=name, messages=talk, temperature=0, max_tokens=REPLY)  # type: ignore[arg-type]

        firsts = []
        with ThreadPoolExecutor(options.clients) as pool:
            for turn in range(1, options.turns + 1):
                for at, talk in enumerate(talks):
                    talk.append({"role": "user", "content": message(engine, options.tokens - REPLY, 100 * at + turn)})
                found = list(pool.map(lambda talk: ask(keeps, talk), talks))
                kept_s = statistics.median(one.usage.ttft_s for one in found)
                firsts.append(kept_s)
                read = sum(one.usage.prompt_tokens - one.usage.prompt_tokens_details.cached_tokens for one in found)
                others = ""
                equal = "not compared"
                if turn in (1, 2, options.turns):
                    whole = list(pool.map(lambda talk: ask(forgets, talk), talks))
                    others = f"{statistics.median(one.usage.ttft_s for one in whole):.3f} s"
                    pairs = zip(found, whole, strict=True)
                    alike = sum(a.choices[0].message.content == b.choices[0].message.content for a, b in pairs)
                    equal = f"{alike} of {options.clients}"
                    same = same and alike == options.clients
                print(f"| {turn} | {kept_s:.3f} s | {others} | {read} | {equal} |", flush=True)
                for talk, one in zip(talks, found, strict=True):
                    talk.append({"role": "assistant", "content": one.choices[0].message.content})
    print(f"last turn over turn 2: {firsts[-1] / firsts[1]:.2f}")
    return same


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=bundle_of)
    parser.add_argument("--engine")
    parser.add_argument("--bits", type=float, default=8.0)
    parser.add_argument("--turns", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=150)
    parser.add_argument("--clients", type=int, default=8, help="0: no servers")
    parser.add_argument("--cache-mb", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    print(json.dumps(measured_on()))
    engine = Engine.load(options.bundle, engine=options.engine, threads=options.threads)
    print(f"{engine.name}, {options.bits:g} bits, {options.threads} threads; times are to the first token")
    same = one_conversation(engine, options)
    if options.clients:
        same = many_clients(engine, options) and same
    print("all replies that were compared are the same" if same else "some replies differ")
    sys.exit(not same)


if __name__ == "__main__":
    main()
