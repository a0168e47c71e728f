"""Attention of 1 to 16 queries per sequence over paged keys and values: decoding, verifying drafts, beams.

    score[j] = scale * q . k[j]        out = sum_j exp(score[j]) v[j] / sum_j exp(score[j])        over the keys j seen

**One tile of keys after another** (online softmax: Milakov & Gimelshein 2018; FlashAttention: Dao et al. 2022). The
exponentials overflow unless the largest score is subtracted first, and it is known only at the end. So a row keeps
three running values, and mends the last two whenever a tile of keys raises the first:

    top    the largest score so far                             top'  = max(top, scores)
    total  sum of exp(score - top)                              total = total * exp(top - top') + sum exp(scores - top')
    acc    sum of exp(score - top) * v, one vector              acc   = acc   * exp(top - top') + exp(scores - top') @ v

**Rows share what they read.** `group` query heads read the same KV head, and so do all queries of a sequence. They are
the rows of one tile, and a key that was loaded once is multiplied with them all, on tensor cores (GQA packing):

    row 0          query 0, head 0  |                                       row = query * group + head in group
    row 1          query 0, head 1  |  BLOCK_M rows, the last ones
    row 2          query 1, head 0  |  empty where there are fewer;
    row 3          query 1, head 1  |  more rows are more tiles

**A long sequence is many programs' work** (split K: Flash-Decoding, Dao et al. 2023). Keys are cut where their position
is a multiple of SPLIT: always the same cuts, however many sequences, programs or processors there are.

    keys      0        SPLIT     2 SPLIT    3 SPLIT       length
              |----------|----------|----------|-----|
    page ids  |7 |2 |9 |4 |...                             any order; a tile of BLOCK_N keys looks up its pages
    entry     e          e + H      e + 2 H    e + 3 H     in the list of work, where H KV heads are neighbours
              |          |          |          |
              top, total, acc of each split, in float32, to the workspace; then each takes a ticket
                                               |
                       who draws the last one folds all splits, first to last:
                       top = max top_s;  total = sum total_s exp(top_s - top);  acc likewise;  out = acc / total

Splits of all sequences lie in one list, which every program works out from context_lens by itself; program p takes the
entries p, p + P, p + 2 P, ... So P is what fills the GPU, the host need not know a length, and a table with room for
long sequences costs short ones no time, only workspace. A sequence with one split is written at once, with the bits
that folding would give: times exp(0), plus zeros. Keys before the window are neither read nor looked up.

What a row becomes depends on its sequence alone: tiles and splits begin at fixed keys, are folded in fixed order, and
one in which a row sees nothing leaves its three values as they were, to the bit.

To move, per sequence and KV head: keys * (head_dim + v_head_dim) elements, once for every BLOCK_M rows (from the
second-level cache after the first), and where there are several splits 2 * 4 bytes * v_head_dim for each row and split.
To compute: 2 * (head_dim + v_head_dim) FLOPs for each key and row; 16-row tiles at 2 bytes an element need 16 FLOPs a
byte, far below what a GPU has. Bound by memory; latent attention (576 + 512 columns, 128 rows a key) by both.

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
from .attention_parts import (
    LOWEST,
    check_attention,
    fold_splits,
    load_columns,
    page_of,
    page_strides,
    store_split,
    tile_widths,
    write_rows,
)
from .checks import check, require
from .tiles import LOG2_E, is_last, tanh
from .tuning import Problem, config

MAX_QUERIES = 16
MIN_ROWS = 16  # of a tile: the least that tensor cores multiply


@triton.jit
def attend_keys(
    q, q_rest, query_at, slopes, k_pages, v_pages, k_scales, v_scales, page_ids, k_page_stride, k_slot_stride,
    v_page_stride, v_slot_stride, first, begin, end, scale, window, softcap, NUM_KV_HEADS: tl.constexpr,
    PAGE_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, V_HEAD_DIM: tl.constexpr, DV: tl.constexpr,
    V_IN_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """(top [BLOCK_M], total [BLOCK_M], acc [BLOCK_M, DV]) of these queries over the keys begin .. end, of which those
    before `first` are not read. Scores are in base 2. The pages and scales are those of one KV head."""
    BLOCK_M: tl.constexpr = q.shape[0]
    top = tl.full((BLOCK_M,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, DV), tl.float32)
    page = page_of(page_ids, begin, first, end, PAGE_SIZE, BLOCK_N)
    for start in range(begin, end, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        inside = (keys >= first) & (keys < end)
        slot = keys % PAGE_SIZE
        k_rows = page.to(tl.int64) * k_page_stride + slot.to(tl.int64) * k_slot_stride
        scales_at = (page.to(tl.int64) * PAGE_SIZE + slot) * NUM_KV_HEADS
        k = load_columns(k_pages, k_rows, inside, 0, q.shape[1], HEAD_DIM)
        scores = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision="ieee")
        if q_rest is not None:
            k_rest = load_columns(k_pages, k_rows, inside, q.shape[1], q_rest.shape[1], HEAD_DIM)
            scores = tl.dot(q_rest, tl.trans(k_rest.to(q.dtype)), scores, input_precision="ieee")
        if k_scales is not None:
            scores *= tl.load(k_scales + scales_at, mask=inside, other=0.0)[None, :]
        if softcap is None:
            scores *= scale * LOG2_E
        else:
            scores = tanh(scores * (scale / softcap)) * (softcap * LOG2_E)
        if slopes is not None:
            scores += (slopes * LOG2_E)[:, None] * (keys[None, :] - query_at[:, None]).to(tl.float32)
        seen = inside[None, :] & (keys[None, :] <= query_at[:, None])
        if window is not None:
            seen &= keys[None, :] > query_at[:, None] - window
        scores = tl.where(seen, scores, float("-inf"))

        raised = tl.maximum(top, tl.max(scores, axis=1))
        weights = tl.exp2(scores - raised[:, None])
        fade = tl.exp2(top - raised)
        top = raised
        total = total * fade + tl.sum(weights, axis=1)

        if V_IN_K:
            v = k
        else:
            v_rows = k_rows
            if v_page_stride is not None:
                v_rows = page.to(tl.int64) * v_page_stride + slot.to(tl.int64) * v_slot_stride
            v = load_columns(v_pages, v_rows, inside, 0, DV, V_HEAD_DIM)
        if v_scales is not None:
            v = v.to(tl.float32) * tl.load(v_scales + scales_at, mask=inside, other=0.0)[:, None]
        acc = tl.dot(weights.to(q.dtype), v.to(q.dtype), acc * fade[:, None], input_precision="ieee")
        page = page_of(page_ids, start + BLOCK_N, first, end, PAGE_SIZE, BLOCK_N)  # long before its keys are loaded
    return top, total, acc


@triton.jit
def fold_and_write(
    out, lse, sinks, split_sums, split_accs, lead, row, row_end, rows_per_split, first_split, num_splits,
    first_token, kv_head, GROUP: tl.constexpr, NUM_KV_HEADS: tl.constexpr, V_HEAD_DIM: tl.constexpr,
    DV: tl.constexpr, FOLD_SPLITS: tl.constexpr, FOLD_ROWS: tl.constexpr,
):  # fmt: skip
    """The rows row .. row + FOLD_ROWS of a sequence and KV head, once all of its splits lie in the workspace."""
    rows = row + tl.arange(0, FOLD_ROWS)
    inside = rows < row_end
    rows = tl.minimum(rows, row_end - 1)
    top, total, acc = fold_splits(
        split_sums, split_accs, lead, rows, rows_per_split, first_split, num_splits, V_HEAD_DIM, DV, FOLD_SPLITS
    )
    heads = kv_head * GROUP + rows % GROUP
    at = (first_token + rows // GROUP) * (NUM_KV_HEADS * GROUP) + heads
    write_rows(out, lse, sinks, top, total, acc, at, heads, inside, V_HEAD_DIM)


@triton.jit
def list_splits(
    cu_seqlens, context_lens, num_sequences, max_query_len, window, GROUP: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Where each sequence's splits, times its tiles of rows, end in the list of all [BLOCK_S]; a sequence without
    queries, or with more than max_query_len, has none."""
    s = tl.arange(0, BLOCK_S)
    inside = s < num_sequences
    count = tl.load(cu_seqlens + s + 1, mask=inside, other=0) - tl.load(cu_seqlens + s, mask=inside, other=0)
    length = tl.load(context_lens + s, mask=inside, other=0)
    splits = tl.maximum(tl.cdiv(length, SPLIT) - first_seen(length, count, window) // SPLIT, 1)
    tiles = tl.cdiv(count * GROUP, BLOCK_M)
    return tl.cumsum(tl.where(count <= max_query_len, splits * tiles, 0).to(tl.int32), axis=0)


@triton.jit
def first_seen(length, count, window):
    """The first key that the first of a sequence's last `count` tokens sees."""
    first = length * 0
    if window is not None:
        first = tl.maximum(length - count - window + 1, 0)
    return first


@triton.jit(do_not_specialize=["num_sequences", "max_splits", "max_query_len"])
def _decode_kernel(
    q, k_pages, v_pages, page_table, cu_seqlens, context_lens, sinks, alibi_slopes, k_scales, v_scales, out, lse,
    split_sums, split_accs, tickets, num_sequences, max_splits, max_query_len, q_stride, q_head_stride, k_page_stride,
    k_slot_stride, k_head_stride, v_page_stride, v_slot_stride, v_head_stride, table_stride, scale, window, softcap,
    GROUP: tl.constexpr, NUM_KV_HEADS: tl.constexpr, PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr, V_HEAD_DIM: tl.constexpr, D: tl.constexpr, D_REST: tl.constexpr, DV: tl.constexpr,
    V_IN_K: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr,
    FOLD_SPLITS: tl.constexpr, FOLD_ROWS: tl.constexpr,
):  # fmt: skip
    ends = list_splits(cu_seqlens, context_lens, num_sequences, max_query_len, window, GROUP, SPLIT, BLOCK_S, BLOCK_M)
    work = tl.max(ends, axis=0) * NUM_KV_HEADS
    # what is the same for all entries is computed for each: kept in registers, it would leave too few for the keys
    for entry in tl.range(tl.program_id(0), work, tl.num_programs(0), disable_licm=True):
        # whose split this is: KV heads are neighbours in the list, then tiles of rows, splits, sequences
        kv_head = tl.cast(entry % NUM_KV_HEADS, tl.int64)
        listed = entry // NUM_KV_HEADS
        s = tl.sum((ends <= listed).to(tl.int64), axis=0)
        first_token = tl.load(cu_seqlens + s).to(tl.int64)
        count = (tl.load(cu_seqlens + s + 1) - first_token).to(tl.int32)
        length = tl.load(context_lens + s).to(tl.int32)
        first = first_seen(length, count, window)
        first_split = first // SPLIT
        num_splits = tl.maximum(tl.cdiv(length, SPLIT) - first_split, 1)
        tiles = tl.cdiv(count * GROUP, BLOCK_M)
        nth = listed - tl.max(tl.where(ends <= listed, ends, 0), axis=0)
        tile = nth % tiles
        nth = nth // tiles
        split = first_split + nth

        rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        inside = rows < count * GROUP
        rows = tl.minimum(rows, count * GROUP - 1)  # those too many repeat the last, and are not written
        tokens = first_token + rows // GROUP
        heads = kv_head * GROUP + rows % GROUP
        q_rows = tokens * q_stride + heads * q_head_stride
        q_rest = None
        if D_REST > 0:
            q_rest = load_columns(q, q_rows, None, D, D_REST, HEAD_DIM)
        slopes = None
        if alibi_slopes is not None:
            slopes = tl.load(alibi_slopes + heads).to(tl.float32)
        top, total, acc = attend_keys(
            load_columns(q, q_rows, None, 0, D, HEAD_DIM), q_rest, length - count + rows // GROUP, slopes,
            k_pages + kv_head * k_head_stride,
            v_pages + kv_head * (k_head_stride if v_head_stride is None else v_head_stride),
            None if k_scales is None else k_scales + kv_head, None if v_scales is None else v_scales + kv_head,
            page_table + s * table_stride, k_page_stride, k_slot_stride, v_page_stride, v_slot_stride, first,
            tl.maximum(split * SPLIT, first // BLOCK_N * BLOCK_N), tl.minimum((split + 1) * SPLIT, length), scale,
            window, softcap, NUM_KV_HEADS, PAGE_SIZE, HEAD_DIM, V_HEAD_DIM, DV, V_IN_K, BLOCK_N,
        )  # fmt: skip
        at = tokens * (NUM_KV_HEADS * GROUP) + heads
        if tickets is None or num_splits == 1:
            write_rows(out, lse, sinks, top, total, acc, at, heads, inside, V_HEAD_DIM)
        else:
            max_rows = max_query_len * GROUP
            rows_per_split = NUM_KV_HEADS * max_rows
            lead = s * max_splits * rows_per_split + kv_head * max_rows
            own = lead + nth * rows_per_split + rows
            store_split(split_sums, split_accs, own, inside, top, total, acc, V_HEAD_DIM)
            if is_last(tickets + (s * NUM_KV_HEADS + kv_head) * tl.cdiv(max_rows, BLOCK_M) + tile, num_splits):
                row_end = tl.minimum((tile + 1) * BLOCK_M, count * GROUP)
                for row in range(tile * BLOCK_M, row_end, FOLD_ROWS):
                    fold_and_write(
                        out, lse, sinks, split_sums, split_accs, lead, row, row_end, rows_per_split, first_split,
                        num_splits, first_token, kv_head, GROUP, NUM_KV_HEADS, V_HEAD_DIM, DV, FOLD_SPLITS,
                        FOLD_ROWS,
                    )  # fmt: skip


def decode_attention(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, page_table: Tensor, cu_seqlens: Tensor, context_lens: Tensor,
    scale: float, window: int | None = None, softcap: float | None = None, sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None, k_scales: Tensor | None = None, v_scales: Tensor | None = None, *,
    max_query_len: int, return_lse: bool = False, tickets: Tensor | None = None, out: Tensor | None = None,
    blocks: Mapping[str, int] | None = None,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """`reference.paged_attention` for sequences with few queries each; max_query_len (1 to 16) at most.

    Args: q [N, num_heads, head_dim] float32, float16 or bfloat16, tokens and heads any stride apart; k_pages
    [num_pages, page_size, num_kv_heads, head_dim] and v_pages [..., v_head_dim] of q's dtype, or int8 or float8_e4m3
    with k_scales, v_scales [num_pages, page_size, num_kv_heads] float32; pages may be strided, v_pages may be columns
    of k_pages. page_table [S, max_pages], cu_seqlens [S + 1], context_lens [S] int64 or int32; scale > 0; sinks,
    alibi_slopes [num_heads]. A sequence's context_lens must cover its queries and fit its row of page_table. What lies
    in pages past that, and page ids past those in use or before the window, are not read.
    tickets: int32 zeros, `tickets_needed` of them, to be given where launches are captured or repeated: the kernel
    leaves zeros, and launches that share them must not overlap; None allocates them.
    The workspace takes 4 (v_head_dim + 2) bytes for each of S * max_query_len * num_heads rows and each split, of which
    a sequence has as many as page_table has room for.
    out: [N, num_heads * v_head_dim] in q's dtype, to be written to in place of a new tensor. Rows of sequences with
    more than max_query_len queries are left as they are: `prefill_attention(longer_than=...)` has written them.
    blocks: overrides the block sizes of the tuning table (powers of two; SPLIT a multiple of BLOCK_N).

    Returns [N, num_heads * v_head_dim] in q's dtype, and with return_lse also the log-sum-exps [N, num_heads] float32.
    Raises KernelError.
    """
    device = check_attention(
        q, k_pages, v_pages, page_table, cu_seqlens, context_lens, scale, window, softcap, sinks, alibi_slopes,
        k_scales, v_scales,
    )  # fmt: skip
    num_tokens, num_heads, _ = q.shape
    num_kv_heads, v_head_dim = v_pages.shape[2:]
    num_sequences = len(context_lens)
    require(1 <= max_query_len <= MAX_QUERIES, f"max_query_len is {max_query_len}; there may be 1 to {MAX_QUERIES}")
    if out is None:
        require(
            num_tokens <= num_sequences * max_query_len,
            f"{num_tokens} queries of {num_sequences} sequences are more than max_query_len = {max_query_len} each",
        )
        out = torch.empty(num_tokens, num_heads * v_head_dim, dtype=q.dtype, device=device)
    check("out", out, (num_tokens, num_heads * v_head_dim), q.dtype, device)
    lse = torch.empty(num_tokens, num_heads, dtype=torch.float32, device=device) if return_lse else None
    if num_tokens == 0:
        return out if lse is None else (out, lse)

    chosen = blocks_for(q, k_pages, v_pages, blocks)
    programs, split, block_m = chosen.pop("PROGRAMS"), chosen["SPLIT"], chosen["BLOCK_M"]
    require(split % chosen["BLOCK_N"] == 0, f"SPLIT = {split} is not a multiple of BLOCK_N = {chosen['BLOCK_N']}")
    group = num_heads // num_kv_heads
    max_splits = most_splits(page_table.shape[1] * k_pages.shape[1], max_query_len, window, split)
    tiles = num_sequences * num_kv_heads * triton.cdiv(group * max_query_len, block_m)
    sums = accs = None
    if max_splits == 1:
        tickets = None
    else:
        rows = num_sequences * max_splits * num_heads * max_query_len
        sums = torch.empty(rows, 2, dtype=torch.float32, device=device)
        accs = torch.empty(rows, v_head_dim, dtype=torch.float32, device=device)
        if tickets is None:
            tickets = torch.zeros(tiles, dtype=torch.int32, device=device)
        check("tickets", tickets, (None,), torch.int32, device)
        require(len(tickets) >= tiles, f"tickets has {len(tickets)} elements; {tiles} are needed")
    _decode_kernel[(min(tiles * max_splits, tuning.processors(device) * programs),)](
        q, k_pages, v_pages, page_table, cu_seqlens, context_lens, sinks, alibi_slopes, k_scales, v_scales, out, lse,
        sums, accs, tickets, num_sequences, max_splits, max_query_len, *q.stride()[:2],
        *page_strides(k_pages, v_pages), page_table.stride(0), scale, window, softcap, GROUP=group,
        NUM_KV_HEADS=num_kv_heads, PAGE_SIZE=k_pages.shape[1],
        BLOCK_S=1 if num_sequences == 1 else max(64, triton.next_power_of_2(num_sequences)),
        **tile_widths(k_pages, v_pages), **chosen,
    )  # fmt: skip
    return out if lse is None else (out, lse)


def tickets_needed(num_sequences: int, num_heads: int, num_kv_heads: int, max_query_len: int) -> int:
    """The length of `tickets` for up to so many sequences: one for each KV head and tile of rows of each."""
    tiles: int = triton.cdiv(num_heads // num_kv_heads * max_query_len, MIN_ROWS)
    return num_sequences * num_kv_heads * tiles


def most_splits(room: int, max_query_len: int, window: int | None, split: int) -> int:
    """Into how many splits a sequence's keys may fall that are seen by one of its queries; `room`: for so many keys."""
    splits: int = max(1, triton.cdiv(room, split))
    if window is not None:  # a span of keys may begin and end inside a split
        splits = min(splits, triton.cdiv(max_query_len + window - 2, split) + 1)
    return splits


def blocks_for(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, override: Mapping[str, int] | None = None
) -> dict[str, int]:
    """BLOCK_M rows, BLOCK_N keys, SPLIT keys, FOLD_SPLITS splits of FOLD_ROWS rows folded at once, PROGRAMS per
    processor; never by numbers of sequences or queries."""
    widths = tile_widths(k_pages, v_pages)
    group = q.shape[1] // k_pages.shape[2]
    quantised = k_pages.dtype != q.dtype
    columns = widths["D"] + widths["D_REST"]
    row = q.element_size() * (columns if widths["V_IN_K"] else columns + widths["DV"])
    most = 32 if q.dtype == torch.float32 else 64 if quantised else 128
    block_n = max(16, min(most, 1 << (36864 // (row * (1 + quantised))).bit_length() - 1))
    default = {
        "BLOCK_M": MIN_ROWS,
        "BLOCK_N": block_n,
        "SPLIT": max(128, min(512, 32 * triton.next_power_of_2(group))),
        "FOLD_SPLITS": 8,
        "FOLD_ROWS": max(1, min(4, 512 // widths["DV"])),
        "PROGRAMS": 2,
        "num_warps": 8 if widths["DV"] >= 256 or q.dtype == torch.float32 else 4,
        "num_stages": 4 if quantised else 3 if 2 * block_n * row + 16 * columns * q.element_size() < 98304 else 2,
    }
    if not tuning.is_hip():
        default["maxnreg"] = 255  # without a limit the compiler spills a few registers to seat one more program
    else:  # few scalar registers, and nothing on its way to shared memory
        warps = 2 if widths["DV"] == 256 else 4
        default.update(BLOCK_N=16, FOLD_SPLITS=4, FOLD_ROWS=1, PROGRAMS=4, num_warps=warps, num_stages=1)
    return config(
        "decode_attention",
        q.device,
        default,
        override,
        head_dim=widths["HEAD_DIM"],
        v_head_dim=widths["V_HEAD_DIM"],
        group=group,
        dtype=str(q.dtype).removeprefix("torch."),
        pages=str(k_pages.dtype).removeprefix("torch."),
    )


def tuning_problems(device: torch.device) -> Iterator[Problem]:
    """What `python -m handloom_kernels.tune decode_attention` tries: 8 sequences of 4096 keys."""
    shapes = ((12, 12, 64, 64), (64, 8, 64, 64), (32, 32, 96, 96), (16, 8, 128, 128), (32, 8, 128, 128))
    for heads, kv_heads, head_dim, v_head_dim in (*shapes, (8, 4, 256, 256), (16, 1, 576, 512), (128, 1, 576, 512)):
        q = torch.randn(8, heads, head_dim, dtype=torch.bfloat16, device=device)
        pages = torch.randn(2, 2048, 16, kv_heads, head_dim, dtype=torch.bfloat16, device=device)
        k_pages, v_pages = pages[0], pages[int(v_head_dim == head_dim), ..., :v_head_dim]
        table = torch.randperm(2048, device=device).view(8, 256)
        starts, lengths = torch.arange(9, device=device), torch.full((8,), 4096, device=device)
        default = blocks_for(q, k_pages, v_pages)
        yield Problem(
            when={"head_dim": head_dim, "v_head_dim": v_head_dim, "group": heads // kv_heads, "dtype": "bfloat16"},
            candidates=[
                {**default, "BLOCK_M": m, "BLOCK_N": n, "SPLIT": split, "num_warps": warps, "num_stages": stages}
                for m in ((16, 32, 64) if heads // kv_heads > 16 else (16,))
                for n in sorted({max(16, default["BLOCK_N"] // 2), default["BLOCK_N"], default["BLOCK_N"] * 2})
                for split in (128, 256, 512)
                for warps in (4, 8)
                for stages in (2, 3, 4)
            ],
            run=partial(decode_attention, q, k_pages, v_pages, table, starts, lengths, head_dim**-0.5, max_query_len=1),
        )
