"""Products with codes of 4 bits in groups, from rows as digits: `digits` says what these are.

The whole numbers of 32 columns are summed exactly, as (code - zero) times digits, made one float32, and times the scale
of their group added to those of the next 32: these blocks of 64 columns are added in order. So one row, in vectors
(VNNI), gives the bits that it gives among many, in matrix units (AMX). Of a word of 8 codes the four low halves of its
bytes are the even columns, as these products want four side by side, and the four high halves the odd ones.

This module does not know threads, or where operands come from.
"""

from __future__ import annotations

from llvmlite import ir

from handloom.ops.cpu import amx, simd
from handloom.ops.cpu.amx import TILE_BYTES
from handloom.ops.cpu.codes import (
    BITS,
    GROUP_SHIFT,
    GROUPS,
    LOW,
    MINIMUM,
    MINIMUM_KIND,
    NO_MINIMUM,
    SCALE,
    ZERO,
    ZERO_CODE,
    load_f16,
)
from handloom.ops.cpu.digits import (
    PART,
    ROW_OF_SUMS,
    SUMS_BYTES,
    WIDTH,
    add_fours,
    end,
    multiplier,
    multiply_digits,
    number,
    number_of,
    quad_bytes,
    scale_of,
)  # fmt: skip
from handloom.ops.cpu.instructions import BLOCK, DIGITS, LINE, QUAD, ROWS
from handloom.ops.cpu.simd import (
    F32,
    I8,
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
    void,
    write_i64,
)
from handloom.ops.cpu.tiles import PREFETCH, VECTORS, prefetch
from handloom.ops.panels import PANEL

SLOTS = 4  # sums of two parts, and of the two before them
FEW = 2  # rows that are taken one after the other in vectors
BYTES, FEW_BYTES = ir.VectorType(I8, 4 * LANES), ir.VectorType(I8, LANES)
HALF = ir.VectorType(ir.HalfType(), LANES)

multiply = multiplier(PART)


def _nibbles(b: Builder, codes: Value) -> list[Value]:
    """The even and the odd ones of 8 columns of 16 outputs, four bytes side by side."""
    word, mask = simd.load_at(b, codes, INTS, 4), ir.Constant(INTS, [0x0F0F0F0F] * LANES)
    return [b.and_(word, mask), b.and_(b.lshr(word, ir.Constant(INTS, [4] * LANES)), mask)]


def _zeros(b: Builder, address: Value) -> Value:
    return b.zext(simd.load_at(b, address, FEW_BYTES, 1), INTS)


