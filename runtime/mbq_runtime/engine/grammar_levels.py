"""The levels of a grammar: how deep the compiler of llguidance goes into it.

The compiler follows each reference with a call of its own, on the stack of the thread.  A long chain of references
ends the process, so it is refused before.  The compiler itself bounds brackets within one rule, schema or expression.
"""

from __future__ import annotations

import json
import re
from bisect import bisect
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple
from urllib.parse import unquote

MOST_LEVELS = 600
"""Most levels of a grammar.  The compiler takes at least three times as many with a stack of 8 MB."""

_MOST_LOOKUPS = 10**6
_BASES, _ANCHORED = "bases", "anchored"  # parts of a graph: each leads to all of its kind
_ELSEWHERE = ("$defs", "definitions")  # read only where a reference leads there
_MAPS = (*_ELSEWHERE, "properties", "patternProperties", "dependentSchemas")  # their keys are names
# Each takes a time that grows with the text alone: what is not closed is taken too, and no name begins in another.
_TEXTS = re.compile(r'"(?:[^"\\\n]|\\.)*"?|//[^\n]*|#[^\n]*|/(?:[^/\\\n]|\\.)*/?')
_JSON = re.compile(r"%json\s*")
_RULE = re.compile(r"(?<!\w)([A-Za-z_]\w*)(?:\s*\[[^\[\]]*\])?\s*:")
_NAME = re.compile(r"[A-Za-z_]\w*")


class TooDeepError(ValueError):
    """A grammar has too many levels."""


_END: Hashable = object()


class Node(NamedTuple):
    """A part that others refer to.

    levels: of its own.
    leads: the parts that it refers to.
    """

    levels: int
    leads: Sequence[Hashable]


def check_levels(kind: str, text: str) -> None:
    """Refuse a grammar that is too deep for the compiler.

    Args:
        kind: "json_schema", "regex" or "lark".
        text: the grammar.

    Raises:
        TooDeepError: it has more than ``MOST_LEVELS`` levels.
        ValueError: it is not JSON.
    """
    measured: dict[str, Callable[[str], int]] = {"json_schema": _levels_of_json, "lark": levels_of_lark}
    if kind in measured and (levels := measured[kind](text)) > MOST_LEVELS:
        what = "$ref" if kind == "json_schema" else "rules"
        raise TooDeepError(
            f"a chain of {what} can be {levels} levels deep; needed {MOST_LEVELS} or fewer; shorten the chain"
        )


def levels_of_schema(schema: Any) -> int:
    """Levels of a JSON schema: those of its nested parts, and of the parts to which references lead.

    Args:
        schema: a JSON schema.

    >>> levels_of_schema({"items": {"$ref": "#/$defs/a"}, "$defs": {"a": {"type": "integer"}}})
    3
    """
    parts = [part for part in _containers(schema) if isinstance(part, dict)]
    bases = {id(part): part for part in [schema, *_with_text(parts, "$id", "id")]}
    anchored = {id(part): part for part in _with_text(parts, "$anchor", "$dynamicAnchor", "$recursiveAnchor")}
    places = {place for part in parts for place in _references(part)}
    if len(places) * len(bases) > _MOST_LOOKUPS:
        raise TooDeepError(f"{len(places)} references among {len(bases)} parts with $id; leave $id out")
    leads: dict[str, list[Any]] = {place: _found(bases.values(), place) for place in places}
    targets = bases | anchored | {id(part): part for found in leads.values() for part in found}
    graph: dict[Hashable, Node] = {at: _node(part, targets, leads) for at, part in targets.items()}
    graph |= {_BASES: Node(0, [*bases]), _ANCHORED: Node(0, [*anchored])}
    return longest(graph, id(schema))


def levels_of_lark(text: str) -> int:
    """Levels of a Lark grammar: brackets, and the rules to which names lead.

    Args:
        text: the grammar.

    >>> levels_of_lark('start: (a)\\na: "x" B\\nB: /b/')
    4
    """
    plain, schemas = _without_texts(text)
    places = [(found.start(), found.end(), found[1]) for found in _RULE.finditer(plain)]
    ends = [*(start for start, _, _ in places[1:]), len(plain)]
    names = {name for _, _, name in places}
    inside, starts = Counter[int](), [start for start, _, _ in places]
    for at, levels in schemas:
        rule = bisect(starts, at) - 1
        inside[rule] = max(inside[rule], levels)
    graph: dict[Hashable, Node] = {}
    for rule, ((_, begin, name), end) in enumerate(zip(places, ends, strict=True)):
        body = plain[begin:end]
        before = graph.get(name, Node(0, ()))  # a name may be defined twice
        leads = [found for found in dict.fromkeys(_NAME.findall(body)) if found in names]
        graph[name] = Node(max(before.levels, 1 + _brackets(body) + inside[rule]), [*before.leads, *leads])
    graph[None] = Node(0, [*names])
    return longest(graph, None)


