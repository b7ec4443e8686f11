"""Prompts: the token ids that a model reads for a text or a conversation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mbq_runtime.bundle.reading import shown
from mbq_runtime.errors import UsageError

from .reasoning import find_marks
from .template import REASONING_FIELDS, Message
from .tokenizer import Tokenizer, refuse_half_characters

Prompt = str | Sequence[int] | Sequence[Message]
"""Text, token ids, or a conversation such as [{"role": "user", "content": "Hello"}]."""


def prompt_ids(
    prompt: Prompt, tokenizer: Tokenizer, *, chat: bool, template_kwargs: Mapping[str, Any] | None
) -> list[int]:
    """The ids of a prompt, whatever its length and whether or not the model has them.

    Args:
        prompt: see ``Engine.generate``.
        tokenizer: of the model.
        chat: see ``Engine.generate``.
        template_kwargs: see ``Engine.generate``.

    Raises:
        UsageError: the prompt is empty, not all of it is messages, or nothing takes ``template_kwargs``.
    """
    if isinstance(prompt, str):
        if not prompt.strip():
            raise UsageError("the prompt is empty; give some text")
        if chat and tokenizer.has_chat_template:
            prompt = [{"role": "user", "content": prompt}]
    if len(prompt) and isinstance(prompt[0], Mapping):
        for message in prompt:
            if not isinstance(message, Mapping):
                raise UsageError(f"the conversation has {shown(message)}, needed messages with role and content")
        ids = tokenizer.encode(rendered(prompt, tokenizer, template_kwargs))  # type: ignore[arg-type]
    elif template_kwargs:
        names = ", ".join(template_kwargs)
        raise UsageError(f"template_kwargs {names}: no chat template renders this prompt; leave them out")
    elif isinstance(prompt, str):
        ids = [*tokenizer.opening_tokens, *tokenizer.encode(prompt)]
    else:
        ids = list(prompt)  # type: ignore[arg-type]
    if not ids:
        raise UsageError("the prompt is empty; give some text, or at least one token")
    return ids


def continued_text(messages: Sequence[Message]) -> str | None:
    """The text that a reply continues: that of a last message of the model.  None: the reply is a new message.

    Args:
        messages: the conversation.
    """
    last = messages[-1] if messages else {}
    text = last.get("content")
    continues = last.get("role") == "assistant" and not last.get("tool_calls") and isinstance(text, str)
    return text if continues else None


def ends_in_text(prompt: Prompt, *, templated: bool) -> bool:
    """Whether a prompt ends in text that the reply continues: a space between them is part of the reply.

    Args:
        prompt: see ``Engine.generate``.
        templated: whether a text is put into the chat template.
    """
    if isinstance(prompt, str):
        return not templated
    return len(prompt) > 0 and isinstance(prompt[-1], Mapping) and bool(continued_text([prompt[-1]]))


def rendered(messages: Sequence[Message], tokenizer: Tokenizer, options: Mapping[str, Any] | None) -> str:
    """Render a conversation, ready for the reply.  A last message of the model is what the reply continues.

    Args:
        messages: each with "role" and "content".
        tokenizer: of the model.
        options: variables of the template.

    Raises:
        BundleError: see ``Tokenizer.chat_prompt``.
        UsageError: see ``Tokenizer.chat_prompt``, or the last message cannot be continued, or a text has half a
            character.
    """
    for message in messages:
        if isinstance(message.get("content"), str):  # a position in the rendered text tells nobody where to look
            refuse_half_characters(message["content"], f"the {message.get('role')}'s text")
    text = continued_text(messages)
    if text is None or (options or {}).get("add_generation_prompt", True) is not True:
        return tokenizer.chat_prompt(messages, options)
    what = "the last message has the role assistant, so the reply would continue it"
    if len(messages) == 1:
        raise UsageError(f"{what}, but nothing comes before it; put a message of the role user first")
    if any(messages[-1].get(name) for name in REASONING_FIELDS):
        raise UsageError(f"{what}; it has reasoning, which cannot come before a begun answer: leave the reasoning out")
    before, marks = tokenizer.chat_prompt(messages[:-1], options), find_marks(tokenizer.template.source())
    if marks is not None and before.rstrip().endswith(marks.opens):
        raise UsageError(
            f"{what}, but this model begins with reasoning; turn that off (enable_thinking: false, if its chat "
            "template has this variable), or leave the message out"
        )
    if marks is not None and text.rfind(marks.opens) > text.rfind(marks.closes):
        raise UsageError(f"{what}; its text ends in reasoning: close it with {marks.closes}, or leave it out")
    return before + text


def checked_ids(tokens: Sequence[int], vocab_size: int) -> NDArray[np.int32]:
    """Token ids as an array.

    Args:
        tokens: at least one id.
        vocab_size: ids are below it.

    Returns:
        int32 [n].

    Raises:
        UsageError: an id is out of range, or no whole number.
    """
    for token in tokens:
        if not isinstance(token, Integral) or not 0 <= int(token) < vocab_size:
            seen = shown(int(token) if isinstance(token, Integral) else token)
            raise UsageError(f"token id {seen}: the model's ids go from 0 to {vocab_size - 1}")
    return np.asarray(tokens, np.int32)
