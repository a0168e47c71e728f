"""Quantised matrices as they are held in memory: codes, scales and minima, at the file's number of bits per weight.

A weight is a small integer, its code, and a few numbers that a group of columns of its row shares:

    w = scale * (code - zero) + minimum

`FORMATS` has the types of GGUF whose blocks we hold, taken apart into planes without loss: every code, every scale
(in K types the integers of the groups and the half-precision numbers of the 256 columns that they divide). Other
formats are made from float weights by `handloom.checkpoint.quantize`. `dequantize` is their meaning: one rounding of
the product (none in the types of GGUF, whose products fit a float32) and one of the sum, so that a compiled kernel
with one fused multiply-add per weight gives the same bits.

Weights that the forward pass holds stacked may come in several formats (q and k in Q4_K, v in Q6_K): a
`QuantizedMatrix` is a stack of `QuantizedRows`, each of one format.

This module does not know files, models, or how a product with such a matrix is computed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import Tensor

from handloom.checkpoint import memory

SUPER = 256
"""Columns that share the half-precision scale of a K type."""
CHUNK_WEIGHTS = 2**20
"""Weights that are made floats at a time where temporary memory is to stay small."""

ScaleKind = Literal["float32", "float16", "super"]
MinimumKind = Literal["none", "float16", "zero_point", "super"]


@dataclass(frozen=True, slots=True)
class Format:
    """How one quantised row is held.

    Attributes:
        name: "Q4_K", "int8", "int4:32"; what users are shown.
        bits: of a code: 4, 5 and 6 are unsigned, 8 signed.
        group: columns that share a scale (and a minimum); 0 is the whole row.
        zero: the code of weight 0 where there are no minima.
        scale: what the scale of a group is: a float32, a float16, or an integer of 8 bits to be multiplied by
            a float16 that `SUPER` columns share ("super").
        minimum: what is added: nothing; a float16; -scale * an integer of the group ("zero_point"); minus such an
            integer times a float16 that `SUPER` columns share ("super").
    """

    name: str
    bits: int
    group: int
    zero: int = 0
    scale: ScaleKind = "float16"
    minimum: MinimumKind = "none"

    @property
    def multiple(self) -> int:
        """What the number of columns must be a multiple of."""
        return SUPER if self.scale == "super" else max(self.group, 1)

    def groups(self, columns: int) -> int:
        return columns // self.group if self.group else 1

    def nbytes(self, rows: int, columns: int) -> int:
        """Bytes that a matrix of this format takes."""
        planes = _planes(self, columns)
        return rows * sum(width * dtype.itemsize for width, dtype in planes.values())


FORMATS = {
    f.name: f
    for f in (
        Format("Q8_0", 8, 32),
        Format("Q4_0", 4, 32, 8),
        Format("Q4_1", 4, 32, minimum="float16"),
        Format("Q5_0", 5, 32, 16),
        Format("Q5_1", 5, 32, minimum="float16"),
        Format("Q4_K", 4, 32, scale="super", minimum="super"),
        Format("Q5_K", 5, 32, scale="super", minimum="super"),
        Format("Q6_K", 6, 16, 32, scale="super"),
    )
}
"""The GGUF types that are held as they are, by name."""


def _planes(format: Format, columns: int) -> dict[str, tuple[int, torch.dtype]]:
    """Width and dtype of the planes of a row."""
    groups, supers = format.groups(columns), columns // SUPER
    planes = {"low": (columns, torch.int8) if format.bits == 8 else (columns // 2, torch.uint8)}
    if format.bits in (5, 6):
        planes["high"] = (columns * (format.bits - 4) // 8, torch.uint8)
    signed = format.scale == "super" and format.minimum == "none"
    scale = {"float32": torch.float32, "float16": torch.float16, "super": torch.int8 if signed else torch.uint8}
    planes["scale"] = (groups, scale[format.scale])
    if format.minimum != "none":
        planes["minimum"] = (groups, torch.float16 if format.minimum == "float16" else torch.uint8)
    if format.scale == "super":
        planes["super_scale"] = (supers, torch.float16)
    if format.minimum == "super":
        planes["super_minimum"] = (supers, torch.float16)
    return planes


@dataclass(frozen=True, slots=True)
class QuantizedRows:
    """Rows of one format; the planes are tensors [rows, ...] and None where the format has no such plane.

    Attributes:
        low: codes of 8 bits [rows, columns] int8; or the low four bits, [rows, columns / 2] uint8: byte j has
            column 2j in its low half and column 2j + 1 in its high half.
        high: the fifth bit, [rows, columns / 8]: bit i of byte j is column 8j + i; or the fifth and sixth,
            [rows, columns / 4]: bits 2i and 2i + 1 of byte j are column 4j + i.
        scale, minimum: [rows, groups]; super_scale, super_minimum: [rows, columns / SUPER] float16; see Format.
    """

    format: Format
    columns: int
    low: Tensor
    scale: Tensor
    high: Tensor | None = None
    minimum: Tensor | None = None
    super_scale: Tensor | None = None
    super_minimum: Tensor | None = None

    @classmethod
    def empty(
        cls,
        format: Format,
        rows: int,
        columns: int,
        multiple: int = 1,
        make: Callable[[Sequence[int], torch.dtype], Tensor] = memory.empty,
    ) -> QuantizedRows:
        """Memory for so many rows, and after them up to a multiple; columns must be one of format.multiple."""
        room, planes = -(-rows // multiple) * multiple, _planes(format, columns)
        return cls(
            format,
            columns,
            **{name: make((room, width), dtype)[:rows] for name, (width, dtype) in planes.items()},
        )

    def like(self, rows: int) -> QuantizedRows:
        """Memory for so many rows of this format and width."""
        return QuantizedRows.empty(self.format, rows, self.columns)

    def __len__(self) -> int:
        return len(self.low)

    def planes(self) -> Iterator[tuple[str, Tensor]]:
        """Name and tensor of each plane there is."""
        for field in fields(self):
            plane = getattr(self, field.name)
            if isinstance(plane, Tensor):
                yield field.name, plane

    @property
    def nbytes(self) -> int:
        return sum(plane.nbytes for _, plane in self.planes())

    def narrow(self, first: int, count: int) -> QuantizedRows:
        """Rows first, …, first + count - 1, sharing memory."""
        return self.with_planes({name: plane[first : first + count] for name, plane in self.planes()})

    def select(self, rows: Tensor) -> QuantizedRows:
        """Copies of the rows with these indices, int64 [n]."""
        return self.with_planes({name: plane.index_select(0, rows) for name, plane in self.planes()})

    def put(self, rows: Tensor, values: QuantizedRows) -> None:
        """Write rows of the same format to the rows with these indices, int64 [n]."""
        for name, plane in values.planes():
            getattr(self, name)[rows] = plane

    def with_planes(self, planes: dict[str, Tensor]) -> QuantizedRows:
        """Other rows of this format and width."""
        return QuantizedRows(self.format, self.columns, **planes)

    def codes(self) -> Tensor:
        """The codes [rows, columns], one a byte: int8 in formats of 8 bits, else uint8."""
        if self.format.bits == 8:
            return self.low
        codes = torch.stack((self.low & 15, self.low >> 4), dim=-1).view(len(self), self.columns)
        if self.high is None:
            return codes
        width = self.format.bits - 4
        shifts = torch.arange(0, 8, width, dtype=torch.uint8, device="cpu")
        high: Tensor = (self.high.unsqueeze(-1) >> shifts & (2**width - 1)) << 4
        codes |= high.view(codes.shape)
        return codes

    def scales(self) -> tuple[Tensor, Tensor | None]:
        """Scale and minimum of every group, each float32 [rows, groups]; None where nothing is added."""
        scale = self.scale.float()
        if self.super_scale is not None:
            scale = self._spread(self.super_scale) * scale
        if self.minimum is None:
            return scale, None
        if self.super_minimum is not None:
            return scale, -(self._spread(self.super_minimum) * self.minimum.float())
        minimum = self.minimum.float()
        return scale, -(scale * minimum) if self.format.minimum == "zero_point" else minimum

    def _spread(self, half: Tensor) -> Tensor:
        return half.float().repeat_interleave(SUPER // self.format.group, dim=1)

    def dequantize(self, out: Tensor) -> None:
        """Write the weights, rounded to out's dtype, into out [rows, columns]."""
        step = max(1, CHUNK_WEIGHTS // self.columns)
        for first in range(0, len(self), step):
            self.narrow(first, step)._dequantize(out[first : first + step])

    def _dequantize(self, out: Tensor) -> None:
        codes, (scale, minimum) = self.codes(), self.scales()
        if self.format.zero:
            codes = codes.view(torch.int8) - self.format.zero
        grouped = codes.view(*scale.shape, -1).float().mul_(scale.unsqueeze(-1))
        if minimum is not None:
            grouped += minimum.unsqueeze(-1)
        out.copy_(grouped.view(out.shape))


@dataclass(frozen=True, slots=True)
class QuantizedMatrix:
    """A matrix [rows, columns] of one or several formats, one below the other; like a Tensor where one is looked up.

    Attributes:
        dtype: what its weights are rounded to when they are taken as floats.
    """

    segments: Sequence[QuantizedRows]
    dtype: torch.dtype = torch.float32

    @property
    def shape(self) -> torch.Size:
        return torch.Size((sum(map(len, self.segments)), self.segments[0].columns))

    @property
    def nbytes(self) -> int:
        return sum(segment.nbytes for segment in self.segments)

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def held(self) -> dict[str, int]:
        """Bytes by format."""
        counts: Counter[str] = Counter()
        for segment in self.segments:
            counts[segment.format.name] += segment.nbytes
        return counts

    def __len__(self) -> int:
        return self.shape[0]

    def split(self, counts: Sequence[int]) -> list[QuantizedRows]:
        """Runs of so many rows, one after the other, each within one segment."""
        parts, segments = [], list(self.segments)
        for count in counts:
            parts.append(segments[0].narrow(0, count))
            rest = segments[0].narrow(count, len(segments[0]) - count)
            segments = [rest, *segments[1:]] if len(rest) else segments[1:]
        return parts

    def matrix(self) -> Tensor:
        """All weights, [rows, columns]."""
        out = torch.empty(self.shape, dtype=self.dtype, device="cpu")
        for segment, part in zip(self.segments, out.split([len(s) for s in self.segments]), strict=True):
            segment.dequantize(part)
        return out

    def __getitem__(self, indices: Tensor) -> Tensor:
        """The weights of some rows, int64 [n]: [n, columns]; what an embedding looks up."""
        out, first = torch.empty(len(indices), self.shape[1], dtype=self.dtype, device="cpu"), 0
        for segment in self.segments:
            inside = (indices >= first) & (indices < first + len(segment))
            chosen = segment.select(indices[inside] - first)
            values = torch.empty(len(chosen), chosen.columns, dtype=self.dtype, device="cpu")
            chosen.dequantize(values)
            out[inside] = values
            first += len(segment)
        return out
