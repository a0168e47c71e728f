"""What the attention kernels share: page ids, tiles of columns, a split's softmax, its folding, what is checked.

A row (one query, one query head) that has seen some of its keys is three values, in base 2: `top`, its largest score;
`total`, the sum of 2^(score - top); `acc`, that of 2^(score - top) * v. Two such triples over different keys make one:

    top = max(top_a, top_b)        total = total_a * 2^(top_a - top) + total_b * 2^(top_b - top)        acc: likewise

A triple over no key at all is (LOWEST, 0, 0); making one of it and another leaves the other as it was, to the bit.

This module does not know who calls it, nor which keys a row sees.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import FLOATS, INTS, check, check_codes, check_device, require
from .reference.pages import QUANTISED
from .tiles import LOG2_E

LN_2 = tl.constexpr(0.6931471805599453)
# Where top starts: below every score, yet a number, so that exp(-inf - top) is 0 and exp(top - top) is 1.
LOWEST = tl.constexpr(-1e30)


@triton.jit
def page_of(page_ids, start, first, end, PAGE_SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    """The page ids of the keys start .. start + BLOCK_N: one for all where a tile never leaves its page, else one per
    key. Only those of pages with keys that are read are looked up."""
    if PAGE_SIZE % BLOCK_N == 0:
        page = tl.load(page_ids + start // PAGE_SIZE, mask=start < end, other=0)
    else:
        keys = start + tl.arange(0, BLOCK_N)
        page = tl.load(page_ids + keys // PAGE_SIZE, mask=(keys >= first) & (keys < end), other=0)
    return page.to(tl.int32)


@triton.jit
def load_columns(base, rows, inside, FIRST: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """Columns FIRST .. FIRST + BLOCK of the rows at these offsets; 0 beyond WIDTH and in rows not inside (None: all
    are)."""
    columns = FIRST + tl.arange(0, BLOCK)
    at = base + rows[:, None] + columns[None, :]
    if FIRST + BLOCK <= WIDTH:
        tile = tl.load(at) if inside is None else tl.load(at, mask=inside[:, None], other=0.0)
    else:
        mask = (columns < WIDTH)[None, :]
        if inside is not None:
            mask = mask & inside[:, None]
        tile = tl.load(at, mask=mask, other=0.0)
    return tile


@triton.jit
def store_columns(base, rows, inside, tile, WIDTH: tl.constexpr):
    """The first WIDTH columns of a tile, to the rows at these offsets that are inside."""
    columns = tl.arange(0, tile.shape[1])
    mask = inside[:, None]
    if tile.shape[1] > WIDTH:
        mask = mask & (columns < WIDTH)[None, :]
    tl.store(base + rows[:, None] + columns[None, :], tile, mask=mask)


@triton.jit
def write_rows(out, lse, sinks, top, total, acc, at, heads, inside, V_HEAD_DIM: tl.constexpr):
    """Divide by the total and write row `at`; a sink is one more score, which adds to the total and has no value."""
    if sinks is not None:
        sink = tl.load(sinks + heads).to(tl.float32) * LOG2_E
        raised = tl.maximum(top, sink)
        fade = tl.exp2(top - raised)
        total = total * fade + tl.exp2(sink - raised)
        acc = acc * fade[:, None]
        top = raised
    nothing = total == 0.0
    total = tl.where(nothing, 1.0, total)
    if lse is not None:
        tl.store(lse + at, tl.where(nothing, float("-inf"), (top + tl.log2(total)) * LN_2), mask=inside)
    value = acc / total[:, None]
    store_columns(out, at * V_HEAD_DIM, inside, value.to(out.dtype.element_ty), V_HEAD_DIM)


@triton.jit
def store_split(split_sums, split_accs, at, inside, top, total, acc, V_HEAD_DIM: tl.constexpr):
    """Put a split's three values where the last to arrive will look for them."""
    tl.store(split_sums + 2 * at, top, mask=inside)
    tl.store(split_sums + 2 * at + 1, total, mask=inside)
    store_columns(split_accs, at * V_HEAD_DIM, inside, acc, V_HEAD_DIM)


