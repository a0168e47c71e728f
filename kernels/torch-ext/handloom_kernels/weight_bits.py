"""Codes of quantised weights to floats, in registers, with as few instructions as there are.

This module does not know how codes are packed or what they are multiplied with.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.constexpr_function
def one_apart(dtype):
    """The bits of the power of two whose neighbours in `dtype` are 1 apart."""
    return {"fp16": 0x6400, "bf16": 0x4300}.get(dtype.name, 0)


@triton.constexpr_function
def fp8_shift(dtype):
    """How far e4m3's exponent is from that of `dtype`, in bits."""
    return {"fp16": 7, "bf16": 4}.get(dtype.name, 20)


@triton.constexpr_function
def fp8_scale(dtype):
    """2 to the difference between the biases of e4m3's exponent and that of `dtype`."""
    return 2.0**8 if dtype.name == "fp16" else 2.0**120


@triton.jit
def _floats(bits, second, dtype: tl.constexpr):
    """The 16-bit float in the lower half of each word, and in its upper half where `second` is 1."""
    return ((bits >> (16 * second)) & 0xFFFF).to(tl.uint16).to(dtype, bitcast=True)


@triton.jit
def decode(words, KIND: tl.constexpr, dtype: tl.constexpr):
    """The words' codes as exact numbers of `dtype`, int4 codes less 8.

    words [.., 1, 1 or 2, 1] of nine axes gain the last three: row / 8, column / 8 % 2 (8 bits have it), column % 2.
    """
    half = tl.reshape(tl.arange(0, 2), (1, 1, 1, 1, 1, 1, 2, 1, 1))
    second = tl.reshape(tl.arange(0, 2), (1, 1, 1, 1, 1, 1, 1, 1, 2))
    if KIND == "int4":
        words = words >> (4 * half + 8 * tl.reshape(tl.arange(0, 2), (1, 1, 1, 1, 1, 1, 1, 2, 1)))
    else:
        words = words >> (8 * half)

    ONE: tl.constexpr = one_apart(dtype) << 16 | one_apart(dtype)
    SHIFT: tl.constexpr = fp8_shift(dtype)
    SCALE: tl.constexpr = fp8_scale(dtype)
    code = words >> (16 * second)
    if dtype == tl.float32:
        if KIND == "int4":
            value = ((code & 15) - 8).to(tl.float32)
        elif KIND == "int8":
            value = ((code & 0x7F) - (code & 0x80)).to(tl.float32)
        else:
            value = ((code & 0x80) << 24 | (code & 0x7F) << SHIFT).to(tl.float32, bitcast=True) * SCALE
    elif KIND == "int4":
        zero = _floats(tl.full((), ONE | 8, tl.int32), 0, dtype)
        value = _floats(words & 0x000F000F | ONE, second, dtype) - zero
    elif KIND == "int8":
        sign = _floats(words & 0x00800080 | ONE, second, dtype)
        value = _floats(words & 0x007F007F | ONE, second, dtype) - sign
    else:
        bits = (words & 0x00800080) << 8 | (words & 0x007F007F) << SHIFT
        value = _floats(bits, second, dtype) * tl.full((), SCALE, dtype)
    return value
