from __future__ import annotations

from collections.abc import Iterator

import torch

from ahead_of_time import Case
from handloom_kernels import kv_pages as kernels


def cases() -> Iterator[Case]:
    def run(*shape: int, dtype: torch.dtype, partly: bool = False) -> None:
        page_ids = torch.empty(3, dtype=torch.int64)
        kernels.copy_pages(torch.empty(shape, dtype=dtype), page_ids, page_ids, page_ids if partly else None)

    vectors = {"cuda": r"ld\.global[a-z0-9.:]*\.v2\.b64[\s\S]*st\.global[a-z0-9.:]*\.v2\.b64"}
    yield Case("llama 8B, whole", lambda: run(32, 2, 4096, 16, 8, 128, dtype=torch.bfloat16), vectors)
    yield Case(
        "llama 8B, first slots", lambda: run(32, 2, 4096, 16, 8, 128, dtype=torch.bfloat16, partly=True), vectors
    )
    yield Case("int8 codes", lambda: run(30, 2, 64, 16, 3, 64, dtype=torch.int8, partly=True), vectors)
    yield Case("scales", lambda: run(30, 2, 64, 16, 3, dtype=torch.float32, partly=True))
    yield Case("bytes", lambda: run(2, 1, 64, 16, 3, 5, dtype=torch.int8))
