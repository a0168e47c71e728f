"""The ops on the Triton kernels of `handloom_kernels`: fused skinny linears for few rows, BLAS and kernels for many.

Up to FEW rows a linear is bound by reading its weight, and one kernel does all around it. With more rows the
product is compute-bound: the vendor's BLAS is faster there, and norm, rotation and activation are kernels beside it.

A sequence with up to MAX_QUERIES tokens in a step goes through decode attention, a longer one through prefill
attention, whatever else is in the batch. What holds to the bit, then, and what does not:

- In a step of up to FEW tokens a token's result depends on its sequence alone.
- So does attention, of tokens that are given the same q, in steps of any size.
- In a larger step BLAS adds in an order that may depend on the number of rows: other company, other last bits.
- The two attention kernels add in different orders: a token in a chunk of up to MAX_QUERIES tokens has other last bits
  than in a longer chunk. Among the longer chunks, and among the shorter, attention of the same q has the same bits.

This module does not know about models, sequences or requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, tanh
from torch.nn import functional as F  # noqa: N812

from handloom_kernels import activation as activation_kernels
from handloom_kernels import linear, rope
from handloom_kernels import lm_head as head
from handloom_kernels import norm as norms
from handloom_kernels import norm_qkv as qkv_kernel
from handloom_kernels.decode_attention import MAX_QUERIES, decode_attention, tickets_needed
from handloom_kernels.draw import draw
from handloom_kernels.prefill_attention import prefill_attention
from handloom_kernels.reference import Norm, Rotary, embed
from handloom_kernels.selection import find_cuts

__all__ = ["TritonOps"]

FEW = 16
TICKETS = 1 << 16


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


class TritonOps:
    """The ops on one device, for launches that follow each other: they share tickets, zeros that each leaves zero."""

    embed = staticmethod(embed)
    linear_residual = staticmethod(linear_residual)
    norm_mlp = staticmethod(norm_mlp)
    lm_head = staticmethod(lm_head)
    find_cuts = staticmethod(find_cuts)
    draw = staticmethod(draw)

    def __init__(self, device: torch.device) -> None:
        self.tickets = torch.zeros(TICKETS, dtype=torch.int32, device=device)

    def _tickets(self, needed: int) -> Tensor | None:
        """None, for the launcher to make its own, where these are too few."""
        return self.tickets if needed <= len(self.tickets) else None

    def norm_qkv(
        self,
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
        num_kv_heads, head_dim = k_pages.shape[-2:]
        num_heads = (len(weight) - num_kv_heads * (head_dim + v_pages.shape[-1])) // head_dim
        after = (q_norm, k_norm, rotary, k_pages, v_pages, slot_mapping)
        if len(hidden) <= FEW:
            tickets = self._tickets(qkv_kernel.tickets_needed(len(hidden), num_heads, num_kv_heads))
            return qkv_kernel.norm_qkv(hidden, norm, weight, bias, *after, tickets=tickets)
        qkv = F.linear(norms.normalize(hidden, norm), weight, bias)
        return rope.qk_norm_rope_write(qkv, num_heads, *after)

    def paged_attention(
        self,
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
        query_lens: Sequence[int],
    ) -> Tensor:
        """See `handloom_kernels.reference.paged_attention`."""
        arguments = (q, k_pages, v_pages, page_table, cu_seqlens, context_lens, scale, window, softcap)
        few = [count for count in query_lens if count <= MAX_QUERIES]
        out = None
        if len(few) < len(query_lens):
            out = cast(Tensor, prefill_attention(*arguments, longer_than=MAX_QUERIES))
        if few:
            tickets = self._tickets(tickets_needed(len(query_lens), q.shape[1], k_pages.shape[2], max(few)))
            out = cast(Tensor, decode_attention(*arguments, max_query_len=max(few), tickets=tickets, out=out))
        return cast(Tensor, out)