@triton.jit
def fold_splits(
    split_sums, split_accs, lead, rows, rows_per_split, first_split, num_splits, V_HEAD_DIM: tl.constexpr,
    DV: tl.constexpr, FOLD_SPLITS: tl.constexpr,
):  # fmt: skip
    """Make one triple of those of num_splits splits; `lead`: where row 0 of the first split lies.

    FOLD_SPLITS are read at once, in groups that begin at multiples of it, so that a split has one place in the sum.
    Before the first and after the last split one of these two is read again, and counts as one over no key."""
    top = tl.full((rows.shape[0],), LOWEST, tl.float32)
    total = tl.zeros((rows.shape[0],), tl.float32)
    acc = tl.zeros((rows.shape[0], DV), tl.float32)
    columns = tl.arange(0, DV)
    for start in range(first_split // FOLD_SPLITS * FOLD_SPLITS, first_split + num_splits, FOLD_SPLITS):
        nth = start - first_split + tl.arange(0, FOLD_SPLITS)
        there = (nth >= 0) & (nth < num_splits)
        nth = tl.minimum(tl.maximum(nth, 0), num_splits - 1).to(tl.int64)
        at = lead + nth[:, None] * rows_per_split + rows[None, :]
        tops = tl.where(there[:, None], tl.load(split_sums + 2 * at), LOWEST)
        totals = tl.load(split_sums + 2 * at + 1)
        accs_at = split_accs + at[:, :, None] * V_HEAD_DIM + columns[None, None, :]
        if DV == V_HEAD_DIM:
            accs = tl.load(accs_at)
        else:
            accs = tl.load(accs_at, mask=(columns < V_HEAD_DIM)[None, None, :], other=0.0)
        raised = tl.maximum(top, tl.max(tops, axis=0))
        weights = tl.exp2(tops - raised[None, :])
        fade = tl.exp2(top - raised)
        top = raised
        total = total * fade + tl.sum(totals * weights, axis=0)
        acc = acc * fade[:, None] + tl.sum(accs * weights[:, :, None], axis=0)
    return top, total, acc


def check_attention(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, page_table: Tensor, cu_seqlens: Tensor, context_lens: Tensor,
    scale: float, window: int | None, softcap: float | None, sinks: Tensor | None, alibi_slopes: Tensor | None,
    k_scales: Tensor | None, v_scales: Tensor | None,
) -> torch.device:  # fmt: skip
    """The device of these, if they fit each other as `reference.paged_attention` says. Raises KernelError."""
    device = check_device("q", q)
    check("q", q, (None, None, None), FLOATS, device, strided=True)
    num_heads, head_dim = q.shape[1:]
    quantised = k_scales is not None
    require(quantised == (v_scales is not None), "k_scales and v_scales are given together or not at all")
    dtypes = QUANTISED if quantised else (q.dtype,)
    check("k_pages", k_pages, (None, None, None, head_dim), dtypes, device, strided=True)
    check("v_pages", v_pages, (*k_pages.shape[:3], None), k_pages.dtype, device, strided=True)
    check_codes("k_pages", k_pages)
    num_kv_heads, v_head_dim = v_pages.shape[2:]
    require(
        num_kv_heads > 0 and num_heads % num_kv_heads == 0,
        f"q has {num_heads} heads, which {num_kv_heads} KV heads cannot share equally",
    )
    require(1 <= head_dim <= 1024, f"head_dim is {head_dim}; this kernel takes 1 to 1024")
    require(1 <= v_head_dim <= 512, f"v_head_dim is {v_head_dim}; this kernel takes 1 to 512")
    for name, scales in (("k_scales", k_scales), ("v_scales", v_scales)):
        if scales is not None:
            check(name, scales, tuple(k_pages.shape[:3]), torch.float32, device)
    for name, each in (("sinks", sinks), ("alibi_slopes", alibi_slopes)):
        if each is not None:
            check(name, each, (num_heads,), FLOATS, device)
    num_sequences = len(context_lens)
    check("page_table", page_table, (num_sequences, None), INTS, device, strided=True)
    check("cu_seqlens", cu_seqlens, (num_sequences + 1,), INTS, device)
    check("context_lens", context_lens, (num_sequences,), INTS, device)
    require(len(q) == 0 or num_sequences > 0, f"{len(q)} queries belong to none of 0 sequences")
    require(0 < scale < float("inf"), f"scale is {scale}; it must be positive")
    require(window is None or window >= 1, f"window is {window}; a query sees itself at least")
    require(softcap is None or softcap > 0, f"softcap is {softcap}; it must be positive")
    return device


def page_strides(k_pages: Tensor, v_pages: Tensor) -> tuple[int | None, ...]:
    """Those of pages, slots and heads, of K and then of V; None for V's where they are K's."""
    same = v_pages.stride() == k_pages.stride()
    return (*k_pages.stride()[:3], *((None, None, None) if same else v_pages.stride()[:3]))


def tile_widths(k_pages: Tensor, v_pages: Tensor) -> dict[str, int]:
    """How the columns are cut: queries and keys into D and D_REST (576 = 512 + 64, 96 = 64 + 32, 128 = 128 + 0), values
    padded to DV; V_IN_K: the values are just the first D columns of the keys, and are not read again."""
    head_dim, v_head_dim = k_pages.shape[-1], v_pages.shape[-1]
    wide = 1 << (head_dim.bit_length() - 1)
    padded = max(16, triton.next_power_of_2(v_head_dim))
    same_place = k_pages.stride() == v_pages.stride()
    same_place = same_place and k_pages.untyped_storage() is v_pages.untyped_storage()
    same_place = same_place and k_pages.storage_offset() == v_pages.storage_offset()
    return {
        "HEAD_DIM": head_dim,
        "V_HEAD_DIM": v_head_dim,
        "D": max(16, wide),
        "D_REST": max(16, triton.next_power_of_2(head_dim - wide)) if head_dim > max(16, wide) else 0,
        "DV": padded,
        "V_IN_K": same_place and v_head_dim == max(16, wide),
    }
