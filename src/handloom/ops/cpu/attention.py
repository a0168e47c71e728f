"""Causal attention over paged keys and values, the same for one query and for a prompt.

An item is a block of queries of one sequence, with all heads that share a KV head. Keys come in blocks that begin at
multiples of KEYS, whatever the query; each block is brought into float32, keys turned to columns, and takes part in an
online softmax (Milakov & Gimelshein 2018) in rising order. A block that a query does not see changes none of its bits,
so a query gets the same result alone, in a chunk and in a whole prompt.

This module does not know threads, or who owns a page.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba.core.types import UniTuple  # type: ignore[attr-defined]

from handloom.ops.cpu import simd
from handloom.ops.cpu.elementary import exp, tanh
from handloom.ops.cpu.linear import product_f32
from handloom.ops.cpu.rows import ZERO, size_of, widen_row
from handloom.ops.cpu.simd import LANES, Builder, Value, float32, float64, int64, kernel, operation, void
from handloom.ops.cpu.tiles import PANEL

KEYS = 64
QUERY_ROWS = 64  # queries times heads of a group that an item has at most (a group larger than that is one query)
position = UniTuple(int64, 2)
MINUS_INFINITY = np.float32(-np.inf)


@operation(void, *[int64] * 4)
def transpose(b: Builder, source: Value, source_stride: Value, target: Value, target_stride: Value) -> None:
    """16 x 16 float32, rows to columns; strides in bytes"""
    rows = []
    for _ in range(LANES):
        rows.append(simd.load_at(b, source, simd.VECTOR, 4))
        source = b.add(source, source_stride)
    width = 1
    while width < LANES:  # exchange blocks of `width` across the diagonal
        low = [i if not i & width else i - width + LANES for i in range(LANES)]
        high = [i + width if not i & width else i + LANES for i in range(LANES)]
        turned = list(rows)
        for i in range(LANES):
            if not i & width:
                pair = rows[i], rows[i + width]
                turned[i], turned[i + width] = (
                    b.shuffle_vector(*pair, ir.Constant(simd.INTS, order)) for order in (low, high)
                )
        rows, width = turned, 2 * width
    for row in rows:
        simd.store_at(b, row, target)
        target = b.add(target, target_stride)


@kernel(int64, int64)
def padded(width):
    """A head's columns in scratch: whole panels."""
    return (width + PANEL - 1) // PANEL * PANEL


