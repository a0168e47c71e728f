"""What the tests of norm_qkv call it with: every kind of head, and calls that leave their pages as they were."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from handloom_kernels.reference import Norm, Rotary
from kernel_testing import DEVICE, draw


@dataclass(frozen=True)
class Heads:
    """What kind of attention; rotary 0: no rotation; norm: of q and k heads."""

    num_heads: int = 2
    num_kv_heads: int = 1
    head_dim: int = 32
    v_head_dim: int = 32
    rotary_dim: int = 32
    interleaved: bool = False
    norm: str | None = None
    bias: bool = False
    kind: str = "rms"


KINDS = {
    "Llama": Heads(4, 2),
    "Qwen2": Heads(bias=True),
    "Qwen3": Heads(norm="rms"),
    "Gemma 3": Heads(head_dim=40, v_head_dim=40, rotary_dim=40, norm="rms_unit_offset", kind="rms_unit_offset"),
    "GPT-2": Heads(2, 2, rotary_dim=0, bias=True, kind="layer"),
    "Cohere": Heads(2, 2, interleaved=True, norm="layer", kind="layer"),
    "part of a head rotated": Heads(head_dim=20, v_head_dim=20, rotary_dim=8),
    "part of a head rotated in neighbours": Heads(head_dim=20, v_head_dim=20, rotary_dim=8, interleaved=True),
    "a rotation that ends within a piece": Heads(head_dim=40, v_head_dim=40, rotary_dim=20, norm="rms"),
    "narrow values": Heads(head_dim=24, v_head_dim=16, rotary_dim=8),
    "wide values": Heads(3, 1, head_dim=16, v_head_dim=40, rotary_dim=16, norm="rms"),
    "odd heads": Heads(head_dim=7, v_head_dim=5, rotary_dim=0),
}


def arguments(heads: Heads, dtype: torch.dtype, rows: int = 3, width: int = 48) -> tuple[Any, ...]:
    """What norm_qkv takes, with random pages of 4 slots; every third token has no slot."""
    pages = [
        draw(4, rows, heads.num_kv_heads, d, dtype=dtype).transpose(0, 1).contiguous()
        for d in (heads.head_dim, heads.v_head_dim)
    ]
    slots = torch.randperm(4 * rows)[:rows].to(DEVICE)
    slots[2::3] = -1
    num_rows = (heads.num_heads + heads.num_kv_heads) * heads.head_dim + heads.num_kv_heads * heads.v_head_dim

    def norm(kind: str | None, width: int, bias: bool = False) -> Norm | None:
        if kind is None:
            return None
        return Norm(kind, 1 + draw(width, dtype=dtype, scale=0.3), draw(width, dtype=dtype) if bias else None, 1e-5)

    angles = draw(rows, heads.rotary_dim // 2, scale=3)
    return (
        draw(rows, width, dtype=dtype),
        norm(heads.kind, width, bias=heads.kind == "layer"),
        draw(num_rows, width, dtype=dtype, scale=width**-0.5),
        draw(num_rows, dtype=dtype) if heads.bias else None,
        norm(heads.norm, heads.head_dim),
        norm(heads.norm, heads.head_dim),
        Rotary(angles.cos(), angles.sin(), heads.interleaved) if heads.rotary_dim else None,
        *pages,
        slots,
    )


def with_pages(op: Callable[..., Tensor], **options: Any) -> Callable[..., tuple[Tensor, ...]]:
    """op as a function that leaves its pages (and their scales) as they were and returns them with q."""

    def call(*args: Any) -> tuple[Tensor, ...]:
        copies = [each.clone() for each in (*args[7:9], *args[10:])]
        return op(*args[:7], *copies[:2], args[9], *copies[2:], **options), *copies

    return call
