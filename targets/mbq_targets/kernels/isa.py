"""What differs between instruction sets: one class each, one row in ``ISAS``.

A byte vector is uint8 of ``vector_bytes`` lanes. It holds, for ``vector_bytes / 4`` rows, the four weights t = 0..3 of
each row. An integer dot product is int32, one lane per row.
"""

from __future__ import annotations

from typing import Any, ClassVar

from tvm.tirx.script import builder as T

from ..constants import FEW_TOKENS
from .emit import LANES, Expr, bind, byte_table, cast, const, intrin, load, reinterpret
from .exp import EXP2, evaluate, exp2

PACKED = 4
"""Vectors of integers of which ``Isa.packed`` makes vectors of bytes."""


class Isa:
    """The operations that the kernels are written in. Any vector unit has a form of them."""

    name: ClassVar[str]
    """As in ``machines.Target.isa``."""
    vector_bytes: ClassVar[int]
    """Bytes of a register."""
    signed: ClassVar[bool] = True
    """The dot product takes signed bytes. Codes above 127 then enter it minus 128."""
    chains: ClassVar[int] = 1
    """Accumulators per result. They take turns, which hides the latency of a dot product."""
    rows_together: ClassVar[int] = 1
    """Row vectors that one loop step handles. More share the loads of activations, and need more registers."""
    rows_together_deep: ClassVar[int] = 1
    """As ``rows_together``, at depths of more than one segment: each has sums of its own."""
    max_width: ClassVar[int] = 4
    """Most 2-bit fields that are joined into one operand: 4 make whole bytes, 2 make nibbles."""
    runs_together: ClassVar[int] = 2
    """In prefill: most bytes of tokens' activations that share a loaded weight vector."""
    row_blocks: ClassVar[int] = 1
    """In prefill: row blocks that share a loaded activation."""
    prefetch_bytes: ClassVar[int] = 0
    """How far ahead of their use weights are prefetched. 0: the core's own prefetcher does it."""
    matrix_products: ClassVar[bool] = False
    """In prefill: multiply by ``smmla`` instead of dot products, see ``products``."""
    pair_products: ClassVar[bool] = False
    """Several tokens with two-byte activations: multiply pairs of 16-bit integers, see ``products``."""
    few_tokens: ClassVar[int] = 1
    """For few tokens: tokens that share a loaded weight vector."""
    few_vectors: ClassVar[int] = 1
    """For few tokens: row vectors that share a loaded activation."""
    packs: ClassVar[bool] = False
    """Whether it has ``packed``."""
    value_missing: ClassVar[int] = 0
    """What ``value_sum`` counts each code too high."""
    attention_sums: ClassVar[int] = 16
    """Attention over keys and values of 8 bits: most sums that are computed together, one register each."""

    @property
    def rows(self) -> int:
        """Rows per vector."""
        return self.vector_bytes // 4

    @property
    def vectors(self) -> int:
        """Vectors per block of 16 rows."""
        return 64 // self.vector_bytes

    def pairs(self, width: int) -> bool:
        """Whether several tokens are multiplied by pairs of 16-bit integers.

        Args:
            width: bytes of an activation.
        """
        return self.pair_products and width == 2

    def few_at_most(self, width: int) -> int:
        """The most tokens of one depth that the kernel of few tokens multiplies; 0: that of many takes all.

        Args:
            width: bytes of an activation.
        """
        return 0 if self.pairs(width) else FEW_TOKENS

    def many_tokens(self, width: int) -> int:
        """How many tokens prefill multiplies at a time: a power of two.

        Args:
            width: bytes of an activation.
        """
        return self.runs_together // (1 if self.pairs(width) else width)

    def mask(self, value: int) -> Expr:
        """A byte vector of one value.

        Args:
            value: 0 to 255.
        """
        return const(value, "uint8", self.vector_bytes)

    def shl(self, v: Expr, n: int) -> Expr:
        """Each byte shifted left. The low ``n`` bits of a byte are unspecified; the caller masks them.

        Args:
            v: byte vector.
            n: bits.
        """
        return self._shift(v, n, lambda a, b: a << b)

    def shr(self, v: Expr, n: int) -> Expr:
        """Each byte shifted right. The high ``n`` bits of a byte are unspecified; the caller masks them.

        Args:
            v: byte vector.
            n: bits.
        """
        return self._shift(v, n, lambda a, b: a >> b)

    def _shift(self, v: Expr, n: int, op: Any) -> Expr:
        # x86 has no shift of bytes.
        lanes = self.vector_bytes // 2
        wide = op(reinterpret(v, "uint16", lanes), const(n, "uint16", lanes))
        return bind(reinterpret(wide, "uint8", self.vector_bytes))

    def select(self, mask: int, ones: Expr, zeros: Expr) -> Expr:
        """Bits of one vector or the other. This is one instruction on AVX-512 and NEON.

        Args:
            mask: the same for each byte.
            ones: byte vector whose bits are taken where the mask is 1.
            zeros: byte vector whose bits are taken where the mask is 0.
        """
        return bind((ones & self.mask(mask)) | (zeros & self.mask(255 - mask)))

    def bits(self, v: Expr, mask: int) -> Expr:
        """``v & mask``.

        Args:
            v: byte vector.
            mask: the same for each byte.
        """
        return bind(v & self.mask(mask))

    def packed(self, words: list[Expr]) -> Expr:
        """The integers as bytes.

        Args:
            words: ``PACKED`` vectors of int32 of ``LANES`` lanes, from 0 to 255.
        """
        raise NotImplementedError

    def exp2(self, x: Expr) -> Expr:
        """As ``exp.exp2``.

        Args:
            x: float32 of ``LANES`` lanes.
        """
        return exp2(x, LANES)

    def nearest(self, x: Expr) -> Expr:
        """The nearest whole numbers, int32.

        Args:
            x: float32 of ``LANES`` lanes.
        """
        return bind(cast(T.nearbyint(x), "int32", LANES))

    def lookup(self, table: tuple[int, ...], nibbles: Expr) -> Expr:
        """``table[nibble]`` per byte.

        Args:
            table: 16 bytes.
            nibbles: byte vector of values below 16.
        """
        raise NotImplementedError

    def split_pairs(self, v: Expr) -> list[tuple[Expr, int]]:
        """The four 2-bit fields of packed bytes: [(vector, e)] for j = 0..3, where the vector is the field << e.

        Args:
            v: byte vector.
        """
        shifted = [v, self.shr(v, 2), self.shr(v, 4), self.shr(v, 6)]
        return [(self.bits(x, 3), 0) for x in shifted]

    def split_nibbles(self, v: Expr) -> list[tuple[Expr, int]]:
        """The low and the high nibble of packed bytes: [(vector, e)] * 2, where the vector is the nibble << e.

        Args:
            v: byte vector.
        """
        return [(self.bits(v, 15), 0), (self.bits(self.shr(v, 4), 15), 0)]

    def activations(self, q: Any, k: Expr) -> list[Expr]:
        """Four int8 vectors for weights k .. k + 15: four activations each, repeated for every row.

        Each is a 32-bit broadcast load, which x86 can use as the memory operand of the dot product.

        Args:
            q: int8 buffer of activations.
            k: the first weight.
        """
        words = [load(q, k + 4 * j, 4) for j in range(4)]
        lanes = self.vector_bytes // 4
        return [
            bind(reinterpret(T.broadcast(reinterpret(w, "int32", 1), lanes), "int8", self.vector_bytes)) for w in words
        ]

    def value_sum(self) -> Accumulator:
        """A sum of products of stored values with weights of 0 to 255."""
        raise NotImplementedError

    def accumulator(self, max_code: int) -> Accumulator:
        """A sum of dot products that starts at 0.

        Args:
            max_code: the largest operand before 128 is subtracted, see ``signed``.
        """
        raise NotImplementedError


