r"""Which regular expressions a tokenizer may have: those whose time grows with the text alone.

The engine of the tokenizers tries one way after another, so an expression such as ``(a+)+b`` takes 2^n steps.  It then
ends the process, or takes minutes.  An expression is a list of alternatives.  Each is plain or known::

    plain: letters and classes, two of them with ? or {m,n}; then one with *, + or {m,}; then only such with ? or *
    known: what published models have beside these

After its * or + a plain alternative cannot fail, so nothing is tried again.
"""

from __future__ import annotations

import re

_MOST_LETTERS = 1024

_ATOM = r"(?:\\[pP]\{\^?\w{1,20}\}|\\[dDsSwWnrt]|\\[^\w\s]|\[(?:\\.|[^\[\]\\])+\]|[^\\\[\](){}|*+?.^$])"
_ENDING = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_PLAIN = re.compile(
    rf"(?:{_ATOM}(?:\{{\d\}})?)*"
    rf"(?:{_ATOM}(?:\?|\{{\d,\d\}})(?:{_ATOM}(?:\{{\d\}})?)*){{0,2}}"
    rf"(?:{_ATOM}(?:\*|\+|\{{\d,\}})(?:{_ATOM}[?*])*)?"
    rf"(?:{re.escape(_ENDING)}\?)?"
)
_ALTERNATIVE = r"(?:\[(?:\\.|[^\[\]\\])*\]|\\.|\((?:\\.|[^()\\])*\)|[^|\\\[\]()])*"
_ALTERNATIVES = re.compile(rf"{_ALTERNATIVE}(?:\|{_ALTERNATIVE})*", re.DOTALL)

_START, _UPPER = r"[^\r\n\p{L}\p{N}]?", r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_KNOWN = {
    _ENDING: "",
    r"\s+(?!\S)": "",
    r"\s*[\r\n]+": r"\s+",
    **{f"{_START}{_UPPER}*{_LOWER}+{end}": f"{_START}{_UPPER}+{_LOWER}*{end}" for end in ("", f"{_ENDING}?")},
}
"""Alternatives that are not plain, and the plain one that takes what they have tried in vain; "" for none."""


def is_quick(expression: str) -> bool:
    r"""Whether an expression takes a time that grows with the text alone.

    Args:
        expression: as in tokenizer.json.

    >>> is_quick(r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    True
    >>> is_quick("(a+)+b"), is_quick("a+b"), is_quick(r"\s*[\r\n]+")
    (False, False, False)
    """
    if len(expression) > _MOST_LETTERS or not _ALTERNATIVES.fullmatch(expression):
        return False
    found = [match.group() for match in re.finditer(rf"(?:(?<=\|)|^){_ALTERNATIVE}", expression, re.DOTALL)]
    return all(_PLAIN.fullmatch(one) or (one in _KNOWN and _KNOWN[one] in (*found, "")) for one in found)
