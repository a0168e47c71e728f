from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from handloom_kernels import reference
from handloom_kernels import rope as kernels
from handloom_kernels.reference import Norm, Rotary
from kernel_case import KernelCase


def plain(
    qkv: Tensor,
    num_heads: int,
    norm: Norm | None,
    rotary: Rotary,
    pages: tuple[Tensor, Tensor],
    slots: Tensor,
    scales: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """The reference for tokens that all have slots, which nothing makes the host wait for."""
    num_kv_heads, head_dim = pages[0].shape[2:]
    q, k, v = qkv.unflatten(1, (-1, head_dim)).split((num_heads, num_kv_heads, num_kv_heads), dim=1)
    if norm is not None:
        q, k = reference.normalize(q, norm), reference.normalize(k, norm)
    q, k = reference.rotate(q, rotary), reference.rotate(k, rotary)
    for i, x in enumerate((k, v)):
        if scales is not None:
            x, own = reference.quantize_kv(x, pages[i].dtype)
            scales[i].flatten(0, 1)[slots] = own
        pages[i].flatten(0, 1)[slots] = x
    return q


def cases(device: torch.device, dtype: torch.dtype, small: bool) -> Iterator[KernelCase]:
    """Rotation and page write as Llama 3.1 8B, with q/k norm as Qwen3 8B; then to int8 pages."""
    num_heads, num_kv_heads, head_dim = (2, 1, 16) if small else (32, 8, 128)
    for rows in (4,) if small else (1, 64, 4096):
        columns = (num_heads + 2 * num_kv_heads) * head_dim
        qkv = torch.randn(rows, columns, device=device, dtype=dtype)
        weight = torch.randn(head_dim, device=device, dtype=dtype)
        angles = torch.rand(rows, head_dim // 2, device=device) * 100
        rotary = Rotary(angles.cos(), angles.sin())
        slots = torch.randperm(16 * rows, device=device)[:rows]
        fused = torch.compile(plain)
        for name, norm, dtype_of_pages in (
            ("rope + write", None, dtype),
            ("qk norm + rope + write", Norm("rms", weight, None, 1e-6), dtype),
            ("qk norm + rope + int8 write", Norm("rms", weight, None, 1e-6), torch.int8),
        ):
            pages = tuple(torch.randn(2, rows, 16, num_kv_heads, head_dim, device=device).to(dtype_of_pages))
            scales = tuple(torch.rand(2, rows, 16, num_kv_heads, device=device)) if pages[0].itemsize == 1 else None
            arguments = (qkv, num_heads, norm, norm, rotary, *pages, slots, *(scales or ()))
            peer = partial(plain, qkv, num_heads, norm, rotary, pages, slots, scales)
            written = 2 * num_kv_heads * (head_dim * pages[0].itemsize + 4 * (scales is not None))
            read = columns * qkv.itemsize + head_dim * angles.itemsize + slots.itemsize
            yield KernelCase(
                f"{name}, {rows} tokens",
                partial(kernels.qk_norm_rope_write, *arguments),
                {"torch": peer, "torch.compile": partial(fused, *peer.args)},
                bytes_moved=rows * (read + num_heads * head_dim * qkv.itemsize + written),
                flops=10 * qkv.numel(),
            )
