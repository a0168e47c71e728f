from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ahead_of_time import Case
from handloom_kernels import tuning
from handloom_kernels.prefill_attention import prefill_attention

# tensor cores; keys and values on their way to shared memory 16 bytes at a time while earlier ones are multiplied
COPIES = r"(?s)cp\.async\.cg\.shared\.global [^;]*, 0x10(?=.*{})"
MMA = {name: COPIES.format(op) for name, op in (("sm_80", r"mma\.sync"), ("sm_90", "wgmma"), ("sm_100", "tcgen05"))}
FEW_ROWS = {"cuda": COPIES.format(r"mma\.sync")}


def cases() -> Iterator[Case]:
    def run(
        heads: int,
        kv_heads: int,
        head_dim: int,
        *,
        dtype: torch.dtype = torch.bfloat16,
        codes: torch.dtype | None = None,
        page_size: int = 64,
        per_head: tuple[str, ...] = (),
        **options: Any,
    ) -> None:
        if codes == torch.float8_e4m3fn and tuning.is_hip():
            codes = torch.float8_e4m3fnuz
        q = torch.empty(64, heads, head_dim, dtype=dtype)
        k, v = (torch.empty(9, page_size, kv_heads, head_dim, dtype=codes or dtype) for _ in "kv")
        scales = [torch.empty(9, page_size, kv_heads) for _ in "kv"] if codes is not None else [None, None]
        options |= {name: torch.empty(heads, dtype=dtype) for name in per_head}
        prefill_attention(q, k, v, *batch(), head_dim**-0.5, k_scales=scales[0], v_scales=scales[1], **options)

    def latent() -> None:
        q, pages = torch.empty(64, 16, 576, dtype=torch.bfloat16), torch.empty(9, 64, 1, 576, dtype=torch.bfloat16)
        prefill_attention(q, pages, pages.narrow(-1, 0, 512), *batch(), 0.1)

    yield Case("Llama-3.1-8B", lambda: run(32, 8, 128), MMA)
    yield Case("Qwen3-0.6B, pages of 16", lambda: run(16, 8, 128, page_size=16), MMA, ("sm_80", "sm_90"))
    yield Case("GPT-2", lambda: run(12, 12, 64, dtype=torch.float16), MMA)
    yield Case("gpt_oss", lambda: run(64, 8, 64, window=128, per_head=("sinks",)), MMA)
    yield Case("Gemma-3", lambda: run(8, 4, 256, window=512), MMA)
    yield Case("Gemma-2", lambda: run(8, 4, 256, window=4096, softcap=50.0), MMA, ("sm_80", "gfx942"))
    yield Case("Phi-3-mini", lambda: run(32, 32, 96), MMA, ("sm_80", "gfx942"))
    yield Case("Falcon-RW", lambda: run(32, 32, 64, per_head=("alibi_slopes",)), MMA, ("sm_90", "gfx942"))
    yield Case("DeepSeek-V2-Lite", latent, FEW_ROWS)
    yield Case("int8", lambda: run(32, 8, 128, codes=torch.int8), MMA)
    yield Case("float8", lambda: run(32, 8, 128, codes=torch.float8_e4m3fn), MMA, ("sm_90", "gfx942"))
    yield Case("float32", lambda: run(9, 3, 64, dtype=torch.float32), targets=("sm_80", "sm_90"))


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """page_table, cu_seqlens and context_lens of three sequences."""
    return torch.empty(3, 8, dtype=torch.int64), torch.empty(4, dtype=torch.int64), torch.empty(3, dtype=torch.int64)
