"""The one inner loop of every matrix product: a tile of rows times columns, summed over k in the order of k.

A weight lies in panels of PANEL columns, k after k: panel[k, 0..PANEL), or two k side by side: panel[k / 2, 0..PANEL,
2]. Each output is one lane of an accumulator, which adds x[k] * w[k] for k in order, fused. How many rows and vectors a
tile has, and on what processor, decides how many such sums go on at once and never their order: one row alone gets the
bits that it gets among a thousand.

To hold weights in another form, add a Format: how 16 columns of one k become 16 float32.

This module does not know threads, layers or the shapes of matrices.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llvmlite import binding, ir
from numba.core.registry import cpu_target

from handloom.ops.cpu import simd
from handloom.ops.cpu.instructions import BLOCK, LINE
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
    operation,
    vector,
    void,
)
from handloom.ops.panels import PANEL

VECTORS = PANEL // LANES
PREFETCH = 6144
"""Bytes ahead that are asked for. Of two neighbouring lines the second is asked for after the sums: at once they come
more slowly. One row of float32 has too few for that; asking for the first alone, a little ahead, is fastest."""
PREFETCH_NEAR = 1024


@dataclass(frozen=True)
class Format:
    """How weights lie in memory. load(builder, address): LANES columns of one k, each `size` bytes, as a VECTOR.

    load_pair: where two k lie side by side, LANES columns of both, as two VECTORs.
    """

    size: int
    load: Callable[[Builder, Value], Value]
    load_pair: Callable[[Builder, Value], list[Value]] | None = None

    def weights(self, b: Builder, address: Value) -> list[Value]:
        """LANES columns of one k, or of two."""
        return [self.load(b, address)] if self.load_pair is None else self.load_pair(b, address)

    @property
    def together(self) -> int:
        """How many k lie side by side."""
        return 1 if self.load_pair is None else 2


def _load_f32(b: Builder, address: Value) -> Value:
    return simd.load_at(b, address, VECTOR, 4)


def _load_bf16(b: Builder, address: Value) -> Value:
    halves = simd.load_at(b, address, ir.VectorType(I16, LANES), 2)
    return b.bitcast(b.shl(b.zext(halves, INTS), ir.Constant(INTS, [16] * LANES)), VECTOR)


def load_pair(b: Builder, address: Value) -> list[Value]:
    """16 pairs of bfloat16: the first of each, and the second"""
    both = simd.load_at(b, address, INTS, 4)
    first = b.shl(both, ir.Constant(INTS, [16] * LANES))
    second = b.and_(both, ir.Constant(INTS, [0xFFFF0000 - (1 << 32)] * LANES))
    return [b.bitcast(first, VECTOR), b.bitcast(second, VECTOR)]


def _load_f16(b: Builder, address: Value) -> Value:
    return b.fpext(simd.load_at(b, address, ir.VectorType(ir.HalfType(), LANES), 2), VECTOR)


FORMAT_F32, FORMAT_BF16, FORMAT_F16 = range(3)
FORMATS = (Format(4, _load_f32), Format(2, _load_bf16), Format(2, _load_f16))
IN_PANELS = (FORMATS[FORMAT_F32], Format(2, _load_bf16, load_pair=load_pair), FORMATS[FORMAT_F16])


@operation(vector, int64)
def load_bf16(b: Builder, address: Value) -> Value:
    """16 bfloat16"""
    return _load_bf16(b, address)


@operation(vector, int64)
def load_even_bf16(b: Builder, address: Value) -> Value:
    """The first of each of 16 pairs of bfloat16"""
    return load_pair(b, address)[0]


@operation(vector, int64)
def load_odd_bf16(b: Builder, address: Value) -> Value:
    """The second of each of 16 pairs of bfloat16"""
    return load_pair(b, address)[1]


PROBE = """
declare <16 x float> @llvm.fma.v16f32(<16 x float>, <16 x float>, <16 x float>)
define <16 x float> @probe(<16 x float> %x, <16 x half> %y) {
  %z = fpext <16 x half> %y to <16 x float>
  %sum = call <16 x float> @llvm.fma.v16f32(<16 x float> %x, <16 x float> %z, <16 x float> %x)
  ret <16 x float> %sum
}
"""


def assembly() -> str:
    """Of the probe, for the processor that numba compiles for, which its environment variables may name."""
    triple, processor, features = cpu_target.target_context.codegen().magic_tuple()
    machine = binding.Target.from_triple(triple).create_target_machine(cpu=processor, features=features)
    text: str = machine.emit_assembly(binding.parse_assembly(PROBE))
    return text


WIDE = "zmm" in assembly()
"""Whether there are 32 registers of 16 floats (AVX-512), and not 16 of 8, or 32 of 4."""
# rows of the tiles from large to small, each with as many vectors of the panel as the registers hold
TILE_ROWS = (14, 8, 4, 2, 1) if WIDE else (6, 4, 2, 1)


def tile_of(rows: int, columns: int, form: Format, panels: int = 1, *, asks: bool = True, fills: bool = True) -> Any:
    """A numba function that multiplies x [rows, k] with columns * LANES columns of one panel, or of two at once.

    tile(x, x_stride, n, w, w_next, w_stride, k, out, out_next, out_stride, accumulate): addresses and strides in bytes,
    k > 0; 0 < n <= rows: past n the last row is taken again, if it `fills`, and else n = rows, whose places need fewer
    registers; w_next, out_next: from a panel, and from its product, to those of the other. The product is stored in out
    [n, columns * LANES] float32, or added to what is there, a block of BLOCK k after the other. Where two k lie side by
    side, k is even and w_stride goes from two to the next two. asks: weights are asked for ahead.
    """
    together = form.together
    width = LANES * form.size * together

    @operation(void, *[int64] * 11)
    def tile(
        b: Builder,
        x: Value,
        x_stride: Value,
        n: Value,
        w: Value,
        w_next: Value,
        w_stride: Value,
        k: Value,
        out: Value,
        out_next: Value,
        stride: Value,
        add: Value,
    ) -> None:
        """Rows of x times one or two panels"""
        entry = b.block
        block, loop, done, over = (b.function.append_basic_block(name) for name in ("block", "k", "sums", "tile"))
        there = n if fills else I64(rows)
        starts, places = _rows(b, rows, there, x, x_stride), _rows(b, rows, there, out, stride)
        b.branch(block)
        b.position_at_end(block)
        first, begin, adding = b.phi(I64), b.phi(I64), b.phi(I64)
        for phi, value in ((first, I64(0)), (begin, w), (adding, add)):
            phi.add_incoming(value, entry)
        end = b.add(first, I64(BLOCK))
        end = b.select(b.icmp_signed("<", end, k), end, k)
        b.branch(loop)
        b.position_at_end(loop)
        at, column = b.phi(I64), b.phi(I64)
        at.add_incoming(first, block)
        column.add_incoming(begin, block)
        sums = [[b.phi(VECTOR) for _ in range(panels * columns)] for _ in range(rows)]
        lines = [column, b.add(column, w_next)][:panels]
        weights = [form.weights(b, simd.offset(b, line, width * v)) for line in lines for v in range(columns)]
        two_lines = columns * width > LINE
        near = two_lines and rows * together == 1
        for line in lines if asks else []:
            prefetch(b, simd.offset(b, line, PREFETCH_NEAR if near else PREFETCH))
        after = _accumulate(b, starts, at, weights, sums, block)
        for line in lines if asks and two_lines and not near else []:
            prefetch(b, simd.offset(b, line, PREFETCH + LINE))
        following, next_column = b.add(at, I64(together)), b.add(column, w_stride)
        at.add_incoming(following, loop)
        column.add_incoming(next_column, loop)
        b.cbranch(b.icmp_signed("<", following, end), loop, done)
        b.position_at_end(done)
        products = [row[i * columns : (i + 1) * columns] for i in range(panels) for row in after]
        _finish(b, products, [*places, *(b.add(place, out_next) for place in places)][: len(products)], adding)
        for phi, value in ((first, end), (begin, next_column), (adding, I64(1))):
            phi.add_incoming(value, b.block)
        b.cbranch(b.icmp_signed("<", end, k), block, over)
        b.position_at_end(over)

    return tile


def scattered_tile_of(rows: int, columns: int, form: Format, ahead: int = 0) -> Any:
    """A numba function that multiplies n rows of x with w [k, columns * LANES], which lies in pieces of LANES rows.

    tile(x, x_stride, n, places, w_offset, w_stride, k, out, out_stride, accumulate): as `tile_of`; places: addresses
    of the pieces, w_offset bytes are added to each; 0 < n <= rows: past n the last row is taken again. ahead: how many
    pieces ahead is asked for; `places` has so many more, which may be anywhere.
    """
    width = LANES * form.size

    @operation(void, *[int64] * 10)
    def tile(
        b: Builder,
        x: Value,
        x_stride: Value,
        n: Value,
        pieces: Value,
        w_offset: Value,
        w_stride: Value,
        k: Value,
        out: Value,
        stride: Value,
        add: Value,
    ) -> None:
        """A few rows of x times what lies in pieces"""
        entry = b.block
        block, loop, done, over = (b.function.append_basic_block(name) for name in ("block", "k", "sums", "tile"))
        starts, places = _rows(b, rows, n, x, x_stride), _rows(b, rows, n, out, stride)
        b.branch(block)
        b.position_at_end(block)
        first, adding = b.phi(I64), b.phi(I64)
        for phi, value in ((first, I64(0)), (adding, add)):
            phi.add_incoming(value, entry)
        end = b.add(first, I64(BLOCK))
        end = b.select(b.icmp_signed("<", end, k), end, k)
        b.branch(loop)
        b.position_at_end(loop)
        at = b.phi(I64)
        at.add_incoming(first, block)
        sums = [[b.phi(VECTOR) for _ in range(columns)] for _ in range(rows)]
        piece = b.add(pieces, b.shl(b.lshr(at, I64(4)), I64(3)))
        within = b.add(b.mul(b.and_(at, I64(LANES - 1)), w_stride), w_offset)
        column = b.add(simd.load_at(b, piece, I64, 8), within)
        weights = [[form.load(b, simd.offset(b, column, width * v))] for v in range(columns)]
        if ahead:
            asked = b.add(simd.load_at(b, simd.offset(b, piece, 8 * ahead), I64, 8), within)
            for line in range(0, columns * width, LINE):
                prefetch(b, simd.offset(b, asked, line))
        after = _accumulate(b, starts, at, weights, sums, block)
        following = b.add(at, I64(1))
        at.add_incoming(following, loop)
        b.cbranch(b.icmp_signed("<", following, end), loop, done)
        b.position_at_end(done)
        _finish(b, after, places, adding)
        for phi, value in ((first, end), (adding, I64(1))):
            phi.add_incoming(value, b.block)
        b.cbranch(b.icmp_signed("<", end, k), block, over)
        b.position_at_end(over)

    return tile


FRAME_ADDRESS = "llvm.frameaddress.p0"


def prefetch(b: Builder, address: Value, *, frame: bool = True) -> None:
    """Ask for a line of memory that will be read, into the second cache: the first has no room for so many requests.

    frame: have the register that may hold the frame's address hold it. On x86-64 that is rbp, and what is asked for
    through it comes late: 8 rows of float32 take half as long again, where the weights come from memory. (The matrix
    kernels do not ask: rbp is free there, and one row of bfloat16 took 8 % longer in the same loop. Sapphire Rapids.)
    """
    first = b.function.entry_basic_block
    if frame and not any(getattr(known, "callee", first).name == FRAME_ADDRESS for known in first.instructions):
        with b.goto_entry_block():
            kept = simd.call(b, FRAME_ADDRESS, ir.PointerType(simd.I8), I32(0))
            b.asm(ir.FunctionType(ir.VoidType(), [kept.type]), "", "r", [kept], True)
    simd.call(b, "llvm.prefetch.p0", ir.VoidType(), simd.pointer(b, address, simd.I8), I32(0), I32(2), I32(1))


@operation(void, int64)
def ask_for(b: Builder, address: Value) -> None:
    """Ask for a line of memory"""
    prefetch(b, address)


def _rows(b: Builder, rows: int, n: Value, first: Value, stride: Value) -> list[Value]:
    """Where rows begin; past n the last again."""
    starts = [first]
    for row in range(1, rows):
        starts.append(b.add(starts[-1], b.select(b.icmp_signed("<", I64(row), n), stride, I64(0))))
    return starts


def _accumulate(
    b: Builder, starts: list[Value], at: Value, weights: list[list[Value]], sums: list[list[Value]], entry: Value
) -> list[list[Value]]:
    """In a loop's body: each row's numbers from column `at` on times the weights of as many k, added to its sums.

    weights: for each vector those of one k, or of several in order; sums: of each row a phi for each vector, which
    begin at zero and go on with what is returned.
    """
    after = []
    for start, row in zip(starts, sums, strict=True):
        totals = list(row)
        for j in range(len(weights[0])):
            place = simd.offset(b, b.add(start, b.shl(at, I64(2))), 4 * j)
            value = simd.splat_of(b, simd.load_at(b, place, F32, 4), VECTOR)
            totals = [simd.fused(b, value, own[j], total) for own, total in zip(weights, totals, strict=True)]
        for total, new in zip(row, totals, strict=True):
            total.add_incoming(simd.constant(0.0), entry)
            total.add_incoming(new, b.block)
        after.append(totals)
    return after


def _finish(b: Builder, sums: list[list[Value]], places: list[Value], add: Value) -> None:
    """Store the rows of sums, or add them to what is there: once, where two rows have the same place."""
    with b.if_else(b.icmp_signed("!=", add, I64(0))) as (adding, storing):
        for branch, accumulate in ((adding, True), (storing, False)):
            with branch:
                found = []
                for values, row in zip(sums, places, strict=True):
                    for v, value in enumerate(values):
                        at = simd.offset(b, row, LANES * 4 * v)
                        total = b.fadd(simd.load_at(b, at, VECTOR, 4), value) if accumulate else value
                        found.append((total, at))
                for total, at in found:
                    simd.store_at(b, total, at)
