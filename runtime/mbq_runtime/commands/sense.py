"""``mbq sense``"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict

import click

from mbq_runtime import tables
from mbq_runtime.sensing import Kind, Readings, Sensors, Signal, aggregate, power

from .common import json_option

# A rate needs two looks, and a slow sensor needs time to answer.
_BETWEEN_LOOKS_S = 1.0
_HEADER = ("what", "name", "value", "limit", "age", "from")


@click.command("sense")
@json_option
@click.option("--watch", is_flag=True, help="Look again every second until interrupted.")
def command(as_json: bool, watch: bool) -> None:
    """Show this machine's heat, clocks, power, battery and load.

    First every signal with the file that it comes from, then signals that are unknown or missing and why, then the
    readings that are made of them.  With --json --watch: one object a line.
    """
    sensors = Sensors()
    sensors.signals()
    while True:
        time.sleep(_BETWEEN_LOOKS_S)
        signals = sensors.signals()
        readings = aggregate(signals, time.monotonic())
        if as_json:
            click.echo(json.dumps({"signals": [_facts(one) for one in signals], "readings": asdict(readings)}))
        else:
            if watch:
                click.clear()
            click.echo("\n".join(_page(signals, readings)))
        if not watch:
            return


def _facts(signal: Signal) -> dict[str, object]:
    return {**asdict(signal), "unit": signal.unit}


def _page(signals: list[Signal], readings: Readings) -> Iterable[str]:
    yield tables.aligned(_HEADER, [_row(one) for one in signals if one.value is not None], words=_HEADER)
    for title, missing in (("unknown", False), ("not on this machine", True)):
        rows = [(one.name if missing else f"{one.kind}: {one.name}", f"{one.source}: {one.problem}")
                for one in signals if one.value is None and (one.kind is Kind.MISSING) is missing]  # fmt: skip
        yield from _section(title, rows)
    values = asdict(readings)
    watts_from = power(signals)[1]
    rows = [(name, f"{_number(value)}{f'  ({watts_from})' if name == 'power_w' else ''}")
            for name, value in values.items() if name not in ("time_s", "tokens_per_s")]  # fmt: skip
    yield from _section("readings", rows)


def _section(title: str, rows: list[tuple[str, str]]) -> Iterable[str]:
    if rows:
        yield f"\n{title}"
        yield tables.pairs(rows, indent="  ")


def _row(one: Signal) -> tuple[str, ...]:
    limits = " / ".join(_quantity(limit, one.unit) for limit in (one.limit, one.hard_limit) if limit is not None)
    source = f"{one.source}  ({one.note})" if one.note else one.source
    return one.kind, one.name, _quantity(one.value or 0.0, one.unit), limits, f"{one.age_s:.1f} s", source


# Units that are not simply written after the number.
_SHOWN: dict[str, Callable[[float], str]] = {
    "share": lambda value: f"{100 * value:.1f} %",
    "flag": lambda value: "yes" if value else "no",
    "bits": lambda value: f"{int(value):#x}",
    "bytes": lambda value: f"{value / 1e6:.0f} MB",
}


def _quantity(value: float, unit: str) -> str:
    return _SHOWN[unit](value) if unit in _SHOWN else f"{_number(value)} {unit}"


def _number(value: float | None) -> str:
    if value is None:
        return "unknown"
    return str(value).lower() if isinstance(value, bool) else f"{value:.4g}" if value < 1e6 else f"{value:.0f}"
