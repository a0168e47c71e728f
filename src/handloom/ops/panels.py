"""Weights as the kernels read them: panels of PANEL columns, k after k, in place of the matrix.

A matrix [M, K] of M outputs becomes [ceil(M / PANEL), K, PANEL], zeros filling the last panel, so that one pass over
memory serves all rows of a product. It holds no second copy: the matrix can be let go. Of bfloat16 two k lie side by
side, [K / 2, PANEL, 2], as matrix units read them; the last k of an odd number of them lies as others do.

This module does not know kernels or models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from handloom.checkpoint import memory
from handloom.errors import UnsupportedOption

PANEL = 32
CHUNK_VALUES = 1 << 18
FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""The number by which kernels know how a value lies in memory, for weights, tables and pages of these dtypes."""


def format_of(dtype: torch.dtype) -> int:
    """The number of a dtype. Raises UnsupportedOption."""
    if dtype not in FORMATS:
        raise UnsupportedOption(
            f"backend 'cpu' computes with weights and a KV cache in float32, bfloat16 or float16, not {dtype}; "
            "choose 'torch'"
        )
    return FORMATS[dtype]


def _in_pairs(data: Tensor) -> Tensor:
    """[n, K, PANEL] seen as the pairs of k that it holds, [n, K // 2, PANEL, 2]."""
    count, depth, _ = data.shape
    return data.as_strided((count, depth // 2, PANEL, 2), (depth * PANEL, 2 * PANEL, 2, 1))


def _turn(rows: Tensor, data: Tensor) -> Tensor:
    """Lay out rows [n, PANEL, K] in data [n, K, PANEL], which it returns; of bfloat16 in pairs."""
    if rows.dtype != torch.bfloat16:
        return data.copy_(rows.transpose(1, 2))
    paired = rows.shape[2] // 2 * 2
    _in_pairs(data).copy_(rows[:, :, :paired].unflatten(2, (-1, 2)).transpose(1, 2))
    data[:, paired:] = rows[:, :, paired:].transpose(1, 2)
    return data


def lay_out(matrix: Tensor) -> Tensor:
    """[M, K] as [ceil(M / PANEL), K, PANEL], in new memory, zeros after the last row."""
    columns, depth = matrix.shape
    whole = columns // PANEL
    data = memory.empty((-(-columns // PANEL), depth, PANEL), matrix.dtype)
    _turn(matrix[: whole * PANEL].view(whole, PANEL, depth), data[:whole])
    if whole < len(data):
        last = matrix.new_zeros(1, PANEL, depth)
        last[0, : columns - whole * PANEL] = matrix[whole * PANEL :]
        _turn(last, data[whole:])
    return data


def lay_out_in_place(matrix: Tensor) -> Tensor:
    """The same in the matrix' own memory, if its storage goes on for whole panels; it is no matrix then."""
    columns, depth = matrix.shape
    count = -(-columns // PANEL)
    room = matrix.untyped_storage().nbytes() // matrix.element_size() - matrix.storage_offset()
    if not matrix.is_contiguous() or room < count * PANEL * depth:
        return lay_out(matrix)
    rows = matrix.as_strided((count * PANEL, depth), (depth, 1))
    rows[columns:] = 0
    data = rows.view(count, depth, PANEL)
    step = max(1, CHUNK_VALUES // (PANEL * depth))
    scratch = memory.empty((min(step, count), depth, PANEL), matrix.dtype)
    for first in range(0, count, step):
        part = data[first : first + step]
        part.copy_(_turn(part.view(-1, PANEL, depth), scratch[: len(part)]))
    return data


@dataclass(frozen=True, slots=True)
class Panels:
    """A weight matrix of this shape [M, K] in panels: data [ceil(M / PANEL), K, PANEL], contiguous.

    Quantised ones are `handloom.ops.quantized_panels.QuantizedPanels`.
    """

    data: Tensor
    shape: torch.Size
    format: int

    @classmethod
    def pack(cls, weight: Tensor) -> Panels:
        """Lay out a matrix anew. Raises UnsupportedOption for a dtype that the kernels do not read."""
        return cls(lay_out(weight), weight.shape, format_of(weight.dtype))

    @classmethod
    def take(cls, weight: Tensor) -> Panels:
        """Lay out a matrix in its own memory, if its storage goes on for whole panels; it is no matrix then."""
        return cls(lay_out_in_place(weight), weight.shape, format_of(weight.dtype))

    @property
    def dtype(self) -> torch.dtype:
        return self.data.dtype

    @property
    def device(self) -> torch.device:
        return self.data.device

    @property
    def nbytes(self) -> int:
        return self.data.nbytes

    def numel(self) -> int:
        return self.shape.numel()

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Tensor | Sequence[int] | int) -> Tensor:
        """Rows [..., K] of the matrix, by their numbers [...]."""
        rows = torch.as_tensor(rows, device=self.data.device)
        panel, column = rows // PANEL, rows % PANEL
        if self.dtype != torch.bfloat16:
            return self.data[panel, :, column]
        paired = self.shape[1] // 2 * 2
        pairs = _in_pairs(self.data)[panel, :, column].flatten(-2)
        return torch.cat((pairs, self.data[panel, paired:, column]), dim=-1)

    def matrix(self) -> Tensor:
        """The matrix itself, [M, K], as a new tensor."""
        if self.dtype != torch.bfloat16:
            return self.data.transpose(1, 2).reshape(-1, self.shape[1])[: self.shape[0]].contiguous()
        paired = self.shape[1] // 2 * 2
        rows = self.data.new_empty(len(self.data), PANEL, self.shape[1])
        rows[:, :, :paired] = _in_pairs(self.data).transpose(1, 2).flatten(2)
        rows[:, :, paired:] = self.data[:, paired:].transpose(1, 2)
        return rows.flatten(0, 1)[: self.shape[0]].contiguous()
