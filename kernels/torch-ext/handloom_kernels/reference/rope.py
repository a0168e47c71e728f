"""Rotary position embedding.

This module does not know how the angles come about.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Rotary(NamedTuple):
    """Rotary position embedding (Su et al. 2021) at this step's positions: cos, sin [N, rotary_dim / 2] float32.

    Halves are rotated (dimension i with i + rotary_dim / 2), as in every Hub checkpoint of the Llama kind.
    """

    cos: Tensor
    sin: Tensor


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Rotate x [N, heads, head_dim]; dimensions past rotary_dim pass through."""
    half = rotary.cos.shape[-1]
    cos, sin = (t.to(x.dtype).unsqueeze(1) for t in rotary)
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)
