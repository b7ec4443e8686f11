"""The ops as model-local functions of stock ONNX Runtime ops: the form that needs no library.

A graph lowered this way holds nodes ``ai.mbq::RoutedMatMul`` (or its parts, ``Router`` and
``SlicedMatMul``) and ``SlicedGather`` plus the functions built here.  ONNX Runtime (1.28 or newer)
inlines them, so such a graph runs wherever the stock wheel does.  One set of functions serves every node of
one model; shapes come from the nodes' attributes, the slices, the group size and the kind of router are fixed
when it is built::

    Router(x, avg_bits, table, bias, norm_gain[, w1, b1, w2]) -> depth
    SlicedMatMul(x, depth, *weights) -> y             attributes N, K, group_size, slices
    RoutedMatMul(x, routed_by, avg_bits, table, bias, norm_gain, *weights[, w1, b1, w2]) -> y, depth
    SlicedGather(indices, *weights) -> y              attributes N, K, group_size, slices, depth
    GatedSilu(x) -> y, GatedGelu(x) -> y

``weights`` are the tensors of ``pack_nbits`` in the order of ``weight_inputs``: the same tensors
for both ops, so an embedding tied to the head is stored once.  Router has the inputs of the native
op; its budgets have to be strictly ascending and its thresholds finite.  ``x`` is float32 [..., K],
``depth`` int32 [...], ``indices`` int64 [...].

Arithmetic.  Let slice ``e`` have ``b`` bits, ``B`` of them up to and including it, and let ``f`` be
its field of the code.  The value of a weight at depth ``k`` is the sum of one term for each slice::

    w(k) = offset + sum over e <= k of  scale * 2**(2 - B) * f      + scale * 2**(1 - B of slice k)
         = offset + 2 * scale
                  + sum over e <= k of  scale * 2**(2 - B) * (f - 2**(b - 1) + 1/2)

MatMulNBits is fast only with whole zero points, best with its default one, so it takes the fields
about their middle, and the halves and the offset, constant within a group, act on the group sums
``u`` of the activations instead.  With ``step = scale * 2**(2 - b1)`` and
``centre = offset + scale * (2 + 2**(1 - b1))`` (b1 bits in slice 1)::

    y = MatMulNBits_1(x; step) + u @ centre.T
      + sum over 1 < e <= k of  MatMulNBits_e(x * r_e; step) + r_e / 2 * u @ step.T,   r_e = 2**(b1 - B)

``r_e`` is a power of two, so scaling the activations by it costs no accuracy.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser

from mbq_runtime.bundle.slice_profile import SliceProfile

from ..format.nbits import packed_bits, weight_inputs
from ..format.ops import SMALLEST_ACTIVATION
from ..format.router import MEAN_SQUARE_EPS

DOMAIN = "ai.mbq"
DOMAIN_VERSION = 1
OPSET_IMPORTS = {"": 22, "com.microsoft": 1}
"""Opsets the bodies are written in; the model has to import the same."""

ROUTER_INPUTS = ("x", "avg_bits", "table", "bias", "norm_gain")
ROUTER_MLP_INPUTS = ("w1", "b1", "w2")

GATES = {"silu": "GatedSilu", "gelu_tanh": "GatedGelu"}
"""Op by activation."""

# QuickGelu with alpha 1 is SiLU in one op.
_ACTIVATIONS = {"silu": "com.microsoft.QuickGelu <alpha = 1.0>", "gelu_tanh": 'Gelu <approximate = "tanh">'}

# Without int8 activations the 2-bit and 8-bit kernels are a hundred times slower.
_INT8_ACTIVATIONS = 4


def portable_functions(
    profile: SliceProfile, group_size: int, activation_bits: int = 16, *, mlp: bool
) -> list[onnx.FunctionProto]:
    """Router, SlicedMatMul, both in one, SlicedGather and the gates for one model.

    ``mlp`` says which of its two forms the model's routers have: stock ops take no absent inputs,
    so a function cannot serve both.  (With one depth there is nothing to route and ``mlp`` only
    decides the inputs.)  Group sizes 64 and 128 are fast, 32 works but is slower.
    """
    return [
        _router(profile, mlp),
        _sliced_matmul(profile, group_size, activation_bits // 8),
        _routed_matmul(profile, mlp),
        _sliced_gather(profile, group_size),
        *(_gate(activation) for activation in GATES),
    ]


def _function(name: str, attributes: str, inputs: tuple[str, ...], output: str, body: str) -> onnx.FunctionProto:
    versions = {**OPSET_IMPORTS, DOMAIN: DOMAIN_VERSION}
    imports = ", ".join(f'"{domain}" : {version}' for domain, version in versions.items())
    return onnx.parser.parse_function(
        f'<domain: "{DOMAIN}", opset_import: [{imports}]>\n'
        f"{name} {attributes} ({', '.join(inputs)}) => ({output}) {{\n{body}\n}}"
    )


def _row(values: list[float]) -> str:
    """The text of a float32 vector constant."""
    return f"Constant <value = float[{len(values)}] {{{', '.join(repr(float(v)) for v in values)}}}> ()"


def _ratios(profile: SliceProfile) -> list[float]:
    """``r_e``: the step of slice ``e`` over that of slice 1; r_1 is 1."""
    return [2.0 ** (profile.min_bits - upto) for upto in profile.depth_bits]


def _halves(profile: SliceProfile) -> list[float]:
    """What depth ``k`` adds to ``centre``, in steps: half of each ratio from slice 2 to ``k``."""
    ratios = _ratios(profile)
    return [sum(ratios[1:k]) / 2 for k in range(1, profile.depths + 1)]


def _sliced_matmul(profile: SliceProfile, group_size: int, terms: int) -> onnx.FunctionProto:
    """terms: int8 terms that stand for an activation, as its bytes do in the definition."""
    lines = [
        "flat_x = Flatten <axis = -1> (x)",  # [M, K]
        # Sizes by name: none can be left to be found out where there are no rows.
        "k = Constant <value_int : int = @K> ()",
        "one = Constant <value = int64[1] {1}> ()",
        "k_row = Reshape (k, one)",
        "rows = Constant <value = int64[1] {0}> ()",
        f"group = Constant <value = int64[1] {{{group_size}}}> ()",
        "groups = Div (k_row, group)",
        "grouping = Concat <axis = 0> (rows, groups, group)",
        "rest_1 = Reshape (flat_x, grouping)",
        "last = Constant <value = int64[1] {2}> ()",
        f"smallest = {_row([float(SMALLEST_ACTIVATION)])}",
        f"levels = {_row([127.0])}",
        *_activation_terms(terms),
        "flattening = Concat <axis = 0> (rows, k_row)",
        "flat = Reshape (grouped, flattening)",  # [R, K], R = terms * M
        "sums = ReduceSum <keepdims = 0> (grouped, last)",  # [R, G]
        _nbits(profile, group_size, 1, "flat", "coarse"),
        "y_1 = Gemm <transB = 1> (sums, centre, coarse)",
    ]
    if profile.depths > 1:
        lines += [
            "all_rows = Constant <value = int64[1] {-1}> ()",
            "depths_m = Reshape (depth, all_rows)",
            f"depths = Concat <axis = 0> ({', '.join(['depths_m'] * terms)})",
            f"halves = {_row([0.0, *_halves(profile)])}",
        ]
    for e, ratio in enumerate(_ratios(profile)[1:], 2):
        # Rows that stop above this slice are left out of its product, which may have none left.
        lines += [
            f"least_{e} = Constant <value = int32[1] {{{e}}}> ()",
            f"takes_{e} = GreaterOrEqual (depths, least_{e})",
            f"found_{e} = NonZero (takes_{e})",
            f"rows_{e} = Transpose <perm = [1, 0]> (found_{e})",  # [R, 1]
            f"taken_{e} = GatherND (flat, rows_{e})",
            f"ratio_{e} = {_row([ratio])}",
            f"scaled_{e} = Mul (taken_{e}, ratio_{e})",
            _nbits(profile, group_size, e, f"scaled_{e}", f"product_{e}"),
        ]
        if e == 2:  # the halves of this and of all finer slices at once, by each row's depth
            lines += [
                "fine_sums = GatherND (sums, rows_2)",
                "fine_depths = GatherND (depths, rows_2)",
                "half = Gather (halves, fine_depths)",
                "half_column = Unsqueeze (half, all_rows)",
                "half_sums = Mul (fine_sums, half_column)",
                "add_2 = Gemm <transB = 1> (half_sums, step, product_2)",
            ]
        added = "add_2" if e == 2 else f"product_{e}"
        lines.append(f'y_{e} = ScatterND <reduction = "add"> (y_{e - 1}, rows_{e}, {added})')
    lines += [
        # The terms' rows are added up again.
        "n = Constant <value_int : int = @N> ()",
        "n_row = Reshape (n, one)",
        f"terms_first = Constant <value = int64[2] {{{terms}, -1}}> ()",
        "term_shape = Concat <axis = 0> (terms_first, n_row)",
        f"term_y = Reshape (y_{profile.depths}, term_shape)",
        "first_axis = Constant <value = int64[1] {0}> ()",
        "flat_y = ReduceSum <keepdims = 0> (term_y, first_axis)",
        "leading = Shape <start = 0, end = -1> (x)",
        "y_shape = Concat <axis = 0> (leading, n_row)",
        "y = Reshape <allowzero = 1> (flat_y, y_shape)",
    ]
    inputs = ("x", "depth", *weight_inputs(profile))
    return _function("SlicedMatMul", "<N, K, group_size, slices>", inputs, "y", "\n".join(lines))


def _routed_matmul(profile: SliceProfile, mlp: bool) -> onnx.FunctionProto:
    router = (*ROUTER_INPUTS[1:], *(ROUTER_MLP_INPUTS if mlp else ()))
    matrix = "N : int = @N, K : int = @K, group_size : int = @group_size, slices : ints = @slices"
    body = f"""
        depth = {DOMAIN}.Router (routed_by, {", ".join(router)})
        wanted = Shape <start = -2, end = -1> (x)
        routed = Shape <start = -1> (depth)
        first = Sub (routed, wanted)
        last_axis = Constant <value = int64[1] {{-1}}> ()
        depth_x = Slice (depth, first, routed, last_axis)
        y = {DOMAIN}.SlicedMatMul <{matrix}> (x, depth_x, {", ".join(weight_inputs(profile))})
    """
    inputs = ("x", "routed_by", *ROUTER_INPUTS[1:], *weight_inputs(profile), *(ROUTER_MLP_INPUTS if mlp else ()))
    return _function("RoutedMatMul", "<N, K, group_size, slices>", inputs, "y, depth", body)


def _activation_terms(count: int) -> list[str]:
    """rest_1 [M, G, group] -> grouped [terms * M, G, group]: the int8 terms of the activations, scaled back.

    MatMulNBits rounds its rows to int8 by itself, so that the largest of a group becomes 127.  Rows that are
    already so rounded pass through it unchanged, and the group sums see the same values.  The second term is
    the rounding error of the first, with a step of its own where the definition's low bytes have a 256th of the
    high ones': both are within 2**-15 of the group's peak, and a portable bundle says what a native one says.
    """
    lines = []
    for t in range(1, count + 1):
        lines += [
            f"magnitudes_{t} = Abs (rest_{t})",
            f"seen_{t} = ReduceMax <keepdims = 1> (magnitudes_{t}, last)",
            f"counts_{t} = GreaterOrEqual (seen_{t}, smallest)",
            f"divisors_{t} = Max (seen_{t}, smallest)",
            f"inverse_{t} = Div (levels, divisors_{t})",
            f"in_steps_{t} = Mul (rest_{t}, inverse_{t})",
            f"nearest_{t} = Round (in_steps_{t})",
            f"all_steps_{t} = Div (seen_{t}, levels)",
            f"nothing_{t} = Sub (all_steps_{t}, all_steps_{t})",
            f"steps_{t} = Where (counts_{t}, all_steps_{t}, nothing_{t})",
            f"term_{t} = Mul (nearest_{t}, steps_{t})",
            f"rest_{t + 1} = Sub (rest_{t}, term_{t})",
        ]
    terms = ", ".join(f"term_{t}" for t in range(1, count + 1))
    return [*lines[:-1], f"grouped = Concat <axis = 0> ({terms})"]


def _nbits(profile: SliceProfile, group_size: int, e: int, x: str, y: str) -> str:
    """The product of ``x`` with slice ``e``, in units of slice 1's step."""
    attributes = (
        f"K : int = @K, N : int = @N, bits = {packed_bits(profile.slices[e - 1])}, "
        f"block_size = {group_size}, accuracy_level = {_INT8_ACTIVATIONS}"
    )
    return f"{y} = com.microsoft.MatMulNBits <{attributes}> ({x}, slice_{e}, step)"


