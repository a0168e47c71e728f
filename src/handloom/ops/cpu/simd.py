"""Vectors of 16 float32 in numba: a type and the few operations that the kernels are written in.

Every operation is one of LLVM's, on <16 x float>: LLVM splits the vector where registers are narrower, and the lanes
never meet but in `sum_lanes` and `max_lanes`, whose order is written out. So a kernel gives the same bits with AVX-512,
AVX2 or NEON, as long as it is compiled without fast-math.

Addresses are int64; nothing is checked against a length.

This module does not know what is computed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

from llvmlite import ir
from numba.core import types
from numba.core.compiler import Flags, compile_internal
from numba.core.registry import cpu_target
from numba.extending import intrinsic, models, register_model

LANES = 16

F32, I8, I16, I32, I64 = ir.FloatType(), ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64)
VECTOR = ir.VectorType(F32, LANES)
INTS = ir.VectorType(I32, LANES)
FLAGS = ir.VectorType(ir.IntType(1), LANES)

Builder = Any
Value = Any


class VectorType(types.Type):
    """The numba type of <16 x float>."""

    def __init__(self) -> None:
        super().__init__(name="float32x16")


vector = VectorType()
void, int64, float32, float64 = types.void, types.int64, types.float32, types.float64


@register_model(VectorType)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: Any) -> None:
        super().__init__(dmm, fe_type, VECTOR)


def compiled_for(*features: str) -> bool:
    """Whether numba compiles for a processor with these, by LLVM's names."""
    _, _, known = cpu_target.target_context.codegen().magic_tuple()
    return {f"+{name}" for name in features} <= set(known.split(","))


def operation(result: Any, *arguments: Any) -> Callable[[Callable[..., Value]], Any]:
    """Make a numba function of one that emits LLVM instructions: emit(builder, *values) -> value, or None for void."""

    def decorate(emit: Callable[..., Value]) -> Any:
        def code(context: Any, builder: Builder, signature: Any, values: Any) -> Value:
            value = emit(builder, *values)
            return context.get_dummy_value() if value is None else value

        return _typed(emit, result(*arguments), code)

    return decorate


def kernel(result: Any, *arguments: Any) -> Callable[[Callable[..., Any]], Any]:
    """Make a numba function that other kernels call, and Python cannot.

    numba's njit would make a library of machine code of each function, beside what is inlined in each of its callers;
    here a function is compiled once, for these types, into the library of whoever calls it first: a fifth of the time.
    """

    def decorate(implementation: Callable[..., Any]) -> Any:
        signature = result(*arguments)
        compiled: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()

        def code(context: Any, builder: Builder, _: Any, values: Any) -> Value:
            library = context.active_code_library
            if library not in compiled:
                compiled[library] = _compile(context, library, implementation, signature)
            return context.call_internal(builder, compiled[library], signature, values)

        return _typed(implementation, signature, code)

    return decorate


def _compile(context: Any, library: Any, implementation: Callable[..., Any], signature: Any) -> Any:
    """Add a function to a library; its descriptor."""
    flags = Flags()
    flags.error_model = "numpy"
    flags.no_compile = flags.no_cpython_wrapper = flags.no_cfunc_wrapper = True
    typing, result = context.typing_context, signature.return_type
    return compile_internal(typing, context, library, implementation, signature.args, result, flags, {}).fndesc


def _typed(named: Callable[..., Any], signature: Any, code: Callable[..., Value]) -> Any:
    """numba's intrinsic of this signature and code."""

    def typing(context: Any, *arguments: Any) -> Any:
        return signature, code

    names = ["context", *(f"a{i}" for i in range(len(signature.args)))]
    typing.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in names]
    )
    typing.__name__ = typing.__qualname__ = named.__name__
    typing.__doc__ = named.__doc__
    return intrinsic(typing)


# What the emitting functions share -------------------------------------------------------------


def pointer(builder: Builder, address: Value, to: Any) -> Value:
    return builder.inttoptr(address, ir.PointerType(to))


def load_at(builder: Builder, address: Value, of: Any, align: int) -> Value:
    """A load that asks for no more than the alignment of the elements."""
    loaded = builder.load(pointer(builder, address, of))
    loaded.align = align
    return loaded


def store_at(builder: Builder, value: Value, address: Value, align: int = 4) -> None:
    builder.store(value, pointer(builder, address, value.type)).align = align


def splat_of(builder: Builder, scalar: Value, of: Any) -> Value:
    single = builder.insert_element(ir.Constant(of, ir.Undefined), scalar, I32(0))
    return builder.shuffle_vector(single, ir.Constant(of, ir.Undefined), ir.Constant(INTS, [0] * LANES))


def constant(value: float) -> Value:
    return ir.Constant(VECTOR, [value] * LANES)


def call(builder: Builder, name: str, result: Any, *values: Value) -> Value:
    """Call an LLVM intrinsic by its full name."""
    function_type = ir.FunctionType(result, [value.type for value in values])
    module = builder.module
    function = module.globals.get(name) or ir.Function(module, function_type, name)
    return builder.call(function, values)


