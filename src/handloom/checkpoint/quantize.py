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
from functools import reduce

import torch
from torch import Tensor

from handloom.checkpoint import memory
from handloom.checkpoint.quantization import Format, QuantizedRows
from handloom.errors import CheckpointError, InvalidParam

GROUPS = (32, 64, 128)
CHUNK_WEIGHTS = 2**18
"""Weights that are worked on at a time: what is made of them on the way stays in a core's cache."""
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
            raise not_quantizable()


def not_quantizable() -> CheckpointError:
    """The error for weights of which there are no codes."""
    return CheckpointError("has weights that are NaN, infinite or too large to be quantised")


def _int8(values: Tensor, out: QuantizedRows) -> Tensor:
    """values [rows, groups, group] -> scales; codes are written to `out`."""
    codes = torch.abs(values, out=memory.empty(values.shape, values.dtype))
    scale = out.scale.copy_(codes.amax(-1) / 127).float()
    torch.mul(values, _inverse(scale).unsqueeze(-1), out=codes).round_().clamp_(-127, 127)
    out.low.copy_(codes.view(out.low.shape))
    return scale


def _int4(values: Tensor, out: QuantizedRows) -> Tensor:
    """values [rows, groups, group] -> the errors of the chosen scales; codes are written to `out`."""
    lowest, highest = values.amin(-1), values.amax(-1)
    shrink = torch.tensor(SHRINK, dtype=torch.float32, device="cpu").view(-1, 1, 1)
    if out.minimum is None:
        tried = (_largest_symmetric(lowest, highest) * shrink).half().float()
        inverse = _inverse(tried)
        zeros = torch.full_like(tried, 8.0)
    else:
        lowest.clamp_(max=0)
        highest.clamp_(min=0)
        tried = ((highest - lowest) / 15 * shrink).half().float()
        inverse = _inverse(tried)
        zeros = (7.5 - (highest + lowest) / 2 * inverse).round_().clamp_(0, 15)  # both ends are clipped equally
    errors = torch.empty_like(tried)
    places, codes = memory.empty(values.shape, values.dtype), memory.empty(values.shape, values.dtype)
    for i in range(len(SHRINK)):
        _round(values, inverse[i], zeros[i], places, codes)
        errors[i] = _sum(codes.sub_(places).square_())
    errors.mul_(tried.square())
    best = torch.where(errors < torch.inf, errors, torch.inf).min(0, keepdim=True)  # of what is no number, none
    scale, inverse, zero = (of.gather(0, best.indices).squeeze(0) for of in (tried, inverse, zeros))
    _round(values, inverse, zero, places, codes)
    packed = codes.view(len(out), -1).to(torch.uint8)
    out.low.copy_(packed[:, 0::2] | packed[:, 1::2] << 4)
    out.scale.copy_(scale)
    if out.minimum is not None:
        out.minimum.copy_(zero)
    return best.values


def _sum(squares: Tensor) -> Tensor:
    """Over the last dimension, in an order that is the same everywhere: columns 16 apart one after the other, then by
    halves. torch.sum's depends on the processor, and on it which of two scales is taken whose errors are nearly alike.
    """
    total: Tensor = reduce(torch.add, squares.unflatten(-1, (-1, 16)).unbind(-2))
    for width in (8, 4, 2, 1):
        total = total[..., :width] + total[..., width:]
    return total.squeeze(-1)


def _largest_symmetric(lowest: Tensor, highest: Tensor) -> Tensor:
    """The scale, with a sign, that takes the weight of largest magnitude to the code 0, which stands for -8."""
    return torch.where(-lowest >= highest, lowest, highest) / -8


def _round(values: Tensor, inverse: Tensor, zero: Tensor, places: Tensor, codes: Tensor) -> None:
    """Write where the values lie among the codes, and the nearest codes, as floats."""
    torch.mul(values, inverse.unsqueeze(-1), out=places).add_(zero.unsqueeze(-1))
    torch.round(places, out=codes).clamp_(0, 15)


def _inverse(scale: Tensor) -> Tensor:
    """1 / scale, and 0 for a group of zeros."""
    return torch.where(scale == 0, 0.0, 1 / scale)
