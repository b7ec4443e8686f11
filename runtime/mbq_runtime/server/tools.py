"""How models write calls of tools, by the family of their chat template, and the calls read out of a reply.

A new family needs a row of ``FORMATS``.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from mbq_runtime.engine.grammar import Grammar
from mbq_runtime.errors import GrammarError

from .braced_calls import braced_rule, reader
from .errors import ApiError
from .requests import ChatBody, Order, ToolChoice
from .tool_format import (
    TEXT_RULES,
    Call,
    ToolFormat,
    Tools,
    Wanted,
    is_text,
    made_call,
    named_rule,
    parameters,
    properties,
    tagged_rule,
)
from .value_rules import python_rule


def _json_calls(body: str, _: Tools) -> list[Call]:
    """Calls as JSON: an object with "name" and "arguments" or "parameters", or a list of such objects."""
    found = json.loads(body)
    calls = []
    for entry in found if isinstance(found, list) else [found]:
        if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
            raise ValueError("no call")
        calls.append(made_call(entry["name"], entry.get("arguments", entry.get("parameters", {}))))
    return calls


def _python_calls(body: str, _: Tools) -> list[Call]:
    """Calls as a list in Python: [name(key="value", other=3)].  It is read, never run."""
    tree = ast.parse(body.strip(), mode="eval").body
    calls = []
    for entry in tree.elts if isinstance(tree, ast.List) else [tree]:
        if not isinstance(entry, ast.Call) or entry.args or any(word.arg is None for word in entry.keywords):
            raise ValueError("no call")
        arguments = {word.arg: ast.literal_eval(word.value) for word in entry.keywords}
        calls.append(made_call(ast.unparse(entry.func), arguments))
    return calls


def _named_calls(body: str, _: Tools) -> list[Call]:
    """Calls as name[ARGS]{"key": "value"}, with the opening mark between two of them."""
    calls = []
    for entry in body.split("[TOOL_CALLS]"):
        name, mark, arguments = entry.partition("[ARGS]")
        given = json.loads(arguments) if mark else None
        if not isinstance(given, dict):
            raise ValueError("no call")
        calls.append(made_call(name.strip(), given))
    return calls


def _tagged_calls(body: str, tools: Tools) -> list[Call]:
    """A call as <function=name>, with a <parameter=key> for each argument.  Its schema says which values are text."""
    found = _FUNCTION.fullmatch(body.strip())
    if found is None:
        raise ValueError("no call")
    types = properties(parameters(tools.get(found[1], {})))
    arguments = {key: _value(text, types.get(key)) for key, text in _PARAMETER.findall(found[2])}
    return [made_call(found[1], arguments)]


_FUNCTION = re.compile(r"<function=([^>\n]+)>(.*)</function>", re.DOTALL)
_PARAMETER = re.compile(r"<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>", re.DOTALL)
_WORDS = {"True": True, "False": False, "None": None}  # templates write values as Python does


def _value(text: str, schema: Any) -> Any:
    """A value that is text where its schema says so, and JSON else."""
    if is_text(schema):
        return text
    try:
        return _WORDS[text] if text in _WORDS else json.loads(text)
    except (ValueError, RecursionError):
        return text


FORMATS: Mapping[str, ToolFormat] = {
    "gemma4": ToolFormat(
        ("<|tool_call>", '<|"|>'),
        "<|tool_call>",
        "<tool_call|>",
        reader('<|"|>'),
        braced_rule,
        quote='<|"|>',
        between="",
        ends="<|tool_response>",
    ),
    "functiongemma": ToolFormat(
        ("<start_function_call>", "<escape>"),
        "<start_function_call>",
        "<end_function_call>",
        reader("<escape>"),
        braced_rule,
        quote="<escape>",
        between="",
        ends="<start_function_response>",
    ),
    "granite": ToolFormat(("<|tool_call|>",), "<|tool_call|>", "", _json_calls, listed=True),
    "lfm": ToolFormat(("<|tool_list_start|>",), "<|tool_call_start|>", "<|tool_call_end|>", _python_calls, python_rule),
    "ministral": ToolFormat(("[TOOL_CALLS]", "[ARGS]"), "[TOOL_CALLS]", "", _named_calls, named_rule, inner="[ARGS]"),
    "mistral": ToolFormat(("[TOOL_CALLS]",), "[TOOL_CALLS]", "", _json_calls, listed=True, around=(" ", "")),
    "llama": ToolFormat(('"parameters": ', "ipython"), "", "", _json_calls, arguments="parameters"),
    "qwen3.5": ToolFormat(
        ("<tool_call>", "<function="), "<tool_call>", "</tool_call>", _tagged_calls, tagged_rule, around=("\n", "\n")
    ),
    "hermes": ToolFormat(("<tool_call>",), "<tool_call>", "</tool_call>", _json_calls, around=("\n", "\n")),
    "smollm": ToolFormat(("xml_tools",), "<tool_call>", "</tool_call>", _json_calls, around=("\n", "\n")),
}
"""By the name of the family.  The first row whose marks are all in a template counts."""

_UNKNOWN_MARKS = ("<arg_key>", "[CALL_ID]")  # templates that share a mark with a family, and write calls in another way


def find_format(template: str) -> ToolFormat | None:
    """How a model writes calls; None where no row of the table knows.

    Args:
        template: text of its chat template.
    """
    if any(mark in template for mark in _UNKNOWN_MARKS):
        return None
    return next((row for row in FORMATS.values() if all(mark in template for mark in row.marks)), None)


def call_grammar(
    tool_format: ToolFormat, *, demanded: bool, several: bool, exact: bool, special_id: Callable[[str], int | None]
) -> Grammar | None:
    """The grammar of a reply that is one call or several, or of a reply that may have calls.

    Args:
        tool_format: how the model writes them, and the tools.
        demanded: whether the reply must be calls; else it is text, and its calls follow the schemas.
        several: whether there may be several calls.
        exact: whether all of the schemas must hold; else what the grammar does not know in them is left out.
        special_id: returns the id of a text that is a special token, else None.

    Returns:
        None: a text cannot be told from a call, and the schemas need not hold.

    Raises:
        GrammarError: the schemas must hold, and have what the grammar does not know.
    """
    if not (demanded or exact or tool_format.opens):
        return None

    def literal(text: str) -> str:
        token = special_id(text)
        return "" if not text else json.dumps(text) if token is None else f"<[{token}]>"

    wanted = Wanted(exact=exact, several=several, literal=literal)
    body = tool_format.rule(tool_format, wanted)
    opens, (before, after) = literal(tool_format.opens), map(literal, tool_format.around)
    call = f"{before} {body} {after} {literal(tool_format.closes)}"
    rules = "\n".join((*wanted.rules, TEXT_RULES))
    if demanded:
        more = f" ({literal(tool_format.between)} call)*" if several and tool_format.closes else ""
        return Grammar("lark", f"start: call{more}\ncall: {opens} {call}\n{rules}")
    if not tool_format.opens:  # a reply that begins as a call does is one
        return Grammar("lark", f"start: call | PLAIN\ncall: {call}\nPLAIN: /([^{{\\s](.|\\n)*)?/\n{rules}")
    start = ("call* TEXT" if several else "call? TEXT") if tool_format.closes else "call | TEXT"
    if tool_format.ends and special_id(tool_format.ends) is not None:
        start += f" {literal(tool_format.ends)}?"
    # A special token is no text.  Other text that opens a call ends the text before it as soon as it is there.
    opening = "opening" if opens.startswith("<") else "opening[lazy]"
    return Grammar("lark", f"start: {start}\ncall: opening {call}\n{opening}: TEXT {opens}\n{rules}")


def with_calls(made: Order, body: ChatBody, tool_format: ToolFormat, special_id: Callable[[str], int | None]) -> Order:
    """The order of a request whose reply may call tools.

    Args:
        made: the order without them.
        body: the request.
        tool_format: how the model writes calls, and the tools.
        special_id: returns the id of a text that is a special token, else None.

    Raises:
        ApiError: the schemas of the tools must hold, and cannot.
    """
    texts = (tool_format.opens, tool_format.inner, tool_format.quote, tool_format.closes, tool_format.ends)
    options = {**made.options, "shown": [*made.options.get("shown", ()), *(text for text in texts if text)]}
    if tool_format.ends:
        options["stop"] = (*made.options["stop"], tool_format.ends)
    strict = body.strict_tool()
    if strict is not None and made.options["grammar"] is not None:
        message = f"{strict}: a reply has one grammar; leave strict or {made.grammar_field} out"
        raise ApiError(400, message, param=strict, code="unsupported")
    several = body.parallel_tool_calls is not False and not isinstance(body.tool_choice, ToolChoice)
    try:
        grammar = call_grammar(
            tool_format,
            demanded=body.must_call,
            several=several,
            exact=body.must_call or strict is not None,
            special_id=special_id,
        )
    except (GrammarError, RecursionError) as error:
        message = str(error) if isinstance(error, GrammarError) else "tools: a schema has too many levels"
        raise ApiError(400, message, param="tools", code="invalid_grammar") from None
    if made.options["grammar"] is None and grammar is not None:
        options["grammar"] = grammar
        made = replace(made, grammar_field="tools")
    return replace(made, options=options)


class CallReader:
    """Divides a reply into text and calls, as it comes.

    tool_format: how the model writes calls, and the tools.
    """

    def __init__(self, tool_format: ToolFormat) -> None:
        self._format = tool_format
        self._held = ""  # text that may be the start of a call, or the body of one
        self._inside = False
        self._begun = False  # whether there was anything but spaces
        self._spoke = True  # whether there was text since the last call
        self.calls = 0

    def feed(self, text: str) -> Iterator[str | Call]:
        """Text and calls that are complete.

        Args:
            text: the next text of the reply.
        """
        self._held += text
        while True:
            if self._inside:
                at = self._held.find(self._format.closes) if self._format.closes else -1
                if at < 0:
                    return
                body, self._held = self._held[:at], self._held[at + len(self._format.closes) :]
                self._inside = False
                yield from self._read(body, self._format.opens + body + self._format.closes)
                continue
            at = self._opening()
            if at < 0:
                ready = len(self._held) - self._claimed()
                yield from self._said(self._held[:ready])
                self._held = self._held[ready:]
                return
            before, self._held = self._held[:at], self._held[at + len(self._format.opens) :]
            self._inside = True
            yield from self._said(before)

    def finish(self) -> Iterator[str | Call]:
        """What is left at the end of the reply."""
        held, self._held = self._held, ""
        if self._inside:
            yield from self._read(held, self._format.opens + held)
        elif held:
            yield from self._said(held)

    def _opening(self) -> int:
        if self._format.opens:
            return self._held.find(self._format.opens)
        start = self._held.lstrip()
        return len(self._held) - len(start) if start.startswith("{") and not self._begun else -1

    def _claimed(self) -> int:
        """Characters at the end of the text that may belong to a call."""
        opens = self._format.opens
        if not opens:
            return len(self._held) if not self._held.strip() and not self._begun else 0
        start = max(0, len(self._held) - len(opens) + 1)
        partly = next(
            (at for at in range(start, len(self._held)) if opens.startswith(self._held[at:])), len(self._held)
        )
        return len(self._held) - len(self._held[:partly].rstrip())  # spaces may stand before a call

    def _said(self, text: str) -> Iterator[str]:
        """Text of the reply.  Spaces between calls are none."""
        if text.strip():
            self._begun = self._spoke = True
        elif not self._spoke or not text:
            return
        yield text

    def _read(self, body: str, whole: str) -> Iterator[str | Call]:
        try:
            found = self._format.read(body, self._format.tools)
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
            found = []
        if not found:  # no call after all
            yield from self._said(whole)
            return
        self.calls += len(found)
        self._spoke = False
        yield from found
