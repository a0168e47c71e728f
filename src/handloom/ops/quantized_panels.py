"""Quantised weights as the kernels read them: the planes of `QuantizedRows` in panels, at the same number of bits.

Each plane [rows, width] becomes [ceil(rows / PANEL), width, PANEL]: codes of less than 8 bits go as words of 32 bits,
which hold 8 columns of low bits (32 of a fifth, 16 of a fifth and sixth), so that one vector has the same columns of 16
rows, and a shift gives one column of each. Zeros fill the last panel.

This module does not know kernels or models.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from handloom.checkpoint.quantization import QuantizedMatrix, QuantizedRows
from handloom.ops.panels import PANEL, lay_out, lay_out_in_place

WHOLE_ROW = 40
"""The power of 2 that stands for a group of all columns."""
SCALE_KINDS = {"float32": 0, "float16": 1, "super": 2}
MINIMUM_KINDS = {"none": 0, "float16": 1, "zero_point": 2, "super": 3}
QUANTIZED = 3
"""The number by which kernels know that a weight is a segment, beside those of `panels.FORMATS`."""
PLANES = ("low", "high", "scale", "minimum", "super_scale", "super_minimum")


@dataclass(frozen=True, slots=True)
class Segment:
    """Rows of one format.

    Attributes:
        like: no rows of the same format, as a checkpoint has them.
        planes: by the names of QuantizedRows, [panels, width, PANEL]; codes of less than 8 bits as int32.
        entries: what a kernel knows of it, int64: addresses of the planes in the order of PLANES (0: there is none),
            then bits, the power of 2 that is the group, groups of a row, zero, kind of scale and of minimum.
    """

    rows: int
    columns: int
    planes: Mapping[str, Tensor]
    like: QuantizedRows
    entries: np.ndarray[Any, np.dtype[np.int64]]

    @classmethod
    def pack(cls, held: QuantizedRows, lay_out: Callable[[Tensor], Tensor] = lay_out) -> Segment:
        """Lay out rows anew, or with `lay_out_in_place` in their own memory, where that goes."""
        planes = {name: lay_out(_words(name, plane)) for name, plane in held.planes()}
        form, like = held.format, QuantizedRows.empty(held.format, 0, held.columns)
        entries = [planes[name].data_ptr() if name in planes else 0 for name in PLANES]
        shift = form.group.bit_length() - 1 if form.group else WHOLE_ROW
        entries += [form.bits, shift, form.groups(held.columns), form.zero]
        entries += [SCALE_KINDS[form.scale], MINIMUM_KINDS[form.minimum]]
        return cls(len(held), held.columns, planes, like, np.array(entries, dtype=np.int64))

    @property
    def nbytes(self) -> int:
        return sum(plane.nbytes for plane in self.planes.values())

    def select(self, rows: Tensor) -> QuantizedRows:
        """Copies of the rows with these indices, int64 [n], as a checkpoint has them."""
        dtypes = {name: plane.dtype for name, plane in self.like.planes()}
        return self.like.with_planes(
            {name: plane[rows // PANEL, :, rows % PANEL].view(dtypes[name]) for name, plane in self.planes.items()}
        )


@dataclass(frozen=True, slots=True)
class QuantizedPanels:
    """A quantised matrix of this shape [M, K] in panels; dtype: what its weights are rounded to as floats."""

    segments: Sequence[Segment]
    shape: torch.Size
    dtype: torch.dtype

    @classmethod
    def pack(cls, held: QuantizedMatrix) -> QuantizedPanels:
        """Lay out a matrix anew."""
        return cls([Segment.pack(segment) for segment in held.segments], held.shape, held.dtype)

    @classmethod
    def take(cls, held: QuantizedMatrix) -> QuantizedPanels:
        """Lay out a matrix in its own memory, where that has room for whole panels; it is no matrix then."""
        return cls([Segment.pack(segment, lay_out_in_place) for segment in held.segments], held.shape, held.dtype)

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def nbytes(self) -> int:
        return sum(segment.nbytes for segment in self.segments)

    @property
    def held(self) -> dict[str, int]:
        """Bytes by format."""
        counts: Counter[str] = Counter()
        for segment in self.segments:
            counts[segment.like.format.name] += segment.nbytes
        return counts

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Tensor) -> Tensor:
        """Rows [n, K] of the matrix, by their numbers [n] int64."""
        if len(self.segments) > 1:
            return self.unpack()[rows]
        return QuantizedMatrix([self.segments[0].select(rows)], self.dtype).matrix()

    def unpack(self) -> QuantizedMatrix:
        """As a checkpoint has it, anew."""
        return QuantizedMatrix([s.select(torch.arange(s.rows, device="cpu")) for s in self.segments], self.dtype)

    def matrix(self) -> Tensor:
        """The matrix itself, [M, K], as a new tensor."""
        return self.unpack().matrix()


def _words(name: str, plane: Tensor) -> Tensor:
    packed = name in ("low", "high") and plane.dtype == torch.uint8
    return plane.contiguous().view(torch.int32) if packed else plane
