"""The linear layers of a decoder layer, with what is fused before and after each.

This module does not know what a layer is made of.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from .activation import activate
from .norm import Norm, normalize
from .rope import Rotary, rotate


def norm_qkv(
    hidden: Tensor,
    norm: Norm,
    weight: Tensor,
    bias: Tensor | None,
    q_norm: Norm | None,
    k_norm: Norm | None,
    rotary: Rotary | None,
    k_pages: Tensor,
    v_pages: Tensor,
    slot_mapping: Tensor,
) -> Tensor:
    """Norm, QKV projection, per-head q/k norm, rotation, and the write of K and V into their pages.

    Args: hidden [N, H]; weight [(num_heads + 2 * num_kv_heads) * head_dim, H] with q, k, v rows in that
    order; k_pages, v_pages [num_pages, page_size, num_kv_heads, head_dim], written in place;
    slot_mapping [N] int64, the flat slot (page * page_size + offset) of each token.
    Returns q [N, num_heads, head_dim].
    """
    num_kv_heads, head_dim = k_pages.shape[-2:]
    heads = F.linear(normalize(hidden, norm), weight, bias).view(len(hidden), -1, head_dim)
    q, k, v = heads[:, : -2 * num_kv_heads], heads[:, -2 * num_kv_heads : -num_kv_heads], heads[:, -num_kv_heads:]
    if q_norm is not None and k_norm is not None:
        q, k = normalize(q, q_norm), normalize(k, k_norm)
    if rotary is not None:
        q, k = rotate(q, rotary), rotate(k, rotary)
    k_pages.view(-1, num_kv_heads, head_dim)[slot_mapping] = k.to(k_pages.dtype)
    v_pages.view(-1, num_kv_heads, head_dim)[slot_mapping] = v.to(v_pages.dtype)
    return q


def linear_residual(x: Tensor, weight: Tensor, bias: Tensor | None, post_norm: Norm | None, residual: Tensor) -> Tensor:
    """residual + post_norm(x @ weight.T + bias): closes the attention and the MLP half of a layer.

    Args: x [N, K]; weight [H, K]; residual [N, H]. Returns [N, H]; residual is left as it was.
    """
    out = F.linear(x, weight, bias)
    return residual + (out if post_norm is None else normalize(out, post_norm))


def norm_mlp(hidden: Tensor, norm: Norm, weight: Tensor, bias: Tensor | None, activation: str, gated: bool) -> Tensor:
    """Norm, up projection and activation.

    Args: hidden [N, H]; weight [2 * I, H] (gate rows, then up rows) if gated (Shazeer 2020), else [I, H].
    Returns [N, I].
    """
    x = F.linear(normalize(hidden, norm), weight, bias)
    if not gated:
        return activate(x, activation)
    gate, up = x.chunk(2, dim=-1)
    return activate(gate, activation) * up