def _sliced_gather(profile: SliceProfile, group_size: int) -> onnx.FunctionProto:
    lines = [
        "all_rows = Constant <value = int64[1] {-1}> ()",
        "flat = Reshape (indices, all_rows)",  # [M]
        f"grouping = Constant <value = int64[3] {{0, 0, {group_size}}}> ()",
        # A slice past the attribute counts zero times: its ratio is looked up by depth.
        "depth = Constant <value_int : int = @depth> ()",
        f"halves = {_row([0.0, *_halves(profile)])}",
        "units_0 = Gather (halves, depth)",
    ]
    for e, ratio in enumerate(_ratios(profile), 1):
        bits = packed_bits(profile.slices[e - 1])
        lines += [
            f"bytes_{e} = Gather <axis = 0> (slice_{e}, flat)",  # [M, G, bytes]
            f"shifts_{e} = Constant <value = uint8[{8 // bits}] {{{', '.join(map(str, range(0, 8, bits)))}}}> ()",
            f"bytes_column_{e} = Unsqueeze (bytes_{e}, all_rows)",
            f'shifted_{e} = BitShift <direction = "RIGHT"> (bytes_column_{e}, shifts_{e})',
            f"mask_{e} = Constant <value = uint8[1] {{{(1 << bits) - 1}}}> ()",
            f"fields_{e} = BitwiseAnd (shifted_{e}, mask_{e})",
            f"stored_{e} = Reshape (fields_{e}, grouping)",  # [M, G, group_size]
            f"wide_{e} = Cast <to = {onnx.TensorProto.FLOAT}> (stored_{e})",
            f"zero_{e} = {_row([2.0 ** (bits - 1)])}",
            f"middled_{e} = Sub (wide_{e}, zero_{e})",
            f"ratios_{e} = {_row([0.0] * e + [ratio] * (profile.depths - e + 1))}",
            f"ratio_{e} = Gather (ratios_{e}, depth)",
            f"term_{e} = Mul (middled_{e}, ratio_{e})",
            f"units_{e} = Add (term_{e}, units_{e - 1})",
        ]
    lines += [
        "step_rows = Gather <axis = 0> (step, flat)",
        "centre_rows = Gather <axis = 0> (centre, flat)",
        "step_column = Unsqueeze (step_rows, all_rows)",
        "centre_column = Unsqueeze (centre_rows, all_rows)",
        f"varying = Mul (units_{profile.depths}, step_column)",
        "values = Add (varying, centre_column)",
        "leading = Shape (indices)",
        "k = Constant <value_int : int = @K> ()",
        "one = Constant <value = int64[1] {1}> ()",
        "k_row = Reshape (k, one)",
        "y_shape = Concat <axis = 0> (leading, k_row)",
        "y = Reshape (values, y_shape)",
    ]
    inputs = ("indices", *weight_inputs(profile))
    return _function("SlicedGather", "<N, K, group_size, slices, depth>", inputs, "y", "\n".join(lines))


