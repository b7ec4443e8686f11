"""Pieces of a text that a tokenizer reads one by one, so that the memory that it takes does not grow with the text."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from itertools import islice

PIECE_CHARS = 1 << 16
"""Most of a text that the tokenizer is given at once.  It takes about 300 bytes of memory for each token."""
_SEARCHED_CHARS = 1 << 12
"""A piece ends in this last part of it."""
_SEAM_CHARS = 128
"""What is compared on each side of a place where a text may be cut."""
_TRIES = 16
_BEFORE_SPACE = re.compile(r"(?<=\S)(?=\s)")


def pieces(text: str, encode: Callable[[str], list[int]]) -> Iterator[str]:
    """Cut a text where no token reaches across, so that the tokens of the pieces are those of the text.

    A tokenizer may put a space before all that it is given, or a text may have no space.  Such a text is cut anyway,
    which changes a token or two at each cut.

    Args:
        text: of any length.
        encode: gives the ids of the tokens of a short text.

    Returns:
        Pieces of at most ``PIECE_CHARS`` characters, which are the text when they are joined.
    """
    start = 0
    while len(text) - start > PIECE_CHARS:
        end = _end(text, start + PIECE_CHARS, encode)
        yield text[start:end]
        start = end
    yield text[start:]


def _end(text: str, last: int, encode: Callable[[str], list[int]]) -> int:
    """The place of the next cut, ``last`` at most."""
    places = [found.start() for found in _BEFORE_SPACE.finditer(text, last - _SEARCHED_CHARS, last)]
    for place in islice(reversed(places), _TRIES):
        before, after = text[place - _SEAM_CHARS : place], text[place : place + _SEAM_CHARS]
        if encode(before + after) == encode(before) + encode(after):
            return place
    return places[-1] if places else last
