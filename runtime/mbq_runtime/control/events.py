"""What happened to the budget and why, as data; a file of it as JSON lines."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from mbq_runtime.errors import UsageError
from mbq_runtime.sensing.readings import Readings

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Event:
    """A change of the budget, or a word about the sensors.

    time_s: since 1970; old, new: average bits, the same for a word; reason: in words; readings: what
    was known then.
    """

    time_s: float
    old: float
    new: float
    reason: str
    readings: Readings

    @property
    def is_change(self) -> bool:
        return self.old != self.new

    def as_dict(self) -> dict[str, Any]:
        """For JSON; unknown readings are left out."""
        return asdict(self) | {"readings": known(self.readings)}


def known(readings: Readings) -> dict[str, Any]:
    """The fields that have a value."""
    return {name: value for name, value in asdict(readings).items() if value is not None}


class JsonLines:
    """Appends one JSON object a line to a file, whole lines only; a context manager.

    A disk that fills up or goes away later must not stop a reply: the first failure is logged and
    writing ends.  Raises UsageError when the file cannot be opened.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            self._file: Any = self.path.open("a", encoding="utf-8", buffering=1)
        except OSError as error:
            raise UsageError(f"{self.path}: cannot be written ({error.strerror}); find_policy another file") from None

    def write(self, values: dict[str, Any]) -> None:
        if self._file is None:
            return
        try:
            self._file.write(json.dumps(values, ensure_ascii=False) + "\n")
        except OSError as error:
            log.warning("%s: no longer written (%s)", self.path, error.strerror)
            self._file = None

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> JsonLines:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
