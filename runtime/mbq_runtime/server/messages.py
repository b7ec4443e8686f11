"""Anthropic's Messages: a request becomes one of chat completions, and its reply a message of blocks."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from uuid import uuid4

from mbq_runtime.engine.prompt import continued_text

from .blocks import BlockShape, Kind
from .divide import Divider
from .errors import ApiError
from .replies import event
from .tool_format import Call
from .translate import Fields, objects, refuse, text_of
from .worker import Result

_STOP = {"length": "max_tokens", "stop": "end_turn"}
_SAME = ("model", "max_tokens", "stream", "temperature", "top_p", "top_k", "avg_bits", "min_bits", "max_bits")
_NO_EFFECT = ("metadata", "service_tier", "cache_control", "betas", "inference_geo", "user_profile_id", "speed")


def as_chat(data: Mapping[str, Any]) -> dict[str, Any]:
    """The body of /v1/chat/completions that asks for the same.

    Args:
        data: the body of /v1/messages.

    Raises:
        ApiError: it asks for what this server does not have.
    """
    fields = Fields(data, _NO_EFFECT)
    chat = {name: fields.take(name) for name in _SAME if name in data}
    chat["messages"] = [*_system(fields.take("system"))]
    for where, message in fields.objects("messages"):
        chat["messages"] += _message(message, where)
    continued = continued_text(chat["messages"]) or ""
    if continued != continued.rstrip():
        raise refuse("messages", "the reply continues the last message, which may not end with whitespace; remove it")
    if stops := fields.take("stop_sequences"):
        chat["stop"] = stops
    if tools := fields.objects("tools"):
        chat["tools"] = [_tool(tool, where) for where, tool in tools]
    chat |= _choice(fields.take("tool_choice", dict)) | _thinking(fields.take("thinking", dict))
    output = fields.take("output_config", dict) or {}
    if (effort := output.get("effort")) not in (None, "high"):  # high is the default
        chat["reasoning_effort"] = effort
    wanted = fields.take("output_format", dict) or output.get("format")
    if wanted:
        if not isinstance(wanted, dict):
            raise refuse("output_config.format", "needed an object")
        chat["response_format"] = {"type": "json_schema", "json_schema": {"schema": wanted.get("schema", {})}}
    fields.refuse_rest()
    return chat


def _system(system: Any) -> Iterator[dict[str, Any]]:
    if system:
        yield {"role": "system", "content": text_of(system, "system", ("text",))}


def _message(message: dict[str, Any], where: str) -> Iterator[dict[str, Any]]:
    """A message may become several: results of tools are messages of their own."""
    if message.get("role") not in ("user", "assistant", "system"):
        raise refuse(where, "needed a message of user or assistant")
    content, calls, texts, thoughts = message.get("content"), [], [], []
    blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
    for path, block in objects(blocks or [], f"{where}.content"):
        kind = block.get("type")
        if kind == "text":
            texts.append(text_of(block.get("text", ""), path, ()))
        elif kind == "tool_use":
            call = {"name": block.get("name"), "arguments": json.dumps(block.get("input", {}), ensure_ascii=False)}
            calls.append({"id": block.get("id"), "type": "function", "function": call})
        elif kind == "tool_result":
            result = text_of(block.get("content") or "", path, ("text",))
            yield {"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": result}
        elif kind == "thinking":
            thoughts.append(text_of(block.get("thinking", ""), path, ()))
        elif kind != "redacted_thinking":
            raise refuse(path, f"type {kind!r}: this server has text, tools and thinking")
    if texts or calls or message["role"] != "user":
        found: dict[str, Any] = {"role": message["role"], "content": "\n".join(texts)}
        if calls:
            found["tool_calls"] = calls
        if thoughts:
            found["reasoning_content"] = "\n".join(thoughts)
        yield found


def _tool(tool: dict[str, Any], where: str) -> dict[str, Any]:
    if tool.get("type", "custom") not in ("custom", None):
        raise refuse(where, "this server runs no tools of its own; needed a tool with an input_schema")
    function = {"name": tool.get("name"), "parameters": tool.get("input_schema")}
    function |= {name: tool[name] for name in ("description", "strict") if tool.get(name)}
    return {"type": "function", "function": function}


def _choice(choice: Any) -> dict[str, Any]:
    if choice is None:
        return {}
    kind = choice.get("type")
    named = {"type": "function", "function": {"name": choice.get("name")}} if kind == "tool" else None
    wanted = {"auto": "auto", "any": "required", "none": "none", "tool": named}.get(str(kind))
    if wanted is None:
        raise refuse("tool_choice", f"type {kind!r}: needed auto, any, none or tool")
    return {"tool_choice": wanted} | ({"parallel_tool_calls": False} if choice.get("disable_parallel_tool_use") else {})


def _thinking(thinking: Any) -> dict[str, Any]:
    if not thinking:
        return {}
    if thinking.get("type") == "disabled":
        return {"reasoning_budget": 0}
    return {"reasoning_budget": thinking["budget_tokens"]} if "budget_tokens" in thinking else {}


class MessageShape(BlockShape):
    """The format of /v1/messages.

    Args:
        model: name of the model.
        divider: divides the reply.
        stops: the stop texts of the request; the server has others of its own, such as what waits for a tool's answer.
    """

    def __init__(self, model: str, divider: Divider, stops: Sequence[str] = ()) -> None:
        super().__init__(divider)
        self._stops = stops
        self._same = {"id": f"msg_{uuid4().hex}", "type": "message", "role": "assistant", "model": model}

    def started(self, prompt_tokens: int) -> Iterator[bytes]:
        usage = {"input_tokens": prompt_tokens, "output_tokens": 0}
        message: dict[str, Any] = {
            **self._same,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": usage,
        }
        yield _event("message_start", message=message)

    def opened(self, kind: Kind, at: int) -> Iterator[bytes]:
        yield _event("content_block_start", index=at, content_block=self.block(kind, ""))

    def grown(self, kind: Kind, at: int, text: str) -> Iterator[bytes]:
        name = "thinking" if kind == "reasoning" else "text"
        yield _event("content_block_delta", index=at, delta={"type": f"{name}_delta", name: text})

    def closed(self, kind: Kind, at: int, block: dict[str, Any]) -> Iterator[bytes]:
        yield _event("content_block_stop", index=at)

    def called(self, at: int, block: dict[str, Any], arguments: str) -> Iterator[bytes]:
        yield _event("content_block_start", index=at, content_block={**block, "input": {}})
        yield _event("content_block_delta", index=at, delta={"type": "input_json_delta", "partial_json": arguments})
        yield _event("content_block_stop", index=at)

    def block(self, kind: Kind, text: str) -> dict[str, Any]:
        if kind == "reasoning":
            return {"type": "thinking", "thinking": text, "signature": ""}
        return {"type": "text", "text": text}

    def call(self, call: Call) -> dict[str, Any]:
        try:
            given = json.loads(call.arguments)
        except (ValueError, RecursionError):
            given = {}
        return {"type": "tool_use", "id": f"toolu_{uuid4().hex}", "name": call.name, "input": given}

    def ended(self, blocks: list[dict[str, Any]], result: Result) -> Iterator[bytes]:
        whole = self.whole(blocks, result)
        delta = {name: whole[name] for name in ("stop_reason", "stop_sequence")}
        yield _event("message_delta", delta=delta, usage=whole["usage"])
        yield _event("message_stop")

    def failed(self, error: ApiError) -> Iterator[bytes]:
        yield event(error.body(), "error")

    def whole(self, blocks: list[dict[str, Any]], result: Result) -> dict[str, Any]:
        reason, stop = _STOP[result.finish_reasons[0]], result.stop_texts[0]
        stop = stop if stop in self._stops else None
        if reason == "end_turn" and any(block["type"] == "tool_use" for block in blocks):
            reason = "tool_use"
        usage = {
            "input_tokens": result.prompt_tokens - result.cached_tokens,
            "cache_read_input_tokens": result.cached_tokens,
            "cache_creation_input_tokens": 0,
            "output_tokens": result.completion_tokens,
        }
        end = {"stop_reason": "stop_sequence" if stop else reason, "stop_sequence": stop}
        return {**self._same, "content": blocks, **end, "usage": usage}


def _event(kind: str, **fields: Any) -> bytes:
    return event({"type": kind, **fields}, kind)
