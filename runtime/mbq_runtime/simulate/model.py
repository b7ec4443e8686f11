"""The physics of a board that decodes: speed, power, heat, the clock its own governor allows, battery."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from mbq_runtime.bundle.manifest import Manifest
from mbq_runtime.control.policy import quality_floor

from .boards import OVERHEAD, Board


@dataclass(frozen=True)
class Weights:
    """Of the model that is decoded.  low_bits, high_bits: its budgets; a token reads fixed_bytes + bits * bit_bytes."""

    low_bits: float
    high_bits: float
    fixed_bytes: float
    bit_bytes: float

    def bytes_at(self, bits: float) -> float:
        return self.fixed_bytes + bits * self.bit_bytes

    @classmethod
    def of(cls, manifest: Manifest) -> Weights:
        """A straight line through the least and the most the bundle's table tells."""
        sizes = sorted((float(bits), size) for bits, size in manifest.weights.bytes_per_token.items())
        (low, least), (high, most) = sizes[0], sizes[-1]
        per_bit = (most - least) / (high - low) if high > low else most / high
        return cls(quality_floor(manifest), manifest.budget.max_bits, least - low * per_bit, per_bit)


SMOLLM2_135M = Weights(low_bits=4.0, high_bits=8.0, fixed_bytes=8.41e6, bit_bytes=16.81e6)
"""Slices 3,1,2,2 in groups of 64, head included; below 4 bits its text is no longer acceptable."""


@dataclass(frozen=True)
class BoardState:
    """A board at one moment.  clock: allowed by its governor, of the full one; battery_wh: left, None on mains."""

    body_c: float
    die_c: float
    clock: float = 1.0
    battery_wh: float | None = None


@dataclass(frozen=True)
class Stretch:
    """What one stretch of decoding gives.  decode_tps: while it decodes; tokens_per_s: with its pauses."""

    state: BoardState
    decode_tps: float
    tokens_per_s: float
    power_w: float


def cold(board: Board) -> BoardState:
    """After a night switched off."""
    return BoardState(board.ambient_c, board.ambient_c, 1.0, board.battery_wh)


def token_s(board: Board, weights: Weights, bits: float, clock: float) -> float:
    """Seconds of one token."""
    read_s = weights.bytes_at(bits) / (board.read_gb_s * 1e9)
    overhead_s = OVERHEAD * weights.bytes_at(8.0) / (board.read_gb_s * 1e9)
    return overhead_s / clock + read_s * (1 - board.read_clock_share + board.read_clock_share / clock)


def advance(
    board: Board, weights: Weights, state: BoardState, bits: float, seconds: float, demand_tps: float | None = None
) -> Stretch:
    """``seconds`` (a few at most) of decoding at a budget, without pause or at ``demand_tps`` if that is slower."""
    one_s = token_s(board, weights, bits, state.clock)
    share = 1.0 if demand_tps is None else min(demand_tps * one_s, 1.0)
    tokens_per_s = share / one_s
    busy_w = board.core_w * state.clock**board.core_exponent
    power_w = board.idle_w + share * busy_w + tokens_per_s * weights.bytes_at(bits) * board.memory_pj * 1e-12
    body_c = _toward(state.body_c, board.ambient_c + board.k_per_w * power_w, seconds / board.tau_s)
    die_c = _toward(state.die_c, body_c + board.die_k_per_w * power_w, seconds / board.die_tau_s)
    left_wh = None if state.battery_wh is None else max(state.battery_wh - power_w * seconds / 3600, 0.0)
    after = replace(state, body_c=body_c, die_c=die_c, clock=allowed_clock(board, die_c), battery_wh=left_wh)
    return Stretch(after, 1 / one_s, tokens_per_s, power_w)


def allowed_clock(board: Board, die_c: float) -> float:
    """The board's own governor: from full at the throttle point to the least at the hard limit."""
    over = min(max((die_c - board.throttle_c) / (board.hard_c - board.throttle_c), 0.0), 1.0)
    return 1 - over * (1 - board.least_clock)


def _toward(value: float, end: float, time_constants: float) -> float:
    return end + (value - end) * math.exp(-time_constants)
