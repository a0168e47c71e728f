"""RMSNorm, RMSNorm with unit offset, and LayerNorm, each with or without the addition of a residual before or after it.

    y = x / sqrt(mean(x^2) + eps) * w                      rms (Zhang & Sennrich 2019)
    y = x / sqrt(mean(x^2) + eps) * (1 + w)                rms_unit_offset (Gemma)
    y = (x - mean(x)) / sqrt(var(x) + eps) * w + b         layer (Ba et al. 2016)

One program owns one row, so that a row's sums never depend on how many rows there are:

           <------------- width ------------->
    row 0  [ tile 0 | tile 1 | ... | tail ####]   program 0: first pass sums, second pass scales
    row 1  [ tile 0 | tile 1 | ... | tail ####]   program 1

A row of up to BLOCK elements is one tile and is read once; a wider row is read twice, the second time from cache.
To move: width elements in, width out per row (twice that with a residual); 4 FLOPs an element. Bound by memory.

This module does not know what a hidden state means. Meaning and rounding: `reference.normalize`.
"""

from __future__ import annotations

from functools import partial
from typing import Iterator, Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import FLOATS, check, check_device, require
from .reference.norm import Norm
from .tiles import check_norm, normed_tile, of_columns
from .tuning import Problem, config

MAX_BLOCK = 16384


@triton.jit
def _load_row(x, residual, offsets, mask, out_dtype: tl.constexpr, ADD_BEFORE: tl.constexpr):
    value = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
    if ADD_BEFORE:
        value += tl.load(residual + offsets, mask=mask, other=0.0).to(tl.float32)
    return value.to(out_dtype).to(tl.float32)


@triton.jit
def _norm_kernel(
    x,
    residual,
    weight,
    bias,
    out,
    hidden,
    x_stride,
    residual_stride,
    width,
    eps,
    KIND: tl.constexpr,
    ADD_BEFORE: tl.constexpr,
    ADD_AFTER: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ONE_TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    x += row * x_stride
    residual += row * residual_stride
    out += row * width
    hidden += row * width
    dtype: tl.constexpr = out.dtype.element_ty

    columns = tl.arange(0, BLOCK)
    first = _load_row(x, residual, columns, columns < width, dtype, ADD_BEFORE)
    total = first
    squares = first * first
    if not ONE_TILE:
        for start in range(BLOCK, width, BLOCK):
            value = _load_row(x, residual, start + columns, start + columns < width, dtype, ADD_BEFORE)
            total += value
            squares += value * value
    mean = 0.0
    if KIND == "layer":
        mean = tl.sum(total, axis=0) / width
        centred = tl.where(columns < width, first - mean, 0.0)
        squares = centred * centred
        if not ONE_TILE:
            for start in range(BLOCK, width, BLOCK):
                inside = start + columns < width
                value = _load_row(x, residual, start + columns, inside, dtype, ADD_BEFORE)
                centred = tl.where(inside, value - mean, 0.0)
                squares += centred * centred
    scale = tl.rsqrt(tl.sum(squares, axis=0) / width + eps)

    for start in range(0, width, BLOCK):
        offsets = start + columns
        inside = offsets < width
        value = first
        if not ONE_TILE:
            value = _load_row(x, residual, offsets, inside, dtype, ADD_BEFORE)
        if ADD_BEFORE:
            tl.store(hidden + offsets, value.to(dtype), mask=inside)
        w, b = of_columns(weight, offsets, inside), of_columns(bias, offsets, inside)
        value = normed_tile(value, mean, scale, w, b, KIND, HAS_BIAS, dtype)
        if ADD_AFTER:
            kept = tl.load(residual + offsets, mask=inside, other=0.0).to(tl.float32)
            value = (kept + value.to(tl.float32)).to(dtype)
        tl.store(out + offsets, value, mask=inside)


def normalize(x: Tensor, norm: Norm, *, blocks: Mapping[str, int] | None = None) -> Tensor:
    """`reference.normalize`: x [..., H] float32, float16 or bfloat16, rows of any stride, to a new tensor like it.

    norm.weight and norm.bias [H] may have any of these dtypes. blocks: overrides the block sizes of the tuning table.
    Raises KernelError.
    """
    return _launch(x, None, norm, blocks)[0]


def normalize_add(x: Tensor, residual: Tensor, norm: Norm, *, blocks: Mapping[str, int] | None = None) -> Tensor:
    """`reference.normalize_add`: x, residual [..., H] of one dtype, to a new tensor like them. Raises KernelError."""
    return _launch(x, residual, norm, blocks, after=True)[0]


def add_normalize(
    x: Tensor, residual: Tensor, norm: Norm, *, blocks: Mapping[str, int] | None = None
) -> tuple[Tensor, Tensor]:
    """`reference.add_normalize`: x, residual [..., H] of one dtype; (normalised, sum) are new. Raises KernelError."""
    return _launch(x, residual, norm, blocks)


def _launch(
    x: Tensor, residual: Tensor | None, norm: Norm, blocks: Mapping[str, int] | None, after: bool = False
) -> tuple[Tensor, Tensor]:
    device = check_device("x", x)
    require(x.dim() > 0, "x must have at least one dimension")
    width = x.shape[-1]
    check("x", x, x.shape, FLOATS, device, strided=True)
    check_norm("norm", norm, width, device)
    rows = x.reshape(-1, width)
    added = rows
    if residual is not None:
        check("residual", residual, x.shape, x.dtype, device, strided=True)
        added = residual.reshape(-1, width)
    out = torch.empty(x.shape, dtype=x.dtype, device=device)
    hidden = out if residual is None or after else torch.empty(x.shape, dtype=x.dtype, device=device)
    if out.numel() == 0:
        return out, hidden
    chosen = blocks_for(x, norm, blocks)
    _norm_kernel[(len(rows),)](
        rows,
        added,
        norm.weight,
        norm.weight if norm.bias is None else norm.bias,
        out,
        hidden,
        rows.stride(0),
        added.stride(0),
        width,
        norm.eps,
        KIND=norm.kind,
        ADD_BEFORE=residual is not None and not after,
        ADD_AFTER=after,
        HAS_BIAS=norm.bias is not None,
        ONE_TILE=chosen["BLOCK"] >= width,
        **chosen,
    )
    return out, hidden


def blocks_for(x: Tensor, norm: Norm, override: Mapping[str, int] | None = None) -> dict[str, int]:
    """BLOCK (elements of a tile) and num_warps for this width and dtype, never for a number of rows."""
    width, dtype = x.shape[-1], str(x.dtype).removeprefix("torch.")
    block = min(MAX_BLOCK, triton.next_power_of_2(width))
    default = {"BLOCK": block, "num_warps": max(1, min(16, block // 512))}
    return config("norm", x.device, default, override, width=width, dtype=dtype, kind=norm.kind)


def tuning_problems(device: torch.device) -> Iterator[Problem]:
    """What `python -m handloom_kernels.tune norm` tries."""
    for width in (576, 1024, 2048, 4096, 8192):
        x = torch.randn(64, width, dtype=torch.bfloat16, device=device)
        norm = Norm("rms", torch.randn(width, dtype=torch.bfloat16, device=device), None, 1e-6)
        block = triton.next_power_of_2(width)
        yield Problem(
            when={"width": width, "dtype": "bfloat16"},
            candidates=[{"BLOCK": b, "num_warps": w} for b in (block // 2, block) for w in (1, 2, 4, 8, 16)],
            run=partial(normalize, x, norm),
        )
