"""exp, tanh, erf and the activations on vectors, in arithmetic that every processor rounds alike.

No library function is called: which one there is, and how it rounds, differs between machines. Each function is a
polynomial, fitted here (weighted least squares, reweighted until the error is even) for an error well below one unit in
the last place before rounding; tests hold them to about one unit after it.

This module does not know where vectors come from.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from llvmlite import ir

from handloom.ops.cpu import simd
from handloom.ops.cpu.instructions import Activation
from handloom.ops.cpu.simd import INTS, LANES, VECTOR, Builder, Value, constant, fused, int64, kernel, operation, vector

EXP = (0.50000006, 0.166666701, 0.0416655205, 0.0083324993, 0.00139921368, 0.000203777716)
EXP2 = (0.693147182, 0.240226477, 0.0555033237, 0.00961843692, 0.0013398875, 0.000153533620)
TANH = (-0.333333284, 0.133331209, -0.0539361648, 0.0216437466, -0.00803962629, 0.00201986427)
ERF = (1.12837911, -0.37612626, 0.112835854, -0.026853811, 0.00518832775, -0.000801019254, 7.8538571e-05)
LOG_ERFC = (0.000188035934, -1.12957835, -0.633219898, -0.108418547, 0.0252082404, -0.00420455635, 0.000441335345, -2.1686772e-05)  # fmt: skip # noqa: E501

LOWEST, HIGHEST = -87.3, 88.3  # exp is 0 below, where results would be subnormal, and infinite above
LN2_HIGH = 0.693359375
LN2_LOW = math.log(2) - LN2_HIGH
ROUNDING = 1.5 * 2.0**23  # adding it leaves the nearest integer in the low bits

SILU, GELU, GELU_TANH, RELU, RELU2 = (int(x) for x in Activation)


def polynomial(b: Builder, x: Value, coefficients: Sequence[float]) -> Value:
    total = constant(coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        total = fused(b, total, x, constant(coefficient))
    return total


def _magnitude(b: Builder, x: Value) -> Value:
    mask = ir.Constant(INTS, [0x7FFFFFFF] * LANES)
    return b.bitcast(b.and_(b.bitcast(x, INTS), mask), VECTOR)


def _with_sign_of(b: Builder, magnitude: Value, x: Value) -> Value:
    sign = b.and_(b.bitcast(x, INTS), ir.Constant(INTS, [-(2**31)] * LANES))
    return b.bitcast(b.or_(b.bitcast(magnitude, INTS), sign), VECTOR)


def _exp(b: Builder, x: Value) -> Value:
    low, high = (b.fcmp_ordered(*which) for which in (("<", x, constant(LOWEST)), (">", x, constant(HIGHEST))))
    x = b.select(b.or_(low, high), constant(0.0), x)
    shifted = fused(b, x, constant(1 / math.log(2)), constant(ROUNDING))
    n = b.fsub(shifted, constant(ROUNDING))
    r = fused(b, n, constant(-LN2_LOW), fused(b, n, constant(-LN2_HIGH), x))
    value = fused(b, b.fmul(r, r), polynomial(b, r, EXP), b.fadd(r, constant(1.0)))
    power = b.shl(b.add(b.bitcast(shifted, INTS), ir.Constant(INTS, [127] * LANES)), ir.Constant(INTS, [23] * LANES))
    value = b.fmul(value, b.bitcast(power, VECTOR))
    return b.select(low, constant(0.0), b.select(high, constant(math.inf), value))


@operation(vector, vector)
def exp(b: Builder, x: Value) -> Value:
    """e^x; exactly 1 at 0; results below the smallest normal number are 0"""
    return _exp(b, x)


@operation(vector, vector)
def exp2(b: Builder, x: Value) -> Value:
    """2^x for x of at most 1; exactly 1 at 0; results below the smallest normal number are 0"""
    low = b.fcmp_ordered("<", x, constant(-126.0))
    shifted = b.fadd(x, constant(ROUNDING))
    r = b.fsub(x, b.fsub(shifted, constant(ROUNDING)))
    value = polynomial(b, r, (1.0, *EXP2))
    power = b.shl(b.bitcast(shifted, INTS), ir.Constant(INTS, [23] * LANES))
    return b.select(low, constant(0.0), b.bitcast(b.add(b.bitcast(value, INTS), power), VECTOR))


def _sigmoid(b: Builder, x: Value) -> Value:
    return b.fdiv(constant(1.0), b.fadd(constant(1.0), _exp(b, b.fneg(x))))


@operation(vector, vector)
def tanh(b: Builder, x: Value) -> Value:
    """tanh; a polynomial near 0, where 1 - 2 / (e^2x + 1) would cancel (|x| < 0.625)"""
    size = _magnitude(b, x)
    square = b.fmul(x, x)
    near = fused(b, b.fmul(x, square), polynomial(b, square, TANH), x)
    grown = b.fadd(_exp(b, b.fadd(size, size)), constant(1.0))
    far = _with_sign_of(b, b.fsub(constant(1.0), b.fdiv(constant(2.0), grown)), x)
    return b.select(b.fcmp_unordered(">=", size, constant(0.625)), far, near)


def _erf(b: Builder, x: Value) -> Value:
    """erf; beyond 1 from a polynomial of log(1 - erf), which is 1 in float32 past 4."""
    size = _magnitude(b, x)
    near = b.fmul(x, polynomial(b, b.fmul(x, x), ERF))
    capped = b.select(b.fcmp_ordered(">", size, constant(4.0)), constant(4.0), size)
    far = _with_sign_of(b, b.fsub(constant(1.0), _exp(b, polynomial(b, capped, LOG_ERFC))), x)
    return b.select(b.fcmp_unordered(">=", size, constant(1.0)), far, near)


@operation(vector, vector)
def erf(b: Builder, x: Value) -> Value:
    """The error function"""
    return _erf(b, x)


@operation(vector, vector)
def silu(b: Builder, x: Value) -> Value:
    """x * sigmoid(x)"""
    return b.fmul(x, _sigmoid(b, x))


@operation(vector, vector)
def gelu(b: Builder, x: Value) -> Value:
    """x * (1 + erf(x / sqrt 2)) / 2"""
    return b.fmul(b.fmul(constant(0.5), x), b.fadd(constant(1.0), _erf(b, b.fmul(x, constant(math.sqrt(0.5))))))


@operation(vector, vector)
def gelu_tanh(b: Builder, x: Value) -> Value:
    """x * (1 + tanh(u)) / 2 with u = sqrt(2 / pi) * (x + 0.044715 x^3), which is x * sigmoid(2u)"""
    cubic = fused(b, b.fmul(b.fmul(x, x), x), constant(0.044715), x)
    return b.fmul(x, _sigmoid(b, b.fmul(cubic, constant(2 * math.sqrt(2 / math.pi)))))


@operation(vector, vector)
def relu(b: Builder, x: Value) -> Value:
    """max(x, 0)"""
    positive = b.fcmp_unordered(">", x, constant(0.0))
    return b.select(positive, x, constant(0.0))


@kernel(vector, vector, int64)
def activate(x, kind):
    """An Activation, by number."""
    if kind == SILU:
        return silu(x)
    if kind == GELU:
        return gelu(x)
    if kind == GELU_TANH:
        return gelu_tanh(x)
    y = relu(x)
    return simd.mul(y, y) if kind == RELU2 else y
