"""Small text tables: aligned columns for a terminal, Markdown, and CSV.

A table is a list of headings and rows of cells that are already text.  Columns hold numbers, and are aligned to
the right, unless ``words`` names their headings.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Collection, Iterable, Sequence

from .printable import printable

Row = Sequence[str]
"""The cells of one line."""


def aligned(headings: Row, rows: Iterable[Row], *, words: Collection[str] = ()) -> str:
    """A table for a terminal: two spaces between columns, no space at the end of a line.

    Args:
        headings: the first line, one heading per column.
        rows: one cell per column each.
        words: headings of the columns that are aligned to the left.
    """
    lines = [headings, *([printable(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    left = [heading in words for heading in headings]
    return "\n".join(_line(cells, widths, left) for cells in lines)


def pairs(rows: Iterable[tuple[str, str]], *, indent: str = "") -> str:
    """Two columns without headings: names, and what is said about each.

    Args:
        rows: pairs of a name and a text.
        indent: text put before each line.
    """
    lines = [(printable(name), printable(text)) for name, text in rows]
    widths = [max((len(name) for name, _ in lines), default=0), 0]
    return "\n".join(indent + _line(pair, widths, [True, True]) for pair in lines)


def markdown(headings: Row, rows: Iterable[Row], *, words: Collection[str] = ()) -> str:
    """A Markdown table.

    Args:
        headings: the first line, one heading per column.
        rows: one cell per column each.
        words: headings of the columns that are aligned to the left.
    """
    rule = ["---" if heading in words else "---:" for heading in headings]
    lines = ([printable(cell) for cell in row] for row in rows)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [headings, rule, *lines])


def comma_separated(headings: Row, rows: Iterable[Iterable[object]]) -> str:
    """CSV, quoted where it is needed.

    Args:
        headings: the first line, one heading per column.
        rows: one value per column each; None is an empty cell.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(headings)
    writer.writerows(rows)
    return text.getvalue().rstrip("\n")


def _line(cells: Row, widths: Sequence[int], left: Sequence[bool]) -> str:
    padded = (
        cell.ljust(width) if is_left else cell.rjust(width)
        for cell, width, is_left in zip(cells, widths, left, strict=True)
    )
    return "  ".join(padded).rstrip()
