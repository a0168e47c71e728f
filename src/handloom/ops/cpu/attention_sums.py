"""What attention keeps of a row, a head of a query: records of sums, and the weights of one split of the keys.

A record is `v_head_dim` weighted values, LANES partial sums of weights, and the largest score in powers of two, each in
whole vectors.

This module does not know pages, items or threads.
"""

from __future__ import annotations

import math

import numpy as np

from handloom.ops.cpu import simd
from handloom.ops.cpu.codes import ZERO
from handloom.ops.cpu.elementary import exp2, tanh
from handloom.ops.cpu.instructions import KEYS
from handloom.ops.cpu.simd import LANES, float64, int64, kernel, void
from handloom.ops.panels import PANEL

LOG2_E = 1 / math.log(2)
MINUS_INFINITY, ONE = np.float32(-np.inf), np.float32(1)


@kernel(int64, int64)
def padded(width):
    """A head's columns in scratch: whole panels."""
    return (width + PANEL - 1) // PANEL * PANEL


@kernel(int64, int64)
def record_of(v_head_dim):
    """Bytes of a record of sums."""
    return 4 * (padded(v_head_dim) + 2 * LANES)


@kernel(void, int64, int64)
def clear(record, size):
    """Sums of nothing."""
    for j in range(0, size, 4 * LANES):
        simd.store(record + j, simd.splat(ZERO))
    simd.write_f32(record + size - 4 * LANES, MINUS_INFINITY)


@kernel(void, *[int64] * 4)
def begin(record, size, sinks, head):
    """Sums before the first key; a sink is one more score, which has no value (address 0: there are none)."""
    clear(record, size)
    if sinks != 0 and simd.read_f32(sinks + 4 * head) > MINUS_INFINITY:
        simd.write_f32(record + size - 4 * LANES, np.float32(simd.read_f32(sinks + 4 * head) * LOG2_E))
        simd.write_f32(record + size - 8 * LANES, ONE)


@kernel(void, *[int64] * 3)
def fold(into, part, size):
    """Add a record of sums over later keys; one of no keys changes nothing."""
    before, theirs = simd.read_f32(into + size - 4 * LANES), simd.read_f32(part + size - 4 * LANES)
    if theirs == MINUS_INFINITY:
        return
    now = before if before > theirs else theirs
    simd.write_f32(into + size - 4 * LANES, now)
    ours, other = exp2(simd.splat(before - now)), exp2(simd.splat(theirs - now))
    for j in range(0, size - 4 * LANES, 4 * LANES):
        simd.store(into + j, simd.fma(simd.load(part + j), other, simd.mul(simd.load(into + j), ours)))


@kernel(void, *[int64] * 4)
def write_mean(record, size, width, target):
    """Weighted values over the sum of weights."""
    total = simd.splat(simd.sum_lanes(simd.load(record + size - 8 * LANES)))
    for j in range(0, width, LANES):
        simd.store_first(target + 4 * j, simd.div(simd.load(record + 4 * j), total), width - j)


@kernel(void, *[int64] * 4, float64, float64, int64)
def bend_row(scores, first, last, at, scale, softcap, slope):
    """Scores first..last of a row: scaled, capped, and with the bias of ALiBi; at: the query's place among the keys."""
    factor, cap = simd.splat(np.float32(scale)), simd.splat(np.float32(softcap))
    steepness = simd.splat(simd.read_f32(slope) if slope != 0 else ZERO)
    for j in range(first, last, LANES):
        value = simd.mul(simd.load(scores + 4 * j), factor)
        if softcap != 0.0:
            value = simd.mul(cap, tanh(simd.div(value, cap)))
        if slope != 0:
            value = simd.fma(steepness, simd.add(simd.lanes(), simd.splat(np.float32(j - at))), value)
        simd.store(scores + 4 * j, value)


@kernel(void, *[int64] * 5, float64, int64, int64)
def weigh_row(scores, first, last, low, high, factor, record, size):
    """Turn scores first..last of a row into weights, zeros outside low..high, and begin its record with their sum.

    A weight is 2^(factor * (score - the largest)).
    """
    for j in range(first, min(last, low), LANES):
        simd.store(scores + 4 * j, simd.keep_first(simd.splat(MINUS_INFINITY), low - j, simd.load(scores + 4 * j)))
    for j in range(max(first, high // LANES * LANES), last, LANES):
        simd.store(scores + 4 * j, simd.keep_first(simd.load(scores + 4 * j), high - j, simd.splat(MINUS_INFINITY)))
    largest = simd.splat(MINUS_INFINITY)
    for j in range(first, last, LANES):
        largest = simd.larger(largest, simd.load(scores + 4 * j))
    scale = np.float32(factor)
    now = np.float32(simd.max_lanes(largest) * scale)
    base = simd.splat(ZERO if now == MINUS_INFINITY else -now)
    total, rate = simd.splat(ZERO), simd.splat(scale)
    for j in range(first, last, LANES):
        weight = exp2(simd.fma(simd.load(scores + 4 * j), rate, base))
        simd.store(scores + 4 * j, weight)
        total = simd.add(total, weight)
    clear(record, size)
    simd.store(record + size - 8 * LANES, total)
    simd.write_f32(record + size - 4 * LANES, now)


@kernel(void, *[int64] * 4, float64, int64, float64, *[int64] * 8)
def weigh(first, end, rows, group, scale, window, softcap, slopes, position, row, scores, base, parts, size, stride):
    """Weights of `rows` rows from number `row` on for keys first..end.

    base: the split's first key; position: of the query of row 0; stride: bytes from a row of scores to the next.
    """
    last = (end - base + KEYS - 1) // KEYS * KEYS
    for i in range(rows):
        at, own = position + (row + i) // group - base, scores + i * stride
        factor = scale * LOG2_E
        if softcap != 0.0 or slopes != 0:
            slope = slopes + 4 * ((row + i) % group) if slopes != 0 else 0
            bend_row(own, first - base, last, at, scale, softcap, slope)
            factor = LOG2_E
        low = at - window + 1 if window > 0 else 0
        weigh_row(own, first - base, last, low, at + 1, factor, parts + i * size, size)
