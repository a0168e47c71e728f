from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from handloom_kernels.prefill_attention import prefill_attention
from kernel_case import KernelCase

PAGE_SIZE = 64
BACKENDS = {"SDPA flash": SDPBackend.FLASH_ATTENTION, "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION}


def cases(device: torch.device, dtype: torch.dtype, small: bool) -> Iterator[KernelCase]:
    """Whole prompts and a chunk after a long cached prefix, in the shapes of Llama-3.1-8B and with gpt-oss's window.

    The peers read keys and values that lie contiguous, sequence after sequence; no page is looked up.
    """
    shapes = [  # sequences, new tokens and keys of each, query heads, KV heads, head_dim, window
        (1, 4096, 4096, 32, 8, 128, None),
        (8, 512, 512, 32, 8, 128, None),
        (1, 512, 8704, 32, 8, 128, None),
        (1, 4096, 4096, 64, 8, 64, None),
        (1, 4096, 4096, 64, 8, 64, 128),
        (1, 4096, 4096, 8, 4, 256, 512),
    ]
    for count, new, length, heads, kv_heads, head_dim, window in [(2, 8, 24, 4, 2, 16, None)] if small else shapes:
        q = torch.randn(count * new, heads, head_dim, device=device, dtype=dtype)
        per_sequence = -(-length // PAGE_SIZE)
        pages = torch.randn(2, count * per_sequence, PAGE_SIZE, kv_heads, head_dim, device=device, dtype=dtype)
        table = torch.randperm(count * per_sequence, device=device).view(count, -1)
        starts = torch.arange(count + 1, device=device) * new
        lengths = torch.full((count,), length, device=device)
        arguments = (q, *pages, table, starts, lengths, head_dim**-0.5, window)
        visible = sum(min(length - new + i + 1, window or length) for i in range(new))
        keys_read = length if window is None else min(length, new + window - 1)
        yield KernelCase(
            f"{count} x {new} of {length}, {heads}/{kv_heads} heads of {head_dim}"
            + (f", window {window}" if window else ""),
            lambda arguments=arguments: prefill_attention(*arguments),
            {} if window else peers(q, pages, table, length),
            bytes_moved=q.element_size() * head_dim * count * (2 * new * heads + 2 * keys_read * kv_heads),
            flops=4 * head_dim * heads * count * visible,
        )


def peers(q: Tensor, pages: Tensor, table: Tensor, length: int) -> dict[str, Callable[[], object]]:
    """Torch's attention on the same queries and on contiguous keys and values."""
    count, heads = len(table), q.shape[1]
    queries = q.view(count, -1, *q.shape[1:]).transpose(1, 2).contiguous()
    keys, values = (each[table].flatten(1, 2)[:, :length].transpose(1, 2).contiguous() for each in pages)
    whole = queries.shape[2] == length
    mask: Any = {"is_causal": True} if whole else {"attn_mask": causal_lower_right(queries.shape[2], length)}
    if not whole:  # with this mask torch's flash attention does not share the heads of a group
        keys, values = (each.repeat_interleave(heads // each.shape[1], dim=1) for each in (keys, values))

    def run(backend: SDPBackend) -> object:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(queries, keys, values, enable_gqa=whole, **mask)

    if q.device.type != "cuda":
        return {"SDPA on contiguous K/V": lambda: run(SDPBackend.MATH)}
    if not whole:  # cuDNN cannot be given this mask
        return {"SDPA flash on contiguous K/V, heads repeated": lambda: run(SDPBackend.FLASH_ATTENTION)}
    return {f"{name} on contiguous K/V": lambda each=each: run(each) for name, each in BACKENDS.items()}
