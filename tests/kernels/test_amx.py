"""Tiles of the matrix units multiply, in as many rows as they were taken with."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
from numba import njit

from handloom.ops.cpu import amx, matrix_units
from handloom.ops.cpu.simd import I64, int64, operation, void

needs_units = pytest.mark.skipif(not matrix_units.usable(), reason="this processor or system has no AMX")


def product_of(multiply: Any) -> Any:
    """A function: (x, w, out, rows) adds the product of two tiles to out, `rows` rows of it."""

    @operation(void, *[int64] * 4)
    def tiles(b: Any, x: Any, w: Any, out: Any, rows: Any) -> None:
        """One product"""
        amx.configure(b, {0: rows, 6: rows})
        amx.load(b, 0, out, I64(64))
        amx.load(b, 6, x, I64(64))
        amx.load(b, 7, w, I64(64))
        multiply(b, 0, 6, 7)
        amx.store(b, 0, out, I64(64))

    @njit
    def product(x: int, w: int, out: int, rows: int) -> None:
        tiles(x, w, out, rows)
        amx.release()

    return product


@needs_units
@pytest.mark.parametrize("rows", [1, 5, 16])
def test_tiles_of_int8_are_multiplied_exactly(rows: int) -> None:
    rng = np.random.default_rng(rows)
    x, w = (rng.integers(-128, 128, shape, dtype=np.int8) for shape in ((16, 64), (16, 16, 4)))
    out = rng.integers(-1000, 1000, (16, 16), dtype=np.int32)
    expected = out.copy()
    expected[:rows] += (x.astype(np.int32) @ w.astype(np.int32).transpose(0, 2, 1).reshape(64, 16))[:rows]
    product_of(amx.multiply_int8)(x.ctypes.data, w.ctypes.data, out.ctypes.data, rows)
    assert (out == expected).all()


@needs_units
@pytest.mark.parametrize("rows", [1, 5, 16])
def test_tiles_of_bfloat16_are_multiplied_in_float32(rows: int) -> None:
    """Of whole numbers whose sums float32 holds exactly."""
    rng = np.random.default_rng(rows)
    x, w = (rng.integers(-128, 128, shape).astype(np.float32) for shape in ((16, 32), (16, 16, 2)))
    out = rng.integers(-1000, 1000, (16, 16)).astype(np.float32)
    expected = out.copy()
    expected[:rows] += (x @ w.transpose(0, 2, 1).reshape(32, 16))[:rows]
    halves = [np.ascontiguousarray(values.view(np.uint16)[..., 1::2]) for values in (x, w)]
    assert sys.byteorder == "little"
    product_of(amx.multiply_bf16)(halves[0].ctypes.data, halves[1].ctypes.data, out.ctypes.data, rows)
    assert (out == expected).all()
