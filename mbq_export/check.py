"""The check of the whole: every export compares what goes in with what comes out.

One model has four forms on its way: the checkpoint as it was loaded, the checkpoint with transformed weights, the
same with sliced weights, and the bundle.  Each form is run on one prompt and compared with one before:

1. transformed against loaded: a rotation or a smoothing changes nothing, so the limit is small;
2. sliced against loaded, at full depth: rounding and tuning change a little, so the limit is wide;
3. bundle against sliced: both have the same weights, so the limit is small again (``write.check``).
"""

from __future__ import annotations

from mbq_runtime.errors import ModelError

from .model.recording import Recording, difference
from .model.shape import Decoder

SAME_LIMIT = 1e-3
"""Relative error of logits by float32 arithmetic in another order.  Measurements are in docs/log.md."""

EXPERTS_LOOSER = 10.0
"""Two experts can have nearly the same score.  Then arithmetic in another order takes the other one."""

SLICED_LIMIT = 0.5
"""Of sliced against loaded logits.  Another head leaves 1.4."""


def looser(decoder: Decoder) -> float:
    """How many times the limits of a model are those of a model without experts.

    Args:
        decoder: the model.
    """
    return 1.0 if decoder.experts is None else EXPERTS_LOOSER


def check_transformed(original: Recording, transformed: Recording, times: float = 1.0) -> None:
    """Compare the checkpoint before and behind its transforms.

    Args:
        original: of the checkpoint as it was loaded.
        transformed: of the checkpoint with transformed weights.
        times: how many times the limit is the usual one.

    Raises:
        ModelError: they differ.
    """
    limit = SAME_LIMIT * times
    found = difference(original, transformed.logits, transformed.streams, limit=limit, rotated=True)
    if found is not None:
        raise fault("the weights were transformed wrongly", str(found))


def check_sliced(original: Recording, sliced: Recording) -> None:
    """Compare the sliced model at full depth with the checkpoint as it was loaded.

    Args:
        original: of the checkpoint as it was loaded.
        sliced: of the model with sliced weights.

    Raises:
        ModelError: they differ by more than rounding and tuning can explain.
    """
    found = difference(original, sliced.logits, sliced.streams, limit=SLICED_LIMIT, rotated=True)
    if found is not None:
        raise fault("at 8 bits the sliced model is another model", str(found))


def fault(what: str, found: str) -> ModelError:
    """The error of a check that fails.

    Args:
        what: which step went wrong.
        found: what was compared, and the values.
    """
    return ModelError(f"the check of the export failed: {what}; {found}; no bundle was written: report this model")
