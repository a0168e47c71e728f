"""Float rows to codes: what `handloom.checkpoint.quantize` means by int8 and int4, to the bit.

The codes of a group, its scale and its zero point are computed as there, one rounding after the other; a group is read
once for its ends, once for each scale that is tried, and once for its codes.

This module does not know threads, or which weights are quantised.
"""

from __future__ import annotations

import math

import numpy as np
from llvmlite import ir

from handloom.checkpoint.quantize import SHRINK
from handloom.ops.cpu import simd
from handloom.ops.cpu.rows import load_as, size_of, store_first_f16
from handloom.ops.cpu.simd import I8, INTS, LANES, VECTOR, Builder, Value, constant, int64, kernel, operation, vector
from handloom.ops.cpu.simd import float32 as scalar

ZERO, HALF, EIGHT, INFINITE = np.float32(0.0), np.float32(0.5), np.float32(8.0), np.float32(math.inf)
FIFTEEN, MIDDLE, LARGEST = np.float32(15.0), np.float32(7.5), np.float32(127.0)
TRIED = len(SHRINK)


@operation(vector)
def shrink(b: Builder) -> Value:
    """The scales that are tried, as parts of the one that clips nothing, in the first lanes"""
    return ir.Constant(VECTOR, [SHRINK[min(i, TRIED - 1)] for i in range(LANES)])


@operation(scalar, vector, int64)
def lane(b: Builder, x: Value, index: Value) -> Value:
    """One lane"""
    return b.extract_element(x, index)


@operation(vector, vector)
def as_half(b: Builder, x: Value) -> Value:
    """Rounded to float16"""
    return b.fpext(b.fptrunc(x, ir.VectorType(ir.HalfType(), LANES)), VECTOR)


@operation(vector, vector)
def inverse(b: Builder, x: Value) -> Value:
    """1 / x, and 0 of 0"""
    zero = constant(0.0)
    return b.select(b.fcmp_ordered("==", x, zero), zero, b.fdiv(constant(1.0), x))


@operation(vector, vector, scalar, scalar)
def nearest(b: Builder, x: Value, low: Value, high: Value) -> Value:
    """The nearest integers, ties to even, within these ends"""
    low, high = simd.splat_of(b, low, VECTOR), simd.splat_of(b, high, VECTOR)
    x = simd.call(b, "llvm.nearbyint.v16f32", VECTOR, x)
    x = b.select(b.fcmp_ordered("<", x, low), low, x)
    return b.select(b.fcmp_ordered(">", x, high), high, x)


@operation(simd.void, int64, vector, int64)
def store_first_bytes(b: Builder, address: Value, x: Value, count: Value) -> None:
    """The first `count` of 16 integers, a byte each.

    Of a count of 1 that is known when it is compiled, LLVM (seen in 20) makes a store of four bytes: use store_byte.
    """
    octets = b.trunc(b.fptosi(x, INTS), ir.VectorType(I8, LANES))
    at = simd.pointer(b, address, octets.type)
    simd.call(
        b, "llvm.masked.store.v16i8.p0", ir.VoidType(), octets, at, simd.I32(1), simd.first_lanes(b, count)
    )  # fmt: skip


@operation(simd.void, int64, scalar)
def store_byte(b: Builder, address: Value, x: Value) -> None:
    """An integer as a byte"""
    simd.store_at(b, b.trunc(b.fptosi(x, simd.I32), I8), address, align=1)


