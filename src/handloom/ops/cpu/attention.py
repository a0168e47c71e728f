"""Causal attention over paged keys and values, the same for one query and for a prompt.

Keys are taken in splits of SPLIT from position 0 on, whatever the query. Of a split a query's head has all scores, then
weights relative to the largest of them, then the sum of weighted values in blocks of KEYS; the sums of splits are added
in rising order, relative to the largest score so far, as in Flash-Decoding (Dao et al. 2023). What a query does not see
changes none of its bits, so it gets the same result alone, in a chunk and in a whole prompt.

An item is a block of queries of one sequence, with all heads that share a KV head. Where a sequence has few queries,
each split is an item of its own: its sums are kept, and `combine_item` adds them, as the item of several splits does.

A row is a head of a query. Few rows read keys and values once, as they lie; for many, the keys of a split are turned to
columns and its values copied once for all rows of the item, and CHUNK rows at a time go through them in a near cache.

This module does not know threads, or who owns a page.
"""

from __future__ import annotations

from numba.core.types import UniTuple  # type: ignore[attr-defined]

from handloom.ops.cpu import simd
from handloom.ops.cpu.attention_sums import begin, fold, padded, record_of, weigh, write_mean
from handloom.ops.cpu.instructions import BLOCK, CHUNK, ITEM_ROWS, KEYS, QUERY_ROWS, SPLIT
from handloom.ops.cpu.linear import product_f32, product_pair
from handloom.ops.cpu.pages import ask_for_keys, gather, places_of, turn_keys
from handloom.ops.cpu.rows import size_of, widen_row
from handloom.ops.cpu.simd import LANES, float64, int64, kernel, void
from handloom.ops.cpu.tiles import FORMAT_BF16, FORMAT_F32, FORMATS, VECTORS, WIDE, scattered_tile_of
from handloom.ops.panels import PANEL

FEW = 16  # rows for which values are read where they lie
MOST, FEWER = (4, 3) if WIDE else (2, 1)  # rows of the tiles of a few
TOGETHER = 4 if WIDE else 2  # vectors of keys, or of a value, that they take
AHEAD = 2  # times LANES keys, or values, that are asked for before they are read
SCORES = 4 * (SPLIT + LANES)  # bytes from a row of scores to the next: not a multiple of what falls on the same lines
position = UniTuple(int64, 3)


def _sums(rows, vectors):
    """A function that adds values, weighed by up to so many rows."""
    f32, bf16, f16 = (scattered_tile_of(rows, vectors, form, AHEAD) for form in FORMATS)

    @kernel(void, *[int64] * 10)
    def sums(form, x, x_stride, n, places, offset, stride, k, out, out_stride):
        """out += x [n, k] times as many columns of k values of a format, which lie at places"""
        if form == FORMAT_F32:
            f32(x, x_stride, n, places, offset, stride, k, out, out_stride, 1)
        elif form == FORMAT_BF16:
            bf16(x, x_stride, n, places, offset, stride, k, out, out_stride, 1)
        else:
            f16(x, x_stride, n, places, offset, stride, k, out, out_stride, 1)

    return sums


score_most, score_fewer = (scattered_tile_of(rows, TOGETHER, FORMATS[FORMAT_F32]) for rows in (MOST, FEWER))
sum_most, sum_fewer, sum_panel = _sums(MOST, TOGETHER), _sums(FEWER, TOGETHER), _sums(MOST, VECTORS)


# Items ------------------------------------------------------------------------------------------


