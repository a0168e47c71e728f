"""Linear layers for few rows (1 to 16 at a time), with the norm before them and what follows fused.

    linear            x W' + b
    linear_residual   residual + post_norm(x W' + b)
    norm_mlp          act(norm(x) Wg' + bg) * (norm(x) Wu' + bu), or act(norm(x) W' + b)

With few rows the weight is nearly all there is to move, so every element of it is read once, and everything else is
made to fit around that. One program owns BLOCK_N rows of the weight, which are columns of the result, and walks along
all of them together:

             <------------- depth ------------->                          BLOCK_N
    x     16 [ step 0 | step 1 | step 2 | .... ]  x  depth [ the weight's rows, turned ]  =  [  acc  ] 16
             rows past the last are not read                                              then the epilogue
    weight
      program 0  BLOCK_N [ step 0 | step 1 | step 2 | .... ]      each step: 16-byte loads, copied to shared memory
      program 1  BLOCK_N [ step 0 | step 1 | step 2 | .... ]      num_stages ahead of the multiplication

The tensor cores multiply 16 rows at a time whether they are there or not, which costs nothing while memory is the
limit, so that one kernel with one order of sums serves 1 to 16 rows: a row's result does not depend on its company.
More than 16 rows are more programs with the same weight, right but slower than a BLAS.

A norm before the product is computed by each program for itself, since x is small and in the second-level cache: first
the statistics of the rows, then each step of x is normalised on its way to the multiplication. A gated MLP's program
takes its rows of the weight in pairs, gate, up, gate, up: the accumulator's neighbours are then what the activation
needs, in one thread's registers.

To move: 2 bytes an element of a 16-bit weight, and little else; 2 FLOPs an element and row. Nothing is split along the
depth: with BLOCK_N = 16, 2048 columns are 128 programs for the 132 multiprocessors of an H100. The memory's latency is
filled by about 2.5 MB on the way (3.35 TB/s for 0.7 us); 64 programs for 1024 columns (Qwen3-0.6B), each with 40 KB of
the weight on the way, still reach that. The whole product takes 1.3 us there, and the partial sums of a split depth
would take about 1 us to meet.

This module does not know attention or pages. Meaning and rounding: `reference.linear_residual`, `reference.norm_mlp`.
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
from .norm import normalize_add
from .reference.activation import ACTIVATIONS, GATED_ACTIVATIONS
from .reference.norm import Norm
from .tiles import ENOUGH_PROGRAMS, ROWS, check_norm, normed_tile, of_columns, row_statistics, strips_for
from .tuning import Problem, config


@triton.jit
def product(
    x,
    x_stride,
    first,
    num_rows,
    norm_weight,
    norm_bias,
    eps,
    weight,
    weight_rows,
    rows_inside,
    depth,
    NORM: tl.constexpr,
    HAS_NORM_BIAS: tl.constexpr,
    EVEN: tl.constexpr,
    STRIP: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """norm(x[first : first + ROWS]) @ weight[weight_rows].T, float32 [ROWS, len(weight_rows)].

    weight_rows may be any rows in any order; those not inside are not read. NORM: a kind of norm, or "none".
    EVEN: depth is a multiple of BLOCK_K.
    """
    if NORM != "none":
        mean, scale = row_statistics(x, x_stride, first, num_rows, depth, eps, NORM, STRIP, CHUNK)
    rows = first + tl.arange(0, ROWS)
    k = tl.arange(0, BLOCK_K)
    x_at = x + rows.to(tl.int64)[:, None] * x_stride + k[None, :]
    weight_at = weight + weight_rows.to(tl.int64)[None, :] * depth + k[:, None]
    acc = tl.zeros([ROWS, weight_rows.shape[0]], tl.float32)
    for start in range(0, depth, BLOCK_K):
        inside = k < (BLOCK_K if EVEN else depth - start)
        a = tl.load(x_at + start, mask=(rows < num_rows)[:, None] & inside[None, :], other=0.0)
        if NORM != "none":
            w = of_columns(norm_weight, start + k, inside)[None, :]
            shift = of_columns(norm_bias, start + k, inside)[None, :]
            a = normed_tile(a.to(tl.float32), mean, scale, w, shift, NORM, HAS_NORM_BIAS, a.dtype)
        b = tl.load(weight_at + start, mask=rows_inside[None, :] & inside[:, None], other=0.0)
        acc = tl.dot(a, b, acc, input_precision="ieee")
    return acc


@triton.jit(do_not_specialize=["num_rows"])
def _linear_kernel(
    x,
    weight,
    bias,
    residual,
    out,
    num_rows,
    width,
    depth,
    x_stride,
    residual_stride,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    first = tl.program_id(0) * ROWS
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = columns < width
    y = product(
        x, x_stride, first, num_rows, x, x, 0.0, weight, columns, inside, depth, "none", False, EVEN, 1, 1, BLOCK_K
    )
    if HAS_BIAS:
        y += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    y = y.to(out.dtype.element_ty)
    rows = (first + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    mask = (rows < num_rows) & inside[None, :]
    if HAS_RESIDUAL:
        kept = tl.load(residual + rows * residual_stride + columns[None, :], mask=mask, other=0.0)
        y = (kept.to(tl.float32) + y.to(tl.float32)).to(out.dtype.element_ty)
    tl.store(out + rows * width + columns[None, :], y, mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def _norm_mlp_kernel(
    x,
    norm_weight,
    norm_bias,
    weight,
    bias,
    out,
    num_rows,
    width,
    depth,
    x_stride,
    eps,
    NORM: tl.constexpr,
    HAS_NORM_BIAS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    EVEN: tl.constexpr,
    STRIP: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    first = tl.program_id(0) * ROWS
    PARTS: tl.constexpr = 2 if GATED else 1
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    weight_rows = n // PARTS + n % PARTS * width
    inside = n // PARTS < width
    y = product(
        x, x_stride, first, num_rows, norm_weight, norm_bias, eps, weight, weight_rows, inside, depth,
        NORM, HAS_NORM_BIAS, EVEN, STRIP, CHUNK, BLOCK_K,
    )  # fmt: skip
    if HAS_BIAS:
        y += tl.load(bias + weight_rows, mask=inside, other=0.0).to(tl.float32)[None, :]
    y = y.to(out.dtype.element_ty).to(tl.float32)
    if GATED:
        gate, up = tl.split(tl.reshape(y, [ROWS, BLOCK_N // 2, 2]))
        y = gate_tile(gate, up, ACTIVATION)
    else:
        y = activate_tile(y, ACTIVATION)
    rows = (first + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    columns = (tl.program_id(1) * (BLOCK_N // PARTS) + tl.arange(0, BLOCK_N // PARTS))[None, :]
    tl.store(out + rows * width + columns, y.to(out.dtype.element_ty), mask=(rows < num_rows) & (columns < width))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, blocks: Mapping[str, int] | None = None) -> Tensor:
    """`torch.nn.functional.linear`: x [N, K], rows of any stride, and weight [M, K] of one dtype, to [N, M].

    float32, float16 or bfloat16; bias [M] may have any of these. blocks: overrides the block sizes of the tuning table.
    Raises KernelError.
    """
    return _launch_linear(x, weight, bias, None, blocks)


def linear_residual(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    post_norm: Norm | None,
    residual: Tensor,
    *,
    blocks: Mapping[str, int] | None = None,
) -> Tensor:
    """`reference.linear_residual`: x [N, K], weight [H, K], residual [N, H] of one dtype, to a new [N, H].

    float32, float16 or bfloat16; x and residual may have rows of any stride. One launch; with a post_norm, which needs
    whole rows, two. blocks: as in `linear`. Raises KernelError.
    """
    if post_norm is None:
        return _launch_linear(x, weight, bias, residual, blocks)
    device = check_linear(x, weight, bias, "x")
    check("residual", residual, (len(x), len(weight)), x.dtype, device, strided=True)
    check_norm("post_norm", post_norm, len(weight), device)
    return normalize_add(_launch_linear(x, weight, bias, None, blocks), residual, post_norm)


def norm_mlp(
    hidden: Tensor,
    norm: Norm,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    gated: bool,
    *,
    blocks: Mapping[str, int] | None = None,
) -> Tensor:
    """`reference.norm_mlp`: hidden [N, H], weight [2 * I or I, H] of one dtype, to a new [N, I].

    float32, float16 or bfloat16; hidden may have rows of any stride; bias, norm.weight and norm.bias may have any of
    these dtypes. The activation is computed in float32 and rounded once. blocks: as in `linear`. Raises KernelError.
    """
    names = GATED_ACTIVATIONS if gated else ACTIVATIONS
    kind = "as a gate" if gated else "alone"
    require(activation in names, f"activation is {activation!r}; {kind} there are {', '.join(names)}")
    device = check_linear(hidden, weight, bias, "hidden")
    depth = hidden.shape[1]
    check_norm("norm", norm, depth, device)
    require(not (gated and len(weight) % 2), f"weight has {len(weight)} rows, which are not gate and up")
    width = len(weight) // 2 if gated else len(weight)
    out = torch.empty((len(hidden), width), dtype=hidden.dtype, device=device)
    if out.numel() == 0:
        return out
    chosen = blocks_for("linear", hidden, len(weight), blocks)
    grid = (triton.cdiv(len(hidden), ROWS.value), triton.cdiv(len(weight), chosen["BLOCK_N"]))
    _norm_mlp_kernel[grid](
        hidden,
        norm.weight,
        norm.weight if norm.bias is None else norm.bias,
        weight,
        weight if bias is None else bias,
        out,
        len(hidden),
        width,
        depth,
        hidden.stride(0),
        norm.eps,
        NORM=norm.kind,
        HAS_NORM_BIAS=norm.bias is not None,
        HAS_BIAS=bias is not None,
        ACTIVATION=activation,
        GATED=gated,
        EVEN=depth % chosen["BLOCK_K"] == 0,
        **strips_for(depth, chosen["num_warps"]),
        **chosen,
    )
    return out


def _launch_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, blocks: Mapping[str, int] | None
) -> Tensor:
    device = check_linear(x, weight, bias, "x")
    (num_rows, depth), width = x.shape, len(weight)
    if residual is not None:
        check("residual", residual, (num_rows, width), x.dtype, device, strided=True)
    out = torch.empty((num_rows, width), dtype=x.dtype, device=device)
    if out.numel() == 0:
        return out
    chosen = blocks_for("linear", x, width, blocks, normed=False)
    _linear_kernel[(triton.cdiv(num_rows, ROWS.value), triton.cdiv(width, chosen["BLOCK_N"]))](
        x,
        weight,
        weight if bias is None else bias,
        out if residual is None else residual,
        out,
        num_rows,
        width,
        depth,
        x.stride(0),
        0 if residual is None else residual.stride(0),
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        EVEN=depth % chosen["BLOCK_K"] == 0,
        **chosen,
    )
    return out


def check_linear(x: Tensor, weight: Tensor, bias: Tensor | None, name: str) -> torch.device:
    """The device of x [N, K], called `name`, if weight [M, K] and bias [M] fit it. Raises KernelError."""
    device = check_device(name, x)
    check(name, x, (None, None), FLOATS, device, strided=True)
    check("weight", weight, (None, x.shape[1]), x.dtype, device)
    if bias is not None:
        check("bias", bias, (len(weight),), FLOATS, device)
    return device


def blocks_for(
    kernel: str,
    x: Tensor,
    width: int,
    override: Mapping[str, int] | None = None,
    *,
    normed: bool = True,
    meet: bool = False,
    widest: int = 64,
) -> dict[str, int]:
    """BLOCK_N (rows of the weight in a program), BLOCK_K (elements of a step), num_warps and num_stages.

    Of a weight [width, depth], never of a number of rows of x. A program is as wide as leaves enough programs. Where x
    is normed, steps are short, so that what each warp norms fits in its registers, and beside 16 rows of the weight
    there are 2 warps, if no wide head has to meet in one program. 28 to 48 KB of the weight are on the way.
    """
    depth = x.shape[1]
    block_n = next((n for n in (64, 32) if n <= widest and width // n >= ENOUGH_PROGRAMS), 16)
    stages = {16: 8, 32: 6, 64: 4} if normed else {16: 6, 32: 4, 64: 3}
    step = (128 if normed else 256) * 2 // x.element_size()
    default = {
        "BLOCK_N": block_n,
        "BLOCK_K": max(16, min(step, triton.next_power_of_2(depth))),
        "num_warps": 2 if normed and block_n == 16 and not meet else 4,
        "num_stages": 2 if tuning.is_hip() else stages[block_n],
    }
    dtype = str(x.dtype).removeprefix("torch.")
    shape: dict[str, int | str | bool] = {"width": width, "depth": depth, "kind": "float", "normed": normed}
    return config(kernel, x.device, default, override, **shape, dtype=dtype)


def tuning_problems(device: torch.device) -> Iterator[Problem]:
    """What `python -m handloom_kernels.tune linear` tries: Llama-3.2-1B, Llama-3.1-8B and Qwen3-0.6B."""
    for width, depth in ((2048, 2048), (2048, 8192), (4096, 4096), (4096, 14336), (1024, 2048), (1024, 3072)):
        x, residual, weight = _random(device, (1, depth), (1, width), (width, depth))
        yield Problem(
            when={"width": width, "depth": depth, "dtype": "bfloat16", "normed": False},
            candidates=CANDIDATES,
            run=partial(linear_residual, x, weight, None, None, residual),
        )
    for width, depth in ((16384, 2048), (28672, 4096), (6144, 1024)):
        x, weight = _random(device, (1, depth), (width, depth))
        yield Problem(
            when={"width": width, "depth": depth, "dtype": "bfloat16", "normed": True},
            candidates=CANDIDATES,
            run=partial(norm_mlp, x, Norm("rms", weight[0], None, 1e-6), weight, None, "silu", True),
        )


def _random(device: torch.device, *shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(shape, dtype=torch.bfloat16, device=device) for shape in shapes]


CANDIDATES = [
    {"BLOCK_N": n, "BLOCK_K": k, "num_warps": w, "num_stages": s}
    for n in (16, 32, 64, 128)
    for k in (128, 256, 512)
    for w in (2, 4, 8)
    for s in (3, 4, 6, 8)
    if (s - 1) * n * k * 2 >= 16384 and (s - 1) * (16 + n) * k * 2 <= 163840
]
