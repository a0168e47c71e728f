"""Products with weights in bfloat16 by the matrix units (AMX), in items like those of `linear`.

Rows come as pieces (see `pieces`); a sum takes 32 columns of k at a time, of each the products of the three pieces one
after the other, in blocks of at most 320 that are summed alone and added in order. That order depends on k alone, and
each row of a tile on its own row of x: a row alone, by vectors (`matrix_row`), gets the bits it gets among a thousand.

This module does not know threads, or where operands come from.
"""

from __future__ import annotations

import itertools
from typing import Any

from llvmlite import ir

from handloom.ops.cpu import amx, simd
from handloom.ops.cpu.codes import ZERO
from handloom.ops.cpu.instructions import LINE, PIECES, TILE_DEPTH
from handloom.ops.cpu.linear import finish_panel
from handloom.ops.cpu.matrix_row import PIECE, multiply_row, widen_pieces
from handloom.ops.cpu.pieces import rows_at, tiles_of
from handloom.ops.cpu.simd import I64, LANES, Builder, Value, float64, int64, kernel, operation, void
from handloom.ops.cpu.tiles import PREFETCH, prefetch
from handloom.ops.panels import PANEL

PAIR = 2 * amx.ROWS  # rows that two tiles hold
TILE_ROW = 2 * amx.ROW_BYTES  # of a panel: two tiles side by side
TILE_BYTES = 2 * amx.TILE_BYTES
BLOCK = 10  # tiles of k that are summed alone at most
PANELS = 8  # of an item of many rows
ITEM_BYTES = 1 << 18  # of weights that an item of few rows is to read
NEAR_BYTES = 1 << 20  # of pieces that an item of many rows has: they stay in the second cache
MOST_ROWS = 256  # of an item
SUMS = PAIR * PANEL * 4
ALONE, FAR, NEAR = range(3)  # one row by vectors; weights come from memory; from a cache


