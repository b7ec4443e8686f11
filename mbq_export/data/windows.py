"""What a model is calibrated on: a text, conversations or a dataset, cut into windows of tokens.

Windows come in two parts that share no token.  Slices are fitted to the first part.  On the second part, which is
held back, routers are chosen, thresholds set and the quality curve measured.  The packaged Wikipedia text has a
separate part for each.  Of all other data, the last quarter of the windows is held back.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mbq_runtime.errors import UsageError

from . import corpora
from .documents import Document, messages_of, read_documents

if TYPE_CHECKING:
    from ..model.checkpoint import Checkpoint

DATASET_PREFIX = "hf:"
HELD_BACK_SHARE = 4
"""One window in this many is held back."""
_SPREAD = 4
"""A dataset is read up to this many times the needed tokens, because it may be larger than the disk."""


@dataclass(frozen=True)
class TextSource:
    """Documents to calibrate on.  They may be read while they are used.

    name: for the manifest; fitted: documents that slices are fitted to; held_back: documents that are held back, or
    None to hold back the end of ``fitted``.
    """

    name: str
    fitted: Iterable[Document]
    held_back: Iterable[Document] | None = None


def open_source(data: str | None) -> TextSource:
    """Open the data that ``--calib-data`` names.

    Args:
        data: a file, as ``documents.read_documents`` takes it, or ``hf:DATASET``.  None: the packaged Wikipedia text.

    Raises:
        UsageError: the data cannot be read, or has the wrong format.
    """
    if data is None:
        parts = ([Document(corpora.wikipedia(part), part)] for part in ("calibration", "validation"))
        return TextSource("English Wikipedia (gensim test data)", *parts)
    if data.startswith(DATASET_PREFIX):
        return TextSource(data, _dataset(data.removeprefix(DATASET_PREFIX)))
    path = Path(data).expanduser()
    return TextSource(path.name, read_documents(path))


def calibration_windows(
    checkpoint: Checkpoint, source: TextSource, count: int, held_back: int, context: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Cut a source into windows, spread evenly over each of its two parts.

    A tokenizer that puts a token before every text puts it before every window too.

    Args:
        checkpoint: its tokenizer is used.
        source: the documents.
        count: number of windows to calibrate on.
        held_back: number of windows that are held back.
        context: tokens in a window.

    Returns:
        int64 [count, context] and int64 [held_back, context].

    Raises:
        UsageError: the source is too short, or a document does not fit the model's chat template.
    """
    opening = checkpoint.opening_tokens
    span = context - len(opening)
    enough = _SPREAD * (count + held_back) * span
    fitted = _cut(_tokens(checkpoint, source.fitted, enough), span)
    if source.held_back is None:
        _check_length(source, fitted, count + held_back, context)
        last = max(held_back, min(len(fitted) // HELD_BACK_SHARE, len(fitted) - count))
        fitted, rest = np.split(fitted, [len(fitted) - last])
    else:
        rest = _cut(_tokens(checkpoint, source.held_back, enough), span)
        _check_length(source, fitted, count, context)
        _check_length(source, rest, held_back, context)
    return _spread(fitted, count, opening), _spread(rest, held_back, opening)


def _check_length(source: TextSource, windows: NDArray[np.int64], needed: int, context: int) -> None:
    if len(windows) < needed:
        raise UsageError(
            f"calibration data {source.name}: too short, it has {len(windows)} windows of {context} tokens, "
            f"{needed} are needed; give a longer --calib-data or a smaller --calib-tokens"
        )


def _cut(tokens: Sequence[int], span: int) -> NDArray[np.int64]:
    """int64 [windows, span].  Tokens that are left over at the end are dropped."""
    windows = len(tokens) // span
    return np.asarray(tokens[: windows * span], np.int64).reshape(windows, span)


def _spread(windows: NDArray[np.int64], count: int, opening: Sequence[int]) -> NDArray[np.int64]:
    chosen = windows[np.linspace(0, len(windows) - 1, count).astype(int)]
    return np.hstack([np.tile(np.asarray(opening, np.int64), (count, 1)), chosen])


def _tokens(checkpoint: Checkpoint, documents: Iterable[Document], enough: int) -> list[int]:
    tokens: list[int] = []
    for document in documents:
        rendered = document.content if isinstance(document.content, str) else _render(checkpoint, document)
        tokens += checkpoint.tokenizer(rendered, add_special_tokens=False, verbose=False)["input_ids"]
        if len(tokens) >= enough:
            break
    return tokens


def _render(checkpoint: Checkpoint, document: Document) -> str:
    if checkpoint.tokenizer.chat_template is None:
        raise UsageError(
            f"{document.where}: the tokenizer of {checkpoint.source.name} has no chat template; give plain text instead"
        )
    from jinja2 import TemplateError

    try:
        return str(checkpoint.tokenizer.apply_chat_template(document.content, tokenize=False))
    except TemplateError as error:
        raise UsageError(
            f"{document.where}: the chat template of {checkpoint.source.name} refuses it: {error}"
        ) from None


def _dataset(name: str) -> Iterator[Document]:
    """Rows of ``PATH[:CONFIG[:SPLIT[:COLUMN]]]`` in the dataset's order.  An empty part means the default.

    The first row is read here, so that a dataset that cannot be fetched is refused at once.
    """
    path, config, split, column = (*name.split(":", 3), "", "", "")[:4]
    split, column = split or "train", column or "text"
    where = f"calibration dataset {path}"
    try:
        from datasets import load_dataset
        from datasets.utils.logging import disable_progress_bar
        from huggingface_hub.utils import logging as hub_logging
    except ImportError:
        raise UsageError(
            f"{where}: the package datasets is not installed: pip install 'mbq-export[datasets]'"
        ) from None
    disable_progress_bar()
    hub_logging.set_verbosity(logging.ERROR)  # it would log each attempt; the error below is enough
    with _fetching(where):
        rows = iter(load_dataset(path, config or None, split=split, streaming=True))
        first = next(rows, None)
    if first is None:
        raise UsageError(f"{where}: split {split} is empty")
    if column not in first:
        raise UsageError(f"{where}: no column {column!r} in split {split}; it has {', '.join(first)}")
    return _rows(first, rows, column, where)


def _rows(row: dict[str, Any] | None, rest: Iterator[dict[str, Any]], column: str, where: str) -> Iterator[Document]:
    number = 1
    while row is not None:
        value, at = row[column], f"{where}, row {number}"
        yield Document(value + "\n" if isinstance(value, str) else messages_of(value, at), at)
        with _fetching(where):
            row = next(rest, None)
        number += 1


@contextmanager
def _fetching(where: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # whatever a loader, a file system or a server raises
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UsageError(
            f"{where}: cannot be fetched: {reason}; check the name and the network, or give a text file"
        ) from error
