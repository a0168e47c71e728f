"""How keys and values are read from pages: as they lie wherever they can be.

LANES keys that lie one after another are turned to columns where they are, and a few queries weigh values where they
are. What lies in pieces, or has a width that is no multiple of a vector, is copied as float32 first. Both give the same
numbers. What lies past a sequence's last key is not read: to memory that was read before it was ever written the system
gives other memory at the first write, and interrupts all threads for it.

This module does not know queries, heads or threads.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from handloom.ops.cpu import simd
from handloom.ops.cpu.codes import ZERO
from handloom.ops.cpu.instructions import KEYS, LINE
from handloom.ops.cpu.rows import widen_row
from handloom.ops.cpu.simd import I64, LANES, Builder, Value, int64, kernel, operation, void
from handloom.ops.cpu.tiles import FORMAT_BF16, FORMAT_F32, FORMATS, Format, ask_for


def _turner(form: Format) -> Any:
    @operation(void, *[int64] * 5)
    def turn(
        b: Builder, source: Value, source_stride: Value, count: Value, target: Value, target_stride: Value
    ) -> None:
        """16 x 16 of a format, rows to columns of float32; past `count` the last row again; strides in bytes"""
        rows = []
        for i in range(LANES):
            rows.append(form.load(b, source))
            source = b.add(source, b.select(b.icmp_signed("<", I64(i + 1), count), source_stride, I64(0)))
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

    return turn


turn_f32, turn_bf16, turn_f16 = (_turner(form) for form in FORMATS)


@kernel(int64, *[int64] * 6)
def place(pages, stride, page_size, table, first, last):
    """Where LANES keys from `first` on, or those below `last`, lie one after another; 0 where they do not."""
    page, at = first // page_size, first % page_size
    number = simd.read_i64(table + 8 * page)
    for following in range(page + 1, (min(first + LANES, last) - 1) // page_size + 1):
        if simd.read_i64(table + 8 * following) != number + following - page:
            return 0
    return pages + (number * page_size + at) * stride


@kernel(int64, *[int64] * 7)
def places_of(pages, stride, page_size, table, first, last, out):
    """The places of LANES keys at a time from `first` on, into `out`; 0 if one of them is, else 1."""
    all_lie = 1
    for i in range(0, last - first, LANES):
        at = place(pages, stride, page_size, table, first + i, last)
        simd.write_i64(out + i // LANES * 8, at)
        all_lie = all_lie if at != 0 else 0
    return all_lie


@kernel(void, *[int64] * 5)
def ask_for_keys(at, stride, first, last, width):
    """Ask for some of the LANES keys that lie at a place, if they do: `width` bytes of each."""
    for i in range(first, last if at != 0 else first):
        for j in range(0, width, LINE):
            ask_for(at + i * stride + j)


@kernel(void, *[int64] * 11)
def gather(pages, form, stride, page_size, table, first, last, count, width, out, out_width):
    """`count` keys from `first` on as float32 [count, out_width], zeros where there are none."""
    for i in range(count):
        at = first + i
        if at < last:
            slot = simd.read_i64(table + 8 * (at // page_size)) * page_size + at % page_size
            widen_row(pages + slot * stride, width, form, out + 4 * i * out_width, out_width)
        else:
            for j in range(0, out_width, LANES):
                simd.store(out + 4 * (i * out_width + j), simd.splat(ZERO))


@kernel(void, *[int64] * 14)
def turn_keys(
    pages,
    form,
    stride,
    page_size,
    table,
    first,
    last,
    width,
    out_width,
    copied,
    columns,
    asked,
    asked_stride,
    asked_width,
):
    """LANES keys from `first` on as columns float32 [width, KEYS], of which only those below `last` are read.

    copied: scratch [LANES, out_width]; asked: a place to ask for meanwhile, `asked_width` bytes of each key there.
    """
    at = place(pages, stride, page_size, table, first, last) if width % LANES == 0 else 0
    count = min(LANES, last - first)
    if at == 0:
        gather(pages, form, stride, page_size, table, first, last, count, width, copied, out_width)
        at, form, stride = copied, FORMAT_F32, 4 * out_width
    for j in range(0, width, LANES):
        ask_for_keys(asked, asked_stride, j * LANES // width, (j + LANES) * LANES // width, asked_width)
        target = columns + 4 * j * KEYS
        if form == FORMAT_F32:
            turn_f32(at + 4 * j, stride, count, target, 4 * KEYS)
        elif form == FORMAT_BF16:
            turn_bf16(at + 2 * j, stride, count, target, 4 * KEYS)
        else:
            turn_f16(at + 2 * j, stride, count, target, 4 * KEYS)
