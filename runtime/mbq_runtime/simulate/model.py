"""The physics of a board that decodes: speed, power, heat, clock and battery."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from mbq_runtime.bundle.manifest import Manifest
from mbq_runtime.control.policy import quality_floor
from mbq_runtime.errors import BundleError

from .boards import Board


@dataclass(frozen=True)
class Weights:
    """Sizes of the model that is decoded.  A token reads ``fixed_bytes + bits * bit_bytes``.

    Args:
        low_bits: lowest budget, in average bits per weight.
        high_bits: highest budget, in average bits per weight.
        fixed_bytes: bytes that a token reads at every budget.
        bit_bytes: bytes that a token reads for each bit of the budget.
        kl: pairs of a budget and the mean KL divergence from the original model at it, in nats a token, by rising
            budgets; empty: unknown.
    """

    low_bits: float
    high_bits: float
    fixed_bytes: float
    bit_bytes: float
    kl: Sequence[tuple[float, float]] = ()

    def bytes_at(self, bits: float) -> float:
        """Bytes of weights that a token reads.

        Args:
            bits: the budget, in average bits per weight.
        """
        return self.fixed_bytes + bits * self.bit_bytes

    @property
    def bytes_at_budgets(self) -> tuple[tuple[float, int], ...]:
        """The table of a policy's ``bytes_at``."""
        return tuple((bits, round(self.bytes_at(bits))) for bits in (self.low_bits, self.high_bits))

    def given_away(self, bits: float) -> float | None:
        """KL divergence at a budget minus that at the highest budget, in nats a token; None is unknown.

        Between two known budgets its logarithm is a straight line.

        Args:
            bits: the budget, in average bits per weight.
        """
        if len(self.kl) < 2:
            return None

        def divergence(at: float) -> float:
            pairs = zip(self.kl, self.kl[1:], strict=False)
            (low, most), (high, least) = next((pair for pair in pairs if at <= pair[1][0]), self.kl[-2:])
            rise = (math.log(least) - math.log(most)) * (at - low) / (high - low)
            return math.exp(min(math.log(most) + rise, 100.0))

        return divergence(bits) - divergence(self.high_bits)

    @classmethod
    def of(cls, manifest: Manifest) -> Weights:
        """The sizes of a bundle: a straight line through the first and the last row of its table.

        Args:
            manifest: the bundle's manifest.

        Raises:
            BundleError: the manifest has no such table.
        """
        if not manifest.weights.bytes_per_token:
            raise BundleError(
                f"{manifest.model.name}: its manifest does not say how many bytes a token reads (weights."
                "bytes_per_token); export the bundle again"
            )
        sizes = sorted((float(bits), size) for bits, size in manifest.weights.bytes_per_token.items())
        (low, least), (high, most) = sizes[0], sizes[-1]
        per_bit = (most - least) / (high - low) if high > low else most / high
        points = {point.avg_bits_used: point.kl_divergence for point in manifest.quality.curve}
        curve = sorted((bits, kl) for bits, kl in points.items() if kl > 0)  # NaN in bundles of early versions
        return cls(quality_floor(manifest), manifest.budget.max_bits, least - low * per_bit, per_bit, tuple(curve))


SMOLLM2_135M = Weights(
    low_bits=4.0,
    high_bits=8.0,
    fixed_bytes=8.41e6,
    bit_bytes=16.81e6,
    kl=((3.0, 0.4146), (3.48, 0.2172), (4.0, 0.1231), (4.95, 0.0528), (6.02, 0.0131), (8.0, 0.0024)),
)
"""SmolLM2-135M with slices 3,1,2,2 in groups of 64, head included.  Its quality floor is 4 bits.  The divergences are
those of ``results/kl-divergence.json``."""


@dataclass(frozen=True)
class BoardState:
    """The state of a board at one moment.

    Args:
        body_c: temperature of the board, in C.
        die_c: temperature at the sensor, in C.
        clock: allowed clock over the full clock, 0 to 1.
        battery_wh: energy left, in Wh; None: mains.
    """

    body_c: float
    die_c: float
    clock: float = 1.0
    battery_wh: float | None = None


@dataclass(frozen=True)
class Stretch:
    """Result of a short time of decoding.

    Args:
        state: state of the board after it.
        decode_tps: speed without the pauses, in tokens/s.
        tokens_per_s: speed with the pauses.
        power_w: mean power, in W.
    """

    state: BoardState
    decode_tps: float
    tokens_per_s: float
    power_w: float


