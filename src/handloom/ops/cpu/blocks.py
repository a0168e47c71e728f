"""The fused blocks of a step as instructions over float32 matrices that lie anywhere.

Both the per-op functions of this backend and the recorded step are made of these, and run by the same code: what one
computes, bit for bit, the other does. A matrix here is a 2-D float32 tensor whose rows are contiguous; its number of
rows is not looked at, for the frame of a run says how many there are.

This module does not know who runs instructions, nor models.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from handloom.checkpoint.quantization import Format, QuantizedRows
from handloom.ops.cpu import compiled, matrix_units
from handloom.ops.cpu import instructions as ins
from handloom.ops.cpu.instructions import Frame, Split
from handloom.ops.panels import PANEL, Panels, format_of
from handloom.ops.quantized_panels import QUANTIZED, QuantizedPanels
from handloom_kernels.reference import Norm, Rotary

Weight = Tensor | Panels | QuantizedPanels
Instructions = list[tuple[int | float, ...]]
MOST_SUMMED = 1 << 16  # products of 8 bits whose sum is an int32


class Scale(NamedTuple):
    """A norm as kernels take it: float32 weight (1 + weight where the norm says so) and bias."""

    layer: int
    weight: Tensor
    bias: Tensor | None
    eps: float

    @classmethod
    def of(cls, norm: Norm) -> Scale:
        weight = norm.weight.float().contiguous()
        bias = None if norm.bias is None else norm.bias.float().contiguous()
        return cls(
            int(norm.kind == "layer"), 1.0 + weight if norm.kind == "rms_unit_offset" else weight, bias, norm.eps
        )


def address(tensor: Tensor | None) -> int:
    """Where a tensor begins; 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()


def stride(matrix: Tensor) -> int:
    """Bytes from a row to the next."""
    return matrix.stride(0) * matrix.element_size()


def embed(weight: Weight, scale: float, position_weight: Tensor | None, dtype: torch.dtype, out: Tensor) -> ins.Embed:
    """out [TOKENS, H]: rows of `weight`, times the scale rounded to the weights' dtype, plus those of the positions."""
    in_panels = not isinstance(weight, Tensor)
    if isinstance(weight, QuantizedPanels):
        (segment,) = weight.segments
        data, form = segment.entries.ctypes.data, QUANTIZED
    else:
        data, form = address(weight.data), format_of(dtype)
    rounded = float(torch.tensor(scale, dtype=dtype, device="cpu")) if scale != 1.0 else 1.0
    table = 0 if position_weight is None else format_of(position_weight.dtype)
    return ins.Embed(
        data, form, int(in_panels), weight.shape[1], rounded, address(position_weight), table,
        address(out), stride(out),
    )  # fmt: skip


def norm_rows(
    x: Tensor, scale: Scale, out: Tensor, *, count: Frame = Frame.TOKENS, gather: bool = False,
    residual: Tensor | None = None,
) -> ins.NormRows:  # fmt: skip
    """out [count, H] = residual + norm(x); gather: of the rows that want logits. All have the same stride."""
    assert stride(x) == stride(out)
    assert residual is None or stride(residual) == stride(out)
    return ins.NormRows(
        int(count), address(x), x.shape[1], scale.layer, address(scale.weight), address(scale.bias), scale.eps,
        int(gather), address(residual), address(out), stride(out),
    )  # fmt: skip


