"""Activations of the MLP, alone or as the gate of the other half.

This module does not know what feeds them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2")
GATED_ACTIVATIONS = (*ACTIVATIONS, "swiglu_oss")


def activate(x: Tensor, activation: str) -> Tensor:
    """Apply one of ACTIVATIONS element-wise. "relu2" is relu(x)^2 (So et al. 2021)."""
    if activation == "silu":
        return F.silu(x)
    if activation == "relu":
        return F.relu(x)
    if activation == "relu2":
        return F.relu(x).square()
    return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")


def gated_activation(x: Tensor, activation: str) -> Tensor:
    """activate(gate) * up (Shazeer 2020) of x [..., 2 * I], the gate's columns first, to [..., I].

    activation: one of GATED_ACTIVATIONS. "swiglu_oss" is gpt-oss's: with the gate at most 7 and the other half within
    -7 and 7, gate * sigmoid(1.702 * gate) * (up + 1). Its checkpoints interleave the two; here they are halves.
    """
    gate, up = x.chunk(2, dim=-1)
    if activation == "swiglu_oss":
        gate, up = gate.clamp(max=7), up.clamp(-7, 7)
        return gate * torch.sigmoid(1.702 * gate) * (up + 1)
    return activate(gate, activation) * up
