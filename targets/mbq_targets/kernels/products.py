"""Integer products of a tile's rows with several runs of bytes at once: the inner loops of prefill.

A run is one byte of every activation of a token. A token has as many runs as its activations have bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm.tirx.script import builder as T

from .emit import Expr, bind, const, intrin, load, reinterpret
from .isa import Isa

Codes = Callable[[int, int], Expr]
"""(quarter, row vector) -> the stored bytes of weights 4 * quarter .. 4 * quarter + 3 of 16."""

_MANY = 8
"""With this many sums, other dot products hide the latency of each one."""


class Products:
    """[run][row vector] sums, by dot products with the bytes of one run each.

    Args:
        isa: instruction set.
        count: runs.
        vectors: row vectors.
        max_code: the largest code before 128 is subtracted.
    """

    def __init__(self, isa: Isa, count: int, vectors: int, max_code: int) -> None:
        self.isa, self.count, self.vectors = isa, count, vectors
        self.chains = isa.chains if count * vectors < _MANY else 1
        self.sums = [
            [[isa.accumulator(max_code) for _ in range(self.chains)] for _ in range(vectors)] for _ in range(count)
        ]

    @staticmethod
    def stored(codes: list[Expr]) -> list[Expr]:
        """The order in which the tile holds the bytes.

        Args:
            codes: four vectors of ``unpack.code_bytes``.
        """
        return codes

    def add(self, codes: Codes, q: Any, starts: list[Expr]) -> None:
        """Add the products of 16 weights.

        Args:
            codes: the stored bytes.
            q: int8 buffer of activations.
            starts: where the bytes of each run begin.
        """
        acts = [self.isa.activations(q, start) for start in starts]
        for j in range(4):
            vectors = [codes(j, v) for v in range(self.vectors)]
            for run, act in zip(self.sums, acts, strict=True):
                for chains, vector in zip(run, vectors, strict=True):
                    chains[j % self.chains].add(vector, act[j])

    def results(self) -> list[list[Expr]]:
        """int32 [run][row vector]."""
        return [[tree_sum([chain.result() for chain in chains]) for chains in run] for run in self.sums]


class MatrixProducts(Products):
    """Sums by ``smmla``: [2 rows, 8 weights] times [2 runs, 8 weights]. An odd last run is multiplied twice.

    Two stored vectors of 4 rows and 4 weights become two vectors of 2 rows and 8 weights.

    Args:
        isa: instruction set with ``smmla``.
        count: runs.
        vectors: row vectors.
        max_code: unused; the sums are int32.
    """

    _PAIRS = ([0, 4, 1, 5], [2, 6, 3, 7])

    def __init__(self, isa: Isa, count: int, vectors: int, max_code: int) -> None:
        self.isa, self.count, self.vectors = isa, count, vectors
        zero = const(0, "int32", 4)
        self.lanes = [[[zero, zero] for _ in range(vectors)] for _ in range(0, count, 2)]

    @staticmethod
    def stored(codes: list[Expr]) -> list[Expr]:
        words = [bind(reinterpret(code, "int32", 4)) for code in codes]
        together = [T.Shuffle([words[j], words[j + 1]], pairs) for j in (0, 2) for pairs in MatrixProducts._PAIRS]
        return [bind(reinterpret(word, "uint8", 16)) for word in together]

    def add(self, codes: Codes, q: Any, starts: list[Expr]) -> None:
        for half in range(2):
            words = [reinterpret(load(q, start + 8 * half, 8), "int64", 1) for start in starts]
            pairs = [[words[m], words[min(m + 1, self.count - 1)]] for m in range(0, self.count, 2)]
            acts = [bind(reinterpret(T.Shuffle(pair, [0, 1]), "int8", 16)) for pair in pairs]
            for v in range(self.vectors):
                for rows in range(2):
                    vector = reinterpret(codes(2 * half + rows, v), "int8", 16)
                    for lanes, act in zip(self.lanes, acts, strict=True):
                        sums = lanes[v]
                        sums[rows] = bind(
                            intrin("int32x4", "llvm.aarch64.neon.smmla.v4i32.v16i8", sums[rows], vector, act)
                        )

    def results(self) -> list[list[Expr]]:
        return [
            [bind(T.Shuffle(sums, [m % 2, 2 + m % 2, 4 + m % 2, 6 + m % 2])) for sums in self.lanes[m // 2]]
            for m in range(self.count)
        ]


def products_of(isa: Isa) -> type[Products]:
    """How an instruction set multiplies several tokens at once.

    Args:
        isa: instruction set.
    """
    return MatrixProducts if isa.matrix_products else Products


def tree_sum(values: list[Expr]) -> Expr:
    """The sum, added in pairs.

    Args:
        values: at least one expression.
    """
    while len(values) > 1:
        values = [bind(sum(values[i + 1 : i + 2], values[i])) for i in range(0, len(values), 2)]
    return values[0]
