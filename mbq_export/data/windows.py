"""What a model is calibrated on: a text, conversations or a dataset, cut into windows of tokens.

Windows come in two parts that share no token.  Slices are fitted to the first part.  On the second part, which is
held back, routers are chosen, thresholds set and the quality curve measured.  The default texts have a separate part
for each.  Of all other data, the last quarter of the windows is held back.
"""

from __future__ import annotations

import logging
import os
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mbq_runtime.errors import UsageError

from ..progress import Report, no_report
from . import corpora
from .documents import Document, messages_of, read_documents, whole_text

if TYPE_CHECKING:
    from ..model.checkpoint import Checkpoint

DATASET_PREFIX = "hf:"
HELD_BACK_SHARE = 4
"""One window in this many is held back."""
_SPREAD = 4
"""A dataset is read up to this many times the needed tokens, because it may be larger than the disk."""
LONGEST_TOKENS = 4 << 20
"""Most tokens that are kept of one document, beside those that are needed: 16 MiB."""


Said = Callable[["Checkpoint", int, Report], str]
"""Text that a model writes.  Takes the original model, the number of tokens that are needed, and the report."""


@dataclass(frozen=True)
class Part:
    """Documents of one kind.  They may be read while they are used.

    fitted: documents that slices are fitted to; held_back: documents that are held back, or None to hold back the end
    of ``fitted``; share: of all windows, relative to the other parts.
    """

    fitted: Iterable[Document] | Said
    held_back: Iterable[Document] | Said | None = None
    share: int = 1


@dataclass(frozen=True)
class TextSource:
    """What a model is calibrated on.

    name: for the manifest; parts: documents by kind.
    """

    name: str
    parts: tuple[Part, ...]


def open_source(data: str | None, *, replies: bool = True) -> TextSource:
    """Open the data that ``--calib-data`` names.

    Args:
        data: a file, as ``documents.read_documents`` takes it, or ``hf:DATASET``.  None: what a model reads and says:
            half Wikipedia, a quarter code, and a quarter chats that the original model writes.
        replies: whether the default text has these chats.

    Raises:
        UsageError: the data cannot be read, or has the wrong format.
    """
    if data is None:
        return _default_source() if replies else _packaged_source()
    if data.startswith(DATASET_PREFIX):
        return TextSource(data, (Part(_dataset(data.removeprefix(DATASET_PREFIX))),))
    path = Path(os.path.expanduser(data))
    return TextSource(path.name, (Part(read_documents(path)),))


def _packaged_source() -> TextSource:
    def packaged(read: Callable[[str], str], share: int) -> Part:
        fitted, held_back = ([Document(read(part), part)] for part in ("calibration", "validation"))
        return Part(fitted, held_back, share)

    return TextSource("English Wikipedia and Python code", (packaged(corpora.wikipedia, 2), packaged(corpora.code, 1)))


def _default_source() -> TextSource:
    from . import replies

    said = Part(partial(replies.answers, "fitted"), partial(replies.answers, "held_back"))
    name = "English Wikipedia, Python code and the model's own replies"
    return TextSource(name, (*_packaged_source().parts, said))


