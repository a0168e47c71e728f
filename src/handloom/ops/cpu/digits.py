"""Products with codes of 8 bits, exactly, in the processor's matrix units: rows of x as four digits of 8 bits.

A row of x is made whole numbers of 31 bits: a power of 2 times its numbers, rounded by at most 2**-30 of the row's
largest, where float32 rounds each sum to 2**-24 of itself. These have four signed digits to the base 256, and a digit's
product with codes is a sum of whole numbers, the same in any order. Four such sums become one float32, which the scales
of the row and of the output are multiplied with: so a row's result depends on nothing but that row. A row with an
infinity or a NaN gives NaN.

Four rows of x lie together, a quad: of each 64 columns of k a tile, whose row 4 * i + j has digit j of row i (the
largest first), and after the tiles a line with four scales, one with minus the sums of each row's digits, and one with
such sums for each 16 columns; then for each 32 columns the four rows' sums themselves, float32. Codes are made tiles
block by block, [16, 16, 4] of 64 columns of k and 16 outputs: a row of a tile has 4 columns side by side.

This module does not know threads, or where operands come from.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from llvmlite import ir

from handloom.ops.cpu import amx, instructions, simd
from handloom.ops.cpu.amx import TILE_BYTES
from handloom.ops.cpu.codes import LOW, SCALE, ZERO
from handloom.ops.cpu.instructions import BLOCK, DIGITS, LINE, QUAD, ROWS
from handloom.ops.cpu.simd import (
    F32,
    FLAGS,
    I8,
    I16,
    I32,
    I64,
    INTS,
    LANES,
    VECTOR,
    Builder,
    Value,
    float32,
    int64,
    kernel,
    operation,
    read_f32,
    read_i64,
    vector,
    void,
)
from handloom.ops.cpu.tiles import PREFETCH, VECTORS, prefetch
from handloom.ops.panels import PANEL

BLOCK_BYTES = VECTORS * TILE_BYTES
WIDTH = PANEL * 4
ROW_OF_SUMS = DIGITS * WIDTH
SUMS_BYTES = 2 * QUAD * ROW_OF_SUMS
PART = 32  # columns of which sums are kept, and of LANES columns minus the sums of digits, a line for a quad
LARGEST, LEAST = 29, 30  # the power of 2 below which numbers become, and the least exponent that is looked at
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # columns of k of each 8, as tiles have them: as shuffles bring codes there
BYTES, HALVES = ir.VectorType(I8, 4 * LANES), ir.VectorType(I16, 2 * LANES)

quad_bytes = kernel(int64, int64)(instructions.quad_bytes)


def _shuffle(b: Builder, x: Value, y: Value, order: list[int]) -> Value:
    return b.shuffle_vector(x, y, ir.Constant(ir.VectorType(I32, len(order)), order))


# Rows to digits ----------------------------------------------------------------------------------


@operation(vector, vector)
def absolute(b: Builder, x: Value) -> Value:
    """|x|"""
    return b.bitcast(b.and_(b.bitcast(x, INTS), ir.Constant(INTS, [0x7FFFFFFF] * LANES)), VECTOR)


@operation(int64, float32)
def exponent(b: Builder, x: Value) -> Value:
    """The exponent's bits of x >= 0"""
    return b.zext(b.lshr(b.bitcast(x, I32), I32(23)), I64)


@operation(float32, int64)
def power(b: Builder, bits: Value) -> Value:
    """The power of 2 with these bits of exponent"""
    return b.bitcast(b.shl(b.trunc(bits, I32), I32(23)), F32)


def add_fours(b: Builder, total: Value, unsigned: Value, signed: Value) -> Value:
    """total int32 [16] + the products of unsigned and signed bytes, four for each"""
    values = (b.bitcast(x, INTS) for x in (unsigned, signed))
    return simd.call(b, "llvm.x86.avx512.vpdpbusd.512", INTS, total, *values)


