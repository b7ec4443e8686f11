"""What differs between instruction sets: one class each, one row in ``ISAS``.

All byte vectors are uint8 of ``vector_bytes`` lanes and hold, for ``vector_bytes / 4`` rows, the
four weights t = 0..3 of each row; integer dot products come out as int32, one lane per row.
"""

from __future__ import annotations

from typing import Any, ClassVar

from tvm.tirx.script import builder as T

from .emit import Expr, bind, byte_table, const, intrin, load, reinterpret


class Isa:
    """The operations the kernels are written in, in a form any vector unit has."""

    name: ClassVar[str]
    vector_bytes: ClassVar[int]
    # Codes above 127 enter the dot product minus 128 (the instruction takes signed bytes).
    signed: ClassVar[bool] = True
    # Accumulators per result, taken in turn, so that a dot product's latency is hidden.
    chains: ClassVar[int] = 1
    # Row vectors worked on at a time: more share the activations' loads, fewer need registers.
    rows_together: ClassVar[int] = 1
    # 2-bit fields joined into one operand at most: 4 makes whole bytes, 2 nibbles.
    max_width: ClassVar[int] = 4
    # Bytes of tokens' activations that share a loaded weight vector in prefill, at most.
    runs_together: ClassVar[int] = 2
    # Row blocks that share a loaded activation in prefill.
    row_blocks: ClassVar[int] = 1
    # How far ahead of their use weights are asked for, in bytes; 0 leaves that to the core.
    prefetch_bytes: ClassVar[int] = 0
    # Whether instructions multiply matrices of several tokens (``products.MatrixProducts``).
    matrix_products: ClassVar[bool] = False

    @property
    def rows(self) -> int:
        """Rows per vector."""
        return self.vector_bytes // 4

    @property
    def vectors(self) -> int:
        """Vectors per block of 16 rows."""
        return 64 // self.vector_bytes

    def token_blocks(self, width: int) -> tuple[int, ...]:
        """How many tokens of ``width`` bytes an activation are taken at a time in prefill, the most first."""
        return tuple(tokens for tokens in (8, 4, 2, 1) if tokens * width <= self.runs_together)

    def mask(self, value: int) -> Expr:
        return const(value, "uint8", self.vector_bytes)

    # Bits that a shift moves over a byte's edge are unspecified; callers mask them.
    # Here: 16-bit shifts, which x86 has and byte shifts it has not.
    def shl(self, v: Expr, n: int) -> Expr:
        return self._shift(v, n, lambda a, b: a << b)

    def shr(self, v: Expr, n: int) -> Expr:
        return self._shift(v, n, lambda a, b: a >> b)

    def _shift(self, v: Expr, n: int, op: Any) -> Expr:
        lanes = self.vector_bytes // 2
        wide = op(reinterpret(v, "uint16", lanes), const(n, "uint16", lanes))
        return bind(reinterpret(wide, "uint8", self.vector_bytes))

    def select(self, mask: int, ones: Expr, zeros: Expr) -> Expr:
        """Bits of ``ones`` where the mask is set, of ``zeros`` elsewhere: one instruction on AVX-512 and NEON."""
        return bind((ones & self.mask(mask)) | (zeros & self.mask(255 - mask)))

    def bits(self, v: Expr, mask: int) -> Expr:
        return bind(v & self.mask(mask))

    def lookup(self, table: tuple[int, ...], nibbles: Expr) -> Expr:
        """table[nibble] per byte; nibbles: uint8 vector of values below 16."""
        raise NotImplementedError

    def split_pairs(self, v: Expr) -> list[tuple[Expr, int]]:
        """Four 2-bit fields of packed bytes -> [(vector, e)] for j = 0..3; the value is field << e."""
        shifted = [v, self.shr(v, 2), self.shr(v, 4), self.shr(v, 6)]
        return [(self.bits(x, 3), 0) for x in shifted]

    def split_nibbles(self, v: Expr) -> list[tuple[Expr, int]]:
        """Low and high nibble of packed bytes -> [(vector, e)] * 2."""
        return [(self.bits(v, 15), 0), (self.bits(self.shr(v, 4), 15), 0)]

    def activations(self, q: Any, k: Expr) -> list[Expr]:
        """Four int8 vectors for weights k .. k + 15: four activations each, repeated for every row.

        A 32-bit broadcast load each: x86 folds it into the dot product's memory operand.
        """
        words = [load(q, k + 4 * j, 4) for j in range(4)]
        lanes = self.vector_bytes // 4
        return [
            bind(reinterpret(T.broadcast(reinterpret(w, "int32", 1), lanes), "int8", self.vector_bytes)) for w in words
        ]

    def accumulator(self, max_code: int) -> Accumulator:
        """A sum of dot products that starts at 0; max_code: the largest operand (above 127: see ``signed``)."""
        raise NotImplementedError


class Accumulator:
    """Adds up byte dot products; ``result`` is int32, a lane per row."""

    def __init__(self, isa: Isa, max_code: int) -> None:
        self.isa = isa
        self.offset_codes = max_code > 127
        self.bound = 128 if self.offset_codes else max_code
        self.total: Expr | None = None

    def add(self, codes: Expr, q: Expr) -> None:
        raise NotImplementedError

    def result(self) -> Expr:
        assert self.total is not None
        return self.total

    def _include(self, value: Expr) -> None:
        self.total = bind(value if self.total is None else self.total + value)


