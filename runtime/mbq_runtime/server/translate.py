"""Helpers that turn requests of other formats into chat completions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .errors import ApiError


def refuse(param: str, reason: str) -> ApiError:
    """An error for a field.

    Args:
        param: its path.
        reason: what is wrong, and what is needed.
    """
    return ApiError(400, f"{param}: {reason}", param=param, code="unsupported")


class Fields:
    """The fields of a body.  Those that nobody takes, and that would change a reply, are refused.

    data: the body.
    no_effect: names of fields that change no reply.
    """

    def __init__(self, data: Mapping[str, Any], no_effect: Sequence[str]) -> None:
        self._rest = {name: value for name, value in data.items() if name not in no_effect}

    def take(self, name: str) -> Any:
        """A field; None where it is missing.

        Args:
            name: its name.
        """
        return self._rest.pop(name, None)

    def refuse_rest(self) -> None:
        """Refuse what is left.

        Raises:
            ApiError: a field with a value was not taken.
        """
        for name, value in self._rest.items():
            if value not in (None, False, [], {}, ""):
                raise refuse(name, "not supported by this server; leave it out")


def text_of(content: Any, where: str, kinds: Sequence[str]) -> str:
    """The text of a content, which can come in parts.

    Args:
        content: a text, or parts.
        where: its path.
        kinds: types of parts that are text.

    Raises:
        ApiError: a part is no text.
    """
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise refuse(where, "needed a text, or parts of text")
    for at, part in enumerate(content):
        if not isinstance(part, dict) or part.get("type") not in kinds or not isinstance(part.get("text"), str):
            raise refuse(f"{where}.{at}", f"needed a part of type {' or '.join(kinds)}")
    return "".join(part["text"] for part in content)
