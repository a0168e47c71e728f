"""One row times weights in bfloat16, to the bits of the matrix units, by vectors.

With one row the matrix units wait for memory: they load a tile at a time, where vectors take each line as it comes.
What they compute is documented to the last bit (Intel's Software Developer's Manual, volume 2, TDPBF16PS): of the 32 k
of a tile the even ones are added up from zero, fused, and so are the odd ones, then both sums are added and added to
the total; subnormal numbers are zeros, in and out. The same in vectors is the same bits: tests compare them.

This module does not know threads, or where operands come from.
"""

from __future__ import annotations

from llvmlite import ir

from handloom.ops.cpu import simd
from handloom.ops.cpu.instructions import LINE, PIECES, TILE_DEPTH
from handloom.ops.cpu.pieces import lower_half, upper_half
from handloom.ops.cpu.simd import F32, I8, I32, I64, LANES, VECTOR, Builder, Value, int64, kernel, operation, void
from handloom.ops.cpu.tiles import PREFETCH, VECTORS, load_pair, prefetch

FLUSH = 0x8040  # in MXCSR: subnormal numbers are zeros, in and out
PAIR = 2 * VECTORS * LANES * 2  # bytes of two k of a panel
PIECE = TILE_DEPTH * 4  # bytes of a tile of a piece, as float32


def _set_control(b: Builder, place: Value) -> None:
    simd.call(b, "llvm.x86.sse.ldmxcsr", ir.VoidType(), b.bitcast(place, ir.PointerType(I8)))


@kernel(void, *[int64] * 3)
def widen_pieces(x, depth, out):
    """The three pieces of a row [depth] float32 as float32 [depth / 32, 3, 32], zeros after the last column."""
    for k in range(0, depth, TILE_DEPTH):
        for v in range(0, TILE_DEPTH, LANES):
            rest = simd.load_first(x + 4 * (k + v), depth - k - v)
            for piece in range(PIECES):
                simd.store(out + piece * PIECE + 4 * v, upper_half(rest))
                rest = lower_half(rest)
        out += PIECES * PIECE


@operation(void, int64, int64, int64, int64)
def multiply_row(b: Builder, x: Value, w: Value, count: Value, out: Value) -> None:
    """out [PANEL] float32 = pieces [count, 3, 32] times `count` tiles of a panel"""
    with b.goto_entry_block():
        before, flushing = b.alloca(I32), b.alloca(I32)
    simd.call(b, "llvm.x86.sse.stmxcsr", ir.VoidType(), b.bitcast(before, ir.PointerType(I8)))
    b.store(b.or_(b.load(before), I32(FLUSH)), flushing)
    _set_control(b, flushing)
    entry = b.block
    tile, loop, added, done = (b.function.append_basic_block(name) for name in ("tile", "pair", "added", "row"))
    b.branch(tile)
    b.position_at_end(tile)
    left, pieces, begin = b.phi(I64), b.phi(I64), b.phi(I64)
    totals = [b.phi(VECTOR) for _ in range(VECTORS)]
    for phi, start in zip((left, pieces, begin, *totals), (count, x, w, *[simd.constant(0.0)] * VECTORS), strict=True):
        phi.add_incoming(start, entry)
    b.branch(loop)
    b.position_at_end(loop)
    at, column = b.phi(I64), b.phi(I64)
    at.add_incoming(I64(0), tile)
    column.add_incoming(begin, tile)
    after = _add_pair(b, pieces, at, column, tile)
    following, next_column = b.add(at, I64(8)), simd.offset(b, column, PAIR)
    at.add_incoming(following, loop)
    column.add_incoming(next_column, loop)
    b.cbranch(b.icmp_signed("<", following, I64(PIECE)), loop, added)
    b.position_at_end(added)
    rest = b.sub(left, I64(1))
    for phi, new in ((left, rest), (pieces, simd.offset(b, pieces, PIECES * PIECE)), (begin, next_column)):
        phi.add_incoming(new, added)
    for v, total in enumerate(totals):
        new = total
        for even, odd in after[v]:
            new = b.fadd(new, b.fadd(even, odd))
        total.add_incoming(new, added)
        simd.store_at(b, new, simd.offset(b, out, LANES * 4 * v))
    b.cbranch(b.icmp_signed(">", rest, I64(0)), tile, done)
    b.position_at_end(done)
    _set_control(b, before)


def _add_pair(b: Builder, pieces: Value, at: Value, w: Value, entry: Value) -> list[list[list[Value]]]:
    """In a loop's body: two k, `at` bytes after the first of each piece, times those of a panel at w, added to sums
    that begin at zero. Of each vector of the panel and each piece: the sums of even and of odd k."""
    sums = [[[b.phi(VECTOR) for _ in range(2)] for _ in range(PIECES)] for _ in range(VECTORS)]
    x = b.add(pieces, at)
    prefetch(b, simd.offset(b, w, PREFETCH), frame=False)
    weights = [load_pair(b, simd.offset(b, w, LANES * 4 * v)) for v in range(VECTORS)]
    after: list[list[list[Value]]] = [[[] for _ in range(PIECES)] for _ in weights]
    for piece in range(PIECES):
        for half in range(2):
            number = simd.load_at(b, simd.offset(b, x, piece * PIECE + 4 * half), F32, 4)
            value = simd.splat_of(b, number, VECTOR)
            for v, pair in enumerate(weights):
                total = sums[v][piece][half]
                new = simd.fused(b, value, pair[half], total)
                total.add_incoming(simd.constant(0.0), entry)
                total.add_incoming(new, b.block)
                after[v][piece].append(new)
    prefetch(b, simd.offset(b, w, PREFETCH + LINE), frame=False)
    return after