@operation(simd.void, int64, vector)
def store_nibbles(b: Builder, address: Value, x: Value) -> None:
    """16 integers of four bits, two a byte, the first of them below"""
    numbers, half = b.fptosi(x, INTS), ir.VectorType(simd.I32, LANES // 2)
    even, odd = (
        b.shuffle_vector(numbers, numbers, ir.Constant(half, list(range(first, LANES, 2)))) for first in (0, 1)
    )
    both = b.or_(even, b.shl(odd, ir.Constant(half, [4] * (LANES // 2))))
    simd.store_at(b, b.trunc(both, ir.VectorType(I8, LANES // 2)), address, align=1)


@kernel(int64, *[int64] * 6)
def quantize_octets(x, form, count, wide_scale, low, scale_at):
    """A group of any length to int8; whether all its weights and its scale are numbers."""
    size, most, wrong = size_of(form), simd.splat(ZERO), simd.splat(ZERO)
    for k in range(0, count, LANES):
        values = load_as(form, x + k * size, min(LANES, count - k))
        most = simd.larger(most, simd.larger(values, simd.sub(simd.splat(ZERO), values)))
        wrong = simd.add(wrong, simd.mul(values, simd.splat(ZERO)))
    scale = simd.div(simd.splat(simd.max_lanes(most)), simd.splat(LARGEST))
    if wide_scale == 0:
        scale = as_half(scale)
        store_first_f16(scale_at, scale, 1)
    else:
        simd.store_first(scale_at, scale, 1)
    factor = inverse(scale)
    for k in range(0, count, LANES):
        left = min(LANES, count - k)
        codes = nearest(simd.mul(load_as(form, x + k * size, left), factor), -LARGEST, LARGEST)
        store_first_bytes(low + k, codes, left)
    return 1 if lane(scale, 0) + simd.sum_lanes(wrong) < INFINITE else 0


@kernel(scalar, int64, int64, int64, vector, vector)
def error_of(x, form, group, factor, zero):
    """The sum of squares of what rounding changes, in steps: columns 16 apart one after the other, then by halves."""
    total = simd.splat(ZERO)
    for k in range(0, group, LANES):
        places = simd.add(simd.mul(load_as(form, x + k * size_of(form), LANES), factor), zero)
        off = simd.sub(nearest(places, ZERO, FIFTEEN), places)
        total = simd.add(total, simd.mul(off, off))
    return simd.sum_lanes(total)


@kernel(int64, *[int64] * 7)
def quantize_nibbles(x, form, group, symmetric, low, scale_at, minimum_at):
    """A group to four bits; whether there is a scale with a finite error."""
    size, start = size_of(form), simd.splat(-INFINITE if symmetric != 0 else ZERO)
    up, down = start, start  # the highest weight, and the lowest with its sign turned
    for k in range(0, group, LANES):
        values = load_as(form, x + k * size, LANES)
        up = simd.larger(up, values)
        down = simd.larger(down, simd.sub(simd.splat(ZERO), values))
    up, down = simd.splat(simd.max_lanes(up)), simd.splat(simd.max_lanes(down))
    if symmetric != 0:
        end = simd.sub(simd.splat(ZERO), down) if lane(down, 0) >= lane(up, 0) else up
        tried = as_half(simd.mul(simd.div(end, simd.splat(-EIGHT)), shrink()))
        factors, zeros = inverse(tried), simd.splat(EIGHT)
    else:
        tried = as_half(simd.mul(simd.div(simd.add(up, down), simd.splat(FIFTEEN)), shrink()))
        factors = inverse(tried)
        middle = simd.mul(simd.mul(simd.sub(up, down), simd.splat(HALF)), factors)
        zeros = nearest(simd.sub(simd.splat(MIDDLE), middle), ZERO, FIFTEEN)
    best, least = 0, INFINITE
    for i in range(TRIED):
        scale = lane(tried, i)
        steps = error_of(x, form, group, simd.splat(lane(factors, i)), simd.splat(lane(zeros, i)))
        error = steps * (scale * scale)
        if error < least:
            best, least = i, error
    factor, zero = simd.splat(lane(factors, best)), simd.splat(lane(zeros, best))
    for k in range(0, group, LANES):
        places = simd.add(simd.mul(load_as(form, x + k * size, LANES), factor), zero)
        store_nibbles(low + k // 2, nearest(places, ZERO, FIFTEEN))
    store_first_f16(scale_at, simd.splat(lane(tried, best)), 1)
    if symmetric == 0:
        store_byte(minimum_at, lane(zeros, best))
    return 1 if least < INFINITE else 0
