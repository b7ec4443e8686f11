"""Replies in the format of OpenAI's chat and text completions."""

from __future__ import annotations

import codecs
import math
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any, ClassVar
from uuid import uuid4

from mbq_runtime.engine.reasoning import Marks, Thought

from .divide import Divider
from .errors import ApiError
from .replies import event, joined
from .tool_format import Call, ToolFormat
from .worker import Job, Part, Result


class _Choices:
    """The common part: choices, one for each reply, within an envelope.

    Args:
        model: name of the model.
        spell: returns the bytes of a token, by its id.
        with_usage: whether a stream ends with a chunk of the counts.
    """

    PREFIX: ClassVar[str]
    OBJECT: ClassVar[str]
    CHUNK: ClassVar[str]

    def __init__(self, model: str, spell: Callable[[int], bytes], *, with_usage: bool = False) -> None:
        self._spell, self._with_usage = spell, with_usage
        self._same = {"id": f"{self.PREFIX}-{uuid4().hex}", "created": int(time.time()), "model": model}

    def first(self) -> dict[str, Any] | None:
        """The choice of the first chunk of a stream; None: no such chunk."""
        return None

    def part(self, part: Part, *, last: bool = False) -> dict[str, Any]:
        """The choice of a chunk.

        Args:
            part: what the chunk has.
            last: whether the reply ends with it.
        """
        raise NotImplementedError

    def whole(self, part: Part) -> dict[str, Any]:
        """The choice of a reply that is not streamed.

        Args:
            part: all of the reply.
        """
        raise NotImplementedError

    def reason(self, reply: int, reason: str) -> str:
        """Why a reply ended, in the words of the API; after its last part.

        Args:
            reply: its number.
            reason: why the engine ended it.
        """
        return reason

    def likelihoods(self, part: Part) -> dict[str, Any] | None:
        """The field ``logprobs`` of a choice; None where nobody asked.

        Args:
            part: what the choice has.
        """
        raise NotImplementedError

    def envelope(self, kind: str, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        """The JSON object around choices.

        Args:
            kind: value of its field ``object``.
            choices: the choices; missing fields get their default.
            more: additional fields.
        """
        filled = [{"index": 0, "logprobs": None, "finish_reason": None, **choice} for choice in choices]
        return {**self._same, "object": kind, "choices": filled, **more}

    def document(self, parts: Sequence[Part], result: Result) -> dict[str, Any]:
        """See ``replies.Shape``.

        Args:
            parts: all of them.
            result: the figures.
        """
        choices = []
        for reply, reason in enumerate(result.finish_reasons):
            part = joined(reply, parts)
            choice = self.whole(part) | {"finish_reason": self.reason(reply, reason)}
            choices.append(choice | self._about(part))
        return self.envelope(self.OBJECT, choices, usage=usage(result))

    async def events(self, job: Job) -> AsyncGenerator[bytes, None]:
        """See ``replies.Shape``.

        Args:
            job: whose parts are read.
        """
        begun = set[int]()
        for choice in self._opening(0, begun):
            yield event(self.envelope(self.CHUNK, [choice]))
        try:
            async for part in job.parts():
                for choice in self._opening(part.reply, begun):
                    yield event(self.envelope(self.CHUNK, [choice]))
                choice = self.part(part)
                if part.likelihoods or any(choice.get("delta", choice).values()):  # not what is held back
                    yield event(self.envelope(self.CHUNK, [choice | self._about(part)]))
        except ApiError as error:  # the status was already sent
            yield event(error.body())
            return
        result = job.result
        for reply, reason in enumerate(result.finish_reasons):
            for choice in self._opening(reply, begun):
                yield event(self.envelope(self.CHUNK, [choice]))
            rest = self.part(Part(reply, ""), last=True)
            if rest.get("delta"):
                yield event(self.envelope(self.CHUNK, [{**rest, "index": reply}]))
                rest = {"delta": {}}
            end = {"index": reply, "finish_reason": self.reason(reply, reason)}
            yield event(self.envelope(self.CHUNK, [rest | end]))
        if self._with_usage:
            yield event(self.envelope(self.CHUNK, [], usage=usage(result)))
        yield b"data: [DONE]\n\n"

    def _opening(self, reply: int, begun: set[int]) -> list[dict[str, Any]]:
        """The choice before the first text of a reply; nothing for a reply that has begun."""
        first = self.first()
        if first is None or reply in begun:
            return []
        begun.add(reply)
        return [{**first, "index": reply}]

    def _about(self, part: Part) -> dict[str, Any]:
        return {"index": part.reply, "logprobs": self.likelihoods(part)}


class ChatShape(_Choices):
    """The format of /v1/chat/completions."""

    PREFIX, OBJECT, CHUNK = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(
        self,
        model: str,
        spell: Callable[[int], bytes],
        marks: Marks | None = None,
        tool_format: ToolFormat | None = None,
        *,
        with_usage: bool = False,
    ) -> None:
        """See ``_Choices``.

        Args:
            model: name of the model.
            spell: returns the bytes of a token, by its id.
            marks: around the reasoning; None: the model has none.
            tool_format: how the model writes calls of tools; None: a reply has none.
            with_usage: whether a stream ends with a chunk of the counts.
        """
        super().__init__(model, spell, with_usage=with_usage)
        self._marks, self._tool_format = marks, tool_format
        self._dividers: dict[int, Divider] = {}

    def first(self) -> dict[str, Any]:
        return {"delta": {"role": "assistant", "content": ""}}

    def part(self, part: Part, *, last: bool = False) -> dict[str, Any]:
        before = self._calls(part.reply)
        thought, text, calls = self._divided(part, last)
        delta: dict[str, Any] = {"reasoning_content": thought} if thought else {}
        if text:
            delta["content"] = text
        if calls:
            delta["tool_calls"] = [call.as_json(before + at) for at, call in enumerate(calls)]
        return {"delta": delta}

    def whole(self, part: Part) -> dict[str, Any]:
        thought, text, calls = self._divided(part, last=True)
        message: dict[str, Any] = {"role": "assistant", "content": text}
        if thought:
            message["reasoning_content"] = thought
        if calls:
            message |= {"content": text or None, "tool_calls": [call.as_json() for call in calls]}
        return {"message": message}

    def reason(self, reply: int, reason: str) -> str:
        return "tool_calls" if self._calls(reply) and reason == "stop" else reason

    def _calls(self, reply: int) -> int:
        """Calls of a reply so far."""
        return self._dividers[reply].calls if reply in self._dividers else 0

    def _divided(self, part: Part, last: bool) -> tuple[str, str, list[Call]]:
        """Reasoning, text and calls that are complete."""
        divider = self._dividers.setdefault(part.reply, Divider(self._marks, self._tool_format))
        found = divider.feed(part.text, last=last)
        thoughts = [one for one in found if isinstance(one, Thought)]
        texts = [one for one in found if isinstance(one, str) and not isinstance(one, Thought)]
        return "".join(thoughts), "".join(texts), [one for one in found if isinstance(one, Call)]

    def likelihoods(self, part: Part) -> dict[str, Any] | None:
        if not part.likelihoods:
            return None

        def entry(token: int, logprob: float) -> dict[str, Any]:
            spelled = self._spell(token)
            return {"token": spelled.decode(errors="replace"), "logprob": logprob, "bytes": list(spelled)}

        content = [
            {**entry(one.token, one.logprob), "top_logprobs": [entry(*likely) for likely in one.top]}
            for one in part.likelihoods
        ]
        return {"content": content, "refusal": None}


class CompletionShape(_Choices):
    """The format of /v1/completions."""

    PREFIX, OBJECT, CHUNK = "cmpl", "text_completion", "text_completion"

    def __init__(
        self,
        model: str,
        spell: Callable[[int], bytes],
        *,
        with_usage: bool = False,
        has_text: Callable[[int], bool] = lambda token: True,
    ) -> None:
        """See ``_Choices``.

        Args:
            model: name of the model.
            spell: returns the bytes of a token, by its id.
            with_usage: whether a stream ends with a chunk of the counts.
            has_text: whether a token is part of the text, by its id.
        """
        super().__init__(model, spell, with_usage=with_usage)
        self._has_text = has_text
        self._offsets: dict[int, int] = {}  # characters of each reply whose tokens were reported
        self._decoders: dict[int, codecs.IncrementalDecoder] = {}  # a character may be several tokens

    def part(self, part: Part, *, last: bool = False) -> dict[str, Any]:
        return {"text": part.text}

    whole = part

    def likelihoods(self, part: Part) -> dict[str, Any] | None:
        if not part.likelihoods:
            return None
        found: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for one in part.likelihoods:
            text = self._spell(one.token).decode(errors="replace")
            found["tokens"].append(text)
            first = math.isnan(one.logprob)  # of the prompt: nothing is before it
            found["token_logprobs"].append(None if first else one.logprob)
            # Bytes that are no character look the same: the likeliest of them stays.
            likely = ((self._spell(token).decode(errors="replace"), value) for token, value in reversed(one.top))
            found["top_logprobs"].append(None if first else dict(likely))
            found["text_offset"].append(self._offsets.setdefault(part.reply, 0))
            decoder = self._decoders.setdefault(part.reply, codecs.getincrementaldecoder("utf-8")("replace"))
            if self._has_text(one.token):
                self._offsets[part.reply] += len(decoder.decode(self._spell(one.token)))
        return found


def usage(result: Result) -> dict[str, Any]:
    """OpenAI's counts, average bits, speed (null for one token) and energy in J (null without a power sensor).

    Args:
        result: figures of the reply.
    """
    return {
        "prompt_tokens": result.prompt_tokens,
        "completion_tokens": result.completion_tokens,
        "total_tokens": result.prompt_tokens + result.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": result.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": result.reasoning_tokens},
        "avg_bits": round(result.avg_bits, 3),
        "energy_j": None if result.energy_j is None else round(result.energy_j, 3),
        "tokens_per_s": None if result.tokens_per_s is None else round(result.tokens_per_s, 2),
        "ttft_s": round(result.ttft_s, 4),
    }
