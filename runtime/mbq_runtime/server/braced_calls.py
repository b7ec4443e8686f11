"""Calls as Gemma writes them: call:name{key:value}, where a mark stands before and after each text."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from .tool_format import Call, ToolFormat, Tools, Wanted, made_call, parameters
from .value_rules import Notation, ValueRules

_HEAD = re.compile(r"\s*call:\s*([^\s{}:]+)\s*")
_PLAIN = re.compile(r"[^,\[\]{}]+")
_WORDS = {"true": True, "false": False, "null": None, "True": True, "False": False, "None": None}


def reader(quote: str) -> Callable[[str, Tools], list[Call]]:
    """A function that reads one call.

    Args:
        quote: the mark around a text.
    """

    def read(body: str, _: Tools) -> list[Call]:
        head = _HEAD.match(body)
        if head is None:
            raise ValueError("no call")
        values = _Values(body, head.end(), quote)
        arguments = values.members()
        values.end()
        return [made_call(head[1], arguments)]

    return read


class _Values:
    """Reads values from a text.  Raises ValueError where there are none."""

    def __init__(self, text: str, at: int, quote: str) -> None:
        self._text, self._at, self._quote = text, at, quote

    def end(self) -> None:
        """The end of the text."""
        if self._text[self._at :].strip():
            raise ValueError("there is more")

    def members(self) -> dict[str, Any]:
        """The members of an object."""
        found: dict[str, Any] = {}
        self._need("{")
        if self._take("}"):
            return found
        while True:
            key = self._quoted()
            if key is None:
                key, colon, _ = self._text[self._at :].partition(":")
                if not colon:
                    raise ValueError("no key")
                self._at += len(key)
            self._need(":")
            found[key.strip()] = self._value()
            if not self._take(","):
                self._need("}")
                return found

    def _value(self) -> Any:
        text = self._quoted()
        if text is not None:
            return text
        if self._text.startswith("{", self._at):
            return self.members()
        if self._take("["):
            found: list[Any] = []
            while not self._take("]"):
                if found:
                    self._need(",")
                found.append(self._value())
            return found
        plain = _PLAIN.match(self._text, self._at)
        if plain is None:
            raise ValueError("no value")
        self._at, word = plain.end(), plain[0].strip()
        return _WORDS[word] if word in _WORDS else json.loads(word)

    def _quoted(self) -> str | None:
        """A text between marks, or as in JSON; None where there is none."""
        self._take("")
        if self._text.startswith('"', self._at):
            text, self._at = json.JSONDecoder().raw_decode(self._text, self._at)
            return str(text)
        if not self._text.startswith(self._quote, self._at):
            return None
        begin = self._at + len(self._quote)
        end = self._text.index(self._quote, begin)
        self._at = end + len(self._quote)
        return self._text[begin:end]

    def _take(self, mark: str) -> bool:
        """Whether a mark comes, after spaces."""
        while self._text[self._at : self._at + 1].isspace():
            self._at += 1
        found = self._text.startswith(mark, self._at)
        self._at += len(mark) if found else 0
        return found

    def _need(self, mark: str) -> None:
        if not self._take(mark):
            raise ValueError(f"no {mark}")


def braced_rule(tool_format: ToolFormat, wanted: Wanted) -> str:
    """A name, and the arguments in braces, in the order in which templates write them.

    Args:
        tool_format: how the model writes them, and the tools.
        wanted: what the grammar is for.
    """
    notation = Notation(("true", "false", "null"), tool_format.quote, ":", ",", sorts=True)
    calls = []
    for name, tool in tool_format.tools.items():
        schema = parameters(tool)
        members = ValueRules(schema, notation, wanted).members(schema, notation.key)
        calls.append(f'{json.dumps(f"call:{name}{{")} {members} "}}"')
    return f"({' | '.join(calls)})"
