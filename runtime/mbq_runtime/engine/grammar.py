"""``Grammar``: what a reply may say, and the matcher that holds a reply to it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mbq_runtime.errors import BundleError, GrammarError, UsageError

from .grammar_levels import TooDeepError, check_levels

_SEARCH_S = 0.2  # longest search for the fault of a schema; a client waits for the refusal
_SPACES: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""One way to write each value: a model can fill a reply with spaces where they are free."""


@dataclass(frozen=True)
class Grammar:
    """What a reply may say.

    kind: "json_schema", "regex" or "lark" (the grammars of the package llguidance).
    text: the schema as JSON, the regular expression, or the grammar.

    >>> Grammar.of_schema({"type": "integer"})
    Grammar(kind='json_schema', text='{"type": "integer"}')
    """

    kind: Literal["json_schema", "regex", "lark"]
    text: str

    @staticmethod
    def of_schema(schema: Mapping[str, Any] | bool) -> Grammar:
        """JSON that a schema describes.

        Args:
            schema: a JSON schema; True: any JSON.

        Raises:
            GrammarError: the schema is False, which no value fits.
        """
        if schema is False:
            raise GrammarError("json_schema: no value fits the schema false; give true, or a schema")
        return Grammar("json_schema", json.dumps({} if schema is True else schema))

    @staticmethod
    def of_choices(choices: Sequence[str]) -> Grammar:
        """One of some texts.

        Args:
            choices: the texts.
        """
        return Grammar("lark", "start: " + " | ".join(json.dumps(choice) for choice in choices))


JSON_OBJECT = Grammar.of_schema({"type": "object"})
"""Any object."""


class Grammars:
    """Makes matchers for the tokens of one bundle.

    path: folder of the bundle.
    vocab_size: logits of a token.
    end_tokens: ids that end a reply.

    Raises:
        UsageError: the package llguidance is not installed.
        BundleError: it cannot read the tokenizer.
    """

    def __init__(self, path: Path, vocab_size: int, end_tokens: Sequence[int]) -> None:
        try:
            import llguidance
        except ImportError as error:
            raise UsageError(f"grammars need llguidance ({error}): pip install 'mbq-export[grammar]'") from None
        self._library, self._vocab_size = llguidance, vocab_size
        file = path / "tokenizer.json"
        try:
            self._tokenizer = llguidance.LLTokenizer(str(file), n_vocab=vocab_size, eos_token=list(end_tokens))
        except Exception as error:  # the library raises what its parts raise
            raise BundleError(
                f"{file}: llguidance cannot read it: {_line(str(error))}; leave the grammar out"
            ) from None

    def matcher(self, grammar: Grammar) -> Matcher:
        """A matcher at the start of a reply.

        Args:
            grammar: what the reply may say.

        Raises:
            GrammarError: the grammar is not understood.
        """
        try:
            return Matcher(self._native(grammar), self._vocab_size)
        except TooDeepError as error:  # the whole is at fault
            raise GrammarError(f"{grammar.kind}: {error}") from None
        except ValueError as error:
            where = self._place(grammar) if grammar.kind == "json_schema" else ""
            raise GrammarError(f"{grammar.kind}: {where}{_line(str(error))}") from None

    def _native(self, grammar: Grammar) -> Any:
        """A matcher of the library.  Raises ValueError where the grammar is not understood."""
        check_levels(grammar.kind, grammar.text)
        made = self._library.LLMatcher
        if grammar.kind == "json_schema":
            source = made.grammar_from_json_schema(grammar.text, defaults=_SPACES)
        else:
            source = getattr(made, f"grammar_from_{grammar.kind}")(grammar.text)
        native = made(self._tokenizer, source, log_level=0)
        if native.is_error():
            raise ValueError(native.get_error())
        return native

    def _place(self, grammar: Grammar) -> str:
        """Where the fault of a schema is, such as "at properties.a.type: "; "" where it cannot be found."""

        def understood(schema: Any) -> bool:
            with suppress(ValueError):
                return self._native(Grammar.of_schema(schema)) is not None
            return False

        with suppress(ValueError, RecursionError):
            path = fault_path(json.loads(grammar.text), understood)
            return f"at {path}: " if path else ""
        return ""


def fault_path(schema: Any, understood: Callable[[Any], bool]) -> str:
    """The path of the smallest part of a schema without which it is understood; "" where there is none.

    Args:
        schema: a JSON schema that is not understood.
        understood: whether a schema is understood.

    >>> fault_path({"a": {"b": 1, "c": 2}}, lambda schema: "c" not in json.dumps(schema))
    'a.c'
    """
    path: list[str] = []
    part: Any = schema
    end_s = time.monotonic() + _SEARCH_S
    while isinstance(part, dict | list):
        for key, value in list(part.items() if isinstance(part, dict) else enumerate(part)):
            part[key] = True  # any value
            heals = understood(schema)
            if not heals and isinstance(part, dict):
                del part[key]
                heals = understood(schema)
            part[key] = value
            if heals:
                path.append(str(key))
                part = value
                break
            if time.monotonic() > end_s:
                return ".".join(path)
        else:
            break
    return ".".join(path)


class Matcher:
    """Follows one reply.

    native: a matcher of the package llguidance.
    vocab_size: logits of a token.
    """

    def __init__(self, native: Any, vocab_size: int) -> None:
        self._native, self._vocab_size = native, vocab_size
        self._bits = np.zeros(-(-vocab_size // 32), np.uint32)

    def fork(self) -> Matcher:
        """A matcher in the same state."""
        return Matcher(self._native.deep_copy(), self._vocab_size)

    def allowed(self) -> NDArray[np.bool_]:
        """bool [vocab]: the tokens that may come next.

        Raises:
            GrammarError: the grammar is too complex to follow.
        """
        self._native.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)
        if self._native.is_error():
            raise GrammarError(f"the grammar cannot be followed: {_line(self._native.get_error())}")
        bits = np.unpackbits(self._bits.view(np.uint8), bitorder="little")
        found: NDArray[np.bool_] = bits[: self._vocab_size].view(np.bool_)
        return found

    def accept(self, token: int) -> None:
        """Add a token to the reply.

        Args:
            token: one of those allowed.
        """
        self._native.consume_token(token)


def _line(text: str) -> str:
    return " ".join(text.split())[:200]
