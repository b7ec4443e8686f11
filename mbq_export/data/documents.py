"""Documents from a file of a user: plain text, or rows of text and of conversations.

The kinds are those that other tools read: a text file; ``.jsonl`` and ``.json`` with rows of ``messages`` (OpenAI),
``conversations`` (ShareGPT), ``text``, or ``instruction`` and ``output`` (Alpaca); ``.parquet`` with such columns.
A large file is read in parts, so that its size does not decide how much memory an export needs.
"""

from __future__ import annotations

import json
import re
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from mbq_runtime.errors import UsageError

WHOLE_BYTES = 1 << 20
"""A text file of at most this size is one document.  A longer one is cut into documents of this size."""
CHECKED_BYTES = 32 << 20
"""Rows of a file of at most this size are all checked before work starts."""
_MOST_JSON_BYTES = 256 << 20
"""A ``.json`` file is parsed as a whole, which takes several times its size."""
_LONGEST_LINE_BYTES = 16 << 20
_HALF = re.compile("[\ud800-\udfff]")
_GOLDEN_RATIO = 0.6180339887498949

Messages = list[dict[str, str]]

_SIGNATURES = {
    b"PAR1": "Parquet (name it .parquet)",
    b"PK\x03\x04": "a zip archive",
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"BZh": "bzip2",
    b"%PDF": "PDF",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
    b"ARROW1": "Arrow",
    b"GGUF": "GGUF",
}
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}
"""Speakers in ShareGPT's rows -> roles."""
_ROW_HELP = (
    'a row looks like {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", ...}]} or {"text": "..."}'
)


@dataclass(frozen=True)
class Document:
    """A text or a conversation.

    content: the text, or the messages of the conversation; where: how an error names the document.
    """

    content: str | Messages
    where: str


def read_documents(path: Path) -> Iterable[Document]:
    """The documents of a file.  Those of a large file are read while they are used.

    Args:
        path: a text, ``.jsonl``, ``.json`` or ``.parquet`` file.

    Raises:
        UsageError: the file cannot be read, is of another kind, or has a row that is no text and no conversation.
    """
    size = _check_kind(path)
    if path.suffix == ".parquet":
        return _checked(_parquet(path), size, path)
    if path.suffix == ".jsonl":
        return _checked(_lines(path), size, path)
    if path.suffix == ".json":
        return _checked(_array(path, size), size, path)
    return _text(path, size)


def _checked(documents: Iterator[Document], size: int, path: Path) -> Iterable[Document]:
    """All rows of a small file, or the first row of a large one, are read now, so that errors come early."""
    first = list(islice(documents, 1))
    if not first:
        raise UsageError(f"calibration file {path}: it is empty; {_ROW_HELP}")
    rows = chain(first, documents)
    return list(rows) if size <= CHECKED_BYTES else rows


def _check_kind(path: Path) -> int:
    """Size of the file in bytes.  Refuses what is no text by its first bytes."""
    where = f"calibration file {path}"
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise UsageError(f"{where}: not a regular file; give a text file")
        with path.open("rb") as file:
            start = file.read(4096)
    except OSError as error:
        raise UsageError(f"{where}: cannot be read ({error.strerror}); give a UTF-8 text file") from None
    found = next((kind for magic, kind in _SIGNATURES.items() if start.startswith(magic)), None)
    if found is not None and path.suffix != ".parquet":
        raise UsageError(f"{where}: {found}, which is not read; give UTF-8 text, .jsonl, .json or .parquet")
    if path.suffix != ".parquet" and b"\0" in start:
        raise UsageError(f"{where}: byte {start.index(0)} is zero: no text; give UTF-8 text, .jsonl, .json or .parquet")
    if status.st_size == 0:
        raise _empty(path)
    return status.st_size


def _empty(path: Path) -> UsageError:
    return UsageError(f"calibration file {path}: it is empty; give a text file of a few hundred kilobytes")