@kernel(int64, int64, int64, int64)
def item_rows(tokens, num_heads, threads):
    """How many rows an item has: many share what is done once for keys, few leave items for all threads."""
    return min(ITEM_ROWS, max(QUERY_ROWS, tokens * num_heads // (4 * threads)))


@kernel(int64, int64, int64)
def are_few(new, group):
    """Whether a sequence's new queries are one block, of which each split is an item."""
    return 1 if 0 < new <= max(1, QUERY_ROWS // group) else 0


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


@kernel(int64, *[int64] * 6)
def pieces_of(cu_seqlens, context_lens, s, group, window, most):
    """How many items a sequence has for each KV head: blocks of queries, or the splits of one block."""
    new = simd.read_i64(cu_seqlens + 8 * (s + 1)) - simd.read_i64(cu_seqlens + 8 * s)
    per = max(1, most // group)
    return splits_of(cu_seqlens, context_lens, s, window) if are_few(new, group) else (new + per - 1) // per


@kernel(int64, *[int64] * 5)
def apart(cu_seqlens, context_lens, s, group, window):
    """Of how many records a sequence keeps each head's sums: splits times queries; 0 where an item has all splits."""
    new = simd.read_i64(cu_seqlens + 8 * (s + 1)) - simd.read_i64(cu_seqlens + 8 * s)
    splits = splits_of(cu_seqlens, context_lens, s, window) if are_few(new, group) else 1
    return splits * new if splits > 1 else 0


@kernel(int64, *[int64] * 7)
def attention_items(cu_seqlens, context_lens, num_sequences, num_kv_heads, group, window, most):
    """How many items there are; most: rows of one."""
    pieces = 0
    for s in range(num_sequences):
        pieces += pieces_of(cu_seqlens, context_lens, s, group, window, most)
    return pieces * num_kv_heads


@kernel(int64, *[int64] * 6)
def combine_items(cu_seqlens, context_lens, num_sequences, num_kv_heads, group, window):
    """How many sequences and KV heads have sums to add."""
    count = 0
    for s in range(num_sequences):
        count += 1 if apart(cu_seqlens, context_lens, s, group, window) > 0 else 0
    return count * num_kv_heads


@kernel(position, *[int64] * 7)
def locate(item, cu_seqlens, context_lens, num_sequences, group, window, most):
    """(sequence, piece, records before those of the sequence) of an item without its head; most: rows of an item, 0: of
    the sequences that have sums to add."""
    before = 0
    for s in range(num_sequences):
        records = apart(cu_seqlens, context_lens, s, group, window)
        pieces = pieces_of(cu_seqlens, context_lens, s, group, window, most) if most > 0 else min(1, records)
        if item < pieces:
            return s, item, before
        item -= pieces
        before += records
    return num_sequences, 0, 0


# A split's keys -----------------------------------------------------------------------------------


@kernel(void, *[int64] * 8)
def score_few(x, x_stride, rows, places, offset, k, out, out_stride):
    """x [rows, k] times TOGETHER * LANES keys, whose columns lie at places, into out"""
    while rows > FEWER:
        n = min(rows, MOST)
        score_most(x, x_stride, n, places, offset, 4 * KEYS, k, out, out_stride, 0)
        x, out, rows = x + n * x_stride, out + n * out_stride, rows - n
    if rows > 0:
        score_fewer(x, x_stride, rows, places, offset, 4 * KEYS, k, out, out_stride, 0)


@kernel(void, *[int64] * 10)
def sum_few(form, x, x_stride, rows, places, stride, width, k, out, out_stride):
    """x [rows, k] times k values [width] of a format, which lie at places, added to out [rows, width]; width: panels"""
    whole = width // (TOGETHER * LANES) * TOGETHER * LANES
    while rows > 0:
        n = min(rows, MOST)
        for j in range(0, whole, TOGETHER * LANES):
            own, at = size_of(form) * j, out + 4 * j
            if n > FEWER:
                sum_most(form, x, x_stride, n, places, own, stride, k, at, out_stride)
            else:
                sum_fewer(form, x, x_stride, n, places, own, stride, k, at, out_stride)
        if whole < width:
            sum_panel(form, x, x_stride, n, places, size_of(form) * whole, stride, k, out + 4 * whole, out_stride)
        x, out, rows = x + n * x_stride, out + n * out_stride, rows - n


@kernel(void, *[int64] * 9)
def multiply_many(x, x_stride, rows, w, width, k, out, out_stride, accumulate):
    """x [rows, k] times w [k, width], whole panels side by side, into out [rows, width]."""
    paired = width // (2 * PANEL) * 2 * PANEL
    for j in range(0, paired, 2 * PANEL):
        w_at, at = w + 4 * j, out + 4 * j
        product_pair(x, x_stride, rows, w_at, 4 * PANEL, 4 * width, k, at, 4 * PANEL, out_stride, accumulate, 0)
    if paired < width:
        product_f32(x, x_stride, rows, w + 4 * paired, 4 * width, k, out + 4 * paired, out_stride, accumulate)


@kernel(void, *[int64] * 7)
def score_many(x, x_stride, rows, w, k, out, out_stride):
    """x [rows, k] times KEYS keys that lie as columns, w [k, KEYS], in blocks of k."""
    for at in range(0, k, BLOCK):
        own = w + 4 * at * KEYS
        multiply_many(x + 4 * at, x_stride, rows, own, KEYS, min(BLOCK, k - at), out, out_stride, at)


@kernel(void, *[int64] * 15, float64, int64, float64, *[int64] * 4)
def attend_few(
    first, end, rows, group, position, head_dim, v_head_dim, k_pages, v_pages, form, k_stride, v_stride, page_size,
    table, queries, scale, window, softcap, slopes, records, size, scratch,
):  # fmt: skip
    """Add keys first..end, of one split, to the records of a few rows; position: of the first query."""
    d, dv, base = padded(head_dim), padded(v_head_dim), first // SPLIT * SPLIT
    parts = scratch
    scores = parts + rows * size
    columns = scores + rows * SCORES
    values = columns + 4 * KEYS * d
    copied = values + 4 * KEYS * dv
    places = copied + 4 * LANES * d
    column_places = places + 8 * (2 * SPLIT // LANES + AHEAD)
    begins = first // KEYS * KEYS
    for j in range(0, head_dim, LANES):
        simd.write_i64(column_places + j // LANES * 8, columns + 4 * j * KEYS)
    keys = (end - begins + LANES - 1) // LANES
    v_places = places + 8 * keys
    places_of(k_pages, k_stride, page_size, table, begins, end, places)
    as_they_lie = places_of(v_pages, v_stride, page_size, table, begins, end, v_places)
    for i in range(AHEAD):
        simd.write_i64(v_places + 8 * (keys + i), simd.read_i64(v_places))
        ask_for_keys(simd.read_i64(places + 8 * i), k_stride, 0, LANES, head_dim * size_of(form))
    for at in range(begins, end, KEYS):
        for i in range(0, min(KEYS, end - at), LANES):
            number = (at - begins + i) // LANES + AHEAD
            stride, width = (k_stride, head_dim) if number < keys else (v_stride, v_head_dim)
            turn_keys(
                k_pages, form, k_stride, page_size, table, at + i, end, head_dim, d, copied, columns + 4 * i,
                simd.read_i64(places + 8 * number), stride, width * size_of(form),
            )  # fmt: skip
        for j in range(0, min(KEYS, end - at), TOGETHER * LANES):
            score_few(queries, 4 * d, rows, column_places, 4 * j, head_dim, scores + 4 * (at - base + j), SCORES)
    weigh(begins, end, rows, group, scale, window, softcap, slopes, position, 0, scores, base, parts, size, SCORES)
    if as_they_lie != 0 and v_head_dim % PANEL == 0:
        weights, count = scores + 4 * (begins - base), end - begins
        sum_few(form, weights, SCORES, rows, v_places, v_stride, dv, count, parts, size)
    else:
        for at in range(begins, end, KEYS):
            gather(v_pages, form, v_stride, page_size, table, at, end, KEYS, v_head_dim, values, dv)
            multiply_many(scores + 4 * (at - base), SCORES, rows, values, dv, KEYS, parts, size, 1)
    for row in range(rows):
        fold(records + row * size, parts + row * size, size)


@kernel(void, *[int64] * 15, float64, int64, float64, *[int64] * 4)
def attend_many(
    first, end, rows, group, position, head_dim, v_head_dim, k_pages, v_pages, form, k_stride, v_stride, page_size,
    table, queries, scale, window, softcap, slopes, records, size, scratch,
):  # fmt: skip
    """`attend_few` of many rows: keys and values are made ready once, then CHUNK rows at a time."""
    d, dv, base = padded(head_dim), padded(v_head_dim), first // SPLIT * SPLIT
    parts = scratch
    scores = parts + CHUNK * size
    columns = scores + CHUNK * SCORES
    values = columns + 4 * SPLIT * d
    copied = values + 4 * SPLIT * dv
    for at in range(first // KEYS * KEYS, end, KEYS):
        turned, own = columns + 4 * (at - base) * d, values + 4 * (at - base) * dv
        for i in range(0, min(KEYS, end - at), LANES):
            turn_keys(
                k_pages, form, k_stride, page_size, table, at + i, end, head_dim, d, copied, turned + 4 * i, 0, 0, 0
            )  # fmt: skip
        gather(v_pages, form, v_stride, page_size, table, at, end, KEYS, v_head_dim, own, dv)
    for row in range(0, rows, CHUNK):
        count = min(CHUNK, rows - row)
        begins = max(first, oldest_of(position + row // group, window)) // KEYS * KEYS
        ends = min(end, position + (row + count - 1) // group + 1)
        if begins >= ends:
            continue
        for at in range(begins, ends, KEYS):
            own, out = columns + 4 * (at - base) * d, scores + 4 * (at - base)
            score_many(queries + 4 * row * d, 4 * d, count, own, head_dim, out, SCORES)
        weigh(
            begins, ends, count, group, scale, window, softcap, slopes, position, row, scores, base, parts, size, SCORES
        )  # fmt: skip
        for at in range(begins, ends, KEYS):
            own = values + 4 * (at - base) * dv
            multiply_many(scores + 4 * (at - base), SCORES, count, own, dv, KEYS, parts, size, 1)
        for i in range(count):
            fold(records + (row + i) * size, parts + i * size, size)


# What items do ----------------------------------------------------------------------------------


@kernel(void, *[int64] * 17, float64, int64, float64, *[int64] * 6)
def attention_item(
    item, most, q, q_stride, num_heads, num_kv_heads, head_dim, v_head_dim, k_pages, v_pages, form, page_size,
    page_table, max_pages, cu_seqlens, context_lens, num_sequences, scale, window, softcap, sinks, slopes, out,
    out_stride, kept, scratch,
):  # fmt: skip
    """Attention of one item's queries; window 0, softcap 0.0, sinks and slopes 0: none; kept: records of sums that are
    yet to be added."""
    group = num_heads // num_kv_heads
    kv_head = item % num_kv_heads
    s, piece, before = locate(item // num_kv_heads, cu_seqlens, context_lens, num_sequences, group, window, most)
    start, length = simd.read_i64(cu_seqlens + 8 * s), simd.read_i64(context_lens + 8 * s)
    new = simd.read_i64(cu_seqlens + 8 * (s + 1)) - start
    few, per = are_few(new, group), max(1, most // group)
    # of blocks of queries, late ones see more keys: each thread's own items shall be early and late ones
    block = piece // 2 if piece % 2 == 0 else (new + per - 1) // per - 1 - piece // 2
    first = 0 if few else block * per
    count = min(per, new - first)
    position = length - new + first  # of the first query
    oldest, end = oldest_of(position, window), position + count
    table = page_table + 8 * s * max_pages
    k_stride = num_kv_heads * head_dim * size_of(form)
    v_stride = num_kv_heads * v_head_dim * size_of(form)
    k_pages = k_pages + kv_head * head_dim * size_of(form)
    v_pages = v_pages + kv_head * v_head_dim * size_of(form)
    slopes = slopes + 4 * kv_head * group if slopes != 0 else 0

    rows, d, size = count * group, padded(head_dim), record_of(v_head_dim)
    queries = scratch
    records = queries + 4 * rows * d
    scratch = records + rows * size
    lowest, highest = oldest // SPLIT, (end - 1) // SPLIT
    alone = few and highest > lowest
    if alone:
        records = kept + (before * num_heads + (piece * num_kv_heads + kv_head) * rows) * size
        lowest, highest = lowest + piece, lowest + piece
    for row in range(rows):
        head = kv_head * group + row % group
        source = q + (start + first + row // group) * q_stride + 4 * head * head_dim
        widen_row(source, head_dim, 0, queries + 4 * row * d, d)
        begin(records + row * size, size, 0 if alone else sinks, head)
    for split in range(lowest, highest + 1):
        earliest, latest = max(oldest, split * SPLIT), min(end, (split + 1) * SPLIT)
        if rows <= FEW:
            attend_few(
                earliest, latest, rows, group, position, head_dim, v_head_dim, k_pages, v_pages, form, k_stride,
                v_stride, page_size, table, queries, scale, window, softcap, slopes, records, size, scratch,
            )  # fmt: skip
        else:
            attend_many(
                earliest, latest, rows, group, position, head_dim, v_head_dim, k_pages, v_pages, form, k_stride,
                v_stride, page_size, table, queries, scale, window, softcap, slopes, records, size, scratch,
            )  # fmt: skip
    if not alone:
        for row in range(rows):
            head = kv_head * group + row % group
            target = out + (start + first + row // group) * out_stride + 4 * head * v_head_dim
            write_mean(records + row * size, size, v_head_dim, target)


@kernel(void, *[int64] * 13)
def combine_item(
    item, num_heads, num_kv_heads, v_head_dim, cu_seqlens, context_lens, num_sequences, window, sinks, out, out_stride,
    kept, scratch,
):  # fmt: skip
    """Add the sums that a sequence's items kept for one KV head."""
    group = num_heads // num_kv_heads
    kv_head, size = item % num_kv_heads, record_of(v_head_dim)
    s, _, before = locate(item // num_kv_heads, cu_seqlens, context_lens, num_sequences, group, window, 0)
    start = simd.read_i64(cu_seqlens + 8 * s)
    rows = (simd.read_i64(cu_seqlens + 8 * (s + 1)) - start) * group
    for row in range(rows):
        head = kv_head * group + row % group
        begin(scratch, size, sinks, head)
        for split in range(splits_of(cu_seqlens, context_lens, s, window)):
            at = before * num_heads + (split * num_kv_heads + kv_head) * rows + row
            fold(scratch, kept + at * size, size)
        write_mean(scratch, size, v_head_dim, out + (start + row // group) * out_stride + 4 * head * v_head_dim)
