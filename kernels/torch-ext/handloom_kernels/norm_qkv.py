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

Nothing is added up by more than one program, so that the result does not depend on who is last. Tickets cost about
1 us at the end. With one program for each whole head, 48 (8B, heads of 128) or even 6 (Gemma-3-1B, heads of 256) would
read the weight on a chip of 132 multiprocessors, which loses far more.

To move: the weight; K and V of each token; 2 FLOPs an element of the weight and row. Bound by memory.

This module does not know how the angles come about, which token a slot belongs to, or what attention is. Meaning and
rounding: `reference.norm_qkv`, with q and k rounded once after rotation.
"""

from __future__ import annotations

from functools import partial
from typing import Iterator, Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import INTS, check, require
from .kv_pages import check_pages, codes_of, largest_bits
from .linear import CANDIDATES, blocks_for, check_linear, product
from .reference.norm import Norm
from .reference.pages import largest_code
from .reference.rope import Rotary
from .tiles import ROWS, check_norm, is_last, normed_tile, strips_for
from .tuning import Problem


@triton.jit
def _column(n, ROTARY_DIM: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The dimension of a q or k head at place n, where the two of a rotated pair are at 2i and 2i + 1."""
    if ROTARY_DIM == 0 or INTERLEAVED:
        return n
    return tl.where(n < ROTARY_DIM, n // 2 + n % 2 * (ROTARY_DIM // 2), n)


@triton.jit
def _rotated(value, place, rows, row_inside, cos, sin, ROTARY_DIM: tl.constexpr):
    """Rotate a tile [ROWS, WIDTH] of a head's places place, place + 1, ..., whose neighbours are pairs."""
    PAIRS: tl.constexpr = value.shape[1] // 2
    HALF: tl.constexpr = ROTARY_DIM // 2
    pair = place // 2 + tl.arange(0, PAIRS)
    at = rows[:, None] * HALF + pair[None, :]
    turned = row_inside[:, None] & (pair < HALF)[None, :]
    c = tl.load(cos + at, mask=turned, other=1.0)
    s = tl.load(sin + at, mask=turned, other=0.0)
    first, second = tl.split(tl.reshape(value, [ROWS, PAIRS, 2]))
    return tl.reshape(tl.join(first * c - second * s, second * c + first * s), [ROWS, 2 * PAIRS])


@triton.jit
def _store_head(
    value, place, out, at, row_inside, HEAD_DIM: tl.constexpr, ROTARY_DIM: tl.constexpr, INTERLEAVED: tl.constexpr
):
    """Store a tile [ROWS, WIDTH] of a head's places place, place + 1, ...; the head of each row begins at out + at."""
    WIDTH: tl.constexpr = value.shape[1]
    value = value.to(out.dtype.element_ty)
    if ROTARY_DIM == 0 or INTERLEAVED:
        n = place + tl.arange(0, WIDTH)
        tl.store(out + at[:, None] + n[None, :], value, mask=row_inside[:, None] & (n < HEAD_DIM)[None, :])
    else:
        HALF: tl.constexpr = ROTARY_DIM // 2
        pair = place // 2 + tl.arange(0, WIDTH // 2)
        first, second = tl.split(tl.reshape(value, [ROWS, WIDTH // 2, 2]))
        left = pair
        right = pair + HALF
        if ROTARY_DIM < HEAD_DIM:
            left = tl.where(pair < HALF, left, 2 * pair)
            right = tl.where(pair < HALF, right, 2 * pair + 1)
        tl.store(out + at[:, None] + left[None, :], first, mask=row_inside[:, None] & (2 * pair < HEAD_DIM)[None, :])
        tl.store(
            out + at[:, None] + right[None, :], second, mask=row_inside[:, None] & (2 * pair + 1 < HEAD_DIM)[None, :]
        )


@triton.jit
def _write_head(
    value, place, slots, head, pages, scales, limit, num_kv_heads,
    HEAD_DIM: tl.constexpr, ROTARY_DIM: tl.constexpr, INTERLEAVED: tl.constexpr, QUANTISED: tl.constexpr,
):  # fmt: skip
    """A KV head of several tokens (or a piece of it), in float32, to their slots; a slot of -1 is none."""
    written = slots >= 0
    at = slots * num_kv_heads + head
    if QUANTISED:
        scale = tl.div_rn(largest_bits(value).to(tl.float32, bitcast=True), limit)
        tl.store(scales + at, scale, mask=written)
        value = codes_of(value, scale, limit, pages.dtype.element_ty)
    _store_head(value, place, pages, at * HEAD_DIM, written, HEAD_DIM, ROTARY_DIM, INTERLEAVED)


@triton.jit
def _normed_head(
    value, place, weight, eps, KIND: tl.constexpr, HEAD_DIM: tl.constexpr, ROTARY_DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """A whole head of several tokens, normalised, in float32."""
    n = place + tl.arange(0, value.shape[1])
    inside = n < HEAD_DIM
    mean = tl.zeros([ROWS, 1], tl.float32)
    centred = value
    if KIND == "layer":
        mean = tl.sum(value, axis=1)[:, None] / HEAD_DIM
        centred = tl.where(inside[None, :], value - mean, 0.0)
    scale = tl.rsqrt(tl.sum(centred * centred, axis=1)[:, None] / HEAD_DIM + eps)
    column = _column(n, ROTARY_DIM, INTERLEAVED)
    return normed_tile(value, mean, scale, weight, weight, column, inside, KIND, False, dtype).to(tl.float32)


@triton.jit
def _finish(
    value, place, head, rows, num_rows, q_weight, k_weight, q_eps, k_eps, cos, sin, slot_mapping,
    q_out, k_pages, v_pages, k_scales, v_scales, limit, num_heads, num_kv_heads,
    HEAD_NORM: tl.constexpr, HEAD_DIM: tl.constexpr, V_HEAD_DIM: tl.constexpr, ROTARY_DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr, QUANTISED: tl.constexpr,
):  # fmt: skip
    """What follows the product for a head (of q, then k, then v) or, where it need not be seen whole, a piece of one:
    value [ROWS, WIDTH] float32 that fit q_out's dtype, of the head's places place, place + 1, ..."""
    dtype: tl.constexpr = q_out.dtype.element_ty
    row_inside = rows < num_rows
    if head < num_heads + num_kv_heads:
        if HEAD_NORM != "none":
            weight = q_weight
            eps = q_eps
            if head >= num_heads:
                weight = k_weight
                eps = k_eps
            value = _normed_head(value, place, weight, eps, HEAD_NORM, HEAD_DIM, ROTARY_DIM, INTERLEAVED, dtype)
        if ROTARY_DIM > 0:
            value = _rotated(value, place, rows, row_inside, cos, sin, ROTARY_DIM).to(dtype).to(tl.float32)
    if head < num_heads:
        at = (rows * num_heads + head) * HEAD_DIM
        _store_head(value, place, q_out, at, row_inside, HEAD_DIM, ROTARY_DIM, INTERLEAVED)
    else:
        slots = tl.load(slot_mapping + rows, mask=row_inside, other=-1).to(tl.int64)
        head -= num_heads
        if head < num_kv_heads:
            _write_head(
                value, place, slots, head, k_pages, k_scales, limit, num_kv_heads,
                HEAD_DIM, ROTARY_DIM, INTERLEAVED, QUANTISED,
            )  # fmt: skip
        else:
            _write_head(
                value, place, slots, head - num_kv_heads, v_pages, v_scales, limit, num_kv_heads,
                V_HEAD_DIM, 0, False, QUANTISED,
            )  # fmt: skip


@triton.jit(do_not_specialize=["num_rows"])
def _norm_qkv_kernel(
    x,
    norm_weight,
    norm_bias,
    weight,
    bias,
    q_weight,
    k_weight,
    cos,
    sin,
    slot_mapping,
    q_out,
    k_pages,
    v_pages,
    k_scales,
    v_scales,
    workspace,
    tickets,
    num_rows,
    num_heads,
    num_kv_heads,
    width,
    depth,
    x_stride,
    eps,
    q_eps,
    k_eps,
    limit,
    NORM: tl.constexpr,
    HAS_NORM_BIAS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HEAD_NORM: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    V_HEAD_DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    QUANTISED: tl.constexpr,
    MEET: tl.constexpr,
    EVEN: tl.constexpr,
    STRIP: tl.constexpr,
    CHUNK: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    first = tl.program_id(0) * ROWS
    part = tl.program_id(1)
    qk_heads = num_heads + num_kv_heads
    qk_parts = qk_heads * tl.cdiv(HEAD_DIM, BLOCK_N)
    is_v = part >= qk_parts
    part = tl.where(is_v, part - qk_parts, part)
    head_dim = tl.where(is_v, V_HEAD_DIM, HEAD_DIM)
    pieces = tl.cdiv(head_dim, BLOCK_N)
    head = part // pieces
    head_start = tl.where(is_v, qk_heads * HEAD_DIM, 0) + head * head_dim
    head = tl.where(is_v, qk_heads + head, head)

    place = part % pieces * BLOCK_N
    n = place + tl.arange(0, BLOCK_N)
    inside = n < head_dim
    weight_rows = head_start + tl.where(is_v, n, _column(n, ROTARY_DIM, INTERLEAVED))
    y = product(
        x, x_stride, first, num_rows, norm_weight, norm_bias, eps, weight, weight_rows, inside, depth,
        NORM, HAS_NORM_BIAS, EVEN, STRIP, CHUNK, BLOCK_K,
    )  # fmt: skip
    if HAS_BIAS:
        y += tl.load(bias + weight_rows, mask=inside, other=0.0).to(tl.float32)[None, :]
    y = y.to(q_out.dtype.element_ty)

    rows = (first + tl.arange(0, ROWS)).to(tl.int64)
    if MEET:
        there = (rows < num_rows)[:, None]
        at = workspace + rows[:, None] * width + head_start
        tl.store(at + n[None, :], y, mask=there & inside[None, :])
        heads = qk_heads + num_kv_heads
        if is_last(tickets + tl.program_id(0) * heads + head, pieces):
            whole = tl.arange(0, HEAD_BLOCK)
            value = tl.load(at + whole[None, :], mask=there & (whole < head_dim)[None, :], other=0.0).to(tl.float32)
            _finish(
                value, 0, head, rows, num_rows, q_weight, k_weight, q_eps, k_eps, cos, sin, slot_mapping,
                q_out, k_pages, v_pages, k_scales, v_scales, limit, num_heads, num_kv_heads,
                HEAD_NORM, HEAD_DIM, V_HEAD_DIM, ROTARY_DIM, INTERLEAVED, QUANTISED,
            )  # fmt: skip
    else:
        _finish(
            y.to(tl.float32), place, head, rows, num_rows, q_weight, k_weight, q_eps, k_eps, cos, sin, slot_mapping,
            q_out, k_pages, v_pages, k_scales, v_scales, limit, num_heads, num_kv_heads,
            HEAD_NORM, HEAD_DIM, V_HEAD_DIM, ROTARY_DIM, INTERLEAVED, QUANTISED,
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
    device = check_linear(hidden, weight, bias, "hidden")
    num_rows, depth = hidden.shape
    check_norm("norm", norm, depth, device)
    quantised = check_pages(k_pages, v_pages, k_scales, v_scales, device)
    num_heads, head_norm = _check_heads(hidden, weight, q_norm, k_norm, k_pages, v_pages)
    num_kv_heads, head_dim, v_head_dim = *k_pages.shape[2:], v_pages.shape[3]
    rotary_dim = _check_rotary(rotary, num_rows, head_dim, device)
    check("slot_mapping", slot_mapping, (num_rows,), INTS, device)
    q = torch.empty((num_rows, num_heads, head_dim), dtype=hidden.dtype, device=device)
    if num_rows == 0:
        return q
    whole = quantised or head_norm != "none"
    widest = triton.next_power_of_2(head_dim)
    chosen = blocks_for("norm_qkv", hidden, len(weight), blocks, meet=whole, widest=widest)
    pieces, v_pieces = (triton.cdiv(size, chosen["BLOCK_N"]) for size in (head_dim, v_head_dim))
    meet = whole and max(pieces, v_pieces if quantised else 1) > 1
    workspace = q
    if meet:
        workspace = torch.empty((num_rows, len(weight)), dtype=hidden.dtype, device=device)
        needed = tickets_needed(num_rows, num_heads, num_kv_heads)
        if tickets is None:
            tickets = torch.zeros(needed, dtype=torch.int32, device=device)
        check("tickets", tickets, (None,), torch.int32, device)
        require(len(tickets) >= needed, f"tickets has {len(tickets)} elements; {needed} are needed")
    grid = (triton.cdiv(num_rows, ROWS.value), (num_heads + num_kv_heads) * pieces + num_kv_heads * v_pieces)
    _norm_qkv_kernel[grid](
        hidden, norm.weight, norm.weight if norm.bias is None else norm.bias, weight,
        weight if bias is None else bias, weight if q_norm is None else q_norm.weight,
        weight if k_norm is None else k_norm.weight, hidden if rotary is None else rotary.cos,
        hidden if rotary is None else rotary.sin, slot_mapping, q, k_pages, v_pages,
        q if k_scales is None else k_scales, q if v_scales is None else v_scales, workspace,
        q if tickets is None else tickets, num_rows, num_heads, num_kv_heads, len(weight), depth, hidden.stride(0),
        norm.eps, 0.0 if q_norm is None else q_norm.eps, 0.0 if k_norm is None else k_norm.eps,
        largest_code(k_pages.dtype) if quantised else 0.0, NORM=norm.kind, HAS_NORM_BIAS=norm.bias is not None,
        HAS_BIAS=bias is not None, HEAD_NORM=head_norm, HEAD_DIM=head_dim, V_HEAD_DIM=v_head_dim,
        ROTARY_DIM=rotary_dim, INTERLEAVED=rotary is not None and rotary.interleaved, QUANTISED=quantised,
        MEET=meet, EVEN=depth % chosen["BLOCK_K"] == 0, **strips_for(depth, chosen["num_warps"]),
        HEAD_BLOCK=triton.next_power_of_2(max(head_dim, v_head_dim)), **chosen,
    )  # fmt: skip
    return q


def tickets_needed(num_rows: int, num_heads: int, num_kv_heads: int) -> int:
    """The length of `tickets` for up to num_rows tokens: one for each head of each ROWS of them."""
    tiles: int = triton.cdiv(num_rows, ROWS.value)
    return tiles * (num_heads + 2 * num_kv_heads)


def _check_heads(
    hidden: Tensor, weight: Tensor, q_norm: Norm | None, k_norm: Norm | None, k_pages: Tensor, v_pages: Tensor
) -> tuple[int, str]:
    """(heads of q, the kind of their norm or "none"), if weight, norms and pages are of one mind."""
    num_kv_heads, head_dim = k_pages.shape[2:]
    q_rows = len(weight) - num_kv_heads * (head_dim + v_pages.shape[3])
    require(
        q_rows > 0 and q_rows % head_dim == 0,
        f"weight has {len(weight)} rows, of which {q_rows} are left for q after {num_kv_heads} heads of k and v; "
        f"expected a multiple of {head_dim}",
    )
    if q_norm is None or k_norm is None:
        require(q_norm is k_norm, "q_norm and k_norm must both be given, or none of them")
        return q_rows // head_dim, "none"
    for name, norm in (("q_norm", q_norm), ("k_norm", k_norm)):
        check_norm(name, norm, head_dim, hidden.device)
        require(norm.bias is None, f"{name}.bias is given; norms of heads have none here")
    require(q_norm.kind == k_norm.kind, f"q_norm is of kind {q_norm.kind} and k_norm of kind {k_norm.kind}")
    require(q_norm.weight.dtype == k_norm.weight.dtype, "q_norm.weight and k_norm.weight are of two dtypes")
    return q_rows // head_dim, q_norm.kind


def _check_rotary(rotary: Rotary | None, num_rows: int, head_dim: int, device: torch.device) -> int:
    """rotary_dim, from tables that fit."""
    if rotary is None:
        return 0
    check("rotary.cos", rotary.cos, (num_rows, None), torch.float32, device)
    check("rotary.sin", rotary.sin, tuple(rotary.cos.shape), torch.float32, device)
    rotary_dim = 2 * rotary.cos.shape[1]
    require(rotary_dim <= head_dim, f"rotary.cos is for {rotary_dim} dimensions and heads have {head_dim}")
    return rotary_dim


def tuning_problems(device: torch.device) -> Iterator[Problem]:
    """What `python -m handloom_kernels.tune norm_qkv` tries."""
    for num_heads, num_kv_heads, head_dim, depth in ((32, 8, 64, 2048), (32, 8, 128, 4096), (16, 8, 128, 1024)):
        width = (num_heads + 2 * num_kv_heads) * head_dim
        weight, hidden = (torch.randn(n, depth, dtype=torch.bfloat16, device=device) for n in (width, 16))
        pages = torch.zeros(1, 16, num_kv_heads, head_dim, dtype=torch.bfloat16, device=device)
        norm = Norm("rms", weight[0], None, 1e-6)
        head_norm = Norm("rms", weight[0, :head_dim], None, 1e-6) if depth == 1024 else None
        rotary = Rotary(*torch.randn(2, 16, head_dim // 2, device=device))
        slots = torch.arange(16, device=device)
        yield Problem(
            when={"width": width, "depth": depth, "dtype": "bfloat16"},
            candidates=CANDIDATES,
            run=partial(
                norm_qkv, hidden, norm, weight, None, head_norm, head_norm, rotary, pages, pages.clone(), slots
            ),
        )
