"""Attention of many queries per sequence over paged keys and values: prefill, chunked prefill, cached prefixes.

    out[i] = sum over the keys j <= i of softmax_j(scale * q[i] . k[j]) * v[j]

N queries of S sequences lie end to end; each sequence's queries are its last tokens, and all of its keys, theirs too,
already lie in pages. The scores are never stored (FlashAttention-2: Dao 2023, arXiv 2307.08691): one program owns one
tile of queries and walks over the tiles of keys with the running top, total and acc of decode_attention.py:

                                   keys of one sequence, BLOCK_N to a tile
                             0       32      64      96      128     160
                             |-------|-------|-------|-------|-------|
    queries 110 .. 117       | full  | full  | full  |masked |            its last query sees key 117
    queries 118 .. 125       | full  | full  | full  |masked |
    queries 126 .. 133       | full  | full  | full  |masked |masked |    key 128 begins another tile
    the same, window 80      |       |masked | full  |masked |masked |    keys before 47 are not read

    the rows of a tile:   query 110, head 0   \\
                          query 110, head 1    |  PACK query heads that read the same KV head, BLOCK_Q queries each,
                          query 111, head 0    |  BLOCK_M >= PACK * BLOCK_Q rows in all
                          query 111, head 1   /

Packing the heads of a KV group into one tile keeps it full when a sequence has few queries, and makes it span fewer
positions, so that less is computed beyond the diagonal and the window. Tiles with full rows need no mask; only those at
the diagonal and at the window's edge pay for one. Programs find their sequence by bisecting cu_seqlens, so that the
host reads no tensor; the longest walks start first and the short ones fill up the end.

Tiles of keys begin at multiples of BLOCK_N from key 0, and one in which a row sees nothing leaves its top, total and
acc as they were, to the bit. So a query's result is the same in whatever chunk or company it comes.

To compute: 2 (head_dim + v_head_dim) FLOPs for every query head and key it sees. To move: each query, result, and
visible key and value once; every BLOCK_M rows read the keys again, from the second-level cache. Bound by arithmetic
beyond a few hundred queries.

This module does not know who owns a page, nor how keys were rotated. Meaning: `reference.paged_attention`.
"""

from __future__ import annotations

from functools import partial
from typing import Iterator, Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .attention_parts import LN_2, LOWEST, check_attention, load_columns, page_strides, store_columns, tile_widths
from .checks import require
from .tiles import LOG2_E, tanh
from .tuning import Problem, config

MAX_PACK = 16


