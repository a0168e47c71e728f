"""A matrix product, cut into items that any thread can compute in any order.

An item is a group of panels times a chunk of rows. Within it k runs in blocks of BLOCK, each summed alone and added to
the total: the same sums in the same order for one row and for a thousand. A quantised weight is made floats in
registers for a few rows; for more a block of k at a time, which stays in the first cache and is multiplied like any.

This module does not know threads, or where operands come from.
"""

from __future__ import annotations

import numpy as np

from handloom.ops.cpu import simd
from handloom.ops.cpu.amx import AMX
from handloom.ops.cpu.codes import (
    FEWER_AT_ONCE,
    FLOAT32,
    MOST_AT_ONCE,
    SCALE_BYTES,
    SCALE_KIND,
    SUPER_INTEGER,
    ZERO,
    multiply_fewer,
    multiply_most,
    multiply_one,
    unpack_block,
)  # fmt: skip
from handloom.ops.cpu.digits import multiply_digits
from handloom.ops.cpu.elementary import tanh
from handloom.ops.cpu.group_digits import multiply_groups
from handloom.ops.cpu.instructions import BLOCK, GROUP, LINE, ROWS
from handloom.ops.cpu.simd import LANES, float64, int64, kernel, read_i64, void
from handloom.ops.cpu.super_digits import multiply_supers
from handloom.ops.cpu.tiles import (
    FORMAT_BF16,
    FORMAT_F32,
    IN_PANELS,
    TILE_ROWS,
    VECTORS,
    WIDE,
    ask_for,
    load_bf16,
    load_even_bf16,
    load_odd_bf16,
    tile_of,
)
from handloom.ops.cpu.words import WORDS, multiply_words
from handloom.ops.panels import PANEL
from handloom.ops.quantized_panels import QUANTIZED

MANY = 64
ASKED = 4  # cache lines of each of two panels that a tile of them asks for
WHOLE = 24  # rows of which a chunk is a multiple: of SIX, and of two quads of digits
AT_ONCE = 16 if WIDE else 2  # rows that take a panel from its first k to its last; more take a block of k at a time
SIX = 6  # rows of the tile of two panels, which needs the fewest loads for its sums
FEW = 16 if WIDE else 2  # rows for which codes are made floats in registers, again for each tile
ITEM_BYTES = 1 << 18  # of weights that an item is to read: less is lost in handing out items
SCRATCH = ROWS * GROUP * PANEL * 4


def _tiles(form, rows):
    """The tile for so many rows, and how many vectors it takes at once."""
    columns = VECTORS if WIDE or rows <= 2 else 1
    return tile_of(rows, columns, form, fills=rows < TILE_ROWS[0]), columns


def _product(form):
    """A function that multiplies rows of x by one block of one panel of this format."""
    (most, most_wide), (many, many_wide) = _tiles(form, TILE_ROWS[0]), _tiles(form, TILE_ROWS[1])
    few, few_wide = _tiles(form, TILE_ROWS[-3])
    (two, _), (one, _) = _tiles(form, 2), _tiles(form, 1)
    most_rows, many_rows, few_rows = TILE_ROWS[0], TILE_ROWS[1], TILE_ROWS[-3]
    size = form.size * form.together

    @kernel(void, *[int64] * 9)
    def product(x, x_stride, rows, w, w_stride, k, out, out_stride, accumulate):
        """x [rows, k] times w [k, PANEL] into out [rows, PANEL]; strides in bytes, w's that of one step of a tile.

        Rows that fill no tile take the last of them again, so that the weights are read once for up to 8.
        """
        while rows > 0:
            if rows >= most_rows:
                n, wide = most_rows, most_wide
            elif rows > few_rows:
                n, wide = min(rows, many_rows), many_wide
            else:
                n, wide = rows, few_wide if rows > 2 else VECTORS
            for v in range(0, VECTORS, wide):
                at, to = w + v * LANES * size, out + v * LANES * 4
                if rows >= most_rows:
                    most(x, x_stride, n, at, 0, w_stride, k, to, 0, out_stride, accumulate)
                elif rows > few_rows:
                    many(x, x_stride, n, at, 0, w_stride, k, to, 0, out_stride, accumulate)
                elif rows > 2:
                    few(x, x_stride, n, at, 0, w_stride, k, to, 0, out_stride, accumulate)
                elif rows == 2:
                    two(x, x_stride, n, at, 0, w_stride, k, to, 0, out_stride, accumulate)
                else:
                    one(x, x_stride, n, at, 0, w_stride, k, to, 0, out_stride, accumulate)
            x, out, rows = x + n * x_stride, out + n * out_stride, rows - n

    return product


product_f32, product_bf16, product_f16 = (_product(form) for form in IN_PANELS)
six_f32 = tile_of(SIX, VECTORS, IN_PANELS[FORMAT_F32], 2, asks=False, fills=False)


