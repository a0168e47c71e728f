"""The product of few rows with a weight of 8 or 4 bits, for the kernels that end in it; what such a weight must be.

The tiles and what they cost stand in quantized_linear.py, the layout in `reference.quantized_linear`.

This module does not know what follows the product, nor how weights were quantised.
"""

from __future__ import annotations

from typing import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .checks import FLOATS, check, check_device, require
from .reference.quantized_linear import BLOCK_K, GROUP_SIZES, TILE_ROWS, TILE_WORDS, QuantizedWeight
from .tiles import ENOUGH_PROGRAMS, ROWS, normed_tile, of_columns, row_statistics
from .tuning import config
from .weight_bits import decode

SHARED_MEMORY = 98_304  # bytes of steps on the way in a program: one program on a consumer card, two on an H100


@triton.jit
def quantized_product(
    x, x_stride, first, num_rows, norm_weight, norm_bias, eps, data, scales, zeros,
    tile_rows, tiles_inside, weight_rows, rows_inside, width, depth, num_tiles,
    NORM: tl.constexpr, HAS_NORM_BIAS: tl.constexpr, STRIP: tl.constexpr, CHUNK: tl.constexpr,
    KIND: tl.constexpr, GROUP: tl.constexpr, SCALE_ROWS: tl.constexpr, HAS_ZEROS: tl.constexpr,
    EVEN: tl.constexpr, SLICES: tl.constexpr,
):  # fmt: skip
    """W[weight_rows] @ norm(x[first : first + ROWS]).T, float32 [len(weight_rows), ROWS].

    tile_rows: which 16 rows of tiles hold the weight rows. Rows not inside are not read. NORM: a kind of norm, or
    "none". GROUP: 0 for whole rows. EVEN: depth is a multiple of what a step covers.
    """
    dtype: tl.constexpr = x.dtype.element_ty
    DEPTH: tl.constexpr = 64 if KIND == "int4" else 32  # columns of a tile
    PARTS: tl.constexpr = 2 if KIND == "int4" and GROUP == 32 else 1  # groups in a tile
    BATCH: tl.constexpr = PARTS * SLICES

    if NORM != "none":
        mean, scale_of_x = row_statistics(x, x_stride, first, num_rows, depth, eps, NORM, STRIP, CHUNK)
        mean, scale_of_x = tl.reshape(mean, (1, 1, ROWS)), tl.reshape(scale_of_x, (1, 1, ROWS))
    word = tl.arange(0, SLICES * 128)
    data_at = data + (tile_rows.to(tl.int64) * num_tiles * 128)[:, None] + word[None, :]
    rows = first + tl.arange(0, ROWS)
    batch = tl.arange(0, BATCH)
    base = batch % SLICES * DEPTH + batch // SLICES * (DEPTH // PARTS)  # the first column of each accumulator's part
    k = base[:, None] + tl.arange(0, DEPTH // PARTS)[None, :]
    x_at = x + rows.to(tl.int64)[None, None, :] * x_stride + k[:, :, None]

    if GROUP > 0:
        scale_width = tl.cdiv(width, SCALE_ROWS)
        scale_rows = weight_rows // SCALE_ROWS
        scale = _of_groups(scales, base, scale_rows, rows_inside, scale_width, depth, GROUP).to(tl.float32)
        if HAS_ZEROS:
            zero = _of_groups(zeros, base, weight_rows, rows_inside, width, depth, GROUP)
    acc = tl.zeros([BATCH, weight_rows.shape[0], ROWS], tl.float32)
    for tile in range(0, num_tiles, SLICES):
        inside = tiles_inside[:, None] & (word < (SLICES if EVEN else num_tiles - tile) * 128)[None, :]
        words = tl.load(data_at + tile * 128, mask=inside, other=0)
        if GROUP > 0:
            after = base + (tile + SLICES) * DEPTH
            next_scale = _of_groups(scales, after, scale_rows, rows_inside, scale_width, depth, GROUP).to(tl.float32)
            if HAS_ZEROS:
                next_zero = _of_groups(zeros, after, weight_rows, rows_inside, width, depth, GROUP)
        k_inside = k < (SLICES * DEPTH if EVEN else depth - tile * DEPTH)
        b = tl.load(x_at + tile * DEPTH, mask=(rows < num_rows)[None, None, :] & k_inside[:, :, None], other=0.0)
        if NORM != "none":
            w = of_columns(norm_weight, tile * DEPTH + k, k_inside)[:, :, None]
            shift = of_columns(norm_bias, tile * DEPTH + k, k_inside)[:, :, None]
            b = normed_tile(b.to(tl.float32), mean, scale_of_x, w, shift, NORM, HAS_NORM_BIAS, dtype)
        a = _weights(words, KIND, PARTS, SLICES, dtype)
        if GROUP > 0:
            part = tl.dot(a, b, input_precision="ieee")
            if HAS_ZEROS:
                part += _rest_of_zeros(zero, b)
                zero = next_zero
            acc += part * scale[:, :, None]
            scale = next_scale
        else:
            acc = tl.dot(a, b, acc, input_precision="ieee")
    y = tl.sum(acc, axis=0)
    if GROUP == 0:
        y *= tl.load(scales + weight_rows // SCALE_ROWS, mask=rows_inside, other=0.0).to(tl.float32)[:, None]
    return y


@triton.jit
def _of_groups(values, columns, rows, inside, width, depth, GROUP: tl.constexpr):
    """[len(columns), len(rows)] of values [groups, width]: those of the groups that hold the columns."""
    at = (columns // GROUP).to(tl.int64)[:, None] * width + rows[None, :]
    return tl.load(values + at, mask=(columns < depth)[:, None] & inside[None, :], other=0)


@triton.jit
def _weights(words, KIND: tl.constexpr, PARTS: tl.constexpr, SLICES: tl.constexpr, dtype: tl.constexpr):
    """[row tiles, SLICES * 128] words of tiles to [PARTS * SLICES, rows, columns of a part] of `dtype`."""
    TILES: tl.constexpr = words.shape[0]
    if KIND == "int4":
        words = tl.reshape(words, (TILES, SLICES, 8, 4, PARTS, 4 // PARTS, 1, 1, 1))
    else:
        words = tl.reshape(words, (TILES, SLICES, 8, 4, 1, 2, 1, 2, 1))
    a = tl.permute(decode(words, KIND, dtype), (4, 1, 0, 6, 2, 5, 7, 3, 8))
    return tl.reshape(a, (PARTS * SLICES, TILES * 16, (64 if KIND == "int4" else 32) // PARTS))


@triton.jit
def _rest_of_zeros(zero, b):
    """(8 - zero) * the sum of b over its columns, since codes are counted from 8: by the tensor cores too."""
    BATCH: tl.constexpr = b.shape[0]
    BLOCK_N: tl.constexpr = zero.shape[1]
    total = tl.dot(tl.full((BATCH, 16, b.shape[1]), 1.0, b.dtype), b, input_precision="ieee")
    rest = tl.reshape(8.0 - zero.to(tl.float32), (BATCH, BLOCK_N // 16, 16, 1)) * total[:, None, :, :]
    return tl.reshape(rest, (BATCH, BLOCK_N, ROWS))


def check_quantized(name: str, q: QuantizedWeight, device: torch.device) -> None:
    """Raise KernelError unless the parts of `q` fit each other and are on `device`."""
    require(isinstance(q, QuantizedWeight), f"{name} must be a QuantizedWeight, not {type(q).__name__}")
    require(q.kind in BLOCK_K, f"{name}.kind is {q.kind!r}; there are {', '.join(BLOCK_K)}")
    require(
        q.group_size in GROUP_SIZES,
        f"{name}.group_size is {q.group_size}; there are {', '.join(map(str, GROUP_SIZES))}",
    )
    require(min(q.shape) > 0, f"{name}.shape is {q.shape}; both must be positive")
    require(q.scale_rows > 0, f"{name}.scale_rows is {q.scale_rows}; it must be positive")
    width, depth = q.shape
    tiles = (triton.cdiv(width, TILE_ROWS), triton.cdiv(depth, BLOCK_K[q.kind]), TILE_WORDS)
    groups = triton.cdiv(depth, q.group_size) if q.group_size else 1
    check(f"{name}.data", q.data, tiles, torch.int32, device)
    check(f"{name}.scales", q.scales, (groups, triton.cdiv(width, q.scale_rows)), FLOATS, device)
    if q.zeros is not None:
        require(q.kind == "int4", f"{name}.zeros is given, and codes of kind {q.kind} have none")
        check(f"{name}.zeros", q.zeros, (groups, width), torch.uint8, device)


def check_quantized_linear(x: Tensor, q: QuantizedWeight, bias: Tensor | None, name: str) -> torch.device:
    """The device of x [N, K], called `name`, if q [M, K] and bias [M] fit it. Raises KernelError."""
    device = check_device(name, x)
    check_quantized("q", q, device)
    check(name, x, (None, q.shape[1]), FLOATS, device, strided=True)
    if bias is not None:
        check("bias", bias, (q.shape[0],), FLOATS, device)
    return device


def form_of(q: QuantizedWeight, slices: int) -> dict[str, int | str | bool]:
    """What is compiled in of a weight, for a step of so many tiles."""
    return {
        "KIND": q.kind,
        # a row with zeros is one group, since only groups have them
        "GROUP": q.shape[1] if q.zeros is not None and q.group_size == 0 else q.group_size,
        "SCALE_ROWS": q.scale_rows,
        "HAS_ZEROS": q.zeros is not None,
        "EVEN": q.shape[1] % (slices * BLOCK_K[q.kind]) == 0,
    }


def quantized_blocks(
    kernel: str,
    x: Tensor,
    q: QuantizedWeight,
    override: Mapping[str, int] | None,
    *,
    normed: bool,
    paired: bool,
    widest: int = 64,
) -> dict[str, int]:
    """BLOCK_N (rows of the weight in a program), SLICES (tiles side by side along K, one for each warp), num_warps,
    num_stages. Of the weight's shape and kind, never of a number of rows of x.

    paired: two tiles of rows must meet. normed: a program norms x for itself, which the more of its rows share the
    better (AMD's shared memory has room for 32).
    """
    width, depth = q.shape
    size = x.element_size()
    slices = min(16 // size, triton.next_power_of_2(q.data.shape[1]))
    block_n = 32 if paired or width >= 4096 else 16
    if normed and width // 64 >= ENOUGH_PROGRAMS and not tuning.is_hip():
        block_n = 64
    block_n = min(block_n, widest)
    step = slices * (block_n // TILE_ROWS * 4 * TILE_WORDS + (16 + normed) * BLOCK_K[q.kind] * size)
    default = {
        "BLOCK_N": block_n,
        "SLICES": slices,
        "num_warps": slices,
        # each stage but one has a place in shared memory, through which a weight of float32 must go too
        "num_stages": 2 if tuning.is_hip() else max(2, min(12 // size, 1 + SHARED_MEMORY // step)),
    }
    if normed and not tuning.is_hip():
        default["maxnreg"] = 255  # without a limit the compiler spills a few registers to seat one more program
    dtype = str(x.dtype).removeprefix("torch.")
    shape: dict[str, int | str | bool] = {"width": width, "depth": depth, "kind": q.kind, "group": q.group_size}
    return config(kernel, x.device, default, override, **shape, normed=normed, paired=paired, dtype=dtype)


CANDIDATES = [
    {"BLOCK_N": n, "SLICES": w, "num_warps": w, "num_stages": s}
    for n in (16, 32, 64)
    for w in (2, 4, 8)
    for s in (3, 4, 5, 6, 8)
    if (s - 1) * w * (n // TILE_ROWS * 512 + 1024) <= 163_840
]
