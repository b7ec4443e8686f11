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


_NAMES: dict[type, str] = {str: "a text", list: "a list", dict: "an object"}


def objects(values: Any, where: str) -> list[tuple[str, dict[str, Any]]]:
    """The objects of a list, each with its path.

    Args:
        values: the list.
        where: its path.

    Raises:
        ApiError: it is no list of objects.
    """
    if not isinstance(values, list):
        raise refuse(where, "needed a list")
    for at, value in enumerate(values):
        if not isinstance(value, dict):
            raise refuse(f"{where}.{at}", "needed an object")
    return [(f"{where}.{at}", value) for at, value in enumerate(values)]


class Fields:
    """The fields of a body.  Those that nobody takes, and that would change a reply, are refused.

    data: the body.
    no_effect: names of fields that change no reply.
    """

    def __init__(self, data: Mapping[str, Any], no_effect: Sequence[str]) -> None:
        self._rest = {name: value for name, value in data.items() if name not in no_effect}

    def take(self, name: str, *kinds: type) -> Any:
        """A field; None where it is missing or empty.

        Args:
            name: its name.
            kinds: types that it may have; none for every type.

        Raises:
            ApiError: it has another type.
        """
        value = self._rest.pop(name, None)
        if value is not None and kinds and not isinstance(value, kinds):
            raise refuse(name, f"needed {' or '.join(_NAMES[kind] for kind in kinds)}")
        return value

    def objects(self, name: str) -> list[tuple[str, dict[str, Any]]]:
        """The objects of a list, each with its path; none where the field is missing.

        Args:
            name: of the field.

        Raises:
            ApiError: it is no list of objects.
        """
        return objects(self.take(name, list) or [], name)

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
