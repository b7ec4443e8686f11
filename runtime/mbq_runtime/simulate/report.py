"""A report of ``mbq kit`` as a simulated board, and the closed loop that it measured."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mbq_runtime.bundle.reading import parse_json, shown
from mbq_runtime.bundle.slice_profile import CODE_BITS
from mbq_runtime.control.heat import Heat
from mbq_runtime.control.watts import Watts
from mbq_runtime.errors import UsageError
from mbq_runtime.printable import printable
from mbq_runtime.text_file import read_text_file

from .boards import Board
from .model import Weights
from .situations import Situation

_MOST_BYTES = 16 << 20
_NEVER_C = 1000.0  # limit of a board whose temperature is unknown
_MOST_CPUS = 256
_LONGEST_S = 1e4  # of the closed loop; the longest kit gives it 48 minutes
_AIR_C = (-50.0, 100.0)


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
    try:
        with path.open("rb") as file:
            return b'"mbq-kit"' in file.read(200)
    except OSError:
        return False


def read_report(path: Path) -> Reported:
    """Read a report.

    Args:
        path: the file of ``mbq kit``.

    Raises:
        UsageError: the file is not a whole report, or is of no board.
    """
    text = read_text_file(path, _MOST_BYTES)
    try:
        return _reported(parse_json(text.encode()))
    except ValueError as error:
        raise UsageError(f"{path}: cannot be read ({error}); run mbq kit again") from None
    except (KeyError, TypeError, IndexError, AttributeError, ArithmeticError, StopIteration) as error:
        what = f"{type(error).__name__}: {error}"
        raise UsageError(f"{path}: no whole report of mbq kit ({what}); run mbq kit again") from None


def _within(value: Any, low: float, high: float) -> float:
    """A number of a report that a board can have."""
    if type(value) not in (int, float) or not low <= value <= high:
        raise ValueError(f"a figure is {shown(value)}, needed {low:g} to {high:g}")
    return float(value)


def _bits(value: Any) -> float:
    return _within(value, 1, CODE_BITS)


def _reported(report: dict[str, Any]) -> Reported:
    bundle, stages = report["bundle"], report["stages"]
    sizes = sorted((_bits(float(bits)), _within(size, 1, 1e13)) for bits, size in bundle["bytes_per_token"].items())
    (low, least), (high, most) = sizes[0], sizes[-1]
    per_bit = (most - least) / (high - low)
    curve = sorted({_bits(bits): _within(kl, 1e-12, 1e3) for bits, kl in bundle["kl_divergence"]}.items())
    least_bits, high_bits = _bits(bundle["min_bits"]), _bits(bundle["max_bits"])
    low_bits = max(_within(bundle["floor_bits"], 0, CODE_BITS), least_bits)  # 0: not measured
    weights = Weights(low_bits, high_bits, least - low * per_bit, per_bit, tuple(curve))
    cpus = round(_within(bundle["threads"], 1, _MOST_CPUS))
    speeds = stages["speeds"]["rows"]
    rows = {(row["threads"], row["bits"], row["busy_cores"]): _within(row["tokens_per_s"], 1e-3, 1e9) for row in speeds}
    ends = high_bits, least_bits
    if low_bits > high_bits or min(weights.bytes_at(bits) for bits in (low_bits, *ends, CODE_BITS)) <= 0:
        raise ValueError("the sizes and the budgets of the bundle do not fit each other")
    whole_s, short_s = (1 / rows[cpus, bits, 0] for bits in ends)
    part = weights.bytes_at(ends[1]) / weights.bytes_at(high_bits)
    share = min(max((1 - short_s / whole_s) / (1 - part), 0.05), 1.0)
    threads = tuple(rows[n, high_bits, 0] / rows[cpus, high_bits, 0] for n in range(1, cpus + 1))
    beside = rows[max(cpus - 1, 1), high_bits, 1] / rows[max(cpus - 1, 1), high_bits, 0]
    board = Board(
        name="report",
        help=printable(f"{report['environment']['board'] or report['environment']['cpu']}")[:120] + ", measured",
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
    begin_s, end_s = (_within(loop[key], 0, _LONGEST_S) for key in ("busy_from_s", "busy_until_s"))
    seconds = _within(loop["seconds"], 0.5, _LONGEST_S)
    if not all(math.isfinite(value) for value in vars(board).values() if isinstance(value, float)):
        raise ValueError("a figure that follows is not a number")

    def change(at: float) -> dict[str, float | bool | None]:
        return {"load": 1 / cpus} if begin_s <= at < end_s else {}

    situation = Situation("report", "report", board.help, max(round(seconds), 1), change)
    return Reported(board, weights, situation, _within(loop["tokens_per_s"], 0, 1e9), _bits(loop["mean_bits"]))


def _power(stages: dict[str, Any]) -> dict[str, float]:
    """Watts of the idle board and of its cores; 0 without a sensor."""
    idle, busy = (
        [_within(row["power_w"], 0, 1e5) for row in stages[name]["rows"] if row["power_w"] is not None]
        for name in ("idle", "heating")
    )
    if not idle or not busy:
        return {"idle_w": 0.0, "core_w": 0.0}
    watts = Watts()
    for power_w, share in [*((w, 0.0) for w in idle), *((w, 1.0) for w in busy)]:
        watts = watts.after(power_w, share, 0.0, 1.0)
    return {"idle_w": watts.idle_w, "core_w": max(watts.at(1.0, 0.0) - watts.idle_w, 0.0)}


def _heat(limits: dict[str, Any], stages: dict[str, Any]) -> dict[str, float]:
    """The thermal model, from the curves of heating and cooling.  A board without a sensor does not warm."""
    power = _power(stages)
    limit_c, hard_c = (
        None if limits[name] is None else _within(limits[name], 0, _NEVER_C)
        for name in ("throttle_temp_c", "critical_temp_c")
    )
    if limit_c is None:
        limit_c = _NEVER_C if hard_c is None else hard_c - 10.0
    heat = Heat()
    for stage, share in (("idle", 0.0), ("heating", 1.0), ("cooling", 0.0)):
        before_s = 0.0
        for row in stages[stage]["rows"]:
            at_s = _within(row["time_s"], before_s, 1e6)
            if row["temp_c"] is not None:
                heat = heat.after(_within(row["temp_c"], -_NEVER_C, _NEVER_C), share, at_s - before_s)
            before_s = at_s
    limits_c = {"throttle_c": limit_c, "hard_c": max(hard_c or 0.0, limit_c + 5.0)}
    if not heat.is_known:
        return power | limits_c | {"ambient_c": 25.0, "k_per_w": 0.0, "tau_s": 100.0}
    core_w = power["core_w"] or 1.0
    k_per_w = min((heat.settled_c(1.0) - heat.settled_c(0.0)) / core_w, 1e3)
    ambient_c = min(max(heat.settled_c(0.0) - k_per_w * power["idle_w"], _AIR_C[0]), _AIR_C[1])
    return power | limits_c | {"core_w": core_w, "ambient_c": ambient_c, "k_per_w": k_per_w, "tau_s": heat.tau_s}