def linear(
    x: Tensor, weight: Panels | QuantizedPanels, bias: Tensor | None, out: Tensor | None, *,
    residual: Tensor | None = None, softcap: float | None = None, count: Frame = Frame.TOKENS,
) -> Instructions:  # fmt: skip
    """out [count, M] = residual + softcap(x @ weight.T + bias); None: the run's logits. out may be residual.

    One instruction, or one for each segment of a quantised weight, which writes columns of its own. For matrix units
    another before them splits x.
    """
    depth, first, split = weight.shape[1], 0, int(split_for(weight))
    instructions: Instructions = [ins.SplitRows(int(count), address(x), stride(x), depth, split)] if split else []
    if isinstance(weight, QuantizedPanels):
        parts = [(QUANTIZED, 1, s.entries.ctypes.data, s.rows) for s in weight.segments]
    else:
        parts = [(weight.format, weight.data.element_size(), address(weight.data), weight.shape[0])]
    assert out is not None or len(parts) == 1
    for form, size, data, columns in parts:
        ours, theirs, added = (None if t is None else t[..., first : first + columns] for t in (out, residual, bias))
        instruction = ins.Linear(
            int(count), address(x), stride(x), form, size, data, columns, depth, address(added), address(theirs),
            0 if theirs is None else stride(theirs), softcap or 0.0, int(out is None), address(ours),
            4 * columns if ours is None else stride(ours), split,
        )  # fmt: skip
        instructions.append(instruction)
        first += columns
    return instructions


def split_for(weight: Panels | QuantizedPanels) -> Split:
    """How rows are taken for this weight."""
    if isinstance(weight, Panels):
        return Split.PIECES if weight.dtype == torch.bfloat16 and matrix_units.usable() else Split.NONE
    formats, depth = [segment.like.format for segment in weight.segments], weight.shape[1]
    fits = all(takes_whole(form) for form in formats) and depth % ins.BLOCK == 0 and depth <= MOST_SUMMED
    return Split.WHOLE if fits and has_whole_numbers() else Split.NONE


def has_whole_numbers() -> bool:
    """Whether this process multiplies codes as they are with whole numbers, in matrix units or in vectors."""
    return matrix_units.usable() or compiled.has_words()


def takes_whole(form: Format) -> bool:
    """Whether there are products of whole numbers with such codes."""
    if form.bits == 8 and not form.group:
        return True
    return form.scale != "float32" and form.group % (16 if form.bits == 6 else 32) == 0 < form.group


def activate(x: Tensor, activation: str, gated: bool, out: Tensor) -> ins.Activate:
    """out [TOKENS, I] = activation(x[:, :I]), times x[:, I:] if gated."""
    kind = int(ins.Activation[activation.upper()])
    return ins.Activate(address(x), stride(x), out.shape[1], int(gated), kind, address(out), stride(out))


def finish_qkv(
    qkv: Tensor, q_norm: Scale | None, k_norm: Scale | None, rotary: Rotary | None, k_pages: Tensor, v_pages: Tensor
) -> ins.Qkv:
    """Norm and rotate q and k of qkv [TOKENS, ...] in place; write k and v to their pages."""
    num_kv_heads, head_dim = k_pages.shape[-2:]
    v_head_dim = v_pages.shape[-1]
    num_heads = (qkv.shape[1] - num_kv_heads * (head_dim + v_head_dim)) // head_dim
    nothing = Scale(0, torch.empty(0, device="cpu"), None, 0.0)
    q, k = q_norm or nothing, k_norm or nothing
    half, interleaved = (0, 0) if rotary is None else (rotary.cos.shape[-1], int(rotary.interleaved))
    cos, sin = (None, None) if rotary is None else (rotary.cos, rotary.sin)
    return ins.Qkv(
        address(qkv), stride(qkv), num_heads, num_kv_heads, head_dim, v_head_dim, address(q_norm and q.weight), q.eps,
        address(k_norm and k.weight), k.eps, address(cos), address(sin), half, interleaved, address(k_pages),
        address(v_pages), format_of(k_pages.dtype), q.layer or k.layer, address(q.bias), address(k.bias),
    )  # fmt: skip


def attend(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, scale: float, window: int | None, softcap: float | None,
    sinks: Tensor | None, slopes: Tensor | None, out: Tensor,
) -> Instructions:  # fmt: skip
    """out [TOKENS, num_heads * v_head_dim] of q [TOKENS, num_heads, head_dim]; sinks, slopes float32 [num_heads]."""
    (num_heads, head_dim), num_kv_heads, v_head_dim = q.shape[1:], k_pages.shape[2], v_pages.shape[-1]
    return [
        ins.Attention(
            address(q), stride(q), num_heads, num_kv_heads, head_dim, v_head_dim, address(k_pages), address(v_pages),
            format_of(k_pages.dtype), scale, window or 0, softcap or 0.0, address(sinks), address(slopes), address(out),
            stride(out),
        ),
        ins.Combine(num_heads, num_kv_heads, v_head_dim, window or 0, address(sinks), address(out), stride(out)),
    ]  # fmt: skip


