from __future__ import annotations

from collections.abc import Iterator

import torch

from ahead_of_time import Case
from handloom_kernels import sampling as kernels
from handloom_kernels.reference import Penalties, TokenState


def cases() -> Iterator[Case]:
    def run(vocab_size: int, dtype: torch.dtype, everything: bool) -> None:
        words = -(-vocab_size // 32)
        state = TokenState(torch.empty(8, words, dtype=torch.int32), torch.empty(8, vocab_size, dtype=torch.int32))
        value, ids = torch.empty(4), torch.empty(4, 300, dtype=torch.int64)
        logits, rows = torch.empty(4, vocab_size, dtype=dtype), torch.empty(4, dtype=torch.int64)
        if everything:
            allowed = torch.empty(4, words, dtype=torch.int32)
            penalties = Penalties(value, value, value)
            kernels.adjust_logits(logits, state, penalties, ids, torch.empty(4, 300), ids, allowed, rows)
            kernels.count_tokens(state, rows, rows)
        else:
            kernels.adjust_logits(logits, state, Penalties(value), rows=rows)

    vector_loads = {"cuda": r"ld\.global[a-z0-9.:]*\.v4\.b32"}
    yield Case("repetition penalty", lambda: run(128_256, torch.float32, False), vector_loads)
    yield Case("everything", lambda: run(151_936, torch.bfloat16, True), vector_loads)
