from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ahead_of_time import Case
from handloom_kernels import draw as kernels
from handloom_kernels.reference import Cuts


def cases() -> Iterator[Case]:
    def run(vocab_size: int, **options: Any) -> None:
        rows = 4
        words = torch.empty(rows, dtype=torch.int64)
        if options.get("everything"):
            value = torch.empty(rows)
            cuts = Cuts(value, torch.empty(rows, dtype=torch.int32))
            logits = torch.empty(rows, vocab_size, dtype=torch.bfloat16)
            kernels.draw(logits, words, words, value, value > 0, torch.empty(rows, vocab_size), cuts, top_n=20)
        elif options.get("greedy"):
            kernels.draw(torch.empty(rows, vocab_size), None, None)
        else:
            kernels.draw(torch.empty(rows, vocab_size), words, words)

    vector_loads = {"cuda": r"ld\.global[a-z0-9.:]*\.v4\.b32"}
    yield Case("sampled", lambda: run(128_256), vector_loads)
    yield Case("greedy", lambda: run(262_144, greedy=True), vector_loads)
    yield Case("everything, top 20", lambda: run(151_936, everything=True))
