"""Linear layers for few rows (1 to 16 at a time) with weights of 8 or 4 bits: W8A16, W4A16 and fp8.

    quantized_linear      x W' + b, with a residual added if there is one
    quantized_norm_mlp    act(norm(x) Wg' + bg) * (norm(x) Wu' + bu), or act(norm(x) W' + b)

    W[row, k] = scale[group of k, row] * (code[row, k] - zero[group of k, row])

The product itself stands in quantized_product.py, for norm_qkv.py too. A program owns BLOCK_N rows of the weight. Its
warps lie side by side along K, so that even 2048 rows make 128 programs with 8 warps each, and nothing needs to be
split into other programs:

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

A norm before the product costs each program about 3 instructions an element of x, for 16 rows whether they are there or
not. With 32 rows of the weight in a program an int4 weight then takes 5.3 instructions, more than there is time for;
with 64 it takes 4.0, and an int8 weight 4.9. So where x is normed, programs have 64 rows if that leaves enough of them,
and the launch that is saved (2 to 3 us of some 20 for the largest weight of an 8B model) costs nothing.

A group's scale is multiplied in float32, after the products of its K alone (BLOCK_N x 16 numbers a step, not each
weight); a scale of whole rows after all of K. The scales of the next step are read during this one. A zero other than 8
costs (8 - zero) * sum of x over the group; the sums are products with ones, since the tensor cores have time.

To move: 1, 0.5 or 1 byte a weight and 2 bytes a scale (int4 in groups of 128: 0.516 bytes a weight); 2 FLOPs a weight
and row. At 16 rows each program also reads x, 32 bytes a column for 32 rows of weights of 16 or 32 bytes, from the
second-level cache.

Sources: the order of codes in which one load feeds one instruction is Marlin's (Frantar et al. 2024), making floats of
codes with a logical instruction FasterTransformer's (Kim et al. 2022).

This module does not know how weights were quantised. Meaning: `reference.quantized_linear`; the
weights are not rounded to x's dtype here, so that results are a little closer to exact ones.
"""

from __future__ import annotations

from functools import partial
from typing import Iterator, Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activation import activate_tile, gate_tile
from .checks import check, require
from .quantized_product import CANDIDATES, check_quantized_linear, form_of, quantized_blocks, quantized_product
from .reference.activation import ACTIVATIONS, GATED_ACTIVATIONS
from .reference.norm import Norm
from .reference.quantized_linear import TILE_ROWS, QuantizedWeight, quantize_weight
from .tiles import ROWS, check_norm, strips_for
from .tuning import Problem


