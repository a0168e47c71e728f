"""Weights as the kernels read them: panels of PANEL columns, k after k, in place of the matrix.

A matrix [M, K] of M outputs becomes [ceil(M / PANEL), K, PANEL], zeros filling the last panel, so that one pass over
memory serves all rows of a product. It holds no second copy: the matrix can be let go.

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


def lay_out(matrix: Tensor) -> Tensor:
    """[M, K] as [ceil(M / PANEL), K, PANEL], in new memory, zeros after the last row."""
    columns, depth = matrix.shape
    whole = columns // PANEL
    data = memory.empty((-(-columns // PANEL), depth, PANEL), matrix.dtype)
    data[:whole] = matrix[: whole * PANEL].view(whole, PANEL, depth).transpose(1, 2)
    if whole < len(data):
        data[whole] = 0
        data[whole, :, : columns - whole * PANEL] = matrix[whole * PANEL :].T
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
        turned = scratch[: len(part)].copy_(part.view(-1, PANEL, depth).transpose(1, 2))
        part.copy_(turned)
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
        return self.data[rows // PANEL, :, rows % PANEL]

    def matrix(self) -> Tensor:
        """The matrix itself, [M, K], as a new tensor."""
        return self.data.transpose(1, 2).reshape(-1, self.shape[1])[: self.shape[0]].contiguous()
