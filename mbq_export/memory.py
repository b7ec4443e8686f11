"""The bounds an export keeps its memory to, and what each of its stages then takes.

Mapped files, which the system takes out of memory as need be, do not count: slices that are done are in one, and
so are the weights of a large model.
"""

from __future__ import annotations

import ctypes
import sys
from typing import TYPE_CHECKING

from mbq_runtime.bundle.isa import this_machine

from .methods import CONTEXT_TOKENS, PROVISIONAL_WINDOWS, SECOND, held_back_windows
from .model.families import Decoder

if TYPE_CHECKING:
    from .plan import Plan

KEPT_ACTIVATION_BYTES = 2 << 30
"""More than that of a window is not kept for a backward pass, but made again block by block."""

KEPT_WEIGHT_BYTES = 2 << 30
"""A model of more, in float32, is not kept in memory but in a file."""

ROUTER_INPUT_BYTES = 3 << 29
"""As much is kept of what learned routers are fitted to."""

WEIGHTS_AT_ONCE = 1 << 26
"""A larger matrix is rotated and sliced a part of its rows at a time."""

_ROUTER_CASES = 14
"""So many ways to route a model are compared side by side: four kinds at three budgets, and both ends."""


def give_back() -> None:
    """Let the system have what is free inside the heap: glibc keeps all that lies under anything still in use, which
    between two stages was as much as a quarter of what either holds."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def fast_bytes() -> int:
    """Size of the numbers that are multiplied where speed counts: 2, for bfloat16, where the processor has it."""
    return 4 if this_machine().features.isdisjoint({"avx512_bf16", "amx_bf16"}) else 2


def activation_bytes(decoder: Decoder) -> int:
    """What a backward pass of one window keeps of a forward pass in float32: inputs and outputs, attention weights."""
    widths = sum(2 * n + 2 * k for n, k in decoder.role_shapes.values()) + decoder.heads * CONTEXT_TOKENS
    return 4 * CONTEXT_TOKENS * widths * decoder.layers


def router_input_bytes(decoder: Decoder, tokens: int) -> int:
    """float16 inputs of every unit for so many tokens."""
    return 2 * tokens * sum(k for _, k in decoder.unit_shapes().values())


_LIBRARIES_BYTES = 1 << 29
"""torch, transformers, TVM, and what their allocators do not give back; their own files are mapped."""


def by_stage(plan: Plan) -> dict[str, int]:
    """Bytes that each hungry stage holds, the libraries included."""
    d, tokens, fast = plan.decoder, CONTEXT_TOKENS, fast_bytes()
    shapes, depths = list(d.role_shapes.values()), plan.profile.depths
    block, head = sum(n * k for n, k in shapes), d.vocab_size * d.hidden_size
    largest, widest = max(n * k for n, k in shapes), max(k for _, k in shapes)
    a_weight = 0 if plan.weights_file_bytes else 4
    before = _LIBRARIES_BYTES + a_weight * plan.parameters + (4 * head if d.tied else 0)
    # A GPU has no mapped files: codes are in its memory.
    after = _LIBRARIES_BYTES + a_weight * head + (plan.routed_parameters if plan.in_memory else 0)
    # Every weight that is changed or sliced is there once more for each depth, and as it was.
    streams = 4 * (depths + 1)

    # A backward pass keeps activations, fast copies of weights, and logits with their gradients.
    kept, in_use, logits = activation_bytes(d), plan.routed_parameters, tokens * d.vocab_size
    # What each layer was given, and its gradients: some of what is kept where all is.
    seen = 0
    if kept > KEPT_ACTIVATION_BYTES:
        kept, in_use = kept // d.layers + 4 * tokens * d.layers * d.hidden_size, block + head
        seen = 4 * tokens * sum(n + k for n, k in d.unit_shapes().values())

    # Scales and offsets as they were and as they become, gradients, and Adam's moments.
    tuned = 2 * 4 * 5 * (plan.routed_parameters // plan.group_size)
    if SECOND in plan.tunings:  # behind residuals chosen from the weights; routers look at what norms are given
        tuned += a_weight * plan.routed_parameters + 2 * 4 * tokens * d.layers * d.hidden_size
    windows = max((phase.windows_per_step for phase in plan.tunings), default=0)
    teacher = fast * head + 2 * plan.calib_tokens * d.hidden_size
    measured = held_back_windows(plan.calib_tokens // tokens) // 2 * tokens
    inputs, provisional = (
        min(router_input_bytes(d, of), ROUTER_INPUT_BYTES) for of in (measured, PROVISIONAL_WINDOWS * tokens)
    )
    measuring = after + kept + seen + 4 * head + 4 * (depths + 4) * logits
    return {
        "rotating": before + 4 * 8 * min(max(largest, head), WEIGHTS_AT_ONCE),  # in float64
        "weighing tokens": before + kept * fast // 4 + fast * in_use + 20 * logits,
        # The inputs' second moments; those of one layer three times over to invert them, and then their factor.
        "slicing": before + 8 * sum(k * k for _, k in shapes)
        + max(3 * 8 * widest**2, 4 * widest**2 + streams * min(largest, WEIGHTS_AT_ONCE)),
        "slicing the head": before + streams * min(head, WEIGHTS_AT_ONCE),
        "tuning": after + tuned + teacher + windows * (kept * fast // 4 + 3 * fast * logits) + 2 * fast * head,
        "fitting provisional routers": measuring + teacher + provisional if SECOND in plan.tunings else 0,
        "measuring slices": measuring + inputs,
        # Weights of a block or of the head at every depth, and the residual stream of every case.
        "comparing routers": after + inputs + fast * depths * max(block, head)
        + 4 * _ROUTER_CASES * measured * d.hidden_size,
        "writing": _LIBRARIES_BYTES + plan.disk_bytes + 4 * max(largest, head),
    }  # fmt: skip
