"""Codes of 4, 5, 6 and 8 bits as bytes, four columns of an output side by side, as products with digits want them.

Of a word of 8 codes the four low halves of its bytes are the even columns, the four high halves the odd ones; the bits
above four are in words of their own. Codes of 8 bits get 128 added, since one factor of such a product has no sign.

This module does not know how codes are scaled, or where operands come from.
"""

from __future__ import annotations

from collections.abc import Iterator

from llvmlite import ir

from handloom.ops.cpu import simd
from handloom.ops.cpu.digits import WIDTH, add_fours, rows_of_tiles
from handloom.ops.cpu.instructions import BLOCK, DIGITS, LINE
from handloom.ops.cpu.simd import I8, I32, INTS, LANES, Builder, Value
from handloom.ops.cpu.tiles import PREFETCH, VECTORS, prefetch
from handloom.ops.panels import PANEL

BYTES, FEW_BYTES = ir.VectorType(I8, 4 * LANES), ir.VectorType(I8, LANES)
SIGN = 128


def nibbles(b: Builder, codes: Value) -> list[Value]:
    """The even and the odd ones of 8 columns of 16 outputs, four bytes side by side."""
    word, mask = simd.load_at(b, codes, INTS, 4), ir.Constant(INTS, [0x0F0F0F0F] * LANES)
    return [b.and_(word, mask), b.and_(b.lshr(word, ir.Constant(INTS, [4] * LANES)), mask)]


def above(b: Builder, high: Value, bits: int, columns: int) -> list[Value]:
    """Of such columns, from `columns` on of those in words of `high`, the bits above the low four, in their place."""
    own, found = bits - 4, []
    for odd in range(2):
        first = [32 * word + own * (columns + 2 * i + odd) - 4 for word in range(2) for i in range(4)] * 8
        places = ir.Constant(BYTES, [bit % 64 for bit in first])
        words = simd.call(b, "llvm.x86.avx512.pmultishift.qb.512", BYTES, places, b.bitcast(high, BYTES))
        found.append(b.and_(b.bitcast(words, INTS), ir.Constant(INTS, [((1 << own) - 1 << 4) * 0x01010101] * LANES)))
    return found


def eight_columns(b: Builder, bits: int, low: Value, high: Value, column: int) -> Iterator[tuple[int, int, Value]]:
    """Of 8 columns of a block: for each vector of outputs the even ones and the odd ones, as bytes without a sign."""
    if bits == 8:
        flip = ir.Constant(BYTES, [SIGN] * 4 * LANES)
        for _, v, odd, row in rows_of_tiles(b, simd.offset(b, low, PANEL * column), 8):
            yield v, odd, b.xor(b.bitcast(row, BYTES), flip)
        return
    words = 32 // (bits - 4) if bits > 4 else 0
    for v in range(VECTORS):
        at = simd.offset(b, low, WIDTH * (column // 8) + 4 * LANES * v)
        prefetch(b, simd.offset(b, at, PREFETCH))
        fours = nibbles(b, at)
        if words:
            rest = simd.load_at(b, simd.offset(b, high, WIDTH * (column // words) + 4 * LANES * v), INTS, 4)
            fours = [b.or_(*both) for both in zip(fours, above(b, rest, bits, column % words), strict=True)]
        for odd, four in enumerate(fours):
            yield v, odd, four


def load_zeros(b: Builder, address: Value) -> Value:
    return b.zext(simd.load_at(b, address, FEW_BYTES, 1), INTS)


def less(b: Builder, counts: Value, columns: int, zeros: list[Value] | None) -> list[list[Value]]:
    """For each vector of outputs and each digit: minus the zeros, int32 [16], times the digits of so many columns, of
    which counts is the line with minus their sums."""
    nothing = ir.Constant(INTS, [0] * LANES)
    if zeros is None:
        return [[nothing] * DIGITS for _ in range(VECTORS)]
    sums = []
    for digit in range(DIGITS):
        lines = range(0, LINE * columns // LANES, LINE)
        own = [simd.load_at(b, simd.offset(b, counts, line + 4 * digit), I32, 4) for line in lines]
        sums.append(simd.splat_of(b, b.add(*own) if len(own) > 1 else own[0], INTS))
    return [[simd.call(b, "llvm.x86.avx512.vpdpwssd.512", INTS, nothing, zero, n) for n in sums] for zero in zeros]


def add_columns(
    b: Builder, sums: list[list[Value]], bits: int, low: Value, high: Value, x: Value, columns: range
) -> None:
    """Add the products of one row's digits, x, with such columns of a block, of which each 8th is named."""
    for column in columns:
        for v, odd, four in eight_columns(b, bits, low, high, column):
            for digit in range(DIGITS):
                place = simd.offset(b, x, BLOCK * digit + column + 4 * odd)
                value = simd.splat_of(b, simd.load_at(b, place, I32, 1), INTS)
                sums[v][digit] = add_fours(b, sums[v][digit], four, value)
