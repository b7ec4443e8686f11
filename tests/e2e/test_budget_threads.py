"""Bits and threads are another thread's to change: a thousand times during a reply, under every engine there is."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import needs
import pytest

from mbq_runtime import Engine, UsageError

pytestmark = pytest.mark.slow

CHANGES = 1000


@pytest.mark.parametrize(
    ("target", "engine", "new_tokens"),
    [("host", "onnx", 200), ("host", "tvm", 200), ("android-adreno", None, 24), ("webgpu", None, 6)],
)
def test_a_thousand_changes_tear_nothing(
    smollm2_bundles: dict[str, Path], gpu_engine: Callable[[str], Engine], target: str, engine: str | None,
    new_tokens: int,
) -> None:  # fmt: skip
    """At the ends of the range every token's bits are the budget's: a torn or a lost one would be another number."""
    if target in needs.GPU_ENGINES:
        loaded = gpu_engine(target)
    else:
        loaded = Engine.load(smollm2_bundles[target], engine=engine, context=512, threads=2)
    ends = loaded.manifest.budget.min_bits, 8.0
    finished, changed = threading.Event(), 0

    def change() -> None:
        nonlocal changed
        while changed < CHANGES or not finished.is_set():
            loaded.avg_bits = ends[changed % 2]
            loaded.threads = 1 + changed // 2 % 2
            changed += 1
            time.sleep(0.001)

    thread = threading.Thread(target=change)
    thread.start()
    try:
        reply = loaded.generate("The history of the lighthouse begins", max_tokens=new_tokens, chat=False)
        reply.text()
    finally:
        finished.set()
        thread.join()
    assert changed >= CHANGES
    seen = {round(bits, 4) for bits in reply.stats.bits}
    assert seen <= set(ends)
    if len(reply.stats.tokens) > 20:
        assert seen == set(ends)


@pytest.mark.parametrize("engine", ["onnx", "tvm"])
def test_threads_change_who_works_and_not_what_is_said(smollm2_bundles: dict[str, Path], engine: str) -> None:
    loaded = Engine.load(smollm2_bundles["host"], engine=engine, context=512, threads=2)
    texts = []
    for threads in (2, 1, 2):
        loaded.threads = threads
        assert loaded.threads == threads
        texts.append(loaded.generate("The history of the lighthouse begins", max_tokens=32, chat=False).text())
    assert len(set(texts)) == 1
    for refused in (0, 3):
        with pytest.raises(UsageError, match=f"threads {refused}: needed 1 to 2"):
            loaded.threads = refused
    assert loaded.threads == 2


@pytest.mark.parametrize("engine", ["onnx", "tvm"])
def test_one_thread_of_two_leaves_a_core_alone(smollm2_bundles: dict[str, Path], engine: str) -> None:
    """Processor time over time of the same passes: about two with two threads, and less with one.

    Other work on the machine can take a core for a while, so both are tried until it shows, at most twelve times.
    """
    loaded = Engine.load(smollm2_bundles["host"], engine=engine, context=512, threads=2)

    def processors(threads: int) -> float:
        loaded.threads = threads
        loaded.time_passes([1] * 8, 8.0)
        before_s, begin_s = time.process_time(), time.perf_counter()
        loaded.time_passes([1] * 100, 8.0)
        return (time.process_time() - before_s) / (time.perf_counter() - begin_s)

    both, one = [processors(2)], [processors(1)]
    while len(one) < 12 and min(one) >= max(both):
        both.append(processors(2))
        one.append(processors(1))
    assert min(one) < max(both)
    assert max(one) < 1.2


@pytest.mark.parametrize("threads", [1, 2])
def test_an_engine_ends_with_its_other_threads_asleep(smollm2_bundles: dict[str, Path], threads: int) -> None:
    """A session waits for its threads when it ends; one that was told nothing ends with the process."""
    script = """if True:
        import gc, sys
        from mbq_runtime import Engine
        from mbq_runtime.engine import Session
        for rest in (2, 1):
            engine = Engine.load(sys.argv[1], engine="onnx", context=64, threads=2)
            engine.threads = 1
            engine.time_passes([1] * 4, 8.0)
            session = Session(sys.argv[1], threads=2)
            session.run([1, 2, 3], 8.0)
            engine.threads = int(sys.argv[2])
            session.run([1, 2, 3], 8.0)
            if rest > 1:
                del engine, session
                gc.collect()
        print("done")
    """
    command = [sys.executable, "-c", script, str(smollm2_bundles["host"]), str(threads)]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=120, check=False)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
