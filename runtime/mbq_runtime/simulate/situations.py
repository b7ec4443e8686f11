"""Situations from public reports of people who run models on boards, rebuilt: one row each.

The reports describe causes, durations and temperatures.  The figures are rounded, and those that a report leaves open
are estimates.  A situation is a board, a length, and what happens around the board at each second.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from .boards import BOARDS, find_board
from .model import USUAL, Surroundings

Change = Callable[[float], dict[str, float | bool | None]]
"""From the time in s to what differs from the usual surroundings."""


@dataclass(frozen=True)
class Situation:
    """A board and what happens around it.

    Args:
        name: word that selects it.
        board: name of the board.
        help: one line for people.
        seconds: length in s.
        change: what differs from the usual surroundings at a time.
        min_tps: speed goal in tokens/s; None: the usual share of the speed without pressure.
        last_s: time in s until which the battery must last; None: no goal.
        battery_wh: energy of the battery at the start, in Wh; None: that of the board.
    """

    name: str
    board: str
    help: str
    seconds: int
    change: Change
    min_tps: float | None = None
    last_s: float | None = None
    battery_wh: float | None = None

    def around(self, time_s: float) -> Surroundings:
        """The surroundings at a time.

        Args:
            time_s: time since the start, in s.
        """
        return replace(USUAL, **self.change(time_s))  # type: ignore[arg-type]


def _during(begin_s: float, end_s: float, **values: float | bool | None) -> Change:
    return lambda at: values if begin_s <= at < end_s else {}


def _bursts(period_s: float, length_s: float, load: float, begin_s: float = 60.0) -> Change:
    return lambda at: {"load": load} if at >= begin_s and (at - begin_s) % period_s < length_s else {}


def _with(first: Change, **values: float | bool | None) -> Change:
    return lambda at: values | first(at)


def _rising(begin_s: float, end_s: float, name: str, low: float, high: float) -> Change:
    """In steps of 0.5."""
    return lambda at: {name: low + round(2 * (high - low) * min(max((at - begin_s) / (end_s - begin_s), 0.0), 1.0)) / 2}


def _usual(_: float) -> dict[str, float | bool | None]:
    return {}


def _compile(at: float) -> dict[str, float | bool | None]:
    """A build: three of four cores, with pauses where it links."""
    return {"load": 0.25 if at % 90 > 75 else 0.75} if 120 <= at < 720 else {}


def _browser(at: float) -> dict[str, float | bool | None]:
    """Pages that load for some seconds, then a video."""
    if 420 <= at < 780:
        return {"load": 0.24}
    return {"load": 0.5} if 60 <= at < 420 and at % 45 < 9 else {"load": 0.01}


SITUATIONS: dict[str, Situation] = {
    situation.name: situation
    for situation in (
        Situation("pi5-bare", "pi5-bare", "without pause", 1800, _usual),
        Situation("pi5-fan", "pi5-fan", "without pause", 1200, _usual),
        Situation("orin-nano-15w", "orin-nano-15w", "without pause", 1200, _usual),
        Situation("phone", "phone", "without pause", 1800, _usual),
        Situation("laptop-battery", "laptop-battery", "without pause", 1200, _usual),
        Situation("pi-compile", "pi5-fan", "a compile on three cores for 10 minutes", 1000, _compile),
        Situation("pi-browser", "pi5-fan", "pages that load, then a video", 1000, _browser),
        Situation("pi-backup", "pi5-fan", "a backup on one core for 5 minutes", 600, _during(120, 420, load=0.25)),
        Situation("pi-cron", "pi5-fan", "a script of 2 s every 20 s", 600, _bursts(20, 2, 0.5)),
        Situation("pi-update", "pi5-fan", "a system update on two cores", 600, _during(100, 340, load=0.5)),
        Situation("pi-camera", "pi5-fan", "an object detector at 40 % of all cores", 900, _during(150, 750, load=0.4)),
        Situation("robot-bursts", "orin-nano-15w", "ROS nodes that burst for 5 s every 12 s", 600, _bursts(12, 5, 0.5)),
        Situation("robot-mapping", "orin-nano-15w", "a mapper that works 40 s of 80 s", 900, _bursts(80, 40, 0.5)),
        Situation("robot-goal", "orin-nano-15w", "40 % load beside a goal of 75 tokens/s", 600,
                  _during(100, 500, load=0.4), 75.0),
        Situation("pi-kiosk", "pi5-bare", "20 tokens/s in a closed case", 2400, _with(_usual, demand_tps=20.0)),
        Situation("pi-summer", "pi5-bare", "12 tokens/s, the air warms from 25 to 34 C", 3000,
                  _with(_rising(600, 1800, "ambient_c", 25.0, 34.0), demand_tps=12.0)),
        Situation("pi-fan-fails", "pi5-fan", "22 tokens/s, the fan stops after 10 minutes", 2400,
                  _with(_during(600, 2400, cooling=0.36), demand_tps=22.0)),
        Situation("phone-sun", "phone", "40 tokens/s, in the sun after 10 minutes", 3000,
                  _with(_rising(600, 900, "ambient_c", 25.0, 27.5), demand_tps=40.0)),
        Situation("phone-game", "phone", "a game beside it for 5 minutes", 900, _during(200, 500, load=0.35)),
        Situation("orin-dusty", "orin-nano-15w", "50 tokens/s, dust on the cooler", 2400,
                  _with(_during(300, 2400, cooling=0.245), demand_tps=50.0)),
        Situation("laptop-unplugged", "laptop-battery", "60 tokens/s, must last 2 h from 24 Wh", 1500,
                  _with(_usual, demand_tps=60.0), None, 7200.0, 24.0),
        Situation("laptop-flight", "laptop-battery", "90 tokens/s, must last 1.5 h from 23 Wh", 1500,
                  _with(_usual, demand_tps=90.0), None, 5400.0, 23.0),
        Situation("laptop-meeting", "laptop-battery", "a video call beside it", 900, _during(150, 600, load=0.3)),
        Situation("container-limit", "orin-nano-15w", "a host that allows 2.5 of 4 cores", 900,
                  _during(150, 600, limit_cpus=2.5)),
        Situation("container-neighbour", "orin-nano-15w", "a neighbour that works 15 s of 60 s", 900,
                  _bursts(60, 15, 0.6)),
    )
}  # fmt: skip
"""The situations by name.  The first five are the boards alone."""


def find_situation(name: str, hours: float, demand_tps: float | None) -> Situation:
    """A board that decodes for some time, or a row of ``SITUATIONS``, which has its own length and demand.

    >>> find_situation("pi-compile", 1.0, None).seconds
    1000

    Args:
        name: name of a board or a situation.
        hours: length for a board, in h.
        demand_tps: speed that is asked of a board, in tokens/s; None: decode without pauses.

    Raises:
        UsageError: there is neither.
    """
    if name in SITUATIONS and name not in BOARDS:
        return SITUATIONS[name]
    board = find_board(name)
    return Situation(board.name, board.name, board.help, round(hours * 3600), _with(_usual, demand_tps=demand_tps))
