"""The kit for owners of boards: one report of speed, power, heat and a short closed loop, as one file to send.

Each stage is a row of ``STAGES``.  A finished stage is kept, so that a second call goes on where the first one ended.
A stage ends early when the board is at its limit.  The report has no personal data: no names, no addresses, no paths.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from . import bench
from .bundle.reading import parse_json
from .control.governor import Governor
from .control.policy import find_policy
from .control.wishes import grid
from .engine import Engine
from .errors import UsageError
from .sensing.readings import Readings
from .text_file import read_text_file
from .whole_file import write_whole

FORMAT, VERSION = "mbq-kit", 1
PROMPT = "Tell me a long story about the sea."
_TOKENS = 24  # of one measured run, after its first two
_REPLY_TOKENS = 128
_MARGIN_C = 2.0  # a stage ends this far below the throttle point
_COOL_C, _COOL_S = 10.0, 120.0  # a pause between two speeds ends this far below it, or after so long
_BUSY = "while True: pass"
_MOST_BYTES = 16 << 20  # of an unfinished report


class Limit(Exception):
    """The board is at its limit."""


@dataclass
class Board:
    """The board under test.

    engine: a loaded bundle, with as many threads as will be tried.
    look: reads the sensors.
    now: returns seconds that never go back.
    rest: waits for some seconds.
    """

    engine: Engine
    look: Callable[[], Readings]
    now: Callable[[], float] = time.monotonic
    rest: Callable[[float], None] = time.sleep

    def check(self, margin_c: float = _MARGIN_C) -> Readings:
        """The readings.

        Args:
            margin_c: how far below the throttle point the board must be, in C.

        Raises:
            Limit: the board throttles, or is near the temperature at which it does.
        """
        seen = self.look()
        limit_c = seen.throttle_temp_c if seen.throttle_temp_c is not None else seen.critical_temp_c
        if seen.temp_c is not None and limit_c is not None and seen.temp_c >= limit_c - margin_c:
            raise Limit(f"{seen.temp_c:.1f} C, the limit is {limit_c:.0f} C")
        if seen.heat_throttled or seen.undervoltage:
            raise Limit("the board slows itself by " + ("heat" if seen.heat_throttled else "under-voltage"))
        return seen

    def cool(self) -> None:
        """Wait until the board is well below its limit.

        Raises:
            Limit: after two minutes it is still near its limit, or throttles.
        """
        end_s = self.now() + _COOL_S
        while self.now() < end_s:
            try:
                self.check(_COOL_C)
                return
            except Limit:
                self.rest(1.0)
        self.check()

    def tokens_per_s(self, bits: float) -> float:
        """Speed of one short reply at a budget, its prompt left out, with all that a reply costs beside the model.

        Args:
            bits: average bits per weight.

        Raises:
            Limit: the reply has less than three tokens.
        """
        spent_s = [token_s for _, token_s in self.tokens(_TOKENS + 2, bits=bits)]
        if not spent_s:
            raise Limit("a reply had less than three tokens, and no speed follows from it")
        return len(spent_s) / sum(spent_s)

    def tokens(self, most: int, most_s: float = math.inf, bits: float | None = None) -> Iterator[tuple[float, float]]:
        """(time, seconds since the token before) of each token of a reply but the first two.

        Tokens are counted, and not pieces of text: some characters need several tokens.

        Args:
            most: tokens at which the reply ends.
            most_s: seconds after which it ends.
            bits: its budget in average bits per weight; None leaves the engine's.
        """
        begin_s, before_s, heard_s = self.now(), None, list[float]()

        def hear(seconds: float, bits_used: float) -> None:
            heard_s.append(self.now())

        self.engine.add_listener(hear)
        try:
            with self.engine.generate(PROMPT, max_tokens=most, avg_bits=bits) as reply:
                for _ in reply:
                    for at_s in heard_s:
                        if before_s is not None:
                            yield at_s, at_s - before_s
                        before_s = at_s
                    heard_s.clear()
                    if self.now() - begin_s >= most_s:
                        return
        finally:
            self.engine.remove_listener(hear)


@contextmanager
def busy_cores(count: int) -> Iterator[None]:
    """Other programs that want whole cores.

    Args:
        count: number of programs.
    """
    with ExitStack() as programs:
        for _ in range(count):
            program = programs.enter_context(subprocess.Popen([sys.executable, "-c", _BUSY]))  # is waited for
            programs.callback(program.kill)
        yield


def _speeds(board: Board, seconds: float) -> dict[str, Any]:
    """Speed at each budget and number of threads, quiet and beside one busy core.

    At its limit the board cools in a pause, and the next speed follows.  A speed that was slowed does not count.
    """
    budget, most = board.engine.manifest.budget, board.engine.threads
    ends = (budget.max_bits, budget.min_bits)
    ways = [(n, bits, 0) for n in range(most, 0, -1) for bits in grid(budget.min_bits, budget.max_bits)]
    ways += [(n, bits, 1) for n in range(most, 0, -1) for bits in ends]
    rows: list[dict[str, Any]] = []
    for threads, bits, busy in ways:
        board.engine.threads = threads
        end_s, speeds, seen = board.now() + seconds / len(ways), list[float](), list[Readings]()
        with busy_cores(busy):
            board.tokens_per_s(bits)
            while not speeds or board.now() < end_s:
                tokens_per_s = board.tokens_per_s(bits)
                try:
                    seen.append(board.check())
                    speeds.append(tokens_per_s)
                except Limit:
                    if speeds:
                        break
                    if board.now() >= end_s + _COOL_S:
                        raise
                    board.cool()
        board.cool()
        powers = [r.power_w for r in seen if r.power_w is not None]
        rows.append(
            {"threads": threads, "bits": bits, "busy_cores": busy, "runs": len(speeds),
             "tokens_per_s": sorted(speeds)[len(speeds) // 2], "least_tokens_per_s": min(speeds),
             "most_tokens_per_s": max(speeds), "power_w": sum(powers) / len(powers) if powers else None}
        )  # fmt: skip
    board.engine.threads = most
    return {"rows": rows}


def _idle(board: Board, seconds: float) -> dict[str, Any]:
    """Power and temperature without work."""
    return {"rows": list(_watch(board, seconds, lambda: board.rest(1.0)))}


def _heating(board: Board, seconds: float) -> dict[str, Any]:
    """Decoding without pause at the highest budget."""
    bits = board.engine.manifest.budget.max_bits
    return {"rows": list(_watch(board, seconds, lambda: board.tokens_per_s(bits), safe=True))}


def _watch(
    board: Board, seconds: float, work: Callable[[], float | None], safe: bool = False
) -> Iterator[dict[str, Any]]:
    begin_s = board.now()
    while (at_s := board.now() - begin_s) < seconds:
        tps = work()
        try:
            seen = board.check() if safe else board.look()
        except Limit as limit:
            seen = board.look()
            yield _row(at_s, seen, tps) | {"stopped": str(limit)}
            return
        yield _row(at_s, seen, tps)


def _row(at_s: float, seen: Readings, tps: float | None) -> dict[str, Any]:
    return {"time_s": round(at_s, 1), "temp_c": seen.temp_c, "power_w": seen.power_w, "tokens_per_s": tps,
            "cpu_freq_fraction": seen.cpu_freq_fraction, "heat_throttled": seen.heat_throttled}  # fmt: skip


class _Looks:
    """The sensors as a governor needs them."""

    def __init__(self, board: Board) -> None:
        self._board = board

    def read(self) -> Readings:
        return self._board.look()


def _closed_loop(board: Board, seconds: float) -> dict[str, Any]:
    """Replies under the policy ``auto``.  In the middle third another program takes a core.

    Prompts are left out: a row is a second of writing.  No token is guessed: the speed of guesses depends on the text,
    and a simulated board has none.
    """
    rows: dict[int, list[float]] = {}
    with Governor(board.engine, _Looks(board), find_policy("auto"), speculates=False) as governor:
        begin_s = board.now()
        for third in range(3):
            with busy_cores(third % 2):
                while (left_s := seconds * (third + 1) / 3 - (board.now() - begin_s)) > 0:
                    for at_s, spent_s in board.tokens(_REPLY_TOKENS, left_s):
                        row = rows.setdefault(int(at_s - begin_s), [0.0, 0.0, 0.0])
                        bits = governor.status().avg_bits
                        row[:] = row[0] + 1, row[1] + spent_s, row[2] + spent_s * bits
    spent_s = sum(row[1] for row in rows.values())
    if not spent_s:
        raise Limit("no reply had two tokens in time; give more --minutes")
    return {
        "columns": ["second", "tokens", "seconds", "bits"],
        "rows": [[at, count, took_s, bits_s / took_s] for at, (count, took_s, bits_s) in rows.items() if took_s],
        "seconds": seconds,
        "busy_from_s": seconds / 3,
        "busy_until_s": 2 * seconds / 3,
        "tokens_per_s": sum(row[0] for row in rows.values()) / spent_s,
        "mean_bits": sum(row[2] for row in rows.values()) / spent_s,
    }


class Stage(NamedTuple):
    """A stage.  name: key in the report; share: of the whole time; measure: (board, seconds) -> its part."""

    name: str
    share: float
    measure: Callable[[Board, float], dict[str, Any]]


STAGES: tuple[Stage, ...] = (
    Stage("idle", 0.05, _idle),
    Stage("speeds", 0.35, _speeds),
    Stage("heating", 0.25, _heating),
    Stage("cooling", 0.15, _idle),
    Stage("closed_loop", 0.20, _closed_loop),
)


def empty(engine: Engine, look: Callable[[], Readings]) -> dict[str, Any]:
    """The report before the first stage: the board and the bundle.

    Args:
        engine: a loaded bundle.
        look: reads the sensors.
    """
    manifest, seen = engine.manifest, look()
    environment = bench.environment(look)
    return {
        "format": FORMAT,
        "version": VERSION,
        "date": datetime.now(UTC).date().isoformat(),
        "environment": {k: v for k, v in environment.items() if k not in ("load", "temp_c")},
        "bundle": {
            "model": manifest.model.name,
            "target": manifest.target.name,
            "threads": engine.threads,
            "min_bits": manifest.budget.min_bits,
            "max_bits": manifest.budget.max_bits,
            "floor_bits": manifest.quality.floor_bits,
            "bytes_per_token": dict(manifest.weights.bytes_per_token),
            "kl_divergence": [
                [p.avg_bits_used, p.kl_divergence] for p in manifest.quality.curve if p.kl_divergence > 0
            ],
        },
        "limits": {"throttle_temp_c": seen.throttle_temp_c, "critical_temp_c": seen.critical_temp_c},
        "stages": {},
    }


def measure(
    report: dict[str, Any],
    board: Board,
    seconds: float,
    keep: Callable[[dict[str, Any]], None],
    tell: Callable[[str], None],
    *,
    stages: Sequence[Stage] = STAGES,
) -> dict[str, Any]:
    """Measure the stages that a report does not have yet.

    Args:
        report: result of ``empty``, or an unfinished report.
        board: the board.
        seconds: time for all stages, in s.
        keep: called with the report after each stage.
        tell: called with a line for people before each stage.
        stages: the stages in order.
    """
    for stage in stages:
        if stage.name in report["stages"]:
            continue
        tell(f"{stage.name.replace('_', ' ')}: {stage.share * seconds / 60:.1f} minutes")
        try:
            part = stage.measure(board, stage.share * seconds)
        except Limit as limit:
            part = {"rows": [], "stopped": str(limit)}
        report["stages"][stage.name] = part
        keep(report)
    return report


def finished_stages(path: Path, fresh: dict[str, Any]) -> dict[str, Any]:
    """The stages of an unfinished report, if it is of the same board and bundle as a fresh one.

    Args:
        path: what an earlier call kept.
        fresh: result of ``empty``.

    Returns:
        Stages by name; none where the file is of another board or bundle, or is damaged.
    """
    try:
        report = parse_json(read_text_file(path, _MOST_BYTES).encode())
    except (UsageError, ValueError):
        return {}
    same = ("format", "version", "environment", "bundle")
    stages = report.get("stages") if isinstance(report, dict) else None
    if not isinstance(stages, dict) or any(report.get(key) != json.loads(json.dumps(fresh[key])) for key in same):
        return {}
    names = [stage.name for stage in STAGES]
    return {name: part for name, part in stages.items() if name in names and isinstance(part, dict)}


def write(report: dict[str, Any], path: Path) -> None:
    """Write a report, whole or not at all.

    Args:
        report: the report.
        path: the file.
    """
    write_whole(path, (json.dumps(report, indent=1, ensure_ascii=False) + "\n").encode())
