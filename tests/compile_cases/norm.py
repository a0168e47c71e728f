from __future__ import annotations

from collections.abc import Iterator

import torch

from ahead_of_time import Case
from handloom_kernels import norm as kernels
from handloom_kernels.reference import NORM_KINDS, Norm


def cases() -> Iterator[Case]:
    def run(kind: str, width: int, dtype: torch.dtype, residual: bool) -> None:
        x = torch.empty(4, width, dtype=dtype)
        norm = Norm(
            kind, torch.empty(width, dtype=dtype), torch.empty(width, dtype=dtype) if kind == "layer" else None, 1e-5
        )
        kernels.add_normalize(x, x, norm) if residual else kernels.normalize(x, norm)

    vector_loads = {"cuda": r"ld\.global[a-z0-9.:]*\.v4\.b32"}
    for kind in NORM_KINDS:
        yield Case(f"{kind} 4096", lambda kind=kind: run(kind, 4096, torch.bfloat16, False), vector_loads)
    for width in (576, 640, 2048, 8192):
        yield Case(f"residual {width}", lambda width=width: run("rms", width, torch.bfloat16, True))
    yield Case("wider than a tile", lambda: run("rms", 20_000, torch.float32, False))
