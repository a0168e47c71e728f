"""Quantised weights to float32, a block of a panel at a time: times a few rows at once, or for `linear`'s tiles.

A block has up to 64 columns of k of one panel and stays in the first cache. Each weight is one fused multiply-add of
its code: scale * code + minimum, where a format with a zero has the minimum -scale * zero, which is exact. The floats
are those of `QuantizedRows.dequantize` to the bit, so a quantised model computes what its dequantised one does.

What a segment is, its kernels read from its entries: see `handloom.ops.quantized_panels.Segment`.

This module does not know threads, or what is multiplied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
from llvmlite import ir

from handloom.ops.cpu import simd
from handloom.ops.cpu.amx import VNNI
from handloom.ops.cpu.simd import (
    F32,
    I8,
    I64,
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
from handloom.ops.cpu.tiles import PREFETCH, VECTORS, WIDE, prefetch
from handloom.ops.panels import PANEL
from handloom.ops.quantized_panels import MINIMUM_KINDS, PLANES, SCALE_KINDS

SUPER = 256
SCALE_BYTES = 2 * PANEL * 4  # scales and minima of one group
ZERO = np.float32(0.0)

(
    LOW,
    HIGH,
    SCALE,
    MINIMUM,
    SUPER_SCALE,
    SUPER_MINIMUM,
    BITS,
    GROUP_SHIFT,
    GROUPS,
    ZERO_CODE,
    SCALE_KIND,
    MINIMUM_KIND,
) = (8 * i for i in range(len(PLANES) + 6))
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


def _weights(
    b: Builder, bits: int, columns: int, low: Value, high: Value, scales: Value
) -> Iterator[tuple[int, list[Value]]]:
    """Emit the decoding of `columns` columns of a panel: k, and its weights in VECTORS vectors."""
    width, above = PANEL * 4, bits - 4
    vectors = [LANES * 4 * v for v in range(VECTORS)]
    scale = [simd.load_at(b, simd.offset(b, scales, at), VECTOR, 4) for at in vectors]
    if bits == 8:
        for k in range(columns):
            if k % 2 == 0:
                prefetch(b, simd.offset(b, low, PANEL * k + PREFETCH))
            places = [simd.offset(b, low, PANEL * k + LANES * v) for v in range(VECTORS)]
            codes = [simd.load_at(b, place, ir.VectorType(I8, LANES), 1) for place in places]
            yield k, [b.fmul(b.sitofp(b.sext(x, INTS), VECTOR), y) for x, y in zip(codes, scale, strict=True)]
        return
    minimum = [simd.load_at(b, simd.offset(b, scales, at + width), VECTOR, 4) for at in vectors]
    upper = [simd.load_at(b, simd.offset(b, high, at), INTS, 4) if above else None for at in vectors]
    words: list[Value] = []
    for k in range(columns):
        if k % 8 == 0:
            places = [simd.offset(b, low, k // 8 * width + at) for at in vectors]
            words = [simd.load_at(b, place, INTS, 4) for place in places]
            for place in places:
                prefetch(b, simd.offset(b, place, PREFETCH))
        weights = []
        for word, rest, x, y in zip(words, upper, scale, minimum, strict=True):
            if rest is None and WIDE:  # one instruction looks up the low four bits: 16% faster than two
                index = b.lshr(word, _each(4 * (k % 8))) if k % 8 else word
                table = ir.Constant(VECTOR, [float(i) for i in range(16)])
                number = simd.call(b, "llvm.x86.avx512.permvar.sf.512", VECTOR, table, index)
            else:
                code = _field(b, word, 4 * (k % 8), 15, 0)
                if rest is not None:
                    code = b.or_(code, _field(b, rest, above * k, ((1 << above) - 1) << 4, 4))
                number = b.sitofp(code, VECTOR)
            weights.append(simd.fused(b, number, x, y))
        yield k, weights


def _unpacker(bits: int, columns: int) -> Any:
    """A numba function: (low, high, scales, x, out) makes `columns` columns of a panel floats."""

    @operation(void, *[int64] * 7)
    def unpack(
        b: Builder, low: Value, high: Value, scales: Value, x: Value, stride: Value, n: Value, out: Value
    ) -> None:
        """Codes to floats"""
        for k, weights in _weights(b, bits, columns, low, high, scales):
            for v, weight in enumerate(weights):
                simd.store_at(b, weight, simd.offset(b, out, (PANEL * k + LANES * v) * 4))

    return unpack


def _multiplier(rows: int, bits: int, columns: int) -> Any:
    """A numba function: (low, high, scales, x, stride, n, sums) adds n rows x [n, columns] times these columns to
    sums [rows, PANEL]; past n the last row is taken again."""

    @operation(void, *[int64] * 7)
    def multiply(
        b: Builder, low: Value, high: Value, scales: Value, x: Value, stride: Value, n: Value, sums: Value
    ) -> None:
        """Codes times rows"""
        starts = [x]
        for row in range(1, rows):
            step = b.select(b.icmp_signed("<", I64(row), n), stride, I64(0))
            starts.append(b.add(starts[-1], step))
        places = [[simd.offset(b, sums, (PANEL * row + LANES * v) * 4) for v in range(VECTORS)] for row in range(rows)]
        totals = [[simd.load_at(b, place, VECTOR, 4) for place in row] for row in places]
        for k, weights in _weights(b, bits, columns, low, high, scales):
            for row, start in enumerate(starts):
                value = simd.splat_of(b, simd.load_at(b, simd.offset(b, start, 4 * k), F32, 4), VECTOR)
                totals[row] = [simd.fused(b, value, *pair) for pair in zip(weights, totals[row], strict=True)]
        for own, at in zip(totals, places, strict=True):
            for total, place in zip(own, at, strict=True):
                simd.store_at(b, total, place)

    return multiply


@kernel(void, *[int64] * 5)
def read_scales(segment, panel, depth, k, into):
    """Scales and minima of the group of column k, each PANEL float32."""
    at = (panel * read_i64(segment + GROUPS) + (k >> read_i64(segment + GROUP_SHIFT))) * PANEL
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


def _walk(make: Callable[[int, int], Any], step: int) -> Any:
    """A numba function that does what `make` makes to a block: (segment, panel, depth, k, count, scales, x, stride, n,
    out).

    Columns k .. k + count of a panel; k is a multiple of 64, count 64 or what is left. scales: SCALE_BYTES of scratch;
    x, n rows `stride` bytes apart, goes on by a float each column, out by `step` bytes.
    """
    nibbles, fives, sixes, octets, octet = make(4, 32), make(5, 32), make(6, 16), make(8, 32), make(8, 1)

    @kernel(void, *[int64] * 10)
    def walk_bytes(segment, panel, depth, k, count, scales, x, stride, n, out):
        shift, low = read_i64(segment + GROUP_SHIFT), read_i64(segment + LOW)
        end = k + count
        while k < end:
            read_scales(segment, panel, depth, k, scales)
            last = min(end, ((k >> shift) + 1) << shift)
            while k + 32 <= last:
                octets(low + (panel * depth + k) * PANEL, 0, scales, x, stride, n, out)
                k, x, out = k + 32, x + 4 * 32, out + 32 * step
            while k < last:
                octet(low + (panel * depth + k) * PANEL, 0, scales, x, stride, n, out)
                k, x, out = k + 1, x + 4, out + step

    @kernel(void, *[int64] * 10)
    def walk(segment, panel, depth, k, count, scales, x, stride, n, out):
        bits = read_i64(segment + BITS)
        if bits == 8:
            walk_bytes(segment, panel, depth, k, count, scales, x, stride, n, out)
            return
        low, high = read_i64(segment + LOW), read_i64(segment + HIGH)
        columns = 16 if bits == 6 else 32
        for at in range(k, k + count, columns):
            read_scales(segment, panel, depth, at, scales)
            first = panel * depth + at
            if bits == 4:
                nibbles(low + first // 2 * PANEL, 0, scales, x, stride, n, out)
            elif bits == 5:
                fives(low + first // 2 * PANEL, high + first // 8 * PANEL, scales, x, stride, n, out)
            else:
                sixes(low + first // 2 * PANEL, high + first // 4 * PANEL, scales, x, stride, n, out)
            x, out = x + 4 * columns, out + columns * step

    return walk


unpack_block = _walk(_unpacker, PANEL * 4)
MOST_AT_ONCE, FEWER_AT_ONCE = (2, 2) if not WIDE else (4, 4) if simd.compiled_for(*VNNI) else (8, 4)
"""Rows that codes are multiplied with at once: as many sums as there are registers for. (With VNNI rows are whole
numbers, but for a depth that those do not have, and less is to be compiled.)"""
multiply_one, multiply_fewer = (_walk(partial(_multiplier, rows), 0) for rows in (1, FEWER_AT_ONCE))
multiply_most = multiply_fewer
if MOST_AT_ONCE > FEWER_AT_ONCE:
    multiply_most = _walk(partial(_multiplier, MOST_AT_ONCE), 0)
