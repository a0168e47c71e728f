from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from ahead_of_time import Case
from handloom_kernels import rope as kernels
from handloom_kernels.reference import Norm, Rotary

NVIDIA_WITH_FP8 = ("sm_90", "sm_100")


def cases() -> Iterator[Case]:
    def run(
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        v_head_dim: int | None = None,
        kind: str | None = None,
        rotary_dim: int | None = None,
        interleaved: bool = False,
        dtype: torch.dtype = torch.bfloat16,
        pages: torch.dtype = torch.bfloat16,
    ) -> None:
        v_head_dim = v_head_dim or head_dim
        half = (head_dim if rotary_dim is None else rotary_dim) // 2
        table = torch.empty(4, half)
        norm = None if kind is None else Norm(kind, torch.empty(head_dim, dtype=dtype), None, 1e-6)
        scales = None if pages.itemsize > 1 else torch.empty(8, 16, num_kv_heads)
        kernels.qk_norm_rope_write(
            torch.empty(4, num_heads * head_dim + num_kv_heads * (head_dim + v_head_dim), dtype=dtype),
            num_heads,
            norm,
            norm,
            Rotary(table, table, interleaved) if half else None,
            torch.empty(8, 16, num_kv_heads, head_dim, dtype=pages),
            torch.empty(8, 16, num_kv_heads, v_head_dim, dtype=pages),
            torch.empty(4, dtype=torch.int64),
            scales,
            scales,
        )

    # 16 bytes at a time, and a head's tiles and tables in the same threads: nothing goes through shared memory
    vectors = r"ld\.global[a-z0-9.:]*\.v4\.b32[\s\S]*st\.global[a-z0-9.:]*\.v4\.b32"
    in_registers = {"cuda": r"\A(?![\s\S]*bar\.sync)[\s\S]*" + vectors}
    yield Case("llama 8B", lambda: run(32, 8, 128), in_registers)
    yield Case("qwen3 0.6B", lambda: run(16, 8, 128, kind="rms"), in_registers)
    yield Case("gemma3 1B", lambda: run(4, 1, 256, kind="rms_unit_offset"), {"cuda": vectors})
    yield Case("cohere", lambda: run(32, 8, 128, kind="layer", interleaved=True), {"cuda": vectors})
    yield Case("phi, partial of 80", lambda: run(32, 32, 80, rotary_dim=32), in_registers)
    yield Case("gpt2, no rotation", lambda: run(12, 12, 64, rotary_dim=0), in_registers)
    yield Case("float32, values of another width", lambda: run(9, 3, 192, v_head_dim=128, dtype=torch.float32))
    yield Case(
        "int8 pages", lambda: run(32, 8, 128, kind="rms", pages=torch.int8), {"cuda": r"st\.global[a-z0-9.]*\.v2"}
    )
    fp8 = {"cuda": r"cvt\.rn\.satfinite\.e4m3x2\.f32"}
    yield Case("fp8 pages", lambda: run(32, 8, 128, pages=torch.float8_e4m3fn), fp8, NVIDIA_WITH_FP8)
    yield Case("fp8 pages of AMD", lambda: run(32, 8, 128, pages=torch.float8_e4m3fnuz), {}, ("gfx942",))
    x, table = partial(torch.empty, dtype=torch.bfloat16), torch.empty
    yield Case("rotate", lambda: kernels.rotate(x(4, 32, 128), Rotary(table(4, 64), table(4, 64))), in_registers)
