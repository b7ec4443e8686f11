"""``Tokenizer``: text to tokens and back, for every kind of engine.

The library is that of Hugging Face, which also reads the tokenizer at the export: a bundle's tokens are the model's.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from mbq_runtime.errors import BundleError, UsageError

from .template import ChatTemplate, Message

_SURROGATE = re.compile("[\ud800-\udfff]")
_UNDECODED = range(0xDC80, 0xDD00)  # what Python makes of a byte that it cannot decode
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"  # what a decoder gives for bytes that are not yet a character

_LOOKS_BACK = 8  # tokens

_LONGEST_CHARACTER = 4  # bytes of UTF-8
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # a space, in vocabularies with byte fallback


def _byte_names() -> dict[str, bytes]:
    """The byte for which each character of a byte-level vocabulary stands."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    names = {chr(byte): bytes([byte]) for byte in printable}
    return names | {chr(0x100 + i): bytes([byte]) for i, byte in enumerate(others)}


_BYTES = _byte_names()


def opening(full: Sequence[int], plain: Sequence[int]) -> list[int]:
    """The tokens that a tokenizer puts before a text.

    Some also put a token behind it.  A prompt goes on, so it gets none.

    Args:
        full: the tokens of a text, with what the tokenizer adds.
        plain: those of the text alone.
    """
    begins = (at for at in range(len(full) - len(plain) + 1) if full[at : at + len(plain)] == plain)
    return list(full[: next(begins, 0)])


def refuse_half_characters(text: str, what: str = "text") -> None:
    """Refuse a text that UTF-8 cannot express.

    Args:
        text: any text.
        what: names it in the message.

    Raises:
        UsageError: the text has half a character.
    """
    half = _SURROGATE.search(text)
    if half is None:
        return
    code, remedy = ord(half[0]), "remove it"
    if code in _UNDECODED and (locale := sys.getfilesystemencoding()) != "utf-8":
        # Python gives bytes of arguments that the locale does not have as half characters.
        remedy = f"the locale has the encoding {locale}: set PYTHONUTF8=1, or a UTF-8 locale"
    raise UsageError(f"{what} has U+{code:04X}, half a character, at position {half.start()}; {remedy}")


