from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ahead_of_time import Case
from handloom_kernels import shared_prefix_attention as kernels

BF16 = torch.bfloat16
MMA = {"sm_80": r"mma\.sync", "sm_90": r"wgmma\.mma_async", "sm_100": r"tcgen05\.mma|mma\.sync"}


def run(num_heads: int, num_kv_heads: int, head_dim: int, *, dtype: torch.dtype = BF16, **options: Any) -> None:
    """32 sequences behind a prefix of 1024 tokens."""
    q = torch.empty(32, num_heads, head_dim, dtype=dtype)
    k_pages, v_pages = (torch.empty(512, 16, num_kv_heads, head_dim, dtype=dtype) for _ in "kv")
    prefix, table = torch.empty(64, dtype=torch.int32), torch.empty(32, 16, dtype=torch.int32)
    starts, lengths = torch.empty(33, dtype=torch.int32), torch.empty(32, dtype=torch.int32)
    kernels.shared_prefix_attention(
        q, k_pages, v_pages, prefix, 1024, table, starts, lengths, head_dim**-0.5, max_query_len=1, **options
    )


def merge() -> None:
    first, lse = torch.empty(32, 4096, dtype=BF16), torch.empty(32, 32)
    kernels.merge_attention(first, lse, first, lse)


def cases() -> Iterator[Case]:
    yield Case("llama 3.1 8b", lambda: run(32, 8, 128), MMA)
    yield Case("gpt 2, float16", lambda: run(12, 12, 64, dtype=torch.float16), MMA)
    yield Case("gpt 2, float32", lambda: run(12, 12, 64, dtype=torch.float32))
    yield Case("gemma 2, soft-cap", lambda: run(16, 8, 256, softcap=50.0), MMA)
    yield Case("phi 3 mini", lambda: run(32, 32, 96), MMA)
    yield Case("merge", merge, {"cuda": r"ld\.global[a-z0-9.:]*\.v4\.b32"})