class Accumulator:
    """A sum of byte dot products.

    Args:
        isa: instruction set.
        max_code: the largest operand before 128 is subtracted.
    """

    def __init__(self, isa: Isa, max_code: int) -> None:
        self.isa = isa
        self.offset_codes = max_code > 127
        self.bound = 128 if self.offset_codes else max_code
        self.total: Expr | None = None

    def begin(self, start: Expr) -> None:
        """Begin with a number, and not with 0.

        Args:
            start: int32, one lane per row.
        """
        self.total = start

    def add(self, codes: Expr, q: Expr) -> None:
        """Add the dot product of each row.

        Args:
            codes: byte vector of weights.
            q: int8 vector of activations.
        """
        raise NotImplementedError

    def result(self) -> Expr:
        """The sum: int32, one lane per row."""
        assert self.total is not None
        return self.total

    def _include(self, value: Expr) -> None:
        self.total = bind(value if self.total is None else self.total + value)


class _Dot4(Accumulator):
    """One instruction: acc[row] += sum over t of code * q."""

    instruction: ClassVar[str]

    def add(self, codes: Expr, q: Expr) -> None:
        start = const(0, "int32", self.isa.rows) if self.total is None else self.total
        codes = reinterpret(codes, "int8", self.isa.vector_bytes)
        self.total = bind(intrin(f"int32x{self.isa.rows}", self.instruction, start, codes, q))


