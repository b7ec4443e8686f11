"""The sums of a long run, kept in a file: a run that ended early goes on after its last kept case."""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from this_commit import this_commit

EVERY = 20
"""Cases between two writes."""


@dataclass
class Sums:
    """What all kinds of input count.

    next_case: number of the first case that has not run; cases: number by commit of the project; processor_s: of all
    cases, and of the processes that they started; faults: what was wrong, with the case's number and what it said.
    """

    next_case: int = 0
    cases: Counter[str] = field(default_factory=Counter)
    processor_s: float = 0.0
    faults: list[str] = field(default_factory=list)

    def fault(self, text: str) -> None:
        """Add a fault, and show it at once."""
        self.faults.append(text)
        print(text, file=sys.stderr, flush=True)


S = TypeVar("S", bound=Sums)


def read(path: Path, kind: type[S]) -> S:
    """The sums in a file.

    Args:
        path: the file.
        kind: class of the sums.
    """
    document = json.loads(path.read_text(encoding="utf-8"))
    values: dict[str, Any] = {
        name: Counter(value) if isinstance(value, dict) else value for name, value in document.items()
    }
    return kind(**values)


def _write(path: Path, sums: Sums) -> None:
    draft = path.with_name(f"{path.name}.draft")
    draft.write_text(json.dumps(vars(sums), indent=1), encoding="utf-8")
    draft.replace(path)


def count(
    sums: Sums, numbers: range, one: Callable[[int], None], path: Path | None = None, longest_s: float = math.inf
) -> None:
    """Run cases, and keep the sums.

    Args:
        sums: what ``one`` adds to.
        numbers: of the cases; those before ``sums.next_case`` have run.
        one: runs the case of a number.
        path: the file that keeps the sums, or None.
        longest_s: no case starts after this time.
    """
    commit, end, before_s = this_commit(), time.monotonic() + longest_s, _processor_s()
    for number in numbers[max(0, sums.next_case - numbers.start) :]:
        if time.monotonic() > end:
            break
        one(number)
        sums.cases[commit] += 1
        sums.next_case = number + 1
        if path and (sums.next_case % EVERY == 0 or number == numbers[-1]):
            sums.processor_s, before_s = sums.processor_s + _processor_s() - before_s, _processor_s()
            _write(path, sums)
    sums.processor_s += _processor_s() - before_s


def _processor_s() -> float:
    return sum(os.times()[:4])


def resident_mb() -> float:
    """Memory of this process, which a fork begins with."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6


def main(about: str, kind: type[S], run: Callable[[range, int, S, Path | None, float], Any]) -> None:
    """Run cases as the command line says, and print the sums as JSON.

    Args:
        about: text of ``--help``.
        kind: class of the sums.
        run: takes the numbers of the cases, the seed, the sums, the file that keeps them, and the longest time.
    """
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--cases", type=int, default=500, help="number of cases")
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--seed", type=int, default=0, help="seed of all draws")
    parser.add_argument("--longest", type=float, default=math.inf, help="seconds after which no case starts")
    parser.add_argument(
        "--keep", type=Path, help="file of the sums; a run with the same file goes on after its last case"
    )
    options = parser.parse_args()
    sums = read(options.keep, kind) if options.keep and options.keep.exists() else kind()
    numbers = range(options.first, options.first + options.cases)
    run(numbers, options.seed, sums, options.keep, options.longest)
    print(json.dumps(vars(sums), indent=2))
