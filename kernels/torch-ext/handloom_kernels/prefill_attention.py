"""Attention of many queries per sequence over paged keys and values: prefill, chunked prefill, cached prefixes.

    out[i] = sum over the keys j <= i of softmax_j(scale * q[i] . k[j]) * v[j]

N queries of S sequences lie end to end; each sequence's queries are its last tokens, and all of its keys, theirs too,
already lie in pages. The scores are never stored (FlashAttention-2: Dao 2023, arXiv 2307.08691): one program owns one
tile of queries and walks over the tiles of keys with a running maximum m, sum l and weighted sum acc:

                                   keys of one sequence, BLOCK_N to a tile
                             0       32      64      96      128     160
                             |-------|-------|-------|-------|-------|
    queries 110 .. 117       | full  | full  | full  |masked |            its last query sees key 117
    queries 118 .. 125       | full  | full  | full  |masked |
    queries 126 .. 133       | full  | full  | full  |masked |masked |    key 128 begins another tile
                                 ^                       ^
         window 64 of 126..133:  skipped, skipped (keys < 63), masked at both edges, full between

    the rows of a tile:   query 110, head 0   \\
                          query 110, head 1    |  PACK query heads that read the same KV head, BLOCK_Q queries each,
                          query 111, head 0    |  BLOCK_M >= PACK * BLOCK_Q rows in all
                          query 111, head 1   /

Packing the heads of a KV group into one tile keeps it full when a sequence has few queries, and makes it span fewer
positions, so that less is computed beyond the diagonal and the window. Tiles with full rows need no mask; only those at
the diagonal and at the window's edge pay for one. Programs find their sequence by bisecting cu_seqlens, so that the
host reads no tensor; the longest walks start first and the short ones fill up the end.

Tiles of keys begin at multiples of BLOCK_N from key 0, and a tile in which a row sees nothing leaves the row's m, l and
acc as they were, to the bit. So a query's result is the same in whatever chunk or company it comes.

To compute: 2 (head_dim + v_head_dim) FLOPs for every query head and key it sees. To move: each query, result, and visible
key and value once; every BLOCK_M rows read the keys again, from the second-level cache. Bound by arithmetic beyond a
few hundred queries.

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
from .checks import FLOATS, INTS, check, check_device, require
from .tuning import Problem, config

CODES = (torch.int8, torch.float8_e4m3fn, torch.float8_e4m3fnuz)
LOG2_E = tl.constexpr(1.4426950408889634)
# where the running maximum starts: below every score, and times log2(e) * scale still a number
LOWEST = tl.constexpr(-1e30)
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
def _load_rows(
    base, rows, inside, FIRST: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr, MASK_ROWS: tl.constexpr
):
    """Columns FIRST .. FIRST + BLOCK of the rows at these offsets; 0 beyond WIDTH, and in rows not inside."""
    columns = FIRST + tl.arange(0, BLOCK)
    at = base + rows[:, None] + columns[None, :]
    mask = None
    if MASK_ROWS and FIRST + BLOCK > WIDTH:
        mask = inside[:, None] & (columns < WIDTH)[None, :]
    elif MASK_ROWS:
        mask = inside[:, None]
    elif FIRST + BLOCK > WIDTH:
        mask = (columns < WIDTH)[None, :]
    return tl.load(at, mask=mask, other=None if mask is None else 0.0)


@triton.jit
def _load_each(pointers, inside, MASKED: tl.constexpr):
    return tl.load(pointers, mask=inside, other=0) if MASKED else tl.load(pointers)


@triton.jit
def _tanh(x):
    return 1.0 - 2.0 / (tl.exp2(x * (2 * LOG2_E)) + 1.0)


@triton.jit
def _scores(
    q,
    q_tail,
    k,
    rows,
    key_scales,
    keys,
    inside,
    query_at,
    slopes,
    inner,
    gain,
    HEAD_DIM: tl.constexpr,
    D: tl.constexpr,
    TAIL: tl.constexpr,
    MASKED: tl.constexpr,
):
    """x [BLOCK_M, BLOCK_N] float32: times `unit` it is a score in base 2. Nothing is hidden yet."""
    tile = _load_rows(k, rows, inside, 0, D, HEAD_DIM, MASKED)
    x = tl.dot(q, tl.trans(tile.to(q.dtype)), input_precision="ieee")
    if TAIL > 0:
        tile = _load_rows(k, rows, inside, D, TAIL, HEAD_DIM, MASKED)
        x = tl.dot(q_tail, tl.trans(tile.to(q.dtype)), x, input_precision="ieee")
    if key_scales is not None:
        x *= key_scales[None, :]
    if inner is not None:
        x = _tanh(x * inner)
    if slopes is not None:
        distance = (keys[None, :] - query_at[:, None]).to(tl.float32)
        x = tl.fma(slopes[:, None], distance, x * gain)
    return x


@triton.jit(do_not_specialize=["num_sequences"])
def _prefill_attention_kernel(
    q,
    k_pages,
    v_pages,
    page_table,
    cu_seqlens,
    context_lens,
    sinks,
    alibi_slopes,
    k_scales,
    v_scales,
    out,
    lse,
    num_sequences,
    window,
    inner,
    gain,
    unit,
    q_stride,
    q_head_stride,
    table_stride,
    k_page_stride,
    k_slot_stride,
    k_head_stride,
    v_page_stride,
    v_slot_stride,
    v_head_stride,
    ks_page_stride,
    ks_slot_stride,
    vs_page_stride,
    vs_slot_stride,
    NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    PACK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    V_HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    D: tl.constexpr,
    TAIL: tl.constexpr,
    V_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    BLOCK_Q: tl.constexpr = BLOCK_M // PACK
    PACKS: tl.constexpr = (GROUP + PACK - 1) // PACK
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    sequence, first_tile = _sequence_of(tile, cu_seqlens, num_sequences, BLOCK_Q)
    start_row = tl.load(cu_seqlens + sequence).to(tl.int64)
    count = (tl.load(cu_seqlens + sequence + 1) - start_row).to(tl.int32)
    first = (tile - first_tile) * BLOCK_Q
    if first >= count:
        return

    # the rows of the tile: which query of which head, at which position; rows too many repeat the last
    kv_head = tl.program_id(1) // PACKS
    first_in_group = tl.program_id(1) % PACKS * PACK
    first_head = kv_head.to(tl.int64) * GROUP + first_in_group
    queries = tl.minimum(count - first, BLOCK_Q)
    heads = tl.minimum(GROUP - first_in_group, PACK)
    row = tl.arange(0, BLOCK_M)
    query = tl.minimum(row // PACK, queries - 1)
    head = tl.minimum(row % PACK, heads - 1)
    first_at = tl.load(context_lens + sequence).to(tl.int32) - count + first
    query_at = first_at + query
    q += (start_row + first) * q_stride + first_head * q_head_stride
    at = query.to(tl.int64) * q_stride + head * q_head_stride
    q_tile = _load_rows(q, at, None, 0, D, HEAD_DIM, False)
    q_tail = q_tile
    if TAIL > 0:
        q_tail = _load_rows(q, at, None, D, TAIL, HEAD_DIM, False)
    slopes = None
    if alibi_slopes is not None:
        slopes = tl.load(alibi_slopes + first_head + head).to(tl.float32)

    m = tl.full([BLOCK_M], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    if sinks is not None:
        m = tl.load(sinks + first_head + head).to(tl.float32) * LOG2_E / unit
        total = tl.where(m > LOWEST, 1.0, 0.0)
        m = tl.maximum(m, LOWEST)
    acc = tl.zeros([BLOCK_M, V_D], tl.float32)

    # keys low .. high are seen by some row; those of the tiles between `full` and `edge` by every row
    low = 0
    high = first_at + queries
    edge = (first_at + 1) // BLOCK_N * BLOCK_N
    full = 0
    if window is not None:
        low = tl.maximum(first_at + 1 - window, 0)
        full = tl.minimum(tl.cdiv(tl.maximum(high - window, 0), BLOCK_N) * BLOCK_N, high)
    page_table += sequence.to(tl.int64) * table_stride
    k_pages += kv_head.to(tl.int64) * k_head_stride
    v_pages += kv_head.to(tl.int64) * v_head_stride
    if k_scales is not None:
        k_scales += kv_head
    if v_scales is not None:
        v_scales += kv_head

    for part in tl.static_range(1 if window is None else 0, 3):
        if part == 0:
            begin, end = low // BLOCK_N * BLOCK_N, full
        elif part == 1:
            begin, end = full, edge
        else:
            begin, end = tl.maximum(full, edge), high
        for start in range(begin, end, BLOCK_N):
            keys = start + tl.arange(0, BLOCK_N)
            inside = (keys >= low) & (keys < high)
            if PAGE_SIZE >= BLOCK_N:
                page = tl.load(page_table + start // PAGE_SIZE).to(tl.int64)
            else:
                page = _load_each(page_table + keys // PAGE_SIZE, inside, part != 1).to(tl.int64)
            slot = (keys % PAGE_SIZE).to(tl.int64)

            key_scales = None
            if k_scales is not None:
                slots = page * ks_page_stride + slot * ks_slot_stride
                key_scales = _load_each(k_scales + slots, inside, part != 1)
            slots = page * k_page_stride + slot * k_slot_stride
            x = _scores(
                q_tile,
                q_tail,
                k_pages,
                slots,
                key_scales,
                keys,
                inside,
                query_at,
                slopes,
                inner,
                gain,
                HEAD_DIM,
                D,
                TAIL,
                part != 1,
            )
            if part != 1:
                hidden = keys[None, :] > query_at[:, None]
                if window is not None:
                    hidden |= keys[None, :] <= query_at[:, None] - window
                x = tl.where(hidden, float("-inf"), x)

            # fma spelled out: full and masked tiles must round alike
            new_m = tl.maximum(m, tl.max(x, 1))
            p = tl.exp2(tl.fma(x, unit, (new_m * -unit)[:, None]))
            rescale = tl.exp2((m - new_m) * unit)
            total = tl.fma(total, rescale, tl.sum(p, 1))
            m = new_m
            slots = page * v_page_stride + slot * v_slot_stride
            value = _load_rows(v_pages, slots, inside, 0, V_D, V_HEAD_DIM, part != 1)
            if v_scales is not None:
                slots = page * vs_page_stride + slot * vs_slot_stride
                value = value.to(tl.float32) * _load_each(v_scales + slots, inside, part != 1)[:, None]
            acc = tl.dot(p.to(q_tile.dtype), value.to(q_tile.dtype), acc * rescale[:, None], input_precision="ieee")

    first_out = (start_row + first) * NUM_HEADS + first_head
    out_row = row // PACK * NUM_HEADS + row % PACK
    present = (row // PACK < queries) & (row % PACK < heads)
    columns = tl.arange(0, V_D)
    tl.store(
        out + first_out * V_HEAD_DIM + out_row[:, None] * V_HEAD_DIM + columns[None, :],
        (acc / total[:, None]).to(out.dtype.element_ty),
        mask=present[:, None] & (columns < V_HEAD_DIM)[None, :],
    )
    if lse is not None:
        tl.store(lse + first_out + out_row, (m * unit + tl.log2(total)) / LOG2_E, mask=present)


def prefill_attention(
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
    return_lse: bool = False,
    blocks: Mapping[str, int] | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`reference.paged_attention`, with return_lse `reference.paged_attention_with_lse`, for sequences of any number of
    queries: [N, num_heads * v_head_dim] in q's dtype (and [N, num_heads] float32).

    Args: q [N, num_heads, head_dim] float32, float16 or bfloat16; k_pages [num_pages, page_size, num_kv_heads,
    head_dim], v_pages [..., v_head_dim] of q's dtype, or with k_scales and v_scales [num_pages, page_size,
    num_kv_heads] float32 int8 or float8_e4m3 codes (on NVIDIA from sm_89 on), page_size a power of two; page_table
    [S, max_pages], cu_seqlens [S + 1] from 0 to N, context_lens [S], int64 or int32; scale > 0; sinks, alibi_slopes
    [num_heads] of any float. q, pages, scales and table may be views whose last stride is 1: v_pages may be columns of
    k_pages. A key that no query sees is not read. blocks: overrides the tuning table's BLOCK_M, BLOCK_N (powers of two
    from 16 on), num_warps, num_stages. Raises KernelError.
    """
    device = _check(q, k_pages, v_pages, page_table, cu_seqlens, context_lens)
    _check_options(q, k_pages, v_pages, scale, window, softcap, sinks, alibi_slopes, k_scales, v_scales)
    rows, num_heads, head_dim = q.shape
    num_kv_heads, v_head_dim = v_pages.shape[2:]
    out = torch.empty(rows, num_heads * v_head_dim, dtype=q.dtype, device=device)
    lse = torch.empty(rows, num_heads, dtype=torch.float32, device=device) if return_lse else None
    if rows > 0:
        group = num_heads // num_kv_heads
        chosen = blocks_for(q, k_pages, v_pages, blocks)
        pack = triton.cdiv(group, triton.cdiv(group, min(MAX_PACK, chosen["BLOCK_M"])))
        grid = (rows // (chosen["BLOCK_M"] // pack) + len(page_table), num_kv_heads * triton.cdiv(group, pack))
        gain = scale if softcap is None else softcap
        _prefill_attention_kernel[grid](
            q,
            k_pages,
            v_pages,
            page_table,
            cu_seqlens,
            context_lens,
            sinks,
            alibi_slopes,
            k_scales,
            v_scales,
            out,
            lse,
            len(page_table),
            window,
            None if softcap is None else scale / softcap,
            gain,
            LOG2_E.value * (gain if alibi_slopes is None else 1.0),
            *q.stride()[:2],
            page_table.stride(0),
            *k_pages.stride()[:3],
            *v_pages.stride()[:3],
            *((0, 0) if k_scales is None else k_scales.stride()[:2]),
            *((0, 0) if v_scales is None else v_scales.stride()[:2]),
            NUM_HEADS=num_heads,
            GROUP=group,
            PACK=pack,
            HEAD_DIM=head_dim,
            V_HEAD_DIM=v_head_dim,
            PAGE_SIZE=k_pages.shape[1],
            **_widths(head_dim, v_head_dim),
            **chosen,
        )
    return out if lse is None else (out, lse)


def _widths(head_dim: int, v_head_dim: int) -> dict[str, int]:
    """Keys are read as D columns, a power of two, and a TAIL that may be none; values as V_D columns."""
    main = max(16, 1 << (head_dim.bit_length() - 1))
    tail = max(16, triton.next_power_of_2(head_dim - main)) if head_dim > main else 0
    return {"D": main, "TAIL": tail, "V_D": max(16, triton.next_power_of_2(v_head_dim))}


def _check(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, page_table: Tensor, cu_seqlens: Tensor, context_lens: Tensor
) -> torch.device:
    device = check_device("q", q)
    check("q", q, (None, None, None), FLOATS, device, strided=True)
    check("k_pages", k_pages, (None, None, None, q.shape[2]), (q.dtype, *CODES), device, strided=True)
    check("v_pages", v_pages, (*k_pages.shape[:3], None), (q.dtype, *CODES), device, strided=True)
    page_size, num_kv_heads = k_pages.shape[1:3]
    require(
        0 < q.shape[2] <= 576 and 0 < v_pages.shape[3] <= 512,
        f"head_dim {q.shape[2]} with values of {v_pages.shape[3]}; there may be up to 576 and 512",
    )
    require(
        num_kv_heads > 0 and q.shape[1] % num_kv_heads == 0,
        f"{q.shape[1]} query heads cannot share {num_kv_heads} KV heads evenly",
    )
    require(page_size > 0 and page_size & (page_size - 1) == 0, f"page_size is {page_size}; it must be a power of two")
    check("page_table", page_table, (None, None), INTS, device, strided=True)
    check("cu_seqlens", cu_seqlens, (len(page_table) + 1,), INTS, device)
    check("context_lens", context_lens, (len(page_table),), INTS, device)
    require(len(q) == 0 or len(page_table) > 0, f"{len(q)} queries of no sequence: page_table has no rows")
    return device


def _check_options(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    k_scales: Tensor | None,
    v_scales: Tensor | None,
) -> None:
    require(0 < scale < float("inf"), f"scale is {scale}; it must be a positive number")
    require(window is None or window > 0, f"window is {window}; a query sees at least itself")
    require(softcap is None or softcap > 0, f"softcap is {softcap}; it must be positive")
    for name, per_head in (("sinks", sinks), ("alibi_slopes", alibi_slopes)):
        if per_head is not None:
            check(name, per_head, (q.shape[1],), FLOATS, q.device)
    for name, pages, scales in (("k", k_pages, k_scales), ("v", v_pages, v_scales)):
        require(
            (scales is None) == (pages.dtype == q.dtype),
            f"{name}_pages are {pages.dtype} and {name}_scales {'missing' if scales is None else 'given'}; "
            "codes need scales, and only codes have them",
        )
        if scales is not None:
            check(f"{name}_scales", scales, pages.shape[:3], torch.float32, q.device, strided=True)


def blocks_for(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, override: Mapping[str, int] | None = None
) -> dict[str, int]:
    """BLOCK_M, BLOCK_N, num_warps and num_stages for these widths and dtypes, never for a number of queries or keys."""
    head_dim, v_head_dim, dtype = q.shape[2], v_pages.shape[3], str(q.dtype).removeprefix("torch.")
    widest = max(head_dim, v_head_dim)
    if widest <= 128:
        default = {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2}
    else:
        default = {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 4, "num_stages": 2}
    shape = {"head_dim": head_dim, "v_head_dim": v_head_dim, "dtype": dtype, "codes": k_pages.dtype != q.dtype}
    return config("prefill_attention", q.device, default, override, **shape)
