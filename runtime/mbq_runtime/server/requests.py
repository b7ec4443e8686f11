"""The bodies of completion requests, checked field by field.

Clients send many fields that this server does not have.  Those that change no reply are ignored (``_NO_EFFECT``), and
so are values that mean the same as no field (``_NEUTRAL``).  Any other unknown field is refused: its reply would not
be the one that the client asked for.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from mbq_runtime.bundle.facts import Budget
from mbq_runtime.engine.grammar import JSON_OBJECT, Grammar
from mbq_runtime.engine.prompt import continued_text
from mbq_runtime.errors import GrammarError

from .errors import ApiError

_INT32 = 2**31  # limit of the engine's whole numbers
_MOST_PROMPTS = 256  # of one request
MOST_SEEDS = _INT32
"""Seeds of the engine are below it.  Those of the API have 64 bits."""

_NO_EFFECT = frozenset((
    # of OpenAI
    "metadata", "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention", "safety_identifier",
    "service_tier", "store", "user",
    # of other servers and of clients
    "cache_prompt", "chat_id", "id", "id_slot", "keep_alive", "priority", "provider", "request_id", "return_progress",
    "session_id", "slot_id", "timings_per_token", "usage", "n_keep",
    # of samplers that have to be turned on by a field of ``_NEUTRAL``
    "dry_allowed_length", "dry_base", "dry_penalty_last_n", "dry_sequence_breakers", "dynatemp_exponent",
    "dynatemp_high", "dynatemp_low", "mirostat_eta", "mirostat_tau", "repeat_last_n", "smoothing_curve",
    "xtc_threshold",
))  # fmt: skip
"""Fields that change no reply."""

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "add_bos_token": (True,),
    "add_generation_prompt": (True,),
    "add_special_tokens": (True,),
    "best_of": (1,),
    "do_sample": (True,),
    "encoder_repetition_penalty": (1,),
    "function_call": ("none", "auto"),
    "guidance_scale": (1,),
    "include_reasoning": (True,),
    "length_penalty": (1,),
    "max_new_tokens": (-1,),
    "modalities": (["text"],),
    "n_predict": (-1,),
    "num_beams": (1,),
    "num_predict": (-1,),
    "parse_special": (True,),
    "parse_tool_calls": (True,),
    "reasoning_format": ("auto", "deepseek"),
    "rep_pen": (1,),
    "repeat_penalty": (1,),
    "separate_reasoning": (True,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "tfs": (1,),
    "tfs_z": (1,),
    "top_n_sigma": (-1, 0),
    "truncate_prompt_tokens": (-1,),
    "typ_p": (1,),
    "typical_p": (1,),
    "verbosity": ("medium",),
}
"""Fields that this server does not have: their values that mean the same as no field, besides null.

Of a field that is not here, those are 0, false, and what is empty.
"""


def _is_neutral(field: str, value: Any) -> bool:
    """Whether an unknown field may be left out."""
    if field in _NO_EFFECT or value is None:
        return True
    return value in _NEUTRAL[field] if field in _NEUTRAL else value in (0, "", [], {})


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _as_text(value: Any) -> Any:
    """The text of a message.  It can come in parts, and all parts must be text."""
    if not isinstance(value, list):
        return value
    if not all(isinstance(p, dict) and p.get("type") == "text" and isinstance(p.get("text"), str) for p in value):
        raise ValueError("needed a string, or parts of type text")
    return "".join(part["text"] for part in value)


def _unless_minus_one(value: Any) -> Any:
    """-1 is another server's word for the default: all tokens, or a random seed."""
    return None if value == -1 else value


def _no_limit(value: Any) -> Any:
    """-1 is another server's word for no limit."""
    return _INT32 - 1 if value == -1 else value


def _prompts(value: Any) -> list[str | list[int]]:
    several = isinstance(value, list) and len(value) > 0 and isinstance(value[0], str | list)
    prompts: list[Any] = value if several else [value]
    if len(prompts) > _MOST_PROMPTS:
        raise ValueError(f"{len(prompts)} prompts: at most {_MOST_PROMPTS} in one request")
    if not (all(isinstance(one, str) for one in prompts) or all(_are_ids(one) for one in prompts)):
        raise ValueError("needed one text or one list of token ids, or a list of texts or of such lists")
    return prompts


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(i) is int and 0 <= i < _INT32 for i in value)


