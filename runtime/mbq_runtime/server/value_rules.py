"""Grammars of values that a model does not write as JSON: objects with bare keys, or literals of Python."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, TypeVar

from mbq_runtime.errors import GrammarError

from .tool_format import ToolFormat, Wanted, only_values, parameters

V = TypeVar("V")

_KNOWN = frozenset((
    "$defs", "$id", "$ref", "$schema", "additionalProperties", "anyOf", "const", "default", "definitions", "deprecated",
    "description", "enum", "examples", "exclusiveMaximum", "exclusiveMinimum", "items", "maxItems", "maxLength",
    "maximum", "minItems", "minLength", "minimum", "multipleOf", "nullable", "oneOf", "pattern", "properties",
    "readOnly", "required", "title", "type", "writeOnly",
))  # fmt: skip


class Notation(NamedTuple):
    """How values are written.

    words: of true, false and null.
    quote: text around a text; "": a text is written as in JSON.
    colon: text between a key and its value.
    comma: text between two values.
    sorts: whether the members of an object come in the order of their names.
    """

    words: tuple[str, str, str]
    quote: str
    colon: str
    comma: str
    sorts: bool

    def key(self, name: str) -> str:
        """A key and its colon.

        Args:
            name: the key.
        """
        return (name if self.quote else json.dumps(name)) + self.colon


class ValueRules:
    """The rules of the values of one schema.

    root: the schema, in which references are looked up.
    notation: how values are written.
    wanted: what the grammar is for; it gets the rules.
    """

    def __init__(self, root: Mapping[str, Any], notation: Notation, wanted: Wanted) -> None:
        self._root, self._notation, self._wanted = root, notation, wanted
        self._comma = json.dumps(notation.comma)
        self._places: dict[str, str] = {}
        self._any_rule = ""

    def members(self, schema: Mapping[str, Any], key: Callable[[str], str]) -> str:
        """The members of an object, without what is around them.

        Args:
            schema: of the object.
            key: writes the name of a member, and what is between it and its value.
        """
        found, more = schema.get("properties"), schema.get("additionalProperties", True)
        if not isinstance(found, dict):
            return "" if more is False else self._any_members(self.value(more))
        needed = schema.get("required")
        needed = needed if isinstance(needed, list) else self._odd(schema, "required", [])
        names = sorted(found, key=str.lower) if self._notation.sorts else [*found]
        parts = [(self._wanted.define(f"{json.dumps(key(name))} {self.value(found[name])}"), name in needed)
                 for name in names]  # fmt: skip
        ways: list[str] = []
        for at, (part, must) in enumerate(parts):  # those that begin with this member
            rest = (f" {self._comma} {one}" if m else f" ({self._comma} {one})?" for one, m in parts[at + 1 :])
            ways.append(part + "".join(rest))
            if must:
                return _either(ways)
        return f"{_either(ways)}?" if ways else ""

    def value(self, schema: Any) -> str:
        """A value.

        Args:
            schema: of the value.

        Raises:
            GrammarError: the schema has what this grammar does not know, and all of it must hold.
        """
        if not isinstance(schema, dict):
            return self._any()
        if isinstance(schema.get("$ref"), str):
            return self._referred(schema["$ref"])
        odd = sorted(schema.keys() - _KNOWN)
        if odd and self._wanted.exact:
            raise GrammarError(f"json_schema: at {odd[0]}: not known for the calls of this model; leave it out")
        if values := only_values(schema):
            return _either(map(self._literal, values))
        for ways in (schema.get("anyOf"), schema.get("oneOf")):
            if isinstance(ways, list) and ways:
                return _either(map(self.value, ways))
        kind = schema.get("type", "object" if "properties" in schema else None)
        if isinstance(kind, list) and kind:
            return _either(self.value({**schema, "type": one}) for one in kind)
        yes, no, nothing = map(json.dumps, self._notation.words)
        if kind == "string":
            return self._text(schema)
        if kind == "object":
            return f'"{{" {self.members(schema, self._notation.key)} "}}"'
        if kind == "array":
            return self._array(schema)
        if kind in ("integer", "number"):
            return self._wanted.json(schema)
        return {"boolean": f"({yes} | {no})", "null": nothing}.get(str(kind)) or self._any()

    def _referred(self, place: str) -> str:
        """The rule of what a reference leads to.  It may contain the reference."""
        if place not in self._places:
            found: Any = self._root
            for name in place.removeprefix("#").split("/")[1:]:
                found = found.get(name) if isinstance(found, dict) else None
            if not place.startswith("#") or found is None:
                if self._wanted.exact:
                    raise GrammarError(f"json_schema: at $ref: {place[:80]!r} does not exist")
                return self._any()
            name, fill = self._wanted.reserve()
            self._places[place] = name
            fill(self.value(found))
        return self._places[place]

    def _literal(self, value: Any) -> str:
        if isinstance(value, str):
            return self._quoted(json.dumps(value)) if self._notation.quote else json.dumps(json.dumps(value))
        if value is None or isinstance(value, bool):
            return json.dumps(self._notation.words[(True, False, None).index(value)])
        if isinstance(value, list):
            return f'"[" {f" {self._comma} ".join(map(self._literal, value))} "]"'
        if isinstance(value, dict):
            members = (f"{json.dumps(self._notation.key(key))} {self._literal(part)}" for key, part in value.items())
            return f'"{{" {f" {self._comma} ".join(members)} "}}"'
        return json.dumps(json.dumps(value))

    def _text(self, schema: Mapping[str, Any]) -> str:
        if not self._notation.quote:
            return self._wanted.json({**schema, "type": "string"})
        pattern, (low, high) = schema.get("pattern"), self._sizes(schema, "minLength", "maxLength")
        if isinstance(pattern, str) and self._wanted.exact:
            if low or high is not None:
                raise GrammarError("json_schema: pattern beside minLength or maxLength is not known for this model")
            return self._quoted(_regex(pattern))
        if not low and high is None:
            return self._quoted("TEXT")
        return self._quoted(f"/(.|\\n){{{low},{'' if high is None else high}}}/")

    def _quoted(self, body: str) -> str:
        quote = self._wanted.literal(self._notation.quote)
        if quote.startswith("<"):  # a special token is no text
            return f"{quote} {body} {quote}"
        if body.startswith('"'):
            return f"{quote} {body} {quote}"
        return f"{quote} {self._wanted.define(f'{body} {quote}', lazy=True)}"

    def _array(self, schema: Mapping[str, Any]) -> str:
        low, high = self._sizes(schema, "minItems", "maxItems")
        item = self._wanted.define(self.value(schema.get("items", True)))
        if high == 0:
            return '"[]"'
        most = "" if high is None else high - 1
        items = f"{item} ({self._comma} {item}){{{max(low - 1, 0)},{most}}}"
        return f'"[" {items if low else f"({items})?"} "]"'

    def _sizes(self, schema: Mapping[str, Any], low: str, high: str) -> tuple[int, int | None]:
        """The least and the most of something, from two fields of a schema."""
        least, most = (self._size(schema, name) for name in (low, high))
        return least or 0, most

    def _size(self, schema: Mapping[str, Any], name: str) -> int | None:
        size = schema.get(name)
        if isinstance(size, float) and size.is_integer():
            size = int(size)
        known = isinstance(size, int) and not isinstance(size, bool) and size >= 0
        return size if known else self._odd(schema, name, None)

    def _odd(self, schema: Mapping[str, Any], name: str, otherwise: V) -> V:
        """What stands for a field that has a value of another kind than JSON Schema gives it, or is not there."""
        if schema.get(name) is not None and self._wanted.exact:
            raise GrammarError(f"json_schema: at {name}: not a value of this field; leave it out")
        return otherwise

    def _any(self) -> str:
        """Any value."""
        if not self._any_rule:
            self._any_rule, fill = self._wanted.reserve()
            one, number = self._any_rule, self._wanted.json({"type": "number"})
            ways = (self._text({}), number, *map(json.dumps, self._notation.words),
                    f'"[" ({one} ({self._comma} {one})*)? "]"', f'"{{" {self._any_members(one)} "}}"')  # fmt: skip
            fill(_either(ways))
        return self._any_rule

    def _any_members(self, value: str) -> str:
        name = "/[A-Za-z_][A-Za-z0-9_.-]*/" if self._notation.quote else self._wanted.json({"type": "string"})
        member = self._wanted.define(f"{name} {json.dumps(self._notation.colon)} {value}")
        return f"({member} ({self._comma} {member})*)?"


def _either(ways: Iterable[str]) -> str:
    return f"({' | '.join(ways)})"


def _regex(pattern: str) -> str:
    """A pattern of a schema, which may match any part of a text, as one of the whole text."""
    begin = "" if pattern.startswith("^") else "(.|\\n)*"
    end = "" if pattern.endswith("$") else "(.|\\n)*"
    inner = pattern.removeprefix("^").removesuffix("$").replace("\\/", "/").replace("/", "\\/")
    return f"/{begin}({inner}){end}/"


def python_rule(tool_format: ToolFormat, wanted: Wanted) -> str:
    """Calls as a list in Python: [name(key="value", other=3)].

    Args:
        tool_format: how the model writes them, and the tools.
        wanted: what the grammar is for.
    """
    notation, calls = Notation(("True", "False", "None"), "", ": ", ", ", sorts=False), []
    for name, tool in tool_format.tools.items():
        schema = parameters(tool)
        members = ValueRules(schema, notation, wanted).members(schema, "{}=".format)
        calls.append(f'{json.dumps(f"{name}(")} {members} ")"')
    call = wanted.define(_either(calls))
    return f'"[" {call} (", " {call})* "]"' if wanted.several else f'"[" {call} "]"'
