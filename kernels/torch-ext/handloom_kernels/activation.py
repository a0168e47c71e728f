"""Activations of the MLP, alone or as the gate of the other half.

This module does not know what feeds them.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def activate_tile(x, ACTIVATION: tl.constexpr):
    """`reference.activate` of a float32 tile."""
    if ACTIVATION == "silu":
        y = x * tl.sigmoid(x)
    elif ACTIVATION == "gelu":
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        # (1 + tanh(u)) / 2 = sigmoid(2u), which no u overflows; sqrt(8 / pi) = 1.5957691216057308
        y = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif ACTIVATION == "relu":
        y = tl.where(x < 0.0, 0.0, x)
    else:
        tl.static_assert(ACTIVATION == "relu2", "an unknown activation")
        y = tl.where(x < 0.0, 0.0, x * x)
    return y


@triton.jit
def gate_tile(gate, up, ACTIVATION: tl.constexpr):
    """`reference.gated_activation` of float32 tiles of the gate and of the other half."""
    if ACTIVATION == "swiglu_oss":
        gate = tl.where(gate > 7.0, 7.0, gate)
        up = tl.where(up > 7.0, 7.0, tl.where(up < -7.0, -7.0, up))
        y = gate * tl.sigmoid(1.702 * gate) * (up + 1.0)
    else:
        y = activate_tile(gate, ACTIVATION) * up
    return y