_Stop = Annotated[str, Field(min_length=1, max_length=256)]
_TokenId = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]
_Limit = Annotated[int | None, Field(ge=1), BeforeValidator(_no_limit)]


def _continuing_mark(message: Mapping[str, Any]) -> str | None:
    """The field by which other servers mark the message that is to be continued."""
    return next((name for name in ("prefix", "partial") if message.get(name)), None)


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)


class StreamOptions(_Strict):
    """Options of a streamed reply."""

    include_usage: bool = False


class _Function(_Strict):
    name: Annotated[str, Field(min_length=1, max_length=256)]
    arguments: str = "{}"


class _ToolCall(_Strict):
    id: str | None = None
    type: Literal["function"] = "function"
    function: _Function

    def for_template(self) -> dict[str, Any]:
        """The call as templates read it: its arguments are an object, not text."""
        arguments: Any = self.function.arguments
        with suppress(ValueError, RecursionError):
            arguments = json.loads(arguments)
        return {
            "id": self.id or "0" * 9,
            "type": self.type,
            "function": {"name": self.function.name, "arguments": arguments},
        }


class Message(_Strict):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[str, BeforeValidator(_as_text)]
    name: str | None = None
    tool_calls: list[_ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _empty_turn(cls, data: Any) -> Any:
        """Clients send null as the content of an assistant's empty turn."""
        if not isinstance(data, dict):
            return data
        if data.get("function_call"):
            raise ValueError("function_call: it is out of date; give tool_calls")
        if data.get("role") != "assistant" and (mark := _continuing_mark(data)):
            raise ValueError(f"{mark}: only a last message of the role assistant is continued; leave {mark} out")
        if data.get("role") == "assistant" and data.get("content") is None:
            return {**data, "content": ""}
        return data

    def for_template(self) -> dict[str, Any]:
        """The message as templates read it."""
        message: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role, "content": self.content}
        if self.role == "tool":
            given = {"name": self.name, "tool_call_id": self.tool_call_id}
            message |= {field: value for field, value in given.items() if value is not None}
        if thoughts := self.reasoning_content or self.reasoning:
            message["reasoning_content"] = thoughts
        if self.tool_calls:
            message["tool_calls"] = [call.for_template() for call in self.tool_calls]
        return message


class _Conversation(_Strict):
    """Messages, and the fields by which clients of vLLM say whether the last one is continued.

    Both fields change nothing: the role of the last message says it.  One that says otherwise is refused.
    """

    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None

    def check_end(self, messages: Sequence[Message]) -> None:
        """Check what fields say about the last message.

        Args:
            messages: at least one.

        Raises:
            ValueError: they say something else than its role.
        """
        for at, message in enumerate(messages[:-1]):
            if mark := _continuing_mark(message.model_extra or {}):
                raise ValueError(f"messages.{at}.{mark}: only the last message is continued; leave {mark} out")
        continues = continued_text([message.for_template() for message in messages[-1:]]) is not None
        does = "continues a last message of the role assistant, and this one " + ("is" if continues else "is not")
        for field, meant in (
            ("continue_final_message", self.continue_final_message),
            ("add_generation_prompt", None if self.add_generation_prompt is None else not self.add_generation_prompt),
        ):
            if meant not in (None, continues):
                raise ValueError(f"{field}: this server {does}; leave {field} out")