@operation(vector, int64, vector)
def write_digits(b: Builder, out: Value, x: Value) -> Value:
    """16 numbers |x| <= 2**30 to the nearest whole ones, as digits in DIGITS rows of a tile; the digits' sums, of four
    columns each."""
    whole = b.fptosi(simd.call(b, "llvm.rint.v16f32", VECTOR, x), INTS)
    middle = ir.Constant(INTS, [0x00808080] * LANES)
    digits = b.bitcast(b.xor(b.add(whole, middle), middle), BYTES)
    for digit in range(DIGITS):
        own = _shuffle(b, digits, digits, [4 * (8 * i + k) + DIGITS - 1 - digit for i in range(2) for k in ORDER])
        simd.store_at(b, own, simd.offset(b, out, BLOCK * digit), 1)
    order = [
        LANES * lane + 4 * n + DIGITS - 1 - digit for lane in range(4) for digit in range(DIGITS) for n in range(4)
    ]
    ones = ir.Constant(BYTES, [1] * 4 * LANES)
    nothing = ir.Constant(INTS, [0] * LANES)
    return b.bitcast(add_fours(b, nothing, ones, _shuffle(b, digits, digits, order)), VECTOR)


@operation(void, int64, vector)
def write_sums(b: Builder, out: Value, sums: Value) -> None:
    """The sums of a row's digits with their signs turned, int32 [DIGITS]"""
    own = b.bitcast(sums, INTS)
    parts = [_shuffle(b, own, own, [DIGITS * i + digit for digit in range(DIGITS)]) for i in range(4)]
    total = b.add(b.add(parts[0], parts[1]), b.add(parts[2], parts[3]))
    simd.store_at(b, b.neg(total), out)


@operation(void, int64, int64)
def write_number(b: Builder, sums: Value, out: Value) -> None:
    """The float32 number whose digits' sums, with their signs turned, are in the first and the second of two lines"""
    total = None
    for digit in range(DIGITS):
        both = (simd.load_at(b, simd.offset(b, sums, LINE * i + 4 * digit), I32, 4) for i in range(2))
        own = b.sitofp(b.neg(b.add(*both)), F32)
        total = simd.call(b, "llvm.fma.f32", F32, total, ir.Constant(F32, 256.0), own) if total else own
    simd.store_at(b, total, out)


@operation(vector, vector, vector)
def add_whole(b: Builder, x: Value, y: Value) -> Value:
    """x + y, int32"""
    return b.bitcast(b.add(b.bitcast(x, INTS), b.bitcast(y, INTS)), VECTOR)


@kernel(int64, int64, int64)
def numbers_of(quad, depth):
    """Where the sums of a quad's rows are, of the first PART columns: QUAD float32 for every PART bytes."""
    return quad + depth * QUAD * DIGITS + 2 * LINE + depth // LANES * LINE


@kernel(float32, *[int64] * 3)
def factor_of(x, depth, scale):
    """What a row's numbers are multiplied with to be whole ones; its inverse, or NaN for a row that is not finite, to
    `scale`."""
    most, bad = simd.splat(ZERO), simd.splat(ZERO)
    for k in range(0, depth, LANES):
        value = simd.load(x + 4 * k)
        most = simd.larger(most, absolute(value))
        bad = simd.fma(value, simd.splat(ZERO), bad)
    bits = max(exponent(simd.max_lanes(most)), LEAST)
    simd.write_f32(scale, power(bits - LARGEST) + simd.sum_lanes(bad))
    return power(127 + 127 + LARGEST - bits)


