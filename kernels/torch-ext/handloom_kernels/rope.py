"""Rotary positions, alone or with the norm of q and k and the write of K and V into their pages.

    y_i = x_i cos - x_j sin     y_j = x_j cos + x_i sin        for the pairs of dimensions (i, j) (Su et al. 2021)
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

A head is two tiles [heads, pairs], the first and the second of each pair, so that both are in one thread; dimensions
that are not rotated are paired too, half with half. A head's sum lies within one program, whose size depends on the
model alone. Quantised pages (int8, float8) get one scale per token and KV head, written with the codes.

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
from .kv_pages import check_pages, codes_of, largest_bits
from .reference.norm import NORM_KINDS, Norm
from .reference.pages import largest_code
from .reference.rope import Rotary
from .tuning import Problem, config

MAX_HEAD_DIM = 512
TILE = 1024  # elements of a program


@triton.jit
def _places(HEAD_DIM: tl.constexpr, ROTARY_DIM: tl.constexpr, PAIRS: tl.constexpr):
    """Where in a head the first and the second of each pair are, unless interleaved: [1, PAIRS] each."""
    pair = tl.arange(0, PAIRS)[None, :]
    turned = pair < ROTARY_DIM // 2
    first = tl.where(turned, pair, pair + ROTARY_DIM // 2)
    second = tl.where(turned, pair + ROTARY_DIM // 2, pair + HEAD_DIM // 2)
    return first, second


@triton.jit
def _load_pairs(
    x, at, inside, HEAD_DIM: tl.constexpr, ROTARY_DIM: tl.constexpr, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr
):
    """The first and the second of each pair of the heads that begin at `at` [HEADS, 1]: [HEADS, PAIRS] float32 each."""
    if INTERLEAVED:
        column = tl.arange(0, 2 * PAIRS)[None, :]
        both = tl.load(x + (at + column), mask=inside & (column < HEAD_DIM), other=0.0).to(tl.float32)
        first, second = tl.split(tl.reshape(both, (both.shape[0], PAIRS, 2)))
    else:
        first_at, second_at = _places(HEAD_DIM, ROTARY_DIM, PAIRS)
        mask = inside & (tl.arange(0, PAIRS)[None, :] < HEAD_DIM // 2)
        first = tl.load(x + (at + first_at), mask=mask, other=0.0).to(tl.float32)
        second = tl.load(x + (at + second_at), mask=mask, other=0.0).to(tl.float32)
    return first, second


@triton.jit
def _store_pairs(
    first, second, out, at, inside,
    HEAD_DIM: tl.constexpr, ROTARY_DIM: tl.constexpr, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = out.dtype.element_ty
    if INTERLEAVED:
        column = tl.arange(0, 2 * PAIRS)[None, :]
        both = tl.reshape(tl.join(first, second), (first.shape[0], 2 * PAIRS))
        tl.store(out + (at + column), both.to(dtype), mask=inside & (column < HEAD_DIM))
    else:
        first_at, second_at = _places(HEAD_DIM, ROTARY_DIM, PAIRS)
        mask = inside & (tl.arange(0, PAIRS)[None, :] < HEAD_DIM // 2)
        tl.store(out + (at + first_at), first.to(dtype), mask=mask)
        tl.store(out + (at + second_at), second.to(dtype), mask=mask)


@triton.jit
def _weighted(x, w, KIND: tl.constexpr, dtype: tl.constexpr):
    """x times the weight of its norm, with the roundings of `reference.normalize`."""
    if KIND == "rms":
        x = x.to(dtype).to(tl.float32) * w
    elif KIND == "rms_unit_offset":
        x = x * (1.0 + w)
    else:
        x = x * w
    return x.to(dtype).to(tl.float32)


@triton.jit
def _heads(
    x, head_stride, begin, weight, cos, sin, eps, out, scales, row, limit, num_heads,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, ROTARY_DIM: tl.constexpr, PAIRS: tl.constexpr,
    INTERLEAVED: tl.constexpr, KIND: tl.constexpr, QUANTISED: tl.constexpr,
):  # fmt: skip
    """Heads begin .. begin + HEADS of one token, x, normalised unless KIND is "none" and rotated, into row `row` of
    out [rows, num_heads, HEAD_DIM], and their scales."""
    dtype: tl.constexpr = x.dtype.element_ty
    heads = begin + tl.arange(0, HEADS)
    inside = (heads < num_heads)[:, None]
    nowhere = heads[:, None] * 0
    pair = tl.arange(0, PAIRS)[None, :]
    turned = pair < ROTARY_DIM // 2

    # every load before the first sum, so that they wait together; tables as tiles, in the layout of x
    at = heads[:, None] * head_stride
    first, second = _load_pairs(x, at, inside, HEAD_DIM, ROTARY_DIM, PAIRS, INTERLEAVED)
    if KIND != "none":
        w1, w2 = _load_pairs(weight, nowhere, nowhere == 0, HEAD_DIM, ROTARY_DIM, PAIRS, INTERLEAVED)
    if ROTARY_DIM > 0:
        c = tl.load(cos + (nowhere + pair), mask=turned, other=0.0)
        s = tl.load(sin + (nowhere + pair), mask=turned, other=0.0)

    if KIND != "none":
        if KIND == "layer":
            mean = tl.sum(first + second, axis=1)[:, None] / HEAD_DIM
            first = tl.where(pair < HEAD_DIM // 2, first - mean, 0.0)
            second = tl.where(pair < HEAD_DIM // 2, second - mean, 0.0)
        scale = tl.rsqrt(tl.sum(first * first + second * second, axis=1)[:, None] / HEAD_DIM + eps)
        first, second = _weighted(first * scale, w1, KIND, dtype), _weighted(second * scale, w2, KIND, dtype)

    if ROTARY_DIM > 0:
        rotated = (first * c - second * s).to(dtype).to(tl.float32)
        second = tl.where(turned, (second * c + first * s).to(dtype).to(tl.float32), second)
        first = tl.where(turned, rotated, first)

    if QUANTISED:
        largest = tl.maximum(largest_bits(first), largest_bits(second))
        kv_scale = tl.div_rn(largest.to(tl.float32, bitcast=True), limit)
        tl.store(scales + row * num_heads + heads, kv_scale, mask=heads < num_heads)
        codes: tl.constexpr = out.dtype.element_ty
        first, second = codes_of(first, kv_scale, limit, codes), codes_of(second, kv_scale, limit, codes)
    out += row * num_heads * HEAD_DIM
    _store_pairs(first, second, out, heads[:, None] * HEAD_DIM, inside, HEAD_DIM, ROTARY_DIM, PAIRS, INTERLEAVED)


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
    PAIRS: tl.constexpr,
    V_PAIRS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    Q_KIND: tl.constexpr,
    K_KIND: tl.constexpr,
    QUANTISED: tl.constexpr,
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
    if part < Q_PARTS:
        _heads(
            qkv, HEAD_DIM, part * Q_HEADS, q_weight, cos, sin, q_eps, q_out, k_scales, token, limit, NUM_HEADS,
            Q_HEADS, HEAD_DIM, ROTARY_DIM, PAIRS, INTERLEAVED, Q_KIND, False,
        )  # fmt: skip
    else:
        slot = tl.load(slot_mapping + token).to(tl.int64)
        if slot >= 0:
            k = qkv + NUM_HEADS * HEAD_DIM
            begin = (part - Q_PARTS) % KV_PARTS * KV_HEADS
            if part < Q_PARTS + KV_PARTS:
                _heads(
                    k, HEAD_DIM, begin, k_weight, cos, sin, k_eps, k_pages, k_scales, slot, limit, NUM_KV_HEADS,
                    KV_HEADS, HEAD_DIM, ROTARY_DIM, PAIRS, INTERLEAVED, K_KIND, QUANTISED,
                )  # fmt: skip
            else:
                v = k + NUM_KV_HEADS * HEAD_DIM
                _heads(
                    v, V_HEAD_DIM, begin, k_weight, cos, sin, k_eps, v_pages, v_scales, slot, limit, NUM_KV_HEADS,
                    KV_HEADS, V_HEAD_DIM, 0, V_PAIRS, False, "none", QUANTISED,
                )  # fmt: skip


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
    PAIRS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HEADS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    begin = tl.program_id(1).to(tl.int64) * HEADS
    angles = token * (ROTARY_DIM // 2)
    _heads(
        x + token * token_stride, head_stride, begin, x, cos + angles, sin + angles, 0.0,
        out, cos, token, 0.0, num_heads,
        HEADS, HEAD_DIM, ROTARY_DIM, PAIRS, INTERLEAVED, "none", False,
    )  # fmt: skip


def rotate(x: Tensor, rotary: Rotary, *, blocks: Mapping[str, int] | None = None) -> Tensor:
    """`reference.rotate`: x [N, heads, head_dim] float32, float16 or bfloat16, tokens and heads of any stride, to a new
    contiguous tensor.

    rotary.cos, rotary.sin: [N, rotary_dim / 2] float32, contiguous, rotary_dim at most head_dim, which is even and at
    most 512. blocks: overrides the block sizes of the tuning table. Raises KernelError.
    """
    device = check_device("x", x)
    check("x", x, (None, None, None), FLOATS, device, strided=True)
    num_tokens, num_heads, head_dim = x.shape
    _check_head_dim(head_dim)
    shape = _rotation(rotary, num_tokens, head_dim, device)
    out = torch.empty(x.shape, dtype=x.dtype, device=device)
    if out.numel() == 0:
        return out
    chosen = blocks_for(x, num_heads, num_heads, head_dim, head_dim, blocks)
    heads = chosen.pop("Q_HEADS")
    del chosen["KV_HEADS"]
    _rotate_kernel[(num_tokens, triton.cdiv(num_heads, heads))](
        x, rotary.cos, rotary.sin, out, *x.stride()[:2], num_heads, HEAD_DIM=head_dim, HEADS=heads, **shape, **chosen
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
    v_pages [..., Dv], of one dtype: float32, float16, bfloat16, or with scales int8, float8_e4m3fn (NVIDIA's from sm_89
    on) or float8_e4m3fnuz (AMD's gfx942); D and Dv even, at most 512; slot_mapping [N] int64 or int32, -1 for a token
    that is not to be written, otherwise distinct slots of the pages (not checked: that would make the host wait);
    k_scales, v_scales [num_pages, page_size, num_kv_heads] float32, where pages are quantised. blocks as in `rotate`.
    Raises KernelError.
    """
    device = check_device("qkv", qkv)
    quantised = check_pages(k_pages, v_pages, k_scales, v_scales, device)
    num_kv_heads, head_dim, v_head_dim = *k_pages.shape[2:], v_pages.shape[-1]
    _check_head_dim(head_dim)
    _check_head_dim(v_head_dim)
    require(num_heads > 0 and num_kv_heads > 0, f"{num_heads} query heads and {num_kv_heads} KV heads are too few")
    columns = num_heads * head_dim + num_kv_heads * (head_dim + v_head_dim)
    check("qkv", qkv, (None, columns), FLOATS, device, strided=True)
    num_tokens = len(qkv)
    check("slot_mapping", slot_mapping, (num_tokens,), INTS, device)
    rotation = _rotation(rotary, num_tokens, head_dim, device)
    q_kind, k_kind = (_norm_kind(name, norm, head_dim, device) for name, norm in (("q", q_norm), ("k", k_norm)))
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
        V_PAIRS=triton.next_power_of_2(v_head_dim // 2),
        Q_KIND=q_kind,
        K_KIND=k_kind,
        QUANTISED=quantised,
        **rotation,
        **chosen,
    )
    return q


