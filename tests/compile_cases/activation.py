from __future__ import annotations

from collections.abc import Iterator

import torch

from ahead_of_time import Case
from handloom_kernels import activation as kernels
from handloom_kernels.reference import GATED_ACTIVATIONS


def cases() -> Iterator[Case]:
    def run(activation: str, width: int, dtype: torch.dtype) -> None:
        kernels.gated_activation(torch.empty(4, 2 * width, dtype=dtype), activation)

    vectors = {"cuda": r"ld\.global[a-z0-9.:]*\.v4\.b32[\s\S]*st\.global[a-z0-9.:]*\.v4\.b32"}
    for activation in GATED_ACTIVATIONS:
        yield Case(f"{activation} 14336", lambda name=activation: run(name, 14336, torch.bfloat16), vectors)
    yield Case("silu 1536 float32", lambda: run("silu", 1536, torch.float32), vectors)
    yield Case("silu of an odd width", lambda: run("silu", 1001, torch.float16))
    yield Case("relu2 alone", lambda: kernels.activate(torch.empty(4, 8192, dtype=torch.bfloat16), "relu2"), vectors)
