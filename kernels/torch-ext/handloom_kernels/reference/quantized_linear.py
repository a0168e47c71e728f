"""Weights of 8 or 4 bits: their meaning, their layout in memory, and the linear layer that uses them.

    weight[row, k] = scale[group of k, row] * (code[row, k] - zero[group of k, row])

    kind   code                                     zero                         bits a weight
    int8   -127 ... 127                             0                            8
    int4   0 ... 15                                 8, or `zeros` (asymmetric)   4
    fp8    float8_e4m3fn: sign, 4 exponent, 3 mantissa bits                0     8

A group is `group_size` neighbours along K (0: the whole row) that share a scale; with scale_rows > 1 so many rows share
it too: scale_rows = rows with group_size 0 is one scale per tensor, 128 with group_size 128 is DeepSeek-V3's blockwise
form (arXiv 2412.19437).

`data` holds the codes in the order in which the tensor cores want them, so that 16 bytes that one thread of a GPU loads
are codes which that very thread multiplies. 16 rows and BLOCK_K columns (64 of int4, 32 of 8 bits) make a tile of 128
words of 32 bits; tiles lie along K, then down the rows: data int32 [ceil(rows / 16), ceil(K / BLOCK_K), 128].

    within a tile                                word = 4 * lane + part, lane = 4 * (row % 8) + column / 2 % 4
                 columns 0 ......... 15 | 16 ... 31 | ..
    rows 0 .. 7  [ 0 0 1 1 2 2 3 3 | 0 0 1 1 2 2 3 3 ]    the numbers are column / 2 % 4; a lane so has, of each 16
    rows 8 .. 15 [ 0 0 1 1 2 2 3 3 | 0 0 1 1 2 2 3 3 ]    columns, 2 neighbours in 2 halves (right) in 2 rows (below)

    int4: part = column / 16; bits 16 * (column % 2) + 8 * (column / 8 % 2) + 4 * (row / 8 % 2) and the 3 above
    8 bits: part = 2 * (column / 16) + column / 8 % 2; bits 16 * (column % 2) + 8 * (row / 8 % 2) and the 7 above

This is the fragment of the first operand of mma.m16n8k16. Neighbouring columns always lie 16 bits apart, so that one
instruction on a word makes two codes into two 16-bit floats. Rows and columns past the last are 0.

What others store goes into this without loss, through `pack_codes`:
- GPTQ: qweight int32 [K / 8, rows], 8 neighbours along K from the lowest bits; scales [groups, rows] as here; zeros are
  qzeros + 1. With g_idx other than k // group_size (act_order) the columns, and so x, must be reordered first.
- AWQ: qweight int32 [K, rows / 8], 8 neighbours along the rows in the order 0 2 4 6 1 3 5 7; scales and zeros as here.
- GGUF Q8_0 and Q4_0: groups of 32 with a float16 scale beside them, codes - 8 in Q4_0, whose bytes hold k and k + 16.

This module does not know where a checkpoint keeps its weights, nor how its quantisation was calibrated.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from .linear import norm_mlp, norm_qkv
from .norm import Norm
from .rope import Rotary

BLOCK_K = {"int8": 32, "int4": 64, "fp8": 32}  # columns of a tile, by kind
TILE_ROWS = 16
TILE_WORDS = 128
GROUP_SIZES = (0, 32, 64, 128)
LARGEST = {"int8": 127.0, "int4": 7.0, "fp8": 448.0}  # code, counted from zero
# the axes of a tile: row / 8, row % 8 | part of 16 columns, column / 8 % 2, column / 2 % 4, column % 2
_AXES = (2, 8, -1, 2, 4, 2)


class QuantizedWeight(NamedTuple):
    """A weight [rows, K] of few bits. data: codes in the layout above; scales [ceil(K / group_size) or 1,
    ceil(rows / scale_rows)] float32, float16 or bfloat16; zeros uint8 [groups, rows], 0 to 16, or None; group_size: one
    of GROUP_SIZES, 0 for whole rows; shape: (rows, K); scale_rows: rows that share a scale."""

    kind: str
    data: Tensor
    scales: Tensor
    zeros: Tensor | None
    group_size: int
    shape: tuple[int, int]
    scale_rows: int = 1


def pack_codes(codes: Tensor, kind: str) -> Tensor:
    """uint8 [rows, K], one code a byte (int8 and fp8: their bits), to the data of a QuantizedWeight of that kind."""
    rows, depth = codes.shape
    codes = F.pad(codes, (0, -depth % BLOCK_K[kind], 0, -rows % TILE_ROWS))
    row_tiles, k_tiles = codes.shape[0] // TILE_ROWS, codes.shape[1] // BLOCK_K[kind]
    tiles = codes.view(row_tiles, *_AXES[:2], k_tiles, *_AXES[2:])
    if kind == "int4":
        halves = tiles.permute(0, 3, 2, 6, 4, 7, 5, 1)
        parts = halves[..., 0] | halves[..., 1] << 4
    else:
        parts = tiles.permute(0, 3, 2, 6, 4, 5, 7, 1)
    return parts.contiguous().view(-1).view(torch.int32).view(row_tiles, k_tiles, TILE_WORDS)


def unpack_codes(data: Tensor, kind: str, shape: tuple[int, int]) -> Tensor:
    """The inverse of `pack_codes`: uint8 [rows, K], one code a byte."""
    parts = data.contiguous().view(-1).view(torch.uint8)
    tiles, sixteens = data.shape[:2], BLOCK_K[kind] // 16
    if kind == "int4":
        parts = torch.stack((parts & 15, parts >> 4), dim=-1)
        codes = parts.view(*tiles, 8, 4, sixteens, 2, 2, 2).permute(0, 7, 2, 1, 4, 6, 3, 5)
    else:
        codes = parts.view(*tiles, 8, 4, sixteens, 2, 2, 2).permute(0, 7, 2, 1, 4, 5, 3, 6)
    rows, depth = shape
    return codes.reshape(tiles[0] * TILE_ROWS, tiles[1] * BLOCK_K[kind])[:rows, :depth].contiguous()


def quantize_weight(
    weight: Tensor, kind: str, group_size: int = 0, symmetric: bool = True, *, scale_rows: int = 1
) -> QuantizedWeight:
    """Round weight [rows, K] (float32, float16 or bfloat16) to the nearest codes, ties to even.

    A symmetric group's largest magnitude becomes the largest code (7 of int4's -8 ... 7). With symmetric=False (int4
    alone) the group's smallest and largest values, with 0 between them, become codes 0 and 15. Scales of groups within
    one row have the weight's dtype, other scales float32; codes are counted in the scale as it was rounded.
    Raises ValueError.
    """
    if kind not in BLOCK_K:
        raise ValueError(f"kind is {kind!r}; there are {', '.join(BLOCK_K)}")
    if group_size not in GROUP_SIZES:
        raise ValueError(f"group_size is {group_size}; there are {', '.join(map(str, GROUP_SIZES))}")
    if not symmetric and (kind != "int4" or scale_rows != 1):
        raise ValueError("only int4 with a scale for each row can have zeros")
    if not torch.isfinite(weight).all():
        raise ValueError("the weight has elements that are not finite")
    rows, depth = weight.shape
    group = group_size or depth
    wide = weight.float()
    padded = F.pad(wide, (0, -depth % group, 0, -rows % scale_rows))
    blocks = padded.view(padded.shape[0] // scale_rows, scale_rows, -1, group)
    scale_dtype = weight.dtype if group_size and scale_rows == 1 else torch.float32

    def rounded(scales: Tensor) -> Tensor:
        scales = scales.to(scale_dtype)
        return torch.where(scales == 0, 1, scales).to(scale_dtype)

    zeros = None
    if symmetric:
        scales = rounded(blocks.abs().amax(dim=(1, 3)) / LARGEST[kind])
    else:
        low, high = blocks.amin(dim=(1, 3)).clamp(max=0), blocks.amax(dim=(1, 3)).clamp(min=0)
        scales = rounded((high - low) / 15)
        zeros = (-low / scales.float()).round().clamp(0, 15).to(torch.uint8).T.contiguous()
    scales = scales.T.contiguous()
    steps = wide / _spread(scales, group, weight.shape, scale_rows).float()
    if kind == "fp8":
        codes = steps.clamp(-LARGEST[kind], LARGEST[kind]).to(torch.float8_e4m3fn).view(torch.uint8)
    elif kind == "int8":
        codes = steps.round().clamp(-LARGEST[kind], LARGEST[kind]).to(torch.int8).view(torch.uint8)
    else:
        zero = 8 if zeros is None else _spread(zeros, group, weight.shape, 1)
        codes = (steps.round() + zero).clamp(0, 15).to(torch.uint8)
    return QuantizedWeight(kind, pack_codes(codes, kind), scales, zeros, group_size, (rows, depth), scale_rows)


def _spread(values: Tensor, group: int, shape: tuple[int, ...], rows: int) -> Tensor:
    """[groups, row blocks] to [rows, K], each value for every weight that it belongs to."""
    return values.T.repeat_interleave(rows, dim=0)[: shape[0]].repeat_interleave(group, dim=1)[:, : shape[1]]


def dequantize_weight(q: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """The weight [rows, K] in `dtype`, rounded once: products are computed in float32, or in float64 for float64."""
    wide = torch.promote_types(dtype, torch.float32)
    group = q.group_size or q.shape[1]
    codes = unpack_codes(q.data, q.kind, q.shape)
    if q.kind == "fp8":
        values = codes.view(torch.float8_e4m3fn).to(wide)
    elif q.kind == "int8":
        values = codes.view(torch.int8).to(wide)
    else:
        values = codes.to(wide) - (8 if q.zeros is None else _spread(q.zeros, group, q.shape, 1).to(wide))
    return (values * _spread(q.scales, group, q.shape, q.scale_rows).to(wide)).to(dtype)


def quantized_linear(
    x: Tensor, q: QuantizedWeight, bias: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    """x @ weight.T + bias, and + residual [N, rows]; x [N, K]. Returns [N, rows]."""
    out = F.linear(x, dequantize_weight(q, x.dtype), bias)
    return out if residual is None else residual + out


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
) -> Tensor:
    """`norm_qkv` with the weight that `q` stands for."""
    weight = dequantize_weight(q, hidden.dtype)
    return norm_qkv(
        hidden, norm, weight, bias, q_norm, k_norm, rotary, k_pages, v_pages, slot_mapping, k_scales, v_scales
    )


def quantized_norm_mlp(
    hidden: Tensor, norm: Norm, q: QuantizedWeight, bias: Tensor | None, activation: str, gated: bool
) -> Tensor:
    """`norm_mlp` with the weight that `q` stands for."""
    return norm_mlp(hidden, norm, dequantize_weight(q, hidden.dtype), bias, activation, gated)
