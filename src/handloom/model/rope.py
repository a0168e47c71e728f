"""Rotary position embedding: inverse frequencies and this step's cos and sin.

This module does not know how q and k are rotated (that is an op) nor which layers use which rope.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from handloom.model.spec import RopeSpec
from handloom.ops import Rotary


def inverse_frequencies(rope: RopeSpec, device: torch.device) -> Tensor:
    """Radians per position of each rotated pair, [rotary_dim / 2] float32 (Su et al. 2021, with `rope.scaling`)."""
    exponents = torch.arange(0, rope.rotary_dim, 2, dtype=torch.int64, device="cpu").float() / rope.rotary_dim
    inv_freq = 1.0 / (rope.theta**exponents)
    if rope.scaling == "linear":
        inv_freq = inv_freq / rope.factor
    elif rope.scaling == "llama3":
        inv_freq = _llama3(inv_freq, rope)
    return inv_freq.to(device)


def _llama3(inv_freq: Tensor, rope: RopeSpec) -> Tensor:
    """Llama 3.1: long wavelengths divided by factor, short ones kept, a linear blend between the two bands."""
    wavelength = 2 * math.pi / inv_freq
    longest, shortest = (rope.original_context / f for f in (rope.low_freq_factor, rope.high_freq_factor))
    blend = (rope.original_context / wavelength - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blended = (1 - blend) * inv_freq / rope.factor + blend * inv_freq
    scaled = torch.where(wavelength > longest, inv_freq / rope.factor, inv_freq)
    return torch.where((wavelength >= shortest) & (wavelength <= longest), blended, scaled)


def rotary_at(inv_freq: Tensor, positions: Tensor) -> Rotary:
    """cos and sin [N, rotary_dim / 2] float32 for positions [N]."""
    angles = positions[:, None].float() * inv_freq
    return Rotary(angles.cos(), angles.sin())
