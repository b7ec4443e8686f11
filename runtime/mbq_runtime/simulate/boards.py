"""The boards that can be simulated: one row each, with the origin of every value.

Origin of the values: [m] measured with the kernels of this project; [d] documents of the manufacturer; [r] reported by
others, not checked here; [e] estimated.  No row was compared with its board yet.  The models show how a policy behaves.
They do not show how fast a board is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mbq_runtime.errors import UsageError

OVERHEAD = 0.61
"""Time of a token that does not depend on the bits, over the time to read the weights at 8 bits.  [m]"""


@dataclass(frozen=True)
class Board:
    """Parameters of one board.

    Args:
        name: word that selects it.
        help: one line for people.
        read_gb_s: speed of reading weights at full clock, in GB/s.
        read_clock_share: share of the reading time that depends on the clock, 0 to 1.
        idle_w: power of the idle board, in W.
        core_w: additional power of busy cores at full clock, in W.
        core_exponent: exponent of the clock in the core power (frequency times voltage squared).
        memory_pj: energy to read one byte, in pJ.
        ambient_c: temperature of the air, in C.
        k_per_w: thermal resistance from the board to the air, in K/W.
        tau_s: time constant of the board's temperature, in s.
        die_k_per_w: thermal resistance from the sensor to the board, in K/W.
        die_tau_s: time constant of the sensor's temperature, in s.
        throttle_c: temperature in C from which the board lowers its clock.
        hard_c: temperature in C at which the clock is ``least_clock``.
        least_clock: lowest clock over the full clock, 0 to 1.
        battery_wh: energy of the battery, in Wh; None: mains.
        cpus: number of cores that decode.
        overhead: time of a token that does not depend on the bits, over the time to read the weights at 8 bits.
        thread_speeds: speed of 1, 2, ... threads over that of all cores; empty: (threads / cores)**0.8.  [e]
        shared_speed: what is left of the speed for each thread that shares its core with another program.  [e]
        beside_speed: what is left of the speed beside another program that has a core of its own.
    """

    name: str
    help: str
    read_gb_s: float
    read_clock_share: float
    idle_w: float
    core_w: float
    core_exponent: float
    memory_pj: float
    ambient_c: float
    k_per_w: float
    tau_s: float
    die_k_per_w: float
    die_tau_s: float
    throttle_c: float
    hard_c: float
    least_clock: float
    battery_wh: float | None = None
    cpus: int = 4
    overhead: float = OVERHEAD
    thread_speeds: tuple[float, ...] = ()
    shared_speed: float = 0.5
    beside_speed: float = 1.0


_PI5: dict[str, Any] = {
    "read_gb_s": 9.5,  # [r] 7B models of 4 GB at slightly more than 2 tokens/s
    "read_clock_share": 0.5,  # [e] four A76 cores are about as fast as their memory
    "idle_w": 3.0,  # [r] 2.7 to 3.3 W at the plug
    "core_w": 6.0,  # [r] 9 to 10 W at the plug under llama.cpp
    "core_exponent": 2.2,  # [e] 0.72 V at 1.5 GHz, 0.95 V at 2.4 GHz
    "memory_pj": 60.0,  # [e] LPDDR4X with its controller
    "ambient_c": 25.0,
    "die_k_per_w": 1.2,  # [e]
    "die_tau_s": 3.0,  # [e]
    "throttle_c": 80.0,  # [d] gradual from this temperature
    "hard_c": 85.0,  # [d]
    "least_clock": 1.5 / 2.4,  # [d]
}

BOARDS: dict[str, Board] = {
    board.name: board
    for board in (
        # [r] bare, 50 to 55 C when idle, 80 C after some minutes of full load
        Board("pi5-bare", "Raspberry Pi 5 without a cooler", k_per_w=9.0, tau_s=330.0, **_PI5),
        # [r] Active Cooler, 60 to 65 C under full load
        Board("pi5-fan", "Raspberry Pi 5 with the Active Cooler", k_per_w=3.0, tau_s=120.0, **_PI5),
        Board(
            "orin-nano-15w",
            "Jetson Orin Nano in its 15 W mode, fan on, decoding on the CPU",
            read_gb_s=25.0,  # [e] of 68 GB/s; the CPU alone does not reach it
            read_clock_share=0.7,  # [e] 1.5 GHz cores, fast memory
            idle_w=4.5,  # [r]
            core_w=5.0,  # [e]
            core_exponent=2.2,  # [e]
            memory_pj=45.0,  # [e] LPDDR5
            ambient_c=25.0,
            k_per_w=2.5,  # [e] [r] 67 to 71 C at 25 W, lower at 15 W
            tau_s=150.0,  # [e]
            die_k_per_w=0.8,  # [e]
            die_tau_s=3.0,  # [e]
            throttle_c=99.0,  # [d] software throttling of the Orin family
            hard_c=104.5,  # [d] it switches off
            least_clock=0.5,  # [e]
        ),
        Board(
            "phone",
            "A phone with four big cores, limited by the temperature of its skin",
            read_gb_s=25.0,  # [e] LPDDR5X, big cores only
            read_clock_share=0.6,  # [e]
            idle_w=1.0,  # [e] screen dimmed
            core_w=6.0,  # [e]
            core_exponent=2.2,  # [e]
            memory_pj=40.0,  # [e]
            ambient_c=25.0,
            k_per_w=4.5,  # [e] 4 W make a skin of 43 C
            tau_s=750.0,  # [e] 170 J/K
            die_k_per_w=0.0,  # the sensor is the skin itself
            die_tau_s=3.0,
            throttle_c=41.0,  # [e]
            hard_c=47.0,  # [e] [r] about half the speed is lost within two long runs
            least_clock=0.4,  # [e]
            battery_wh=19.0,  # [e] 5 Ah
        ),
        Board(
            "laptop-battery",
            "A 15 W class laptop on battery",
            read_gb_s=30.5,  # [m] on an EPYC; [e] two DDR5 channels are as fast
            read_clock_share=0.5,  # [e]
            idle_w=5.0,  # [r]
            core_w=15.0,  # [d] its class
            core_exponent=2.4,  # [e]
            memory_pj=120.0,  # [e] DDR5 modules
            ambient_c=25.0,
            k_per_w=2.0,  # [e]
            tau_s=120.0,  # [e]
            die_k_per_w=0.8,  # [e]
            die_tau_s=2.0,  # [e]
            throttle_c=95.0,  # [d]
            hard_c=100.0,  # [d]
            least_clock=0.4,  # [e]
            battery_wh=50.0,  # [e]
        ),
    )
}


def find_board(name: str) -> Board:
    """A row of ``BOARDS``.

    >>> find_board("pi5-fan").throttle_c
    80.0

    Args:
        name: name of the board.

    Raises:
        UsageError: there is no such board.
    """
    if name not in BOARDS:
        raise UsageError(
            f"board {name!r}: neither a file nor one of {', '.join(BOARDS)}, nor a row of mbq simulate list"
        )
    return BOARDS[name]
