from __future__ import annotations

from collections.abc import Iterator

import torch

from handloom_kernels import activation as kernels
from handloom_kernels import reference
from kernel_case import KernelCase


def cases(device: torch.device, dtype: torch.dtype, small: bool) -> Iterator[KernelCase]:
    """SwiGLU and gpt-oss's form of it."""
    for rows, width in ((2, 64),) if small else ((1, 14336), (64, 14336), (4096, 14336)):
        x = torch.randn(rows, 2 * width, device=device, dtype=dtype)
        fused = torch.compile(reference.gated_activation)
        for activation in ("silu", "swiglu_oss"):
            yield KernelCase(
                f"{activation} {rows} x {width}",
                lambda x=x, name=activation: kernels.gated_activation(x, name),
                {
                    "torch": lambda x=x, name=activation: reference.gated_activation(x, name),
                    "torch.compile": lambda x=x, name=activation, fused=fused: fused(x, name),
                },
                bytes_moved=3 * rows * width * x.element_size(),
                flops=10 * rows * width,
            )
