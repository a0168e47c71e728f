from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ahead_of_time import Case
from handloom_kernels import decode_attention as kernels

BF16 = torch.bfloat16
NOT_SM_80 = ("sm_90", "sm_100", "gfx942")
# tensor cores; keys and values on their way to shared memory 16 bytes at a time while earlier ones are multiplied
PTX = {"cuda": r"(?s)cp\.async\.cg\.shared\.global \[[^]]*\], \[[^]]*\], 0x10(?=.*mma\.sync)"}


def run(
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    v_head_dim: int | None = None,
    *,
    dtype: torch.dtype = BF16,
    pages: torch.dtype | None = None,
    page_size: int = 16,
    batch: int = 4,
    queries: int = 1,
    sinks: bool = False,
    alibi: bool = False,
    **options: Any,
) -> None:
    """Sequences with room for 8192 keys each."""
    q = torch.empty(batch * queries, num_heads, head_dim, dtype=dtype)
    k_pages = torch.empty(4096, page_size, num_kv_heads, head_dim, dtype=pages or dtype)
    # latent attention: the values are columns of the keys
    v_pages = torch.empty_like(k_pages) if v_head_dim is None else k_pages.narrow(-1, 0, v_head_dim)
    table = torch.empty(batch, 8192 // page_size, dtype=torch.int32)
    lengths = torch.empty(batch, dtype=torch.int32)
    scales = None if pages is None else torch.empty(4096, page_size, num_kv_heads)
    kernels.decode_attention(
        q,
        k_pages,
        v_pages,
        table,
        torch.empty(batch + 1, dtype=torch.int32),
        lengths,
        head_dim**-0.5,
        sinks=torch.empty(num_heads, dtype=BF16) if sinks else None,
        alibi_slopes=torch.empty(num_heads) if alibi else None,
        k_scales=scales,
        v_scales=scales,
        max_query_len=queries,
        **options,
    )


def cases() -> Iterator[Case]:
    yield Case("llama 3.1 8b", lambda: run(32, 8, 128), PTX)
    yield Case("llama 3.1 8b, 8 queries, log-sum-exp", lambda: run(32, 8, 128, queries=8, return_lse=True), PTX)
    yield Case("llama 3.1 8b, one page a sequence", lambda: run(32, 8, 128, page_size=8192), PTX)
    yield Case("llama 3.1 8b, 256 sequences", lambda: run(32, 8, 128, batch=256), PTX)
    yield Case("qwen3 0.6b, alone", lambda: run(16, 8, 128, batch=1), PTX)
    yield Case("gemma 3, window", lambda: run(8, 4, 256, window=512), PTX)
    yield Case("gemma 2, soft-cap", lambda: run(16, 8, 256, softcap=50.0), PTX)
    yield Case("gpt oss, sinks", lambda: run(64, 8, 64, sinks=True, window=128), PTX)
    yield Case("gpt 2, float16", lambda: run(12, 12, 64, dtype=torch.float16), PTX)
    yield Case("gpt 2, float32", lambda: run(12, 12, 64, dtype=torch.float32))
    yield Case("phi 3 mini", lambda: run(32, 32, 96), PTX)
    yield Case("bloom, ALiBi", lambda: run(32, 32, 128, alibi=True), PTX)
    yield Case("latent, 128 heads", lambda: run(128, 1, 576, 512))
    yield Case("latent, 16 heads", lambda: run(16, 1, 576, 512))
    yield Case("int8 pages", lambda: run(32, 8, 128, pages=torch.int8), PTX)
    yield Case("fp8 pages", lambda: run(32, 8, 128, pages=torch.float8_e4m3fn), PTX, ("sm_90", "sm_100"))
    yield Case("fp8 pages, AMD", lambda: run(32, 8, 128, pages=torch.float8_e4m3fnuz), targets=("gfx942",))
