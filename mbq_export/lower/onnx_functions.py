"""Our ONNX ops as model-local functions of stock ops: the form that needs no library.

A portable model holds nodes ``RoutedMatMul``, ``SlicedGather`` and gates in domain ``ai.mbq``, and these functions.
ONNX Runtime 1.28 or newer inlines them, so the stock wheel runs the model.  One set of functions serves every node of
a model.  Shapes are attributes of the nodes; slices, group size and kind of router are fixed in the bodies::

    RoutedMatMul(x, routed_by, avg_bits, table, bias, norm_gain, *weights[, w1, b1, w2]) -> y, depth
                                                  attributes N, K, group_size, slices
    SlicedGather(indices, avg_bits, *weights) -> y          attributes N, K, group_size, slices, depth
    GatedSilu(x) -> y, GatedGelu(x) -> y

RoutedMatMul calls two functions more, ``Router`` (``onnx_router``) and ``SlicedMatMul`` (``onnx_matmul``).

``weights`` are the tensors of ``format.nbits``, in the order of ``weight_inputs``.  Both ops take the same tensors, so
an embedding that is tied to the head is stored once.  ``x`` is float32 [..., K], ``depth`` int32 [...], ``indices``
int64 [...].
"""

from __future__ import annotations

import onnx

from mbq_runtime.bundle.slice_profile import SliceProfile

from ..format.nbits import half_steps, packed_bits, step_ratios, weight_inputs
from .onnx_matmul import sliced_matmul
from .onnx_router import ROUTER_INPUTS, ROUTER_MLP_INPUTS, router
from .onnx_text import DOMAIN, floats, function, ints

GATES = {"silu": "GatedSilu", "gelu_tanh": "GatedGelu"}
"""Op by activation."""

# QuickGelu with alpha 1 is SiLU in one op.
_ACTIVATIONS = {"silu": "com.microsoft.QuickGelu <alpha = 1.0>", "gelu_tanh": 'Gelu <approximate = "tanh">'}


def portable_functions(
    profile: SliceProfile, group_size: int, activation_bits: int = 16, *, mlp: bool
) -> list[onnx.FunctionProto]:
    """The functions of one model.

    Args:
        profile: bits of each slice.
        group_size: weights that share a scale; 64 and 128 are fast, 32 is slower.
        activation_bits: 8 or 16, of the integers that activations are rounded to.
        mlp: whether the model has learned routers.  Stock ops take no absent inputs, so one function cannot serve
            both kinds of router.
    """
    return [
        router(profile, mlp),
        sliced_matmul(profile, group_size, activation_bits),
        _routed_matmul(profile, mlp),
        _sliced_gather(profile, group_size),
        *(_gate(activation) for activation in GATES),
    ]


def _routed_matmul(profile: SliceProfile, mlp: bool) -> onnx.FunctionProto:
    """All tokens are routed; ``x`` may hold only the last of them."""
    parameters, learned = ROUTER_INPUTS[1:], ROUTER_MLP_INPUTS if mlp else ()
    matrix = "N : int = @N, K : int = @K, group_size : int = @group_size, slices : ints = @slices"
    body = f"""
    depth = {DOMAIN}.Router (routed_by, {", ".join((*parameters, *learned))})
    wanted = Shape <start = -2, end = -1> (x)
    routed = Shape <start = -1> (depth)
    first = Sub (routed, wanted)
    last_axis = {ints(-1)}
    depth_x = Slice (depth, first, routed, last_axis)
    y = {DOMAIN}.SlicedMatMul <{matrix}> (x, depth_x, {", ".join(weight_inputs(profile))})
    """
    inputs = ("x", "routed_by", *parameters, *weight_inputs(profile), *learned)
    return function("RoutedMatMul", "<N, K, group_size, slices>", inputs, "y, depth", body)


def _sliced_gather(profile: SliceProfile, group_size: int) -> onnx.FunctionProto:
    body = f"""
    all_rows = {ints(-1)}
    flat = Reshape (indices, all_rows)
    grouping = {ints(0, 0, group_size)}
    own_depth = Constant <value_int : int = @depth> ()
    second = Constant <value_int = 1> ()
    most = Gather (avg_bits, second)
    deepest = Cast <to = {onnx.TensorProto.INT64}> (most)
    depth = Min (own_depth, deepest)
    halves = {floats(0, *half_steps(profile))}
    units_0 = Gather (halves, depth)
    """
    body += "".join(_gathered_slice(profile, e) for e in range(1, profile.depths + 1))
    body += f"""
    step_rows = Gather <axis = 0> (step, flat)
    centre_rows = Gather <axis = 0> (centre, flat)
    step_column = Unsqueeze (step_rows, all_rows)
    centre_column = Unsqueeze (centre_rows, all_rows)
    varying = Mul (units_{profile.depths}, step_column)
    plain_values = Add (varying, centre_column)
    gain_of_depth = Gather <axis = 0> (gain, depth)
    gain_rows = Gather <axis = 0> (gain_of_depth, flat)
    gain_row_column = Unsqueeze (gain_rows, all_rows)
    gain_column = Unsqueeze (gain_row_column, all_rows)
    values = Mul (plain_values, gain_column)
    leading = Shape (indices)
    k = Constant <value_int : int = @K> ()
    one = {ints(1)}
    k_row = Reshape (k, one)
    y_shape = Concat <axis = 0> (leading, k_row)
    y = Reshape (values, y_shape)
    """
    inputs = ("indices", "avg_bits", *weight_inputs(profile))
    return function("SlicedGather", "<N, K, group_size, slices, depth>", inputs, "y", body)


def _gathered_slice(profile: SliceProfile, e: int) -> str:
    """units_(e - 1) -> units_e [M, G, group_size]: the rows' fields of slice ``e`` are unpacked and added."""
    bits = packed_bits(profile.slices[e - 1])
    shifts = ", ".join(map(str, range(0, 8, bits)))
    ratios = [0.0] * e + [step_ratios(profile)[e - 1]] * (profile.depths - e + 1)
    return f"""
    bytes_{e} = Gather <axis = 0> (slice_{e}, flat)
    shifts_{e} = Constant <value = uint8[{8 // bits}] {{{shifts}}}> ()
    bytes_column_{e} = Unsqueeze (bytes_{e}, all_rows)
    shifted_{e} = BitShift <direction = "RIGHT"> (bytes_column_{e}, shifts_{e})
    mask_{e} = Constant <value = uint8[1] {{{(1 << bits) - 1}}}> ()
    fields_{e} = BitwiseAnd (shifted_{e}, mask_{e})
    stored_{e} = Reshape (fields_{e}, grouping)
    wide_{e} = Cast <to = {onnx.TensorProto.FLOAT}> (stored_{e})
    zero_{e} = {floats(2 ** (bits - 1))}
    middled_{e} = Sub (wide_{e}, zero_{e})
    # The ratio by depth: a slice beyond the attribute counts zero times.
    ratios_{e} = {floats(*ratios)}
    ratio_{e} = Gather (ratios_{e}, depth)
    term_{e} = Mul (middled_{e}, ratio_{e})
    units_{e} = Add (term_{e}, units_{e - 1})
    """


def _gate(activation: str) -> onnx.FunctionProto:
    body = f"""
    gate, up = Split <axis = -1, num_outputs = 2> (x)
    active = {_ACTIVATIONS[activation]} (gate)
    y = Mul (active, up)
    """
    return function(GATES[activation], "", ("x",), "y", body)
