"""What threads meet by: numbers that change atomically, and waiting.

This module does not know what is counted or waited for.
"""

from __future__ import annotations

import platform
import sys

from llvmlite import ir
from numba.core import types

from handloom.ops.cpu import simd
from handloom.ops.cpu.simd import I32, I64, Builder, Value, int64, kernel, operation, void

SPINS = 300


@operation(int64, int64, int64)
def fetch_add(b: Builder, address: Value, amount: Value) -> Value:
    """Add atomically; the value before"""
    return b.atomic_rmw("add", simd.pointer(b, address, I64), amount, "seq_cst")


@operation(int64, int64)
def load_atomic(b: Builder, address: Value) -> Value:
    """The value, and all that was written before it was"""
    return b.load_atomic(simd.pointer(b, address, I64), "seq_cst", 8)


@operation(void, int64, int64)
def store_atomic(b: Builder, address: Value, value: Value) -> None:
    """Write the value after all that was written before"""
    b.store_atomic(value, simd.pointer(b, address, I64), "seq_cst", 8)


@operation(void)
def pause(b: Builder) -> None:
    """Tell the processor that this is a waiting loop"""
    if platform.machine().lower() in ("x86_64", "amd64"):
        simd.call(b, "llvm.x86.sse2.pause", ir.VoidType())


@operation(types.int32)
def give_way(b: Builder) -> Value:
    """Let another thread have the core"""
    return simd.call(b, "SwitchToThread" if sys.platform == "win32" else "sched_yield", I32)


@kernel(int64, int64)
def wait_a_little(spins):
    """Spin at first, then give the core away each time: whoever is waited for may need it."""
    if spins < SPINS:
        pause()
    else:
        give_way()
    return spins + 1