def _decode(data: bytes, start: int, path: Path) -> str:
    """UTF-8 text.  start: place of ``data`` in the file."""
    text_start = len(_BYTE_ORDER_MARK) if start == 0 and data.startswith(_BYTE_ORDER_MARK) else 0
    where = f"calibration file {path}"
    if (zero := data.find(0)) >= 0:
        raise UsageError(f"{where}: byte {start + zero} is zero: no text; give UTF-8 text")
    try:
        return data[text_start:].decode("utf-8")
    except UnicodeDecodeError as error:
        at = start + text_start + error.start
        raise UsageError(f"{where}: byte {at} is not UTF-8; convert the file to UTF-8 first") from None


def _text(path: Path, size: int) -> Iterable[Document]:
    if size <= WHOLE_BYTES:
        text = _decode(path.read_bytes(), 0, path)
        if not text.strip():
            raise _empty(path)
        return [Document(text, str(path))]
    return _parts(path, size)


def _parts(path: Path, size: int) -> Iterator[Document]:
    """Parts of a long text.  The first parts of any number are spread evenly over the file."""
    count = -(-size // WHOLE_BYTES)
    step = next(step for step in range(max(1, round(count * _GOLDEN_RATIO)), 2 * count + 2) if _coprime(step, count))
    for i in range(count):
        start = i * step % count * WHOLE_BYTES
        with path.open("rb") as file:
            file.seek(start)
            data = file.read(WHOLE_BYTES)
        # A part begins and ends behind a line's end, where the file has lines, else between two characters.
        first = (data.find(b"\n") + 1 or _first_character(data)) if start else 0
        last = data.rfind(b"\n") + 1 or (_last_character(data) if start + len(data) < size else len(data))
        whole = data[first:last] if first < last else b""
        if whole.strip():
            yield Document(_decode(whole, start + first, path), f"{path}, byte {start + first}")


def _first_character(data: bytes) -> int:
    """Place of the first byte that begins a character; 0 where none of four does, which is no UTF-8."""
    return next((at for at, byte in enumerate(data[:4]) if byte & 0xC0 != 0x80), 0 if data[3:] else len(data))


def _last_character(data: bytes) -> int:
    """Place of the last character if it is cut off, else the end."""
    for at in range(len(data) - 1, max(len(data) - 4, -1), -1):
        if data[at] & 0xC0 != 0x80:
            size = 1 if data[at] < 0x80 else 2 + (data[at] >= 0xE0) + (data[at] >= 0xF0)
            return at if at + size > len(data) else len(data)
    return len(data)


def _coprime(a: int, b: int) -> bool:
    while b:
        a, b = b, a % b
    return a == 1


def _lines(path: Path) -> Iterator[Document]:
    start = 0
    with path.open("rb") as file:
        number = 0
        while line := file.readline(_LONGEST_LINE_BYTES):
            number += 1
            where = f"calibration file {path}, line {number}"
            if len(line) == _LONGEST_LINE_BYTES and not line.endswith(b"\n"):
                raise UsageError(f"{where}: longer than {_LONGEST_LINE_BYTES >> 20} MB; one row on each line is needed")
            text = _decode(line, start, path)
            start += len(line)
            if text.strip():
                yield _line(text, where)


def _line(text: str, where: str) -> Document:
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else "too deep, or a number is too long"
        raise UsageError(f"{where}: not JSON ({reason}); needed: one object on each line") from None
    return _row(row, where)


def _array(path: Path, size: int) -> Iterator[Document]:
    where = f"calibration file {path}"
    if size > _MOST_JSON_BYTES:
        raise UsageError(f"{where}: {size >> 20} MB; a .json file may have {_MOST_JSON_BYTES >> 20}: give it as .jsonl")
    try:
        found = json.loads(_decode(path.read_bytes(), 0, path))
    except (ValueError, RecursionError) as error:
        line = f", line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise UsageError(f"{where}{line}: not JSON; one object on each line is a .jsonl file") from None
    rows = found.get("data", [found]) if isinstance(found, dict) else found
    if not isinstance(rows, list) or not rows:
        raise UsageError(f"{where}: no rows; a list of objects is needed: {_ROW_HELP}")
    for number, row in enumerate(rows, 1):
        yield _row(row, f"{where}, row {number}")


def _parquet(path: Path) -> Iterator[Document]:
    where = f"calibration file {path}"
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise UsageError(
            f"{where}: Parquet needs the package pyarrow: pip install pyarrow, or give the file as .jsonl"
        ) from None
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=256):
                for row in batch.to_pylist():
                    number += 1
                    yield _row(row, f"{where}, row {number}")
    except (ArrowException, OSError, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"{where}: not a whole Parquet file ({reason}); download it again") from None


