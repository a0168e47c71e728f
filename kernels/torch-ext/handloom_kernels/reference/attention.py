"""Attention of ragged queries over paged keys and values.

This module does not know who owns a page.
"""

from __future__ import annotations

import torch
from torch import Tensor


def gather_pages(pages: Tensor, page_ids: Tensor, length: int) -> Tensor:
    """The first `length` tokens of a sequence, contiguous: [length, num_kv_heads, head_dim]."""
    return pages[page_ids].reshape(-1, *pages.shape[2:])[:length]


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
) -> Tensor:
    """Causal attention of ragged queries over paged keys and values.

    Args: q [N, num_heads, head_dim]; k_pages, v_pages [num_pages, page_size, num_kv_heads, head_dim];
    page_table [S, max_pages] int; cu_seqlens [S + 1] int, where each sequence's queries start;
    context_lens [S] int, keys per sequence, this step's tokens included: the last query sees them all.
    window: a query sees itself and the window - 1 keys before it. softcap: cap * tanh(score / cap), as
    Gemma 2. Query head h reads KV head h // (num_heads / num_kv_heads) (Ainslie et al. 2023).
    Returns [N, num_heads * head_dim] in q's dtype; softmax in float32.
    """
    group = q.shape[1] // k_pages.shape[2]
    outputs = []
    for s in range(len(context_lens)):
        start, end, length = int(cu_seqlens[s]), int(cu_seqlens[s + 1]), int(context_lens[s])
        page_ids = page_table[s, : -(-length // k_pages.shape[1])]
        k = gather_pages(k_pages, page_ids, length).to(q.dtype).repeat_interleave(group, dim=1)
        v = gather_pages(v_pages, page_ids, length).to(q.dtype).repeat_interleave(group, dim=1)
        scores = torch.einsum("qhd,khd->hqk", q[start:end], k) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        query_at = torch.arange(length - (end - start), length, device=q.device)[:, None]
        key_at = torch.arange(length, device=q.device)[None, :]
        visible = key_at <= query_at
        if window is not None:
            visible &= key_at > query_at - window
        weights = scores.masked_fill(~visible, float("-inf")).softmax(-1, dtype=torch.float32).to(q.dtype)
        outputs.append(torch.einsum("hqk,khd->qhd", weights, v))
    return torch.cat(outputs).flatten(1)