@kernel(int64, int64, int64)
def matrix_rows(rows, depth):
    """How many rows an item has: whole pairs of tiles."""
    most = min(MOST_ROWS, NEAR_BYTES // (tiles_of(depth) * PIECES * amx.ROW_BYTES)) // PAIR * PAIR
    most = max(PAIR, most)
    chunks = max(1, (rows + most - 1) // most)
    return max(PAIR, (rows + PAIR * chunks - 1) // (PAIR * chunks) * PAIR)


@kernel(int64, *[int64] * 4)
def matrix_group(columns, depth, rows, threads):
    """How many panels an item has."""
    panels = (columns + PANEL - 1) // PANEL
    wanted = PANELS if rows > PAIR else ITEM_BYTES // (2 * depth * PANEL)
    return max(1, min(wanted, PANELS, panels // (4 * threads)))


@kernel(int64, *[int64] * 4)
def matrix_items(columns, depth, rows, group):
    """How many items a product has."""
    panels, per = (columns + PANEL - 1) // PANEL, matrix_rows(rows, depth)
    return (panels + group - 1) // group * ((rows + per - 1) // per)


@operation(void, int64, int64)
def configure(b: Builder, first: Value, second: Value) -> None:
    """Take the tiles: `first` rows of x and of sums in some, `second` in the others"""
    amx.configure(b, {**dict.fromkeys((0, 1, 6), first), **dict.fromkeys((2, 3, 7), second)})


def _multiplier(groups: int, fetch: bool) -> Any:
    """A numba function: (x, x_size, y, y_size, w, count, out) stores the product of rows with `count` tiles of a panel.

    x, y: the tiles of 16 rows each, a piece's x_size and y_size bytes; y is there if groups is 2. out: [rows, PANEL]
    float32. fetch: weights are asked for ahead.
    """

    @operation(void, *[int64] * 7)
    def multiply(
        b: Builder, x: Value, x_size: Value, y: Value, y_size: Value, w: Value, count: Value, out: Value
    ) -> None:
        """Tiles of rows times a panel"""
        function, entry = b.function, b.block
        loop, done = function.append_basic_block("k"), function.append_basic_block("product")
        for tile in range(2 * groups):
            amx.zero(b, tile)
        b.branch(loop)
        b.position_at_end(loop)
        left, weights, *rows = (b.phi(I64) for _ in range(2 + groups))
        for phi, start in zip((left, weights, *rows), (count, w, x, y), strict=False):
            phi.add_incoming(start, entry)
        at_once = TILE_BYTES // LINE // (2 + 3 * PIECES * groups) + 1
        lines = iter(range(0, TILE_BYTES if fetch else 0, LINE))

        def ask() -> None:
            for line in itertools.islice(lines, at_once):
                prefetch(b, simd.offset(b, weights, PREFETCH + line), frame=False)

        for half in range(2):
            amx.load(b, 4 + half, simd.offset(b, weights, amx.ROW_BYTES * half), I64(TILE_ROW))
            ask()
        places: list[Value] = list(rows)
        for _ in range(PIECES):
            for i, size in zip(range(groups), (x_size, y_size), strict=False):
                amx.load(b, 6 + i, places[i], I64(amx.ROW_BYTES))
                ask()
                for half in range(2):
                    amx.multiply_bf16(b, 2 * i + half, 6 + i, 4 + half)
                    ask()
                places[i] = b.add(places[i], size)
        rest = b.sub(left, I64(1))
        for phi, new in zip((left, weights, *rows), (rest, simd.offset(b, weights, TILE_BYTES), *places), strict=True):
            phi.add_incoming(new, loop)
        b.cbranch(b.icmp_signed(">", rest, I64(0)), loop, done)
        b.position_at_end(done)
        for tile in range(2 * groups):
            place = simd.offset(b, out, tile // 2 * amx.ROWS * PANEL * 4 + tile % 2 * amx.ROW_BYTES)
            amx.store(b, tile, place, I64(PANEL * 4))

    return multiply


multiply_one, multiply_two, multiply_near = _multiplier(1, True), _multiplier(2, True), _multiplier(2, False)


@operation(void, int64, int64)
def store_widened(b: Builder, address: Value, source: Value) -> None:
    """16 bfloat16, each with a zero after it"""
    halves = simd.load_at(b, source, ir.VectorType(simd.I16, LANES), 2)
    simd.store_at(b, b.zext(halves, simd.INTS), address)


@kernel(void, *[int64] * 3)
def fill_tile(w, count, out):
    """`count` k of a panel, fewer than a tile has, as a tile with zeros after them."""
    for at in range(0, TILE_BYTES, 64):
        k, side = at // TILE_ROW * 2, at % TILE_ROW
        if k + 1 < count:
            simd.store(out + at, simd.load(w + at))
        elif k < count:
            store_widened(out + at, w + at - side + side // 2)
        else:
            simd.store(out + at, simd.splat(ZERO))


@kernel(void, *[int64] * 8)
def multiply(x, y, rows, w, first, count, way, out):
    """`rows` rows, of tiles that begin at x and y, times tiles first .. first + count of k, whose weights are at w."""
    if way == ALONE:
        multiply_row(x + first * PIECES * PIECE, w, count, out)
        return
    x_size, y_size = min(amx.ROWS, rows) * amx.ROW_BYTES, (rows - amx.ROWS) * amx.ROW_BYTES
    x, y = x + first * PIECES * x_size, y + first * PIECES * y_size
    if rows <= amx.ROWS:
        multiply_one(x, x_size, 0, 0, w, count, out)
    elif way == NEAR:
        multiply_near(x, x_size, y, y_size, w, count, out)
    else:
        multiply_two(x, x_size, y, y_size, w, count, out)


@kernel(void, *[int64] * 7)
def multiply_panel(x, y, rows, w, depth, way, scratch):
    """At most PAIR rows times a panel, all of k, to the beginning of scratch [rows, PANEL] float32."""
    whole, more, tile = depth // TILE_DEPTH, scratch + SUMS, scratch + 2 * SUMS
    blocks = (whole + BLOCK - 1) // BLOCK
    for i in range(blocks + (1 if depth % TILE_DEPTH != 0 else 0)):
        first, last = whole, whole + 1
        own = w + first * TILE_BYTES
        if i < blocks:
            first, last = whole * i // blocks, whole * (i + 1) // blocks
            own = w + first * TILE_BYTES
        else:
            fill_tile(own, depth - first * TILE_DEPTH, tile)
            own = tile
        multiply(x, y, rows, own, first, last - first, way, more if i > 0 else scratch)
        for at in range(0, rows * PANEL * 4 if i > 0 else 0, LANES * 4):
            simd.store(scratch + at, simd.add(simd.load(scratch + at), simd.load(more + at)))


@kernel(void, *[int64] * 11, float64, int64, int64, int64)
def _item(
    item, group, x, pieces, rows, data, columns, depth, bias, residual, residual_stride, softcap, out, out_stride,
    scratch,
):  # fmt: skip
    """out = residual + softcap(x @ weight.T + bias) for one item's rows and columns; addresses of 0: there is none."""
    panels, per = (columns + PANEL - 1) // PANEL, matrix_rows(rows, depth)
    groups = (panels + group - 1) // group
    first_row, first = item // groups * per, item % groups * group
    end, last, taken = min(rows, first_row + per), min(panels, first + group), 0
    if rows == 1:
        widen_pieces(x, depth, scratch + 3 * SUMS)
        for panel in range(first, last):
            multiply_panel(scratch + 3 * SUMS, 0, 1, data + panel * depth * PANEL * 2, depth, ALONE, scratch)
            finish_panel(scratch, 0, 1, panel, columns, bias, residual, residual_stride, softcap, out, out_stride)
        return
    for panel in range(first, last):
        for row in range(first_row, end, PAIR):
            count = min(PAIR, end - row)
            if count != taken:
                configure(min(amx.ROWS, count), max(1, count - amx.ROWS))
                taken = count
            x, y = rows_at(pieces, row, depth), rows_at(pieces, row + amx.ROWS, depth)
            w = data + panel * depth * PANEL * 2
            multiply_panel(x, y, count, w, depth, NEAR if row > first_row else FAR, scratch)
            finish_panel(scratch, row, count, panel, columns, bias, residual, residual_stride, softcap, out, out_stride)
    amx.release()


@kernel(void, *[int64] * 11, float64, int64, int64, int64)
def _no_item(
    item, group, x, pieces, rows, data, columns, depth, bias, residual, residual_stride, softcap, out, out_stride,
    scratch,
):  # fmt: skip
    """Nothing: code for a processor without matrix units has no instruction that comes here."""


matrix_item = _item if amx.AMX else _no_item