def _gate(activation: str) -> onnx.FunctionProto:
    body = f"""
        gate, up = Split <axis = -1, num_outputs = 2> (x)
        active = {_ACTIVATIONS[activation]} (gate)
        y = Mul (active, up)
    """
    return _function(GATES[activation], "", ("x",), "y", body)


# What hangs on the parameters alone, which constant folding computes once when the model is
# loaded: the table as rises between neighbouring budgets, and bias and gain of one score more
# that never passes, so that there is always a first score that fails.
_PARAMETERS = f"""
    zero = Constant <value = int64[1] {{0}}> ()
    one = Constant <value = int64[1] {{1}}> ()
    minus_one = Constant <value = int64[1] {{-1}}> ()
    everything = Constant <value = int64[1] {{{np.iinfo(np.int64).max}}}> ()
    one_after = Constant <value = int64[2] {{0, 1}}> ()
    never = Constant <value = float {{{np.finfo(np.float32).min}}}> ()
    gain = Pad (norm_gain, one_after)
    base = Pad (bias, one_after, never)
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

_NORM_SCORES = f"""
    flat = Flatten <axis = -1> (x)
    squares = Mul (flat, flat)
    mean = ReduceMean <keepdims = 1> (squares, one)
    eps = {_row([MEAN_SQUARE_EPS])}
    ms = Add (mean, eps)
    log_ms = Log (ms)
    gained = Mul (log_ms, gain)
    norm_scores = Add (gained, base)
