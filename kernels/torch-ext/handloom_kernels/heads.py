"""What follows the QKV projection: a head of q, k or v normed, rotated, and written out or into its page.

A tile [ROWS, WIDTH] is of some tokens and of a head's places place, place + 1, ...: its dimensions in an order in which
the two of a rotated pair are neighbours, and so in one thread's registers (see norm_qkv.py).

This module does not know where the tile comes from. Meaning: `reference.qk_norm_rope_write`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import check, require
from .kv_pages import codes_of, largest_bits
from .reference.norm import Norm
from .reference.rope import Rotary
from .tiles import ROWS, check_norm, normed_tile, of_columns


@triton.jit
def column_at(n, ROTARY_DIM: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The dimension of a head at place n, where the two of a rotated pair are at 2i and 2i + 1."""
    if ROTARY_DIM == 0 or INTERLEAVED:
        return n
    return tl.where(n < ROTARY_DIM, n // 2 + n % 2 * (ROTARY_DIM // 2), n)


@triton.jit
def place_of(column, ROTARY_DIM: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The inverse of `column_at`."""
    if ROTARY_DIM == 0 or INTERLEAVED:
        return column
    HALF: tl.constexpr = ROTARY_DIM // 2
    return tl.where(column < ROTARY_DIM, column % HALF * 2 + column // HALF, column)


@triton.jit
def _rotated(value, place, rows, row_inside, cos, sin, ROTARY_DIM: tl.constexpr):
    """Rotate a tile [ROWS, WIDTH] of a head's places place, place + 1, ..., whose neighbours are pairs."""
    PAIRS: tl.constexpr = value.shape[1] // 2
    HALF: tl.constexpr = ROTARY_DIM // 2
    pair = place // 2 + tl.arange(0, PAIRS)
    at = rows[:, None] * HALF + pair[None, :]
    turned = row_inside[:, None] & (pair < HALF)[None, :]
    c = tl.load(cos + at, mask=turned, other=0.0)
    s = tl.load(sin + at, mask=turned, other=0.0)
    first, second = tl.split(tl.reshape(value, [ROWS, PAIRS, 2]))
    turned = (pair < HALF)[None, :]
    first, second = tl.where(turned, first * c - second * s, first), tl.where(turned, second * c + first * s, second)
    return tl.reshape(tl.join(first, second), [ROWS, 2 * PAIRS])


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
    column = column_at(n, ROTARY_DIM, INTERLEAVED)
    w = of_columns(weight, column, inside)[None, :]
    return normed_tile(value, mean, scale, w, w, KIND, False, dtype).to(tl.float32)


@triton.jit
def finish_head(
    value, place, head, rows, num_rows, q_weight, k_weight, q_eps, k_eps, cos, sin, slot_mapping,
    q_out, k_pages, v_pages, k_scales, v_scales, limit, num_heads, num_kv_heads,
    HEAD_NORM: tl.constexpr, HEAD_DIM: tl.constexpr, V_HEAD_DIM: tl.constexpr, ROTARY_DIM: tl.constexpr,
    V_PAIRED_DIM: tl.constexpr, INTERLEAVED: tl.constexpr, QUANTISED: tl.constexpr,
):  # fmt: skip
    """What follows the product for a head (of q, then k, then v) or, where it need not be seen whole, a piece of one.

    value: [ROWS, WIDTH] float32 that fit q_out's dtype. V_PAIRED_DIM: a v head's places are in the order of a head with
    so many dimensions rotated, although none is.
    """
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
                V_HEAD_DIM, V_PAIRED_DIM, False, QUANTISED,
            )  # fmt: skip


def check_heads(
    width: int, hidden: Tensor, q_norm: Norm | None, k_norm: Norm | None, k_pages: Tensor, v_pages: Tensor
) -> tuple[int, str]:
    """(heads of q, the kind of their norm or "none"), if weight, norms and pages are of one mind."""
    (num_kv_heads, head_dim), v_head_dim = k_pages.shape[2:], v_pages.shape[3]
    require(
        min(num_kv_heads, head_dim, v_head_dim) > 0,
        f"k_pages has shape {list(k_pages.shape)} and v_pages {list(v_pages.shape)}: there is nothing to write",
    )
    q_rows = width - num_kv_heads * (head_dim + v_head_dim)
    require(
        q_rows > 0 and q_rows % head_dim == 0,
        f"weight has {width} rows, of which {q_rows} are left for q after {num_kv_heads} heads of k and v; "
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


def check_rotary(rotary: Rotary | None, num_rows: int, head_dim: int, device: torch.device) -> int:
    """rotary_dim, from tables that fit."""
    if rotary is None:
        return 0
    check("rotary.cos", rotary.cos, (num_rows, None), torch.float32, device)
    check("rotary.sin", rotary.sin, tuple(rotary.cos.shape), torch.float32, device)
    rotary_dim = 2 * rotary.cos.shape[1]
    require(rotary_dim <= head_dim, f"rotary.cos is for {rotary_dim} dimensions and heads have {head_dim}")
    return rotary_dim
