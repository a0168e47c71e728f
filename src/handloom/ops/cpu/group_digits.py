"""Products with codes whose groups have scales in half precision, from rows as digits: `digits` says what these are.

The whole numbers of a part of 32 columns are summed exactly, as (code - zero) times digits, made one float32, and times
the scale of their group added to those of the next part; where groups have minima, these times the sums of the row's
numbers follow. Blocks of 64 columns are added in order. So one row, in vectors (VNNI), gives the bits that it gives
among many, in matrix units (AMX).

This module does not know threads, or where operands come from.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from handloom.ops.cpu import amx, simd
from handloom.ops.cpu.amx import TILE_BYTES
from handloom.ops.cpu.code_bytes import BYTES, SIGN, add_columns, eight_columns, less, load_zeros
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
    ZERO,
    ZERO_CODE,
    ZERO_POINT,
    load_f16,
    read_scales,
)
from handloom.ops.cpu.digits import (
    PART,
    ROW_OF_SUMS,
    SUMS_BYTES,
    WIDTH,
    end,
    multiplier,
    number,
    number_of,
    numbers_of,
    quad_bytes,
    scale_rows,
)  # fmt: skip
from handloom.ops.cpu.instructions import BLOCK, DIGITS, LINE, QUAD, ROWS
from handloom.ops.cpu.simd import (
    I64,
    INTS,
    LANES,
    VECTOR,
    Builder,
    Value,
    int64,
    kernel,
    operation,
    read_f32,
    read_i64,
    void,
    write_i64,
)
from handloom.ops.cpu.tiles import VECTORS
from handloom.ops.panels import PANEL

SLOTS = 4  # sums of two parts, and of the two before them
PARTS = BLOCK // PART
HALF = ir.VectorType(ir.HalfType(), LANES)

multiply = multiplier(PART)


def _block(bits: int) -> Any:
    """A numba function: stores the sums of a block of one row and a panel, but what minima add.

    other_...: of the second part's group; x: the row's digits; counts: minus their sums.
    """

    @operation(void, *[int64] * 9)
    def multiply_block(
        b: Builder, low: Value, high: Value, zeros: Value, other_zeros: Value, scales: Value, other_scales: Value,
        x: Value, counts: Value, out: Value,
    ) -> None:  # fmt: skip
        """A block of a row"""
        blocks: list[Value] = [None] * VECTORS
        for first, own_zeros, own_scales in ((0, zeros, scales), (PART, other_zeros, other_scales)):
            zero = [load_zeros(b, simd.offset(b, own_zeros, LANES * v)) for v in range(VECTORS)]
            sums = less(b, simd.offset(b, counts, LINE * first // LANES), PART, zero)
            add_columns(b, sums, bits, low, high, x, range(first, first + PART, 8))
            for v in range(VECTORS):
                if bits == 8:  # float32: made floats here they cost a fifth of a step
                    scale = simd.load_at(b, simd.offset(b, own_scales, 4 * LANES * v), VECTOR, 4)
                else:
                    scale = b.fpext(simd.load_at(b, simd.offset(b, own_scales, 2 * LANES * v), HALF, 2), VECTOR)
                value = number_of(b, sums[v])
                blocks[v] = simd.fused(b, scale, value, blocks[v]) if first else b.fmul(scale, value)
        for v, block in enumerate(blocks):
            simd.store_at(b, block, simd.offset(b, out, 4 * LANES * v))

    return multiply_block


four_block, five_block, eight_block = (_block(bits) for bits in (4, 5, 8))


@kernel(int64, *[int64] * 3)
def group_of(segment, panel, k):
    """The number of a column's group, among those of all panels"""
    return panel * read_i64(segment + GROUPS) + (k >> read_i64(segment + GROUP_SHIFT))


@kernel(int64, *[int64] * 3)
def scales_of(segment, panel, k):
    """Where the scales of a column's group are, float16 [PANEL]"""
    return read_i64(segment + SCALE) + group_of(segment, panel, k) * 2 * PANEL


@kernel(int64, *[int64] * 3)
def minima_of(segment, panel, k):
    """Where its minima are, float16 [PANEL]"""
    return read_i64(segment + MINIMUM) + group_of(segment, panel, k) * 2 * PANEL