@triton.jit
def _sequence_of(tile, cu_seqlens, num_sequences, BLOCK_Q: tl.constexpr):
    """(s, the first tile of s): sequence s owns the tiles from cu_seqlens[s] // BLOCK_Q + s on, one more than it may
    need, so that where its tiles begin depends on nothing but cu_seqlens[s]."""
    low = 0
    high = num_sequences
    while high - low > 1:
        middle = (low + high) // 2
        below = (tl.load(cu_seqlens + middle) // BLOCK_Q + middle).to(tl.int32) <= tile
        low = tl.where(below, middle, low)
        high = tl.where(below, high, middle)
    return low, (tl.load(cu_seqlens + low) // BLOCK_Q + low).to(tl.int32)


@triton.jit
def _load_each(pointers, inside):
    return tl.load(pointers) if inside is None else tl.load(pointers, mask=inside, other=0)


@triton.jit
def _attend_tiles(
    q, q_rest, query_at, slopes, top, total, acc, k_pages, v_pages, k_scales, v_scales, page_ids, k_page_stride,
    k_slot_stride, v_page_stride, v_slot_stride, low, high, begin, end, window, inner, gain, unit,
    MASKED: tl.constexpr, NUM_KV_HEADS: tl.constexpr, PAGE_BITS: tl.constexpr, HEAD_DIM: tl.constexpr,
    V_HEAD_DIM: tl.constexpr, V_IN_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """top, total and acc after the tiles of keys begin .. end too. Of MASKED ones the keys low .. high are read, and a
    row leaves out those that it does not see; of the others every row sees every key."""
    PAGE_SIZE: tl.constexpr = 1 << PAGE_BITS
    for start in range(begin, end, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        inside = (keys >= low) & (keys < high) if MASKED else None
        if PAGE_SIZE >= BLOCK_N:
            page = tl.load(page_ids + (start >> PAGE_BITS)).to(tl.int64)
        else:
            page = _load_each(page_ids + (keys >> PAGE_BITS), inside).to(tl.int64)
        slot = (keys & (PAGE_SIZE - 1)).to(tl.int64)
        scales_at = (page * PAGE_SIZE + slot) * NUM_KV_HEADS
        k_rows = page * k_page_stride + slot * k_slot_stride
        k = load_columns(k_pages, k_rows, inside, 0, q.shape[1], HEAD_DIM)
        x = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision="ieee")
        if q_rest is not None:
            k_rest = load_columns(k_pages, k_rows, inside, q.shape[1], q_rest.shape[1], HEAD_DIM)
            x = tl.dot(q_rest, tl.trans(k_rest.to(q.dtype)), x, input_precision="ieee")
        if k_scales is not None:
            x *= _load_each(k_scales + scales_at, inside)[None, :]
        if inner is not None:
            x = tanh(x * inner)
        if slopes is not None:
            x = tl.fma(slopes[:, None], (keys[None, :] - query_at[:, None]).to(tl.float32), x * gain)
        if MASKED:
            hidden = keys[None, :] > query_at[:, None]
            if window is not None:
                hidden |= keys[None, :] <= query_at[:, None] - window
            x = tl.where(hidden, float("-inf"), x)

        # x * unit is the score in base 2; fma is spelled out, for full and masked tiles must round alike
        raised = tl.maximum(top, tl.max(x, 1))
        weights = tl.exp2(tl.fma(x, unit, (raised * -unit)[:, None]))
        fade = tl.exp2((top - raised) * unit)
        total = tl.fma(total, fade, tl.sum(weights, 1))
        top = raised
        if V_IN_K:
            v = k
        else:
            v_rows = k_rows
            if v_page_stride is not None:
                v_rows = page * v_page_stride + slot * v_slot_stride
            v = load_columns(v_pages, v_rows, inside, 0, acc.shape[1], V_HEAD_DIM)
        if v_scales is not None:
            v = v.to(tl.float32) * _load_each(v_scales + scales_at, inside)[:, None]
        acc = tl.dot(weights.to(q.dtype), v.to(q.dtype), acc * fade[:, None], input_precision="ieee")
    return top, total, acc


@triton.jit
def _spans(first_at, queries, window, BLOCK_N: tl.constexpr):
    """(low, full, edge, high) of the queries at first_at, first_at + 1, ...: keys low .. high are seen by some of them,
    those of the tiles between `full` and `edge` by all."""
    low = 0
    full = 0
    edge = (first_at + 1) // BLOCK_N * BLOCK_N
    high = first_at + queries
    if window is not None:
        low = tl.maximum(first_at + 1 - window, 0)
        full = tl.minimum(tl.cdiv(tl.maximum(high - window, 0), BLOCK_N) * BLOCK_N, high)
    return low, full, edge, high


@triton.jit
def _begin(sinks, heads, unit, BLOCK_M: tl.constexpr, DV: tl.constexpr):
    """top, total and acc before the first key; a sink is one more score, which has no value."""
    top = tl.full((BLOCK_M,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    if sinks is not None:
        sink = tl.load(sinks + heads).to(tl.float32) * LOG2_E / unit
        top = tl.maximum(sink, LOWEST)
        total = tl.where(sink > LOWEST, 1.0, 0.0)
    return top, total, tl.zeros((BLOCK_M, DV), tl.float32)


@triton.jit(do_not_specialize=["num_sequences", "longer_than"])
def _prefill_kernel(
    q, k_pages, v_pages, page_table, cu_seqlens, context_lens, sinks, alibi_slopes, k_scales, v_scales, out, lse,
    num_sequences, longer_than, q_stride, q_head_stride, k_page_stride, k_slot_stride, k_head_stride, v_page_stride,
    v_slot_stride, v_head_stride, table_stride, window, inner, gain, unit, GROUP: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr, PACK: tl.constexpr, PAGE_BITS: tl.constexpr, HEAD_DIM: tl.constexpr,
    V_HEAD_DIM: tl.constexpr, D: tl.constexpr, D_REST: tl.constexpr, DV: tl.constexpr, V_IN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    BLOCK_Q: tl.constexpr = BLOCK_M // PACK
    PACKS: tl.constexpr = (GROUP + PACK - 1) // PACK
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    sequence, first_tile = _sequence_of(tile, cu_seqlens, num_sequences, BLOCK_Q)
    first_token = tl.load(cu_seqlens + sequence).to(tl.int32)
    count = tl.load(cu_seqlens + sequence + 1).to(tl.int32) - first_token
    first_query = (tile - first_tile) * BLOCK_Q
    if (first_query >= count) | (count <= longer_than):
        return

    # the rows of the tile: which query of which head, at which position; rows too many repeat the last
    kv_head = tl.program_id(1) // PACKS
    first_in_group = tl.program_id(1) % PACKS * PACK
    queries = tl.minimum(count - first_query, BLOCK_Q)
    heads = tl.minimum(GROUP - first_in_group, PACK)
    row = tl.minimum(tl.arange(0, BLOCK_M), queries * PACK - 1)
    query = row // PACK
    first_token += first_query
    first_head = kv_head * GROUP + first_in_group
    head = tl.minimum(row % PACK, heads - 1)
    first_at = tl.load(context_lens + sequence).to(tl.int32) - count + first_query
    query_at = first_at + query
    q += first_token.to(tl.int64) * q_stride + first_head.to(tl.int64) * q_head_stride
    rows = query.to(tl.int64) * q_stride + head.to(tl.int64) * q_head_stride
    q_tile = load_columns(q, rows, None, 0, D, HEAD_DIM)
    q_rest = None
    if D_REST > 0:
        q_rest = load_columns(q, rows, None, D, D_REST, HEAD_DIM)
    slopes = None
    if alibi_slopes is not None:
        slopes = tl.load(alibi_slopes + first_head + head).to(tl.float32)

    low, full, edge, high = _spans(first_at, queries, window, BLOCK_N)
    page_ids = page_table + sequence.to(tl.int64) * table_stride
    k_pages += kv_head.to(tl.int64) * k_head_stride
    v_pages += kv_head.to(tl.int64) * (k_head_stride if v_head_stride is None else v_head_stride)
    k_scales = None if k_scales is None else k_scales + kv_head
    v_scales = None if v_scales is None else v_scales + kv_head
    top, total, acc = _begin(sinks, first_head + head, unit, BLOCK_M, DV)
    for part in tl.static_range(1 if window is None else 0, 3):
        if part == 0:
            begin, end = low // BLOCK_N * BLOCK_N, full
        elif part == 1:
            begin, end = full, edge
        else:
            begin, end = tl.maximum(full, edge), high
        top, total, acc = _attend_tiles(
            q_tile, q_rest, query_at, slopes, top, total, acc, k_pages, v_pages, k_scales, v_scales, page_ids,
            k_page_stride, k_slot_stride, v_page_stride, v_slot_stride, low, high, begin, end, window, inner, gain,
            unit, part != 1, NUM_KV_HEADS, PAGE_BITS, HEAD_DIM, V_HEAD_DIM, V_IN_K, BLOCK_N,
        )  # fmt: skip

    first_row = first_token.to(tl.int64) * (NUM_KV_HEADS * GROUP) + first_head
    row = tl.arange(0, BLOCK_M)
    rows = row // PACK * (NUM_KV_HEADS * GROUP) + row % PACK
    present = (row < queries * PACK) & (row % PACK < heads)
    if lse is not None:
        tl.store(lse + first_row + rows, (top * unit + tl.log2(total)) * LN_2, mask=present)
    value = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    store_columns(out + first_row * V_HEAD_DIM, rows * V_HEAD_DIM, present, value.to(out.dtype.element_ty), V_HEAD_DIM)


def prefill_attention(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, page_table: Tensor, cu_seqlens: Tensor, context_lens: Tensor,
    scale: float, window: int | None = None, softcap: float | None = None, sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None, k_scales: Tensor | None = None, v_scales: Tensor | None = None, *,
    longer_than: int = 0, return_lse: bool = False, blocks: Mapping[str, int] | None = None,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """`reference.paged_attention`, with return_lse also its log-sum-exps, for any number of queries.

    Args: q [N, num_heads, head_dim] float32, float16 or bfloat16, tokens and heads any stride apart; k_pages
    [num_pages, page_size, num_kv_heads, head_dim] and v_pages [..., v_head_dim] of q's dtype, or int8 or float8_e4m3
    with k_scales, v_scales [num_pages, page_size, num_kv_heads] float32; pages may be strided, v_pages may be columns
    of k_pages; page_size is a power of two. page_table [S, max_pages], cu_seqlens [S + 1], context_lens [S] int64 or
    int32; scale > 0; sinks, alibi_slopes [num_heads]. A sequence's context_lens must cover its queries and fit its row
    of page_table. A key that no query sees is not read, nor a page id of such keys alone. Tokens after cu_seqlens[S]
    and sequences with no more than `longer_than` queries are not written, for `decode_attention(out=...)` to write; a
    query without any key gives 0. blocks: overrides the block sizes of the tuning table (powers of two from 16 on).

    Returns [N, num_heads * v_head_dim] in q's dtype, and with return_lse also [N, num_heads] float32. Raises
    KernelError.
    """
    device = check_attention(
        q, k_pages, v_pages, page_table, cu_seqlens, context_lens, scale, window, softcap, sinks, alibi_slopes,
        k_scales, v_scales,
    )  # fmt: skip
    num_tokens, num_heads = q.shape[:2]
    page_size, num_kv_heads, v_head_dim = v_pages.shape[1:]
    require(page_size > 0 and page_size & (page_size - 1) == 0, f"page_size is {page_size}; it must be a power of two")
    out = torch.empty(num_tokens, num_heads * v_head_dim, dtype=q.dtype, device=device)
    lse = torch.empty(num_tokens, num_heads, dtype=torch.float32, device=device) if return_lse else None
    if num_tokens == 0:
        return out if lse is None else (out, lse)

    chosen = blocks_for(q, k_pages, v_pages, blocks)
    group = num_heads // num_kv_heads
    pack = triton.cdiv(group, triton.cdiv(group, min(MAX_PACK, chosen["BLOCK_M"])))
    tiles = num_tokens // (chosen["BLOCK_M"] // pack) + len(context_lens)
    gain = scale if softcap is None else softcap
    _prefill_kernel[(tiles, num_kv_heads * triton.cdiv(group, pack))](
        q, k_pages, v_pages, page_table, cu_seqlens, context_lens, sinks, alibi_slopes, k_scales, v_scales, out, lse,
        len(context_lens), longer_than, *q.stride()[:2], *page_strides(k_pages, v_pages), page_table.stride(0),
        window, None if softcap is None else scale / softcap, gain,
        LOG2_E.value * (gain if alibi_slopes is None else 1.0), GROUP=group, NUM_KV_HEADS=num_kv_heads, PACK=pack,
        PAGE_BITS=page_size.bit_length() - 1, **tile_widths(k_pages, v_pages), **chosen,
    )  # fmt: skip
    return out if lse is None else (out, lse)


def blocks_for(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, override: Mapping[str, int] | None = None
) -> dict[str, int]:
    """BLOCK_M, BLOCK_N, num_warps and num_stages for these widths and dtypes, never for a number of queries or keys.

    The defaults are the largest tiles that spill no register on any card they are compiled for.
    """
    head_dim, v_head_dim, dtype = q.shape[2], v_pages.shape[3], str(q.dtype).removeprefix("torch.")
    widest, codes = max(head_dim, v_head_dim), k_pages.dtype != q.dtype
    if q.dtype == torch.float32 and widest > 256:
        default = {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 4 if tuning.is_hip() else 8, "num_stages": 1}
    elif q.dtype == torch.float32:
        default = {"BLOCK_M": 32, "BLOCK_N": 16 if widest > 64 else 32, "num_warps": 8, "num_stages": 2}
    elif widest > 256:
        default = {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 4, "num_stages": 2}
    elif widest > 128 and tuning.is_hip():
        default = {"BLOCK_M": 64, "BLOCK_N": 16, "num_warps": 4, "num_stages": 2}
    elif widest > 128:
        default = {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 8, "num_stages": 2}
    elif codes or tuning.is_hip():
        default = {"BLOCK_M": 128, "BLOCK_N": 32, "num_warps": 8, "num_stages": 2}
    else:
        default = {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2}
    return config(
        "prefill_attention",
        q.device,
        default,
        override,
        head_dim=head_dim,
        v_head_dim=v_head_dim,
        dtype=dtype,
        codes=codes,
    )


def tuning_problems(device: torch.device) -> Iterator[Problem]:
    """What `python -m handloom_kernels.tune prefill_attention` tries: one prompt of 2048 tokens."""
    for heads, kv_heads, head_dim in ((12, 12, 64), (32, 32, 96), (32, 8, 128), (8, 4, 256)):
        q = torch.randn(2048, heads, head_dim, dtype=torch.bfloat16, device=device)
        k, v = (torch.randn(32, 64, kv_heads, head_dim, dtype=torch.bfloat16, device=device) for _ in "kv")
        table = torch.arange(32, device=device)[None]
        ends = torch.tensor([0, 2048], device=device)
        yield Problem(
            when={"head_dim": head_dim, "v_head_dim": head_dim, "dtype": "bfloat16", "codes": False},
            candidates=[
                {"BLOCK_M": m, "BLOCK_N": n, "num_warps": m // 16, "num_stages": stages}
                for m in (64, 128)
                for n in (32, 64, 128)
                for stages in (2, 3, 4)
            ],
            run=partial(prefill_attention, q, k, v, table, ends, ends[1:], head_dim**-0.5),
        )
