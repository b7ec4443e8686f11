"""Replay of recorded readings: what a policy would have done.  Its budget does not change the readings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from mbq_runtime.bundle.reading import parse_json, shown
from mbq_runtime.control.controller import start, step
from mbq_runtime.control.policy import Policy
from mbq_runtime.errors import UsageError
from mbq_runtime.sensing.readings import Readings
from mbq_runtime.text_file import read_text_file

from .closed_loop import PolicyRun, Sample

_MOST_BYTES = 256 << 20  # days of readings
_LARGEST = 1e15  # bytes of memory are the largest numbers
_FIELDS = {f.name for f in fields(Readings)}


def read_trace(path: Path) -> list[Readings]:
    """Read recorded readings.

    Args:
        path: JSON lines from ``mbq sense --json --watch`` or ``mbq run --events``, or lines of readings alone.

    Raises:
        UsageError: the file or a line cannot be used; the message names the line.
    """
    lines = read_text_file(path, _MOST_BYTES).splitlines()
    found = [_readings(line, f"{path} line {i}") for i, line in enumerate(lines, 1) if line.strip()]
    if len(found) < 2:
        raise UsageError(f"{path}: {len(found)} readings, needed 2 or more; record some with mbq sense --json --watch")
    return found


def _readings(line: str, where: str) -> Readings:
    try:
        document = parse_json(line.encode())
    except ValueError as error:
        raise UsageError(f"{where}: not JSON ({error})") from None
    values = document.get("readings", document) if isinstance(document, Mapping) else None
    if not isinstance(values, Mapping) or not isinstance(values.get("time_s"), int | float):
        raise UsageError(f'{where}: no readings with a "time_s"; needed lines from mbq sense --json --watch')
    kept: dict[str, Any] = {name: value for name, value in values.items() if name in _FIELDS}
    for name, value in kept.items():
        if not (value is None or (isinstance(value, bool | int | float) and abs(value) <= _LARGEST)):
            raise UsageError(f"{where}: {name} is {shown(value)}, needed a number, true, false or null")
    return Readings(**kept)


def replay(trace: Sequence[Readings], name: str, policy: Policy) -> PolicyRun:
    """The budgets of a policy over recorded readings.

    Args:
        trace: the readings, in the order of time.
        name: name of the run.
        policy: a policy that has bounds.
    """
    state, samples = start(policy), []
    for readings in trace:
        state, bits, reason = step(state, readings, readings.time_s, policy)
        limit_c, temp_c = readings.throttle_temp_c, readings.temp_c
        above = temp_c is not None and limit_c is not None and temp_c > limit_c
        at_s = readings.time_s - trace[0].time_s
        # Speed and power were measured at another budget, so they are left out.
        samples.append(Sample(at_s, bits, temp_c, above or bool(readings.heat_throttled), None, None, reason))
    return PolicyRun(name, samples)
