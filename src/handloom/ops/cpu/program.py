"""A whole step of a model, recorded once as one table of instructions.

A step is recorded by running the model's own code once over a `Recorder`, whose ops compute nothing and note what is to
be computed, on buffers that are kept; after that a step is one call of compiled code, whatever the number of layers.

This module does not know models' specs or requests, nor how threads share the work.
"""

from __future__ import annotations

import threading
from array import array
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from handloom.ops.cpu import blocks
from handloom.ops.cpu import instructions as ins
from handloom.ops.cpu.blocks import Instructions, Scale, Weight
from handloom.ops.cpu.compiled import compiled_step
from handloom.ops.cpu.instructions import Frame
from handloom.ops.cpu.machine import Machine, table_of
from handloom.ops.panels import Panels
from handloom.ops.quantized_panels import QuantizedPanels
from handloom_kernels.reference import Norm, Rotary

InPanels = Panels | QuantizedPanels
KVPages = Sequence[tuple[Tensor, Tensor]]
MIN_CAPACITY = 16
MIN_POSITIONS = 1024
SET = 256  # floats: rows a multiple of this apart would fall on the same lines of a cache
LINE = 16


def buffer(rows: int, width: int) -> Tensor:
    """An uninitialised matrix [rows, width] float32 whose rows are whole cache lines, and do not crowd one another."""
    padded = -(-width // LINE) * LINE
    padded += LINE if padded % SET == 0 else 0
    return torch.empty(rows, padded, dtype=torch.float32, device="cpu")[:, :width]


def heads_of(qkv: Tensor, k_pages: Tensor, v_pages: Tensor) -> Tensor:
    """The queries [N, num_heads, head_dim] in qkv."""
    num_kv_heads, head_dim = k_pages.shape[-2:]
    columns = qkv.shape[1] - num_kv_heads * (head_dim + v_pages.shape[-1])
    heads: Tensor = qkv[:, :columns].unflatten(1, (-1, head_dim))
    return heads


class Recorder:
    """`Ops` that note what they would compute. Tensors they return are whole buffers, for `capacity` rows."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.rows: Instructions = []
        self.kept: list[object] = []
        self._buffers: dict[tuple[str, int], Tensor] = {}

    def matrix(self, name: str, width: int) -> Tensor:
        """The buffer of this name, made when first asked for."""
        key = name, width
        if key not in self._buffers:
            self._buffers[key] = buffer(self.capacity, width)
        return self._buffers[key]

    def _keep(self, norm: Norm | None) -> Scale | None:
        if norm is None:
            return None
        scale = Scale.of(norm)
        self.kept.append(scale)
        return scale

    def _float(self, bias: Tensor | None) -> Tensor | None:
        if bias is not None:
            bias = bias.float().contiguous()
            self.kept.append(bias)
        return bias

    def embed(
        self,
        input_ids: Tensor,
        weight: Weight,
        scale: float,
        positions: Tensor,
        position_weight: Tensor | None,
    ) -> Tensor:
        out = self.matrix("hidden", weight.shape[1])
        self.rows.append(blocks.embed(weight, scale, position_weight, weight.dtype, out))
        return out

    def norm_qkv(
        self,
        hidden: Tensor,
        norm: Norm,
        weight: InPanels,
        bias: Tensor | None,
        q_norm: Norm | None,
        k_norm: Norm | None,
        rotary: Rotary | None,
        k_pages: Tensor,
        v_pages: Tensor,
        slot_mapping: Tensor,
    ) -> Tensor:
        normed, qkv = self.matrix("normed", hidden.shape[1]), self.matrix("qkv", weight.shape[0])
        scale = self._keep(norm)
        assert scale is not None
        self.rows += [
            blocks.norm_rows(hidden, scale, normed),
            *blocks.linear(normed, weight, self._float(bias), qkv),
            blocks.finish_qkv(qkv, self._keep(q_norm), self._keep(k_norm), rotary, k_pages, v_pages),
        ]
        return heads_of(qkv, k_pages, v_pages)

    def paged_attention(
        self,
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
        out = self.matrix("attended", q.shape[1] * v_pages.shape[-1])
        features = scale, window, softcap, self._float(sinks), self._float(alibi_slopes)
        self.rows += blocks.attend(q, k_pages, v_pages, *features, out)
        return out

    def linear_residual(
        self, x: Tensor, weight: InPanels, bias: Tensor | None, post_norm: Norm | None, residual: Tensor
    ) -> Tensor:
        bias, scale = self._float(bias), self._keep(post_norm)
        if scale is None:
            self.rows += blocks.linear(x, weight, bias, residual, residual=residual)
            return residual
        added = self.matrix("normed", residual.shape[1])
        self.rows += [
            *blocks.linear(x, weight, bias, added),
            blocks.norm_rows(added, scale, residual, residual=residual),
        ]
        return residual

    def norm_mlp(
        self,
        hidden: Tensor,
        norm: Norm,
        weight: InPanels,
        bias: Tensor | None,
        activation: str,
        gated: bool,
    ) -> Tensor:
        normed, scale = self.matrix("normed", hidden.shape[1]), self._keep(norm)
        assert scale is not None
        up = self.matrix("up", weight.shape[0])
        out = self.matrix("mlp", weight.shape[0] // 2 if gated else weight.shape[0])
        self.rows += [
            blocks.norm_rows(hidden, scale, normed),
            *blocks.linear(normed, weight, self._float(bias), up),
            blocks.activate(up, activation, gated, out),
        ]
        return out

    def lm_head(self, hidden: Tensor, norm: Norm, weight: InPanels, softcap: float | None) -> Tensor:
        """Of the rows of the stream that the batch wants logits of; `hidden` is not looked at."""
        stream, normed = self.matrix("hidden", hidden.shape[1]), self.matrix("normed", hidden.shape[1])
        scale = self._keep(norm)
        assert scale is not None
        self.rows += [
            blocks.norm_rows(stream, scale, normed, count=Frame.ROWS, gather=True),
            *blocks.linear(normed, weight, None, None, softcap=softcap, count=Frame.ROWS),
        ]
        return torch.empty(0, weight.shape[0], device="cpu")


class Batch(Protocol):
    """What a step needs of a `HostBatch`."""

    @property
    def input_ids(self) -> Sequence[int]: ...
    @property
    def positions(self) -> Sequence[int]: ...
    @property
    def cu_seqlens(self) -> Sequence[int]: ...
    @property
    def context_lens(self) -> Sequence[int]: ...
    @property
    def slot_mapping(self) -> Sequence[int]: ...
    @property
    def logits_rows(self) -> Sequence[int]: ...
    @property
    def query_lens(self) -> Sequence[int]: ...
    def page_table(self) -> tuple[Sequence[int], int]: ...


Compute = Callable[[Recorder, list[Rotary], KVPages], Tensor]
RotariesAt = Callable[[Tensor], list[Rotary]]


class Program:
    """A model's step; see `handloom.ops.Program`."""

    def __init__(self) -> None:
        compiled_step()  # now, rather than in the first step
        self._machine, self._lock = Machine(), threading.Lock()
        self._recorder: Recorder | None = None  # owns what the table points to
        self._kv: KVPages | None = None  # which the table writes to; None while nothing is recorded
        self._capacity = self._positions = 0
        self._rotaries = list[Rotary]()

    def run(self, compute: Compute, batch: Batch, rotaries: RotariesAt, kv: KVPages) -> Tensor:
        """One step: K and V into their pages, and logits [R, vocab_size] float32, a new tensor."""
        count = len(batch.logits_rows)
        rows, positions = max(len(batch.input_ids), count), max(batch.positions) + 1
        with self._lock:
            if kv is not self._kv or rows > self._capacity or positions > self._positions:
                self._record(compute, rows, positions, rotaries, kv)
            logits = torch.empty(count, self._width, dtype=torch.float32, device="cpu")
            kept = self._kept * blocks.kept_splits(batch.query_lens, batch.context_lens)
            kept = max(kept, self._split * -(-rows // ins.QUAD))
            numbers, entries = lay_out(batch)
            self._machine.run(self._table, self._scratch, kept, [*entries, self._page_size, logits.data_ptr()])
            del numbers  # which the entries point into
        return logits

    def _record(self, compute: Compute, rows: int, positions: int, rotaries: RotariesAt, kv: KVPages) -> None:
        """Record the step on these pages, with room for so many rows and positions."""
        self._kv = self._recorder = None  # what fails below leaves nothing half made
        if positions > self._positions:
            most = max(MIN_POSITIONS, 1 << (positions - 1).bit_length())
            self._rotaries, self._positions = rotaries(torch.arange(most, device="cpu")), most
        self._capacity = max(MIN_CAPACITY, 1 << (rows - 1).bit_length(), self._capacity)
        recorder = Recorder(self._capacity)
        self._width = compute(recorder, self._rotaries, kv).shape[1]
        self._table = table_of(recorder.rows)
        self._scratch, self._kept = blocks.scratch_bytes(recorder.rows), blocks.kept_bytes(recorder.rows)
        self._split, self._page_size = blocks.split_bytes(recorder.rows), kv[0][0].shape[1]
        self._recorder, self._kv = recorder, kv


def lay_out(batch: Batch) -> tuple[array[int], list[int]]:
    """A step's numbers in memory, which has to be kept while it runs, and the entries of its frame up to PAGE_TABLE."""
    tokens, sequences, rows = len(batch.input_ids), len(batch.context_lens), len(batch.logits_rows)
    table, max_pages = batch.page_table()
    numbers = array(
        "q",
        [
            *batch.input_ids, *batch.positions, *batch.slot_mapping, *batch.cu_seqlens, *batch.context_lens,
            *batch.logits_rows, *table,
        ],
    )  # fmt: skip
    input_ids, _ = numbers.buffer_info()
    positions = input_ids + 8 * tokens
    slot_mapping = positions + 8 * tokens
    cu_seqlens = slot_mapping + 8 * tokens
    context_lens = cu_seqlens + 8 * (sequences + 1)
    logits_rows = context_lens + 8 * sequences
    page_table = logits_rows + 8 * rows
    return numbers, [
        tokens, sequences, rows, input_ids, positions, slot_mapping, cu_seqlens, context_lens, logits_rows, max_pages,
        page_table,
    ]  # fmt: skip
