from __future__ import annotations

from collections.abc import Iterator

import torch

from ahead_of_time import Case
from handloom_kernels import quantized_linear as kernels
from handloom_kernels.reference import Norm
from handloom_kernels.reference.quantized_linear import BLOCK_K, QuantizedWeight

# the tensor cores multiply; the weight's 16-byte pieces are copied ahead of them, and read from there by the threads
# that multiply them, 16 bytes at once, and never written back as floats; two floats are made at once
MEANT = {
    "cuda": (
        r"(?s)\A(?!.*stmatrix)(?=.*cp\.async\.c[ag]\.shared\.global[^\n]*0x10)(?=.*ld\.shared\.v4\.b32)"
        r"(?=.*mma\.sync\.aligned\.m16n8k16[^\n]*bf16)"
    ),
    "sm_90": r"(add|sub|mul)\.bf16x2",
    "sm_100": r"(add|sub|mul)\.bf16x2",
    "gfx942": r"(?s)(?=.*(global|buffer)_load_dwordx4)(?=.*v_mfma_f32_16x16x16_bf16)",
}


def weight(kind: str, group: int, rows: int, depth: int, dtype: torch.dtype, scale_rows: int = 1, zeros: bool = False):
    groups = -(-depth // group) if group else 1
    data = torch.empty(-(-rows // 16), -(-depth // BLOCK_K[kind]), 128, dtype=torch.int32)
    scale_dtype = dtype if group and scale_rows == 1 else torch.float32
    scales = torch.empty(groups, -(-rows // scale_rows), dtype=scale_dtype)
    given = torch.empty(groups, rows, dtype=torch.uint8) if zeros else None
    return QuantizedWeight(kind, data, scales, given, group, (rows, depth), scale_rows)


def cases() -> Iterator[Case]:
    def linear(rows: int, depth: int, kind: str, group: int, dtype: torch.dtype = torch.bfloat16, **more: int) -> None:
        x, residual = torch.empty(4, depth, dtype=dtype), torch.empty(4, rows, dtype=dtype)
        kernels.quantized_linear(x, weight(kind, group, rows, depth, dtype, **more), None, residual)

    def up(rows: int, depth: int, kind: str, group: int, norm_kind: str = "rms", zeros: bool = False) -> None:
        hidden, layer = torch.empty(4, depth, dtype=torch.bfloat16), norm_kind == "layer"
        values = torch.empty(depth, dtype=torch.bfloat16)
        q = weight(kind, group, rows, depth, torch.bfloat16, zeros=zeros)
        norm = Norm(norm_kind, values, values if layer else None, 1e-5)
        kernels.quantized_norm_mlp(hidden, norm, q, None, "gelu" if layer else "silu", not layer)

    for kind, group in (("int8", 0), ("int4", 128), ("fp8", 0)):
        # the first three differ only in numbers that are not compiled in, and are compiled once
        for rows, depth in ((6144, 4096), (4096, 4096), (4096, 14336)):
            yield Case(f"{kind} {group}, {depth} to {rows}", lambda a=(rows, depth, kind, group): linear(*a), MEANT)
        yield Case(f"{kind} {group}, 4096 to 28672", lambda a=(28672, 4096, kind, group): up(*a), MEANT)
    yield Case("int4 32 with zeros, 4096 to 28672", lambda: up(28672, 4096, "int4", 32, zeros=True), MEANT)
    yield Case("int4 128, 1024 to 6144", lambda: up(6144, 1024, "int4", 128), MEANT)
    yield Case("int8, GPT-2 up", lambda: up(3072, 768, "int8", 0, "layer"))
    yield Case("int4 32 with zeros", lambda: linear(4096, 4096, "int4", 32, zeros=True), MEANT)
    yield Case("fp8 by blocks", lambda: linear(4096, 4096, "fp8", 128, scale_rows=128), MEANT)
    yield Case("int8 32, few rows", lambda: linear(1024, 1024, "int8", 32, torch.float16))
    yield Case("float32", lambda: linear(512, 512, "int4", 32, torch.float32))
