"""Linear layers for few rows (1 to 16 at a time) with weights of 8 or 4 bits: W8A16, W4A16 and fp8.

    y = x W' + b,  W[row, k] = scale[group of k, row] * (code[row, k] - zero[group of k, row]);  alone, with a residual
    added, or as the up projection of an MLP with its activation.

A program owns BLOCK_N rows of the weight. Its warps lie side by side along K, so that even 2048 rows make 128 programs
with 8 warps each, and nothing needs to be split into other programs:

                        <----------------------------- K ------------------------------>
             16 rows  [ tile  tile  ...  tile | tile  tile  ...  tile | ....             ]   each tile: 512 bytes in a
    BLOCK_N           [   step 0              |   step 1              |                  ]   row, 16 bytes a thread
             16 rows  [ tile  tile  ...  tile | tile  tile  ...  tile | ....             ]
                       warp 0  warp 1   warp 7  warp 0 ...                  x: the same K, 16 rows, shared

Every warp has an accumulator [BLOCK_N, 16] of its own; at the end the SLICES accumulators are added in fixed order. No
sum depends on how many rows x has. More than 16 rows are more programs with the same weight: right, not fast.

The layout of `reference.quantized_linear` gives each thread the codes which its part of the tensor core's instruction
multiplies: they go from a 16-byte load to the multiplication in registers, never through shared memory as floats.
What a code costs there decides whether 4 bits are faster than 8. An H100 reads 3.35 TB/s / (132 x 1.755 GHz) = 14.5
bytes a clock and multiprocessor: 29 int4 weights, 14.5 of 8 bits; it can start 128 threads' instructions, 64 of them
on integers. So int4 may cost 4.4 instructions a weight, 2.2 of them on integers.
Two codes of a word are made floats at once:

    int4   w = .... nnnn .... nnnn      (w & 0x000F000F) | 0x43004300 = two bfloat16 128 + n (float16 0x6400: 1024 + n)
           minus 128 + 8: exact         1 logic + 3/4 shift + 1 subtraction for two: 1.4 a weight, 0.9 on integers
    int8   n = its low 7 bits - 128 * its sign: (128 + low) - (128 + 128 * sign), both made as above: 1.8 a weight
    fp8    sign and the other bits moved to where bfloat16 (float16) has them, times 2^120 (2^8), exact also for the
           subnormal: 2.3 a weight. No type of 8 bits is needed, so that every GPU has it. Codes of NaN count as 480

Compiled for an H100 a step has, products, copies and addresses included, 3.6 instructions an int4 weight in groups of
128 (4.9 in groups of 32 with zeros, which are 15% more bytes), 4.6 an int8 weight and 4.1 an fp8 weight, of 8.8 for
which there is time.

A group's scale is multiplied in float32, after the products of its K alone (BLOCK_N x 16 numbers a step, not each
weight); a scale of whole rows after all of K. The scales of the next step are read during this one. A zero other than 8
costs (8 - zero) * sum of x over the group; the sums are products with ones, since the tensor cores have time.

To move: 1, 0.5 or 1 byte a weight and 2 bytes a scale (int4 in groups of 128: 0.516 bytes a weight); 2 FLOPs a weight
and row. At 16 rows each program also reads x, 32 bytes a column for 32 rows of weights of 16 or 32 bytes, from the
second-level cache. This module does not know how weights were quantised. Meaning: `reference.quantized_linear`; the
weights are not rounded to x's dtype here, so that results are a little closer to exact ones.
"""

from __future__ import annotations

from functools import partial
from typing import Iterator, Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .activation import activate_tile, gate_tile
from .checks import FLOATS, check, check_device, require
from .norm import normalize
from .reference.activation import ACTIVATIONS, GATED_ACTIVATIONS
from .reference.norm import Norm
from .reference.quantized_linear import BLOCK_K, GROUP_SIZES, TILE_ROWS, TILE_WORDS, QuantizedWeight, quantize_weight
from .tiles import ROWS
from .tuning import Problem, config
from .weight_bits import decode

SHARED_MEMORY = 98_304  # bytes of steps on the way in a program: one program on a consumer card, two on an H100


