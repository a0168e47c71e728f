"""The step as an object file, made by numba.

Of numba's own entry points none is in it: they need numba at run time. What is exported is a plain function of C, which
calls the compiled `step.run`; nothing in that raises.

This module does not know where object files are kept or how they are run.
"""

from __future__ import annotations

from llvmlite import ir
from numba.core import types
from numba.core.compiler import Flags, compile_internal
from numba.core.compiler_lock import global_compiler_lock
from numba.core.registry import cpu_target

from handloom.errors import UnsupportedOption
from handloom.ops.cpu import step
from handloom.ops.cpu.simd import I64
from handloom.ops.cpu.step import UNITS
from handloom.ops.cpu.tiles import assembly

__all__ = ["UNITS", "compile_step", "require_processor"]


def require_processor() -> None:
    """Raises UnsupportedOption for a processor that lacks what kernels are made of: each number would take a call."""
    if any(function in assembly() for function in ("fmaf", "hfsf2", "h2f")):
        raise UnsupportedOption(
            "backend 'cpu', the default on a CPU, needs a processor that multiplies and adds with one rounding and "
            "reads float16 (on x86-64: FMA and F16C, as with AVX2), and this one does not; choose 'torch'"
        )


def compile_step(name: str) -> bytes:
    """An object file with void name(int64, int64), `step.run` for this processor. Raises as require_processor does."""
    require_processor()
    context, typing = cpu_target.target_context, cpu_target.typing_context
    typing.refresh()
    context.refresh()
    flags = Flags()
    flags.error_model = "numpy"
    flags.no_compile = flags.no_cpython_wrapper = flags.no_cfunc_wrapper = True
    with global_compiler_lock:
        library = context.codegen().create_library(name)
        library.enable_object_caching()
        arguments = (types.int64, types.int64)
        run = compile_internal(typing, context, library, step.run, arguments, types.void, flags, {}).fndesc
        module = library.create_ir_module(name)
        entry = ir.Function(module, ir.FunctionType(ir.VoidType(), [I64, I64]), name)
        builder = ir.IRBuilder(entry.append_basic_block())
        callee = context.declare_function(module, run)
        context.call_conv.call_function(builder, callee, run.restype, run.argtypes, entry.args)
        builder.ret_void()
        library.add_ir_module(module)
        library.finalize()
        data: bytes = library._get_compiled_object()
    return data