def fused(builder: Builder, a: Value, b: Value, c: Value) -> Value:
    return call(builder, "llvm.fma.v16f32", VECTOR, a, b, c)


def first_lanes(builder: Builder, count: Value) -> Value:
    """The mask of the first `count` (int64) lanes."""
    lanes = ir.Constant(INTS, list(range(LANES)))
    return builder.icmp_signed("<", lanes, splat_of(builder, builder.trunc(count, I32), INTS))


def offset(builder: Builder, address: Value, nbytes: int) -> Value:
    return builder.add(address, I64(nbytes))


# Memory ----------------------------------------------------------------------------------------


@operation(vector, int64)
def load(b: Builder, address: Value) -> Value:
    """16 float32"""
    return load_at(b, address, VECTOR, 4)


@operation(vector, int64, int64)
def load_first(b: Builder, address: Value, count: Value) -> Value:
    """The first `count` of 16 float32, zeros after them; no byte past them is touched"""
    return call(
        b,
        "llvm.masked.load.v16f32.p0",
        VECTOR,
        pointer(b, address, VECTOR),
        I32(4),
        first_lanes(b, count),
        constant(0.0),
    )


@operation(void, int64, vector)
def store(b: Builder, address: Value, value: Value) -> None:
    """16 float32"""
    store_at(b, value, address)


@operation(void, int64, vector, int64)
def store_first(b: Builder, address: Value, value: Value, count: Value) -> None:
    """The first `count` of 16 float32; no byte past them is touched"""
    call(
        b,
        "llvm.masked.store.v16f32.p0",
        ir.VoidType(),
        value,
        pointer(b, address, VECTOR),
        I32(4),
        first_lanes(b, count),
    )


def _scalar_io(kind: Any, of: Any, align: int) -> tuple[Any, Any]:
    @operation(kind, int64)
    def read(b: Builder, address: Value) -> Value:
        """One scalar"""
        return load_at(b, address, of, align)

    @operation(void, int64, kind)
    def write(b: Builder, address: Value, value: Value) -> None:
        """One scalar"""
        store_at(b, value, address, align)

    return read, write


read_f32, write_f32 = _scalar_io(float32, F32, 4)
read_i64, write_i64 = _scalar_io(int64, I64, 8)
read_u16, write_u16 = _scalar_io(types.uint16, I16, 2)


@operation(float64, int64)
def as_float(b: Builder, bits: Value) -> Value:
    """The float64 with these bits"""
    return b.bitcast(bits, ir.DoubleType())


# Arithmetic ------------------------------------------------------------------------------------


@operation(vector, float32)
def splat(b: Builder, scalar: Value) -> Value:
    """The scalar in every lane"""
    return splat_of(b, scalar, VECTOR)


@operation(vector)
def lanes(b: Builder) -> Value:
    """0, 1, 2 and so on"""
    return ir.Constant(VECTOR, [float(i) for i in range(LANES)])


@operation(vector, vector, vector)
def add(b: Builder, x: Value, y: Value) -> Value:
    """x + y"""
    return b.fadd(x, y)


@operation(vector, vector, vector)
def sub(b: Builder, x: Value, y: Value) -> Value:
    """x - y"""
    return b.fsub(x, y)


@operation(vector, vector, vector)
def mul(b: Builder, x: Value, y: Value) -> Value:
    """x * y"""
    return b.fmul(x, y)


@operation(vector, vector, vector)
def div(b: Builder, x: Value, y: Value) -> Value:
    """x / y"""
    return b.fdiv(x, y)


@operation(vector, vector, vector, vector)
def fma(b: Builder, x: Value, y: Value, z: Value) -> Value:
    """x * y + z, rounded once"""
    return fused(b, x, y, z)


@operation(vector, vector, vector)
def larger(b: Builder, x: Value, y: Value) -> Value:
    """y where x < y, else x: a NaN in x stays"""
    return b.select(b.fcmp_ordered("<", x, y), y, x)


@operation(vector, vector, int64, vector)
def keep_first(b: Builder, x: Value, count: Value, y: Value) -> Value:
    """x in the first `count` lanes, y in the others"""
    return b.select(first_lanes(b, count), x, y)


def _halves(b: Builder, x: Value, combine: Callable[[Value, Value], Value]) -> Value:
    """Lane i with lane i + 8, then i with i + 4, i + 2, i + 1."""
    width = LANES // 2
    while width:
        order = ir.Constant(INTS, [(i + width) % LANES for i in range(LANES)])
        x = combine(x, b.shuffle_vector(x, x, order))
        width //= 2
    return b.extract_element(x, I32(0))


@operation(float32, vector)
def sum_lanes(b: Builder, x: Value) -> Value:
    """The sum of all lanes, by halves"""
    return _halves(b, x, b.fadd)


@operation(float32, vector)
def max_lanes(b: Builder, x: Value) -> Value:
    """The largest of all lanes, by halves"""
    return _halves(b, x, lambda p, q: b.select(b.fcmp_ordered("<", p, q), q, p))
