"""Rotary positions, alone or with the norm of q and k and the write of K and V into their pages.

    y_i = x_i cos - x_j sin     y_j = x_j cos + x_i sin        for each pair (i, j) of dimensions: (Su et al. 2021)
    halves       (0, r/2) (1, r/2 + 1) ...                     of the first r = rotary_dim, as Llama
    interleaved  (0, 1) (2, 3) ...                             as GPT-J and Cohere

cos and sin are tables of this step's positions, so that every way to scale them (linear, dynamic, llama3, yarn,
longrope, M-RoPE's sections) is the same rotation here.

One program owns a few heads of one token, all of them of q, of k or of v:

    qkv, one token   [ q0 q1 q2 q3 | q4 q5 q6 q7 | k0 k1 | v0 v1 ]     heads of head_dim columns
                       program 0     program 1     2       3
                          |             |          |       |
                        norm, rotate  ...         norm, rotate
                          v             v          v       v (copied)
                       q [N, num_heads, D]      k_pages, v_pages [slot of the token]

A head's sum over its dimensions lies within one tile, whose size depends on the model alone. With halves a second load
of the head, shifted by half, brings each element its partner; it comes from the first-level cache. Interleaved
partners change places in registers. Quantised pages (int8, float8) get one scale per token and KV head, the largest
absolute value / the largest code, written with the codes.

To move: the row of qkv in, q and the K and V of the page's dtype out, rotary_dim cosines and sines a token. About 10
FLOPs an element. Bound by memory, and with few tokens by the launch.

This module does not know how the angles come about, which token a slot belongs to, or what attention is.
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
from .reference.norm import NORM_KINDS, Norm
from .reference.pages import QUANTISED, largest_code
from .reference.rope import Rotary
from .tuning import Problem, config

MAX_HEAD_DIM = 512
TILE = 1024  # elements of a program
NO_NORM = "none"


@triton.jit
def _weighted(x, weight, columns, inside, KIND: tl.constexpr, dtype: tl.constexpr):
    """The weight of a norm, with the roundings of `reference.normalize`."""
    w = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    if KIND == "rms":
        x = x.to(dtype).to(tl.float32) * w
    elif KIND == "rms_unit_offset":
        x = x * (1.0 + w)
    else:
        x = x * w
    return x.to(dtype).to(tl.float32)


@triton.jit
def turned_heads(
    x,
    heads,
    inside,
    weight,
    cos,
    sin,
    eps,
    HEAD_DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    KIND: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Heads of one token, normalised (unless KIND is "none") and rotated (unless ROTARY_DIM is 0): [HEADS, BLOCK]
    float32 that fit x's dtype.

    x: the token's row; heads [HEADS, 1]: where in it each head begins, in elements; inside [HEADS, BLOCK]; weight
    [HEAD_DIM]; cos, sin: the token's row of the tables.
    """
    dtype: tl.constexpr = x.dtype.element_ty
    HALF: tl.constexpr = ROTARY_DIM // 2
    SECOND_LOAD: tl.constexpr = ROTARY_DIM > 0 and not INTERLEAVED
    column = tl.arange(0, BLOCK)
    turned = column < ROTARY_DIM
    value = tl.load(x + heads + column[None, :], mask=inside, other=0.0).to(tl.float32)
    if SECOND_LOAD:
        other = tl.where(column < HALF, column + HALF, column - HALF)
        partner = tl.load(x + heads + other[None, :], mask=inside & turned[None, :], other=0.0).to(tl.float32)

    if KIND != "none":
        if KIND == "layer":
            mean = tl.sum(value, axis=1)[:, None] / HEAD_DIM
            value = tl.where(inside, value - mean, 0.0)
        scale = tl.rsqrt(tl.sum(value * value, axis=1)[:, None] / HEAD_DIM + eps)
        value = _weighted(value * scale, weight, column, column < HEAD_DIM, KIND, dtype)
        if SECOND_LOAD:
            if KIND == "layer":
                partner -= mean
            partner = _weighted(partner * scale, weight, other, turned, KIND, dtype)

    if ROTARY_DIM > 0:
        if INTERLEAVED:
            even, odd = tl.split(tl.reshape(value, (HEADS, BLOCK // 2, 2)))
            partner = tl.reshape(tl.join(odd, even), (HEADS, BLOCK))
            angle = column // 2
            first = column % 2 == 0
        else:
            angle = tl.where(column < HALF, column, column - HALF)
            first = column < HALF
        c = tl.load(cos + angle, mask=turned, other=1.0)
        s = tl.load(sin + angle, mask=turned, other=0.0)
        rotated = value * c[None, :] + partner * tl.where(first, -s, s)[None, :]
        value = tl.where(turned[None, :], rotated, value).to(dtype).to(tl.float32)
    return value


@triton.jit
def quantised_heads(value, limit):
    """(codes as float32, scales) of [heads, D] float32, one scale a head: `reference.quantize_kv` before the codes are
    rounded. limit: the largest code."""
    # as whole numbers, absolute values have the order they have as floats, and NaN is the largest
    bits = tl.max(tl.abs(value).to(tl.int32, bitcast=True), axis=1)
    scale = tl.div_rn(bits.to(tl.float32, bitcast=True), limit)
    codes = tl.div_rn(value, tl.where(scale > 0.0, scale, 1.0)[:, None])
    return tl.maximum(tl.minimum(codes, limit), -limit), scale


@triton.jit
def _write_heads(
    value,
    pages,
    scales,
    slot,
    heads,
    inside,
    limit,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    QUANTISED: tl.constexpr,
):
    if QUANTISED:
        value, scale = quantised_heads(value, limit)
        tl.store(scales + slot * NUM_HEADS + heads, scale, mask=heads < NUM_HEADS)
        if pages.dtype.element_ty == tl.int8:
            # 1.5 * 2^23 leaves no bit for a fraction: rounds to nearest, ties to even
            value = (value + 12582912.0) - 12582912.0
    at = heads[:, None] * HEAD_DIM + tl.arange(0, BLOCK)[None, :]
    tl.store(pages + slot * (NUM_HEADS * HEAD_DIM) + at, value.to(pages.dtype.element_ty), mask=inside)


@triton.jit
def _qk_norm_rope_write_kernel(
    qkv,
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
    qkv_stride,
    q_eps,
    k_eps,
    limit,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    V_HEAD_DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    Q_KIND: tl.constexpr,
    K_KIND: tl.constexpr,
    QUANTISED: tl.constexpr,
    BLOCK: tl.constexpr,
    V_BLOCK: tl.constexpr,
    Q_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    qkv += token * qkv_stride
    cos += token * (ROTARY_DIM // 2)
    sin += token * (ROTARY_DIM // 2)
    Q_PARTS: tl.constexpr = (NUM_HEADS + Q_HEADS - 1) // Q_HEADS
    KV_PARTS: tl.constexpr = (NUM_KV_HEADS + KV_HEADS - 1) // KV_HEADS
    column = tl.arange(0, BLOCK)[None, :]
    if part < Q_PARTS:
        heads = part * Q_HEADS + tl.arange(0, Q_HEADS)
        inside = (heads < NUM_HEADS)[:, None] & (column < HEAD_DIM)
        at = heads[:, None] * HEAD_DIM
        value = turned_heads(
            qkv, at, inside, q_weight, cos, sin, q_eps,
            HEAD_DIM, ROTARY_DIM, INTERLEAVED, Q_KIND, Q_HEADS, BLOCK,
        )  # fmt: skip
        tl.store(q_out + token * (NUM_HEADS * HEAD_DIM) + at + column, value.to(q_out.dtype.element_ty), mask=inside)
    else:
        slot = tl.load(slot_mapping + token).to(tl.int64)
        if slot >= 0:
            if part < Q_PARTS + KV_PARTS:
                heads = (part - Q_PARTS) * KV_HEADS + tl.arange(0, KV_HEADS)
                inside = (heads < NUM_KV_HEADS)[:, None] & (column < HEAD_DIM)
                value = turned_heads(
                    qkv + NUM_HEADS * HEAD_DIM, heads[:, None] * HEAD_DIM, inside, k_weight, cos, sin, k_eps,
                    HEAD_DIM, ROTARY_DIM, INTERLEAVED, K_KIND, KV_HEADS, BLOCK,
                )  # fmt: skip
                _write_heads(
                    value, k_pages, k_scales, slot, heads, inside, limit, NUM_KV_HEADS, HEAD_DIM, BLOCK, QUANTISED
                )
            else:
                heads = (part - Q_PARTS - KV_PARTS) * KV_HEADS + tl.arange(0, KV_HEADS)
                v_column = tl.arange(0, V_BLOCK)[None, :]
                inside = (heads < NUM_KV_HEADS)[:, None] & (v_column < V_HEAD_DIM)
                at = (NUM_HEADS + NUM_KV_HEADS) * HEAD_DIM + heads[:, None] * V_HEAD_DIM + v_column
                value = tl.load(qkv + at, mask=inside, other=0.0).to(tl.float32)
                _write_heads(
                    value, v_pages, v_scales, slot, heads, inside, limit, NUM_KV_HEADS, V_HEAD_DIM, V_BLOCK, QUANTISED
                )


@triton.jit
def _rotate_kernel(
    x,
    cos,
    sin,
    out,
    token_stride,
    head_stride,
    num_heads,
    HEAD_DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    cos += token * (ROTARY_DIM // 2)
    sin += token * (ROTARY_DIM // 2)
    heads = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None].to(tl.int64)
    column = tl.arange(0, BLOCK)[None, :]
    inside = (heads < num_heads) & (column < HEAD_DIM)
    value = turned_heads(
        x + token * token_stride, heads * head_stride, inside, x, cos, sin, 0.0,
        HEAD_DIM, ROTARY_DIM, INTERLEAVED, "none", HEADS, BLOCK,
    )  # fmt: skip
    at = (token * num_heads + heads) * HEAD_DIM + column
    tl.store(out + at, value.to(out.dtype.element_ty), mask=inside)


def rotate(x: Tensor, rotary: Rotary, *, blocks: Mapping[str, int] | None = None) -> Tensor:
    """`reference.rotate`: x [N, heads, head_dim] float32, float16 or bfloat16, tokens and heads of any stride, to a new
    contiguous tensor.

    rotary.cos, rotary.sin: [N, rotary_dim / 2] float32, contiguous, rotary_dim at most head_dim, which is even and at
    most 512. blocks: overrides the block sizes of the tuning table. Raises KernelError.
    """
    device = check_device("x", x)
    check("x", x, (None, None, None), FLOATS, device, strided=True)
    num_tokens, num_heads, head_dim = x.shape
    rotary_dim = _rotary_dim(rotary, num_tokens, head_dim, device)
    out = torch.empty(x.shape, dtype=x.dtype, device=device)
    if out.numel() == 0:
        return out
    chosen = blocks_for(x, num_heads, num_heads, head_dim, head_dim, blocks)
    heads = chosen.pop("Q_HEADS")
    del chosen["KV_HEADS"]
    _rotate_kernel[(num_tokens, triton.cdiv(num_heads, heads))](
        x,
        rotary.cos,
        rotary.sin,
        out,
        x.stride(0),
        x.stride(1),
        num_heads,
        HEAD_DIM=head_dim,
        ROTARY_DIM=rotary_dim,
        INTERLEAVED=rotary.interleaved,
        BLOCK=triton.next_power_of_2(head_dim),
        HEADS=heads,
        **chosen,
    )
    return out


def qk_norm_rope_write(
    qkv: Tensor,
    num_heads: int,
    q_norm: Norm | None,
    k_norm: Norm | None,
    rotary: Rotary | None,
    k_pages: Tensor,
    v_pages: Tensor,
    slot_mapping: Tensor,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
    *,
    blocks: Mapping[str, int] | None = None,
) -> Tensor:
    """`reference.qk_norm_rope_write`: writes K and V, returns q [N, num_heads, D], new and contiguous.

    Args: qkv [N, num_heads * D + num_kv_heads * (D + Dv)] float32, float16 or bfloat16, rows of any stride; q_norm,
    k_norm: any kind over D, without bias; rotary as in `rotate`; k_pages [num_pages, page_size, num_kv_heads, D],
    v_pages [..., Dv], of one dtype: float32, float16, bfloat16, or with scales int8, float8_e4m3fn or (AMD's gfx942)
    float8_e4m3fnuz; D and Dv even, at most 512; slot_mapping [N] int64 or int32, -1 for a token that is not to be
    written, distinct otherwise, on the pages (not checked: that would make the host wait); k_scales, v_scales
    [num_pages, page_size, num_kv_heads] float32, where pages are quantised. blocks as in `rotate`.
    Raises KernelError.
    """
    device = check_device("qkv", qkv)
    check("k_pages", k_pages, (None, None, None, None), (*FLOATS, *QUANTISED), device)
    num_pages, page_size, num_kv_heads, head_dim = k_pages.shape
    check("v_pages", v_pages, (num_pages, page_size, num_kv_heads, None), k_pages.dtype, device)
    v_head_dim = v_pages.shape[-1]
    _check_head_dim("k_pages", head_dim)
    _check_head_dim("v_pages", v_head_dim)
    require(num_heads > 0 and num_kv_heads > 0, f"{num_heads} query heads and {num_kv_heads} KV heads are too few")
    check(
        "qkv", qkv, (None, num_heads * head_dim + num_kv_heads * (head_dim + v_head_dim)), FLOATS, device, strided=True
    )
    num_tokens = len(qkv)
    check("slot_mapping", slot_mapping, (num_tokens,), INTS, device)
    rotary_dim = 0 if rotary is None else _rotary_dim(rotary, num_tokens, head_dim, device)
    kinds = [_norm_kind(name, norm, head_dim, device) for name, norm in (("q_norm", q_norm), ("k_norm", k_norm))]
    quantised = k_pages.dtype in QUANTISED
    for name, scales in (("k_scales", k_scales), ("v_scales", v_scales)):
        require(
            (scales is not None) == quantised,
            f"{name} {'is missing' if quantised else 'is given'}, and the pages have dtype {k_pages.dtype}",
        )
        if scales is not None:
            check(name, scales, (num_pages, page_size, num_kv_heads), torch.float32, device)
    q = torch.empty((num_tokens, num_heads, head_dim), dtype=qkv.dtype, device=device)
    if num_tokens == 0:
        return q
    chosen = blocks_for(qkv, num_heads, num_kv_heads, head_dim, v_head_dim, blocks)
    parts = triton.cdiv(num_heads, chosen["Q_HEADS"]) + 2 * triton.cdiv(num_kv_heads, chosen["KV_HEADS"])
    _qk_norm_rope_write_kernel[(num_tokens, parts)](
        qkv,
        qkv if q_norm is None else q_norm.weight,
        qkv if k_norm is None else k_norm.weight,
        qkv if rotary is None else rotary.cos,
        qkv if rotary is None else rotary.sin,
        slot_mapping,
        q,
        k_pages,
        v_pages,
        q if k_scales is None else k_scales,
        q if v_scales is None else v_scales,
        qkv.stride(0),
        0.0 if q_norm is None else q_norm.eps,
        0.0 if k_norm is None else k_norm.eps,
        largest_code(k_pages.dtype) if quantised else 0.0,
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        V_HEAD_DIM=v_head_dim,
        ROTARY_DIM=rotary_dim,
        INTERLEAVED=rotary is not None and rotary.interleaved,
        Q_KIND=kinds[0],
        K_KIND=kinds[1],
        QUANTISED=quantised,
        BLOCK=triton.next_power_of_2(head_dim),
        V_BLOCK=triton.next_power_of_2(v_head_dim),
        **chosen,
    )
    return q


def _check_head_dim(name: str, head_dim: int) -> None:
    require(
        0 < head_dim <= MAX_HEAD_DIM and head_dim % 2 == 0,
        f"{name} has heads of {head_dim} dimensions; expected an even number up to {MAX_HEAD_DIM}",
    )


def _rotary_dim(rotary: Rotary, num_tokens: int, head_dim: int, device: torch.device) -> int:
    """rotary_dim, from tables that fit."""
    _check_head_dim("x", head_dim)
    check("rotary.cos", rotary.cos, (num_tokens, None), torch.float32, device)
    check("rotary.sin", rotary.sin, tuple(rotary.cos.shape), torch.float32, device)
    rotary_dim = 2 * rotary.cos.shape[1]
    require(rotary_dim <= head_dim, f"rotary.cos is for {rotary_dim} dimensions and heads have {head_dim}")
    return rotary_dim


def _norm_kind(name: str, norm: Norm | None, head_dim: int, device: torch.device) -> str:
    if norm is None:
        return NO_NORM
    require(norm.kind in NORM_KINDS, f"{name}.kind is {norm.kind!r}; there are {', '.join(NORM_KINDS)}")
    require(norm.bias is None, f"{name}.bias is given; norms of heads have none here")
    check(f"{name}.weight", norm.weight, (head_dim,), FLOATS, device)
    return norm.kind


def blocks_for(
    x: Tensor,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    v_head_dim: int,
    override: Mapping[str, int] | None = None,
) -> dict[str, int]:
    """Q_HEADS and KV_HEADS (heads of a program) and num_warps for this model and dtype."""
    block = triton.next_power_of_2(max(head_dim, v_head_dim))
    most = max(1, TILE // block)
    default = {
        "Q_HEADS": min(most, triton.next_power_of_2(num_heads)),
        "KV_HEADS": min(most, triton.next_power_of_2(num_kv_heads)),
    }
    threads = 64 if tuning.is_hip() else 32
    default["num_warps"] = max(1, default["Q_HEADS"] * block // (8 * threads))
    dtype = str(x.dtype).removeprefix("torch.")
    shape = {"num_heads": num_heads, "num_kv_heads": num_kv_heads, "head_dim": head_dim}
    return config("rope", x.device, default, override, dtype=dtype, **shape)


def tuning_problems(device: torch.device) -> Iterator[Problem]:
    """What `python -m handloom_kernels.tune rope` tries."""
    draw = partial(torch.randn, dtype=torch.bfloat16, device=device)
    for num_heads, num_kv_heads, head_dim in ((16, 8, 128), (32, 8, 128), (32, 8, 64), (9, 3, 64)):
        qkv = draw(64, (num_heads + 2 * num_kv_heads) * head_dim)
        norm = Norm("rms", draw(head_dim), None, 1e-6)
        angles = torch.rand(64, head_dim // 2, device=device)
        k_pages, v_pages = draw(2, 8, 16, num_kv_heads, head_dim)
        slots = torch.arange(64, device=device)
        rotary = Rotary(angles.cos(), angles.sin())
        sizes = [heads for heads in (1, 2, 4, 8, 16) if heads * head_dim <= 2 * TILE]
        yield Problem(
            when={"num_heads": num_heads, "num_kv_heads": num_kv_heads, "head_dim": head_dim, "dtype": "bfloat16"},
            candidates=[
                {"Q_HEADS": q, "KV_HEADS": kv, "num_warps": w}
                for q in sizes
                for kv in sizes
                if kv <= q
                for w in (1, 2, 4)
            ],
            run=partial(qk_norm_rope_write, qkv, num_heads, norm, norm, rotary, k_pages, v_pages, slots),
        )
