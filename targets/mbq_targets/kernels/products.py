"""Integer products of rows with the activations of several tokens at once: the inner loops of ``few`` and ``gemm``.

A token has as many runs as its activations have bytes. A run is one of these bytes of every activation. For
``PairProducts`` it is every other activation, see ``activations.bytes_at``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm.tirx.script import builder as T

from .activations import joined
from .emit import Expr, bind, const, intrin, load, reinterpret
from .isa import Isa
from .unpack import OFFSET

Codes = Callable[[int, int], Expr]
"""(quarter, row vector) -> the stored bytes of weights 4 * quarter .. 4 * quarter + 3 of 16."""


class Products:
    """[token][row vector] sums, by dot products with each byte of the activations.

    Args:
        isa: instruction set.
        tokens: how many are multiplied together.
        width: bytes of an activation.
        vectors: row vectors.
        max_code: the largest code before ``OFFSET`` is subtracted.
        chains: accumulators per sum, see ``Isa.chains``.
    """

    def __init__(self, isa: Isa, tokens: int, width: int, vectors: int, max_code: int, *, chains: int = 1) -> None:
        self.isa, self.width, self.vectors, self.chains = isa, width, vectors, chains
        self.sums = [
            [[isa.accumulator(max_code) for _ in range(chains)] for _ in range(vectors)] for _ in range(tokens * width)
        ]

    @staticmethod
    def offset(isa: Isa, max_code: int) -> int:
        """What is subtracted from each code: ``OFFSET`` or 0.

        Args:
            isa: instruction set.
            max_code: the largest code.
        """
        return OFFSET if isa.signed and max_code > 127 else 0

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
            starts: where each run begins, those of the first token first.
        """
        acts = [self.isa.activations(q, start) for start in starts]
        for j in range(4):
            vectors = [codes(j, v) for v in range(self.vectors)]
            for run, act in zip(self.sums, acts, strict=True):
                for chains, vector in zip(run, vectors, strict=True):
                    chains[j % self.chains].add(vector, act[j])

    def begin(self, starts: list[list[Expr]]) -> None:
        """Begin with numbers, and not with 0.

        Args:
            starts: int32, as ``sums_so_far`` returns them.
        """
        for run, of_run in zip(self.sums, starts, strict=True):
            for chains, start in zip(run, of_run, strict=True):
                chains[0].begin(start)

    def sums_so_far(self) -> list[list[Expr]]:
        """int32 [run][row vector], which ``results`` joins to sums of tokens."""
        return [[tree_sum([chain.result() for chain in chains]) for chains in run] for run in self.sums]

    def results(self) -> list[list[Expr]]:
        """int32 [token][row vector]."""
        return self.joined(self.sums_so_far())

    def joined(self, runs: list[list[Expr]]) -> list[list[Expr]]:
        """Sums of tokens.

        Args:
            runs: as ``sums_so_far`` returns them.
        """
        tokens = [runs[first : first + self.width] for first in range(0, len(runs), self.width)]
        return [[joined(list(of_bytes), self.isa.rows) for of_bytes in zip(*token, strict=True)] for token in tokens]


