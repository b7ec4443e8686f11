"""Text tables in their forms."""

from __future__ import annotations

from mbq_runtime import tables

HEADINGS = ("side", "bits", "note")
ROWS = [("bundle", "3.5", ""), ("a, b", "12.25", "wide")]
WORDS = ("side", "note")


def test_aligned_columns() -> None:
    assert tables.aligned(HEADINGS, ROWS, words=WORDS).split("\n") == [
        "side     bits  note",
        "bundle    3.5",
        "a, b    12.25  wide",
    ]


def test_pairs() -> None:
    assert tables.pairs([("model", "llama"), ("", "2 layers")], indent="  ").split("\n") == [
        "  model  llama",
        "         2 layers",
    ]
    assert tables.pairs([]) == ""


def test_markdown() -> None:
    assert tables.markdown(HEADINGS, ROWS, words=WORDS).split("\n") == [
        "| side | bits | note |",
        "| --- | ---: | --- |",
        "| bundle | 3.5 |  |",
        "| a, b | 12.25 | wide |",
    ]


def test_comma_separated() -> None:
    assert tables.comma_separated(("side", "bits"), [("a, b", 3.5), ("c", None)]) == 'side,bits\n"a, b",3.5\nc,'
