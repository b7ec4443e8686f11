"""Fields of JSON files that a test changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def set_in(path: Path, where: str, value: Any) -> None:
    """Set a field of a JSON file.

    Args:
        path: the file.
        where: names and numbers with dots between.
        value: what the field becomes; ``...`` removes the field.
    """
    document = json.loads(path.read_text())
    *parents, last = [int(name) if name.isdecimal() else name for name in where.split(".")]
    place = document
    for name in parents:
        place = place[name]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    path.write_text(json.dumps(document))