"""

# The weights act before the division by the norm: H numbers a row to divide instead of K.
_MLP_SCORES = f"""
    rms = Sqrt (ms)
    w1_wide = Cast <to = {onnx.TensorProto.FLOAT}> (w1)
    projected = Gemm <transB = 1> (flat, w1_wide)
    normed = Div (projected, rms)
    pre = Add (normed, b1)
    gate = Sigmoid (pre)
    hidden = Mul (pre, gate)
    row_after = Constant <value = int64[4] {{0, 0, 1, 0}}> ()
    w2_more = Pad (w2, row_after)
    scores = Gemm <transB = 1> (hidden, w2_more, norm_scores)
"""


def _depths(scores: str, depths: int) -> str:
    """Threshold, prefix rule and the ends of the budget: scores [M, E] -> depth [...]."""
    return f"""
    over = Sub (avg_bits, from_budgets)
    shares = Div (over, spans)
    nothing = Constant <value = float {{0.0}}> ()
    whole = Constant <value = float {{1.0}}> ()
    climbed = Clip (shares, nothing, whole)
    threshold = Gemm <transB = 1> (climbed, rises, first_threshold)
    passed = Greater ({scores}, threshold)
    ones_passed = Cast <to = {onnx.TensorProto.INT32}> (passed)
    leading = ArgMin <axis = 1, keepdims = 0> (ones_passed)
    routed = Add (leading, one)
    most = Constant <value = int64[1] {{{depths}}}> ()
    at_top = GreaterOrEqual (avg_bits, last_budget)
    capped = Where (at_top, most, routed)
    at_bottom = LessOrEqual (avg_bits, first_budget)
    depth_wide = Where (at_bottom, one, capped)
    depth_flat = Cast <to = {onnx.TensorProto.INT32}> (depth_wide)
    shape = Shape <start = 0, end = -1> (x)
    depth = Reshape <allowzero = 1> (depth_flat, shape)
"""


_ONE_DEPTH = """
    shape = Shape <start = 0, end = -1> (x)
    depth = ConstantOfShape <value = int32[1] {1}> (shape)
"""


def _router(profile: SliceProfile, mlp: bool) -> onnx.FunctionProto:
    if profile.depths == 1:
        body = _ONE_DEPTH
    elif mlp:
        body = _PARAMETERS + _NORM_SCORES + _MLP_SCORES + _depths("scores", profile.depths)
    else:
        body = _PARAMETERS + _NORM_SCORES + _depths("norm_scores", profile.depths)
    return _function("Router", "", ROUTER_INPUTS + (ROUTER_MLP_INPUTS if mlp else ()), "depth", body)
