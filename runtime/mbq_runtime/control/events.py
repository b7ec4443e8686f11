"""Events of a governor: each change of the budget with its reason, and a file of them as JSON lines."""

from __future__ import annotations

import json
import logging
import os
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from mbq_runtime.errors import UsageError
from mbq_runtime.sensing.readings import Readings

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Event:
    """A change of the budget, or a notice about sensors or threads.

    >>> from mbq_runtime.sensing import Readings
    >>> Event(0.0, old=8.0, new=6.0, reason="heat: 77 C", readings=Readings(time_s=5.0, temp_c=77.0)).as_dict()
    {'time_s': 0.0, 'old': 8.0, 'new': 6.0, 'reason': 'heat: 77 C', 'readings': {'time_s': 5.0, 'temp_c': 77.0}}

    Args:
        time_s: seconds since 1970.
        old: budget before, in average bits per weight.
        new: budget after; the same as ``old`` for a notice.
        reason: the cause, as text for people.
        readings: what the sensors showed at this time.
    """

    time_s: float
    old: float
    new: float
    reason: str
    readings: Readings

    @property
    def is_change(self) -> bool:
        """Whether the budget changed; False for a notice."""
        return self.old != self.new

    def as_dict(self) -> dict[str, Any]:
        """The event as values for JSON, without unknown readings."""
        return asdict(self) | {"readings": known(self.readings)}


def known(readings: Readings) -> dict[str, Any]:
    """The fields that have a value.

    Args:
        readings: readings of one moment.
    """
    return {name: value for name, value in asdict(readings).items() if value is not None}


class JsonLines:
    """A file to which JSON objects are appended, one a line.  It is a context manager.

    A full or missing disk does not stop a reply: the first failure is logged, and nothing more is written.

    Args:
        path: the file; it is created when it does not exist, in a folder that does.

    Raises:
        UsageError: the file cannot be opened.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not self.path.parent.is_dir():
            folder = self.path.parent
            raise UsageError(f"{self.path}: the folder {folder} does not exist; make it, or choose another file")
        try:
            self._file: Any = self.path.open("a", encoding="utf-8", buffering=1)
        except OSError as error:
            raise UsageError(f"{self.path}: cannot be written ({error.strerror}); choose another file") from None

    def write(self, values: dict[str, Any]) -> None:
        """Append one line.

        Args:
            values: the JSON object.
        """
        if self._file is None:
            return
        try:
            self._file.write(json.dumps(values, ensure_ascii=False) + "\n")
        except OSError as error:
            log.warning("%s: no longer written (%s)", self.path, error.strerror)
            self.close()

    def close(self) -> None:
        """Close the file.  Later calls of ``write`` do nothing."""
        if self._file is not None:
            with suppress(OSError):  # the disk is full, and what waits cannot be written
                self._file.close()
            self._file = None

    def __enter__(self) -> JsonLines:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