class Tokenizer:
    """The tokenizer and chat template of a bundle.

    path: folder of the bundle.

    Raises:
        BundleError: a file of the tokenizer cannot be read.
        UsageError: the package tokenizers is not installed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._native = _read(path / "tokenizer.json")
        self.template = ChatTemplate(path)
        self._special = frozenset(i for i, token in self._native.get_added_tokens_decoder().items() if token.special)
        names = (self._native.token_to_id(f"<0x{byte:02X}>") for byte in range(256))
        # The vocabulary's characters stand for bytes.
        self._spells_bytes = "ByteLevel" in repr(self._native.decoder)
        self._bytes = frozenset(token for token in names if token is not None)

    @cached_property
    def opening_tokens(self) -> list[int]:
        """What the tokenizer puts before every text: often [bos], or nothing."""
        plain = self.encode("a")
        with _library_errors(f"{self.path}: the tokenizer fails for a letter"):
            full = self._native.encode("a", add_special_tokens=True).ids
        return opening(full, plain)

    @property
    def has_chat_template(self) -> bool:
        """Whether the bundle can render a conversation."""
        return self.template.exists

    def encode(self, text: str) -> list[int]:
        """The token ids of a text, without opening tokens.

        Args:
            text: any text.

        Raises:
            UsageError: the text has half a character, which UTF-8 cannot express.
        """
        refuse_half_characters(text)
        with _library_errors(f"{self.path}: the tokenizer fails for this text"):
            return list(self._native.encode(text, add_special_tokens=False).ids)

    def spell(self, token: int) -> bytes:
        """The bytes of a token, which need not be whole characters.

        Args:
            token: its id.
        """
        name: str = self._native.id_to_token(token) or ""
        if token in self._special:
            return name.encode()
        if self._spells_bytes:
            return b"".join(_BYTES[c] if c in _BYTES else c.encode() for c in name)
        if token in self._bytes:
            return bytes([int(name[3:5], 16)])
        return name.replace(_SPACE, " ").encode()

    def chat_prompt(self, messages: Sequence[Message], options: Mapping[str, Any] | None = None) -> str:
        """Render a conversation, ready for the reply.

        Args:
            messages: each with "role" and "content".
            options: variables of the template.

        Raises:
            BundleError: the bundle has no chat template, or one that fails or takes too much time or memory.
            UsageError: the template refuses the conversation, or does not know an option.
        """
        return self.template.render(messages, options)

    def token_id(self, text: str) -> int | None:
        """The id of the token that stands for a text; None where no single one does.

        Args:
            text: its whole text, special or not.
        """
        ids = self.encode(text)
        return ids[0] if len(ids) == 1 else None

    def special_id(self, text: str) -> int | None:
        """The id of a special token; None where the text is none.

        Args:
            text: its whole text.
        """
        token: int | None = self._native.token_to_id(text)
        return token if token in self._special else None

    def has_text(self, token: int) -> bool:
        """Whether a token is part of the text of a reply: special ones are not.

        Args:
            token: its id.
        """
        return token not in self._special

    def stream(self, shown: Sequence[str] = (), after: Sequence[int] = ()) -> TextStream:
        """The text of a reply, token by token.

        Args:
            shown: special tokens whose text is part of it.
            after: ids of the text that the reply continues.  Many decoders remove the space before a first word.
        """
        ids = {self.special_id(text): text for text in shown}
        return TextStream(
            self._native, self._special, self._bytes, {token: text for token, text in ids.items() if token is not None},
            self._last_text(after),
        )  # fmt: skip

    def _last_text(self, tokens: Sequence[int]) -> list[int]:
        """The last tokens of a text, as far as a decoder needs them.  They begin with a whole character or word."""
        start = len(tokens)
        while start:
            start -= 1
            if (
                len(tokens) - start >= _LOOKS_BACK
                and tokens[start] not in self._bytes
                and tokens[start] not in self._special
            ):
                break
        return list(tokens[start:])


class TextStream:
    """Decodes the tokens of one reply as they come.  The pieces together are the text of all tokens decoded at once.

    Text waits while it may still change: after an incomplete character, and after a token of one byte.  Where a run of
    such tokens is not UTF-8, the decoder replaces all of it.

    Args:
        native: a tokenizer of the package tokenizers.
        special: ids that have no text.
        bytes: ids of tokens that stand for one byte, in vocabularies with byte fallback.
        shown: text of those special tokens that have text all the same.
        after: ids of the end of the text that the reply continues.
    """

    def __init__(
        self, native: Any, special: frozenset[int], bytes: frozenset[int], shown: Mapping[int, str] | None = None,
        after: Sequence[int] = (),
    ) -> None:  # fmt: skip
        self._native, self._special, self._bytes, self._shown = native, special, bytes, shown or {}
        # Decoders look at the tokens before: the last ones that gave text stay in the window.
        self._window: list[int] = []
        self._given = 0  # tokens of the window whose text is given
        self._given_text = ""
        if after:
            self._window = list(after)
            text = self._decode()
            if text.endswith(_INCOMPLETE):  # nothing tells where its character would begin
                self._window = []
            else:
                self._given, self._given_text = len(self._window), text

    def add(self, token: int) -> str:
        """The text that a token completes, often "".

        Args:
            token: its id.
        """
        if token in self._shown:
            return self.rest() + self._shown[token]
        if token in self._special:
            return ""
        self._window.append(token)
        if token in self._bytes:
            return ""
        text = self._decode()
        return self._take(text) if not text.endswith(_INCOMPLETE) else self._sure(text)

    def _sure(self, text: str) -> str:
        """The text of waiting tokens that no later one can complete.  So the window stays short.

        text: of the window.
        """
        waiting = len(self._window) - self._given
        if self._bytes or waiting <= _LONGEST_CHARACTER:
            return ""
        for count in range(_LONGEST_CHARACTER - 1, 0, -1):  # the start of a character is shorter
            window, last = self._window, self._window[-count:]
            self._window = window[:-count]
            sure = self._decode()
            self._window = last
            if text == sure + self._decode():
                self._given, given = 0, len(self._given_text)
                self._given_text = ""
                return sure[given:]
            self._window = window
        return ""

    def rest(self) -> str:
        """The text that still waits.  Incomplete characters are replaced, as nothing will complete them."""
        return self._take(self._decode())

    def _take(self, text: str) -> str:
        new = text[len(self._given_text) :]
        if new:
            del self._window[: self._given]
            self._given, self._given_text = len(self._window), self._decode()
        return new

    def _decode(self) -> str:
        with _library_errors("the tokenizer fails for the tokens of the reply"):
            text: str = self._native.decode(self._window, skip_special_tokens=True)
        return text


@contextmanager
def _library_errors(what: str) -> Iterator[None]:
    """The library raises Exception itself, and a BaseException where its own code fails."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        reason = " ".join(str(error).split())[:200]
        raise BundleError(f"{what}: {reason}; check the files with mbq verify") from None


def _read(file: Path) -> Any:
    try:
        from tokenizers import Tokenizer as Native
    except ImportError as error:
        raise UsageError(f"tokenizers cannot be imported ({error}): pip install tokenizers") from None
    with _library_errors(f"{file}: the tokenizer cannot be loaded"):
        native = Native.from_file(str(file))
    native.no_padding()
    native.no_truncation()
    return native