class _ToolFunction(_Strict):
    name: Annotated[str, Field(min_length=1, max_length=256)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(_Strict):
    """A tool that a reply may call."""

    type: Literal["function"]
    function: _ToolFunction

    def for_template(self) -> dict[str, Any]:
        """The tool as templates read it."""
        function = self.function.model_dump(exclude_none=True, include={"name", "description", "parameters"})
        return {"type": "function", "function": {"parameters": {"type": "object", "properties": {}}, **function}}


class _Named(_Strict):
    name: str


class ToolChoice(_Strict):
    """The tool that a reply must call."""

    type: Literal["function"]
    function: _Named


class _Schema(_Strict):
    """The schema of a ``response_format``."""

    schema_: dict[str, Any] | bool = Field(default=True, alias="schema")


class ResponseFormat(_Strict):
    """What a reply must be, in the terms of OpenAI."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: _Schema | None = None

    @model_validator(mode="after")
    def _whole(self) -> ResponseFormat:
        if self.type == "json_schema" and self.json_schema is None:
            raise ValueError("type json_schema needs the field json_schema")
        return self

    def grammar(self) -> Grammar | None:
        """The grammar of the reply; None for any text."""
        if self.json_schema is not None and self.type == "json_schema":
            return Grammar.of_schema(self.json_schema.schema_)
        return JSON_OBJECT if self.type == "json_object" else None


class StructuredOutputs(_Strict):
    """What a reply must be, in the terms of vLLM: one of four fields."""

    json_: dict[str, Any] | bool | None = Field(default=None, alias="json")
    regex: str | None = None
    choice: Annotated[list[str], Field(min_length=1)] | None = None
    grammar: str | None = None

    @model_validator(mode="after")
    def _one(self) -> StructuredOutputs:
        if sum(value is not None for value in (self.json_, self.regex, self.choice, self.grammar)) != 1:
            raise ValueError("needed one of json, regex, choice, grammar")
        return self

    def as_grammar(self) -> Grammar:
        """The grammar of the reply."""
        if self.json_ is not None:
            return Grammar.of_schema(self.json_)
        if self.choice is not None:
            return Grammar.of_choices(self.choice)
        return Grammar("regex", self.regex) if self.regex is not None else Grammar("lark", self.grammar or "")


class Body(_Strict):
    """Fields of both kinds of request.  null is the default.

    avg_bits: budget of this reply, in average bits per weight; min_bits, max_bits: bounds of the budget.
    """

    DEFAULT_MAX_TOKENS: ClassVar[int | None] = None

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: _Limit = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int | None, Field(ge=0, lt=_INT32), BeforeValidator(_unless_minus_one)] = None
    seed: Annotated[int | None, BeforeValidator(_unless_minus_one)] = None
    stop: Annotated[list[_Stop] | None, Field(max_length=16), BeforeValidator(_as_list)] = None
    n: Annotated[int, Field(ge=1, le=16)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: dict[_TokenId, Annotated[float, Field(ge=-100, le=100)]] | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    avg_bits: float | None = None
    min_bits: float | None = None
    max_bits: float | None = None

    def engine_prompts(self) -> Sequence[str | list[int] | list[dict[str, Any]]]:
        """The prompts for ``Engine.generate``."""
        raise NotImplementedError

    def template_kwargs(self) -> dict[str, Any]:
        """Variables of the chat template."""
        return {}

    def token_limit(self) -> int | None:
        """The highest number of tokens that the client asked for; None: no limit."""
        return self.max_tokens

    def reasoning_limit(self) -> int | None:
        """Most tokens of reasoning; None: no limit."""
        return None

    def grammar(self) -> Grammar | None:
        """What the reply may say; None for any text."""
        if self.structured_outputs is not None:
            return self.structured_outputs.as_grammar()
        return None if self.response_format is None else self.response_format.grammar()

    def likelihoods(self) -> int | None:
        """How many of the likeliest tokens to report at each token; None: no report."""
        raise NotImplementedError


class ChatBody(Body, _Conversation):
    """The body of /v1/chat/completions.

    chat_template_kwargs: variables of the chat template; reasoning_effort, enable_thinking: variables of these names.
    reasoning_budget: most tokens of reasoning; -1: no limit.
    """

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: _Limit = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    enable_thinking: bool | None = None
    reasoning_budget: Annotated[int, Field(ge=-1, lt=_INT32)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @field_validator("top_logprobs")
    @classmethod
    def _reported(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value and not info.data.get("logprobs"):
            raise ValueError("set logprobs to true as well")
        return value

    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None

    @model_validator(mode="after")
    def _tools_fit(self) -> ChatBody:
        names = [tool.function.name for tool in self.tools or ()]
        wanted = self.tool_choice.function.name if isinstance(self.tool_choice, ToolChoice) else None
        if wanted is not None and wanted not in names:
            raise ValueError(f"tool_choice {wanted!r}: no such tool; tools has {', '.join(names) or 'none'}")
        if self.must_call and not names:
            raise ValueError("tool_choice asks for a call, and tools is empty")
        if self.must_call and (self.has_format or self.structured_outputs is not None):
            raise ValueError("a reply that must call a tool can have no other format; leave response_format out")
        return self

    @model_validator(mode="after")
    def _end_fits(self) -> ChatBody:
        self.check_end(self.messages)
        constraints = {
            "response_format": self.has_format,
            "structured_outputs": self.structured_outputs is not None,
            "tool_choice": self.must_call,
            "chat_template_kwargs.add_generation_prompt": "add_generation_prompt" in (self.chat_template_kwargs or {}),
        }
        broken = next((field for field, given in constraints.items() if given), None)
        if broken is not None and self.continued() is not None:
            raise ValueError(
                f"{broken}: the reply continues the last message, of the role assistant, so {broken} cannot hold; "
                "leave one of them out"
            )
        return self

    def continued(self) -> str | None:
        """The text of the last message, where the reply continues it; None where it does not."""
        return continued_text(self.conversation()[-1:])

    @property
    def has_format(self) -> bool:
        """Whether ``response_format`` asks for more than text."""
        return self.response_format is not None and self.response_format.type != "text"

    @property
    def must_call(self) -> bool:
        """Whether the reply must be a call."""
        return self.tool_choice == "required" or isinstance(self.tool_choice, ToolChoice)

    def offered_tools(self) -> list[dict[str, Any]]:
        """The tools for the template; none where no call is wanted."""
        return [] if self.tool_choice == "none" else [tool.for_template() for tool in self.tools or ()]

    def callable_tools(self) -> list[dict[str, Any]]:
        """The tools that a reply may call."""
        if isinstance(self.tool_choice, ToolChoice):
            return [one for one in self.offered_tools() if one["function"]["name"] == self.tool_choice.function.name]
        return self.offered_tools()

    def strict_tool(self) -> str | None:
        """The field of the first tool whose calls must follow its schema to the letter; None where there is none."""
        tools = self.tools or () if self.tool_choice != "none" else ()
        return next((f"tools.{at}.function.strict" for at, tool in enumerate(tools) if tool.function.strict), None)

    def conversation(self) -> list[dict[str, Any]]:
        """The messages as templates read them."""
        return [message.for_template() for message in self.messages]

    def engine_prompts(self) -> Sequence[list[dict[str, Any]]]:
        return [self.conversation()]

    def template_kwargs(self) -> dict[str, Any]:
        named = {"reasoning_effort": self.reasoning_effort, "enable_thinking": self.enable_thinking}
        given = {name: value for name, value in named.items() if value is not None}
        tools = self.offered_tools()
        return given | ({"tools": tools} if tools else {}) | (self.chat_template_kwargs or {})

    def reasoning_limit(self) -> int | None:
        return None if self.reasoning_budget == -1 else self.reasoning_budget

    def token_limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    def likelihoods(self) -> int | None:
        return self.top_logprobs or 0 if self.logprobs else None


class CompletionBody(Body):
    """The body of /v1/completions.

    prompt: one text, one list of ids, or several of one of them; each gets ``n`` replies.
    echo: whether the reply begins with the prompt.
    max_tokens: 0 gives the prompt alone, with ``echo``.
    """

    DEFAULT_MAX_TOKENS: ClassVar[int | None] = 16  # the default of the API

    prompt: Annotated[list[str | list[int]], PlainValidator(_prompts)]
    max_tokens: Annotated[int | None, Field(ge=0), BeforeValidator(_no_limit)] = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @model_validator(mode="after")
    def _gives_something(self) -> CompletionBody:
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens 0: needs echo: true, or the reply has nothing")
        return self

    def engine_prompts(self) -> Sequence[str | list[int]]:
        return self.prompt

    def likelihoods(self) -> int | None:
        return self.logprobs


class TokenizeBody(_Conversation):
    """The body of /tokenize: a text, or a conversation.

    content, prompt: the text, under the names of two other servers.
    add_special: put the model's opening token first.
    """

    model: str | None = None
    content: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    add_special: bool = False
    add_special_tokens: bool | None = None

    @model_validator(mode="after")
    def _one(self) -> TokenizeBody:
        if sum(value is not None for value in (self.content, self.prompt, self.messages)) != 1:
            raise ValueError("needed one of content, prompt, messages")
        if self.messages is not None:
            self.check_end(self.messages)
        return self


class DetokenizeBody(_Strict):
    """The body of /detokenize: ids."""

    tokens: list[Annotated[int, Field(ge=0, lt=_INT32)]]
    model: str | None = None


@dataclass(frozen=True)
class Order:
    """A request in the terms of the engine.

    Args:
        prompts: each prompt for ``Engine.prompt_tokens``.
        rendering: its other arguments.
        options: the arguments of ``Engine.generate``, without the prompt and the budget.  ``max_tokens`` 0: no reply.
        replies: number of replies to each prompt.
        floor_bits: lowest budget of the request, in average bits per weight; None: no floor.
        ceiling_bits: highest budget of the request; the same as ``floor_bits`` for a fixed budget; None: no ceiling.
        echo: whether the prompt comes before each reply.
        grammar_field: field of the request that the grammar comes from.
    """

    prompts: Sequence[str | list[int] | list[dict[str, Any]]]
    rendering: Mapping[str, Any]
    options: Mapping[str, Any]
    replies: int = 1
    floor_bits: float | None = None
    ceiling_bits: float | None = None
    echo: bool = False
    grammar_field: str = "response_format"


B = TypeVar("B", bound=_Strict)


def parse(kind: type[B], data: bytes) -> B:
    """Read and check a request body.

    Args:
        kind: class of the body.
        data: the body as JSON.

    Raises:
        ApiError: the body is not usable (status 400); the message names the field.
    """
    try:
        body = kind.model_validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        param = ".".join(str(part) for part in first["loc"]) or None
        reason = first["msg"].removeprefix("Value error, ")
        raise ApiError(400, f"{param or 'the request body'}: {reason}", param=param, code=first["type"]) from None
    for field, value in (body.model_extra or {}).items():
        if not _is_neutral(field, value):
            raise ApiError(400, f"{field}: not supported by this server; leave it out", param=field, code="unsupported")
    return body


def order(body: Body, budget: Budget, context_length: int) -> Order:
    """Translate a request for the engine.

    Args:
        body: the request.
        budget: bits that requests can ask for.
        context_length: context length of the engine, in tokens.

    Raises:
        ApiError: the bits are outside the budget, or no value fits the grammar.
    """
    floor, ceiling = _bounds(body, budget)
    field = "response_format" if body.structured_outputs is None else "structured_outputs"
    try:
        grammar = body.grammar()
    except GrammarError as error:
        raise ApiError(400, str(error), param=field, code="invalid_grammar") from None
    limit = body.token_limit()
    max_tokens = (body.DEFAULT_MAX_TOKENS or context_length) if limit is None else limit
    options = {
        "max_tokens": min(max_tokens, context_length),
        "temperature": 0.0 if body.top_p == 0 else 1.0 if body.temperature is None else body.temperature,
        "top_p": body.top_p or 1.0,
        "top_k": body.top_k or 0,
        "seed": None if body.seed is None else body.seed % MOST_SEEDS,
        "stop": tuple(body.stop or ()),
        "min_p": body.min_p or 0.0,
        "repetition_penalty": body.repetition_penalty or 1.0,
        "presence_penalty": body.presence_penalty or 0.0,
        "frequency_penalty": body.frequency_penalty or 0.0,
        "logit_bias": {int(token): value for token, value in (body.logit_bias or {}).items()},
        "logprobs": body.likelihoods(),
        "grammar": grammar,
        "reasoning_budget": body.reasoning_limit(),
        "continues": not isinstance(body, ChatBody) or bool(body.continued()),
    }
    rendering = {"chat": isinstance(body, ChatBody), "template_kwargs": body.template_kwargs()}
    echo = isinstance(body, CompletionBody) and bool(body.echo)
    return Order(body.engine_prompts(), rendering, options, body.n or 1, floor, ceiling, echo, field)


def _bounds(body: Body, budget: Budget) -> tuple[float | None, float | None]:
    for field in ("avg_bits", "min_bits", "max_bits"):
        value = getattr(body, field)
        if value is not None and not budget.min_bits <= value <= budget.max_bits:
            needed = f"this server offers {budget.min_bits:g} to {budget.max_bits:g} bits"
            raise ApiError(400, f"{field} {value:g}: {needed}", param=field, code="bits_out_of_range")
    if body.avg_bits is not None:
        if body.min_bits is not None or body.max_bits is not None:
            raise ApiError(400, "avg_bits fixes the budget; leave out min_bits and max_bits", param="avg_bits")
        return body.avg_bits, body.avg_bits
    if body.min_bits is not None and body.max_bits is not None and body.min_bits > body.max_bits:
        raise ApiError(400, f"min_bits {body.min_bits:g} is above max_bits {body.max_bits:g}", param="min_bits")
    return body.min_bits, body.max_bits
