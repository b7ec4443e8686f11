"""Prompts: the token ids that a model reads for a text or a conversation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

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
        UsageError: the prompt is empty, or nothing takes ``template_kwargs``.
    """
    if isinstance(prompt, str):
        if not prompt.strip():
            raise UsageError("the prompt is empty; give some text")
        if chat and tokenizer.has_chat_template:
            prompt = [{"role": "user", "content": prompt}]
    if prompt and isinstance(prompt[0], Mapping):
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

    Raises:
        UsageError: an id is out of range.
    """
    ids = np.asarray(tokens, np.int64)
    if ids.min() < 0 or ids.max() >= vocab_size:
        bad = int(ids[(ids < 0) | (ids >= vocab_size)][0])
        raise UsageError(f"token id {bad}: the model's ids go from 0 to {vocab_size - 1}")
    return ids.astype(np.int32)
