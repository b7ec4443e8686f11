"""Answer within a deadline: the policy lowers bits to hold the speed, and the reply is closed when the time is over.

python examples/robot_deadline.py bundles/smollm2-135m-host
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace

from mbq_runtime import Engine
from mbq_runtime.control import POLICIES, Governor
from mbq_runtime.sensing import Sensors

DEADLINE_S, TOKENS = 2.0, 24

engine = Engine.load(sys.argv[1])
with Governor(engine, Sensors(), replace(POLICIES["auto"], min_tps=TOKENS / DEADLINE_S)):
    for seen in ("A person stands in the way.", "The door is open."):
        until_s = time.monotonic() + DEADLINE_S
        reply, answer = engine.generate(f"{seen} What should the robot do?", max_tokens=TOKENS), ""
        for piece in reply:
            answer += piece
            if time.monotonic() >= until_s:
                reply.close()
        print(f"{seen} {answer} [{reply.stats.finish_reason}, {reply.stats.avg_bits_used:.1f} bits]")
