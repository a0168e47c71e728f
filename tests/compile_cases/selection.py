from __future__ import annotations

from collections.abc import Iterator

import torch

from ahead_of_time import Case
from handloom_kernels import selection as kernels


def cases() -> Iterator[Case]:
    def run(vocab_size: int, dtype: torch.dtype, k: bool, p: bool, min_p: bool) -> None:
        value = torch.empty(4)
        top_k = torch.empty(4, dtype=torch.int32) if k else None
        scores = torch.empty(4, vocab_size, dtype=dtype)
        kernels.select(scores, value, top_k, value if p else None, value if min_p else None)

    vector_loads = {"cuda": r"ld\.global[a-z0-9.:]*\.v4\.b32"}
    yield Case("everything", lambda: run(151_936, torch.bfloat16, True, True, True), vector_loads)
    yield Case("top-k", lambda: run(128_256, torch.float32, True, False, False), vector_loads)
    yield Case("min-p", lambda: run(262_144, torch.float32, False, False, True))
