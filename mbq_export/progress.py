"""How long work tells how far it is, and how a terminal shows that."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import Any

import click

Report = Callable[[str, int, int], None]
"""Called with what is being done, the number of steps that are done, and the number of all steps."""

StageReport = Callable[[int, int], None]
"""A ``Report`` of one stage: called with the number of steps that are done, and the number of all steps."""


def no_report(what: str, done: int, total: int) -> None:
    """A ``Report`` that tells nobody.

    Args:
        what: the stage.
        done: steps that are done.
        total: all steps.
    """


def staged(report: Report, what: str) -> StageReport:
    """The report of one stage.

    Args:
        report: told about every stage.
        what: the stage, in words that say what is done, such as "writing weights".
    """
    return lambda done, total: report(what, done, total)


class StageTimes:
    """A ``Report`` that measures each stage.  A stage lasts until the next one begins.

    It is a context, at whose end the last stage ends.

    elapsed_s: by stage, seconds that passed.
    processor_s: by stage, seconds of processor time of this process and its children.
    """

    def __init__(self) -> None:
        self.elapsed_s: dict[str, float] = {}
        self.processor_s: dict[str, float] = {}
        self._stage: str | None = None
        self._began = _now()

    def __enter__(self) -> StageTimes:
        self._began = _now()
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def __call__(self, what: str, done: int, total: int) -> None:
        """Note that a stage goes on.

        Args:
            what: the stage.
            done: steps that are done.
            total: all steps.
        """
        if what != self._stage:
            self._close()
            self._stage = what

    def _close(self) -> None:
        began, self._began = self._began, _now()
        if self._stage is None:
            return
        for seconds, before, now in zip((self.elapsed_s, self.processor_s), began, self._began, strict=True):
            seconds[self._stage] = seconds.get(self._stage, 0.0) + now - before


def _now() -> tuple[float, float]:
    """Seconds that have passed, and seconds of processor time."""
    times = os.times()
    return time.monotonic(), sum(times[:4])


class Progress:
    """A ``Report`` on stderr: one bar per stage on a terminal, one line per stage elsewhere.

    Args:
        quiet: whether nothing is shown.
    """

    def __init__(self, quiet: bool) -> None:
        self._quiet = quiet
        self._stage = ""
        self._bar: Any = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def __call__(self, what: str, done: int, total: int) -> None:
        """Show how far a stage is.

        Args:
            what: the stage.
            done: steps that are done.
            total: all steps.
        """
        if self._quiet:
            return
        if not sys.stderr.isatty():
            if what != self._stage:
                click.echo(f"{what} ...", err=True)
            self._stage = what
            return
        if what != self._stage:
            from tqdm import tqdm

            self.__exit__()
            self._stage = what
            self._bar = tqdm(total=total, desc=what, file=sys.stderr, unit_scale=total > 1 << 20)
        self._bar.update(done - self._bar.n)
