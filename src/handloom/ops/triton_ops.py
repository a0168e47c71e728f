"""The ops on the Triton kernels of `handloom_kernels`: fused skinny linears for few rows, BLAS and kernels for many.

Up to FEW rows a linear is bound by reading its weight, and one kernel does all around it. With more rows the
product is compute-bound: the vendor's BLAS is faster there, and norm, rotation and activation are kernels beside it.

This module does not know about models, sequences or requests.
"""

from __future__ import annotations

from typing import cast

from torch import Tensor, tanh
from torch.nn import functional as F  # noqa: N812

from handloom_kernels import activation as activation_kernels
from handloom_kernels import linear, rope
from handloom_kernels import lm_head as head
from handloom_kernels import norm as norms
from handloom_kernels import norm_qkv as qkv_kernel
from handloom_kernels.decode_attention import decode_attention
from handloom_kernels.prefill_attention import prefill_attention
from handloom_kernels.reference import Norm, Rotary, embed

__all__ = ["embed", "linear_residual", "lm_head", "norm_mlp", "norm_qkv", "paged_attention"]

FEW = 16
DECODE_QUERIES = 16


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
    """See `handloom_kernels.reference.norm_qkv`."""
    if len(hidden) <= FEW:
        return qkv_kernel.norm_qkv(hidden, norm, weight, bias, q_norm, k_norm, rotary, k_pages, v_pages, slot_mapping)
    num_kv_heads, head_dim = k_pages.shape[-2:]
    num_heads = (len(weight) - num_kv_heads * (head_dim + v_pages.shape[-1])) // head_dim
    qkv = F.linear(norms.normalize(hidden, norm), weight, bias)
    return rope.qk_norm_rope_write(qkv, num_heads, q_norm, k_norm, rotary, k_pages, v_pages, slot_mapping)


def paged_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    cu_seqlens: Tensor,
    context_lens: Tensor,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    *,
    max_query_len: int | None = None,
) -> Tensor:
    """See `handloom_kernels.reference.paged_attention`."""
    arguments = (q, k_pages, v_pages, page_table, cu_seqlens, context_lens, scale, window, softcap)
    if max_query_len is not None and max_query_len <= DECODE_QUERIES:
        return cast(Tensor, decode_attention(*arguments, max_query_len=max_query_len))
    return cast(Tensor, prefill_attention(*arguments))


def linear_residual(x: Tensor, weight: Tensor, bias: Tensor | None, post_norm: Norm | None, residual: Tensor) -> Tensor:
    """See `handloom_kernels.reference.linear_residual`."""
    if len(x) <= FEW:
        return linear.linear_residual(x, weight, bias, post_norm, residual)
    out = F.linear(x, weight, bias)
    return residual + out if post_norm is None else norms.normalize_add(out, residual, post_norm)


def norm_mlp(hidden: Tensor, norm: Norm, weight: Tensor, bias: Tensor | None, activation: str, gated: bool) -> Tensor:
    """See `handloom_kernels.reference.norm_mlp`."""
    if len(hidden) <= FEW:
        return linear.norm_mlp(hidden, norm, weight, bias, activation, gated)
    x = F.linear(norms.normalize(hidden, norm), weight, bias)
    return activation_kernels.gated_activation(x, activation) if gated else activation_kernels.activate(x, activation)


def lm_head(hidden: Tensor, norm: Norm, weight: Tensor, softcap: float | None) -> Tensor:
    """See `handloom_kernels.reference.lm_head`."""
    if len(hidden) <= FEW:
        return head.lm_head(hidden, norm, weight, softcap)
    logits = F.linear(norms.normalize(hidden, norm), weight)
    return (logits if softcap is None else softcap * tanh(logits / softcap)).float()
