"""Rows of float32 as three pieces of bfloat16 each, whose sum they are, in tiles for the matrix units.

The 24 bits of a float32 are 8 + 8 + 8: each piece is the upper half of what the pieces before it leave. Nothing is
rounded, so products of the pieces with bfloat16, added in float32, are those of the row (the idea is that of Henry,
Tang and Heinecke, "Leveraging the bfloat16 artificial intelligence datatype for higher-precision computations", 2019).
Bits below 2^-133 are lost, and the matrix units take pieces below 2^-126 as zero. Infinity is one piece and two zeros,
and of a NaN the second piece is NaN.

Of 16 rows, or what is left of them, 32 columns are a tile of each piece: [K / 32, 3, rows, 32], zeros after the last
column.

This module does not know what the rows are multiplied with.
"""

from __future__ import annotations

from llvmlite import ir

from handloom.ops.cpu import amx, simd
from handloom.ops.cpu.instructions import PIECES, TILE_DEPTH
from handloom.ops.cpu.simd import I16, INTS, LANES, VECTOR, Builder, Value, int64, kernel, operation, vector, void


def _each(number: int) -> Value:
    return ir.Constant(INTS, [number] * LANES)


@operation(void, int64, vector)
def store_upper_half(b: Builder, address: Value, x: Value) -> None:
    """The upper 16 bits of 16 float32"""
    halves = b.trunc(b.lshr(b.bitcast(x, INTS), _each(16)), ir.VectorType(I16, LANES))
    simd.store_at(b, halves, address, 2)


@operation(vector, vector)
def upper_half(b: Builder, x: Value) -> Value:
    """The upper 16 bits of 16 float32, as float32"""
    return b.bitcast(b.and_(b.bitcast(x, INTS), _each(0xFFFF0000 - (1 << 32))), VECTOR)


@operation(vector, vector)
def lower_half(b: Builder, x: Value) -> Value:
    """What is left of 16 float32 without their upper 16 bits; of infinity nothing, of a NaN a NaN"""
    upper = b.bitcast(b.and_(b.bitcast(x, INTS), _each(0xFFFF0000 - (1 << 32))), VECTOR)
    return b.select(b.fcmp_ordered("==", x, upper), simd.constant(0.0), b.fsub(x, upper))


@kernel(int64, int64)
def tiles_of(depth):
    """How many tiles a row goes through."""
    return (depth + TILE_DEPTH - 1) // TILE_DEPTH


@kernel(int64, int64, int64, int64)
def rows_at(pieces, first, depth):
    """Where the tiles of 16 rows from row `first` on begin."""
    return pieces + first * tiles_of(depth) * PIECES * amx.ROW_BYTES


@kernel(void, *[int64] * 5)
def split_row(x, row, rows, depth, pieces):
    """Row `row` of `rows` [depth] float32 to its places in the tiles."""
    first = row // amx.ROWS * amx.ROWS
    size = min(amx.ROWS, rows - first) * amx.ROW_BYTES
    out = rows_at(pieces, first, depth) + (row - first) * amx.ROW_BYTES
    for k in range(0, depth, TILE_DEPTH):
        for v in range(0, TILE_DEPTH, LANES):
            at = out + 2 * v
            rest = simd.load_first(x + 4 * (k + v), depth - k - v)
            for _ in range(PIECES):
                store_upper_half(at, rest)
                rest = lower_half(rest)
                at += size
        out += PIECES * size