class PairProducts(Products):
    """Sums by AVX2's ``vpmaddwd``: it adds two products of 16-bit integers in 32 bits.

    It takes a two-byte activation whole, where ``vpmaddubsw`` takes its bytes one by one and must not overflow 16 bits.

    Args:
        isa: AVX2.
        tokens: how many are multiplied together.
        width: 2.
        vectors: row vectors.
        max_code: unused; codes are not signed here.
        chains: unused; the sums have a short latency.
    """

    def __init__(self, isa: Isa, tokens: int, width: int, vectors: int, max_code: int, *, chains: int = 1) -> None:
        self.isa, self.width, self.vectors = isa, width, vectors
        zero = const(0, "int32", isa.rows)
        self.of_tokens = [[zero for _ in range(vectors)] for _ in range(tokens)]

    @staticmethod
    def offset(isa: Isa, max_code: int) -> int:
        return 0

    def add(self, codes: Codes, q: Any, starts: list[Expr]) -> None:
        pairs, low_bytes, byte = 2 * self.isa.rows, 0x00FF, 8
        acts = [self.isa.activations(q, start) for start in starts]
        for j in range(4):
            for v in range(self.vectors):
                code = bind(reinterpret(codes(j, v), "uint16", pairs))
                even = bind(code & const(low_bytes, "uint16", pairs))
                odd = bind(code >> const(byte, "uint16", pairs))
                for m, sums in enumerate(self.of_tokens):
                    for run, weights in enumerate((even, odd)):
                        sides = (weights, acts[self.width * m + run][j])
                        both = [reinterpret(side, "int16", pairs) for side in sides]
                        product = intrin(f"int32x{self.isa.rows}", "llvm.x86.avx2.pmadd.wd", *both)
                        sums[v] = bind(sums[v] + product)

    def begin(self, starts: list[list[Expr]]) -> None:
        self.of_tokens = [list(of_token) for of_token in starts]

    def sums_so_far(self) -> list[list[Expr]]:
        return self.of_tokens

    def joined(self, runs: list[list[Expr]]) -> list[list[Expr]]:
        return runs


class ByteWeights(Products):
    """Sums of stored values with weights of one byte, 0 to 255.

    Args:
        isa: instruction set.
        tokens: how many are multiplied together.
        vectors: row vectors.
    """

    def __init__(self, isa: Isa, tokens: int, vectors: int) -> None:
        self.isa, self.width, self.vectors, self.chains = isa, 1, vectors, 1
        self.sums = [[[isa.value_sum()] for _ in range(vectors)] for _ in range(tokens)]


class MatrixProducts(Products):
    """Sums by ``smmla``: [2 rows, 8 weights] times [2 runs, 8 weights]. An odd last run is multiplied twice.

    Two stored vectors of 4 rows and 4 weights become two vectors of 2 rows and 8 weights.

    Args:
        isa: instruction set with ``smmla``.
        tokens: how many are multiplied together.
        width: bytes of an activation.
        vectors: row vectors.
        max_code: unused; the sums are int32.
        chains: unused.
    """

    _PAIRS = ([0, 4, 1, 5], [2, 6, 3, 7])

    def __init__(self, isa: Isa, tokens: int, width: int, vectors: int, max_code: int, *, chains: int = 1) -> None:
        self.isa, self.width, self.vectors, self.runs = isa, width, vectors, tokens * width
        zero = const(0, "int32", 4)
        self.lanes = [[[zero, zero] for _ in range(vectors)] for _ in range(0, self.runs, 2)]

    @staticmethod
    def stored(codes: list[Expr]) -> list[Expr]:
        words = [bind(reinterpret(code, "int32", 4)) for code in codes]
        together = [T.Shuffle([words[j], words[j + 1]], pairs) for j in (0, 2) for pairs in MatrixProducts._PAIRS]
        return [bind(reinterpret(word, "uint8", 16)) for word in together]

    def add(self, codes: Codes, q: Any, starts: list[Expr]) -> None:
        for half in range(2):
            words = [reinterpret(load(q, start + 8 * half, 8), "int64", 1) for start in starts]
            pairs = [[words[m], words[min(m + 1, self.runs - 1)]] for m in range(0, self.runs, 2)]
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
        runs = [
            [bind(T.Shuffle(sums, [m % 2, 2 + m % 2, 4 + m % 2, 6 + m % 2])) for sums in self.lanes[m // 2]]
            for m in range(self.runs)
        ]
        return self.joined(runs)


def many_products(isa: Isa, width: int) -> type[Products]:
    """How an instruction set multiplies many tokens.

    Args:
        isa: instruction set.
        width: bytes of an activation.
    """
    if isa.matrix_products:
        return MatrixProducts
    return PairProducts if isa.pairs(width) else Products


def tree_sum(values: list[Expr]) -> Expr:
    """The sum, added in pairs.

    Args:
        values: at least one expression.
    """
    while len(values) > 1:
        values = [bind(sum(values[i + 1 : i + 2], values[i])) for i in range(0, len(values), 2)]
    return values[0]
