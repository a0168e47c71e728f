"""Rotary position embedding, and what stands between a QKV projection and attention.

This module does not know how the angles come about.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .norm import Norm, normalize
from .pages import write_pages


class Rotary(NamedTuple):
    """Rotary position embedding (Su et al. 2021) at this step's positions: cos, sin [N, rotary_dim / 2] float32.

    Halves are rotated (dimension i with i + rotary_dim / 2), as in every Hub checkpoint of the Llama kind, or, if
    interleaved, neighbours (2i with 2i + 1), as in GPT-J and Cohere. How the angles grow with the position, and any
    factor on cos and sin, is in the tables: linear, dynamic, llama3, yarn and longrope scaling and the sections of
    M-RoPE are all the same rotation.
    """

    cos: Tensor
    sin: Tensor
    interleaved: bool = False


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Rotate x [N, heads, head_dim]; dimensions past rotary_dim pass through."""
    half = rotary.cos.shape[-1]
    cos, sin = (t.to(x.dtype).unsqueeze(1) for t in (rotary.cos, rotary.sin))
    turned, rest = x[..., : 2 * half], x[..., 2 * half :]
    if rotary.interleaved:
        first, second = turned[..., 0::2], turned[..., 1::2]
        pairs = torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1)
        return torch.cat((pairs.flatten(-2), rest), dim=-1)
    first, second = turned[..., :half], turned[..., half:]
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)


def qk_norm_rope_write(
    qkv: Tensor,
    num_heads: int,
    q_norm: Norm | None,
    k_norm: Norm | None,
    rotary: Rotary | None,
    k_pages: Tensor,
    v_pages: Tensor,
    slot_mapping: Tensor,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> Tensor:
    """Per-head norm and rotation of q and k, and the write of K and V into their pages.

    Args: qkv [N, num_heads * D + num_kv_heads * (D + Dv)], q, k and v of each token in that order; q_norm, k_norm over
    D; k_pages [num_pages, page_size, num_kv_heads, D] and v_pages [..., Dv], written in place; slot_mapping [N] int,
    the flat slot (page * page_size + offset) of each token, -1 for one that is not to be written; k_scales, v_scales
    [num_pages, page_size, num_kv_heads] float32, written with the codes of quantised pages.
    Returns q [N, num_heads, D].
    """
    num_kv_heads, head_dim = k_pages.shape[-2:]
    q_columns, k_columns = num_heads * head_dim, num_kv_heads * head_dim
    q = qkv[:, :q_columns].reshape(-1, num_heads, head_dim)
    k = qkv[:, q_columns : q_columns + k_columns].reshape(-1, num_kv_heads, head_dim)
    v = qkv[:, q_columns + k_columns :].reshape(-1, *v_pages.shape[-2:])
    if q_norm is not None:
        q = normalize(q, q_norm)
    if k_norm is not None:
        k = normalize(k, k_norm)
    if rotary is not None:
        q, k = rotate(q, rotary), rotate(k, rotary)
    write_pages(k, k_pages, slot_mapping, k_scales)
    write_pages(v, v_pages, slot_mapping, v_scales)
    return q
