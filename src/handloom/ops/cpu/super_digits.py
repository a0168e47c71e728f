"""Products with codes whose groups have whole scales, as K types have them, from rows as digits (see `digits`).

A group's scale is a whole number times a float16 that 256 columns share. So the products of digits with codes are
multiplied with these numbers and summed over 256 columns exactly, before they are made one float32 and multiplied once.
In matrix units the numbers go into the codes, whose two digits to the base 256 are tiles of their own. Minima times the
sums of the row's numbers follow, group by group.

This module does not know threads, or where operands come from.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from handloom.ops.cpu import amx, simd
from handloom.ops.cpu.amx import TILE_BYTES
from handloom.ops.cpu.code_bytes import BYTES, add_columns, eight_columns, less
from handloom.ops.cpu.codes import (
    BITS,
    GROUP_SHIFT,
    GROUPS,
    HIGH,
    LOW,
    MINIMUM,
    MINIMUM_KIND,
    NO_MINIMUM,
    SCALE,
    SUPER,
    SUPER_MINIMUM,
    SUPER_SCALE,
    ZERO,
    load_f16,
    load_u8,
)
from handloom.ops.cpu.digits import (
    PART,
    ROW_OF_SUMS,
    SUMS_BYTES,
    WIDTH,
    number,
    number_of,
    numbers_of,
    quad_bytes,
    scale_rows,
)  # fmt: skip
from handloom.ops.cpu.instructions import BLOCK, DIGITS, LINE, QUAD, ROWS
from handloom.ops.cpu.simd import (
    I8,
    I16,
    I64,
    INTS,
    LANES,
    Builder,
    Value,
    int64,
    kernel,
    operation,
    read_f32,
    read_i64,
    vector,
    void,
)
from handloom.ops.cpu.tiles import VECTORS
from handloom.ops.panels import PANEL

ZEROS = {4: 0, 5: 0, 6: 32}  # by bits, the code of weight 0: where it is 0 there are minima
HALVES = ir.VectorType(I16, 2 * LANES)
LOWER = QUAD * ROW_OF_SUMS  # from the sums of codes' upper digits to those of their lower ones
CODE_BYTES = 2 * VECTORS * TILE_BYTES  # of a block


def _group(bits: int) -> int:
    return 16 if bits == 6 else 32


def _scale(b: Builder, bits: int, scales: Value, column: int, v: int) -> Value:
    """The whole scales of a block's column, int32 [16]"""
    place = simd.offset(b, scales, PANEL * (column // _group(bits)) + LANES * v)
    own = simd.load_at(b, place, ir.VectorType(I8, LANES), 1)
    return b.zext(own, INTS) if ZEROS[bits] == 0 else b.sext(own, INTS)


# A row in vectors --------------------------------------------------------------------------------


def _adder(bits: int) -> Any:
    """A numba function: (low, high, scales, x, counts, totals) adds a block of one row and a panel to int32 [DIGITS,
    PANEL]; counts: minus the sums of digits."""

    @operation(void, *[int64] * 6)
    def add_block(b: Builder, low: Value, high: Value, scales: Value, x: Value, counts: Value, totals: Value) -> None:
        """A block of a row"""
        zero = ir.Constant(INTS, [ZEROS[bits]] * LANES)
        places = [
            [simd.offset(b, totals, WIDTH * digit + 4 * LANES * v) for digit in range(DIGITS)] for v in range(VECTORS)
        ]
        found = [[simd.load_at(b, place, INTS, 4) for place in row] for row in places]
        for first in range(0, BLOCK, _group(bits)):
            line = simd.offset(b, counts, LINE * first // LANES)
            sums = less(b, line, _group(bits), [zero] * VECTORS if ZEROS[bits] else None)
            add_columns(b, sums, bits, low, high, x, range(first, first + _group(bits), 8))
            for v in range(VECTORS):
                scale = _scale(b, bits, scales, first, v)
                found[v] = [b.add(total, b.mul(own, scale)) for total, own in zip(found[v], sums[v], strict=True)]
        for own, row in zip(found, places, strict=True):
            for total, place in zip(own, row, strict=True):
                simd.store_at(b, total, place)

    return add_block


add_fours_block, add_fives_block, add_sixes_block = (_adder(bits) for bits in (4, 5, 6))


@kernel(void, *[int64] * 6)
def multiply_row(segment, panel, depth, x, scratch, out):
    """out [PANEL] = the first row of a quad times a panel, in vectors."""
    bits, low, high = read_i64(segment + BITS), read_i64(segment + LOW), read_i64(segment + HIGH)
    group, shift = panel * read_i64(segment + GROUPS), read_i64(segment + GROUP_SHIFT)
    totals, minima, counts = scratch, scratch + ROW_OF_SUMS, x + depth * QUAD * DIGITS + 2 * LINE
    for super_first in range(0, depth, SUPER):
        for v in range(0, ROW_OF_SUMS, 4 * LANES):
            simd.store(totals + v, simd.splat(ZERO))
        for k in range(super_first, super_first + SUPER, BLOCK):
            scales, tile = read_i64(segment + SCALE) + (group + (k >> shift)) * PANEL, x + k // BLOCK * TILE_BYTES
            first, line = panel * depth + k, counts + 4 * k
            if bits == 4:
                add_fours_block(low + first * PANEL // 2, 0, scales, tile, line, totals)
            elif bits == 5:
                add_fives_block(low + first * PANEL // 2, high + first * PANEL // 8, scales, tile, line, totals)
            else:
                add_sixes_block(low + first * PANEL // 2, high + first * PANEL // 4, scales, tile, line, totals)
        read_minima(segment, panel, depth, super_first, minima)
        above = read_i64(segment + SUPER_SCALE) + (panel * (depth // SUPER) + super_first // SUPER) * PANEL * 2
        numbers = numbers_of(x, depth) + super_first
        for v in range(0, WIDTH, 4 * LANES):
            block = simd.mul(load_f16(above + v // 2), number(totals + v))
            block = add_minima(segment, block, minima + v, numbers)
            simd.store(out + v, block if super_first == 0 else simd.add(simd.load(out + v), block))
    scale_rows(x, depth, 1, out)


@kernel(void, *[int64] * 5)
def read_minima(segment, panel, depth, k, into):
    """The minima of 256 columns' groups, [groups, PANEL] float32, if there are any."""
    if read_i64(segment + MINIMUM_KIND) == NO_MINIMUM:
        return
    at = read_i64(segment + MINIMUM) + (panel * read_i64(segment + GROUPS) + k // PART) * PANEL
    above = read_i64(segment + SUPER_MINIMUM) + (panel * (depth // SUPER) + k // SUPER) * PANEL * 2
    for group in range(SUPER // PART):
        for v in range(0, PANEL, LANES):
            minimum = simd.mul(load_f16(above + 2 * v), load_u8(at + group * PANEL + v))
            simd.store(into + group * WIDTH + 4 * v, simd.sub(simd.splat(ZERO), minimum))


@kernel(vector, int64, vector, int64, int64)
def add_minima(segment, block, minima, numbers):
    """What 256 columns give, with their groups' minima times the row's sums of numbers."""
    if read_i64(segment + MINIMUM_KIND) != NO_MINIMUM:
        for group in range(SUPER // PART):
            whole = simd.splat(read_f32(numbers + group * PART))
            block = simd.fma(simd.load(minima + group * WIDTH), whole, block)
    return block


# Many rows in the matrix units --------------------------------------------------------------------


def _to_tiles(bits: int) -> Any:
    """A numba function: (low, high, scales, out) makes codes of a block times their groups' whole scales tiles: the
    upper digits of 16 outputs and the lower ones, then those of the other outputs."""

    @operation(void, *[int64] * 4)
    def codes_to_tiles(b: Builder, low: Value, high: Value, scales: Value, out: Value) -> None:
        """Codes to tiles"""

        def each(number: int) -> Value:
            return ir.Constant(HALVES, [number] * 2 * LANES)

        zero = ir.Constant(BYTES, [ZEROS[bits]] * 4 * LANES)
        for column in range(0, BLOCK, 8):
            twice = []
            for v in range(VECTORS):
                scale = b.and_(_scale(b, bits, scales, column, v), ir.Constant(INTS, [0xFFFF] * LANES))
                twice.append(b.bitcast(b.mul(scale, ir.Constant(INTS, [0x00010001] * LANES)), HALVES))
            for v, odd, four in eight_columns(b, bits, low, high, column):
                codes = b.bitcast(b.sub(b.bitcast(four, BYTES), zero), HALVES)
                even = b.mul(b.ashr(b.shl(codes, each(8)), each(8)), twice[v])
                other = b.mul(b.ashr(codes, each(8)), twice[v])
                lower = b.or_(b.and_(even, each(0xFF)), b.shl(other, each(8)))
                upper = b.or_(b.lshr(b.add(even, each(128)), each(8)), b.and_(b.add(other, each(128)), each(0xFF00)))
                place = simd.offset(b, out, 2 * TILE_BYTES * v + LANES * (column + 4 * odd))
                simd.store_at(b, upper, place, 64)
                simd.store_at(b, lower, simd.offset(b, place, TILE_BYTES), 64)

    return codes_to_tiles


fours_to_tiles, fives_to_tiles, sixes_to_tiles = (_to_tiles(bits) for bits in (4, 5, 6))


@kernel(void, *[int64] * 5)
def to_tiles(segment, panel, depth, k, out):
    """The codes of a block as tiles"""
    bits, low, high = read_i64(segment + BITS), read_i64(segment + LOW), read_i64(segment + HIGH)
    group, first = panel * read_i64(segment + GROUPS) + (k >> read_i64(segment + GROUP_SHIFT)), panel * depth + k
    scales = read_i64(segment + SCALE) + group * PANEL
    if bits == 4:
        fours_to_tiles(low + first * PANEL // 2, 0, scales, out)
    elif bits == 5:
        fives_to_tiles(low + first * PANEL // 2, high + first * PANEL // 8, scales, out)
    else:
        sixes_to_tiles(low + first * PANEL // 2, high + first * PANEL // 4, scales, out)


@operation(void, int64)
def configure(b: Builder, rows: Value) -> None:
    """Take tiles for products of so many rows of digits, their sums zero"""
    amx.configure(b, dict.fromkeys((0, 1, 2, 3, 6), rows))


@operation(void, int64, int64)
def multiply(b: Builder, x: Value, codes: Value) -> None:
    """Digits of a quad times those of a block's codes"""
    amx.load(b, 6, x, I64(BLOCK))
    for i in range(2 * VECTORS):
        amx.load(b, 4 + i % 2, simd.offset(b, codes, TILE_BYTES * i), I64(BLOCK))
        amx.multiply_int8(b, i, 6, 4 + i % 2)


@operation(void, int64)
def end(b: Builder, out: Value) -> None:
    """Store the sums, upper and lower, each [QUAD, DIGITS, PANEL] int32, and begin anew"""
    for i in range(2 * VECTORS):
        amx.store(b, i, simd.offset(b, out, LOWER * (i % 2) + 4 * LANES * (i // 2)), I64(WIDTH))
        amx.zero(b, i)


@operation(vector, int64)
def both(b: Builder, sums: Value) -> Value:
    """The number whose digits' sums these are, of upper and of lower digits of codes"""
    found = []
    for digit in range(DIGITS):
        upper, lower = (simd.load_at(b, simd.offset(b, sums, WIDTH * digit + more), INTS, 4) for more in (0, LOWER))
        found.append(b.add(b.shl(upper, ir.Constant(INTS, [8] * LANES)), lower))
    return number_of(b, found)


@kernel(void, *[int64] * 8)
def add_sums(segment, sums, count, above, minima, numbers, first, out):
    """out [count, PANEL] += the numbers of 256 columns times their scales, and minima; first: out is stored."""
    for _ in range(count):
        for v in range(0, WIDTH, 4 * LANES):
            block = simd.mul(load_f16(above + v // 2), both(sums + v))
            block = add_minima(segment, block, minima + v, numbers)
            simd.store(out + v, block if first else simd.add(simd.load(out + v), block))
        sums, numbers, out = sums + ROW_OF_SUMS, numbers + 4, out + WIDTH


@kernel(void, *[int64] * 7)
def multiply_many(segment, panel, depth, x, count, scratch, out):
    """out [count, PANEL] = rows times a panel, in the matrix units; those of x begin with a quad."""
    size, minima, width = quad_bytes(depth), scratch + 2 * SUMS_BYTES, CODE_BYTES if count > QUAD else 0
    codes, supers = (
        minima + depth // PART * WIDTH,
        read_i64(segment + SUPER_SCALE) + panel * (depth // SUPER) * PANEL * 2,
    )
    slot, waiting, of, least, numbers, begin, into = 0, 0, supers, minima, 0, 0, out
    configure(DIGITS * min(count, QUAD))
    for at in range(0, count, QUAD):
        rows = x + at // QUAD * size
        for first in range(0, depth, SUPER):
            for k in range(first, first + SUPER, BLOCK):
                here = codes + k // BLOCK * width
                if at == 0:
                    to_tiles(segment, panel, depth, k, here)
                multiply(rows + k // BLOCK * TILE_BYTES, here)
            slot = SUMS_BYTES - slot
            end(scratch + slot)
            if at == 0:
                read_minima(segment, panel, depth, first, minima + first // PART * WIDTH)
            add_sums(segment, scratch + SUMS_BYTES - slot, waiting, of, least, numbers, begin, into)
            waiting, begin, into = min(QUAD, count - at), int(first == 0), out + at * WIDTH
            of, least = supers + first // SUPER * PANEL * 2, minima + first // PART * WIDTH
            numbers = numbers_of(rows, depth) + first
    add_sums(segment, scratch + slot, waiting, of, least, numbers, begin, into)
    amx.release()
    scale_rows(x, depth, count, out)


@kernel(void, *[int64] * 9)
def multiply_supers(segment, first, last, depth, x, row, count, scratch, out):
    """out [last - first, ROWS, PANEL] = rows `row`, ..., a multiple of QUAD, times these panels."""
    x += row // QUAD * quad_bytes(depth)
    for panel in range(first, last):
        into = out + (panel - first) * ROWS * WIDTH
        if count > 1:
            multiply_many(segment, panel, depth, x, count, scratch, into)
        else:
            multiply_row(segment, panel, depth, x, scratch, into)
