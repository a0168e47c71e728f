from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from handloom_kernels import kv_pages as kernels
from kernel_case import KernelCase


def cases(device: torch.device, dtype: torch.dtype, small: bool) -> Iterator[KernelCase]:
    """Pages copied in all layers of Llama 3.1 8B, for one fork and for many beams."""
    layers, heads, head_dim, page_size = (2, 2, 16, 4) if small else (32, 8, 128, 16)
    for copies in (2,) if small else (1, 16, 256):
        pages = torch.randn(layers, 2, 2 * copies, page_size, heads, head_dim, device=device, dtype=dtype)
        source, target = torch.randperm(2 * copies, device=device).view(2, copies)

        def plain(pages: Tensor = pages, source: Tensor = source, target: Tensor = target) -> None:
            pages[:, :, target] = pages[:, :, source]

        yield KernelCase(
            f"{copies} pages of {layers} layers",
            lambda pages=pages, s=source, t=target: kernels.copy_pages(pages, s, t),
            {"torch": plain},
            bytes_moved=pages.numel() * pages.element_size(),
        )
