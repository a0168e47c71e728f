"""The linear layers of a decoder layer, with what is fused before and after each.

This module does not know what a layer is made of.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from .activation import activate, gated_activation
from .norm import Norm, normalize, normalize_add
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

    Args: hidden [N, H]; weight [num_heads * D + num_kv_heads * (D + V), H] with q, k, v rows in that order;
    k_pages [num_pages, page_size, num_kv_heads, D] and v_pages [num_pages, page_size, num_kv_heads, V], written in
    place; slot_mapping [N] int64, the flat slot (page * page_size + offset) of each token, -1 where neither its K
    nor its V is written.
    Returns q [N, num_heads, D].
    """
    num_kv_heads, head_dim = k_pages.shape[-2:]
    k_rows, v_rows = num_kv_heads * head_dim, num_kv_heads * v_pages.shape[-1]
    x = F.linear(normalize(hidden, norm), weight, bias)
    q, k, v = x.split((len(weight) - k_rows - v_rows, k_rows, v_rows), dim=1)
    q, k, v = q.unflatten(1, (-1, head_dim)), k.unflatten(1, (-1, head_dim)), v.unflatten(1, (num_kv_heads, -1))
    if q_norm is not None and k_norm is not None:
        q, k = normalize(q, q_norm), normalize(k, k_norm)
    if rotary is not None:
        q, k = rotate(q, rotary), rotate(k, rotary)
    written = slot_mapping >= 0
    for pages, values in ((k_pages, k), (v_pages, v)):
        pages.view(-1, *pages.shape[2:])[slot_mapping[written]] = values[written].to(pages.dtype)
    return q


def linear_residual(x: Tensor, weight: Tensor, bias: Tensor | None, post_norm: Norm | None, residual: Tensor) -> Tensor:
    """residual + post_norm(x @ weight.T + bias): closes the attention and the MLP half of a layer.

    Args: x [N, K]; weight [H, K]; residual [N, H]. Returns [N, H]; residual is left as it was.
    """
    out = F.linear(x, weight, bias)
    return residual + out if post_norm is None else normalize_add(out, residual, post_norm)


def norm_mlp(hidden: Tensor, norm: Norm, weight: Tensor, bias: Tensor | None, activation: str, gated: bool) -> Tensor:
    """Norm, up projection and activation.

    Args: hidden [N, H]; weight [2 * I, H] (gate rows, then up rows) if gated (Shazeer 2020), else [I, H].
    Returns [N, I].
    """
    x = F.linear(normalize(hidden, norm), weight, bias)
    return gated_activation(x, activation) if gated else activate(x, activation)
