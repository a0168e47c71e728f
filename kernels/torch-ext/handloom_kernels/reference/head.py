"""The two ends of the model: token embeddings in, logits or tokens out.

This module does not know which rules reshape logits.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from .norm import Norm, normalize
from .sampling import draw


def embed(input_ids: Tensor, weight: Tensor, scale: float, positions: Tensor, position_weight: Tensor | None) -> Tensor:
    """Look up token embeddings.

    Args: input_ids, positions [N] int64; weight [vocab_size, H]; scale, rounded to weight's dtype (as
    Gemma does); position_weight [max_positions, H] for learned positions. Returns hidden_states [N, H].
    """
    hidden = F.embedding(input_ids, weight)
    if scale != 1.0:
        hidden = hidden * torch.tensor(scale, dtype=weight.dtype, device="cpu")  # nothing is copied to a device
    return hidden if position_weight is None else hidden + F.embedding(positions, position_weight)


def lm_head(hidden: Tensor, norm: Norm, weight: Tensor, softcap: float | None) -> Tensor:
    """Final norm and vocabulary projection of the R rows that need logits: [R, H] -> [R, vocab_size] float32."""
    logits = F.linear(normalize(hidden, norm), weight)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits.float()


def lm_head_choose(
    hidden: Tensor,
    norm: Norm,
    weight: Tensor,
    softcap: float | None,
    temperature: Tensor | None,
    greedy: Tensor | None,
    seeds: Tensor | None,
    positions: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """One token per row of `lm_head`'s logits: (token_ids [R] int64, -1 where there is none; logprobs [R] float32).

    temperature, greedy, seeds and positions as in `draw`.
    """
    choice = draw(lm_head(hidden, norm, weight, softcap), seeds, positions, temperature, greedy)
    return choice.token_ids, choice.logprobs
