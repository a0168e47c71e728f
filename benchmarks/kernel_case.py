"""One case of the kernel benchmark: a kernel at one shape, what it must move and compute, and who else can do it.

A file kernel_cases/<kernel>.py has `cases(device, dtype, small)` that yields these; `small` is for the interpreter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class KernelCase:
    """name: the shape in a few words; run, peers: calls on tensors made beforehand, never zeros; bytes_moved: what must
    be read and written at least; flops: multiplications and additions that must be done. Peers by name ("torch",
    "torch.compile", "SDPA flash", "cuBLAS", …) compute the same; missing: peers that cannot run here, and why, for the
    table."""

    name: str
    run: Callable[[], object]
    peers: Mapping[str, Callable[[], object]] = field(default_factory=dict)
    missing: Mapping[str, str] = field(default_factory=dict)
    bytes_moved: int = 0
    flops: int = 0
