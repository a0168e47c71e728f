"""The linear layers of a decoder layer, with what is fused before and after each.

This module does not know what a layer is made of.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from .activation import activate, gated_activation
from .norm import Norm, normalize, normalize_add
from .rope import Rotary, qk_norm_rope_write


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
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> Tensor:
    """Norm, QKV projection, and `qk_norm_rope_write`: per-head norm and rotation of q and k, the page write.

    Args: hidden [N, H]; weight [num_heads * D + num_kv_heads * (D + Dv), H] with q, k, v rows in that order;
    k_pages [num_pages, page_size, num_kv_heads, D], v_pages [..., Dv], k_scales, v_scales: see there, written in place;
    slot_mapping [N] int, the flat slot (page * page_size + offset) of each token, -1 for one that is not to be written.
    Returns q [N, num_heads, D].
    """
    num_kv_heads, head_dim = k_pages.shape[-2:]
    qkv = F.linear(normalize(hidden, norm), weight, bias)
    num_heads = (len(weight) - num_kv_heads * (head_dim + v_pages.shape[-1])) // head_dim
    return qk_norm_rope_write(
        qkv, num_heads, q_norm, k_norm, rotary, k_pages, v_pages, slot_mapping, k_scales, v_scales
    )


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
