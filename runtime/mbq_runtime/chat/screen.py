"""The terminal of a chat: text of the reply, a status line below it, and a colour for the bits of each token."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from mbq_runtime.printable import without_controls

# 256-colour codes from few bits (warm) to many bits (cool).  They are readable on dark and light backgrounds.
_SCALE = (196, 208, 178, 71, 38, 33)
_REDRAW_S = 0.2
_SAVE, _RESTORE, _CLEAR_LINE = "\x1b7", "\x1b8", "\x1b[2K"
_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"


class Screen:
    """Writes a conversation to a terminal or a file.

    Args:
        out: the text of the conversation goes here.
        err: figures and notes go here.
        terminal: whether ``out`` is a terminal.  If not, the text is not changed and there is no status line.
        colour: whether colours are allowed.
        bits: lowest and highest bits per weight of the colours; None: no colours by bits.
        size: returns columns and rows of the terminal.
        clock: returns seconds.
    """

    def __init__(
        self,
        out: TextIO,
        err: TextIO,
        *,
        terminal: bool,
        colour: bool,
        bits: tuple[float, float] | None = None,
        size: Callable[[], tuple[int, int]] = shutil.get_terminal_size,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._out, self._err = out, err
        self._terminal, self._colour, self._bits = terminal, colour, bits if colour else None
        self._size, self._clock = size, clock
        self._rows = 0  # rows of the terminal while the last one is used for the status; 0: it is not used
        self._drawn_s = 0.0

    def legend(self) -> str | None:
        """A line that explains the colours; None without colours by bits."""
        if self._bits is None:
            return None
        low, high = self._bits
        steps = [low + (high - low) * i / (len(_SCALE) - 1) for i in range(len(_SCALE))]
        return "bits: " + " ".join(self._painted(f"{bits:.1f}", bits) for bits in steps)

    def piece(self, text: str, bits: float) -> None:
        """Write one piece of a reply.

        Args:
            text: the piece.
            bits: average bits per weight of its tokens.
        """
        if self._terminal:
            text = without_controls(text)
        self._out.write(self._painted(text, bits) if self._bits else text)
        self._out.flush()

    def line(self, text: str = "") -> None:
        """Write a text and end the line.

        Args:
            text: the text.
        """
        self._out.write(text + "\n")
        self._out.flush()

    def note(self, text: str) -> None:
        """Write a line that is not part of the conversation.

        Args:
            text: the line, without its end.
        """
        text = without_controls(text)
        self._err.write((f"{_DIM}{text}{_PLAIN}" if self._colour else text) + "\n")
        self._err.flush()

    @contextmanager
    def with_status(self) -> Iterator[Callable[[str], None]]:
        """Use the last row for a status line.  Yields a function that shows a text there, at most 5 times a second."""
        if not self._terminal:
            yield lambda text: None
            return
        try:
            yield self._show
        finally:
            if self._rows:
                self._out.write(f"{_SAVE}\x1b[r\x1b[{self._rows};1H{_CLEAR_LINE}{_RESTORE}")
                self._out.flush()
            self._rows, self._drawn_s = 0, 0.0

    def _show(self, text: str) -> None:
        now_s = self._clock()
        if self._rows and now_s - self._drawn_s < _REDRAW_S:
            return
        self._drawn_s = now_s
        columns, rows = self._size()
        if rows < 4:
            return
        if rows != self._rows:
            # Move the cursor off the last row first.  Then only the other rows scroll.
            self._out.write(f"\n\x1b[A{_SAVE}\x1b[1;{rows - 1}r{_RESTORE}")
            self._rows = rows
        text = text[: columns - 1]
        shown = f"{_DIM}{text}{_PLAIN}" if self._colour else text
        self._out.write(f"{_SAVE}\x1b[{rows};1H{_CLEAR_LINE}{shown}{_RESTORE}")
        self._out.flush()

    def _painted(self, text: str, bits: float) -> str:
        assert self._bits is not None
        low, high = self._bits
        share = (bits - low) / (high - low) if high > low else 1.0
        step = min(max(round(share * (len(_SCALE) - 1)), 0), len(_SCALE) - 1)
        return f"\x1b[38;5;{_SCALE[step]}m{text}\x1b[39m"
