"""Products with codes as they are, where whole numbers of 16 bits are multiplied (VNNI) and there are no matrix units.

A row of x is made whole numbers of 31 bits, as `digits` says, and these two words of 16 bits with a sign each. Products
of words with (code - zero) are summed exactly over a part of 32 columns, or of 16 where groups are of 16; the two sums
become one float32, which the scale of the part's group is multiplied with; where groups have minima, these times the
sum of the row's numbers follow. Blocks of 64 columns are added in order, so a row alone gives the bits that it gives
among others.

A row lies as words: of each 8 columns the upper words of columns (i, i + 4) for i = 0 to 3, then the lower words; after
all of them a float32 for each 32 columns, the sum of their numbers; at its end, in a line of its own, the row's scale.

This module does not know threads, or where operands come from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from llvmlite import ir

from handloom.ops.cpu import instructions, simd
from handloom.ops.cpu.amx import AMX, VNNI
from handloom.ops.cpu.code_bytes import BYTES, FEW_BYTES, eight_columns
from handloom.ops.cpu.codes import (
    BITS,
    GROUP_SHIFT,
    GROUPS,
    HIGH,
    LOW,
    MINIMUM,
    MINIMUM_KIND,
    NO_MINIMUM,
    SCALE_BYTES,
    ZERO,
    ZERO_CODE,
    ZERO_POINT,
    read_scales,
)
from handloom.ops.cpu.digits import factor_of
from handloom.ops.cpu.instructions import BLOCK, LINE, ROWS
from handloom.ops.cpu.simd import (
    F32,
    I16,
    I32,
    I64,
    INTS,
    LANES,
    VECTOR,
    Builder,
    Value,
    int64,
    kernel,
    operation,
    read_f32,
    read_i64,
    vector,
    void,
)
from handloom.ops.cpu.tiles import PREFETCH, VECTORS, prefetch
from handloom.ops.panels import PANEL

WORDS = simd.compiled_for(*VNNI) and not AMX
"""Whether code with these instructions can be compiled and is to be used."""
MOST = 4  # rows at once: as many sums as there are registers for
HELD = 16  # bits of codes that are words already
WIDTH = PANEL * 4
RECORD = SCALE_BYTES + WIDTH  # of a part: scales, minima, and zeros as pairs of words
SUMMED = 32  # columns of whose numbers the sum is kept
HALVES = ir.VectorType(I16, 2 * LANES)

word_bytes = kernel(int64, int64)(instructions.word_bytes)


# Rows to words -----------------------------------------------------------------------------------


@operation(vector, int64, vector)
def write_words(b: Builder, out: Value, x: Value) -> Value:
    """16 numbers |x| <= 2**30 to the nearest whole ones, as words; their sums: of upper words in the lanes 0 to 3 and 8
    to 11, of lower ones in the others"""
    whole = b.fptosi(simd.call(b, "llvm.rint.v16f32", VECTOR, x), INTS)
    upper = b.bitcast(b.add(whole, ir.Constant(INTS, [0x8000] * LANES)), HALVES)
    order = []
    for first in (0, 8):
        for source in (2 * LANES + 1, 0):  # the odd halves of `upper`, the even ones of `whole`
            order += [source + 2 * (first + i + more) for i in range(4) for more in (0, 4)]
    words = b.shuffle_vector(b.bitcast(whole, HALVES), upper, ir.Constant(ir.VectorType(I32, 2 * LANES), order))
    simd.store_at(b, words, out, 2)
    return b.bitcast(_add_pairs(b, ir.Constant(INTS, [0] * LANES), b.bitcast(words, INTS), _ones()), VECTOR)


def _ones() -> Value:
    return ir.Constant(INTS, [0x00010001] * LANES)


def _add_pairs(b: Builder, total: Value, x: Value, y: Value) -> Value:
    """total int32 [16] + the products of int16, two for each"""
    return simd.call(b, "llvm.x86.avx512.vpdpwssd.512", INTS, total, x, y)


def _number(b: Builder, upper: Value, lower: Value, of: Any) -> Value:
    """The float32 of upper * 65536 + lower, rounded as the fused sum of the two."""
    name = "llvm.fma.f32" if of is F32 else "llvm.fma.v16f32"
    factor = ir.Constant(of, 65536.0) if of is F32 else simd.constant(65536.0)
    return simd.call(b, name, of, b.sitofp(upper, of), factor, b.sitofp(lower, of))


@operation(void, int64, vector, vector)
def write_number(b: Builder, out: Value, first: Value, second: Value) -> None:
    """The float32 number that the sums of two times 16 columns are"""
    sums = b.add(b.bitcast(first, INTS), b.bitcast(second, INTS))
    for lanes in (8, 2, 1):
        order = ir.Constant(INTS, [(i + lanes) % LANES for i in range(LANES)])
        sums = b.add(sums, b.shuffle_vector(sums, sums, order))
    upper, lower = (b.extract_element(sums, I32(lane)) for lane in (0, 4))
    simd.store_at(b, _number(b, upper, lower, F32), out)


@kernel(void, *[int64] * 4)
def split_row(x, row, depth, kept):
    """Row `row` [depth] float32 to its words, the sums of its numbers and its scale; depth is a multiple of BLOCK."""
    out = kept + row * word_bytes(depth)
    factor = simd.splat(factor_of(x, depth, out + word_bytes(depth) - LINE))
    for k in range(0, depth, SUMMED):
        first = write_words(out + 4 * k, simd.mul(simd.load(x + 4 * k), factor))
        second = write_words(out + 4 * (k + LANES), simd.mul(simd.load(x + 4 * (k + LANES)), factor))
        write_number(out + 4 * depth + k // SUMMED * 4, first, second)


# Codes to words ----------------------------------------------------------------------------------


def _octets(b: Builder, low: Value, column: int) -> Iterator[tuple[int, int, Value]]:
    """Of 8 columns of codes of 8 bits: i, the vector of outputs, and (i, i + 4) as words."""
    at = simd.offset(b, low, PANEL * column)
    rows = [simd.load_at(b, simd.offset(b, at, 2 * PANEL * i), BYTES, 1) for i in range(4)]
    for i in range(4):
        prefetch(b, simd.offset(b, at, PREFETCH + LINE * i))
        for v in range(VECTORS):
            first = PANEL * (i % 2) + LANES * v
            order = [byte for n in range(LANES) for byte in (first + n, first + n, *[4 * LANES + first + n] * 2)]
            pairs = b.shuffle_vector(rows[i // 2], rows[2 + i // 2], ir.Constant(ir.VectorType(I32, 4 * LANES), order))
            yield i, v, b.bitcast(b.ashr(b.bitcast(pairs, HALVES), ir.Constant(HALVES, [8] * 2 * LANES)), INTS)


def _pairs(
    b: Builder, bits: int, low: Value, high: Value, zeros: list[Value], column: int
) -> Iterator[tuple[int, int, Value]]:
    """Of 8 columns: i, the vector of outputs, and the codes of columns (i, i + 4) less their zeros, as words."""
    if bits == 8:
        yield from _octets(b, low, column)
        return
    if bits == HELD:
        for i in range(4):
            for v in range(VECTORS):
                yield i, v, simd.load_at(b, simd.offset(b, low, WIDTH * (column // 2 + i) + 4 * LANES * v), INTS, 64)
        return
    mask = ir.Constant(INTS, [0x00FF00FF] * LANES)
    for v, odd, four in eight_columns(b, bits, low, high, column):
        for later in range(2):
            pair = b.and_(b.lshr(four, ir.Constant(INTS, [8] * LANES)) if later else four, mask)
            less = b.sub(b.bitcast(pair, HALVES), b.bitcast(zeros[v], HALVES))
            yield odd + 2 * later, v, b.bitcast(less, INTS)


# Products ----------------------------------------------------------------------------------------


def _unit(bits: int) -> int:
    """Columns that code is written for; groups have at least as many."""
    return 16 if bits in (6, HELD) else 32


def _unit_bytes(bits: int) -> tuple[int, int]:
    """How far a unit's codes reach, and their upper bits where those lie by themselves."""
    low, high = {4: (4, 0), 5: (4, 1), 6: (4, 2), 8: (8, 0), HELD: (16, 0)}[bits]
    return _unit(bits) * PANEL * low // 8, _unit(bits) * PANEL * high // 8