def _row(row: Any, where: str) -> Document:
    """A document from an object of any of the kinds that are read."""
    if not isinstance(row, dict):
        raise UsageError(f"{where}: no field 'messages'; {_ROW_HELP}")
    if row.get("messages") is not None:
        return Document(messages_of(row["messages"], where), where)
    if row.get("conversations") is not None:
        return Document(_sharegpt(row["conversations"], where), where)
    if "instruction" in row and "output" in row:
        return Document(_alpaca(row, where), where)
    for name in ("text", "content"):
        if isinstance(row.get(name), str):
            return Document(whole_text(row[name], where) + "\n", where)
    seen = ", ".join(map(str, row)) or "nothing"
    raise UsageError(f"{where}: no field 'messages', 'conversations' or 'text'; it has {seen}; {_ROW_HELP}")


def messages_of(found: Any, where: str) -> Messages:
    """A conversation in OpenAI's form.

    Args:
        found: a list of objects with ``role`` and ``content``.
        where: how an error names it.

    Raises:
        UsageError: it is no such list.
    """
    if not isinstance(found, list) or not found:
        raise UsageError(f"{where}: field 'messages' is {found!r:.40}; needed: a list of messages")
    return [
        {name: _string(message, name, f"{where}, message {i}") for name in ("role", "content")}
        for i, message in enumerate(found, 1)
    ]


def _string(entry: Any, name: str, where: str) -> str:
    if not isinstance(entry, dict) or name not in entry:
        raise UsageError(f"{where}: no field {name!r}; {_ROW_HELP}")
    if not isinstance(entry[name], str):
        raise UsageError(f"{where}: field {name!r} is {entry[name]!r:.40}; needed: a string")
    return whole_text(entry[name], f"{where}, field {name!r}")


def whole_text(text: str, where: str) -> str:
    """The text, which no tokenizer reads if it has halves of characters.

    Args:
        text: any text.
        where: how an error names it.

    Raises:
        UsageError: it has a surrogate without the other one.
    """
    if half := _HALF.search(text):
        raise UsageError(f"{where}: half a character, \\u{ord(half[0]):x}; write the whole character, or leave it out")
    return text


def _sharegpt(found: Any, where: str) -> Messages:
    if not isinstance(found, list) or not found:
        raise UsageError(f"{where}: field 'conversations' is {found!r:.40}; needed: a list of messages")
    if isinstance(found[0], dict) and "role" in found[0]:
        return messages_of(found, where)
    messages = []
    for i, message in enumerate(found, 1):
        at = f"{where}, message {i}"
        speaker = _string(message, "from", at)
        if speaker not in _ROLES:
            raise UsageError(f"{at}: field 'from' is {speaker!r}; known: {', '.join(_ROLES)}")
        messages.append({"role": _ROLES[speaker], "content": _string(message, "value", at)})
    return messages


def _alpaca(row: dict[str, Any], where: str) -> Messages:
    asked = _string(row, "instruction", where)
    more = row.get("input") or ""
    if not isinstance(more, str):
        raise UsageError(f"{where}: field 'input' is {more!r:.40}; needed: a string")
    whole_text(more, f"{where}, field 'input'")
    question = f"{asked}\n\n{more}" if more else asked
    return [{"role": "user", "content": question}, {"role": "assistant", "content": _string(row, "output", where)}]
