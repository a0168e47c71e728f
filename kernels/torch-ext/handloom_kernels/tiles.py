"""What several kernels share: the norm of a tile of rows on its way into a product, and its checks; tanh; tickets.

A program that multiplies ROWS rows of x with its part of a weight norms them itself, for x is small and in the
second-level cache: `row_statistics` first, over whole rows, then `normed_tile` for each step along them.

Programs that share a piece of work each draw a ticket when their part lies in the workspace, and who draws the last one
finishes the work: nobody waits, and no second launch is needed (`is_last`).

This module does not know which product follows, or what is shared. Meaning and rounding: `reference.normalize`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .checks import FLOATS, check, require
from .reference.norm import NORM_KINDS, Norm

ROWS = tl.constexpr(16)  # of x in one program: the least that tensor cores multiply
ENOUGH_PROGRAMS = 112  # to keep most of 132 multiprocessors (H100) or 108 (A100) reading
MAX_CHUNK = 4096  # elements of a row that are read at once for its statistics
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def row_statistics(
    x, x_stride, first, num_rows, depth, eps, KIND: tl.constexpr, STRIP: tl.constexpr, CHUNK: tl.constexpr
):
    """(mean, 1 / deviation), each [ROWS, 1], of x's rows first, first + 1, ...; the mean is 0 unless KIND is "layer".

    STRIP rows and CHUNK of their elements at a time, all of whose loads are on their way at once.
    """
    strips = tl.arange(0, ROWS // STRIP)[:, None]
    mean = tl.zeros([ROWS // STRIP, STRIP], tl.float32)
    scale = tl.zeros([ROWS // STRIP, STRIP], tl.float32)
    columns = tl.arange(0, CHUNK)[None, :]
    for strip in range(tl.cdiv(tl.minimum(num_rows - first, ROWS), STRIP)):
        rows = first + STRIP * strip + tl.arange(0, STRIP)[:, None]
        at = x + rows.to(tl.int64) * x_stride + columns
        centre = tl.zeros([STRIP], tl.float32)
        if KIND == "layer":
            for start in range(0, depth, CHUNK):
                inside = (rows < num_rows) & (start + columns < depth)
                centre += tl.sum(tl.load(at + start, mask=inside, other=0.0).to(tl.float32), axis=1)
            centre /= depth
        squares = tl.zeros([STRIP], tl.float32)
        for start in range(0, depth, CHUNK):
            inside = (rows < num_rows) & (start + columns < depth)
            value = tl.load(at + start, mask=inside, other=0.0).to(tl.float32)
            if KIND == "layer":
                value = tl.where(inside, value - centre[:, None], 0.0)
            squares += tl.sum(value * value, axis=1)
        mean = tl.where(strips == strip, centre[None, :], mean)
        scale = tl.where(strips == strip, tl.rsqrt(squares / depth + eps)[None, :], scale)
    return tl.reshape(mean, [ROWS, 1]), tl.reshape(scale, [ROWS, 1])


@triton.jit
def of_columns(values, columns, inside):
    """The norm's weight or bias at these columns, in float32; 0 where not inside."""
    return tl.load(values + columns, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def normed_tile(x, mean, scale, w, b, KIND: tl.constexpr, HAS_BIAS: tl.constexpr, dtype: tl.constexpr):
    """A float32 tile normalised and rounded as `reference.normalize` does, in `dtype`.

    mean, scale: of the rows; w, b: the norm's weight and bias of the columns (`of_columns`). Each has 1 along the axes
    of the tile on which it does not depend.
    """
    if KIND == "rms":
        y = (x * scale).to(dtype).to(tl.float32) * w
    elif KIND == "rms_unit_offset":
        y = x * scale * (1.0 + w)
    else:
        y = (x - mean) * scale * w
        if HAS_BIAS:
            y += b
    return y.to(dtype)


@triton.jit
def tanh(x):
    """To float32's precision; near 0, where 1 - exp cancels, by the polynomial of Cephes' tanhf (Moshier 1992)."""
    square = x * x
    small = -5.70498872745e-3 * square + 2.06390887954e-2
    small = small * square - 5.37397155531e-2
    small = small * square + 1.33314422036e-1
    small = small * square - 3.33332819422e-1
    small = small * square * x + x
    large = 1.0 - 2.0 / (tl.exp2(tl.abs(x) * (2 * LOG2_E)) + 1.0)
    return tl.where(tl.abs(x) < 0.625, small, tl.where(x < 0, -large, large))


@triton.jit
def is_last(ticket, count):
    """Draw a ticket; the last of `count` to draw sees what all of them stored before, and puts the ticket back to 0.

    One thread draws, with release and acquire for the whole GPU. The barriers order all threads' stores before it, and
    their loads of what others stored after it. AMD's barrier does not wait for stores that are on their way to memory,
    and the draw only for those of its own wave: there each wave first waits for its own.
    """
    if tl.target_info.is_hip():
        wait: tl.constexpr = "s_waitcnt vmcnt(0)\n\tv_mov_b32 $0, $1"
        count += tl.inline_asm_elementwise(wait, "=v,v,~{memory}", [0], tl.int32, is_pure=False, pack=1)
    tl.debug_barrier()
    drawn = tl.atomic_add(ticket, 1, sem="acq_rel", scope="gpu")
    last = drawn == count - 1
    if last:
        tl.debug_barrier()
        tl.store(ticket, 0)
    return last


def check_norm(name: str, norm: Norm, width: int, device: torch.device) -> None:
    """Raise KernelError unless `norm` fits rows of `width`."""
    require(norm.kind in NORM_KINDS, f"{name}.kind is {norm.kind!r}; there are {', '.join(NORM_KINDS)}")
    check(f"{name}.weight", norm.weight, (width,), FLOATS, device)
    if norm.bias is not None:
        require(norm.kind == "layer", f"{name}.bias is given, and a norm of kind {norm.kind} has none")
        check(f"{name}.bias", norm.bias, (width,), FLOATS, device)


def strips_for(depth: int, num_warps: int) -> dict[str, int]:
    """STRIP and CHUNK of `row_statistics`: at most 128 elements a thread."""
    return {"STRIP": min(num_warps, ROWS.value), "CHUNK": min(MAX_CHUNK, max(16, triton.next_power_of_2(depth)))}
