"""How calls are written: the format of a family of models, and grammars in the Lark of llguidance."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple
from uuid import uuid4

Tools = Mapping[str, Mapping[str, Any]]
"""Tools in the format of OpenAI, by name."""

TEXT_RULES = """TEXT: /(.|\\n)*/
text_value[lazy]: TEXT "\\n</parameter>\\n"
"""
"""Rules that others use."""

_SPACES = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class Wanted:
    """What a grammar is for, and the rules that it has besides.

    exact: whether all of a schema must hold; else what is not known in it is left out.
    several: whether there may be several calls.
    literal: writes a text, or the special token that it is.
    """

    def __init__(self, *, exact: bool, several: bool, literal: Callable[[str], str]) -> None:
        self.exact, self.several, self.literal = exact, several, literal
        self.rules: list[str] = []

    def define(self, body: str, *, lazy: bool = False) -> str:
        """Add a rule.

        Args:
            body: what it stands for.
            lazy: whether its text ends as soon as it can.

        Returns:
            Its name.
        """
        name, fill = self.reserve(lazy=lazy)
        fill(body)
        return name

    def reserve(self, *, lazy: bool = False) -> tuple[str, Callable[[str], None]]:
        """Add a rule that may contain itself.

        Args:
            lazy: whether its text ends as soon as it can.

        Returns:
            Its name, and a function that takes what it stands for.
        """
        at = len(self.rules)
        self.rules.append("")
        name = f"rule_{at}"

        def fill(body: str) -> None:
            self.rules[at] = f"{name}{'[lazy]' if lazy else ''}: {body}"

        return name, fill

    def json(self, schema: Mapping[str, Any]) -> str:
        """JSON of a schema.

        Args:
            schema: the schema.
        """
        options = _SPACES if self.exact else {**_SPACES, "lenient": True}
        return f"%json {json.dumps({**schema, 'x-guidance': options})}"


def named(tools: Sequence[Mapping[str, Any]]) -> Tools:
    """Tools by their names.

    Args:
        tools: in the format of OpenAI.
    """
    return {tool["function"]["name"]: tool for tool in tools}


def parameters(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    """The schema of a tool's arguments.

    Args:
        tool: in the format of OpenAI; an empty one has any arguments.
    """
    found: Mapping[str, Any] = tool.get("function", {}).get("parameters") or {"type": "object"}
    return found


def properties(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """The schemas of the members of an object, each where its ``$ref`` leads; none where there are no properties.

    Args:
        schema: of an object.
    """
    found = schema.get("properties")
    return {key: _followed(value, schema) for key, value in found.items()} if isinstance(found, dict) else {}


def _followed(schema: Any, root: Any, steps: int = 8) -> Any:
    """The schema that a ``$ref`` leads to, where it is in the same root."""
    place = schema.get("$ref") if isinstance(schema, dict) else None
    if not isinstance(place, str) or not place.startswith("#/") or not steps:
        return schema
    found = root
    for name in place[2:].split("/"):
        found = found.get(name) if isinstance(found, dict) else None
    return schema if found is None else _followed(found, root, steps - 1)


def only_values(schema: Mapping[str, Any]) -> list[Any]:
    """The only values of a schema; none where it has others.

    Args:
        schema: of a value.
    """
    found = schema.get("enum", [schema["const"]] if "const" in schema else [])
    return found if isinstance(found, list) else []


def is_text(schema: Any) -> bool:
    """Whether values of a schema are text.

    Args:
        schema: of a value.
    """
    if not isinstance(schema, dict):
        return False
    values = only_values(schema)
    return schema.get("type") == "string" or (bool(values) and all(isinstance(value, str) for value in values))


def json_rule(tool_format: ToolFormat, wanted: Wanted) -> str:
    """A call, or a list of calls, as JSON with name and arguments.

    Args:
        tool_format: how the model writes them, and the tools.
        wanted: what the grammar is for.
    """
    calls, arguments = [], {}
    for at, (name, tool) in enumerate(tool_format.tools.items()):
        place = f"#/$defs/{at}"
        arguments[str(at)] = _moved(parameters(tool), place)
        properties = {"name": {"const": name}, tool_format.arguments: {"$ref": place}}
        calls.append(
            {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}
        )
    schema: dict[str, Any] = {"anyOf": calls}
    if tool_format.listed:
        schema = {"type": "array", "items": schema, "minItems": 1, **({} if wanted.several else {"maxItems": 1})}
    return wanted.json(schema | {"$defs": arguments})


def named_rule(tool_format: ToolFormat, wanted: Wanted) -> str:
    """A name, a mark, and the arguments as JSON.

    Args:
        tool_format: how the model writes them, and the tools.
        wanted: what the grammar is for.
    """
    mark = wanted.literal(tool_format.inner)
    calls = " | ".join(
        f"{json.dumps(name)} {mark} {wanted.json(parameters(tool))}" for name, tool in tool_format.tools.items()
    )
    more = f" ({wanted.literal(tool_format.opens)} ({calls}))*" if wanted.several else ""
    return f"({calls}){more}"


def tagged_rule(tool_format: ToolFormat, wanted: Wanted) -> str:
    """A tag with the name, and in it one for each argument.  Text stands as it is, other values as JSON.

    Args:
        tool_format: how the model writes them, and the tools.
        wanted: what the grammar is for.
    """
    calls = []
    for name, tool in tool_format.tools.items():
        schema = parameters(tool)
        needed, shared = schema.get("required") or [], {"$defs": schema.get("$defs", {})}
        parts = [json.dumps(f"<function={name}>\n")]
        for key, value in properties(schema).items():
            part = " ".join((json.dumps(f"<parameter={key}>\n"), _value_rule(value, shared, wanted)))
            parts.append(part if isinstance(needed, list) and key in needed else f"({part})?")
        calls.append(" ".join([*parts, '"</function>"']))
    return f"({' | '.join(calls)})"


def _value_rule(schema: Any, shared: Mapping[str, Any], wanted: Wanted) -> str:
    """A value in a tag, and the end of the tag."""
    end = json.dumps("\n</parameter>\n")
    if not is_text(schema):
        value = wanted.json({**shared, **schema} if isinstance(schema, dict) else shared)
        return f"{value} {end}"
    values = only_values(schema)
    return f"({' | '.join(map(json.dumps, values))}) {end}" if values else "text_value"


def _moved(schema: Any, place: str) -> Any:
    """A schema that is no longer the root: what it refers to in itself is found at its new place."""
    if isinstance(schema, list):
        return [_moved(part, place) for part in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: f"{place}{part[1:]}" if key == "$ref" and isinstance(part, str) and part.startswith("#") else
        _moved(part, place)
        for key, part in schema.items()
    }  # fmt: skip


class Call(NamedTuple):
    """One call of a tool.

    name: of the tool.
    arguments: as the text of a JSON object.
    """

    name: str
    arguments: str

    def as_json(self, index: int | None = None) -> dict[str, Any]:
        """The call in the format of OpenAI, with a new id.

        Args:
            index: its number in a stream; None for a whole reply.
        """
        # Nine letters and digits: the templates of Mistral take no other ids.
        call = {"id": uuid4().hex[:9], "type": "function", "function": self._asdict()}
        return call if index is None else {"index": index, **call}


def made_call(name: str, arguments: Any) -> Call:
    """A call that can be sent: its arguments are a JSON object, and no text has half a character.

    Args:
        name: of the tool.
        arguments: the object, or its text.

    Raises:
        ValueError: they are no object, or cannot be sent.
    """
    values = json.loads(arguments) if isinstance(arguments, str) else arguments
    if not isinstance(values, dict):
        raise ValueError("the arguments are no object")
    text = json.dumps(values, ensure_ascii=False, allow_nan=False)
    text = arguments if isinstance(arguments, str) else text
    f"{name}{text}".encode()
    return Call(name, text)


class ToolFormat(NamedTuple):
    """How a family of models writes calls.

    marks: texts in the chat template; a template that has all of them is of this family.
    opens: text before a call; "": a reply that begins with a brace is a call.
    closes: text after a call; "": a call goes to the end of the reply.
    read: finds the calls in the text between, given the tools that may be called; raises ValueError, TypeError or
        SyntaxError where there are none.
    rule: the grammar of the text between.
    arguments: name of the arguments in the JSON of a call.
    listed: whether that JSON is a list of calls.
    around: text before and after the JSON.
    inner: text between the name and the arguments, where a call is not all JSON.
    quote: text around a text among the arguments, where it is not that of JSON.
    between: text between two calls.
    ends: text with which the model waits for the answer to its calls; a reply ends before it.
    tools: those that may be called; a request has them.
    """

    marks: tuple[str, ...]
    opens: str
    closes: str
    read: Callable[[str, Tools], list[Call]]
    rule: Callable[[ToolFormat, Wanted], str] = json_rule
    arguments: str = "arguments"
    listed: bool = False
    around: tuple[str, str] = ("", "")
    inner: str = ""
    quote: str = ""
    between: str = "\n"
    ends: str = ""
    tools: Tools = MappingProxyType({})
