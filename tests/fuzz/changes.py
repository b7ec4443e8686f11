"""Changes of files that make them hostile or damaged.  A seeded generator draws every change."""

from __future__ import annotations

import copy
import json
import os
import random
from pathlib import Path
from typing import Any

HOSTILE_VALUES: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 2, 3, 7, 64, 1000, 10**9, 2**31, 2**63, 10**30, -(10**30), 0.0, -0.5, 1e-320, 1e308,
    float("nan"), float("inf"), "", "x", "-1", "9" * 400, "\x1b]0;x\x07", "\ud800", "../..", [], [1], [[]], [-1, "a"],
    {}, {"a": 1}, [0] * 1000, "longrope", "yarn", "llama3", "dynamic", "gelu",
)  # fmt: skip


def nodes(document: Any) -> list[tuple[Any, Any]]:
    """(container, key) of every value in a JSON document; few of each long list."""
    found: list[tuple[Any, Any]] = []
    if isinstance(document, dict | list):
        keys = list(document) if isinstance(document, dict) else list(range(len(document)))
        for key in keys[:40]:
            found.append((document, key))
            found += nodes(document[key])
    return found


def mutate_json(path: Path, draw: random.Random) -> None:
    """One to three values of a JSON file are removed or get a hostile value.

    Args:
        path: the file.
        draw: the generator.
    """
    document = json.loads(path.read_text(encoding="utf-8"))
    for _ in range(draw.randint(1, 3)):
        places = nodes(document)
        if not places:
            break
        container, key = draw.choice(places)
        if draw.random() < 0.15:
            del container[key]
        else:
            container[key] = copy.deepcopy(draw.choice(HOSTILE_VALUES))
    path.write_text(json.dumps(document), encoding="utf-8")


def damage(path: Path, draw: random.Random, first_bytes: int) -> None:
    """Cut a file off, or change some bytes of its beginning.

    Args:
        path: the file.
        draw: the generator.
        first_bytes: changes fall into this many bytes.
    """
    data = bytearray(path.read_bytes())
    if draw.random() < 0.2:
        data = data[: draw.randrange(len(data))]
    else:
        for _ in range(draw.choice((1, 1, 2, 8, 64))):
            data[draw.randrange(min(first_bytes, len(data)))] = draw.randrange(256)
    path.write_bytes(data)


def mutate_safetensors(path: Path, draw: random.Random) -> None:
    """The header of a safetensors file gets a wrong value, and its right length.

    Args:
        path: the file.
        draw: the generator.
    """
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    container, key = draw.choice(nodes(header))
    container[key] = copy.deepcopy(draw.choice(HOSTILE_VALUES))
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def make_odd(path: Path, draw: random.Random) -> None:
    """A file is missing, empty, a folder, a pipe, or a link to a device.

    Args:
        path: the file.
        draw: the generator.
    """
    path.unlink()
    kind = draw.choice(("missing", "empty", "folder", "pipe", "device", "loop"))
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind in ("device", "loop"):
        path.symlink_to("/dev/zero" if kind == "device" else path)
