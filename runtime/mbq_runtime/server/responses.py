"""OpenAI's Responses: a request becomes one of chat completions, and its reply a list of items.

The server keeps no replies: a client sends the whole conversation each time.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any
from uuid import uuid4

from .blocks import BlockShape, Kind
from .divide import Divider
from .errors import ApiError
from .replies import event
from .tool_format import Call
from .translate import Fields, objects, refuse, text_of
from .worker import Result

_SAME = (
    "model", "stream", "temperature", "top_p", "parallel_tool_calls", "seed", "stop", "top_k", "min_p",
    "avg_bits", "min_bits", "max_bits", "chat_template_kwargs",
)  # fmt: skip
_NO_EFFECT = (
    "store", "metadata", "user", "service_tier", "prompt_cache_key", "prompt_cache_retention",
    "safety_identifier", "stream_options", "max_tool_calls",
)  # fmt: skip
_LOGPROBS = "message.output_text.logprobs"
_TEXT_PARTS = ("input_text", "output_text", "text")


def as_chat(data: Mapping[str, Any]) -> dict[str, Any]:
    """The body of /v1/chat/completions that asks for the same.

    Args:
        data: the body of /v1/responses.

    Raises:
        ApiError: it asks for what this server does not have.
    """
    fields = Fields(data, _NO_EFFECT)
    chat = {name: fields.take(name) for name in _SAME if name in data}
    chat["messages"] = []
    if instructions := fields.take("instructions", str):
        chat["messages"].append({"role": "system", "content": instructions})
    given = fields.take("input", str, list)
    chat["messages"] += [{"role": "user", "content": given}] if isinstance(given, str) else _messages(given or [])
    if (most := fields.take("max_output_tokens")) is not None:
        chat["max_tokens"] = most
    if tools := fields.objects("tools"):
        chat["tools"] = [_tool(tool, where) for where, tool in tools]
    choice = fields.take("tool_choice")
    if isinstance(choice, dict):
        choice = {"type": choice.get("type"), "function": {"name": choice.get("name")}}
    if choice is not None:
        chat["tool_choice"] = choice
    text = fields.take("text", dict) or {}
    if text.get("verbosity") not in (None, "medium"):
        raise refuse("text.verbosity", "not supported by this server; leave it out")
    if _LOGPROBS in (fields.take("include", list) or ()):
        raise refuse("include", f"{_LOGPROBS} is not supported here; use logprobs of /v1/chat/completions")
    wanted = text.get("format") or {}
    if not isinstance(wanted, dict):
        raise refuse("text.format", "needed an object")
    if wanted.get("type") == "json_schema":
        chat["response_format"] = {"type": "json_schema", "json_schema": {"schema": wanted.get("schema", {})}}
    elif wanted:
        chat["response_format"] = wanted
    if effort := (fields.take("reasoning", dict) or {}).get("effort"):
        chat["reasoning_effort"] = effort
    if fields.take("truncation") not in (None, "disabled"):
        raise refuse("truncation", "this server cuts no prompts; leave it out")
    fields.refuse_rest()
    return chat


def _messages(items: Any) -> list[dict[str, Any]]:
    """Messages.  The calls that follow an assistant's message belong to it."""
    found: list[dict[str, Any]] = []
    for where, item in objects(items, "input"):
        kind = item.get("type", "message")
        if kind == "message":
            found.append({"role": item.get("role"), "content": text_of(item.get("content"), where, _TEXT_PARTS)})
        elif kind == "function_call":
            if not found or found[-1]["role"] != "assistant":
                found.append({"role": "assistant", "content": ""})
            function = {"name": item.get("name"), "arguments": item.get("arguments", "{}")}
            call = {"id": item.get("call_id"), "type": "function", "function": function}
            found[-1].setdefault("tool_calls", []).append(call)
        elif kind == "function_call_output":
            output = text_of(item.get("output"), where, _TEXT_PARTS)
            found.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": output})
        elif kind == "reasoning":
            thought = text_of(item.get("content") or "", where, ("reasoning_text",))
            found.append({"role": "assistant", "content": "", "reasoning_content": thought})
        else:
            raise refuse(where, f"type {kind!r}: this server has messages, reasoning and calls of functions")
    return _merged(found)


