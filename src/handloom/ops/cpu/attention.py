"""Causal attention over paged keys and values, the same for one query and for a prompt.

Keys are taken in splits of SPLIT, and a split in blocks of KEYS, both from position 0 on, whatever the query. The
blocks of a split take part in an online softmax (Milakov & Gimelshein 2018) in rising order; the sums of splits are
then added in rising order, relative to the largest score so far, as in Flash-Decoding (Dao et al. 2023). What a query
does not see changes none of its bits, so it gets the same result alone, in a chunk and in a whole prompt.

An item is a block of queries of one sequence, with all heads that share a KV head. Where a sequence has but one block
of queries, each split is an item of its own: its sums are kept, and `combine_item` adds them, as the item of several
splits does. A record of sums is, for a query's head, `v_head_dim` weighted values, LANES partial sums of weights, and
the largest score, each in whole vectors.

This module does not know threads, or who owns a page.
"""

from __future__ import annotations

import numpy as np
from numba.core.types import UniTuple  # type: ignore[attr-defined]

from handloom.ops.cpu import simd
from handloom.ops.cpu.codes import ZERO
from handloom.ops.cpu.elementary import exp, tanh
from handloom.ops.cpu.instructions import KEYS, QUERY_ROWS, SPLIT
from handloom.ops.cpu.linear import product_f32
from handloom.ops.cpu.pages import ask_for_block, gather, places_of, turn_block
from handloom.ops.cpu.rows import size_of, widen_row
from handloom.ops.cpu.simd import LANES, float32, float64, int64, kernel, void
from handloom.ops.cpu.tiles import FORMAT_BF16, FORMAT_F32, FORMATS, VECTORS, WIDE, scattered_tile_of
from handloom.ops.panels import PANEL

FEW = 16  # queries times heads of a group, for which values are read where they lie
AT_ONCE = 4 if WIDE else 2
position = UniTuple(int64, 3)
MINUS_INFINITY = np.float32(-np.inf)

few_f32, few_bf16, few_f16 = (scattered_tile_of(AT_ONCE, VECTORS, form) for form in FORMATS)


@kernel(int64, int64)
def padded(width):
    """A head's columns in scratch: whole panels."""
    return (width + PANEL - 1) // PANEL * PANEL


@kernel(int64, int64)
def record_of(v_head_dim):
    """Bytes of a record of sums."""
    return 4 * (padded(v_head_dim) + 2 * LANES)


