from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from ahead_of_time import Case
from handloom_kernels import decode_attention as kernels

BF16 = torch.bfloat16
# keys and values go to shared memory 16 bytes at a time, and when a product begins later ones are still on their way
COPY = r"cp\.async\.cg\.shared\.global \[ %r\d+ \+ \d+ \], \[ %rd\d+ \+ \d+ \], 0x10[,;]"
SOME_PENDING = r"cp\.async\.wait_group\s+[1-9]\d*;"
MMA = r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.{0}\.{0}\.f32 "
PTX, FP16 = (
    {"cuda": rf"(?s){COPY}.*{SOME_PENDING}.*{MMA.format(dtype)}.*{MMA.format(dtype)}"} for dtype in ("bf16", "f16")
)


def run(
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    v_head_dim: int | None = None,
    *,
    dtype: torch.dtype = BF16,
    pages: torch.dtype | None = None,
    page_size: int = 16,
    batch: int,
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
    """Each for one sequence and for 256: the list of splits is made for 1, or for up to 64, 128 or 256 sequences, and
    takes more registers the longer it is."""
    for batch in (1, 256):
        yield from cases_of(batch, f"{batch} x ")


def cases_of(batch: int, of: str) -> Iterator[Case]:
    def call(*heads: int, **options: Any) -> Callable[[], None]:
        return partial(run, *heads, batch=batch, **options)

    yield Case(of + "llama 3.1 8b", call(32, 8, 128), PTX)
    yield Case(of + "llama 3.1 8b, 8 queries, log-sum-exp", call(32, 8, 128, queries=8, return_lse=True), PTX)
    yield Case(of + "llama 3.1 8b, one page a sequence", call(32, 8, 128, page_size=8192), PTX)
    yield Case(of + "qwen3 0.6b", call(16, 8, 128), PTX)
    yield Case(of + "gemma 3, window", call(8, 4, 256, window=512), PTX)
    yield Case(of + "gemma 2, soft-cap", call(16, 8, 256, softcap=50.0), PTX)
    yield Case(of + "gpt oss, sinks", call(64, 8, 64, sinks=True, window=128), PTX)
    yield Case(of + "gpt 2, float16", call(12, 12, 64, dtype=torch.float16), FP16)
    yield Case(of + "gpt 2, float32", call(12, 12, 64, dtype=torch.float32))
    yield Case(of + "phi 3 mini", call(32, 32, 96), PTX)
    yield Case(of + "bloom, ALiBi", call(32, 32, 128, alibi=True), PTX)
    yield Case(of + "latent, 128 heads", call(128, 1, 576, 512), PTX)
    yield Case(of + "latent, 16 heads", call(16, 1, 576, 512), PTX)
    yield Case(of + "int8 pages", call(32, 8, 128, pages=torch.int8), PTX)
    yield Case(of + "fp8 pages", call(32, 8, 128, pages=torch.float8_e4m3fn), PTX, ("sm_90", "sm_100"))
    yield Case(of + "fp8 pages, AMD", call(32, 8, 128, pages=torch.float8_e4m3fnuz), targets=("gfx942",))