def _loop(b: Builder, carried: list[Value], body: Callable[[list[Value]], tuple[Value, list[Value]]]) -> list[Value]:
    """Emit a loop; carried: what it begins with. body(values) gives whether to go on and the next values; the last."""
    entry, loop, done = b.block, b.append_basic_block("loop"), b.append_basic_block("after")
    b.branch(loop)
    b.position_at_end(loop)
    phis = [b.phi(first.type) for first in carried]
    goes_on, following = body(list(phis))
    for phi, first, after in zip(phis, carried, following, strict=True):
        phi.add_incoming(first, entry)
        phi.add_incoming(after, b.block)
    b.cbranch(goes_on, loop, done)
    b.position_at_end(done)
    return following


def _multiplier(rows: int, bits: int) -> Any:
    """A numba function that adds n rows, `stride` bytes apart, times a block of a panel, and least [rows, PANEL], to
    out [rows, PANEL]; past n the last row is taken again. part: columns of a sum."""
    unit = _unit(bits)
    low_bytes, high_bytes = _unit_bytes(bits)
    each = [(row, v) for row in range(rows) for v in range(VECTORS)]

    @operation(void, *[int64] * 9)
    def multiply(
        b: Builder, low: Value, high: Value, records: Value, part: Value, x: Value, stride: Value, n: Value,
        least: Value, out: Value,
    ) -> None:  # fmt: skip
        """Rows times a block"""
        further = [I64(0)]
        for row in range(1, rows):
            step = b.select(b.icmp_signed("<", I64(row), n), stride, I64(0))
            further.append(b.add(further[-1], step))

        def add_part(values: list[Value]) -> tuple[Value, list[Value]]:
            column, low, high, record, x, *blocks = values

            def of_record(start: int, v: int, of: Any) -> Value:
                return simd.load_at(b, simd.offset(b, record, start + 4 * LANES * v), of, 4)

            zeros = [of_record(SCALE_BYTES, v, INTS) for v in range(VECTORS)] if bits < 8 else []
            end = b.add(column, part)

            def add_unit(values: list[Value]) -> tuple[Value, list[Value]]:
                column, low, high, x, *sums = values
                starts = [b.add(x, more) for more in further]
                for first in range(0, unit, 8):
                    for i, v, codes in _pairs(b, bits, low, high, zeros, first):
                        for row, start in enumerate(starts):
                            for word in range(2):
                                place = simd.offset(b, start, 4 * first + 16 * word + 4 * i)
                                value = simd.splat_of(b, simd.load_at(b, place, I32, 1), INTS)
                                at = 2 * each.index((row, v)) + word
                                sums[at] = _add_pairs(b, sums[at], codes, value)
                column = simd.offset(b, column, unit)
                after = [simd.offset(b, low, low_bytes), simd.offset(b, high, high_bytes), simd.offset(b, x, 4 * unit)]
                return b.icmp_signed("<", column, end), [column, *after, *sums]

            nothing = [ir.Constant(INTS, [0] * LANES)] * (2 * len(each))
            column, low, high, x, *sums = _loop(b, [column, low, high, x, *nothing], add_unit)
            for at, (_, v) in enumerate(each):
                value = _number(b, sums[2 * at], sums[2 * at + 1], VECTOR)
                blocks[at] = simd.fused(b, of_record(0, v, VECTOR), value, blocks[at])
            after = [column, low, high, simd.offset(b, record, RECORD), x]
            return b.icmp_signed("<", column, I64(BLOCK)), [*after, *blocks]

        own = [WIDTH * row + 4 * LANES * v for row, v in each]
        begun = [I64(0), low, high, records, x]
        begun += [simd.load_at(b, simd.offset(b, least, at), VECTOR, 4) for at in own]
        for at, block in zip(own, _loop(b, begun, add_part)[5:], strict=True):
            place = simd.offset(b, out, at)
            simd.store_at(b, b.fadd(simd.load_at(b, place, VECTOR, 4), block), place)

    return multiply


