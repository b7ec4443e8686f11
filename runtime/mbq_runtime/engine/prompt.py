"""Prompts: the token ids that a model reads for a text or a conversation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mbq_runtime.bundle.reading import shown
from mbq_runtime.errors import UsageError

from .template import Message
from .tokenizer import Tokenizer

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
        ids = tokenizer.encode(tokenizer.chat_prompt(prompt, template_kwargs))  # type: ignore[arg-type]
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