@kernel(void, *[int64] * 12)
def product_pair(x, x_stride, rows, w, w_next, w_stride, k, out, out_next, out_stride, accumulate, ahead):
    """x [rows, k] times two panels of float32 as `product_f32` times each: six rows at a time where registers allow.

    ahead: bytes from these weights to those that come next, which are asked for meanwhile; 0: there are none.
    """
    asked = ahead
    while WIDE and rows >= SIX:
        for _ in range(ASKED if 0 < asked < ahead + k * w_stride else 0):
            ask_for(w + asked)
            ask_for(w + w_next + asked)
            asked += LINE
        six_f32(x, x_stride, SIX, w, w_next, w_stride, k, out, out_next, out_stride, accumulate)
        x, out, rows = x + SIX * x_stride, out + SIX * out_stride, rows - SIX
    product_f32(x, x_stride, rows, w, w_stride, k, out, out_stride, accumulate)
    product_f32(x, x_stride, rows, w + w_next, w_stride, k, out + out_next, out_stride, accumulate)


@kernel(void, *[int64] * 8)
def product(form, x, x_stride, rows, w, k, out, accumulate):
    """x [rows, k] times k rows of a panel of a format, into out [rows, PANEL]."""
    stride = PANEL * 4
    if form == FORMAT_F32:
        product_f32(x, x_stride, rows, w, PANEL * 4, k, out, stride, accumulate)
    elif form == FORMAT_BF16:
        product_bf16(x, x_stride, rows, w, PANEL * 4, k, out, stride, accumulate)
    else:
        product_f16(x, x_stride, rows, w, PANEL * 2, k, out, stride, accumulate)


