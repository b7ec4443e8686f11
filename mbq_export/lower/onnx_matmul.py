"""The body of ``SlicedMatMul`` in stock ops.  ``format.ops.sliced_matmul`` is its definition.

MatMulNBits is fast only with its default zero point, the middle of the fields.  ``format.nbits`` therefore stores the
value of a weight as fields about their middle, and terms that are constant within a group.  The latter act on ``u``,
the sums of the activations of each group.  With ``r_e`` of ``step_ratios`` and ``h`` of ``half_steps``::

    y = gain(depth) * (MatMulNBits_1(x; step) + u @ centre.T + h(depth) * u @ step.T
                       + sum over 1 < e <= depth of  MatMulNBits_e(x * r_e; step))

MatMulNBits rounds activations to int8 itself, such that the largest of a group becomes 127.  Rows that are already
rounded so pass it unchanged, and the group sums see the same values.  So the body rounds first.  The last bit of a
product ``x * r_e`` may be rounded, which changes no int8.  Where activations have 16 bits, each is a sum of two int8
terms; the second is the rounding error of the first.  Each term is a row of its own in the products.  The definition's
low byte has a 256th of the high byte's step, and the second term has a step of its own.  Both are within 2**-15 of the
group's largest value.
"""

from __future__ import annotations

import onnx

from mbq_runtime.bundle.slice_profile import SliceProfile
from mbq_targets.constants import SMALLEST_ACTIVATION

from ..format.nbits import half_steps, packed_bits, step_ratios, weight_inputs
from .onnx_text import floats, function, ints

# accuracy_level of MatMulNBits: int8 activations.  Without them its 2-bit and 8-bit kernels are 100 times slower.
_INT8_ACTIVATIONS = 4


def sliced_matmul(profile: SliceProfile, group_size: int, activation_bits: int) -> onnx.FunctionProto:
    """``SlicedMatMul(x, depth, *weights) -> y``, with attributes N, K, group_size and slices.

    Args:
        profile: bits of each slice.
        group_size: weights that share a scale, and activations that share a step.
        activation_bits: 8 or 16.
    """
    terms = activation_bits // 8
    body = _groups(group_size)
    body += "".join(_term(t) for t in range(1, terms + 1))
    body += _first_slice(profile, group_size, terms)
    body += _row_depths(profile, terms)
    for e in range(2, profile.depths + 1):
        body += _finer_slice(profile, group_size, e)
    body += f"""
    gain_rows = Gather <axis = 0> (gain, depths)
    y_of_depths = Mul (y_{profile.depths}, gain_rows)
    """
    body += _sum_of_terms("y_of_depths", terms)
    inputs = ("x", "depth", *weight_inputs(profile))
    return function("SlicedMatMul", "<N, K, group_size, slices>", inputs, "y", body)


def _groups(group_size: int) -> str:
    """x [..., K] -> rest_1 [M, G, group_size]."""
    return f"""
    flat_x = Flatten <axis = -1> (x)
    # All sizes are named.  A size of -1 cannot be inferred where there are no rows.
    k = Constant <value_int : int = @K> ()
    one = {ints(1)}
    k_row = Reshape (k, one)
    rows = {ints(0)}
    group = {ints(group_size)}
    groups = Div (k_row, group)
    grouping = Concat <axis = 0> (rows, groups, group)
    rest_1 = Reshape (flat_x, grouping)
    last = {ints(2)}
    smallest = {floats(SMALLEST_ACTIVATION)}
    levels = {floats(127)}
    """


def _term(t: int) -> str:
    """rest_t -> term_t, rounded to 127 steps of the group's largest value; from the second on, first rest_t itself."""
    rest = "" if t == 1 else f"rest_{t} = Sub (rest_{t - 1}, term_{t - 1})"
    return f"""
    {rest}
    magnitudes_{t} = Abs (rest_{t})
    seen_{t} = ReduceMax <keepdims = 1> (magnitudes_{t}, last)
    counts_{t} = GreaterOrEqual (seen_{t}, smallest)
    divisors_{t} = Max (seen_{t}, smallest)
    inverse_{t} = Div (levels, divisors_{t})
    in_steps_{t} = Mul (rest_{t}, inverse_{t})
    nearest_{t} = Round (in_steps_{t})
    all_steps_{t} = Div (seen_{t}, levels)
    nothing_{t} = Sub (all_steps_{t}, all_steps_{t})
    steps_{t} = Where (counts_{t}, all_steps_{t}, nothing_{t})
    term_{t} = Mul (nearest_{t}, steps_{t})
    """


