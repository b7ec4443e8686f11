"""The boards that can be simulated: one row each, every figure with where it comes from.

Marks in the comments: [m] measured with this project's kernels; [d] the maker's documents; [r] reported by
others, not checked here; [e] our estimate.  No row has been compared with the board itself yet: the
models show how a policy behaves, not how fast a board is.
"""

from __future__ import annotations

from dataclasses import dataclass

from mbq_runtime.errors import UsageError

OVERHEAD = 0.61
"""Time of a token that does not follow the bits, over that of reading the weights at 8 bits.  [m] SmolLM2-135M on
two cores of an AMD EPYC with AVX-512: 7.1 ms at 8 bits and 4.35 ms at 3, that is 2.7 ms and 0.55 ms for each bit."""


@dataclass(frozen=True)
class Board:
    """Parameters of one board.

    read_gb_s: weights read per second at full clock; read_clock_share: share of the reading that
    slows down with the clock.  idle_w, core_w: drawn when idle, and by busy cores at full clock on top;
    core_exponent: how core power follows the clock (frequency times voltage squared); memory_pj: energy to
    read one byte.  ambient_c; k_per_w: of the whole board to the air; tau_s: time constant of that;
    die_k_per_w, die_tau_s: the same of the sensor above the board.  throttle_c: where the board
    begins to lower its clock; hard_c: where the clock is down to least_clock (a share of the full one).
    battery_wh: None on mains.
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


_PI5 = {
    "read_gb_s": 9.5,  # [r] 7B models of 4 GB at 2 tokens/s and a little more
    "read_clock_share": 0.5,  # [e] four A76 are about as fast as their memory
    "idle_w": 3.0,  # [r] 2.7 to 3.3 W at the plug
    "core_w": 6.0,  # [r] 9 to 10 W at the plug under llama.cpp
    "core_exponent": 2.2,  # [e] 0.72 V at 1.5 GHz, 0.95 V at 2.4 GHz
    "memory_pj": 60.0,  # [e] LPDDR4X with its controller
    "ambient_c": 25.0,
    "die_k_per_w": 1.2,  # [e]
    "die_tau_s": 3.0,  # [e]
    "throttle_c": 80.0,  # [d] gradual from here
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
            read_gb_s=25.0,  # [e] of 68 GB/s that the CPU cannot fill alone
            read_clock_share=0.7,  # [e] 1.5 GHz cores, fast memory
            idle_w=4.5,  # [r]
            core_w=5.0,  # [e]
            core_exponent=2.2,  # [e]
            memory_pj=45.0,  # [e] LPDDR5
            ambient_c=25.0,
            k_per_w=2.5,  # [e] [r] 67 to 71 C at 25 W, less at 15
            tau_s=150.0,  # [e]
            die_k_per_w=0.8,  # [e]
            die_tau_s=3.0,  # [e]
            throttle_c=99.0,  # [d] software throttling of the Orin family
            hard_c=104.5,  # [d] it switches off
            least_clock=0.5,  # [e]
        ),
        Board(
            "phone",
            "A phone with four big cores, held by the temperature of its skin",
            read_gb_s=25.0,  # [e] LPDDR5X, big cores only
            read_clock_share=0.6,  # [e]
            idle_w=1.0,  # [e] screen dimmed
            core_w=6.0,  # [e]
            core_exponent=2.2,  # [e]
            memory_pj=40.0,  # [e]
            ambient_c=25.0,
            k_per_w=4.5,  # [e] 4 W make a skin of 43 C
            tau_s=750.0,  # [e] 170 J/K
            die_k_per_w=0.0,  # the skin itself is what counts
            die_tau_s=3.0,
            throttle_c=41.0,  # [e]
            hard_c=47.0,  # [e] [r] about half the speed is lost within two long runs
            least_clock=0.4,  # [e]
            battery_wh=19.0,  # [e] 5 Ah
        ),
        Board(
            "laptop-battery",
            "A 15 W class laptop on battery",
            read_gb_s=30.5,  # [m] the EPYC's, [e] that two DDR5 channels give as much
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
    """A row of ``BOARDS``.  Raises UsageError naming them."""
    if name not in BOARDS:
        raise UsageError(f"board {name!r}: neither a file nor one of {', '.join(BOARDS)}")
    return BOARDS[name]
