"""Text that the original model writes itself, to tune on beside the calibration text.

Tuning compares two models' predictions, so what they read need not be true, only such as the model meets. A
calibration text is short, and hundreds of steps would learn it by heart; this makes as much more as is asked
(the idea of LLM-QAT, arXiv 2305.17888).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from ..blocks import autocast, fast_dtype
from ..checkpoint import Checkpoint
from ..store import Store

_PROMPT_TOKENS = 16
_TOGETHER = 64
"""Windows written at once: a step of decoding reads all weights, whatever it makes of them."""


def write(
    checkpoint: Checkpoint,
    windows: NDArray[np.int64],
    count: int,
    seed: int,
    store: Store,
    progress: Callable[[int, int], None],
) -> NDArray[np.int64]:
    """int64 [count, context]: sampled from the model's own distribution behind a few tokens from ``windows``.

    windows: int64 [windows, context].  The checkpoint's model is the original one.  What ``store`` holds is not
    written again.
    """
    context = windows.shape[1]
    chance = np.random.default_rng(seed)
    rows = chance.integers(0, len(windows), count)
    starts = chance.integers(0, context - _PROMPT_TOKENS, count)
    prompts = np.stack([windows[row, start : start + _PROMPT_TOKENS] for row, start in zip(rows, starts, strict=True)])
    parts = []
    for first in range(0, count, _TOGETHER):
        step = f"own_text.{first}"
        kept = store.arrays(step)
        if kept is None:
            kept = {"tokens": _continued(checkpoint, prompts[first : first + _TOGETHER], context, seed + first)}
            store.put_arrays(step, kept)
        parts.append(kept["tokens"])
        progress(min(first + _TOGETHER, count), count)
    return np.concatenate(parts).astype(np.int64)


def _continued(checkpoint: Checkpoint, prompts: NDArray[np.int64], context: int, seed: int) -> NDArray[np.int64]:
    ids, fresh = torch.from_numpy(prompts), context - prompts.shape[1]
    # The library samples from torch's global generator.
    with torch.random.fork_rng(devices=[]), torch.no_grad(), autocast(fast_dtype()):
        torch.manual_seed(seed)
        written = checkpoint.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            min_new_tokens=fresh,
            max_new_tokens=fresh,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            repetition_penalty=1.0,
            eos_token_id=None,
            pad_token_id=0,
        )
    return np.asarray(written.numpy())
