"""Attention of ragged queries over paged keys and values.

This module does not know who owns a page.
"""

from __future__ import annotations

from typing import Sequence, cast

import torch
from torch import Tensor


def gather_pages(pages: Tensor, page_ids: Tensor, length: int) -> Tensor:
    """The first `length` tokens of a sequence, contiguous: [length, num_kv_heads, head_dim]."""
    return pages[page_ids].reshape(-1, *pages.shape[2:])[:length]


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention of one sequence: (output [Q, num_heads, v_head_dim], log-sum-exp [Q, num_heads] float32).

    Args: q [Q, num_heads, head_dim]; k [T, num_heads, head_dim]; v [T, num_heads, v_head_dim]; visible [Q, T] bool;
    bias [num_heads, Q, T], added to the scores. Each head's sink is one more score that has no value: it only takes
    its share of the weights (gpt_oss).
    """
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = (scores if bias is None else scores + bias).to(wide).masked_fill(~visible, float("-inf"))
    if sinks is not None:
        column = sinks.to(wide)[:, None, None].expand(-1, len(q), 1)
        scores = torch.cat((scores, column), dim=-1)
    lse = scores.logsumexp(-1)
    weights = (scores - lse.masked_fill(lse.isneginf(), 0)[..., None]).exp()[..., : len(k)]
    return torch.einsum("hqk,khd->qhd", weights.to(q.dtype), v), lse.T


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
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
    *,
    query_lens: Sequence[int] | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal attention of ragged queries over paged keys and values.

    Args: q [N, num_heads, head_dim]; k_pages [num_pages, page_size, num_kv_heads, head_dim], v_pages
    [..., v_head_dim]; page_table [S, max_pages] int; cu_seqlens [S + 1] int, where each sequence's queries start;
    context_lens [S] int, keys per sequence, this step's tokens included: the last query sees them all.
    window: a query sees itself and the window - 1 keys before it. softcap: cap * tanh(score / cap), as
    Gemma 2. sinks [num_heads]: one more score per head that has no value (gpt_oss). alibi_slopes [num_heads]: slope *
    (key - query position) is added to a score (Press et al. 2021). k_scales, v_scales [num_pages, page_size,
    num_kv_heads]: what the codes of quantised pages are multiplied by. Query head h reads KV head
    h // (num_heads / num_kv_heads) (Ainslie et al. 2023). Multi-head latent attention (DeepSeek-V2) is one KV head
    whose v_pages are the first v_head_dim columns of k_pages. query_lens: how many queries each sequence has, by which
    kernels are chosen without asking the device; nothing here depends on it.
    Returns [N, num_heads * v_head_dim] in q's dtype; softmax in float32. With return_lse also each query's log-sum-exp
    over its scores, sink included, [N, num_heads] float32: with it, attention over two sets of keys merges into
    attention over both (`merge_attention`).
    """
    group = q.shape[1] // k_pages.shape[2]
    wide = torch.promote_types(q.dtype, torch.float32)
    outputs, lses = [], []
    for s in range(len(context_lens)):
        start, end, length = int(cu_seqlens[s]), int(cu_seqlens[s + 1]), int(context_lens[s])
        page_ids = page_table[s, : -(-length // k_pages.shape[1])]
        k, v = (
            gather_pages(pages, page_ids, length).to(wide)
            if scales is None
            else gather_pages(pages, page_ids, length).to(wide) * gather_pages(scales, page_ids, length)[..., None]
            for pages, scales in ((k_pages, k_scales), (v_pages, v_scales))
        )
        k, v = (x.to(q.dtype).repeat_interleave(group, dim=1) for x in (k, v))
        query_at = torch.arange(length - (end - start), length, device=q.device)[:, None]
        key_at = torch.arange(length, device=q.device)[None, :]
        visible = key_at <= query_at
        if window is not None:
            visible &= key_at > query_at - window
        bias = None if alibi_slopes is None else alibi_slopes.to(wide)[:, None, None] * (key_at - query_at)
        output, lse = attend(q[start:end], k, v, visible, scale, softcap, sinks, bias)
        outputs.append(output)
        lses.append(lse)
    out = torch.cat(outputs).flatten(1)
    return (out, torch.cat(lses)) if return_lse else out


def merge_attention(first: Tensor, first_lse: Tensor, second: Tensor, second_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the union of two disjoint sets of keys, from attention over each and their log-sum-exps.

    Args: first, second [N, num_heads * v_head_dim]; first_lse, second_lse [N, num_heads] float32. A set without
    visible keys has log-sum-exp -inf and no weight. Returns (output, log-sum-exp) of the same shapes.
    """
    lse = torch.logaddexp(first_lse, second_lse)
    parts = [
        output.view(*lse.shape, -1).to(lse.dtype) * (own - lse.masked_fill(lse.isneginf(), 0)).exp()[..., None]
        for output, own in ((first, first_lse), (second, second_lse))
    ]
    return sum(parts, torch.zeros_like(parts[0])).flatten(1).to(first.dtype), lse


def shared_prefix_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    prefix_pages: Tensor,
    prefix_length: int,
    page_table: Tensor,
    cu_seqlens: Tensor,
    context_lens: Tensor,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """`paged_attention` of sequences that all begin with the same prefix_length tokens, stored once.

    Args: prefix_pages [P] int, the pages of the prefix, which fills them; page_table [S, max_pages] and
    context_lens [S]: pages and keys after the prefix, at least the queries themselves. The rest as `paged_attention`.
    """
    whole = torch.cat((prefix_pages.expand(len(page_table), -1), page_table), dim=1)
    lengths = context_lens + prefix_length
    return cast(Tensor, paged_attention(q, k_pages, v_pages, whole, cu_seqlens, lengths, scale, None, softcap, sinks))
