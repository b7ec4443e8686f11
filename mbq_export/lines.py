"""Texts of errors and of checkpoints, as one printable line."""

from __future__ import annotations

_LONGEST = 600


def one_line(text: str, longest: int = _LONGEST) -> str:
    """The text on one line, with no character that a terminal obeys.

    Args:
        text: any text.
        longest: number of characters that are kept.
    """
    words = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return words if len(words) <= longest else words[: longest - 4] + " ..."
