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

    # every wave waits for its own stores before the barrier behind which a ticket is drawn
    ordered = r"(?s)ASMSTART\s+s_waitcnt vmcnt\(0\)(?:(?!global_).)*s_barrier(?:(?!global_).)*buffer_wbl2"
    expected = {"cuda": r"ld\.global[a-z0-9.:]*\.v4\.b32", "hip": ordered}
    yield Case("everything", lambda: run(151_936, torch.bfloat16, True, True, True), expected)
    yield Case("top-k", lambda: run(128_256, torch.float32, True, False, False), expected)
    yield Case("min-p", lambda: run(262_144, torch.float32, False, False, True))
