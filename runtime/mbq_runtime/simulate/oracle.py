"""The oracle: the best that could be done by someone who knows the board and the future.

It chooses the budget of each second by dynamic programming over the temperature of the board (Bellman, 1957).  It has
the goals of a controller, in this order: to stay below the controller's temperature, to hold the speed or come as near
to it as bits can, to give away as little quality as possible.  A battery that must last adds a price for energy; the
lowest price that is enough is found by bisection.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from .boards import Board
from .model import BoardState, Surroundings, Weights, advance, allowed_clock, cold, thread_speed

Array = NDArray[np.float64]

_GRID_C = 0.25
_STEP_S = 2  # length of a decision
_HOT, _SLOW = 1e6, 1e3  # prices of 1 C above the limit, and of a speed that is missing, beside nats
_COOLS_C = 2.0
"""Budgets that cool a board by less than this in the end are not given up for heat, as a controller does not."""


def budgets(
    board: Board,
    weights: Weights,
    around: Sequence[Surroundings],
    allowed: Sequence[float],
    goals_tps: Sequence[float | None],
    *,
    highest_c: float,
    energy_wh: float | None = None,
) -> list[float]:
    """The best budget of each second.

    Args:
        board: the board.
        weights: sizes and divergences of the model.
        around: the surroundings of each second.
        allowed: the budgets to choose from, in average bits per weight.
        goals_tps: speed to hold in each second, in tokens/s; None: no goal.
        highest_c: temperature at the sensor to stay below, in C.
        energy_wh: energy that the whole time may take, in Wh; None: any.
    """
    plan = _Plan(board, weights, around, allowed, goals_tps, highest_c)
    found, joules = plan.best(0.0)
    if energy_wh is None or joules <= 3600 * energy_wh:
        return found
    low, high = 0.0, 1.0
    for _ in range(10):
        price = (low * high) ** 0.5 if low else high * 1e-3
        found, joules = plan.best(price)
        low, high = (price, high) if joules > 3600 * energy_wh else (low, price)
    return plan.best(high)[0]


@dataclass(frozen=True)
class _Choices:
    """What each budget does at each temperature of the grid, in one kind of surroundings.  Arrays are [grid, budgets].

    after_c: temperature of the board after a step; cost: without the price of energy; joules: energy of a step.
    """

    after_c: Array
    cost: Array
    joules: Array


class _Plan:
    def __init__(
        self,
        board: Board,
        weights: Weights,
        around: Sequence[Surroundings],
        allowed: Sequence[float],
        goals_tps: Sequence[float | None],
        highest_c: float,
    ) -> None:
        self._board, self._weights, self._around, self._allowed = board, weights, around, allowed
        self._highest_c = highest_c
        self._grid_c = np.arange(board.ambient_c - 5, board.hard_c + 25, _GRID_C)
        kinds = dict.fromkeys(zip(around[::_STEP_S], goals_tps[::_STEP_S], strict=True))
        self._choices = {kind: self._make(*kind) for kind in kinds}
        self._steps = [self._choices[kind] for kind in zip(around[::_STEP_S], goals_tps[::_STEP_S], strict=True)]

    def _make(self, around: Surroundings, goal_tps: float | None) -> _Choices:
        board, weights = self._board, self._weights
        rows = []
        for body_c in self._grid_c:
            row = []
            for bits in self._allowed:
                die_c, stretch = float(body_c), None
                for _ in range(6):  # the clock depends on the sensor, and the sensor on the power
                    state = BoardState(float(body_c), die_c, allowed_clock(board, die_c), None)
                    stretch = advance(
                        board, weights, state, bits, seconds=_STEP_S, around=around, threads=best_threads(board, around)
                    )
                    next_c = float(body_c) + board.die_k_per_w * stretch.power_w
                    if max(die_c, next_c) <= board.throttle_c or abs(next_c - die_c) < _GRID_C / 5:
                        break
                    die_c = (die_c + next_c) / 2
                die_c = next_c
                assert stretch is not None
                missing = 0.0 if goal_tps is None else max(1 - stretch.decode_tps / goal_tps, 0.0)
                nats = (weights.given_away(bits) or 0.0) * (around.demand_tps != 0)
                over_c = max(die_c - self._highest_c, 0.0)
                row.append(
                    (stretch.state.body_c, over_c, _STEP_S * (_SLOW * missing + nats), stretch.power_w * _STEP_S)
                )
            rows.append(row)
        after_c, over_c, cost, joules = np.moveaxis(np.array(rows), 2, 0)
        watts = joules[np.searchsorted(self._grid_c, self._highest_c - 5)] / _STEP_S
        cools = (watts.max() - watts.min()) * (board.k_per_w / around.cooling + board.die_k_per_w) >= _COOLS_C
        return _Choices(after_c, cost + (_HOT * over_c if cools else 0.0), joules)

    def best(self, price: float) -> tuple[list[float], float]:
        """The budgets for a price of energy in nats/J, and the energy in J."""
        value = np.zeros(len(self._grid_c))
        values = [value]
        for choices in reversed(self._steps):
            value = self._costs(choices, value, price).min(axis=1)
            values.append(value)
        values.reverse()
        state, found, joules = cold(self._board), [], 0.0
        for i, choices in enumerate(self._steps):
            row = min(int((state.body_c - self._grid_c[0]) / _GRID_C) + 1, len(self._grid_c) - 1)
            bits = self._allowed[int(self._costs(choices, values[i + 1], price)[row].argmin())]
            for around in self._around[i * _STEP_S : (i + 1) * _STEP_S]:
                threads = best_threads(self._board, around)
                stretch = advance(self._board, self._weights, state, bits, seconds=1.0, around=around, threads=threads)
                state = stretch.state
                joules += stretch.power_w
                found.append(bits)
        return found, joules

    def _costs(self, choices: _Choices, value: Array, price: float) -> Array:
        later: Array = np.interp(choices.after_c, self._grid_c, value)
        return choices.cost + price * choices.joules + later


@lru_cache(maxsize=1024)
def best_threads(board: Board, around: Surroundings) -> int:
    """The number of threads that is fastest.

    Args:
        board: the board.
        around: its surroundings.
    """
    return max(range(1, board.cpus + 1), key=lambda threads: thread_speed(board, threads, around))
