"""What is done to rows: normalisation, rotation, activation, the write of keys and values, the look-up of embeddings.

Each function works on one row by addresses, in float32, in an order that depends on the row's width alone.

This module does not know threads, or what a row means.
"""

from __future__ import annotations

import math

import numpy as np
from llvmlite import ir

from handloom.ops.cpu import simd
from handloom.ops.cpu.codes import SCALE_BYTES, ZERO, unpack_block
from handloom.ops.cpu.elementary import activate
from handloom.ops.cpu.instructions import BLOCK
from handloom.ops.cpu.simd import (
    I16,
    INTS,
    LANES,
    Builder,
    Value,
    float64,
    int64,
    kernel,
    operation,
    vector,
    void,
)
from handloom.ops.cpu.tiles import FORMAT_BF16, FORMAT_F16, FORMAT_F32
from handloom.ops.panels import PANEL

# Values of other formats ------------------------------------------------------------------------


def _first_halves(b: Builder, address: Value, count: Value) -> Value:
    halves = ir.VectorType(I16, LANES)
    zeros = ir.Constant(halves, [0] * LANES)
    at = simd.pointer(b, address, halves)
    return simd.call(b, "llvm.masked.load.v16i16.p0", halves, at, simd.I32(2), simd.first_lanes(b, count), zeros)


@operation(vector, int64, int64)
def load_first_bf16(b: Builder, address: Value, count: Value) -> Value:
    """The first `count` of 16 bfloat16"""
    wide = b.zext(_first_halves(b, address, count), INTS)
    return b.bitcast(b.shl(wide, ir.Constant(INTS, [16] * LANES)), simd.VECTOR)


@operation(vector, int64, int64)
def load_first_f16(b: Builder, address: Value, count: Value) -> Value:
    """The first `count` of 16 float16"""
    halves = b.bitcast(_first_halves(b, address, count), ir.VectorType(ir.HalfType(), LANES))
    return b.fpext(halves, simd.VECTOR)


@operation(void, int64, vector, int64)
def store_first_bf16(b: Builder, address: Value, value: Value, count: Value) -> None:
    """The first `count` of 16, rounded to bfloat16, ties to even; a NaN stays one"""

    def each(number: int) -> Value:
        return ir.Constant(INTS, [number] * LANES)

    bits = b.bitcast(value, INTS)
    odd = b.and_(b.lshr(bits, each(16)), each(1))
    rounded = b.lshr(b.add(b.add(bits, odd), each(0x7FFF)), each(16))
    rounded = b.select(b.fcmp_unordered("uno", value, value), each(0x7FC0), rounded)
    _store_halves(b, address, b.trunc(rounded, ir.VectorType(I16, LANES)), count)


@operation(void, int64, vector, int64)
def store_first_f16(b: Builder, address: Value, value: Value, count: Value) -> None:
    """The first `count` of 16, rounded to float16"""
    halves = b.fptrunc(value, ir.VectorType(ir.HalfType(), LANES))
    _store_halves(b, address, b.bitcast(halves, ir.VectorType(I16, LANES)), count)


def _store_halves(b: Builder, address: Value, halves: Value, count: Value) -> None:
    at = simd.pointer(b, address, halves.type)
    name = "llvm.masked.store.v16i16.p0"
    simd.call(b, name, ir.VoidType(), halves, at, simd.I32(2), simd.first_lanes(b, count))


@kernel(int64, int64)
def size_of(form):
    """Bytes of a value of this format."""
    return 4 if form == FORMAT_F32 else 2


@kernel(vector, int64, int64, int64)
def load_as(form, address, count):
    """The first `count` of 16 values of this format, zeros after them."""
    if form == FORMAT_BF16:
        return load_first_bf16(address, count)
    if form == FORMAT_F16:
        return load_first_f16(address, count)
    return simd.load_first(address, count)


@kernel(void, int64, int64, vector, int64)
def store_as(form, address, value, count):
    """Round the first `count` lanes to this format and store them."""
    if form == FORMAT_BF16:
        store_first_bf16(address, value, count)
    elif form == FORMAT_F16:
        store_first_f16(address, value, count)
    else:
        simd.store_first(address, value, count)


# Rows -------------------------------------------------------------------------------------------


@kernel(void, *[int64] * 5, float64, int64)
def normalize(x, width, layer, weight, bias, eps, out):
    """One row: RMS norm, or layer norm; weight and bias float32, an address of 0 for no bias; out may be x."""
    whole = simd.splat(ZERO)
    if layer:
        for i in range(0, width, LANES):
            whole = simd.add(whole, simd.load_first(x + 4 * i, width - i))
    mean = simd.splat(np.float32(simd.sum_lanes(whole) / width))
    squares = simd.splat(ZERO)
    for i in range(0, width, LANES):
        value = simd.load_first(x + 4 * i, width - i)
        if layer:
            value = simd.keep_first(simd.sub(value, mean), width - i, simd.splat(ZERO))
        squares = simd.fma(value, value, squares)
    scale = simd.splat(np.float32(1.0 / math.sqrt(simd.sum_lanes(squares) / width + eps)))
    for i in range(0, width, LANES):
        count = width - i
        value = simd.load_first(x + 4 * i, count)
        if layer:
            value = simd.sub(value, mean)
        value = simd.mul(simd.mul(value, scale), simd.load_first(weight + 4 * i, count))
        if bias != 0:
            value = simd.add(value, simd.load_first(bias + 4 * i, count))
        simd.store_first(out + 4 * i, value, count)