def _first_slice(profile: SliceProfile, group_size: int, terms: int) -> str:
    """term_t -> flat [R, K] and sums [R, G], with R = terms * M; y_1 [R, N] at depth 1."""
    return f"""
    grouped = Concat <axis = 0> ({", ".join(f"term_{t}" for t in range(1, terms + 1))})
    flattening = Concat <axis = 0> (rows, k_row)
    flat = Reshape (grouped, flattening)
    sums = ReduceSum <keepdims = 0> (grouped, last)
    coarse = {_nbits(profile, group_size, 1, "flat")}
    y_1 = Gemm <transB = 1> (sums, centre, coarse)
    """


def _row_depths(profile: SliceProfile, terms: int) -> str:
    """depth [...] -> depths [R]; halves: what each depth adds to ``centre``, in steps."""
    return f"""
    all_rows = {ints(-1)}
    depths_m = Reshape (depth, all_rows)
    depths = Concat <axis = 0> ({", ".join(["depths_m"] * terms)})
    halves = {floats(0, *half_steps(profile))}
    """


def _finer_slice(profile: SliceProfile, group_size: int, e: int) -> str:
    """y_(e - 1) -> y_e: slice ``e`` is added to the rows that reach it.  There may be no such row."""
    product = f"""
    least_{e} = Constant <value = int32[1] {{{e}}}> ()
    takes_{e} = GreaterOrEqual (depths, least_{e})
    found_{e} = NonZero (takes_{e})
    rows_{e} = Transpose <perm = [1, 0]> (found_{e})
    taken_{e} = GatherND (flat, rows_{e})
    ratio_{e} = {floats(step_ratios(profile)[e - 1])}
    scaled_{e} = Mul (taken_{e}, ratio_{e})
    product_{e} = {_nbits(profile, group_size, e, f"scaled_{e}")}
    """
    if e > 2:
        return product + f'y_{e} = ScatterND <reduction = "add"> (y_{e - 1}, rows_{e}, product_{e})'
    return (
        product
        + """
    # The halves of this slice and of all finer ones at once, by each row's depth.
    fine_sums = GatherND (sums, rows_2)
    fine_depths = GatherND (depths, rows_2)
    half = Gather (halves, fine_depths)
    half_column = Unsqueeze (half, all_rows)
    half_sums = Mul (fine_sums, half_column)
    add_2 = Gemm <transB = 1> (half_sums, step, product_2)
    y_2 = ScatterND <reduction = "add"> (y_1, rows_2, add_2)
    """
    )


def _sum_of_terms(product: str, terms: int) -> str:
    """The product [R, N] -> y [..., N]: the terms' rows are added up."""
    return f"""
    n = Constant <value_int : int = @N> ()
    n_row = Reshape (n, one)
    terms_first = {ints(terms, -1)}
    term_shape = Concat <axis = 0> (terms_first, n_row)
    term_y = Reshape ({product}, term_shape)
    first_axis = {ints(0)}
    flat_y = ReduceSum <keepdims = 0> (term_y, first_axis)
    leading = Shape <start = 0, end = -1> (x)
    y_shape = Concat <axis = 0> (leading, n_row)
    y = Reshape <allowzero = 1> (flat_y, y_shape)
    """


def _nbits(profile: SliceProfile, group_size: int, e: int, x: str) -> str:
    """A node: the product of ``x`` with slice ``e``, in units of slice 1's step."""
    attributes = (
        f"K : int = @K, N : int = @N, bits = {packed_bits(profile.slices[e - 1])}, "
        f"block_size = {group_size}, accuracy_level = {_INT8_ACTIVATIONS}"
    )
    return f"com.microsoft.MatMulNBits <{attributes}> ({x}, slice_{e}, step)"