class _Dot4(Accumulator):
    """One instruction: acc[row] += sum over t of code * q."""

    instruction: ClassVar[str]
    code_type: ClassVar[str] = "int8"

    def add(self, codes: Expr, q: Expr) -> None:
        start = const(0, "int32", self.isa.rows) if self.total is None else self.total
        codes = reinterpret(codes, "int8", self.isa.vector_bytes)
        self.total = bind(intrin(f"int32x{self.isa.rows}", self.instruction, start, codes, q))


class _VnniDot(_Dot4):
    instruction = "llvm.x86.avx512.vpdpbusd.512"


class Vnni512(Isa):
    """AVX-512 with VNNI: 16 rows in one register; ``vpdpbusd`` is unsigned x signed, so fields stay in place."""

    name = "vnni512"
    vector_bytes = 64
    signed = False
    chains = 2
    runs_together = 8
    row_blocks = 2
    # Measured on Zen 5: alone, its prefetchers lose a quarter of the memory's speed with one plane, nothing with four.
    prefetch_bytes = 8192

    def lookup(self, table: tuple[int, ...], nibbles: Expr) -> Expr:
        return bind(intrin("uint8x64", "llvm.x86.avx512.pshuf.b.512", byte_table(table, 64), nibbles))

    def split_pairs(self, v: Expr) -> list[tuple[Expr, int]]:
        return [(self.bits(v, 3 << e), e) for e in (0, 2, 4, 6)]

    def split_nibbles(self, v: Expr) -> list[tuple[Expr, int]]:
        return [(self.bits(v, 15), 0), (self.bits(v, 240), 4)]

    def accumulator(self, max_code: int) -> Accumulator:
        return _VnniDot(self, max_code)


class _AvxVnniDot(_Dot4):
    instruction = "llvm.x86.avx512.vpdpbusd.256"


class AvxVnni(Vnni512):
    """The same dot product in AVX2's registers: 8 rows in one."""

    name = "avx-vnni"
    vector_bytes = 32
    rows_together = 2
    runs_together = 4
    row_blocks = 1

    def lookup(self, table: tuple[int, ...], nibbles: Expr) -> Expr:
        return bind(intrin("uint8x32", "llvm.x86.avx2.pshuf.b", byte_table(table, 32), nibbles))

    def accumulator(self, max_code: int) -> Accumulator:
        return _AvxVnniDot(self, max_code)


class _Avx2Dot(Accumulator):
    """``vpmaddubsw`` adds two products in int16, saturating at 32767: as many of its results are added in
    int16 as the largest code allows, then ``vpmaddwd`` widens.

    Codes above 127 come minus 128; the instruction's unsigned operand is then |code| and the sign moves to q
    (|q| <= 127, so 2 * 128 * 127 still fits).
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
    # Nibbles add up in int16 for eight steps, bytes for one: two dot products of nibbles are the cheaper.
    max_width = 2
    rows_together = 2
    prefetch_bytes = 8192

    def lookup(self, table: tuple[int, ...], nibbles: Expr) -> Expr:
        return bind(intrin("uint8x32", "llvm.x86.avx2.pshuf.b", byte_table(table, 32), nibbles))

    def accumulator(self, max_code: int) -> Accumulator:
        return _Avx2Dot(self, max_code)


class _NeonLongDot(Accumulator):
    """``smull``/``smlal`` into int16 (one product per lane and step), ``sadalp`` before they could overflow."""

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
        return bind(intrin("int32x4", "llvm.aarch64.neon.addp", *self.wide))


class Neon(Isa):
    """ARMv8.0 without dot product: 4 rows in a register."""

    name = "neon"
    vector_bytes = 16

    def _shift(self, v: Expr, n: int, op: Any) -> Expr:
        return bind(op(v, self.mask(n)))

    def split_pairs(self, v: Expr) -> list[tuple[Expr, int]]:
        # Byte shifts bring in zeros, so the top field needs no mask.  Left in place, fields would need a sum for
        # each place, and sums of two bytes' products already fill the registers.
        middle = [(self.bits(self.shr(v, n), 3), 0) for n in (2, 4)]
        return [(self.bits(v, 3), 0), *middle, (self.shr(v, 6), 0)]

    def split_nibbles(self, v: Expr) -> list[tuple[Expr, int]]:
        return [(self.bits(v, 15), 0), (self.shr(v, 4), 0)]

    def lookup(self, table: tuple[int, ...], nibbles: Expr) -> Expr:
        return bind(intrin("uint8x16", "llvm.aarch64.neon.tbl1", byte_table(table, 16), nibbles))

    def activations(self, q: Any, k: Expr) -> list[Expr]:
        """One 16-byte load; the lane goes into the dot product's by-element form."""
        four = bind(reinterpret(load(q, k, 16), "int32", 4))
        lanes = [T.broadcast(T.Shuffle([four], [j]), 4) for j in range(4)]
        return [bind(reinterpret(lane, "int8", 16)) for lane in lanes]

    def accumulator(self, max_code: int) -> Accumulator:
        return _NeonLongDot(self, max_code)


class _NeonDot(_Dot4):
    instruction = "llvm.aarch64.neon.sdot"


class NeonDotprod(Neon):
    """ARMv8.2 with ``sdot``."""

    name = "neon-dotprod"
    # Left to itself LLVM unrolls over all four and spills.
    rows_together = 2
    runs_together = 4

    def accumulator(self, max_code: int) -> Accumulator:
        return _NeonDot(self, max_code)


class NeonI8mm(NeonDotprod):
    """ARMv8.6: prefill by ``smmla``, which does twice the work of ``sdot``."""

    name = "neon-i8mm"
    matrix_products = True


ISAS: dict[str, Isa] = {isa.name: isa for isa in (Vnni512(), AvxVnni(), Avx2(), NeonI8mm(), NeonDotprod(), Neon())}
