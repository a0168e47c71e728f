"""Tiles of x86-64's matrix units (AMX) in numba: 8 registers of 16 rows of 64 bytes, and their products.

The instructions are those of Intel's Software Developer's Manual, volume 2: c[m, n] += sum over k of a[m, k] * b[k, n],
where a row of b holds as many k as fill 4 bytes, side by side: 2 of bfloat16, 4 of int8. Sums go in an order that
depends on k alone, so a row of c depends on its own row of a, whatever stands in the others. Products of bfloat16 take
subnormal numbers as zero, and round sums to nearest.

A thread has tiles between `configure` and `release`. The process has to have asked for them: see `matrix_units`.

This module does not know what is multiplied.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from handloom.ops.cpu import simd
from handloom.ops.cpu.simd import I8, I64, Builder, Value, operation, void

ROWS, ROW_BYTES = 16, 64
TILE_BYTES = ROWS * ROW_BYTES
REGISTERS = 8

VNNI = ("avx512vnni", "avx512vbmi")
FEATURES = ("amx-tile", "amx-bf16", "amx-int8", *VNNI)


AMX = simd.compiled_for(*FEATURES)
"""Whether code with these instructions can be compiled, for the processor that numba compiles for."""


def configure(b: Builder, rows: dict[int, Value], row_bytes: int = ROW_BYTES) -> None:
    """Take all tiles, of ROWS rows, or as many as said (int64, 1 to ROWS) of some; they are zero then.

    row_bytes: of tiles 6 and 7.
    """
    with b.goto_entry_block():
        place = b.alloca(ir.ArrayType(I8, 64))
        place.align = 64
    widths = [ROW_BYTES] * (REGISTERS - 2) + [row_bytes] * 2
    whole = [1, *[0] * 15, *(byte for width in widths for byte in (width, 0)), *[0] * 16, *[ROWS] * REGISTERS]
    b.store(ir.Constant(ir.ArrayType(I8, 64), whole + [0] * 8), place)
    for tile, count in rows.items():
        b.store(b.trunc(count, I8), b.gep(place, [I64(0), I64(48 + tile)]))
    _emit(b, "llvm.x86.ldtilecfg", b.bitcast(place, ir.PointerType(I8)))


def zero(b: Builder, tile: int) -> None:
    """tile = 0"""
    _emit(b, "llvm.x86.tilezero", I8(tile))


def load(b: Builder, tile: int, address: Value, stride: Value) -> None:
    """Rows of 64 bytes, `stride` bytes (int64) apart"""
    _emit(b, "llvm.x86.tileloadd64", I8(tile), simd.pointer(b, address, I8), stride)


def store(b: Builder, tile: int, address: Value, stride: Value) -> None:
    """Rows of 64 bytes, `stride` bytes (int64) apart"""
    _emit(b, "llvm.x86.tilestored64", I8(tile), simd.pointer(b, address, I8), stride)


def multiply_bf16(b: Builder, out: int, x: int, w: int) -> None:
    """out float32 [ROWS, 16] += x bfloat16 [ROWS, 32] times w [16, 16, 2]"""
    _emit(b, "llvm.x86.tdpbf16ps", I8(out), I8(x), I8(w))


def multiply_int8(b: Builder, out: int, x: int, w: int) -> None:
    """out int32 [ROWS, 16] += x int8 [ROWS, 64] times w int8 [16, 16, 4]"""
    _emit(b, "llvm.x86.tdpbssd", I8(out), I8(x), I8(w))


@operation(void)
def release(b: Builder) -> None:
    """Give the tiles back: a switch to another thread need not keep them"""
    _emit(b, "llvm.x86.tilerelease")


def _emit(b: Builder, name: str, *values: Any) -> None:
    simd.call(b, name, ir.VoidType(), *values)
