"""Six kinds of text to measure on, by name.  None of them is calibrated on."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

from ..model.checkpoint import Checkpoint
from ..progress import Report
from . import corpora, replies

ALL = "all"
"""Stands for every text."""

PACKAGED: dict[str, Callable[[], str]] = {
    "wikipedia": partial(corpora.wikipedia, "evaluation"),
    "news": corpora.news,
    "technical": corpora.technical,
    "code": partial(corpora.code, "evaluation"),
}
"""Texts that are the same for every model."""

SAID: dict[str, Callable[[Checkpoint, Report], str]] = {
    kind: partial(replies.held_back, kind) for kind in replies.KINDS
}
"""Texts that the original model itself writes; see ``replies.held_back``."""


def expanded(names: Iterable[str]) -> list[str]:
    """Names of texts, with every text in place of ``all``.  A name that was given twice is kept once.

    Args:
        names: names, files, or ``all``.

    >>> expanded(["all"])
    ['wikipedia', 'news', 'technical', 'code', 'chat', 'conversation']
    """
    found = (known for name in names for known in ([*PACKAGED, *SAID] if name == ALL else [name]))
    return list(dict.fromkeys(found))