def cold(board: Board) -> BoardState:
    """The state of a board that was off for a long time.

    Args:
        board: the board.
    """
    return BoardState(board.ambient_c, board.ambient_c, 1.0, board.battery_wh)


def token_s(board: Board, weights: Weights, bits: float, clock: float) -> float:
    """Time of one token, in s.

    Args:
        board: the board.
        weights: sizes of the model.
        bits: the budget, in average bits per weight.
        clock: clock over the full clock, 0 to 1.
    """
    read_s = weights.bytes_at(bits) / (board.read_gb_s * 1e9)
    overhead_s = board.overhead * weights.bytes_at(8.0) / (board.read_gb_s * 1e9)
    return overhead_s / clock + read_s * (1 - board.read_clock_share + board.read_clock_share / clock)


@dataclass(frozen=True)
class Surroundings:
    """What a board cannot change: other programs, limits, air and demand.

    Args:
        load: share of all cores that other programs use, 0 to 1.
        limit_cpus: cores that a cgroup allows; None: all.
        ambient_c: temperature of the air, in C; None: that of the board.
        cooling: thermal conductance to the air over the usual one; below 1 for a fan that fails.
        unplugged: whether a board with a battery runs on it.
        demand_tps: speed that is asked for, in tokens/s; None: decode without pauses; 0: no tokens.
    """

    load: float = 0.0
    limit_cpus: float | None = None
    ambient_c: float | None = None
    cooling: float = 1.0
    unplugged: bool = True
    demand_tps: float | None = None


USUAL = Surroundings()


def thread_speed(board: Board, threads: int, around: Surroundings) -> float:
    """Speed of a number of threads over the speed of all cores without load.

    The threads of a token wait for each other.  So each thread that shares its core slows all of them.  A limit stops
    all threads for a part of the time.

    Args:
        board: the board.
        threads: number of threads.
        around: the surroundings.
    """
    alone = board.thread_speeds[threads - 1] if board.thread_speeds else (threads / board.cpus) ** 0.8
    shared = max(threads - board.cpus * (1 - around.load), 0.0)
    allowed = 1.0 if around.limit_cpus is None else min(around.limit_cpus / threads, 1.0)
    beside = board.beside_speed if around.load > 0 and shared == 0 else 1.0
    return alone * math.pow(board.shared_speed, shared) * allowed * beside


def advance(
    board: Board,
    weights: Weights,
    state: BoardState,
    bits: float,
    *,
    seconds: float,
    around: Surroundings = USUAL,
    threads: int | None = None,
) -> Stretch:
    """Decode for a short time at one budget.

    Args:
        board: the board.
        weights: sizes of the model.
        state: state of the board before.
        bits: the budget, in average bits per weight.
        seconds: length of the time, a few s at most.
        around: load, air and demand in this time.
        threads: number of threads; None: all cores.
    """
    threads = threads or board.cpus
    one_s = token_s(board, weights, bits, state.clock) / thread_speed(board, threads, around)
    share = 1.0 if around.demand_tps is None else min(around.demand_tps * one_s, 1.0)
    tokens_per_s = share / one_s
    busy = min(share * threads / board.cpus + around.load, 1.0)
    busy_w = board.core_w * state.clock**board.core_exponent
    power_w = board.idle_w + busy * busy_w + tokens_per_s * weights.bytes_at(bits) * board.memory_pj * 1e-12
    ambient_c = board.ambient_c if around.ambient_c is None else around.ambient_c
    tau_s = board.tau_s / around.cooling
    body_c = _toward(state.body_c, ambient_c + board.k_per_w / around.cooling * power_w, seconds / tau_s)
    die_c = _toward(state.die_c, body_c + board.die_k_per_w * power_w, seconds / board.die_tau_s)
    left_wh = state.battery_wh
    if left_wh is not None and around.unplugged:
        left_wh = max(left_wh - power_w * seconds / 3600, 0.0)
    after = replace(state, body_c=body_c, die_c=die_c, clock=allowed_clock(board, die_c), battery_wh=left_wh)
    return Stretch(after, 1 / one_s, tokens_per_s, power_w)


def allowed_clock(board: Board, die_c: float) -> float:
    """The clock that the board allows: full up to the throttle point, then a straight line to the lowest clock.

    Args:
        board: the board.
        die_c: temperature at the sensor, in C.

    Returns:
        Clock over the full clock, 0 to 1.
    """
    over = min(max((die_c - board.throttle_c) / (board.hard_c - board.throttle_c), 0.0), 1.0)
    return 1 - over * (1 - board.least_clock)


def _toward(value: float, end: float, time_constants: float) -> float:
    return end + (value - end) * math.exp(-time_constants)