@kernel(void, *[int64] * 4)
def split_row(x, row, depth, quads):
    """Row `row` [depth] float32 to its digits, their sums and its scale; depth is a multiple of BLOCK."""
    quad, row = quads + row // QUAD * quad_bytes(depth), row % QUAD
    tiles, scales = quad + row * DIGITS * BLOCK, quad + depth // BLOCK * TILE_BYTES
    factor, sums = simd.splat(factor_of(x, depth, scales + 4 * row)), simd.splat(ZERO)
    for k in range(0, depth, LANES):
        at = tiles + k // BLOCK * TILE_BYTES + k % BLOCK
        own = write_digits(at, simd.mul(simd.load(x + 4 * k), factor))
        part = scales + 2 * LINE + k // LANES * LINE + 4 * DIGITS * row
        write_sums(part, own)
        if k % PART != 0:
            write_number(part - LINE, numbers_of(quad, depth) + k // PART * PART + 4 * row)
        sums = add_whole(sums, own)
    write_sums(scales + LINE + 4 * DIGITS * row, sums)


# Products ----------------------------------------------------------------------------------------


def rows_of_tiles(b: Builder, codes: Value, count: int) -> Iterator[tuple[int, int, int, Value]]:
    """Of each 8 columns from k on: of 16 outputs, of which v says which, the even or the odd columns side by side."""
    for k in range(0, count, 8):
        at = simd.offset(b, codes, PANEL * k)
        columns = [simd.load_at(b, simd.offset(b, at, 2 * PANEL * i), BYTES, 1) for i in range(4)]
        for v in range(VECTORS):
            twos = [PANEL * (2 * j + odd) + LANES * v + n for odd in range(2) for n in range(LANES) for j in range(2)]
            first, second = (b.bitcast(_shuffle(b, columns[i], columns[i + 1], twos), HALVES) for i in (0, 2))
            for odd in range(2):
                fours = [LANES * odd + 2 * LANES * j + n for n in range(LANES) for j in range(2)]
                yield k, v, odd, _shuffle(b, first, second, fours)
                prefetch(b, simd.offset(b, at, PREFETCH + LINE * (2 * v + odd)))


@operation(void, int64, int64)
def codes_to_tiles(b: Builder, codes: Value, out: Value) -> None:
    """Codes [BLOCK, PANEL] as VECTORS tiles, by two shuffles of 64 bytes for each row of them"""
    for k, v, odd, row in rows_of_tiles(b, codes, BLOCK):
        simd.store_at(b, row, simd.offset(b, out, TILE_BYTES * v + LANES * (k + 4 * odd)), 64)


@operation(void, int64)
def configure(b: Builder, rows: Value) -> None:
    """Take tiles for products of so many rows of digits, their sums zero"""
    amx.configure(b, dict.fromkeys((0, 1, 2, 3, 6, 7), rows))


def multiplier(width: int) -> Any:
    """A numba function: (x, other, both, codes) adds the products of a quad, or of two, and so many columns' codes."""

    @operation(void, int64, int64, int64, int64)
    def multiply(b: Builder, x: Value, other: Value, both: Value, codes: Value) -> None:
        """Digits times codes"""
        stride = I64(BLOCK)
        amx.load(b, 4, codes, stride)
        amx.load(b, 5, simd.offset(b, codes, LANES * width), stride)
        amx.load(b, 6, x, stride)
        amx.multiply_int8(b, 0, 6, 4)
        amx.multiply_int8(b, 1, 6, 5)
        with b.if_then(b.icmp_signed("!=", both, I64(0))):
            amx.load(b, 7, other, stride)
            amx.multiply_int8(b, 2, 7, 4)
            amx.multiply_int8(b, 3, 7, 5)

    return multiply


multiply = multiplier(BLOCK)


@operation(void, int64, int64)
def end(b: Builder, both: Value, out: Value) -> None:
    """Store the sums, [2 * QUAD, DIGITS, PANEL] int32, and begin anew"""
    stride, half = I64(WIDTH), QUAD * ROW_OF_SUMS
    with b.if_then(b.icmp_signed("!=", both, I64(0))):
        for tile in (2, 3):
            amx.store(b, tile, simd.offset(b, out, half + 4 * LANES * (tile - 2)), stride)
            amx.zero(b, tile)
    for tile in (0, 1):
        amx.store(b, tile, simd.offset(b, out, 4 * LANES * tile), stride)
        amx.zero(b, tile)


def number_of(b: Builder, sums: list[Value]) -> Value:
    total, *rest = (b.sitofp(row, VECTOR) for row in sums)
    for digit in rest:
        total = simd.fused(b, total, simd.constant(256.0), digit)
    return total


@operation(vector, int64)
def number(b: Builder, sums: Value) -> Value:
    """The number whose digits' sums these are"""
    return number_of(b, [simd.load_at(b, simd.offset(b, sums, WIDTH * digit), INTS, 4) for digit in range(DIGITS)])


@kernel(int64, int64, int64, int64)
def scale_of(quads, depth, row):
    """Where a row's scale is."""
    return quads + row // QUAD * quad_bytes(depth) + depth * QUAD * DIGITS + 4 * (row % QUAD)


@kernel(void, *[int64] * 4)
def scale_rows(quads, depth, count, out):
    """out [count, PANEL] times the scales of rows."""
    for row in range(count):
        own = simd.splat(read_f32(scale_of(quads, depth, row)))
        for v in range(0, WIDTH, 4 * LANES):
            simd.store(out + v, simd.mul(simd.load(out + v), own))
        out += WIDTH


@kernel(void, *[int64] * 6)
def scale_sums(sums, count, scales, quads, depth, out):
    """out [count, PANEL] = the numbers of sums, times the scales of rows and columns."""
    for row in range(count):
        own = simd.splat(read_f32(scale_of(quads, depth, row)))
        for v in range(0, WIDTH, 4 * LANES):
            value = simd.mul(number(sums + v), simd.load(scales + v))
            simd.store(out + v, simd.mul(value, own))
        sums, out = sums + ROW_OF_SUMS, out + WIDTH


def _unpack(b: Builder, x: Value, y: Value) -> list[Value]:
    """Elements of x and y in turn, of the lower half of each 16 bytes and of the upper: one instruction each."""
    count = x.type.count
    lane = count // 4
    found = []
    for half in range(2):
        firsts = [lane * i + lane // 2 * half + n for i in range(4) for n in range(lane // 2)]
        found.append(_shuffle(b, x, y, [at for first in firsts for at in (first, count + first)]))
    return found


def _fours(b: Builder, codes: Value) -> list[Value]:
    """8 columns of a panel in four vectors, four side by side for an output: the even ones of outputs 4 * j and after
    and of 16 + 4 * j and after, then the odd ones of the same.
    """
    columns = [simd.load_at(b, simd.offset(b, codes, 2 * PANEL * i), BYTES, 1) for i in range(4)]
    pairs = [_unpack(b, columns[i], columns[i + 1]) for i in (0, 2)]
    found = []
    for first, second in zip(*pairs, strict=True):
        found += _unpack(b, b.bitcast(first, HALVES), b.bitcast(second, HALVES))
    return [b.bitcast(four, BYTES) for four in found]


def _gathered(b: Builder, fours: list[Value], v: int) -> Value:
    """The sums of 16 outputs, from those of even and of odd columns as `_fours` has them."""

    def lanes(x: Value, y: Value, first: int, second: int) -> Value:
        own = [4 * lane + n for lane in (first, second) for n in range(4)]
        return _shuffle(b, x, y, own + [LANES + n for n in own])

    low, high = (lanes(fours[i], fours[i + 1], v, 2 + v) for i in (0, 2))
    return b.add(lanes(low, high, 0, 2), lanes(low, high, 1, 3))


@operation(void, *[int64] * 6)
def multiply_one(b: Builder, codes: Value, x: Value, own: Value, depth: Value, scales: Value, out: Value) -> None:
    """out [PANEL] = a quad's first row times a panel, in vectors: they read memory more steadily than tiles.

    own: the row's scale, and a line after it minus its digits' sums. One factor of such a product has no sign: codes
    are 128 more here, and 128 times the sum of a digit is taken away.
    """
    entry, loop, done = b.block, b.append_basic_block("block"), b.append_basic_block("summed")
    b.branch(loop)
    b.position_at_end(loop)
    left, at, tile = (b.phi(I64) for _ in range(3))
    flip = ir.Constant(BYTES, [0x80] * 4 * LANES)
    even = ir.Constant(FLAGS, [1] * (LANES // 2) + [0] * (LANES // 2))
    begun = [[b.phi(INTS) for _ in range(4)] for _ in range(DIGITS)]
    sums = [list(own) for own in begun]
    for k in range(0, BLOCK, 8):
        codes_of = [b.xor(four, flip) for four in _fours(b, simd.offset(b, at, PANEL * k))]
        for digit, totals in enumerate(sums):
            place = simd.offset(b, tile, BLOCK * digit + k)
            both = (simd.splat_of(b, simd.load_at(b, simd.offset(b, place, 4 * odd), I32, 1), INTS) for odd in range(2))
            value = b.select(even, *both)
            totals[:] = [add_fours(b, *each, value) for each in zip(totals, codes_of, strict=True)]
            prefetch(b, simd.offset(b, at, PREFETCH + PANEL * k + LINE * digit))
    after = b.sub(left, I64(BLOCK)), simd.offset(b, at, BLOCK * PANEL), simd.offset(b, tile, TILE_BYTES)
    for phi, first, following in zip((left, at, tile), (depth, codes, x), after, strict=True):
        phi.add_incoming(first, entry)
        phi.add_incoming(following, loop)
    for phis, totals in zip(begun, sums, strict=True):
        for phi, total in zip(phis, totals, strict=True):
            phi.add_incoming(ir.Constant(INTS, [0] * LANES), entry)
            phi.add_incoming(total, loop)
    b.cbranch(b.icmp_signed(">", after[0], I64(0)), loop, done)
    b.position_at_end(done)
    wholes = [simd.load_at(b, simd.offset(b, own, LINE + 4 * digit), I32, 4) for digit in range(DIGITS)]
    scale = simd.splat_of(b, simd.load_at(b, own, F32, 4), VECTOR)
    for v in range(VECTORS):
        rows = [
            b.add(_gathered(b, fours, v), simd.splat_of(b, b.shl(whole, I32(7)), INTS))
            for fours, whole in zip(sums, wholes, strict=True)
        ]
        value = b.fmul(number_of(b, rows), simd.load_at(b, simd.offset(b, scales, 4 * LANES * v), VECTOR, 4))
        simd.store_at(b, b.fmul(value, scale), simd.offset(b, out, 4 * LANES * v))


@kernel(void, *[int64] * 9)
def multiply_digits(segment, first, last, depth, x, row, count, scratch, out):
    """out [last - first, ROWS, PANEL] = rows `row`, ..., a multiple of QUAD, times these panels.

    Two quads at a time go through all columns of a panel. Sums are scaled when those after them have been stored: until
    then they are on their way to the cache, and nothing else would go on meanwhile.
    """
    size, data, scales = quad_bytes(depth), read_i64(segment + LOW), read_i64(segment + SCALE)
    codes, step = scratch + 2 * SUMS_BYTES, BLOCK_BYTES if count > 2 * QUAD else 0
    slot, waiting, of, quads, into = 0, 0, scales, x, out
    if row == 0 and count == 1:
        for panel in range(first, last):
            at, into = data + panel * depth * PANEL, out + (panel - first) * ROWS * WIDTH
            multiply_one(at, x, x + depth * QUAD * DIGITS, depth, scales + panel * WIDTH, into)
        return
    configure(DIGITS * min(count, QUAD))
    for panel in range(first, last):
        for at in range(0, count, 2 * QUAD):
            rows, both = x + (row + at) // QUAD * size, int(count - at > QUAD)
            for k in range(0, depth, BLOCK):
                here, tile = codes + k // BLOCK * step, rows + k // BLOCK * TILE_BYTES
                if at == 0:  # once for all rows: they stay in a near cache
                    codes_to_tiles(data + (panel * depth + k) * PANEL, here)
                multiply(tile, tile + size, both, here)
            slot = SUMS_BYTES - slot
            end(both, scratch + slot)
            scale_sums(scratch + SUMS_BYTES - slot, waiting, of, quads, depth, into)
            waiting, of, quads = min(2 * QUAD, count - at), scales + panel * WIDTH, rows
            into = out + ((panel - first) * ROWS + at) * WIDTH
    scale_sums(scratch + slot, waiting, of, quads, depth, into)
    amx.release()
