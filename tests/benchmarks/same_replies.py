"""Greedy replies with guessed tokens beside the same replies without: are they equal, token for token?

    python tests/benchmarks/same_replies.py BUNDLE [BUNDLE2 ...] --replies 50 --tokens 128 --bits 8

Each engine of each bundle makes the replies.  Prompts are requests about fifty subjects; a bundle without a chat
template gets random tokens.  The script ends with status 1 where a reply differs.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from measured_on import measured_on

from mbq_runtime import Engine
from mbq_runtime.bundle.manifest import read

REQUESTS = (
    "Tell me about {}.", "Write a short story about {}.", "List five facts about {}.", "Explain {} to a child.",
    "Write a poem about {}.",
)  # fmt: skip
SUBJECTS = ("the sea", "bread", "prime numbers", "Paris", "bees", "the moon", "a lighthouse", "rain", "chess", "iron")


def prompts(engine: Engine, count: int) -> list[list[int]]:
    """The ids of ``count`` prompts."""
    if not engine.has_chat_template:
        rng = np.random.default_rng(0)
        vocabulary = engine.manifest.model.vocab_size
        return [rng.integers(0, vocabulary, rng.integers(2, 24)).tolist() for _ in range(count)]
    asked = [request.format(subject) for subject in SUBJECTS for request in REQUESTS]
    return [engine.prompt_tokens(asked[at % len(asked)]) for at in range(count)]


def compare(engine: Engine, options: argparse.Namespace) -> bool:
    """Print a row.  Returns whether all replies were the same."""
    same = tokens = guessed = kept = 0
    for prompt in prompts(engine, options.replies):
        found = []
        for mode in ("off", options.mode):
            engine.speculate = mode
            reply = engine.generate(prompt, max_tokens=options.tokens, avg_bits=options.bits)
            reply.text()
            found.append(reply.stats)
        same += found[0].tokens == found[1].tokens
        tokens += len(found[1].tokens)
        guessed, kept = guessed + found[1].guessed, kept + found[1].kept_guesses
    model = engine.manifest.model.name
    print(f"| {model} | {engine.name} | {same} of {options.replies} | {tokens} | {kept} of {guessed} |", flush=True)
    return bool(same == options.replies)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="+", type=Path)
    parser.add_argument("--replies", type=int, default=50)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--bits", type=float, default=8.0)
    parser.add_argument("--mode", choices=("on", "auto"), default="on")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    print(json.dumps(measured_on(bits=options.bits, mode=options.mode, threads=options.threads)))
    print("| model | engine | same replies | tokens | guesses kept |\n| --- | --- | ---: | ---: | ---: |")
    equal = [
        compare(Engine.load(path, engine=name, threads=options.threads), options)
        for path in options.bundles
        for name in read(path).engines
    ]
    sys.exit(not all(equal))


if __name__ == "__main__":
    main()
