"""Each file of each board is broken in each way: there is never an exception, a wait or a wrong value.

Files of a few devices are broken at once.  Each way to break them puts other files together, so a file that spoils
the signals of another device is seen in one of them.
"""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Iterable
from dataclasses import astuple

import pytest
from boards import Board
from boards_pc import TERMUX
from machines import BOARDS, Machine
from trees import FAULTS

from mbq_runtime.sensing import Kind, Signal, aggregate
from mbq_runtime.sensing.raspberry import BOARD, MAILBOX

Key = tuple[Kind, str, str]
AT_ONCE = 8
"""Files that are broken together."""
IN_TURN = 4
"""The quick tier breaks each board in one of so many ways, and in every way one of so many boards."""
CASES = [
    pytest.param(board, fault, marks=[pytest.mark.heavy] if (i + j) % IN_TURN else [])
    for i, board in enumerate(BOARDS)
    for j, fault in enumerate(FAULTS)
]


def known(signals: Iterable[Signal]) -> dict[Key, float]:
    return {(one.kind, one.name, one.source): one.value for one in signals if one.value is not None}


def healthy(machine: Machine) -> dict[Key, float]:
    machine.settled()
    machine.go_on()
    return known(machine.settled())


def measured(board: Board, values: dict[Key, float]) -> list[str]:
    """The files that give the values of a board."""
    return [path for path in board.files if path != TERMUX and any(source == path for _, _, source in values)]


def device(path: str) -> str:
    return path.rsplit("/", 1)[0]


def concerned(source: str, broken: str) -> bool:
    """Whether a signal from ``source`` can be unknown because of the broken file.  Some files are read together."""
    folder = device(broken)
    return (
        (folder.startswith("/sys") and (device(source) == folder or source.startswith(folder + "/")))
        or source.startswith(broken)
        or broken.startswith(source)
        # Which Raspberry Pi this is says whether its firmware has a power chip to be asked for.
        or (broken == BOARD and source.startswith((MAILBOX, "vcgencmd")))
        or any(part in source and part in broken for part in ("cgroup", "/proc/s", "/devfreq/"))
    )


def batches(board: Board, values: dict[Key, float], fault: str) -> list[list[str]]:
    """The files that give values, one of a device at a time; other ones together for each fault."""
    files = measured(board, values)
    found: list[list[str]] = []
    for file in random.Random(fault).sample(files, len(files)):
        fits = [batch for batch in found if len(batch) < AT_ONCE and not any(concerned(file, one) for one in batch)]
        if fits:
            fits[0].append(file)
        else:
            found.append([file])
    return found


def check(signals: list[Signal], before: dict[Key, float], broken: Collection[str]) -> None:
    """The values of the broken files are unknown.  Other values of their devices are unchanged or unknown."""
    now = known(signals)
    believed = [key for key in now if key[2] in broken]
    assert not believed
    for key, value in now.items():
        # What steps in for a broken file (percent for energy, the tool for the mailbox) is a signal of its own.
        assert key not in before or value == pytest.approx(before[key]), key
    lost = [key for key in before if key not in now and not any(concerned(key[2], file) for file in broken)]
    assert not lost
    assert all(one.problem for one in signals if one.value is None)


@pytest.mark.parametrize(("board", "fault"), CASES, indirect=["board"])
def test_broken_from_the_start(machine: Machine, fault: str) -> None:
    before = healthy(machine)
    for files in batches(machine.board, before, fault):
        for file in files:
            machine.smash(file, FAULTS[fault])
        machine.start()
        machine.settled()
        machine.go_on()
        signals = machine.settled()
        check(signals, before, files)
        assert all(value is None or math.isfinite(value) for value in astuple(aggregate(signals, machine.clock())))
        machine.mend()


@pytest.mark.parametrize(("board", "fault"), CASES, indirect=["board"])
def test_broken_between_two_reads(machine: Machine, fault: str) -> None:
    """The signal is still listed, without a value, and with the reason."""
    before = healthy(machine)
    for files in batches(machine.board, before, fault):
        machine.start()
        machine.settled()
        for file in files:
            machine.smash(file, FAULTS[fault])
        machine.go_on()
        signals = machine.settled()
        check(signals, before, files)
        # Marked as unknown, or known from another file; listed in any case.
        assert {key[:2] for key in before if key[2] in files} <= {(one.kind, one.name) for one in signals}
        machine.mend()
