"""OpenAI's Responses through the official client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pydantic
import pytest
from serving import Running
from tiny_bundle import CIRCLE

TIDE: dict[str, Any] = {
    "type": "function", "name": "tide", "strict": True,
    "parameters": {
        "type": "object", "properties": {"place": {"enum": ["AB", "CD"]}}, "required": ["place"],
        "additionalProperties": False,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def client(with_tools: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{with_tools.url}/v1", api_key="none", max_retries=0, timeout=30) as found:
        yield found


def test_a_response(client: openai.OpenAI) -> None:
    found = client.responses.create(model="any", instructions="x", input="A", temperature=0, max_output_tokens=6)
    assert (found.output_text, found.status, found.model) == (CIRCLE[1:], "incomplete", "any")
    assert found.incomplete_details is not None
    assert found.incomplete_details.reason == "max_output_tokens"
    assert found.usage is not None
    assert (found.usage.input_tokens, found.usage.output_tokens) == (len("sxuA"), 6)


def test_a_stream_has_the_events_in_order(client: openai.OpenAI) -> None:
    with client.responses.stream(model="any", input="A", temperature=0, extra_body={"stop": "F"}) as stream:
        events = list(stream)
    assert [one.sequence_number for one in events] == list(range(len(events)))
    kinds = [one.type for one in events if not one.type.endswith("delta")]
    assert kinds == [
        "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added",
        "response.output_text.done", "response.content_part.done", "response.output_item.done", "response.completed",
    ]  # fmt: skip
    assert "".join(one.delta for one in events if one.type == "response.output_text.delta") == "BCDE"
    assert stream.get_final_response().output_text == "BCDE"
    *_, last = client.responses.create(model="any", input="A", temperature=0, max_output_tokens=2, stream=True)
    assert last.type == "response.incomplete"
    assert last.response.output_text == "BC"


@pytest.mark.parametrize("stream", [False, True])
def test_a_function_is_called_and_its_output_read(client: openai.OpenAI, stream: bool) -> None:
    asked: dict[str, Any] = {"model": "any", "input": [{"role": "user", "content": "A"}], "tools": [TIDE]}
    asked |= {"tool_choice": {"type": "function", "name": "tide"}, "temperature": 0}
    if stream:
        with client.responses.stream(**asked) as events:
            (done,) = [one for one in events if one.type == "response.function_call_arguments.done"]
            found = events.get_final_response()
        assert json.loads(done.arguments)["place"] in ("AB", "CD")
    else:
        found = client.responses.create(**asked)
    (call,) = found.output
    assert call.type == "function_call"
    assert json.loads(call.arguments)["place"] in ("AB", "CD")
    talk = [
        *asked["input"],
        call.model_dump(exclude_none=True),
        {"type": "function_call_output", "call_id": call.call_id, "output": "six"},
    ]
    after = client.responses.create(**{**asked, "input": talk, "tool_choice": "none"}, max_output_tokens=1)
    assert after.usage is not None
    place = json.loads(call.arguments)["place"]
    assert after.usage.input_tokens == len("uA" + "a" + f"<tool_call>{place}" + "tsix")


class Boat(pydantic.BaseModel):
    """What a client wants to know."""

    kind: Literal["sloop", "ketch"]


def test_a_response_is_json_of_a_pydantic_model(client: openai.OpenAI) -> None:
    found = client.responses.parse(model="any", input="A", temperature=0, text_format=Boat)
    assert found.output_parsed is not None
    assert found.output_parsed.kind in ("sloop", "ketch")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"background": True}, "background"),
        ({"truncation": "auto"}, "truncation"),
        ({"tools": [{"type": "web_search"}]}, "tools.0"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input.0.0"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input.0"),
        ({"temperature": 7.0}, "temperature"),
        ({"text": {"verbosity": "low"}}, "text.verbosity"),
        ({"include": ["message.output_text.logprobs"]}, "include"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"reasoning": {"effort": "high"}}, None),  # a variable that this template does not have
    ],
)
def test_what_the_server_does_not_have_is_refused(
    client: openai.OpenAI, fields: dict[str, Any], param: str | None
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(**{"model": "any", "input": "A", **fields})
    assert caught.value.param == param


def test_there_are_no_embeddings(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="writes text and gives no embeddings"):
        client.embeddings.create(model="any", input="A")