@kernel(int64, *[int64] * 5)
def group_of(columns, depth, size, rows, threads):
    """How many panels an item has: enough to read ITEM_BYTES, few enough that there are items for all threads.

    Many rows are read from a far cache once for all panels of an item, so there are as many as can be.
    """
    panels = (columns + PANEL - 1) // PANEL
    wanted = GROUP if rows > MANY else ITEM_BYTES // (depth * PANEL * size)
    group = max(1, min(wanted, GROUP, panels // (4 * threads)))
    return group // 2 * 2 if rows > MANY and group > 1 else group


@kernel(int64, int64)
def rows_of(rows):
    """How many rows an item has: chunks as even as whole tiles let them be, for threads to have the same work."""
    chunks = (rows + ROWS - 1) // ROWS
    return max(1, (rows + WHOLE * chunks - 1) // (WHOLE * chunks) * WHOLE)


@kernel(int64, int64, int64, int64)
def linear_items(columns, rows, group):
    """How many items a product has."""
    panels = (columns + PANEL - 1) // PANEL
    per = rows_of(rows)
    return (panels + group - 1) // group * ((rows + per - 1) // per)


@kernel(void, *[int64] * 10)
def add_codes(segment, panel, depth, k, x, x_stride, rows, scales, sums, out):
    """out [rows, PANEL] += x [rows, BLOCK] times a block of quantised weights; the first block is stored."""
    count = min(BLOCK, depth - k)
    while rows > 0:
        n = min(rows, MOST_AT_ONCE)
        for at in range(0, n * PANEL, LANES):
            simd.store(sums + 4 * at, simd.splat(ZERO))
        if n == 1:
            multiply_one(segment, panel, depth, k, count, scales, x, x_stride, n, sums)
        elif n <= FEWER_AT_ONCE:
            multiply_fewer(segment, panel, depth, k, count, scales, x, x_stride, n, sums)
        else:
            multiply_most(segment, panel, depth, k, count, scales, x, x_stride, n, sums)
        for at in range(0, n * PANEL, LANES):
            total = simd.load(sums + 4 * at)
            if k > 0:
                total = simd.add(simd.load(out + 4 * at), total)
            simd.store(out + 4 * at, total)
        x, out, rows = x + n * x_stride, out + 4 * n * PANEL, rows - n


@kernel(void, *[int64] * 3)
def widen_odd(w, count, out):
    """An odd number of k of a panel in bfloat16, of which all but the last lie in pairs, to float32 [count, PANEL]"""
    for k in range(0, count - 1, 2):
        for v in range(VECTORS):
            pair = w + (k * PANEL + 2 * v * LANES) * 2
            simd.store(out + (k * PANEL + v * LANES) * 4, load_even_bf16(pair))
            simd.store(out + ((k + 1) * PANEL + v * LANES) * 4, load_odd_bf16(pair))
    for v in range(0, PANEL, LANES):
        last = (count - 1) * PANEL + v
        simd.store(out + 4 * last, load_bf16(w + 2 * last))


@kernel(void, *[int64] * 11)
def add_block(form, size, data, panel, depth, k, x, x_stride, rows, scales, out):
    """out [rows, PANEL] += x [rows, BLOCK] times a block of weights; scales: scratch, and that of a block after it."""
    block, count = scales + SCALE_BYTES, min(BLOCK, depth - k)
    if form != QUANTIZED:
        w = data + (panel * depth + k) * PANEL * size
        if form == FORMAT_BF16 and count % 2 != 0:  # the last block of an odd depth
            widen_odd(w, count, block)
            form, w = FORMAT_F32, block
        product(form, x, x_stride, rows, w, count, out, k)
    elif rows <= FEW:
        add_codes(data, panel, depth, k, x, x_stride, rows, scales, block, out)
    else:
        unpack_block(data, panel, depth, k, count, scales, 0, 0, 0, block)
        product(FORMAT_F32, x, x_stride, rows, block, count, out, k)


@kernel(void, *[int64] * 9)
def multiply_codes(segment, first, last, depth, digits, row, count, scratch, out):
    """out [last - first, ROWS, PANEL] = rows `row`, ... as digits times these panels of codes."""
    kind = read_i64(segment + SCALE_KIND)
    if kind == FLOAT32:
        multiply_digits(segment, first, last, depth, digits, row, count, scratch, out)
    elif kind == SUPER_INTEGER:
        multiply_supers(segment, first, last, depth, digits, row, count, scratch, out)
    else:
        multiply_groups(segment, first, last, depth, digits, row, count, scratch, out)


@kernel(void, *[int64] * 6)
def finish(x, rows, residual, residual_stride, out, out_stride):
    """out [rows, PANEL] = x [rows, PANEL] + residual (address 0: none)"""
    for _ in range(rows):
        for v in range(0, PANEL * 4, LANES * 4):
            value = simd.load(x + v)
            simd.store(out + v, value if residual == 0 else simd.add(simd.load(residual + v), value))
        x, out = x + PANEL * 4, out + out_stride
        residual += residual_stride if residual != 0 else 0


@kernel(void, *[int64] * 8, float64, int64, int64)
def finish_panel(x, first, rows, panel, columns, bias, residual, residual_stride, softcap, out, out_stride):
    """out = residual + softcap(x + bias) for x [rows, PANEL] of one panel, from row `first` of out and residual on."""
    column = panel * PANEL
    residual += first * residual_stride + 4 * column if residual != 0 else 0
    out += first * out_stride + 4 * column
    if bias == 0 and softcap == 0.0 and column + PANEL <= columns:
        finish(x, rows, residual, residual_stride, out, out_stride)
        return
    for _ in range(rows):
        for v in range(0, PANEL, LANES):
            left = columns - column - v
            value = simd.load(x + 4 * v)
            if bias != 0:
                value = simd.add(value, simd.load_first(bias + 4 * (column + v), left))
            if softcap != 0.0:
                cap = simd.splat(np.float32(softcap))
                value = simd.mul(cap, tanh(simd.div(value, cap)))
            if residual != 0:
                value = simd.add(simd.load_first(residual + 4 * v, left), value)
            simd.store_first(out + 4 * v, value, left)
        x, out = x + PANEL * 4, out + out_stride
        residual += residual_stride if residual != 0 else 0


@kernel(void, *[int64] * 13, float64, *[int64] * 4)
def linear_item(
    item, form, size, group, x, x_stride, rows, data, columns, depth, bias, residual, residual_stride, softcap, out,
    out_stride, whole, scratch,
):  # fmt: skip
    """out = residual + softcap(x @ weight.T + bias) for one item's rows and columns; addresses of 0: there is none.

    Many rows are taken a block of k at a time, which they leave in a near cache; of few the weights lie in one piece.
    whole: the rows of x as digits or words, for a quantised weight; 0: there are none.
    """
    panels = (columns + PANEL - 1) // PANEL
    groups = (panels + group - 1) // group
    per = rows_of(rows)
    first_row, first = item // groups * per, item % groups * group
    count = min(per, rows - first_row)
    last = min(panels, first + group)
    x, scales, width = x + first_row * x_stride, scratch + SCRATCH, ROWS * PANEL * 4
    if whole != 0:
        if AMX:
            multiply_codes(data, first, last, depth, whole, first_row, count, scales, scratch)
        elif WORDS:
            multiply_words(data, first, last, depth, whole, first_row, count, scales, scratch)
    elif count > MANY:
        paired = first + (last - first) // 2 * 2 if form == FORMAT_F32 else first
        for k in range(0, depth, BLOCK):
            for p in range(first, paired, 2):
                w, into = data + (p * depth + k) * PANEL * 4, scratch + (p - first) * width
                product_pair(
                    x + 4 * k, x_stride, count, w, depth * PANEL * 4, PANEL * 4, min(BLOCK, depth - k), into, width,
                    PANEL * 4, k, BLOCK * PANEL * 4,
                )  # fmt: skip
            for p in range(paired, last):
                into = scratch + (p - first) * width
                add_block(form, size, data, p, depth, k, x + 4 * k, x_stride, count, scales, into)
    else:
        for p in range(first, last):
            into, start = scratch + (p - first) * width, 0
            if form != QUANTIZED and count <= AT_ONCE and depth >= BLOCK:
                start = depth // BLOCK * BLOCK
                product(form, x, x_stride, count, data + p * depth * PANEL * size, start, into, 0)
            for k in range(start, depth, BLOCK):
                add_block(form, size, data, p, depth, k, x + 4 * k, x_stride, count, scales, into)
    for panel in range(first, last):
        finish_panel(
            scratch + (panel - first) * width, first_row, count, panel, columns, bias, residual, residual_stride,
            softcap, out, out_stride,
        )  # fmt: skip
