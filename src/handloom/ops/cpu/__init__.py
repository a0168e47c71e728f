"""The ops as compiled CPU code: see `Ops` for their names, and `handloom_kernels.reference` for their meaning.

Arithmetic is float32 whatever the weights are held in, and so are hidden states: `embed` begins with float32, and each
op gives back the dtype of the states it was given. Sums have one order for each row, on every processor and with any
number of threads: a row's result depends on nothing but that row.

Weights of the linears come in panels, quantised or not, or as plain matrices, which are then laid out for the call:
right, and slow.

This package does not know about models, sequences or requests.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from handloom.checkpoint.quantization import QuantizedMatrix, QuantizedRows
from handloom.checkpoint.quantize import not_quantizable
from handloom.ops.cpu import blocks, compiled, matrix_units
from handloom.ops.cpu.blocks import Scale, Weight, address
from handloom.ops.cpu.compiled import compiled_step, is_loaded, require
from handloom.ops.cpu.instructions import Frame
from handloom.ops.cpu.machine import run_bare, run_once
from handloom.ops.cpu.program import Program, buffer, heads_of
from handloom.ops.panels import FORMATS, Panels, format_of
from handloom.ops.quantized_panels import QuantizedPanels
from handloom_kernels.reference import Norm, Rotary

__all__ = [
    "Panels",
    "Program",
    "QuantizedPanels",
    "compiled",
    "compiled_step",
    "embed",
    "format_of",
    "hold",
    "is_loaded",
    "linear_residual",
    "lm_head",
    "matrix_units",
    "norm_mlp",
    "norm_qkv",
    "paged_attention",
    "perturb",
    "quantize_rows",
    "require",
    "take",
]

FEW_SCORES = 2**17  # no more than this are one thread's work: to call others takes as long


def hold(weight: Tensor | QuantizedMatrix) -> Panels | QuantizedPanels:
    """A matrix as the kernels read it. Raises UnsupportedOption for a dtype that they do not read."""
    return QuantizedPanels.pack(weight) if isinstance(weight, QuantizedMatrix) else Panels.pack(weight)


def take(weight: Tensor | QuantizedMatrix) -> Panels | QuantizedPanels:
    """`hold` of a matrix that nobody else uses, whose memory becomes that of the panels if it has room for them."""
    return QuantizedPanels.take(weight) if isinstance(weight, QuantizedMatrix) else Panels.take(weight)


def quantize_rows(weights: Tensor, out: QuantizedRows) -> None:
    """`handloom.checkpoint.quantize.quantize_rows`, to the bit. Raises CheckpointError as it does."""
    rows = weights if weights.dtype in FORMATS and weights.stride(-1) == 1 else weights.float().contiguous()
    failed = torch.zeros(1, dtype=torch.int64, device="cpu")
    run_once([blocks.quantize(rows, out, failed)], {Frame.TOKENS: len(rows)})
    if failed:
        raise not_quantizable()


def _panels(weight: Weight) -> Panels | QuantizedPanels:
    return hold(weight) if isinstance(weight, Tensor) else weight


def _matrix(x: Tensor) -> Tensor:
    """x [N, K] as the kernels take it."""
    out = buffer(*x.shape)
    out.copy_(x)
    return out


def _vector(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.float().contiguous()


def _scale(norm: Norm | None) -> Scale | None:
    return None if norm is None else Scale.of(norm)


def embed(input_ids: Tensor, weight: Weight, scale: float, positions: Tensor, position_weight: Tensor | None) -> Tensor:
    """See `handloom_kernels.reference.embed`; float32."""
    input_ids, positions = input_ids.contiguous(), positions.contiguous()
    out = buffer(len(input_ids), weight.shape[1])
    frame = {Frame.TOKENS: len(out), Frame.INPUT_IDS: address(input_ids), Frame.POSITIONS: address(positions)}
    run_once([blocks.embed(weight, scale, position_weight, weight.dtype, out)], frame)
    return out


def norm_qkv(
    hidden: Tensor,
    norm: Norm,
    weight: Weight,
    bias: Tensor | None,
    q_norm: Norm | None,
    k_norm: Norm | None,
    rotary: Rotary | None,
    k_pages: Tensor,
    v_pages: Tensor,
    slot_mapping: Tensor,
) -> Tensor:
    """See `handloom_kernels.reference.norm_qkv`."""
    x, weight, own, bias = _matrix(hidden), _panels(weight), Scale.of(norm), _vector(bias)
    normed, qkv, slots = buffer(*x.shape), buffer(len(x), weight.shape[0]), slot_mapping.contiguous()
    scales, rows = (_scale(q_norm), _scale(k_norm)), torch.arange(len(x), device="cpu")
    if rotary is not None:
        rotary = Rotary(rotary.cos.contiguous(), rotary.sin.contiguous(), rotary.interleaved)
    run_once(
        [
            blocks.norm_rows(x, own, normed),
            *blocks.linear(normed, weight, bias, qkv),
            blocks.finish_qkv(qkv, *scales, rotary, k_pages, v_pages),
        ],
        {Frame.TOKENS: len(x), Frame.SLOT_MAPPING: address(slots), Frame.POSITIONS: address(rows)},
    )
    return heads_of(qkv, k_pages, v_pages).to(hidden.dtype)


def paged_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    cu_seqlens: Tensor,
    context_lens: Tensor,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    *,
    query_lens: Sequence[int] | None = None,
) -> Tensor:
    """See `handloom_kernels.reference.paged_attention`."""
    queries = q.float().contiguous()
    out = buffer(len(q), q.shape[1] * v_pages.shape[-1])
    table, starts, lengths = (x.long().contiguous() for x in (page_table, cu_seqlens, context_lens))
    frame = {
        Frame.TOKENS: len(q),
        Frame.SEQUENCES: len(lengths),
        Frame.PAGE_TABLE: address(table),
        Frame.MAX_PAGES: table.shape[1],
        Frame.CU_SEQLENS: address(starts),
        Frame.CONTEXT_LENS: address(lengths),
        Frame.PAGE_SIZE: k_pages.shape[1],
    }
    kept_splits = blocks.kept_splits(starts.diff().tolist(), lengths.tolist())
    features = scale, window, softcap, _vector(sinks), _vector(alibi_slopes)
    run_once(blocks.attend(queries, k_pages, v_pages, *features, out), frame, kept_splits)
    return out.to(q.dtype)


def linear_residual(x: Tensor, weight: Weight, bias: Tensor | None, post_norm: Norm | None, residual: Tensor) -> Tensor:
    """See `handloom_kernels.reference.linear_residual`."""
    rows, weight, bias, scale = _matrix(x), _panels(weight), _vector(bias), _scale(post_norm)
    out = _matrix(residual)
    if scale is None:
        steps: blocks.Instructions = [*blocks.linear(rows, weight, bias, out, residual=out)]
    else:
        added = buffer(*out.shape)
        steps = [*blocks.linear(rows, weight, bias, added), blocks.norm_rows(added, scale, out, residual=out)]
    run_once(steps, {Frame.TOKENS: len(rows)})
    return out.to(residual.dtype)


def norm_mlp(hidden: Tensor, norm: Norm, weight: Weight, bias: Tensor | None, activation: str, gated: bool) -> Tensor:
    """See `handloom_kernels.reference.norm_mlp`."""
    x, weight, own, bias = _matrix(hidden), _panels(weight), Scale.of(norm), _vector(bias)
    normed, up = buffer(*x.shape), buffer(len(x), weight.shape[0])
    out = buffer(len(x), weight.shape[0] // 2 if gated else weight.shape[0])
    run_once(
        [
            blocks.norm_rows(x, own, normed),
            *blocks.linear(normed, weight, bias, up),
            blocks.activate(up, activation, gated, out),
        ],
        {Frame.TOKENS: len(x)},
    )
    return out.to(hidden.dtype)


def perturb(scores: NDArray[np.float32], floors: NDArray[np.float32], keys: NDArray[np.int64]) -> NDArray[np.float32]:
    """`scores` [R, V] with noise added to each, to 1e-5; 16 tokens that are all below `floors` [R] give -inf.

    keys: [R, 3], the words of each row's seed and its position. The noise is that of `handloom.sampling.rng`.
    """
    out = np.empty(scores.shape, dtype=np.float32)
    run_bare(blocks.perturb(scores, floors, keys, out), {Frame.ROWS: len(scores)}, scores.size <= FEW_SCORES)
    return out


def lm_head(hidden: Tensor, norm: Norm, weight: Weight, softcap: float | None) -> Tensor:
    """See `handloom_kernels.reference.lm_head`."""
    x, weight, own = _matrix(hidden), _panels(weight), Scale.of(norm)
    normed, logits = buffer(*x.shape), torch.empty(len(x), weight.shape[0], dtype=torch.float32, device="cpu")
    run_once(
        [
            blocks.norm_rows(x, own, normed),
            *blocks.linear(normed, weight, None, logits, softcap=softcap),
        ],
        {Frame.TOKENS: len(x)},
    )
    return logits
