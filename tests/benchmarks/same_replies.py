"""Greedy replies with guessed tokens beside the same replies without: are they equal, token for token?

    python tests/benchmarks/same_replies.py BUNDLE [BUNDLE2 ...] --replies 50 --tokens 128 --bits 8 --json FILE

Each engine of each bundle makes the replies, processors before GPUs.  Prompts are requests about ten subjects; a bundle
without a chat template gets random tokens.  FILE gets a line of JSON for each prompt.  A run that was stopped goes on
from the lines in it.  Times are the processor's after the first token.  The script ends with status 1 where a reply
differs.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from measured_on import measured_on

from mbq_runtime import Engine
from mbq_runtime.bundle.file_names import MANIFEST_NAME
from mbq_runtime.bundle.manifest import read
from mbq_runtime.engine.backend import ENGINES

REQUESTS = (
    "Tell me about {}.", "Write a short story about {}.", "List five facts about {}.", "Explain {} to a child.",
    "Write a poem about {}.",
)  # fmt: skip
SUBJECTS = ("the sea", "bread", "prime numbers", "Paris", "bees", "the moon", "a lighthouse", "rain", "chess", "iron")

Line = dict[str, Any]


def prompts(engine: Engine, count: int) -> list[list[int]]:
    """The ids of ``count`` prompts."""
    if not engine.has_chat_template:
        rng = np.random.default_rng(0)
        vocabulary = engine.manifest.model.vocab_size
        return [rng.integers(0, vocabulary, rng.integers(2, 24)).tolist() for _ in range(count)]
    asked = [request.format(subject) for subject in SUBJECTS for request in REQUESTS]
    return [engine.prompt_tokens(asked[at % len(asked)]) for at in range(count)]


def compare(engine: Engine, prompt: list[int], options: argparse.Namespace) -> Line:
    """Make a reply without and with guesses.  Returns the figures."""
    found, seconds = [], []
    for mode in ("off", options.mode):
        engine.speculate = mode
        reply = engine.generate(prompt, max_tokens=options.tokens, avg_bits=options.bits)
        next(reply, None)
        start_s = time.process_time()
        reply.text()
        seconds.append(round(time.process_time() - start_s, 4))
        found.append(reply.stats)
    plain, guessing = found
    return {
        "same": plain.tokens == guessing.tokens, "made": len(plain.tokens), "guessed": guessing.guessed,
        "kept": guessing.kept_guesses, "plain_cpu_s": seconds[0], "guessing_cpu_s": seconds[1],
    }  # fmt: skip


def lines(options: argparse.Namespace, before: list[Line]) -> Iterator[Line]:
    """A line for each prompt, those of ``before`` first."""
    wanted = options.engines.split(",") if options.engines else ENGINES
    pairs = [(path, name) for path in options.bundles for name in read(path).engines if name in wanted]
    end_s = time.monotonic() + 60 * options.minutes
    for path, name in sorted(pairs, key=lambda pair: list(ENGINES).index(pair[1])):
        about = {
            "bundle": sha256((path / MANIFEST_NAME).read_bytes()).hexdigest()[:12], "model": read(path).model.name,
            "engine": name, "bits": options.bits, "mode": options.mode, "tokens": options.tokens,
            "threads": options.threads,
        }  # fmt: skip
        known = {line["prompt"]: line for line in before if about.items() <= line.items()}
        yield from (line for at, line in sorted(known.items()) if at < options.replies)
        missing = [at for at in range(options.replies) if at not in known]
        if not missing or time.monotonic() > end_s:
            continue
        engine = Engine.load(path, engine=name, threads=options.threads)
        asked = prompts(engine, options.replies)
        for at in missing:
            if time.monotonic() > end_s:
                break
            yield {**about, "prompt": at, **compare(engine, asked[at], options)}


def table(found: list[Line]) -> Iterator[str]:
    """A row for each model and engine."""
    yield "| model | engine | same replies | tokens | guesses kept | processor time, of without |"
    yield "| --- | --- | ---: | ---: | ---: | ---: |"
    for model, engine in dict.fromkeys((line["model"], line["engine"]) for line in found):
        of_row = [line for line in found if (line["model"], line["engine"]) == (model, engine)]
        same, made, guessed, kept, plain_s, guessing_s = (
            sum(line[key] for line in of_row)
            for key in ("same", "made", "guessed", "kept", "plain_cpu_s", "guessing_cpu_s")
        )
        share = f"{guessing_s / plain_s:.2f}" if plain_s else ""
        yield f"| {model} | {engine} | {same} of {len(of_row)} | {made} | {kept} of {guessed} | {share} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="+", type=Path)
    parser.add_argument("--engines", help="Some of those that the bundles have, such as onnx,tvm.")
    parser.add_argument("--replies", type=int, default=50)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--bits", type=float, default=8.0)
    parser.add_argument("--mode", choices=("on", "auto"), default="on")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="Begin no reply after these.")
    parser.add_argument("--json", type=Path, help="Keep the figures of each prompt here, and go on from them.")
    options = parser.parse_args()
    before = [] if options.json is None or not options.json.exists() else options.json.read_text().splitlines()
    found = []
    for line in lines(options, [json.loads(text) for text in before]):
        found.append(line)
        text = json.dumps(line)
        if options.json is not None and text not in before:
            with options.json.open("a") as file:
                file.write(text + "\n")
            print(text, flush=True)
    print(json.dumps(measured_on(bits=options.bits, mode=options.mode, threads=options.threads)))
    print(*table(found), sep="\n")
    sys.exit(not all(line["same"] for line in found))


if __name__ == "__main__":
    main()
