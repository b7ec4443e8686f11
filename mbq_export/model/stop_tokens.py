"""The tokens that end a reply, and whether every token id has a row."""

from __future__ import annotations

from typing import Any

from mbq_runtime.errors import ModelError

PLACEHOLDERS = ("<image_soft_token>", "<audio_soft_token>")
"""Tokens of other media that published text models list without having a row for them."""

_CONTENT = "bVQ7"
"""A reply that no template contains."""


def stop_token_ids(tokenizer: Any, owners: list[Any], rows: int) -> list[int]:
    """Every token id that ends a reply.

    Args:
        tokenizer: transformers' tokenizer.
        owners: objects with an ``eos_token_id``: generation config, tokenizer and config.
        rows: rows of the embedding; an id without a row is left out.

    Returns:
        The configs' ids, then what the chat template closes an assistant's turn with.
    """
    seen: list[int] = []
    for owner in owners:
        ids = getattr(owner, "eos_token_id", None)
        seen += [ids] if isinstance(ids, int) else list(ids or [])
    closing = _closing_token(tokenizer)
    seen += [] if closing is None else [closing]
    return [i for i in dict.fromkeys(seen) if 0 <= i < rows]


def _closing_token(tokenizer: Any) -> int | None:
    """The added token that stands right behind an assistant's reply in the chat template."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _CONTENT}]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False)
    # A template may refuse this conversation in any way it likes; then it names no token here.
    except Exception:
        return None
    _, found, behind = text.rpartition(_CONTENT)
    if not found:
        return None
    behind = behind.lstrip()
    added = {token.content: i for i, token in tokenizer.added_tokens_decoder.items()}
    fitting = [content for content in added if content and behind.startswith(content)]
    return added[max(fitting, key=len)] if fitting else None


def check_rows(tokenizer: Any, rows: int, name: str) -> None:
    """Refuse a tokenizer with a token that the embedding has no row for.

    Args:
        tokenizer: transformers' tokenizer.
        rows: rows of the embedding.
        name: the model's name, for the error.

    Raises:
        ModelError: a token id is too large.
    """
    over = {token: i for token, i in tokenizer.get_vocab().items() if i >= rows and token not in PLACEHOLDERS}
    if over:
        token = min(over, key=lambda one: over[one])
        raise ModelError(
            f"{name}: the tokenizer has {max(over.values()) + 1} tokens, the embedding {rows} rows; "
            f"{token!r} (id {over[token]}) has no row: give the model and the tokenizer that belong together"
        )


def check_stop(tokenizer: Any, owners: list[Any], rows: int, name: str) -> None:
    """Refuse a model whose replies would never end.

    Args:
        tokenizer: as ``stop_token_ids`` takes it.
        owners: as ``stop_token_ids`` takes it.
        rows: as ``stop_token_ids`` takes it.
        name: the model's name, for the error.

    Raises:
        ModelError: no token ends a reply, or an id is no token.
    """
    for owner in owners:
        ids = getattr(owner, "eos_token_id", None)
        listed = ids if isinstance(ids, list) else [] if ids is None else [ids]
        wrong = [i for i in listed if not isinstance(i, int) or isinstance(i, bool) or not i >= 0]
        if wrong:
            raise ModelError(f"{name}: eos_token_id is {wrong[0]!r}; token ids are whole numbers from 0 up")
    if not stop_token_ids(tokenizer, owners, rows):
        raise ModelError(
            f"{name}: no token ends a reply: eos_token_id is missing in config.json and generation_config.json, "
            "and the chat template closes no turn; add eos_token_id to config.json"
        )
