"""The budget is another thread's to change: a thousand times during a reply, under every engine there is."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from mbq_runtime import Engine, UsageError

pytestmark = pytest.mark.slow

CHANGES = 1000


@pytest.mark.parametrize(
    ("target", "engine", "new_tokens"),
    [("host", "onnx", 400), ("host", "tvm", 400), ("android-adreno", None, 24), ("webgpu", None, 6)],
)
def test_a_thousand_changes_tear_nothing(
    smollm2_two_engines: dict[str, Path], target: str, engine: str | None, new_tokens: int
) -> None:
    """At the ends of the range every token's bits are the budget's: a torn or a lost one would be another number."""
    try:
        loaded = Engine.load(smollm2_two_engines[target], engine=engine, context=512)
    except UsageError as error:
        pytest.skip(str(error))
    ends = loaded.manifest.budget.min_bits, 8.0
    finished, changed = threading.Event(), 0

    def change() -> None:
        nonlocal changed
        while changed < CHANGES or not finished.is_set():
            loaded.avg_bits = ends[changed % 2]
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