def _merged(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same with an assistant's reasoning in the message that follows it."""
    found: list[dict[str, Any]] = []
    for message in messages:
        last = found[-1] if found else {}
        if message["role"] == "assistant" and "reasoning_content" in last and not last["content"]:
            calls = last.pop("tool_calls", [])  # these lists are ours; a copy for each message takes n^2 steps
            calls += message.get("tool_calls", ())
            found[-1] = {**message, "reasoning_content": last["reasoning_content"]}
            if calls:
                found[-1]["tool_calls"] = calls
        else:
            found.append(message)
    return found


def _tool(tool: dict[str, Any], where: str) -> dict[str, Any]:
    if tool.get("type") != "function":
        raise refuse(where, "this server runs no tools of its own; needed a tool of type function")
    names = ("name", "description", "parameters", "strict")
    return {"type": "function", "function": {name: tool[name] for name in names if tool.get(name) is not None}}


class ResponseShape(BlockShape):
    """The format of /v1/responses.

    Args:
        model: name of the model.
        divider: divides the reply.
        asked: the body of the request, parts of which are repeated in the reply.
    """

    def __init__(self, model: str, divider: Divider, asked: Mapping[str, Any]) -> None:
        super().__init__(divider)
        self._number = -1
        self._items: dict[int, str] = {}
        self._same = {
            "id": f"resp_{uuid4().hex}", "object": "response", "created_at": int(time.time()), "model": model,
            "error": None, "incomplete_details": None, "previous_response_id": None, "store": False,
            "instructions": asked.get("instructions"), "metadata": asked.get("metadata") or {},
            "max_output_tokens": asked.get("max_output_tokens"), "temperature": asked.get("temperature"),
            "top_p": asked.get("top_p"), "tools": asked.get("tools") or [],
            "tool_choice": asked.get("tool_choice") or "auto",
            "parallel_tool_calls": asked.get("parallel_tool_calls") is not False,
            "text": asked.get("text") or {"format": {"type": "text"}}, "truncation": "disabled",
        }  # fmt: skip

    def started(self, prompt_tokens: int) -> Iterator[bytes]:
        running = {**self._same, "status": "in_progress", "output": [], "usage": None}
        yield self._event("response.created", response=running)
        yield self._event("response.in_progress", response=running)

    def opened(self, kind: Kind, at: int) -> Iterator[bytes]:
        item = {**self.block(kind, "", at), "status": "in_progress", "content": []}
        yield self._event("response.output_item.added", output_index=at, item=item)
        if kind == "text":
            yield self._in_text("response.content_part.added", at, part=_part(""))

    def grown(self, kind: Kind, at: int, text: str) -> Iterator[bytes]:
        name = "output_text" if kind == "text" else "reasoning_text"
        more: dict[str, Any] = {"logprobs": []} if kind == "text" else {}
        yield self._in_text(f"response.{name}.delta", at, delta=text, **more)

    def closed(self, kind: Kind, at: int, block: dict[str, Any]) -> Iterator[bytes]:
        text = block["content"][0]["text"]
        if kind == "text":
            yield self._in_text("response.output_text.done", at, text=text, logprobs=[])
            yield self._in_text("response.content_part.done", at, part=_part(text))
        else:
            yield self._in_text("response.reasoning_text.done", at, text=text)
        yield self._event("response.output_item.done", output_index=at, item=block)

    def called(self, at: int, block: dict[str, Any], arguments: str) -> Iterator[bytes]:
        begun = {**block, "arguments": "", "status": "in_progress"}
        yield self._event("response.output_item.added", output_index=at, item=begun)
        about = {"output_index": at, "item_id": block["id"]}
        yield self._event("response.function_call_arguments.delta", **about, delta=arguments)
        name = block["name"]
        yield self._event("response.function_call_arguments.done", **about, arguments=arguments, name=name)
        yield self._event("response.output_item.done", output_index=at, item=block)

    def block(self, kind: Kind, text: str, at: int | None = None) -> dict[str, Any]:
        """See ``BlockShape``.

        Args:
            kind: "reasoning" or "text".
            text: all of it.
            at: number of the block; None: the next one.
        """
        at = len(self._blocks) if at is None else at
        name = self._items.setdefault(at, f"{'msg' if kind == 'text' else 'rs'}_{uuid4().hex}")
        if kind == "reasoning":
            content = [{"type": "reasoning_text", "text": text}]
            return {"id": name, "type": "reasoning", "summary": [], "content": content, "status": "completed"}
        item = {"id": name, "type": "message", "role": "assistant", "status": "completed"}
        return {**item, "content": [_part(text)]}

    def call(self, call: Call) -> dict[str, Any]:
        same = {"type": "function_call", "name": call.name, "arguments": call.arguments, "status": "completed"}
        return {"id": f"fc_{uuid4().hex}", "call_id": f"call_{uuid4().hex}", **same}

    def ended(self, blocks: list[dict[str, Any]], result: Result) -> Iterator[bytes]:
        whole = self.whole(blocks, result)
        yield self._event(f"response.{whole['status']}", response=whole)

    def failed(self, error: ApiError) -> Iterator[bytes]:
        about = error.body()["error"]
        yield self._event("error", code=about["code"], message=about["message"], param=about["param"])

    def whole(self, blocks: list[dict[str, Any]], result: Result) -> dict[str, Any]:
        usage = {
            "input_tokens": result.prompt_tokens,
            "input_tokens_details": {"cached_tokens": result.cached_tokens, "cache_write_tokens": 0},
            "output_tokens": result.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": result.reasoning_tokens},
            "total_tokens": result.prompt_tokens + result.completion_tokens,
        }
        cut = result.finish_reasons[0] == "length"
        end: dict[str, Any] = {"status": "incomplete" if cut else "completed", "output": blocks, "usage": usage}
        return {**self._same, **end, "incomplete_details": {"reason": "max_output_tokens"} if cut else None}

    def _in_text(self, kind: str, at: int, **fields: Any) -> bytes:
        return self._event(kind, item_id=self._items[at], output_index=at, content_index=0, **fields)

    def _event(self, kind: str, **fields: Any) -> bytes:
        self._number += 1
        return event({"type": kind, "sequence_number": self._number, **fields}, kind)


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
