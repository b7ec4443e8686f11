"""How soon a bundle speaks that comes over a slow network, and what it says while the rest comes.

    python tests/benchmarks/first_words.py BUNDLE --rate-mb 2 --engine onnx

Two clients pull the bundle from a server on this machine, one after the other, each into an empty cache.  The first is
``mbq run``: it prints what share of the bytes had come at its first word.  The second uses the Python API with a slow
reader, so that the reply lasts until all has come.  Its tokens are compared with those of the whole bundle under the
same ceilings at the same tokens.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mbq_runtime import Engine
from mbq_runtime.bench import environment
from mbq_runtime.bundle import manifest
from mbq_runtime.pull import Incoming, Source
from mbq_runtime.sensing.sensors import Sensors
from mbq_runtime.trust import code

sys.path.insert(0, str(Path(__file__).parents[1] / "runtime/pull"))

PROMPT = "The sea is"


@contextmanager
def slow_server(folder: Path, bytes_per_s: float) -> Iterator[Any]:
    """A server of plain files, all of whose answers together have a rate."""
    from file_server import serving  # type: ignore[import-not-found]

    lock, free_s = threading.Lock(), time.monotonic()

    def hold(path: str, begin: int, data: bytes) -> bytes:
        nonlocal free_s
        with lock:
            free_s = max(free_s, time.monotonic()) + len(data) / bytes_per_s
            wait_s = free_s - time.monotonic()
        time.sleep(max(wait_s, 0))
        return data

    with serving(folder) as server:
        server.change = hold
        yield server


def first_word(server: Any, source: str, engine: str) -> tuple[float, int]:
    """Seconds and bytes sent until ``mbq run`` prints the first piece of its reply."""
    command = [sys.executable, "-m", "mbq_runtime.cli", "run", source, PROMPT, "--raw", "--max-tokens", "8"]
    command += ["--bits", "8", "--engine", engine, "--trust"]
    start_s, before = time.monotonic(), server.sent_bytes
    with (
        tempfile.TemporaryDirectory() as cache,
        subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, "MBQ_CACHE_DIR": cache}) as process,
    ):
        assert process.stdout is not None
        os.read(process.stdout.fileno(), 1)
        return time.monotonic() - start_s, server.sent_bytes - before


def long_reply(source: str, engine: str, reader_s: float) -> tuple[list[tuple[int, float | None]], Incoming, list[int]]:
    """(ceilings by the number of tokens before them, the bundle, tokens) of a reply that ends after all has come."""
    incoming = Incoming(Source.of(source))
    folder = incoming.folder(engine)
    code.trust(manifest.read(folder))
    loaded = Engine.load(folder, engine=engine)
    incoming.follow(loaded)
    more, ceilings = 16, [(0, loaded.ceiling_bits)]
    end_tokens = dict.fromkeys(loaded._eos, -100.0)
    with loaded.generate(PROMPT, chat=False, max_tokens=4000, avg_bits=8.0, logit_bias=end_tokens) as reply:
        for count, _ in enumerate(reply, 1):
            if loaded.ceiling_bits != ceilings[-1][1]:
                ceilings.append((len(reply.stats.tokens), loaded.ceiling_bits))
            if incoming.whole is not None and loaded.ceiling_bits is None:
                more -= 1
            if not more or count > 3900:
                break
            time.sleep(reader_s)
    return ceilings, incoming, list(reply.stats.tokens)


def same_reply(folder: Path, engine: str, ceilings: list[tuple[int, float | None]], tokens: list[int]) -> bool:
    """Whether the whole bundle says the same under the same ceilings."""
    whole = Engine.load(folder, engine=engine)
    end_tokens = dict.fromkeys(whole._eos, -100.0)
    whole.ceiling_bits = ceilings[0][1]
    left = ceilings[1:]
    options: dict[str, Any] = {"chat": False, "max_tokens": len(tokens), "avg_bits": 8.0, "logit_bias": end_tokens}
    with whole.generate(PROMPT, **options) as reply:
        for _ in reply:
            if left and len(reply.stats.tokens) >= left[0][0]:
                whole.ceiling_bits = left.pop(0)[1]
    return list(reply.stats.tokens) == tokens


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--rate-mb", type=float, default=2.0, help="MB a second that the server sends")
    parser.add_argument("--engine", default="onnx")
    parser.add_argument("--reader-s", type=float, default=0.1, help="seconds that the reader of the reply waits")
    options = parser.parse_args()
    bundle = options.bundle.resolve()
    found = manifest.read(bundle)
    total = found.total_bytes
    print(f"machine {environment(Sensors().read)}")
    needed = sum(found.needed_bytes(1).values())
    print(f"depth 1 needs {needed / 1e6:.1f} of {total / 1e6:.1f} MB, {100 * needed / total:.1f} %")
    with slow_server(bundle.parent, options.rate_mb * 1e6) as server:
        source = f"{server.url}/{bundle.name}"
        seconds, sent = first_word(server, source, options.engine)
        print(f"mbq run: first word after {seconds:.1f} s and {sent / 1e6:.1f} MB, {100 * sent / total:.1f} %")
        with tempfile.TemporaryDirectory() as cache:
            os.environ["MBQ_CACHE_DIR"] = cache
            ceilings, incoming, tokens = long_reply(source, options.engine, options.reader_s)
            steps = ", ".join(f"{'all' if bits is None else f'{bits:g} bits'} from token {at}" for at, bits in ceilings)
            print(f"a reply of {len(tokens)} tokens: {steps}")
            assert incoming.whole is not None, incoming.error
            same = same_reply(incoming.whole.folder, options.engine, ceilings, tokens)
    print(f"tokens of the whole bundle under the same ceilings: {'the same' if same else 'others'}")
    return 0 if same and ceilings[-1][1] is None else 1


if __name__ == "__main__":
    sys.exit(main())
