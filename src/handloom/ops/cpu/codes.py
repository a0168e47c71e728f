"""Quantised weights to float32, a block of a panel at a time, for the tiles of `linear` to multiply.

A block has up to 64 columns of k of one panel and stays in the first cache. Each weight is one fused multiply-add of
its code: scale * code + minimum, where a format with a zero has the minimum -scale * zero, which is exact. The floats
are those of `QuantizedRows.dequantize` to the bit, so a quantised model computes what its dequantised one does.

What a segment is, its kernels read from its entries: see `handloom.ops.quantized_panels.Segment`.

This module does not know threads, or what is multiplied.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir

from handloom.ops.cpu import simd
from handloom.ops.cpu.simd import (
    I8,
    INTS,
    LANES,
    VECTOR,
    Builder,
    Value,
    int64,
    kernel,
    operation,
    read_i64,
    vector,
    void,
)
from handloom.ops.panels import PANEL
from handloom.ops.quantized_panels import MINIMUM_KINDS, PLANES, SCALE_KINDS

VECTORS = PANEL // LANES
SUPER = 256
SCALE_BYTES = 2 * PANEL * 4  # scales and minima of one group
ZERO = np.float32(0.0)

LOW, HIGH, SCALE, MINIMUM, SUPER_SCALE, SUPER_MINIMUM, BITS, GROUP, ZERO_CODE, SCALE_KIND, MINIMUM_KIND = (
    8 * i for i in range(len(PLANES) + 5)
)
FLOAT32, SUPER_INTEGER = SCALE_KINDS["float32"], SCALE_KINDS["super"]
NO_MINIMUM, FLOAT16, ZERO_POINT = (MINIMUM_KINDS[name] for name in ("none", "float16", "zero_point"))


@operation(vector, int64)
def load_f16(b: Builder, address: Value) -> Value:
    """16 float16"""
    return b.fpext(simd.load_at(b, address, ir.VectorType(ir.HalfType(), LANES), 2), VECTOR)


@operation(vector, int64)
def load_i8(b: Builder, address: Value) -> Value:
    """16 int8"""
    return b.sitofp(b.sext(simd.load_at(b, address, ir.VectorType(I8, LANES), 1), INTS), VECTOR)


@operation(vector, int64)
def load_u8(b: Builder, address: Value) -> Value:
    """16 uint8"""
    return b.sitofp(b.zext(simd.load_at(b, address, ir.VectorType(I8, LANES), 1), INTS), VECTOR)


def _each(number: int) -> Value:
    return ir.Constant(INTS, [number] * LANES)


def _field(b: Builder, words: Value, first: int, mask: int, to: int) -> Value:
    """Bits of each word, from bit `first` on, moved to bit `to`; mask as it is there."""
    if first > to:
        words = b.lshr(words, _each(first - to))
    elif first < to:
        words = b.shl(words, _each(to - first))
    return b.and_(words, _each(mask))


def _unpacker(bits: int, columns: int) -> Any:
    """A numba function: unpack(low, high, scales, out) makes `columns` columns of a panel floats."""

    @operation(void, int64, int64, int64, int64)
    def unpack(b: Builder, low: Value, high: Value, scales: Value, out: Value) -> None:
        """Codes of fewer than 8 bits"""
        width, above = VECTORS * LANES * 4, bits - 4
        for v in range(VECTORS):
            at = v * LANES * 4
            scale = simd.load_at(b, simd.offset(b, scales, at), VECTOR, 4)
            minimum = simd.load_at(b, simd.offset(b, scales, at + width), VECTOR, 4)
            upper = simd.load_at(b, simd.offset(b, high, at), INTS, 4) if above else None
            for k in range(columns):
                if k % 8 == 0:
                    words = simd.load_at(b, simd.offset(b, low, k // 8 * width + at), INTS, 4)
                code = _field(b, words, 4 * (k % 8), 15, 0)
                if upper is not None:
                    code = b.or_(code, _field(b, upper, above * k, ((1 << above) - 1) << 4, 4))
                weight = simd.fused(b, b.sitofp(code, VECTOR), scale, minimum)
                simd.store_at(b, weight, simd.offset(b, out, k * width + at))

    return unpack


unpack_4, unpack_5, unpack_6 = _unpacker(4, 32), _unpacker(5, 32), _unpacker(6, 16)


def _unpacker_of_bytes(columns: int) -> Any:
    @operation(void, int64, int64, int64)
    def unpack(b: Builder, low: Value, scales: Value, out: Value) -> None:
        """Codes of 8 bits, in formats without minima"""
        all_scales = [simd.load_at(b, simd.offset(b, scales, v * LANES * 4), VECTOR, 4) for v in range(VECTORS)]
        for k in range(columns):
            for v, scale in enumerate(all_scales):
                i = k * VECTORS + v
                codes = simd.load_at(b, simd.offset(b, low, i * LANES), ir.VectorType(I8, LANES), 1)
                weight = b.fmul(b.sitofp(b.sext(codes, INTS), VECTOR), scale)
                simd.store_at(b, weight, simd.offset(b, out, i * LANES * 4))

    return unpack


unpack_8, unpack_8_one = _unpacker_of_bytes(8), _unpacker_of_bytes(1)


@kernel(void, *[int64] * 5)
def read_scales(segment, panel, depth, k, into):
    """Scales and minima of the group of column k, each PANEL float32."""
    group = read_i64(segment + GROUP)
    at = (panel * (depth // group) + k // group) * PANEL
    above = (panel * (depth // SUPER) + k // SUPER) * PANEL * 2
    kind, least = read_i64(segment + SCALE_KIND), read_i64(segment + MINIMUM_KIND)
    for v in range(0, PANEL, LANES):
        if kind == FLOAT32:
            scale = simd.load(read_i64(segment + SCALE) + 4 * (at + v))
        elif kind == SUPER_INTEGER:
            address = read_i64(segment + SCALE) + at + v
            scale = load_i8(address) if least == NO_MINIMUM else load_u8(address)
            scale = simd.mul(load_f16(read_i64(segment + SUPER_SCALE) + above + 2 * v), scale)
        else:
            scale = load_f16(read_i64(segment + SCALE) + 2 * (at + v))
        simd.store(into + 4 * v, scale)
        minima = read_i64(segment + MINIMUM)
        if least == NO_MINIMUM:
            minimum = simd.mul(scale, simd.splat(np.float32(-read_i64(segment + ZERO_CODE))))
        elif least == FLOAT16:
            minimum = load_f16(minima + 2 * (at + v))
        else:
            minimum = load_u8(minima + at + v)
            factor = scale if least == ZERO_POINT else load_f16(read_i64(segment + SUPER_MINIMUM) + above + 2 * v)
            minimum = simd.sub(simd.splat(ZERO), simd.mul(factor, minimum))
        simd.store(into + 4 * (PANEL + v), minimum)


@kernel(void, *[int64] * 7)
def unpack_bytes(segment, panel, depth, k, count, scales, out):
    """As `unpack_block`, of 8 bits: scales change at multiples of the group."""
    group, low = read_i64(segment + GROUP), read_i64(segment + LOW)
    end = k + count
    while k < end:
        read_scales(segment, panel, depth, k, scales)
        last = min(end, (k // group + 1) * group)
        while k + 8 <= last:
            unpack_8(low + (panel * depth + k) * PANEL, scales, out)
            k, out = k + 8, out + 8 * PANEL * 4
        while k < last:
            unpack_8_one(low + (panel * depth + k) * PANEL, scales, out)
            k, out = k + 1, out + PANEL * 4


@kernel(void, *[int64] * 7)
def unpack_block(segment, panel, depth, k, count, scales, out):
    """Columns k .. k + count of a panel as float32 [count, PANEL].

    k is a multiple of 64, count 64 or what is left; scales: SCALE_BYTES of scratch.
    """
    bits = read_i64(segment + BITS)
    if bits == 8:
        unpack_bytes(segment, panel, depth, k, count, scales, out)
        return
    low, high = read_i64(segment + LOW), read_i64(segment + HIGH)
    step = 16 if bits == 6 else 32
    for at in range(k, k + count, step):
        read_scales(segment, panel, depth, at, scales)
        nibbles = low + (panel * depth + at) // 2 * PANEL
        if bits == 4:
            unpack_4(nibbles, high, scales, out)
        elif bits == 5:
            unpack_5(nibbles, high + (panel * depth + at) // 8 * PANEL, scales, out)
        else:
            unpack_6(nibbles, high + (panel * depth + at) // 4 * PANEL, scales, out)
        out = out + step * PANEL * 4
