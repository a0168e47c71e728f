"""Scores with Gumbel noise added, near enough to say which few tokens a draw can fall on.

The random words are Philox-4x32-10's, all their bits right; the noise made of them is within a hundred-thousandth of
what `handloom.sampling.rng` defines, whose logarithms are torch's own.

This module does not know seeds, requests, or what is drawn.
"""

from __future__ import annotations

import math

import numpy as np
from llvmlite import ir

from handloom.ops.cpu import simd
from handloom.ops.cpu.elementary import polynomial
from handloom.ops.cpu.simd import (  # fmt: skip
    I32,
    INTS,
    LANES,
    VECTOR,
    Builder,
    Value,
    constant,
    fused,
    int64,
    kernel,
    operation,
    vector,
    void,
)

MULTIPLIER_A, MULTIPLIER_B = 0xD2511F53, 0xCD9E8D57
WEYL_A, WEYL_B = 0x9E3779B9, 0xBB67AE85
LARGEST_UNIFORM = 1 - 2**-24
LOG1P = (
    0.99999994, -0.500003636, 0.333350599, -0.249699086, 0.199001640, -0.172508270, 0.162225872, -0.101069108,
)  # fmt: skip
"""log(1 + t) / t for 1 + t in [sqrt(1/2), sqrt(2)), to 2e-7."""
ROOT_OF_HALF = 0x3F3504F3  # its bits
KEY_BYTES = 24  # of a row: low word, high word and position, each an int64
COLUMNS_PER_ITEM = 4096

NOTHING = np.float32(-math.inf)

PAIRS = ir.VectorType(simd.I64, LANES // 2)


def _each(number: int) -> Value:
    return ir.Constant(INTS, [number] * LANES)


def _product(b: Builder, words: Value, multiplier: int) -> tuple[Value, Value]:
    """The upper and the lower words of the products, made of two words at a time."""
    pairs, factor = b.bitcast(words, PAIRS), ir.Constant(PAIRS, [multiplier] * (LANES // 2))
    upper, lower, half = (ir.Constant(PAIRS, [value] * (LANES // 2)) for value in (2**64 - 2**32, 2**32 - 1, 32))
    even, odd = b.mul(b.and_(pairs, lower), factor), b.mul(b.lshr(pairs, half), factor)
    high = b.or_(b.lshr(even, half), b.and_(odd, upper))
    low = b.or_(b.and_(even, lower), b.shl(odd, half))
    return b.bitcast(high, INTS), b.bitcast(low, INTS)


def _first_word(b: Builder, token_ids: Value, position: Value, low: Value, high: Value) -> Value:
    """Word 0 of Philox-4x32-10 of the counter (token id, position, 0, 0)."""
    c0, c1, c2, c3 = token_ids, position, _each(0), _each(0)
    for number in range(10):
        k0, k1 = b.add(low, _each(number * WEYL_A % 2**32)), b.add(high, _each(number * WEYL_B % 2**32))
        (high_a, low_a), (high_b, low_b) = _product(b, c0, MULTIPLIER_A), _product(b, c2, MULTIPLIER_B)
        c0, c1, c2, c3 = b.xor(b.xor(high_b, c1), k0), low_b, b.xor(b.xor(high_a, c3), k1), low_a
    return c0


def _log(b: Builder, x: Value) -> Value:
    """Of positive normal numbers."""
    shifted = b.sub(b.bitcast(x, INTS), _each(ROOT_OF_HALF))
    exponent = b.ashr(shifted, _each(23))
    mantissa = b.sub(b.bitcast(x, INTS), b.shl(exponent, _each(23)))
    t = b.fsub(b.bitcast(mantissa, VECTOR), constant(1.0))
    return fused(b, b.sitofp(exponent, VECTOR), constant(math.log(2)), b.fmul(t, polynomial(b, t, LOG1P)))


def _noise(b: Builder, words: Value) -> Value:
    """-log(-log(1 - u)); with w = 1 - u as rounded, log(1 - u) is log(w) u / (1 - w), or -u where w is 1."""
    u = b.fmul(b.fadd(b.uitofp(words, VECTOR), constant(0.5)), constant(2.0**-32))
    u = b.select(b.fcmp_ordered("<", u, constant(LARGEST_UNIFORM)), u, constant(LARGEST_UNIFORM))
    w = b.fsub(constant(1.0), u)
    is_one = b.fcmp_ordered("==", w, constant(1.0))
    rest = b.select(is_one, constant(1.0), b.fsub(constant(1.0), w))
    exponential = b.select(is_one, u, b.fmul(b.fneg(_log(b, w)), b.fdiv(u, rest)))
    return b.fneg(_log(b, exponential))


@operation(vector, *[int64] * 4)
def noise(b: Builder, first: Value, position: Value, low: Value, high: Value) -> Value:
    """Of 16 tokens, the first of which is named"""
    token, place, low, high = (simd.splat_of(b, b.trunc(value, I32), INTS) for value in (first, position, low, high))
    token = b.add(token, ir.Constant(INTS, list(range(LANES))))
    return _noise(b, _first_word(b, token, place, low, high))


@kernel(void, *[int64] * 6)
def add_noise(scores, first, last, floor, key, out):
    """Columns first..last of a row's scores with their noise; -inf for those of 16 tokens that are all below floor."""
    least = simd.read_f32(floor)
    low, high, position = simd.read_i64(key), simd.read_i64(key + 8), simd.read_i64(key + 16)
    for i in range(first, last, LANES):
        count = last - i
        value = simd.keep_first(simd.load_first(scores + 4 * i, count), count, simd.splat(NOTHING))
        if simd.max_lanes(value) >= least:
            simd.store_first(out + 4 * i, simd.add(value, noise(i, position, low, high)), count)
        else:
            simd.store_first(out + 4 * i, simd.splat(NOTHING), count)


@kernel(int64, int64)
def noise_items(width):
    """Items of a row."""
    return (width + COLUMNS_PER_ITEM - 1) // COLUMNS_PER_ITEM


@kernel(void, *[int64] * 8)
def noise_item(item, scores, stride, width, floors, keys, out, out_stride):
    """Some columns of a row; strides in bytes."""
    row, first = item // noise_items(width), item % noise_items(width) * COLUMNS_PER_ITEM
    last = min(width, first + COLUMNS_PER_ITEM)
    add_noise(
        scores + row * stride, first, last, floors + 4 * row, keys + KEY_BYTES * row, out + row * out_stride
    )  # fmt: skip
