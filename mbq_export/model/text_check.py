"""Whether the board makes the prompts and reads the tokens as transformers does: checked on the files of the bundle."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mbq_runtime.bundle.check import check_tokenizer_files
from mbq_runtime.engine.template import TemplateLimitError
from mbq_runtime.engine.tokenizer import Tokenizer
from mbq_runtime.errors import MbqError, ModelError

_TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a place.\nIt says °C.",
        "parameters": {
            "type": "object",
            "properties": {"place": {"type": "string", "description": "a town <name>"}},
            "required": ["place"],
        },
    },
}
_CALL = {"id": "call12345", "type": "function", "function": {"name": "get_weather", "arguments": {"place": "Köln"}}}
_USER = {"role": "user", "content": "  Hi & welcome, <you>!\n"}
_SYSTEM = {"role": "system", "content": 'Be brief. "Quote" it\'s 日本.'}
_PARTS = [{"type": "text", "text": "part 1, "}, {"type": "text", "text": "part 2"}]
_THOUGHTS = {"role": "assistant", "content": "<think>\nwhat now?\n</think>\n\nHello.\n"}

CONVERSATIONS: Mapping[str, tuple[Sequence[Mapping[str, Any]], Mapping[str, Any]]] = {
    "one turn": ([_USER], {}),
    "a system message and a turn": ([_SYSTEM, _USER], {}),
    "two turns": ([_USER, {"role": "assistant", "content": " Hello. "}, _USER], {}),
    "two turns with thoughts": ([_USER, _THOUGHTS, {"role": "user", "content": "And?"}], {}),
    "a list of tools": ([_USER], {"tools": [_TOOL]}),
    "a tool call and its result": (
        [
            _USER,
            {"role": "assistant", "content": None, "tool_calls": [_CALL]},
            {"role": "tool", "name": "get_weather", "tool_call_id": "call12345", "content": "12 °C"},
        ],
        {"tools": [_TOOL]},
    ),
    "turns in the wrong order": ([_USER, _USER, _SYSTEM], {}),
    "content in parts": ([{"role": "user", "content": _PARTS}], {}),
}
"""Messages and options of each standard conversation.  A template may refuse some of them."""

TEXTS = (
    "Hello wörld, it's 3.14159 or 2024-01-02.",
    "def f(x):\n    if x:\n\n\n        return [1, 22, 333]\t# four    spaces\r\n",
    "日本語と中文 한국어 עברית العربية ไทย हिन्दी",
    "🙂👩‍👩‍👧 🇩🇪 ½ ﬁ é é \u00a0\u2009\u200b 𝔘𝔫𝔦",
    " a  b   c    d        e\n\n\n 12\n\n34 ",
)
"""Texts that tokenizers treat in different ways."""


def check_text(tokenizer: Any, name: str) -> None:
    """Refuse a model whose prompts or tokens would differ on the board.  Needs no weights.

    Args:
        tokenizer: transformers' tokenizer of the model.
        name: name of the model, for messages.

    Raises:
        ModelError: a conversation or a text comes out differently; the message names it.
    """
    with tempfile.TemporaryDirectory(prefix="mbq-tokenizer-") as folder:
        tokenizer.save_pretrained(folder)
        try:
            check_tokenizer_files(Path(folder))
            board = Tokenizer(Path(folder))
        except MbqError as error:
            raise ModelError(f"{name}: a board cannot read its tokenizer: {without_folder(folder, error)}") from None
        if board.has_chat_template:
            for what, (messages, options) in CONVERSATIONS.items():
                _check_conversation(tokenizer, board, f"{name}: the chat template", what, messages, options)
        for text in TEXTS:
            _check_tokens(tokenizer, board, name, text)


def _check_conversation(
    tokenizer: Any,
    board: Tokenizer,
    where: str,
    what: str,
    messages: Sequence[Mapping[str, Any]],
    options: Mapping[str, Any],
) -> None:
    # The board's side comes first: transformers has no limits, and a hostile template would not return.
    try:
        ours, reason = board.template.render(messages, options, strict=False), ""
    except TemplateLimitError as error:
        raise ModelError(f"{where} cannot be used: {without_folder(str(board.path), error)}") from None
    except MbqError as error:
        ours, reason = None, without_folder(str(board.path), error)
    try:
        theirs = tokenizer.apply_chat_template(
            [dict(message) for message in messages], tokenize=False, add_generation_prompt=True, **options
        )
    # A template raises whatever it meets in a conversation that it does not expect.
    except Exception as error:
        theirs, reason = None, reason or (str(error).splitlines() or [type(error).__name__])[0]
    if ours != theirs:
        shown = f"it gives {_first_difference(ours, theirs)}" if ours and theirs else f"one of them fails: {reason}"
        raise ModelError(f"{where} differs between the board and transformers for {what}: {shown}; report this model")
    if ours is None and what == "one turn":
        raise ModelError(f"{where} fails for {what}: {reason}; repair it, or remove it")


def _first_difference(ours: str, theirs: str) -> str:
    at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    return f"{ours[at : at + 20]!r} for {theirs[at : at + 20]!r} at character {at}"


def _check_tokens(tokenizer: Any, board: Tokenizer, name: str, text: str) -> None:
    theirs = list(tokenizer.encode(text, add_special_tokens=False))
    if board.encode(text) != theirs:
        raise ModelError(f"{name}: the board would read {text!r} as other tokens than transformers; report this model")
    stream = board.stream()
    shown = "".join(stream.add(token) for token in theirs) + stream.rest()
    whole = tokenizer.decode(theirs, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    if shown != whole:
        raise ModelError(
            f"{name}: the board would show the tokens of {text!r} as {shown!r}, transformers as {whole!r}; "
            "report this model"
        )


def without_folder(folder: str, error: MbqError) -> str:
    """The message of an error, without the temporary folder.

    Args:
        folder: the temporary folder.
        error: an error that names a file in it.
    """
    return str(error).replace(f"{folder}/", "").removeprefix(f"{folder}: ")
