"""Random JSON schemas whose values are short: nested objects, arrays, enums, unions, recursion and bounds."""

from __future__ import annotations

import random
from typing import Any

Schema = dict[str, Any]


def schema(seed: int) -> Schema:
    """An object's schema.

    Args:
        seed: the same gives the same schema.
    """
    rng = random.Random(seed)
    found = _object(rng, 2)
    if seed % 5 == 0:  # a list of things that may have one more of their kind
        node = {"type": "object", "properties": {"v": _leaf(rng), "next": {"anyOf": [{"$ref": "#/$defs/node"}, _NULL]}}}
        found["$defs"] = {"node": {**node, "required": ["v", "next"], "additionalProperties": False}}
        found["properties"]["list"] = {"$ref": "#/$defs/node"}
        found["required"].append("list")
    return found


_NULL: Schema = {"type": "null"}


def _leaf(rng: random.Random) -> Schema:
    low = rng.randint(-50, 50)
    return rng.choice(
        [
            {"type": "integer", "minimum": low, "maximum": low + rng.randint(0, 99)},
            {"type": "boolean"},
            {"type": "string", "maxLength": rng.randint(1, 4)},
            {"type": "string", "pattern": "^[A-F]{1,3}$"},
            {"enum": rng.sample(["sea", "boat", 3, None, True], rng.randint(1, 4))},
            {"const": rng.choice(["x", 7, False])},
            _NULL,
        ]
    )


def _object(rng: random.Random, depth: int) -> Schema:
    names = rng.sample(["a", "b", "c", "d"], rng.randint(1, 2))
    needed = rng.sample(names, rng.randint(1, len(names)))
    properties = {name: _any(rng, depth - 1) for name in names}
    return {"type": "object", "properties": properties, "required": needed, "additionalProperties": False}


def _any(rng: random.Random, depth: int) -> Schema:
    kind = rng.choice(["leaf", "leaf", "object", "array", "union"]) if depth else "leaf"
    if kind == "object":
        return _object(rng, depth)
    if kind == "array":
        return {"type": "array", "items": _any(rng, depth - 1), "minItems": rng.randint(0, 1), "maxItems": 2}
    if kind == "union":
        return {"anyOf": [_any(rng, depth - 1) for _ in range(2)]}
    return _leaf(rng)
