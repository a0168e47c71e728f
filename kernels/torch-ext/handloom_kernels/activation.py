"""Activations of the MLP, alone or as the gate of the other half.

    silu        x * sigmoid(x)                            Elfwing et al. 2017; as a gate: SwiGLU (Shazeer 2020)
    gelu        x * (1 + erf(x / sqrt(2))) / 2            Hendrycks & Gimpel 2016; as a gate: GeGLU
    gelu_tanh   x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3))) / 2
    relu, relu2 max(x, 0) and its square                  So et al. 2021
    swiglu_oss  g * sigmoid(1.702 g) * (u + 1), g at most 7 and u within -7 and 7    gpt-oss, only as a gate

One program owns one tile of one row of the result:

    x   [ gate 0 | gate 1 | gate ## | up 0 | up 1 | up ## ]   I + I columns, one row
            |                            |
            +--- act(gate) * up ---------+
            v
    out [ tile 0 | tile 1 | tile ## ]                         I columns; program (row, tile)

To move: I elements in (2 I with a gate) and I out per row; about 10 FLOPs an element. Bound by memory. The tiles are
functions of their own, for the kernels that end in an activation.

This module does not know what feeds them.
"""

from __future__ import annotations

from functools import partial
from typing import Iterator, Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .checks import FLOATS, check, check_device, require
from .reference.activation import ACTIVATIONS, GATED_ACTIVATIONS
from .tuning import Problem, config

BLOCK = 1024


@triton.jit
def activate_tile(x, ACTIVATION: tl.constexpr):
    """`reference.activate` of a float32 tile."""
    if ACTIVATION == "silu":
        y = x * tl.sigmoid(x)
    elif ACTIVATION == "gelu":
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        # (1 + tanh(u)) / 2 = sigmoid(2u), which no u overflows; sqrt(8 / pi) = 1.5957691216057308
        y = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif ACTIVATION == "relu":
        y = tl.where(x < 0.0, 0.0, x)
    else:
        tl.static_assert(ACTIVATION == "relu2", "an unknown activation")
        y = tl.where(x < 0.0, 0.0, x * x)
    return y


@triton.jit
def gate_tile(gate, up, ACTIVATION: tl.constexpr):
    """`reference.gated_activation` of float32 tiles of the gate and of the other half."""
    if ACTIVATION == "swiglu_oss":
        gate = tl.where(gate > 7.0, 7.0, gate)
        up = tl.where(up > 7.0, 7.0, tl.where(up < -7.0, -7.0, up))
        y = gate * tl.sigmoid(1.702 * gate) * (up + 1.0)
    else:
        y = activate_tile(gate, ACTIVATION) * up
    return y


@triton.jit
def _activation_kernel(x, out, x_stride, width, ACTIVATION: tl.constexpr, GATED: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    x += row * x_stride
    y = tl.load(x + columns, mask=inside, other=0.0).to(tl.float32)
    if GATED:
        up = tl.load(x + width + columns, mask=inside, other=0.0).to(tl.float32)
        y = gate_tile(y, up, ACTIVATION)
    else:
        y = activate_tile(y, ACTIVATION)
    tl.store(out + row * width + columns, y.to(out.dtype.element_ty), mask=inside)


def activate(x: Tensor, activation: str, *, blocks: Mapping[str, int] | None = None) -> Tensor:
    """`reference.activate`: x [..., I] float32, float16 or bfloat16, rows of any stride, to a new tensor like it.

    blocks: overrides the block sizes of the tuning table. Raises KernelError.
    """
    require(activation in ACTIVATIONS, f"activation is {activation!r}; there are {', '.join(ACTIVATIONS)}")
    return _launch(x, activation, False, blocks)


def gated_activation(x: Tensor, activation: str, *, blocks: Mapping[str, int] | None = None) -> Tensor:
    """`reference.gated_activation`: x [..., 2 * I], the gate's columns first, rows of any stride, to a new [..., I].

    float32, float16 or bfloat16; rounded once, at the end. blocks: as in `activate`. Raises KernelError.
    """
    names = ", ".join(GATED_ACTIVATIONS)
    require(activation in GATED_ACTIVATIONS, f"activation is {activation!r}; there are {names}")
    return _launch(x, activation, True, blocks)


def _launch(x: Tensor, activation: str, gated: bool, blocks: Mapping[str, int] | None) -> Tensor:
    device = check_device("x", x)
    require(x.dim() > 0, "x must have at least one dimension")
    check("x", x, x.shape, FLOATS, device, strided=True)
    columns = x.shape[-1]
    require(not (gated and columns % 2), f"x has {columns} columns, which are not two halves")
    width = columns // 2 if gated else columns
    out = torch.empty((*x.shape[:-1], width), dtype=x.dtype, device=device)
    if out.numel() == 0:
        return out
    rows = x.reshape(-1, columns)
    chosen = blocks_for(x, width, gated, blocks)
    grid = (len(rows), triton.cdiv(width, chosen["BLOCK"]))
    _activation_kernel[grid](rows, out, rows.stride(0), width, ACTIVATION=activation, GATED=gated, **chosen)
    return out


def blocks_for(x: Tensor, width: int, gated: bool, override: Mapping[str, int] | None = None) -> dict[str, int]:
    """BLOCK (columns of a tile) and num_warps for a result of this width."""
    block = min(BLOCK, triton.next_power_of_2(width))
    threads = 64 if tuning.is_hip() else 32
    default = {"BLOCK": block, "num_warps": max(1, block // (8 * threads))}
    dtype = str(x.dtype).removeprefix("torch.")
    return config("activation", x.device, default, override, width=width, dtype=dtype, gated=gated)


def tuning_problems(device: torch.device) -> Iterator[Problem]:
    """What `python -m handloom_kernels.tune activation` tries."""
    for width in (1536, 3072, 8192, 14336):
        x = torch.randn(64, 2 * width, dtype=torch.bfloat16, device=device)
        yield Problem(
            when={"width": width, "dtype": "bfloat16", "gated": True},
            candidates=[{"BLOCK": b, "num_warps": w} for b in (512, 1024, 2048, 4096) for w in (2, 4, 8)],
            run=partial(gated_activation, x, "silu"),
        )
