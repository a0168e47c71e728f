"""Attention of many sequences that begin alike: the shared keys once for all of them, each one's own keys apart.

    whole(q) = softmax over [ prefix keys | own keys ]        = a weighted mean of the softmaxes over each part

Decoding reads every key once per sequence, and a prefix of a system prompt's length as often as there are sequences.
Here the rows of a tile are queries of any sequence, and a tile of prefix keys that was loaded once is multiplied with
all of them: matrix times matrix, where decoding alone is nearly matrix times vector (cascade attention: Ye et al. 2024;
Hydragen: Juravsky et al. 2024, arXiv 2402.05099).

                            prefix, stored once             own keys, by decode_attention
                     0      SPLIT    2 SPLIT
                     |--------|--------|-----|
    query 0, head 0  |        |        |     |      sequence 0 |-----|
    query 0, head 1  |        |        |     |                 |-----|
    query 1, head 0  | program| program| pr. |      sequence 1 |------------|
    query 1, head 1  |        |        |     |                 |------------|
       BLOCK_M rows  |        |        |     |          ...
                        |         |       |                   |
                  top, total, acc of each split        output, log-sum-exp
                        +---------+-------+---------+---------+
                                                    |
                 out = (sum_s acc_s 2^(top_s - top) + own 2^(own_lse - top)) / (the same of the totals)

Both halves, and the weights that join them, are exact: nothing is approximated. The first two launches write what the
third joins; there is no ticket, since joining has a program for every few rows. A row's result does not depend on its
neighbours in the tile: splits have a fixed size, and rows of a product are independent.

To move, per KV head: prefix keys * (head_dim + v_head_dim) elements once for BLOCK_M rows, where decoding would move
them once for each sequence; 2 * 4 bytes * v_head_dim per row and split. To compute: 2 * (head_dim + v_head_dim) FLOPs
per row and key, the same. At 64 rows and 2 bytes an element that is 64 FLOPs per byte: bound by the second-level cache
and the tensor cores together, not by memory.

This module does not know how the prefix was found, nor who owns a page. Meaning: `reference.shared_prefix_attention`.
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
    LN_2,
    LOWEST,
    check_attention,
    fold_splits,
    load_columns,
    page_strides,
    store_columns,
    store_split,
    tile_widths,
)
from .checks import FLOATS, INTS, check, check_device, require
from .decode_attention import attend_keys, decode_attention
from .tiles import LOG2_E
from .tuning import Problem, config


@triton.jit(do_not_specialize=["num_tokens", "prefix_length"])
def _prefix_kernel(
    q, k_pages, v_pages, page_ids, split_sums, split_accs, num_tokens, prefix_length, q_stride, q_head_stride,
    k_page_stride, k_slot_stride, k_head_stride, v_page_stride, v_slot_stride, v_head_stride, scale, softcap,
    GROUP: tl.constexpr, NUM_KV_HEADS: tl.constexpr, PAGE_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr,
    V_HEAD_DIM: tl.constexpr, D: tl.constexpr, D_REST: tl.constexpr, DV: tl.constexpr, V_IN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """One split of the prefix for BLOCK_M rows; the programs of a split and KV head are neighbours."""
    tiles = tl.cdiv(num_tokens * GROUP, BLOCK_M)
    tile = tl.program_id(0) % tiles
    kv_head = (tl.program_id(0) // tiles).to(tl.int64)
    split = tl.program_id(1)
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rows < num_tokens * GROUP
    rows = tl.minimum(rows, num_tokens * GROUP - 1)
    tokens = (rows // GROUP).to(tl.int64)
    heads = kv_head * GROUP + rows % GROUP
    q_rows = tokens * q_stride + heads * q_head_stride
    q_rest = None
    if D_REST > 0:
        q_rest = load_columns(q, q_rows, None, D, D_REST, HEAD_DIM)
    query_at = tl.full((BLOCK_M,), 0, tl.int32) + prefix_length  # every query comes after the prefix
    top, total, acc = attend_keys(
        load_columns(q, q_rows, None, 0, D, HEAD_DIM), q_rest, query_at, None, k_pages + kv_head * k_head_stride,
        v_pages + kv_head * (k_head_stride if v_head_stride is None else v_head_stride), None, None, page_ids,
        k_page_stride, k_slot_stride, v_page_stride, v_slot_stride, 0, split * SPLIT,
        tl.minimum((split + 1) * SPLIT, prefix_length), scale, None, softcap, NUM_KV_HEADS, PAGE_SIZE, HEAD_DIM,
        V_HEAD_DIM, DV, V_IN_K, BLOCK_N,
    )  # fmt: skip
    at = (split.to(tl.int64) * num_tokens + tokens) * (NUM_KV_HEADS * GROUP) + heads
    store_split(split_sums, split_accs, at, inside, top, total, acc, V_HEAD_DIM)


@triton.jit(do_not_specialize=["num_rows", "num_splits"])
def _join_kernel(
    split_sums, split_accs, own, own_lse, out, num_rows, num_splits, V_HEAD_DIM: tl.constexpr, DV: tl.constexpr,
    FOLD_SPLITS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Fold the splits of ROWS rows (of a token and head), and join them with attention over the rows' own keys."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = rows < num_rows
    rows = tl.minimum(rows, num_rows - 1)
    top, total, acc = fold_splits(split_sums, split_accs, 0, rows, num_rows, 0, num_splits, V_HEAD_DIM, DV, FOLD_SPLITS)
    own_top = tl.load(own_lse + rows, mask=inside, other=0.0) * LOG2_E
    own_acc = load_columns(own, rows * V_HEAD_DIM, inside, 0, DV, V_HEAD_DIM).to(tl.float32)
    raised = tl.maximum(top, own_top)
    share = tl.exp2(top - raised)
    own_share = tl.exp2(own_top - raised)
    total = total * share + own_share
    value = (acc * share[:, None] + own_acc * own_share[:, None]) / total[:, None]
    store_columns(out, rows * V_HEAD_DIM, inside, value.to(out.dtype.element_ty), V_HEAD_DIM)


@triton.jit(do_not_specialize=["num_rows"])
def _merge_kernel(
    first,
    first_lse,
    second,
    second_lse,
    out,
    lse,
    num_rows,
    V_HEAD_DIM: tl.constexpr,
    DV: tl.constexpr,
    ROWS: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = rows < num_rows
    first_top = tl.load(first_lse + rows, mask=inside, other=0.0) * LOG2_E
    second_top = tl.load(second_lse + rows, mask=inside, other=0.0) * LOG2_E
    top = tl.maximum(tl.maximum(first_top, second_top), LOWEST)  # a number where both are -inf
    first_share = tl.exp2(first_top - top)
    second_share = tl.exp2(second_top - top)
    total = first_share + second_share
    nothing = total == 0.0
    total = tl.where(nothing, 1.0, total)
    tl.store(lse + rows, tl.where(nothing, float("-inf"), (top + tl.log2(total)) * LN_2), mask=inside)
    value = load_columns(first, rows * V_HEAD_DIM, inside, 0, DV, V_HEAD_DIM).to(tl.float32) * first_share[:, None]
    value += load_columns(second, rows * V_HEAD_DIM, inside, 0, DV, V_HEAD_DIM).to(tl.float32) * second_share[:, None]
    value = value / total[:, None]
    store_columns(out, rows * V_HEAD_DIM, inside, value.to(out.dtype.element_ty), V_HEAD_DIM)


def shared_prefix_attention(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, prefix_pages: Tensor, prefix_length: int, page_table: Tensor,
    cu_seqlens: Tensor, context_lens: Tensor, scale: float, softcap: float | None = None,
    sinks: Tensor | None = None, *, max_query_len: int, tickets: Tensor | None = None,
    blocks: Mapping[str, int] | None = None, own_blocks: Mapping[str, int] | None = None,
) -> Tensor:  # fmt: skip
    """`reference.shared_prefix_attention` for sequences with few queries each; max_query_len (1 to 16) at most.

    Args: prefix_pages [P] int64 or int32, filled by the prefix: prefix_length = P * page_size. Everything else, and
    what comes back, as `decode_attention`, which attends the sequences' own keys. blocks: overrides the block sizes of
    the tuning table for the prefix, own_blocks those of `decode_attention`. The workspace takes 4 * (v_head_dim + 2)
    bytes per query, head and split of the prefix. Raises KernelError.
    """
    batch = (page_table, cu_seqlens, context_lens, scale, None, softcap, sinks)
    device = check_attention(q, k_pages, v_pages, *batch, None, None, None)
    check("prefix_pages", prefix_pages, (None,), INTS, device)
    page_size = k_pages.shape[1]
    require(
        0 < prefix_length == len(prefix_pages) * page_size,
        f"prefix_length is {prefix_length}, and {len(prefix_pages)} pages of {page_size} tokens are filled by "
        f"{len(prefix_pages) * page_size}",
    )
    own, own_lse = decode_attention(
        q, k_pages, v_pages, *batch, max_query_len=max_query_len, return_lse=True, tickets=tickets, blocks=own_blocks
    )
    if len(q) == 0:
        return own
    chosen = blocks_for(q, k_pages, v_pages, blocks)
    fold, split = chosen.pop("FOLD_SPLITS"), chosen["SPLIT"]
    require(split % chosen["BLOCK_N"] == 0, f"SPLIT = {split} is not a multiple of BLOCK_N = {chosen['BLOCK_N']}")
    sums, accs = attend_prefix(q, k_pages, v_pages, prefix_pages, prefix_length, scale, softcap, chosen)
    out = torch.empty_like(own)
    rows, padded = own_lse.numel(), tile_widths(k_pages, v_pages)["DV"]
    few = max(1, min(4, 512 // padded))
    _join_kernel[(triton.cdiv(rows, few),)](
        sums, accs, own, own_lse, out, rows, len(sums), V_HEAD_DIM=v_pages.shape[3], DV=padded, FOLD_SPLITS=fold,
        ROWS=few, enable_fp_fusion=chosen["enable_fp_fusion"],
    )  # fmt: skip
    return out


def attend_prefix(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, prefix_pages: Tensor, prefix_length: int, scale: float,
    softcap: float | None, chosen: Mapping[str, int],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """top and total [splits, N * num_heads, 2], and acc [splits, N * num_heads, v_head_dim], float32, of every query
    over each split of the prefix."""
    num_tokens, num_heads, _ = q.shape
    num_kv_heads, v_head_dim = v_pages.shape[2:]
    group = num_heads // num_kv_heads
    num_splits = triton.cdiv(prefix_length, chosen["SPLIT"])
    shape = (num_splits, num_tokens * num_heads)
    sums = torch.empty(*shape, 2, dtype=torch.float32, device=q.device)
    accs = torch.empty(*shape, v_head_dim, dtype=torch.float32, device=q.device)
    tiles = triton.cdiv(num_tokens * group, chosen["BLOCK_M"])
    _prefix_kernel[(tiles * num_kv_heads, num_splits)](
        q, k_pages, v_pages, prefix_pages, sums, accs, num_tokens, prefix_length, *q.stride()[:2],
        *page_strides(k_pages, v_pages), scale, softcap, GROUP=group, NUM_KV_HEADS=num_kv_heads,
        PAGE_SIZE=k_pages.shape[1], **tile_widths(k_pages, v_pages), **chosen,
    )  # fmt: skip
    return sums, accs


def merge_attention(
    first: Tensor,
    first_lse: Tensor,
    second: Tensor,
    second_lse: Tensor,
    *,
    blocks: Mapping[str, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """`reference.merge_attention`: first, second [N, num_heads * v_head_dim] of one dtype, first_lse, second_lse
    [N, num_heads] float32. blocks: overrides the block sizes of the tuning table. Raises KernelError."""
    device = check_device("first", first)
    check("first", first, (None, None), FLOATS, device)
    check("second", second, first.shape, first.dtype, device)
    check("first_lse", first_lse, (len(first), None), torch.float32, device)
    check("second_lse", second_lse, first_lse.shape, torch.float32, device)
    num_heads, width = first_lse.shape[1], first.shape[1]
    require(num_heads > 0 and width % num_heads == 0, f"{width} columns cannot be those of {num_heads} heads")
    out, lse = torch.empty_like(first), torch.empty_like(first_lse)
    if out.numel() == 0:
        return out, lse
    v_head_dim, rows = width // num_heads, lse.numel()
    padded = max(16, triton.next_power_of_2(v_head_dim))
    chosen = config(
        "merge_attention", device, {"ROWS": max(1, 1024 // padded), "num_warps": 4}, blocks, v_head_dim=v_head_dim
    )
    _merge_kernel[(triton.cdiv(rows, chosen["ROWS"]),)](
        first, first_lse, second, second_lse, out, lse, rows, V_HEAD_DIM=v_head_dim, DV=padded, **chosen
    )
    return out, lse


def blocks_for(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, override: Mapping[str, int] | None = None
) -> dict[str, int]:
    """BLOCK_M rows, BLOCK_N keys, SPLIT keys, FOLD_SPLITS splits folded at once; never by a number of sequences."""
    widths, dtype = tile_widths(k_pages, v_pages), str(q.dtype).removeprefix("torch.")
    default = {"BLOCK_M": 64, "BLOCK_N": 64, "SPLIT": 512, "FOLD_SPLITS": 8, "num_warps": 4, "num_stages": 3}
    if widths["DV"] >= 512 or q.dtype == torch.float32:
        default.update(BLOCK_M=16, BLOCK_N=16, num_warps=8, num_stages=2)
    elif widths["DV"] == 256:
        default.update(BLOCK_N=16, num_warps=8)
    if tuning.is_hip():
        default.update(BLOCK_N=16, num_stages=1 if widths["DV"] > 128 else 2)
    shape: dict[str, int | str | bool] = {"head_dim": widths["HEAD_DIM"], "v_head_dim": widths["V_HEAD_DIM"]}
    return config("shared_prefix_attention", q.device, default, override, dtype=dtype, **shape)


def tuning_problems(device: torch.device) -> Iterator[Problem]:
    """What `python -m handloom_kernels.tune shared_prefix_attention` tries: 64 sequences, a prefix of 4096 tokens."""
    for heads, kv_heads, head_dim in ((12, 12, 64), (16, 8, 128), (32, 8, 128), (8, 4, 256)):
        q = torch.randn(64, heads, head_dim, dtype=torch.bfloat16, device=device)
        k, v = (torch.randn(512, 16, kv_heads, head_dim, dtype=torch.bfloat16, device=device) for _ in "kv")
        prefix, table = torch.arange(256, device=device), torch.arange(256, 512, device=device).view(64, 4)
        starts, lengths = torch.arange(65, device=device), torch.full((64,), 64, device=device)
        yield Problem(
            when={"head_dim": head_dim, "v_head_dim": head_dim, "dtype": "bfloat16"},
            candidates=[
                {"BLOCK_M": m, "BLOCK_N": n, "SPLIT": split, "FOLD_SPLITS": 16, "num_warps": warps, "num_stages": 3}
                for m in (64, 128)
                for n in (32, 64, 128)
                for split in (256, 512, 1024)
                for warps in (4, 8)
            ],
            run=partial(
                shared_prefix_attention,
                *(q, k, v, prefix, 4096, table, starts, lengths, head_dim**-0.5),
                max_query_len=1,
            ),
        )