@kernel(int64, int64)
def queries_of(group):
    """How many queries an item has."""
    return max(1, QUERY_ROWS // group)


# Items ------------------------------------------------------------------------------------------


@kernel(int64, int64, int64)
def oldest_of(position, window):
    """The first position that a query sees."""
    return max(0, position - window + 1) if window > 0 else 0


@kernel(int64, *[int64] * 4)
def splits_of(cu_seqlens, context_lens, s, window):
    """How many splits a sequence's queries see."""
    new = simd.read_i64(cu_seqlens + 8 * (s + 1)) - simd.read_i64(cu_seqlens + 8 * s)
    length = simd.read_i64(context_lens + 8 * s)
    return (length - 1) // SPLIT - oldest_of(length - new, window) // SPLIT + 1


@kernel(int64, *[int64] * 5)
def pieces_of(cu_seqlens, context_lens, s, per, window):
    """How many items a sequence has for each KV head: blocks of queries, or the splits of one block."""
    new = simd.read_i64(cu_seqlens + 8 * (s + 1)) - simd.read_i64(cu_seqlens + 8 * s)
    return splits_of(cu_seqlens, context_lens, s, window) if 0 < new <= per else (new + per - 1) // per


@kernel(int64, *[int64] * 5)
def apart(cu_seqlens, context_lens, s, per, window):
    """Of how many records a sequence keeps each head's sums: splits times queries; 0 where an item has all splits."""
    new = simd.read_i64(cu_seqlens + 8 * (s + 1)) - simd.read_i64(cu_seqlens + 8 * s)
    splits = splits_of(cu_seqlens, context_lens, s, window) if 0 < new <= per else 1
    return splits * new if splits > 1 else 0


@kernel(int64, *[int64] * 6)
def attention_items(cu_seqlens, context_lens, num_sequences, num_kv_heads, group, window):
    """How many items there are."""
    pieces = 0
    for s in range(num_sequences):
        pieces += pieces_of(cu_seqlens, context_lens, s, queries_of(group), window)
    return pieces * num_kv_heads


@kernel(int64, *[int64] * 6)
def combine_items(cu_seqlens, context_lens, num_sequences, num_kv_heads, group, window):
    """How many sequences and KV heads have sums to add."""
    count = 0
    for s in range(num_sequences):
        count += 1 if apart(cu_seqlens, context_lens, s, queries_of(group), window) > 0 else 0
    return count * num_kv_heads


@kernel(position, *[int64] * 7)
def locate(item, cu_seqlens, context_lens, num_sequences, per, window, combining):
    """(sequence, piece, records before those of the sequence) of an item without its head; combining: of the sequences
    that have sums to add."""
    before = 0
    for s in range(num_sequences):
        records = apart(cu_seqlens, context_lens, s, per, window)
        pieces = pieces_of(cu_seqlens, context_lens, s, per, window)
        if combining:
            pieces = 1 if records > 0 else 0
        if item < pieces:
            return s, item, before
        item -= pieces
        before += records
    return num_sequences, 0, 0


# Sums -------------------------------------------------------------------------------------------


@kernel(void, *[int64] * 3)
def clear(records, count, size):
    """Sums of nothing."""
    for row in range(count):
        at = records + row * size
        for j in range(0, size, 4 * LANES):
            simd.store(at + j, simd.splat(ZERO))
        simd.write_f32(at + size - 4 * LANES, MINUS_INFINITY)


@kernel(void, *[int64] * 3)
def fold(into, part, size):
    """Add a record of sums over later keys; one of no keys changes nothing."""
    before, theirs = simd.read_f32(into + size - 4 * LANES), simd.read_f32(part + size - 4 * LANES)
    if theirs == MINUS_INFINITY:
        return
    now = before if before > theirs else theirs
    simd.write_f32(into + size - 4 * LANES, now)
    ours, other = exp(simd.splat(before - now)), exp(simd.splat(theirs - now))
    for j in range(0, size - 4 * LANES, 4 * LANES):
        simd.store(into + j, simd.fma(simd.load(part + j), other, simd.mul(simd.load(into + j), ours)))


@kernel(void, *[int64] * 4)
def write_mean(record, size, width, target):
    """Weighted values over the sum of weights."""
    total = simd.splat(simd.sum_lanes(simd.load(record + size - 8 * LANES)))
    for j in range(0, width, LANES):
        simd.store_first(target + 4 * j, simd.div(simd.load(record + 4 * j), total), width - j)


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


@kernel(void, int64, int64, int64, float64, float64, int64, int64)
def softmax_row(scores, low, high, scale, softcap, record, size):
    """Turn one row of scores into weights, relative to the largest score so far, and scale what was summed before."""
    total, state = record + size - 8 * LANES, record + size - 4 * LANES
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
    for j in range(0, size - 8 * LANES, 4 * LANES):
        simd.store(record + j, simd.mul(simd.load(record + j), fading))


@kernel(void, *[int64] * 11)
def multiply_few(form, x, x_stride, rows, pieces, offset, w_stride, k, out, out_stride, accumulate):
    """x [rows, k] times PANEL columns of a format whose rows lie in pieces, into out [rows, PANEL]."""
    while rows > 0:
        n = min(rows, AT_ONCE)
        if form == FORMAT_F32:
            few_f32(x, x_stride, n, pieces, offset, w_stride, k, out, out_stride, accumulate)
        elif form == FORMAT_BF16:
            few_bf16(x, x_stride, n, pieces, offset, w_stride, k, out, out_stride, accumulate)
        else:
            few_f16(x, x_stride, n, pieces, offset, w_stride, k, out, out_stride, accumulate)
        x, out, rows = x + n * x_stride, out + n * out_stride, rows - n


@kernel(void, *[int64] * 15, float64, int64, float64, *[int64] * 3)
def attend(
    first, end, rows, group, position, head_dim, v_head_dim, k_pages, v_pages, form, k_stride, v_stride, page_size,
    table, queries, scale, window, softcap, records, size, scratch,
):  # fmt: skip
    """Add keys first..end to the records of `rows` queries' heads; position: of the first query."""
    d, dv = padded(head_dim), padded(v_head_dim)
    scores = scratch
    columns = scores + 4 * rows * KEYS
    values = columns + 4 * KEYS * d
    copied = values + 4 * KEYS * dv
    pieces = copied + 4 * LANES * d
    column_pieces = pieces + 8 * (KEYS // LANES)
    for j in range(0, head_dim, LANES):
        simd.write_i64(column_pieces + j // LANES * 8, columns + 4 * j * KEYS)
    for base in range(first // KEYS * KEYS, end, KEYS):
        count = min(KEYS, end - base)
        if rows <= FEW:
            ask_for_block(v_pages, v_stride, page_size, table, base, end, v_head_dim * size_of(form))
            ask_for_block(k_pages, k_stride, page_size, table, base + KEYS, end, head_dim * size_of(form))
        turn_block(k_pages, form, k_stride, page_size, table, base, end, head_dim, d, copied, columns)
        for j in range(0, count, PANEL):
            x, w, out = queries, columns + 4 * j, scores + 4 * j
            if rows <= FEW:
                multiply_few(FORMAT_F32, x, 4 * d, rows, column_pieces, 4 * j, 4 * KEYS, head_dim, out, 4 * KEYS, 0)
            else:
                product_f32(x, 4 * d, rows, w, 4 * KEYS, head_dim, out, 4 * KEYS, 0)
        for row in range(rows):
            at = position + row // group - base
            low = at - window + 1 if window > 0 else 0
            softmax_row(scores + 4 * row * KEYS, low, at + 1, scale, softcap, records + row * size, size)
        if rows <= FEW and places_of(v_pages, v_stride, page_size, table, base, end, v_head_dim, pieces) != 0:
            for j in range(0, dv, PANEL):
                at, out = size_of(form) * j, records + 4 * j
                multiply_few(form, scores, 4 * KEYS, rows, pieces, at, v_stride, count, out, size, 1)
        else:
            gather(v_pages, form, v_stride, page_size, table, base, end, KEYS, v_head_dim, values, dv)
            for j in range(0, dv, PANEL):
                product_f32(scores, 4 * KEYS, rows, values + 4 * j, 4 * dv, KEYS, records + 4 * j, size, 1)


# What items do ----------------------------------------------------------------------------------


@kernel(void, *[int64] * 16, float64, int64, float64, *[int64] * 4)
def attention_item(
    item, q, q_stride, num_heads, num_kv_heads, head_dim, v_head_dim, k_pages, v_pages, form, page_size, page_table,
    max_pages, cu_seqlens, context_lens, num_sequences, scale, window, softcap, out, out_stride, kept, scratch,
):  # fmt: skip
    """Attention of one item's queries; window 0, softcap 0.0: none; kept: records of sums that are yet to be added."""
    group = num_heads // num_kv_heads
    kv_head, per = item % num_kv_heads, queries_of(group)
    s, piece, before = locate(item // num_kv_heads, cu_seqlens, context_lens, num_sequences, per, window, 0)
    start, length = simd.read_i64(cu_seqlens + 8 * s), simd.read_i64(context_lens + 8 * s)
    new = simd.read_i64(cu_seqlens + 8 * (s + 1)) - start
    first = piece * per if new > per else 0
    count = min(per, new - first)
    position = length - new + first  # of the first query
    oldest, end = oldest_of(position, window), position + count
    table = page_table + 8 * s * max_pages
    k_stride = num_kv_heads * head_dim * size_of(form)
    v_stride = num_kv_heads * v_head_dim * size_of(form)
    k_pages = k_pages + kv_head * head_dim * size_of(form)
    v_pages = v_pages + kv_head * v_head_dim * size_of(form)

    rows, d, size = count * group, padded(head_dim), record_of(v_head_dim)
    queries = scratch
    records = queries + 4 * rows * d
    parts = records + rows * size
    scratch = parts + rows * size
    for row in range(rows):
        head = kv_head * group + row % group
        source = q + (start + first + row // group) * q_stride + 4 * head * head_dim
        widen_row(source, head_dim, 0, queries + 4 * row * d, d)
    lowest, highest = oldest // SPLIT, (end - 1) // SPLIT
    alone = new <= per and highest > lowest
    if alone:
        parts = kept + (before * num_heads + (piece * num_kv_heads + kv_head) * rows) * size
        lowest, highest = lowest + piece, lowest + piece
    clear(records, rows, size)
    for split in range(lowest, highest + 1):
        clear(parts, rows, size)
        attend(
            max(oldest, split * SPLIT), min(end, (split + 1) * SPLIT), rows, group, position, head_dim, v_head_dim,
            k_pages, v_pages, form, k_stride, v_stride, page_size, table, queries, scale, window, softcap, parts, size,
            scratch,
        )  # fmt: skip
        if not alone:
            for row in range(rows):
                fold(records + row * size, parts + row * size, size)
    if not alone:
        for row in range(rows):
            head = kv_head * group + row % group
            target = out + (start + first + row // group) * out_stride + 4 * head * v_head_dim
            write_mean(records + row * size, size, v_head_dim, target)


@kernel(void, *[int64] * 12)
def combine_item(
    item, num_heads, num_kv_heads, v_head_dim, cu_seqlens, context_lens, num_sequences, window, out, out_stride, kept,
    scratch,
):  # fmt: skip
    """Add the sums that a sequence's items kept for one KV head."""
    group = num_heads // num_kv_heads
    kv_head, per, size = item % num_kv_heads, queries_of(group), record_of(v_head_dim)
    s, _, before = locate(item // num_kv_heads, cu_seqlens, context_lens, num_sequences, per, window, 1)
    start = simd.read_i64(cu_seqlens + 8 * s)
    rows = (simd.read_i64(cu_seqlens + 8 * (s + 1)) - start) * group
    for row in range(rows):
        clear(scratch, 1, size)
        for split in range(splits_of(cu_seqlens, context_lens, s, window)):
            at = before * num_heads + (split * num_kv_heads + kv_head) * rows + row
            fold(scratch, kept + at * size, size)
        target = out + (start + row // group) * out_stride + 4 * (kv_head * group + row % group) * v_head_dim
        write_mean(scratch, size, v_head_dim, target)