@kernel(int64, *[int64] * 4)
def zeros_of(segment, panel, k, zeros):
    """Where its zeros are, uint8 [PANEL]; zeros: if it has none"""
    if read_i64(segment + MINIMUM_KIND) != ZERO_POINT:
        return zeros
    return read_i64(segment + MINIMUM) + group_of(segment, panel, k) * PANEL


@kernel(void, *[int64] * 8)
def multiply_row(segment, panel, depth, minima, zeros, x, scratch, out):
    """out [PANEL] = the first row of a quad times a panel, in vectors."""
    bits, low, high = read_i64(segment + BITS), read_i64(segment + LOW), read_i64(segment + HIGH)
    counts, numbers = x + depth * QUAD * DIGITS + 2 * LINE, numbers_of(x, depth)
    for k in range(0, depth, BLOCK):
        tile, line, first, second = x + k // BLOCK * TILE_BYTES, counts + 4 * k, panel * depth + k, k + PART
        scale, other = scales_of(segment, panel, k), scales_of(segment, panel, second)
        zero, beside = zeros_of(segment, panel, k, zeros), zeros_of(segment, panel, second, zeros)
        if bits == 4:
            four_block(low + first * PANEL // 2, 0, zero, beside, scale, other, tile, line, scratch)
        elif bits == 5:
            above = high + first * PANEL // 8
            five_block(low + first * PANEL // 2, above, zero, beside, scale, other, tile, line, scratch)
        else:
            scale, other = scratch + WIDTH, scratch + 3 * WIDTH
            read_scales(segment, panel, depth, k, scale)
            read_scales(segment, panel, depth, second, other)
            eight_block(low + first * PANEL, 0, zero, beside, scale, other, tile, line, scratch)
        for v in range(0, WIDTH, 4 * LANES):
            block = simd.load(scratch + v)
            if minima:
                own, next_own = minima_of(segment, panel, k), minima_of(segment, panel, second)
                block = simd.fma(load_f16(own + v // 2), simd.splat(read_f32(numbers + k)), block)
                block = simd.fma(load_f16(next_own + v // 2), simd.splat(read_f32(numbers + second)), block)
            simd.store(out + v, simd.add(simd.splat(ZERO) if k == 0 else simd.load(out + v), block))
    scale_rows(x, depth, 1, out)


def _to_tiles(bits: int) -> Any:
    """A numba function: (low, high, zeros, out) makes codes of PART columns, less their zeros, VECTORS tiles
    [PART / 4, 16, 4]."""

    @operation(void, *[int64] * 4)
    def codes_to_tiles(b: Builder, low: Value, high: Value, zeros: Value, out: Value) -> None:
        """Codes to tiles"""
        ones = ir.Constant(INTS, [0x01010101] * LANES)
        zero = [b.mul(load_zeros(b, simd.offset(b, zeros, LANES * v)), ones) for v in range(VECTORS)]
        for column in range(0, PART, 8):
            for v, odd, four in eight_columns(b, bits, low, high, column):
                code = b.sub(b.bitcast(four, BYTES), b.bitcast(zero[v], BYTES))
                simd.store_at(b, code, simd.offset(b, out, LANES * (PART * v + column + 4 * odd)), 64)

    return codes_to_tiles


four_to_tiles, five_to_tiles, eight_to_tiles = (_to_tiles(bits) for bits in (4, 5, 8))


@kernel(void, *[int64] * 6)
def to_tiles(segment, panel, depth, k, zeros, out):
    """The codes of a part as tiles; zeros: where the segment has none"""
    bits, low, high = read_i64(segment + BITS), read_i64(segment + LOW), read_i64(segment + HIGH)
    first, zeros = panel * depth + k, zeros_of(segment, panel, k, zeros)
    if bits == 4:
        four_to_tiles(low + first * PANEL // 2, 0, zeros, out)
    elif bits == 5:
        five_to_tiles(low + first * PANEL // 2, high + first * PANEL // 8, zeros, out)
    else:
        eight_to_tiles(low + first * PANEL, 0, zeros, out)


@operation(void, int64)
def configure(b: Builder, rows: Value) -> None:
    """Take tiles for products of so many rows of digits and PART columns, their sums zero"""
    amx.configure(b, dict.fromkeys((0, 1, 2, 3, 6, 7), rows) | dict.fromkeys((4, 5), I64(PART // 4)), PART)


@kernel(void, *[int64] * 7)
def add_sums(sums, count, scales, numbers, size, first, out):
    """out [count, PANEL] += the numbers of a block's parts times the scales of their groups, and what the minima
    add (numbers 0: there are none); first: out is zero."""
    for row in range(count):
        own = numbers + row // QUAD * size + 4 * (row % QUAD)
        for v in range(0, WIDTH, 4 * LANES):
            block = simd.mul(simd.load(scales + v), number(sums + v))
            for p in range(1, PARTS):
                block = simd.fma(simd.load(scales + 2 * WIDTH * p + v), number(sums + p * SUMS_BYTES + v), block)
            if numbers != 0:
                for p in range(PARTS):
                    whole = simd.splat(read_f32(own + p * PART))
                    block = simd.fma(simd.load(scales + 2 * WIDTH * p + WIDTH + v), whole, block)
            simd.store(out + v, simd.add(simd.splat(ZERO) if first else simd.load(out + v), block))
        sums, out = sums + ROW_OF_SUMS, out + WIDTH


@kernel(void, *[int64] * 9)
def multiply_many(segment, panel, depth, minima, zeros, x, count, scratch, out):
    """out [count, PANEL] = rows times a panel, in the matrix units; those of x begin with a quad."""
    size, codes, width = quad_bytes(depth), scratch + SLOTS * SUMS_BYTES, PANEL if count > 2 * QUAD else 0
    scales = codes + depth * PANEL
    slot, waiting, of, numbers, begin, into = 0, 0, scales, 0, 0, out
    configure(DIGITS * min(count, QUAD))
    for at in range(0, count, 2 * QUAD):
        rows, both = x + at // QUAD * size, int(count - at > QUAD)
        for k in range(0, depth, BLOCK):
            slot, scale = PARTS * SUMS_BYTES - slot, scales + k // PART * 2 * WIDTH
            for p in range(PARTS):
                start = k + p * PART
                here, tile = codes + start * width, rows + k // BLOCK * TILE_BYTES + p * PART
                if at == 0:
                    to_tiles(segment, panel, depth, start, zeros, here)
                    read_scales(segment, panel, depth, start, scale + p * 2 * WIDTH)
                multiply(tile, tile + size, both, here)
                end(both, scratch + slot + p * SUMS_BYTES)
            add_sums(scratch + PARTS * SUMS_BYTES - slot, waiting, of, numbers, size, begin, into)
            waiting, begin, into = min(2 * QUAD, count - at), int(k == 0), out + at * WIDTH
            of, numbers = scale, numbers_of(rows, depth) + k if minima else 0
    add_sums(scratch + slot, waiting, of, numbers, size, begin, into)
    amx.release()
    scale_rows(x, depth, count, out)


@kernel(void, *[int64] * 9)
def multiply_groups(segment, first, last, depth, x, row, count, scratch, out):
    """out [last - first, ROWS, PANEL] = rows `row`, ..., a multiple of QUAD, times these panels of codes in groups."""
    kind = read_i64(segment + MINIMUM_KIND)
    zeros = scratch + SLOTS * SUMS_BYTES + depth * PANEL + depth // PART * 2 * WIDTH
    minima = int(kind != NO_MINIMUM and kind != ZERO_POINT)
    for i in range(0, PANEL, 8):
        zero = SIGN if read_i64(segment + BITS) == 8 else read_i64(segment + ZERO_CODE)
        write_i64(zeros + i, zero * 0x0101010101010101)
    x += row // QUAD * quad_bytes(depth)
    for panel in range(first, last):
        into = out + (panel - first) * ROWS * WIDTH
        if count > 1:
            multiply_many(segment, panel, depth, minima, zeros, x, count, scratch, into)
        else:
            multiply_row(segment, panel, depth, minima, zeros, x, scratch, into)
