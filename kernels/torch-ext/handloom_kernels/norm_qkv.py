"""Norm, QKV projection, per-head q/k norm, rotation, and the write of K and V into their pages: half a layer's start.

The product is that of linear.py, and the same limit holds: the weight is read once, the rest must not cost time. A
program's BLOCK_N rows of the weight are a piece of one head, so that there are enough programs even where heads are
few and wide. Rotation needs dimensions in pairs (i with i + rotary_dim / 2, or neighbours), so a program takes its rows
in that order, and a pair ends up as two neighbours in one thread's registers, whichever way they are paired:

    weight, one head of 8, BLOCK_N 4, halves rotated         accumulator, one piece
      0 1 2 3 4 5 6 7   ->   program 0: rows 0 4 1 5    ->   x0 x4 | x1 x5
                             program 1: rows 2 6 3 7    ->   x2 x6 | x3 x7

Each row lies in one piece anyway, so the order of rows costs nothing. Where a head must be seen whole (for its norm, or
for the scale of quantised pages) and is in pieces, they meet in a workspace: whoever finishes a head's last piece
reads the others' back (a few KB, from the second-level cache) and does the rest for that head:

    piece 0 -> workspace, ticket 1 of 2
    piece 1 -> workspace, ticket 2 of 2: the last -> norm, rotate, write

A weight of 8 or 4 bits (quantized_product.py) comes in tiles of 16 rows, so a program takes whole tiles, as many of the
head's first half as of the second, and puts the two halves of its accumulator together like a zip; v likewise:

    a head of 64, BLOCK_N 32     rows 0..15 | 16..31 | 32..47 | 48..63   ->   program 0: tiles 0 and 2
                                 tile 0     | 1      | 2      | 3             program 1: tiles 1 and 3

Where tiles do not lie like that (only part of a head is rotated, or a head is not a multiple of 32), heads that are
rotated in halves always meet. If neighbours are rotated, or nothing is, any tiles will do.

Nothing is added up by more than one program, so that the result does not depend on who is last. Tickets cost about
1 us at the end. With one program for each whole head, 48 (8B, heads of 128) or even 6 (Gemma-3-1B, heads of 256) would
read the weight on a chip of 132 multiprocessors, which loses far more.

To move: the weight; K and V of each token; 2 FLOPs an element of the weight and row. Bound by memory.

What follows the product stands in heads.py.

This module does not know how the angles come about, which token a slot belongs to, or what attention is. Meaning and
rounding: `reference.norm_qkv`, `reference.quantized_norm_qkv`, with q and k rounded once after rotation and cos and sin
not rounded.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Iterator, Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .checks import INTS, check, require
from .heads import check_heads, check_rotary, column_at, finish_head, place_of
from .kv_pages import check_pages
from .linear import CANDIDATES, blocks_for, check_linear, product
from .quantized_product import CANDIDATES as QUANTIZED_CANDIDATES
from .quantized_product import check_quantized_linear, form_of, quantized_blocks, quantized_product
from .reference.norm import Norm
from .reference.pages import largest_code
from .reference.quantized_linear import TILE_ROWS, QuantizedWeight, quantize_weight
from .reference.rope import Rotary
from .tiles import ROWS, check_norm, is_last, strips_for
from .tuning import Problem


@triton.jit
def _piece_of(part, num_heads, num_kv_heads, HEAD_DIM: tl.constexpr, V_HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr):
    """What program `part` owns: (a head, q's first, then k's and v's; its dimensions; the weight's row where it begins;
    the piece's first place; is the head v's?)"""
    qk_heads = num_heads + num_kv_heads
    qk_parts = qk_heads * tl.cdiv(HEAD_DIM, BLOCK_N)
    is_v = part >= qk_parts
    part = tl.where(is_v, part - qk_parts, part)
    head_dim = tl.where(is_v, V_HEAD_DIM, HEAD_DIM)
    pieces = tl.cdiv(head_dim, BLOCK_N)
    head = part // pieces
    head_start = tl.where(is_v, qk_heads * HEAD_DIM, 0) + head * head_dim
    return tl.where(is_v, qk_heads + head, head), head_dim, head_start, part % pieces * BLOCK_N, is_v


@triton.jit
def _column_of_tiles(n, place, head_dim, PAIRED: tl.constexpr, BLOCK_N: tl.constexpr):
    """(the dimension of the head that is row n of the piece's tiles, is it one?); if PAIRED half of the tiles are of
    the head's first half, the others of its second."""
    if PAIRED:
        HALF: tl.constexpr = BLOCK_N // 2
        pair = place // 2 + n % HALF
        return pair + n // HALF * (head_dim // 2), pair < head_dim // 2
    return place + n, place + n < head_dim


@triton.jit
def _projected(
    x, norm_weight, norm_bias, weight, scales, zeros, bias, head_dim, head_start, place, is_v,
    first, num_rows, width, depth, num_tiles, x_stride, eps,
    NORM: tl.constexpr, HAS_NORM_BIAS: tl.constexpr, STRIP: tl.constexpr, CHUNK: tl.constexpr,
    KIND: tl.constexpr, GROUP: tl.constexpr, SCALE_ROWS: tl.constexpr, HAS_ZEROS: tl.constexpr,
    HAS_BIAS: tl.constexpr, ROTARY_DIM: tl.constexpr, INTERLEAVED: tl.constexpr, PAIRED: tl.constexpr,
    EVEN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SLICES: tl.constexpr,
):  # fmt: skip
    """A piece of a head of norm(x) W' + bias: ([ROWS, BLOCK_N] of x's dtype, the places of its columns, are they places
    of this head?)"""
    n = tl.arange(0, BLOCK_N)
    if KIND == "float":
        inside = place + n < head_dim
        weight_rows = head_start + tl.where(is_v, place + n, column_at(place + n, ROTARY_DIM, INTERLEAVED))
        y = product(
            x, x_stride, first, num_rows, norm_weight, norm_bias, eps, weight, weight_rows, inside, depth,
            NORM, HAS_NORM_BIAS, EVEN, STRIP, CHUNK, BLOCK_K,
        )  # fmt: skip
    else:
        column, inside = _column_of_tiles(n, place, head_dim, PAIRED, BLOCK_N)
        tile, tile_inside = _column_of_tiles(16 * tl.arange(0, BLOCK_N // 16), place, head_dim, PAIRED, BLOCK_N)
        weight_rows = head_start + column
        y = quantized_product(
            x, x_stride, first, num_rows, norm_weight, norm_bias, eps, weight, scales, zeros,
            (head_start + tile) // 16, tile_inside, weight_rows, inside, width, depth, num_tiles,
            NORM, HAS_NORM_BIAS, STRIP, CHUNK, KIND, GROUP, SCALE_ROWS, HAS_ZEROS, EVEN, SLICES,
        )  # fmt: skip
        y = tl.trans(y)
    if HAS_BIAS:
        y += tl.load(bias + weight_rows, mask=inside, other=0.0).to(tl.float32)[None, :]
    y = y.to(x.dtype.element_ty)
    places = place + n
    if PAIRED:
        y = tl.reshape(tl.permute(tl.reshape(y, (ROWS, 2, BLOCK_N // 2)), (0, 2, 1)), (ROWS, BLOCK_N))
        inside = places < head_dim
    elif KIND != "float":
        places = tl.where(is_v, column, place_of(column, ROTARY_DIM, INTERLEAVED))
    return y, places, inside


@triton.jit(do_not_specialize=["num_rows"])
def _norm_qkv_kernel(
    x, norm_weight, norm_bias, weight, scales, zeros, bias, q_weight, k_weight, cos, sin, slot_mapping,
    q_out, k_pages, v_pages, k_scales, v_scales, workspace, tickets,
    num_rows, num_heads, num_kv_heads, width, depth, num_tiles, x_stride, eps, q_eps, k_eps, limit,
    NORM: tl.constexpr, HAS_NORM_BIAS: tl.constexpr, STRIP: tl.constexpr, CHUNK: tl.constexpr,
    KIND: tl.constexpr, GROUP: tl.constexpr, SCALE_ROWS: tl.constexpr, HAS_ZEROS: tl.constexpr,
    HAS_BIAS: tl.constexpr, HEAD_NORM: tl.constexpr, HEAD_DIM: tl.constexpr, V_HEAD_DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr, INTERLEAVED: tl.constexpr, QUANTISED: tl.constexpr,
    PAIRED: tl.constexpr, MEET: tl.constexpr, HEAD_BLOCK: tl.constexpr,
    EVEN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SLICES: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * ROWS
    head, head_dim, head_start, place, is_v = _piece_of(
        tl.program_id(1), num_heads, num_kv_heads, HEAD_DIM, V_HEAD_DIM, BLOCK_N
    )
    value, places, inside = _projected(
        x, norm_weight, norm_bias, weight, scales, zeros, bias, head_dim, head_start, place, is_v,
        first, num_rows, width, depth, num_tiles, x_stride, eps,
        NORM, HAS_NORM_BIAS, STRIP, CHUNK, KIND, GROUP, SCALE_ROWS, HAS_ZEROS,
        HAS_BIAS, ROTARY_DIM, INTERLEAVED, PAIRED, EVEN, BLOCK_N, BLOCK_K, SLICES,
    )  # fmt: skip
    rows = (first + tl.arange(0, ROWS)).to(tl.int64)
    if MEET:
        there = (rows < num_rows)[:, None]
        at = workspace + rows[:, None] * width + head_start
        tl.store(at + places[None, :], value, mask=there & inside[None, :])
        ticket = tickets + tl.program_id(0) * (num_heads + 2 * num_kv_heads) + head
        if not is_last(ticket, tl.cdiv(head_dim, BLOCK_N)):
            return
        whole = tl.arange(0, HEAD_BLOCK)
        value = tl.load(at + whole[None, :], mask=there & (whole < head_dim)[None, :], other=0.0)
        place = 0
    finish_head(
        value.to(tl.float32), place, head, rows, num_rows, q_weight, k_weight, q_eps, k_eps, cos, sin, slot_mapping,
        q_out, k_pages, v_pages, k_scales, v_scales, limit, num_heads, num_kv_heads,
        HEAD_NORM, HEAD_DIM, V_HEAD_DIM, ROTARY_DIM, V_HEAD_DIM if PAIRED else 0, INTERLEAVED, QUANTISED,
    )  # fmt: skip


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
    *,
    tickets: Tensor | None = None,
    blocks: Mapping[str, int] | None = None,
) -> Tensor:
    """`reference.norm_qkv`: writes K and V, returns q [N, num_heads, D], new and contiguous.

    Args: hidden [N, H], rows of any stride, and weight [num_heads * D + num_kv_heads * (D + V), H], float32, float16 or
    bfloat16, of one dtype; norm over H and bias in any of these; q_norm and k_norm, both or none, of one kind over D,
    without bias; rotary.cos, rotary.sin [N, rotary_dim / 2] float32, rotary_dim at most D; k_pages [num_pages,
    page_size, num_kv_heads, D] and v_pages [..., V] of one dtype, any of these, or with scales [num_pages, page_size,
    num_kv_heads] float32 one of `reference.pages.QUANTISED`; slot_mapping [N] int64 or int32, -1 for a token that is
    not to be written, distinct otherwise, on the pages (not checked: that would make the host wait).
    tickets: [tickets_needed(...)] int32 zeros, to be given where launches are captured or repeated: the kernel leaves
    zeros, and launches that share them must not overlap; None allocates them. blocks: overrides the block sizes of the
    tuning table. Raises KernelError.
    """
    return _launch(
        hidden, norm, weight, bias, q_norm, k_norm, rotary, k_pages, v_pages, slot_mapping, k_scales, v_scales,
        tickets, blocks,
    )  # fmt: skip


def quantized_norm_qkv(
    hidden: Tensor,
    norm: Norm,
    q: QuantizedWeight,
    bias: Tensor | None,
    q_norm: Norm | None,
    k_norm: Norm | None,
    rotary: Rotary | None,
    k_pages: Tensor,
    v_pages: Tensor,
    slot_mapping: Tensor,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
    *,
    tickets: Tensor | None = None,
    blocks: Mapping[str, int] | None = None,
) -> Tensor:
    """`reference.quantized_norm_qkv`: `norm_qkv` with a weight of 8 or 4 bits, q of [num_heads * D + num_kv_heads *
    (D + V), H], which is not rounded to hidden's dtype. D and V must be multiples of 16, whole tiles. The rest is as
    there; heads that are rotated in halves meet unless all of D is rotated and D and V are multiples of 32.
    """
    require(isinstance(q, QuantizedWeight), f"q must be a QuantizedWeight, not {type(q).__name__}")
    return _launch(
        hidden, norm, q, bias, q_norm, k_norm, rotary, k_pages, v_pages, slot_mapping, k_scales, v_scales,
        tickets, blocks,
    )  # fmt: skip


def _launch(
    hidden: Tensor,
    norm: Norm,
    weight: Tensor | QuantizedWeight,
    bias: Tensor | None,
    q_norm: Norm | None,
    k_norm: Norm | None,
    rotary: Rotary | None,
    k_pages: Tensor,
    v_pages: Tensor,
    slot_mapping: Tensor,
    k_scales: Tensor | None,
    v_scales: Tensor | None,
    tickets: Tensor | None,
    blocks: Mapping[str, int] | None,
) -> Tensor:
    if isinstance(weight, Tensor):
        device, width = check_linear(hidden, weight, bias, "hidden"), len(weight)
    else:
        device, width = check_quantized_linear(hidden, weight, bias, "hidden"), weight.shape[0]
    num_rows, depth = hidden.shape
    check_norm("norm", norm, depth, device)
    quantised = check_pages(k_pages, v_pages, k_scales, v_scales, device)
    num_heads, head_norm = check_heads(width, hidden, q_norm, k_norm, k_pages, v_pages)
    num_kv_heads, head_dim, v_head_dim = *k_pages.shape[2:], v_pages.shape[3]
    rotary_dim = check_rotary(rotary, num_rows, head_dim, device)
    halves = rotary is not None and rotary_dim > 0 and not rotary.interleaved
    check("slot_mapping", slot_mapping, (num_rows,), INTS, device)
    q = torch.empty((num_rows, num_heads, head_dim), dtype=hidden.dtype, device=device)
    if num_rows == 0:
        return q
    whole = quantised or head_norm != "none"
    chosen, form, data = _form(hidden, weight, head_dim, v_head_dim, rotary_dim if halves else 0, whole, blocks)
    pieces, v_pieces = (triton.cdiv(size, chosen["BLOCK_N"]) for size in (head_dim, v_head_dim))
    meet = whole and max(pieces, v_pieces if quantised else 1) > 1
    meet = meet or (halves and not isinstance(weight, Tensor) and not form["PAIRED"])
    workspace = q
    if meet:
        workspace = torch.empty((num_rows, width), dtype=hidden.dtype, device=device)
        needed = tickets_needed(num_rows, num_heads, num_kv_heads)
        if tickets is None:
            tickets = torch.zeros(needed, dtype=torch.int32, device=device)
        check("tickets", tickets, (None,), torch.int32, device)
        require(len(tickets) >= needed, f"tickets has {len(tickets)} elements; {needed} are needed")
    grid = (triton.cdiv(num_rows, ROWS.value), (num_heads + num_kv_heads) * pieces + num_kv_heads * v_pieces)
    _norm_qkv_kernel[grid](
        hidden, norm.weight, norm.weight if norm.bias is None else norm.bias, *data,
        data[0] if bias is None else bias, hidden if q_norm is None else q_norm.weight,
        hidden if k_norm is None else k_norm.weight, hidden if rotary is None else rotary.cos,
        hidden if rotary is None else rotary.sin, slot_mapping, q, k_pages, v_pages,
        q if k_scales is None else k_scales, q if v_scales is None else v_scales, workspace,
        q if tickets is None else tickets, num_rows, num_heads, num_kv_heads, width, depth,
        0 if isinstance(weight, Tensor) else weight.data.shape[1], hidden.stride(0),
        norm.eps, 0.0 if q_norm is None else q_norm.eps, 0.0 if k_norm is None else k_norm.eps,
        largest_code(k_pages.dtype) if quantised else 0.0, NORM=norm.kind, HAS_NORM_BIAS=norm.bias is not None,
        HAS_BIAS=bias is not None, HEAD_NORM=head_norm, HEAD_DIM=head_dim, V_HEAD_DIM=v_head_dim,
        ROTARY_DIM=rotary_dim, INTERLEAVED=rotary is not None and rotary.interleaved, QUANTISED=quantised,
        MEET=meet, **strips_for(depth, chosen["num_warps"]),
        HEAD_BLOCK=triton.next_power_of_2(max(head_dim, v_head_dim)), **form, **chosen,
    )  # fmt: skip
    return q


def _form(
    hidden: Tensor,
    weight: Tensor | QuantizedWeight,
    head_dim: int,
    v_head_dim: int,
    halves: int,
    whole: bool,
    blocks: Mapping[str, int] | None,
) -> tuple[dict[str, int], dict[str, int | str | bool], tuple[Tensor, Tensor, Tensor]]:
    """(block sizes, what is compiled in of the weight, its tensors); halves: dimensions rotated in halves; whole: must
    heads be seen whole?"""
    if isinstance(weight, Tensor):
        widest = triton.next_power_of_2(head_dim)
        chosen = blocks_for("norm_qkv", hidden, len(weight), blocks, meet=whole, widest=widest)
        if hidden.element_size() == 2 and not tuning.is_hip():
            chosen.setdefault("maxnreg", 255)  # as in quantized_blocks
        form: dict[str, int | str | bool] = {"KIND": "float", "GROUP": 0, "SCALE_ROWS": 1, "HAS_ZEROS": False}
        form |= {"PAIRED": False, "SLICES": 1, "EVEN": hidden.shape[1] % chosen["BLOCK_K"] == 0}
        return chosen, form, (weight, weight, weight)
    for name, size in (("k_pages", head_dim), ("v_pages", v_head_dim)):
        require(
            size % TILE_ROWS == 0,
            f"{name} has heads of {size}; beside quantised weights they must be multiples of {TILE_ROWS}, whole tiles: "
            "use quantized_linear and qk_norm_rope_write",
        )
    both = math.gcd(head_dim, v_head_dim)
    pairs = halves == head_dim and both % (2 * TILE_ROWS) == 0
    widest = min(64, both & -both)
    chosen = quantized_blocks("norm_qkv", hidden, weight, blocks, normed=True, paired=pairs, widest=widest)
    require(chosen["BLOCK_N"] % TILE_ROWS == 0, f"BLOCK_N is {chosen['BLOCK_N']}; expected whole tiles of {TILE_ROWS}")
    paired = pairs and chosen["BLOCK_N"] >= 2 * TILE_ROWS
    zeros = weight.scales if weight.zeros is None else weight.zeros
    form = {**form_of(weight, chosen["SLICES"]), "PAIRED": paired, "BLOCK_K": 0}
    return chosen, form, (weight.data, weight.scales, zeros)


def tickets_needed(num_rows: int, num_heads: int, num_kv_heads: int) -> int:
    """The length of `tickets` for up to num_rows tokens: one for each head of each ROWS of them."""
    tiles: int = triton.cdiv(num_rows, ROWS.value)
    return tiles * (num_heads + 2 * num_kv_heads)


def tuning_problems(device: torch.device) -> Iterator[Problem]:
    """What `python -m handloom_kernels.tune norm_qkv` tries."""
    for num_heads, num_kv_heads, head_dim, depth in ((32, 8, 64, 2048), (32, 8, 128, 4096), (16, 8, 128, 1024)):
        width = (num_heads + 2 * num_kv_heads) * head_dim
        weight, hidden = (torch.randn(n, depth, dtype=torch.bfloat16, device=device) for n in (width, 16))
        pages = torch.zeros(1, 16, num_kv_heads, head_dim, dtype=torch.bfloat16, device=device)
        norm = Norm("rms", weight[0], None, 1e-6)
        head_norm = Norm("rms", weight[0, :head_dim], None, 1e-6) if depth == 1024 else None
        rotary = Rotary(*torch.randn(2, 16, head_dim // 2, device=device))
        rest = (None, head_norm, head_norm, rotary, pages, pages.clone(), torch.arange(16, device=device))
        when: dict[str, int | str | bool] = {"width": width, "depth": depth, "dtype": "bfloat16"}
        yield Problem({**when, "kind": "float"}, CANDIDATES, partial(norm_qkv, hidden, norm, weight, *rest))
        for kind, group in (("int8", 0), ("int4", 128), ("fp8", 0)):
            run = partial(quantized_norm_qkv, hidden, norm, quantize_weight(weight, kind, group), *rest)
            yield Problem({**when, "kind": kind, "group": group, "paired": True}, QUANTIZED_CANDIDATES, run)
