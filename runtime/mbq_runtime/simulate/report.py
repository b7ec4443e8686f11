"""A report of ``mbq kit`` as a simulated board, and the closed loop that it measured."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mbq_runtime.control.heat import Heat
from mbq_runtime.control.watts import Watts
from mbq_runtime.errors import UsageError

from .boards import Board
from .model import Weights
from .situations import Situation

_MOST_BYTES = 16 << 20
_NEVER_C = 1000.0  # limit of a board whose temperature is unknown


@dataclass(frozen=True)
class Reported:
    """What a report says.

    Args:
        board: the board.
        weights: sizes and divergences of the bundle.
        situation: the closed loop that was measured.
        tokens_per_s: speed of the measured closed loop, prompts left out.
        mean_bits: mean budget of it over time, in average bits per weight.
    """

    board: Board
    weights: Weights
    situation: Situation
    tokens_per_s: float
    mean_bits: float


def is_report(path: Path) -> bool:
    """Whether a file can be a report: JSON that says so in its first bytes.

    Args:
        path: the file.
    """
    with path.open("rb") as file:
        return b'"mbq-kit"' in file.read(200)


def read_report(path: Path) -> Reported:
    """Read a report.

    Args:
        path: the file of ``mbq kit``.

    Raises:
        UsageError: the file is not a whole report.
    """
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise UsageError(f"{path}: {path.stat().st_size} bytes, a report has at most {_MOST_BYTES}")
        report = json.loads(path.read_text(encoding="utf-8"))
        return _reported(report)
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path}: cannot be read ({error})") from None
    except (KeyError, TypeError, IndexError, AttributeError, ZeroDivisionError, StopIteration) as error:
        what = f"{type(error).__name__}: {error}"
        raise UsageError(f"{path}: no whole report of mbq kit ({what}); run mbq kit again") from None


def _reported(report: dict[str, Any]) -> Reported:
    bundle, stages = report["bundle"], report["stages"]
    sizes = sorted((float(bits), float(size)) for bits, size in bundle["bytes_per_token"].items())
    (low, least), (high, most) = sizes[0], sizes[-1]
    per_bit = (most - least) / (high - low)
    curve = sorted((float(bits), float(kl)) for bits, kl in bundle["kl_divergence"])
    low_bits, high_bits = float(bundle["floor_bits"]), float(bundle["max_bits"])
    weights = Weights(low_bits, high_bits, least - low * per_bit, per_bit, tuple(curve))
    cpus = int(bundle["threads"])
    speeds = stages["speeds"]["rows"]
    rows = {(row["threads"], row["bits"], row["busy_cores"]): float(row["tokens_per_s"]) for row in speeds}
    ends = high_bits, float(bundle["min_bits"])
    whole_s, short_s = (1 / rows[cpus, bits, 0] for bits in ends)
    part = weights.bytes_at(ends[1]) / weights.bytes_at(high_bits)
    share = min(max((1 - short_s / whole_s) / (1 - part), 0.05), 1.0)
    threads = tuple(rows[n, high_bits, 0] / rows[cpus, high_bits, 0] for n in range(1, cpus + 1))
    beside = rows[max(cpus - 1, 1), high_bits, 1] / rows[max(cpus - 1, 1), high_bits, 0]
    board = Board(
        name="report",
        help=f"{report['environment']['board'] or report['environment']['cpu']}, measured",
        read_gb_s=weights.bytes_at(high_bits) / (share * whole_s) * 1e-9,
        read_clock_share=0.5,
        core_exponent=2.2,
        memory_pj=0.0,
        die_k_per_w=0.0,
        die_tau_s=1.0,
        least_clock=0.5,
        cpus=cpus,
        overhead=(1 - share) / share,
        thread_speeds=threads,
        shared_speed=rows[cpus, high_bits, 1] / rows[cpus, high_bits, 0],
        beside_speed=min(beside, 1.0) if cpus > 1 else 1.0,
        **_heat(report["limits"], stages),
    )
    loop = stages["closed_loop"]
    begin_s, end_s, seconds = (float(loop[key]) for key in ("busy_from_s", "busy_until_s", "seconds"))
    if not all(map(math.isfinite, (board.read_gb_s, board.overhead, begin_s, end_s, seconds))) or seconds > 1e5:
        raise ValueError("a figure is not a number, or the closed loop is longer than a day")

    def change(at: float) -> dict[str, float | bool | None]:
        return {"load": 1 / cpus} if begin_s <= at < end_s else {}

    situation = Situation("report", "report", board.help, round(seconds), change)
    return Reported(board, weights, situation, float(loop["tokens_per_s"]), float(loop["mean_bits"]))


def _power(stages: dict[str, Any]) -> dict[str, float]:
    """Watts of the idle board and of its cores; 0 without a sensor."""
    idle = [row["power_w"] for row in stages["idle"]["rows"] if row["power_w"] is not None]
    busy = [row["power_w"] for row in stages["heating"]["rows"] if row["power_w"] is not None]
    if not idle or not busy:
        return {"idle_w": 0.0, "core_w": 0.0}
    watts = Watts()
    for power_w, share in [*((w, 0.0) for w in idle), *((w, 1.0) for w in busy)]:
        watts = watts.after(power_w, share, 0.0, 1.0)
    return {"idle_w": watts.idle_w, "core_w": max(watts.at(1.0, 0.0) - watts.idle_w, 0.0)}


def _heat(limits: dict[str, Any], stages: dict[str, Any]) -> dict[str, float]:
    """The thermal model, from the curves of heating and cooling.  A board without a sensor does not warm."""
    power = _power(stages)
    limit_c, hard_c = limits["throttle_temp_c"], limits["critical_temp_c"]
    if limit_c is None:
        limit_c = _NEVER_C if hard_c is None else hard_c - 10.0
    heat = Heat()
    for stage, share in (("idle", 0.0), ("heating", 1.0), ("cooling", 0.0)):
        before_s = 0.0
        for row in stages[stage]["rows"]:
            if row["temp_c"] is not None:
                heat = heat.after(row["temp_c"], share, row["time_s"] - before_s)
            before_s = row["time_s"]
    limits_c = {"throttle_c": limit_c, "hard_c": max(hard_c or 0.0, limit_c + 5.0)}
    if not heat.is_known:
        return power | limits_c | {"ambient_c": 25.0, "k_per_w": 0.0, "tau_s": 100.0}
    core_w = power["core_w"] or 1.0
    k_per_w = (heat.settled_c(1.0) - heat.settled_c(0.0)) / core_w
    ambient_c = heat.settled_c(0.0) - k_per_w * power["idle_w"]
    return power | limits_c | {"core_w": core_w, "ambient_c": ambient_c, "k_per_w": k_per_w, "tau_s": heat.tau_s}
