"""Builds frozen dataclasses from JSON.  Errors name the field."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast, get_args, get_origin, get_type_hints

from ..errors import BundleError

T = TypeVar("T")

_WORDS = {int: "a whole number", float: "a finite number", str: "text", Mapping: "an object", tuple: "a list"}


def decode(cls: type[T], document: object, path: Path | str) -> T:
    """Build a dataclass from parsed JSON.

    Unknown keys are ignored: a later minor version may add some.

    Args:
        cls: dataclass whose fields are int, float, str, Any, ``tuple[X, ...]``, ``Mapping[str, X]`` or dataclasses of
            these.
        document: what a JSON reader returned.
        path: file of the document or its address, for messages.

    Raises:
        BundleError: a field is missing or of another type.
    """
    return cast(T, _value(cls, document, "", path))


_hints = cache(get_type_hints)


def _value(kind: Any, value: object, field: str, path: Path | str) -> object:
    if kind is Any:
        return value
    if is_dataclass(kind):
        return _record(cast(type, kind), _expect(Mapping, value, field, path), field, path)
    origin = get_origin(kind)
    if origin is tuple:
        item, values = get_args(kind)[0], _expect(tuple, value, field, path)
        # A hostile list has a million numbers: each costs microseconds where it could be wrong.
        if item in (int, str) and set(map(type, values)) <= {item}:
            return tuple(values)
        return tuple(_value(item, v, f"{field}[{i}]", path) for i, v in enumerate(values))
    if origin is Mapping:
        item = get_args(kind)[1]
        return {k: _value(item, v, f"{field}.{k}", path) for k, v in _expect(Mapping, value, field, path).items()}
    return _expect(kind, value, field, path)


def _record(cls: type, value: Mapping[str, object], field: str, path: Path | str) -> object:
    hints = _hints(cls)
    found: dict[str, object] = {}
    for item in fields(cls):
        name = f"{field}.{item.name}" if field else item.name
        if item.name in value:
            found[item.name] = _value(hints[item.name], value[item.name], name, path)
        elif item.default is MISSING and item.default_factory is MISSING:
            raise BundleError(f"{path}: {name} is missing; export the bundle again")
    return cls(**found)


def _expect(kind: Any, value: object, field: str, path: Path | str) -> Any:
    accepted: dict[Any, tuple[type, ...]] = {tuple: (list,), Mapping: (dict,), float: (int, float)}
    fits = isinstance(value, accepted.get(kind, (kind,))) and not isinstance(value, bool)
    if not fits or (kind is float and not math.isfinite(cast(float, value))):
        shown = repr(value) if len(repr(value)) <= 60 else f"a {type(value).__name__}"
        raise BundleError(
            f"{path}: {field or 'the document'} is {shown}, needed {_WORDS[kind]}; export the bundle again"
        )
    return float(cast(float, value)) if kind is float else value
