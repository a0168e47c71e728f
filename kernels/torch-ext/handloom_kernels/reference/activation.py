"""Activations of the MLP.

This module does not know what feeds them.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F  # noqa: N812

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")


def activate(x: Tensor, activation: str) -> Tensor:
    """Apply one of ACTIVATIONS element-wise."""
    if activation == "silu":
        return F.silu(x)
    if activation == "relu":
        return F.relu(x)
    return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")
