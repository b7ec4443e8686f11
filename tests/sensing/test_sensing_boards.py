"""Each imitated board gives its names, values, units, files and limits, and its missing sensors are listed."""

from __future__ import annotations

from dataclasses import asdict

import pytest
from machines import Machine

from mbq_runtime.sensing import Kind, aggregate


def test_a_healthy_board_is_read_whole(machine: Machine) -> None:
    machine.settled()
    machine.go_on()
    signals = machine.settled()

    for expected in machine.board.signals:
        (one,) = [one for one in signals if (one.kind, one.name, one.source) == (
            expected.kind, expected.name, expected.source)]  # fmt: skip
        assert one.problem is None, expected
        assert one.value == pytest.approx(expected.value), expected
        assert one.unit == expected.unit
        assert (one.limit, one.hard_limit) == (pytest.approx(expected.limit), pytest.approx(expected.hard_limit)), one
        assert one.age_s == 0

    assert {one.source for one in signals if one.value is None and one.kind is not Kind.MISSING} == set(
        machine.board.unknown
    )
    assert {one.name for one in signals if one.kind is Kind.MISSING} >= set(machine.board.missing)
    assert all(one.problem for one in signals if one.value is None)


def test_readings_of_a_healthy_board(machine: Machine) -> None:
    machine.settled()
    machine.go_on()
    readings = asdict(aggregate(machine.settled(), machine.clock()))
    assert readings.pop("time_s") == machine.clock()
    everything = dict.fromkeys(readings) | machine.board.readings  # what a board does not name is unknown there
    assert readings == {name: pytest.approx(value) for name, value in everything.items()}