@kernel(int64, int64)
def queries_of(group):
    """How many queries an item has."""
    return max(1, QUERY_ROWS // group)


@kernel(int64, *[int64] * 4)
def attention_items(cu_seqlens, num_sequences, num_kv_heads, group):
    """How many items there are."""
    blocks, per = 0, queries_of(group)
    for s in range(num_sequences):
        count = simd.read_i64(cu_seqlens + 8 * (s + 1)) - simd.read_i64(cu_seqlens + 8 * s)
        blocks += (count + per - 1) // per
    return blocks * num_kv_heads


@kernel(void, *[int64] * 10)
def gather(pages, form, stride, page_size, table, first, last, width, out, out_width):
    """Rows `first`..`last` of a sequence's pages as float32 [KEYS, out_width], zeros elsewhere."""
    for i in range(KEYS):
        at = first + i
        if at < last:
            slot = simd.read_i64(table + 8 * (at // page_size)) * page_size + at % page_size
            widen_row(pages + slot * stride, width, form, out + 4 * i * out_width, out_width)
        else:
            for j in range(0, out_width, LANES):
                simd.store(out + 4 * (i * out_width + j), simd.splat(ZERO))


@kernel(float32, int64, int64, int64, float64, float64)
def score_row(scores, low, high, scale, softcap):
    """Scale (and cap) one row of KEYS scores; outside low..high they become -inf. Returns the largest."""
    largest = simd.splat(MINUS_INFINITY)
    factor, cap = simd.splat(np.float32(scale)), simd.splat(np.float32(softcap))
    for j in range(0, KEYS, LANES):
        value = simd.mul(simd.load(scores + 4 * j), factor)
        if softcap != 0.0:
            value = simd.mul(cap, tanh(simd.div(value, cap)))
        value = simd.keep_first(value, high - j, simd.splat(MINUS_INFINITY))
        value = simd.keep_first(simd.splat(MINUS_INFINITY), low - j, value)
        simd.store(scores + 4 * j, value)
        largest = simd.larger(largest, value)
    return simd.max_lanes(largest)


@kernel(void, int64, int64, int64, float64, float64, *[int64] * 4)
def softmax_row(scores, low, high, scale, softcap, state, total, out, width):
    """Turn one row of scores into weights, relative to the largest score so far, and scale what was summed before.

    state: that score; total: 16 partial sums of weights; out: `width` sums of weighted values.
    """
    before = simd.read_f32(state)
    largest = score_row(scores, low, high, scale, softcap)
    now = before if before > largest else largest
    simd.write_f32(state, now)
    base = simd.splat(ZERO if now == MINUS_INFINITY else now)
    fading = exp(simd.sub(simd.splat(before), base))
    weights = simd.mul(simd.load(total), fading)
    for j in range(0, KEYS, LANES):
        value = exp(simd.sub(simd.load(scores + 4 * j), base))
        simd.store(scores + 4 * j, value)
        weights = simd.add(weights, value)
    simd.store(total, weights)
    for j in range(0, width, LANES):
        simd.store(out + 4 * j, simd.mul(simd.load(out + 4 * j), fading))


@kernel(position, *[int64] * 4)
def locate(item, cu_seqlens, num_sequences, per):
    """(sequence, first query within it) of a block of queries."""
    for s in range(num_sequences):
        count = simd.read_i64(cu_seqlens + 8 * (s + 1)) - simd.read_i64(cu_seqlens + 8 * s)
        blocks = (count + per - 1) // per
        if item < blocks:
            return s, item * per
        item -= blocks
    return num_sequences, 0


@kernel(void, *[int64] * 16, float64, int64, float64, int64, int64, int64)
def attention_item(
    item, q, q_stride, num_heads, num_kv_heads, head_dim, v_head_dim, k_pages, v_pages, form, page_size, page_table,
    max_pages, cu_seqlens, context_lens, num_sequences, scale, window, softcap, out, out_stride, scratch,
):  # fmt: skip
    """Attention of one item's queries; window 0, softcap 0.0: none."""
    group = num_heads // num_kv_heads
    kv_head, per = item % num_kv_heads, queries_of(group)
    s, first = locate(item // num_kv_heads, cu_seqlens, num_sequences, per)
    start, length = simd.read_i64(cu_seqlens + 8 * s), simd.read_i64(context_lens + 8 * s)
    new = simd.read_i64(cu_seqlens + 8 * (s + 1)) - start
    count = min(per, new - first)
    position = length - new + first  # of the first query
    table = page_table + 8 * s * max_pages
    k_stride = num_kv_heads * head_dim * size_of(form)
    v_stride = num_kv_heads * v_head_dim * size_of(form)
    k_pages = k_pages + kv_head * head_dim * size_of(form)
    v_pages = v_pages + kv_head * v_head_dim * size_of(form)

    rows, d, dv = count * group, padded(head_dim), padded(v_head_dim)
    queries = scratch
    sums = queries + 4 * rows * d
    scores = sums + 4 * rows * dv
    totals = scores + 4 * rows * KEYS
    states = totals + 4 * rows * LANES
    keys = states + 4 * rows * LANES
    columns = keys + 4 * KEYS * d
    values = columns + 4 * KEYS * d
    for row in range(rows):
        head = kv_head * group + row % group
        source = q + (start + first + row // group) * q_stride + 4 * head * head_dim
        widen_row(source, head_dim, 0, queries + 4 * row * d, d)
        for j in range(0, dv, LANES):
            simd.store(sums + 4 * (row * dv + j), simd.splat(ZERO))
        simd.store(totals + 4 * row * LANES, simd.splat(ZERO))
        simd.write_f32(states + 4 * row, MINUS_INFINITY)

    oldest = max(0, position - window + 1) if window > 0 else 0
    end = position + count
    for base in range(oldest // KEYS * KEYS, end, KEYS):
        gather(k_pages, form, k_stride, page_size, table, base, end, head_dim, keys, d)
        gather(v_pages, form, v_stride, page_size, table, base, end, v_head_dim, values, dv)
        for i in range(0, KEYS, LANES):
            for j in range(0, d, LANES):
                transpose(keys + 4 * (i * d + j), 4 * d, columns + 4 * (j * KEYS + i), 4 * KEYS)
        for j in range(0, KEYS, PANEL):
            product_f32(queries, 4 * d, rows, columns + 4 * j, 4 * KEYS, head_dim, scores + 4 * j, 4 * KEYS, 0)
        for row in range(rows):
            at = position + row // group - base
            low = at - window + 1 if window > 0 else 0
            softmax_row(
                scores + 4 * row * KEYS, low, at + 1, scale, softcap, states + 4 * row, totals + 4 * row * LANES,
                sums + 4 * row * dv, dv,
            )  # fmt: skip
        for j in range(0, dv, PANEL):
            product_f32(scores, 4 * KEYS, rows, values + 4 * j, 4 * dv, KEYS, sums + 4 * j, 4 * dv, 1)

    for row in range(rows):
        head = kv_head * group + row % group
        target = out + (start + first + row // group) * out_stride + 4 * head * v_head_dim
        total = simd.splat(simd.sum_lanes(simd.load(totals + 4 * row * LANES)))
        for j in range(0, v_head_dim, LANES):
            simd.store_first(target + 4 * j, simd.div(simd.load(sums + 4 * (row * dv + j)), total), v_head_dim - j)