@operation(void, *[int64] * 10)
def multiply_one(
    b: Builder, codes: Value, x: Value, parts: Value, own: Value, depth: Value, shift: Value, scales: Value,
    zeros: Value, zero_step: Value, out: Value,
) -> None:  # fmt: skip
    """out [PANEL] = one row times a panel; x, parts, own: its digits, the sums of them, its scale.

    scales, zeros: of the panel's first group; zero_step: bytes from a group's zeros to the next's.
    """
    entry, loop, done = b.block, b.append_basic_block("columns"), b.append_basic_block("summed")
    b.branch(loop)
    b.position_at_end(loop)
    k = b.phi(I64)
    begun = [b.phi(VECTOR) for _ in range(VECTORS)]
    blocks: list[Value] = [None] * VECTORS
    at, tile = b.add(codes, b.shl(k, I64(4))), b.add(x, b.shl(k, I64(4)))
    for half in range(0, BLOCK, PART):
        group = b.lshr(simd.offset(b, k, half), shift)
        line = b.add(parts, simd.offset(b, b.shl(k, I64(1)), LINE * half // PART))
        place, zero = b.add(scales, b.shl(group, I64(6))), b.add(zeros, b.mul(group, zero_step))
        counts = [simd.load_at(b, simd.offset(b, line, 4 * digit), I32, 4) for digit in range(DIGITS)]
        less, nothing = [simd.splat_of(b, count, INTS) for count in counts], ir.Constant(INTS, [0] * LANES)
        sums = []
        for v in range(VECTORS):
            z = _zeros(b, simd.offset(b, zero, LANES * v))
            sums.append([simd.call(b, "llvm.x86.avx512.vpdpwssd.512", INTS, nothing, z, n) for n in less])
        for i in range(half // 8, (half + PART) // 8):
            fours = [_nibbles(b, simd.offset(b, at, WIDTH * i + 4 * LANES * v)) for v in range(VECTORS)]
            for odd in range(2):
                for digit in range(DIGITS):
                    four = simd.offset(b, tile, BLOCK * digit + 8 * i + 4 * odd)
                    value = simd.splat_of(b, simd.load_at(b, four, I32, 1), INTS)
                    for v in range(VECTORS):
                        sums[v][digit] = add_fours(b, sums[v][digit], fours[v][odd], value)
                prefetch(b, simd.offset(b, at, PREFETCH + WIDTH * i + LINE * odd))
        for v in range(VECTORS):
            scale = b.fpext(simd.load_at(b, simd.offset(b, place, 2 * LANES * v), HALF, 2), VECTOR)
            value = number_of(b, sums[v])
            blocks[v] = simd.fused(b, scale, value, blocks[v]) if half else b.fmul(scale, value)
    totals = [b.fadd(total, block) for total, block in zip(begun, blocks, strict=True)]
    following = simd.offset(b, k, BLOCK)
    k.add_incoming(I64(0), entry)
    k.add_incoming(following, loop)
    for phi, total in zip(begun, totals, strict=True):
        phi.add_incoming(simd.constant(0.0), entry)
        phi.add_incoming(total, loop)
    b.cbranch(b.icmp_signed("<", following, depth), loop, done)
    b.position_at_end(done)
    scale = simd.splat_of(b, simd.load_at(b, own, F32, 4), VECTOR)
    for v, total in enumerate(totals):
        simd.store_at(b, b.fmul(total, scale), simd.offset(b, out, 4 * LANES * v))


@operation(void, int64, int64, int64)
def codes_to_tiles(b: Builder, codes: Value, zeros: Value, out: Value) -> None:
    """Codes of PART columns less their zeros as VECTORS tiles [PART / 4, 16, 4]"""
    for v in range(VECTORS):
        zero = _zeros(b, simd.offset(b, zeros, LANES * v))
        zero = b.bitcast(b.mul(zero, ir.Constant(INTS, [0x01010101] * LANES)), BYTES)
        for i in range(PART // 8):
            at = simd.offset(b, codes, WIDTH * i + 4 * LANES * v)
            prefetch(b, simd.offset(b, at, PREFETCH))
            for odd, four in enumerate(_nibbles(b, at)):
                place = simd.offset(b, out, LANES * PART * v + 4 * LANES * (2 * i + odd))
                simd.store_at(b, b.sub(b.bitcast(four, BYTES), zero), place, 64)


@operation(void, int64)
def configure(b: Builder, rows: Value) -> None:
    """Take tiles for products of so many rows of digits and PART columns, their sums zero"""
    amx.configure(b, dict.fromkeys((0, 1, 2, 3, 6, 7), rows) | dict.fromkeys((4, 5), I64(PART // 4)), PART)


@kernel(void, *[int64] * 6)
def add_sums(sums, count, scales, other, first, out):
    """out [count, PANEL] += the numbers of a block's two parts times the scales of their groups; first: out is zero."""
    for _ in range(count):
        for v in range(0, PANEL, LANES):
            block = simd.mul(load_f16(scales + 2 * v), number(sums + 4 * v))
            block = simd.fma(load_f16(other + 2 * v), number(sums + SUMS_BYTES + 4 * v), block)
            simd.store(out + 4 * v, simd.add(simd.splat(ZERO) if first else simd.load(out + 4 * v), block))
        sums, out = sums + ROW_OF_SUMS, out + WIDTH


@kernel(void, *[int64] * 10)
def multiply_many(low, scales, zeros, step, shift, depth, x, count, scratch, out):
    """out [count, PANEL] = rows times a panel, in the matrix units; those of x begin with a quad."""
    size, codes, width = quad_bytes(depth), scratch + SLOTS * SUMS_BYTES, PANEL if count > 2 * QUAD else 0
    slot, waiting, of, other, begin, into = 0, 0, scales, scales, 0, out
    for at in range(0, count, 2 * QUAD):
        rows, both = x + at // QUAD * size, int(count - at > QUAD)
        for k in range(0, depth, BLOCK):
            slot = 2 * SUMS_BYTES - slot
            for part in range(0, BLOCK, PART):
                here, tile = codes + (k + part) * width, rows + k // BLOCK * TILE_BYTES + part
                if at == 0:
                    codes_to_tiles(low + (k + part) * PANEL // 2, zeros + ((k + part) >> shift) * step, here)
                multiply(tile, tile + size, both, here)
                end(both, scratch + slot + part // PART * SUMS_BYTES)
            add_sums(scratch + 2 * SUMS_BYTES - slot, waiting, of, other, begin, into)
            waiting, begin, into = min(2 * QUAD, count - at), int(k == 0), out + at * WIDTH
            of, other = scales + (k >> shift) * 2 * PANEL, scales + ((k + PART) >> shift) * 2 * PANEL
    add_sums(scratch + slot, waiting, of, other, begin, into)
    for row in range(count):
        own = simd.splat(read_f32(scale_of(x, depth, row)))
        for v in range(0, WIDTH, 4 * LANES):
            simd.store(out + row * WIDTH + v, simd.mul(simd.load(out + row * WIDTH + v), own))


@kernel(void, *[int64] * 9)
def multiply_groups(segment, first, last, depth, x, row, count, scratch, out):
    """out [last - first, ROWS, PANEL] = rows `row`, ..., a multiple of QUAD, times these panels of codes in groups."""
    groups, shift = read_i64(segment + GROUPS), read_i64(segment + GROUP_SHIFT)
    low, scales, zeros, step = read_i64(segment + LOW), read_i64(segment + SCALE), read_i64(segment + MINIMUM), PANEL
    if read_i64(segment + MINIMUM_KIND) == NO_MINIMUM:
        zeros, step = scratch + SLOTS * SUMS_BYTES + depth * PANEL, 0
        for i in range(0, PANEL, 8):
            write_i64(zeros + i, read_i64(segment + ZERO_CODE) * 0x0101010101010101)
    x += row // QUAD * quad_bytes(depth)
    if count > FEW:
        configure(DIGITS * min(count, QUAD))
    for panel in range(first, last):
        codes, scale = low + panel * depth * PANEL // 2, scales + panel * groups * 2 * PANEL
        zero, into = zeros + panel * groups * step, out + (panel - first) * ROWS * WIDTH
        if count > FEW:
            multiply_many(codes, scale, zero, step, shift, depth, x, count, scratch, into)
        else:
            for i in range(count):
                own = scale_of(x, depth, i)
                parts = x + depth * QUAD * DIGITS + 2 * LINE + 4 * DIGITS * i
                digits = x + i * DIGITS * BLOCK
                multiply_one(codes, digits, parts, own, depth, shift, scale, zero, step, into + i * WIDTH)
    if count > FEW:
        amx.release()


@kernel(void, *[int64] * 9)
def multiply_codes(segment, first, last, depth, x, row, count, scratch, out):
    """As `multiply_digits` or `multiply_groups`."""
    if read_i64(segment + BITS) == 8:
        multiply_digits(segment, first, last, depth, x, row, count, scratch, out)
    else:
        multiply_groups(segment, first, last, depth, x, row, count, scratch, out)
