"""The body of ``Router`` in stock ops.  ``format.router.route`` is its definition."""

from __future__ import annotations

import numpy as np
import onnx

from mbq_runtime.bundle.slice_profile import SliceProfile
from mbq_targets.constants import MEAN_SQUARE_EPS

from .onnx_text import floats, function, ints

ROUTER_INPUTS = ("x", "avg_bits", "table", "bias", "norm_gain")
ROUTER_MLP_INPUTS = ("w1", "b1", "w2")
"""More inputs of a learned router."""


def router_inputs(mlp: bool) -> tuple[str, ...]:
    """Names of the inputs of ``Router``.

    Args:
        mlp: whether it is a learned router.
    """
    return ROUTER_INPUTS + (ROUTER_MLP_INPUTS if mlp else ())


def router(profile: SliceProfile, mlp: bool) -> onnx.FunctionProto:
    """``Router(x, avg_bits, table, bias, norm_gain[, w1, b1, w2]) -> depth``.

    Budgets in the table must be strictly ascending, thresholds finite.

    Args:
        profile: bits of each slice.
        mlp: whether it is a learned router.
    """
    if profile.depths == 1:
        body = _ONE_DEPTH
    elif mlp:
        body = _PARAMETERS + _NORM_SCORES + _MLP_SCORES + _threshold_and_depth("scores", profile.depths)
    else:
        body = _PARAMETERS + _NORM_SCORES + _threshold_and_depth("norm_scores", profile.depths)
    return function("Router", "", router_inputs(mlp), "depth", body)


_ONE_DEPTH = """
    shape = Shape <start = 0, end = -1> (x)
    depth = ConstantOfShape <value = int32[1] {1}> (shape)
"""

# These nodes read parameters alone, so constant folding runs them once, when the model is loaded.
_PARAMETERS = f"""
    zero = {ints(0)}
    one = {ints(1)}
    two = {ints(2)}
    minus_one = {ints(-1)}
    everything = {ints(np.iinfo(np.int64).max)}
    one_after = {ints(0, 1)}
    never = Constant <value = float {{{np.finfo(np.float32).min}}}> ()

    # One score more, which never passes: so there is always a first score that fails.
    gain = Pad (norm_gain, one_after)
    base = Pad (bias, one_after, never)

    # The table as steps between neighbouring entries.
    from_entries = Slice (table, zero, minus_one, one)
    to_entries = Slice (table, one, everything, one)
    steps = Sub (to_entries, from_entries)
    spans = Gather <axis = 0> (steps, zero)
    rises = Gather <axis = 0> (steps, one)
    from_budgets = Gather <axis = 0> (from_entries, zero)
    first_entry = Gather <axis = 1> (table, zero)
    last_entry = Gather <axis = 1> (table, minus_one)
    first_budget = Gather <axis = 0> (first_entry, zero)
    first_threshold = Gather <axis = 0> (first_entry, one)
    last_budget = Gather <axis = 0> (last_entry, zero)
"""

# norm_scores [M, E] = bias + norm_gain * log(mean square)
_NORM_SCORES = f"""
    flat = Flatten <axis = -1> (x)
    squares = Mul (flat, flat)
    mean = ReduceMean <keepdims = 1> (squares, one)
    eps = {floats(MEAN_SQUARE_EPS)}
    ms = Add (mean, eps)
    log_ms = Log (ms)
    gained = Mul (log_ms, gain)
    norm_scores = Add (gained, base)
"""

# scores [M, E] = norm_scores + w2 @ silu(w1 @ x / rms + b1)
# The product comes before the division, which then takes H numbers a row and not K.
_MLP_SCORES = f"""
    rms = Sqrt (ms)
    w1_wide = Cast <to = {onnx.TensorProto.FLOAT}> (w1)
    projected = Gemm <transB = 1> (flat, w1_wide)
    normed = Div (projected, rms)
    pre = Add (normed, b1)
    gate = Sigmoid (pre)
    hidden = Mul (pre, gate)
    row_after = {ints(0, 0, 1, 0)}
    w2_more = Pad (w2, row_after)
    scores = Gemm <transB = 1> (hidden, w2_more, norm_scores)
"""


def _threshold_and_depth(scores: str, depths: int) -> str:
    """Scores [M, E] -> depth [...].  scores: their name."""
    return f"""
    budget = Slice (avg_bits, zero, one)
    deepest = Slice (avg_bits, one, two)

    # The threshold: linear between the entries of the table.
    over = Sub (budget, from_budgets)
    shares = Div (over, spans)
    nothing = Constant <value = float {{0.0}}> ()
    whole = Constant <value = float {{1.0}}> ()
    climbed = Clip (shares, nothing, whole)
    threshold = Gemm <transB = 1> (climbed, rises, first_threshold)

    # The depth: one more than the scores that pass before the first that fails.
    passed = Greater ({scores}, threshold)
    ones_passed = Cast <to = {onnx.TensorProto.INT32}> (passed)
    leading = ArgMin <axis = 1, keepdims = 0> (ones_passed)
    routed = Add (leading, one)

    # At the ends of the table every token has the same depth.
    all_slices = {ints(depths)}
    at_top = GreaterOrEqual (budget, last_budget)
    wanted = Where (at_top, all_slices, routed)
    at_bottom = LessOrEqual (budget, first_budget)
    asked = Where (at_bottom, one, wanted)
    most = Cast <to = {onnx.TensorProto.INT64}> (deepest)
    depth_wide = Min (asked, most)
    depth_flat = Cast <to = {onnx.TensorProto.INT32}> (depth_wide)
    shape = Shape <start = 0, end = -1> (x)
    depth = Reshape <allowzero = 1> (depth_flat, shape)
"""
