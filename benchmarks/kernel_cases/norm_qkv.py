from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from handloom_kernels import norm_qkv as kernels
from handloom_kernels import quantized_linear, reference, rope
from handloom_kernels.norm import normalize
from handloom_kernels.reference import Norm, QuantizedWeight, Rotary
from kernel_case import KernelCase

FORMS = (("int8", 0), ("int4", 128), ("fp8", 0))

# name, heads, KV heads, head_dim, hidden size, norm of q and k
MODELS = (
    ("Qwen3-0.6B", 16, 8, 128, 1024, True),
    ("Llama-3.2-1B", 32, 8, 64, 2048, False),
    ("Gemma-3-1B", 4, 1, 256, 1152, True),
    ("Llama-3.1-8B", 32, 8, 128, 4096, False),
)


def unfused(
    hidden: Tensor,
    norm: Norm,
    weight: Tensor,
    bias: Tensor | None,
    q_norm: Norm | None,
    k_norm: Norm | None,
    rotary: Rotary,
    k_pages: Tensor,
    v_pages: Tensor,
    slot_mapping: Tensor,
) -> Tensor:
    """The same from PyTorch's own operators, every token having a slot."""
    num_kv_heads, head_dim = k_pages.shape[-2:]
    heads = F.linear(F.rms_norm(hidden, hidden.shape[-1:], norm.weight, norm.eps), weight, bias)
    q, k, v = heads.unflatten(1, (-1, head_dim)).split(
        (heads.shape[1] // head_dim - 2 * num_kv_heads, num_kv_heads, num_kv_heads), 1
    )
    if q_norm is not None and k_norm is not None:
        q = F.rms_norm(q, (head_dim,), q_norm.weight, q_norm.eps)
        k = F.rms_norm(k, (head_dim,), k_norm.weight, k_norm.eps)
    k_pages.flatten(0, 1).index_copy_(0, slot_mapping, reference.rotate(k, rotary))
    v_pages.flatten(0, 1).index_copy_(0, slot_mapping, v)
    return reference.rotate(q, rotary)


def in_launches(hidden: Tensor, norm: Norm, q: QuantizedWeight, bias: Tensor | None, *rest: Any) -> Tensor:
    """The same kernels without the fusion: norm, product, and what follows it."""
    num_kv_heads, head_dim = rest[3].shape[2:]
    num_heads = q.shape[0] // head_dim - 2 * num_kv_heads
    return rope.qk_norm_rope_write(
        quantized_linear.quantized_linear(normalize(hidden, norm), q, bias), num_heads, *rest
    )


def cases(device: torch.device, dtype: torch.dtype, small: bool) -> Iterator[KernelCase]:
    """The start of a layer in a decode step. "cuBLAS alone" is the product without what is fused around it."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype) * shape[-1] ** -0.5

    for name, num_heads, num_kv_heads, head_dim, depth, head_norm in (
        (("small", 2, 1, 16, 64, True),) if small else MODELS
    ):
        weight, norm = draw((num_heads + 2 * num_kv_heads) * head_dim, depth), Norm("rms", draw(depth), None, 1e-6)
        of_heads = Norm("rms", draw(head_dim), None, 1e-6) if head_norm else None
        k_pages, v_pages = draw(64, 16, num_kv_heads, head_dim), draw(64, 16, num_kv_heads, head_dim)
        fused = torch.compile(unfused)
        for rows in (1,) if small else (1, 4, 16):
            angles = torch.randn(rows, head_dim // 2, device=device)
            slots = torch.randperm(64 * 16, device=device)[:rows]
            hidden, rotary = draw(rows, depth), Rotary(angles.cos(), angles.sin())
            args = (hidden, norm, weight, None, of_heads, of_heads, rotary, k_pages, v_pages, slots)
            tickets = torch.zeros(
                kernels.tickets_needed(rows, num_heads, num_kv_heads), dtype=torch.int32, device=device
            )
            yield KernelCase(
                f"{name}, {rows} rows",
                lambda args=args, tickets=tickets: kernels.norm_qkv(*args, tickets=tickets),
                {
                    "torch": lambda args=args: unfused(*args),
                    "torch.compile": lambda args=args, fused=fused: fused(*args),
                    "cuBLAS alone": lambda hidden=hidden, weight=weight: F.linear(hidden, weight),
                },
                bytes_moved=hidden.element_size() * (weight.numel() + hidden.numel() + depth + rows * len(weight)),
                flops=2 * rows * weight.numel(),
            )
            for kind, group in FORMS if rows != 4 else ():
                q = reference.quantize_weight(weight, kind, group)
                given = (*args[:2], q, *args[3:])
                yield KernelCase(
                    f"{name}, {kind}{f' g{group}' if group else ''}, {rows} rows",
                    lambda given=given, tickets=tickets: kernels.quantized_norm_qkv(*given, tickets=tickets),
                    {
                        "torch, 16 bits": lambda args=args: unfused(*args),
                        "a launch for each": lambda given=given: in_launches(*given),
                    },
                    bytes_moved=q.data.nbytes
                    + q.scales.nbytes
                    + hidden.element_size() * (hidden.numel() + depth + rows * len(weight)),
                    flops=2 * rows * weight.numel(),
                )