def _unpacker(bits: int) -> Any:
    """A numba function: (low, high, record, out) makes a unit's codes words."""

    @operation(void, *[int64] * 4)
    def unpack(b: Builder, low: Value, high: Value, record: Value, out: Value) -> None:
        """Codes to words"""
        zeros = [simd.load_at(b, simd.offset(b, record, SCALE_BYTES + 4 * LANES * v), INTS, 4) for v in range(VECTORS)]
        for first in range(0, _unit(bits), 8):
            for i, v, codes in _pairs(b, bits, low, high, zeros, first):
                simd.store_at(b, codes, simd.offset(b, out, WIDTH * (first // 2 + i) + 4 * LANES * v), 64)

    return unpack


@operation(void, int64, int64)
def write_zeros(b: Builder, zeros: Value, out: Value) -> None:
    """PANEL zeros, uint8, as pairs of words"""
    for v in range(VECTORS):
        own = b.zext(simd.load_at(b, simd.offset(b, zeros, LANES * v), FEW_BYTES, 1), INTS)
        simd.store_at(b, b.mul(own, _ones()), simd.offset(b, out, 4 * LANES * v))


@operation(void, int64, int64)
def write_zero(b: Builder, zero: Value, out: Value) -> None:
    """The same zero for PANEL outputs, as pairs of words"""
    own = simd.splat_of(b, b.trunc(zero, I32), INTS)
    for v in range(VECTORS):
        simd.store_at(b, b.mul(own, _ones()), simd.offset(b, out, 4 * LANES * v))


@kernel(void, *[int64] * 5)
def read_part(segment, panel, depth, k, out):
    """The record of the part that begins with column k: scales, minima (or what they would be), zeros."""
    read_scales(segment, panel, depth, k, out)
    kind = read_i64(segment + MINIMUM_KIND)
    if kind == ZERO_POINT:
        group = panel * read_i64(segment + GROUPS) + (k >> read_i64(segment + GROUP_SHIFT))
        write_zeros(read_i64(segment + MINIMUM) + group * PANEL, out + SCALE_BYTES)
    else:
        write_zero(read_i64(segment + ZERO_CODE) if kind == NO_MINIMUM else 0, out + SCALE_BYTES)


@kernel(void, *[int64] * 5)
def write_least(records, numbers, stride, count, out):
    """out [count, PANEL] = the minima of a block's groups times the sums of the rows' numbers: groups that have minima
    have 32 columns."""
    for _ in range(count):
        first, second = simd.splat(read_f32(numbers)), simd.splat(read_f32(numbers + 4))
        for v in range(0, WIDTH, 4 * LANES):
            own = simd.mul(simd.load(records + WIDTH + v), first)
            simd.store(out + v, simd.fma(simd.load(records + RECORD + WIDTH + v), second, own))
        numbers, out = numbers + stride, out + WIDTH


multiply_held = _multiplier(MOST, HELD)


def _by_bits(bits: int) -> Any:
    """A numba function that does what `_multiplier`'s do for any number of rows.

    numbers: where those of the first row are; 0: there are no minima, and scratch begins with zeros.
    """
    one, two, four, unpack = *(_multiplier(rows, bits) for rows in (1, 2, MOST)), _unpacker(bits)
    unit, (low_bytes, high_bytes) = _unit(bits), _unit_bytes(bits)

    @kernel(void, *[int64] * 10)
    def multiply(low, high, records, part, x, stride, count, numbers, out, scratch):
        codes = scratch + MOST * WIDTH
        if count > MOST:
            for k in range(0, BLOCK, unit):
                unpack(low, high, records + k // part * RECORD, codes + k * PANEL * 2)
                low, high = low + low_bytes, high + high_bytes
        elif numbers != 0:
            write_least(records, numbers, stride, count, scratch)
        if count == 1:
            one(low, high, records, part, x, stride, 1, scratch, out)
        elif count == 2:
            two(low, high, records, part, x, stride, 2, scratch, out)
        elif count <= MOST:
            four(low, high, records, part, x, stride, count, scratch, out)
        else:
            while count > 0:
                if numbers != 0:
                    write_least(records, numbers, stride, min(count, MOST), scratch)
                    numbers += MOST * stride
                multiply_held(codes, 0, records, part, x, stride, count, scratch, out)
                x, out, count = x + MOST * stride, out + MOST * WIDTH, count - MOST

    return multiply


multiply_fours, multiply_fives, multiply_sixes, multiply_eights = (_by_bits(bits) for bits in (4, 5, 6, 8))


@kernel(void, *[int64] * 9)
def multiply_words(segment, first, last, depth, x, row, count, scratch, out):
    """out [last - first, ROWS, PANEL] = rows `row`, ... times these panels of codes."""
    bits, low, high = read_i64(segment + BITS), read_i64(segment + LOW), read_i64(segment + HIGH)
    kind, stride = read_i64(segment + MINIMUM_KIND), word_bytes(depth)
    least, part = kind != NO_MINIMUM and kind != ZERO_POINT, min(BLOCK, 1 << read_i64(segment + GROUP_SHIFT))
    own, more = x + row * stride, scratch + BLOCK // 16 * RECORD
    for at in range(0, MOST * WIDTH, 4 * LANES):
        simd.store(more + at, simd.splat(ZERO))
    for panel in range(first, last):
        into = out + (panel - first) * ROWS * WIDTH
        for at in range(0, (count + MOST - 1) // MOST * MOST * WIDTH, 4 * LANES):
            simd.store(into + at, simd.splat(ZERO))
        for k in range(0, depth, BLOCK):
            for p in range(0, BLOCK, part):
                read_part(segment, panel, depth, k + p, scratch + p // part * RECORD)
            rows, at = own + 4 * k, (panel * depth + k) * PANEL
            numbers = own + 4 * depth + k // SUMMED * 4 if least else 0
            if bits == 4:
                multiply_fours(low + at // 2, 0, scratch, part, rows, stride, count, numbers, into, more)
            elif bits == 5:
                multiply_fives(low + at // 2, high + at // 8, scratch, part, rows, stride, count, numbers, into, more)
            elif bits == 6:
                multiply_sixes(low + at // 2, high + at // 4, scratch, part, rows, stride, count, numbers, into, more)
            else:
                multiply_eights(low + at, 0, scratch, part, rows, stride, count, numbers, into, more)
        for r in range(count):
            scale = simd.splat(read_f32(own + (r + 1) * stride - LINE))
            for v in range(0, WIDTH, 4 * LANES):
                simd.store(into + r * WIDTH + v, simd.mul(simd.load(into + r * WIDTH + v), scale))
