from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from handloom_kernels import linear as kernels
from handloom_kernels import reference
from handloom_kernels.reference import Norm
from kernel_case import KernelCase

# name, columns of the result, elements summed
RESIDUAL = (
    ("Qwen3-0.6B out", 1024, 2048),
    ("Llama-3.2-1B out", 2048, 2048),
    ("Llama-3.2-1B down", 2048, 8192),
    ("Llama-3.1-8B out", 4096, 4096),
    ("Llama-3.1-8B down", 4096, 14336),
)
MLP = (("Qwen3-0.6B up", 3072, 1024), ("Llama-3.2-1B up", 8192, 2048), ("Llama-3.1-8B up", 14336, 4096))


def cases(device: torch.device, dtype: torch.dtype, small: bool) -> Iterator[KernelCase]:
    """The linear layers of a decode step. "cuBLAS alone" is the product without what is fused around it."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype) * shape[-1] ** -0.5

    for name, width, depth in (("small", 48, 64),) if small else RESIDUAL:
        weight = draw(width, depth)
        fused = torch.compile(reference.linear_residual)
        for rows in (1,) if small else (1, 4, 16):
            x, residual = draw(rows, depth), draw(rows, width)
            yield KernelCase(
                f"{name}, {rows} rows",
                lambda x=x, w=weight, r=residual: kernels.linear_residual(x, w, None, None, r),
                {
                    "torch": lambda x=x, w=weight, r=residual: r + F.linear(x, w),
                    "torch.compile": lambda x=x, w=weight, r=residual, fused=fused: fused(x, w, None, None, r),
                    "cuBLAS alone": lambda x=x, w=weight: F.linear(x, w),
                },
                bytes_moved=x.element_size() * (weight.numel() + x.numel() + 2 * residual.numel()),
                flops=2 * rows * weight.numel(),
            )

    for name, width, depth in (("small up", 24, 64),) if small else MLP:
        weight, norm = draw(2 * width, depth), Norm("rms", draw(depth), None, 1e-6)
        fused = torch.compile(reference.norm_mlp)
        for rows in (1,) if small else (1, 4, 16):
            x = draw(rows, depth)

            def plain(x: Tensor = x, norm: Norm = norm, weight: Tensor = weight) -> Tensor:
                gate, up = F.linear(F.rms_norm(x, x.shape[-1:], norm.weight, norm.eps), weight).chunk(2, dim=-1)
                return F.silu(gate) * up

            yield KernelCase(
                f"{name}, {rows} rows",
                lambda x=x, n=norm, w=weight: kernels.norm_mlp(x, n, w, None, "silu", True),
                {
                    "torch": plain,
                    "torch.compile": lambda x=x, n=norm, w=weight, fused=fused: fused(x, n, w, None, "silu", True),
                    "cuBLAS alone": lambda x=x, w=weight: F.linear(x, w),
                },
                bytes_moved=x.element_size() * (weight.numel() + x.numel() + depth + rows * width),
                flops=2 * rows * weight.numel(),
            )
