"""exp, exp2, sigmoid and tanh of float32 vectors. LLVM has no vector form of them."""

from __future__ import annotations

from tvm.tirx.script import builder as T

from .emit import Expr, bind, cast, const, fma, reinterpret

# exp(x) = 2**n * exp(r) with r = x - n * ln 2. ln 2 is in two parts. The polynomial is that of Cephes' expf.
_LOG2E, _LN2_HIGH, _LN2_LOW = 1.44269504088896341, 0.693359375, -2.12194440e-4
_EXP = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
_EXP_RANGE = (-87.0, 88.0)

EXP2 = (9.58285e-3, 5.590643e-2, 0.24024099, 0.69312419, 1.0)
"""Polynomial of 2**r for r from -0.5 to 0.5, exact at 0. The largest relative error is 2.8e-6."""

LOG2_1P = (-1.644238, -1.060627, -0.9103369, 0.3724745, -0.7312578, 1.44236, -1.845157e-6)
"""Polynomial of log2(1 + x) for x from -0.5 to 0. The largest error is 1.9e-6."""

_ROUNDING = float(3 << 22)
"""Adding this rounds a number of less than 2**22 to a whole one, in its lowest bits."""


def exp(x: Expr, lanes: int) -> Expr:
    """exp to 2 units in the last place. Below -87 the result is exp(-87), above 88 it is exp(88).

    Args:
        x: float32 vector.
        lanes: its lanes.
    """

    def c(value: float) -> Expr:
        return const(value, "float32", lanes)

    low, high = _EXP_RANGE
    x = bind(T.max(T.min(x, c(high)), c(low)))
    n = bind(T.nearbyint(x * c(_LOG2E)))
    r = fma(n, c(-_LN2_LOW), fma(n, c(-_LN2_HIGH), x))
    y = c(_EXP[0])
    for coefficient in _EXP[1:]:
        y = fma(y, r, c(coefficient))
    y = fma(bind(y * r), r, bind(r + c(1)))
    exponent = (cast(n, "int32", lanes) + const(127, "int32", lanes)) << const(23, "int32", lanes)
    return bind(y * reinterpret(exponent, "float32", lanes))


def evaluate(polynomial: tuple[float, ...], x: Expr, lanes: int) -> Expr:
    """A polynomial.

    Args:
        polynomial: its coefficients, that of the highest power first.
        x: float32 vector.
        lanes: its lanes.
    """
    y = const(polynomial[0], "float32", lanes)
    for coefficient in polynomial[1:]:
        y = fma(y, x, const(coefficient, "float32", lanes))
    return y


def exp2(x: Expr, lanes: int) -> Expr:
    """2**x to 3e-6 of it, for attention's weights, which are rounded more. From -127 down the result is 0.

    Args:
        x: float32 vector of at most 127.
        lanes: its lanes.
    """
    x = bind(T.max(x, const(-127, "float32", lanes)))
    shifted = bind(x + const(_ROUNDING, "float32", lanes))
    # TVM would simplify a plain difference to x.
    r = bind(x - fma(shifted, const(1, "float32", lanes), const(-_ROUNDING, "float32", lanes)))
    y = evaluate(EXP2, r, lanes)
    # The lowest bits of ``shifted`` are the whole number. It is added to the exponent.
    more = reinterpret(shifted, "int32", lanes) << const(23, "int32", lanes)
    return bind(reinterpret(reinterpret(y, "int32", lanes) + more, "float32", lanes))


def sigmoid(x: Expr, lanes: int) -> Expr:
    """1 / (1 + exp(-x)).

    Args:
        x: float32 vector.
        lanes: its lanes.
    """
    one = const(1, "float32", lanes)
    return bind(one / (one + exp(const(0, "float32", lanes) - x, lanes)))


def tanh(x: Expr, lanes: int) -> Expr:
    """2 * sigmoid(2 x) - 1.

    Args:
        x: float32 vector.
        lanes: its lanes.
    """
    return fma(sigmoid(bind(x + x), lanes), const(2, "float32", lanes), const(-1, "float32", lanes))