class _VnniDot(_Dot4):
    instruction = "llvm.x86.avx512.vpdpbusd.512"


class _SwappedDot(Accumulator):
    """As ``_Dot4``, of an instruction whose second operand is the unsigned one: codes are signed and q is not."""

    def __init__(self, isa: Isa, instruction: str) -> None:
        super().__init__(isa, 0)
        self.instruction = instruction

    def add(self, codes: Expr, q: Expr) -> None:
        start = const(0, "int32", self.isa.rows) if self.total is None else self.total
        codes = reinterpret(codes, "int8", self.isa.vector_bytes)
        self.total = bind(intrin(f"int32x{self.isa.rows}", self.instruction, start, q, codes))


class Vnni512(Isa):
    """AVX-512 with VNNI: 16 rows in one register. ``vpdpbusd`` takes unsigned codes, so fields need no shift."""

    name = "vnni512"
    vector_bytes = 64
    signed = False
    chains = 2
    runs_together = 8
    row_blocks = 2
    # Zen 5 reads one plane at three quarters of its memory's speed without this.
    prefetch_bytes = 8192
    packs = True

    def packed(self, words: list[Expr]) -> Expr:
        """As ``Isa.packed``. Packing works on quarters of a register, so their parts are put in order.

        Args:
            words: ``PACKED`` vectors of int32 of ``LANES`` lanes, from 0 to 255.
        """
        halves = [bind(intrin("int16x32", "llvm.x86.avx512.packusdw.512", *words[at : at + 2])) for at in (0, 2)]
        mixed = intrin("uint8x64", "llvm.x86.avx512.packuswb.512", *halves)
        order = T.Shuffle([T.int32(4 * (i % 4) + i // 4) for i in range(LANES)], list(range(LANES)))
        sorted_ = intrin("int32x16", "llvm.x86.avx512.permvar.si.512", reinterpret(mixed, "int32", LANES), order)
        return bind(reinterpret(sorted_, "int8", 64))

    def exp2(self, x: Expr) -> Expr:
        """As ``Isa.exp2``, by the instructions that split a number and that multiply by a power of two.

        Args:
            x: float32 of ``LANES`` lanes.
        """
        kind, zeros, every = "float32x16", const(0, "float32", LANES), T.int16(-1)
        rest = bind(intrin(kind, "llvm.x86.avx512.mask.reduce.ps.512", x, T.int32(8), zeros, every, T.int32(4)))
        power = evaluate(EXP2, rest, LANES), bind(x - rest)
        return bind(intrin(kind, "llvm.x86.avx512.mask.scalef.ps.512", *power, zeros, every, T.int32(4)))

    def nearest(self, x: Expr) -> Expr:
        """As ``Isa.nearest``, by one instruction.

        Args:
            x: float32 of ``LANES`` lanes.
        """
        zeros, every = const(0, "int32", LANES), T.int16(-1)
        return bind(intrin("int32x16", "llvm.x86.avx512.mask.cvtps2dq.512", x, zeros, every, T.int32(4)))

    def lookup(self, table: tuple[int, ...], nibbles: Expr) -> Expr:
        return bind(intrin("uint8x64", "llvm.x86.avx512.pshuf.b.512", byte_table(table, 64), nibbles))

    def split_pairs(self, v: Expr) -> list[tuple[Expr, int]]:
        return [(self.bits(v, 3 << e), e) for e in (0, 2, 4, 6)]

    def split_nibbles(self, v: Expr) -> list[tuple[Expr, int]]:
        return [(self.bits(v, 15), 0), (self.bits(v, 240), 4)]

    def accumulator(self, max_code: int) -> Accumulator:
        return _VnniDot(self, max_code)

    def value_sum(self) -> Accumulator:
        """As ``Isa.value_sum``."""
        return _SwappedDot(self, _VnniDot.instruction)


class _AvxVnniDot(_Dot4):
    instruction = "llvm.x86.avx512.vpdpbusd.256"


class AvxVnni(Vnni512):
    """The dot product of VNNI on AVX2's registers: 8 rows in one."""

    name = "avx-vnni"
    vector_bytes = 32
    rows_together = 2
    runs_together = 4
    row_blocks = 1
    few_vectors = 2
    packs = False
    exp2 = Isa.exp2
    nearest = Isa.nearest
    attention_sums = 8

    def lookup(self, table: tuple[int, ...], nibbles: Expr) -> Expr:
        """As ``Isa.lookup``.

        Args:
            table: 16 bytes.
            nibbles: byte vector of values below 16.
        """
        return bind(intrin("uint8x32", "llvm.x86.avx2.pshuf.b", byte_table(table, 32), nibbles))

    def accumulator(self, max_code: int) -> Accumulator:
        """As ``Isa.accumulator``.

        Args:
            max_code: the largest operand before 128 is subtracted.
        """
        return _AvxVnniDot(self, max_code)

    def value_sum(self) -> Accumulator:
        """As ``Isa.value_sum``."""
        return _SwappedDot(self, _AvxVnniDot.instruction)


class _Avx2Dot(Accumulator):
    """``vpmaddubsw`` adds two products in int16. ``vpmaddwd`` widens the int16 sum before it could exceed 32767.

    Codes above 127 enter minus 128. The unsigned operand of the instruction is then |code|, and q gets the sign of the
    code. |q| is at most 127, and 2 * 128 * 127 fits int16.
    """

    def __init__(self, isa: Isa, max_code: int) -> None:
        super().__init__(isa, max_code)
        self.limit = 32767 // (2 * 127 * self.bound)
        self.count = 0
        self.narrow: Expr | None = None

    def add(self, codes: Expr, q: Expr) -> None:
        if self.count == self.limit:
            self._widen()
        codes = reinterpret(codes, "int8", 32)
        if self.offset_codes:
            q = bind(intrin("int8x32", "llvm.x86.avx2.psign.b", q, codes))
            codes = bind(T.abs(codes))
        value = intrin("int16x16", "llvm.x86.avx2.pmadd.ub.sw", codes, q)
        self.narrow = bind(value if self.narrow is None else self.narrow + value)
        self.count += 1

    def _widen(self) -> None:
        assert self.narrow is not None
        ones = const(1, "int16", 16)
        self._include(intrin("int32x8", "llvm.x86.avx2.pmadd.wd", self.narrow, ones))
        self.narrow, self.count = None, 0

    def result(self) -> Expr:
        if self.count:
            self._widen()
        return super().result()


class Avx2(Isa):
    """AVX2 without VNNI: 8 rows in a register."""

    name = "avx2"
    vector_bytes = 32
    # An int16 sum takes eight products of nibbles and one of bytes. Two dot products of nibbles cost less.
    max_width = 2
    rows_together = 2
    rows_together_deep = 2
    prefetch_bytes = 8192
    pair_products = True
    few_tokens = 2
    few_vectors = 2
    attention_sums = 8

    def lookup(self, table: tuple[int, ...], nibbles: Expr) -> Expr:
        return bind(intrin("uint8x32", "llvm.x86.avx2.pshuf.b", byte_table(table, 32), nibbles))

    def accumulator(self, max_code: int) -> Accumulator:
        return _Avx2Dot(self, max_code)


class _NeonLongDot(Accumulator):
    """``smull`` and ``smlal`` add products in int16. ``sadalp`` widens the sum before it could overflow."""

    def __init__(self, isa: Isa, max_code: int) -> None:
        super().__init__(isa, max_code)
        self.limit = 32767 // (127 * self.bound)
        self.count = 0
        self.narrow: list[Expr] = []
        self.wide: list[Expr] = []

    def add(self, codes: Expr, q: Expr) -> None:
        if self.count == self.limit:
            self._widen()
        codes = reinterpret(codes, "int8", 16)
        halves = [(T.vectorlow("int8x8", codes), T.vectorlow("int8x8", q))]
        halves.append((T.vectorhigh("int8x8", codes), T.vectorhigh("int8x8", q)))
        products = [intrin("int16x8", "llvm.aarch64.neon.smull", c, a) for c, a in halves]
        if self.narrow:
            products = [n + p for n, p in zip(self.narrow, products, strict=True)]
        self.narrow = [bind(p) for p in products]
        self.count += 1

    def _widen(self) -> None:
        pairs = [intrin("int32x4", "llvm.aarch64.neon.saddlp", n) for n in self.narrow]
        if self.wide:
            pairs = [w + p for w, p in zip(self.wide, pairs, strict=True)]
        self.wide = [bind(p) for p in pairs]
        self.narrow, self.count = [], 0

    def result(self) -> Expr:
        if self.count:
            self._widen()
        total = bind(intrin("int32x4", "llvm.aarch64.neon.addp", *self.wide))
        return total if self.total is None else bind(self.total + total)


class _NeonLongValues(Accumulator):
    """``umull`` multiplies unsigned bytes. Two products do not fit 16 bits, so ``uadalp`` adds each in int32."""

    def __init__(self, isa: Isa) -> None:
        super().__init__(isa, 0)
        self.wide: list[Expr] = []

    def add(self, codes: Expr, q: Expr) -> None:
        sides = [reinterpret(side, "uint8", 16) for side in (codes, q)]
        halves = [[part("uint8x8", side) for side in sides] for part in (T.vectorlow, T.vectorhigh)]
        products = [intrin("uint16x8", "llvm.aarch64.neon.umull", *half) for half in halves]
        pairs = [reinterpret(intrin("uint32x4", "llvm.aarch64.neon.uaddlp", p), "int32", 4) for p in products]
        if self.wide:
            pairs = [w + p for w, p in zip(self.wide, pairs, strict=True)]
        self.wide = [bind(p) for p in pairs]

    def result(self) -> Expr:
        total = bind(intrin("int32x4", "llvm.aarch64.neon.addp", *self.wide))
        return total if self.total is None else bind(self.total + total)


class Neon(Isa):
    """ARMv8.0 without dot product: 4 rows in a register."""

    name = "neon"
    vector_bytes = 16
    value_missing = 128

    def _shift(self, v: Expr, n: int, op: Any) -> Expr:
        return bind(op(v, self.mask(n)))

    def split_pairs(self, v: Expr) -> list[tuple[Expr, int]]:
        # A byte shift brings in zeros, so the top field needs no mask. Fields that are not shifted need a sum for each
        # position, and the registers are full with the sums of two-byte activations.
        middle = [(self.bits(self.shr(v, n), 3), 0) for n in (2, 4)]
        return [(self.bits(v, 3), 0), *middle, (self.shr(v, 6), 0)]

    def split_nibbles(self, v: Expr) -> list[tuple[Expr, int]]:
        return [(self.bits(v, 15), 0), (self.shr(v, 4), 0)]

    def lookup(self, table: tuple[int, ...], nibbles: Expr) -> Expr:
        return bind(intrin("uint8x16", "llvm.aarch64.neon.tbl1", byte_table(table, 16), nibbles))

    def activations(self, q: Any, k: Expr) -> list[Expr]:
        """As in ``Isa``, by one 16-byte load. The dot product's by-element form takes a lane of it.

        Args:
            q: int8 buffer of activations.
            k: the first weight.
        """
        four = bind(reinterpret(load(q, k, 16), "int32", 4))
        lanes = [T.broadcast(T.Shuffle([four], [j]), 4) for j in range(4)]
        return [bind(reinterpret(lane, "int8", 16)) for lane in lanes]

    def accumulator(self, max_code: int) -> Accumulator:
        return _NeonLongDot(self, max_code)

    def value_sum(self) -> Accumulator:
        """As ``Isa.value_sum``."""
        return _NeonLongValues(self)


class _NeonDot(_Dot4):
    instruction = "llvm.aarch64.neon.sdot"


class _NeonValues(_Dot4):
    instruction = "llvm.aarch64.neon.udot"


class NeonDotprod(Neon):
    """ARMv8.2 with ``sdot``."""

    name = "neon-dotprod"
    # By static analysis: with fewer rows of one segment, or more of two, LLVM spills more registers.
    rows_together = 4
    runs_together = 4

    def accumulator(self, max_code: int) -> Accumulator:
        """As ``Isa.accumulator``.

        Args:
            max_code: the largest operand before 128 is subtracted.
        """
        return _NeonDot(self, max_code)

    def value_sum(self) -> Accumulator:
        """As ``Isa.value_sum``."""
        return _NeonValues(self, 0)


class NeonI8mm(NeonDotprod):
    """ARMv8.6: prefill by ``smmla``, which does twice the work of ``sdot``."""

    name = "neon-i8mm"
    matrix_products = True


ISAS: dict[str, Isa] = {isa.name: isa for isa in (Vnni512(), AvxVnni(), Avx2(), NeonI8mm(), NeonDotprod(), Neon())}
"""By the name that a row of ``machines.TARGETS`` gives."""