@triton.jit
def product(
    x,
    x_stride,
    first,
    num_rows,
    data,
    scales,
    zeros,
    tile_rows,
    tiles_inside,
    weight_rows,
    rows_inside,
    width,
    depth,
    num_tiles,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    SCALE_ROWS: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    EVEN: tl.constexpr,
    SLICES: tl.constexpr,
):
    """W[weight_rows] @ x[first : first + ROWS].T, float32 [len(weight_rows), ROWS].

    tile_rows: which 16 rows of tiles hold the weight rows. Rows not inside are not read. GROUP: 0 for whole rows.
    EVEN: depth is a multiple of what a step covers.
    """
    dtype: tl.constexpr = x.dtype.element_ty
    DEPTH: tl.constexpr = 64 if KIND == "int4" else 32  # columns of a tile
    PARTS: tl.constexpr = 2 if KIND == "int4" and GROUP == 32 else 1  # groups in a tile
    BATCH: tl.constexpr = PARTS * SLICES
    BLOCK_N: tl.constexpr = weight_rows.shape[0]
    TILES: tl.constexpr = tile_rows.shape[0]

    word = tl.arange(0, SLICES * 128)
    data_at = data + (tile_rows.to(tl.int64) * num_tiles * 128)[:, None] + word[None, :]
    rows = first + tl.arange(0, ROWS)
    batch = tl.arange(0, BATCH)
    base = batch % SLICES * DEPTH + batch // SLICES * (DEPTH // PARTS)  # the first column of each accumulator's part
    k = base[:, None, None] + tl.arange(0, DEPTH // PARTS)[None, :, None]
    x_at = x + rows.to(tl.int64)[None, None, :] * x_stride + k
    x_inside = (rows < num_rows)[None, None, :]

    if GROUP > 0:
        scale_width = tl.cdiv(width, SCALE_ROWS)
        scale_rows = weight_rows // SCALE_ROWS
        scale = _of_groups(scales, base, scale_rows, rows_inside, scale_width, depth, GROUP).to(tl.float32)
        if HAS_ZEROS:
            zero = _of_groups(zeros, base, weight_rows, rows_inside, width, depth, GROUP)
    acc = tl.zeros([BATCH, BLOCK_N, ROWS], tl.float32)
    for tile in range(0, num_tiles, SLICES):
        inside = tiles_inside[:, None] & (word < (SLICES if EVEN else num_tiles - tile) * 128)[None, :]
        words = tl.load(data_at + tile * 128, mask=inside, other=0)
        if GROUP > 0:
            after = base + (tile + SLICES) * DEPTH
            next_scale = _of_groups(scales, after, scale_rows, rows_inside, scale_width, depth, GROUP).to(tl.float32)
            if HAS_ZEROS:
                next_zero = _of_groups(zeros, after, weight_rows, rows_inside, width, depth, GROUP)
        b = tl.load(
            x_at + tile * DEPTH, mask=x_inside & (k < (SLICES * DEPTH if EVEN else depth - tile * DEPTH)), other=0.0
        )
        if KIND == "int4":
            words = tl.reshape(words, (TILES, SLICES, 8, 4, PARTS, 4 // PARTS, 1, 1, 1))
        else:
            words = tl.reshape(words, (TILES, SLICES, 8, 4, 1, 2, 1, 2, 1))
        a = decode(words, KIND, dtype)
        a = tl.permute(a, (4, 1, 0, 6, 2, 5, 7, 3, 8))
        a = tl.reshape(a, (BATCH, BLOCK_N, DEPTH // PARTS))
        if GROUP > 0:
            part = tl.dot(a, b, input_precision="ieee")
            if HAS_ZEROS:
                # codes are counted from 8, and the rest of the zero meets the sum of x, by the tensor cores too
                total = tl.dot(tl.full((BATCH, 16, DEPTH // PARTS), 1.0, dtype), b, input_precision="ieee")
                rest = tl.reshape(8.0 - zero.to(tl.float32), (BATCH, TILES, 16, 1)) * total[:, None, :, :]
                part += tl.reshape(rest, (BATCH, BLOCK_N, ROWS))
            acc += part * scale[:, :, None]
            scale = next_scale
            if HAS_ZEROS:
                zero = next_zero
        else:
            acc = tl.dot(a, b, acc, input_precision="ieee")
    y = tl.sum(acc, axis=0)
    if GROUP == 0:
        scale = tl.load(scales + weight_rows // SCALE_ROWS, mask=rows_inside, other=0.0).to(tl.float32)
        y *= scale[:, None]
    return y


@triton.jit
def _of_groups(values, columns, rows, inside, width, depth, GROUP: tl.constexpr):
    """[len(columns), len(rows)] of values [groups, width]: those of the groups that hold the columns."""
    at = (columns // GROUP).to(tl.int64)[:, None] * width + rows[None, :]
    return tl.load(values + at, mask=(columns < depth)[:, None] & inside[None, :], other=0)


@triton.jit(do_not_specialize=["num_rows"])
def _quantized_linear_kernel(
    x,
    data,
    scales,
    zeros,
    bias,
    residual,
    out,
    num_rows,
    width,
    depth,
    num_tiles,
    x_stride,
    residual_stride,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    SCALE_ROWS: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SLICES: tl.constexpr,
):
    # a gated program has BLOCK_N / 2 gate rows, then the same rows of the other half
    HALVES: tl.constexpr = 2 if GATED else 1
    COLUMNS: tl.constexpr = BLOCK_N // HALVES
    TILES: tl.constexpr = COLUMNS // 16
    out_width = width // HALVES
    start = tl.program_id(1) * COLUMNS
    tile = tl.arange(0, BLOCK_N // 16)
    row = tl.arange(0, BLOCK_N)
    rows_inside = start + row % COLUMNS < out_width
    weight_rows = start + row % COLUMNS + row // COLUMNS * out_width
    y = product(
        x,
        x_stride,
        tl.program_id(0) * ROWS,
        num_rows,
        data,
        scales,
        zeros,
        start // 16 + tile % TILES + tile // TILES * (out_width // 16),
        start + tile % TILES * 16 < out_width,
        weight_rows,
        rows_inside,
        width,
        depth,
        num_tiles,
        KIND,
        GROUP,
        SCALE_ROWS,
        HAS_ZEROS,
        EVEN,
        SLICES,
    )
    dtype: tl.constexpr = out.dtype.element_ty
    if HAS_BIAS:
        y += tl.load(bias + weight_rows, mask=rows_inside, other=0.0).to(tl.float32)[:, None]
    y = tl.trans(y.to(dtype).to(tl.float32))
    if GATED:
        gate, up = tl.split(tl.permute(tl.reshape(y, (ROWS, 2, COLUMNS)), (0, 2, 1)))
        y = gate_tile(gate, up, ACTIVATION)
    elif ACTIVATION != "none":
        y = activate_tile(y, ACTIVATION)
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    columns = (start + tl.arange(0, COLUMNS))[None, :]
    mask = (rows < num_rows) & (columns < out_width)
    if HAS_RESIDUAL:
        y += tl.load(residual + rows * residual_stride + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + rows * out_width + columns, y.to(dtype), mask=mask)


def quantized_linear(
    x: Tensor,
    q: QuantizedWeight,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    blocks: Mapping[str, int] | None = None,
) -> Tensor:
    """`reference.quantized_linear`: x [N, K], rows of any stride, to a new [N, rows] of x's dtype.

    float32, float16 or bfloat16 (float32 is computed without tensor cores, for tests); residual [N, rows] like x, bias
    [rows] of any of these dtypes. blocks: overrides the block sizes of the tuning table. Raises KernelError.
    """
    return _launch("x", x, q, bias, residual, "none", False, blocks)


def quantized_norm_mlp(
    hidden: Tensor,
    norm: Norm,
    q: QuantizedWeight,
    bias: Tensor | None,
    activation: str,
    gated: bool,
    *,
    blocks: Mapping[str, int] | None = None,
) -> Tensor:
    """`reference.quantized_norm_mlp`: hidden [N, H], q of [2 * I, H] (gated; I a multiple of 16) or [I, H], to a new
    [N, I].

    Two launches, the first of them `normalize`. The activation is computed in float32 and rounded once. dtypes and
    blocks: as in `quantized_linear`. Raises KernelError.
    """
    names = GATED_ACTIVATIONS if gated else ACTIVATIONS
    kind = "a gate" if gated else "alone"
    require(activation in names, f"activation is {activation!r}; as {kind} there are {', '.join(names)}")
    require(
        not (gated and q.shape[0] % (2 * TILE_ROWS)),
        f"q has {q.shape[0]} rows; gate and up must each be a multiple of {TILE_ROWS}, whole tiles",
    )
    check_quantized("q", q, check_device("hidden", hidden))
    check("hidden", hidden, (None, q.shape[1]), FLOATS, hidden.device, strided=True)
    return _launch("hidden", normalize(hidden, norm), q, bias, None, activation, gated, blocks)


def _launch(
    name: str,
    x: Tensor,
    q: QuantizedWeight,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    gated: bool,
    blocks: Mapping[str, int] | None,
) -> Tensor:
    device = check_device(name, x)
    check_quantized("q", q, device)
    width, depth = q.shape
    check(name, x, (None, depth), FLOATS, device, strided=True)
    num_rows, out_width = len(x), width // 2 if gated else width
    if bias is not None:
        check("bias", bias, (width,), FLOATS, device)
    if residual is not None:
        check("residual", residual, (num_rows, width), x.dtype, device, strided=True)
    out = torch.empty((num_rows, out_width), dtype=x.dtype, device=device)
    if out.numel() == 0:
        return out
    chosen = blocks_for(x, q, gated, blocks)
    columns = chosen["BLOCK_N"] // 2 if gated else chosen["BLOCK_N"]
    require(columns % TILE_ROWS == 0, f"BLOCK_N is {chosen['BLOCK_N']}; a program's halves must be whole tiles")
    _quantized_linear_kernel[(triton.cdiv(num_rows, ROWS.value), triton.cdiv(out_width, columns))](
        x, q.data, q.scales, q.scales if q.zeros is None else q.zeros, q.scales if bias is None else bias,
        out if residual is None else residual, out, num_rows, width, depth, q.data.shape[1],
        x.stride(0), 0 if residual is None else residual.stride(0),
        KIND=q.kind,
        # a row with zeros is one group, since only groups have them
        GROUP=depth if q.zeros is not None and q.group_size == 0 else q.group_size,
        SCALE_ROWS=q.scale_rows, HAS_ZEROS=q.zeros is not None,
        HAS_BIAS=bias is not None, HAS_RESIDUAL=residual is not None,
        ACTIVATION=activation, GATED=gated, EVEN=depth % (chosen["SLICES"] * BLOCK_K[q.kind]) == 0, **chosen,
    )  # fmt: skip
    return out


def check_quantized(name: str, q: QuantizedWeight, device: torch.device) -> None:
    """Raise KernelError unless the parts of `q` fit each other and are on `device`."""
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


def blocks_for(x: Tensor, q: QuantizedWeight, gated: bool, override: Mapping[str, int] | None = None) -> dict[str, int]:
    """BLOCK_N (rows of the weight in a program), SLICES (tiles side by side along K, one for each warp), num_warps,
    num_stages. Of the weight's shape and kind, never of a number of rows of x."""
    width, depth = q.shape
    slices = min(16 // x.element_size(), triton.next_power_of_2(q.data.shape[1]))
    block_n = 32 if gated or width >= 4096 else 16
    step = slices * (block_n // TILE_ROWS * 4 * TILE_WORDS + 16 * BLOCK_K[q.kind] * x.element_size())
    default = {
        "BLOCK_N": block_n,
        "SLICES": slices,
        "num_warps": slices,
        # each stage but one has a place in shared memory, through which a weight of float32 must go too
        "num_stages": 2 if tuning.is_hip() else max(2, min(12 // x.element_size(), 1 + SHARED_MEMORY // step)),
    }
    return config(
        "quantized_linear",
        x.device,
        default,
        override,
        width=width,
        depth=depth,
        kind=q.kind,
        group=q.group_size,
        gated=gated,
        dtype=str(x.dtype).removeprefix("torch."),
    )


def tuning_problems(device: torch.device) -> Iterator[Problem]:
    """What `python -m handloom_kernels.tune quantized_linear` tries: the four weights of a layer of Llama-3.1-8B."""
    for width, depth in ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)):
        x = torch.randn(16, depth, dtype=torch.bfloat16, device=device)
        weight = torch.randn(width, depth, dtype=torch.bfloat16, device=device)
        for kind, group in (("int8", 0), ("int4", 128), ("int4", 32), ("fp8", 0)):
            yield Problem(
                when={"width": width, "depth": depth, "kind": kind, "group": group, "dtype": "bfloat16"},
                candidates=CANDIDATES,
                run=partial(quantized_linear, x, quantize_weight(weight, kind, group)),
            )


CANDIDATES = [
    {"BLOCK_N": n, "SLICES": w, "num_warps": w, "num_stages": s}
    for n in (16, 32, 64)
    for w in (2, 4, 8)
    for s in (3, 4, 5, 6, 8)
]