@triton.jit(do_not_specialize=["num_rows"])
def _quantized_linear_kernel(
    x, norm_weight, norm_bias, data, scales, zeros, bias, residual, out,
    num_rows, width, depth, num_tiles, x_stride, residual_stride, eps,
    NORM: tl.constexpr, HAS_NORM_BIAS: tl.constexpr, STRIP: tl.constexpr, CHUNK: tl.constexpr,
    KIND: tl.constexpr, GROUP: tl.constexpr, SCALE_ROWS: tl.constexpr, HAS_ZEROS: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr,
    EVEN: tl.constexpr, BLOCK_N: tl.constexpr, SLICES: tl.constexpr,
):  # fmt: skip
    # a gated program has BLOCK_N / 2 gate rows, then the same rows of the other half
    HALVES: tl.constexpr = 2 if GATED else 1
    COLUMNS: tl.constexpr = BLOCK_N // HALVES
    TILES: tl.constexpr = COLUMNS // 16
    out_width = width // HALVES
    first = tl.program_id(0) * ROWS
    start = tl.program_id(1) * COLUMNS
    tile = tl.arange(0, BLOCK_N // 16)
    row = tl.arange(0, BLOCK_N)
    rows_inside = start + row % COLUMNS < out_width
    weight_rows = start + row % COLUMNS + row // COLUMNS * out_width
    tile_rows = start // 16 + tile % TILES + tile // TILES * (out_width // 16)
    y = quantized_product(
        x, x_stride, first, num_rows, norm_weight, norm_bias, eps, data, scales, zeros,
        tile_rows, start + tile % TILES * 16 < out_width, weight_rows, rows_inside, width, depth, num_tiles,
        NORM, HAS_NORM_BIAS, STRIP, CHUNK, KIND, GROUP, SCALE_ROWS, HAS_ZEROS, EVEN, SLICES,
    )  # fmt: skip
    dtype: tl.constexpr = out.dtype.element_ty
    if HAS_BIAS:
        y += tl.load(bias + weight_rows, mask=rows_inside, other=0.0).to(tl.float32)[:, None]
    y = tl.trans(y.to(dtype).to(tl.float32))
    if GATED:
        gate, up = tl.split(tl.permute(tl.reshape(y, (ROWS, 2, COLUMNS)), (0, 2, 1)))
        y = gate_tile(gate, up, ACTIVATION)
    elif ACTIVATION != "none":
        y = activate_tile(y, ACTIVATION)
    rows = (first + tl.arange(0, ROWS)).to(tl.int64)[:, None]
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
    return _launch("x", x, None, q, bias, residual, "none", False, blocks)


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

    norm.weight and norm.bias may have any of the dtypes of bias. The activation is computed in float32 and rounded
    once. dtypes and blocks: as in `quantized_linear`. Raises KernelError.
    """
    names = GATED_ACTIVATIONS if gated else ACTIVATIONS
    kind = "a gate" if gated else "alone"
    require(activation in names, f"activation is {activation!r}; as {kind} there are {', '.join(names)}")
    require(
        not (gated and q.shape[0] % (2 * TILE_ROWS)),
        f"q has {q.shape[0]} rows; gate and up must each be a multiple of {TILE_ROWS}, whole tiles",
    )
    return _launch("hidden", hidden, norm, q, bias, None, activation, gated, blocks)


def _launch(
    name: str,
    x: Tensor,
    norm: Norm | None,
    q: QuantizedWeight,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    gated: bool,
    blocks: Mapping[str, int] | None,
) -> Tensor:
    device = check_quantized_linear(x, q, bias, name)
    width, depth = q.shape
    num_rows, out_width = len(x), width // 2 if gated else width
    if norm is not None:
        check_norm("norm", norm, depth, device)
    if residual is not None:
        check("residual", residual, (num_rows, width), x.dtype, device, strided=True)
    out = torch.empty((num_rows, out_width), dtype=x.dtype, device=device)
    if out.numel() == 0:
        return out
    chosen = quantized_blocks("quantized_linear", x, q, blocks, normed=norm is not None, paired=gated)
    columns = chosen["BLOCK_N"] // 2 if gated else chosen["BLOCK_N"]
    require(columns % TILE_ROWS == 0, f"BLOCK_N is {chosen['BLOCK_N']}; a program's halves must be whole tiles")
    norm_weight, norm_bias, eps = (x, None, 0.0) if norm is None else norm[1:]
    strips = {"STRIP": 1, "CHUNK": 1} if norm is None else strips_for(depth, chosen["num_warps"])
    _quantized_linear_kernel[(triton.cdiv(num_rows, ROWS.value), triton.cdiv(out_width, columns))](
        x, norm_weight, norm_weight if norm_bias is None else norm_bias, q.data, q.scales,
        q.scales if q.zeros is None else q.zeros, q.scales if bias is None else bias,
        out if residual is None else residual, out, num_rows, width, depth, q.data.shape[1],
        x.stride(0), 0 if residual is None else residual.stride(0), eps,
        NORM="none" if norm is None else norm.kind, HAS_NORM_BIAS=norm_bias is not None,
        **strips, **form_of(q, chosen["SLICES"]),
        HAS_BIAS=bias is not None, HAS_RESIDUAL=residual is not None, ACTIVATION=activation, GATED=gated, **chosen,
    )  # fmt: skip
    return out


def tuning_problems(device: torch.device) -> Iterator[Problem]:
    """What `python -m handloom_kernels.tune quantized_linear` tries: the four weights of a layer of Llama-3.1-8B."""
    for width, depth in ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)):
        x = torch.randn(16, depth, dtype=torch.bfloat16, device=device)
        weight = torch.randn(width, depth, dtype=torch.bfloat16, device=device)
        gated = width == 28672
        norm = Norm("rms", weight[0], None, 1e-5)
        for kind, group in (("int8", 0), ("int4", 128), ("int4", 32), ("fp8", 0)):
            q = quantize_weight(weight, kind, group)
            mlp = partial(quantized_norm_mlp, x, norm, q, None, "silu", True)
            yield Problem(
                when={
                    "width": width,
                    "depth": depth,
                    "kind": kind,
                    "group": group,
                    "paired": gated,
                    "dtype": "bfloat16",
                },
                candidates=[each for each in CANDIDATES if each["BLOCK_N"] >= (2 if gated else 1) * TILE_ROWS],
                run=mlp if gated else partial(quantized_linear, x, q),
            )
