"""Normalisation of hidden states.

This module does not know what is normalised or why.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

NORM_KINDS = ("rms", "rms_unit_offset", "layer")


class Norm(NamedTuple):
    """A normalisation over the last dimension.

    kind: "rms" (Zhang & Sennrich 2019, as Llama: scale after the cast back), "rms_unit_offset"
    (as Gemma: multiply by 1 + weight in float32, then cast back) or "layer" (Ba et al. 2016).
    """

    kind: str
    weight: Tensor
    bias: Tensor | None
    eps: float


def normalize(x: Tensor, norm: Norm) -> Tensor:
    """Normalise x [..., H] over its last dimension in float32 (float64 stays float64); the result has x's dtype."""
    if norm.kind == "layer":
        return F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + norm.eps)
    if norm.kind == "rms_unit_offset":
        return (wide * (1.0 + norm.weight.to(wide.dtype))).to(x.dtype)
    return (norm.weight * wide.to(x.dtype)).to(x.dtype)


def add_normalize(x: Tensor, residual: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
    """(normalize(residual + x), residual + x), both [..., H]: one half of a layer ends, the next begins."""
    hidden = residual + x
    return normalize(hidden, norm), hidden


def normalize_add(x: Tensor, residual: Tensor, norm: Norm) -> Tensor:
    """residual + normalize(x), both [..., H]: the end of half a layer that normalises what it adds (Gemma)."""
    return residual + normalize(x, norm)
