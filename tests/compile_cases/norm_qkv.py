from __future__ import annotations

from collections.abc import Iterator

import torch

from ahead_of_time import Case
from compile_cases.linear import MEANT
from handloom_kernels import norm_qkv as kernels
from handloom_kernels.reference import Norm, Rotary


def cases() -> Iterator[Case]:
    def run(
        heads: tuple[int, int, int],
        depth: int,
        norm: str = "rms",
        head_norm: str | None = None,
        dtype: torch.dtype = torch.bfloat16,
        pages: torch.dtype = torch.bfloat16,
    ) -> None:
        num_heads, num_kv_heads, head_dim = heads
        layer, quantised = norm == "layer", pages == torch.int8
        width = (num_heads + 2 * num_kv_heads) * head_dim
        k_pages = torch.empty(8, 16, num_kv_heads, head_dim, dtype=pages)
        scales = [torch.empty(k_pages.shape[:3])] * 2 if quantised else []
        qk_norm = Norm(head_norm, torch.empty(head_dim, dtype=dtype), None, 1e-6) if head_norm else None
        kernels.norm_qkv(
            torch.empty(4, depth, dtype=dtype),
            Norm(norm, torch.empty(depth, dtype=dtype), torch.empty(depth, dtype=dtype) if layer else None, 1e-6),
            torch.empty(width, depth, dtype=dtype),
            torch.empty(width, dtype=dtype) if layer else None,
            qk_norm,
            qk_norm,
            None if layer else Rotary(torch.empty(4, head_dim // 2), torch.empty(4, head_dim // 2)),
            k_pages,
            torch.empty_like(k_pages),
            torch.empty(4, dtype=torch.int64),
            *scales,
        )

    yield Case("Llama-3.2-1B", lambda: run((32, 8, 64), 2048), MEANT)
    yield Case("Llama-3.1-8B", lambda: run((32, 8, 128), 4096), MEANT)
    yield Case("Qwen3-0.6B", lambda: run((16, 8, 128), 1024, head_norm="rms"), MEANT)
    gemma = {"norm": "rms_unit_offset", "head_norm": "rms_unit_offset"}
    yield Case("Gemma-3-1B", lambda: run((4, 1, 256), 1152, **gemma), MEANT)
    yield Case("GPT-2", lambda: run((12, 12, 64), 768, "layer", dtype=torch.float16, pages=torch.float16))
    yield Case("Qwen3-0.6B, int8 pages", lambda: run((16, 8, 128), 1024, head_norm="rms", pages=torch.int8), MEANT)
