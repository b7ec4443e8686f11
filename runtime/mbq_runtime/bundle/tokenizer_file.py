"""Checks ``tokenizer.json``: one meaning for every reader, quick steps, and steps that make a text little longer.

Steps run one after another, so their growth multiplies: 34 steps that each double a text need gigabytes for a word.
"""

from __future__ import annotations

import base64
import binascii
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import BundleError
from .expressions import is_quick
from .reading import parse_json, read_file

_MOST_BYTES = 64 << 20  # published models have half as much at most
_MOST_PARTS = 6_000_000  # lists, objects and their entries; published models have half as many at most
_MOST_DIGITS = 40
_MOST_STEPS = 16
_MOST_ENTRIES = 64
_MOST_LETTERS = 64
_MOST_GROWTH = 64

_SECTIONS = {
    "normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "post_processor": "processors",
    "decoder": "decoders",
}  # fmt: skip
"""Sections of steps, and where a Sequence holds its steps."""
_AFFIXES = ("continuing_subword_prefix", "end_of_word_suffix")


def check_tokenizer(path: Path) -> None:
    """Check a tokenizer file.

    Args:
        path: the file.

    Raises:
        BundleError: the file cannot be read, is too large, is no strict JSON, or has steps that no model needs.
    """
    data = read_file(path, _MOST_BYTES)
    try:
        if sum(data.count(mark) for mark in (b"[", b"{", b",")) > _MOST_PARTS:
            raise ValueError(f"it has more than {_MOST_PARTS} parts")
        document = parse_json(data, _MOST_DIGITS)
        if not isinstance(document, dict):
            raise ValueError("it is no object")
        for section, inner in _SECTIONS.items():
            _check_section(section, list(_steps(document.get(section), section, inner)))
        model = document.get("model")
        for name in _AFFIXES:
            _check_sizes(f"model.{name}", model.get(name) if isinstance(model, dict) else None)
    except ValueError as error:
        raise BundleError(f"{path}: not a tokenizer to use ({error}); copy or export the bundle again") from None


def _steps(step: Any, section: str, inner: str) -> Iterator[Mapping[str, Any]]:
    """All steps of a section; those of a Sequence in its place."""
    if step is None:
        return
    if not isinstance(step, dict) or not isinstance(step.get("type"), str):
        raise ValueError(f"{section} has a step without a type")
    if inner not in step:
        yield step
        return
    within = step[inner]
    for one in within if isinstance(within, list) else ():
        yield from _steps(one, section, inner)


def _check_section(section: str, steps: list[Mapping[str, Any]]) -> None:
    if len(steps) > _MOST_STEPS:
        raise ValueError(f"{section} has {len(steps)} steps, needed at most {_MOST_STEPS}")
    growth = 1.0
    for step in steps:
        for key, value in step.items():
            if key not in ("pattern", "precompiled_charsmap"):
                _check_sizes(f"{section}: {step['type'][:_MOST_LETTERS]}", value)
        _check_expression(section, step.get("pattern"))
        for name in ("single", "pair"):
            _check_template(section, step.get(name))
        growth *= _growth(section, step)
    if growth > _MOST_GROWTH:
        raise ValueError(f"{section} makes a text {growth:.3g} times longer, needed at most {_MOST_GROWTH}")


def _check_expression(section: str, pattern: Any) -> None:
    expression = pattern.get("Regex") if isinstance(pattern, dict) else None
    if expression is not None and not (isinstance(expression, str) and is_quick(expression)):
        shown = str(expression)[:_MOST_LETTERS]
        raise ValueError(f"{section} has the expression {shown!r}, which is none of those whose time is known")


def _growth(section: str, step: Mapping[str, Any]) -> float:
    """How many times longer a step can make a text."""
    if step["type"] == "ByteLevel":
        return 1 if section in ("decoder", "post_processor") else 2
    if step["type"] == "Precompiled":
        return _longest_mapping(section, step.get("precompiled_charsmap"))
    if step["type"] != "Replace":
        return 1
    content, pattern = step.get("content"), step.get("pattern")
    if not isinstance(content, str) or not isinstance(pattern, dict):
        raise ValueError(f"{section} has a Replace without pattern and content")
    text = pattern.get("String")
    # An expression can match between any two letters.
    return max(1, len(content) / len(text)) if isinstance(text, str) and text else 1 + len(content)


def _longest_mapping(section: str, charsmap: Any) -> float:
    """Length of the longest text that SentencePiece's table puts for a letter: a tree, then texts that end with 0."""
    try:
        table = base64.b64decode(charsmap or "", validate=True)
    except (TypeError, binascii.Error):
        raise ValueError(f"{section} has a table that is not base64") from None
    texts = table[4 + int.from_bytes(table[:4], "little") :]
    return max(1, *(len(text.decode("utf-8", "replace")) for text in texts.split(b"\0")))


def _check_template(section: str, pieces: Any) -> None:
    """A template holds each text once."""
    if not isinstance(pieces, list | None):
        raise ValueError(f"{section} has a template that is no list")
    found = [piece["Sequence"] for piece in pieces or () if isinstance(piece, dict) and "Sequence" in piece]
    twice = Counter(str(one.get("id")) if isinstance(one, dict) else "" for one in found)
    if max(twice.values(), default=0) > 1:
        raise ValueError(f"{section} has a template that repeats the text")


def _check_sizes(where: str, value: Any) -> None:
    if isinstance(value, str) and len(value) > _MOST_LETTERS:
        raise ValueError(f"{where} has a text of {len(value)} letters, needed at most {_MOST_LETTERS}")
    if not isinstance(value, dict | list):
        return
    if len(value) > _MOST_ENTRIES:
        raise ValueError(f"{where} has {len(value)} entries in one place, needed at most {_MOST_ENTRIES}")
    for inner in value.values() if isinstance(value, dict) else value:
        _check_sizes(where, inner)
