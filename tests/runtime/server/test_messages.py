"""Anthropic's Messages through its official client."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import needs
import pytest
from serving import Running
from tiny_bundle import CIRCLE

from mbq_runtime.server.divide import Divider
from mbq_runtime.server.messages import MessageShape
from mbq_runtime.server.tools import FORMATS
from mbq_runtime.server.worker import Part, Result

pytestmark = pytest.mark.heavy  # the client's package is large

TIDE: dict[str, Any] = {
    "name": "tide", "description": "When the tide turns.",
    "input_schema": {
        "type": "object", "properties": {"place": {"enum": ["AB", "CD"]}}, "required": ["place"],
        "additionalProperties": False,
    },
}  # fmt: skip
ASK: dict[str, Any] = {"model": "any", "max_tokens": 90, "messages": [{"role": "user", "content": "A"}]}
ASK["extra_body"] = {"temperature": 0}


@pytest.fixture(scope="module")
def client(with_tools: Running) -> Iterator[Any]:
    with needs.module("anthropic").Anthropic(
        base_url=with_tools.url, api_key="none", max_retries=0, timeout=30
    ) as found:
        yield found


def test_a_message(client: Any) -> None:
    found = client.messages.create(**{**ASK, "max_tokens": 6}, system="x")
    (block,) = found.content
    assert (found.role, block.type, block.text) == ("assistant", "text", CIRCLE[1:])
    assert (found.stop_reason, found.stop_sequence) == ("max_tokens", None)
    assert (found.usage.input_tokens + found.usage.cache_read_input_tokens, found.usage.output_tokens) == (4, 6)
    ended = client.messages.create(**ASK, stop_sequences=["DE", "zz"])
    assert ended.content[0].text == "BC"
    assert (ended.stop_reason, ended.stop_sequence) == ("stop_sequence", "DE")


def test_a_stream(client: Any) -> None:
    with client.messages.stream(**{**ASK, "max_tokens": 5}) as stream:
        assert "".join(stream.text_stream) == "BCDEF"
        final = stream.get_final_message()
    assert (final.stop_reason, final.usage.output_tokens) == ("max_tokens", 5)


@pytest.mark.parametrize(
    ("stops", "stop", "told"),
    [((), "<|tool_response>", ("tool_use", None)), (("END",), "END", ("stop_sequence", "END"))],
)
def test_a_stop_text_of_the_server_is_none_of_the_client(
    stops: tuple[str, ...], stop: str, told: tuple[str | None, ...]
) -> None:
    """Gemma's replies with calls end before the text that waits for an answer: a client must see the calls."""
    row = FORMATS["gemma4"]
    parts = [Part(0, "<|tool_call>call:now{}<tool_call|>")]
    result = Result(("stop",), (stop,), 3, 2, 8.0, 0, 0, 1.0, 0.1, None)
    found = MessageShape("any", Divider(None, row), stops).document(parts, result)
    assert [block["type"] for block in found["content"]] == ["tool_use"]
    assert (found["stop_reason"], found["stop_sequence"]) == told


@pytest.mark.parametrize("stream", [False, True])
def test_a_tool_is_called_and_its_result_read(client: Any, stream: bool) -> None:
    asked = {**ASK, "tools": [TIDE], "tool_choice": {"type": "any", "disable_parallel_tool_use": True}}
    if stream:
        with client.messages.stream(**asked) as events:
            found = events.get_final_message()
    else:
        found = client.messages.create(**asked)
    (call,) = found.content
    assert (found.stop_reason, call.type, call.name) == ("tool_use", "tool_use", "tide")
    assert call.input["place"] in ("AB", "CD")
    result = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "six"}]}
    talk = [
        *ASK["messages"],
        {"role": "assistant", "content": [call.model_dump()]},
        {"role": "user", "content": [result, {"type": "text", "text": "D"}]},
    ]
    counted = client.messages.count_tokens(model="any", messages=talk)
    assert counted.input_tokens == len("uA" + "a" + f"<tool_call>{call.input['place']}" + "tsix" + "uD")
    after = client.messages.create(**{**ASK, "messages": talk, "max_tokens": 3})
    assert after.content[0].text == "EFG"


def test_errors_are_the_client_s_own(client: Any, with_tools: Running) -> None:
    anthropic = needs.module("anthropic")
    for fields, words in (
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools.0: this server runs no tools"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "messages.0.content.0"),
        ({"tool_choice": {"type": "tool", "name": "tide"}}, "tool_choice 'tide': no such tool"),
        ({"mcp_servers": [{"url": "x"}]}, "mcp_servers: not supported"),
        ({"output_config": {"effort": "low"}}, "no variable 'reasoning_effort'"),
        ({"messages": [{"role": "user", "content": "A" * 99}]}, "100 tokens long"),
    ):
        with pytest.raises(anthropic.BadRequestError) as caught:
            client.messages.create(**{**ASK, "extra_body": fields})
        assert words in caught.value.message
    # A limit of reasoning holds for a model that has none.
    thinking = {"type": "enabled", "budget_tokens": 1024}
    assert client.messages.create(**{**ASK, "max_tokens": 2}, thinking=thinking).content[0].text == "BC"
