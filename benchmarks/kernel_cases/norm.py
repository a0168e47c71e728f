from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn import functional as F  # noqa: N812

from handloom_kernels import norm as kernels
from handloom_kernels import reference
from handloom_kernels.reference import Norm
from kernel_case import KernelCase


def cases(device: torch.device, dtype: torch.dtype, small: bool) -> Iterator[KernelCase]:
    """RMSNorm, plain and with the residual added."""
    for rows, width in ((2, 64),) if small else ((1, 2048), (1, 4096), (64, 4096), (4096, 4096)):
        x, residual = (torch.randn(rows, width, device=device, dtype=dtype) for _ in range(2))
        norm = Norm("rms", torch.randn(width, device=device, dtype=dtype), None, 1e-6)
        size = x.element_size() * width
        fused = torch.compile(reference.add_normalize)

        def plain(x: torch.Tensor = x, norm: Norm = norm) -> torch.Tensor:
            return F.rms_norm(x, x.shape[-1:], norm.weight, norm.eps)

        yield KernelCase(
            f"rms {rows} x {width}",
            lambda x=x, norm=norm: kernels.normalize(x, norm),
            {"torch": plain},
            bytes_moved=size * (2 * rows + 1),
            flops=4 * x.numel(),
        )
        yield KernelCase(
            f"residual + rms {rows} x {width}",
            lambda x=x, r=residual, norm=norm: kernels.add_normalize(x, r, norm),
            {"torch.compile": lambda x=x, r=residual, norm=norm, fused=fused: fused(x, r, norm)},
            bytes_moved=size * (4 * rows + 1),
            flops=5 * x.numel(),
        )
