from __future__ import annotations

from collections.abc import Iterator

import torch

from handloom_kernels import reference
from handloom_kernels import rope as kernels
from handloom_kernels.reference import Norm, Rotary
from kernel_case import KernelCase


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
        fused = torch.compile(reference.qk_norm_rope_write)
        for name, norm, pages in (
            ("rope + write", None, dtype),
            ("qk norm + rope + write", Norm("rms", weight, None, 1e-6), dtype),
            ("qk norm + rope + int8 write", Norm("rms", weight, None, 1e-6), torch.int8),
        ):
            k_pages, v_pages = torch.randn(2, rows, 16, num_kv_heads, head_dim, device=device).to(pages)
            scales = [torch.rand(rows, 16, num_kv_heads, device=device) for _ in range(2 * (pages == torch.int8))]
            arguments = (qkv, num_heads, norm, norm, rotary, k_pages, v_pages, slots, *scales)
            written = 2 * num_kv_heads * (head_dim * k_pages.element_size() + 4 * bool(scales))
            read = columns * qkv.element_size() + head_dim * angles.element_size() + slots.element_size()
            yield KernelCase(
                f"{name}, {rows} tokens",
                lambda arguments=arguments: kernels.qk_norm_rope_write(*arguments),
                {
                    "torch": lambda arguments=arguments: reference.qk_norm_rope_write(*arguments),
                    "torch.compile": lambda arguments=arguments, fused=fused: fused(*arguments),
                },
                bytes_moved=rows * (read + num_heads * head_dim * qkv.element_size() + written),
                flops=10 * qkv.numel(),
            )
