"""``Tokenizer``: text to tokens and back, for every kind of engine."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mbq_runtime.errors import BundleError, UsageError

from .imports import engine_errors, import_engine


class Tokenizer:
    """The tokenizer and chat template of a bundle.

    path: folder of the bundle.
    native: a tokenizer of onnxruntime-genai; None to make one of the bundle's files.
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
        """Whether the bundle can render a conversation."""
        if (self.path / "chat_template.jinja").is_file():
            return True
        config = self.path / "tokenizer_config.json"
        return config.is_file() and "chat_template" in json.loads(config.read_bytes())

    def encode(self, text: str) -> list[int]:
        """The token ids of a text, without opening tokens.

        Args:
            text: any text without a NUL character.

        Raises:
            UsageError: the text has a NUL character.
        """
        _check_text(text)
        with engine_errors(f"{self.path}: the tokenizer failed"):
            return [int(token) for token in self._native.encode(text)]

    def chat_prompt(self, messages: Sequence[Mapping[str, str]]) -> str:
        """Render a conversation, ready for the reply.

        Args:
            messages: each with "role" and "content".

        Raises:
            BundleError: the bundle has no chat template.
        """
        if not self.has_chat_template:
            raise BundleError(f"{self.path}: the bundle has no chat template; pass the text with chat=False")
        for message in messages:
            _check_text(message.get("content", ""))
        with engine_errors(f"{self.path}: chat_template.jinja cannot be rendered"):
            text: str = self._native.apply_chat_template(json.dumps(list(messages)), add_generation_prompt=True)
        return text

    def stream(self) -> Callable[[int], str]:
        """A function that takes the tokens of a reply in order, and returns the text that each one completes."""
        decode: Callable[[int], str] = self._native.create_stream().decode
        return decode


def _check_text(text: str) -> None:
    """Refuse a NUL character: the tokenizer takes C strings, and would drop the text after it."""
    if "\0" in text:
        raise UsageError(f"text has a NUL character at position {text.index(chr(0))}; remove it")


def _leading_token(tokenizer: Any) -> int | None:
    """The token that the tokenizer puts before every text, if there is one."""
    plain = list(tokenizer.encode("a"))
    tokenizer.update_options(add_special_tokens="true")
    full = list(tokenizer.encode("a"))
    tokenizer.update_options(add_special_tokens="false")
    opening = full[: len(full) - len(plain)]
    return int(opening[0]) if opening and full[len(opening) :] == plain else None
