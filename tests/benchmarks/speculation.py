"""Speculation: how many guesses are right, and the processor's time of a token with and without them.

    python tests/benchmarks/speculation.py BUNDLE --bits 8 --guess-bits 3,4

BUNDLE is a folder, or a shape such as llama-1b.  Both sides make the same replies in turn.  Times are the
processor's, so that other work on the machine counts little.  The prompts are short questions, and a text to sum up
and a list to repeat, of which much comes again in the reply.
"""

from __future__ import annotations

import argparse
import json
import time

import numpy as np
from named_bundles import bundle_of

from mbq_runtime import Engine
from mbq_runtime.bench import environment
from mbq_runtime.engine.allowance import Allowance
from mbq_runtime.engine.generation import GenerationStats
from mbq_runtime.engine.pass_costs import PassCosts
from mbq_runtime.engine.speculation import MOST_GUESSES
from mbq_runtime.sensing.sensors import Sensors

QUESTIONS = (
    "Tell me about the sea.", "How is bread made?", "Write a short story about a pilot.", "What is a prime number?",
)  # fmt: skip
TEXT = (
    "The harbour of Aldermouth was built in 1843 by the engineer Samuel Tanner. It has two stone piers, a lighthouse "
    "of 31 metres and a dry dock. In 1911 a storm broke the northern pier, and it was built again in concrete. Today "
    "the harbour serves forty fishing boats, a ferry to the islands and a school for sailors."
)
REPEATING = (
    f"Repeat this text word for word:\n\n{TEXT}",
    f"Correct the spelling of this text, and change nothing else:\n\n{TEXT}",
)


def passes(engine: Engine, bits: float, sizes: tuple[int, ...]) -> dict[int, float]:
    """The processor's seconds of a pass with logits for all of its tokens, by its size: the least of nine."""
    context = engine._backend.start(256, np.array([bits, len(engine.manifest.slices)], np.float32))
    context.append(np.arange(5, 133, dtype=np.int32))
    found = dict.fromkeys(sizes, np.inf)
    for _ in range(9):
        for size in sizes:
            start_s = time.process_time()
            context.append(np.arange(200, 200 + size, dtype=np.int32), size)
            context.logits()
            found[size] = min(found[size], time.process_time() - start_s)
            context.rewind(128)
    return found


def reply(engine: Engine, prompt: str, options: argparse.Namespace, mode: str) -> tuple[GenerationStats, float]:
    """Figures of a reply, and the processor's seconds after its first token."""
    engine.speculate = mode
    made = engine.generate(
        prompt, max_tokens=options.tokens, avg_bits=options.bits, temperature=options.temperature, seed=1
    )
    next(made)
    start_s = time.process_time()
    made.text()
    return made.stats, time.process_time() - start_s


def compare(engine: Engine, prompts: tuple[str, ...], options: argparse.Namespace, mode: str) -> str:
    """A row: share of guesses that were right, tokens a pass, processor time with and without, equal replies."""
    guessed = kept = tokens = equal = 0
    with_s = without_s = 0.0
    for prompt in prompts:
        (plain, plain_s), (found, found_s) = (reply(engine, prompt, options, one) for one in ("off", mode))
        equal += plain.tokens == found.tokens
        without_s, with_s, tokens = without_s + plain_s, with_s + found_s, tokens + len(found.tokens)
        guessed, kept = guessed + found.guessed, kept + found.kept_guesses
    share = f"{kept / guessed:.2f}" if guessed else "none"
    checked = tokens / max(tokens - kept, 1)
    times = f"{1e3 * with_s / tokens:.2f} | {1e3 * without_s / tokens:.2f}"
    return f"{share} | {checked:.2f} | {times} | {equal} of {len(prompts)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=bundle_of)
    parser.add_argument("--engine")
    parser.add_argument("--bits", type=float, default=8.0)
    parser.add_argument("--guess-bits", default="3,4")
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--temperature", type=float, default=0.0)
    options = parser.parse_args()
    print(json.dumps(environment(Sensors().read)))
    engine = Engine.load(options.bundle, engine=options.engine, threads=1, context=1024)
    print(f"{engine.name}, {options.bits:g} bits, 1 thread, temperature {options.temperature:g}\n")
    sizes = (1, 2, 3, 4, 6, MOST_GUESSES + 1)
    print("| bits | " + " | ".join(f"{size} tokens" for size in sizes) + " |")
    print("| ---: " * (1 + len(sizes)) + "|")
    for bits in (*map(float, options.guess_bits.split(",")), options.bits):
        found = passes(engine, bits, sizes)
        row = " | ".join(f"{1e3 * found[size]:.2f} ms ({found[size] / found[1]:.2f})" for size in sizes)
        print(f"| {bits:g} | {row} |", flush=True)
    print("\n| prompts | mode | guesses at | right | tokens a check | ms a token | without | same replies |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: | --- |")
    model = engine.manifest.model
    most = Allowance(engine.manifest, engine.manifest.budget.max_bits)
    for bits in map(float, options.guess_bits.split(",")):
        engine.__dict__["_pass_costs"] = PassCosts.measure(
            engine._backend, (Allowance(engine.manifest, bits), most), model.vocab_size
        )
        for name, prompts in (("questions", QUESTIONS), ("repeating", REPEATING)):
            for mode in ("on", "auto"):
                print(f"| {name} | {mode} | {bits:g} | {compare(engine, prompts, options, mode)} |", flush=True)


if __name__ == "__main__":
    main()