def longest(graph: Mapping[Hashable, Node], start: Hashable) -> int:
    """A bound of the levels along any way through parts that meets each of them once.

    Parts that refer to one another in a circle all count.  So the time is linear.

    Args:
        graph: the parts, by name.
        start: name of the first.

    >>> longest({"a": Node(1, ["b"]), "b": Node(2, ["a", "c"]), "c": Node(4, [])}, "a")
    7
    """
    number: dict[Hashable, int] = {start: 0}
    low, total = dict(number), dict[Hashable, int]()
    waiting: list[Hashable] = [start]
    way: list[tuple[Hashable, Iterator[Hashable]]] = [(start, iter(graph[start].leads))]
    while way:
        part, leads = way[-1]
        if (found := next(leads, _END)) is not _END:
            if found not in number:
                number[found] = low[found] = len(number)
                waiting.append(found)
                way.append((found, iter(graph[found].leads)))
            elif found not in total:
                low[part] = min(low[part], number[found])
            continue
        way.pop()
        if way:
            low[way[-1][0]] = min(low[way[-1][0]], low[part])
        if low[part] == number[part]:
            circle = [waiting.pop()]
            while circle[-1] != part:
                circle.append(waiting.pop())
            behind = max((total.get(lead, 0) for one in circle for lead in graph[one].leads), default=0)
            total |= dict.fromkeys(circle, behind + sum(graph[one].levels for one in circle))
    return total[start]


def _levels_of_json(text: str) -> int:
    return levels_of_schema(_parsed(text.lstrip(), 0)[0])


def _parsed(text: str, at: int) -> tuple[Any, int]:
    """The JSON at a place, and where it ends."""
    try:
        # A number of many digits is not read: only the structure counts.
        decoder = json.JSONDecoder(parse_int=len, parse_float=len)
        return decoder.raw_decode(text, at)
    except RecursionError:
        raise TooDeepError("the JSON has too many levels; nest less") from None


def _containers(value: Any) -> Iterator[Any]:
    """All objects and lists."""
    waiting = [value]
    while waiting:
        part = waiting.pop()
        if isinstance(part, dict | list):
            yield part
            waiting += part.values() if isinstance(part, dict) else part


def _with_text(parts: Iterable[Mapping[str, Any]], *keys: str) -> Iterator[Mapping[str, Any]]:
    return (part for part in parts if any(isinstance(part.get(key), str | bool) for key in keys))


def _references(part: Mapping[str, Any]) -> Iterator[str]:
    for key in ("$ref", "$dynamicRef", "$recursiveRef"):
        if isinstance(part.get(key), str):
            yield part[key]


def _found(bases: Iterable[Any], place: str) -> list[Any]:
    """The parts to which a reference with a path may lead: it begins at a part with an $id, or at the root."""
    _, _, path = place.partition("#")
    return [found for base in bases if path.startswith("/") and (found := _at(base, path)) is not None]


def _at(part: Any, path: str) -> Any:
    """The object or list at a path; None where there is none."""
    for name in path.split("/")[1:]:
        name = unquote(name).replace("~1", "/").replace("~0", "~")
        if isinstance(part, list):
            part = part[int(name)] if re.fullmatch("[0-9]{1,9}", name) and int(name) < len(part) else None
        else:
            part = part.get(name) if isinstance(part, dict) else None
    return part if isinstance(part, dict | list) else None


def _hub(place: str) -> str:
    """All parts to which a reference without a path may lead."""
    path = place.partition("#")[2]
    return _ANCHORED if path and not path.startswith("/") else _BASES


def _node(part: Any, targets: Mapping[int, Any], places: Mapping[str, Sequence[Any]]) -> Node:
    """The levels of a part without its targets, which count for themselves."""
    levels, leads = 0, dict[Hashable, None]()
    waiting = [(part, 1, False)]
    while waiting:
        found, level, is_map = waiting.pop()
        if not isinstance(found, dict | list):
            continue
        if found is not part and id(found) in targets:
            leads[id(found)] = None
            continue
        levels = max(levels, level)
        if isinstance(found, list):
            waiting += ((one, level + 1, False) for one in found)
            continue
        if not is_map:
            for place in _references(found):
                leads |= dict.fromkeys((id(target) for target in places[place]) if places[place] else (_hub(place),))
        for key, value in found.items():
            if is_map or key not in _ELSEWHERE:
                waiting.append((value, level + 1, not is_map and key in _MAPS))
    return Node(levels, [*leads])


def _without_texts(text: str) -> tuple[str, list[tuple[int, int]]]:
    """A Lark grammar with spaces in place of its texts and schemas, and (place, levels) of each schema."""
    parts, schemas, at = list[str](), list[tuple[int, int]](), 0
    marks = re.compile(f"{_TEXTS.pattern}|{_JSON.pattern}")
    while found := marks.search(text, at):
        end = found.end()
        if found[0].startswith("%json"):
            schema, end = _parsed(text, end)
            schemas.append((found.start(), levels_of_schema(schema)))
        parts += [text[at : found.start()], " " * (end - found.start())]
        at = end
    return "".join([*parts, text[at:]]), schemas


def _brackets(body: str) -> int:
    """Levels of the brackets in a text."""
    level = most = 0
    for sign in re.findall(r"[()\[\]{}]", body):
        level += 1 if sign in "([{" else -1
        most = max(most, level)
    return most