def calibration_windows(
    checkpoint: Checkpoint,
    source: TextSource,
    count: int,
    held_back: int,
    context: int,
    *,
    report: Report = no_report,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Cut a source into windows, spread evenly over each of its two parts.

    Windows of several kinds are mixed, so that every evenly spread choice of them has all kinds.  A tokenizer that puts
    a token before every text puts it before every window too.

    Args:
        checkpoint: its tokenizer is used, and the model where it writes text itself.
        source: the documents.
        count: number of windows to calibrate on.
        held_back: number of windows that are held back.
        context: tokens in a window.
        report: told how far the model's own text is.

    Returns:
        int64 [count, context] and int64 [held_back, context].

    Raises:
        UsageError: the source is too short, or a document does not fit the model's chat template.
    """
    counts = zip(_dealt(count, source.parts), _dealt(held_back, source.parts), strict=True)
    cutter = _Cutter(checkpoint, source.name, context, report)
    cut = [cutter.windows(part, *wanted) for part, wanted in zip(source.parts, counts, strict=True)]
    fitted, rest = (np.concatenate(windows) for windows in zip(*cut, strict=True))
    return _mixed(fitted, len(cut)), _mixed(rest, len(cut))


def _dealt(count: int, parts: Sequence[Part]) -> list[int]:
    """``count`` windows dealt to the parts by their shares.  What is left over goes to the first parts."""
    total = sum(part.share for part in parts)
    dealt = [count * part.share // total for part in parts]
    for i in range(count - sum(dealt)):
        dealt[i] += 1
    return dealt


def _mixed(windows: NDArray[np.int64], kinds: int) -> NDArray[np.int64]:
    """The windows in a fixed random order, if they are of several kinds."""
    return windows if kinds == 1 else windows[np.random.default_rng(0).permutation(len(windows))]


@dataclass(frozen=True)
class _Cutter:
    """Cuts documents into windows.  name: of the source; context: tokens in a window; the others: the caller's."""

    checkpoint: Checkpoint
    name: str
    context: int
    report: Report

    def windows(self, part: Part, count: int, held_back: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Int64 [count, context] and [held_back, context] of one part."""
        opening = self.checkpoint.opening_tokens
        span = self.context - len(opening)
        wanted = count + held_back if part.held_back is None else count
        fitted = _cut(self._tokens(part.fitted, wanted * span), span)
        self._check_length(fitted, wanted)
        if part.held_back is None:
            last = max(held_back, min(len(fitted) // HELD_BACK_SHARE, len(fitted) - count))
            fitted, rest = np.split(fitted, [len(fitted) - last])
        else:
            rest = _cut(self._tokens(part.held_back, held_back * span), span)
            self._check_length(rest, held_back)
        return _spread(fitted, count, opening), _spread(rest, held_back, opening)

    def _tokens(self, documents: Iterable[Document] | Said, needed: int) -> NDArray[np.int32]:
        """Int32 [n]: tokens of the documents, until there are enough."""
        tokens, enough = array("i"), _SPREAD * needed
        if callable(documents):
            documents = [Document(documents(self.checkpoint, needed, self.report), self.name)] if needed else []
        for document in documents if needed else ():
            for piece in self.checkpoint.tokens_in_pieces(_text(self.checkpoint, document)):
                tokens.extend(piece)
                if len(tokens) >= enough + LONGEST_TOKENS:
                    break
            if len(tokens) >= enough:
                break
        return np.asarray(tokens)

    def _check_length(self, windows: NDArray[np.int32], needed: int) -> None:
        if len(windows) < needed:
            raise UsageError(
                f"calibration data {self.name}: too short, it has {len(windows)} windows of {self.context} tokens, "
                f"{needed} are needed; give a longer --calib-data or a smaller --calib-tokens"
            )


def _cut(tokens: NDArray[np.int32], span: int) -> NDArray[np.int32]:
    """int32 [windows, span].  Tokens that are left over at the end are dropped."""
    windows = len(tokens) // span
    return tokens[: windows * span].reshape(windows, span)


def _spread(windows: NDArray[np.int32], count: int, opening: Sequence[int]) -> NDArray[np.int64]:
    """Int64 [count, span + opening]: evenly spread windows, each behind the opening tokens."""
    chosen = windows[np.linspace(0, len(windows) - 1, count).astype(int)]
    return np.hstack([np.tile(np.asarray(opening, np.int64), (count, 1)), chosen])


def _text(checkpoint: Checkpoint, document: Document) -> str:
    return document.content if isinstance(document.content, str) else _render(checkpoint, document)


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
    if not path:
        raise UsageError(f"--calib-data {DATASET_PREFIX}{name}: it names no dataset; needed {DATASET_PREFIX}OWNER/NAME")
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
        yield Document(whole_text(value, at) + "\n" if isinstance(value, str) else messages_of(value, at), at)
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