def _check_head_dim(head_dim: int) -> None:
    allowed = 0 < head_dim <= MAX_HEAD_DIM and head_dim % 2 == 0
    require(allowed, f"heads have {head_dim} dimensions; expected an even number up to {MAX_HEAD_DIM}")


def _rotation(rotary: Rotary | None, num_tokens: int, head_dim: int, device: torch.device) -> dict[str, int]:
    """How a head is cut: ROTARY_DIM, PAIRS of a tile, INTERLEAVED."""
    rotary_dim = 0
    if rotary is not None:
        check("rotary.cos", rotary.cos, (num_tokens, None), torch.float32, device)
        check("rotary.sin", rotary.sin, tuple(rotary.cos.shape), torch.float32, device)
        rotary_dim = 2 * rotary.cos.shape[1]
        require(rotary_dim <= head_dim, f"rotary.cos is for {rotary_dim} dimensions and heads have {head_dim}")
    interleaved = rotary_dim > 0 and rotary is not None and rotary.interleaved
    pairs = triton.next_power_of_2(head_dim // 2)
    return {"ROTARY_DIM": rotary_dim, "PAIRS": pairs, "INTERLEAVED": interleaved}


def _norm_kind(name: str, norm: Norm | None, head_dim: int, device: torch.device) -> str:
    if norm is None:
        return "none"
    require(norm.kind in NORM_KINDS, f"{name}_norm.kind is {norm.kind!r}; there are {', '.join(NORM_KINDS)}")
    require(norm.bias is None, f"{name}_norm.bias is given; norms of heads have none here")
    check(f"{name}_norm.weight", norm.weight, (head_dim,), FLOATS, device)
    return norm.kind


def blocks_for(
    x: Tensor, num_heads: int, num_kv_heads: int, head_dim: int, v_head_dim: int, override: Mapping[str, int] | None
) -> dict[str, int]:
    """Q_HEADS and KV_HEADS (heads of a program) and num_warps for this model and dtype."""
    block = triton.next_power_of_2(max(head_dim, v_head_dim))
    most = max(1, TILE // block)
    default = {
        "Q_HEADS": min(most, triton.next_power_of_2(num_heads)),
        "KV_HEADS": min(most, triton.next_power_of_2(num_kv_heads)),
    }
    threads = 64 if tuning.is_hip() else 32
    default["num_warps"] = max(1, default["Q_HEADS"] * block // (16 * threads))
    dtype = str(x.dtype).removeprefix("torch.")
    shape = {"num_heads": num_heads, "num_kv_heads": num_kv_heads, "head_dim": head_dim}
    return config("rope", x.device, default, override, dtype=dtype, **shape)


def tuning_problems(device: torch.device) -> Iterator[Problem]:
    """What `python -m handloom_kernels.tune rope` tries."""
    draw = partial(torch.randn, dtype=torch.bfloat16, device=device)
    for num_heads, num_kv_heads, head_dim in ((16, 8, 128), (32, 8, 128), (32, 8, 64), (4, 1, 256)):
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
                {"Q_HEADS": q, "KV_HEADS": min(q, num_kv_heads), "num_warps": w} for q in sizes for w in (1, 2, 4)
            ],
            run=partial(qk_norm_rope_write, qkv, num_heads, norm, norm, rotary, k_pages, v_pages, slots),
        )
