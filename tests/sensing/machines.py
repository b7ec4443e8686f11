"""A board on disk, the sensors that read it, and the clock they go by."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import boards_arm
import boards_pc
from boards import LATER_S, Board
from trees import Clock, Commands, answer, build, remove, write

from mbq_runtime.sensing import Sensors, Signal

BOARDS = {
    name.lower().replace("_", "-"): board
    for module in (boards_arm, boards_pc)
    for name, board in vars(module).items()
    if isinstance(board, Board)
}


class Machine:
    """The sensors of a board, its files, and the clock they go by."""

    def __init__(self, board: Board, root: Path) -> None:
        self.board = board
        self.root = build(root, board.files)
        self.broken: set[str] = set()
        self.start()

    def start(self) -> None:
        """Begin anew, with the counters of the start."""
        self._write({path: self.board.files[path] for path in self.board.later})
        self.clock = Clock()
        self.commands = Commands(self.board.commands)
        self.sensors = Sensors(self.root, self.clock, self.commands, self.board.mailbox)

    def smash(self, path: str, fault: Callable[[Path, str], object]) -> None:
        fault(self.root, path)
        self.broken.add(path)

    def mend(self) -> None:
        for path in self.broken:
            file = self.root / path.lstrip("/")
            if file.is_fifo():
                answer(self.root, path)
            if os.path.lexists(file):
                remove(self.root, path)
            write(self.root, path, self.board.files[path])
        self.broken.clear()

    def settled(self) -> list[Signal]:
        return settled(self.sensors)

    def until(self, true: Callable[[Sequence[Signal]], bool]) -> list[Signal]:
        return until(self.sensors, true)

    def go_on(self) -> None:
        """Let time pass, and the counters grow."""
        self._write(self.board.later)
        self.clock.now_s += LATER_S

    def _write(self, files: Mapping[str, str]) -> None:
        for path, content in files.items():
            if path not in self.broken:
                write(self.root, path, content)


def settled(sensors: Sensors) -> list[Signal]:
    """The signals once every sensor has answered: on a busy machine that can take a second call."""
    return until(sensors, lambda signals: not any(waits(one) for one in signals))


def until(sensors: Sensors, true: Callable[[Sequence[Signal]], bool]) -> list[Signal]:
    end_s = time.monotonic() + 30
    while not true(signals := sensors.signals()):
        assert time.monotonic() < end_s, [one for one in signals if one.value is None]
    return signals


def waits(one: Signal) -> bool:
    return one.problem is not None and ("not read yet" in one.problem or "no answer for" in one.problem)
