"""Float weights to codes of 8 or 4 bits: what `quantize="int8"` and `quantize="int4"` mean.

Weights are rounded to the nearest code; only the scale of a group is chosen. With 8 bits the largest weight of the
group decides it. With 4 bits that is too coarse: of the scales `SHRINK` times it the one with the least squared error
is taken, which clips the largest weights of some groups. On the embedding of SmolLM2-135M the relative error of 4 bits
in groups of 32 is 0.086 so, and 0.101 without zero points and without that choice (Q4_0).

This module does not know files, models, or which of a model's weights are quantised.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from handloom.checkpoint.quantization import CHUNK_WEIGHTS, Format, QuantizedRows
from handloom.errors import CheckpointError, InvalidParam

GROUPS = (32, 64, 128)
SHRINK = (1.04, 0.97, 0.9, 0.83, 0.76)
"""The scales that are tried with 4 bits, as parts of the one that clips nothing; twelve bring 0.2% less error."""
_SPELLING = re.compile(r"(int8|int4|int4-sym)(?::(\d{1,4}))?")


@dataclass(frozen=True, slots=True)
class Scheme:
    """How float weights are quantised.

    Attributes:
        bits: 8 or 4.
        group: columns that share a scale: 0 (a whole row, only with 8 bits), 32, 64 or 128.
        symmetric: codes are counted from their middle; otherwise from a zero point that each group has.
    """

    bits: int
    group: int
    symmetric: bool = True

    @classmethod
    def parse(cls, text: str) -> Scheme:
        """ "int8" (a scale per row), "int8:64", "int4" (groups of 32), "int4:128", "int4-sym:64".

        Raises InvalidParam for anything else.
        """
        match = _SPELLING.fullmatch(text) if isinstance(text, str) else None
        if match is None or (match[2] is not None and int(match[2]) not in GROUPS):
            raise InvalidParam(
                f"quantize is {text!r}; expected 'int8' (a scale per row), 'int4' or 'int4-sym' (without zero points; "
                f"a scale per {GROUPS[0]} columns), or one of them with a group of {', '.join(map(str, GROUPS))} "
                "columns, such as 'int4:64'"
            )
        kind, group = match[1], int(match[2] or 0)
        if kind == "int8":
            return cls(8, group)
        return cls(4, group or GROUPS[0], symmetric=kind == "int4-sym")

    @property
    def name(self) -> str:
        kind = "int4-sym" if self.bits == 4 and self.symmetric else f"int{self.bits}"
        return f"{kind}:{self.group}" if self.group else kind

    @property
    def outer(self) -> Scheme:
        """For the embedding and the head: 8 bits in any case, since 4 cost several times as much there as elsewhere."""
        return self if self.bits == 8 else Scheme(8, 0)

    @property
    def format(self) -> Format:
        if self.bits == 8:
            return Format(self.name, 8, self.group, scale="float16" if self.group else "float32")
        if self.symmetric:
            return Format(self.name, 4, self.group, zero=8)
        return Format(self.name, 4, self.group, minimum="zero_point")


def quantize_rows(weights: Tensor, out: QuantizedRows) -> None:
    """Write float weights [rows, columns] into `out`, whose format is that of a `Scheme`.

    Raises CheckpointError for weights that are NaN, infinite or too large for a half-precision scale.
    """
    step = max(1, CHUNK_WEIGHTS // out.columns)
    for first in range(0, len(out), step):
        part = out.narrow(first, step)
        values = weights[first : first + step].float().view(len(part), part.format.groups(part.columns), -1)
        chosen = _int8(values, part) if part.format.bits == 8 else _int4(values, part)
        if not bool(torch.isfinite(chosen).all()):
            raise CheckpointError("has weights that are NaN, infinite or too large to be quantised")


def _int8(values: Tensor, out: QuantizedRows) -> Tensor:
    """values [rows, groups, group] -> scales; codes are written to `out`."""
    scale = out.scale.copy_(values.abs().amax(-1) / 127).float()
    codes = (values * _inverse(scale)).round_().clamp_(-127, 127)
    out.low.copy_(codes.view(out.low.shape))
    return scale


def _int4(values: Tensor, out: QuantizedRows) -> Tensor:
    """values [rows, groups, group] -> scales; codes are written to `out`."""
    symmetric = out.format.minimum == "none"
    largest = _largest_symmetric(values) if symmetric else _range(values) / 15
    best = torch.full(largest.shape, torch.inf)
    scale, zero = torch.empty_like(largest), torch.zeros_like(largest)
    for shrink in SHRINK:
        tried = (largest * shrink).half().float()
        origin = torch.full_like(tried, 8.0) if symmetric else _zero_points(values, tried)
        error = (_round(values, tried, origin) - origin.unsqueeze(-1)).mul_(tried.unsqueeze(-1))
        error = error.sub_(values).square_().sum(-1)
        better = error < best
        best = torch.where(better, error, best)
        scale, zero = torch.where(better, tried, scale), torch.where(better, origin, zero)
    codes = _round(values, scale, zero).view(len(out), -1).to(torch.uint8)
    out.low.copy_(codes[:, 0::2] | codes[:, 1::2] << 4)
    out.scale.copy_(scale)
    if out.minimum is not None:
        out.minimum.copy_(zero)
    return best


def _largest_symmetric(values: Tensor) -> Tensor:
    """The scale, with a sign, that takes the weight of largest magnitude to the code 0, which stands for -8."""
    at = values.abs().argmax(-1, keepdim=True)
    return values.gather(-1, at).squeeze(-1) / -8


def _range(values: Tensor) -> Tensor:
    return values.amax(-1).clamp(min=0) - values.amin(-1).clamp(max=0)


def _zero_points(values: Tensor, scale: Tensor) -> Tensor:
    """The code of 0 with which both ends of the range are clipped equally."""
    middle = (values.amax(-1).clamp(min=0) + values.amin(-1).clamp(max=0)) / 2
    return (7.5 - middle * _inverse(scale).squeeze(-1)).round_().clamp_(0, 15)


def _round(values: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """The nearest codes, as floats."""
    return (values * _inverse(scale)).add_(zero.unsqueeze(-1)).round_().clamp_(0, 15)


def _inverse(scale: Tensor) -> Tensor:
    """1 / scale, and 0 for a group of zeros: [..., 1]."""
    return torch.where(scale == 0, 0.0, 1 / scale).unsqueeze(-1)
