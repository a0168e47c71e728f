from __future__ import annotations

from collections.abc import Iterator

import torch

from ahead_of_time import Case
from handloom_kernels import lm_head as kernels
from handloom_kernels.reference import Norm


def cases() -> Iterator[Case]:
    def run(vocab_size: int, width: int, dtype: torch.dtype, choose: bool, softcap: float | None = None) -> None:
        hidden, weight = torch.empty(3, width, dtype=dtype), torch.empty(vocab_size, width, dtype=dtype)
        norm = Norm("rms", torch.empty(width, dtype=dtype), None, 1e-6)
        value, word = torch.empty(3), torch.empty(3, dtype=torch.int64)
        if choose:
            kernels.lm_head_choose(hidden, norm, weight, softcap, value, None, word, word)
        else:
            kernels.lm_head(hidden, norm, weight, softcap)

    products = {
        "cuda": r"cp\.async\.cg\.shared\.global",
        "sm_80": r"mma\.sync",
        "sm_90": r"wgmma\.mma_async",
        "sm_100": r"tcgen05\.mma",
    }
    yield Case("choose, bf16", lambda: run(128_256, 4096, torch.bfloat16, True), products)
    yield Case("logits, bf16", lambda: run(128_256, 4096, torch.bfloat16, False), products)
    yield Case("choose, fp16, softcap, uneven", lambda: run(256_001, 576, torch.float16, True, 30.0), products)
    yield Case("logits, fp32", lambda: run(49_152, 576, torch.float32, False))
