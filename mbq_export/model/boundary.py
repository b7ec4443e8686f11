"""The one place where a failure in reading a checkpoint becomes a line for a person."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from mbq_runtime.errors import MbqError, ModelError

from ..lines import one_line

_LONGEST_REASON = 300


@contextmanager
def reading(name: str, what: str) -> Iterator[None]:
    """Turn every failure of the block into a ModelError of one line.  The log has the trace.

    Libraries raise whatever they meet in a damaged checkpoint, so no list of their exceptions would be whole.

    Args:
        name: the model, or the file.
        what: what the block reads, such as "tokenizer".

    Raises:
        ModelError: the block failed.
    """
    try:
        yield
    except MbqError:
        raise
    except MemoryError as error:
        raise ModelError(f"{name}: {what}: more memory is needed than this machine has") from error
    except Exception as error:
        raise _unreadable(name, what, error) from error
    except BaseException as error:
        # A panic of the tokenizers library is no Exception.
        if type(error).__name__ != "PanicException":
            raise
        raise _unreadable(name, what, error) from error


def _unreadable(name: str, what: str, error: BaseException) -> ModelError:
    kind, reason = type(error).__name__, one_line(str(error), _LONGEST_REASON)
    return ModelError(
        f"{name}: {what} cannot be read ({f'{kind}: {reason}' if reason else kind}); repair it, or download it again"
    )