def quantize(weights: Tensor, out: QuantizedRows, failed: Tensor) -> ins.Quantize:
    """out = codes of weights [TOKENS, K], in the format of a `Scheme`; failed: int64 [1], see ins.Quantize."""
    form, planes = out.format, dict(out.planes())
    minimum = planes.get("minimum")
    return ins.Quantize(
        address(weights), stride(weights), format_of(weights.dtype), out.columns, form.group or out.columns, form.bits,
        int(minimum is None), int(form.scale == "float32"), address(out.low), stride(out.low), address(out.scale),
        stride(out.scale), address(minimum), 0 if minimum is None else stride(minimum), address(failed),
    )  # fmt: skip


def perturb(
    scores: NDArray[np.float32], floors: NDArray[np.float32], keys: NDArray[np.int64], out: NDArray[np.float32]
) -> ins.Perturb:
    """out [ROWS, V] = scores + noise; floors [ROWS], keys [ROWS, 3]."""
    first, least, key, noisy = (own.__array_interface__["data"][0] for own in (scores, floors, keys, out))
    return ins.Perturb(first, scores.strides[0], scores.shape[1], least, key, noisy, out.strides[0])


def scratch_bytes(rows: Instructions) -> int:
    """What one thread needs for these instructions; see `linear.linear_item` and `attention.attend`."""
    most = (ins.ROWS * ins.GROUP + 2 + ins.BLOCK) * PANEL * 4
    for row in rows:
        if isinstance(row, ins.Attention):
            group = row.num_heads // row.num_kv_heads
            queries = max(1, ins.ITEM_ROWS // group) * group
            d, dv = (-(-width // PANEL) * PANEL for width in (row.head_dim, row.v_head_dim))
            floats = queries * (d + dv + 32) + ins.CHUNK * (dv + ins.SPLIT + 48) + ins.SPLIT * (d + dv) + 16 * d
            most = max(most, 4 * floats + 8 * (2 * ins.SPLIT + 32 + d) // 16)
        elif isinstance(row, ins.SplitRows) and row.split == Split.PIECES:
            most = max(most, 4 * (3 * 32 * PANEL + ins.PIECES * (row.depth + ins.TILE_DEPTH)))
        elif isinstance(row, ins.SplitRows) and row.split == Split.WHOLE:
            sums, codes = ins.ROWS * ins.GROUP + 8 * ins.QUAD * ins.DIGITS, 2 * PANEL + PANEL // 8
            most = max(most, 4 * PANEL * sums + row.depth * codes + PANEL)
    return -(-most // 64) * 64


def kept_bytes(rows: Instructions) -> int:
    """What attention keeps of a query and a split of its keys."""
    records = [
        4 * row.num_heads * (-(-row.v_head_dim // PANEL) * PANEL + 32) for row in rows if isinstance(row, ins.Combine)
    ]
    return max(records, default=0)


def split_bytes(rows: Instructions) -> int:
    """What is kept of QUAD rows, of any that these instructions split."""
    most = 0
    for row in rows:
        if isinstance(row, ins.SplitRows):
            pieces = ins.QUAD * ins.PIECES * 2 * -(-row.depth // ins.TILE_DEPTH) * ins.TILE_DEPTH
            whole = max(ins.quad_bytes(row.depth), ins.QUAD * ins.word_bytes(row.depth))
            most = max(most, pieces if row.split == Split.PIECES else whole)
    return most


def kept_splits(query_lens: Iterable[int], context_lens: Iterable[int]) -> int:
    """Of how many queries and splits, at most, attention keeps sums between its two instructions."""
    return sum(
        new * -(-length // ins.SPLIT)
        for new, length in zip(query_lens, context_lens, strict=True)
        if new <= ins.QUERY_ROWS and length > ins.SPLIT
    )
