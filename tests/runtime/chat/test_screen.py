"""The screen of a chat, in a terminal emulator."""

from __future__ import annotations

import io

import pyte
import pytest

from mbq_runtime.chat.screen import Screen

COLUMNS, ROWS = 40, 10


class Terminal:
    """The output of a screen, as an emulated terminal shows it."""

    def __init__(self, **options: object) -> None:
        self.columns, self.rows = COLUMNS, ROWS
        self.now_s = 0.0
        self.out = io.StringIO()
        self._emulator = pyte.HistoryScreen(COLUMNS, ROWS, history=1000)
        self._emulator.set_mode(pyte.modes.LNM)  # a terminal's driver makes "\n" go to the line's start
        self._stream = pyte.Stream(self._emulator)
        self.screen = Screen(
            self.out, self.out,
            **{"terminal": True, "colour": True, "size": lambda: (self.columns, self.rows), "clock": lambda: self.now_s,
               **options},  # type: ignore[arg-type]
        )  # fmt: skip

    def lines(self) -> list[str]:
        self._stream.feed(self.out.getvalue())
        self.out.seek(0)
        self.out.truncate()
        return [line.rstrip() for line in self._emulator.display]

    def past(self) -> list[str]:
        """The lines that scrolled off the screen."""
        width = range(COLUMNS)
        return ["".join(line[i].data for i in width).rstrip() for line in self._emulator.history.top]

    def colour_at(self, row: int, column: int) -> str:
        return str(self._emulator.buffer[row][column].fg)


def test_the_status_stays_below_text_that_scrolls() -> None:
    terminal = Terminal()
    terminal.screen.line(">>> tell me")
    with terminal.screen.with_status() as show:
        for i in range(30):
            terminal.now_s += 1
            terminal.screen.piece(f"line {i}\n", 8.0)
            show(f"{i} tokens/s")
            lines = terminal.lines()
            assert lines[-1] == f"{i} tokens/s"
            assert f"line {i}" in lines[:-1]
    terminal.screen.line("after")
    lines = terminal.lines()
    assert "tokens/s" not in "".join(lines)
    assert lines[-2] == "after" or lines[-1] == "after"
    everything = terminal.past() + lines
    assert [line for line in everything if line.startswith("line")] == [f"line {i}" for i in range(30)]
    assert not any("tokens/s" in line for line in everything)


def test_a_reply_that_begins_on_the_last_row() -> None:
    terminal = Terminal()
    for i in range(ROWS + 3):
        terminal.screen.line(f"before {i}")
    with terminal.screen.with_status() as show:
        show("status")
        terminal.screen.piece("hello", 8.0)
        lines = terminal.lines()
        assert lines[-1] == "status"
        assert lines[-2] == "hello"


def test_the_status_is_cut_to_the_width_and_follows_a_resize() -> None:
    terminal = Terminal()
    with terminal.screen.with_status() as show:
        show("x" * 100)
        assert terminal.lines()[-1] == "x" * (COLUMNS - 1)
        terminal.rows, terminal.now_s = 8, 1.0
        show("smaller")
        assert terminal.lines()[7] == "smaller"


def test_the_status_is_not_redrawn_for_every_token() -> None:
    terminal = Terminal()
    with terminal.screen.with_status() as show:
        show("first")
        show("second")
        assert terminal.lines()[-1] == "first"
        terminal.now_s = 0.3
        show("third")
        assert terminal.lines()[-1] == "third"


def test_a_terminal_too_low_for_it_gets_none() -> None:
    terminal = Terminal()
    terminal.rows = 3
    with terminal.screen.with_status() as show:
        show("status")
    assert terminal.out.getvalue() == ""


def test_tokens_have_the_colour_of_their_bits() -> None:
    terminal = Terminal(bits=(3.0, 8.0))
    for text, bits in (("a", 3.0), ("b", 8.0), ("c", 5.0), ("d", 99.0), ("e", 3.1)):
        terminal.screen.piece(text, bits)
    assert terminal.lines()[0] == "abcde"
    low, high, middle, above, nearly_low = (terminal.colour_at(0, i) for i in range(5))
    assert above == high
    assert nearly_low == low
    assert len({low, middle, high}) == 3


def test_the_legend_names_the_range() -> None:
    terminal = Terminal(bits=(3.0, 8.0))
    legend = terminal.screen.legend()
    assert legend is not None
    terminal.screen.line(legend)
    assert terminal.lines()[0] == "bits: 3.0 4.0 5.0 6.0 7.0 8.0"
    assert Terminal().screen.legend() is None
    assert Terminal(bits=(3.0, 8.0), colour=False).screen.legend() is None


@pytest.mark.parametrize("evil", ["\x1b[2J", "\x1b]0;title\x07", "\r", "\x9b2J", "\x7f"])
def test_a_model_cannot_move_the_cursor(evil: str) -> None:
    terminal = Terminal()
    terminal.screen.piece("safe" + evil + "sound", 8.0)
    terminal.screen.piece("\tö\n", 8.0)
    assert not set(terminal.out.getvalue()) & {"\x1b", "\x07", "\r", "\x9b", "\x7f"}
    assert terminal.lines()[0].startswith("safe\N{REPLACEMENT CHARACTER}")


def test_without_a_terminal_text_goes_out_as_it_is() -> None:
    terminal = Terminal(terminal=False, colour=False, bits=(3.0, 8.0))
    with terminal.screen.with_status() as show:
        show("status")
        terminal.screen.piece("a\x1b[1mb\r\n", 5.0)
    terminal.screen.note("figures")
    assert terminal.out.getvalue() == "a\x1b[1mb\r\nfigures\n"
