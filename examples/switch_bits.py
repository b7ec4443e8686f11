"""Lower the precision in the middle of a reply, from another thread, without loading anything again.

python examples/switch_bits.py bundles/smollm2-135m-host
"""

from __future__ import annotations

import sys
import threading

from mbq_runtime import Engine

PROMPT = "Tell me about the sea."


def main() -> None:
    """Print a reply, and then the average bits per weight of each token."""
    engine = Engine.load(sys.argv[1])
    low = engine.manifest.budget.min_bits
    reply = engine.generate(PROMPT, max_tokens=48, avg_bits=engine.manifest.budget.max_bits)
    for i, piece in enumerate(reply):
        print(piece, end="", flush=True)
        if i == 16:  # a controller would do this when the board gets hot
            threading.Thread(target=setattr, args=(engine, "avg_bits", low)).start()
    print("\n" + " ".join(f"{bits:.1f}" for bits in reply.stats.bits))


if __name__ == "__main__":
    main()
