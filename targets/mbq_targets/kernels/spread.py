"""Before attention over a cache of 8 bits: mixes the channels of heads, and rounds queries.

``mbq_export.format.attention`` defines both.
"""

from __future__ import annotations

from tvm.tirx.script import builder as T

from ..constants import MOST_HEAD_DIM
from .activations import bytes_of, size_bits, steps_of, store_bytes, store_pairs
from .attention import number_bytes
from .emit import LANES, bind, const, fma, function, intrin, load, registers, store
from .isa import Isa


def spread(name: str) -> None:
    """Kernel: the Hadamard transform of each block of channels of a head, in place.

    Kernel arguments: x float32 [head_dim]; head_dim, a multiple of 16. A block is the largest power of two that divides
    it.

    Args:
        name: the function's symbol.
    """
    with function(name, {"x": "float32"}, ("head_dim",)) as (x, head_dim):
        vectors = bind(head_dim // LANES)
        values = registers(LANES, "float32")
        with T.serial(0, vectors) as v:
            store(values, 0, LANES, load(x, v * LANES, LANES))
            half = 1
            while half < LANES:
                value = load(values, 0, LANES)
                other = bind(T.Shuffle([value], [lane ^ half for lane in range(LANES)]))
                signs = [const(-1.0 if lane & half else 1.0, "float32") for lane in range(LANES)]
                store(values, 0, LANES, fma(value, bind(T.Shuffle(signs, list(range(LANES)))), other))
                half *= 2
            store(x, v * LANES, LANES, load(values, 0, LANES))
        block = bind(vectors & (T.int64(0) - vectors))
        for log2 in range((MOST_HEAD_DIM // LANES).bit_length() - 1):
            half = 1 << log2
            with T.If(block > T.int64(half)), T.Then(), T.serial(0, vectors // 2) as i:
                first = bind(((i >> log2) << (log2 + 1)) + (i & (half - 1)))
                a, b = (load(x, at * LANES, LANES) for at in (first, first + half))
                store(x, first * LANES, LANES, a + b)
                store(x, (first + half) * LANES, LANES, a - b)


def round_queries(isa: Isa, name: str) -> None:
    """Kernel: a spread query to integers of -127 to 127, by the rule of ``round_rows``.

    Kernel arguments: x float32 [head_dim]; q int8 [number_bytes * head_dim], where those of two bytes are int16, first
    of even channels and then of odd ones; step float32 [1]; sum int32 [1], of the integers; head_dim, a multiple of 16.

    Args:
        isa: instruction set.
        name: the function's symbol.
    """
    pointers = {"x": "float32", "q": "int8", "step": "float32", "sum": "int32"}
    with function(name, pointers, ("head_dim",)) as (x, q, step, sum_of_all, head_dim):
        whole = registers(LANES, "int32")
        store(whole, 0, LANES, const(0, "int32", LANES))
        with T.serial(0, head_dim // LANES) as v:
            store(whole, 0, LANES, T.max(load(whole, 0, LANES), size_bits(load(x, v * LANES, LANES))))
        inverse, one_step = steps_of(load(whole, 0, LANES), 1)
        store(step, 0, 1, one_step)
        store(whole, 0, LANES, const(0, "int32", LANES))
        with T.serial(0, head_dim // LANES) as v:
            parts = bytes_of(load(x, v * LANES, LANES), inverse, 1)
            store(whole, 0, LANES, load(whole, 0, LANES) + parts[0])
            places = [bind(head_dim * byte + v * LANES) for byte in range(number_bytes(isa))]
            (store_pairs if len(places) == 2 else store_bytes)(q, places, [parts])
        store(sum_of_all, 0, 1, intrin("int32", "llvm.vector.reduce.add", load(whole, 0, LANES)))
