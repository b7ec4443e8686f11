"""Text to tokens and back, the same whatever runs the model."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mbq_runtime.errors import BundleError, UsageError

from .imports import engine_errors, import_engine


class Tokenizer:
    """The tokenizer and chat template of the bundle in ``path``.

    native: onnxruntime-genai's object where one is at hand, else it is made of the bundle's files.
    """

    def __init__(self, path: Path, native: Any = None) -> None:
        self.path = path
        with engine_errors(f"{path}: the tokenizer cannot be loaded"):
            self._native = native or import_engine("onnxruntime_genai").Tokenizer(str(path))
            self._bos = _leading_token(self._native)

    @property
    def opening_tokens(self) -> list[int]:
        """What the tokenizer puts before every text: [bos] or nothing."""
        return [] if self._bos is None else [self._bos]

    @property
    def has_chat_template(self) -> bool:
        if (self.path / "chat_template.jinja").is_file():
            return True
        config = self.path / "tokenizer_config.json"
        return config.is_file() and "chat_template" in json.loads(config.read_bytes())

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``, without opening tokens.  Raises UsageError for a text with a NUL character."""
        _check_text(text)
        with engine_errors(f"{self.path}: the tokenizer failed"):
            return [int(token) for token in self._native.encode(text)]

    def chat_prompt(self, messages: Sequence[Mapping[str, str]]) -> str:
        """A conversation, ready for the reply.  Raises BundleError without a template."""
        if not self.has_chat_template:
            raise BundleError(f"{self.path}: the bundle has no chat template; pass the text with chat=False")
        for message in messages:
            _check_text(message.get("content", ""))
        with engine_errors(f"{self.path}: chat_template.jinja cannot be rendered"):
            text: str = self._native.apply_chat_template(json.dumps(list(messages)), add_generation_prompt=True)
        return text

    def stream(self) -> Callable[[int], str]:
        """A function from a reply's tokens, one after the other, to their text; "" until a character is whole."""
        decode: Callable[[int], str] = self._native.create_stream().decode
        return decode


def _check_text(text: str) -> None:
    """The tokenizer takes C strings: what follows a NUL character would be lost without a word."""
    if "\0" in text:
        raise UsageError(f"text has a NUL character at position {text.index(chr(0))}; remove it")


def _leading_token(tokenizer: Any) -> int | None:
    """The token the tokenizer's files say every text begins with, if they say so."""
    plain = list(tokenizer.encode("a"))
    tokenizer.update_options(add_special_tokens="true")
    full = list(tokenizer.encode("a"))
    tokenizer.update_options(add_special_tokens="false")
    opening = full[: len(full) - len(plain)]
    return int(opening[0]) if opening and full[len(opening) :] == plain else None
