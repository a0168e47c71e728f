"""The two ends of the model: token embeddings in, logits out.

This module does not know how a token is chosen.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from .norm import Norm, normalize


def embed(input_ids: Tensor, weight: Tensor, scale: float, positions: Tensor, position_weight: Tensor | None) -> Tensor:
    """Look up token embeddings.

    Args: input_ids, positions [N] int64; weight [vocab_size, H]; scale, rounded to weight's dtype (as
    Gemma does); position_weight [max_positions, H] for learned positions. Returns hidden_states [N, H].
    """
    hidden = F.embedding(input_ids, weight)
    if scale != 1.0:
        hidden = hidden * torch.tensor(scale, dtype=weight.dtype, device=weight.device)
    return hidden if position_weight is None else hidden + F.embedding(positions, position_weight)


def lm_head(hidden: Tensor, norm: Norm, weight: Tensor, softcap: float | None) -> Tensor:
    """Final norm and vocabulary projection of the R rows that need logits: [R, H] -> [R, vocab_size] float32."""
    logits = F.linear(normalize(hidden, norm), weight)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits.float()
