"""Shows texts of strangers on a terminal: no character of them can move the cursor, change the title or hide text."""

from __future__ import annotations

_LONGEST = 4000

# Text of a model keeps its lines, and the marks of languages that are written from right to left.
_CONTROLS = {code: "\N{REPLACEMENT CHARACTER}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


def printable(text: str) -> str:
    """A text of a manifest, an error or a server as one line.

    Args:
        text: any text.  What cannot be printed is shown as an escape such as ``\\x1b``, runs of blanks as one space.

    Returns:
        At most 4000 characters and a note of how many are left out.

    >>> printable("a\\x1b]0;title\\x07 \\n b\\u202e")
    'a\\\\x1b]0;title\\\\x07 b\\\\u202e'
    """
    shown = "".join(c if c.isprintable() else _escaped(c) for c in " ".join(text[: 2 * _LONGEST].split()))
    left_out = len(text) - len(text[: 2 * _LONGEST]) + max(len(shown) - _LONGEST, 0)
    return f"{shown[:_LONGEST]} ... ({left_out} characters left out)" if left_out else shown


def without_controls(text: str) -> str:
    """A reply of a model for a terminal: control characters but line ends and tabs are replaced.

    Args:
        text: any text.

    >>> without_controls("a\\x9b2J\\n")
    'a�2J\\n'
    """
    return text.translate(_CONTROLS)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape", "backslashreplace").decode("ascii")
