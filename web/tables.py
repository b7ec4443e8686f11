"""The policies and triggers of ``mbq_runtime.control`` as a table for the page: numbers have one home.

    python web/tables.py > web/src/control/tables.json

Infinite numbers are the words "inf" and "-inf".
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import fields

from mbq_runtime.control import POLICIES, TRIGGERS, Trigger
from mbq_runtime.control.triggers import DEVICE_STATES


def tables() -> str:
    """The table as JSON text."""
    numbers = [field.name for field in fields(Trigger) if field.type in ("float", "bool")]
    triggers = {
        name: {number: _plain(getattr(trigger, number)) for number in numbers} for name, trigger in TRIGGERS.items()
    }
    bands = {policy.name: policy.bands for policy in POLICIES.values()}
    sections = (f' "bands": {_rows(bands)}', f' "triggers": {_rows(triggers)}')
    return "{\n" + ",\n".join((*sections, f' "device_states": {json.dumps(DEVICE_STATES)}')) + "\n}\n"


def _rows(table: Mapping[str, object]) -> str:
    """One line for each row."""
    lines = ",\n".join(f'  "{name}": {json.dumps(row)}' for name, row in table.items())
    return "{\n" + lines + "\n }"


def _plain(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


if __name__ == "__main__":
    print(tables(), end="")  # noqa: T201