@kernel(void, *[int64] * 4)
def add_rows(x, y, width, out):
    """out = x + y"""
    for i in range(0, width, LANES):
        count = width - i
        simd.store_first(
            out + 4 * i, simd.add(simd.load_first(x + 4 * i, count), simd.load_first(y + 4 * i, count)), count
        )


@kernel(void, *[int64] * 7)
def activate_row(x, first, last, width, gated, kind, out):
    """Columns first..last of activation(x[:width]), times x[width:] if gated."""
    for i in range(first, last, LANES):
        count = min(last, width) - i
        value = activate(simd.load_first(x + 4 * i, count), kind)
        if gated:
            value = simd.mul(value, simd.load_first(x + 4 * (width + i), count))
        simd.store_first(out + 4 * i, value, count)


@kernel(void, *[int64] * 5)
def rotate_head(x, cos, sin, half, interleaved):
    """Rotate the first 2 * half values by the angles: halves against each other, or neighbours; in place."""
    if interleaved:
        for i in range(half):
            c, s = simd.read_f32(cos + 4 * i), simd.read_f32(sin + 4 * i)
            a, b = simd.read_f32(x + 8 * i), simd.read_f32(x + 8 * i + 4)
            simd.write_f32(x + 8 * i, a * c - b * s)
            simd.write_f32(x + 8 * i + 4, b * c + a * s)
        return
    for i in range(0, half, LANES):
        count = half - i
        c, s = simd.load_first(cos + 4 * i, count), simd.load_first(sin + 4 * i, count)
        a, b = simd.load_first(x + 4 * i, count), simd.load_first(x + 4 * (half + i), count)
        simd.store_first(x + 4 * i, simd.sub(simd.mul(a, c), simd.mul(b, s)), count)
        simd.store_first(x + 4 * (half + i), simd.add(simd.mul(b, c), simd.mul(a, s)), count)


@kernel(void, *[int64] * 4)
def convert_row(x, width, form, out):
    """Round a row to a format."""
    for i in range(0, width, LANES):
        store_as(form, out + size_of(form) * i, simd.load_first(x + 4 * i, width - i), width - i)


@kernel(void, *[int64] * 5)
def widen_row(x, width, form, out, padded):
    """A row of a format as float32, zeros up to `padded`, a multiple of 16."""
    for i in range(0, padded, LANES):
        simd.store(out + 4 * i, load_as(form, x + size_of(form) * i, width - i) if i < width else simd.splat(ZERO))


@kernel(void, *[int64] * 5)
def embed_quantized_row(segment, token, width, scratch, out):
    """Row `token` of a quantised table."""
    block = scratch + SCALE_BYTES
    for k in range(0, width, BLOCK):
        count = min(BLOCK, width - k)
        unpack_block(segment, token // PANEL, width, k, count, scratch, 0, 0, 0, block)
        for i in range(count):
            simd.write_f32(out + 4 * (k + i), simd.read_f32(block + 4 * (i * PANEL + token % PANEL)))


@kernel(void, *[int64] * 6)
def embed_row(weight, form, in_panels, token, width, out):
    """Row `token` of a table: one that lies row by row, or in panels."""
    if not in_panels:
        widen_row(weight + size_of(form) * token * width, width, form, out, width // LANES * LANES)
        whole = width // LANES * LANES
        if whole < width:
            rest = load_as(form, weight + size_of(form) * (token * width + whole), width - whole)
            simd.store_first(out + 4 * whole, rest, width - whole)
        return
    panel, column = weight + size_of(form) * (token // PANEL * PANEL * width), token % PANEL
    for i in range(width):
        paired = form == FORMAT_BF16 and i < width // 2 * 2
        at = i // 2 * 2 * PANEL + 2 * column + i % 2 if paired else i * PANEL + column
        simd.store_first(out + 4 * i, load_as(form, panel + size_of(form) * at, 1), 1)


@kernel(void, *[int64] * 5)
def add_table_row(table, form, row, width, x):
    """x += row `row` of a table that lies row by row"""
    start = table + size_of(form) * row * width
    for i in range(0, width, LANES):
        count = width - i
        value = simd.add(simd.load_first(x + 4 * i, count), load_as(form, start + size_of(form) * i, count))
        simd.store_first(x + 4 * i, value, count)


@kernel(void, int64, int64, float64)
def scale_row(x, width, scale):
    """x *= scale"""
    factor = simd.splat(np.float32(scale))
    for i in range(0, width, LANES):
        count = width - i
        simd.store_first(x + 4 * i, simd.mul(simd.load_first(x + 4 * i, count), factor), count)
